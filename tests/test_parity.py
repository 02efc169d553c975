"""parity.py: the verdict on planted curves, and real runs: outside of the band, interrupted, on two ranks."""

import contextlib
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import main_here, metrics, run, train_here

import bench
from parity import ParityConfig, judge, main, paired_gap, plot, time_to


def curves(shift=0.0, steps=100, speed=1.0, wave=0.0):
    """A made-up run: loss 5 exp(-t) + 2 + shift, evaluated every 10 steps, `speed` steps a second."""
    step = np.arange(1, steps + 1)
    loss = 5 * np.exp(-step / 20) + 2 + shift + wave * (-1.0) ** step
    val = step[9::10]
    return {"step": step.tolist(), "loss": loss.tolist(), "time_s": (step / speed).tolist(), "val_step": val.tolist(),
            "val_loss": (5 * np.exp(-val / 20) + 2 + shift).tolist(), "val_time_s": (val / speed).tolist()}


SEEDS = [("bf16", 1, curves()), ("bf16", 2, curves(0.003)), ("bf16", 3, curves(-0.003))]  # noise 0.003, band 0.0085


@pytest.mark.parametrize("gap, inside", [(0.0, True), (0.0084, True), (0.0086, False), (-0.1, True), (math.nan, False)])
def test_a_variant_is_outside_where_it_ends_above_its_twin_by_more_than_the_band(gap, inside):
    report = judge([*SEEDS, ("tensorwise", 1, curves(gap)), ("rowwise", 1, curves())])
    assert report["noise"] == pytest.approx(0.003) and report["band"] == pytest.approx(0.003 * math.sqrt(8))
    assert [row["inside"] for row in report["rows"]] == [True, True, True, inside, True]
    assert report["verdict"] == ("pass" if inside else "fail")
    assert report["rows"][3]["gap"] == pytest.approx(gap, nan_ok=True)
    assert report["rows"][3]["gap_percent"] == pytest.approx(100 * gap / curves()["val_loss"][-1], nan_ok=True)


def test_time_counts_to_the_edge_of_the_band_and_not_in_steps():
    rows = judge([*SEEDS, ("tensorwise", 1, curves(0.001, speed=2.0)), ("rowwise", 1, curves(0.02))])["rows"]
    bf16, tensorwise, rowwise = rows[0], rows[3], rows[4]
    # bf16 meets its final loss + 0.0085 where 5 exp(-t/20) = 5 exp(-5) + 0.0085, at 96; the curve is cut to chords
    assert bf16["time_to_bf16_loss_s"] == pytest.approx(-20 * math.log(math.exp(-5) + 0.0085 / 5), abs=1.5)
    assert tensorwise["time_to_bf16_loss_s"] < 0.55 * bf16["time_to_bf16_loss_s"]
    assert rowwise["time_to_bf16_loss_s"] is None
    assert time_to(10.0, curves()) == 10.0  # there before the first evaluation


def test_the_gap_between_training_losses_is_paired_by_step_and_smoothed():
    noisy, twin = curves(0.01, wave=0.5), curves()
    steps, gap = paired_gap(noisy, twin)
    assert len(gap) == 91 and gap == pytest.approx(0.01, abs=1e-9)  # a mean of 10 steps
    noisy["step"].insert(3, 3.5), noisy["loss"].insert(3, 99.0)  # a row that only one of them has
    noisy["loss"][50] = None  # a skipped step
    assert len(paired_gap(noisy, twin)[1]) == 90 and max(paired_gap(noisy, twin)[1]) < 0.1


def test_a_failed_run_is_a_fail():
    report = judge([*SEEDS, ("tensorwise", 1, "RuntimeError: no")])
    assert report["verdict"] == "fail" and report["rows"][3]["error"] == "RuntimeError: no"


