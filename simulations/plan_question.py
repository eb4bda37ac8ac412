"""What `visard plan` is asked: a run's options, and how many people there are.

Which of epsilon, noise multiplier and rounds is computed:

    given on the command line       computed            kept from the recipe
    nothing                         epsilon, where the recipe has a noise multiplier; else the noise multiplier
    epsilon                         noise multiplier    rounds
    rounds                          noise multiplier    epsilon
    noise multiplier                epsilon             rounds
    epsilon and noise multiplier    rounds
    epsilon and rounds              noise multiplier
    noise multiplier and rounds     epsilon
    all three                       refused

Persons, batch and sample rate: a client's expected batch is the sample rate times its persons. A run's own options mean
what they mean in a run: --sample-rate and --expected-batch leave each other as they are, and the persons are declared by
the two. --persons N keeps the sample rate, and the batch follows; --batch B keeps the persons, and the sample rate
follows; of any two that are given the third follows; all three are refused.

Peers, survivors and colluders are a run's own, under whatever model is planned: with them `distributed` is told beside it.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from common.config import RunConfig
from common.errors import ConfigError
from common.fields import Scalar
from common.privacy.planner import check_noise_has_rounds, with_cohort, with_moment_noise
from common.privacy.units import PrivacyModel, PrivacyUnit
from common.sections import PrivacyConfig
from simulations.recipe import load_recipe

LOCAL, DISTRIBUTED, CENTRAL, ALONE = "local", "distributed", "central", "alone"
MODELS = (LOCAL, DISTRIBUTED, CENTRAL, ALONE)
_BUDGET = ("epsilon", "noise-multiplier", "num-rounds")


@dataclass(frozen=True)
class Asked:
    """The options that a plan takes beside a run's; None: not given."""

    persons: float | None = None
    batch: float | None = None


@dataclass(frozen=True)
class Question:
    """A plan's question, resolved.

    config: with the sample rate and expected batch of the plan; what `solved` names in it is void. options: those of the
    command line that a run takes. cohort: the privacy of a distributed run of these clients, with its survivors; None where
    such a run cannot be, and no_cohort says why.
    """

    recipe: str
    config: RunConfig
    options: Mapping[str, Scalar]
    solved: str
    cohort: PrivacyConfig | None
    no_cohort: str = ""

    @property
    def model(self) -> str:
        """LOCAL, DISTRIBUTED or CENTRAL."""
        return str(self.config.privacy.privacy_model)

    @property
    def clients(self) -> int:
        """K."""
        return self.config.simulation.num_clients

    @property
    def batch(self) -> float:
        """B: units of all clients in a step."""
        return self.config.privacy.expected_batch * self.clients

    @property
    def persons(self) -> float:
        """N: units of all clients, as declared."""
        return self.config.privacy.declared_units * self.clients

    @property
    def noise_shares(self) -> int:
        """H: honest clients' noise shares in every sum that is opened; 0 where there is no distributed run."""
        return self.cohort.noise_shares if self.cohort else 0

    @property
    def units(self) -> str:
        """What the units are, in words."""
        return "persons" if self.config.privacy.unit is PrivacyUnit.PERSON else "images"


def ask(recipe: str, overrides: Mapping[str, Scalar], asked: Asked) -> Question:
    """Resolve a recipe, a run's options and a plan's.

    Raises ConfigError for what cannot be combined, and where there is no privacy to plan.
    """
    options = {key: value for key, value in overrides.items() if (key, value) != ("noise-multiplier", 0.0)}
    loaded = load_recipe(recipe, options)
    if loaded.privacy.privacy_model is PrivacyModel.NONE:
        raise ConfigError(
            f"privacy-model = none in {recipe}: there is nothing to compute; give --privacy-model local, distributed or central"
        )
    solved = _solved(options, loaded)
    config = _with_units(loaded, options, asked)
    if solved == "rounds" and not config.training.num_rounds:
        # Rounds are asked of a recipe without: its moment release is to leave them room.
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, num_rounds=1))
    check_noise_has_rounds(config)
    if config.moments.moment_rounds and config.moments.moment_noise_multiplier == 0:
        config = with_moment_noise(config)
        if solved != "noise-multiplier":
            # Told to the run as well, which would compute another from the epsilon or the rounds that are computed here.
            config = _rounded(config)
            options["moment-noise-multiplier"] = config.moments.moment_noise_multiplier
    privacy, cohort, no_cohort = config.privacy, None, ""
    try:
        cohort = _cohort(config)
    except ConfigError as error:
        if privacy.privacy_model is PrivacyModel.DISTRIBUTED:
            raise
        no_cohort = str(error)
    # What the run of this plan is told, beside its recipe; the plan's result is added.
    for key, value, before in (
        ("sample-rate", privacy.sample_rate, loaded.privacy.sample_rate),
        ("expected-batch", privacy.expected_batch, loaded.privacy.expected_batch),
    ):
        if value != before:
            options[key] = value
    return Question(recipe, config, options, solved, cohort, no_cohort)


