"""data.py: what is stored is what was written, and the loader shows each token once an epoch on any number of ranks."""

import base64
import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
import torch
from conftest import REPO, main_here, train_here

import data
import formats.files as text_files
import formats.text as text_format
import formats.tokens as tokens_format
import sample
from data import DataConfig, Loader, eval_batches
from formats.tokenizer import END, Tokenizer, get_tokenizer
from formats.tokens import Tokens
from model import IGNORE
from plumbing.errors import UserError

BYTES = get_tokenizer("bytes")


def config(tmp_path, *train, **keys):
    return DataConfig(train=[str(t) for t in train], cache_dir=str(tmp_path / "cache"), tokenizer="bytes", **keys)


def prepare(config):
    return data.prepare(config, 8, 0)


def cached(tmp_path):
    """Names of what is kept of texts in the cache."""
    return [path.name for path in (tmp_path / "cache").iterdir() if path.name not in (".lock", "notes")]


def everything(tokens):
    return tokens.slice(0, len(tokens))


def text_of(tokens):
    """The documents that a stream of byte tokens holds."""
    parts = np.split(t := everything(tokens), np.flatnonzero(t == 256) + 1)
    return [BYTES.decode(part[part != 256].tolist()) for part in parts if len(part)]


def single_bytes(name, special_tokens):
    """A Tokenizer whose ids are the bytes of the text."""
    ranks = {bytes([i]): i for i in range(256)}
    return Tokenizer(name, tiktoken.Encoding(name, pat_str=r".", mergeable_ranks=ranks, special_tokens=special_tokens))


SCRATCH = tempfile.TemporaryDirectory()


def stream(n, block_size=8, shard=10**6):
    """A Tokens of n tokens. Token i is i modulo 65521, so all windows differ."""
    folder = Path(tempfile.mkdtemp(dir=SCRATCH.name))
    for i, ids in enumerate(np.split((np.arange(n) % 65521).astype(np.uint16), range(shard, n, shard))):
        np.save(folder / f"{i:02}.npy", ids)
    return Tokens(sorted(folder.iterdir()), DataConfig(cache_dir=str(folder / "cache")), block_size, "train")


def loader(tokens, **keys):
    sizes = dict(global_batch_size=4, micro_batch_size=1, seed=3)
    return Loader(tokens, **{**sizes, **keys})


# ----------------------------------------------------------------------------------------------------------------
# from text to tokens


def test_every_20th_document_is_for_validation_and_nothing_is_lost(tmp_path, corpus):
    train, val, _ = prepare(config(tmp_path, corpus))
    texts = [p.read_text() for p in sorted(corpus.iterdir())]
    assert text_of(val) == texts[19::20]
    assert text_of(train) == [t for i, t in enumerate(texts) if i % 20 != 19]


def test_own_validation_files_leave_all_of_train_for_training(tmp_path, corpus):
    files = sorted(corpus.iterdir())
    train, val, _ = prepare(config(tmp_path, corpus / "0*.py", val=[str(files[40]), str(files[41])]))
    assert text_of(train) == [p.read_text() for p in files[:10]]
    assert text_of(val) == [p.read_text() for p in files[40:42]]


def test_a_single_document_is_split_at_its_end(tmp_path):
    (tmp_path / "one.txt").write_text("".join(chr(97 + i % 26) for i in range(1000)))
    train, val, _ = prepare(config(tmp_path, tmp_path / "one.txt"))
    assert (len(train), len(val)) == (951, 50)  # 1000 characters and the end-of-text token
    assert BYTES.decode([*everything(train), *everything(val)][:-1]) == (tmp_path / "one.txt").read_text()


def test_jsonl_lines_are_documents(tmp_path):
    texts = [f"document {i}\nof two lines, ünïcode" for i in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"id": 1, "body": t}) + "\n" for t in texts))
    train, val, _ = prepare(config(tmp_path, tmp_path / "d.jsonl", text_key="body"))
    assert text_of(val) == [texts[19], texts[39]]
    assert len(text_of(train)) == 38


def test_parallel_tokenization_is_the_same_as_serial(tmp_path, corpus):
    one, many = (prepare(config(tmp_path / str(n), corpus, workers=n))[0] for n in (1, 7))
    assert one.digest == many.digest


def test_text_with_the_name_of_a_special_token_stays_text(tmp_path):
    (tmp_path / "a.txt").write_text("x <|endoftext|> y" * 30)
    train, _, _ = prepare(config(tmp_path, tmp_path / "a.txt"))
    assert not (everything(train) == 256).any()


def test_half_a_character_in_jsonl_becomes_the_replacement_character(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "x \\ud83d y"}\n' * 20)
    train, _, _ = prepare(config(tmp_path, tmp_path / "d.jsonl"))
    assert text_of(train)[0] == "x \ufffd y"


def test_a_tokenizer_without_an_end_cannot_close_documents(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(data, "get_tokenizer", lambda name: single_bytes("endless", {}))
    with pytest.raises(ValueError, match="tokenizer endless has no end-of-text token"):
        prepare(config(tmp_path, corpus))


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path, corpus, monkeypatch):
    large = single_bytes("large", {END: 100_000})
    large.eos = 100_000
    monkeypatch.setattr(data, "get_tokenizer", lambda name: large)
    train, _, _ = prepare(config(tmp_path, corpus))
    assert train.arrays[0].dtype == np.uint32 and train.largest == 100_000 and train.slice(0, 10**6).max() == 100_000


