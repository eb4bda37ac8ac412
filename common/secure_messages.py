"""What a secure sum sends beside a round's instructions and vectors, and its translation to and from Flower's records.

Requests go to the clients, answers to the coordinator. All fields of requests are public, or sealed between clients. A
message checks its own fields when it is made, and is compared with the deal that it belongs to by whoever uses it
(`client.secure_sum`, `server.secure_sum`). From the wire a request raises ProtocolError, an answer MalformedUpdate.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from flwr.app import ConfigRecord, RecordDict

from common.errors import MalformedUpdate, ProtocolError
from common.messages import RoundInstructions, Stage
from common.privacy.lattice import Lattice
from common.privacy.masks import (
    KEY_BYTES,
    MAX_PEERS,
    MAX_ROUND,
    MAX_ROUNDS_AHEAD,
    SEAL_BYTES,
    DealTerms,
    check_run_id,
    digest,
    within,
)
from common.privacy.secret_sharing import SHARE_BYTES
from common.sections import PrivacyConfig

# A round's two shares of one dealer: of its mask key, then of its seed.
PAIR_BYTES = 2 * SHARE_BYTES
# Of clipped gradients the mean over persons has coordinates far below C; a sum that wraps all the same is told of.
_WORST_MEAN = 0.25
# No entry of a vector of random features is larger (`common.models.features`).
_WORST_MOMENT = 1 / 64


class _Message:
    """A frozen dataclass of int, str, bytes and tuples of these, carried as one ConfigRecord under `name`."""

    name: ClassVar[str]
    error: ClassVar[type[ProtocolError]]

    def to_record(self) -> RecordDict:
        """Pack for Flower."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return RecordDict({self.name: ConfigRecord({k: list(v) if type(v) is tuple else v for k, v in values.items()})})

    @property
    def num_bytes(self) -> int:
        """Bytes of its byte strings, which are nearly all of it."""
        values = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        parts = (part for value in values for part in (value if type(value) is tuple else (value,)))
        return sum(len(part) for part in parts if isinstance(part, bytes))

    @classmethod
    def from_record(cls, record: RecordDict) -> Self:
        """Unpack and check. Raises the message's `error`."""
        values = record.get(cls.name)
        hints = get_type_hints(cls)
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        if set(record) != {cls.name} or not isinstance(values, ConfigRecord) or set(values) != set(names):
            raise cls.error(f"{cls.name}: want one ConfigRecord of that name with {', '.join(names)}")
        try:
            return cls(**{name: _typed(name, values[name], hints[name]) for name in names})
        except ValueError as error:
            raise cls.error(f"{cls.name} refused: {error}") from error


