"""Synthetic faces beside photographs: whose they are, how near they lie, and what a recogniser is given of all of it."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from common.applications.generate import TrainedGenerator
from common.errors import ConfigError, DataError
from common.faces import FaceDataset
from common.models.generators import generator_of
from common.recognition.album import Album
from common.recognition.preparation import prepare
from common.recognition.settings import RecognitionConfig
from common.recognition.synthetic import as_generated, as_wanted, synthetic_persons, variations_of
from common.sections import ModelConfig


def drawing(*, classes: int = 0, size: int = 28, channels: int = 1) -> TrainedGenerator:
    """A generator with large random weights: it has learned nothing, and its faces differ."""
    model = ModelConfig(image_size=size, channels=channels, generator_width=4, latent_dim=4, num_classes=classes)
    network, rng = generator_of(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in network.parameters():
            if weights.dim() > 1:
                weights.copy_(0.3 * torch.randn(weights.shape, generator=rng))
    return TrainedGenerator(network.eval().requires_grad_(False), model)


def apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean squared difference of pixels, face by face."""
    found: np.ndarray = ((one.astype(float) - other) ** 2).mean((1, 2, 3))
    return found


def test_faces_of_a_person_lie_as_near_as_asked() -> None:
    generator = drawing()
    inside, across = {}, {}
    for spread in (0.0, 0.3, 1.0):
        faces, whose = synthetic_persons(generator, 150, 2, spread, seed=5)
        assert (faces.shape, str(faces.dtype)) == ((300, 1, 28, 28), "uint8")
        assert (whose.tolist(), str(whose.dtype)) == ([person for person in range(150) for _ in range(2)], "int64")
        inside[spread] = apart(faces[0::2], faces[1::2]).mean()
        across[spread] = apart(faces[0::2], np.roll(faces[1::2], 1, 0)).mean()
    assert inside[0.0] == 0
    assert 0 < inside[0.3] < across[0.3] / 4
    assert inside[1.0] == pytest.approx(across[1.0], rel=0.15)
    # However far they lie from one another, they are as likely as any face.
    assert across[0.3] == pytest.approx(across[1.0], rel=0.15)


def test_a_seed_says_who_they_are() -> None:
    generator = drawing()
    before = torch.get_rng_state()
    one, again, other = (synthetic_persons(generator, 4, 3, 0.3, seed)[0] for seed in (1, 1, 2))
    assert (one == again).all()
    assert not (one == other).all()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_person_of_a_conditional_generator_has_one_label() -> None:
    generator = drawing(classes=3)
    faces, whose = synthetic_persons(generator, 4, 2, 0.0, seed=1)
    rng = torch.Generator().manual_seed(1)
    latents = torch.randn(4, 4, generator=rng)
    drawn = generator.network(latents, torch.tensor([0, 1, 2, 0]))
    expected = ((drawn + 1) * 127.5).round().to(torch.uint8).numpy()
    assert (apart(faces[0::2], expected) < 1).all()
    assert (faces[0::2] == faces[1::2]).all()
    named, _ = synthetic_persons(generator, 4, 2, 0.0, seed=1, labels=np.array([0, 1, 2, 2]))
    assert (named[:6] == faces[:6]).all()
    assert not (named[6:] == faces[6:]).all()
    assert whose.max() == 3


@pytest.mark.parametrize("classes", [0, 2])
def test_the_latent_of_a_drawn_face_is_found(classes: int) -> None:
    generator = drawing(classes=classes)
    images, labels = generator.draw(6, seed=3)
    found, of = variations_of(generator, images, labels, 1, 0.0, seed=0)
    assert of.tolist() == list(range(6))
    assert (apart(found, images) < 0.02 * apart(np.roll(images, 1, 0), images)).all()

    varied, of = variations_of(generator, images[:3], None if labels is None else labels[:3], 2, 0.3, seed=0)
    assert (of.tolist(), len(varied)) == ([0, 0, 1, 1, 2, 2], 6)
    assert (apart(varied[0::2], varied[1::2]) > 0).all()
    strangers = apart(varied, images[(of + 1) % 3])
    assert np.median(apart(varied, images[of]) / strangers) < 0.5
    again, _ = variations_of(generator, images[:3], None if labels is None else labels[:3], 2, 0.3, seed=0)
    assert (again == varied).all()


