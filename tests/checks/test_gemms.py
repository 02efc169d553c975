"""gemms.py: timings of single layers, what they predict, and fp8.auto_filter."""

import ast
import json
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, main_here, metrics, run, train_here

import bench
from checks import gemms
from configurator import Config, FP8Config
from model import ModelConfig


@pytest.fixture
def rows(monkeypatch):
    """time_linears of a small model on the CPU, with a clock that says what the test wants."""
    ms = {"attn.qkv": (4, 2, 3), "attn.out": (1, 2, 3), "mlp.gate_up": (8, 4, 2), "mlp.down": (3, 3, 3),
          "lm_head": (5, 1, 2)}  # bf16, tensorwise, rowwise
    times = iter([t for layer in ms.values() for forward in layer for t in (forward, 3 * forward)])

    def clock(device, run, *args):
        run(*args)  # it must work, however long it takes
        return next(times)

    monkeypatch.setattr(gemms, "milliseconds", clock)
    config = Config(model=ModelConfig(n_layer=3, n_kv_head=2, vocab_size=256), loss_chunks=2, micro_batch_size=2,
                    fp8=FP8Config(emulate=True), dtype="float32")
    return gemms.time_linears(config, torch.device("cpu"), 4, ["tensorwise", "rowwise"])


def test_every_kind_of_layer_is_timed_as_often_as_a_step_calls_it(rows):
    assert [(row["layer"], row["calls"], row["tokens"]) for row in rows] == [
        ("attn.qkv", 12, 512), ("attn.out", 12, 512), ("mlp.gate_up", 12, 512), ("mlp.down", 12, 512),
        ("lm_head", 8, 256)]
    assert rows[0]["shape"] == [(6 + 2 * 2) * 32, 192] and rows[0]["ms"] == {
        "bf16": (4, 8), "tensorwise": (2, 4), "rowwise": (3, 6)}


def test_what_pays_and_what_the_step_becomes(rows):
    assert [gemms.gain(row, "tensorwise") for row in rows] == [12 * 6, 12 * -3, 12 * 12, 0, 8 * 12]
    text = gemms.table(rows, step_ms=1000)
    assert "  tensorwise wherever it can: 724.0 ms (1.38x)\n  rowwise wherever it can: 748.0 ms (1.34x)\n" in text
    assert "  the fastest for each layer: 616.0 ms (1.62x)\n" in text
    keys = text.splitlines()[-1]
    assert keys.startswith('--fp8.recipes="') and ast.literal_eval(keys.partition("=")[2].strip('"')) == {
        "attn.qkv": "tensorwise", "attn.out": None, "mlp.gate_up": "rowwise", "mlp.down": None, "lm_head": "tensorwise"}
    slow = [{**row, "ms": {"bf16": (1, 1), "rowwise": (2, 2)}} for row in rows]
    assert gemms.table(slow, step_ms=1000).endswith("FP8 pays for none of them here: --fp8.enabled=False")


@pytest.mark.parametrize("recipes, chosen", [
    ({}, ["attn.out", "mlp.down"]), ({"attn.out": "rowwise"}, ["attn.out", "mlp.down"]),
    ({"mlp.down": None}, ["attn.out"]), ({"layers.1": "rowwise"}, ["attn.out", "mlp.down", "layers.1.attn.qkv"])])
