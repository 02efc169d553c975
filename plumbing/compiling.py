"""torch.compile and recompute (activation checkpointing) of each transformer block."""

import logging
import os
import shutil
import sysconfig
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from plumbing import blockwise
from plumbing.errors import UserError

# it warns where a CUDA toolkit is installed without a GPU
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


@dataclass(kw_only=True)
class CompileConfig:
    """torch.compile of each transformer block and of the loss. With enabled=False the other keys are ignored."""

    enabled: bool = False  # compile, the optimizer's update too, which has options of its own
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"  # torch's
    fullgraph: bool = False  # a graph break is an error
    dynamic: bool | None = False  # None lets torch.compile decide after a recompile


# Selective recompute keeps the outputs of tensor cores, and `max`, the source of an FP8 scale: one number. Never `abs`,
# which would keep an unsharded weight (https://github.com/pytorch/torchtitan/pull/820). Attention adds its kernels.
SAVED_OPS = (torch.ops.aten.mm.default, torch.ops.aten._scaled_mm.default, blockwise.MATMUL,
             torch.ops.aten.max.default)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SAVE, RECOMPUTE = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE
COMPILER_SAVES, COMPILER_RECOMPUTES = CheckpointPolicy.PREFER_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
# What backward finds, by (activation_checkpoint, fp8_copies); fp8_copies: "keep", "drop", or None for no preference.
# Transposed views cost nothing, but a saved one holds the copy of a weight that FSDP2 gathered in FP8.
POLICIES = {
    #                      FP8 casts  transposes           SAVED_OPS       other ops
    ("none", "keep"):      (SAVE,      COMPILER_SAVES,      COMPILER_SAVES, COMPILER_SAVES),
    ("none", "drop"):      (RECOMPUTE, RECOMPUTE,           COMPILER_SAVES, COMPILER_SAVES),
    ("selective", "keep"): (SAVE,      COMPILER_RECOMPUTES, SAVE,           COMPILER_RECOMPUTES),
    ("selective", "drop"): (RECOMPUTE, COMPILER_RECOMPUTES, SAVE,           COMPILER_RECOMPUTES),
    ("selective", None):   (RECOMPUTE, COMPILER_RECOMPUTES, SAVE,           COMPILER_RECOMPUTES),
}  # ("none", None) leaves all to autograd or the compiler, and "full" recomputes all


def check_compiler(device):
    """Raise UserError if torch.compile cannot build its code: on a GPU Triton's launchers in C, on a CPU C++."""
    compilers = [os.environ.get("CC", "gcc"), "clang"] if device.type == "cuda" else [os.environ.get("CXX", "g++")]
    header, missing = os.path.join(sysconfig.get_config_var("INCLUDEPY"), "Python.h"), None
    if not any(map(shutil.which, compilers)):
        missing = f"a compiler ({' or '.join(compilers)} on the PATH)"
    elif not os.path.exists(header):
        missing = f"Python's headers ({header})"
    elif not os.access(cache_dir(), os.W_OK):  # makes it, or raises an OSError that names it
        missing = f"a folder to write to ({cache_dir()}; TORCHINDUCTOR_CACHE_DIR names another one)"
    if missing:
        raise UserError(f"compile.enabled=True needs {missing}: provide it (compilers and headers: apt-get install "
                        "g++ python3-dev), or set compile.enabled=False, which is slower")


def compile_and_checkpoint(model, compile_cfg, activation_checkpoint, fp8_copies=None):
    """Wrap each block's forward, and the loss, in recompute and torch.compile, in place; parameter names stay.

    Blocks are compiled one by one: one graph serves all, since their shapes are the same, so compiling takes seconds
    instead of minutes; and FSDP2's hooks, which run around forward, stay outside of the graphs. "selective" keeps
    outputs of matmuls and attention and recomputes the cheap rest; "full" keeps each block's input only.
    """
    # torch 2.11 fuses row and column reductions: RMSNorm's backward with the transposing FP8 cast becomes one kernel of
    # 0.65 ms; unfused they take 0.35 ms (Llama-8B shapes, H100).
    torch._inductor.config.triton.mix_order_reduction = False
    torch._inductor.config.joint_custom_post_pass = MergeRepeatedOps()
    options = dict(mode=compile_cfg.mode, fullgraph=compile_cfg.fullgraph, dynamic=compile_cfg.dynamic)
    policy = POLICIES.get((activation_checkpoint, fp8_copies))
    for block in model.layers:
        forward = block.forward
        if activation_checkpoint == "full":
            forward = recompute(forward)
        elif policy:
            # FP8 copies exist in compiled graphs only: eager torchao saves high-precision tensors and casts again, and
            # saved views of gathered weights would keep what FSDP2 frees
            forward = recompute(forward, partial(save_or_not, policy, model.saved_ops),
                                eager=activation_checkpoint == "selective")
        block.forward = torch.compile(forward, **options) if compile_cfg.enabled else forward
    if compile_cfg.enabled:
        model.head_loss = torch.compile(model.head_loss, **options)


class MergeRepeatedOps(CustomGraphPass):
    """Forward and backward, while they are one graph, compute the same value once.

    Older versions do so before they split the graph. torch 2.14 merges no op that only forward needs with one that
    backward needs (partitioners.py, partition_key): backward would compute every amax and every kept cast again.
    """

    def __call__(self, graph):
        graph.owning_module.graph = fx_graph_cse(graph)

    def uuid(self):
        return get_hash_for_files((__file__,))  # of Inductor's caches on disk


def recompute(forward, policy=None, eager=True):
    """`forward` with its intermediates recomputed in backward, except what `policy` saves. eager: uncompiled too."""
    context = {"context_fn": partial(create_selective_checkpoint_contexts, policy)} if policy else {}

    def checkpointed(*args):
        if not eager and not torch.compiler.is_compiling():
            return forward(*args)
        # no block draws random numbers, and a generator's state cannot be read while a CUDA graph is recorded
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **context)

    return checkpointed


def save_or_not(policy, saved_ops, ctx, op, *args, **kwargs):
    """The CheckpointPolicy of an op in a row of POLICIES. saved_ops: attention's, in addition to SAVED_OPS."""
    fp8_casts, transposes, saved, others = policy
    if op is blockwise.CAST or op is torch.ops.aten._to_copy.default and kwargs.get("dtype") in FP8_DTYPES:
        return fp8_casts
    if op is torch.ops.aten.t.default:
        return transposes
    return saved if op in SAVED_OPS or op in saved_ops else others
