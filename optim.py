"""AdamW in one fused pass, with three ways to keep small updates of bf16 weights.

A bf16 weight has 8 significant bits: an update below 1/512 of the weight rounds away, and at learning rate 1e-5 most
do. `optim.weights` says what to do about it:

    fp32_master           a float32 copy of each weight, and float32 moments: 12 more bytes a parameter than its bf16
                          self (and gradients add up in float32, 2 more). The default wherever it fits.
    stochastic_rounding   bf16 weights and moments, 4 more bytes: the exact result is rounded up or down at random in
                          proportion to its distance, so that small updates arrive on average. Fits 8B on 80 GB.
    plain                 moments in the weight's dtype, round to nearest. For float32 weights, where there is nothing
                          to lose, or as the baseline.

`optim.fp8_moments=True` keeps the moments of matrices in FP8 instead, with one scale for every 128 values of a row (for
a whole row where 128 does not divide it): 2 bytes a parameter for both. The second moment is kept as its root, which
spans half as many binades. Both are rounded at random, since one step changes them by less than FP8 can show.

The update of a tensor is one elementwise function, `adamw_`. torch.compile makes it one kernel: the gradient is
clipped, both moments and the weight are updated, and everything is rounded in a single pass over memory.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from plumbing.sharding import plain_local


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-3  # peak learning rate
    min_lr: float = 1e-4  # learning rate at the last step (cosine decay), or lr if that is lower
    warmup_steps: int = 10  # linear warm-up
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the two moments
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled; matrices only, not norms
    grad_clip: float = 1.0  # largest global gradient norm; 0 turns clipping off
    weights: Literal["fp32_master", "stochastic_rounding", "plain"] = "fp32_master"  # how bf16 weights keep updates
    fp8_moments: bool = False  # both moments of matrices in FP8: 2 bytes a parameter instead of 4 or 8

    def problems(self):
        """Yield ({keys involved}, message) for each contradiction between these values."""
        for name in ("lr", "min_lr", "weight_decay", "grad_clip", "warmup_steps"):
            if getattr(self, name) < 0:
                yield {f"optim.{name}"}, f"optim.{name}={getattr(self, name)} must not be negative"
        if self.eps < 1e-30:  # a weight without a gradient would be 0 / 0
            yield {"optim.eps"}, f"optim.eps={self.eps} must be at least 1e-30"
        if not all(0 <= b < 1 for b in self.betas):
            yield {"optim.betas"}, f"optim.betas={self.betas} must both be at least 0 and below 1"


def get_lr(cfg, step, max_steps):
    """Learning rate of a step, counted from 1: linear warm-up, then cosine from cfg.lr down to cfg.min_lr.

    A min_lr above lr, as where only lr was lowered, is taken for lr.
    """
    if step <= cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, max_steps - cfg.warmup_steps)
    lowest = min(cfg.min_lr, cfg.lr)
    return lowest + 0.5 * (cfg.lr - lowest) * (1 + math.cos(math.pi * min(1.0, progress)))


# ----------------------------------------------------------------------------------------------------------------
# the update


def hash32(x):
    """32 well-mixed bits for each int32 (lowbias32 by Chris Wellons; shifts masked to act as unsigned)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


def round_to(x, dtype, noise):
    """float32 x in `dtype`: bf16 by adding 16 random bits below its last one and cutting there; else to nearest."""
    if noise is None:
        return x.to(dtype)
    return ((x.view(torch.int32) + (noise & 0xFFFF)) & -0x10000).view(torch.float32).to(dtype)


def to_fp8(x, noise, nonzero=False):
    """(values of e4m3 as float32, unit of each row) of float32 x (rows, block): x is about values * unit.

    Rounded at random, in proportion, by the low 20 bits of noise: as many as e4m3 has fewer than float32.
    nonzero: of x >= 0, what would become 0 becomes 2^-9 units, the smallest above. Denormals must not be flushed to 0.
    """
    # floats above 0 are in the order of their bits, and integers compare in one instruction: they have no NaN
    amax = x.abs().view(torch.int32).amax(1, keepdim=True).view(torch.float32)
    # the largest becomes a little less than 448, so that none rounds up to more
    unit = amax.clamp(min=1e-30) * ((1 + 2**-20) / 448)
    # Below its smallest normal value a format is as coarse as just above it. e4m3's is 2^-6, float32's 2^-126: this far
    # down, the last 20 bits of float32 are at every size the ones that e4m3 lacks.
    bits = (x * (1 / unit) * 2**-120).view(torch.int32) + (noise & 0xFFFFF)
    bits = (bits.clamp(min=1 << 20) if nonzero else bits) & -0x100000
    return bits.view(torch.float32) * 2.0**120, unit


