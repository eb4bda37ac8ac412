"""How many photographs come back out of gradients, when whoever chose the weights wants them back.

The imprint (Fowl et al. 2022, "Robbing the Fed"; Boenisch et al. 2023, "When the curious abandon honesty") takes a
network that begins with a dense layer. Every row of it measures one scalar of the image, the mean brightness s, against
its own threshold t_1 < t_2 < ..., and the layers above pass the sum of all rows on, so that each row gets the same
derivative g(x) from above. Behind a leaky ReLU of slope 0.2 row i sums c(x) g(x) (x, 1) over all images, c the clipping,
times 1 where s > t_i and 0.2 elsewhere. The 0.2 is in every row alike: neighbours differ by 0.8 of the sum over images
between two thresholds, and where there is one image, weights over bias are that image whatever g and c are. Clipping
each person changes nothing.

With one row and one person, the whole of a clipped gradient is one image: no attack on a dense layer has more of it.
Noise is answered with `FacePrior`, the best linear estimate for someone who has seen other faces.

Gradient inversion (Zhu et al. 2019, "Deep leakage from gradients"; Geiping et al. 2020, "Inverting gradients") takes any
network and one image's gradient, and looks for an image whose own gradient points the same way: cosine distance and total
variation, by Adam on the gradient's signs. Random biases, which a start does not have, are what a hostile coordinator
adds here: the kinks of the leaky ReLUs then lie at other brightnesses everywhere.

Nothing here knows of federation; what is recovered stays with whoever runs it.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from common.errors import ConfigError
from common.models import initialise
from common.models.discriminators import MLPDiscriminator
from common.models.flat import get_flat, split_flat
from common.models.losses import LOSSES

# A photograph is back from here on, in decibels. Neither the average face nor another face that resembles comes so near.
BACK_DB = 30.0
_SLOPE = 0.2  # of the discriminators' leaky ReLUs
_CONTRAST = 1.0 - _SLOPE
# Small activations under a large weight: the clipped gradient is then nearly all in the first layer. _LIFT keeps what is
# above it positive.
_SCALE, _GAIN, _LIFT = 1e-8, 100.0, 1e-2
_CLOSEST_MSE = 1e-9
_STEPS, _STEP_SIZE, _SMOOTHNESS = 100, 0.1, 1e-3
# Images sought at a time: more take no less time, and memory.
_CHUNK = 32


def psnr_table(originals: Tensor, found: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair, in decibels, at most 96: (N, M).

    originals: (N, C, H, W), found: (M, C, H, W), both in [-1, 1], of which the peak is 2.
    """
    a, b = originals.flatten(1).double(), found.flatten(1).double()
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return 10 * torch.log10(4 / (squares / a.shape[1]).clamp(min=_CLOSEST_MSE))


def count_back(table: Tensor, threshold_db: float = BACK_DB) -> int:
    """The most originals that can be paired, one to one, with something found within the threshold. table: (N, M) dB.

    By augmenting paths. The pairing knows the originals, which no attacker does: the count is in the attacker's favour.
    """
    near = [torch.nonzero(row >= threshold_db).flatten().tolist() for row in table]
    holder: dict[int, int] = {}

    def place(original: int, tried: set[int]) -> bool:
        for found in near[original]:
            if found not in tried:
                tried.add(found)
                if found not in holder or place(holder[found], tried):
                    holder[found] = original
                    return True
        return False

    return sum(place(original, set()) for original in range(len(near)))


def brightness_thresholds(public: Tensor, rows: int) -> np.ndarray:
    """Thresholds (rows,) that share out images like the public ones (P, C, H, W) evenly; the first is below all."""
    shares = np.arange(1, rows) / rows
    return np.concatenate([[-2.0], np.quantile(public.double().mean((1, 2, 3)).numpy(), shares)])


def imprint_weights(discriminator: MLPDiscriminator, thresholds: np.ndarray) -> np.ndarray:
    """Weights (d,) float32 for a dense discriminator, whose own are overwritten, with a row for each threshold (R,).

    Raises ConfigError where the first layer has fewer rows.
    """
    rows = len(thresholds)
    first, second, *above = (layer for layer in discriminator.modules() if isinstance(layer, nn.Linear))
    if rows > first.out_features:
        raise ConfigError(
            f"{rows} thresholds for a first layer of {first.out_features}: use fewer, or a wider discriminator"
        )
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.zero_()
        first.weight[:rows] = _SCALE / first.in_features
        first.bias[:rows] = torch.from_numpy(-_SCALE * thresholds)
        second.weight[0, :rows] = _GAIN
        second.bias[0] = _LIFT
        for layer in above:
            layer.weight[0, 0] = 1.0
    return get_flat(discriminator)


def read_imprint(discriminator: MLPDiscriminator, update: np.ndarray, rows: int) -> Tensor:
    """The sums of c g (x, 1) over the images between neighbouring thresholds: (rows, C H W + 1) float64.

    update: (d,), the answer to `imprint_weights` with so many thresholds; the noise on it is in what is returned.
    """
    weight, bias = (part.double() for part in split_flat(discriminator, torch.tensor(update))[:2])
    sums = torch.cat([weight[:rows], bias[:rows, None]], 1)
    # Every image passes the first threshold: the last row's slope below its own is told from that.
    return (sums - torch.cat([sums[1:], _SLOPE * sums[:1]])) / _CONTRAST


