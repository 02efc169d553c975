"""Files that a user names, and the rows and documents in them.

A suffix decides how a file is read (KINDS); each but Parquet and Arrow may be compressed (.gz, .zst). Files are read in
pieces, so that memory does not grow with their size.
"""

import codecs
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

ABOUT = {"readme", "license", "licence", "notice"}  # names of files about the others, whatever their suffix
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # as `datasets` leaves
CHAT_FIELDS = {"messages", "conversations", "instruction", "prompt"}
VAL_EVERY = 20  # every 20th document is for validation where data.val names none
PIECE = 2**20  # characters or bytes read at once
LONGEST_ELEMENT = 2**28  # characters of one element of a JSON list, beyond which it counts as unclosed


# ----------------------------------------------------------------------------------------------------------------
# finding files


class Files(NamedTuple):
    train: list  # of Path
    val: list  # of Path; empty: some of train's documents are for validation
    unused: list  # files in the folders that were named which are not data of this format
    note: str  # for the screen: what is left out, "" if nothing


def resolve(cfg, kinds):
    """The Files that data.train and data.val of a DataConfig name, of these kinds.

    data.val may lie in a folder of data.train: such a file is not trained on, unless nothing else is left.
    Raises UserError where an entry names nothing that can be used.
    """
    (train, unused), (val, unused_val) = find_files(cfg.train, kinds), find_files(cfg.val, kinds)
    if not cfg.train:
        train = embedded_files()
    held = {p.resolve() for p in val}
    apart = [p for p in train if p.resolve() not in held]
    note = ""
    if not apart:
        apart, note = train, ", all of them validation text too"
    elif len(apart) < len(train):
        note = f", {len(train) - len(apart)} more for validation alone"
    unused = list(dict.fromkeys(unused + unused_val))
    return Files(apart, val, unused, note + describe_unused(unused))


def describe_unused(paths):
    """", 12 files not used (README.md, c.csv, ...)" or ""."""
    if not paths:
        return ""
    names = ", ".join(p.name for p in paths[:4]) + (", ..." if len(paths) > 4 else "")
    return f", {number_of(paths)} not used ({names})"


def number_of(paths):
    """"1 file", "2 files"."""
    return f"{len(paths):,} {'file' if len(paths) == 1 else 'files'}"


def find_files(patterns, kinds=frozenset(TEXT)):
    """(files, unused): the files of these kinds that paths, folders and globs name, sorted within each, each once.

    unused: what else lies in the folders. Folders are searched recursively, links are followed, hidden files and
    folders are skipped. Raises UserError for an entry without a usable file and for a named file of another kind.
    """
    files, unused = {}, {}  # by resolved path
    for pattern in patterns:
        if not pattern.strip():
            raise UserError(f"data: {pattern!r} is an empty entry (an unset variable?): name a file, folder or glob")
        path, found, others = Path(pattern).expanduser(), [], []
        for match in [path] if path.exists() else map(Path, sorted(glob.glob(str(path), recursive=True))):
            asked_for = match == path or path.suffix == match.suffix != ""  # "x.csv", "*.csv", but not "*"
            if asked_for and match.is_file():
                check_named_file(match, kinds)
                found.append(match)
                continue
            for p in walk(match) if match.is_dir() else [match]:
                (found if is_data(p, kinds) else others).append(p)
        if not found:
            raise UserError(f"data: {pattern!r} matches no file that can be used (in a folder: {suffixes(kinds)})"
                            + describe_unused(others))
        for paths, into in ((found, files), (others, unused)):
            for p in paths:
                into.setdefault(p.resolve(), p)
    return list(files.values()), [p for real, p in unused.items() if real not in files]


def walk(folder):
    """The files below a folder, sorted, without hidden ones. Links are followed, each folder is visited once."""
    def fail(error):
        raise error

    visited, files = set(), []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        if (real := os.path.realpath(place)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files)


def kind_of(path):
    """The kind of a file by its suffix, or None; .gz and .zst are looked through."""
    suffix = path.suffix.lower()
    if suffix in (".gz", ".zst"):
        inner = KINDS.get(Path(path.stem).suffix.lower())
        return inner if inner in ("text", "json") else None
    return KINDS.get(suffix)


def suffixes(kinds):
    """The suffixes of these kinds, as text."""
    return ", ".join(suffix for suffix, kind in KINDS.items() if kind in kinds)


