"""The configuration: flat keys in, checked values out, and nothing guessed."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import PRESETS, RunConfig, expand_preset, flat_fields
from common.errors import ConfigError, PrivacyError, VisardError
from common.fields import Scalar, load_toml
from common.privacy.accounting import epsilon_of
from common.privacy.planner import noise_told, run_releases, with_noise
from common.privacy.units import PrivacyModel, PrivacyUnit
from common.sections import (
    AugmentationConfig,
    ModelConfig,
    MomentConfig,
    PrivacyConfig,
    SimulationConfig,
    TrainingConfig,
)
from simulations.recipe import load_recipe, recipe_names

SECTIONS = (ModelConfig, PrivacyConfig, AugmentationConfig, MomentConfig, TrainingConfig, SimulationConfig)


def test_every_field_is_one_key_and_no_two_sections_share_one() -> None:
    names = [f.name for section in SECTIONS for f in dataclasses.fields(section)]
    assert len(names) == len(set(names))
    assert list(flat_fields()) == [name.replace("_", "-") for name in names]
    assert all(help_text for _, _, help_text in flat_fields().values())


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("num-round", "num-rounds"), ("sample_rate", "sample-rate"), ("epsilom", "epsilon"), ("image-siez", "image-size")],
)
def test_an_unknown_key_is_refused_with_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option '{wrong}'; did you mean '{near}'"):
        RunConfig.from_flat({wrong: 1})


def test_a_key_like_no_other_is_refused_without_a_guess() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'zzzzzzz'$"):
        RunConfig.from_flat({"zzzzzzz": 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num-rounds", 3.0),
        ("num-rounds", "3"),
        ("num-rounds", True),
        ("adaptive", 1),
        ("adaptive", "true"),
        ("epsilon", "10"),
        ("epsilon", True),
        ("loss", 3),
        ("data", 7),
        ("privacy-model", "Central"),
        ("privacy-model", 1),
        ("unit", "photograph"),
    ],
)
def test_a_wrong_type_is_refused_and_named(key: str, value: Scalar) -> None:
    with pytest.raises(ConfigError, match=key):
        RunConfig.from_flat({key: value})


def test_an_int_may_stand_for_a_float_and_becomes_one() -> None:
    epsilon = RunConfig.from_flat({"epsilon": 8}).privacy.epsilon
    assert type(epsilon) is float
    assert epsilon == 8.0


@pytest.mark.parametrize(
    ("key", "low", "high"),
    [
        ("epsilon", 0.0, 1.1e9),
        ("delta", 0.0, 0.51),
        ("noise-multiplier", -0.1, 1.1e6),
        ("max-grad-norm", 0.0, float("inf")),
        ("sample-rate", 0.0, 1.0001),
        ("expected-batch", 0.0, float("nan")),
        ("images-per-person", 0, 1001),
        ("image-size", 31, 129),
        ("channels", 2, 4),
        ("num-classes", 1, 1001),
        ("latent-dim", 0, 1025),
        ("moment-rounds", -1, 2),
        ("moment-noise-multiplier", -0.1, float("nan")),
        ("moment-batch", 1, 10**5 + 1),
        ("num-rounds", -1, 10**7 + 1),
        ("refine-steps", -1, 10**7 + 1),
        ("local-steps", 0, 10**4 + 1),
        ("discriminator-lr", 0.0, 10.5),
        ("ema-decay", -0.1, 1.0),
        ("round-timeout-s", 0.0, float("inf")),
        ("min-clients", 0, 10**4 + 1),
        ("num-clients", 0, 10**5 + 1),
        ("crop", 0.0, 1.1),
    ],
)
def test_a_value_out_of_range_is_refused_and_named(key: str, low: Scalar, high: Scalar) -> None:
    for value in (low, high):
        with pytest.raises(ConfigError, match=key):
            RunConfig.from_flat({key: value})


@pytest.mark.parametrize(
    ("flat", "told"),
    [
        ({"privacy-model": "central", "local-steps": 2}, "local-steps = 2"),
        ({"privacy-model": "central", "checkpoint-every": 5}, "checkpoint-every = 5"),
        ({"privacy-model": "local", "checkpoint-every": 2}, "checkpoint-every = 2"),
        ({"moment-rounds": 0, "num-rounds": 0}, "nothing would be trained"),
        ({"augment": "flip,flop"}, "'flop' is none of flip, crop"),
        ({"augment": "flip, flip"}, "names one twice"),
        ({"augment-views": 2}, "all views would be the same"),
        ({"label-column": "gender"}, "give both, or neither"),
        ({"label-column": "gender", "label-values": "male,female"}, "set num-classes to 2"),
        ({"label-column": "gender", "label-values": "male,male", "num-classes": 2}, "names one twice"),
        ({"person-column": "who"}, "name the CSV"),
        ({"partitioner": "dirichlet"}, "partition-by = ''"),
        ({"partitioner": "person", "partition-by": "race"}, "others none"),
        ({"num-classes": 10, "moment-batch": 19}, "moment-batch = 19"),
        ({"num-classes": 10, "generator-batch": 19}, "generator-batch = 19"),
        ({"loss": "cross-entropy"}, "cross-entropy with num-classes = 0"),
        ({"loss": "cross-entropy", "num-classes": 2, "adaptive": True}, "adaptive under loss = cross-entropy"),
        ({"loss": "cross-entropy", "num-classes": 2, "stop-when": "fake-accuracy>0.9"}, "there is no fake-accuracy"),
    ],
)
def test_combinations_that_cannot_be_kept_are_refused(flat: dict[str, Scalar], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        RunConfig.from_flat(flat)


@pytest.mark.parametrize(
    "flat",
    [
        {"privacy-model": "local", "local-steps": 5},
        {"privacy-model": "none", "local-steps": 5, "checkpoint-every": 7},
        {"moment-rounds": 1, "num-rounds": 0},
        {"moment-rounds": 0, "num-rounds": 1, "num-classes": 10, "moment-batch": 2},
        {"loss": "cross-entropy", "num-classes": 2, "stop-when": "generator-loss<0.1", "discriminator": "scattering"},
    ],
)
def test_combinations_that_can_be_kept_are_accepted(flat: dict[str, Scalar]) -> None:
    assert RunConfig.from_flat(flat).to_flat() | flat == RunConfig.from_flat(flat).to_flat()


def _values() -> st.SearchStrategy[dict[str, Scalar]]:
    """Any subset of some keys that bind nobody else, with any value in range."""
    positive = st.floats(1e-6, 0.4)
    return st.fixed_dictionaries(
        {},
        optional={
            "image-size": st.sampled_from([28, 32, 64]),
            "loss": st.sampled_from(["bce", "hinge"]),
            "privacy-model": st.sampled_from([str(model) for model in PrivacyModel]),
            "unit": st.sampled_from([str(unit) for unit in PrivacyUnit]),
            "epsilon": st.floats(1e-6, 1e9),
            "delta": positive,
            "sample-rate": positive,
            "num-rounds": st.integers(1, 10**7),
            "adaptive": st.booleans(),
            "seed": st.integers(0, 2**31),
            "data": st.text(max_size=20),
            "crop": st.floats(0.05, 1.0),
        },
    )


@settings(deadline=None, max_examples=50)
@given(_values())
def test_flat_keys_survive_the_round_trip(flat: dict[str, Scalar]) -> None:
    config = RunConfig.from_flat(flat)
    back = config.to_flat()
    assert {key: back[key] for key in flat} == flat
    assert RunConfig.from_flat(back) == config
    assert all(type(value) in (bool, int, float, str) for value in back.values())


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.sampled_from(list(flat_fields())),
        st.one_of(st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        max_size=3,
    )
)
def test_whatever_is_given_only_a_typed_error_comes_back(flat: dict[str, Any]) -> None:
    try:
        config = RunConfig.from_flat(flat)
    except ConfigError:
        return
    assert RunConfig.from_flat(config.to_flat()) == config


def test_toml_that_is_nested_damaged_or_missing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    with pytest.raises(ConfigError, match="cannot read"):
        load_toml(path)
    path.write_text("num-rounds = ")
    with pytest.raises(ConfigError, match="cannot read"):
        load_toml(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read"):
        load_toml(path)
    path.write_text("[training]\nnum-rounds = 3")
    with pytest.raises(ConfigError, match="single value"):
        load_toml(path)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_run_as_it_is(name: str) -> None:
    """It parses, its noise is calibrated within its budget, and its simulated clients are as many as a round needs."""
    try:
        config = load_recipe(name, {})
    except ConfigError as error:
        assert "--data" in str(error), "a recipe may leave out nothing but the data"  # noqa: PT017
        config = load_recipe(name, {"data": "faces"})
    planned = with_noise(config)
    privacy = planned.privacy
    if privacy.privacy_model is PrivacyModel.NONE:
        assert run_releases(planned) == []
        assert privacy.noise_multiplier == 0
    else:
        # Without rounds there is nothing for the noise multiplier to be of: the moment release is all that is protected.
        assert (privacy.noise_multiplier > 0) is (planned.training.num_rounds > 0)
        assert planned.moments.moment_noise_multiplier > 0
        assert 0.98 * privacy.epsilon <= epsilon_of(run_releases(planned), privacy.delta) <= privacy.epsilon
    assert planned.training.min_clients <= planned.simulation.num_clients


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"moment_noise_multiplier": 3.0, "noise_multiplier": 2.5}, "noise multiplier 3 of the moments, 2.5 of a step"),
        ({"moment_noise_multiplier": 3.0, "num_rounds": 0}, "noise multiplier 3 of the moments"),
        ({"moment_rounds": 0, "noise_multiplier": 2.5}, "noise multiplier 2.5 of a step"),
        ({"moment_rounds": 0, "num_rounds": 0, "public": "faces", "public_steps": 1}, "nothing is released"),
    ],
)
def test_the_noise_is_told_of_what_is_released(options: dict[str, Scalar], told: str) -> None:
    flat = {key.replace("_", "-"): value for key, value in options.items()}
    assert noise_told(with_noise(RunConfig.from_flat({"num-rounds": 3, **flat}))) == told


def test_a_recipe_by_path_and_overrides_on_top(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("num-rounds = 3\nepsilon = 4.0\n")
    config = load_recipe(str(path), {"epsilon": 5.0})
    assert (config.training.num_rounds, config.privacy.epsilon) == (3, 5.0)
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load_recipe("dmeo", {})
    with pytest.raises(ConfigError, match="no recipe"):
        load_recipe(str(tmp_path / "yours.toml"), {})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_stands_for_options_and_those_beside_it_win(name: str, tmp_path: Path) -> None:
    assert load_recipe("demo", {"preset": name}).to_flat().items() >= PRESETS[name].items()
    path = tmp_path / "mine.toml"
    path.write_text(f'preset = "{name}"\ngenerator-lr = 0.5\n')
    training = load_recipe(str(path), {}).training
    assert (training.generator_lr, training.discriminator_lr) == (0.5, PRESETS[name]["discriminator-lr"])
    # A preset on the command line passes what the recipe says.
    assert load_recipe(str(path), {"preset": name}).training.generator_lr == PRESETS[name]["generator-lr"]
    with pytest.raises(ConfigError, match="choose one of classic-adam, slow-adam"):
        expand_preset({"preset": "fast-adam"})


def test_noise_that_was_given_is_kept_where_it_fits_and_refused_where_not() -> None:
    base = RunConfig.from_flat({"noise-multiplier": 5.0})
    assert with_noise(base).privacy.noise_multiplier == 5.0
    with pytest.raises(
        ConfigError, match=r"noise-multiplier 5 is of the rounds, and there are none: give --num-rounds"
    ):
        with_noise(RunConfig.from_flat({"noise-multiplier": 5.0, "num-rounds": 0}))
    with pytest.raises(ConfigError, match=r"over the budget 10"):
        with_noise(RunConfig.from_flat({"noise-multiplier": 0.3}))
    with pytest.raises(VisardError, match="alone costs epsilon"):
        with_noise(RunConfig.from_flat({"moment-noise-multiplier": 0.3}))
    assert not issubclass(ConfigError, PrivacyError)
