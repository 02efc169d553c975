"""estimate.py: FLOPs against torch's own counter, memory against what an H100 was measured to need."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, build

import bench
import configurator
import estimate
import model as models
from configurator import CompileConfig, Config, FP8Config, OptimConfig


def test_flops_per_token_agree_with_torchs_own_counter():
    from torch.utils.flop_counter import FlopCounterMode

    model = build()
    x = torch.randint(0, 256, (1, 64))
    with FlopCounterMode(display=False) as counter:
        model(x, x).backward()
    linear, _ = estimate.matmul_flops_per_token(model.cfg)
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert counts["aten.mm"] == linear * 64


def llama_8b(**changes):
    """What config/llama_fp8.py is on one 80 GB card."""
    return Config(**{**dict(model=models.llama3_1_8b(), micro_batch_size=1, global_batch_size=1, loss_chunks=4,
                            fp8=FP8Config(enabled=True, filter_fqns=["lm_head"]), activation_checkpoint="selective",
                            optim=OptimConfig(weights="stochastic_rounding")), **changes})


MEASURED = [(name, row["variant"], row["peak_gib"])
            for name in ("bench_8_layers", "bench_32_layers_before", "bench_32_layers", "bench_32_layers_fast")
            for row in json.loads((REPO / f"docs/results/{name}.json").read_text())["rows"]]


@pytest.mark.parametrize("name, variant, measured", MEASURED)
def test_memory_is_within_5_percent_of_what_bench_measured(name, variant, measured, tmp_path):
    config = llama_8b(compile=CompileConfig(enabled=True))
    if name == "bench_8_layers":
        config = replace(config, model=models.llama3_1_8b(n_layer=8), activation_checkpoint="none", loss_chunks=1)
    (tmp_path / "config.py").write_text(configurator.to_python(config))
    config = configurator.load([str(tmp_path / "config.py"), *bench.flags(variant)])
    assert estimate.memory(config, shards=0, accumulation=1) == pytest.approx(measured, rel=0.05)


TWO_GPUS = [(row["variant"], row["peak_gib"]) for name in ("bench_2_gpus", "bench_2_gpus_fast")
            for row in json.loads((REPO / f"docs/results/{name}.json").read_text())["rows"]]


@pytest.mark.parametrize("variant, measured", TWO_GPUS)
def test_memory_of_two_gpus_is_within_5_percent_of_what_bench_measured(variant, measured, tmp_path):
    gather = FP8Config(enabled=True, filter_fqns=["lm_head"], enable_fsdp_float8_all_gather=True,
                       precompute_float8_dynamic_scale_for_fsdp=True)
    config = llama_8b(compile=CompileConfig(enabled=True), fp8=gather, global_batch_size=2)
    (tmp_path / "config.py").write_text(configurator.to_python(config))
    config = configurator.load([str(tmp_path / "config.py"), *bench.flags(variant)])
    assert estimate.memory(config, shards=2, accumulation=1) == pytest.approx(measured, rel=0.05)


def test_few_activations_put_the_peak_where_gradients_are_reduced():
    phi = json.loads((REPO / "docs/results/phi_4_2_gpus.json").read_text())
    config = configurator.load([str(REPO / "config/phi_4_hellaswag_fp8.py"), "--global_batch_size=2"])
    assert estimate.memory(config, shards=2, accumulation=1) == pytest.approx(phi["rows"][-1]["peak_gib"], rel=0.05)


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
    assert estimate.check_memory(llama_8b(), 0, 1, gpu) < 75
    assert estimate.check_memory(llama_8b(global_batch_size=2), 0, 2, torch.device("cpu")) > 80  # a CPU's is not known
    with pytest.raises(ValueError) as error:  # a second pass would keep the gradients of the first beside activations
        estimate.check_memory(llama_8b(global_batch_size=2), 0, 2, gpu)
    assert "needs about 8" in str(error.value) and "there are 79.2" in str(error.value)
    assert "activation_checkpoint=full" in str(error.value) and "micro_batch_size" not in str(error.value)
    with pytest.raises(ValueError, match=r"optim.weights=stochastic_rounding \(7\d"):
        estimate.check_memory(llama_8b(optim=OptimConfig(weights="fp32_master")), 0, 1, gpu)
    assert estimate.memory(llama_8b(optim=OptimConfig(weights="fp32_master")), 8, 1) < 45  # over 8 GPUs it fits
