"""Text as training rows: tokenized once into shards on disk, which are then read as any token files.

    documents -> pieces -> tokenizer (threads) -> shards (.npy) -> formats/tokens.py

A document is BOS (where the tokenizer's configuration puts one), its text, EOS. Memory holds one shard at a time.
"""

import fcntl
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from formats import files
from formats.tokens import open_splits, open_tokens, survey
from plumbing.disk import replace_text
from plumbing.errors import UserError

VERSION = 5  # of what is kept in data.cache_dir
SHARD_TOKENS = 20_000_000  # a shard with as many is complete

# Where a document may be cut: before a single blank or newline between two letters, or between a newline behind
# anything but white space and a letter. All published ways to split text have a border there, and no token crosses it.
# `cut` tries every place with the tokenizer itself before it uses it.
LETTER = r"[^\W\d_]"
SAFE = re.compile(rf"(?<={LETTER})(?=[ \n]{LETTER})|(?<=\S\n)(?={LETTER})")
PIECE = 2**15  # characters; the next safe place behind as many is a cut


class Piece(NamedTuple):
    """A part of a document. context: stands for the text before it, which decides how its first word is encoded."""

    text: str
    context: str  # "" at the beginning of a document, and after a forced cut
    starts: bool
    ends: bool


def cut(chunks, tokenizer, counts):
    """Yield the Pieces of a document, an iterable of str. Their ids are those of the whole text.

    Where PIECE characters hold no safe place (no words at all), they are cut anyway: counts["forced cuts"].
    """
    text, at, context, starts = "", 0, "", True
    for chunk in chunks:
        text, at = text[at:] + chunk, 0
        while len(text) - at > 2 * PIECE:
            end, after = safe_place(text, at + PIECE, at + 2 * PIECE, tokenizer)
            counts["forced cuts"] += after == ""
            yield Piece(text[at:end], context, starts, ends=False)
            at, context, starts = end, after, False
    if at < len(text):
        yield Piece(text[at:], context, starts, ends=True)


def safe_place(text, start, stop, tokenizer):
    """(place, context for what follows) of the first safe place in text[start:stop]; (stop, "") if there is none."""
    for found in itertools.islice(SAFE.finditer(text, start, stop), 100):
        end = found.end()
        left, right = text[end - 64 : end], text[end : end + 64]
        context = "a\n" if left[-1] == "\n" else "a"
        parts = np.concatenate([tokenizer.encode(left), encode_behind(tokenizer, context, right)])
        if np.array_equal(parts, tokenizer.encode(left + right)):
            return end, context
    return stop, ""


def encode_behind(tokenizer, context, text):
    """The ids of `text` as a continuation of `context`."""
    return tokenizer.encode(context + text)[len(tokenizer.encode(context)) if context else 0 :]


def batches(train, val, cfg, tokenizer, counts, bar):
    """Yield lists of (split, Piece) of all documents, with PIECE characters together, or a little more.

    Without files for validation every VAL_EVERY-th document is for that.
    """
    batch, size = [], 0
    for paths, named in ((train, "train"), (val, "val")):
        for i, chunks in enumerate(files.documents(paths, cfg.text_key, bar), 1):
            split, n_pieces = "val" if not val and i % files.VAL_EVERY == 0 else named, 0
            for n_pieces, piece in enumerate(cut(chunks, tokenizer, counts), 1):  # noqa: B007
                batch.append((split, piece))
                size += len(piece.text)
                if size >= PIECE:
                    yield batch
                    batch, size = [], 0
            what = "documents" if split == "train" else "documents for validation"
            counts[what if n_pieces else "empty documents dropped"] += 1
    if batch:
        yield batch


def in_order(function, items, n_threads):
    """Yield function(item) in order, computed by threads: tokenizers release the GIL. Few items are held at a time."""
    running = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > 2 * n_threads:
                yield running.popleft().result()
        for future in running:
            yield future.result()


