"""estimate.py: FLOPs against torch's own counter, memory against what an H100 was measured to need.

And bench/scaling.py: step times on several GPUs against what bench.py measured.
"""

import json
import re
import runpy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, build

import bench
import configurator
import model as models
from checks import estimate
from configurator import CompileConfig, Config, FP8Config, OptimConfig

SCALING = SimpleNamespace(**runpy.run_path(str(REPO / "bench/scaling.py")))

def test_flops_per_token_agree_with_torchs_own_counter():
    from torch.utils.flop_counter import FlopCounterMode

    model = build()
    x = torch.randint(0, 256, (1, 64))
    with FlopCounterMode(display=False) as counter:
        model(x, x).backward()
    linear, _ = estimate.matmul_flops_per_token(model)
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert counts["aten.mm"] == linear * 64


def test_flops_per_token_are_those_of_a_block_that_somebody_changed():
    model = build()
    before, _ = estimate.matmul_flops_per_token(model)
    for layer in model.layers:
        layer.mlp.gate_up = torch.nn.Linear(64, 128, bias=False)  # no gate
    after, _ = estimate.matmul_flops_per_token(model)
    assert before - after == 6 * len(model.layers) * 64 * 128


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
    ("NVIDIA H200 NVL", 835), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA L40S", 362), ("NVIDIA L40", 181),
    ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA RTX 6000 Ada Generation", 364),
    ("CPU with 2 threads", None)])
def test_peak_of_full_device_names(name, tflops):
    assert estimate.bf16_peak(name) == (tflops and tflops * 1e12)


def test_memory_counts_a_block_that_somebody_made_leaner(monkeypatch):
    config = llama_8b(fp8=FP8Config())
    whole = estimate.memory(config, 0, 1)

    class NoGate(models.MLP):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.gate_up = torch.nn.Linear(cfg.n_embd, cfg.ffn_dim, bias=False)

    monkeypatch.setattr(models, "MLP", NoGate)
    m, tokens = config.model, config.model.block_size
    weights, outputs = m.n_layer * m.n_embd * m.ffn_dim, m.n_layer * tokens * m.ffn_dim
    lean = estimate.memory(config, 0, 1)
    assert (whole - lean) * 2**30 == pytest.approx(6 * weights + 2 * outputs)  # weight, moments; saved for backward


def llama_8b(**changes):
    """What config/llama_fp8.py was on one 80 GB card before it had the fast keys."""
    return Config(**{**dict(model=models.llama3_1_8b(), micro_batch_size=1, global_batch_size=1, loss_chunks=4,
                            fp8=FP8Config(enabled=True, filter_fqns=["lm_head"]), activation_checkpoint="selective",
                            optim=OptimConfig(weights="stochastic_rounding")), **changes})


def with_fast_keys(config, **more):
    """What config/llama_fp8.py has today, as far as memory goes."""
    return replace(config, optim=replace(config.optim, fp8_moments=True), activation_checkpoint="none", loss_chunks=1,
                   fp8=replace(config.fp8, keep_casts=True), **more)


def as_variant(config, variant, folder):
    """The config that bench.py trains for a variant."""
    (folder / "config.py").write_text(configurator.to_python(config))
    return configurator.load([str(folder / "config.py"), *bench.flags(variant)])


def measured(*names):
    """[(file, variant, peak GiB)] of every row in docs/results/NAME.json."""
    reports = [(name, json.loads((REPO / f"docs/results/{name}.json").read_text())) for name in names]
    return [(name, row["variant"], row["peak_gib"]) for name, report in reports
            for card in report.get("cards", [report]) for row in card["rows"]]


@pytest.mark.parametrize("name, variant, gib", measured(
    "bench_8_layers", "bench_8_layers_fast", "bench_32_layers_before", "bench_32_layers", "bench_32_layers_fast",
    "bench_llama_8b_fast", "bench_8_layers_fp8_moments", "bench_llama_8b_fast_memory", "bench_h200_llama_8b_fast"))
