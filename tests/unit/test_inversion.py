"""Inversion's arithmetic against naive oracles: pairing, the imprint without a wire, the linear estimate."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from common.errors import ConfigError
from common.evaluation.inversion import (
    FacePrior,
    brightness_thresholds,
    count_back,
    crafted_start,
    imprint_scale,
    imprint_weights,
    invert_gradients,
    psnr_table,
    read_imprint,
    with_one,
    without_one,
)
from common.models.discriminators import Discriminator, MLPDiscriminator, build_discriminator
from common.models.losses import LOSSES

SHAPE = (1, 28, 28)


def noise_images(count: int, seed: int = 0) -> Tensor:
    """Images in [-1, 1] whose mean brightness differs, (count, *SHAPE)."""
    random = torch.Generator().manual_seed(seed)
    return (0.5 * torch.randn(count, *SHAPE, generator=random)).add(
        torch.linspace(-0.5, 0.5, count)[:, None, None, None]
    )


def dense(width: int) -> MLPDiscriminator:
    network = build_discriminator("mlp", image_size=28, channels=1, num_classes=0, width=width)
    assert isinstance(network, MLPDiscriminator)
    return network


def gradient(network: Discriminator, image: Tensor) -> Tensor:
    """The gradient of one image's loss, (d,)."""
    loss = LOSSES["bce"].real(network(image[None])).sum()
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(network.parameters()))])


def between(images: Tensor) -> np.ndarray:
    """Thresholds with one of the images above each, in order of brightness."""
    brightness = np.sort(images.double().mean((1, 2, 3)).numpy())
    return np.concatenate([[-2.0], (brightness[1:] + brightness[:-1]) / 2])


def test_the_table_is_that_of_a_plain_loop() -> None:
    originals, found = noise_images(5).clamp(-1, 1), noise_images(7, seed=1).clamp(-1, 1)
    found[3] = originals[2]
    table = psnr_table(originals, found)
    for i, a in enumerate(originals):
        for j, b in enumerate(found):
            if (i, j) != (2, 3):
                error = np.mean((a.double().numpy() - b.double().numpy()) ** 2)
                assert table[i, j] == pytest.approx(10 * np.log10(2.0**2 / error), abs=1e-6)
    assert 90 < table[2, 3] <= 97


def test_pairs_are_one_to_one_and_as_many_as_can_be() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        table = rng.uniform(20, 34, (rng.integers(1, 9), rng.integers(1, 9)))
        near = table >= 30
        rows, columns = linear_sum_assignment(near, maximize=True)
        assert count_back(torch.from_numpy(table), 30.0) == near[rows, columns].sum()


def test_one_find_is_paired_with_one_original_only() -> None:
    assert count_back(torch.full((5, 1), 50.0)) == 1


def test_a_chain_of_pairs_is_found_where_the_first_choice_blocks() -> None:
    table = torch.tensor([[40.0, 40.0, 0.0], [40.0, 0.0, 0.0], [0.0, 40.0, 40.0]])
    assert count_back(table) == 3


def test_every_image_that_is_alone_between_two_thresholds_comes_back_whatever_its_clipping() -> None:
    images = noise_images(16).clamp(-1, 1)
    network, thresholds = dense(width=1), between(images)
    imprint_weights(network, thresholds)
    factors = torch.linspace(0.001, 1.0, 16)  # as clipping each person does, and more unlike
    update = sum(factor * gradient(network, image) for factor, image in zip(factors, images, strict=True))
    found = without_one(read_imprint(network, update.numpy(), 16), SHAPE)
    assert psnr_table(images, found).diagonal().min() > 60


