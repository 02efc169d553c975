"""AdamW in one fused pass, with three ways to keep small updates of bf16 weights.

A bf16 weight has 8 significant bits: an update below 1/512 of the weight rounds away, and at learning rate 1e-5 most
do. `optim.weights` chooses the remedy:

    fp32_master           a float32 copy of each weight, and float32 moments: 12 bytes per parameter on top of the bf16
                          weight (and gradients accumulate in float32, 2 more). The default wherever it fits.
    stochastic_rounding   bf16 weights and moments, 4 bytes on top: the exact result is rounded up or down at random, in
                          proportion to its distance, so that small updates arrive on average. Fits 8B on 80 GB.
    plain                 moments in the weight's dtype, round to nearest: the baseline, or for float32 weights.

`optim.fp8_moments=True` stores the moments of matrices in FP8 instead, 2 bytes per parameter for both, with one scale
for every 128 values of a row. The second moment is stored as its square root, which spans half as many binades. Both
are rounded stochastically, since one step changes them by less than FP8 resolves.

The update of a tensor is one elementwise function, `adamw_`, which torch.compile makes one pass over memory.
`optim.offload` streams moments and masters from host memory through the GPU (plumbing/offload.py), for the same bits;
`fp8.offload_weights` also the weights whose FP8 casts are all that the passes of a step read.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from plumbing.offload import host_zeros, streamed
from plumbing.schema import Natural, NonNegativeFloat
from plumbing.sharding import plain_local

DecayRate = Annotated[float, "0 <= float < 1", lambda rate: 0 <= rate < 1]
# below it a weight without a gradient would be 0 / 0
Epsilon = Annotated[float, "float >= 1e-30", lambda eps: eps >= 1e-30]
Fraction = Annotated[float, "0 <= float <= 1", lambda fraction: 0 <= fraction <= 1]


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: NonNegativeFloat = 1e-3  # peak learning rate
    min_lr: NonNegativeFloat = 1e-4  # learning rate at the last step (cosine decay); at most lr
    warmup_steps: Natural = 10  # steps of linear warm-up
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)  # decay rates of the two moments
    eps: Epsilon = 1e-8  # added to the root of the second moment
    weight_decay: NonNegativeFloat = 0.1  # decoupled; applies to matrices, not to norms
    grad_clip: NonNegativeFloat = 1.0  # largest global gradient norm; 0 turns clipping off
    weights: Literal["fp32_master", "stochastic_rounding", "plain"] = "fp32_master"  # how bf16 keeps small updates
    fp8_moments: bool = False  # both moments of matrices in FP8: 2 bytes per parameter instead of 4 or 8
    offload: Fraction = 0.0  # part of moments and masters kept in host memory and streamed at each step; 1: all of them


def get_lr(cfg, step, max_steps):
    """Learning rate of a step, counted from 1: linear warm-up, then cosine decay from cfg.lr to cfg.min_lr."""
    if step <= cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, max_steps - cfg.warmup_steps)
    lowest = min(cfg.min_lr, cfg.lr)  # lowering lr alone never raises the rate again
    return lowest + 0.5 * (cfg.lr - lowest) * (1 + math.cos(math.pi * min(1.0, progress)))


# ----------------------------------------------------------------------------------------------------------------
# what is stored, and where

PIECE = 2**26  # values updated at once, at most: buffers for streaming are as small as to fit where activations were
MOMENTS = "exp_avg", "exp_avg_sq"
STATE_KEYS = "optim.fp8_moments"  # a run resumes only with these keys as they were; masters can be made from weights


def has_masters(cfg, dtype):
    """Whether weights of `dtype` get float32 copies; then gradients of several passes accumulate in float32 too."""
    return cfg.weights == "fp32_master" and dtype != torch.float32


def fp8_block(row):
    """How many neighbours in a row of `row` values share a scale in FP8: all if 128 does not divide the row."""
    return 128 if row % 128 == 0 else row


def state_layout(cfg, name, shape, dtype):
    """{kind: (shape, dtype)} of the tensors that AdamW stores for weight `name`. A checkpoint names them by kind."""
    masters = has_masters(cfg, dtype)
    layout = {"master": (shape, torch.float32)} if masters else {}
    for moment in MOMENTS:
        if cfg.fp8_moments and len(shape) == 2:
            # kinds of their own: a run without FP8 moments must not take the unscaled values for moments
            layout[f"{moment}_fp8"] = shape, torch.float8_e4m3fn
            layout[f"{moment}_unit"] = (shape[0], shape[1] // fp8_block(shape[1])), torch.float32
        else:
            layout[moment] = shape, torch.float32 if masters else dtype
    return layout


def state_bytes(cfg, name, shape, dtype):
    """What AdamW stores for one weight, in bytes, beside weight and gradient."""
    return sum(math.prod(size) * kind.itemsize for size, kind in state_layout(cfg, name, shape, dtype).values())


def offloaded(cfg, weights):
    """The names of the matrices in {name: weight} whose state is in host memory: as many as optim.offload allows."""
    matrices = {name: w.numel() for name, w in weights.items() if w.ndim == 2}
    limit, total, names = cfg.offload * sum(matrices.values()), 0, set()
    for name, size in matrices.items():
        if total + size <= limit:
            total += size
            names.add(name)
    return names


def pieces(w):
    """Indices of the parts of a weight, and of its gradient and state, that are updated one after the other: rows."""
    if w.ndim < 2:
        return [...]
    rows = max(1, math.ceil(len(w) / max(1, math.ceil(w.numel() / PIECE))))
    rows += -rows % 4  # four units of FP8 moments are 16 bytes, at which vector loads begin
    return [slice(i, i + rows) for i in range(0, len(w), rows)]


# ----------------------------------------------------------------------------------------------------------------
# rounding

# Multiplying by this moves e4m3's smallest normal value, 2^-6, to float32's. Below it both formats have evenly spaced
# values, above it a fixed number of mantissa bits: so here the last 20 bits of a float32 are, for values of any size,
# the ones that e4m3 lacks (23 - 3 mantissa bits). Example: 1.1 lies between 1.0 and 1.125 in e4m3. The last 20 bits of
# 1.1 * 2^-120 are 0.8 * 2^20, so adding a random number below 2^20 carries in 80% of all cases, and cutting them off
# gives 1.125 then, 1.0 otherwise: 1.1 on average.
E4M3_SHIFT = 2.0**-120


def hash32(x):
    """32 well-mixed bits for each int32 (lowbias32 by Chris Wellons; shifts masked to act as unsigned)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


