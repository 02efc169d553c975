"""The files that a user names, and the rows and documents in them.

A suffix decides how a file is read (KINDS); text and JSON may also be compressed (.gz, .zst). Files are read in pieces,
so that memory does not grow with their size, but for a JSON list, which is read whole.
"""

import codecs
import contextlib
import glob
import gzip
import io
import json
import os
import re
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

from plumbing.errors import UserError

KINDS = dict.fromkeys([".txt", ".md", ".rst", ".py", ".c", ".cpp", ".h", ".js", ".ts", ".java", ".rs", ".go", ".html"],
                      "text")  # a document
KINDS |= {".jsonl": "json", ".ndjson": "json", ".json": "json"}  # one object per line, or a list of objects
KINDS |= {".parquet": "parquet", ".arrow": "arrow"}  # rows, read by pyarrow
KINDS |= {".bin": "tokens", ".npy": "tokens"}  # for data.format=tokens only
ROWS = {"json", "parquet", "arrow"}
TEXT = {"text", *ROWS}
EVERY_KIND = {"tokens", *TEXT}

ABOUT = {"readme", "license", "licence", "notice",  # files about the others, whatever their suffix; of `datasets`:
         "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SPLITS = {"held out": {"validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"},
          "train": {"train", "training"}}  # as `datasets` reads them in names (its data_files.py)
VAL_EVERY = 20  # every 20th document is for validation where data.val names none
PIECE = 2**20  # characters or bytes read at once
TYPE_NAMES = {type(None): "null or missing", bool: "true or false", int: "a number", float: "a number", str: "a string",
              list: "a list", dict: "an object"}


class Files(NamedTuple):
    train: list  # of Path
    val: list  # of Path; empty: some of train's documents are for validation
    unused: list  # files in the named folders that are not data of this format, or belong to another split
    source: str  # for the screen: how many files of what, and what is left out


def resolve(cfg, kinds):
    """The Files of these kinds that data.train and data.val of a DataConfig name.

    data.val may lie in a folder of data.train: such a file is not trained on, unless nothing else is left.
    """
    train, unused = find_files(cfg.train, kinds, skip=cfg.cache_dir)
    val, unused_val = find_files(cfg.val, kinds, held_out=True, skip=cfg.cache_dir)
    train = train if cfg.train else embedded_files()
    apart, note = without(train, val), ""
    if not apart:
        apart, note = train, ", all of them validation text too"
    elif len(apart) < len(train):
        note = f", {len(train) - len(apart)} more for validation alone"
    unused = without(unused + unused_val, train + val)
    source = ", ".join(cfg.train) or "Python's standard library"
    return Files(apart, val, unused, f"{number_of(apart)} of {source}{note}{describe_unused(unused)}")


def check_out(out, read):
    """Raise UserError if a command cannot write rows to the path --out, or reads that file."""
    out = Path(out)
    if out.is_dir() or not os.access(out if out.exists() else out.absolute().parent, os.W_OK):
        raise UserError(f"--out={out}: name a writable file in a folder that exists")
    if not without([out], read):
        raise UserError(f"--out={out} is a file of the data: name another")


def describe_unused(paths):
    """", 12 files not used (README.md, c.csv, ...)" or ""."""
    if not paths:
        return ""
    names = ", ".join(p.name for p in paths[:4]) + (", ..." if len(paths) > 4 else "")
    return f", {number_of(paths)} not used ({names})"


def number_of(paths):
    """"1 file", "2 files"."""
    return f"{len(paths):,} {'file' if len(paths) == 1 else 'files'}"


def identity(path):
    """What distinguishes one version of a file from another: path, size and time of change."""
    status = path.stat()
    return os.path.realpath(path), status.st_size, status.st_mtime_ns


