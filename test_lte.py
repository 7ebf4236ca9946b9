"""What lte.py and train.py promise, as laws to read: one a test, in the order of their sections.

    python -m pytest test_lte.py

Laws hold in float64 to 1e-10, or bit for bit. All sizes differ, so that nothing fits by accident:
N = 3 heads of rank r = 2, layers 5 -> 7, b = 4 samples a head. The slow, obviously right form of
the layer is `Twin`: a loop over heads with W + s (B A - B' A') formed. The fast form must equal it.

Tests of several processes fork them from a clean server and let them talk through gloo.
"""

import argparse
import contextlib
import copy
import csv
import functools
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
import weakref
from pathlib import Path
from unittest import mock

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.transforms import v2

import lte
import train

torch.set_num_threads(1)  # bits are promised for equal thread counts; and forked processes are many

N, R, IN, OUT, B = 3, 2, 5, 7, 4  # B: samples of one head
ALPHA = 3.0  # s = 1.5
CLASSES = 3

close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # bit for bit
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def a_test_starts_from_the_same_seed_whatever_ran_before():
    torch.manual_seed(0)


def convert(model, **options):
    return lte.convert(model, **{"heads": N, "r": R, "lora_alpha": ALPHA} | options)


def net(seed=0):
    """Low-rank layers and copies, in float64: 5 -> 7 -> 3."""
    torch.manual_seed(seed)
    layers = nn.Linear(IN, OUT), nn.LayerNorm(OUT), nn.Tanh(), nn.Linear(OUT, CLASSES)
    return nn.Sequential(*layers).double()


def vit(dropout=0.0, dtype=torch.float64):
    """torchvision's own, very small: patch convolution, class token, attention, LayerNorm, MLP."""
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=8,
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=12,
        mlp_dim=20,
        dropout=dropout,
        num_classes=10,
    )
    nn.init.normal_(model.heads.head.weight, std=0.1)  # torchvision's zeros would hide the rest
    return model.to(dtype)


def learn(model, seed=1, size=0.1):
    """As if every head had learnt something of its own."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += size * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return model


def seasoned(model, **options):
    """A converted model in the middle of a round: A', B' are neither zero nor equal to A, B."""
    model = learn(convert(model, **options))
    lte.merge(model)
    return learn(model, seed=2)


def delta(layer, h):
    """s (B A - B' A') of head h, as a merge would form it."""
    pieces = [layer.delta(layer.learnt(), h, piece) for piece in layer.pieces]
    return torch.cat(pieces).view(layer.shape)


def batch(heads=N, seed=3, width=IN):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(heads * B, width, generator=g, dtype=torch.float64)
    return x, torch.randint(CLASSES, (heads * B,), generator=g)


def loss(model, x, y):
    return lte.head_loss(F.cross_entropy(model(x), y, reduction="none"), model)


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss(model, x, y).backward()
    optimizer.step()


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def on_processes(world, function, *args):
    """[function(*args) of every rank]; a rank's exception is raised here with its traceback."""
    if world == 1:
        return [function(*args)]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            server.Process(target=one_process, args=(folder, rank, world, function, args))
            for rank in range(world)
        ]
        for p in ranks:
            p.start()
        for p in ranks:
            p.join(120)
        hung = [rank for rank, p in enumerate(ranks) if p.is_alive()]
        for p in ranks:
            p.kill()
            p.join()
        errors = "\n".join(f.read_text() for f in sorted(Path(folder).glob("*.error")))
        assert not hung and not errors, f"ranks {hung} hung\n{errors}"
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def one_process(folder, rank, world, function, args):
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
        )
        torch.save(function(*args), f"{folder}/{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")


def loose(heads=4, **options):
    """Layers that no forward joins, of sizes that neither rows nor processes divide; in float32."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 1), nn.Linear(10, 101), nn.Linear(33, 5), nn.LayerNorm(77), nn.PReLU()
    return lte.convert(
        nn.Sequential(*layers), **{"heads": heads, "r": 4, "lora_alpha": 8} | options
    )


def learn_apart(model, seed=1, size=0.1):
    """`learn`, but what a head learns does not depend on which process it lives on."""
    layout, g = lte.layout_of(model), torch.Generator().manual_seed(seed)
    first = layout.rank * layout.local
    with torch.no_grad():
        for p in model.parameters():
            learnt = size * torch.randn(layout.heads, *p.shape[1:], generator=g, dtype=p.dtype)
            p += learnt[first : first + layout.local]
    return model


def nesterov(model):
    parameters = lte.outer_parameters(model)
    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


def outcome(model):
    """What all processes hold after a merge, and what only this one does."""
    forward = {m.plain: m.dense() for m in lte.merged_tensors(model)}
    heads = {name: p.detach().clone() for name, p in model.named_parameters()}
    return (lte.merged_state_dict(model), forward), heads


def together(ranks):
    """What [outcome of every rank] is as the outcome of one process, once all agree."""
    for shared, _ in ranks:
        same(shared, ranks[0][0])
    heads = [heads for _, heads in ranks]
    return ranks[0][0], {name: torch.cat([h[name] for h in heads]) for name in heads[0]}


# ------------------------------------------------------------------------------------------------
# 1 heads and processes
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 10))
def test_tree_sum_adds_every_term_once(count):
    assert lte.tree_sum(lambda k: 10**k, 2, count) == sum(10**k for k in range(2, 2 + count))


@pytest.mark.parametrize("world, size", [(8, 1), (4, 2), (2, 4), (3, 4), (1, 8)])
def test_a_power_of_two_block_of_heads_is_a_subtree(world, size):
    g = torch.Generator().manual_seed(0)
    terms = torch.randn(world * size, 1000, generator=g)
    whole = lte.tree_sum(lambda k: terms[k], 0, world * size)
    by_process = lte.tree_sum(lambda p: lte.tree_sum(lambda k: terms[k], p * size, size), 0, world)
    same(by_process, whole)
    assert not torch.equal(whole, sum(terms)), "an order that does not matter tests nothing"


def test_a_generator_depends_on_its_key_alone():
    first = torch.rand(9, generator=lte.generator(0, "layer", 1))
    torch.manual_seed(5)
    same(torch.rand(9, generator=lte.generator(0, "layer", 1)), first)
    for other in ((1, "layer", 1), (0, "layer.", 1), (0, "layer", 11)):
        assert not torch.equal(torch.rand(9, generator=lte.generator(*other)), first)


@pytest.mark.parametrize(
    "heads, world, parallel, sentence",
    [
        (0, 1, True, "heads=0: at least one"),
        (-2, 1, True, "heads=-2: at least one"),
        (3, 2, True, "3 heads do not spread over 2 processes.*multiple of 2"),
        (4, 2, False, r"parallel=False.*but 2 are running"),
    ],
)
def test_heads_that_do_not_fit_the_processes_are_refused(
    monkeypatch, heads, world, parallel, sentence
):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(lte, "agree", lambda **values: None)
    model = net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=sentence):
        convert(model, heads=heads, parallel=parallel)
    same(snapshot(model), before)


def test_head_n_gets_the_nth_chunk_of_the_batch():
    x, layout = torch.arange(N * B * 2).view(N * B, 2), lte.Layout(N)
    same(layout.split(x), torch.stack(x.chunk(N)))


def test_a_ragged_batch_is_refused_with_the_numbers():
    model = convert(net())
    with pytest.raises(ValueError, match="batch of 10 samples does not split over 3 heads"):
        model(torch.ones(10, IN, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------
# 2 factors
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init, gain", [("orthogonal", IN / R), ("orthogonal_paper", R / IN)])
def test_the_rows_of_A_are_orthogonal_with_squared_length(init, gain):
    A = convert(net(), init=init)[0].lora_A.detach()
    close(A @ A.mT, gain * torch.eye(R, dtype=torch.float64).expand(N, R, R), atol=1e-9)


@pytest.mark.parametrize(
    "init, bound", [("kaiming", 1 / math.sqrt(64)), ("xavier", math.sqrt(6 / (64 + 16)))]
)
def test_the_entries_of_A_are_uniform_up_to_the_bound_of_one_head(init, bound):
    A = convert(nn.Linear(64, 96), r=16, init=init).lora_A
    assert 0.98 * bound < A.abs().max() <= bound
    close(A.std().item(), bound / math.sqrt(3), rtol=0.05)


def test_every_head_layer_and_seed_draws_its_own_A():
    model, other = convert(nn.Sequential(net(), net())), convert(net(), seed=1)
    A = [*model[0][0].lora_A, *model[1][0].lora_A, *other[0].lora_A]
    assert all(not torch.equal(a, b) for i, a in enumerate(A) for b in A[:i])


def test_A_does_not_depend_on_the_global_generator_nor_moves_it():
    first, model = convert(net())[0].lora_A, net()
    torch.manual_seed(7)
    same(convert(model)[0].lora_A, first)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    same(drawn, torch.rand(3))


def random_factors(dtype=torch.float64, shape=(N,)):
    g = torch.Generator().manual_seed(0)
    sizes = [(*shape, R, IN), (*shape, OUT, R)] * 2
    return [torch.randn(s, generator=g, dtype=dtype) for s in sizes]


def test_the_update_is_BA_minus_what_is_merged_already():
    A, B, A0, B0 = random_factors()
    U, V = lte.factor_update(A, B, A0, B0)
    assert U.shape == (N, OUT, 2 * R) and V.shape == (N, 2 * R, IN)
    close(U @ V, B @ A - B0 @ A0)


def test_the_update_is_exactly_zero_where_nothing_changed():
    A, B, _, _ = random_factors(torch.float32)
    U, V = lte.factor_update(A, B, A.clone(), B.clone())
    assert not (U @ V).any()


def test_the_update_keeps_small_progress_that_the_difference_of_products_loses():
    A0, B0, dA, dB = random_factors(torch.float32)
    A, B = A0 + 1e-4 * dA, B0 + 1e-4 * dB
    exact = B.double() @ A.double() - B0.double() @ A0.double()
    U, V = lte.factor_update(A, B, A0, B0)

    def error(update):
        return ((update - exact).norm() / exact.norm()).item()

    assert error(U @ V) < 1e-6 < 1e-4 < error(B @ A - B0 @ A0)


# ------------------------------------------------------------------------------------------------
# 3 merged tensors
# ------------------------------------------------------------------------------------------------

QUANTIZED = ("int8", "nf4", "fp4")
AWKWARD = [(1,), (3, 1), (7, 13), (10, 384), (64,), (5, 65)]  # against rows of 64 and shares of P


def some_rows(rows=6):
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(0)) / 20


@pytest.mark.parametrize(
    "base, nbytes", [("fp32", 256), ("bf16", 128), ("int8", 68), ("nf4", 36), ("fp4", 36)]
)
def test_a_row_of_64_weights_has_its_size(base, nbytes):
    assert lte.encode(some_rows(), base)[0].nbytes == nbytes


@pytest.mark.parametrize("base", QUANTIZED)
def test_a_row_is_what_bitsandbytes_makes_of_it(base):
    x = some_rows()
    if base == "int8":
        expected = bnb.dequantize_blockwise(*bnb.quantize_blockwise(x, blocksize=64))
    else:
        expected = bnb.dequantize_4bit(*bnb.quantize_4bit(x, blocksize=64, quant_type=base))
    same(lte.decode(lte.encode(x, base), base, torch.float32), expected)


@pytest.mark.parametrize(
    "base, error", [("fp32", 0), ("bf16", 2**-8), ("int8", 0.02), ("nf4", 0.16), ("fp4", 0.17)]
)
def test_rounding_stays_within_half_a_step_of_the_rows_largest_weight(base, error):
    x = some_rows()
    x[2] *= 1e-3  # a row has its own scale
    wrong = (lte.decode(lte.encode(x, base), base, torch.float32) - x).abs()
    assert (wrong.amax(1) / x.abs().amax(1)).max() <= error


@pytest.mark.parametrize("base", lte.BASES)
def test_a_row_of_zeros_stays_zero_and_harms_no_other(base):
    x = some_rows()
    alone = lte.decode(lte.encode(x[1:], base), base, torch.float32)
    x[0] = 0
    decoded = lte.decode(lte.encode(x, base), base, torch.float32)
    assert not decoded[0].any()
    same(decoded[1:], alone)


@pytest.mark.parametrize("base", lte.BASES)
@pytest.mark.parametrize("shape", AWKWARD)
def test_shares_of_the_processes_encode_to_the_rows_of_the_whole(base, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    alone = lte.Merged(tensor, lte.Layout(1), base)
    for world in (2, 3, 4):
        layout, parts = lte.Layout(world), []
        for rank in range(world):
            layout.world, layout.rank = world, rank
            merged = lte.Merged(tensor, layout, base)
            same(merged.rows, alone.rows)
            parts.append([])
            for piece in merged.pieces:
                part = merged.master_part(piece)
                rows = lte.encode(merged.padded(part, piece), base)  # what travels
                parts[-1].append(rows[: len(part)])
        same(torch.cat([part for piece in zip(*parts, strict=True) for part in piece]), alone.rows)


@pytest.mark.parametrize("base", lte.BASES)
def test_the_forward_copy_is_always_the_rounding_of_the_master(base):
    layer = convert(nn.Linear(24, 17), base=base)
    for seed in range(3):
        learn(layer, seed)
        lte.merge(layer)
        exact = lte.merged_state_dict(layer)["weight"]
        rows = torch.zeros(len(layer.rows), 64)
        rows.view(-1)[: exact.numel()] = exact.flatten()
        same(layer.rows, lte.encode(rows, base))


def arrived(start, end, sent):
    """The part of `sent` that is in end - start."""
    return ((end - start).flatten() @ sent.flatten() / sent.norm() ** 2).item()


@pytest.mark.parametrize("base", lte.BASES)
def test_a_hundred_tiny_merges_all_arrive(base):
    layer = convert(nn.Linear(24, 17), base=base)
    W, tiny = layer.exact().clone(), 1e-3 * layer.weight.std()
    B = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(0))
    B *= tiny / (layer.scaling * (B @ layer.lora_A).mean(0)).std()  # the merged step has std tiny
    step = layer.scaling * (B @ layer.lora_A.detach()).mean(0)
    for _ in range(100):
        layer.lora_B.data += B
        lte.merge(layer)
    assert 0.99 < arrived(W, lte.merged_state_dict(layer)["weight"], 100 * step) < 1.01
    forward = arrived(W, layer.weight, 100 * step)  # within the rounding of W
    assert abs(forward - 1) < {"nf4": 0.5, "fp4": 0.8}.get(base, 0.05), forward


def test_without_a_master_four_bits_swallow_them():
    x = some_rows()
    rows, delta = lte.encode(x, "nf4"), 1e-3 * x.std() * torch.sign(some_rows().flip(0))
    for _ in range(100):
        rows = lte.encode(lte.decode(rows, "nf4", torch.float32) + delta, "nf4")
    start = lte.decode(lte.encode(x, "nf4"), "nf4", torch.float32)
    assert arrived(start, lte.decode(rows, "nf4", torch.float32), 100 * delta) < 0.1


@pytest.mark.parametrize("base", QUANTIZED)
def test_missing_bitsandbytes_is_one_sentence_before_any_change(monkeypatch, base):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    model = net()
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        convert(model, base=base)
    assert type(model[0]) is nn.Linear
    before = snapshot(learn(convert(model, base="bf16")))
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        lte.merge(model, wire=base)
    same(snapshot(model), before)


@needs_gpu
@pytest.mark.parametrize("base", lte.BASES)
def test_rows_written_on_the_gpu_decode_to_what_the_cpu_reads(base):
    rows = lte.encode(some_rows().cuda(), base)
    there = lte.decode(rows, base, torch.float32)
    close(there.cpu(), lte.decode(rows.cpu(), base, torch.float32), rtol=1e-6, atol=1e-7)
    step = {"fp32": 0, "bf16": 2**-8, "int8": 0.02}.get(base, 0.17)
    assert (there.cpu() - some_rows()).abs().max() <= step * some_rows().abs().max()


# ------------------------------------------------------------------------------------------------
# 4 the low-rank layer
# ------------------------------------------------------------------------------------------------


class Twin:
    """The layer as the paper writes it: every head's matrix formed, one head after the other."""

    def __init__(self, layer):
        def leaf(t):
            return None if t is None else t.detach().clone().requires_grad_()

        self.A, self.B, self.bias = leaf(layer.lora_A), leaf(layer.lora_B), leaf(layer.bias)
        self.W, self.s, self.parallel = layer.weight.clone(), layer.scaling, layer.layout.parallel
        self.A0, self.B0 = self.A.detach().clone(), torch.zeros_like(self.B)

    def parameters(self):
        return [p for p in (self.A, self.B, self.bias) if p is not None]

    def update(self, n):
        return self.s * (self.B[n] @ self.A[n] - self.B0[n] @ self.A0[n])

    def __call__(self, x):
        heads = range(len(self.A))
        if self.parallel:
            y = [x_n @ (self.W + self.update(n)).T for n, x_n in enumerate(x.chunk(len(heads)))]
            if self.bias is not None:
                y = [y_n + b_n for y_n, b_n in zip(y, self.bias, strict=True)]
            return torch.cat(y)
        y = x @ (self.W + sum(self.update(n) for n in heads) / len(heads)).T
        return y if self.bias is None else y + sum(self.bias) / len(heads)

    @torch.no_grad()
    def merge(self):
        self.W += sum(self.update(n) for n in range(len(self.A))) / len(self.A)
        self.A0, self.B0 = self.A.clone(), self.B.clone()
        if self.bias is not None:
            self.bias[:] = self.bias.mean(0)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", [R, 50])
@pytest.mark.parametrize("shape", [(N,), (N * 2,), (N * B,), (N * B, 6), (N * B, 2, 3)])
def test_the_layer_equals_its_twin_in_value_and_gradients_through_merges(parallel, bias, r, shape):
    layer = convert(nn.Linear(IN, OUT, bias).double(), r=r, parallel=parallel)
    twin = Twin(layer)
    ours = [p for p in (layer.lora_A, layer.lora_B, layer.bias) if p is not None]
    for round_ in range(3):
        for p, q in zip(ours, twin.parameters(), strict=True):
            p.data += 0.3 * torch.randn(p.shape, dtype=torch.float64)
            q.data.copy_(p)
        x = torch.randn(*shape, IN, dtype=torch.float64, requires_grad=True)
        y, expected = layer(x), twin(x)
        close(y, expected)
        close(
            torch.autograd.grad(y.tanh().square().sum(), [x, *ours]),
            torch.autograd.grad(expected.tanh().square().sum(), [x, *twin.parameters()]),
        )
        lte.merge(layer)
        twin.merge()
        close(layer.weight, twin.W)
        assert round_ or not torch.equal(layer.merged_B, torch.zeros_like(layer.merged_B))


@pytest.mark.parametrize("tokens, formed", [(3, 0), (B, 1)])
def test_the_form_with_fewer_multiply_adds_is_used(monkeypatch, tokens, formed):
    scaled, addmm = [], torch.addmm  # with s: W + s U V, formed
    count = lambda *a, **k: scaled.append("alpha" in k) or addmm(*a, **k)  # noqa: E731
    monkeypatch.setattr(torch, "addmm", count)
    convert(nn.Linear(IN, OUT).double())(torch.ones(N * tokens, IN).double())
    assert sum(scaled) == formed * N  # 4 o i / (3 o + 4 i) = 3.4 tokens


@pytest.mark.parametrize("samples", [1, B])
@pytest.mark.parametrize("parallel", [True, False])
def test_the_layers_derivatives_are_those_of_its_values(parallel, samples):
    layer = seasoned(nn.Linear(IN, OUT).double(), parallel=parallel)
    names = ("lora_A", "lora_B", "bias_copies.heads")

    def value(x, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, state, x).sin()

    parameters = [layer.get_parameter(n).detach().requires_grad_() for n in names]
    x = batch()[0][: N * samples].requires_grad_()
    assert torch.autograd.gradcheck(value, (x, *parameters))


@pytest.mark.parametrize(
    "i, o, tokens, r",
    [(64, 10, 34, 1), (128, 384, 51, 3), (17, 33, 40, 3), (128, 96, 1, 3), (61, 126, 1, 6)],
)
def test_a_heads_last_bits_do_not_depend_on_its_neighbours(i, o, tokens, r):
    """Odd sizes put a head's slice where a matrix product may round differently."""
    layer = seasoned(nn.Linear(i, o), heads=4, r=r)
    x, g = torch.randn(4 * tokens, i, requires_grad=True), torch.randn(4 * tokens, o)
    layer(x).backward(g)
    for h in range(4):
        rows, alone = slice(h * tokens, (h + 1) * tokens), convert(nn.Linear(i, o), heads=1, r=r)
        alone.rows.copy_(layer.rows)
        for name in ("lora_A", "lora_B", "merged_A", "merged_B", "bias"):
            getattr(alone, name).data.copy_(getattr(layer, name)[h : h + 1])
        x_h = x[rows].detach().clone().requires_grad_()
        y = alone(x_h)
        y.backward(g[rows].clone())
        same(y, layer(x)[rows])
        same(x_h.grad, x.grad[rows])
        for name in ("lora_A", "lora_B", "bias"):
            same(getattr(alone, name).grad[0], getattr(layer, name).grad[h])


def test_a_head_reads_and_answers_only_its_slice_of_the_batch():
    layer = seasoned(nn.Linear(IN, OUT).double())
    x, _ = batch()
    for n in range(N):
        moved = x.clone()
        moved[n * B : (n + 1) * B] += 1
        changed = (layer(moved) != layer(x)).all(1)
        assert changed.tolist() == [k == n for k in range(N) for _ in range(B)]
        layer.zero_grad()
        layer(x)[n * B : (n + 1) * B].tanh().sum().backward()
        assert [g.any().item() for g in layer.lora_B.grad] == [k == n for k in range(N)]


def test_the_scaling_is_alpha_over_r_as_given_where_r_is_cut():
    layer = convert(nn.Linear(IN, OUT), r=20, lora_alpha=40.0)
    assert (layer.r, layer.scaling) == (min(IN, OUT), 2.0)
    assert layer.lora_A.shape == (N, IN, IN) and layer.lora_B.shape == (N, OUT, IN)


@pytest.mark.parametrize("parallel", [True, False])
def test_B_starts_at_zero_and_at_least_one_factor_learns_at_once(parallel):
    layer = convert(nn.Linear(IN, OUT).double(), parallel=parallel)
    assert not layer.lora_B.any() and layer.lora_A.all()
    layer(batch()[0]).tanh().sum().backward()
    assert all(g.all() for g in layer.lora_B.grad)


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_multi_head_lora_is_the_mean_over_heads(heads):
    layer = convert(nn.Linear(IN, OUT).double(), heads=heads, parallel=False)
    learn(layer)
    (x, _), W = batch(), layer.weight
    mean = sum(ALPHA / R * B @ A for A, B in zip(layer.lora_A, layer.lora_B, strict=True)) / heads
    close(layer(x), x @ (W + mean).T + layer.bias.mean(0))


@pytest.mark.parametrize("parallel", [True, False])
def test_in_eval_the_merged_model_answers_a_batch_of_any_size(parallel):
    model = seasoned(net(), parallel=parallel).eval()
    plain, (x, _) = net(), batch()
    plain.load_state_dict(lte.merged_state_dict(model))
    for size in (1, 2, 10):
        close(model(x[:size]), plain(x[:size]))


@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4"])
def test_W_is_frozen(base):
    layer = seasoned(nn.Linear(IN, OUT), base=base)
    before = layer.rows.clone()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, weight_decay=0.1)
    layer(torch.ones(N * B, IN)).sum().backward()
    optimizer.step()
    same(layer.rows, before)
    assert not layer.weight.requires_grad
    assert sorted(n for n, _ in layer.named_parameters()) == [
        "bias_copies.heads",
        "lora_A",
        "lora_B",
    ]


def test_the_number_of_parameters_does_not_depend_on_the_base():
    counts = {
        sum(p.numel() for p in convert(vit(), base=b, bare="heads").parameters()) for b in lte.BASES
    }
    assert len(counts) == 1


@pytest.mark.parametrize("samples", [1, B])
@pytest.mark.parametrize("parallel", [True, False])
def test_bf16_autocast_computes_like_full_precision_with_full_gradients(parallel, samples):
    layer = seasoned(nn.Linear(IN, OUT), parallel=parallel)
    x = batch()[0][: N * samples].float()
    expected = layer(x)
    exact = gradients(layer, expected.tanh().sum())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        close(layer.eval()(x).float(), layer(x).float())
    close(y.float(), expected, rtol=0.02, atol=0.03)
    rough = gradients(layer, y.float().tanh().sum())
    for name, g in rough.items():
        assert g.dtype == torch.float32
        assert (g - exact[name]).norm() < 0.03 * exact[name].norm()


@pytest.mark.parametrize("samples", [1, B])
@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_the_output_has_the_type_of_a_plain_linear_layers(samples, training):
    layer = seasoned(nn.Linear(IN, OUT)).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(N * samples, IN)).dtype == torch.bfloat16


def test_under_autocast_the_weight_is_formed_in_full_precision_and_rounded_once():
    layer = seasoned(nn.Linear(64, 48, bias=False))
    with torch.autocast("cpu", torch.bfloat16):
        formed = layer(torch.eye(64).repeat(N, 1)).unflatten(0, (N, 64)).mT
    exact = torch.stack([layer.weight + delta(layer, n) for n in range(N)])
    assert ((formed.float() - exact).abs() <= 1.001 * 2**-8 * exact.abs()).all()


def test_the_weight_is_formed_in_full_precision_even_where_backward_runs_inside_autocast():
    layer, x = seasoned(nn.Linear(64, 48)), torch.randn(N * 40, 64, requires_grad=True)
    layer.lora_B.data *= 1e-3  # an update that bf16 would lose
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x).float().tanh().sum()
        inside = torch.autograd.grad(y, x, retain_graph=True)[0]
    same(inside, torch.autograd.grad(y, x)[0])


def test_a_model_cast_to_double_after_convert_computes_in_double():
    for base in lte.BASES:
        layer = seasoned(nn.Linear(IN, OUT), base=base).double()
        twin = Twin(layer)
        twin.A0, twin.B0 = layer.merged_A, layer.merged_B
        close(layer(batch()[0]), twin(batch()[0]))
        lte.merge(layer)


