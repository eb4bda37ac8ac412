"""Public faces before the first round: what they teach, that it is naive arithmetic, costs nothing, and stays at the coordinator."""

import dataclasses
import io
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import server.prior
from common.config import RunConfig
from common.errors import ConfigError, DataError
from common.faces import FaceDataset
from common.faces.places import name_of
from common.gradients import fake_mean
from common.models.features import RandomFeatures
from common.models.flat import get_flat
from common.models.losses import LOSSES
from server.app import open_run
from server.checkpoint import CheckpointStore, CoordinatorState
from server.generator import GeneratorTrainer, draw_latents, moment_rate
from server.moments import MomentLoss
from server.prior import Prior, mean_features, public_faces
from server.progress import PlainProgress, ProgressBar
from server.records import RunRecorder, card_of, epsilon_so_far
from server.status import StatusFile, read_status
from server.worker import open_or_resume
from tests.integration.test_resume import assert_same
from tests.support import RUN_ID, TINY, keyed_client_app, random_faces, tiny_config, train

ROOT = Path(__file__).parents[2]
ALONE = {"moment_rounds": 0, "num_rounds": 0}


def saved(folder: Path, faces: FaceDataset) -> str:
    path = folder / "public-faces.npz"
    faces.save(path)
    return str(path)


def shares(num_classes: int = 0) -> list[FaceDataset]:
    return [random_faces(4, 2, seed=client, num_classes=num_classes) for client in range(2)]


def made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def patches(count: int, num_classes: int = 0) -> FaceDataset:
    """Bright squares on dark ground, in another corner for each class."""
    faces = random_faces(count, 1, seed=7, num_classes=num_classes)
    images = faces.images // 8
    for i, image in enumerate(images):
        corner = 0 if faces.labels is None else 14 * int(faces.labels[i])
        image[:, corner : corner + 14, corner : corner + 14] = 240
    return dataclasses.replace(faces, images=images)


class StopAt:
    """An observer that presses Ctrl-C after a step on the public faces, or a round."""

    def __init__(self, primed: int | None = None, server_round: int | None = None) -> None:
        self._primed, self._round = primed, server_round

    def fit_stepped(self, state: CoordinatorState) -> None:
        if state.fit[:2] == ("prior", self._primed):
            raise KeyboardInterrupt

    def round_ended(self, state: CoordinatorState) -> None:
        if state.next_round - 1 == self._round:
            raise KeyboardInterrupt


@pytest.fixture
def whole_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without bfloat16, so that naive loops round alike."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)


def features_of(config: RunConfig) -> RandomFeatures:
    return RandomFeatures(config.model.image_size, config.model.channels, config.moments.feature_seed)


def test_the_means_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.prior, "_BATCH", 7)
    features = features_of(tiny_config())
    faces = random_faces(5, 5, num_classes=3)
    assert faces.labels is not None
    each = [features(faces.tensor(np.array([i])))[0].double() for i in range(25)]
    found = mean_features(features, faces, 3)
    for label in range(3):
        own = [each[i] for i in range(25) if faces.labels[i] == label]
        torch.testing.assert_close(found[label], (sum(own, torch.zeros(features.dim)) / len(own)).float())
    everyone = (sum(each, torch.zeros(features.dim)) / 25).float()
    for row in mean_features(features, FaceDataset(faces.images), 3):
        torch.testing.assert_close(row, everyone)


