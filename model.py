"""The decoder: one `Transformer` whose sizes and switches make it Llama, Mistral, Qwen, Phi-4, or your own.

Pre-norm blocks of attention (rotary positions, grouped queries) and SwiGLU, without dropout.
Query, key and value are one matrix (`qkv`), gate and up are one matrix (`gate_up`): fewer and larger matmuls, and
in FP8 one cast of the input where there would be three. Shapes in comments: B batch, T time, C width (n_embd),
H query heads, K key/value heads, D head_dim, F ffn_dim, V vocabulary.
"""

import copy
import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import SAVED_OPS, RopeScaling, apply_rope, attend, attention_mask, rope_rows, rope_tables
from plumbing.errors import UserError
from plumbing.schema import Natural, NonNegativeFloat, PositiveFloat, PositiveInt
from plumbing.sharding import plain_local, shard_rows

IGNORE = -100  # targets with this value do not count in the loss


@dataclass(kw_only=True)
class ModelConfig:
    """Sizes and switches of one decoder. `llama3_1_8b()` and others below fill it in."""

    vocab_size: PositiveInt = 272  # rows of the embedding and of lm_head; more than the largest token id
    block_size: PositiveInt = 256  # tokens per training sequence, and the longest context that sample.py uses
    n_layer: PositiveInt = 4  # transformer blocks
    n_head: PositiveInt = 6  # query heads
    n_kv_head: PositiveInt = 6  # key/value heads (fewer than n_head: grouped-query attention)
    n_embd: PositiveInt = 192  # width of the residual stream
    head_dim: PositiveInt = 32  # width of one head (n_head * head_dim need not equal n_embd)
    ffn_dim: PositiveInt = 512  # hidden width of the SwiGLU MLP
    rope_theta: PositiveFloat = 10000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # long-context frequencies
    rope_fraction: float = 1.0  # part of each head that rotary positions turn; the rest stays as it is
    no_rope_interval: Natural = 0  # every n-th layer has no rotary positions (SmolLM3: 4); 0: every layer has them
    sliding_window: PositiveInt | None = None  # tokens that attention sees, with the token itself; None: all before it
    qk_norm: Literal["head", "all"] | None = None  # RMSNorm of q and k: each head (Qwen 3), or all at once (OLMo 2)
    qkv_bias: bool = False  # queries, keys and values have a bias
    out_bias: bool = False  # attention's output projection has a bias
    mlp_bias: bool = False  # the MLP's projections have a bias
    norm_after: bool = False  # RMSNorm after attention and MLP instead of before (OLMo 2)
    norm_eps: NonNegativeFloat = 1e-5  # added to the mean square in RMSNorm
    tie_embeddings: bool = False  # lm_head uses the embedding matrix
    embedding_multiplier: float = 1.0  # Granite's multipliers: of the embedding,
    residual_multiplier: float = 1.0  # of what attention and MLP add to the residual stream,
    attention_multiplier: PositiveFloat | None = None  # of attention's scores (None: 1 / sqrt(head_dim)),
    logit_divisor: PositiveFloat = 1.0  # and the divisor of the logits

    def __post_init__(self):
        self.rope_scaling = copy.deepcopy(self.rope_scaling)  # copy: the presets below share one instance

    def problems(self):
        """Yield a message for each contradiction between these values, with the keys involved."""
        if self.n_head % self.n_kv_head:
            yield f"model.n_head={self.n_head} must be a multiple of model.n_kv_head={self.n_kv_head}"
        turned = int(self.head_dim * self.rope_fraction)
        if self.head_dim % 2 or turned % 2 or turned < 2 or self.rope_fraction > 1:
            yield (f"rotary positions turn pairs: model.head_dim={self.head_dim} must be even, and "
                   f"model.rope_fraction={self.rope_fraction} must be above 0 and at most 1, and an even part of it")
        scaling, pairs = self.rope_scaling, turned // 2
        lengths = scaling and {len(scaling.short_factors), len(scaling.long_factors)}
        if scaling and scaling.kind == "longrope" and lengths != {pairs}:
            yield f"model.rope_scaling of kind longrope needs {pairs} short_factors and as many long_factors"
        if self.attention_multiplier is not None and (self.rope_fraction != 1 or self.no_rope_interval):
            yield ("model.attention_multiplier needs rotary positions in every layer and over the whole head: "
                   "model.no_rope_interval=0 and model.rope_fraction=1")


