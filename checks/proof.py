"""What of a run is in FP8, and the proof before the first step: it is so, as asked, and computes what it should."""

import math
import re
from collections import Counter
from dataclasses import replace

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fp8
import model as models
from checks import telemetry
from plumbing.errors import RunStopped


def covered_flops(model, cfg):
    """FLOPs per token of the matmuls that run in FP8, forward and backward."""
    per_weight = 4 if cfg.recipe_name == "rowwise_with_gw_hp" else 6
    return per_weight * sum(m.weight.numel() for m in fp8.float8_linears(model).values())


def table(model, cfg, flops_share, *, shards):
    """The report of a converted model: a line per kind of layer, then how much of the model FP8 covers.

    flops_share: covered_flops over all matmul FLOPs of the model, attention included.
    """
    recipe = cfg.recipe_name or "tensorwise"
    found = fp8.float8_linears(model)
    rows, covered_params = Counter(), sum(m.weight.numel() for m in found.values())
    for fqn, m in model.named_modules():
        if isinstance(m, nn.Linear):
            kept = f"{str(m.weight.dtype).removeprefix('torch.')}: fp8.filter_fqns"
            how = f"fp8 {recipe}" + (" (emulated)" if cfg.emulate else "") if fqn in found else kept
            rows[re.sub(r"\.\d+\.", ".*.", fqn), tuple(m.weight.shape), how] += 1
    lines = [f"  {name:<22} {str(shape):<16} x{n:<4} {how}" for (name, shape, how), n in rows.items()]
    total = sum(p.numel() for p in model.parameters())
    gather = "high precision" if shards else "nothing (one rank holds whole weights)"
    if shards and cfg.enable_fsdp_float8_all_gather:
        gather = "fp8" + (", scales precomputed" if cfg.precompute_float8_dynamic_scale_for_fsdp else "")
    elif cfg.enable_fsdp_float8_all_gather:
        gather += ": fp8 all-gather" + (" and precomputed scales have" if cfg.precompute_float8_dynamic_scale_for_fsdp
                                        else " has") + " nothing to do here"
    return "\n".join([
        f"fp8: {len(found)} of {sum(rows.values())} linear layers converted", *lines,
        f"  covers {covered_params / total:.1%} of parameters, {flops_share:.1%} of matmul FLOPs",
        f"  all-gather: {gather}"])


def verify_sharded(model, cfg, expected, *, shards):
    """After sharding and loading weights: the converted layers are all there, and their weights set up as asked.

    expected: names of the layers that convert() made. Raises RunStopped otherwise: a defect of this code or a fork.
    """
    found = fp8.float8_linears(model)
    if list(found) != expected:
        raise RunStopped(f"{len(expected)} layers were converted to fp8, {len(found)} are left: "
                           f"{sorted(set(expected) ^ set(found))}")
    if not shards or not cfg.enable_fsdp_float8_all_gather:
        return
    plain = [fqn for fqn, m in found.items()
             if not (isinstance(m.weight, DTensor) and isinstance(m.weight._local_tensor, fp8.gather_in_fp8()))]
    if plain:
        raise RunStopped("fp8 all-gather was asked for, but these weights would be gathered in high precision: "
                           + ", ".join(plain))
    if cfg.precompute_float8_dynamic_scale_for_fsdp:
        missing = [fqn for fqn, m in found.items() if m.weight._local_tensor._precomputed_scale is None]
        if missing:
            raise RunStopped("fp8 scales were to be precomputed, but these weights have none: " + ", ".join(missing))


def gathered_dtypes(model):
    """{parameter name: dtype that its last FSDP2 all-gather delivered}. Empty where nothing is sharded."""
    dtypes = {}
    for module in model.modules():
        # private, in torch 2.11 to 2.13 alike; no public way shows what a collective really carried
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
            for p in group.fsdp_params:
                dtypes[p._param_fqn] = p.all_gather_outputs[0].dtype if p.all_gather_outputs else None
    return dtypes