def is_data(path, kinds):
    """Whether a file found in a folder is data: not a README, a license or a data set's description."""
    if kind_of(path) not in kinds or not path.is_file():
        return False
    if path.stem.lower() in ABOUT or path.name in DESCRIPTIONS:
        return False
    return path.suffix.lower() != ".json" or not is_settings(path)


def is_settings(path):
    """Whether a .json file is one object over several lines: settings, not rows."""
    with path.open("rb") as file:
        line = file.readline(PIECE).removeprefix(codecs.BOM_UTF8).strip()
    return line.startswith(b"{") and line.endswith((b"{", b"[", b","))


def check_named_file(path, kinds):
    """UserError for a file that was named but is of another kind. Unknown suffixes pass as text if they are text."""
    kind, wanted = kind_of(path), suffixes(kinds)
    if kind in kinds:
        return
    if kind == "tokens":
        raise UserError(f"{path}: {path.suffix} holds tokens: set data.format=tokens, or name files of text ({wanted})")
    if kind is not None or "text" not in kinds or path.suffix.lower() in (".csv", ".tsv"):
        raise UserError(f"{path}: this format of data does not read {path.suffix or 'files without a suffix'}, "
                        f"expected {wanted}: convert it")
    with open_binary(path) as file:
        head = file.peek(4096)[:4096]
    if b"\0" in head:
        raise UserError(f"{path} is a binary file of unknown kind, expected {wanted}")
    if re.match(rb"\s*(\{|\[\s*\{)\s*\"", head.removeprefix(codecs.BOM_UTF8)):
        raise UserError(f"{path} holds JSON but is not named so: rename it to end in .jsonl or .json")


def embedded_files():
    """The embedded corpus: the standard library's own .py files, without tests and installed packages, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return [p for p in sorted(root.rglob("*.py")) if not skip.intersection(p.relative_to(root).parts)]


# ----------------------------------------------------------------------------------------------------------------
# opening files


class CountedFile(io.FileIO):
    """A file that reports the bytes that are read from it to a progress bar."""

    def __init__(self, path, bar):
        super().__init__(path)
        self.bar = bar

    def readinto(self, buffer):
        n = super().readinto(buffer)
        self.bar.update(n)
        return n


class ZstdFile(io.RawIOBase):
    """Decompresses a .zst file. zstandard's own reader takes a truncated file for a complete one; this is an error."""

    def __init__(self, file, zstandard):
        self.file, self.zstandard, self.frame, self.data = file, zstandard, None, b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.data:
            rest = self.frame.unused_data if self.frame and self.frame.eof else b""
            piece = rest or self.file.read(2**14)
            if not piece:
                if self.frame and not self.frame.eof:
                    raise EOFError("it ends in the middle of a Zstandard frame")
                return 0
            if not self.frame or self.frame.eof:
                self.frame = self.zstandard.ZstdDecompressor().decompressobj()
            self.data = memoryview(self.frame.decompress(piece))
        n = min(len(buffer), len(self.data))
        buffer[:n], self.data = self.data[:n], self.data[n:]
        return n


def open_binary(path, bar=None):
    """The bytes of a file as a buffered reader, decompressed where its suffix says so."""
    file = io.BufferedReader(CountedFile(path, bar) if bar else io.FileIO(path))
    if file.peek(64).startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    if path.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=file)
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(ZstdFile(file, package("zstandard", path)))
    return file


def package(name, path):
    """An optional package that a file needs. UserError if it is not installed."""
    try:
        return __import__(name)
    except ImportError as error:
        raise UserError(f"{path} needs {name}, which is not installed: pip install {name}") from error


def open_text(path, bar=None):
    return io.TextIOWrapper(open_binary(path, bar), encoding="utf-8-sig")  # -sig: some editors write a mark first