def test_under_autocast_gradients_are_summed_and_scaled_in_full_precision():
    layer = seasoned(nn.Linear(IN, OUT))  # s = 1.5
    x, g = torch.randn(N * 300, IN), torch.randn(N * 300, OUT).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(g)
    exact = g.float().unflatten(0, (N, -1)).sum(1)
    torch.testing.assert_close(layer.bias.grad, exact, rtol=1e-5, atol=1e-5)
    for p in (layer.lora_A, layer.lora_B):
        unscaled = p.grad / layer.scaling
        same(unscaled.bfloat16().float(), unscaled)


@pytest.mark.parametrize("samples", [1, B])
def test_backward_may_run_inside_autocast_after_a_forward_outside(samples):
    layer, x = seasoned(nn.Linear(IN, OUT)), torch.randn(N * samples, IN, requires_grad=True)
    y, inputs = layer(x).sum(), [x, *layer.parameters()]
    outside = torch.autograd.grad(y, inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        same(torch.autograd.grad(y, inputs), outside)


@pytest.mark.parametrize("samples", [20, 60])
def test_under_autocast_a_fresh_layer_rounds_as_a_plain_one_does(samples):
    plain, x = nn.Linear(64, 48), torch.randn(samples, 64)
    layer = convert(copy.deepcopy(plain), heads=1)
    with torch.autocast("cpu", torch.bfloat16):
        same(layer(x), plain(x))


def test_what_products_write_into_starts_a_cache_line():
    for o, dtype in ((10, torch.float32), (7, torch.float64)):
        x, W = torch.randn(3, 1, 5, dtype=dtype), torch.randn(o, 5, dtype=dtype)
        A, B = torch.randn(3, 2, 5, dtype=dtype), torch.randn(3, o, 2, dtype=dtype)
        y = lte.HeadProduct.apply(x, A, B, None, A, B, W, 1.0, W, "fp32")
        assert [y_n.data_ptr() % 64 for y_n in y] == [0, 0, 0]


def kept_for_backward(model, x, **autocast):
    """Bytes of activations: of what the graph holds and the model does not."""
    held = (*model.parameters(), *model.buffers())
    kept, own = {}, {tensor.untyped_storage().data_ptr() for tensor in held}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = len(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            y = model(x)
    return y, sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_a_model_keeps_no_more_activations_than_the_dense_one(base, tokens, autocast):
    torch.manual_seed(0)
    layers = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 16)
    x, dense = torch.randn(4, tokens, 32), nn.Sequential(*layers)
    _, allowed = kept_for_backward(dense, x, enabled=autocast)
    _, kept = kept_for_backward(convert(dense, heads=4, base=base), x, enabled=autocast)
    assert kept <= allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_a_model_cast_to_half_after_convert_is_refused(dtype, base):
    layer = convert(nn.Linear(IN, OUT), base=base).to(dtype)
    for samples in (1, B):
        with pytest.raises(TypeError, match=f"cast to {dtype}.*torch.autocast"):
            layer(torch.ones(N * samples, IN, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_model_is_refused_by_name(dtype):
    model = net().to(dtype)
    with pytest.raises(TypeError, match=f"0.weight is {dtype}.*autocast"):
        convert(model)
    assert type(model[0]) is nn.Linear


def test_the_layer_can_be_built_alone():
    layer = lte.MultiheadLoRALinear(IN, OUT, heads=N, r=R, lora_alpha=ALPHA).double()
    learn(layer)
    twin = Twin(layer)
    twin.A0 = layer.merged_A
    close(layer(batch()[0]), twin(batch()[0]))


@needs_gpu
@pytest.mark.parametrize("base", lte.BASES)
@pytest.mark.parametrize("parallel", [True, False])
def test_the_layer_computes_and_merges_on_the_gpu_as_on_the_cpu(base, parallel):
    here = seasoned(nn.Linear(24, 17), base=base, parallel=parallel)
    there, x = copy.deepcopy(here).cuda(), torch.randn(N * B, 24)
    for _ in range(2):
        close(there(x.cuda()).cpu(), here(x), rtol=1e-3, atol=1e-3)
        lte.merge(there)
        lte.merge(here)
        ours, theirs = lte.merged_state_dict(here), lte.merged_state_dict(there)
        close(theirs["weight"].cpu(), ours["weight"], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------
# 5 what else heads own
# ------------------------------------------------------------------------------------------------

image = torch.randn(N * B, 2, 9, 6, generator=torch.Generator().manual_seed(0)).double()
COPIED = {
    "LayerNorm": (lambda: nn.LayerNorm(6), image),
    "Embedding": (lambda: nn.Embedding(11, 6), torch.arange(N * B * 2).view(N * B, 2) % 11),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1), image),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(2), image),
    "PReLU": (lambda: nn.PReLU(), image),
}


def run_heads_in_a_loop(plain, copies, x):
    """A deep copy of the module a head, each on its own chunk."""
    heads = [copy.deepcopy(plain) for _ in range(N)]
    for n, head in enumerate(heads):
        for name, p in head.named_parameters():
            p.data.copy_(getattr(copies, name).heads[n])
    return heads, torch.cat([head(c) for head, c in zip(heads, x.chunk(N), strict=True)])


@pytest.mark.parametrize("kind", COPIED)
def test_a_copied_module_equals_a_loop_over_its_heads(kind):
    make, x = COPIED[kind]
    torch.manual_seed(0)
    plain = make().double()
    copies = learn(convert(copy.deepcopy(plain), r=None))
    heads, expected = run_heads_in_a_loop(plain, copies, x)
    y = copies(x)
    close(y, expected)
    y.tanh().square().sum().backward()
    expected.tanh().square().sum().backward()
    for name, _ in plain.named_parameters():
        grads = torch.stack([head.get_parameter(name).grad for head in heads])
        close(getattr(copies, name).heads.grad, grads)
    for name, buffer in plain.named_buffers():
        moved = torch.stack([head.get_buffer(name) for head in heads])
        ours = getattr(copies, name)
        close(ours.heads if buffer.is_floating_point() else ours, moved)


class Scaled(nn.Linear):
    """A layer of the user's own, which is copied; not every argument of it is a tensor."""

    def forward(self, x, scale=1.0, shift=None):
        y = scale * super().forward(x)
        return y if shift is None else (y, shift)


@pytest.mark.parametrize("parallel", [True, False])
def test_a_copied_modules_arguments_and_results_may_be_of_any_kind(parallel):
    plain, (x, _) = Scaled(IN, OUT).double(), batch()
    copies = convert(copy.deepcopy(plain), r=None, parallel=parallel)
    close(copies(x, 2.0, shift=None), plain(x, 2.0))
    y, shift = copies(x, scale=3.0, shift=x)
    close(y, plain(x, 3.0))
    same(shift, x)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_the_states_of_a_recurrent_layer_have_the_batch_second_and_are_split_there(make):
    torch.manual_seed(0)
    plain = make(IN, OUT, num_layers=2, batch_first=True).double()
    copies = learn(convert(copy.deepcopy(plain), r=None))
    x = torch.randn(N * B, 6, IN, dtype=torch.float64)
    state = torch.randn(2, N * B, OUT, dtype=torch.float64)
    state = (state, state.sin()) if make is nn.LSTM else state
    outputs = []
    for n in range(N):
        head = copy.deepcopy(plain)
        for name, p in head.named_parameters():
            p.data.copy_(getattr(copies, name).heads[n])
        own = slice(n * B, (n + 1) * B)
        outputs.append(tree_leaves(head(x[own], tree_map(lambda h, own=own: h[:, own], state))))
    y, *states = zip(*outputs, strict=True)
    expected = [torch.cat(y), *(torch.cat(h, 1) for h in states)]
    close(tree_leaves(copies(x, state)), expected)
    assert copies(x)[1][0].shape == plain(x)[1][0].shape


def test_a_merge_averages_parameters_and_float_buffers_and_keeps_the_counter():
    copies = learn(convert(nn.BatchNorm2d(2).double(), r=None))
    for _ in range(5):
        copies(image)
    means = {name: getattr(copies, name).heads.mean(0) for name in copies._modules}
    lte.merge(copies)
    merged = lte.merged_state_dict(copies)
    assert merged.pop("num_batches_tracked").item() == 5
    close(merged, means)
    for name in means:
        same(getattr(copies, name).heads, merged[name].expand(N, *merged[name].shape))


@pytest.mark.parametrize("kind", COPIED)
def test_multi_head_lora_runs_a_copied_module_once_with_the_mean_of_the_copies(kind):
    make, x = COPIED[kind]
    torch.manual_seed(0)
    plain = make().double()
    copies = learn(convert(copy.deepcopy(plain), r=None, parallel=False))
    for name, p in plain.named_parameters():
        p.data.copy_(getattr(copies, name).heads.mean(0))
    for _ in range(2):
        close(copies(x), plain(x))
    lte.merge(copies)
    close(lte.merged_state_dict(copies), dict(plain.state_dict()))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kernel", [2, 4, (3, 2), 1])
@pytest.mark.parametrize("bias", [True, False])
def test_a_patch_convolution_is_a_linear_layer_on_the_patches(channels, kernel, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, OUT, kernel, stride=kernel, bias=bias).double()
    ours = convert(copy.deepcopy(conv))
    assert isinstance(ours, lte.PatchConv)
    learn(ours)
    lte.merge(ours)
    conv.load_state_dict(lte.merged_state_dict(ours))
    x = torch.randn(2 * N, channels, 9, 14, dtype=torch.float64, requires_grad=True)
    y, expected = ours(x), conv(x)  # a batch of 9 x 14 fills no whole patches
    close(y, expected)
    close(ours.eval()(x[:1]), expected[:1])
    close(*(torch.autograd.grad(z.sin().sum(), x)[0] for z in (y, expected)))


def test_a_patch_convolutions_heads_learn_the_gradient_of_its_kernel():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, OUT, (3, 2), stride=(3, 2)).double()
    ours = convert(copy.deepcopy(conv))
    ours(image).sin().sum().backward()
    for n, x in enumerate(image.chunk(N)):
        conv.zero_grad()
        conv(x).sin().sum().backward()
        G = conv.weight.grad.flatten(1)  # dL/dB = s G A'
        close(ours.lora_B.grad[n], ours.scaling * G @ ours.lora_A[n].T)
        close(ours.bias.grad[n], conv.bias.grad)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(2, 4, 3),
        nn.Conv2d(2, 4, 2, stride=2, padding=1),
        nn.Conv2d(2, 4, 2, stride=2, dilation=2),
        nn.Conv2d(2, 4, 2, stride=2, groups=2),
    ],
)
def test_other_convolutions_are_copied(conv):
    plain = copy.deepcopy(conv).double()
    model = convert(nn.Sequential(conv.double(), nn.Conv2d(4, 3, 1).double()))
    close(model[0](image), plain(image))
    assert isinstance(model[0], lte.PerHead)


WIDTH, TOKENS, MEMORY = 6, 5, 7


def attention_masks():
    """name -> mask arguments, as nn.MultiheadAttention takes them; query 5 tokens, memory 7."""
    g = torch.Generator().manual_seed(0)
    late = torch.triu(torch.ones(TOKENS, MEMORY, dtype=torch.bool), 3)
    added = torch.randn(TOKENS, MEMORY, generator=g).double()
    pad = torch.zeros(N * B, MEMORY, dtype=torch.bool)
    pad[:, 5:], pad[0] = torch.rand(N * B, 2, generator=g) < 0.5, torch.arange(MEMORY) > 2
    each = torch.rand(N * B * 2, TOKENS, MEMORY, generator=g) < 0.3
    each[..., 0] = False
    return {
        "none": {},
        "bool": {"attn_mask": late},
        "float": {"attn_mask": added},
        "per head": {"attn_mask": each},
        "padding": {"key_padding_mask": pad},
        "float padding": {"key_padding_mask": torch.zeros_like(pad).double() - pad.double()},
        "both": {"attn_mask": late, "key_padding_mask": pad},
        "added and padding": {
            "attn_mask": added,
            "key_padding_mask": torch.zeros_like(added[0]).masked_fill(pad, -math.inf),
        },
    }


def attention(batch_first=True, **options):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first, **options).double()
    for name, p in plain.named_parameters():  # torch starts biases at zero
        if name.endswith("bias"):
            nn.init.normal_(p)
    return plain


def tokens(length, width=WIDTH, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N * B, length, width, generator=g).double()


@pytest.mark.parametrize(
    "weights", [dict(need_weights=False), {}, dict(average_attn_weights=False)]
)
@pytest.mark.parametrize("mask", attention_masks())
def test_attention_with_any_mask_equals_pytorchs(weights, mask):
    plain = attention()
    ours = convert(copy.deepcopy(plain))
    query, memory = tokens(TOKENS), tokens(MEMORY, seed=1)
    arguments = (query, memory, memory)
    options = attention_masks()[mask] | weights
    for _ in range(2):
        y, w = ours(*arguments, **options)
        expected, expected_w = plain(*arguments, **options)
        close(y, expected)
        close(w, expected_w) if weights != dict(need_weights=False) else None
        ours.eval(), plain.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kdim, vdim", [(None, None), (3, 4)])
@pytest.mark.parametrize("inputs", ["same", "memory", "three"])
def test_attention_after_merges_equals_pytorchs_with_the_export(bias, kdim, vdim, inputs):
    plain = attention(bias=bias, kdim=kdim, vdim=vdim)
    ours = learn(convert(copy.deepcopy(plain)))
    lte.merge(ours)
    plain.load_state_dict(lte.merged_state_dict(ours))
    query = tokens(MEMORY)
    key, value = tokens(MEMORY, kdim or WIDTH, 1), tokens(MEMORY, vdim or WIDTH, 2)
    if kdim is None:
        key, value = {"same": (query, query), "memory": (key, key), "three": (key, value)}[inputs]
    close(ours(query, key, value), plain(query, key, value))
    close(ours.eval()(query, key, value), plain.eval()(query, key, value))


@pytest.mark.parametrize("kdim", [None, 3])
def test_every_parameter_of_attention_has_an_owner_that_learns(kdim):
    plain = attention(kdim=kdim)
    sizes = {name: p.numel() for name, p in plain.named_parameters()}
    ours = convert(plain)
    owners = lte.census(ours)
    assert owners["low-rank"] | owners["copies"] == sizes and not owners["frozen"]
    learn(ours)
    ours(tokens(5), tokens(5, kdim or WIDTH), tokens(5))[0].tanh().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in ours.parameters())


def test_a_causal_hint_without_a_mask_is_refused_as_pytorch_does():
    with pytest.raises(ValueError, match="give attn_mask as well"):
        convert(attention())(tokens(5), tokens(5), tokens(5), is_causal=True)


def test_attention_over_one_unbatched_sequence_is_refused():
    x = tokens(5)[0]
    with pytest.raises(ValueError, match="2-d input: heads need a batch"):
        convert(attention())(x, x, x)


@pytest.mark.parametrize(
    "options, remedy",
    [
        (dict(dropout=0.1), "build it without them"),
        (dict(add_bias_kv=True), "build it without them"),
        (dict(add_zero_attn=True), "build it without them"),
    ],
)
def test_attention_that_cannot_be_converted_is_refused_by_name(options, remedy):
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"attend": attention(**options)}))
    with pytest.raises(ValueError, match=f"1.attend: attention with .* {remedy}"):
        convert(model)


@pytest.mark.parametrize("module", [attention(batch_first=False), nn.LSTM(2, 2), nn.GRU(2, 2)])
def test_what_has_time_first_is_refused_since_heads_would_split_it(module):
    sentence = f"1: {type(module).__name__} with batch_first=False.* build it with batch_first=True"
    with pytest.raises(ValueError, match=sentence):
        convert(nn.Sequential(nn.Linear(2, 2), module))


