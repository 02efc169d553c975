"""What a step costs: matmul FLOPs, and peak memory before anything is allocated."""

import copy
import os
from pathlib import Path

import torch

import fp8
import model as models
import optim
from plumbing.errors import UserError
from plumbing.ranks import from_launcher

# Dense bf16 tensor-core peak, FLOP/s, from the vendors' data sheets: the reference of MFU, in FP8 runs too.
BF16_PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12,
             "GB200": 2500e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
             "RTX 4090": 165e12, "RTX 6000 Ada": 364e12}


def bf16_peak(hardware):
    """The bf16 peak of a GPU by its name, FLOP/s; None if it is not known."""
    names = [name for name in BF16_PEAK if name in hardware]
    return BF16_PEAK[max(names, key=len)] if names else None


def matmul_flops_per_token(model, document=None):
    """Forward and backward matmul FLOPs per token of a Transformer: (linear layers, attention scores).

    Attention counts the causal half only (what a fused kernel computes), within the sliding window; MFU that counts the
    full square (PaLM, torchtitan) is higher. document: the length that attention sees, by default block_size; for
    packed documents the mean over tokens, sum(length^2) / sum(length).
    """
    cfg, length = model.cfg, document or model.cfg.block_size
    window = min(cfg.sliding_window or length, length)
    weights = sum(linear.weight.numel() for linear in fp8.linear_layers(model).values())
    seen = window - window**2 / (2 * length)  # keys per query, on average
    scores = 2 * cfg.n_layer * cfg.n_head * cfg.head_dim * seen
    return 6 * weights, 6 * scores  # 2 per multiply-add, times 3 for forward and both gradients


def memory(config, shards, accumulation):
    """Peak GiB per rank of a training step of a configurator.Config, within 5% of what bench.py measured (tests).

    shards: ranks that each weight is sharded over, 0: FSDP2 is off. accumulation: passes per step. The peak is where
    backward begins, with all activations, or ends, with all gradients. Blocks of one's own count as their modules are.
    """
    m, dtype, model = config.model, getattr(torch, config.dtype), models.on_meta(config.model)
    size, tokens = dtype.itemsize, config.micro_batch_size * m.block_size
    linears = fp8.linear_layers(model)
    head = linears.pop("lm_head")

    held = sum(p.numel() for p in model.parameters()) / max(1, shards)  # parameters of this rank
    sums_in_float32 = optim.has_masters(config.optim, dtype)
    always = held * size + optimizer_bytes(config, model, shards)[0]  # weights, masters and moments
    always -= offloaded_weights(config, model, shards, accumulation)
    if config.cuda_graph and accumulation > 1:
        always += held * size  # gradients that the recorded pass holds for itself
    gradients = held * (4 if sums_in_float32 and accumulation > 1 else size)

    # outputs of linear layers (not the last one's, but the block's input, of the same size) and of attention
    outputs = sum(layer.out_features for layer in linears.values()) + m.n_layer * m.n_head * m.head_dim
    # What blocks keep for backward: values per token, and bytes of FP8 copies; full recompute keeps their inputs only.
    recompute, copies = config.activation_checkpoint, 0
    values = m.n_layer * m.n_embd if recompute == "full" else outputs
    if recompute == "none":
        values += m.n_layer * (m.n_head + m.n_kv_head) * m.head_dim  # rotated queries and keys
    gathered_fp8 = 0  # values
    for fqn, layer in linears.items():
        name, kind, weight = fp8.recipe_of(fqn, config.fp8), models.layer_kind(fqn), layer.weight.numel()
        recipe, gathers = fp8.RECIPES.get(name), fp8.gathers(name, config.fp8, shards)
        gathered_fp8 += weight * gathers
        # A layer whose weight gradient is in FP8 casts its input again in backward, from what the op before it saves
        # anyway: PyTorch's partitioner decides so. The input of attn.out is attention's output.
        if recompute == "none" and kind != "attn.out" and not (recipe and recipe.grad_weight):
            values += layer.in_features
        if recipe and recipe.keep_casts and config.fp8.keep_casts:
            copies += weight * (not gathers) + tokens * layer.in_features * bool(recipe.grad_weight)
        # the partitioner saves transposed FP8 copies of the MLP's weights
        if (gathers and kind.startswith("mlp.") and recompute == "none" and config.compile.enabled
                and not config.fp8.force_recompute_fp8_weight_in_bwd):
            copies += weight
    activations = size * tokens * values + copies
    # logits of a loss chunk and their gradient; ChunkedLoss holds the head's gradient too, and adds each chunk's to it
    loss = 2 * size * head.out_features * tokens / models.calls_per_pass("lm_head", config.loss_chunks)
    if config.loss_chunks > 1:
        loss += 2 * size * head.weight.numel()
    # temporaries of the one block whose backward runs
    working = 4 * size * tokens * max((layer.in_features for layer in linears.values()), default=0)
    if recompute == "full":  # and what it computes again
        working += size * tokens * outputs / m.n_layer

    gathered = reducing = 0
    if shards:
        n_root = sum(p.numel() for p in {model.embed.weight, head.weight})
        gathered = size * n_root  # whole weights that FSDP2 holds
        if not m.tie_embeddings and fp8.gathers(fp8.recipe_of("lm_head", config.fp8), config.fp8, shards):
            gathered -= (size - 1) * head.weight.numel()
        # gradients of embedding and lm_head, and their copy to reduce
        reducing = gathered + n_root * (size + getattr(torch, config.reduce_dtype).itemsize)
        blocks = size * sum(p.numel() for p in model.layers.parameters()) - (size - 1) * gathered_fp8
        # with resharding this block and the next one, prefetched
        gathered += blocks * min(1, 2 / m.n_layer) if config.reshard_after_forward else blocks

    begins = gathered + activations + max(loss, working)
    waiting, reduces_once = gradients, shards and accumulation > 1 and not config.reduce_each_pass
    if reduces_once:  # whole gradients wait for the last pass, which reduces them block by block
        waiting = sum(p.numel() for p in model.parameters()) * getattr(torch, config.reduce_dtype).itemsize
    ends = max(waiting + gathered + working, gradients + reducing)
    if accumulation > 1:
        begins += waiting
        if sums_in_float32 and not reduces_once:  # sums of earlier passes, beside this pass's own gradients
            ends += held * size
    return (always + max(begins, ends)) / 2**30


