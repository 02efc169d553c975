"""Hugging Face model folders: config.json and safetensors, in and out.

A folder means what transformers makes of it, or it is an error, or a line on the screen names the difference.
families.py reads config.json, every tensor has its place. model_config() reports all problems of a folder together,
before any slow step. Each rank reads only the rows that it holds. Pickles are never loaded.
"""

import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

import model as models
from formats import quantized
from formats.families import ARCHITECTURES, read_switches
from formats.files import open_binary
from plumbing.errors import UserError
from plumbing.ranks import process_rank, progress_bar
from plumbing.sharding import plain_local, shard_rows

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# ----------------------------------------------------------------------------------------------------------------
# config.json


def read_json(path):
    try:
        with open_binary(path) as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found


def read_config(folder):
    """(config.json, architecture) of a model folder; UserError where there is no such folder or family."""
    if not Path(folder, "config.json").is_file():
        problem = "is no Hugging Face model folder (no config.json in it): download the model, or name its folder"
        if Path(folder, "adapter_config.json").is_file():
            problem = "holds a PEFT adapter, not a model: merge it (merge_and_unload) and save that"
        elif Path(folder, "checkpoints").is_dir():
            problem = ("is the out_dir of a run: make a model folder of it, "
                       f"python checkpoint.py export {shlex.quote(str(folder))} NEW_FOLDER")
        raise UserError(f"{folder} {problem}")
    source = read_json(Path(folder, "config.json"))
    names, model_type = source.get("architectures") or [], source.get("model_type")
    known = [name for name, family in ARCHITECTURES.items()  # model_type decides, as in transformers
             if (family.model_type == model_type if model_type else name in names)]
    if not known:
        raise UserError(f"{folder}: architecture {names[0] if names else model_type!r} is not supported, "
                        f"only {', '.join(ARCHITECTURES)}")
    if names and known[0] not in names:
        raise UserError(f"{folder}: config.json has architectures {names}, but model_type {model_type!r} is "
                        f"{known[0]}: correct the one that is wrong")
    return source, known[0]


def stored_dtype(folder):
    """The name of the dtype that transformers loads a folder in by default (dtype="auto")."""
    source, _ = read_config(folder)
    name = source.get("dtype") or source.get("torch_dtype")
    if name is None:
        names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
        name = next((names[t.dtype] for t in stored_tensors(folder).values() if t.dtype in names), "float32")
    name = str(name).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"{folder}: dtype={name!r} in config.json is not supported, only float32, bfloat16, float16")
    return name


def model_config(folder, wanted=None):
    """The ModelConfig of a model folder, after a look at everything but the weights' values.

    wanted: a ModelConfig to take block_size from (without one: the longest, up to 8192); what else it has unlike
    ModelConfig's defaults must be as in the folder. Raises one UserError that lists all that is unsupported,
    contradictory, missing or broken. Rank 0 prints what a folder's reader should know.
    """
    source, architecture = read_config(folder)
    values, problems, notes = read_switches(source, architecture)
    refuse(folder, problems)
    longest = source.get("max_position_embeddings") or 2048
    cfg = models.ModelConfig(**values, block_size=wanted.block_size if wanted else min(longest, 8192))
    refuse(folder, list(cfg.problems()))
    stored = stored_tensors(folder)
    problems = check_weights(stored, layout(cfg, architecture), source.get("quantization_config"), notes)
    if cfg.tie_embeddings and not problems and HEAD in stored:
        cfg.tie_embeddings = torch.equal(read(stored, HEAD), read(stored, EMBEDDING))
        if not cfg.tie_embeddings:
            notes.append("config.json says tie_word_embeddings, but lm_head.weight has other values than the "
                         "embedding: not tied, as in transformers 5")
    if Path(folder, SINGLE).is_file() and Path(folder, INDEX).is_file():
        notes.append(f"it has both {SINGLE} and an index: the index is ignored, as in transformers")
    if cfg.block_size > longest:
        problems.append(f"model.block_size={cfg.block_size} is more than its max_position_embeddings={longest}")
    for f in fields(cfg):
        mine, theirs = getattr(wanted or cfg, f.name), getattr(cfg, f.name)
        if mine not in (theirs, getattr(models.ModelConfig(), f.name)):
            problems.append(f"model.{f.name}={mine}, but the folder has {theirs}: of model.*, set block_size alone")
    refuse(folder, problems)
    if process_rank() == 0 and notes:
        print("\n".join(f"{folder}: {line}" for line in notes), file=sys.stderr)  # sample.py's text goes to stdout
    return cfg


def refuse(folder, problems):
    """UserError with the first 20 problems of a folder, if it has any."""
    if len(problems) > 20:
        problems = [*problems[:20], f"and {len(problems) - 20} more"]
    if problems:
        raise UserError("\n".join(f"{folder}: {problem}" for problem in problems))


# ----------------------------------------------------------------------------------------------------------------
# weights


def layout(cfg, architecture):
    """{name in the files: (name of our parameter, its first row there, shape in the files)}, or UserError."""
    rows = {2: [cfg.ffn_dim] * 2, 3: [n * cfg.head_dim for n in (cfg.n_head, cfg.n_kv_head, cfg.n_kv_head)]}
    names, found = ARCHITECTURES[architecture].names, {}
    for name, p in models.on_meta(cfg).named_parameters():
        module, kind = name.rsplit(".", 1)
        if (ours := re.sub(r"\d+", "*", module)) not in names:
            raise UserError(f"{architecture} has no place for {ours}: add its names to families.ARCHITECTURES")
        first, layer = 0, "".join(re.findall(r"\d+", module))
        for piece, n in zip(names[ours], rows.get(len(names[ours]), [len(p)]), strict=True):
            found[f"{piece.replace('*', layer)}.{kind}"] = name, first, (n, *p.shape[1:])
            first += n
    return found


