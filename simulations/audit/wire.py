"""Real clients on a tapped wire: what they were asked, what they put on the Grid, and what their ledgers say of it.

Nothing here looks into a client. The auditor is the coordinator, who sees every message, and the owner, who chose the
faces and may read the ledger.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import app as shipped_client_app
from common.config import RunConfig
from common.errors import MalformedUpdate
from common.faces import FaceDataset
from common.fields import Scalar
from common.messages import DiscriminatorUpdate, RoundInstructions, Stage
from common.models.discriminators import discriminator_of
from common.models.features import RandomFeatures
from common.models.flat import num_parameters
from common.privacy.accounting import Release
from common.privacy.ledger import Ledger
from simulations.engine import InProcessGrid
from simulations.simulate import owner_configs

_HEARD = 16384
RUN_ID = "a0d17" + "0" * 27
# An owner who allows whatever the auditor asks: the budget is not what is audited here.
_OPEN_HANDED: dict[str, Scalar] = {"max-epsilon": 1e9, "max-sample-rate": 1.0, "max-local-steps": 10**4}


class Wire:
    """Owners with given faces, each a node of one ClientApp over an in-process Grid; all they keep is in `folder`.

    One ClientApp answers for all, as in a simulation. client_app: by default the shipped one.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        shares: Sequence[FaceDataset],
        client_app: ClientApp = shipped_client_app,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folders = [folder / f"{number:04d}" for number in range(len(shares))]
        files = [own.with_suffix(".npz") for own in self._folders]
        for file, share in zip(files, shares, strict=True):
            share.save(file)
        configs = [{**given, **_OPEN_HANDED} for given in owner_configs(config, files, folder)]
        self.grid = ListeningGrid(client_app, configs)
        self.nodes = self.grid.get_node_ids()

    def ask(self, instructions: RoundInstructions, clients: Sequence[int] | None = None) -> list[np.ndarray | str]:
        """One round: of each client (all by default) the vector that it sent, (d,) float32, or the kind of its error."""
        nodes = self.nodes if clients is None else [self.nodes[number] for number in clients]
        dimension = answer_size(instructions)
        return [_read(reply, instructions, dimension) for reply in self.send(instructions.to_record(), nodes)]

    def send(self, content: RecordDict, nodes: Sequence[int]) -> list[Message]:
        """Any message to these nodes, and what comes back."""
        messages = [Message(content, node, "train", ttl=600.0, group_id="audit") for node in nodes]
        return self.grid.send_and_receive(messages)

    def charges(self, client: int) -> list[Release]:
        """What a client's ledger, read anew from the disk, says that it released, in order."""
        return Ledger(self._folders[client], max_epsilon=1e9, delta=1e-5).releases


class ListeningGrid(InProcessGrid):
    """Keeps, of every masked vector that comes back, its first words: node -> (K,) uint32 each, in order."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.masked: dict[int, list[np.ndarray]] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """As without listening."""
        for reply in super().pull_messages(message_ids):
            arrays = reply.content.get("arrays") if reply.has_content() else None
            if isinstance(arrays, ArrayRecord) and arrays["vector"].dtype == "uint32":
                words = np.frombuffer(arrays["vector"].data[: 4 * _HEARD], dtype="<u4")
                self.masked.setdefault(reply.metadata.src_node_id, []).append(words)
            yield reply


def answer_size(instructions: RoundInstructions) -> int:
    """How many numbers answer a round."""
    model = instructions.model
    if instructions.stage is Stage.GRADIENTS:
        return num_parameters(discriminator_of(model))
    return RandomFeatures(model.image_size, model.channels, instructions.feature_seed).dim * max(model.num_classes, 1)


def gradient_round(
    config: RunConfig, weights: np.ndarray, server_round: int, *, run_id: str = RUN_ID, **changes: Any
) -> RoundInstructions:
    """What a coordinator sends for a gradient round: `weights` (d,) float32. changes: other fields of the instructions."""
    moments = config.moments
    instructions = RoundInstructions(
        run_id=run_id,
        server_round=server_round,
        stage=Stage.GRADIENTS,
        model=config.model,
        privacy=config.privacy,
        augmentation=config.augmentation,
        moment_rounds=moments.moment_rounds,
        moment_noise_multiplier=moments.moment_noise_multiplier,
        feature_seed=moments.feature_seed,
        planned_steps=1,
        min_clients=1,
        discriminator=weights,
    )
    return dataclasses.replace(instructions, **changes)


def moment_round(config: RunConfig, server_round: int = 1, *, run_id: str = RUN_ID) -> RoundInstructions:
    """What a coordinator sends for the moment round."""
    asked = gradient_round(config, np.empty(0, np.float32), server_round, run_id=run_id)
    return dataclasses.replace(asked, stage=Stage.MOMENTS, discriminator=None)


def _read(reply: Message, instructions: RoundInstructions, dimension: int) -> np.ndarray | str:
    if reply.has_error():
        return str(reply.error.reason)
    try:
        return DiscriminatorUpdate.from_record(reply.content, instructions, dimension).vector
    except MalformedUpdate as error:
        return type(error).__name__
