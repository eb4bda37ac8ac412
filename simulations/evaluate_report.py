"""An evaluation as JSON, as a page to read and as tables for a terminal."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from common.evaluation.fairness import TOO_FEW, GroupRates
from common.evaluation.groups import MAX_WRONG
from common.evaluation.membership import Estimate
from simulations.evaluate import FPR, NOTE, Evaluation, Fairness, Memorisation

FORMAT = "visard-evaluation-1"
_TOO_FEW = "too few to say"


@dataclass(frozen=True)
class Section:
    """A table: its title, what is to be known to read it, the names of its columns and its rows."""

    title: str
    remark: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def to_json(found: Evaluation) -> dict[str, Any]:
    """Plain values; what is infinite or no number is null."""
    plain: dict[str, Any] = _finite(dataclasses.asdict(found))
    return {"format": FORMAT, "note": NOTE, **plain}


def to_markdown(found: Evaluation) -> str:
    """A page: what was compared, the note, then a table a section."""
    page = [
        f"# Evaluation of {found.run}",
        "",
        f"Promised by the run: {found.promise.rstrip('.')}.",
        "",
        _compared(found),
        "",
        NOTE,
    ]
    for section in sections(found):
        page += ["", f"## {section.title}", "", section.remark, ""]
        page += [f"| {' | '.join(map(_cell, row))} |" for row in (section.columns, ["---"] * len(section.columns))]
        page += [f"| {' | '.join(map(_cell, row))} |" for row in section.rows]
    if found.skipped:
        page += ["", "## Not done", "", *(f"- {part}: {reason}" for part, reason in found.skipped.items())]
    return "\n".join([*page, ""])


def sections(found: Evaluation) -> list[Section]:
    """What was measured, in the order in which it was."""
    told = [_fidelity(found)]
    if found.utility:
        told.append(_utility(found))
    for each in found.fairness:
        told += [_representation(each), _classifier(each)]
    if found.memorisation is not None:
        told.append(_memorisation(found.memorisation))
    return told


def _compared(found: Evaluation) -> str:
    beside = f"{found.generated:,} generated faces (seed {found.seed}) beside {found.reference:,} of the reference"
    return beside + (f"; holdout of {found.holdout:,}." if found.holdout else ".")


def _fidelity(found: Evaluation) -> Section:
    figures = found.fidelity
    true_fid = figures.network == "inception-2015-12-05"
    remark = f"On {figures.network}: " + (
        "the Frechet distance is the FID." if true_fid else "the distances are no FIDs and compare to no published one."
    )
    rows = (
        ("Frechet distance", f"{figures.frechet:.4g}", "0"),
        ("kernel distance", f"{figures.kernel:.4g}", "0"),
        ("precision", f"{figures.precision:.3f}", "1"),
        ("recall", f"{figures.recall:.3f}", "1"),
        ("density", f"{figures.density:.3f}", "1"),
        ("coverage", f"{figures.coverage:.3f}", "1"),
    )
    return Section("Fidelity", remark, ("figure", "value", "best"), rows)


def _utility(found: Evaluation) -> Section:
    rows = tuple(
        (
            each.classifier,
            each.taught_on,
            f"{each.taught:,}",
            f"{each.tested_on} ({each.tested:,})",
            _share(each.accuracy),
        )
        for each in found.utility
    )
    first = found.utility[0]
    remark = (
        f"Accuracy on the {first.tested_on}'s faces of classifiers that were taught on others, each for {first.steps:,} steps; the "
        f"interval is over the test faces alone. Always saying the commonest label is right in {first.commonest:.1%}."
    )
    if first.tested_on == "reference":
        remark += (
            " No --holdout was given: where the run learned from the reference, as it usually did, its faces may repeat those that "
            "are tested, and the accuracy on new faces may be lower."
        )
    return Section("Utility", remark, ("classifier", "taught on", "faces", "tested on", "accuracy % [95 %]"), rows)


def _representation(found: Fairness) -> Section:
    shares, distances = found.shares, found.distances
    frechet = {each.group: each.frechet for each in distances.groups}
    rows = tuple(
        (
            each.group,
            _share(each.reference),
            _share(each.reference_as_told),
            _share(each.generated),
            "classifier errs too often" if each.hard_to_tell else each.told,
            "too few" if frechet[each.group] is None else f"{frechet[each.group]:.4g}",
        )
        for each in shares.groups
    )
    compared = (
        f"on {distances.compared_generated} generated and {distances.compared_reference} reference faces of each group"
        if distances.compared_generated
        else "not measured"
    )
    remark = (
        "The classifier below says the group of a generated face; nothing is corrected for its errors. 'As told' is what it says of "
        f"{found.judged:,} reference faces: where that is not the reference's share, it leans. The verdict is on 'generated' beside 'as "
        f"told', where the intervals do not meet; there is none for a group of which over {MAX_WRONG:.0%} are told wrongly, or of which "
        f"over {MAX_WRONG:.0%} of those told are others. Distance on {distances.network}, "
        f"{compared}; a group with fewer than {distances.least} on either side has none. "
        "Intervals take faces for independent: with several photographs of a person they should be wider."
    )
    if shares.unknown_reference:
        remark += f" Of the reference, {shares.unknown_reference:,} faces have no {found.attribute}, and are left out."
    if found.left_out:
        few = ", ".join(f"{group!r} ({count})" for group, count in found.left_out.items())
        remark += f" Among them are those of groups of fewer than two persons: {few}."
    columns = ("group", "reference %", "as told %", "generated %", "verdict", "distance")
    return Section(f"Fairness by {found.attribute}: who is generated", remark, columns, rows)


def _classifier(found: Fairness) -> Section:
    rates = found.classifier
    rows = [(each.group, f"{each.count:,}", f"{each.errors:,}", _rate(each)) for each in rates.groups]
    ratio = _TOO_FEW if rates.max_over_geomean is None else f"{rates.max_over_geomean:.2f}"
    remark = (
        f"Taught on {found.taught:,} reference faces, judged by {found.judged:,} others. Largest difference {_share(rates.gap)} points, "
        f"p = {rates.p_value:.2g} for no difference; highest rate over the geometric mean: {ratio}. Under {TOO_FEW} errors a rate "
        "is too few to say."
    )
    if rates.differ:
        remark += f" It errs most on {rates.worst!r}: the shares and distances above lean with it."
    columns = ("group", "faces", "errors", "errors % [95 %]")
    return Section(f"Fairness by {found.attribute}: errors of the group classifier", remark, columns, tuple(rows))


def _memorisation(found: Memorisation) -> Section:
    auc = found.gan_leaks
    tpr = f"{_TOO_FEW}: under {round(1 / FPR):,} holdout faces" if found.tpr is None else _share(found.tpr)
    rows = (
        ("AUC", f"{auc.value:.3f} [{auc.low:.3f}, {auc.high:.3f}]", "0.5"),
        (f"true positives at {FPR:.1%} false ones, %", tpr, f"{FPR:.1%}"),
    )
    remark = (
        f"GAN-Leaks: {found.reference:,} reference faces told from {found.holdout:,} of the holdout by their nearest of "
        f"{found.generated:,} generated ones, in pixels. It says something where the run learned from the reference and the "
        "holdout is of the same source; `visard audit` tries more."
    )
    return Section("Memorisation", remark, ("figure", "value [95 %]", "nothing repeated"), rows)


def _rate(of: GroupRates) -> str:
    told = _share(Estimate(of.rate, of.low, of.high))
    return f"{told}, {_TOO_FEW}" if of.too_few else told


def _share(of: Estimate) -> str:
    return f"{100 * of.value:.1f} [{100 * of.low:.1f}, {100 * of.high:.1f}]"


def _cell(text: str) -> str:
    """On one line of a table, whatever a group is called."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split()).replace("|", "\\|")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