def test_images_that_share_a_bin_come_back_as_their_mean_weighted_by_clipping() -> None:
    images = noise_images(3).clamp(-1, 1)
    network = dense(width=1)
    imprint_weights(network, np.array([-2.0, 0.25]))
    update = gradient(network, images[0]) + 3 * gradient(network, images[1]) + gradient(network, images[2])
    seen = read_imprint(network, update.numpy(), 2)
    found = seen[:, :-1] / seen[:, -1:]
    assert torch.allclose(found[0], ((images[0] + 3 * images[1]) / 4).flatten().double(), atol=1e-3)
    assert torch.allclose(found[1], images[2].flatten().double(), atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_the_length_of_an_image_alone_is_that_of_its_clipped_gradient(rows: int) -> None:
    images = noise_images(rows).clamp(-1, 1)
    network = dense(width=1)
    imprint_weights(network, between(images))
    length, _ = imprint_scale(rows)
    for place, image in enumerate(images):
        clipped = gradient(network, image)
        seen = read_imprint(network, (clipped / clipped.norm()).numpy(), rows)
        assert seen[place].norm() == pytest.approx(float(length[place]), rel=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_the_noise_of_an_entry_is_what_reading_makes_of_noise(rows: int) -> None:
    network = dense(width=1)
    size = sum(p.numel() for p in network.parameters())
    update = torch.randn(size, generator=torch.Generator().manual_seed(0))
    _, noise = imprint_scale(rows)
    measured = read_imprint(network, update.numpy(), rows).std(1)
    assert torch.allclose(measured, noise, rtol=0.12)


def test_thresholds_share_out_public_images_evenly() -> None:
    public = noise_images(1000)
    brightness = public.double().mean((1, 2, 3)).numpy()
    thresholds = brightness_thresholds(public, 10)
    counts = np.histogram(brightness, np.append(thresholds, 2.0))[0]
    assert len(thresholds) == 10
    assert counts.tolist() == [100] * 10


def test_more_thresholds_than_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="17 thresholds for a first layer of 16"):
        imprint_weights(dense(width=1), np.linspace(-1, 1, 17))


def test_the_estimate_is_the_dense_formula_of_the_best_linear_one() -> None:
    public = noise_images(40)[..., :2, :2].contiguous()
    rows = with_one(public)
    rows /= rows.norm(dim=1, keepdim=True)
    half, rest = rows[::2], rows[1::2]
    mean = half.mean(0)
    covariance = (half - mean).T @ (half - mean) / 20
    seen = rest + 0.1 * torch.randn(rest.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = mean + (seen - mean) @ torch.linalg.solve(covariance + 0.01 * torch.eye(5), covariance)
    found = FacePrior(public).estimate(seen, torch.full((20,), 0.1))
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_little_noise_leaves_what_was_seen_and_much_leaves_the_average() -> None:
    prior = FacePrior(noise_images(60, seed=1))
    rows = torch.nn.functional.normalize(with_one(noise_images(4)), dim=1)
    assert torch.allclose(prior.estimate(rows, torch.full((4,), 1e-6)).double(), rows, atol=1e-5)
    drowned = prior.estimate(rows, torch.full((4,), 1e6))
    assert torch.allclose(drowned, drowned[:1].expand_as(drowned), atol=1e-5)


def test_the_one_divides_out_and_nothing_seen_is_a_grey_image() -> None:
    images = noise_images(3).clamp(-1, 1)
    scales = torch.tensor([[1e-4], [-3.0], [50.0]])
    assert torch.allclose(without_one(scales * with_one(images), SHAPE), images, atol=1e-6)
    assert torch.equal(without_one(torch.zeros(1, 785), SHAPE), torch.zeros(1, *SHAPE))


def test_gradient_inversion_finds_an_image_from_the_direction_of_its_gradient() -> None:
    faces = torch.zeros(2, *SHAPE)
    faces[0, :, 6:22, 8:20], faces[1, :, 4:12, 4:24] = 0.8, -0.6
    network = build_discriminator("dcgan", image_size=28, channels=1, num_classes=0, width=16)
    crafted_start(network, seed=0)
    gradients = torch.stack([gradient(network, face) for face in faces])
    found = invert_gradients(network, 0.01 * gradients, SHAPE, seed=1)
    assert psnr_table(faces, found).diagonal().min() > 30
    strangers = torch.randn(gradients.shape, generator=torch.Generator().manual_seed(2))
    assert count_back(psnr_table(faces, invert_gradients(network, strangers, SHAPE, seed=1, steps=30))) == 0


def test_a_crafted_start_is_its_seeds_and_has_biases() -> None:
    network = build_discriminator("dcgan", image_size=28, channels=1, num_classes=0, width=4)
    first, other = crafted_start(network, seed=0), crafted_start(network, seed=1)
    assert not np.array_equal(first, other)
    assert np.array_equal(crafted_start(network, seed=0), first)
    biases = [p for name, p in network.named_parameters() if name.startswith("body") and name.endswith("bias")]
    assert all(float(bias.detach().abs().min()) > 0 for bias in biases)