def without(paths, others=()):
    """`paths` without the files `others`, each file once. It is the same file under any name (links, "..")."""
    seen, left = set(map(os.path.realpath, others)), []
    for path in paths:
        if (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            left.append(path)
    return left


def find_files(patterns, kinds=EVERY_KIND, *, held_out=False, skip=""):
    """(files, unused): the files of these kinds that paths, folders and globs name, sorted within each, each once.

    unused: what else lies in the folders. Folders are searched recursively, links are followed, hidden files and
    folders are skipped, and so is the folder `skip`. Where a folder is divided into splits, held_out says which count.
    Raises UserError for an entry without a usable file and for a named file of another kind.
    """
    files, unused = [], []
    for pattern in patterns:
        if not pattern.strip():
            raise UserError(f"data: {pattern!r} is an empty entry (an unset variable?): name a file, folder or glob")
        path = Path(os.path.expanduser(pattern))
        matches = [path] if path.exists() else list(map(Path, sorted(glob.glob(str(path), recursive=True))))
        # a file is named by its path, and by "*.csv", but not by "*"
        named = [p for p in matches if p.is_file() and (p == path or p.suffix == path.suffix != "")]
        for p in named:
            check_named_file(p, kinds)
        visited = {os.path.realpath(skip) if skip else None}
        around = [p for match in matches if match not in named for p in walk(match, visited)]
        found = [p for p in around if is_data(p, kinds)]
        if {"train", "held out"} <= set(map(split_of, found)):
            found = [p for p in found if split_of(p) != ("train" if held_out else "held out")]
        found = named + found
        others = sorted(set(around).difference(found))
        if not matches:
            raise UserError(f"data: {pattern!r} matches no file and no folder")
        if not found:
            raise UserError(f"data: {pattern!r} matches no file that can be used (in a folder: {suffixes(kinds)})"
                            + describe_unused(others))
        files += found
        unused += others
    files = without(files)
    return files, without(unused, files)


def walk(path, visited):
    """Yield the files below a folder, sorted, without hidden ones. Links are followed, each folder is visited once."""
    if not path.is_dir():
        yield path
    elif os.path.realpath(path) not in visited:
        visited.add(os.path.realpath(path))
        for inner in sorted(path.iterdir()):  # glob would skip a folder that may not be read
            if not inner.name.startswith(".") and inner.name != "lost+found":  # at the root of a disk, for root only
                yield from walk(inner, visited)


def split_of(path):
    """The split that the name of a file of rows or tokens, or else of its folder, tells: a key of SPLITS, or None."""
    for name in (path.stem, path.parent.name):
        words = set(re.split("[^a-z]+", name.lower()))
        for split, names in SPLITS.items():
            if words & names and kind_of(path) != "text":
                return split
    return None


def kind_of(path):
    """The kind of a file by its suffix, or None; .gz and .zst are looked through where they may be."""
    if path.suffix.lower() in (".gz", ".zst"):
        kind = KINDS.get(Path(path.stem).suffix.lower())
        return kind if kind in ("text", "json") else None
    return KINDS.get(path.suffix.lower())


def suffixes(kinds):
    """The suffixes of these kinds, as text."""
    return ", ".join(suffix for suffix, kind in KINDS.items() if kind in kinds)


def is_data(path, kinds):
    """Whether a file found in a folder is data: not about other files, not a .json file with one object (settings)."""
    if kind_of(path) not in kinds or not path.is_file() or ABOUT & {path.stem.lower(), path.name.lower()}:
        return False
    if path.suffix.lower() != ".json":
        return True
    with path.open("rb") as file:
        line = file.readline(PIECE).removeprefix(codecs.BOM_UTF8).strip()
    return not (line.startswith(b"{") and line.endswith((b"{", b"[", b",")))  # the object goes on in the next line


def check_named_file(path, kinds):
    """Raise UserError for a named file of another kind. A file with an unknown suffix may be any text."""
    if kind_of(path) in kinds:
        return
    wanted = suffixes(kinds)
    tables = {".csv", ".tsv"} | {suffix for suffix, kind in KINDS.items() if kind != "text"}
    if "text" not in kinds or tables.intersection(map(str.lower, path.suffixes)):
        raise UserError(f"{path} is of a kind that this data.format does not read, expected {wanted}: convert it, or "
                        "set another data.format")
    with open_binary(path) as file, damage_named(path):
        head = file.peek(4096)[:4096]
    if b"\0" in head:
        raise UserError(f"{path} is a binary file of unknown kind, expected {wanted}")
    if re.match(rb"\s*(\{\s*[\"}]|\[\s*[\[{\"])", head.removeprefix(codecs.BOM_UTF8)):
        raise UserError(f"{path} holds JSON but is not named so: rename it to end in .jsonl or .json")


def embedded_files():
    """The embedded corpus: the standard library's own .py files, without tests and installed packages, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return [p for p in sorted(root.rglob("*.py")) if not skip.intersection(p.relative_to(root).parts)]


class CountedFile(io.FileIO):
    """A file that reports the bytes read from it to a progress bar."""

    def __init__(self, path, bar):
        super().__init__(path)
        self.bar = bar

    def readinto(self, buffer):
        n = super().readinto(buffer)
        self.bar.update(n)
        return n


def open_binary(path, bar=None):
    """The bytes of a file as a buffered reader, decompressed where its suffix says so."""
    file = io.BufferedReader(CountedFile(path, bar) if bar else io.FileIO(path))
    if file.peek(64).startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    if path.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=file)
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(package("pyarrow", path).CompressedInputStream(file, "zstd"))
    return file


def package(name, path, to_install=None):
    """An optional package that a file needs. Raises UserError if it is not installed; to_install: what pip calls it."""
    try:
        return __import__(name)
    except ImportError as error:
        missing = to_install or name
        raise UserError(f"{path} needs {missing}, which is not installed: pip install {missing}") from error


@contextlib.contextmanager
def damage_named(path):
    """Raise UserError where reading a file shows that it is damaged, or not UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}): convert it, or leave it out") from error
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the operating system, not of a decompressor
            raise
        raise UserError(f"{path} is damaged: {error}") from error


