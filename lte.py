"""LoRA-the-Explorer (LTE): train a network from scratch with N parallel low-rank heads.

A head is a copy of the network in which every weight matrix W is frozen, shared with all other
heads, and perhaps stored in 4 bits. What a head trains beside W is a LoRA pair (A, B), and its own
biases, LayerNorms and embeddings. N heads learn alone, each on its own data, for T steps; then the
mean of what they learnt is merged into W, and they go on. Nothing is sent between merges, and the
merged update can reach rank N r. One process or many: on a CPU the result has the same bits.

    given W, T, s = lora_alpha / r;  A_n semi-orthogonal, B_n = 0,  A'_n = A_n, B'_n = B_n
    repeat
        for each head n = 1 .. N, alone:
            for T steps:  y = W x + s (B_n A_n - B'_n A'_n) x;  optimizer step on (A_n, B_n)
        W   <- W + (1/N) sum_n s (B_n A_n - B'_n A'_n)                    merge
        A'_n <- A_n,  B'_n <- B_n                                         what is merged already

The primed factors are what makes "no reset" exact: a merge moves a head's work into W, so the head
must stop adding it a second time. Factors and optimizer state just go on.

Use: three lines more than plain training.
    model = lte.LTE(ViT(), heads=8, r=32, lora_alpha=256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for step, (x, y) in enumerate(batches, 1):            # head n gets the n-th part of x
        F.cross_entropy(model(x), y).backward()
        lte.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % T == 0:
            lte.merge(model)
    torch.save(lte.merged_state_dict(model), "model.pt")  # loads into a plain ViT()

Glossary: symbol, name in the code, meaning
    N, n, h model.total     heads of all processes; one's number; its place in `model.heads` here
    P, T    model.world     processes, `model.rank` is this one; steps between merges, by the caller
    r, s    r, scaling      rank of one head's factors; s = lora_alpha / r, without 1/N
    A, B    lora.A, lora.B  (r, in), (out, r), of one head; A', B' as they were at the last merge
    U, V    U, V            (out, 2r), (2r, in): U V = B A - B' A'; s U V is a head's delta
    W       Base            what all heads share; a "learner" is what one head has in its place
    M, i, o                 tokens of one head, inputs and outputs of a layer

Source: Huh, Cheung, Bernstein, Isola, Agrawal, "Training Neural Networks from Scratch with Parallel
Low-Rank Adapters", arXiv 2402.16828. What differs from the paper and from the authors' public code:
    - A is scaled by sqrt(in / r) as in their code; the paper writes the inverse (section 2)
    - multi-head LoRA has the paper's 1/N, which their code leaves out
    - biases, LayerNorms, embeddings and class tokens train; theirs freezes or refuses them
    - the base may be quantized, and merges go to an exact master, so that nothing is rounded away
"""

import atexit
import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import shutil
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from itertools import accumulate, groupby
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

__version__ = "0.2.0"

# ------------------------------------------------------------------------------------------------
# 1 processes: sums in a fixed order, collectives, seeds


def processes():
    """(this process's rank, how many there are): (0, 1) where no group was started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RuntimeError("torchrun's processes have not met: call init_process_group() first")
    return 0, 1


def tree_sum(term, first, count):
    """term(first) + ... + term(first + count - 1), in a fixed binary tree, into the first.

    With 1, 2, 4 ... heads a process adds a subtree: the same bits as one process with all heads.
    """
    if count == 1:
        return term(first)
    left = 1 << (count - 1).bit_length() - 1  # the largest power of two below count
    return tree_sum(term, first, left).add_(tree_sum(term, first + left, count - left))


class ProcessLost(RuntimeError):
    """Another process ended, failed, or let the others wait longer than the group's timeout."""


def collective(call, *args, group=None):
    """Runs it, if there are several processes; one that is gone or hangs becomes a ProcessLost."""
    try:
        if processes()[1] > 1:
            call(*args, group=group)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ProcessLost(f"another process is gone, go on from a checkpoint: {error}") from error


@lru_cache(maxsize=1)
def second_group(default, device):
    """With the default group's timeout; what it sends mixes with nothing else. Collective."""
    return dist.new_group(timeout=default._get_backend(device).options._timeout)


@atexit.register
def leave():
    """Groups that outlive Python's threads may abort the process."""
    second_group.cache_clear()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def all_gather(mine, group=None):
    """(...) of every process -> (P, ...); alone it is a view."""
    everyone = mine.expand(processes()[1], *mine.shape).contiguous()
    collective(dist.all_gather, list(everyone), mine.contiguous(), group=group)
    return everyone


def from_process_0(tensor):
    """A contiguous copy of process 0's tensor (gloo would write past a strided one). Collective."""
    own = tensor.detach().clone(memory_format=torch.contiguous_format)
    collective(dist.broadcast, own, 0)
    return own


def agree(**values):
    """Raises on all processes, unless all were started alike. Waits for them. Collective."""
    everyone = [values] * processes()[1]
    collective(dist.all_gather_object, everyone, values)
    for rank, other in enumerate(everyone):
        if different := sorted(other.items() ^ everyone[0].items(), key=str):
            raise ValueError(f"processes 0 and {rank} differ in {different}; start all alike")


def seed_of(*key):
    """A 63-bit seed that depends on `key` alone: not on the process, nor on what ran before."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(devices, *key):
    """Draws inside depend on `key` alone, and those outside not on what is drawn inside."""
    cuda = [device.index for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(cuda):
        # The generators themselves: torch.manual_seed takes a hundred times as long.
        for g in torch.default_generator, *(torch.cuda.default_generators[i] for i in cuda):
            g.manual_seed(seed_of(*key))
        yield


# ------------------------------------------------------------------------------------------------
# 2 factors: A's initialisation, and the update as one product

INITS = ("orthogonal", "orthogonal_paper", "kaiming", "xavier")


def init_A(shape, init, *key, dtype=torch.float32):
    """One head's A (r, in), drawn from `key` = (seed, head, weight's name, merge).

    "orthogonal": orthonormal rows times sqrt(in / r), so that an entry's mean square is 1 / r at
    every width. The paper writes sqrt(r / in) ("orthogonal_paper"), but its rates fit the code.
    """
    r, i = shape
    A, g = torch.empty(shape, dtype=dtype), torch.Generator().manual_seed(seed_of(*key))
    if init == "kaiming":
        return nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=g)
    if init == "xavier":
        return nn.init.xavier_uniform_(A, generator=g)
    gain = math.sqrt(i / r) if init == "orthogonal" else math.sqrt(r / i)
    return nn.init.orthogonal_(A, gain=gain, generator=g)


def factor_update(A, B, merged_A, merged_B):
    """U (out, 2r), V (2r, in) with U V = B A - B' A'.

        U = [B - B', B'],  V = [A; A - A']:   U V = (B - B') A + B' (A - A') = B A - B' A'

    The plain difference would cancel: right after a merge it is rounding noise. This form is zero
    exactly where nothing changed, and keeps small progress to 1e-7.
    """
    return torch.cat([B - merged_B, merged_B], 1), torch.cat([A, A - merged_A])


# ------------------------------------------------------------------------------------------------
# 3 base: what all heads share, in rows of 64 weights, and its exact master

BASES = ("fp32", "bf16", "int8", "nf4", "fp4")
BLOCK = 64  # weights a row; a row carries its own scale, so that any slice of rows stands alone


def check_choice(name, value, choices):
    """Raises ValueError unless value is one of choices, ImportError where it needs a package."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: use one of {', '.join(choices)}")
    if value in ("int8", "nf4", "fp4") and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"{name}={value!r} needs bitsandbytes: pip install bitsandbytes")


