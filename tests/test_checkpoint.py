"""checkpoint.py: save, resume, export; the same bits in and out. Model folders: tests/formats/test_hf.py."""

import errno
import gc
import io
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import REPO, build, main_here, run, train_here
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import checkpoint
import configurator
import data
import model as models
import sample
import train
from formats import families, hf
from formats.tokenizer import get_tokenizer
from optim import AdamW, OptimConfig
from plumbing import storage
from plumbing.storage import Reader, Writer, damaged_file

SIZES = dict(vocab_size=272, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, pad_token_id=None, rope_theta=5000.0)
FAMILIES = {  # the architecture of transformers, and what makes the model
    "smollm2": ("Llama", dict(tie_word_embeddings=True)),
    "mistral": ("Mistral", dict(sliding_window=16)),
    "nemo": ("Mistral", dict(sliding_window=None, head_dim=32)),
    "qwen_2_5": ("Qwen2", {}),
    "phi_4": ("Phi3", {}),
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


# ----------------------------------------------------------------------------------------------------------------
# weights out


def save_run(out_dir, model, init_from="scratch", **config):
    """What train.py leaves of a model in out_dir."""
    config = configurator.Config(model=model.cfg, init_from=str(init_from), dtype="float32", **config)
    checkpoint.save(out_dir, 1, checkpoint.tensors(model, None), {}, keep=0)
    Path(out_dir, "config.py").write_text(configurator.to_python(config))
    return out_dir


def assert_same_tensors(folder, expected):
    found = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t), name