@pytest.mark.usefixtures("whole_precision")
@pytest.mark.parametrize("privacy_model", ["central", "none"])
@pytest.mark.parametrize("loss", ["bce", "wasserstein"])
def test_a_prior_is_the_naive_descent(tmp_path: Path, privacy_model: str, loss: str) -> None:
    """Both networks after three steps are those of loops over single images, unclipped where the run has no privacy."""
    faces = random_faces(5, 2, seed=5)
    config = tiny_config(
        public=saved(tmp_path, faces),
        public_steps=3,
        privacy_model=privacy_model,
        loss=loss,
        max_grad_norm=0.5,
        discriminator_lr=0.01,
        adam_beta1=0.3,
        **ALONE,
    )
    state, twin = (CoordinatorState.fresh(config, RUN_ID) for _ in range(2))
    train(tmp_path, state, shares())

    target = torch.stack([features_of(config)(faces.tensor(np.array([i])))[0] for i in range(10)]).mean(0)
    moment_loss = MomentLoss(features_of(config), target[None])
    discriminator, generator, count = twin.discriminator, twin.generator, config.training.fake_batch
    of_discriminator = torch.optim.Adam(discriminator.parameters(), lr=0.01, betas=(0.3, 0.999))
    of_generator = torch.optim.Adam(generator.parameters(), betas=(0.5, 0.99))
    bound = 0.5 if privacy_model == "central" else float("inf")

    def clipped(logit_loss: Tensor) -> list[Tensor]:
        gradient = torch.autograd.grad(logit_loss, list(discriminator.parameters()))
        norm = torch.cat([g.flatten() for g in gradient]).norm().item()
        return [g * min(1.0, bound / norm) for g in gradient]

    for step in range(3):
        chosen = torch.randint(10, (count,), generator=twin.rng)
        latents, _ = draw_latents(config, count, twin.rng)
        with torch.no_grad():
            fakes = GeneratorTrainer(twin)._state.generator(latents).float()
        halves = [LOSSES[loss].real(discriminator(faces.tensor(np.array([i])))).sum() for i in chosen]
        halves += [LOSSES[loss].fake(discriminator(fake[None])).sum() for fake in fakes]
        parts = [clipped(half) for half in halves]
        for place, parameter in enumerate(discriminator.parameters()):
            parameter.grad = torch.stack([part[place] for part in parts]).sum(0) / count
        of_discriminator.step()
        if loss == "wasserstein":
            for parameter in discriminator.parameters():
                parameter.data.clamp_(-config.model.weight_clip, config.model.weight_clip)
        latents, _ = draw_latents(config, config.moments.moment_batch, twin.rng)
        for group in of_generator.param_groups:
            group["lr"] = moment_rate(step, 3, config.moments.moment_lr)
        of_generator.zero_grad()
        moment_loss(generator(latents), None).backward()
        of_generator.step()
    start = CoordinatorState.fresh(config, RUN_ID)
    for name in ("discriminator", "generator"):
        vectors = (torch.from_numpy(get_flat(getattr(each, name))) for each in (state, twin, start))
        found, naive, begun = vectors
        # Where a gradient is near zero Adam makes much of its rounding.
        assert (found - naive).norm() < 0.01 * (naive - begun).norm()
    assert not state.generator_optimizer.state_dict()["state"]
    assert not state.discriminator_optimizer.state_dict()["state"]


def test_a_prior_alone_asks_nobody_and_costs_nothing(tmp_path: Path) -> None:
    config = tiny_config(public="procedural:persons=6,images=2", public_steps=5, **ALONE)
    state = open_run(tmp_path / "run", config)
    recorder = RunRecorder(tmp_path / "run", state)
    train(tmp_path / "run", state, shares(), [recorder])
    recorder.finish(state)
    assert state.complete
    assert (state.primed, state.generator_steps, state.next_round, state.charged) == (5, 0, 1, {})
    assert not list((tmp_path / "run" / "clients").glob("*"))
    assert epsilon_so_far(state) == 0
    card = json.loads((tmp_path / "run" / "generator.json").read_text())
    assert (card["epsilon_spent"], card["rounds"]) == (0, 0)
    assert RunConfig.from_flat(card["config"]).training.public == "procedural:persons=6,images=2"