def test_memory_is_within_5_percent_of_what_bench_measured(name, variant, gib, tmp_path):
    config = llama_8b(compile=CompileConfig(enabled=True))
    if "8_layers" in name:
        config = replace(config, model=models.llama3_1_8b(n_layer=8), activation_checkpoint="none", loss_chunks=1)
    # whose keys are in the config, not in the variant
    if "llama_8b_fast" in name or name in ("bench_8_layers_fast", "bench_8_layers_fp8_moments"):
        config = with_fast_keys(config)
    config = as_variant(config, variant, tmp_path)
    assert estimate.memory(config, shards=0, accumulation=1) == pytest.approx(gib, rel=0.05)


def gathering(**changes):
    """llama_8b with its weights sharded, gathered in FP8."""
    fp8 = FP8Config(enabled=True, filter_fqns=["lm_head"], enable_fsdp_float8_all_gather=True,
                    precompute_float8_dynamic_scale_for_fsdp=True)
    return llama_8b(**{**dict(compile=CompileConfig(enabled=True), fp8=fp8, global_batch_size=2), **changes})


@pytest.mark.parametrize("name, variant, gib", measured(
    "bench_2_gpus", "bench_2_gpus_fast", "bench_2_gpus_llama_8b_fast", "bench_4_gpus_llama_8b_fast"))
def test_memory_of_several_gpus_is_within_5_percent_of_what_bench_measured(name, variant, gib, tmp_path):
    config, shards = gathering(), int(name.split("_")[1])
    if shards == 4:  # enough for float32 masters
        config = replace(config, optim=OptimConfig(weights="fp32_master"))
    if "llama_8b_fast" in name:
        config = with_fast_keys(config, reduce_dtype="bfloat16", reshard_after_forward=False)
    config = as_variant(config, variant, tmp_path)
    assert estimate.memory(config, shards=shards, accumulation=1) == pytest.approx(gib, rel=0.05)


RECIPES = json.loads((REPO / "docs/results/recipes_2_gpus.json").read_text())["recipes"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["config"])
def test_few_activations_put_the_peak_where_gradients_are_reduced(recipe):
    config = configurator.load([str(REPO / f"config/{recipe['config']}.py"), "--global_batch_size=2",
                                "--optim.offload=0"])
    measured = max(row.get("peak_gib", 0) for row in recipe["rows"])
    assert estimate.memory(config, shards=2, accumulation=1) == pytest.approx(measured, rel=0.05)


RECIPES = json.loads((REPO / "docs/results/h200_2_gpus_recipes.json").read_text())["runs"][1:]


@pytest.mark.parametrize("run", RECIPES, ids=lambda run: run["out_dir"])
def test_memory_of_recipes_with_several_passes_over_two_gpus_is_within_5_percent(run):
    _, config, *keys = run["command"]
    config = configurator.load([str(REPO / config), *(key for key in keys if not key.startswith("--data.")),
                                "--optim.offload=0"])
    assert estimate.memory(config, shards=2, accumulation=4) == pytest.approx(run["peak_gib"], rel=0.05)


M = models.llama3_1_8b()
TABLE, MLP = M.vocab_size * M.n_embd, 3 * M.n_layer * M.n_embd * M.ffn_dim


@pytest.mark.parametrize("change, base, shards, passes, values", [
    # at the end of backward, where every block is recomputed: both tables' reduction, or that of the one
    ({"reduce_dtype": "bfloat16"}, {"activation_checkpoint": "full"}, 2, 1, -2 * 2 * TABLE),
    ({"model": models.llama3_1_8b(tie_embeddings=True)}, {"activation_checkpoint": "full"}, 2, 1,
     -(3 + 1) * TABLE - (2 + 2 + 4) * TABLE),  # 8 bytes, half of them on this rank: weight, gradient, moments
    # where the partitioner keeps transposed copies of the MLP's weights, and where it does not
    ({"compile": CompileConfig(enabled=False)}, {"activation_checkpoint": "none"}, 2, 1, -MLP),
    ({"reshard_after_forward": False}, {}, 2, 1, (M.n_layer - 2) * (MLP // M.n_layer + 2 * M.n_embd * 2 +
                                                                   M.n_embd * (6144 + 4096))),
    # more state, float32 sums of earlier passes and this pass's own gradients, where bf16 ones add up in place
    ({"optim": OptimConfig(weights="fp32_master")},
     {"activation_checkpoint": "full", "model": models.llama3_1_8b(block_size=256), "loss_chunks": 1}, 0, 2,
     (14 - 6 + 6 - 2) * 8030261248),
    # whole gradients in the dtype of the reduction wait for the last pass, where shards of bf16 added up
    ({"reduce_each_pass": False}, {"reduce_dtype": "bfloat16"}, 2, 2, (2 - 1) * 8030261248),
    ({"reduce_each_pass": False}, {}, 2, 2, (4 - 1) * 8030261248),
    ({"reduce_each_pass": False}, {}, 2, 1, 0),
])
def test_what_a_key_changes_is_exact(change, base, shards, passes, values):
    before = gathering(**base)
    found = estimate.memory(replace(before, **change), shards, passes) - estimate.memory(before, shards, passes)
    assert found * 2**30 == pytest.approx(values, rel=5e-3)


