"""Tokens: where text comes from, how it becomes memory-mapped shards, and which tokens a step sees.

    documents -> tokenizer -> shards on disk -> one long stream of tokens -> windows of block_size, shuffled by epoch

Text is tokenized once. The loader is a function of the step number: nothing to save, nothing to fast-forward, and the
same global batches on any number of ranks.
"""

import base64
import glob
import hashlib
import json
import os
import shutil
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from model import IGNORE

END = "<|endoftext|>"
SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".cpp", ".h", ".js", ".ts", ".java", ".rs", ".go", ".html", ".jsonl"}
VAL_EVERY = 20  # every 20th document is for validation, where data.val names none
MAGIC, HEADER_BYTES, SHARD_TOKENS = b"nanofp8\x01", 4096, 100_000_000


@dataclass(kw_only=True)
class DataConfig:
    """Where tokens come from."""

    train: list[str] = field(default_factory=list)  # files, folders, globs (text or .jsonl); []: the embedded corpus
    val: list[str] = field(default_factory=list)  # the same for validation; []: every 20th document of train
    tokenizer: str = "bytes"  # "bytes", a tiktoken name ("gpt2", "o200k_base"), or a rank file (.tiktoken, .model)
    text_key: str = "text"  # the field of a JSONL line that holds the text
    cache_dir: str = "data_cache"  # tokenized shards are kept here
    workers: int = 0  # threads that tokenize; 0: one per core


# ----------------------------------------------------------------------------------------------------------------
# tokenizers: all become a tiktoken.Encoding

# Split pattern and special tokens of Llama 3. Source: llama-models, llama3/tokenizer.py
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                  "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
                  "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
                  "<|image|>"]
LLAMA3_SPECIAL += [f"<|reserved_special_token_{2 + i}|>" for i in range(256 - len(LLAMA3_SPECIAL))]