def test_streams_run_across_shard_borders():
    tokens = stream(1000, shard=37)
    assert len(tokens.arrays) == 28
    assert everything(tokens).tolist() == list(range(1000))
    for start, stop in ((0, 37), (36, 38), (37, 74), (30, 200), (995, 1010), (1000, 1003)):
        assert tokens.slice(start, stop).tolist() == list(range(1000))[start:stop]


def test_full_shards_are_completed_and_hold_the_same_stream(tmp_path, corpus, monkeypatch):
    whole = prepare(config(tmp_path / "whole", corpus))
    monkeypatch.setattr(text_format, "PIECE", 1000)
    monkeypatch.setattr(text_format, "SHARD_TOKENS", 5000)
    cut = prepare(config(tmp_path, corpus))
    for one, many in zip(whole[:2], cut[:2], strict=True):
        assert len(one.arrays) == 1 and len(many.arrays) > 2 and np.array_equal(everything(one), everything(many))
    assert 5000 <= max(map(len, cut[0].arrays)) < 40_000


def test_embedded_corpus_is_the_standard_library_in_a_fixed_order():
    files = text_files.embedded_files()
    names = [p.name for p in files]
    assert files == sorted(files) and {"argparse.py", "_pydecimal.py", "pathlib.py"} & set(names)
    assert not any("site-packages" in p.parts or "test" in p.parts for p in files)


# ----------------------------------------------------------------------------------------------------------------
# long documents are cut


