"""Tokens: where text comes from, how it becomes rows of one length, and which rows a step sees.

    documents -> tokenizer -> shards on disk -> one long stream of tokens -> windows of block_size, shuffled by epoch

Text is tokenized once. The loader is a function of the step number: nothing to save, nothing to fast-forward, and the
same global batches on any number of ranks. It takes rows from `Tokens` here, or from `Samples` in hellaswag.py.
"""

import contextlib
import glob
import hashlib
import json
import os
import secrets
import shutil
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from model import IGNORE
from tokenizer import fingerprint, get_tokenizer

SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".cpp", ".h", ".js", ".ts", ".java", ".rs", ".go", ".html", ".jsonl"}
VAL_EVERY = 20  # every 20th document is for validation, where data.val names none
MAGIC, HEADER_BYTES, SHARD_TOKENS = b"nanofp8\x01", 4096, 100_000_000


@dataclass(kw_only=True)
class DataConfig:
    """Where tokens come from."""

    format: Literal["text", "hellaswag"] = "text"  # hellaswag: JSONL as published, loss on the right ending only
    train: list[str] = field(default_factory=list)  # files, folders, globs, each file once; []: built in
    val: list[str] = field(default_factory=list)  # the same for validation; []: every 20th document of train
    packed_sequence_size: int = 0  # hellaswag: tokens of a row that samples are packed into; 0: one sample a row
    tokenizer: str = "auto"  # "bytes", a tiktoken name, a tokenizer file or folder; auto: init_from's, else bytes
    text_key: str = "text"  # the field of a JSONL line that holds the text
    cache_dir: str = "data_cache"  # tokenized shards are kept here
    workers: int = 0  # threads that tokenize; 0: one per core

    def problems(self):
        """What is wrong with these values taken together, one sentence each."""
        for name in ("packed_sequence_size", "workers"):
            if getattr(self, name) < 0:
                yield f"data.{name}={getattr(self, name)} must not be negative"
        if self.packed_sequence_size and self.format == "text":
            yield ("data.packed_sequence_size packs HellaSwag samples, text has no padding to save: set "
                   "data.format=hellaswag, or model.block_size for the length of text")


# ----------------------------------------------------------------------------------------------------------------
# documents


