"""config/: every shipped file is a config whose full-size model is the published one and keeps the FP8 contract."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import REPO, run

import configurator
import fp8
import model as models
from checks import estimate

PASSES = json.loads((REPO / "docs/results/h200_several_passes.json").read_text())["runs"]
SHIPPED = sorted(p.stem for p in REPO.glob("config/*.py"))
RECIPES = {  # published number of parameters, packed length, global batch
    "llama3_1_8b_hellaswag_fp8": (8_030_261_248, 8192, 32),
    "mistral_7b_hellaswag_fp8": (7_241_732_096, 8192, 8),
    "mistral_nemo_2407_hellaswag_fp8": (12_247_782_400, 8192, 8),
    "qwen2_5_7b_hellaswag_fp8": (7_615_616_512, 8192, 8),
    "qwen3_8b_hellaswag_fp8": (8_190_735_360, 8192, 8),
    "phi_4_hellaswag_fp8": (14_659_507_200, 4096, 8),
    "smollm2_hellaswag_fp8": (134_515_008, 2048, 16),
}


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: type("", (), {"total_memory": 79.2 * 2**30}))


def load(name, ranks, monkeypatch):
    """The config as torchrun with that many ranks would see it."""
    import sys

    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    for module in ("config.llama3_1_8b_hellaswag_fp8", "config.llama_fp8"):  # which look at the machine when imported
        monkeypatch.delitem(sys.modules, module, raising=False)
    return configurator.load([str(REPO / "config" / f"{name}.py")])


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_is_valid_and_its_text_reads_back(name, monkeypatch, tmp_path):
    config = load(name, 1, monkeypatch)
    (tmp_path / "again.py").write_text(configurator.to_python(config))
    assert configurator.read_file(tmp_path / "again.py") == config
    assert config.out_dir.startswith("out/")


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_models_and_keep_the_contract(name, ranks, monkeypatch, h100):
    parameters, packed, batch = RECIPES[name]
    config = load(name, ranks, monkeypatch)
    with torch.device("meta"):
        model = models.Transformer(config.model)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.data.packed_sequence_size == packed <= config.model.block_size
    assert config.global_batch_size == batch and batch % (config.micro_batch_size * ranks) == 0
    assert (config.fp8.enabled, config.fp8.recipe_name, config.fp8.filter_fqns, config.fp8.emulate) == (
        True, "tensorwise", ["lm_head"], False)
    assert config.fp8.enable_fsdp_float8_all_gather and config.fp8.precompute_float8_dynamic_scale_for_fsdp
    shards = ranks if ranks > 1 else 0
    fp8.check(config.fp8, model, device=torch.device("cuda"), compiled=config.compile.enabled, shards=shards,
              tokens=config.micro_batch_size * packed, loss_chunks=config.loss_chunks)
    row = replace(config, model=replace(config.model, block_size=packed))
    gib = estimate.memory(row, shards, batch // (config.micro_batch_size * ranks))
    assert gib < 79.2 * 0.95, gib


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_front_door_fits_and_is_fast(ranks, monkeypatch, h100):
    config = load("llama_fp8", ranks, monkeypatch)
    assert config.model == models.llama3_1_8b() and config.fp8.filter_fqns == ["lm_head"] and config.flash4 is None
    assert config.fp8.keep_casts and config.fp8.grad_fast_accum and config.optim.fp8_moments and not config.fp8.emulate
    assert estimate.memory(config, ranks if ranks > 1 else 0, 1) < 0.95 * 79.2


@pytest.mark.parametrize("ranks", range(1, 9))
def test_the_chat_recipe_takes_an_8b_model_on_1_to_8_gpus(ranks, monkeypatch, h100):
    config = load("chat_fp8", ranks, monkeypatch)
    assert config.data.format == "chat" and config.data.packed_sequence_size == config.model.block_size == 4096
    passes, rest = divmod(config.global_batch_size, config.micro_batch_size * ranks)
    assert rest == 0 and 28 <= config.global_batch_size <= 32
    assert config.fp8.enabled and config.fp8.enable_fsdp_float8_all_gather and not config.fp8.emulate
    config = replace(config, model=models.llama3_1_8b(block_size=4096))
    assert estimate.memory(config, ranks if ranks > 1 else 0, passes) < 0.95 * 79.2


def test_qwen_2_5_14b_fits_one_80_gb_card(monkeypatch, h100):
    config = load("qwen2_5_14b_offload_fp8", 1, monkeypatch)
    with torch.device("meta"):
        assert sum(p.numel() for p in models.Transformer(config.model).parameters()) == 14_770_033_664
    passes = config.global_batch_size // config.micro_batch_size
    assert estimate.memory(config, 0, passes) < 0.95 * 79.2 and estimate.host_memory(config, 0, passes)[0] < 55
    (row,) = [row for row in PASSES if row.get("out_dir") == "14b_none4_64"]
    assert estimate.memory(config, 0, passes) == pytest.approx(row["peak_gib"], rel=0.02)


def test_recipes_do_not_share_what_they_change(monkeypatch):
    first = load("llama3_1_8b_hellaswag_fp8", 8, monkeypatch)
    load("phi_4_hellaswag_fp8", 8, monkeypatch)
    assert configurator.load([str(REPO / "config/llama3_1_8b_hellaswag_fp8.py")]) == first


def test_a_recipe_without_its_weights_says_what_it_wants(tmp_path):
    done = run("train.py", REPO / "config/qwen2_5_7b_hellaswag_fp8.py", "--fp8.emulate=True", check=False, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "Qwen2.5-7B is no Hugging Face model folder" in done.stderr
