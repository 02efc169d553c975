"""Attention: which tokens a query sees, the kernel that computes it, and rotary positions.

A query sees itself and earlier tokens: only those of its own document in packed rows, only the nearest ones with a
sliding window. GPUs have kernels for all three (cuDNN for whole rows, variable-length flash attention for documents and
windows); other devices use a mask. FlashAttention 4 for Hopper and Blackwell is faster, and is used where it is
installed. Shapes: B batch, T time, H query heads, K key/value heads, D width of a head.
"""

import inspect
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from plumbing import flash4
from plumbing.schema import PositiveFloat

SAVED_OPS = (
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.nanofp8.flash4.default,
)
# torch 2.11 accepts grouped queries without a flag, later versions need one
VARLEN_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def document_starts(positions):
    """(B, T) bool: whether a document begins at each token. positions: each token's position in its own document."""
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return starts


def document_bounds(positions, longest=None, most_documents=None):
    """(cu_seqlens, max_seqlen) of the documents in positions (B, T), as one row of B * T tokens.

    cu_seqlens: int32, the start of each document, then B * T (repeated: empty documents). max_seqlen: int, an upper
    bound of document lengths. longest, most_documents: tokens of the longest document and documents of the fullest row
    of the whole run, so that torch.compile sees one bound and one shape; None: those of positions. Call this while
    positions are on the CPU: how many documents there are depends on their values, and reading that stalls a GPU.
    """
    starts = document_starts(positions)
    cu_seqlens = F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=positions.numel())
    found = int(cu_seqlens.diff().max())
    max_seqlen = longest or found
    padding = len(positions) * (most_documents or int(starts.sum(1).max())) + 1 - len(cu_seqlens)
    assert found <= max_seqlen and padding >= 0, "documents are longer or more than their rows say"
    return F.pad(cu_seqlens, (0, padding), value=positions.numel()).int(), max_seqlen


def document_mask(positions, T, window, device):
    """(B or 1, 1, T, T) bool: which keys each query sees, given documents or a sliding window (window tokens)."""
    i = torch.arange(T, device=device)
    distance = i[:, None] - i  # from query to key
    mask = ((distance >= 0) & (distance < (window or T)))[None]
    if positions is not None:
        document = document_starts(positions).cumsum(1)  # (B, T)
        mask = mask & (document[:, :, None] == document[:, None, :])
    return mask[:, None]


def attention_mask(x, cfg, positions, bounds):
    """`mask` of attend() for x (B, T, C): None for plain causal rows, document bounds on a GPU, else a mask tensor."""
    (B, T, _), window = x.shape, cfg.sliding_window
    if positions is None and (window or T) >= T:
        return None
    if not (x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and cfg.head_dim % 8 == 0):
        return document_mask(positions, T, window, x.device)
    if bounds is None:
        bounds = document_bounds(torch.arange(T).expand(B, T) if positions is None else positions)
    return bounds[0].to(x.device, non_blocking=True), bounds[1]


def select_kernel(model, config, device):
    """Give blocks the kernel that a configurator.Config asks for; return its name. UserError if it cannot run here."""
    if not flash4.usable(config, device):
        return "PyTorch's"
    for block in model.layers:
        block.attn.attend = flash4.attend
    return "FlashAttention 4"


def attend(q, k, v, mask=None, window=None):
    """Causal attention of q (B, T, H, D) to k and v (B, T, K, D): (B, T, H, D), or (B * T, H, D) with bounds.

    mask: None for whole rows; document_bounds() on a GPU; or a document_mask(), (B, 1, T, T).
    window: number of earlier tokens that a query sees, None: all. Ignored when mask is a tensor, which includes it.
    """
    if isinstance(mask, tuple):
        cu_seqlens, max_seqlen = mask
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        left = -1 if window is None else window
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(left, 0),
                           **VARLEN_GQA)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
    options = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": k.shape[1] < q.shape[1]}
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
    # cuDNN is 1.7x as fast as flash on an H100. Choose the backend inside the traced region: the compile cache does not
    # key on an outer sdpa_kernel, so a cached graph with flash would be reused.
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                      SDPBackend.MATH], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def attend_one(q, k, v, position, mask, window):
    """Attention of a query q (1, 1, H, D) at `position`, int64 (1, 1), to keys and values k, v (1, L, K, D) up to it.

    All shapes are the same at every position, so that a CUDA graph can replay it. mask: a tuple where the GPU has a
    kernel for it: cu_seqlens of query and keys, int32 (2, 2), and L. window: as in attend().
    """
    if isinstance(mask, tuple):
        (query, keys), length = mask
        left_right = (-1, -1) if window is None else (window, 0)  # (-1, -1): the kernel splits the keys over the GPU
        return varlen_attn(q[0], k[0], v[0], query, keys, 1, length, window_size=left_right, **VARLEN_GQA)
    distance = position - torch.arange(k.shape[1], device=k.device)  # (1, L)
    seen = (distance >= 0) & (distance <= (k.shape[1] if window is None else window))
    return attend(q, k, v, seen[None, None])


