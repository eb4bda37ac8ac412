"""Reading a ledger, or an exported copy of one, without opening it: nothing is written, and it may lie anywhere.

`verify_ledger` trusts nothing that the file says of itself: chain, signatures and sums are computed again. Who reads a
copy from somebody else gives the public key that its owner named; without, a whole other ledger would pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import LedgerCorrupt, VisardError
from common.privacy.accounting import Release, epsilon_at_order, rdp_at
from common.privacy.chain import GENESIS, check_signature, line_hash, unseal
from common.privacy.ledger_file import FILE_NAME, HEAD_NAME, check_opening, read_heads
from common.privacy.ledger_state import LedgerState, release_of

# Two machines' logarithms, and a step priced alone or among others, may differ in the last digits: less than what every
# price is rounded up by.
_RELATIVE, _EACH_STEP = 1e-9, 1e-12


@dataclass(frozen=True)
class LedgerReport:
    """What a ledger says and whether it holds.

    public_key: 64 hex digits. records: whole lines. rounds: charged; answered: of these. epsilon: what was spent at the
    ledger's order and delta, infinite after a run without privacy; recomputed_epsilon: the same from the charges alone.
    copies: how often it was adopted. torn: bytes of a last line without its end, which opening takes away. problem: the
    first thing found wrong, in words, and the line it is in (from 1; 0: no one line); None where there is nothing.
    """

    path: Path
    public_key: str
    records: int
    rounds: int
    answered: int
    runs: tuple[str, ...]
    unprotected: str
    order: float | None
    delta: float | None
    epsilon: float
    recomputed_epsilon: float
    copies: int
    torn: int
    problem: str | None = None
    line: int | None = None


@dataclass(frozen=True)
class Charge:
    """One charged round. epsilon: what was spent with it, at the ledger's order. answered: whether it was released."""

    line: int
    run: str
    server_round: int
    release: Release
    epsilon: float
    answered: bool


def verify_ledger(path: Path, public_key: str | None = None) -> LedgerReport:
    """Check a ledger from its first byte to its last. `path`: its file, or its folder; the head beside it is checked too.

    public_key: what its owner gave as the ledger's name, in hex. Raises LedgerCorrupt where there is nothing to read.
    """
    file, content = _read(path)
    *lines, torn = content.split(b"\n")
    state, own_key, digests, charges, copies = LedgerState(), "", [GENESIS], [], 0
    problem: tuple[str, int] | None = None
    for number, line in enumerate(lines, start=1):
        try:
            record = unseal(line, number, digests[-1])
            if number == 1:
                own_key = str(record.get("public_key"))
                check_opening(record, own_key if public_key is None else public_key.lower())
            check_signature(line, bytes.fromhex(own_key))
            state.take_in(record)
        except (ValueError, KeyError, TypeError, OverflowError, AttributeError, VisardError) as error:
            problem = f"{type(error).__name__}: {error}", number
            break
        digests.append(line_hash(line))
        copies += record["type"] == "adopted"
        if record["type"] == "charged":
            charges.append((number, float(record["rdp"])))
    rdp, wrong = _check_sums(state, charges)
    if wrong is not None:
        problem = wrong
    if problem is None and file.name == FILE_NAME:
        problem = _check_head(file.with_name(HEAD_NAME), own_key, digests)
    if problem is None and not lines:
        problem = "there is no whole line", 0
    spent = 0.0
    if state.order is not None and state.delta is not None:
        spent = epsilon_at_order(rdp, state.order, state.delta)
    return LedgerReport(
        path=file,
        public_key=own_key,
        records=len(digests) - 1,
        rounds=len(state.charged),
        answered=len(state.released),
        runs=tuple(dict.fromkeys(run for run, _ in state.charged)),
        unprotected=state.unprotected,
        order=state.order,
        delta=state.delta,
        epsilon=state.epsilon,
        recomputed_epsilon=float("inf") if state.unprotected else spent,
        copies=copies,
        torn=len(torn),
        problem=problem and problem[0],
        line=problem and problem[1],
    )


def charges(path: Path) -> Iterator[Charge]:
    """Every charge of a ledger in order, with the epsilon spent up to it; the chain is checked, signatures are not.

    Raises LedgerCorrupt at the first line that does not follow the one before.
    """
    file, content = _read(path)
    state, found, digest = LedgerState(), [], GENESIS
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            record = unseal(line, number, digest)
            state.take_in(record)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise LedgerCorrupt(
                f"line {number} of {file} is damaged ({error}): `visard ledger verify` says more"
            ) from error
        digest = line_hash(line)
        if record["type"] == "charged":
            found.append((number, record, state.epsilon))
    for number, record, epsilon in found:
        run, server_round = str(record["run"]), int(record["round"])
        answered = (run, server_round) in state.released
        yield Charge(number, run, server_round, release_of(record), epsilon, answered)


def _read(path: Path) -> tuple[Path, bytes]:
    file = path / FILE_NAME if path.is_dir() else path
    try:
        return file, file.read_bytes()
    except OSError as error:
        raise LedgerCorrupt(f"there is no ledger to read at {file} ({error})") from error


def _check_sums(state: LedgerState, charged: list[tuple[int, float]]) -> tuple[float, tuple[str, int] | None]:
    """The total again from what was charged, and the first record whose running total is not that sum."""
    if not charged or state.order is None:
        return 0.0, None
    totals = np.cumsum(rdp_at(state.releases, state.order))
    slack = np.cumsum([release.steps for release in state.releases]) * _EACH_STEP / (state.order - 1)
    for (number, recorded), total, allowed in zip(charged, totals, _RELATIVE * totals + slack, strict=True):
        if not abs(recorded - total) <= allowed:
            return float(totals[-1]), (f"its running total is {recorded} and the charges up to it make {total}", number)
    return float(totals[-1]), None


def _check_head(path: Path, public_key: str, digests: list[bytes]) -> tuple[str, int] | None:
    """An exported copy comes without a head; one that is there must fit."""
    if not path.exists():
        return None
    content = path.read_bytes()
    heads = [head for _, head in read_heads(content, bytes.fromhex(public_key))]  # of a key that signed every line
    if not heads:
        return ("the head beside it is damaged", 0) if any(content) else None
    head = max(heads, key=lambda found: found.count)
    if head.count >= len(digests):
        return f"the head beside it vouches for {head.count} lines and there are {len(digests) - 1}", 0
    return None if digests[head.count] == head.digest else ("it is not the line that the head vouches for", head.count)