def encode(x, format):
    """(rows, 64) floats -> (rows, bytes): 128 bytes bf16, 68 int8, 36 nf4 or fp4; fp32 as it is."""
    if format == "fp32":
        return x
    if format == "bf16":
        return x.bfloat16().view(torch.uint8)
    bnb, x = importlib.import_module("bitsandbytes.functional"), x.float().contiguous()
    if x.is_cuda:  # it quantizes on the default stream, whatever stream is current
        torch.cuda.current_stream(x.device).synchronize()
    four_bits = partial(bnb.quantize_4bit, quant_type=format)
    quantize = bnb.quantize_blockwise if format == "int8" else four_bits
    codes, state = quantize(x, blocksize=BLOCK)
    if x.is_cuda:
        torch.cuda.current_stream(x.device).wait_stream(torch.cuda.default_stream(x.device))
    return torch.cat([codes.view(len(x), -1), state.absmax.view(-1, 1).view(torch.uint8)], 1)


def decode(rows, format, dtype):
    """(rows, bytes) -> (rows, 64) in `dtype`: what the forward pass multiplies with."""
    if format == "fp32":
        return rows
    if format == "bf16":
        return rows.view(torch.bfloat16).to(dtype)
    bnb = importlib.import_module("bitsandbytes.functional")
    codes, absmax = rows[:, :-4].contiguous(), rows[:, -4:].contiguous().view(torch.float32)
    if format == "int8":
        return bnb.dequantize_blockwise(codes, absmax=absmax.flatten(), blocksize=BLOCK).to(dtype)
    like = dict(shape=(len(rows), BLOCK), dtype=torch.float32)
    state = bnb.QuantState(absmax.flatten(), blocksize=BLOCK, quant_type=format, **like)
    return bnb.dequantize_4bit(codes.view(-1, 1), state).to(dtype)


class Base(nn.Module):
    """A tensor of the plain model as all heads share it: no gradient touches it, merges add to it.

    `rows` is the whole tensor in its forward format, equal on all processes, with zeros at the end
    so that each of the P processes has a `share` to look after. Merges go to the exact value of the
    share, the `shard` (a `master` where rows round it): nothing is lost however coarse the format.
    """

    def __init__(self, name, tensor, kind, format):
        super().__init__()
        self.name, self.low_rank, self.statistic = name, kind == "low-rank", kind == "statistic"
        self.format = format if self.low_rank else "fp32"
        self.shape, self.numel = tensor.shape, tensor.numel()
        self.rank, self.world = processes()
        self.share = math.ceil(self.numel / BLOCK / self.world)
        self.mine = slice(self.rank * self.share, (self.rank + 1) * self.share)  # of the rows
        self.learners = []  # what each head here has in its place: a LowRank, or a Copy
        self.outer = None  # the shard, as an outer optimizer's parameter (section 6)
        rows = self.to_rows(from_process_0(tensor))
        self.register_buffer("rows", encode(rows, self.format))
        shard = rows[self.mine].clone() if self.world > 1 else rows
        self.register_buffer("master", None if self.format == "fp32" else shard)

    @property
    def shard(self):
        """(share, 64): this process's share, exact."""
        return self.rows[self.mine] if self.master is None else self.master

    def to_rows(self, tensor):
        """(shape) -> (P share, 64), zeros at the end."""
        missing, flat = self.world * self.share * BLOCK - self.numel, tensor.flatten()
        return (F.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)

    def to_tensor(self, rows):
        """(..., 64) -> (shape), the zeros dropped."""
        return rows.flatten()[: self.numel].view(self.shape)

    def whole(self, x):
        """(share, 64) of every process -> (shape); a plain number stays. Collective."""
        return self.to_tensor(all_gather(x)) if torch.is_tensor(x) and x.dim() else x

    def share_of(self, x):
        """(shape) -> (share, 64), what this process looks after; a plain number stays."""
        return self.to_rows(x)[self.mine] if torch.is_tensor(x) and x.dim() else x

    def dense(self):
        """The tensor as the forward pass sees it; a view of the rows for "fp32"."""
        return self.to_tensor(decode(self.rows, self.format, self.shard.dtype))

    weight = property(lambda self: self.dense().clone())  # the merged model's; code may write it

    def exact(self):
        """The tensor without rounding. Collective for a quantized base."""
        return self.dense() if self.master is None else self.whole(self.master)


# ------------------------------------------------------------------------------------------------
# 4 what a head trains: factors beside a weight, copies of everything else


