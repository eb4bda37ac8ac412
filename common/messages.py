"""What crosses the wire, and its translation to and from Flower's records: the privacy boundary.

Instructions go to the clients; all their fields are public. An update comes back; its vector is the one thing computed
from faces, and it was noised before it got here, save under `central` (the coordinator adds the noise) and `none`.

Arrays travel as raw little-endian bytes whose dtype, shape and length are checked before a buffer is made of them:
Flower's own decoder parses headers written by the sender.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self, get_type_hints

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.errors import ConfigError, MalformedUpdate, ProtocolError
from common.fields import convert
from common.privacy.accounting import Release
from common.privacy.chain import HEAD_BYTES, MAX_HEADS, Head
from common.privacy.units import PrivacyModel
from common.sections import AugmentationConfig, ModelConfig, PrivacyConfig

# No update or set of fakes is larger than this, whatever a message declares.
MAX_BYTES = 1 << 30
# Records that go along with instructions and are no part of what is asked.
_BESIDE = ("witness", "secure_mask_request")
_SECTIONS = {"model": ModelConfig, "privacy": PrivacyConfig, "augmentation": AugmentationConfig}
_DTYPES = {"float32": "<f4", "int64": "<i8", "uint8": "|u1", "uint32": "<u4"}


class Stage(StrEnum):
    """What a round asks for: mean features, or gradients of the discriminator."""

    MOMENTS = "moments"
    GRADIENTS = "gradients"


@dataclass(frozen=True)
class RoundInstructions:
    """What the coordinator asks of every client in a round. All public.

    run_id: names the run in every client's ledger, 32 hex digits. server_round: from 1. planned_steps: discriminator
    steps of the whole run, of which this round is a part; it chooses the RDP order before anything is spent and binds
    nobody. min_clients: updates without which the coordinator says that it ends the round; owners may ask for a least.
    discriminator: (d,) float32 parameters; None in the moment stage. fakes: (n, C, H, W) uint8 and fake_labels:
    (n,) int64, for rounds of several local steps only, n a multiple of local_steps.
    """

    run_id: str
    server_round: int
    stage: Stage
    model: ModelConfig
    privacy: PrivacyConfig
    augmentation: AugmentationConfig
    moment_rounds: int
    moment_noise_multiplier: float
    feature_seed: int
    planned_steps: int
    min_clients: int
    local_steps: int = 1
    local_lr: float = 0.05
    discriminator: np.ndarray | None = None
    fakes: np.ndarray | None = None
    fake_labels: np.ndarray | None = None

    @property
    def release(self) -> Release:
        """What answering costs."""
        moments, gradients = _mechanisms(self.privacy)
        if self.stage is Stage.MOMENTS:
            return Release(moments, self.moment_noise_multiplier, 1.0)
        return Release(gradients, self.privacy.noise_multiplier, self.privacy.sample_rate, self.local_steps)

    @property
    def plan(self) -> list[Release]:
        """What the whole run is planned to cost."""
        return planned_releases(self.privacy, self.moment_rounds, self.moment_noise_multiplier, self.planned_steps)

    @property
    def num_bytes(self) -> int:
        """Array bytes that go to each client."""
        return sum(array.nbytes for array in self._arrays().values())

    def digest(self) -> str:
        """SHA-256 over every field on which the answer depends: two instructions with one digest ask for the same thing.

        `min_clients` is left out: a run that is resumed with fewer clients asks for the same round again, and the
        owner's policy judges it anew each time.
        """
        scalars = {key: value for key, value in self._scalars().items() if key != "min_clients"}
        sha = hashlib.sha256(json.dumps(scalars, sort_keys=True).encode())
        for name, array in self._arrays().items():
            sha.update(f"{name}{array.dtype}{array.shape}".encode())
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()

    def to_record(self, witness: Iterable[bytes] = ()) -> RecordDict:
        """Pack for Flower. `witness`: the heads of ledgers that the coordinator remembers, no part of what is asked."""
        arrays = {name: _pack(array) for name, array in self._arrays().items()}
        record = RecordDict({"instructions": ConfigRecord(self._scalars()), "arrays": ArrayRecord(arrays)})
        if heads := list(witness):
            record["witness"] = ConfigRecord({"heads": heads})
        return record

    @classmethod
    def from_record(cls, record: RecordDict) -> Self:
        """Unpack and check. Raises ProtocolError, or ConfigError on a value that no run may have."""
        asked = RecordDict({name: part for name, part in record.items() if name not in _BESIDE})
        scalars, arrays = _records(asked, "instructions", ProtocolError)
        try:
            values: dict[str, Any] = dict(scalars)
            sections: dict[str, Any] = {name: _section(name, kind, values) for name, kind in _SECTIONS.items()}
            values["stage"] = Stage(values["stage"])
            values |= {name: _unpack(name, array, ProtocolError) for name, array in arrays.items()}
            instructions = cls(**sections, **values)  # a TypeError where a sender names a section himself
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"instructions with missing, unknown or mistyped fields: {error}") from error
        instructions._check()
        return instructions

    def _check(self) -> None:
        def require(condition: bool, problem: str) -> None:
            if not condition:
                raise ProtocolError(f"instructions refused: {problem}")

        for f in dataclasses.fields(self):
            if f.type in (int, float, str):
                value = getattr(self, f.name)
                allowed = (int, float) if f.type is float else (f.type,)
                require(type(value) in allowed, f"{f.name} = {value!r} is not of type {f.type.__name__}")
        require(
            len(self.run_id) == 32 and all(c in "0123456789abcdef" for c in self.run_id), "run_id is not 32 hex digits"
        )
        require(1 <= self.server_round <= 10**8, f"server_round = {self.server_round}")
        require(1 <= self.local_steps <= 10**4, f"local_steps = {self.local_steps}")
        require(0 <= self.planned_steps <= 10**9, f"planned_steps = {self.planned_steps}")
        require(1 <= self.min_clients <= 10**4, f"min_clients = {self.min_clients}")
        require(self.moment_rounds in (0, 1), f"moment_rounds = {self.moment_rounds}")
        require(0 < self.local_lr <= 10, f"local_lr = {self.local_lr}")
        require(0 <= self.moment_noise_multiplier <= 1e6, f"moment_noise_multiplier = {self.moment_noise_multiplier}")
        require(0 <= self.feature_seed <= 2**31, f"feature_seed = {self.feature_seed}")
        if self.privacy.privacy_model is not PrivacyModel.NONE:
            noised = self.moment_rounds == 0 or self.moment_noise_multiplier > 0
            require(noised, "a private moment release without noise")
            require(self.release.noise_multiplier > 0, "a private round without noise")
        if self.privacy.privacy_model in (PrivacyModel.CENTRAL, PrivacyModel.DISTRIBUTED):
            require(self.local_steps == 1, f"several local steps under the {self.privacy.privacy_model} model")
        if self.privacy.privacy_model is PrivacyModel.DISTRIBUTED:
            require(self.privacy.peers > 0 and self.privacy.survivors > 0, "a secure sum without peers or survivors")
        if self.stage is Stage.MOMENTS:
            require(not self._arrays(), "networks or fakes in the moment stage")
            return
        weights = self.discriminator
        if weights is None or weights.ndim != 1 or weights.dtype != np.float32 or not np.isfinite(weights).all():
            raise ProtocolError("instructions refused: the discriminator is not a flat, finite float32 vector")
        require(
            (self.local_steps > 1) == (self.fakes is not None), "fakes go with several local steps, and only with them"
        )
        if self.fakes is not None:
            expected = (self.model.channels, self.model.image_size, self.model.image_size)
            require(
                self.fakes.dtype == np.uint8 and self.fakes.shape[1:] == expected, f"fakes of shape {self.fakes.shape}"
            )
            require(len(self.fakes) % self.local_steps == 0 and len(self.fakes) > 0, f"{len(self.fakes)} fakes")
            require(
                (self.fake_labels is not None) == (self.model.num_classes > 0), "fakes and labels that do not match"
            )
        if self.fake_labels is not None:
            labels, classes = self.fake_labels, self.model.num_classes
            require(self.fakes is not None and labels.shape == (len(self.fakes),), "labels without their fakes")
            require(
                labels.dtype == np.int64 and bool(((labels >= 0) & (labels < classes)).all()),
                f"labels that are not int64 in 0..{classes - 1}",
            )

    def _scalars(self) -> dict[str, Any]:
        scalars: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if dataclasses.is_dataclass(value):
                for inner in dataclasses.fields(value):
                    item = getattr(value, inner.name)
                    scalars[f"{f.name}.{inner.name}"] = str(item) if isinstance(item, StrEnum) else item
            elif isinstance(value, StrEnum):
                scalars[f.name] = str(value)
            elif isinstance(value, int | float | str):
                scalars[f.name] = value
        return scalars

    def _arrays(self) -> dict[str, np.ndarray]:
        named = {"discriminator": self.discriminator, "fakes": self.fakes, "fake_labels": self.fake_labels}
        return {name: array for name, array in named.items() if array is not None}


@dataclass(frozen=True)
class DiscriminatorUpdate:
    """A client's answer.

    vector, float32, or masked uint32 where the model is distributed, which are then sums of the following on a lattice, with a noise
    share, modulo 2^32: in the moment stage the sum of clipped feature vectors, (num_classes or 1) * dim; with one local
    step the sum of the clipped gradients of the real half of the loss, (d,); with several, the mean gradient of both
    halves along the steps, (d,). head: of the client's ledger, for the coordinator to remember. place: the client's among the
    peers of a secure sum, else 0.
    """

    run_id: str
    server_round: int
    vector: np.ndarray
    head: Head | None = None
    place: int = 0

    def to_record(self) -> RecordDict:
        """Pack for Flower."""
        scalars = ConfigRecord({"run_id": self.run_id, "server_round": self.server_round, "place": self.place})
        if self.head is not None:
            scalars["ledger_head"] = self.head.to_bytes()
        return RecordDict({"update": scalars, "arrays": ArrayRecord({"vector": _pack(self.vector)})})

    @classmethod
    def from_record(cls, record: RecordDict, instructions: RoundInstructions, dimension: int) -> Self:
        """Unpack and check against the round that was asked for. Raises MalformedUpdate."""
        scalars, arrays = _records(record, "update", MalformedUpdate)
        if set(scalars) - {"ledger_head"} != {"run_id", "server_round", "place"} or set(arrays) != {"vector"}:
            raise MalformedUpdate(
                f"keys {sorted(scalars)} and {sorted(arrays)}: want run_id, server_round, place and vector"
            )
        asked = (instructions.run_id, instructions.server_round)
        if (scalars["run_id"], scalars["server_round"]) != asked:
            raise MalformedUpdate(f"an answer to round {scalars['server_round']!r}, not to round {asked[1]}")
        place = scalars["place"]
        if type(place) is not int or not 0 <= place <= instructions.privacy.peers:
            raise MalformedUpdate(f"place {place!r}: there are {instructions.privacy.peers} peers")
        masked = instructions.privacy.privacy_model is PrivacyModel.DISTRIBUTED
        dtype = "uint32" if masked else "float32"
        vector = _unpack("vector", arrays["vector"], MalformedUpdate, dtype=dtype, shape=(dimension,))
        if not np.isfinite(vector).all():
            raise MalformedUpdate("the vector has values that are not finite")
        try:
            head = Head.from_bytes(scalars["ledger_head"]) if "ledger_head" in scalars else None
        except ValueError as error:
            raise MalformedUpdate(str(error)) from error
        return cls(*asked, vector, head, place)


def witness_of(record: RecordDict) -> list[bytes]:
    """The heads of ledgers that came with instructions; `Ledger.check_witness` looks for its own. Raises ProtocolError."""
    if "witness" not in record:
        return []
    witness = record["witness"]
    heads = witness.get("heads") if isinstance(witness, ConfigRecord) and set(witness) == {"heads"} else None
    if not isinstance(heads, list) or len(heads) > MAX_HEADS:
        raise ProtocolError(f"the witness is no list of at most {MAX_HEADS} heads")
    packed = [head for head in heads if isinstance(head, bytes) and len(head) == HEAD_BYTES]
    if len(packed) != len(heads):
        raise ProtocolError(f"the witness holds {len(heads) - len(packed)} entries that are not {HEAD_BYTES} bytes")
    return packed


def planned_releases(
    privacy: PrivacyConfig, moment_rounds: int, moment_noise_multiplier: float, planned_steps: int
) -> list[Release]:
    """The releases of a whole run at one client."""
    of_moments, of_gradients = _mechanisms(privacy)
    moments = [Release(of_moments, moment_noise_multiplier, 1.0)] * moment_rounds
    steps = Release(of_gradients, privacy.noise_multiplier, privacy.sample_rate, planned_steps)
    return [*moments, steps] if planned_steps else moments


def _mechanisms(privacy: PrivacyConfig) -> tuple[str, str]:
    """What a ledger calls the moment release and a gradient step."""
    secure = "secure-" if privacy.privacy_model is PrivacyModel.DISTRIBUTED else ""
    return f"{secure}moments", f"{secure}gradients"


def _section(name: str, section_type: type, values: dict[str, Any]) -> object:
    """Take a section's fields out of `values`, each of its own type and no other."""
    hints = get_type_hints(section_type)
    return section_type(**{f: convert(f, values.pop(f"{name}.{f}"), hints[f]) for f in hints})