def test_the_run_that_follows_begins_there_and_is_charged_as_ever(tmp_path: Path) -> None:
    public = saved(tmp_path, patches(30))
    plain, with_prior = tiny_config(), tiny_config(public=public, public_steps=30, moment_lr=0.02)
    assert plain.privacy == with_prior.privacy
    before: list[CoordinatorState] = []

    class Keep:
        def fit_stepped(self, state: CoordinatorState) -> None:
            if state.fit == ("prior", 30, 30):
                before.append(CheckpointStore(tmp_path / "with").load())

        def round_ended(self, state: CoordinatorState) -> None:
            if state.last["stage"] == "moments":
                for one, other in zip(state.generator.parameters(), before[0].generator.parameters(), strict=True):
                    assert one.equal(other)

    state = train(made(tmp_path / "with"), CoordinatorState.fresh(with_prior, RUN_ID), shares(), [Keep()])
    other = train(made(tmp_path / "without"), CoordinatorState.fresh(plain, RUN_ID), shares())
    fresh = CoordinatorState.fresh(with_prior, RUN_ID)
    loss = Prior(fresh, GeneratorTrainer(fresh))._moment_loss
    latents, _ = draw_latents(with_prior, 200, torch.Generator().manual_seed(0))
    with torch.no_grad():
        learned, blank = (loss(each.generator(latents), None).item() for each in (before[0], fresh))
        averaged = loss(before[0].ema(latents), None).item()
        faces = public_faces(with_prior).tensor(np.arange(30))
        logits = [before[0].discriminator(each).mean().item() for each in (faces, fresh.generator(latents))]
    assert learned < 0.8 * blank
    assert averaged < 0.8 * blank
    assert logits[0] > logits[1]
    assert (state.generator_steps, state.next_round) == (other.generator_steps, other.next_round)
    assert state.charged == other.charged
    assert epsilon_so_far(state) == epsilon_so_far(other)
    assert state.moment_target is not None
    assert other.moment_target is not None
    # What the clients released of their faces does not depend on it.
    assert state.moment_target.equal(other.moment_target)
    assert not next(state.generator.parameters()).equal(next(other.generator.parameters()))


@pytest.mark.parametrize("num_classes", [0, 3])
def test_nothing_of_the_public_faces_travels_but_their_effect(tmp_path: Path, num_classes: int) -> None:
    faces = random_faces(8, 2, seed=11, num_classes=num_classes)
    public = saved(tmp_path, faces)
    options = {"num_classes": num_classes, "generator_batch": 6, "privacy_model": "local", "local_steps": 2}
    seen: dict[bool, list[dict[str, object]]] = {True: [], False: []}
    inner = keyed_client_app()

    def tapped(*, prior: bool) -> ClientApp:
        def app(message: Message, context: Context) -> Message:
            seen[prior].append(dict(message.content["instructions"]))  # type: ignore[arg-type]
            everything = repr(
                {
                    key: record.to_dict() if hasattr(record, "to_dict") else record
                    for key, record in message.content.items()
                }
            )
            assert "public" not in everything
            for image in faces.images:
                assert repr(image.tobytes())[2:-1] not in everything
            return inner(message, context)

        return app  # type: ignore[return-value]

    for prior in (True, False):
        chosen = {"public": public, "public_steps": 3} if prior else {}
        config = tiny_config(**options, **chosen)  # type: ignore[arg-type]
        state = CoordinatorState.fresh(config, RUN_ID)
        train(made(tmp_path / str(prior)), state, shares(num_classes), client_app=tapped(prior=prior))
    # Of all that is asked in clear not a word differs.
    assert seen[True] == seen[False] != []


