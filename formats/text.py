"""Text as training rows: tokenized once into shards on disk, then one long stream cut into windows of block_size.

    documents -> tokenizer -> shards on disk -> one long stream of tokens -> windows of block_size
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from formats import files
from formats.files import VAL_EVERY, documents
from formats.tokenizer import get_tokenizer
from model import IGNORE
from plumbing.errors import UserError

MAGIC, HEADER_BYTES, SHARD_TOKENS = b"nanofp8\x01", 4096, 100_000_000


class ShardWriter:
    """Writes a stream of token arrays as `{split}_00000.bin`, ...: a header of 4096 bytes, then the tokens."""

    def __init__(self, folder, split, encoding):
        self.folder, self.split, self.encoding, self.count, self.file = folder, split, encoding, 0, None
        self.dtype = np.dtype("<u2" if encoding.largest < 2**16 else "<u4")

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
        header = {"tokenizer": self.encoding.name, "fingerprint": self.encoding.fingerprint, "dtype": self.dtype.str,
                  "tokens": self.tokens, "largest": self.largest, "hash": self.hash.hexdigest()}
        self.file.seek(0)
        self.file.write(MAGIC + json.dumps(header).encode())
        self.file.close()
        self.file = None


def open_shard(path, encoding):
    """(memory map of the tokens, header) of a shard. UserError if it is foreign, truncated or corrupt.

    All of it is read once to be hashed. A stamp beside it (.ok) then spares that, to the other ranks too, until the
    shard's size or time of change is another: delete the stamp to have a shard hashed again.
    """
    fix = f": delete its folder {path.parent}, it is made again from the text"
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if not head.startswith(MAGIC) or len(head) < HEADER_BYTES:
        raise UserError(f"{path} is no token shard of this version of nanofp8{fix}")
    try:
        header = json.loads(head[len(MAGIC) :].rstrip(b"\0"))
        made_with, made_with_print, digest = (header[key] for key in ("tokenizer", "fingerprint", "hash"))
        dtype = np.dtype(header["dtype"])
        expected = HEADER_BYTES + header["tokens"] * dtype.itemsize
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is corrupt: its header cannot be read{fix}") from error
    if made_with_print != encoding.fingerprint:
        raise UserError(f"{path} was made with another tokenizer ({made_with}) than {encoding.name}{fix}")
    found = path.stat()
    if found.st_size != expected:
        raise UserError(f"{path} has {found.st_size} bytes, its header says {expected}{fix}")
    tokens = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES)
    stamp, hashed = path.with_suffix(".ok"), f"{digest} {found.st_size} bytes, changed at {found.st_mtime_ns}\n"
    if not stamp.is_file() or stamp.read_text() != hashed:
        if hashlib.blake2b(tokens, digest_size=16).hexdigest() != digest:
            raise UserError(f"{path} is corrupt: its tokens do not have the hash that its header says{fix}")
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


def prepare(cfg, block_size, seed):
    """(training rows, validation rows, encoding) of a DataConfig; tokenizes what cfg.cache_dir does not hold yet.

    With several ranks call it on rank 0 first. Raises UserError for text that cannot be found, read or used.
    """
    encoding = get_tokenizer(cfg.tokenizer)
    train, val, _, remark = files.resolve(cfg, files.TEXT)
    identity = [[(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in part] for part in (train, val)]
    key = hashlib.blake2b(repr((identity, cfg.text_key, encoding.fingerprint)).encode(), digest_size=8).hexdigest()
    name = Path(cfg.train[0]).stem if cfg.train else "python_stdlib"
    folder = Path(cfg.cache_dir, f"{name}-{encoding.name}-{key}")
    if not folder.is_dir():
        build(folder, train, val, cfg, encoding)
    listed = folder / "shards.txt"
    names = listed.read_text().split() if listed.is_file() else [listed.name]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder} lacks {', '.join(missing[:3])}: delete it, it is made again from the text")
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
        raise UserError(f"data: {len(streams[0])} tokens for training leave {len(streams[1])} for validation, which "
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
        raise UserError(f"tokenizer {encoding.name} has no end-of-text token to close documents with")
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
                return np.append(encoding.encode(text), end)

            last = "train" if val else "val"  # of every VAL_EVERY documents
            for part, splits in ((train, ["train"] * (VAL_EVERY - 1) + [last]), (val, ["val"])):
                writers = {split: ShardWriter(aside, split, encoding) for split in set(splits)}
                texts = map("".join, documents(part, cfg.text_key))
                batches = batched(texts, 2**24)  # 16 MB of text in memory at a time
                for i, (text, tokens) in enumerate(pair for batch in batches
                                                   for pair in zip(batch, pool.map(encode, batch), strict=True)):
                    writers[splits[i % len(splits)]].write(tokens if text else tokens[:0])
                    bar.update(len(text))
                for writer in writers.values():
                    writer.close()
        names = sorted(path.name for path in aside.glob("*.bin"))
        for split, part in (("train", train), ("val", val)):
            if part and not any(name.startswith(split) for name in names):
                raise UserError(f"data.{split}: no text in {', '.join(map(str, part[:3]))}")
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
