"""What this owner allows: where the faces are, how much privacy may be spent on them, and which rounds are answered.

It comes from the node's own configuration, never from the run's: the coordinator proposes, the owner disposes. All that
a coordinator asks is compared with it before anything is charged or read.
"""

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, get_args, get_type_hints

from flwr.app import Context

from client.policy_file import load_policy_file
from client.simulated import simulated_owner
from common.errors import ConfigError, PrivacyError
from common.fields import Scalar, between, convert, key_of, keys_of, listed, option, require
from common.messages import RoundInstructions, Stage
from common.models.discriminators import DISCRIMINATORS, discriminator_size
from common.privacy.units import PrivacyModel, PrivacyUnit
from common.sections import FaceSource

PolicyValue = Scalar | Sequence[str]
# What Flower adds to the configuration of a simulated node.
_FLOWERS_OWN = {"partition-id", "num-partitions"}


@dataclass(frozen=True)
class Refusal:
    """One thing that the policy does not allow. key: of the policy. value: what was asked."""

    key: str
    value: str
    limit: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.value} is asked and this owner's {self.key} is {self.limit}: {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class OwnerPolicy(FaceSource):
    """The owner's word. Every field has a key of the same name, with dashes, in the policy file.

    What a FaceSource has says where the faces are and how they are read. min_cohort rests on the coordinator's word: a
    client does not see the others.
    """

    data: str = field(
        metadata={
            "help": "the faces, which never leave: a folder, an .npz file, or a source such as hf:PATH; paths are relative to this file"
        }
    )
    state_dir: Path = field(
        metadata={"help": "folder of the privacy ledger and of preprocessed faces; one for these faces, whoever asks"}
    )
    ledger: str = option(
        "",
        "public key of the ledger in state-dir, as `visard client init` made it: without it, or with another, nothing is answered",
    )
    coordinator: str = option(
        "",
        "kit of the only coordinator that is answered, as `visard client join` sets it; none: no node can be started",
    )
    max_epsilon: float = field(metadata={"help": "budget of these faces over all runs and coordinators, ever"})
    delta: float = option(1e-5, "delta of that budget; a ledger keeps the one that it began with")
    unit: PrivacyUnit = option(
        PrivacyUnit.PERSON, "the least that must be protected: person (all photographs of one), or image (allows both)"
    )
    allowed_privacy_models: tuple[PrivacyModel, ...] = option(
        (PrivacyModel.LOCAL,),
        "of local (noised here: nobody is trusted), distributed (a share of noise here, under a secure sum), central (the "
        "coordinator gets clear sums and is trusted to add the noise), none (NO PRIVACY)",
    )
    allowed_discriminators: tuple[str, ...] = option(tuple(DISCRIMINATORS), "networks that a run may train here")
    min_noise_multiplier: float = option(0.3, "least noise of a gradient step, as a multiple of the clipping norm")
    min_moment_noise_multiplier: float = option(0.3, "least noise of the moment release, as a multiple of its norm")
    min_cohort: int = option(
        2, "least number of clients that a round must need; this is the coordinator's word, a client cannot see it"
    )
    peers: str = option(
        "",
        "distributed: fingerprint of the peer set, as `visard client peers` tells it; compare it with the other owners by another way, "
        "or a coordinator could invent clients and take the noise off",
    )
    min_noise_shares: int = option(
        2,
        "distributed: least noise shares of honest clients in every sum, as follows from peers, survivors and colluders",
    )
    min_colluders: int = option(1, "distributed: least number of clients that may collude with the coordinator")
    max_deal_rounds: int = option(
        200, "distributed: most rounds for which keys are dealt ahead; they are kept on the disk"
    )
    min_expected_batch: float = option(
        1.0, "least number of units (persons or images) that a run declares for a client's step"
    )
    max_sample_rate: float = option(0.5, "largest probability with which a unit enters a gradient step, up to 1")
    max_images_per_person: int = option(100, "most photographs of one person in a step")
    max_parameters: int = option(10_000_000, "largest discriminator, in parameters")
    max_local_steps: int = option(100, "most gradient steps in one round")
    max_augment_views: int = option(8, "most augmented views of a photograph in a step; memory grows with them")
    max_fakes: int = option(20_000, "most generated images sent along with a round of several steps")
    max_planned_steps: int = option(
        1_000_000, "most gradient steps that a run may plan; the plan fixes a new ledger's order of accounting"
    )
    disclose_reason: bool = option(
        True,
        "tell the coordinator the kind of a refusal (such as BudgetExhausted); with false it hears Refused only, and cannot leave "
        "this client out once its budget is spent",
    )

    @classmethod
    def from_context(cls, context: Context) -> Self:
        """Read the node's configuration.

        It holds flat keys, or `policy` alone: the path of a policy file, which is then read for every message. So
        Flower's own node is started with `flower-supernode --node-config 'policy="owner.toml"'`. A node of Flower's
        simulation engine (`partition-id`, no data) gets its simulated share.

        Raises ConfigError where a key is missing, unknown or out of range.
        """
        config: dict[str, PolicyValue] = {k: v for k, v in context.node_config.items() if k not in _FLOWERS_OWN}
        if "policy" in config:
            path = Path(str(config.pop("policy"))).expanduser()
            require(
                not config, f"policy = {path} and beside it {', '.join(sorted(config))}: write all keys into that file"
            )
            policy = cls.from_file(path)
            require(
                not policy.coordinator,
                f"{path} names the kit of a coordinator, and flower-supernode cannot check who asks: start `visard client start`, or "
                "keep a policy without it for Flower's node",
            )
            return policy
        if "data" not in config and "partition-id" in context.node_config and _in_ray_worker():
            config |= simulated_owner(context.node_config, context.run_config, context.run_id)
        return cls.from_config(config)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a policy file. Raises ConfigError, which names it, where it is missing, damaged or names no ledger."""
        keys = load_policy_file(path)
        try:
            policy = cls.from_config(keys)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        require(
            bool(policy.ledger),
            f"{path} names no ledger: write a policy with `visard client init`, which makes one, or copy the key that "
            "`visard ledger show` tells",
        )
        return policy

    @classmethod
    def from_config(cls, config: Mapping[str, PolicyValue]) -> Self:
        """Parse keys; a list is a sequence of words, or comma-separated text as Flower's flat configuration has it.

        Raises ConfigError where a key is missing, unknown or out of range.
        """
        known = {key_of(f.name): f.name for f in fields(cls)}
        for key in config:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise ConfigError(f"unknown key {key!r} in this node's policy: {hint}")
        missing = {"data", "state-dir", "max-epsilon"} - set(config)
        if missing:
            raise ConfigError(
                f"this node's policy lacks {', '.join(sorted(missing))}: write a policy with `visard client init`, start with "
                "`visard client start --policy FILE`, or give flower-supernode a --node-config with policy=FILE"
            )
        hints = get_type_hints(cls)
        return cls(**{known[key]: _parsed(key, value, hints[known[key]]) for key, value in config.items()})

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, ["max_epsilon"], 0, 1e9)
        between(self, ["delta"], 0, 0.499999, open_low=True)
        between(self, ["min_noise_multiplier", "min_moment_noise_multiplier"], 0, 1e3)
        between(self, ["min_cohort", "max_local_steps"], 1, 10**4)
        between(self, ["min_noise_shares", "min_colluders", "max_deal_rounds"], 1, 1000)
        require(
            not self.peers or (len(self.peers) == 64 and set(self.peers) <= set("0123456789abcdef")),
            f"peers = {self.peers!r}: a fingerprint has 64 hex digits, as `visard client peers` tells it",
        )
        between(self, ["min_expected_batch"], 0, 1e9)
        between(self, ["max_sample_rate"], 0, 1, open_low=True)
        between(self, ["max_images_per_person"], 1, 1000)
        between(self, ["max_parameters"], 1, 10**10)
        between(self, ["max_augment_views"], 1, 64)
        between(self, ["max_fakes", "max_planned_steps"], 1, 10**9)
        for name, words, known in (
            ("allowed-privacy-models", self.allowed_privacy_models, tuple(PrivacyModel)),
            ("allowed-discriminators", self.allowed_discriminators, tuple(DISCRIMINATORS)),
        ):
            wrong = [word for word in words if word not in known]
            require(bool(words) and not wrong, f"{name} = {', '.join(words)!r}: choose of {', '.join(known)}")

    @property
    def source(self) -> FaceSource:
        """Where the faces are and how they are read, without the rest of the policy."""
        return FaceSource(**{f.name: getattr(self, f.name) for f in fields(FaceSource)})

    def to_flat(self) -> dict[str, Scalar]:
        """Every key, as Flower's flat configuration holds it: the inverse of `from_config`."""
        flat: dict[str, Scalar] = {}
        for name, key in keys_of(type(self)):
            value = getattr(self, name)
            kept = type(value) in (bool, int, float)
            flat[key] = value if kept else ",".join(value) if isinstance(value, tuple) else str(value)
        return flat

    def check(self, instructions: RoundInstructions) -> None:
        """Refuse a round that this owner does not allow. Raises PrivacyError before anything is charged or read."""
        found = self.refusals(instructions)
        if found:
            raise PrivacyError("; ".join(map(str, found)))

    def refusals(self, asked: RoundInstructions) -> list[Refusal]:
        """All that this owner does not allow in a round. Looks at the settings, not at the arrays.

        A moment round is judged with the steps that it says will follow: nothing is spent on a run that would be
        refused in its second round.
        """
        privacy, model = asked.privacy, asked.model
        private = privacy.privacy_model is not PrivacyModel.NONE
        found = []

        def refuse(key: str, value: object, limit: object, remedy: str) -> None:
            found.append(Refusal(key, f"{value}", f"{limit}", remedy))

        def at_least(name: str, what: str, value: float) -> None:
            if not value >= getattr(self, name):
                key = key_of(name)
                refuse(key, f"{what} {value:g}", f"{getattr(self, name):.10g}", f"raise it, or the owner lowers {key}")

        def at_most(name: str, what: str, value: float) -> None:
            if not value <= getattr(self, name):
                key = key_of(name)
                refuse(
                    key, f"{what} {value:.10g}", f"{getattr(self, name):.10g}", f"lower it, or the owner raises {key}"
                )

        if privacy.privacy_model not in self.allowed_privacy_models:
            refuse(
                "allowed-privacy-models",
                f"privacy-model {privacy.privacy_model}",
                ", ".join(self.allowed_privacy_models),
                "run with one of these, or the owner adds it",
            )
        if private and self.unit is PrivacyUnit.PERSON and privacy.unit is not PrivacyUnit.PERSON:
            refuse("unit", f"unit {privacy.unit}", self.unit, f"run with unit {self.unit}, or the owner lowers it")
        if model.discriminator not in self.allowed_discriminators:
            refuse(
                "allowed-discriminators",
                f"discriminator {model.discriminator}",
                ", ".join(self.allowed_discriminators),
                "run with one of these, or the owner adds it",
            )
        values = len(listed(self.label_values))
        if values and model.num_classes not in (0, values):
            refuse("label-values", f"num-classes {model.num_classes}", values, "run with as many classes, or with none")
        if self.attributes and not values and model.num_classes:
            refuse(
                "label-column",
                f"num-classes {model.num_classes}",
                "empty",
                "run with num-classes 0, or the owner names a column",
            )
        at_most("max_parameters", "a discriminator of", discriminator_size(model))
        at_most("max_augment_views", "augment-views", asked.augmentation.augment_views)
        at_most("max_fakes", "fakes", 0 if asked.fakes is None else len(asked.fakes))
        at_least("min_cohort", "min-clients", asked.min_clients)
        if privacy.privacy_model is PrivacyModel.DISTRIBUTED:
            if not self.peers:
                told = "compare its fingerprint with the other owners, and pin it with `visard client peers FILE --pin`"
                refuse("peers", "a secure sum", "empty", told)
            shares = privacy.noise_shares if privacy.peers and privacy.survivors else 0
            at_least("min_noise_shares", "noise shares", shares)
            at_least("min_colluders", "colluders", privacy.colluders)
        if asked.stage is Stage.MOMENTS and private:
            at_least("min_moment_noise_multiplier", "moment-noise-multiplier", asked.moment_noise_multiplier)
        if asked.stage is Stage.GRADIENTS or asked.planned_steps > 0:
            if private:
                at_least("min_noise_multiplier", "noise-multiplier", privacy.noise_multiplier)
            at_least("min_expected_batch", "expected-batch", privacy.expected_batch)
            at_most("max_sample_rate", "sample-rate", privacy.sample_rate)
            if privacy.unit is PrivacyUnit.PERSON:
                at_most("max_images_per_person", "images-per-person", privacy.images_per_person)
            at_most("max_local_steps", "local-steps", asked.local_steps)
            at_most("max_planned_steps", "planned steps", asked.planned_steps)
        return found


def _parsed(key: str, value: PolicyValue, target: Any) -> Any:
    if target is Path:
        require(isinstance(value, str) and bool(value), f"{key} = {value!r} must be a path")
        return Path(str(value)).expanduser()
    if not get_args(target):
        return convert(key, value, target)  # type: ignore[arg-type]  # it refuses a list
    words = listed(value) if isinstance(value, str) else value
    require(isinstance(words, list | tuple), f"{key} = {value!r} must be a list of words")
    return tuple(convert(key, word, get_args(target)[0]) for word in words)  # type: ignore[union-attr]


def _in_ray_worker() -> bool:
    """Whether this process is a worker of Flower's simulation engine, which no SuperNode or node of ours ever is."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()