def test_a_mask_of_minus_infinity_and_a_buffer_of_nothing_are_kept_and_stop_no_merge():
    class Mask(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((IN, IN), -math.inf).triu(1).double())
            self.register_buffer("nothing", torch.empty(0))

        def forward(self, x):
            return (x.unsqueeze(1) + self.mask).softmax(-1).mean(1)

    plain = nn.Sequential(Mask(), *net())
    model = convert(copy.deepcopy(plain))
    lte.merge(learn(model))
    same(lte.merged_state_dict(model)["0.mask"], plain[0].mask)
    plain.load_state_dict(lte.merged_state_dict(model))
    close(model.eval()(batch()[0]), plain(batch()[0]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first, nested", [(True, False), (False, False), (False, True)])
def test_pytorchs_transformer_encoder_converts(norm_first, nested):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, 10, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).double()
    ours = convert(copy.deepcopy(plain))
    padding = torch.arange(5).expand(N * B, 5) >= 4
    for training in (True, False):
        for options in ({}, {"src_key_padding_mask": padding}):
            with torch.set_grad_enabled(training):
                y, expected = (m.train(training)(tokens(5), **options) for m in (ours, plain))
            close(y[:, :4], expected[:, :4])


def test_torchvisions_vision_transformer_keeps_its_logits_and_returns():
    plain, x = vit(), torch.randn(N * B, 3, 8, 8).double()
    expected = plain.state_dict()
    model = convert(vit(), bare="heads")
    close(model(x), plain(x))
    learn(model)
    lte.merge(model)
    exported = lte.merged_state_dict(model)
    assert list(exported) == list(expected)
    plain.load_state_dict(exported)
    close(model(x), plain(x))
    close(model.eval()(x[:5]), plain.eval()(x[:5]))


def test_every_parameter_of_a_vision_transformer_learns():
    model = learn(convert(vit(), bare="heads"))
    x = torch.randn(N * B, 3, 8, 8).double()
    F.cross_entropy(model(x), torch.arange(N * B) % 10, reduction="sum").backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def dropped(heads, calls=2, **options):
    model = convert(nn.Sequential(nn.Dropout(0.3), nn.Linear(2, 2)), heads=heads, **options)
    return [model[0](torch.ones(heads * B, 50)) for _ in range(calls)]


def test_dropout_masks_differ_between_heads_calls_layers_and_seeds():
    masks = [m for y in dropped(N) for m in y.chunk(N)] + [*dropped(N, 1, seed=1)[0].chunk(N)]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_dropout_is_reproducible_and_keeps_the_mean():
    torch.manual_seed(1)
    y = torch.stack(dropped(N, 50))
    torch.manual_seed(2)
    same(torch.stack(dropped(N, 50)), y)
    close(y.unique(), torch.tensor([0, 1 / 0.7]), rtol=1e-6)
    close(y.mean().item(), 1.0, rtol=0.02)


def test_a_heads_dropout_mask_does_not_depend_on_the_number_of_heads():
    same(dropped(2)[1], dropped(N)[1][: 2 * B])


def test_dropout_in_eval_does_nothing_and_its_gradient_follows_the_mask():
    model = convert(nn.Sequential(nn.Dropout(0.3), nn.Linear(5, 2)))
    x = torch.ones(N * B, 50, requires_grad=True)
    same(model.eval()[0](x), x)
    y = model.train()[0](x)
    y.sum().backward()
    same(x.grad, y.detach())


def test_one_dropout_used_twice_is_replaced_in_both_places():
    drop = nn.Dropout(0.3)
    model = convert(nn.Sequential(drop, nn.Linear(5, 5), drop))
    assert isinstance(model[0], lte.HeadDropout) and isinstance(model[2], lte.HeadDropout)


@pytest.mark.parametrize("kind", [nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout])
def test_other_dropout_is_refused(kind):
    with pytest.raises(ValueError, match="1: .*Dropout.* draws from the process's generator"):
        convert(nn.Sequential(nn.Linear(2, 2), kind(0.1)))


class Token(nn.Module):
    """A class token of its own before a layer, as in many a ViT."""

    def __init__(self, rows=1):
        super().__init__()
        self.token = nn.Parameter(torch.randn(rows, 1, IN))
        self.layer = nn.Linear(IN, OUT)

    def forward(self, x):
        return self.layer(torch.cat([self.token.expand(len(x), -1, -1), x[:, None]], 1))


def test_each_head_has_its_own_class_token():
    model = convert(Token().double(), bare="heads")
    heads, (x, _) = model.lte_copies["token"].heads, batch()
    before = model(x)
    heads.data[1] += 1
    changed = (model(x) != before).any(-1).any(-1)
    assert changed.tolist() == [n == 1 for n in range(N) for _ in range(B)]
    model(x)[:B].sum().backward()
    assert [g.any().item() for g in heads.grad] == [True, False, False]


@pytest.mark.parametrize("parallel", [True, False])
def test_the_class_token_is_averaged_and_in_eval_the_merged_one_is_used(parallel):
    plain, model = Token().double(), convert(Token().double(), bare="heads", parallel=parallel)
    learn(model)
    mean = model.lte_copies["token"].heads.mean(0)
    lte.merge(model)
    plain.load_state_dict(lte.merged_state_dict(model))
    close(plain.token, mean)
    close(model(batch()[0]), plain(batch()[0]))
    close(model.eval()(batch()[0][:5]), plain(batch()[0][:5]))
    assert not hasattr(model, "token"), "the token is only lent during a call"


def test_bare_parameters_are_refused_frozen_or_copied_as_asked():
    with pytest.raises(ValueError, match=r"token \(1, 1, 5\) belongs to no leaf.*bare='freeze'"):
        convert(Token())
    frozen = convert(Token(), bare="freeze")
    assert [n for n, p in frozen.named_parameters() if not p.requires_grad] == ["token"]
    assert lte.census(frozen)["frozen"] == {"token": IN}
    assert lte.census(convert(Token(), bare="heads"))["copies"]["token"] == IN
    with pytest.raises(ValueError, match=r"token \(2, 1, 5\): bare='heads' needs shape"):
        convert(Token(rows=2), bare="heads")


# ------------------------------------------------------------------------------------------------
# 6 convert
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", lte.BASES)
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_conversion_changes_nothing_but_the_rounding_of_W(base, parallel, training):
    plain, (x, _) = net().float().train(training), batch()
    model = convert(net().float().train(training), base=base, parallel=parallel)
    error = {"fp32": 0, "bf16": 0.02, "int8": 0.05}.get(base, 0.5)
    close(model(x.float()), plain(x.float()), rtol=1e-5, atol=1e-6 + error)
    if base != "fp32":
        plain[0].weight.data, plain[3].weight.data = model[0].weight, model[3].weight
        close(model(x.float()), plain(x.float()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_a_converted_model_is_in_the_mode_its_plain_one_was_in(training):
    model = convert(nn.Sequential(vit(0.1), Token()).train(training), bare="heads")
    assert {m.training for m in model.modules()} == {training}


def test_each_parameter_has_one_owner_and_the_counts_add_up():
    model = nn.Sequential(vit(), nn.Linear(10, 4), nn.BatchNorm1d(4))
    model[1].requires_grad_(False)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    owners = lte.census(convert(model, bare="heads", skip=["0.encoder.layers.encoder_layer_1"]))
    everyone = [name for owner in owners.values() for name in owner]
    assert sorted(everyone) == sorted(sizes) and all(owners.values())
    assert functools.reduce(lambda a, b: a | b, owners.values()) == sizes
    assert owners["frozen"].keys() >= {"1.weight", "1.bias"}


def test_what_its_author_froze_stays_frozen():
    model = net()
    model[1].bias.requires_grad_(False)
    model[3].weight.requires_grad_(False)
    model = convert(model)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.5)
    step(model, optimizer, *batch())
    lte.merge(model)
    merged, start = lte.merged_state_dict(model), net().state_dict()
    assert [n for n in start if torch.equal(merged[n], start[n])] == ["1.bias", "3.weight"]
    assert lte.census(model)["frozen"].keys() == {"1.bias", "3.weight"}


def test_a_frozen_batchnorm_still_gathers_statistics_for_each_head():
    model = nn.Sequential(nn.Linear(IN, OUT), nn.BatchNorm1d(OUT).requires_grad_(False)).double()
    model = convert(model)
    x, _ = batch()
    answer = model(x)
    x[B : 2 * B] += 1  # head 1's samples are no business of head 0 and 2
    others = [*range(B), *range(2 * B, 3 * B)]
    same(model(x)[others], answer[others])


def test_two_converted_parts_are_not_one_model():
    model = nn.Sequential(convert(nn.Linear(IN, OUT)), convert(nn.Linear(OUT, IN)))
    with pytest.raises(ValueError, match="2 separately converted parts; convert the whole once"):
        lte.merge(model)


def test_what_is_skipped_stays_dense_and_frozen():
    model = convert(net(), skip=["0", "1"])
    assert type(model[0]) is nn.Linear and type(model[1]) is nn.LayerNorm
    step(model, torch.optim.SGD(model.parameters(), 0.5), *batch())
    lte.merge(model)
    merged, start = lte.merged_state_dict(model), net().state_dict()
    changed = [name for name in start if not torch.equal(merged[name], start[name])]
    assert changed == ["3.weight", "3.bias"]


@pytest.mark.parametrize("base", lte.BASES)
def test_pretrained_weights_lead_back_bit_for_bit(base):
    pretrained = nn.Sequential(vit(dtype=torch.float32), nn.BatchNorm1d(10), nn.Embedding(4, 3))
    before = snapshot(pretrained)
    exported = lte.merged_state_dict(convert(pretrained, base=base, bare="heads"))
    assert list(exported) == list(before)
    same(exported, before)


@pytest.mark.parametrize("base", lte.BASES)
def test_a_plain_model_with_the_rounded_W_computes_what_heads_do_right_after_a_merge(base):
    model, (x, _) = seasoned(net(), base=base), batch()
    lte.merge(model)
    exported = lte.merged_state_dict(model, exact=False)
    before, plain = model(x).clone(), net()
    plain.load_state_dict(exported)
    close(plain(x), before)
    for tensor in exported.values():  # its own: the model does not notice what becomes of it
        tensor.zero_()
    same(model(x), before)


def test_a_dense_weight_is_let_go_when_its_layer_is_made(monkeypatch):
    model = nn.Sequential(*(nn.Linear(IN, IN) for _ in range(4)))
    weights, alive, build = [weakref.ref(layer.weight) for layer in model], [], lte.build

    def counted(*args):
        alive.append(sum(ref() is not None for ref in weights))
        return build(*args)

    monkeypatch.setattr(lte, "build", counted)
    convert(model)
    assert alive == [4, 4, 3, 2, 1]  # the root first, which stays


def test_the_root_may_be_the_only_layer():
    layer = convert(nn.Linear(IN, OUT))
    assert isinstance(layer, lte.MultiheadLoRALinear)
    assert list(lte.merged_state_dict(layer)) == ["weight", "bias"]


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.gate = nn.Linear(4, 4), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.l(x) * self.gate


def batch_norm(times=1):
    norm = nn.BatchNorm1d(OUT, affine=False)
    return nn.Sequential(nn.Linear(IN, OUT), *[norm] * times)


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    "make, options, sentence",
    [
        (lambda: convert(net()), {}, "converted already"),
        (tied, {}, "0.weight and 1.weight are one tied parameter"),
        (lambda: nn.Sequential(nn.LayerNorm(3)), {}, "nothing to convert"),
        (lambda: nn.Sequential(nn.ReLU()), {}, "nothing to convert"),
        (net, {"skip": ["0", "3"]}, "nothing to convert"),
        (net, {"skip": ["7"]}, r"skip names no module: \['7'\]"),
        (lambda: batch_norm(2), {}, "1 and 2 are one module with buffers"),
        (batch_norm, {"skip": ["1"]}, "skip='1' holds 1, BatchNorm1d"),
        (net, {"base": "int4"}, "base='int4' is not known; choose one of fp32, bf16, int8"),
        (net, {"init": "zeros"}, "init='zeros' is not known; choose one of orthogonal"),
        (vit, {"bare": "copy"}, "bare='copy' is not known; choose one of error, freeze, heads"),
        (vit, {}, r"class_token \(1, 1, 12\) belongs to no leaf module"),
        (net, {"r": 0}, "r=0.*r must be an integer from 1 on"),
        (net, {"lora_alpha": None}, "lora_alpha=None.*lora_alpha above 0"),
        (net, {"heads": 0}, "heads=0: at least one"),
        (net, {"heads": 2.0}, "heads=2.0: at least one head is needed, an integer"),
        (Gate, {"bare": "heads"}, "bare='heads' needs shape"),
    ],
)
def test_what_cannot_be_converted_is_refused_before_any_change(make, options, sentence):
    model = make()
    before, modules = snapshot(model), dict(model.named_modules())
    with pytest.raises(ValueError, match=sentence):
        convert(model, **options)
    same(snapshot(model), before)
    assert dict(model.named_modules()) == modules
    if make is net:
        assert all(p.requires_grad for p in model.parameters())


PARAMETRIZED = {
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_a_frozen_parametrization_gets_its_weight_whole(kind):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(IN, 6), PARAMETRIZED[kind](nn.Linear(6, 6))).double()

    plain, model, x = make(), learn(convert(make(), bare="freeze")), batch()[0]
    lte.merge(model)
    plain.load_state_dict(lte.merged_state_dict(model))
    close(model(x), plain(x))
    with pytest.raises(ValueError, match="belongs to no leaf module"):
        convert(make())
    with pytest.raises(ValueError, match="bare='heads' needs shape"):
        convert(make(), bare="heads")


@pytest.mark.parametrize("affine", [True, False])
def test_a_batchnorm_without_tensors_to_learn_takes_each_heads_own_statistics(affine):
    norm = nn.BatchNorm1d(OUT, affine=affine, track_running_stats=False).requires_grad_(False)
    model, (x, _) = seasoned(nn.Sequential(nn.Linear(IN, OUT), norm).double()), batch()
    before = model(x)[:B].clone()
    x[B:] += 10
    close(model(x)[:B], before)


def test_an_attention_of_ones_own_class_is_refused():
    class Scaled(nn.MultiheadAttention):
        def forward(self, *args, **options):
            y, weights = super().forward(*args, **options)
            return 10 * y, weights

    with pytest.raises(ValueError, match="a class of its own cannot be converted"):
        convert(nn.Sequential(Scaled(4, 2, batch_first=True)), bare="freeze")


@pytest.mark.parametrize("name", ["prefix", "layout", "code", "split", "keys", "values", "lend"])
@pytest.mark.parametrize("owner", ["leaf", "bare"])
def test_a_parameter_may_have_any_name(owner, name):
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.randn(1, 1, IN)))
            if owner == "bare":
                self.child = nn.Identity()

        def forward(self, x):
            return (x.unsqueeze(1) + getattr(self, name)).squeeze(1)

    plain = nn.Sequential(Owner(), *net()).double()
    model, x = learn(convert(copy.deepcopy(plain), bare="heads")), batch()[0]
    lte.merge(model)
    plain.load_state_dict(lte.merged_state_dict(model))
    close(model(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_buffer_of_another_type_is_kept_for_each_head(dtype, parallel):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(IN, dtype=dtype))

        def forward(self, x):
            return x * self.table.real.to(x.dtype)

    model = convert(nn.Sequential(Table(), *net()), parallel=parallel)
    model(batch()[0])
    lte.merge(learn(model))
    same(lte.merged_state_dict(model)["0.table"], torch.ones(IN, dtype=dtype))


WRAPS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "buffer": lambda m: m.register_buffer("mask", torch.ones(3)) or m,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("kind", WRAPS)
def test_a_layer_with_tensors_beside_weight_and_bias_is_copied(kind):
    def make():
        torch.manual_seed(0)
        wrapped = WRAPS[kind](nn.Linear(OUT, OUT))
        return nn.Sequential(nn.Linear(IN, OUT), wrapped).double()

    plain, model, x = make().eval(), convert(make()).eval(), batch()[0]
    close(model(x), plain(x))
    optimizer = torch.optim.SGD(model.train().parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    lte.merge(model)
    plain.load_state_dict(lte.merged_state_dict(model))
    close(model.eval()(x), plain.eval()(x))


def test_a_compiled_model_may_be_converted_and_exports_what_is_frozen_too():
    model = torch.compile(net(), backend="eager")
    names = list(model.state_dict())
    model = convert(model, skip=["_orig_mod.0"])
    model(batch()[0])
    assert list(lte.merged_state_dict(model)) == names


# ------------------------------------------------------------------------------------------------
# 7 merge
# ------------------------------------------------------------------------------------------------


def test_a_merge_adds_the_mean_of_products_not_the_product_of_means():
    layer = convert(nn.Linear(IN, OUT).double(), heads=4)
    W = layer.exact()
    learn(layer, size=1.0)
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    mean = sum(ALPHA / R * b @ a for a, b in zip(A, B, strict=True)) / 4
    assert (ALPHA / R * B.mean(0) @ A.mean(0) - mean).norm() > 0.5 * mean.norm()
    lte.merge(layer)
    close(layer.exact(), W + mean)


RESETS = ("none", "B", "AB")


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("base", ["fp32", "nf4"])
@pytest.mark.parametrize("parallel", [True, False])
def test_after_a_merge_every_head_computes_the_same_function(reset, base, parallel):
    model = convert(net(), base=base, parallel=parallel)
    optimizer, (x, _) = torch.optim.Adam(model.parameters()), batch()
    for seed in range(2):
        learn(model, seed)
        if parallel:
            outputs = model(x[:B].repeat(N, 1)).chunk(N)
            assert (outputs[0] - outputs[1]).abs().max() > 1e-2, "heads that agree test nothing"
        lte.merge(model, optimizer=optimizer, reset=reset)
        close(model.train()(x), model.eval()(x))
        model.train()


@pytest.mark.parametrize("base", lte.BASES)
def test_merging_twice_changes_nothing(base):
    model = seasoned(net().float(), base=base)
    lte.merge(model)
    before = snapshot(model)
    lte.merge(model)
    same(snapshot(model), before)


def test_merges_without_reset_telescope():
    layer = convert(nn.Linear(IN, OUT).double())
    W = layer.exact()
    for seed in range(4):
        learn(layer, seed)
        lte.merge(layer)
    close(layer.exact(), W + layer.scaling * (layer.lora_B @ layer.lora_A).mean(0))


@pytest.mark.parametrize("merge_every", [1, 2])
def test_with_one_head_merging_is_invisible_to_training(merge_every):
    merging, never = convert(net(), heads=1), convert(net(), heads=1)
    optimizers = [torch.optim.AdamW(m.parameters(), 0.05) for m in (merging, never)]
    for k in range(6):
        x, y = batch(1, seed=k)
        step(merging, optimizers[0], x, y)
        step(never, optimizers[1], x, y)
        if k % merge_every == 0:
            lte.merge(merging)
        close(merging(x), never(x), rtol=1e-8)


@pytest.mark.parametrize("heads", [1, 4, 16])
def test_more_heads_bring_the_first_merged_step_closer_to_the_gradient(heads):
    """With SGD at B = 0 it is the mean of G A_n^T A_n, each a projection times d / r; so its cosine
    to G is 1 / sqrt(1 + (d / r - 1) / N): for one head sqrt(r / d), and 1 for many.
    """
    d, r = 64, 8
    layer = convert(nn.Linear(d, d, bias=False).double(), heads=heads, r=r, lora_alpha=r)
    W, G = layer.weight.clone(), torch.randn(d, d, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    x, g = torch.eye(d, dtype=torch.float64).repeat(heads, 1), G.mT.repeat(heads, 1)
    (layer(x) * g).sum().backward()  # every head's dL/dW is G
    optimizer.step()
    lte.merge(layer)
    cosine = F.cosine_similarity((W - layer.weight).flatten(), G.flatten(), dim=0).item()
    assert cosine == pytest.approx((1 + (d / r - 1) / heads) ** -0.5, rel=0.05)


def test_a_rounds_update_has_rank_r_a_head_and_N_r_merged_and_twice_that_later():
    layer = convert(nn.Linear(19, 23).double())
    rank = functools.partial(torch.linalg.matrix_rank, rtol=1e-9)
    W = [layer.exact()]
    for seed, twice in ((1, 1), (2, 2)):
        learn(layer, seed)
        assert [rank(delta(layer, n)).item() for n in range(N)] == [twice * R] * N
        lte.merge(layer)
        W.append(layer.exact())
        assert rank(W[-1] - W[-2]) == twice * N * R
    assert rank(W[2] - W[0]) == N * R, "without reset the total telescopes"


@pytest.mark.parametrize("reset", ["B", "AB"])
def test_with_reset_every_round_adds_its_own_rank(reset):
    layer = convert(nn.Linear(19, 23).double())
    optimizer, W = torch.optim.SGD(layer.parameters()), layer.exact()
    for seed in (1, 2):
        learn(layer, seed)
        lte.merge(layer, optimizer=optimizer, reset=reset)
    assert torch.linalg.matrix_rank(layer.exact() - W, rtol=1e-9) == 2 * N * R


@pytest.mark.parametrize("adam", [True, False])
def test_merging_every_step_on_the_same_batch_is_multi_head_lora(adam):
    one, many = convert(net(), parallel=False), convert(net())
    if adam:
        rates = 0.01, 0.01
        make = functools.partial(torch.optim.Adam, eps=1e-30)
    else:  # the gradient of one head is 1 / N in multi-head LoRA
        rates, make = (N * 0.05, 0.05), torch.optim.SGD
    optimizers = [make(m.parameters(), lr) for m, lr in zip((one, many), rates, strict=True)]
    for k in range(5):
        x, y = batch(1, seed=k)
        step(one, optimizers[0], x, y)
        step(many, optimizers[1], x.repeat(N, 1), y.repeat(N))
        lte.merge(many)
        merged = copy.deepcopy(one)
        lte.merge(merged)
        close(lte.merged_state_dict(many), lte.merged_state_dict(merged), rtol=1e-7, atol=1e-9)


def local_sgd(model, batches, rate, rounds):
    """N dense copies, T steps alone on their chunks, then averaged."""
    for steps in rounds:
        heads = [copy.deepcopy(model) for _ in range(N)]
        for x, y in (next(batches) for _ in range(steps)):
            for head, x_n, y_n in zip(heads, x.chunk(N), y.chunk(N), strict=True):
                head.zero_grad()
                F.cross_entropy(head(x_n), y_n).backward()
                for p in head.parameters():
                    p.data -= rate * p.grad
        states = [head.state_dict() for head in heads]
        model.load_state_dict({k: sum(s[k] for s in states) / N for k in states[0]})
    return model.state_dict()


@pytest.mark.parametrize("how", ["A = I", "r = None"])
@pytest.mark.parametrize("T", [1, 3])
def test_with_A_the_identity_or_no_factors_it_is_local_sgd(how, T):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.LayerNorm(OUT)).double()
    r = IN if how == "A = I" else None
    model = convert(copy.deepcopy(plain), r=r, lora_alpha=IN)
    if r:
        for A in (model[0].lora_A.requires_grad_(False), model[0].merged_A):
            A.copy_(torch.eye(IN))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
    for k in range(2 * T):
        step(model, optimizer, *batch(seed=k))
        if (k + 1) % T == 0:
            lte.merge(model)
    expected = local_sgd(plain, (batch(seed=k) for k in range(2 * T)), 0.1, [T, T])
    close(lte.merged_state_dict(model), expected)


def trained(steps=4, **options):
    model = convert(net(), **options)
    optimizer = torch.optim.Adam(model.parameters(), 0.01, eps=1e-30)
    for k in range(steps):
        step(model, optimizer, *batch(seed=k))
    return model, optimizer


@pytest.mark.parametrize("reset", ["B", "AB"])
def test_the_first_update_after_a_reset_has_the_size_of_the_rate(reset):
    model, optimizer = trained()
    lte.merge(model, optimizer=optimizer, reset=reset)
    for layer in (model[0], model[3]):
        assert not layer.lora_B.any()
    step(model, optimizer, *batch(seed=9))
    for layer in (model[0], model[3]):
        close(layer.lora_B.abs(), torch.full_like(layer.lora_B, 0.01), rtol=1e-6)


@pytest.mark.parametrize("reset", RESETS)
def test_a_reset_clears_the_whole_state_of_what_it_resets_and_no_other(reset):
    model, optimizer = trained()
    parameters = list(model.parameters())
    kept = {id(p): copy.deepcopy(s) for p, s in optimizer.state.items()}
    factors = [f for layer in (model[0], model[3]) for f in (layer.lora_A, layer.lora_B)]
    cleared = {"none": [], "B": factors[1::2], "AB": factors}[reset]
    lte.merge(model, optimizer=optimizer, reset=reset)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    for p in parameters:
        if any(p is f for f in cleared):
            assert p not in optimizer.state
        else:
            same(optimizer.state[p], kept[id(p)])


def test_a_reset_keeps_A_or_draws_one_that_depends_only_on_seed_merge_head_and_layer():
    model, optimizer = trained()
    A = model[0].lora_A.detach().clone()
    lte.merge(model, optimizer=optimizer, reset="B")
    same(model[0].lora_A, A)
    lte.merge(model, optimizer=optimizer, reset="AB")
    other, optimizer = trained(1)
    lte.merge(other)
    torch.manual_seed(9)
    lte.merge(other, optimizer=optimizer, reset="AB")
    same(other[0].lora_A, model[0].lora_A)
    A = other[0].lora_A.detach()
    close(A @ A.mT, IN / R * torch.eye(R).double().expand(N, R, R), atol=1e-9)
    drawn = [*convert(net())[0].lora_A, *model[0].lora_A]
    lte.merge(other, optimizer=optimizer, reset="AB")
    drawn += other[0].lora_A
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_what_is_merged_is_not_aliased_to_the_live_factors():
    model = seasoned(net())
    lte.merge(model)
    merged = [b.clone() for n, b in model.named_buffers()]
    learn(model)
    same([b for n, b in model.named_buffers()], merged)


def test_decay_multiplies_W_and_nothing_else():
    model = convert(net())
    start = lte.merged_state_dict(model)
    lte.merge(model, decay=0.9)
    factor = {name: 0.9 if name in ("0.weight", "3.weight") else 1.0 for name in start}
    close(lte.merged_state_dict(model), {name: factor[name] * start[name] for name in start})


def test_decay_comes_before_what_is_added():
    layer = convert(nn.Linear(IN, OUT).double())
    W = layer.exact()
    learn(layer)
    mean = layer.scaling * (layer.lora_B @ layer.lora_A).mean(0)
    lte.merge(layer, decay=0.5)
    close(layer.exact(), 0.5 * W + mean)


def test_a_merge_inside_autocast_is_in_full_precision():
    inside, outside = (seasoned(net().float()) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        lte.merge(inside)
    lte.merge(outside)
    same(snapshot(inside), snapshot(outside))


@pytest.mark.parametrize("base", ["fp32", "int8", "nf4", "fp4"])
def test_evaluating_before_a_merge_disturbs_neither_it_nor_training(base):
    looked, x = seasoned(nn.Linear(96, 64), base=base), torch.randn(N * B, 96)
    alone = copy.deepcopy(looked)
    with torch.no_grad():
        looked.eval()(x)
    looked.train()
    for model in (looked, alone):
        lte.merge(model)
    same(snapshot(looked), snapshot(alone))
    same(looked(x), alone(x))
    same(looked.eval()(x), alone.eval()(x))


def test_how_tensors_are_grouped_into_messages_does_not_matter(monkeypatch):
    one, many = seasoned(net()), seasoned(net())
    lte.merge(one)
    monkeypatch.setattr(lte, "BUCKET", 2200)  # two of these tensors fill half of it
    assert [len(group) for group in lte.buckets(lte.merged_tensors(many))] == [2, 2, 2]
    lte.merge(many)
    same(snapshot(many), snapshot(one))


@pytest.mark.parametrize(
    "reset, optimizer, sentence",
    [
        ("A", None, "reset='A' is not known; choose one of none, B, AB"),
        ("B", None, r"reset='B' needs optimizer="),
        ("AB", torch.optim.SGD(net().parameters(), 0.1), "does not hold the factors of 0.weight"),
    ],
)
def test_a_merge_that_is_refused_changes_nothing(reset, optimizer, sentence):
    model = seasoned(net())
    before, merges = snapshot(model), model[0].layout.merges
    with pytest.raises(ValueError, match=sentence):
        lte.merge(model, reset=reset, optimizer=optimizer)
    same(snapshot(model), before)
    assert model[0].layout.merges == merges


@pytest.mark.parametrize(
    "call",
    [
        lte.merge,
        lte.merged_state_dict,
        lambda m: lte.head_loss(torch.ones(3), m),
        lambda m: lte.clip_grad_norm_(m, 1.0),
    ],
)
def test_a_plain_model_is_refused_in_one_sentence(call):
    with pytest.raises(ValueError, match="not converted; call lte.convert first"):
        call(net())


class Awkward(nn.Module):
    """Every kind of owner, in sizes that no number of processes divides."""

    def __init__(self, stem):
        super().__init__()
        self.vit = vit(dropout=0.1, dtype=torch.float32)
        self.stem, self.norm = stem, nn.BatchNorm2d(3)
        self.gate, self.wide = nn.Linear(10, 1), nn.Linear(10, 384)
        self.out, self.slope = nn.Linear(384, 10), nn.PReLU()

    def forward(self, x):
        z = self.vit(self.norm(self.stem(x)))
        return self.out(self.slope(self.wide(z) * self.gate(z)))


def train_awkward(base, convolution=False, steps=6, T=2):
    """N = 4 heads: what all processes hold at the end, and what this one does."""
    torch.manual_seed(0)
    model = Awkward(nn.Conv2d(3, 3, 3, padding=1) if convolution else nn.Identity())
    model = lte.convert(model, heads=4, r=2, lora_alpha=16, base=base, bare="heads")
    layout = lte.layout_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0, foreach=True)
    mine = slice(layout.rank * layout.local * B, (layout.rank + 1) * layout.local * B)
    for k in range(steps):
        g = torch.Generator().manual_seed(k)
        x = torch.randn(4 * B, 3, 8, 8, generator=g)[mine]
        y = torch.randint(10, (4 * B,), generator=g)[mine]
        optimizer.zero_grad()
        loss(model, x, y).backward()
        lte.clip_grad_norm_(model, 1.0)
        optimizer.step()
        if (k + 1) % T == 0:
            lte.merge(model, optimizer=optimizer, decay=0.99, reset="AB" if k == 3 else "none")
    forward = {m.plain: m.dense() for m in lte.merged_tensors(model)}
    heads = {name: p.detach() for name, p in model.named_parameters()}
    return lte.merged_state_dict(model), forward, heads


@pytest.mark.parametrize("base, convolution", [("fp32", False), ("nf4", False), ("fp32", True)])
def test_four_heads_on_one_two_or_four_processes_end_in_the_same_bits(base, convolution):
    [(export, forward, heads)] = on_processes(1, train_awkward, base, convolution)
    for world in (2, 4):
        ranks = on_processes(world, train_awkward, base, convolution)
        for theirs, their_forward, _ in ranks:
            same(theirs, export)
            same(their_forward, forward)
        same({name: torch.cat([r[2][name] for r in ranks]) for name in heads}, heads)


def start_differently():
    torch.manual_seed(dist.get_rank())
    model = lte.convert(
        nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)), heads=4, r=2, lora_alpha=8
    )
    layer = lte.MultiheadLoRALinear(5, 7, heads=4, r=2, lora_alpha=8)
    return lte.merged_state_dict(model), layer.weight, model[0].lora_A.detach()


def test_processes_seeded_differently_start_from_the_same_weights_with_different_heads():
    ranks = on_processes(2, start_differently)
    same(ranks[0][:2], ranks[1][:2])
    A = torch.cat([r[2] for r in ranks])
    alone = lte.convert(nn.Sequential(nn.Linear(5, 7)), heads=4, r=2, lora_alpha=8)
    same(A, alone[0].lora_A)


def train_while_nobody_talks():
    model = lte.convert(net(), heads=4, r=2, lora_alpha=8, base="nf4")
    optimizer = torch.optim.Adam(model.parameters())
    talks = f"all_reduce broadcast all_gather {lte.GATHER} all_to_all all_to_all_single \
        reduce reduce_scatter reduce_scatter_tensor gather scatter barrier send recv".split()

    def refuse(*args, **options):
        raise AssertionError("a collective between merges")

    kept = {name: getattr(dist, name) for name in talks}
    for name in talks:
        setattr(dist, name, refuse)
    for k in range(2):
        optimizer.zero_grad()
        loss(model, *batch(2, seed=k + 10 * dist.get_rank())).backward()
        lte.clip_grad_norm_(model, 1.0)
        optimizer.step()
        model.eval()(batch()[0])
        model.train()
    for name in talks:
        setattr(dist, name, kept[name])
    different = model[0].lora_B.detach().clone()
    lte.merge(model)
    return different, model[0].rows


def test_nothing_is_sent_between_merges_and_all_hold_the_same_W_after_one():
    (mine, rows), (other, other_rows) = on_processes(2, train_while_nobody_talks)
    assert not torch.equal(mine, other)
    same(rows, other_rows)


def refuse_on(heads, parallel):
    model = net()
    with pytest.raises(ValueError) as error:
        lte.convert(model, heads=heads, r=2, lora_alpha=8, parallel=parallel)
    return str(error.value)


def test_every_process_refuses_what_does_not_fit():
    for heads, parallel in ((3, True), (4, False)):
        first, second = on_processes(2, refuse_on, heads, parallel)
        assert first == second and "2" in first


# the wire


def rounded(x, wire):
    """What arrives of a tensor that is sent in rows of 64."""
    rows = F.pad(x.flatten(), (0, -x.numel() % 64)).view(-1, 64)
    return lte.decode(lte.encode(rows, wire), wire, x.dtype).flatten()[: x.numel()].view_as(x)


def merge_over(wire, base):
    model = learn_apart(loose(base=base))
    lte.merge(model, wire=wire)
    return outcome(model)


@pytest.mark.parametrize(
    "world, wire, base",
    [(2, "bf16", "nf4"), (4, "bf16", "fp32"), (2, "nf4", "fp32"), (4, "int8", "nf4")],
)
def test_the_master_gets_just_the_sum_of_the_partial_sums_as_the_wire_rounds_them(
    world, wire, base
):
    alone = learn_apart(loose(base=base))
    expected = lte.merged_state_dict(alone)
    for m in lte.merged_tensors(alone):
        d = [delta(m, n) for n in range(4)]
        partial_sums = d if world == 4 else [d[0] + d[1], d[2] + d[3]]
        sent = [rounded(partial, wire) for partial in partial_sums]
        if m.numel > 1:  # of a row's largest number four bits keep everything
            assert not torch.equal(sent[0], partial_sums[0]), "rounding nothing tests nothing"
        total = sent[0] + sent[1] if world == 2 else (sent[0] + sent[1]) + (sent[2] + sent[3])
        expected[m.plain] = expected[m.plain] + total / 4
    (export, _), _ = together(on_processes(world, merge_over, wire, base))
    same(export, expected)


@pytest.mark.parametrize("async_op, wire", [(False, "bf16"), (True, "bf16"), (False, "fp4")])
def test_on_one_process_a_wire_rounds_nothing(async_op, wire):
    narrow, wide = learn_apart(loose()), learn_apart(loose())
    work = lte.merge(narrow, wire=wire, async_op=async_op)
    if async_op:
        work.wait()
    lte.merge(wide)
    same(snapshot(narrow), snapshot(wide))


# 7 rows a piece: many pieces
KINDS = list(itertools.product(lte.BASES, ("fp32", "bf16", "nf4"), (lte.PIECE, 7)))