class Stored(NamedTuple):
    """A tensor of a folder."""

    path: Path
    shape: tuple
    dtype: str


def stored_tensors(folder):
    """{name: Stored} of a folder; UserError that lists all files that cannot be read."""
    files, stored, problems = [SINGLE], {}, []
    if not Path(folder, SINGLE).is_file():  # it goes before an index, as in transformers
        if not Path(folder, INDEX).is_file():
            raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}. Pickles (.bin, .pt, .pth) can run code, so "
                            "they are never loaded: convert them to safetensors")
        weight_map = read_json(Path(folder, INDEX)).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder}: {INDEX} has no weight_map that names the files: download it again")
        files = sorted(set(weight_map.values()))
    for path in (Path(folder, file) for file in files):
        try:
            open_binary(path).close()  # UserError for a Git LFS pointer
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    stored[name] = Stored(path, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError, UserError) as error:
            problems.append(f"{path.name} cannot be read: {error}")
    refuse(folder, problems)
    return stored


def check_weights(stored, expected, quantization, notes):
    """What keeps the tensors of layout() from being read; what else one should know of them goes to notes."""
    anchor = "model.norm.weight"
    prefix = min((name.removesuffix(anchor) for name in stored if name.endswith(anchor)), key=len, default=None)
    if prefix:  # all tensors under other names are one problem, not hundreds
        return [f"the names of its tensors begin with {prefix!r}, as of a wrapped model (torch.compile, PEFT): save "
                "the model inside the wrapper, with adapters merged"]
    if prefix is None and anchor.removeprefix("model.") in stored:
        return ["the names of its tensors lack 'model.', as of a model without its lm_head (AutoModel): save the whole "
                "model (AutoModelForCausalLM)"]
    if why := quantized.problem(quantization, stored):
        return [why]
    problems, harmless = [], set(expected)
    for name, (_, _, shape) in expected.items():
        scale = quantized.scale_of(name, stored)
        if name not in stored:
            problems.append(f"{name} {shape} is missing")
        elif stored[name].shape != shape:
            problems.append(f"{name} has shape {stored[name].shape}, by config.json it should have {shape}")
        elif stored[name].dtype == "F8_E4M3" and scale is None:
            problems.append(f"{name} is in FP8, but its scale is missing")
        elif stored[name].dtype == "F8_E4M3":
            harmless.add(scale)
            if not quantized.fits(shape, stored[scale].shape):
                problems.append(f"{scale} has shape {stored[scale].shape}, which fits no scales of a weight {shape}")
    if activation := [name for name in stored if name.endswith(quantized.ACTIVATION_SCALES)]:
        notes.append(f"{len(activation)} fixed scales of activations are ignored: {activation[0]}, ...")
    # some files hold what follows from config.json: rotary frequencies, the embedding again as the head tied to it
    harmless.update(activation, (name for name in stored if name.endswith("rotary_emb.inv_freq")))
    if HEAD in stored and EMBEDDING in stored and stored[HEAD][1:] == stored[EMBEDDING][1:]:
        harmless.add(HEAD)
    problems += [f"{name} is not part of this architecture" for name in stored if name not in harmless]
    if quantization:
        n = sum(tensor.dtype == "F8_E4M3" for tensor in stored.values())
        notes.append(f"{n} weights in FP8 ({quantization.get('quant_method')}), dequantized as they are loaded")
    return problems


def read(stored, name, rows=None):
    """A tensor of a folder, or a slice of its rows, which is all that is read."""
    with torch.device("cpu"), safe_open(stored[name].path, "pt") as file:
        return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]


@torch.no_grad()
def load(folder, model, optimizer=None):
    """Fill model, in place, from a folder that model_config has seen; and the optimizer's master weights, unrounded.

    Each rank reads the rows that it holds, and of those one tensor's at a time. Dtypes convert, FP8 weights are
    dequantized. UserError for nan.
    """
    stored = stored_tensors(folder)
    params = dict(model.named_parameters())
    masters = optimizer.masters if optimizer else {}
    places = layout(model.cfg, read_config(folder)[1]).items()
    for name, (ours, first, shape) in progress_bar(places, "loading weights", "tensor"):
        held = shard_rows(torch.arange(params[ours].shape[0]), params[ours])
        begin, end = (int(held[0]), int(held[-1]) + 1) if len(held) else (0, 0)
        start, stop = max(begin, first), min(end, first + shape[0])
        if start < stop:
            rows = read(stored, name, slice(start - first, stop - first))
            if rows.dtype == torch.float8_e4m3fn:
                scale = read(stored, quantized.scale_of(name, stored))
                rows = quantized.dequantize(rows, scale, start - first, shape[0])
            for target in (plain_local(params[ours]), *([masters[ours]] if ours in masters else [])):
                target[start - begin : stop - begin].copy_(rows)
    if with_nan := [name for name, p in params.items() if plain_local(p).isnan().any()]:
        raise UserError(f"{folder} holds nan, in {', '.join(with_nan[:3])}: download it again")
