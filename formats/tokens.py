"""Tokens as training rows: a stream of token ids, memory-mapped, cut into windows of block_size.

data.format="tokens" reads the files of nanoGPT, llm.c, modded-nanogpt and numpy (docs/data.md has their layouts).
Sources: nanoGPT, data/openwebtext/prepare.py; llm.c, dev/data/data_common.py; modded-nanogpt, train_gpt.py.
"""

import contextlib
import hashlib
import json
import tokenize
from pathlib import Path

import numpy as np

from formats import files
from model import IGNORE
from plumbing.disk import replace_text
from plumbing.errors import UserError

HEADER_BYTES = 1024
LLM_C = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}  # magic number: type of an id
PIECE = 2**22  # ids looked at together


class Tokens:
    """The token ids of files, or a part of them, as one stream, and as rows: windows of block_size, in order.

    len(); slice(start, stop) gives int64 numpy. Every id but the first is a target in one row. With eos_id in the
    DataConfig attention does not cross from one document to the next, else it sees the whole row. name: of the split,
    for messages. Raises UserError for files that hold no token ids, or not eos_id.
    """

    padding = 0.0

    def __init__(self, paths, cfg, block_size, name, *, start=0, stop=None):
        self.arrays, firsts = zip(*map(open_tokens, paths), strict=True)
        surveys = [survey(path, ids, cfg.cache_dir) for path, ids in zip(paths, self.arrays, strict=True)]
        largest, hashes = zip(*surveys, strict=True)
        self.largest, self.block_size = max(largest), block_size
        self.ends = np.cumsum([len(array) for array in self.arrays])
        self.start, self.stop = start, int(self.ends[-1]) if stop is None else stop
        self.digest = hashlib.blake2b(repr([*hashes, self.start, self.stop]).encode(), digest_size=16).hexdigest()
        self.n_rows = self.n_samples = -(-(len(self) - 1) // block_size)
        self.counts = {"tokens": len(self), "targets": len(self) - 1}
        self.document, self.longest, self.most_documents = None, block_size, 1
        self.eos, self.eos_first = cfg.eos_id, firsts[0]  # eos_first: EOS begins a document (else it ends one)
        if self.eos is None or len(self) < 2:
            return
        if len(set(firsts)) > 1:
            raise UserError(f"data.{name} mixes files of llm.c, where EOS begins a document, with others, where it "
                            "ends one: train on one kind, or set data.eos_id=None")
        found, self.document, self.longest, self.most_documents = remembered(
            cfg.cache_dir, (self.digest, block_size, self.eos, self.eos_first), self.measure_documents)
        if not found and not start:  # the end of a stream may be within a document
            raise UserError(f"data.eos_id={self.eos} is nowhere in data.{name}: name the id between its documents")

    def __len__(self):
        return self.stop - self.start

    def slice(self, start, stop):
        start, stop = self.start + start, min(self.start + stop, self.stop)
        pieces = []
        i = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            begin = int(self.ends[i]) - len(self.arrays[i])
            pieces.append(self.arrays[i][start - begin : stop - begin].astype(np.int64))
            start, i = int(self.ends[i]), i + 1
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def row(self, i):
        """(x, y, positions) of window i, see data.Rows: y is the next id of each; a short end is masked."""
        part = self.slice(i * self.block_size, (i + 1) * self.block_size + 1)
        x, y = np.zeros(self.block_size, np.int64), np.full(self.block_size, IGNORE, np.int64)
        x[: len(part) - 1], y[: len(part) - 1] = part[:-1], part[1:]
        if self.eos is None:
            return x, y, None
        index = np.arange(self.block_size)
        begins = self.begins(np.where(index < len(part) - 1, x, self.eos + 1)[None])[0]
        return x, y, index - np.maximum.accumulate(np.where(begins, index, 0))

    def begins(self, ids):
        """Where documents begin in rows of ids (R, T), bool. The first id of a row begins one."""
        begins = ids == self.eos
        if not self.eos_first:
            begins = np.roll(begins, 1, axis=1)
        begins[:, 0] = True
        return begins

    def measure_documents(self):
        """(whether EOS is among the ids; mean length over ids, longest, most in a row of the documents that attention
        sees). Reads all ids."""
        found, squares, longest, most, step = False, 0, 0, 0, max(1, PIECE // self.block_size)
        for first in range(0, self.n_rows, step):
            ids = self.slice(first * self.block_size, (first + step) * self.block_size + 1)
            found |= bool((ids == self.eos).any())
            ids = np.append(ids[:-1], np.full(-(len(ids) - 1) % self.block_size, self.eos + 1))  # inputs, padding
            begins = self.begins(ids.reshape(-1, self.block_size))
            lengths = np.diff(np.append(np.flatnonzero(begins), begins.size))
            squares += int((lengths**2).sum())
            longest, most = max(longest, int(lengths.max())), max(most, int(begins.sum(1).max()))
        return found, squares / (self.n_rows * self.block_size), longest, most

    def sample(self, i):
        """(ids, loss) of window i: its first id is no target here, but in the window before."""
        ids = self.slice(i * self.block_size, (i + 1) * self.block_size + 1)
        return ids, np.arange(len(ids)) > 0


def open_tokens(path):
    """(memory map of the ids, whether EOS begins a document) of a .bin or .npy file."""
    if path.suffix.lower() == ".npy":
        try:
            ids = np.lib.format.open_memmap(path, mode="r")
        except (ValueError, TypeError, OverflowError, tokenize.TokenError) as error:
            raise UserError(f"{path} is not a .npy file that can be memory-mapped: {error}") from error
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise UserError(f"{path} holds {ids.dtype} of shape {ids.shape}, expected integers in one dimension")
        return ids, False
    size = path.stat().st_size
    with files.open_binary(path) as file:
        head = file.read(HEADER_BYTES)
    if head.startswith(b"PK\x03\x04"):
        raise UserError(f"{path} does not hold token ids: it is an archive (weights of PyTorch?)")
    magic, _, n = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
    if magic in LLM_C:
        dtype = LLM_C[magic]
        if size != HEADER_BYTES + n * dtype.itemsize:
            raise UserError(f"{path} has {size} bytes, its header says {n} ids of {dtype.itemsize} bytes: incomplete?")
        return np.memmap(path, dtype, "r", offset=HEADER_BYTES, shape=(n,)) if n else np.empty(0, dtype), True
    if size % 2:
        raise UserError(f"{path} has {size} bytes: not uint16 ids as nanoGPT writes them, nor the header of llm.c")
    return np.memmap(path, "<u2", "r") if size else np.empty(0, "<u2"), False


def remembered(cache_dir, identity, compute):
    """compute(), a value for JSON, which cache_dir remembers under `identity`."""
    note = Path(cache_dir, "notes", f"{hashlib.blake2b(repr(identity).encode(), digest_size=8).hexdigest()}.json")
    with contextlib.suppress(OSError, ValueError):  # not there, or what a machine left that lost its power
        return json.loads(note.read_text())
    value = compute()
    with contextlib.suppress(OSError):  # a folder that only others may write to: computed at every start
        note.parent.mkdir(parents=True, exist_ok=True)
        replace_text(note, json.dumps(value))
    return value


def survey(path, ids, cache_dir):
    """(largest id, hash) of the ids of a file, read once for each version of the file."""
    def read_all():
        h, largest = hashlib.blake2b(digest_size=16), 0
        for start in range(0, len(ids), PIECE):
            part = np.ascontiguousarray(ids[start : start + PIECE])
            h.update(part)
            largest = max(largest, int(part.max()))
            if part.min() < 0:
                raise UserError(f"{path} holds negative numbers, which are no token ids")
        return largest, h.hexdigest()

    return remembered(cache_dir, ("largest id, hash", files.identity(path)), read_all)


def open_splits(train, val, cfg, block_size, found):
    """(training Tokens, validation Tokens) of files, which were made from the files.Files `found`, or are these.

    Without files for validation the end of the others is for that.
    """
    cut = None
    if not val:
        n = sum(len(open_tokens(path)[0]) for path in train)
        val, cut = train, n - n // files.VAL_EVERY
    splits = Tokens(train, cfg, block_size, "train", stop=cut), Tokens(val, cfg, block_size, "val", start=cut or 0)
    if min(map(len, splits)) < 2:
        raise UserError(f"data: {len(splits[0])} tokens for training and {len(splits[1])} for validation are too few: "
                        "give more, or name data.val")
    splits[0].description = f"{found.source}, {len(splits[0]):,} training and {len(splits[1]):,} validation tokens"
    splits[0].counts["files not used"] = len(found.unused)
    return splits


def prepare(cfg, tokenizer, block_size, seed):
    """(training Tokens, validation Tokens) of a DataConfig, see data.prepare."""
    found = files.resolve(cfg, {"tokens"})
    train, val = open_splits(found.train, found.val, cfg, block_size, found)
    documents = "attention sees whole rows (data.eos_id is not set)"
    if cfg.eos_id is not None:
        documents = (f"documents of {train.document:,.0f} tokens (mean over tokens, within rows), borders at id "
                     f"{cfg.eos_id}")
    train.description += f", ids up to {train.largest}, {documents}"
    if train.largest > tokenizer.largest:
        train.description += (f"; tokenizer {tokenizer.name} has no ids above {tokenizer.largest}: name the one that "
                              "made them (data.tokenizer) for sample.py and data.py")
    return train, val