def get_tokenizer(name):
    """The tiktoken.Encoding of "bytes", of a tiktoken name, or of a rank file (Llama 3's tokenizer.model is one).

    Raises ValueError for an unknown name, a vocabulary that cannot be downloaded, and a file that is no rank file.
    """
    if name == "bytes":
        # no merges, so cutting into long pieces is as right as into words, and quicker
        return tiktoken.Encoding("bytes", pat_str=r"[^\n]*\n|[^\n]+", special_tokens={END: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if Path(name).is_file():
        try:
            lines = [line.split() for line in Path(name).read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except ValueError as error:
            raise ValueError(f"{name} is no tiktoken rank file (lines of base64 token and rank): {error}") from error
        if missing := [i for i in range(256) if bytes([i]) not in ranks]:
            raise ValueError(f"{name} lacks {len(missing)} of the 256 single bytes, which tiktoken needs")
        llama3 = len(ranks) == 128000 or Path(name).name == "tokenizer.model"
        special = LLAMA3_SPECIAL if llama3 else [END]
        return tiktoken.Encoding(Path(name).name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks,
                                 special_tokens={token: len(ranks) + i for i, token in enumerate(special)})
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"data.tokenizer={name!r} is neither a file nor one of bytes, "
                         + ", ".join(tiktoken.list_encoding_names()))
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # requests' errors are OSErrors
        raise ValueError(f"data.tokenizer={name!r}: tiktoken could not download its vocabulary "
                         f"({type(error).__name__}). Without a network, set TIKTOKEN_CACHE_DIR to a folder that holds "
                         "it, give a rank file, or use data.tokenizer=bytes") from error


def fingerprint(encoding):
    """A hash of what ids mean in this encoding: its ranks, split pattern and special tokens."""
    h = hashlib.blake2b(digest_size=16)
    h.update(repr((encoding._pat_str, sorted(encoding._special_tokens.items()))).encode())
    for token, rank in sorted(encoding._mergeable_ranks.items()):
        h.update(token + rank.to_bytes(4, "little"))
    return h.hexdigest()


def end_token(encoding):
    """The id that closes each document."""
    for name in (END, "<|end_of_text|>"):
        if name in encoding._special_tokens:
            return encoding._special_tokens[name]
    raise ValueError(f"tokenizer {encoding.name} has no end-of-text token")


# ----------------------------------------------------------------------------------------------------------------
# documents


def embedded_files():
    """The embedded corpus: the standard library's own .py files, without tests and installed packages, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return [p for p in sorted(root.rglob("*.py")) if not skip.intersection(p.relative_to(root).parts)]


def find_files(patterns):
    """The files that paths, folders (recursive) and globs name, sorted within each. ValueError if one names none."""
    files = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix in SUFFIXES]
        else:
            found = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise ValueError(f"data: {pattern!r} matches no file (in a folder, files ending in "
                             + ", ".join(sorted(SUFFIXES)) + " count)")
        files += [p for p in found if p.is_file()]
    return files


def documents(files, text_key):
    """Yield the text of each document: a file, or a line of a .jsonl file. ValueError names what cannot be read."""
    for path in files:
        try:
            if path.suffix != ".jsonl":
                yield path.read_text(encoding="utf-8")
                continue
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        text = json.loads(line)[text_key]
                    except (json.JSONDecodeError, KeyError, TypeError) as error:
                        raise ValueError(f"{path}, line {number}: no JSON object with text under data.text_key="
                                         f"{text_key!r}") from error
                    if not isinstance(text, str):
                        raise ValueError(f"{path}, line {number}: {text_key!r} is not text")
                    yield text
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
    """(memory map of the tokens, header) of a shard. ValueError if it is foreign, truncated or corrupt."""
    fix = f": delete its folder {path.parent}, it is made again from the text"
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if not head.startswith(MAGIC) or len(head) < HEADER_BYTES:
        raise ValueError(f"{path} is no token shard of this version of nanofp8{fix}")
    header = json.loads(head[len(MAGIC) :].rstrip(b"\0"))
    if header["fingerprint"] != fingerprint(encoding):
        raise ValueError(f"{path} was made with another tokenizer ({header['tokenizer']}) than {encoding.name}{fix}")
    dtype = np.dtype(header["dtype"])
    expected = HEADER_BYTES + header["tokens"] * dtype.itemsize
    if path.stat().st_size != expected:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, its header says {expected}{fix}")
    tokens = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES)
    if hashlib.blake2b(tokens, digest_size=16).hexdigest() != header["hash"]:
        raise ValueError(f"{path} is corrupt: its tokens do not have the hash that its header says{fix}")
    return tokens, header


class Tokens:
    """A stream of tokens over several shards, or a part of one. len(); slice(start, stop) gives int64 numpy."""

    def __init__(self, shards, headers, description, start=0, stop=None):
        self.shards, self.description, self.start = shards, description, start
        self.ends = np.cumsum([len(s) for s in shards])
        self.stop = int(self.ends[-1]) if stop is None else stop
        self.largest = max(h["largest"] for h in headers)
        whole = repr([(h["hash"], h["fingerprint"]) for h in headers] + [self.start, self.stop])
        self.digest = hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()  # of the content

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


def prepare(cfg):
    """(train Tokens, validation Tokens, encoding) of a DataConfig; tokenizes what cfg.cache_dir does not hold yet.

    With several ranks call it on rank 0 first. Raises ValueError for text that cannot be found, read or used.
    """
    encoding = get_tokenizer(cfg.tokenizer)
    train, val = (find_files(cfg.train), find_files(cfg.val)) if cfg.train else (embedded_files(), [])
    identity = [[(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files] for files in (train, val)]
    key = hashlib.blake2b(repr((identity, cfg.text_key, fingerprint(encoding))).encode(), digest_size=8).hexdigest()
    name = Path(cfg.train[0]).stem if cfg.train else "python_stdlib"
    folder = Path(cfg.cache_dir, f"{name}-{encoding.name}-{key}")
    if not folder.is_dir():
        build(folder, train, val, cfg, encoding)
    streams = []
    for split in ("train", "val"):
        opened = [open_shard(p, encoding) for p in sorted(folder.glob(f"{split}_*.bin"))]
        if opened:
            shards, headers = zip(*opened, strict=True)
            streams.append(Tokens(shards, headers, ""))
    if len(streams) == 1:  # too few documents to set some aside: the end of the text is for validation
        whole, cut = streams[0], len(streams[0]) - len(streams[0]) // VAL_EVERY
        streams = [Tokens(whole.shards, headers, "", *part) for part in ((0, cut), (cut, len(whole)))]
    source = f"{len(train)} files" + (f" of {', '.join(cfg.train)}" if cfg.train else " of Python's standard library")
    for stream in streams:
        stream.description = (f"{source}, {len(streams[0]):,} training and {len(streams[1]):,} validation tokens in "
                              f"{folder}, tokenizer {encoding.name}")
    return *streams, encoding


def build(folder, train, val, cfg, encoding):
    """Tokenize files into shards in `folder`, which appears when it is complete and not before."""
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    aside.mkdir(parents=True)
    workers, end = cfg.workers or os.cpu_count(), np.array([end_token(encoding)])
    try:
        bar = tqdm(unit="B", unit_scale=True, desc="tokenizing", disable=None)  # None: only on a terminal
        with ThreadPoolExecutor(workers) as pool, bar:

            def encode(text):  # threads are enough: tiktoken lets go of the interpreter lock
                return np.append(encoding.encode_to_numpy(text, disallowed_special=()), end)

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
        if not any(aside.glob("train_*.bin")):
            raise ValueError(f"data: no text in {', '.join(map(str, train[:3]))}: the corpus is empty")
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


def window(tokens, i, block_size):
    """(x, y) of window i of the stream, int64 (block_size,): y is the next token of each; a short end is masked."""
    part = tokens.slice(i * block_size, (i + 1) * block_size + 1)
    x, y = np.zeros(block_size, np.int64), np.full(block_size, IGNORE, np.int64)
    x[: len(part) - 1], y[: len(part) - 1] = part[:-1], part[1:]
    return x, y


def windows(tokens, block_size):
    """How many windows cover the stream: every token but the first is a target in exactly one of them."""
    return -(-(len(tokens) - 1) // block_size)


class Loader:
    """Training batches as a function of the step: the same global batch for any number of ranks.

    An epoch is all windows in an order shuffled by (seed, epoch); batches run over epoch borders. Raises ValueError
    if the text is shorter than one global batch or has token ids that the model lacks.
    """

    def __init__(self, tokens, *, block_size, global_batch_size, micro_batch_size, seed, vocab_size,
                 rank=0, world_size=1):
        self.tokens, self.block_size, self.global_batch_size = tokens, block_size, global_batch_size
        self.micro_batch_size, self.seed, self.rank, self.world_size = micro_batch_size, seed, rank, world_size
        self.epoch, self.n_windows = (None, None), windows(tokens, block_size)
        if len(tokens) <= global_batch_size * block_size:
            raise ValueError(f"the training text has {len(tokens):,} tokens, one step needs {global_batch_size} x "
                             f"{block_size} + 1 = {global_batch_size * block_size + 1:,}: give more text, or lower "
                             "global_batch_size or model.block_size")
        if tokens.largest >= vocab_size:
            raise ValueError(f"the text has token id {tokens.largest}, model.vocab_size={vocab_size} ends before: set "
                             f"model.vocab_size to at least {tokens.largest + 1}, or another data.tokenizer")

    def sample(self, k):
        """(x, y) of sample k, counted from the start of training."""
        epoch, i = divmod(k, self.n_windows)
        if epoch != self.epoch[0]:
            self.epoch = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.n_windows)
        return window(self.tokens, int(self.epoch[1][i]), self.block_size)

    def batch(self, step):
        """This rank's part of a step's global batch: x, y of shape (accumulation, micro_batch_size, block_size)."""
        first, per_pass = step * self.global_batch_size, self.micro_batch_size * self.world_size
        samples = [self.sample(first + a * per_pass + self.rank * self.micro_batch_size + i)
                   for a in range(self.global_batch_size // per_pass) for i in range(self.micro_batch_size)]
        shape = (-1, self.micro_batch_size, self.block_size)
        return tuple(torch.from_numpy(np.stack(column)).view(shape) for column in zip(*samples, strict=True))


def eval_batches(tokens, *, block_size, n, micro_batch_size, rank=0, world_size=1):
    """Yield (x, y) of shape (micro_batch_size, block_size): n windows spread over the stream (0: all) over all ranks.

    Every rank gets equally many batches, since each is a collective under FSDP; rows past the end are masked.
    """
    total = windows(tokens, block_size)
    n = min(n or total, total)
    for first in range(0, n, micro_batch_size * world_size):
        rows = range(first + rank * micro_batch_size, first + (rank + 1) * micro_batch_size)
        empty = np.zeros(block_size, np.int64), np.full(block_size, IGNORE, np.int64)
        samples = [window(tokens, i * total // n, block_size) if i < n else empty for i in rows]
        yield tuple(torch.from_numpy(np.stack(column)) for column in zip(*samples, strict=True))
