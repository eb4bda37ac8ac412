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
import client.secure_round
import client.secure_sum
import common.privacy.bookkeeping
import server.aggregation
import server.secure_sum
from client.app import create_app
from common.faces import FaceDataset
from common.messages import RoundInstructions
from common.models.discriminators import discriminator_of
from common.privacy.lattice import Lattice
from common.privacy.ledger import Ledger
from common.privacy.randomness import SecureRandom, add_gaussian_noise
from common.privacy.units import PrivacyUnit
from common.sections import ModelConfig
from common.secure_messages import UnmaskRequest

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


def noise_shares(factor: float) -> Plant:
    """Of `factor` times the standard deviation that the lattice says."""

    def planted(patch: pytest.MonkeyPatch) -> None:
        real = client.secure_round.lattice_of

        def smaller(instructions: RoundInstructions, dimension: int) -> Lattice:
            lattice = real(instructions, dimension)
            return dataclasses.replace(lattice, share_deviation=factor * lattice.share_deviation)

        patch.setattr(client.secure_round, "lattice_of", smaller)

    return planted


def share_short_of_h(patch: pytest.MonkeyPatch) -> None:
    """As if all peers were honest and stayed."""
    real = client.secure_round.lattice_of

    def short(instructions: RoundInstructions, dimension: int) -> Lattice:
        lattice, privacy = real(instructions, dimension), instructions.privacy
        factor = (privacy.noise_shares / privacy.peers) ** 0.5
        return dataclasses.replace(lattice, share_deviation=factor * lattice.share_deviation)

    patch.setattr(client.secure_round, "lattice_of", short)


def masks_reused(patch: pytest.MonkeyPatch) -> None:
    """Keys of places alone, whatever the round, at both ends: every sum still opens."""
    for module in (client.secure_sum, server.secure_sum):
        patch.setattr(module, "self_mask_key", lambda _seed, _deal, _round, place: bytes([place]) * 32)
        patch.setattr(
            module, "pair_mask_key", lambda _key, _public, _deal, _round, places: bytes([min(places), max(places)]) * 16
        )


def no_masks(patch: pytest.MonkeyPatch) -> None:
    for module in (client.secure_sum, server.secure_sum):
        patch.setattr(module, "add_mask", lambda *_given: None)


def both_secrets_rebuilt(patch: pytest.MonkeyPatch) -> None:
    """A second opening of a round passes for the first, and gives the other secret of whoever is now said to have dropped."""
    patch.setattr(UnmaskRequest, "digest", "the same")


def noise_beside_what_it_hides(patch: pytest.MonkeyPatch) -> None:
    """Noise that is orthogonal to the sum: along it nothing is hidden."""

    def noisy(total: Tensor, deviation: float, random: SecureRandom) -> Tensor:
        noise, hidden = deviation * random.gaussian(len(total)), total.double()
        if bool(hidden.any()):
            noise = noise - hidden * (noise @ hidden) / (hidden @ hidden)
        return (hidden + noise).float()

    _noise(patch, noisy)


def noise_without_a_mean(patch: pytest.MonkeyPatch) -> None:
    """The mean of the sum's coordinates is then released as it is."""

    def noisy(total: Tensor, deviation: float, random: SecureRandom) -> Tensor:
        noise = random.gaussian(len(total))
        return (total.double() + deviation * (noise - noise.mean())).float()

    _noise(patch, noisy)


def tails_cut(patch: pytest.MonkeyPatch) -> None:
    _noise(patch, lambda total, d, random: (total.double() + d * random.gaussian(len(total)).clamp(-3.5, 3.5)).float())


def labels_for_units(patch: pytest.MonkeyPatch) -> None:
    """A person with photographs of several labels counts once for each."""
    real = steps.fitting_units

    def split(faces: Any, model: ModelConfig, unit: Any) -> list[np.ndarray]:
        units = real(faces, model, unit)
        return [
            part for images in units for label in range(model.num_classes) if len(part := _of(faces, images, label))
        ]

    patch.setattr(steps, "fitting_units", split)


def moment_labels_for_units(patch: pytest.MonkeyPatch) -> None:
    real = client.moments.moment_sum

    def split(features: Any, faces: Any, labels: Any, units: list[np.ndarray], rows: int) -> Tensor:
        parts = [part for images in units for label in range(rows) if len(part := _of(faces, images, label))]
        return real(features, faces, labels, parts, rows)

    patch.setattr(client.moments, "moment_sum", split)


def faces_for_photographs(patch: pytest.MonkeyPatch) -> None:
    """Each face that was cut from a photograph is a unit of its own."""
    real = FaceDataset.units

    def alone(self: FaceDataset, unit: PrivacyUnit) -> list[np.ndarray]:
        return list(np.arange(len(self)).reshape(-1, 1)) if unit is PrivacyUnit.IMAGE else real(self, unit)

    patch.setattr(FaceDataset, "units", alone)


def one_person_twice_in_the_moments(patch: pytest.MonkeyPatch) -> None:
    real = client.moments.moment_sum
    patch.setattr(
        client.moments,
        "moment_sum",
        lambda features, faces, labels, units, rows: real(features, faces, labels, [*units, units[0]], rows),
    )


def answered_anew_when_asked_again(patch: pytest.MonkeyPatch) -> None:
    real, real_release = Ledger.charge, Ledger.release
    patch.setattr(Ledger, "charge", lambda self, *given: real(self, *given) and None)

    def release(self: Ledger, run_id: str, server_round: int, reply: bytes) -> None:
        if (run_id, server_round) not in self._state.released:
            real_release(self, run_id, server_round, reply)

    patch.setattr(Ledger, "release", release)


def large_gradients_not_clipped(patch: pytest.MonkeyPatch) -> None:
    real = common.privacy.bookkeeping.clip_factors

    def failing(squared: Tensor, clip: float) -> Tensor:
        factors = real(squared, clip)
        factors[squared.sqrt() > 20 * clip] = 1.0
        return factors

    patch.setattr(common.privacy.bookkeeping, "clip_factors", failing)


def views_clipped_apart(patch: pytest.MonkeyPatch) -> None:
    """Each augmented view of a unit is clipped as if it were one."""
    real = steps.real_sum

    def apart(discriminator: Any, loss: Any, images: Tensor, labels: Any, _units: Tensor, _n: int, p: Any) -> Tensor:
        return real(discriminator, loss, images, labels, torch.arange(len(images)), len(images), p)

    patch.setattr(steps, "real_sum", apart)


def _of(faces: FaceDataset, images: np.ndarray, label: int) -> np.ndarray:
    return images[faces.labels[images] == label]  # type: ignore[index]
