"""Hugging Face model folders: config.json and safetensors, in and out.

A folder means what transformers makes of it, or it is an error, or a line on the screen names the difference.
families.py reads config.json, every tensor has its place. model_config() reports all problems of a folder together,
before any slow step. Each rank reads only the rows that it holds. Pickles are never loaded.
"""

import itertools
import json
import re
import sys
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import model as models
from formats import quantized
from formats.families import ARCHITECTURES, read_switches
from plumbing.errors import UserError
from plumbing.ranks import process_rank
from plumbing.sharding import plain_local, shard_rows

# ----------------------------------------------------------------------------------------------------------------
# config.json


def note(folder, lines):
    """Print what the user should know about a folder, on rank 0, to stderr: sample.py's text goes to stdout."""
    if process_rank() == 0:
        for line in lines:
            print(f"{folder}: {line}", file=sys.stderr)


def is_lfs_pointer(path):
    with open(path, "rb") as file:
        return file.read(24) == b"version https://git-lfs."


def read_json(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if path.is_file() and is_lfs_pointer(path):
            raise UserError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull there") from error
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found


def read_config(folder):
    """(config.json, architecture) of a model folder.

    model_type decides, as in transformers; UserError where architectures says otherwise, or where there is no such
    folder or family.
    """
    if not Path(folder, "config.json").is_file():
        if Path(folder, "adapter_config.json").is_file():
            raise UserError(f"{folder} holds a PEFT adapter, not a model: merge it (merge_and_unload) and save that")
        raise UserError(f"{folder} is no Hugging Face model folder (no config.json in it): "
                         "download the model, or name its folder")
    source = read_json(Path(folder, "config.json"))
    names, model_type = source.get("architectures") or [], source.get("model_type")
    by_type = [name for name, family in ARCHITECTURES.items() if family.model_type == model_type]
    if names and by_type and by_type[0] not in names:
        raise UserError(f"{folder}: config.json has architectures {names}, but model_type {model_type!r} is "
                        f"{by_type[0]}: correct the one that is wrong")
    known = by_type if model_type else [name for name in names if name in ARCHITECTURES]
    if not known:
        raise UserError(f"{folder}: architecture {names[0] if names else model_type!r} is not supported, "
                        f"only {', '.join(ARCHITECTURES)}")
    return source, known[0]


def stored_dtype(folder):
    """The name of the dtype that transformers loads a folder in by default (dtype="auto")."""
    source, _ = read_config(folder)
    name = source.get("dtype") or source.get("torch_dtype")
    if name is None:
        tensors = weight_files(folder)[1].values()
        stored = next((tensor[1] for tensor in tensors if tensor and tensor[1] in ("F32", "BF16", "F16")), "F32")
        name = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[stored]
    name = str(name).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"{folder}: dtype={name!r} in config.json is not supported, only float32, bfloat16, float16")
    return name


def model_config(folder, wanted=None):
    """The ModelConfig of a model folder, after a look at everything but the weights' values.

    wanted: a ModelConfig to take block_size from (without one: the longest, up to 8192); what else it has unlike
    ModelConfig's defaults must be as in the folder. Raises one UserError that lists all that is unsupported,
    contradictory, missing or broken. Prints what a folder's reader should know (note).
    """
    source, architecture = read_config(folder)
    values, problems, notes = read_switches(source, architecture)
    if problems:
        raise UserError("\n".join(f"{folder}: {p}" for p in problems))
    longest = source.get("max_position_embeddings") or 2048
    block_size = wanted.block_size if wanted else min(longest, 8192)
    cfg = models.ModelConfig(**values, block_size=block_size)
    impossible = [message for _, message in cfg.problems()]
    problems += impossible
    if not impossible:
        weight_problems, weight_notes = check_weights(folder, layout(cfg, architecture), source)
        problems, notes = problems + weight_problems, notes + weight_notes
        if cfg.tie_embeddings and not weight_problems and not head_is_embedding(folder):
            cfg.tie_embeddings = False
            notes.append("config.json says tie_word_embeddings, but lm_head.weight has other values than the "
                         "embedding: not tied, as in transformers 5")
    if cfg.block_size > longest:
        problems.append(f"model.block_size={cfg.block_size} is more than its max_position_embeddings={longest}")
    for f in fields(cfg):
        mine, theirs = getattr(wanted or cfg, f.name), getattr(cfg, f.name)
        if mine not in (theirs, getattr(models.ModelConfig(), f.name)):
            problems.append(f"model.{f.name}={mine}, but the folder has {theirs}: of model.*, set block_size alone")
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise UserError("\n".join(f"{folder}: {p}" for p in problems[:20] + more))
    note(folder, notes)
    return cfg


