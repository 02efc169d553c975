"""FP8 training: which linear layers, how they are cast, and how weights cross GPUs.

A linear layer is three matmuls. With x (tokens, in), w (out, in) and g = dloss/dy (tokens, out):

    y      = x @ w.T      forward
    grad_x = g @ w        backward
    grad_w = g.T @ x      backward

An H100's tensor cores do each about twice as fast on 8-bit floats. There are two formats: e4m3 (3 mantissa bits, up to
448) for x and w, e5m2 (2 mantissa bits, up to 57344) for g, whose values spread wider. 448 is little, so every operand
is first multiplied by a scale that puts its largest absolute value (amax) at the format's maximum, and the product is
divided by both scales. The recipe says how many values share one scale:

    tensorwise           one scale a tensor. Fastest: the scale costs one amax pass, the matmul is cuBLAS.
    rowwise              one scale a row of each operand, a power of two, e4m3 everywhere. An outlier spoils its own
                         row only. Slower: each operand is cast twice, since the second matmul that reads it wants
                         scales along the other dimension.
    rowwise_with_gw_hp   as rowwise, but grad_w stays in bf16: two FP8 matmuls of three. Most accurate.

Scales are dynamic: computed from the very tensor that is cast, so there is no state to save, and resuming is exact.
The tensor cores want the inner dimension contiguous in both operands, so backward casts into transposed layouts, and
every dimension must be divisible by 16. The casts cost memory traffic; FP8 only pays when torch.compile fuses them
into their neighbours. torchao (`Float8Linear`) does the casts and matmuls; this file decides, wires, and checks.

Under FSDP2 weights are gathered before every use. With all-gather in FP8, each rank casts its shard first and one byte
a value crosses the wire instead of two. All ranks need one scale for the whole tensor, an all-reduce of each weight's
amax before each gather; precomputing does all of them at once after the optimizer step.

Training with fp8.enabled=True either trains in FP8, all of it as asked, or stops. `check` finds what cannot work before
any GPU time is spent; proof.py looks at what is really there and what really ran, telemetry.py at what it loses.
"""

import functools
import importlib.metadata
import logging
import math
import os
import re
from collections import Counter
from dataclasses import InitVar, dataclass, field
from typing import Literal

import torch
import torch.nn as nn
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import attention  # noqa: F401  registers two of the SAVED_OPS
from plumbing.errors import UserError

# NeMo-Automodel's documentation spells two of the keys in two ways: both set the same field, read by its first name.
ALIASES = {
    "enable_fsdp_fp8_all_gather": "enable_fsdp_float8_all_gather",
    "precompute_fp8_dynamic_scale_for_fsdp": "precompute_float8_dynamic_scale_for_fsdp",
}
# Importing torchao warns of its C++ extensions for other GPUs and of an enum of its own; nothing here uses either.
# Compiling selective recompute warns that the region must not hold in-place ops; a block holds none.
for logger in ("torchao", "torch.utils._pytree", "torch._higher_order_ops.wrap"):
    logging.getLogger(logger).setLevel(logging.ERROR)
MIN_TORCHAO = "0.18"  # patches a Triton miscompile that gave NaN (https://github.com/pytorch/ao/issues/4652)


