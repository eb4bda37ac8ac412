"""The ledgers that a simulated run left behind: whole, and charged for every round that the run asked, once."""

from dataclasses import dataclass
from pathlib import Path

from common.config import RunConfig
from common.messages import planned_releases
from common.privacy.chain import Head, line_hash
from common.privacy.ledger_file import FILE_NAME
from common.privacy.ledger_report import charges, verify_ledger
from server.checkpoint import CheckpointStore


@dataclass(frozen=True)
class LedgerAudit:
    """ledgers: found. epsilon: the most that one holds. promised: of the run. rounds: that the run did. problems: by ledger,
    in words. passed: there are ledgers, and no problem.
    """

    ledgers: int
    epsilon: float
    promised: float
    rounds: int
    problems: list[str]
    passed: bool


def audit_ledgers(run: Path) -> LedgerAudit:
    """Verify each simulated client's ledger from its first byte, and compare its charges with the run's own schedule.

    A client need not have been asked in every round; what it was asked must be what the run says, at most once a round,
    and within the promise. The last record that the coordinator saw of each ledger must be there.

    Raises CheckpointError where the folder holds no run.
    """
    state = CheckpointStore(run).load()
    config = state.config
    problems, most, found = [], 0.0, 0
    unseen = dict(state.ledger_heads)
    for folder in sorted((run / "clients").glob("*/")):
        found += 1
        report = verify_ledger(folder)
        head = unseen.pop(report.public_key, None)
        if head is not None and not _holds(folder, Head.from_bytes(bytes.fromhex(head))):
            problems.append(f"{folder.name}: the record that the coordinator saw last is not in it")
        most = max(most, report.epsilon)
        problems += [f"{folder.name}: {problem}" for problem in _problems(folder, report.problem, config, state.run_id)]
        if not report.epsilon <= config.privacy.epsilon * (1 + 1e-9):
            problems.append(
                f"{folder.name}: epsilon {report.epsilon:g} is over the promised {config.privacy.epsilon:g}"
            )
    problems += [f"the ledger {key[:16]}, of which the coordinator had answers, is not there" for key in unseen]
    rounds = max(state.next_round - 1, state.asked_round)
    return LedgerAudit(found, most, config.privacy.epsilon, rounds, problems, passed=found > 0 and not problems)


def _holds(folder: Path, head: Head) -> bool:
    lines = (folder / FILE_NAME).read_bytes().split(b"\n")[:-1]
    return head.count <= len(lines) and line_hash(lines[head.count - 1]) == head.digest


def _problems(folder: Path, damage: str | None, config: RunConfig, run_id: str) -> list[str]:
    if damage is not None:
        return [damage]
    moments = config.moments
    found, seen = [], set()
    for charge in charges(folder):
        is_moments = charge.server_round <= moments.moment_rounds
        (expected,) = planned_releases(
            config.privacy,
            int(is_moments),
            moments.moment_noise_multiplier,
            0 if is_moments else config.training.local_steps,
        )
        if (charge.run, charge.server_round) in seen:
            found.append(f"round {charge.server_round} is charged twice")
        if charge.run != run_id:
            found.append(f"round {charge.server_round} is of another run, {charge.run}")
        elif charge.release != expected:
            found.append(f"round {charge.server_round} is charged as {charge.release} and was asked as {expected}")
        seen.add((charge.run, charge.server_round))
    return found
