"""Save, resume, export. A checkpoint is complete or it is not there: docs/checkpoints.md, plumbing/storage.py.

    python checkpoint.py export OUT_DIR HF_DIR [--fp8]     # a run's newest checkpoint as a folder for transformers

A checkpoint holds weights and optimizer state as plain tensors, without FP8 wrappers, so that FP8 and bf16 runs can
read each other's on any number of ranks. The rest of a run's state is a function of the step (data position, learning
rate, noise of stochastic rounding) or of the weights (FP8 scales).
"""

import itertools
import json
import math
import os
import re
import shlex
import shutil
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import configurator
import fp8
import optim
from formats import families, hf, quantized
from plumbing import entry
from plumbing.disk import replacing
from plumbing.errors import UserError
from plumbing.offload import host_zeros
from plumbing.ranks import process_rank
from plumbing.sharding import like, local_shard, plain_local
from plumbing.storage import Reader, Writer, damaged_file

SHARD_BYTES = 2**30  # about the size of an exported file; an export holds it up to four times
# files that an export copies from the folder of the run's tokenizer
CARRIED = ("*token*", "*vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template*")

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as no_dist asks for


# ----------------------------------------------------------------------------------------------------------------
# which checkpoints there are


def latest(out_dir):
    """The newest complete checkpoint folder below out_dir, or None."""
    return max(complete(Path(out_dir, "checkpoints")), default=None)


def complete(folder):
    """The complete checkpoints in a `checkpoints` folder, oldest first."""
    return sorted(p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name))


def last_good(out_dir, say):
    """The newest checkpoint folder below out_dir whose files are as they were saved; None if there is no checkpoint.

    Newer ones that are damaged are set aside. Raises UserError if all are damaged. Every rank must call it.
    """
    folders, damaged = complete(Path(out_dir, "checkpoints")), {}
    while folders and (file := damaged_file(folders[-1])):
        damaged[folders.pop()] = file
    if damaged and not folders:
        listed = ", ".join(f"{folder.name} ({file})" for folder, file in damaged.items())
        raise UserError(f"all checkpoints in {out_dir} are damaged: {listed}. Copy these files there again, or start "
                        "anew: another out_dir, or --resume=never")
    for folder, file in damaged.items():
        if process_rank() == 0:
            names = (folder.with_name(f"{folder.name}.damaged_{n}") for n in itertools.count(1))
            aside = folder.rename(next(path for path in names if not path.exists()))
            say(f"{folder} is damaged, {file} is not as it was saved: going back to {folders[-1].name}. It is now "
                f"{aside}")
    return folders[-1] if folders else None


def open_run(out_dir):
    """(newest checkpoint folder, Config) of a run of train.py. Raises UserError if there is none, or it is damaged."""
    newest = latest(out_dir)
    if newest is None or not Path(out_dir, "config.py").is_file():
        raise UserError(f"{out_dir} holds no checkpoint of train.py: give the out_dir of a run that has saved one "
                         "(sample.py and eval.py: or a Hugging Face model folder)")
    if file := damaged_file(newest):
        raise UserError(f"{newest} is damaged, {file} is not as it was saved: delete that folder to use the one "
                        "before, or, if the run goes on and has just removed it, try again")
    return newest, configurator.read_file(Path(out_dir, "config.py"))


# ----------------------------------------------------------------------------------------------------------------
# save


def tensors(model, optimizer=None):
    """{name: tensor} of everything in a checkpoint: the tensors themselves, not copies; DTensors where sharded."""
    state = {}
    for name, p in model.named_parameters():
        state[f"model.{name}"] = like(p, plain_local(p))
        for kind, by_name in (optimizer.state if optimizer else {}).items():
            if name in by_name:
                state[f"optim.{kind}.{name}"] = like(p, by_name[name])
    return state


def save(out_dir, step, state, run, *, keep, group=None):
    """Write checkpoint `step`, then remove all but the newest `keep` (0: none). Every rank must call it.

    state: of tensors(). run: a dict for run.json, which read_run returns. group: a process group of all ranks.
    """
    folder = Path(out_dir, "checkpoints", f"step_{step:08d}")
    dcp.save(state, storage_writer=Writer(folder, {"step": step, **run}), process_group=group,
             no_dist=not dist.is_initialized())
    if keep and process_rank() == 0:
        for old in complete(folder.parent)[:-keep]:
            shutil.rmtree(old)


