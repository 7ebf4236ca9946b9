"""LoRA-the-Explorer (LTE): train a network from scratch with N parallel low-rank heads.

Every weight W is frozen, and may be stored in 4 bits. N heads, each a LoRA pair (A, B), learn alone
on their own share of the data for T steps; then the mean of what they learnt is merged into W, and
they go on. Nothing is sent between merges, and the merged update can reach rank N r. One process
may run all heads, or P processes N / P each: the result is the same.

    given W, T, s = lora_alpha / r;  A_n semi-orthogonal, B_n = 0,  A'_n = A_n, B'_n = B_n
    repeat
        for each head n = 1 .. N, alone:
            for T steps:  y = W x + s (B_n A_n - B'_n A'_n) x;  optimizer step on (A_n, B_n)
        W   <- W + (1/N) sum_n s (B_n A_n - B'_n A'_n)                    merge
        A'_n <- A_n,  B'_n <- B_n                                         what is merged already

The primed factors are what makes "no reset" exact: a merge moves a head's work into W, so the head
must stop adding it a second time. Factors and optimizer state just go on. What has no low-rank form
(biases, LayerNorm, embeddings) every head trains as its own copy, averaged at the merge.

Use
    model = lte.convert(ViT(), heads=8, r=32, lora_alpha=256)
    loss = lte.head_loss(F.cross_entropy(model(x), y, reduction="none"), model)
    loss.backward(); lte.clip_grad_norm_(model, 1.0); optimizer.step(); optimizer.zero_grad()
    if step % T == 0: lte.merge(model)
    lte.save("checkpoints", model, optimizer, step=step)        # step = lte.load(...)["step"]
    torch.save(lte.merged_state_dict(model), "model.pt")        # loads into a plain ViT()

Glossary: symbol, name in the code, meaning
    N       layout.heads    heads over all processes; attention's own heads are `attn_heads`
    n       layout.local    as a size: how many heads this process has, a block of the N;
                            as an index: one head
    P       layout.world    processes; `layout.rank` is this one ("rank" is never the LoRA rank)
    T                       optimizer steps between merges: the caller's loop decides
    r       r               rank of one head's factors, cut to min(in, out) of the layer
    A_n     lora_A          (n, r, in)
    B_n     lora_B          (n, out, r)
    A', B'  merged_A, _B    the factors as they were at the last merge
    s       scaling         lora_alpha / r, with r as given; 1/N is never part of it
    U, V    U, V            (out, 2r), (2r, in): U V = B A - B' A', a head's update since the merge
            delta           s U V, what one head adds at the next merge
    W       weight          (out, in), decoded from the base
            Copies.heads    (n, *shape), what is copied for each head instead
            base            how W is stored for the forward pass; the master is its exact fp32 value
            piece, part     of a tensor a merge takes one piece at a time; each process keeps the
                            master of its own part of every piece
    in shapes: b samples of one head, t tokens of a sample, M = b t, i in, o out

Source: Huh, Cheung, Bernstein, Isola, Agrawal, "Training Neural Networks from Scratch with Parallel
Low-Rank Adapters", arXiv 2402.16828. What differs from the paper and from the authors' public code:
    - A is scaled by sqrt(in / r) as in their code; the paper writes the inverse (section 2)
    - multi-head LoRA (`parallel=False`) has the paper's 1/N, which their code leaves out
    - biases, LayerNorm, convolutions and class tokens train; theirs freezes or refuses them
    - the base may be quantized, and merges go to an fp32 master, so that nothing is rounded away
    - heads may really live on different processes, with the same result bit for bit on a CPU
Not here: going on without a lost process (the run starts again from its checkpoint, on as many as
there are then), fp16 loss scaling, tied weights.

Sections: 1 heads and processes - 2 factors - 3 merged tensors - 4 the low-rank layer - 5 what else
heads own - 6 convert - 7 merge - 8 training helpers - 9 checkpoints - 10 export and counts -
11 how far apart heads are
"""

import copy
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections import defaultdict
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_flatten, tree_unflatten

__version__ = "0.1.0"

# ------------------------------------------------------------------------------------------------
# 1 heads and processes: which heads live here, sums in a fixed order, seeds
# ------------------------------------------------------------------------------------------------


def processes():
    """(this process's rank, how many there are): (0, 1) where no group was started."""
    running = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if running else (0, 1)


@dataclass
class Layout:
    """What all layers of one converted model share: the heads, the processes, the merges so far."""

    heads: int  # N, over all processes
    parallel: bool = True  # False: multi-head LoRA, every head sees every sample
    seed: int = 0
    world: int = field(init=False)  # P
    rank: int = field(init=False)
    merges: int = field(init=False, default=0)
    left_out: int = field(init=False, default=0)  # heads that a merge left out, all together
    bytes_sent: int = field(init=False, default=0)  # that left this process, all merges together
    in_flight: object = field(init=False, default=None)  # the MergeWork that was not waited for
    names: list = field(init=False, default_factory=list)  # the plain model's state dict keys

    def __post_init__(self):
        self.rank, self.world = processes()
        if not isinstance(self.heads, int) or self.heads < 1:
            raise ValueError(f"heads={self.heads!r}: at least one head is needed, an integer")
        if self.heads % self.world:
            raise ValueError(
                f"{self.heads} heads do not spread over {self.world} processes; "
                f"use a multiple of {self.world} heads or another number of processes"
            )
        if not self.parallel and self.world > 1:
            raise ValueError(
                f"multi-head LoRA (parallel=False) needs every head in one process, "
                f"but {self.world} are running; start one process"
            )

    @property
    def local(self):
        """How many heads this process has; the first of them is head rank * local of the N."""
        return self.heads // self.world

    def split(self, x):
        """(n b, ...) -> (n, b, ...): head n of this process gets the n-th chunk of the batch."""
        if x.dim() < 1 or x.shape[0] % self.local:
            raise ValueError(
                f"a batch of {x.shape[0] if x.dim() else 1} samples does not split over "
                f"{self.local} heads; use a multiple of {self.local}, or drop_last=True"
            )
        return x.unflatten(0, (self.local, -1))


def tree_sum(term, first, count):
    """term(first) + ... + term(first + count - 1), added in a fixed binary tree.

    Floating-point sums depend on their order. Where every process holds 1, 2, 4, 8 ... heads,
    its block is a subtree: it adds just what one process with all heads would, and the last bits
    agree. Other blocks agree up to rounding.
    """
    if count == 1:
        return term(first)
    left = 1 << (count - 1).bit_length() - 1  # the largest power of two below count
    return tree_sum(term, first, left) + tree_sum(term, first + left, count - left)


class ProcessLost(RuntimeError):
    """Another process ended, failed, or let the others wait longer than the group's timeout."""


@contextmanager
def collective(what):
    """Whatever a backend says when a process is gone, said in one sentence, as ProcessLost."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo's and NCCL's: their texts differ with what was cut off
        reason = str(error).strip().partition("\n")[0].rsplit("] ", 1)[-1].split(". ")[0]
        raise ProcessLost(
            f"{what}: another process has ended or hangs; go on from the last checkpoint ({reason})"
        ) from error


# Renamed in torch 2.14, where the old name warns.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def all_gather(mine, layout, group=None):
    """(...) of every process -> (P, ...)."""
    if layout.world == 1:
        return mine.unsqueeze(0)
    everyone = mine.new_empty(layout.world, *mine.shape)
    with collective("all-gather"):
        getattr(dist, GATHER)(everyone.view(-1), mine.contiguous().view(-1), group=group)
    return everyone


def all_to_all(chunks, layout, group=None):
    """(P, m): chunk p goes to process p; returns (P, m): what process p had for this one."""
    if layout.world == 1:
        return chunks
    arrived = torch.empty_like(chunks)
    with collective("all-to-all"):
        dist.all_to_all_single(arrived, chunks, group=group)
    return arrived


def agree(**values):
    """Raises ValueError on all processes unless all of them gave the same values. Collective.

    Called before anything else is exchanged: processes that were started differently would wait
    for each other in different collectives, or average what does not belong together.
    """
    everyone = [values] * processes()[1]
    if len(everyone) == 1:
        return
    with collective("comparing the processes"):
        dist.all_gather_object(everyone, values)
    for rank, theirs in enumerate(everyone):
        for name in everyone[0] | theirs:
            mine, other = everyone[0].get(name), theirs.get(name)
            if mine != other:
                raise ValueError(
                    f"process {rank} has {name} = {other!r}, process 0 has {mine!r}; "
                    "start all processes with the same settings and code"
                )


def seed_of(*key):
    """A 63-bit seed that depends on `key` alone: not on the process, nor on what ran before."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def generator(*key, device="cpu"):
    """A random generator started from seed_of(*key)."""
    return torch.Generator(device).manual_seed(seed_of(*key))


# ------------------------------------------------------------------------------------------------
# 2 factors: A's initialisation, and the update as one product
# ------------------------------------------------------------------------------------------------

INITS = ("orthogonal", "orthogonal_paper", "kaiming", "xavier")


def init_A(shape, init, *key, dtype=torch.float32):
    """One head's A (r, in), drawn from `key` = (seed, merge, layer, head).

    "orthogonal" makes orthonormal rows times sqrt(in / r): an entry's mean square is then 1 / r
    whatever the width. The paper writes sqrt(r / in) for such a matrix ("orthogonal_paper"), but
    its rates fit the authors' code, which has the inverse.
    """
    r, i = shape
    A, g = torch.empty(shape, dtype=dtype), generator(*key)
    if init == "kaiming":
        return nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=g)
    if init == "xavier":
        return nn.init.xavier_uniform_(A, generator=g)
    gain = math.sqrt(i / r) if init == "orthogonal" else math.sqrt(r / i)
    return nn.init.orthogonal_(A, gain=gain, generator=g)


def factor_update(A, B, merged_A, merged_B):
    """U (..., out, 2r), V (..., 2r, in) with U V = B A - B' A'.

        U = [B - B', B'],  V = [A; A - A']:   U V = (B - B') A + B' (A - A') = B A - B' A'

    The difference of the two products would cancel: right after a merge it is rounding noise, not
    zero. This form is zero exactly where nothing changed, and keeps small progress to 1e-7.
    """
    return torch.cat([B - merged_B, merged_B], -1), torch.cat([A, A - merged_A], -2)


# ------------------------------------------------------------------------------------------------
# 3 merged tensors: one dense tensor in rows of 64 weights, and its exact master
# ------------------------------------------------------------------------------------------------

BASES = ("fp32", "bf16", "int8", "nf4", "fp4")
QUANTIZED = BASES[2:]  # by bitsandbytes
BLOCK = 64  # weights a row; a row carries its own scale, so that any slice of rows stands alone
PIECE = 4096  # rows: a merge forms, sends and adds a tensor by pieces of so many, whatever P is


