"""hf.py and checkpoint.py's export: logit for logit against transformers, and the same bits in and out."""

import errno
import json
import shutil
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, build, run, train_here
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

import checkpoint
import configurator
import model as models
import sample
import train
from formats import families, hf
from formats.tokenizer import get_tokenizer
from optim import AdamW, OptimConfig
from plumbing.sharding import plain_local

SIZES = dict(vocab_size=272, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, pad_token_id=None, rope_theta=5000.0)
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32, rope_theta=500.0)
FAMILIES = {  # the architecture of transformers, and what makes the model
    "llama_3_1": ("Llama", dict(rope_parameters=LLAMA3_ROPE)),
    "smollm2": ("Llama", dict(tie_word_embeddings=True)),
    "mistral": ("Mistral", dict(sliding_window=16)),
    "nemo": ("Mistral", dict(sliding_window=None, head_dim=32)),
    "qwen_2_5": ("Qwen2", {}),
    "phi_4": ("Phi3", {}),
    "phi_partial": ("Phi3", dict(partial_rotary_factor=0.5, sliding_window=20)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: folder that transformers saved}: fp32, weights so large that a wrong rotation or bias shows."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("hf")
    for seed, (family, (kind, more)) in enumerate(FAMILIES.items()):
        config = getattr(transformers, f"{kind}Config")(**SIZES | more)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.empty_like(p).normal_(std=0.2, generator=generator) + ("norm" in name))
        model.save_pretrained(root / family)
        (root / family / "tokenizer.json").write_text("{}")
    return {family: root / family for family in FAMILIES}


def edit_config(folder, remove=(), **changes):
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove}
    path.write_text(json.dumps(config | changes))
    return folder


@pytest.fixture
def copy(folders, tmp_path):
    """Copies a family's folder."""
    return lambda family, name="copy": Path(shutil.copytree(folders[family], tmp_path / name))


