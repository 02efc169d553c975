"""Files that a user names, and the documents in them."""

import glob
import json
import sysconfig
from pathlib import Path

from plumbing.errors import UserError

SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".cpp", ".h", ".js", ".ts", ".java", ".rs", ".go", ".html", ".jsonl"}
VAL_EVERY = 20  # every 20th document is for validation, where data.val names none

def embedded_files():
    """The embedded corpus: the standard library's own .py files, without tests and installed packages, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return [p for p in sorted(root.rglob("*.py")) if not skip.intersection(p.relative_to(root).parts)]


def find_files(patterns):
    """The files that paths, folders (recursive, but for hidden ones) and globs name, sorted within each, each once.

    UserError if one names none.
    """
    files = {}  # by where they really are: what two patterns name counts once
    for pattern in patterns:
        path, found = Path(pattern).expanduser(), []
        for match in [path] if path.exists() else map(Path, sorted(glob.glob(str(path), recursive=True))):
            inside = [p for p in sorted(match.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()
                      and not any(part.startswith(".") for part in p.relative_to(match).parts)]
            found += inside or [match] * match.is_file()
        if not found:
            raise UserError(f"data: {pattern!r} matches no file (in a folder, files ending in "
                             + ", ".join(sorted(SUFFIXES)) + " count)")
        for p in found:
            files.setdefault(p.resolve(), p)
    return list(files.values())


def keep_apart(train, val):
    """(files of `train` that are not among those of `val`, a remark); all of them where `val` has every one.

    data.val may be a file in data.train's folder: what is for validation is not trained on.
    """
    held = {p.resolve() for p in val}
    kept = [p for p in train if p.resolve() not in held] if held else train
    if not kept:
        return train, ", all of them validation text too"
    return kept, f", {len(train) - len(kept)} more for validation alone" if len(kept) < len(train) else ""


def documents(files, text_key):
    """Yield the text of each document: a file, or a line of a .jsonl file. UserError names what cannot be read."""
    for path in files:
        try:
            if path.suffix.lower() != ".jsonl":
                yield path.read_text(encoding="utf-8-sig")  # -sig: some editors put a mark before the text
                continue
            with path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise UserError(f"{path}, line {number} is no JSON: {error.msg}") from error
                    if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
                        has = f"it has {', '.join(row) or 'none'}" if isinstance(row, dict) else "it is no object"
                        raise UserError(f"{path}, line {number} has no text under data.text_key={text_key!r}: {has}")
                    yield row[text_key]
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it, or leave it out") from error