class Product(torch.autograd.Function):
    """y = x (W + s U V)^T + bias, for M tokens x (M, i) of one head -> y (M, o).

        dx = g (W + s U V),    dB = s g^T (x A^T),    dA = s (g B)^T x,    dbias = g^T 1

    W has no gradient: two of three products are left. Only x is kept, W + s U V formed twice.
    """

    @staticmethod
    def formed(tokens, W):
        """Forming W + s U V takes 2 r o i multiply-adds, (x V^T) U^T takes 2 r M (o + i)."""
        return tokens * sum(W.shape) > W.numel()

    @staticmethod
    def operands(x, A, B, lora):
        """(W + s U V, None, None) if that is formed, else (W, s U, V), in the dtype of x."""
        with torch.autocast(x.device.type, enabled=False):
            W, (U, V) = lora.base.dense(), factor_update(A, B, lora.merged_A, lora.merged_B)
            if Product.formed(len(x), W):
                return torch.addmm(W, U, V, alpha=lora.scaling).to(x.dtype), None, None
            return W.to(x.dtype), (lora.scaling * U).to(x.dtype), V.to(x.dtype)

    @staticmethod
    def forward(ctx, x, bias, A, B, lora):
        # Of these only x is new; of what a merge changes backward then sees that it was changed.
        ctx.save_for_backward(x, A, B, lora.merged_A, lora.merged_B, lora.base.rows)
        ctx.lora = lora
        W, U, V = Product.operands(x, A, B, lora)
        if U is None:
            return F.linear(x, W, None if bias is None else bias.to(x.dtype))
        # Rounded once. (Added to an x W^T in bfloat16, half of an update of 1e-3 of W is lost.)
        y = torch.addmm(x @ V.mT @ U.mT, x, W.mT)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx, g):
        (x, A, B, *_), lora, s = ctx.saved_tensors, ctx.lora, ctx.lora.scaling
        dB = ((x @ (s * A).to(x.dtype).mT).mT @ g).mT  # (g^T h)^T = h^T g, the faster way round
        dA = (g @ (s * B).to(x.dtype)).mT @ x
        dbias = g.sum(0, dtype=A.dtype) if ctx.needs_input_grad[1] else None
        dx = None
        if ctx.needs_input_grad[0]:
            W, U, V = Product.operands(g, A, B, lora)
            dx = g @ W if U is None else torch.addmm(g @ U @ V, g, W)
        return dx, dbias, dA, dB, None


class LowRank(nn.Module):
    """What one head trains beside a weight W (out, ...): factors A (r, in), B (out, r).

    Multi-head LoRA is one head whose factors are those of N heads side by side, with s / N, since
    sum_n B_n A_n = [B_1 .. B_N] [A_1; ..; A_N]. `numbers` says which heads these are.
    """

    def __init__(self, base, numbers, *, r, lora_alpha, init, seed):
        super().__init__()
        self.__dict__["base"] = base  # not a child: all heads share it
        out, inputs = base.shape[0], base.numel // base.shape[0]
        self.shape = min(r, out, inputs), inputs  # of one head's A
        self.numbers, self.init, self.seed = numbers, init, seed
        self.scaling = lora_alpha / r / len(numbers)
        A = self.draw_A(merges=0)
        self.A, self.B = nn.Parameter(A), nn.Parameter(A.new_zeros(out, len(A)))
        self.register_buffer("merged_A", A.clone())
        self.register_buffer("merged_B", torch.zeros_like(self.B))

    def draw_A(self, merges):
        """(r, in), or (N r, in): the same whichever process draws it."""
        keys = [(self.seed, n, self.base.name, merges) for n in self.numbers]
        A = [init_A(self.shape, self.init, *key, dtype=self.base.shard.dtype) for key in keys]
        return torch.cat(A).to(self.base.rows.device)

    @property
    def weight(self):
        """W + s U V, for code that reads the weight instead of calling a layer."""
        return self.base.dense() + self.delta((self.A, self.B))

    # A merge asks a learner what it holds and what that adds, then to go on from it, or restart.

    def learnt(self):
        return self.A.detach(), self.B.detach()

    def delta(self, learnt):
        with torch.autocast(self.A.device.type, enabled=False):  # in full precision
            U, V = factor_update(*learnt, self.merged_A, self.merged_B)
            return (self.scaling * U @ V).view(self.base.shape)

    def install(self, learnt):
        self.merged_A.copy_(learnt[0])
        self.merged_B.copy_(learnt[1])

    def restart(self):
        self.A.copy_(self.merged_A)
        self.B.copy_(self.merged_B)

    def reset(self, which, merges, states):
        """B <- 0, and for "AB" a new A; the optimizer forgets all it knew of them."""
        self.B.zero_()
        states.pop(self.B, None)
        if which == "AB":
            self.A.copy_(self.draw_A(merges))
            states.pop(self.A, None)
        self.install(self.learnt())


class Copy:
    """What one head trains in place of any other tensor; statistics become their plain mean."""

    def __init__(self, base, owner, attribute):
        self.base, self.owner, self.attribute = base, owner, attribute

    def learnt(self):
        return (getattr(self.owner, self.attribute).detach(),)

    def delta(self, learnt):
        return learnt[0].double() if self.base.statistic else learnt[0] - self.base.dense()

    def install(self, learnt):
        """On from the mean, plus what was learnt meanwhile (a variance could turn negative)."""
        if self.base.statistic:
            return self.restart()
        self.learnt()[0].sub_(learnt[0]).add_(self.base.dense())

    def restart(self):
        self.learnt()[0].copy_(self.base.dense())


class MultiheadLoRALinear(nn.Linear):
    """nn.Linear in one head, made from it by `take_place`; the factors are its child `lora`."""

    def forward(self, x):
        lora, tokens = self.lora, x.reshape(-1, self.in_features)
        if torch.is_autocast_enabled(x.device.type):
            tokens = tokens.to(torch.get_autocast_dtype(x.device.type))
        elif x.dtype != lora.A.dtype:
            raise TypeError(f"{lora.base.name} is {lora.A.dtype}, not {x.dtype}; cast the input")
        y = Product.apply(tokens, self.bias, lora.A, lora.B, lora)
        return y.view(*x.shape[:-1], self.out_features)


def take_place(owner, attribute, source):
    """owner.attribute is from now on source.weight; a nn.Linear with factors multiplies as ours."""
    kind, child = type(owner), "lora" if attribute == "weight" else f"lora_{attribute}"
    del owner._parameters[attribute]
    if isinstance(source, LowRank):
        owner.add_module(child, source)
        kind = MultiheadLoRALinear if kind is nn.Linear else kind
    else:
        owner.__dict__[child] = source  # not a child: the Base that all share
    read = property(lambda self: getattr(self, child).weight)  # for code that does not call it
    owner.__class__ = type(kind.__name__, (kind,), {attribute: read})


# ------------------------------------------------------------------------------------------------
# 5 the model: N copies of a module that share its weights