def test_variations_want_the_generator_s_own_size() -> None:
    generator = drawing()
    for shape in ((2, 3, 28, 28), (2, 1, 32, 32)):
        with pytest.raises(ConfigError, match=r"images are \(\d, \d\d, \d\d\), the generator's \(1, 28, 28\)"):
            variations_of(generator, np.zeros(shape, np.uint8), None, 1, 0.0, seed=0)


def test_sizes_and_colours_are_those_asked_for() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    same = as_wanted(colour, RecognitionConfig(image_size=32, channels=3))
    assert (same == colour).all()
    grey = as_wanted(colour, RecognitionConfig(image_size=32, channels=1))
    wanted = np.rint(np.tensordot(colour.astype(np.float64), [0.299, 0.587, 0.114], (1, 0)))[:, None]
    assert grey.shape == (3, 1, 32, 32)
    assert np.abs(grey - wanted).max() <= 1, "luma, as Pillow has it"
    three = as_wanted(grey, RecognitionConfig(image_size=32, channels=3))
    assert (three == grey.repeat(3, 1)).all()
    assert (as_wanted(grey, RecognitionConfig(image_size=32, channels=1)) == grey).all()
    # Flat faces stay flat at any size; none leaves the range, though bicubic overshoots.
    for size in (28, 64):
        config = RecognitionConfig(image_size=size, channels=3)
        flat = np.full((2, 3, 32, 32), 201, np.uint8)
        assert (as_wanted(flat, config) == 201).all()
        edges = np.where(np.arange(32) % 8 < 4, 0, 255).astype(np.uint8) * np.ones((1, 3, 32, 1), np.uint8)
        scaled = as_wanted(edges, config)
        assert (scaled.shape, str(scaled.dtype)) == ((1, 3, size, size), "uint8")
        assert abs(float(scaled.mean()) - 127.5) < 4
        assert scaled.max() > 250
        assert scaled.min() < 5
    generator = drawing(size=28)
    assert as_generated(colour, generator).shape == (3, 1, 28, 28)
    own, _ = generator.draw(3, seed=0)
    assert (as_generated(own, generator) == own).all()


COUNTS = {"Ann": 5, "Ben": 1, "Cara": 4, "Dan": 2, "Eve": 3, "Fay": 6}


def album(*, size: int = 28) -> Album:
    """Each photograph has the number of its place for a grey value."""
    whose = np.repeat(np.arange(len(COUNTS)), list(COUNTS.values()))
    files = [f"{name}/{name}_{n:04d}.png" for name, count in COUNTS.items() for n in range(1, count + 1)]
    images = np.arange(len(whose), dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, size, size), np.uint8)
    attributes = {"even": np.array(["no", "yes"])[np.arange(len(whose)) % 2]}
    return Album(FaceDataset(images, whose, attributes=attributes), files, list(COUNTS))


def config_of(**changes: Any) -> RecognitionConfig:
    small: dict[str, Any] = {"image_size": 28, "channels": 1, "validation": 0.4, "synthetic": 6, "variations": 2}
    return RecognitionConfig(**{**small, **changes})


def places_of(images: Any) -> list[int]:
    """The photographs that these are."""
    return [int(image[0, 0, 0]) for image in images]


