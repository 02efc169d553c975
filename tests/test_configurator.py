"""The configuration: what is accepted, the message of every error, and no dead field."""

import ast
import copy
import inspect
import os
import re
import sys
import textwrap
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

import configurator
import fp8
import model
from configurator import CompileConfig, Config, FP8Config, OptimConfig, load, read_file, to_python
from fp8 import RECIPES
from plumbing import schema

REPO = Path(configurator.__file__).parent
# A Config with every nested section filled in, so that no key hides behind a None.
FULL = Config(model=model.llama3_1_8b())
KEYS = {prefix + f.name: (section, f) for prefix, section in schema.sections(FULL) for f in fields(section)
        if not is_dataclass(f.type)}


def errors_of(*argv):
    """The lines of the error that load() raises."""
    with pytest.raises(ValueError) as caught:
        load(list(argv))
    return str(caught.value).splitlines()


@pytest.fixture
def file(tmp_path):
    """Writes a config file: the lines after the usual imports (line 1). Returns its path as text."""

    def write(body, name="mine.py"):
        head = "from configurator import CompileConfig, Config, FP8Config, ModelConfig, OptimConfig; import model"
        (tmp_path / name).write_text(f"{head}\n{body}\n")
        return str(tmp_path / name)

    return write


# ----------------------------------------------------------------------------------------------------------------
# what is accepted


def test_no_arguments_give_the_defaults():
    assert load([]) == Config()


@pytest.mark.parametrize("arg, value", [
    ("--max_steps=20", 20),
    ("--max_steps=1_000", 1000),
    ("--optim.lr=1e-4", 1e-4),
    ("--optim.lr=1", 1.0),
    ("--fp8.enabled=True", True),
    ("--fp8.enabled=true", True),
    ("--fp8.enabled", True),
    ("--reshard_after_forward=false", False),
    ("--fp8.recipe_name=None", None),
    ("--compile.dynamic=None", None),
    ("--compile.dynamic=True", True),
    ("--wandb_project=nano", "nano"),
    ("--wandb_project=None", None),
    ("--wandb_project=5", "5"),
    ("--out_dir=None", "None"),
    ("--out_dir='quoted'", "'quoted'"),
    ("--out_dir=a=b c", "a=b c"),
    ("--out_dir=1e5", "1e5"),
    ('--fp8.filter_fqns=["lm_head", "layers.0"]', ["lm_head", "layers.0"]),
    ("--fp8.filter_fqns=[]", []),
    ("--optim.betas=(0.8, 0.9)", (0.8, 0.9)),
    ("--optim.betas=[0.8, 0.9]", (0.8, 0.9)),
    ("--optim.betas=0,0.9", (0, 0.9)),
    ("--resume=never", "never"),
])
def test_values_are_parsed_by_the_type_of_their_field(arg, value):
    config = load([arg])
    name = arg[2:].partition("=")[0]
    section, _, leaf = name.rpartition(".")
    found = getattr(getattr(config, section) if section else config, leaf)
    assert found == value and type(found) is type(value)


def test_the_last_of_two_equal_flags_counts():
    assert load(["--max_steps=1", "--max_steps=2"]).max_steps == 2


@pytest.mark.parametrize("alias, name", fp8.ALIASES.items())
def test_aliases_set_the_same_field(alias, name, file):
    on = "--fp8.enable_fsdp_float8_all_gather=True"
    assert getattr(load([on, f"--fp8.{alias}=True"]).fp8, name) is True
    path = file(f"config = Config(fp8=FP8Config({alias}=True))")
    assert getattr(load([path]).fp8, name) is True
    assert getattr(load([path, f"--fp8.{alias}=False"]).fp8, name) is False


@pytest.mark.parametrize("alias, name", fp8.ALIASES.items())
def test_aliases_can_be_assigned(alias, name, file):
    assert getattr(load([file(f"config = Config()\nconfig.fp8.{alias} = True")]).fp8, name) is True


def test_folders_may_begin_with_a_tilde():
    config = load(["--out_dir=~/x", "--data.cache_dir=~/y"])
    assert [config.out_dir, config.data.cache_dir] == [os.path.expanduser("~/x"), os.path.expanduser("~/y")]


@pytest.mark.parametrize("ranks, batch, even", [
    (1, 8, True), (3, 6, False), (4, 8, True), (9, 9, False), (16, 16, True)])
