"""Train the feature network `visard-drawn-1`, whose weights are part of the package.

    python benchmarks/feature_network.py [--out FILE]

Recipe: 400 drawn persons (seed 2015, which no recipe uses) with 20 pictures each at three crops, 250 glyph classes and 250
scene classes (benchmarks/drawn_pictures.py) with 24 pictures each, all 32 x 32. Half of the pictures are spoilt in one of six
ways at one of two strengths; some are inverted, made grey, or turned by a multiple of 90 degrees. The network learns three
things at once by cross-entropy: which of the 900 classes it is (weight 1), how it was spoilt (1 of 13, weight 0.5) and how
it was turned (1 of 4, weight 0.25). Four convolutions (3x3; 24, 48, 96, 96 channels; strides 1, 2, 2, 2) with leaky ReLU and batch
norm, which is folded into them at the end. All is read off the means of their channels, by linear heads that are thrown
away. Adam, one cycle up to 4e-3, 8 epochs of batches of 128: three minutes on one core. float16 safetensors. The same machine
and torch make the same bytes; others may round differently, which makes another network: it would need another name.
"""

import argparse
import hashlib
import math
import time
from pathlib import Path

import torch
from drawn_pictures import glyphs, scenes
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from common.evaluation.networks import DRAWN_FILE
from common.faces import FaceOptions, procedural_faces
from common.files import write_atomically

WIDTHS, STRIDES = (24, 48, 96, 96), (1, 2, 2, 2)
SEED, EPOCHS, BATCH = 2015, 8, 128
PERSONS, PICTURES = 400, 20
CROPS = (0.7, 0.8, 1.0)
GLYPHS, SCENES, COPIES = 250, 250, 24
SPOILINGS, STRENGTHS = 6, 2


class Trainee(nn.Module):
    """The network while it learns, with batch norm and heads."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        sides = zip((3, *WIDTHS), WIDTHS, STRIDES, strict=False)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride, 1, bias=False) for a, b, stride in sides)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in WIDTHS)
        self.heads = nn.ModuleList(nn.Linear(sum(WIDTHS), n) for n in (classes, 1 + SPOILINGS * STRENGTHS, 4))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits of class, spoiling and turn of images (B, 3, 32, 32)."""
        x, pooled = images, []
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.leaky_relu(norm(convolution(x)), 0.2)
            pooled.append(x.mean((2, 3)))
        means = torch.cat(pooled, 1)
        return [head(means) for head in self.heads]

    def folded(self) -> dict[str, Tensor]:
        """Weights of the convolutions with the norms in them, as float16."""
        weights = {}
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            gain = norm.weight / (norm.running_var + norm.eps).sqrt()
            weights[f"layers.{index}.weight"] = (convolution.weight * gain[:, None, None, None]).detach().half()
            weights[f"layers.{index}.bias"] = (norm.bias - norm.running_mean * gain).detach().half()
        return weights


