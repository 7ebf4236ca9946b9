"""What lte.py and train.py promise, as laws to read: one a test, in the order of their sections.

    python -W error -m pytest -q

Laws hold in float64 to 1e-10, or bit for bit, all sizes different. The slow, obviously right form
of the method is `Twin`: N plain modules one after the other, with W + s (B A - B' A') formed. A
test marked `on(2, 4)` is run by so many processes (`world`) together: forked from a clean server,
they talk through gloo, and each asserts for itself.
"""

import copy
import csv
import dataclasses
import gc
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import types
import warnings
import weakref
from datetime import timedelta
from functools import cache, partial, wraps
from pathlib import Path
from unittest import mock

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch._inductor.exc import InvalidCxxCompiler
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations, rnn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import lte
import train

torch.set_num_threads(1)  # bits are promised for equal thread counts; and forked processes are many

N, R, IN, OUT, CLASSES, B = 3, 2, 5, 7, 3, 4  # B: samples of one head
ALPHA = 3.0  # s = 1.5
RESETS = "none", "B", "AB"
SGD = partial(torch.optim.SGD, lr=0.1)
NESTEROV = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)  # bit for bit
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
cases, raises, pairs = pytest.mark.parametrize, pytest.raises, itertools.combinations


@pytest.fixture(autouse=True)
def a_test_starts_from_the_same_seed_whatever_ran_before():
    torch.manual_seed(0)


def wrap(module, **options):
    return lte.LTE(module, **{"heads": N, "r": R, "lora_alpha": ALPHA} | options)


def net(seed=0):
    """Weights with factors, and copies, in float64: 5 -> 7 -> 3."""
    torch.manual_seed(seed)
    layers = nn.Linear(IN, OUT), nn.LayerNorm(OUT), nn.Tanh(), nn.Linear(OUT, CLASSES)
    return nn.Sequential(*layers).double()


def learn(model, seed=1, size=0.1):
    """As if every head had learnt something of its own, wherever it lives."""
    with torch.no_grad():
        for n, head in enumerate(model.heads, model.first):
            g = torch.Generator().manual_seed(1000 * seed + n)
            for p in (p for p in head.parameters() if p.requires_grad):
                p += size * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return model


def seasoned(module, **options):
    """A wrapped module in the middle of a round: A', B' are neither zero nor equal to A, B."""
    model = learn(wrap(module, **options))
    lte.merge(model)
    return learn(model, seed=2)


def batch(heads=N, seed=3):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(heads * B, IN, generator=g, dtype=torch.float64)
    return x, torch.randint(CLASSES, (heads * B,), generator=g)


def loss(model, x, y):
    logits = model(x)
    logits *= 1.0  # outputs may be changed in place
    return F.cross_entropy(logits, y)


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss(model, x, y).backward()
    optimizer.step()


def trained(**options):
    model = wrap(net(), **options)
    optimizer = torch.optim.Adam(model.parameters(), 0.01, eps=1e-30)
    for k in range(4):
        step(model, optimizer, *batch(seed=k))
    return model, optimizer


def snapshot(model):
    return {k: t.detach().clone() for k, t in [*model.named_parameters(), *model.named_buffers()]}


def by_name(model, low_rank=None):
    """The Bases, or those with or without factors, by the plain model's names."""
    return {b.name: b for b in model.shared if low_rank in (None, b.low_rank)}


def loras(model):
    """What heads here train beside weights, weight by weight, head by head."""
    return [lora for base in by_name(model, True).values() for lora in base.learners]


def weight_of(model, h, name):
    """W + s (B A - B' A') of a head here, formed in the obvious way; or its copy."""
    base = by_name(model)[name]
    if not base.low_rank:
        return model.heads[h].state_dict()[name].clone()
    lora = base.learners[h]
    update = lora.B @ lora.A - lora.merged_B @ lora.merged_A
    return base.dense() + (lora.scaling * update).detach().view(base.shape)


class Twin:
    """The method as the paper writes it, with SGD: N plain modules, every matrix formed."""

    def __init__(self, module, model):
        self.module, self.W = module, lte.merged_state_dict(model)
        self.low_rank = by_name(model, True)
        self.heads = [{k: W for k, W in self.W.items() if k not in self.low_rank} for _ in range(N)]
        for (n, own), (k, base) in itertools.product(enumerate(self.heads), self.low_rank.items()):
            own |= {(k, f): getattr(base.learners[n], f).detach().clone() for f in "AB"}
        self.merged = [dict(own) for own in self.heads]

    def weights(self, n):
        """What head n computes with: W + s (B A - B' A'), and its copies."""
        own, old = self.heads[n], self.merged[n]
        dense = {k: own[k] for k in self.W if k in own}
        for k in self.low_rank:
            update = own[k, "B"] @ own[k, "A"] - old[k, "B"] @ old[k, "A"]
            dense[k] = self.W[k] + ALPHA / R * update
        return dense

    def head(self, n, x):
        return torch.func.functional_call(self.module, self.weights(n), x)

    def __call__(self, x):
        return torch.cat([self.head(n, part) for n, part in enumerate(x.chunk(N))])

    def step(self, x, y, rate=0.1):
        for n, (x_n, y_n) in enumerate(zip(x.chunk(N), y.chunk(N), strict=True)):
            own = self.heads[n] = {k: p.clone().requires_grad_() for k, p in self.heads[n].items()}
            grads = torch.autograd.grad(F.cross_entropy(self.head(n, x_n), y_n), [*own.values()])
            steps = zip(own.items(), grads, strict=True)
            self.heads[n] = {k: (p - rate * grad).detach() for (k, p), grad in steps}

    def send(self):
        """The mean of what heads hold now."""
        weights = [self.weights(n) for n in range(N)]
        self.mean = {k: sum(w[k] for w in weights) / N for k in self.W}
        self.sent = [dict(own) for own in self.heads]

    def arrive(self, names):
        """W, of the tensors named, is that mean; heads keep what they did since."""
        self.W = self.W | {k: self.mean[k] for k in names}
        for own, merged, sent in zip(self.heads, self.merged, self.sent, strict=True):
            merged |= {(k, f): sent[k, f] for k in names if k in self.low_rank for f in "AB"}
            own |= {k: self.W[k] + own[k] - sent[k] for k in names if k in own}


def leaves(tree):
    tree = vars(tree) if dataclasses.is_dataclass(tree) else tree
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once of the memory that operations inside took."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes, self.shapes = {}, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in leaves((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for t in (t for t in leaves(result) if t.device.type != "meta"):
            storage = t.untyped_storage()
            if storage._cdata not in given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.shapes.add(tuple(t.shape))
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.bytes = max(self.bytes, sum(nbytes for _, nbytes in self.alive.values()))
        return result


# ---- several processes ----


def on(*worlds):
    def decorate(body):
        @wraps(body)
        def test(**given):
            run_on(test, given)

        return cases("world", worlds)(test)

    return decorate


def run_on(test, given):
    """What each process returns, in their order; the first one's exception is raised here."""
    torch.multiprocessing.set_forkserver_preload([__name__])
    start = partial(torch.multiprocessing.start_processes, start_method="forkserver")
    with tempfile.TemporaryDirectory() as folder:
        start(one_process, (folder, test, given), given["world"])
        return [torch.load(f, weights_only=False) for f in sorted(Path(folder).glob("rank*"))]


def one_process(rank, folder, test, given):
    warnings.simplefilter("error")
    torch.manual_seed(rank)
    if given["world"] > 1:
        meet(f"{folder}/meeting", rank, given["world"])
    try:
        torch.save(getattr(test, "__wrapped__", test)(**given), f"{folder}/rank{rank}")
    except (KeyboardInterrupt, SystemExit) as error:  # else taken for a good end
        raise RuntimeError("the process was ended") from error
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def meet(place, rank, world, seconds=60):
    options = dict(rank=rank, world_size=world, timeout=timedelta(seconds=seconds))
    dist.init_process_group("gloo", init_method=f"file://{place}", **options)


def everyone(value):  # what each process has
    values = [value] * lte.processes()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def as_one_process(function, *args):
    """What each process's outcomes make together is what one process with all heads finds."""
    ranks = everyone(function(*args))
    if lte.processes()[0] == 0:
        with mock.patch.object(dist, "is_initialized", lambda: False):
            expected = function(*args)
        for theirs, (shared, heads) in zip(zip(*ranks, strict=True), expected, strict=True):
            same([there for there, _ in theirs], [shared] * len(theirs))
            same({n: head for _, there in theirs for n, head in there.items()}, heads)


def outcome(model):  # what all processes hold; and what each head does, by its number
    forward = {name: base.dense().clone() for name, base in by_name(model).items()}
    heads = [{k: t.detach().clone() for k, t in h.state_dict().items()} for h in model.heads]
    return (lte.merged_state_dict(model), forward), dict(enumerate(heads, model.first))


def as_if_among(world, patch):
    """One process that believes to be the first of several; the others send what it sends."""
    fakes = dict(is_initialized=lambda: True, get_rank=lambda *_: 0)
    fakes["get_world_size"] = lambda *_: world
    fakes |= dict.fromkeys(("broadcast", "all_gather_object"), lambda *_, **__: None)
    fakes["all_gather"] = lambda every, mine, **_: [t.copy_(mine) for t in every]
    fakes["all_to_all_single"] = lambda there, sent, **_: there.copy_(sent)
    [patch.setattr(dist, name, fake) for name, fake in fakes.items()]


def loose(**options):
    """Layers that no forward joins, of sizes that neither rows nor processes divide; in float32."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 1), nn.Linear(10, 101), nn.Linear(33, 5), nn.BatchNorm1d(77), nn.PReLU()
    return wrap(nn.Sequential(*layers), **dict(heads=4, r=4, lora_alpha=8) | options)


# ---- models: name -> b samples -> module, its arguments, and those by name; in float64 ----


class Model(nn.Module):
    """Children, parameters and buffers by name, and a function of all of them as its forward."""

    def __init__(self, function, **owns):
        super().__init__()
        self.function = function
        for name, value in owns.items():
            buffer = isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
            self.register_buffer(name, value) if buffer else setattr(self, name, value)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)

    def get_extra_state(self):
        return torch.tensor(3)

    def set_extra_state(self, state):
        assert state == 3


class Forward:
    def packed(self, x, lengths):
        x = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, (h, _) = self.a(x)
        return self.out(rnn.pad_packed_sequence(y, batch_first=True, total_length=3)[0]), h[-1]

    def routed(self, x):
        probability, chosen = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros(*x.shape[:-1], OUT, dtype=x.dtype)
        for k in chosen.unique():
            y[chosen == k] = self.experts[k](x[chosen == k])
        return y * probability.unsqueeze(-1)

    def quantized(self, x):
        chosen = torch.cdist(x, self.codes).argmin(1)
        if self.training:
            self.codes = self.codes + 0.1 * (x.detach().mean(0) - self.codes)
            self.uses += 1
        return self.a(x - self.codes[chosen])

    def recomputed(self, x):
        self.kept = checkpoint(lambda z: self.a(z).tanh(), x, use_reentrant=False)
        return self.out(self.kept)

    def of_any_names(self, x):
        return x @ self.weight * (self.base + self.heads + self.names) * self.scalar


def conv1d(i=IN, o=OUT):
    """GPT-2's linear layer: its weight lies the other way round."""
    owns = dict(weight=nn.Parameter(torch.randn(i, o) / 4), bias=nn.Parameter(torch.ones(o)))
    return Model(lambda self, x: torch.addmm(self.bias, x, self.weight), **owns)


VIT = dict(image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=20)
SWIN = dict(patch_size=[2, 2], embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=[2, 2])
Output = dataclasses.make_dataclass("Output", ["logits", "loss", "hidden"])


def models(b):
    """name -> module, its arguments: a batch of b samples"""
    torch.manual_seed(b)
    x, y, xs, images = (torch.randn(b, *s) for s in ((IN,), (OUT,), (3, IN), (3, 8, 8)))
    ids, wide, lengths = torch.randint(9, (b, 4)), torch.randn(b, 5, 6), 1 + torch.arange(b) % 3
    vision, chain = torchvision.models, nn.Sequential
    torch.manual_seed(0)  # modules do not depend on b
    a, last, square = nn.Linear(IN, OUT), nn.Linear(OUT, 4), nn.Linear(IN, IN)
    table, lstm = nn.Embedding(9, IN), nn.LSTM(IN, OUT, 2, batch_first=True)
    Swin = partial(vision.SwinTransformer, stochastic_depth_prob=0, num_classes=3)
    blocks = [vision.convnext.CNBlockConfig(*sizes, 1) for sizes in ((8, 12), (12, None))]
    layer = nn.TransformerEncoderLayer(IN + 1, 2, 10, dropout=0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    attention = nn.MultiheadAttention(6, 2, kdim=IN, vdim=OUT, batch_first=True)
    tied = chain(table, square, nn.Tanh(), nn.Linear(IN, 9))
    tied[3].weight = table.weight
    frozen = chain(nn.Linear(IN, OUT), nn.LayerNorm(OUT), nn.Linear(OUT, 4))
    frozen[2].weight.requires_grad_(False), frozen[0].bias.requires_grad_(False)
    activated = lambda self, x: self.activation(nn.BatchNorm1d.forward(self, x))  # noqa: E731
    norm = type("Norm", (nn.BatchNorm1d,), dict(forward=activated))(IN)
    norm.activation, experts = nn.PReLU(), nn.ModuleList(nn.Linear(IN, OUT) for _ in range(4))
    kept = Model(Forward.recomputed, a=a, out=last)
    kept(torch.ones(2, IN))  # from now on it holds an activation, which is no leaf
    names = {name: nn.Parameter(torch.randn(IN)) for name in ("base", "heads", "names")}
    names |= dict(weight=nn.Parameter(torch.randn(IN, IN)), none=nn.Parameter(torch.ones(0, IN)))
    names |= dict(scalar=nn.Parameter(torch.tensor(2.0)), empty=torch.ones(0))
    codes = dict(codes=torch.randn(4, IN), uses=torch.tensor(0))
    place = lambda self, x: self.a(x + self.table(torch.arange(3)))  # noqa: E731
    second = lambda self, x: self.encoder(x.transpose(0, 1)).transpose(0, 1)  # noqa: E731
    both = lambda self, x, *, c, d: {"y": self.a(x["x"]) * c, "all": [d]}  # noqa: E731
    whole = lambda self, x, y: Output(z := self.a(x), F.mse_loss(z, y), (x * x,))  # noqa: E731
    return {
        "torchvision's ViT": (vision.VisionTransformer(**VIT), images),
        "a Swin that reads its weights": (Swin(**SWIN), images),
        "a ResNet": (chain(vision.resnet.BasicBlock(3, 3), nn.Flatten()), images),
        "a ConvNeXt": (vision.ConvNeXt(blocks, num_classes=3), images),
        "a transformer with the batch second": (Model(second, encoder=encoder), wide),
        "attention with kdim": (attention, wide[:, :3], xs, torch.randn(b, 3, OUT)),
        "an LSTM of packed sequences": (Model(Forward.packed, a=lstm, out=last), xs, lengths),
        "a mixture of experts": (Model(Forward.routed, gate=nn.Linear(IN, 4), experts=experts), xs),
        "a position table looked up once": (Model(place, table=table, a=a), xs),
        "tied embeddings": (tied, ids),
        "a layer used twice": (chain(square, nn.Tanh(), square), x),
        "weight_norm": (parametrizations.weight_norm(nn.Linear(IN, OUT)), x),
        "spectral_norm": (parametrizations.spectral_norm(nn.Linear(IN, OUT)), x),
        "a BatchNorm with a child": (norm, x),
        "a codebook buffer": (Model(Forward.quantized, a=a, **codes), x),
        "bounded norms": (chain(nn.Embedding(9, IN, max_norm=0.7), a), ids),
        "GPT-2's Conv1D": (chain(conv1d(), nn.Tanh(), last), x),
        "weights read": (Model(lambda self, x: x @ self.a.weight.mT * 2 + self.a.bias, a=a), x),
        "dictionaries and keywords": (Model(both, a=a), {"x": x}, dict(c=y, d="kept")),
        "a dataclass of outputs with a loss of its own": (Model(whole, a=a), x, y),
        "its own loss": (Model(lambda self, x, y: F.mse_loss(self.a(x), y), a=a), x, y),
        "a checkpointed function, an activation that is kept": (kept, x),
        "a root nn.Linear": (a, xs),
        "parameters of any name and size": (Model(Forward.of_any_names, **names), x),
        "frozen parts": (frozen, x),
    }


def make(name, samples=1):
    torch.set_default_dtype(torch.float64)
    module, *arguments = models(samples)[name]
    torch.set_default_dtype(torch.float32)
    for p in module.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)  # torchvision's zeros would hide the rest
    keywords = arguments.pop() if isinstance(arguments[-1], dict) and arguments[1:] else {}
    return module, arguments, keywords