@dataclass(kw_only=True)
class FP8Config:
    """How the linear layers compute in FP8. With enabled=False everything else here is ignored."""

    enabled: bool = False  # convert linear layers to FP8
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None  # scaling; None is tensorwise
    enable_fsdp_float8_all_gather: bool = False  # weights cross GPUs in FP8 (tensorwise only)
    precompute_float8_dynamic_scale_for_fsdp: bool = False  # one all-reduce of all scales after each optimizer step
    force_recompute_fp8_weight_in_bwd: bool = False  # keep no FP8 copy of a weight from forward to backward
    keep_casts: bool = False  # keep FP8 copies of the blocks' inputs and weights for backward, which else casts again
    filter_fqns: list[str] = field(default_factory=list)  # modules left in high precision, e.g. ["lm_head"]
    auto_filter: bool = False  # also leave out the layers that FP8 makes no faster here, timed at start-up
    grad_fast_accum: bool = False  # gradient matmuls add up in fewer bits, as forward's do: 2% faster, row-wise 10%
    emulate: bool = False  # FP8 numerics in high-precision arithmetic: any machine, no speed
    stats_interval: int = 0  # steps between measurements of what every layer's FP8 casts lose; 0: none
    self_check: bool = False  # at start-up compare compiled FP8 with eager FP8 and with no FP8, on the run's shapes
    allow_eager: bool = False  # permit FP8 on a GPU without compile (slower than bf16)
    enable_fsdp_fp8_all_gather: InitVar[bool | None] = None
    precompute_fp8_dynamic_scale_for_fsdp: InitVar[bool | None] = None

    def __post_init__(self, *aliases):
        for name, value in zip(ALIASES.values(), aliases, strict=True):
            if value is not None:
                setattr(self, name, value)

    def __setattr__(self, name, value):
        super().__setattr__(ALIASES.get(name, name), value)

    def problems(self):
        """Yield ({keys involved}, message) for each contradiction between these values (needs no GPU and no model)."""
        if not self.enabled:
            return
        if self.stats_interval < 0:
            yield {"fp8.stats_interval"}, f"fp8.stats_interval={self.stats_interval} must not be negative"
        for key in ("enable_fsdp_float8_all_gather", "keep_casts"):  # row-wise, backward casts the other way
            if getattr(self, key) and self.recipe_name not in (None, "tensorwise"):
                yield {f"fp8.{key}", "fp8.recipe_name"}, (
                    f"fp8.{key} works with the tensorwise recipe only, not with {self.recipe_name!r}: "
                    "set fp8.recipe_name=tensorwise or turn it off")
        if self.precompute_float8_dynamic_scale_for_fsdp and not self.enable_fsdp_float8_all_gather:
            yield {"fp8.precompute_float8_dynamic_scale_for_fsdp", "fp8.enable_fsdp_float8_all_gather"}, (
                "fp8.precompute_float8_dynamic_scale_for_fsdp=True has nothing to precompute without "
                "fp8.enable_fsdp_float8_all_gather=True: set both or neither")
        if self.keep_casts and self.force_recompute_fp8_weight_in_bwd:
            yield {"fp8.keep_casts", "fp8.force_recompute_fp8_weight_in_bwd"}, (
                "fp8.keep_casts=True keeps FP8 copies for backward, fp8.force_recompute_fp8_weight_in_bwd=True "
                "keeps none: turn one of the two off")
        for key, about in (("grad_fast_accum", "how tensor cores add up, and emulated FP8 adds up in float32"),
                           ("auto_filter", "which layers FP8 makes faster, and emulated FP8 makes none")):
            if getattr(self, key) and self.emulate:
                yield {f"fp8.{key}", "fp8.emulate"}, f"fp8.{key}=True is about {about}: turn it or fp8.emulate off"


@dataclass(kw_only=True)
class CompileConfig:
    """torch.compile of each transformer block and of the loss. With enabled=False everything else here is ignored."""

    enabled: bool = False  # compile, the optimizer's update too, which has options of its own
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"  # torch's
    fullgraph: bool = False  # a graph break is an error
    dynamic: bool | None = False  # None lets torch.compile decide after a recompile


# ----------------------------------------------------------------------------------------------------------------
# 1) before: what cannot work


def is_filtered(fqn, filter_fqns):
    """Whether an entry of filter_fqns names module `fqn`: whole dotted parts, so layers.1 is not layers.10."""
    return any(f".{entry}." in f".{fqn}." for entry in filter_fqns)


