"""Attention: which tokens a query sees, and the kernel that computes it.

A query sees itself and the tokens before it: in rows packed with several documents only those of its own document, with
a sliding window only the nearest. A GPU has kernels for all three (cuDNN's for whole rows, flash attention's for the
others); elsewhere a mask says so. `flash4=True` takes FlashAttention 4's kernels for Hopper and Blackwell instead: they
are faster, and have to be installed. Shapes: B batch, T time, H query heads, K key/value heads, D width of a head.
"""

import importlib.metadata
import inspect

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.torch_version import TorchVersion

from plumbing.errors import UserError

# torch 2.11 takes fewer key/value heads than query heads as they come, later ones want to be told
VARLEN_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
MIN_FLASH4 = "4.0.0b36"  # what was tried: earlier ones have other arguments
INSTALL_FLASH4 = "pip install --pre flash-attn-4 'nvidia-cutlass-dsl[cu13]'"


def document_starts(positions):
    """(B, T) bool: whether a document begins here. positions: of each token within its own document."""
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
    """(B or 1, 1, T, T) bool: which keys a query sees, where that is not all before it."""
    i = torch.arange(T, device=device)
    distance = i[:, None] - i  # of a query to a key
    mask = ((distance >= 0) & (distance < (window or T)))[None]
    if positions is not None:
        document = document_starts(positions).cumsum(1)  # (B, T)
        mask = mask & (document[:, :, None] == document[:, None, :])
    return mask[:, None]


def attend(q, k, v, mask=None, window=None, flash4=False):
    """Causal attention of q (B, T, H, D) to k and v (B, T, K, D): (B, T, H, D), or (B * T, H, D) with bounds.

    mask: None for whole rows; a GPU's document_bounds(), (cu_seqlens, max_seqlen); or a document_mask() (B, 1, T, T).
    window: tokens before itself that a query sees, None: all; it counts with bounds only, a mask has it inside.
    """
    if isinstance(mask, tuple):
        cu_seqlens, max_seqlen = mask
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        if flash4:
            return flash4_forward(q, k, v, cu_seqlens, max_seqlen, window)[0]
        left_right = (-1 if window is None else window, 0)
        lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen  # of queries and of keys
        return varlen_attn(q, k, v, *lengths, window_size=left_right, **VARLEN_GQA)
    if flash4 and mask is None:
        return flash4_forward(q, k, v, None, None, None)[0]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
    how = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": k.shape[1] < q.shape[1]}
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2)
    # cuDNN is 1.7x flash on an H100. The choice stands inside the traced region because the compile cache does not key
    # on an outer sdpa_kernel: a cached graph with flash would be used again.
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                      SDPBackend.MATH], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------------
# FlashAttention 4 (https://github.com/Dao-AILab/flash-attention) as an operator that torch.compile and recompute know.
# torch.nn.attention.activate_flash_attention_impl would do it, but torch 2.11 to 2.13 unpack two outputs where
# flash-attn-4 has given more since 4.0.0b20. This can go when the two fit.


def check_flash4(config, device):
    """UserError where a configurator.Config asks for flash4 and cannot have it."""
    if not config.flash4:
        return
    generation = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    widest = {9: 256, 10: 128}.get(generation)  # Hopper, Blackwell
    width, why = config.model.head_dim, None
    if widest is None:
        why = "it has kernels for Hopper and Blackwell GPUs only"
    elif config.dtype != "bfloat16":
        why = f"it needs dtype=bfloat16, not {config.dtype}"
    elif width % 8 or width > widest:
        why = f"it needs heads whose width divides by 8, up to {widest} on this GPU, not model.head_dim={width}"
    else:
        try:
            if TorchVersion(installed := importlib.metadata.version("flash-attn-4")) < MIN_FLASH4:
                why = f"flash-attn-4 {installed} is too old: {INSTALL_FLASH4}"
        except importlib.metadata.PackageNotFoundError:
            why = f"it is not installed: {INSTALL_FLASH4} (cu12 for a torch with CUDA 12)"
    if why:
        raise UserError(f"flash4=True: {why}; or set flash4=False")


@torch.library.custom_op("nanofp8::flash4", mutates_args=())
def flash4_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None,
                   max_seqlen: int | None, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """As attend(), and for backward the log of each query's sum of exponentials, float32. With bounds without B."""
    from flash_attn.cute.interface import _flash_attn_fwd

    return _flash_attn_fwd(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
                           max_seqlen_k=max_seqlen, causal=True, window_size_left=window, return_lse=True)[:2]


@flash4_forward.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, window):
    *batch, T, H, _ = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(*batch, H, T, dtype=torch.float32)


@torch.library.custom_op("nanofp8::flash4_backward", mutates_args=())
def flash4_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
                    lse: torch.Tensor, cu_seqlens: torch.Tensor | None, max_seqlen: int | None,
                    window: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    from flash_attn.cute.interface import _flash_attn_bwd

    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    _flash_attn_bwd(q, k, v, out, grad, lse, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
                    max_seqlen_k=max_seqlen, causal=True, window_size_left=window, dq=grads[0], dk=grads[1],
                    dv=grads[2], deterministic=torch.are_deterministic_algorithms_enabled())
    return tuple(grads)


@flash4_backward.register_fake
def _(grad, q, k, v, *others):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def flash4_save(ctx, inputs, output):
    *qkv, cu_seqlens, ctx.max_seqlen, ctx.window = inputs
    ctx.save_for_backward(*qkv, *output, cu_seqlens)


def flash4_gradients(ctx, grad, grad_lse):
    *tensors, cu_seqlens = ctx.saved_tensors
    return *flash4_backward(grad, *tensors, cu_seqlens, ctx.max_seqlen, ctx.window), None, None, None


flash4_forward.register_autograd(flash4_gradients, setup_context=flash4_save)
