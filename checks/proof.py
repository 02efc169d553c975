"""What runs in FP8, and the proof before the first step that it does, as configured, with the right results."""

import math
from collections import Counter
from dataclasses import replace

import torch
from torch.distributed.fsdp import FSDPModule
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import fp8
import model as models
from checks import telemetry
from plumbing import blockwise
from plumbing.compiling import compile_and_checkpoint
from plumbing.errors import RunStopped
from plumbing.sharding import local_shard


def covered_flops(model):
    """FLOPs per token of the matmuls that run in FP8, forward and backward."""
    return sum(2 * len(fp8.RECIPES[m.recipe].fp8_matmuls) * m.weight.numel()
               for m in fp8.float8_linears(model).values())


def table(model, cfg, flops_share, *, shards):
    """The report on a converted model: a line per kind of layer and recipe, then how much of the model FP8 covers.

    cfg: without what auto_filter chose. flops_share: covered_flops over all matmul FLOPs, attention included.
    """
    converted, rows = fp8.float8_linears(model), Counter()
    gathers_fp8 = cfg.enable_fsdp_float8_all_gather and shards
    for fqn, m in fp8.linear_layers(model).items():
        kind, dtype = models.layer_kind(fqn), str(m.weight.dtype).removeprefix("torch.")
        if fqn in converted:
            recipe, precision = fp8.RECIPES[m.recipe], f"fp8 {m.recipe}" + (" (emulated)" if cfg.emulate else "")
            if gathers_fp8 and not recipe.gather_rows:
                precision += f", gathered in {dtype}"
            if cfg.keep_casts and not recipe.keep_casts:
                precision += ", casts not kept"
            if cfg.grad_fast_accum and ("block" in recipe.scalings or recipe.fp8_matmuls == ["output"]):
                precision += ", grad_fast_accum has no effect"
        elif fp8.recipe_of(fqn, cfg):
            precision = f"{dtype}: fp8.auto_filter"
        elif any(fp8.matches(fqn, entry) for entry in cfg.filter_fqns):
            precision = f"{dtype}: fp8.filter_fqns"
        else:
            precision = f"{dtype}: fp8.recipes"
        rows[fqn if kind == fqn else f"layers.*.{kind}", tuple(m.weight.shape), precision] += 1
    covered = sum(m.weight.numel() for m in converted.values()) / sum(p.numel() for p in model.parameters())
    gather = "high precision" if shards else "nothing to do, one rank holds whole weights"
    if gathers_fp8:
        gather = "fp8"
        if cfg.precompute_float8_dynamic_scale_for_fsdp:
            precomputes = any(fp8.RECIPES[m.recipe].gather_rows == 1 for m in converted.values())
            gather += ", scales precomputed" if precomputes else ": blocks have nothing to precompute"
    return "\n".join([
        f"fp8: {len(converted)} of {sum(rows.values())} linear layers converted",
        *(f"  {name:<22} {str(shape):<16} x{n:<4} {precision}" for (name, shape, precision), n in rows.items()),
        f"  covers {covered:.1%} of parameters, {flops_share:.1%} of matmul FLOPs",
        f"  all-gather: {gather}"])


def verify_sharded(model, cfg, *, shards):
    """After sharding and loading: RunStopped unless each layer has the recipe that cfg says, set up to gather."""
    converted, problems = fp8.float8_linears(model), []
    for fqn in fp8.linear_layers(model):
        asked, found = fp8.recipe_of(fqn, cfg), converted[fqn].recipe if fqn in converted else None
        if asked != found:
            problems.append(f"{fqn} has {found or 'high precision'} instead of {asked or 'high precision'}")
        elif fp8.gathers(found, cfg, shards):
            weight = local_shard(converted[fqn].weight)
            if not hasattr(weight, "fsdp_pre_all_gather"):
                problems.append(f"{fqn} would be gathered in high precision")
            elif (cfg.precompute_float8_dynamic_scale_for_fsdp and weight._precomputed_scale is None
                  and "block" not in fp8.RECIPES[found].scalings):
                problems.append(f"{fqn} has no precomputed scale")
    if problems:
        raise RunStopped(f"these layers are not in fp8 as configured: {', '.join(problems)}")