def count_every_kind():
    """kind -> bytes of one merge: given to collectives here, by lte.bytes_sent, and foretold."""
    world, sent, counts = dist.get_world_size(), [], {}
    to_all, gather = dist.all_to_all_single, getattr(dist, lte.GATHER)

    def counted_to_all(output, chunks, **options):
        sent.append(chunks.nbytes * (world - 1) // world)
        return to_all(output, chunks, **options)

    def counted_gather(output, mine, **options):
        sent.append(mine.nbytes * (world - 1))
        return gather(output, mine, **options)

    dist.all_to_all_single = counted_to_all
    setattr(dist, lte.GATHER, counted_gather)
    for base, wire, piece in KINDS:
        lte.PIECE = piece
        model = learn(awkward_bytes(base))
        sent.clear()
        lte.merge(model, wire=wire)
        counted = sum(sent), lte.layout_of(model).bytes_sent
        counts[base, wire, piece] = *counted, lte.cost_report(model, wire=wire)["sent"]["merge"]
    return counts


def awkward_bytes(base):
    layers = nn.Linear(3, 1), nn.Linear(1, 10), nn.Linear(10, 384), nn.LayerNorm(384), nn.PReLU()
    return lte.convert(nn.Sequential(*layers), heads=12, r=20, lora_alpha=8, base=base)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_bytes_sent_are_those_foretold_for_every_base_wire_and_size(world, monkeypatch):
    foretold = {}
    for base, wire, piece in KINDS:
        monkeypatch.setattr(lte, "PIECE", piece)
        cost = lte.cost_report(awkward_bytes(base), wire=wire, workers=world)["sent"]
        assert cost["heads"] == 12 // world * (world - 1)
        foretold[base, wire, piece] = (cost["merge"],) * 3
    assert on_processes(world, count_every_kind) == [foretold] * world


@pytest.mark.parametrize("workers", [0, 5, 24])
def test_heads_that_do_not_spread_over_the_workers_cannot_be_counted(workers):
    model = awkward_bytes("fp32")
    if workers:
        with pytest.raises(ValueError, match=f"12 heads do not spread over workers={workers}"):
            lte.cost_report(model, workers=workers)
    else:  # none given: those running
        assert lte.cost_report(model, workers=0) == lte.cost_report(model, workers=1)


def test_deltas_take_256_bytes_a_row_half_of_it_over_a_bf16_wire_and_a_seventh_over_nf4():
    model = lte.convert(nn.Linear(10, 384, bias=False), heads=4, r=2, lora_alpha=8, base="nf4")
    for wire, row in (("fp32", 256), ("bf16", 128), ("int8", 68), ("nf4", 36)):
        cost = lte.cost_report(model, workers=4, wire=wire)["sent"]
        assert (cost["deltas"], cost["forward"]) == (3 * 15 * row, 3 * 15 * 36)


# layouts, pieces and buckets


def merge_in_pieces(bucket):
    """(base, outer optimizer?, async?) -> the outcome of two merges in pieces of 3 rows."""
    outcomes = {}
    with pytest.MonkeyPatch.context() as patch:  # on one process this is the test's own
        patch.setattr(lte, "PIECE", 3)
        patch.setattr(lte, "BUCKET", bucket)
        for base, outer, async_op in itertools.product(lte.BASES, (False, True), (False, True)):
            model = loose(base=base)
            assert max(len(m.pieces) for m in lte.merged_tensors(model)) == 6
            optimizer = nesterov(model) if outer else None
            for seed in (0, 10):
                learn_apart(model, seed)
                work = lte.merge(model, outer_optimizer=optimizer, decay=0.9, async_op=async_op)
                learn_apart(model, seed + 1)
                if async_op:
                    work.wait()
            outcomes[base, outer, async_op] = outcome(model)
    return outcomes


def test_neither_processes_nor_buckets_change_the_bits_of_any_kind_of_merge():
    [expected] = on_processes(1, merge_in_pieces, lte.BUCKET)
    for world in (1, 2, 4):
        ranks = on_processes(world, merge_in_pieces, 4096)  # four pieces to a bucket
        for kind in expected:
            same(together([rank[kind] for rank in ranks]), expected[kind])


def test_a_parameter_without_dimensions_is_averaged_as_any_other():
    scale = nn.Module()
    scale.factor = nn.Parameter(torch.tensor(2.0))
    model = learn(convert(nn.Sequential(nn.Linear(IN, OUT), scale)))
    mean = model[1].factor.heads.detach().mean()
    lte.merge(model)
    torch.testing.assert_close(lte.merged_state_dict(model)["1.factor"], mean)


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_pieces_change_nothing_but_rounding(base, monkeypatch):
    plain = nn.Linear(19, 23).double()
    whole = seasoned(copy.deepcopy(plain), base=base)
    monkeypatch.setattr(lte, "PIECE", 3)
    pieces = seasoned(plain, base=base)
    assert [len(m.pieces) for m in lte.merged_tensors(pieces)] == [3, 1]
    for m in (whole, pieces):
        lte.merge(m)
    close(lte.merged_state_dict(pieces), lte.merged_state_dict(whole))


# outer optimizers


def merge_by_sgd_at_rate_1():
    for base in ("fp32", "nf4"):
        plain, outer = loose(base=base), loose(base=base)
        sgd = torch.optim.SGD(lte.outer_parameters(outer), lr=1.0)
        for seed in range(2):
            lte.merge(learn_apart(plain, seed), decay=0.9)
            lte.merge(learn_apart(outer, seed), decay=0.9, outer_optimizer=sgd)
            same(snapshot(outer), snapshot(plain))


@pytest.mark.parametrize("world", [1, 2])
def test_an_outer_sgd_step_at_rate_1_is_the_plain_merge(world):
    on_processes(world, merge_by_sgd_at_rate_1)


OUTER = {
    "nesterov": functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
    "adam": functools.partial(torch.optim.Adam, lr=0.1),
}


@pytest.mark.parametrize("make", OUTER.values(), ids=OUTER)
def test_an_outer_optimizer_steps_a_decayed_W_with_minus_the_mean_as_gradient(make):
    model, low_rank = convert(net()), ("0.weight", "3.weight")
    outer, dense = make(lte.outer_parameters(model)), lte.merged_state_dict(model)
    by_hand = make(dense.values())
    for seed in range(3):
        learn(model, seed)
        for m in lte.merged_tensors(model):
            dense[m.plain].mul_(0.9 if m.plain in low_rank else 1.0)
            dense[m.plain].grad = -sum(delta(m, n) for n in range(N)) / N
        by_hand.step()
        lte.merge(model, decay=0.9, outer_optimizer=outer)
        close(lte.merged_state_dict(model), dense)
        x, _ = batch()
        close(model.train()(x), model.eval()(x))
        model.train()


def outer_state():
    model = lte.convert(nn.Linear(10, 384, bias=False), heads=4, r=2, lora_alpha=8, base="nf4")
    outer = nesterov(model)
    lte.merge(learn(model), outer_optimizer=outer)
    assert all(p.grad is None for p in outer.param_groups[0]["params"])
    return sum(state["momentum_buffer"].numel() for state in outer.state.values())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_process_keeps_1_over_P_of_the_outer_state(world):
    assert on_processes(world, outer_state) == [3840 // world] * world


WRONG = {
    "of another model": lambda model: lte.outer_parameters(convert(net())),
    "of a part": lambda model: lte.outer_parameters(model)[1:],
    "and one more": lambda model: [*lte.outer_parameters(model), torch.ones(1, 64)],
    "of the inner optimizer": lambda model: list(model.parameters()),
    "before a cast": lambda model: (lte.outer_parameters(model), model.float())[0],
}


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("parameters", WRONG.values(), ids=WRONG)
def test_an_outer_optimizer_of_other_parameters_is_refused(parameters, async_op):
    model = seasoned(net())
    outer = torch.optim.SGD(parameters(model), 0.7)
    before, values = snapshot(model), copy.deepcopy(outer.param_groups)
    with pytest.raises(ValueError, match="does not hold this model's outer parameters; make it fr"):
        lte.merge(model, outer_optimizer=outer, async_op=async_op)
    same(snapshot(model), before)
    same([g["params"] for g in outer.param_groups], [g["params"] for g in values])
    assert model[0].layout.merges == 1 and model[0].layout.in_flight is None


# merges in flight


class ByHand:
    """net() trained by N heads with merges that arrive late: every matrix formed, head by head."""

    low_rank = {"0.weight": 0, "3.weight": 3}

    def __init__(self, model):
        self.plain, self.W = net(), lte.merged_state_dict(model)
        self.heads = [{k: W for k, W in self.W.items() if k not in self.low_rank} for _ in range(N)]
        for name, place in self.low_rank.items():
            for n, own in enumerate(self.heads):
                own[name, "A"] = model[place].lora_A[n].detach().clone()
                own[name, "B"] = model[place].lora_B[n].detach().clone()
        self.merged = self.sent = [dict(own) for own in self.heads]

    def product(self, own, name):
        return ALPHA / R * own[name, "B"] @ own[name, "A"]

    def dense(self, n, own):
        """The weights that head n computes with: W + s (B A - B' A'), and its copies."""
        weights = {k: p for k, p in own.items() if k in self.W}
        for name in self.low_rank:
            update = self.product(own, name) - self.product(self.merged[n], name)
            weights[name] = self.W[name] + update
        return weights

    def step(self, x, y, rate):
        for n, (x_n, y_n) in enumerate(zip(x.chunk(N), y.chunk(N), strict=True)):
            leaves = {k: p.clone().requires_grad_() for k, p in self.heads[n].items()}
            logits = torch.func.functional_call(self.plain, self.dense(n, leaves), x_n)
            grads = torch.autograd.grad(F.cross_entropy(logits, y_n), list(leaves.values()))
            for k, grad in zip(leaves, grads, strict=True):
                self.heads[n][k] = self.heads[n][k] - rate * grad

    def send(self):
        self.sent = [dict(own) for own in self.heads]
        weights = [self.dense(n, own) for n, own in enumerate(self.sent)]
        self.mean = {k: sum(w[k] for w in weights) / N for k in self.W}

    def arrive(self):
        self.W, self.merged = self.mean, self.sent
        for own, sent in zip(self.heads, self.sent, strict=True):
            own.update({k: self.W[k] + own[k] - sent[k] for k in own if k in self.W})

    def __call__(self, x):
        weights = [self.dense(n, own) for n, own in enumerate(self.heads)]
        pairs = zip(weights, x.chunk(N), strict=True)
        return torch.cat([torch.func.functional_call(self.plain, w, x_n) for w, x_n in pairs])


@pytest.mark.parametrize("T, K", [(1, 1), (4, 1), (4, 2), (4, 3), (4, 4)])
def test_a_merge_in_flight_is_one_that_arrives_K_steps_late_and_no_step_is_lost(T, K):
    model = convert(net())
    twin, optimizer, work = ByHand(model), torch.optim.SGD(model.parameters(), 0.1), None
    for k in range(1, 3 * T + 1):
        x, y = batch(seed=k)
        step(model, optimizer, x, y)
        twin.step(x, y, 0.1)
        close(model(x), twin(x))
        if work and k % T == K % T:
            work.wait()
            twin.arrive()
            close(lte.merged_state_dict(model), twin.W)
            close(model(x), twin(x))
        if k % T == 0:
            work = lte.merge(model, async_op=True)
            twin.send()
    assert model[0].layout.merges == 2


def test_statistics_take_the_mean_and_stay_positive_while_parameters_keep_what_they_learnt():
    model = convert(nn.BatchNorm2d(2).double(), r=None)
    model.running_var.heads.copy_(torch.tensor([[900.0], [1.0], [2.0]]))
    learn(model)
    sent = {name: getattr(model, name).heads.detach().clone() for name in model._modules}
    work = lte.merge(model, async_op=True)
    learn(model, seed=2, size=0.5)
    for _ in range(6):
        model(image)  # the first head's variance goes down by more than the mean
    later = model.weight.heads.detach().clone()
    assert (model.running_var.heads - sent["running_var"] + sent["running_var"].mean(0)).min() < 0
    work.wait()
    close(model.weight.heads, sent["weight"].mean(0) + later - sent["weight"])
    for name in ("running_mean", "running_var"):
        close(getattr(model, name).heads, sent[name].mean(0).expand(N, 2))


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_until_wait_a_model_computes_and_learns_as_if_no_merge_had_been_called(base, outer):
    model, alone = (seasoned(net().float(), base=base) for _ in range(2))
    (x, y), optimizer = batch(), nesterov(model) if outer else None
    x, before = x.float(), snapshot(alone)
    work = lte.merge(model, outer_optimizer=optimizer, decay=0.9, async_op=True)
    work.arrived.result()  # by now the thread has done all it does
    same(snapshot(model), before)
    for m in (model, alone):
        step(m, torch.optim.SGD(m.parameters(), 0.1), x, y)
    same(snapshot(model), snapshot(alone))
    same(model(x), alone(x))
    same(model.eval()(x), alone.eval()(x))
    work.wait()
    assert not torch.equal(model.eval()(x), alone.eval()(x))


def wait_at_once():
    for base, outer in itertools.product(("fp32", "nf4"), (False, True)):
        now, later = (learn_apart(loose(base=base)) for _ in range(2))
        options = [{"outer_optimizer": nesterov(m) if outer else None} for m in (now, later)]
        for seed in (2, 3):
            lte.merge(learn_apart(now, seed), decay=0.9, wire="bf16", **options[0])
            learn_apart(later, seed)
            lte.merge(later, decay=0.9, wire="bf16", async_op=True, **options[1]).wait()
            same(snapshot(later), snapshot(now))
        assert lte.layout_of(now).bytes_sent == lte.layout_of(later).bytes_sent


@pytest.mark.parametrize("world", [1, 2])
def test_waiting_at_once_is_merging(world):
    on_processes(world, wait_at_once)


def test_what_is_sent_is_what_heads_had_learnt_when_merge_was_called(monkeypatch):
    model, alone = seasoned(net()), seasoned(net())
    learnt, find_sound = threading.Event(), lte.MergeWork.find_sound
    monkeypatch.setattr(lte.MergeWork, "find_sound", lambda w: (learnt.wait(), find_sound(w)))
    work = lte.merge(model, async_op=True)
    learn(model, seed=9)  # before the thread has read anything
    learnt.set()
    work.wait()
    lte.merge(alone)
    same(lte.merged_state_dict(model), lte.merged_state_dict(alone))


def test_two_waits_are_refused():
    model = seasoned(net())
    first = lte.merge(model, async_op=True)
    first.wait()
    second = lte.merge(learn(model), async_op=True)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="waited for already"):
        first.wait()
    same(snapshot(model), before)
    second.wait()
    assert model[0].layout.merges == 3


def test_while_a_merge_is_in_flight_another_and_save_load_and_export_are_refused(tmp_path):
    model, folder = seasoned(net()), str(tmp_path)
    lte.save(folder, model, step=1)
    files, work = sorted(tmp_path.rglob("*")), lte.merge(model, async_op=True)
    before = snapshot(model)
    for what, call in {
        "merge": lambda: lte.merge(model),
        "merge ": lambda: lte.merge(model, async_op=True),
        "save": lambda: lte.save(folder, model, step=2),
        "load": lambda: lte.load(folder, model),
        "export": lambda: lte.merged_state_dict(model),
    }.items():
        with pytest.raises(RuntimeError, match=f"{what.strip()} while a merge is in flight; call"):
            call()
        same(snapshot(model), before)
    work.wait()
    assert model[0].layout.merges == 2 and sorted(tmp_path.rglob("*")) == files
    lte.merged_state_dict(model)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_backward_works_through_graphs_from_before_and_during_a_merge_in_flight(base, outer):
    model, alone = seasoned(net(), base=base), seasoned(net(), base=base)
    optimizer = nesterov(model) if outer else None
    values = [loss(m, *batch(seed=1)) for m in (model, alone)]
    work = lte.merge(model, outer_optimizer=optimizer, async_op=True)
    values = [v + loss(m, *batch(seed=2)) for v, m in zip(values, (model, alone), strict=True)]
    work.arrived.result()
    same(gradients(model, values[0]), gradients(alone, values[1]))
    work.wait()


def talk_while_a_merge_is_in_flight():
    """Rank 0's thread sends after its caller has talked, rank 1's before."""
    model, alone = learn_apart(loose()), learn_apart(loose())
    lte.merge(alone)
    talked, find_sound = threading.Event(), lte.MergeWork.find_sound
    if dist.get_rank() == 0:
        lte.MergeWork.find_sound = lambda work: (talked.wait(), find_sound(work))
    work = lte.merge(model, async_op=True)
    time.sleep(0.1 * dist.get_rank())
    value = torch.ones(())
    dist.all_reduce(value)
    talked.set()
    work.wait()
    same(snapshot(model), snapshot(alone))
    return value.item()


def test_a_merge_in_flight_and_what_its_caller_sends_meanwhile_do_not_mix():
    assert on_processes(2, talk_while_a_merge_is_in_flight) == [2.0, 2.0]


# heads that hold NaN or inf

SPOILT = {
    "NaN in A": lambda m, n: m[0].lora_A.data[n, 1, 2:3].fill_(math.nan),
    "inf in B": lambda m, n: m[3].lora_B.data[n, 1, :1].fill_(-math.inf),
    "inf in a bias": lambda m, n: m[0].bias.data[n, 4:5].fill_(math.inf),
    "NaN in LayerNorm": lambda m, n: m[1].weight.heads.data[n, :1].fill_(math.nan),
    "B A overflows": lambda m, n: [f.data[n].fill_(1e200) for f in (m[0].lora_A, m[0].lora_B)],
}


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("base", ["fp32", "nf4"])
@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_head_that_is_not_finite_is_left_out_and_starts_again(spoil, base, async_op):
    model, (x, _) = seasoned(net(), base=base), batch()
    spoil(model, 1)
    expected = lte.merged_state_dict(model)
    for m in lte.merged_tensors(model):
        expected[m.plain] = expected[m.plain] + (delta(m, 0) + delta(m, 2)) / 2
    with pytest.warns(UserWarning, match="^merge 2: head 1 of 3 holds NaN or inf; left") as caught:
        work = lte.merge(model, async_op=async_op)
        if async_op:
            work.wait()
    assert len(caught) == 1 and model[0].layout.left_out == 1 and model[0].layout.merges == 2
    close(lte.merged_state_dict(model), expected)
    close(model.train()(x), model.eval()(x))
    lte.merge(learn(model.train()))
    assert model[0].layout.left_out == 1 and model(x).isfinite().all()


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_no_weight_changes_by_more_than_its_heads_bound(size):
    model = learn(seasoned(net()), size=size)
    model[1].weight.heads.data[1] = 0  # a copy that lost all it had
    for m in lte.merged_tensors(model):
        bounds = m.bound(m.learnt())
        assert len(bounds) == N
        assert all(delta(m, n).abs().max() <= bounds[n] for n in range(N))


def test_a_head_whose_update_overflows_only_against_what_was_merged_is_left_out():
    layer = convert(nn.Linear(IN, OUT, bias=False))
    factors = layer.lora_A.data, layer.lora_B.data, layer.merged_A, layer.merged_B
    for factor, size in zip(factors, (1e20, 1e-20, 1e-20, 1e20), strict=True):
        factor[1] = size  # B A and B' A' are ordinary, B' A is not
    with pytest.warns(UserWarning, match="head 1 of 3"):
        lte.merge(layer)
    assert layer.exact().isfinite().all()


@pytest.mark.parametrize("plain", [nn.Linear(IN, OUT, bias=False), nn.LayerNorm(IN)])
def test_heads_that_are_finite_one_by_one_never_add_up_to_a_W_that_is_not(plain):
    linear = isinstance(plain, nn.Linear)
    model = convert(copy.deepcopy(plain), heads=64, r=R if linear else None)
    if linear:
        model.lora_A.data.fill_(1.0)
        model.lora_B.data.fill_(1e37)
    else:
        model.weight.heads.data.fill_(3e38)
    with pytest.raises(FloatingPointError):
        lte.merge(model)
    same(lte.merged_state_dict(model), plain.state_dict())


def test_the_warning_points_at_the_line_that_called_merge():
    model = seasoned(net())
    SPOILT["NaN in A"](model, 1)
    with pytest.warns(UserWarning) as caught:
        lte.merge(model)
    assert caught[0].filename == __file__


def test_a_head_left_out_of_a_merge_in_flight_keeps_nothing_of_what_it_did_meanwhile():
    model, (x, _) = seasoned(net()), batch()
    SPOILT["NaN in A"](model, 1)
    SPOILT["inf in a bias"](model, 1)
    work = lte.merge(model, async_op=True)
    learn(model, seed=5)
    with pytest.warns(UserWarning, match="head 1 of 3"):
        work.wait()
    outputs = [model.train()(x).chunk(N), model.eval()(x).chunk(N)]
    close(outputs[0][1], outputs[1][1])
    assert (outputs[0][0] - outputs[1][0]).abs().max() > 1e-3, "the others keep theirs"


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("amsgrad", [True, False])
def test_a_head_left_out_loses_its_moments_and_no_other_does(given, amsgrad):
    model = convert(net())
    optimizer = torch.optim.Adam(model.parameters(), 0.01, amsgrad=amsgrad)
    for k in range(3):
        step(model, optimizer, *batch(seed=k))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    SPOILT["inf in B"](model, 1)
    says = "with zero moments$" if given else r"with its moments \(optimizer=\)$"
    with pytest.warns(UserWarning, match=says):
        lte.merge(model, optimizer=optimizer if given else None)
    for state, old in zip(optimizer.state.values(), before.values(), strict=True):
        same(state["step"], old["step"])
        for name in old.keys() - {"step"}:
            if given:
                assert old[name][1].any()
                old[name][1] = 0
            same(state[name], old[name])


@pytest.mark.filterwarnings("ignore:merge 2")
@pytest.mark.parametrize("reset", ["none", "B", "AB"])
def test_a_head_left_out_starts_again_with_every_reset(reset):
    model, optimizer = trained()
    lte.merge(model)
    SPOILT["NaN in A"](model, 1)
    lte.merge(model, optimizer=optimizer, reset=reset)
    x, _ = batch()
    close(model.train()(x), model.eval()(x))
    step(model.train(), optimizer, *batch())
    assert all(p.isfinite().all() for p in model.parameters())


def merge_with_two_bad_heads():
    """(async?, outer optimizer?) -> outcome, heads left out, warnings."""
    found = {}
    for async_op, outer in itertools.product((False, True), (False, True)):
        model = learn_apart(loose(base="nf4"))
        layout, optimizer = lte.layout_of(model), nesterov(model) if outer else None
        for head, factor, value in ((0, model[1].lora_A, math.nan), (2, model[0].bias, math.inf)):
            if head // layout.local == layout.rank:
                factor.data[head % layout.local, ..., 0] = value
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work = lte.merge(model, outer_optimizer=optimizer, async_op=async_op)
            learn_apart(model, seed=2)
            if async_op:
                work.wait()
        says = [str(warning.message) for warning in caught]
        found[async_op, outer] = outcome(model), layout.left_out, says
    return found


def test_bad_heads_make_the_same_bits_on_every_layout_and_one_warning_of_rank_0():
    [expected] = on_processes(1, merge_with_two_bad_heads)
    for world in (2, 4):
        ranks = on_processes(world, merge_with_two_bad_heads)
        for kind, (out, left_out, says) in expected.items():
            outs, counts, warned = zip(*(rank[kind] for rank in ranks), strict=True)
            same(together(outs), out)
            assert left_out == 2 and set(counts) == {2}
            assert len(says) == 1 and "head 0, 2 of 4" in says[0]
            assert [*warned] == [says] + [[]] * (world - 1)


def merge_with_bad_heads_only():
    model, (x, y) = convert(net(), heads=4), batch(4)
    local, outer = lte.layout_of(model).local, nesterov(model)
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, x[: local * B], y[: local * B])
    lte.merge(model, outer_optimizer=outer)
    whole = snapshot(model)
    for n in range(local):
        [*SPOILT.values()][n](model, n)
    held = snapshot(model), copy.deepcopy(optimizer.state_dict()), copy.deepcopy(outer.state_dict())
    for async_op in (False, True):
        with pytest.raises(FloatingPointError, match="merge 2: every head holds NaN or inf"):
            lte.merge(model, optimizer=optimizer, outer_optimizer=outer, async_op=async_op).wait()
        now = snapshot(model), optimizer.state_dict(), outer.state_dict()
        torch.testing.assert_close(now, held, rtol=0, atol=0, equal_nan=True)
        assert (model[0].layout.merges, model[0].layout.left_out) == (1, 0)
    model.load_state_dict(whole)
    lte.merge(model)  # nothing is in flight, nobody waits for anybody


@pytest.mark.parametrize("world", [1, 2])
def test_where_no_head_is_finite_every_process_raises_and_nothing_changes(world):
    on_processes(world, merge_with_bad_heads_only)


# processes that do not fit together, or are lost

DIFFERENT = {
    "heads": 3,
    "r": 3,
    "lora_alpha": 5.0,
    "base": "nf4",
    "init": "xavier",
    "parallel": False,
    "bare": "freeze",
    "skip": ["3"],
    "seed": 5,
    "version": "0.0.9",
    "the shape of 0.weight": (8, 5),
    "the shape of 4.weight": (2, 2),
}


def convert_the_last_process_differently():
    """name -> the sentence that this process raises, and what a convert that fits does after it."""
    last, sentences = dist.get_rank() == dist.get_world_size() - 1, {}
    for name, value in DIFFERENT.items():
        model, options = net(), {"heads": 6}
        with pytest.MonkeyPatch.context() as patch:
            if last and name == "version":
                patch.setattr(lte, "__version__", value)
            elif last and "weight" in name:
                place = int(name.split()[-1][0])
                model = model[:place].append(nn.Linear(*value[::-1])).extend(model[place + 1 :])
            elif last:
                options[name] = value
            kinds = [type(m) for m in model]
            with pytest.raises(ValueError) as error:
                convert(model, **options)
        assert [type(m) for m in model] == kinds
        sentences[name] = str(error.value)
    lte.merge(learn(convert(net(), heads=6)))
    return sentences


def test_processes_that_were_started_differently_all_say_which_and_how():
    ranks = on_processes(3, convert_the_last_process_differently)
    assert ranks[1:] == ranks[:1] * 2
    for name, value in DIFFERENT.items():
        assert ranks[0][name].startswith(f"process 2 has {name} = {value!r}, process 0 has ")
    assert "process 0 has None; start all" in ranks[0]["the shape of 4.weight"]
    assert "process 0 has 6; start all processes with the same" in ranks[0]["heads"]