@pytest.fixture(scope="module")
def cut_by(tmp_path_factory):
    """Tokenizers by name: bytes, GPT-2's way of splitting text, and SentencePiece with a blank put before the text."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text = "".join(path.read_text() for path in text_files.embedded_files()[:6])
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=800, initial_alphabet=alphabet, special_tokens=[END], show_progress=False))
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "text").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "sp"), vocab_size=600, model_type="bpe",
        byte_fallback=True, minloglevel=2, max_sentence_length=9999)
    return text, {"bytes": BYTES, "gpt2": get_tokenizer(str(folder / "tokenizer.json")),
                  "sentencepiece": get_tokenizer(str(folder / "sp.model"))}


def in_chunks(text, rng):
    """The text in pieces of random length."""
    borders = np.sort(rng.integers(0, len(text), 20)).tolist()
    return [text[i:j] for i, j in zip([0, *borders], [*borders, len(text)], strict=True)]


@pytest.mark.parametrize("name", ["bytes", "gpt2", "sentencepiece"])
def test_a_document_in_pieces_has_the_ids_of_the_whole(cut_by, monkeypatch, name):
    monkeypatch.setattr(text_format, "PIECE", 300)
    source, tokenizer = cut_by[0], cut_by[1][name]
    n_pieces = n_forced = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        alphabet = ("ab \n", "ab.' \n\t", "aé你い5 \n", "a\r\n b\u0301\u00a0", None)[seed % 5]
        start = int(rng.integers(len(source) - 5000))
        text = source[start : start + 5000] if alphabet is None else "".join(rng.choice(list(alphabet), 3000))
        counts = {"forced cuts": 0}
        pieces = list(text_format.cut(in_chunks(text, rng), tokenizer, counts))
        ids = np.concatenate([text_format.encode_behind(tokenizer, piece.context, piece.text) for piece in pieces])
        assert [piece.starts for piece in pieces] == [i == 0 for i in range(len(pieces))]
        assert [piece.ends for piece in pieces] == [i == len(pieces) - 1 for i in range(len(pieces))]
        assert np.array_equal(ids, tokenizer.encode(text)) or counts["forced cuts"]
        assert pieces == list(text_format.cut(in_chunks(text, rng), tokenizer, {"forced cuts": 0}))
        n_pieces, n_forced = n_pieces + len(pieces), n_forced + counts["forced cuts"]
    assert n_pieces > 250 and n_forced < 0.1 * n_pieces


def test_sample_puts_bos_before_the_prompt_as_training_does(monkeypatch):
    tokenizer, prompts = single_bytes("llama", {END: 256, "<s>": 257}), []
    cfg = SimpleNamespace(model=SimpleNamespace(vocab_size=300, block_size=64), data=SimpleNamespace(tokenizer="bytes"))
    monkeypatch.setattr(sample, "load_model", lambda *args: (None, tokenizer, cfg))
    monkeypatch.setattr(sample, "generate", lambda model, tokens, *args: prompts.append(tokens) or [])
    for tokenizer.bos in ([], [257], [257, 256]):
        assert main_here(sample.main, "--from=x", "--prompt=hi")[0] == 0
    assert prompts == [[*b"hi"], [257, *b"hi"], [257, 256, *b"hi"]]


def test_text_without_a_place_to_cut_is_cut_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(text_format, "PIECE", 100)
    (tmp_path / "a.txt").write_text("x" * 950)
    train, val, _ = prepare(config(tmp_path, tmp_path / "a.txt"))
    assert BYTES.decode([*everything(train), *everything(val)][:-1]) == "x" * 950
    assert train.counts["forced cuts"] == 4 and "4 forced cuts" in train.description


def test_a_million_blanks_are_cut_and_counted_at_every_start(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("one", "a" + " " * 10**6 + "b")))
    (tmp_path / "o.tiktoken").write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    cfg = config(tmp_path, tmp_path / "d.jsonl")
    cfg.tokenizer = str(tmp_path / "o.tiktoken")
    for _ in range(2):
        train, val, tokenizer = prepare(cfg)
        assert len(train) + len(val) == 3 + 10**6 + 2 + 2 * (1 + len(tokenizer.bos))
        assert train.counts["forced cuts"] == 15 and "15 forced cuts" in train.description


def test_memory_does_not_grow_with_the_text(monkeypatch):
    monkeypatch.setattr(text_format, "PIECE", 1000)
    read = [0]

    def chunks():
        for _ in range(500):
            read[0] += 1000
            yield "some words " * 90 + "some words"

    counts = dict.fromkeys(("documents", "empty documents dropped", "forced cuts"), 0)
    monkeypatch.setattr(text_files, "documents", lambda paths, *args: [chunks()] if paths else [])
    written = 0
    for batch in text_format.in_order(list, text_format.batches(["a"], [], DataConfig(), BYTES, counts, None), 1):
        written += sum(len(piece.text) for _, piece in batch)
        assert read[0] - written < 8 * 2000  # characters that are held
    assert written == 500 * 1000 and counts["documents"] == 1


def test_documents_begin_with_bos_where_the_tokenizer_has_one(tmp_path, monkeypatch):
    with_bos = single_bytes("llama", {END: 256, "<s>": 257})
    with_bos.bos, with_bos.eos = [257, 65], 256
    monkeypatch.setattr(text_format, "PIECE", 100)
    monkeypatch.setattr(data, "get_tokenizer", lambda name: with_bos)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("one", "", "two " * 99)))
    train, val, _ = prepare(config(tmp_path, tmp_path / "a.jsonl"))
    ids = [*everything(train), *everything(val)]
    assert ids == [257, 65, *b"one", 256, 257, 65, *b"two " * 99, 256]
    assert train.sample(0)[0][0] == 257 and not train.sample(0)[1][0]
    without = single_bytes("llama", {END: 256, "<s>": 257})
    without.eos = 256
    monkeypatch.setattr(data, "get_tokenizer", lambda name: without)
    assert prepare(config(tmp_path, tmp_path / "a.jsonl"))[0].digest != train.digest  # shards of its own


# ----------------------------------------------------------------------------------------------------------------
# the cache


def test_second_run_reads_the_shards_of_the_first(tmp_path, corpus, monkeypatch):
    first = prepare(config(tmp_path, corpus))[0]
    monkeypatch.setattr(text_format, "build", lambda *args: pytest.fail("tokenized again"))
    assert prepare(config(tmp_path, corpus))[0].digest == first.digest


def test_changed_text_is_tokenized_again(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first version " * 50)
    before = prepare(config(tmp_path, path))[0].digest
    time.sleep(0.02)  # the same size: the time of change is what tells
    path.write_text("other version " * 50)
    assert prepare(config(tmp_path, path))[0].digest != before


def test_digest_is_of_the_content_not_of_the_path(tmp_path, corpus):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in corpus.iterdir():
        (copy / path.name).write_text(path.read_text())
    assert prepare(config(tmp_path, corpus))[0].digest == prepare(config(tmp_path / "other", copy))[0].digest


def test_a_cache_in_a_folder_of_data_train_is_not_trained_on(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    one, two = (prepare(config(tmp_path, tmp_path))[0] for _ in range(2))
    assert one.digest == two.digest and one.description == two.description and one.counts["files not used"] == 0


def test_interrupted_tokenization_leaves_nothing(tmp_path, corpus):
    (tmp_path / "bad.txt").write_bytes(b"ok" * 100 + b"\xff\xfe")
    with pytest.raises(ValueError, match="bad.txt is not UTF-8 text"):
        prepare(config(tmp_path, corpus, tmp_path / "bad.txt"))
    assert cached(tmp_path) == []


@pytest.fixture
def shard(tmp_path, corpus):
    prepare(config(tmp_path, corpus))
    return next((tmp_path / "cache").glob("*/train_00000.npy"))


def test_corrupt_shard_is_refused(tmp_path, corpus, shard):
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    time.sleep(0.02)  # the time of change is what tells that the shard is no longer the one that was hashed
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="is corrupt.*: delete .*, it is made again from the text"):
        prepare(config(tmp_path, corpus))


def test_a_shard_is_read_once_and_again_when_it_has_changed(tmp_path, corpus, shard, monkeypatch):
    first, read = prepare(config(tmp_path, corpus))[0].digest, []
    notes = tmp_path / "cache" / "notes"
    monkeypatch.setattr(tokens_format.np, "ascontiguousarray", lambda part: read.append(len(part)) or np.array(part))
    assert prepare(config(tmp_path, corpus))[0].digest == first and read == []
    time.sleep(0.02)
    shard.touch()
    assert prepare(config(tmp_path, corpus))[0].digest == first and len(read) == 1
    shutil.rmtree(notes)
    assert prepare(config(tmp_path, corpus))[0].digest == first and len(read) == 3  # of training and validation
    for note in notes.iterdir():
        note.write_bytes(b"\0")  # as a machine leaves it that loses its power
    assert prepare(config(tmp_path, corpus))[0].digest == first and len(read) == 5
    shutil.rmtree(notes)
    notes.touch()  # a folder that cannot be written to, even by root
    assert prepare(config(tmp_path, corpus))[0].digest == first and len(read) > 6


def test_a_damaged_index_is_refused(tmp_path, corpus, shard):
    shard.with_name("index.json").write_bytes(b"\0")
    with pytest.raises(UserError, match="delete .*, it is made again from the text"):
        prepare(config(tmp_path, corpus))


def test_truncated_shard_is_refused(tmp_path, corpus, shard):
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match="train_00000.npy is not a .npy file that can be memory-mapped.*: delete "):
        prepare(config(tmp_path, corpus))


@pytest.mark.parametrize("content", [b"", b"\0" * 5000])
def test_foreign_file_is_refused(tmp_path, corpus, shard, content):
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="train_00000.npy is not a .npy file that can be memory-mapped.*: delete "):
        prepare(config(tmp_path, corpus))


@pytest.mark.parametrize("before, after", [(b"shape", b"shade"), (b"{", b"\xff"), (b"<u2", b"<u9"), (b"<u2", b"<f2")])
def test_a_damaged_header_is_one_line(tmp_path, before, after):
    (tmp_path / "a.txt").write_text("text " * 100)
    prepare(config(tmp_path, tmp_path / "a.txt"))
    shard = next(tmp_path.glob("cache/*/train_00000.npy"))
    content = shard.read_bytes()
    assert before in content
    shard.write_bytes(content.replace(before, after))
    with pytest.raises(ValueError, match="train_00000.npy (is not a .npy|holds float).*: delete "):
        prepare(config(tmp_path, tmp_path / "a.txt"))


@pytest.mark.parametrize("pattern", ["train_00000.npy", "val_*.npy", "index.json"])
def test_a_missing_shard_is_told(tmp_path, monkeypatch, pattern):
    monkeypatch.setattr(text_format, "SHARD_TOKENS", 200)
    monkeypatch.setattr(text_format, "PIECE", 1000)
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("text " * 20)
    files = [tmp_path / f"{i}.txt" for i in range(20)]
    prepare(config(tmp_path, *files))
    missing = next(tmp_path.glob(f"cache/*/{pattern}"))
    missing.unlink()
    with pytest.raises(ValueError, match=f"{missing.name}.: delete .*, it is made again from the text"):
        prepare(config(tmp_path, *files))


# ----------------------------------------------------------------------------------------------------------------
# mistakes in the text


def test_a_pattern_without_files_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing.txt' matches no file"):
        prepare(config(tmp_path, tmp_path / "nothing.txt"))


@pytest.mark.parametrize("text", ["", "\n"])
def test_an_empty_corpus_is_an_error(tmp_path, text):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="data.train: no text in .*empty.txt"):
        prepare(config(tmp_path, tmp_path / "empty.txt"))


def test_validation_text_that_is_empty_too_short_or_given_alone(tmp_path):
    for name, text in (("empty.txt", ""), ("full.txt", "text " * 40), ("short.txt", "a text of 31 tokens is too few"),
                       ("val.txt", "validation")):
        (tmp_path / name).write_text(text)
    cfg = config(tmp_path, tmp_path / "full.txt")
    cfg.val = [str(tmp_path / "empty.txt")]
    for _ in range(2):
        with pytest.raises(ValueError, match="data.val: no text in .*empty.txt"):
            prepare(cfg)
    with pytest.raises(ValueError, match="30 tokens for training and 1 for validation are too few"):
        prepare(config(tmp_path, tmp_path / "short.txt"))
    cfg = config(tmp_path)  # the embedded corpus
    cfg.val = [str(tmp_path / "val.txt")]
    assert len(prepare(cfg)[1]) == len("validation") + 1


def test_a_file_of_data_val_in_a_folder_of_data_train_is_not_trained_on(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name * 100)

    def prepared(**files):
        cfg = data.DataConfig(**{key: [str(tmp_path / name)] for key, name in files.items()},
                              cache_dir=str(tmp_path / "cache"), tokenizer="bytes")
        train, val, _ = data.prepare(cfg, 16, 0)
        return len(train), len(val), train.description

    *sizes, told = prepared(train="", val="b.txt")
    assert sizes == [202, 101] and told.startswith("2 files of ")
    assert ", 1 more for validation alone, 202 training" in told
    *sizes, told = prepared(train="b.txt", val="b.txt")  # asked for
    assert sizes == [101, 101] and ", all of them validation text too, 101 training" in told
    *sizes, told = prepared(train="a.txt", val="b.txt")
    assert sizes == [101, 101] and told.startswith(f"1 file of {tmp_path / 'a.txt'}, 101 training")


def test_folders_that_a_glob_matches_count_as_folders_and_what_two_patterns_name_counts_once(tmp_path):
    for name in ("a/1.txt", "a/deep/2.TXT", "a/3.bin", "b/4.jsonl", "5.txt", "c/6.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(*patterns):
        used, _ = text_files.find_files([str(tmp_path / p) for p in patterns], text_files.TEXT)
        return [str(p.relative_to(tmp_path)) for p in used]

    assert found("*") == ["5.txt", "a/1.txt", "a/deep/2.TXT", "b/4.jsonl"]
    (tmp_path / "a" / ".git").mkdir()
    (tmp_path / "a" / ".git" / "h.txt").touch()
    assert found("a") == ["a/1.txt", "a/deep/2.TXT"]
    assert found("a/**") == ["a/1.txt", "a/deep/2.TXT"]
    (tmp_path / "[x]").mkdir()
    (tmp_path / "[x]" / "7.txt").touch()
    assert found("[x]") == ["[x]/7.txt"]
    assert found("[ab]") == ["a/1.txt", "a/deep/2.TXT", "b/4.jsonl"]
    assert found("b/4.jsonl", "b/*", "b", "a/../b/4.jsonl", "5.txt") == ["b/4.jsonl", "5.txt"]
    for empty in ("c*", "nothing*"):  # a folder of what does not count, no match
        with pytest.raises(ValueError, match="matches no file"):
            found(empty)


def test_blank_lines_and_a_byte_order_mark_are_no_text(tmp_path):
    (tmp_path / "d.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n  \n{"text": "two"}\n\n')
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfthree")
    documents = text_files.documents([tmp_path / "d.JSONL", tmp_path / "d.txt"], "text")
    assert ["".join(pieces) for pieces in documents] == ["one", "two", "three"]


class Killed(BaseException):
    """Ends a test's run as SIGKILL would: nothing is cleaned up."""


