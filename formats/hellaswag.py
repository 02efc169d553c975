"""HellaSwag: 50,000 questions, each a context with four endings of which one is right.

    questions (JSONL) -> samples: a context and its right ending, the loss on the ending only -> packed or padded rows

Fine-tuning takes the samples as rows of one length through data.Loader; eval.py scores all four endings. Source:
Zellers et al., arXiv 1905.07830. The text is prepared, and an ending's tokens are told from its context's, as
EleutherAI's lm-evaluation-harness does (lm_eval/tasks/hellaswag), so that accuracies compare.
"""

import hashlib
import http.client
import json
import re
import secrets
import shutil
import urllib.request
from pathlib import Path

import numpy as np

from formats.files import VAL_EVERY, find_files, keep_apart
from formats.tokenizer import get_tokenizer
from model import IGNORE
from plumbing.errors import UserError

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/"
LINES = {"hellaswag_train.jsonl": 39905, "hellaswag_val.jsonl": 10042}


# ----------------------------------------------------------------------------------------------------------------
# questions


def download(name, folder):
    """The path of folder/name, one of LINES, which is downloaded if it is not there. UserError where that fails."""
    path = Path(folder, name)
    if path.is_file():
        return path
    aside = path.with_name(f"{name}.{secrets.token_hex(4)}.tmp")
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(URL + name, timeout=60) as response, aside.open("wb") as file:
            shutil.copyfileobj(response, file)
        if (lines := len(aside.read_bytes().splitlines())) != LINES[name]:
            raise OSError(f"{lines} lines came, not {LINES[name]}")
        aside.rename(path)
    except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        raise UserError(f"{URL + name} could not be downloaded ({error}). Without a network put that file at {path}, "
                         "or name files of yours (data.train and data.val where data.format=hellaswag; eval.py: --data)"
                         ) from error
    finally:
        aside.unlink(missing_ok=True)
    return path