CONFIGS = {
    "central": {"privacy_model": "central"},
    "views, dropout, wasserstein": {
        "privacy_model": "local",
        "discriminator": "conv-dropout",
        "loss": "wasserstein",
        "augment": "crop, colour",
        "augment_views": 2,
    },
    "classes": {"privacy_model": "none", "num_classes": 3, "generator_batch": 6},
    "cross-entropy": {"privacy_model": "central", "num_classes": 3, "generator_batch": 6, "loss": "cross-entropy"},
    "alone": {"privacy_model": "central", **ALONE},
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_interrupted_at_every_step_it_is_the_same_to_the_last_bit(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = int(CONFIGS[name].get("num_classes", 0))  # type: ignore[call-overload]
    public = saved(tmp_path, random_faces(6, 2, seed=3, num_classes=classes))
    config = tiny_config(public=public, public_steps=4, **{"num_rounds": 2, **CONFIGS[name]})  # type: ignore[arg-type]
    whole, folder = made(tmp_path / "whole"), made(tmp_path / "broken")
    unbroken = train(whole, CoordinatorState.fresh(config, RUN_ID), shares(classes))
    assert (unbroken.primed, unbroken.complete) == (4, True)
    # On the disk after every step, or after the first of each process and the last alone.
    monkeypatch.setattr(server.prior, "_CHECKPOINT_S", 1e9 if name == "central" else -1.0)
    state = CoordinatorState.fresh(config, RUN_ID)
    kept = {1: 1, 3: 2, 4: 4} if name == "central" else {1: 1, 2: 2, 3: 3, 4: 4}
    stops = [(StopAt(primed=step), on_disk) for step, on_disk in kept.items()]
    for stop, on_disk in stops if name == "alone" else [*stops, (StopAt(server_round=2), 4)]:
        with pytest.raises(KeyboardInterrupt):
            train(folder, state, shares(classes), [RunRecorder(folder, state), stop])
        state = CheckpointStore(folder).load()
        assert state.primed == on_disk
    # Learned from to the end, they are not looked at any more.
    Path(public).unlink()
    state = train(folder, state, shares(classes))
    assert state.primed == unbroken.primed
    assert_same(state, unbroken)


def test_faces_that_are_not_there_are_told_before_anything_is_begun(tmp_path: Path) -> None:
    config = tiny_config(public=str(tmp_path / "nowhere"), public_steps=2)
    with pytest.raises(DataError, match=r"--public: .*nowhere"):
        train(tmp_path, CoordinatorState.fresh(config, RUN_ID), shares())
    assert not CheckpointStore(tmp_path).path.exists()
    assert not (tmp_path / "clients").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"public": "faces"}, "public = 'faces' and public-steps = 0"),
        ({"public_steps": 3}, "public = '' and public-steps = 3"),
        ({"public": "faces", "public_steps": -1}, "public-steps = -1"),
        (ALONE, "nothing would be trained"),
        (
            {"public": "faces", "public_steps": 3, "num_classes": 4, "moment_rounds": 0, "generator_batch": 8},
            "moment-batch = 6 is too few",
        ),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        tiny_config(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["faces", "faces/one", ".", "hf:faces"])
def test_the_clients_faces_are_not_public(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faces" / "one").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "faces")
    monkeypatch.chdir(tmp_path)
    asked = {"data": "link", "public": name, "public_steps": 3}
    with pytest.raises(ConfigError, match=r"public = .* is among what the clients hold"):
        open_run(tmp_path / "run", tiny_config(**asked))  # type: ignore[arg-type]
    open_run(tmp_path / "run", tiny_config(**asked, privacy_model="none"))  # type: ignore[arg-type]


def test_a_real_coordinator_goes_on_with_a_path_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in coordinator.toml, whose paths are relative to it."""
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, random_faces(5, 2))
    flat = TINY | {
        "public": "public-faces.npz",
        "public-steps": 3,
        "moment-noise-multiplier": 3.0,
        "noise-multiplier": 9.0,
    }
    config = RunConfig.from_flat(flat)
    state = open_or_resume(tmp_path / "run", config)
    assert state.config.training.public == str(tmp_path / "public-faces.npz")
    (tmp_path / "run").mkdir()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", state, shares(), [StopAt(primed=1)])
    again = open_or_resume(tmp_path / "run", config)
    assert (again.primed, again.priming) == (1, True)
    shutil.copy(tmp_path / "public-faces.npz", tmp_path / "other.npz")
    with pytest.raises(ConfigError, match=r"was begun with public = "):
        open_or_resume(tmp_path / "run", RunConfig.from_flat(flat | {"public": "other.npz"}))


def test_a_real_coordinator_may_begin_with_what_simulated_clients_would_hold(tmp_path: Path) -> None:
    """Nobody holds it there: its clients' faces are elsewhere."""
    source = "procedural:persons=3,images=2"
    config = tiny_config(data=source, public=source, public_steps=3)
    with pytest.raises(ConfigError, match="is among what the clients hold"):
        open_run(tmp_path / "simulated", config)
    assert open_or_resume(tmp_path / "real", config).priming


def test_the_card_names_the_faces_and_not_where_they_are(tmp_path: Path) -> None:
    config = tiny_config(public=saved(tmp_path, random_faces(5, 2)), public_steps=3)
    card = card_of(CoordinatorState.fresh(config, RUN_ID))
    assert (card["config"]["public"], card["config"]["public-steps"]) == ("public-faces.npz", 3)
    assert str(tmp_path) not in json.dumps(card)
    assert card_of(CoordinatorState.fresh(tiny_config(), RUN_ID))["config"]["public"] == ""
    (tmp_path / "set").mkdir()
    for source, name in {
        "procedural:persons=3,images=2,first=9": "procedural:persons=3,images=2,first=9",
        f"hf:{tmp_path}/set,split=train": "hf:set,split=train",
        "hf:somebody/faces,split=train": "hf:somebody/faces,split=train",
        "sklearn:lfw,data_home=/home/me/data": "sklearn:lfw,data_home=data",
        "/home/me/some, where": "some, where",
        "~/faces": "faces",
        "": "",
    }.items():
        assert name_of(source) == name


def conditional(folder: Path, faces: FaceDataset, **options: object) -> RunConfig:
    given = {"num_classes": 2, "public": saved(folder, faces), "public_steps": 2, **options}
    return tiny_config(**given)  # type: ignore[arg-type]


def test_labels_count_where_all_classes_have_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "visard.server")
    faces = random_faces(6, 2, num_classes=2)
    assert faces.labels is not None
    found = public_faces(conditional(tmp_path, faces))
    assert found.labels is not None
    assert (found.labels == faces.labels).all()
    assert not caplog.records
    # An unconditional run has no use for them.
    assert public_faces(conditional(tmp_path, faces, num_classes=0)).labels is None
    attributes = {"glasses": np.array(["yes", "no"] * 6)}
    named = dataclasses.replace(faces, labels=None, attributes=attributes)
    asked = {"label_column": "glasses", "label_values": "no,yes"}
    found = public_faces(conditional(tmp_path, named, **asked))
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0] * 6
    assert not caplog.records


