"""FlashAttention 4 (https://github.com/Dao-AILab/flash-attention) as an operator that torch.compile can trace.

torch.nn.attention.activate_flash_attention_impl would do the same, but torch 2.11 to 2.13 unpack two outputs where
flash-attn-4 has returned more since 4.0.0b20. Delete this file when a torch release fits.
"""

import importlib.metadata
import warnings

import torch
from torch.torch_version import TorchVersion

from plumbing.errors import UserError

MIN_VERSION = "4.0.0b36"  # the version that was tested; earlier ones take other arguments
INSTALL = "pip install --pre flash-attn-4 'nvidia-cutlass-dsl[cu13]'"


def usable(config, device):
    """Whether a configurator.Config trains with it: flash4=None: where it can; True: always; False: never.

    Raises UserError where flash4=True cannot be done, and for an installation that cannot be imported.
    """
    if config.flash4 is False:
        return False
    generation = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    widest = {9: 256, 10: 128}.get(generation)  # Hopper, Blackwell
    width, problem = config.model.head_dim, None
    try:
        installed = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        installed = "0"
    if widest is None:
        problem = "it has kernels for Hopper and Blackwell GPUs only"
    elif config.dtype != "bfloat16":
        problem = f"it needs dtype=bfloat16, not {config.dtype}"
    elif width % 8 or width > widest:
        problem = f"it needs heads whose width divides by 8, up to {widest} on this GPU, not model.head_dim={width}"
    elif TorchVersion(installed) < MIN_VERSION:
        problem = f"it needs flash-attn-4 {MIN_VERSION} or newer: {INSTALL} (cu12 for a torch with CUDA 12)"
    if problem:
        if config.flash4:
            raise UserError(f"flash4=True: {problem}; or set flash4=False")
        return False
    try:
        # of each kernel that it compiles
        warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted to a JitArgument")
        import flash_attn.cute.interface  # noqa: F401
    except Exception as error:  # CUDA libraries of its own raise errors of many kinds
        raise UserError(f"flash-attn-4 {installed} cannot be imported ({type(error).__name__}: {error}): {INSTALL}, "
                        "or set flash4=False") from error
    return True


def attend(q, k, v, mask=None, window=None):
    """attention.attend() for whole rows and document bounds, which is all that a GPU gets in bfloat16."""
    if mask is None:
        return forward(q, k, v, None, None, None)[0]
    cu_seqlens, max_seqlen = mask
    return forward(*(t.flatten(0, 1) for t in (q, k, v)), cu_seqlens, max_seqlen, window)[0]


@torch.library.custom_op("nanofp8::flash4", mutates_args=())
def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None,
            max_seqlen: int | None, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of attend(), and the logsumexp of each query's scores (float32) for backward."""
    from flash_attn.cute.interface import _flash_attn_fwd

    return _flash_attn_fwd(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
                           max_seqlen_k=max_seqlen, causal=True, window_size_left=window, return_lse=True)[:2]


@forward.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, window):
    *batch, T, H, _ = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(*batch, H, T, dtype=torch.float32)


@torch.library.custom_op("nanofp8::flash4_backward", mutates_args=())
def backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
             lse: torch.Tensor, cu_seqlens: torch.Tensor | None, max_seqlen: int | None,
             window: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    from flash_attn.cute.interface import _flash_attn_bwd

    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    _flash_attn_bwd(q, k, v, out, grad, lse, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
                    max_seqlen_k=max_seqlen, causal=True, window_size_left=window, dq=grads[0], dk=grads[1],
                    dv=grads[2], deterministic=torch.are_deterministic_algorithms_enabled())
    return tuple(grads)


@backward.register_fake
def _(grad, q, k, v, *others):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def save(ctx, inputs, output):
    *qkv, cu_seqlens, ctx.max_seqlen, ctx.window = inputs
    ctx.save_for_backward(*qkv, *output, cu_seqlens)


def gradients(ctx, grad, grad_lse):
    *tensors, cu_seqlens = ctx.saved_tensors
    return *backward(grad, *tensors, cu_seqlens, ctx.max_seqlen, ctx.window), None, None, None


forward.register_autograd(gradients, setup_context=save)
