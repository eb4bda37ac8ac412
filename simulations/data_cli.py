"""`visard data show`: who would hold what. What is slow to import is imported when it is used."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.options import with_run_options
from simulations.recipe import load_recipe, recipe_names

if TYPE_CHECKING:
    from simulations.show import Holdings

console = Console()


def _show(
    recipe: Annotated[str, typer.Argument(help=f"{', '.join(recipe_names())}, or a path to a .toml")] = "demo",
    out: Annotated[Path, typer.Option(help="The picture to write")] = Path("held.png"),
    overrides: dict[str, Any] | None = None,
) -> None:
    """Deal the faces out as `visard simulate` would with the same options, and draw who holds what.

    The picture has a few faces of each client. Nothing is trained.
    """
    config = load_recipe(recipe, overrides or {})
    from common.faces.places import refuse_among

    refuse_among(out, config.simulation.data)
    with console.status("dealing out the faces"):
        from common.fields import listed
        from simulations.partition import partition
        from simulations.show import draw, holdings, told_by
        from simulations.simulate import load_simulated_faces

        simulation = config.simulation
        faces = load_simulated_faces(config)
        shares = partition(faces, simulation, config.training.seed)
        held = holdings(faces, shares, told_by(faces, simulation.partition_by), listed(simulation.label_values))
        how = {
            "dirichlet": f", alpha {simulation.dirichlet_alpha:g}",
            "power-law": f", exponent {simulation.power_law_exponent:g}",
        }
        title = f"{len(faces):,} images at {len(shares)} clients by {simulation.partitioner}{how.get(simulation.partitioner, '')}"
        draw(out, faces, shares, held, title)
    console.print(title, highlight=False, soft_wrap=True)
    console.print(_table(held))
    console.print(f"picture: {out}", highlight=False, markup=False, soft_wrap=True)


show = with_run_options(_show)


def _table(held: "Holdings") -> Table:
    from simulations.show import MAX_CLIENTS, NOT_SAID

    table = Table()
    persons = held.clients[0].persons is not None
    for name in ("client", "images", *(["persons"] if persons else []), *held.values):
        shown = "".join(char if char.isprintable() else "?" for char in name)
        table.add_column(escape(shown) or NOT_SAID, justify="right")
    for number, client in enumerate(held.clients[:MAX_CLIENTS]):
        counts = [client.images, *([client.persons] if client.persons is not None else []), *client.values.values()]
        table.add_row(str(number), *(f"{count:,}" for count in counts))
    if len(held.clients) > MAX_CLIENTS:
        table.add_row("...")
    return table
