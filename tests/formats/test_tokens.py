"""formats/tokens.py: token files of nanoGPT, llm.c and numpy are read as their writers mean them, and not copied."""

import time

import numpy as np
import pytest

import data
from data import DataConfig
from formats import tokens as token_files
from plumbing.errors import UserError

IDS = np.concatenate([np.append(np.arange(1, n + 1), 99) for n in (5, 3, 30, 1, 12, 7) * 5])  # 99 ends a document


def llm_c(ids, magic=20240520, version=1, dtype="<u2", n=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if n is None else n
    return header.tobytes() + ids.astype(dtype).tobytes()


def prepare(tmp_path, *names, **keys):
    cfg = DataConfig(format="tokens", train=[str(tmp_path / n) for n in names], cache_dir=str(tmp_path / "cache"),
                     tokenizer="bytes", **keys)
    return data.prepare(cfg, 16, 0)


def everything(rows):
    return rows.slice(0, len(rows))


@pytest.mark.parametrize("name, write", [
    ("nanogpt.bin", lambda path: path.write_bytes(IDS.astype("<u2").tobytes())),
    ("llm_c.bin", lambda path: path.write_bytes(llm_c(IDS))),
    ("llama3.bin", lambda path: path.write_bytes(llm_c(IDS, 20240801, 7, "<u4"))),
    ("a.npy", lambda path: np.save(path, IDS.astype(np.int32)))])
def test_each_kind_of_file_gives_its_ids_and_is_not_copied(tmp_path, name, write):
    write(tmp_path / name)
    train, val, _ = prepare(tmp_path, name)
    assert np.array_equal(np.append(everything(train), everything(val)), IDS)
    assert len(val) == len(IDS) // 20 and all(isinstance(array, np.memmap) for array in train.arrays)
    assert train.largest == 99 and train.row(0)[2] is None and train.document is None
    assert train.counts["tokens"] == len(train)


def test_several_files_are_one_stream_and_named_validation_files_are_not_trained_on(tmp_path):
    for i, part in enumerate(np.array_split(IDS, 4)):
        (tmp_path / f"{i}.bin").write_bytes(part.astype("<u2").tobytes())
    (tmp_path / "README.md").write_text("about")
    train, val, _ = prepare(tmp_path, "", val=[str(tmp_path / "3.bin")])
    assert np.array_equal(np.append(everything(train), everything(val)), IDS)
    assert "1 file not used (README.md)" in train.description and train.counts["files not used"] == 1


def reference_positions(x, first):
    """Position within the document, id by id."""
    positions, at = [], 0
    for i, token in enumerate(x):
        if i and (token == 99 if first else x[i - 1] == 99):
            at = 0
        positions.append(at)
        at += 1
    return positions


@pytest.mark.parametrize("first", [False, True])
def test_attention_stays_within_documents(tmp_path, first):
    ids = IDS[:311]  # the last row is not full
    (tmp_path / "a.bin").write_bytes(llm_c(ids) if first else ids.astype("<u2").tobytes())
    train, _, _ = prepare(tmp_path, "a.bin", eos_id=99)
    lengths, most = [], 0
    for i in range(train.n_rows):
        x, y, positions = train.row(i)
        n = int((y >= 0).sum())
        assert positions[:n].tolist() == reference_positions(x[:n], first)
        begins = np.append(np.flatnonzero(positions == 0), 16)
        lengths += np.diff(begins).tolist()
        most = max(most, len(begins) - 1)
    assert (train.longest, train.most_documents) == (max(lengths), most)
    document = np.square(lengths).sum() / np.sum(lengths)
    assert train.document == pytest.approx(document)
    assert f", ids up to 99, documents of {document:.0f} tokens (mean over tokens" in train.description


def test_samples_are_the_windows_and_every_id_but_the_first_is_a_target_once(tmp_path):
    (tmp_path / "a.bin").write_bytes(IDS.astype("<u2").tobytes())
    train, _, _ = prepare(tmp_path, "a.bin")
    targets = np.concatenate([ids[loss] for ids, loss in map(train.sample, range(train.n_samples))])
    assert np.array_equal(targets, everything(train)[1:]) and len(targets) == train.counts["targets"]


def test_ids_are_read_once(tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(IDS.astype("<u2").tobytes())
    first = prepare(tmp_path, "a.bin", eos_id=99)[0]

    def read_again(*args):
        raise RuntimeError

    monkeypatch.setattr(token_files.np, "ascontiguousarray", read_again)
    monkeypatch.setattr(token_files.Tokens, "measure_documents", read_again)
    again = prepare(tmp_path, "a.bin", eos_id=99)[0]
    assert (again.digest, again.document, again.largest) == (first.digest, first.document, first.largest)
    time.sleep(0.02)  # the same size: the time of change is what tells
    (tmp_path / "a.bin").write_bytes(IDS[::-1].astype("<u2").tobytes())
    with pytest.raises(RuntimeError):
        prepare(tmp_path, "a.bin", eos_id=99)


@pytest.mark.parametrize("name, content, message", [
    ("a.bin", llm_c(IDS, n=7), "has .* bytes, its header says 7 ids of 2 bytes"),
    ("a.bin", b"abc", "has 3 bytes: not uint16"),
    ("a.bin", b"PK\x03\x04" + bytes(2000), "is an archive"),
    ("a.bin", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ("a.bin", b"\1\0", "1 tokens for training and 0 for validation are too few"),
    ("a.npy", b"x" * 100, "not a .npy file"), ("a.npy", b"", "not a .npy file"),
    ("a.txt", b"text", "does not read, expected .bin, .npy")])
def test_files_that_hold_no_ids_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, name)


def test_arrays_that_are_no_list_of_ids_are_named(tmp_path):
    for array, message in ((np.zeros((3, 4), int), "of shape"), (np.ones(40), "float64"),
                           (np.arange(40) - 1, "a.npy holds negative numbers")):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(UserError, match=message):
            prepare(tmp_path, "a.npy")


def test_files_of_llm_c_and_others_are_not_mixed_where_their_borders_differ(tmp_path):
    (tmp_path / "a.bin").write_bytes(IDS.astype("<u2").tobytes())
    (tmp_path / "b.bin").write_bytes(llm_c(IDS))
    with pytest.raises(UserError, match="mixes files of llm.c"):
        prepare(tmp_path, "", eos_id=99)
    assert len(prepare(tmp_path, "")[0])


def test_a_tokenizer_that_lacks_the_ids_is_named(tmp_path):
    (tmp_path / "a.bin").write_bytes((IDS + 1000).astype("<u2").tobytes())
    assert "tokenizer bytes has no ids above 256" in prepare(tmp_path, "a.bin")[0].description


@pytest.mark.parametrize("first", [False, True])
def test_an_eos_around_a_single_document_is_found(tmp_path, first):
    ids = np.roll(np.append(np.arange(1, 40), 99), first)
    (tmp_path / "a.bin").write_bytes(llm_c(ids) if first else ids.astype("<u2").tobytes())
    (tmp_path / "val.bin").write_bytes((tmp_path / "a.bin").read_bytes())
    train, _, _ = prepare(tmp_path, "a.bin", val=[str(tmp_path / "val.bin")], eos_id=99)
    assert np.array_equal(everything(train), ids) and train.longest == 16


def test_an_eos_that_is_nowhere_is_an_error(tmp_path):
    (tmp_path / "a.bin").write_bytes(IDS.astype("<u2").tobytes())
    with pytest.raises(UserError, match="data.eos_id=60000 is nowhere in data.train"):
        prepare(tmp_path, "a.bin", eos_id=60000)
    (tmp_path / "a.bin").write_bytes(np.append(IDS, np.ones(len(IDS))).astype("<u2").tobytes())
    assert prepare(tmp_path, "a.bin", eos_id=99)[1].longest == 16  # the end of the last document is for validation
