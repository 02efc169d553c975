"""Model folders: every family logit for logit against transformers, in and out; config.json; FP8; what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import build, sqnr
from safetensors.torch import load_file, save_file

import checkpoint
import configurator
import fp8
import model as models
import sample
from data import DataConfig
from formats import families, hf, quantized
from optim import AdamW, OptimConfig
from plumbing.errors import UserError
from plumbing.sharding import plain_local

SIZES = dict(vocab_size=307, hidden_size=96, intermediate_size=152, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=128, pad_token_id=None, bos_token_id=None,
             eos_token_id=None)
THETA = dict(rope_theta=500.0)
LONGROPE = dict(rope_type="longrope", short_factor=[1.0 + 0.1 * i for i in range(8)],
                long_factor=[1.5 + 0.9 * i for i in range(8)], **THETA)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32, **THETA)
PARTIAL = LONGROPE | dict(short_factor=LONGROPE["short_factor"][:6], long_factor=LONGROPE["long_factor"][:6],
                          partial_rotary_factor=0.75)
FAMILIES = {  # class of transformers, and what makes the model
    "llama_2": ("Llama", dict(num_key_value_heads=6)),
    "llama_bias": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama_linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=3.0, **THETA))),
    "llama_3": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "mistral": ("Mistral", dict(sliding_window=13)),
    "mistral_small_3": ("Mistral", dict(sliding_window=None, head_dim=20)),
    "mistral_yarn": ("Mistral", dict(sliding_window=13, rope_parameters=dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=2.0, beta_slow=0.5, **THETA))),
    "qwen_2_5": ("Qwen2", {}),
    "qwen_2_yarn": ("Qwen2", dict(rope_parameters=dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=32, **THETA))),
    "qwen_2_no_window": ("Qwen2", dict(use_sliding_window=True, sliding_window=9, max_window_layers=28)),
    "qwen_2_window": ("Qwen2", dict(use_sliding_window=True, sliding_window=9, max_window_layers=0)),
    "qwen_3": ("Qwen3", dict(head_dim=20)),
    "qwen_3_tied_bias": ("Qwen3", dict(head_dim=16, attention_bias=True, tie_word_embeddings=True)),
    "phi_4": ("Phi3", {}),
    "phi_partial": ("Phi3", dict(partial_rotary_factor=0.5, sliding_window=9)),
    "phi_3_5": ("Phi3", dict(rope_parameters=LONGROPE, original_max_position_embeddings=32, sliding_window=200)),
    "phi_factor": ("Phi3", dict(rope_parameters=LONGROPE | dict(factor=3.0), original_max_position_embeddings=32)),
    "phi_attention_factor": ("Phi3", dict(rope_parameters=LONGROPE | dict(attention_factor=1.4),
                                          original_max_position_embeddings=32)),
    "phi_4_mini": ("Phi3", dict(rope_parameters=PARTIAL, original_max_position_embeddings=32,
                                tie_word_embeddings=True)),
    "smollm_3": ("SmolLM3", dict(num_hidden_layers=5, no_rope_layer_interval=2, **{"head_dim": 16})),
    "olmo_2": ("Olmo2", dict(num_key_value_heads=3)),
    "granite_3": ("Granite", dict(embedding_multiplier=12.0, attention_multiplier=0.08, residual_multiplier=0.22,
                                  logits_scaling=8.0, tie_word_embeddings=True, attention_bias=True)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: folder that transformers saved}: float32, weights so large that a wrong rotation or bias shows."""
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("families")
    for seed, (family, (kind, more)) in enumerate(FAMILIES.items()):
        config = getattr(transformers, f"{kind}Config")(**SIZES | more)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.empty_like(p).normal_(std=0.15, generator=generator) + ("norm" in name))
        model.save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture
def copy(folders, tmp_path):
    return lambda family, name="copy": Path(shutil.copytree(folders[family], tmp_path / name))


def edit_config(folder, remove=(), **changes):
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove}
    path.write_text(json.dumps(config | changes))
    return folder


def reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def loaded(folder, dtype=torch.float32, wanted=None):
    with torch.device("meta"):
        model = models.Transformer(hf.model_config(folder, wanted)).to(dtype)
    model.to_empty(device="cpu")
    models.init_buffers(model)
    for p in model.parameters():
        p.detach().fill_(float("nan"))
    hf.load(folder, model)
    return model


def in_old_style(folder):
    """The folder with config.json as transformers 4 wrote it."""
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    theta, fraction = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", 1.0)
    rope.pop("original_max_position_embeddings" if "short_factor" in rope else "", None)
    return edit_config(folder, remove=("rope_parameters", "dtype", "layer_types"), torch_dtype=config["dtype"],
                       rope_theta=theta, rope_scaling=None if rope["rope_type"] == "default" else rope,
                       **({} if fraction == 1 else {"partial_rotary_factor": fraction}))