def bitsandbytes():
    """bitsandbytes' functional quantization, imported when a quantized base first needs it."""
    try:
        import bitsandbytes.functional as bnb
    except ImportError as error:
        raise ImportError(
            "int8, nf4 and fp4 need the package bitsandbytes: pip install bitsandbytes"
        ) from error
    return bnb


def encode(x, base):
    """(rows, 64) floats -> (rows, bytes): 128 bytes bf16, 68 int8, 36 nf4 or fp4; fp32 as it is.

    int8 is bitsandbytes' dynamic 8-bit code, nf4 and fp4 its 4-bit codes, each with one fp32 absmax
    a row, which ends the row.
    """
    if base == "fp32":
        return x
    if base == "bf16":
        return x.bfloat16().view(torch.uint8)
    x = x.float().contiguous()
    if base == "int8":
        codes, state = bitsandbytes().quantize_blockwise(x, blocksize=BLOCK)
    else:
        codes, state = bitsandbytes().quantize_4bit(x, blocksize=BLOCK, quant_type=base)
    return torch.cat([codes.view(len(x), -1), state.absmax.view(-1, 1).view(torch.uint8)], 1)


def decode(rows, base, dtype):
    """(rows, bytes) -> (rows, 64) in `dtype`: what the forward pass multiplies with."""
    if base == "fp32":
        return rows
    if base == "bf16":
        return rows.view(torch.bfloat16).to(dtype)
    bnb, shape = bitsandbytes(), (len(rows), BLOCK)
    codes, absmax = rows[:, :-4].contiguous(), rows[:, -4:].contiguous().view(torch.float32)
    if base == "int8":
        return bnb.dequantize_blockwise(codes, absmax=absmax.flatten(), blocksize=BLOCK).to(dtype)
    state = bnb.QuantState(
        absmax.flatten(), shape=shape, dtype=torch.float32, blocksize=BLOCK, quant_type=base
    )
    return bnb.dequantize_4bit(codes.view(-1, 1), state).to(dtype)


class Merged(nn.Module):
    """A dense tensor that no gradient touches and every merge adds to.

    `rows` is the whole tensor in its forward format, equal on all processes. Of every piece of it
    (at most PIECE rows) each process keeps one part in full precision, the `master`: merges go
    there, and `rows` is always its rounding, so nothing is lost however coarse the base. For "fp32"
    the rows are the master. A merge asks of a subclass:
        decays                    does weight decay shrink it?
        learnt()                  what the heads here train, as it is now, tensors (n, ...)
        bound(learnt)             (n,): no weight changes by more; NaN or inf: cannot be added
        delta(learnt, h, piece)   head h's change of a piece since the last merge, flat
        roll_back(learnt, h)      head h starts again from the merged model
        install(learnt)           what was learnt is merged now: go on from there
    """

    decays = False

    def __init__(self, tensor, layout, base="fp32"):
        super().__init__()
        self.layout, self.base, self.plain = layout, base, ""  # plain: its name in the plain model
        self.shape, self.numel = tensor.shape, tensor.numel()
        rows = F.pad(tensor.detach().flatten(), (0, -self.numel % BLOCK)).view(-1, BLOCK)
        self.register_buffer("rows", encode(rows, base))
        parts = [rows[self.part(piece)] for piece in self.pieces]
        self.register_buffer("master", torch.cat(parts) if parts and base != "fp32" else None)

    @property
    def pieces(self):
        """Slices of the rows. They do not depend on P, so neither do the bits of what is formed."""
        count = math.ceil(self.numel / BLOCK)
        return [slice(k, min(k + PIECE, count)) for k in range(0, count, PIECE)]

    def share(self, piece, P=None):
        """Rows of a piece that one of P processes keeps (P: those running); the last get fewer."""
        return math.ceil((piece.stop - piece.start) / (P or self.layout.world))

    def part(self, piece):
        """Which rows of a piece this process keeps the master of, a slice."""
        share = self.share(piece)
        first = min(piece.start + self.layout.rank * share, piece.stop)
        return slice(first, min(first + share, piece.stop))

    def master_part(self, piece):
        """(rows, 64): this process's part of a piece of the master, a view."""
        part = self.part(piece)
        if self.master is None:
            return self.rows[part]
        full = self.part(slice(0, PIECE))  # of each of the pieces before this one
        first = piece.start // PIECE * (full.stop - full.start)
        return self.master[first : first + part.stop - part.start]

    def padded(self, part, piece):
        """A part filled up with zeros to share(piece) rows, since all processes send as many."""
        return F.pad(part, (0, 0, 0, self.share(piece) - len(part)))

    def gathered(self, piece):
        """(rows, 64): a piece of the master, from all processes. Collective."""
        part = self.padded(self.master_part(piece), piece)
        return all_gather(part, self.layout).flatten(0, 1)[: piece.stop - piece.start]

    def from_rows(self, rows):
        """(rows, 64) -> (shape), the padding dropped."""
        return rows.flatten()[: self.numel].view(self.shape)

    @property
    def dtype(self):
        """Of the master, and of W as it is decoded: float32 or float64."""
        dtype = self.rows.dtype if self.master is None else self.master.dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"the converted model was cast to {dtype}; keep it in float32 (or float64) and "
                "compute in bfloat16 under torch.autocast instead"
            )
        return dtype

    def dense(self):
        """The merged tensor as the forward pass sees it; a view of the rows for "fp32"."""
        return self.from_rows(decode(self.rows, self.base, self.dtype))

    def exact(self):
        """The merged tensor without rounding, a new tensor. Collective for a quantized base."""
        if self.master is None:
            return self.dense().clone()
        return self.from_rows(torch.cat([self.gathered(piece) for piece in self.pieces]))


# ------------------------------------------------------------------------------------------------
# 4 the low-rank layer: one head's product, and the layer
# ------------------------------------------------------------------------------------------------


def formed_is_cheaper(tokens, o, i):
    """Is W + s U V better formed as one matrix, or multiplied factor by factor ("textbook")?

    Multiply-adds of one head with M tokens (of all its samples together), forward and backward,
    beside the 2 M o i of W itself:

        textbook  (x V^T) U^T and (g U) V     4 M r (o + i)      x A^T, dA, dB     M r (o + 2 i)
        formed    W + s U V, twice            4 o i r            x A^T, g B, dA, dB  2 M r (o + i)

    U and V have rank 2r, and g B is there with g U. So forming pays where M (3 o + 4 i) > 4 o i:
    from 4/7 of the width on for a square layer, whatever r.
    """
    return tokens * (3 * o + 4 * i) > 4 * o * i


def aligned(x):
    """x, copied where it does not start a cache line.

    The last bits of a product may depend on where its operands lie. A head's lie differently where
    it has other neighbours, so all of them, and the results, start a cache line.
    """
    return x if torch.compiler.is_compiling() or x.data_ptr() % 64 == 0 else x.clone()


def aligned_empty(like, n, rows, columns):
    """(n, rows, columns), not filled, with gaps between the n where they would not be aligned."""
    line = 64 // like.element_size()
    stride = math.ceil(rows * columns / line) * line
    return like.new_empty_strided((n, rows, columns), (stride, columns, 1))


class HeadProduct(torch.autograd.Function):
    """y = x (W + s U V)^T + bias, head by head.

    x (n, M, i), A (n, r, i), B (n, o, r), bias (n, o) or None -> y (n, M, o)

        dx = g (W + s U V),    dB = s g^T (x A^T),    dA = s (g B)^T x,    dbias = g^T 1

    Beside the layer's own tensors only x is kept for the backward pass: W is decoded from its rows
    again, and W + s U V, where it is formed, is formed again, each head's in the place of the last
    one's. Under autocast it is formed in full precision and rounded once, as dense training rounds
    its W.
    """

    @staticmethod
    def forward(ctx, x, A, B, bias, merged_A, merged_B, W, s, rows, base):
        device, ctx.x_dtype, ctx.s, ctx.base = x.device.type, x.dtype, s, base
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        ctx.save_for_backward(x, A, B, merged_A, merged_B, rows)
        y = aligned_empty(x, *x.shape[:2], len(W))  # (n, M, o)
        form = formed_is_cheaper(x.shape[1], *W.shape)
        formed, W_x = (torch.empty_like(W), None) if form else (None, W.to(x.dtype))
        bias = y.new_zeros(len(y), len(W)) if bias is None else bias.to(y.dtype)
        update = factor_update(A, B, merged_A, merged_B)
        for x_n, y_n, bias_n, *own in zip(x, y, bias, *update, strict=True):
            x_n, U, V = map(aligned, (x_n, *own))
            if form:
                torch.addmm(W, U, V, alpha=s, out=formed)  # W + s U V
                torch.addmm(bias_n, x_n, formed.to(x.dtype).mT, out=y_n)
            else:
                torch.addmm(bias_n, x_n, W_x.mT, out=y_n)
                y_n.addmm_(x_n @ V.to(x.dtype).mT, U.to(x.dtype).mT, alpha=s)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        with torch.autocast(g.device.type, enabled=False):  # it may be called inside
            return HeadProduct.gradients(ctx, g)

    @staticmethod
    def gradients(ctx, g):
        x, A, B, merged_A, merged_B, rows = ctx.saved_tensors
        s, r, o, i = ctx.s, A.shape[1], B.shape[1], A.shape[2]
        need_dx, need_dbias = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        dx, dA, dB = (aligned_empty(x, *like.shape) for like in (x, A, B))
        dbias = A.new_zeros(len(B), o)  # full precision: a sum over all tokens
        W = decode(rows, ctx.base, A.dtype).flatten()[: o * i].view(o, i)
        form = formed_is_cheaper(x.shape[1], o, i)
        formed, W_x = (torch.empty_like(W), None) if form else (None, W.to(x.dtype))
        factors = A.to(x.dtype), B.to(x.dtype), *factor_update(A, B, merged_A, merged_B)
        for x_n, g_n, dx_n, dA_n, dB_n, dbias_n, *own in zip(
            x, g, dx, dA, dB, dbias, *factors, strict=True
        ):
            x_n, g_n, A_n, B_n, U, V = map(aligned, (x_n, g_n, *own))
            torch.mm(g_n.mT, x_n @ A_n.mT, out=dB_n)
            if form or not need_dx:
                gB = g_n @ B_n
            else:  # g U = [g (B - B'), g B'] is needed anyway
                gU = g_n @ U.to(x.dtype)
                gB = gU[:, :r] + gU[:, r:]
            torch.mm(gB.mT, x_n, out=dA_n)
            if need_dbias:
                torch.sum(g_n, 0, dtype=A.dtype, out=dbias_n)
            if need_dx and form:
                torch.addmm(W, U, V, alpha=s, out=formed)
                torch.mm(g_n, formed.to(x.dtype), out=dx_n)
            elif need_dx:
                torch.mm(g_n, W_x, out=dx_n)
                dx_n.addmm_(gU, V.to(x.dtype), alpha=s)
        dA, dB = (d.to(A.dtype).mul_(s) for d in (dA, dB))
        dx, dbias = dx.to(ctx.x_dtype) if need_dx else None, dbias if need_dbias else None
        return dx, dA, dB, dbias, *[None] * 6


