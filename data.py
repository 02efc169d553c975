"""Data: from files to rows of tokens, and which rows a step sees.

    files -> a format (FORMATS) -> rows of one length -> shuffled by epoch, or drawn from several entries -> batches

The loader is a function of the step number: nothing to save, nothing to fast-forward, and the same global batches on
any number of ranks.

    python data.py [CONFIG.py] [--key=value ...] [--show=N] [--out=ROWS.jsonl]

shows what a run would train on: its samples as text, targets marked, and what was counted. No GPU, no weights.
"""

import hashlib
import json
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

import attention
from formats import chat, files, hellaswag, text, tokens
from model import IGNORE, check_ids
from plumbing import entry
from plumbing.errors import UserError

FORMATS = {"text": text.prepare, "chat": chat.prepare, "hellaswag": hellaswag.prepare, "tokens": tokens.prepare}


@dataclass(kw_only=True)
class DataConfig:
    """Where tokens come from."""

    format: Literal[tuple(FORMATS)] = "text"  # documents, conversations, questions, or token ids
    train: list[str] = field(default_factory=list)  # files, folders, globs, each file once; []: built in
    val: list[str] = field(default_factory=list)  # the same for validation; []: every 20th document of train
    weights: list[float] = field(default_factory=list)  # how often entries of train are drawn, relative; []: by size
    packed_sequence_size: int = 0  # chat, hellaswag: tokens of a row that samples are packed into; 0: one sample a row
    train_on: Literal["assistant", "all"] = "assistant"  # chat: replies and the token that ends them, or everything
    chat_template: str = ""  # chat: a file with a Jinja template; "": the tokenizer folder's own
    tokenizer: str = "auto"  # "bytes", a tiktoken name, a tokenizer file or folder; auto: init_from's, else bytes
    text_key: str = "text"  # text: the field of a row that holds the text
    eos_id: int | None = None  # tokens: id between documents, which attention does not cross; None: it sees whole rows
    cache_dir: str = "data_cache"  # tokenized shards are kept here
    workers: int = 0  # threads that tokenize; 0: one per core

    def problems(self):
        """Yield ({keys involved}, message) for each contradiction between these values."""
        for name in ("packed_sequence_size", "workers"):
            if getattr(self, name) < 0:
                yield {f"data.{name}"}, f"data.{name}={getattr(self, name)} must not be negative"
        if self.packed_sequence_size and self.format in ("text", "tokens"):
            yield {"data.packed_sequence_size", "data.format"}, (
                f"data.packed_sequence_size packs samples, and data.format={self.format} has no padding to save: set "
                "data.format=chat or hellaswag, or model.block_size for the length of rows")
        if self.format in ("chat", "tokens") and not self.train:
            what = ".bin or .npy files" if self.format == "tokens" else "files or folders with rows of conversations"
            yield {"data.format", "data.train"}, f"data.format={self.format} needs data.train: name {what}"
        if self.eos_id is not None and self.format != "tokens":
            yield {"data.eos_id", "data.format"}, f"data.eos_id is for data.format=tokens, not {self.format}: leave it"
        if self.weights and (len(self.weights) != len(self.train) or min(self.weights) <= 0):
            yield {"data.weights", "data.train"}, (
                f"data.weights={self.weights} must be positive numbers, one for each of the {len(self.train)} entries "
                "of data.train")
        elif self.weights and 0 in share_of_block(self.weights):
            yield {"data.weights"}, (f"data.weights={self.weights}: the smallest is less than 1/{2 * BLOCK} of all: "
                                     "leave that entry out")


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
    longest: int  # tokens of the longest document that attention sees
    most_documents: int  # in a row
    largest: int  # token id
    digest: str  # of the content and its order: a run resumes only on the same rows
    description: str  # for the screen
    counts: dict  # {what: number} for data.py: at least documents, tokens and targets; what was cut, dropped, not used
    n_samples: int  # windows of a stream, conversations, questions

    def row(self, i: int):
        """(x, y, positions) of row i: int64 numpy (block_size,); positions None where attention sees the whole row."""

    def sample(self, i: int):
        """(ids, loss) of sample i in the order of the files, before packing and shuffling; loss is true for targets."""


def prepare(cfg, block_size, seed):
    """(training Rows, validation Rows, tokenizer) of a DataConfig. With several ranks call it on rank 0 first.

    block_size: the longest row that the model takes. Raises UserError for files that cannot be found, read or used.
    """
    if not cfg.weights:
        return FORMATS[cfg.format](cfg, block_size, seed)
    kinds = set(files.KINDS.values())
    named = Counter(path.resolve() for entry in cfg.train for path in files.find_files([entry], kinds)[0])
    if twice := [str(path) for path, n in named.items() if n > 1]:
        raise UserError(f"data.weights: {twice[0]} is in several entries of data.train: name each file in one entry")
    prepared = [FORMATS[cfg.format](replace(cfg, train=[entry], weights=[]), block_size, seed) for entry in cfg.train]
    parts, val_parts, tokenizers = zip(*prepared, strict=True)
    train = Mixture(parts, cfg.train, cfg.weights)
    train.counts = {what: sum(part.counts[what] for part in parts) for what in parts[0].counts}
    train.description = "a mixture of" + "".join(f"\n  {weight / sum(cfg.weights):.1%} {part.description}"
                                                 for weight, part in zip(cfg.weights, parts, strict=True))
    return train, val_parts[0] if cfg.val else Mixture(val_parts, cfg.train), tokenizers[0]


