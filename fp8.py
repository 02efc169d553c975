"""FP8 training: which linear layers, how they are cast, and how weights cross GPUs.

A linear layer is three matmuls. With x (tokens, in), w (out, in) and g = dloss/dy (tokens, out):

    y      = x @ w.T      forward
    grad_x = g @ w        backward
    grad_w = g.T @ x      backward

An H100's tensor cores do each about twice as fast on 8-bit floats. There are two formats: e4m3 (3 mantissa bits, up to
448) for x and w, e5m2 (2 mantissa bits, up to 57344) for g, whose values spread wider. 448 is little, so every operand
is first multiplied by a scale that puts its largest absolute value (amax) at the format's maximum, and the product is
divided by both scales. The recipe, a row of `RECIPES`, says for each matmul how many values share one scale and which
formats its operands have; `fp8.recipes` gives single layers a recipe of their own.

"tensor" is one scale for the whole operand: the fastest, since a scale costs one amax pass and the matmul is cuBLAS's.
"row" is one scale, a power of two, for each row along the contraction. An outlier then spoils its own row only, but an
operand is cast once for each matmul that reads it, because they contract different dimensions. "block" is one for each
128 values of a row, "tile" one for 128 x 128 of a weight: DeepSeek-V3's recipe, whose casts and matmuls are ours
(plumbing/blockwise.py). torchao (`Float8Linear`) does the others; this file decides, wires, and checks.

Scales are dynamic: computed from the tensor that is cast, so there is no state to save and resuming is exact.
The tensor cores want the inner dimension contiguous in both operands, so backward casts into transposed layouts, and
every dimension must be divisible by 16. The casts cost memory traffic; FP8 only pays when torch.compile fuses them
into their neighbours.

Under FSDP2 weights are gathered before every use. With all-gather in FP8, each rank casts its shard first and one byte
a value crosses the wire instead of two. The ranks need one scale for the whole tensor, so each gather takes an
all-reduce of the weight's amax first; precomputing does all of them in one all-reduce after the optimizer step. Shards
of whole blocks have scales of their own, which are gathered with the values.

Training with fp8.enabled=True either trains in FP8, exactly as configured, or stops: `check` fails before any slow
step, checks/proof.py verifies what was converted and what ran, checks/telemetry.py measures what FP8 loses.
"""

import functools
import importlib.metadata
import logging
import os
from collections import defaultdict
from dataclasses import InitVar, dataclass, field, replace
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
from torch.torch_version import TorchVersion

import model as models
from plumbing import blockwise
from plumbing.errors import RunStopped, UserError
from plumbing.schema import Natural

# NeMo-Automodel's documentation spells two of the keys in two ways. Both set the same field.
ALIASES = {
    "enable_fsdp_fp8_all_gather": "enable_fsdp_float8_all_gather",
    "precompute_fp8_dynamic_scale_for_fsdp": "precompute_float8_dynamic_scale_for_fsdp",
}
# torchao warns at import about C++ extensions and an enum that nothing here uses; compiling selective recompute warns
# about in-place ops in the region, and a block has none.
for logger in ("torchao", "torch.utils._pytree", "torch._higher_order_ops.wrap"):
    logging.getLogger(logger).setLevel(logging.ERROR)
MIN_TORCHAO = "0.18"  # patches a Triton miscompile that gave NaN (https://github.com/pytorch/ao/issues/4652)


class Cast(NamedTuple):
    scaling: Literal["tensor", "row", "block", "tile"]  # how many values share one scale
    dtype: torch.dtype