@pytest.mark.parametrize("n_batches", [1, 4, 7])
def test_a_killed_run_is_carried_on_from_its_shards(tmp_path, monkeypatch, n_batches):
    monkeypatch.setattr(text_format, "PIECE", 500)
    monkeypatch.setattr(text_format, "SHARD_TOKENS", 900)
    rows = [{"text": f"document {i}\n" * (i % 40)} for i in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg, encoded, encode_behind = config(tmp_path, tmp_path / "d.jsonl", workers=1), [], text_format.encode_behind
    whole, _, _ = prepare(config(tmp_path / "whole", tmp_path / "d.jsonl"))

    def batches_until_killed(function, items, n_threads):
        for i, item in enumerate(items):
            if i == n_batches:
                raise Killed
            yield function(item)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(text_format, "in_order", batches_until_killed)
        prepare(cfg)
    monkeypatch.setattr(text_format, "encode_behind", lambda *args: encoded.append(args[-1]) or encode_behind(*args))
    train, val, _ = prepare(cfg)
    assert train.digest == whole.digest and train.counts == whole.counts
    all_text = sum(len(row["text"]) for row in rows)
    assert sum(map(len, encoded)) < all_text - 500 * (n_batches - 2) + 1000  # not from scratch
    assert cached(tmp_path) == [train.description.split("/")[-1].split(",")[0]]


def no_locks(*args):
    raise OSError(errno.ENOTSUP, "not supported")


@pytest.mark.parametrize("locks", [True, False])
def test_two_runs_that_tokenize_the_same_do_not_meet(tmp_path, corpus, monkeypatch, locks):
    in_order, others, built = text_format.in_order, [], []

    def another_run_meanwhile(*args):
        built.append(args)
        if len(built) == 1:
            others.append(pool.submit(prepare, config(tmp_path, corpus)))
            if not locks:
                others[0].result()  # the other one is quicker
        yield from in_order(*args)

    if not locks:
        monkeypatch.setattr(text_format.fcntl, "flock", no_locks)
    monkeypatch.setattr(text_format, "in_order", another_run_meanwhile)
    with ThreadPoolExecutor(1) as pool:
        digest = prepare(config(tmp_path, corpus))[0].digest
        assert others[0].result()[0].digest == digest
    assert len(built) == (1 if locks else 2)
    assert len(cached(tmp_path)) == 1


@pytest.mark.parametrize("line, told", [
    ("{broken", "line 2 is not JSON: Expecting property name"),
    ('{"id": 1, "body": "x"}', r"line 2 has no 'text' \(data.text_key\): it has id, body"),
    ('{"text": 5}', "line 2: `text` is a number, expected a string"),
    ('{"text": null}', "line 2: `text` is null or missing, expected a string"),
    ('{"text": [{"role": "user"}]}', "line 2: `text` is a list, expected a string"),
    ("[1]", "line 2 is a list, expected an object")])
def test_a_broken_jsonl_line_is_named(tmp_path, line, told):
    (tmp_path / "d.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=told):
        prepare(config(tmp_path, tmp_path / "d.jsonl"))


def test_text_shorter_than_a_batch_is_an_error():
    with pytest.raises(ValueError, match="fills 3 rows of 8 tokens, one step needs global_batch_size=4: give more"):
        loader(stream(25))
    loader(stream(26))


# ----------------------------------------------------------------------------------------------------------------
# batches


def test_targets_are_the_next_tokens():
    x, y, positions = loader(stream(500), micro_batch_size=2).batch(5)
    assert x.shape == y.shape == (2, 2, 8) and x.dtype == torch.int64 and positions is None
    assert torch.equal(y[y != IGNORE], (x + 1)[y != IGNORE])


@pytest.mark.parametrize("n", [33, 40, 41, 1000, 1003])  # whole windows, and ends of 1 to 7 tokens
def test_an_epoch_has_every_token_as_target_exactly_once(n):
    one = loader(stream(n), global_batch_size=1, micro_batch_size=1)
    for epoch in range(2):
        steps = range(epoch * one.rows.n_rows, (epoch + 1) * one.rows.n_rows)
        targets = torch.cat([y[y != IGNORE] for _, y, _ in map(one.batch, steps)])
        assert sorted(targets.tolist()) == list(range(1, n))


def test_epochs_are_in_different_orders_and_seeds_too():
    tokens = stream(4000)
    order = lambda **keys: [int(x[0, 0, 0]) for x, *_ in map(  # noqa: E731
        loader(tokens, global_batch_size=1, **keys).batch, range(1000))]
    first = order()
    assert first[:500] != first[500:] and sorted(first[:500]) == sorted(first[500:])
    assert order(seed=4) != first and order() == first


@pytest.mark.parametrize("world_size, micro", [(1, 1), (1, 4), (2, 1), (2, 2), (2, 4), (4, 2), (8, 1)])
def test_global_batches_are_the_same_for_any_number_of_ranks(world_size, micro):
    tokens = stream(1000)
    whole = loader(tokens, global_batch_size=8, micro_batch_size=8)
    ranks = [loader(tokens, global_batch_size=8, micro_batch_size=micro, rank=r, world_size=world_size)
             for r in range(world_size)]
    for step in (0, 1, 15, 16, 40):  # also across the border of an epoch of 125 windows
        parts = [r.batch(step)[0] for r in ranks]
        assert torch.equal(torch.cat(parts, dim=1).flatten(0, 1), whole.batch(step)[0][0])


def test_any_step_is_reached_without_the_steps_before():
    tokens = stream(100_000)
    walked, jumped = loader(tokens), loader(tokens)
    for step in range(300):
        x, y, _ = walked.batch(step)
    assert torch.equal(jumped.batch(299)[0], x) and torch.equal(jumped.batch(299)[1], y)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_each_window_once_on_any_number_of_ranks(world_size):
    tokens = stream(1003)
    parts = [list(eval_batches(tokens, n=0, micro_batch_size=4, rank=r, world_size=world_size))
             for r in range(world_size)]
    assert len({len(p) for p in parts}) == 1  # equally many forward passes: each is a collective under FSDP
    targets = torch.cat([y[y != IGNORE] for part in parts for _, y, _ in part])
    assert sorted(targets.tolist()) == list(range(1, 1003))


def test_evaluation_of_n_windows_spreads_them_over_the_stream():
    batches = list(eval_batches(stream(1001, block_size=10), n=5, micro_batch_size=2))
    starts = [int(x[0]) for xs, ys, _ in batches for x, y in zip(xs, ys, strict=True) if (y != IGNORE).any()]
    assert starts == [0, 200, 400, 600, 800]


# ----------------------------------------------------------------------------------------------------------------
# mixtures


def mixture(*sizes, weights=(3, 1)):
    parts = [stream(n * 8 + 1) for n in sizes]
    return data.Mixture(parts, DataConfig(train=[f"entry {i}" for i in range(len(parts))], weights=list(weights)))


def test_a_mixture_draws_in_proportion_from_the_first_steps_on():
    rows = mixture(50, 70, 20, weights=(0.7, 0.2, 0.1))
    order = data.Order(rows, seed=3)
    for n in (10, 100, 1000, 25_000):
        counts = np.histogram([order[k] for k in range(n)], order.starts)[0]
        assert np.abs(counts - n * np.array([0.7, 0.2, 0.1])).max() < 2


def test_each_part_of_a_mixture_goes_through_its_epochs_without_repeats():
    order = data.Order(mixture(30, 7, weights=(1, 1)), seed=3)
    picks = [order[k] for k in range(20_500)]  # over the borders of blocks
    for start, n in ((0, 30), (30, 7)):
        rows = [row - start for row in picks if start <= row < start + n]
        epochs = [rows[i : i + n] for i in range(0, len(rows) - n, n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs) and epochs[0] != epochs[1]


def test_a_mixture_is_the_same_on_any_number_of_ranks_and_from_any_step():
    rows = mixture(40, 25)
    whole = loader(rows, global_batch_size=8, micro_batch_size=8)
    ranks = [loader(rows, global_batch_size=8, rank=r, world_size=4) for r in range(4)]
    for step in (0, 3, 1249, 1250, 9):  # 1250: the second block
        parts = [r.batch(step)[0] for r in ranks]
        assert torch.equal(torch.cat(parts, dim=1).flatten(0, 1), whole.batch(step)[0][0])
    assert not torch.equal(loader(rows, global_batch_size=8, micro_batch_size=8, seed=4).batch(0)[0],
                           whole.batch(0)[0])


def test_without_weights_an_epoch_is_a_permutation_drawn_from_seed_and_epoch():
    one = loader(stream(25_001 * 8))
    for k, epoch in ((0, 0), (10_007, 0), (25_000, 0), (25_001, 1), (80_000, 3)):
        order = np.random.default_rng((3, epoch)).permutation(25_001)
        assert one.order[k] == order[k % 25_001]


def test_epochs_are_counted_for_each_entry():
    rows = mixture(50, 25)
    assert loader(rows).epochs(100) == "6.00 epochs of entry 0, 4.00 epochs of entry 1"  # 400 rows, 300 and 100
    assert loader(rows.parts[0]).epochs(10) == "0.80 epochs"


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, 0.0], [1.0, 1e-6]])
def test_weights_that_fit_no_entries_are_an_error(weights):
    assert len([*DataConfig(train=["a", "b"], weights=weights).problems()]) == 1
    assert not [*DataConfig(train=["a", "b"], weights=[1.0, 3.0]).problems()]


