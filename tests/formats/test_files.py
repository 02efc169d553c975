"""formats/files.py: files of every kind are read alike, and what is not read is named."""

import gzip
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data import DataConfig
from formats import files
from plumbing.errors import UserError

ROWS = [{"text": f"document {i}, ünïcode", "n": i} for i in range(700)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
LIST = json.dumps(ROWS, indent=1).encode()


def zstd(content):
    return pyarrow.compress(content, "zstd", asbytes=True)


def read(path):
    return [row for _, row in files.rows([path])]


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", LINES), ("a.ndjson", LINES), ("a.json", LIST), ("lines.json", LINES), ("list.jsonl", LIST),
    ("a.jsonl.gz", gzip.compress(LINES)), ("a.json.gz", gzip.compress(LIST)), ("A.JSONL.GZ", gzip.compress(LINES)),
    ("a.json.zst", zstd(LIST)), ("empty.json", b"[]"), ("mark.json", b"\xef\xbb\xbf" + LIST),
    ("two_frames.jsonl.zst", zstd(LINES[:5000]) + zstd(LINES[5000:]))])
def test_json_is_read_whatever_its_form(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == ([] if name == "empty.json" else ROWS)


def test_places_are_lines_or_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + LINES)
    (tmp_path / "b.json").write_bytes(LIST)
    lines, rows = ([place for place, _ in files.rows([tmp_path / name])] for name in ("a.jsonl", "b.json"))
    assert lines == [f"{tmp_path / 'a.jsonl'}, line {i + 2}" for i in range(len(ROWS))]
    assert rows == [f"{tmp_path / 'b.json'}, row {i + 1}" for i in range(len(ROWS))]


def test_parquet_and_both_forms_of_arrow_are_read(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    for name, new in (("stream.arrow", pyarrow.ipc.new_stream), ("file.arrow", pyarrow.ipc.new_file)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        places, rows = zip(*files.rows([tmp_path / name]), strict=True)
        assert list(rows) == ROWS and places == tuple(f"{tmp_path / name}, row {i}" for i in range(1, 701))


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl.gz", gzip.compress(LINES)[:200], "a.jsonl.gz is damaged"),
    ("a.jsonl.zst", zstd(LINES)[:-20], "a.jsonl.zst is damaged: Truncated"),
    ("a.jsonl.zst", b"no zstandard", "a.jsonl.zst is damaged"),
    ("a.json", b'[{"n": 1},\n {"n": 2}\n {"n": 3}]', "a.json, line 3 is not JSON: Expecting ',' delimiter"),
    ("a.json", b'[{"n": 1},\n{"n": 2', "a.json, line 2 is not JSON"),
    ("a.json", b"[3]", "row 1 is a number, expected an object"),
    ("a.jsonl", b'{"n": 1}\n\n"x"', "line 3 is a string, expected an object"),
    ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}', "line 2 is not JSON: 'utf-8' codec can't decode byte 0xff"),
    ("a.parquet", b"PAR1" + bytes(99) + b"PAR1", "a.parquet, after row 0: pyarrow cannot read it"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:37f0\n", "is a Git LFS pointer"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:37f0\n", "is a Git LFS pointer"),
    ("a.txt", b"text", "a.txt has no rows, expected .jsonl")])
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.txt.zst"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"some bytes")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow, which is not installed: pip install pyarrow"):
        for pieces in files.documents([tmp_path / name], "text"):
            list(pieces)


def test_long_text_comes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 10)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("äöü\r\n".encode() * 30))
    (pieces,) = map(list, files.documents([tmp_path / "a.txt.gz"], "text"))
    assert len(pieces) > 10 and "".join(pieces) == "äöü\n" * 30


def test_a_byte_that_is_not_utf8_is_found_behind_the_first_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 7)
    (tmp_path / "a.txt").write_bytes("ä".encode() * 50 + b"\xff")
    with pytest.raises(UserError, match="a.txt is not UTF-8 text"):
        [list(pieces) for pieces in files.documents([tmp_path / "a.txt"], "text")]


# ----------------------------------------------------------------------------------------------------------------
# finding files


