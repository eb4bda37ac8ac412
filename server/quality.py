"""Whether the faces are good enough to stop: figures of fakes, and of fakes beside public faces."""

from collections.abc import Iterator

import torch

from common.device import half_precision
from common.errors import DataError
from common.evaluation.fidelity import FrechetDistance
from common.faces import load_faces
from common.sections import FaceSource
from server.checkpoint import CoordinatorState
from server.generator import draw_latents

_FAKES = 2000
_REFERENCES = 10_000
_BATCH = 250


class Judge:
    """Measures the generator's moving average now and then, and ends a run whose `stop-when` is met.

    It reads the `reference` faces, which are the coordinator's own and public, and never a client's.
    """

    def __init__(self, state: CoordinatorState) -> None:
        """Raises DataError where there is a reference that cannot be read."""
        config = state.config
        self._condition = config.training.stop_condition
        self._distance: FrechetDistance | None = None
        if config.training.reference:
            source = FaceSource(
                data=config.training.reference, crop=config.simulation.crop, detect=config.simulation.detect
            )
            try:
                faces = load_faces(source, config.model.image_size, config.model.channels)
            except DataError as error:
                raise DataError(f"--reference: {error}") from error
            if len(faces) < 2:
                raise DataError(f"reference = {config.training.reference!r} holds {len(faces)} faces: give 2 or more")
            order = torch.randperm(len(faces), generator=torch.Generator().manual_seed(0))[:_REFERENCES]
            device = next(state.ema.parameters()).device
            self._distance = FrechetDistance(faces.tensor(some.numpy()).to(device) for some in order.split(_BATCH))

    def look(self, state: CoordinatorState, *, measure: bool) -> None:
        """Add the figures to `state.last`, those that take time only where `measure`; end the run where they say so."""
        if measure and self._distance is not None:
            state.last["frechet"] = round(self._distance(_fakes(state)), 4)
            state.last["frechet_network"] = self._distance.network
        if self._condition is not None and self._condition.met(state.last):
            state.ended_by = "figure"
            state.stopped = f"{state.config.training.stop_when} at {state.last[self._condition.key]:.4g}"


@torch.no_grad()
def _fakes(state: CoordinatorState) -> Iterator[torch.Tensor]:
    """Faces of the moving average on latents of their own, the same each time: the run's randomness is left alone."""
    rng = torch.Generator().manual_seed(state.config.training.seed + 2)
    device = next(state.ema.parameters()).device
    for _ in range(_FAKES // _BATCH):
        latents, labels = draw_latents(state.config, _BATCH, rng)
        with half_precision(device):
            yield state.ema(latents.to(device), None if labels is None else labels.to(device)).float()