def build(folder, train, val, cfg, tokenizer):
    """Tokenize files into shards in `folder`; index.json lists those that are complete, from which this goes on."""
    if tokenizer.eos is None:
        raise UserError(f"tokenizer {tokenizer.name} has no end-of-text token to close documents with")
    dtype = np.uint16 if tokenizer.largest < 2**16 else np.uint32
    bos = np.array(tokenizer.bos, dtype)
    eos, nothing = np.array([tokenizer.eos], dtype), np.array([], dtype)

    def encode(batch):
        return [(split, np.concatenate([bos if piece.starts else nothing,
                                        encode_behind(tokenizer, piece.context, piece.text).astype(dtype),
                                        eos if piece.ends else nothing])) for split, piece in batch]

    folder.mkdir(exist_ok=True)
    index, counts, waiting, sizes = folder / "index.json", Counter(), {"train": [], "val": []}, Counter()
    earlier = json.loads(index.read_text()) if index.is_file() else {"batches": 0, "shards": {}}
    n_done, shards = earlier["batches"], earlier["shards"]  # {name: hash}

    def write_shards():
        for split, arrays in waiting.items():
            if arrays:
                name, ids = f"{split}_{len(shards):05d}.npy", np.concatenate(arrays)
                with open(folder / name, "wb") as file:  # not by np.save, whose error for a full disk has no errno
                    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(ids))
                    file.write(ids)
                shards[name] = hashlib.blake2b(ids, digest_size=16).hexdigest()
                arrays.clear()
        sizes.clear()
        replace_text(index, json.dumps({"batches": n_done, "shards": shards, "counts": counts}))

    total = sum(path.stat().st_size for path in (*train, *val))
    every = 0.1 if sys.stderr.isatty() else 60  # seconds: in a log file a line a minute
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", mininterval=every, delay=every) as bar:
        stream = batches(train, val, cfg, tokenizer, counts, bar)
        deque(itertools.islice(stream, n_done), maxlen=0)  # skip what an earlier run has done
        for batch in in_order(encode, stream, cfg.workers or os.cpu_count()):
            for split, ids in batch:
                waiting[split].append(ids)
                sizes[split] += len(ids)
            n_done += 1
            if max(sizes.values()) >= SHARD_TOKENS:
                write_shards()
    write_shards()
    for split, paths in (("train", train), ("val", val)):
        if paths and not any(name.startswith(split) for name in shards):
            raise UserError(f"data.{split}: no text in {', '.join(map(str, paths[:3]))}")


def make_once(folder, make):
    """Make `folder` by make(path) unless it is there, with what a killed run left at `path`. Processes take turns.

    After an error what was made is deleted, but not when the process is interrupted. On a file system without locks
    each process has a path of its own, and a killed run is not resumed.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f"{folder.name}.partial")
    with open(folder.parent / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that tokenizes into {folder.parent}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            work = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
        try:
            if not folder.is_dir():  # else another process has made it meanwhile
                make(work)
            if not folder.is_dir():  # the same, without locks
                work.rename(folder)
            shutil.rmtree(work, ignore_errors=True)  # what the other one has made stays
        except Exception:
            shutil.rmtree(work, ignore_errors=True)
            raise


def prepare(cfg, tokenizer, block_size, seed):
    """(training Tokens, validation Tokens), see data.prepare. Tokenizes what cfg.cache_dir does not hold."""
    found = files.resolve(cfg, files.TEXT)
    made_from = [[files.identity(path) for path in paths] for paths in (found.train, found.val)]
    made_by = cfg.text_key, tokenizer.fingerprint, tokenizer.bos, tokenizer.eos, VERSION
    key = hashlib.blake2b(repr((made_from, made_by)).encode(), digest_size=8).hexdigest()
    source = re.sub(r"[^\w.-]+", "_", Path(cfg.train[0]).stem if cfg.train else "python_stdlib")
    folder = Path(cfg.cache_dir, f"{source}-{tokenizer.name}-{key}")
    make_once(folder, lambda work: build(work, found.train, found.val, cfg, tokenizer))
    try:
        index = json.loads((folder / "index.json").read_text())
        for name, digest in index["shards"].items():
            if survey(folder / name, open_tokens(folder / name)[0], cfg.cache_dir)[-1] != digest:
                raise UserError(f"{folder / name} is corrupt: it does not hold the tokens that were written")
    except (FileNotFoundError, ValueError) as error:  # also: a UserError, no JSON
        raise UserError(f"{error}: delete {folder}, it is made again from the text") from error
    shards = [[folder / name for name in index["shards"] if name.startswith(split)] for split in ("train", "val")]
    train, val = open_splits(*shards, cfg, block_size, found)
    train.counts |= index["counts"]
    train.description += f" in {folder}, tokenizer {tokenizer.name}"
    for what in ("empty documents dropped", "forced cuts"):
        if train.counts.get(what):
            train.description += f", {train.counts[what]:,} {what}"
    return train, val