def tensors_of(module):
    """Its parameters and dense buffers by name (sparse ones are constants, such as a graph's)."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: t for name, t in named if t.layout is torch.strided}


def kinds_of(module, low_rank):
    """What heads have of a parameter or saved buffer: {name: kind}. Raises if no copy can be right.

    "low-rank": factors beside it. "copy": a copy that trains. "statistic": a copy, averaged.
    "carried": a copy, the merged model has head 0's. "frozen": the one that all share.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"heads are copies of a nn.Module, not of a {type(module).__name__}")
    for name, part in module.named_modules():
        if isinstance(part, LTE) or isinstance(vars(part).get("forward"), types.FunctionType):
            raise TypeError(f"{name or 'the module'} is wrapped already, or has a new forward")
    kinds, saved = {}, [id(t) for t in module.state_dict(keep_vars=True).values()]
    tables, exact = (nn.Embedding, nn.EmbeddingBag), (torch.float32, torch.float64)
    for name, t in tensors_of(module).items():
        if nn.parameter.is_lazy(t) or t.is_meta:
            raise TypeError(f"{name} has no values yet; run the module on a batch first")
        if t.requires_grad and t.dtype not in exact:
            raise TypeError(f"{name} is {t.dtype}; give a float32 module, compute under autocast")
        owner = module.get_submodule(name.rpartition(".")[0])
        matrix = t.dim() > 1 and name.endswith("weight") and not isinstance(owner, tables)
        if matrix and hasattr(owner, "lora"):
            raise ValueError(f"the module of {name} has an attribute lora already; rename it")
        if t.requires_grad and t.numel():  # a tied weight has several names
            kinds[name] = "low-rank" if low_rank and matrix and saved.count(id(t)) < 2 else "copy"
        elif isinstance(t, nn.Parameter):
            kinds[name] = "frozen"
        elif id(t) in saved:  # a mask of -inf has no mean
            mean = t.dtype in exact and t.numel() and t.isfinite().all()
            kinds[name] = "statistic" if mean else "carried"
    if not {"low-rank", "copy"} & {*kinds.values()}:
        raise ValueError("the module has nothing to train: no parameter has requires_grad")
    return kinds


def scaled(x, factor):
    """A copy of x whose gradient is multiplied by `factor`."""
    x = x.clone()
    if x.requires_grad:
        x.register_hook(lambda g: g * factor)
    return x


def split(arguments, n):
    """(args, kwargs) of each of n heads, and their number of samples.

    Tensors are cut along their first dimension. In the caller's loss, a mean over all n parts, a
    head's own mean counts 1 / n: its gradient is multiplied by n where it enters the head's outputs
    (`join`), and by 1 / n where it leaves the head for the input.
    """
    if n == 1:
        return [arguments], None
    sizes = sorted({len(x) for x in tree_leaves(arguments) if torch.is_tensor(x) and x.dim()})
    if len(sizes) != 1 or sizes[0] % n:
        text = "give the batch first, a multiple of them, or run one head a process"
        raise ValueError(f"first dimensions {sizes} do not split over {n} heads here; {text}")

    def part(h, x):  # a copy, since a product's last bits may depend on where its operands lie
        return scaled(x.chunk(n)[h] if x.dim() else x, 1 / n) if torch.is_tensor(x) else x

    return [tree_map(partial(part, h), arguments) for h in range(n)], sizes[0] // n


def join(outputs, size):
    """The heads' outputs, `size` samples each, as one batch; losses, without dimension, as mean."""
    n = len(outputs)

    def whole(first, *others):
        alike = all(type(x) is type(first) for x in others)
        if alike and torch.is_tensor(first):
            parts = [scaled(x, n) for x in (first, *others)]
            if all(x.shape == () for x in parts) and first.is_floating_point():
                return torch.stack(parts).mean()
            if all(x.shape == (size, *first.shape[1:]) for x in parts):
                return torch.cat(parts)
        elif alike and dataclasses.is_dataclass(first):
            return dataclasses.replace(first, **join([vars(x) for x in (first, *others)], size))
        elif alike and all(x == first for x in others):
            return first
        text = f"{n} heads, {size} samples each, return {type(first).__name__}s that do not join"
        raise ValueError(f"{text}; return tensors with the batch first, or run one head a process")

    return tree_map(whole, *outputs) if n > 1 else outputs[0]