class CountFloat8Matmuls(TorchDispatchMode):
    """Counts matmuls with FP8 operands by the operands' shapes: how emulated FP8, which ends in a plain mm, is seen."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torchao.float8.float8_training_tensor import Float8TrainingTensor

        if func is torch.ops.aten.mm.default and any(isinstance(a, Float8TrainingTensor) for a in args):
            self.seen[tuple(args[0].shape), tuple(args[1].shape)] += 1
        return func(*args, **(kwargs or {}))


def needed_matmuls(model, cfg, tokens, loss_chunks):
    """{shapes of the two operands: how many such FP8 matmuls} of a forward and backward pass over `tokens` tokens."""
    needed = Counter()
    for fqn, m in fp8.float8_linears(model).items():
        n_out, n_in = m.weight.shape
        pieces = loss_chunks if fqn == "lm_head" else 1
        t = tokens // pieces
        needed[(t, n_in), (n_in, n_out)] += pieces  # y = x @ w.T
        needed[(t, n_out), (n_out, n_in)] += pieces  # grad_x = g @ w
        if cfg.recipe_name != "rowwise_with_gw_hp":
            needed[(n_out, t), (t, n_in)] += pieces  # grad_w = g.T @ x
    return needed


def verify_step(model, cfg, run, *, shards, tokens, loss_chunks):
    """Call `run` (a forward and backward pass that leaves no gradients) twice and look at what ran.

    The first call compiles. The second is counted: by the profiler, or emulated FP8 by a dispatch mode in eager, since
    a compiled emulated matmul looks like any other. By shape, so that forward matmuls which are recomputed do not stand
    in for others. tokens: of the pass, on this rank. Returns the number of FP8 matmuls. Raises RunStopped if the
    converted layers need some that did not run, or if a weight was gathered in another dtype than asked for.
    """
    run()
    if cfg.emulate:
        with torch.compiler.set_stance("force_eager"), CountFloat8Matmuls() as counter:
            run()
        seen, triton = counter.seen, 0
    else:
        cuda = torch.profiler.ProfilerActivity.CUDA
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, cuda], acc_events=True,
                                    record_shapes=True) as profile:
            run()
            torch.cuda.synchronize()
        # cuBLAS and CUTLASS show as the aten op, max-autotune's Triton matmuls as triton_tem_... (without shapes),
        # pointwise kernels that were fused around them as triton_poi_fused__scaled_mm_...: not matmuls
        events = profile.events()
        seen = Counter(tuple(map(tuple, e.input_shapes[:2])) for e in events if e.name == "aten::_scaled_mm")
        triton = sum(e.device_type.name == "CUDA" and e.name.startswith("triton_tem") and "scaled_mm" in e.name
                     for e in events)
    found, needed = fp8.float8_linears(model), needed_matmuls(model, cfg, tokens, loss_chunks)
    missing = (needed - seen).total() - triton
    if missing > 0:
        raise RunStopped(f"{len(found)} fp8 layers need {needed.total()} fp8 matmuls in a forward and backward pass, "
                           f"{missing} of them did not run: part of the model is not training in fp8")
    if shards:
        dtypes, names = gathered_dtypes(model), {id(p): name for name, p in model.named_parameters()}
        gathered = {fqn: dtypes[names[id(m.weight)]] for fqn, m in found.items()}  # tied weights go by one name
        want_fp8 = cfg.enable_fsdp_float8_all_gather
        wrong = [f"{fqn}: {dtype}" for fqn, dtype in gathered.items() if (dtype == torch.float8_e4m3fn) != want_fp8]
        if wrong:
            raise RunStopped(f"fp8 all-gather is {'on' if want_fp8 else 'off'}, but these weights were gathered as "
                               + ", ".join(wrong))
    return seen.total() + triton


# The gradients of one layer pass up to seven FP8 matmuls, each with the noise of its two operands (e5m2 26 dB, e4m3
# 32), which leaves 19 dB and more (tests/test_numerics.py). Compiled against eager it is no better in bf16: where they
# round in another order before a cast, some values tip over to the next FP8 number. A wrong scale, layout or order
# leaves 3 dB or less. 12 dB is an error of a quarter of the gradient.
SELF_CHECK_DB = 12.0
SELF_CHECK_LOSS = 1e-2  # relative: 1e-3 was seen, where the gradients are noisiest before any training


def self_check(config, micro_batch, device):
    """One pass of a one-layer model of the run's shapes: FP8 as it trains, against FP8 in eager, and against none.

    All layers run the same graph, so one stands for all. micro_batch: (x, y, documents) of the run, on the device.
    Returns a line for the screen. Raises RunStopped where loss or gradients differ by more than rounding explains.
    """
    with torch.device("meta"):
        whole = models.Transformer(config.model)
    linears = [fqn for fqn, m in whole.named_modules() if isinstance(m, nn.Linear)]
    # the one layer stands for any that the run converts (layers.3.mlp says nothing about the other 31)
    converted = {re.sub(r"\d+", "0", fqn) for fqn in linears if not fp8.is_filtered(fqn, config.fp8.filter_fqns)}
    kinds = [fqn for fqn in linears if re.sub(r"\d+", "0", fqn) == fqn and fqn not in converted]
    results = {}
    for variant in ("bf16", "eager", "compiled"):
        cfg = replace(config.fp8, enabled=variant != "bf16", filter_fqns=kinds)
        with torch.device("meta"):
            # with flash4, its kernels are compared with those that they replace
            model = models.Transformer(replace(config.model, n_layer=1), config.flash4 and variant == "compiled")
            model.to(getattr(torch, config.dtype))
        if cfg.enabled:
            fp8.convert(model, cfg, shards=0)
        compile_cfg = replace(config.compile, enabled=config.compile.enabled and variant == "compiled")
        fp8.compile_and_checkpoint(model, cfg, compile_cfg, config.activation_checkpoint)
        model.to_empty(device=device)
        models.init_weights(model, config.seed)
        x, y, documents = micro_batch
        loss = model(x, y, config.loss_chunks, *documents)
        loss.backward()
        results[variant] = loss.item(), {name: p.grad for name, p in model.named_parameters()}
    told, wrong = [], []
    for reference in ("eager", "bf16"):
        (loss, grads), (want, wanted) = results["compiled"], results[reference]
        gap = abs(loss / want - 1)
        least, name = min((agreement(w.float(), grads[n].float()), n) for n, w in wanted.items())
        told.append(f"loss {gap:.1e}, gradients {least:.0f} dB ({name}) from {reference}")
        if not gap <= SELF_CHECK_LOSS or not least >= SELF_CHECK_DB:
            wrong.append(told[-1])
    del model, loss, results, grads, wanted
    torch.cuda.empty_cache()  # the run's own model is not there yet, and may need all of it
    if wrong:
        raise RunStopped(f"fp8 does not compute here what it should: {'; '.join(wrong)}. Rounding explains "
                           f"{SELF_CHECK_LOSS} of the loss and {SELF_CHECK_DB} dB. Try another version of torch, or "
                           "train with fp8.enabled=False")
    return "fp8 self-check: " + "; ".join(told)


def agreement(reference, x):
    """dB of x against a reference; -inf where either holds inf or nan."""
    db = telemetry.decibels(reference.square().sum().item(), (reference - x).square().sum().item())
    return -math.inf if math.isnan(db) else db