def test_entries_of_data_train_become_parts_with_validation_of_their_own(tmp_path):
    for name, n in (("a", 100), ("b", 50)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(n)))
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    train, val, _ = prepare(config(tmp_path, *files, weights=[1.0, 3.0]))
    alone = [prepare(config(tmp_path, file)) for file in files]
    assert [part.digest for part in train.parts] == [rows.digest for rows, _, _ in alone]
    assert val.n_rows == sum(rows.n_rows for _, rows, _ in alone)
    firsts = [val.row(i)[0].tolist() for i in range(val.n_rows)]
    assert firsts == [rows.row(i)[0].tolist() for _, rows, _ in alone for i in range(rows.n_rows)]
    assert train.counts["documents"] == 95 + 48 and "25.0% 1 file of" in train.description
    assert prepare(config(tmp_path, *files, weights=[1.0, 2.0]))[0].digest != train.digest
    samples = [train.sample(i)[0].tolist() for i in range(train.n_samples)]
    assert samples == [rows.sample(i)[0].tolist() for rows, _, _ in alone for i in range(rows.n_samples)]


@pytest.mark.parametrize("name", ["largest", "longest", "most_documents"])
def test_the_bounds_of_a_mixture_hold_for_each_of_its_parts(name):
    parts = mixture(3, 4).parts
    for part in parts:
        setattr(part, name, 1000)
        rows = data.Mixture(parts, DataConfig(train=["a", "b"], weights=[1.0, 1.0]))
        assert getattr(rows, name) == 1000
        setattr(part, name, 5)


