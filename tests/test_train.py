"""train.py, run as a user runs it: the same training on any number of ranks, exact resume, and what a run leaves."""

import ast
import functools
import itertools
import json
import shutil
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO, build, main_here, metrics, needs_rows_on_a_cpu, run, run_many, train_here
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp_param_group

import checkpoint
import configurator
import data
import formats.tokens as token_format
import model as models
import sample
import train
from checks import estimate
from formats import hellaswag
from model import IGNORE
from optim import AdamW
from plumbing import cudagraph, fp8_weights, logs, ranks
from plumbing.errors import UserError
from plumbing.ranks import Ranks

FP8 = ["--fp8.enabled=True", "--fp8.emulate=True", '--fp8.filter_fqns=["lm_head"]']
GATHER = ["--fp8.enable_fsdp_float8_all_gather=True"]
PRECOMPUTE = [*GATHER, "--fp8.precompute_float8_dynamic_scale_for_fsdp=True"]
ONE_SHARD = ["--shard_one_rank=True"]
COMPILE = ["--compile.enabled=True"]
FLAT = "--optim.min_lr=0.003"  # for parts of a run: the learning rate would else decay to the end of each
BF16 = ["--dtype=bfloat16", "--optim.weights=fp32_master"]


def losses(m):
    return [row["loss"] for row in m.train.values()]


def largest_gap(a, b):
    """The largest relative difference between two runs' training losses, gradient norms and validation losses."""
    assert list(a.train) == list(b.train) and list(a.val) == list(b.val)
    pairs = [(a.train[s][key], b.train[s][key]) for s in a.train for key in ("loss", "grad_norm")]
    pairs += [(a.val[s], b.val[s]) for s in a.val]
    return max(abs(x - y) / abs(y) for x, y in pairs)


def exact(m):
    """All of a run's numbers but those of the clock and the machine."""
    measured = {"time_s", "tokens_per_s", "mfu", "peak_gib", "slowest_ms"}
    return [{k: v for k, v in row.items() if k not in measured} for row in m.rows]


# ----------------------------------------------------------------------------------------------------------------
# FSDP2: the same training on one rank and on two


@pytest.fixture(scope="module")
def fleet(tiny_run, tmp_path_factory):
    """The same configs on 1 and on 2 ranks: ({name: metrics}, {name: metrics})."""
    folder = tmp_path_factory.mktemp("fleet")
    # 10 windows in the text, the last one short, 8 a step: step 2 has the short one on one of the ranks
    text = folder / "short.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(64 * 9 + 10)))
    both = {
        "unequal": [f'--data.train=["{text}"]', f'--data.val=["{text}"]', "--micro_batch_size=1"],
        "fp32": [],
        "bf16": BF16,
        "bf16_rounding": ["--dtype=bfloat16", "--optim.weights=stochastic_rounding"],
        "fp8_moments": ["--dtype=bfloat16", "--optim.weights=stochastic_rounding", "--optim.fp8_moments=True"],
        "accumulation": ["--micro_batch_size=1"],
        "fp32_compiled": COMPILE,
        "fp8": FP8,
        "fp8_gather": [*FP8, *GATHER],
        "fp8_precompute": [*FP8, *PRECOMPUTE],
        "fp8_precompute_compiled": [*FP8, *PRECOMPUTE, *COMPILE],
        "fp8_compiled": [*FP8, *COMPILE],
        "keep_casts": [*FP8, *PRECOMPUTE, *COMPILE, "--fp8.keep_casts=True"],
        "fp8_bf16": [*FP8, *PRECOMPUTE, *BF16],
        "rowwise": [*FP8, "--fp8.recipe_name=rowwise"],
        "gw_hp": [*FP8, "--fp8.recipe_name=rowwise_with_gw_hp"],
        "tied_fp8_head": [*FP8, "--model.tie_embeddings=True", "--fp8.filter_fqns=[]"],
    }
    two_only = {
        "hsdp": ["--replicas=2"],
        "bf16_reduce": ["--reduce_dtype=bfloat16"],
        "hsdp_fp8": [*FP8, *PRECOMPUTE, "--replicas=2"],
        "zero2_fp8": [*FP8, *PRECOMPUTE, "--reshard_after_forward=False"],
        # compiled in test_numerics.py
        "selective_fp8": [*FP8, *PRECOMPUTE, "--activation_checkpoint=selective", "--loss_chunks=4"],
        "full_fp8": [*FP8, *PRECOMPUTE, "--activation_checkpoint=full"],
        "accumulation_fp8": [*FP8, *PRECOMPUTE, "--micro_batch_size=1"],
        "reduced_once": ["--micro_batch_size=1", "--reduce_each_pass=False", "--reshard_after_forward=False"],
        "reduced_once_fp8": [*FP8, *PRECOMPUTE, "--micro_batch_size=1", "--reduce_each_pass=False"],
        "tied_fp8": [*FP8, *PRECOMPUTE, "--model.tie_embeddings=True"],
    }
    one_only = {  # the sharded ones last: their process group stays
        "tied": ["--model.tie_embeddings=True"],
        "shard_fp32": ONE_SHARD,
        "shard_bf16": [*BF16, *ONE_SHARD],
        "shard_rounding": ["--dtype=bfloat16", "--optim.weights=stochastic_rounding", *ONE_SHARD],
        "shard_accumulation": ["--micro_batch_size=1", *ONE_SHARD],
        "shard_fp8": [*FP8, *ONE_SHARD],
        "shard_gather": [*FP8, *GATHER, *ONE_SHARD],
        "shard_precompute": [*FP8, *PRECOMPUTE, *ONE_SHARD],
        "shard_precompute_compiled": [*FP8, *PRECOMPUTE, *COMPILE, *ONE_SHARD],
    }
    one = {name: [*tiny_run, *args] for name, args in (both | one_only).items()}
    two = {name: [*tiny_run, *args] for name, args in (both | two_only).items()}
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    moving = [*tiny_run, *FP8, *PRECOMPUTE, "--checkpoint_interval=2", FLAT]
    # Inductor compiles what differs most: whole weights cast in the graph, and weights gathered in FP8 outside of it.
    # Its kernels for the others are held against eager in test_fp8.py and test_numerics.py.
    traced = {"fp32_compiled", "keep_casts"}
    done = run_many(folder / "one", {**one, "moving": [*moving, "--max_steps=2"], "stays": moving}, ranks=1,
                    traced=traced | {"fp8_precompute_compiled"})
    shutil.copytree(folder / "one" / "moving", folder / "two" / "moving")
    return done, run_many(folder / "two", {**two, "moving": [*moving, "--max_steps=4"]}, ranks=2,
                          traced=traced | {"fp8_compiled"})


# float32: sums in another order differ by some 1e-7, which Adam's first steps (update = sign of the gradient) amplify
# on the few weights whose gradient is near zero.
FLOAT_NOISE = 1e-4
# bfloat16 rounds activations to 2^-9 and a matmul over half of the batch rounds its gradient separately.
BF16_NOISE = 0.02
# tensorwise FP8: each rank scales its own activations and gradients, so the values on 2 ranks are cast with other
# scales than on 1: independent rounding errors of 2^-4 (e4m3) and 2^-3 (e5m2), averaged over some thousand values,
# a percent of the loss and a few of the gradient norm after 6 steps. The weights, whose scale is global, do not differ.
FP8_NOISE = 0.05


@pytest.mark.parametrize("name, bound", [
    ("fp32", FLOAT_NOISE), ("accumulation", FLOAT_NOISE), ("fp32_compiled", FLOAT_NOISE), ("bf16", BF16_NOISE),
    ("bf16_rounding", BF16_NOISE), ("fp8_moments", FP8_NOISE), ("fp8", FP8_NOISE),
    ("fp8_gather", FP8_NOISE), ("fp8_precompute", FP8_NOISE),
    ("fp8_compiled", FP8_NOISE), ("fp8_precompute_compiled", FP8_NOISE), ("keep_casts", FP8_NOISE),
    ("fp8_bf16", FP8_NOISE), ("rowwise", FP8_NOISE), ("gw_hp", FP8_NOISE), ("tied_fp8_head", FP8_NOISE)])
