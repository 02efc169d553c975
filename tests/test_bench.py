"""bench.py: one row a variant, measured by train.py, and the reason of a variant that failed."""

import datetime
import json
import sys
from types import SimpleNamespace

import pytest
from conftest import REPO, main_here, metrics, run, train_here
from matplotlib.figure import Figure

import parity
from bench import COLUMNS, FIXED, BenchConfig, flags, main, measure, plot, report_ignored, slug, split, time_left
from plumbing.errors import RunStopped
from plumbing.logs import table


@pytest.fixture(scope="module")
def bench(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    variants = "bf16,tensorwise:fp8.filter_fqns=[]:fp8.stats_interval=4,rowwise:fp8.filter_fqns=['typo']"
    status, text, _ = main_here(main, REPO / "config/llama_fp8.py", *tiny_run, f"--out_dir={out}",
                                "--compile.enabled=False", "--steps=10", "--warmup=5", f"--variants={variants}")
    return status, text, out, json.loads((out / "bench.json").read_text())


def ms_per_step(folder, steps):
    """Milliseconds a step between the rows of these steps, by the clock of the run."""
    train = metrics(folder).train
    return [1000 * (train[b]["time_s"] - train[a]["time_s"]) / (b - a)
            for a, b in zip(steps, steps[1:], strict=False)]


def test_times_are_those_of_the_runs_clock(bench):
    _, _, out, report = bench
    for row in report["rows"][:2]:
        folder = out / slug(row["variant"])
        ms, last = ms_per_step(folder, (5, 10, 15)), metrics(folder).train[15]
        assert row["ms"] == pytest.approx(ms) and row["ms_per_step"] == pytest.approx(sum(ms) / 2)
        assert (row["peak_gib"], row["loss"]) == (last["peak_gib"], last["loss"])
        record = json.loads((folder / "run.json").read_text())
        assert all(row[key] == record[key] for key in ("compile_s", "fp8_flops", "auto_filtered"))
        assert all(report[key] == record[key] for key in ("hardware", "versions", "git_commit", "tokens_per_step"))


def test_the_time_left_is_that_of_the_runs_so_far(monkeypatch):
    monkeypatch.setattr("bench.time", SimpleNamespace(monotonic=lambda: 1000.0))
    assert [time_left(started, n_done, 4) for started, n_done in ((1000.0, 0), (700.0, 1), (400.0, 2), (990.0, 1))] == [
        "", ", about 15 min left", ", about 10 min left", ""]


def test_mfu_is_the_flops_of_a_step_over_its_time_and_the_peak(monkeypatch, tmp_path):
    rows = [{"step": step, "loss": 1.0, "tokens": 4000 * step, "tokens_per_s": speed, "peak_gib": 2.0, **slowest}
            for step, speed, slowest in ((1, 1.0, {}), (5, 1.0, {"slowest_ms": 9e3}), (10, 1000.0, {"slowest_ms": 2e3}),
                                         (15, 500.0, {"slowest_ms": 7e3}), (20, 250.0, {"slowest_ms": 8e3}))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.json").write_text(json.dumps({
        "ranks": 2, "flops_per_token": 3e9, "peak_flops": 6e12, "compile_s": 1, "fp8_flops": 0, "auto_filtered": None}))
    monkeypatch.setattr("bench.train", lambda *_: None)
    row, _ = measure([], tmp_path, BenchConfig(warmup=5, steps=15))
    # 2,000 tokens a step and rank: 2, 4 and 8 s, the warm-up left out; 2000 x 3e9 FLOP in 4 s on 6e12 FLOP/s
    assert row["ms"] == [2000, 4000, 8000] and (row["ms_per_step"], row["spread_ms"]) == (4000, 6000)
    assert row["slowest_ms"] == 9000  # in the warm-up too
    assert row["mfu"] == pytest.approx(2000 * 3e9 / 4 / 6e12) and row["tokens_per_s"] == 500