def outlive(when):
    """Rank 1 ends without a word; rank 0 returns what it then raises."""
    model = learn(lte.convert(net(), heads=2, r=2, lora_alpha=8))
    lte.merge(model, async_op=True).wait()  # the second group is there
    before = snapshot(learn(model))
    if dist.get_rank() == 1:
        if when != "before":
            setattr(lte, "all_gather" if when == "in flight" else when, lambda *a: os._exit(0))
            lte.merge(model, async_op=when == "in flight").wait()
        os._exit(0)
    with pytest.raises(lte.ProcessLost) as error:
        if when == "in flight":
            work = lte.merge(model, async_op=True)
            same(snapshot(model), before)
            work.wait()
        lte.merge(model)
    same(snapshot(model), before)
    dist.barrier = dist.destroy_process_group = lambda: None  # one_process cannot do these any more
    return str(error.value), model[0].layout.merges


def survivors(world, function, *args):
    """on_processes where some end themselves: None for them. (One line in it, when pasted.)"""
    load = torch.load
    with pytest.MonkeyPatch.context() as patch:
        found = lambda path, **how: load(path, **how) if Path(path).exists() else None  # noqa: E731
        patch.setattr(torch, "load", found)
        return on_processes(world, function, *args)


@pytest.mark.parametrize(
    "when, what",
    [("before", "all-gather"), ("all_to_all", "all-to-all"), ("in flight", "all-gather")],
)
def test_a_merge_that_loses_a_process_says_so_and_leaves_W_as_it_was(when, what):
    [(sentence, merges), nothing] = survivors(2, outlive, when)
    assert nothing is None and merges == 1
    says = f"{what}: another process has ended or hangs; go on from the last checkpoint ("
    assert sentence.startswith(says) and "\n" not in sentence


def test_an_error_without_a_word_is_a_lost_process_too():
    with pytest.raises(lte.ProcessLost, match=r"^all-gather: another process has ended.* \(\)$"):
        with lte.collective("all-gather"):
            raise RuntimeError


def test_a_full_memory_is_not_taken_for_a_lost_process():
    with pytest.raises(torch.OutOfMemoryError), lte.collective("all-gather"):
        raise torch.OutOfMemoryError("full")


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"wire": "fp16"}, "wire='fp16' is not known; choose one of fp32, bf16, int8"),
        ({"wire": None}, "wire=None is not known"),
        ({"reset": "B", "async_op": True}, "reset='B' with async_op=True would drop what heads"),
        ({"reset": "AB", "async_op": True}, "use reset='none', or async_op=False"),
    ],
)
def test_a_wire_or_an_async_reset_that_is_refused_changes_nothing(options, sentence):
    model, optimizer = trained()
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=sentence):
        lte.merge(model, optimizer=optimizer, **options)
    same(snapshot(model), before)
    same(optimizer.state_dict()["state"], state["state"])
    assert model[0].layout.merges == 0 and model[0].layout.in_flight is None


# memory


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once of the memory that operations inside took."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for t in filter(is_tensor, tree_leaves(result)):
            storage = t.untyped_storage()
            if storage._cdata not in given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.bytes = max(self.bytes, sum(nbytes for _, nbytes in self.alive.values()))
        return result


def is_tensor(x):
    return isinstance(x, torch.Tensor)


LARGE = {  # heads of a process, r, and layers that take several buckets
    "one layer": (2, 4, lambda: nn.Linear(384, 320)),
    "many layers": (2, 4, lambda: nn.Sequential(*[nn.Linear(64, 64) for _ in range(32)])),
    "many heads": (16, 16, lambda: nn.Linear(256, 40)),
    "large copies": (2, 4, lambda: nn.Sequential(nn.Embedding(2000, 64), nn.Linear(8, 8))),
}


def as_if_among(world, patch):
    """One process that believes to be the first of several; the others send what it sends."""

    def gather(everyone, mine, group=None):
        everyone.view(world, -1).copy_(mine)

    patch.setattr(lte, "processes", lambda: (0, world))
    patch.setattr(lte, "agree", lambda **values: None)
    patch.setattr(lte, "broadcast", lambda *args: None)
    patch.setattr(dist, lte.GATHER, gather)
    patch.setattr(dist, "all_to_all_single", lambda arrived, sent, group=None: arrived.copy_(sent))


# Not with real processes: gloo's threads let go of a message some time after it has arrived.
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind, base", [("one layer", "fp32"), *((kind, "nf4") for kind in LARGE)])
def test_a_merge_takes_less_than_two_buckets_of_memory(kind, world, base, outer, monkeypatch):
    monkeypatch.setattr(lte, "BUCKET", lte.BUCKET // 512)
    monkeypatch.setattr(lte, "PIECE", lte.PIECE // 512)
    as_if_among(world, monkeypatch)
    local, r, make = LARGE[kind]
    model = lte.convert(make(), heads=local * world, r=r, lora_alpha=8, base=base)
    optimizer = nesterov(model) if outer else None
    if outer:
        lte.merge(model, outer_optimizer=optimizer)  # the optimizer's state is its own
    learn(model)
    with Peak() as peak:
        lte.merge(model, outer_optimizer=optimizer)
    assert 0.5 < peak.bytes / lte.BUCKET < 2


# ------------------------------------------------------------------------------------------------
# 8 training helpers
# ------------------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_over_heads_of_each_heads_mean():
    losses = torch.rand(N * B, 6, dtype=torch.float64)
    close(lte.head_loss(losses, convert(net())), losses.mean() * N)
    close(lte.head_loss(losses, convert(net(), parallel=False)), losses.mean())
    with pytest.raises(ValueError, match="10 samples does not split over 3 heads"):
        lte.head_loss(losses[:10], convert(net()))
    for parallel in (True, False):
        with pytest.raises(ValueError, match="reduction='none'"):
            lte.head_loss(losses.mean(), convert(net(), parallel=parallel))


@pytest.mark.parametrize("clip", [False, True])
def test_a_heads_gradient_is_that_of_a_run_with_this_head_alone(clip):
    together, (x, y) = seasoned(net()), batch()
    grads = gradients(together, loss(together, x, y))
    norms = lte.clip_grad_norm_(together, 0.05) if clip else None
    for n in range(N):
        alone = convert(net(), heads=1)
        for target, source in ((alone[0], together[0]), (alone[3], together[3])):
            target.rows.copy_(source.rows)
            target.merged_A.copy_(source.merged_A[n : n + 1])
            target.merged_B.copy_(source.merged_B[n : n + 1])
        for p, q in zip(alone.parameters(), together.parameters(), strict=True):
            p.data.copy_(q[n : n + 1])
        own = gradients(alone, loss(alone, x.chunk(N)[n], y.chunk(N)[n]))
        close(own, {name: g[n : n + 1] for name, g in grads.items()})
        if clip:
            norm = torch.cat([g.flatten() for g in own.values()]).norm()
            close(norms[n], norm)
            for p, g in zip(together.parameters(), own.values(), strict=True):
                close(p.grad[n : n + 1], g * 0.05 / (norm + 1e-6))


def test_clipping_leaves_small_gradients_as_they_are():
    model = seasoned(net())
    before = gradients(model, loss(model, *batch()))
    lte.clip_grad_norm_(model, 1e3)
    same({name: p.grad for name, p in model.named_parameters()}, before)


def test_clipping_looks_at_what_heads_learn_only():
    model = convert(net(), skip=["0"])
    gradients(model, 0 * loss(model, *batch()))
    model[0].weight.grad = torch.ones_like(model[0].weight)  # left over from a life before
    assert not lte.clip_grad_norm_(model, 1.0).any() and model[0].weight.grad.all()


def test_a_module_that_reads_anothers_weight_learns_nothing_and_clipping_says_so():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(self.called(x), self.read.weight)

    model = convert(Reads())
    model(torch.randn(N, 4)).sum().backward()
    names = "read.lora_A, read.lora_B, read.bias_copies.heads"
    with pytest.warns(UserWarning, match=f"no gradient for {names}: "):
        lte.clip_grad_norm_(model, 1.0)


def test_multi_head_lora_is_clipped_as_one_model():
    model = seasoned(net(), parallel=False)
    grads = gradients(model, loss(model, *batch()))
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    close(lte.clip_grad_norm_(model, 0.01), norm.expand(N))
    for name, p in model.named_parameters():
        close(p.grad, grads[name] * 0.01 / (norm + 1e-6))


def test_one_heads_nan_does_not_reach_the_others():
    model, (x, y) = seasoned(net()), batch()
    clean = gradients(model, loss(model, x, y))
    x[B : 2 * B] = math.nan
    dirty = gradients(model, loss(model, x, y))
    norms = lte.clip_grad_norm_(model, 1e3)
    assert norms.isnan().tolist() == [False, True, False]
    for name, p in model.named_parameters():
        same(dirty[name][::2], clean[name][::2])
        same(p.grad[::2], clean[name][::2])


def test_micro_batches_add_up_to_the_batch():
    model, (x, y) = seasoned(net()), batch()
    whole = gradients(model, loss(model, x, y))
    model.zero_grad()
    for k in (0, 2):  # samples k, k + 1 of every head
        part = [t.unflatten(0, (N, B))[:, k : k + 2].flatten(0, 1) for t in (x, y)]
        (loss(model, *part) / 2).backward()
    close({name: p.grad for name, p in model.named_parameters()}, whole)


@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_a_compiled_model_equals_the_eager_one_through_merges_and_compiles_once(base):
    eager, compiled, graphs = convert(net(), base=base), convert(net(), base=base), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(compiled, backend=backend)
    optimizers, compiled_at_first = [torch.optim.SGD(m.parameters(), 0.1) for m in (eager, run)], 0
    for k in range(6):
        for model, optimizer in zip((eager, run), optimizers, strict=True):
            step(model, optimizer, *batch(seed=k))
            lte.clip_grad_norm_(model, 1.0)
            if k % 2:
                lte.merge(model)
            compiled_at_first = compiled_at_first or len(graphs)
        close(lte.merged_state_dict(run), lte.merged_state_dict(eager))
    assert len(graphs) == compiled_at_first


# ------------------------------------------------------------------------------------------------
# 9 checkpoints
# ------------------------------------------------------------------------------------------------


def a_run(base="fp32", outer=False, *, rate=0.01, weights=0, **options):
    """Model, optimizer, outer optimizer; the model has one of everything that a head owns."""
    torch.manual_seed(weights)
    layers = nn.Linear(6, 70), nn.BatchNorm1d(70), nn.Dropout(0.2), nn.Tanh(), nn.Linear(70, 3)
    options = dict(heads=4, r=R, lora_alpha=ALPHA, base=base) | options
    model = lte.convert(nn.Sequential(*layers), **options)
    optimizer, outer_optimizer = torch.optim.AdamW(model.parameters(), rate), None
    if outer:
        rates = dict(lr=0.07 / rate, momentum=0.5, nesterov=True)  # 0.7 where the rate is 0.01
        outer_optimizer = torch.optim.SGD(lte.outer_parameters(model), **rates)
    return model, optimizer, outer_optimizer


def go_on(run, first, last=9, T=3, reset="none"):
    """Steps first .. last with a merge every T: what all processes hold, and this one's heads."""
    (model, optimizer, outer), (rank, world) = run, lte.processes()
    for k in range(first, last + 1):
        g = torch.Generator().manual_seed(k)
        x = torch.randn(4 * B, 6, generator=g).chunk(world)[rank]
        y = torch.randint(3, (4 * B,), generator=g).chunk(world)[rank]
        step(model, optimizer, x, y)
        if k % T == 0:
            options = dict(decay=0.99, reset=reset, outer_optimizer=outer)
            lte.merge(model, optimizer=optimizer, **options)
    heads = {name: p.detach().clone() for name, p in model.named_parameters()}
    return lte.merged_state_dict(model), heads


def save_through_a_cycle(folder, base, outer, piece):
    with mock.patch.object(lte, "PIECE", piece):
        run = a_run(base, outer)
        go_on(run, 1, 3)
        for k in (4, 5, 6):
            go_on(run, k, k)
            lte.save(Path(folder, f"{k} by {lte.processes()[1]}"), *run, step=k)
        return go_on(run, 7)


def load_and_end(folder, names, base, outer, piece):
    """Each run is begun with other weights, rates and a random state of its own."""
    with mock.patch.object(lte, "PIECE", piece):
        runs = [a_run(base, outer, rate=0.1, weights=1) for _ in names]
        pairs = zip(names, runs, strict=True)
        steps = [lte.load(Path(folder, name), *run)["step"] for name, run in pairs]
        return [go_on(run, done + 1) for done, run in zip(steps, runs, strict=True)]


@pytest.mark.parametrize(
    "base, outer, piece, shift",
    [("fp32", False, 4096, 0), ("fp32", True, 2, 1), ("nf4", True, 4, 2)],
)
def test_saved_at_any_step_by_any_processes_any_go_on_as_if_never_stopped(
    tmp_path, base, outer, piece, shift
):
    """Bit for bit, from 1, 2, 4 processes to 1, 2, 4, over the settings each at every step."""
    setting, worlds = (base, outer, piece), (1, 2, 4)
    with mock.patch.object(lte, "PIECE", piece):  # tensors of up to 4 pieces
        export, heads = go_on(a_run(base, outer), 1)
    for world in worlds:
        for theirs, _ in on_processes(world, save_through_a_cycle, tmp_path, *setting):
            same(theirs, export)
    for i, world in enumerate(worlds):
        names = [f"{4 + (i + j + shift) % 3} by {w}" for j, w in enumerate(worlds)]
        ranks = on_processes(world, load_and_end, tmp_path, names, *setting)
        for ends in zip(*ranks, strict=True):  # of every rank
            assert all(torch.equal(end[0][n], export[n]) for end in ends for n in export)
            same({n: torch.cat([end[1][n] for end in ends]) for n in heads}, heads)


OPTIMIZERS = {
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr, betas=(0.8, 0.9), amsgrad=True),
    "SGD": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "SGD without momentum": torch.optim.SGD,
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr, centered=True, momentum=0.5),
    "Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr, initial_accumulator_value=0.1),
    "NAdam": torch.optim.NAdam,
    "Adamax": torch.optim.Adamax,
    "Rprop": torch.optim.Rprop,
    "Adadelta": torch.optim.Adadelta,
    "ASGD": torch.optim.ASGD,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizers_state_comes_back(tmp_path, name):
    runs = []
    for weights, lr in ((0, 0.01), (1, 0.5)):
        model = a_run(weights=weights)[0]
        runs.append((model, OPTIMIZERS[name](model.parameters(), lr), None))
    go_on(runs[0], 1, 4)
    lte.save(tmp_path, *runs[0], step=4)
    lte.load(tmp_path, *runs[1])
    same(runs[1][1].state_dict(), runs[0][1].state_dict())
    same(go_on(runs[1], 5), go_on(runs[0], 5))


def test_a_momentum_that_is_none_yet_stays_none(tmp_path):
    (saved, _, _), (loaded, _, _) = a_run(), a_run()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (saved, loaded)]
    for p in saved.parameters():
        optimizers[0].state[p]["momentum_buffer"] = None
    lte.save(tmp_path, saved, optimizers[0], step=0)
    lte.load(tmp_path, loaded, optimizers[1])
    states = optimizers[1].state.values()
    assert [s["momentum_buffer"] for s in states] == [None] * len(list(saved.parameters()))
    same(go_on((loaded, optimizers[1], None), 1), go_on((saved, optimizers[0], None), 1))


def test_the_values_of_parameter_groups_come_back(tmp_path):
    def grouped(rates, betas):
        model = a_run()[0]
        layers = zip((model[0], model[4]), rates, strict=True)
        groups = [dict(params=layer.parameters(), lr=rate) for layer, rate in layers]
        return model, torch.optim.AdamW(groups, betas=betas, weight_decay=rates[0])

    (model, optimizer), (other, another) = grouped((1, 2), (0.5, 0.6)), grouped((3, 4), (0.7, 0.8))
    lte.save(tmp_path, model, optimizer, step=0)
    lte.load(tmp_path, other, another)
    assert another.param_groups[1].pop("params") and optimizer.param_groups[1].pop("params")
    assert another.param_groups[1] == optimizer.param_groups[1]
    assert another.param_groups[0]["lr"] == 1 and another.param_groups[0]["betas"] == (0.5, 0.6)


def test_an_outer_adam_comes_back(tmp_path):
    runs = [a_run("nf4"), a_run("nf4", weights=1)]
    runs = [(m, o, torch.optim.Adam(lte.outer_parameters(m), 1e-3)) for m, o, _ in runs]
    go_on(runs[0], 1, 4)
    lte.save(tmp_path, *runs[0], step=4)
    lte.load(tmp_path, *runs[1])
    same(go_on(runs[1], 5), go_on(runs[0], 5))


def a_plain_run(weights=0):
    torch.manual_seed(weights)
    model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 3), nn.Flatten(0))
    return model, torch.optim.AdamW(model.parameters(), 0.01 * (1 + weights))


def go_on_plain(run, first, last=6):
    model, optimizer = run
    for k in range(first, last + 1):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=torch.Generator().manual_seed(k))).norm().backward()
        optimizer.step()
    return model.state_dict()


def save_plain(folder):
    run = a_plain_run()
    go_on_plain(run, 1, 3)
    lte.save(folder, *run, step=3)


@pytest.mark.parametrize("world", [1, 2])
def test_a_plain_model_is_saved_and_loaded_too(tmp_path, world):
    """As dense training needs it, by any number of processes."""
    on_processes(world, save_plain, tmp_path)
    run = a_plain_run(weights=1)
    assert lte.load(tmp_path, *run) == {"step": 3}
    same(go_on_plain(run, 4), go_on_plain(a_plain_run(), 1))


def save_with_empty_parts(folder):
    """Process 2 of 3 has no row of a tensor of up to 128 weights, and nothing of it to save."""
    model, optimizer, _ = a_run(heads=3)
    outer = torch.optim.Adagrad(lte.outer_parameters(model), 0.1)
    lte.merge(learn(model), outer_optimizer=outer)
    lte.save(folder, model, optimizer, outer, step=1)
    return lte.merged_state_dict(learn(model))


def test_a_process_without_a_part_of_some_tensor_saves_too(tmp_path):
    ends = on_processes(3, save_with_empty_parts, tmp_path)
    model, optimizer, _ = a_run(heads=3)
    outer = torch.optim.Adagrad(lte.outer_parameters(model), 0.1)
    assert lte.load(tmp_path, model, optimizer, outer) == {"step": 1}
    same(lte.merged_state_dict(model), ends[0])


def test_a_schedule_may_begin_after_a_checkpoint(tmp_path):
    """It gives the optimizer's groups an entry that the saved ones lack."""
    (saved, loaded), rates = (a_run()[:2], a_run()[:2]), []
    lte.save(tmp_path, *saved, step=3)
    schedule = torch.optim.lr_scheduler.LambdaLR(loaded[1], lambda k: 1 / (1 + k))
    lte.load(tmp_path, *loaded)
    for _ in range(2):
        step(*loaded, torch.randn(4 * B, 6), torch.zeros(4 * B, dtype=torch.long))
        schedule.step()
        rates.append(loaded[1].param_groups[0]["lr"])
    assert rates == pytest.approx([0.01 / 2, 0.01 / 3])


@pytest.mark.parametrize("base", ["fp32", "int8"])
def test_every_kind_of_owner_comes_back(tmp_path, base):
    """Patches, attention, class token, norms, dense and frozen layers of a vision transformer."""
    x, y = torch.randn(N * B, 3, 8, 8), torch.arange(N * B) % 6

    def begin(seed):
        model = convert(learn(everything(), seed), bare="heads", base=base, skip=["1"])
        return model, torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 0.01)

    saved, loaded = begin(1), begin(2)
    for _ in range(2):
        step(*saved, x, y)
        lte.merge(saved[0])
    step(*saved, x, y)
    lte.save(tmp_path, *saved, step=3)
    lte.load(tmp_path, *loaded)
    for run in (saved, loaded):
        step(*run, x, y)
        lte.merge(run[0])
    same(snapshot(loaded[0]), snapshot(saved[0]))


def test_the_model_alone_can_be_saved_and_loaded(tmp_path):
    run, other = a_run("nf4"), a_run("nf4", weights=1)
    go_on(run, 1, 4)
    lte.save(tmp_path, run[0], step=4)
    lte.load(tmp_path, other[0])
    same(snapshot(other[0]), snapshot(run[0]))


def test_a_compiled_models_checkpoint_is_that_of_the_model(tmp_path):
    for compiled in (True, False):
        run, other = a_run(), a_run(weights=1)
        saves, loads = (torch.compile(m) if c else m for m, c in
                        ((run[0], compiled), (other[0], not compiled)))
        go_on(run, 1, 4)
        lte.save(tmp_path / str(compiled), saves, run[1], step=4)
        lte.load(tmp_path / str(compiled), loads, other[1])
        same(go_on(other, 5), go_on(run, 5))


def save_a_single_layer(folder):
    torch.manual_seed(0)
    model = lte.convert(nn.Linear(6, 3), heads=4, r=R, lora_alpha=ALPHA)
    run = model, torch.optim.AdamW(model.parameters(), 0.01), None
    go_on(run, 1, 4)
    lte.save(folder, *run, step=4)
    return go_on(run, 5)


def load_a_single_layer(folder):
    model = lte.convert(nn.Linear(6, 3), heads=4, r=R, lora_alpha=ALPHA)
    run = model, torch.optim.AdamW(model.parameters(), 0.01), None
    lte.load(folder, *run)
    return go_on(run, 5)


def test_a_layer_converted_by_itself_is_saved_head_by_head_too(tmp_path):
    export, _ = save_a_single_layer(tmp_path / "1")
    on_processes(2, save_a_single_layer, tmp_path / "2")
    for saved in "12":
        for theirs, _ in on_processes(2, load_a_single_layer, tmp_path / saved):
            same(theirs, export)


def export_of_three():
    """Pieces of 4 rows for 3 processes, which keep 2, 2 and none; the last piece has 3."""
    with mock.patch.object(lte, "PIECE", 4):
        torch.manual_seed(0)
        model = lte.convert(nn.Linear(6, 70), heads=3, r=R, lora_alpha=ALPHA, base="nf4")
        return lte.merged_state_dict(model)


def test_pieces_that_do_not_divide_among_the_processes_lose_no_row():
    """For section 3; the same with PIECE = 4096 rows, 3 processes and 600 x 600 weights."""
    export = lte.merged_state_dict(a_run()[0])
    for theirs in on_processes(3, export_of_three):
        assert all(torch.equal(theirs[name], export["0." + name]) for name in theirs)


# ---- whole, or not there ----


class Died(BaseException):
    """Nobody catches it, so that what is left behind is what a kill would leave."""


def die(*_, **__):
    raise Died


def exit_now(*_, **__):
    os._exit(9)


def steps_in(folder):
    """The checkpoints in a folder, the newest first; each must be whole."""
    found = lte.checkpoints(folder)
    assert not any(map(lte.damage, found))
    return [int(path.name[5:]) for path in found]


DEATHS = {
    "before anything is written": (dcp, "save"),
    "before the metadata": (dcp.FileSystemWriter, "finish"),
    "before it is finished": (lte, "finish_checkpoint"),
    "before meta.json": (Path, "write_text"),
    "before it has its name": (os, "replace"),
}


@pytest.mark.parametrize("when", DEATHS)
def test_a_checkpoint_is_whole_or_not_there(tmp_path, when, monkeypatch):
    run = a_run()
    for k in (1, 2):
        go_on(run, k, k)
        lte.save(tmp_path, *run, step=k)
    with monkeypatch.context() as patched, pytest.raises((Died, OSError)):
        patched.setattr(*DEATHS[when], die)
        lte.save(tmp_path, *run, step=3)
    assert steps_in(tmp_path) == [2, 1]
    other = a_run(weights=1)
    assert lte.load(tmp_path, *other)["step"] == 2
    same(go_on(other, 3), go_on(run, 3))
    lte.save(tmp_path, *other, step=3)
    assert steps_in(tmp_path) == [3, 2] and len(list(tmp_path.iterdir())) == 2


def die_in_the_middle(folder):
    run = a_run()
    for k in (1, 2):
        go_on(run, k, k)
        if k == 2 and lte.processes()[0] == 1:
            dcp.save = exit_now
        lte.save(folder, *run, step=k)


def test_where_one_process_dies_in_a_save_the_others_say_so_and_the_last_one_stays(tmp_path):
    with pytest.raises(AssertionError, match="ProcessLost: .*step_00000002.*another process has"):
        on_processes(2, die_in_the_middle, tmp_path)
    assert steps_in(tmp_path) == [1]
    run = a_run()
    lte.load(tmp_path, *run)
    lte.save(tmp_path, *run, step=2)
    assert steps_in(tmp_path) == [2, 1]


def test_the_last_two_checkpoints_stay_and_nothing_else(tmp_path):
    run = a_run()
    for k in (8, 9, 10, 100, 100):  # the last one twice: it is replaced
        lte.save(tmp_path, *run, step=k)
        assert steps_in(tmp_path)[0] == k
    assert steps_in(tmp_path) == [100, 10] and len(list(tmp_path.iterdir())) == 2


def test_checkpoints_are_told_apart_by_number(tmp_path):
    run = a_run()
    for k in (99_999_999, 100_000_000):
        lte.save(tmp_path, *run, step=k)
    assert steps_in(tmp_path) == [100_000_000, 99_999_999]


def die_removing(path, **_):
    """shutil.rmtree; but of what was a checkpoint only the name is gone."""
    if path.suffix != ".new":
        raise Died


def test_one_that_is_being_removed_has_lost_its_name_first(tmp_path, monkeypatch):
    run = a_run()
    for k in (1, 2):
        lte.save(tmp_path, *run, step=k)
    monkeypatch.setattr(shutil, "rmtree", die_removing)
    with pytest.raises(Died):
        lte.save(tmp_path, *run, step=3)
    assert steps_in(tmp_path) == [3, 2]


def test_what_a_kill_left_of_a_removed_checkpoint_is_no_obstacle(tmp_path, monkeypatch):
    """Killed while 3 was removed, by a run that had gone back; later 3 is removed once more."""
    run = a_run()
    for k in (2, 3):
        lte.save(tmp_path, *run, step=k)
    with monkeypatch.context() as patched, pytest.raises(Died):
        patched.setattr(shutil, "rmtree", die_removing)
        lte.save(tmp_path, *run, step=3)
    for k in (3, 4, 5, 6):
        lte.save(tmp_path, *run, step=k)
    assert steps_in(tmp_path) == [6, 5] and len(list(tmp_path.iterdir())) == 2


