"""Whatever arrives, either it is what was asked for, or a typed error says no."""

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.errors import ConfigError, MalformedUpdate, ProtocolError
from common.messages import DiscriminatorUpdate, RoundInstructions, Stage
from tests.support import RUN_ID, gradient_instructions, tiny_config

BASE = gradient_instructions(tiny_config(privacy_model="local", augment="crop"), np.arange(5, dtype=np.float32))
FIELDS = dict(BASE.to_record()["instructions"])  # type: ignore[arg-type]
SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.lists(st.integers(-5, 5), max_size=3),
    st.sampled_from(["local", "central", "none", "person", "image", "moments", "gradients", 0, 1, 2, 0.5]),
)


@st.composite
def any_array(draw: st.DrawFn) -> Array:
    """An array as a hostile sender may write it: nothing fits, or nearly everything."""
    array = Array(dtype="float32", shape=(0,), stype="visard.raw", data=b"")
    array.dtype = draw(st.sampled_from(["float32", "int64", "uint8", "float64", "O", ""]))
    array.shape = tuple(draw(st.lists(st.one_of(st.integers(0, 6), st.integers()), max_size=5)))
    array.stype = draw(st.sampled_from(["visard.raw", "visard.raw", "numpy.ndarray"]))
    array.data = draw(st.one_of(st.binary(max_size=40), st.just(bytes(20)), st.just(b"\xff" * 20)))
    return array


@settings(deadline=None)
@given(
    arrays.arrays(np.float32, st.integers(0, 50), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st.integers(1, 10**8),
    st.integers(0, 10**9),
    st.floats(1e-6, 10.0),
)
def test_instructions_survive_the_round_trip(weights: np.ndarray, number: int, steps: int, rate: float) -> None:
    sent = RoundInstructions(
        run_id=RUN_ID,
        server_round=number,
        stage=Stage.GRADIENTS,
        model=BASE.model,
        privacy=BASE.privacy,
        augmentation=BASE.augmentation,
        moment_rounds=1,
        moment_noise_multiplier=2.0,
        feature_seed=0,
        planned_steps=steps,
        min_clients=2,
        local_lr=rate,
        discriminator=weights,
    )
    got = RoundInstructions.from_record(sent.to_record())
    assert got.digest() == sent.digest()
    assert (got.server_round, got.planned_steps, got.local_lr) == (number, steps, rate)
    np.testing.assert_array_equal(got.discriminator, weights)


@settings(deadline=None)
@given(arrays.arrays(np.float32, st.integers(1, 50), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_updates_survive_the_round_trip(vector: np.ndarray) -> None:
    record = DiscriminatorUpdate(RUN_ID, 1, vector).to_record()
    np.testing.assert_array_equal(DiscriminatorUpdate.from_record(record, BASE, len(vector)).vector, vector)


@settings(deadline=None, max_examples=300)
@given(
    st.dictionaries(st.one_of(st.sampled_from(list(FIELDS)), st.text(max_size=5)), SCALARS, max_size=3),
    st.sets(st.sampled_from(list(FIELDS)), max_size=1),
    st.dictionaries(st.sampled_from(["discriminator", "fakes", "fake_labels", "model", "x"]), any_array(), max_size=2),
    st.booleans(),
)
def test_hostile_instructions_give_typed_errors_only(
    changed: dict[str, Any], removed: set[str], hostile: dict[str, Array], keep: bool
) -> None:
    scalars = {key: value for key, value in (FIELDS | changed).items() if key not in removed}
    held = dict(BASE.to_record()["arrays"]) if keep else {}  # type: ignore[arg-type]
    record = RecordDict({"instructions": ConfigRecord(scalars), "arrays": ArrayRecord(held | hostile)})  # type: ignore[arg-type]
    try:
        got = RoundInstructions.from_record(record)
    except (ProtocolError, ConfigError):
        return
    assert RoundInstructions.from_record(got.to_record()).digest() == got.digest()
    assert got.privacy.privacy_model == "none" or got.release.noise_multiplier > 0
    assert got.discriminator is None or np.isfinite(got.discriminator).all()


@settings(deadline=None, max_examples=300)
@given(
    st.dictionaries(st.sampled_from(["run_id", "server_round", "x"]), st.one_of(SCALARS, st.just(RUN_ID))),
    st.dictionaries(st.sampled_from(["vector", "vector", "x"]), any_array(), max_size=2),
)
def test_hostile_updates_give_typed_errors_only(scalars: dict[str, Any], hostile: dict[str, Array]) -> None:
    for fields in (scalars, {"run_id": RUN_ID, "server_round": 1}):
        record = RecordDict({"update": ConfigRecord(fields), "arrays": ArrayRecord(hostile)})
        try:
            got = DiscriminatorUpdate.from_record(record, BASE, 5)
        except MalformedUpdate:
            continue
        assert got.vector.shape == (5,)
        assert got.vector.dtype == np.float32
        assert np.isfinite(got.vector).all()