def check(cfg, model, *, device, compiled, shards, tokens, loss_chunks=1):
    """Raise one UserError that lists everything which keeps this model from training in FP8 as asked.

    cfg: an enabled FP8Config. model: may still be on the meta device. shards: ranks that each weight is cut over by
    FSDP2; 0: it is off. tokens: of a forward pass on a rank; lm_head takes them in loss_chunks equal pieces.
    """
    problems = [message for _, message in cfg.problems()]
    try:
        installed = importlib.metadata.version("torchao")
        if TorchVersion(installed) < MIN_TORCHAO:
            problems.append(f"fp8 needs torchao {MIN_TORCHAO} or newer, {installed} is installed: "
                            f"pip install 'torchao>={MIN_TORCHAO}'")
    except importlib.metadata.PackageNotFoundError:
        problems.append(f"fp8 needs torchao, which is not installed: pip install 'torchao>={MIN_TORCHAO}'")
    if not cfg.emulate:
        if device.type != "cuda":
            problems.append(f"fp8 needs a GPU of compute capability 8.9 or newer, this run is on the {device.type}: "
                            "set fp8.emulate=True for the same numerics without the speed")
        elif (capability := torch.cuda.get_device_capability(device)) < (8, 9):
            problems.append(f"fp8 needs compute capability 8.9 or newer, {torch.cuda.get_device_name(device)} has "
                            f"{capability[0]}.{capability[1]}: set fp8.emulate=True, or fp8.enabled=False")
        elif not compiled and not cfg.allow_eager:
            problems.append("fp8 without compile is slower than bf16: set compile.enabled=True, or "
                            "fp8.allow_eager=True if that is what you want")

    linears = {fqn: m for fqn, m in model.named_modules() if isinstance(m, nn.Linear)}
    for entry in cfg.filter_fqns:
        if not any(is_filtered(fqn, [entry]) for fqn in linears):
            problems.append(f"fp8.filter_fqns entry {entry!r} matches no linear layer: the names here are "
                            + ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".0.", fqn) for fqn in linears)))
    converted = {fqn: m for fqn, m in linears.items() if not is_filtered(fqn, cfg.filter_fqns)}
    if not converted:
        problems.append(f"fp8.filter_fqns={cfg.filter_fqns} leaves no linear layer to convert: "
                        "remove an entry, or set fp8.enabled=False")
    if compiled and (off := [v for v in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE") if os.environ.get(v) == "1"]):
        problems.append(f"compile.enabled=True compiles nothing while {off[0]}=1 is in the environment: unset it")
    own = dict.fromkeys(re.sub(r"^layers\.\d+\.", "", fqn) for fqn, m in converted.items() if type(m) is not nn.Linear)
    if own:
        problems.append("fp8 would replace the forward of subclasses of nn.Linear, add these to fp8.filter_fqns: "
                        + ", ".join(own))
    bad = dict.fromkeys(re.sub(r"^layers\.\d+\.", "", f"{fqn} {tuple(m.weight.shape)}")
                        for fqn, m in converted.items() if any(n % 16 for n in m.weight.shape))
    if bad:
        problems.append("fp8 matmuls need sizes divisible by 16, or add these to fp8.filter_fqns: " + ", ".join(bad))
    for n in {tokens, tokens // loss_chunks if "lm_head" in converted else tokens}:
        if n % 16:
            problems.append("fp8 matmuls need the tokens per forward pass and loss chunk to be divisible by 16, not "
                            f"{n}: set model.block_size or data.packed_sequence_size, micro_batch_size or loss_chunks")
    if cfg.enable_fsdp_float8_all_gather and shards:
        others = Counter(id(p) for m in model.modules() if not isinstance(m, nn.Linear) for p in m.parameters(False))
        tied = [fqn for fqn, m in converted.items() if id(m.weight) in others]
        if tied:
            problems.append("fp8 all-gather would untie weights that are shared with another module, add these to "
                            "fp8.filter_fqns: " + ", ".join(tied))
        uneven = [f"{fqn} ({m.weight.shape[0]} rows)" for fqn, m in converted.items() if m.weight.shape[0] % shards]
        if uneven:
            # https://github.com/pytorch/ao/issues/3982
            problems.append(f"fp8 all-gather needs rows that divide evenly over {shards} shards, add these to "
                            "fp8.filter_fqns: " + ", ".join(uneven))
    if problems:
        raise UserError("\n".join(problems))


# ----------------------------------------------------------------------------------------------------------------
# 2) conversion


def convert(model, cfg, *, shards):
    """Replace the linear layers that cfg does not filter by torchao's Float8Linear, in place.

    Before fully_shard, on the meta device. shards > 0 with all-gather asked for: weights become GatherInFP8.
    """
    from torchao.float8 import Float8GemmConfig, Float8LinearConfig, convert_to_float8_training

    recipe = cfg.recipe_name or "tensorwise"
    config = Float8LinearConfig.from_recipe_name(recipe)
    sums = Float8GemmConfig(use_fast_accum=cfg.grad_fast_accum)
    for name, value in dict(emulate=cfg.emulate, gemm_config_grad_input=sums, gemm_config_grad_weight=sums).items():
        object.__setattr__(config, name, value)  # frozen, and from_recipe_name takes no such arguments
    if recipe == "rowwise":
        # else NaN: https://github.com/pytorch/pytorch/issues/150859
        torch._inductor.config.emulate_precision_casts = True
    expected = [fqn for fqn, m in model.named_modules()
                if isinstance(m, nn.Linear) and not is_filtered(fqn, cfg.filter_fqns)]
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, fqn: fqn in expected)
    found = float8_linears(model)
    assert list(found) == expected, f"torchao converted {len(found)} layers, expected {len(expected)}"
    if cfg.enable_fsdp_float8_all_gather and shards:
        for linear in found.values():
            wrapper = gather_in_fp8()
            weight = wrapper(linear.weight, linear.linear_mm_config, config.cast_config_weight.target_dtype)
            linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)


def float8_linears(model):
    """The converted layers of a model by name."""
    from torchao.float8.float8_linear import Float8Linear

    return {fqn: m for fqn, m in model.named_modules() if isinstance(m, Float8Linear)}


def cast_to_fp8(x, scale, dtype):
    """x * scale, saturated at the format's maximum, in FP8; float32 inside, as torchao casts."""
    limit = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-limit, limit).to(dtype)