def test_one_bf16_run_gives_gaps_and_no_verdict(tmp_path):
    results = [SEEDS[0], ("tensorwise", 1, curves(0.5))]
    report = judge(results)
    assert report["noise"] is report["band"] is report["verdict"] is None and report["target_loss"] == SEEDS[0][2][
        "val_loss"][-1]
    assert [row["inside"] for row in report["rows"]] == [None, None] and report["rows"][1]["gap"] == pytest.approx(0.5)
    assert judge([*results, ("rowwise", 1, "failed")])["verdict"] == "fail"
    plot(results, {**report, "tokens_per_step": 1000, "hardware": "1 x this"}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("keys, told", [
    ({"variants": "tensorwise,bf16"}, "bf16, then"), ({"variants": "bf16"}, "bf16, then"),
    ({"variants": "bf16,fp4"}, "'fp4'"), ({"seeds": 0}, "--seeds=0 must")])
def test_mistakes_are_told(keys, told):
    assert told in "".join(message for _, message in ParityConfig(**keys).problems())


def test_the_plot_is_drawn_for_any_number_of_variants(tmp_path):
    results = [*SEEDS, *((f"rowwise:loss_chunks={i}", 1, curves(i / 1000)) for i in range(9)), ("rowwise", 1, "failed")]
    plot(results, {**judge(results), "tokens_per_step": 1000, "hardware": "1 x this"}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def compare(*args):
    """parity.py in this process, with its runs in it too: (exit status, folder, parity.json)."""
    def train(args, log):
        with log.open("w") as file, contextlib.redirect_stdout(file):
            train_here(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "train", train)
        patch.setattr(sys, "argv", ["parity.py", *args])
        with pytest.raises(SystemExit) as ended:
            main()
    out = Path(next(arg for arg in args if arg.startswith("--out_dir=")).removeprefix("--out_dir="))
    return int(ended.value.code), out, json.loads((out / "parity.json").read_text())


@pytest.fixture(scope="module")
def compared(tiny_run, tmp_path_factory):
    """Two bf16 seeds, a recipe, and one that cannot learn: (arguments, exit status, folder, parity.json)."""
    args = [*tiny_run, f"--out_dir={tmp_path_factory.mktemp('parity')}", "--seeds=2", "--keep=2"]
    return args, *compare(*args, "--variants=bf16,tensorwise,tensorwise:optim.lr=1e-9")


def test_the_report_has_what_is_promised_and_the_status_tells_the_verdict(compared):
    _, status, out, report = compared
    assert status == 1 and [row["inside"] for row in report["rows"]] == [True, True, True, False]
    assert {"hardware", "versions", "git_commit", "date", "command", "noise", "rows", "verdict"} <= set(report)
    assert [(r["variant"], r["seed"]) for r in report["rows"]] == [
        ("bf16", 1337), ("bf16", 1338), ("tensorwise", 1337), ("tensorwise:optim.lr=1e-9", 1337)]
    for row in report["rows"]:
        assert {"variant", "seed", "final_val_loss", "gap", "time_to_bf16_loss_s"} <= set(row)
        assert row["gap"] == pytest.approx(row["final_val_loss"] - report["rows"][0]["final_val_loss"])
    bf16, other_seed, tensorwise, _ = (report["curves"][f"{r['variant']} seed {r['seed']}"] for r in report["rows"])
    # the first step has the same weights and the same batch; FP8 shows in the third digit, another seed in the first
    assert 0 < abs(bf16["loss"][0] - tensorwise["loss"][0]) < 5e-3 < abs(bf16["loss"][0] - other_seed["loss"][0])
    assert report["verdict"] == "fail" and (out / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_goes_on_and_finished_ones_are_kept(compared):
    args, _, out, report = compared
    folder = out / "tensorwise_seed1337"
    whole, kept = metrics(folder), (out / "bf16_seed1337" / "metrics.jsonl").stat().st_mtime_ns
    shutil.rmtree(folder / "checkpoints" / "step_00000006")  # as if it had been killed after step 5
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(r for r in rows if json.loads(r)["step"] <= 5))
    status, _, again = compare(*args, "--variants=bf16,tensorwise")
    assert (status, again["verdict"]) == (0, "pass") and again["rows"][2]["gap"] == report["rows"][2]["gap"]
    assert "3 steps done" in (folder / "log.txt").read_text()
    assert metrics(folder).val == whole.val
    assert (out / "bf16_seed1337" / "metrics.jsonl").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="wanted.py is another config"):
        compare(*args, "--variants=bf16,tensorwise", "--optim.warmup_steps=1")


def test_without_bf16_there_is_nothing_to_compare_with(tiny_run, tmp_path):
    args = [*tiny_run, f"--out_dir={tmp_path}", "--seeds=2", "--variants=bf16,tensorwise"]
    status, out, err = main_here(main, *args, "--data.tokenizer=nope")
    assert status == 1 and out.count("6 steps") == 1  # the other runs would find the same
    assert err.startswith("parity.py: a bf16 run failed, so there is nothing to compare with: train.py: data.tokenizer")
    status, out, err = main_here(main, *args, "--data.val=['/nope']")
    assert (status, out) == (2, "") and err.startswith("parity.py: data: '/nope' matches no file")


def test_under_torchrun_a_variant_runs_on_all_ranks(compared):
    args, _, out, _ = compared
    gather = "tensorwise:fp8.enable_fsdp_float8_all_gather=True:fp8.precompute_float8_dynamic_scale_for_fsdp=True"
    done = run("parity.py", *args, f"--variants=bf16,{gather}", ranks=2)  # the bf16 runs are there, of one rank
    assert "every variant ends inside the band" in done.stdout
    assert "all-gather: fp8, scales precomputed" in next(out.glob("tensorwise_fp8.enable*/log.txt")).read_text()