def test_persons_are_kept_to_verify() -> None:
    whole = album()
    prepared = prepare(whole, config_of())
    assert prepared.kept is not None
    assert prepared.unlabelled is None
    learned, kept = places_of(prepared.lesson.images), places_of(prepared.kept.images)
    owners = [file.split("/")[0] for file in whole.files]
    # Ben has one photograph, and 0.4 of the others are two.
    assert sorted(learned + kept) == [place for place, owner in enumerate(owners) if owner != "Ben"]
    assert {owners[place] for place in learned} == set(prepared.names)
    assert not {owners[place] for place in kept} & set(prepared.names)
    assert (len(prepared.names), prepared.kept.num_persons, prepared.lesson.num_persons) == (3, 2, 3)
    assert [prepared.names[person] for person in prepared.lesson.persons] == [owners[place] for place in learned]
    assert prepared.told == f"{len(learned)} photographs of 3 persons; {len(kept)} photographs of 2 other persons kept"
    again, other = prepare(whole, config_of()), [prepare(whole, config_of(seed=seed)) for seed in range(1, 6)]
    assert places_of(again.lesson.images) == learned
    assert any(each.names != prepared.names for each in other)
    # The division does not change with what is done beside it.
    beside = prepare(whole, config_of(use="identities"), drawing())
    assert places_of(beside.lesson.images[: len(learned)]) == learned


@pytest.mark.parametrize("validation", [0.1, 0.4, 0.5])
def test_photographs_are_kept_to_identify(validation: float) -> None:
    whole = album()
    prepared = prepare(whole, config_of(goal="identify", validation=validation))
    assert prepared.kept is not None
    owners = [file.split("/")[0] for file in whole.files]
    learned, kept = places_of(prepared.lesson.images), places_of(prepared.kept.images)
    assert sorted(learned + kept) == [place for place, owner in enumerate(owners) if owner != "Ben"]
    assert prepared.names == ["Ann", "Cara", "Dan", "Eve", "Fay"]
    for name in prepared.names:
        held = sum(owners[place] == name for place in kept)
        assert held == max(1, round(validation * COUNTS[name]))
    # Numbered alike.
    assert prepared.kept.persons is not None
    assert [prepared.names[person] for person in prepared.kept.persons] == [owners[place] for place in kept]
    assert [prepared.names[person] for person in prepared.lesson.persons] == [owners[place] for place in learned]
    assert f"{len(kept)} photographs of 5 of these persons kept" in prepared.told


@pytest.mark.parametrize("goal", ["verify", "identify"])
def test_nothing_is_kept_where_none_is_asked_for(goal: str) -> None:
    prepared = prepare(album(), config_of(goal=goal, validation=0.0, smallest=1))
    assert (prepared.kept, len(prepared.lesson.images), len(prepared.names)) == (None, 21, 6)
    assert prepared.told == "21 photographs of 6 persons"


