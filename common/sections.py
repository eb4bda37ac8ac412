"""The sections of a run's configuration: small frozen dataclasses that check themselves.

Everything here but `FaceSource` at a real client is **public**: it travels in clear and must not be derived from what any client holds.
"""

from dataclasses import dataclass

from common.cohort import AGGREGATORS, least_clients
from common.fields import between, listed, one_of, option, require
from common.privacy.secret_sharing import honest_shares
from common.privacy.units import PrivacyModel, PrivacyUnit
from common.stopping import FIGURES, StopCondition

IMAGE_SIZES = (28, 32, 64, 128)
CHANNELS = (1, 3)
AUGMENTATIONS = ("flip", "crop", "rotation", "colour", "blur", "erase")
DETECT = ("none", "largest", "all")


@dataclass(frozen=True)
class ModelConfig:
    """The networks. The client builds its discriminator from these by name; no code travels."""

    image_size: int = option(32, "side of the square images in pixels: 28, 32, 64 or 128")
    channels: int = option(3, "1 for grey, 3 for colour")
    num_classes: int = option(0, "number of labels to condition on; 0: unconditional")
    generator: str = option("dcgan", "generator architecture: dcgan, dense-conv or resnet")
    generator_width: int = option(32, "channels of the generator's last hidden layer")
    latent_dim: int = option(64, "dimension of the generator's latent vector")
    discriminator: str = option(
        "dcgan", "discriminator architecture: dcgan, mlp, conv-dropout, deep-conv, resnet or scattering"
    )
    discriminator_width: int = option(32, "channels of the discriminator's first layer")
    loss: str = option(
        "bce", "minimax, bce, hinge, least-squares, wasserstein, or cross-entropy (of classes, no fakes)"
    )
    weight_clip: float = option(0.1, "bound on each weight of the discriminator under the loss wasserstein")

    def __post_init__(self) -> None:
        one_of(self, "image_size", IMAGE_SIZES)
        one_of(self, "channels", CHANNELS)
        one_of(self, "generator", ("dcgan", "dense-conv", "resnet"))
        one_of(self, "discriminator", ("dcgan", "mlp", "conv-dropout", "deep-conv", "resnet", "scattering"))
        one_of(self, "loss", ("minimax", "bce", "hinge", "least-squares", "wasserstein", "cross-entropy"))
        between(self, ["weight_clip"], 0, 10, open_low=True)
        between(self, ["num_classes"], 0, 1000)
        require(self.num_classes != 1, "num-classes = 1: one class is no condition; use 0, or 2 and more")
        require(
            self.loss != "cross-entropy" or self.num_classes > 1,
            f"loss = cross-entropy with num-classes = {self.num_classes}: there are no classes to tell; give 2 or more, or "
            "another loss",
        )
        between(self, ["generator_width", "discriminator_width", "latent_dim"], 1, 1024)


