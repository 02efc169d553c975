"""Attention: which tokens a query sees, and the kernel that computes it.

A query sees itself and earlier tokens: only those of its own document in packed rows, only the nearest ones with a
sliding window. GPUs have kernels for all three (cuDNN for whole rows, variable-length flash attention for documents and
windows); other devices use a mask. `flash4=True` selects FlashAttention 4 for Hopper and Blackwell, which is faster and
has to be installed. Shapes: B batch, T time, H query heads, K key/value heads, D width of a head.

A new kernel: call it in `attend`, and add its operator to `SAVED_OPS` so that selective recompute keeps its output.
"""

import inspect

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from plumbing import flash4 as flash_attention_4

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
    of the whole run, so that torch.compile sees one bound and one shape; without them both are rounded up, and it sees
    few. Call this while positions are on the CPU: how many documents there are depends on their values, and reading
    that from a GPU stalls it.
    """
    cu_seqlens = document_starts(positions).flatten().nonzero().flatten()
    cu_seqlens = F.pad(cu_seqlens, (0, 1), value=positions.numel())
    found = int(cu_seqlens.diff().max())
    if longest is None:
        max_seqlen = max(128, 1 << (found - 1).bit_length())  # 128: one tile of the kernel
        n = max(16, 1 << (len(cu_seqlens) - 1).bit_length())
    else:
        max_seqlen, n = longest, len(positions) * most_documents + 1
    assert found <= max_seqlen and len(cu_seqlens) <= n, "documents are longer or more than their rows say"
    return F.pad(cu_seqlens, (0, n - len(cu_seqlens)), value=positions.numel()).int(), max_seqlen


def document_mask(positions, T, window, device):
    """(B or 1, 1, T, T) bool: which keys each query sees, given documents or a sliding window (window tokens)."""
    i = torch.arange(T, device=device)
    distance = i[:, None] - i  # from query to key
    mask = ((distance >= 0) & (distance < (window or T)))[None]
    if positions is not None:
        document = document_starts(positions).cumsum(1)  # (B, T)
        mask = mask & (document[:, :, None] == document[:, None, :])
    return mask[:, None]


def attend(q, k, v, mask=None, window=None, flash4=False):
    """Causal attention of q (B, T, H, D) to k and v (B, T, K, D): (B, T, H, D), or (B * T, H, D) with bounds.

    mask: None for whole rows; document_bounds() on a GPU; or a document_mask(), (B, 1, T, T).
    window: number of earlier tokens that a query sees, None: all. Ignored when mask is a tensor, which includes it.
    """
    if isinstance(mask, tuple):
        cu_seqlens, max_seqlen = mask
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        if flash4:
            return flash_attention_4.forward(q, k, v, cu_seqlens, max_seqlen, window)[0]
        left = -1 if window is None else window
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(left, 0),
                           **VARLEN_GQA)
    if flash4 and mask is None:
        return flash_attention_4.forward(q, k, v, None, None, None)[0]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
    options = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": k.shape[1] < q.shape[1]}
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
    # cuDNN is 1.7x as fast as flash on an H100. Choose the backend inside the traced region: the compile cache does not
    # key on an outer sdpa_kernel, so a cached graph with flash would be reused.
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                      SDPBackend.MATH], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