def optimizer_bytes(config, model, shards):
    """Bytes per rank of masters and moments: (on the GPU, in host memory)."""
    params, dtype = dict(model.named_parameters()), getattr(torch, config.dtype)
    sizes = {name: optim.state_bytes(config.optim, name, p.shape, dtype) / max(1, shards)
             for name, p in params.items()}
    on_host = sum(sizes[name] for name in optim.offloaded(config.optim, params))
    return sum(sizes.values()) - on_host, on_host


def offloaded_weights(config, model, shards, accumulation):
    """Bytes of the weights that fp8.offload_weights keeps in host memory. shards, accumulation: as for memory()."""
    names = optim.offloaded(config.optim, dict(model.named_parameters())) if config.fp8.offload_weights else ()
    moved = [layer.weight.numel() for fqn, layer in fp8.linear_layers(model).items() if f"{fqn}.weight" in names
             and fp8.casts_once(fp8.recipe_of(fqn, config.fp8), config.fp8, shards, accumulation)]
    return sum(moved) * getattr(torch, config.dtype).itemsize


def saves_in_background(config):
    """Whether training goes on while a checkpoint is written: not for one at the end only, which it waits for."""
    return config.async_checkpoint and 0 < config.checkpoint_interval < config.max_steps


def host_memory(config, shards, accumulation):
    """GiB of host memory per rank: (state and weights that are kept there, copy that checkpoints are written from)."""
    model = models.on_meta(config.model)
    on_gpu, on_host = optimizer_bytes(config, model, shards)
    weights = sum(p.numel() for p in model.parameters()) * getattr(torch, config.dtype).itemsize / max(1, shards)
    copied = saves_in_background(config) * (weights + on_gpu + on_host)
    return (on_host + offloaded_weights(config, model, shards, accumulation)) / 2**30, copied / 2**30


def host_capacity():
    """GiB of memory that this machine has, or that its container may use."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # cgroups v2, v1
        if os.path.isfile(path) and (limit := Path(path).read_text().strip()) != "max":
            limits.append(int(limit))
    return min(limits) / 2**30


def check_memory(config, shards, accumulation, device):
    """The estimated GiB per rank: (on the GPU, in host memory, None or why there is no room to save from a copy).

    UserError if a GPU, or the host for all its ranks, has less memory than that, with the keys that lower it. Ranks on
    a CPU share the host's.
    """
    gib, no_room = memory(config, shards, accumulation), None
    host_gib, copy_gib = host_memory(config, shards, accumulation)
    if not config.check_memory:
        return gib, host_gib + copy_gib, None
    on_node, host_has, on_gpu = from_launcher("LOCAL_WORLD_SIZE", 1), host_capacity(), device.type == "cuda"
    if on_node * host_gib > host_has:
        remedies = {"fp8.offload_weights=False": config.fp8.offload_weights,
                    "optim.fp8_moments=True": not config.optim.fp8_moments,
                    "optim.weights=stochastic_rounding": config.optim.weights == "fp32_master"}
        raise UserError(f"optim.offload={config.optim.offload} needs {on_node * host_gib:.1f} GiB of host memory, "
                        f"there are {host_has:.1f}: {', or set '.join(['lower it', *filter(remedies.get, remedies)])}")
    if copy_gib and on_node * (host_gib + copy_gib) > 0.9 * host_has:
        no_room = (f"async_checkpoint: {host_has:.1f} GiB of host memory have no room for the "
                   f"{on_node * copy_gib:.1f} GiB that checkpoints are written from: training waits for each")
        copy_gib = 0.0
    capacity = torch.cuda.get_device_properties(device).total_memory / 2**30 if on_gpu else host_has / on_node
    if gib <= 1.05 * capacity:  # the estimate may be 5% off: the GPU decides close calls
        return gib, host_gib + copy_gib, no_room
    helps = []
    for key, value in (("fp8.keep_casts", False), ("activation_checkpoint", "selective"),
                       ("activation_checkpoint", "full"), ("loss_chunks", 8), ("micro_batch_size", 1),
                       ("optim.fp8_moments", True), ("optim.weights", "stochastic_rounding"), ("optim.offload", 1.0),
                       ("fp8.offload_weights", True), ("reshard_after_forward", True), ("reduce_each_pass", True),
                       ("reduce_dtype", "bfloat16"), ("fp8.force_recompute_fp8_weight_in_bwd", True)):
        changed = copy.deepcopy(config)
        *section, name = key.split(".")
        setattr(getattr(changed, section[0]) if section else changed, name, value)
        less = memory(changed, shards, accumulation * config.micro_batch_size // changed.micro_batch_size)
        if less < 0.99 * gib and (on_gpu or "offload" not in key) and not list(changed.problems()):
            helps.append(f"{key}={value} ({less:.1f})")
    remedy = f"Lower it: {', '.join(helps)}; use" if helps else "Use"
    raise UserError(f"this run needs about {gib:.1f} GiB per rank, there are {capacity:.1f}. {remedy} more GPUs, a "
                    "shorter model.block_size or a smaller model; or set check_memory=False if your model takes less")
