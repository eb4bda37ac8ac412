"""Steps with views, dropout and bounded weights: clipped unit by unit, seeded in secret at clients, projected."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.discriminator import cached_discriminator, draw_units, gradient_update, noised_gradient, secret_seed
from common.augmentation import SEED_BYTES, Augmentation, step_randomness
from common.device import half_precision
from common.gradients import from_uint8
from common.models.flat import get_flat
from common.models.losses import LOSSES
from common.privacy.clipping import FLOAT_SLACK
from common.sections import AUGMENTATIONS
from server.checkpoint import CoordinatorState
from server.coordinator import discriminator_step, instructions_for
from server.generator import GeneratorTrainer
from tests.support import RUN_ID, gradient_instructions, keyed, random_faces, tiny_config

EVERYTHING = ", ".join(AUGMENTATIONS)


def unit_gradients(discriminator: nn.Module, images: Tensor, units: Tensor, count: int) -> list[Tensor]:
    """One backward pass for each unit, over the mean of its images."""
    found = []
    for unit in range(count):
        loss = LOSSES["bce"].real(discriminator(images[units == unit])).mean()
        parts = torch.autograd.grad(loss, list(discriminator.parameters()))
        found.append(torch.cat([part.flatten() for part in parts]).double())
    return found


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("bound", [0.05, 1e3])
def test_a_private_step_clips_each_unit_s_mean_over_its_views(views: int, bound: float) -> None:
    config = tiny_config(
        discriminator="dcgan", augment=EVERYTHING, augment_views=views, max_grad_norm=bound, images_per_person=3
    )
    discriminator, faces = cached_discriminator(config.model), random_faces(8, 4)
    instructions = gradient_instructions(config, get_flat(discriminator))
    found = noised_gradient(discriminator, instructions, faces, keyed("step")).double()

    random = keyed("step")  # the same draw, by hand
    indices, place, count = draw_units(faces, instructions, random)
    assert count >= 3
    units = torch.from_numpy(np.repeat(place, views))
    augmentation = Augmentation(config.augmentation, 28, 1)
    with step_randomness(discriminator, augmentation, partial(secret_seed, random)):
        images = augmentation(faces.tensor(indices).repeat_interleave(views, dim=0))
    gradients = unit_gradients(discriminator, images, units, count)
    limit = bound * (1 - FLOAT_SLACK)
    clipped = [gradient * min(1.0, limit / float(gradient.norm())) for gradient in gradients]
    assert any(float(gradient.norm()) > limit for gradient in gradients) == (bound < 1)
    expected = torch.stack(clipped).sum(0)
    assert float((found - expected).norm()) < 1e-5 * float(expected.norm())
    # With one unit alone, drawn or not, the sum is at most C long: it is all that the unit moves.
    for seed in range(5):
        one = noised_gradient(discriminator, instructions, random_faces(1, 4, seed=seed), keyed(seed))
        assert float(one.double().norm()) <= bound


def test_views_and_masks_are_fresh_and_secret_in_each_step() -> None:
    config = tiny_config(discriminator="conv-dropout", augment="crop", sample_rate=1.0)
    discriminator, faces = cached_discriminator(config.model), random_faces(4, 2)
    instructions = gradient_instructions(config, get_flat(discriminator))
    step = partial(noised_gradient, discriminator, instructions, faces)
    before = torch.random.get_rng_state()
    one = step(keyed("a"))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(3)  # nobody's global seed matters
    assert torch.equal(step(keyed("a")), one)
    torch.random.set_rng_state(before)
    random = keyed("a")
    two, three = step(random), step(random)
    assert torch.equal(two, one)
    assert not torch.equal(three, one)
    seeds = [secret_seed(keyed(i)) for i in range(64)]
    assert len(set(seeds)) == 64
    assert {len(seed) for seed in seeds} == {SEED_BYTES}


def test_the_coordinator_draws_its_seeds_from_its_state_and_only_where_needed() -> None:
    def drawn(**options: Any) -> bool:
        config = tiny_config(privacy_model="none", moment_rounds=0, **options)
        state = CoordinatorState.fresh(config, RUN_ID)
        trainer = GeneratorTrainer(state)
        before = state.rng.get_state()
        with trainer.randomness():
            pass
        return not torch.equal(state.rng.get_state(), before)

    assert not drawn()
    assert drawn(augment="blur")
    assert drawn(discriminator="conv-dropout")


def test_the_generator_learns_through_its_views() -> None:
    """A crop of fakes, then the discriminator: the generator's step is the one along that very loss."""
    config = tiny_config(privacy_model="none", moment_rounds=0, augment="crop, colour")
    state, twin = (CoordinatorState.fresh(config, RUN_ID) for _ in range(2))
    figures = GeneratorTrainer(state).adversarial_step()
    trainer = GeneratorTrainer(twin)
    fakes, _ = trainer._fakes(config.training.generator_batch)
    with trainer.randomness(), half_precision(fakes.device):
        logits = twin.discriminator(trainer.augmentation(fakes)).float()
    loss = LOSSES["bce"].generator(logits).mean()
    assert figures["generator_loss"] == pytest.approx(loss.item(), rel=1e-6)
    expected = torch.autograd.grad(loss, list(twin.generator.parameters()))
    for parameter, gradient in zip(state.generator.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def mirrored(views: Tensor, images: Tensor) -> list[bool]:
    """Which of the views are mirror images; each is, or is the image itself."""
    flipped = (views == images.flip(-1)).flatten(1).all(1)
    assert ((views == images).flatten(1).all(1) ^ flipped).all()
    return flipped.tolist()


def test_the_coordinator_s_fakes_are_augmented_and_dropped_out_but_not_for_the_accuracy() -> None:
    config = tiny_config(
        privacy_model="none", moment_rounds=0, discriminator="conv-dropout", augment="flip", fake_batch=32
    )
    state, twin = (CoordinatorState.fresh(config, RUN_ID) for _ in range(2))
    trainer = GeneratorTrainer(state)
    instructions = instructions_for(state, 1, trainer)
    assert instructions.augmentation == config.augmentation
    seen: list[tuple[bool, Tensor]] = []
    state.discriminator.register_forward_pre_hook(lambda module, args: seen.append((module.training, args[0])))
    gradient = torch.zeros(sum(p.numel() for p in state.discriminator.parameters()))
    discriminator_step(state, trainer, instructions, gradient)
    fakes, _ = GeneratorTrainer(twin).fakes(32)
    (training, views), (judging, judged) = seen
    assert (training, judging, state.discriminator.training) == (True, False, True)
    assert 5 < sum(mirrored(views, fakes)) < 27
    assert torch.equal(judged, fakes)


def test_a_client_s_fakes_are_augmented() -> None:
    config = tiny_config(privacy_model="local", moment_rounds=0, local_steps=2, augment="flip", fake_batch=32)
    state = CoordinatorState.fresh(config, RUN_ID)
    instructions = instructions_for(state, 1, GeneratorTrainer(state))
    seen: list[Tensor] = []
    hook = cached_discriminator(config.model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    gradient_update(instructions, random_faces(3, 1), keyed("a"))
    hook.remove()
    fakes = from_uint8(instructions.fakes).split(32)  # type: ignore[arg-type]
    halves = [views for views in seen if views[-1].any()]  # few faces: their batch ends in padding
    assert len(halves) == 2
    flips = [mirrored(views, images) for views, images in zip(halves, fakes, strict=True)]
    assert all(5 < sum(flip) < 27 for flip in flips)
    assert flips[0] != flips[1]  # each step draws its own


@pytest.mark.parametrize("loss", ["wasserstein", "bce"])
def test_only_the_loss_that_asks_for_it_has_bounded_weights_everywhere(loss: str) -> None:
    config = tiny_config(
        privacy_model="local", moment_rounds=0, local_steps=2, local_lr=1.0, loss=loss, weight_clip=0.01, epsilon=1e3
    )
    state = CoordinatorState.fresh(config, RUN_ID)
    trainer = GeneratorTrainer(state)

    def largest(module: nn.Module) -> float:
        return max(float(p.detach().abs().max()) for p in module.parameters())

    bounded = loss == "wasserstein"
    assert (largest(state.discriminator) <= 0.01) == bounded
    instructions = instructions_for(state, 1, trainer)
    start = np.array(instructions.discriminator)
    update = gradient_update(instructions, random_faces(6, 2), keyed("a"))
    client = cached_discriminator(config.model)
    assert (largest(client) <= 0.01) == bounded
    np.testing.assert_allclose(update * 2 * config.training.local_lr, start - get_flat(client), atol=1e-6)
    discriminator_step(state, trainer, instructions, torch.from_numpy(100 * update))
    assert (largest(state.discriminator) <= 0.01) == bounded