def test_two_ranks_train_as_one_does(fleet, name, bound):
    one, two = fleet
    assert len(one[name].train) == 6 and one[name].train[6]["loss"] < one[name].train[1]["loss"] - 0.3
    assert largest_gap(two[name], one[name]) < bound


@pytest.mark.parametrize("name, reference, bound", [
    # the weights' casts and scales are the same, wherever and whenever they are computed: bit for bit
    ("fp8_gather", "fp8", 0), ("fp8_precompute", "fp8", 0), ("zero2_fp8", "fp8_precompute", 0),
    ("full_fp8", "fp8_precompute", 0), ("hsdp", "fp32", FLOAT_NOISE), ("hsdp_fp8", "fp8", FP8_NOISE),
    # compiled kernels keep float32 where eager rounds between ops; chunks of the loss have scales of their own
    ("fp8_compiled", "fp8", FP8_NOISE), ("fp8_precompute_compiled", "fp8", FP8_NOISE), ("keep_casts", "fp8", FP8_NOISE),
    ("selective_fp8", "fp8", FP8_NOISE), ("accumulation_fp8", "fp8", FP8_NOISE),
    ("reduced_once", "accumulation", FLOAT_NOISE), ("reduced_once_fp8", "accumulation_fp8", FP8_NOISE)])
def test_switches_of_a_sharded_run_do_not_change_the_training(fleet, name, reference, bound):
    _, two = fleet
    assert largest_gap(two[name], two[reference]) <= bound


def test_gradients_of_ranks_add_up_in_the_dtype_that_is_asked_for(fleet):
    _, two = fleet
    # of float32 gradients: two in bf16 give the same either way, one sum and one rounding
    assert 1e-6 < largest_gap(two["bf16_reduce"], two["fp32"]) < BF16_NOISE


@pytest.mark.parametrize("name, reference, bound", [
    # FSDP2 copies weights and gradients and changes none, and a weight is cast with the same scale wherever that is
    # done: bit for bit
    ("shard_fp32", "fp32", 0), ("shard_bf16", "bf16", 0), ("shard_rounding", "bf16_rounding", 0),
    ("shard_accumulation", "accumulation", 0), ("shard_fp8", "fp8", 0), ("shard_gather", "fp8", 0),
    ("shard_precompute", "fp8", 0),
    # cast outside of the graph, where a fused kernel may round otherwise
    ("shard_precompute_compiled", "fp8_compiled", FP8_NOISE)])
def test_sharded_over_one_rank_trains_as_not_sharded(fleet, name, reference, bound):
    one, _ = fleet
    assert largest_gap(one[name], one[reference]) <= bound


@pytest.mark.parametrize("first, then", [("fp8", [*PRECOMPUTE, *ONE_SHARD]), ("shard_precompute", PRECOMPUTE)],
                         ids=["into_shards", "out_of_shards"])