# ----------------------------------------------------------------------------------------------------------------
# weights


def layout(cfg, architecture):
    """{name in the files: (name of our parameter, its first row there, shape in the files)}, or UserError."""
    with torch.device("meta"):
        model = models.Transformer(cfg)
    rows = {2: [cfg.ffn_dim] * 2, 3: [n * cfg.head_dim for n in (cfg.n_head, cfg.n_kv_head, cfg.n_kv_head)]}
    names, found = ARCHITECTURES[architecture].names, {}
    for name, p in model.named_parameters():
        module, kind = name.rsplit(".", 1)
        if (ours := re.sub(r"\d+", "*", module)) not in names:
            raise UserError(f"{architecture} has no place for {ours}: add its names to families.ARCHITECTURES")
        pieces = names[ours]
        sizes = rows.get(len(pieces), [len(p)])
        for piece, n, first in zip(pieces, sizes, itertools.accumulate([0, *sizes]), strict=False):
            piece = piece.replace("*", "".join(re.findall(r"\d+", module)))
            found[f"{piece}.{kind}"] = name, first, (n, *p.shape[1:])
    return found


def weight_files(folder):
    """({tensor: its file}, {tensor: (shape, dtype) in that file, None if it cannot be read}, problems) of a folder.

    model.safetensors goes before an index, as in transformers.
    """
    index, single = Path(folder, "model.safetensors.index.json"), Path(folder, "model.safetensors")
    where, found, problems = {}, {}, []
    if single.is_file():
        files = [single]
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            return {}, {}, [f"{index.name} has no weight_map that names the files: download it again"]
        where = {name: Path(folder, file) for name, file in weight_map.items()}
        files = sorted(set(where.values()))
    else:
        pickles = [p.name for p in sorted(Path(folder).iterdir()) if p.suffix in (".bin", ".pt", ".pth")]
        return {}, {}, ["it has neither model.safetensors nor model.safetensors.index.json" + (
            f"; {pickles[0]} is a pickle, which can run code, so it is never loaded: convert it" if pickles else "")]
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    found[name], where[name] = (tuple(part.get_shape()), part.get_dtype()), path
        except (OSError, SafetensorError) as error:
            if path.is_file() and is_lfs_pointer(path):
                problems.append(f"{path.name} is a Git LFS pointer, not the weights: run git lfs pull there")
            else:
                problems.append(f"{path.name} is missing or broken: {error}")
            found |= dict.fromkeys(name for name in where if where[name] == path)
    return where, found, problems