def side_by_side(A, B):
    """The N heads' A (N, r, i), B (N, o, r) as one pair of rank N r: (1, N r, i), (1, o, N r)."""
    return A.flatten(0, 1).unsqueeze(0), B.transpose(0, 1).flatten(1).unsqueeze(0)


def largest(x):
    """(n, ...) -> (n,): each head's largest absolute value, NaN if it holds one."""
    low, high = x.reshape(len(x), -1).aminmax(dim=1)  # unlike abs() it takes no memory
    return torch.maximum(-low, high)


class MultiheadLoRALinear(Merged):
    """A linear layer with a frozen W and N low-rank heads.

        parallel=True   LTE:              y_n = W x_n + s (B_n A_n - B'_n A'_n) x_n + bias_n
        parallel=False  multi-head LoRA:  y = W x + (1/N) sum_n [s (B_n A_n - B'_n A'_n) x + bias_n]

    In eval the merged model alone: W and the merged bias, for a batch of any size.

    Usually made by convert, whose arguments these are; a layer built by hand is a model of its own,
    with its own merges.
    Source: the paper's equations of multi-head LoRA and of LTE.
    """

    decays = True

    def __init__(self, in_features, out_features, *, heads, r, lora_alpha, bias=True, base="fp32",
                 parallel=True, init="orthogonal", seed=0):
        check_options(r=r, lora_alpha=lora_alpha, base=base, init=init)
        layout, linear = Layout(heads, parallel, seed), nn.Linear(in_features, out_features, bias)
        layout.names = list(linear.state_dict())
        broadcast(linear, layout)
        self.setup(linear.weight, linear.bias, layout, r, lora_alpha, base, init)

    # __init__ makes new weights, `of` takes given ones; both end in `setup`.

    @classmethod
    def of(cls, weight, bias, prefix, layout, *, r, lora_alpha, base, init):
        """The layer for given weight (out, in) and bias; `prefix` is its name in the model."""
        layer = cls.__new__(cls)
        layer.setup(weight, bias, layout, r, lora_alpha, base, init, prefix)
        return layer

    def setup(self, weight, bias, layout, r, lora_alpha, base, init, prefix=""):
        super().__init__(weight, layout, base)
        self.out_features, self.in_features = weight.shape[0], weight[0].numel()
        self.scaling = lora_alpha / r
        self.r = min(r, self.in_features, self.out_features)
        self.init, self.plain = init, prefix + "weight"
        A = self.draw_A(weight).to(weight.device)  # (n, r, in)
        B = A.new_zeros(layout.local, self.out_features, self.r)  # (n, out, r)
        self.lora_A = nn.Parameter(A, requires_grad=weight.requires_grad)
        self.lora_B = nn.Parameter(B, requires_grad=weight.requires_grad)
        self.register_buffer("merged_A", A.clone())
        self.register_buffer("merged_B", B.clone())
        self.bias_copies = None if bias is None else Copies(bias, layout, prefix + "bias")

    def draw_A(self, like):
        """(n, r, in): every head its own, the same whichever process holds it."""
        shape, layout = (self.r, self.in_features), self.layout
        keys = [
            (layout.seed, layout.merges, self.plain, layout.rank * layout.local + h)
            for h in range(layout.local)
        ]
        return torch.stack([init_A(shape, self.init, *key, dtype=like.dtype) for key in keys])

    @property
    def weight(self):
        """W (out, in), frozen, as the forward pass sees it."""
        return self.dense().view(self.out_features, self.in_features)

    @property
    def bias(self):
        """(n, out), one bias a head; None without."""
        return None if self.bias_copies is None else self.bias_copies.heads

    def forward(self, x):
        bias = None if self.bias_copies is None else self.bias_copies.value()
        if not self.training:
            return F.linear(x, self.weight, bias)
        now, then = (self.lora_A, self.lora_B), (self.merged_A, self.merged_B)
        if self.layout.parallel:
            s, x_n = self.scaling, self.layout.split(x).flatten(1, -2)  # (n, b t, i)
        else:  # all samples to one head of rank N r, with s / N
            s, x_n = self.scaling / self.layout.heads, x.reshape(1, -1, self.in_features)
            now, then = side_by_side(*now), side_by_side(*then)
        bias = None if bias is None else bias.view(len(x_n), -1)  # (n, o), or (1, o) for all
        y_n = HeadProduct.apply(x_n, *now, bias, *then, self.weight, s, self.rows, self.base)
        return y_n.reshape(*x.shape[:-1], self.out_features)

    def learnt(self):
        return [self.lora_A.detach(), self.lora_B.detach()]

    def bound(self, learnt):
        A, B = (largest(x) for x in learnt)
        A, B = A + largest(self.merged_A), B + largest(self.merged_B)
        return self.scaling * 2 * self.r * A * B  # U V has entries of 2 r terms

    def delta(self, learnt, h, piece):
        """s (B A - B' A') of the h-th head here: the weights of a piece, flat."""
        (A, B), i = learnt, self.in_features
        first, last = piece.start * BLOCK, min(piece.stop * BLOCK, self.numel)
        top, bottom = first // i, math.ceil(last / i)  # the outputs that the piece touches
        U, V = factor_update(A[h], B[h, top:bottom], self.merged_A[h], self.merged_B[h, top:bottom])
        return (self.scaling * U @ V).flatten()[first - top * i : last - top * i]

    def roll_back(self, learnt, h):
        """The factors of the last merge: the update is zero, and the head is the merged model."""
        for A, B in (learnt, (self.lora_A, self.lora_B)):
            A[h], B[h] = self.merged_A[h], self.merged_B[h]

    def install(self, learnt):
        """After a merge: what these factors say is in W already."""
        self.merged_A.copy_(learnt[0])
        self.merged_B.copy_(learnt[1])

    def reset(self, which):
        """B <- 0, and for "AB" a new A: the head starts again, from W; returns what was reset."""
        if which == "AB":
            self.lora_A.copy_(self.draw_A(self.lora_A))
        self.lora_B.zero_()
        self.install(self.learnt())
        return [self.lora_A, self.lora_B] if which == "AB" else [self.lora_B]

    def extra_repr(self):
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"heads={self.layout.heads}, scaling={self.scaling:g}, base={self.base}"
        )


# ------------------------------------------------------------------------------------------------
# 5 what else heads own: copies of everything that has no low-rank form
# ------------------------------------------------------------------------------------------------


