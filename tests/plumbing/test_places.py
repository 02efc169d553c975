"""Places without git, a compiler, locks, room on the disk or a home, and folders that are no place for a run."""

import errno
import json
import os
import resource
import runpy
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
from conftest import REPO, main_here, metrics, train_here

import checkpoint
import train
from plumbing import logs
from plumbing.compiling import check_compiler
from plumbing.errors import UserError


@pytest.fixture
def empty_path(tmp_path, monkeypatch):
    """A PATH with no program on it, and no compiler in the environment."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "bin"


def one_line(result):
    """The message of a command that ended with exit status 2 and one line on stderr."""
    status, _, err = result
    assert status == 2 and err.count("\n") == 1, err
    return err


def test_without_git_a_run_says_that_it_names_no_commit(tiny_run, empty_path, tmp_path, capsys):
    train_here(*tiny_run, f"--out_dir={tmp_path / 'run'}", "--max_steps=1")
    assert "run.json names no commit: git is not installed" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["git_commit"] is None


def test_the_commit_of_a_repository_around_this_code_is_not_the_codes(tmp_path):
    def git(*args):
        name = ["-c", "user.name=n", "-c", "user.email=e"]
        done = subprocess.run(["git", *name, *args], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    code = tmp_path / "vendored" / "plumbing" / "logs.py"
    code.parent.mkdir(parents=True)
    shutil.copy(logs.__file__, code)
    commit = runpy.run_path(str(code))["git_commit"]
    (tmp_path / "other.txt").write_text("1")
    git("init")
    git("add", "other.txt")
    git("commit", "-m", "other")
    assert commit() is None
    git("add", "vendored")
    git("commit", "-m", "vendored")
    (tmp_path / "other.txt").write_text("2")
    assert commit() == git("rev-parse", "HEAD")
    (tmp_path / "vendored" / "model.py").write_text("")
    assert commit() == git("rev-parse", "HEAD") + "+changes"


def test_compile_without_a_compiler_is_one_line(tiny_run, empty_path, tmp_path):
    result = main_here(train.main, *tiny_run, f"--out_dir={tmp_path / 'run'}", "--compile.enabled=True")
    assert "needs a compiler (g++ on the PATH): provide it" in one_line(result)


def test_the_compiler_of_a_gpu_is_one_for_c(empty_path):
    with pytest.raises(UserError, match="gcc or clang on the PATH"):
        check_compiler(torch.device("cuda"))
    (empty_path / "clang").touch(mode=0o755)
    check_compiler(torch.device("cuda"))
    with pytest.raises(UserError, match=r"g\+\+ on the PATH"):
        check_compiler(torch.device("cpu"))


def test_compile_without_the_headers_of_python_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="Python's headers .* python3-dev"):
        check_compiler(torch.device("cpu"))


def test_a_cache_of_compiled_code_that_cannot_be_written_is_one_line(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    result = main_here(train.main, *tiny_run, f"--out_dir={tmp_path / 'run'}", "--compile.enabled=True")
    assert "file/cache: Not a directory: name another path" in one_line(result)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(tmp_path))  # root may write anywhere
    with pytest.raises(UserError, match="a folder to write to .*TORCHINDUCTOR_CACHE_DIR"):
        check_compiler(torch.device("cpu"))


@pytest.mark.parametrize("flag, message", [
    ("--out_dir=", "out_dir is empty"), ("--data.cache_dir=", "data.cache_dir is empty"),
    ("--out_dir=.", "is a folder of the code"), (f"--out_dir={REPO}/docs/..", "is a folder of the code"),
    ("--out_dir=config", "is a folder of the code"), ("--out_dir=config/run", "is a folder of the code")])
def test_an_out_dir_that_would_hide_the_code_is_refused(tiny_run, monkeypatch, flag, message):
    monkeypatch.chdir(REPO)
    assert message in one_line(main_here(train.main, *tiny_run, flag))


def test_an_out_dir_that_is_a_model_folder_is_refused(tiny_run, tmp_path):
    """sample.py --from=out_dir would take the folder's weights for those of the run."""
    (tmp_path / "config.json").write_text("{}")
    assert "is a model folder: name another" in one_line(main_here(train.main, *tiny_run, f"--out_dir={tmp_path}"))


def test_where_files_cannot_be_locked_a_run_says_so_and_goes_on(tiny_run, tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    train_here(*tiny_run, f"--out_dir={tmp_path / 'run'}")
    assert len(metrics(tmp_path / "run").train) == 6
    assert capsys.readouterr().out.count("run cannot be locked (No locks available): start no second run in it") == 1


@pytest.fixture
def limit_files():
    """A function that limits the size of files to a number of bytes. Writing beyond fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_tokens_log_lines_and_exports_is_one_line(tiny_run, tmp_path, limit_files):
    run, cache = tmp_path / "run", tmp_path / "cache"
    args = [*tiny_run, f"--data.cache_dir={cache}", f"--out_dir={run}"]
    limit_files(4096)
    assert "File too large" in one_line(main_here(train.main, *args))
    assert not list(cache.rglob("*.npy")) and not run.exists()
    limit_files(resource.RLIM_INFINITY)
    train_here(*args)

    limit_files(16384)
    more = main_here(train.main, *args, "--max_steps=200", "--checkpoint_interval=0", "--eval_interval=0")
    assert "File too large" in one_line(more)
    assert "File too large" in one_line(main_here(checkpoint.main, "export", run, tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()
    limit_files(resource.RLIM_INFINITY)
    train_here(*args, "--max_steps=8")  # goes on at step 6, without the rows after it and the half line
    assert sorted(metrics(run).train) == list(range(1, 9))


def test_a_run_needs_no_home_and_takes_any_name_and_locale(tiny_run, tmp_path, monkeypatch):
    out_dir = tmp_path / "mit Leerzeichen und Umläuten ä→"
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/proc/none", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(REPO / "train.py"), *tiny_run, f"--out_dir={out_dir}"], text=True,
                          env=environment, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(out_dir) in done.stdout
    assert (out_dir / "loss.png").exists()
