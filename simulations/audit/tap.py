"""Twin federations of canary owners, and every release of theirs."""

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.clientapp import ClientApp

from common.errors import CohortTooSmall
from common.faces import FaceDataset
from common.messages import RoundInstructions, Stage
from common.privacy.accounting import Release
from common.privacy.randomness import SecureRandom
from common.privacy.units import PrivacyModel
from common.secure_messages import lattice_of
from server.checkpoint import CoordinatorState
from server.coordinator import collect
from server.exchange import Exchange
from server.secure_exchange import SecureExchange
from simulations.audit.canaries import Canaries
from simulations.audit.wire import RUN_ID, Wire, answer_size

_CLIENTS = 2
# More than any audit asks: keys are dealt for the rounds that a run has left.
_ROUNDS = 10**4
TWINS = 2


class Tap:
    """Two federations of two clients, new ledgers each, asked the same rounds under the same global seeds.

    local: both clients hold all faces, and each answer is a release. central: each holds half of the units, and what the
    coordinator's `collect` makes of their answers is the release. distributed: so it is, with as many clients as the run has
    peers. sources: releases a round.
    """

    def __init__(self, folder: Path, canaries: Canaries, client_app: ClientApp) -> None:
        config, faces = canaries.config, canaries.faces
        self._local = config.privacy.privacy_model is PrivacyModel.LOCAL
        self._secure = config.privacy.privacy_model is PrivacyModel.DISTRIBUTED
        self._clients = config.privacy.peers if self._secure else _CLIENTS
        training = dataclasses.replace(config.training, min_clients=self._clients, num_rounds=_ROUNDS)
        self._config = dataclasses.replace(config, training=training)
        shares = [faces] * _CLIENTS if self._local else _parts(canaries, self._clients)
        self.wires = [Wire(folder / f"twin-{twin}", config, shares, client_app) for twin in range(TWINS)]
        self._exchanges = [Exchange(wire.grid, training) for wire in self.wires]
        self.sums: list[dict[str, Any]] = [{} for _ in self.wires]
        self._sums = [
            SecureExchange(exchange, kept, {}, training, lambda: None) if self._secure else None
            for exchange, kept in zip(self._exchanges, self.sums, strict=True)
        ]
        self.sources = _CLIENTS if self._local else 1
        self.asked: list[Release] = []
        self.missing = self.asked_again = self.same_again = 0
        self.releases = 0

    def ask(
        self, count: int, instructions: Callable[[int], RoundInstructions], keep: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """`count` rounds: `keep` of every release as a sum over units, (TWINS, sources, count, ...).

        instructions: of a round, by its number. NaN where no release came.
        """
        first = len(self.asked) + 1
        rounds = [instructions(first + number) for number in range(count)]
        empty = keep(np.full(answer_size(rounds[0]), np.nan, dtype=np.float32))
        kept = np.empty((TWINS, self.sources, count, *empty.shape), dtype=empty.dtype)
        for twin in range(TWINS):
            with _same_seeds(first):
                for number, asked in enumerate(rounds):
                    for source, vector in enumerate(self._released(twin, asked)):
                        self.missing += vector is None
                        self.releases += vector is not None
                        kept[twin, source, number] = empty if vector is None else keep(vector)
        self.asked += [asked.release for asked in rounds]
        self._ask_again(rounds[-1])
        return kept

    def _ask_again(self, asked: RoundInstructions) -> None:
        """A round that was answered is asked twice more: the bytes must be the same, or noise could be averaged away."""
        if self._secure:
            return  # masked once, with keys that are gone
        for wire in self.wires:
            for first, second in zip(wire.ask(asked), wire.ask(asked), strict=True):
                if not isinstance(first, str):
                    self.asked_again += 1
                    self.same_again += not isinstance(second, str) and first.tobytes() == second.tobytes()

    def charges(self) -> list[list[Release]]:
        """What each ledger of both twins says, read from the disk."""
        return [wire.charges(client) for wire in self.wires for client in range(self._clients)]

    def noise_factor(self, asked: RoundInstructions) -> float:
        """The claimed noise on a release, over sigma C: 1, but under a secure sum, in which everybody's share is."""
        if not self._secure:
            return 1.0
        unit = 1.0 if asked.stage is Stage.MOMENTS else asked.privacy.max_grad_norm
        deviation = lattice_of(asked, answer_size(asked)).noise_deviation(self._clients)
        return deviation / (asked.release.noise_multiplier * unit)

    def _released(self, twin: int, asked: RoundInstructions) -> list[np.ndarray | None]:
        if self._local:
            return [None if isinstance(answer, str) else answer for answer in self.wires[twin].ask(asked)]
        state = CoordinatorState.fresh(self._config, RUN_ID)
        try:
            mean = collect(state, self._exchanges[twin], asked, SecureRandom(), self._sums[twin])
        except CohortTooSmall:
            return [None]
        privacy = asked.privacy
        declared = privacy.expected_batch
        if asked.stage is Stage.MOMENTS:
            declared = privacy.declared_units / max(asked.model.num_classes, 1)
        return [mean.numpy() * np.float32(declared * self._clients)]


def _parts(canaries: Canaries, clients: int) -> list[FaceDataset]:
    places = np.array_split(np.arange(len(canaries.units)), clients)
    return [canaries.faces.subset(np.concatenate([canaries.units[place] for place in part])) for part in places]


@contextmanager
def _same_seeds(seed: int) -> Iterator[None]:
    """Global generators as a careless program may use them, the same for both twins; put back afterwards."""
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.random.set_rng_state(before[2])