class Copies(Merged):
    """One copy of a tensor a head: heads (n, *shape), averaged at the merge."""

    def __init__(self, tensor, layout, plain):
        super().__init__(tensor, layout)
        self.plain = plain
        stacked = torch.stack([tensor.detach()] * layout.local)
        if isinstance(tensor, nn.Parameter):
            self.heads = nn.Parameter(stacked, requires_grad=tensor.requires_grad)
        else:
            self.register_buffer("heads", stacked)

    def value(self):
        """LTE: (n, *shape). Multi-head LoRA: the heads' mean. In eval: the merged tensor."""
        if not self.training:
            return self.dense()
        return self.heads if self.layout.parallel else self.heads.mean(0)

    def per_sample(self, samples):
        """value() for each sample: LTE (n b, *shape), its head's copy. Else (1, *shape)."""
        if self.training and self.layout.parallel:
            return self.heads.repeat_interleave(samples // self.layout.local, 0)
        return self.value().unsqueeze(0)

    def learnt(self):
        return [self.heads.detach()]

    def bound(self, learnt):
        return largest(learnt[0]) + largest(self.dense().unsqueeze(0))

    def delta(self, learnt, h, piece):
        weights = slice(piece.start * BLOCK, piece.stop * BLOCK)
        return learnt[0][h].flatten()[weights] - self.dense().flatten()[weights]

    def roll_back(self, learnt, h):
        learnt[0][h] = self.heads[h] = self.dense()

    def install(self, learnt):
        """After a merge every head goes on from the mean, plus what it learnt meanwhile.

        Statistics (buffers) just take the mean: plus a difference, a variance may turn negative.
        """
        if isinstance(self.heads, nn.Parameter):
            self.heads.sub_(learnt[0]).add_(self.dense())
        else:
            self.heads.copy_(self.dense())


class PerHead(nn.Module):
    """Any module that owns parameters or buffers, with one copy of them a head.

    torch.func runs the module's own code on the stacked copies, head n on its chunk of the batch;
    one head after the other, since a batched convolution's last bits depend on how many there are.
    Buffers of whole numbers (BatchNorm's counter), with inf (masks) or of size 0 are stacked too
    but not averaged: they are equal.
    """

    def __init__(self, module, prefix, layout):
        super().__init__()
        self.layout, self.prefix = layout, prefix
        tensors = dict(module.named_parameters(recurse=False))
        tensors |= dict(module.named_buffers(recurse=False))
        for name, tensor in tensors.items():
            exact = tensor.dtype in (torch.float32, torch.float64)
            statistic = exact and tensor.numel() and tensor.isfinite().all()
            if isinstance(tensor, nn.Parameter) or statistic:
                self._modules[name] = Copies(tensor, layout, prefix + name)
            else:
                self._buffers[name] = torch.stack([tensor] * layout.local)
        # Not a child, and without memory of its own: only its forward is used.
        self.__dict__["code"] = module.to("meta")

    def forward(self, *args, **kwargs):
        self.code.training = self.training
        call = partial(torch.func.functional_call, self.code)
        copies = self._modules | self._buffers  # by whatever name, even one of our own attributes
        stacked = {n: c.heads if isinstance(c, Copies) else c for n, c in copies.items()}
        if not (self.training and self.layout.parallel):
            state = {n: c.value() if isinstance(c, Copies) else c[0] for n, c in copies.items()}
            y = call(state, args, kwargs)
            for name, heads in stacked.items() if self.training else ():
                if not isinstance(heads, nn.Parameter):  # what the code did to the buffers' mean
                    heads.copy_(state[name].expand_as(heads))
            return y
        state = {name: heads.unbind(0) for name, heads in stacked.items()}
        leaves, spec = tree_flatten((args, kwargs))
        chunks = [self.split(j, x) for j, x in enumerate(leaves)]
        outputs = []
        for h in range(self.layout.local):
            own_state = {name: heads[h] for name, heads in state.items()}
            own = tree_unflatten([chunk[h] for chunk in chunks], spec)
            y, out_spec = tree_flatten(call(own_state, *own))
            outputs.append(y)
        joined = [self.join(j, y) for j, y in enumerate(zip(*outputs, strict=True))]
        return tree_unflatten(joined, out_spec)

    def batch_dim(self, j):
        """The batch is first, but in all tensors of a recurrent layer after its x or y second."""
        return int(isinstance(self.code, nn.RNNBase) and j > 0)

    def split(self, j, x):
        """What each head here gets of the j-th argument."""
        if not isinstance(x, torch.Tensor):
            return [x] * self.layout.local
        dim = self.batch_dim(j)
        chunks = self.layout.split(x.movedim(dim, 0))
        return [aligned(own.movedim(0, dim).contiguous() if dim else own) for own in chunks]

    def join(self, j, y):
        """The j-th result from each head's."""
        return torch.cat(y, self.batch_dim(j)) if isinstance(y[0], torch.Tensor) else y[0]

    def extra_repr(self):
        return f"{self.code}, heads={self.layout.heads}"


class PatchConv(MultiheadLoRALinear):
    """Conv2d whose kernel equals its stride: a linear layer on the patches, each (c, k, k)."""

    @staticmethod
    def fits(conv):
        return (
            type(conv) is nn.Conv2d
            and conv.kernel_size == conv.stride
            and conv.padding in ((0, 0), "valid")
            and conv.dilation == (1, 1)
            and conv.groups == 1
        )

    def forward(self, x):
        (h, w), (kh, kw) = x.shape[2:], self.shape[2:]
        x = x[:, :, : h - h % kh, : w - w % kw]  # as Conv2d: what fills no patch is left out
        x = x.unflatten(3, (-1, kw)).unflatten(2, (-1, kh))  # (b, c, h', kh, w', kw)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (b, h', w', c kh kw)
        return super().forward(x).permute(0, 3, 1, 2)


class MultiheadAttention(nn.Module):
    """nn.MultiheadAttention(batch_first=True) with its projections as layers that heads own.

    `linear(weight, bias, name)` makes such a layer. The packed in_proj is one layer (3 d, d); with
    kdim or vdim there are three, and one bias (3 d) in copies. forward takes the same arguments.
    """

    in_proj_bias = None  # tells nn.TransformerEncoderLayer that its fused path is not for us
    batch_first = True

    def __init__(self, attention, linear, layout, prefix):
        super().__init__()
        self.attn_heads, self.bias_copies = attention.num_heads, None
        bias = attention.in_proj_bias
        if attention.in_proj_weight is not None:
            projections = [linear(attention.in_proj_weight, bias, "in_proj_")]
        else:
            names = ("q_proj_", "k_proj_", "v_proj_")
            projections = [linear(getattr(attention, n + "weight"), None, n) for n in names]
            if bias is not None:
                self.bias_copies = Copies(bias, layout, prefix + "in_proj_bias")
        self.in_proj = nn.ModuleList(projections)
        self.out_proj = linear(attention.out_proj.weight, attention.out_proj.bias, "out_proj.")

    def project(self, query, key, value):
        """q, k, v (batch, t, d) from the three inputs."""
        inputs = (query, key, value)
        if len(self.in_proj) == 3:
            qkv = [layer(x) for layer, x in zip(self.in_proj, inputs, strict=True)]
            if self.bias_copies is None:
                return qkv
            bias = self.bias_copies.per_sample(len(query)).unsqueeze(-2)  # (batch or 1, 1, 3 d)
            return [x + b for x, b in zip(qkv, bias.chunk(3, -1), strict=True)]
        if query is key and key is value:
            return self.in_proj[0](query).chunk(3, -1)
        return [self.in_proj[0](x).chunk(3, -1)[j] for j, x in enumerate(inputs)]

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                average_attn_weights=True, is_causal=False):
        if query.dim() != 3:
            raise ValueError(f"attention over {query.dim()}-d input: heads need a batch, use 3-d")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True only describes a mask: give attn_mask as well")
        q, k, v = (
            x.unflatten(-1, (self.attn_heads, -1)).transpose(1, 2)  # (batch, attn_heads, t, d)
            for x in self.project(query, key, value)
        )
        mask = attention_mask(attn_mask, key_padding_mask, q)
        weights = None
        if need_weights:
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            weights = (scores if mask is None else scores + mask).softmax(-1)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out_proj(y.transpose(1, 2).flatten(2)), weights


def attention_mask(attn_mask, key_padding_mask, q):
    """Both masks of nn.MultiheadAttention as one to add to the scores: True or -inf is left out."""
    masks = []
    if attn_mask is not None:  # (t, t) or (batch attn_heads, t, t)
        each = attn_mask.dim() == 3
        masks.append(attn_mask.unflatten(0, (-1, q.shape[1])) if each else attn_mask)
    if key_padding_mask is not None:  # (batch, t)
        masks.append(key_padding_mask[:, None, None])
    for k, mask in enumerate(masks):
        if mask.dtype == torch.bool:
            masks[k] = q.new_zeros(mask.shape).masked_fill(mask, -math.inf)
    return sum(masks) if masks else None


class HeadDropout(nn.Module):
    """nn.Dropout with masks that depend on (seed, layer, call, head), not on the process.

    Not for use under activation checkpointing: a recomputed call would draw a new mask.
    """

    def __init__(self, p, name, layout):
        super().__init__()
        self.p, self.name, self.layout, self.calls = p, name, layout, 0

    def forward(self, x):
        if not self.training:
            return x
        layout, self.calls = self.layout, self.calls + 1
        chunks = layout.split(x) if layout.parallel else x.unsqueeze(0)
        keep = torch.empty_like(chunks, requires_grad=False)
        for h in range(len(chunks)):
            key = (layout.seed, self.name, self.calls, layout.rank * layout.local + h)
            keep[h].bernoulli_(1 - self.p, generator=generator(*key, device=x.device))
        return (chunks * keep / max(1 - self.p, 1e-9)).view_as(x)


class BareCopies(nn.ModuleDict):
    """Copies of parameters that a module with children owns itself, such as a class token (1, ...).

    The module's own forward reads them by name, self.class_token. So for each call a hook lends it
    under that name a tensor with one row a sample, its head's copy, and takes it back afterwards.
    """

    def __init__(self, owner, prefix, layout):
        super().__init__()
        for name, parameter in list(owner.named_parameters(recurse=False)):
            self._modules[name] = Copies(parameter, layout, prefix + name)
            delattr(owner, name)
        owner.register_forward_pre_hook(self.lend, with_kwargs=True)
        owner.register_forward_hook(self.take_back, always_call=True)

    def lend(self, owner, args, kwargs):
        samples = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)).shape[0]
        for name, copies in self.items():
            rows = copies.per_sample(samples)  # (n b, 1, ...)
            setattr(owner, name, rows.squeeze(1))

    def take_back(self, owner, args, output):
        for name in self:
            owner.__dict__.pop(name, None)


# ------------------------------------------------------------------------------------------------
# 6 convert: give every parameter of a model exactly one owner
# ------------------------------------------------------------------------------------------------


def convert(model, *, heads, r, lora_alpha=None, base="fp32", parallel=True, init="orthogonal",
            bare="error", skip=(), seed=0):
    """Turn a plain model into one that N heads train. In place; returns it. Collective.

    The function it computes stays the same: B = 0, so every head starts as the model it was given,
    fresh or pretrained. All processes get rank 0's weights. Call it once, before the optimizer.

    Args:
        heads: N over all processes, a multiple of their number.
        r: rank of one head (1 or more). None: no factors, every head trains a dense copy of
            everything, which is local SGD.
        lora_alpha: s = lora_alpha / r.
        base: storage of the low-rank layers' W, one of BASES. Everything else stays exact.
        parallel: True: head n sees its own chunk of the batch (LTE). False: every head sees every
            sample (multi-head LoRA, one process only).
        bare: parameters that a module with children owns itself: "error", "freeze", or "heads",
            which needs shape (1, n, ...), as many dimensions as what it is added to or joined with,
            and a module whose first argument has the batch first.
        skip: names of modules to leave dense and frozen.
    Raises: ValueError or TypeError, with the names of what could not be placed, before any change.
    """
    options = dict(heads=heads, r=r, lora_alpha=lora_alpha, base=base, parallel=parallel, init=init)
    shapes = {f"the shape of {n}": tuple(p.shape) for n, p in model.named_parameters()}
    agree(version=__version__, **options, bare=bare, skip=sorted(skip), seed=seed, **shapes)
    layout = Layout(heads, parallel, seed)
    check_options(r=r, lora_alpha=lora_alpha, base=base, init=init, bare=bare)
    plan = make_plan(model, r, bare, set(skip))
    broadcast(model, layout)
    layout.names = [name for name in model.state_dict() if not name.endswith("_extra_state")]
    factors = dict(r=r, lora_alpha=lora_alpha, base=base, init=init)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # its fused path reads weights that are not there
    for name in list(plan):
        kind, module = plan.pop(name)  # so that a dense weight goes when its layer is made
        new = build(kind, module, name + "." if name else "", layout, factors)
        if new is not None:
            new.train(module.training)
            if name:
                model.set_submodule(name, new)
            else:
                model = new
    return model


def check_options(*, r, lora_alpha, base, init, bare="error"):
    """One sentence for a value that convert does not take."""
    if r is not None and not (isinstance(r, int) and r >= 1 and lora_alpha and lora_alpha > 0):
        raise ValueError(
            f"r={r}, lora_alpha={lora_alpha}: r must be an integer from 1 on, lora_alpha above 0"
        )
    check_choice("base", base, BASES)
    check_choice("init", init, INITS)
    check_choice("bare", bare, ("error", "freeze", "heads"))