def _records(record: RecordDict, name: str, error: type[ProtocolError]) -> tuple[ConfigRecord, ArrayRecord]:
    scalars, arrays = record.get(name), record.get("arrays")
    if set(record) != {name, "arrays"} or not isinstance(scalars, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise error(f"records {sorted(record)}: want {name!r} (ConfigRecord) and 'arrays' (ArrayRecord)")
    return scalars, arrays


def _pack(array: np.ndarray) -> Array:
    little_endian = np.ascontiguousarray(array, dtype=_DTYPES[str(array.dtype)])
    return Array(dtype=str(array.dtype), shape=array.shape, stype="visard.raw", data=little_endian.tobytes())


def _unpack(
    name: str,
    array: Array,
    error: type[ProtocolError],
    *,
    dtype: str | None = None,
    shape: tuple[int, ...] | None = None,
) -> np.ndarray:
    declared = tuple(array.shape)
    if array.stype != "visard.raw" or array.dtype not in _DTYPES:
        raise error(f"{name}: serialised as {array.stype!r} of {array.dtype!r}; want visard.raw of {sorted(_DTYPES)}")
    if (dtype and array.dtype != dtype) or (shape and declared != shape):
        raise error(f"{name}: {array.dtype} of shape {declared}; want {dtype} of shape {shape}")
    if not all(isinstance(side, int) and side >= 0 for side in declared) or len(declared) > 4:
        raise error(f"{name}: impossible shape {declared}")
    wire = np.dtype(_DTYPES[array.dtype])
    size = math.prod(declared) * wire.itemsize
    if size != len(array.data) or size > MAX_BYTES:
        raise error(f"{name}: {len(array.data)} bytes for a shape of {size}; the limit is {MAX_BYTES}")
    return np.frombuffer(array.data, dtype=wire).reshape(declared)
