"""Train a vision transformer or an MLP-Mixer with LoRA-the-Explorer, or with its rivals.

    python train.py                                     one process runs all heads
    torchrun --nproc_per_node=2 train.py                two processes run half of them each
    python train.py --save-every 50 --resume            goes on from the last checkpoint
    python train.py --compare dense lora mhlora lte     one after the other, one table
    python train.py --preset cifar-lte --data DIR       a row of the README's tables
    python train.py --study heads                       a question, answered by a table
    python train.py --bench                             a step's time beside a dense one's

Methods, all on the same samples in the same order:
    lte        N heads, each alone on its share of the batch, merged every T steps
    mhlora     N heads, every one on every sample, one process: what LTE approximates
    lora       one head, merged only at the end: rank r is all it can reach
    relora     one head, merged and started anew again and again
    localsgd   N dense copies, averaged every T steps
    dense      AdamW on all weights; under torchrun, torch's DistributedDataParallel
"""

import argparse
import copy
import csv
import importlib.util
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, random_split
from torchvision import datasets
from torchvision.transforms import v2

import lte

# --------------------------------------------------------------------------------------------------
# 1 models
#
# Shape letters: b samples, t tokens (patches), w width. Dimension 0 is always the batch, because
# that is where lte.convert splits it over the LoRA heads; attention's own heads are attn_heads.
# --------------------------------------------------------------------------------------------------

MODELS = {
    "vit-nano": dict(width=128, depth=4, attn_heads=4),
    "vit-tiny": dict(width=192, depth=12, attn_heads=3),
    "vit-small": dict(width=384, depth=12, attn_heads=6),
    "vit-base": dict(width=768, depth=12, attn_heads=12),
    "vit-large": dict(width=1024, depth=24, attn_heads=16),
    "mixer-nano": dict(width=128, depth=4, token_mlp=64, channel_mlp=512),
    "mixer-small": dict(width=512, depth=8, token_mlp=256, channel_mlp=2048),
    "mixer-base": dict(width=768, depth=12, token_mlp=384, channel_mlp=3072),
}


def norm(width: int) -> nn.LayerNorm:
    """LayerNorm without parameters: every trained number is then a matrix or a bias."""
    return nn.LayerNorm(width, elementwise_affine=False)


