"""Who decides the masks of dropout, and what that is worth to the clipped sum."""

import pytest
import torch

from common.models.discriminators import Discriminator, build_discriminator
from common.models.losses import LOSSES
from common.models.stochastic import seeded_masks
from common.privacy.clipping import clipped_sum


def dropping() -> Discriminator:
    return build_discriminator("conv-dropout", image_size=28, channels=1, num_classes=0, width=4)


def some_images(count: int) -> torch.Tensor:
    return torch.rand((count, 1, 28, 28), generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_seed_decides_the_masks_and_nothing_else_is_touched() -> None:
    model, images = dropping(), some_images(3)
    before = torch.get_rng_state()
    found = []
    for seed in (4, 4, 5, 2**63 - 1):
        with seeded_masks(seed.to_bytes(8, "little")):
            found.append(model(images))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    assert not torch.allclose(found[2], found[3])


def test_random_numbers_are_restored_after_an_error() -> None:
    before = torch.get_rng_state()
    model = dropping()
    with pytest.raises(RuntimeError, match="expected input"), seeded_masks(b"1"):
        model.body(torch.nn.functional.dropout(torch.zeros(1, 7, 28, 28)))  # masks are drawn, then seven channels
    assert torch.equal(before, torch.get_rng_state())


def test_each_image_wears_a_mask_of_its_own_that_its_content_does_not_change() -> None:
    model = dropping()
    one = some_images(1).expand(8, -1, -1, -1)
    with seeded_masks(b"3"):
        logits = model(one)
    assert len(set(logits.tolist())) == 8
    kept = []
    for images in (some_images(8), torch.zeros(8, 1, 28, 28)):
        dropout = torch.nn.Dropout(0.3)
        with seeded_masks(b"3"):
            kept.append(dropout(torch.ones_like(images) + images.abs()) != 0)
    assert torch.equal(kept[0], kept[1])
    assert float(kept[0].float().mean()) == pytest.approx(0.7, abs=0.02)


def clipped(model: Discriminator, images: torch.Tensor, c: float, seed: int) -> torch.Tensor:
    units = torch.arange(len(images))
    with seeded_masks(seed.to_bytes(8, "little")):
        return clipped_sum(model, LOSSES["wasserstein"].real, images, None, units, len(images), c).double()


def test_one_unit_moves_the_sum_by_the_bound_where_the_others_keep_their_masks() -> None:
    # The last image goes: the others stay in their places of the same tile of 32, and so keep their masks.
    model, images, c = dropping(), some_images(20), 0.01
    for seed in range(5):
        moved = (clipped(model, images, c, seed) - clipped(model, images[:-1], c, seed)).norm()
        assert 0.99 * c < moved <= c


def test_with_a_seed_that_is_known_one_unit_moves_the_masks_of_others_too() -> None:
    # Why the seed must be secret: the first image goes, and every other takes its neighbour's mask.
    model, images, c = dropping(), some_images(20), 0.01
    moved = (clipped(model, images, c, 1) - clipped(model, images[1:], c, 1)).norm()
    assert moved > 1.5 * c


def test_over_secret_seeds_the_first_image_moves_the_mean_sum_as_the_last_does() -> None:
    # The masks are alike for all places, so over random seeds it does not matter whose place falls empty.
    model, c = dropping(), 0.01
    images = some_images(1).expand(6, -1, -1, -1)
    means = []
    for count, offset in ((6, 0), (5, 10_000)):
        sums = [clipped(model, images[:count], c, offset + seed) for seed in range(60)]
        means.append(torch.stack(sums).mean(0))
    assert float((means[0] - means[1]).norm()) <= 1.2 * c
