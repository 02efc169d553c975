"""Save, resume, export. A checkpoint is complete or it is not there.

    python checkpoint.py export OUT_DIR HF_DIR     # a run's newest checkpoint as a folder for transformers

`out_dir/checkpoints/step_00000200/` holds a torch.distributed.checkpoint of plain tensors (weights, moments, master
weights) without any FP8 wrapper, so that FP8 and bf16 runs read each other's, on any number of ranks; and `run.json`
with the step and what the run was. It is written under another name and renamed when every rank is done.

The rest of a run's state needs no saving, because it is a function of the step: the data position, the learning rate,
the noise of stochastic rounding; FP8 scales are functions of the weights.
"""

import contextlib
import errno
import json
import math
import os
import pickle
import re
import secrets
import shutil
import textwrap
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

import configurator
import optim
from formats import hf
from plumbing import entry
from plumbing.errors import UserError
from plumbing.sharding import like, plain_local

SHARD_BYTES = 2**31  # of an exported file, and about what exporting needs of memory
# what an export takes along from the folder that training began with
CARRIED = ("*token*", "*.tiktoken", "tekken.json", "vocab.json", "merges.txt", "chat_template*",
           "generation_config.json")

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what no_dist asks for


def latest(out_dir):
    """The newest complete checkpoint folder below out_dir, or None."""
    return max(complete(Path(out_dir, "checkpoints")), default=None)


def complete(folder):
    """The complete checkpoints in a folder of them, oldest first."""
    return sorted(p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name))


def open_run(out_dir):
    """(newest checkpoint folder, Config) of a run of train.py. Raises UserError if there is none."""
    if not Path(out_dir).is_dir():
        raise UserError(f"{out_dir}: no such folder")
    newest = latest(out_dir)
    if newest is None or not Path(out_dir, "config.py").is_file():
        raise UserError(f"{out_dir} holds no checkpoint of train.py and no config.json: give the out_dir of a run "
                         "that has saved one, or a Hugging Face model folder")
    return newest, configurator.read_file(Path(out_dir, "config.py"))


def tensors(model, optimizer=None):
    """{name: tensor} of all that a checkpoint holds: live storage, DTensors where sharded."""
    state = {}
    for name, p in model.named_parameters():
        state[f"model.{name}"] = like(p, plain_local(p))
        for kind, of in (optimizer.state if optimizer else {}).items():
            if name in of:
                state[f"optim.{kind}.{name}"] = like(p, of[name])
    return state


def save(out_dir, step, model, optimizer, run, *, keep):
    """Write checkpoint `step`, then remove all but the newest `keep` (0: remove none). Called on every rank.

    run: what the run was, a JSON-able dict; comes back from read_run.
    """
    folder = Path(out_dir, "checkpoints", f"step_{step:08d}")
    aside = folder.with_name(folder.name + ".tmp")
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        for incomplete in folder.parent.glob("step_*.tmp"):  # of a run that was killed while it saved
            shutil.rmtree(incomplete)
    barrier()
    with writing(out_dir):
        dcp.save(tensors(model, optimizer), checkpoint_id=aside, no_dist=not dist.is_initialized())
    barrier()
    if first:
        aside.joinpath("run.json").write_text(json.dumps({"step": step, **run}, indent=1))
        for path in (*aside.iterdir(), aside):  # on disk before it is called complete
            flush(path)
        aside.rename(folder)
        flush(folder.parent)
        for old in complete(folder.parent)[:-keep] if keep else []:
            shutil.rmtree(old)
    barrier()