@pytest.mark.parametrize(
    ("labels", "asked"),
    [
        (None, {}),
        ([0] * 12, {}),
        ([0, 1, 2] * 4, {}),
        (None, {"label_column": "gender", "label_values": "male,female"}),
        (None, {"label_column": "glasses", "label_values": "yes,perhaps"}),
        (None, {"attributes": "utkface", "label_column": "gender", "label_values": "male,female"}),
    ],
)
def test_else_every_class_begins_with_the_mean_of_all(
    tmp_path: Path, labels: list[int] | None, asked: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    faces = dataclasses.replace(
        random_faces(6, 2),
        labels=None if labels is None else np.array(labels, dtype=np.int64),
        attributes={"glasses": np.array(["yes", "no"] * 6)},
    )
    config = conditional(tmp_path, faces, **asked)
    state = CoordinatorState.fresh(config, RUN_ID)
    with caplog.at_level(logging.WARNING, "visard.server"):
        prior = Prior(state, GeneratorTrainer(state))
    assert "have not the labels of all 2 classes" in caplog.text
    everyone = features_of(config)(faces.tensor(np.arange(12))).mean(0)
    for row in prior._moment_loss.target:
        torch.testing.assert_close(row, everyone)


def test_file_names_say_the_labels_as_in_the_clients_faces(tmp_path: Path) -> None:
    from PIL import Image

    folder = made(tmp_path / "public")
    for i in range(6):
        pixels = np.full((28, 28), 40 * i, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{20 + i}_{i % 2}_0_2017{i}.jpg")
    asked = {"attributes": "utkface", "label_column": "gender", "label_values": "female,male"}
    config = tiny_config(num_classes=2, public=str(folder), public_steps=2, **asked)  # type: ignore[arg-type]
    found = public_faces(config)
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0] * 3


def test_a_classifier_learns_labels_and_stays_as_it_was_without_them(tmp_path: Path) -> None:
    options = {"num_classes": 2, "loss": "cross-entropy", "public_steps": 60, "discriminator_lr": 0.01, **ALONE}
    faces = patches(40, num_classes=2)
    for labelled in (True, False):
        given = faces if labelled else FaceDataset(faces.images)
        config = tiny_config(public=saved(tmp_path, given), **options)  # type: ignore[arg-type]
        folder = made(tmp_path / str(labelled))
        state = train(folder, CoordinatorState.fresh(config, RUN_ID), shares(2))
        fresh = CoordinatorState.fresh(config, RUN_ID)
        same = [
            one.equal(other)
            for one, other in zip(state.discriminator.parameters(), fresh.discriminator.parameters(), strict=True)
        ]
        assert all(same) == (not labelled)
        with torch.no_grad():
            guessed = state.discriminator.classify(faces.tensor(np.arange(40))).argmax(1)  # type: ignore[operator]
        if labelled:
            assert (guessed.numpy() == faces.labels).mean() > 0.95


@pytest.mark.usefixtures("whole_precision")
def test_faces_of_all_classes_may_teach_a_discriminator_of_classes(tmp_path: Path) -> None:
    """Without labels the reals take those of the fakes, in turn."""
    faces = FaceDataset(random_faces(6, 2).images)
    config = conditional(tmp_path, faces, generator_batch=4, privacy_model="none")
    state, twin = (CoordinatorState.fresh(config, RUN_ID) for _ in range(2))
    gradient = Prior(state, GeneratorTrainer(state))._gradient()
    chosen = torch.randint(12, (4,), generator=twin.rng).numpy()
    fakes, labels = GeneratorTrainer(twin).fakes(4)
    assert labels is not None
    assert labels.tolist() == [0, 1, 0, 1]
    loss = LOSSES["bce"]
    half = loss.real(twin.discriminator(faces.tensor(chosen), labels)).mean()
    naive = torch.cat([g.flatten() for g in torch.autograd.grad(half, list(twin.discriminator.parameters()))])
    naive += fake_mean(twin.discriminator, loss, fakes, labels, config.privacy)
    torch.testing.assert_close(gradient, naive)


def test_it_can_be_seen(tmp_path: Path) -> None:
    config = tiny_config(public="procedural:persons=6,images=2", public_steps=20, num_rounds=1)
    state = CoordinatorState.fresh(config, RUN_ID)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    recorder = RunRecorder(tmp_path, state)
    stages = []

    class Look:
        def fit_stepped(self, state: CoordinatorState) -> None:
            status.fit_stepped(state)
            status.tell("training")
            found = read_status(tmp_path / "status.json")
            stages.append((found["stage"], found["generator_steps"]))

        def round_ended(self, _state: CoordinatorState) -> None:
            pass

    with ProgressBar(console, state) as bar, StatusFile(tmp_path / "status.json", supervisor=1) as status:
        train(tmp_path, state, shares(), [recorder, bar, PlainProgress(), Look()])
    recorder.finish(state)
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "prior" in drawn
    assert "20/20" in drawn
    assert "public faces: step 20 of 20  prior loss " in drawn
    board = EventAccumulator(str(tmp_path / "tensorboard" / "prior")).Reload()
    assert [event.step for event in board.Scalars("prior/prior_loss")] == [10, 20]
    assert (tmp_path / "samples" / "prior-000020.png").exists()
    assert stages[:19] == [("prior", step) for step in range(1, 20)]
    assert stages[-1] == ("gradients", 24)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    lines = [f"{key} = {json.dumps(value)}" for key, value in TINY.items() if key not in ("data", "num-clients")]
    lines += ["num-clients = 2", "num-classes = 2", 'label-column = "glasses"', 'label-values = "yes,no"']
    recipe.write_text("\n".join(lines))
    command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), str(recipe)]
    command += ["--data", "procedural:persons=24,images=2", "--arm", "prior", "recipe", "public"]
    command += ["--seed", "0", "1", "--held-out", "12", "--synthetic", "24"]
    command += ["--set", "num-rounds=1", "public=procedural:persons=8,images=2,first=100", "public-steps=3"]
    command += ["--results", str(tmp_path / "results.jsonl")]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (arm, seed) for seed in (0, 1) for arm in ("prior", "recipe", "public")
    ]
    assert [row["epsilon_rdp"] > 0 for row in rows] == [False, True, True] * 2
    assert rows[0]["accuracy"]
    added = [rows[at + 1]["fidelity"]["frechet"] - rows[at]["fidelity"]["frechet"] for at in (1, 4)]
    told = done.stdout.splitlines()[-1].split()
    assert "added by it" in done.stdout.splitlines()[-1]
    at = told.index("frechet")
    assert float(told[at + 1]) == pytest.approx(sum(added) / 2, rel=1e-3)
    assert told[at + 2] == "±"
    assert float(told[at + 3]) == pytest.approx(12.706 * abs(added[0] - added[1]) / 2, rel=0.06)
