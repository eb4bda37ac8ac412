"""A step of the shared discriminator at the coordinator, whoever's gradient it is."""

from torch import Tensor

from common.models.flat import split_flat
from common.models.losses import LOSSES, project_weights
from server.checkpoint import CoordinatorState


def adam_step(state: CoordinatorState, gradient: Tensor) -> None:
    """One Adam step of `state.discriminator`, in place, along gradient (d,) on its device; projected where the loss asks for it."""
    config = state.config
    parameters = list(state.discriminator.parameters())
    for parameter, part in zip(parameters, split_flat(state.discriminator, gradient), strict=True):
        parameter.grad = part.clone()
    for group in state.discriminator_optimizer.param_groups:
        group["lr"], group["betas"] = config.training.discriminator_lr, (config.training.adam_beta1, 0.999)
    state.discriminator_optimizer.step()
    project_weights(state.discriminator, LOSSES[config.model.loss], config.model.weight_clip)