def test_a_checkpoint_moves_into_and_out_of_shards_on_one_rank(fleet, tiny_run, tmp_path, capsys, first, then):
    one, _ = fleet
    shutil.copytree(one[first].out_dir, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step_00000006")
    train_here(*tiny_run, *FP8, *then, f"--out_dir={tmp_path / 'out'}")
    assert exact(metrics(tmp_path / "out")) == exact(one["fp8"])
    told = capsys.readouterr().out
    gathered = "fp8, scales precomputed\n" if then[-1:] == ONE_SHARD else "nothing to do, one rank holds"
    assert "3 steps done" in told and "fp8: verified" in told and f"all-gather: {gathered}" in told


@pytest.mark.parametrize("keys, real", [
    ([*PRECOMPUTE, *ONE_SHARD], [*COMPILE, "--fp8.keep_casts=True"]),
    pytest.param(["--fp8.recipe_name=rowwise"], [], marks=needs_rows_on_a_cpu),
    pytest.param(["--fp8.recipe_name=rowwise_with_gw_hp"], [], marks=needs_rows_on_a_cpu)],
    ids=["tensorwise", "rowwise", "gw_hp"])
def test_real_fp8_trains_as_emulated(tiny_run, tmp_path, keys, real, real_fp8_on_a_cpu, capsys):
    args = [*tiny_run, *BF16, *FP8[::2], *keys, "--global_batch_size=1", "--micro_batch_size=1", "--max_steps=3",
            "--eval_sequences=1", "--checkpoint_interval=0"]
    for emulate, more in ((True, []), (False, real)):
        train_here(*args, *more, f"--fp8.emulate={emulate}", f"--out_dir={tmp_path / str(emulate)}")
        assert "matmuls ran in one pass" in (told := capsys.readouterr().out) and ("emulated" in told) == emulate
    assert largest_gap(metrics(tmp_path / "False"), metrics(tmp_path / "True")) < FP8_NOISE


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_weights_in_host_memory_train_as_those_on_the_device(tiny_run, tmp_path, monkeypatch, device):
    if device == "cpu":  # as in train_many.py
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    args = [*tiny_run, *COMPILE, *FP8[:: 1 if device == "cpu" else 2], "--fp8.keep_casts=True", "--micro_batch_size=2",
            "--fp8.stats_interval=3", "--eval_interval=3", "--checkpoint_interval=3", "--keep=0", FLAT,
            f"--device={device}", "--dtype=bfloat16", "--optim.weights=stochastic_rounding", "--optim.fp8_moments=True",
            "--optim.offload=0.6", "--model.n_layer=1"]
    moved, offload_weights = [], AdamW.offload_weights

    def spy(self, casts):
        offload_weights(self, casts)
        moved.append(len(self.casts))
        assert len(self.casts) < len(casts) and all(self.params[name].isnan().all() for name in self.casts)

    monkeypatch.setattr(AdamW, "offload_weights", spy)
    for name, keys in (("stays", []), ("moves", ["--fp8.offload_weights=True", "--max_steps=3"]),
                       ("moves", ["--fp8.offload_weights=True"])):
        train_here(*args, *keys, f"--out_dir={tmp_path / name}")
    assert len(moved) == 2 and moved[0] == moved[1] > 0
    stays, moves = metrics(tmp_path / "stays"), metrics(tmp_path / "moves")
    assert stays.train[6]["loss"] < stays.train[1]["loss"] and len(moves.train) == 6
    assert largest_gap(moves, stays) <= (0 if device == "cpu" else FP8_NOISE)
    if device == "cpu":
        found = []
        for out in (tmp_path / "stays", tmp_path / "moves"):
            health = [row for row in logs.read_metrics(out) if "fp8_layer" in row and row["step"] in (3, 6)]
            found.append((health, [path.read_bytes() for path in sorted(out.rglob("*.distcp"))]))
        (health, files), moved = found
        assert moved == (health, files) and all("weight" in row for row in health) and len(health) == 8 and files


def test_offload_weights_is_an_error_where_no_weight_moves(tiny_run, tmp_path):
    keys = [*tiny_run, *COMPILE, *FP8, "--fp8.keep_casts=True", "--optim.offload=1", "--fp8.offload_weights=True",
            f"--out_dir={tmp_path / 'out'}"]
    for more in (["--micro_batch_size=8"], ["--micro_batch_size=2", *ONE_SHARD],
                 ["--micro_batch_size=2", "--optim.offload=0.001"],
                 ["--micro_batch_size=2", "--fp8.recipe_name=blockwise", "--model.n_embd=128", "--model.head_dim=32"]):
        with pytest.raises(UserError, match="^fp8.offload_weights=True has no weight to move: it is for tensorwise"):
            train_here(*keys, *more)


@pytest.mark.gpu
def test_sharded_over_one_gpu_trains_as_not_sharded(tiny_run, tmp_path):
    sizes = {"n_embd": 256, "head_dim": 64, "ffn_dim": 512, "block_size": 256}
    args = [*tiny_run, *(f"--model.{k}={v}" for k, v in sizes.items()), *BF16, *COMPILE, *PRECOMPUTE, *FP8[::2],
            "--device=cuda", "--deterministic=False", "--max_steps=4", "--eval_interval=4"]
    told = {name: run("train.py", *args, *keys, f"--out_dir={tmp_path / name}").stdout
            for name, keys in (("whole", []), ("sharded", ONE_SHARD))}
    assert "all-gather: fp8, scales precomputed\n" in told["sharded"] and "all-gather: nothing to do" in told["whole"]
    assert all("fp8: verified, " in text and "emulated" not in text for text in told.values())
    whole, sharded = metrics(tmp_path / "whole"), metrics(tmp_path / "sharded")
    assert whole.train[4]["loss"] < whole.train[1]["loss"]
    assert largest_gap(sharded, whole) < FP8_NOISE  # the same scales; graphs that round in other places


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [None, "tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_a_recorded_pass_trains_as_one_that_python_starts(tiny_run, tmp_path, recipe):
    sizes = {"n_embd": 256, "head_dim": 64, "ffn_dim": 512, "block_size": 256}
    args = [*tiny_run, *(f"--model.{k}={v}" for k, v in sizes.items()), *COMPILE, "--device=cuda",
            "--dtype=bfloat16", "--deterministic=False", "--eval_interval=3", "--loss_chunks=2"]
    if recipe:
        args += [*FP8[::2], f"--fp8.recipe_name={recipe}", "--fp8.stats_interval=2"]
    for weights, batch in (("fp32_master", 8), ("fp32_master", 4), ("stochastic_rounding", 4)):
        found, recomputed = {}, "none" if weights == "fp32_master" else "selective"
        for graph in (False, True):
            out_dir = tmp_path / f"{weights}_{batch}_{graph}"
            train_here(*args, f"--optim.weights={weights}", f"--activation_checkpoint={recomputed}",
                       f"--micro_batch_size={batch}", f"--cuda_graph={graph}", f"--out_dir={out_dir}")
            found[graph] = metrics(out_dir)
        assert found[True].train[6]["loss"] < found[True].train[1]["loss"]
        first, plain = found[True].train[1], found[False].train[1]
        assert first["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert first["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
        # the same kernels, but cuDNN's attention adds a query's gradient up in any order, and Adam amplifies that
        assert largest_gap(found[True], found[False]) < FP8_NOISE, (weights, batch)
        assert found[True].train[6]["peak_gib"] > 0.5 * found[False].train[6]["peak_gib"]  # what it reserved counts


def test_evaluations_and_checkpoints_show_the_time_left(tiny_run, tmp_path, bars):
    args = [*tiny_run, "--checkpoint_interval=1", "--eval_interval=1", f"--out_dir={tmp_path}"]
    again = ["checking step_00000001", "loading", "evaluation", "saving"]
    for n_steps, shown in ((1, ["evaluation", "saving"]), (2, again)):
        train_here(*args, f"--max_steps={n_steps}")
        assert [bar.desc for bar in bars] == shown and all(bar.n == bar.total > 0 for bar in bars)
        bars.clear()


def test_a_pass_that_cannot_be_captured_is_an_error(tiny_run, tmp_path):
    with pytest.raises(UserError, match="^cuda_graph=True: there is no GPU here; or set cuda_graph=False$"):
        train_here(*tiny_run, "--cuda_graph=True", f"--out_dir={tmp_path}")
    config, gpu = configurator.Config(cuda_graph=True), torch.device("cuda")
    cudagraph.check(config, 0, gpu)
    with pytest.raises(UserError, match="FSDP2's communication cannot be captured"):
        cudagraph.check(config, 1, gpu)
    config.model.sliding_window = 256
    cudagraph.check(config, 0, gpu)
    config.compile.enabled, config.compile.mode = True, "reduce-overhead"
    with pytest.raises(UserError, match="compile.mode=reduce-overhead captures graphs of its own"):
        cudagraph.check(config, 0, gpu)
    config.cuda_graph = False
    with pytest.raises(UserError, match="overwrites one's results in evaluations .*, or eval_interval=0 and fp8.stats"):
        cudagraph.check(config, 0, gpu)
    cudagraph.check(config, 0, torch.device("cpu"))
    config.eval_interval, config.fp8.stats_interval = 0, 5  # without fp8.enabled its keys are ignored
    cudagraph.check(config, 0, gpu)
    config.fp8.enabled = True
    with pytest.raises(UserError, match="overwrites one's results"):
        cudagraph.check(config, 0, gpu)
    config.cuda_graph, config.model.sliding_window = True, 255
    with pytest.raises(UserError, match="a sliding window has new shapes"):
        cudagraph.check(config, 0, gpu)


def test_rows_of_documents_cannot_be_captured_and_rows_of_one_document_can():
    config = configurator.Config(cuda_graph=True)
    cudagraph.check_rows(config, SimpleNamespace(row=lambda i: (None, None, None)))
    packed = SimpleNamespace(row=lambda i: (None, None, np.arange(4)))
    with pytest.raises(UserError, match="rows of several documents have new shapes"):
        cudagraph.check_rows(config, packed)
    cudagraph.check_rows(configurator.Config(), packed)


def test_the_pieces_of_the_loss_must_divide_the_tokens_of_a_pass(tiny_run, tmp_path):
    with pytest.raises(UserError, match="loss_chunks=3 must divide the tokens of a forward pass, micro_batch_size x 64 "
                                        "= 256"):
        train_here(*tiny_run, "--loss_chunks=3", f"--out_dir={tmp_path}")


def test_tokens_of_a_pass_that_fp8_cannot_take_stop_the_run(tiny_run, tmp_path):
    with pytest.raises(UserError, match="tokens per forward pass and loss chunk to be divisible by 16, not 60: set"):
        train_here(*tiny_run, *FP8, "--model.block_size=60", "--micro_batch_size=1", f"--out_dir={tmp_path}")


def test_rows_of_documents_stop_a_run_that_would_capture_them(tiny_run, tmp_path, monkeypatch):
    require = cudagraph.require
    monkeypatch.setattr(cudagraph, "require", lambda config, condition, problem: require(
        config, condition or "no GPU" in problem, problem))
    np.array([1, 2, 3, 0] * 2000, "<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(UserError, match="cuda_graph=True: rows of several documents have new shapes"):
        train_here(*tiny_run, "--cuda_graph=True", "--data.format=tokens", f'--data.train=["{tmp_path / "a.bin"}"]',
                   "--data.eos_id=0", f"--out_dir={tmp_path / 'out'}")


def test_a_sharded_run_asks_whether_all_ranks_see_its_out_dir(tiny_run, tmp_path, monkeypatch):
    def refuse(*args):
        raise UserError(repr(args))

    monkeypatch.setattr(train, "check_shared", refuse)
    with pytest.raises(UserError) as error:
        train_here(*tiny_run, *ONE_SHARD, f"--out_dir={tmp_path}")
    assert str(error.value) == repr((tmp_path,))


def test_ranks_that_would_train_in_different_ways_are_an_error(tiny_run, tmp_path, monkeypatch):
    """As a config with a seed of the clock, or with a file for each rank, has it."""
    for name, changed in (("seed", lambda value: value + 1), ("training data", lambda value: "0" * 32)):
        def two_ranks(mine, name=name, changed=changed):
            if mine is None:  # only waits
                return [mine, mine]
            return [mine, {key: changed(value) if key == name else value for key, value in mine.items()}]

        monkeypatch.setattr(ranks, "gather", two_ranks)
        with pytest.raises(UserError, match=f"all ranks need the same config and data.*: {name}: .* on rank 1$"):
            train_here(*tiny_run, *ONE_SHARD, f"--out_dir={tmp_path}")


class PretendGraph(cudagraph.GraphedPass):
    """Without a GPU: a replay overwrites the loss and the gradients of the one before, as a CUDA graph's does."""

    def capture(self, x, y, divisor):
        self.inputs, self.loss = [t.clone() for t in (x, y, divisor)], torch.zeros(())
        self.grads = [(p, torch.empty_like(p)) for p in self.params]
        self.graph = SimpleNamespace(replay=self.replay)

    def replay(self):
        accumulated = self.take_gradients()  # captured kernels know no p.grad
        self.loss.copy_(self.run_pass(*self.inputs[:2], (), self.inputs[2]))
        for (_, grad), (_, new) in zip(self.grads, self.take_gradients(), strict=True):
            grad.copy_(new)
        for p, grad in accumulated:
            p.grad = grad


def test_a_replay_reads_the_values_of_its_own_call():
    model = torch.nn.Linear(1, 1, bias=False)

    def run_pass(x, y, documents, divisor):
        loss = (model.weight * (x + 10 * y) / divisor).sum()
        loss.backward()
        return loss.detach()

    graphed = PretendGraph(run_pass, model, accumulates=False)
    for x, y, divisor in ((1, 2, 4), (3, 2, 4), (3, 5, 4), (3, 5, 8)):
        model.zero_grad()
        loss = graphed(torch.tensor([[x]]), torch.tensor([[y]]), (), torch.tensor(float(divisor)))
        assert model.weight.grad.item() == (x + 10 * y) / divisor
        assert loss.item() == pytest.approx(model.weight.item() * (x + 10 * y) / divisor)


@pytest.mark.parametrize("batch", [8, 4])  # one pass, and two that add up
@pytest.mark.parametrize("keys", [["--optim.weights=plain"], BF16, ["--dtype=bfloat16",
                                                                    "--optim.weights=stochastic_rounding"]])
def test_a_replay_overwrites_no_gradient_that_is_still_needed(tiny_run, tmp_path, monkeypatch, keys, batch):
    monkeypatch.setattr(cudagraph, "require", lambda *_: None)
    monkeypatch.setattr(cudagraph, "GraphedPass", PretendGraph)
    for graph in (False, True):
        train_here(*tiny_run, *FP8, *keys, "--fp8.stats_interval=4", "--checkpoint_interval=0",
                   f"--micro_batch_size={batch}", f"--cuda_graph={graph}", f"--out_dir={tmp_path / str(graph)}")
    assert exact(metrics(tmp_path / "True")) == exact(metrics(tmp_path / "False"))


def test_four_ranks_train_as_one_does(fleet, tiny_run, tmp_path):
    runs = {"fp32": [], "fp8_precompute": [*FP8, *PRECOMPUTE], "hsdp_2x2": [*FP8, *PRECOMPUTE, "--replicas=2"]}
    runs = {name: [*tiny_run, "--micro_batch_size=2", *keys] for name, keys in runs.items()}
    one, four = fleet[0], run_many(tmp_path, runs, ranks=4)
    assert largest_gap(four["fp32"], one["fp32"]) < FLOAT_NOISE
    assert largest_gap(four["fp8_precompute"], one["fp8_precompute"]) < FP8_NOISE
    assert largest_gap(four["hsdp_2x2"], one["fp8_precompute"]) < FP8_NOISE


def test_fp8_stays_close_to_high_precision(fleet):
    for runs in fleet:
        for name in ("fp8", "rowwise", "gw_hp"):
            gap = largest_gap(runs[name], runs["fp32"])
            assert 1e-6 < gap < 2 * FP8_NOISE, name  # not zero either: FP8 was on


def test_tied_embeddings_stay_tied_under_fsdp(fleet):
    one, two = fleet
    assert largest_gap(two["tied_fp8"], one["tied"]) < 2 * FP8_NOISE


def test_ranks_with_unequal_numbers_of_targets_weigh_every_token_the_same(fleet):
    one, two = fleet
    assert largest_gap(two["unequal"], one["unequal"]) < FLOAT_NOISE


@pytest.fixture(scope="module")
def sent(tiny_run, tmp_path_factory):
    """{name: {collective: bytes that rank 0 passed to it in step 2}}, counted from the collectives that ran."""
    folder = tmp_path_factory.mktemp("sent")
    runs = {name: [*tiny_run, *keys, *BF16, "--max_steps=2", "--eval_interval=0", "--checkpoint_interval=0",
                   f"--out_dir={folder / name}"]
            for name, keys in {"bf16": [], "fp8": FP8, "fp8_gather": [*FP8, *PRECOMPUTE]}.items()}
    script = folder / "counted.py"
    script.write_text(textwrap.dedent(f"""
            import json, os, sys
            sys.path.insert(0, {str(REPO)!r})
            import torch
            import train
            from plumbing import entry, fp8_weights
            from torch.utils._python_dispatch import TorchDispatchMode
            sent = {{}}
            class Count(TorchDispatchMode):
                def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                    if func.namespace == "c10d":
                        tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
                        name = func._schema.name.removeprefix("c10d::").strip("_")
                        sent[name] = sent.get(name, 0) + max(t.nbytes for t in tensors)
                    return func(*args, **(kwargs or {{}}))
            step, counted = train.AdamW.step, {{}}
            def stop(self, *args):
                counted[name] = sent.copy()
                sent.clear()
                step(self, *args)
            train.AdamW.step = stop
            for name, argv in {runs!r}.items():
                sys.argv = ["train.py", *argv]
                with Count():
                    train.main()
            if os.environ["RANK"] == "0":
                print("sent", json.dumps(counted))
            entry.leave()
            """))
    return json.loads(run(script, ranks=2).stdout.split("sent ", 1)[1].splitlines()[0])


@pytest.mark.parametrize("name, weight_bytes", [("bf16", 2), ("fp8", 2), ("fp8_gather", 1)])
def test_bytes_that_cross_ranks_in_a_step(sent, name, weight_bytes):
    """All-gather in FP8 sends half the bytes of a converted weight."""
    norms, table = 2 * 64, 272 * 64
    linear = (4 + 2 * 2) * 16 * 64 + 64 * 64 + 2 * 128 * 64 + 64 * 128
    blocks, root = 2 * (linear + norms), 2 * table + 64
    # once for forward and once for backward; the root (embedding, last norm, lm_head) stays gathered in between
    assert sent[name]["allgather_base"] == 2 * 2 * (linear * weight_bytes + norms * 2) + 2 * root
    assert sent[name]["reduce_scatter_base"] == 4 * (blocks + root)  # gradients are summed in float32


BREAK = {  # what goes wrong, and what train.py must say about it
    "gathers_in_high_precision": ("""
cls.fsdp_pre_all_gather = lambda self, mesh: ((self._tensor,), ())
cls.fsdp_post_all_gather = lambda self, gathered, meta, dtype, *, out=None: None if out is not None else (
    gathered[0], gathered)""", "is on, but these weights were gathered as layers.0.attn.qkv: torch.float32"),
    "loses_the_wrapper": ("""
fp8.nn = SimpleNamespace(**vars(fp8.nn))
fp8.nn.Parameter = lambda w, requires_grad: torch.nn.Parameter(w._tensor)""",
                          "configured: layers.0.attn.qkv would be gathered in high precision, "),
    "never_precomputes": ("""
fp8.prepare_weights = lambda *args, **kwargs: None""", "configured: layers.0.attn.qkv has no precomputed scale, "),
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sharded_run_that_is_not_fp8_as_asked_stops(tiny_run, tmp_path, ranks):
    script = tmp_path / "broken.py"
    script.write_text(textwrap.dedent(f"""
            import sys
            sys.path.insert(0, {str(REPO)!r})
            import torch
            import fp8
            import train
            from plumbing import entry, fp8_weights
            from types import SimpleNamespace
            cls, told = fp8_weights.GatherInFP8, {{}}
            kept = [(place, dict(vars(place))) for place in (cls, fp8)]
            for name, (breakage, _) in {BREAK!r}.items():
                exec(breakage)
                try:
                    train.main()
                except RuntimeError as error:
                    told[name] = str(error)
                for place, names in kept:
                    for key in ("fsdp_pre_all_gather", "fsdp_post_all_gather", "nn", "prepare_weights"):
                        if key in names:
                            setattr(place, key, names[key])
            if torch.distributed.get_rank() == 0:
                print("told", told)
            entry.leave()
            """))
    done = run(script, *tiny_run, *FP8, *PRECOMPUTE, *ONE_SHARD, f"--out_dir={tmp_path / 'out'}", ranks=ranks)
    told = ast.literal_eval(done.stdout.split("told ", 1)[1].splitlines()[0])
    assert list(told) == list(BREAK) and not list((tmp_path / "out").glob("*"))
    for name, (_, expected) in BREAK.items():
        assert expected in told[name]


# ----------------------------------------------------------------------------------------------------------------
# resume


DEATHS = {  # the same run in a process that dies
    "at_step_5": """
sys.argv.append("--async_checkpoint=False")  # step 3 is saved by then
step = train.AdamW.step
def die(self, *args):
    step(self, *args)
    os._exit(9) if self.step_count == 5 else None
train.AdamW.step = die""",
    "saving_step_6": """
from plumbing import storage
flush = storage.flush
def die(path):
    os._exit(9) if "step_00000006" in str(path) else flush(path)
storage.flush = die"""}


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """A run of 6 steps that nothing interrupted, and runs that died, are resumed, or repeat its resolved config.

    Tensorwise FP8, compiled into graphs that `fleet` has compiled before: (arguments, folder, {name: metrics}, {name:
    what its dead process left}).
    """
    folder = tmp_path_factory.mktemp("finished")
    args = [*tiny_run, *FP8, *COMPILE]
    left = {}
    for name, die in DEATHS.items():
        script = folder / f"{name}.py"
        script.write_text(f"import os, sys\nsys.path.insert(0, {str(REPO)!r})\nimport checkpoint, train\n{die}\n"
                          "train.main()\n")
        dead = run(script, *args, f"--out_dir={folder / name}", check=False)
        assert dead.returncode == 9, dead.stderr
        left[name] = (list(metrics(folder / name).train),
                      sorted(path.name for path in (folder / name / "checkpoints").iterdir()))
    (folder / "same.py").write_text(main_here(train.main, *args, "--print_config")[1])
    runs = run_many(folder, {"whole": args, **dict.fromkeys(DEATHS, args), "repeated": [folder / "same.py"]})
    return args, folder, runs, left


def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(finished):
    _, _, runs, left = finished
    # the first process died at step 5, after the checkpoint of step 3 and two more logged steps
    assert left["at_step_5"] == ([1, 2, 3, 4], ["step_00000003"])
    assert "resuming from" in runs["at_step_5"].text and "3 steps done" in runs["at_step_5"].text
    assert exact(runs["at_step_5"]) == exact(runs["whole"])


def test_killed_while_saving_leaves_the_checkpoint_before(finished):
    _, folder, runs, left = finished
    assert left["saving_step_6"][1] == ["step_00000003", "step_00000006.tmp"]
    assert "3 steps done" in runs["saving_step_6"].text
    checkpoints = (folder / "saving_step_6" / "checkpoints").iterdir()
    assert sorted(path.name for path in checkpoints) == ["step_00000003", "step_00000006"]
    assert exact(runs["saving_step_6"]) == exact(runs["whole"])


def test_the_resolved_config_repeats_the_run(finished):
    _, _, runs, _ = finished
    assert exact(runs["repeated"]) == exact(runs["whole"])


def test_resume_on_two_ranks_and_back_on_one(fleet, tiny_run, capsys):
    one, two = fleet  # the first two steps on one rank, the next two on two
    assert "2 steps done" in two["moving"].text
    train_here(*tiny_run, *FP8, *PRECOMPUTE, FLAT, "--max_steps=6", f"--out_dir={two['moving'].out_dir}")
    assert "4 steps done" in capsys.readouterr().out
    whole, parts = one["stays"], metrics(two["moving"].out_dir)
    assert list(parts.train) == [1, 2, 3, 4, 5, 6]
    assert all(abs(a - b) < FP8_NOISE * b for a, b in zip(losses(parts), losses(whole), strict=True))


ROUNDING = ["--dtype=bfloat16", "--optim.weights=stochastic_rounding"]


@pytest.mark.parametrize("keys", [BF16, ROUNDING, [*ROUNDING, "--optim.fp8_moments=True"]],
                         ids=["fp32_master", "stochastic_rounding", "fp8_moments"])
def test_resumed_bf16_run_is_bit_for_bit_the_uninterrupted_one(tiny_run, tmp_path, capsys, keys):
    args = [*tiny_run, *FP8, *keys]
    train_here(*args, f"--out_dir={tmp_path / 'whole'}")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000006")
    capsys.readouterr()
    train_here(*args, f"--out_dir={tmp_path / 'again'}")
    assert "3 steps done" in capsys.readouterr().out
    assert exact(metrics(tmp_path / "again")) == exact(metrics(tmp_path / "whole"))
    if keys != BF16:
        other = str("--optim.fp8_moments=True" not in keys)
        with pytest.raises(ValueError, match="other optimizer states: set optim.fp8_moments as the run did"):
            train_here(*args, f"--optim.fp8_moments={other}", "--max_steps=7", f"--out_dir={tmp_path / 'again'}")


@pytest.mark.parametrize("first, then", [(FP8, []), ([], FP8)], ids=["fp8_to_bf16", "bf16_to_fp8"])
def test_fp8_and_bf16_runs_read_each_others_checkpoints(tiny_run, tmp_path, capsys, first, then):
    out = [f"--out_dir={tmp_path / 'out'}", *BF16, FLAT]
    train_here(*tiny_run, *first, *out, "--max_steps=3")
    capsys.readouterr()
    train_here(*tiny_run, *then, *out, "--max_steps=6")
    assert "3 steps done" in capsys.readouterr().out
    assert losses(metrics(tmp_path / "out"))[-1] < losses(metrics(tmp_path / "out"))[2]


def test_keep_and_resume_keys(tiny_run, tmp_path, capsys):
    out = [*tiny_run, f"--out_dir={tmp_path / 'out'}"]
    folder = tmp_path / "out" / "checkpoints"

    def told(*keys):
        capsys.readouterr()
        train_here(*out, *keys)
        return capsys.readouterr().out

    with pytest.raises(ValueError, match="holds no checkpoint"):
        train_here(*out, "--resume=must")
    told("--checkpoint_interval=1", "--keep=2")
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000005", "step_00000006"]
    assert "has 6 of 6 steps, now with checkpoint_interval=3 instead of 1. Raise max" in told()
    with pytest.raises(ValueError, match="differs from this run in model, seed, now with .*seed=3 instead of 1337, .*"
                                         "model.n_layer=1 instead of 2: resuming.*Set another out_dir"):
        told("--model.n_layer=1", "--seed=3")
    changed = told("--checkpoint_interval=1", "--keep=2", "--max_steps=7", "--optim.lr=1e-3")
    assert "6 steps done, now with max_steps=7 instead of 6, optim.lr=0.001 instead of " in changed
    assert "resuming" not in (fresh := told("--resume=never", "--max_steps=2"))
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000002"]  # what was there is set aside, not mixed in
    earlier = tmp_path / "out" / "earlier_1"
    assert f"is now in {earlier}" in fresh and checkpoint.open_run(earlier)[0].name == "step_00000007"
    assert list(metrics(tmp_path / "out").train) == [1, 2] and list(metrics(earlier).train)[-1] == 7
    assert (earlier / "loss.png").is_file() and (earlier / "run.json").is_file()
    with pytest.raises(ValueError, match="differs from this run in seed.*resume=never"):
        train_here(*out, "--seed=5")
    (folder / "step_00000002" / "run.json").write_text('{"st')
    with pytest.raises(ValueError, match=r"all checkpoints in .* are damaged: step_00000002 \(run.json\)"):
        train_here(*out)


def test_metrics_let_one_run_in_and_survive_a_row_cut_in_half(tmp_path):
    logs.check_unused(tmp_path / "new")
    with logs.open_metrics(tmp_path) as file:
        assert logs.continue_metrics(file, 0) is None
        file.write('{"step": 1}\n{"step": 2}\n{"st')
        file.flush()
        assert logs.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
        for enter in (logs.check_unused, logs.open_metrics):
            with pytest.raises(UserError, match=f"another run is writing to {tmp_path}: wait until it ends"):
                enter(tmp_path)
    logs.check_unused(tmp_path)
    with logs.open_metrics(tmp_path) as file:
        logs.continue_metrics(file, 1)
    assert logs.read_metrics(tmp_path) == [{"step": 1}]


@pytest.mark.parametrize("line", [b"\0\0", b"xx", b"\xff", b""])
def test_a_damaged_line_of_the_metrics_is_named(tmp_path, line):
    tmp_path.joinpath("metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with logs.open_metrics(tmp_path) as file, pytest.raises(UserError, match="line 2 is not JSON .*: delete that line"):
        logs.continue_metrics(file, 1)


def test_a_run_that_starts_beside_another_is_refused_at_once_and_changes_nothing(tiny_run, tmp_path, capsys,
                                                                                monkeypatch):
    args = [*tiny_run, f"--out_dir={tmp_path}"]
    with logs.open_metrics(tmp_path):
        with pytest.raises(UserError, match="another run is writing"):
            train_here(*args)
    assert "first pass" not in capsys.readouterr().out
    train_here(*args, "--max_steps=2", "--checkpoint_interval=2")
    rows = (tmp_path / "metrics.jsonl").read_text()
    latest, calls = checkpoint.latest, []
    # as if all of that run had happened while this one compiled: at its start it found no checkpoint
    monkeypatch.setattr(checkpoint, "latest", lambda folder: latest(folder) if calls else calls.append(folder))
    with pytest.raises(UserError, match="another run has saved in .* since this one started: start again"):
        train_here(*args)
    assert (tmp_path / "metrics.jsonl").read_text() == rows and not (tmp_path / "earlier_1").exists()


def test_a_run_without_checkpoints_is_set_aside_too(tiny_run, tmp_path):
    for n in range(3):
        train_here(*tiny_run, f"--out_dir={tmp_path}", "--max_steps=1", "--checkpoint_interval=0", f"--seed={n}")
    for n, folder in enumerate((tmp_path / "earlier_1", tmp_path / "earlier_2", tmp_path)):
        assert configurator.read_file(folder / "config.py").seed == n and list(metrics(folder).train) == [1]


def test_a_checkpoint_knows_the_time_since_the_last_log_line(tiny_run, tmp_path):
    train_here(*tiny_run, "--max_steps=3", "--log_interval=100", "--checkpoint_interval=2", f"--out_dir={tmp_path}")
    first, last = (row["time_s"] for row in metrics(tmp_path).train.values())
    kept = json.loads((tmp_path / "checkpoints" / "step_00000002" / "run.json").read_text())["time_s"]
    assert first < kept < last


# ----------------------------------------------------------------------------------------------------------------
# numbers that are reported, computed another way


def test_speed_per_rank_times_ranks_is_all_tokens_over_the_time(fleet):
    for n_ranks, runs in enumerate(fleet, 1):
        rows = list(runs["fp32"].train.values())
        for earlier, row in zip(rows, rows[1:], strict=False):
            elapsed = row["time_s"] - earlier["time_s"]
            assert row["tokens_per_s"] * elapsed * n_ranks == pytest.approx(8 * 64)
            assert row["tokens"] - earlier["tokens"] == 8 * 64
        record = json.loads((runs["fp32"].out_dir / "run.json").read_text())
        hardware = f"{n_ranks} x CPU with 1 threads"
        assert (record["ranks"], record["hardware"]) == (n_ranks, hardware)
        text = f"micro-batch 4 x length 64 x ranks {n_ranks} x accumulation {2 // n_ranks} = 512 tokens"
        assert f"nanofp8 on {hardware}, torch {torch.__version__}, float32\n" in runs["fp32"].text
        assert text in runs["fp32"].text


def test_the_first_row_is_that_of_a_loop_written_with_torch(tiny_run, tmp_path, corpus, capsys):
    """Loss, gradient norm, learning rate, validation loss, MFU and FLOPs of a run, each from its definition."""
    args = [*tiny_run, "--eval_sequences=0", "--eval_interval=1", "--max_steps=1", "--optim.warmup_steps=0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "bf16_peak", lambda hardware: 1e9)
        train_here(*args, "--micro_batch_size=2", f"--out_dir={tmp_path / 'run'}")
    row, screen = metrics(tmp_path / "run").train[1], capsys.readouterr().out
    config = configurator.read_file(tmp_path / "run" / "config.py")
    rows, val_rows, _ = data.prepare(config.data, 64, config.seed)
    model = build(seed=config.seed)
    x, y, _ = data.Loader(rows, global_batch_size=8, micro_batch_size=8, seed=config.seed).batch(0)
    loss = torch.nn.functional.cross_entropy(model(x[0]).flatten(0, 1), y[0].flatten())
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(grad_norm.item(), rel=1e-4)

    torch.optim.AdamW(model.parameters(), lr=row["lr"], betas=config.optim.betas,
                      eps=config.optim.eps, weight_decay=config.optim.weight_decay).step()
    x, y = (torch.from_numpy(np.stack(part)) for part in list(zip(*map(val_rows.row, range(val_rows.n_rows)),
                                                                  strict=True))[:2])
    with torch.no_grad():
        val_loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE)
    # norms and biases are not decayed here, and all weights are there: less than the bound in one step
    assert metrics(tmp_path / "run").val[1] == pytest.approx(val_loss.item(), rel=1e-3)

    record = json.loads((tmp_path / "run" / "run.json").read_text())
    weights = 2 * ((4 + 2 * 2) * 16 * 64 + 64 * 64 + 3 * 64 * 128) + 272 * 64  # qkv, out, gate, up, down; lm_head
    keys_per_query = 64 / 2  # causal
    flops = 3 * 2 * (weights + 2 * 2 * 64 * keys_per_query)  # 2 layers, q k^T and p v, of 64 wide heads together
    assert record["flops_per_token"] == pytest.approx(flops) and record["fp8_flops"] == 0
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * flops / 1e9)
    assert (record["ranks"], record["block_size"], record["tokens_per_step"]) == (1, 64, 8 * 64)
    assert (record["peak_flops"], record["auto_filtered"]) == (1e9, None)
    assert record["command"] == ["train.py", *args, "--micro_batch_size=2", f"--out_dir={tmp_path / 'run'}"]
    assert f"first pass: {record['compile_s']:.1f} s" in screen and record["hardware"].startswith("1 x CPU with ")
    n_params = sum(p.numel() for p in model.parameters())
    for part in (f"model: {n_params:,} parameters", "micro-batch 2 x length 64 x ranks 1 x accumulation 4 = 512",
                 f"step 1/1 | loss {loss:.4f} | lr {row['lr']:.2e} | grad norm {grad_norm:.3f} | "
                 f"{row['tokens_per_s']:,.0f} tok/s per rank | MFU {row['mfu']:.1%} of bf16 peak | "
                 f"{row['peak_gib']:.2f} GiB\n", f"validation loss {metrics(tmp_path / 'run').val[1]:.4f}",
                 "done: 1 steps, 512 tokens in"):
        assert part in screen, part


def test_time_epochs_and_memory_on_the_screen_are_those_of_the_whole_run(tiny_run, tmp_path, capsys, monkeypatch):
    seconds = itertools.count(1000, 50)  # each look at the clock takes 50 s
    monkeypatch.setattr(Ranks, "now", lambda self: next(seconds))
    monkeypatch.setattr(estimate, "memory", lambda *_: 12.34)
    monkeypatch.setattr(estimate, "host_memory", lambda *_: (3.21, 0.5))
    args = [*tiny_run, f"--out_dir={tmp_path}", FLAT]
    train_here(*args, "--max_steps=3")
    saved = json.loads((tmp_path / "checkpoints" / "step_00000003" / "run.json").read_text())["time_s"]
    assert saved >= metrics(tmp_path).train[3]["time_s"] >= 150
    capsys.readouterr()
    train_here(*args, "--max_steps=6")
    rows, screen = metrics(tmp_path).train, capsys.readouterr().out
    assert rows[4]["time_s"] >= saved + 50 and rows[6]["time_s"] > rows[5]["time_s"] + 49
    config = configurator.read_file(tmp_path / "config.py")
    n_rows = data.prepare(config.data, 64, config.seed)[0].n_rows
    for part in (f"; 6 steps see {6 * 8 / n_rows:.2f} epochs\n", "parameters, 12.3 GiB estimated per rank with",
                 "activations, and 3.7 GiB of host memory\n",
                 f"done: 6 steps, {6 * 512:,} tokens in {rows[6]['time_s'] / 60:.1f} min, validation loss"):
        assert part in screen, part


def test_what_fp8_covers_is_the_same_on_the_screen_and_in_the_record(tiny_run, tmp_path, capsys):
    train_here(*tiny_run, *FP8, "--max_steps=1", f"--out_dir={tmp_path}")
    record, screen = json.loads((tmp_path / "run.json").read_text()), capsys.readouterr().out
    blocks, head = 2 * ((4 + 2 * 2) * 16 * 64 + 64 * 64 + 3 * 64 * 128), 272 * 64
    share = 6 * blocks / (6 * (blocks + head) + 3 * 2 * 2 * 2 * 64 * 64 / 2)  # q k^T and p v of 2 layers, causal
    assert record["fp8_flops"] == pytest.approx(share)
    n_params = blocks + 2 * head + 5 * 64  # embedding and lm_head, norms
    assert f"covers {blocks / n_params:.1%} of parameters, {share:.1%} of matmul FLOPs" in screen


def test_the_learning_rate_in_the_metrics_is_the_one_that_is_used_from_step_1(tiny_run, tmp_path, monkeypatch):
    used, step = [], AdamW.step

    def spy(self, lr, *args):
        used.append(lr)
        step(self, lr, *args)

    monkeypatch.setattr(AdamW, "step", spy)
    train_here(*tiny_run, "--optim.min_lr=0.001", f"--out_dir={tmp_path}")
    # 2 steps of warm-up to 0.003, then a cosine over 4 steps to 0.001
    cosine = [0.001 + 0.002 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(5)]
    assert used == pytest.approx([0.0015, 0.003, *cosine[1:]])
    assert [row["lr"] for row in metrics(tmp_path).train.values()] == used


# ----------------------------------------------------------------------------------------------------------------
# checks that stop a run


def test_other_data_is_another_run(tiny_run, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "text")
    args = [*tiny_run, f'--data.train=["{tmp_path / "text"}"]', f"--out_dir={tmp_path / 'out'}"]
    train_here(*args, "--max_steps=3")
    text = (tmp_path / "text" / "00.py").read_text()
    (tmp_path / "text" / "00.py").write_text("X" + text[1:])  # as long as before
    with pytest.raises(UserError, match="step_00000003 differs from this run in data.*: resuming would not continue"):
        train_here(*args)
    (tmp_path / "text" / "00.py").write_text(text)
    train_here(*args)


def test_another_global_batch_is_another_run(tiny_run, tmp_path):
    args = [*tiny_run, f"--out_dir={tmp_path}"]
    train_here(*args, "--max_steps=1", "--eval_interval=0")
    with pytest.raises(UserError, match="differs from this run in global_batch_size, .*global_batch_size=4 instead"):
        train_here(*args, "--global_batch_size=4")


def test_replicas_must_divide_the_ranks(tiny_run, tmp_path):
    with pytest.raises(UserError, match="replicas=2 must divide the number of ranks, 1"):
        train_here(*tiny_run, "--replicas=2", f"--out_dir={tmp_path}")


def test_a_weight_that_nothing_fills_stops_the_run(tiny_run, tmp_path, monkeypatch):
    init_weights = models.init_weights

    def forget(model, seed):
        with torch.no_grad():
            lost = model.layers[1].mlp.down.weight.clone()
            init_weights(model, seed)
            model.layers[1].mlp.down.weight.copy_(lost)

    monkeypatch.setattr(models, "init_weights", forget)
    with pytest.raises(AssertionError, match="layers.1.mlp.down.weight"):
        train_here(*tiny_run, f"--out_dir={tmp_path}")


# ----------------------------------------------------------------------------------------------------------------
# what a run leaves behind


def test_a_run_leaves_everything_that_is_promised(finished):
    _, folder, runs, _ = finished
    m, out = runs["whole"], folder / "whole"
    assert set(m.train[1]) == {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "mfu", "peak_gib", "time_s"}
    assert m.train[6]["tokens"] == 6 * 8 * 64 and sorted(m.val) == [3, 6]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    recorded = json.loads((out / "run.json").read_text())
    assert set(recorded["versions"]) == {"torch", "torchao", "tiktoken", "numpy"} and recorded["git_commit"]
    config = configurator.read_file(out / "config.py")
    assert config.model.n_embd == 64 and config.fp8.filter_fqns == ["lm_head"]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_00000003", "step_00000006"]


def test_screen_shows_the_run(tiny_run, tmp_path, capsys):
    train_here(*tiny_run, *FP8, f"--out_dir={tmp_path / 'out'}")
    text = capsys.readouterr().out
    for part in ("fp8: 8 of 9 linear layers converted", "lm_head", "float32: fp8.filter_fqns", "of parameters",
                 "of matmul FLOPs", "GiB estimated", "training and", "micro-batch 4 x length 64",
                 "24 emulated fp8 matmuls ran", "step 6/6 | loss", "tok/s", "MFU n/a", "validation loss",
                 f"python sample.py --from={tmp_path / 'out'}"):
        assert part in text, part


def test_bf16_trains_where_torchao_is_not_installed(tiny_run, tmp_path):
    script = tmp_path / "without.py"
    script.write_text(textwrap.dedent(f"""
            import sys
            sys.path.insert(0, {str(REPO)!r})
            class NoTorchao:
                def find_spec(self, name, path=None, target=None):
                    if name.split(".")[0] == "torchao":
                        raise ModuleNotFoundError(name)
            import importlib.metadata, importlib.util
            sys.meta_path.insert(0, NoTorchao())
            find = importlib.util.find_spec
            importlib.util.find_spec = lambda name, *rest: None if name == "torchao" else find(name, *rest)
            import train
            train.main()
            """))
    run(script, *tiny_run, f"--out_dir={tmp_path / 'out'}", "--max_steps=2")
    assert "torchao" not in json.loads((tmp_path / "out" / "run.json").read_text())["versions"]


def test_sample_continues_the_prompt_and_repeats_with_the_seed(finished):
    args = [f"--from={finished[1] / 'whole'}", "--prompt=def f", "--max_new_tokens=40"]
    first, again, other = (main_here(sample.main, *args, f"--seed={seed}")[:2] for seed in (1, 1, 2))
    assert first[0] == 0 and first[1].startswith("def f") and len(first[1]) > 30
    assert again == first != other


def test_sample_tells_what_it_cannot_take(finished):
    wrong = ["--temperature=nan", "--top_k=-1", "--max_new_tokens=-2", "--seed=9223372036854775808"]
    status, _, told = main_here(sample.main, f"--from={finished[1] / 'whole'}", *wrong)
    lines = told.removeprefix("sample.py: ").splitlines()
    assert status == 2 and sorted(line.split(" must")[0] for line in lines) == sorted(wrong)


def test_sample_tells_of_a_prompt_that_the_model_has_no_tokens_for(finished, monkeypatch, wide):
    monkeypatch.setattr(sample, "get_tokenizer", lambda _: wide)
    status, _, told = main_here(sample.main, f"--from={finished[1] / 'whole'}", "--prompt=def")
    assert status == 2 and "model.vocab_size=" in told


def test_a_kill_while_metrics_are_cut_loses_no_row(tmp_path, monkeypatch):
    rows = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3, 4, 5))
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 6, "lo')
    written = []
    monkeypatch.setattr(Path, "write_text", lambda *args: written.append(args))
    monkeypatch.setattr(Path, "write_bytes", lambda *args: written.append(args))
    with logs.open_metrics(tmp_path) as file:
        logs.continue_metrics(file, 3)
        file.write('{"step": 4}\n')
    assert not written and [row["step"] for row in logs.read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "metrics.jsonl").read_text().startswith(rows[:rows.index('{"step": 4')])


def test_a_damaged_config_of_an_earlier_run_is_no_reason_to_stop(tiny_run, tmp_path, capsys):
    train_here(*tiny_run, f"--out_dir={tmp_path}", "--max_steps=3")
    (tmp_path / "config.py").write_text("")
    train_here(*tiny_run, f"--out_dir={tmp_path}", "--max_steps=4")
    assert "3 steps done (cannot compare with the earlier config: " in capsys.readouterr().out
    assert configurator.read_file(tmp_path / "config.py").max_steps == 4
    assert not list(tmp_path.glob("*.tmp"))


def test_more_ranks_than_gpus_are_told(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="a rank for GPU 1, but there are 1: start no more ranks than there are GPUs"):
        train_here(*tiny_run, f"--out_dir={tmp_path}", "--device=cuda")


def test_a_finished_run_started_with_other_keys_says_which(tiny_run, tmp_path):
    train_here(*tiny_run, f"--out_dir={tmp_path}", "--max_steps=1")
    status, told, _ = main_here(train.main, *tiny_run, f"--out_dir={tmp_path}", "--max_steps=1", "--optim.lr=0.5")
    assert status == 0 and "has 1 of 1 steps, now with optim.lr=0.5 instead of 0.003. Raise max_steps" in told


@pytest.mark.parametrize("split", ["train", "val", "questions"])
def test_tokens_that_the_model_lacks_are_told_before_training(tiny_run, tmp_path, monkeypatch, split):
    init, args = token_format.Tokens.__init__, [*tiny_run, f"--out_dir={tmp_path / 'out'}", "--model.vocab_size=272"]

    def with_largest(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.largest = 300 if split == ("val" if len(self) < 10000 else "train") else 255

    monkeypatch.setattr(token_format.Tokens, "__init__", with_largest)
    if split == "questions":
        monkeypatch.setattr(hellaswag, "questions", lambda _: ([], [{"query": "a", "endings": ["b"]}]))
        monkeypatch.setattr(hellaswag, "encode", lambda *_: (np.array([1, 300]), 1, 0))
        args.append("--eval_hellaswag_items=1")
    status, out, told = main_here(train.main, *args)
    assert status == 2 and "token id 300, beyond model.vocab_size=272" in told and "step 1" not in out


def test_sample_from_a_folder_without_a_run_is_one_line(tmp_path):
    done = run("sample.py", f"--from={tmp_path}", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "holds no checkpoint" in done.stderr


# ----------------------------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize("args, told", [
    (["--max_stepz=3"], "max_steps"),
    (["--global_batch_size=6"], "global_batch_size=6 must be a multiple of micro_batch_size x ranks = 4 x 1 = 4"),
    ([*FP8[:1]], "set fp8.emulate=True"),
    ([*FP8, '--fp8.filter_fqns=["typo"]'], "'typo' matches no linear layer"),
    (['--data.train=["/nowhere"]'], "matches no file"),
    (["--model.vocab_size=256", "--fp8.enabled=False"], "token id 256, beyond model.vocab_size=256"),
    (["--device=cuda"], "no GPU"),
    (["--init_from=/nowhere"], "/nowhere is no Hugging Face model folder"),
    (["config/llama_fp9.py"], "did you mean config/llama_fp8.py"),
])
def test_a_users_mistake_is_one_message_and_no_traceback(tiny_run, tmp_path, args, told):
    """Through the entry point, in this process; test_recipes.py sees the same of a process of its own."""
    status, _, error = main_here(train.main, *tiny_run, f"--out_dir={tmp_path / 'out'}", *args)
    assert status == 2 and error.startswith("train.py: ") and told in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_under_torchrun_the_message_comes_once(tiny_run, tmp_path):
    done = run("train.py", *tiny_run, "--micro_batch_size=8", f"--out_dir={tmp_path / 'out'}", ranks=2, check=False)
    assert done.returncode != 0
    told = "global_batch_size=8 must be a multiple of micro_batch_size x ranks = 8 x 2 = 16"
    assert done.stderr.count(told) == 1 and "entry.py" not in done.stderr  # torchrun adds a report of its own


def test_diverged_training_stops_and_says_so(tiny_run, tmp_path):
    status, _, error = main_here(train.main, *tiny_run, "--optim.lr=1e30", "--optim.grad_clip=0",
                                 f"--out_dir={tmp_path / 'out'}")
    assert status == 1 and error.startswith("train.py: step 2: loss ") and "Lower optim.lr" in error
    assert "Traceback" not in error
    assert not list((tmp_path / "out").glob("checkpoints/*"))



@pytest.mark.parametrize("reshards, gathers", [(False, 1), (True, 4)], ids=["kept", "freed"])
def test_kept_weights_are_gathered_once_for_all_passes_of_a_step(reshards, gathers, tiny_run, tmp_path, monkeypatch):
    seen, cast = [], fp8_weights.one_pass_cast
    monkeypatch.setattr(fp8_weights, "one_pass_cast", lambda x, *args: seen.append(None) or cast(x, *args))
    keys = [*FP8, *GATHER, *ONE_SHARD, f"--reshard_after_forward={reshards}", "--eval_interval=0",
            "--checkpoint_interval=0", f"--out_dir={tmp_path / 'out'}"]
    train_here(*tiny_run, *keys, "--max_steps=1")
    one_step = len(seen)
    train_here(*tiny_run, *keys, "--max_steps=2", "--resume=never")
    layers = 2 * 4
    assert len(seen) - 2 * one_step == gathers * layers  # forward and backward of each of two passes, if freed


@pytest.mark.parametrize("each_pass, reductions", [(True, 2), (False, 1)])
def test_gradients_are_reduced_after_each_pass_or_once_a_step(each_pass, reductions, tiny_run, tmp_path, monkeypatch):
    seen, reduce = [], fsdp_param_group.foreach_reduce
    monkeypatch.setattr(fsdp_param_group, "foreach_reduce", lambda *args: seen.append(None) or reduce(*args))
    keys = [*ONE_SHARD, f"--reduce_each_pass={each_pass}", "--micro_batch_size=4", "--eval_interval=0",
            "--checkpoint_interval=0", f"--out_dir={tmp_path / 'out'}"]
    train_here(*tiny_run, *keys, "--max_steps=1")
    one_step = len(seen)
    train_here(*tiny_run, *keys, "--max_steps=2", "--resume=never")
    assert len(seen) - 2 * one_step == reductions * 3  # groups: two blocks, and the rest
