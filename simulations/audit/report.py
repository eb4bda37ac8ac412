"""An audit's findings as JSON and as a page to read."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from simulations.audit.gate import GateReport
from simulations.audit.inversion import InversionAudit
from simulations.audit.ledgers import LedgerAudit
from simulations.audit.membership import MembershipAudit
from simulations.audit.one_run import OneRunAudit
from simulations.plan_words import in_rounds

FORMAT = "visard-audit-1"


@dataclass(frozen=True)
class Line:
    """One part's result in one line. passed: None for evidence, which alone shows nothing wrong or right."""

    part: str
    passed: bool | None
    told: str


@dataclass
class Audit:
    """What was found, by part; None where a part was not done, with the reason in `skipped`."""

    target: str
    promise: str
    ledgers: LedgerAudit | None = None
    gate: GateReport | None = None
    one_run: OneRunAudit | None = None
    membership: MembershipAudit | None = None
    inversion: InversionAudit | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Something was done, and no part found anything wrong."""
        lines = self.lines()
        return bool(lines) and all(line.passed is not False for line in lines)

    def lines(self) -> list[Line]:
        """A line a part, in the order in which they are done."""
        told = [
            _ledgers(self.ledgers),
            _gate(self.gate),
            _one_run(self.one_run),
            _membership(self.membership),
            _inversion(self.inversion),
        ]
        return [line for line in told if line is not None]

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is infinite or no number is null."""
        parts = {name: getattr(self, name) for name in ("ledgers", "gate", "one_run", "membership", "inversion")}
        found = {name: dataclasses.asdict(part) for name, part in parts.items() if part is not None}
        head = {"format": FORMAT, "target": self.target, "promise": self.promise, "passed": self.passed}
        return {**head, **_finite(found), "skipped": self.skipped}

    def to_markdown(self) -> str:
        """A page: the verdict, a line a part, then each part's figures."""
        verdict = "nothing found wrong" if self.passed else "SOMETHING IS WRONG" if self.lines() else "NOTHING WAS DONE"
        page = [f"# Privacy audit of {self.target}: {verdict}", "", f"Promised: {self.promise}.", ""]
        page += ["| part | result | found |", "|---|---|---|"]
        page += [f"| {line.part} | {WORDS[line.passed]} | {line.told} |" for line in self.lines()]
        page += [f"| {part} | not done | {reason} |" for part, reason in self.skipped.items()]
        if self.ledgers is not None and self.ledgers.problems:
            page += ["", "## Ledgers", "", *(f"- {problem}" for problem in self.ledgers.problems)]
        if self.gate is not None:
            page += ["", "## Gate", "", *_gate_table(self.gate)]
        if self.membership is not None:
            page += ["", "## Membership inference", "", *_membership_table(self.membership)]
        if self.inversion is not None:
            page += ["", "## Inversion", "", *_inversion_table(self.inversion)]
        page += ["", "What each part shows, and what it cannot, is in docs/security.md of Visard.", ""]
        return "\n".join(page)


WORDS = {True: "passed", False: "FAILED", None: "evidence"}


def _ledgers(found: LedgerAudit | None) -> Line | None:
    if found is None:
        return None
    told = f"{found.ledgers} ledgers, the fullest at epsilon {found.epsilon:.4g} of {found.promised:g} after {in_rounds(found.rounds)}"
    if found.problems:
        told += f"; {len(found.problems)} problems, the first: {found.problems[0]}"
    return Line("ledgers", found.passed, told)


def _gate(found: GateReport | None) -> Line | None:
    if found is None:
        return None
    if not found.passed:
        first = found.alarms[0]
        told = (
            f"{len(found.alarms)} of {len(found.tests)} tests raise an alarm, the surest: {first.name} "
            f"({first.observed:.4g} for {first.expected:.4g})"
        )
        return Line("gate", False, told)
    m = found.measured
    told = (
        f"{len(found.tests)} tests of {found.releases} releases; epsilon as measured {m.epsilon:.3g} "
        f"[{m.epsilon_low:.3g}, {m.epsilon_high:.3g}], as charged {m.claimed:.3g}"
    )
    return Line("gate", True, told)


