"""`visard plan`: what a budget buys. What is slow to import is imported when it is used."""

import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.options import with_run_options
from simulations.plan_words import in_rounds, number
from simulations.recipe import recipe_names

if TYPE_CHECKING:
    from simulations.plan import ModelPlan, Plan
    from simulations.plan_advice import Suggestion

console = Console()


def _plan(
    recipe: Annotated[str, typer.Argument(help=f"{', '.join(recipe_names())}, or a path to a .toml")] = "demo",
    persons: Annotated[
        float | None,
        typer.Option(help="Units of all clients together", show_default="expected-batch / sample-rate x num-clients"),
    ] = None,
    batch: Annotated[
        float | None, typer.Option(help="Units of all clients in a step, in place of --expected-batch")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Draw epsilon against rounds to this PNG")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON, and nothing else")] = False,
    overrides: dict[str, Any] | None = None,
) -> None:
    """Say what a budget buys, before anybody's data is touched: noise, epsilon, signal-to-noise and a verdict.

    Of --epsilon, --noise-multiplier and --num-rounds give two: the third is computed.
    Given one, the recipe's rounds are kept, or with --num-rounds its epsilon.
    Then the noise is computed, or with --noise-multiplier the epsilon. Given none, the plan is the recipe's run.

    Of --persons, --batch and --sample-rate any two give the third.
    --persons alone keeps the sample rate; --batch alone keeps the persons and changes the sample rate.
    """
    from simulations.plan_question import Asked, ask

    question = ask(recipe, overrides or {}, Asked(persons, batch))
    from simulations.plan import make_plan
    from simulations.plan_advice import suggest

    plan = make_plan(question)
    suggestions = suggest(plan)
    if out is not None:
        from simulations.plan_picture import draw

        draw(out, plan)
    if as_json:
        typer.echo(json.dumps(as_dict(plan, suggestions), indent=2))
        return
    console.print(_summary(plan), highlight=False, soft_wrap=True)
    console.print(f"\nplanned for {question.model}; the others at the same epsilon:")
    console.print(_models_table(plan))
    if plan.rounds:
        console.print(f"epsilon by rounds, all with the noise that {question.model} has on the mean:")
        console.print(_rounds_table(plan))
    verdict = plan.chosen.signals.judgement
    console.print(
        f"[bold]{question.model}: [{COLOURS[verdict.verdict]}]{verdict.verdict}[/][/] ({verdict.because})",
        highlight=False,
        soft_wrap=True,
    )
    for suggestion in suggestions:
        console.print(f"- {_line(suggestion)}", highlight=False, markup=False, soft_wrap=True)
    for note in plan.notes:
        console.print(f"[yellow]note:[/] {note}", highlight=False, soft_wrap=True)
    console.print(f"run it: {shlex.join(run_command(plan))}", highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        console.print(f"picture: {out}", highlight=False, markup=False, soft_wrap=True)


plan = with_run_options(_plan)


def as_dict(plan: "Plan", suggestions: list["Suggestion"]) -> dict[str, Any]:
    """The plan as JSON takes it; what is infinite or cannot be had is null."""
    question, config = plan.question, plan.question.config
    moments = config.moments
    return {
        "recipe": question.recipe,
        "privacy_model": question.model,
        "unit": str(config.privacy.unit),
        "units": question.persons,
        "clients": question.clients,
        "batch": question.batch,
        "expected_batch": config.privacy.expected_batch,
        "sample_rate": config.privacy.sample_rate,
        "delta": config.privacy.delta,
        "survivors": question.cohort.survivors if question.cohort else None,
        "colluders": question.cohort.colluders if question.cohort else None,
        "noise_shares": question.noise_shares or None,
        "solved": question.solved,
        "budget": plan.budget,
        "epsilon": plan.epsilon,
        "epsilon_prv": plan.epsilon_prv,
        "noise_multiplier": plan.noise_multiplier,
        "rounds": plan.rounds,
        "local_steps": config.training.local_steps,
        "moment_noise_multiplier": moments.moment_noise_multiplier if moments.moment_rounds else None,
        "moment_dimension": plan.dimension * max(config.model.num_classes, 1) if moments.moment_rounds else None,
        "discriminator_parameters": plan.parameters,
        "models": {name: _model_dict(model) for name, model in plan.models.items()},
        "epsilon_by_rounds": [
            {"rounds": rounds} | {name: _finite(plan.epsilon_after(name, rounds)) for name in plan.models}
            for rounds in (_some_rounds(plan) if plan.rounds else [])
        ],
        "suggestions": [
            {
                "change": s.change,
                "options": dict(s.options),
                "figure": s.figure,
                "before": s.before,
                "after": s.after,
                "verdict": str(s.verdict),
            }
            for s in suggestions
        ],
        "notes": plan.notes,
        "command": run_command(plan),
    }


def run_command(plan: "Plan") -> list[str]:
    """The command that runs the plan."""
    question = plan.question
    options = dict(question.options)
    if question.solved == "rounds":
        options["num-rounds"] = plan.rounds
        if not plan.rounds:
            options.pop("noise-multiplier", None)  # a run without rounds refuses it
    elif question.solved == "epsilon":
        options["epsilon"] = _rounded_up(plan.epsilon)
    words = ["visard", "simulate", question.recipe]
    for key, value in options.items():
        flag = f"--{key}" if value is not False else f"--no-{key}"
        words += [flag] if isinstance(value, bool) else [flag, _plain(value)]
    return words


def _model_dict(model: "ModelPlan") -> dict[str, Any]:
    return {
        "noise_factor": model.noise_factor,
        "mean_noise": model.signals.mean_noise,
        "update_snr": model.signals.update_snr,
        "moment_snr": model.signals.moment_snr,
        "verdict": str(model.signals.judgement.verdict),
        "because": model.signals.judgement.because,
        "equal_noise_epsilon": _finite(model.equal_noise_epsilon),
        "bytes_down": model.traffic.down,
        "bytes_up": model.traffic.up,
        "moment_bytes_up": model.traffic.moments_up,
        "dealt_rounds": model.traffic.dealt_rounds,
        "dealt_bytes": model.traffic.dealt,
        "unmasking_bytes": model.traffic.unmasking,
    }


def _summary(plan: "Plan") -> str:
    question, privacy = plan.question, plan.question.config.privacy
    moments = question.config.moments
    stages = [
        f"a moment release of noise {moments.moment_noise_multiplier:.4g}" if moments.moment_rounds else "",
        f"{in_rounds(plan.rounds)}; a discriminator of {plan.parameters:,} parameters" if plan.rounds else "",
    ]
    computed = {
        "noise-multiplier": f"noise multiplier {plan.noise_multiplier:.4g}"
        if plan.rounds
        else f"epsilon {plan.epsilon:.4g}",
        "epsilon": f"epsilon {plan.epsilon:.4g}",
        "rounds": in_rounds(plan.rounds),
    }[question.solved]
    clients = "1 client" if question.clients == 1 else f"{question.clients} clients"
    drawn = (
        f", {number(question.batch)} of them in a step (sample rate {privacy.sample_rate:.4g})" if plan.rounds else ""
    )
    return (
        f"{escape(question.recipe)}: {question.persons:,.0f} {question.units} at {clients}{drawn}; {' and '.join(filter(None, stages))}; "
        f"epsilon {plan.budget:.4g}, delta {privacy.delta:g}\n"
        f"computed: [bold]{computed}[/]"
    )


def _models_table(plan: "Plan") -> Table:
    table = Table()
    for name in ("", *plan.models):
        table.add_column(name, justify="right" if name else "left")
    models = list(plan.models.values())
    table.add_row("who is trusted", *(TRUSTED[model.model] for model in models))
    if plan.rounds:
        table.add_row("noise multiplier", *(f"{plan.noise_multiplier:.4g}" for _ in models))
    table.add_row("epsilon", *(f"{plan.epsilon:.4g}" for _ in models))
    if plan.epsilon_prv is not None:
        table.add_row("epsilon by PRV", *(f"{plan.epsilon_prv:.3g}" for _ in models))
    for label, figures in (
        ("noise of the mean update", [model.signals.mean_noise for model in models]),
        ("s/n of the update, at most", [model.signals.update_snr for model in models]),
        ("s/n of the moments", [model.signals.moment_snr for model in models]),
    ):
        shown = [number(figure) for figure in figures if figure is not None]
        if shown:
            table.add_row(label, *shown)
    verdicts = [model.signals.judgement.verdict for model in models]
    table.add_row("verdict", *(f"[{COLOURS[verdict]}]{verdict}[/]" for verdict in verdicts))
    table.add_row("epsilon at equal noise", *(_epsilon(model.equal_noise_epsilon) for model in models))
    dealt = max(model.traffic.dealt_rounds for model in models)
    for label, counts in (
        ("a client's round, down", [model.traffic.down for model in models]),
        ("a client's round, up", [model.traffic.up for model in models]),
        ("a client's moments, up", [model.traffic.moments_up for model in models]),
        (f"a client's keys, {in_rounds(dealt)}", [model.traffic.keys for model in models]),
    ):
        if any(counts):
            table.add_row(label, *(_bytes(count) for count in counts))
    return table


def _rounds_table(plan: "Plan") -> Table:
    table = Table()
    for name in ("rounds", *plan.models):
        table.add_column(name, justify="right")
    for rounds in _some_rounds(plan):
        style = "bold" if rounds == plan.rounds else None
        found = (_epsilon(plan.epsilon_after(name, rounds)) for name in plan.models)
        table.add_row(f"{rounds:,}", *found, style=style)
    return table


def _some_rounds(plan: "Plan") -> list[int]:
    """Rounds about the plan's, and none where there is a moment release."""
    least = [0] if plan.question.config.moments.moment_rounds else []
    return sorted({*least, *(max(1, round(plan.rounds * share)) for share in (0.1, 0.3, 1, 3, 10))})


def _line(suggestion: "Suggestion") -> str:
    before = f"{number(suggestion.before)} -> " if suggestion.before is not None else ""
    words = [word for key, value in suggestion.options.items() for word in (f"--{key}", _plain(value))]
    told = f", {suggestion.verdict}" if suggestion.figure == "moments" else ""
    return f"{suggestion.change}: s/n of the {suggestion.figure} {before}{number(suggestion.after)}{told} ({shlex.join(words)})"


def _plain(value: object) -> str:
    """A whole number without its point."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _epsilon(value: float) -> str:
    return number(value) if value < 1e6 else "none"


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rounded_up(epsilon: float) -> float:
    """To four digits after the point."""
    return math.ceil(epsilon * 1e4) / 1e4


COLOURS = {"hopeless": "red", "marginal": "yellow", "good": "green"}
TRUSTED = {"local": "nobody", "distributed": "clients", "central": "coordinator", "alone": "itself"}