def test_forced_recompute_keeps_no_transposed_weights():
    kept = estimate.memory(config := gathering(activation_checkpoint="none"), 2, 1)
    config.fp8.force_recompute_fp8_weight_in_bwd = True
    assert (kept - estimate.memory(config, 2, 1)) * 2**30 == pytest.approx(MLP)


def test_a_head_in_fp8_is_gathered_in_fp8():
    config = gathering()
    whole = estimate.memory(config, 2, 1)
    config.fp8.filter_fqns = []
    assert (whole - estimate.memory(config, 2, 1)) * 2**30 == pytest.approx(TABLE)


def test_keys_of_sharded_runs_are_offered_where_they_help(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=40 * 2**30))
    gpu = SimpleNamespace(type="cuda")
    with pytest.raises(ValueError, match=r"reshard_after_forward=True \(\d+.\d\)") as told:
        estimate.check_memory(gathering(reshard_after_forward=False), 2, 1, gpu)
    assert "reduce_dtype" not in str(told.value) and "force_recompute" not in str(told.value)
    with pytest.raises(ValueError, match=r"fp8.force_recompute_fp8_weight_in_bwd=True \(\d+.\d\)"):
        estimate.check_memory(gathering(activation_checkpoint="none"), 2, 1, gpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=32 * 2**30))
    with pytest.raises(ValueError, match=r"reduce_dtype=bfloat16 \(\d+.\d\)"):  # the peak is where they are reduced
        estimate.check_memory(gathering(activation_checkpoint="full"), 2, 1, gpu)


def test_only_casts_that_fp8_makes_are_kept_and_letting_them_go_is_offered(monkeypatch):
    def gib(**keys):
        return estimate.memory(llama_8b(fp8=FP8Config(enabled=True, **keys)), 0, 1)

    m, tokens = models.llama3_1_8b(), 8192
    qkv, out = tokens * 4096 + 4096 * 6144, tokens * 4096 + 4096 * 4096
    kept = gib(keep_casts=True, filter_fqns=["mlp", "layers.0"]) - gib(filter_fqns=["mlp", "layers.0"])
    assert kept == pytest.approx((m.n_layer - 1) * (qkv + out) / 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=70 * 2**30))
    config = llama_8b(fp8=FP8Config(enabled=True, keep_casts=True), compile=CompileConfig(enabled=True))
    with pytest.raises(ValueError, match=r"Lower it: fp8.keep_casts=False \(7\d.\d\)") as told:
        estimate.check_memory(config, 0, 1, SimpleNamespace(type="cuda"))
    assert "activation_checkpoint=full" not in str(told.value)  # which would be refused with it


def test_a_recorded_pass_has_gradients_of_its_own_where_several_add_up():
    gib = [[estimate.memory(llama_8b(cuda_graph=graph), 0, passes) for graph in (False, True)] for passes in (1, 2)]
    assert gib[0][0] == gib[0][1] and gib[1][1] - gib[1][0] == pytest.approx(2 * 8.03e9 / 2**30, rel=0.01)


RECIPES = json.loads((REPO / "docs/results/recipes_one_h100.json").read_text())["rows"]


@pytest.mark.parametrize("row", RECIPES, ids=lambda row: f"{row['config']}-{'fp8' if row['fp8'] else 'bf16'}")
def test_memory_of_the_recipes_is_within_5_percent_of_what_they_took(row):
    config = configurator.read_file(str(REPO / f"config/{row['config']}.py"))
    config.fp8.enabled = row["fp8"]
    measured = max(step["peak_gib"] for step in row["steps"])
    assert estimate.memory(config, shards=0, accumulation=32) == pytest.approx(measured, rel=0.05)