def check_choice(name, value, known):
    """A value that is one of `known`; imports bitsandbytes for one that needs it."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(known)}")
    if value in QUANTIZED:
        bitsandbytes()


def make_plan(model, r, bare, skip):
    """name -> (kind, module), having checked everything that can be wrong with the model."""
    names = dict(model.named_modules(remove_duplicate=False))
    if any(isinstance(m, (Merged, PerHead)) for m in names.values()):
        raise ValueError("this model is converted already; convert a plain model, once")
    if skip - names.keys():
        raise ValueError(f"skip names no module: {sorted(skip - names.keys())}")
    check_parameters(model)
    seen, plan = {}, {}
    for name, module in names.items():  # every module before its children
        if id(module) in seen and list(module.buffers(recurse=False)):
            raise ValueError(f"{seen[id(module)]} and {name} are one module with buffers; untie it")
        seen[id(module)] = name
        above, _ = plan.get(name.rpartition(".")[0], ("", None))
        if not name or above in ("walk", "bare", "freeze bare"):  # one used twice comes twice
            plan[name] = find_kind(name, module, r, bare, skip), module
    if r is not None and not any(k in ("linear", "conv", "attention") for k, _ in plan.values()):
        raise ValueError(
            "nothing to convert: the model has no Linear, MultiheadAttention or patch Conv2d; "
            "its parameters would only be copied (r=None does that)"
        )
    return plan


def check_parameters(model):
    """Only float32 or float64, and no parameter under two names."""
    seen = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name} is {p.dtype}: heads learn in float32 (or float64); convert a float32 "
                "model and compute in bfloat16 under torch.autocast"
            )
        if id(p) in seen:
            raise ValueError(f"{seen[id(p)]} and {name} are one tied parameter; untie them first")
        seen[id(p)] = name


def find_kind(name, module, r, bare, skip):
    """Which owner a module's parameters get.

    "linear", "conv", "attention" low-rank; "copies"; "bare" or "freeze bare" parameters beside
    children; "dropout"; "freeze" left as it is; "walk" nothing of its own, look at its children.
    """
    own, buffers = list(module.parameters(recurse=False)), list(module.buffers(recurse=False))
    if name in skip:
        check_skip(name, module)
        return "freeze"
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and not module.batch_first:
        raise ValueError(
            f"{name}: {type(module).__name__} with batch_first=False; heads share the first "
            "dimension of every tensor, which must be the batch: build it with batch_first=True"
        )
    if isinstance(module, nn.MultiheadAttention):
        own_class = type(module) is not nn.MultiheadAttention  # and a forward of its own
        if own_class or module.bias_k is not None or module.add_zero_attn or module.dropout:
            raise ValueError(
                f"{name}: attention with dropout={module.dropout}, add_bias_kv, add_zero_attn or "
                "a class of its own cannot be converted; build it without them, or skip it"
            )
        return "attention"
    if type(module) is nn.Dropout and module.p > 0:
        return "dropout"
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        raise ValueError(f"{name}: {module} draws from the process's generator; use nn.Dropout")
    if list(module.children()) or isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        kind = bare_kind(name, module, bare) if any(p.requires_grad for p in own) else "walk"
        # A parametrization's modules get a weight, no batch.
        return "freeze" if isinstance(module, ParametrizationList) else kind
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "copies"  # even one without tensors: a head's statistics are of its own samples
    if own and not buffers and not any(p.requires_grad for p in own):
        return "walk"  # frozen by its author, and so it stays
    if r is not None and module._parameters.keys() == {"weight", "bias"} and not buffers:
        if type(module) is nn.Linear:  # without the tensors of a hook, such as weight_norm's
            return "linear"
        if PatchConv.fits(module):
            return "conv"
    return "copies" if own or buffers else "walk"


def check_skip(name, module):
    """What is left as it is must not draw random numbers or gather statistics: no head owns it."""
    for child_name, child in module.named_modules():
        drops = isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0
        if drops or getattr(child, "running_mean", None) is not None:
            raise ValueError(
                f"skip={name!r} holds {child_name or name}, {child}: its masks or statistics would "
                "depend on the process; set p=0, or do not skip it"
            )


def bare_kind(prefix, module, bare):
    """Parameters of a module with children: refused, unless the caller has chosen."""
    listed = isinstance(module, (nn.ParameterList, nn.ParameterDict, ParametrizationList))
    for name, p in module.named_parameters(recurse=False):
        full = f"{prefix}.{name} {tuple(p.shape)}" if prefix else f"{name} {tuple(p.shape)}"
        if bare == "error":
            raise ValueError(
                f"{full} belongs to no leaf module; choose bare='freeze', or bare='heads' if its "
                "shape is (1, ...), or move it into a module of its own"
            )
        if bare == "heads" and (listed or p.dim() < 2 or p.shape[0] != 1):
            raise ValueError(
                f"{full}: bare='heads' needs shape (1, n, ...) and a module with a forward of "
                "its own; use bare='freeze' or move it into a module"
            )
    return "bare" if bare == "heads" else "freeze bare"


def build(kind, module, prefix, layout, factors):
    """The module that takes this one's place, or None where it stays."""

    def linear(weight, bias, name):
        if factors["r"] is None:
            plain = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            plain.weight, plain.bias = weight, bias
            return PerHead(plain, prefix + name, layout)
        return MultiheadLoRALinear.of(weight, bias, prefix + name, layout, **factors)

    if kind in ("freeze", "freeze bare"):
        for p in module.parameters(recurse=kind == "freeze"):
            p.requires_grad_(False)
    elif kind == "bare":
        module.lte_copies = BareCopies(module, prefix, layout).train(module.training)
    elif kind == "linear":
        return linear(module.weight, module.bias, "")
    elif kind == "conv":
        return PatchConv.of(module.weight, module.bias, prefix, layout, **factors)
    elif kind == "attention":
        return MultiheadAttention(module, linear, layout, prefix)
    elif kind == "dropout":
        return HeadDropout(module.p, prefix, layout)
    elif kind == "copies":
        return PerHead(module, prefix, layout)
    return None


def broadcast(model, layout):
    """All processes start from rank 0's weights, whatever they were seeded with."""
    if layout.world > 1:
        with torch.no_grad(), collective("sending process 0's weights"):
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, src=0)


def census(model):
    """Who owns which parameter of the plain model.

    Returns {"low-rank": {name: size}, "copies": {...}, "frozen": {...}}; every parameter stands in
    exactly one of the three.
    """
    owners = {"low-rank": {}, "copies": {}, "frozen": {}}
    for m in merged_tensors(model):
        kind = "low-rank" if isinstance(m, MultiheadLoRALinear) else "copies"
        for p in m.parameters(recurse=False):  # none where a buffer is copied
            owners[kind if p.requires_grad else "frozen"][m.plain] = m.numel
    ours = {id(p) for m in merged_tensors(model) for p in m.parameters()}
    owners["frozen"] |= {n: p.numel() for n, p in model.named_parameters() if id(p) not in ours}
    return owners


def merged_tensors(model):
    """Every Merged of a model, in the order of its modules: the same on all processes."""
    return [m for m in model.modules() if isinstance(m, Merged)]


def layout_of(model):
    """The layout that a model's layers share."""
    layouts = {id(m.layout): m.layout for m in merged_tensors(model)}
    if not layouts:
        raise ValueError("this model was not converted; call lte.convert first")
    if len(layouts) > 1:
        raise ValueError(f"{len(layouts)} separately converted parts; convert the whole once")
    return layouts.popitem()[1]


# ------------------------------------------------------------------------------------------------
# 7 merge
# ------------------------------------------------------------------------------------------------

BUCKET = 32 * 2**20  # bytes; half of it are deltas that are sent at a time


@torch.no_grad()
def merge(model, *, optimizer=None, reset="none", decay=1.0, wire="fp32", outer_optimizer=None,
          async_op=False):
    """W <- decay W + (1/N) sum_n s (B_n A_n - B'_n A'_n); copies <- their mean. Collective.

    Right after it every head computes just what the merged model computes. A second merge with no
    step in between (and decay 1) changes nothing. It takes less than 2 BUCKET of memory of its own.

    A head that holds NaN or inf is left out: the mean is over the others, and it starts again from
    the merged model, with zero moments if `optimizer` is given. (Adam's step count is common to all
    heads and stays, so late in a run this one's updates are 3, soon 6.6 times the rate.)

    Args:
        optimizer: needed for a reset, which clears its whole state of what was reset (Adam's step
            count too: an old count takes new moments for full ones, and the next update is wrong).
        reset: "none": factors and their optimizer state go on. "B": B <- 0. "AB": and a new A.
        decay: factor on W of low-rank layers, the product of (1 - rate_t wd) since the last merge.
        wire: what each process rounds its sum of deltas to before it is sent, one of BASES. The
            rounding is not made good later: the master is the sum of what was sent.
        outer_optimizer: over outer_parameters(model). It steps with minus the mean as gradient,
            instead of W <- W + mean, which is SGD's step at rate 1.
        async_op: return a MergeWork at once. Heads may go on learning until its wait(), which
            applies the merge of what they had learnt when merge was called. Until then it holds a
            snapshot of that, the new forward W and this process's part of the new master.
    Raises: ValueError or RuntimeError, nothing changed, for what cannot be merged; ProcessLost,
        after which the run has to go on from a checkpoint; FloatingPointError, nothing changed, if
        no head is finite.
    Source: the paper's LTE update; telescoped, W = W_start + (s/N) sum_n B_n A_n without reset.
    """
    layout, tensors = layout_of(model), merged_tensors(model)
    check_idle(layout, "merge")
    check_reset(tensors, reset, optimizer)
    check_choice("wire", wire, BASES)
    if async_op and reset != "none":
        raise ValueError(
            f"reset={reset!r} with async_op=True would drop what heads learn before wait(); use "
            "reset='none', or async_op=False"
        )
    outer = outer_parts(model, outer_optimizer)
    work = MergeWork(layout, tensors, optimizer, decay, wire, outer_optimizer, outer)
    if async_op:
        return work.start()
    work.learnt = {m: m.learnt() for m in tensors}  # live: nobody changes them meanwhile
    with torch.autocast(tensors[0].rows.device.type, enabled=False):
        work.find_sound()
        for bucket in buckets(tensors):
            work.apply(bucket, *work.send(bucket))
        work.finish()
    if reset != "none":
        for layer in tensors:
            if isinstance(layer, MultiheadLoRALinear):
                for p in layer.reset(reset):
                    optimizer.state.pop(p, None)


