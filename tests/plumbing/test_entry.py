"""entry.py: messages and exit statuses at the end of a script."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import weakref

import pytest
import torch.distributed as dist
from conftest import REPO, main_here, run
from torch.distributed.checkpoint.api import CheckpointException

import checkpoint
import eval
import sample
from configurator import load
from plumbing import entry
from plumbing.errors import RunStopped, UserError


def test_a_users_mistake_is_one_message_and_exit_status_2(tmp_path):
    (tmp_path / "script.py").write_text(f"""
import sys
sys.path.insert(0, {str(REPO)!r})
import configurator
from plumbing import entry
from plumbing.errors import RunStopped
entry.run(lambda: configurator.load(sys.argv[1:]))
""")
    env = {k: v for k, v in os.environ.items() if k != "RANK"}
    done = subprocess.run([sys.executable, "script.py", "--max_steps=x", "--sede=1"], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["script.py: --max_steps=x: expected int >= 1",
                                        "--sede=1: unknown key, did you mean --seed? See --help"]


@pytest.mark.parametrize("main, argv", [
    (sample.main, ["--from="]), (sample.main, ["--from=x", "--tokenizer="]), (eval.main, ["--from="]),
    *((eval.main, ["--from=x", f"--{key}="]) for key in ("data", "out", "tokenizer")),
    (checkpoint.main, ["export", "", "new"]), (checkpoint.main, ["export", "x", ""])])
def test_an_empty_path_is_refused(main, argv):
    status, _, err = main_here(main, *argv)
    assert status == 2 and "invalid path value: ''" in err and err.count("\n") == 1


def test_a_value_error_from_within_a_library_is_a_bug():
    with pytest.raises(json.JSONDecodeError):  # passes through: Python prints a traceback and exits with 1
        entry.run(lambda: json.loads("{"))


def test_a_value_error_of_a_library_in_the_middle_of_training_is_a_traceback_and_exit_status_1(tiny_run, tmp_path):
    (tmp_path / "script.py").write_text(f"""
import sys
sys.path.insert(0, {str(REPO)!r})
import numpy
import train
from plumbing import entry
step = train.AdamW.step
def fails(optimizer, *args):
    step(optimizer, *args)
    if optimizer.step_count == 2:
        numpy.zeros(2) + numpy.zeros(3)