def test_a_run_that_will_not_fit_is_told_with_the_keys_that_help(monkeypatch):
    card, gpu = SimpleNamespace(total_memory=79.2 * 2**30), SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert estimate.check_memory(llama_8b(), 0, 1, gpu)[0] < 75
    with pytest.raises(ValueError) as error:  # a second pass would keep the gradients of the first beside activations
        estimate.check_memory(llama_8b(global_batch_size=2), 0, 2, gpu)
    assert "needs about 8" in str(error.value) and "there are 79.2" in str(error.value)
    assert str(error.value).endswith("or set check_memory=False if your model takes less")
    assert estimate.check_memory(llama_8b(global_batch_size=2, check_memory=False), 0, 2, gpu)[0] > 80
    assert "activation_checkpoint=full" in str(error.value) and "micro_batch_size" not in str(error.value)
    with pytest.raises(ValueError, match=r"optim.weights=stochastic_rounding \(7\d"):
        estimate.check_memory(llama_8b(optim=OptimConfig(weights="fp32_master")), 0, 1, gpu)
    assert estimate.memory(llama_8b(optim=OptimConfig(weights="fp32_master")), 8, 1) < 45  # over 8 GPUs it fits


def test_a_run_on_a_cpu_must_fit_into_the_host(monkeypatch):
    config, cpu = llama_8b(global_batch_size=2), torch.device("cpu")
    monkeypatch.setattr(estimate, "host_capacity", lambda: 100.0)
    assert 80 < estimate.check_memory(config, 0, 2, cpu)[0] < 100
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="needs about 8.* GiB per rank, there are 50.0[.] Lower it: ") as error:
        estimate.check_memory(config, 0, 2, cpu)
    assert "optim.offload" not in str(error.value)  # it would be in the same memory


def test_each_key_that_helps_is_named_with_what_the_run_takes_with_it(monkeypatch):
    card, gpu = SimpleNamespace(total_memory=60 * 2**30), SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    config = llama_8b(micro_batch_size=4, global_batch_size=4, activation_checkpoint="none")
    with pytest.raises(ValueError) as error:
        estimate.check_memory(config, 0, 1, gpu)
    offered = re.findall(r"([\w.]+)=(\S+) \((\d+\.\d)\)", str(error.value))
    assert {"activation_checkpoint", "micro_batch_size", "optim.fp8_moments"} < {key for key, *_ in offered}
    for key, value, gib in offered:
        changed = configurator.load([f"--{key}={value}"])  # for the value's type
        *section, name = key.split(".")
        part = getattr(config, section[0]) if section else config
        part = replace(part, **{name: getattr(getattr(changed, section[0]) if section else changed, name)})
        with_it = replace(config, **{section[0]: part}) if section else part
        passes = 4 if key == "micro_batch_size" else 1
        assert f"{estimate.memory(with_it, 0, passes):.1f}" == gib, key


def times(name):
    """{variant: ms per step} in docs/results/NAME.json, the first card's."""
    report = json.loads((REPO / f"docs/results/{name}.json").read_text())
    return {row["variant"]: row["ms_per_step"] for card in reversed(report.get("cards", [report]))
            for row in card["rows"]}


BF16_GATHER = "tensorwise:fp8.enable_fsdp_float8_all_gather=False:fp8.precompute_float8_dynamic_scale_for_fsdp=False"


# bench_2_gpus, whose profiles gave the rates, calibrates; the others validate
@pytest.mark.parametrize("one_gpu, variant, several, gpus", [
    ("bench_32_layers_before", "bf16", "bf16", 2), ("bench_32_layers_before", "tensorwise", "tensorwise", 2),
    ("bench_32_layers_before", "tensorwise", BF16_GATHER, 2),
    ("bench_llama_8b_fast", "bf16", "bf16:reshard_after_forward=True", 2),
    ("bench_llama_8b_fast", "tensorwise", "tensorwise", 2),
    ("bench_h200_llama_8b_fast", "bf16", "bf16:reshard_after_forward=True", 4),
    ("bench_h200_llama_8b_fast", "tensorwise", "tensorwise", 4)])
