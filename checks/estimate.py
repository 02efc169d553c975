"""What a step costs: matmul FLOPs, and peak memory before anything is allocated."""

import copy
import math

import torch
import torch.nn as nn

import fp8
import model as models
import optim
from plumbing.errors import UserError

# Dense bf16 tensor-core peak, FLOP/s, from the vendors' data sheets: the reference of MFU, in FP8 runs too.
BF16_PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
             "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 6000 Ada": 364e12}


def bf16_peak(hardware):
    """The bf16 peak of a GPU by its name, FLOP/s; None if it is not known."""
    names = [name for name in BF16_PEAK if name in hardware]
    return BF16_PEAK[max(names, key=len)] if names else None


def matmul_flops_per_token(model, document=None):
    """Forward and backward matmul FLOPs per token of a Transformer: (linear layers, attention scores).

    2 per multiply-add, x3 for forward and both gradients. Attention counts the causal half only (what a fused kernel
    computes), within the sliding window; MFU that counts the full square (PaLM, torchtitan) is higher. document: the
    length that attention sees, by default block_size; for packed documents the mean over tokens, sum(length^2) /
    sum(length).
    """
    cfg, length = model.cfg, document or model.cfg.block_size
    window = min(cfg.sliding_window or length, length)
    weights = sum(linear.weight.numel() for linear in model.modules() if isinstance(linear, nn.Linear))
    seen = window - window**2 / (2 * length)  # keys per query, on average
    scores = 2 * cfg.n_layer * cfg.n_head * cfg.head_dim * seen
    return 6 * weights, 6 * scores