def noise_like(p, seed):
    """Three int32 tensors of p's shape with random bits, for weight and moments: a hash of (seed, position).

    They are shifted views of one hash, which costs one instead of three. Rounding compares values by their high bits
    first (16 bits for bf16, 20 for FP8), and the shifts put different bits there, so the three hardly correlate.
    """
    bits = hash32(torch.arange(p.numel(), dtype=torch.int32, device=p.device).view(p.shape) ^ seed)
    return bits, bits >> 12, bits >> 6


def round_to(x, dtype, noise):
    """float32 x in `dtype`. noise: None rounds to nearest; int32 bits round to bf16 stochastically.

    bf16 is the upper half of a float32: 16 random bits are added to the lower half, which is then cut off.
    """
    if noise is None:
        return x.to(dtype)
    return ((x.view(torch.int32) + (noise & 0xFFFF)) & -0x10000).view(torch.float32).to(dtype)


def to_fp8(x, noise, nonzero=False):
    """(values of e4m3 as float32, unit of each row) of float32 x (rows, block): x is about values * unit.

    Rounded stochastically by the low 20 bits of noise, as E4M3_SHIFT explains. nonzero: x >= 0, and what would become 0
    becomes 2^-9 units, the smallest positive value. Denormals must not be flushed to 0.
    """
    # positive floats have the same order as their bits, and integers compare in one instruction: they have no NaN
    amax = x.abs().view(torch.int32).amax(1, keepdim=True).view(torch.float32)
    # puts the largest value just below 448, so that none rounds up to more
    unit = amax.clamp(min=1e-30) * ((1 + 2**-20) / 448)
    step = 1 << 20  # between neighbours in e4m3, as integers
    bits = (x * (1 / unit) * E4M3_SHIFT).view(torch.int32) + (noise & (step - 1))
    bits = (bits.clamp(min=step) if nonzero else bits) & -step
    return bits.view(torch.float32) * (1 / E4M3_SHIFT), unit


def load_moment(moment, factor=1.0):
    """factor * a moment in float32. moment: a tensor, or (FP8 values, units)."""
    return moment[0].float() * (moment[1] * factor) if isinstance(moment, tuple) else moment.float() * factor


def store_moment(moment, new, apply, noise, nonzero=False):
    """Round `new` into a moment in place, or leave it bit for bit if not apply. nonzero: see to_fp8."""
    if isinstance(moment, tuple):
        values, unit = to_fp8(new, noise, nonzero)
        moment[0].copy_(torch.where(apply, values, moment[0].float()))
        moment[1].copy_(torch.where(apply, unit, moment[1]))
    else:  # values of the dtype survive rounding: stochastic rounding adds below the last bit
        moment.copy_(round_to(torch.where(apply, new, moment.float()), moment.dtype, noise))