def make(folder, *names, content=b"text"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def found(folder, *patterns, kinds=files.TEXT):
    used, unused = files.find_files([str(folder / p) for p in patterns], kinds)
    return [str(p.relative_to(folder)) for p in used], [str(p.relative_to(folder)) for p in unused]


def test_a_hub_snapshot_and_a_saved_dataset_train_on_their_data(tmp_path):
    make(tmp_path, "hub/README.md", "hub/LICENSE", "hub/data/train-0.parquet", "hub/.gitattributes", "hub/.cache/x.txt")
    make(tmp_path, "saved/train/data-0.arrow")
    make(tmp_path, "saved/train/state.json", "saved/dataset_dict.json", content=b'{"splits": ["train"]}')
    assert found(tmp_path, "hub") == (["hub/data/train-0.parquet"], ["hub/LICENSE", "hub/README.md"])
    assert found(tmp_path, "saved") == (["saved/train/data-0.arrow"],
                                        ["saved/dataset_dict.json", "saved/train/state.json"])


def test_of_a_folder_in_splits_training_takes_the_train_split_and_validation_the_others(tmp_path):
    make(tmp_path, "hub/train-00000-of-00002.parquet", "hub/test-0.parquet", "hub/validation-0.parquet", "hub/x.jsonl")
    make(tmp_path, "saved/train/data-0.arrow", "saved/test/data-0.arrow", "bins/a_train_0.bin", "bins/a_val_0.bin")
    make(tmp_path, "code/train.py", "code/test/a.py", "test/a.jsonl", "test/b.jsonl")
    assert found(tmp_path, "hub") == (["hub/train-00000-of-00002.parquet", "hub/x.jsonl"],
                                      ["hub/test-0.parquet", "hub/validation-0.parquet"])
    assert found(tmp_path, "saved") == (["saved/train/data-0.arrow"], ["saved/test/data-0.arrow"])
    assert found(tmp_path, "bins", kinds={"tokens"}) == (["bins/a_train_0.bin"], ["bins/a_val_0.bin"])
    assert found(tmp_path, "code")[0] == ["code/test/a.py", "code/train.py"]  # text is not divided
    assert found(tmp_path, "test")[0] == ["test/a.jsonl", "test/b.jsonl"]
    assert found(tmp_path, "hub/*.parquet")[1] == []  # named one by one
    cfg = DataConfig(train=[str(tmp_path / "saved")], val=[str(tmp_path / "saved")])
    resolved = files.resolve(cfg, files.TEXT)
    assert ([p.parent.name for p in resolved.train], [p.parent.name for p in resolved.val]) == (["train"], ["test"])
    assert resolved.unused == [] and resolved.source == f"1 file of {tmp_path / 'saved'}"


def test_what_a_folder_holds_besides_is_named(tmp_path):
    make(tmp_path, "mixed/a.txt", "mixed/c.csv", "mixed/d.bin", "mixed/e", "mixed/state.of.the.art.txt")
    make(tmp_path, "mixed/b.json", content=LINES)
    make(tmp_path, "mixed/package.json", content=b'{\n  "name": "settings"\n}\n')
    os.symlink("nowhere", tmp_path / "mixed" / "broken.txt")
    used, unused = found(tmp_path, "mixed")
    assert used == ["mixed/a.txt", "mixed/b.json", "mixed/state.of.the.art.txt"]
    assert unused == ["mixed/broken.txt", "mixed/c.csv", "mixed/d.bin", "mixed/e", "mixed/package.json"]
    assert found(tmp_path, "mixed", kinds=files.ROWS)[0] == ["mixed/b.json"]
    assert found(tmp_path, "mixed/*")[0] == used
    assert files.describe_unused([tmp_path / name for name in unused]) == (
        ", 5 files not used (broken.txt, c.csv, d.bin, e, ...)")


def test_links_are_followed_once(tmp_path):
    make(tmp_path, "big/wiki/w.txt", "links/own.txt")
    os.symlink("../big/wiki", tmp_path / "links" / "wiki")
    os.symlink("..", tmp_path / "big" / "wiki" / "up")
    os.symlink("../big/wiki/w.txt", tmp_path / "links" / "again.txt")
    assert found(tmp_path, "links") == (["links/again.txt", "links/own.txt"], [])  # wiki/w.txt is again.txt
    assert found(tmp_path, "links/wiki") == (["links/wiki/w.txt"], [])


def test_a_damaged_arrow_file_is_an_error_and_no_text_from_elsewhere_in_memory(tmp_path):
    offsets = np.arange(0, 27, 3, "<i4")
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file:
        table = pyarrow.table({"text": ["abc"] * 8})
        with pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    content = (tmp_path / "a.arrow").read_bytes()
    assert content.count(offsets.tobytes()) == 1
    offsets[4] = 5  # less than the one before; a large one ends the process
    (tmp_path / "a.arrow").write_bytes(content.replace(np.arange(0, 27, 3, "<i4").tobytes(), offsets.tobytes()))
    with pytest.raises(UserError, match="a.arrow, after row 0: pyarrow cannot read it: In column 0: Invalid"):
        read(tmp_path / "a.arrow")


def test_a_link_that_leads_nowhere_is_named_among_what_is_not_used(tmp_path):
    make(tmp_path, "a/x.txt")
    os.symlink("self.txt", tmp_path / "a" / "self.txt")
    os.symlink("nowhere", tmp_path / "a" / "gone.txt")
    assert found(tmp_path, "a") == (["a/x.txt"], ["a/gone.txt", "a/self.txt"])


def test_a_tilde_begins_the_name_of_a_file_too(tmp_path, monkeypatch):
    make(tmp_path, "~draft.txt")
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in files.find_files(["~draft.txt"])[0]] == ["~draft.txt"]
    with pytest.raises(UserError, match="'~nobody_here/x.txt' matches no file"):
        files.find_files(["~nobody_here/x.txt"])


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    make(tmp_path, "a/x.txt", "a/b/y.txt")
    iterdir = type(tmp_path).iterdir

    def refuse(path):
        if path.name in ("b", "lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)  # root may read all
    with pytest.raises(PermissionError, match="a/b"):
        files.find_files([str(tmp_path / "a")])
    (tmp_path / "a/b").rename(tmp_path / "a/lost+found")  # which is nobody's data
    assert found(tmp_path, "a") == (["a/x.txt"], [])


NOT_READ = "a[.][a-z]+.* is of a kind that this data.format does not read, expected .txt"


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", b"a,b\n1,2\n", NOT_READ), ("a.bin", b"\1\0", NOT_READ),
    ("a.data", b'{"text": "x"}\n', "holds JSON but is not named so"), ("a", b'[\n {"text": "x"}]', "holds JSON"),
    ("a.csv.gz", b"1,2", NOT_READ), ("a.parquet.gz", b"PAR1", NOT_READ),
    ("a.log", b'["first text", "second"]', "holds JSON"), ("a.notes.gz", b"not compressed", "is damaged"),
    ("a.xyz", b"\0\1\2", "is a binary file"), ("a.jsonl.bz2", b"BZh9\0", NOT_READ)])
def test_a_named_file_that_cannot_be_used_is_an_error(tmp_path, name, content, message):
    make(tmp_path, name, content=content)
    for pattern in (name, f"*{os.path.splitext(name)[1]}" if "." in name else name):
        with pytest.raises(UserError, match=message):
            found(tmp_path, pattern)


def test_named_text_with_another_suffix_is_text(tmp_path):
    make(tmp_path, "corpus.en", "corpus", "README.md", content=b"{{Infobox}} [[File:x]] some text")
    assert found(tmp_path, "corpus.en", "corpus", "README.md")[0] == ["corpus.en", "corpus", "README.md"]


@pytest.mark.parametrize("entry", ["", " "])
def test_an_empty_entry_is_an_error(entry):
    with pytest.raises(UserError, match="is an empty entry"):
        files.find_files([entry])


def test_a_folder_without_data_names_what_it_holds(tmp_path):
    make(tmp_path, "d/README.md", "d/train.csv")
    with pytest.raises(UserError, match="matches no file that can be used .*2 files not used .README.md, train.csv."):
        found(tmp_path, "d")
