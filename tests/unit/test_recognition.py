"""A recogniser learns who is who, the same to the last bit from one seed, and after any interruption."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from common.errors import CheckpointError, ConfigError, DataError
from common.evaluation.verification import verification_figures
from common.faces import FaceDataset
from common.models.recogniser import RECOGNISERS, build_recogniser, embed
from common.recognition.lesson import Lesson, lesson_of, with_persons, with_variations
from common.recognition.recogniser import FILE_NAME, TrainedRecogniser
from common.recognition.settings import NETWORKS, RecognitionConfig
from common.recognition.state import read_tensors, write_tensors
from common.recognition.training import _Course, _loss, kept_scores, prototypes, train_recogniser

SMALL: dict[str, Any] = {
    "image_size": 28,
    "channels": 1,
    "network": "cnn",
    "width": 4,
    "embedding": 8,
    "dropout": 0.0,
    "augment": "",
    "epochs": 3,
    "batch": 8,
    "goal": "identify",
}
# Enough for what is easy.
LEARNING: dict[str, Any] = {"width": 8, "embedding": 32, "epochs": 8}


def small(**changes: Any) -> RecognitionConfig:
    return RecognitionConfig(**{**SMALL, **changes})


def patterns(persons: int, each: int, seed: int = 0, *, first: int = 0, noise: float = 40) -> FaceDataset:
    """Photographs of persons who are easy to tell apart: a coarse pattern each, and noise over it."""
    images = []
    for person in range(first, first + persons):
        coarse = np.random.default_rng([1, person]).integers(30, 226, (1, 4, 4)).repeat(7, 1).repeat(7, 2)
        grain = np.random.default_rng([2, person, seed]).normal(0, noise, (each, 1, 28, 28))
        images.append(np.clip(coarse + grain, 0, 255).astype(np.uint8))
    count = persons * each
    names = {
        "even": np.array(["no", "yes"])[np.arange(count) // each % 2],
        "some": np.where(np.arange(count) % 3 == 0, "", np.array(["a", "b"])[np.arange(count) % 2]),
        "one": np.full(count, "same"),
    }
    return FaceDataset(np.concatenate(images), np.repeat(np.arange(persons), each), attributes=names)


def everything(trained: TrainedRecogniser) -> dict[str, Any]:
    """All of it but the time it took."""
    found = {field.name: getattr(trained, field.name) for field in dataclasses.fields(trained)}
    network: dict[str, Any] = found.pop("network").state_dict()
    del found["seconds"]
    return found | network


def assert_same(one: TrainedRecogniser, other: TrainedRecogniser) -> None:
    left, right = everything(one), everything(other)
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key], key


def test_the_networks_are_those_of_the_registry() -> None:
    assert tuple(RECOGNISERS) == NETWORKS


@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("architecture", sorted(RECOGNISERS))
def test_every_network_embeds_faces_of_every_size(architecture: str, size: int) -> None:
    network = build_recogniser(architecture, size, 3, width=4, embedding=6, dropout=0.5, attributes={"a.b": 2, "": 3})
    images = torch.randint(0, 256, (5, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    found = embed(network, images, batch=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert not network.training
    assert (found.shape, found.dtype) == ((5, 6), torch.float32)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(embed(network, images.flip(3)), found)
    torch.testing.assert_close(embed(network, images[3:]), found[3:])
    assert (found - found[0]).abs().amax(1)[1:].min() > 1e-4, "faces differ"
    assert [logits.shape for logits in network.attribute_logits(found)] == [(5, 2), (5, 3)]
    again = build_recogniser(architecture, size, 3, width=4, embedding=6, dropout=0.5, attributes={"a.b": 2, "": 3})
    assert torch.equal(embed(again, images), embed(network, images)), "weights come from a fixed seed"


def test_a_network_that_is_none() -> None:
    with pytest.raises(ConfigError, match="network = 'vgg': choose one of cnn, resnet"):
        build_recogniser("vgg", 32, 3, width=4, embedding=8)
    with pytest.raises(ConfigError, match="image-size = 8: a recogniser needs 16 pixels or more"):
        build_recogniser("cnn", 8, 3, width=4, embedding=8)


def test_a_configuration_is_what_it_was() -> None:
    config = small(learn_attributes="gender, race", loss="arcface", margin=0.4, use="variation", patience=3)
    flat = config.to_flat()
    assert (flat["image-size"], flat["learn-attributes"]) == (28, "gender, race")
    assert RecognitionConfig.from_flat(flat) == config
    assert config.attribute_names == ["gender", "race"]
    assert RecognitionConfig.from_flat({}) == RecognitionConfig()
    assert RecognitionConfig.from_flat({"margin": 1, "lr": 1}).margin == 1.0, "an int may stand for a float"
    with pytest.raises(ConfigError, match=r"unknown options of a recogniser: epoch, image_size; known are image-size"):
        RecognitionConfig.from_flat({"image_size": 28, "epoch": 3})
    nothing: list[Any] = [None, [], "epochs"]
    for wrong_kind in nothing:
        with pytest.raises(ConfigError, match="no options of a recogniser"):
            RecognitionConfig.from_flat(wrong_kind)
    wrong: list[tuple[str, Any]] = [("epochs", 3.0), ("epochs", True), ("network", 3), ("lr", "fast"), ("crop", None)]
    for key, value in wrong:
        with pytest.raises(ConfigError, match=f"{key} = .* must be a"):
            RecognitionConfig.from_flat({key: value})


BOUNDS: dict[str, tuple[list[Any], list[Any]]] = {
    "image_size": ([28, 128], [0, 48]),
    "channels": ([1, 3], [2]),
    "crop": ([0.05, 1.0], [0.04, 1.01, float("nan")]),
    "detect": (["none", "largest"], ["all", ""]),
    "network": (["cnn", "resnet"], ["vgg"]),
    "width": ([4, 512], [3, 513]),
    "embedding": ([2, 4096], [1, 4097]),
    "dropout": ([0.0, 0.9], [-0.1, 0.91]),
    "loss": (["softmax", "cosface", "arcface"], ["triplet"]),
    "margin": ([0.0, 1.5], [-0.1, 1.6]),
    "scale": ([1e-3, 1000.0], [0.0, 1001.0, float("inf")]),
    "epochs": ([1, 10**6], [0, 10**6 + 1]),
    "patience": ([0, 10**6], [-1]),
    "batch": ([2, 10**6], [1, 0]),
    "lr": ([1e-9, 1000.0], [0.0, -1.0]),
    "weight_decay": ([0.0, 100.0], [-0.1, 101.0]),
    "augment": (["", "flip", "erase, blur"], ["mirror"]),
    "goal": (["verify", "identify"], ["both"]),
    "smallest": ([1, 10**6], [0]),
    "validation": ([0.0, 0.9], [-0.1, 0.95]),
    "attribute_weight": ([0.0, 100.0], [-1.0, 101.0]),
    "use": (["none", "pretrain", "identities", "variation"], ["all"]),
    "synthetic": ([1, 10**6], [0]),
    "variations": ([1, 10**6], [0]),
    "spread": ([0.0, 1.0], [-0.1, 1.1]),
    "pretrain_epochs": ([0, 10**6], [-1]),
    "seed": ([0, 2**31], [-1, 2**31 + 1]),
}


def test_every_bound_is_kept() -> None:
    assert BOUNDS.keys() | {"learn_attributes"} == {field.name for field in dataclasses.fields(RecognitionConfig)}
    for name, (good, bad) in BOUNDS.items():
        for value in good:
            assert getattr(RecognitionConfig(**{name: value}), name) == value
        for value in bad:
            with pytest.raises(ConfigError, match=name.replace("_", "-")):
                RecognitionConfig(**{name: value})


def test_a_lesson_of_photographs() -> None:
    faces = patterns(4, 3)
    lesson = lesson_of(faces, small(learn_attributes="even,some"))
    assert (lesson.num_persons, lesson.real, lesson.images.shape) == (4, 4, (12, 1, 28, 28))
    assert lesson.classes == {"even": ["no", "yes"], "some": ["a", "b"]}
    assert lesson.attributes["even"].tolist() == [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3
    assert lesson.attributes["some"].tolist() == [-1, 1, 0] * 1 + [-1, 0, 1] + [-1, 1, 0] + [-1, 0, 1]
    cases: list[tuple[FaceDataset, str, str]] = [
        (FaceDataset(faces.images), "", "not known who is on the photographs"),
        (faces.subset(np.arange(3)), "", "1 person: to tell people apart takes two or more"),
        (faces, "age", "there is no attribute 'age': there are even, some, one"),
        (FaceDataset(faces.images, faces.persons), "age", "there are none"),
        (faces, "one", r"attribute 'one' has the values \['same'\]: nothing to tell apart"),
    ]
    for wrong, attributes, told in cases:
        with pytest.raises(DataError, match=told):
            lesson_of(wrong, small(learn_attributes=attributes))


def test_synthetic_faces_beside_photographs() -> None:
    lesson = lesson_of(patterns(3, 2), small(learn_attributes="even"))
    images = np.full((4, 1, 28, 28), 7, np.uint8)
    more = with_persons(lesson, images, np.array([0, 0, 1, 1]))
    assert more.persons.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert (more.num_persons, more.real) == (5, 3)
    assert more.attributes["even"].tolist() == [0, 0, 1, 1, 0, 0, -1, -1, -1, -1]
    assert torch.equal(more.images[:6], lesson.images)
    assert bool((more.images[6:] == 7).all())
    varied = with_variations(lesson, images, np.array([5, 0, 3, 3]))
    assert varied.persons.tolist() == [0, 0, 1, 1, 2, 2, 2, 0, 1, 1]
    assert (varied.num_persons, varied.real) == (3, 3)
    assert varied.attributes["even"].tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["softmax", "cosface", "arcface"])
def test_each_loss_is_its_formula(kind: str) -> None:
    config = small(loss=kind, embedding=5, margin=0.35, scale=7.0)
    before = torch.get_rng_state()
    loss = _loss(config, 4, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    embeddings = torch.randn(9, 5, generator=torch.Generator().manual_seed(4)) * 3
    truth = torch.arange(9) % 4
    weights = next(loss.parameters()).detach().double().numpy()
    terms = []
    for row, person in zip(embeddings.double().numpy(), truth.tolist(), strict=True):
        cosines = [float(row @ w / np.linalg.norm(row) / np.linalg.norm(w)) for w in weights.T]
        right = {
            "softmax": cosines[person],
            "cosface": cosines[person] - 0.35,
            "arcface": np.cos(np.arccos(cosines[person]) + 0.35),
        }[kind]
        assert np.arccos(cosines[person]) + 0.35 < np.pi, "else arcface is not its formula"
        logits = 7.0 * np.array([right if place == person else cosine for place, cosine in enumerate(cosines)])
        terms.append(np.log(np.exp(logits).sum()) - logits[person])
    assert float(loss(embeddings, truth).detach()) == pytest.approx(np.mean(terms), rel=1e-4)
    found = prototypes(loss, 3)
    np.testing.assert_allclose(found.numpy(), (weights / np.linalg.norm(weights, axis=0)).T[:3], rtol=1e-5)
    assert not found.requires_grad


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss": "cosface", "network": "resnet"}, {"loss": "arcface", "learn_attributes": "even"}],
    ids=["softmax", "cosface", "arcface"],
)
def test_who_is_easy_to_tell_apart_is_told_apart(changes: dict[str, Any]) -> None:
    config = small(**LEARNING, **changes)
    taught, others = patterns(6, 16, noise=10), patterns(6, 8, seed=9, noise=10)
    told: list[tuple[str, int, int, float, float | None]] = []
    trained = train_recogniser(lesson_of(taught, config), others, config, observer=lambda *each: told.append(each))
    assert [each[:3] for each in told] == [("train", epoch, 8) for epoch in range(1, 9)]
    assert told[-1][3] < told[0][3] / 2
    assert trained.figure == told[-1][4]
    found = trained.scores(others.images).argmax(1).numpy()
    assert (found == others.persons).mean() == pytest.approx(trained.figure)
    assert trained.figure is not None
    assert trained.figure > 0.9
    assert trained.threshold is None
    if trained.classes:
        assert (trained.attributes(others.images)["even"] == others.attributes["even"]).mean() > 0.9
    else:
        assert trained.attributes(others.images) == {}
    with pytest.raises(
        ConfigError, match=r"trained to identify.*--goal verify and a --validation above 0, or give --thr"
    ):
        trained.needed_threshold()


def test_strangers_are_verified() -> None:
    config = small(**LEARNING, goal="verify")
    kept = patterns(6, 6, first=50, noise=10)
    trained = train_recogniser(lesson_of(patterns(12, 12, noise=10), config), kept, config)
    assert trained.threshold is not None
    assert trained.needed_threshold() == trained.threshold
    assert trained.figure is not None
    assert trained.figure > 0.9
    scores, same = kept_scores(trained.network, patterns(6, 6, first=80, noise=10))
    assert verification_figures(scores, same, trained.threshold).accuracy > 0.8


STAGES: dict[str, dict[str, Any]] = {
    "plain": {"validation": 0.0},
    "dropout and augmentation, attributes": {"dropout": 0.4, "augment": "flip,crop,erase", "learn_attributes": "some"},
    "pretraining, patience": {
        "goal": "verify",
        "use": "pretrain",
        "augment": "flip,crop",
        "dropout": 0.3,
        "pretrain_epochs": 2,
        "patience": 2,
        "loss": "arcface",
    },
}


def given(config: RecognitionConfig) -> dict[str, Any]:
    """What one of these trainings takes."""
    kept = patterns(4, 3, seed=5, first=0 if config.goal == "identify" else 40)
    return {
        "lesson": lesson_of(patterns(4, 6), config),
        "kept": kept if config.validation else None,
        "config": config,
        "unlabelled": torch.from_numpy(patterns(16, 1, first=200).images) if config.use == "pretrain" else None,
    }


@pytest.mark.parametrize("name", STAGES)
def test_interrupted_and_resumed_is_uninterrupted(name: str, tmp_path: Path) -> None:
    config = small(**STAGES[name])
    epochs: list[tuple[str, int]] = []
    before = torch.get_rng_state()
    whole = train_recogniser(**given(config), observer=lambda stage, epoch, *_: epochs.append((stage, epoch)))
    assert torch.equal(torch.get_rng_state(), before)
    stages = [("pretrain", 2)] if config.use == "pretrain" else []
    assert epochs == [(stage, n) for stage, count in [*stages, ("train", 3)] for n in range(1, count + 1)]
    assert_same(train_recogniser(**given(config)), whole)
    assert_different(train_recogniser(**given(dataclasses.replace(config, seed=1))), whole)

    checkpoint = tmp_path / "checkpoint.safetensors"
    seen: list[tuple[str, int]] = []

    def interrupt(stage: str, epoch: int, epochs: int, loss: float, figure: float | None) -> None:
        seen.append((stage, epoch))
        raise KeyboardInterrupt

    # After each epoch there is, and once more than there are epochs.
    for _ in epochs:
        torch.manual_seed(len(seen))  # what is drawn does not follow the global random numbers
        with pytest.raises(KeyboardInterrupt):
            train_recogniser(**given(config), checkpoint=checkpoint, observer=interrupt)
    assert seen == epochs
    assert_same(train_recogniser(**given(config), checkpoint=checkpoint, observer=interrupt), whole)
    assert read_tensors(checkpoint)[1]["train"] == 3


def test_an_epoch_that_was_not_ended_is_done_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config, steps = small(dropout=0.4, augment="flip,crop"), 0
    whole = train_recogniser(**given(config))
    step = _Course.step

    def stopping(course: _Course, loss: torch.Tensor, share: float) -> float:
        nonlocal steps
        steps += 1
        if steps == 5:  # the second of the second epoch
            raise KeyboardInterrupt
        return step(course, loss, share)

    monkeypatch.setattr(_Course, "step", stopping)
    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_recogniser(**given(config), checkpoint=checkpoint)
    assert read_tensors(checkpoint)[1]["train"] == 1
    assert_same(train_recogniser(**given(config), checkpoint=checkpoint), whole)
    assert steps == 5 + 6


def assert_different(one: TrainedRecogniser, other: TrainedRecogniser) -> None:
    assert not torch.equal(one.prototypes, other.prototypes)


def test_patience_ends_early_with_the_best_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures, weights = iter([0.5, 0.7, 0.6, 0.7, 0.9]), []

    def figure(course: _Course) -> float:
        weights.append({key: value.clone() for key, value in course.network.state_dict().items()})
        return next(figures)

    monkeypatch.setattr(_Course, "figure", figure)
    config, checkpoint = small(epochs=9, patience=2, validation=0.2), tmp_path / "checkpoint.safetensors"
    trained = train_recogniser(**given(config), checkpoint=checkpoint)
    # The fourth is as good as the second and no better.
    assert (trained.epochs, trained.figure, len(weights)) == (4, 0.7, 4)
    for key, value in trained.network.state_dict().items():
        assert torch.equal(value, weights[1][key]), key
    assert not torch.equal(weights[3]["embed.0.weight"], weights[1]["embed.0.weight"])
    # Gone on with, it has ended.
    assert_same(train_recogniser(**given(config), checkpoint=checkpoint), trained)
    assert len(weights) == 4


def test_a_checkpoint_that_cannot_be_gone_on_from(tmp_path: Path) -> None:
    config = small(epochs=1)
    path = tmp_path / "checkpoint.safetensors"
    train_recogniser(**given(config), checkpoint=path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"nonsense", b"", whole[:8] + b"x" + whole[9:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"checkpoint.safetensors cannot be read"):
            train_recogniser(**given(config), checkpoint=path)
        assert path.read_bytes() == damaged
    path.write_bytes(whole)
    others: list[dict[str, Any]] = [
        {"width": 8},
        {"embedding": 4},
        {"network": "resnet"},
        {"learn_attributes": "even"},
        {"channels": 3},
    ]
    for changes in others:
        with pytest.raises(CheckpointError, match=r"does not fit this training .* begin anew under another name"):
            train_recogniser(**{**given(config), "config": small(epochs=1, **changes), **_as(changes)}, checkpoint=path)
    with pytest.raises(CheckpointError, match="does not fit this training"):
        train_recogniser(lesson_of(patterns(5, 4), config), None, config, checkpoint=path)
    # Of the same networks, and yet another training.
    others_faces = dataclasses.replace(given(config)["lesson"], images=given(config)["lesson"].images.flip(3))
    with pytest.raises(CheckpointError, match=r"does not fit this training \(other faces\): begin anew"):
        train_recogniser(**{**given(config), "lesson": others_faces}, checkpoint=path)
    for changes in ({"seed": 1}, {"lr": 1e-3}, {"epochs": 2}):
        with pytest.raises(CheckpointError, match=r"does not fit this training \(other options\): begin anew"):
            train_recogniser(**{**given(config), "config": dataclasses.replace(config, **changes)}, checkpoint=path)
    assert path.read_bytes() == whole


def _as(changes: dict[str, Any]) -> dict[str, Any]:
    return {"lesson": lesson_of(patterns(4, 6), small(**changes))} if "learn_attributes" in changes else {}


def test_what_cannot_be_trained_on() -> None:
    few, config = patterns(3, 2), small(batch=8)
    with pytest.raises(DataError, match="6 photographs, and batch = 8: use a smaller batch"):
        train_recogniser(lesson_of(few, config), None, config)
    pretrain = small(use="pretrain", augment="flip")
    told = {"without augment: two views": ("", 16), "synthetic = 4 faces, and batch = 8": ("flip", 4)}
    for match, (augment, count) in told.items():
        changed = dataclasses.replace(pretrain, augment=augment)
        with pytest.raises(ConfigError, match=match):
            train_recogniser(**{**given(changed), "unlabelled": torch.zeros(count, 1, 28, 28, dtype=torch.uint8)})


@pytest.mark.parametrize("loss", ["softmax", "cosface", "arcface"])
@pytest.mark.parametrize("grey", [0, 128, 255])
def test_photographs_of_nothing_do_no_harm(loss: str, grey: int) -> None:
    config = small(loss=loss, goal="verify", augment="flip,colour")
    blank = np.full((12, 1, 28, 28), grey, np.uint8)
    faces = FaceDataset(blank, np.arange(12) // 3)
    trained = train_recogniser(lesson_of(faces, config), faces, config)
    assert trained.figure == 0.5
    assert trained.threshold is not None
    assert np.isfinite(trained.threshold)
    assert bool(trained.embed(patterns(2, 2).images).isfinite().all())
    assert all(bool(value.isfinite().all()) for value in trained.network.state_dict().values())


def test_a_recogniser_is_read_as_it_was_saved(tmp_path: Path) -> None:
    config = small(goal="verify", learn_attributes="even", epochs=1, network="resnet")
    trained = train_recogniser(**given(config))
    trained = dataclasses.replace(trained, names=["Ann", "Ben", "[Cära]", "d/e"])
    trained.save(tmp_path)
    loaded = TrainedRecogniser.load(tmp_path)
    assert_same(loaded, trained)
    assert loaded.seconds == trained.seconds
    images = patterns(3, 2, seed=4).images
    assert torch.equal(loaded.embed(images), trained.embed(images))
    assert (loaded.attributes(images)["even"] == trained.attributes(images)["even"]).all()
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o077 == 0, "it remembers photographs"

    with pytest.raises(CheckpointError, match=r"recogniser.safetensors cannot be read .* folder of a recogniser\?"):
        TrainedRecogniser.load(tmp_path / "nowhere")
    path = tmp_path / FILE_NAME
    tensors, told = read_tensors(path)
    for number, (some, rest) in enumerate(
        [
            ({k: v for k, v in tensors.items() if k != "prototypes"}, told),
            ({k: v for k, v in tensors.items() if k != "network.embed.0.weight"}, told),
            (tensors, {k: v for k, v in told.items() if k != "names"}),
            (tensors, {**told, "config": {**told["config"], "width": 8}}),
            (tensors, {**told, "config": {**told["config"], "widht": 8}}),
            (tensors, {**told, "config": None}),
            (tensors, {**told, "classes": {}}),
        ]
    ):
        write_tensors(path, some, rest)
        with pytest.raises(CheckpointError, match=r"recogniser.safetensors is damaged .*train it anew"):
            pytest.fail(f"{number}: {TrainedRecogniser.load(tmp_path)}")
    for damaged in (path.read_bytes()[:-9], b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="cannot be read"):
            TrainedRecogniser.load(tmp_path)


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    trained = train_recogniser(**given(small(epochs=1)))
    with pytest.raises(CheckpointError, match=r"cannot write .*recogniser.safetensors"):
        trained.save(tmp_path / "nowhere")


def test_numbers_of_a_lesson_fit_a_loss() -> None:
    """A synthetic person has a prototype in training, and none in what comes of it."""
    config = small(epochs=1)
    lesson: Lesson = with_persons(lesson_of(patterns(3, 4), config), patterns(2, 4, first=9).images, np.arange(8) // 4)
    trained = train_recogniser(lesson, None, config)
    assert trained.prototypes.shape == (3, 8)
    torch.testing.assert_close(trained.prototypes, functional.normalize(trained.prototypes))
    assert trained.figure is None