class MergeWork:
    """One merge. From merge(async_op=True): under way until wait() has applied it.

    Between the two a head computes with W_old + s (B A - B'_old A'_old), from wait() on with
    W_new + s (B A - B'_sent A'_sent): what it learnt meanwhile stays its own, for the next merge.
    """

    def __init__(self, layout, tensors, optimizer, decay, wire, outer_optimizer, outer):
        self.layout, self.tensors, self.optimizer, self.decay = layout, tensors, optimizer, decay
        self.wire = wire if layout.world > 1 else "fp32"  # nothing is sent, nothing rounded
        self.outer_optimizer, self.outer = outer_optimizer, outer
        self.group = None  # the default one

    def find_sound(self):
        """Which of all heads can be added, (N,) bool; the first collective of a merge."""
        bounds = torch.stack([m.bound(learnt) for m, learnt in self.learnt.items()])  # (-, n)
        mine = (bounds * self.layout.heads).isfinite().all(0)  # so that no sum can overflow
        self.layout.bytes_sent += mine.nbytes * (self.layout.world - 1)
        sound = all_gather(mine.byte(), self.layout, self.group).flatten()
        self.bad = (sound == 0).nonzero().flatten().tolist()
        if len(self.bad) == self.layout.heads:
            raise FloatingPointError(
                f"merge {self.layout.merges + 1}: every head holds NaN or inf; W is left as it "
                "was; go on from a checkpoint with a lower rate or lora_alpha"
            )

    def send(self, bucket):
        """Partial sums -> all-to-all -> mean -> new master -> all-gather of the forward format.

        As many bytes as a reduce-scatter and an all-gather, but the order of addition is ours.
        Returns, for each (tensor, piece) of the bucket, this process's part of the new master and
        every process's part of the forward rows. Changes nothing that the forward pass reads.
        """
        mean = self.mean(self.partial_sums(bucket))
        parts = mean.split([m.share(piece) for m, piece in bucket])  # (share, 64) each
        self.advance(bucket, parts)
        sizes = [m.share(piece) * m.rows[0].nbytes for m, piece in bucket]
        forward = mean.new_empty(sum(sizes), dtype=torch.uint8)
        self.layout.bytes_sent += forward.nbytes * (self.layout.world - 1)  # on a ring
        for (m, _), part, place in zip(bucket, parts, forward.split(sizes), strict=True):
            place.copy_(encode(part, m.base).view(torch.uint8).flatten())
        return parts, all_gather(forward, self.layout, self.group).split(sizes, 1)

    def partial_sums(self, bucket):
        """Each piece's deltas summed over the sound heads here: (P, rows, 64), a part for each."""
        layout, (m, _) = self.layout, bucket[0]
        shares = [m.share(piece) for m, piece in bucket]
        sums = m.rows.new_empty(layout.world, sum(shares), BLOCK, dtype=m.dtype)
        first = layout.rank * layout.local

        def term(m, piece, h):
            delta = m.delta(self.learnt[m], h, piece)
            return delta.zero_() if first + h in self.bad else delta

        for (m, piece), part in zip(bucket, sums.split(shares, 1), strict=True):
            total = tree_sum(partial(term, m, piece), 0, layout.local)
            part.copy_(F.pad(total, (0, part.numel() - len(total))).view_as(part))
        return sums

    def mean(self, sums):
        """(P, rows, 64) partial sums -> (rows, 64): this process's part, over all sound heads."""
        layout, (P, rows, _), dtype = self.layout, sums.shape, sums.dtype
        sent = encode(sums.flatten(0, 1), self.wire).view(P, -1)
        layout.bytes_sent += sent[0].nbytes * (P - 1)
        arrived = all_to_all(sent, layout, self.group).view(P, rows, -1)  # (P, rows, bytes)
        del sums, sent  # their memory, before the parts are decoded
        total = tree_sum(lambda p: decode(arrived[p], self.wire, dtype), 0, P)
        return total.div_(layout.heads - len(self.bad))

    def advance(self, bucket, parts):
        """The mean of each part becomes, in place, the part's new value: decay W + mean.

        An outer optimizer is lent a copy of W to step on: W itself is in use until wait().
        """
        lent = []
        for (m, piece), part in zip(bucket, parts, strict=True):
            W = m.master_part(piece)
            old, part = W * (self.decay if m.decays else 1.0), part[: len(W)]
            if self.outer is None:
                part += old
            elif len(W):
                p = self.outer[m, piece.start]
                p.data, p.grad = old, part.neg_()
                lent.append((p, W, part))
        if lent:
            self.outer_optimizer.step()
        for p, W, part in lent:
            part.copy_(p.data)
            p.data, p.grad = W, None

    def apply(self, bucket, parts, everyone):
        """W becomes what arrived."""
        for (m, piece), part, arrived in zip(bucket, parts, everyone, strict=True):
            rows = m.rows[piece].view(torch.uint8)
            rows.copy_(arrived.reshape(-1, rows.shape[1])[: len(rows)])
            if m.master is not None:
                own = m.master_part(piece)
                own.copy_(part[: len(own)])

    def finish(self):
        """Heads go on from the new W; those that were left out start again."""
        layout, first = self.layout, self.layout.rank * self.layout.local
        here = [head - first for head in self.bad if first <= head < first + layout.local]
        for m, learnt in self.learnt.items():
            for h in here:
                m.roll_back(learnt, h)
                if self.optimizer is not None:
                    clear_moments(self.optimizer, m, h)
            m.install(learnt)
        layout.merges += 1
        layout.left_out += len(self.bad)
        if self.bad and layout.rank == 0:
            moments = "with zero moments" if self.optimizer else "with its moments (optimizer=)"
            warnings.warn(
                f"merge {layout.merges}: head {', '.join(map(str, self.bad))} of {layout.heads} "
                f"holds NaN or inf; left out, it starts again from the merged model, {moments}",
                stacklevel=4,  # whoever called merge or wait
            )

    def start(self):
        """Snapshot, and all the sending in a thread of its own, through a group of its own."""
        self.learnt = {m: [x.clone() for x in m.learnt()] for m in self.tensors}
        self.arrived, device = Future(), self.tensors[0].rows.device
        if self.layout.world > 1:
            self.group = second_group(dist.group.WORLD, device)
        gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if gpu else None
        if gpu:
            self.stream.wait_stream(torch.cuda.current_stream(device))
        self.layout.in_flight = self
        Thread(target=self.run, daemon=True).start()
        return self

    @torch.no_grad()
    def run(self):
        """What the thread does: every bucket, and what arrives is kept until wait()."""
        try:
            with torch.cuda.stream(self.stream) if self.stream else nullcontext():
                self.find_sound()
                got = [(bucket, *self.send(bucket)) for bucket in buckets(self.tensors)]
            self.arrived.set_result(got)
        except BaseException as error:  # wait() raises it
            self.arrived.set_exception(error)

    @torch.no_grad()
    def wait(self):
        """Waits for what was sent, and applies it. Once; W changes here and only here."""
        if self.layout.in_flight is not self:
            raise RuntimeError("this merge was waited for already")
        try:
            got = self.arrived.result()
        finally:
            self.layout.in_flight = None
        if self.stream:
            torch.cuda.current_stream(self.tensors[0].rows.device).wait_stream(self.stream)
        for bucket, parts, everyone in got:
            self.apply(bucket, parts, everyone)
        self.finish()


def buckets(tensors):
    """Groups of (tensor, piece), in order; the deltas of a group are sent together."""
    groups, size = [], math.inf
    for m in tensors:
        for piece in m.pieces:
            nbytes = m.layout.world * m.share(piece) * BLOCK * m.dtype.itemsize
            if size + nbytes > BUCKET / 2 or m.dtype != groups[-1][0][0].dtype:
                groups.append([])
                size = 0
            groups[-1].append((m, piece))
            size += nbytes
    return groups


def outer_parameters(model):
    """What an outer optimizer steps on: this process's part of each piece of the master.

    Views, so the optimizer's state takes 1 / P on each process, as the master does. Valid until the
    model is moved or converted again.
    """
    layout_of(model)
    # .data, since autograd must not count an outer step on a lent copy as a change of W.
    return [m.master_part(piece).data for m in merged_tensors(model) for piece in m.pieces]


def outer_parts(model, outer_optimizer):
    """(tensor, start of a piece) -> the parameter of the outer optimizer; None without one."""
    if outer_optimizer is None:
        return None
    held = [p for group in outer_optimizer.param_groups for p in group["params"]]
    places = [(m, piece) for m in merged_tensors(model) for piece in m.pieces]
    held = {p.data_ptr(): p for p in held}  # 0 for all that are empty
    places = {m.master_part(piece).data_ptr(): (m, piece.start) for m, piece in places}
    if held.keys() != places.keys():
        raise ValueError(
            "outer_optimizer does not hold this model's outer parameters; "
            "make it from lte.outer_parameters(model), after convert and after moving the model"
        )
    return {places[pointer]: p for pointer, p in held.items()}


def clear_moments(optimizer, merged, h):
    """Zeros in the h-th head's place of all optimizer state of one tensor's heads."""
    for p in merged.parameters(recurse=False):
        for value in optimizer.state.get(p, {}).values():
            if torch.is_tensor(value) and value.shape == p.shape:
                value[h] = 0


@cache
def second_group(default, device):
    """All processes once more, so that collectives of the thread and of the caller never mix."""
    with collective("opening a second group"):
        return dist.new_group(timeout=default._get_backend(device).options._timeout)


def check_idle(layout, what):
    """Raises RuntimeError while a merge is in flight."""
    if layout.in_flight is not None:
        raise RuntimeError(f"{what} while a merge is in flight; call its wait() first")


def check_reset(tensors, reset, optimizer):
    """A known reset, and for one that resets the optimizer whose state it must clear."""
    check_choice("reset", reset, ("none", "B", "AB"))
    if reset == "none":
        return
    if optimizer is None:
        raise ValueError(f"reset={reset!r} needs optimizer=, to clear its state of what is reset")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for m in tensors:
        learns = isinstance(m, MultiheadLoRALinear) and m.lora_B.requires_grad
        if learns and id(m.lora_B) not in held:
            raise ValueError(f"the optimizer does not hold the factors of {m.plain}: wrong one?")


# ------------------------------------------------------------------------------------------------
# 8 training helpers
# ------------------------------------------------------------------------------------------------


def head_loss(losses, model):
    """Sum over this process's heads of each head's mean loss; losses is (n b, ...), unreduced.

    The sum, not the mean: a head's gradient must not depend on how many heads share its process.
    For multi-head LoRA, where all heads share all samples, the plain mean.
    """
    layout = layout_of(model)
    if not losses.dim():
        raise ValueError("head_loss needs each sample's loss, not their mean; use reduction='none'")
    if not layout.parallel:
        return losses.mean()
    return layout.split(losses).flatten(1).mean(1).sum()