@functools.cache
def gather_in_fp8():
    """The weight class that FSDP2 gathers in FP8 (built on first use, so that bf16 runs need no torchao)."""
    from torchao.float8.float8_utils import amax_to_scale
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    # FSDP2 calls fsdp_pre_all_gather outside of the compiled blocks. Eager, the cast passes over the shard four times
    # and cost 12% of a step on an H100; compiled, once.
    compiled_cast = torch.compile(cast_to_fp8, dynamic=True)

    class GatherInFP8(WeightWithDynamicFloat8CastTensor):
        """A weight shard that is cast to FP8 just before each all-gather; torchao's class with three repairs.

        The cast is compiled on a GPU; the amax is one pass (torchao: abs, then max); and the precomputed scale
        survives flatten and unflatten (torchao loses it: a getattr on a dict).
        """

        @classmethod
        def __torch_dispatch__(cls, func, types, args, kwargs=None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            return tree_map_only(WeightWithDynamicFloat8CastTensor,
                                 lambda t: cls(t._tensor, t._linear_mm_config, t._dtype, t._precomputed_scale), out)

        def __tensor_flatten__(self):
            names = ["_tensor"] if self._precomputed_scale is None else ["_tensor", "_precomputed_scale"]
            return names, (self._linear_mm_config, self._dtype)

        @classmethod
        def __tensor_unflatten__(cls, inner, meta, outer_size, outer_stride):
            return cls(inner["_tensor"], *meta, inner.get("_precomputed_scale"))

        def fsdp_pre_all_gather(self, mesh):
            scale = self._precomputed_scale
            if scale is None:
                amax = torch.linalg.vector_norm(self._tensor, math.inf)
                torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=mesh.get_group())
                scale = amax_to_scale(amax, self._dtype)
            cast = compiled_cast if self._tensor.is_cuda else cast_to_fp8
            return (cast(self._tensor, scale, self._dtype),), (scale,)

    torch.serialization.add_safe_globals([GatherInFP8])
    return GatherInFP8


