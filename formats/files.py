"""Files that a user names, and the rows and documents in them.

A suffix decides how a file is read (KINDS); each but Parquet and Arrow may be compressed (.gz, .zst). Files are read in
pieces, so that memory does not grow with their size; a JSON list, which is read whole, has a limit.
"""

import codecs
import glob
import gzip
import io
import json
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

ABOUT = {"readme", "license", "licence", "notice",  # files about the others, whatever their suffix; of `datasets`:
         "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SPLITS = {"held out": {"validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"},
          "train": {"train", "training"}}  # as `datasets` reads them in names (its data_files.py)
CHAT_FIELDS = {"messages", "conversations", "instruction", "prompt"}
VAL_EVERY = 20  # every 20th document is for validation where data.val names none
PIECE = 2**20  # characters or bytes read at once
LONGEST_LIST = 2**30  # characters of a JSON list


# ----------------------------------------------------------------------------------------------------------------
# finding files


class Files(NamedTuple):
    train: list  # of Path
    val: list  # of Path; empty: some of train's documents are for validation
    unused: list  # files in the folders that were named which are not data of this format, or of another split
    note: str  # for the screen: what is left out, "" if nothing


def resolve(cfg, kinds):
    """The Files that data.train and data.val of a DataConfig name, of these kinds.

    data.val may lie in a folder of data.train: such a file is not trained on, unless nothing else is left.
    Raises UserError where an entry names nothing that can be used.
    """
    train, unused = find_files(cfg.train, kinds, skip=cfg.cache_dir)
    val, unused_val = find_files(cfg.val, kinds, held_out=True, skip=cfg.cache_dir)
    if not cfg.train:
        train = embedded_files()
    held = {p.resolve() for p in val}
    apart = [p for p in train if p.resolve() not in held]
    note = ""
    if not apart:
        apart, note = train, ", all of them validation text too"
    elif len(apart) < len(train):
        note = f", {len(train) - len(apart)} more for validation alone"
    used = held | {p.resolve() for p in train}
    unused = [p for p in dict.fromkeys(unused + unused_val) if p.resolve() not in used]
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