@pytest.mark.parametrize("style", ["new", "old"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_greedy_text_are_those_of_transformers(copy, family, style, capsys):
    folder = copy(family) if style == "new" else in_old_style(copy(family))
    theirs, ours = reference(folder), loaded(folder)
    assert not capsys.readouterr().err  # every key of these files is known
    tokens = torch.randint(0, 256, (2, 120), generator=torch.Generator().manual_seed(1))
    for T in (1, 2, 9, 10, 13, 14, 31, 32, 33, 64, 120):  # windows are 9 and 13, the original context 32
        a, b = theirs(tokens[:, :T]).logits, ours(tokens[:, :T])
        assert (a - b).norm() < 1e-5 * a.norm(), T
    theirs.generation_config.update(eos_token_id=None, pad_token_id=0)
    text = theirs.generate(tokens[:1, :10], do_sample=False, max_new_tokens=30)[0, 10:].tolist()
    assert text == list(sample.generate(ours, tokens[0, :10].tolist(), 30, 0, 0, None))


@torch.no_grad()
def test_each_switch_matters_in_these_tests(folders):
    tokens = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(2))
    changes = {"llama_linear": {"rope_scaling": None}, "mistral_yarn": {"rope_scaling": None},
               "qwen_2_yarn": {"rope_scaling": None}, "phi_3_5": {"rope_scaling": None},
               "qwen_2_window": {"sliding_window": None}, "smollm_3": {"no_rope_interval": 0},
               "qwen_3": {"qk_norm": None}, "olmo_2": {"norm_after": False}, "llama_bias": {"mlp_bias": False},
               "phi_4_mini": {"rope_scaling": None}, "granite_3": {"attention_multiplier": None}}
    more = {"granite_3": [{"embedding_multiplier": 1.0}, {"residual_multiplier": 1.0}, {"logit_divisor": 1.0}],
            "mistral_yarn": [{"sliding_window": None}], "llama_bias": [{"out_bias": False}, {"qkv_bias": False}]}
    for family, change in [*changes.items(), *((family, c) for family, listed in more.items() for c in listed)]:
        model = loaded(folders[family])
        other = models.Transformer(models.ModelConfig(**{**vars(model.cfg), **change}))
        other.load_state_dict(model.state_dict(), strict=False)
        models.init_buffers(other)
        logits = model(tokens)
        assert (other(tokens) - logits).norm() > 1e-3 * logits.norm(), (family, change)


@pytest.mark.parametrize("family", ["qwen_3", "phi_3_5", "smollm_3", "olmo_2", "granite_3"])
@torch.no_grad()
def test_packed_documents_have_the_logits_that_each_has_alone(folders, family):
    model = loaded(folders[family])
    lengths = (40, 5, 32, 33)  # longrope's original context is 32
    documents = [torch.randint(0, 256, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(torch.cat(documents, 1), positions=positions).split(lengths, 1)
    for document, logits in zip(documents, packed, strict=True):
        alone = model(document)
        assert (logits - alone).norm() < 1e-5 * alone.norm()


# ----------------------------------------------------------------------------------------------------------------
# out


def save_run(out_dir, model, init_from="scratch", run=None, **config):
    """What train.py leaves of a model in out_dir."""
    config = configurator.Config(model=model.cfg, init_from=str(init_from), dtype="float32", **config)
    config.data.resolve_paths(config.init_from)
    checkpoint.save(out_dir, 1, checkpoint.tensors(model), run or {}, keep=0)
    Path(out_dir, "config.py").write_text(configurator.to_python(config))
    return out_dir


def test_loading_weights_shows_the_time_left(copy, bars):
    model = loaded(copy("llama_2"))
    (bar,) = bars
    assert (bar.desc, bar.n, bar.total) == ("loading weights", len(hf.layout(model.cfg, "LlamaForCausalLM")), bar.n)


def test_an_export_has_the_tokenizer_and_the_template_that_the_run_used(copy, tmp_path, monkeypatch, capsys):
    folder, other, template = copy("llama_2"), tmp_path / "other", tmp_path / "mine.jinja"
    other.mkdir()
    for place, text in ((folder, "of the model"), (other, "of the run")):
        (place / "tokenizer.json").write_text(text)
        (place / "chat_template.jinja").write_text(text)
    template.write_text("of a key")
    model = loaded(folder, wanted=models.ModelConfig(block_size=64))
    for i, (keys, expected) in enumerate((({"tokenizer": str(other)}, ["of the run"] * 2),
                                          ({"chat_template": str(template)}, ["of the model", "of a key"]))):
        out = save_run(tmp_path / f"out{i}", model, folder, data=DataConfig(**keys))
        checkpoint.export(out, tmp_path / f"exported{i}")
        found = [(tmp_path / f"exported{i}" / name).read_text() for name in ("tokenizer.json", "chat_template.jinja")]
        assert found == expected
    monkeypatch.chdir(tmp_path)  # where the run was started; and the export is somewhere else
    out = save_run("relative", model, folder, data=DataConfig(tokenizer="other", chat_template="mine.jinja"))
    monkeypatch.chdir("/")
    checkpoint.export(tmp_path / out, tmp_path / "exported2")
    assert [(tmp_path / "exported2" / name).read_text() for name in ("tokenizer.json", "chat_template.jinja")] == [
        "of the run", "of a key"]
    checkpoint.export(save_run(tmp_path / "named", model, folder, data=DataConfig(tokenizer="a b.json")),
                      tmp_path / "a b")
    assert not (tmp_path / "a b" / "tokenizer.json").exists()
    told = f"it holds no tokenizer: sample.py --from='{tmp_path / 'a b'}' --tokenizer='a b.json'"
    assert told in capsys.readouterr().out


def tensors(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("style", ["new", "old"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_export_gives_back_the_bits_that_were_loaded(copy, tmp_path, family, style):
    folder = copy(family) if style == "new" else in_old_style(copy(family))
    (folder / "tokenizer.json").write_text("{}")
    out = save_run(tmp_path / "out", loaded(folder, wanted=models.ModelConfig(block_size=64)), folder)
    checkpoint.export(out, tmp_path / "exported")
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "exported").iterdir()}
    found, expected = tensors(tmp_path / "exported"), tensors(folder)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], t) for name, t in expected.items())
    theirs, ours = reference(folder), reference(tmp_path / "exported")
    tokens = torch.randint(0, 256, (1, 100))
    assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
    # a reader of either style alone finds the same model
    cfg = hf.model_config(tmp_path / "exported")
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written["max_position_embeddings"] == 128 and written["dtype"] == written["torch_dtype"] == "float32"
    assert cfg == hf.model_config(folder)
    assert cfg == hf.model_config(edit_config(tmp_path / "exported", remove=("rope_parameters", "dtype")))
    new = edit_config(tmp_path / "exported", remove=("rope_scaling", "rope_theta", "partial_rotary_factor"),
                      rope_parameters=written["rope_parameters"])
    assert cfg == hf.model_config(new)


SCRATCH = {
    "LlamaForCausalLM": dict(head_dim=12, qkv_bias=True, out_bias=True, mlp_bias=True,
                             rope_scaling=models.RopeScaling(kind="linear")),
    "MistralForCausalLM": dict(sliding_window=9, rope_scaling=models.RopeScaling(
        kind="yarn", factor=2.0, original_max_position=32, attention_factor=1.3)),
    "Qwen2ForCausalLM": dict(qkv_bias=True, sliding_window=9),
    "Qwen3ForCausalLM": dict(qk_norm="head", head_dim=12, tie_embeddings=True),
    "Phi3ForCausalLM": dict(rope_fraction=0.5, rope_scaling=models.RopeScaling(
        kind="longrope", factor=2.0, original_max_position=32, short_factors=[1.0, 1.5, 2.0, 3.0],
        long_factors=[1.0, 2.5, 4.0, 8.0])),
    "SmolLM3ForCausalLM": dict(no_rope_interval=2),
    "Olmo2ForCausalLM": dict(qk_norm="all", norm_after=True),
    "GraniteForCausalLM": dict(embedding_multiplier=3.0, logit_divisor=7.0),
}


@pytest.mark.parametrize("architecture", SCRATCH)
@torch.no_grad()
def test_a_model_from_scratch_is_exported_as_the_family_that_has_its_switches(tmp_path, architecture):
    model = build(**SCRATCH[architecture])
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    checkpoint.export(save_run(tmp_path / "out", model), tmp_path / "exported")
    theirs = reference(tmp_path / "exported")
    assert type(theirs).__name__ == architecture
    tokens = torch.randint(0, 256, (2, 64))
    logits = theirs(tokens).logits
    assert (model(tokens) - logits).norm() < 1e-5 * logits.norm()
    assert torch.equal(loaded(tmp_path / "exported")(tokens), model(tokens))


# ----------------------------------------------------------------------------------------------------------------
# training: shards, FP8


@pytest.mark.parametrize("family", ["qwen_3", "olmo_2", "granite_3", "phi_4_mini"])
def test_every_rank_gets_its_rows(folders, family):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    whole, world = dict(loaded(folders[family]).named_parameters()), 7
    for rank in (0, 3, world - 1):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            with torch.device("meta"):
                model = models.Transformer(hf.model_config(folders[family]))
            torch.distributed.fsdp.fully_shard(
                model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (world,)))
            model.to_empty(device="cpu")
            hf.load(folders[family], model)
            for name, p in model.named_parameters():
                pieces = whole[name].chunk(world)
                expected = pieces[rank] if rank < len(pieces) else pieces[0][:0]
                assert torch.equal(plain_local(p), expected), name
        finally:
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("switches", [
    dict(qk_norm="head"), dict(qk_norm="all", norm_after=True), dict(no_rope_interval=2, qkv_bias=True, mlp_bias=True),
    dict(residual_multiplier=0.3, embedding_multiplier=4.0, logit_divisor=2.0, attention_multiplier=0.1)])