def embedded_files():
    """The embedded corpus: the standard library's own .py files, without tests and installed packages, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return [p for p in sorted(root.rglob("*.py")) if not skip.intersection(p.relative_to(root).parts)]


def find_files(patterns):
    """The files that paths, folders (recursive, but for hidden ones) and globs name, sorted within each, each once.

    ValueError if one names none.
    """
    files = {}  # by where they really are: what two patterns name counts once
    for pattern in patterns:
        path, found = Path(pattern).expanduser(), []
        for match in [path] if path.exists() else map(Path, sorted(glob.glob(str(path), recursive=True))):
            inside = [p for p in sorted(match.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()
                      and not any(part.startswith(".") for part in p.relative_to(match).parts)]
            found += inside or [match] * match.is_file()
        if not found:
            raise ValueError(f"data: {pattern!r} matches no file (in a folder, files ending in "
                             + ", ".join(sorted(SUFFIXES)) + " count)")
        for p in found:
            files.setdefault(p.resolve(), p)
    return list(files.values())


def keep_apart(train, val):
    """(files of `train` that are not among those of `val`, a remark); all of them where `val` has every one.

    data.val may be a file in data.train's folder: what is for validation is not trained on.
    """
    held = {p.resolve() for p in val}
    kept = [p for p in train if p.resolve() not in held] if held else train
    if not kept:
        return train, ", all of them validation text too"
    return kept, f", {len(train) - len(kept)} more for validation alone" if len(kept) < len(train) else ""


def documents(files, text_key):
    """Yield the text of each document: a file, or a line of a .jsonl file. ValueError names what cannot be read."""
    for path in files:
        try:
            if path.suffix.lower() != ".jsonl":
                yield path.read_text(encoding="utf-8-sig")  # -sig: some editors put a mark before the text
                continue
            with path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{path}, line {number} is no JSON: {error.msg}") from error
                    if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
                        has = f"it has {', '.join(row) or 'none'}" if isinstance(row, dict) else "it is no object"
                        raise ValueError(f"{path}, line {number} has no text under data.text_key={text_key!r}: {has}")
                    yield row[text_key]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it, or leave it out") from error


# ----------------------------------------------------------------------------------------------------------------
# shards: tokens on disk


class ShardWriter:
    """Writes a stream of token arrays as `{split}_00000.bin`, ...: a header of 4096 bytes, then the tokens."""

    def __init__(self, folder, split, encoding):
        self.folder, self.split, self.encoding, self.count, self.file = folder, split, encoding, 0, None
        self.dtype = np.dtype("<u2" if encoding.max_token_value < 2**16 else "<u4")

    def write(self, tokens):
        while len(tokens):
            if self.file is None:
                self.file = open(self.folder / f"{self.split}_{self.count:05d}.bin", "wb")
                self.file.write(bytes(HEADER_BYTES))
                self.tokens, self.largest, self.hash = 0, 0, hashlib.blake2b(digest_size=16)
                self.count += 1
            part, tokens = np.split(tokens, [SHARD_TOKENS - self.tokens])
            payload = part.astype(self.dtype).tobytes()
            self.file.write(payload)
            self.hash.update(payload)
            self.tokens, self.largest = self.tokens + len(part), max(self.largest, int(part.max()))
            if self.tokens == SHARD_TOKENS:
                self.close()

    def close(self):
        if self.file is None:
            return
        header = {"tokenizer": self.encoding.name, "fingerprint": fingerprint(self.encoding), "dtype": self.dtype.str,
                  "tokens": self.tokens, "largest": self.largest, "hash": self.hash.hexdigest()}
        self.file.seek(0)
        self.file.write(MAGIC + json.dumps(header).encode())
        self.file.close()
        self.file = None


def open_shard(path, encoding):
    """(memory map of the tokens, header) of a shard. ValueError if it is foreign, truncated or corrupt.

    All of it is read once to be hashed. A stamp beside it (.ok) then spares that, to the other ranks too, until the
    shard's size or time of change is another: delete the stamp to have a shard hashed again.
    """
    fix = f": delete its folder {path.parent}, it is made again from the text"
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if not head.startswith(MAGIC) or len(head) < HEADER_BYTES:
        raise ValueError(f"{path} is no token shard of this version of nanofp8{fix}")
    try:
        header = json.loads(head[len(MAGIC) :].rstrip(b"\0"))
        made_with, made_with_print, digest = (header[key] for key in ("tokenizer", "fingerprint", "hash"))
        dtype = np.dtype(header["dtype"])
        expected = HEADER_BYTES + header["tokens"] * dtype.itemsize
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is corrupt: its header cannot be read{fix}") from error
    if made_with_print != fingerprint(encoding):
        raise ValueError(f"{path} was made with another tokenizer ({made_with}) than {encoding.name}{fix}")
    found = path.stat()
    if found.st_size != expected:
        raise ValueError(f"{path} has {found.st_size} bytes, its header says {expected}{fix}")
    tokens = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES)
    stamp, hashed = path.with_suffix(".ok"), f"{digest} {found.st_size} bytes, changed at {found.st_mtime_ns}\n"
    if not stamp.is_file() or stamp.read_text() != hashed:
        if hashlib.blake2b(tokens, digest_size=16).hexdigest() != digest:
            raise ValueError(f"{path} is corrupt: its tokens do not have the hash that its header says{fix}")
        with contextlib.suppress(OSError):  # a folder that only others may write to: hashed at every start
            stamp.write_text(hashed)
    return tokens, header


class Tokens:
    """A stream of tokens over several shards, or a part of one, as rows: windows of block_size, in order.

    len(); slice(start, stop) gives int64 numpy. Every token but the first is a target in exactly one row.
    """

    padding, document = 0.0, None  # share of a row that is no text; the length that attention sees: the whole row

    def __init__(self, shards, headers, block_size, start=0, stop=None):
        self.shards, self.block_size, self.start = shards, block_size, start
        self.ends = np.cumsum([len(s) for s in shards])
        self.stop = int(self.ends[-1]) if stop is None else stop
        self.largest = max(h["largest"] for h in headers)
        whole = repr([(h["hash"], h["fingerprint"]) for h in headers] + [self.start, self.stop])
        self.digest = hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()  # of the content
        self.n_rows = -(-(len(self) - 1) // block_size)

    def __len__(self):
        return self.stop - self.start

    def slice(self, start, stop):
        start, stop = self.start + start, min(self.start + stop, self.stop)
        pieces = []
        i = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            begin = int(self.ends[i]) - len(self.shards[i])
            pieces.append(self.shards[i][start - begin : stop - begin].astype(np.int64))
            start, i = int(self.ends[i]), i + 1
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def row(self, i):
        """(x, y, None) of window i, int64 (block_size,): y is the next token of each; a short end is masked."""
        part = self.slice(i * self.block_size, (i + 1) * self.block_size + 1)
        x, y = np.zeros(self.block_size, np.int64), np.full(self.block_size, IGNORE, np.int64)
        x[: len(part) - 1], y[: len(part) - 1] = part[:-1], part[1:]
        return x, y, None


def prepare(cfg, block_size):
    """(training rows, validation rows, encoding) of a DataConfig; tokenizes what cfg.cache_dir does not hold yet.

    With several ranks call it on rank 0 first. Raises ValueError for text that cannot be found, read or used.
    """
    encoding = get_tokenizer(cfg.tokenizer)
    train, val = find_files(cfg.train) if cfg.train else embedded_files(), find_files(cfg.val)
    train, remark = keep_apart(train, val)
    identity = [[(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files] for files in (train, val)]
    key = hashlib.blake2b(repr((identity, cfg.text_key, fingerprint(encoding))).encode(), digest_size=8).hexdigest()
    name = Path(cfg.train[0]).stem if cfg.train else "python_stdlib"
    folder = Path(cfg.cache_dir, f"{name}-{encoding.name}-{key}")
    if not folder.is_dir():
        build(folder, train, val, cfg, encoding)
    listed = folder / "shards.txt"
    names = listed.read_text().split() if listed.is_file() else [listed.name]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing[:3])}: delete it, it is made again from the text")
    streams = []
    for split in ("train", "val"):
        opened = [open_shard(folder / name, encoding) for name in names if name.startswith(split)]
        if opened:
            shards, headers = zip(*opened, strict=True)
            streams.append(Tokens(shards, headers, block_size))
    if len(streams) == 1:  # too few documents to set some aside: the end of the text is for validation
        whole, cut = streams[0], len(streams[0]) - len(streams[0]) // VAL_EVERY
        streams = [Tokens(whole.shards, headers, block_size, *part) for part in ((0, cut), (cut, len(whole)))]
    if len(streams[1]) < 2:
        raise ValueError(f"data: {len(streams[0])} tokens for training leave {len(streams[1])} for validation, which "
                         "takes 2: give more text, or data.val")
    source = f"{len(train)} files" + (f" of {', '.join(cfg.train)}" if cfg.train else " of Python's standard library")
    source += remark
    for stream in streams:
        stream.description = (f"{source}, {len(streams[0]):,} training and {len(streams[1]):,} validation tokens in "
                              f"{folder}, tokenizer {encoding.name}")
    return *streams, encoding


def build(folder, train, val, cfg, encoding):
    """Tokenize files into shards in `folder`, which appears when it is complete and not before."""
    if encoding.eos is None:
        raise ValueError(f"tokenizer {encoding.name} has no end-of-text token to close documents with")
    aside = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
    for left in folder.parent.glob(f"{folder.name}.*.tmp"):  # by runs that were killed
        if time.time() - left.stat().st_mtime > 24 * 3600:
            shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    workers, end = cfg.workers or os.cpu_count(), np.array([encoding.eos])
    try:
        bar = tqdm(unit="B", unit_scale=True, desc="tokenizing", disable=None)  # None: only on a terminal
        with ThreadPoolExecutor(workers) as pool, bar:

            def encode(text):  # threads are enough: tiktoken lets go of the interpreter lock
                try:
                    return np.append(encoding.encode_to_numpy(text, disallowed_special=()), end)
                except UnicodeEncodeError:  # JSON can hold half of a character (a lone surrogate): U+FFFD instead
                    return encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

            last = "train" if val else "val"  # of every VAL_EVERY documents
            for files, splits in ((train, ["train"] * (VAL_EVERY - 1) + [last]), (val, ["val"])):
                writers = {split: ShardWriter(aside, split, encoding) for split in set(splits)}
                batches = batched(documents(files, cfg.text_key), 2**24)  # 16 MB of text in memory at a time
                for i, (text, tokens) in enumerate(pair for batch in batches
                                                   for pair in zip(batch, pool.map(encode, batch), strict=True)):
                    writers[splits[i % len(splits)]].write(tokens if text else tokens[:0])
                    bar.update(len(text))
                for writer in writers.values():
                    writer.close()
        names = sorted(path.name for path in aside.glob("*.bin"))
        for split, files in (("train", train), ("val", val)):
            if files and not any(name.startswith(split) for name in names):
                raise ValueError(f"data.{split}: no text in {', '.join(map(str, files[:3]))}")
        (aside / "shards.txt").write_text("\n".join(names))
        if not folder.is_dir():  # else another process was quicker, with the same result
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def batched(texts, size):
    """Lists of texts of about `size` characters together."""
    batch, total = [], 0
    for text in texts:
        batch.append(text)
        total += len(text)
        if total >= size:
            yield batch
            batch, total = [], 0
    yield batch


# ----------------------------------------------------------------------------------------------------------------
# batches


def stack(rows, *shape):
    """(x, y, positions) of rows as tensors of shape (*shape, block_size); positions None where the rows have none."""
    return tuple(None if column[0] is None else torch.from_numpy(np.stack(column)).view(*shape, len(column[0]))
                 for column in zip(*rows, strict=True))


class Loader:
    """Training batches as a function of the step: the same global batch for any number of ranks.

    rows: Tokens or Samples. An epoch is all of them in an order shuffled by (seed, epoch); batches run over epoch
    borders. Raises ValueError if there is less than one global batch.
    """

    def __init__(self, rows, *, global_batch_size, micro_batch_size, seed, rank=0, world_size=1):
        self.rows, self.global_batch_size, self.micro_batch_size = rows, global_batch_size, micro_batch_size
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, (None, None)
        if rows.n_rows < global_batch_size:
            raise ValueError(f"the training data fills {rows.n_rows} rows of {rows.block_size} tokens, one step needs "
                             f"global_batch_size={global_batch_size}: give more text, or lower global_batch_size or "
                             "model.block_size")

    def sample(self, k):
        """Row k, counted from the start of training."""
        epoch, i = divmod(k, self.rows.n_rows)
        if epoch != self.epoch[0]:
            self.epoch = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.rows.n_rows)
        return self.rows.row(int(self.epoch[1][i]))

    def batch(self, step):
        """This rank's part of a step's global batch: (x, y, positions), (accumulation, micro_batch_size, block_size).

        positions: int64, 0 at the first token of each document; None where attention is to run over whole rows.
        """
        first, per_pass = step * self.global_batch_size, self.micro_batch_size * self.world_size
        rows = [self.sample(first + a * per_pass + self.rank * self.micro_batch_size + i)
                for a in range(self.global_batch_size // per_pass) for i in range(self.micro_batch_size)]
        return stack(rows, -1, self.micro_batch_size)


def eval_batches(rows, *, n, micro_batch_size, rank=0, world_size=1):
    """Yield (x, y, positions) of shape (micro_batch_size, block_size): n rows spread over all (0: all) over all ranks.

    Every rank gets equally many batches, since each is a collective under FSDP; rows past the end are masked.
    """
    n = min(n or rows.n_rows, rows.n_rows)
    x, y, positions = rows.row(0)
    empty = np.zeros_like(x), np.full_like(y, IGNORE), positions
    for first in range(0, n, micro_batch_size * world_size):
        part = range(first + rank * micro_batch_size, first + (rank + 1) * micro_batch_size)
        yield stack([rows.row(i * rows.n_rows // n) if i < n else empty for i in part], micro_batch_size)
