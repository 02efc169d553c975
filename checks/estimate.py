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

    shards: ranks that each weight is sharded over, 0: FSDP2 is off. accumulation: passes per step. Everything is
    derived from the modules of model.Transformer, so a block of one's own is counted as it is.

    The peak is where backward begins or where it ends, in bytes:

        term          what                                                            begins    ends
        state         weights, masters and moments of this rank's shard               yes       yes
        recorded      gradients that a CUDA graph holds for itself                    yes       yes
        gathered      whole weights that FSDP2 holds                                  yes       2 blocks
        activations   what blocks save for backward                                   yes       no
        head          logits of a loss chunk and their gradient                       larger    no
        working       temporaries of the one block whose backward runs                of both   larger
        reducing      gradients of embedding and lm_head, and their copy to reduce    no        of both
        gradients     all of this rank's                                              from earlier passes    yes
    """
    m, fp8_cfg, dtype = config.model, config.fp8, getattr(torch, config.dtype)
    size = dtype.itemsize
    with torch.device("meta"):
        model = models.Transformer(m)
    tokens = config.micro_batch_size * m.block_size
    n_params = sum(p.numel() for p in model.parameters())
    n_root = sum(p.numel() for p in {*model.embed.parameters(), *model.lm_head.parameters()})
    table = model.embed.weight.numel()
    linears = {fqn: layer for fqn, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    head = linears.pop("lm_head")
    fp8_linears = {fqn: layer for fqn, layer in linears.items() if fp8.recipe_of(fqn, fp8_cfg)}
    gathers_fp8 = shards and fp8_cfg.enabled and fp8_cfg.enable_fsdp_float8_all_gather

    held = n_params / max(1, shards)
    sums_in_float32 = optim.has_masters(config.optim, dtype)
    state = held * (size + optim.bytes_per_parameter(config.optim, dtype))
    gradients = held * (4 if sums_in_float32 and accumulation > 1 else size)
    recorded = held * size if config.cuda_graph and accumulation > 1 else 0

    activations = size * tokens * sum(saved_values(config, linears).values())
    if fp8_cfg.enabled and config.fp8.keep_casts:  # a byte per input value, and per weight unless it is gathered in FP8
        activations += sum(tokens * layer.in_features + (0 if gathers_fp8 else layer.weight.numel())
                           for layer in fp8_linears.values())
    if (gathers_fp8 and config.compile.enabled and config.activation_checkpoint == "none"
            and not fp8_cfg.force_recompute_fp8_weight_in_bwd):
        # PyTorch's partitioner saves transposed FP8 copies of the MLP's weights
        activations += sum(layer.weight.numel() for fqn, layer in fp8_linears.items()
                           if models.layer_kind(fqn).startswith("mlp."))
    loss = 2 * size * head.out_features * tokens / models.calls_per_pass("lm_head", config.loss_chunks)
    if config.loss_chunks > 1:  # ChunkedLoss holds the head's gradient, and adds each chunk's to it
        loss += 2 * size * table
    working = 4 * size * tokens * max((layer.in_features for layer in linears.values()), default=0)
    gathered = reducing = 0
    if shards:
        tables = size * n_root
        if gathers_fp8 and not m.tie_embeddings and fp8.recipe_of("lm_head", fp8_cfg):
            tables -= (size - 1) * table
        blocks = size * sum(p.numel() for p in model.layers.parameters())
        if gathers_fp8:
            blocks -= (size - 1) * sum(layer.weight.numel() for layer in fp8_linears.values())
        if config.reshard_after_forward:
            blocks *= min(1, 2 / m.n_layer)  # this one, and the next one prefetched
        gathered = tables + blocks
        reducing = tables + n_root * (size + getattr(torch, config.reduce_dtype).itemsize)

    begins = gathered + activations + max(loss, working)
    ends = gradients + max(gathered + working, reducing)
    if accumulation > 1:
        begins += gradients
        if sums_in_float32:  # sums of earlier passes, beside this pass's own gradients
            ends += held * size
    return (state + recorded + max(begins, ends)) / 2**30


def saved_values(config, linears):
    """{what: values per token that all blocks save for backward}. linears: of the blocks, by name.

    A linear layer whose weight gradient is in high precision saves its input. One in FP8 casts it again in backward,
    from what the op before it saves anyway: PyTorch's partitioner decides so.
    """
    m, mode = config.model, config.activation_checkpoint
    if mode == "full":
        return {"block inputs": m.n_layer * m.n_embd}
    # the last layer's output is not saved, but the block's input, which has the same size
    saved = {"outputs of linear layers": sum(layer.out_features for layer in linears.values()),
             "outputs of attention": m.n_layer * m.n_head * m.head_dim}
    if mode == "none":
        saved["rotated queries and keys"] = m.n_layer * (m.n_head + m.n_kv_head) * m.head_dim
        saved["inputs of linear layers"] = sum(
            layer.in_features for fqn, layer in linears.items()
            if models.layer_kind(fqn) != "attn.out"  # attention's output, already counted
            and not recasts_input(fqn, config.fp8))
    return saved


def recasts_input(fqn, fp8_cfg):
    """Whether backward of linear layer `fqn` casts its input again instead of reading it in high precision."""
    recipe = fp8.recipe_of(fqn, fp8_cfg)
    return recipe is not None and fp8.RECIPES[recipe].grad_weight is not None


def check_memory(config, shards, accumulation, device):
    """The estimated GiB per rank. UserError if `device` is a GPU with less memory, with the keys that lower it."""
    gib = memory(config, shards, accumulation)
    capacity = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else math.inf
    if gib <= 1.05 * capacity:  # the estimate may be 5% off: let the GPU decide close calls
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
        passes = accumulation * config.micro_batch_size // changed.micro_batch_size
        less = memory(changed, shards, passes)
        if less < 0.99 * gib and not list(changed.problems()):
            helps.append(f"{key}={value} ({less:.1f})")
    remedy = f"Lower it: {', '.join(helps)}; use" if helps else "Use"
    raise UserError(f"this run needs about {gib:.1f} GiB per GPU, there are {capacity:.1f}. {remedy} more GPUs, a "
                    "shorter model.block_size or a smaller model")