def precompute_scales(model, cfg, *, shards):
    """After every change of the weights: the scales of all gathered FP8 weights with one all-reduce."""
    if cfg.enabled and cfg.precompute_float8_dynamic_scale_for_fsdp and shards:
        from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

        precompute_float8_dynamic_scale_for_fsdp(model)


# ----------------------------------------------------------------------------------------------------------------
# 3) compile and recompute

# Worth their memory in selective recompute: outputs of tensor cores, and `max`, the scale's source, one number. Never
# `abs`: it would keep an unsharded weight (https://github.com/pytorch/torchtitan/pull/820).
SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.nanofp8.flash4.default,
    torch.ops.aten.max.default,
}


def compile_and_checkpoint(model, cfg, compile_cfg, activation_checkpoint):
    """Wrap each block's forward, and the loss, in recompute and torch.compile, in place; parameter names stay.

    Per block: all blocks have the same shapes, so the one graph serves every layer and compiling takes seconds
    instead of minutes, and FSDP2's hooks, which run around forward, stay outside of the graphs.
    activation_checkpoint: "none" keeps what backward wants; "selective" keeps matmul and attention outputs and
    recomputes the cheap rest; "full" keeps only the block's input. Two keys of cfg decide on FP8 copies (save_or_not).
    """
    # In 2.11 the fusion of row and column reductions makes RMSNorm's backward, with the transposing FP8 cast that it
    # then pulls in, one kernel of 0.65 ms; apart they take 0.35 (Llama-8B shapes, H100).
    torch._inductor.config.triton.mix_order_reduction = False
    options = dict(mode=compile_cfg.mode, fullgraph=compile_cfg.fullgraph, dynamic=compile_cfg.dynamic)
    selective = activation_checkpoint == "selective"
    policy = functools.partial(save_or_not, selective, cfg.enabled and cfg.keep_casts)
    for block in model.layers:
        forward = block.forward
        if activation_checkpoint == "full":
            forward = recompute(forward)
        elif selective or cfg.enabled and (cfg.keep_casts or cfg.force_recompute_fp8_weight_in_bwd):
            forward = recompute(forward, policy, eager=selective)
        block.forward = torch.compile(forward, **options) if compile_cfg.enabled else forward
    if compile_cfg.enabled:
        model.head_loss = torch.compile(model.head_loss, **options)


def recompute(forward, policy=None, eager=True):
    """`forward` with its intermediates recomputed in backward, but for the ops that `policy` saves.

    eager: also where it is not compiled. For FP8 copies alone it must not: torchao keeps none then, and what else the
    policy saves would be views of weights that FSDP2 frees.
    """
    context = {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)} if policy else {}

    def checkpointed(*args):
        if not eager and not torch.compiler.is_compiling():
            return forward(*args)
        # nothing here draws random numbers, and their state cannot be read while a CUDA graph is recorded
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **context)

    return checkpointed


def save_or_not(selective, keep_casts, ctx, op, *args, **kwargs):
    """The CheckpointPolicy of an op: FP8 copies and transposed views by keep_casts, all others by `selective`."""
    if op is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (torch.float8_e4m3fn, torch.float8_e5m2):
        return CheckpointPolicy.MUST_SAVE if keep_casts else CheckpointPolicy.MUST_RECOMPUTE
    if not (selective or keep_casts) and op is torch.ops.aten.t.default:
        return CheckpointPolicy.MUST_RECOMPUTE  # free; else a transposed copy of what FSDP2 gathers in FP8 is kept
    if not selective:
        return CheckpointPolicy.PREFER_SAVE
    return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE
