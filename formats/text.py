"""Text as training rows: tokenized once into shards on disk, then read as one stream cut into windows of block_size.

    documents -> pieces -> tokenizer (threads) -> shards on disk -> one long stream of tokens -> windows of block_size

A document is BOS (where the tokenizer's configuration puts one), its text, EOS. Long documents are cut into pieces, at
places where the pieces' ids are those of the whole (SAFE). Memory does not grow with the text. A run that is killed
leaves its shards, and the next start goes on from them.
"""

import collections
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from formats import files
from formats.files import VAL_EVERY
from formats.tokenizer import get_tokenizer
from formats.tokens import Tokens, split_end
from plumbing.disk import replace_text
from plumbing.errors import UserError

MAGIC, HEADER_BYTES, SHARD_TOKENS = b"nanofp8\x02", 4096, 100_000_000
SAVE_SECONDS = 10  # between notes of how far tokenizing has come


# ----------------------------------------------------------------------------------------------------------------
# pieces of documents

# Where a document may be cut: before a single blank or newline between two letters, or between a newline behind
# anything but white space and a letter. All published ways to split text have a border there, and no token crosses it.
# `cut` tries every place with the tokenizer itself before it uses it.
LETTER = r"[^\W\d_]"
SAFE = re.compile(rf"(?<={LETTER})(?=[ \n]{LETTER})|(?<=\S\n)(?={LETTER})")
PIECE = 2**16  # characters; the next safe place behind as many is a cut


class Piece(NamedTuple):
    """A part of a document. context: stands for the text before it, which decides how its first word is encoded."""

    text: str
    context: str  # "" at the beginning of a document
    starts: bool
    ends: bool
    split: str  # "train" or "val"


def cut(chunks, tokenizer, counts):
    """Yield (text, context) of the pieces of a document, an iterable of str. Their ids are those of the whole text.

    Where PIECE characters hold no safe place (no words at all), they are cut anyway: counts["forced cuts"].
    """
    text, at, context = "", 0, ""
    for chunk in chunks:
        text, at = text[at:] + chunk, 0
        while len(text) - at > 2 * PIECE:
            end, after = safe_place(text, at + PIECE, at + 2 * PIECE, tokenizer)
            counts["forced cuts"] += after == ""
            yield text[at:end], context
            at, context = end, after
    if at < len(text):
        yield text[at:], context


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
    """The ids of `text` where it follows `context`."""
    return tokenizer.encode(context + text)[len(tokenizer.encode(context)) if context else 0 :]


def pieces(train, val, cfg, tokenizer, counts, bar):
    """Yield the Pieces of all documents; without files for validation every VAL_EVERY-th document is for that."""
    last = "train" if val else "val"
    for paths, splits in ((train, ["train"] * (VAL_EVERY - 1) + [last]), (val, ["val"])):
        for i, chunks in enumerate(files.documents(paths, cfg.text_key, bar)):
            split, held = splits[i % len(splits)], None  # held back, until it is known whether another one follows
            for text, context in cut(chunks, tokenizer, counts):
                if held:
                    yield Piece(*held, ends=False, split=split)
                held = text, context, held is None
            if held:
                yield Piece(*held, ends=True, split=split)
            counts[f"{split} documents" if held else "empty documents"] += 1


# ----------------------------------------------------------------------------------------------------------------
# shards


class ShardWriter:
    """Writes a stream of token arrays as `{split}_00000.bin`, ...: a header of 4096 bytes, then the tokens."""

    def __init__(self, folder, split, tokenizer, n_shards=0, tokens=0):
        """n_shards, tokens: `progress` of an earlier writer in this folder, where this one goes on."""
        self.folder, self.split, self.tokenizer, self.n_shards, self.file = folder, split, tokenizer, n_shards, None
        self.dtype = np.dtype("<u2" if tokenizer.largest < 2**16 else "<u4")
        if tokens:
            self.n_shards -= 1
            self.open("r+b")
            for start in range(0, tokens, 2**22):
                n_bytes = min(2**22, tokens - start) * self.dtype.itemsize
                self.add(np.frombuffer(self.file.read(n_bytes), self.dtype))
            assert self.tokens == tokens
            self.file.seek(HEADER_BYTES + tokens * self.dtype.itemsize)
            self.file.truncate()

    def open(self, mode):
        self.file = open(self.folder / f"{self.split}_{self.n_shards:05d}.bin", mode)
        self.file.write(bytes(HEADER_BYTES))
        self.tokens, self.largest, self.hash = 0, 0, hashlib.blake2b(digest_size=16)
        self.n_shards += 1

    def add(self, part):
        self.hash.update(part)
        self.tokens, self.largest = self.tokens + len(part), max(self.largest, int(part.max()))

    def write(self, tokens):
        while len(tokens):
            if self.file is None:
                self.open("wb")
            part, tokens = np.split(tokens, [SHARD_TOKENS - self.tokens])
            part = part.astype(self.dtype)
            self.file.write(part)
            self.add(part)
            if self.tokens == SHARD_TOKENS:
                self.close()

    def progress(self):
        """What another writer needs to go on from here; everything so far is on disk then."""
        if self.file is None:
            return {"n_shards": self.n_shards, "tokens": 0}
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"n_shards": self.n_shards, "tokens": self.tokens}

    def close(self):
        if self.file is None:
            return
        header = {"tokenizer": self.tokenizer.name, "fingerprint": self.tokenizer.fingerprint, "dtype": self.dtype.str,
                  "tokens": self.tokens, "largest": self.largest, "hash": self.hash.hexdigest()}
        self.file.seek(0)
        self.file.write(MAGIC + json.dumps(header).encode())
        path, self.file = self.file.name, self.file.close()
        stamp_shard(Path(path), header["hash"])


def stamp_shard(path, digest):
    """Note beside a shard that its tokens have the hash of its header, until its size or time of change is another."""
    with contextlib.suppress(OSError):  # a folder that only others may write to: hashed at every start
        path.with_suffix(".ok").write_text(stamp(path, digest))


def stamp(path, digest):
    found = path.stat()
    return f"{digest} {found.st_size} bytes, changed at {found.st_mtime_ns}\n"


def open_shard(path, tokenizer):
    """(memory map of the tokens, header) of a shard. UserError if it is foreign, truncated or corrupt.

    All of it is hashed, unless a stamp beside it (.ok) says that this was done: delete the stamp to repeat it.
    """
    fix = f": delete its folder {path.parent}, it is made again from the text"
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if not head.startswith(MAGIC) or len(head) < HEADER_BYTES:
        raise UserError(f"{path} is no token shard of this version of nanofp8{fix}")
    try:
        header = json.loads(head[len(MAGIC) :].rstrip(b"\0"))
        made_with, fingerprint, digest = (header[key] for key in ("tokenizer", "fingerprint", "hash"))
        dtype = np.dtype(header["dtype"])
        expected = HEADER_BYTES + header["tokens"] * dtype.itemsize
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is corrupt: its header cannot be read{fix}") from error
    if fingerprint != tokenizer.fingerprint:
        raise UserError(f"{path} was made with another tokenizer ({made_with}) than {tokenizer.name}{fix}")
    if (size := path.stat().st_size) != expected:
        raise UserError(f"{path} has {size} bytes, its header says {expected}{fix}")
    ok = path.with_suffix(".ok")
    if not ok.is_file() or ok.read_text() != stamp(path, digest):
        if hash_tokens(path) != digest:
            raise UserError(f"{path} is corrupt: its tokens do not have the hash that its header says{fix}")
        stamp_shard(path, digest)
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES), header


def hash_tokens(path):
    h = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        while piece := file.read(2**24):
            h.update(piece)
    return h.hexdigest()


# ----------------------------------------------------------------------------------------------------------------
# from files to rows


def prepare(cfg, block_size, seed):
    """(training Tokens, validation Tokens, Tokenizer) of a DataConfig; tokenizes what cfg.cache_dir does not hold yet.

    With several ranks call it on rank 0 first. Raises UserError for text that cannot be found, read or used.
    """
    tokenizer = get_tokenizer(cfg.tokenizer)
    found = files.resolve(cfg, files.TEXT)
    identity = [[(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths] for paths in found[:2]]
    made_by = tokenizer.fingerprint, tokenizer.bos, tokenizer.eos, MAGIC
    key = hashlib.blake2b(repr((identity, cfg.text_key, made_by)).encode(), digest_size=8).hexdigest()
    name = re.sub(r"[^\w.-]+", "_", Path(cfg.train[0]).stem if cfg.train else "python_stdlib")
    folder = Path(cfg.cache_dir, f"{name}-{tokenizer.name}-{key}")
    if not folder.is_dir():
        build(folder, found.train, found.val, cfg, tokenizer)
    index = folder / "index.json"
    listed = json.loads(index.read_text()) if index.is_file() else {"shards": [index.name]}
    if missing := [name for name in listed["shards"] if not (folder / name).is_file()]:
        raise UserError(f"{folder} lacks {', '.join(missing[:3])}: delete it, it is made again from the text")

    def stream(shards, **part):
        arrays, headers = zip(*shards, strict=True)
        return Tokens(arrays, [(h["hash"], h["fingerprint"]) for h in headers], block_size,
                      largest=max(h["largest"] for h in headers), **part)

    opened = {split: [open_shard(folder / name, tokenizer) for name in listed["shards"] if name.startswith(split)]
              for split in ("train", "val")}
    train, counts = stream(opened["train"]), listed["counts"]
    tokenizer.blank_cuts = counts["blank cuts"]  # for the screen
    if opened["val"]:
        val = stream(opened["val"])
    else:  # too few documents to set some aside
        parts = split_end(train)
        train, val = (stream(opened["train"], start=start, stop=stop) for start, stop in parts)
    if len(val) < 2:
        raise UserError(f"data: {len(train)} tokens for training leave {len(val)} for validation, which takes 2: give "
                        "more text, or data.val")
    source = files.number_of(found.train) + (f" of {', '.join(cfg.train)}" if cfg.train else
                                            " of Python's standard library")
    train.counts = {"documents": counts["train documents"], "tokens": len(train), "targets": len(train) - 1,
                    "empty documents dropped": counts["empty documents"],
                    "forced cuts": counts["forced cuts"], "cuts inside of blanks": counts["blank cuts"],
                    "files not used": len(found.unused)}
    train.description = (f"{source}{found.note}, {len(train):,} training and {len(val):,} validation tokens in "
                         f"{folder}, tokenizer {tokenizer.described}")
    if n := counts["empty documents"]:
        train.description += f", {n:,} empty documents dropped"
    if n := counts["forced cuts"]:
        train.description += f", {n:,} forced cuts (no border of words in {PIECE:,} characters)"
    return train, val, tokenizer


def build(folder, train, val, cfg, tokenizer):
    """Tokenize files into shards in `folder`, which appears when it is complete and not before."""
    if tokenizer.eos is None:
        raise UserError(f"tokenizer {tokenizer.name} has no end-of-text token to close documents with")
    bos = np.array([] if tokenizer.bos is None else [tokenizer.bos], np.uint32)
    eos, nothing = np.array([tokenizer.eos], np.uint32), np.array([], np.uint32)

    def encode(batch):  # threads are enough: tokenizers let go of the interpreter lock
        return [np.concatenate([bos if piece.starts else nothing,
                                encode_behind(tokenizer, piece.context, piece.text),
                                eos if piece.ends else nothing]) for piece in batch]

    workers = cfg.workers or os.cpu_count()
    counts = dict.fromkeys(("train documents", "val documents", "empty documents", "forced cuts"), 0)
    tokenizer.blank_cuts = 0
    total = sum(path.stat().st_size for path in (*train, *val))
    every = 0.1 if sys.stderr.isatty() else 60  # seconds: in a log file a line a minute
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", mininterval=every, delay=every)
    with work_folder(folder) as aside, ThreadPoolExecutor(workers) as pool, bar:
        done, saved = 0, time.monotonic()  # pieces
        writers = {split: ShardWriter(aside, split, tokenizer) for split in ("train", "val")}
        if (progress := aside / "progress.json").is_file():
            state = json.loads(progress.read_text())
            done, tokenizer.blank_cuts = state["pieces"], state["blank cuts"]
            writers = {split: ShardWriter(aside, split, tokenizer, **state[split]) for split in writers}
        stream = pieces(train, val, cfg, tokenizer, counts, bar)
        for _ in zip(range(done), stream, strict=False):  # what an earlier run has done
            pass
        for batch, arrays in in_order(pool, encode, batches(stream), 2 * workers):
            for piece, tokens in zip(batch, arrays, strict=True):
                writers[piece.split].write(tokens)
            done += len(batch)
            if time.monotonic() - saved > SAVE_SECONDS:
                state = {split: writer.progress() for split, writer in writers.items()}
                replace_text(progress, json.dumps({"pieces": done, "blank cuts": tokenizer.blank_cuts, **state}))
                saved = time.monotonic()
        for writer in writers.values():
            writer.close()
        names = [f"{split}_{i:05d}.bin" for split, writer in writers.items() for i in range(writer.n_shards)]
        for split, paths in (("train", train), ("val", val)):
            if paths and not writers[split].n_shards:
                raise UserError(f"data.{split}: no text in {', '.join(map(str, paths[:3]))}")
        counts["blank cuts"] = tokenizer.blank_cuts
        replace_text(aside / "index.json", json.dumps({"shards": names, "counts": counts}))
        progress.unlink(missing_ok=True)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker, with the same result
                raise


@contextlib.contextmanager
def work_folder(folder):
    """A folder to build `folder` in, held by a lock: the one that a killed run left, or a new one.

    What killed runs left of other text under this name is deleted. So is this one after an error, but not when the
    process is interrupted.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    name = folder.name.rpartition("-")[0]
    found, lock = None, None
    for left in sorted(p for p in folder.parent.glob("*.tmp") if p.is_dir() and p.name.startswith(f"{name}-")):
        held = try_lock(left)
        if held and found is None and left.name.startswith(f"{folder.name}."):
            found, lock = left, held
        elif held:
            shutil.rmtree(left, ignore_errors=True)
            os.close(held)
    if found is None:
        found = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
        found.mkdir()
        lock = try_lock(found)
    try:
        yield found
    except Exception:
        shutil.rmtree(found, ignore_errors=True)
        raise
    else:
        shutil.rmtree(found, ignore_errors=True)  # where another process was quicker
    finally:
        if lock:
            os.close(lock)


def try_lock(folder):
    """A file descriptor that holds the lock of a folder; None if a process holds it, or if locks do not work here.

    Where they do not work, a folder that a run left is never taken up, and deleted when it is a day old.
    """
    try:
        held = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # completed meanwhile
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return held
    except BlockingIOError:
        pass
    except OSError:  # this file system has no locks
        if time.time() - os.stat(folder).st_mtime > 24 * 3600:
            shutil.rmtree(folder, ignore_errors=True)
    os.close(held)
    return None


def in_order(pool, function, items, n_ahead):
    """Yield (item, function(item)) in order, computed by a pool, n_ahead at once."""
    running = collections.deque()
    for item in items:
        running.append((item, pool.submit(function, item)))
        if len(running) > n_ahead:
            item, future = running.popleft()
            yield item, future.result()
    for item, future in running:
        yield item, future.result()


def batches(stream):
    """Lists of Pieces of PIECE characters together, or a little more."""
    batch, size = [], 0
    for piece in stream:
        batch.append(piece)
        size += len(piece.text)
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