def test_a_file_in_two_entries_of_a_mixture_is_an_error(tmp_path, corpus):
    with pytest.raises(UserError, match="00.py is in several entries of data.train"):
        prepare(config(tmp_path, corpus, corpus / "00.py", weights=[1.0, 1.0]))


def test_shorter_rows_of_a_mixture_are_padded(tmp_path):
    files = []
    for name, length in (("short", 20), ("long", 50)):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({
            "activity_label": name, "ctx_a": f"{i:02}", "ctx_b": "", "endings": ["x" * length, "y"], "label": 0}) + "\n"
            for i in range(20)))
    cfg = config(tmp_path, *files, format="hellaswag", weights=[1.0, 3.0])
    train, val, _ = data.prepare(cfg, 256, 0)
    lengths = [len(f"{name}: 00 ") + n - 1 for name, n in (("short", 20), ("long", 50))]
    assert train.block_size == val.block_size == 64 and train.n_rows == 38
    for i, n in ((0, lengths[0]), (19, lengths[1])):
        x, y, positions = train.row(i)
        assert len(x) == len(y) == 64 and (y[n:] == IGNORE).all() and not x[n:].any() and positions is None
        assert train.row(i)[1][n - 1] == ord("x")
    assert train.padding == pytest.approx(1 - (lengths[0] + 3 * lengths[1]) / 4 / 64)
    assert train.document == pytest.approx((lengths[0] ** 2 + 3 * lengths[1] ** 2) / (lengths[0] + 3 * lengths[1]))
    stack = [rows[0] for rows in Loader(train, global_batch_size=8, micro_batch_size=8, seed=1).batch(0)[:2]]
    assert all(part.shape == (8, 64) for part in stack)


