"""Data: from files to rows of tokens, and which rows a step sees.

    files -> a format (FORMATS) -> rows of one length -> shuffled by epoch, or drawn from several entries -> batches

    python data.py [CONFIG.py] [--key=value ...] [--show=N] [--out=ROWS.jsonl]

shows what a run would train on: its samples as text, targets marked, and what was counted. No GPU, no weights.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

import attention
from formats import chat, files, hellaswag, text, tokens
from formats.tokenizer import get_tokenizer
from model import IGNORE, check_ids
from plumbing import entry
from plumbing.errors import UserError
from plumbing.ranks import progress_bar
from plumbing.schema import Natural

FORMATS = {"text": text.prepare, "chat": chat.prepare, "hellaswag": hellaswag.prepare, "tokens": tokens.prepare}


@dataclass(kw_only=True)
class DataConfig:
    """Where tokens come from."""

    format: Literal[tuple(FORMATS)] = "text"  # documents, conversations, questions, or token ids
    train: list[str] = field(default_factory=list)  # files, folders, globs, each file once; []: built in
    val: list[str] = field(default_factory=list)  # the same for validation; []: every 20th document of train
    weights: list[float] = field(default_factory=list)  # how often entries of train are drawn, relative; []: by size
    packed_sequence_size: Natural = 0  # chat, hellaswag: tokens of a row that samples are packed into; 0: one each
    train_on: Literal["assistant", "all"] = "assistant"  # chat: replies and the token that ends them, or everything
    chat_template: str = ""  # chat: a file with a Jinja template; "": the tokenizer folder's own
    tokenizer: str = "auto"  # "bytes", a tiktoken name, a tokenizer file or folder; auto: init_from's, else bytes
    text_key: str = "text"  # text: the field of a row that holds the text
    eos_id: int | None = None  # tokens: id between documents, which attention does not cross; None: it sees whole rows
    cache_dir: str = "data_cache"  # tokenized shards are kept here
    workers: Natural = 0  # threads that tokenize; 0: one per core

    def resolve_paths(self, init_from):
        """Replace "auto" by the tokenizer of the folder init_from, or by "bytes" for a model from scratch.

        Paths become absolute: sample.py and an export read the run's config, perhaps from another folder.
        """
        if self.tokenizer == "auto":
            self.tokenizer = "bytes" if init_from == "scratch" else os.path.expanduser(init_from)
            if init_from != "scratch" and not Path(self.tokenizer).is_dir():
                raise UserError(f"init_from={init_from}: no such folder: name a Hugging Face model folder")
        for name in ("tokenizer", "chat_template"):
            path = os.path.expanduser(getattr(self, name))
            if path not in ("", "bytes") and os.path.exists(path):
                setattr(self, name, os.path.abspath(path))

    def problems(self):
        """Yield a message for each contradiction between these values, with the keys involved."""
        if self.packed_sequence_size and self.format in ("text", "tokens"):
            yield (f"data.packed_sequence_size packs samples, and data.format={self.format} has no padding to save: "
                   "set data.format=chat or hellaswag, or model.block_size for the length of rows")
        if self.format in ("chat", "tokens") and not self.train:
            yield f"data.format={self.format} needs data.train: name files or folders"
        for name, nothing, reader in (("eos_id", None, "tokens"), ("text_key", "text", "text"),
                                      ("train_on", "assistant", "chat")):
            if getattr(self, name) != nothing and self.format != reader:
                yield f"data.{name} is for data.format={reader}, not {self.format}: leave it"
        if self.weights and (len(self.weights) != len(self.train) or min(self.weights) <= 0
                             or 0 in share_of_block(self.weights)):
            yield (f"data.weights={self.weights} must be positive numbers, one for each of the {len(self.train)} "
                   f"entries of data.train, and each large enough for one row of {BLOCK:,}")


# ----------------------------------------------------------------------------------------------------------------
# formats


class Rows(Protocol):
    """What a format makes of its files: rows of one length, each a function of its number. `row` is all a batch needs.

    A new format is a file of formats/ with a function prepare(cfg, tokenizer, block_size, seed), which gives the Rows
    for training and those for validation, and an entry in FORMATS.
    """

    n_rows: int
    block_size: int  # tokens of a row; prepare() may raise it where rows have padding
    padding: float  # share of the rows that is padding
    document: float | None  # the length that attention sees, mean over tokens; None: the whole row
    longest: int  # tokens of the longest document that attention sees
    most_documents: int  # in a row
    largest: int  # token id
    digest: str  # of the content and its order: a run resumes only on the same rows
    description: str  # for the screen
    counts: dict  # {what: number} for data.py: at least documents, tokens and targets; what was cut, dropped, not used
    n_samples: int  # windows of a stream, conversations, questions

    def row(self, i: int):
        """(x, y, positions) of row i, int64 numpy (block_size,): y is the target of each token of x, or IGNORE;
        positions are 0 at the first token of each document, or None where attention sees the whole row."""

    def sample(self, i: int):
        """(ids, loss) of sample i in the order of the files, before packing and shuffling; loss is true for targets."""


def prepare(cfg, block_size, seed):
    """(training Rows, validation Rows, tokenizer) of a DataConfig. With several ranks call it on rank 0 first.

    block_size: the longest row that the model takes. Raises UserError for files that cannot be found, read or used.
    """
    if cfg.packed_sequence_size > block_size:
        raise UserError(f"data.packed_sequence_size={cfg.packed_sequence_size} is more than model.block_size="
                        f"{block_size}, the longest sequence that the model takes: raise that, or pack less")
    tokenizer, block_size = get_tokenizer(cfg.tokenizer), cfg.packed_sequence_size or block_size
    if not cfg.weights:
        return *FORMATS[cfg.format](cfg, tokenizer, block_size, seed), tokenizer
    named = Counter(path.resolve() for entry in cfg.train for path in files.find_files([entry])[0])
    (path, n), *_ = named.most_common(1)
    if n > 1:
        raise UserError(f"data.weights: {path} is in several entries of data.train: name each file in one entry")
    entries = [replace(cfg, train=[entry], weights=[]) for entry in cfg.train]
    train, val = zip(*(FORMATS[cfg.format](entry, tokenizer, block_size, seed) for entry in entries), strict=True)
    row_length = max(part.block_size for part in train)
    for part in train + val:
        part.block_size = row_length  # rows of one sample each differ from part to part: all are padded to the longest
    mixture = Mixture(train, cfg)
    mixture.description = "a mixture of" + "".join(f"\n  {weight / sum(cfg.weights):.1%} {part.description}"
                                                   for weight, part in zip(cfg.weights, train, strict=True))
    return mixture, val[0] if cfg.val else Mixture(val, cfg), tokenizer


# ----------------------------------------------------------------------------------------------------------------
# mixtures: the entries of data.train drawn in given proportions

BLOCK = 10_000  # rows within which the proportions hold, rounded to whole rows


def share_of_block(weights):
    """How many of BLOCK rows come from each entry, in proportion to the weights."""
    return np.diff(np.rint(np.cumsum([0, *weights]) / sum(weights) * BLOCK)).astype(int).tolist()


class Mixture:
    """The Rows of the entries of data.train as one, one entry after the other. Order draws them by data.weights."""

    def __init__(self, parts, cfg):
        self.parts, self.names, self.weights = parts, cfg.train, cfg.weights
        self.block_size = parts[0].block_size
        self.n_rows, self.n_samples = (sum(getattr(part, name) for part in parts) for name in ("n_rows", "n_samples"))
        self.longest, self.most_documents, self.largest = (
            max(getattr(part, name) for part in parts) for name in ("longest", "most_documents", "largest"))
        self.padding = float(np.average([part.padding for part in parts], weights=self.weights))
        self.document = None
        if parts[0].document:  # then attention stays within documents in all of them
            n_tokens = [weight * (1 - part.padding) for weight, part in zip(self.weights, parts, strict=True)]
            self.document = float(np.average([part.document for part in parts], weights=n_tokens))
        self.counts = sum((Counter(part.counts) for part in parts), Counter())
        whole = repr(([part.digest for part in parts], self.weights))
        self.digest = hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()

    def row(self, i):
        for part in self.parts:
            if i < part.n_rows:
                return part.row(i)
            i -= part.n_rows

    def sample(self, i):
        for part in self.parts:
            if i < part.n_samples:
                return part.sample(i)
            i -= part.n_samples


class Order:
    """The order of training: [k] is the number of the k-th row. Each epoch has its own order, drawn from the seed.

    Each part of a Mixture goes through its own epochs, and each block of BLOCK rows holds the same number of rows of
    each part, spread over it evenly with some chance, so what came before k is known without counting.
    """

    def __init__(self, rows, seed):
        parts, weights, self.seeds = [rows], [1], [(seed,)]
        if isinstance(rows, Mixture):
            parts, weights, self.seeds = rows.parts, rows.weights, [(seed, i) for i in range(len(rows.parts))]
        self.shares, self.sizes = share_of_block(weights), [part.n_rows for part in parts]
        self.starts = np.cumsum([0, *self.sizes])
        self.epochs, self.orders = [None] * len(parts), [None] * len(parts)  # of each part: the epoch it is in
        rng = np.random.default_rng((seed, len(parts), 0))
        places = np.concatenate([(np.arange(n) + rng.random(n)) / n for n in self.shares])
        order = np.argsort(places, kind="stable")
        self.part = np.repeat(np.arange(len(parts)), self.shares)[order]
        self.nth = np.concatenate([np.arange(n) for n in self.shares])[order]  # of its part, in a block

    def __getitem__(self, k):
        block, i = divmod(k, BLOCK)
        part = self.part[i]
        epoch, nth = divmod(block * self.shares[part] + int(self.nth[i]), self.sizes[part])
        if epoch != self.epochs[part]:
            rng = np.random.default_rng((*self.seeds[part], epoch))
            self.epochs[part], self.orders[part] = epoch, rng.permutation(self.sizes[part])
        return int(self.starts[part] + self.orders[part][nth])


# ----------------------------------------------------------------------------------------------------------------
# batches


def stack(rows, *shape):
    """(x, y, positions) of rows as tensors of shape (*shape, block_size); positions None where the rows have none."""
    return tuple(None if column[0] is None else torch.from_numpy(np.stack(column)).view(*shape, len(column[0]))
                 for column in zip(*rows, strict=True))


class Loader:
    """Training batches as a function of the step: nothing to save, and the same global batch for any number of ranks.

    Batches run over the borders of epochs. Raises UserError if there is less than one global batch.
    """

    def __init__(self, rows, *, global_batch_size, micro_batch_size, seed, rank=0, world_size=1):
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rows, self.rank, self.world_size = rows, rank, world_size
        self.order = Order(rows, seed)
        if rows.n_rows < global_batch_size:
            raise UserError(f"the training data fills {rows.n_rows} rows of {rows.block_size} tokens, one step needs "
                            f"global_batch_size={global_batch_size}: give more text, or lower global_batch_size, "
                            "model.block_size or data.packed_sequence_size")

    def batch(self, step):
        """(x, y, positions) of this rank's part of a step, (accumulation, micro_batch_size, block_size) each."""
        first, per_pass = step * self.global_batch_size, self.micro_batch_size * self.world_size
        rows = [self.rows.row(self.order[first + a * per_pass + self.rank * self.micro_batch_size + i])
                for a in range(self.global_batch_size // per_pass) for i in range(self.micro_batch_size)]
        return stack(rows, -1, self.micro_batch_size)

    def epochs(self, steps):
        """How often these steps go through the data, as text: "0.42 epochs", of a Mixture for each entry."""
        epochs = [steps * self.global_batch_size * share / BLOCK / size
                  for share, size in zip(self.order.shares, self.order.sizes, strict=True)]
        if not isinstance(self.rows, Mixture):
            return f"{epochs[0]:.2f} epochs"
        return ", ".join(f"{n:.2f} epochs of {name}" for n, name in zip(epochs, self.rows.names, strict=True))


def eval_batches(rows, *, n, micro_batch_size, rank=0, world_size=1):
    """Yield (x, y, positions) of shape (micro_batch_size, block_size): n rows spread over all (0: all) over all ranks.

    Every rank gets equally many batches, since each is a collective under FSDP; rows past the end are masked.
    """
    n = min(n or rows.n_rows, rows.n_rows)
    x, y, positions = rows.row(0)
    empty = np.zeros_like(x), np.full_like(y, IGNORE), positions
    for first in progress_bar(range(0, n, micro_batch_size * world_size), "evaluation", "batch"):
        part = range(first + rank * micro_batch_size, first + (rank + 1) * micro_batch_size)
        yield stack([rows.row(i * rows.n_rows // n) if i < n else empty for i in part], micro_batch_size)


def on_device(x, y, positions, rows, device):
    """A micro-batch of rows, (B, T) tensors, as arguments of the model on its device: (x, y, documents).

    documents: () where attention sees whole rows, else (positions, bounds), which keep it within documents.
    """
    bounds = None
    if positions is not None:  # on the CPU: a GPU would have to sync
        bounds = attention.document_bounds(positions, rows.longest, rows.most_documents)
    if device.type == "cuda":
        x, y, positions = (t if t is None else t.pin_memory().to(device, non_blocking=True) for t in (x, y, positions))
    return x, y, () if positions is None else (positions, bounds)


# ----------------------------------------------------------------------------------------------------------------
# look at what a run would train on

LONGEST_SHOWN = 1000  # tokens of a sample


@dataclass(kw_only=True)
class Look:
    """The arguments of data.py beside the config's."""

    show: Natural = 3  # samples to print, the first of the files
    out: str | None = None  # JSONL file for a row of each training sample: ids, and loss (1: that token is a target)


def marked(ids, loss, tokenizer, colour):
    """Token ids as text: targets in colour, or between {+ and +}; an id that the tokenizer does not have as <id>."""
    start, stop = ("\033[32m", "\033[0m") if colour else ("{+", "+}")
    unknown = ids > tokenizer.largest
    borders = np.flatnonzero(np.diff(loss) | unknown[1:] | unknown[:-1]) + 1
    shown = ""
    for part, targets in zip(np.split(ids, borders), np.split(loss, borders), strict=True):
        text = f"<{part[0]}>" if part[0] > tokenizer.largest else tokenizer.decode(part.tolist())
        shown += f"{start}{text}{stop}" if targets[0] else text
    return shown.replace(stop + start, "")


def main():
    import configurator  # here, since it imports this module for DataConfig

    look = Look()
    config = configurator.load(sys.argv[1:], look)
    config.data.resolve_paths(config.init_from)
    if look.out:
        files.check_out(look.out, files.find_files([*config.data.train, *config.data.val])[0])
    rows, val_rows, tokenizer = prepare(config.data, config.model.block_size, config.seed)
    if config.init_from == "scratch":
        check_ids(config.model, max(rows.largest, val_rows.largest))
    print(f"data: {rows.description}")
    for i in range(min(look.show, rows.n_samples)):
        ids, loss = rows.sample(i)
        note = f", the first {LONGEST_SHOWN:,} of them" if len(ids) > LONGEST_SHOWN else ""
        print(f"\n---- sample {i + 1:,} of {rows.n_samples:,}: {len(ids):,} tokens, {int(loss.sum()):,} targets{note}")
        print(marked(ids[:LONGEST_SHOWN], loss[:LONGEST_SHOWN], tokenizer, sys.stdout.isatty()))
    print()
    for what, number in rows.counts.items():
        print(f"{what:<40} {number:>16,}")
    padding = f", {rows.padding:.1%} padding" if rows.padding else ""  # of text only the last row has any
    print(f"{'rows':<40} {rows.n_rows:>16,} of {rows.block_size:,} tokens{padding}")
    print(f"{'validation rows':<40} {val_rows.n_rows:>16,}")
    if look.out:
        with open(look.out, "w") as file:
            for ids, loss in map(rows.sample, range(rows.n_samples)):
                file.write(json.dumps({"ids": ids.tolist(), "loss": loss.astype(int).tolist()}) + "\n")
        print(f"written: {look.out}")
    loader = Loader(rows, global_batch_size=config.global_batch_size, micro_batch_size=1, seed=config.seed)
    print(f"{config.max_steps:,} steps of {config.global_batch_size:,} rows see {loader.epochs(config.max_steps)}")


if __name__ == "__main__":
    entry.run(main, piped=True)
