"""Hugging Face folders: config.json and safetensors, in and out.

config.json decides the architecture. Each rank reads only the rows that it holds, so nobody ever has the whole model.
No pickle is loaded. Everything wrong with a folder is reported together, before any slow step.

A new architecture whose block is ours is one entry in ARCHITECTURES; a new part of the block is also a switch of
model.ModelConfig, read in model_config() and written in config_json().
"""

import itertools
import json
import re
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import model as models
from plumbing import schema
from plumbing.errors import UserError
from plumbing.sharding import plain_local, shard_rows

# Our modules by their names in the files; where there are several, ours has their rows one below the other.
SPLIT = {
    "embed": ["model.embed_tokens"],
    "layers.*.attn_norm": ["model.layers.*.input_layernorm"],
    "layers.*.attn.qkv": [f"model.layers.*.self_attn.{x}_proj" for x in "qkv"],
    "layers.*.attn.out": ["model.layers.*.self_attn.o_proj"],
    "layers.*.mlp_norm": ["model.layers.*.post_attention_layernorm"],
    "layers.*.mlp.gate_up": [f"model.layers.*.mlp.{x}_proj" for x in ("gate", "up")],
    "layers.*.mlp.down": ["model.layers.*.mlp.down_proj"],
    "norm": ["model.norm"],
    "lm_head": ["lm_head"],
}
FUSED = SPLIT | {"layers.*.attn.qkv": ["model.layers.*.self_attn.qkv_proj"],
                 "layers.*.mlp.gate_up": ["model.layers.*.mlp.gate_up_proj"]}
# architecture: (model_type, names, the switches of ModelConfig that it can have; qkv_bias it has always or never)
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", SPLIT, {"rope_scaling"}),
    "MistralForCausalLM": ("mistral", SPLIT, {"rope_scaling", "sliding_window", "head_dim"}),
    "Qwen2ForCausalLM": ("qwen2", SPLIT, {"rope_scaling", "qkv_bias", "head_dim"}),
    "Phi3ForCausalLM": ("phi3", FUSED, {"rope_fraction", "sliding_window"}),
}
SIZES = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
         "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "head_dim": "head_dim",
         "ffn_dim": "intermediate_size", "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings"}
ROPE = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
        "original_max_position": "original_max_position_embeddings"}
# keys of config.json whose other values mean a model that ours is not
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
        "quantization_config": None}