def rows(files, bar=None):
    """Yield (place, dict) of each row. place is for messages: "x.jsonl, line 7", "x.parquet, row 7".

    bar: a tqdm bar that counts bytes. Raises UserError that names the place of what cannot be read.
    """
    for path in files:
        kind = kind_of(path)
        if kind not in ROWS:
            raise UserError(f"{path} has no rows, expected {suffixes(ROWS)}")
        with open_binary(path, bar) as file, damage_named(path):
            for place, row in json_values(path, file) if kind == "json" else table_rows(path, file):
                yield place, check(row, place, dict)


def check(value, what, *kinds):
    """`value`, which must be of one of these types. Raises UserError that says `what` is not."""
    if isinstance(value, kinds):
        return value
    found, expected = TYPE_NAMES.get(type(value), type(value).__name__), " or ".join(TYPE_NAMES[kind] for kind in kinds)
    raise UserError(f"{what} is {found}, expected {expected}")


def json_values(path, file):
    """Yield (place, value) of a file of JSON lines, or of a JSON list, whatever its suffix says."""
    is_list = file.peek(PIECE).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    for line, content in enumerate([file.read()] if is_list else file, 1):
        if not content.strip():
            continue
        try:
            value = json.loads(content.decode("utf-8-sig"))  # editors may write a byte order mark
        except (ValueError, RecursionError) as error:  # also: not UTF-8, a number of thousands of digits, deep nesting
            line += getattr(error, "lineno", 1) - 1
            raise UserError(f"{path}, line {line} is not JSON: {getattr(error, 'msg', error)} (expected one object per "
                            "line, or a list of objects)") from error
        if is_list:
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(value, 1))
        else:
            yield f"{path}, line {line}", value


def table_rows(path, file):
    """Yield (place, dict) of a Parquet or an Arrow file; memory holds one batch of rows at a time."""
    package("pyarrow", path)
    import pyarrow.parquet

    number = 0
    try:
        if kind_of(path) == "parquet":
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256)
        elif file.peek(6).startswith(b"ARROW1"):
            reader = pyarrow.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:  # a stream, as save_to_disk writes it
            batches = pyarrow.ipc.open_stream(file)
        for batch in batches:
            batch.validate(full=True)  # else offsets of a damaged .arrow file end the process
            for start in range(0, batch.num_rows, 256):
                for number, row in enumerate(batch.slice(start, 256).to_pylist(), number + 1):  # noqa: B020
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: dates beyond 9999
        raise UserError(f"{path}, after row {number}: pyarrow cannot read it: {error}") from error


def documents(files, text_key, bar=None):
    """Yield each document, as an iterable of pieces of text: a file of text, or the field `text_key` of a row."""
    for path in files:
        if kind_of(path) not in ROWS:
            yield text_pieces(path, bar)
            continue
        for place, row in rows([path], bar):
            if text_key not in row:
                raise UserError(f"{place} has no {text_key!r} (data.text_key): it has {', '.join(row) or 'no fields'} "
                                "(conversations and instructions need data.format=chat)")
            yield [check(row[text_key], f"{place}: `{text_key}`", str)]


def text_pieces(path, bar):
    """Yield the pieces of a file of text."""
    with io.TextIOWrapper(open_binary(path, bar), encoding="utf-8-sig") as file, damage_named(path):
        while piece := file.read(PIECE):
            yield piece