def memory(config, shards, accumulation):
    """Peak GiB per rank of a training step of a configurator.Config, within 5% of what bench.py measured (tests).

    shards: ranks that each weight is sharded over, 0: FSDP2 is off. accumulation: passes per step. The peak is where
    backward begins, with all activations, or where it ends, with all gradients. Sizes are those of the modules of
    model.Transformer, so a block of one's own is counted as it is.
    """
    m, dtype = config.model, getattr(torch, config.dtype)
    size, tokens = dtype.itemsize, config.micro_batch_size * m.block_size
    with torch.device("meta"):
        model = models.Transformer(m)
    linears = {fqn: layer for fqn, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    head = linears.pop("lm_head")
    fp8_linears = {fqn: layer for fqn, layer in linears.items() if fp8.recipe_of(fqn, config.fp8)}
    gathered_fp8 = {fqn: layer for fqn, layer in fp8_linears.items()
                    if fp8.gathers(fp8.recipe_of(fqn, config.fp8), config.fp8, shards)}

    held = sum(p.numel() for p in model.parameters()) / max(1, shards)  # parameters of this rank
    sums_in_float32 = optim.has_masters(config.optim, dtype)
    always = held * (size + optim.bytes_per_parameter(config.optim, dtype))  # weights, masters and moments
    if config.cuda_graph and accumulation > 1:
        always += held * size  # gradients that the recorded pass holds for itself
    gradients = held * (4 if sums_in_float32 and accumulation > 1 else size)

    activations = size * tokens * saved_values(config, linears)
    if config.fp8.enabled and config.fp8.keep_casts:  # a byte per input value, and per weight unless gathered in FP8
        activations += sum(tokens * layer.in_features + (0 if fqn in gathered_fp8 else layer.weight.numel())
                           for fqn, layer in fp8_linears.items()
                           if fp8.RECIPES[fp8.recipe_of(fqn, config.fp8)].keep_casts)
    if (gathered_fp8 and config.compile.enabled and config.activation_checkpoint == "none"
            and not config.fp8.force_recompute_fp8_weight_in_bwd):
        # PyTorch's partitioner saves transposed FP8 copies of the MLP's weights
        activations += sum(layer.weight.numel() for fqn, layer in gathered_fp8.items()
                           if models.layer_kind(fqn).startswith("mlp."))
    # logits of a loss chunk and their gradient; ChunkedLoss holds the head's gradient too, and adds each chunk's to it
    loss = 2 * size * head.out_features * tokens / models.calls_per_pass("lm_head", config.loss_chunks)
    if config.loss_chunks > 1:
        loss += 2 * size * head.weight.numel()
    # temporaries of the one block whose backward runs
    working = 4 * size * tokens * max((layer.in_features for layer in linears.values()), default=0)

    gathered = reducing = 0
    if shards:
        n_root = sum(p.numel() for p in {model.embed.weight, head.weight})
        gathered = size * n_root  # whole weights that FSDP2 holds
        if not m.tie_embeddings and fp8.gathers(fp8.recipe_of("lm_head", config.fp8), config.fp8, shards):
            gathered -= (size - 1) * head.weight.numel()
        # gradients of embedding and lm_head, and their copy to reduce
        reducing = gathered + n_root * (size + getattr(torch, config.reduce_dtype).itemsize)
        blocks = size * sum(p.numel() for p in model.layers.parameters())
        blocks -= (size - 1) * sum(layer.weight.numel() for layer in gathered_fp8.values())
        # with resharding this block and the next one, prefetched
        gathered += blocks * min(1, 2 / m.n_layer) if config.reshard_after_forward else blocks

    begins = gathered + activations + max(loss, working)
    ends = gradients + max(gathered + working, reducing)
    if accumulation > 1:
        begins += gradients
        if sums_in_float32:  # sums of earlier passes, beside this pass's own gradients
            ends += held * size
    return (always + max(begins, ends)) / 2**30


def saved_values(config, linears):
    """Values per token that all blocks save for backward. linears: those of the blocks, by name."""
    m = config.model
    if config.activation_checkpoint == "full":
        return m.n_layer * m.n_embd  # block inputs
    # outputs of linear layers (not the last one's, but the block's input, of the same size) and of attention
    values = sum(layer.out_features for layer in linears.values()) + m.n_layer * m.n_head * m.head_dim
    if config.activation_checkpoint == "none":
        values += m.n_layer * (m.n_head + m.n_kv_head) * m.head_dim  # rotated queries and keys
        for fqn, layer in linears.items():
            # A layer whose weight gradient is in FP8 casts its input again in backward, from what the op before it
            # saves anyway: PyTorch's partitioner decides so. The input of attn.out is attention's output.
            recipe = fp8.RECIPES.get(fp8.recipe_of(fqn, config.fp8))
            if models.layer_kind(fqn) != "attn.out" and not (recipe and recipe.grad_weight):
                values += layer.in_features
    return values


def check_memory(config, shards, accumulation, device):
    """The estimated GiB per rank. UserError if `device` is a GPU with less memory, with the keys that lower it."""
    gib = memory(config, shards, accumulation)
    capacity = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else math.inf
    if gib <= 1.05 * capacity or not config.check_memory:  # the estimate may be 5% off: the GPU decides close calls
        return gib
    helps = []
    for key, value in (("fp8.keep_casts", False), ("activation_checkpoint", "selective"),
                       ("activation_checkpoint", "full"), ("loss_chunks", 8), ("micro_batch_size", 1),
                       ("optim.fp8_moments", True), ("optim.weights", "stochastic_rounding"),
                       ("reshard_after_forward", True), ("reduce_dtype", "bfloat16"),
                       ("fp8.force_recompute_fp8_weight_in_bwd", True)):
        changed = copy.deepcopy(config)
        *section, name = key.split(".")
        setattr(getattr(changed, section[0]) if section else changed, name, value)
        less = memory(changed, shards, accumulation * config.micro_batch_size // changed.micro_batch_size)
        if less < 0.99 * gib and not list(changed.problems()):
            helps.append(f"{key}={value} ({less:.1f})")
    remedy = f"Lower it: {', '.join(helps)}; use" if helps else "Use"
    raise UserError(f"this run needs about {gib:.1f} GiB per GPU, there are {capacity:.1f}. {remedy} more GPUs, a "
                    "shorter model.block_size or a smaller model; or set check_memory=False if your model takes less")