train.AdamW.step = fails
entry.run(train.main)
""")
    done = run(tmp_path / "script.py", *tiny_run, f"--out_dir={tmp_path / 'out'}", check=False)
    assert done.returncode == 1 and "step 1/6" in done.stdout
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert done.stderr.splitlines()[-1].startswith("ValueError: operands could not be broadcast together")


def test_a_run_that_must_not_go_on_is_one_message_and_exit_status_1(monkeypatch, capsys):
    def fail(kind):
        def main():
            raise kind("the loss is nan")
        return main

    monkeypatch.setattr(sys, "argv", ["/some/train.py"])
    with pytest.raises(RuntimeError, match="the loss is nan"):  # a library's
        entry.run(fail(RuntimeError))
    with pytest.raises(SystemExit) as done:
        entry.run(fail(RunStopped))
    assert (done.value.code, capsys.readouterr().err) == (1, "train.py: the loss is nan\n")


def test_a_path_that_the_system_refuses_is_the_users_mistake(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as done:
        entry.run(lambda: (tmp_path / "file" / "folder").mkdir())
    assert done.value.code == 2 and "Traceback" not in (message := capsys.readouterr().err)
    assert message.startswith(f"train.py: {tmp_path / 'file' / 'folder'}: Not a directory: name another path")
    with pytest.raises(FileNotFoundError):  # what we thought to be there: a bug
        entry.run(lambda: (tmp_path / "nothing").read_text())


@pytest.mark.parametrize("error, message", [
    (OSError(errno.ENOSPC, "No space left on device"), "train.py: the disk: No space left on device: name another"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), "train.py: /x: Permission denied: name another"),
    (CheckpointException("save", {1: (OSError(errno.ENOSPC, "No space left on device"), None)}), "train.py: the disk:"),
    (FileExistsError(errno.EEXIST, "File exists", "/x"), "train.py: /x: File exists: name another"),
    (PermissionError(errno.EACCES, "Permission denied"), None), (OSError(errno.EIO, "I/O", "/x"), None)])
def test_a_full_disk_is_reported_and_what_is_not_about_a_path_is_a_bug(error, message, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit if message else type(error)) as done:
        entry.run(main)
    assert not message or done.value.code == 2 and capsys.readouterr().err.startswith(message)


def test_a_checkpoint_that_a_run_removes_while_it_is_read_is_no_bug(tmp_path, monkeypatch, capsys):
    """sample.py beside a run that saves, and keeps the newest checkpoints only."""
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    gone = tmp_path / "checkpoints" / "step_00000002" / "__0_0.distcp"
    with pytest.raises(SystemExit) as done:
        entry.run(gone.read_bytes)
    assert done.value.code == 1 and capsys.readouterr().err.startswith(f"sample.py: {gone} is gone, a run that goes on")


def test_characters_that_an_encoding_lacks_are_replaced(monkeypatch):
    """A file name that is not UTF-8, an answer on a terminal of Latin-1: neither ends a run."""
    typed, shown = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"), io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdin", typed)
    monkeypatch.setattr(sys, "stdout", shown)
    entry.run(lambda: print(input(), "caf\xe9, \u4e2d, \udce9", flush=True))
    assert shown.buffer.getvalue() == b"caf? caf\xe9, ?, ?\n"


@pytest.mark.parametrize("first, error, status, printed", [
    (True, TypeError("a bug"), None, ""), (False, TypeError("a bug"), 1, ""),
    (False, CheckpointException("save", {0: (OSError(5, "I/O"), None)}), 1, ""), (False, UserError("no"), 2, ""),
    (True, UserError("no"), 2, "train.py: no\n"),
    (True, RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection reset"), 1, "train.py: lost the connection to")])
def test_the_first_rank_that_fails_prints_and_the_others_wait_to_be_ended(first, error, status, printed, monkeypatch,
                                                                          capsys):
    def main():
        raise error

    waited = []
    monkeypatch.setattr(sys, "argv", ["/some/train.py"])
    monkeypatch.setattr(entry, "fails_first", lambda: first)
    monkeypatch.setattr(entry.time, "sleep", waited.append)
    with pytest.raises(type(error) if status is None else SystemExit) as done:
        entry.run(main)
    assert waited == ([] if first else [10]) and getattr(done.value, "code", None) == status
    err = capsys.readouterr().err
    assert err.startswith(printed) and bool(err) == bool(printed)


def test_on_several_nodes_a_message_names_rank_and_host(monkeypatch, capsys):
    for name, value in {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    monkeypatch.setattr(sys, "argv", ["/some/train.py"])
    with pytest.raises(SystemExit):
        entry.run(lambda: load(["--max_steps=x"]))
    assert capsys.readouterr().err == "train.py: rank 9 on node7: --max_steps=x: expected int >= 1\n"


def test_main_may_return_an_exit_status():
    with pytest.raises(SystemExit) as done:
        entry.run(lambda: 130)
    assert done.value.code == 130


def test_arguments_of_scripts_without_a_config_are_reported_in_one_line():
    done = subprocess.run([sys.executable, "sample.py", "--from=x", "--top_k=y"], cwd=REPO, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sample.py: argument --top_k: invalid int value: 'y', see --help\n"


def test_ranks_that_miss_rank_0_do_not_talk_over_it(tiny_run, tmp_path):
    done = run("train.py", *tiny_run, "--data.train=['/nope']", f"--out_dir={tmp_path / 'out'}", ranks=2, check=False)
    assert done.stderr.count("data: '/nope' matches no file") == 1
    assert "[rank1]" not in done.stderr and "entry.py" not in done.stderr  # torchrun adds a report of its own


def test_help_and_the_resolved_config_come_once():
    done = run("train.py", "config/llama_fp8.py", "--print_config", ranks=2)
    assert done.stdout.count("config = Config(") == 1


@pytest.mark.parametrize("in_a_checkpoint", [False, True])
def test_an_interrupt_ends_quietly_within_a_checkpoint_too(monkeypatch, capsys, in_a_checkpoint):
    def main():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            if in_a_checkpoint:
                raise CheckpointException("load", {1: (error, None)}) from error
            raise

    signal.signal(signal.SIGINT, signal.default_int_handler)  # after an error in an earlier test it ends the process
    monkeypatch.setattr(sys, "argv", ["/some/train.py"])
    with pytest.raises(SystemExit) as done:
        entry.run(main)
    assert (done.value.code, capsys.readouterr().err) == (130, "train.py: interrupted\n")


def test_a_process_group_is_destroyed_at_the_end_and_left_alone_after_an_error(tmp_path):
    def main(error=None):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / str(error)}", rank=0, world_size=1)
        if error:
            raise error

    class Holds:
        pass

    def held():
        main()
        holder = Holds()
        holder.itself, holder.group = holder, dist.group.WORLD
        return weakref.ref(holder)

    refs = []
    entry.run(lambda: refs.append(held()))
    assert not dist.is_initialized() and refs[0]() is None  # no group lives on in garbage
    with pytest.raises(RuntimeError):
        entry.run(lambda: main(RuntimeError("lost")))
    assert dist.is_initialized()
    dist.destroy_process_group()