# Published models by their config.json, and two of our own. Each is called: llama3_1_8b(block_size=2048). block_size is
# what one trains at, not the longest that they can.
llama3_1_8b = partial(ModelConfig, vocab_size=128256, block_size=8192, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096,
                      head_dim=128, ffn_dim=14336, rope_theta=5e5, rope_scaling=RopeScaling())  # 8,030,261,248 weights
llama3_2_1b = partial(ModelConfig, vocab_size=128256, block_size=8192, n_layer=16, n_head=32, n_kv_head=8, n_embd=2048,
                      head_dim=64, ffn_dim=8192, rope_theta=5e5, rope_scaling=RopeScaling(factor=32.0),
                      tie_embeddings=True)  # 1,235,814,400
mistral_7b = partial(ModelConfig, vocab_size=32000, block_size=8192, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096,
                     head_dim=128, ffn_dim=14336, sliding_window=4096)  # v0.1; 7,241,732,096
mistral_nemo = partial(ModelConfig, vocab_size=131072, block_size=8192, n_layer=40, n_head=32, n_kv_head=8, n_embd=5120,
                       head_dim=128, ffn_dim=14336, rope_theta=1e6)  # 2407; 12,247,782,400
qwen2_5_7b = partial(ModelConfig, vocab_size=152064, block_size=8192, n_layer=28, n_head=28, n_kv_head=4, n_embd=3584,
                     head_dim=128, ffn_dim=18944, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True)  # 7,615,616,512
phi_4 = partial(ModelConfig, vocab_size=100352, block_size=8192, n_layer=40, n_head=40, n_kv_head=10, n_embd=5120,
                head_dim=128, ffn_dim=17920, rope_theta=250000.0)  # 14,659,507,200
qwen3_8b = partial(ModelConfig, vocab_size=151936, block_size=8192, n_layer=36, n_head=32, n_kv_head=8, n_embd=4096,
                   head_dim=128, ffn_dim=12288, rope_theta=1e6, norm_eps=1e-6, qk_norm="head")  # 8,190,735,360
smollm2_135m = partial(ModelConfig, vocab_size=49152, block_size=2048, n_layer=30, n_head=9, n_kv_head=3, n_embd=576,
                       head_dim=64, ffn_dim=1536, rope_theta=1e5, tie_embeddings=True)  # 134,515,008
llama_100m = partial(ModelConfig, vocab_size=512, block_size=1024, n_layer=12, n_head=12, n_kv_head=4, n_embd=768,
                     head_dim=64, ffn_dim=3072)  # wide enough for FP8 to be worth trying; for experiments
llama_tiny = partial(ModelConfig)  # 1.9M: learns to write bytes that look like Python in minutes on two CPU cores


# ----------------------------------------------------------------------------------------------------------------
# layers


class Attention(nn.Module):
    attend = staticmethod(attend)  # attention.select_kernel gives blocks another one

    def __init__(self, cfg, layer=0):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = cfg.n_head, cfg.n_kv_head, cfg.head_dim
        self.window = cfg.sliding_window and cfg.sliding_window - 1  # tokens before itself that one sees; None: all
        self.rotary = not cfg.no_rope_interval or (layer + 1) % cfg.no_rope_interval != 0
        self.qkv = nn.Linear(cfg.n_embd, (cfg.n_head + 2 * cfg.n_kv_head) * cfg.head_dim, bias=cfg.qkv_bias)
        self.out = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=cfg.out_bias)
        self.q_norm = self.k_norm = None
        if cfg.qk_norm:
            sizes = (1, 1) if cfg.qk_norm == "head" else (cfg.n_head, cfg.n_kv_head)  # heads normed together
            self.q_norm, self.k_norm = (nn.RMSNorm(n * cfg.head_dim, eps=cfg.norm_eps) for n in sizes)

    def forward(self, x, cos, sin, mask=None):  # x: (B*T, C)
        T = cos.shape[-2]
        qkv = self.qkv(x).view(-1, T, self.n_head + 2 * self.n_kv_head, self.head_dim)  # (B, T, heads, D)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        if self.q_norm is not None:
            q = self.q_norm(q.reshape(-1, *self.q_norm.normalized_shape)).view(q.shape)
            k = self.k_norm(k.reshape(-1, *self.k_norm.normalized_shape)).view(k.shape)
        if self.rotary:
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        y = self.attend(q, k, v, mask, self.window)
        return self.out(y.reshape(x.shape[0], -1))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_up = nn.Linear(cfg.n_embd, 2 * cfg.ffn_dim, bias=cfg.mlp_bias)
        self.down = nn.Linear(cfg.ffn_dim, cfg.n_embd, bias=cfg.mlp_bias)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B*T, F) each
        return self.down(F.silu(gate) * up)  # families.py writes "hidden_act": "silu"