@dataclass(frozen=True)
class Recipe:
    """How a linear layer computes: for each matmul the casts of its two operands, None for high precision."""

    output: tuple[Cast, Cast] | None  # input @ weight.T
    grad_input: tuple[Cast, Cast] | None  # grad_output @ weight
    grad_weight: tuple[Cast, Cast] | None  # grad_output.T @ input
    gather_rows: int = 0  # shards of a multiple of so many rows can be cast before the all-gather; 0: no shard can
    keep_casts: bool = False  # backward reads the casts that forward makes
    multiple: int = 16  # must divide every dimension of its matmuls
    capability: int | None = None  # the only GPUs that compute it, by the first number of their compute capability
    inductor: tuple[str, ...] = ()  # switches of torch._inductor.config that it needs

    @property
    def fp8_matmuls(self):
        """The names of the matmuls that run in FP8."""
        return [name for name in ("output", "grad_input", "grad_weight") if getattr(self, name)]

    @property
    def scalings(self):
        """Of its casts: "block" makes layers ours instead of torchao's, "row" makes all scales powers of two."""
        return {cast.scaling for name in self.fp8_matmuls for cast in getattr(self, name)}


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TENSOR, ROW, BLOCK, TILE = (Cast(scaling, E4M3) for scaling in ("tensor", "row", "block", "tile"))
TENSOR_E5M2 = Cast("tensor", E5M2)
RECIPES = {  # operands of y = x @ w.T, grad_x = g @ w and grad_w = g.T @ x
    "tensorwise": Recipe((TENSOR, TENSOR), (TENSOR_E5M2, TENSOR), (TENSOR_E5M2, TENSOR),
                         gather_rows=1, keep_casts=True),
    "tensorwise_with_gw_hp": Recipe((TENSOR, TENSOR), (TENSOR_E5M2, TENSOR), None, gather_rows=1, keep_casts=True),
    # neither gathered in FP8 nor kept: backward reads the weight in high precision
    "tensorwise_forward": Recipe((TENSOR, TENSOR), None, None),
    # without the switch, NaN: https://github.com/pytorch/pytorch/issues/150859
    "rowwise": Recipe((ROW, ROW), (ROW, ROW), (ROW, ROW), inductor=("emulate_precision_casts",)),
    "rowwise_with_gw_hp": Recipe((ROW, ROW), (ROW, TENSOR), None),
    "blockwise": Recipe((BLOCK, TILE), (BLOCK, TILE), (BLOCK, BLOCK), gather_rows=128, keep_casts=True, multiple=128,
                        capability=blockwise.CAPABILITY),
}


@dataclass(kw_only=True)
class FP8Config:
    """How the linear layers compute in FP8. With enabled=False the other keys are ignored."""

    enabled: bool = False  # convert linear layers to FP8
    recipe_name: Literal[tuple(RECIPES)] | None = None  # scaling; None is tensorwise
    enable_fsdp_float8_all_gather: bool = False  # weights cross GPUs in FP8 (not with row-wise recipes)
    precompute_float8_dynamic_scale_for_fsdp: bool = False  # one all-reduce of all scales after each optimizer step
    force_recompute_fp8_weight_in_bwd: bool = False  # keep no FP8 copy of a weight from forward to backward
    keep_casts: bool = False  # backward reads the casts of forward; weights are cast once a step, not once a pass
    offload_weights: bool = False  # weights that are cast once a step are in host memory, as optim.offload says
    recipes: dict[str, Literal[tuple(RECIPES)] | None] = field(
        default_factory=dict)  # of single modules, e.g. {"layers.0": None}; None: high precision; the last match counts
    filter_fqns: list[str] = field(default_factory=list)  # modules left in high precision, e.g. ["lm_head"]
    auto_filter: bool = False  # time the layers at start-up and leave those that FP8 does not speed up in bf16
    grad_fast_accum: bool = False  # fast accumulation in backward matmuls, as in forward: 2% faster, row-wise 10%
    emulate: bool = False  # FP8 numerics in high-precision arithmetic: any machine, no speed
    stats_interval: Natural = 0  # measure what the FP8 casts of every layer lose every N steps; 0: never
    self_check: bool = False  # at start-up compare compiled FP8 with eager bf16; torch 2.14, blockwise: always
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
        """Yield a message for each contradiction between these values, with the keys involved."""
        if not self.enabled:
            return
        if self.precompute_float8_dynamic_scale_for_fsdp and not self.enable_fsdp_float8_all_gather:
            yield ("fp8.precompute_float8_dynamic_scale_for_fsdp=True has nothing to precompute without "
                   "fp8.enable_fsdp_float8_all_gather=True: set both or neither")
        if self.offload_weights and not self.keep_casts:
            yield "fp8.offload_weights=True needs fp8.keep_casts=True: passes read the casts, not the weights"
        for key, other, reason in (
                ("keep_casts", "force_recompute_fp8_weight_in_bwd", "one keeps FP8 copies for backward, one none"),
                ("grad_fast_accum", "emulate", "emulated FP8 accumulates in float32, not in tensor cores"),
                ("auto_filter", "emulate", "emulated FP8 makes no layer faster")):
            if getattr(self, key) and getattr(self, other):
                yield f"fp8.{key}=True contradicts fp8.{other}=True ({reason}): turn one of the two off"

    @property
    def copies(self):
        """What backward does with forward's FP8 copies: fp8_copies of plumbing/compiling.py."""
        if self.enabled and self.keep_casts:
            return "keep"
        return "drop" if self.enabled and self.force_recompute_fp8_weight_in_bwd else None


