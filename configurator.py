"""Configuration: dataclasses, Python config files, and --key=value.

A config file is ordinary Python that binds `config` to a `Config`. Each concern's section is a dataclass in that
concern's file; the comment behind a field is its help text. Command-line keys are the same dotted names, parsed by
the field's type. All mistakes of a call are told together, before anything slow happens. A new knob is one line in a
dataclass: nothing here has to change.
"""

import copy
import inspect
import json
import os
import re
import runpy
import shutil
import sys
import textwrap
import traceback
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Literal

import fp8
from data import DataConfig
from fp8 import CompileConfig, FP8Config
from model import ModelConfig
from optim import OptimConfig
from plumbing.errors import UserError
from plumbing.schema import closest, comments, fits, flat, parse, sections, suggest, to_python, type_name

__all__ = ["CompileConfig", "Config", "DataConfig", "FP8Config", "ModelConfig", "OptimConfig",
           "load", "read_file", "to_python"]
REPO = Path(__file__).resolve().parent


@dataclass(kw_only=True)
class Config:
    """The run as a whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    fp8: FP8Config = field(default_factory=FP8Config)
    compile: CompileConfig = field(default_factory=CompileConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    out_dir: str = "out/run"  # checkpoints, metrics, plots
    seed: int = 1337  # of weights, data order and stochastic rounding
    max_steps: int = 1000  # optimizer steps
    global_batch_size: int = 8  # sequences per optimizer step, over all ranks
    micro_batch_size: int = 1  # sequences per rank and forward pass; the rest is gradient accumulation
    eval_interval: int = 100  # steps between evaluations, one more at the end; 0: none
    eval_sequences: int = 64  # validation sequences per evaluation, over all ranks; 0: all
    eval_hellaswag_items: int = 0  # HellaSwag questions that each evaluation also scores; 0: none
    log_interval: int = 10  # steps between log lines
    checkpoint_interval: int = 200  # steps between checkpoints, one more at the end; 0: none
    keep: int = 2  # checkpoints kept; 0: all
    init_from: str = "scratch"  # "scratch", or a Hugging Face folder: weights and all of model but block_size
    resume: Literal["auto", "never", "must"] = "auto"  # go on from out_dir's checkpoint: if there is one, never, always
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda if there is a GPU
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights, activations and gradients
    replicas: int = 1  # HSDP: copies of the sharded model; must divide the number of ranks
    shard_one_rank: bool = False  # FSDP2 on one rank too: all that a sharded run does, for 7 to 17% of the step
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # what ranks add gradients up in; bfloat16: half the bytes
    reshard_after_forward: bool = True  # free gathered weights between forward and backward (ZeRO-3; False: ZeRO-2)
    activation_checkpoint: Literal["none", "selective", "full"] = "none"  # recomputed in backward: cheap ops, or all
    flash4: bool = False  # attention by FlashAttention 4, if installed: faster on Hopper, most so for packed documents
    cuda_graph: bool = False  # start a pass's kernels all at once: small models, one GPU; its memory stays reserved
    loss_chunks: int = 1  # pieces that the loss is computed in, so that the logits never exist all at once
    deterministic: bool = False  # only bitwise repeatable kernels (torch.use_deterministic_algorithms)
    on_nonfinite: Literal["stop", "skip"] = "stop"  # at a loss or gradient norm of inf or nan: the run, or that update
    tensorboard: bool = False  # also log to out_dir/tensorboard (pip install tensorboard)
    wandb_project: str | None = None  # also log to this Weights & Biases project (pip install wandb)

    def problems(self):
        """What is wrong with these values taken together, one sentence each."""
        for name in ("max_steps", "global_batch_size", "micro_batch_size", "log_interval", "replicas", "loss_chunks"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be at least 1"
        for name in ("seed", "eval_interval", "eval_sequences", "eval_hellaswag_items", "checkpoint_interval", "keep"):
            if getattr(self, name) < 0:
                yield f"{name}={getattr(self, name)} must not be negative"
        for key, folder in (("out_dir", self.out_dir), ("data.cache_dir", self.data.cache_dir)):
            path = Path(folder).absolute()
            if not (there := next(p for p in (path, *path.parents) if p.exists())).is_dir():
                yield f"{key}={folder}: {there} is a file, name a folder"
            elif key == "out_dir" and not os.access(there, os.W_OK):
                yield f"out_dir={folder}: {there} cannot be written to, name another folder"
        tokens = self.micro_batch_size * self.model.block_size  # of text; rows of HellaSwag depend on the data
        if self.data.format == "text" and self.loss_chunks > 0 and tokens % self.loss_chunks:
            yield (f"loss_chunks={self.loss_chunks} must divide the tokens of a forward pass, "
                   f"micro_batch_size x model.block_size = {tokens}")
        if self.dtype == "float32" and self.optim.weights == "stochastic_rounding":
            yield ("optim.weights=stochastic_rounding rounds to bf16, and dtype=float32 has no bf16 weights: set "
                   "optim.weights=plain, or dtype=bfloat16")
        if self.seed >= 2**40:
            yield f"seed={self.seed} must be below 2**40"  # times a million it has to fit 64 bits
        if (self.fp8.enabled and self.fp8.force_recompute_fp8_weight_in_bwd and not self.reshard_after_forward
                and self.fp8.enable_fsdp_float8_all_gather):
            yield ("fp8.force_recompute_fp8_weight_in_bwd=True keeps no fp8 weight for the backward pass, "
                   "reshard_after_forward=False keeps every gathered one: set one of the two the other way")
        if self.fp8.enabled and self.fp8.keep_casts and not self.compile.enabled:
            yield "fp8.keep_casts=True needs compile.enabled=True: eager, torchao casts again whatever is kept"
        if self.fp8.enabled and self.fp8.keep_casts and self.activation_checkpoint == "full":
            yield ("fp8.keep_casts=True keeps what activation_checkpoint=full recomputes: set the one to False, "
                   "or the other to none or selective")
        if self.micro_batch_size > 0 and self.global_batch_size % self.micro_batch_size:
            yield (f"global_batch_size={self.global_batch_size} must be a multiple of "
                   f"micro_batch_size={self.micro_batch_size}")


# ----------------------------------------------------------------------------------------------------------------
# loading


def load(argv, own=None):
    """The Config of `[CONFIG.py] [--key=value ...]`; prints and exits for --help and --print_config.

    own: an instance of a small dataclass with the flags that only the calling script has. They are set on it, and
    bools among them may stand bare (--gemms). Raises one UserError that lists all mistakes of the call, one a line.
    """
    own_section = [("", own)] if own is not None else []
    bare = {"--help", "--print_config"} | {f"--{f.name}" for _, s in own_section for f in fields(s) if f.type is bool}
    detached = {i + 1 for i, arg in enumerate(argv) if arg.startswith("-") and "=" not in arg and arg not in bare}
    files = [arg for i, arg in enumerate(argv) if not arg.startswith("-") and i not in detached]
    config, mistakes, broken = Config(), [], []  # broken: keys that did not get the value that was meant
    first = int(os.environ.get("RANK", 0)) == 0
    if bare_keys := [arg for arg in files if "=" in arg and not Path(arg).exists()]:
        mistakes += [f"{arg}: write --{arg}" for arg in bare_keys]
    elif len(files) > 1:
        mistakes.append(f"{' '.join(files)}: one config file at most")
    elif files:
        try:
            config = read_file(files[0])
        except ValueError as error:
            mistakes.append(str(error))
    if "--help" in argv and not mistakes:
        if first:
            print(help_text([*own_section, *sections(config)]))
        sys.exit(0)

    readable = not mistakes
    keys = {prefix + f.name: (s, f) for prefix, s in [*sections(config), *own_section] for f in fields(s)}
    keys |= {f"fp8.{alias}": keys[f"fp8.{name}"] for alias, name in fp8.ALIASES.items()}
    for arg in argv:
        name, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("-") or arg in ("--help", "--print_config"):
            continue
        elif arg in bare:
            text = "True"
        section, key = keys.get(name, (None, None))
        if key is None and name == "config":
            mistake = f"name the file without a key: {text}"
        elif key is None:
            name, known = name.lstrip("-"), [*keys, "help", "print_config"]
            mistake = f"unknown key{suggest(name, known, '--{}') or '.'} See --help"
            name = closest(name, known) or name
        elif is_dataclass(key.type):
            mistake = "a section, set its keys: " + ", ".join(f"{name}.{f.name}" for f in fields(key.type))
        elif not equals and arg not in bare:
            mistake = f"write {arg}=VALUE"
        elif not fits(value := parse(text, key.type), key.type):
            mistake = f"expected {type_name(key.type)}"
            if typing.get_origin(key.type) in (list, tuple):
                parts = [part.strip(" '\"") for part in text.strip("[]").split(",")]
                example = ", ".join(json.dumps(p) for p in parts if p) if key.type == list[str] else "..."
                mistake += f" as a Python literal, in shell quotes: '--{name}=[{example}]'"
        else:
            setattr(section, key.name, value)
            continue
        mistakes.append(f"{arg}: {mistake}")
        prefix, dot, leaf = name.rpartition(".")
        broken.append(f"{prefix}{dot}{fp8.ALIASES.get(leaf, leaf)}".removesuffix(".enabled"))  # which stands for all
    config.out_dir, config.data.cache_dir = map(os.path.expanduser, (config.out_dir, config.data.cache_dir))
    if readable:
        parts = [s for _, s in [*sections(config), *own_section] if hasattr(s, "problems")]
        mistakes += [problem for s in parts for problem in s.problems()  # but no consequences of a broken key
                     if not any(re.search(rf"(?<![\w.]){re.escape(name)}\b", problem) for name in broken)]
    if mistakes:
        raise UserError("\n".join(mistakes))
    if "--print_config" in argv:
        if first:
            print(to_python(config), end="")
        sys.exit(0)
    return config


def read_file(path):
    """A copy of the `config` that a Python file binds, its types checked, its values not.

    Raises one UserError that lists what is wrong in the file, one mistake a line, with the line number if it has one.
    """
    path = str(path)
    if not Path(path).is_file():
        near = suggest(Path(path).stem, [p.stem for p in REPO.glob("config/*.py")],
                       f"{os.path.relpath(REPO / 'config')}/{{}}.py")
        raise UserError(f"{path}: no such config file{near or ', see ' + os.path.relpath(REPO / 'config')}")
    if str(REPO) not in sys.path:  # for `import model` and `from config.llama_fp8 import config`, whatever the cwd
        sys.path.insert(0, str(REPO))
    try:
        config = runpy.run_path(path).get("config")
    except Exception as error:  # whatever a config file raises is told with its place
        places = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)
                  if f.filename == path or Path(f.filename).parent == REPO / "config"]
        if isinstance(error, SyntaxError):
            places.append((error.filename, error.lineno))
        told = f"{type(error).__name__}: {getattr(error, 'msg', error)}"
        if typo := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)):
            modules = [sys.modules[type(s).__module__] for _, s in sections(Config())]
            kind = next((getattr(m, typo[1]) for m in modules if hasattr(m, typo[1])), Config)
            told = f"{typo[1]} has no field {typo[2]!r}{suggest(typo[2], [f.name for f in fields(kind)], '{!r}')}"
        file, line = places[-1] if places else (path, None)
        raise UserError(f"{file}, line {line}: {told}" if line else f"{path}: {told}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path} must bind `config` to a configurator.Config, as in `from configurator import Config` "
                         f"and `config = Config(max_steps=100)`; it binds {type(config).__name__}")
    mistakes = []
    for prefix, section in sections(config):
        values = {f.name: f.type for f in fields(section)}
        for name, value in vars(section).items():
            if name not in values:  # config.max_stepz = 5
                mistakes.append(f"{path}: {prefix}{name} is no field{suggest(name, values, prefix + '{}')}")
            elif not fits(value, values[name]):
                mistakes.append(f"{path}: {prefix}{name}={value!r}: expected {type_name(values[name])}")
    if mistakes:
        raise UserError("\n".join(mistakes))
    return copy.deepcopy(config)  # the object may belong to a module that others import too


def changed(path, config):
    """", now with KEY=VALUE instead of ..." for what config has other than the file at `path`; "" if there is none."""
    if not path.exists():
        return ""
    try:
        before = flat(read_file(path))
    except ValueError as error:  # no reason not to go on
        return f" (whether with other keys is not known: {error})"
    told = [f"{key}={value!r} instead of {before.get(key)!r}" for key, value in flat(config).items()
            if key != "resume" and value != before.get(key)]
    return f", now with {', '.join(told)}" if told else ""


def help_text(parts):
    """The script's docstring, and every key with type, default and meaning. parts: (prefix, section) pairs."""
    lines = [sys.modules["__main__"].__doc__ or "", "Keys with type, default and meaning, set by --key=value:"]
    for prefix, section in parts:
        notes = comments(type(section))
        rows = [(prefix + f.name, type_name(f.type), repr(getattr(section, f.name)), notes[f.name])
                for f in fields(section) if not is_dataclass(getattr(section, f.name))]
        widths = [max([len(row[i]) for row in rows if len(row[i]) <= most], default=0)
                  for i, most in enumerate((46, 19, 16))]
        start = sum(widths) + 8  # where meanings begin; beside a longer row, on the next line
        lines += ["", f"{prefix[:-1] or type(section).__name__}: {inspect.getdoc(section).splitlines()[0]}"]
        for *cells, meaning in rows:
            head = "  " + "  ".join(map(str.ljust, cells, widths)) + "  "
            if len(head) > start:
                lines.append(head.rstrip())
                head = " " * start
            width = max(shutil.get_terminal_size((120, 24)).columns, start + 40)
            lines.append(textwrap.fill(meaning or "-", width, initial_indent=head, subsequent_indent=" " * start))
    lines += ["", "Other names of the same keys:", *(f"  fp8.{a} = fp8.{name}" for a, name in fp8.ALIASES.items())]
    return "\n".join(lines).strip()