def test_a_run_that_has_gone_back_removes_what_lay_ahead(tmp_path):
    run = a_run()
    for k in (2, 4):
        lte.save(tmp_path, *run, step=k)
    (tmp_path / "step_00000004" / ".metadata").unlink()
    with pytest.warns(UserWarning, match="step_00000004 is not whole .*trying the one before it"):
        assert lte.load(tmp_path, *run, previous=True)["step"] == 2
    lte.save(tmp_path, *run, step=3)
    assert steps_in(tmp_path) == [3, 2]


def save_somewhere_else(folder):
    lte.save(Path(folder, str(lte.processes()[0])), *a_run(), step=1)


def test_a_directory_that_processes_do_not_share_is_found_out(tmp_path):
    with pytest.raises(AssertionError, match=r"lacks __1_0.distcp, which other processes wrote"):
        on_processes(2, save_somewhere_else, tmp_path)
    assert not steps_in(tmp_path / "0")


def load_another(folder):
    with pytest.raises(ValueError) as error:
        lte.load(Path(folder, str(lte.processes()[0])), *a_run())
    return str(error.value)


def test_processes_that_find_different_checkpoints_all_refuse(tmp_path):
    for rank in (0, 1):
        lte.save(tmp_path / str(rank), *a_run(), step=rank + 1)
    for said in on_processes(2, load_another, tmp_path):
        assert "process 1 has checkpoint = 'step_00000002', process 0 has 'step_00000001'" in said


# ---- what is refused ----


def refused(error, says, folder, run, **options):
    """load raises, in these words, and changes nothing."""
    model, optimizer, _ = run
    layout = lte.layout_of(model)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), layout.merges))
    with pytest.raises(error, match=says):
        lte.load(folder, *run, **options)
    same((model.state_dict(), optimizer.state_dict(), layout.merges), kept)


def save_one(folder, *run):
    run = run or a_run()
    go_on(run, 1, 3)
    lte.save(folder, *run, step=3)


@pytest.mark.filterwarnings("ignore:.*is not whole")
@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_with_any_file_missing_or_cut_short_is_refused(tmp_path, world):
    on_processes(world, save_one, tmp_path)
    run = a_run()
    go_on(run, 1, 1)
    files = list((tmp_path / "step_00000003").iterdir())
    assert len(files) == 2 + world
    for path in files:
        whole = path.read_bytes()
        for left in (None, whole[:-1], b""):
            path.unlink() if left is None else path.write_bytes(left)
            refused(ValueError, "step_00000003 is not whole .*previous=True takes", tmp_path, run)
            refused(ValueError, "is not whole.*there is no other", tmp_path, run, previous=True)
            path.write_bytes(whole)
    assert lte.load(tmp_path, *run)["step"] == 3


def test_previous_takes_the_newest_whole_one_and_says_so(tmp_path):
    run = a_run()
    for k in (1, 2):
        go_on(run, k, k)
        lte.save(tmp_path, *run, step=k)
    other = a_run(weights=1)
    assert lte.load(tmp_path, *other, previous=True)["step"] == 2  # whole: no need
    (tmp_path / "step_00000002" / "__0_0.distcp").write_text("")
    with pytest.warns(UserWarning, match=r"step_00000002 is not whole \(__0_0.distcp has 0 of"):
        assert lte.load(tmp_path, *other, previous=True)["step"] == 1
    same(go_on(other, 2), go_on(a_run(), 1))


def test_without_previous_a_broken_checkpoint_is_an_error_and_no_warning(tmp_path):
    save_one(tmp_path)
    (tmp_path / "step_00000003" / "__0_0.distcp").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(ValueError, "__0_0.distcp has 0 of", tmp_path, a_run())


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_checkpoints_is_not_found(tmp_path, there):
    folder = tmp_path if there else tmp_path / "nothing"
    (tmp_path / "step_00000001.new").mkdir()
    refused(FileNotFoundError, "holds no checkpoint .*train from the start", folder, a_run())


@pytest.mark.parametrize(
    "other, says",
    [
        (dict(heads=2), "saved with heads = 4, but this run has 2"),
        (dict(seed=7), "saved with seed = 0, but this run has 7"),
        (dict(parallel=False), "saved with parallel = True, but this run has False"),
        (dict(r=1, lora_alpha=1.5), "saved with 0.weight = .* r 2, .* but this run has .* r 1"),
        (dict(lora_alpha=4), "saved with 0.weight = .*scaling 1.5.* but this run has .*scaling 2"),
        (dict(base="nf4"), "saved with 0.weight = .*base fp32, but this run has .*base nf4"),
        (dict(r=None), "saved with 0.weight = .* r 2, .* but this run has .*copied"),
        (dict(skip=["4"]), "saved with 4.weight = .* but this run has None"),
    ],
)
def test_a_checkpoint_of_another_setting_is_refused(tmp_path, other, says):
    save_one(tmp_path, *a_run())
    refused(ValueError, says, tmp_path, a_run(**other))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_one(tmp_path, *a_run())
    for model, says in (
        (nn.Sequential(nn.Linear(6, 71)), r"0.weight = \(70, 6\) .* but this run has \(71, 6\)"),
        (nn.Sequential(nn.Linear(6, 70).double()), "float32, .* but this run has .*float64"),
        (nn.Linear(6, 70), "0.weight = .* but this run has None"),
    ):
        model = convert(model, heads=4)
        refused(ValueError, says, tmp_path, (model, torch.optim.AdamW(model.parameters()), None))
    with pytest.raises(ValueError, match="heads = 4, but this run has None"):
        lte.load(tmp_path, nn.Linear(6, 70))


def test_a_plain_models_checkpoint_does_not_fit_a_converted_one(tmp_path):
    lte.save(tmp_path, nn.Linear(6, 70), step=1)
    refused(ValueError, "was saved with .* = ", tmp_path, a_run())
    with pytest.raises(ValueError, match=r"\(70, 6\), but this run has \(71, 6\)"):
        lte.load(tmp_path, nn.Linear(6, 71))


@pytest.mark.parametrize(
    "name",
    [
        *("SGD", "RMSprop", "Adagrad", "NAdam", "Rprop", "ASGD"),
        "Adamax",
    ],
)
def test_the_state_of_another_optimizer_is_refused(tmp_path, name):
    save_one(tmp_path, *a_run())
    model, _, _ = a_run()
    run = model, OPTIMIZERS[name](model.parameters(), 0.1), None
    refused(ValueError, "was saved with optimizer ", tmp_path, run)


def test_an_optimizer_with_other_groups_or_none_before_is_refused(tmp_path):
    model, optimizer, _ = run = a_run()
    lte.save(tmp_path / "none", model, step=1)
    refused(ValueError, "was saved with optimizer ", tmp_path / "none", run)
    save_one(tmp_path / "plain", *run)
    refused(ValueError, "was saved with optimizer ", tmp_path / "plain", a_run(outer=True))
    groups = [dict(params=part.parameters()) for part in (model[0], model[1], model[4])]
    run = model, torch.optim.AdamW(groups), None
    refused(ValueError, "was saved with optimizer ", tmp_path / "plain", run)


def test_what_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="extra values must fit json: .*set"):
        lte.save(tmp_path, *a_run(), step=1, seen={1, 2})
    assert not list(tmp_path.iterdir())


def test_state_that_is_not_of_a_heads_own_is_refused_and_nothing_is_written(tmp_path):
    model, _, _ = a_run()
    run = model, torch.optim.Adafactor(model.parameters()), None
    go_on(run, 1, 1)
    with pytest.raises(ValueError, match=r"optimizer's row_var of 0.lora_A is \(4, 2, 1\)"):
        lte.save(tmp_path, *run, step=1)
    assert not list(tmp_path.iterdir())


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    run, (other, _, _) = a_run(), a_run()
    save_one(tmp_path, *run)
    save, load = functools.partial(lte.save, step=4), lte.load
    for call in (save, load):
        with pytest.raises(ValueError, match="holds parameters that are not this model's"):
            call(tmp_path, other, run[1])
        with pytest.raises(ValueError, match="does not hold this model's outer parameters"):
            call(tmp_path, other, None, a_run(outer=True)[2])
    assert steps_in(tmp_path) == [3]


def test_a_model_with_a_dropout_that_the_checkpoint_has_not_is_refused(tmp_path):
    models = [nn.Sequential(nn.Linear(6, 7), nn.Dropout(p), nn.Linear(7, 3)) for p in (0, 0.1)]
    models = [convert(model, heads=4) for model in models]
    runs = [(model, torch.optim.AdamW(model.parameters()), None) for model in models]
    save_one(tmp_path, *runs[0])
    refused(ValueError, "1", tmp_path, runs[1])  # names the layer


def test_a_frozen_layer_of_another_shape_is_refused(tmp_path):
    """Of a skipped layer no head owns anything, but the model needs it."""
    models = [nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 3 + k), nn.Flatten()) for k in (0, 1)]
    models = [convert(model, heads=4, skip=["1"]) for model in models]
    runs = [(m, torch.optim.AdamW(m[0].parameters()), None) for m in models]
    save_one(tmp_path, *runs[0])
    refused(ValueError, "1.weight", tmp_path, runs[1])


# ---- merges, and what else comes back ----


@pytest.mark.parametrize(
    "call", [functools.partial(lte.save, step=1), lte.load], ids=["save", "load"]
)
def test_nothing_is_saved_or_loaded_while_a_merge_is_in_flight(tmp_path, call):
    model, optimizer, _ = run = a_run()
    lte.save(tmp_path, *run, step=0)
    work = lte.merge(model, optimizer=optimizer, async_op=True)
    with pytest.raises(RuntimeError, match="(save|load) while a merge is in flight"):
        call(tmp_path, *run)
    assert steps_in(tmp_path) == [0]
    work.wait()
    call(tmp_path, *run)


def test_step_and_extra_come_back_as_they_were_given(tmp_path):
    extra = dict(losses=[0.1, 1e-300, math.inf], flags={"lr": None, "bf16": True}, name="déjà")
    lte.save(tmp_path, *a_run(), step=12, **extra)
    assert lte.load(tmp_path, *a_run()) == {"step": 12, **extra}


def test_the_counts_of_merges_and_of_what_they_left_out_come_back(tmp_path):
    model, optimizer, _ = run = a_run()
    go_on(run, 1, 3)
    model[0].lora_A.data[2] = math.nan
    with pytest.warns(UserWarning, match="head 2 of 4"):
        lte.merge(model, optimizer=optimizer)
    lte.save(tmp_path, *run, step=3)
    other = a_run()
    lte.load(tmp_path, *other)
    layout = lte.layout_of(other[0])
    assert (layout.merges, layout.left_out) == (2, 1)


def count_again(folder):
    run = a_run()
    go_on(run, 1, 3)
    lte.save(folder, *run, step=3)
    sent, other = lte.layout_of(run[0]).bytes_sent, a_run()
    lte.load(folder, *other)
    return sent, lte.layout_of(other[0]).bytes_sent


def test_the_count_of_bytes_goes_on_from_where_it_was(tmp_path):
    """What is sent to load is not counted as sent by merges."""
    for sent, loaded in on_processes(2, count_again, tmp_path):
        assert sent == loaded > 0


@pytest.mark.parametrize("k", [3, 4])
def test_a_reset_after_a_load_draws_the_A_it_would_have_drawn(tmp_path, k):
    run, other = a_run(), a_run(weights=1)
    go_on(run, 1, k, reset="AB")
    lte.save(tmp_path, *run, step=k)
    lte.load(tmp_path, *other)
    same(go_on(other, k + 1, 7, reset="AB"), go_on(run, k + 1, 7, reset="AB"))
    same(other[0][0].lora_A, run[0][0].lora_A)


def test_a_save_changes_nothing(tmp_path):
    model, optimizer, outer = run = a_run("nf4", outer=True)
    go_on(run, 1, 4)
    kept = [copy.deepcopy(part.state_dict()) for part in run]
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    lte.save(tmp_path, *run, step=4)
    same([part.state_dict() for part in run], kept)
    same(torch.rand(1), drawn)


# ------------------------------------------------------------------------------------------------
# 10 export and counts
# ------------------------------------------------------------------------------------------------


def everything():
    """A plain model with parameters, buffers and names of all sorts, in float32."""
    torch.manual_seed(0)
    return nn.Sequential(vit(dtype=torch.float32), nn.Linear(10, 6), nn.BatchNorm1d(6), nn.PReLU())


@pytest.mark.parametrize("base", lte.BASES)
def test_the_export_has_the_plain_models_names_order_and_types(base):
    model = seasoned(everything(), bare="heads", base=base, skip=["1"])
    exported, plain = lte.merged_state_dict(model), everything().state_dict()
    assert [(n, t.dtype, t.shape) for n, t in exported.items()] == [
        (n, t.dtype, t.shape) for n, t in plain.items()
    ]
    assert not any(t.requires_grad for t in exported.values())


@pytest.mark.parametrize("base", ["fp32", "bf16", "int8", "nf4"])
def test_the_exported_model_computes_what_eval_does_up_to_the_rounding_of_W(base):
    model, x = convert(everything(), bare="heads", base=base), torch.randn(N * B, 3, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(3):
        step(model, optimizer, x, torch.arange(N * B) % 6)
    lte.merge(model)
    plain = everything()
    plain.load_state_dict(lte.merged_state_dict(model))
    y, expected = model.eval()(x), plain.eval()(x)
    error = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.1, "nf4": 0.6}[base]
    assert (y - expected).norm() / expected.norm() < error


def test_what_was_learnt_since_the_last_merge_is_not_in_the_export():
    model = convert(net())
    before = lte.merged_state_dict(model)
    learn(model)
    same(lte.merged_state_dict(model), before)


@pytest.mark.parametrize("base", lte.BASES)
def test_the_export_is_a_copy(base):
    model = seasoned(net().float(), base=base)
    exported = lte.merged_state_dict(model)
    before = snapshot(model)
    for tensor in exported.values():
        tensor += 1
    same(snapshot(model), before)


@pytest.mark.parametrize("base", ["fp32", "nf4"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_converted_model_lives_its_own_life(duplicate, base):
    model, x = seasoned(everything(), bare="heads", base=base), torch.randn(N * B, 3, 8, 8)
    twin, before = duplicate(model), snapshot(model)
    same(twin(x), duplicate(model)(x))
    lte.merge(twin)
    merged = lte.merged_state_dict(twin)
    same(snapshot(model), before)
    lte.merge(model)
    same(
        {k: v for k, v in lte.merged_state_dict(model).items() if "2." != k[:2]},
        {k: v for k, v in merged.items() if "2." != k[:2]},
    )


@pytest.mark.parametrize("base", ["fp32", "int8", "nf4"])
def test_a_converted_models_state_reloads_into_another(base):
    model, other = (seasoned(net().float(), base=base) for _ in range(2))
    learn(model, seed=8)
    lte.merge(model)
    learn(model, seed=9)
    other.load_state_dict(model.state_dict())
    x = batch()[0].float()
    same(other(x), model(x))
    same(other.eval()(x), model.eval()(x))


def of_all_kinds(base):
    layers = nn.Linear(10, 101), nn.LayerNorm(101), nn.Linear(101, 33), nn.Linear(33, 3)
    options = dict(heads=4, r=4, lora_alpha=8, base=base)
    return lte.convert(nn.Sequential(*layers), skip=["2"], **options)


def held(base, optimizer, outer):
    """(what cost_report says, what is really there) after two steps with a merge each."""
    model = of_all_kinds(base)
    inner = optimizer(model.parameters())
    outer = nesterov(model) if outer else None
    said = lte.cost_report(model, inner, outer_optimizer=outer)["held"]
    x = torch.randn(lte.layout_of(model).local * B, 10)
    for _ in range(2):
        model(x).square().sum().backward()
        inner.step()
        lte.merge(model, outer_optimizer=outer)
    state = [v for o in (inner, outer) if o for s in o.state.values() for v in s.values()]
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    tensors += [v for v in state if torch.is_tensor(v)]
    storages = [t.untyped_storage() for t in tensors if t is not None]
    said["all of it"] = sum(said[kind] for kind in said if kind != "all")
    return said, sum({storage.data_ptr(): len(storage) for storage in storages}.values())


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("base", lte.BASES)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD], ids=["AdamW", "SGD"])
def test_the_bytes_held_are_those_that_the_tensors_take(optimizer, base, outer):
    said, there = held(base, optimizer, outer)
    assert said["all"] == said["all of it"] == there


def test_an_outer_adam_has_its_numbers_for_every_piece(monkeypatch):
    def adam(model):
        return torch.optim.AdamW(lte.outer_parameters(model))

    monkeypatch.setattr(lte, "PIECE", 7)
    monkeypatch.setattr(sys.modules[__name__], "nesterov", adam)
    said, there = held("nf4", torch.optim.AdamW, True)
    assert said["all"] == there


def test_a_step_bears_its_share_of_a_merge_and_dense_training_a_ring():
    model = lte.convert(nn.Linear(10, 384), heads=4, r=2, lora_alpha=8)
    sent = lte.cost_report(model, workers=4, merge_every=5)["sent"]
    assert sent["step"] == sent["merge"] / 5
    assert sent["dense"] == 2 * 4 * (10 * 384 + 384) * 3 / 4


def test_counting_changes_neither_parameters_nor_the_optimizer():
    model = seasoned(net())
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, *batch())
    before = copy.deepcopy((snapshot(model), optimizer.state_dict()))
    lte.cost_report(model, optimizer)
    same((snapshot(model), optimizer.state_dict()), before)


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_what_a_worker_will_hold_is_foretold_from_one_process(base):
    """Process 0 of 1, 2, 4 holds what one process says that a worker would."""
    model = of_all_kinds(base)
    optimizer, outer = torch.optim.AdamW(model.parameters()), nesterov(model)
    for world in (1, 2, 4):
        foretold = lte.cost_report(model, optimizer, outer_optimizer=outer, workers=world)["held"]
        said, there = on_processes(world, held, base, torch.optim.AdamW, True)[0]
        assert foretold["all"] == said["all"] == there


def test_a_worker_of_eight_holds_an_eighth_of_what_dense_adamw_does():
    """An MLP of ViT-L, nf4, r = 32, one head a worker. By the count, bytes a parameter: 0.5625 of
    forward W, 4 / 8 of master, and 5 x 4 (now, then, gradient, two moments) x r (1/o + 1/i) = 0.78.
    """
    layers = nn.Linear(1024, 4096), nn.Linear(4096, 1024)
    model = lte.convert(nn.Sequential(*layers), heads=8, r=32, lora_alpha=64, base="nf4")
    report = lte.cost_report(model, torch.optim.AdamW(model.parameters()), workers=8)
    parameters = 2 * 4096 * 1024 + 4096 + 1024
    assert report["held_dense"]["all"] == 16 * parameters
    assert report["held"]["all"] / parameters == pytest.approx(1.84, abs=0.02)


# ------------------------------------------------------------------------------------------------
# 11 how far apart heads are
# ------------------------------------------------------------------------------------------------


def subspaces(model):
    """Each layer's report in the slow way: every product formed, every pair by itself."""
    report = {}
    for m in lte.merged_tensors(model):
        if not isinstance(m, lte.MultiheadLoRALinear):
            continue
        products = [B @ A for A, B in zip(m.lora_A, m.lora_B, strict=True)]
        rows = [torch.linalg.qr(A.mT).Q for A in m.lora_A]
        cosines, distances = [], []
        for a, b in itertools.combinations(range(len(products)), 2):
            cosines.append(F.cosine_similarity(products[a].flatten(), products[b].flatten(), dim=0))
            angles = torch.linalg.svdvals(rows[a].mT @ rows[b]).clamp(max=1).acos()
            distances.append(angles.norm() / (m.r**0.5 * math.pi / 2))
        p = torch.linalg.svdvals(sum(products))
        p = p[p > 1e-12] / p.sum()
        rank = (-(p * p.log()).sum()).exp()
        means = torch.stack(cosines).mean(), torch.stack(distances).mean(), rank
        names = "cosine", "grassmann", "effective_rank"
        report[m.plain] = {k: v.item() for k, v in zip(names, means, strict=True)}
    return report


@torch.no_grad()
def test_the_subspace_report_equals_its_twin():
    model = seasoned(net())
    report, expected = lte.subspace_report(model), subspaces(model)
    assert list(report) == ["0.weight", "3.weight"]
    for name in expected:
        assert report[name] == pytest.approx(expected[name], rel=1e-9)


@torch.no_grad()
def test_heads_that_are_alike_are_at_distance_0_and_orthogonal_ones_at_1():
    layer = convert(nn.Linear(6, 7, bias=False).double(), heads=3)
    layer.lora_A.copy_(torch.eye(6, dtype=torch.float64).view(3, 2, 6))  # rows share no direction
    layer.lora_B.copy_(torch.randn(3, 7, 2))
    apart = lte.subspace_report(layer)["weight"]
    assert apart["cosine"] == pytest.approx(0, abs=1e-12)
    assert apart["grassmann"] == pytest.approx(1)
    layer.lora_A.copy_(layer.lora_A[:1].expand(3, -1, -1).clone())
    layer.lora_B.copy_(layer.lora_B[:1].expand(3, -1, -1).clone())
    alike = lte.subspace_report(layer)["weight"]
    assert alike["cosine"] == pytest.approx(1) and alike["grassmann"] == pytest.approx(0, abs=1e-7)
    assert alike["effective_rank"] <= 2 + 1e-9 < apart["effective_rank"] <= 6


@torch.no_grad()
def test_equal_float32_heads_are_at_distance_0_too():
    layer = convert(nn.Linear(64, 64), heads=4, r=8)
    layer.lora_A.copy_(torch.randn(8, 64).expand(4, -1, -1))
    assert lte.subspace_report(layer)["weight"]["grassmann"] < 1e-6


@torch.no_grad()
def test_the_effective_rank_counts_equal_directions_and_ignores_what_is_small():
    layer = convert(nn.Linear(4, 4, bias=False).double(), heads=1, r=4)
    layer.lora_A.copy_(torch.eye(4).unsqueeze(0))
    for values, rank in (([1, 1, 1, 1], 4), ([2, 2, 0, 0], 2), ([1, 1e-9, 0, 0], 1)):
        layer.lora_B.copy_(torch.tensor(values).diag().unsqueeze(0))
        assert lte.subspace_report(layer)["weight"]["effective_rank"] == pytest.approx(rank, 1e-6)


def test_what_has_no_value_is_nan():
    one, three = convert(net(), heads=1), convert(net())
    report = lte.subspace_report(learn(one))["0.weight"]
    assert math.isnan(report["cosine"]) and math.isnan(report["grassmann"])
    start = lte.subspace_report(three)["0.weight"]
    assert math.isnan(start["cosine"]) and math.isnan(start["effective_rank"])  # B = 0


def report_of_layout():
    torch.manual_seed(0)
    layers, options = (nn.Linear(10, 33), nn.Linear(33, 3)), dict(heads=4, r=3, lora_alpha=8)
    model = learn_apart(lte.convert(nn.Sequential(*layers), base="int8", **options))
    lte.merged_state_dict(model)
    return lte.subspace_report(model), lte.layout_of(model).bytes_sent


@pytest.mark.parametrize("world", [2, 4])
def test_the_subspace_report_is_the_same_on_every_layout_and_only_merges_count_as_sent(world):
    expected, _ = report_of_layout()
    assert on_processes(world, report_of_layout) == [(expected, 0)] * world


# ------------------------------------------------------------------------------------------------
# train.py: data, schedule, loop, command line
# ------------------------------------------------------------------------------------------------


some_shapes = functools.cache(functools.partial(train.make_shapes, 129, "test"))


@pytest.fixture
def small(monkeypatch):
    """train.py on 96 training and 33 test images of the shapes, so that a run takes a second."""
    x, y = some_shapes()
    options = dict(seed=0, device=torch.device("cpu"), augment="crop-flip")

    def load_data(*_, batch_size, seed=0, **__):
        parts = (x[:96], y[:96]), (x[96:], y[96:])
        options.update(batch_size=batch_size, seed=seed)
        return train.InMemory(*parts, list(train.SHAPES), **options)

    monkeypatch.setattr(train, "load_data", load_data)
    return load_data


def make_tiny(patch):
    """`small`, and a vit-nano of one block."""
    patch.setitem(train.MODELS, "vit-nano", dict(width=32, depth=1, attn_heads=4))
    small.__wrapped__(patch)


@pytest.fixture
def tiny(monkeypatch):
    make_tiny(monkeypatch)


def run_train(out, *flags):
    """main() in this process; returns result.json."""
    train.main(["--batch-size", "16", "--out", str(out), *map(str, flags)])
    return json.loads((out / "result.json").read_text())


def sentence(*flags):
    """What main() says before it ends."""
    with pytest.raises(SystemExit) as ended:
        train.main([str(flag) for flag in flags])
    return str(ended.value)


def test_shapes_are_the_same_on_every_call_and_hold_every_class():
    x, y = train.make_shapes(300, "train")
    again, _ = train.make_shapes(300, "train")
    other, _ = train.make_shapes(300, "test")
    assert x.shape == (300, 3, 32, 32) and x.dtype == torch.uint8
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert set(y.tolist()) == set(range(10))


def test_a_sample_and_its_augmentation_depend_on_step_and_place_alone(small):
    data = small(batch_size=32, seed=3)
    whole = list(data.train_batches(1, 4, torch.arange(32)))
    for first in (0, 8, 16, 24):
        share = list(data.train_batches(1, 4, torch.arange(first, first + 8)))
        for (x, y), (x_share, y_share) in zip(whole, share, strict=True):
            assert torch.equal(x[first : first + 8], x_share)
            assert torch.equal(y[first : first + 8], y_share)
    later = next(iter(data.train_batches(3, 3, torch.arange(32))))
    assert torch.equal(later[0], whole[2][0])  # a step can be reached without the ones before


