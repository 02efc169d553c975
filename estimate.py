"""What a step costs, from the config alone, before anything is allocated: matmul FLOPs and peak memory."""

import copy
import math

import torch

import fp8

# Dense bf16 tensor-core peak, FLOP/s, from the vendors' data sheets: what MFU is measured against, in FP8 runs too.
BF16_PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
             "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 6000 Ada": 364e12}


def bf16_peak(hardware):
    """The bf16 peak of a GPU by its name, FLOP/s; None where it is not known."""
    return next((flops for name, flops in BF16_PEAK.items() if name in hardware), None)


def matmul_flops_per_token(cfg, document=None):
    """Forward and backward matmul FLOPs per token of a ModelConfig: (linear layers, attention scores).

    2 per multiply-add, x3 for forward and both gradients. Attention counts the causal half only (what a fused kernel
    computes), within the sliding window; tables that count the full square (PaLM's and torchtitan's MFU) come out
    higher. document: the length that attention sees, by default block_size; of packed documents the mean over tokens,
    sum(length^2) / sum(length).
    """
    length = document or cfg.block_size
    window = min(cfg.sliding_window or length, length)
    attn = cfg.n_embd * (cfg.n_head + 2 * cfg.n_kv_head) * cfg.head_dim + cfg.n_head * cfg.head_dim * cfg.n_embd
    weights = cfg.n_layer * (attn + 3 * cfg.n_embd * cfg.ffn_dim) + cfg.vocab_size * cfg.n_embd
    seen = window - window**2 / (2 * length)  # keys per query, on average
    scores = 2 * cfg.n_layer * cfg.n_head * cfg.head_dim * seen
    return 6 * weights, 6 * scores


def memory(config, shards, accumulation):
    """Peak GiB per rank of a training step of a configurator.Config, within 5% of what bench.py measured (tests).

    The peak is where backward begins: weights and optimizer state over the shards, what every block keeps of each
    token, the logits of a loss chunk and their gradient. Gradients come as activations go, so they add to it only
    when an earlier pass of gradient accumulation left them.
    """
    m, size = config.model, getattr(torch, config.dtype).itemsize
    qkv, heads = (m.n_head + 2 * m.n_kv_head) * m.head_dim, m.n_head * m.head_dim
    linears = {"attn.qkv": (m.n_embd, qkv), "attn.out": (heads, m.n_embd),  # (in, out)
               "mlp.gate_up": (m.n_embd, 2 * m.ffn_dim), "mlp.down": (m.ffn_dim, m.n_embd)}
    block = sum(n_in * n_out for n_in, n_out in linears.values()) + 2 * m.n_embd + (qkv if m.qkv_bias else 0)
    table = m.vocab_size * m.n_embd
    n_params = m.n_layer * block + table * (1 if m.tie_embeddings else 2) + m.n_embd
    master = config.optim.weights == "fp32_master" and config.dtype != "float32"
    held = n_params / max(1, shards)  # by this rank
    moments = 2 + 8 / 128 if config.optim.fp8_moments else 8 if master else 2 * size  # FP8 and a unit for every 128
    state = held * (size + (4 if master else 0) + moments)
    gradients = held * (4 if master and accumulation > 1 else size)
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
    if config.fp8.enabled and config.fp8.keep_casts:  # one byte for each input of a linear layer, and for each weight
        own = not (shards and config.fp8.enable_fsdp_float8_all_gather)  # else FSDP2 casts weights
        activations += sum(tokens * n_in + own * n_in * n_out for i in range(m.n_layer)
                           for name, (n_in, n_out) in linears.items()
                           if not fp8.is_filtered(f"layers.{i}.{name}", config.fp8.filter_fqns))
    logits = tokens / config.loss_chunks * m.vocab_size
    head = logits * 2 * size + (2 * table * size if config.loss_chunks > 1 else 0)
    working = 4 * tokens * m.ffn_dim * size  # inside the one block whose backward runs
    gathered = (2 * block + n_params - m.n_layer * block) * size if shards else 0
    if accumulation > 1:
        peak = gradients + activations + max(head, working)
    else:
        peak = max(activations + max(head, working), gradients + working)
    return (state + gathered + recorded + peak) / 2**30


def check_memory(config, shards, accumulation, device):
    """The estimated GiB per rank; ValueError if `device` is a GPU that cannot hold them, with the keys that help."""
    gib = memory(config, shards, accumulation)
    capacity = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else math.inf
    if gib > 1.05 * capacity:  # the estimate may be 5% off: closer calls are left to the GPU
        helps = []
        for key, value in (("fp8.keep_casts", False), ("activation_checkpoint", "selective"),
                           ("activation_checkpoint", "full"), ("loss_chunks", 8), ("micro_batch_size", 1),
                           ("optim.fp8_moments", True), ("optim.weights", "stochastic_rounding")):
            other = copy.deepcopy(config)
            *section, name = key.split(".")
            setattr(getattr(other, section[0]) if section else other, name, value)
            passes = accumulation * config.micro_batch_size // other.micro_batch_size
            if (less := memory(other, shards, passes)) < 0.99 * gib and not list(other.problems()):
                helps.append(f"{key}={value} ({less:.1f})")
        raise ValueError(f"this run needs about {gib:.1f} GiB per GPU, there are {capacity:.1f}. "
                         f"{'Lower it: ' + ', '.join(helps) + '; use' if helps else 'Use'} more GPUs, a shorter "
                         "model.block_size or a smaller model")
    return gib