def _typed(key: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is not tuple:
        if type(value) is not hint:
            raise ValueError(f"{key} is not of type {hint.__name__}")
        return value
    inner = get_args(hint)[0]
    if type(value) is not list or any(type(item) is not inner for item in value):
        raise ValueError(f"{key} is no list of {inner.__name__}")
    return tuple(value)


class _Request(_Message):
    error = ProtocolError


class _Answer(_Message):
    error = MalformedUpdate


@dataclass(frozen=True)
class KeyRequest(_Request):
    """Asks a client for its public peer key, before the first deal of a run."""

    name = "secure_key_request"

    run_id: str

    def __post_init__(self) -> None:
        check_run_id(self.run_id)


@dataclass(frozen=True)
class KeyAnswer(_Answer):
    """A client's public peer key: 32 bytes. Others take it only where it is in the set that their owners pinned."""

    name = "secure_key_answer"

    public_key: bytes

    def __post_init__(self) -> None:
        within("bytes of public_key", len(self.public_key), KEY_BYTES, KEY_BYTES)


@dataclass(frozen=True)
class DealRequest(DealTerms, _Request):
    """Asks for fresh keys and seeds for the rounds to come, and shares of them for every peer."""

    name = "secure_deal_request"


@dataclass(frozen=True)
class DealAnswer(_Answer):
    """A client's deal. mask_keys: public, 32 bytes a round. seed_digests: 32 bytes a round. sealed: for each other place in
    order its 2 * rounds shares, readable by that peer alone."""

    name = "secure_deal_answer"

    run_id: str
    deal: int
    place: int
    mask_keys: bytes
    seed_digests: bytes
    sealed: tuple[bytes, ...]

    def __post_init__(self) -> None:
        _check_start(self.run_id, self.deal)
        within("place", self.place, 1, MAX_PEERS)
        rounds = _rounds("mask_keys", self.mask_keys, KEY_BYTES)
        within("bytes of seed_digests", len(self.seed_digests), rounds * KEY_BYTES, rounds * KEY_BYTES)
        within("the number of sealed", len(self.sealed), 1, MAX_PEERS - 1)
        _check_sealed(self.sealed, rounds)


@dataclass(frozen=True)
class ConfirmRequest(_Request):
    """Who dealt, and what. dealers: places, ascending. mask_keys: of each of them. sealed: of each of them but the client
    itself, its shares for this client."""

    name = "secure_confirm_request"

    run_id: str
    deal: int
    dealers: tuple[int, ...]
    mask_keys: tuple[bytes, ...]
    sealed: tuple[bytes, ...]

    def __post_init__(self) -> None:
        _check_start(self.run_id, self.deal)
        _check_places("dealers", self.dealers)
        within("the number of dealers", len(self.dealers), 2, MAX_PEERS)
        within("the number of mask_keys", len(self.mask_keys), len(self.dealers), len(self.dealers))
        within("the number of sealed", len(self.sealed), len(self.dealers) - 1, len(self.dealers) - 1)
        rounds = {_rounds("mask_keys", keys, KEY_BYTES) for keys in self.mask_keys}
        if len(rounds) != 1:
            raise ValueError("mask_keys of different numbers of rounds")
        _check_sealed(self.sealed, rounds.pop())


@dataclass(frozen=True)
class ConfirmAnswer(_Answer):
    """A client has seen this deal. tags: for each other dealer in order, what convinces that peer of it."""

    name = "secure_confirm_answer"

    run_id: str
    deal: int
    place: int
    tags: tuple[bytes, ...]

    def __post_init__(self) -> None:
        _check_start(self.run_id, self.deal)
        within("place", self.place, 1, MAX_PEERS)
        within("the number of tags", len(self.tags), 1, MAX_PEERS - 1)
        _check_tags(self.tags)


@dataclass(frozen=True)
class MaskRequest(_Request):
    """What the instructions of a masked round carry beside themselves. confirmations: the other dealers' tags for this
    client in order, with the first masked round of a deal; empty later."""

    name = "secure_mask_request"

    deal: int
    confirmations: tuple[bytes, ...]

    def __post_init__(self) -> None:
        within("deal", self.deal, 1, MAX_ROUND)
        within("the number of confirmations", len(self.confirmations), 0, MAX_PEERS - 1)
        _check_tags(self.confirmations)


@dataclass(frozen=True)
class UnmaskRequest(_Request):
    """Whose vectors are in the sum and whose are not. survivors, dropped: places, ascending, together all who dealt."""

    name = "secure_unmask_request"

    run_id: str
    deal: int
    server_round: int
    survivors: tuple[int, ...]
    dropped: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_start(self.run_id, self.deal)
        within("server_round", self.server_round, 1, MAX_ROUND)
        _check_places("survivors", self.survivors)
        _check_places("dropped", self.dropped)
        if shared := set(self.survivors) & set(self.dropped):
            raise ValueError(f"{len(shared)} places both survive and have dropped")

    @property
    def digest(self) -> str:
        """SHA-256 over every field, 64 hex digits: what a ledger notes."""
        return digest(
            "unmask", self.run_id, self.deal, self.server_round, len(self.survivors), *self.survivors, *self.dropped
        ).hex()

    @property
    def dealers(self) -> tuple[int, ...]:
        """All places named, ascending."""
        return tuple(sorted(self.survivors + self.dropped))


@dataclass(frozen=True)
class UnmaskAnswer(_Answer):
    """shares: 33 bytes for each dealer in order, of a survivor's seed or of the mask key of one that dropped."""

    name = "secure_unmask_answer"

    run_id: str
    server_round: int
    place: int
    shares: bytes

    def __post_init__(self) -> None:
        check_run_id(self.run_id)
        within("server_round", self.server_round, 1, MAX_ROUND)
        within("place", self.place, 1, MAX_PEERS)
        if len(self.shares) % SHARE_BYTES or not 1 <= len(self.shares) // SHARE_BYTES <= MAX_PEERS:
            raise ValueError(f"shares of {len(self.shares)} bytes")


def _check_start(run_id: str, deal: int) -> None:
    check_run_id(run_id)
    within("deal", deal, 1, MAX_ROUND)


def _rounds(name: str, blob: bytes, size: int) -> int:
    rounds, rest = divmod(len(blob), size)
    if rest or not 1 <= rounds <= MAX_ROUNDS_AHEAD:
        raise ValueError(f"{name} of {len(blob)} bytes: want {size} a round for 1..{MAX_ROUNDS_AHEAD} rounds")
    return rounds


def _check_sealed(sealed: tuple[bytes, ...], rounds: int) -> None:
    size = rounds * PAIR_BYTES + SEAL_BYTES
    if any(len(one) != size for one in sealed):
        raise ValueError(f"sealed shares of other than {size} bytes")


def _check_places(name: str, places: tuple[int, ...]) -> None:
    if any(not 1 <= place <= MAX_PEERS for place in places) or list(places) != sorted(set(places)):
        raise ValueError(f"{name} are not distinct places from 1 to {MAX_PEERS} in ascending order")


def _check_tags(tags: tuple[bytes, ...]) -> None:
    if any(len(tag) != KEY_BYTES for tag in tags):
        raise ValueError(f"a confirmation of other than {KEY_BYTES} bytes")


def lattice_of(instructions: RoundInstructions, dimension: int) -> Lattice:
    """The lattice of a round under a secure sum, and each client's noise share: from public constants, the same for all.

    Raises ConfigError where the range cannot hold the sum.
    """
    return lattice_for(instructions.privacy, instructions.stage, instructions.release.noise_multiplier, dimension)


def lattice_for(privacy: PrivacyConfig, stage: Stage, noise_multiplier: float, dimension: int) -> Lattice:
    """`lattice_of` for any round of a stage."""
    moments = stage is Stage.MOMENTS
    units = privacy.declared_units if moments else privacy.expected_batch
    return Lattice.of(
        dimension=dimension,
        max_grad_norm=1.0 if moments else privacy.max_grad_norm,
        noise_multiplier=noise_multiplier,
        shares=privacy.noise_shares,
        clients=privacy.peers,
        expected_units=units * privacy.peers,
        worst_mean=_WORST_MOMENT if moments else _WORST_MEAN,
    )
