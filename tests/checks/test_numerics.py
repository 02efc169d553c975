"""What FP8 loses, and what keeps a run safe from it: telemetry, guards, self-check, properties of the recipes."""

import contextlib
import json
import math
import os
import re
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import REPO, build, metrics, run, run_many, sqnr, train_here
from matplotlib.figure import Figure

import checkpoint
import data
import fp8
import model as models
from checks import proof, telemetry
from configurator import Config
from fp8 import FP8Config
from optim import AdamW, OptimConfig
from plumbing import fp8_weights, logs
from plumbing.compiling import CompileConfig, compile_and_checkpoint
from plumbing.errors import RunStopped
from plumbing.sharding import plain_local

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
OURS = (*RECIPES, "tensorwise_with_gw_hp", "tensorwise_forward")
FP8 = ["--fp8.enabled=True", "--fp8.emulate=True"]
GATHER = ["--fp8.enable_fsdp_float8_all_gather=True", "--fp8.precompute_float8_dynamic_scale_for_fsdp=True"]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def emulated(**keys):
    return FP8Config(enabled=True, emulate=True, **keys)


def batch(rows=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, 64), generator=g), torch.randint(0, 256, (rows, 64), generator=g)


# ----------------------------------------------------------------------------------------------------------------
# telemetry: one cast against arithmetic in float64


def cast_in_float64(x, scale, dtype):
    """The FP8 values of x * scale by the definition of the formats, and without any of PyTorch's casts."""
    mantissa, smallest, largest = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}[dtype]
    scaled = x.double() * scale.double()
    exponent = torch.floor(torch.log2(scaled.abs().clamp(min=1e-300))).clamp(min=smallest)
    step = torch.exp2(exponent - mantissa)
    return (torch.round(scaled / step) * step).clamp(-largest, largest)  # round() goes to even, as FP8 does