def test_step_times_of_several_gpus_are_within_5_percent_of_what_bench_measured(one_gpu, variant, several, gpus,
                                                                                 tmp_path):
    fast = "fast" in one_gpu
    config = gathering()
    if fast:
        config = with_fast_keys(config, reduce_dtype="bfloat16", reshard_after_forward=False)
    config = as_variant(config, several, tmp_path)
    measured = times(f"bench_{gpus}_gpus_llama_8b_fast" if fast else "bench_2_gpus")[several]
    parts = SCALING.step_ms(config, times(one_gpu)[variant], gpus)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.05)
    assert all(ms > 0 for ms in parts.values())


def test_only_layers_that_are_gathered_in_fp8_have_less_to_copy():
    tensorwise, rowwise, bf16 = gathering(), gathering(), gathering()
    rowwise.fp8.recipes = {"layers": "rowwise"}
    bf16.fp8.enabled = False
    copies = [SCALING.step_ms(config, 600, 8)["copies"] for config in (tensorwise, rowwise, bf16)]
    assert copies[0] < copies[1] == copies[2]


def test_what_is_exposed_on_many_gpus():
    """A ring over more GPUs has more hops; beyond the time of a block's compute they are exposed. HSDP's are short."""
    config = gathering()
    exposed = [SCALING.step_ms(config, 600, shards, replicas)["exposed"]
               for shards, replicas in ((8, 1), (64, 1), (1024, 1), (8, 128))]
    assert exposed[0] < exposed[1] < exposed[2] / 3 and exposed[3] < exposed[2] / 2
    # by hand, 8 shards: the root's weights once, in bf16, and its gradients once, in float32
    root = 2 * M.vocab_size * M.n_embd + M.n_embd
    by_hand = root * (2 + 4) * 7 / 8 / SCALING.LINK_RATE + 2 * 7 * SCALING.HOP_S
    assert exposed[0] == pytest.approx(1000 * by_hand)
    # two replicas: the gradients of the root's shards once more, there and back, over the network
    root_between = root * 4 / 8 / SCALING.NETWORK_RATE + 2 * SCALING.HOP_S
    two = SCALING.step_ms(config, 600, 8, 2)["exposed"]
    assert two - exposed[0] == pytest.approx(1000 * root_between)
    # a slow network between nodes, one card each
    alone = SCALING.step_ms(config, 600, 64, gpus_per_node=1)
    assert alone["exposed"] > 2 * exposed[1]


@pytest.mark.parametrize("shards, ranks", [(0, 1), (2, 2)])
def test_offloaded_state_moves_from_the_gpu_to_the_host(shards, ranks):
    config, gib = gathering(optim=OptimConfig(weights="fp32_master")), {}
    for config.optim.offload in (0.0, 0.5, 1.0):
        gib[config.optim.offload] = estimate.memory(config, shards, 1), estimate.host_memory(config, shards, 1)[0]
    total = 12 * 8.03e9 / 2**30 / ranks  # float32 master and moments
    assert gib[0.0][1] == 0.0 and gib[1.0][1] == pytest.approx(total, rel=1e-3)
    assert gib[0.5][1] == pytest.approx(total / 2, rel=0.05)
    assert all(device + host == pytest.approx(gib[0.0][0]) for device, host in gib.values())


def test_offloaded_weights_are_not_on_the_gpu_where_they_are_cast_once_a_step():
    config = llama_8b(optim=OptimConfig(weights="stochastic_rounding", offload=1.0), activation_checkpoint="selective",
                      fp8=FP8Config(enabled=True, keep_casts=True, filter_fqns=["lm_head", "layers.0"]))
    def gib(*how):
        return estimate.memory(config, *how), estimate.host_memory(config, *how)[0]

    others = (0, 1), (2, 8)  # one pass a step; sharded
    kept, kept_by_others = gib(0, 8), [gib(*how) for how in others]
    config.fp8.offload_weights = True
    moved = 2 * 31 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) / 2**30  # bf16
    assert gib(0, 8) == pytest.approx((kept[0] - moved, kept[1] + moved))
    assert [gib(*how) for how in others] == kept_by_others
    config.fp8.enabled = False
    assert gib(0, 8)[1] == pytest.approx(kept[1])
    config.fp8.enabled, config.fp8.recipe_name = True, "blockwise"  # cast in each pass
    assert gib(0, 8)[1] == pytest.approx(kept[1])