def bad_byte(path):
    """The position of the first byte that is not UTF-8."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    with open_binary(path) as file:
        while piece := file.read(PIECE):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                return position - pending + error.start
            position += len(piece)
    return position


def readable(path, read):
    """The items of the generator read(path); UserError where the file is damaged."""
    try:
        yield from read
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {bad_byte(path)}): convert it, or leave it out") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # of a package that need not be installed
            raise
        raise UserError(f"{path} is damaged: {error}") from error


# ----------------------------------------------------------------------------------------------------------------
# rows and documents


def rows(files, bar=None):
    """Yield (path, number, dict) of each row: of JSON the line where it begins, of Parquet and Arrow the row, from 1.

    bar: a tqdm bar that counts bytes. Raises UserError that names file and line of what cannot be read.
    """
    for path in files:
        kind = kind_of(path)
        if kind not in ROWS:
            raise UserError(f"{path} has no rows, expected {suffixes(ROWS)}")
        read = json_values(path, bar) if kind == "json" else table_rows(path, kind, bar)
        for number, row in readable(path, read):
            if not isinstance(row, dict):
                raise UserError(f"{place(path, number)} is {type_of(row)}, expected an object with named fields")
            yield path, number, row


def place(path, number):
    """Where a row is, for messages: "x.jsonl, line 7"."""
    return f"{path}, {'line' if kind_of(path) == 'json' else 'row'} {number}"


def type_of(value):
    """What a JSON value is called in messages."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string",
             list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def json_values(path, bar=None):
    """Yield (line number, value) of a file of JSON lines or of a JSON list, whatever its suffix says."""
    with open_binary(path, bar) as file:
        head = file.peek(PIECE).removeprefix(codecs.BOM_UTF8).lstrip()
        lines = io.TextIOWrapper(file, encoding="utf-8-sig")
        if head.startswith(b"["):
            yield from list_elements(path, lines)
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number} is not JSON: {error.msg} (expected one object per line, or "
                                    "a list of objects)") from error


def list_elements(path, file):
    """Yield (line number, element) of a JSON list; memory holds one element at a time."""
    decoder, border = json.JSONDecoder(), re.compile(r"\s*([\[,\]])\s*")
    text, at, line = file.read(PIECE), 0, 1
    while True:
        found = border.match(text, at)
        if found and (found[1] == "]" or found[1] == "[" and text.startswith("]", found.end())):
            return
        try:
            if not found:
                raise json.JSONDecodeError("Expecting ',' or ']' after an element", text, at)
            value, end = decoder.raw_decode(text, found.end())
        except json.JSONDecodeError as error:  # or the element goes on behind what was read
            more = file.read(max(PIECE, len(text) - at)) if len(text) - at < LONGEST_ELEMENT else ""
            if not more:
                line += text.count("\n", at, error.pos)
                raise UserError(f"{path}, line {line} is not JSON: {error.msg}") from error
            text, at = text[at:] + more, 0
            continue
        line += text.count("\n", at, found.end())
        yield line, value
        line += text.count("\n", found.end(), end)
        at = end


def table_rows(path, kind, bar=None):
    """Yield (row number, dict) of a Parquet or an Arrow file; memory holds a few hundred rows at a time."""
    with open_binary(path):  # a Git LFS pointer
        pass
    package("pyarrow", path)
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        if kind == "parquet":
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256)
        else:
            batches = arrow_batches(pyarrow, path)
        for batch in batches:
            for start in range(0, batch.num_rows, 256):
                for row in batch.slice(start, 256).to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}, after row {number}: pyarrow cannot read it as {kind}: {error}") from error
    if bar:
        bar.update(path.stat().st_size)


def arrow_batches(pyarrow, path):
    """The record batches of an Arrow file, in either of its two forms: stream (save_to_disk) or file."""
    with pyarrow.memory_map(str(path)) as source:
        try:
            reader = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            reader = pyarrow.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            return
        yield from reader


def documents(files, text_key, bar=None):
    """Yield the text of each document in pieces, as an iterable of str: a file of text, or a row's field `text_key`.

    Use up each before taking the next. Raises UserError that names what cannot be read.
    """
    for path in files:
        if kind_of(path) not in ROWS:
            with open_text(path, bar) as file:
                yield readable(path, iter(lambda: file.read(PIECE), ""))  # noqa: B023
            continue
        for _, number, row in rows([path], bar):
            if text_key not in row:
                hint = ": conversations and instructions need data.format=chat" if CHAT_FIELDS & set(row) else ""
                raise UserError(f"{place(path, number)} has no {text_key!r} (data.text_key): it has "
                                + (", ".join(row) or "no fields") + hint)
            if not isinstance(row[text_key], str):
                raise UserError(f"{place(path, number)}: `{text_key}` is {type_of(row[text_key])}, expected a string")
            yield [row[text_key]]