MODELS = list(models(1))


def mean_of(outputs):
    """A nonlinear mean over the batch of what comes out; what has no dimension is a loss."""
    outputs = [t for t in leaves(outputs) if t.requires_grad]
    return sum(t.tanh().square().mean(0).sum() if t.dim() else t for t in outputs)


def part_of(arguments, k, count):
    """The k-th of `count` parts of a batch, as leaves that take a gradient."""
    parts = tree_map(lambda t: t.chunk(count)[k].clone() if torch.is_tensor(t) else t, arguments)
    [t.requires_grad_() for t in leaves(parts) if t.is_floating_point()]
    return parts


# ---- 1 processes ----


@cases("blocks, size", [(8, 1), (4, 2), (2, 4), (3, 4), (1, 7)])
def test_a_tree_adds_every_term_once_and_a_power_of_two_block_of_heads_is_a_subtree(blocks, size):
    terms = torch.randn(blocks * size, 1000)
    add = partial(lte.tree_sum, lambda k: terms[k].clone())
    same(lte.tree_sum(lambda p: add(p * size, size), 0, blocks), add(0, blocks * size))
    torch.testing.assert_close(add(0, blocks * size), terms.sum(0))


def test_torchrun_without_a_group_or_with_one_started_too_late_is_an_error(monkeypatch):
    model = seasoned(net())
    monkeypatch.setenv("WORLD_SIZE", "2")
    for call in (lambda: wrap(net()), lambda: lte.merge(model)):
        with raises(RuntimeError, match="init_process_group"):
            call()
    as_if_among(2, monkeypatch)
    with raises(RuntimeError, match="group was started after"):
        lte.merge(model)


@on(3)
def test_processes_that_were_started_differently_all_say_which_and_how(world):
    for name, other in dict(heads=3, base="nf4", seed=5, version=9, bias="frozen").items():
        options, module, last = {"heads": 6}, net(), dist.get_rank() == 2
        options |= {name: other} if last and name in ("heads", "base", "seed") else {}
        module[0].bias.requires_grad_(not last or name != "bias")
        version = other if last and name == "version" else "0.2.0"
        with raises(ValueError) as error, mock.patch.object(lte, "__version__", version):
            wrap(module, **options)
        for said in everyone(str(error.value)):
            assert "2" in said and name in said and str(other) in said, said


@on(2)
def test_all_start_from_process_0s_model_with_As_of_their_own_and_callers_keep_their_tensors(world):
    memory = torch.randn(9, 8)
    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    module.register_buffer("wide", memory[0, :1].expand(4))
    module.register_buffer("strided", (memory[1:7].T, memory[1:7].T.contiguous())[dist.get_rank()])
    module.bent = nn.Parameter(memory[7:].T, requires_grad=False)
    before = copy.deepcopy(module.state_dict()), memory.clone()
    model = wrap(module, heads=4)
    same((module.state_dict(), memory), before)
    outputs = [each.eval()(torch.ones(B, 5)) for each in (*model.heads, model.module)]
    same(*everyone((lte.merged_state_dict(model), outputs, [outputs[0]] * 3)))
    assert len({str(A) for lora in everyone([lora.A for lora in loras(model)]) for A in lora}) == 8


@on(2)
def test_nothing_is_sent_between_merges_and_all_hold_the_same_W_after_one(world):
    model = wrap(net(), heads=4, base="nf4")
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_to_all_single", "all_gather_object", "broadcast"):
            patch.setattr(dist, name, mock.Mock(side_effect=torch.OutOfMemoryError("full")))
        for k in range(2):
            step(model, optimizer, *batch(2, seed=k + 10 * model.rank))
            lte.clip_grad_norm_(model, 1.0)
            model.eval()(batch()[0]), model.train()
        with raises(torch.OutOfMemoryError):  # which is not taken for a lost process
            lte.merge(model)
    mine, other = everyone(model.heads[0][0].lora.B.detach())
    assert not torch.equal(mine, other)
    lte.merge(model)
    same(*everyone([base.rows for base in model.shared]))


@cases("when", ["before", "all_gather", "all_to_all_single", "in flight", "hangs"])
@on(2)
def test_a_merge_that_loses_a_process_says_so_and_leaves_W_as_it_was(when, tmp_path, world):
    rank, later = dist.get_rank(), when in ("in flight", "hangs")
    dist.barrier()  # all have met
    dist.destroy_process_group()
    meet(tmp_path / "again", rank, 2, seconds=5 if when == "hangs" else 60)
    model = learn(wrap(net(), heads=2))
    lte.merge(model, async_op=True).wait()
    before = snapshot(learn(model))
    if rank == 1:
        while when == "hangs" and not (tmp_path / "said").exists():
            threading.Event().wait(0.1)
        if when in ("all_gather", "all_to_all_single"):
            setattr(dist, when, lambda *_, **__: os._exit(0))
            lte.merge(model)
        os._exit(0)
    with raises(lte.ProcessLost, match="checkpoint"):
        lte.merge(model, async_op=later).wait()
    same(snapshot(model), before)
    (tmp_path / "said").touch(), os._exit(0)  # the group cannot be ended any more


# ---- 2 factors ----


@cases("init", ["orthogonal", "orthogonal_paper", "kaiming", "xavier"])
def test_A_is_orthogonal_with_rows_of_a_length_or_uniform_up_to_the_bound_of_one_head(init):
    A = wrap(nn.Linear(64, 96), r=16, init=init).heads[1].lora.A.detach()
    size = dict(orthogonal=2, orthogonal_paper=0.5, kaiming=64**-0.5, xavier=0.075**0.5)[init]
    if init.startswith("orthogonal"):
        torch.testing.assert_close(A @ A.mT, size**2 * torch.eye(16), rtol=0, atol=1e-5)
    else:
        assert 0.98 * size < A.abs().max() <= size and 0.95 < A.std() * 3**0.5 / size < 1.05


def test_every_head_layer_and_seed_draws_its_own_A_whatever_was_drawn_before():
    As = [lora.A for seed in (0, 1) for lora in loras(wrap(nn.Sequential(net(), net()), seed=seed))]
    assert all(not torch.equal(a, b) for a, b in pairs(As, 2))
    module = nn.Sequential(net(), net())
    torch.manual_seed(7)
    state = torch.get_rng_state()
    same([lora.A for lora in loras(wrap(module))], As[: len(As) // 2])
    same(torch.get_rng_state(), state)
    lora = wrap(net(), r=50).heads[0][0].lora
    assert lora.A.shape == (IN, IN) and lora.B.shape == (OUT, IN) and lora.scaling == ALPHA / 50
    assert lte.LTE(net(), heads=N, r=3).heads[0][0].lora.scaling == 8


def test_the_update_is_BA_minus_what_is_merged_and_keeps_what_their_difference_loses():
    A0, dA = torch.randn(2, R, IN, dtype=torch.float64)
    B0, dB = torch.randn(2, OUT, R, dtype=torch.float64)
    for size, dtype, rtol in ((1, torch.float64, 1e-10), (1e-4, torch.float32, 1e-6)):
        A, B, old_A, old_B = (t.to(dtype) for t in (A0 + size * dA, B0 + size * dB, A0, B0))
        exact = B.double() @ A.double() - old_B.double() @ old_A.double()
        U, V = lte.factor_update(A, B, old_A, old_B)
        assert (U @ V - exact).norm() < rtol * exact.norm()
    assert (B @ A - old_B @ old_A - exact).norm() > 1e-5 * exact.norm()
    U, V = lte.factor_update(A, B, A.clone(), B.clone())
    assert not (U @ V).any(), "zero exactly where nothing changed"


# ---- 3 base ----

ERRORS = dict(fp32=(256, 0), bf16=(128, 2**-8), int8=(68, 0.02), nf4=(36, 0.16), fp4=(36, 0.17))


def rounded(x, format):
    """What is left of a tensor in rows of 64."""
    padded = F.pad(x.flatten(), (0, -x.numel() % 64)).view(-1, 64)
    back = lte.decode(lte.encode(padded, format), format, x.dtype)
    return back.flatten()[: x.numel()].view_as(x)


@cases("base", lte.BASES)
def test_a_row_has_its_size_scale_and_error_or_asks_for_bitsandbytes(base, monkeypatch):
    (nbytes, error), x = ERRORS[base], torch.randn(6, 64) / 20
    x[2:4] *= torch.tensor([[1e-3], [0]])
    assert lte.encode(x, base)[0].nbytes == nbytes
    wrong = (rounded(x, base) - x).abs().amax(1)
    assert (wrong <= error * x.abs().amax(1)).all() and (wrong > 0).any() == (error > 0)
    if base == "nf4":  # what bitsandbytes makes of it
        coded = bnb.quantize_4bit(x, blocksize=64, quant_type=base)
        same(rounded(x, base), bnb.dequantize_4bit(*coded))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    calls = (lambda: wrap(net(), base=base)), (lambda: lte.merge(wrap(net()), wire=base))
    for call in calls if base in ("int8", "nf4", "fp4") else ():
        with raises(ImportError, match="pip install bitsandbytes"):
            call()


@cases("base", lte.BASES)
def test_a_quantized_base_loses_nothing_and_its_forward_copy_is_always_its_rounding(base):
    model = wrap(nn.Linear(24, 17, bias=False), base=base)
    [weight], W = model.shared, lte.merged_state_dict(model)["weight"]
    x, tiny = rounded(W, "nf4"), 0
    steps = [(lora, torch.randn(17, R)) for lora in weight.learners]
    for lora, B_n in steps:
        B_n *= 1e-3 * W.std() / (lora.scaling * B_n @ lora.A.detach()).std()
        tiny += lora.scaling * B_n @ lora.A.detach() / N
    for _ in range(100):
        [lora.B.data.add_(B_n) for lora, B_n in steps]
        lte.merge(model)
        x = rounded(x + tiny, "nf4")
    same(weight.dense(), rounded(weight.exact(), base))
    assert (weight.exact() - W - 100 * tiny).norm() < 0.1 * tiny.norm()
    assert (x - rounded(W, "nf4")).flatten() @ tiny.flatten() < 10 * tiny.norm() ** 2


# ---- 4 what a head trains ----


@cases("tokens, formed", [(1, False), (2, False), (B, True)])
@cases("layer", [nn.Linear(IN, OUT), nn.Conv1d(IN, OUT, 1)], ids=["called", "read"])
def test_the_derivatives_of_a_weight_with_factors_are_those_of_its_values(layer, tokens, formed):
    called = isinstance(layer, nn.Linear)
    for model in (wrap(layer.double(), heads=1), seasoned(layer.double(), heads=1)):
        x = torch.randn(tokens, IN, *[1] * (not called), dtype=torch.float64, requires_grad=True)
        given = {n: p for n, p in model.named_parameters() if p.requires_grad}

        def values(x, *now, model=model, names=tuple(given)):
            return torch.func.functional_call(model, dict(zip(names, now, strict=True)), x).tanh()

        assert torch.autograd.gradcheck(values, [x, *given.values()])
        with Peak() as peak:
            model(x)
        assert not called or ((OUT, IN) in peak.shapes) == formed


@cases("autocast", [False, True])
@cases("base, tokens", [("fp32", 1), ("fp32", 64), ("nf4", 1), ("nf4", 64)])
def test_a_model_keeps_no_more_activations_than_the_dense_one(base, tokens, autocast):
    plain, found = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)), []
    for model in (seasoned(copy.deepcopy(plain), heads=1, base=base), plain):
        held, kept = {t.untyped_storage()._cdata for t in leaves(model.state_dict())}, {}
        keep = lambda t, kept=kept: kept.setdefault(t.untyped_storage()._cdata, t)  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(torch.randn(tokens, 32)).sum()
        found.append(sum(t.untyped_storage().nbytes() for k, t in kept.items() if k not in held))
    assert 0 < found[0] <= found[1]