# ----------------------------------------------------------------------------------------------------------------
# mixtures: the entries of data.train drawn in given proportions

BLOCK = 10_000  # rows within which the proportions hold exactly, but for rounding to 1 / BLOCK


def share_of_block(weights):
    """How many of BLOCK rows come from each entry: BLOCK is shared out in proportion, largest remainders rounded up."""
    exact = np.array(weights) / sum(weights) * BLOCK
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: BLOCK - shares.sum()]] += 1
    return shares.tolist()


class Mixture:
    """Several Rows as one, one after the other, padded to the longest rows. weights: how often Order draws from each.

    Without weights a part counts by its number of rows.
    """

    def __init__(self, parts, names, weights=()):
        self.parts, self.names, self.weights = parts, names, weights or [part.n_rows for part in parts]
        self.ends = np.cumsum([part.n_rows for part in parts])
        self.sample_ends = np.cumsum([part.n_samples for part in parts])
        self.n_rows, self.n_samples = int(self.ends[-1]), int(self.sample_ends[-1])
        self.block_size, self.longest, self.largest = (
            max(getattr(part, name) for part in parts) for name in ("block_size", "longest", "largest"))
        self.most_documents = max(part.most_documents - (part.block_size - self.block_size) // self.longest
                                  for part in parts)  # with those that pad a row
        n_tokens = np.array([weight * (1 - part.padding) * part.block_size
                             for weight, part in zip(self.weights, parts, strict=True)])  # relative
        self.padding = max(0.0, round(1 - float(n_tokens.sum() / (sum(self.weights) * self.block_size)), 9))
        self.document = None
        if any(part.document for part in parts):
            self.document = float(n_tokens @ [part.document or part.block_size for part in parts] / n_tokens.sum())
        whole = repr(([part.digest for part in parts], list(weights)))
        self.digest = hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()

    def row(self, i):
        part = int(np.searchsorted(self.ends, i, side="right"))
        x, y, positions = self.parts[part].row(i - int(self.ends[part]) + self.parts[part].n_rows)
        if room := self.block_size - len(x):
            x, y = np.append(x, np.zeros(room, np.int64)), np.append(y, np.full(room, IGNORE))
            if positions is not None:
                positions = np.append(positions, np.arange(room) % self.longest)
        return x, y, positions

    def sample(self, i):
        part = int(np.searchsorted(self.sample_ends, i, side="right"))
        return self.parts[part].sample(i - int(self.sample_ends[part]) + self.parts[part].n_samples)


class Shuffled:
    """The order of training on one part: [k] is the number of the k-th row. Each epoch has an order of its own."""

    def __init__(self, n_rows, *seed):
        self.n_rows, self.seed, self.epoch = n_rows, seed, None

    def __getitem__(self, k):
        epoch, i = divmod(k, self.n_rows)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((*self.seed, epoch)).permutation(self.n_rows)
        return int(self.order[i])


class Order:
    """The order of training on a Mixture: [k] is the number of the k-th row.

    Each block of BLOCK rows holds the same number of rows of each part, spread over it evenly with some chance, so what
    came before k is known without counting. Each part goes through its own epochs.
    """

    def __init__(self, mixture, seed):
        self.shares, n_parts = share_of_block(mixture.weights), len(mixture.parts)
        self.starts = mixture.ends - [part.n_rows for part in mixture.parts]
        self.orders = [Shuffled(part.n_rows, *([seed, i] if n_parts > 1 else [seed]))
                       for i, part in enumerate(mixture.parts)]
        rng = np.random.default_rng((seed, n_parts, 0))
        places = np.concatenate([(np.arange(n) + rng.random(n)) / n for n in self.shares])
        order = np.argsort(places, kind="stable")
        self.part = np.repeat(np.arange(n_parts), self.shares)[order]
        self.nth = np.concatenate([np.arange(n) for n in self.shares])[order]  # of its part, in a block

    def __getitem__(self, k):
        block, i = divmod(k, BLOCK)
        part = self.part[i]
        return int(self.starts[part]) + self.orders[part][block * self.shares[part] + int(self.nth[i])]


# ----------------------------------------------------------------------------------------------------------------
# batches


def stack(rows, *shape):
    """(x, y, positions) of rows as tensors of shape (*shape, block_size); positions None where the rows have none."""
    return tuple(None if column[0] is None else torch.from_numpy(np.stack(column)).view(*shape, len(column[0]))
                 for column in zip(*rows, strict=True))


