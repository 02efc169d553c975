"""parity.py: the verdict on planted gaps and curves, and real runs: worse, interrupted, put together, on two ranks."""

import contextlib
import json
import shutil
import statistics
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPO, main_here, metrics, run, train_in_process
from matplotlib.figure import Figure

import bench
import configurator
from parity import ParityConfig, interval, judge, main, plot, sentence, student_t, time_to, train_all
from plumbing.errors import RunStopped


def curves(shift=0.0, steps=100, speed=1.0):
    """A made-up run: loss 5 exp(-t) + 2 + shift, evaluated every 10 steps, `speed` steps a second."""
    step = np.arange(10, steps + 1, 10)
    return {"step": step.tolist(), "val_loss": (5 * np.exp(-step / 20) + 2 + shift).tolist(),
            "time_s": (step / speed).tolist()}


def test_the_quantiles_are_those_of_students_t():
    # two-sided 95%, from any table
    table = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 30: 2.042, 99: 1.984}
    assert {degrees: student_t(degrees) for degrees in table} == pytest.approx(table, abs=6e-4, rel=1e-4)


@pytest.mark.parametrize("gaps, verdict", [
    ([0.0, 0.02, 0.01, 0.01], "equal within"), ([-0.1, -0.12, -0.11], "equal within"), ([0.5, 0.52, 0.49], "worse"),
    ([-0.5, -0.52, -0.49], "better"), ([0.2, 0.3, 0.28], "cannot tell"), ([0.1, -0.1], "cannot tell"),
    ([0.0], "cannot tell"), ([9.0], "cannot tell")])
def test_the_verdict_is_where_the_whole_interval_lies(gaps, verdict):
    found = interval(gaps, 0.25)
    assert found["verdict"] == verdict and found["gap_percent"] == pytest.approx(statistics.fmean(gaps))
    if len(gaps) > 1:
        assert found["low"] < found["gap_percent"] < found["high"]
    else:
        assert found["low"] is found["high"] is None


def test_an_interval_holds_the_true_gap_in_19_of_20_experiments():
    gaps = np.random.default_rng(0).normal(0.1, 0.05, (4000, 4)).tolist()
    held = [found["low"] < 0.1 < found["high"] for found in (interval(g, 10.0) for g in gaps)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.014)  # four standard deviations of that share


def test_a_noisier_experiment_never_passes_or_fails_more_easily():
    rng, passed = np.random.default_rng(1), set()
    for n in (2, 3, 4, 6):
        for _ in range(200):
            gaps = rng.normal(rng.uniform(-0.4, 0.4), 0.1, n)
            noisier = gaps.mean() + rng.uniform(1, 5) * (gaps - gaps.mean())
            quiet, noisy = (interval(g.tolist(), 0.25)["verdict"] for g in (gaps, noisier))
            assert noisy in (quiet, "cannot tell")
            passed.add((quiet, noisy))
    assert {("equal within", "equal within"), ("equal within", "cannot tell"), ("worse", "cannot tell")} <= passed


def test_where_nothing_can_be_told_it_says_how_many_seeds_would():
    # a standard deviation of 0.1: half an interval is 3.182 x 0.1 / 2 = 0.159 with 4 seeds, 0.124 with 5; 0.15 is room
    found = interval([0.0, 0.1, 0.2], 0.25)
    assert (found["verdict"], found["seeds_needed"]) == ("cannot tell", 5)
    text = sentence({"variant": "rowwise", "seeds": 3, **found}, 0.25)
    assert "rowwise: +0.100% of bf16's loss" in text and "cannot tell at 0.25%; it would take about 5 seeds" in text
    assert interval([0.24, 0.25, 0.2499], 0.25)["seeds_needed"] is not None
    near = interval([0.2, 0.3, 0.25001], 0.25)  # at the tolerance itself
    text = sentence({"variant": "rowwise", "seeds": 3, **near}, 0.25)
    assert near["seeds_needed"] is None and "more than 100 seeds" in text
    one = sentence({"variant": "r", "seeds": 1, **interval([0.1], 0.25)}, 0.25)
    assert "one seed: cannot tell, an interval needs --seeds=2" in one


