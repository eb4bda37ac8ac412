"""A federation under a secure sum whose wire, clients and coordinator fail where a test says so."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

import client.app
import client.secure_round
from client.app import create_app
from client.discriminator import gradient_update
from client.moments import moment_update
from common.config import RunConfig
from common.faces import FaceDataset
from common.fields import Scalar
from common.messages import RoundInstructions, Stage
from common.privacy.randomness import SecureRandom
from common.secure_messages import ConfirmRequest, DealRequest, KeyRequest, MaskRequest, UnmaskRequest, lattice_of
from server.aggregation import declared_mean
from server.checkpoint import CheckpointStore, CoordinatorState
from server.coordinator import coordinate
from server.exchange import Exchange
from server.quality import Judge
from simulations.engine import InProcessGrid
from tests.support import keyed, keyed_coordinator, node_configs, random_faces, tiny_config

KINDS = {
    KeyRequest.name: "key",
    DealRequest.name: "deal",
    ConfirmRequest.name: "confirm",
    MaskRequest.name: "mask",
    UnmaskRequest.name: "unmask",
}
# (node, kind of message, round): what becomes of it.
Faults = dict[tuple[int, str, int], str]


class KilledError(BaseException):
    """A process ends here: nothing in it may catch this."""


class Steps:
    """Notes what a coordinator does, and ends it at the n-th step; with n None, never."""

    def __init__(self, last: int | None = None) -> None:
        self.taken: list[str] = []
        self._last = last

    def __call__(self, step: str) -> None:
        self.taken.append(step)
        if len(self.taken) == self._last:
            raise KilledError(step)


class EachStepOnce(Steps):
    """Ends a coordinator at every step at which none was ended before."""

    def __call__(self, step: str) -> None:
        if step not in self.taken:
            self.taken.append(step)
            raise KilledError(step)


class FaultyGrid(InProcessGrid):
    """Real clients behind a bad wire.

    faults: `down` (the node does not get a message, and the wire says so), `lost` (it does not, and nobody says so),
    `unheard` (its answer is lost), `late` (its answer comes during the next exchange). offline: nodes that are not connected.
    """

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: Sequence[dict[str, Scalar]],
        faults: Faults | None = None,
        steps: Callable[[str], None] = lambda _step: None,
    ) -> None:
        super().__init__(client_app, node_configs)
        self.faults, self.steps = dict(faults or {}), steps
        self.offline: set[int] = set()
        self._exchange = 0
        self._late: list[tuple[int, Message]] = []

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if node not in self.offline]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self._exchange += 1
        pushed = super().push_messages(messages)
        self.steps(f"asked {about(self._waiting[pushed[0]])[1:]}" if pushed else "asked nobody")
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for exchange, reply in self._late:
            if exchange < self._exchange:
                yield reply
        self._late = [late for late in self._late if late[0] == self._exchange]
        for message_id in message_ids:
            message = self._waiting.get(message_id)
            if message is None:
                continue
            fault = self.faults.get(about(message), "")
            if fault == "lost":
                continue
            if fault == "down":
                yield Message(Error(100, "Down"), reply_to=self._waiting.pop(message_id))
                continue
            (reply,) = super().pull_messages([message_id])
            self.steps(f"answered {about(message)}")
            if fault == "late":
                self._late.append((self._exchange, reply))
            elif fault != "unheard":
                yield reply

    def drain(self) -> None:
        """Give the clients what a coordinator sent before it died; nobody hears the answers."""
        self.steps = lambda _step: None
        list(super().pull_messages(list(self._waiting)))


def about(message: Message) -> tuple[int, str, int]:
    kind = next(kind for name, kind in KINDS.items() if name in message.content)
    return message.metadata.dst_node_id, kind, int(message.metadata.group_id)


class SteppingStore(CheckpointStore):
    """Its coordinator can be ended before and after each save."""

    def __init__(self, directory: Path, steps: Callable[[str], None]) -> None:
        super().__init__(directory)
        self._steps = steps

    def save(self, state: CoordinatorState) -> None:
        sums, now = state.sums, state.next_round
        stand = f"{now} {bool(sums.get('deal'))} {sums.get('masking') == now} {sums.get('opening') == now}"
        self._steps(f"saving {stand}")
        super().save(state)
        self._steps(f"saved {stand}")


class ExactSums:
    """An observer: each round's mean is that of the survivors' vectors, computed anew without any mask.

    survivors: by round, the nodes whose vectors were in the sum. void: rounds whose sum was never opened.
    """

    def __init__(self, owners: dict[int, str], shares: dict[str, FaceDataset]) -> None:
        self._owners, self._shares = owners, shares
        self.survivors: dict[int, set[int]] = {}
        self.void: set[int] = set()

    def fit_stepped(self, state: CoordinatorState) -> None:
        pass

    def round_ended(self, state: CoordinatorState) -> None:
        if "void" in state.last:
            self.void.add(state.last["round"])
            return
        assert state.released is not None
        instructions, found = state.released
        nodes = [state.sums["nodes"][str(place)] for place in state.sums["survivors"]]
        assert state.sums["opening"] == instructions.server_round
        assert state.last["survivors"] == len(nodes)
        self.survivors[instructions.server_round] = set(nodes)
        owners = [self._owners[node] for node in nodes]
        vectors = [lattice_vector(instructions, owner, self._shares[owner]) for owner in owners]
        total = (np.sum(vectors, axis=0, dtype=np.uint64) % 2**32).astype(np.uint32)
        decoded = torch.from_numpy(lattice_of(instructions, len(total)).decode(total))
        assert torch.equal(declared_mean(decoded, len(nodes), instructions), found)


def owner_app() -> ClientApp:
    """The real ClientApp, with noise that is a function of the owner and the round, whatever node it is."""

    def new_random(instructions: RoundInstructions, context: Context) -> SecureRandom:
        return keyed("client", owner_of(context.node_config), instructions.server_round)

    return create_app(new_random)


def owner_of(config: Mapping[str, Scalar]) -> str:
    return Path(str(config["state-dir"])).name


def lattice_vector(instructions: RoundInstructions, owner: str, faces: FaceDataset) -> np.ndarray:
    """What this owner adds to the sum, (d,) uint32, its noise drawn again."""
    random = keyed("client", owner, instructions.server_round)
    update = moment_update if instructions.stage is Stage.MOMENTS else gradient_update
    vector = update(instructions, faces, random)
    return lattice_of(instructions, len(vector)).add_noise_share(torch.from_numpy(vector), random)


class Federation:
    """Clients with their faces and folders; a coordinator is begun, or resumed, with each `run`.

    Node ids begin with 2. again: clients that are connected a second time, as another node, after all others.
    """

    def __init__(self, folder: Path, again: Sequence[int] = (), **config: Scalar) -> None:
        self.folder = folder
        small: dict[str, Scalar] = {"privacy_model": "distributed", "num_rounds": 3, "discriminator_width": 1}
        self.config: RunConfig = tiny_config(**small | config)
        shares = [random_faces(4, 2, seed=number) for number in range(self.config.simulation.num_clients)]
        folder.mkdir(exist_ok=True)
        self.node_configs = node_configs(folder, self.config, shares)
        self.node_configs += [self.node_configs[number] for number in again]
        self.app: ClientApp = owner_app()
        owners = [owner_of(config) for config in self.node_configs]
        self.sums = ExactSums(dict(enumerate(owners, 2)), dict(zip(owners, shares, strict=False)))

    def grid(self, faults: Faults | None = None, steps: Callable[[str], None] = lambda _step: None) -> FaultyGrid:
        return FaultyGrid(self.app, self.node_configs, faults, steps)

    def run(self, grid: FaultyGrid, state: CoordinatorState, *observers: object) -> CoordinatorState:
        """To the end, over this wire; whatever comes, the next `run` may go on from the disk."""
        store = SteppingStore(self.folder, grid.steps)
        exchange = Exchange(grid, state.config.training)
        coordinate(state, Judge(state), exchange, store, [self.sums, *observers], keyed_coordinator)  # type: ignore[list-item]
        return state

    def saved(self) -> CoordinatorState:
        return CheckpointStore(self.folder).load()

    def restart_clients(self) -> None:
        """New processes: what was only in memory is gone."""
        client.app.open_ledger.cache_clear()
        client.secure_round._opened.cache_clear()
        client.app.open_faces.cache_clear()
        self.app = owner_app()


class KilledAtAFlush:
    """A ClientApp of which one node is killed, as it flushes to the disk for the n-th time in a round, and started again.

    flushes: by round, n. killed: the rounds in which that came about.
    """

    def __init__(self, federation: Federation, node: int, flushes: Callable[[int], int]) -> None:
        self._federation, self._node, self._flushes = federation, node, flushes
        self._fsync = os.fsync
        self._within, self._left = 0, 0
        self.killed: list[tuple[int, str]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        server_round = int(message.metadata.group_id)
        if context.node_id != self._node:
            return self._federation.app(message, context)
        if server_round != self._within:
            self._within, self._left = server_round, self._flushes(server_round)
        try:
            os.fsync = self._flush  # type: ignore[assignment]
            return self._federation.app(message, context)
        except KilledError:
            self.killed.append((server_round, about(message)[1]))
            self._federation.restart_clients()
            raise RuntimeError("the process is gone") from None
        finally:
            os.fsync = self._fsync

    def _flush(self, handle: int) -> None:
        self._fsync(handle)
        self._left -= 1
        if self._left == 0:
            raise KilledError


def records(federation: Federation, *kinds: str) -> list[Counter[tuple[str, int]]]:
    """How often each client's ledger has records of these kinds of each round."""
    found = []
    for path in sorted((federation.folder / "clients").glob("*/ledger.jsonl")):
        lines = map(json.loads, path.read_text().splitlines())
        found.append(Counter((line["type"], line["round"]) for line in lines if line["type"] in kinds))
    return found


def charges(federation: Federation) -> list[Counter[tuple[str, int]]]:
    """Of each client the charges and the answers. Nobody helped twice to open a round."""
    assert all(set(found.values()) <= {1} for found in records(federation, "unmasked"))
    return records(federation, "charged", "released")