def read(moment, factor=1.0):
    """factor * a moment in float32: of a tensor of its own dtype, or of (FP8 values, units)."""
    return moment[0].float() * (moment[1] * factor) if isinstance(moment, tuple) else moment.float() * factor


def write(moment, new, good, noise, nonzero=False):
    """Store `new` in a moment if good, else leave it as it is, bit for bit. nonzero: as for to_fp8, if it is in FP8."""
    if isinstance(moment, tuple):
        values, unit = to_fp8(new, noise, nonzero)
        moment[0].copy_(torch.where(good, values, moment[0].float()))
        moment[1].copy_(torch.where(good, unit, moment[1]))
    else:  # rounding keeps what is a value of the dtype already: stochastic rounding adds below its last bit
        moment.copy_(round_to(torch.where(good, new, moment.float()), moment.dtype, noise))


def adamw_(p, g, m, v, master, lr, decay, debias1, debias2, clip, good, seed, beta1, beta2, eps, exact_weight=False):
    """Update weight p and moments m, v in place from gradient g; all of one shape. Scalars up to seed are 0-d tensors.

    m, v: tensors, or (FP8 values, units) of rows of a block each, v then as its root. exact_weight: round p to nearest.
    debias1, debias2: what m and the root of v are multiplied by, because they began at zero.
    good: False leaves all of it as it is, bit for bit, whatever g holds. master: the weight in float32, or None.
    seed: None, or what stochastic rounding draws from: the noise is a hash of (seed, position), so it needs no
    generator state and a resumed run repeats it.
    Source: Loshchilov & Hutter, arXiv 1711.05101; stochastic rounding of bf16 weights: arXiv 2010.06192.
    """
    # Moments in FP8 take more instructions than memory can hide. So factors that many values share are multiplied
    # first, and rsqrt, one instruction on a GPU, stands for exact roots and quotients, which take fifteen and seven.
    g, w = g.float(), (p if master is None else master).float()
    rooted = isinstance(v, tuple)
    m_new = read(m, beta1) + g * (clip * (1 - beta1))
    v_old = read(v, math.sqrt(beta2)).square() if rooted else read(v, beta2)
    v_new = v_old + (g * (clip * math.sqrt(1 - beta2))).square()
    root = v_new * (v_new + 2**-126).rsqrt()  # the smallest normal value, lest 0 give nan: exact except near 2^-63
    update = m_new * (root * debias2 + eps).rsqrt().square()
    w = torch.where(good, w * (1 - lr * decay) - (lr * debias1) * update, w)
    noise_w = noise_m = noise_v = None
    if seed is not None:  # one hash for all three
        bits = hash32(torch.arange(p.numel(), dtype=torch.int32, device=p.device).view(p.shape) ^ seed)
        noise_w, noise_m, noise_v = bits, bits >> 12, bits >> 6  # overlap, but where one has high bits, others have low
    write(m, m_new, good, noise_m)
    # a root that underflowed beside a first moment that did not would make a step of lr / eps
    write(v, root if rooted else v_new, good, noise_v, nonzero=True)
    p.copy_(round_to(w, p.dtype, None if exact_weight else noise_w))
    if master is not None:
        master.copy_(w)


MOMENTS = "exp_avg", "exp_avg_sq"