def test_offloading_is_offered_and_refused_where_the_host_has_too_little(monkeypatch):
    card, gpu = SimpleNamespace(total_memory=60 * 2**30), SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    with pytest.raises(ValueError, match=r"optim.offload=1.0 \(\d\d.\d\)"):
        estimate.check_memory(llama_8b(), 0, 1, gpu)
    monkeypatch.setattr(estimate.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * 2**18}.get)
    config = llama_8b(optim=OptimConfig(weights="stochastic_rounding", offload=1.0), activation_checkpoint="full")
    assert estimate.check_memory(config, 0, 1, gpu)[1] == pytest.approx(4 * 8.03e9 / 2**30, rel=1e-3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"1.0 needs 119.\d GiB of host memory, there are 64.0: lower it, or set op"):
        estimate.check_memory(config, 0, 1, gpu)
    estimate.check_memory(config, 2, 1, gpu)  # half of it each
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    config = llama_8b(optim=OptimConfig(weights="stochastic_rounding", offload=1.0), micro_batch_size=4,
                      fp8=FP8Config(enabled=True, keep_casts=True), compile=CompileConfig(enabled=True))
    for device in (gpu, SimpleNamespace(type="cpu")):  # whose memory is the host's
        with pytest.raises(ValueError, match="Lower it") as told:
            estimate.check_memory(config, 0, 8, device)
        assert ("fp8.offload_weights=True" in str(told.value)) == (device is gpu)
    config.fp8.offload_weights, config.micro_batch_size = True, 1
    monkeypatch.setattr(estimate.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 32 * 2**18}.get)
    with pytest.raises(ValueError, match="lower it, or set fp8.offload_weights=False, or set optim.fp8_moments=True$"):
        estimate.check_memory(config, 0, 8, gpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config = llama_8b(optim=OptimConfig(weights="stochastic_rounding", offload=1.0), activation_checkpoint="full")
    config.check_memory = False
    estimate.check_memory(config, 0, 1, gpu)


@pytest.mark.parametrize("keys, on_gpu", [({}, True), ({"offload": 1.0}, False)])
def test_the_copy_that_checkpoints_are_written_from_is_counted_and_told_where_there_is_no_room(monkeypatch, keys,
                                                                                              on_gpu):
    host = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 256 * 2**18}
    monkeypatch.setattr(estimate.os, "sysconf", host.get)
    monkeypatch.setattr(estimate.os.path, "isfile", lambda path: False)  # no container
    config, gpu = llama_8b(optim=OptimConfig(weights="stochastic_rounding", **keys)), SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    copy = (2 + 4) * 8.03e9 / 2**30  # weights and moments
    kept = 0 if on_gpu else 4 * 8.03e9 / 2**30

    def told(**changes):
        return estimate.check_memory(replace(config, **changes), 0, 1, gpu)[1:]

    assert told() == (pytest.approx(kept + copy, rel=1e-3), None)
    for changes in ({"async_checkpoint": False}, {"checkpoint_interval": 0}, {"checkpoint_interval": 1000}):
        assert told(**changes) == (pytest.approx(kept, rel=1e-3), None)
    host["SC_PHYS_PAGES"] = 48 * 2**18
    gib, line = told()
    assert gib == pytest.approx(kept, rel=1e-3)
    assert "48.0 GiB of host memory have no room for the 44.9 GiB" in line
    host["SC_PHYS_PAGES"] = 256 * 2**18
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")  # ranks of a node, each with a copy of its own
    gib, line = told()
    assert gib == pytest.approx(kept, rel=1e-3)
    assert f"256.0 GiB of host memory have no room for the {6 * copy:.1f} GiB that" in line


@pytest.mark.parametrize("cgroup, limit, gib", [
    (None, "", 64.0), ("/sys/fs/cgroup/memory.max", "max\n", 64.0), ("/sys/fs/cgroup/memory.max", f"{2**31}\n", 2.0),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2**32}\n", 4.0),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2**62}\n", 64.0)])
def test_the_host_has_what_its_container_may_use(monkeypatch, cgroup, limit, gib):
    monkeypatch.setattr(estimate.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * 2**18}.get)
    monkeypatch.setattr(estimate.os.path, "isfile", lambda path: path == cgroup)
    monkeypatch.setattr(estimate.Path, "read_text", lambda path: limit)
    assert estimate.host_capacity() == gib
