"""What a step costs, before anything is allocated: matmul FLOPs and peak memory."""

import copy
import math

import torch
import torch.nn as nn

import fp8
import optim
from plumbing.errors import UserError

# Dense bf16 tensor-core peak, FLOP/s, from the vendors' data sheets: what MFU is measured against, in FP8 runs too.
BF16_PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
             "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 6000 Ada": 364e12}


def bf16_peak(hardware):
    """The bf16 peak of a GPU by its name, FLOP/s; None where it is not known."""
    return next((flops for name, flops in BF16_PEAK.items() if name in hardware), None)


def matmul_flops_per_token(model, document=None):
    """Forward and backward matmul FLOPs per token of a Transformer: (linear layers, attention scores).

    2 per multiply-add, x3 for forward and both gradients. Attention counts the causal half only (what a fused kernel
    computes), within the sliding window; tables that count the full square (PaLM's and torchtitan's MFU) come out
    higher. document: the length that attention sees, by default block_size; of packed documents the mean over tokens,
    sum(length^2) / sum(length).
    """
    cfg, length = model.cfg, document or model.cfg.block_size
    window = min(cfg.sliding_window or length, length)
    weights = sum(linear.weight.numel() for linear in model.modules() if isinstance(linear, nn.Linear))
    seen = window - window**2 / (2 * length)  # keys per query, on average
    scores = 2 * cfg.n_layer * cfg.n_head * cfg.head_dim * seen
    return 6 * weights, 6 * scores


def memory(config, shards, accumulation):
    """Peak GiB per rank of a training step of a configurator.Config, within 5% of what bench.py measured (tests).

    The peak is where backward begins: weights and optimizer state over the shards, what every block keeps of each
    token, the logits of a loss chunk and their gradient, and what FSDP2 has gathered. Gradients come as activations go,
    so they add to it only when an earlier pass of gradient accumulation left them. Where activations are few the peak
    is at the end, when all gradients are there and FSDP2 reduces those of embedding and lm_head.
    """
    m, dtype = config.model, getattr(torch, config.dtype)
    size = dtype.itemsize
    qkv, heads = (m.n_head + 2 * m.n_kv_head) * m.head_dim, m.n_head * m.head_dim
    linears = {"attn.qkv": (m.n_embd, qkv), "attn.out": (heads, m.n_embd),  # (in, out)
               "mlp.gate_up": (m.n_embd, 2 * m.ffn_dim), "mlp.down": (m.ffn_dim, m.n_embd)}
    block = sum(n_in * n_out for n_in, n_out in linears.values()) + 2 * m.n_embd + (qkv if m.qkv_bias else 0)
    table = m.vocab_size * m.n_embd
    root = table * (1 if m.tie_embeddings else 2)  # what FSDP2 handles as one: embedding and lm_head
    n_params = m.n_layer * block + root
    sums_in_float32 = optim.has_masters(config.optim, dtype)
    held = n_params / max(1, shards)  # by this rank
    state = held * (size + optim.bytes_per_parameter(config.optim, dtype))
    gradients = held * (4 if sums_in_float32 and accumulation > 1 else size)
    recorded = held * size if config.cuda_graph and accumulation > 1 else 0  # those of the pass in the graph
    tokens = config.micro_batch_size * m.block_size
    # Values kept of each token and block. A matmul whose weight gradient is in high precision keeps its input; one in
    # FP8 casts it again in backward, from what the op before it keeps anyway (PyTorch's partitioner decides so).
    recast = config.fp8.enabled and config.fp8.recipe_name != "rowwise_with_gw_hp"
    matmuls = 2 * m.n_embd + qkv + heads + 2 * m.ffn_dim  # their outputs, attention's, and the block's input
    turned = (m.n_head + m.n_kv_head) * m.head_dim  # queries and keys with their positions
    kept = {"none": matmuls + turned + (0 if recast else 2 * m.n_embd + m.ffn_dim), "selective": matmuls,
            "full": m.n_embd}[config.activation_checkpoint]
    activations = tokens * m.n_layer * kept * size
    casts = [(name, *linears[name]) for i in range(m.n_layer) for name in linears
             if config.fp8.enabled and not fp8.is_filtered(f"layers.{i}.{name}", config.fp8.filter_fqns)]
    gathers_fp8 = shards and config.fp8.enabled and config.fp8.enable_fsdp_float8_all_gather
    if config.fp8.keep_casts:  # one byte for each input of a linear layer, and for each weight that is cast here
        activations += sum(tokens * n_in + (0 if gathers_fp8 else n_in * n_out) for _, n_in, n_out in casts)
    if (gathers_fp8 and config.compile.enabled and config.activation_checkpoint == "none"
            and not config.fp8.force_recompute_fp8_weight_in_bwd):  # the partitioner keeps the MLP's transposed weights
        activations += sum(n_in * n_out for name, n_in, n_out in casts if name.startswith("mlp"))
    logits = tokens / config.loss_chunks * m.vocab_size
    head = logits * 2 * size + (2 * table * size if config.loss_chunks > 1 else 0)
    working = 4 * tokens * m.ffn_dim * size  # inside the one block whose backward runs
    gathered = reducing = 0
    if shards:
        head8 = gathers_fp8 and not m.tie_embeddings and not fp8.is_filtered("lm_head", config.fp8.filter_fqns)
        tables = root * size - (table * (size - 1) if head8 else 0)
        blocks = m.n_layer * block * size - (sum((size - 1) * a * b for _, a, b in casts) if gathers_fp8 else 0)
        gathered = tables + blocks * (min(1, 2 / m.n_layer) if config.reshard_after_forward else 1)
        reducing = tables + root * (size + getattr(torch, config.reduce_dtype).itemsize)  # gradients and their copy
    begins = gathered + activations + max(head, working)
    ends = gradients + max(gathered + working, reducing)
    if accumulation > 1:  # the sums of earlier passes; where they are in float32, this pass's own gradients come on top
        begins += gradients
        ends += held * size if sums_in_float32 else 0
    return (state + recorded + max(begins, ends)) / 2**30


def check_memory(config, shards, accumulation, device):
    """The estimated GiB per rank; UserError if `device` is a GPU that cannot hold them, with the keys that help."""
    gib = memory(config, shards, accumulation)
    capacity = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else math.inf
    if gib > 1.05 * capacity:  # the estimate may be 5% off: closer calls are left to the GPU
        helps = []
        for key, value in (("fp8.keep_casts", False), ("activation_checkpoint", "selective"),
                           ("activation_checkpoint", "full"), ("loss_chunks", 8), ("micro_batch_size", 1),
                           ("optim.fp8_moments", True), ("optim.weights", "stochastic_rounding"),
                           ("reshard_after_forward", True), ("reduce_dtype", "bfloat16"),
                           ("fp8.force_recompute_fp8_weight_in_bwd", True)):
            other = copy.deepcopy(config)
            *section, name = key.split(".")
            setattr(getattr(other, section[0]) if section else other, name, value)
            passes = accumulation * config.micro_batch_size // other.micro_batch_size
            if (less := memory(other, shards, passes)) < 0.99 * gib and not list(other.problems()):
                helps.append(f"{key}={value} ({less:.1f})")
        raise UserError(f"this run needs about {gib:.1f} GiB per GPU, there are {capacity:.1f}. "
                         f"{'Lower it: ' + ', '.join(helps) + '; use' if helps else 'Use'} more GPUs, a shorter "
                         "model.block_size or a smaller model")
    return gib