@pytest.mark.parametrize("dim", [None, 0, 1], ids=["tensorwise", "columns", "rows"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_stats_of_a_cast_match_a_float64_reference_on_planted_values(dtype, dim):
    torch.manual_seed(0)
    x = torch.randn(64, 96).clamp(-4, 4)
    x[:, 0], x[0] = 4.0, 4.0  # the amax of every row and column, and of all
    x[5, 5] = 1000.0  # an outlier
    x[7, 7] = 0.0  # no underflow
    x[1:4, 1:4] = 1000 * 2.0**-36  # e5m2 reaches down to 2^-16 of 57344, 2^-32 of the amax; e4m3 to 2^-18
    amax = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = (torch.finfo(dtype).max / amax.double()).float()
    data = fp8_weights.cast_to_fp8(x, scale, dtype)
    found = dict(zip(telemetry.SUMS + telemetry.PEAKS, telemetry.cast_stats(x, data, scale).tolist(), strict=True))
    expected = cast_in_float64(x, scale, dtype)
    error = expected / scale.double() - x.double()
    assert found["signal"] == pytest.approx(x.double().square().sum().item(), rel=1e-5)  # summed in float32
    assert found["noise"] == pytest.approx(error.square().sum().item(), rel=1e-4)
    assert found["underflow"] == ((x != 0) & (expected == 0)).sum() >= (9 if dim is None else 0)
    assert (found["saturated"], found["values"]) == (0, 64 * 96)
    assert (found["amax"], found["minus_scale"]) == (1000.0, -scale.min().item())
    assert telemetry.decibels(found["signal"], found["noise"]) == pytest.approx(sqnr(x, x.double() + error), abs=1e-2)


def test_a_stale_scale_shows_as_saturation_and_a_huge_tensor_does_not_overflow():
    x = torch.full((16, 16), 1e30)  # its square is beyond float32
    x[:4] = 4e30
    data = fp8_weights.cast_to_fp8(x, torch.tensor(448 / 1e30), E4M3)  # a scale from when the largest value was 1e30
    found = dict(zip(telemetry.SUMS, telemetry.cast_stats(x, data, torch.tensor(448 / 1e30)).tolist(), strict=False))
    assert found["saturated"] == 4 * 16
    assert found["signal"] == pytest.approx(1e60 * (12 * 16 + 16 * 4 * 16), rel=1e-5)
    assert found["noise"] == pytest.approx(9e60 * 4 * 16, rel=1e-5)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_what_rounds_to_the_largest_value_is_not_saturated(dtype):
    top = torch.finfo(dtype).max
    step = 32 if dtype is E4M3 else 8192  # from 416 to 448, from 49152 to 57344
    x = torch.tensor([top, top + 0.49 * step, -top - 0.49 * step, top + 0.51 * step, -top - 2 * step])
    one = torch.tensor(1.0)
    stats = telemetry.cast_stats(x, fp8_weights.cast_to_fp8(x, one, dtype), one)
    assert stats[telemetry.SUMS.index("saturated")] == 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_health_reports_the_very_casts_that_torchao_makes(recipe, monkeypatch):
    """Every cast of a pass is recorded where torchao makes it; each reported operand has the numbers of one of them."""
    import torchao.float8.float8_linear as theirs

    made, original = [], theirs.hp_tensor_to_float8_dynamic

    def record(t, *args, **kwargs):
        q = original(t, *args, **kwargs)
        made.append((sqnr(t, q._data.double() / q._scale.double()), q._scale.min().item(), t.abs().max().item()))
        return q

    model = build(emulated(recipe_name=recipe), n_layer=1)
    monkeypatch.setattr(theirs, "hp_tensor_to_float8_dynamic", record)
    x, y = batch()
    rows = telemetry.health(model, lambda: model(x, y).backward(), 7)
    assert [r["fp8_layer"] for r in rows] == list(fp8.float8_linears(model)) and {r["step"] for r in rows} == {7}
    reported = [s for _, _, s in telemetry.operands(rows)]
    assert len(reported) == 5 * {"tensorwise": 3, "rowwise": 6, "rowwise_with_gw_hp": 4}[recipe]
    for stats in reported:
        assert any(abs(stats["sqnr_db"] - db) < 0.01 and stats["scale"] == pytest.approx(scale, rel=1e-5)
                   and stats["amax"] == pytest.approx(amax, rel=1e-5) for db, scale, amax in made), stats
    # and the other way round: none of torchao's casts is left out
    for _, scale, amax in made:
        assert any(s["scale"] == pytest.approx(scale, rel=1e-5) and s["amax"] == pytest.approx(amax, rel=1e-5)
                   for s in reported), (scale, amax)


def test_a_row_of_health_has_shares_of_the_values_and_none_for_what_is_not_finite():
    model = build(emulated(), n_layer=1)

    def run():
        for m in fp8.float8_linears(model).values():  # signal, noise, underflow, saturated, values, amax, -scale
            m.seen[0] = torch.tensor([100.0, 0.1, 3.0, 5.0, 200.0, 7.0, -64.0])
            m.seen[2] = torch.tensor([math.inf, 0.1, 0.0, 0.0, 200.0, math.inf, -0.0])

    for row in telemetry.health(model, run, 3):
        assert {key: value for key, value in row.items() if key != "fp8_layer"} == {
            "step": 3,
            "input": {"format": "e4m3", "sqnr_db": 30.0, "underflow": 0.015, "saturated": 0.025, "amax": 7.0,
                      "scale": 64.0},
            "grad_output": {"format": "e5m2", "sqnr_db": None, "underflow": 0.0, "saturated": 0.0, "amax": None,
                            "scale": 0.0}}


def gradients(model, x, y, **keys):
    model(x, y, **keys).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return grads


def test_health_of_a_model_with_biases_leaves_them_in():
    cfg, (x, y) = emulated(), batch()
    model = build(cfg, qkv_bias=True)
    with torch.no_grad():
        model.layers[0].attn.qkv.bias.normal_(generator=torch.Generator().manual_seed(1))
    expected = model(x, y)
    losses = []

    def run():
        losses.append(model(x, y))
        losses[0].backward()

    telemetry.health(model, run, 1)
    assert torch.equal(losses[0], expected) and model.layers[0].attn.qkv.bias.grad.any()


@pytest.mark.parametrize("activation_checkpoint, chunks", [("none", 4), ("selective", 1), ("full", 4)])
def test_health_sees_the_same_under_recompute_and_leaves_the_model_as_it_was(activation_checkpoint, chunks):
    cfg, (x, y) = emulated(), batch()
    model, plain = build(cfg), build(cfg)
    compile_and_checkpoint(model, CompileConfig(), activation_checkpoint, cfg.copies)
    before = gradients(model, x, y, loss_chunks=chunks)
    rows = telemetry.health(model, lambda: model(x, y, loss_chunks=chunks).backward(), 1)
    watched = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    after = gradients(model, x, y, loss_chunks=chunks)
    assert all(torch.equal(before[n], watched[n]) and torch.equal(before[n], after[n]) for n in before)
    reference = telemetry.health(plain, lambda: plain(x, y, loss_chunks=chunks).backward(), 1)
    assert rows == reference
    assert {type(m).__name__ for m in fp8.float8_linears(model).values()} == {"Float8Linear"}
    assert not any(hasattr(m, "seen") for m in model.modules())


def test_operands_with_inf_are_named_in_the_order_of_the_pass():
    model, (x, y) = build(emulated()), batch()
    with torch.no_grad():
        model.layers[1].mlp.gate_up.weight[3, 3] = math.inf
    rows = telemetry.health(model, lambda: model(x, y).backward(), 1)
    assert telemetry.broken(rows)[0] == "layers.1.mlp.gate_up weight"
    assert "layers.0.mlp.gate_up weight" not in telemetry.broken(rows)
    assert all(s["amax"] is None for layer, operand, s in telemetry.operands(rows)
               if f"{layer} {operand}" in telemetry.broken(rows))
    json.dumps(rows, allow_nan=False)


def test_worst_layers_are_named_and_trackers_get_flat_numbers():
    stats = {"format": "e5m2", "sqnr_db": 26.0, "underflow": 0.0, "saturated": 0.0, "amax": 1.0, "scale": 57344.0}
    rows = [{"step": 3, "fp8_layer": "a", "input": {**stats, "format": "e4m3", "sqnr_db": 31.0}, "grad_output": stats},
            {"step": 3, "fp8_layer": "b", "input": {**stats, "format": "e4m3", "sqnr_db": 12.5, "underflow": 0.2},
             "grad_output": {**stats, "sqnr_db": None}}]
    assert "worst of 2 layers: b input 12.5 of 32.5 dB in e4m3, 20.0% underflow; a input 31.0" in telemetry.worst(rows)
    rows.append({"step": 3, "fp8_layer": "c", "input": {**stats, "format": "e4m3", "sqnr_db": 33.0, "underflow": 0.1}})
    # 20 dB and 20% count 40, 10% count 10 whatever the SQNR, 1.5 dB count 1.5
    assert re.findall(r"(\w) input", telemetry.worst(rows)) == ["b", "c", "a"]
    rows.pop()
    flat = logs.scalars(rows)
    assert flat["step"] == 3 and flat["fp8/b/input/underflow"] == 0.2 and flat["fp8/a/grad_output/sqnr_db"] == 26.0
    assert "fp8/b/grad_output/sqnr_db" not in flat and all(isinstance(v, int | float) for v in flat.values())
    assert logs.scalars([{"step": 1, "loss": None, "lr": 0.1}]) == {"step": 1, "lr": 0.1}


def test_the_picture_of_health_has_the_worse_cast_of_each_tensor(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    best = {"format": "e4m3", "sqnr_db": 32.5, "underflow": 0.0}
    rows = [{"step": 1, "fp8_layer": "a", "input": {**best, "sqnr_db": 30.0}, "weight": best,
             "input_for_grad_weight": {**best, "sqnr_db": 28.5, "underflow": 0.03}},
            {"step": 3, "fp8_layer": "a", "input": {**best, "sqnr_db": None}, "weight": best},
            {"step": 3, "fp8_layer": "b", "grad_output": {"format": "e5m2", "sqnr_db": 20.5, "underflow": 0.5}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert telemetry.plot_health(tmp_path) == tmp_path / "fp8_health.png"
    none = math.nan
    expected = [[[4, 0], [none, none]], [[0, 0], [none, none]], [[none, none], [none, 6]],  # dB below the best
                [[3, 0], [none, none]], [[0, 0], [none, none]], [[none, none], [none, 50]]]  # % that underflows
    for ax, values in zip(drawn[0].axes, expected, strict=False):  # colour bars follow
        assert ax.images[0].get_array().filled(none).tolist() == pytest.approx(np.array(values), nan_ok=True)
    assert [tick.get_text() for tick in drawn[0].axes[0].get_yticklabels()] == ["a", "b"]
    assert [tick.get_text() for tick in drawn[0].axes[3].get_xticklabels()] == ["1", "3"]


def by_layer(m, step):
    return {row["fp8_layer"]: row for row in m.rows if row.get("fp8_layer") and row["step"] == step}


def numbers(m):
    return [{k: v for k, v in row.items() if k in ("step", "loss", "grad_norm", "val_loss")} for row in m.rows
            if "fp8_layer" not in row]


@pytest.fixture(scope="module")
def sharded(tiny_run, tmp_path_factory):
    """Runs of 3 steps on two ranks, with telemetry or without: {name: metrics}, their folder, the arguments of "on"."""
    folder = tmp_path_factory.mktemp("sharded")
    # the learning rate depends on max_steps, which is a run's length here: hence it does not decay
    base = [*tiny_run, *FP8, "--max_steps=3", "--optim.min_lr=0.003", "--micro_batch_size=2", "--model.n_layer=1"]
    watch = [*GATHER, "--fp8.stats_interval=3"]
    compiled = [*base, *GATHER, "--compile.enabled=True", "--activation_checkpoint=selective", "--loss_chunks=2",
                "--eval_interval=0"]  # graphs of their own
    runs = {"off": [*base, *GATHER], "on": [*base, *watch], "bf16_gather": [*base, "--fp8.stats_interval=3"],
            "hsdp": [*base, *watch, "--replicas=2"], "compiled_off": compiled,
            "compiled_on": [*compiled, "--fp8.stats_interval=3"],
            "mixed": [*base, *watch, '--fp8.recipes={"attn": "rowwise", "lm_head": "tensorwise_forward"}'],
            "half": [*base, *watch, "--max_steps=2", "--checkpoint_interval=2"]}
    return run_many(folder, runs, ranks=2), folder, [*base, *watch]


@pytest.mark.parametrize("on, off", [("on", "off"), ("compiled_on", "compiled_off")])
def test_training_is_bit_for_bit_the_same_with_telemetry(sharded, on, off):
    runs, *_ = sharded
    assert numbers(runs[on]) == numbers(runs[off])
    assert len(by_layer(runs[on], 1)) == len(by_layer(runs[on], 3)) == 5 and not by_layer(runs[off], 3)
    assert "fp8_health.png" in [p.name for p in (sharded[1] / on).iterdir()]


@pytest.mark.parametrize("other", ["bf16_gather", "hsdp"])
def test_health_of_weights_gathered_in_fp8_is_that_of_weights_cast_after_the_gather(sharded, other):
    runs, *_ = sharded
    for step in (1, 3) if other == "bf16_gather" else (1,):  # hsdp sums its gradients in another order
        for fqn, row in by_layer(runs["on"], step).items():
            for operand in ("input", "weight", "grad_output"):  # each rank measured half of every weight
                expected = by_layer(runs[other], step)[fqn][operand]
                assert row[operand]["format"] == expected["format"]
                assert all(row[operand][key] == pytest.approx(expected[key], rel=1e-4) for key in expected
                           if key != "format")


def test_a_run_with_several_recipes_gathers_and_reports_each_layer_as_its_own_recipe_says(sharded):
    mixed = sharded[0]["mixed"]
    assert "layers.*.attn.qkv      (128, 64)        x1    fp8 rowwise (emulated), gathered in float32\n" in mixed.text
    assert "lm_head                (272, 64)        x1    fp8 tensorwise_forward (emulated), gathered in" in mixed.text
    assert "layers.*.mlp.down      (64, 128)        x1    fp8 tensorwise (emulated)\n" in mixed.text
    assert "all-gather: fp8, scales precomputed\n" in mixed.text and "fp8: verified, " in mixed.text
    operands = {fqn: set(row) - {"step", "fp8_layer"} for fqn, row in by_layer(mixed, 1).items()}
    assert operands["layers.0.mlp.down"] == {"input", "weight", "grad_output"}
    assert operands["layers.0.attn.qkv"] == {name for name, *_ in telemetry.CASTS}
    assert operands["lm_head"] == {"input", "weight"}
    reference = sharded[0]["on"]
    for step, row in mixed.train.items():
        assert row["loss"] == pytest.approx(reference.train[step]["loss"], rel=0.05)


def test_a_compiled_model_trains_as_the_eager_one_and_has_its_health(sharded):
    runs, *_ = sharded
    for step, row in runs["compiled_off"].train.items():  # the bound is that of test_train.py
        assert row["loss"] == pytest.approx(runs["off"].train[step]["loss"], rel=0.05)
        assert row["grad_norm"] == pytest.approx(runs["off"].train[step]["grad_norm"], rel=0.05)
    for fqn, row in by_layer(runs["on"], 1).items():
        for operand in ("input", "weight", "grad_output") if fqn != "lm_head" else ():  # whose chunks scale apart
            eager, compiled = row[operand], by_layer(runs["compiled_on"], 1)[fqn][operand]
            # in float32 only the order of sums differs: a few values in a thousand tip over to the next FP8 number
            assert abs(eager["sqnr_db"] - compiled["sqnr_db"]) < 0.1
            assert eager["amax"] == pytest.approx(compiled["amax"], rel=0.02)


def test_weight_scales_survive_a_resume_and_another_number_of_ranks(sharded):
    runs, folder, args = sharded
    train_here(*args, "--micro_batch_size=4", f"--out_dir={folder / 'one'}")
    train_here(*args, "--resume=must", f"--out_dir={folder / 'half'}")
    one = {name: metrics(folder / name) for name in ("one", "half")}
    initial, final = by_layer(runs["on"], 1), by_layer(runs["on"], 3)
    assert all(initial[fqn]["weight"] != row["weight"] for fqn, row in final.items())  # they did train
    assert all(initial[fqn]["weight"] == row["weight"] for fqn, row in by_layer(one["one"], 1).items())
    # two ranks saved after step 2, one rank went on: at step 3 the values, and so the scales, are those of two ranks
    assert len(by_layer(one["half"], 3)) == 5
    assert all(final[fqn]["weight"] == row["weight"] for fqn, row in by_layer(one["half"], 3).items())


@pytest.mark.gpu
def test_telemetry_every_100_steps_costs_less_than_2_percent():
    """A stats pass against a plain one at Llama-8B widths; the optimizer's share of a step comes on top."""
    cfg = FP8Config(enabled=True, filter_fqns=["lm_head"])
    sizes = dict(n_layer=2, n_head=32, n_kv_head=8, n_embd=4096, head_dim=128, ffn_dim=14336, block_size=4096)
    model = build(cfg, "cuda", torch.bfloat16, **sizes)
    torch._dynamo.config.recompile_limit = 64  # as AdamW sets it
    compile_and_checkpoint(model, CompileConfig(enabled=True), "none", cfg.copies)
    x = torch.randint(0, 256, (2, 4096), device="cuda")

    def one_pass():
        model(x, x).backward()
        model.zero_grad(set_to_none=True)

    def timed(f, n=10):
        for _ in range(3):
            f()
        torch.cuda.synchronize()
        clock = time.perf_counter()
        for _ in range(n):
            f()
        torch.cuda.synchronize()
        return (time.perf_counter() - clock) / n

    plain, watched = timed(one_pass), timed(lambda: telemetry.health(model, one_pass, 1))
    print(f"pass {1000 * plain:.1f} ms, with telemetry {1000 * watched:.1f} ms: {watched / plain:.2f}% of 100 steps")
    assert watched < 2 * plain


# ----------------------------------------------------------------------------------------------------------------
# guards


@pytest.mark.parametrize("weights", ["fp32_master", "stochastic_rounding", "plain"])
def test_a_masked_update_changes_nothing_bit_for_bit(weights):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48, bias=False), nn.RMSNorm(48)).to(torch.bfloat16)
    for compiled in (False, True):
        optimizer = AdamW(model, OptimConfig(weights=weights), seed=0, compiled=compiled)
        tensors = [*model.parameters(), *(t for kind in optimizer.state.values() for t in kind.values())]
        for poison in (1.0, math.nan, math.inf):
            before = [t.clone() for t in tensors]
            for p in model.parameters():
                p.grad = torch.randn_like(p)
                p.grad.view(-1)[3] *= poison
            norm = optimizer.grad_norm()
            optimizer.step(1e-2, norm, norm.isfinite())
            same = [torch.equal(a, b) for a, b in zip(before, tensors, strict=True)]
            assert all(same) if poison != 1.0 else not any(same)


def poison(steps=(), masked=0):
    """Patch train.py: the batches of `steps` hold a token whose embedding is inf, that of `masked` has no target."""
    init, load = models.init_weights, data.Loader.batch

    def init_weights(model, seed):
        init(model, seed)
        if int(os.environ.get("RANK", 0)) == 0:  # which has the first rows
            plain_local(model.embed.weight)[1].fill_(math.inf)

    def batch(self, step):
        x, y, *more = load(self, step)
        if step + 1 in steps and self.rank + 1 == self.world_size:
            x[-1, -1, 5] = 1
        if step + 1 == masked:
            y.fill_(data.IGNORE)
        return x, y, *more

    models.init_weights, data.Loader.batch = init_weights, batch


@pytest.fixture
def poisoned(monkeypatch):
    """poison() for this test alone."""
    monkeypatch.setattr(models, "init_weights", models.init_weights)
    monkeypatch.setattr(data.Loader, "batch", data.Loader.batch)
    return poison


def test_stop_ends_the_run_with_the_weights_from_before_and_all_that_a_replay_needs(
        tiny_run, tmp_path, poisoned, capsys):
    out = tmp_path / "out"
    args = [*tiny_run, *FP8, "--log_interval=5", "--checkpoint_interval=2"]
    poisoned(steps=[4])
    with pytest.raises(RuntimeError) as told:
        train_here(*args, f"--out_dir={out}")
    folder = out / "nonfinite_step_00000004"
    for part in ("step 4: loss nan, gradient norm nan", "layers.0.attn.qkv input", str(folder / "replay.pt")):
        assert part in str(told.value), part
    # seen at step 4, where a checkpoint was due: it is not written
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_00000002"]
    replay = torch.load(folder / "replay.pt")
    assert replay["step"] == 4 and replay["samples"] == list(range(24, 32)) and math.isnan(replay["loss"])
    x, y = replay["batch"][:2]
    assert x.shape == y.shape == (2, 4, 64) and x[-1, -1, 5] == 1
    assert replay["broken"][0] == "layers.0.attn.qkv input" and len(replay["fp8_health"]) == 9
    # the weights that the bad step met are there too, and clean; taking it again ends the same way
    model = build(emulated())
    optimizer = AdamW(model, OptimConfig(weights="plain"), seed=0, compiled=False)
    checkpoint.load(checkpoint.latest(folder), model, optimizer)
    tensors = [p for name, p in model.named_parameters() if name != "embed.weight"]
    assert all(t.isfinite().all() for t in (*tensors, *(t for kind in optimizer.state.values() for t in kind.values())))
    capsys.readouterr()
    with pytest.raises(RuntimeError, match="step 4: loss nan"):
        train_here(*args, f"--out_dir={folder}")
    assert "3 steps done" in capsys.readouterr().out


def test_skip_leaves_a_bad_update_out_on_every_rank_and_a_batch_without_a_target_has_no_loss(tiny_run, tmp_path):
    out, script = tmp_path / "out", tmp_path / "poisoned.py"
    paths = [str(REPO / part) for part in ("", "tests", "tests/checks")]
    script.write_text(f"import sys\nsys.path[:0] = {paths}\nimport test_numerics, train\nfrom plumbing import entry\n"
                      "test_numerics.poison([2, 4], masked=5)\nentry.run(train.main)\n")
    # one of the two ranks has the bad sample
    done = run(script, *tiny_run, *FP8, "--on_nonfinite=skip", "--micro_batch_size=2", f"--out_dir={out}", ranks=2)
    m = metrics(out)
    assert [row.get("skipped") for row in m.train.values()] == [None, 1, None, 1, None, None]
    assert (m.train[2]["loss"], m.train[4]["grad_norm"]) == (None, None)
    assert (m.train[5]["loss"], m.train[5]["grad_norm"]) == (0.0, 0.0)
    assert m.train[6]["loss"] < m.train[3]["loss"] < m.train[1]["loss"] and all(map(math.isfinite, m.val.values()))
    assert "step 2: loss nan" in done.stdout and "step 4: loss nan" in done.stdout
    assert sorted(p.name for p in out.glob("nonfinite*")) == ["nonfinite_step_00000002", "nonfinite_step_00000004"]


def test_a_run_that_only_skips_stops(tiny_run, tmp_path, poisoned):
    poisoned(steps=range(3, 40))
    with pytest.raises(RuntimeError, match=r"step 9: .* 4 updates skipped, 10 in a row.*\(fp8 is off\)"):
        train_here(*tiny_run, "--on_nonfinite=skip", "--max_steps=30", "--log_interval=4", "--checkpoint_interval=0",
                   "--eval_interval=0", f"--out_dir={tmp_path / 'all'}")
    train = metrics(tmp_path / "all").train
    assert {step: row.get("skipped") for step, row in train.items()} == {1: None, 4: 2, 8: 4}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_fully_masked_batch_and_zero_weights_give_zeros(recipe, chunks):
    model, (x, y) = build(emulated(recipe_name=recipe)), batch()
    masked = gradients(model, x, torch.full_like(y, models.IGNORE), loss_chunks=chunks)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in masked.values())
    with torch.no_grad():
        model.layers[0].mlp.down.weight.zero_()
        model.layers[1].attn.qkv.weight.zero_()
    assert all(g.isfinite().all() for g in gradients(model, x, y, loss_chunks=chunks).values())


# ----------------------------------------------------------------------------------------------------------------
# self-check


def small_config(recipe, **keys):
    sizes = models.ModelConfig(n_layer=3, n_head=4, n_kv_head=2, n_embd=64, head_dim=16, ffn_dim=128, block_size=64)
    return Config(model=sizes, fp8=emulated(recipe_name=recipe), dtype="bfloat16", **keys)


@pytest.mark.parametrize("recipe", RECIPES)
def test_self_check_passes_with_margin(recipe):
    x, y = batch(8)
    for seed in range(3):
        told = proof.self_check(small_config(recipe, seed=seed), (x, y, ()), torch.device("cpu"))
        # 19 dB and more of gradient, 1e-3 and less of loss: 7 dB and a factor of ten to the bounds
        assert float(told.rsplit("gradients ", 1)[1].split(" dB")[0]) >= 19
        assert float(told.rsplit("loss ", 1)[1].split(",")[0]) < 1e-3


ATTENTION = {"layers.0.attn.qkv": "tensorwise", "layers.0.attn.out": "tensorwise"}
ROWWISE = dict.fromkeys([f"layers.0.{kind}" for kind in ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")], "rowwise")
HEAD = {"lm_head": "tensorwise_forward"}


@pytest.mark.parametrize("filters, recipes, converted", [
    (["mlp", "lm_head"], {}, [ATTENTION]),
    (["layers.0", "lm_head"], {"mlp": None}, [ATTENTION]),  # nothing to check in the first block
    (["mlp"], {"layers.0": None, "layers.2": "rowwise", **HEAD},
     [HEAD, ATTENTION | HEAD, ROWWISE | HEAD])])
def test_self_check_trains_a_block_of_each_kind_with_the_recipes_that_it_has(monkeypatch, filters, recipes, converted):
    convert, seen, (x, y) = fp8.convert, [], batch()

    def spy(model, cfg, *, shards):
        convert(model, cfg, shards=shards)
        seen.append({fqn: m.recipe for fqn, m in fp8.float8_linears(model).items()})

    monkeypatch.setattr(fp8, "convert", spy)
    config = small_config("tensorwise")
    config.fp8.filter_fqns, config.fp8.recipes = filters, recipes
    message = proof.self_check(config, (x, y, ()), torch.device("cpu"))
    assert seen == converted
    assert message.count("from bf16") == len(converted)


@pytest.mark.parametrize("broken", ["double", "transposed", "nan"])
def test_self_check_refuses_a_matmul_that_is_wrong(monkeypatch, broken):
    convert, (x, y) = fp8.convert, batch()

    def wrong(model, cfg, *, shards):
        convert(model, cfg, shards=shards)
        linear = model.layers[0].attn.out  # 64 x 64: a swapped operand fits
        forward = linear.forward
        if broken == "double":
            linear.forward = lambda x: 2 * forward(x)
        elif broken == "nan":
            linear.forward = lambda x: forward(x).index_fill(-1, torch.tensor([5]), math.nan)
        else:
            linear.forward = lambda x: x @ linear.weight

    monkeypatch.setattr(fp8, "convert", wrong)
    with pytest.raises(RuntimeError, match="fp8 computes wrong results here.*from bf16"):
        proof.self_check(small_config("tensorwise"), (x, y, ()), torch.device("cpu"))


@pytest.mark.parametrize("loss, noise, block, refused", [
    (1.0, 0.0, 0, False), (1.009, 0.2, 0, False), (1.011, 0.0, 0, True), (0.989, 0.0, 1, True),  # 1%
    (1.0, 0.26, 0, True), (1.0, 0.26, 1, True), (math.nan, 0.0, 1, True)])  # 12 dB: a quarter of the gradient
def test_self_check_refuses_loss_or_gradients_of_any_block_beyond_its_bounds(monkeypatch, loss, noise, block, refused):
    passes = iter([(1.0, 0.0)] + [(loss, noise) if i == block else (1.0, 0.0) for i in range(2)])

    def one_layer_pass(*_):
        loss, noise = next(passes)
        return 3 * loss, {"a": torch.ones(8), "b": torch.ones(8) * (1 + noise)}

    monkeypatch.setattr(proof, "one_layer_pass", one_layer_pass)
    config = small_config("tensorwise")
    config.fp8.recipes = {"layers.1": "rowwise"}  # blocks of two kinds
    with (pytest.raises(RunStopped, match="fp8 computes wrong results here") if refused else contextlib.nullcontext()):
        proof.self_check(config, None, torch.device("cpu"))


def test_self_check_and_telemetry_show_on_the_screen(tiny_run, tmp_path, capsys):
    train_here(*tiny_run, *FP8, "--fp8.self_check=True", "--fp8.stats_interval=3", "--max_steps=4",
               '--fp8.filter_fqns=["layers.0"]', f"--out_dir={tmp_path / 'out'}")
    shown = capsys.readouterr().out
    comparison = r"loss \d.\de-0\d, gradients [23]\d dB \([a-z0-9_.]+\) from bf16"
    assert re.search(f"fp8 self-check: {comparison}; {comparison}\n", shown)  # the first block is in high precision
    assert shown.count("fp8 health, worst of 5 layers: ") == 2  # steps 1 and 3
    assert f"fp8 health of every layer: {tmp_path / 'out' / 'fp8_health.png'}" in shown


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_self_check_passes_on_a_gpu(recipe):
    torch._dynamo.reset()
    config = small_config(recipe, compile=CompileConfig(enabled=True))
    config.model = models.ModelConfig(n_layer=3, n_head=16, n_kv_head=4, n_embd=1024, head_dim=64, ffn_dim=4096,
                                      vocab_size=4096, block_size=1024)
    config.fp8.emulate = False
    x, y = torch.randint(0, 4096, (2, 4, 1024), device="cuda")
    print(proof.self_check(config, (x, y, ()), torch.device("cuda")))


# ----------------------------------------------------------------------------------------------------------------
# properties of the recipes, over random shapes and ranges of values


# dB of y, grad_x, grad_w for normal data, as derived in test_fp8.py: e4m3 gives an operand 31.5, e5m2 25.5, and a
# product has the noise of both. 3 dB for a bad draw of a small tensor.
BOUNDS = {"tensorwise": (25.5, 21.5, 21.5), "tensorwise_with_gw_hp": (25.5, 21.5, 100.0),
          "tensorwise_forward": (25.5, 100.0, 100.0), "rowwise": (25.5, 25.5, 25.5),
          "rowwise_with_gw_hp": (25.5, 25.5, 100.0)}


def linear_pass(recipe, x, w, g, emulate=True, compiled=False):
    """(y, grad_x, grad_w) of a converted layer, or in float64 where recipe is None."""
    layer = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device, dtype=w.dtype))
    layer[0].weight = nn.Parameter(w.clone())
    if recipe is None:
        layer, x, g = layer.double(), x.double(), g.double()
    else:
        fp8.convert(layer, FP8Config(enabled=True, emulate=emulate, recipe_name=recipe), shards=0)
    x = x.clone().requires_grad_()
    y = (torch.compile(layer) if compiled else layer)(x)
    y.backward(g)
    return y.detach(), x.grad, layer[0].weight.grad


def draw(seed, device="cpu"):
    """x, w, g of a random layer: shapes that FP8 takes, each operand with a magnitude of its own."""
    gen = torch.Generator().manual_seed(seed)
    tokens, n_in, n_out = (16 * torch.randint(2, 12, (3,), generator=gen)).tolist()
    shapes = (tokens, n_in), (n_out, n_in), (tokens, n_out)
    powers = (10.0 ** torch.randint(-6, 7, (3,), generator=gen)).tolist()
    return [power * torch.randn(shape, generator=gen).to(device) for shape, power in zip(shapes, powers, strict=True)]


@pytest.mark.parametrize("recipe", OURS)
def test_any_shape_and_magnitude_has_the_sqnr_that_the_formats_allow(recipe):
    for seed in range(25):
        tensors = draw(seed)
        exact, found = linear_pass(None, *tensors), linear_pass(recipe, *tensors)
        dbs = [sqnr(e, f) for e, f in zip(exact, found, strict=True)]
        assert all(db > bound for db, bound in zip(dbs, BOUNDS[recipe], strict=True)), (seed, dbs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_and_eager_layers_agree(recipe):
    x, w, g = draw(3)
    # the same casts of the same float32 values; the matmuls may add up in another order
    for eager, compiled in zip(linear_pass(recipe, x, w, g), linear_pass(recipe, x, w, g, compiled=True), strict=True):
        assert sqnr(eager, compiled) > 100


def test_a_weight_outlier_spoils_a_tensor_but_only_its_own_row_row_wise():
    torch.manual_seed(0)
    x, w, g = torch.randn(64, 128), torch.randn(96, 128), torch.randn(64, 96)
    w[7, 7] = 1e7  # the others are at 448e-7 of e4m3's range, whose smallest step is 2e-3: zero
    exact = linear_pass(None, x, w, g)[0]
    others = torch.arange(96) != 7
    assert linear_pass("tensorwise", x, w, g)[0][:, others].count_nonzero() == 0
    for recipe in ("rowwise", "rowwise_with_gw_hp"):
        assert sqnr(exact[:, others], linear_pass(recipe, x, w, g)[0][:, others]) > 25.5
    # a thousand times the rest is no outlier to a floating-point format
    w[7, 7] = 1e3
    assert sqnr(linear_pass(None, x, w, g)[0][:, others], linear_pass("tensorwise", x, w, g)[0][:, others]) > 25.5


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("operand", [0, 1, 2])
def test_zeros_and_denormals_give_zeros(recipe, operand):
    products = {"y": (0, 1), "grad_x": (1, 2), "grad_w": (0, 2)}  # of x, w, g
    for value in (0.0, 1e-40):  # torchao takes an amax below 1e-12 for 1e-12, so what is far below that becomes zero
        tensors = draw(5)
        tensors[operand] = torch.full_like(tensors[operand], value)
        for name, found in zip(products, linear_pass(recipe, *tensors), strict=True):
            in_fp8 = (recipe, name) != ("rowwise_with_gw_hp", "grad_w")
            assert found.isfinite().all()
            if operand not in products[name]:
                assert found.count_nonzero() == found.numel()
            elif in_fp8 or value == 0:
                assert found.count_nonzero() == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_inf_does_not_hide(recipe):
    x, w, g = draw(7)
    x[3, 3] = math.inf
    y = linear_pass(recipe, x, w, g)[0]
    assert not y[3].isfinite().any()
    if recipe == "tensorwise":  # one scale, 448 / inf = 0, and the product is divided by it
        assert y.isnan().all()
    else:
        assert sqnr(linear_pass(None, x[:3], w, g[:3])[0], y[:3]) > 25.5


def test_scales_are_functions_of_the_weights_and_pass_through_state_dicts():
    (x, y), models_ = batch(), [build(emulated(), seed=s) for s in (1, 2)]
    models_[1].load_state_dict(models_[0].state_dict())
    rows = [telemetry.health(m, lambda m=m: m(x, y).backward(), 1) for m in models_]
    assert rows[0] == rows[1]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_emulated_and_real_fp8_agree_on_any_shape(recipe):
    for seed in range(25):
        tensors = [t.to(torch.bfloat16) for t in draw(seed, "cuda")]
        real = linear_pass(recipe, *tensors, emulate=False)
        for a, b in zip(linear_pass(recipe, *tensors), real, strict=True):
            assert sqnr(a, b) > 40, seed  # the same operands; sums and outputs round differently (test_fp8.py)
        compiled = linear_pass(recipe, *tensors, emulate=False, compiled=True) if seed < 3 else real
        for a, b in zip(real, compiled, strict=True):
            assert sqnr(a, b) > 40, seed


# ----------------------------------------------------------------------------------------------------------------
# force_recompute_fp8_weight_in_bwd


KEPT = """
import gc, json, sys
sys.path.insert(0, {repo!r})
import torch, torch.distributed as dist, train
from plumbing import entry
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
largest, original = 0, torch.Tensor.backward
def backward(self, *args, **kwargs):
    # FP8 memory that is held where a forward pass is over and its backward pass begins: by FSDP2, and by the graph
    global largest
    held, seen, stack = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)], set(), [self.grad_fn]
    while stack:
        if (node := stack.pop()) is not None and node not in seen:
            seen.add(node)
            stack += [n for n, _ in node.next_functions]
            held += [t for t in getattr(node, "saved_tensors", ()) if t is not None]
    held = [getattr(t, "_data", t) if t.dtype.itemsize > 1 else t for t in held]
    real = [t.untyped_storage() for t in held if t.dtype in FP8 and type(t) is torch.Tensor]  # no FakeTensor
    largest = max(largest, sum({{s.data_ptr(): s.nbytes() for s in real}}.values()))
    return original(self, *args, **kwargs)
torch.Tensor.backward = backward
found = {{}}
for name, *argv in json.loads(open({runs!r}).read()):
    torch._dynamo.reset()
    sys.argv, largest = ["train.py", *argv], 0
    train.main()
    found[name] = largest
if dist.get_rank() == 0:
    print("kept", json.dumps(found))
entry.leave()
"""


def test_no_fp8_copy_of_a_weight_is_held_between_forward_and_backward_of_a_sharded_run(tiny_run, tmp_path):
    base = [*tiny_run, *FP8, *GATHER, "--max_steps=1", "--eval_interval=0", "--checkpoint_interval=0",
            "--model.n_layer=1", "--activation_checkpoint=none"]
    force = "--fp8.force_recompute_fp8_weight_in_bwd=True"
    runs = {"forced": [force], "forced_compiled": [force, "--compile.enabled=True"], "default": [],
            "zero2": ["--reshard_after_forward=False"]}
    listed, script = tmp_path / "runs.json", tmp_path / "kept.py"
    listed.write_text(json.dumps([[name, *base, *more, f"--out_dir={tmp_path / name}"] for name, more in runs.items()]))
    script.write_text(KEPT.format(repo=str(REPO), runs=str(listed)))
    done = run(script, ranks=2)
    kept = json.loads(done.stdout.split("kept ", 1)[1].splitlines()[0])
    weights = {"block": 128 * 64 + 64 * 64 + 256 * 64 + 64 * 128, "lm_head": 272 * 64}  # a byte each
    # FSDP2 frees what it gathered for a block after its forward pass, and keeps what the root gathered: the lm_head
    assert kept == {"forced": 0, "forced_compiled": 0, "default": weights["lm_head"], "zero2": sum(weights.values())}


def test_forced_recompute_and_kept_gathered_weights_contradict_each_other():
    config = Config(fp8=emulated(force_recompute_fp8_weight_in_bwd=True, enable_fsdp_float8_all_gather=True),
                    reshard_after_forward=False)
    assert "reshard_after_forward" in "".join(config.problems())
    config.fp8.enable_fsdp_float8_all_gather = False
    assert not list(config.problems())


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_forced_recompute_holds_no_fp8_weights_in_gpu_memory(recipe):
    held, peak = {}, {}
    for force in (True, False):
        torch._dynamo.reset()
        cfg = FP8Config(enabled=True, recipe_name=recipe, force_recompute_fp8_weight_in_bwd=force,
                        filter_fqns=["lm_head"])
        model = build(cfg, "cuda", torch.bfloat16, n_layer=8, n_embd=1024, n_head=16, n_kv_head=4, head_dim=64,
                      ffn_dim=4096)
        compile_and_checkpoint(model, CompileConfig(enabled=True), "none", cfg.copies)
        x = torch.randint(0, 256, (2, 16), device="cuda")
        for _ in range(3):
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            loss = model(x, x)
            held[force] = torch.cuda.memory_allocated() - before
            loss.backward()
            peak[force] = torch.cuda.max_memory_allocated() - before
            del loss
            model.zero_grad(set_to_none=True)
    weights = sum(m.weight.numel() for m in fp8.float8_linears(model).values())  # bytes of one FP8 copy: 120 MB
    print(f"{recipe}: held {held}, peak {peak}, one copy of all weights {weights}")
    assert held[True] < weights / 8, "32 tokens keep 8 MB of activations, not the weights"
    assert peak[True] < peak[False] + weights / 8, "in backward too only one block's copies exist"


# ----------------------------------------------------------------------------------------------------------------
# docs/numerics.md and docs/notebook.md


def figures(line):
    return [float(n) for n in re.findall(r"([\d.]+)(?: dB|%)", line)]


def test_documented_figures_are_what_the_code_computes():
    from torchao.float8.float8_utils import amax_to_scale

    lines = [line for name in ("numerics", "notebook") for line in (REPO / f"docs/{name}.md").read_text().splitlines()]
    rows_of = {line.split("|")[1].strip(): line for line in lines[::-1] if line.startswith("|")}
    torch.manual_seed(0)
    normal = torch.randn(1024, 1024)
    values = {"normal": normal}
    for sigma in (2, 3):
        values[f"log-normal, sigma {sigma}"] = normal * torch.exp(sigma * torch.randn_like(normal))
    values["normal, rows of 1e-4 to 1"] = normal * 10 ** (-4 * torch.rand(1024, 1))
    for power in (3, 5):
        values[f"normal, one value of 1e{power}"] = normal.clone()
        values[f"normal, one value of 1e{power}"][3, 3] = 10.0**power
    for name, x in values.items():
        cells = [name]
        for dtype, rows in ((E4M3, False), (E5M2, False), (E4M3, True)):
            amax = x.abs().amax(1, keepdim=True) if rows else x.abs().amax()
            scale = amax_to_scale(amax, dtype, round_scales_to_power_of_2=rows)
            stats = telemetry.cast_stats(x, fp8_weights.cast_to_fp8(x, scale, dtype), scale).tolist()
            stats = dict(zip(telemetry.SUMS, stats, strict=False))
            db, share = telemetry.decibels(stats["signal"], stats["noise"]), stats["underflow"] / stats["values"]
            cells.append(f"{db:.1f} dB, {share:.1%} underflow")
        print("| " + " | ".join(cells) + " |")
        # to a digit: another processor's exp() may round a value the other way
        assert figures(rows_of[name]) == pytest.approx(figures("".join(cells[1:])), abs=0.2)
    torch.manual_seed(0)
    tensors = torch.randn(512, 256), torch.randn(384, 256), torch.randn(512, 384)
    exact = linear_pass(None, *tensors)
    for recipe in OURS:
        dbs = [sqnr(e, f) for e, f in zip(exact, linear_pass(recipe, *tensors), strict=True)]
        cells = [f"{db:.1f} dB" if db < 100 else "exact" for db in dbs]
        print(recipe, *cells)
        assert figures(rows_of[recipe]) == pytest.approx(figures(" ".join(cells)), abs=0.2)