# ----------------------------------------------------------------------------------------------------------------
# python data.py


def look(tmp_path, *argv):
    return main_here(data.main, f"--data.cache_dir={tmp_path / 'cache'}", "--model.block_size=8",
                     "--global_batch_size=2", *argv)


def test_too_little_data_is_told_after_what_is_there(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 50)
    args = [f'--data.train=["{tmp_path / "a.txt"}"]', f"--data.cache_dir={tmp_path}", "--model.block_size=64"]
    status, out, err = main_here(data.main, *args, "--global_batch_size=32", "--show=1")
    assert status == 2 and "one step needs global_batch_size=32" in err
    assert "---- sample 1 of" in out and " 4 of 64 tokens" in out


def test_a_look_at_text_shows_samples_counts_and_writes_every_window(tmp_path):
    rows = [{"text": "" if i % 10 == 0 else f"document {i}"} for i in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "README.md").write_text("about")
    status, out, err = look(tmp_path, f'--data.train=["{tmp_path}"]', "--show=2", f"--out={tmp_path / 'rows.json'}")
    assert status == 0, err
    assert "---- sample 1 of 50: 9 tokens, 8 targets\nd{+ocument +}\n" in out and "{+1<|endoftext|>docume+}" in out
    texts = [row["text"] for i, row in enumerate(rows, 1) if i % 20 and row["text"]]
    train = [token for text in texts for token in (*text.encode(), 256)]
    for what, number in (("documents", len(texts)), ("tokens", len(train)), ("targets", len(train) - 1),
                         ("empty documents dropped", 4), ("files not used", 1)):
        assert f"{what:<40} {number:>16,}\n" in out
    written = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert all(set(row) == {"ids", "loss"} and len(row["ids"]) == len(row["loss"]) for row in written)
    targets = [i for row in written for i, loss in zip(row["ids"], row["loss"], strict=True) if loss]
    assert targets == train[1:] and written[0]["ids"] == train[:9]


def test_a_look_at_hellaswag_shows_the_right_ending_as_target(tmp_path):
    questions = [{"ind": i, "activity_label": "Cooking", "ctx_a": "A man stands.", "ctx_b": "he", "label": i % 4,
                  "endings": [f"ending {i} {k}" for k in range(4)]} for i in range(40)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    status, out, err = look(tmp_path, f'--data.train=["{tmp_path / "q.jsonl"}"]', "--data.format=hellaswag",
                            "--model.block_size=64", f"--out={tmp_path / 'rows.json'}",
                            "--data.packed_sequence_size=64")
    assert status == 0, err
    assert "Cooking: A man stands. He{+ ending 1 1+}" in out
    written = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    right = [f" ending {i} {i % 4}" for i in range(40) if (i + 1) % 20]
    assert [BYTES.decode([t for t, n in zip(*row.values(), strict=True) if n]) for row in written] == right
    assert f"{'targets':<40} {sum(map(len, right)):>16,}\n" in out


def test_a_look_at_tokens_shows_ids_that_the_tokenizer_lacks(tmp_path):
    np.array([104, 105, 300, 33] * 30, "<u2").tofile(tmp_path / "a.bin")
    status, out, err = look(tmp_path, f'--data.train=["{tmp_path / "a.bin"}"]', "--data.format=tokens", "--show=1",
                            "--model.vocab_size=320", "--data.eos_id=300")
    assert status == 0, err
    assert "\nh{+i<300>!hi<300>!h+}\n" in out and "sample 2" not in out


def test_every_number_of_a_look_is_that_of_the_rows_that_it_writes(tmp_path):
    questions = [{"activity_label": "A", "ctx_a": "b" * (i % 7 + 1), "ctx_b": "", "endings": ["c" * (i % 5 + 1), "d"],
                  "label": 0} for i in range(43)]
    for name, part in (("t", questions[3:]), ("v", questions[:3])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in part))
    status, out, err = look(tmp_path, f'--data.train=["{tmp_path / "t.jsonl"}"]', f"--out={tmp_path / 'rows.json'}",
                            f'--data.val=["{tmp_path / "v.jsonl"}"]', "--data.format=hellaswag", "--max_steps=12",
                            "--model.block_size=32", "--data.packed_sequence_size=32", "--global_batch_size=3")
    assert status == 0, err
    written = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    sizes, n_targets = [len(row["ids"]) for row in written], [sum(row["loss"]) for row in written]
    assert len(sizes) == 40 and sizes == [len(f"A: {q['ctx_a']} {q['endings'][0]}") for q in questions[3:]]
    for i in range(3):
        assert f"---- sample {i + 1} of 40: {sizes[i]} tokens, {n_targets[i]} targets\n" in out
    shown = dict(re.findall(r"^([a-z ]+?) {2,}([\d,]+)", out, re.MULTILINE))
    assert shown | {"rows": None} == {
        "documents": "40", "tokens": str(sum(sizes)), "targets": str(sum(n_targets)), "files not used": "0",
        "samples cut at the beginning": "0", "rows": None, "validation rows": "1"}
    n_rows, inputs = int(shown["rows"]), sum(sizes) - 40  # the last id of each is no input
    assert inputs / 32 <= n_rows < inputs / 32 * 1.2
    padding, share = 1 - inputs / (32 * n_rows), sum(n_targets) / sum(sizes)
    assert f"{n_rows} of 32 tokens, {padding:.1%} padding\n" in out
    assert f"\n12 steps of 3 rows see {36 / n_rows:.2f} epochs\n" in out
    assert (f"hellaswag, 40 training samples in {n_rows} rows of 32 tokens, {padding:.1%} of them padding, {share:.0%} "
            "of the text is trained on, 3 validation samples in 1 rows, tokenizer bytes; 1 file of "
            f"{tmp_path / 't.jsonl'}\n") in out