def test_rows_have_the_promised_keys_and_add_up(bench):
    *_, out, report = bench
    assert {"hardware", "versions", "date", "command", "rows"} <= set(report)
    assert report["command"][0] == "bench.py" and report["command"][-1].startswith("--variants=bf16,tensorwise:")
    assert f"--out_dir={out}" in report["command"]
    assert datetime.date.today() - datetime.date.fromisoformat(report["date"]) <= datetime.timedelta(days=1)
    assert [row["variant"] for row in report["rows"]][:2] == [
        "bf16", "tensorwise:fp8.filter_fqns=[]:fp8.stats_interval=4"]
    for row in report["rows"][:2]:
        assert 0 < row["ms_per_step"] * 0.5 < row["slowest_ms"]
        assert {"variant", "ms_per_step", "spread_ms", "tokens_per_s", "speedup", "mfu", "peak_gib",
                "compile_s"} <= set(row)
        assert row["tokens_per_s"] * row["ms_per_step"] == pytest.approx(1000 * 8 * 64)
        assert len(row["ms"]) == 2 and row["spread_ms"] == pytest.approx(max(row["ms"]) - min(row["ms"]))
        assert row["loss"] < 5.0  # it did train
    bf16, fp8 = report["rows"][:2]
    assert fp8["speedup"] == pytest.approx(fp8["tokens_per_s"] / bf16["tokens_per_s"])
    assert (bf16["fp8_flops"], fp8["fp8_flops"] > 0.5) == (0, True)


def test_a_failed_variant_keeps_its_reason_and_fails_the_bench(bench):
    status, text, out, report = bench
    assert status == 1 and f"{report['hardware']}, median of 2 x 5 steps; speedup is relative to bf16" in text
    assert "'typo' matches no linear layer" in report["rows"][2]["error"] and "'typo'" in text
    assert "--eval_interval=3" in text.split(": no effect here")[0]
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "the times are not" in text


def test_where_nothing_runs_there_is_one_line_and_no_table(tiny_run, tmp_path):
    status, out, err = main_here(main, *tiny_run, f"--out_dir={tmp_path}", "--variants=bf16", "--data.tokenizer=nope")
    assert status == 1 and "\nbench.py: nothing ran: train.py: data.tokenizer='nope' is neither" in err
    assert "error" in json.loads((tmp_path / "bench.json").read_text())["rows"][0] and "speedup is" not in out


def test_a_baseline_that_failed_gives_no_speedup_and_stops_no_other_variant(tiny_run, tmp_path, monkeypatch):
    def measure(command, *_):
        if "--fp8.enabled=False" in command:
            raise RunStopped("no")
        return {"ms_per_step": 1.0, "tokens_per_s": 1.0, "peak_gib": 1.0}, {"hardware": "this"}

    monkeypatch.setattr("bench.measure", measure)
    status, out, _ = main_here(main, *tiny_run, f"--out_dir={tmp_path}", "--variants=bf16,tensorwise")
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert status == 1 and rows == [{"variant": "bf16", "error": "no"}, {
        "variant": "tensorwise", "ms_per_step": 1.0, "tokens_per_s": 1.0, "peak_gib": 1.0}] and "bf16 failed: no" in out