class AdamW:
    """AdamW over the plain local shards of a model's parameters: no DTensor or FP8 wrapper in its way.

    Every rank updates the rows it holds; the only communication is one number, the gradient norm.
    """

    def __init__(self, model, cfg, *, seed, compiled):
        self.cfg, self.seed, self.step_count = cfg, seed, 0
        self.params = dict(model.named_parameters())
        self.weights = {name: plain_local(p) for name, p in self.params.items()}
        self.mode = "plain" if next(iter(self.weights.values())).dtype == torch.float32 else cfg.weights
        dtype = torch.float32 if self.mode == "fp32_master" else None  # None: the weight's own
        # matrices whose moments are in FP8, and how many neighbours in a row share a unit
        self.blocks = {name: 128 if w.shape[1] % 128 == 0 else w.shape[1] for name, w in self.weights.items()
                       if cfg.fp8_moments and w.ndim == 2}
        self.state = defaultdict(dict)  # {kind: {name: tensor}}
        for name, w in self.weights.items():
            for kind in MOMENTS:
                if block := self.blocks.get(name):
                    # other kinds than below: a run without FP8 moments must not take the bare values for moments
                    self.state[f"{kind}_fp8"][name] = torch.zeros_like(w, dtype=torch.float8_e4m3fn)
                    self.state[f"{kind}_unit"][name] = torch.ones(len(w), w.shape[1] // block, device=w.device)
                else:
                    self.state[kind][name] = torch.zeros_like(w, dtype=dtype)
            if self.mode == "fp32_master":
                self.state["master"][name] = w.float()
        self.grads = {}
        self.update = adamw_
        if compiled:
            # On a GPU one kernel for each of a model's few sizes: 2.9 TB/s on an H100, where one kernel for all sizes
            # reached 2.4. A CPU gains nothing from that and compiles for long.
            on_cpu = next(iter(self.weights.values())).device.type == "cpu"
            self.update = torch.compile(adamw_, dynamic=on_cpu, fullgraph=True)
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)

    def accumulate(self):
        """After each of several backward passes: add the gradients up, in float32 where there are master weights."""
        if self.mode != "fp32_master":
            return  # p.grad itself adds up
        for name, p in self.params.items():
            if p.grad is not None:
                g = plain_local(p.grad)
                self.grads[name] = self.grads[name].add_(g) if name in self.grads else g.float()
                p.grad = None

    @torch.no_grad()
    def grad_norm(self):
        """The global L2 norm of all gradients over all ranks, a float32 scalar tensor (no wait for the GPU)."""
        for name, p in self.params.items():
            if p.grad is not None:
                self.grads[name] = plain_local(p.grad)
                p.grad = None
        grads = list(self.grads.values())
        squares = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).square().sum()
        sharded = next((p for p in self.params.values() if isinstance(p, DTensor)), None)
        if sharded is not None:  # each rank has its rows; replicas (HSDP) have the same ones: do not count them twice
            dist.all_reduce(squares, group=sharded.device_mesh.get_group(sharded.device_mesh.ndim - 1))
        return squares.sqrt()

    @torch.no_grad()
    def step(self, lr, grad_norm, good=None):
        """One update of all weights, which uses the gradients up. grad_norm: from grad_norm(), to clip by.

        good: a 0-d bool tensor; False changes no weight and no moment (the step counts all the same). None: True.
        """
        cfg = self.cfg
        good = torch.ones_like(grad_norm, dtype=torch.bool) if good is None else good
        self.step_count += 1
        clip = torch.ones_like(grad_norm)
        if cfg.grad_clip > 0:
            clip = (cfg.grad_clip / (grad_norm + 1e-6)).clamp(max=1.0)
        scalar = {"dtype": torch.float32, "device": grad_norm.device}  # tensors: a float would be compiled in
        lr = torch.full((), lr, **scalar)
        debias1, debias2 = (torch.full((), (1 - beta**self.step_count) ** power, **scalar)
                            for beta, power in zip(cfg.betas, (-1, -0.5), strict=True))
        decays = {decay: torch.full((), decay, **scalar) for decay in (0.0, cfg.weight_decay)}
        for i, (name, w) in enumerate(self.weights.items()):
            if name not in self.grads:
                continue
            seed = None
            block = self.blocks.get(name)
            if self.mode == "stochastic_rounding" or block:
                bits = hash((self.seed, self.step_count, i)) & 0x7FFFFFFF  # of integers: the same in every process
                seed = torch.full((), bits, dtype=torch.int32, device=w.device)
            shape = (-1, block) if block else (-1,)
            moments = [(self.state[f"{kind}_fp8"][name].view(shape), self.state[f"{kind}_unit"][name].view(-1, 1))
                       if block else self.state[kind][name].view(shape) for kind in MOMENTS]
            tensors = [w.view(shape), self.grads.pop(name).view(shape), *moments,
                       self.state["master"][name].view(shape) if "master" in self.state else None]
            decay = decays[cfg.weight_decay if w.ndim >= 2 else 0.0]
            self.update(*tensors, lr, decay, debias1, debias2, clip, good, seed, *cfg.betas, cfg.eps,
                        self.mode != "stochastic_rounding")
