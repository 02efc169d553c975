"""Every command that README and docs show: those in blocks marked <!-- test --> run, the others' keys are checked.

A marked block runs in a folder with the files that the pages name, in this process, on a model of one layer. The mark
can hold keys for the commands of its block, <!-- test: --seeds=1 -->, or the name of a file that its Python code is
written to, <!-- test: write books.py -->.
"""

import importlib
import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch
from conftest import REPO, main_here, train_in_process
from torch.distributed.run import get_args_parser

import bench
import checkpoint
import configurator
import data
import parity
import train
from formats import files

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in REPO.glob("docs/*.md"))]
RECORD = "docs/notebook.md"  # its commands are those of the commits that ran
OTHERS = {"pip", "hf", "pytest", "ruff", "git", "bash", "jq"}  # not ours
TINY = ["--model.n_layer=1", "--model.n_embd=32", "--model.n_head=2", "--model.n_kv_head=1", "--model.head_dim=16",
        "--model.ffn_dim=64", "--model.block_size=64"]
SMALL = ["--compile.enabled=False", "--eval_sequences=2", "--global_batch_size=2", "--micro_batch_size=2",
         "--dtype=float32", "--optim.weights=plain", "--loss_chunks=1", "--activation_checkpoint=none"]
STEPS = ["--max_steps=2", "--eval_interval=2", "--checkpoint_interval=2"]
EXTRA = {"train.py": [*SMALL, *STEPS, "--resume=never"], "parity.py": [*SMALL, *STEPS], "bench.py": SMALL,
         "data.py": [], "sample.py": ["--max_new_tokens=3"], "eval.py": ["--limit=2"], "checkpoint.py": []}
OWN = {"bench.py": bench.BenchConfig, "parity.py": parity.ParityConfig, "data.py": data.Look, "train.py": None}


class Block(NamedTuple):
    """A block of code of a page: what its mark says (None without a mark), and its text."""

    mark: str | None
    text: str


def blocks(page):
    """The blocks of a page, fenced or indented, in their order."""
    fenced, indented = r"```\w*\n(?P<fenced>.*?)```", r"(?P<indented>(?:^    [^\n]*\n|^\n(?=    ))+)"
    for found in re.finditer(rf"(?:^<!-- test:? ?(?P<mark>[^\n]*?) ?-->\n+)?^(?:{fenced}|{indented})",
                             (REPO / page).read_text() + "\n", re.M | re.S):
        yield Block(found["mark"], found["fenced"] or found["indented"])