class LTE(nn.Module):
    """Wraps a module, as DistributedDataParallel does, for N heads to train. Collective.

    In training head n runs its own copy of the module on its part of the batch: this process's
    heads / P parts lie one after the other. In eval the merged model runs, on a batch of any size.
    The module may be pretrained: until the first step every head computes what it computes.

    Weight matrices (linear, attention, convolutions) get factors; whatever else trains is copied
    (biases, norms, embeddings, recurrent layers, tied weights), as are statistics (BatchNorm's).
    What it freezes stays frozen and shared. It may read its weights, not write them. Several heads
    in a process: tensors that go in or out have the batch first; what has no dimension is a loss.
    Checkpoint activations inside the module, not around this one: dropout counts its calls.

    Args:
        heads: N over all processes, a multiple of their number.
        r: rank of one head (1 or more). 0: no factors, every head trains a dense copy, local SGD.
        lora_alpha: s = lora_alpha / r. Default: 8 r.
        base: storage of W, one of BASES. Everything else stays exact.
        parallel: False: the paper's multi-head LoRA, all heads see all samples (one process).
        init: how A is drawn, one of INITS.
    Raises: ValueError, TypeError before anything is changed.
    """

    def __init__(
        self, plain, *, heads, r, lora_alpha=None, base="fp32", parallel=True, init=INITS[0], seed=0
    ):
        super().__init__()
        self.rank, self.world = processes()
        self.total, self.in_flight = heads, None  # a Merge not waited for
        self.merges = self.left_out = self.calls = self.bytes_sent = 0
        lora_alpha = 8 * r if lora_alpha is None else lora_alpha
        self.options = dict(r=r, lora_alpha=lora_alpha, init=init, seed=seed)
        check_choice("base", base, BASES)
        check_choice("init", init, INITS)
        if type(heads) is not int or heads < 1 or heads % self.world:
            raise ValueError(f"heads={heads!r}: use a multiple of {self.world}, the processes")
        if type(r) is not int or r < 0 or (r and not 0 < lora_alpha < math.inf):
            raise ValueError(f"r={r!r}, lora_alpha={lora_alpha!r}: use an integer r, alpha above 0")
        if not parallel and (self.world > 1 or r == 0):
            raise ValueError(f"parallel=False, r={r}, {self.world} processes: use one, and factors")
        self.kinds, tensors = kinds_of(plain, low_rank=r > 0), tensors_of(plain)
        self.about = dict(self.options, heads=heads, parallel=parallel, base=base)
        for name, kind in self.kinds.items():
            self.about[f"tensor {name}"] = f"{kind} {[*tensors[name].shape]} {tensors[name].dtype}"
        agree(version=__version__, **self.about)
        self.carried = [name for name, kind in self.kinds.items() if kind == "carried"]
        self.frozen, self.shared = {}, nn.ModuleList()
        for name, kind in self.kinds.items():
            if kind == "frozen":
                self.frozen[name] = nn.Parameter(from_process_0(tensors[name]), False)
            elif kind != "carried":
                self.shared.append(Base(name, tensors[name], kind, base))
        self.first = self.rank * heads // self.world  # the number of the first head here
        here = range(self.first, self.first + heads // self.world)
        blocks = [[n] for n in here] if parallel else [here]
        self.module = self.copy_of(plain).requires_grad_(False).eval()  # the merged model
        self.heads = nn.ModuleList(self.copy_of(plain, numbers) for numbers in blocks)
        self.training = plain.training
        if not plain.training:  # else parts that are in eval mode stay there
            self.heads.train()

    @torch.no_grad()
    def copy_of(self, plain, numbers=None):
        """A copy of the plain model, for heads `numbers` to train, or else the merged model."""
        held = tree_leaves([vars(part) for part in plain.modules()])  # activations, too
        memo = {id(x): x.detach().clone() for x in held if torch.is_tensor(x) and not x.is_leaf}
        for name, t in tensors_of(plain).items():
            if name in self.frozen:
                memo[id(t)] = self.frozen[name]  # shared
            elif self.kinds.get(name) == "low-rank":
                memo[id(t)] = nn.Parameter(torch.empty_like(t, device="meta"))
            elif not isinstance(t, nn.Parameter):
                memo[id(t)] = from_process_0(t)
        new = copy.deepcopy(plain, memo)  # what is in the memo counts as copied
        for base in self.shared:
            owner, _, attribute = base.name.rpartition(".")
            owner = new.get_submodule(owner)
            if base.low_rank:
                learner = LowRank(base, numbers, **self.options) if numbers else base
                take_place(owner, attribute, learner)
            else:
                learner = Copy(base, owner, attribute)
                learner.restart()  # process 0's
            if numbers:
                base.learners.append(learner)
        return new

    @torch.compiler.disable(recursive=False)  # the heads compile; what is around them changes
    def forward(self, *args, **kwargs):
        if not self.training:
            return self.module(*args, **kwargs)
        self.calls += 1
        devices = {base.rows.device for base in self.shared}
        parts, size = split((args, kwargs), len(self.heads))
        outputs = []
        for n, (head, (own, named)) in enumerate(zip(self.heads, parts, strict=True), self.first):
            with seeded(devices, self.options["seed"], "forward", self.calls, n):
                outputs.append(head(*own, **named))  # dropout's masks are the head's own
        return join(outputs, size)

    def train(self, mode=True):
        """eval() runs the merged model. Heads are for training alone, and stay as they are."""
        self.training = mode
        return self

    def _apply(self, fn, recurse=True):
        """.to(), .double() and the like."""
        wrapped(self, idle=True)
        if fn(torch.zeros(1)).dtype not in (torch.float32, torch.float64):
            raise TypeError("keep the model in float32; compute in bfloat16 under torch.autocast")
        if any(base.outer is not None for base in self.shared):
            raise RuntimeError("move the model first, then call lte.outer_parameters(model)")
        return super()._apply(fn, recurse)


def wrapped(model, idle=False):
    """The LTE model itself, also from under torch.compile; idle: with no merge in flight."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, LTE):
        raise TypeError(f"a {type(model).__name__} has no heads; wrap it: lte.LTE(module, ...)")
    if idle and model.in_flight is not None:
        raise RuntimeError("a merge is in flight; call its wait() first")
    if processes() != (model.rank, model.world):
        raise RuntimeError("the process group was started after lte.LTE(...); start it before")
    return model


# ------------------------------------------------------------------------------------------------
# 6 merge

BUCKET = 2**22, 2**16  # weights sent at a time on GPU, CPU: gloo sends long messages slowly


def part_of(shared, k, K):
    """The k-th of K groups of neighbours of about equal size: those whose middle lies in it."""
    ends = list(accumulate(base.numel for base in shared))
    middles = [end - base.numel / 2 for base, end in zip(shared, ends, strict=True)]
    return [b for b, middle in zip(shared, middles, strict=True) if int(middle * K / ends[-1]) == k]


def buckets(shared):
    """Groups of neighbours of one kind, a tensor at least; a group's deltas are sent together."""
    for _, group in groupby(shared, lambda b: (b.rows.device, b.shard.dtype, b.statistic)):
        group = list(group)
        K = math.ceil(sum(base.numel for base in group) / BUCKET[group[0].rows.is_cpu])
        yield from filter(None, (part_of(group, k, K) for k in range(K)))


def outer_parameters(model):
    """This process's shards, for an outer optimizer over all that trains."""
    trained = [base for base in wrapped(model).shared if not base.statistic]
    for base in trained:
        base.outer = base.shard.data
    return [base.outer for base in trained]


def check_optimizer(optimizer, parameters, every=False):
    """One of other parameters would do nothing, in silence; an outer one steps on every one."""
    groups = [] if optimizer is None else optimizer.param_groups
    held, parameters = {p for group in groups for p in group["params"]}, set(parameters)
    if held and (held.isdisjoint(parameters) or (every and held != parameters)):
        source = "lte.outer_parameters(model)" if every else "model.parameters()"
        raise ValueError(f"{type(optimizer).__name__} holds other parameters; make it of {source}")


class Merge:
    """One merge. From merge(async_op=True): under way until wait() has applied it.

    Between the two a head computes with W_old + s (B A - B'_old A'_old), from wait() on with
    W_new + s (B A - B'_sent A'_sent): what it learnt meanwhile stays its own, for the next merge.
    """

    def __init__(self, model, part, optimizer, reset, decay, wire, outer_optimizer):
        self.model, self.shared = model, part_of(model.shared, *part)
        self.states = {} if optimizer is None else optimizer.state
        self.reset, self.decay, self.outer_optimizer = reset, decay, outer_optimizer
        self.wire = wire if model.world > 1 else "fp32"  # nothing is sent, nothing rounded
        self.group, self.stream, self.device = None, None, model.shared[0].rows.device
        heads, self.threads = range(len(model.heads)), torch.get_num_threads()
        self.learnt = [{b: b.learners[h].learnt() for b in self.shared} for h in heads]  # live
        carried = map(model.heads[0].get_buffer, model.carried)
        status = [torch.stack([self.is_sound(h) for h in heads]), *carried]
        self.status = torch.cat([t.contiguous().flatten().view(torch.uint8) for t in status])

    def is_sound(self, h):
        """No delta, of any part, is NaN or inf, or would make the sum of all heads overflow."""
        deltas = (b.learners[h].delta(b.learners[h].learnt()) for b in self.model.shared)
        sizes = [torch.linalg.vector_norm(x, math.inf) / torch.finfo(x.dtype).max for x in deltas]
        return torch.stack([x.to(self.device) for x in sizes]).max() < 0.5 / self.model.total

    def exchange(self):
        """Partial sums -> all-to-all -> mean -> new shards -> all-gather of the forward format.

        Yields every Base with its new shard and new rows, and changes nothing that heads read.
        """
        torch.set_num_threads(self.threads)  # another thread's default would round otherwise
        model, n = self.model, len(self.model.heads)
        self.status = all_gather(self.status, self.group)  # (P, bytes)
        model.bytes_sent += self.status[0].nbytes * (model.world - 1)
        self.sound = self.status[:, :n].flatten().tolist()
        if not any(self.sound):
            raise FloatingPointError("no head is finite; go on from a checkpoint, at a lower rate")
        for bucket in buckets(self.shared):
            yield from self.renew(bucket)
        self.group = None  # see leave

    def renew(self, bucket):
        """[(Base, its new shard, its new rows of all processes)]"""
        model = self.model
        mean = tree_sum(self.arrived(bucket).__getitem__, 0, model.world) / sum(self.sound)
        means = zip(bucket, mean.split([base.share for base in bucket]), strict=True)
        new = [(base, self.advance(base, mean)) for base, mean in means]
        rows = [encode(shard, base.format).view(torch.uint8).flatten() for base, shard in new]
        everyone = all_gather(torch.cat(rows), self.group)  # (P, bytes)
        model.bytes_sent += everyone[0].nbytes * (model.world - 1)
        everyone = everyone.split([len(x) for x in rows], 1)
        return [(*each, rows) for each, rows in zip(new, everyone, strict=True)]

    def arrived(self, bucket):
        """(P, rows, 64): for this process's share, the sum of deltas of every process."""
        P, wire = self.model.world, "fp32" if bucket[0].statistic else self.wire
        sums = [b.to_rows(tree_sum(partial(self.delta, b), 0, len(b.learners))) for b in bucket]
        sums = torch.cat([rows.view(P, -1, BLOCK) for rows in sums], 1)
        sent = encode(sums.flatten(0, 1), wire)  # each P-th of the rows is for one process
        arrived = torch.empty_like(sent) if P > 1 else sent
        collective(dist.all_to_all_single, arrived, sent, group=self.group)
        self.model.bytes_sent += sent.nbytes // P * (P - 1)
        return decode(arrived, wire, sums.dtype).view_as(sums)

    def delta(self, base, h):
        """What a head here adds to the mean: nothing, where it is left out."""
        delta = base.learners[h].delta(self.learnt[h][base])
        return delta if self.sound[self.model.first + h] else torch.zeros_like(delta)

    def advance(self, base, mean):
        """The new value of a shard: decay W + mean, or what the outer optimizer makes of it."""
        if base.statistic:
            return mean.to(base.shard.dtype)
        W = base.shard * (self.decay if base.low_rank else 1.0)  # a copy: in use until wait()
        if self.outer_optimizer is None:
            return mean.add_(W)
        base.outer.data, base.outer.grad = W, mean.neg_()
        self.outer_optimizer.step()
        new, base.outer.data, base.outer.grad = base.outer.data, base.shard.data, None
        return mean.copy_(new)

    def apply(self, exchanged):
        """W becomes what arrived; heads go on from it, and those left out start again."""
        model, own = self.model, tensors_of(self.model.module)
        for base, shard, rows in exchanged:
            base.rows.view(torch.uint8).view(rows.shape).copy_(rows)
            base.shard.copy_(shard)
            del shard, rows  # before the next bucket is made
            if not base.low_rank:
                own[base.name].copy_(base.dense())
        model.merges += 1
        for h, head in enumerate(model.heads):
            if self.sound[model.first + h]:
                for base, learnt in self.learnt[h].items():
                    base.learners[h].install(learnt)
            else:
                for base in model.shared:
                    base.learners[h].restart()
                for p in head.parameters():
                    self.states.pop(p, None)
            for base in (b for b in self.shared if b.low_rank and self.reset != "none"):
                base.learners[h].reset(self.reset, model.merges, self.states)
        mine = [model.module.get_buffer(name) for name in model.carried]  # become head 0's
        sent = self.status[0, len(model.heads) :].split([t.nbytes for t in mine])
        for t, head_0s in zip(mine, sent, strict=True):
            t.copy_(head_0s.clone().view(t.dtype).view(t.shape))
        bad = [n for n, sound in enumerate(self.sound) if not sound]
        model.left_out += len(bad)
        if bad and model.rank == 0:
            text = f"merge {model.merges}: heads {bad} are not finite; left out, they start again"
            warnings.warn(text, stacklevel=4)  # whoever called merge or wait

    def start(self):
        """A snapshot, and all the sending in a thread of its own."""
        self.learnt = tree_map(torch.clone, self.learnt)
        self.group = second_group(dist.group.WORLD, self.device) if self.model.world > 1 else None
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        thread = ThreadPoolExecutor(1, initializer=torch.cuda.set_stream, initargs=[self.stream])
        self.exchanged = thread.submit(list, self.exchange())
        self.model.in_flight = self
        return self

    @torch.no_grad()
    def wait(self):
        """Waits for what was sent, and applies it. Once; W changes here and only here."""
        if self.model.in_flight is not self:
            raise RuntimeError("this merge was waited for already")
        self.model.in_flight = None
        exchanged = self.exchanged.result()
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.apply(exchanged)


@torch.no_grad()
def merge(
    model,
    *,
    optimizer=None,
    reset="none",
    decay=1.0,
    wire="fp32",
    outer_optimizer=None,
    async_op=False,
    part=(0, 1),
):
    """W <- decay W + (1/N) sum_n s (B_n A_n - B'_n A'_n); copies <- their mean. Collective.

    Right after it every head computes just what the merged model computes, and merging again (with
    decay 1) changes nothing. A head with NaN, inf or an update that overflows is left out, and
    starts again from the merged model; without optimizer state, if `optimizer` is given.

    Args:
        optimizer: needed for a reset, which clears its whole state of what was reset.
        reset: "none": factors and their optimizer state go on. "B": B <- 0. "AB": and a new A.
        decay: factor on W of low-rank layers, the product of (1 - rate_t wd) since the last merge.
        wire: what each process rounds its sum of deltas to before it is sent, one of BASES.
        outer_optimizer: of outer_parameters(model); steps with minus the mean as gradient.
        async_op: return a Merge at once; heads may learn on until its wait(), which applies it.
        part: (k, K): the k-th of K groups of tensors alone, to spread the traffic over the steps.
    Raises: ValueError, FloatingPointError (no head is finite), RuntimeError, nothing changed;
        ProcessLost, after which the run has to go on from a checkpoint.
    Source: the paper's LTE update; telescoped, W = W_start + (s/N) sum_n B_n A_n without reset.
    """
    model = wrapped(model, idle=True)
    check_choice("wire", wire, BASES)
    check_choice("reset", reset, ("none", "B", "AB"))
    if reset != "none" and (optimizer is None or async_op):
        raise ValueError(f"reset={reset!r} needs optimizer=, and async_op=False")
    if not (0 < decay <= 1 and 0 <= part[0] < part[1]):
        raise ValueError(f"decay={decay!r}, part={part!r}: use 0 < decay <= 1, (k, K) with k < K")
    if thawed := [name for name, p in model.frozen.items() if p.requires_grad]:
        raise ValueError(f"{thawed} were frozen while wrapping; let them train before it, or never")
    check_optimizer(optimizer, model.heads.parameters())
    check_optimizer(outer_optimizer, [b.outer for b in model.shared if not b.statistic], every=True)
    work = Merge(model, part, optimizer, reset, decay, wire, outer_optimizer)
    return work.start() if async_op else work.apply(work.exchange())


# ------------------------------------------------------------------------------------------------
# 7 training helpers, export


def clip_grad_norm_(model, max_norm):
    """Clip each head's gradient to max_norm by its own norm; returns the norms (n,) before it."""
    heads = wrapped(model).heads
    return torch.stack([nn.utils.clip_grad_norm_(head.parameters(), max_norm) for head in heads])


def merged_state_dict(model, exact=True):
    """The merged model under the plain model's names, from the exact master. Collective.

    Not what heads learnt since the last merge. exact=False: W as the forward pass sees it; heads
    learnt beside that rounding, so that in 4 bits it tests better.
    """
    model = wrapped(model, idle=True)
    tensors = model.module.state_dict()  # what heads do not change
    tensors |= {base.name: base.exact() if exact else base.dense() for base in model.shared}
    return {n: t.detach().clone() if torch.is_tensor(t) else t for n, t in tensors.items()}


# ------------------------------------------------------------------------------------------------
# 8 checkpoints: written by any number of processes, read by any other

COUNTERS = "merges", "left_out", "calls", "bytes_sent"


def about(model, **optimizers):
    """What a checkpoint and the run that reads it must have in common, as json."""
    groups = {name: [type(o).__name__, len(o.param_groups)] for name, o in optimizers.items() if o}
    return {"version": __version__} | model.about | groups


def checkpoints(directory):
    """The checkpoints in a directory, the newest first."""
    return sorted(Path(directory).glob("step_" + 8 * "[0-9]"), reverse=True)


def newest(directory, previous=False):
    """(path, meta.json) of the newest checkpoint, or of the newest whole one if `previous`."""
    if not (found := checkpoints(directory)):
        raise FileNotFoundError(f"{directory} holds no checkpoint (step_...); train from the start")
    for path in found if previous else found[:1]:
        with suppress(OSError, ValueError, KeyError):
            meta = json.loads((path / "meta.json").read_text())
            if all((path / f).stat().st_size == n for f, n in meta.get("files", {}).items()):
                return path, meta
    raise ValueError(f"{path} is not whole; remove it, or give previous=True for one before it")


def save(directory, model, optimizer, outer_optimizer=None, *, step, **extra):
    """Write directory/step_00000120, or nothing: aside, and renamed when whole. Collective.

    head_0003.pt has what a head trains and its optimizer's state, base.pt what all share. The
    directory is one for all processes; its last two checkpoints stay.
    step: optimizer steps done; extra: what else load shall return, anything json can hold.
    """
    model = wrapped(model, idle=True)
    check_optimizer(optimizer, model.heads.parameters())
    final = Path(directory) / f"step_{step:08d}"
    aside = final.with_suffix(".new")
    common = about(model, optimizer=optimizer, outer_optimizer=outer_optimizer)
    meta = dict(version=__version__, about=common, step=step, extra=extra)
    meta["counters"] = {name: getattr(model, name) for name in COUNTERS}
    json.dumps(meta)  # what json cannot hold is an error before anything is written
    if model.rank == 0:
        for left in aside, *final.parent.glob("step_*.old"):  # by a run that was killed in here
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir(parents=True)
    agree(saving=final.name)
    for n, head in enumerate(model.heads, model.first):
        tensors = {name: t for name, t in head.state_dict().items() if name not in model.frozen}
        states = {name: optimizer.state.get(p, {}) for name, p in head.named_parameters()}
        torch.save(dict(tensors=tensors, states=states), aside / f"head_{n:04d}.pt")
    saved = dict(model=merged_state_dict(model), groups=optimizer.state_dict()["param_groups"])
    if outer_optimizer is not None:
        states = {b: outer_optimizer.state.get(b.outer, {}) for b in model.shared}
        saved["outer"] = {b.name: tree_map(b.whole, state) for b, state in states.items()}
        saved["outer_groups"] = outer_optimizer.state_dict()["param_groups"]
    agree(saved=final.name)
    if model.rank == 0:
        torch.save(saved, aside / "base.pt")
        meta["files"] = {file.name: file.stat().st_size for file in sorted(aside.iterdir())}
        (aside / "meta.json").write_text(json.dumps(meta, indent=1))
        kept = [path for path in checkpoints(directory) if path < final][:1]
        for path in set(checkpoints(directory)) - set(kept):
            path.replace(path.with_suffix(".old"))  # half of one must not be taken for one
        aside.replace(final)
        for old in final.parent.glob("step_*.old"):
            shutil.rmtree(old)
    agree(renamed=final.name)


def restore(optimizer, states, groups):
    """Gives an optimizer the state of those parameters that it holds, and its groups' options."""
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update(saved, params=group["params"])
        for p in states.keys() & set(group["params"]):
            optimizer.state[p] = copy.deepcopy(states[p])  # what was read is a view of a file
    optimizer.load_state_dict(optimizer.state_dict())  # torch moves each to where it belongs


@torch.no_grad()
def load(directory, model, optimizer, outer_optimizer=None, *, previous=False):
    """Go on from the newest checkpoint, or the newest whole one if `previous`; its step and extra.

    Collective. Raises: FileNotFoundError, ValueError, nothing changed.
    """
    model = wrapped(model, idle=True)
    check_optimizer(optimizer, model.heads.parameters())
    path, meta = newest(directory, previous)
    agree(checkpoint=path.name)
    ours = about(model, optimizer=optimizer, outer_optimizer=outer_optimizer)
    theirs = meta["about"] | {"version": meta["version"]}
    if different := [name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name)]:
        there, here = theirs.get(different[0]), ours.get(different[0])
        raise ValueError(f"{path} was saved with {different[0]} = {there}, this run has {here}")
    options = dict(map_location="cpu", weights_only=True, mmap=True)
    shared, states = torch.load(path / "base.pt", **options), {}
    model.module.load_state_dict(shared["model"], strict=False)  # what is frozen, too
    for n, head in enumerate(model.heads, model.first):
        saved = torch.load(path / f"head_{n:04d}.pt", **options)
        head.load_state_dict(saved["tensors"], strict=False)
        states |= {p: saved["states"][name] for name, p in head.named_parameters()}
    restore(optimizer, states, shared["groups"])
    for base in model.shared:
        rows = base.to_rows(shared["model"][base.name].to(base.rows.device))
        base.rows.copy_(encode(rows, base.format))
        base.shard.copy_(rows[base.mine])
    if outer_optimizer is not None:
        states = {b.outer: tree_map(b.share_of, shared["outer"][b.name]) for b in model.shared}
        restore(outer_optimizer, states, shared["outer_groups"])
    vars(model).update(meta["counters"])
    return {"step": meta["step"], **meta["extra"]}