def read_json(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found


def read_config(folder):
    """(config.json, architecture) of a model folder. UserError if it is none, or not of an architecture we have."""
    if not Path(folder, "config.json").is_file():
        raise UserError(f"{folder} is no Hugging Face model folder (no config.json in it): "
                         "download the model, or name its folder")
    source = read_json(Path(folder, "config.json"))
    architecture = (source.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise UserError(f"{folder}: architecture {architecture!r} is not supported, only {', '.join(ARCHITECTURES)}")
    return source, architecture


def model_config(folder, wanted=None):
    """The ModelConfig of a model folder, after a look at all that is there but the weights' values.

    wanted: a ModelConfig to take block_size from (without one: the longest, up to 8192); what else it has unlike
    ModelConfig's defaults must be as in the folder. Raises one UserError that lists all that is unsupported,
    contradictory, missing or broken. Reads old (rope_theta, rope_scaling) and new (rope_parameters) config.json.
    """
    source, architecture = read_config(folder)
    _, _, switches = ARCHITECTURES[architecture]
    values = {ours: source[key] for ours, key in SIZES.items() if source.get(key) is not None}
    values = {"n_kv_head": values.get("n_head"), "tie_embeddings": False, **values}
    if missing := [key for ours, key in SIZES.items() if ours not in values and ours != "head_dim"]:
        raise UserError(f"{folder}: config.json has no {', '.join(missing)}")
    problems = [f"{key}={source[key]!r} is not supported, only {value!r}" for key, value in ONLY.items()
                if source.get(key) not in (None, value)]

    rope = {"rope_theta": source.get("rope_theta", 10000.0),
            "partial_rotary_factor": source.get("partial_rotary_factor", 1.0),
            **(source.get("rope_scaling") or source.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3" and "rope_scaling" in switches:
        problems += [f"config.json has rope_type='llama3', but no {key}" for key in ROPE.values() if key not in rope]
        values["rope_scaling"] = models.RopeScaling(**{ours: rope.get(key) for ours, key in ROPE.items()})
    elif kind != "default":
        problems.append(f"rope_type={kind!r} is not supported for {architecture}")
    if any(isinstance(value, dict) for value in rope.values()):
        problems.append("rope_parameters that differ by layer are not supported")
    values |= {"rope_theta": rope["rope_theta"], "rope_fraction": rope["partial_rotary_factor"]}
    if values["rope_fraction"] != 1 and "rope_fraction" not in switches:
        problems.append(f"partial_rotary_factor={values['rope_fraction']} is not supported for {architecture}")
    values["qkv_bias"] = "qkv_bias" in switches
    if "sliding_window" in switches:  # a Mistral whose file does not say has 4096 in transformers
        values["sliding_window"] = source.get("sliding_window", 4096 if architecture == "MistralForCausalLM" else None)
    layers = "sliding_attention" if values.get("sliding_window") else "full_attention"
    if other := set(source.get("layer_types") or ()) - {layers}:
        problems.append(f"layer_types with {', '.join(sorted(other))} are not supported here, only {layers}")
    types = {f.name: f.type for f in fields(models.ModelConfig)}
    problems += [f"{SIZES.get(ours, ours)}={value!r} in config.json: expected {schema.type_name(types[ours])}"
                 for ours, value in values.items() if not schema.fits(value, types[ours])]
    if problems:
        raise UserError("\n".join(f"{folder}: {p}" for p in problems))

    values.setdefault("head_dim", values["n_embd"] // max(1, values["n_head"]))
    longest = source.get("max_position_embeddings") or 2048
    cfg = models.ModelConfig(**values, block_size=wanted.block_size if wanted else min(longest, 8192))
    cfg.rope_theta, cfg.rope_fraction = float(cfg.rope_theta), float(cfg.rope_fraction)  # some files have integers
    impossible = [message for _, message in cfg.problems()]
    problems += impossible
    if cfg.block_size > longest:
        problems.append(f"model.block_size={cfg.block_size} is more than its max_position_embeddings={longest}")
    for f in fields(cfg):
        mine, theirs = getattr(wanted or cfg, f.name), getattr(cfg, f.name)
        if mine not in (theirs, getattr(models.ModelConfig(), f.name)):
            problems.append(f"model.{f.name}={mine}, but the folder has {theirs}: of model.*, set block_size alone")
    if not impossible:
        problems += check_weights(folder, layout(cfg, architecture))
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise UserError("\n".join(f"{folder}: {p}" for p in problems[:20] + more))
    return cfg


def config_json(cfg, dtype, architecture=None):
    """What config.json must say of a ModelConfig whose weights are in `dtype`, for old and new transformers.

    architecture: by default the first that has all of its switches. Raises UserError where there is none.
    """
    if architecture is None:
        used = {s for s in ("rope_scaling", "rope_fraction", "sliding_window", "qkv_bias")
                if getattr(cfg, s) != getattr(models.ModelConfig(), s)}
        used |= {"head_dim"} if cfg.n_head * cfg.head_dim != cfg.n_embd else set()
        fitting = [a for a, (_, _, switches) in ARCHITECTURES.items()
                   if used <= switches and cfg.qkv_bias == ("qkv_bias" in switches)]
        if not fitting:
            raise UserError(f"none of {', '.join(ARCHITECTURES)} can have {', '.join(sorted(used))} together")
        architecture = fitting[0]
    model_type, _, switches = ARCHITECTURES[architecture]
    dtype = str(dtype).removeprefix("torch.")
    scaling = cfg.rope_scaling and {"rope_type": "llama3", **{key: getattr(cfg.rope_scaling, ours)
                                                               for ours, key in ROPE.items()}}
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta, **(scaling or {})}
    found = {"architectures": [architecture], "model_type": model_type, "hidden_act": "silu", "dtype": dtype,
             "torch_dtype": dtype, **{key: getattr(cfg, ours) for ours, key in SIZES.items()},
             "rope_theta": cfg.rope_theta, "rope_scaling": scaling, "rope_parameters": rope}
    if "rope_fraction" in switches:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"] = cfg.rope_fraction
    if "sliding_window" in switches:
        found["sliding_window"] = cfg.sliding_window
    return found


# ----------------------------------------------------------------------------------------------------------------
# weights


def layout(cfg, architecture):
    """{name in the files: (name of our parameter, its first row there, shape in the files)}, or UserError."""
    with torch.device("meta"):
        model = models.Transformer(cfg)
    rows = {2: [cfg.ffn_dim] * 2, 3: [n * cfg.head_dim for n in (cfg.n_head, cfg.n_kv_head, cfg.n_kv_head)]}
    names, found = ARCHITECTURES[architecture][1], {}
    for name, p in model.named_parameters():
        module, kind = name.rsplit(".", 1)
        if (ours := re.sub(r"\d+", "*", module)) not in names:
            raise UserError(f"{architecture} has no place for {ours}: add its names to hf.ARCHITECTURES")
        pieces = names[ours]
        sizes = rows.get(len(pieces), [len(p)])
        for piece, n, first in zip(pieces, sizes, itertools.accumulate([0, *sizes]), strict=False):
            piece = piece.replace("*", "".join(re.findall(r"\d+", module)))
            found[f"{piece}.{kind}"] = name, first, (n, *p.shape[1:])
    return found


def weight_files(folder):
    """({tensor: its file}, {tensor: (shape, dtype) in that file, None if it cannot be read}, problems) of a folder."""
    index, single = Path(folder, "model.safetensors.index.json"), Path(folder, "model.safetensors")
    where, found, problems = {}, {}, []
    if index.is_file():
        where = {name: Path(folder, file) for name, file in read_json(index).get("weight_map", {}).items()}
    elif not single.is_file():
        pickles = [p.name for p in sorted(Path(folder).iterdir()) if p.suffix in (".bin", ".pt", ".pth")]
        problems.append("it has neither model.safetensors nor model.safetensors.index.json" + (
            f"; {pickles[0]} is a pickle, which can run code, so it is never loaded: convert it" if pickles else ""))
    for path in sorted(set(where.values())) or [single] * single.is_file():
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    found[name], where[name] = (tuple(part.get_shape()), part.get_dtype()), path
        except (OSError, SafetensorError) as error:
            problems.append(f"{path.name} is missing or broken: {error}")
            found |= dict.fromkeys(name for name in where if where[name] == path)
    return where, found, problems


def check_weights(folder, expected):
    """What keeps the tensors of layout() from being read from a folder, one sentence each."""
    _, found, problems = weight_files(folder)
    if problems and not found:  # nothing that can be compared
        return problems
    for name, (_, _, shape) in expected.items():
        if name not in found:
            problems.append(f"{name} {shape} is missing")
        elif found[name] and found[name][0] != shape:
            problems.append(f"{name} has shape {found[name][0]}, by config.json it should have {shape}")
        elif found[name] and found[name][1] not in ("F32", "BF16", "F16"):
            problems.append(f"{name} is {found[name][1]}, only F32, BF16 and F16 can be read")
    # some files hold what follows from config.json: rotary frequencies, the embedding again as the head tied to it
    tied = {"lm_head.weight"} if found.get("lm_head.weight") == found.get("model.embed_tokens.weight") else set()
    return problems + [f"{name} is not part of this architecture" for name in found
                       if name not in expected and name not in tied and not name.endswith("rotary_emb.inv_freq")]


@torch.no_grad()
def load(folder, model, optimizer=None):
    """Fill model, in place, from a folder that model_config has seen; and the optimizer's master weights, unrounded.

    Each rank reads the rows that it holds, and of those one tensor's at a time. Dtypes convert. UserError for nan.
    """
    where, _, _ = weight_files(folder)
    params = dict(model.named_parameters())
    masters = optimizer.masters if optimizer else {}
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, "pt")) for path in set(where.values())}
        for name, (ours, first, shape) in layout(model.cfg, read_config(folder)[1]).items():
            held = shard_rows(torch.arange(params[ours].shape[0]), params[ours])
            begin, end = (int(held[0]), int(held[-1]) + 1) if len(held) else (0, 0)
            start, stop = max(begin, first), min(end, first + shape[0])
            if start < stop:
                rows = files[where[name]].get_slice(name)[start - first : stop - first]
                for target in (plain_local(params[ours]), *([masters[ours]] if ours in masters else [])):
                    target[start - begin : stop - begin].copy_(rows)
    if bad := [name for name, p in params.items() if plain_local(p).isnan().any()]:
        raise UserError(f"{folder} holds nan, in {', '.join(bad[:3])}: download it again")