@cases("tokens", [8, 300])
@cases("called", [True, False])
def test_under_autocast_an_update_of_a_thousandth_of_W_shows_whole(called, tokens):
    model = wrap(nn.Linear(512, 256) if called else conv1d(512, 256), heads=1)
    [lora], W = loras(model), by_name(model)["weight"].dense().norm()
    x, g = torch.randn(tokens, 512).bfloat16().float().requires_grad_(), torch.randn(tokens, 256)

    def run(autocast=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
            assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
            return y.float(), *torch.autograd.grad(y, [x, lora.A, lora.B], g.to(y.dtype))

    before = run()
    lora.B.data.normal_()
    lora.B.data *= 1e-3 * W / (lora.scaling * lora.B @ lora.A).norm()
    update = (lora.scaling * lora.B @ lora.A).detach()
    update, after = update if called else update.mT, run()
    for seen, start, whole in zip(after, before, (x @ update.mT, g @ update), strict=False):
        assert abs(((seen - start) * whole).sum() / whole.norm() ** 2 - 1) < 0.25
    for grad, exact in zip(after[2:], run(autocast=False)[2:], strict=True):
        assert grad.dtype == torch.float32 and (grad - exact).norm() < 0.03 * exact.norm()


# ---- 5 the model ----


@cases("heads", [1, N])
@cases("name", MODELS)
def test_in_every_layout_a_head_computes_and_differentiates_what_the_plain_model_does(name, heads):
    module, *arguments = make(name, 2 * heads)
    model, (args, kwargs), own = seasoned(module, heads=heads), part_of(arguments, 0, 1), []
    plains = [make(name)[0] for _ in range(heads)]
    for h, plain in enumerate(plains):
        plain.load_state_dict({k: weight_of(model, h, k) for k in by_name(model)}, strict=False)
    outputs = model(*args, **kwargs)
    mean_of(outputs).backward()
    for h, plain in enumerate(plains):
        head, part = model.heads[h], part_of(arguments, h, heads)
        own.append(plain(*part[0], **part[1]))
        mean_of(own[-1]).backward()
        for x, x_h in zip(leaves((args, kwargs)), leaves(part), strict=True):
            assert x_h.grad is None or close(heads * x.grad.chunk(heads)[h], x_h.grad) is None
        for key, p in [(key, p) for key, p in plain.named_parameters() if p.grad is not None]:
            if key in by_name(model, True):
                lora, G = by_name(model)[key].learners[h], p.grad.flatten(1)
                close(lora.B.grad, lora.scaling * G @ lora.A.mT)
                close(lora.A.grad, lora.scaling * lora.B.mT @ G)
            else:
                close(head.get_parameter(key).grad, p.grad)
        close([head.get_buffer(key) for key, _ in plain.named_buffers()], [*plain.buffers()])
    for y, *y_h in zip(leaves(outputs), *map(leaves, own), strict=True):
        close(y, torch.cat(y_h) if y.dim() else sum(y_h) / heads)


@cases("base", ["fp32", "nf4"])
@cases("name", MODELS)
def test_wrapping_changes_nothing_and_after_a_merge_each_head_computes_the_merged_model(name, base):
    module, args, kwargs = make(name, 2)
    model, plain = wrap(module, base=base), make(name)[0].eval()
    optimizer = SGD(model.parameters())
    same(lte.merged_state_dict(model), module.state_dict())
    for reset in ("start", *RESETS):
        if reset != "start":
            lte.merge(learn(model), optimizer=optimizer, reset=reset)
        plain.load_state_dict(lte.merged_state_dict(model, exact=False))
        for each in (*model.heads, model.module):
            close(leaves(each.eval()(*args, **kwargs)), leaves(plain(*args, **kwargs)))


def test_dropout_differs_between_heads_and_calls_and_never_depends_on_what_was_drawn_before():
    module, x = nn.Sequential(nn.Linear(IN, OUT), nn.Dropout(0.5)), torch.ones(N * B, IN)
    model, other = wrap(module), wrap(copy.deepcopy(module))
    masks = [part != 0 for _ in range(2) for part in model(x).chunk(N)]
    assert all(not torch.equal(a, b) for a, b in pairs(masks, 2))
    torch.manual_seed(9)
    state = torch.get_rng_state()
    same([part != 0 for _ in range(2) for part in other(x).chunk(N)], masks)
    same(torch.get_rng_state(), state)
    assert not torch.equal(wrap(module, seed=1)(x) != 0, torch.cat(masks[:N]))
    module[1].eval()  # a part in eval mode stays there
    model = wrap(module)
    same(model.train()(x), model.eval()(x))
    assert not wrap(module.eval()).training


CUT = {  # arguments, what the module returns
    "ragged": ([torch.ones(10, IN)], None),
    "two sizes": ([torch.ones(6, IN), torch.ones(3, IN)], None),
    "images": ([[torch.ones(IN), torch.ones(IN + 1)]], None),
    "no tensor": ([3], None),
    "another number": ([torch.eye(N)], lambda self, x: (x, x[0, 0].item())),
    "of any length": ([torch.eye(N)], lambda self, x: x[: 1 - int(x[0, 0])]),
    "batch second": ([torch.eye(N)], lambda self, x: x.mT),
    "packed": ([torch.eye(N)], lambda self, x: rnn.pack_sequence([row for row in x])),
}
REFUSED = {
    "heads=0.*multiple of 1": (net, dict(heads=0)),
    "r=-1": (net, dict(r=-1)),
    "lora_alpha=nan": (net, dict(lora_alpha=math.nan)),
    "base='fp8'.*nf4": (net, dict(base="fp8")),
    "0.weight is torch.float16.*float32": (lambda: net().half(), {}),
    "w is .*complex64": (lambda: Model(None, w=nn.Parameter(torch.ones(1) * 1j)), {}),
    "0.weight has no values": (lambda: nn.Sequential(nn.LazyLinear(3)), {}),
    "nothing to train.*requires_grad": (lambda: net().requires_grad_(False), {}),
    "is wrapped": (lambda: nn.Sequential(wrap(net())), {}),
    "attribute lora": (lambda: Model(None, weight=nn.Parameter(torch.ones(2, 2)), lora=None), {}),
    "heads=3.*2": (net, dict(heads=3)),
    "parallel=False": (net, dict(heads=2, parallel=False)),
}


@cases("case", CUT)
def test_several_heads_of_a_process_cut_and_join_a_batch_strictly_and_one_takes_anything(case):
    given, forward = CUT[case]
    module = Model(forward or (lambda self, *_: torch.ones(1, IN)), out=nn.Linear(IN, 1))
    wrap(module, heads=1)(*given)
    says = "" if forward else "split over 3 heads.*"
    with raises(ValueError, match=says + "first.*one head a process"):
        wrap(module)(*given)


@cases("says", REFUSED)
def test_what_cannot_be_wrapped_is_refused_in_one_sentence(says, monkeypatch):
    make_module, options = REFUSED[says]
    as_if_among(2, monkeypatch) if "=3" in says or "parallel" in says else None
    with raises((ValueError, TypeError), match=says):
        wrap(make_module(), **options)


@cases("base", lte.BASES)
def test_eval_takes_any_batch_and_changes_nothing_that_a_merge_reads(base):
    def forward(self, ids):
        with torch.no_grad():
            self.out.weight.clamp_(-0.01, 0.01)
        return self.out(self.norm(self.table(ids)))

    owns = dict(table=nn.Embedding(9, IN, max_norm=0.3), norm=nn.BatchNorm1d(IN))
    looked = seasoned(Model(forward, **owns, out=nn.Linear(IN, 64)), base=base)
    alone = copy.deepcopy(looked)
    looked.eval().module.norm.train()
    assert looked(torch.randint(9, (7,))).shape == (7, 64)
    lte.merge(looked), lte.merge(alone)
    same(lte.merged_state_dict(looked), lte.merged_state_dict(alone))


def test_each_parameter_has_one_owner_and_what_was_frozen_is_one_shared_tensor_for_ever():
    module = make("frozen parts")[0]
    model, census = seasoned(module), lte.census(wrap(module))
    kinds = dict.fromkeys(dict(module.named_parameters()), "copies") | {"0.weight": "low-rank"}
    kinds |= {"0.bias": "frozen", "2.weight": "frozen"}
    assert {name: kind for kind, own in census.items() for name in own} == kinds
    sizes = {"low-rank": {"1.weight": 35}, "copies": {"0.weight": 45, "1.bias": 7}, "frozen": {}}
    assert lte.census(wrap(make("bounded norms")[0])) == sizes
    frozen = [part[2].weight for part in (*model.heads, model.module)]
    assert all(w is frozen[0] for w in frozen) and not frozen[0].requires_grad
    same(frozen[0], module[2].weight)
    frozen[1].requires_grad_(True)
    with raises(ValueError, match="2.weight"):
        lte.merge(model)


def test_buffers_of_any_kind_are_each_heads_own_and_the_merged_model_has_head_0s():
    def forward(self, x):
        self.count += 1 + int(x[0, 0] > 0)
        self.seen[:] = True
        self.scratch += 1
        return self.out(x) + self.mask.isinf()

    kinds = dict(low=torch.ones(2).half(), floor=torch.tensor(torch.finfo().min))
    kinds |= dict(mask=torch.full((OUT,), -math.inf), seen=torch.tensor([False]))
    module = Model(forward, out=nn.Linear(IN, OUT).double(), count=torch.tensor(0), **kinds)
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    model, x = learn(wrap(module)), torch.tensor([-1.0, 1.0, 1.0]).double().view(N, 1)
    model.heads[1].mask[0] = math.nan
    model(x.expand(N, IN)), model(x.expand(N, IN)), lte.merge(model)
    counts = [(int(head.count), int(head.scratch)) for head in model.heads]
    assert counts == [(2, 2), (4, 2), (4, 2)] and model.left_out == 0
    kinds |= dict(count=torch.tensor(2), seen=torch.tensor([True]))
    for state in (lte.merged_state_dict(model), dict(model.module.named_buffers())):
        same({k: state[k] for k in kinds}, kinds)


def test_code_that_kept_an_old_weight_fails_loudly_and_the_plain_weights_are_let_go():
    module = Model(lambda self, x: x @ self.kept[0].mT, layer=nn.Linear(IN, OUT))
    module.kept = [module.layer.weight]
    with raises((RuntimeError, NotImplementedError)):
        wrap(module)(torch.ones(N, IN)).sum().backward()
    plain = nn.Sequential(*[nn.Linear(128, 128) for _ in range(16)])
    weight = weakref.ref(plain[0].weight)
    with Peak() as peak:  # what the model holds, and a few copies of one layer
        model = wrap(plain)
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert peak.bytes < sum(held.values()) + 2.5 * 128 * 128 * 4
    del plain
    assert gc.collect() >= 0 and weight() is None


def test_hooks_fire_a_cast_model_goes_on_and_half_precision_or_other_input_is_refused():
    calls, module = [], net()
    module[0].register_forward_hook(lambda layer, args, y: calls.append(layer))
    model = wrap(module)
    model(batch()[0]), model.eval()(batch()[0])
    assert calls == [head[0] for head in (*model.heads, model.module)]
    for dtype in (torch.long, torch.float32, torch.float16):
        with raises(TypeError, match=f"{dtype}"):
            model.train()(batch()[0].to(dtype))
    model, (x, _) = wrap(net().float(), base="bf16"), batch()
    close(model.double()(x), wrap(net(), base="bf16")(x), rtol=1e-5, atol=1e-5)
    lte.merge(learn(model), outer_optimizer=NESTEROV(lte.outer_parameters(model)))
    close(model(x), model.module(x))
    lte.merge(busy := wrap(net()), async_op=True)
    calls = {"float32": model.half, "outer_parameters": model.float, "in flight": busy.float}
    for says, cast in calls.items():
        with raises((TypeError, RuntimeError), match=says):
            cast()


@on(1, 2)
def test_a_copy_of_a_model_and_one_with_its_state_live_their_own_lives(world):
    model = seasoned(net(), heads=4, base="nf4")
    twins, x = [copy.deepcopy(model), wrap(net(5), heads=4, base="nf4")], batch(4 // world)[0]
    twins[1].load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))
    before = [snapshot(twin) for twin in twins]
    lte.merge(learn(model, seed=7))
    same([snapshot(twin) for twin in twins], before)
    for twin in twins:
        lte.merge(learn(twin, seed=7))
        same(lte.merged_state_dict(twin), lte.merged_state_dict(model))
        same((twin.train()(x), twin.eval()(x)), (model.train()(x), model.eval()(x)))


class Lamb(torch.optim.SGD):  # its trust ratio couples all that a step sees of a tensor
    def step(self):
        for p in (p for p in self.param_groups[0]["params"] if p.grad is not None):
            p.grad *= (1 + p.detach().norm()) / (1 + p.grad.norm())
        super().step()


OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "fused": partial(torch.optim.AdamW, fused=True, amsgrad=True),
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "LAMB-like": partial(Lamb, momentum=0.9),
    "Adafactor": torch.optim.Adafactor,
}
SETTINGS = [  # optimizer, base, outer optimizer?, steps a merge is in flight, parts, reset, NaN?
    *[(name, "fp32", False, 0, 1, "none", False) for name in OPTIMIZERS],
    ("AdamW", "nf4", True, 0, 1, "none", True),
    ("SGD", "bf16", True, 1, 1, "none", False),
    ("AdamW", "int8", False, 0, 3, "AB", False),
    ("SGD", "fp4", False, 3, 1, "none", True),
]


def a_run(optimizer="AdamW", base="fp32", outer=False, *, rate=0.01, weights=0, **options):
    """(model, optimizer, outer optimizer); the model has one of everything that a head owns."""
    torch.manual_seed(weights)
    layers = nn.Linear(6, 70), nn.BatchNorm1d(70), nn.Dropout(0.2), nn.Tanh(), nn.Linear(70, 3)
    module = nn.Sequential(conv1d(6, 6), *layers)
    module[0].bias.requires_grad_(False)
    model = wrap(module, **dict(heads=4, base=base) | options)
    inner = OPTIMIZERS[optimizer](model.parameters(), lr=rate)
    return model, inner, NESTEROV(lte.outer_parameters(model)) if outer else None