def identity(path):
    """What tells one version of a file from another: path, size and time of change."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def find_files(patterns, kinds=frozenset(TEXT), *, held_out=False, skip=""):
    """(files, unused): the files of these kinds that paths, folders and globs name, sorted within each, each once.

    unused: what else lies in the folders. Folders are searched recursively, links are followed, hidden files and
    folders are skipped, and so is the folder `skip`. Where a folder is divided into splits, held_out says which count.
    Raises UserError for an entry without a usable file and for a named file of another kind.
    """
    files, unused = {}, {}  # by resolved path
    for pattern in patterns:
        if not pattern.strip():
            raise UserError(f"data: {pattern!r} is an empty entry (an unset variable?): name a file, folder or glob")
        path, named, around = Path(pattern).expanduser(), [], []
        for match in [path] if path.exists() else map(Path, sorted(glob.glob(str(path), recursive=True))):
            if match.is_dir():
                around += walk(match, {Path(skip).resolve()} if skip else set())
            elif match.is_file() and (match == path or path.suffix == match.suffix != ""):  # "*.csv", but not "*"
                check_named_file(match, kinds)
                named.append(match)
            else:
                around.append(match)
        found = named + of_split([p for p in around if is_data(p, kinds)], held_out)
        others = set(around).difference(found)
        if not found:
            raise UserError(f"data: {pattern!r} matches no file that can be used (in a folder: {suffixes(kinds)})"
                            + describe_unused(sorted(others)))
        for p in found:
            files.setdefault(p.resolve(), p)
        for p in sorted(others):
            unused.setdefault(p.resolve(), p)
    return list(files.values()), [p for real, p in unused.items() if real not in files]


def walk(folder, visited):
    """Yield the files below a folder, sorted, without hidden ones. Links are followed, each folder is visited once."""
    if folder.resolve() in visited:
        return
    visited.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield from walk(path, visited)
        elif not path.name.startswith("."):
            yield path


def split_of(path):
    """The split after which a file of rows or tokens, or else its folder, is named: a key of SPLITS, or None."""
    for name in (path.stem, path.parent.name):
        words = set(re.split("[^a-z]+", name.lower()))
        for split, names in SPLITS.items():
            if words & names and kind_of(path) != "text":
                return split
    return None


def of_split(paths, held_out):
    """The files without those of the other split, where names tell both (train-0.parquet, test/0.arrow, val.bin)."""
    splits = [split_of(path) for path in paths]
    if not {"train", "held out"} <= set(splits):
        return paths
    other = "train" if held_out else "held out"
    return [path for path, split in zip(paths, splits, strict=True) if split != other]


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
    """Whether a file found in a folder is data: not about other files, not a .json file with one object (settings)."""
    if kind_of(path) not in kinds or not path.is_file() or ABOUT & {path.stem.lower(), path.name.lower()}:
        return False
    if path.suffix.lower() != ".json":
        return True
    with path.open("rb") as file:
        line = file.readline(PIECE).removeprefix(codecs.BOM_UTF8).strip()
    return not (line.startswith(b"{") and line.endswith((b"{", b"[", b",")))  # the object goes on in the next line


def check_named_file(path, kinds):
    """UserError for a file that was named but is of another kind. Unknown suffixes pass as text if they are text."""
    kind, wanted = kind_of(path), suffixes(kinds)
    if kind in kinds:
        return
    if kind == "tokens":
        raise UserError(f"{path}: {path.suffix} holds tokens: set data.format=tokens, or name files of text ({wanted})")
    packed = path.suffix.lower() in (".gz", ".zst")
    suffix = Path(path.stem if packed else path).suffix.lower()
    whole_suffix = suffix + path.suffix.lower() * packed or "files without a suffix"
    if kind is not None or "text" not in kinds or suffix in (".csv", ".tsv") or packed and suffix in KINDS:
        raise UserError(f"{path}: this format of data does not read {whole_suffix}, "
                        f"expected {wanted}: convert it")
    with open_binary(path) as file:
        head = b"".join(readable(path, (file.peek(4096)[:4096] for _ in range(1))))
    if b"\0" in head:
        raise UserError(f"{path} is a binary file of unknown kind, expected {wanted}")
    if re.match(rb"\s*(\{\s*[\"}]|\[\s*[\[{\"])", head.removeprefix(codecs.BOM_UTF8)):
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


def package(name, path):
    """An optional package that a file needs. UserError if it is not installed."""
    try:
        return __import__(name)
    except ImportError as error:
        raise UserError(f"{path} needs {name}, which is not installed: pip install {name}") from error


def bad_byte(path):
    """The position of the first byte that is not UTF-8."""
    position = 0
    file = io.TextIOWrapper(open_binary(path), encoding="utf-8", errors="surrogateescape", newline="")
    while piece := file.read(PIECE):
        valid = re.match("[^\udc80-\udcff]*", piece)[0]
        position += len(valid.encode())
        if len(valid) < len(piece):
            break
    return position


def readable(path, read):
    """The items of a generator that reads a file; UserError where the file is damaged."""
    try:
        yield from read
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {bad_byte(path)}): convert it, or leave it out") from error
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the operating system, not of a decompressor
            raise
        raise UserError(f"{path} is damaged: {error}") from error


# ----------------------------------------------------------------------------------------------------------------
# rows and documents


def rows(files, bar=None):
    """Yield (place, dict) of each row. place is for messages: "x.jsonl, line 7", "x.parquet, row 7".

    bar: a tqdm bar that counts bytes. Raises UserError that names the place of what cannot be read.
    """
    for path in files:
        kind = kind_of(path)
        if kind not in ROWS:
            raise UserError(f"{path} has no rows, expected {suffixes(ROWS)}")
        read = json_values(path, bar) if kind == "json" else table_rows(path, kind, bar)
        for place, row in readable(path, read):
            if not isinstance(row, dict):
                raise UserError(f"{place} is {type_of(row)}, expected an object with named fields")
            yield place, row


def type_of(value):
    """What a JSON value is called in messages."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string",
             list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def json_values(path, bar=None):
    """Yield (place, value) of a file of JSON lines, or of a JSON list, whatever its suffix says."""
    with open_binary(path, bar) as file:
        is_list = file.peek(PIECE).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        text = io.TextIOWrapper(file, encoding="utf-8-sig")
        if is_list:
            content = text.read(LONGEST_LIST + 1)
            if len(content) > LONGEST_LIST:
                raise UserError(f"{path} is a JSON list of more than {LONGEST_LIST:,} characters, which is read whole: "
                                "convert it to JSON lines, as `jq -c .[]` does")
            for number, value in enumerate(parse_json(content, path, 1), 1):
                yield f"{path}, row {number}", value
            return
        for number, line in enumerate(text, 1):
            if line.strip():
                yield f"{path}, line {number}", parse_json(line.strip(), path, number)


def parse_json(text, path, line):
    """The value of a JSON text that begins in this line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {line + error.lineno - 1} is not JSON: {error.msg} (expected one object per "
                        "line, or a list of objects)") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise UserError(f"{path}, line {line} cannot be read as JSON: {error}") from error


def table_rows(path, kind, bar=None):
    """Yield (place, dict) of a Parquet or an Arrow file; memory holds one batch of rows at a time."""
    package("pyarrow", path)
    import pyarrow.parquet

    number = 0
    try:
        with open_binary(path, bar) as file:
            if kind == "parquet":
                batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256)
            elif file.peek(6).startswith(b"ARROW1"):
                reader = pyarrow.ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:  # a stream, as save_to_disk writes it
                batches = pyarrow.ipc.open_stream(file)
            for batch in batches:
                for start in range(0, batch.num_rows, 256):
                    for row in batch.slice(start, 256).to_pylist():
                        number += 1
                        yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: dates beyond 9999
        raise UserError(f"{path}, after row {number}: pyarrow cannot read it as {kind}: {error}") from error


def documents(files, text_key, bar=None):
    """Yield the text of each document in pieces, as an iterable of str: a file of text, or a row's field `text_key`.

    Use up each before taking the next. Raises UserError that names what cannot be read.
    """
    for path in files:
        if kind_of(path) not in ROWS:
            with io.TextIOWrapper(open_binary(path, bar), encoding="utf-8-sig") as file:  # editors may write a mark
                yield readable(path, iter(lambda: file.read(PIECE), ""))  # noqa: B023
            continue
        for place, row in rows([path], bar):
            if text_key not in row:
                hint = ": conversations and instructions need data.format=chat" if CHAT_FIELDS & set(row) else ""
                raise UserError(f"{place} has no {text_key!r} (data.text_key): it has "
                                + (", ".join(row) or "no fields") + hint)
            if not isinstance(row[text_key], str):
                raise UserError(f"{place}: `{text_key}` is {type_of(row[text_key])}, expected a string")
            yield [row[text_key]]