class Block(nn.Module):
    def __init__(self, cfg, layer=0):
        super().__init__()
        self.norm_after, self.residual_multiplier = cfg.norm_after, cfg.residual_multiplier
        self.attn_norm = nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.attn = Attention(cfg, layer)
        self.mlp_norm = nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, cos, sin, mask=None):
        if self.norm_after:
            x = x.add(self.attn_norm(self.attn(x, cos, sin, mask)), alpha=self.residual_multiplier)
            return x.add(self.mlp_norm(self.mlp(x)), alpha=self.residual_multiplier)
        x = x.add(self.attn(self.attn_norm(x), cos, sin, mask), alpha=self.residual_multiplier)
        return x.add(self.mlp(self.mlp_norm(x)), alpha=self.residual_multiplier)


def layer_kind(fqn):
    """The name of a module without its layer number, the same in every block: mlp.down for layers.3.mlp.down."""
    return re.sub(r"^layers\.\d+\.", "", fqn)


def calls_per_pass(fqn, loss_chunks):
    """How often linear layer `fqn` runs in a forward pass, each time on an equal part of the tokens."""
    return loss_chunks if fqn == "lm_head" else 1


# ----------------------------------------------------------------------------------------------------------------
# the model


class Transformer(nn.Module):
    saved_ops = SAVED_OPS  # what selective recompute keeps beside matmuls (plumbing/compiling.py)

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.layers = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.tie_weights()
        # not in checkpoints: init_buffers rebuilds them from the config
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)

    def tie_weights(self):
        """Make lm_head use the embedding matrix if the config says so. Call it again after to_empty, which unties."""
        if self.cfg.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def init_buffers(self):
        self.cos, self.sin = rope_tables(self.cfg, self.cos.device)

    def forward(self, tokens, targets=None, loss_chunks=1, positions=None, bounds=None):
        """(B, T, V) logits of `tokens`, or with `targets` the summed cross-entropy in nats, a float32 scalar.

        tokens, targets: (B, T) int64; targets equal to IGNORE do not count. A sum, because ranks with unequal numbers
        of targets have to divide by the global count. loss_chunks: pieces that the loss is computed in (ChunkedLoss).
        positions: (B, T) int64, each token's position in its own document, for packed rows: attention stays within
        documents. bounds: document_bounds(positions), computed before positions went to the GPU.
        """
        T = tokens.shape[1]
        x = self.embed(tokens)  # (B, T, C)
        if self.cfg.embedding_multiplier != 1:
            x = x * self.cfg.embedding_multiplier
        rows = rope_rows(self.cfg, T, positions)
        cos, sin = self.cos[rows], self.sin[rows]
        mask = attention_mask(x, self.cfg, positions, bounds)
        # All tokens in one dimension, as in torchao's backward: the compiler then sees that a linear layer's input has
        # the same amax as in forward, and does not compute it twice.
        x = x.flatten(0, 1)  # (B*T, C)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        if targets is None:
            return self.logits(x).unflatten(0, tokens.shape)
        targets = targets.flatten()
        if loss_chunks == 1:
            return self.head_loss(x, targets)
        if not torch.is_grad_enabled():
            return sum(map(self.head_loss, x.chunk(loss_chunks), targets.chunk(loss_chunks)))
        return ChunkedLoss.apply(x, targets, loss_chunks, self.head_loss, self.norm.weight, self.lm_head.weight)

    def logits(self, x):
        """(N, V) from what the last block gives, (N, C)."""
        logits = self.lm_head(self.norm(x))
        return logits if self.cfg.logit_divisor == 1 else logits / self.cfg.logit_divisor

    def head_loss(self, x, targets):
        """Summed cross-entropy in nats of x (N, C) against targets (N,). Compiled: no float32 logits in memory."""
        return F.cross_entropy(self.logits(x).float(), targets, ignore_index=IGNORE, reduction="sum")