def _one_run(found: OneRunAudit | None) -> Line | None:
    if found is None:
        return None
    told = (
        f"epsilon is at least {found.bound:.3g} ({found.confidence:.0%}) where ledgers say {found.claimed_epsilon:.3g}: "
        f"{found.correct} of {found.guesses} guesses right about {found.canaries} canaries in "
        f"{in_rounds(found.rounds) if found.rounds else 'the moment release'}"
    )
    return Line("one run", None if found.bound <= found.claimed_epsilon else False, told)


def _membership(found: MembershipAudit | None) -> Line | None:
    if found is None:
        return None
    best = max(found.attacks, key=lambda attack: attack.auc)
    told = (
        f"the best of {len(found.attacks)} attacks, {best.attack}, has AUC {best.auc:.3f} [{best.auc_low:.3f}, {best.auc_high:.3f}] "
        f"over {found.members} members and {found.non_members} others"
    )
    rigorous = [ceiling.auc for ceiling in found.ceilings if ceiling.rigorous]
    if rigorous:
        told += f"; the promise allows {min(rigorous):.3f}"
    return Line("membership", found.kept, told)


def _inversion(found: InversionAudit | None) -> Line | None:
    if found is None:
        return None
    noised = found.coordinator_sees == "noised"
    told = "; ".join(
        f"{attack.attack}: {attack.back_noised if noised else attack.back_clear} of {attack.images} photographs come back"
        + (f" ({attack.back_clear} without noise)" if noised else "")
        for attack in found.attacks
    )
    if noised:
        return Line("inversion", found.passed, told)
    return Line("inversion", None, f"to the coordinator, who is trusted with clear sums, {told}")


def _gate_table(found: GateReport) -> list[str]:
    alarmed = {id(test) for test in found.alarms}
    rows = [
        f"| {test.name} | {test.observed:.5g} | {test.expected:.5g} | {test.p_value:.2g} | {'ALARM' if id(test) in alarmed else ''} |"
        for test in found.tests
    ]
    return [
        f"{found.releases} releases of {found.parameters:,} values by `{found.discriminator}`, {found.canaries} canaries, "
        f"unit {found.unit}, privacy model {found.privacy_model}, {found.seconds:.1f} s. The clipping norm is the audit's own, half the "
        "canaries' median; a discriminator with dropout is audited as `dcgan` of its width, and itself for its norm.",
        "",
        "| test | observed | claimed | p | |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _membership_table(found: MembershipAudit) -> list[str]:
    rows = [
        f"| {a.attack} | {a.auc:.3f} [{a.auc_low:.3f}, {a.auc_high:.3f}] | "
        + ("too few to say |" if a.tpr is None else f"{a.tpr:.4f} [{a.tpr_low:.4f}, {a.tpr_high:.4f}] |")
        for a in found.attacks
    ]
    rows += [
        f"| allowed by {c.guarantee}{'' if c.rigorous else ' (a yardstick, not the promise)'} | {c.auc:.3f} | {c.tpr:.4f} |"
        for c in found.ceilings
    ]
    left_out = [f"- {attack}: left out, {reason}" for attack, reason in found.left_out.items()]
    return [
        f"| attack | AUC | TPR at {found.fpr:.1%} FPR |",
        "|---|---|---|",
        *rows,
        *([""] if left_out else []),
        *left_out,
    ]


def _inversion_table(found: InversionAudit) -> list[str]:
    rows = [
        f"| {a.attack} | {a.network} | {a.back_clear} of {a.images} | {_of(a.back_noised, a.images)} | {_of(a.back_budget, a.images)} |"
        for a in found.attacks
    ]
    return [
        f"Back: a peak signal-to-noise ratio of {found.threshold_db:g} dB or more to the photograph. The coordinator of this run "
        f"sees {found.coordinator_sees} sums.",
        "",
        "| attack | network asked for | without noise | with the run's noise | with the whole budget in one round |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _of(back: int | None, images: int) -> str:
    return "no noised round" if back is None else f"{back} of {images}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