@dataclass(frozen=True)
class PrivacyConfig:
    """What is promised, to whom, and the declared constants it rests on.

    `sample_rate`, `expected_batch` and `images_per_person` are declared, never measured: whoever knows a client's true
    counts must not be able to read them off these.
    """

    privacy_model: PrivacyModel = option(
        PrivacyModel.CENTRAL,
        "who adds the noise: local (each client), distributed (each client a share, under a secure sum), central (the "
        "coordinator), none (NO PRIVACY)",
    )
    unit: PrivacyUnit = option(PrivacyUnit.PERSON, "who is protected: person (all photographs of one) or image")
    epsilon: float = option(10.0, "privacy budget of the whole run; the noise is calibrated to it")
    delta: float = option(1e-5, "delta of the (epsilon, delta) guarantee")
    noise_multiplier: float = option(0.0, "noise of a discriminator step over max-grad-norm; 0: from epsilon")
    max_grad_norm: float = option(1.0, "clipping norm C of one unit's gradient")
    sample_rate: float = option(0.1, "probability q with which each unit enters a step (Poisson sampling)")
    expected_batch: float = option(8.0, "declared units in a client's step, the normaliser: about q times its units")
    images_per_person: int = option(4, "photographs drawn of each sampled person")
    peers: int = option(0, "distributed: clients in the peer set; 0: all simulated ones")
    survivors: int = option(0, "distributed: clients without which a sum is not opened; 0: four fifths of the peers")
    colluders: int = option(
        1, "distributed: clients that may collude with the coordinator; each knows its own noise share"
    )

    def __post_init__(self) -> None:
        one_of(self, "privacy_model", PrivacyModel)
        one_of(self, "unit", PrivacyUnit)
        between(self, ["epsilon"], 0, 1e9, open_low=True)
        between(self, ["delta"], 0, 0.5, open_low=True)
        between(self, ["noise_multiplier"], 0, 1e3)
        # Below, the squares of gradients would vanish in float32, and with them the clipping.
        between(self, ["max_grad_norm"], 1e-3, 1e6)
        between(self, ["sample_rate"], 0, 1, open_low=True)
        between(self, ["expected_batch"], 0, 1e9, open_low=True)
        between(self, ["images_per_person"], 1, 1000)
        between(self, ["peers", "survivors"], 0, 1000)
        between(self, ["colluders"], 1, 1000)
        if self.privacy_model is PrivacyModel.DISTRIBUTED and self.peers and self.survivors:
            least = (self.peers + self.colluders) // 2 + 1
            least = max(least, self.colluders + 1)
            require(
                least <= self.peers,
                f"peers = {self.peers} with colluders = {self.colluders}: there is no secure sum; use more peers or fewer colluders",
            )
            require(
                least <= self.survivors <= self.peers,
                f"survivors = {self.survivors} with peers = {self.peers} and colluders = {self.colluders}: use {least} to {self.peers}",
            )

    @property
    def noise_shares(self) -> int:
        """Of the distributed model: noise shares of honest clients that are in every sum that is opened, H."""
        return honest_shares(self.peers, self.survivors, self.colluders)

    @property
    def declared_units(self) -> float:
        """Units that one client is declared to hold: expected_batch / sample_rate."""
        return self.expected_batch / self.sample_rate


@dataclass(frozen=True)
class AugmentationConfig:
    """What is done to images, real and generated alike, before the discriminator sees them."""

    augment: str = option("", f"augmentations, comma-separated, of {', '.join(AUGMENTATIONS)}; empty: none")
    augment_views: int = option(1, "augmented views of each photograph, averaged before clipping")

    def __post_init__(self) -> None:
        for name in self.names:
            require(
                name in AUGMENTATIONS, f"augment = {self.augment!r}: {name!r} is none of {', '.join(AUGMENTATIONS)}"
            )
        require(len(set(self.names)) == len(self.names), f"augment = {self.augment!r} names one twice: leave one out")
        between(self, ["augment_views"], 1, 64)
        require(
            self.augment_views == 1 or bool(self.names),
            f"augment-views = {self.augment_views} without augment: all views would be the same; name augmentations, or use 1",
        )

    @property
    def names(self) -> list[str]:
        """The augmentations, in the order in which they are applied."""
        return listed(self.augment)


@dataclass(frozen=True)
class MomentConfig:
    """The moment stage: one noised release of mean random features, to which the generator is fitted first."""

    moment_rounds: int = option(1, "1: begin with the moment stage; 0: leave it out")
    moment_noise_multiplier: float = option(
        0.0,
        "noise of the moment release over the norm bound 1 of one unit; 0: from epsilon, half of which it then costs by itself",
    )
    moment_steps: int = option(400, "generator steps of the moment stage")
    moment_batch: int = option(500, "fakes in a generator step of the moment stage")
    moment_lr: float = option(1e-2, "Adam learning rate of the moment stage")
    moment_weight: float = option(1.0, "gradient norm of the kept moment term over the adversarial one")
    feature_seed: int = option(0, "public seed of the random features")

    def __post_init__(self) -> None:
        one_of(self, "moment_rounds", (0, 1))
        between(self, ["moment_noise_multiplier"], 0, 1e3)
        between(self, ["moment_steps"], 0, 10**7)
        between(self, ["moment_batch"], 2, 10**5)
        between(self, ["moment_lr"], 0, 1, open_low=True)
        between(self, ["moment_weight"], 0, 1e6)
        between(self, ["feature_seed"], 0, 2**31)