def test_fp8_trains_every_switch(switches):
    tokens = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(3))
    losses = []
    for enabled in (False, True):
        model = build(fp8.FP8Config(enabled=enabled, emulate=True, filter_fqns=["lm_head"]), **switches)
        loss = model(tokens, tokens.roll(-1, 1), loss_chunks=2) / tokens.numel()
        loss.backward()
        assert len(fp8.float8_linears(model)) == (8 if enabled else 0)
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters()
                   if p.ndim == 2)
        losses.append(loss.item())
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.02 * losses[0]


# ----------------------------------------------------------------------------------------------------------------
# config.json

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
ALL_KEYS = set().union(*families.KEYS.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_load_by_their_config_json_with_the_published_size(name):
    published, parameters = PUBLISHED[name]["config"], PUBLISHED[name]["parameters"]
    values, problems, notes = families.read_switches(published, published["architectures"][0])
    assert not problems and all("dropout" in note for note in notes)
    with torch.device("meta"):
        model = models.Transformer(models.ModelConfig(**values))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert set(published) <= ALL_KEYS


@pytest.mark.parametrize("architecture", families.ARCHITECTURES)
def test_every_field_of_the_config_class_in_transformers_has_a_row(architecture):
    fields = getattr(transformers, architecture.replace("ForCausalLM", "Config")).__annotations__
    assert set(fields) - {"model_type"} <= ALL_KEYS and len(fields) > 15


def test_every_key_is_in_one_table():
    assert sum(map(len, families.KEYS.values())) == len(ALL_KEYS)
    assert families.OPTIONAL.keys() <= families.KEYS["follow"].keys()
    assert {key for family in families.ARCHITECTURES.values() for key in family.reads} == families.OPTIONAL.keys()


CHANGES = {  # a change of every key that is followed: (family, what else config.json says, another value)
    "architectures": ("qwen_3", {"model_type": None}, ["LlamaForCausalLM"]),
    "model_type": ("qwen_3", {"architectures": None}, "llama"),
    **{key: ("qwen_3", {}, 32) for key in ("vocab_size", "num_attention_heads", "hidden_size", "head_dim",
                                           "intermediate_size", "num_hidden_layers")},
    "num_key_value_heads": ("qwen_3", {}, 3),
    "rms_norm_eps": ("qwen_3", {}, 1e-3),
    "tie_word_embeddings": ("qwen_3", {}, True),
    "rope_theta": ("qwen_3", {"rope_parameters": None}, 7.0),
    "rope_scaling": ("qwen_3", {}, {"type": "linear", "factor": 2}),
    "rope_parameters": ("qwen_3", {}, {"rope_type": "linear", "factor": 2}),
    "max_position_embeddings": ("qwen_3", {"rope_scaling": {"type": "yarn", "factor": 2}}, 256),
    "original_max_position_embeddings": ("qwen_3", {"rope_scaling": {"type": "yarn", "factor": 2}}, 64),
    "partial_rotary_factor": ("phi_3_5", {"rope_parameters": None}, 0.5),
    "attention_bias": ("qwen_3", {}, True),
    "mlp_bias": ("llama_2", {}, True),
    "sliding_window": ("mistral_yarn", {"layer_types": None}, 5),
    "use_sliding_window": ("qwen_3", {"sliding_window": 5, "max_window_layers": 0, "layer_types": None}, True),
    "max_window_layers": ("qwen_3", {"sliding_window": 5, "use_sliding_window": True, "layer_types": None}, 0),
    "layer_types": ("qwen_3", {"sliding_window": 5, "use_sliding_window": True}, ["sliding_attention"] * 3),
    "no_rope_layers": ("smollm_3", {}, [1] * 5),
    "no_rope_layer_interval": ("smollm_3", {"no_rope_layers": None}, 3),
    **{key: ("granite_3", {}, 0.7) for key in families.MULTIPLIERS},
}
ELSEWHERE = {"dtype", "torch_dtype", "quantization_config"}  # tests of stored_dtype and of FP8 folders


def read(folder, **changes):
    """What comes of config.json with changes: (architecture, values, problems, notes)."""
    source, architecture = hf.read_config(edit_config(folder, **changes))
    return architecture, *families.read_switches(source, architecture)


@pytest.mark.parametrize("key", families.KEYS["follow"])
def test_every_key_that_is_followed_changes_the_model(copy, key):
    if key in ELSEWHERE:
        return
    family, others, value = CHANGES[key]
    assert read(copy(family, "one"), **others) != read(copy(family, "other"), **others, **{key: value})


def test_other_keys_are_an_error_a_line_or_nothing_as_the_table_says(copy):
    expected = read(copy("qwen_3", "plain"))
    assert not expected[2] and not expected[3]
    for action, keys in families.KEYS.items():
        for key in keys if action != "follow" else ():
            _, values, problems, notes = read(copy("qwen_3", key), **{key: 0.5})
            assert values == expected[1]
            assert [key in p for p in problems] == ([True] if action == "check" else [])
            assert [key in n for n in notes] == ([True] if action == "report" else [])
    *_, notes = read(copy("qwen_3", "unknown"), new_key=1, another={"a": 2})
    assert notes == ["config.json has keys that nothing here reads: another, new_key"]
    *_, notes = read(copy("llama_2", "window"), sliding_window=5)
    assert notes == ["sliding_window=5 in config.json is ignored: LlamaForCausalLM has none"]
    for family in ("qwen_2_5", "qwen_3"):
        _, values, problems, _ = read(copy(family, f"{family}_off"), use_sliding_window=False, sliding_window=0)
        assert not problems and values["sliding_window"] is None  # windows are off, so any value will do
    for key, neutral in families.OPTIONAL.items():
        for family in ("llama_2", "mistral_yarn"):
            architecture, _, problems, _ = read(copy(family, f"{family}_{key}"), **{key: neutral})
            assert not problems
            _, _, problems, _ = read(tmp_copy := copy(family, f"{family}_{key}_set"), **{key: 0.5})
            if key not in families.ARCHITECTURES[architecture].reads:
                assert any(key in p for p in problems), (tmp_copy, key)


@pytest.mark.parametrize("family, change, told", [
    ("llama_3", {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
     "'GemmaForCausalLM' is not supported, only LlamaFor"),
    ("llama_3", {"architectures": ["GemmaForCausalLM"]}, "but model_type 'llama' is LlamaForCausalLM: correct the"),
    ("llama_3", {"architectures": None, "model_type": None}, "architecture None"),
    ("llama_3", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
    ("llama_3", {"attention_bias": True}, "q_proj.bias (96,) is missing"),
    ("qwen_2_5", {"attention_bias": True}, "attention_bias=True is not supported for Qwen2ForCausalLM"),
    ("mistral", {"mlp_bias": True}, "mlp_bias=True is not supported for MistralForCausalLM"),
    ("llama_3", {"quantization_config": {"quant_method": "gptq"}}, "quantization 'gptq' is not supported"),
    ("llama_3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not supported for Ll"),
    ("llama_3", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'llama3', but no low_freq_factor"),
    ("llama_3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported for Llama"),
    ("llama_3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "that differ by layer"),
    ("llama_3", {"hidden_size": None}, "config.json has no hidden_size"),
    ("llama_3", {"hidden_size": "64"}, "hidden_size='64' in config.json: expected int"),
    ("llama_3", {"num_attention_heads": 3}, "model.n_head=3 must be a multiple of model.n_kv_head=2"),
    ("qwen_2_5", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}}, "mscale of rope_type"),
    ("qwen_2_5", {"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, "factor='4' in config.json: expected fl"),
    ("qwen_2_5", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
     "layer_types with full_attention are not"),
    ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types with full_attention are not"),
    ("mistral", {"sliding_window": 0}, "sliding_window=0 in config.json: expected int >= 1"),
    ("smollm_3", {"no_rope_layers": [1, 0, 1, 1, 1]}, "no_rope_layers=[1, 0, 1, 1, 1] is not supported, only a 0 at"),
    ("smollm_3", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers=[1, 0, 1] is not supported, only a 0 at every n-th"),
    ("phi_4", {"rope_scaling": {"type": "longrope"}}, "rope_type='longrope', but no short_factor"),
    ("phi_4", {"rope_parameters": LONGROPE | {"factor": 3.0}, "original_max_position_embeddings": 1},
     "original_max_position_embeddings=1 in config.json: expected int >= 2"),
    ("phi_4", {"rope_parameters": LONGROPE, "max_position_embeddings": -1}, "=-1 in config.json: expected int >= 1"),
    ("llama_3", {"num_hidden_layers": 0}, "num_hidden_layers=0 in config.json: expected int >= 1"),
    ("phi_4", {"rope_scaling": LLAMA3}, "rope_type='llama3' is not supported for Phi3ForCausalLM"),
])
def test_an_unsupported_feature_is_named(copy, family, change, told):
    with pytest.raises(UserError) as caught:
        hf.model_config(edit_config(copy(family), **change))
    assert told in str(caught.value)


def test_all_that_is_wrong_with_a_folder_is_one_error(folders, tmp_path):
    reference(folders["qwen_2_5"]).save_pretrained(tmp_path, max_shard_size="80KB")
    shards = sorted(tmp_path.glob("*.safetensors"), key=lambda path: -len(load_file(path)))
    assert len(shards) >= 4
    assert hf.model_config(tmp_path) == hf.model_config(folders["qwen_2_5"])
    contents = [shard.read_bytes() for shard in shards]
    shards[1].unlink()
    shards[2].write_bytes(contents[2][:-100])
    shards[3].write_bytes(b"\xff" * 200)
    lines = error(tmp_path).splitlines()
    assert len(lines) == 3 and all(any(shard.name in line for line in lines) for shard in shards[1:4])
    for shard, content in zip(shards, contents, strict=True):
        shard.write_bytes(content)
    tensors = load_file(shards[0])
    shaped, lost = sorted(tensors)[:2]
    tensors[shaped] = tensors[shaped][:-1].contiguous()
    tensors["vision.weight"] = torch.zeros(3)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)  # harmless
    del tensors[lost]
    save_file(tensors, shards[0])
    wanted = models.ModelConfig(block_size=256, n_layer=2, n_head=6, qkv_bias=True)
    with pytest.raises(UserError) as caught:
        hf.model_config(tmp_path, wanted)
    lines = str(caught.value).splitlines()
    told = [f"{shaped} has shape", f"{lost} (", "vision.weight is not part of", "model.n_layer=2, but the folder has 3",
            "block_size=256 is more"]
    for part in told:
        assert sum(part in line for line in lines) == 1, (part, lines)
    assert len(lines) == len(told)


def test_the_first_20_problems_are_named_and_the_rest_counted(copy):
    lines = error(store(copy("qwen_3"), {"model.norm.weight": torch.ones(96)})).splitlines()
    assert len(lines) == 21 and lines[-1].endswith("and 15 more")


def test_no_pickle_is_loaded(copy):
    folder = copy("phi_4")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="has neither model.safetensors .* can run code, so they are never loaded"):
        hf.model_config(folder)


def test_the_folder_decides_all_but_block_size(folders):
    folder = folders["mistral"]
    cfg = hf.model_config(folder, models.ModelConfig(block_size=32))
    assert cfg == models.ModelConfig(vocab_size=307, block_size=32, n_layer=3, n_head=6, n_kv_head=2, n_embd=96,
                                     head_dim=16, ffn_dim=152, norm_eps=1e-6, sliding_window=13)
    assert hf.model_config(folder, cfg) == cfg and hf.model_config(folder).block_size == 128


@pytest.mark.parametrize("family", ["qwen_3", "phi_4_mini", "smollm_3", "granite_3", "mistral_yarn"])
def test_values_of_any_type_are_an_error_or_a_model_but_no_traceback(folders, family):
    source, architecture = hf.read_config(folders[family])
    refused = 0
    for key in [*families.KEYS["follow"], *families.KEYS["check"]]:
        for value in ("x", "", -1, 0, 1.5, True, [], ["x"], [0], {}, {"rope_type": 3}, {"type": "yarn"},
                      {"rope_type": "linear", "factor": "x"}, None):
            values, problems, _ = families.read_switches(source | {key: value}, architecture)
            if not problems:
                problems = list(models.ModelConfig(**values).problems())
            refused += bool(problems)
    assert refused > 100


# ----------------------------------------------------------------------------------------------------------------
# more, less or other than a plain model


def weights(folder):
    return {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}


def store(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def error(folder):
    with pytest.raises(UserError) as caught:
        hf.model_config(folder)
    return str(caught.value)


@torch.no_grad()
def test_a_head_with_other_values_than_the_embedding_is_not_tied(copy, capsys):
    folder = copy("llama_3")
    tensors = weights(folder)
    store(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert hf.model_config(folder).tie_embeddings and not capsys.readouterr().err
    head = tensors["model.embed_tokens.weight"].clone()
    assert "lm_head.weight is not part of" in error(store(folder, tensors | {"lm_head.weight": head[:-1].clone()}))
    tensors["lm_head.weight"] = head
    head[-1, -1] += 1
    store(folder, tensors)
    model = loaded(folder)
    assert "lm_head.weight has other values than the embedding: not tied" in capsys.readouterr().err
    tokens = torch.arange(3, 60)[None]
    logits = reference(folder)(tokens).logits
    assert (model(tokens) - logits).norm() < 1e-5 * logits.norm()


@torch.no_grad()
def test_model_safetensors_goes_before_an_index(copy, capsys):
    folder = copy("qwen_3")
    other = {name: t + 1 for name, t in weights(folder).items()}
    save_file(other, folder / "other.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    embedding = loaded(folder).embed.weight
    assert torch.equal(embedding, reference(folder).get_input_embeddings().weight)
    assert "both model.safetensors and an index: the index is ignored" in capsys.readouterr().err


def test_architectures_may_be_missing_but_not_contradict_model_type(copy):
    cfg = hf.model_config(copy("qwen_3", "plain"))
    assert hf.model_config(edit_config(copy("qwen_3", "null"), architectures=None)) == cfg
    assert hf.model_config(edit_config(copy("qwen_3", "untyped"), remove=["model_type"])) == cfg
    contradiction = error(edit_config(copy("qwen_3", "other"), architectures=["LlamaForCausalLM"]))
    assert "architectures ['LlamaForCausalLM'], but model_type 'qwen3' is Qwen3ForCausalLM" in contradiction
    unknown = edit_config(copy("qwen_3", "gemma"), architectures=[], model_type="gemma")
    assert "architecture 'gemma' is not supported" in error(unknown)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:37f0\nsize 587404\n"


def test_one_message_for_all_tensors_under_other_names(copy):
    folder = copy("qwen_3")
    tensors = weights(folder)
    for prefix in ("_orig_mod.", "base_model.model.", "module."):
        message = error(store(folder, {prefix + name: t for name, t in tensors.items()}))
        assert f"the names of its tensors begin with '{prefix}'" in message and "\n" not in message
    message = error(store(folder, {name.removeprefix("model."): t for name, t in tensors.items()}))
    assert "the names of its tensors lack 'model.'" in message and "\n" not in message
    message = error(store(folder, tensors | {"value_head.weight": torch.ones(8)}))
    assert message.endswith("value_head.weight is not part of this architecture")


def test_pointers_adapters_and_empty_indices_have_one_message(copy, tmp_path):
    folder = copy("qwen_3")
    (folder / "model.safetensors").write_text(POINTER)
    assert error(folder).endswith("model.safetensors is a Git LFS pointer, not the file itself: run `git lfs pull`")
    (folder / "model.safetensors").unlink()
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {}}'):
        (folder / "model.safetensors.index.json").write_text(content)
        assert error(folder).endswith("index.json has no weight_map that names the files: download it again")
    (folder / "config.json").write_text(POINTER)
    assert "config.json is a Git LFS pointer" in error(folder)
    (folder / "config.json").write_text("[1]")
    assert error(folder) == f"{folder / 'config.json'} holds no JSON object"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    assert "holds a PEFT adapter, not a model" in error(tmp_path / "adapter")
    (tmp_path / "a run/checkpoints").mkdir(parents=True)
    assert f"python checkpoint.py export '{tmp_path / 'a run'}' NEW_FOLDER" in error(tmp_path / "a run")


@torch.no_grad()
def test_tensors_of_several_dtypes_load_as_in_transformers(copy):
    folder = copy("qwen_3")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    tensors = {name: t.to(dtypes[i % 3]) for i, (name, t) in enumerate(weights(folder).items())}
    edit_config(store(folder, tensors), dtype="bfloat16")
    assert hf.stored_dtype(folder) == "bfloat16"
    theirs, ours = reference(folder), loaded(folder, torch.bfloat16)
    assert next(theirs.parameters()).dtype == torch.bfloat16
    assert torch.equal(ours.layers[1].mlp.down.weight, theirs.model.layers[1].mlp.down_proj.weight)
    assert torch.equal(ours.norm.weight, theirs.model.norm.weight)


def test_the_precision_of_a_folder_is_that_of_transformers(copy):
    for i, (dtype, changes) in enumerate([
        ("float16", {"dtype": "float16"}), ("bfloat16", {"torch_dtype": "bfloat16"}), ("float32", {}),
        ("float16", {"dtype": "float16", "torch_dtype": "float32"}),
    ]):
        folder = edit_config(copy("qwen_3", str(i)), remove=["dtype", "torch_dtype"], **changes)
        assert hf.stored_dtype(folder) == dtype
        if dtype != "float32":  # without a word transformers takes that of the first tensor
            assert next(reference(folder).parameters()).dtype == getattr(torch, dtype)
    store(folder := copy("qwen_3", "half"), {name: t.half() for name, t in weights(folder).items()})
    assert hf.stored_dtype(edit_config(folder, remove=["dtype"])) == "float16"
    assert next(reference(folder).parameters()).dtype == torch.float16
    with pytest.raises(UserError, match="dtype='float64' in config.json is not supported"):
        hf.stored_dtype(edit_config(folder, dtype="float64"))


# ----------------------------------------------------------------------------------------------------------------
# FP8 folders

E4M3 = torch.float8_e4m3fn
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def compressed(strategy):
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "ignore": ["lm_head"], "config_groups": {"group_0": {
                "targets": ["Linear"], "input_activations": None, "output_activations": None,
                "weights": {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True,
                            "dynamic": False}}}}


def wide(path, **config):
    """A Qwen 3 folder whose sizes divide by 128."""
    config = transformers.Qwen3Config(
        vocab_size=320, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=128, dtype="float32", **config)
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(path)
    return path


def in_fp8(folder, form, block=128):
    """Make a folder's linear layers FP8 in the way of `form`; {name: the weight that each stands for}."""
    tensors, meant = weights(folder), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name]
        if form == "blocks":
            scale = torch.rand(-(-weight.shape[0] // block), -(-weight.shape[1] // block)) * 0.02 + 1e-3
            spread = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: len(weight), : weight.shape[1]]
        else:
            scale = torch.rand(len(weight), 1) * 0.02 + 1e-3 if form == "channel" else torch.tensor([0.01])
            spread = scale
        tensors[name] = (weight / spread).clamp(-448, 448).to(E4M3)
        tensors[name + ("_scale_inv" if form == "blocks" else "_scale")] = scale
        meant[name] = tensors[name].float() * spread
    store(folder, tensors)
    edit_config(folder, quantization_config=BLOCKS if form == "blocks" else compressed(form))
    return tensors | meant


@pytest.mark.parametrize("form", ["blocks", "channel", "tensor"])
@torch.no_grad()
def test_fp8_weights_are_their_values_times_their_scales(tmp_path, form, capsys):
    expected = in_fp8(wide(tmp_path), form)
    model = loaded(tmp_path)
    assert "14 weights in FP8" in capsys.readouterr().err
    attn = model.layers[1].attn.qkv.weight
    parts = [expected[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(attn, torch.cat(parts))
    assert torch.equal(model.layers[0].mlp.down.weight, expected["model.layers.0.mlp.down_proj.weight"])
    tokens = torch.arange(3, 60)[None]
    if form == "blocks":
        pytest.importorskip("accelerate")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    else:
        pytest.importorskip("compressed_tensors")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32,
            quantization_config=transformers.CompressedTensorsConfig(run_compressed=False))
    logits = theirs(tokens).logits
    assert (model(tokens) - logits).norm() < 1e-5 * logits.norm()


def test_master_weights_are_the_dequantized_values_unrounded(tmp_path):
    expected = in_fp8(wide(tmp_path), "blocks")["model.layers.0.mlp.down_proj.weight"]
    with torch.device("meta"):
        model = models.Transformer(hf.model_config(tmp_path)).bfloat16()
    model.to_empty(device="cpu")
    models.init_weights(model, seed=1)
    optimizer = AdamW(model, OptimConfig(weights="fp32_master"), seed=1, compiled=False)
    hf.load(tmp_path, model, optimizer)
    assert torch.equal(optimizer.masters["layers.0.mlp.down.weight"], expected)
    assert torch.equal(model.layers[0].mlp.down.weight, expected.bfloat16()) and (expected != expected.bfloat16()).any()


@pytest.mark.parametrize("form", ["blocks", "channel"])
def test_ranks_dequantize_only_their_rows(copy, form):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    folder = copy("olmo_2")  # no size divides by 128
    in_fp8(folder, form)
    whole, world = dict(loaded(folder).named_parameters()), 5
    for rank in range(world):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            with torch.device("meta"):
                model = models.Transformer(hf.model_config(folder))
            torch.distributed.fsdp.fully_shard(
                model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (world,)))
            model.to_empty(device="cpu")
            hf.load(folder, model)
            for name, p in model.named_parameters():
                pieces = whole[name].chunk(world)
                assert torch.equal(plain_local(p), pieces[rank] if rank < len(pieces) else pieces[0][:0]), name
        finally:
            torch.distributed.destroy_process_group()


def test_blocks_at_the_edge_are_smaller():
    torch.manual_seed(0)
    weight = torch.randn(300, 200) * torch.logspace(-3, 3, 300)[:, None]
    stored, scale = quantized.quantize(weight)
    assert stored.dtype == E4M3 and scale.shape == (3, 2)
    for i, j in [(0, 0), (1, 1), (2, 1)]:
        block = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        assert scale[i, j] == block.abs().max() / 448
    back = quantized.dequantize(stored, scale, 0, 300)
    assert ((back - weight).abs() <= weight.abs() / 16 + scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[
        :300, :200] * 2**-10).all()  # half a unit in the last of 3 bits, or half of the smallest subnormal
    part = quantized.dequantize(stored[130:], scale, 130, 300)
    assert torch.equal(part, back[130:])
    assert torch.equal(quantized.quantize(torch.zeros(4, 4))[0].float(), torch.zeros(4, 4))


def test_other_quantizations_are_refused_by_name(copy):
    folder = copy("qwen_3")
    plain = weights(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    for method in ("gptq", "awq", "bitsandbytes", "mxfp4", "modelopt"):
        message = error(edit_config(folder, quantization_config={"quant_method": method}))
        assert f"quantization '{method}' is not supported" in message
    message = error(edit_config(folder, quantization_config=BLOCKS | {"weight_block_size": [64, 128]}))
    assert "weight_block_size=[64, 128] is not supported, only 128 x 128" in message
    edit_config(folder, remove=["quantization_config"])
    for tensors, part in [
        ({name.replace("weight", "qweight"): torch.ones(3, 3, dtype=torch.int32)}, "qweight (I32) is of a quant"),
        ({name: plain[name].to(torch.int8), f"{name}_scale": torch.ones(96, 1)}, f"{name} (I8) is of a quantization"),
        ({name: plain[name].double()}, f"{name} (F64) is of a quantization or precision that is not supported"),
        ({name + ".absmax": torch.ones(3)}, "absmax (F32) is of a quantization"),
        ({name: plain[name].to(E4M3), f"{name}_scale_inv": torch.ones(1, 2)}, "is in FP8, but config.json has no quan"),
    ]:
        assert part in error(store(folder, plain | tensors))
    edit_config(folder, quantization_config=BLOCKS)
    assert f"{name} is in FP8, but its scale is missing" in error(store(folder, plain | {name: plain[name].to(E4M3)}))
    wrong = plain | {name: plain[name].to(E4M3), f"{name}_scale_inv": torch.ones(5, 7)}
    assert "_scale_inv has shape (5, 7), which fits no scales" in error(store(folder, wrong))


def test_fixed_scales_of_activations_are_named(tmp_path, capsys):
    tensors = in_fp8(wide(tmp_path), "tensor")
    tensors = weights(tmp_path) | {"model.layers.0.mlp.down_proj.input_scale": torch.ones(1)}
    store(tmp_path, tensors)
    hf.model_config(tmp_path)
    assert "1 fixed scales of activations are ignored" in capsys.readouterr().err


@torch.no_grad()
def test_an_export_in_fp8_has_the_layers_that_were_trained_in_fp8(tmp_path, capsys):
    config = fp8.FP8Config(enabled=True, emulate=True, filter_fqns=["lm_head"], recipes={"layers.0.mlp.down": None})
    out = save_run(tmp_path / "out", loaded(wide(tmp_path / "hf")), tmp_path / "hf", fp8=config,
                   run={"auto_filtered": ["layers.0.mlp.gate_up"]})
    checkpoint.export(out, tmp_path / "fp8", in_fp8=True)
    said = capsys.readouterr().out
    plain, stored = tensors(tmp_path / "hf"), tensors(tmp_path / "fp8")
    assert f"{tmp_path / 'fp8'}: {len(stored)} tensors, " in said and "\n11 weights in FP8" in said
    left = [f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")] + ["lm_head"]
    written = json.loads((tmp_path / "fp8/config.json").read_text())
    assert written["quantization_config"] == BLOCKS | {"modules_to_not_convert": left}
    assert written["dtype"] == "float32"
    for name, weight in plain.items():
        if name.endswith("_proj.weight") and name.removesuffix(".weight") not in left:
            expected, scale = quantized.quantize(weight)
            assert torch.equal(stored[name], expected) and torch.equal(stored[f"{name}_scale_inv"], scale)
        else:
            assert torch.equal(stored[name], weight)
    tokens = torch.arange(3, 60)[None]
    logits = loaded(tmp_path / "fp8")(tokens)
    # 3 bits of mantissa are 31 dB in each weight; these layers, with sharp attention, leave 22 of them
    assert 18 < sqnr(reference(tmp_path / "hf")(tokens).logits, logits) < 31
    pytest.importorskip("accelerate")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)(tokens).logits
    assert (logits - theirs).norm() < 1e-5 * theirs.norm()
    # and back: training from it, and a plain export
    out = save_run(tmp_path / "again", loaded(tmp_path / "fp8"), tmp_path / "fp8")
    with pytest.raises(UserError, match="again trained no layer in FP8: export it without --fp8"):
        checkpoint.export(out, tmp_path / "new", in_fp8=True)
    checkpoint.export(out, tmp_path / "new")
    assert "quantization_config" not in json.loads((tmp_path / "new/config.json").read_text())
    assert torch.equal(loaded(tmp_path / "new")(tokens), logits)


def test_an_export_in_fp8_names_blocks_that_are_not_whole(tmp_path, capsys):
    model = build(fp8.FP8Config(), n_embd=128, head_dim=32)  # keys and values have 64 rows
    out = save_run(tmp_path / "out", model, fp8=fp8.FP8Config(enabled=True, emulate=True))
    checkpoint.export(out, tmp_path / "fp8", in_fp8=True)
    assert "\n4 of them, such as model.layers.0.self_attn.k_proj.weight, have sizes that 128" in capsys.readouterr().out
    back = loaded(tmp_path / "fp8")
    for (name, p), q in zip(model.named_parameters(), back.parameters(), strict=True):
        assert sqnr(p, q) > 28, name


def test_a_float16_folder_is_scored_in_float16(tmp_path, monkeypatch):
    wide(tmp_path)
    edit_config(store(tmp_path, {name: t.half() for name, t in weights(tmp_path).items()}), dtype="float16")
    monkeypatch.setattr(sample, "get_tokenizer", lambda name: None)
    model, _, config = sample.load_model(str(tmp_path), torch.device("cpu"))
    assert config.dtype == "float16" and {p.dtype for p in model.parameters()} == {torch.float16}
    logits = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(torch.arange(60)[None]).logits
    assert logits.dtype == torch.float16
    assert sqnr(logits, model(torch.arange(60)[None])) > 50  # 10 bits of mantissa in every operation
