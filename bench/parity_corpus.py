"""Token files for config/parity_157m.py, made of the .py, .md and .rst files of installed Python packages.

    pip install --no-deps --target /tmp/packages scipy sympy pandas scikit-learn matplotlib django
    python bench/parity_corpus.py $(python -c "import site; print(site.getsitepackages()[0])") /tmp/packages \
        [--out=data_cache/parity_corpus] [--vocab_size=32768] [--max_tokens=N]

Each text counts once, whatever the number of its copies, and the texts are in an order that only their content decides.
Writes OUT/tokenizer.json (byte-level BPE, trained on every 8th text), OUT/val.bin (every 30th text) and OUT/train.bin
(the others): uint16 ids, each text ends with <|endoftext|>. Needs `tokenizers`.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plumbing import entry
from plumbing.errors import UserError

EOS = "<|endoftext|>"
SUFFIXES = {".py", ".md", ".rst"}
BATCH = 2000  # texts encoded at a time


def read_texts(folders):
    """(different texts of UTF-8 files below the folders in the order of their hashes, number of files read)."""
    texts, n_files = {}, 0
    for folder in folders:
        for path in folder.rglob("*"):
            if path.suffix in SUFFIXES and path.is_file():
                content = path.read_bytes().replace(b"\r\n", b"\n")
                n_files += 1
                texts[hashlib.blake2b(content, digest_size=16).digest()] = content
    decoded = (texts[key].decode(errors="replace") for key in sorted(texts))
    return [text for text in decoded if text.strip() and "\ufffd" not in text], n_files


def train_tokenizer(texts, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def write_tokens(tokenizer, texts, path, max_tokens):
    """Write texts as ids, each with EOS at its end, until there are max_tokens."""
    eos, n_texts, n_ids = tokenizer.token_to_id(EOS), 0, 0
    with path.open("wb") as file:
        for first in range(0, len(texts), BATCH):
            for encoding in tokenizer.encode_batch_fast(texts[first : first + BATCH], add_special_tokens=False):
                if n_ids < max_tokens:
                    np.array([*encoding.ids, eos], "<u2").tofile(file)
                    n_texts, n_ids = n_texts + 1, n_ids + len(encoding.ids) + 1
            if n_ids >= max_tokens:
                break
            print(f"\r{path.name}: {n_ids:,} tokens", end="", flush=True)
    print(f"\r{path}: {n_texts:,} texts, {n_ids:,} tokens")


def main():
    parser = entry.Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders with installed packages")
    parser.add_argument("--out", type=Path, default=Path("data_cache/parity_corpus"), help="folder to write to")
    parser.add_argument("--vocab_size", type=int, default=32768, help="ids of the tokenizer (32768)")
    parser.add_argument("--max_tokens", type=int, default=2**40, help="training tokens at most")
    args = parser.parse_args()
    if missing := [str(folder) for folder in args.folders if not folder.is_dir()]:
        raise UserError(f"{', '.join(missing)}: no such folder")
    if not 300 <= args.vocab_size <= 2**16:
        raise UserError(f"--vocab_size={args.vocab_size} must be from 300 to 65536: ids are written as uint16")
    args.out.mkdir(parents=True, exist_ok=True)
    texts, n_files = read_texts(args.folders)
    print(f"{n_files:,} files, {len(texts):,} different texts of {sum(map(len, texts)) / 1e6:.0f}M characters")
    tokenizer = train_tokenizer(texts[::8], args.vocab_size)
    tokenizer.save(str(args.out / "tokenizer.json"))
    write_tokens(tokenizer, texts[::30], args.out / "val.bin", args.max_tokens)
    write_tokens(tokenizer, [text for i, text in enumerate(texts) if i % 30], args.out / "train.bin", args.max_tokens)


if __name__ == "__main__":
    entry.run(main)
