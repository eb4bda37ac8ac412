"""Every figure is what its formula says, and says which pictures are worse."""

import dataclasses
import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from common.errors import DataError
from common.evaluation import fidelity
from common.evaluation.fidelity import Fidelity, FrechetDistance, measure_fidelity
from common.evaluation.networks import NETWORKS, ConvolutionFeatures, drawn_network, feature_network, random_network
from common.faces import FaceOptions, procedural_faces

MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist"


@pytest.fixture(scope="module")
def faces() -> tuple[torch.Tensor, torch.Tensor]:
    drawn = procedural_faces(range(300), 2, FaceOptions(32, 3, 0.8), 0)
    order = np.random.default_rng(0).permutation(600)
    return drawn.tensor(order[:300]), drawn.tensor(order[300:])


def as_bytes(images: torch.Tensor) -> torch.Tensor:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def features_of(network: ConvolutionFeatures, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(network(images).double())


def frechet(real: np.ndarray, fake: np.ndarray) -> float:
    mean = real.mean(0) - fake.mean(0)
    of_real, of_fake = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    return float(mean @ mean + np.trace(of_real + of_fake - 2 * sqrtm(of_real @ of_fake).real))


def test_the_distance_is_the_formula(faces: tuple[torch.Tensor, torch.Tensor]) -> None:
    expected = frechet(*(features_of(random_network(), images) for images in faces))
    distance = FrechetDistance(faces[0].split(64))
    assert distance(faces[1].split(100)) == pytest.approx(expected, rel=1e-3)
    assert distance.network == "visard-random-1"


def test_all_figures_are_their_formulas(
    faces: tuple[torch.Tensor, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    reference, generated = as_bytes(faces[0])[:200], as_bytes(faces[1] * 0.9 + 0.05)[:150]
    before = torch.random.get_rng_state()
    found = measure_fidelity(generated, reference)
    assert capsys.readouterr() == ("", "")
    assert torch.equal(before, torch.random.get_rng_state())

    real, fake = (features_of(drawn_network(), x.float() / 127.5 - 1) for x in (reference, generated))
    assert (found.network, found.generated, found.reference) == ("visard-drawn-1", 150, 200)
    assert found.frechet == pytest.approx(frechet(real, fake), rel=1e-3)
    # Subsets have all 150 generated images, and 150 of the reference.
    whole = kernel_distance(real, fake)
    assert found.kernel == pytest.approx(whole, abs=0.2 * abs(whole))
    same = measure_fidelity(generated, reference[:150])
    assert same.kernel == pytest.approx(kernel_distance(real[:150], fake), rel=1e-6)

    between, within_real, within_fake = cdist(real, fake), cdist(real, real), cdist(fake, fake)
    # The distance to the fifth of the others.
    radius_real, radius_fake = np.sort(within_real)[:, 5], np.sort(within_fake)[:, 5]
    near_real, near_fake = between < radius_real[:, None], between < radius_fake[None, :]
    assert found.precision == pytest.approx(near_real.any(0).mean(), abs=0.011)
    assert found.recall == pytest.approx(near_fake.any(1).mean(), abs=0.011)
    assert found.density == pytest.approx(near_real.sum(0).mean() / 5, rel=0.01)
    assert found.coverage == pytest.approx((between.min(1) < radius_real).mean(), abs=0.011)


def kernel_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """The unbiased estimate with (x.y / d + 1)^3, over pairs of two different images."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)

    def others(a: np.ndarray) -> float:
        return float((kernel(a, a).sum() - np.trace(kernel(a, a))) / (len(a) * (len(a) - 1)))

    return others(real) + others(fake) - 2 * float(kernel(real, fake).mean())


def test_the_seed_decides_which_images_stand_for_many(
    faces: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "MAX_NEIGHBOURS", 100)
    monkeypatch.setattr(fidelity, "_KERNEL_SUBSET_SIZE", 50)
    reference, generated = (as_bytes(images) for images in faces)
    first, again, other = (measure_fidelity(generated, reference, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.frechet == other.frechet
    assert first.kernel != other.kernel
    assert first.coverage != other.coverage
    assert abs(first.kernel) < 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_worse_faces_are_farther(faces: tuple[torch.Tensor, torch.Tensor], name: str) -> None:
    whole, good = FrechetDistance([faces[0]], feature_network(name)), faces[1]

    def distance(images: torch.Tensor) -> float:
        return whole([images])

    noise = torch.randn(good.shape, generator=torch.Generator().manual_seed(0))
    fair = distance(good)
    assert distance(faces[0]) < 0.1 * fair
    speckled = [distance((good + sigma * noise).clamp(-1, 1)) for sigma in (0.1, 0.3, 1.0)]
    assert [fair, *speckled] == sorted([fair, *speckled])
    blurred = [distance(torch.nn.functional.avg_pool2d(good, k, 1, k // 2)) for k in (3, 7, 15)]
    assert [fair, *blurred] == sorted([fair, *blurred])
    assert distance(good[:5].repeat(60, 1, 1, 1)) > 2 * fair  # few modes
    assert distance(good) == fair  # nothing stays from call to call


def worse_sets(images: torch.Tensor, classes: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Sets as large as `images`, worse and worse: noise, blur, fewer pictures, fewer classes."""
    random, count = torch.Generator().manual_seed(0), len(images)
    noise = torch.randn(images.shape, generator=random)
    blurs = (torch.nn.functional.avg_pool2d(images, k, 1, k // 2, count_include_pad=False) for k in (3, 5, 9))
    few = (images[torch.arange(count) % kept] for kept in (count // 5, count // 20, 10))
    present = classes.unique()
    fewer = []
    for share in (0.5, 0.2):
        left = images[torch.isin(classes, present[: round(share * len(present))])]
        fewer.append(left[torch.arange(count) % len(left)])
    return {
        "noise": [images + sigma * noise for sigma in (0.1, 0.2, 0.4)],
        "blur": list(blurs),
        "modes": list(few),
        "classes": fewer,
    }


def check_orders(reference: torch.Tensor, images: torch.Tensor, classes: torch.Tensor) -> None:
    network = drawn_network()
    fair = measure_fidelity(as_bytes(images), as_bytes(reference), network)
    assert min(fair.precision, fair.recall, fair.coverage) > 0.5
    assert 0.7 < fair.density < 1.3
    for name, sets in worse_sets(images, classes).items():
        found = [fair, *(measure_fidelity(as_bytes(worse), as_bytes(reference), network) for worse in sets)]
        for figure in ("frechet", "kernel"):
            values = [getattr(each, figure) for each in found]
            assert values == sorted(values), (name, figure, values)
        assert found[-1].frechet > 3 * fair.frechet, name
        assert found[-1].coverage < 0.8 * fair.coverage, name
        # What is left of few pictures or classes is as good as ever, but not all is there.
        assert (found[-1].precision > 0.8 * fair.precision) == (name in ("modes", "classes")), name


def test_worse_drawn_faces_are_told_in_every_way() -> None:
    drawn = procedural_faces(range(1000, 1100), 12, FaceOptions(32, 3, 0.8), 3)
    order = np.random.default_rng(0).permutation(1200)
    persons = drawn.persons
    assert persons is not None
    # Persons whose skin, hair and so on are alike are the classes here: the 10 darkest of 100, and so on.
    brightness = torch.tensor([float(drawn.images[persons == p].mean()) for p in range(100)])
    classes = (brightness.argsort().argsort() // 10)[torch.from_numpy(persons[order[600:]])]
    check_orders(drawn.tensor(order[:600]), drawn.tensor(order[600:]), classes)


@pytest.mark.skipif(not MNIST.is_dir(), reason=f"no MNIST in {MNIST}")
def test_worse_digits_are_told_in_every_way() -> None:
    pixels, labels = (
        np.frombuffer(gzip.decompress((MNIST / f"t10k-{name}.gz").read_bytes())[start:], np.uint8).copy()
        for name, start in (("images-idx3-ubyte", 16), ("labels-idx1-ubyte", 8))
    )
    images = torch.from_numpy(pixels).reshape(-1, 1, 28, 28)[:1200].float() / 127.5 - 1
    check_orders(images[:600], images[600:], torch.from_numpy(labels[600:1200]))


def test_figures_of_two_networks_do_not_compare() -> None:
    one = Fidelity("visard-drawn-1", 100, 100, 3.0, 0.5, 0.9, 0.8, 1.0, 0.7)
    better = dataclasses.replace(one, frechet=1.0, coverage=0.8)
    assert better.minus(one) == pytest.approx(
        {"frechet": -2.0, "kernel": 0.0, "precision": 0.0, "recall": 0.0, "density": 0.0, "coverage": 0.1}
    )
    with pytest.raises(
        DataError, match=r"visard-random-1 .* visard-drawn-1 do not compare: measure both with one network"
    ):
        dataclasses.replace(one, network="visard-random-1").minus(one)
    with pytest.raises(DataError, match=r"generated 50 .* generated 100"):
        dataclasses.replace(one, generated=50).minus(one)


def test_what_prdc_is_needed_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prdc", None)
    images = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"precision and recall need prdc .* pip install 'visard\[evaluation\]'"):
        measure_fidelity(images, images)


def test_what_cannot_be_measured_is_refused() -> None:
    images = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"generated images are torch\.float32"):
        measure_fidelity(images.float(), images)
    with pytest.raises(DataError, match="reference images are"):
        measure_fidelity(images, images[0])
    with pytest.raises(DataError, match="6 generated images: 5 nearest neighbours take 7 or more"):
        measure_fidelity(images[:6], images)
    one = torch.zeros(1, 3, 32, 32)
    with pytest.raises(DataError, match="2 or more"):
        FrechetDistance([one])
    with pytest.raises(DataError, match="2 or more"):
        FrechetDistance([torch.zeros(2, 3, 32, 32)])([one])