def test_an_epoch_shows_each_sample_once():
    epoch = torch.cat([train.batch_indices(96, 16, 0, step) for step in range(1, 7)])
    assert sorted(epoch.tolist()) == list(range(96))
    across = train.batch_indices(10, 8, 0, 2)  # two of the first epoch, six of the second
    assert len(set(across[2:].tolist())) == 6
    assert not torch.equal(
        epoch, torch.cat([train.batch_indices(96, 16, 0, s) for s in range(7, 13)])
    )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_counts_each_sample_once(small, world):
    data = small(batch_size=16)
    seen = [y for rank in range(world) for _, y in data.test_batches(rank, world, 5)]
    assert sorted(torch.cat(seen).tolist()) == sorted(data.test[1].tolist())


@pytest.mark.parametrize("every", [1, 3, 7, 50])
def test_merges_happen_at_every_T_steps_and_at_the_end(tiny, tmp_path, monkeypatch, every):
    steps, done = [], []
    step, merge = train.train_step, lte.merge
    monkeypatch.setattr(train, "train_step", lambda *a: (done.append(1), step(*a))[1])
    monkeypatch.setattr(lte, "merge", lambda *a, **k: (steps.append(len(done)), merge(*a, **k))[1])
    run_train(tmp_path, "--steps", 7, "--merge-every", every, "--accumulate", 2)
    assert steps == sorted({*range(every, 8, every), 7})


def test_the_rate_warms_up_falls_to_zero_and_warms_up_again_after_a_reset():
    args = argparse.Namespace(lr=2.0, warmup=10, steps=110, reset="none", merge_every=40)
    rates = [train.learning_rate(step, args) for step in range(1, 111)]
    assert rates[0] == 0.2 and max(rates) == rates[9] == 2.0
    assert rates[9:] == sorted(rates[9:], reverse=True) and 0 < rates[-1] < 0.01
    args.reset = "AB"
    again = [train.learning_rate(step, args) for step in range(1, 111)]
    assert again[:40] == rates[:40] and again[40] < 0.2 * rates[40] and again[79] == rates[79]


def test_weights_decay_at_merges_as_dense_adamw_would_decay_them(tiny, tmp_path, monkeypatch):
    """With no gradient at all, LTE's W and the dense one shrink by the same product."""
    monkeypatch.setattr(train.F, "cross_entropy", lambda x, y, **k: 0 * x.sum(1))
    flags = ("--steps", 5, "--lr", 0.1, "--weight-decay", 0.3, "--merge-every", 2)
    monkeypatch.setattr(train, "evaluate", lambda *a: (0.0, 0.0))
    weights = []
    for method in ("dense", "lte"):
        run_train(tmp_path / method, *flags, "--method", method)
        weights.append(torch.load(tmp_path / method / "model.pt"))
    close(weights[0], weights[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_trains_and_tells_what_it_did(tiny, tmp_path, method, capsys):
    result = run_train(tmp_path, "--method", method, "--steps", 4, "--eval-every", 2)
    expected = "method dataset model heads r merge_every base steps seed test_accuracy test_loss "
    expected += "images_per_second bytes_sent_per_step dense_bytes_per_step seconds torch device"
    assert set(expected.split()) <= result.keys()
    log = (tmp_path / "log.csv").read_text().splitlines()
    assert log[0] == train.Report.COLUMNS and len(log) >= 2 and log[-1].startswith("4,64,")
    plain = train.build_model("vit-nano", classes=10, image_size=32)
    plain.load_state_dict(torch.load(tmp_path / "model.pt"))
    capsys.readouterr()
    train.main(["--eval-only", str(tmp_path / "model.pt")])
    assert f"test_accuracy: {result['test_accuracy']}\n" in capsys.readouterr().out


def test_micro_batches_add_up_to_the_step_of_the_whole_batch(tiny, tmp_path, monkeypatch):
    """With SGD: Adam and clipping would hide a loss that is twice too large."""
    sgd = lambda args, model: torch.optim.SGD(model.parameters(), 1e-3)  # noqa: E731
    monkeypatch.setattr(train, "make_optimizer", sgd)
    for k in (1, 2):
        run_train(tmp_path / str(k), "--steps", 3, "--accumulate", k, "--clip", 1e9)
    whole, parts = (torch.load(tmp_path / str(k) / "model.pt") for k in (1, 2))
    close(whole, parts, rtol=1e-4, atol=1e-6)


def test_a_step_leaves_no_gradient_behind(small):
    args = train.settle(train.parse_args(["--batch-size", "16"]), "lte")
    data, device = small(batch_size=16), torch.device("cpu")
    model = train.make_model(args, data, device)
    x, y = next(data.train_batches(1, 1, torch.arange(16)))
    losses = train.train_step(model, model, train.make_optimizer(args, model), x, y, args)
    assert losses.shape == (4,) and all(p.grad is None for p in model.parameters())


def test_relora_starts_anew_at_every_merge_but_the_last(tiny, tmp_path, monkeypatch):
    resets, merge = [], lte.merge
    monkeypatch.setattr(
        lte, "merge", lambda model, **k: (resets.append(k["reset"]), merge(model, **k))[1]
    )
    run_train(tmp_path, "--method", "relora", "--steps", 6, "--merge-every", 2)
    assert resets == ["AB", "AB", "none"]


@pytest.mark.parametrize("method", ["lora", "mhlora"])
def test_one_that_never_merges_does_not_notice_that_it_is_tested(tiny, tmp_path, method):
    for every in (1, 4):
        run_train(tmp_path / str(every), "--method", method, "--steps", 4, "--eval-every", every)
    often, once = (torch.load(tmp_path / str(every) / "model.pt") for every in (1, 4))
    same(often, once)


def test_compare_prints_one_table(tiny, tmp_path, capsys):
    flags = ["--compare", "dense", "lte", "--steps", "2", "--batch-size", "16"]
    train.main([*flags, "--out", str(tmp_path)])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in table[2:]] == ["dense", "lte"]
    assert (tmp_path / "dense" / "model.pt").exists() and (tmp_path / "lte" / "log.csv").exists()


def save_images(root, size=8, classes=("cat", "dog"), parts=("train", "test")):
    for part, name, i in itertools.product(parts, classes, range(4)):
        folder = root / part / name
        folder.mkdir(parents=True, exist_ok=True)
        pixels = train.lte.generator(part, name, i)
        image = torch.randint(256, (3, size, size), generator=pixels, dtype=torch.uint8)
        v2.functional.to_pil_image(image).save(folder / f"{i}.png")


def test_a_folder_of_small_images_is_read_into_memory(tmp_path):
    save_images(tmp_path)
    options = dict(seed=0, device=torch.device("cpu"), batch_size=4)
    data = train.load_data("folder", tmp_path, **options)
    assert data.classes == ["cat", "dog"] and data.image_size == 8
    assert data.train_size == data.test_size == 8


def test_large_images_are_streamed_and_do_not_depend_on_workers_or_shares(tmp_path):
    save_images(tmp_path, size=80)
    batches = []
    for workers, places in ((0, [0, 1, 2, 3]), (2, [2, 3])):
        options = dict(seed=0, device=torch.device("cpu"), batch_size=4, workers=workers)
        data = train.load_data("folder", tmp_path, **options)
        batches.append(list(data.train_batches(1, 2, torch.tensor(places))))
    for (x, y), (x_share, y_share) in zip(*batches, strict=True):
        assert x.shape == (4, 3, 224, 224)
        assert torch.equal(x[2:], x_share) and torch.equal(y[2:], y_share)


def test_what_is_wrong_with_a_folder_is_said_with_its_name(tmp_path):
    folder = ("--dataset", "folder", "--data", tmp_path)
    said = sentence(*folder)
    assert str(tmp_path) in said and "train/<class>" in said
    save_images(tmp_path)
    broken = tmp_path / "train" / "cat" / "2.png"
    broken.write_bytes(b"not an image")
    assert f"{broken} cannot be read as an image" in sentence(*folder)
    save_images(tmp_path, classes=("emu",), parts=("test",))
    assert "must hold the same classes" in (said := sentence(*folder)) and "emu" in said


def test_missing_data_says_where_it_goes_or_how_to_get_it(tmp_path):
    for name, hint in (("cifar10", "--download"), ("imagenet", "ILSVRC2012"), ("sun397", "SUN397")):
        said = sentence("--dataset", name, "--data", tmp_path)
        assert str(tmp_path) in said and hint in said and "\n" not in said


def test_a_model_file_of_another_model_is_refused(tiny, tmp_path):
    run_train(tmp_path, "--steps", 1)
    said = sentence("--eval-only", tmp_path / "model.pt", "--patch", 16)
    assert "is not a model.pt of vit-nano on shapes" in said and "--patch" in said
    assert "no_such.pt" in sentence("--eval-only", tmp_path / "no_such.pt")
    for text in ("", "not a model"):
        (tmp_path / "model.pt").write_text(text)
        assert "is not a model.pt" in sentence("--eval-only", tmp_path / "model.pt")


def test_weights_that_are_not_numbers_are_found_before_a_merge():
    """A step with a finite loss may make them; here in head 2 of the second of two processes."""
    model, args = convert(nn.Linear(IN, OUT), heads=4), argparse.Namespace(rank=1, method="lte")
    train.check_finite([torch.ones(4)], 7, model, args)
    model.lora_B.data[2, 1] = math.nan
    with pytest.raises(FloatingPointError, match="lora_B of head 6 is not finite after step 7"):
        train.check_finite([torch.ones(4)], 7, model, args)


@pytest.mark.parametrize("method", ["lte", "dense"])
def test_a_model_that_is_of_no_use_is_not_saved(tiny, tmp_path, method):
    flags = ("--steps", 1, "--warmup", 0, "--lr", 1e30, "--batch-size", 16, "--out", tmp_path)
    assert "after step 1 the test loss is nan" in sentence("--method", method, *flags)
    assert not (tmp_path / "model.pt").exists()


# ------------------------------------------------------------------------------------------------
# train.py: benchmark, plans, presets, studies
# ------------------------------------------------------------------------------------------------


def test_the_interval_between_merges_grows_from_1_to_T():
    def steps(T, warmup):
        args = argparse.Namespace(steps=30, merge_every=T, merge_warmup=warmup)
        return sorted(train.merge_steps(args))

    assert steps(4, 0) == [4, 8, 12, 16, 20, 24, 28, 30]
    assert steps(4, 16) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 22, 26, 30]


def test_with_the_full_batch_every_head_gets_all_samples_and_without_its_share(
    tiny, tmp_path, monkeypatch
):
    seen, train_step = [], train.train_step

    def spy(model, forward, optimizer, x, y, args):
        seen.append((x, y))
        return train_step(model, forward, optimizer, x, y, args)

    monkeypatch.setattr(train, "train_step", spy)
    for flags in ((), ("--full-batch",)):
        run_train(tmp_path / str(len(flags)), "--steps", 1, *flags)
    (x, y), full = seen
    same(full, (x.repeat(4, 1, 1, 1), y.repeat(4)))