def test_the_bars_of_bench_png_are_the_rows(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    rows = [{"variant": "bf16", "tokens_per_s": 1000.0, "speedup": 1.0, "peak_gib": 7.0},
            {"variant": "rowwise", "error": "no"},
            {"variant": "tensorwise", "tokens_per_s": 1234.0, "speedup": 1.234, "peak_gib": 8.06}]
    plot(rows, "title", tmp_path / "bench.png")
    speed, memory = drawn[0].axes
    assert [bar.get_width() for bar in speed.patches] == [1234, 1000]  # the first on top
    assert [bar.get_width() for bar in memory.patches] == [8.06, 7]
    assert [text.get_text() for text in speed.texts] == ["1,234 (1.23x)", "1,000 (1.00x)"]
    assert [text.get_text() for text in memory.texts] == ["8.1", "7.0"]
    assert [tick.get_text() for tick in speed.get_yticklabels()] == ["tensorwise", "bf16"]


def test_the_table_has_each_number_in_its_unit():
    numbers = {"ms_per_step": 123.44, "spread_ms": 1.26, "slowest_ms": 1300.06, "tokens_per_s": 66363.6,
               "speedup": 1.234, "mfu": 0.4237, "peak_gib": 70.126, "compile_s": 31.04}
    rows = [{"variant": "rowwise", **numbers}, {"variant": "bf16", **dict.fromkeys(numbers), "speedup": 1.0},
            {"variant": "tensorwise", "error": "no"}]
    assert [line.split() for line in table(rows, COLUMNS).splitlines()] == [
        ["variant", *numbers], ["rowwise", "123.4", "1.3", "1300.1", "66,364", "1.23", "42.4%", "70.13", "31.0"],
        ["bf16", *["n/a"] * 4, "1.00", *["n/a"] * 3], ["tensorwise", "failed:", "no"]]


@pytest.mark.parametrize("script", [main, parity.main])
def test_on_several_nodes_they_do_not_start(tiny_run, tmp_path, monkeypatch, script):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setattr("bench.train", None)
    status, _, err = main_here(script, *tiny_run, f"--out_dir={tmp_path}")
    assert status == 2 and "this script works on one machine: start torchrun without --nnodes" in err


def test_keys_that_a_script_sets_itself_are_told_not_dropped(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "c.py", "--max_steps=3", "--seed=1", "--resume=must"])
    report_ignored(FIXED)
    assert capsys.readouterr().out.startswith("--max_steps=3 --resume=must: no effect here, this")
    report_ignored({"eval_interval"})
    assert capsys.readouterr().out == ""
    assert {"max_steps", "log_interval", "eval_interval", "checkpoint_interval", "resume"} == FIXED


def test_two_ranks(tiny_run, tmp_path):
    done = run("bench.py", *tiny_run, f"--out_dir={tmp_path}", "--compile.enabled=False", "--steps=10", "--warmup=0",
               "--variants=bf16,tensorwise,bf16:replicas=3", ranks=2, check=False)
    report = json.loads((tmp_path / "bench.json").read_text())
    *rows, failed = report["rows"]
    assert report["hardware"].startswith("2 x CPU with ")
    assert [row["tokens_per_s"] * row["ms_per_step"] for row in rows] == pytest.approx([1000 * 4 * 64] * 2)  # per rank
    for row in rows:
        assert row["ms"][1:] == pytest.approx(ms_per_step(tmp_path / row["variant"], (5, 10)))
    assert "replicas=3 must divide the number of ranks, 2" in failed["error"]
    assert done.returncode == 1 and done.stdout.count("bf16: 0 + 10 steps") == 1  # one rank speaks


def test_rowwise_variants_do_not_gather_in_fp8():
    assert "--fp8.enable_fsdp_float8_all_gather=False" in flags("rowwise_with_gw_hp")
    assert flags("tensorwise:loss_chunks=2")[1:] == ["--fp8.recipe_name=tensorwise", "--loss_chunks=2"]


def test_commas_and_colons_inside_of_a_value_do_not_end_it():
    variant = 'tensorwise:fp8.filter_fqns=["lm_head","mlp"]:fp8.recipes={"lm_head": "rowwise", "layers.0": None}:seed=1'
    assert split(f"bf16,{variant},rowwise") == ["bf16", variant, "rowwise"]
    assert flags(variant)[2:] == ['--fp8.filter_fqns=["lm_head","mlp"]',
                                  '--fp8.recipes={"lm_head": "rowwise", "layers.0": None}', "--seed=1"]