def check_weights(folder, expected, source):
    """(problems, notes): what keeps the tensors of layout() from being read, and what one should know of them."""
    _, found, problems = weight_files(folder)
    if problems and not found:  # nothing that can be compared
        return problems, []
    anchor, notes = "model.norm.weight", []
    if anchor not in found:  # all tensors under other names are one problem, not hundreds
        wrapped = [name.removesuffix(anchor) for name in found if name.endswith(f".{anchor}")]
        if wrapped:
            return [f"the names of its tensors begin with {wrapped[0]!r}, as of a wrapped model (torch.compile, PEFT): "
                    "save the model inside the wrapper, with adapters merged"], []
        if anchor.removeprefix("model.") in found:
            return ["the names of its tensors lack 'model.', as of a model without its lm_head (AutoModel): save the "
                    "whole model (AutoModelForCausalLM)"], []
    config = source.get("quantization_config")
    readable = {name: tensor for name, tensor in found.items() if tensor}
    if why := quantized.problem(config, readable):
        return [why], []
    for name, (_, _, shape) in expected.items():
        stored_shape, dtype = found.get(name) or (None, None)
        scale = quantized.scale_of(name, found)
        if name not in found:
            problems.append(f"{name} {shape} is missing")
        elif found[name] and stored_shape != shape:
            problems.append(f"{name} has shape {stored_shape}, by config.json it should have {shape}")
        elif dtype == "F8_E4M3" and scale is None:
            problems.append(f"{name} is in FP8, but its scale is missing")
        elif dtype == "F8_E4M3" and found[scale] and not quantized.fits(
                shape, found[scale][0], quantized.block_size(config)):
            problems.append(f"{scale} has shape {found[scale][0]}, which fits no scales of a weight {shape}")
        elif found[name] and dtype not in ("F32", "BF16", "F16", "F8_E4M3"):
            problems.append(f"{name} is {dtype}, only F32, BF16, F16 and F8_E4M3 can be read")
    # some files hold what follows from config.json: rotary frequencies, the embedding again as the head tied to it
    harmless = {"lm_head.weight"} if found.get("lm_head.weight") == found.get("model.embed_tokens.weight") else set()
    harmless |= {quantized.scale_of(name, found) for name in expected}
    activation = [name for name in found if name.endswith(quantized.ACTIVATION_SCALES)]
    if activation:
        notes.append(f"{len(activation)} fixed scales of activations are ignored: {activation[0]}, ...")
    harmless.update(activation)
    problems += [f"{name} is not part of this architecture" for name in found
                 if name not in expected and name not in harmless and not name.endswith("rotary_emb.inv_freq")]
    if Path(folder, "model.safetensors").is_file() and Path(folder, "model.safetensors.index.json").is_file():
        notes.append("it has both model.safetensors and an index: the index is ignored, as in transformers")
    if config:
        n = sum(dtype == "F8_E4M3" for _, dtype in readable.values())
        notes.append(f"{n} weights in FP8 ({config.get('quant_method')}), dequantized as they are loaded")
    return problems, notes


def head_is_embedding(folder):
    """Whether a tied model's lm_head.weight, if the files have one at all, equals its embedding."""
    where, found, _ = weight_files(folder)
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    if head not in found:
        return True
    with torch.device("cpu"), safe_open(where[head], "pt") as head_file, safe_open(where[embed], "pt") as embed_file:
        pair = head_file.get_slice(head), embed_file.get_slice(embed)
        n = found[head][0][0]
        return all(torch.equal(*(part[i : i + 4096] for part in pair)) for i in range(0, n, 4096))


@torch.no_grad()
def load(folder, model, optimizer=None):
    """Fill model, in place, from a folder that model_config has seen; and the optimizer's master weights, unrounded.

    Each rank reads the rows that it holds, and of those one tensor's at a time. Dtypes convert, FP8 weights are
    dequantized. UserError for nan.
    """
    where, found, _ = weight_files(folder)
    params = dict(model.named_parameters())
    masters = optimizer.masters if optimizer else {}
    source, architecture = read_config(folder)
    block = quantized.block_size(source.get("quantization_config"))
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, "pt")) for path in set(where.values())}
        for name, (ours, first, shape) in layout(model.cfg, architecture).items():
            held = shard_rows(torch.arange(params[ours].shape[0]), params[ours])
            begin, end = (int(held[0]), int(held[-1]) + 1) if len(held) else (0, 0)
            start, stop = max(begin, first), min(end, first + shape[0])
            if start < stop:
                rows = files[where[name]].get_slice(name)[start - first : stop - first]
                if rows.dtype == torch.float8_e4m3fn:
                    scale = quantized.scale_of(name, found)
                    rows = quantized.dequantize(rows, files[where[scale]].get_tensor(scale), start - first, shape[0],
                                                block)
                for target in (plain_local(params[ours]), *([masters[ours]] if ours in masters else [])):
                    target[start - begin : stop - begin].copy_(rows)
    if bad := [name for name, p in params.items() if plain_local(p).isnan().any()]:
        raise UserError(f"{folder} holds nan, in {', '.join(bad[:3])}: download it again")