class CountFloat8Matmuls(TorchDispatchMode):
    """Counts matmuls with FP8 operands as needed_matmuls does. For emulated FP8, which ends in a plain mm."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torchao.float8.float8_training_tensor import Float8TrainingTensor

        if func is torch.ops.aten.mm.default and any(isinstance(a, Float8TrainingTensor) for a in args):
            by_row = any(a._scale.numel() > 1 for a in args)
            self.seen[tuple(args[0].shape), tuple(args[1].shape), "row" if by_row else "tensor"] += 1
        elif func is blockwise.MATMUL:
            self.seen[tuple(args[0].shape), tuple(args[1].shape), "block"] += 1
        return func(*args, **(kwargs or {}))


def needed_matmuls(model, cfg, tokens, loss_chunks):
    """{(shapes of the two operands, scaling): number of such FP8 matmuls} in a forward and backward pass."""
    needed = Counter()
    for fqn, m in fp8.float8_linears(model).items():
        n_out, n_in = m.weight.shape
        calls = models.calls_per_pass(fqn, loss_chunks)
        t = tokens // calls
        shapes = {"output": ((t, n_in), (n_in, n_out)), "grad_input": ((t, n_out), (n_out, n_in)),
                  "grad_weight": ((n_out, t), (t, n_in))}
        for matmul in fp8.RECIPES[m.recipe].fp8_matmuls:
            casts = getattr(fp8.RECIPES[m.recipe], matmul)
            scaling = "row" if any(cast.scaling == "row" for cast in casts) else casts[0].scaling
            # without fast accumulation, torchao multiplies the product by row-wise scales itself
            if scaling == "row" and not cfg.emulate and matmul != "output" and not cfg.grad_fast_accum:
                scaling = "tensor"
            needed[*shapes[matmul], scaling] += calls  # of a square layer, output and grad_input have the same
    return needed


def verify_step(model, cfg, run, *, shards, tokens, loss_chunks):
    """Call `run` (a forward and backward pass that leaves no gradients) twice and check what ran in FP8.

    The first call compiles. The second is counted: by the profiler, or for emulated FP8 by a dispatch mode in eager,
    since a compiled emulated matmul looks like any other. Matmuls are counted by shape and scaling, so that recomputed
    ones do not stand in for others. tokens: of the pass, on this rank. Returns the number of FP8 matmuls. RunStopped if
    the converted layers need one that did not run, or if a weight was gathered in another dtype than configured.
    """
    run()
    seen, triton = Counter(), 0
    if cfg.emulate:
        with torch.compiler.set_stance("force_eager"), CountFloat8Matmuls() as counter:
            run()
        seen = counter.seen
    else:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True, record_shapes=True) as profile:
            run()
            torch.cuda.synchronize()
        # cuBLAS and CUTLASS show as the aten op, max-autotune's Triton matmuls as triton_tem_... (without shapes).
        # Pointwise kernels fused around them, triton_poi_fused__scaled_mm_..., are no matmuls.
        for event in profile.events():
            if event.name == "aten::_scaled_mm":
                a, b, scale = map(tuple, event.input_shapes[:3])
                seen[a, b, "row" if math.prod(scale) > 1 else "tensor"] += 1
            elif event.name == "aten::_scaled_mm_v2":
                seen[*map(tuple, event.input_shapes[:2]), "block"] += 1
            elif event.name.startswith("triton_tem") and "scaled_mm" in event.name:
                triton += event.device_type.name == "CUDA"
    converted, needed = fp8.float8_linears(model), needed_matmuls(model, cfg, tokens, loss_chunks)
    missing = (needed - seen).total() - triton
    if missing > 0:
        raise RunStopped(f"{len(converted)} fp8 layers need {needed.total()} fp8 matmuls in a forward and backward "
                         f"pass, {missing} of them did not run: part of the model is not training in fp8")
    if shards:
        dtypes = {}  # {parameter: dtype in which it was gathered}
        for module in model.modules():
            # private, the same in torch 2.11 to 2.13; no public API shows what a collective carried
            if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
                for p in group.fsdp_params:
                    dtypes[p.sharded_param] = p.all_gather_outputs[0].dtype if p.all_gather_outputs else None
        wrong = [f"{fqn}: {dtypes[m.weight]}" for fqn, m in converted.items()
                 if (dtypes[m.weight] == torch.float8_e4m3fn) != fp8.gathers(m.recipe, cfg, shards)]
        if wrong:
            state = "on" if cfg.enable_fsdp_float8_all_gather else "off"
            raise RunStopped(f"fp8 all-gather is {state}, but these weights were gathered as {', '.join(wrong)}")
    return seen.total() + triton


# A gradient passes up to seven FP8 matmuls in a one-layer model, each with the noise of its two operands (e5m2 26 dB,
# e4m3 32), which leaves 19 dB and more (tests/checks/test_numerics.py). A wrong scale, layout or order leaves 3 dB or
# less. 12 dB is an error of a quarter of the gradient.
SELF_CHECK_DB = 12.0
SELF_CHECK_LOSS = 1e-2  # relative; 1e-3 was seen before any training, where the gradients are noisiest


def needs_self_check(cfg):
    """Whether to compare FP8 with bf16 at start-up: by cfg.self_check, or because of Triton.

    Where a kernel takes a maximum with PropagateNan.ALL, Triton may store garbage instead of FP8 values
    (https://github.com/triton-lang/triton/issues/11111). torchao patches this in pointwise code; torch 2.14 does it in
    reductions as well, which the patch does not reach. Transposing casts of our own are checked with every version.
    """
    names = filter(None, (cfg.recipe_name, *cfg.recipes.values()))
    ours = any("block" in fp8.RECIPES[name].scalings for name in names)
    return cfg.self_check or not cfg.emulate and (ours or TorchVersion(torch.__version__) >= "2.14")


def self_check(config, micro_batch, device):
    """One pass of a one-layer model of the run's shapes, compiled in FP8 as it trains, against eager bf16.

    Blocks whose layers have the same recipes run the same graph, so one stands for all of them. micro_batch: (x, y,
    documents) on the device. Returns a line for the screen; RunStopped if they differ by more than rounding explains.
    """
    linears = fp8.linear_layers(models.on_meta(config.model))
    blocks = []  # the recipes of each different block, and of lm_head, by the names of a one-layer model
    for i in range(config.model.n_layer):
        names = {fqn.replace(f"layers.{i}.", "layers.0."): fp8.recipe_of(fqn, config.fp8) for fqn in linears
                 if fqn.startswith(f"layers.{i}.") or not fqn.startswith("layers.")}
        if any(names.values()) and names not in blocks:
            blocks.append(names)
    expected_loss, expected = one_layer_pass(config, None, micro_batch, device)
    comparisons = []
    for names in blocks:
        loss, grads = one_layer_pass(config, replace(config.fp8, filter_fqns=[], recipes=names), micro_batch, device)
        gap, decibels = abs(loss / expected_loss - 1), {}
        for name, grad in expected.items():
            noise = grad.float() - grads[name].float()
            decibels[name] = telemetry.decibels(grad.float().square().sum().item(), noise.square().sum().item())
        worst = min(decibels, key=decibels.get)
        comparisons.append(f"loss {gap:.1e}, gradients {decibels[worst]:.0f} dB ({worst}) from bf16")
        if not (gap <= SELF_CHECK_LOSS and decibels[worst] >= SELF_CHECK_DB):  # nor if one is nan
            raise RunStopped(f"fp8 computes wrong results here: {'; '.join(comparisons)}. Rounding explains "
                             f"{SELF_CHECK_LOSS} of the loss, {SELF_CHECK_DB} dB. Try another torch, or "
                             "fp8.enabled=False")
    del expected, grads, grad, noise
    torch.cuda.empty_cache()  # the run's own model is still to be built, and may need all memory
    return "fp8 self-check: " + "; ".join(comparisons)


def one_layer_pass(config, fp8_cfg, micro_batch, device):
    """(loss, {name: gradient}) of one layer, embedding and head: FP8 as in the run; fp8_cfg=None: eager bf16."""
    model = models.on_meta(replace(config.model, n_layer=1)).to(getattr(torch, config.dtype))
    if fp8_cfg:  # its kernel of attention is checked with it
        attention.select_kernel(model, config, device)
        fp8.convert(model, fp8_cfg, shards=0)
        compile_and_checkpoint(model, config.compile, config.activation_checkpoint, fp8_cfg.copies)
    model.to_empty(device=device)
    models.init_weights(model, config.seed)
    x, y, documents = micro_batch
    loss = model(x, y, config.loss_chunks, *documents)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}