def recipe_of(fqn, cfg):
    """The name of the recipe in RECIPES that linear layer `fqn` computes with; None for high precision."""
    name = cfg.recipe_name or "tensorwise"
    for entry, recipe in [*dict.fromkeys(cfg.filter_fqns).items(), *cfg.recipes.items()]:
        if matches(fqn, entry):
            name = recipe
    return name if cfg.enabled else None


def linear_layers(model):
    """{name: layer} of a model's linear layers, whatever their precision."""
    return {fqn: m for fqn, m in model.named_modules() if isinstance(m, nn.Linear)}


def float8_linears(model):
    """{name: layer} of the linear layers that are converted."""
    return {fqn: m for fqn, m in linear_layers(model).items() if hasattr(m, "recipe")}


def matches(fqn, entry):
    """Whether an entry of filter_fqns or recipes names module `fqn`, by whole parts: layers.1 is not layers.10."""
    return f".{entry}." in f".{fqn}."


def leave_out(cfg, names):
    """A copy of an FP8Config with the named modules in high precision, whatever its other entries say."""
    others = {entry: recipe for entry, recipe in cfg.recipes.items() if entry not in names}
    return replace(cfg, recipes={**others, **dict.fromkeys(names)})


# ----------------------------------------------------------------------------------------------------------------
# 1) checks before any slow step


