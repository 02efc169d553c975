"""Shared by the tests: small models, runs of train.py in processes of their own, and the GPU mark."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import torch
import torch._inductor.config
import torch.distributed as dist
from tqdm import tqdm

import fp8
import model as models
import train
from formats.tokenizer import Tokenizer
from plumbing import entry, logs, ranks
from plumbing.stopping import SIGNALS

torch.set_num_threads(1)  # matrices of 64 x 128 gain nothing from a second thread, whose waiting costs the other worker
REPO = Path(__file__).parent.parent
# torch 2.13's inductor vectorizes transposed FP8 copies wrongly with AVX-512 (nan in gradients of compiled real FP8,
# seen on a Xeon with AVX512-FP16 and without AMX); with AVX2 or without vectors the same graphs are right.
REAL_FP8_SIMDLEN = 256
TINY = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, head_dim=16, ffn_dim=128, block_size=64)


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def build(fp8_config=None, device="cpu", dtype=torch.float32, seed=1, **sizes):
    """A small Transformer with weights, converted where an enabled FP8Config is given."""
    with torch.device("meta"):
        model = models.Transformer(models.ModelConfig(**{**TINY, **sizes})).to(dtype)
    if fp8_config is not None and fp8_config.enabled:
        fp8.convert(model, fp8_config, shards=0)
    model.to_empty(device=device)
    models.init_weights(model, seed)
    return model


def sqnr(reference, x):
    """Signal to quantization noise in dB: 10 log10(|ref|^2 / |ref - x|^2)."""
    reference, x = reference.double(), x.double()
    return 10 * torch.log10(reference.square().sum() / (reference - x).square().sum()).item()


def run(script, *args, ranks=1, check=True, cwd=REPO):
    """Run a script of this repository, under torchrun where ranks > 1; the CompletedProcess with its output."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([*launcher, str(REPO / script), *map(str, args)], capture_output=True, text=True, cwd=cwd,
                          env={**env, "OMP_NUM_THREADS": "1"})
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_many(folder, runs, ranks=1, traced=()):
    """Runs of train.py, {name: arguments}, in one process group, out_dir folder/name; {name: metrics, with .text}.

    traced: names of runs whose compiled graphs are traced and partitioned, but not compiled by Inductor.
    """
    listed = folder / f"runs_{ranks}.json"
    listed.write_text(json.dumps([[[*map(str, args), f"--out_dir={folder / name}"], name in traced]
                                  for name, args in runs.items()]))
    *texts, _ = run("tests/train_many.py", listed, ranks=ranks).stdout.split("---- end of a run ----\n")
    return {name: SimpleNamespace(**vars(metrics(folder / name)), text=text)
            for name, text in zip(runs, texts, strict=True)}


def metrics(out_dir):
    """The rows of out_dir/metrics.jsonl: train rows by step, validation losses by step."""
    rows = logs.read_metrics(out_dir)
    return SimpleNamespace(out_dir=Path(out_dir), rows=rows, train={r["step"]: r for r in rows if "loss" in r},
                           val={r["step"]: r["val_loss"] for r in rows if "val_loss" in r})


def train_here(*args):
    """train.py in this process, for what is quick and not compiled: nothing to import again. Raises what it raises."""
    before, sys.argv = sys.argv, ["train.py", *map(str, args)]
    try:
        train.main()
    finally:
        sys.argv = before
        if dist.is_initialized():
            dist.destroy_process_group()
        signal.set_wakeup_fd(-1)  # what a run that failed has left
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        torch.use_deterministic_algorithms(False)


def train_in_process(command, log):
    """Takes the place of bench.train, which starts processes: train.py with its arguments, its output in log."""
    with log.open("w") as file, contextlib.redirect_stdout(file):
        train_here(*command[1:])


def main_here(main, *argv):
    """The main() of a script in this process, as its entry point calls it: (exit status, stdout, stderr)."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, argv)])
        try:
            entry.run(main)
        except SystemExit as ended:
            status = int(ended.code or 0)
        finally:
            torch.use_deterministic_algorithms(False)
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python starts
    return status, out.getvalue(), err.getvalue()


def scales_rows_on_a_cpu():
    """Whether this torch multiplies FP8 with a scale for each row on a CPU: 2.11 does not."""
    fp8_ones, scales = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(fp8_ones, fp8_ones.t(), scales, scales.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


needs_rows_on_a_cpu = pytest.mark.skipif(not scales_rows_on_a_cpu(), reason="needs rowwise FP8 matmuls on a CPU")


@pytest.fixture
def bars(monkeypatch):
    """A list of the progress bars that a terminal would show."""
    shown = []

    def on_a_terminal(items, **keys):
        shown.append(tqdm(items, **{**keys, "disable": False, "file": io.StringIO()}))
        return shown[-1]

    on_a_terminal.write = tqdm.write
    monkeypatch.setattr(ranks, "tqdm", on_a_terminal)
    return shown


@pytest.fixture
def real_fp8_on_a_cpu(monkeypatch):
    """The path of a GPU, matmuls and layouts too: a CPU can take it, if slowly, so only fp8.check forbids it."""
    monkeypatch.setattr(fp8, "check", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with torch._inductor.config.patch({"cpp.simdlen": REAL_FP8_SIMDLEN}):
        yield


@pytest.fixture(scope="session")
def wide():
    """A tokenizer whose ids begin at 300, beyond the vocabulary of the models here."""
    encoding = tiktoken.Encoding("wide", pat_str=".", mergeable_ranks={bytes([i]): i + 300 for i in range(256)},
                                 special_tokens={})
    return Tokenizer("wide", encoding)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of small text files: 60 documents, about 100 kB."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        text = "".join(f"def function_{i}_{j}(x):\n    return x * {j * j % 97} + {i}\n" for j in range(40))
        (folder / f"{i:02}.py").write_text(text)
    return folder


@pytest.fixture(scope="session")
def tiny_run(corpus):
    """Arguments for a run of train.py that takes a second: tiny model, local text, float32 on the CPU."""
    sizes = [f"--model.{k}={v}" for k, v in TINY.items()]
    return [*sizes, f'--data.train=["{corpus}"]', f"--data.cache_dir={corpus.parent / 'cache'}", "--device=cpu",
            "--dtype=float32", "--max_steps=6", "--log_interval=1", "--eval_interval=3", "--eval_sequences=10",
            "--checkpoint_interval=3", "--optim.warmup_steps=2", "--optim.lr=0.003", "--optim.weights=plain",
            "--global_batch_size=8", "--micro_batch_size=4", "--deterministic=True"]