@pytest.mark.parametrize("goal", ["verify", "identify"])
@pytest.mark.parametrize("classes", [0, 2])
def test_each_use_adds_what_it_says(goal: str, classes: int) -> None:
    # Of another size than the photographs'.
    generator, labels = drawing(classes=classes, size=32), np.arange(21) % 2 if classes else None
    bare = prepare(album(), config_of(goal=goal))
    count, persons, kept = len(bare.lesson.images), len(bare.names), bare.told.partition("; ")[2]

    def used(use: str, **more: Any) -> Any:
        prepared = prepare(album(), config_of(goal=goal, use=use, **more), generator, labels)
        assert prepared.told.endswith(f"; {kept}")
        assert prepared.names == bare.names
        assert torch.equal(prepared.lesson.images[:count], bare.lesson.images)
        assert prepared.lesson.persons[:count].tolist() == bare.lesson.persons.tolist()
        assert prepared.lesson.images.shape[1:] == (1, 28, 28)
        return prepared

    prepared = used("pretrain")
    assert (prepared.unlabelled.shape, len(prepared.lesson.images)) == ((6, 1, 28, 28), count)
    assert prepared.unlabelled.dtype == torch.uint8
    assert ", after 6 synthetic faces;" in prepared.told

    prepared = used("identities", learn_attributes="even")
    assert prepared.lesson.persons[count:].tolist() == [persons + number // 2 for number in range(12)]
    assert (prepared.lesson.num_persons, prepared.lesson.real) == (persons + 6, persons)
    assert prepared.lesson.attributes["even"][count:].tolist() == [-1] * 12
    assert ", 12 faces of 6 synthetic persons;" in prepared.told

    prepared = used("variation", learn_attributes="even")
    assert len(prepared.lesson.images) == 3 * count
    of = torch.arange(count).repeat_interleave(2)
    assert torch.equal(prepared.lesson.persons[count:], bare.lesson.persons[of])
    assert torch.equal(prepared.lesson.attributes["even"][count:], prepared.lesson.attributes["even"][:count][of])
    assert f", {2 * count} variations of them;" in prepared.told


def test_rarer_groups_are_evened_out() -> None:
    # Ann, Cara and Eve have one label, Fay the other; Ben and Dan have too few photographs.
    labels = np.repeat(np.arange(6) % 2, list(COUNTS.values()))
    config = config_of(use="balance", validation=0.0, smallest=3)
    prepared = prepare(album(), config, drawing(classes=2), labels)
    assert prepared.names == ["Ann", "Cara", "Eve", "Fay"]
    assert prepared.lesson.num_persons == 4 + 2
    assert prepared.lesson.persons[18:].tolist() == [4, 4, 5, 5]
    drawn = as_wanted(synthetic_persons(drawing(classes=2), 2, 2, config.spread, 0, np.array([1, 1]))[0], config)
    assert (prepared.lesson.images[18:].numpy() == drawn).all()
    assert "2 synthetic persons of the rarer groups" in prepared.told
    even = prepare(album(), config_of(use="balance", validation=0.0), drawing(classes=2), np.arange(21) % 2)
    assert even.lesson.num_persons >= 5
    for generator, own in ((drawing(), labels), (drawing(classes=2), None)):
        with pytest.raises(ConfigError, match=r"use = balance .*--label-column"):
            prepare(album(), config, generator, own)


def test_what_cannot_be_prepared_is_told() -> None:
    whole, labels = album(), np.arange(21) % 2
    nobody = dataclasses.replace(whole, faces=FaceDataset(whole.faces.images))
    few, two = whole.subset(np.arange(6)), whole.subset(np.array([0, 1, 5, 6, 7]))
    cases: list[tuple[Album, dict[str, Any], TrainedGenerator | None, np.ndarray | None, type[Exception], str]] = [
        (whole, {"use": "identities"}, None, None, ConfigError, "use = identities: name the run of a generator"),
        (whole, {}, drawing(), None, ConfigError, "use = none: leave the generator out"),
        (nobody, {}, None, None, DataError, "not known who is on the photographs"),
        (whole, {"smallest": 7}, None, None, DataError, "nobody has 7 photographs: lower --smallest"),
        (whole, {"validation": 0.1}, None, None, DataError, r"validation = 0.1 of 5 persons is 0: pairs of strangers"),
        (few, {"validation": 0.0}, None, None, DataError, "1 person: to tell people apart takes two or more"),
        (whole, {"validation": 0.8}, None, None, DataError, "1 person: to tell"),
        (two, {"validation": 0.9}, None, None, DataError, "0 person: to tell"),
        (whole, {"learn_attributes": "age"}, None, None, DataError, "there is no attribute 'age': there are even"),
        (
            whole,
            {"goal": "identify", "smallest": 1},
            None,
            None,
            DataError,
            r"a person has 1 photograph, and --goal identify .* --smallest 2, or set --validation 0",
        ),
        (whole, {"use": "variation"}, drawing(classes=2), None, ConfigError, "is conditional: .*--label-column"),
        (whole, {"use": "variation"}, drawing(), labels, ConfigError, "got labels for a generator of num_classes=0"),
        (
            whole,
            {"use": "variation"},
            drawing(classes=2),
            labels + 1,
            ConfigError,
            "label 2 is not one of .* 2: name --l",
        ),
        (
            whole,
            {"use": "balance"},
            drawing(classes=2),
            labels + 1,
            ConfigError,
            "label 2 is not one of .* 2: name --l",
        ),
    ]
    for given, changes, generator, own, kind, told in cases:
        with pytest.raises(kind, match=told):
            prepare(given, config_of(**changes), generator, own)