def mlp(width: int, hidden: int) -> nn.Sequential:
    """(..., width) -> (..., width)."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed code of each patch's row and column at width / 4 wavelengths, (grid * grid, width)."""
    frequencies = 10000.0 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(grid)[:, None] * frequencies  # (grid, w / 4)
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # (grid, w / 2)
    rows, columns = waves[:, None].expand(-1, grid, -1), waves.expand(grid, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


def initialise(model: nn.Module) -> None:
    """Xavier weights, zero biases.

    A frozen base shapes the features all through training, so its scale must fit its layer: xavier
    keeps the variance at every width, where one constant (0.02) would all but close a narrow net.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: a patch is one long vector
            nn.init.zeros_(module.bias)


class ViTBlock(nn.Module):
    """Pre-norm attention, then pre-norm MLP, (b, t, w) -> (b, t, w)."""

    def __init__(self, width: int, attn_heads: int):
        super().__init__()
        self.attn_heads = attn_heads
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.attn_heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each (b, attn_heads, t, w / attn_heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class MixerBlock(nn.Module):
    """Pre-norm MLP over the tokens, then one over the channels, (b, t, w) -> (b, t, w)."""

    def __init__(self, width: int, tokens: int, token_mlp: int, channel_mlp: int):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.token_mlp, self.channel_mlp = mlp(tokens, token_mlp), mlp(width, channel_mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer with fixed positions and mean pooling, (b, 3, h, h) -> (b, classes)."""

    def __init__(self, classes: int, image_size: int, patch: int, width, depth, attn_heads):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        # Not persistent: a saved model holds trained numbers only.
        positions = sincos_positions(width, image_size // patch)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.Sequential(*(ViTBlock(width, attn_heads) for _ in range(depth)))
        self.norm, self.head = norm(width), nn.Linear(width, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions  # (b, t, w)
        return self.head(self.norm(self.blocks(x)).mean(1))


class Mixer(nn.Module):
    """MLP-Mixer, (b, 3, h, h) -> (b, classes); its token MLPs know the places of the patches."""

    def __init__(self, classes, image_size, patch, width, depth, token_mlp, channel_mlp):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        sizes = width, (image_size // patch) ** 2, token_mlp, channel_mlp
        self.blocks = nn.Sequential(*(MixerBlock(*sizes) for _ in range(depth)))
        self.norm, self.head = norm(width), nn.Linear(width, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # (b, t, w)
        return self.head(self.norm(self.blocks(x)).mean(1))


def build_model(name: str, *, classes: int, image_size: int, patch: int | None = None) -> nn.Module:
    """One of MODELS for square images of image_size pixels; weights from torch's global seed."""
    if patch is None:  # 64 tokens for images of up to 64 pixels, 16 for the nano models
        patch = 16 if image_size > 64 else max(1, image_size // (4 if "nano" in name else 8))
    if patch < 1 or image_size % patch:
        fits = ", ".join(str(p) for p in range(1, image_size + 1) if image_size % p == 0)
        raise ValueError(f"patch {patch} does not divide the image size {image_size}; use {fits}")
    kind = ViT if name.startswith("vit") else Mixer
    return kind(classes, image_size, patch, **MODELS[name])


# --------------------------------------------------------------------------------------------------
# 2 shapes: a data set made on the spot
# --------------------------------------------------------------------------------------------------


def box(u: Tensor, v: Tensor, half_u: float, half_v: float) -> Tensor:
    """A rectangle about the origin."""
    return torch.maximum(u.abs() - half_u, v.abs() - half_v)


def polygon(u: Tensor, v: Tensor, sides: int) -> Tensor:
    """A regular polygon with its corners on the unit circle, one of them at the top."""
    wedge = torch.atan2(u, v) % (2 * math.pi / sides) - math.pi / sides
    return u.hypot(v) * wedge.cos() - math.cos(math.pi / sides)


# Each is negative inside the shape and about the distance to its edge, in units of its radius. All
# are their own mirror images in u, so that a flipped image is one that could have been made.
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda u, v: u.hypot(v) - 0.85,
    "ring": lambda u, v: (u.hypot(v) - 0.75).abs() - 0.2,
    "half-disc": lambda u, v: torch.maximum(u.hypot(v - 0.4) - 1, v - 0.4),
    "triangle": lambda u, v: polygon(u, v, 3),
    "square": lambda u, v: polygon(u, v, 4),
    "pentagon": lambda u, v: polygon(u, v, 5),
    "star": lambda u, v: u.hypot(v) - 0.65 - 0.3 * (5 * torch.atan2(u, v)).cos(),
    "cross": lambda u, v: torch.minimum(box(u, v, 1, 0.3), box(u, v, 0.3, 1)),
    "bar": lambda u, v: box(u, v, 1, 0.35),
    "moon": lambda u, v: torch.maximum(u.hypot(v) - 1, 0.8 - u.hypot(v + 0.5)),
}


def paint_shapes(distance: Callable, n: int, draw: torch.Generator, size: int = 32) -> Tensor:
    """n images of one shape on a shade, a stripe in front, noise, uint8 (n, 3, size, size)."""

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.rand(n, channels, 1, 1, generator=draw) * (high - low) + low

    def edge(d: Tensor) -> Tensor:  # d in image halves: 1 inside, 0 outside, one pixel between
        return (0.5 - d * size / 2).clamp(0, 1)

    x = torch.linspace(-1, 1, size).expand(1, 1, size, size)
    y = x.transpose(2, 3)
    slope_x, slope_y = uniform(-0.25, 0.25, 3), uniform(-0.25, 0.25, 3)
    image = uniform(0, 0.5, 3) + slope_x * x + slope_y * y
    cos, sin = (angle := uniform(0, 2 * math.pi)).cos(), angle.sin()
    radius, dx, dy = uniform(0.5, 0.8), x - uniform(-0.1, 0.1), y - uniform(-0.1, 0.1)
    inside = edge(radius * distance((cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius))
    image = image.lerp(uniform(0.5, 1, 3), inside)
    angle = uniform(0, 2 * math.pi)
    stripe = (angle.cos() * x + angle.sin() * y - uniform(-0.8, 0.8)).abs() - uniform(0.03, 0.06)
    image = image.lerp(uniform(0, 1, 3), edge(stripe))
    image += 0.05 * torch.randn(image.shape, generator=draw)
    return image.clamp_(0, 1).mul_(255).round_().byte()


def make_shapes(n: int, part: str) -> tuple[Tensor, Tensor]:
    """n images uint8 (n, 3, 32, 32) and their labels (n,), always the same for the same part."""
    draw = lte.generator("shapes", part)
    labels = torch.randint(len(SHAPES), (n,), generator=draw)
    images = torch.empty(n, 3, 32, 32, dtype=torch.uint8)
    for label, distance in enumerate(SHAPES.values()):
        rows = (labels == label).nonzero()[:, 0]
        images[rows] = paint_shapes(distance, len(rows), draw)
    return images, labels


# --------------------------------------------------------------------------------------------------
# 3 data: which samples form a step, and how they are changed
#
# Samples depend on (seed, step), augmentation on (seed, step, place in the global batch). A process
# names the places it holds; what it gets for them does not depend on who holds the others.
# --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)  # a batch may reach over the end of an epoch
def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The n samples in the order of this epoch, (n,)."""
    return torch.randperm(n, generator=lte.generator(seed, "epoch", epoch))


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The samples of one step, (batch_size,): the next places in an endless row of epochs."""
    first, last = (step - 1) * batch_size, step * batch_size
    epochs = range(first // n, (last - 1) // n + 1)
    parts = (epoch_order(n, seed, e)[max(first - e * n, 0) : last - e * n] for e in epochs)
    return torch.cat(list(parts))


def normalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (b, 3, h, w) -> float32; mean and std (3, 1, 1), of pixels from 0 to 255."""
    return x.float().sub_(mean).div_(std)


class InMemory:
    """Small images of one size, kept on the device as uint8; a whole batch is changed at once."""

    def __init__(self, train, test, classes, *, seed, device, augment, batch_size):
        (images, labels), self.classes = train, classes
        self.seed, self.device, self.batch_size = seed, device, batch_size
        self.train_size, self.test_size = len(images), len(test[0])
        self.image_size = images.shape[3]
        self.random = augment == "crop-flip"
        self.pad = 4 if self.random else 0
        self.images = F.pad(images, [self.pad] * 4).to(device)  # padded once, not at every step
        self.labels, self.test = labels.to(device), [part.to(device) for part in test]
        counts = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(3)])
        levels, share = torch.arange(256.0), counts / counts.sum(1, keepdim=True)  # (3, 256)
        mean = share @ levels
        std = (share @ levels**2 - mean**2).sqrt().clamp(min=1)  # constant channels too
        self.mean, self.std = (m.view(3, 1, 1).to(device) for m in (mean, std))

    def train_batches(self, first_step: int, last_step: int, places: Tensor) -> Iterator:
        """Yields x (len(places), 3, h, h), y (len(places),) for each step, last_step included."""
        size, b = self.image_size, self.batch_size
        windows = self.images.unfold(2, size, 1).unfold(3, size, 1)  # a view: every possible crop
        for step in range(first_step, last_step + 1):
            # Drawn for the whole global batch, then indexed: places stay independent of the split.
            draw = lte.generator(self.seed, "augment", step)
            shifts = torch.randint(2 * self.pad + 1, (2, b), generator=draw)
            flips = (torch.rand(b, generator=draw) < 0.5) & self.random
            rows = batch_indices(self.train_size, b, self.seed, step)
            drawn = torch.stack([rows, *shifts, flips])[:, places].to(self.device)
            x = windows[drawn[0], :, drawn[1], drawn[2]]
            flipped = drawn[3].nonzero()[:, 0]
            x[flipped] = x[flipped].flip(3)
            yield normalise(x, self.mean, self.std), self.labels[drawn[0]]

    def test_batches(self, rank: int, world: int, size: int) -> Iterator:
        """Yields this process's share of the test set, (x, y); the shares do not overlap."""
        x, y = (part[rank::world] for part in self.test)
        for start in range(0, len(y), size):
            part = slice(start, start + size)
            yield normalise(x[part], self.mean, self.std), y[part]


class SeededItems(Dataset):
    """What the workers run: (index, seed) -> uint8 image and class, every draw from the seed."""

    def __init__(self, dataset: Dataset, transform: Callable):
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        try:
            image, label = self.dataset[index]
        except OSError as error:  # where torchvision takes no reader of ours
            name = type(self.dataset).__name__
            raise ValueError(f"image {index} of {name} cannot be read: {error}") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(image), label


class Streamed:
    """Large images, read and augmented by worker processes, normalised on the device."""

    GROUP = 16  # mixup and cutmix pair samples inside groups of this many consecutive places
    MIX = {"mixup": (v2.MixUp, 0.2), "cutmix": (v2.CutMix, 1.0)}  # and alpha of Beta(alpha, alpha)

    def __init__(self, train, test, classes, *, seed, device, augment, batch_size, workers=None):
        self.classes, self.image_size = classes, 224
        self.seed, self.device, self.batch_size = seed, device, batch_size
        self.train_size, self.test_size = len(train), len(test)
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.workers = max(cores, 1) if workers is None else workers
        plain = [v2.RGB(), v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()]
        change = [v2.RGB(), v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        if augment not in ("none", "crop-flip"):
            change.insert(3, v2.RandAugment())
        self.train = SeededItems(train, v2.Compose(plain if augment == "none" else change))
        self.test = SeededItems(test, v2.Compose(plain))
        mix, alpha = self.MIX.get(augment, (None, None))
        self.mix = mix and mix(num_classes=len(classes), alpha=alpha)
        # The usual constants of ImageNet, here for pixels from 0 to 255.
        self.mean = 255 * torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)
        self.std = 255 * torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def load(self, items: SeededItems, batches: Iterator[list[tuple[int, int]]]) -> Iterator:
        """Yields x (b, 3, 224, 224) and y (b,) for each list of (index, seed)."""
        options = dict(num_workers=self.workers, pin_memory=self.device.type == "cuda")
        try:
            for x, y in DataLoader(items, batch_sampler=batches, **options):
                x = normalise(x.to(self.device, non_blocking=True), self.mean, self.std)
                yield x, y.to(self.device, non_blocking=True)
        except ValueError as error:  # a worker wraps it in its traceback; the last line is ours
            raise ValueError(str(error).rsplit("ValueError: ", 1)[-1].strip()) from None

    def train_batches(self, first_step: int, last_step: int, places: Tensor) -> Iterator:
        """Yields x (len(places), 3, 224, 224), y (len(places),) or, if mixed, (..., classes)."""
        steps, firsts = range(first_step, last_step + 1), places[:: self.GROUP]

        def batches():
            for step in steps:
                rows = batch_indices(self.train_size, self.batch_size, self.seed, step)[places]
                pairs = zip(rows.tolist(), places.tolist(), strict=True)
                yield [
                    (row, lte.seed_of(self.seed, "augment", step, place)) for row, place in pairs
                ]

        for step, (x, y) in zip(steps, self.load(self.train, batches()), strict=True):
            yield self.mixed(x, y, step, firsts.tolist()) if self.mix else (x, y)

    def mixed(self, x: Tensor, y: Tensor, step: int, firsts: list[int]) -> tuple[Tensor, Tensor]:
        """Mixes each group by draws of its own: no partner lies in another head's slice."""
        groups, parts = zip(firsts, x.split(self.GROUP), y.split(self.GROUP), strict=True), []
        with torch.random.fork_rng(devices=[]):
            for first, xs, ys in groups:
                torch.manual_seed(lte.seed_of(self.seed, "mix", step, first))
                parts.append(self.mix(xs, ys))
        xs, ys = zip(*parts, strict=True)
        return torch.cat(xs), torch.cat(ys)

    def test_batches(self, rank: int, world: int, size: int) -> Iterator:
        """Yields this process's share of the test set, (x, y); the shares do not overlap."""
        rows = [(row, 0) for row in range(rank, self.test_size, world)]  # nothing is drawn: seed 0
        return self.load(self.test, [rows[i : i + size] for i in range(0, len(rows), size)])


# --------------------------------------------------------------------------------------------------
# 4 data sets
# --------------------------------------------------------------------------------------------------

AUGMENT = "none", "crop-flip", "randaugment", "mixup", "cutmix"
DATASETS = {  # what has to lie under the data folder
    "shapes": "nothing",
    "cifar10": "cifar-10-batches-py/ (--download fetches it)",
    "cifar100": "cifar-100-python/ (--download fetches it)",
    "caltech256": "caltech256/256_ObjectCategories/ (--download fetches it)",
    "stanford_cars": "stanford_cars/ with devkit/, cars_train/, cars_test/ and "
    "cars_test_annos_withlabels.mat (no download any more; needs scipy)",
    "sun397": "SUN397/ (--download fetches it)",
    "places365": "the small images and file lists of Places365 (--download fetches them)",
    "imagenet": "ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar "
    "as downloaded from image-net.org (needs scipy to read the first)",
    "folder": "train/<class>/<image> and val/<class>/<image> or test/<class>/<image>",
}


def read_image(path: str):
    """An RGB image of PIL; names the file that is broken."""
    try:
        return datasets.folder.default_loader(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an image; replace or remove it") from error


def open_dataset(name: str, root: Path, download: bool) -> tuple[Dataset, Dataset, list]:
    """torchvision's training set, test set and class names."""
    # 80 % for training, 20 % for testing, always the same: for data that come without a split.
    split = partial(random_split, lengths=[0.8, 0.2], generator=lte.generator("split"))
    match name:
        case "cifar10" | "cifar100":
            kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            train, test = (kind(root, train=part, download=download) for part in (True, False))
        case "caltech256":
            whole = datasets.Caltech256(root, download=download)
            return *split(whole), whole.categories
        case "sun397":
            whole = datasets.SUN397(root, download=download, loader=read_image)
            # Listed in the order of the file system, which differs from machine to machine.
            order = sorted(range(len(whole)), key=lambda i: str(whole._image_files[i]))
            return *split(Subset(whole, order)), whole.classes
        case "stanford_cars":
            parts = "train", "test"
            train, test = (datasets.StanfordCars(root, part, loader=read_image) for part in parts)
        case "places365":
            options = dict(small=True, download=download, loader=read_image)
            train = datasets.Places365(root, "train-standard", **options)
            test = datasets.Places365(root, "val", **options)
        case "imagenet":
            parts = "train", "val"
            train, test = (datasets.ImageNet(root, part, loader=read_image) for part in parts)
            return train, test, [names[0] for names in train.classes]
        case "folder":
            parts = "train", "val" if (root / "val").is_dir() else "test"
            train, test = (datasets.ImageFolder(root / p, loader=read_image) for p in parts)
            if differ := set(train.classes) ^ set(test.classes):
                raise ValueError(
                    f"training and test folders of {root} must hold the same classes; "
                    f"only one of them has {', '.join(sorted(differ))}"
                )
    return train, test, train.classes


def read_all(samples: list[tuple[str, int]], size: int) -> tuple[Tensor, Tensor]:
    """All images of a folder, uint8 (n, 3, size, size), and their classes (n,)."""
    images = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)

    def read(i: int) -> None:
        image = read_image(samples[i][0])
        if image.size != (size, size):
            raise ValueError(
                f"{samples[i][0]} is {image.width} x {image.height} pixels, the first image of the "
                f"folder {size} wide; small images must be squares of one size"
            )
        images[i] = v2.functional.pil_to_tensor(image)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(read, range(len(samples))):
            pass
    return images, torch.tensor([label for _, label in samples])


def small_images(name: str, train: Dataset, test: Dataset) -> list[tuple[Tensor, Tensor]] | None:
    """Both sets as tensors if the images are small and take less than 2 GB, else None."""
    if name.startswith("cifar"):
        sets = [(torch.from_numpy(part.data), torch.tensor(part.targets)) for part in (train, test)]
        return [(images.permute(0, 3, 1, 2).contiguous(), labels) for images, labels in sets]
    if name == "folder":
        size = max(read_image(train.samples[0][0]).size)
        if size <= 64 and 3 * size**2 * (len(train) + len(test)) < 2e9:
            return [read_all(part.samples, size) for part in (train, test)]
    return None


def load_data(
    name: str, root: str, *, augment="auto", download=False, workers: int | None = None, **options
) -> InMemory | Streamed:
    """Opens a data set, in memory if its images are small, else streamed.

    Args:
        root: the data folder; DATASETS says what has to lie in it.
        augment: one of AUGMENT, or "auto": none for shapes, crop-flip for other small images,
            randaugment for large ones.
        workers: processes that read streamed images; None: this process's share of the cores.
        options: seed, device, batch_size (samples per optimizer step, over all processes).
    """
    if name == "shapes":
        classes, small = list(SHAPES), [make_shapes(20_000, "train"), make_shapes(5_000, "test")]
    else:
        try:
            train, test, classes = open_dataset(name, Path(root), download)
        except (RuntimeError, OSError, ImportError) as error:  # torchvision's for a missing file
            reason = str(error).split(". ")[0]
            need = f"{root} must hold {DATASETS[name]}"
            raise ValueError(f"cannot open {name} ({reason}); {need}") from error
        small = small_images(name, train, test)
    if small is None:
        augment = "randaugment" if augment == "auto" else augment
        return Streamed(train, test, classes, augment=augment, workers=workers, **options)
    if augment == "auto":  # shapes were already placed and turned at random
        augment = "none" if name == "shapes" else "crop-flip"
    if augment not in ("none", "crop-flip"):
        raise ValueError(f"augment {augment!r} needs large images; {name} takes none or crop-flip")
    return InMemory(*small, classes, augment=augment, **options)


# --------------------------------------------------------------------------------------------------
# 5 arguments
# --------------------------------------------------------------------------------------------------

# What a method is where no flag says otherwise: its heads (None: --heads), steps between merges (0:
# one merge, at the end), reset, rank and rate.
METHODS = {
    "lte": dict(heads=None, merge_every=4, reset="none", r=32, lr=1e-3),
    "mhlora": dict(heads=None, merge_every=0, reset="none", r=32, lr=1e-3),
    "lora": dict(heads=1, merge_every=0, reset="none", r=4, lr=1e-3),
    "relora": dict(heads=1, merge_every=50, reset="AB", r=4, lr=1e-3),
    "localsgd": dict(heads=None, merge_every=4, reset="none", r=32, lr=2e-3),
    "dense": dict(heads=1, merge_every=0, reset="none", r=32, lr=2e-3),
}
ONE_PROCESS = ("mhlora", "lora", "relora")
UNMERGED = ("mhlora", "lora", "dense")  # till the end: tested at any step, merged in a copy

# The rows of README's CIFAR-10 table, and the paper's main setting. Rate, batch and steps of the
# latter are our guess: the rate is a twentieth of dense AdamW's usual 1e-3, as s = 64 asks for.
CIFAR = "--dataset folder --data cifar --steps 250 --warmup 30"
CIFAR1024 = f"{CIFAR} --batch-size 1024"
WIDE = "--r 128 --lora-alpha 4096 --merge-every 1 --lr 1.25e-4"  # r: vit-nano's width
TWO = "--heads 2 --r 64"  # half of the batch for each, at the N r of four heads of rank 32
PRESETS = {
    "cifar-dense": f"{CIFAR} --method dense",
    "cifar-mhlora": f"{CIFAR} --method mhlora",
    "cifar-lte": CIFAR,
    "cifar-lte-two": f"{CIFAR} {TWO} --lr 5e-4",
    "cifar-lte-nf4": f"{CIFAR} --base nf4 --wire bf16",
    "cifar-lte-wide": f"{CIFAR} {WIDE}",
    "cifar-lte-wide-nf4": f"{CIFAR} {WIDE} --base nf4 --wire bf16",
    "cifar-localsgd": f"{CIFAR} --method localsgd",
    "cifar-relora": f"{CIFAR} --method relora --r 8 --lr 5e-4",
    "cifar-lora": f"{CIFAR} --method lora --r 8",
    "cifar1024-dense": f"{CIFAR1024} --method dense --lr 4e-3",
    "cifar1024-lte": CIFAR1024,
    "cifar1024-lte-two": f"{CIFAR1024} {TWO}",
    "cifar1024-lte-wide": f"{CIFAR1024} {WIDE}",
    "paper": "--dataset folder --data imagenet100 --model vit-small --patch 32 --heads 32 --r 64 "
    "--lora-alpha 4096 --merge-every 10 --lr 5e-5 --batch-size 1024 --steps 37000 --warmup 1000",
}

# What --study trains: a question, flags for all its rows, and the flags of each row.
SMALL = "--steps 100 --warmup 20"  # of vit-nano on shapes: a minute a row on a laptop
STUDIES = {
    "cifar": (
        "Does LTE match dense training on CIFAR-10 (JPEG)? Each method at its own best rate.",
        "",
        {name[6:]: f"--preset {name}" for name in PRESETS if name.startswith("cifar-")},
    ),
    "batch": (
        "At which rank does LTE match dense training on CIFAR-10 (JPEG), batches of 1024?",
        "",
        {name[10:]: f"--preset {name}" for name in PRESETS if name.startswith("cifar1024-")},
    ),
    "long": (
        "And four times as long, where rates have to be lower?",
        "--steps 1000",
        {
            "dense": "--preset cifar-dense",
            "lte-wide": "--preset cifar-lte-wide --lr 6.25e-5",
            "lte": "--preset cifar-lte --lr 5e-4",
            "lora": "--preset cifar-lora --lr 5e-4",
        },
    ),
    "rank": (
        "What does a head's rank buy? 4 heads.",
        SMALL,
        {f"r = {r}": f"--r {r}" for r in (4, 16, 32, 64, 128)},
    ),
    "heads": (
        "Heads against rank at N r = 128: few heads of high rank, or many of low rank?",
        SMALL,
        {f"N = {128 // r}, r = {r}": f"--heads {128 // r} --r {r}" for r in (128, 64, 32, 16, 8)},
    ),
    "interval": (
        "What does it cost to merge rarely?",
        SMALL,
        {f"T = {T}": f"--merge-every {T}" for T in (1, 2, 4, 8, 16)}
        | {"T from 1 to 8": "--merge-every 8 --merge-warmup 50"},
    ),
    "reset": (
        "Keep the factors and the optimizer's state at a merge, or start again?",
        f"{SMALL} --merge-every 8",
        {f"reset {reset}": f"--reset {reset}" for reset in ("none", "B", "AB")},
    ),
    "init": (
        "How should A start? The rate was tuned for the first.",
        SMALL,
        {init: f"--init {init}" for init in lte.INITS},
    ),
    "scale": (
        "Scale s against rate: with Adam their product counts, until it is too large.",
        f"{SMALL} --r 32",
        {
            f"s = {s}, rate {rate}": f"--lora-alpha {32 * s} --lr {rate}"
            for s, rate in ((2, 4e-3), (8, 1e-3), (32, 2.5e-4), (2, 1e-3), (32, 1e-3))
        },
    ),
    "noise": (
        "How much of the loss is gradient noise? Every head on the whole batch, or on its share.",
        SMALL,
        {
            "its share": "",
            "the whole batch": "--full-batch",
            "its share, T = 1": "--merge-every 1",
            "the whole batch, T = 1": "--merge-every 1 --full-batch",
            "multi-head LoRA": "--method mhlora",
        },
    ),
    "distance": (
        "How far are heads apart, and how many directions has the update?",
        SMALL,
        {
            "4 heads": "",
            "4 heads, the whole batch": "--full-batch",
            "16 heads, r = 8": "--heads 16 --r 8",
        },
    ),
    "base": (
        "How coarse may the frozen W be, and what is the exact master for?",
        SMALL,
        {base: f"--base {base}" for base in lte.BASES}
        | {f"{base}, no master": f"--base {base} --no-master" for base in ("int8", "nf4")},
    ),
    "bytes": (
        "What does accuracy cost in bytes?",
        SMALL,
        {"dense": "--method dense", "local SGD": "--method localsgd"}
        | {f"T = {T}": f"--merge-every {T}" for T in (1, 4, 16)}
        | {
            f"nf4, bf16 wire, T = {T}": f"--base nf4 --wire bf16 --merge-every {T}"
            for T in (4, 16)
        },
    ),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help="flags of a CIFAR-10 row, or the paper's")
    add = parser.add_argument_group("what to train").add_argument
    add("--method", default="lte", choices=METHODS, help="how to train (lte)")
    add("--model", default="vit-nano", choices=MODELS, help="architecture (vit-nano)")
    add("--patch", type=int, help="patch side in pixels (4, nano 8; of 224 px 16)")
    add("--dataset", default="shapes", choices=DATASETS, help="images (shapes, made on the spot)")
    add("--data", default="data", metavar="DIR", help="where images are, or are put (data)")
    add("--download", action="store_true", help="fetch the data set where torchvision can")
    add(
        "--augment",
        default="auto",
        choices=("auto", *AUGMENT),
        help="of training images (auto: what suits the data set)",
    )
    add = parser.add_argument_group("the heads").add_argument
    add("--heads", type=int, default=4, help="N, low-rank heads over all processes (4)")
    add("--r", type=int, help="r, rank of one head (32; lora, relora: 4, one small head)")
    add("--lora-alpha", type=float, help="s = lora_alpha / r (8 r, so s = 8)")
    add("--init", default="orthogonal", choices=lte.INITS, help="how A starts (orthogonal)")
    add("--base", default="fp32", choices=lte.BASES, help="storage of the frozen W (fp32)")
    add("--merge-every", type=int, help="T, steps between merges (4; relora: 50)")
    add("--merge-warmup", type=int, default=0, help="steps over which T grows from 1 (0)")
    add("--reset", choices=("none", "B", "AB"), help="what lte starts anew at a merge (none)")
    add("--wire", default="fp32", choices=lte.BASES, help="what deltas are sent as (fp32)")
    add("--overlap", type=int, default=0, help="K, steps trained while a merge travels (0)")
    add("--outer-lr", type=float, default=1.0, help="rate at which W takes the mean (1)")
    add("--outer-momentum", type=float, default=0.0, help="Nesterov, over merges (0)")
    add("--full-batch", action="store_true", help="every head sees the whole batch, not its share")
    add("--no-master", action="store_true", help="merge into the rounded W, to see what it costs")
    add = parser.add_argument_group("the optimization").add_argument
    add("--steps", type=int, default=400, help="optimizer steps (400)")
    add("--batch-size", type=int, default=256, help="samples a step, all processes (256)")
    add("--accumulate", type=int, default=1, help="micro-batches a step (1)")
    add("--lr", type=float, help="peak rate of AdamW (1e-3; dense, localsgd: 2e-3)")
    add("--weight-decay", type=float, default=0.05, help="of matrices, W at merges (0.05)")
    add("--warmup", type=int, default=50, help="steps of linear warm-up, then cosine (50)")
    add("--clip", type=float, default=1.0, help="largest gradient norm, per head (1)")
    add("--label-smoothing", type=float, default=0.0, help="share spread over all classes (0)")
    add("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (0)")
    add = parser.add_argument_group("what comes out").add_argument
    add("--out", default="out", metavar="DIR", help="log.csv, model.pt, result.json go here (out)")
    add(
        "--export",
        choices=("exact", "forward"),
        default="exact",
        help="model.pt holds the exact W, or forward: as --base rounds it, as heads learn with it",
    )
    add("--eval-every", type=int, help="steps between tests (a tenth of all)")
    add("--eval-only", metavar="FILE", help="test this model.pt and stop")
    add("--compare", nargs="+", choices=METHODS, help="train with each of these, one table")
    add("--study", choices=STUDIES, help="train one after the other what a question asks for")
    add("--subspaces", action="store_true", help="log how far heads are apart, at every test")
    add("--plot", action="store_true", help="draw OUT/*.png (needs matplotlib)")
    add("--bench", action="store_true", help="time a step beside a dense one, and stop")
    add("--plan", metavar="WORKERS,MBIT", help="count what so many would hold and send, and stop")
    add = parser.add_argument_group("stopping and going on").add_argument
    add("--save-every", type=int, help="steps between checkpoints in OUT/checkpoints (none)")
    add(
        "--resume",
        nargs="?",
        const="last",
        choices=("last", "previous", "auto"),
        help="go on from the last checkpoint; previous: the one before, where that is not whole; "
        "auto: begin where there is none",
    )
    add("--timeout", type=float, default=300, help="seconds to wait for other processes (300)")
    return parser


RANGES = [
    ("heads r steps batch_size accumulate merge_every", lambda n: n >= 1, "1 or more"),
    ("eval_every save_every", lambda n: n >= 1, "1 or more"),
    ("warmup merge_warmup weight_decay overlap", lambda x: x >= 0, "0 or more"),
    ("lr lora_alpha clip outer_lr timeout", lambda x: 0 < x < math.inf, "above 0"),
    ("label_smoothing outer_momentum", lambda x: 0 <= x < 1, "from 0 to below 1"),
]


def parse_args(argv=None) -> argparse.Namespace:
    """The arguments, checked as far as they can be without data or model."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.preset:  # its flags first, so that those given beside it hold
        args = parser.parse_args(PRESETS[args.preset].split() + argv)
    args.argv = argv
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    args.rank = int(os.environ.get("RANK", 0))
    for names, fits, rule in RANGES:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not fits(value):
                parser.error(f"--{name.replace('_', '-')} {value}: must be {rule}")
    if args.reset and args.method != "lte" and not args.compare:
        parser.error(f"--reset is lte's alone; --method {args.method} has its own")
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    if args.plan:
        try:
            workers, mbit = args.plan.split(",")
            args.plan = int(workers), float(mbit)
        except ValueError:
            parser.error(f"--plan {args.plan}: must be WORKERS,MBIT, such as 8,100")
        if args.plan[0] < 1 or args.heads % args.plan[0] or args.plan[1] <= 0:
            parser.error(
                f"--plan {args.plan[0]},{args.plan[1]:g}: --heads {args.heads} must be a multiple "
                "of the workers, and a link carries more than 0 Mbit/s"
            )
    if (args.plan or args.bench) and (args.world > 1 or args.method != "lte"):
        parser.error("--bench and --plan compare lte with dense training, on one process")
    if args.study and (args.world > 1 or args.bench or args.plan or args.compare or args.eval_only):
        parser.error("--study runs on one process, without --bench, --plan, --compare, --eval-only")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return args


def layout_error(run: argparse.Namespace) -> str | None:
    """What is wrong with heads, processes, batch and merges of one method's settled arguments."""
    heads, world, batch = run.heads, run.world, run.batch_size
    if run.overlap and (run.reset != "none" or run.overlap >= run.merge_every):
        return (
            f"--overlap {run.overlap} needs a merge that arrives before the next is sent, and no "
            f"reset; --merge-every is {run.merge_every}, --reset {run.reset}"
        )
    if run.merge_warmup and (run.reset != "none" or run.overlap):
        return (
            f"--merge-warmup {run.merge_warmup} merges at every step at first, which leaves no "
            f"time for --overlap {run.overlap} or for --reset {run.reset}; leave those out"
        )
    if run.no_master and (world > 1 or run.base == "fp32" or run.overlap):
        return "--no-master needs one process, a --base that rounds, and no --overlap"
    if run.method in ONE_PROCESS and world > 1:
        return (
            f"--method {run.method} runs on one process, but torchrun started {world}; "
            "use `python train.py`"
        )
    if heads % world and run.method != "dense":
        return f"--heads {heads} do not spread over {world} processes; use a multiple of {world}"
    parts = math.lcm(heads, world) * run.accumulate
    if batch % parts:
        return (
            f"--batch-size {batch} does not split into {heads} heads, {world} processes and "
            f"{run.accumulate} micro-batches; use a multiple of {parts}"
        )
    parts = math.lcm(heads, world)
    if run.augment in ("mixup", "cutmix") and batch // parts % Streamed.GROUP:
        return (
            f"--augment {run.augment} mixes groups of {Streamed.GROUP} samples, but a head or "
            f"process has {batch // parts}; use a --batch-size that is a multiple of "
            f"{Streamed.GROUP * parts}"
        )
    return None


def settle(args: argparse.Namespace, method: str) -> argparse.Namespace:
    """A copy of args for one method, its own settings filled in where none was given."""
    run, own = argparse.Namespace(**vars(args)), METHODS[method]
    run.method = method
    run.heads, run.workers = own["heads"] or args.heads, args.heads
    run.r = own["r"] if args.r is None else args.r
    run.lora_alpha = 8.0 * run.r if args.lora_alpha is None else args.lora_alpha
    run.lr = own["lr"] if args.lr is None else args.lr
    run.reset = args.reset if args.reset and method == "lte" else own["reset"]
    run.merge_every = (args.merge_every or own["merge_every"]) if own["merge_every"] else args.steps
    if method in ("dense", "localsgd"):  # nothing frozen, nothing to quantize
        run.base, run.no_master = "fp32", False
    if method not in ("lte", "localsgd"):  # one head, or no merges: plain ones
        run.overlap, run.outer_lr, run.outer_momentum, run.merge_warmup = 0, 1.0, 0.0, 0
        run.full_batch = False
    return run


# --------------------------------------------------------------------------------------------------
# 6 one step of training
# --------------------------------------------------------------------------------------------------


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Rate of step 1 .. steps: warm-up, cosine to zero; after each reset a short warm-up again."""
    # 1) linear warm-up over the first steps
    rate = args.lr * min(1.0, step / max(1, args.warmup))
    # 2) cosine from the end of the warm-up to zero one step after the last
    progress = max(0, step - args.warmup) / max(1, args.steps + 1 - args.warmup)
    rate *= 0.5 * (1 + math.cos(math.pi * progress))
    # 3) new factors start with empty moments: let them fill at a small rate
    if args.reset != "none" and step > args.merge_every:
        since = (step - 1) % args.merge_every + 1
        rate *= min(1.0, since / (1 + min(args.warmup, args.merge_every // 4)))
    return rate


def new_model(args, data, device) -> nn.Module:
    """The plain model, its weights drawn from the seed."""
    torch.manual_seed(args.seed)
    sizes = dict(classes=len(data.classes), image_size=data.image_size, patch=args.patch)
    return build_model(args.model, **sizes).to(device)


def make_model(args, data, device) -> nn.Module:
    """The plain model, given to the heads that the method asks for."""
    model = new_model(args, data, device)
    if args.method == "dense":
        if args.world == 1:
            return model
        # The view saves data parallel training 4 bytes a parameter.
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    factors = dict(r=args.r, lora_alpha=args.lora_alpha, init=args.init, base=args.base)
    if args.method == "localsgd":
        factors = dict(r=None)
    parallel = args.method != "mhlora"
    return lte.convert(model, heads=args.heads, parallel=parallel, seed=args.seed, **factors)


def make_optimizer(args, model) -> torch.optim.Optimizer:
    """AdamW. Weight decay only on dense matrices: for the heads W decays at the merge instead."""
    matrix_dim = {"dense": 2, "localsgd": 3}.get(args.method, math.inf)  # copies are stacked
    groups = {}
    for p in model.parameters():
        own = p if args.method == "dense" else p[0]  # what one head has
        # The fused kernel rounds differently past the last whole vector, and where that lies
        # depends on how many heads are here; such odd sizes are few and small.
        fused = p.is_cuda or own.numel() % 16 == 0
        decay = args.weight_decay if p.dim() >= matrix_dim else 0.0
        groups.setdefault((decay, fused), []).append(p)
    groups = [dict(params=ps, weight_decay=wd, fused=fused) for (wd, fused), ps in groups.items()]
    return torch.optim.AdamW(groups, lr=args.lr)


def make_outer_optimizer(args, model) -> torch.optim.Optimizer | None:
    """SGD on the merged weights, with minus the mean of the heads' changes as gradient.

    At rate 1 without momentum that is W <- W + mean, which lte.merge does without an optimizer.
    """
    if args.outer_lr == 1 and args.outer_momentum == 0:
        return None
    momentum = args.outer_momentum
    options = dict(lr=args.outer_lr, momentum=momentum, nesterov=momentum > 0)
    return torch.optim.SGD(lte.outer_parameters(model), **options)


def train_step(model, forward, optimizer, x, y, args) -> Tensor:
    """One optimizer step on this process's samples; returns each head's loss before it (n,)."""
    heads = 1 if args.method in ("dense", "mhlora") else args.heads // args.world  # with own data
    xs = x.unflatten(0, (heads, args.accumulate, -1))  # (n, micro-batches, b, 3, h, w)
    ys = y.unflatten(0, (heads, args.accumulate, -1))
    total = torch.zeros(heads, device=x.device)
    for k in range(args.accumulate):
        last = k == args.accumulate - 1
        ddp = args.method == "dense" and args.world > 1
        sync = lte.collective("all-reduce of gradients") if ddp else nullcontext()
        with model.no_sync() if ddp and not last else sync, autocast(args, x.device):
            logits = forward(xs[:, k].flatten(0, 1))
            losses = F.cross_entropy(
                logits.float(),
                ys[:, k].flatten(0, 1),
                reduction="none",
                label_smoothing=args.label_smoothing,
            )
            loss = losses.mean() if args.method == "dense" else lte.head_loss(losses, model)
            (loss / args.accumulate).backward()
        total += losses.detach().view(heads, -1).mean(1) / args.accumulate
    if args.method == "dense":
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    else:
        lte.clip_grad_norm_(model, args.clip)
    optimizer.step()
    optimizer.zero_grad()
    return total


def autocast(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)


@torch.no_grad()
def evaluate(model, data, args, device) -> tuple[float, float]:
    """(accuracy, mean loss in nats without smoothing); all processes share the test images."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # correct, loss, samples
    for x, y in data.test_batches(args.rank, args.world, min(500, args.batch_size)):
        with autocast(args, device):
            logits = model(x).float()
        loss = F.cross_entropy(logits, y, reduction="sum")
        sums += torch.stack([(logits.argmax(1) == y).sum(), loss, y.new_tensor(len(y))]).double()
    if args.world > 1:
        with lte.collective("test"):
            dist.all_reduce(sums)
    model.train()
    correct, loss, samples = sums.tolist()
    return correct / samples, loss / samples


REMEDY = "lower --lr or --lora-alpha, or warm up longer"


def check_finite(losses: list[Tensor], step: int, model, args) -> None:
    """Stop before what is not a number is tested or saved; names step and head.

    Args:
        losses: of the steps up to `step` since the last check, each (heads here).
    """
    losses = torch.stack(losses)
    first = args.rank * losses.shape[1]  # head of this process
    if len(bad := (~losses.isfinite()).nonzero()):
        past, head = bad[0].tolist()
        raise FloatingPointError(
            f"the loss of head {first + head} is {losses[past, head]:.4g} at step "
            f"{step - len(losses) + past + 1}; {REMEDY}"
        )
    names, weights = zip(*model.named_parameters(), strict=True)
    per_head = [p.flatten(1) if args.method != "dense" else p.view(1, -1) for p in weights]
    if len(bad := torch.stack([~w.isfinite().all(1) for w in per_head]).nonzero()):
        which, head = bad[0].tolist()
        raise FloatingPointError(
            f"{names[which]} of head {first + head} is not finite after step {step}; {REMEDY}"
        )


# --------------------------------------------------------------------------------------------------
# 7 a run: the loop, and what it reports
# --------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, data, device: torch.device) -> dict:
    """One run of one method; writes log.csv, model.pt, and result.json, which it returns."""
    forget_peak(device)
    model = make_model(args, data, device)
    optimizer = make_optimizer(args, model)
    merges = Merges(args, model, optimizer)
    forward = torch.compile(model) if args.compile else model
    share = args.batch_size // args.world
    places = torch.arange(args.rank * share, (args.rank + 1) * share)
    if args.full_batch:
        places = torch.arange(args.batch_size).repeat(args.heads // args.world)
    report = Report(args, model, data, device, merges)
    saved = Checkpoints(args, report, optimizer, merges)
    step, losses = saved.resume(), []
    stop = Stop(args, device)

    try:
        for x, y in data.train_batches(step + 1, args.steps, places):
            # ---- one step of training ----
            step += 1
            rate = learning_rate(step, args)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = train_step(model, forward, optimizer, x, y, args)  # (heads here)
            merged = merges.step(step, rate)

            # ---- everything below is only reporting and saving ----
            if args.method in UNMERGED:  # a merge looks for itself
                losses.append(loss)
                # Before a test, a save (a SIGTERM's comes at a tenth step), and the end.
                soon = 10, args.eval_every, args.save_every or 10, args.steps
                if not all(step % n for n in soon):
                    check_finite(losses, step, model, args)
                    losses = []
            report.step(step, loss, rate, merged)
            if merges.due(step) or args.method in UNMERGED and step % 10 == 0:
                stop.agree()
            saved.step(step, stop.agreed)
    except (lte.ProcessLost, FloatingPointError) as error:
        raise type(error)(f"step {step}: {error}") from error
    finally:
        # After a loss torchrun's SIGTERM follows, and main has yet to say why: then keep noting it.
        if not isinstance(sys.exception(), lte.ProcessLost):
            stop.let_go()
    return report.finish()


def merge_steps(args: argparse.Namespace) -> set[int]:
    """The steps to merge after: every T, or fewer until step --merge-warmup; and the last one."""
    steps, step = set(), 0
    while step < args.steps:
        growing = step < args.merge_warmup
        interval = args.merge_every * step // args.merge_warmup if growing else args.merge_every
        step = min(step + max(1, interval), args.steps)
        steps.add(step)
    return steps


class Merges:
    """When W takes up what the heads have learnt: after each of merge_steps.

    With --overlap K what is sent then is applied K steps later; the heads go on meanwhile.
    """

    def __init__(self, args, model, optimizer):
        self.args, self.model, self.optimizer = args, model, optimizer
        self.outer = None if args.method == "dense" else make_outer_optimizer(args, model)
        self.decay, self.count, self.work, self.sent = 1.0, 0, None, 0
        self.steps = merge_steps(args)
        self.forget_master()

    def forget_master(self) -> None:
        """With --no-master: W is from now on what its rounding says."""
        for m in lte.merged_tensors(self.model) if self.args.no_master else ():
            if m.master is not None:
                m.master.copy_(lte.decode(m.rows, m.base, m.dtype))

    def due(self, step: int) -> bool:
        return step in self.steps

    def step(self, step: int, rate: float) -> bool:
        """To be called after every optimizer step; True where W is new."""
        args, last = self.args, step == self.args.steps
        if args.method == "dense":
            return self.due(step)
        if args.method not in UNMERGED:  # lora's and mhlora's W stays as it is till the end
            self.decay *= 1 - rate * args.weight_decay
        arrives = self.work and (last or step == self.sent + args.overlap)
        if arrives:
            self.work.wait()
            self.work = None
        if not self.due(step):
            return bool(arrives)
        self.work = lte.merge(
            self.model,
            optimizer=self.optimizer,
            reset="none" if last else args.reset,
            decay=self.decay,
            wire=args.wire,
            outer_optimizer=self.outer,
            async_op=args.overlap > 0 and not last,
        )
        self.decay, self.sent, self.count = 1.0, step, self.count + 1
        self.forget_master()
        return not self.work


class Stopped(Exception):
    """A SIGTERM was answered: the run is saved and can go on."""


class Stop:
    """A SIGTERM, a scheduler's notice, ends a run where all its processes agree: after a merge.

    The first one is only noted, the second one kills. After a process was lost no agreement comes
    about, so that nothing half-done is saved.
    """

    def __init__(self, args, device):
        self.args, self.device, self.noticed, self.agreed = args, device, False, False
        self.before = signal.signal(signal.SIGTERM, self.notice)

    def notice(self, *_) -> None:
        self.noticed = True
        self.let_go()

    def let_go(self) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def agree(self) -> None:
        """Sets agreed: did any process get the signal? Collective."""
        self.agreed = self.noticed
        if self.args.world > 1:
            asked = torch.tensor(float(self.noticed), device=self.device)
            with lte.collective("agreeing on whether to stop"):
                dist.all_reduce(asked, dist.ReduceOp.MAX)
            self.agreed = bool(asked)


class Checkpoints:
    """OUT/checkpoints: what lte.save keeps, and this program's own counters beside it."""

    # What a run must have in common with the one that it goes on from.
    FLAGS = (
        "method model patch dataset augment heads r lora_alpha init base merge_every merge_warmup "
        "reset wire overlap outer_lr outer_momentum full_batch no_master steps batch_size "
        "accumulate lr weight_decay warmup clip label_smoothing bf16 seed subspaces"
    )

    def __init__(self, args, report, optimizer, merges):
        self.args, self.report, self.merges, self.due = args, report, merges, False
        self.folder = Path(args.out) / "checkpoints"
        self.parts = report.model, optimizer, merges.outer

    def step(self, step: int, stopping: bool) -> None:
        """Save where --save-every asks for it or the run is to stop, once no merge travels."""
        self.due |= stopping or bool(self.args.save_every and step % self.args.save_every == 0)
        if self.due and not self.merges.work:
            self.due, merges = False, dict(decay=self.merges.decay, count=self.merges.count)
            flags = {name: getattr(self.args, name) for name in self.FLAGS.split()}
            own = dict(flags=flags, merges=merges, report=self.report.state())
            lte.save(self.folder, *self.parts, step=step, **own)
            self.report.say(f"step {step}  saved in {self.folder}")
            if stopping:
                raise Stopped(f"stopped at step {step} as asked, and saved; --resume goes on")

    def resume(self) -> int:
        """Steps done: 0, or those of the checkpoint that this run was asked to go on from.

        A process group that torchrun has started again (--max-restarts) needs no asking.
        """
        args, found, restarted = self.args, lte.checkpoints(self.folder), restarts() > 0
        may_begin = args.resume in (None, "auto") or args.compare or args.study or restarted
        if not found and may_begin:
            self.report.start_log(0)
            return 0
        if found and not (args.resume or restarted):
            raise ValueError(
                f"{found[0]} is of an earlier run; go on from it with --resume, remove "
                f"{self.folder}, or choose another --out"
            )
        previous = args.resume == "previous"
        flags = lte.newest(self.folder, previous)[1]["extra"]["flags"]
        for name, theirs in flags.items():
            if theirs != getattr(args, name):
                flag = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{self.folder} was saved by a run with {flag} {theirs}, this one has "
                    f"{getattr(args, name)}; go on with the same flags, or choose another --out"
                )
        extra = lte.load(self.folder, *self.parts, previous=previous)
        self.merges.decay, self.merges.count = extra["merges"]["decay"], extra["merges"]["count"]
        self.report.restore(extra["step"], extra["report"])
        return extra["step"]


class Report:
    """What a run tells: a progress line, log.csv, and at the end model.pt and result.json."""

    COLUMNS = "step,images,lr,train_loss,test_loss,test_accuracy,bytes_sent,seconds,merges"
    SUBSPACES = ("cosine", "grassmann", "effective_rank")  # more columns, with --subspaces

    def __init__(self, args, model, data, device, merges):
        self.args, self.data, self.device, self.merges = args, data, device, merges
        self.model = getattr(model, "module", model)  # without DistributedDataParallel around it
        self.out, self.next_test = Path(args.out), args.eval_every
        self.accuracy = self.test_loss = math.nan
        self.worlds = {args.world}  # numbers of processes that have trained this run
        if args.method == "dense":
            self.parameters, owners = sum(p.numel() for p in model.parameters()), "all dense"
        else:
            owned = {kind: sum(sizes.values()) for kind, sizes in lte.census(model).items()}
            self.parameters = sum(owned.values())
            owners = ", ".join(f"{size:,} {kind}" for kind, size in owned.items())
        # Where one process runs all heads nothing is sent; then what N workers would send.
        self.workers = args.world if args.world > 1 else max(args.workers, 2)
        self.dense_bytes = 8 * self.parameters * (self.workers - 1) / self.workers
        self.say(f"{args.method}: {args.model} on {args.dataset}, {self.parameters:,} parameters")
        self.say(f"their owners: {owners}")
        if args.method != "dense":
            self.say_costs(merges)
        self.losses, self.testing = [], 0.0  # since the last test; seconds spent on tests
        self.step_ends = []  # in seconds of training
        self.started = self.printed = time.perf_counter()

    def say_costs(self, merges) -> None:
        """What this process will hold, beside data parallel AdamW."""
        # Given the wire, it asks for bitsandbytes where that needs it: now, not at the first merge.
        options = dict(outer_optimizer=merges.outer, wire=self.args.wire)
        cost = lte.cost_report(self.model, merges.optimizer, **options)
        held, dense = cost["held"], cost["held_dense"]["all"] / 1e6
        kinds = [f"{n / 1e6:.1f} {kind}" for kind, n in held.items() if n and kind != "all"]
        self.say(f"held by a process: {held['all'] / 1e6:.1f} MB = {' + '.join(kinds)}")
        self.say(f"held by data parallel AdamW: {dense:.1f} MB; activations come on top of both")

    def start_log(self, step: int) -> None:
        """log.csv with its rows up to this step."""
        if self.args.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            log, rows = self.out / "log.csv", []
            if step and log.exists():
                rows = [r for r in log.read_text().splitlines()[1:] if int(r.split(",")[0]) <= step]
            columns = ",".join([self.COLUMNS, *(self.SUBSPACES if self.args.subspaces else ())])
            text = "\n".join([columns, *rows]) + "\n"
            write_aside(log, lambda path: path.write_text(text))

    KEPT = "next_test accuracy test_loss testing"

    def state(self) -> dict:
        """What a checkpoint keeps of it."""
        kept = {name: getattr(self, name) for name in self.KEPT.split()}
        losses = [loss.item() for loss in self.losses]
        kept |= dict(losses=losses, elapsed=time.perf_counter() - self.started)
        return kept | dict(worlds=sorted(self.worlds))

    def restore(self, step: int, state: dict) -> None:
        for name in self.KEPT.split():
            setattr(self, name, state[name])
        self.worlds |= set(state["worlds"])
        self.losses = [torch.tensor(loss, device=self.device) for loss in state["losses"]]
        self.started = time.perf_counter() - state["elapsed"]
        self.start_log(step)
        self.say(f"step {step}  goes on from {self.out / 'checkpoints'}")

    def say(self, line: str) -> None:
        if self.args.rank == 0:
            print(line, flush=True)

    def bytes_sent(self, step: int) -> int:
        """Bytes that left one process so far: counted, or computed for `workers` of them."""
        if self.args.method == "dense":
            return round(self.dense_bytes * step)
        if self.args.world > 1:
            return lte.layout_of(self.model).bytes_sent
        if self.args.method in ONE_PROCESS or self.args.heads % self.workers:
            return 0
        cost = lte.cost_report(self.model, wire=self.args.wire, workers=self.workers)
        return self.merges.count * cost["sent"]["merge"]

    def step(self, step: int, loss: Tensor, rate: float, merged: bool) -> None:
        """A test when one is due and the merged model is new; a line every five seconds."""
        self.losses.append(loss.mean())
        self.step_ends.append(self.seconds())
        every, new = self.args.eval_every, merged or self.args.method in UNMERGED
        if new and step >= self.next_test or step == self.args.steps:
            self.next_test = (step // every + 1) * every
            self.test(step, rate)
        elif time.perf_counter() - self.printed > 5:
            self.progress(step)

    def test(self, step: int, rate: float) -> None:
        begun, model = time.perf_counter(), self.model
        if self.args.method in ("lora", "mhlora"):
            lte.merge(model := copy.deepcopy(model))
        self.accuracy, self.test_loss = evaluate(model, self.data, self.args, self.device)
        self.testing += time.perf_counter() - begun
        self.progress(step)
        row = (
            f"{step},{step * self.args.batch_size},{rate:.6g},{self.train_loss():.5f},"
            f"{self.test_loss:.5f},{self.accuracy:.5f},{self.bytes_sent(step)},"
            f"{time.perf_counter() - self.started:.2f},{self.merges.count}"
        )
        if self.args.subspaces:
            row += "".join(f",{value:.5f}" for value in self.subspaces().values())
        if self.args.rank == 0:
            with open(self.out / "log.csv", "a") as file:
                file.write(row + "\n")
        self.losses = []

    def subspaces(self) -> dict[str, float]:
        """Means over the low-rank layers of what lte.subspace_report says; NaN without any."""
        dense = self.args.method == "dense"
        layers = [] if dense else list(lte.subspace_report(self.model).values())
        return {
            name: statistics.fmean(layer[name] for layer in layers) if layers else math.nan
            for name in self.SUBSPACES
        }

    def train_loss(self) -> float:
        """Mean since the last test over the heads of this process; log.csv has process 0's."""
        return torch.stack(self.losses).mean().item()

    def seconds(self) -> float:
        """Spent on training alone."""
        return time.perf_counter() - self.started - self.testing

    def seconds_per_step(self) -> float | None:
        """Mean without the first step, which warms up, and the last, whose merge is waited for."""
        ends = self.step_ends[:-1]
        return round((ends[-1] - ends[0]) / (len(ends) - 1), 4) if len(ends) > 1 else None

    def progress(self, step: int) -> None:
        self.printed, seconds = time.perf_counter(), self.seconds()
        accuracy = "-" if math.isnan(self.accuracy) else f"{100 * self.accuracy:.1f} %"
        self.say(
            f"step {step}/{self.args.steps}  loss {self.train_loss():.3f}  accuracy {accuracy}  "
            f"{step * self.args.batch_size / seconds:.0f} images/s  "
            f"{self.bytes_sent(step) / 1e6:.1f} MB sent  "
            f"{seconds / step * (self.args.steps - step):.0f} s left"
        )

    def finish(self) -> dict:
        """Export, test what was exported, write model.pt and result.json (aside, then renamed)."""
        args, seconds, sent = self.args, self.seconds(), self.bytes_sent(self.args.steps)
        dense, peak = args.method == "dense", peak_memory(self.device)  # before the export
        exact = args.export == "exact"
        weights = self.model.state_dict() if dense else lte.merged_state_dict(self.model, exact)
        plain = new_model(args, self.data, self.device)
        plain.load_state_dict(weights)
        accuracy, loss = evaluate(plain, self.data, args, self.device)
        if not math.isfinite(loss):
            raise FloatingPointError(f"after step {args.steps} the test loss is {loss}; {REMEDY}")
        names = "method dataset model heads r lora_alpha merge_every reset base steps batch_size lr"
        result = {name: getattr(args, name) for name in (names + " seed").split()}
        result |= dict(test_accuracy=accuracy, test_loss=loss)
        if args.base != "fp32" and not dense:
            result["test_accuracy_forward"] = self.accuracy
        counted = "counted" if args.world > 1 and not dense else "computed"
        bytes_are = f"{counted} for {self.workers} processes"
        if counted == "counted" and len(self.worlds) > 1:  # one alone, say, has sent nothing
            bytes_are += f", over steps that {' and '.join(map(str, sorted(self.worlds)))} took"
        result |= dict(
            images_per_second=round(args.steps * args.batch_size / seconds, 1),
            seconds_per_step=self.seconds_per_step(),
            bytes_sent_per_step=round(sent / args.steps),
            dense_bytes_per_step=round(self.dense_bytes),
            bytes_are=bytes_are,
            peak_memory_bytes=peak,
            processes=args.world,
            seconds=round(seconds, 1),
            torch=torch.__version__,
            device=device_name(self.device),
        )
        if args.subspaces:
            result |= self.subspaces()
        if args.rank == 0:
            write_aside(self.out / "model.pt", lambda path: torch.save(weights, path))
            text = json.dumps(result, indent=2) + "\n"
            write_aside(self.out / "result.json", lambda path: path.write_text(text))
        for key, value in result.items():
            self.say(f"{key}: {value}")
        if sent and not dense:
            fewer = self.dense_bytes * args.steps / sent
            self.say(f"bytes: {fewer:.1f} times fewer than data parallel training sends")
        self.say(f"model: {self.out / 'model.pt'}")
        return result


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Written under another name, then renamed: the file is whole or not there."""
    aside = path.with_name(path.name + ".new")
    write(aside)
    os.replace(aside, path)


def forget_peak(device: torch.device) -> None:
    """From here on peak_memory counts anew, where the system lets it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not Linux, or a container forbids it: then the whole process's
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held: a GPU's tensors, or on a CPU all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # where getrusage begins with what the starting process held
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads a process"


# --------------------------------------------------------------------------------------------------
# 8 the benchmark: a step of LTE beside a step of dense training, and plans on paper
# --------------------------------------------------------------------------------------------------

# width, attention's heads, tokens, LoRA heads, r, images a head; two transformer blocks each
BENCH = [
    (192, 3, 64, 4, 16, 16),
    (384, 6, 64, 4, 16, 16),
    (768, 12, 64, 1, 32, 32),
    (384, 6, 64, 4, 64, 16),
    (768, 12, 64, 4, 64, 8),
]
# One head here, as each worker has; so there is nobody to send to.
BENCH_GPU = [(384, 6, 197, 1, 32, 128), (768, 12, 197, 1, 32, 128), (1024, 16, 197, 1, 32, 128)]
VARIANTS = ("dense", "LTE textbook", "LTE")


class Blocks(nn.Module):
    """Two transformer blocks and the mean over tokens, (b, t, w) -> (b, w)."""

    def __init__(self, width: int, attn_heads: int):
        super().__init__()
        self.blocks = nn.Sequential(*[ViTBlock(width, attn_heads) for _ in range(2)])
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).mean(1)


class Benched:
    """One variant of one row, ready to take whole training steps: train_step and its AdamW."""

    def __init__(self, args, row, variant, device):
        width, attn_heads, tokens, heads, r, images = row
        method = "dense" if variant == "dense" else "lte"
        own = dict(method=method, heads=heads, r=r, accumulate=1, world=1)
        own |= dict(lr=1e-5)  # activations stay what they are
        self.args = argparse.Namespace(**vars(args) | own)
        torch.manual_seed(0)
        self.model = Blocks(width, attn_heads).to(device)
        if method == "lte":
            options = dict(heads=heads, r=r, lora_alpha=8 * r, base=args.base)
            self.model = lte.convert(self.model, **options)
        self.optimizer = make_optimizer(self.args, self.model)
        # A block inside a network has to return a gradient: so do these.
        self.x = torch.randn(heads * images, tokens, width, device=device, requires_grad=True)
        self.y = torch.randint(width, (heads * images,), device=device)
        self.forward = torch.compile(self.model) if args.compile else self.model
        self.choose = lte.formed_is_cheaper if variant == "LTE" else lambda *sizes: False

    def __call__(self, steps: int) -> float:
        """Milliseconds a step."""
        begun = now(self.x.device)
        with mock.patch.object(lte, "formed_is_cheaper", self.choose):
            for _ in range(steps):
                train_step(self.model, self.forward, self.optimizer, self.x, self.y, self.args)
                self.x.grad = None
        return 1000 * (now(self.x.device) - begun) / steps

    def merge(self) -> float:
        begun = now(self.x.device)
        lte.merge(self.model)
        return 1000 * (now(self.x.device) - begun)


def now(device: torch.device) -> float:
    """Seconds, with the device's work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_of(args, row, variant, device, threads) -> int:
    """Bytes that three steps need at most, in a process of their own, beyond an empty program's."""
    torch.set_num_threads(threads)
    before = peak_memory(device) if device.type == "cpu" else 0
    Benched(args, row, variant, device)(3)
    return peak_memory(device) - before


def own_process(function, *args):
    """function(*args), run by a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def bench_row(args, row, device: torch.device, rounds: int = 15) -> dict[str, dict]:
    """variant -> ms, of_dense, peak_mb, bytes, merge_ms. Steps take turns: this machine's load, and
    what it clocks at, change too much from second to second for anything else.
    """
    benched = {variant: Benched(args, row, variant, device) for variant in VARIANTS}
    for one in benched.values():
        one(3)
    merges = {v: one.merge() for v, one in benched.items() if v != "dense"}
    times = [{v: one(1) for v, one in benched.items()} for _ in range(rounds)]
    cost = lte.cost_report(benched["LTE"].model, workers=row[3], merge_every=args.merge_every)
    return {
        v: dict(
            ms=statistics.median(one[v] for one in times),
            of_dense=statistics.median(one[v] / one["dense"] for one in times),
            peak_mb=own_process(peak_of, args, row, v, device, torch.get_num_threads()) / 1e6,
            bytes=cost["sent"]["dense" if v == "dense" else "step"],
            merge_ms=merges.get(v, math.nan),
        )
        for v in VARIANTS
    }


def bench(args, device: torch.device) -> None:
    """The table of steps, and where the two forms cross."""
    print(f"torch {torch.__version__}, {device_name(device)}, {'bf16' if args.bf16 else 'fp32'}")
    print(", ".join(ceilings(device, args.bf16)))
    print(f"bytes a step: for as many workers as heads, T = {args.merge_every}")
    print("\n| width, heads, r, images a head | | ms | of dense | peak MB | bytes a step | merge |")
    print("|---|---|--:|--:|--:|--:|--:|")
    table = {}
    for row in BENCH_GPU if device.type == "cuda" else BENCH:
        name = ", ".join(str(row[k]) for k in (0, 3, 4, 5))
        table[name] = bench_row(args, row, device)
        for v, r in table[name].items():
            merge = "" if v == "dense" else f"{r['merge_ms']:.0f}"
            print(
                f"| {name if v == 'dense' else ''} | {v} | {r['ms']:.1f} | {r['of_dense']:.3f} "
                f"| {r['peak_mb']:.0f} | {r['bytes']:,.0f} | {merge} |",
                flush=True,
            )
    print_crossing(args, device)
    if args.plot:
        draw_bench(table, Path(args.out) / "bench.png")


def print_crossing(args, device: torch.device, width=384, r=16, rounds=40) -> None:
    """From how many tokens a head on forming W + s U V is faster: counted, and timed."""
    layer = lte.convert(nn.Linear(width, width).to(device), heads=1, r=r, lora_alpha=r).train()
    counted = 4 * width / 7
    print(f"\none head, width {width}, r = {r}: by the count, forming pays from {counted:.0f} on")
    print("| tokens | textbook, ms | formed, ms |\n|--:|--:|--:|")
    for tokens in (width // 4, width // 2, 3 * width // 4, width, 2 * width):
        x = torch.randn(tokens, width, device=device, requires_grad=True)
        times = {False: [], True: []}
        for _ in range(rounds):
            for form in times:
                with mock.patch.object(lte, "formed_is_cheaper", lambda *sizes, form=form: form):
                    begun = now(device)
                    with autocast(args, device):
                        layer(x).sum().backward()
                    times[form].append(1000 * (now(device) - begun))
        textbook, formed = (statistics.median(times[form]) for form in (False, True))
        print(f"| {tokens} | {textbook:.2f} | {formed:.2f} |")


def ceilings(device: torch.device, bf16: bool) -> Iterator[str]:
    """What this device can do at all: bytes and multiplications in a second."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    out = torch.empty_like(a)
    work = {"copy": (2 * a.nbytes, "GB/s"), "matrix product": (2 * n**3, "GFLOP/s")}
    for what, (size, unit) in work.items():
        seconds = []
        for _ in range(8):
            begun = now(device)
            out.copy_(a) if what == "copy" else torch.mm(a, a, out=out)
            seconds.append(now(device) - begun)
        yield f"{what} {size / min(seconds) / 1e9:.0f} {unit}"


def waiting(args, data, device: torch.device, steps: int = 25) -> float:
    """Share of the time of `steps` steps that passes until the next batch is there."""
    model = make_model(args, data, device)
    optimizer, spent = make_optimizer(args, model), [0.0, 0.0]
    batches = data.train_batches(1, steps + 5, torch.arange(args.batch_size))
    for k in range(steps + 5):
        begun = now(device)
        x, y = next(batches)
        ready = now(device)
        train_step(model, model, optimizer, x, y, args)
        if k >= 5:  # the first ones warm up
            spent = [spent[0] + ready - begun, spent[1] + now(device) - ready]
    return spent[0] / sum(spent)


def print_plan(args, data, device: torch.device) -> None:
    """What each of --plan's workers would hold, send and wait for; nothing is trained."""
    workers, mbit = args.plan
    model = make_model(args, data, device)
    cost = lte.cost_report(
        model,
        make_optimizer(args, model),
        outer_optimizer=make_outer_optimizer(args, model),
        merge_every=args.merge_every,
        wire=args.wire,
        workers=workers,
    )
    held, sent = cost["held"], cost["sent"]
    print(
        f"\n{args.model}, {workers} workers, {args.heads // workers} heads each of rank {args.r}, "
        f"{args.base} base, {args.wire} wire, merged every {args.merge_every} steps, "
        f"links of {mbit:g} Mbit/s\n"
    )
    print("| each worker | LTE | data parallel AdamW | times less |\n|---|--:|--:|--:|")
    for what, ours, theirs, unit in (
        ("holds, activations aside", held["all"] / 1e6, cost["held_dense"]["all"] / 1e6, "MB"),
        ("sends a step", sent["step"] / 1e6, sent["dense"] / 1e6, "MB"),
        ("sends at once", sent["merge"] / 1e6, sent["dense"] / 1e6, "MB"),
        ("waits a step", 8e-6 * sent["step"] / mbit, 8e-6 * sent["dense"] / mbit, "s"),
    ):
        if ours:  # one worker sends nothing
            print(f"| {what} | {ours:,.3f} {unit} | {theirs:,.3f} {unit} | {theirs / ours:.1f} |")
    kinds = ", ".join(f"{kind} {n / 1e6:,.1f}" for kind, n in held.items() if n and kind != "all")
    print(f"\nheld, MB: {kinds}\nno wait where --overlap hides it; latency is not counted")


# --------------------------------------------------------------------------------------------------
# 9 the command line
# --------------------------------------------------------------------------------------------------


def start(args: argparse.Namespace) -> torch.device:
    """This process's device, and the process group if torchrun started several."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(
                f"process {local} of this machine has no GPU of its own, there are {gpus}; "
                f"use --nproc_per_node={gpus}, or CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if args.world > 1:
        # Without this NCCL ends a process that waits in vain before it could say why.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        backend, wait = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=args.timeout)
        with lte.collective("meeting the other processes"):
            store, rank, world = next(dist.rendezvous("env://", timeout=wait))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # It outlives a restart: addresses of the last attempt must not be read.
                store = dist.PrefixStore(f"attempt {restarts()}", store)
            group = dict(store=store, rank=rank, world_size=world, timeout=wait)
            dist.init_process_group(backend, **group)
    return device


def restarts() -> int:
    """How often torchrun (--max-restarts) has started this machine's processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def eval_only(args, data, device) -> None:
    """Test a model.pt that --model, --patch and --dataset describe."""
    model = new_model(args, data, device)
    try:
        model.load_state_dict(torch.load(args.eval_only, map_location=device, weights_only=True))
    except Exception as error:  # what torch.load raises depends on what is in the file
        reason = (str(error) or type(error).__name__).splitlines()[-1].strip()
        raise ValueError(
            f"{args.eval_only} is not a model.pt of {args.model} on {args.dataset} ({reason}); "
            "give the --model, --patch and --dataset it was trained with"
        ) from error
    accuracy, loss = evaluate(model, data, args, device)
    if args.rank == 0:
        print(f"test_accuracy: {accuracy}\ntest_loss: {loss}")


def print_table(results: dict[str, dict], columns: dict[str, str]) -> None:
    """A row for each run's result; columns: which of its keys to add, and how each is written."""
    print(f"\n| | test accuracy | test loss | bytes a step | {' | '.join(columns)} |")
    print("|---" + "|--:" * (3 + len(columns)) + "|")
    for name, r in results.items():
        sent = "one process" if r["method"] in ONE_PROCESS else f"{r['bytes_sent_per_step']:,}"
        more = " | ".join(f"{r[key]:{form}}" for key, form in columns.items())
        accuracy = f"{100 * r['test_accuracy']:.2f} %"
        print(f"| {name} | {accuracy} | {r['test_loss']:.4f} | {sent} | {more} |")


def draw_plot(folders: dict[str, Path], file: Path) -> None:
    """Accuracy against steps and against bytes sent, from each run's log.csv."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True, layout="constrained")
    for method, folder in folders.items():
        with open(folder / "log.csv") as log:
            rows = list(csv.DictReader(log))
        accuracy = [100 * float(row["test_accuracy"]) for row in rows]
        [line] = left.plot([int(row["step"]) for row in rows], accuracy, label=method)
        if int(rows[-1]["bytes_sent"]):
            sent = [int(row["bytes_sent"]) for row in rows]
            right.semilogx(sent, accuracy, color=line.get_color())
    left.set(xlabel="optimizer steps", ylabel="test accuracy (%)")
    right.set(xlabel="bytes sent by one process")
    figure.legend(loc="outside right upper")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_subspaces(folders: dict[str, Path], file: Path) -> None:
    """How far heads are apart while they train, from each run's log.csv."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
    labels = "mean cosine between heads", "Grassmann distance / largest", "effective rank of update"
    for axis, column, label in zip(axes, Report.SUBSPACES, labels, strict=True):
        for name, folder in folders.items():
            with open(folder / "log.csv") as log:
                rows = list(csv.DictReader(log))
            steps, values = [int(r["step"]) for r in rows], [float(r[column]) for r in rows]
            axis.plot(steps, values, label=name)
        axis.set(xlabel="optimizer steps", ylabel=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_bench(table: dict[str, dict], file: Path) -> None:
    """Bars: a step's time as a share of a dense one's, and the most memory that it took."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    labels = {"of_dense": "time of a step / dense", "peak_mb": "peak memory (MB)"}
    for axis, (column, label) in zip(axes, labels.items(), strict=True):
        for k, variant in enumerate(VARIANTS):
            heights = [rows[variant][column] for rows in table.values()]
            places = [j + 0.27 * (k - 1) for j in range(len(heights))]
            axis.bar(places, heights, 0.25, label=variant)
        axis.set_xticks(range(len(table)), [name.replace(", ", "\n") for name in table])
        axis.set(xlabel="width, heads, r, images a head (top to bottom)", ylabel=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def all_runs(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """What to train, one after the other: a method, those of --compare, or the rows of a study.

    What was given beside --study holds for all of its rows.
    """
    runs = {method: settle(args, method) for method in args.compare or [args.method]}
    if args.study:
        runs, (_, common, rows) = {}, STUDIES[args.study]
        for name, flags in rows.items():
            one = parse_args(f"--subspaces {common} {flags}".split() + args.argv)
            runs[name] = settle(one, one.method)
    for name, one in runs.items():
        if error := layout_error(one):
            raise ValueError(f"{name}: {error}" if args.study else error)
        if args.study or args.compare:
            folder = re.sub(r"[^\w.-]+", "_", name)
            one.out = str(Path(args.out, args.study or "", folder))
    return runs


def load_for(args, device: torch.device, download: bool):
    """The data set of a run."""
    options = dict(augment=args.augment, seed=args.seed, device=device, batch_size=args.batch_size)
    return load_data(args.dataset, args.data, download=download, **options)


def run(args: argparse.Namespace) -> None:
    device = start(args)
    own = ("rank", "data", "out", "argv")  # may differ from process to process
    lte.agree(**{f"--{k.replace('_', '-')}": v for k, v in vars(args).items() if k not in own})
    runs = all_runs(args)  # refuses now that all processes would say the same
    # What is fetched, or unpacked when first opened, one process a machine opens before the rest.
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    in_turn = args.download or args.dataset == "imagenet"
    opening = "opening the data (where that takes longer, give a larger --timeout)"
    if in_turn and not first:
        lte.barrier(opening)
    data = None if args.study else load_for(args, device, args.download and first)
    if in_turn and first:
        lte.barrier(opening)
    if args.eval_only:
        return eval_only(args, data, device)
    if args.bench or args.plan:
        return count_costs(settle(args, "lte"), data, device)
    results = {}
    for name, one in runs.items():  # the rows of a study may differ in their data
        results[name] = train(one, data or load_for(one, device, one.download), device)
    if args.rank == 0:
        if args.study:
            print(f"\n{STUDIES[args.study][0]}")
            print_table(results, dict(cosine=".3f", grassmann=".3f", effective_rank=".1f"))
        elif args.compare:
            print_table(results, dict(images_per_second=".0f", seconds=".0f"))
        if args.plot:
            draw_plots(args, runs)


def count_costs(args, data, device: torch.device) -> None:
    """--bench, then --plan: what is measured, and what is counted on paper."""
    if args.bench:
        bench(args, device)
        share = waiting(args, data, device)
        print(f"\n{100 * share:.1f} % of {args.model}'s time on {args.dataset} waits for data")
    if args.plan:
        print_plan(args, data, device)


def draw_plots(args, runs: dict[str, argparse.Namespace]) -> None:
    """OUT/plot.png; and OUT/heads.png where subspaces were logged."""
    folders = {name: Path(one.out) for name, one in runs.items()}
    files = {draw_plot: Path(args.out) / "plot.png"}
    if all(one.subspaces for one in runs.values()):
        files[draw_subspaces] = Path(args.out) / "heads.png"
    for draw, file in files.items():
        draw(folders, file)
        print(f"plot: {file}")


def main(argv=None) -> None:
    args = parse_args(argv)
    try:
        run(args)
    except Stopped as notice:
        if args.rank == 0:
            print(f"train.py: {notice}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)  # as a shell has it: not finished
    except (ValueError, ImportError, FloatingPointError, OSError, lte.ProcessLost) as error:
        sys.exit(f"train.py: {error}")  # what a user can put right
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
