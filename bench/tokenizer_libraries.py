"""tiktoken against `tokenizers` on one tokenizer.json: the same ids, how many tokens a second.

    python bench/tokenizer_libraries.py --tokenizer=FOLDER [--threads=N] [--out=FILE.json]

The text is Python's standard library; the best of three rounds of each counts. It is why formats/tokenizer.py encodes
with tiktoken where a file allows it. N must be the number of cores: `tokenizers` uses them all.
"""

import datetime
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from formats import files
from formats.tokenizer import get_tokenizer
from plumbing import entry
from plumbing.errors import UserError


def main():
    parser = entry.Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder or file of a byte-level tokenizer.json")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of both (all cores)")
    parser.add_argument("--out", default="tokenizer_libraries.json", help="the results (tokenizer_libraries.json)")
    args = parser.parse_args()
    tokenizer = get_tokenizer(args.tokenizer)
    if tokenizer.full is None or tokenizer.ranks is None:
        raise UserError(f"--tokenizer={args.tokenizer}: give one that both libraries can run")
    texts = [text for path in files.embedded_files() if (text := path.read_text(encoding="utf-8"))]
    pool = ThreadPoolExecutor(args.threads)
    runs = {"tiktoken": lambda: list(pool.map(tokenizer.encode, texts)),
            "tokenizers": lambda: [e.ids for e in tokenizer.full.encode_batch_fast(texts, add_special_tokens=False)]}
    seconds, ids = dict.fromkeys(runs, float("inf")), {}
    for _ in range(3):
        for name, run in runs.items():
            start = time.perf_counter()
            ids[name] = run()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    assert all(np.array_equal(a, b) for a, b in zip(*ids.values(), strict=True)), "other ids"
    n_tokens = sum(map(len, ids["tiktoken"]))
    rates = {name: round(n_tokens / seconds[name]) for name in runs}
    ratio = rates["tiktoken"] / rates["tokenizers"]
    result = {"hardware": f"{os.cpu_count()} CPU cores", "versions": {name: version(name) for name in runs},
              "date": str(datetime.date.today()), "threads": args.threads, "tokens": n_tokens, "tokens_per_s": rates,
              "command": f"python bench/tokenizer_libraries.py --tokenizer={tokenizer.name} --threads={args.threads}",
              "ratio": round(ratio, 2)}
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"{n_tokens:,} tokens, {args.threads} threads: tiktoken {rates['tiktoken']:,} tokens/s, tokenizers "
          f"{rates['tokenizers']:,}, {ratio:.1f} times")


if __name__ == "__main__":
    entry.run(main)