OWN = ParityConfig(last_evals=3)
BF16 = [("bf16", 1, curves()), ("bf16", 2, curves(0.3)), ("bf16", 3, curves(-0.3))]


def judged(runs):
    """judge() of [(variant, seed, curves or the reason of a failure)]."""
    return judge([{"variant": variant, "seed": seed, "error" if isinstance(result, str) else "curves": result}
                  for variant, seed, result in runs], OWN)


FINAL = statistics.fmean(curves()["val_loss"][-3:])


def test_gaps_are_between_means_of_the_last_evaluations_of_runs_with_the_same_seed():
    fp8 = [("tensorwise", 1, curves(0.001)), ("tensorwise", 2, curves(0.302)), ("tensorwise", 3, curves(-0.299))]
    fp8[0][2]["val_loss"][-1] += 0.003  # a third of it counts
    report = judged([*BF16, *fp8])
    assert [row["final_val_loss"] for row in report["rows"][:3]] == pytest.approx([FINAL, FINAL + 0.3, FINAL - 0.3])
    assert [row["gap"] for row in report["rows"]] == pytest.approx([0, 0, 0, 0.002, 0.002, 0.001], abs=1e-9)
    assert report["rows"][3]["gap_percent"] == pytest.approx(0.2 / FINAL)
    # seeds differ by 15% of the loss, which pairs do not see
    assert report["noise"] == pytest.approx(0.3) and report["intervals"][0]["high"] < 0.25
    assert (report["verdict"], report["intervals"][0]["seeds"], report["tolerance"]) == ("equal within", 3, 0.25)


@pytest.mark.parametrize("shifts, verdict", [((0.2, 0.2), "worse"), ((0.001, 0.001), "equal within"),
                                             ((0.0, 0.02), "cannot tell"), ((-0.2, -0.2), "better")])
def test_the_whole_has_the_verdict_of_its_worst_variant(shifts, verdict):
    good = [("rowwise", seed, bf16) for _, seed, bf16 in BF16[:2]]
    bad = [("tensorwise", seed, {**bf16, "val_loss": [loss + shift for loss in bf16["val_loss"]]})
           for shift, (_, seed, bf16) in zip(shifts, BF16, strict=False)]
    report = judged([*BF16[:2], *bad])
    assert report["verdict"] == report["intervals"][0]["verdict"] == verdict
    expected = "equal within" if verdict == "better" else verdict
    assert judged([*BF16[:2], *good, *bad])["verdict"] == expected


def test_time_is_seconds_until_the_final_loss_of_bf16():
    fast = [("tensorwise", 1, curves(0.0, speed=2.0)), ("rowwise", 1, curves(0.2))]
    bf16, tensorwise, rowwise = judged([BF16[0], *fast])["rows"]
    assert 80 < bf16["time_to_bf16_loss_s"] < 100  # the mean over the evaluations at 80, 90 and 100
    assert tensorwise["time_to_bf16_loss_s"] == bf16["time_to_bf16_loss_s"] / 2 and tensorwise["time_s"] == 50
    assert rowwise["time_to_bf16_loss_s"] is None
    assert time_to(10.0, curves()) == 10.0  # there before the first evaluation
    assert time_to(curves()["val_loss"][-1], curves()) == 100.0  # at the last one


def test_a_variant_with_a_failed_run_is_worse():
    good = [("tensorwise", seed, bf16) for _, seed, bf16 in BF16[:2]]
    report = judged([*BF16[:2], *good, ("tensorwise", 3, "RuntimeError: no")])
    assert report["verdict"] == "worse" and report["rows"][-1]["error"] == "RuntimeError: no"
    assert sentence(report["intervals"][0], 0.25) == "tensorwise: worse, a run failed"


def test_a_picture_of_failed_variants_alone_is_drawn_without_a_warning(tmp_path):
    report = {"hardware": "a", "max_steps": 1, "tokens_per_step": 1, **judged([BF16[0], ("tensorwise", 1, "no")])}
    with warnings.catch_warnings(action="error"):  # of an empty axis
        plot(report, tmp_path / "parity.png")
    assert (tmp_path / "parity.png").stat().st_size


