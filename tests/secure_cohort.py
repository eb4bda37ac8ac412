"""A cohort for secure sums: real client halves on disk, a real coordinator's half, and bytes between them."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from client.secure_sum import SecureSum
from common.privacy.masks import fingerprint
from common.secure_messages import (
    ConfirmAnswer,
    ConfirmRequest,
    DealAnswer,
    DealRequest,
    MaskRequest,
    UnmaskAnswer,
    UnmaskRequest,
)
from server.secure_sum import MaskedRound, SumDeal
from tests.support import RUN_ID

Message = TypeVar(
    "Message", DealRequest, DealAnswer, ConfirmRequest, ConfirmAnswer, MaskRequest, UnmaskRequest, UnmaskAnswer
)

# Flushing to a real disk takes most of the time of a small sum.
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def to_bytes(record: RecordDict) -> bytes:
    return recorddict_to_proto(record).SerializeToString()


def from_bytes(data: bytes) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(data))


class Cohort:
    """n clients by their place, each with a folder of its own. `wire` records all that was sent, in order."""

    def __init__(self, folder: Path, peers: int, threshold: int, colluders: int = 1) -> None:
        self.folder, self.threshold, self.colluders = folder, threshold, colluders
        keys = sorted(
            (X25519PrivateKey.generate() for _ in range(peers)), key=lambda k: k.public_key().public_bytes_raw()
        )
        self.keys = dict(enumerate(keys, 1))
        self.peers = tuple(key.public_key().public_bytes_raw() for key in keys)
        self.wire: list[bytes] = []
        self.clients: dict[int, SecureSum] = {}
        for place in self.keys:
            self.restart(place)

    def restart(self, place: int) -> SecureSum:
        """As after a crash: what was only in memory is gone."""
        self.clients[place] = SecureSum(self.folder / str(place), self.keys[place], fingerprint(self.peers))
        return self.clients[place]

    def send(self, message: Message) -> Message:
        """Over the wire, as bytes."""
        self.wire.append(to_bytes(message.to_record()))
        return type(message).from_record(from_bytes(self.wire[-1]))

    def request(self, deal: int = 1, first_round: int = 1, rounds: int = 3, run_id: str = RUN_ID) -> DealRequest:
        return DealRequest(run_id, deal, first_round, rounds, self.peers, self.threshold, self.colluders)

    def deal(self, request: DealRequest | None = None, absent: Collection[int] = ()) -> SumDeal:
        """The first exchange: everybody deals but for the absent."""
        deal = SumDeal(request or self.request())
        for place in self.clients.keys() - set(absent):
            answer = self.clients[place].deal(self.send(deal.request))
            assert deal.add_dealt(self.send(answer)) == place
        deal.close_dealing()
        return deal

    def confirm(self, deal: SumDeal, absent: Collection[int] = ()) -> SumDeal:
        """The second exchange."""
        for place in set(deal.dealers) - set(absent):
            answer = self.clients[place].confirm(self.send(deal.confirm_request(place)))
            deal.add_confirmed(self.send(answer))
        deal.close_confirming()
        return deal

    def mask(self, deal: SumDeal, server_round: int, place: int, vector: np.ndarray, first: bool = True) -> np.ndarray:
        """One client's answer to a round."""
        request = self.send(deal.mask_request(place, first=first))
        return self.clients[place].mask(deal.request.run_id, server_round, request.deal, request.confirmations, vector)

    def sum(
        self,
        deal: SumDeal,
        server_round: int,
        vectors: Mapping[int, np.ndarray],
        *,
        late: Iterable[int] = (),
        silent: Collection[int] = (),
    ) -> np.ndarray:
        """A round: `vectors` arrive but for the late; the silent do not help to unmask."""
        sums = MaskedRound(deal, server_round, len(next(iter(vectors.values()))))
        masked = {place: self.mask(deal, server_round, place, vector) for place, vector in vectors.items()}
        for place in masked.keys() - set(late):
            sums.add(place, masked[place])
        asked = sums.close()
        for place in set(asked.survivors) - set(silent):
            sums.add_unmasked(self.send(self.clients[place].unmask(self.send(asked))))
        return sums.total()


def plain_sum(vectors: Iterable[np.ndarray]) -> np.ndarray:
    """Modulo 2^32, by Python's integers."""
    return np.array([sum(map(int, column)) % 2**32 for column in zip(*vectors, strict=True)], np.uint32)


def random_vectors(places: Iterable[int], dimension: int, seed: int = 0) -> dict[int, np.ndarray]:
    """Any words, all of them possible."""
    rng = np.random.default_rng(seed)
    return {place: rng.integers(0, 2**32, dimension, dtype=np.uint32) for place in places}


def restarted(deal: SumDeal) -> SumDeal:
    """The coordinator's half from its file."""
    return SumDeal.from_state(json.loads(json.dumps(deal.to_state())))