def reference(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


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
    return edit_config(folder, remove=("rope_parameters", "dtype", "layer_types"), torch_dtype=config["dtype"],
                       rope_theta=theta, rope_scaling=None if rope["rope_type"] == "default" else rope,
                       **({} if fraction == 1 else {"partial_rotary_factor": fraction}))


# ----------------------------------------------------------------------------------------------------------------
# weights in


@pytest.mark.parametrize("style", ["new", "old"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_greedy_text_are_those_of_transformers(copy, family, style):
    folder = copy(family) if style == "new" else in_old_style(copy(family))
    theirs, ours = reference(folder), loaded(folder)
    tokens = torch.randint(0, 256, (2, 120), generator=torch.Generator().manual_seed(1))
    for T in (1, 2, 15, 16, 17, 33, 64, 120):  # the windows are 16 and 20, llama_3_1's first context 32
        a, b = theirs(tokens[:, :T]).logits, ours(tokens[:, :T])
        assert (a - b).norm() < 1e-5 * a.norm(), T
    theirs.generation_config.update(eos_token_id=None, pad_token_id=0)
    text = theirs.generate(tokens[:1, :10], do_sample=False, max_new_tokens=30)[0, 10:].tolist()
    assert text == list(sample.generate(ours, tokens[0, :10].tolist(), 30, 0, 0, None))


@torch.no_grad()
def test_what_makes_each_family_matters_in_these_tests(folders):
    tokens = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(2))
    for family, change in {"llama_3_1": {"rope_scaling": None}, "mistral": {"sliding_window": 17},
                           "phi_partial": {"rope_fraction": 1.0}, "qwen_2_5": {"norm_eps": 1e-3}}.items():
        model = loaded(folders[family])
        logits = model(tokens)
        for name, value in change.items():
            setattr(model.cfg, name, value)
        models.init_buffers(model)
        for layer in model.layers:
            layer.attn_norm.eps = model.cfg.norm_eps
        assert (model(tokens) - logits).norm() > 1e-4 * logits.norm(), family


def test_sizes_by_name_are_those_of_a_published_config(tmp_path):
    # as Phi-4 and Mistral 7B v0.1 publish theirs, in transformers 4's style
    common = {"hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    phi = common | {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "hidden_size": 5120, "intermediate_size": 17920,
        "max_position_embeddings": 16384, "num_attention_heads": 40, "num_hidden_layers": 40,
        "num_key_value_heads": 10, "original_max_position_embeddings": 16384, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 250000, "sliding_window": None, "vocab_size": 100352}
    mistral = common | {
        "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "vocab_size": 32000}
    for source, cfg in (phi, models.phi_4()), (mistral, models.mistral_7b()):
        (tmp_path / "config.json").write_text(json.dumps(source))
        # no weights: the only problem left
        with pytest.raises(ValueError, match="^[^\n]*neither model.safetensors nor[^\n]*$"):
            hf.model_config(tmp_path, cfg)


@pytest.mark.parametrize("family, change, told", [
    ("llama_3_1", {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
     "'GemmaForCausalLM' is not supported, only LlamaFor"),
    ("llama_3_1", {"architectures": ["GemmaForCausalLM"]}, "but model_type 'llama' is LlamaForCausalLM: correct the"),
    ("llama_3_1", {"architectures": None, "model_type": None}, "architecture None"),
    ("llama_3_1", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
    ("llama_3_1", {"attention_bias": True}, "q_proj.bias (64,) is missing"),
    ("qwen_2_5", {"attention_bias": True}, "attention_bias=True is not supported for Qwen2ForCausalLM"),
    ("mistral", {"mlp_bias": True}, "mlp_bias=True is not supported for MistralForCausalLM"),
    ("llama_3_1", {"quantization_config": {"quant_method": "gptq"}}, "quantization 'gptq' is not supported"),
    ("llama_3_1", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not supported for Ll"),
    ("llama_3_1", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'llama3', but no low_freq_factor"),
    ("llama_3_1", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported for Llama"),
    ("llama_3_1", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "that differ by layer"),
    ("llama_3_1", {"hidden_size": None}, "config.json has no hidden_size"),
    ("llama_3_1", {"hidden_size": "64"}, "hidden_size='64' in config.json: expected int"),
    ("llama_3_1", {"num_attention_heads": 3}, "model.n_head=3 must be a multiple of model.n_kv_head=2"),
    ("qwen_2_5", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "truncate=False of"),
    ("qwen_2_5", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "new": 1}}, "new of rope_type='yarn' is not"),
    ("qwen_2_5", {"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, "factor='4' in config.json: expected fl"),
    ("qwen_2_5", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
     "layer_types with full_attention are not"),
    ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types with full_attention are not"),
    ("phi_4", {"rope_scaling": {"type": "longrope"}}, "rope_type='longrope', but no short_factor"),
    ("phi_4", {"rope_scaling": LLAMA3_ROPE}, "rope_type='llama3' is not supported for Phi3ForCausalLM"),
])
def test_an_unsupported_feature_is_named(copy, family, change, told):
    with pytest.raises(ValueError) as caught:
        hf.model_config(edit_config(copy(family), **change))
    assert told in str(caught.value)


def test_all_that_is_wrong_with_a_folder_is_one_error(folders, tmp_path):
    reference(folders["qwen_2_5"]).save_pretrained(tmp_path, max_shard_size="80KB")
    shards = sorted(tmp_path.glob("*.safetensors"), key=lambda path: -len(load_file(path)))
    assert len(shards) >= 4
    assert hf.model_config(tmp_path) == hf.model_config(folders["qwen_2_5"])
    tensors = load_file(shards[0])
    shaped, lost, cast = sorted(tensors)[:3]
    tensors[shaped] = tensors[shaped][:-1].contiguous()
    tensors[cast] = tensors[cast].to(torch.int32)
    tensors["vision.weight"] = torch.zeros(3)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)  # harmless
    del tensors[lost]
    save_file(tensors, shards[0])
    shards[1].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-100])
    shards[3].write_bytes(b"\xff" * 200)
    wanted = models.ModelConfig(block_size=256, n_layer=3, n_head=4, qkv_bias=True)
    with pytest.raises(ValueError) as caught:
        hf.model_config(tmp_path, wanted)
    lines = str(caught.value).splitlines()
    told = [f"{shaped} has shape", f"{lost} (", f"{cast} is I32", "vision.weight is not part of",
            *(path.name for path in shards[1:4]), "model.n_layer=3, but the folder has 2", "block_size=256 is more"]
    for part in told:
        assert sum(part in line for line in lines) == 1, (part, lines)
    assert len(lines) == len(told)  # what unreadable files hold is not told as missing besides


def test_no_pickle_is_loaded(copy):
    folder = copy("phi_4")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle, which can run code, so it is never loaded"):
        hf.model_config(folder)


def test_the_folder_decides_all_but_block_size(folders):
    folder = folders["mistral"]
    cfg = hf.model_config(folder, models.ModelConfig(block_size=32))
    assert cfg == models.ModelConfig(vocab_size=272, block_size=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=64,
                                     head_dim=16, ffn_dim=128, rope_theta=5000.0, norm_eps=1e-6, sliding_window=16)
    assert hf.model_config(folder, cfg) == cfg and hf.model_config(folder).block_size == 128


@pytest.mark.parametrize("world", [3, 48])
def test_every_rank_gets_its_rows(folders, world):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    whole = dict(loaded(folders["qwen_2_5"]).named_parameters())
    for rank in {0, 1, world - 1}:
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            with torch.device("meta"):
                model = models.Transformer(hf.model_config(folders["qwen_2_5"]))
            torch.distributed.fsdp.fully_shard(
                model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (world,)))
            model.to_empty(device="cpu")
            hf.load(folders["qwen_2_5"], model)
            for name, p in model.named_parameters():
                pieces = whole[name].chunk(world)
                expected = pieces[rank] if rank < len(pieces) else pieces[0][:0]
                assert torch.equal(plain_local(p), expected), name
        finally:
            torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------
# weights out


def save_run(out_dir, model, init_from="scratch"):
    """What train.py leaves of a model in out_dir."""
    config = configurator.Config(model=model.cfg, init_from=str(init_from), dtype="float32")
    checkpoint.save(out_dir, 1, model, None, {}, keep=0)
    Path(out_dir, "config.py").write_text(configurator.to_python(config))
    return out_dir


def assert_same_tensors(folder, expected):
    found = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t), name


@pytest.mark.parametrize("style", ["new", "old"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_export_gives_back_the_bits_that_were_loaded(copy, tmp_path, family, style):
    folder = copy(family) if style == "new" else in_old_style(copy(family))
    out = save_run(tmp_path / "out", loaded(folder, wanted=models.ModelConfig(block_size=64)), folder)
    checkpoint.export(out, tmp_path / "exported")
    assert_same_tensors(tmp_path / "exported", load_file(folder / "model.safetensors"))
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "exported").iterdir()}
    theirs, ours = reference(folder), reference(tmp_path / "exported")
    tokens = torch.randint(0, 256, (1, 100))
    assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written["max_position_embeddings"] == 128 and written["dtype"] == written["torch_dtype"] == "float32"
    # a reader of either style alone finds the same model
    cfg = hf.model_config(tmp_path / "exported")
    assert cfg == hf.model_config(edit_config(tmp_path / "exported", remove=("rope_parameters", "dtype")))
    new = edit_config(tmp_path / "exported", remove=("rope_scaling", "rope_theta", "partial_rotary_factor"),
                      rope_parameters=written["rope_parameters"])
    assert cfg == hf.model_config(new) == hf.model_config(folder)


SCRATCH = {
    "LlamaForCausalLM": {"rope_scaling": models.RopeScaling(original_max_position=16), "tie_embeddings": True},
    "MistralForCausalLM": {"sliding_window": 9, "head_dim": 8},
    "Qwen2ForCausalLM": {"qkv_bias": True, "rope_scaling": models.RopeScaling(original_max_position=16)},
    "Phi3ForCausalLM": {"rope_fraction": 0.5},
}


@pytest.mark.parametrize("architecture", SCRATCH)
@torch.no_grad()
def test_a_model_from_scratch_is_exported_as_what_can_hold_it(tmp_path, monkeypatch, architecture):
    from conftest import build

    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 50_000)
    model = build(**SCRATCH[architecture])
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    checkpoint.export(save_run(tmp_path / "out", model), tmp_path / "exported")
    files = sorted((tmp_path / "exported").glob("*.safetensors"))
    index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and set(index["weight_map"].values()) == {p.name for p in files}
    assert all(p.stat().st_size < 60_000 or len(load_file(p)) == 1 for p in files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for p in files for t in load_file(p).values())
    readable_by = (tmp_path / "exported" / "config.json").stat().st_mode
    assert all(p.stat().st_mode == readable_by for p in files)
    theirs = reference(tmp_path / "exported")
    assert type(theirs).__name__ == architecture
    tokens = torch.randint(0, 256, (2, 64))
    logits = theirs(tokens).logits
    assert (model(tokens) - logits).norm() < 1e-5 * logits.norm()
    assert torch.equal(loaded(tmp_path / "exported")(tokens), model(tokens))


def test_mistakes_of_an_export_are_told(folders, copy, tmp_path, monkeypatch):
    from conftest import build

    done = run("checkpoint.py", "export", tmp_path, tmp_path / "new", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "holds no checkpoint of train.py" in done.stderr
    out = save_run(tmp_path / "out", build())
    with pytest.raises(ValueError, match="exists and is not empty"):
        checkpoint.export(out, folders["phi_4"])
    out = save_run(tmp_path / "strange", build(qkv_bias=True, rope_fraction=0.5))
    with pytest.raises(ValueError, match="can have qkv_bias, rope_fraction together"):
        checkpoint.export(out, tmp_path / "new")
    names = {k: v for k, v in families.SPLIT.items() if k != "layers.*.mlp.gate_up"}  # as if the block were another
    monkeypatch.setitem(families.ARCHITECTURES, "LlamaForCausalLM", families.Family("llama", names))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no place for layers.*gate_up"):
        checkpoint.export(save_run(tmp_path / "fork", build()), tmp_path / "new")
    monkeypatch.undo()
    out = save_run(tmp_path / "moved", loaded(copy("phi_4")), tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")
    with pytest.raises(ValueError, match="copy is no Hugging Face model folder"):
        checkpoint.export(out, tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


# ----------------------------------------------------------------------------------------------------------------
# train.py and sample.py

COUNT = """
    import json, sys
    sys.path.insert(0, {repo!r})
    import train
    from formats import hf
    from plumbing import entry
    from safetensors import safe_open

    class Counted:
        bytes = 0
        def __init__(self, inner): self.inner = inner
        def __enter__(self): return Counted(self.inner.__enter__())
        def __exit__(self, *error): return self.inner.__exit__(*error)
        def __getattr__(self, name): return getattr(self.inner, name)
        def get_slice(self, name): return Counted(self.inner.get_slice(name))
        def __getitem__(self, rows):
            Counted.bytes += (part := self.inner[rows]).nbytes
            return part

    hf.safe_open = lambda *args: Counted(safe_open(*args))
    for argv in json.loads({runs!r}):
        Counted.bytes = 0
        sys.argv = ["train.py", *argv]
        train.main()
        print("read", Counted.bytes, flush=True)
    entry.leave()
"""


def test_two_ranks_read_their_own_rows_and_export_the_same_bits(folders, tiny_run, tmp_path):
    args = ["--data.tokenizer=bytes", *(a for a in tiny_run if not a.startswith("--model."))]
    args += ["--model.block_size=64", "--optim.lr=0", "--optim.min_lr=0", "--max_steps=1", "--eval_interval=0"]
    fp8_args = ["--fp8.enabled=True", "--fp8.emulate=True", "--fp8.enable_fsdp_float8_all_gather=True",
                "--fp8.precompute_float8_dynamic_scale_for_fsdp=True"]
    runs = {"phi_4": fp8_args, "smollm2": [*fp8_args, '--fp8.filter_fqns=["lm_head"]'],
            "qwen_2_5": [*fp8_args, "--dtype=bfloat16", "--optim.weights=fp32_master"]}
    listed = [[*args, *more, f"--init_from={folders[family]}", f"--out_dir={tmp_path / family}"]
              for family, more in runs.items()]
    script = tmp_path / "count.py"
    script.write_text(textwrap.dedent(COUNT.format(repo=str(REPO), runs=json.dumps(listed))))
    done = run(script, ranks=2)
    read = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("read ")]
    assert len(read) == 2 * len(runs)
    source = {family: load_file(folders[family] / "model.safetensors") for family in runs}
    totals = [sum(t.nbytes for t in tensors.values()) for tensors in source.values()]
    assert sum(read) == sum(totals)  # nothing twice
    assert max(read) < 0.51 * max(totals)
    for family in runs:
        checkpoint.export(tmp_path / family, tmp_path / f"exported_{family}")
        kept = {k: v.bfloat16() for k, v in source[family].items()} if family == "qwen_2_5" else source[family]
        assert_same_tensors(tmp_path / f"exported_{family}", kept)
    # float32 master weights are those of the file, not of its bf16 copy
    out = checkpoint.latest(tmp_path / "qwen_2_5")
    master = {"optim.master.layers.1.attn.qkv.weight": torch.empty(128, 64)}
    assert set(master) < set(FileSystemReader(out).read_metadata().state_dict_metadata)
    torch.distributed.checkpoint.load(master, checkpoint_id=out, no_dist=True)
    names = [f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkv"]
    assert torch.equal(*master.values(), torch.cat([source["qwen_2_5"][name] for name in names]))


def test_fine_tuning_resumes_from_its_own_checkpoint(folders, tiny_run, tmp_path, monkeypatch, capsys):
    args = [a for a in tiny_run if not a.startswith("--model.") and a != "--deterministic=True"]
    args.append("--data.tokenizer=bytes")  # the folders hold no real tokenizer
    args += ["--model.block_size=64", "--eval_interval=0", "--optim.min_lr=0.003", f"--out_dir={tmp_path / 'out'}"]

    def train_with(family, steps):
        argv = ["train.py", *args, f"--init_from={folders[family]}", f"--max_steps={steps}"]
        monkeypatch.setattr(sys, "argv", argv)
        train.main()
        return capsys.readouterr().out

    assert f"weights: {folders['mistral']}" in train_with("mistral", 2)
    monkeypatch.setattr(hf, "load", None)  # the weights come from the checkpoint
    assert "2 steps done" in train_with("mistral", 3)
    with pytest.raises(ValueError, match="was made with another model, init_from"):
        train_with("nemo", 4)
    cfg = configurator.read_file(tmp_path / "out" / "config.py").model
    assert cfg.sliding_window == 16 and cfg.block_size == 64 and cfg.n_embd == 64


def test_a_checkpoint_of_another_model_is_told(tmp_path):
    small, large = (build(dtype=torch.bfloat16, n_layer=n) for n in (2, 3))
    checkpoint.save(tmp_path, 1, small, AdamW(small, OptimConfig(), seed=1, compiled=False), {}, keep=1)
    for optimizer in (None, AdamW(large, OptimConfig(), seed=1, compiled=False)):
        with pytest.raises(ValueError, match=r"of another model: model.layers.2.*missing for .* and \d+ more. Go back "
                                             "to the code that saved it, or start anew: another out_dir, or --resume="):
            checkpoint.load(checkpoint.latest(tmp_path), large, optimizer)


@pytest.mark.parametrize("damage", [
    lambda b: b[:len(b) // 2], lambda b: b"", lambda b: bytes(255 - x for x in b), lambda b: b"I wrote this\n", None],
    ids=["cut", "empty", "other", "text", "gone"])
def test_a_damaged_checkpoint_is_one_line_that_says_what_to_do(tmp_path, damage):
    model = build()
    optimizer = AdamW(model, OptimConfig(weights="plain"), seed=0, compiled=False)
    checkpoint.save(tmp_path, 1, model, optimizer, {}, keep=0)
    folder = checkpoint.latest(tmp_path)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(whole) == 3  # run.json, the index, one rank's tensors
    for path, content in whole.items():
        path.write_bytes(damage(content)) if damage else path.unlink()
        with pytest.raises(ValueError, match="_00000001 (cannot be read .*delete it|is not a checkpoint)") as told:
            checkpoint.load(folder, model, optimizer)
        assert "\n" not in str(told.value)
        path.write_bytes(content)
    checkpoint.load(folder, model, optimizer)


def test_a_full_disk_is_told_whatever_the_writer_makes_of_it(tmp_path, monkeypatch):
    model = build()
    optimizer = AdamW(model, OptimConfig(weights="plain"), seed=0, compiled=False)
    free = 0

    def fails(*_, **__):
        raise CheckpointException("save", {0: (RuntimeError("unexpected pos 704 vs 598"), None)})

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.dcp, "save", fails)
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
        with pytest.raises(OSError) as told:
            checkpoint.save(tmp_path, 1, model, optimizer, {}, keep=1)
        assert told.value.errno == errno.ENOSPC and told.value.filename == str(tmp_path)
        free = 2**30
        with pytest.raises(CheckpointException):
            checkpoint.save(tmp_path, 1, model, optimizer, {}, keep=1)


def test_only_a_name_that_save_gives_is_a_checkpoint(tmp_path):
    for name in ("step_00000003", "step_00000003.bak", "step_00000004.tmp", "step_9", "steps"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.latest(tmp_path).name == "step_00000003"


def test_nan_in_a_model_folder_is_told_as_such(copy, tiny_run, tmp_path):
    folder = copy("smollm2", "new")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    args = [a for a in tiny_run if not a.startswith("--model.")]
    with pytest.raises(ValueError, match="holds nan, in norm.weight: download it again"):
        train_here(*args, f"--init_from={folder}", "--data.tokenizer=bytes", "--model.block_size=64",
                   f"--out_dir={tmp_path / 'out'}")


def test_a_tied_head_may_be_stored_too(copy):
    folder = copy("smollm2", "new")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(loaded(folder).lm_head.weight, weights["lm_head.weight"])
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.weight is not part of this architecture"):
        loaded(folder)


def test_sampling_from_a_model_folder(folders, monkeypatch, capsys):
    def named(name):
        assert name == str(folders["mistral"])
        return get_tokenizer("bytes")

    monkeypatch.setattr(sample, "get_tokenizer", named)
    args = [f"--from={folders['mistral']}", "--prompt=def f", "--max_new_tokens=20", "--temperature=0"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *args])
    sample.main()
    assert capsys.readouterr().out.startswith("def f")
    model, _, config = sample.load_model(str(folders["mistral"]), torch.device("cpu"))
    assert next(model.parameters()).dtype == torch.float32 and config.model.sliding_window == 16
