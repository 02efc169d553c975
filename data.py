"""Tokens: where text comes from, how it becomes rows of one length, and which rows a step sees.

    documents -> tokenizer -> shards on disk -> one long stream of tokens -> windows of block_size, shuffled by epoch

Text is tokenized once. The loader is a function of the step number: nothing to save, nothing to fast-forward, and the
same global batches on any number of ranks.
It takes its rows from a format (FORMATS).
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch

import attention
from formats import hellaswag, text
from model import IGNORE
from plumbing.errors import UserError


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
        """Yield ({keys involved}, message) for each contradiction between these values."""
        for name in ("packed_sequence_size", "workers"):
            if getattr(self, name) < 0:
                yield {f"data.{name}"}, f"data.{name}={getattr(self, name)} must not be negative"
        if self.packed_sequence_size and self.format == "text":
            yield {"data.packed_sequence_size", "data.format"}, (
                "data.packed_sequence_size packs HellaSwag samples, text has no padding to save: set "
                "data.format=hellaswag, or model.block_size for the length of text")


# ----------------------------------------------------------------------------------------------------------------
# formats


class Rows(Protocol):
    """What a format makes of its files: rows of one length, each a function of its number. `row` is all a batch needs.

    A new format is a function prepare(cfg, block_size, seed) in a file of formats/, and an entry in FORMATS.
    """

    n_rows: int
    block_size: int  # tokens of a row
    padding: float  # share of a row that is no text
    document: float | None  # the length that attention sees, mean over tokens; None: the whole row
    largest: int  # token id
    digest: str  # of the content and its order: a run resumes only on the same rows
    description: str  # for the screen

    def row(self, i: int):
        """(x, y, positions) of row i: int64 numpy (block_size,); positions None where attention sees the whole row."""


FORMATS = {"text": text.prepare, "hellaswag": hellaswag.prepare}


def prepare(cfg, block_size, seed):
    """(training Rows, validation Rows, tokenizer) of a DataConfig. With several ranks call it on rank 0 first.

    block_size: the longest row that the model takes. Raises UserError for files that cannot be found, read or used.
    """
    return FORMATS[cfg.format](cfg, block_size, seed)


# ----------------------------------------------------------------------------------------------------------------
# batches


def stack(rows, *shape):
    """(x, y, positions) of rows as tensors of shape (*shape, block_size); positions None where the rows have none."""
    return tuple(None if column[0] is None else torch.from_numpy(np.stack(column)).view(*shape, len(column[0]))
                 for column in zip(*rows, strict=True))


class Loader:
    """Training batches as a function of the step: the same global batch for any number of ranks.

    rows: Tokens or Samples. An epoch is all of them in an order shuffled by (seed, epoch); batches run over epoch
    borders. Raises UserError if there is less than one global batch.
    """

    def __init__(self, rows, *, global_batch_size, micro_batch_size, seed, rank=0, world_size=1):
        self.rows, self.global_batch_size, self.micro_batch_size = rows, global_batch_size, micro_batch_size
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, (None, None)
        if rows.n_rows < global_batch_size:
            raise UserError(f"the training data fills {rows.n_rows} rows of {rows.block_size} tokens, one step needs "
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


def on_device(x, y, positions, device):
    """A micro-batch, (B, T) tensors, as arguments of the model on its device: (x, y, documents).

    documents: () where attention sees whole rows, else (positions, bounds), which keep it within documents.
    """
    bounds = None if positions is None else attention.document_bounds(positions)  # on the CPU: a GPU would have to sync
    if device.type == "cuda":
        x, y, positions = (t if t is None else t.pin_memory().to(device, non_blocking=True) for t in (x, y, positions))
    return x, y, () if positions is None else (positions, bounds)