# ----------------------------------------------------------------------------------------------------------------
# the update


def adamw_(p, g, m, v, master, *, lr, decay, debias1, debias2, clip, apply, seed, beta1, beta2, eps,
           exact_weight=False):
    """Update weight p and moments m, v in place from gradient g; all of one shape.

    m, v: tensors, or (FP8 values, units) of rows of a block each, v then as its root. master: the weight in float32, or
    None. The keywords up to seed are 0-d tensors, since torch.compile would compile a float in.
    debias1, debias2: factors for m and the root of v, which began at zero. apply: False leaves everything as it is, bit
    for bit, whatever g holds. seed: of stochastic rounding, or None; noise is a hash of (seed, position), so there is
    no generator state and a resumed run repeats it. exact_weight: round p to nearest.
    Source: Loshchilov & Hutter, arXiv 1711.05101; stochastic rounding of bf16 weights: arXiv 2010.06192.
    """
    # Moments in FP8 take more instructions than memory traffic can hide. So factors that many values share are
    # multiplied first, and rsqrt, one instruction on a GPU, replaces exact roots (fifteen) and quotients (seven): as
    # exact, except for a root near 2^-63, where the smallest normal float32, 2^-126, is added so that 0 gives no nan.
    g, w = g.float(), (p if master is None else master).float()
    stores_root = isinstance(v, tuple)
    m_new = load_moment(m, beta1) + g * (clip * (1 - beta1))
    v_old = load_moment(v, math.sqrt(beta2)).square() if stores_root else load_moment(v, beta2)
    v_new = v_old + (g * (clip * math.sqrt(1 - beta2))).square()
    root = v_new * (v_new + 2.0**-126).rsqrt()
    update = m_new * (root * debias2 + eps).rsqrt().square()
    w = torch.where(apply, w * (1 - lr * decay) - (lr * debias1) * update, w)
    noise_w, noise_m, noise_v = (None, None, None) if seed is None else noise_like(p, seed)
    store_moment(m, m_new, apply, noise_m)
    # a root that underflowed beside a first moment that did not would make a step of lr / eps
    store_moment(v, root if stores_root else v_new, apply, noise_v, nonzero=True)
    p.copy_(round_to(w, p.dtype, None if exact_weight else noise_w))
    if master is not None:
        master.copy_(w)


