"""The decoder: one `Transformer` whose sizes and switches make it Llama 3.1, SmolLM2, or your own.

Pre-norm blocks of attention (rotary positions, grouped queries) and SwiGLU, without biases and without dropout.
Query, key and value are one matrix (`qkv`), gate and up are one matrix (`gate_up`): fewer and larger matmuls, and
in FP8 one cast of the input where there would be three. Shapes in comments: B batch, T time, C width (n_embd),
H query heads, K key/value heads, D head_dim, F ffn_dim, V vocabulary.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

IGNORE = -100  # a target with this value is no part of the loss


@dataclass(kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary frequencies to a longer context."""

    factor: float = 8.0  # by how much the low frequencies slow down
    low_freq_factor: float = 1.0  # wavelengths above original / low_freq_factor are stretched in full
    high_freq_factor: float = 4.0  # wavelengths below original / high_freq_factor stay
    original_max_position: int = 8192  # context length that the model was first trained on


@dataclass(kw_only=True)
class ModelConfig:
    """Sizes and switches of one decoder. The functions below (`llama3_1_8b()`, ...) fill it in."""

    vocab_size: int = 272  # rows of the embedding and of lm_head; more than the largest token id
    block_size: int = 256  # tokens per training sequence, and the longest context that sample.py uses
    n_layer: int = 4  # transformer blocks
    n_head: int = 6  # query heads
    n_kv_head: int = 6  # key/value heads (fewer than n_head: grouped-query attention)
    n_embd: int = 192  # width of the residual stream
    head_dim: int = 32  # width of one head (n_head * head_dim need not equal n_embd)
    ffn_dim: int = 512  # hidden width of the SwiGLU MLP
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # Llama 3.1's long-context frequencies
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    tie_embeddings: bool = False  # lm_head uses the embedding matrix

    def problems(self):
        """What is wrong with these values taken together, one sentence each."""
        sizes = ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "ffn_dim")
        for name in sizes:
            if getattr(self, name) < 1:
                yield f"model.{name}={getattr(self, name)} must be at least 1"
        if self.n_kv_head >= 1 and self.n_head % self.n_kv_head:
            yield f"model.n_head={self.n_head} must be a multiple of model.n_kv_head={self.n_kv_head}"
        if self.head_dim % 2:
            yield f"model.head_dim={self.head_dim} must be even: rotary positions turn pairs"


def llama3_1_8b(**changes):
    """Llama 3.1 8B (8,030,261,248 parameters). Source: its published config.json."""
    sizes = ModelConfig(vocab_size=128256, block_size=8192, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096,
                        head_dim=128, ffn_dim=14336, rope_theta=500000.0, rope_scaling=RopeScaling())
    return replace(sizes, **changes)


def smollm2_135m(**changes):
    """SmolLM2 135M (134,515,008 parameters), tied embeddings. Source: its published config.json."""
    sizes = ModelConfig(vocab_size=49152, block_size=2048, n_layer=30, n_head=9, n_kv_head=3, n_embd=576,
                        head_dim=64, ffn_dim=1536, rope_theta=100000.0, tie_embeddings=True)
    return replace(sizes, **changes)


def llama_100m(**changes):
    """A Llama of about 100M parameters, wide enough for FP8 to be worth trying: for experiments, not published."""
    sizes = ModelConfig(vocab_size=512, block_size=1024, n_layer=12, n_head=12, n_kv_head=4, n_embd=768,
                        head_dim=64, ffn_dim=3072)
    return replace(sizes, **changes)


def llama_tiny(**changes):
    """1.8M parameters: learns to write bytes that look like Python in three minutes on two CPU cores."""
    return replace(ModelConfig(), **changes)


# ----------------------------------------------------------------------------------------------------------------
# layers


