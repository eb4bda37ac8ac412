"""What this owner allows: where the faces are, and how much privacy may be spent on them.

It comes from the node's own configuration, never from the run's: the coordinator proposes, the owner disposes.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, get_type_hints

from flwr.app import Context

from common.errors import ConfigError, PrivacyError
from common.faces.procedural import parse_source
from common.fields import Scalar, convert, key_of, keys_of
from common.messages import RoundInstructions
from common.privacy.units import PrivacyModel, PrivacyUnit
from common.sections import FaceSource


@dataclass(frozen=True, kw_only=True)
class OwnerPolicy(FaceSource):
    """The owner's word. Every field has a key of the same name, with dashes, in the node's configuration.

    What a FaceSource has: where the faces are and how they are read. state_dir: the ledger and the cache of preprocessed faces.
    max_epsilon, delta: the budget of this data set over all runs and coordinators. unit: the least that must be
    protected; `image` allows both units. allow_central: send clear gradient sums to the coordinator, which is trusted
    to add the noise. allow_non_private: answer rounds without any protection.
    """

    state_dir: Path
    max_epsilon: float
    delta: float = 1e-5
    unit: PrivacyUnit = PrivacyUnit.PERSON
    allow_central: bool = False
    allow_non_private: bool = False

    @classmethod
    def from_context(cls, context: Context) -> Self:
        """Read the node's configuration; a node of Flower's simulation engine (`partition-id`, no data) gets its
        simulated share.

        Raises ConfigError where a key is missing, unknown or out of range.
        """
        config = dict(context.node_config)
        if "data" not in config and "partition-id" in config and _in_ray_worker():
            config = simulated_owner(config, context)
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Scalar]) -> Self:
        """Parse flat keys. Raises ConfigError where one is missing, unknown or out of range."""
        missing = {"data", "state-dir", "max-epsilon"} - set(config)
        if missing:
            raise ConfigError(
                f"this node's configuration lacks {', '.join(sorted(missing))}: start it with `visard client start`, or give "
                "flower-supernode a --node-config with these keys"
            )
        known = {key_of(f.name): f.name for f in fields(cls)}
        unknown = set(config) - set(known) - {"partition-id", "num-partitions"}
        if unknown:
            raise ConfigError(
                f"unknown keys in this node's configuration: {', '.join(sorted(unknown))}; known: {sorted(known)}"
            )
        hints = get_type_hints(cls)
        values: dict[str, Any] = {
            known[key]: Path(str(value)).expanduser()
            if hints[known[key]] is Path
            else convert(key, value, hints[known[key]])
            for key, value in config.items()
            if key in known
        }
        return cls(**values)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.max_epsilon < float("inf") and 0 < self.delta < 0.5):
            raise ConfigError(
                f"max-epsilon {self.max_epsilon} must be finite and not negative, delta {self.delta} in (0, 0.5)"
            )

    @property
    def source(self) -> FaceSource:
        """Where the faces are and how they are read, without the rest of the policy."""
        return FaceSource(**{f.name: getattr(self, f.name) for f in fields(FaceSource)})

    def check(self, instructions: RoundInstructions) -> None:
        """Refuse a round that this owner does not allow. Raises PrivacyError before anything is charged or read."""
        model, unit = instructions.privacy.privacy_model, instructions.privacy.unit
        if model is PrivacyModel.NONE and not self.allow_non_private:
            raise PrivacyError(
                "the coordinator asks for a round without privacy; this owner has not set allow-non-private"
            )
        if model is PrivacyModel.CENTRAL and not self.allow_central:
            raise PrivacyError(
                "the coordinator asks for clear gradients (central); this owner has not set allow-central"
            )
        if model is not PrivacyModel.NONE and self.unit is PrivacyUnit.PERSON and unit is not PrivacyUnit.PERSON:
            raise PrivacyError(f"the coordinator would protect one {unit} only; this owner asks for unit {self.unit}")


def _in_ray_worker() -> bool:
    """Whether this process is a worker of Flower's simulation engine, which no SuperNode or node of ours ever is."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def simulated_owner(config: Mapping[str, Scalar], context: Context) -> dict[str, Scalar]:
    """A simulated node's share: its own procedural persons, or its own source where `data` has the placeholder
    {client}; it may stand in `attributes` too.

    Only a worker of Flower's simulation engine gets here, where coordinator and owner are one: at a real node the run's
    configuration names neither data nor budget.
    """
    run, client, clients = context.run_config, int(config["partition-id"]), int(config["num-partitions"])
    source = {key: run[key] for _, key in keys_of(FaceSource)}
    data = str(source["data"])
    if data.startswith("procedural:"):
        persons, images, seed = parse_source(data.removeprefix("procedural:"))
        mine = persons[len(persons) * client // clients : len(persons) * (client + 1) // clients]
        data = f"procedural:persons={len(mine)},first={mine.start},images={images},seed={seed}"
    elif "{client}" in data:
        data = data.replace("{client}", str(client))
    else:
        raise ConfigError(
            f"data = {data!r}: under `flwr run` a simulated client needs its own faces: procedural:..., or a path or source with "
            "{client} in it, such as flwr-datasets:...,partition={client}; `visard simulate` deals out one folder"
        )
    private = run["privacy-model"] != PrivacyModel.NONE
    return {
        **config,
        **source,
        "data": data,
        "attributes": str(source["attributes"]).replace("{client}", str(client)),
        "state-dir": f"{run.get('runs-dir', 'runs')}/flwr-{context.run_id}/clients/{client}",
        "max-epsilon": run["epsilon"] if private else 0.0,
        "delta": run["delta"],
        "unit": run["unit"],
        "allow-central": run["privacy-model"] == PrivacyModel.CENTRAL,
        "allow-non-private": not private,
    }