def _rounded(config: RunConfig) -> RunConfig:
    """The configuration with a moment noise of three digits after the point, rounded up, for people to type."""
    noise = math.ceil(config.moments.moment_noise_multiplier * 1000) / 1000
    return dataclasses.replace(config, moments=dataclasses.replace(config.moments, moment_noise_multiplier=noise))


def changed(question: Question, **sections: Mapping[str, object]) -> Question:
    """The question with other values in its sections, such as privacy={"sample_rate": 0.2}; the noise is what is computed."""
    parts = {name: dataclasses.replace(getattr(question.config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(
        question, config=dataclasses.replace(question.config, **parts), solved="noise-multiplier"
    )


def _solved(options: Mapping[str, Scalar], loaded: RunConfig) -> str:
    given = {key for key in _BUDGET if key in options}
    if len(given) == 3:
        raise ConfigError("epsilon, noise-multiplier and num-rounds are all given: give two, and the third is computed")
    if given == {"epsilon", "noise-multiplier"}:
        return "rounds"
    if "noise-multiplier" in given or (not given and loaded.privacy.noise_multiplier > 0):
        return "epsilon"
    return "noise-multiplier"


def _with_units(loaded: RunConfig, options: Mapping[str, Scalar], asked: Asked) -> RunConfig:
    persons, batch = asked.persons, asked.batch
    for key, value in (("persons", persons), ("batch", batch)):
        if value is not None and not (0 < value <= 1e12 and math.isfinite(value)):
            raise ConfigError(f"{key} = {value:g} is outside (0, 1e12]")
    privacy, clients = loaded.privacy, loaded.simulation.num_clients
    if batch is not None and "expected-batch" in options:
        raise ConfigError(
            "batch and expected-batch are both given: they say the same, of all clients and of one; give one"
        )
    if batch is None and "expected-batch" in options and persons is not None:
        batch = privacy.expected_batch * clients
    if persons is not None and batch is not None and "sample-rate" in options:
        raise ConfigError("persons, batch and sample-rate are all given: give two, and the third follows")
    if persons is None and batch is None:
        return loaded
    rate = privacy.sample_rate
    if "sample-rate" not in options and batch is not None:
        persons = persons or privacy.declared_units * clients
        if batch > persons:
            raise ConfigError(
                f"a batch of {batch:,g} is more than the {persons:,g} units that there are: a smaller batch, or more --persons"
            )
        rate = batch / persons
    elif batch is None and persons is not None:
        batch = rate * persons
    if batch is None:
        return loaded
    changed_privacy = dataclasses.replace(privacy, sample_rate=rate, expected_batch=batch / clients)
    return dataclasses.replace(loaded, privacy=changed_privacy)


def _cohort(config: RunConfig) -> PrivacyConfig:
    """The privacy of a distributed run of all clients. Raises ConfigError where there is none."""
    clients, peers = config.simulation.num_clients, config.privacy.peers
    if clients == 1:
        raise ConfigError("privacy-model = distributed with num-clients = 1: it takes two clients or more")
    if peers not in (0, clients):
        raise ConfigError(
            f"peers = {peers} and num-clients = {clients}: a plan is of all peers; give num-clients {peers}, or leave peers at 0"
        )
    privacy = dataclasses.replace(config.privacy, privacy_model=PrivacyModel.DISTRIBUTED)
    # Several local steps are refused to `distributed`; beside `local`, a plan tells what one step would be.
    training = dataclasses.replace(config.training, local_steps=1)
    return with_cohort(dataclasses.replace(config, privacy=privacy, training=training)).privacy