def test_ids_of_validation_data_that_the_model_lacks_are_reported(tmp_path):
    for name, largest in (("train", 200), ("val", 300)):
        np.array([1, 2, 3, largest] * 30, "<u2").tofile(tmp_path / f"{name}.bin")
    keys = [f'--data.train=["{tmp_path / "train.bin"}"]', f'--data.val=["{tmp_path / "val.bin"}"]',
            "--data.format=tokens"]
    status, _, err = look(tmp_path, *keys)
    assert status == 2 and "token id 300, beyond model.vocab_size=272" in err
    assert look(tmp_path, *keys, "--model.vocab_size=320")[0] == 0


def test_targets_are_green_on_a_terminal():
    ids, loss = np.frombuffer(b"a question, an answer.", np.uint8), np.arange(22) >= 12
    assert data.marked(ids, loss, BYTES, colour=True) == "a question, \033[32man answer.\033[0m"


@pytest.mark.parametrize("argv, told", [
    (["--show=-1"], "--show=-1: expected int >= 0"), (["--out=/nowhere/x"], "a writable file in a folder"),
    (["--data.train=['']"], "is an empty entry"), (["--data.format=tokens"], "needs data.train"),
    (["--init_from=Qwen3-8B"], "init_from=Qwen3-8B: no such folder: name a Hugging Face"),
    (["--data.eos_id=3"], "data.eos_id is for data.format=tokens"), (["--model.vocab_size=64"], "has token id")])
def test_mistakes_in_a_look_are_one_line(tmp_path, argv, told):
    (tmp_path / "a.txt").write_text("text " * 100)
    status, _, err = look(tmp_path, f'--data.train=["{tmp_path / "a.txt"}"]' if "train" not in argv[0]
                          and "tokens" not in argv[0] else "--seed=1", *argv)
    assert status == 2 and told in err and len(err.splitlines()) == 1


def test_a_look_that_head_cuts_short_ends_without_a_traceback(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 200_000)
    command = [sys.executable, REPO / "data.py", f'--data.train=["{tmp_path / "a.txt"}"]', "--show=10000",
               f"--data.cache_dir={tmp_path / 'cache'}", "--model.block_size=16"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as look_:
        assert look_.stdout.readline().startswith("data: 1 file of")
        look_.stdout.close()
        assert "Traceback" not in look_.stderr.read() and look_.wait() == -signal.SIGPIPE


@pytest.mark.parametrize("script, args", [("train.py", ["--help"]), ("sample.py", ["--prompt=x"])])
def test_output_that_head_cuts_short_ends_without_a_traceback(script, args, tmp_path, tiny_run):
    if script == "sample.py":
        train_here(*tiny_run, f"--out_dir={tmp_path / 'out'}", "--max_steps=1")
        args = [*args, f"--from={tmp_path / 'out'}", "--max_new_tokens=300"]
    with subprocess.Popen([sys.executable, REPO / script, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as shown:
        shown.stdout.close()
        assert "Traceback" not in shown.stderr.read() and shown.wait() == -signal.SIGPIPE


def test_the_shown_rows_do_not_replace_the_data(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a b c"}\n' * 40)
    text = file.read_text()
    status, _, message = main_here(data.main, f'--data.train=["{file}"]', f"--out={tmp_path}/x/../a.jsonl",
                                   f"--data.cache_dir={tmp_path / 'cache'}", "--model.block_size=16")
    assert status == 2 and "name a" in message and file.read_text() == text
    status, _, message = main_here(data.main, f'--data.train=["{file}"]', f"--out={file}",
                                   f"--data.cache_dir={tmp_path / 'cache'}", "--model.block_size=16")
    assert status == 2 and "is a file of the data" in message and file.read_text() == text
