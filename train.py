"""Train a vision transformer or an MLP-Mixer with LoRA-the-Explorer, or with its rivals.

    python train.py                                       one process runs all heads
    torchrun --nproc_per_node=2 train.py                  two run half of them each: the same end
    python train.py --dataset folder --data DIR           your images: DIR/train/<class>/<image>
    python train.py --save-every 50 --resume auto         goes on where it was stopped
    python train.py --compare "--method dense" "--r 8"    one run for each, one table

What to train, and in brackets what holds without a flag:
    --method NAME         lte, localsgd: N heads or dense copies, each alone on its share (lte)
                          lora: one head, rank r is all it can reach; relora: starts it anew
                          mhlora: N heads, all on every sample; dense: AdamW on all weights
    --model NAME          vit- or mixer-nano, -small, -base; vit-tiny, vit-large (vit-nano)
    --patch INT           pixels, side of a patch (4; nano models 8; large images 16)
    --dataset NAME        cifar10, cifar100, imagenet, folder ... (shapes)
    --data DIR            where the images are, or are put (data)
    --download            fetch the data set where torchvision can (off)
    --augment NAME        none, crop-flip, randaugment, mixup, cutmix (auto)
    --workers INT         processes that read large images (off: all cores)
The heads:
    --heads INT           N, over all processes; lora and relora have one (4)
    --r INT               rank of one head (32; lora, relora: 4)
    --lora-alpha FLOAT    s = lora_alpha / r (off: 8 r)
    --init NAME           how A starts: orthogonal_paper, kaiming, xavier (orthogonal)
    --base NAME           format of the frozen W: bf16, int8, nf4, fp4 (fp32)
    --merge-every INT     T, steps between merges (4; relora: 50)
    --merge-warmup INT    steps over which T grows from 1 (0)
    --reset NAME          B or AB start anew at every merge (none; relora: AB)
    --wire NAME           format in which deltas are sent (fp32)
    --overlap INT         steps trained while a merge travels (0)
    --parts INT           K: merge a K-th of W every T / K steps (1)
    --outer-lr FLOAT      rate at which W takes the mean of what heads learnt (1.0)
    --outer-momentum FLOAT  Nesterov's, over merges (0.0)
    --full-batch          every head sees the whole batch, not its share (off)
The optimization:
    --steps INT           optimizer steps (400)
    --batch-size INT      samples a step, over all processes (256)
    --accumulate INT      micro-batches a step (1)
    --lr FLOAT            peak rate of AdamW (0.001; dense, localsgd: 0.002)
    --weight-decay FLOAT  of matrices; of W at merges (0.05)
    --warmup INT          steps of linear warm-up, then a cosine to zero (50)
    --clip FLOAT          largest norm of a head's gradient (1.0)
    --label-smoothing FLOAT  share spread over all classes (0.0)
    --bf16                compute in bfloat16 (off)
    --compile             torch.compile every head (off)
    --seed INT            of weights, order and augmentation (0)
What comes out:
    --out DIR             log.csv, model.pt and result.json go here (out)
    --export NAME         model.pt is exact, or forward: as --base rounds (exact)
    --eval-every INT      steps between tests, which wait for a merge (off: a tenth of all)
    --eval-only FILE      test this model.pt and stop (off)
    --compare FLAGS ...   sets of flags in quotes, "" for none: a run for each, one table (off)
    --subspaces           log how far heads are apart (off)
    --plot                draw OUT/plot.png (off)
    --bench               time a step beside a dense one and stop (off)
    --plan WORKERS,MBIT   count what so many hold and send, and stop (off)
Stopping and going on:
    --save-every INT      steps between checkpoints in OUT/checkpoints (off)
    --resume NAME         go on from the last, or previous; auto: if there is any (off)
    --timeout FLOAT       seconds to wait for other processes (300.0)
"""

import argparse
import ctypes
import difflib
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path
from statistics import fmean, median
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset, random_split
from torchvision import datasets
from torchvision.transforms import v2

import lte

# ------------------------------------------------------------------------------------------------
# 1 models: b samples, t tokens (patches), w width; all trained numbers are matrices and biases

norm = partial(nn.LayerNorm, elementwise_affine=False)


def mlp(width, hidden):
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class ViTBlock(nn.Module):
    """Pre-norm attention, then pre-norm MLP, (b, t, w) -> (b, t, w)."""

    def __init__(self, width, tokens, attn_heads):
        super().__init__()
        self.attn_heads, self.norm1, self.norm2 = attn_heads, norm(width), norm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = mlp(width, 4 * width)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.attn_heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each (b, attn_heads, t, w / attn_heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class MixerBlock(nn.Module):
    """Pre-norm MLP over the tokens, then one over the channels, (b, t, w) -> (b, t, w)."""

    def __init__(self, width, tokens, token_mlp):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.token_mlp, self.channel_mlp = mlp(tokens, token_mlp), mlp(width, 4 * width)

    def forward(self, x):
        x = x + self.token_mlp(self.norm1(x).mT).mT
        return x + self.channel_mlp(self.norm2(x))


MODELS = {  # width, depth, block, its attn_heads or token_mlp
    "vit-nano": (128, 4, ViTBlock, 4),
    "vit-tiny": (192, 12, ViTBlock, 3),
    "vit-small": (384, 12, ViTBlock, 6),
    "vit-base": (768, 12, ViTBlock, 12),
    "vit-large": (1024, 24, ViTBlock, 16),
    "mixer-nano": (128, 4, MixerBlock, 64),
    "mixer-small": (512, 8, MixerBlock, 256),
    "mixer-base": (768, 12, MixerBlock, 384),
}


def sincos_positions(width, grid):
    """Fixed code of each patch's row and column at width / 4 wavelengths, (grid * grid, width)."""
    places = torch.cartesian_prod(torch.arange(grid), torch.arange(grid))  # (t, 2)
    angles = places[:, :, None] * 10000.0 ** -torch.linspace(0, 1, width // 4)  # (t, 2, w / 4)
    return torch.cat([angles.sin(), angles.cos()], 2).flatten(1)


class VisionModel(nn.Module):
    """Patches, blocks, the mean over tokens, (b, 3, h, h) -> (b, classes)."""

    def __init__(self, classes, image_size, patch, width, depth, block, option):
        super().__init__()
        grid = image_size // patch
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.register_buffer("positions", sincos_positions(width, grid), persistent=False)
        self.blocks = nn.Sequential(*(block(width, grid**2, option) for _ in range(depth)))
        self.norm, self.head = norm(width), nn.Linear(width, classes)
        for module in self.modules():  # a frozen W shapes all features: its scale must fit
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a patch is one long vector
                nn.init.zeros_(module.bias)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT + self.positions  # (b, t, w)
        return self.head(self.norm(self.blocks(x)).mean(1))


def new_model(args, data, device):
    """The plain model for the data's square images, its weights drawn from the seed."""
    size, nano = data.image_size, "nano" in args.model
    # 64 tokens for images of up to 64 pixels, 16 for the nano models
    patch = args.patch or (16 if size > 64 else max(1, size // (4 if nano else 8)))
    if size % patch:
        raise ValueError(f"--patch {patch}: use a divisor of the images' size, {size}")
    torch.manual_seed(args.seed)
    return VisionModel(len(data.classes), size, patch, *MODELS[args.model]).to(device)


# ------------------------------------------------------------------------------------------------
# 2 shapes: a data set made on the spot


def draws(*key):
    """A generator whose draws depend on `key` alone."""
    return torch.Generator().manual_seed(lte.seed_of(*key))


def polygon(u, v, sides):
    """A regular polygon with its corners on the unit circle, one of them at the top."""
    wedge = torch.atan2(u, v) % (2 * math.pi / sides) - math.pi / sides
    return u.hypot(v) * wedge.cos() - math.cos(math.pi / sides)


# Each is negative inside the shape and about the distance to its edge, in units of its radius.
SHAPES = {
    "circle": lambda u, v: u.hypot(v) - 0.85,
    "ring": lambda u, v: (u.hypot(v) - 0.75).abs() - 0.2,
    "half-disc": lambda u, v: torch.maximum(u.hypot(v - 0.4) - 1, v - 0.4),
    "triangle": lambda u, v: polygon(u, v, 3),
    "square": lambda u, v: polygon(u, v, 4),
    "pentagon": lambda u, v: polygon(u, v, 5),
    "star": lambda u, v: u.hypot(v) - 0.65 - 0.3 * (5 * torch.atan2(u, v)).cos(),
    "cross": lambda u, v: torch.maximum(torch.minimum(u.abs(), v.abs()) - 0.3, u.hypot(v) - 1),
    "bar": lambda u, v: torch.maximum(u.abs() - 1, v.abs() - 0.35),
    "moon": lambda u, v: torch.maximum(u.hypot(v) - 1, 0.8 - u.hypot(v + 0.5)),
}


def paint_shapes(distance, n, draw, size=32):
    """n images of one shape on a shade, a stripe in front, noise, uint8 (n, 3, size, size)."""

    def uniform(low, high, channels=1):
        return torch.rand(n, channels, 1, 1, generator=draw) * (high - low) + low

    def edge(d):  # d in image halves: 1 inside, 0 outside, one pixel between
        return (0.5 - d * size / 2).clamp(0, 1)

    x = torch.linspace(-1, 1, size).expand(1, 1, size, size)
    slope_x, slope_y, y = uniform(-0.25, 0.25, 3), uniform(-0.25, 0.25, 3), x.mT
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


def make_shapes(n, part):
    """n images uint8 (n, 3, 32, 32) and their labels (n,), always the same for the same part."""
    draw = draws("shapes", part)
    labels = torch.randint(len(SHAPES), (n,), generator=draw)
    images = torch.empty(n, 3, 32, 32, dtype=torch.uint8)
    for label, distance in enumerate(SHAPES.values()):
        rows = (labels == label).nonzero()[:, 0]
        images[rows] = paint_shapes(distance, len(rows), draw)
    return images, labels


# ------------------------------------------------------------------------------------------------
# 3 data: which samples form a step, how they are changed, and where they come from
# Samples depend on (seed, step), augmentation on (seed, step, place in the global batch). A process
# names the places it holds; what it gets for them does not depend on who holds the others.


@lru_cache(maxsize=2)  # a batch may reach over the end of an epoch
def epoch_order(n, seed, epoch):
    """The n samples in the order of this epoch, (n,)."""
    return torch.randperm(n, generator=draws(seed, "epoch", epoch))


def batch_indices(n, batch_size, seed, step):
    """The samples of one step, (batch_size,): the next places in an endless row of epochs."""
    first, last = (step - 1) * batch_size, step * batch_size
    epochs = range(first // n, (last - 1) // n + 1)
    parts = (epoch_order(n, seed, e)[max(first - e * n, 0) : last - e * n] for e in epochs)
    return torch.cat(list(parts))


def normalise(x):
    """uint8 -> float32, about -2 to 2."""
    return x.float().sub_(127.5).div_(64)


class InMemory:
    """Small images of one size, kept on the device as uint8; a whole batch is changed at once."""

    def __init__(self, train, test, classes, augment, device):
        (images, labels), self.classes, self.device, self.bad = train, classes, device, ()
        self.sizes, self.image_size = (len(images), len(test[0])), images.shape[3]
        self.pad = 4 if augment == "crop-flip" else 0
        self.images = F.pad(images, [self.pad] * 4).to(device)  # padded once, not at every step
        self.labels, self.test = labels.to(device), [part.to(device) for part in test]

    def train_batches(self, seed, batch_size, steps, places):
        """Yields x (len(places), 3, h, h), y (len(places),) for each of the steps."""
        windows = self.images.unfold(2, self.image_size, 1).unfold(3, self.image_size, 1)  # a view
        for step in steps:
            # Drawn for the whole global batch, then indexed: places stay independent of the split.
            draw = draws(seed, "augment", step)
            shifts = torch.randint(2 * self.pad + 1, (2, batch_size), generator=draw)
            flips = (torch.rand(batch_size, generator=draw) < 0.5) & (self.pad > 0)
            rows = batch_indices(self.sizes[0], batch_size, seed, step)
            drawn = torch.stack([rows, *shifts, flips])[:, places].to(self.device)
            x = windows[drawn[0], :, drawn[1], drawn[2]]
            x = torch.where(drawn[3].bool().view(-1, 1, 1, 1), x.flip(3), x)
            yield normalise(x), self.labels[drawn[0]]

    def test_batches(self, rank, world, size):
        """Yields this process's share of the test set, (x, y); the shares do not overlap."""
        x, y = (part[rank::world].split(size) for part in self.test)
        return zip(map(normalise, x), y, strict=True)


def read_image(path):
    """An RGB image of PIL, as a viewer shows it: turned as its EXIF says, on white where clear."""
    try:
        with Image.open(path) as image:
            mode, image = image.mode, ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{path} is no image that can be read ({error}); replace it") from error
    if mode[0] in "IF":  # 16 or 32 bits, or floats, which PIL clips to black or white
        raise ValueError(f"{path} has more than 8 bits a pixel (mode {mode}); convert it to 8 bits")
    return image


class Files(Dataset):
    """(index, key) -> uint8 image, class, what was unreadable; all draws depend on the key."""

    def __init__(self, samples, transforms):
        self.samples, self.transform = samples, v2.Compose([*transforms, v2.PILToTensor()])

    def __getitem__(self, which):
        index, key, *bad = which
        path, label = self.samples[index % len(self.samples)]
        try:
            image = read_image(path)
        except (OSError, ValueError) as error:  # then the next one is shown
            if len(bad) > 100:
                raise ValueError(bad[0]) from error
            return self[index + 1, key, *bad, str(error)]
        with lte.seeded([], *key):
            return self.transform(image), label, "\n".join(bad)


class Streamed:
    """Large images, read and augmented by worker processes."""

    GROUP = 16  # mixup and cutmix pair samples inside groups of this many consecutive places
    MIX = {"mixup": (v2.MixUp, 0.2), "cutmix": (v2.CutMix, 1.0)}  # and alpha of Beta(alpha, alpha)

    def __init__(self, train, test, classes, augment, device, workers=None):
        self.classes, self.device, self.bad = classes, device, set()  # bad: unreadable images
        self.sizes, self.image_size = (len(train), len(test)), 224
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.workers = max(cores, 1) if workers is None else workers
        plain = [v2.Resize(256), v2.CenterCrop(224)]
        change = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
        change += [] if augment == "crop-flip" else [v2.RandAugment()]
        self.train = Files(train, plain if augment == "none" else change)
        self.test = Files(test, plain)
        mix, alpha = self.MIX.get(augment, (None, None))
        self.mix = mix and mix(num_classes=len(classes), alpha=alpha)

    def load(self, files, batches):
        """Yields x (b, 3, 224, 224) and y (b,) for each list of (index, key)."""
        options = dict(num_workers=self.workers, pin_memory=self.device.type == "cuda")
        try:
            for x, y, bad in DataLoader(files, batch_sampler=batches, **options):
                if (new := {line for text in bad for line in text.splitlines()}) and not self.bad:
                    warnings.warn(f"{min(new)}; the next one is shown instead", stacklevel=2)
                self.bad |= new
                if new and 100 * len(self.bad) > sum(self.sizes):  # more than one in a hundred
                    raise ValueError(f"{len(self.bad)} images are unreadable, as {min(new)}")
                yield normalise(x.to(self.device, non_blocking=True)), y.to(self.device)
        except ValueError as error:  # a worker wraps it in its traceback; the last line is ours
            raise ValueError(str(error).rsplit("ValueError: ", 1)[-1].strip()) from None

    def train_batches(self, seed, batch_size, steps, places):
        """Yields x (len(places), 3, 224, 224), y (len(places),) or, if mixed, (..., classes)."""

        def batches():
            for step in steps:
                rows = batch_indices(self.sizes[0], batch_size, seed, step)[places]
                pairs = zip(rows.tolist(), places.tolist(), strict=True)
                yield [(row, (seed, "augment", step, place)) for row, place in pairs]

        for step, (x, y) in zip(steps, self.load(self.train, batches()), strict=True):
            yield self.mixed(x, y, seed, step, places) if self.mix else (x, y)

    def mixed(self, x, y, seed, step, places):
        """Mixes each group by draws of its own: no partner lies in another head's slice."""
        firsts, mixed = places[:: self.GROUP].tolist(), []
        for first, *group in zip(firsts, x.split(self.GROUP), y.split(self.GROUP), strict=True):
            with lte.seeded([], seed, "mix", step, first):
                mixed.append(self.mix(*group))
        return [torch.cat(parts) for parts in zip(*mixed, strict=True)]

    def test_batches(self, rank, world, size):
        rows = [(row, ()) for row in range(rank, self.sizes[1], world)]  # nothing is drawn
        return self.load(self.test, [rows[i : i + size] for i in range(0, len(rows), size)])


AUGMENT = "auto", "none", "crop-flip", "randaugment", "mixup", "cutmix"
DATASETS = "shapes cifar10 cifar100 caltech256 stanford_cars sun397 places365 imagenet folder"
NEED = {  # what has to be there, where --download cannot help
    "folder": "train/<class>/<image> and val/<class>/<image> or test/<class>/<image>",
    "imagenet": "ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar",
    "stanford_cars": "in stanford_cars/ devkit/, cars_t*/, cars_test_annos_withlabels.mat",
}


def list_folder(root):
    """[(path, label)] and class names of root/<class>/<image>, without names that begin with ."""

    def shown(path):
        hidden = any(part[0] == "." for part in Path(path).relative_to(root).parts)
        return path.lower().endswith(datasets.folder.IMG_EXTENSIONS) and not hidden

    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
    numbers = {name: n for n, name in enumerate(classes)}
    return datasets.folder.make_dataset(root, numbers, is_valid_file=shown), classes


def open_dataset(name, root, download):
    """Training set, test set, class names; a set is images and labels, or [(path, label)]."""
    match name:
        case "shapes":
            return make_shapes(20_000, "train"), make_shapes(5_000, "test"), list(SHAPES)
        case "cifar10" | "cifar100":
            kind = partial(getattr(datasets, name.upper()), root, download=download)
            parts = kind(train=True), kind(train=False)
            images = (torch.from_numpy(p.data).permute(0, 3, 1, 2) for p in parts)
            labels = (torch.tensor(p.targets) for p in parts)
            return *zip(images, labels, strict=True), parts[0].classes
        case "caltech256":
            if download:
                datasets.Caltech256(root, download=True)
            samples, classes = list_folder(root / "caltech256" / "256_ObjectCategories")
            return samples, None, classes
        case "sun397":
            whole = datasets.SUN397(root, download=download)
            files = zip(map(str, whole._image_files), whole._labels, strict=True)
            return list(files), None, whole.classes
        case "stanford_cars":
            train, test = (datasets.StanfordCars(root, part) for part in ("train", "test"))
            return train._samples, test._samples, train.classes
        case "places365":
            parts, options = ("train-standard", "val"), dict(small=True, download=download)
            train, test = (datasets.Places365(root, part, **options) for part in parts)
            return train.imgs, test.imgs, train.classes
        case "imagenet":
            train, test = (datasets.ImageNet(root, part) for part in ("train", "val"))
            return train.samples, test.samples, [names[0] for names in train.classes]
    parts = "train", "val" if (root / "val").is_dir() else "test"
    (train, classes), (test, others) = (list_folder(root / part) for part in parts)
    if differ := sorted(set(classes) ^ set(others)):
        raise ValueError(f"only one of {parts[0]} and {parts[1]} has {', '.join(differ)}")
    return train, test, classes


def read_all(samples, size):
    """All images of a folder, uint8 (n, 3, size, size), and their classes (n,)."""

    def read(sample):
        image = read_image(sample[0])
        if image.size != (size, size):
            rule = f"small images must be squares of one size, the first is {size} wide"
            raise ValueError(f"{sample[0]} is {image.width} x {image.height} pixels; {rule}")
        return v2.functional.pil_to_tensor(image)

    with ThreadPoolExecutor() as pool:  # threads will do: reading an image leaves Python free
        images = torch.stack(list(pool.map(read, samples)))
    return images, torch.tensor([label for _, label in samples])


@lru_cache(maxsize=1)  # the runs of a comparison share it
def load_data(name, root, augment, download, workers, device):
    """Opens a data set, in memory if its images are small, else streamed."""
    try:
        train, test, classes = open_dataset(name, Path(root), download)
    except (RuntimeError, OSError, ValueError) as error:  # torchvision's and ours
        reason, need = str(error).split(". ")[0], NEED.get(name, "its files; --download gets them")
        raise ValueError(f"cannot open {name} ({reason}); {root} must hold {need}") from error
    if test is None:  # 80 % for training, always the same
        train, test = map(list, random_split(sorted(train), [0.8, 0.2], generator=draws("split")))
    if name == "folder":
        size = max(read_image(train[0][0]).size)
        if size <= 64 and 3 * size**2 * (len(train) + len(test)) < 2e9:  # bytes
            train, test = read_all(train, size), read_all(test, size)
    small, classes = isinstance(train, tuple), {f"class {n}": c for n, c in enumerate(classes)}
    if augment == "auto":  # shapes were already placed and turned at random
        augment = "none" if name == "shapes" else "crop-flip" if small else "randaugment"
    if small and augment not in ("none", "crop-flip"):
        raise ValueError(f"--augment {augment} needs large images; {name} takes none or crop-flip")
    if small:
        return InMemory(train, test, classes, augment, device)
    for path, _ in (train + test)[:: (len(train) + len(test)) // 300 + 1]:
        with suppress(OSError):  # broken ones are replaced later
            read_image(path)
    return Streamed(train, test, classes, augment, device, workers)


# ------------------------------------------------------------------------------------------------
# 4 arguments

# What a method is, whatever the flags say; with r = 0 there are no factors.
METHODS = dict(lte={}, lora=dict(heads=1), relora=dict(heads=1), mhlora=dict(full_batch=False))
METHODS |= dict(localsgd=dict(r=0, base="fp32"), dense=dict(r=0, base="fp32", heads=1, parts=1))
METHODS["dense"] |= dict(overlap=0, reset="none", full_batch=False)
CHOICES = dict(method=METHODS, model=MODELS, dataset=DATASETS.split(), augment=AUGMENT)
CHOICES |= dict(init=lte.INITS, base=lte.BASES, wire=lte.BASES, reset=("none", "B", "AB"))
CHOICES |= dict(export=("exact", "forward"), resume=("last", "previous", "auto"))
ZERO = "workers merge_warmup overlap warmup weight_decay label_smoothing outer_momentum seed"
SHARES = "label_smoothing", "outer_momentum"
# What may differ between processes, and between a run and the one that goes on from it.
OWN = "data where out rank runs restarts".split()
FREE = OWN + "download workers compile export eval_every eval_only compare plot".split()
FREE += "bench plan save_every resume timeout world peers sharing".split()
SWITCHES = "--full-batch", "--bf16", "--compile"  # one word, but a set of flags for --compare


def make_parser():
    """The flags that the text at the top of this file lists: name, kind, (what holds without)."""
    parser = argparse.ArgumentParser("train.py", "see --help", add_help=False, allow_abbrev=False)
    more = dict(compare=dict(nargs="*"), resume=dict(nargs="?", const="last"))
    for name, kind, default in re.findall(r"^    --(\S+) ?(\S*).*\((.*)\)$", __doc__, re.M):
        if not kind:
            parser.add_argument(f"--{name}", action="store_true")
            continue
        kind = dict(INT=int, FLOAT=float).get(kind, str)
        value = None if re.search("off|;", default) else kind(default)
        options = dict(choices=CHOICES.get(name), **more.get(name, {}))
        parser.add_argument(f"--{name}", type=kind, default=value, **options)
    return parser


def parse_args(argv=None):
    """The arguments; `runs` says what to train: {"": them}, or one for each set of --compare."""
    argv, sets = list(sys.argv[1:] if argv is None else argv), []
    if "--compare" in argv:  # argparse would take a set of flags for a flag
        at, more = argv.index("--compare"), argv[argv.index("--compare") + 1 :]
        sets = list(takewhile(lambda w: not w or " " in w or w in SWITCHES, more))
        argv = argv[: at + (not sets)] + more[len(sets) :]
    args = settle(argv)
    args.runs = {flags: settle(argv + shlex.split(flags)) for flags in sets} or {"": args}
    for flags in sets:  # each in a folder of its own, and resumed if it was begun
        name = re.sub(r"[^\w.+-]+", "_", flags.replace("--", "")).strip("_") or "as_given"
        args.runs[flags].out = str(Path(args.out, name))
        args.runs[flags].resume = args.resume and "auto"
        if {"--bench", "--plan", "--eval-only", "--out", "--plot"} & set(shlex.split(flags)):
            raise ValueError(f"--compare {flags!r}: --bench and the like stand outside the quotes")
    args.compare = bool(sets)
    return args


def settle(argv):
    """The arguments of one run, checked, with its method's own settings filled in."""
    if {"-h", "--help"} & set(argv):
        sys.exit(print(__doc__))
    args, unknown = (parser := make_parser()).parse_known_args(argv)
    if unknown:
        flag, known = unknown[0].split("=")[0], parser._option_string_actions
        near = [k for k in known if k.startswith(flag)] + difflib.get_close_matches(flag, known)
        parser.error(f"{flag} is no flag; {f'did you mean {near[0]}?' if near else 'see --help'}")
    for name, value in vars(args).items():
        zero, most = name in ZERO.split(), 1 if name in SHARES else math.inf
        if type(value) in (int, float) and not (0 < value < most or zero and value == 0):
            rule = f"{'0 or more' if zero else 'above 0'}, and below {most}"
            parser.error(f"--{name.replace('_', '-')} {value}: must be {rule}")
    args.world, args.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    args.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # by torchrun
    # Where one process runs all heads nothing is sent; then what N workers would send is computed.
    args.peers = args.world if args.world > 1 else max(args.heads, 2)
    args.r = args.r or (4 if args.method in ("lora", "relora") else 32)
    args.merge_every = args.merge_every or (50 if args.method == "relora" else 4)
    args.reset = args.reset or ("AB" if args.method == "relora" else "none")
    args.lr = args.lr or (2e-3 if args.method in ("dense", "localsgd") else 1e-3)
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    vars(args).update(METHODS[args.method])
    args.lora_alpha = args.lora_alpha or 8.0 * args.r
    args.sharing = None if args.method == "mhlora" or args.heads % args.peers else args.peers
    args.where = args.dataset, args.data, args.augment, args.download, args.workers
    if error := mismatch(args):
        parser.error(error)
    return args


def mismatch(args):
    """What is wrong with arguments that do not go together, or None."""
    heads, world, T, mixed = args.heads, args.world, args.merge_every, args.augment in Streamed.MIX
    multiple = math.lcm(heads, world) * math.lcm(args.accumulate, Streamed.GROUP if mixed else 1)
    if args.batch_size % multiple:
        split = f"{heads} heads, {world} processes, {args.accumulate} micro-batches, --augment"
        return f"--batch-size {args.batch_size}: use a multiple of {multiple}, for {split}"
    if args.method != "dense" and (heads % world or (args.method == "mhlora" and world > 1)):
        return f"--method {args.method}, --heads {heads}: not for {world} processes; use a multiple"
    if T % args.parts or args.overlap >= T // args.parts:
        rule = "--parts must divide --merge-every, --overlap be less than the steps between merges"
        return f"--merge-every {T}, --parts {args.parts}, --overlap {args.overlap}: {rule}"
    if (args.reset != "none") + (args.merge_warmup > 0) + (args.overlap > 0 or args.parts > 1) > 1:
        return f"--reset {args.reset}, --merge-warmup, and --overlap or --parts exclude each other"
    if (args.plan or args.bench) and (world > 1 or args.method == "dense"):
        return "--bench and --plan compare a method of heads with dense, on one process"
    workers = re.match(r"([1-9]\d*),(?=.*[1-9])\d*\.?\d*$", args.plan or "1,1")
    if not workers or heads % int(workers[1]):
        return f"--plan {args.plan}: WORKERS, a divisor of --heads {heads}, and MBIT: 2,100"
    if args.compare is not None:
        return '--compare takes sets of flags in quotes, such as "--r 8", and "" for none'


# ------------------------------------------------------------------------------------------------
# 5 one step of training


def learning_rate(step, args):
    """Rate of step 1 .. steps: warm-up, cosine to zero; after each reset a short warm-up again."""
    rate = args.lr * min(1.0, step / max(1, args.warmup))  # 1) linear warm-up
    progress = max(0, step - args.warmup) / max(1, args.steps + 1 - args.warmup)
    rate *= 0.5 * (1 + math.cos(math.pi * progress))  # 2) cosine to zero, one step after the last
    # 3) new factors start with empty moments: let them fill at a small rate
    if args.reset != "none" and step > args.merge_every:
        since = (step - 1) % args.merge_every + 1
        rate *= min(1.0, since / (1 + min(args.warmup, args.merge_every // 4)))
    return rate


def make_model(args, data, device):
    """The plain model, or as the method's heads have it."""
    model = new_model(args, data, device)
    if args.method != "dense":
        options = dict(r=args.r, lora_alpha=args.lora_alpha, init=args.init, base=args.base)
        options |= dict(heads=args.heads, parallel=args.method != "mhlora", seed=args.seed)
        model = lte.LTE(model, **options)
    for head in getattr(model, "heads", [model]) if args.compile else ():
        head.compile()
    if args.method == "dense" and args.world > 1:  # the view saves 4 bytes a parameter
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def make_optimizers(args, model):
    """AdamW; and for merges None, or SGD with minus the mean of what heads learnt as gradient."""
    # Dense matrices decay. Factors do not: instead of them W decays, at the merges.
    groups = [dict(params=[], weight_decay=0.0), dict(params=[], weight_decay=args.weight_decay)]
    for p in model.parameters():
        groups[args.r == 0 and p.dim() > 1]["params"].append(p)
    outer, momentum = None, args.outer_momentum
    if args.method != "dense" and (args.outer_lr, momentum) != (1, 0):
        options = dict(lr=args.outer_lr, momentum=momentum, nesterov=momentum > 0)
        outer = torch.optim.SGD(lte.outer_parameters(model), **options)
    return torch.optim.AdamW(groups, lr=args.lr, fused=True), outer


def train_step(model, optimizer, x, y, args):
    """One optimizer step on this process's samples; returns their mean loss before it."""
    heads, total = getattr(model, "heads", [model]), 0.0  # with samples of their own
    xs, ys = (t.unflatten(0, (len(heads), args.accumulate, -1)) for t in (x, y))  # (n, part, b)
    for k in range(args.accumulate):
        wait = args.method == "dense" and args.world > 1 and k < args.accumulate - 1
        with model.no_sync() if wait else nullcontext():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
                logits = model(xs[:, k].flatten(0, 1)).float()
            targets, smoothing = ys[:, k].flatten(0, 1), args.label_smoothing
            loss = F.cross_entropy(logits, targets, label_smoothing=smoothing) / args.accumulate
            loss.backward()
        total += loss.detach()
    for head in heads:
        nn.utils.clip_grad_norm_(head.parameters(), args.clip)
    optimizer.step()
    optimizer.zero_grad()
    return total


def add_up(values, device):
    """Each of some numbers, added over all processes. Collective."""
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    lte.collective(dist.all_reduce, sums)
    return sums.tolist()


@torch.no_grad()
def evaluate(model, data, args, device):
    """(accuracy, mean loss in nats without smoothing); all processes share the test images."""
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # correct, loss, samples
    model.eval()
    for x, y in data.test_batches(args.rank, args.world, min(500, args.batch_size)):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            logits = model(x).float()
        loss = F.cross_entropy(logits, y, reduction="sum")
        sums += torch.stack([(logits.argmax(1) == y).sum(), loss, y.new_tensor(len(y))])
    correct, loss, samples = add_up(sums.tolist(), device)
    return correct / samples, loss / samples


# ------------------------------------------------------------------------------------------------
# 6 a run

COLUMNS = "step,images,lr,train_loss,test_loss,test_accuracy,bytes_sent,seconds,merges"
SUBSPACES = "cosine", "grassmann", "effective_rank"  # more columns, with --subspaces


def train(args, data, device):
    """One run of one method; writes log.csv, model.pt, and result.json, which it returns."""
    run = Run(args, data, device)
    step = run.resume()
    run.log()
    places = torch.arange(args.batch_size).chunk(args.world)[args.rank]
    if args.full_batch:
        places = torch.arange(args.batch_size).repeat(args.heads // args.world)
    steps, noticed = range(step + 1, args.steps + 1), []
    # A first SIGTERM is noticed, a second one kills.
    old = signal.signal(signal.SIGTERM, lambda *_: noticed.append(signal.signal(15, old)))
    try:
        for x, y in data.train_batches(args.seed, args.batch_size, steps, places):
            # ---- one step of training ----
            step += 1
            rate = learning_rate(step, args)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            loss = train_step(run.model, run.optimizer, x, y, args)
            run.merge(step, rate)

            # ---- everything below is only reporting and saving ----
            run.report(step, rate, loss)
            run.save(step, stop=step in run.merges and any(add_up([len(noticed)], device)))
    except (lte.ProcessLost, FloatingPointError) as error:
        raise type(error)(f"step {step}: {error}") from error
    finally:
        # After a loss torchrun's SIGTERM follows, and main has yet to say why: then keep noting it.
        if not isinstance(sys.exception(), lte.ProcessLost):
            signal.signal(signal.SIGTERM, old)
    return run.finish()


def merge_steps(args):
    """{step: the parts to merge after it}: a K-th of W every T / K steps, and all at the end."""
    step, steps = 0, {}
    while step < args.steps:
        growing = step < args.merge_warmup
        interval = args.merge_every * step // args.merge_warmup if growing else args.merge_every
        step = min(step + max(1, interval // args.parts), args.steps)
        steps[step] = [len(steps) % args.parts]
    return steps | {args.steps: range(args.parts)}


class Run:
    """The model of one run, its merges, its checkpoints, and what is said of it."""

    def __init__(self, args, data, device):
        self.args, self.data, self.device = args, data, device
        self.out, self.folder = Path(args.out), Path(args.out, "checkpoints")
        self.dense, self.dense_file = args.method == "dense", self.folder / "dense.pt"
        self.model = make_model(args, data, device)
        self.plain = getattr(self.model, "module", self.model)  # what is tested: the merged model
        self.optimizer, self.outer = make_optimizers(args, self.model)
        self.merges, self.work, self.sent_at = merge_steps(args), None, 0
        every = range(args.eval_every, args.steps, args.eval_every)
        self.tests = {args.steps, *(min(s for s in self.merges if s >= k) for k in every)}
        self.losses, self.save_due, self.stopping = [], False, False  # losses since the last test
        self.now = self.printed = time.perf_counter()
        # In checkpoints. decays: of W since each part's own last merge.
        self.kept = dict(decays=[1.0] * args.parts, seconds=0.0, steps=0, speed=0.0, computed=0.0)
        self.kept["log"] = [",".join([COLUMNS, *SUBSPACES * args.subspaces])]
        flags = {f"--{k}".replace("_", "-"): v for k, v in vars(args).items() if k not in FREE}
        self.flags = flags | data.classes  # what a run and the one that it goes on from share
        size = sum(p.numel() for p in new_model(args, data, device).parameters())
        self.dense_bytes, self.merge_bytes = 8 * size * (args.peers - 1) / args.peers, 0.0
        if not self.dense:  # asks for bitsandbytes, if need be
            cost = lte.cost_report(self.model, wire=args.wire, workers=args.sharing)
            self.merge_bytes = cost["sent"]["merge"] / args.parts
        images = f"{data.sizes[0]:,} + {data.sizes[1]:,} images of {len(data.classes)} classes"
        self.say(f"{args.dataset}: {images}; {args.method}: {args.model}, {size:,} parameters")

    def merge(self, step, rate):
        """To be called after every optimizer step. With --overlap the heads go on meanwhile."""
        args, decays, last = self.args, self.kept["decays"], step == self.args.steps
        if self.dense:  # has nothing to merge, but is asked as often whether it is finite
            norm = nn.utils.get_total_norm
            if step in self.merges and not norm(self.plain.parameters()).isfinite():
                raise FloatingPointError("a weight is NaN or inf; lower --lr, or warm up longer")
            return
        decays[:] = [decay * (1 - rate * args.weight_decay) for decay in decays]
        if self.work and (last or step == self.sent_at + args.overlap):
            self.work.wait()
            self.work = None
        options = dict(optimizer=self.optimizer, outer_optimizer=self.outer, wire=args.wire)
        options |= dict(reset="none") if last else dict(reset=args.reset, async_op=args.overlap > 0)
        for k in self.merges.get(step, ()):
            self.work = lte.merge(self.model, decay=decays[k], part=(k, args.parts), **options)
            self.kept["computed"] += self.merge_bytes * (args.world == 1)
            decays[k], self.sent_at = 1.0, step

    def save(self, step, stop):
        """Save where --save-every asks for it or the run is to stop, once no merge travels."""
        every, self.stopping = self.args.save_every, self.stopping or stop
        self.save_due |= self.stopping or bool(every and step % every == 0)
        if not self.save_due or self.work:
            return
        self.save_due, losses = False, [loss.item() for loss in self.losses]
        extra = dict(flags=self.flags, kept=self.kept | dict(losses=losses))
        if self.dense:
            state = dict(model=self.plain.state_dict(), optimizer=self.optimizer.state_dict())
            self.write(self.dense_file, state | dict(step=step, extra=extra))
        else:
            lte.save(self.folder, self.model, self.optimizer, self.outer, step=step, **extra)
        self.say(f"step {step}  saved in {self.folder}{'; --resume goes on' * self.stopping}")
        if self.stopping:
            sys.exit(128 + signal.SIGTERM)  # as a shell has it: not finished

    def resume(self):
        """Steps done: 0, or those of the checkpoint that this run was asked to go on from."""
        folder, found = self.folder, self.dense_file.exists() or lte.checkpoints(self.folder)
        asked = self.args.resume or ("auto" if self.args.restarts else None)
        if found and not asked:
            raise ValueError(f"{folder} is of an earlier run; add --resume, or another --out")
        if not found and asked in (None, "auto"):
            return 0
        if self.dense_file.exists():
            saved = torch.load(self.dense_file, map_location=self.device, weights_only=True)
        else:
            saved = lte.newest(folder, asked == "previous")[1]
        check_same(folder, saved["extra"]["flags"], self.flags)
        if self.dense:
            self.plain.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        else:
            lte.load(folder, self.model, self.optimizer, self.outer, previous=asked == "previous")
        self.kept = saved["extra"]["kept"]
        self.losses = [torch.tensor(loss, device=self.device) for loss in self.kept.pop("losses")]
        self.say(f"step {saved['step']}  goes on from {folder}")
        return saved["step"]

    def say(self, line):
        if self.args.rank == 0:
            print(line, flush=True)

    def write(self, path, content):
        """Process 0 writes under another name, then renames: the file is whole or not there."""
        if self.args.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(path.name + ".new")
            aside.write_text(content) if isinstance(content, str) else torch.save(content, aside)
            os.replace(aside, path)

    def report(self, step, rate, loss):
        """A line every five seconds; where it is due a test of W, and a row in log.csv."""
        args, testing, begun = self.args, step in self.tests, self.now
        self.now = now(self.device) if testing else time.perf_counter()
        if self.losses or self.kept["steps"]:  # the first step warms up
            self.kept["seconds"] += self.now - begun
            self.kept["steps"] += 1
            self.kept["speed"] = self.kept["steps"] * args.batch_size / self.kept["seconds"]
        self.losses.append(loss)
        if not testing and self.now - self.printed < 5:
            return
        loss = torch.stack(self.losses).nanmean().item()  # over the heads here that are sound
        if testing:
            accuracy, test_loss = evaluate(self.plain, self.data, args, self.device)
            self.model.train()
            row = [step, step * args.batch_size, rate, loss, test_loss, accuracy]
            row += [self.bytes_sent(step), self.kept["seconds"], getattr(self.model, "merges", 0)]
            self.log([*row, *self.subspaces().values()])
            self.losses = []
        line = f"step {step}/{args.steps}  loss {loss:.3f}  {self.kept['speed']:.0f} images/s  "
        line += f"{self.bytes_sent(step) / 1e6:.1f} MB sent"
        self.say(line + (f"  accuracy {100 * accuracy:.1f} %" if testing else ""))
        self.now = self.printed = time.perf_counter()

    def log(self, *rows):
        """More rows for log.csv."""
        self.kept["log"] += [",".join(f"{x:.10g}" for x in row) for row in rows]
        self.write(self.out / "log.csv", "\n".join([*self.kept["log"], ""]))

    def bytes_sent(self, step):
        """Bytes that left one process so far: counted, or computed for `peers` of them."""
        if self.dense:
            return round(self.dense_bytes * step)
        return self.model.bytes_sent + round(self.kept["computed"])

    def subspaces(self):
        """Means over the low-rank layers of what lte.subspace_report says; NaN without any."""
        names, none = SUBSPACES * self.args.subspaces, [dict.fromkeys(SUBSPACES, math.nan)]
        layers = lte.subspace_report(self.model).values() if names and self.args.r else none
        return {name: fmean(layer[name] for layer in layers) for name in names}

    def finish(self):
        """Exports, tests what was exported, says so, and writes model.pt and result.json."""
        args, weights = self.args, self.plain.state_dict()
        if not self.dense:
            weights = lte.merged_state_dict(self.model, exact=args.export == "exact")
        exported = new_model(args, self.data, self.device)
        exported.load_state_dict(weights)
        accuracy, loss = evaluate(exported, self.data, args, self.device)
        how = "counted" if args.world > 1 and not self.dense else "computed"
        names = "method dataset model heads r lora_alpha merge_every reset base wire steps "
        result = {name: getattr(args, name) for name in (names + "batch_size lr seed").split()}
        result |= dict(test_accuracy=accuracy, test_loss=loss, **self.subspaces())
        result |= dict(images_per_second=round(self.kept["speed"], 1))
        result |= dict(bytes_sent_per_step=round(self.bytes_sent(args.steps) / args.steps))
        result |= dict(dense_bytes_per_step=round(self.dense_bytes), processes=args.world)
        result |= dict(bytes_are=f"{how} for {args.peers} processes", torch=torch.__version__)
        result |= dict(unreadable_images=len(self.data.bad), seconds=round(self.kept["seconds"], 1))
        result |= dict(device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
        self.say("\n".join(f"{key}: {value}" for key, value in result.items()))
        text = json.dumps(result | dict(classes=self.data.classes), indent=1) + "\n"
        self.write(self.out / "model.pt", weights)
        self.write(self.out / "result.json", text)
        return result


def check_same(where, theirs, ours):
    """Refuse to go on from a run of other flags or classes, or of classes in another order."""
    for name in theirs | ours:
        if (there := theirs.get(name)) != (here := ours.get(name)):
            text = f"{where} is of a run with {name} {there}, this one has {here}"
            raise ValueError(f"{text}; give the same, or choose another --out")


def now(device):
    """Seconds, with the device's work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ------------------------------------------------------------------------------------------------
# 7 a step's time, plans on paper, and the command line


def peak_memory(device, forget=False):
    """The most bytes held since it was told to forget: a GPU's tensors, or all of a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device) if forget else None
        return torch.cuda.max_memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed may still be held
    Path("/proc/self/clear_refs").write_text("5" if forget else "1")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def bench(args, data, device, rounds=15):
    """Times whole training steps, which take turns: what a machine clocks at changes."""
    clock = partial(now, device) if device.type == "cuda" else time.process_time  # of one thread
    torch.set_num_threads(torch.get_num_threads() if device.type == "cuda" else 1)
    dense = argparse.Namespace(**vars(args) | METHODS["dense"] | dict(method="dense"))
    kinds = {"dense": (dense, None), "LTE": (args, None)}  # None: what takes fewer multiply-adds
    kinds |= {"LTE, W + s U V formed": (args, True), "LTE, part by part": (args, False)}
    batches = partial(data.train_batches, args.seed, args.batch_size)
    places, steps, peaks = torch.arange(args.batch_size), {}, {}

    def seconds(name, x, y):
        (own, formed), begun = kinds[name], clock()
        counted = lte.Product.formed if formed is None else lambda tokens, W: formed
        with mock.patch.object(lte.Product, "formed", staticmethod(counted)):
            train_step(*steps[name], x, y, own)
        return clock() - begun

    [batch] = batches([1], places)
    for name, (own, _) in kinds.items():  # the peak of each alone, by its first two steps
        before, model = peak_memory(device, forget=True), make_model(own, data, device)
        steps[name] = model, make_optimizers(own, model)[0]
        for _ in range(2):
            seconds(name, *batch)
        peaks[name] = peak_memory(device) - before
    times = [{name: seconds(name, *batch) for name in kinds} for _ in range(rounds)]
    print("\n| | ms a step | of dense | peak MB |\n|---|--:|--:|--:|")
    for name in kinds:
        ms = 1000 * median(one[name] for one in times)
        ratio = median(one[name] / one["dense"] for one in times)
        print(f"| {name} | {ms:.1f} | {ratio:.3f} | {peaks[name] / 1e6:.0f} |")
    options = dict(merge_every=args.merge_every, wire=args.wire, workers=args.sharing)
    sent = lte.cost_report(steps["LTE"][0], **options)["sent"]
    print(f"bytes a step, {args.peers} processes: {sent['step']:,.0f}, dense {sent['dense']:,.0f}")
    waited, last = 0.0, (begun := now(device))
    for batch in batches(range(1, 21), places):
        waited += now(device) - last
        seconds("LTE", *batch)
        last = now(device)
    print(f"waiting for data: {100 * waited / (last - begun):.1f} % of the time of 20 steps")


def plan(args, data, device):
    """What each of --plan's workers would hold, send and wait for; nothing is trained."""
    workers, mbit = (float(number) for number in args.plan.split(","))
    options = dict(merge_every=args.merge_every, wire=args.wire, workers=int(workers))
    cost = lte.cost_report(make_model(args, data, device), **options)
    held, sent = cost["held"]["all"], cost["sent"]
    print(f"\n| each of {workers:g}, {mbit:g} Mbit/s | LTE | data parallel AdamW | times less |")
    print("|---|--:|--:|--:|")
    for what, ours, theirs, unit, scale in (
        ("holds, activations aside", held, cost["held_dense"]["all"], "MB", 1e-6),
        ("sends a step", sent["step"], sent["dense"], "MB", 1e-6),
        ("sends at once", sent["merge"] / args.parts, sent["dense"], "MB", 1e-6),
        ("waits a step", sent["step"], sent["dense"], "s", 8e-6 / mbit),
    ):
        times = f"{theirs / ours:.1f}" if ours else "-"  # one worker sends nothing
        print(f"| {what} | {ours * scale:,.3f} {unit} | {theirs * scale:,.3f} {unit} | {times} |")


TROUBLE = {  # a pattern in what others raise, and what helps
    r"^builtins \[Errno|inline_container|iostream": "free space, or choose another --out",
    "No module named": "pip install it",
    "shared memory|DataLoader worker": "give more (docker --shm-size=2g), or lower --workers",
    "^torch._(dynamo|inductor)": "--compile needs a C++ compiler such as g++; leave it out",
    "out of memory": "lower --batch-size, or raise --accumulate",
    "device ordinal": "use as many processes as GPUs, or CUDA_VISIBLE_DEVICES= for the CPU",
    "gloo|NCCL|Connection": "a process is gone, or longer away than --timeout; --resume goes on",
}


def start(args):
    """This process's device, and the process group if torchrun started several."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if args.world > 1:
        # Without this NCCL ends a process that waits in vain before it could say why.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        wait = timedelta(seconds=args.timeout)
        store, rank, world = next(dist.rendezvous("env://", timeout=wait))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # It outlives a restart: addresses of the last attempt must not be read.
            store = dist.PrefixStore(f"attempt {args.restarts}", store)
        group = dict(store=store, rank=rank, world_size=world, timeout=wait)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **group)
    return device


def eval_only(args, data, device):
    """Test a model.pt that --model, --patch and --dataset describe."""
    model, file = new_model(args, data, device), Path(args.eval_only)
    if (told := file.with_name("result.json")).exists():
        check_same(file, json.loads(told.read_text())["classes"], data.classes)
    try:
        model.load_state_dict(torch.load(file, map_location=device, weights_only=True))
    except Exception as error:  # what torch.load raises depends on what is in the file
        text = f"{file} is no model.pt of {args.model} on {args.dataset} ({type(error).__name__})"
        raise ValueError(f"{text}; give its own --model, --patch and --dataset") from error
    accuracy, loss = evaluate(model, data, args, device)
    if args.rank == 0:
        print(f"test_accuracy: {accuracy}\ntest_loss: {loss}")


def print_table(results, more):
    """A row for each set of flags; more: columns."""
    titles = ["flags", "test accuracy", "test loss", "bytes a step", "images/s", *more]
    print(f"\n| {' | '.join(titles)} |\n|---{'|--:' * (len(titles) - 1)}|")
    for flags, r in results.items():
        cells = [f"{100 * r['test_accuracy']:.2f} %", f"{r['test_loss']:.4f}"]
        cells += [f"{r[name]:,.0f}" for name in ("bytes_sent_per_step", "images_per_second")]
        cells += [f"{r.get(name, math.nan):.3f}" for name in more]
        print(f"| {' | '.join([flags or '(as given)', *cells])} |")


def draw_plot(runs, file):
    """From each run's log.csv: accuracy against samples and bytes, and how far heads are apart."""
    import matplotlib.pyplot as plt

    pairs = [("images", "test_accuracy"), ("bytes_sent", "test_accuracy")]
    pairs += [("images", y) for y in SUBSPACES[::2] * any(one.subspaces for one in runs.values())]
    figure, _ = plt.subplots(len(pairs) // 2, 2, figsize=(10, 2 * len(pairs)), layout="constrained")
    for k, (flags, one) in enumerate(runs.items()):
        rows = [row.split(",") for row in Path(one.out, "log.csv").read_text().split()]
        columns = {name: list(map(float, column)) for name, *column in zip(*rows, strict=True)}
        for axis, (x, y) in zip(figure.axes, pairs[: 2 + 2 * one.subspaces], strict=False):
            axis.plot(columns[x], columns[y], f"C{k}", label=flags or one.method)
            axis.set(xlabel=x, ylabel=y, xscale="log" if x == "bytes_sent" else "linear")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left")
    figure.savefig(file, dpi=150)


def run(args):
    device = start(args)
    lte.agree(**{f"--{k}".replace("_", "-"): v for k, v in vars(args).items() if k not in OWN})
    if args.download or args.dataset == "imagenet":  # fetched or unpacked by one of a machine
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            load_data(*args.where, device)
        lte.agree(opened=args.dataset)
    for asked, answer in ((args.eval_only, eval_only), (args.bench, bench), (args.plan, plan)):
        if asked:
            return answer(args, load_data(*args.where, device), device)
    rows = args.runs.items()
    results = {flags: train(one, load_data(*one.where, device), device) for flags, one in rows}
    if args.compare and args.rank == 0:
        print_table(results, SUBSPACES * any(one.subspaces for one in args.runs.values()))
    if args.plot and args.rank == 0:
        draw_plot(args.runs, Path(args.out, "plot.png"))


def main(argv=None):
    try:
        run(parse_args(argv))
    except Exception as error:
        told = isinstance(error, ValueError | lte.ProcessLost)  # the remedy, too
        said = "" if told else f"{type(error).__module__} {error}"
        remedies = [remedy for pattern, remedy in TROUBLE.items() if re.search(pattern, said)]
        if not (told or remedies or isinstance(error, ImportError | ArithmeticError | OSError)):
            raise
        sys.exit("; ".join([f"train.py: {error}".partition("\n")[0], *remedies[:1]]))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