class Saver:
    """Saves the checkpoints of a run. In the background: training goes on beside it, from a copy in host memory.

    A thread makes the copy while the next step's passes run, so that only the update has to wait for it, and then
    writes it. Every rank must make one, and call the same methods in the same order. out_dir, keep: as in save().
    """

    def __init__(self, out_dir, model, optimizer, say, *, keep, background):
        self.model, self.optimizer, self.say = model, optimizer, say
        self.step = self.copied = self.written = self.thread = None
        # the thread's collectives must not meet those of training
        group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.write = partial(save, out_dir, keep=keep, group=group)
        if background:
            device = next(model.parameters()).device
            self.device_module = torch.get_device_module(device)
            self.stream = self.device_module.Stream()
            self.thread = ThreadPoolExecutor(1, initializer=self.device_module.set_device, initargs=[device])
            self.room = self.thread.submit(self.make_room, tensors(model, optimizer))  # to page-lock memory takes long

    def save(self, step, run):
        """Write checkpoint `step`, or begin to. run: as in save()."""
        state = tensors(self.model, self.optimizer)
        if self.thread is None:
            self.write(step, state, run)
            return
        if self.written and not self.written.done():
            self.say(f"step {step}: waiting for the checkpoint of step {self.step}, which is still being written")
        self.wait()
        self.step, computed = step, self.device_module.Event()
        computed.record()
        copied = self.copied = self.thread.submit(self.copy, state, computed)
        self.written = self.thread.submit(lambda: self.write(step, copied.result(), run))

    def make_room(self, state):
        """In the thread: tensors like those of the state, DTensors where these are, but in host memory."""
        return {name: like(t, host_zeros(local_shard(t).shape, t.dtype, t.device)) for name, t in state.items()}

    @torch.no_grad()
    def copy(self, state, computed):
        """In the thread: a copy of the state as it is at the event `computed`."""
        computed.synchronize()  # optimizer state in host memory may still be written by the GPU
        with self.device_module.stream(self.stream):
            for name, copy in self.room.result().items():
                tensor, copy = local_shard(state[name]), local_shard(copy)
                if self.device_module is torch.cpu:  # torch's copy would start OpenMP threads, beside those that train
                    tensor, copy = (t.reshape(-1).view(torch.uint8).numpy() for t in (tensor, copy))
                    np.copyto(copy, tensor)
                else:
                    copy.copy_(tensor)
        return self.room.result()

    def before_update(self):
        """To call before weights or optimizer state change. Raises what went wrong with the last checkpoint."""
        if self.copied:
            self.copied.result()
        if self.written and self.written.done():
            self.wait()

    def wait(self):
        """Wait for the checkpoint that is being written, if there is one. Raises what went wrong with it."""
        if self.written:
            self.written.result()
        self.copied = self.written = None


# ----------------------------------------------------------------------------------------------------------------
# load


def read_run(folder, config=None, **expected):
    """The run.json of a checkpoint folder: the step and a description of the run.

    Raises UserError if an entry of `expected` differs from it; the message lists the keys of `config`, which is the
    config of the run that wants to resume, that differ from those of the saved run.
    """
    run = json.loads(Path(folder, "run.json").read_text())
    if different := [key for key in expected if run.get(key) != expected[key]]:
        keys = configurator.changed(Path(folder).parents[1] / "config.py", config)
        raise UserError(f"{folder} differs from this run in {', '.join(different)}{keys}: resuming would not continue "
                        "that run. Set another out_dir, or resume=never to start over")
    return run


def load(folder, model, optimizer=None):
    """Fill the model, and the optimizer if given, from a checkpoint folder, in place. Every rank must call it.

    Dtypes are converted; masters that it lacks are copied from its weights. Raises UserError if it is of another model.
    """
    state = tensors(model, optimizer)
    saved = {name: t.size for name, t in Reader(folder).read_metadata().state_dict_metadata.items()}
    masters = optimizer.masters if optimizer else {}
    unsaved = [name for name in masters if f"optim.master.{name}" not in saved]
    for name in unsaved:
        del state[f"optim.master.{name}"]
    differ = [f"{name}: {tuple(saved[name]) if name in saved else 'missing'} for {tuple(tensor.shape)}"
              for name, tensor in state.items() if saved.get(name) != tensor.shape]
    if differ and all(name.startswith("optim.") for name in differ):
        raise UserError(f"{folder} has other optimizer states: set {optim.STATE_KEYS} as the run did that saved it")
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        commit = read_run(folder).get("git_commit") or "unknown"
        raise UserError(f"{folder} is a checkpoint of another model: {', '.join(differ[:3])}{more}. Go back to the "
                        f"code that saved it (commit {commit}), or start anew: another out_dir, or --resume=never")
    dcp.load(state, storage_reader=Reader(folder), no_dist=not dist.is_initialized())
    if optimizer is not None:
        optimizer.step_count = read_run(folder)["step"]
        for name in unsaved:
            masters[name].copy_(optimizer.weights[name])


# ----------------------------------------------------------------------------------------------------------------
# export


