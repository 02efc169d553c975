"""HellaSwag: 50,000 multiple-choice questions, each a context with four endings, one of them right.

    questions -> samples: a context and its right ending, the loss on the ending only -> packed or padded rows

Fine-tuning takes the samples as rows of one length through data.Loader; eval.py scores all four endings. Source:
Zellers et al., arXiv 1905.07830. The text is prepared, and an ending's tokens are separated from its context's, as
EleutherAI's lm-evaluation-harness does (lm_eval/tasks/hellaswag), so that accuracies compare.
"""

import http.client
import re
import urllib.request
from pathlib import Path

import numpy as np

from formats import files
from formats.files import VAL_EVERY
from formats.packing import make_rows, sample_limit
from formats.tokenizer import get_tokenizer
from plumbing.disk import replacing
from plumbing.errors import UserError

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/"
LINES = {"hellaswag_train.jsonl": 39905, "hellaswag_val.jsonl": 10042}


# ----------------------------------------------------------------------------------------------------------------
# questions


def download(name, folder):
    """The path folder/name of a file in LINES, downloaded if it is missing. Raises UserError if that fails."""
    path = Path(folder, name)
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(URL + name, timeout=60) as response:
            content = response.read()
        n_lines = len(content.splitlines())
        if n_lines != LINES[name]:
            raise UserError(f"{n_lines} lines came, not {LINES[name]}")
    except (UserError, OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        raise UserError(f"{URL + name} could not be downloaded ({error}). Without a network put that file at {path}, "
                        "or name files of your own (training: data.train and data.val; eval.py: --data)") from error
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


def clean(text):
    """Text without the bracketed notes that WikiHow's texts have, as in "[header] How to bake [title] Mix"."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def read(paths):
    """The questions of files of rows in the published format: dicts of ind, query, endings, label."""
    items = []
    for number, (place, raw) in enumerate(files.rows(paths)):
        where = f"{place}: no HellaSwag question"
        whole = raw.get("ctx_a") is None
        texts = [(name, raw[name]) for name in ("activity_label", *(("ctx",) if whole else ("ctx_a", "ctx_b")))
                 if name in raw]
        if isinstance(raw.get("endings"), list):
            texts += [("endings", ending) for ending in raw["endings"]]
        for name, value in texts:
            if not isinstance(value, str):
                raise UserError(f"{where}: `{name}` holds {files.type_of(value)}, expected text")
        try:
            context = raw["ctx"] if whole else f"{raw['ctx_a']} {raw['ctx_b'].capitalize()}"
            item = {"ind": raw.get("ind", number), "query": clean(f"{raw['activity_label']}: {context}"),
                    "endings": [clean(ending) for ending in raw["endings"]]}
            label = str(raw["label"]).removesuffix(".0")  # published as a string or a number
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{where} with activity_label, ctx or ctx_a and ctx_b, endings and label "
                            f"({type(error).__name__}: {error})") from error
        if not isinstance(raw["endings"], list):
            raise UserError(f"{where}: `endings` is {files.type_of(raw['endings'])}, expected a list")
        indices = [str(i) for i in range(len(item["endings"]))]
        if label not in indices:
            raise UserError(f"{where}: `label` is {raw['label']!r}, expected the index of the right ending, one of "
                            + ", ".join(indices))
        items.append(item | {"label": int(label)})
    return items


def questions(cfg):
    """(training, validation) questions of a DataConfig: from its files, else HellaSwag's own, downloaded if need be.

    With another cfg.format: no training questions, and HellaSwag's own validation questions.
    """
    if cfg.format != "hellaswag":
        return [], read([download("hellaswag_val.jsonl", cfg.cache_dir)])
    found = files.resolve(cfg, files.ROWS)
    if not cfg.train:
        val = found.val or [download("hellaswag_val.jsonl", cfg.cache_dir)]
        return read([download("hellaswag_train.jsonl", cfg.cache_dir)]), read(val)
    train, val = read(found.train), read(found.val)
    if not found.val:
        val = train[VAL_EVERY - 1 :: VAL_EVERY]
        del train[VAL_EVERY - 1 :: VAL_EVERY]
    return train, val


# ----------------------------------------------------------------------------------------------------------------
# samples


def encode(encoding, query, ending, limit):
    """(ids of query and ending, index of the ending's first id, number of ids cut): at most `limit` inputs.

    The joint text is tokenized; as many ids as the query has alone belong to it, not counting white space at its end,
    which a bracketed note may have left. BOS comes first if the tokenizer adds one. There is no EOS: the harness
    scores, and NeMo-Automodel trains, without it. Text that is too long loses its beginning, after BOS.
    """
    bos = np.array([] if encoding.bos is None else [encoding.bos], np.int64)
    start = len(bos) + len(encoding.encode(query.rstrip()))
    ids = np.append(bos, encoding.encode(f"{query} {ending}")).astype(np.int64)
    cut = max(0, len(ids) - limit - 1)
    return np.delete(ids, np.s_[len(bos) : len(bos) + cut]), max(start - cut, 1), cut


def prepare(cfg, block_size, seed):
    """(training Rows, validation Rows, encoding) of a DataConfig. With several ranks, call it on rank 0 first."""
    encoding, limit = get_tokenizer(cfg.tokenizer), sample_limit(cfg, block_size)
    parts, n_cut = [], 0
    for items in questions(cfg):
        part = []
        for item in items:
            ids, start, cut = encode(encoding, item["query"], item["endings"][item["label"]], limit)
            part.append((ids, np.arange(len(ids)) >= start))
            n_cut += cut > 0
        parts.append(part)
    if not all(parts):
        raise UserError(f"data: {len(parts[0])} HellaSwag questions for training and {len(parts[1])} for validation "
                        f"are too few (without data.val, one of {VAL_EVERY} is for validation)")
    train, val = make_rows(cfg, block_size, seed, *parts)
    found = files.resolve(cfg, files.ROWS)
    lost = f"; {n_cut:,} samples lost their beginning, being longer than {limit} tokens" if n_cut else ""
    train.description = (
        f"HellaSwag, {train.n_samples:,} training samples in {train.n_rows:,} rows of {train.block_size} tokens, "
        f"{train.padding:.1%} of them padding, {val.n_samples:,} validation samples in {val.n_rows:,} rows, "
        f"tokenizer {encoding.described}" + found.note + lost)
    train.counts |= {"cut at the beginning": n_cut, "files not used": len(found.unused)}
    return train, val, encoding
