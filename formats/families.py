"""The families of models: how each says in config.json what it is, and what it calls its tensors.

config.json means what transformers makes of it, or it is an error: every key is followed, checked, reported or ignored
for a reason (KEYS). A new family with the block of model.py is one entry in ARCHITECTURES. A new switch of ModelConfig
is also one in FIELDS, and in OPTIONAL unless all families have it.
"""

import math
from dataclasses import fields
from typing import NamedTuple

import model as models
from plumbing import schema
from plumbing.errors import UserError

# Our modules by their names in the files; several names are stacked row-wise in ours.
SPLIT = {
    "embed": ["model.embed_tokens"],
    "layers.*.attn_norm": ["model.layers.*.input_layernorm"],
    "layers.*.attn.qkv": [f"model.layers.*.self_attn.{x}_proj" for x in "qkv"],
    "layers.*.attn.q_norm": ["model.layers.*.self_attn.q_norm"],
    "layers.*.attn.k_norm": ["model.layers.*.self_attn.k_norm"],
    "layers.*.attn.out": ["model.layers.*.self_attn.o_proj"],
    "layers.*.mlp_norm": ["model.layers.*.post_attention_layernorm"],
    "layers.*.mlp.gate_up": [f"model.layers.*.mlp.{x}_proj" for x in ("gate", "up")],
    "layers.*.mlp.down": ["model.layers.*.mlp.down_proj"],
    "norm": ["model.norm"],
    "lm_head": ["lm_head"],
}
FUSED = SPLIT | {"layers.*.attn.qkv": ["model.layers.*.self_attn.qkv_proj"],
                 "layers.*.mlp.gate_up": ["model.layers.*.mlp.gate_up_proj"]}
NORM_AFTER = SPLIT | {"layers.*.attn_norm": ["model.layers.*.post_attention_layernorm"],
                      "layers.*.mlp_norm": ["model.layers.*.post_feedforward_layernorm"]}


class Family(NamedTuple):
    """What an architecture of transformers has beside the sizes."""

    model_type: str
    names: dict  # its tensors
    always: dict = {}  # switches of ModelConfig that all its models have
    reads: tuple = ()  # the keys of OPTIONAL that it reads
    ropes: tuple = ("llama3", "linear", "yarn")
    defaults: dict = {}  # what a missing key means