@pytest.mark.parametrize("keys, told", [
    ({"variants": "bf16,fp4"}, "'fp4' does not start"), ({"steps": 7}, "=7"),
    ({"steps": 5}, "--steps=5 and"), ({"warmup": 3}, "--warmup=3 must"), ({"warmup": -5}, "--warmup=-5 must"),
    ({"variants": "bf16,rowwise,bf16"}, "--variants: 'bf16' is there 2 times"),
    ({"variants": "bf16:seed=3:out_dir=x"}, "sets out_dir, seed, which must be the same for all"),
    ({"variants": "bf16:max_steps=3:loss_chunks=2"}, "sets max_steps, which must be the same for all variants")])
def test_mistakes_are_told(keys, told):
    assert told in "".join(BenchConfig(**keys).problems())


def test_a_profile_holds_the_asked_number_of_whole_steps(tiny_run, tmp_path):
    args = [*tiny_run, f"--out_dir={tmp_path}", "--steps=2", "--warmup=1", "--show=3"]
    done = run("bench/profile_step.py", REPO / "config/llama_fp8.py", *args, "--compile.enabled=False")
    report = json.loads((tmp_path / "profile" / "profile.json").read_text())
    names, ms = ([row[key] for row in report["kernels"]] for key in ("name", "ms"))
    calls = dict(zip(names, (row["calls"] for row in report["kernels"]), strict=True))
    # two passes a step, through two blocks
    assert calls["aten::embedding"] == 2 and calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == 4
    assert report["busy_ms"] == pytest.approx(sum(ms)) and ms == sorted(ms, reverse=True)
    assert [line.split()[0] for line in done.stdout.splitlines() if line.split(" ")[0] in calls] == names[:3]
    assert "--eval_interval=3" in done.stdout.split(": no effect here")[0]
    assert report["command"][0].endswith("profile_step.py") and len(metrics(tmp_path / "profile").train) == 3