@torch.no_grad()
def clip_grad_norm_(model, max_norm):
    """Clip each head's gradient to max_norm by its own norm; returns the norms (n,) before it.

    Head by head, so that a head's step does not depend on its neighbours. For multi-head LoRA the
    heads are one model with one norm. Warns where something that should learn has no gradient.
    """
    layout = layout_of(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if silent := [name for name, p in trained.items() if p.grad is None]:
        warnings.warn(
            f"no gradient for {', '.join(silent)}: a module was not called, or another one reads "
            "its weight, which is frozen",
            stacklevel=3,
        )
    learning = [p for p in trained.values() if p.grad is not None]
    if not layout.parallel:
        return nn.utils.clip_grad_norm_(learning, max_norm).expand(layout.heads)
    grads, norms = [p.grad for p in learning], []
    for h in range(layout.local):
        mine = [g[h] for g in grads]
        norms.append(nn.utils.get_total_norm(mine))
        if mine:
            torch._foreach_mul_(mine, (max_norm / (norms[-1] + 1e-6)).clamp(max=1.0))
    return torch.stack(norms)


# ------------------------------------------------------------------------------------------------
# 9 checkpoints: written by any number of processes, read by any other
# ------------------------------------------------------------------------------------------------

KEEP = 2  # whole checkpoints in a directory; older ones are removed


def save(directory, model, optimizer=None, outer_optimizer=None, *, step, **extra):
    """Write directory/step_00000120, or nothing: aside, and renamed when whole. Collective.

    Everything that training goes on with, at any step of a cycle: factors, those of the last merge,
    copies, optimizer state, master, outer state, counters. torch.distributed.checkpoint writes it,
    each head under keys of its own. The directory has to be one that all processes share. A plain
    model (dense training) is saved too. The last KEEP checkpoints stay.

    Args:
        step: optimizer steps done. extra: what else load shall return; anything json can hold.
    Raises: RuntimeError while a merge is in flight; ValueError for what cannot be saved; OSError
        where the disk fails; ProcessLost. The checkpoints that are there stay whole.
    """
    import torch.distributed.checkpoint as dcp

    layout = run_layout(model, "save")
    final = Path(directory) / f"step_{step:08d}"
    aside = final.with_suffix(".new")
    meta = dict(version=__version__, step=step, extra=extra, about=about(model))
    meta |= dict(merges=layout.merges, left_out=layout.left_out, bytes_sent=layout.bytes_sent)
    meta["dropout"] = {m.name: m.calls for m in model.modules() if isinstance(m, HeadDropout)}
    meta["optimizers"] = [describe(*o) for o in optimizers(model, optimizer, outer_optimizer)]
    try:
        json.dumps(meta)
    except TypeError as error:
        raise ValueError(f"a checkpoint's extra values must fit json: {error}") from None
    if layout.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed while saving
        aside.mkdir(parents=True)
    barrier(f"saving {final.name}")
    tensors = checkpoint_tensors(model, layout, optimizer, outer_optimizer)
    storage(dcp.save, tensors, aside, layout)
    if layout.rank == 0:
        finish_checkpoint(aside, final, meta)
    barrier(f"saving {final.name}")


def finish_checkpoint(aside, final, meta):
    """meta.json with every file's size, then the new name, then away with the old ones."""
    import torch.distributed.checkpoint as dcp

    places = dcp.FileSystemReader(aside).read_metadata().storage_data.values()
    missing = {p.relative_path for p in places if not (aside / p.relative_path).exists()}
    if missing:
        raise OSError(
            f"{aside} lacks {', '.join(sorted(missing))}, which other processes wrote; "
            "checkpoints need a directory that all machines share"
        )
    meta["files"] = {file.name: file.stat().st_size for file in sorted(aside.iterdir())}
    (aside / "meta.json").write_text(json.dumps(meta, indent=1))
    discard(final)  # only where a run went on from an earlier one
    os.replace(aside, final)
    there = checkpoints(final.parent)
    at = there.index(final)  # what is newer this run has gone back behind
    for path in there[:at] + there[at + KEEP :]:
        discard(path)


def discard(path):
    """Remove a checkpoint; its name goes first, so that no half of one ever bears it."""
    old = path.with_suffix(".old")
    if old.exists():  # of a run that was killed here
        shutil.rmtree(old)
    if path.exists():
        shutil.rmtree(path.rename(old))


def checkpoints(directory):
    """The checkpoints in a directory, the newest first."""
    found = [p for p in Path(directory).glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


@torch.no_grad()
def load(directory, model, optimizer=None, outer_optimizer=None, *, previous=False):
    """Go on from the newest checkpoint of a directory. Collective; returns step and extra, a dict.

    The model has to be converted as the one that was saved, by any number of processes.

    Args:
        previous: if the newest is not whole, take the one before it, with a warning.
    Raises: ValueError, nothing changed, for a checkpoint that is not whole or of another model;
        FileNotFoundError if there is none.
    """
    import torch.distributed.checkpoint as dcp

    layout = run_layout(model, "load")
    path, meta = newest(directory, previous)
    agree(checkpoint=path.name)
    ours = about(model)
    for name in meta["about"] | ours:
        if (theirs := meta["about"].get(name)) != (mine := ours.get(name)):
            raise ValueError(f"{path} was saved with {name} = {theirs}, but this run has {mine}")
    given = optimizers(model, optimizer, outer_optimizer)
    for (mine, _), saved in zip(given, meta["optimizers"], strict=True):
        check_optimizer(path, mine, saved)
    for (mine, names), saved in zip(given, meta["optimizers"], strict=True):
        revive(mine, names, saved)
    tensors = checkpoint_tensors(model, layout, optimizer, outer_optimizer)
    storage(dcp.load, tensors, path, layout)
    for m in merged_tensors(model):
        for piece in m.pieces:
            m.rows[piece] = encode(m.gathered(piece), m.base)
    for name in ("merges", "left_out", "bytes_sent"):
        setattr(layout, name, meta[name])
    for m in model.modules():
        if isinstance(m, HeadDropout):
            m.calls = meta["dropout"][m.name]
    return {"step": meta["step"], **meta["extra"]}


def newest(directory, previous=False):
    """(path, meta.json) of the newest checkpoint, or of the newest whole one if `previous`."""
    found = checkpoints(directory)
    if not found:
        raise FileNotFoundError(f"{directory} holds no checkpoint (step_...); train from the start")
    for path in found if previous else found[:1]:
        if not (reason := damage(path)):
            return path, json.loads((path / "meta.json").read_text())
        if previous and path != found[-1]:
            warnings.warn(f"{path} is not whole ({reason}); trying the one before it", stacklevel=3)
    raise ValueError(
        f"{path} is not whole ({reason}); "
        + ("there is no other" if previous else "previous=True takes the one before it")
    )


def damage(path):
    """What is missing from a checkpoint, in words; "" if nothing is."""
    try:
        files = json.loads((path / "meta.json").read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "meta.json is missing or cut short"
    for name, size in files.items():
        there = (path / name).stat().st_size if (path / name).exists() else 0
        if there != size:
            return f"{name} has {there} of {size} bytes"
    return ""


def run_layout(model, what):
    """The layout of a converted model, with no merge in flight; for a plain one its processes."""
    layout = layout_of(model) if merged_tensors(model) else Layout(processes()[1])
    check_idle(layout, what)
    return layout


def about(model):
    """What two models must have in common for one to go on where the other stopped, in words."""
    words, merged = {}, merged_tensors(model)
    if merged:
        words |= {n: getattr(layout_of(model), n) for n in ("heads", "parallel", "seed")}
    for m in merged:
        low_rank = isinstance(m, MultiheadLoRALinear)
        rank = f", r {m.r}, scaling {m.scaling:g}, base {m.base}" if low_rank else ", copied"
        words[m.plain] = f"{tuple(m.shape)} {m.dtype}{rank}"
    ours = [m for m in model.modules() if isinstance(m, (Merged, PerHead))]
    ours = {id(t) for m in ours for t in (*m.parameters(), *m.buffers())}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if torch.is_tensor(tensor) and id(tensor) not in ours:
            words[f"the shape of {name.replace('_orig_mod.', '')}"] = str(tuple(tensor.shape))
    words |= {m.name: "dropout" for m in model.modules() if isinstance(m, HeadDropout)}
    return words


def optimizers(model, optimizer, outer_optimizer):
    """(optimizer or None, {id of a parameter: its name}) of the inner and the outer optimizer."""
    names = {id(p): n.replace("_orig_mod.", "") for n, p in model.named_parameters()}
    parts = outer_parts(model, outer_optimizer) or {}
    outer = {id(p): f"{m.plain}/{start // PIECE}" for (m, start), p in parts.items()}
    for group in optimizer.param_groups if optimizer else ():
        if not all(id(p) in names for p in group["params"]):
            raise ValueError("the optimizer holds parameters that are not this model's")
    return (optimizer, names), (outer_optimizer, outer)


def describe(optimizer, names):
    """An optimizer's numbers, as json: groups, and for each parameter's state what it is."""
    if optimizer is None:
        return None
    states = {}
    for p, state in optimizer.state.items():
        if not p.numel():  # an outer parameter of which this process has no rows
            continue
        states[names[id(p)]] = words = {}
        for key, value in state.items():
            words[key] = value
            if torch.is_tensor(value) and value.shape == p.shape:
                words[key] = "tensor"
            elif torch.is_tensor(value):
                if value.dim():
                    raise ValueError(
                        f"the optimizer's {key} of {names[id(p)]} is {tuple(value.shape)}; only "
                        "numbers and tensors of the parameter's shape can be given to other heads"
                    )
                words[key] = [value.item(), str(value.dtype).removeprefix("torch.")]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    groups = [{k: float(v) if torch.is_tensor(v) else v for k, v in g.items()} for g in groups]
    return dict(kind=type(optimizer).__name__, groups=groups, states=states)


def check_optimizer(path, optimizer, saved):
    """The optimizer that is to be loaded must be one like that which was saved."""
    if optimizer is None:
        return
    kind, groups = type(optimizer).__name__, len(optimizer.param_groups)
    if saved is None or (saved["kind"], len(saved["groups"])) != (kind, groups):
        theirs = f"{saved['kind']} of {len(saved['groups'])} groups" if saved else "none"
        raise ValueError(f"{path} was saved with optimizer {theirs}, this is {kind} of {groups}")


def revive(optimizer, names, saved):
    """Groups and numbers as they were saved, and tensors to read the rest into."""
    if optimizer is None:
        return
    state, places = optimizer.state_dict(), {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            places[len(places)] = {}
            for key, word in saved["states"].get(names.get(id(p)), {}).items():
                if word == "tensor":
                    word = torch.zeros_like(p)
                elif isinstance(word, list):
                    word = torch.tensor(word[0], dtype=getattr(torch, word[1]))
                places[len(places) - 1][key] = word
    state["state"] = {k: entry for k, entry in places.items() if entry}
    for group, words in zip(state["param_groups"], saved["groups"], strict=True):
        for key, word in words.items():
            group[key] = tuple(word) if isinstance(word, list) else word
    optimizer.load_state_dict(state)


def checkpoint_tensors(model, layout, optimizer, outer_optimizer):
    """key -> tensor, views into the run. A head's are keyed by its number, so that any process can
    read any head; parts of the master are DTensors, which know their place in the whole.
    """
    heads, whole, sharded = {}, {}, {}
    for prefix, module in model.named_modules():
        stacked = heads if isinstance(module, (Merged, PerHead)) else whole
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            exact = isinstance(module, Merged) and name in ("rows", "master")
            if tensor is None or exact or name in module._non_persistent_buffers_set:
                continue
            full = f"{prefix}.{name}" if prefix else name
            stacked[full.replace("_orig_mod.", "")] = tensor.detach()
    (_, names), _ = optimizers(model, optimizer, None)
    for p, state in optimizer.state.items() if optimizer else ():
        for key, value in state.items():
            if torch.is_tensor(value) and value.shape == p.shape:
                kind = heads if names[id(p)] in heads else whole
                kind[f"{names[id(p)]}/{key}"] = value
    outer = outer_parts(model, outer_optimizer) or {}
    for m in merged_tensors(model):
        for piece in m.pieces:
            key = f"{m.plain}/{piece.start // PIECE}"
            sharded[key] = m.master_part(piece), piece
            p = outer.get((m, piece.start))
            for name, value in outer_optimizer.state[p].items() if p is not None else ():
                if torch.is_tensor(value) and value.dim():
                    sharded[f"{key}/{name}"] = value, piece
    first = layout.rank * layout.local
    tensors = {f"whole/{key}": tensor for key, tensor in whole.items()}
    for key, tensor in heads.items():
        tensors |= {f"head {first + h}/{key}": tensor[h] for h in range(layout.local)}
    return tensors | {f"master/{key}": t for key, t in distribute(sharded, layout).items()}


def distribute(sharded, layout):
    """key -> (this process's rows, piece) as DTensors; as they are on one process."""
    if layout.world == 1 or not sharded:
        return {key: part for key, (part, _) in sharded.items()}
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    device = next(iter(sharded.values()))[0].device.type
    mesh = init_device_mesh(device, (layout.world,))
    return {
        key: DTensor.from_local(
            part,
            mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size((piece.stop - piece.start, BLOCK)),
            stride=(BLOCK, 1),
        )
        for key, (part, piece) in sharded.items()
    }


def storage(call, tensors, path, layout):
    """torch.distributed.checkpoint's save or load, its errors as ProcessLost or OSError."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        with collective(f"{call.__name__} of {path}"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # one process is what we want
            call(tensors, checkpoint_id=path, no_dist=layout.world == 1)
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"{call.__name__} of {path} failed on process {rank}: {reason}") from error


def barrier(what):
    """All processes wait here for each other; nothing on one."""
    if processes()[1] > 1:
        with collective(what):
            dist.barrier()


# ------------------------------------------------------------------------------------------------
# 10 export and counts
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def merged_state_dict(model, exact=True):
    """The merged model under the plain model's names, from the exact master. Collective.

    Loads strictly into the model as it was before convert. What heads learnt since the last merge
    is not in it: merge first.

    Args:
        exact: False: W as the forward pass sees it, rounded where the base rounds. Heads learnt
            beside the rounding, which in 4 bits tests better than what it was rounded from.
    """
    layout, tensors = layout_of(model), {}
    check_idle(layout, "export")
    for name, tensor in model.state_dict().items():  # what convert left where it was
        name = name if name in layout.names else name.replace("_orig_mod.", "")
        if name in layout.names:
            tensors[name] = tensor.detach().clone()
    for m in model.modules():
        if isinstance(m, Merged):
            tensors[m.plain] = m.exact() if exact else m.dense().clone()
        elif isinstance(m, PerHead):  # whole-number buffers: equal for all heads
            tensors |= {m.prefix + n: b[0].clone() for n, b in m.named_buffers(recurse=False)}
    return {name: tensors[name] for name in layout.names}


HELD = {  # what a tensor's name says of it; the rest of what heads own are copies
    "rows": "forward",
    "master": "master",
    "lora_A": "factors",
    "lora_B": "factors",
    "merged_A": "old factors",
    "merged_B": "old factors",
}


def cost_report(model, optimizer=None, *, outer_optimizer=None, merge_every=1, wire="fp32",
                workers=None):
    """Bytes that one of `workers` processes (default: those running) holds and sends.

    Returns {"held": by kind, "held_dense": by kind, "sent": by kind}.
    held: what training keeps from step to step, and the gradients; "all" is the sum. On top come
        activations, no more than a dense model's; one layer's W, formed and for a quantized base
        decoded too, while it is multiplied with; and what a merge in flight keeps until wait().
    held_dense: the same for data parallel AdamW, 16 bytes for every trained parameter in fp32.
    sent: of one merge, for each row of 64 weights its "deltas" (all-to-all; 256 bytes in fp32,
        128 in bf16, 36 in nf4) and its "forward" format (all-gather), each to P - 1 others, and
        one byte a head that says whether it is sound; "merge" is their sum, "step" a step's share
        of it where every merge_every steps are merged; "dense" a step of data parallel training,
        an fp32 all-reduce of every trained parameter on a ring.

    An optimizer counts with the state of its first step, if that is numbers and tensors of the
    parameter's shape, and as one for all parameters, with its first group's options. Where
    processes hold unequal shares, process 0 has the largest, and is meant.
    """
    layout, P = layout_of(model), workers or processes()[1]
    if P < 1 or layout.heads % P:
        raise ValueError(f"{layout.heads} heads do not spread over workers={P}; use a divisor")
    owned, item = census(model), merged_tensors(model)[0].dtype.itemsize
    trained = sum(owned["low-rank"].values()) + sum(owned["copies"].values())
    held = bytes_held(model, optimizer, outer_optimizer, P)
    dense = dict(weights=item * trained, gradients=item * trained, optimizer=2 * item * trained)
    sent = dict(deltas=0, forward=0, heads=layout.heads // P * (P - 1))
    for m in merged_tensors(model):
        rows, row = sum(m.share(k, P) for k in m.pieces), torch.zeros(1, BLOCK, dtype=m.dtype)
        sent["deltas"] += rows * encode(row, wire).nbytes * (P - 1)
        sent["forward"] += rows * m.rows[0].nbytes * (P - 1)
    held["all"], dense["all"], sent["merge"] = (sum(d.values()) for d in (held, dense, sent))
    sent |= dict(step=sent["merge"] / merge_every, dense=8 * trained * (P - 1) / P)
    return dict(held=held, held_dense=dense, sent=sent)


def bytes_held(model, optimizer, outer_optimizer, P):
    """kind -> bytes on process 0 of P."""
    held = dict.fromkeys([*HELD.values(), "copies", "gradients", "optimizer", "outer", "frozen"], 0)
    state, outer_state = state_size(optimizer), state_size(outer_optimizer)
    for m in model.modules():
        for name, tensor in (*m._parameters.items(), *m._buffers.items()):
            kind = HELD.get(name, "copies") if isinstance(m, (Merged, PerHead)) else "frozen"
            if tensor is None or kind == "master":
                continue
            one_for_all = kind in ("forward", "frozen")  # the others have one for each head here
            numel = tensor.numel() if one_for_all else tensor.numel() * processes()[1] // P
            held[kind] += numel * tensor.itemsize
            if tensor.requires_grad:
                held["gradients"] += numel * tensor.itemsize
                held["optimizer"] += numel * state[0] + state[1]
        if isinstance(m, Merged):
            part = sum(m.share(piece, P) for piece in m.pieces) * BLOCK  # of the master
            held["master"] += part * m.dtype.itemsize if m.master is not None else 0
            held["outer"] += part * outer_state[0] + len(m.pieces) * outer_state[1]
    return held


def state_size(optimizer):
    """Bytes that an optimizer's first step leaves: (for each element, for each parameter)."""
    if optimizer is None:
        return 0, 0
    like = optimizer.param_groups[0]["params"][0]
    trial = torch.zeros(2, 3, dtype=like.dtype, device=like.device)
    trial.grad = torch.zeros_like(trial)
    other = copy.copy(optimizer)
    other.param_groups = [{**optimizer.param_groups[0], "params": [trial]}]
    other.state = defaultdict(dict)
    other.step()
    state = [value for value in other.state[trial].values() if torch.is_tensor(value)]
    for_each = sum(value.itemsize for value in state if value.shape == trial.shape)
    return for_each, sum(value.nbytes for value in state if value.shape != trial.shape)


# ------------------------------------------------------------------------------------------------
# 11 how far apart heads are
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def subspace_report(model):
    """How far apart the heads are, and how many directions the update has. Collective.

    Returns {layer's weight: {"cosine", "grassmann", "effective_rank"}} of what the factors say now
    (without reset: of everything learnt since the start).
    cosine: mean over pairs of heads of <B_m A_m, B_n A_n> / (|B_m A_m| |B_n A_n|); NaN for one head
        or where a head's B is zero.
    grassmann: mean over pairs of sqrt(sum_j theta_j^2), theta_j the angles between the row spaces
        of A_m and A_n, as a share of sqrt(r) pi / 2, its largest value (reached only where
        2 r <= in; always 0 where r = in); NaN for one head.
    effective_rank: exp(entropy of p), p the singular values of sum_n B_n A_n divided by their sum;
        from 1 to min(in, out, N r). NaN where it is zero.
    """
    layout, report = layout_of(model), {}
    upper = torch.ones(layout.heads, layout.heads).triu(1).bool()  # each pair once
    for m in merged_tensors(model):
        if not isinstance(m, MultiheadLoRALinear):
            continue
        factors = m.lora_A.detach(), m.lora_B.detach()
        A, B = (all_gather(x, layout).flatten(0, 1).double() for x in factors)  # of all heads
        # <B_m A_m, B_n A_n> = sum of (B_m^T B_n) * (A_m A_n^T): r x r, never out x in
        inner = (pairs(B.mT) * pairs(A)).sum((2, 3))  # (N, N)
        norms = inner.diagonal().sqrt()
        Q = torch.linalg.qr(A.mT).Q.mT  # (N, r, in), orthonormal rows
        theta = torch.linalg.svdvals(pairs(Q)).clamp(max=1).acos()  # (N, N, r)
        distance = theta.square().sum(2).sqrt() / (math.sqrt(m.r) * math.pi / 2)
        (all_A,), (all_B,) = side_by_side(A, B)
        p = torch.linalg.svdvals(all_B @ all_A)
        p = p / p.sum()
        report[m.plain] = dict(
            cosine=(inner / norms.outer(norms))[upper].mean().item(),
            grassmann=distance[upper].mean().item(),
            effective_rank=torch.special.entr(p).sum().exp().item(),
        )
    return report


def pairs(x):
    """x (N, r, k) -> (N, N, r, r), every x_m x_n^T."""
    return x.unsqueeze(1) @ x.mT
