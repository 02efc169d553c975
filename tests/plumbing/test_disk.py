"""disk.py: files and folders are complete or not there."""

import pytest

from plumbing.disk import replace_text, replacing


def test_a_folder_that_could_not_be_filled_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), replacing(tmp_path / "new") as temporary:
        temporary.mkdir()
        (temporary / "half").touch()
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_folder_replaces_an_empty_one_and_no_other(tmp_path):
    (tmp_path / "empty").mkdir()
    with replacing(tmp_path / "empty") as temporary:
        temporary.mkdir()
        (temporary / "file").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["empty", "file"]
    with pytest.raises(OSError), replacing(tmp_path / "empty") as temporary:
        temporary.mkdir()
    assert [p.name for p in tmp_path.rglob("*")] == ["empty", "file"]


def test_a_text_is_replaced_as_a_whole_or_stays(tmp_path):
    path = tmp_path / "folder" / "text"
    replace_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "new and then \ud800")
    assert path.read_text() == "old" and len(list(path.parent.iterdir())) == 1