def export(out_dir, folder, in_fp8=False):
    """Write the newest checkpoint of a run as a Hugging Face model folder, in the layout of the run's init_from.

    in_fp8: store the layers that the run trained in FP8 as e4m3 with a scale for each 128 x 128 block, for inference
    engines; lm_head, which they want in high precision, stays as it is. Raises UserError if there is no checkpoint,
    `folder` is not empty, init_from or chat_template is gone, no layer was in FP8.
    """
    folder = Path(folder).resolve()
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty: name a new folder")
    newest, config = open_run(out_dir)
    template = os.path.expanduser(config.data.chat_template)
    if template and not Path(template).is_file():
        raise UserError(f"the run's data.chat_template={template} is gone: put the file there again")
    fp8_config = fp8.leave_out(config.fp8, read_run(newest).get("auto_filtered") or [])
    saved = Reader(newest).read_metadata().state_dict_metadata
    dtype = saved["model.embed.weight"].properties.dtype
    source, architecture = {"max_position_embeddings": families.longest(config.model), "bos_token_id": None,
                            "eos_token_id": None, "pad_token_id": None}, None
    if config.init_from != "scratch":
        source, architecture = hf.read_config(config.init_from)
        source.pop("quantization_config", None)  # the weights are plain now
    written = families.config_json(config.model, dtype, architecture)
    layout = hf.layout(config.model, written["architectures"][0])
    linears = {name: source_name.removesuffix(".weight") for name, (source_name, _, shape) in layout.items()
               if len(shape) == 2 and source_name != "embed.weight"}
    fp8_weights = {name for name, module in linears.items()
                   if in_fp8 and module != "lm_head" and fp8.recipe_of(module, fp8_config)}
    if in_fp8 and not fp8_weights:
        raise UserError(f"{out_dir} trained no layer in FP8: export it without --fp8")
    if in_fp8:
        written["quantization_config"] = quantized.config_entry(
            [name.removesuffix(".weight") for name in linears if name not in fp8_weights])
    files, size = defaultdict(list), 0  # the tensors that begin within the same SHARD_BYTES share a file
    for name, (_, _, shape) in layout.items():
        files[size // SHARD_BYTES].append(name)
        size += math.prod(shape) * (1 if name in fp8_weights else dtype.itemsize)
    with replacing(folder) as temporary:
        temporary.mkdir()
        file_of, total = {}, 0  # {tensor in the folder: its file}
        for i, names in enumerate(files.values(), 1):
            file = f"model-{i:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
            sources, pieces = {f"model.{layout[name][0]}" for name in names}, {}
            parameters = {source: torch.empty(saved[source].size, dtype=dtype) for source in sources}
            dcp.load(parameters, storage_reader=Reader(newest), no_dist=True)
            for name in names:
                source_name, first_row, shape = layout[name]
                rows = parameters[f"model.{source_name}"][first_row : first_row + shape[0]]
                if name in fp8_weights:
                    pieces[name], pieces[f"{name}_scale_inv"] = quantized.quantize(rows)
                else:
                    pieces[name] = rows.clone()  # safetensors wants a storage for each tensor
            temporary.joinpath(file).write_bytes(safetensors.torch.save(pieces, metadata={"format": "pt"}))
            file_of |= dict.fromkeys(pieces, file)
            total += sum(piece.nbytes for piece in pieces.values())
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": file_of}
            temporary.joinpath("model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        temporary.joinpath("config.json").write_text(json.dumps(source | written, indent=2))
        tokenizer = Path(os.path.expanduser(config.data.tokenizer))  # a folder, or a name or file, which is not copied
        carried = {path for pattern in CARRIED for path in tokenizer.glob(pattern) if path.is_file()}
        if config.init_from != "scratch":
            carried.update(Path(config.init_from).glob("generation_config.json"))
        for path in carried:
            shutil.copy(path, temporary)
        if (templates := tokenizer / "additional_chat_templates").is_dir():
            shutil.copytree(templates, temporary / templates.name)
        if template:
            shutil.copy(template, temporary / "chat_template.jinja")
    print(f"{newest} as {written['architectures'][0]} in {folder}: {len(file_of)} tensors, {total / 1e9:.2f} GB")
    if in_fp8:
        print(f"{len(fp8_weights)} weights in FP8 with a scale for each 128 x 128 block")
    if uneven := [name for name in fp8_weights if any(n % quantized.BLOCK for n in layout[name][2])]:
        print(f"{len(uneven)} of them, such as {min(uneven)}, have sizes that 128 does not divide: their last blocks "
              "are smaller, which eval.py and sample.py read, but not every engine")
    if not tokenizer.is_dir():
        print(f"it holds no tokenizer: sample.py --from={shlex.quote(str(folder))} "
              f"--tokenizer={shlex.quote(config.data.tokenizer)}")


def main():
    parser = entry.Arguments(description="Write a run's newest checkpoint as a Hugging Face model folder.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument("out_dir", type=entry.path, help="out_dir of a run of train.py")
    parser.add_argument("hf_dir", type=entry.path, help="new folder to write")
    parser.add_argument("--fp8", action="store_true", help="store the layers that were trained in FP8 in FP8")
    args = parser.parse_args()
    export(args.out_dir, args.hf_dir, args.fp8)


if __name__ == "__main__":
    entry.run(main)
