"""Augmentation of what a discriminator sees, photographs and fakes alike, and the randomness of such a step.

Fakes are augmented too, in the discriminator's step and in the generator's, which is trained through the augmentation:
a discriminator that saw only its photographs augmented would teach the generator to draw rotated and blurred faces
(Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training"; Karras et al. 2020, "Training
generative adversarial networks with limited data").

Several views of each photograph (De et al. 2022, "Unlocking high-accuracy differentially private image classification
through scale", augmentation multiplicity): a unit's gradient is the mean over the views of all its photographs, and is
clipped after that. Claim: where one unit is added or removed, the clipped sum of views moves by at most C, as the sum
of photographs does, and the released gradient is as private as without augmentation. A view is computed from one
photograph and from its own random parameters, which are independent from view to view and of every photograph's
content; no view reaches another image. So, given the parameters of all views, each unit still adds one vector of norm
at most C, computed from its own photographs alone; and the step that draws them is a mixture of such steps, with the
same mixing law on neighbouring data sets, which is no less private than its worst part. That argument stands in full in
`common.models.stochastic`, for dropout's masks, and rests here too on a seed that is secret and fresh for each step.

On a processor a view is the same to the last bit whatever images are beside it (tested), so that chosen weights find no
rounding to blow up; on a GPU that is not measured.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.models.stochastic import seeded_masks
from common.sections import AugmentationConfig, ModelConfig

_Transform = Callable[[Tensor], Tensor]

# Views that are made together: as many as the transforms hold copies of at once.
_CHUNK = 256
# Bytes of a step's seed.
SEED_BYTES = 32
_FLIP_P = 0.5
# A crop moves the image by up to this share of its side, on whole pixels; what comes in is its mirror image.
_CROP_SHARE = 1 / 8
_ROTATION_DEGREES = 10.0
# Factors of brightness, contrast and saturation lie in [1 - this, 1 + this].
_COLOUR_SHARE = 0.2
_BLUR_P = 0.5
_ERASE_P = 0.5


class Augmentation:
    """Random transforms of images, each image's drawn apart from the others'; the identity where none is named.

    All draw from torch's global random numbers: call within `step_randomness`.
    """

    def __init__(self, config: AugmentationConfig, image_size: int, channels: int) -> None:
        self.is_random = bool(config.names)
        self._views = config.augment_views
        self._transforms = [_TRANSFORMS[name](image_size, channels) for name in config.names]

    def __call__(self, images: Tensor) -> Tensor:
        """One view of each image, (B, C, H, W) in [-1, 1], on the images' device; differentiable in the images."""
        if not self.is_random or len(images) == 0:
            return images
        # The caller may compute in half precision; views stay float32.
        with torch.autocast(images.device.type, enabled=False):
            for transform in self._transforms:
                images = transform(images)
        # Weighted means of pixels may leave the range by their rounding.
        return images.clamp(-1.0, 1.0)

    @torch.no_grad()
    def views_of(self, images: Tensor, labels: Tensor | None, units: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The K views of each photograph, those of one beside each other, with its label and its unit.

        images: (B, C, H, W) in [-1, 1]; labels: (B,) int64 or None; units: (B,) int64. Returns the same with K * B in
        place of B; without augmentation what came in. All views are held at once, as float32: K times the photographs.
        """
        if not self.is_random:
            return images, labels, units
        views = torch.empty(
            (len(images) * self._views, *images.shape[1:]), device=images.device, memory_format=torch.channels_last
        )
        done = 0
        for few in images.split(max(1, _CHUNK // self._views)):
            many = self(few.repeat_interleave(self._views, dim=0))
            views[done : done + len(many)] = many
            done += len(many)
        labels = None if labels is None else labels.repeat_interleave(self._views)
        return views, labels, units.repeat_interleave(self._views)


@contextmanager
def step_randomness(
    discriminator: nn.Module, augmentation: Augmentation, draw_seed: Callable[[], bytes]
) -> Iterator[None]:
    """Within the `with`, dropout and augmentation follow one seed, and torch's global random numbers are left alone.

    draw_seed: gives SEED_BYTES bytes, secret and fresh where photographs are in the step. It is called once, and only
    for a step that has dropout or augmentation, so that other runs draw what they drew without it.
    """
    # torch gives its dropout layers no other common class.
    dropout = any(isinstance(layer, nn.modules.dropout._DropoutNd) for layer in discriminator.modules())
    if augmentation.is_random or dropout:
        with seeded_masks(draw_seed()):
            yield
    else:
        yield


@lru_cache(maxsize=8)
def augmentation_of(config: AugmentationConfig, model: ModelConfig) -> Augmentation:
    """The augmentation that a run's configuration names, for its images. Its transforms keep their last parameters, and
    no image."""
    return Augmentation(config, model.image_size, model.channels)


# kornia is slow to import, and most processes never augment: each transform imports it for itself.


def _flip(_image_size: int, _channels: int) -> _Transform:
    from kornia.augmentation import RandomHorizontalFlip

    flip: _Transform = RandomHorizontalFlip(p=_FLIP_P)
    return flip


def _crop(image_size: int, _channels: int) -> _Transform:
    from kornia.augmentation import RandomCrop

    margin = int(image_size * _CROP_SHARE)
    crop: _Transform = RandomCrop((image_size, image_size), padding=margin, padding_mode="reflect")
    return crop


def _rotation(_image_size: int, _channels: int) -> _Transform:
    from kornia.augmentation import RandomAffine

    # RandomRotation would fill the corners with grey.
    rotation: _Transform = RandomAffine(_ROTATION_DEGREES, padding_mode="reflection", p=1.0)
    return rotation


def _colour(_image_size: int, channels: int) -> _Transform:
    from kornia.augmentation import ColorJitter

    # In a fixed order: kornia's random one is drawn once for the whole batch.
    saturation = _COLOUR_SHARE if channels == 3 else 0.0
    jitter = ColorJitter(_COLOUR_SHARE, _COLOUR_SHARE, saturation, p=1.0, order=(0, 1, 2))
    return lambda images: jitter(images * 0.5 + 0.5) * 2.0 - 1.0  # kornia's colours are in [0, 1]


def _blur(image_size: int, _channels: int) -> _Transform:
    from kornia.augmentation import RandomGaussianBlur

    # The kernel as in Chen et al. 2020 ("SimCLR"), appendix A, a tenth of the side; it spans three sigma either way.
    kernel = image_size // 10 | 1

    class Blur(RandomGaussianBlur):  # type: ignore[misc]
        """By sums of shifted images: a convolution rounds otherwise in another batch, on some processors."""

        def apply_transform(self, input: Tensor, params: Any, flags: Any, transform: Any = None) -> Tensor:  # noqa: A002
            sigma = params["sigma"].to(input).view(-1, 1)
            offsets = torch.arange(kernel, device=input.device) - kernel // 2
            weights = torch.exp(-offsets.square() / (2 * sigma.square()))
            weights = weights / weights.sum(1, keepdim=True)
            half = kernel // 2
            padded = functional.pad(input, (half, half, half, half), mode="reflect")
            for dim in (2, 3):
                size = input.shape[dim]
                shifted = (weights[:, i, None, None, None] * padded.narrow(dim, i, size) for i in range(kernel))
                padded = sum(shifted, start=torch.zeros((), device=input.device))
            return padded

    blur: _Transform = Blur((kernel, kernel), (0.1, kernel / 6), p=_BLUR_P)
    return blur


def _erase(_image_size: int, _channels: int) -> _Transform:
    from kornia.augmentation import RandomErasing

    erase: _Transform = RandomErasing(scale=(0.02, 0.2), ratio=(0.5, 2.0), value=0.0, p=_ERASE_P)  # 0 is grey
    return erase


_TRANSFORMS: dict[str, Callable[[int, int], _Transform]] = {
    "flip": _flip,
    "crop": _crop,
    "rotation": _rotation,
    "colour": _colour,
    "blur": _blur,
    "erase": _erase,
}