SCRATCH = {
    "MistralForCausalLM": {"sliding_window": 9, "head_dim": 8},
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
    for p in files:  # a file goes beyond by one tensor at most
        assert p.stat().st_size - max(t.nbytes for t in load_file(p).values()) < 60_000
    assert index["metadata"]["total_size"] == sum(t.nbytes for p in files for t in load_file(p).values())
    readable_by = (tmp_path / "exported" / "config.json").stat().st_mode
    assert all(p.stat().st_mode == readable_by for p in files)
    theirs = reference(tmp_path / "exported")
    assert type(theirs).__name__ == architecture
    tokens = torch.randint(0, 256, (2, 64))
    logits = theirs(tokens).logits
    assert (model(tokens) - logits).norm() < 1e-5 * logits.norm()
    assert torch.equal(loaded(tmp_path / "exported")(tokens), model(tokens))


def test_an_export_has_the_files_of_the_tokenizer_whatever_its_class(tmp_path):
    from conftest import build

    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
             "additional_chat_templates/tool_use.jinja"}
    for name in {*names, "README.md", "model-00001-of-00001.safetensors"}:
        (tmp_path / "tokenizer" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tokenizer" / name).write_text(name)
    run = save_run(tmp_path / "out", build(), data=data.DataConfig(tokenizer=str(tmp_path / "tokenizer")))
    checkpoint.export(run, tmp_path / "exported")
    found = {str(path.relative_to(tmp_path / "exported")) for path in (tmp_path / "exported").rglob("*.*")}
    assert found == {*names, "config.json", "model.safetensors"}


def test_mistakes_of_an_export_are_told(folders, copy, tmp_path, monkeypatch):
    from conftest import build

    done = run("checkpoint.py", "export", tmp_path, tmp_path / "new", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "holds no checkpoint of train.py" in done.stderr
    with pytest.raises(ValueError, match="holds no checkpoint of train.py: give the out_dir of a run"):
        checkpoint.export(folders["phi_4"], tmp_path / "new")
    with pytest.raises(ValueError, match="nowhere holds no checkpoint of train.py"):
        checkpoint.export(tmp_path / "nowhere", tmp_path / "new")
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
    out = save_run(tmp_path / "untold", build(), data=data.DataConfig(chat_template=str(tmp_path / "gone.jinja")))
    with pytest.raises(ValueError, match="data.chat_template=.*gone.jinja is gone: put the file there again"):
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
    with pytest.raises(ValueError, match="differs from this run in model, init_from"):
        train_with("nemo", 4)
    cfg = configurator.read_file(tmp_path / "out" / "config.py").model
    assert cfg.sliding_window == 16 and cfg.block_size == 64 and cfg.n_embd == 64


def test_a_checkpoint_of_another_model_is_told(tmp_path):
    small, large = (build(dtype=torch.bfloat16, n_layer=n) for n in (2, 3))
    state = checkpoint.tensors(small, AdamW(small, OptimConfig(), seed=1, compiled=False))
    checkpoint.save(tmp_path, 1, state, {}, keep=1)
    for optimizer in (None, AdamW(large, OptimConfig(), seed=1, compiled=False)):
        with pytest.raises(ValueError, match=r"of another model: model.layers.2.*missing for .* and \d+ more. Go back "
                                             r"to the code that saved it \(commit unknown\), or start anew: .*resume="):
            checkpoint.load(checkpoint.latest(tmp_path), large, optimizer)


@pytest.mark.parametrize("saved_as, filled_by", [("stochastic_rounding", "weights"), ("fp32_master", "masters")])
def test_masters_are_those_of_the_checkpoint_or_else_its_weights(tmp_path, saved_as, filled_by):
    saved, other = build(dtype=torch.bfloat16), build(dtype=torch.bfloat16, seed=2)
    first = AdamW(saved, OptimConfig(weights=saved_as), seed=1, compiled=False)
    for master in first.masters.values():
        master.add_(1e-4)  # less than bfloat16 resolves of most
    checkpoint.save(tmp_path, 7, checkpoint.tensors(saved, first), {}, keep=1)
    optimizer = AdamW(other, OptimConfig(weights="fp32_master"), seed=1, compiled=False)
    checkpoint.load(checkpoint.latest(tmp_path), other, optimizer)
    expected = first.masters if filled_by == "masters" else {name: p.float() for name, p in first.weights.items()}
    assert optimizer.step_count == 7 and optimizer.masters.keys() == expected.keys()
    assert all(torch.equal(master, expected[name]) for name, master in optimizer.masters.items())
    assert all(torch.equal(w, first.weights[name]) for name, w in optimizer.weights.items())


DAMAGES = {"cut": lambda b: b[:len(b) // 2], "empty": lambda b: b"", "other": lambda b: bytes(255 - x for x in b),
           "one_bit": lambda b: bytes([b[0] ^ 1]) + b[1:], "text": lambda b: b"I wrote this\n", "gone": None}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found_and_the_run_goes_back_to_the_checkpoint_before(tmp_path, damage):
    state, said = checkpoint.tensors(build()), []
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state, {}, keep=0)
    folder = checkpoint.latest(tmp_path)
    Path(tmp_path, "checkpoints", "step_00000002.damaged_1").mkdir()  # it has happened before
    assert checkpoint.last_good(tmp_path, said.append) == folder and not said
    names = [path.name for path in folder.iterdir()]
    assert {".metadata", "run.json", "SHA256SUMS", "__0_0_0.distcp"} < set(names)
    for name in names:
        path, content = folder / name, (folder / name).read_bytes()
        path.write_bytes(DAMAGES[damage](content)) if DAMAGES[damage] else path.unlink()
        Path(tmp_path, "config.py").touch()
        with pytest.raises(ValueError, match="step_00000002 is damaged, .* delete that folder"):
            checkpoint.open_run(tmp_path)
        assert checkpoint.last_good(tmp_path, said.append).name == "step_00000001"
        line = said.pop()
        assert f"{folder} is damaged, {name} is not" in line or "SHA256SUMS" == name and "is damaged, " in line
        assert checkpoint.latest(tmp_path).name == "step_00000001"
        (tmp_path / "checkpoints" / "step_00000002.damaged_2").rename(folder)
        path.write_bytes(content)
    for path in (tmp_path / "checkpoints").glob("*/__0_0_0.distcp"):
        path.unlink()
    for _ in range(2):  # nothing is set aside, so that the next start is no start from scratch
        with pytest.raises(ValueError, match=r"all checkpoints in .* damaged: step_00000002 \(__0_0_0.distcp\), "):
            checkpoint.last_good(tmp_path, said.append)


def test_a_list_of_hashes_that_is_cut_between_lines_is_damaged(tmp_path):
    checkpoint.save(tmp_path, 1, checkpoint.tensors(build()), {}, keep=0)
    listed = checkpoint.latest(tmp_path) / "SHA256SUMS"
    lines = listed.read_text().splitlines(keepends=True)
    for n in range(len(lines)):
        listed.write_text("".join(lines[:n]))
        assert damaged_file(listed.parent) == "SHA256SUMS"
    listed.write_text("".join(lines))
    assert damaged_file(listed.parent) is None


def test_sha256sum_agrees(tmp_path):
    checkpoint.save(tmp_path, 1, checkpoint.tensors(build()), {}, keep=0)
    folder = checkpoint.latest(tmp_path)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK\n") == len(list(folder.iterdir())) - 1 >= 3


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_loading_executes_nothing_that_a_file_says(tmp_path):
    model, proof = build(), tmp_path / "executed"
    checkpoint.save(tmp_path, 1, checkpoint.tensors(model), {}, keep=0)
    index = checkpoint.latest(tmp_path) / ".metadata"
    metadata, bytes_of_metadata = Reader(index.parent).read_metadata(), index.read_bytes()
    name = "model.norm.weight"
    metadata.state_dict_metadata[name] = BytesStorageMetadata()  # torch would unpickle a tensor's bytes
    for planted in (Planted(proof), metadata):
        index.write_bytes(pickle.dumps(planted))
        with pytest.raises(ValueError, match="asks for .*, which train.py saves in none"):
            checkpoint.load(index.parent, model)
    index.write_bytes(bytes_of_metadata)
    (piece,) = [piece for entry, piece in metadata.storage_data.items() if entry.fqn == name]
    path = index.with_name(piece.relative_path)
    content = bytearray(path.read_bytes())
    planted = io.BytesIO()
    torch.save(Planted(proof), planted)
    assert planted.tell() <= piece.length
    content[piece.offset : piece.offset + piece.length] = planted.getvalue().ljust(piece.length, b"\0")
    path.write_bytes(content)
    with pytest.raises(CheckpointException, match="weights_only|Weights only|UnpicklingError"):
        checkpoint.load(index.parent, model)
    torch.save({"step": 4, "batch": Planted(proof)}, tmp_path / "replay.pt")  # to be read by torch.load, it is said
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "replay.pt")
    assert not proof.exists()
    pickle.loads(pickle.dumps(Planted(proof)))
    assert proof.exists()  # it would have


def test_nothing_but_the_careful_unpickler_reads_a_pickle():
    code = {path: path.read_text() for path in REPO.rglob("*.py") if "tests" not in path.relative_to(REPO).parts}
    unsafe = re.compile(r"weights_only=False|allow_pickle=True|\bpickle\.loads?\(|\bpickle\.Unpickler\b")
    found = [(path.name, match[0]) for path, text in code.items() for match in unsafe.finditer(text)]
    assert found == [("storage.py", "pickle.Unpickler")]


# ----------------------------------------------------------------------------------------------------------------
# in the background


def hashes(out_dir, step):
    """The SHA-256 of the files with tensors of a checkpoint, which say nothing of when and where they were written."""
    lines = Path(out_dir, "checkpoints", f"step_{step:08d}", "SHA256SUMS").read_text().splitlines()
    return [line for line in lines if line.endswith(".distcp")]


FP32_MASTER = ["--dtype=bfloat16", "--optim.weights=fp32_master"]
FP8_MOMENTS = ["--dtype=bfloat16", "--optim.weights=stochastic_rounding", "--optim.fp8_moments=True"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("keys", [dict(weights="fp32_master"), dict(weights="fp32_master", offload=1.0),
                                  dict(weights="stochastic_rounding", fp8_moments=True)])
def test_a_checkpoint_gives_back_every_bit_of_what_was_saved(tmp_path, keys, in_background, device):
    def make(seed):
        model = build(device=device, dtype=torch.bfloat16, seed=seed)
        return model, AdamW(model, OptimConfig(**keys), seed=seed, compiled=False)

    def train(model, optimizer, saver=None):
        x = torch.randint(272, (2, 16), device=device)
        model(x, x).div(x.numel()).backward()
        if saver:
            saver.before_update()
        optimizer.step(1e-2, optimizer.grad_norm())

    saved, other = make(1), make(2)
    saver = checkpoint.Saver(tmp_path, *saved, print, keep=1, background=in_background)
    train(*saved)
    train(*other)
    wanted = {name: t.clone() for name, t in checkpoint.tensors(*saved).items()}
    saver.save(1, {"seed": 1})
    train(*saved, saver)  # a save in the background is of the state before
    saver.wait()
    folder = checkpoint.latest(tmp_path)
    checkpoint.load(folder, *other)
    assert checkpoint.read_run(folder) == {"step": 1, "seed": 1} and other[1].step_count == 1
    got = checkpoint.tensors(*other)
    assert got.keys() == wanted.keys() and all(torch.equal(t, got[name]) for name, t in wanted.items())
    assert not all(torch.equal(t, wanted[name]) for name, t in checkpoint.tensors(*saved).items())


@pytest.mark.parametrize("keys", [[*FP32_MASTER, "--optim.offload=1"], [*FP8_MOMENTS, "--shard_one_rank=True"]],
                         ids=["fp32_master_offloaded", "fp8_moments_sharded"])
def test_training_goes_on_while_a_checkpoint_of_its_past_is_written(tiny_run, tmp_path, monkeypatch, keys):
    args = [*tiny_run, *keys, "--eval_interval=0", "--checkpoint_interval=2", "--keep=0"]
    train_here(*args, "--async_checkpoint=False", f"--out_dir={tmp_path / 'waits'}")
    write, step, trained = Writer.write_data, AdamW.step, threading.Event()
    reached = []

    def writes_late(self, *planned):
        if self.run["step"] == 2:
            assert trained.wait(60)  # an update of step 4, while that of step 2 is not yet written
            reached.append(len(list(tmp_path.glob("beside/checkpoints/step_????????"))))
        return write(self, *planned)

    def sets(self, *args):
        step(self, *args)
        if self.step_count == 4:
            trained.set()

    monkeypatch.setattr(Writer, "write_data", writes_late)
    monkeypatch.setattr(AdamW, "step", sets)
    train_here(*args, f"--out_dir={tmp_path / 'beside'}")
    assert reached == [0]
    for n in (2, 4, 6):
        assert hashes(tmp_path / "beside", n) == hashes(tmp_path / "waits", n)
    assert hashes(tmp_path / "beside", 4) != hashes(tmp_path / "beside", 2)


def test_a_save_in_the_background_starts_no_openmp_threads_of_its_own(tmp_path):
    script = tmp_path / "count.py"  # threads of a process of its own, with more than this machine may have cores
    script.write_text(textwrap.dedent(f"""
        import os, sys
        sys.path[:0] = [{str(REPO)!r}, {str(REPO / "tests")!r}]
        import torch
        from conftest import build
        from tqdm import tqdm
        import checkpoint, optim
        tqdm.monitor_interval = 0  # else it has a thread
        torch.set_num_threads(5)
        model = build(n_embd=256, ffn_dim=512)
        optimizer = optim.AdamW(model, optim.OptimConfig(), seed=1, compiled=False)
        torch.ones(10**6).exp_()  # starts those of the main thread
        before = len(os.listdir("/proc/self/task"))
        saver = checkpoint.Saver({str(tmp_path / "out")!r}, model, optimizer, print, keep=1, background=True)
        for step in (1, 2):
            saver.save(step, {{}})
            saver.wait()
        print(len(os.listdir("/proc/self/task")) - before, "more threads")
        """))
    assert run(script).stdout == "1 more threads\n"  # the one that saves


def test_a_weight_of_another_layout_is_saved_in_the_background(tmp_path):
    model = build()
    model.layers[0].mlp.down.weight.data = model.layers[0].mlp.down.weight.detach().t().contiguous().t()
    optimizer = AdamW(model, OptimConfig(weights="plain"), seed=1, compiled=False)
    saver = checkpoint.Saver(tmp_path, model, optimizer, print, keep=1, background=True)
    saver.save(1, {})
    saver.wait()
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.detach().zero_()
    checkpoint.load(checkpoint.latest(tmp_path), model)
    assert all(torch.equal(p, wanted[name]) for name, p in model.named_parameters())


def test_an_update_waits_for_the_copy(tiny_run, tmp_path, monkeypatch):
    copy = checkpoint.Saver.copy

    def copies_late(*args):
        time.sleep(0.5)
        return copy(*args)

    monkeypatch.setattr(checkpoint.Saver, "copy", copies_late)
    for name, in_background in (("beside", True), ("waits", False)):
        train_here(*tiny_run, f"--async_checkpoint={in_background}", f"--out_dir={tmp_path / name}")
    assert hashes(tmp_path / "beside", 3) == hashes(tmp_path / "waits", 3)


def test_a_save_that_is_due_before_the_last_one_ended_waits_and_says_so(tiny_run, tmp_path, monkeypatch, capsys):
    write = Writer.write_data

    def writes_slowly(*planned):
        time.sleep(0.5)
        return write(*planned)

    monkeypatch.setattr(Writer, "write_data", writes_slowly)
    train_here(*tiny_run, "--max_steps=3", "--checkpoint_interval=1", "--keep=0", f"--out_dir={tmp_path}")
    told = capsys.readouterr().out
    for step in (2, 3):
        assert f"step {step}: waiting for the checkpoint of step {step - 1}, which is still being written" in told
    assert len(checkpoint.complete(tmp_path / "checkpoints")) == 3


@pytest.mark.parametrize("last", [3, 6])  # raised at a step, and at the end
def test_a_full_disk_in_the_background_is_one_line_and_leaves_the_checkpoint_before(tiny_run, tmp_path, monkeypatch,
                                                                                    last):
    write = Writer.write_data

    def fails(self, *planned):
        if self.run["step"] == last:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, *planned)

    monkeypatch.setattr(Writer, "write_data", fails)
    status, _, error = main_here(train.main, *tiny_run, "--checkpoint_interval=1", f"--out_dir={tmp_path}")
    assert status == 2 and error.count("\n") == 1 and "No space left on device" in error
    assert checkpoint.latest(tmp_path).name == f"step_{last - 1:08d}"
    monkeypatch.undo()
    gc.collect()  # the failed run's open metrics, which hold the lock on out_dir
    train_here(*tiny_run, f"--out_dir={tmp_path}")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[-1] == "step_00000006"


def test_a_file_that_did_not_arrive_is_found_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    write = Writer.write_data

    def on_another_disk(self, *planned):
        written = write(self, *planned)
        self.path.joinpath("__0_1_0.distcp").write_bytes(b"")
        return written

    monkeypatch.setattr(Writer, "write_data", on_another_disk)
    with pytest.raises(CheckpointException, match="__0_1_0.distcp has not arrived with its .* bytes, which a rank"):
        checkpoint.save(tmp_path, 1, checkpoint.tensors(build()), {}, keep=0)
    assert checkpoint.latest(tmp_path) is None


def test_all_is_on_the_disk_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    flushed, folder = [], tmp_path / "checkpoints" / "step_00000001"
    monkeypatch.setattr(storage, "flush", lambda path: flushed.append((path.name, folder.exists())))
    checkpoint.save(tmp_path, 1, checkpoint.tensors(build()), {}, keep=0)
    assert flushed == [("run.json", False), ("SHA256SUMS", False), ("step_00000001.tmp", False), ("checkpoints", True)]


def test_a_part_of_a_tensor_that_no_rank_has_written_is_found(tmp_path, monkeypatch):
    finish = dcp.FileSystemWriter.finish
    monkeypatch.setattr(dcp.FileSystemWriter, "finish", lambda self, metadata, results: finish(
        self, metadata, [results[0][1:], *results[1:]]))
    with pytest.raises(CheckpointException, match="AssertionError"):
        checkpoint.save(tmp_path, 1, checkpoint.tensors(build()), {}, keep=0)
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_is_one_line_whatever_torch_makes_of_it(tiny_run, tmp_path, in_background):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    args = [*tiny_run, "--checkpoint_interval=2", f"--async_checkpoint={in_background}", f"--out_dir={tmp_path}"]
    train_here(*args, "--max_steps=2")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # some of the threads can write their files
        status, _, error = main_here(train.main, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    place = tmp_path / "checkpoints" / "step_00000004.tmp"
    assert (status, error) == (2, f"train.py: {place}: File too large: name another path, or make this one usable\n")
    assert [path.name for path in checkpoint.complete(tmp_path / "checkpoints")] == ["step_00000002"]


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