# ------------------------------------------------------------------------------------------------
# 9 measures: who owns what, bytes held and sent, how far apart heads are


def census(model):
    """{"low-rank": {name: size}, "copies": {...}, "frozen": {...}} of the plain model."""
    model = wrapped(model)
    low_rank = {base.name: base.numel for base in model.shared if base.low_rank}
    copies = {base.name: base.numel for base in model.shared if not base.low_rank}
    frozen = {name: p.numel() for name, p in model.frozen.items()}
    return {"low-rank": low_rank, "copies": copies, "frozen": frozen}


def cost_report(model, *, merge_every=1, wire="fp32", workers=None):
    """Bytes that one of `workers` processes (default: those running) holds and sends.

    Returns {"held", "held_dense", "sent"}, by kind; "all" is the sum. Held by AdamW between steps,
    activations aside. Sent by one merge; "step": a step's share, "dense": an all-reduce's.
    """
    model = wrapped(model)
    P = workers or model.world
    heads, rest = divmod(len(model.heads) * model.world, P)  # of one worker
    if rest:
        raise ValueError(f"workers={P} do not share {model.total} heads; use a divisor")
    row = encode(torch.zeros(1, BLOCK), wire).nbytes  # of deltas as they are sent
    rows = {b: math.ceil(b.numel / BLOCK / P) for b in model.shared}  # of one share
    forward = sum(n * b.rows[0].nbytes for b, n in rows.items())
    master = sum(n * b.master[0].nbytes for b, n in rows.items() if b.master is not None)
    deltas = sum(n * (8 * BLOCK if b.statistic else row) for b, n in rows.items())
    own = {b: heads * sum(x.nbytes for x in b.learners[0].learnt()) for b in model.shared}
    trained, merged = sum(own.values()), sum(own[b] for b in model.shared if b.low_rank)
    dense = sum(b.numel * b.shard.dtype.itemsize for b in model.shared)
    status = heads + sum(model.module.get_buffer(name).nbytes for name in model.carried)
    merge = (deltas + forward + status) * (P - 1)
    sent = {"merge": merge, "step": merge / merge_every, "dense": 2 * dense * (P - 1) / P}
    held = {"forward": P * forward, "master": master, "trained": trained, "merged": merged}
    held |= {"gradients": trained, "moments": 2 * trained}
    held_dense = {"weights": dense, "gradients": dense, "moments": 2 * dense, "all": 4 * dense}
    return {"held": held | {"all": sum(held.values())}, "held_dense": held_dense, "sent": sent}