# Keys that only some families read, and the value that means the same to all: another one is an error elsewhere.
MULTIPLIERS = dict.fromkeys(
    ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"), 1.0)
OPTIONAL = {"attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0, "sliding_window": None,
            "use_sliding_window": False, "no_rope_layers": None, "no_rope_layer_interval": None, **MULTIPLIERS}
ARCHITECTURES = {
    "LlamaForCausalLM": Family("llama", SPLIT, reads=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": Family("mistral", SPLIT, reads=("sliding_window",), defaults={"sliding_window": 4096}),
    "Qwen2ForCausalLM": Family("qwen2", SPLIT, {"qkv_bias": True}, ("sliding_window", "use_sliding_window")),
    "Qwen3ForCausalLM": Family("qwen3", SPLIT, {"qk_norm": "head"},
                               ("sliding_window", "use_sliding_window", "attention_bias"), defaults={"head_dim": 128}),
    "Phi3ForCausalLM": Family("phi3", FUSED, reads=("partial_rotary_factor", "sliding_window"), ropes=("longrope",),
                              defaults={"original_max_position_embeddings": 4096}),
    "SmolLM3ForCausalLM": Family(
        "smollm3", SPLIT, reads=("no_rope_layers", "no_rope_layer_interval", "attention_bias", "mlp_bias"),
        defaults={"no_rope_layer_interval": 4, "rope_theta": 2e6, "tie_word_embeddings": True}),
    "Olmo2ForCausalLM": Family("olmo2", NORM_AFTER, {"qk_norm": "all", "norm_after": True}, ("attention_bias",)),
    "GraniteForCausalLM": Family("granite", SPLIT, reads=("attention_bias", "mlp_bias", *MULTIPLIERS),
                                 defaults={"attention_multiplier": 1.0}),
}

# What becomes of every key of the published config.json files of these families. A key that is in no table here is a
# line on the screen.
SIZES = {"vocab_size": "vocab_size", "hidden_size": "n_embd", "num_hidden_layers": "n_layer",
         "num_attention_heads": "n_head", "intermediate_size": "ffn_dim", "rms_norm_eps": "norm_eps"}  # must be there
FIELDS = SIZES | {  # the field of ModelConfig that has the key's value
    "num_key_value_heads": "n_kv_head", "head_dim": "head_dim", "tie_word_embeddings": "tie_embeddings",
    "mlp_bias": "mlp_bias", "sliding_window": "sliding_window", "rope_theta": "rope_theta",
    "partial_rotary_factor": "rope_fraction", "no_rope_layer_interval": "no_rope_interval",
    "embedding_multiplier": "embedding_multiplier", "residual_multiplier": "residual_multiplier",
    "attention_multiplier": "attention_multiplier", "logits_scaling": "logit_divisor"}
FOLLOWED = {  # types of the keys that decide something else, or more than one field
    "architectures": list[str], "model_type": str, "dtype": str, "torch_dtype": str, "quantization_config": dict,
    "max_position_embeddings": schema.PositiveInt, "original_max_position_embeddings": int, "rope_scaling": dict,
    "rope_parameters": dict, "attention_bias": bool, "use_sliding_window": bool, "max_window_layers": int,
    "layer_types": list[str], "no_rope_layers": list[int]}
CHECKED = {  # another value is an error
    "hidden_act": "silu", "lm_head_bias": False, "use_mrope": False,  # rotary positions of images
    "full_attn_mod": 1, "interpolate_factor": 1}  # Phi-4-mini: of code that its folder holds, not of transformers
REPORTED = {"attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}  # another value is a line on the screen
IGNORED = {
    "bos_token_id": "the tokenizer's files decide",
    "eos_token_id": "the tokenizer's files decide",
    "pad_token_id": "nothing is padded with a token that counts",
    "initializer_range": "the folder has all weights",
    "pretraining_tp": "transformers 5 does not read it",
    "layer_norm_eps": "transformers does not read it in a model with RMSNorm",
    "auto_map": "transformers runs its own class, not code from the folder, unless asked to trust it",
    "use_cache": "the logits are the same",
    "transformers_version": "says who wrote the file",
    "_name_or_path": "says where the model was",
}
KEYS = {"follow": FIELDS | FOLLOWED, "check": CHECKED, "report": REPORTED, "ignore": IGNORED}
FIELD_TYPES = {f.name: f.type for f in fields(models.ModelConfig)}
TYPES = {key: FIELD_TYPES[field] for key, field in FIELDS.items()} | FOLLOWED
TYPES["sliding_window"] = int  # its range counts where windows are on

# config.json's name of each field of RopeScaling that a kind has
LENGTHS = {"factor": "factor", "original_max_position": "original_max_position_embeddings"}
ROPE = {"linear": {"factor": "factor"},
        "llama3": LENGTHS | {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
        "yarn": LENGTHS | {"beta_fast": "beta_fast", "beta_slow": "beta_slow", "attention_factor": "attention_factor"},
        "longrope": LENGTHS | {"short_factors": "short_factor", "long_factors": "long_factor",
                               "attention_factor": "attention_factor"}}
ROPE_TYPES = {f.name: f.type for f in fields(models.RopeScaling)}


def wrong_types(source, types):
    """A problem for each value of config.json that is not of its type."""
    return [f"{key}={source[key]!r} in config.json: expected {schema.type_name(kind)}"
            for key, kind in types.items() if key in source and not schema.fits(source[key], kind)]


def read_switches(source, architecture):
    """(values for ModelConfig, problems, notes) of a config.json."""
    family = ARCHITECTURES[architecture]
    source = {key: value for key, value in (family.defaults | source).items() if value is not None}
    rope = source.get("rope_scaling") or source.get("rope_parameters") or {}  # of transformers 4 and 5
    if isinstance(rope, dict):
        rope = {key: value for key, value in rope.items() if value is not None}
        source |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    problems = [f"config.json has no {key}" for key in SIZES if key not in source] + wrong_types(source, TYPES)
    if problems:
        return {}, problems, []
    notes = [f"{key}={source[key]} in config.json is ignored: there is no dropout here"
             for key, neutral in REPORTED.items() if source.get(key, neutral) != neutral]
    if unknown := sorted(set(source).difference(*KEYS.values())):
        notes.append(f"config.json has keys that nothing here reads: {', '.join(unknown)}")
    problems += [f"{key}={source[key]!r} is not supported, only {only!r}"
                 for key, only in CHECKED.items() if source.get(key, only) != only]
    for key in [key for key in OPTIONAL if key not in family.reads]:
        value = source.pop(key, OPTIONAL[key])
        if value != OPTIONAL[key] and key == "sliding_window":
            notes.append(f"{key}={value} in config.json is ignored: {architecture} has none")
        elif value != OPTIONAL[key]:
            problems.append(f"{key}={value!r} is not supported for {architecture}")

    bias = source.get("attention_bias", False)
    values = {"qkv_bias": bias, "out_bias": bias, **family.always}
    for key, field in FIELDS.items():
        if key in source:  # some files have integers for floats
            is_float = schema.without_range(FIELD_TYPES[field]) is float
            values[field] = float(source[key]) if is_float else source[key]
    values.setdefault("n_kv_head", values["n_head"])
    values.setdefault("head_dim", values["n_embd"] // max(1, values["n_head"]))
    if values["head_dim"] > 0 and values.get("attention_multiplier") == values["head_dim"] ** -0.5:
        del values["attention_multiplier"]
    if "no_rope_layers" in source:
        layers = source["no_rope_layers"]
        values["no_rope_interval"] = layers.index(0) + 1 if 0 in layers else 0
        if layers[: values["n_layer"]] != no_rope_layers(values["no_rope_interval"], values["n_layer"]):
            problems.append(f"no_rope_layers={layers} is not supported, only a 0 at every n-th place")
    read_window(source, "use_sliding_window" in family.reads, values, problems)
    values["rope_scaling"] = read_rope(rope, source, architecture, problems)
    return values, problems, notes


def no_rope_layers(interval, n_layer):
    """config.json's list of layers: 1 with rotary positions, 0 without."""
    return [int(not interval or (i + 1) % interval != 0) for i in range(n_layer)]


def read_window(source, by_layer, values, problems):
    """Set values["sliding_window"], one for all layers. by_layer: the family has windows in some layers only."""
    window = source.get("sliding_window") if source.get("use_sliding_window", not by_layer) else None
    problems += wrong_types({"sliding_window": window}, {"sliding_window": FIELD_TYPES["sliding_window"]})
    kinds = set(source.get("layer_types", ()))
    if by_layer and window and not kinds:
        full = source.get("max_window_layers", 28)  # so many layers have none, then all have it
        kinds = {"full_attention" if i < full else "sliding_attention" for i in range(values["n_layer"])}
    expected = "sliding_attention" if window else "full_attention"
    if by_layer and kinds == {"full_attention"}:
        window = None
    elif others := sorted(kinds - {expected}):
        problems.append(f"layer_types with {', '.join(others)} are not supported here, only {expected}")
    values["sliding_window"] = window


def read_rope(rope, source, architecture, problems):
    """The RopeScaling of rope_parameters or rope_scaling; None if there is none, or after a problem."""
    if any(isinstance(value, dict) for value in rope.values()):
        problems.append("rope_parameters that differ by layer are not supported")
        return None
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # its first name
    if kind not in ("default", *ARCHITECTURES[architecture].ropes):
        problems.append(f"rope_type={kind!r} is not supported for {architecture}")
    if kind not in ARCHITECTURES[architecture].ropes:
        return None
    names, longest = ROPE[kind], source.get("max_position_embeddings")
    original = source.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", longest))
    known = {key: ROPE_TYPES[field] for field, key in (LENGTHS | names).items()}
    given = {key: value for key, value in rope.items()
             if key not in ("rope_type", "type", "rope_theta", "partial_rotary_factor")}
    if original is not None:
        given["original_max_position_embeddings"] = original
    problems += [f"{key} of rope_type={kind!r} is not supported" for key in given if key not in known]
    if wrong := wrong_types(given, known):
        problems += wrong
        return None

    factor, ratio = given.get("factor"), longest / original if longest and original else None
    if kind == "longrope":
        if factor and ratio not in (None, factor) and "attention_factor" not in given:
            given["attention_factor"] = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
        given["factor"] = ratio or factor
    if kind == "yarn":
        given["factor"] = factor or ratio
        given |= {"beta_fast": given.get("beta_fast") or 32.0, "beta_slow": given.get("beta_slow") or 1.0}
    found = {field: given[key] for field, key in names.items() if given.get(key) is not None}
    missing = names.keys() - found.keys() - {"attention_factor"}
    problems += [f"config.json has rope_type={kind!r}, but no {names[field]}" for field in sorted(missing)]
    return None if missing else models.RopeScaling(kind=kind, **found)


def config_json(cfg, dtype, architecture=None):
    """What config.json must say of a ModelConfig whose weights are in `dtype`, for old and new transformers.

    architecture: by default the first that can express all of it. Raises UserError where none can.
    """
    if architecture is None:
        for name in ARCHITECTURES:
            found = config_json(cfg, dtype, name)
            values, problems, _ = read_switches(found | {"max_position_embeddings": longest(cfg)}, name)
            if not problems and models.ModelConfig(**values, block_size=cfg.block_size) == cfg:
                return found
        everywhere = {"block_size", *(field for key, field in FIELDS.items() if key not in OPTIONAL)}
        used = [field for field in sorted(FIELD_TYPES.keys() - everywhere)
                if getattr(cfg, field) != getattr(models.ModelConfig(), field)]
        raise UserError(f"none of {', '.join(ARCHITECTURES)} can have {', '.join(used)} together")
    family = ARCHITECTURES[architecture]
    dtype = str(dtype).removeprefix("torch.")
    found = {"architectures": [architecture], "model_type": family.model_type, "hidden_act": "silu", "dtype": dtype,
             "torch_dtype": dtype, "attention_bias": cfg.qkv_bias and cfg.out_bias,
             "use_sliding_window": cfg.sliding_window is not None,
             "no_rope_layers": no_rope_layers(cfg.no_rope_interval, cfg.n_layer),
             **{key: getattr(cfg, field) for key, field in FIELDS.items()}}
    if cfg.attention_multiplier is None:
        found["attention_multiplier"] = cfg.head_dim**-0.5
    found = {key: value for key, value in found.items() if key in family.reads or key not in OPTIONAL}
    if "use_sliding_window" in family.reads:
        found["max_window_layers"] = cfg.n_layer if cfg.sliding_window is None else 0
    rope, scaling = {"rope_type": "default", "rope_theta": cfg.rope_theta}, cfg.rope_scaling
    if "partial_rotary_factor" in family.reads:
        rope["partial_rotary_factor"] = cfg.rope_fraction
    found |= {"rope_parameters": rope, "rope_scaling": None}
    if scaling:
        given = {key: getattr(scaling, field) for field, key in ROPE[scaling.kind].items()
                 if getattr(scaling, field) is not None}
        rope |= {"rope_type": scaling.kind, **given}
        found["rope_scaling"] = {"rope_type": scaling.kind, **given}
        if scaling.kind == "longrope":  # older Phi3Config wants these fields, and the length beside them
            del given["factor"]
            found["original_max_position_embeddings"] = given.pop("original_max_position_embeddings")
            found["rope_scaling"] = {"type": "longrope", **given}
    return found


def longest(cfg):
    """max_position_embeddings of a model from scratch."""
    scaling = cfg.rope_scaling
    return round(scaling.original_max_position * scaling.factor) if scaling else cfg.block_size