# ----------------------------------------------------------------------------------------------------------------
# rotary positions

OriginalLength = Annotated[int, "int >= 2", lambda tokens: tokens >= 2]  # the logarithm of 1, 0, would divide


@dataclass(kw_only=True)
class RopeScaling:
    """How rotary frequencies change for a context longer than the one a model was first trained on."""

    kind: Literal["llama3", "linear", "yarn", "longrope"] = "llama3"  # the formula
    factor: PositiveFloat = 8.0  # how many times longer the context gets
    original_max_position: OriginalLength = 8192  # context length of the first training (linear ignores it)
    low_freq_factor: float = 1.0  # llama3: wavelengths above original / low_freq_factor are stretched in full
    high_freq_factor: float = 4.0  # llama3: wavelengths below original / high_freq_factor stay
    beta_fast: PositiveFloat = 32.0  # yarn: frequencies with more turns than this in the original context stay
    beta_slow: PositiveFloat = 1.0  # yarn: frequencies with fewer turns are stretched in full
    short_factors: list[PositiveFloat] = field(default_factory=list)  # longrope: divisor of each frequency
    long_factors: list[PositiveFloat] = field(default_factory=list)  # longrope: the same beyond the original context
    attention_factor: float | None = None  # yarn, longrope: multiplies cos and sin; None: as in the papers


def rope_tables(cfg, device):
    """cos and sin of each position's rotary angles: two (block_size, turned dims / 2) float32 tensors.

    longrope has (2 * block_size, ...): after the rows for short documents, those for documents beyond the original
    context.
    Sources: arXiv 2309.00071 (yarn), 2402.13753 (longrope), Llama 3.1's reference code (apply_scaling).
    """
    dims, s = int(cfg.head_dim * cfg.rope_fraction), cfg.rope_scaling
    freqs = cfg.rope_theta ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    sets, magnitude = [freqs], 1.0
    if s and s.kind == "longrope":
        sets = [freqs / torch.tensor(factors, device=device) for factors in (s.short_factors, s.long_factors)]
        magnitude = math.sqrt(1 + math.log(max(s.factor, 1)) / math.log(s.original_max_position))
    elif s:
        keep = torch.zeros_like(freqs)  # linear: every frequency is stretched
        if s.kind == "llama3":  # between the two wavelength bounds the stretch fades in linearly
            turns = s.original_max_position * freqs / (2 * math.pi)  # full turns within the original context
            keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        if s.kind == "yarn":  # it fades in linearly between the two pairs that make beta_fast and beta_slow turns
            pair = [dims * math.log(s.original_max_position / (2 * math.pi * beta)) / (2 * math.log(cfg.rope_theta))
                    for beta in (s.beta_fast, s.beta_slow)]
            fast, slow = max(math.floor(pair[0]), 0), min(math.ceil(pair[1]), dims - 1)
            keep = 1 - ((torch.arange(len(freqs), device=device) - fast) / max(slow - fast, 1e-3)).clamp(0, 1)
            magnitude = 0.1 * math.log(max(s.factor, 1)) + 1
        sets = [keep * freqs + (1 - keep) * freqs / s.factor]
    if s and s.attention_factor is not None:
        magnitude = s.attention_factor
    if cfg.attention_multiplier is not None:  # scores are q @ k, so each of the two takes the root of it
        magnitude *= math.sqrt(cfg.attention_multiplier * math.sqrt(cfg.head_dim))
    positions = torch.arange(cfg.block_size, device=device, dtype=torch.float32)
    angles = torch.cat([torch.outer(positions, freqs) for freqs in sets])
    return magnitude * angles.cos(), magnitude * angles.sin()


def rope_rows(cfg, T, positions):
    """The rows of rope_tables for T tokens: a slice, or with positions (B, T) int64.

    In longrope each document's own length decides which frequencies it gets.
    """
    scaling = cfg.rope_scaling
    if scaling is None or scaling.kind != "longrope":
        return slice(T) if positions is None else positions
    if positions is None:
        first = cfg.block_size if T > scaling.original_max_position else 0
        return slice(first, first + T)
    document = document_starts(positions).cumsum(1) - 1
    last = torch.zeros_like(positions).scatter_reduce(1, document, positions, "amax").gather(1, document)
    return positions + cfg.block_size * (last >= scaling.original_max_position)


def apply_rope(x, cos, sin):
    """Rotate the pairs (x[i], x[i + n]) of x (B, T, heads, D) by position, n = cos.shape[-1]; Hugging Face pairs so."""
    x1, x2, *rest = x.float().split(cos.shape[-1], dim=-1)  # rest: what a rope_fraction below 1 leaves out
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (T, 1, n) or (B, T, 1, n): the same for every head
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, *rest), dim=-1).to(x.dtype)
