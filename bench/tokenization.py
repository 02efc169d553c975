"""Tokenizing text into shards against tiktoken's own encode_ordinary_batch, on the same documents and threads.

    python bench/tokenization.py --tokenizer=NAME [--data=FILE ...] [--threads=N] [--out=FILE.json]

Both take turns, and the best of seven rounds of each counts. Ours includes reading the files, writing and hashing the
shards. Works with tokenizers that tiktoken runs: its own names, rank files, byte-level tokenizer.json.
"""

import datetime
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from formats import files, text
from formats.tokenizer import get_tokenizer
from plumbing import entry
from plumbing.disk import replace_text


def main():
    parser = entry.Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="as data.tokenizer")
    parser.add_argument("--data", nargs="*", default=[], help="files of text (default: Python's standard library)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of both (all cores)")
    parser.add_argument("--out", default="tokenization.json", help="the results (tokenization.json)")
    args = parser.parse_args()
    tokenizer = get_tokenizer(args.tokenizer)
    paths = files.find_files(args.data, files.TEXT)[0] or files.embedded_files()
    documents = ["".join(pieces) for pieces in files.documents(paths, "text")]
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    best = {"encode_ordinary_batch": float("inf"), "shards": float("inf")}
    for _ in range(7):
        start = time.perf_counter()
        tokenizer.ranks.encode_ordinary_batch(documents, num_threads=args.threads)
        best["encode_ordinary_batch"] = min(best["encode_ordinary_batch"], time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            config = data.DataConfig(train=args.data, tokenizer=args.tokenizer, cache_dir=folder, workers=args.threads)
            start = time.perf_counter()
            text.build(Path(folder, "shards"), paths, [], config, tokenizer)
            best["shards"] = min(best["shards"], time.perf_counter() - start)
    rates = {name: megabytes / seconds for name, seconds in best.items()}
    ratio = rates["shards"] / rates["encode_ordinary_batch"]
    name = Path(args.tokenizer).name
    result = {"hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
              "versions": {p: version(p) for p in ("tiktoken", "numpy")}, "date": str(datetime.date.today()),
              "command": f"python bench/tokenization.py --tokenizer={name} --threads={args.threads}",
              "tokenizer": tokenizer.name, "documents": len(documents), "megabytes": megabytes,
              "threads": args.threads, "megabytes_per_s": rates, "ratio": ratio}
    replace_text(Path(args.out), json.dumps(result, indent=1))
    print(f"{len(documents):,} documents, {megabytes:.1f} MB, {args.threads} threads: encode_ordinary_batch "
          f"{rates['encode_ordinary_batch']:.1f} MB/s, shards {rates['shards']:.1f} MB/s, {ratio:.0%} of it")


if __name__ == "__main__":
    entry.run(main)
