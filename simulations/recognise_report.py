"""What `visard recognise evaluate` measured, as tables for people."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from common.telling import plain


def shown_name(name: str) -> str:
    """A name that others wrote, as it is."""
    return escape(plain(name))


def tables_of(told: dict[str, Any]) -> list[Table]:
    """What was measured, for people."""
    main = Table(show_header=False)
    if told["goal"] == "verify":
        low, high = told["accuracy_interval"]
        main.add_row("pairs", f"{told['pairs']}, {told['genuine']} of one person")
        if told["missing"]:
            main.add_row("pairs without their photographs", str(told["missing"]))
        main.add_row("accuracy", f"{told['accuracy']:.1%} at a cosine of {told['threshold']:.3f}")
        main.add_row("95 %, pairs taken for independent", f"{low:.1%} to {high:.1%}")
        if "folds" in told:
            mean, error = told["folds"]["mean"], told["folds"]["standard_error"]
            main.add_row("each fold at the others' threshold", f"{mean:.1%}, standard error {error:.1%}")
        main.add_row("area under the ROC; equal error", f"{told['auc']:.3f}; {told['eer']:.1%}")
        for far, rate in told["tar_at_far"].items():
            main.add_row(f"true accepts at {far:.1%} false", "too few pairs to say" if rate is None else f"{rate:.1%}")
    else:
        main.add_row("photographs", f"{told['photographs']}, and {told['strangers']} of strangers left out")
        for rank, share in told["ranks"].items():
            main.add_row(f"among the first {rank}" if rank > 1 else "recognised", f"{share:.1%}")
    for name, share in told.get("attributes", {}).items():
        main.add_row(f"{shown_name(name)} told rightly", f"{share:.1%}")
    tables = [main]
    if "robustness" in told:
        worse = Table("disturbance", "weak", "middle", "strong")
        for name, shares in told["robustness"].items():
            worse.add_row(name, *(f"{share:.1%}" for share in shares))
        tables.append(worse)
    for name, found in told.get("by", {}).items():
        for kind in ("false_match", "false_non_match"):
            high = found[kind]["max_over_geomean"]
            title = f"{kind.replace('_', ' ')} rate; Max/GeoMean {'too few errors to say' if high is None else f'{high:.2f}'}"
            rates = Table(shown_name(name), "pairs", "errors", "rate", "95 %", title=title, title_justify="left")
            for group in found[kind]["groups"]:
                interval = "too few errors to say" if group["too_few"] else f"{group['low']:.1%} to {group['high']:.1%}"
                rates.add_row(
                    shown_name(group["group"]),
                    str(group["count"]),
                    str(group["errors"]),
                    f"{group['rate']:.1%}",
                    interval,
                )
            tables.append(rates)
        if found["left_out"]:
            tables.append(
                Table(f"without pairs of both kinds: {', '.join(map(shown_name, found['left_out']))}", show_lines=False)
            )
    return tables