def test_the_front_door_opens_on_any_number_of_ranks(ranks, batch, even, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load([str(REPO / "config/llama_fp8.py")])
    assert config.global_batch_size == batch and batch % (config.micro_batch_size * ranks) == 0
    assert config.fp8.enable_fsdp_float8_all_gather == config.fp8.precompute_float8_dynamic_scale_for_fsdp == even


def test_a_file_is_overridden_by_flags_and_left_as_it_was(file):
    path = file("base = Config(max_steps=7, seed=3)\nconfig = base")
    config = load([path, "--max_steps=20"])
    assert (config.max_steps, config.seed) == (20, 3)
    assert load([path]).max_steps == 7


def test_loading_does_not_change_a_config_that_another_module_shares(file):
    path = file("from config.llama_fp8 import config")
    from config.llama_fp8 import config as shared

    before = copy.deepcopy(shared)
    changed = load([path, "--fp8.filter_fqns=[]", "--model.n_layer=1", "--max_steps=3"])
    changed.fp8.filter_fqns.append("lm_head")
    assert shared == before and changed.max_steps == 3


def test_files_import_the_repository_from_any_folder(file, tmp_path, monkeypatch):
    path = file("from config.llama_fp8 import config")
    monkeypatch.chdir(tmp_path)
    assert load(["mine.py"]) == load([path])


def test_keys_of_a_nested_section_can_be_set(file):
    path = file("config = Config(model=model.llama3_1_8b())")
    assert load([path, "--model.rope_scaling.factor=4"]).model.rope_scaling.factor == 4.0
    assert load([path, "--model.rope_scaling=None"]).model.rope_scaling is None


@dataclass
class Flags:
    """What a script has of its own."""

    variants: str = "bf16,tensorwise"  # which to run
    gemms: bool = False  # per layer


def test_a_script_takes_flags_of_its_own(capsys):
    own = Flags()
    config = load(["--gemms", "--variants=bf16", "--max_steps=3"], own)
    assert (own.gemms, own.variants, config.max_steps) == (True, "bf16", 3)
    own = Flags()
    assert load(["--gemms=False", str(REPO / "config/llama_fp8.py")], own).max_steps != Config().max_steps
    assert own == Flags()
    with pytest.raises(ValueError, match="^--gemms=1: expected bool\n--variant=a: .* did you mean --variants"):
        load(["--gemms=1", "--variant=a"], own)
    with pytest.raises(SystemExit):
        load(["--help"], own)
    assert re.search(r"gemms +bool +False\s+per layer", capsys.readouterr().out)
    assert "--gemms" in errors_of("--gemms=True")[0]  # no flag of any other script's


@dataclass
class Shapes:
    sizes: tuple[int, int] = (0, 0)
    table: list[tuple[int, str]] = field(default_factory=list)
    either: int | list[int] = 0
    level: Literal[1, 2] = 2


@pytest.mark.parametrize("arg, good", [
    ("--sizes=(1, 2)", True), ("--sizes=[1, 2]", True), ("--sizes=(1, 2.5)", False), ("--sizes=1", False),
    ("--sizes=(1, 2, 3)", False),
    ("--table=[(1, 'a')]", True), ("--table=[(1, 2)]", False), ("--table=[(1, 'a', 'b')]", False),
    ("--either=[1]", True), ("--either=2", True), ("--either=['a']", False), ("--either=True", False),
    ("--level=1", True), ("--level=3", False), ("--level=True", False), ("--level=1.0", False),
])
def test_elements_of_lists_and_tuples_are_checked(arg, good):
    own = Shapes()
    if good:
        load([arg], own)
        assert own != Shapes()
    else:
        with pytest.raises(ValueError, match=f"^{re.escape(arg)}: expected"):
            load([arg], own)


# ----------------------------------------------------------------------------------------------------------------
# errors on the command line


@pytest.mark.parametrize("arg, message", [
    ("--max_steps=1.5", "expected int"),
    ("--max_steps=True", "expected int"),
    ("--max_steps=", "expected int"),
    ("--max_steps=None", "expected int"),
    ("--fp8.enabled=1", "expected bool"),
    ("--fp8.enabled=yes", "expected bool"),
    ("--fp8.enabled=TRUE", "expected bool"),
    ("--compile.dynamic=1", "expected bool | None"),
    ("--optim.lr=fast", "expected float"),
    ("--optim.lr=True", "expected float"),
    ("--optim.lr=nan", "expected float"),
    ("--optim.lr=1e999", "expected float"),
    ("--model.residual_multiplier=-1e999", "expected float"),
    ("--model.attention_multiplier=-1.0", "expected float > 0 | None"),
    ("--fp8.recipe_name=row", f"expected {' | '.join(map(repr, RECIPES))} | None"),
    ('--fp8.recipes={"lm_head": "row"}', f"expected dict[str, {' | '.join(map(repr, RECIPES))} | None] as a Python "
                                         "literal, in shell quotes: '--fp8.recipes={...}'"),
    ("--fp8.recipes=lm_head", "expected dict[str, 'tensorwise' | "),
    ("--fp8.recipes={1: 'rowwise'}", "expected dict[str, 'tensorwise' | "),
    ("--resume=None", "expected 'auto' | 'never' | 'must'"),
    ("--fp8.filter_fqns=lm_head",
     "expected list[str] as a Python literal, in shell quotes: '--fp8.filter_fqns=[...]'"),
    ("--data.train=[a.txt, 'b']", "expected list[str] as a Python literal, in shell quotes: '--data.train=[...]'"),
    ("--optim.betas=0.9, 0.95, 1", "expected tuple[0 <= float < 1, 0 <= float < 1] as a Python literal, in shell "
                                   "quotes: '--optim.betas=[...]'"),
    ("--fp8.filter_fqns=[1]", "expected list[str]"),
    ("--fp8.filter_fqns={[]}", "expected list[str]"),
    ("--optim.betas=0.9", "expected tuple[0 <= float < 1, 0 <= float < 1]"),
    ("--optim.betas=(0.9, 0.95, 0.99)", "expected tuple[0 <= float < 1, 0 <= float < 1]"),
    ("--optim.betas=('a', 0.9)", "expected tuple[0 <= float < 1, 0 <= float < 1]"),
    ("--model.rope_scaling=8", "expected RopeScaling | None"),
    ("--max_steps", "write --max_steps=VALUE"),
    ("--model=tiny", "a section, set its keys, such as --model.vocab_size"),
    ("--fp8", "a section, set its keys, such as --fp8.enabled"),
])
def test_a_wrong_value_is_reported_with_key_type_and_value(arg, message):
    (line,) = errors_of(arg)
    assert line.startswith(f"{arg}: {message}")


@pytest.mark.parametrize("key", ["init_from", "data.tokenizer", "data.text_key", "wandb_project", "out_dir",
                                 "data.cache_dir"])
def test_an_empty_text_is_refused_where_it_is_not_the_default(key):
    assert errors_of(f"--{key}=") == [f"{key} is empty: give it a value (is a shell variable not set?)"]
    assert load(["--data.chat_template="]).data.chat_template == ""


@pytest.mark.parametrize("arg, near", [
    ("--fp8.recipe_nam=rowwise", "fp8.recipe_name"),
    ("--recipe_name=rowwise", "fp8.recipe_name"),
    ("--fp8.enabeld=True", "fp8.enabled"),
    ("--compile.enabeld=True", "compile.enabled"),
    ("--fp8.enable_fsdp_fp8_allgather=True", "fp8.enable_fsdp_fp8_all_gather"),
    ("--lr=1", "optim.lr"),
    ("--optim.max_steps=1", "max_steps"),
    ("--max-steps=1", "max_steps"),
    ("-max_steps=1", "max_steps"),
    ("--batch_size=1", "micro_batch_size"),
    ("--print_confg", "print_config"),
    ("--steps=1", "max_steps"),
])
def test_an_unknown_key_names_the_closest_one(arg, near):
    (line,) = errors_of(arg)
    assert line.startswith(f"{arg}: unknown key, did you mean --{near}?")


@pytest.mark.parametrize("arg", ["--learning_rate=1", "--dropout=0.1", "--epochs=3"])
def test_an_unknown_key_that_looks_like_none_names_none(arg):
    assert errors_of(arg, "--max_steps=0") == [f"{arg}: unknown key. See --help", "--max_steps=0: expected int >= 1"]


def test_a_value_apart_from_its_key_is_an_error():
    assert errors_of("--max_steps", "20", "--seed=1") == [
        f"20: no such config file, see {os.path.relpath(REPO / 'config')}", "--max_steps: write --max_steps=VALUE"]


def test_a_key_without_its_dashes_is_one_error():
    (line,) = errors_of("max_steps=20")
    assert line.startswith("max_steps=20: no such config file")
    assert errors_of("config/llama_fp8.py", "max_steps=20") == [
        "config/llama_fp8.py max_steps=20: one config file at most"]


def test_folders_that_are_files_are_reported(tmp_path):
    (tmp_path / "file").write_text("")
    message = errors_of(f"--out_dir={tmp_path}/file", f"--data.cache_dir={tmp_path}/file/below")
    assert message == [f"out_dir={tmp_path}/file: {tmp_path}/file is no folder to write to: name another one",
        f"data.cache_dir={tmp_path}/file/below: {tmp_path}/file is no folder to write to: name another one"]


@pytest.mark.parametrize("target", ["nowhere/yet", "link"])
def test_a_link_that_leads_nowhere_is_reported_before_the_first_step(target, tmp_path):
    os.symlink(target, tmp_path / "link")
    assert errors_of(f"--out_dir={tmp_path}/link/run") == [
        f"out_dir={tmp_path}/link/run: {tmp_path}/link is no folder to write to: name another one"]


def test_an_out_dir_in_a_folder_of_the_data_is_refused(tmp_path, monkeypatch):
    """Its config.py and metrics.jsonl would be data of the next start, which then could not resume."""
    (tmp_path / "text").mkdir()
    os.symlink("text", tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    for key in ('--data.train=["link"]', '--data.val=["text/*.txt", "."]'):
        entry = "." if "val" in key else "link"
        for out_dir in ("text", "text/out", "link/a/b"):
            assert errors_of(f"--out_dir={out_dir}", key) == [
                f"out_dir={out_dir} is part of {entry}, a folder of the data: name one outside of it"]
        load(["--out_dir=../out", "--data.cache_dir=text/cache", key])  # the data is read without its cache
    load(["--out_dir=text", "--data.format=tokens", '--data.train=["link"]'])  # no file of a run is one of token ids
    assert "data.cache_dir=text is part of link" in errors_of("--data.cache_dir=text", '--data.train=["link"]')[0]


def test_two_config_files_are_too_many():
    assert errors_of("config/a.py", "config/b.py") == ["config/a.py config/b.py: one config file at most"]
    assert errors_of("config/a.py", "--max_steps", "10", "--seed=1", "--out_dir", "x") == [
        "config/a.py 10 x: one config file at most. Write --max_steps=10 --out_dir=x"]
    assert errors_of("--compile.enabled", "config/a.py", "--seed=1", "x") == ["config/a.py x: one config file at most"]


def test_all_errors_are_reported_at_once_in_their_order(file):
    path = file("config = Config(fp8=FP8Config(enabeld=True))")
    lines = errors_of(path, "--max_steps=x", "--recipe_name=rowwise", "--fp8.enabled=1", "--seed", "--model=8b")
    assert [line.partition(": ")[0] for line in lines] == [
        f"{path}, line 2", "--max_steps=x", "--recipe_name=rowwise", "--fp8.enabled=1", "--seed", "--model=8b"]


# ----------------------------------------------------------------------------------------------------------------
# errors in the file


def test_a_missing_file_names_the_closest_one(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    assert errors_of("config/lama_fp8.py") == [
        "config/lama_fp8.py: no such config file, did you mean config/llama_fp8.py?"]
    monkeypatch.chdir(tmp_path)
    suggested = errors_of("llama_fp8")[0].partition("did you mean ")[2].removesuffix("?")
    assert Path(suggested).resolve() == REPO / "config/llama_fp8.py"
    assert errors_of("gpt.py") == [f"gpt.py: no such config file, see {os.path.relpath(REPO / 'config')}"]


@pytest.mark.parametrize("body, message", [
    ("config = Config(fp8=FP8Config(enabeld=True))",
     ", line 2: FP8Config has no field 'enabeld', did you mean 'enabled'?"),
    ("\nconfig = Config(max_step=1)", ", line 3: Config has no field 'max_step', did you mean 'max_steps'?"),
    ("config = Config(model=model.llama_tiny(n_layers=1))",
     ", line 2: ModelConfig has no field 'n_layers', did you mean 'n_layer'?"),
    ("model.RopeScaling(facter=2)", ", line 2: RopeScaling has no field 'facter'"),
    ("config = Config(\n", ": SyntaxError: '(' was never closed (mine.py, line 2)"),
    ("config = Config()\0", ": SyntaxError: source code string cannot contain null bytes"),
    ("import nowhere_to_be_found", ", line 2: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
    ("config = Config(max_steps=1 // 0)", ", line 2: ZeroDivisionError: integer division or modulo by zero"),
    ("confg = Config()", " must bind `config` to a configurator.Config, as in `from configurator import Config` and "
                         "`config = Config(max_steps=100)`; it binds NoneType"),
    ("config = {'max_steps': 1}", "; it binds dict"),
    ("config = Config(fp8=FP8Config(enabled='yes'))", ": fp8.enabled='yes': expected bool"),
    ("config = Config(max_steps=1e3)", ": max_steps=1000.0: expected int"),
    ("config = Config(optim=OptimConfig(betas=[.9, .99]))", ": optim.betas=[0.9, 0.99]: expected tuple[0 <= "),
    ("config = Config(optim=OptimConfig(lr=float('nan')))", ": optim.lr=nan: expected float"),
    ("config = Config(fp8=FP8Config(filter_fqns='lm_head'))", ": fp8.filter_fqns='lm_head': expected list[str]"),
    ("config = Config(fp8=FP8Config(recipe_name='row'))",
     f": fp8.recipe_name='row': expected {' | '.join(map(repr, RECIPES))} | None"),
    ("config = Config(model=model.llama_tiny)", "expected ModelConfig"),
    ("config = Config(fp8=CompileConfig())", "expected FP8Config"),
    ("config = Config(model=ModelConfig(rope_scaling=model.RopeScaling(factor='2')))",
     ": model.rope_scaling.factor='2': expected float"),
    ("config = Config()\nconfig.max_stepz = 1", ": max_stepz is no field, did you mean max_steps?"),
    ("config = Config()\nconfig.fp8.recipe_nam = 'rowwise'", ": fp8.recipe_nam is no field, did you mean fp8.recipe_n"),
])
def test_an_error_in_the_file_is_one_line_with_its_place(body, message, file):
    path = file(body)
    (line,) = errors_of(path)
    assert line.startswith(path) and message in line


def test_an_error_in_an_imported_config_is_reported_where_it_stands(file, tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    base = file("config = Config(max_stepz=1)", name="config/base_of_this_test.py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(configurator, "REPO", tmp_path)
    path = file("import sys; sys.modules.pop('config', None)\nfrom config.base_of_this_test import config")
    kept = sys.modules.pop("config", None)
    try:
        assert errors_of(path) == [f"{base}, line 2: Config has no field 'max_stepz', did you mean 'max_steps'?"]
    finally:
        sys.modules.pop("config", None)
        if kept:
            sys.modules["config"] = kept


def test_every_wrong_type_of_a_file_is_reported(file):
    path = file("config = Config(seed='a', fp8=FP8Config(enabled=1, emulate=None), optim=OptimConfig(lr='x'))")
    assert {line.removeprefix(f"{path}: ").partition("=")[0] for line in errors_of(path)} == {
        "seed", "fp8.enabled", "fp8.emulate", "optim.lr"}


# ----------------------------------------------------------------------------------------------------------------
# values that do not go together


@pytest.mark.parametrize("name", ["max_steps", "global_batch_size", "micro_batch_size", "log_interval",
                                  "loss_chunks"])
def test_zero_is_refused_where_it_makes_no_sense(name):
    assert errors_of(f"--{name}=0") == [f"--{name}=0: expected int >= 1"]


@pytest.mark.parametrize("name", ["eval_interval", "eval_sequences", "eval_hellaswag_items", "checkpoint_interval",
                                  "keep", "replicas", "profile_step", "memory_step"])
def test_zero_has_a_meaning_and_less_has_none(name):
    assert getattr(load([f"--{name}=0"]), name) == 0
    assert errors_of(f"--{name}=-1") == [f"--{name}=-1: expected int >= 0"]


@pytest.mark.parametrize("key, message", [
    ("--optim.eps=0.0", "float >= 1e-30"),
    ("--optim.lr=-1", "float >= 0"),
    ("--optim.betas=(0.9,1)", "tuple[0 <= float < 1, 0 <= float < 1] as a Python literal, in shell quotes: "
                              "'--optim.betas=[...]'"),
    ("--optim.offload=1.5", "0 <= float <= 1"),
    ("--fp8.stats_interval=-1", "int >= 0"),
    ("--timeout_minutes=0", "0 < float <= 300"),
    ("--timeout_minutes=301", "0 < float <= 300"),
    ("--optim.lr=1e39", "float >= 0"),
    ("--optim.betas=(0.9,1e999)", "tuple[0 <= float < 1, 0 <= float < 1] as a Python literal, in shell quotes: "
                                  "'--optim.betas=[...]'"),
    ("--data.workers=-1", "int >= 0"),
    ("--model.n_layer=0", "int >= 1"),
    ("--model.sliding_window=0", "int >= 1 | None"),
    ("--model.rope_theta=0.0", "float > 0"),
    ("--model.norm_eps=-1.0", "float >= 0"),
    ("--seed=-1", "0 <= int < 2**40"),
    ("--seed=1099511627776", "0 <= int < 2**40"),
])
def test_a_number_out_of_its_range_is_refused_on_the_command_line_and_in_a_file(key, message, file):
    assert errors_of(key) == [f"{key}: expected {message}"]
    name, _, value = key.removeprefix("--").partition("=")
    path = file(f"config = Config()\nconfig.{name} = {value}")
    (line,) = errors_of(path)
    assert line.startswith(f"{path}: {name}=") and line.endswith(f": expected {message.partition(' as a ')[0]}")


def test_ends_of_ranges_are_in_them(file):
    keys = ("--optim.betas=(0, 0)", "--optim.eps=1e-30", "--optim.offload=1", "--optim.grad_clip=0", "--seed=0",
            "--timeout_minutes=0.1", "--model.norm_eps=0", "--model.n_layer=1")
    config = load([*keys])
    assert config.optim == OptimConfig(betas=(0, 0), eps=1e-30, offload=1.0, grad_clip=0.0)
    assert type(config.optim.offload) is float and load(["--seed=1099511627775"]).seed == 2**40 - 1
    path = file("config = Config(model=model.llama3_1_8b())")
    assert errors_of(path, "--model.rope_scaling.original_max_position=1", "--model.rope_scaling.factor=0") == [
        "--model.rope_scaling.original_max_position=1: expected int >= 2",
        "--model.rope_scaling.factor=0: expected float > 0"]


def test_an_out_dir_that_cannot_be_written_to_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert errors_of(f"--out_dir={tmp_path / 'new'}") == [
        f"out_dir={tmp_path / 'new'}: {tmp_path} is no folder to write to: name another one"]


FP8_ON = ["--fp8.enabled=True", "--fp8.emulate=True"]
KEEP = [*FP8_ON, "--fp8.keep_casts=True"]
COMPILED, MOVED = [*KEEP, "--compile.enabled=True"], ["--fp8.offload_weights=True", "--optim.offload=0.1"]
RECOMPUTED = [*FP8_ON, "--fp8.force_recompute_fp8_weight_in_bwd=True", "--reshard_after_forward=False"]
HALF_TURNED, SOME_TURN = "--model.rope_fraction=0.5", "--model.no_rope_interval=4"
REFUSED = [  # for each condition of each problems(): keys that contradict each other, nearest ones that do not, message
    *(([f"--{key}=11", "--max_steps=10"], [f"--{key}=10", "--max_steps=10"], f"{key}=11 must be a step: 1 to max_steps")
      for key in ("profile_step", "memory_step")),
    ([f"--out_dir={REPO}"], [f"--out_dir={REPO}/new"], "is a folder of the code"),
    ([f"--data.cache_dir={REPO}/config/new"], [f"--data.cache_dir={REPO}/new"], "is a folder of the code"),
    ([f"--out_dir={REPO}/fp8.py/new"], [], "fp8.py is no folder to write to: name another one"),
    ([f"--out_dir={REPO}/docs/new", f"--data.train=['{REPO}/docs']"],
     [f"--out_dir={REPO}/docs/new", f"--data.train=['{REPO}/docs']", "--data.format=tokens"], "a folder of the data"),
    (["--dtype=float32", "--optim.weights=stochastic_rounding"], ["--optim.weights=stochastic_rounding"], "to bf16"),
    (["--model.n_head=6", "--model.n_kv_head=4"], ["--model.n_head=6", "--model.n_kv_head=3"], "must be a multiple"),
    (["--model.head_dim=31"], ["--model.head_dim=30"], "model.head_dim=31 must be even"),
    (["--model.rope_fraction=1.5"], ["--model.rope_fraction=1.0"], "model.rope_fraction=1.5 must be above 0"),
    (["--model.rope_fraction=0.1"], ["--model.rope_fraction=0.0625"], "model.rope_fraction=0.1 must be above 0"),
    (["--model.rope_fraction=0.0"], [], "model.rope_fraction=0.0 must be above 0"),
    (["--model.attention_multiplier=0.1", HALF_TURNED], [HALF_TURNED], "model.attention_multiplier needs rotary"),
    (["--model.attention_multiplier=0.1", SOME_TURN], [SOME_TURN], "model.attention_multiplier needs rotary"),
    (["--data.packed_sequence_size=64"], ["--data.packed_sequence_size=64", "--data.format=hellaswag"], "no padding"),
    (["--data.format=chat"], ["--data.format=chat", "--data.train=['a']"], "data.format=chat needs data.train"),
    (["--data.format=tokens"], ["--data.format=tokens", "--data.train=['a']"], "data.format=tokens needs data.train"),
    (["--data.eos_id=3"], ["--data.eos_id=3", "--data.format=tokens", "--data.train=['a']"], "data.eos_id is for"),
    (["--data.text_key=a", "--data.format=hellaswag"], ["--data.text_key=a"], "data.text_key is for data.format=text"),
    (["--data.train_on=all"], ["--data.train_on=all", "--data.format=chat", "--data.train=['a']"], "data.train_on is"),
    (["--data.weights=[1.0]"], ["--data.weights=[1.0]", "--data.train=['a']"], "one for each of the 0 entries"),
    (["--data.weights=[0.0]", "--data.train=['a']"], [], "must be positive numbers"),
    (["--data.weights=[1.0,1e-6]", "--data.train=['a','b']"], [], "each large enough for one row"),
    ([*FP8_ON, "--fp8.precompute_float8_dynamic_scale_for_fsdp=True"],
     ["--fp8.precompute_float8_dynamic_scale_for_fsdp=True"], "has nothing to precompute without"),
    ([*FP8_ON, "--fp8.auto_filter=True"], [FP8_ON[0], "--fp8.auto_filter=True"], "contradicts fp8.emulate=True"),
    ([*FP8_ON, "--fp8.grad_fast_accum=True"], [FP8_ON[0], "--fp8.grad_fast_accum=True"], "contradicts fp8.emulate="),
    ([*COMPILED, RECOMPUTED[2]], COMPILED, "contradicts fp8.force_recompute_fp8_weight_in_bwd=True"),
    ([*RECOMPUTED, "--fp8.enable_fsdp_float8_all_gather=True"], RECOMPUTED, "change one of the three"),
    (KEEP, ["--fp8.keep_casts=True"], "fp8.keep_casts=True needs compile.enabled=True"),
    ([*FP8_ON, *MOVED], [*COMPILED, *MOVED], "fp8.offload_weights=True needs fp8.keep_casts=True"),
    ([*COMPILED, MOVED[0]], [*COMPILED, *MOVED], "the weights that optim.offload moves, which is 0"),
    ([*COMPILED, "--activation_checkpoint=full"], [*COMPILED, "--activation_checkpoint=selective"],
     "keeps what activation_checkpoint=full recomputes"),
]


@pytest.mark.parametrize("wrong, right, message", REFUSED, ids=lambda value: "")
def test_keys_that_contradict_each_other_are_refused_and_the_nearest_ones_are_not(wrong, right, message):
    assert [message in line for line in errors_of(*wrong)] == [True]
    load(right)


def test_every_message_about_a_config_has_an_example_among_these():
    places = {}  # {(code, line): the `yield` there}
    for kind in {type(section) for _, section in schema.sections(Config()) if hasattr(type(section), "problems")}:
        code, tree = kind.problems.__code__, ast.parse(inspect.getsource(sys.modules[kind.__module__]))
        (function,) = (node for node in ast.walk(tree) if getattr(node, "lineno", 0) == code.co_firstlineno
                       and isinstance(node, ast.FunctionDef))
        places |= {(code, line): ast.unparse(node) for node in ast.walk(function)
                   if isinstance(node, ast.Yield) for line in range(node.lineno, node.end_lineno + 1)}
    reached = set()

    def trace(frame, event, _):
        reached.add(places.get((frame.f_code, frame.f_lineno)))
        return trace if frame.f_code.co_name == "problems" else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for wrong, *_ in REFUSED:
            errors_of(*wrong)
    finally:
        sys.settrace(before)
    elsewhere = ("is a model folder", "is empty: name a folder", "of kind longrope needs")  # tests of their own
    assert not [text for text in set(places.values()) - reached if not any(part in text for part in elsewhere)]


@pytest.mark.parametrize("keys, message", [
    ({"kind": "longrope", "short_factors": [1.0]}, "of kind longrope needs 16 short_factors and as many long_factors"),
    ({"kind": "longrope", "short_factors": [1.0] * 16}, "needs 16 short_factors"),
    ({"kind": "longrope", "short_factors": [1.0] * 16, "long_factors": [1.0] * 16}, None)])
def test_factors_that_a_kind_of_rope_scaling_lacks_are_reported(keys, message):
    problems = list(model.ModelConfig(rope_scaling=model.RopeScaling(**keys)).problems())
    assert [message in problem for problem in problems] == ([] if message is None else [True])


def test_a_factor_that_would_divide_by_zero_is_an_error(tmp_path):
    path = tmp_path / "longrope.py"
    path.write_text("from configurator import Config\nfrom model import ModelConfig, RopeScaling\n"
                    "scaling = RopeScaling(kind='longrope', short_factors=[0.0] * 16, long_factors=[1.0] * 16)\n"
                    "config = Config(model=ModelConfig(rope_scaling=scaling))\n")
    with pytest.raises(ValueError, match=r"short_factors=.*: expected list\[float > 0\]$"):
        read_file(path)


RANGES = {f"{prefix}{f.name}": kind for prefix, section in schema.sections(FULL) for f in fields(section)
          for kind in (f.type, *typing.get_args(f.type)) if typing.get_origin(kind) is typing.Annotated}


def test_a_range_is_what_help_says_of_it():
    assert {"max_steps", "optim.betas", "model.sliding_window", "model.rope_scaling.factor"} < set(RANGES)
    for key, kind in RANGES.items():
        number, said, in_range = typing.get_args(kind)
        for value in (-1, -1e-9, 0, 1e-31, 1e-30, 0.5, 1 - 1e-9, 1, 1 + 1e-9, 2, 2**40 - 1, 2**40):
            if isinstance(value, number) or number is float:
                assert in_range(value) == eval(re.sub(r"\b(int|float)\b", "value", said)), (key, value)


def test_what_differs_from_an_earlier_config_is_reported(tmp_path):
    path = tmp_path / "config.py"
    assert configurator.changed(path, Config()) == ""
    path.write_text(to_python(Config()))
    assert configurator.changed(path, Config(resume="must")) == ""
    message = configurator.changed(path, Config(seed=2, fp8=FP8Config(recipe_name="rowwise", filter_fqns=["lm_head"])))
    assert message == (", now with seed=2 instead of 1337, fp8.recipe_name='rowwise' instead of None, "
                    "fp8.filter_fqns=['lm_head'] instead of []")


def test_problems_of_every_section_are_reported_together(file):
    path = file("config = Config(max_steps=9, model=ModelConfig(n_head=6, n_kv_head=4))")
    lines = errors_of(path, "--fp8.enabled=True", "--fp8.precompute_float8_dynamic_scale_for_fsdp=True",
                     "--optim.lr=-1.0", "--profile_step=10")
    assert len(lines) == 4
    for part, line in zip(("--optim.lr=-1.0", "profile_step=10", "n_head=6", "precompute_float8"), lines,
                          strict=True):
        assert part in line


def test_an_unreadable_file_draws_no_complaints_about_its_consequences(file):
    """micro_batch_size=16 may well divide what the file would have said."""
    assert len(errors_of(file("config = Config(global_batch_sise=16)"), "--micro_batch_size=16")) == 1


def test_read_file_does_not_ask_whether_values_go_together(file):
    """sample.py reads the config of a run whatever became of the machine it ran on."""
    path = file("config = Config(out_dir='')")
    assert read_file(path).out_dir == ""
    assert "out_dir is empty" in errors_of(path)[0]


# ----------------------------------------------------------------------------------------------------------------
# showing


CUSTOM = Config(
    model=model.llama3_1_8b(rope_scaling=model.RopeScaling(factor=1 / 3)),
    fp8=FP8Config(enabled=True, recipe_name="rowwise", filter_fqns=["lm_head", "it's", 'a "b"\n#']),
    compile=CompileConfig(enabled=True, dynamic=None),
    optim=OptimConfig(lr=0.1 + 0.2, betas=(1e-300, 0.999), eps=1e-9),
    out_dir="C:\\out 'run' é", wandb_project="None", max_steps=3)


@pytest.mark.parametrize("config", [Config(), FULL, CUSTOM], ids=["default", "llama3_1_8b", "custom"])
def test_to_python_reads_back_as_the_same_config(config, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(to_python(config), encoding="utf-8")
    assert read_file(path) == config
    assert max(map(len, to_python(config).splitlines())) <= 120


def test_to_python_imports_what_it_needs_and_nothing_else():
    assert "RopeScaling" not in to_python(Config()).partition("config = ")[0]
    names = re.findall(r"\b([A-Z]\w+)\(", to_python(CUSTOM))
    imported = re.findall(r"^from [\w.]+ import (.*)$", to_python(CUSTOM), re.MULTILINE)
    assert sorted(names) == sorted(name for line in imported for name in line.split(", "))
    assert "from attention import RopeScaling\n" in to_python(CUSTOM)


def test_print_config_shows_what_would_run(file, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        load([file("config = Config(seed=5)"), "--max_steps=9", "--print_config"])
    printed = capsys.readouterr().out
    assert not done.value.code
    (tmp_path / "printed.py").write_text(printed)
    assert load([str(tmp_path / "printed.py")]) == Config(seed=5, max_steps=9)
    assert errors_of("--print_config", "--max_steps=0") == ["--max_steps=0: expected int >= 1"]


def test_help_lists_every_key_with_type_default_and_meaning(file, capsys):
    with pytest.raises(SystemExit) as done:
        load([file("config = Config(model=model.llama3_1_8b(), max_steps=1234)"), "--nonsense", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not done.value.code
    for name, (section, key) in KEYS.items():
        meaning = schema.comments(type(section))[0][key.name]
        if not is_dataclass(value := getattr(section, key.name)):
            default = "1234" if name == "max_steps" else repr(value)
            row = f" {name} {schema.type_name(key.type)} {default} {meaning}"
            assert row in text, name
    assert all(f"fp8.{alias} = fp8.{name}" in text for alias, name in fp8.ALIASES.items())
    assert "several GPUs replicas int" in text


def test_help_fits_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "A purpose. " * 12 + "\n\n    a command\n", raising=False)
    text = configurator.help_text(list(schema.sections(Config())))
    assert max(map(len, text.splitlines())) <= 80 and "\n    a command\n" in text


def test_help_with_an_unreadable_file_reports_the_error(file):
    path = file("config = 1")
    assert errors_of(path, "--help")[0].startswith(path)


@pytest.mark.parametrize("name", KEYS)
def test_every_field_has_a_comment(name):
    section, key = KEYS[name]
    assert schema.comments(type(section))[0][key.name]


def test_comments_are_read_from_the_source_not_guessed():
    @dataclass
    class Odd:
        # a heading
        hashed: str = "a  # b"  # the comment
        long: list[str] = field(
            default_factory=list)  # at the end
        none: int = 0

    source = textwrap.dedent(inspect.getsource(Odd))
    getsource, inspect.getsource = inspect.getsource, lambda kind: source
    try:
        assert schema.comments(Odd) == (
            {"hashed": "the comment", "long": "at the end", "none": ""}, {"hashed": "a heading"})
    finally:
        inspect.getsource = getsource


# ----------------------------------------------------------------------------------------------------------------
# nothing in it is dead


# what the code calls a config, a section, or something like it; an attribute of anything else is another thing
CONFIGS = {"config", "cfg", "compile_cfg", "real", "other", "wanted", "m", "fp8", "optim", "data", "model", "compile",
           "rope_scaling", "s", "scaling"}


class Reads(ast.NodeVisitor):
    """The attributes of configs that a file reads outside of the config's own dataclasses."""

    def __init__(self, own):
        self.own, self.names = own, set()

    def visit_ClassDef(self, node):
        if node.name not in self.own:
            self.generic_visit(node)

    def visit_Attribute(self, node):
        base = getattr(node.value, "id", getattr(node.value, "attr", None))
        if isinstance(node.ctx, ast.Load) and base in CONFIGS:
            self.names.add(node.attr)
        self.generic_visit(node)


@pytest.fixture(scope="module")
def read_attributes():
    reads = Reads({type(section).__name__ for section, _ in KEYS.values()})
    for path in (p for part in ("", "checks/", "formats/", "plumbing/") for p in REPO.glob(f"{part}*.py")):
        reads.visit(ast.parse(path.read_text()))
    return reads.names


@pytest.mark.parametrize("name", KEYS)
def test_every_field_is_read_somewhere(name, read_attributes):
    assert name.rpartition(".")[2] in read_attributes, f"nothing reads {name}"


@pytest.mark.parametrize("path", sorted(REPO.glob("config/*.py")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    assert isinstance(load([str(path), "--init_from=scratch"]), Config)
