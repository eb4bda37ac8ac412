"""Faults to plant in the real client: each a small patch, of the kind that a careless change would make."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from torch import Tensor

import client.discriminator as steps
import client.moments
import server.aggregation
from client.app import create_app
from common.messages import RoundInstructions
from common.models.discriminators import discriminator_of
from common.privacy.ledger import Ledger
from common.privacy.randomness import SecureRandom, add_gaussian_noise
from common.sections import ModelConfig

Plant = Callable[[pytest.MonkeyPatch], None]


def _noise(patch: pytest.MonkeyPatch, noisy: Callable[[Tensor, float, SecureRandom], Tensor]) -> None:
    """In the client's gradient step, and in the coordinator under `central`."""
    patch.setattr(steps, "add_gaussian_noise", noisy)
    patch.setattr(server.aggregation, "add_gaussian_noise", noisy)


def noise_two_percent_low(patch: pytest.MonkeyPatch) -> None:
    _noise(patch, lambda total, deviation, random: add_gaussian_noise(total, 0.98 * deviation, random))


def noise_again_in_the_next_round(patch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []

    def noisy(total: Tensor, deviation: float, random: SecureRandom) -> Tensor:
        if kept and len(kept[0]) == len(total):
            noise = kept.pop()
        else:
            noise = add_gaussian_noise(torch.zeros_like(total), 1.0, random)
            kept[:] = [noise]
        return (total + deviation * noise).float()

    _noise(patch, noisy)


def one_layer_without_noise(model: ModelConfig, layer: int = 3) -> Plant:
    sizes = [p.numel() for p in discriminator_of(model).parameters()]
    first = sum(sizes[:layer])

    def noisy(total: Tensor, deviation: float, random: SecureRandom) -> Tensor:
        released = add_gaussian_noise(total, deviation, random)
        released[first : first + sizes[layer]] = total[first : first + sizes[layer]]
        return released

    return lambda patch: _noise(patch, noisy)


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    real = steps.real_sum

    def unclipped(*given: Any) -> Tensor:
        return real(*given[:-1], dataclasses.replace(given[-1], max_grad_norm=1e6))

    patch.setattr(steps, "real_sum", unclipped)


def batch_mean_clipped(patch: pytest.MonkeyPatch) -> None:
    real = steps.real_sum

    def mean_clipped(*given: Any) -> Tensor:
        clip, drawn = given[-1].max_grad_norm, given[-2]
        mean = real(*given[:-1], dataclasses.replace(given[-1], max_grad_norm=1e6)) / max(drawn, 1)
        return mean * min(1.0, clip / max(float(mean.norm()), 1e-30)) * drawn

    patch.setattr(steps, "real_sum", mean_clipped)


def images_clipped_alone_and_summed(patch: pytest.MonkeyPatch) -> None:
    real = steps.real_sum

    def by_image(discriminator: Any, loss: Any, images: Tensor, labels: Any, _units: Tensor, _n: int, p: Any) -> Tensor:
        return real(discriminator, loss, images, labels, torch.arange(len(images)), len(images), p)

    patch.setattr(steps, "real_sum", by_image)


def shuffled_batches_of_one_size(patch: pytest.MonkeyPatch) -> None:
    orders: dict[int, list[int]] = {}

    def batch(random: SecureRandom, num_units: int, sample_rate: float) -> np.ndarray:
        size = max(1, round(num_units * sample_rate))
        order = orders.setdefault(num_units, [])
        if len(order) < size:
            order[:] = np.argsort(random.words(num_units)).tolist()
        taken, order[:] = order[:size], order[size:]
        return np.sort(np.array(taken))

    patch.setattr(SecureRandom, "poisson_sample", batch)


def empty_batch_skipped(patch: pytest.MonkeyPatch) -> None:
    def noisy(total: Tensor, deviation: float, random: SecureRandom) -> Tensor:
        return add_gaussian_noise(total, deviation, random) if bool(total.any()) else total.float()

    _noise(patch, noisy)


def noise_from_torch(patch: pytest.MonkeyPatch) -> None:
    """From the global generator, which somebody seeds."""
    _noise(patch, lambda total, deviation, _random: (total + deviation * torch.randn(len(total))).float())


def ledger_with_half_of_sigma(patch: pytest.MonkeyPatch) -> None:
    real = Ledger.charge

    def half(self: Ledger, run_id: str, server_round: int, release: Any, *given: Any) -> bytes | None:
        halved = dataclasses.replace(release, noise_multiplier=release.noise_multiplier / 2)
        return real(self, run_id, server_round, halved, *given)

    patch.setattr(Ledger, "charge", half)


def normaliser_from_the_drawn(patch: pytest.MonkeyPatch) -> None:
    numbers = _drawn(patch)
    real = steps.noised_gradient

    def normalised(discriminator: Any, instructions: RoundInstructions, faces: Any, random: SecureRandom) -> Tensor:
        total = real(discriminator, instructions, faces, random)
        return total * instructions.privacy.expected_batch / max(numbers[-1], 1)

    patch.setattr(steps, "noised_gradient", normalised)


def as_many_fakes_as_drawn(patch: pytest.MonkeyPatch) -> None:
    numbers = _drawn(patch)
    real = steps.fake_mean

    def tied(discriminator: Any, loss: Any, images: Tensor, labels: Tensor | None, privacy: Any) -> Tensor:
        count = min(max(numbers[-1], 1), len(images))
        some = real(discriminator, loss, images[:count], labels if labels is None else labels[:count], privacy)
        return some * count / privacy.expected_batch

    patch.setattr(steps, "fake_mean", tied)


def moment_noise_two_percent_low(patch: pytest.MonkeyPatch) -> None:
    def noisy(total: Tensor, deviation: float, random: SecureRandom) -> Tensor:
        return add_gaussian_noise(total, 0.98 * deviation, random)

    patch.setattr(client.moments, "add_gaussian_noise", noisy)
    patch.setattr(server.aggregation, "add_gaussian_noise", noisy)


def seeded_app() -> ClientApp:
    """Its randomness follows from what anybody knows."""

    def seeded(instructions: RoundInstructions, _context: Context) -> SecureRandom:
        known = f"{instructions.run_id}{instructions.server_round}"
        return SecureRandom(hashlib.sha256(known.encode()).digest())

    return create_app(seeded)


def _drawn(patch: pytest.MonkeyPatch) -> list[int]:
    """How many units were drawn, step by step."""
    numbers: list[int] = []
    real = steps.draw_units

    def counted(*given: Any) -> Any:
        drawn = real(*given)
        numbers.append(drawn[2])
        return drawn

    patch.setattr(steps, "draw_units", counted)
    return numbers