def imprint_scale(rows: int) -> tuple[Tensor, Tensor]:
    """What clipping and noise make of each entry of `read_imprint`, (rows,) both, times C and times sigma C.

    First the length of an image that is alone there: its gradient of norm C is shared by the rows. Then the standard
    deviation of each coordinate's noise.
    """
    passed = torch.arange(1, rows + 1, dtype=torch.float64)
    length = (passed + _SLOPE**2 * (rows - passed)).rsqrt()
    noise = torch.full((rows,), math.sqrt(2.0), dtype=torch.float64)
    noise[-1] = _CONTRAST if rows == 1 else math.sqrt(1 + _SLOPE**2)
    return length, noise / _CONTRAST


class FacePrior:
    """What faces look like to someone who has others: mean and covariance of (x, 1) / |(x, 1)|.

    The best linear estimate under them (Wiener) leaves what has little noise as it is, and turns what is all noise into the
    average face.
    """

    def __init__(self, public: Tensor) -> None:
        """public: (P, C, H, W) in [-1, 1], P >= 4."""
        directions = nn.functional.normalize(with_one(public), dim=1).float()
        half, rest = directions[::2], directions[1::2]
        self._mean = half.mean(0)
        _, lengths, self._axes = torch.linalg.svd(half - self._mean, full_matrices=False)
        # What lies outside the plane of half of them, by the other half; all the variance there is taken as even.
        beyond = rest - self._mean
        beyond = beyond - beyond @ self._axes.T @ self._axes
        outside = beyond.square().sum(1).mean() / max(1, self._axes.shape[1] - self._axes.shape[0])
        self._outside = outside.clamp(min=1e-12)
        self._inside = lengths.square() / len(half) + self._outside

    def estimate(self, seen: Tensor, noise: Tensor) -> Tensor:
        """The likely (x, 1) / |(x, 1)|, (N, C H W + 1) float32, of what was seen of them under noise.

        seen: (N, C H W + 1). noise: (N,) standard deviation of a coordinate.
        """
        variance = noise.float().square()[:, None]
        centred = seen.float() - self._mean
        inside = centred @ self._axes.T
        outside = (centred - inside @ self._axes) * (self._outside / (self._outside + variance))
        likely: Tensor = self._mean + inside * (self._inside / (self._inside + variance)) @ self._axes + outside
        return likely


def with_one(images: Tensor) -> Tensor:
    """(x, 1) of images (N, C, H, W): (N, C H W + 1) float64."""
    return torch.cat([images.flatten(1).double(), torch.ones(len(images), 1, dtype=torch.float64)], 1)


def without_one(seen: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Images (N, *shape) in [-1, 1], float32, of (x, 1) at any scale: (N, C H W + 1). Zeros where there is nothing."""
    images: Tensor = (seen[:, :-1] / seen[:, -1:]).nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1).float()
    return images.reshape(-1, *shape)


def crafted_start(discriminator: nn.Module, seed: int) -> np.ndarray:
    """Weights (d,) float32 for gradient inversion: the usual start with random biases; overwrites the discriminator's."""
    random = torch.Generator().manual_seed(seed)
    initialise(discriminator, random)
    with torch.no_grad():
        for layer in discriminator.modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=random))
    return get_flat(discriminator)


def invert_gradients(
    discriminator: nn.Module, gradients: Tensor, shape: tuple[int, int, int], *, seed: int, steps: int = _STEPS
) -> Tensor:
    """Images (N, *shape) in [-1, 1] whose gradients of the loss `bce` on reals point where `gradients` (N, d) do.

    The discriminator has the weights at which these were computed, no classes and no dropout. Each image is sought for
    itself. About half a second an image of 3 x 32 x 32 on one core, at width 32.
    """
    random = torch.Generator().manual_seed(seed)
    parts = [
        _inverted(discriminator, part, 0.1 * torch.randn(len(part), *shape, generator=random), steps)
        for part in gradients.split(_CHUNK)
    ]
    return torch.cat(parts)


def _inverted(discriminator: nn.Module, gradients: Tensor, images: Tensor, steps: int) -> Tensor:
    """`invert_gradients` of a few, from given images on."""
    parameters = {name: p.detach().contiguous() for name, p in discriminator.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        logits: Tensor = functional_call(discriminator, weights, (image[None],))
        return LOSSES["bce"].real(logits).sum()

    gradients_of = vmap(grad(loss), in_dims=(None, 0))
    images.requires_grad_()
    optimizer = torch.optim.Adam([images], lr=_STEP_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=_STEP_SIZE / 100)
    for _ in range(steps):
        found = gradients_of(parameters, images)
        flat = torch.cat([found[name].flatten(1) for name in parameters], 1)
        distance = 1 - nn.functional.cosine_similarity(flat, gradients, dim=1)
        (direction,) = torch.autograd.grad((distance + _SMOOTHNESS * _total_variation(images)).sum(), images)
        images.grad = direction.sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            images.clamp_(-1, 1)
    return images.detach()


def _total_variation(images: Tensor) -> Tensor:
    """Mean difference of neighbouring pixels, of both directions together: (N,)."""
    across = (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3))
    return across + (images[..., 1:, :] - images[..., :-1, :]).abs().mean((1, 2, 3))