@dataclass(frozen=True)
class TrainingConfig:
    """The adversarial rounds and the coordinator."""

    num_rounds: int = option(300, "adversarial rounds; 0: the moment stage alone")
    local_steps: int = option(1, "discriminator steps of a client in a round (more than 1: local model only)")
    local_lr: float = option(0.05, "SGD learning rate of the steps within a round")
    refine_steps: int = option(0, "generator steps after the last round, if there was one; they cost no privacy")
    discriminator_steps: int = option(1, "rounds for one generator step; where adaptive, to begin with")
    adaptive: bool = option(False, "raise discriminator-steps while the discriminator is poor on fakes")
    discriminator_lr: float = option(5e-4, "Adam learning rate of the discriminator")
    generator_lr: float = option(2e-4, "Adam learning rate of the generator in the adversarial rounds")
    adam_beta1: float = option(0.0, "Adam's beta1 of both networks in the adversarial rounds")
    generator_batch: int = option(64, "fakes in a generator step")
    fake_batch: int = option(64, "fakes in a discriminator step")
    ema_decay: float = option(0.999, "decay of the generator's moving average")
    seed: int = option(0, "seed of the coordinator's initial weights and latents; never of privacy noise")
    min_clients: int = option(2, "clients a round needs")
    cohort_size: int = option(
        0,
        "clients asked in a round where more are connected, others each round; 0: all (visard plan counts every round)",
    )
    round_timeout_s: float = option(600.0, "seconds the coordinator waits for a round's updates")
    straggler_wait_s: float = option(
        0.0, "seconds it waits for the others once min-clients have answered; 0: until round-timeout-s"
    )
    aggregator: str = option("mean", f"local, none: what is made of the updates: {', '.join(AGGREGATORS)}")
    poisoners: float = option(0.2, "share of a round's clients that may lie, for trimmed-mean, krum and multi-krum")
    update_bound: float = option(
        4.0,
        "local, none: longest update over the length expected of an honest one; longer ones are scaled down; 0: none",
    )
    sample_every: int = option(50, "rounds between two pictures, and between two looks at stop-when's frechet")
    stop_when: str = option(
        "", f"end early at NAME<VALUE or NAME>VALUE, NAME one of {', '.join(FIGURES)}; empty: never"
    )
    reference: str = option("", "PUBLIC faces at the coordinator, to which frechet compares; read like --data")
    public: str = option("", "PUBLIC faces at the coordinator to begin with; read like --data; they cost no privacy")
    public_steps: int = option(0, "generator steps on the public faces, before the first round")
    deal_rounds: int = option(50, "distributed: rounds for which keys are dealt ahead")
    checkpoint_every: int = option(1, "rounds between checkpoints (more than 1: non-private runs only)")

    def __post_init__(self) -> None:
        between(self, ["num_rounds", "refine_steps", "public_steps"], 0, 10**7)
        between(self, ["local_steps", "discriminator_steps", "min_clients", "checkpoint_every"], 1, 10**4)
        between(self, ["sample_every"], 1, 10**7)
        between(self, ["deal_rounds"], 1, 1000)
        between(self, ["generator_batch"], 2, 10**5)
        between(self, ["fake_batch"], 1, 10**5)
        between(self, ["local_lr", "discriminator_lr", "generator_lr"], 0, 10, open_low=True)
        between(self, ["cohort_size"], 0, 10**4)
        between(self, ["round_timeout_s"], 0, 10**6, open_low=True)
        between(self, ["straggler_wait_s"], 0, 10**6)
        one_of(self, "aggregator", AGGREGATORS)
        between(self, ["poisoners"], 0, 0.49)
        between(self, ["update_bound"], 0, 10**6)
        self._check_cohort()
        between(self, ["adam_beta1", "ema_decay"], 0, 0.99999)
        between(self, ["seed"], 0, 2**31)
        condition = self.stop_condition
        require(
            condition is None or condition.figure != "frechet" or bool(self.reference),
            f"stop-when = {self.stop_when!r} needs public faces to compare to: give reference",
        )

    def _check_cohort(self) -> None:
        require(
            self.update_bound == 0 or self.update_bound >= 1,
            f"update-bound = {self.update_bound:g} would shorten every honest update: use 1 or more, or 0 for none",
        )
        require(
            self.cohort_size == 0 or self.cohort_size >= self.min_clients,
            f"cohort-size = {self.cohort_size} is less than min-clients = {self.min_clients}: no round could be ended; ask more, or "
            "lower min-clients",
        )
        least = least_clients(self.aggregator, self.poisoners)
        require(
            self.min_clients >= least,
            f"aggregator = {self.aggregator} with min-clients = {self.min_clients} and poisoners = {self.poisoners:g}: with fewer than "
            f"{least} updates it guards against nobody; use --min-clients {least} or more, or another aggregator",
        )

    @property
    def stop_condition(self) -> StopCondition | None:
        """`stop_when`, parsed."""
        return StopCondition.parse(self.stop_when) if self.stop_when else None


