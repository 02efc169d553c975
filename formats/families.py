"""The families of models: how each says in config.json what it is, and what it calls its tensors.

config.json means what transformers makes of it, or it is an error: every key is followed, checked, reported or ignored
for a reason (KEYS). A new family with the block of model.py is one entry in ARCHITECTURES. A new part of the block is
also a switch of model.ModelConfig, which read_switches() reads and config_json() writes.
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


MULTIPLIERS = {"embedding_multiplier": "embedding_multiplier", "residual_multiplier": "residual_multiplier",
               "attention_multiplier": "attention_multiplier", "logit_divisor": "logits_scaling"}
ARCHITECTURES = {
    "LlamaForCausalLM": Family("llama", SPLIT, reads=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": Family("mistral", SPLIT, reads=("sliding_window", "head_dim"),
                                 defaults={"sliding_window": 4096}),
    "Qwen2ForCausalLM": Family("qwen2", SPLIT, {"qkv_bias": True}, ("use_sliding_window", "head_dim")),
    "Qwen3ForCausalLM": Family("qwen3", SPLIT, {"qk_norm": "head"},
                               ("use_sliding_window", "head_dim", "attention_bias"), defaults={"head_dim": 128}),
    "Phi3ForCausalLM": Family("phi3", FUSED, reads=("partial_rotary_factor", "sliding_window"), ropes=("longrope",),
                              defaults={"original_max_position_embeddings": 4096}),
    "SmolLM3ForCausalLM": Family("smollm3", SPLIT, reads=("no_rope_layers", "attention_bias", "mlp_bias"), defaults={
        "no_rope_layer_interval": 4, "rope_theta": 2e6, "tie_word_embeddings": True}),
    "Olmo2ForCausalLM": Family("olmo2", NORM_AFTER, {"qk_norm": "all", "norm_after": True}, ("attention_bias",)),
    "GraniteForCausalLM": Family("granite", SPLIT, reads=("attention_bias", "mlp_bias", *MULTIPLIERS.values()),
                                 defaults={"attention_multiplier": 1.0}),
}
SIZES = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
         "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "head_dim": "head_dim",
         "ffn_dim": "intermediate_size", "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings"}
# Keys that only some families read, and the value that means the same to all: another one is an error elsewhere.
OPTIONAL = {"attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0, "use_sliding_window": False,
            "no_rope_layers": None, **dict.fromkeys(MULTIPLIERS.values(), 1.0)}

# Types of keys that are not a field of ModelConfig by themselves.
TYPES = {"max_position_embeddings": int, "original_max_position_embeddings": int, "rope_scaling": dict,
         "rope_parameters": dict, "layer_types": list[str], "max_window_layers": int, "no_rope_layers": list[int],
         "no_rope_layer_interval": int}

FOLLOW, CHECK, REPORT, IGNORE = "follow", "check", "report", "ignore"
# Every key of the published config.json files of these families: FOLLOW (what it decides), CHECK (another value is an
# error), REPORT (another value is a line on the screen), IGNORE (why). A key that is not here is a line on the screen.
KEYS = {
    "architectures": (FOLLOW, "the family"),
    "model_type": (FOLLOW, "the family"),
    **{theirs: (FOLLOW, ours) for ours, theirs in (SIZES | MULTIPLIERS).items()},
    "max_position_embeddings": (FOLLOW, "the longest block_size"),
    "rope_theta": (FOLLOW, "rope_theta"),
    "rope_scaling": (FOLLOW, "rope_scaling"),  # transformers 4
    "rope_parameters": (FOLLOW, "rope_scaling"),  # transformers 5
    "original_max_position_embeddings": (FOLLOW, "rope_scaling"),
    "partial_rotary_factor": (FOLLOW, "rope_fraction"),
    "attention_bias": (FOLLOW, "qkv_bias, out_bias"),
    "mlp_bias": (FOLLOW, "mlp_bias"),
    "sliding_window": (FOLLOW, "sliding_window"),
    "use_sliding_window": (FOLLOW, "sliding_window"),
    "max_window_layers": (FOLLOW, "sliding_window"),
    "layer_types": (FOLLOW, "sliding_window"),
    "no_rope_layers": (FOLLOW, "no_rope_interval"),
    "no_rope_layer_interval": (FOLLOW, "no_rope_interval"),
    "dtype": (FOLLOW, "the precision of sample.py and eval.py"),  # transformers 5
    "torch_dtype": (FOLLOW, "the precision of sample.py and eval.py"),  # transformers 4
    "quantization_config": (FOLLOW, "how FP8 weights are read"),
    "hidden_act": (CHECK, "silu"),
    "lm_head_bias": (CHECK, False),
    "use_mrope": (CHECK, False),  # rotary positions of images
    "full_attn_mod": (CHECK, 1),  # Phi-4-mini: of code that its folder holds, not of transformers
    "interpolate_factor": (CHECK, 1),
    "attention_dropout": (REPORT, 0.0),
    "resid_pdrop": (REPORT, 0.0),
    "embd_pdrop": (REPORT, 0.0),
    "bos_token_id": (IGNORE, "the tokenizer's files decide"),
    "eos_token_id": (IGNORE, "the tokenizer's files decide"),
    "pad_token_id": (IGNORE, "nothing is padded with a token that counts"),
    "initializer_range": (IGNORE, "the folder has all weights"),
    "pretraining_tp": (IGNORE, "transformers 5 does not read it"),
    "layer_norm_eps": (IGNORE, "transformers does not read it in a model with RMSNorm"),
    "auto_map": (IGNORE, "transformers runs its own class, not code from the folder, unless asked to trust it"),
    "use_cache": (IGNORE, "the logits are the same"),
    "transformers_version": (IGNORE, "says who wrote the file"),
    "_name_or_path": (IGNORE, "says where the model was"),
}
# config.json's name of each field of RopeScaling that a kind has
LENGTHS = {"factor": "factor", "original_max_position": "original_max_position_embeddings"}
ROPE = {"linear": {"factor": "factor"},
        "llama3": LENGTHS | {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
        "yarn": LENGTHS | {"beta_fast": "beta_fast", "beta_slow": "beta_slow", "attention_factor": "attention_factor"},
        "longrope": LENGTHS | {"short_factors": "short_factor", "long_factors": "long_factor",
                               "attention_factor": "attention_factor"}}


def read_switches(source, architecture):
    """(values for ModelConfig, problems, notes) of a config.json."""
    family = ARCHITECTURES[architecture]
    source = family.defaults | source
    values = {ours: source[key] for ours, key in SIZES.items() if source.get(key) is not None}
    values = {"n_kv_head": values.get("n_head"), "tie_embeddings": False, **values, **family.always}
    if missing := [key for ours, key in SIZES.items() if ours not in values and ours != "head_dim"]:
        return values, [f"config.json has no {', '.join(missing)}"], []
    types = {f.name: f.type for f in fields(models.ModelConfig)}
    wrong = [f"{SIZES[ours]}={value!r} in config.json: expected {schema.type_name(types[ours])}"
             for ours, value in values.items() if ours in SIZES and not schema.fits(value, types[ours])]
    wrong += [f"{key}={source[key]!r} in config.json: expected {schema.type_name(kind)}"
              for key, kind in TYPES.items() if source.get(key) is not None and not schema.fits(source[key], kind)]
    if wrong:
        return values, wrong, []
    width = values.get("head_dim", values["n_embd"] // max(1, values["n_head"]))
    problems, notes = [], []
    for key, (action, value) in KEYS.items():
        if action == CHECK and source.get(key) not in (None, value):
            problems.append(f"{key}={source[key]!r} is not supported, only {value!r}")
        if action == REPORT and source.get(key) not in (None, value):
            notes.append(f"{key}={source[key]} in config.json is ignored: there is no dropout here")
    for key, neutral in OPTIONAL.items():
        if key not in family.reads and source.get(key) not in (None, neutral):
            problems.append(f"{key}={source[key]!r} is not supported for {architecture}")
    if source.get("sliding_window") and not {"sliding_window", "use_sliding_window"} & set(family.reads):
        notes.append(f"sliding_window={source['sliding_window']} in config.json is ignored: {architecture} has none")
    if unknown := sorted(set(source) - set(KEYS)):
        notes.append(f"config.json has keys that nothing here reads: {', '.join(unknown)}")

    for ours, key in MULTIPLIERS.items():
        if key in family.reads and source.get(key) is not None:
            values[ours] = source[key]
    if width > 0 and values.get("attention_multiplier") == width**-0.5:
        del values["attention_multiplier"]
    if "attention_bias" in family.reads and source.get("attention_bias"):
        values |= {"qkv_bias": source["attention_bias"], "out_bias": source["attention_bias"]}
    if "mlp_bias" in family.reads and source.get("mlp_bias"):
        values["mlp_bias"] = source["mlp_bias"]
    if "no_rope_layers" in family.reads:
        values["no_rope_interval"] = source.get("no_rope_layer_interval") or 0
        if (layers := source.get("no_rope_layers")) is not None:  # 1: with rotary positions
            n = layers.index(0) + 1 if 0 in layers else 0
            values["no_rope_interval"] = n
            if layers[: values["n_layer"]] != [int(not n or (i + 1) % n != 0) for i in range(values["n_layer"])]:
                problems.append(f"no_rope_layers={layers} is not supported, only a 0 at every n-th place")
    read_window(source, family, values, problems)
    read_rope(source, architecture, values, problems)
    problems += [f"{MULTIPLIERS.get(ours, ours)}={value!r} in config.json: expected {schema.type_name(types[ours])}"
                 for ours, value in values.items() if not schema.fits(value, types[ours])]
    for ours, value in values.items():
        if types[ours] is float and isinstance(value, int):  # some files have integers
            values[ours] = float(value)
    values["head_dim"] = width
    return values, problems, notes


def read_window(source, family, values, problems):
    """Set values["sliding_window"], one for all layers."""
    window, by_layer = None, "use_sliding_window" in family.reads
    if "sliding_window" in family.reads or by_layer and source.get("use_sliding_window"):
        window = source.get("sliding_window")
    expected = "sliding_attention" if window else "full_attention"
    layers = source.get("layer_types")
    if by_layer and window and layers is None:  # the first max_window_layers layers have none
        full = source.get("max_window_layers")
        full = min(28 if full is None else full, values["n_layer"])
        layers = ["full_attention"] * full + ["sliding_attention"] * (values["n_layer"] - full)
    kinds = set(layers or [expected])
    if by_layer and kinds == {"full_attention"}:
        window = None
    elif kinds != {expected}:
        others = ", ".join(sorted(kinds - {expected}))
        problems.append(f"layer_types with {others} are not supported here, only {expected}")
    values["sliding_window"] = window


def read_rope(source, architecture, values, problems):
    """Set what rotary positions need, from rope_parameters (transformers 5) or rope_theta and rope_scaling (4)."""
    family = ARCHITECTURES[architecture]
    rope = {"rope_theta": source.get("rope_theta"), "partial_rotary_factor": source.get("partial_rotary_factor"),
            **(source.get("rope_scaling") or source.get("rope_parameters") or {})}
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0,
            **{key: value for key, value in rope.items() if value is not None}}
    values |= {"rope_theta": rope["rope_theta"], "rope_fraction": rope["partial_rotary_factor"]}
    if values["rope_fraction"] != 1 and "partial_rotary_factor" not in family.reads:
        problems.append(f"partial_rotary_factor={values['rope_fraction']} is not supported for {architecture}")
    if any(isinstance(value, dict) for value in rope.values()):
        problems.append("rope_parameters that differ by layer are not supported")
        return
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "su" and architecture == "Phi3ForCausalLM":  # its first name
        kind = "longrope"
    if kind == "default":
        return
    if kind not in family.ropes:
        problems.append(f"rope_type={kind!r} is not supported for {architecture}")
        return
    names = ROPE[kind]
    rope["original_max_position_embeddings"] = (source.get("original_max_position_embeddings")
                                                or rope.get("original_max_position_embeddings")
                                                or source.get("max_position_embeddings"))
    types = {names[f.name]: f.type for f in fields(models.RopeScaling) if f.name in names}
    types |= {"mscale": float, "mscale_all_dim": float}
    if wrong := [f"{key}={rope[key]!r} in config.json: expected {schema.type_name(expected)}"
                 for key, expected in types.items() if key in rope and not schema.fits(rope[key], expected)]:
        problems += wrong
        return
    original, factor = rope["original_max_position_embeddings"], rope.get("factor")
    if kind in ("yarn", "longrope") and original and source.get("max_position_embeddings"):
        ratio = source["max_position_embeddings"] / original
        if kind == "longrope" and factor not in (None, ratio) and rope.get("attention_factor") is None:
            rope["attention_factor"] = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
        rope["factor"] = factor = ratio if kind == "longrope" else factor or ratio
    if kind == "yarn":
        if rope.get("mscale") and rope.get("mscale_all_dim") and rope.get("attention_factor") is None and factor:
            factors = [0.1 * rope[key] * math.log(max(factor, 1)) + 1 for key in ("mscale", "mscale_all_dim")]
            rope["attention_factor"] = factors[0] / factors[1]
        rope |= {"beta_fast": rope.get("beta_fast") or 32.0, "beta_slow": rope.get("beta_slow") or 1.0}
        if not rope.get("truncate", True):
            problems.append("truncate=False of rope_type='yarn' is not supported")
    missing = [key for key in names.values() if rope.get(key) is None and key != "attention_factor"]
    problems += [f"config.json has rope_type={kind!r}, but no {key}" for key in missing]
    known = {*names.values(), "rope_type", "type", "rope_theta", "partial_rotary_factor",
             "original_max_position_embeddings", *(("mscale", "mscale_all_dim", "truncate") if kind == "yarn" else ())}
    problems += [f"{key} of rope_type={kind!r} is not supported" for key in rope if key not in known]
    if not missing:
        found = {ours: rope[key] for ours, key in names.items() if rope.get(key) is not None}
        values["rope_scaling"] = models.RopeScaling(kind=kind, **found)


def config_json(cfg, dtype, architecture=None):
    """What config.json must say of a ModelConfig whose weights are in `dtype`, for old and new transformers.

    architecture: by default the first that can express all of it. Raises UserError where none can.
    """
    if architecture is None:
        for name, family in ARCHITECTURES.items():
            found = config_json(cfg, dtype, name)
            values, problems, _ = read_switches(found | {"max_position_embeddings": longest(cfg)}, name)
            odd_heads = cfg.n_head * cfg.head_dim != cfg.n_embd and "head_dim" not in family.reads
            if not problems and not odd_heads and models.ModelConfig(**values, block_size=cfg.block_size) == cfg:
                return found
        used = ", ".join(sorted(f.name for f in fields(cfg) if f.name not in (*SIZES, "block_size", "rope_theta")
                                and getattr(cfg, f.name) != getattr(models.ModelConfig(), f.name)))
        raise UserError(f"none of {', '.join(ARCHITECTURES)} can have {used or 'heads of this width'} together")
    family = ARCHITECTURES[architecture]
    dtype = str(dtype).removeprefix("torch.")
    found = {"architectures": [architecture], "model_type": family.model_type, "hidden_act": "silu", "dtype": dtype,
             "torch_dtype": dtype, **{key: getattr(cfg, ours) for ours, key in SIZES.items()}}
    rope, scaling = {"rope_type": "default", "rope_theta": cfg.rope_theta}, cfg.rope_scaling
    if scaling:
        rope["rope_type"] = scaling.kind
        rope |= {key: getattr(scaling, ours) for ours, key in ROPE[scaling.kind].items()
                 if getattr(scaling, ours) is not None}
    found |= {"rope_theta": cfg.rope_theta, "rope_parameters": rope, "rope_scaling": None}
    if scaling and scaling.kind == "longrope":  # older Phi3Config wants these three and the length beside them
        found["original_max_position_embeddings"] = scaling.original_max_position
        three = {"type": "longrope", "short_factor": scaling.short_factors, "long_factor": scaling.long_factors}
        extra = {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
        found["rope_scaling"] = three | extra
    elif scaling:
        found["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    switches = {"partial_rotary_factor": cfg.rope_fraction, "sliding_window": cfg.sliding_window,
                "attention_bias": cfg.qkv_bias and cfg.out_bias, "mlp_bias": cfg.mlp_bias,
                **{key: getattr(cfg, ours) for ours, key in MULTIPLIERS.items()}}
    if cfg.attention_multiplier is None:
        switches["attention_multiplier"] = cfg.head_dim**-0.5
    found |= {key: value for key, value in switches.items() if key in family.reads}
    if "partial_rotary_factor" in family.reads:
        rope["partial_rotary_factor"] = cfg.rope_fraction
    if "use_sliding_window" in family.reads:
        found |= {"use_sliding_window": cfg.sliding_window is not None, "sliding_window": cfg.sliding_window,
                  "max_window_layers": cfg.n_layer if cfg.sliding_window is None else 0}
    if "no_rope_layers" in family.reads:
        n = cfg.no_rope_interval
        found["no_rope_layers"] = [int(not n or (i + 1) % n != 0) for i in range(cfg.n_layer)]
    return found


def longest(cfg):
    """max_position_embeddings of a model from scratch."""
    scaling = cfg.rope_scaling
    return round(scaling.original_max_position * scaling.factor) if scaling else cfg.block_size