def check(cfg, model, *, device, compiled, shards, tokens=None, loss_chunks=1):
    """Raise one UserError with everything that keeps this model from training in FP8 as configured.

    cfg: an enabled FP8Config. model: may be on the meta device. shards: ranks that FSDP2 shards each weight over; 0:
    FSDP2 is off. tokens: of a forward pass on a rank, None: not known yet; lm_head takes them in loss_chunks pieces.
    """
    errors = list(cfg.problems())
    install = f"pip install 'torchao>={MIN_TORCHAO}'"
    try:
        installed = importlib.metadata.version("torchao")
        if TorchVersion(installed) < MIN_TORCHAO:
            errors.append(f"fp8 needs torchao {MIN_TORCHAO} or newer, {installed} is installed: {install}")
    except importlib.metadata.PackageNotFoundError:
        errors.append(f"fp8 needs torchao, which is not installed: {install}")
    for variable in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if compiled and os.environ.get(variable) == "1":
            errors.append(f"compile.enabled=True compiles nothing while {variable}=1 is in the environment: unset it")

    linears = linear_layers(model)
    for key, entries in (("filter_fqns", cfg.filter_fqns), ("recipes", cfg.recipes)):
        errors += [f"fp8.{key} entry {entry!r} matches no linear layer: the names here are "
                   + ", ".join(dict.fromkeys(map(models.layer_kind, linears)))
                   for entry in entries if not any(matches(fqn, entry) for fqn in linears)]
    names = {fqn: name for fqn in linears if (name := recipe_of(fqn, cfg))}
    recipes, used = {fqn: RECIPES[name] for fqn, name in names.items()}, list(dict.fromkeys(names.values()))
    if not recipes:
        errors.append("fp8.filter_fqns and fp8.recipes leave no linear layer to convert: remove an entry of one")
    if not cfg.emulate and device.type != "cuda":
        errors.append(f"fp8 needs a GPU of compute capability 8.9 or newer, this run is on the {device.type}: "
                      "set fp8.emulate=True for the same numerics without the speed")
    elif not cfg.emulate:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            errors.append(f"fp8 needs compute capability 8.9 or newer, {torch.cuda.get_device_name(device)} has "
                          f"{major}.{minor}: set fp8.emulate=True, or fp8.enabled=False")
        elif not compiled and not cfg.allow_eager:
            errors.append("fp8 without compile is slower than bf16: set compile.enabled=True or fp8.allow_eager=True")
        errors += [f"recipe {name} needs a GPU of compute capability {RECIPES[name].capability}.x, this one has "
                   f"{major}.x: choose another recipe, or set fp8.emulate=True"
                   for name in used if RECIPES[name].capability not in (None, major)]
    all_gather = "enable_fsdp_float8_all_gather", "precompute_float8_dynamic_scale_for_fsdp"
    for ability, keys in (("gather_rows", all_gather), ("keep_casts", ("keep_casts",))):
        asked = " and ".join(f"fp8.{key}=True" for key in keys if getattr(cfg, key))
        if asked and recipes and not any(getattr(recipe, ability) for recipe in recipes.values()):
            able = " or ".join(name for name, recipe in RECIPES.items() if getattr(recipe, ability))
            errors.append(f"{asked} is for the {able} recipe only, and the layers here have {', '.join(used)}: turn "
                          "that off, or change fp8.recipe_name or fp8.recipes")

    if tokens is not None:
        pieces = {(tokens // models.calls_per_pass(fqn, loss_chunks), recipe.multiple)
                  for fqn, recipe in recipes.items()}
        errors += [f"fp8 matmuls need the tokens per forward pass and loss chunk to be divisible by {multiple}, not "
                   f"{n}: set model.block_size or data.packed_sequence_size, micro_batch_size or loss_chunks"
                   for n, multiple in sorted(pieces) if n % multiple]
    refused = defaultdict(dict)  # {reason: {kind of layer: its shape}}
    others = {id(p) for m in model.modules() if not isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
    for fqn, recipe in recipes.items():
        linear, name, shape = linears[fqn], names[fqn], tuple(linears[fqn].weight.shape)
        in_fp8 = gathers(name, cfg, shards)
        for reason, applies in {
            f"fp8 replaces the forward of a layer, so it takes nn.Linear itself, not {type(linear).__name__}":
                type(linear) is not nn.Linear,
            f"fp8 matmuls ({name}) need sizes divisible by {recipe.multiple}": any(n % recipe.multiple for n in shape),
            "fp8 all-gather would untie weights that are shared with another module":
                in_fp8 and id(linear.weight) in others,
            # https://github.com/pytorch/ao/issues/3982
            f"fp8 all-gather needs rows that divide evenly over {shards} shards, in units of {recipe.gather_rows}":
                in_fp8 and shape[0] % (shards * recipe.gather_rows),
        }.items():
            if applies:
                refused[reason][models.layer_kind(fqn)] = shape
    for reason, kinds in refused.items():
        left_out = f"fp8.filter_fqns={[*cfg.filter_fqns, *kinds]}"
        if cfg.recipes:  # they would count, not filter_fqns
            left_out = f"fp8.recipes={cfg.recipes | dict.fromkeys(kinds)}"
        found = ", ".join(f"{kind} {shape}" for kind, shape in kinds.items())
        errors.append(f"{reason}: {found}. Change that, or leave these layers out: {left_out}")
    if errors:
        raise UserError("\n".join(errors))


# ----------------------------------------------------------------------------------------------------------------
# 2) conversion


@functools.cache  # one object for all layers of a recipe, on which compiled blocks guard
def torchao_config(recipe, emulate, grad_fast_accum):
    """The Float8LinearConfig that computes what a Recipe says."""
    from torchao.float8.config import CastConfig, Float8GemmConfig, Float8LinearConfig, ScalingGranularity, ScalingType

    names = {"output": ("input", "weight"), "grad_input": ("grad_output", "weight_for_grad_input"),
             "grad_weight": ("grad_output_for_grad_weight", "input_for_grad_weight")}
    granularity = {"tensor": ScalingGranularity.TENSORWISE, "row": ScalingGranularity.AXISWISE}
    casts, gradient = {}, recipe.grad_input or recipe.grad_weight
    for matmul, operands in names.items():
        for operand, cast in zip(operands, getattr(recipe, matmul) or (None, None), strict=True):
            if cast is None:  # torchao wants the dtype of the tensor's other cast here too
                dtype = gradient[0].dtype if gradient and operand.startswith("grad_output") else E4M3
                config = CastConfig(scaling_type=ScalingType.DISABLED, target_dtype=dtype)
            else:
                config = CastConfig(scaling_granularity=granularity[cast.scaling], target_dtype=cast.dtype)
            casts[f"cast_config_{operand}"] = config
    accumulation = Float8GemmConfig(use_fast_accum=grad_fast_accum)
    return Float8LinearConfig(**casts, gemm_config_grad_input=accumulation, gemm_config_grad_weight=accumulation,
                              emulate=emulate, round_scales_to_power_of_2="row" in recipe.scalings)


def convert(model, cfg, *, shards, accumulation=1):
    """Replace linear layers by FP8 layers, in place, each with the recipe that recipe_of says, its name as `.recipe`.

    Call it before fully_shard, on the meta device. shards: as for check(). accumulation: passes per step.
    """
    from torch._inductor.codegen.triton import TritonOverrides
    from torchao.float8 import convert_to_float8_training

    from plumbing import fp8_weights

    for fqn, layer in linear_layers(model).items():
        name = recipe_of(fqn, cfg)
        if name is None:
            continue
        recipe = RECIPES[name]
        if "block" in recipe.scalings:
            layer.__class__, layer.keep_casts, layer.emulate = blockwise.BlockwiseLinear, cfg.keep_casts, cfg.emulate
            weight_class, mm_config = fp8_weights.GatherInBlocks, None
        else:
            config = torchao_config(recipe, cfg.emulate, cfg.grad_fast_accum)
            layer = convert_to_float8_training(layer, config=config)
            # torchao's patch of Inductor (MIN_TORCHAO) does not say so where it finds nothing to patch
            if not cfg.emulate and "PropagateNan" in TritonOverrides.maximum("a", "b"):
                raise RunStopped(f"torchao {importlib.metadata.version('torchao')} cannot work around a Triton bug in "
                                 f"torch {torch.__version__}, which makes FP8 values NaN: install the versions in "
                                 "requirements.txt")
            weight_class, mm_config = fp8_weights.GatherInFP8, layer.linear_mm_config
            if casts_once(name, cfg, shards, accumulation):
                layer.__class__ = fp8_weights.CastOnce  # one cast serves all passes of a step
        if gathers(name, cfg, shards):
            weight = weight_class(layer.weight, mm_config, recipe.output[1].dtype)
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        layer.recipe = name
        model.set_submodule(fqn, layer)
        for switch in recipe.inductor:
            setattr(torch._inductor.config, switch, True)


def gathers(name, cfg, shards):
    """Whether layers with recipe `name` (None: high precision) have their weights gathered in FP8."""
    return bool(cfg.enable_fsdp_float8_all_gather and shards and name and RECIPES[name].gather_rows)


def casts_once(name, cfg, shards, accumulation):
    """Whether layers with recipe `name` (None: high precision) cast their weights once for all passes of a step."""
    return bool(name and cfg.keep_casts and RECIPES[name].keep_casts and "block" not in RECIPES[name].scalings
                and accumulation > 1 and not shards)


def weight_casts(model):
    """{name of a weight: the function that renews its cast, given its values} of layers that cast once a step."""
    return {f"{fqn}.weight": m.cast_weight for fqn, m in float8_linears(model).items() if hasattr(m, "cast_weight")}


@torch.no_grad()
def prepare_weights(model, cfg, *, shards):
    """Compute what the passes of one step share of the FP8 weights. Call it whenever weights change."""
    if cfg.enabled and cfg.precompute_float8_dynamic_scale_for_fsdp and shards:
        from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

        precompute_float8_dynamic_scale_for_fsdp(model)  # one all-reduce for the scales of all weights
    for name, cast in weight_casts(model).items():
        weight = model.get_parameter(name)
        if not hasattr(weight, "on_host"):  # else AdamW casts what it updates
            cast(weight)