def go_on(run, first=1, last=9, late=0, parts=1, reset="none", trouble=False):
    """Steps first .. last with a merge of each part every 3, applied `late` steps later."""
    (model, inner, outer), work = run, None
    for k in range(first, last + 1):
        g = torch.Generator().manual_seed(k)
        x, y = torch.randn(4 * B, 6, generator=g), torch.randint(3, (4 * B,), generator=g)
        step(model, inner, *(t.chunk(model.world)[model.rank] for t in (x, y)))
        lte.clip_grad_norm_(model, 1.0)
        if trouble and k == 5 and 2 in range(model.first, model.first + len(model.heads)):
            model.heads[2 - model.first][1].bias.data[3] = math.nan
        if work and k % 3 == late % 3:
            work = work.wait()
        for part in range(parts) if k % 3 == 0 else []:
            options = dict(outer_optimizer=outer, reset=reset, async_op=late > 0, decay=0.99)
            work = lte.merge(model, optimizer=inner, part=(part, parts), **options)
    return None if work and work.wait() else outcome(model)


def run_all_settings():
    """Of tensors that take several buckets; process 0 warns of heads left out."""
    found = []
    with warnings.catch_warnings(record=True) as seen, mock.patch.object(lte, "BUCKET", [300] * 2):
        warnings.simplefilter("always")
        for *setting, late, parts, reset, trouble in SETTINGS:
            run = a_run(*setting)
            found.append(go_on(run, late=late, parts=parts, reset=reset, trouble=trouble))
            assert run[0].left_out == trouble
    assert len(seen) == 2 * (lte.processes()[0] == 0)
    return found


def train_all_models():
    """Two steps and a merge of every model, two heads in all."""
    found = []
    for name in MODELS:
        module, *arguments = make(name, 4)
        model = wrap(module, heads=2)
        args, kwargs = part_of(arguments, model.rank, model.world)
        optimizer = SGD(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            mean_of(model(*args, **kwargs)).backward()
            optimizer.step()
        lte.merge(model)
        found.append(outcome(model))
    return found


@on(2, 4)
def test_the_result_does_not_depend_on_the_layout_for_any_optimizer_and_any_model(world):
    as_one_process(run_all_settings)
    as_one_process(train_all_models) if world == 2 else None


# ---- 6 merge ----


@cases("T, late, K", [(1, 0, 1), (2, 0, 1), (3, 1, 1), (3, 3, 1), (1, 0, 3), (2, 1, 2), (1, 1, 99)])
@cases("device", ["cpu", pytest.param("cuda", marks=no_gpu)])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # compiling
def test_training_and_merging_equal_the_twin_step_by_step_also_compiled(T, late, K, device):
    model, states = wrap(net()).to(device), torch.cuda.get_rng_state_all()
    run = torch.compile(model, backend="eager") if late else model
    work, seen, last = None, [], lte.merged_state_dict(model)
    twin, optimizer, end = Twin(net(), model), SGD(model.parameters()), T * max(K, 6)
    for k in range(1, end + 1 + late):
        x, y = (t.to(device) for t in batch(seed=k))
        step(run, optimizer, x, y), twin.step(x, y)
        close(run(x), twin(x))
        for now in ("arrive", "send", "arrive"):
            if now == "send" and k % T == 0 and not work and k <= end:
                twin.send()
                work = lte.merge(model, part=(k // T % K, K), async_op=late > 0)
                work, sent = work or model, k
            elif now == "arrive" and work and k == sent + late:
                work = work.wait() if late else None
                W = lte.merged_state_dict(model)
                changed = [name for name in W if not torch.equal(W[name], last[name])]
                twin.arrive(changed)
                close(W, twin.W)
                last, seen = W, seen + changed
        close(run(x), twin(x))
    same(torch.cuda.get_rng_state_all(), states)
    assert sorted(seen) == sorted([*twin.W] * (max(K, 6) // K))  # each is in one part


@cases("base", lte.BASES)
def test_merging_twice_changes_nothing_nor_does_autocast_and_one_heads_merge_is_invisible(base):
    model, alone = (seasoned(net().float(), base=base) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        lte.merge(model)
    lte.merge(alone), lte.merge(alone)
    same(snapshot(model), snapshot(alone))
    models = [wrap(net(), heads=1) for _ in range(2)]
    runs = [(model, torch.optim.Adam(model.parameters())) for model in models]
    for k in range(4):
        [step(*run, *batch(1, seed=k)) for run in runs]
        lte.merge(models[0])
        close(models[0](batch(1)[0]), models[1](batch(1)[0]), rtol=1e-8)


@cases("reset", RESETS)
def test_a_rounds_update_has_rank_r_a_head_and_N_r_merged_and_without_reset_twice_that_later(reset):
    model, rank = wrap(nn.Linear(19, 23).double()), partial(torch.linalg.matrix_rank, rtol=1e-9)
    base, optimizer = by_name(model)["weight"], SGD(model.parameters())
    W = [base.exact().clone()]
    for seed, times in ((1, 1), (2, 2 if reset == "none" else 1)):
        learn(model, seed)
        ranks = [rank(weight_of(model, n, "weight") - W[-1]).item() for n in range(N)]
        lte.merge(model, optimizer=optimizer, reset=reset)
        W.append(base.exact().clone())
        assert [*ranks, rank(W[-1] - W[-2])] == [times * R] * N + [times * N * R]
    assert rank(W[2] - W[0]) == (1 if reset == "none" else 2) * N * R
    total = sum(ALPHA / R * lora.B @ lora.A for lora in base.learners).detach() / N
    assert reset != "none" or close(W[2], W[0] + total) is None


@cases("kind", [torch.optim.SGD, partial(torch.optim.Adam, eps=1e-30)], ids=["SGD", "Adam"])
def test_multi_head_lora_is_lte_merged_at_every_step_on_the_same_batch(kind):
    layers = nn.Linear(IN, OUT, bias=False), nn.Tanh(), nn.Linear(OUT, CLASSES, bias=False)
    module = nn.Sequential(*layers).double()
    one, many = wrap(module, parallel=False), wrap(module)
    assert len(one.heads) == 1 and one.heads[0][0].lora.A.shape == (N * R, IN)
    rate = N if kind is torch.optim.SGD else 1
    runs = (one, kind(one.parameters(), 0.01 * rate)), (many, kind(many.parameters(), 0.01))
    for k in range(5):
        x, y = batch(1, seed=k)
        step(*runs[0], x, y), step(*runs[1], x.repeat(N, 1), y.repeat(N))
        lte.merge(many), lte.merge(merged := copy.deepcopy(one))
        close(lte.merged_state_dict(many), lte.merged_state_dict(merged), rtol=1e-7, atol=1e-9)


@cases("T", [1, 3])
def test_with_A_the_identity_or_no_factors_it_is_local_sgd_of_the_dense_model(T):
    plain = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.LayerNorm(OUT)).double()
    models = [wrap(plain, r=r, lora_alpha=IN) for r in (IN, 0)]
    for lora in loras(models[0]):
        [A.copy_(torch.eye(IN)) for A in (lora.A.requires_grad_(False), lora.merged_A)]
    twin = Twin(plain, models[1])  # without factors: dense copies, averaged
    assert not twin.low_rank and type(models[1].heads[0][0]) is nn.Linear
    runs = [(model, SGD(model.parameters())) for model in models]
    for k in range(1, 2 * T + 1):
        twin.step(*batch(seed=k))
        [step(*run, *batch(seed=k)) for run in runs]
        if k % T == 0:
            twin.send(), twin.arrive(twin.W)
            for model in models:
                lte.merge(model)
                close(lte.merged_state_dict(model), twin.W)


@cases("reset", RESETS)
def test_a_reset_clears_the_whole_state_of_what_it_resets_and_no_other(reset):
    model, optimizer = trained()
    kept = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    As = [lora.A.detach().clone() for lora in loras(model)]
    cleared = {getattr(lora, f) for lora in loras(model) for f in reset if f in "AB"}
    lte.merge(model, optimizer=optimizer, reset=reset)
    assert cleared < set(model.parameters())
    same(dict(optimizer.state), {p: state for p, state in kept.items() if p not in cleared})
    drawn = [lora.A.detach().clone() for lora in loras(model)]
    same(drawn, As) if reset != "AB" else None
    As += [lora.A for lora in loras(wrap(net()))] if reset == "AB" else []
    assert reset != "AB" or all(not torch.equal(a, b) for a, b in pairs(As + drawn, 2))
    step(model, optimizer, *batch(seed=9))
    for lora in loras(model) if reset != "none" else []:
        assert not lora.merged_B.any()
        close(lora.B.abs(), torch.full_like(lora.B, 0.01), rtol=1e-6)


@cases("kind", [None, NESTEROV, partial(torch.optim.Adam, lr=0.1)], ids=["", "nesterov", "adam"])
def test_decay_is_of_W_alone_before_what_is_added_and_an_outer_optimizer_steps_on_it(kind):
    model = wrap(net())
    dense = lte.merged_state_dict(model)
    by_hand = (kind or partial(torch.optim.SGD, lr=1.0))(dense.values())
    outer = kind and kind(lte.outer_parameters(model))
    for seed in range(3):
        learn(model, seed)
        for name, base in by_name(model).items():
            dense[name].grad = base.exact() - sum(weight_of(model, n, name) for n in range(N)) / N
            dense[name].mul_(0.9 if base.low_rank else 1.0)
        by_hand.step()
        lte.merge(model, decay=0.9, outer_optimizer=outer)
        close(lte.merged_state_dict(model), dense)
        close(model(batch()[0]), model.module(batch()[0]))
    assert not outer or all(p.grad is None for p in outer.param_groups[0]["params"])


@cases("wire", ["bf16", "int8", "nf4"])
@on(1, 2, 4)
def test_the_master_gets_just_the_sum_of_the_partial_sums_as_the_wire_rounds_them(world, wire):
    model, parts, n = learn(loose(base="nf4")), learn(loose(base="nf4")), 4 // world
    own = {b.name: [x.delta(x.learnt()).detach() for x in b.learners] for b in model.shared}
    lte.merge(model, wire=wire)
    sums = everyone({name: lte.tree_sum(d.__getitem__, 0, n) for name, d in own.items()})
    for name, base in by_name(loose(base="nf4")).items():
        sent = [part[name].view(base.shape) for part in sums]
        exact = world == 1 or base.statistic
        sent = [part if exact else rounded(part, wire) for part in sent]  # once
        mean = lte.tree_sum(sent.__getitem__, 0, world) / 4
        same(by_name(model)[name].exact(), mean.float() if base.statistic else base.exact() + mean)
    foretold = lte.cost_report(model, wire=wire, merge_every=5)["sent"]
    assert model.bytes_sent == foretold["merge"] == 5 * foretold["step"]
    sizes = [parts.bytes_sent for k in range(3) if not lte.merge(parts, wire=wire, part=(k, 3))]
    same(outcome(parts), outcome(model))
    soundness = (n + 8) * (world - 1)  # a byte a head, BatchNorm's counter
    assert sizes[-1] == model.bytes_sent + 2 * soundness
    shares = [b - a for a, b in itertools.pairwise([0, *sizes])]
    assert max(shares) < 0.9 * model.bytes_sent or world == 1  # one tensor is two thirds of all


@cases("options", [{}, dict(wire="nf4"), dict(async_op=True)], ids=str)
def test_statistics_take_the_plain_mean_at_once_and_a_variance_stays_positive(options):
    model = wrap(nn.BatchNorm1d(IN).double(), r=0)
    options = options or dict(outer_optimizer=NESTEROV(lte.outer_parameters(model)))
    for variances in ([900.0, 1.0, 2.0], [0.1, 0.2, 0.3], [0.1, 0.1, 0.4]):
        for head, variance in zip(model.heads, variances, strict=True):
            head.running_var.fill_(variance)
        work = lte.merge(learn(model), **options)
        if work:
            model(1e-3 * batch()[0])  # meanwhile each head's variance falls
            work.wait()
        for each in (*model.heads, model.module):
            close(each.running_var, torch.full((IN,), sum(variances) / N).double(), rtol=1e-6)


@on(2)
def test_what_is_sent_is_what_heads_had_learnt_then_and_does_not_mix_with_what_callers_send(world):
    model, alone = learn(loose()), learn(loose())
    lte.merge(alone)
    talked, begun, gather = threading.Event(), threading.Event(), dist.all_gather
    wait = lambda: begun.set() or (model.rank == 0 and talked.wait())  # noqa: E731
    dist.all_gather = lambda *args, **options: (wait(), gather(*args, **options))[1]
    work = lte.merge(model, async_op=True)
    begun.wait(), threading.Event().wait(0.3 * model.rank)
    dist.all_reduce(value := torch.ones(()))
    learn(model, seed=9), talked.set(), work.wait()
    same(lte.merged_state_dict(model), lte.merged_state_dict(alone))
    assert value == 2


@cases("base", ["fp32", "nf4"])
def test_what_a_merge_in_flight_excludes_and_a_backward_across_one_are_errors(tmp_path, base):
    model, optimizer = trained(base=base)
    before, outer = snapshot(model), NESTEROV(lte.outer_parameters(model))
    work = lte.merge(model, async_op=True, outer_optimizer=outer)
    work.exchanged.result()
    for call in (
        lambda: lte.merge(model, async_op=True, part=(0, 2)),
        lambda: lte.save(tmp_path, model, optimizer, step=2),
        lambda: lte.load(tmp_path, model, optimizer),
        lambda: lte.merged_state_dict(model),
    ):
        with raises(RuntimeError, match=r"in flight.*wait\(\)"):
            call()
    same(snapshot(model), before)
    work.wait()
    with raises(RuntimeError, match="waited for already"):
        work.wait()
    model, (x, y) = seasoned(nn.Linear(IN, CLASSES).double(), base=base), batch()
    value = loss(model, x.requires_grad_(), y)
    lte.merge(model)
    with raises(RuntimeError, match="modified by an inplace"):  # and not a wrong gradient
        value.backward()


WRONG = {
    "wire='fp16'.*fp32": dict(wire="fp16"),
    "reset='A'.*AB": dict(reset="A"),
    "reset='B'.*optimizer=": dict(reset="B", optimizer=None),
    "reset='AB'.*async_op=False": dict(reset="AB", async_op=True),
    "decay=-0.1": dict(decay=-0.1),
    r"part=\(2, 2\)": dict(part=(2, 2)),
    "model.parameters": dict(optimizer=torch.optim.SGD([nn.Parameter(torch.ones(1))])),
    "lte.outer_parameters": {},
}
SPOILT = {
    "NaN in A": lambda head: head[0].lora.A.data[1, 2:3].fill_(math.nan),
    "inf in a bias": lambda head: head[0].bias.data[4:5].fill_(math.inf),
    "B A overflows": lambda head: [p.data.fill_(1e200) for p in head[0].lora.parameters()],
}


@cases("wrong", WRONG)
def test_what_a_merge_cannot_do_is_refused_and_nothing_changes(wrong):
    model, optimizer = trained()
    options = dict(optimizer=optimizer) | WRONG[wrong]
    if "outer" in wrong:  # an outer optimizer of a part
        options |= dict(outer_optimizer=torch.optim.SGD(lte.outer_parameters(model)[1:]))
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    for async_op in (False, True):
        with raises(ValueError, match=wrong):
            lte.merge(model, **dict(async_op=async_op) | options)
    same((snapshot(model), optimizer.state_dict()), (before, state))
    lte.merge(model)  # nothing is in flight
    for call in (lte.merge, lte.merged_state_dict, lte.census, lte.outer_parameters):
        with raises(TypeError, match=r"Sequential.*lte\.LTE\("):
            call(net())


@cases("part", [(0, 1), (0, 2), (1, 2)])
@cases("later", [False, True])
@cases("spoil", SPOILT)
def test_a_head_that_is_not_finite_is_left_out_and_starts_again_whole(spoil, later, part):
    model, (x, y) = seasoned(net()), batch()
    optimizer, before = torch.optim.Adam(model.parameters(), 1e-9), lte.merged_state_dict(model)
    step(model, optimizer, x, y)
    SPOILT[spoil](model.heads[1])
    both = {name: (weight_of(model, 0, name) + weight_of(model, 2, name)) / 2 for name in before}
    with pytest.warns(UserWarning, match=r"1.* left out") as caught:
        work = lte.merge(model, async_op=later, part=part, optimizer=optimizer)
        if later:
            learn(model, seed=5)  # what the bad one does meanwhile is lost
            work.wait()
    assert len(caught) == 1 and caught[0].filename == __file__ and model.left_out == 1
    export = lte.merged_state_dict(model)
    changed = {name for name in export if not torch.equal(export[name], before[name])}
    assert len(changed) == 6 if part == (0, 1) else 0 < len(changed) < 6
    close(export, {name: (both if name in changed else before)[name] for name in before})
    close(model.heads[1](x), model.module(x))
    state = [[p in optimizer.state for p in head.parameters()] for head in model.heads]
    assert [all(state[0]), any(state[1]), all(state[2])] == [True, False, True]


@cases("later", [False, True])
@on(1, 2)
def test_where_no_head_is_finite_every_process_raises_and_nothing_changes(later, world):
    model = learn(loose(base="nf4"))
    [head[2].bias.data.fill_(1e25) for head in model.heads]
    lte.merge(model, outer_optimizer=(outer := NESTEROV(lte.outer_parameters(model))))
    assert model.left_out == 0
    [p.data.fill_(fill) for lora in loras(model) for p, fill in ((lora.A, 1.0), (lora.B, 4e37))]
    held = copy.deepcopy((snapshot(model), outer.state_dict()))
    with raises(FloatingPointError, match="finite.*checkpoint"):
        lte.merge(model, outer_optimizer=outer, async_op=later).wait()
    same((snapshot(model), outer.state_dict()), held)
    assert (model.merges, model.left_out, model.in_flight) == (1, 0, None)


@cases("processes, base", [(1, "fp32"), (2, "fp32"), (2, "nf4")])
@cases("sizes", [[384], [64] * 32], ids=["one", "many"])
def test_a_merge_takes_two_buckets_or_two_largest_tensors(sizes, processes, base, monkeypatch):
    monkeypatch.setattr(lte, "BUCKET", (2**30, 2**14))
    as_if_among(processes, monkeypatch)
    layers = [nn.Linear(size, size) for size in sizes]
    model = learn(wrap(nn.Sequential(*layers), heads=2 * processes, base=base))
    largest = 4 * max(lte.BUCKET[1], *(base.numel for base in model.shared))
    with Peak() as peak:
        lte.merge(model)
    assert 0 < peak.bytes < 2.2 * largest, peak.bytes / largest


END = """
import sys, torch, torch.distributed as dist, lte
if sys.argv[2:]:
    place = f"file://{sys.argv[1]}"
    dist.init_process_group("gloo", init_method=place, rank=int(sys.argv[2]), world_size=2)
lte.merge(lte.LTE(torch.nn.Linear(300, 200), heads=2, r=2), async_op=True)
"""


def test_a_process_may_end_right_after_a_merge_was_sent(tmp_path):
    start = partial(subprocess.Popen, cwd=Path(lte.__file__).parent)
    command = sys.executable, "-c", END, tmp_path / "meeting"
    runs = [start([*command, *rank]) for rank in ([], ["0"], ["1"])]
    assert [run.wait(100) for run in runs] == [0, 0, 0]


# ---- 7 training helpers and export ----


def test_one_heads_trouble_stays_its_own_and_it_is_clipped_by_its_own_norm():
    model, (x, y), gradients = seasoned(net()), batch(), []
    for trouble in (0.0, math.nan):
        x[B : 2 * B] += trouble
        model.zero_grad()
        loss(model, x, y).backward()
        gradients.append({n: p.grad.clone() for n, p in model.heads.named_parameters()})
    grads, dirty = gradients
    norms = lte.clip_grad_norm_(model, 0.05)
    assert norms.isnan().tolist() == [False, True, False]
    for h in (0, 2):
        own = {name: g for name, g in grads.items() if name.startswith(f"{h}.")}
        same({name: dirty[name] for name in own}, own)
        close(norms[h], torch.cat([g.flatten() for g in own.values()]).norm())
        for name, g in own.items():
            close(model.heads.get_parameter(name).grad, g * 0.05 / (norms[h] + 1e-6))
    small = lte.clip_grad_norm_(model, 1.0), lte.clip_grad_norm_(model, 1.0)
    same(*small)


@cases("base", lte.BASES)
def test_the_export_is_a_copy_with_the_plain_models_names_and_types(base):
    module = make("tied embeddings")[0]
    model = seasoned(copy.deepcopy(module), base=base)
    before, states = snapshot(model), [lte.merged_state_dict(model, exact=e) for e in (True, False)]
    exact = {name: held.exact() for name, held in by_name(model).items()}
    exact |= {"3.weight": exact["0.weight"]}
    same(states, [exact, exact | {"1.weight": rounded(exact["1.weight"], base)}])
    [t.zero_() for state in states for t in state.values()]
    same(snapshot(model), before)


# ---- 8 checkpoints ----


@on(2, 4)
def test_saved_at_any_step_by_any_processes_any_go_on_as_if_never_stopped(tmp_path, world):
    settings = ("AdamW", "fp32", True), ("SGD", "nf4", True), ("Adafactor", "bf16", False)
    for k, setting in enumerate(settings, 4):  # merges are after 3, 6 and 9
        whole = go_on(a_run(*setting))

        def resume(by, k=k, setting=setting):
            run = a_run(*setting, rate=0.1, weights=1)
            assert lte.load(tmp_path / f"{k} {by}", *run) == {"step": k, "note": ["n", 1]}
            return [go_on(run, k + 1)]

        for by in ("one", "all"):
            if by == "all" or dist.get_rank() == 0:
                with mock.patch.object(dist, "is_initialized", lambda by=by: by == "all"):
                    go_on(run := a_run(*setting), 1, k)
                    lte.save(tmp_path / f"{k} {by}", *run, step=k, note=["n", 1])
            dist.barrier()
            as_one_process(resume, by)
            same(resume(by), [whole])


@cases("name", OPTIMIZERS)
def test_an_optimizers_state_and_counts_come_back_and_what_is_of_others_stays(tmp_path, name):
    runs, others = [], [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for k, other in enumerate(others):
        model = a_run(weights=k)[0]
        groups = [dict(params=list(model.parameters()), lr=0.01 + k), dict(params=[other])]
        runs.append((model, OPTIMIZERS[name](groups, lr=0.5), None))
    others[1].grad = torch.ones(3)
    runs[1][1].step()
    go_on(runs[0], 1, 4)
    kept, runs[0][0].bytes_sent = copy.deepcopy(runs[1][1].state[others[1]]), 77
    [model.heads[0][1].lora.A.requires_grad_(False) for model, *_ in runs]  # saved all the same
    lte.save(tmp_path, *runs[0], step=4)
    lte.load(tmp_path, *runs[1])
    same(runs[1][1].state[others[1]], kept)
    counts = [(m.merges, m.left_out, m.calls, m.bytes_sent) for m, *_ in runs]
    assert counts == [(1, 0, 4, 77)] * 2 and runs[1][1].param_groups[0]["lr"] == 0.01
    for file in tmp_path.rglob("*.pt"):  # what was loaded is not a view of the file
        file.write_bytes(b"\0" * file.stat().st_size)
    others[1].grad = None
    same(*[go_on(run, 5, reset="AB") for run in runs])


def whole(folder):
    """The steps of the checkpoints in a folder, the newest first; each must be whole."""
    found = lte.checkpoints(folder)
    for path in found:
        sizes = json.loads((path / "meta.json").read_text())["files"]
        assert sizes == {f.name: f.stat().st_size for f in path.iterdir() if f.suffix == ".pt"}
    return [int(path.name[5:]) for path in found]


def die(path=None, *_, **__):
    if not isinstance(path, Path) or path.exists() or path.name == "meta.json":
        raise KeyboardInterrupt  # nobody catches it


@cases("where", [(torch, "save"), (Path, "write_text"), (Path, "replace"), (shutil, "rmtree")])
def test_a_run_killed_at_any_moment_goes_on_from_its_last_whole_checkpoint(tmp_path, where):
    run, other = a_run(), a_run(weights=1)
    for k in (1, 1, 2):  # the first is replaced
        go_on(run, k, k)
        lte.save(tmp_path, *run, step=k)
    with pytest.MonkeyPatch.context() as patch, raises(KeyboardInterrupt):
        patch.setattr(*where, die)
        lte.save(tmp_path, *run, step=3)
    assert whole(tmp_path) in ([2, 1], [3, 2])
    lte.load(tmp_path, *other)
    same(go_on(other, 3), go_on(run, 3))
    for k in (3, 10, 10, 100):
        lte.save(tmp_path, *other, step=k)
    assert whole(tmp_path) == [100, 10] and len(list(tmp_path.iterdir())) == 2


def refused(error, says, folder, run, **options):  # and nothing has changed
    kept = copy.deepcopy((snapshot(run[0]), run[1].state_dict()))
    with raises(error, match=says):
        lte.load(folder, *run, **options)
    same((snapshot(run[0]), run[1].state_dict()), kept)


def test_one_that_is_not_whole_is_refused_and_previous_takes_the_one_before(tmp_path):
    run, other = a_run(), a_run(weights=1)
    refused(FileNotFoundError, "holds no checkpoint", tmp_path, run)
    for k in (1, 2):
        go_on(run, k, k)
        lte.save(tmp_path, *run, step=k)
    assert lte.newest(tmp_path, previous=True)[0].name == "step_00000002"
    for path in (tmp_path / "step_00000002").iterdir():
        content = path.read_bytes()
        for left in (content[:-1], b"", None):
            path.write_bytes(left) if left is not None else path.unlink()
            refused(ValueError, "step_00000002 is not whole.*previous=True", tmp_path, other)
        path.write_bytes(content)
    path.unlink()
    assert lte.load(tmp_path, *other, previous=True)["step"] == 1
    same(go_on(other, 2), go_on(a_run(), 1))


OTHER_RUNS = {
    "heads = 4.* 2": dict(heads=2),
    "parallel = True.*False": dict(parallel=False),
    "r = 2.* 1": dict(r=1),
    "fp32.*nf4": dict(base="nf4"),
    "optimizer.*AdamW.*SGD": dict(optimizer="SGD"),
    "outer.optimizer": dict(outer=True),
    "0.1.0": {},
    "make it of": {},
}


@cases("says", OTHER_RUNS)
def test_a_checkpoint_of_another_setting_is_refused(tmp_path, says):
    with raises((ValueError, TypeError), match="set"):  # nothing is written
        lte.save(tmp_path, *a_run(), step=4, seen={1, 2})
    lte.save(tmp_path, *a_run(), step=3)
    run, file = a_run(**OTHER_RUNS[says]), tmp_path / "step_00000003" / "meta.json"
    if says == "0.1.0":
        file.write_text(json.dumps(json.loads(file.read_text()) | {"version": says}))
    refused(ValueError, says, tmp_path, (run[0], a_run()[1]) if "make" in says else run)


# ---- 9 measures, and README.md's loop ----


@cases("base", ["fp32", "int8", "nf4"])
@on(1, 2)
def test_the_bytes_held_are_those_that_the_tensors_take(base, world):
    model = wrap(nn.Sequential(nn.Linear(10, 101), nn.LayerNorm(101)), heads=4, base=base)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(len(model.heads) * B, 10)).square().sum().backward()
    optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
    own = [*model.heads.parameters(), *model.heads.buffers(), *model.shared.buffers(), *state]
    own += [p.grad for p in model.heads.parameters()]
    there = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}
    said = lte.cost_report(model)["held"]
    assert said.pop("all") == sum(there.values()) == sum(said.values())
    with raises(ValueError, match="workers=3"):
        lte.cost_report(model, workers=3)


@torch.no_grad()
def test_the_subspace_report_equals_its_twin_and_what_has_no_value_is_nan():
    model = seasoned(net())
    A, B = ([getattr(lora, f) for lora in loras(model)[:N]] for f in "AB")
    products, found = [b @ a for a, b in zip(A, B, strict=True)], []
    for m, n in pairs(range(N), 2):
        cosine = F.cosine_similarity(products[m].flatten(), products[n].flatten(), dim=0)
        bases = [torch.linalg.qr(A[k].mT).Q for k in (m, n)]
        angles = torch.linalg.svdvals(bases[0].mT @ bases[1]).clamp(max=1).acos()
        found.append([cosine, angles.norm() / (R**0.5 * math.pi / 2)])
    p = torch.linalg.svdvals(sum(products)) + 1e-30
    rank = torch.distributions.Categorical(p).entropy().exp().item()
    expected = [*torch.tensor(found).mean(0).tolist(), rank]
    report = lte.subspace_report(model)["0.weight"]
    assert [*report.values()] == pytest.approx(expected, rel=1e-5)
    start = lte.subspace_report(wrap(net()))["0.weight"]  # B = 0
    assert math.isnan(start["cosine"]) and math.isnan(start["effective_rank"])


def test_the_readmes_loop_runs_and_its_model_loads_into_a_plain_one(tmp_path, monkeypatch):
    text = Path(__file__).with_name("README.md").read_text().split("## Your own model")[1]
    diff = re.search(r"```diff\n(.*?)```", text, re.S)[1].splitlines()
    code = "\n".join(line[1:] for line in diff if line[0] != "-")
    data = [(torch.randn(8, 3, 8, 8), torch.randint(5, (8,))) for _ in range(9)]
    ViT = partial(torchvision.models.VisionTransformer, num_classes=5, **VIT)
    monkeypatch.chdir(tmp_path)
    exec(code, dict(ViT=ViT, VisionTransformer=ViT, batches=data, F=F, torch=torch, T=4))
    ViT().load_state_dict(torch.load("model.pt"))


# ---- 10 train.py: samples ----

CPU = torch.device("cpu")
folder = partial(train.load_data.__wrapped__, "folder", download=False, workers=0, device=CPU)
some_shapes = cache(partial(train.make_shapes, 129, "test"))


@pytest.fixture
def tiny(monkeypatch):
    """train.py on 96 training and 33 test images, a ViT of one block: a run takes a second."""
    x, y = some_shapes()
    classes = {f"class {n}": name for n, name in enumerate(train.SHAPES)}
    data = train.InMemory((x[:96], y[:96]), (x[96:], y[96:]), classes, "crop-flip", CPU)
    monkeypatch.setattr(train, "load_data", lambda *_: data)
    monkeypatch.setitem(train.MODELS, "vit-nano", (32, 1, train.ViTBlock, 4))
    return data


def left_by(out):
    """What a run has written; told: but for times, as strings."""
    weights, rows = torch.load(out / "model.pt"), (out / "log.csv").read_text().splitlines()
    log, result = [*csv.DictReader(rows)], json.loads((out / "result.json").read_text())
    told = [{k: str(v) for k, v in r.items() if "second" not in k} for r in (*log, result)]
    return types.SimpleNamespace(weights=weights, log=log, result=result, told=told)


def run_train(out, flags):
    train.main(["--batch-size", "16", "--out", str(out), *shlex.split(flags)])
    lte.agree(run="over")
    return left_by(out)


def sentence(flags):
    """What main() says, in one line, before it ends."""
    with mock.patch.object(sys, "stderr", io.StringIO()) as shown, raises(SystemExit) as ended:
        train.main(["--batch-size", "16", *shlex.split(flags)])
    code = ended.value.code
    said = code if isinstance(code, str) else shown.getvalue().removeprefix("usage: see --help\n")
    assert code != 0 and re.fullmatch(r"train\.py: .+\n?", said), said
    return said


def as_torchrun_would(world, function, args):
    with pytest.MonkeyPatch.context() as patch:
        tiny.__wrapped__(patch)  # a fixture is no use in another process
        patch.setattr(os, "environ", os.environ | dict(WORLD_SIZE="2", RANK=f"{dist.get_rank()}"))
        patch.setattr(train, "start", lambda args: CPU)
        patch.setattr(dist, "destroy_process_group", lambda: None)
        return function(*args)


def on_two(function, *args):
    """What each of two processes returns, whose main() takes them for torchrun's."""
    return run_on(as_torchrun_would, dict(world=2, function=function, args=args))


def watched(out, flags):
    """The samples of a run's steps; its merges, (steps done, options); when delayed ones arrive."""
    seen, merges, arrived = [], [], []
    step, merge, wait = train.train_step, lte.merge, lte.Merge.wait

    def noted(model, **given):
        outer = given["outer_optimizer"] is not None
        merges.append((len(seen), given | dict(optimizer=None, outer_optimizer=outer)))
        return merge(model, **given)

    with mock.patch.object(lte, "merge", noted), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", lambda *a: (seen.append(a[2:4]), step(*a))[1])
        patch.setattr(lte.Merge, "wait", lambda sent: (arrived.append(len(seen)), wait(sent))[1])
        run_train(out, flags)
    return seen, merges, arrived


def test_shapes_hold_every_class_and_an_epoch_each_sample_once_in_an_order_of_its_own(tiny):
    x, y = train.make_shapes(300, "train")
    same(x, train.make_shapes(300, "train")[0])
    assert x.shape == (300, 3, 32, 32) and x.dtype == torch.uint8
    assert not torch.equal(x, train.make_shapes(300, "test")[0])
    assert set(y.tolist()) == set(range(10))
    steps = [train.batch_indices(96, 16, 0, step) for step in range(1, 13)]
    first, second = torch.cat(steps[:6]), torch.cat(steps[6:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(96))
    assert not torch.equal(first, second)
    assert len(set(train.batch_indices(10, 8, 0, 2)[2:].tolist())) == 6  # of the second epoch
    for world in (1, 2, 4):
        seen = [y for rank in range(world) for _, y in tiny.test_batches(rank, world, 5)]
        assert sorted(torch.cat(seen).tolist()) == sorted(tiny.test[1].tolist())


def test_all_methods_see_the_same_samples_and_each_process_its_share(tiny, tmp_path):
    runs = [watched(tmp_path, f"--steps 3 --method {method}")[0] for method in train.METHODS]
    for seen in runs[1:]:
        same(seen, runs[0])
    full = watched(tmp_path, "--steps 3 --full-batch")[0]
    same(full, [(x.repeat(4, 1, 1, 1), y.repeat(4)) for x, y in runs[0]])
    for flags, whole in (("", runs[0]), ("--full-batch", full)):  # two of the heads each
        for rank, (seen, *_) in enumerate(on_two(watched, tmp_path / "two", f"--steps 3 {flags}")):
            same(seen, [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in whole])


@cases(
    "flags, steps, arrive, options",
    [
        ("--merge-every 1 --accumulate 2", [*range(1, 8)], [], {}),
        ("--merge-every 3", [3, 6, 7], [], dict(reset="none none none")),
        ("--merge-every 3 --outer-lr 0.5", [3, 6, 7], [], dict(outer_optimizer="True True True")),
        ("--merge-every 50", [7], [], dict(outer_optimizer="False")),
        ("--merge-every 4 --merge-warmup 8", [1, 2, 3, 4, 6, 7], [], {}),
        ("--merge-every 3 --overlap 1", [3, 6, 7], [4, 7], dict(async_op="True True None")),
        ("--merge-every 3 --overlap 2", [3, 6, 7], [5, 7], {}),
        ("--parts 2", [2, 4, 6, 7, 7], [], dict(part="(0, 2) (1, 2) (0, 2) (0, 2) (1, 2)")),
        ("--method relora --merge-every 3", [3, 6, 7], [], dict(reset="AB AB none")),
    ],
)
def test_what_is_merged_when_and_when_it_arrives(tiny, tmp_path, flags, steps, arrive, options):
    _, merges, arrived = watched(tmp_path, f"{flags} --steps 7")
    assert ([step for step, _ in merges], arrived) == (steps, arrive)
    for name, values in options.items():
        assert " ".join(str(given.get(name)) for _, given in merges) == values


def test_the_rate_warms_up_falls_to_zero_and_warms_up_again_after_a_reset():
    args = types.SimpleNamespace(lr=2.0, warmup=10, steps=110, reset="none", merge_every=40)
    rates = [train.learning_rate(step, args) for step in range(1, 111)]
    assert rates[0] == 0.2 and max(rates) == rates[9] == 2.0
    assert rates[9:] == sorted(rates[9:], reverse=True) and 0 < rates[-1] < 0.01
    args.reset = "AB"
    again = [train.learning_rate(step, args) for step in range(1, 111)]
    assert again[:40] == rates[:40] and again[40] < 0.2 * rates[40] and again[79] == rates[79]


@cases("flags", ["--merge-every 2", "--merge-every 4 --parts 2", "--overlap 1"])
def test_without_a_gradient_W_decays_at_merges_as_dense_adamw_decays_it(tiny, tmp_path, flags):
    flags = (f"{own} --steps 7 --lr 0.1 --weight-decay 0.3" for own in (flags, "--method dense"))
    with mock.patch.object(F, "cross_entropy", lambda x, y, **_: 0 * x.sum(1).mean()):
        close(*(run_train(tmp_path, each).weights for each in flags), rtol=1e-5, atol=1e-7)


@cases("method", train.METHODS)
def test_every_method_trains_and_tells_what_it_did(tiny, tmp_path, method, capsys):
    flags = f"--steps 4 --eval-every 2 --merge-every 2 --r 4 --subspaces --method {method}"
    run = run_train(tmp_path, flags)
    names = "method dataset model heads r lora_alpha merge_every reset base wire steps batch_size "
    names += "lr seed test_accuracy test_loss images_per_second bytes_sent_per_step bytes_are "
    names += "dense_bytes_per_step seconds torch device classes"
    assert set(names.split()) <= run.result.keys()
    assert ",".join(run.log[0]) == ",".join([train.COLUMNS, *train.SUBSPACES])
    assert [(row["step"], row["images"]) for row in run.log] == [("2", "32"), ("4", "64")]
    assert 0 <= float(run.log[-1]["test_accuracy"]) <= 1
    for name in train.SUBSPACES:
        assert float(run.log[-1][name]) == pytest.approx(run.result[name], nan_ok=True)
    assert math.isnan(run.result["effective_rank"]) == (method in ("localsgd", "dense"))
    assert method != "lte" or 0.5 < run.result["grassmann"] <= 1
    train.new_model(train.parse_args([]), tiny, CPU).load_state_dict(run.weights)
    capsys.readouterr()
    train.main(["--eval-only", str(tmp_path / "model.pt")])
    assert f"test_accuracy: {run.result['test_accuracy']}\n" in capsys.readouterr().out


def test_bytes_are_computed_counted_on_two_processes_and_planned_the_same(tiny, tmp_path, capsys):
    flags = "--heads 2 --steps 6 --merge-every 3 --wire bf16"
    alone, [two, _] = run_train(tmp_path, flags), on_two(run_train, tmp_path / "two", flags)
    told = [alone.result["bytes_are"], two.result["bytes_are"]]
    assert told == ["computed for 2 processes", "counted for 2 processes"]
    assert alone.result["bytes_sent_per_step"] == two.result["bytes_sent_per_step"] > 0
    size = sum(p.numel() for p in alone.weights.values())
    assert alone.result["dense_bytes_per_step"] == 4 * size  # of 2 processes
    flags = "--plan 2,8 --base nf4 --wire bf16 --merge-every 6 --parts 3".split()
    train.main(flags)
    printed = capsys.readouterr().out
    model = train.make_model(train.parse_args(flags), tiny, CPU)
    cost = lte.cost_report(model, workers=2, merge_every=6, wire="bf16")
    step, dense, once = (cost["sent"][name] / 1e6 for name in ("step", "dense", "merge"))
    held, all_dense = cost["held"]["all"] / 1e6, cost["held_dense"]["all"] / 1e6
    assert f"| sends a step | {step:,.3f} MB | {dense:,.3f} MB | {dense / step:.1f} |" in printed
    assert f"| waits a step | {step:,.3f} s | {dense:,.3f} s |" in printed  # 8 Mbit/s: 1 MB/s
    assert f"| holds, activations aside | {held:,.3f} MB | {all_dense:,.3f} MB |" in printed
    assert f"| sends at once | {once / 3:,.3f} MB |" in printed


@cases("method", ["lte", "dense"])
def test_micro_batches_add_up_and_W_is_exported_or_rounded(tiny, tmp_path, monkeypatch, method):
    sgd = lambda args, model: (torch.optim.SGD(model.parameters(), 1e-3), None)  # noqa: E731
    monkeypatch.setattr(train, "make_optimizers", sgd)  # Adam would hide a loss twice too large
    flags = (f"--method {method} --steps 3 --clip 1e9 --accumulate {k}" for k in (1, 2))
    close(*(run_train(tmp_path, each).weights for each in flags), rtol=1e-4, atol=1e-6)
    flags = (f"--steps 4 --base nf4 --export {form}" for form in ("exact", "forward"))
    exact, forward = (run_train(tmp_path, each).weights["head.weight"] for each in flags)
    same(forward, rounded(exact, "nf4"))


@cases("method", ["lte", "lora", "dense"])
def test_where_nothing_is_finite_the_run_ends_and_saves_nothing(tiny, tmp_path, method):
    right, calls = F.cross_entropy, itertools.count(1)
    wrong = lambda x, y, **k: right(x, y, **k) * (math.nan if next(calls) == 3 else 1)  # noqa: E731
    flags = f"--steps 5 --save-every 2 --merge-every 2 --eval-every 9 --method {method}"
    with mock.patch.object(F, "cross_entropy", wrong):
        said = sentence(f"{flags} --out {tmp_path}")
    assert said.startswith("train.py: step 4: ") and re.search("NaN|finite", said)
    assert saved_step(tmp_path) == 2 and not (tmp_path / "model.pt").exists()


RUNS = {  # flags; and {a step that a SIGTERM precedes: the step then saved}, at a merge's arrival
    "lte": ("", {4: 6, 11: 11}),
    "ahead": ("--overlap 2 --outer-lr 0.7 --outer-momentum 0.5 --base nf4", {4: 8}),
    "parts": ("--merge-every 4 --parts 2 --overlap 1", {5: 7}),
    "dense": ("--method dense", {4: 6}),
    **{name: (f"--method {name}", {}) for name in ("relora", "localsgd", "mhlora")},
}
SHORT = "--merge-every 3 --steps 11 --eval-every 2 --warmup 2"
REAL = "--dataset folder --heads 2 --batch-size 16 --merge-every 2 --steps 20 --eval-every 20"
SAVED = "--merge-every 3 --save-every 2 --steps 5"  # saved at step 4, the last


def terminate(*_):  # of two processes the second one alone
    if os.environ.get("RANK") != "0":
        os.kill(os.getpid(), signal.SIGTERM)


def cut_short(out, flags, k, call):
    """A run that ends by call(args) before its k-th step; its exit code, if it has one."""
    rate = train.learning_rate
    with pytest.MonkeyPatch.context() as patch, raises((KeyboardInterrupt, SystemExit)) as ended:
        cut = lambda step, args: (step == k and call(args), rate(step, args))[1]  # noqa: E731
        patch.setattr(train, "learning_rate", cut)
        run_train(out, flags)
    return getattr(ended.value, "code", None)


def same_end(a, b):
    same(a.weights, b.weights)
    assert a.told == b.told and len(a.told) > 1


def saved_step(out):
    file = out / "checkpoints" / "dense.pt"
    return torch.load(file)["step"] if file.exists() else lte.newest(file.parent)[1]["step"]


@cases("name", RUNS)
def test_a_run_killed_or_stopped_anywhere_ends_as_one_left_alone(tiny, tmp_path, capsys, name):
    flags, stops = RUNS[name]
    whole = run_train(tmp_path / "whole", flags := f"{SHORT} {flags}")
    for k in (5, 6, 7):
        cut_short(tmp_path / "out", f"{flags} --save-every 1 {'--resume' * (k > 5)}", k, die)
        assert k - 4 <= saved_step(tmp_path / "out") <= k - 1
    same_end(run_train(tmp_path / "out", f"{flags} --resume"), whole)
    for k, saved in stops.items():
        assert cut_short(out := tmp_path / str(k), flags, k, terminate) == 128 + signal.SIGTERM
        assert "; --resume goes on" in capsys.readouterr().out
        assert saved_step(out) == saved and not (out / "model.pt").exists()
        same_end(run_train(out, f"{flags} --resume"), whole)
    if stops:  # the same on two processes, one of which gets it; and on one, then on two
        down, up = tmp_path / "down", tmp_path / "up"
        assert on_two(cut_short, down, flags, 4, terminate) == [143, 143]
        assert cut_short(up, flags, 4, terminate) == 143
        two, _ = on_two(run_train, up, f"{flags} --resume")
        for run in (run_train(down, f"{flags} --resume"), two):
            assert run.result["test_loss"] == pytest.approx(whole.result["test_loss"], rel=1e-3)
            if name != "dense":  # whose gradients are added in another order
                same(run.weights, whole.weights)


def test_a_second_SIGTERM_kills_and_one_after_a_loss_silences_nothing(tiny, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGTERM, die)  # what kills, as far as this test goes
    code = cut_short(tmp_path, "--steps 3", 2, lambda _: (terminate(), terminate()))
    assert code is None and signal.getsignal(signal.SIGTERM) is die
    assert not lte.checkpoints(tmp_path / "checkpoints")
    lose = mock.Mock(side_effect=lte.ProcessLost("another process has ended"))
    monkeypatch.setattr(dist, "is_initialized", lambda: lose.called)
    monkeypatch.setattr(dist, "destroy_process_group", terminate)  # as torchrun does
    said = cut_short(tmp_path, "--steps 3", 3, lose)
    signal.signal(signal.SIGTERM, before)
    assert said == "train.py: step 3: another process has ended"


def test_only_what_is_asked_or_started_again_goes_on(tiny, tmp_path, monkeypatch, capsys):
    out, again, kept = tmp_path / "out", tmp_path / "again", run_train(tmp_path / "out", SAVED)
    (out / "model.pt").unlink()
    assert re.search("earlier run; add --resume, or .*--out", sentence(f"{SAVED} --out {out}"))
    (out / "checkpoints" / "step_00000004" / "meta.json").write_text("{")
    said = sentence(f"{SAVED} --out {out} --resume")
    assert "step_00000004 is not whole" in said and "previous" in said
    assert not (out / "model.pt").exists()
    for which in ("previous", "last"):  # from step 2, then once more from the end
        same_end(run_train(out, f"{SAVED} --resume {which}"), kept)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    cut_short(again, SAVED, 4, die)  # nothing was saved before: it begins
    same_end(run_train(again, SAVED), kept)
    assert f"step 2  goes on from {again}" in capsys.readouterr().out


def test_another_flag_or_class_or_order_of_classes_is_refused_by_its_name(tiny, tmp_path):
    run_train(tmp_path, SAVED)
    flags = "--lr=0.5 --merge-every=4 --steps=6 --clip=2 --weight-decay=0 --reset=B --wire=bf16 "
    flags += "--overlap=1 --accumulate=2 --warmup=3 --label-smoothing=0.1 --bf16 --init=kaiming "
    flags += "--augment=crop-flip --dataset=cifar10 --heads=2 --seed=1 --base=nf4 --r=4 --parts=3 "
    flags += "--lora-alpha=5 --outer-lr=0.7 --outer-momentum=0.5 --method=localsgd --method=dense "
    flags += (
        "--model=mixer-nano --patch=16 --merge-warmup=2 --full-batch --batch-size=32 --subspaces"
    )
    for flag in flags.split():
        said = sentence(f"--out {tmp_path} {SAVED} --resume {flag}")
        assert f"is of a run with {flag.partition('=')[0]} " in said and str(tmp_path) in said
    free = "data download workers compile out export eval_every eval_only compare "
    free += "plot bench plan save_every resume timeout"
    compared = {f.partition("=")[0][2:].replace("-", "_") for f in flags.split()}
    assert {a.dest for a in train.make_parser()._actions} == compared | set(free.split())
    first, second, *rest = tiny.classes.values()
    for other in ("circus", second, *rest), (second, first, *rest):
        tiny.classes = {f"class {n}": name for n, name in enumerate(other)}
        for flags in (f"{SAVED} --resume", f"--eval-only {tmp_path}/model.pt"):
            said = sentence(f"--out {tmp_path} {flags}")
            assert f"class 0 {first}, this one has {other[0]}" in said


def test_compare_trains_each_set_of_flags_in_its_own_folder_and_goes_on(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    sets = ["--method dense", "", '--lr "0.002" --r 8', "--bf16"]
    folders = ["method_dense", "as_given", "lr_0.002_r_8", "bf16"]
    flags = f"--subspaces --plot --eval-every 2 --compare {shlex.join(sets)} --seed 1 {SAVED}"
    main = lambda *more: train.main(["--batch-size=16", *shlex.split(flags), *more])  # noqa: E731
    main("--out", str(tmp_path / "whole"))
    shown = re.findall(r"^\| (.*) \|$", capsys.readouterr().out, re.M)
    titles, *rows = (row.split(" | ") for row in shown)
    assert [row[0] for row in rows] == [sets[0], "(as given)", *sets[2:]]
    assert titles[5:] == ["cosine", "grassmann", "effective_rank"] and rows[0][5] == "nan"
    runs = [left_by(tmp_path / "whole" / folder) for folder in folders]
    results = [run.result for run in runs]
    assert [r["r"] for r in results] == [0, 32, 8, 32] and {r["seed"] for r in results} == {1}
    told = f"{100 * results[2]['test_accuracy']:.2f} %", f"{results[2]['test_loss']:.4f}"
    assert rows[2][1:4] == [*told, f"{results[2]['bytes_sent_per_step']:,}"]
    assert (tmp_path / "whole" / "plot.png").stat().st_size > 10_000
    cut_short(tmp_path / "again", flags, 4, lambda args: args.method == "lte" and die())
    main("--out", str(tmp_path / "again"), "--resume")  # one is done, two have not begun
    for folder, run in zip(folders, runs, strict=True):
        same_end(left_by(tmp_path / "again" / folder), run)


def test_the_benchmark_times_whole_steps_in_turn_and_both_forms(tiny, capsys, monkeypatch):
    taken, step, formed = [], train.train_step, lte.Product.formed
    form = lambda tokens: lte.Product.formed(tokens, torch.zeros(64, 64))  # noqa: E731
    noted = lambda *a: (taken.append((a[4].method, form(1), form(1000))), step(*a))[1]  # noqa: E731
    monkeypatch.setattr(train, "train_step", noted)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    train.main(["--bench", "--batch-size", "16"])
    said = capsys.readouterr().out
    shown = re.findall(r"^\| (.*) \| [\d.]+ \| ([\d.]+) \| \d+ \|$", said, re.M)
    names = ["dense", "LTE", "LTE, W + s U V formed", "LTE, part by part"]
    assert [name for name, _ in shown] == names and shown[0][1] == "1.000"
    forms = ("dense", False, True), ("lte", False, True), ("lte", True, True), ("lte", False, False)
    assert taken == [form for form in forms for _ in "ab"] + [*forms] * 15 + [forms[1]] * 20
    assert lte.Product.formed is formed and re.search(r"waiting for data: \d+\.\d %", said)
    assert re.search(r"bytes a step, 4 processes: \d\d,\d{3}, dense \d{3},\d{3}", said)


def save_image(path, size=8, image=None, **options):
    noise = np.random.default_rng([*path.name.encode()]).bytes(3 * size**2)
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.frombytes("RGB", (size, size), noise)).save(path, **options)
    return path


def save_images(root, size=8, count=4):
    for part, name, i in itertools.product(("train", "test"), ("cat", "dog"), range(count)):
        save_image(root / part / name / f"{name}{i}.png", size)


DATA, DOG = Path("data"), Path("data/train/dog")
BAD, DEEP = f"{DOG}/dog2.png is no image", f"{DOG}/dog2.png has more than 8 bits a pixel (mode"
MISTAKES = [  # flags, or what is done to a folder of images; and a part of the sentence
    *[(f"--{wrong}", f"--{wrong}: must be above 0") for wrong in ("heads 0", "lr nan")],
    ("--timeout inf", "--timeout inf: must be above 0, and below inf"),
    ("--overlap -1", "--overlap -1: must be 0 or more"),
    ("--label-smoothing 1", "--label-smoothing 1.0: must be 0 or more, and below 1"),
    ("--r x", "argument --r: invalid int value: 'x'"),
    *[(f"--{name} x", f"argument --{name}: invalid choice: 'x'") for name in ("base", "dataset")],
    ("--learning-rate 1", "--learning-rate is no flag"),
    ("--batchsize 8", "--batchsize is no flag; did you mean --batch-size?"),
    ("--heads 3", "--batch-size 16: use a multiple of 3, for 3 heads, 1 processes"),
    ("--accumulate 3", "use a multiple of 12, for 4 heads, 1 processes, 3 micro-batches"),
    ("--augment mixup --heads 32", "--batch-size 16: use a multiple of 512"),
    *[(w, "--parts must divide") for w in ("--overlap 4", "--parts 3", "--parts 2 --overlap 2")],
    *[(f"--reset B --{flag} 1", "exclude each other") for flag in ("overlap", "merge-warmup")],
    *[(f"--plan {p}", f"--plan {p}: WORKERS, a divisor of --heads 4") for p in ("3,100", "4,0")],
    ("--bench --method dense", "--bench and --plan compare a method of heads with dense"),
    ("--compare --steps 3", "--compare takes sets of flags in quotes"),
    ("--compare '--r 4 --bench'", "--bench and the like stand outside the quotes"),
    ("--patch 5", "--patch 5: use a divisor of the images' size, 32"),
    ("--heads 4 --augment cutmix --batch-size 64", "--augment cutmix needs large images; shapes"),
    ("--eval-only no_such.pt", "no_such.pt is no model.pt of vit-nano on shapes"),
    ("--resume --out no_such", "no_such/checkpoints holds no checkpoint"),
    *[(f"--dataset {name}", "--download") for name in ("cifar10", "sun397", "caltech256")],
    ("--dataset cifar100", "cannot open cifar100 (Dataset not found or corrupted); data must"),
    ("--dataset places365", "cannot open places365 (The file data/categories_places365.txt"),
    ("--dataset stanford_cars", "devkit/"),
    ("--dataset sun397", "must hold its files; --download gets them"),
    ("--dataset folder --data no_such", "no_such must hold train/<class>/<image>"),
    *[(lambda bad, text=text: bad.write_text(text), BAD) for text in ("no image", "")],
    (lambda bad: (bad.unlink(), bad.symlink_to("nowhere.png")), BAD),
    (lambda bad: bad.write_bytes(bad.read_bytes()[:100]), BAD),
    (lambda bad: Image.new("1", (20_000, 20_000)).save(bad), BAD),  # a decompression bomb
    (lambda bad: save_image(bad, 12), f"{DOG}/dog2.png is 12 x 12 pixels"),
    (lambda bad: Image.new("I;16", (8, 8)).save(bad), f"{DEEP} I;16)"),
    (lambda bad: (save_images(DATA, 80), Image.new("F", (9, 9)).save(bad, "tiff")), f"{DEEP} F)"),
    (lambda bad: (shutil.rmtree(DOG), DOG.mkdir()), "Found no valid file for the classes dog"),
    (lambda bad: shutil.rmtree(DOG), "only one of train and test has dog"),
    (lambda bad: shutil.rmtree(DATA / "train"), "data must hold train/<class>/<image>"),
]


@cases("mistake, says", MISTAKES)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, monkeypatch, mistake, says):
    monkeypatch.setattr(train, "load_data", train.load_data.__wrapped__)  # nothing kept
    monkeypatch.setattr(train, "make_shapes", lambda n, part: some_shapes())
    monkeypatch.chdir(tmp_path)
    if callable(mistake):
        save_images(DATA)
        mistake(DOG / "dog2.png")
    assert says in sentence("--dataset folder" if callable(mistake) else mistake)
    assert {path.name for path in tmp_path.iterdir()} <= {"data", "caltech256"}


def test_every_flag_is_explained_with_its_default_and_each_group_fits_a_screen(capsys):
    ended = raises(SystemExit, train.main, ["--help"])
    shown = capsys.readouterr().out
    assert not ended.value.code and max(map(len, shown.splitlines())) <= 100
    groups = re.split(r"^\S.*:$", shown, flags=re.M)[1:]
    assert len(groups) == 5 and all(group.count("\n") < 24 for group in groups)
    for action in train.make_parser()._actions:
        [line] = re.findall(rf"^    {action.option_strings[0]}[ \n].*", shown, re.M)
        default = action.default if action.default not in (None, False) else ".+"
        assert re.search(rf"\({default}\)$", line)


def refusals(out):
    flags = f"--merge-every {3 + dist.get_rank()}", "--method lora", "--method mhlora"
    return [sentence(f"{each} --out {out}") for each in flags]


def test_what_two_processes_cannot_run_both_refuse(tmp_path):
    for different, lora, mhlora in on_two(refusals, tmp_path):
        assert re.search("--merge-every.* start all alike", different)
        assert "--method lora, --heads 1: not for 2 processes" in lora
        assert "--method mhlora, --heads 4: not for 2 processes" in mhlora


@cases(
    "where, error, says",
    [
        ((torch, "save"), OSError(28, "No space left", "model.pt"), "model.pt.*free space, or"),
        ((torch, "save"), RuntimeError("inline_container.cc: failed"), "failed; free space, or"),
        ((train, "evaluate"), OSError(30, "Read-only file system"), "another --out"),
        ((train, "train_step"), RuntimeError("unable to allocate shared memory(shm)"), "shm-size"),
        ((train, "train_step"), RuntimeError("DataLoader worker is killed"), "--workers"),
        ((train, "train_step"), RuntimeError("CUDA out of memory. Tried"), "lower --batch-size"),
        ((train, "train_step"), InvalidCxxCompiler(), "--compile needs a C.. compiler"),
        ((train, "train_step"), RuntimeError("a bug"), "a bug"),
    ],
)
def test_troubles_end_with_a_remedy_and_bugs_do_not(tiny, tmp_path, capsys, where, error, says):
    with mock.patch.object(*where, side_effect=error), raises(BaseException, match=says) as ended:
        run_train(tmp_path, "--steps 1")
    assert ended.type is (RuntimeError if says == "a bug" else SystemExit)
    assert "\n" not in str(ended.value)
    told = re.search(r"^test_accuracy: 0\.\d+$", capsys.readouterr().out, re.M)
    assert bool(told) == (where[0] is torch) and not (tmp_path / "model.pt").exists()


def test_a_folder_of_small_images_is_read_into_memory_without_what_is_hidden(tmp_path):
    save_images(tmp_path)
    hidden = ".DS_Store", "Thumbs.db", "._cat0.png", ".ipynb_checkpoints/cat0.png"
    for place, name in itertools.product(("train", "train/cat"), hidden):
        save_image(tmp_path / place / name, format="png")
    data = folder(tmp_path, "auto")
    assert data.classes == {"class 0": "cat", "class 1": "dog"} and data.sizes == (8, 8)
    files = [f"train/{name}/{name}{i}.png" for name in ("cat", "dog") for i in range(4)]
    expected = [np.array(Image.open(tmp_path / file)) for file in files]
    same(data.images[:, :, 4:-4, 4:-4], torch.tensor(np.stack(expected)).permute(0, 3, 1, 2))
    assert data.labels.tolist() == [0] * 4 + [1] * 4


@cases("mode", ["RGB", "L", "LA", "P", "RGBA", "1", "CMYK", "clear"])
def test_images_are_read_as_a_viewer_shows_them(tmp_path, mode):
    image, suffix = Image.new("RGB", (3, 2), (250, 10, 30)), "jpg" if mode == "CMYK" else "png"
    if mode == "clear":
        image.putalpha(0)
    elif mode != "RGB":
        image = image.convert(mode, dither=Image.Dither.NONE, palette=Image.Palette.ADAPTIVE)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    read = train.read_image(save_image(tmp_path / f"image.{suffix}", image=image, exif=exif))
    assert (read.mode, read.size) == ("RGB", (2, 3))
    shown = {"L": (84, 84, 84), "LA": (84, 84, 84), "1": (0, 0, 0), "clear": (255, 255, 255)}
    assert read.getpixel((1, 1)) == pytest.approx(shown.get(mode, (250, 10, 30)), abs=2)


@cases("size, augment", [(8, "crop-flip"), *((80, name) for name in train.AUGMENT)])
def test_a_sample_and_its_augmentation_depend_on_step_and_place_alone(tmp_path, size, augment):
    save_images(tmp_path, size)
    batches = partial(folder(tmp_path, augment).train_batches, 3, 32)
    shared = partial(folder(tmp_path, augment, workers=2).train_batches, 3, 32)
    whole, side = [*batches([1, 2], torch.arange(32))], 8 if size == 8 else 224
    for x, y in whole:
        assert x.shape == (32, 3, side, side) and x.dtype == torch.float32
        assert y.shape == ((32, 2) if augment in ("mixup", "cutmix") else (32,))
    assert not torch.equal(whole[0][0], whole[1][0])
    for part in (slice(0, 16), slice(16, 32)):  # other workers and shares
        for (x, y), share in zip(whole, shared([1, 2], torch.arange(32)[part]), strict=True):
            same(list(share), [x[part], y[part]])
    same([*batches([2], torch.arange(32))], whole[1:])  # reached without the step before
    if augment == "mixup":  # partners are of one slice: its first 16 are of one class
        x, y = torch.arange(32.0).view(32, 1, 1, 1).repeat(1, 3, 4, 4), torch.arange(32)
        mixed, labels = folder(tmp_path, augment).mixed(x, y // 16, 0, 1, y)
        same(labels, F.one_hot(y // 16).float())
        assert mixed[:16].max() <= 15 < 16 <= mixed[16:].min() and not torch.equal(mixed, x)


def test_a_corrupt_streamed_image_is_named_counted_and_replaced_by_the_next(tmp_path):
    save_images(tmp_path, 80, count=51)  # 204 in all
    data = folder(tmp_path, "none")
    expected, files = data.test[4, ()][0], [Path(path) for path, _ in data.test.samples]
    files[3].write_bytes(b"no image")
    with pytest.warns(UserWarning, match=f"{files[3].name} is no image.*the next one is shown"):
        x, y = map(torch.cat, zip(*data.test_batches(0, 1, 50), strict=True))
    assert len(data.bad) == 1 and len(y) == 102
    same(x[3], train.normalise(expected))
    [file.write_bytes(b"") for file in files[7:9]]
    with raises(ValueError, match="3 images are unreadable, as .*png is no image"):
        list(data.test_batches(0, 1, 50))


def fill(root, names, content=None):  # or images
    for name in names.split():
        save_image(root / name, 80, format="jpeg")
        content is None or (root / name).write_bytes(content)


def mat(**content):
    pytest.importorskip("scipy.io").savemat(file := io.BytesIO(), content)
    return file.getvalue()


def make_imagenet(root):
    made, devkit, pack = root / "made", "ILSVRC2012_devkit_t12", shutil.make_archive
    kind = [(n, "O") for n in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    rows = [(1, "n01440764", "tench, Tinca tinca", "", 0), (2, "n01443537", "goldfish", "", 0)]
    fill(made / devkit, "data/meta.mat", mat(synsets=np.array(rows, dtype=kind)))
    fill(made / devkit, "data/ILSVRC2012_validation_ground_truth.txt", b"2\n1\n")
    pack(root / devkit, "gztar", made, devkit)
    for _, wnid, *_ in rows:
        fill(made / wnid, f"{wnid}_1.JPEG {wnid}_2.JPEG")
        pack(made / "train" / wnid, "tar", made / wnid)
    fill(made / "val", "val_1.JPEG val_2.JPEG")
    for part in ("train", "val"):
        pack(root / f"ILSVRC2012_img_{part}", "tar", made / part)


def make_miniature(root, name):
    """A data set in its real layout, of a few images; how many, of which classes."""
    pixels, classes = np.zeros((4, 3072), dtype=np.uint8), ["c0", "c1", "c2", "c3"]
    match name:
        case "cifar10":
            base = root / "cifar-10-batches-py"
            files = "data_batch_1 data_batch_2 data_batch_3 data_batch_4 data_batch_5 test_batch"
            fill(base, "batches.meta", pickle.dumps({"label_names": classes}))
            fill(base, files, pickle.dumps({"data": pixels, "labels": [0, 1, 2, 3]}))
            return "20 + 4", classes
        case "cifar100":
            base = root / "cifar-100-python"
            fill(base, "meta", pickle.dumps({"fine_label_names": classes}))
            fill(base, "train test", pickle.dumps({"data": pixels, "fine_labels": [0, 1, 2, 3]}))
            return "4 + 4", classes
        case "caltech256":
            names = (f"001.ak47/001_000{i}.jpg 002.flag/002_000{i}.jpg" for i in range(1, 6))
            fill(root / "caltech256" / "256_ObjectCategories", " ".join(names))
            return "8 + 2", ["001.ak47", "002.flag"]
        case "stanford_cars":
            notes = np.array([(1, "1.jpg"), (2, "2.jpg")], dtype=[("class", "u1"), ("fname", "U9")])
            names, base = np.array(["Hummer", "Acura RL"], dtype=object), root / "stanford_cars"
            fill(base, "cars_train/1.jpg cars_train/2.jpg cars_test/1.jpg cars_test/2.jpg")
            fill(base, "devkit/cars_meta.mat", mat(class_names=names))
            files = "devkit/cars_train_annos.mat cars_test_annos_withlabels.mat"
            fill(base, files, mat(annotations=notes))
            return "2 + 2", [*names]
        case "sun397":
            names = (f"a/abbey/sun_{i}.jpg a/airfield/sun_{i}.jpg" for i in range(5))
            fill(root / "SUN397", " ".join(names))
            fill(root / "SUN397", "ClassName.txt", b"/a/abbey\n/a/airfield\n")
            return "8 + 2", ["abbey", "airfield"]
        case "places365":
            fill(root, "data_256_standard/a/abbey/1.jpg data_256_standard/a/airfield/2.jpg")
            fill(root, "val_256/v1.jpg val_256/v2.jpg")
            fill(root, "categories_places365.txt", b"/a/abbey 0\n/a/airfield 1\n")
            fill(root, "places365_train_standard.txt", b"/a/abbey/1.jpg 0\n/a/airfield/2.jpg 1\n")
            fill(root, "places365_val.txt", b"v1.jpg 1\nv2.jpg 0\n")
            return "2 + 2", ["/a/abbey", "/a/airfield"]
        case "imagenet":
            make_imagenet(root)
            return "4 + 2", ["tench", "goldfish"]
        case "folder":
            save_images(root, 80, count=16)
            return "32 + 32", ["cat", "dog"]


@cases("name", train.DATASETS.split()[1:])
def test_each_data_set_trains_from_its_real_layout(tmp_path, monkeypatch, capsys, name):
    sizes, classes = make_miniature(tmp_path / "data", name)
    for module in ("cifar", "places365", "imagenet"):
        check = f"torchvision.datasets.{module}.check_integrity"
        monkeypatch.setattr(check, lambda path, md5=None: os.path.isfile(path))
    monkeypatch.setitem(train.MODELS, "vit-nano", (32, 1, train.ViTBlock, 4))
    flags = f"--dataset {name} --data {tmp_path}/data --workers 0 --steps 2 --batch-size 4"
    if name == "folder":
        flags += " --augment cutmix --label-smoothing 0.1 --heads 2 --batch-size 32"
    result = run_train(tmp_path / "out", flags).result
    assert list(result["classes"].values()) == classes and math.isfinite(result["test_loss"])
    assert f"{name}: {sizes} images of {len(classes)} classes" in capsys.readouterr().out


# ---- 11 run_ddp.sh ----


def launch(variables, flags):  # what it and its children say is its stdout
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = dict(OMP_NUM_THREADS="1", PATH=path) | dict(v.split("=") for v in variables.split())
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    command = ["bash", Path(__file__).with_name("run_ddp.sh"), *flags.split()]
    return subprocess.Popen(command, env=os.environ | given, **options)


@cases(
    "variables, says",
    [
        ("", "--nproc-per-node=4 --max-restarts=0 --standalone -- "),
        ("NNODES=2 NODE_RANK=1 MASTER_ADDR=a", "--nnodes=2 --node-rank=1 --master-addr=a "),
        ("NNODES=1:4 RDZV=a:1", "--nnodes=1:4 --rdzv-backend=c10d --rdzv-endpoint=a:1 "),
        ("NPROC=0", "NPROC=0 is not a number of processes; use 1 or more, or unset it"),
        ("NNODES=2", "needs RDZV=host:port or, as one number, MASTER_ADDR and NODE_RANK"),
        ("NNODES=1:4 MASTER_ADDR=a", "NNODES=1:4 needs RDZV=host:port"),
        ("NNODES=2 MASTER_ADDR=a", "NODE_RANK= is not below NNODES=2; set 0 on a, 1, ... else"),
        ("NNODES=2 NODE_RANK=2 MASTER_ADDR=a", "NODE_RANK=2 is not below NNODES=2"),
        ("LINK=1mbit", "LINK=1mbit and DELAY= act on emulated hosts only; set HOSTS, or unset"),
        ("HOSTS=2 LINK=100", "LINK=100 is not a rate in bits a second; use one such as 100mbit"),
        ("HOSTS=2 NNODES=2", "emulates hosts on one machine; unset NNODES, RDZV and MASTER_ADDR"),
    ],
)
def test_the_launcher_hands_on_where_to_meet_and_all_flags_or_refuses(tmp_path, variables, says):
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$1" = -c ] && echo 4 8 || echo "$@"\n')
    (tmp_path / "python").chmod(0o755)  # a stand-in: it has 4 GPUs, and says how it is called
    with launch(f"{variables} PATH={tmp_path}:{os.environ['PATH']}", "--r 8") as launcher:
        said = launcher.stdout.read()
    assert says in said and said.count("\n") == 1
    assert said.endswith("train.py --r 8\n") if says[0] == "-" else launcher.returncode == 2


def test_after_the_kill_of_a_process_torchrun_starts_again_and_nothing_is_lost(tmp_path):
    save_images(tmp_path / "images")
    flags, said = f"{REAL} --save-every 4 --data {tmp_path}/images", ""
    variables = "NPROC=2 MAX_RESTARTS=1 CUDA_VISIBLE_DEVICES="
    with launch(variables, f"{flags} --timeout 60 --out {tmp_path}/two") as launcher:
        for line in launcher.stdout:
            said += line
            if "step 4  saved" in line:
                pids = subprocess.getoutput(f"pgrep -P {launcher.pid}").split()
                started = {p: Path(f"/proc/{p}/environ").read_bytes() for p in pids}
                [pid] = [p for p, variables in started.items() if b"\0RANK=1\0" in variables]
                os.kill(int(pid), signal.SIGKILL)
    assert launcher.returncode == 0 and re.search(r"step \d+  goes on from", said), said
    assert re.search(r"train.py: step \d+: .*process", said)
    same(run_train(tmp_path / "one", flags).weights, left_by(tmp_path / "two").weights)


def test_emulated_hosts_send_what_lte_counts_and_leave_nothing_behind(tmp_path):
    if subprocess.run("unshare --net --mount ip link add type bridge", shell=True).returncode:
        pytest.skip("needs root, iproute2, and a system that allows network namespaces")
    save_images(tmp_path / "images")
    flags = f"{REAL} --r 16 --data {tmp_path}/images --out {tmp_path}"
    with launch("HOSTS=2 LINK=1gbit", flags) as launcher:
        said = launcher.stdout.read()
    assert launcher.returncode == 0, said
    counted = 20 * left_by(tmp_path).result["bytes_sent_per_step"]
    [sent] = re.findall(r"host 1 sent (\d+) bytes", said)  # host 0 sends the model too
    assert 1 < int(sent) / counted < 1.05
    left = subprocess.run("ps ax; ip netns", shell=True, capture_output=True, text=True).stdout
    assert str(tmp_path) not in left and "host0" not in left