class AdamW:
    """AdamW over the plain local shards of a model's parameters, without DTensor and FP8 wrappers.

    Every rank updates the rows that it holds; the only communication is one number, the gradient norm. Masters start as
    copies of the weights: construct this after the weights are initialized, or load weights through `masters` as well
    (formats/hf.py, checkpoint.py do). `unfilled` finds what got neither.
    """

    def __init__(self, model, cfg, *, seed, compiled):
        self.cfg, self.seed, self.step_count = cfg, seed, 0
        self.params = dict(model.named_parameters())
        self.weights = {name: plain_local(p) for name, p in self.params.items()}
        first = next(iter(self.weights.values()))
        self.sums_in_float32 = has_masters(cfg, first.dtype)
        self.rounds_weights = cfg.weights == "stochastic_rounding" and first.dtype != torch.float32
        self.state = defaultdict(dict)  # {kind: {name: tensor}}
        self.offloaded = offloaded(cfg, self.weights)
        for name, w in self.weights.items():
            zeros = host_zeros if name in self.offloaded else torch.zeros
            for kind, (shape, dtype) in state_layout(cfg, name, w.shape, w.dtype).items():
                self.state[kind][name] = zeros(shape, dtype=dtype, device=w.device)
        for name, master in self.masters.items():
            master.copy_(self.weights[name])
        self.grads, self.casts = {}, {}
        self.update = adamw_
        # With FP8 moments one kernel serves matrices of any size, and is as fast as one for each. Without, one for each
        # of a model's few sizes reached 2.9 TB/s on an H100, one for all 2.4. A CPU gains nothing from that.
        self.any_size = compiled and (cfg.fp8_moments or first.device.type == "cpu")
        if compiled:
            self.update = torch.compile(adamw_, dynamic=None if self.any_size else False, fullgraph=True)
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)

    @property
    def masters(self):
        """{name: float32 copy of this rank's rows of a weight}; whoever loads weights fills these too. May be empty."""
        return self.state.get("master", {})

    def offload_weights(self, casts):
        """Move weights into host memory, of which passes read an FP8 cast only; their parameters become nan.

        casts: {name: a function that renews the cast, given the whole weight on the GPU}. Only those move whose state
        is in host memory.
        """
        self.casts = {name: cast for name, cast in casts.items() if name in self.offloaded}
        for name in self.casts:
            p, w = self.params[name], self.weights[name]
            p.on_host = self.weights[name] = host_zeros(w.shape, w.dtype, w.device)
            p.on_host.copy_(w)
            p.data = w.new_full((), math.nan).expand(w.shape)

    def unfilled(self):
        """Names of weights and masters that hold nan, because nothing has filled them."""
        stored = [*self.weights.items(), *((f"{name} (master)", w) for name, w in self.masters.items())]
        return [name for name, w in stored if w.isnan().any()]

    def accumulate(self):
        """After each of several backward passes: accumulate the gradients, in float32 if there are masters."""
        if not self.sums_in_float32:
            return  # p.grad itself accumulates
        for name, p in self.params.items():
            if p.grad is not None:
                g = plain_local(p.grad)
                self.grads[name] = self.grads[name].add_(g) if name in self.grads else g.float()
                p.grad = None

    @torch.no_grad()
    def grad_norm(self):
        """The global L2 norm of all gradients over all ranks, a 0-d float32 tensor (does not wait for the GPU)."""
        for name, p in self.params.items():
            if p.grad is not None:
                self.grads[name] = plain_local(p.grad)
                p.grad = None
        grads = list(self.grads.values())
        squares = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).square().sum()
        sharded = next((p for p in self.params.values() if isinstance(p, DTensor)), None)
        if sharded is not None:  # replicas (HSDP) hold the same rows: sum over the shards of one replica only
            dist.all_reduce(squares, group=sharded.device_mesh.get_group(sharded.device_mesh.ndim - 1))
        return squares.sqrt()

    @torch.no_grad()
    def step(self, lr, grad_norm, apply=None):
        """One update of all weights; consumes the gradients. grad_norm: from grad_norm(), to clip by.

        apply: a 0-d bool tensor; False changes no weight and no moment, but the step counts. None: True.
        """
        cfg = self.cfg
        self.step_count += 1

        def scalar(value):
            return torch.full((), value, dtype=torch.float32, device=grad_norm.device)

        limit, (beta1, beta2) = cfg.grad_clip or math.inf, cfg.betas  # grad_clip=0: no limit
        shared = {
            "lr": scalar(lr),
            "debias1": scalar((1 - beta1**self.step_count) ** -1),
            "debias2": scalar((1 - beta2**self.step_count) ** -0.5),
            "clip": (limit / (grad_norm + 1e-6)).clamp(max=1.0),
            "apply": torch.ones_like(grad_norm, dtype=torch.bool) if apply is None else apply,
            "beta1": beta1, "beta2": beta2, "eps": cfg.eps, "exact_weight": not self.rounds_weights,
        }
        stored = {**self.state, "p": {name: self.weights[name] for name in self.casts}}
        decay_of_matrices, no_decay = scalar(cfg.weight_decay), scalar(0.0)
        todo = [(name, part, {kind: tensors[name][part] for kind, tensors in stored.items() if name in tensors})
                for name, w in self.weights.items() if name in self.grads for part in pieces(w)]
        copies = streamed([state for name, _, state in todo if name in self.offloaded], grad_norm.device)
        for i, (name, part, state) in enumerate(todo):
            if name in self.grads:  # its first piece; the gradient before this one is freed
                g = self.grads.pop(name)
            if name in self.offloaded:
                state = next(copies)
            w = state["p"] if name in self.casts else self.weights[name][part]
            in_fp8 = cfg.fp8_moments and w.ndim == 2
            shape = (-1, fp8_block(w.shape[1])) if in_fp8 else (-1,)
            rows = {kind: t.view((-1, 1) if kind.endswith("_unit") else shape) for kind, t in state.items()}
            rows |= {"p": w.view(shape), "g": g[part].view(shape)}
            if self.any_size:
                for t in rows.values():
                    torch._dynamo.maybe_mark_dynamic(t, 0)
                    if in_fp8:  # a kernel for each width of blocks, or Triton fails
                        torch._dynamo.mark_static(t, 1)
            m, v = [(rows[f"{kind}_fp8"], rows[f"{kind}_unit"]) if in_fp8 else rows[kind] for kind in MOMENTS]
            seed = None
            if self.rounds_weights or in_fp8:
                bits = hash((self.seed, self.step_count, i)) & 0x7FFFFFFF  # of integers: the same in every process
                seed = torch.full((), bits, dtype=torch.int32, device=w.device)
            self.update(rows["p"], rows["g"], m, v, rows.get("master"), seed=seed,
                        decay=decay_of_matrices if w.ndim >= 2 else no_decay, **shared)
            if name in self.casts:
                g[part].copy_(w)  # the gradient is used up: here the whole weight comes together
                if part.stop >= len(g):
                    self.casts[name](g)
        next(copies, None)  # resume it once more, to write the last piece back