def test_a_peer_still_fits_what_it_borrows_from_here(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # it borrows nothing that compiles: half a minute for no more
    sizes = ["--layers=1", "--width=256", "--vocab=512", "--tokens=128", "--steps=5", "--warmup=5"]
    done = run("bench/peers/transformers_llama.py", *sizes, f"--out={tmp_path}", f"--cache_dir={tmp_path}",
               "--variants=tensorwise:gather")
    row, = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["tokens_per_s"] > 0 and row["loss"] < 7 and "tensorwise:gather" in done.stdout


PLANTED = """
import torch

def cast(x, dtype):
    scale = torch.finfo(dtype).max / x.abs().max().float()
    return (x.float() * scale).to(dtype), scale.reciprocal()

class _Float8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        (a, sa), (b, sb) = cast(x, torch.float8_e4m3fn), cast(w, torch.float8_e4m3fn)
        return torch._scaled_mm(a, b.t(), sa, sb, out_dtype=x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        (a, sa), (b, sb), (c, sc) = (cast(t, getattr(torch, f"float8_{kind}")) for t, kind in
                                     ((x, "e4m3fn"), (w, "e4m3fn"), (g, "e5m2")))
        return (torch._scaled_mm(c, b.t().contiguous().t(), sc, sb, out_dtype=x.dtype),
                torch._scaled_mm(c.t().contiguous(), a.t().contiguous().t(), sc, sa, out_dtype=x.dtype))
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """nanochat's layout, with an autograd function as its own is called."""
    from torchao.float8.float8_linear import Float8Linear

    (tmp_path / "clone" / "nanochat").mkdir(parents=True)
    (tmp_path / "clone" / "nanochat" / "fp8.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(REPO / "bench" / "peers")
    monkeypatch.setattr(Float8Linear, "forward", Float8Linear.forward)
    yield tmp_path / "clone"
    for name in [name for name in sys.modules if name.partition(".")[0] == "nanochat"]:
        del sys.modules[name]


def test_nanochats_fp8_trains_what_ours_trains(tiny_run, tmp_path, clone, real_fp8_on_a_cpu, capsys):
    import nanochat_fp8

    args = [*tiny_run, "--dtype=bfloat16", "--optim.weights=fp32_master", "--fp8.enabled=True", "--max_steps=3",
            "--fp8.filter_fqns=['lm_head']", "--global_batch_size=1", "--micro_batch_size=1", "--checkpoint_interval=0"]
    losses = []
    for name in ("ours", "theirs"):
        if name == "theirs":
            nanochat_fp8.use_nanochat(clone)
        train_here(*args, f"--out_dir={tmp_path / name}")
        assert "fp8: verified, 24 fp8 matmuls ran in one pass" in capsys.readouterr().out
        losses.append([row["loss"] for row in metrics(tmp_path / name).train.values()])
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


def test_nanochat_is_timed_in_processes_that_use_it(tmp_path, clone, monkeypatch):
    import nanochat_fp8

    seen = []

    def measure(command, folder, own):
        script, *arguments = command
        first = arguments[: arguments.index(tmp_path / "out/base_config.py")]
        seen.append((arguments, folder.name, script.name, first))
        return {"ms_per_step": 1.0, "tokens_per_s": len(seen)}, {"hardware": "a GPU"}

    monkeypatch.setattr(nanochat_fp8.bench, "on_cpu", lambda config: False)
    monkeypatch.setattr(nanochat_fp8.bench, "measure", measure)
    status, out, _ = main_here(nanochat_fp8.main, REPO / "config/llama_100m.py", f"--nanochat={clone}",
                               f"--out_dir={tmp_path / 'out'}", "--variants=tensorwise,tensorwise:fp8.filter_fqns=[]")
    theirs = [f"--clone={clone}"]
    assert status == 0 and [rest for _, *rest in seen] == [
        ["torchao_tensorwise", "train.py", []], ["nanochat_tensorwise", "nanochat_fp8.py", theirs],
        ["torchao_tensorwise_fp8.filter_fqns=_", "train.py", []],
        ["nanochat_tensorwise_fp8.filter_fqns=_", "nanochat_fp8.py", theirs]]
    assert all("--fp8.enable_fsdp_float8_all_gather=False" in arguments for arguments, *_ in seen)
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["torchao, tensorwise", "nanochat, tensorwise",
                                                "torchao, tensorwise:fp8.filter_fqns=[]",
                                                "nanochat, tensorwise:fp8.filter_fqns=[]"]
    assert [row["speedup"] for row in rows] == [1, 2, 3, 4]


def test_a_process_with_a_clone_trains_by_its_matmuls(clone, monkeypatch):
    import nanochat_fp8

    called = []
    monkeypatch.setattr(nanochat_fp8, "use_nanochat", called.append)
    monkeypatch.setattr(nanochat_fp8.train, "main", lambda: called.append(sys.argv[1:]))
    main_here(nanochat_fp8.main, f"--clone={clone}", "base.py", "--max_steps=1")
    assert called == [str(clone), ["base.py", "--max_steps=1"]]


@pytest.mark.parametrize("wrong, told", [("--nanochat=nowhere", "git clone"), ("--steps=10", "needs a GPU"),
                                         ("--variants=rowwise", "nanochat has tensorwise FP8 only")])
def test_what_nanochat_cannot_do_is_told(tmp_path, clone, wrong, told):
    import nanochat_fp8

    status, _, err = main_here(nanochat_fp8.main, REPO / "config/llama_100m.py", f"--nanochat={clone}",
                               f"--out_dir={tmp_path / 'out'}", wrong)
    assert status == 2 and told in err, err


@pytest.mark.gpu
def test_peers_run_and_report_like_bench(tmp_path):
    pytest.importorskip("transformers")
    sizes = ["--layers=1", "--width=512", "--vocab=512", "--tokens=512", "--steps=10", "--warmup=5"]
    run("bench/peers/transformers_llama.py", *sizes, f"--out={tmp_path}", f"--cache_dir={tmp_path}",
        "--variants=bf16,tensorwise:best,tensorwise:gather")
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["bf16", "tensorwise:best", "tensorwise:gather"]
    assert all(row["tokens_per_s"] > 0 and row["peak_gib"] > 0 and row["loss"] < 7 for row in rows)