@dataclass(frozen=True, kw_only=True)
class FaceSource:
    """Where faces are and how they are read. At a real node it is the owner's word, never the run's."""

    data: str
    crop: float = option(
        1.0, "share of the shorter side that the centre crop keeps; with detect, of the square around a face"
    )
    detect: str = option("none", "find faces and level their eyes: none, largest (one a photograph) or all")
    attributes: str = option(
        "", "CSV of attributes, a row an image, or 'utkface': age, gender and race from the file names"
    )
    file_column: str = option("file", "the CSV's column of file names")
    person_column: str = option("", "the CSV's column that says who it is; empty: the folders say, or nobody")
    label_column: str = option("", "the attribute to condition on; empty: none")
    label_values: str = option(
        "", "its values in the order of the labels 0, 1, ..., comma-separated; the same at every client"
    )

    def __post_init__(self) -> None:
        one_of(self, "detect", DETECT)
        between(self, ["crop"], 0.05, 1.0)
        require(
            bool(self.label_column) == bool(self.label_values),
            f"label-column = {self.label_column!r} and label-values = {self.label_values!r}: give both, or neither",
        )
        values = listed(self.label_values)
        require(len(set(values)) == len(values), f"label-values = {self.label_values!r} names one twice: leave one out")
        require(
            bool(self.attributes) or not self.person_column,
            f"person-column = {self.person_column!r} without attributes: name the CSV",
        )


@dataclass(frozen=True, kw_only=True)
class SimulationConfig(FaceSource):
    """Where simulated clients get their faces. Real clients ignore all of it: their owners name data and budget."""

    data: str = option(
        "procedural:persons=200,images=5", "folder, .npz file, or a source such as procedural:persons=N,images=M"
    )
    num_clients: int = option(10, "simulated clients")
    partitioner: str = option(
        "person",
        "how faces are dealt out: person or iid (evenly), dirichlet or attribute (by partition-by), power-law (uneven sizes)",
    )
    partition_by: str = option("", "attribute by which dirichlet and attribute deal out")
    dirichlet_alpha: float = option(0.5, "dirichlet: small for clients that are unlike, large for even ones")
    power_law_exponent: float = option(
        1.0, "power-law: client k's share is proportional to k to the power of minus this"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "partitioner", ("iid", "person", "dirichlet", "attribute", "power-law"))
        between(self, ["num_clients"], 1, 10**5)
        between(self, ["dirichlet_alpha"], 0, 1e6, open_low=True)
        between(self, ["power_law_exponent"], 0, 10)
        needs = self.partitioner in ("dirichlet", "attribute")
        require(
            needs == bool(self.partition_by),
            f"partition-by = {self.partition_by!r} with partitioner {self.partitioner}: dirichlet and attribute take one, others none",
        )