class Loader:
    """Training batches as a function of the step: the same global batch for any number of ranks.

    An epoch is all of the rows in an order shuffled by (seed, epoch); batches run over epoch borders. Of a Mixture,
    each part has its own epochs. Raises UserError if there is less than one global batch.
    """

    def __init__(self, rows, *, global_batch_size, micro_batch_size, seed, rank=0, world_size=1):
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.rows = rows if isinstance(rows, Mixture) else Mixture([rows], [""])
        self.order = Order(self.rows, seed)
        if rows.n_rows < global_batch_size:
            raise UserError(f"the training data fills {rows.n_rows} rows of {rows.block_size} tokens, one step needs "
                            f"global_batch_size={global_batch_size}: give more text, or lower global_batch_size or "
                            "model.block_size")

    def sample(self, k):
        """Row k, counted from the start of training."""
        return self.rows.row(self.order[k])

    def batch(self, step):
        """This rank's part of a step's global batch: (x, y, positions), (accumulation, micro_batch_size, block_size).

        positions: int64, 0 at the first token of each document; None where attention is to run over whole rows.
        """
        first, per_pass = step * self.global_batch_size, self.micro_batch_size * self.world_size
        rows = [self.sample(first + a * per_pass + self.rank * self.micro_batch_size + i)
                for a in range(self.global_batch_size // per_pass) for i in range(self.micro_batch_size)]
        return stack(rows, -1, self.micro_batch_size)

    def epochs(self, steps):
        """How often these steps go through the data, as text: "0.42 epochs", of a Mixture for each entry."""
        n = steps * self.global_batch_size
        return ", ".join(f"{n * share / BLOCK / part.n_rows:.2f} epochs" + (f" of {name}" if name else "")
                         for share, part, name in zip(self.order.shares, self.rows.parts, self.rows.names, strict=True))


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
    """What data.py shows."""

    show: int = 3  # samples to print, the first of the files
    out: str = ""  # JSONL file to write a row for each training sample to: ids, and loss (1: that token is a target)

    def problems(self):
        if self.show < 0:
            yield {"show"}, f"--show={self.show} must not be negative"
        if self.out and (Path(self.out).is_dir() or not Path(self.out).absolute().parent.is_dir()):
            yield {"out"}, f"--out={self.out}: name a file in a folder that exists"


def marked(ids, loss, tokenizer, colour):
    """Token ids as text with special tokens visible; targets in colour, or between {+ and +}."""
    start, stop = ("\033[32m", "\033[0m") if colour else ("{+", "+}")
    borders = np.flatnonzero(np.diff(loss)) + 1
    shown = ""
    for run, is_target in zip(np.split(ids, borders), np.split(loss, borders), strict=True):
        decoded = decode(run, tokenizer)
        shown += f"{start}{decoded}{stop}" if is_target[0] else decoded
    return shown


def decode(ids, tokenizer):
    """The text of ids; ids that the tokenizer does not have as <id>."""
    if ids.max() <= tokenizer.largest:
        return tokenizer.decode(ids.tolist())
    return "".join(tokenizer.decode([i]) if i <= tokenizer.largest else f"<{i}>" for i in ids.tolist())


def main():
    import configurator  # here, since it imports this module for DataConfig

    look = Look()
    config = configurator.load(sys.argv[1:], look)
    if config.data.tokenizer == "auto":
        config.data.tokenizer = "bytes" if config.init_from == "scratch" else str(Path(config.init_from).expanduser())
    if look.out:
        named, _ = files.find_files([*config.data.train, *config.data.val], set(files.KINDS.values()))
        if Path(look.out).resolve() in [path.resolve() for path in named]:
            raise UserError(f"--out={look.out} is a file of the data: name another")
    rows, val_rows, tokenizer = prepare(config.data, config.model.block_size, config.seed)
    if config.init_from == "scratch":
        check_ids(config.model, max(rows.largest, val_rows.largest))
    print(f"data: {rows.description}")
    for i in range(min(look.show, rows.n_samples)):
        ids, loss = map(np.asarray, rows.sample(i))
        note = f", the first {LONGEST_SHOWN:,} of them" if len(ids) > LONGEST_SHOWN else ""
        print(f"\n---- sample {i + 1:,} of {rows.n_samples:,}: {len(ids):,} tokens, {int(loss.sum()):,} targets{note}")
        print(marked(ids[:LONGEST_SHOWN], loss[:LONGEST_SHOWN], tokenizer, sys.stdout.isatty()))
    print()
    loader = Loader(rows, global_batch_size=config.global_batch_size, micro_batch_size=1, seed=config.seed)
    for what, number in rows.counts.items():
        print(f"{what:<28} {number:>16,}")
    print(f"{'rows':<28} {rows.n_rows:>16,} of {rows.block_size:,} tokens, {rows.padding:.1%} padding")
    print(f"{'validation rows':<28} {val_rows.n_rows:>16,}")
    print(f"{config.max_steps:,} steps of {config.global_batch_size:,} rows see {loader.epochs(config.max_steps)}")
    if look.out:
        with open(look.out, "w") as file:
            for ids, loss in map(rows.sample, range(rows.n_samples)):
                row = {"ids": np.asarray(ids).tolist(), "loss": np.asarray(loss).astype(int).tolist()}
                file.write(json.dumps(row) + "\n")
        print(f"written: {look.out}")


if __name__ == "__main__":
    entry.run(main)
