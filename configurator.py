"""Configuration: dataclasses, Python config files, and --key=value.

A config file is ordinary Python that binds `config` to a `Config`. Each section is a dataclass in its concern's file.
Command-line keys are the same dotted names, parsed by the field's type. All errors in a call are reported together,
before any slow step. A new knob is one line in a dataclass: its type, with the range of a number, is the check of its
values, its comment is its help text, and nothing here has to change.
"""

import copy
import inspect
import itertools
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
from typing import Annotated, Literal

import fp8
from data import DataConfig
from fp8 import FP8Config
from model import ModelConfig
from optim import OptimConfig
from plumbing import schema
from plumbing.compiling import CompileConfig
from plumbing.errors import UserError
from plumbing.ranks import process_rank
from plumbing.schema import Natural, PositiveInt, to_python

REPO = Path(__file__).resolve().parent
# times a million it has to fit into 64 bits
Seed = Annotated[int, "0 <= int < 2**40", lambda seed: 0 <= seed < 2**40]
Minutes = Annotated[float, "0 < float <= 300", lambda minutes: 0 < minutes <= 300]  # process groups wait 6 hours


@dataclass(kw_only=True)
class Config:
    """The run as a whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    fp8: FP8Config = field(default_factory=FP8Config)
    compile: CompileConfig = field(default_factory=CompileConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    # the run
    out_dir: str = "out/run"  # checkpoints, metrics, plots
    max_steps: PositiveInt = 1000  # optimizer steps
    init_from: str = "scratch"  # "scratch", or a Hugging Face folder: weights, and all of model except block_size
    resume: Literal["auto", "never", "must"] = "auto"  # from the checkpoint in out_dir: if there is one, never, always
    seed: Seed = 1337  # initial weights, data order, stochastic rounding
    # the batch
    global_batch_size: PositiveInt = 8  # sequences per optimizer step, over all ranks
    micro_batch_size: PositiveInt = 1  # sequences per rank and forward pass; gradient accumulation does the rest
    # logs, evaluations, checkpoints
    log_interval: PositiveInt = 10  # steps between log lines
    eval_interval: Natural = 100  # evaluate every N steps and at the end; 0: never
    eval_sequences: Natural = 64  # validation sequences per evaluation, over all ranks; 0: all
    eval_hellaswag_items: Natural = 0  # also score this many HellaSwag questions at each evaluation; 0: none
    checkpoint_interval: Natural = 200  # save a checkpoint every N steps and at the end; 0: never
    async_checkpoint: bool = True  # write checkpoints while training goes on, from a copy in host memory
    keep: Natural = 2  # newest checkpoints to keep; 0: all
    tensorboard: bool = False  # also log to out_dir/tensorboard (pip install tensorboard)
    wandb_project: str | None = None  # also log to this Weights & Biases project (pip install wandb)
    # speed and memory
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights, activations and gradients
    activation_checkpoint: Literal["none", "selective", "full"] = "none"  # recompute in backward: cheap ops, or all
    loss_chunks: PositiveInt = 1  # compute the loss in this many pieces, so that all logits never exist at once
    flash4: bool | None = None  # attention by FlashAttention 4: True: or fail, False: never, None: where installed
    cuda_graph: bool = False  # record a pass as one CUDA graph: small models, one GPU; its memory stays reserved
    check_memory: bool = True  # stop at start-up if the memory estimate is beyond the GPU, or the host
    # several GPUs
    replicas: Natural = 0  # HSDP: copies of the sharded model; must divide the number of ranks; 0: one on each node
    reshard_after_forward: bool = True  # free gathered weights between forward and backward (ZeRO-3; False: ZeRO-2)
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # gradient reduction over ranks; bfloat16: half the bytes
    reduce_each_pass: bool = True  # False: reduce gradients once a step, and hold whole ones until then
    shard_one_rank: bool = False  # run FSDP2 on a single rank too, which takes 7 to 17% of the step
    timeout_minutes: Minutes = 10.0  # end the run if a rank is stuck for so long; 30 more before the first step
    # when something is wrong
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda if there is a GPU
    deterministic: bool = False  # bitwise repeatable kernels only (torch.use_deterministic_algorithms)
    on_nonfinite: Literal["stop", "skip"] = "stop"  # if loss or gradient norm is inf or nan: end the run, skip the step
    profile_step: Natural = 0  # write a torch.profiler trace of this step to out_dir; 0: of none
    memory_step: Natural = 0  # write a snapshot of this step's CUDA memory to out_dir; 0: of none

    def problems(self):
        """Yield a message for each contradiction between these values, with the keys involved."""
        for name, step in (("profile_step", self.profile_step), ("memory_step", self.memory_step)):
            if step > self.max_steps:
                yield f"{name}={step} must be a step: 1 to max_steps={self.max_steps}, 0: none"
        entries = map(os.path.expanduser, (*self.data.train, *self.data.val))
        data_folders = {Path(os.path.realpath(entry)): entry for entry in entries if os.path.isdir(entry)}
        for key, folder in (("out_dir", self.out_dir), ("data.cache_dir", self.data.cache_dir)):
            path, link = Path(os.path.realpath(folder)), Path(folder).absolute()
            existing = next(p for p in (link, *link.parents) if os.path.lexists(p))
            # A run's files in a folder of the data, or below, would be data of the next start, unless that is token
            # files, which have other suffixes. A cache below such a folder is left out by its reader.
            no_data = [path]
            if key == "out_dir":
                no_data = [] if self.data.format == "tokens" else [path, *path.parents]
            data_folder = next((data_folders[p] for p in no_data if p in data_folders), None)
            if not folder:
                yield f"{key} is empty: name a folder (is a shell variable not set?)"
            elif path == REPO or REPO / "config" in (path, *path.parents):  # its config.py would hide config/
                yield f"{key}={folder} is a folder of the code: name another one, such as out/run"
            elif key == "out_dir" and (path / "config.json").is_file():  # sample.py would take its weights
                yield f"{key}={folder} is a model folder: name another one, such as out/run"
            elif data_folder:
                yield f"{key}={folder} is part of {data_folder}, a folder of the data: name one outside of it"
            elif not existing.is_dir() or key == "out_dir" and not os.access(existing, os.W_OK):
                yield f"{key}={folder}: {existing} is no folder to write to: name another one"
        if self.dtype == "float32" and self.optim.weights == "stochastic_rounding":
            yield ("optim.weights=stochastic_rounding rounds to bf16, and dtype=float32 has no bf16 weights: set "
                   "optim.weights=plain, or dtype=bfloat16")
        if not self.fp8.enabled:
            return
        if (self.fp8.force_recompute_fp8_weight_in_bwd and self.fp8.enable_fsdp_float8_all_gather
                and not self.reshard_after_forward):
            yield ("reshard_after_forward=False keeps the weights that fp8.enable_fsdp_float8_all_gather=True gathers, "
                   "fp8.force_recompute_fp8_weight_in_bwd=True keeps none: change one of the three")
        if self.fp8.keep_casts and not self.compile.enabled:
            yield "fp8.keep_casts=True needs compile.enabled=True: without compile, torchao casts again in backward"
        if self.fp8.offload_weights and not self.optim.offload:
            yield "fp8.offload_weights=True moves the weights that optim.offload moves, which is 0: set both or neither"
        if self.fp8.keep_casts and self.activation_checkpoint == "full":
            yield ("fp8.keep_casts=True keeps what activation_checkpoint=full recomputes: set fp8.keep_casts=False, or "
                   "activation_checkpoint=none or selective")


# ----------------------------------------------------------------------------------------------------------------
# loading


def load(argv, own=None):
    """The Config of `[CONFIG.py] [--key=value ...]`; prints and exits for --help and --print_config.

    own: a dataclass instance with the calling script's own flags, which are set on it. Raises one UserError with all
    errors of the call, one per line.
    """
    flags = [arg for arg in argv if arg.startswith("-") and arg not in ("--help", "--print_config")]
    files = [arg for arg in argv if not arg.startswith("-")]
    if len(files) > 1:
        apart = [f"{a}={b}" for a, b in itertools.pairwise(argv)
                 if a in flags and "=" not in a and b in files and not b.endswith(".py")]
        raise UserError(f"{' '.join(files)}: one config file at most{'. Write ' if apart else ''}{' '.join(apart)}")
    config, errors = Config(), []
    try:
        config = read_file(files[0]) if files else config
    except UserError as error:
        errors = [str(error)]
    file_is_read = not errors
    parts = [("", own)] if own is not None else []
    parts += schema.sections(config)
    if "--help" in argv and file_is_read:
        print_and_exit(help_text(parts))

    errors += set_flags(parts, flags)
    config.out_dir, config.data.cache_dir = map(os.path.expanduser, (config.out_dir, config.data.cache_dir))
    if file_is_read:
        errors += [message for _, section in parts if hasattr(section, "problems") for message in section.problems()]
    if errors:
        raise UserError("\n".join(errors))
    if "--print_config" in argv:
        print_and_exit(to_python(config).rstrip())
    return config


def set_flags(parts, flags):
    """Set every flag on its section, and return the errors. parts: (prefix, section) pairs."""
    keys = {prefix + f.name: (section, f) for prefix, section in parts for f in fields(section)
            if not is_dataclass(f.type)}
    keys |= {f"fp8.{alias}": keys[f"fp8.{name}"] for alias, name in fp8.ALIASES.items()}
    errors = []
    for flag in flags:
        name, equals, text = flag.removeprefix("--").partition("=")
        if name not in keys:
            near = schema.suggest(name.lstrip("-"), [*keys, "help", "print_config"], "--{}")
            problem = f"unknown key{near or '.'} See --help"
            if inside := [key for key in keys if key.startswith(f"{name}.")]:
                problem = f"a section, set its keys, such as --{inside[0]}"
            errors.append(f"{flag}: {problem}")
            continue
        section, key = keys[name]
        value = schema.parse(text, key.type)
        if not equals and key.type is bool:  # --gemms
            setattr(section, key.name, True)
        elif not equals:
            errors.append(f"{flag}: write {flag}=VALUE")
        elif value == "" and key.default != "" and schema.fits(value, key.type):
            errors.append(f"{name} is empty: give it a value (is a shell variable not set?)")
        elif schema.fits(value, key.type):
            setattr(section, key.name, value)
        else:
            brackets = {list: "[...]", tuple: "[...]", dict: "{...}"}.get(typing.get_origin(key.type))
            literal = f" as a Python literal, in shell quotes: '--{name}={brackets}'" if brackets else ""
            errors.append(f"{flag}: expected {schema.type_name(key.type)}{literal}")
    return errors


def print_and_exit(text):
    """Print on rank 0, and end every rank with exit status 0."""
    if process_rank() == 0:
        print(text)
    sys.exit(0)


def read_file(path):
    """A copy of the `config` that a Python file binds. Each value is checked, whether they go together is not.

    Raises one UserError with all errors of the file, one per line, with the line number where it is known.
    """
    path = str(path)
    if not Path(path).is_file():
        folder = os.path.relpath(REPO / "config")
        near = schema.suggest(Path(path).stem, [p.stem for p in REPO.glob("config/*.py")], f"{folder}/{{}}.py")
        raise UserError(f"{path}: no such config file{near or f', see {folder}'}")
    try:
        config = runpy.run_path(path).get("config")
    except Exception as error:  # a config file is the user's code: whatever it raises is a user error
        raise UserError(explain(error, path)) from error
    if not isinstance(config, Config):
        raise UserError(f"{path} must bind `config` to a configurator.Config, as in `from configurator import Config` "
                        f"and `config = Config(max_steps=100)`; it binds {type(config).__name__}")
    errors = []
    for prefix, section in schema.sections(config):
        types = {f.name: f.type for f in fields(section)}
        for name, value in vars(section).items():
            if name not in types:  # config.max_stepz = 5
                errors.append(f"{path}: {prefix}{name} is no field{schema.suggest(name, types, prefix + '{}')}")
            elif not schema.fits(value, types[name]):
                errors.append(f"{path}: {prefix}{name}={value!r}: expected {schema.type_name(types[name])}")
    if errors:
        raise UserError("\n".join(errors))
    return copy.deepcopy(config)  # the object may belong to a module that others import too


def explain(error, path):
    """FILE, line N: what was wrong, for an exception from a config file or from a shipped config that it imports.

    A misspelt field is named with the closest valid one.
    """
    places = [f"{f.filename}, line {f.lineno}" for f in traceback.extract_tb(error.__traceback__)
              if f.filename == path or Path(f.filename).parent == REPO / "config"]
    place, message = [path, *places][-1], f"{type(error).__name__}: {error}"  # a SyntaxError has its line in it
    misspelt = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if misspelt:
        kind, name = misspelt.groups()
        names = {type(section).__name__: [f.name for f in fields(section)] for _, section in schema.sections(Config())}
        message = f"{kind} has no field {name!r}{schema.suggest(name, names.get(kind, []), '{!r}')}"
    return f"{place}: {message}"


def changed(path, config):
    """How config differs from the config file at `path`: ", now with KEY=VALUE instead of ..."; "" if it does not."""
    if not path.exists():
        return ""
    try:
        previous = schema.flat(read_file(path))
    except UserError as error:  # it only informs: a run can continue without it
        return f" (cannot compare with the earlier config: {error})"
    differences = [f"{key}={value!r} instead of {previous.get(key)!r}" for key, value in schema.flat(config).items()
                   if key != "resume" and value != previous.get(key)]
    return f", now with {', '.join(differences)}" if differences else ""


def help_text(parts):
    """The script's docstring, then every key with its type, default and meaning. parts: (prefix, section) pairs."""
    columns = shutil.get_terminal_size().columns
    wrap = textwrap.TextWrapper(columns, subsequent_indent=" " * 8, break_on_hyphens=False)
    paragraphs = (sys.modules["__main__"].__doc__ or "").split("\n\n")
    lines = ["\n\n".join(p if p.startswith(" ") else textwrap.fill(p, columns) for p in paragraphs)]
    lines += ["", "Keys with type, default and meaning, set by --key=value:"]
    for prefix, section in parts:
        notes, headings = schema.comments(type(section))
        purpose = inspect.getdoc(section).splitlines()[0]
        lines += ["", *wrap.wrap(f"{prefix[:-1] or type(section).__name__}: {purpose}")]
        for f in fields(section):
            default = getattr(section, f.name)
            if not is_dataclass(default):
                if f.name in headings:
                    lines += ["", f" {headings[f.name]}"]
                lines += wrap.wrap(f"  {prefix}{f.name}  {schema.type_name(f.type)}  {default!r}")
                lines += wrap.wrap(" " * 8 + notes[f.name])
    lines += ["", "Other names for the same keys:"]
    for alias, name in fp8.ALIASES.items():
        lines += wrap.wrap(f"  fp8.{alias} = fp8.{name}")
    return "\n".join(lines).strip()
