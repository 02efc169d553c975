"""disk.py: files and folders are complete or not there."""

import errno
import os
import socket
import subprocess
import sys

import pytest
from conftest import REPO

from plumbing.disk import replace_text, replacing, writing


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


@pytest.mark.parametrize("raised, cause, number", [
    (OSError(errno.ENOSPC, "no space"), None, errno.ENOSPC),
    (RuntimeError("a part could not be written"), OSError(errno.EDQUOT, "quota"), errno.EDQUOT),
    (KeyError("no disk"), None, None)])
def test_a_full_disk_is_found_behind_other_exceptions_and_others_stay(tmp_path, raised, cause, number):
    raised.__context__ = cause
    with pytest.raises(type(raised) if number is None else OSError) as error, writing(tmp_path):
        raise raised
    if number is None:
        assert error.value is raised
    else:
        assert (error.value.errno, error.value.filename) == (number, str(tmp_path))


def test_a_text_is_replaced_as_a_whole_or_stays(tmp_path):
    path = tmp_path / "folder" / "text"
    replace_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "new and then \ud800")
    assert path.read_text() == "old" and len(list(path.parent.iterdir())) == 1


def test_a_text_is_utf_8_whatever_the_locale(tmp_path, monkeypatch):
    def write(path, text, encoding="ascii"):  # as under LC_ALL=C
        path.write_bytes(text.encode(encoding))

    monkeypatch.setattr(type(tmp_path), "write_text", write)
    replace_text(tmp_path / "config.py", "train=['\u4e2d.txt']")
    assert (tmp_path / "config.py").read_text(encoding="utf-8") == "train=['\u4e2d.txt']"


CHECK = f"""
import os, socket, sys
sys.path.insert(0, {str(REPO)!r})
from pathlib import Path
from plumbing import disk, entry, ranks
ranks.join_process_group(ranks.find_ranks("cpu"))
socket.gethostname = lambda: f"node-{{os.environ['GROUP_RANK']}}"
for folder in sys.argv[1:]:
    try:
        disk.check_shared(Path(folder))
        print("one folder")
    except disk.UserError as error:
        print(error)
entry.leave()  # else gloo's threads sometimes abort the process at its end
"""


def test_two_nodes_without_a_common_folder_are_told_so_with_their_names(tmp_path):
    """Two launchers with a rank each, as on two machines."""
    script = tmp_path / "check.py"
    script.write_text(CHECK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
              "--master-addr=127.0.0.1", f"--master-port={port}"]
    folders = [(tmp_path / f"disk_{node}", tmp_path / "common") for node in (0, 1)]
    nodes = [subprocess.Popen([*launch, f"--node-rank={node}", script, *folders[node]], stdout=subprocess.PIPE,
                              text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) for node in (0, 1)]
    told = [node.communicate()[0].splitlines() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    for (own, _), (refused, accepted) in zip(folders, told, strict=True):
        assert refused.startswith(f"out_dir={own} must be one folder for all nodes") and accepted == "one folder"
        assert "what node-0 writes to" in refused and "not seen on node-1. Name" in refused
    assert not list(tmp_path.glob("*/.seen*"))
