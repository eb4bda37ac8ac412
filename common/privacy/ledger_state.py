"""What a ledger's records add up to: who was answered, and what it cost.

    {"type": "opened", "version": 1, "public_key": ..., "place": {"machine": ..., "inode": ...}}   first, and once
    {"type": "adopted", "place": ...}      the owner vouches for a restored copy
    {"type": "charged", "run": ..., "round": 7, "mechanism": "gradients", "noise_multiplier": ..., "sample_rate": ..., "steps": 1,
     "instructions": SHA-256 of what was asked, "order": 3.2, "delta": 1e-05, "rdp": the running total at that order}
    {"type": "released", "run": ..., "round": 7, "reply": SHA-256 of what was answered}
    {"type": "unmasked", "run": ..., "round": 7, "request": SHA-256 of whose vectors the secure sum holds}
    {"type": "unprotected", "run": ...}    a run that the owner allowed to see these faces without any privacy
    {"type": "rolled-back", "head": ...}   a witness showed a head of this ledger that is not on its chain: nothing follows

The meaning of a record never changes; what is new gets a new name.
"""

import math
from typing import Any

import numpy as np

from common.errors import ConfigError
from common.privacy.accounting import MECHANISMS, ORDERS, Release, epsilon_at_order, rdp_at
from common.privacy.units import PrivacyUnit


class LedgerState:
    """The records so far. `delta`: the one that its owner holds to; None takes the ledger's own. `unit`: the least that the
    owner protects; a person's promise cannot hold over charges that were for single images.

    order: the RDP order, fixed at the first charge. rdp: the running total there, rounded up. charged: digest of the
    instructions of each (run, round). released: digest of its reply. unmasked: of the request to open its sum. releases:
    every charge, in order. unprotected: the first run without privacy, or empty. rolled_back: records are missing, as a
    witness showed.
    """

    def __init__(self, delta: float | None = None, unit: PrivacyUnit = PrivacyUnit.IMAGE) -> None:
        self.delta = delta
        self._unit = unit
        self.order: float | None = None
        self.rdp = 0.0
        self.charged: dict[tuple[str, int], str] = {}
        self.released: dict[tuple[str, int], str] = {}
        self.unmasked: dict[tuple[str, int], str] = {}
        self.releases: list[Release] = []
        self.unprotected = ""
        self.rolled_back = False
        self.last_rounds: dict[str, int] = {}
        self._opened = False

    @property
    def epsilon(self) -> float:
        """What was spent, at the ledger's fixed order: the bound on which refusal rests."""
        if self.unprotected:
            return math.inf
        if self.order is None or self.delta is None:
            return 0.0
        return epsilon_at_order(self.rdp, self.order, self.delta)

    def take_in(self, record: dict[str, Any]) -> None:
        """Count one record.

        Raises ValueError, KeyError or TypeError for one that cannot come next, ConfigError for a ledger of another
        delta. Then nothing was counted.
        """
        kind = record["type"]
        if (kind == "opened") == self._opened:
            raise ValueError("a ledger is opened first, and once")
        _TAKERS[kind](self, record) if kind in _TAKERS else _refuse(kind)

    def _open(self, _record: dict[str, Any]) -> None:
        self._opened = True

    def _adopt(self, record: dict[str, Any]) -> None:
        if set(record["place"]) != {"machine", "inode"}:
            raise ValueError("it names no place")

    def _roll_back(self, _record: dict[str, Any]) -> None:
        self.rolled_back = True

    def _unprotect(self, record: dict[str, Any]) -> None:
        self.unprotected = self.unprotected or str(record["run"])

    def _charge(self, record: dict[str, Any]) -> None:
        key, release, order, rdp = _round_of(record), release_of(record), record["order"], record["rdp"]
        if self.order is not None and order != self.order:
            raise ValueError(f"order {order} after {self.order}: it is fixed once")
        if order not in ORDERS or not self.rdp <= rdp < math.inf:
            raise ValueError(f"its running total {rdp} at order {order} is not a sum")
        if release.mechanism not in MECHANISMS or release.steps < 1 or key in self.charged:
            raise ValueError(f"an unknown mechanism, no steps, or a second charge of round {key[1]}")
        if self.delta is None:
            self.delta = float(record["delta"])
        if record["delta"] != self.delta:
            raise ConfigError(
                f"this ledger was opened for delta {record['delta']:g} and the policy says {self.delta:g}: a ledger keeps its "
                f"delta; give {record['delta']:g}"
            )
        if PrivacyUnit(record["unit"]) is PrivacyUnit.IMAGE and self._unit is PrivacyUnit.PERSON:
            raise ConfigError(
                f"round {key[1]} was charged for single images, and the policy protects persons: of a person with several images more "
                "was spent than this ledger counts. Keep unit image, or use other faces"
            )
        self.charged[key] = str(record["instructions"])
        self.last_rounds[key[0]] = max(key[1], self.last_rounds.get(key[0], 0))
        self.releases.append(release)
        self.order, self.rdp = order, rdp

    def _release(self, record: dict[str, Any]) -> None:
        key = _round_of(record)
        if key not in self.charged or key in self.released:
            raise ValueError(f"round {key[1]} was not charged, or was answered twice")
        self.released[key] = str(record["reply"])

    def _unmask(self, record: dict[str, Any]) -> None:
        key = _round_of(record)
        if key not in self.released or key in self.unmasked:
            raise ValueError(f"round {key[1]} was not answered, or was unmasked twice")
        self.unmasked[key] = str(record["request"])


def total_after(rdp: float, release: Release, order: float) -> float:
    """The running total once a release is added to it, rounded up."""
    return float(np.nextafter(rdp + rdp_at([release], order)[0], np.inf))


def release_of(record: dict[str, Any]) -> Release:
    """The release in a `charged` record."""
    return Release(
        record["mechanism"], float(record["noise_multiplier"]), float(record["sample_rate"]), int(record["steps"])
    )


def _round_of(record: dict[str, Any]) -> tuple[str, int]:
    return str(record["run"]), int(record["round"])


def _refuse(kind: object) -> None:
    raise ValueError(f"a record of unknown type {kind!r}")


_TAKERS = {
    "opened": LedgerState._open,
    "adopted": LedgerState._adopt,
    "unprotected": LedgerState._unprotect,
    "rolled-back": LedgerState._roll_back,
    "charged": LedgerState._charge,
    "released": LedgerState._release,
    "unmasked": LedgerState._unmask,
}