def rope_tables(cfg, device):
    """cos and sin of each position's rotary angles: two (block_size, head_dim / 2) float32 tensors."""
    freqs = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2, device=device, dtype=torch.float32) / cfg.head_dim)
    if (s := cfg.rope_scaling) is not None:
        # between the two wavelength bounds the stretch fades in linearly (Llama 3.1 reference code, apply_scaling)
        turns = s.original_max_position * freqs / (2 * math.pi)  # full turns within the original context
        keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / s.factor
    angles = torch.outer(torch.arange(cfg.block_size, device=device, dtype=torch.float32), freqs)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate the pairs (x[i], x[i + D/2]) of x (B, T, heads, D) by position; the Hugging Face pairing."""
    x1, x2 = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, D/2): the same for every head
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = cfg.n_head, cfg.n_kv_head, cfg.head_dim
        self.qkv = nn.Linear(cfg.n_embd, (cfg.n_head + 2 * cfg.n_kv_head) * cfg.head_dim, bias=False)
        self.out = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=False)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape  # (B, T, C)
        qkv = self.qkv(x).view(B, T, -1, self.head_dim)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
        gqa = self.n_kv_head < self.n_head
        if x.is_cuda:
            # cuDNN is 1.7x flash on an H100 (docs/performance.md). The choice stands inside the traced region because
            # the compile cache does not key on an outer sdpa_kernel (FACTS: a cached flash graph would be reused).
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                              SDPBackend.MATH], set_priority=True):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_up = nn.Linear(cfg.n_embd, 2 * cfg.ffn_dim, bias=False)
        self.down = nn.Linear(cfg.ffn_dim, cfg.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.attn_norm = nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.attn = Attention(cfg)
        self.mlp_norm = nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, cos, sin):
        x = x + self.attn(self.attn_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


# ----------------------------------------------------------------------------------------------------------------
# the model


class Transformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.tie_weights()
        # not in checkpoints, rebuilt from the config by init_weights
        self.register_buffer("cos", torch.empty(cfg.block_size, cfg.head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(cfg.block_size, cfg.head_dim // 2), persistent=False)

    def tie_weights(self):
        """Make lm_head use the embedding matrix if the config says so; again after to_empty, which unties them."""
        if self.cfg.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens, targets=None, loss_chunks=1):
        """Logits of `tokens`, or with `targets` the summed cross-entropy.

        tokens, targets: (B, T) int64; targets equal to IGNORE do not count. Returns (B, T, V) logits, or the sum over
        all counted targets in nats, a float32 scalar: a sum, because ranks with unequal numbers of targets have to
        divide by the global count. loss_chunks > 1 computes the loss in that many pieces (see ChunkedLoss).
        """
        T = tokens.shape[1]
        x = self.embed(tokens)  # (B, T, C)
        for layer in self.layers:
            x = layer(x, self.cos[:T], self.sin[:T])
        if targets is None:
            return self.lm_head(self.norm(x))
        x, targets = x.flatten(0, 1), targets.flatten()  # (B*T, C), (B*T,)
        if loss_chunks == 1:
            return self.head_loss(x, targets)
        if not torch.is_grad_enabled():
            chunks = zip(x.chunk(loss_chunks), targets.chunk(loss_chunks), strict=True)
            return sum(self.head_loss(*chunk) for chunk in chunks)
        return ChunkedLoss.apply(x, targets, loss_chunks, self.head_loss, self.norm.weight, self.lm_head.weight)

    def head_loss(self, x, targets):
        """Summed cross-entropy in nats of x (N, C) against targets (N,). Compiled: no float32 logits in memory."""
        logits = self.lm_head(self.norm(x))  # (N, V)
        return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")


class ChunkedLoss(torch.autograd.Function):
    """The loss and its gradients piece by piece, all in forward, so that only one piece's logits exist at a time.

    8192 tokens x 128256 entries are 2 GiB of bf16 logits and as much again for their gradient. Recomputing the head
    in backward would save the same memory but cost a third more head matmuls; this costs none. The pieces' gradients of
    norm and head add up in the weights' dtype, as gradient accumulation does.
    Source: the idea of Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx, x, targets, n_chunks, head_loss, *weights):
        total, grads = x.new_zeros((), dtype=torch.float32), None
        grad_x = torch.empty_like(x)
        for x_i, targets_i, grad_x_i in zip(
            x.chunk(n_chunks), targets.chunk(n_chunks), grad_x.chunk(n_chunks), strict=True
        ):
            x_i = x_i.detach().requires_grad_()
            with torch.enable_grad():
                loss = head_loss(x_i, targets_i)
            g_x, *g = torch.autograd.grad(loss, (x_i, *weights))
            total += loss.detach()
            grad_x_i.copy_(g_x)
            if grads is None:
                grads = g
            else:
                torch._foreach_add_(grads, g)
        ctx.save_for_backward(grad_x, *grads)
        return total

    @staticmethod
    def backward(ctx, grad):
        # in place: nothing else holds them, and the head's gradient alone is 1 GiB at 8B
        grad_x, *grads = (g.mul_(grad) for g in ctx.saved_tensors)
        return grad_x, None, None, None, *grads


@torch.no_grad()
def init_weights(model, seed, local):
    """Fill every parameter and buffer: normal(0, 0.02), projections into the residual stream scaled by depth.

    The values depend on seed and parameter name alone, never on the number of ranks: each rank draws the whole
    tensor (one at a time) and keeps its rows. `local(p)` gives the plain tensor that a parameter's shard is stored
    in. Source of the scaling: GPT-2 (Radford et al. 2019, section 2.3).
    """
    cfg = model.cfg
    device = model.cos.device
    model.tie_weights()
    model.cos, model.sin = rope_tables(cfg, device)
    for i, (name, p) in enumerate(model.named_parameters()):
        if name.endswith("norm.weight"):
            local(p).fill_(1.0)
            continue
        residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
        std = 0.02 / math.sqrt(2 * cfg.n_layer) if residual else 0.02
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + i)
        full = torch.empty(p.shape, device=device, dtype=torch.float32).normal_(std=std, generator=generator)
        local(p).copy_(shard_rows(full, p))


def shard_rows(full, p):
    """The rows of `full` that this rank's shard of parameter `p` holds (all of them where p is not sharded)."""
    if not hasattr(p, "placements"):
        return full
    for dim, placement in enumerate(p.placements):
        if placement.is_shard():
            # chunk() cuts as FSDP2 does: equal pieces, the last ones shorter or empty
            pieces = full.chunk(p.device_mesh.size(dim), dim=placement.dim)
            rank = p.device_mesh.get_local_rank(dim)
            full = pieces[rank] if rank < len(pieces) else full[:0]
    return full