def subspace_report(model):
    """How far apart the heads are, and how many directions the update has. Collective.

    Returns {weight: {"cosine", "grassmann", "effective_rank"}}, NaN for one head or nothing learnt.
    cosine: mean over pairs of heads of <B_m A_m, B_n A_n> / (|B_m A_m| |B_n A_n|).
    grassmann: mean over pairs of sqrt(sum_j theta_j^2), theta_j the angles between the row spaces
        of A_m and A_n, as a share of sqrt(r) pi / 2, its largest value.
    effective_rank: exp(entropy of p), p the singular values of sum_n B_n A_n over their sum.
    """
    report = {}
    for base in [b for b in wrapped(model).shared if b.low_rank]:
        here = zip(*[lora.learnt() for lora in base.learners], strict=True)
        A, B = (all_gather(torch.stack(x)).flatten(0, 1).double() for x in here)  # (N, ...)
        m, n = torch.triu_indices(len(A), len(A), 1, device=A.device)  # each pair once
        D = B @ A  # (N, out, in)
        directions = D.flatten(1) / D.flatten(1).norm(dim=1, keepdim=True)
        Q = torch.linalg.qr(A.mT).Q  # (N, in, r), orthonormal columns
        angles = torch.linalg.svdvals(Q[m].mT @ Q[n]).clamp(max=1).acos()
        distance = angles.square().sum(1).sqrt() / (math.sqrt(A.shape[1]) * math.pi / 2)
        p = torch.linalg.svdvals(D.sum(0))
        effective = torch.special.entr(p / p.sum()).sum().exp()
        cosine = (directions[m] * directions[n]).sum(1)
        values = {"cosine": cosine, "grassmann": distance, "effective_rank": effective}
        report[base.name] = {name: value.mean().item() for name, value in values.items()}
    return report