def clean(text):
    """Text without WikiHow's notes in brackets."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def read(files):
    """The questions of JSONL files in the published format: dicts of ind, query, endings, label."""
    items = []
    for path in files:
        for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                raw = json.loads(line)
                whole, label = raw.get("ctx_a") is None, float(raw["label"])
                context = raw["ctx"] if whole else f"{raw['ctx_a']} {raw['ctx_b'].capitalize()}"
                item = {"ind": raw.get("ind", number - 1), "query": clean(f"{raw['activity_label']}: {context}"),
                        "endings": [clean(ending) for ending in raw["endings"]], "label": int(label)}
                if not isinstance(raw["endings"], list) or label not in range(len(raw["endings"])):
                    raise IndexError("endings must be a list, and label the place of one in it")
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}, line {number}: no HellaSwag question with activity_label, ctx or ctx_a and "
                                 f"ctx_b, endings and label ({type(error).__name__}: {error})") from error
            items.append(item)
    return items


def questions(cfg):
    """(training, validation) questions of a DataConfig: of its files, or HellaSwag's own, downloaded if need be.

    Where cfg.format is another one, (none, HellaSwag's own validation).
    """
    ours = cfg.format == "hellaswag"
    if not ours or not cfg.train:
        train = read([download("hellaswag_train.jsonl", cfg.cache_dir)]) if ours else []
        val = find_files(cfg.val) if ours and cfg.val else [download("hellaswag_val.jsonl", cfg.cache_dir)]
        return train, read(val)
    val = find_files(cfg.val)
    train = read(keep_apart(find_files(cfg.train), val)[0])
    if val:
        return train, read(val)
    return [item for i, item in enumerate(train, 1) if i % VAL_EVERY], train[VAL_EVERY - 1 :: VAL_EVERY]


# ----------------------------------------------------------------------------------------------------------------
# samples


def encode(encoding, query, ending, limit):
    """(ids of query and ending, where the ending's begin, how many were cut): `limit` inputs and targets at most.

    The ending's ids are those of the joint text beyond as many as the query has alone. BOS goes first where the
    tokenizer's configuration adds one. Nothing goes last: the harness scores, and NeMo-Automodel trains, without EOS.
    Of a text too long the beginning is cut off, behind BOS.
    """
    bos = np.array([] if encoding.bos is None else [encoding.bos], np.int64)
    start = len(bos) + len(encoding.encode(query))
    ids = np.append(bos, encoding.encode(f"{query} {ending}")).astype(np.int64)
    cut = max(0, len(ids) - limit - 1)
    return np.delete(ids, np.s_[len(bos) : len(bos) + cut]), max(start - cut, 1), cut


def sequences(encoding, items, limit):
    """(ids, where the ending's begin) of every ending of every question, one question after the other."""
    return [encode(encoding, item["query"], ending, limit)[:2] for item in items for ending in item["endings"]]


class Samples:
    """Samples, (ids, where targets begin) pairs, as rows of block_size tokens: one a row, or several if packed.

    Who shares a row is drawn from `seed` and stays from epoch to epoch: it decides nothing but who is in a batch
    together, as attention does not cross samples, and makes the number of rows known for every epoch.
    """

    def __init__(self, samples, block_size, *, packed, seed):
        self.samples, self.block_size, self.packed = samples, block_size, packed
        lengths = np.array([len(ids) - 1 for ids, _ in samples])  # a sample's last id is a target only
        self.longest = int(lengths.max())
        self.document = float((lengths**2).sum() / lengths.sum())  # the length that attention sees, mean over tokens
        order = np.random.default_rng(seed).permutation(len(samples)) if packed else np.arange(len(samples))
        ends = np.cumsum(lengths[order])
        self.rows, first = [], 0
        while first < len(samples):
            room = block_size + (ends[first - 1] if first else 0)
            stop = int(np.searchsorted(ends, room, side="right")) if packed else first + 1
            self.rows.append(order[first:stop])
            first = stop
        self.n_rows = len(self.rows)
        self.padding = 1 - int(ends[-1]) / (self.n_rows * block_size)  # share of a row that is no text
        everything = np.concatenate([ids for ids, _ in samples])
        self.largest = int(everything.max())
        borders = [(len(ids), start) for ids, start in samples]
        whole = everything.tobytes() + repr((borders, block_size, packed, seed if packed else 0)).encode()
        self.digest = hashlib.blake2b(whole, digest_size=16).hexdigest()

    def row(self, i):
        """(x, y, positions) of row i, int64 (block_size,): targets of the endings only, positions 0 at each sample.

        positions: None where a row is one sample. What is left at the end of a row is samples without targets, no
        longer than the real ones, because attention is compiled for the length of the longest.
        """
        x, y = np.zeros(self.block_size, np.int64), np.full(self.block_size, IGNORE, np.int64)
        positions, at = np.arange(self.block_size), 0
        for ids, start in (self.samples[k] for k in self.rows[i]):
            stop = at + len(ids) - 1
            x[at:stop], y[at + start - 1 : stop] = ids[:-1], ids[start:]
            positions[stop:] = np.arange(self.block_size - stop) % self.longest
            at = stop
        return x, y, positions if self.packed else None


def prepare(cfg, block_size, seed):
    """(training Samples, validation Samples, encoding) of a DataConfig. With several ranks, on rank 0 first.

    Without packing, rows are as long as the longest sample, rounded up to the multiple of 16 that FP8 matmuls need:
    one length for the whole run, so that one compiled graph serves it.
    """
    encoding, size = get_tokenizer(cfg.tokenizer), cfg.packed_sequence_size
    if size > block_size:
        raise UserError(f"data.packed_sequence_size={size} is more than model.block_size={block_size}, the longest "
                         "sequence that the model takes: raise that, or pack less")
    limit = size or block_size
    parts = [[encode(encoding, item["query"], item["endings"][item["label"]], limit)
              for item in items] for items in questions(cfg)]
    if not all(parts):
        raise UserError(f"data: {len(parts[0])} HellaSwag questions for training and {len(parts[1])} for validation "
                         f"are too few (without data.val, one of {VAL_EVERY} is for validation)")
    longest = max(len(ids) - 1 for part in parts for ids, _, _ in part)
    n_cut = sum(cut > 0 for part in parts for _, _, cut in part)
    train, val = (Samples([(ids, start) for ids, start, _ in part], size or min(block_size, -(-longest // 16) * 16),
                          packed=size > 0, seed=seed) for part in parts)
    train.description = (
        f"HellaSwag, {len(train.samples):,} training samples in {train.n_rows:,} rows of {train.block_size} tokens, "
        f"{train.padding:.1%} of them padding, {len(val.samples):,} validation samples in {val.n_rows:,} rows, "
        f"tokenizer {encoding.name}")
    if n_cut:
        train.description += f"; {n_cut:,} samples lost their beginning, being longer than {limit} tokens"
    return train, val, encoding