class ChunkedLoss(torch.autograd.Function):
    """The loss and its gradients in pieces, all in forward, so that only one piece's logits exist at a time.

    8192 tokens x 128256 entries are 2 GiB of bf16 logits, and their gradient is 2 GiB more. Recomputing the head in
    backward would save the same memory for a third more head matmuls; this adds none. Gradients of norm and head are
    summed over the pieces in the weights' dtype, as gradient accumulation does.
    Source: the idea of Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx, x, targets, n_chunks, head_loss, *weights):
        total, grads = x.new_zeros((), dtype=torch.float32), None
        grad_x = torch.empty_like(x)
        pieces = zip(*(tensor.chunk(n_chunks) for tensor in (x, targets, grad_x)), strict=True)
        for x_i, targets_i, grad_x_i in pieces:
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
        # in place: nothing else refers to them, and the head's gradient alone is 1 GiB at 8B
        grad_x, *grads = (g.mul_(grad) for g in ctx.saved_tensors)
        return grad_x, None, None, None, *grads


def check_ids(cfg, largest):
    """UserError if a token id of the data, `largest`, is beyond the embedding."""
    if largest >= cfg.vocab_size:
        raise UserError(f"the text has token id {largest}, beyond model.vocab_size={cfg.vocab_size}: set "
                        f"{64 * (largest // 64 + 1)} or a larger multiple of 64 for a new model, or use the tokenizer "
                        "that this model was made with")


def on_meta(cfg):
    """A Transformer of shapes and names, without memory."""
    with torch.device("meta"):
        return Transformer(cfg)


# ----------------------------------------------------------------------------------------------------------------
# initial values


@torch.no_grad()
def init_weights(model, seed):
    """Fill every parameter and buffer, by the kind of module that has it.

    Weights of linear layers and embeddings: normal(0, 0.02), of projections into the residual stream divided by
    sqrt(2 * n_layer) as in GPT-2; of norms: 1; biases: 0. Another module with parameters of its own fills them in a
    method `init_parameters(self)`; UserError if it has none. The values depend on the seed and on the parameter's
    index, never on the number of ranks: each rank draws the whole tensor (one at a time) and keeps its rows.
    """
    init_buffers(model)
    for i, (name, p) in enumerate(model.named_parameters()):
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        if hasattr(module, "init_parameters"):
            module.init_parameters()
        elif isinstance(module, nn.Linear | nn.Embedding) and leaf == "weight":
            residual = layer_kind(module_name) in ("attn.out", "mlp.down")
            std = 0.02 / math.sqrt(2 * model.cfg.n_layer) if residual else 0.02
            generator = torch.Generator(p.device).manual_seed(seed * 1_000_003 + i)
            full = torch.normal(0.0, std, p.shape, generator=generator, device=p.device, dtype=torch.float32)
            plain_local(p).copy_(shard_rows(full, p))
        elif isinstance(module, nn.Linear | nn.RMSNorm | nn.LayerNorm) and leaf in ("weight", "bias"):
            plain_local(p).fill_(1.0 if leaf == "weight" else 0.0)
        else:
            raise UserError(f"no initial value for {name}: give {type(module).__name__} a method "
                            "init_parameters(self) that fills its parameters")


@torch.no_grad()
def init_buffers(model):
    """Tie weights and rebuild buffers after to_empty. Enough where a checkpoint has the parameters.

    A module with buffers rebuilds them in a method `init_buffers(self)`. UserError if it has none, or fills only some.
    """
    model.tie_weights()
    for b in filter(torch.is_floating_point, model.buffers()):
        b.fill_(math.nan)
    for name, module in model.named_modules():
        rebuild = getattr(module, "init_buffers", None)
        if rebuild:
            rebuild()
        for leaf, b in module.named_buffers(name, recurse=False):
            if not rebuild or b.isnan().any():
                raise UserError(f"nothing fills buffer {leaf}: give {type(module).__name__} a method "
                                "init_buffers(self) that computes its buffers")
