from dataclasses import dataclass, field
from typing import Literal

from data import DataConfig
from fp8 import CompileConfig, FP8Config
from model import ModelConfig
from optim import OptimConfig


@dataclass(kw_only=True)
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    fp8: FP8Config = field(default_factory=FP8Config)
    compile: CompileConfig = field(default_factory=CompileConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    out_dir: str = "out/run"  # checkpoints, metrics, plots
    seed: int = 1337  # of weights, data order and stochastic rounding
    max_steps: int = 1000  # optimizer steps
    global_batch_size: int = 8  # sequences per optimizer step, over all ranks
    micro_batch_size: int = 8  # sequences per rank and forward pass; the rest is gradient accumulation
    eval_interval: int = 100  # steps between evaluations; 0: only at the end
    eval_sequences: int = 64  # validation sequences per evaluation, over all ranks; 0: all
    log_interval: int = 10  # steps between log lines
    checkpoint_interval: int = 200  # steps between checkpoints; 0: only at the end
    keep: int = 2  # checkpoints kept; 0: all
    init_from: str = "scratch"  # "scratch", or a Hugging Face folder
    resume: Literal["auto", "never", "must"] = "auto"  # go on from out_dir's checkpoint: if there is one, never, always
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda if there is a GPU
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights, activations and gradients
    replicas: int = 1  # HSDP: copies of the sharded model; must divide the number of ranks
    reshard_after_forward: bool = True  # free gathered weights between forward and backward (ZeRO-3; False: ZeRO-2)
    activation_checkpoint: Literal["none", "selective", "full"] = "none"  # recompute in backward: nothing, cheap ops, all
    loss_chunks: int = 1  # pieces that the loss is computed in, so that the logits never exist all at once
    deterministic: bool = False  # torch.use_deterministic_algorithms
    tensorboard: bool = False  # also log to out_dir/tensorboard (pip install tensorboard)
    wandb_project: str | None = None  # also log to this Weights & Biases project (pip install wandb)