def draw() -> tuple[Tensor, Tensor]:
    """All pictures (N, 3, 32, 32) in [-1, 1], and the class of each (N,)."""
    random = torch.Generator().manual_seed(SEED)
    share = PERSONS // len(CROPS) + 1
    faces = [
        procedural_faces(range(i * share, min((i + 1) * share, PERSONS)), PICTURES, FaceOptions(32, 3, crop), SEED)
        for i, crop in enumerate(CROPS)
    ]
    drawn = [torch.from_numpy(part.images).float() / 127.5 - 1 for part in faces]
    pictures = torch.cat([*drawn, glyphs(GLYPHS, COPIES, random), scenes(SCENES, COPIES, random)])
    others = PERSONS + torch.arange((GLYPHS + SCENES) * COPIES) // COPIES
    return pictures, torch.cat([torch.arange(PERSONS * PICTURES) // PICTURES, others])


def spoil(images: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch (B, 3, 32, 32), about half of it spoilt, and how each is spoilt (B,)."""
    count = len(images)
    kind = torch.randint(0, SPOILINGS, (count,), generator=random)
    strength = torch.rand(count, generator=random)
    whole = torch.rand(count, generator=random) < 0.5
    spoilt = images.clone()
    for index, way in enumerate((_noise, _blur, _blocks, _fade, _patch, _warp)):
        some = torch.nonzero((kind == index) & ~whole).flatten()
        if len(some):
            spoilt[some] = way(images[some], strength[some, None, None, None], random)
    label = 1 + kind * STRENGTHS + (strength * STRENGTHS).long()
    return spoilt.clamp(-1, 1), torch.where(whole, 0, label)


def _noise(images: Tensor, strength: Tensor, random: torch.Generator) -> Tensor:
    return images + (0.04 + 0.5 * strength**2) * torch.randn(images.shape, generator=random)


def _blur(images: Tensor, strength: Tensor, random: torch.Generator) -> Tensor:
    near = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    far = F.avg_pool2d(F.avg_pool2d(near, 5, 1, 2, count_include_pad=False), 5, 1, 2, count_include_pad=False)
    weak = images + (near - images) * (2 * strength).clamp(0.3, 1)
    return torch.where(strength < 0.5, weak, near + (far - near) * (2 * strength - 1))


def _blocks(images: Tensor, strength: Tensor, random: torch.Generator) -> Tensor:
    """A checkerboard, as transposed convolutions leave, or squares of 4 pixels."""
    line = torch.arange(32)
    board = ((line[:, None] + line) % 2 * 2 - 1).float()
    squares = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4.0)
    return torch.where(strength < 0.5, images + (0.05 + 0.5 * strength) * board, squares)


def _fade(images: Tensor, strength: Tensor, random: torch.Generator) -> Tensor:
    """Less contrast."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (0.85 - 0.6 * strength)


def _patch(images: Tensor, strength: Tensor, random: torch.Generator) -> Tensor:
    """A square from elsewhere in the same picture."""
    mask = torch.zeros(len(images), 1, 32, 32)
    sides = (6 + 12 * strength.flatten()).int().tolist()
    for row, side in enumerate(sides):
        y, x = torch.randint(0, 32 - side, (2,), generator=random).tolist()
        mask[row, :, y : y + side, x : x + side] = 1
    return images + mask * (images.roll((16, 13), (2, 3)) - images)


def _warp(images: Tensor, strength: Tensor, random: torch.Generator) -> Tensor:
    """A smooth random displacement."""
    coarse = torch.randn(len(images), 2, 5, 5, generator=random) * (0.03 + 0.15 * strength)
    shift = F.interpolate(coarse, size=(32, 32), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    line = (torch.arange(32) + 0.5) / 16 - 1
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    return F.grid_sample(images, grid + shift, padding_mode="border", align_corners=False)


def vary(images: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some of a batch grey, inverted or turned, and the turn of each (B,) in quarters."""
    count = len(images)
    grey = torch.rand(count, generator=random)[:, None, None, None] < 0.3
    luma = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    images = torch.where(grey, luma, images)
    sign = torch.where(torch.rand(count, generator=random) < 0.2, -1.0, 1.0)
    images = images * sign[:, None, None, None]
    turn = torch.where(torch.rand(count, generator=random) < 0.6, 0, torch.randint(0, 4, (count,), generator=random))
    turned = images.clone()
    for quarter in (1, 2, 3):
        turned[turn == quarter] = torch.rot90(images[turn == quarter], quarter, (2, 3))
    return turned, turn


def train(pictures: Tensor, classes: Tensor) -> Trainee:
    """A network that has learnt them."""
    random = torch.Generator().manual_seed(SEED)
    model = Trainee(int(classes.max()) + 1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=random) * math.sqrt(2 / parameter[0].numel()))
    for head in model.heads:
        nn.init.zeros_(head.bias)
    batches = len(pictures) // BATCH
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=EPOCHS * batches)
    began = time.monotonic()
    for epoch in range(EPOCHS):
        right, losses = [], []
        for rows in torch.randperm(len(pictures), generator=random).tensor_split(batches):
            spoilt, how = spoil(pictures[rows], random)
            turned, turn = vary(spoilt, random)
            logits = model(turned.contiguous(memory_format=torch.channels_last))
            truths = (classes[rows], how, turn)
            parts = [F.cross_entropy(one, truth) for one, truth in zip(logits, truths, strict=True)]
            loss = parts[0] + 0.5 * parts[1] + 0.25 * parts[2]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            right.append(
                [float((one.argmax(1) == truth).float().mean()) for one, truth in zip(logits, truths, strict=True)]
            )
        shares = ", ".join(f"{100 * float(share):.1f} %" for share in torch.tensor(right).mean(0))
        loss = sum(losses) / len(losses)
        print(f"epoch {epoch + 1}: loss {loss:.3f}; right: {shares}; {time.monotonic() - began:.0f} s", flush=True)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DRAWN_FILE)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    weights = train(*draw()).folded()
    write_atomically(out, save(weights, metadata={"name": "visard-drawn-1"}))
    print(f"{out}: {out.stat().st_size:,} bytes, SHA-256 {hashlib.sha256(out.read_bytes()).hexdigest()}")
