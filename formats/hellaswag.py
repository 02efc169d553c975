"""HellaSwag: 50,000 multiple-choice questions, each a context with four endings, one of them right.

    questions -> samples: a context and its right ending, the loss on the ending only -> packed or padded rows

Fine-tuning takes the samples as rows of one length through data.Loader; eval.py scores all four endings. Source:
Zellers et al., arXiv 1905.07830. The text is prepared, and an ending's tokens are separated from its context's, as
EleutherAI's lm-evaluation-harness does (lm_eval/tasks/hellaswag), so that accuracies compare.
"""

import http.client
import re
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np

from formats import files
from formats.packing import make_rows, split
from plumbing.disk import replacing
from plumbing.errors import UserError

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/"


def download(name, folder):
    """The path folder/name of hellaswag_train.jsonl or hellaswag_val.jsonl, downloaded if it is missing."""
    path = Path(folder, name)
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(URL + name, timeout=60) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
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
        place += ": no HellaSwag question: "
        for name in ("activity_label", "ctx_a", "ctx_b"):
            files.check(raw.get(name), f"{place}`{name}`", str)
        endings = files.check(raw.get("endings"), f"{place}`endings`", list)
        for i, ending in enumerate(endings):
            files.check(ending, f"{place}`endings[{i}]`", str)
        label, indices = str(raw.get("label")), [str(i) for i in range(len(endings))]  # published as either type
        if label not in indices:
            raise UserError(f"{place}`label` is {raw.get('label')!r}, expected the index of "
                            f"the right ending, one of {', '.join(indices)}")
        query = clean(f"{raw['activity_label']}: {raw['ctx_a']} {raw['ctx_b'].capitalize()}")
        items.append({"ind": raw.get("ind", number), "query": query, "endings": list(map(clean, endings)),
                      "label": int(label)})
    return items


def questions(cfg):
    """(training questions, validation questions, Files) of a DataConfig: its files', else HellaSwag's own, downloaded.

    With another cfg.format: no training questions and no Files, and HellaSwag's own validation questions.
    """
    if cfg.format != "hellaswag":
        return [], read([download("hellaswag_val.jsonl", cfg.cache_dir)]), None
    if not cfg.train:
        train = str(download("hellaswag_train.jsonl", cfg.cache_dir))
        val = cfg.val or [str(download("hellaswag_val.jsonl", cfg.cache_dir))]
        cfg = replace(cfg, train=[train], val=val)
    found = files.resolve(cfg, files.ROWS)
    return *split(read(found.train), read(found.val) if found.val else None), found


def encode(encoding, query, ending, limit):
    """(ids of query and ending, index of the ending's first id, number of ids cut): at most `limit` inputs.

    The joint text is tokenized; as many ids as the query has alone belong to it, not counting white space at its end,
    which a bracketed note may have left. BOS comes first if the tokenizer adds one. There is no EOS: the harness
    scores, and NeMo-Automodel trains, without it. Text that is too long loses its beginning, after BOS.
    """
    bos = np.array(encoding.bos, np.int64)
    start = len(bos) + len(encoding.encode(query.rstrip()))
    ids = np.append(bos, encoding.encode(f"{query} {ending}")).astype(np.int64)
    cut = max(0, len(ids) - limit - 1)
    return np.delete(ids, np.s_[len(bos) : len(bos) + cut]), max(start - cut, 1), cut


def prepare(cfg, tokenizer, block_size, seed):
    """(training Samples, validation Samples) of a DataConfig, see data.prepare."""
    *parts, found = questions(cfg)
    n_cut = 0
    for part in parts:
        for k, item in enumerate(part):
            ids, start, cut = encode(tokenizer, item["query"], item["endings"][item["label"]], block_size)
            part[k] = ids, np.arange(len(ids)) >= start
            n_cut += cut > 0
    return make_rows(*parts, cfg, block_size, seed, found=found, counts={"samples cut at the beginning": n_cut},
                     about=f"tokenizer {tokenizer.name}")
