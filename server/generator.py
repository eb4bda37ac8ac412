"""The generator's training: post-processing of what the clients released, so it costs no privacy.

The moment stage fits the generator to the released mean features. The adversarial rounds then follow the
discriminator's gradient and keep the moment term beside it. Learning rates are functions of the step alone, and all
randomness is `state.rng`: a checkpoint between any two steps loses nothing.
"""

from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn

from common.augmentation import SEED_BYTES, augmentation_of, step_randomness
from common.config import RunConfig
from common.device import half_precision
from common.models.discriminators import ClassDiscriminator
from common.models.features import RandomFeatures
from common.models.losses import LOSSES
from server.checkpoint import CoordinatorState
from server.moments import MomentLoss

# Smoothing of the discriminator's accuracy on fakes, and the accuracy under which it gets another step (adaptive).
_ACCURACY_DECAY = 0.95
_ACCURACY_FLOOR = 0.65
_MAX_DISCRIMINATOR_STEPS = 50
# Generator steps between two looks at what the refinement does.
_MEASURE_STEPS = 10
# Steps over which the moment stage's learning rate rises.
_WARM_UP_STEPS = 20


class GeneratorTrainer:
    """One generator step at a time on `state`, in place."""

    def __init__(self, state: CoordinatorState) -> None:
        self._state = state
        self._device = next(state.generator.parameters()).device
        self._moment_loss: MomentLoss | None = None
        self.augmentation = augmentation_of(state.config.augmentation, state.config.model)

    def randomness(self) -> AbstractContextManager[None]:
        """Views and dropout masks within follow a seed of `state.rng`, drawn only where there are any: on fakes it needs
        no secret."""
        return step_randomness(self._state.discriminator, self.augmentation, self._draw_seed)

    def moment_step(self) -> dict[str, float]:
        """One Adam step on the moment loss. Returns its figures."""
        state, moments = self._state, self._state.config.moments
        rate = moment_rate(state.generator_steps, moments.moment_steps, moments.moment_lr)
        loss = self._descend(self._moments(), rate)
        self._stepped()
        return {"moment_loss": loss}

    def prior_step(self, loss: MomentLoss) -> dict[str, float]:
        """One Adam step on the moments of public faces, in batches and at learning rates as in the moment stage."""
        state, training = self._state, self._state.config.training
        rate = moment_rate(state.primed, training.public_steps, state.config.moments.moment_lr)
        found = self._descend(loss, rate)
        state.primed += 1
        update_ema(state.ema, state.generator, training.ema_decay, state.primed)
        return {"prior_loss": found}

    def _descend(self, moment_loss: MomentLoss, rate: float) -> float:
        state = self._state
        fakes, labels = self._fakes(state.config.moments.moment_batch)
        with half_precision(self._device):
            loss = moment_loss(fakes, labels)
        _set_rate(state.generator_optimizer, rate, (0.5, 0.99))
        state.generator_optimizer.zero_grad()
        torch.autograd.backward(loss)
        state.generator_optimizer.step()
        return loss.item()

    def refining_step(self) -> dict[str, float]:
        """One step as in a round, against the last discriminator; the learning rate and the moving average begin anew."""
        state, training = self._state, self._state.config.training
        rate = moment_rate(state.refined, training.refine_steps, training.generator_lr)
        figures = self.adversarial_step(rate, state.refined + 1)
        state.refined += 1
        if state.refined % _MEASURE_STEPS == 0 or state.refined == training.refine_steps:
            figures |= self.accuracy(*self._fakes(training.fake_batch))
        return figures

    def adversarial_step(self, rate: float | None = None, ema_step: int | None = None) -> dict[str, float]:
        """One Adam step against the discriminator, the moment term's gradient scaled to `moment_weight` times the
        adversarial one. rate: where it is not `generator-lr`; ema_step: where the moving average's decay does not grow
        from the run's first step.

        The two are balanced by their norms at the images, where both are known before anything flows into the
        generator. Returns figures on fakes.
        """
        state, config = self._state, self._state.config
        if state.moment_target is not None and state.generator_steps == config.moments.moment_steps:
            state.generator_optimizer = torch.optim.Adam(state.generator.parameters())
        fakes, labels = self._fakes(config.training.generator_batch)
        with self.randomness(), half_precision(self._device):
            logits = state.discriminator(self.augmentation(fakes), labels).float()
        loss = LOSSES[config.model.loss].generator(logits).mean()
        (gradient,) = torch.autograd.grad(loss, fakes, retain_graph=False)
        figures = {"generator_loss": loss.item()}
        if state.moment_target is not None and config.moments.moment_weight > 0:
            with half_precision(self._device):
                moment_loss = self._moments()(fakes, labels)
            (toward_moments,) = torch.autograd.grad(moment_loss, fakes)
            scale = gradient.norm() / toward_moments.norm().clamp(min=1e-20)
            gradient = gradient + config.moments.moment_weight * scale * toward_moments
            figures["moment_loss"] = moment_loss.item()
        rate = config.training.generator_lr if rate is None else rate
        _set_rate(state.generator_optimizer, rate, (config.training.adam_beta1, 0.999))
        state.generator_optimizer.zero_grad()
        torch.autograd.backward(fakes, gradient)
        state.generator_optimizer.step()
        self._stepped(ema_step)
        return figures

    @torch.no_grad()
    def accuracy(self, fakes: Tensor, labels: Tensor | None) -> dict[str, float]:
        """The share of fakes that the discriminator sees through, or, where it tells classes, that look like the class
        asked for. Where adaptive, the discriminator gets more steps while it sees through few.
        """
        discriminator = self._state.discriminator
        discriminator.eval()  # of the fakes as they are, without dropout
        if isinstance(discriminator, ClassDiscriminator):
            taken = discriminator.classify(fakes).argmax(1)
            found = {"label_accuracy": torch.eq(taken, cast(Tensor, labels)).float().mean().item()}
        else:
            # Under wasserstein logits have no zero of their own: it says little there.
            found = {"fake_accuracy": (discriminator(fakes, labels) < 0).float().mean().item()}
            self._note_accuracy(found["fake_accuracy"])
        discriminator.train()
        return found

    def _note_accuracy(self, accuracy: float) -> None:
        state, training = self._state, self._state.config.training
        state.fake_accuracy = _ACCURACY_DECAY * state.fake_accuracy + (1 - _ACCURACY_DECAY) * accuracy
        due = state.rounds_since_generator_step >= state.discriminator_steps
        if training.adaptive and due and state.fake_accuracy < _ACCURACY_FLOOR:
            state.discriminator_steps = min(state.discriminator_steps + 1, _MAX_DISCRIMINATOR_STEPS)

    @torch.no_grad()
    def fakes(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Fakes (count, C, H, W) in [-1, 1] of the generator as it trains, and their labels."""
        return self._fakes(count)

    def _fakes(self, count: int) -> tuple[Tensor, Tensor | None]:
        latents, labels = draw_latents(self._state.config, count, self._state.rng)
        latents = latents.to(self._device)
        labels = labels if labels is None else labels.to(self._device)
        with half_precision(self._device):
            fakes: Tensor = self._state.generator(latents, labels).float()
        return fakes, labels

    def _draw_seed(self) -> bytes:
        return torch.randint(256, (SEED_BYTES,), dtype=torch.uint8, generator=self._state.rng).numpy().tobytes()

    def _moments(self) -> MomentLoss:
        if self._moment_loss is None:
            model, target = self._state.config.model, self._state.moment_target
            if target is None:
                raise ValueError("the moment stage has no target yet")
            features = RandomFeatures(model.image_size, model.channels, self._state.config.moments.feature_seed)
            self._moment_loss = MomentLoss(features.to(self._device), target.to(self._device))
        return self._moment_loss

    def _stepped(self, ema_step: int | None = None) -> None:
        state = self._state
        state.generator_steps += 1
        step = state.generator_steps if ema_step is None else ema_step
        update_ema(state.ema, state.generator, state.config.training.ema_decay, step)


def moment_rate(step: int, num_steps: int, rate: float) -> float:
    """Learning rate of `step` (from 0) of `num_steps`: a short linear rise, constant, a linear fall over the second half."""
    return rate * min(1.0, (step + 1) / _WARM_UP_STEPS, 2.0 * (1.0 - step / num_steps))


def draw_latents(config: RunConfig, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Latents (count, latent_dim) ~ N(0, 1) and labels (count,) int64 in turn 0, 1, ..., None for an unconditional
    model.
    """
    latents = torch.randn(count, config.model.latent_dim, generator=rng)
    classes = config.model.num_classes
    return latents, torch.arange(count) % classes if classes else None


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move `ema` toward `network`, running statistics of batch norms included; the decay grows to its value over first
    steps."""
    decay = min(decay, (1 + step) / (10 + step))
    for average, value in zip(ema.state_dict().values(), network.state_dict().values(), strict=True):
        if average.is_floating_point():
            average.lerp_(value, 1 - decay)
        else:
            average.copy_(value)


def _set_rate(optimizer: torch.optim.Adam, rate: float, betas: tuple[float, float]) -> None:
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = rate, betas