@pytest.mark.parametrize("keys, told", [
    ({"variants": "tensorwise,bf16"}, "bf16, then"), ({"variants": "bf16"}, "bf16, then"),
    ({"variants": "bf16,rowwise,rowwise"}, "each once"), ({"variants": "bf16,rowwise,bf16"}, "each once"),
    ({"variants": "bf16,fp4"}, "'fp4'")])
def test_mistakes_are_told(keys, told):
    assert told in "".join(ParityConfig(**keys).problems())


@pytest.mark.parametrize("key, told", [
    ("--seeds=0", "int >= 1"), ("--last_evals=0", "int >= 1"), ("--branch_at=-1", "int >= 0"),
    ("--tolerance=0", "float > 0")])
def test_numbers_out_of_range_are_told(key, told):
    with pytest.raises(ValueError, match=f"^{key}: expected {told}$"):
        configurator.load([key], ParityConfig())


def test_the_plot_is_drawn_for_any_number_of_variants_and_seeds(tmp_path):
    many = [(f"rowwise:loss_chunks={i}", seed, curves(i / 1000 + seed / 100)) for i in range(9) for seed in (1, 2)]
    for results in ([*BF16, *many, ("rowwise", 1, "failed")], [BF16[0], many[0]]):
        run = {"max_steps": 9, "tokens_per_step": 9, "hardware": "1 x this"}
        plot({**judged(results), **run}, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_the_curves_intervals_and_gaps_of_the_report(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    report = judged([*BF16, *[("tensorwise", seed, curves(seed / 10 - 0.2)) for seed in (1, 2, 3)]])
    plot({**report, "max_steps": 100, "tokens_per_step": 2048, "hardware": "1 x this"}, tmp_path / "plot.png")
    loss, gap = drawn[0].axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [
        [*map(list, zip(row["curves"]["time_s"], row["curves"]["val_loss"], strict=True))] for row in report["rows"]]
    (interval,), gaps = report["intervals"], [row["gap_percent"] for row in report["rows"][3:]]
    zero, bar, dots = (line.get_xdata() for line in gap.lines)
    assert (list(zero), list(bar), list(dots)) == ([0, 0], [interval["low"], interval["high"]], gaps)
    assert loss.get_title() == "100 steps of 2,048 tokens; bf16 in black" and "±0.25%" in gap.get_xlabel()
    assert [tick.get_text() for tick in gap.get_yticklabels()] == [f"tensorwise\n{interval['verdict']}"]


def compare(*args):
    """parity.py in this process, with its runs in it too: (exit status, folder, parity.json)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "train", train_in_process)
        patch.setattr(sys, "argv", ["parity.py", *args])
        status = main()
    out = Path(next(arg for arg in args if arg.startswith("--out_dir=")).removeprefix("--out_dir="))
    return status, out, json.loads((out / "parity.json").read_text())


@pytest.mark.parametrize("verdict, status", [("worse", 1), ("better", 0), ("equal within", 0), ("cannot tell", 0)])
def test_only_a_worse_variant_fails_the_command(tiny_run, tmp_path, monkeypatch, verdict, status):
    interval = {"variant": "r", "seeds": 2, "gap_percent": 0.0, "low": -1.0, "high": 1.0, "seeds_needed": 9}
    monkeypatch.setattr("parity.plan", lambda *_: [])
    monkeypatch.setattr("parity.train_all", lambda *_: [{"out_dir": str(tmp_path)}])
    monkeypatch.setattr("parity.judge", lambda *_: {"rows": [], "intervals": [{**interval, "verdict": verdict}],
                                                    "verdict": verdict})
    monkeypatch.setattr("parity.plot", lambda *_: None)
    (tmp_path / "run.json").write_text("{}")
    assert main_here(main, *tiny_run, f"--out_dir={tmp_path}", "--last_evals=1")[0] == status


@pytest.mark.parametrize("losses, failed", [([2.0, None, 1.0, 1.0], False), ([2.0, 2.0, 1.0, None], True),
                                            ([2.0, 2.0, None, 1.0], True)])
def test_a_run_whose_last_losses_are_not_finite_has_failed(tmp_path, capsys, losses, failed):
    rows = [{"step": step, "loss": 1.0, "time_s": 1.0 * step} for step in (1, 2, 3, 4)]
    rows += [{"step": step, "val_loss": loss} for step, loss in enumerate(losses, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ("rowwise", 1, tmp_path, SimpleNamespace(max_steps=4))
    (row,) = train_all([run], ParityConfig(last_evals=2))
    assert ("error" in row, "curves" in row) == (failed, not failed)
    assert ("validation loss 1.0000\n" in capsys.readouterr().out) == (not failed)
    with pytest.raises(RunStopped, match="a bf16 run failed.*: its validation loss ends as inf or nan") if failed else (
            contextlib.nullcontext()):
        train_all([("bf16", *run[1:])], ParityConfig(last_evals=2))


@pytest.fixture(scope="module")
def compared(tiny_run, tmp_path_factory):
    """Two seeds of bf16, a recipe, and a variant that cannot learn: (arguments, exit status, folder, parity.json)."""
    args = [*tiny_run, f"--out_dir={tmp_path_factory.mktemp('parity')}", "--seeds=2", "--keep=2", "--last_evals=2",
            "--tolerance=5"]
    return args, *compare(*args, "--variants=bf16,tensorwise,tensorwise:optim.lr=1e-9")


def test_the_report_has_what_is_promised_and_the_status_tells_the_verdict(compared):
    _, status, out, report = compared
    assert status == 1 and report["verdict"] == "worse"
    assert (report["max_steps"], report["tokens_per_step"]) == (6, 8 * 64)
    assert {"hardware", "versions", "git_commit", "date", "command", "noise", "rows", "intervals"} <= set(report)
    tensorwise, stuck = report["intervals"]
    assert (tensorwise["verdict"], stuck["verdict"]) == ("equal within", "worse") and stuck["low"] > 5
    assert [(r["variant"], r["seed"]) for r in report["rows"]] == [
        (variant, seed) for seed in (1337, 1338) for variant in ("bf16", "tensorwise", "tensorwise:optim.lr=1e-9")]
    for row in report["rows"]:
        assert {"variant", "seed", "final_val_loss", "gap", "time_to_bf16_loss_s"} <= set(row)
        val = metrics(out / f"{bench.slug(row['variant'])}_seed{row['seed']}").val
        assert row["final_val_loss"] == pytest.approx((val[3] + val[6]) / 2)
    bf16, other_seed, fp8 = (metrics(out / name).train[1]["loss"]
                             for name in ("bf16_seed1337", "bf16_seed1338", "tensorwise_seed1337"))
    # the first step has the same weights and the same batch; FP8 shows in the third digit, another seed in the first
    assert 0 < abs(bf16 - fp8) < 5e-3 < abs(bf16 - other_seed)
    assert (out / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_goes_on_and_finished_ones_are_kept(compared):
    args, _, out, report = compared
    folder = out / "tensorwise_seed1337"
    whole, kept = metrics(folder), (out / "bf16_seed1337" / "metrics.jsonl").stat().st_mtime_ns
    shutil.rmtree(folder / "checkpoints" / "step_00000006")  # as if it had been killed after step 5
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(r for r in rows if json.loads(r)["step"] <= 5))
    two = "--variants=bf16,tensorwise"
    status, _, again = compare(*args, two)
    assert (status, again["verdict"]) == (0, "equal within") and again["rows"][1]["gap"] == report["rows"][1]["gap"]
    assert "3 steps done" in (folder / "log.txt").read_text()
    assert metrics(folder).val == whole.val
    assert (out / "bf16_seed1337" / "metrics.jsonl").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="another config, now with optim.warmup_steps=1 instead of 2"):
        compare(*args, "--variants=bf16,tensorwise", "--optim.warmup_steps=1")


def test_a_branch_shares_the_first_steps_of_its_bf16_run(compared, tiny_run, tmp_path):
    _, _, whole, _ = compared
    args = [*tiny_run, f"--out_dir={tmp_path}", "--seeds=1", "--last_evals=1", "--checkpoint_interval=0"]
    two = "--variants=bf16,tensorwise"
    _, out, report = compare(*args, two, "--branch_at=3")
    bf16, fp8 = metrics(out / "bf16_seed1337"), metrics(out / "tensorwise_seed1337")
    assert bf16.val == metrics(whole / "bf16_seed1337").val and list(fp8.train) == [4, 5, 6] and list(fp8.val) == [6]
    assert "3 steps done" in (out / "tensorwise_seed1337" / "log.txt").read_text()
    assert 0 < abs(fp8.train[4]["loss"] - bf16.train[4]["loss"]) < 5e-3
    assert report["rows"][1]["gap"] == pytest.approx(fp8.val[6] - bf16.val[6])


def test_without_bf16_there_is_nothing_to_compare_with(tiny_run, tmp_path):
    args = [*tiny_run, f"--out_dir={tmp_path}", "--seeds=2", "--variants=bf16,tensorwise", "--last_evals=2"]
    status, out, err = main_here(main, *args, "--data.tokenizer=nope")
    assert status == 1 and out.count("6 steps") == 1  # the other runs would find the same
    assert err.startswith("parity.py: a bf16 run failed, so there is nothing to compare with: train.py: data.tokenizer")
    status, out, err = main_here(main, *args, "--data.val=['/nope']")
    assert (status, out) == (2, "") and err.startswith("parity.py: data: '/nope' matches no file")
    for wrong in ("--last_evals=3", "--eval_interval=0", "--branch_at=3"):
        status, _, err = main_here(main, *args, wrong)
        assert status == 2 and "eval_interval to about max_steps / 20, or --last_evals" in err


def test_under_torchrun_a_variant_runs_on_all_ranks(compared):
    args, _, out, _ = compared
    gather = "tensorwise:fp8.enable_fsdp_float8_all_gather=True:fp8.precompute_float8_dynamic_scale_for_fsdp=True"
    done = run("parity.py", *args, "--seeds=1", f"--variants=bf16,{gather}", ranks=2)  # the bf16 run is there
    assert f"{gather}: " in done.stdout and "one seed: cannot tell" in done.stdout
    assert "all-gather: fp8, scales precomputed" in next(out.glob("tensorwise_fp8.enable*/log.txt")).read_text()


def test_the_corpus_holds_each_text_once_in_training_or_validation(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.syspath_prepend(REPO / "bench")
    import parity_corpus

    texts = [f"def f{i}(x):\n    return x * {i}  # größer\n" for i in range(64)]
    (tmp_path / "a" / "b").mkdir(parents=True)
    for i, text in enumerate(texts):
        (tmp_path / "a" / f"{i}.{('py', 'md', 'rst')[i % 3]}").write_text(text)
    (tmp_path / "a" / "b" / "copy.py").write_bytes(texts[0].replace("\n", "\r\n").encode())
    (tmp_path / "a" / "b" / "latin1.py").write_bytes(b"# gr\xf6\xdfer")
    (tmp_path / "a" / "b" / "no.txt").write_text("not a kind of it")
    _, said, _ = main_here(parity_corpus.main, tmp_path / "a", f"--out={tmp_path / 'out'}", "--vocab_size=300")
    assert "66 files, 64 different texts" in said
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    parts = []
    for name in ("train.bin", "val.bin"):
        ids = np.fromfile(tmp_path / "out" / name, "<u2")
        assert ids[-1] == 0 and ids.max() < 300
        parts.append([tokenizer.decode(text.tolist()) for text in np.split(ids, np.flatnonzero(ids == 0) + 1)[:-1]])
    assert len(parts[1]) == 3 and sorted([*parts[0], *parts[1]]) == sorted(texts)
    status, _, err = main_here(parity_corpus.main, tmp_path / "a", "--vocab_size=70000")
    assert status == 2 and "must be from 300 to 65536" in err