def commands(text):
    """The commands of a block of shell code, as lists of words; what it sets as shell variables is filled in."""
    variables = {}
    for line in text.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # the screen or a picture, not a command
            continue
        while words and re.match(r"[A-Z_]+\d?=", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if words and words[0] == "srun":
            words.pop(0)
        if words and words[0] in {"python", "torchrun", *OTHERS}:
            yield words


def script_and_arguments(words):
    """(script, its arguments) of a command of ours. torchrun's own parser reads what is before the script."""
    if words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        return launched.training_script, launched.training_script_args
    return words[1], words[2:]


MARKED = [page for page in PAGES if page != RECORD and any(block.mark is not None for block in blocks(page))]


# ----------------------------------------------------------------------------------------------------------------
# commands that are only read


@pytest.fixture
def anywhere(tmp_path, monkeypatch):
    """A folder with the files that the commands name as a reader's own: none is read."""
    (tmp_path / "config").symlink_to(REPO / "config")
    for name in ("CONFIG.py", "books.py"):
        (tmp_path / name).write_text("from configurator import Config\nconfig = Config()\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if page != RECORD])
def test_scripts_exist_and_take_the_keys_that_are_shown(page, anywhere):
    found = [words for block in blocks(page) for words in commands(block.text)]
    n_marks = sum(block.mark is not None for block in blocks(page))
    assert n_marks == len(re.findall("^<!-- test", (REPO / page).read_text(), re.M)), "a mark is not before a block"
    for words in found:
        if words[0] in OTHERS:
            assert all((REPO / name).exists() for name in words if name.startswith(("requirements", ".ci", "tests/")))
            continue
        script, arguments = script_and_arguments(words)
        assert (REPO / script).is_file(), words
        if script in OWN:
            own = OWN[script] and OWN[script]()
            configurator.load(arguments, own)
            for variant in bench.split(getattr(own, "variants", "bf16")):
                configurator.load([word for word in arguments if not word.startswith("-")] + bench.flags(variant))
        elif script in EXTRA:
            _, options, _ = main_here(importlib.import_module(script.removesuffix(".py")).main, "--help")
            for argument in arguments:
                assert not argument.startswith("--") or argument.partition("=")[0] in options, words
        else:  # bench/
            for argument in arguments:
                name = argument.partition("=")[0].removeprefix("--")
                known = re.search(rf'"--{name}"|^    {name}: ', (REPO / script).read_text(), re.M)
                assert not argument.startswith("--") or known, words


# ----------------------------------------------------------------------------------------------------------------
# commands that run

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}" \
           "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def write_tokenizer(folder):
    """A byte tokenizer with a chat template, as Hugging Face's files."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<|user|>", "<|assistant|>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE}))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a reader who has what the pages name: texts, conversations, questions, tokens, model folders."""
    world = tmp_path_factory.mktemp("world")
    (world / "config").symlink_to(REPO / "config")
    sizes = ", ".join(key.removeprefix("--model.") for key in TINY)
    (world / "CONFIG.py").write_text("from configurator import Config, ModelConfig\n"
                                     f"config = Config(model=ModelConfig(vocab_size=320, {sizes}))\n")
    texts = [f"Chapter {i}. " + "It was a dark and stormy night. " * 20 for i in range(60)]
    for folder in ("books", "web", "code", "math"):
        (world / folder).mkdir()
        for i, text in enumerate(texts):
            (world / folder / f"{i}.txt").write_text(text)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), world / "wiki.parquet")
    write_lines(world / "chats.jsonl", [{"messages": [{"role": "user", "content": f"{i} + 1?"},
                                                      {"role": "assistant", "content": str(i + 1)}]}
                                        for i in range(60)])
    questions = [{"ind": i, "activity_label": "Cooking", "ctx_a": f"A cook takes {i} eggs.", "ctx_b": "she",
                  "ctx": f"A cook takes {i} eggs. she", "endings": ["breaks them.", "flies.", "sings.", "sleeps."],
                  "label": 0, "split": "train"} for i in range(60)]
    (world / "data_cache").mkdir()  # where a download would put them
    for path in ("questions.jsonl", "data_cache/hellaswag_train.jsonl", "data_cache/hellaswag_val.jsonl"):
        write_lines(world / path, questions)
    (world / "fineweb10B").mkdir()
    for split in ("train", "val"):
        np.random.default_rng(1).integers(0, 256, 2000).astype(np.uint16).tofile(
            world / "fineweb10B" / f"fineweb_{split}_000.bin")
    write_tokenizer(world / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        arguments = ["CONFIG.py", "--data.train=['books/']", "--data.tokenizer=tokenizer", "--out_dir=OUT_DIR",
                     "--fp8.enabled=True", "--fp8.emulate=True", "--fp8.filter_fqns=['lm_head']"]
        for main, words in ((train.main, [*arguments, *SMALL, *STEPS]),
                            (checkpoint.main, ["export", "OUT_DIR", "Qwen3-8B"])):
            status, _, error = main_here(main, *words)
            assert status == 0, error
    described = json.loads((world / "Qwen3-8B" / "config.json").read_text())
    described["max_position_embeddings"] = 2**17
    (world / "Qwen3-8B" / "config.json").write_text(json.dumps(described))
    for name in ("Llama-3.1-8B", "SmolLM2-135M-Instruct"):
        (world / name).symlink_to(world / "Qwen3-8B")
    for folder in ("out", "docs/results"):
        (world / folder).mkdir(parents=True)
    (world / "out" / "llama3_1_8b_hellaswag_fp8").symlink_to(world / "OUT_DIR")
    return world


def run_in_process(script, arguments, mark):
    """Run a command of ours with a small model: (exit status, stdout, stderr)."""
    keys = EXTRA[script]
    if script in OWN:
        chosen = configurator.load(arguments, OWN[script] and OWN[script]())
        keys = [*keys, *(TINY if chosen.init_from == "scratch" else []), *mark]
    return main_here(importlib.import_module(Path(script).stem).main, *arguments, *keys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the configs choose 8B models")
@pytest.mark.parametrize("page", MARKED)
def test_commands_run(page, world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr(bench, "train", train_in_process)
    monkeypatch.setattr(files, "embedded_files", lambda: sorted(world.glob("books/*")))  # quick to tokenize
    for block in blocks(page):
        if block.mark is None:
            continue
        first, *rest = shlex.split(block.mark) or [""]
        if first == "write":
            (world / rest[0]).write_text(block.text)
            continue
        for words in [words for words in commands(block.text) if words[0] not in OTHERS]:
            monkeypatch.setattr(sys, "stdin", io.StringIO("2 + 2?\n"))  # for sample.py --chat
            status, out, error = run_in_process(*script_and_arguments(words), shlex.split(block.mark))
            assert status == 0, f"{shlex.join(words)}\n{out}\n{error}"