def test_auto_filter_judges_each_layer_by_its_own_recipe(monkeypatch, recipes, chosen):
    """Rowwise pays for mlp.gate_up and lm_head only."""
    pays = {"tensorwise": ("attn.qkv", "mlp.gate_up", "lm_head"), "rowwise": ("mlp.gate_up", "lm_head")}
    timed = []

    def time_linears(config, device, passes, names):
        timed.append(set(names))
        return [{"layer": kind, "calls": 1, "ms": {"bf16": (2, 2), **{name: (1 if kind in pays[name] else 2, 2)
                                                                      for name in names}}}
                for kind in ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down", "lm_head")]

    monkeypatch.setattr(gemms, "time_linears", time_linears)
    config = Config(model=ModelConfig(n_layer=2, vocab_size=256), fp8=FP8Config(enabled=True, recipes=recipes))
    assert gemms.choose(config, torch.device("cpu"), 1) == chosen
    assert timed == [{"tensorwise"} | set(filter(None, recipes.values()))]


def test_a_shape_that_fp8_cannot_take_is_left_out():
    config = Config(model=ModelConfig(n_layer=1, vocab_size=257), dtype="float32", fp8=FP8Config(emulate=True))
    rows = gemms.time_linears(config, torch.device("cpu"), 1, ["tensorwise"])
    assert rows[-1]["ms"]["tensorwise"] is None and rows[0]["ms"]["tensorwise"] and gemms.best(rows[-1]) is None
    assert gemms.gain(rows[-1], "tensorwise") == 0 and gemms.table(rows, 10.0).splitlines()[-6].split()[-1] == "n/a"


def test_the_calls_that_compile_are_not_timed(monkeypatch):
    seconds = iter([100.0] * 5 + [0.001 * i for i in range(1, 22)])
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(gemms, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def run(first):
        clock.now += next(seconds) + first

    assert gemms.milliseconds(torch.device("cpu"), run, 0.5, calls=21) == pytest.approx(511)


def test_emulated_fp8_cannot_choose():
    (message,) = FP8Config(enabled=True, emulate=True, auto_filter=True).problems()
    assert "fp8.auto_filter=True contradicts fp8.emulate=True (emulated FP8 makes no layer faster)" in message


@pytest.mark.parametrize("ranks", [1, 2])
def test_auto_filter_leaves_out_what_does_not_pay_and_a_resumed_run_keeps_the_choice(tiny_run, tmp_path, ranks):
    script = tmp_path / "pretend.py"  # emulated here, as if it were real
    script.write_text(textwrap.dedent(f"""
            import os, sys
            sys.path.insert(0, {str(REPO)!r})
            import fp8
            import train
            from checks import gemms
            from plumbing import entry
            from plumbing.ranks import gather
            fp8.FP8Config.problems = lambda self: ()
            rank = os.environ.get("RANK", "0")
            gemms.time_linears = lambda config, device, passes, recipes: [
                dict(layer=kind, calls=1, ms=dict(bf16=(2, 2), tensorwise=(1 + (kind == slow or rank == "1"), 2)))
                for kind in ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")]
            keys = sys.argv[1:]
            for slow, steps in (("attn.out", 3), ("attn.qkv", 6)):
                sys.argv[1:] = [*keys, f"--max_steps={{steps}}"]
                train.main()
                gather(None)  # rank 0 still holds the metrics when the other is done
            entry.leave()
            """))
    keys = [*tiny_run, "--fp8.enabled=True", "--fp8.emulate=True", "--fp8.auto_filter=True",
            '--fp8.filter_fqns=["lm_head"]', f"--out_dir={tmp_path / 'out'}"]
    done, _, again = run(script, *keys, ranks=ranks).stdout.partition("done: 3 steps")
    assert "no faster: attn.out" in done and "fp8: 6 of 9 linear layers converted" in done
    assert "no faster: attn.out" in again and "fp8: 6 of 9" in again
    resuming = next(line for line in again.splitlines() if line.startswith("resuming from"))
    assert "max_steps=6 instead of 3" in resuming and "filter_fqns" not in resuming and "recipes" not in resuming
    assert "layers.*.attn.out      (64, 64)         x2    float32: fp8.auto_filter" in done
    assert list(metrics(tmp_path / "out").train) == [1, 2, 3, 4, 5, 6]


def test_bench_gemms_reports_and_keeps_the_figures(tiny_run, tmp_path, monkeypatch):
    def train(command, log):  # as if on two ranks, each of which makes one pass a step
        train_here(*command[1:])
        record = log.with_name("run.json")
        record.write_text(json.dumps(json.loads(record.read_text()) | {"ranks": 2}))

    monkeypatch.setattr(bench, "train", train)
    _, told, _ = main_here(bench.main, REPO / "config/llama_fp8.py", *tiny_run, f"--out_dir={tmp_path}",
                           "--compile.enabled=False", "--steps=10", "--warmup=5", "--gemms",
                           "--variants=bf16,rowwise,tensorwise,tensorwise:loss_chunks=2")
    report = json.loads((tmp_path / "gemms.json").read_text())
    assert [row["layer"] for row in report["gemms"]] == ["attn.qkv", "attn.out", "mlp.gate_up", "mlp.down", "lm_head"]
    assert [(row["calls"], row["tokens"]) for row in report["gemms"]] == [(2, 4 * 64)] * 4 + [(1, 4 * 64)]
    assert all(list(row["ms"]) == ["bf16", "rowwise", "tensorwise"] for row in report["gemms"])
    assert all(forward > 0 and backward >= 0 for row in report["gemms"] for forward, backward in row["ms"].values())
    assert report["rows"][0]["variant"] == "bf16" and "bf16 step, measured" in told
    assert not (tmp_path / "bench.json").exists()


def test_bench_gemms_times_the_shapes_that_the_run_has(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "train", lambda command, log: train_here(*command[1:]))
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"ind": i, "activity_label": "A", "ctx_a": f"One {i}", "ctx_b": "then",
                                             "endings": list("abcd"), "label": 0}) + "\n" for i in range(40)))
    main_here(bench.main, REPO / "config/llama_fp8.py", *tiny_run, f"--out_dir={tmp_path}", "--compile.enabled=False",
              "--data.format=hellaswag", f'--data.train=["{questions}"]', f'--data.val=["{questions}"]',
              "--steps=10", "--warmup=5", "--gemms")
    report = json.loads((tmp_path / "gemms.json").read_text())
    assert {row["tokens"] for row in report["gemms"]} == {4 * 16}  # rows as long as the longest sample, not block_size


@pytest.mark.gpu
def test_the_gpus_time_is_without_the_time_that_python_takes():
    x = torch.zeros(1, device="cuda")

    def slow_to_start():
        time.sleep(0.002)
        x.add_(1)

    assert gemms.milliseconds(x.device, slow_to_start) < 0.5


@pytest.mark.gpu
def test_on_a_gpu_large_layers_pay_and_small_ones_do_not():
    config = Config(model=ModelConfig(n_layer=1, n_embd=4096, n_head=32, n_kv_head=8, head_dim=128, ffn_dim=14336,
                                      vocab_size=256, block_size=8192), fp8=FP8Config())
    config.compile.enabled = True
    rows = gemms.time_linears(config, torch.device("cuda"), 1, ["tensorwise"])
    best = {row["layer"]: gemms.best(row) for row in rows}
    assert best["mlp.gate_up"] == best["mlp.down"] == "tensorwise"
    assert best["lm_head"] is None  # 256 rows: the casts cost more than the whole matmul
