"""The wire: what goes in comes out, and whatever else arrives is refused by a typed error."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.errors import ConfigError, MalformedUpdate, ProtocolError
from common.messages import DiscriminatorUpdate, RoundInstructions, Stage
from common.privacy.accounting import Release
from tests.support import RUN_ID, gradient_instructions, tiny_config

WEIGHTS = np.arange(5, dtype=np.float32)


def gradients(**overrides: Any) -> RoundInstructions:
    config = tiny_config(privacy_model="local", augment="flip, blur", augment_views=2, **overrides)
    return gradient_instructions(config, WEIGHTS, 3)


def several(num_classes: int = 0) -> RoundInstructions:
    """A round of two local steps, with fakes."""
    return dataclasses.replace(
        gradients(num_classes=num_classes, moment_batch=20, generator_batch=20),
        local_steps=2,
        fakes=np.arange(4 * 28 * 28, dtype=np.uint8).reshape(4, 1, 28, 28),
        fake_labels=np.array([0, 1, 0, 1]) if num_classes else None,
    )


def moments() -> RoundInstructions:
    return dataclasses.replace(gradients(), stage=Stage.MOMENTS, discriminator=None)


def same(left: RoundInstructions, right: RoundInstructions) -> bool:
    for f in dataclasses.fields(left):
        a, b = getattr(left, f.name), getattr(right, f.name)
        if isinstance(a, np.ndarray):
            if not (isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)):
                return False
        elif a != b or type(a) is not type(b):
            return False
    return True


ALL = pytest.mark.parametrize(
    "make", [gradients, several, lambda: several(10), moments], ids=["gradients", "several", "labels", "moments"]
)


@ALL
def test_instructions_survive_the_round_trip(make: Callable[[], RoundInstructions]) -> None:
    sent = make()
    got = RoundInstructions.from_record(sent.to_record())
    assert same(sent, got)
    assert got.digest() == sent.digest()
    assert got.num_bytes == sum(len(a.data) for a in sent.to_record()["arrays"].values())  # type: ignore[union-attr]


def test_what_a_round_costs() -> None:
    sigma = moments().moment_noise_multiplier
    assert 0.5 < sigma < 3
    assert moments().release == Release("moments", sigma, 1.0)
    assert several().release == Release("gradients", several().privacy.noise_multiplier, 0.5, 2)
    assert gradients().plan == [
        Release("moments", sigma, 1.0),
        Release("gradients", gradients().privacy.noise_multiplier, 0.5, 4),
    ]


def test_the_digest_sees_every_field() -> None:
    base = several(10)
    changed = [
        dataclasses.replace(base, server_round=4),
        dataclasses.replace(base, run_id="f" * 32),
        dataclasses.replace(base, local_lr=0.06),
        dataclasses.replace(base, feature_seed=1),
        dataclasses.replace(base, moment_rounds=0),
        dataclasses.replace(base, moment_noise_multiplier=4.0),
        dataclasses.replace(base, planned_steps=5),
        dataclasses.replace(base, local_steps=4),
        dataclasses.replace(base, stage=Stage.MOMENTS),
        dataclasses.replace(base, model=dataclasses.replace(base.model, loss="hinge")),
        dataclasses.replace(base, privacy=dataclasses.replace(base.privacy, images_per_person=3)),
        dataclasses.replace(base, augmentation=dataclasses.replace(base.augmentation, augment="blur, flip")),
        dataclasses.replace(base, augmentation=dataclasses.replace(base.augmentation, augment_views=3)),
        dataclasses.replace(base, discriminator=WEIGHTS + np.float32(2**-20)),
        dataclasses.replace(base, discriminator=WEIGHTS[::-1]),
        dataclasses.replace(base, fakes=255 - base.fakes),  # type: ignore[operator]
        dataclasses.replace(base, fake_labels=np.array([1, 0, 1, 0])),
        dataclasses.replace(base, fake_labels=None),
    ]
    digests = [instructions.digest() for instructions in [base, *changed]]
    assert len(set(digests)) == len(digests)
    assert several(10).digest() == digests[0]


def altered(make: Callable[[], RoundInstructions], **scalars: Any) -> RecordDict:
    """The record with scalars replaced; None removes one."""
    record = make().to_record()
    fields = {**record["instructions"], **{key.replace("__", "."): value for key, value in scalars.items()}}  # type: ignore[dict-item]
    record["instructions"] = ConfigRecord({key: value for key, value in fields.items() if value is not None})
    return record


@pytest.mark.parametrize(
    "scalars",
    [
        {"server_round": 0},
        {"server_round": -1},
        {"server_round": 3.0},
        {"server_round": True},
        {"server_round": "3"},
        {"server_round": 10**9},
        {"server_round": 10**400},
        {"server_round": None},
        {"run_id": "A" * 32},
        {"run_id": "a" * 31},
        {"run_id": 7},
        {"run_id": "../../../etc/passwd"},
        {"stage": "weights"},
        {"stage": 1},
        {"planned_steps": -1},
        {"planned_steps": 1.0},
        {"local_steps": 0},
        {"local_steps": 2},
        {"local_lr": float("nan")},
        {"local_lr": -0.1},
        {"local_lr": 10**400},
        {"local_lr": "0.1"},
        {"moment_rounds": 2},
        {"moment_noise_multiplier": float("inf")},
        {"moment_noise_multiplier": -1.0},
        {"feature_seed": -1},
        {"feature_seed": 2**40},
        {"surprise": 1},
        {"model__image_size": 31},
        {"model__image_size": 28.0},
        {"model__image_size": 10**400},
        {"model__channels": True},
        {"model__num_classes": 10**6},
        {"model__num_classes": [1, 2]},
        {"model__discriminator": "torch.load"},
        {"model__discriminator": b"mlp"},
        {"model__discriminator_width": 10**9},
        {"model__discriminator_width": 4.5},
        {"model__loss": None},
        {"model__surprise": 1},
        {"model__weight_clip": 0.0},
        {"augmentation__augment": "torch.load"},
        {"augmentation__augment": "flip, flip"},
        {"augmentation__augment": ""},
        {"augmentation__augment": None},
        {"augmentation__augment": b"flip"},
        {"augmentation__augment": ["flip"]},
        {"augmentation__augment_views": 0},
        {"augmentation__augment_views": 65},
        {"augmentation__augment_views": 2.0},
        {"augmentation__augment_views": "2"},
        {"augmentation__surprise": 1},
        {"augmentation": "flip"},
        {"model": 1},
        {"privacy__privacy_model": "trusted"},
        {"privacy__privacy_model": 3},
        {"privacy__unit": "album"},
        {"privacy__unit": None},
        {"privacy__noise_multiplier": 0.0},
        {"privacy__noise_multiplier": -1.0},
        {"privacy__noise_multiplier": float("nan")},
        {"privacy__noise_multiplier": "2"},
        {"privacy__noise_multiplier": 10**400},
        {"privacy__sample_rate": 0.0},
        {"privacy__sample_rate": 1.5},
        {"privacy__max_grad_norm": float("inf")},
        {"privacy__images_per_person": 4.5},
        {"privacy__images_per_person": 0},
        {"privacy__expected_batch": [1.0]},
    ],
    ids=str,
)
def test_a_wrong_scalar_is_refused(scalars: dict[str, Any]) -> None:
    with pytest.raises((ProtocolError, ConfigError)):
        RoundInstructions.from_record(altered(gradients, **scalars))


def test_a_private_round_without_noise_is_refused_and_an_open_one_is_not() -> None:
    with pytest.raises(ProtocolError, match="without noise"):
        RoundInstructions.from_record(altered(gradients, privacy__noise_multiplier=0.0))
    with pytest.raises(ProtocolError, match="without noise"):
        RoundInstructions.from_record(altered(moments, moment_noise_multiplier=0.0))
    open_round = altered(gradients, privacy__noise_multiplier=0.0, privacy__privacy_model="none")
    assert RoundInstructions.from_record(open_round).privacy.noise_multiplier == 0
    with pytest.raises(ProtocolError, match="central"):
        RoundInstructions.from_record(altered(several, privacy__privacy_model="central"))


FAKES = np.zeros((4, 1, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (gradients, {"discriminator": None}),
        (gradients, {"discriminator": WEIGHTS.astype(np.int64)}),
        (gradients, {"discriminator": WEIGHTS.reshape(5, 1)}),
        (gradients, {"discriminator": np.float32(1).reshape(())}),
        (gradients, {"discriminator": np.array([1, np.nan], np.float32)}),
        (gradients, {"discriminator": np.array([1, np.inf], np.float32)}),
        (gradients, {"fakes": FAKES}),
        (gradients, {"fake_labels": np.array([0])}),
        (moments, {"discriminator": WEIGHTS}),
        (moments, {"fakes": FAKES}),
        (moments, {"fake_labels": np.array([0])}),
        (several, {"fakes": None}),
        (several, {"fakes": FAKES[:3]}),
        (several, {"fakes": FAKES[:0]}),
        (several, {"fakes": FAKES[:, :, :27]}),
        (several, {"fakes": FAKES.astype(np.float32)}),
        (several, {"fakes": FAKES[0, 0]}),
        (several, {"fake_labels": np.array([0, 1, 0, 1])}),
        (lambda: several(10), {"fake_labels": None}),
        (lambda: several(10), {"fake_labels": np.array([0, 1, 0])}),
        (lambda: several(10), {"fake_labels": np.array([0, 1, 0, 10])}),
        (lambda: several(10), {"fake_labels": np.array([0, 1, 0, -1])}),
        (lambda: several(10), {"fake_labels": np.array([0, 1, 0.5, 1], np.float32)}),
    ],
)
def test_arrays_that_do_not_fit_the_round_are_refused(
    make: Callable[[], RoundInstructions], changes: dict[str, Any]
) -> None:
    with pytest.raises(ProtocolError):
        RoundInstructions.from_record(dataclasses.replace(make(), **changes).to_record())


def raw(vector: np.ndarray, **changes: Any) -> Array:
    fields = {"dtype": str(vector.dtype), "shape": vector.shape, "stype": "visard.raw", "data": vector.tobytes()}
    array = Array(dtype="float32", shape=(0,), stype="visard.raw", data=b"")
    for name, value in (fields | changes).items():
        setattr(array, name, value)
    return array


BAD_ARRAYS = [
    raw(WEIGHTS, stype="numpy.ndarray"),
    raw(WEIGHTS, dtype="float64"),
    raw(WEIGHTS, dtype="object"),
    raw(WEIGHTS, dtype=">f4"),
    raw(WEIGHTS, shape=(4,)),
    raw(WEIGHTS, shape=(6,)),
    raw(WEIGHTS, shape=(-5,)),
    raw(WEIGHTS, shape=(-1, -5)),
    raw(WEIGHTS, shape=(5, 1)),
    raw(WEIGHTS, shape=(2**62, 2**62)),
    raw(WEIGHTS, shape=(1, 1, 1, 1, 5)),
    raw(WEIGHTS, shape=()),
    raw(WEIGHTS, data=b""),
    raw(WEIGHTS, data=WEIGHTS.tobytes()[:-1]),
    raw(WEIGHTS, data=WEIGHTS.tobytes() + b"\0" * 4),
    raw(WEIGHTS.astype(np.int64)),
    raw(np.arange(20, dtype=np.uint8)),
    raw(np.array([0, 1, np.nan, 3, 4], np.float32)),
    raw(np.array([0, 1, -np.inf, 3, 4], np.float32)),
]


@pytest.mark.parametrize("array", BAD_ARRAYS, ids=range(len(BAD_ARRAYS)))
def test_hostile_arrays_are_refused_both_ways(array: Array) -> None:
    record = gradients().to_record()
    record["arrays"] = ArrayRecord({"discriminator": array})
    with pytest.raises(ProtocolError):
        RoundInstructions.from_record(record)
    update = DiscriminatorUpdate(RUN_ID, 3, WEIGHTS).to_record()
    update["arrays"] = ArrayRecord({"vector": array})
    with pytest.raises(MalformedUpdate):
        DiscriminatorUpdate.from_record(update, gradients(), 5)


def test_an_update_survives_the_round_trip() -> None:
    vector = np.random.default_rng(0).normal(size=5).astype(np.float32)
    got = DiscriminatorUpdate.from_record(DiscriminatorUpdate(RUN_ID, 3, vector).to_record(), gradients(), 5)
    assert (got.run_id, got.server_round) == (RUN_ID, 3)
    np.testing.assert_array_equal(got.vector, vector)


@pytest.mark.parametrize(
    ("scalars", "dimension"),
    [
        ({"run_id": RUN_ID, "server_round": 2}, 5),
        ({"run_id": RUN_ID, "server_round": 4}, 5),
        ({"run_id": RUN_ID, "server_round": "3"}, 5),
        ({"run_id": RUN_ID, "server_round": [3]}, 5),
        ({"run_id": "f" * 32, "server_round": 3}, 5),
        ({"run_id": 0, "server_round": 3}, 5),
        ({"server_round": 3}, 5),
        ({"run_id": RUN_ID}, 5),
        ({}, 5),
        ({"run_id": RUN_ID, "server_round": 3, "num_examples": 17}, 5),
        ({"run_id": RUN_ID, "server_round": 3}, 4),
        ({"run_id": RUN_ID, "server_round": 3}, 6),
    ],
)
def test_an_update_to_another_round_or_of_another_size_is_refused(scalars: dict[str, Any], dimension: int) -> None:
    record = DiscriminatorUpdate(RUN_ID, 3, WEIGHTS).to_record()
    record["update"] = ConfigRecord(scalars)
    with pytest.raises(MalformedUpdate):
        DiscriminatorUpdate.from_record(record, gradients(), dimension)


def test_records_of_other_kinds_and_names_are_refused() -> None:
    instructions, update = gradients().to_record(), DiscriminatorUpdate(RUN_ID, 3, WEIGHTS).to_record()
    for good, name, parse, error in (
        (instructions, "instructions", RoundInstructions.from_record, ProtocolError),
        (update, "update", lambda r: DiscriminatorUpdate.from_record(r, gradients(), 5), MalformedUpdate),
    ):
        scalars, arrays = good[name], good["arrays"]
        hostile: list[dict[str, Any]] = [
            {},
            {name: scalars},
            {"arrays": arrays},
            {name: arrays, "arrays": scalars},
            {name: scalars, "arrays": MetricRecord({"vector": 1.0})},
            {name: MetricRecord({"server_round": 3}), "arrays": arrays},
            {name: scalars, "arrays": arrays, "more": ConfigRecord({})},
            {name: scalars, "arrays": ArrayRecord({})},
            *(
                {name: scalars, "arrays": ArrayRecord({**arrays, section: raw(WEIGHTS)})}  # type: ignore[dict-item]
                for section in ("model", "privacy", "augmentation", "server_round")
            ),
            {name: scalars, "arrays": ArrayRecord({**arrays, "more": raw(WEIGHTS)})},  # type: ignore[dict-item]
        ]
        for records in hostile:
            with pytest.raises(error):
                parse(RecordDict(records))  # type: ignore[operator]