def test_with_the_full_batch_a_process_repeats_it_for_its_own_heads(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    places = []

    def stop(self, first, last, of_process):
        places.append(of_process)
        raise Died

    monkeypatch.setattr(train.InMemory, "train_batches", stop)
    flags = ["--full-batch", "--batch-size", "16", "--out", str(tmp_path)]
    args = train.settle(train.parse_args(flags), "lte")
    with pytest.raises(Died):
        train.train(args, train.load_data(batch_size=16), torch.device("cpu"))
    same(places[0], torch.arange(16).repeat(2))
    assert not train.settle(args, "mhlora").full_batch
    args.no_master = True
    assert not train.settle(args, "localsgd").no_master


def test_on_the_full_batch_lte_merged_at_every_step_is_multi_head_lora(tiny, tmp_path):
    """Promise 3, by way of train.py; Adam's eps and the clipping of each head are what differs."""
    flags = ("--steps", 4, "--weight-decay", 0, "--clip", 1e9, "--warmup", 0)
    run_train(tmp_path / "a", "--full-batch", "--merge-every", 1, *flags)
    run_train(tmp_path / "b", "--method", "mhlora", *flags)
    a, b = (torch.load(tmp_path / name / "model.pt") for name in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-4)


def test_without_a_master_what_is_exported_is_the_rounded_W(tiny, tmp_path):
    result = run_train(tmp_path, "--steps", 4, "--base", "nf4", "--no-master")
    assert result["test_accuracy"] == result["test_accuracy_forward"]
    weight = torch.load(tmp_path / "model.pt")["blocks.0.mlp.0.weight"].view(-1, lte.BLOCK)
    again = lte.decode(lte.encode(weight, "nf4"), "nf4", torch.float32)
    torch.testing.assert_close(weight, again, rtol=1e-6, atol=0)


def test_the_rounded_W_can_be_exported_instead_and_is_what_heads_learn_with(tiny, tmp_path):
    flags, results = ("--steps", 4, "--base", "nf4"), {}
    for export in ("exact", "forward"):
        results[export] = run_train(tmp_path / export, *flags, "--export", export)
    exact, rounded = (torch.load(tmp_path / export / "model.pt") for export in results)
    name = "blocks.0.mlp.0.weight"
    expected = lte.decode(lte.encode(exact[name].view(-1, 64), "nf4"), "nf4", torch.float32)
    same(rounded[name], expected.view_as(rounded[name]))
    changed = [n for n in exact if not torch.equal(exact[n], rounded[n])]
    assert changed and not any(re.search("norm|bias|token|position", n) for n in changed)
    result = results["forward"]
    assert result["test_accuracy"] == result["test_accuracy_forward"]
    assert result["test_accuracy_forward"] == results["exact"]["test_accuracy_forward"]


@pytest.mark.parametrize("method", ["lte", "mhlora", "localsgd", "dense"])
def test_how_far_heads_are_apart_is_logged_when_asked_for(tiny, tmp_path, method):
    flags = ("--steps", 4, "--eval-every", 2, "--r", 4, "--method", method, "--subspaces")
    result = run_train(tmp_path, *flags)
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (1 if method in ("lte", "localsgd") else 2)
    for name in train.Report.SUBSPACES:
        assert float(rows[-1][name]) == pytest.approx(result[name], abs=1e-5, nan_ok=True)
        assert math.isnan(result[name]) == (method in ("localsgd", "dense"))
    assert method not in ("lte", "mhlora") or 0.5 < result["grassmann"] <= 1


@pytest.mark.parametrize("name", train.PRESETS)
def test_a_preset_is_flags_and_those_given_beside_it_hold(name):
    one = train.parse_args(["--preset", name, "--seed", "3", "--steps", "7"])
    assert (one.seed, one.steps) == (3, 7)
    plain = train.parse_args(train.PRESETS[name].split())
    assert vars(train.parse_args(["--preset", name])) == vars(plain) | dict(
        preset=name, argv=["--preset", name]
    )
    assert train.layout_error(train.settle(one, one.method)) is None


def test_the_papers_main_setting():
    one = train.parse_args(["--preset", "paper"])
    assert (one.model, one.patch) == ("vit-small", 32)
    assert (one.heads, one.r, one.merge_every) == (32, 64, 10)


def studied(monkeypatch, tmp_path, *flags):
    """[(args, data) of each row that a study would train]."""
    trained = []

    def fake(args, data, device):
        trained.append((args, data))
        names = "test_accuracy test_loss bytes_sent_per_step cosine grassmann effective_rank"
        return dict.fromkeys(names.split(), 0) | dict(method=args.method)

    monkeypatch.setattr(train, "train", fake)
    train.main([*flags, "--out", str(tmp_path)])
    return trained


@pytest.mark.parametrize("name", train.STUDIES)
def test_a_study_trains_every_row_by_itself_and_prints_a_table(
    tiny, tmp_path, monkeypatch, capsys, name
):
    runs = [one for one, _ in studied(monkeypatch, tmp_path, "--study", name)]
    question, _, rows = train.STUDIES[name]
    printed = capsys.readouterr().out
    assert question in printed and all(f"| {label} |" in printed for label in rows)
    assert len({one.out for one in runs}) == len(rows) == len(runs)
    assert all(train.layout_error(one) is None and one.subspaces for one in runs)


def test_a_studys_rows_have_its_common_flags_and_their_own(tiny, tmp_path, monkeypatch):
    runs = [one for one, _ in studied(monkeypatch, tmp_path, "--study", "interval")]
    assert [one.merge_every for one in runs] == [1, 2, 4, 8, 16, 8]
    assert {(one.steps, one.warmup) for one in runs} == {(100, 20)}
    runs = [one for one, _ in studied(monkeypatch, tmp_path, "--study", "bytes")]
    assert [one.method for one in runs] == ["dense", "localsgd"] + 5 * ["lte"]


def test_what_is_given_beside_a_study_holds_for_its_rows_and_their_data(
    tiny, tmp_path, monkeypatch
):
    flags = "--study interval --merge-every 3 --steps 7 --batch-size 16 --seed 5".split()
    for one, data in studied(monkeypatch, tmp_path, *flags):
        assert (one.merge_every, one.steps, data.batch_size, data.seed) == (3, 7, 16, 5)


def test_each_row_of_a_study_has_its_own_data(tiny, tmp_path, monkeypatch):
    opened, load = [], train.load_data
    monkeypatch.setattr(train, "load_data", lambda *a, **k: opened.append(a) or load(*a, **k))
    studied(monkeypatch, tmp_path, "--study", "cifar")
    assert set(opened) == {("folder", "cifar")}


def test_a_study_really_trains_and_draws(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    flags = "--study distance --steps 4 --eval-every 2 --batch-size 16 --plot --out".split()
    train.main([*flags, str(tmp_path)])
    assert {file.name for file in tmp_path.glob("*.png")} == {"plot.png", "heads.png"}


def test_a_plan_is_what_cost_report_counts(capsys):
    train.main("--plan 2,8 --base nf4 --wire bf16 --merge-every 5 --outer-momentum 0.9".split())
    printed = capsys.readouterr().out
    args = train.settle(train.parse_args(["--base", "nf4", "--outer-momentum", "0.9"]), "lte")
    data = types.SimpleNamespace(classes=list(train.SHAPES), image_size=32)
    model = train.make_model(args, data, torch.device("cpu"))
    options = dict(outer_optimizer=train.make_outer_optimizer(args, model), workers=2)
    options |= dict(merge_every=5, wire="bf16")
    cost = lte.cost_report(model, train.make_optimizer(args, model), **options)
    step, dense = (cost["sent"][name] / 1e6 for name in ("step", "dense"))
    assert f"| sends a step | {step:,.3f} MB | {dense:,.3f} MB | {dense / step:.1f} |" in printed
    assert f"| waits a step | {step:,.3f} s | {dense:,.3f} s |" in printed  # 8 Mbit/s: 1 MB/s
    held, all_dense = cost["held"]["all"] / 1e6, cost["held_dense"]["all"] / 1e6
    assert f"| holds, activations aside | {held:,.3f} MB | {all_dense:,.3f} MB |" in printed
    assert f"| sends at once | {cost['sent']['merge'] / 1e6:,.3f} MB |" in printed
    assert "2 workers, 2 heads each of rank 32" in printed


def test_the_benchmark_times_both_forms_beside_dense(monkeypatch, tmp_path, capsys):
    forms, forward = [], lte.HeadProduct.forward

    def spy(ctx, x, *rest):
        forms.append(lte.formed_is_cheaper(x.shape[1], 8, 8))
        return forward(ctx, x, *rest)

    monkeypatch.setattr(lte.HeadProduct, "forward", staticmethod(spy))
    monkeypatch.setattr(train, "own_process", lambda function, *args: 10**6)
    row = (8, 2, 4, 2, 4, 16)
    table = train.bench_row(
        train.settle(train.parse_args([]), "lte"), row, torch.device("cpu"), rounds=1
    )
    assert list(table) == ["dense", "LTE textbook", "LTE"]
    assert table["dense"]["of_dense"] == 1 and table["LTE"]["peak_mb"] == 1
    products = 4 * 2 * (3 + 1)  # of one variant: four layers in two blocks, four steps
    assert forms == 3 * products // 4 * [False] + 3 * products // 4 * [True] + (
        products // 4 * [False] + products // 4 * [True]
    )


def test_a_benchs_row_says_what_it_measured(monkeypatch):
    args = train.settle(train.parse_args(["--merge-every", "5", "--base", "bf16"]), "lte")
    ms, costs, report = {"dense": 2.0, "LTE textbook": 6.0, "LTE": 4.0}, [], lte.cost_report

    class Fake(train.Benched):
        def __init__(self, args, row, variant, device):
            super().__init__(args, row, variant, device)
            self.ms = ms[variant]

        def __call__(self, steps):
            return self.ms

        def merge(self):
            return self.ms / 10

    def spy(model, **options):
        assert lte.merged_tensors(model)[0].base == "bf16"
        costs.append(report(model, **options))
        return costs[0]

    monkeypatch.setattr(lte, "cost_report", spy)
    monkeypatch.setattr(train, "Benched", Fake)
    monkeypatch.setattr(train, "own_process", lambda function, *a: 10**6)
    table = train.bench_row(args, (8, 2, 4, 2, 4, 16), torch.device("cpu"), rounds=1)
    assert [(r["ms"], r["of_dense"]) for r in table.values()] == [(2, 1), (6, 3), (4, 2)]
    assert math.isnan(table["dense"]["merge_ms"]) and table["LTE textbook"]["merge_ms"] == 0.6
    assert table["dense"]["bytes"] == 8 * 2 * (12 * 64 + 9 * 8) / 2  # two blocks, two workers
    assert table["LTE"]["bytes"] == costs[0]["sent"]["merge"] / 5


def test_a_variants_peak_is_what_its_steps_add(monkeypatch):
    steps, peaks = [], iter((100, 130))
    monkeypatch.setattr(train, "peak_memory", lambda device: next(peaks))
    monkeypatch.setattr(train, "Benched", lambda *args: steps.append)
    assert train.peak_of(None, None, "LTE", torch.device("cpu"), 1) == 30 and steps == [3]


def test_the_benchmark_learns_at_a_rate_that_leaves_activations_as_they_are():
    args = train.settle(train.parse_args([]), "lte")
    one = train.Benched(args, (8, 2, 4, 2, 4, 16), "dense", torch.device("cpu"))
    assert {group["lr"] for group in one.optimizer.param_groups} == {1e-5}


def test_a_process_tells_its_own_peak_not_that_of_the_one_that_started_it():
    torch.ones(2**28, dtype=torch.uint8)  # 256 MB, touched
    cpu = torch.device("cpu")
    assert 2**26 < train.own_process(train.peak_memory, cpu) < train.peak_memory(cpu)
    assert train.peak_memory(cpu) > 2**28


# ------------------------------------------------------------------------------------------------
# train.py: stopping and going on
# ------------------------------------------------------------------------------------------------

RUNS = {
    "lte": "--merge-every 3",
    "ahead": "--merge-every 3 --overlap 2 --outer-lr 0.7 --outer-momentum 0.5 --base nf4",
    "relora": "--method relora --merge-every 3",
    "localsgd": "--method localsgd --merge-every 3",
    "dense": "--method dense",
    "mhlora": "--method mhlora",
}
SHORT = ("--steps", 11, "--eval-every", 2, "--warmup", 2)
CUT = "--merge-every 3 --save-every 2 --steps 5".split()  # saved at step 4, the last


def before_step(monkeypatch, k, call):
    """A run calls this before it trains its k-th step."""
    rate = train.learning_rate

    def patched(step, args):
        if step == k:
            call()
        return rate(step, args)

    monkeypatch.setattr(train, "learning_rate", patched)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def same_end(out, other):
    """Two runs have left the same model.pt, bit for bit, and have told the same but for costs."""
    told = []
    for folder in (out, other):
        with open(folder / "log.csv") as file:
            log = [row | {"seconds": None} for row in csv.DictReader(file)]
        result = json.loads((folder / "result.json").read_text())
        costs = ("second", "peak_memory")
        told.append((log, {k: v for k, v in result.items() if not any(c in k for c in costs)}))
    assert told[0] == told[1] and told[0][0]
    same(*(torch.load(folder / "model.pt") for folder in (out, other)))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_every_step_of_a_cycle_ends_as_one_never_killed(
    tiny, tmp_path, monkeypatch, name
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = [*SHORT, *RUNS[name].split()]
    run_train(whole, *flags)
    for k in (5, 6, 7):
        with monkeypatch.context() as patched, pytest.raises(Died):
            before_step(patched, k, die)
            run_train(killed, *flags, "--save-every", 1, *(["--resume"] if k > 5 else []))
        assert steps_in(killed / "checkpoints")[0] == (k - 1 if name != "ahead" else k - 1 - k % 3)
    run_train(killed, *flags, "--resume")
    same_end(killed, whole)


@pytest.mark.parametrize(
    "name, signalled, stopped",
    [
        *(("lte", 4, 6), ("ahead", 4, 8), ("relora", 4, 6), ("localsgd", 4, 6)),
        *(("dense", 4, 10), ("mhlora", 4, 10), ("lte", 11, 11), ("ahead", 8, 11)),
    ],
)
def test_a_SIGTERM_ends_a_run_after_its_next_merge_saved(
    tiny, tmp_path, monkeypatch, capsys, name, signalled, stopped
):
    """Where merges travel, once it has arrived. It goes on as if it had never been stopped."""
    whole, out, flags = tmp_path / "whole", tmp_path / "out", [*SHORT, *RUNS[name].split()]
    run_train(whole, *flags)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        before_step(patched, signalled, terminate)
        run_train(out, *flags)
    assert ended.value.code == 128 + signal.SIGTERM
    assert f"train.py: stopped at step {stopped} as asked, and saved" in capsys.readouterr().err
    assert steps_in(out / "checkpoints") == [stopped] and not (out / "model.pt").exists()
    run_train(out, *flags, "--resume")
    same_end(out, whole)


@contextlib.contextmanager
def one_of_two():
    """train.main takes this process for one of torchrun's two."""
    with pytest.MonkeyPatch.context() as patched:
        make_tiny(patched)
        patched.setenv("WORLD_SIZE", "2")
        patched.setenv("RANK", str(lte.processes()[0]))
        patched.setattr(train, "start", lambda args: torch.device("cpu"))
        patched.setattr(dist, "destroy_process_group", lambda: None)
        yield patched


def stop_on_two(out, *flags):
    """A run of two processes in which process 1 alone gets a SIGTERM; this one's exit code."""
    with one_of_two() as patched:
        before_step(patched, 4, terminate if lte.processes()[0] else int)
        with pytest.raises(SystemExit) as ended:
            run_train(out, *flags)
        return ended.value.code


def test_a_SIGTERM_to_one_process_stops_all_and_one_alone_can_go_on(tiny, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [*SHORT, *RUNS["ahead"].split()]
    run_train(whole, *flags)
    assert on_processes(2, stop_on_two, stopped, *flags) == [143, 143]
    assert steps_in(stopped / "checkpoints") == [8]
    run_train(stopped, *flags, "--resume")
    same(*(torch.load(folder / "model.pt") for folder in (stopped, whole)))


def test_a_wire_that_needs_bitsandbytes_says_so_before_the_first_step(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    before_step(monkeypatch, 1, lambda: pytest.fail("trained"))
    assert "pip install bitsandbytes" in sentence(*SHORT, "--wire", "nf4", "--out", tmp_path)


def run_on_two(out, *flags):
    with one_of_two():
        train.main(["--batch-size", "16", "--out", str(out), *map(str, flags)])


def test_a_run_begun_alone_and_ended_by_two_says_that_one_sent_nothing(tiny, tmp_path):
    flags = [*SHORT, "--save-every", 4]
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit):
        before_step(patched, 4, terminate)
        run_train(tmp_path, *flags)
    on_processes(2, run_on_two, tmp_path, *flags, "--resume")
    told = json.loads((tmp_path / "result.json").read_text())
    assert told["bytes_are"] == "counted for 2 processes, over steps that 1 and 2 took"


def test_the_second_SIGTERM_kills(tiny, tmp_path, monkeypatch):
    before_step(monkeypatch, 2, lambda: (terminate(), terminate()))
    handler = signal.signal(signal.SIGTERM, die)  # what kills, as far as this test goes
    try:
        with pytest.raises(Died):
            run_train(tmp_path, "--steps", 3)
    finally:
        assert signal.signal(signal.SIGTERM, handler) is die
    assert not lte.checkpoints(tmp_path / "checkpoints")


def test_a_SIGTERM_after_a_process_was_lost_does_not_silence_what_is_said_of_it(
    tiny, tmp_path, monkeypatch
):
    """torchrun sends one to all that are left, often while they end."""

    def lose():
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        raise lte.ProcessLost("another process has ended")

    before_step(monkeypatch, 3, lose)
    monkeypatch.setattr(dist, "destroy_process_group", terminate)
    handler = signal.signal(signal.SIGTERM, die)  # what kills, as far as this test goes
    try:
        said = sentence("--steps", 3, "--batch-size", 16, "--out", tmp_path)
        assert said == "train.py: step 3: another process has ended"
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_after_a_run_signals_are_what_they_were(tiny, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run_train(tmp_path, "--steps", 1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_after_a_refused_run_signals_are_what_they_were(tiny, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert "holds no checkpoint" in sentence("--out", tmp_path, "--resume")
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("K, sent, applied", [(1, [4, 8, 10], [5, 9]), (3, [4, 8, 10], [7, 10])])
def test_with_overlap_a_merge_is_applied_K_steps_later_and_the_last_at_once(
    tiny, tmp_path, monkeypatch, K, sent, applied
):
    steps, seen, merge, wait = [], {"sent": [], "applied": []}, lte.merge, lte.MergeWork.wait
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda k, args: (steps.append(k), rate(k, args))[1])

    def noted(name, call):
        return lambda *a, **k: (seen[name].append((steps[-1], k.get("async_op"))), call(*a, **k))[1]

    monkeypatch.setattr(lte, "merge", noted("sent", merge))
    monkeypatch.setattr(lte.MergeWork, "wait", noted("applied", wait))
    run_train(tmp_path, "--steps", 10, "--merge-every", 4, "--overlap", K)
    assert seen["sent"] == [(k, k < 10) for k in sent]
    assert [k for k, _ in seen["applied"]] == applied


@pytest.mark.parametrize(
    "flags", ["--overlap 4", "--overlap 5", "--overlap 1 --reset B", "--overlap 1 --reset AB"]
)
def test_an_overlap_that_cannot_be_is_refused(flags):
    said = sentence(*flags.split(), "--merge-every", 4)
    assert said.startswith("train.py: --overlap ") and "no reset; --merge-every is 4" in said


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--outer-lr 1 --outer-momentum 0", None),
        ("--outer-lr 0.7", dict(lr=0.7, momentum=0, nesterov=False)),
        ("--outer-momentum 0.9", dict(lr=1, momentum=0.9, nesterov=True)),
    ],
)
def test_only_what_is_not_plain_averaging_uses_an_outer_optimizer(
    tiny, tmp_path, monkeypatch, flags, expected
):
    outer, merge = [], lte.merge
    monkeypatch.setattr(
        lte, "merge", lambda *a, **k: (outer.append(k["outer_optimizer"]), merge(*a, **k))[1]
    )
    run_train(tmp_path, "--steps", 2, "--merge-every", 1, *flags.split())
    assert len(outer) == 2 and outer[0] is outer[1]
    if expected is None:
        assert outer[0] is None
    else:
        assert expected.items() <= outer[0].param_groups[0].items()


def test_a_run_does_not_start_over_checkpoints_unasked(tiny, tmp_path):
    run_train(tmp_path, *CUT)
    (tmp_path / "model.pt").unlink()
    said = sentence("--batch-size", 16, "--out", tmp_path, *CUT)
    for part in ("step_00000004", "of an earlier run", "--resume", "choose another --out"):
        assert part in said
    assert steps_in(tmp_path / "checkpoints") == [4, 2] and not (tmp_path / "model.pt").exists()


def test_resume_needs_a_checkpoint(tiny, tmp_path):
    for value in ((), ("previous",)):
        said = sentence("--batch-size", 16, "--out", tmp_path, *CUT, "--resume", *value)
        assert "holds no checkpoint" in said and str(tmp_path) in said
    assert not list(tmp_path.iterdir())


def test_resume_takes_a_broken_checkpoint_only_with_previous_and_says_so(tiny, tmp_path):
    out, kept = tmp_path / "out", tmp_path / "kept"
    run_train(out, *CUT)
    shutil.copytree(out, kept)
    (out / "checkpoints" / "step_00000004" / "meta.json").write_text("{")
    with pytest.warns(UserWarning, match="step_00000004 is not whole"):
        said = sentence("--batch-size", 16, "--out", out, *CUT, "--resume")
        run_train(out, *CUT, "--resume", "previous")
    assert "step_00000004 is not whole (meta.json" in said and "previous" in said
    same_end(out, kept)
    assert steps_in(out / "checkpoints") == [4, 2]


def test_a_finished_run_that_goes_on_writes_its_results_once_more(tiny, tmp_path):
    flags = ("--steps", 4, "--merge-every", 3, "--save-every", 2)
    out, kept = tmp_path / "out", tmp_path / "kept"
    run_train(out, *flags)
    shutil.copytree(out, kept)
    (out / "model.pt").unlink()
    run_train(out, *flags, "--resume")
    same_end(out, kept)


def test_a_comparison_goes_on_with_every_method_where_it_was(tiny, tmp_path, monkeypatch):
    """Killed in the second of three: the first is done, the third has not begun."""
    flags = [*CUT, "--batch-size", "16", "--compare", "dense", "lte", "localsgd", "--out"]
    again, whole = tmp_path / "again", tmp_path / "whole"
    train.main([*flags, str(whole)])

    def die_of_lte(step, args):
        return die() if (args.method, step) == ("lte", 4) else rate(step, args)

    with monkeypatch.context() as patched, pytest.raises(Died):
        rate = train.learning_rate
        patched.setattr(train, "learning_rate", die_of_lte)
        train.main([*flags, str(again)])
    train.main([*flags, str(again), "--resume"])
    for method in ("dense", "lte", "localsgd"):
        same_end(again / method, whole / method)


def test_a_study_goes_on_with_every_row_where_it_was(tiny, tmp_path, monkeypatch):
    """Killed in the first row: the others have not begun."""
    flags = ["--study", "distance", *CUT, "--batch-size", "16", "--eval-every", "5"]
    flags += ["--out", str(tmp_path)]
    with monkeypatch.context() as patched, pytest.raises(Died):
        before_step(patched, 4, die)
        train.main(flags)
    train.main([*flags, "--resume"])
    assert len(list(tmp_path.glob("distance/*/result.json"))) == len(train.STUDIES["distance"][2])


def test_resume_auto_begins_where_nothing_is_saved_and_else_goes_on(
    tiny, tmp_path, monkeypatch, capsys
):
    for which in ((), ("previous",)):
        said = sentence(*CUT, "--batch-size", 16, "--out", tmp_path, "--resume", *which)
        assert "holds no checkpoint" in said
    with monkeypatch.context() as patched, pytest.raises(Died):
        before_step(patched, 4, die)
        run_train(tmp_path, *CUT, "--resume", "auto")
    run_train(tmp_path, *CUT, "--resume", "auto")
    assert "step 2  goes on from" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag, value",
    [
        *(("--lr", 0.5), ("--merge-every", 4), ("--steps", 6), ("--batch-size", 32), ("--clip", 2)),
        *(("--weight-decay", 0), ("--reset", "B"), ("--wire", "bf16"), ("--overlap", 1)),
        *(("--accumulate", 2), ("--warmup", 3), ("--label-smoothing", 0.1), ("--bf16", None)),
        *(("--augment", "crop-flip"), ("--dataset", "cifar10"), ("--init", "kaiming")),
        *(("--heads", 2), ("--seed", 1), ("--base", "nf4"), ("--r", 4)),
        ("--lora-alpha", 5),
        ("--outer-lr", 0.7),
        ("--outer-momentum", 0.5),
        ("--method", "localsgd"),
        ("--model", "mixer-nano"),
        ("--patch", 16),
    ],
)
def test_a_run_that_goes_on_with_another_flag_is_refused_by_its_name(
    tiny, saved_run, flag, value
):
    flags = ["--batch-size", 16, "--out", saved_run, *CUT, "--resume", flag]
    said = sentence(*flags, *([] if value is None else [value]))
    assert flag in said or f"with {flag[2:]} = " in said or f" {flag[2:]} " in said
    assert str(saved_run) in said and "\n" not in said


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """A folder with a run's checkpoints."""
    with pytest.MonkeyPatch.context() as patched:
        make_tiny(patched)
        out = tmp_path_factory.mktemp("saved")
        run_train(out, *CUT)
    return out


def test_every_flag_that_changes_what_is_learnt_is_compared():
    flags = {action.dest for action in train.make_parser()._actions}
    free = "help data download compile out export eval_every eval_only compare plot save_every "
    free += "resume timeout preset study bench plan"
    assert flags - set(train.Checkpoints.FLAGS.split()) == set(free.split())


def test_processes_compare_every_flag_but_those_that_may_differ(tiny, tmp_path, monkeypatch):
    compared, agree = [], lte.agree
    monkeypatch.setattr(lte, "agree", lambda **k: (compared.append(k), agree(**k))[1])
    run_train(tmp_path, "--steps", 1)
    flags = {"--" + action.dest.replace("_", "-") for action in train.make_parser()._actions}
    assert flags - compared[0].keys() == {"--help", "--data", "--out"}


def test_a_group_that_torchrun_started_again_goes_on_by_itself(tiny, tmp_path, monkeypatch, capsys):
    run_train(tmp_path / "whole", *CUT)
    with monkeypatch.context() as patched, pytest.raises(Died):
        before_step(patched, 4, die)
        run_train(tmp_path / "again", *CUT)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    run_train(tmp_path / "again", *CUT)
    assert "step 2  goes on from" in capsys.readouterr().out
    same_end(tmp_path / "again", tmp_path / "whole")


def test_a_group_started_again_before_its_first_checkpoint_begins_anew(tiny, tmp_path, monkeypatch):
    run_train(tmp_path / "whole", *CUT)
    with monkeypatch.context() as patched, pytest.raises(Died):
        before_step(patched, 2, die)
        run_train(tmp_path / "again", *CUT)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_train(tmp_path / "again", *CUT)
    same_end(tmp_path / "again", tmp_path / "whole")


# ---- what is refused, and what is not a number ----


def poison(monkeypatch, k, samples):
    """The losses of these samples are NaN at the k-th step of a run with batches of 16."""
    cross_entropy, calls = F.cross_entropy, []

    def poisoned(logits, y, **options):
        losses = cross_entropy(logits, y, **options)
        calls.append(1)
        if len(calls) == k:
            losses[samples] *= math.nan
        return losses

    monkeypatch.setattr(train.F, "cross_entropy", poisoned)


def test_a_head_whose_loss_is_not_a_number_is_left_out_and_the_run_goes_on(
    tiny, tmp_path, monkeypatch
):
    poison(monkeypatch, 3, slice(8, 12))  # of 16 samples over 4 heads: those of head 2
    with pytest.warns(UserWarning, match="merge 1: head 2 of 4 holds NaN or inf; left out"):
        result = run_train(tmp_path, "--steps", 5)
    assert math.isfinite(result["test_loss"])


def test_where_no_head_has_a_finite_loss_the_run_ends_and_names_the_step(
    tiny, tmp_path, monkeypatch
):
    poison(monkeypatch, 3, slice(16))
    said = sentence("--batch-size", 16, "--steps", 5, "--out", tmp_path)
    assert said.startswith("train.py: step 4: merge 1: every head holds NaN or inf")
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("method", train.UNMERGED)
def test_where_nothing_is_merged_a_loss_that_is_not_a_number_ends_the_run(
    tiny, tmp_path, monkeypatch, method
):
    poison(monkeypatch, 3, slice(8, 12))
    flags = ("--batch-size", 16, "--steps", 9, "--save-every", 2, "--eval-every", 8)
    said = sentence("--method", method, *flags, "--out", tmp_path)
    assert said.startswith("train.py: step 4: the loss of head 0 is nan at step 3")
    assert steps_in(tmp_path / "checkpoints") == [2] and not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--heads", 0), "--heads 0: must be 1 or more"),
        (("--r", 0), "--r 0: must be 1 or more"),
        (("--base", "int3"), "invalid choice: 'int3'"),
        (("--model", "vit"), "invalid choice: 'vit'"),
        (("--dataset", "mnist"), "invalid choice: 'mnist'"),
        (("--method", "sgd"), "invalid choice: 'sgd'"),
        (("--resume", "first"), "invalid choice: 'first'"),
        (("--wire", "fp8"), "invalid choice: 'fp8'"),
        (("--lr", -1), "--lr -1.0: must be above 0"),
        (("--clip", 0), "--clip 0.0: must be above 0"),
        (("--outer-lr", 0), "--outer-lr 0.0: must be above 0"),
        (("--timeout", 0), "--timeout 0.0: must be above 0"),
        (("--overlap", -1), "--overlap -1: must be 0 or more"),
        (("--save-every", 0), "--save-every 0: must be 1 or more"),
        (("--label-smoothing", 1), "--label-smoothing 1.0: must be from 0 to below 1"),
        (("--outer-momentum", 1), "--outer-momentum 1.0: must be from 0 to below 1"),
        (("--method", "relora", "--reset", "B"), "--reset is lte's alone"),
        (("--plan", "8"), "--plan 8: must be WORKERS,MBIT, such as 8,100"),
        (("--plan", "3,100"), "--plan 3,100: --heads 4 must be a multiple of the workers"),
        (("--plan", "4,0"), "a link carries more than 0 Mbit/s"),
        (("--bench", "--method", "dense"), "--bench and --plan compare lte with dense training"),
        (("--preset", "mine"), "invalid choice: 'mine'"),
        (("--study", "all"), "invalid choice: 'all'"),
    ],
)
def test_wrong_flags_are_refused_with_the_flag_and_the_rule(flags, says, capsys):
    sentence(*flags)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--heads", 3), "--batch-size 256 does not split into 3 heads"),
        (("--accumulate", 3), "1 processes and 3 micro-batches; use a multiple of 12"),
        (("--augment", "mixup", "--heads", 32), "mixes groups of 16 samples, but a head"),
        (("--compare", "dense", "lte", "--overlap", 4), "--overlap 4 needs a merge that arrives"),
        (("--merge-warmup", 8, "--overlap", 2), "--merge-warmup 8 merges at every step at first"),
        (("--merge-warmup", 8, "--reset", "B"), "or for --reset B; leave those out"),
        (("--no-master",), "--no-master needs one process, a --base that rounds"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_with_the_numbers(flags, says):
    assert says in sentence(*flags)


def test_heads_must_spread_over_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")

    def error(method, *flags):
        return train.layout_error(train.settle(train.parse_args(flags), method))

    assert "--heads 4 do not spread over 3 processes; use a multiple of 3" in error("lte")
    for method in train.ONE_PROCESS:
        assert f"--method {method} runs on one process" in error(method, "--heads", "3")
    assert error("lte", "--heads", "6", "--batch-size", "24") is None
    assert error("dense", "--batch-size", "24") is None
    mixed = error("dense", "--batch-size", "72", "--augment", "mixup")
    assert "process has 24; use a --batch-size that is a multiple of 48" in mixed


# ---- the real command, and real kills ----

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def small_run(folder, *flags):
    """Flags of a run with two heads on a few tiny images."""
    save_images(folder / "images")
    flags = [*"--dataset folder --heads 2 --batch-size 16 --merge-every 2 --data".split(), *flags]
    flags.insert(flags.index("--data") + 1, folder / "images")
    return [*map(str, flags), "--steps", "20", "--eval-every", "20"]


@contextlib.contextmanager
def torchrun(log, *arguments):
    """Two processes of train.py, and all they say in `log`; none of them is left at the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(log, "w") as file:
        options = dict(env=ENVIRONMENT, stdout=file, stderr=file)
        launcher = subprocess.Popen([*command, *map(str, arguments)], **options)
    try:
        yield launcher
    finally:
        for pid in (*processes_of(launcher).values(), launcher.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.wait()


def processes_of(launcher):
    """rank -> process id of what a torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    ranks = {}
    for pid in map(int, found.stdout.split()):
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            ranks |= {int(v[5:]): pid for v in variables if v.startswith("RANK=")}
    return ranks


def wait_for(log, text, running, seconds=60):
    """Until a pattern stands in the log; returns its match."""
    end = time.monotonic() + seconds
    while not (found := re.search(text, log.read_text())):
        ended = not running() and not re.search(text, log.read_text())
        assert not ended and time.monotonic() < end, f"no {text!r} in\n{log.read_text()}"
        time.sleep(0.02)
    return found


LOST = r"train.py: step \d+: .*another process has ended or hangs; go on from the last checkpoint"


def test_after_the_kill_of_a_process_torchrun_starts_again_and_nothing_is_lost(tmp_path):
    """kill -9; the other says so, and the end is bit for bit that of a run on one process."""
    flags, log = small_run(tmp_path), tmp_path / "log"
    arguments = ("--max-restarts", 1, train.__file__, *flags, "--save-every", 4)
    with torchrun(log, *arguments, "--out", tmp_path / "two") as launcher:

        def running():
            return launcher.poll() is None

        wait_for(log, "step 4  saved", running)
        os.kill(processes_of(launcher)[1], signal.SIGKILL)
        wait_for(log, LOST, running)
        wait_for(log, r"step \d+  goes on from", running)
        assert launcher.wait(60) == 0
    alone = run_train(tmp_path / "one", *flags)
    one, two = (torch.load(tmp_path / name / "model.pt") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    told = json.loads((tmp_path / "two" / "result.json").read_text())
    assert told["bytes_sent_per_step"] == alone["bytes_sent_per_step"] > 0
    assert told["bytes_are"] == "counted for 2 processes"
    assert alone["bytes_are"] == "computed for 2 processes"


@contextlib.contextmanager
def two_processes(log, *flags_of_each):
    """Two processes of train.py as torchrun starts them, and all they say in `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    started = [
        server.Process(target=one_of_the_two, args=(rank, port, log, flags))
        for rank, flags in enumerate(flags_of_each)
    ]
    log.touch()
    for process in started:
        process.start()
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


def one_of_the_two(rank, port, log, flags):
    """Each machine counts its restarts for itself; the processes meet all the same."""
    where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=2, RANK=rank)
    where |= dict(TORCHELASTIC_RESTART_COUNT=rank, CUDA_VISIBLE_DEVICES="")
    os.environ |= {name: str(value) for name, value in where.items()}
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    train.main([str(flag) for flag in flags])


def test_of_a_process_that_hangs_the_others_say_so_after_the_timeout(tmp_path):
    log = tmp_path / "log"
    flags = [*small_run(tmp_path), "--save-every", 4, "--timeout", 4, "--out", tmp_path / "out"]
    with two_processes(log, flags, flags) as (waiting, hanging):
        wait_for(log, "step 4  saved", waiting.is_alive)
        os.kill(hanging.pid, signal.SIGSTOP)
        wait_for(log, LOST, waiting.is_alive)
    assert steps_in(tmp_path / "out" / "checkpoints")[0] >= 4


def test_processes_started_differently_all_end_with_the_name_of_what_differs(tmp_path):
    log = tmp_path / "log"
    flags = [["--out", tmp_path, "--merge-every", T] for T in (3, 5)]
    with two_processes(log, *flags) as started:
        for process in started:
            process.join(60)
    expected = "train.py: process 1 has --merge-every = 5, process 0 has 3; start all processes"
    assert log.read_text().count(expected) == 2 and [p.exitcode for p in started] == [1, 1]


# ------------------------------------------------------------------------------------------------
# run_ddp.sh
# ------------------------------------------------------------------------------------------------

LAUNCHER = Path(lte.__file__).with_name("run_ddp.sh")


def launch(*flags, **variables):
    quiet = {name: value for name, value in os.environ.items() if name not in ("RDZV", "HOSTS")}
    options = dict(env=quiet | {"OMP_NUM_THREADS": "1"} | variables, capture_output=True, text=True)
    return subprocess.run(["bash", LAUNCHER, *map(str, flags)], timeout=120, **options)


@pytest.mark.parametrize(
    "variables, says",
    [
        ({"NPROC": "0"}, "NPROC=0: must be a number of processes, 1 or more"),
        ({"NNODES": "2"}, "set MASTER_ADDR and NODE_RANK, or RDZV"),
        ({"NNODES": "1:4"}, "NNODES=1:4 is a range, which needs a place to meet; set RDZV"),
        ({"NNODES": "2", "MASTER_ADDR": "10.0.0.1"}, "NODE_RANK=: must be this machine's number"),
        ({"LINK": "100mbit"}, "act on emulated hosts only; set HOSTS"),
        ({"HOSTS": "2", "LINK": "100"}, "LINK=100: must be a rate in bits a second"),
        ({"HOSTS": "2", "NNODES": "2"}, "unset NNODES, RDZV and MASTER_ADDR"),
    ],
)
def test_the_launcher_refuses_what_does_not_fit_in_one_sentence(variables, says):
    done = launch(**variables)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


def test_the_launcher_hands_on_what_torchrun_would_take_for_a_flag_of_its_own(tmp_path):
    python = tmp_path / "python"  # has 0 GPUs and 1 core, and else says what it is called with
    shared = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo 0 1 || echo "$@; ${shared}"\n')
    python.chmod(0o755)
    for rdzv, fresh in (("", ""), ("127.0.0.1:29500", "1")):  # machines that may come and go
        path = f"{tmp_path}:{os.environ['PATH']}"
        said = launch("--r", 8, NPROC="1", RDZV=rdzv, PATH=path).stdout
        assert f" -- {LAUNCHER.with_name('train.py')} --r 8; {fresh}\n" in said


def namespaces():
    return set(subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout.splitlines())


def test_emulated_hosts_send_over_their_links_what_lte_counts_and_leave_nothing_behind(tmp_path):
    allowed = os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc")
    if not allowed or subprocess.run(["ip", "netns", "add", "lte-may-i"]).returncode:
        pytest.skip("needs root, ip and tc, and a system that allows network namespaces")
    subprocess.run(["ip", "netns", "del", "lte-may-i"], check=True)
    flags, before = small_run(tmp_path, "--r", 16, "--out", tmp_path), namespaces()
    done = launch(*flags, HOSTS="2", LINK="1gbit")
    assert done.returncode == 0, done.stderr
    counted = 20 * json.loads((tmp_path / "result.json").read_text())["bytes_sent_per_step"]
    [sent] = re.findall(r"host 1 sent (\d+) bytes", done.stderr)  # host 0 sends the model too
    assert 1 < int(sent) / counted < 1.05
    assert namespaces() <= before


# ------------------------------------------------------------------------------------------------
# README.md
# ------------------------------------------------------------------------------------------------


def test_the_readme_example_runs():
    """The "After" block of README.md as it stands, with torchvision's own VisionTransformer."""
    text = (Path(__file__).parent / "README.md").read_text()
    code = text.split("After:")[1].split("```python\n")[1].split("```")[0]
    data = [(torch.randn(8, 3, 8, 8), torch.randint(5, (8,))) for _ in range(9)]
    sizes = dict(image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=24)
    make = functools.partial(torchvision.models.VisionTransformer, num_classes=5, **sizes)
    saved = {}
    fake_torch = types.SimpleNamespace(
        optim=torch.optim, save=lambda what, path: saved.update(what)
    )
    exec(code, dict(VisionTransformer=make, batches=data, F=F, torch=fake_torch))
    make().load_state_dict(saved)


def test_what_the_readme_names_is_there():
    text = (Path(__file__).parent / "README.md").read_text()
    tests = [name for name in globals() if name.startswith("test_")]
    for name in re.findall(r"-k ([a-z_A-Z0-9]+)", text):
        assert name == "NAME" or any(name in test for test in tests), name
    for flag, known in (("study", train.STUDIES), ("preset", train.PRESETS)):
        named = re.findall(rf"--{flag} ([a-z][\w-]*)", text)
        assert named and set(named) <= set(known), flag
    for picture in re.findall(r"\]\((assets/[^)]+)\)", text):
        assert (Path(__file__).parent / picture).exists(), picture