def flush(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextlib.contextmanager
def reading(folder):
    """Reading a checkpoint folder, which is complete or not there: that a file cannot be read is told in one line."""
    try:
        yield
    except (CheckpointException, OSError, EOFError, ValueError, TypeError, pickle.UnpicklingError, AttributeError,
            ImportError, LookupError) as error:  # any of them can come from a pickle that is damaged
        error = entry.cause(error)
        why = f"{type(error).__name__}: {textwrap.shorten(str(error), 100)}"
        raise UserError(f"{folder} cannot be read ({why}). If it is damaged, delete it, and the run goes on from the "
                         "one before") from error


@contextlib.contextmanager
def writing(folder):
    """Writing below a folder: a full disk is told as such, whatever the writer makes of it."""
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is none of the former
        if shutil.disk_usage(folder).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


def read_run(folder, config=None, **wanted):
    """The `run` of a checkpoint folder: step and what the run was.

    Raises UserError if the folder is none, or if the run was another than `wanted` says: with the keys of config, that
    of the run which wants it, that differ from what the folder's run left.
    """
    path = Path(folder, "run.json")
    if not path.is_file():
        raise UserError(f"{folder} is no checkpoint of nanofp8: it has no run.json")
    with reading(folder):
        run = json.loads(path.read_text())
        run["step"]  # or it is none
    if changed := [key for key in wanted if run.get(key) != wanted[key]]:
        keys = configurator.changed(Path(folder).parents[1] / "config.py", config)
        raise UserError(f"{folder} was made with another {', '.join(changed)}{keys}: resuming would not continue that "
                         "run. Give another out_dir, or set resume=never to start over")
    return run


def load(folder, model, optimizer=None):
    """Fill model, and optimizer where given, from a checkpoint folder, in place. Called on every rank.

    Dtypes convert. Master weights that the checkpoint lacks are made from its weights; ones that it has and the
    optimizer lacks are left. Raises UserError where the checkpoint is of another model.
    """
    state = tensors(model, optimizer)
    with reading(folder):
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    masters = {f"optim.master.{name}": name for name in (optimizer.masters if optimizer else {})}
    unsaved = [name for name in masters if name not in saved]
    for name in unsaved:
        del state[name]
    differ = [f"{n}: {tuple(saved[n].size) if n in saved else 'missing'} for {tuple(t.shape)}"
              for n, t in state.items() if n not in saved or saved[n].size != t.shape]
    if differ and all(name.startswith("optim.") for name in differ):
        raise UserError(f"{folder} has other optimizer states: set {optim.STATE_KEYS} as the run did that saved it")
    if differ:
        commit = read_run(folder).get("git_commit")
        raise UserError(f"{folder} is a checkpoint of another model: {', '.join(differ[:3])}"
                         + (f" and {len(differ) - 3} more" if len(differ) > 3 else "")
                         + f". Go back to the code that saved it{f', of commit {commit}' if commit else ''}, or start "
                         "anew: another out_dir, or --resume=never")
    with reading(folder):
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    if optimizer is not None:
        optimizer.step_count = read_run(folder)["step"]
        for name in map(masters.get, unsaved):
            optimizer.masters[name].copy_(optimizer.weights[name])


def barrier():
    if dist.is_initialized():
        dist.barrier()


# ----------------------------------------------------------------------------------------------------------------
# export


@contextlib.contextmanager
def appearing(folder):
    """A folder to fill, under another name until all of it went well; else it is removed."""
    aside = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
    aside.mkdir(parents=True)
    try:
        with writing(aside):
            yield aside
        if folder.is_dir():
            folder.rmdir()
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def export(out_dir, folder):
    """Write the newest checkpoint of a run as a Hugging Face model folder, in the layout of the run's init_from.

    One process, whatever the run had, and as much memory as one file of it takes. Raises UserError if there is no
    checkpoint, if `folder` is there already, or if init_from's folder, whose tokenizer belongs to the model, is gone.
    """
    folder = Path(folder).resolve()
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty: give a new folder")
    newest, config = open_run(out_dir)
    with reading(newest):
        saved = dcp.FileSystemReader(newest).read_metadata().state_dict_metadata
    dtype = saved["model.embed.weight"].properties.dtype
    if config.init_from == "scratch":
        scaling = config.model.rope_scaling
        longest = round(scaling.original_max_position * scaling.factor) if scaling else config.model.block_size
        source = {"max_position_embeddings": longest, **dict.fromkeys(f"{x}_token_id" for x in ("bos", "eos", "pad"))}
        written = hf.config_json(config.model, dtype)
    else:
        source, architecture = hf.read_config(config.init_from)
        written = hf.config_json(config.model, dtype, architecture)
    layout = hf.layout(config.model, written["architectures"][0])
    files, room = [[]], SHARD_BYTES
    for name, (_, _, shape) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        if size > room and files[-1]:
            files.append([])
            room = SHARD_BYTES
        files[-1].append(name)
        room -= size
    with appearing(folder) as aside:
        where, whole = {}, {}
        for i, names in enumerate(files, 1):
            file = f"model-{i:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
            pieces = {}
            for name in names:
                ours, first, shape = layout[name]
                if ours not in whole:
                    whole = {ours: torch.empty(saved[f"model.{ours}"].size, dtype=dtype)}
                    with reading(newest):
                        dcp.load({f"model.{ours}": whole[ours]}, checkpoint_id=newest, no_dist=True)
                pieces[name] = whole[ours][first : first + shape[0]].clone()  # one storage each, as the format wants
            save_file(pieces, aside / file, metadata={"format": "pt"})
            where |= dict.fromkeys(names, file)
        total = sum(math.prod(shape) for _, _, shape in layout.values()) * dtype.itemsize
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": where}
            aside.joinpath("model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        aside.joinpath("config.json").write_text(json.dumps(source | written, indent=2))
        for file in aside.glob("*.safetensors"):  # which the library makes for its owner alone
            shutil.copymode(aside / "config.json", file)
        if config.init_from != "scratch":
            for path in {p for pattern in CARRIED for p in Path(config.init_from).glob(pattern) if p.is_file()}:
                shutil.copy(path, aside)
    print(f"{newest} as {written['architectures'][0]} in {folder}: {len(where)} tensors, {total / 1e9:.2f} GB")
    if config.init_from == "scratch":
        print(f"it holds no tokenizer: sample.py --from={folder} --tokenizer={config.data.tokenizer}")


def main():
    parser = entry.Arguments(description="Write a run's newest checkpoint as a Hugging Face model folder.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument("out_dir", type=os.path.expanduser, help="out_dir of a run of train.py")
    parser.add_argument("hf_dir", type=os.path.expanduser, help="new folder to write")
    args = parser.parse_args()
    export(args.out_dir, args.hf_dir)


if __name__ == "__main__":
    entry.run(main)
