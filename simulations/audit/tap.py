"""Twin federations of canary owners, and every release of theirs."""

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from flwr.clientapp import ClientApp

from common.config import RunConfig
from common.errors import CohortTooSmall
from common.faces import FaceDataset
from common.messages import RoundInstructions, Stage
from common.privacy.accounting import Release
from common.privacy.randomness import SecureRandom
from common.privacy.units import PrivacyModel
from server.checkpoint import CoordinatorState
from server.coordinator import collect
from server.exchange import Exchange
from simulations.audit.wire import RUN_ID, Wire, answer_size

_CLIENTS = 2
TWINS = 2


class Tap:
    """Two federations of two clients, new ledgers each, asked the same rounds under the same global seeds.

    local: both clients hold all faces, and each answer is a release. central: each holds half of the units, and what the
    coordinator's `collect` makes of their answers is the release. sources: releases a round.
    """

    def __init__(self, folder: Path, config: RunConfig, faces: FaceDataset, client_app: ClientApp) -> None:
        training = dataclasses.replace(config.training, min_clients=_CLIENTS)
        self._config = dataclasses.replace(config, training=training)
        self._local = config.privacy.privacy_model is PrivacyModel.LOCAL
        shares = [faces] * _CLIENTS if self._local else _halves(faces, config)
        self._wires = [Wire(folder / f"twin-{twin}", config, shares, client_app) for twin in range(TWINS)]
        self.sources = _CLIENTS if self._local else 1
        self.asked: list[Release] = []
        self.missing = 0
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
        for twin, wire in enumerate(self._wires):
            with _same_seeds(first):
                for number, asked in enumerate(rounds):
                    for source, vector in enumerate(self._released(wire, asked)):
                        self.missing += vector is None
                        self.releases += vector is not None
                        kept[twin, source, number] = empty if vector is None else keep(vector)
        self.asked += [asked.release for asked in rounds]
        return kept

    def charges(self) -> list[list[Release]]:
        """What each ledger of both twins says, read from the disk."""
        return [wire.charges(client) for wire in self._wires for client in range(_CLIENTS)]

    def _released(self, wire: Wire, asked: RoundInstructions) -> list[np.ndarray | None]:
        if self._local:
            return [None if isinstance(answer, str) else answer for answer in wire.ask(asked)]
        state = CoordinatorState.fresh(self._config, RUN_ID)
        try:
            mean = collect(state, Exchange(wire.grid, self._config.training), asked, SecureRandom())
        except CohortTooSmall:
            return [None]
        privacy = asked.privacy
        declared = privacy.expected_batch
        if asked.stage is Stage.MOMENTS:
            declared = privacy.declared_units / max(asked.model.num_classes, 1)
        return [mean.numpy() * np.float32(declared * _CLIENTS)]


def _halves(faces: FaceDataset, config: RunConfig) -> list[FaceDataset]:
    units = faces.units(config.privacy.unit)
    middle = len(units) // 2
    return [faces.subset(np.concatenate(half)) for half in (units[:middle], units[middle:])]


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
