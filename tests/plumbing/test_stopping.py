"""stopping.py: runs that a signal ends, ranks that are stuck or gone, several nodes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from conftest import REPO, main_here, metrics, train_here

import train
from checkpoint import latest
from plumbing.ranks import launcher_store, shared_store
from plumbing.stopping import StopSignals, Watchdog

SYNC = "--async_checkpoint=False"  # so that the checkpoint before a fault is there
FAULTY = f"""
import os, signal, socket, sys, time
sys.path.insert(0, {str(REPO)!r})
import train
from plumbing import entry
plan = eval(sys.argv.pop(1))  # {{(restart, rank, step): fault}}
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
hosts = sys.argv.pop(1)
if hosts:
    socket.gethostname = lambda: hosts.split(",")[rank]
batch = train.data.Loader.batch
def faulty(loader, step):
    fault = plan.get((attempt, rank, step + 1)) if hasattr(loader, "passes") else None  # not in the first pass
    loader.passes = 1
    if fault == "hang":
        time.sleep(1000)
    elif fault == "mistake":
        raise train.UserError("no such thing")
    elif fault:
        os.kill(os.getpid(), fault)
    time.sleep(0.05)
    return batch(loader, step)
train.data.Loader.batch = faulty
entry.run(train.main)
"""


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step_and_the_same_command_goes_on(number, status, tiny_run, tmp_path,
                                                                         monkeypatch):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    batch, steps = train.data.Loader.batch, []

    def signalled(loader, step):
        steps.append(step + 1)
        if steps.count(4) == 1 and step + 1 == 4:
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        return batch(loader, step)

    monkeypatch.setattr(train.data.Loader, "batch", signalled)
    args = [*tiny_run, f"--out_dir={tmp_path / 'run'}"]
    ended, out, err = main_here(train.main, *args)
    assert (ended, err) == (status, "") and latest(tmp_path / "run").name == "step_00000004"
    assert f"stopped by {number.name} after step 4/6, saved: the same command goes on" in out and "done" not in out
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    train_here(*args)
    train_here(*tiny_run, f"--out_dir={tmp_path / 'whole'}")
    losses = [{step: row["loss"] for step, row in metrics(tmp_path / name).train.items()} for name in ("run", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_run_that_saves_nothing_says_so_when_a_signal_ends_it(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(StopSignals, "wait", lambda self: signal.SIGTERM)
    _, out, _ = main_here(train.main, *tiny_run, f"--out_dir={tmp_path / 'run'}", "--checkpoint_interval=0")
    assert "stopped by SIGTERM after step 1/6, not saved, as checkpoint_interval=0" in out


def test_a_signal_that_somebody_else_handles_stops_nothing(tiny_run, tmp_path, monkeypatch):
    share = StopSignals.share
    monkeypatch.setattr(StopSignals, "share", lambda self: (os.kill(os.getpid(), signal.SIGCHLD), time.sleep(0.05),
                                                            share(self)))
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        _, out, _ = main_here(train.main, *tiny_run, f"--out_dir={tmp_path / 'run'}")
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert "done: 6 steps" in out and "stopped by" not in out


def in_fork(function):
    """Call a function in a process of its own; the process id."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(7)
    return child


def waiting():
    """StopSignals whose wait() never ends, in a call that no Python handler interrupts."""
    lock = threading.Lock()
    lock.acquire()
    return SimpleNamespace(work=SimpleNamespace(wait=lock.acquire))


def test_a_second_signal_ends_the_process_at_once_and_what_torchrun_repeats_is_no_second_one():
    reader, writer = os.pipe()

    def stuck():
        StopSignals()
        os.write(writer, b"ready")
        StopSignals.wait(waiting())

    child = in_fork(stuck)
    assert os.read(reader, 5) == b"ready"
    for _ in range(2):
        os.kill(child, signal.SIGTERM)
        time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    time.sleep(2)
    os.kill(child, signal.SIGUSR1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGUSR1


def place_where_it_hangs(frozen):
    time.sleep(0.2)
    if frozen:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(100)


@pytest.mark.parametrize("fault, message", [("frozen", "rank 1 on vm0 does not answer after step 5"),
                                            ("behind", "rank 1 on vm0 does not get on after step 5"),
                                            ("all", "rank 0 on vm0 waits for the others, as all do after step 5")])
def test_the_rank_that_is_stuck_is_named_with_its_step_and_stack(fault, message, monkeypatch, capfd):
    monkeypatch.setattr("socket.gethostname", lambda: "vm0")
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def rank(i):
        watchdog = Watchdog()
        watchdog.start(dist.TCPStore("localhost", server.port), i, 2, timeout=1.0)
        watchdog.progress(5)
        if i == 1 and fault != "all":
            place_where_it_hangs(fault == "frozen")
        StopSignals.wait(waiting())

    children = [in_fork(lambda i=i: rank(i)) for i in range(2)]
    first, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == 1
    for child in set(children) - {first}:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    err = capfd.readouterr().err
    assert f"{message}, and nothing has gone on for 1 s (timeout_minutes)" in err
    assert ("place_where_it_hangs" in err) == (fault != "all")


class Answering:
    """A store in which every rank but the `dead` ones has written anew whenever it is read."""

    def __init__(self, ranks, dead=()):
        self.rows = {f"rank_{i}": {"rank": i, "host": f"vm{i}", "stack": "", "time": 0, **row}
                     for i, row in enumerate(ranks)}
        self.dead = dead

    def set(self, key, text):  # what rank 0, the test, writes of itself
        pass

    def add(self, key, n):
        pass

    def multi_get(self, keys):
        for key in keys:
            self.rows[key]["time"] += self.rows[key]["rank"] not in self.dead
        return [json.dumps(self.rows[key]) for key in keys]


@pytest.mark.parametrize("ranks, dead, grace, message", [
    ([(4, True), (3, False)], (), 0, "rank 1 on vm1 does not get on after step 3, and nothing has gone on for 5 s"),
    ([(3, True), (4, False)], (), 0, "rank 0 on vm0 waits for the others, as all do after step 3, and nothing"),
    ([(4, False), (4, True)], (), 0, "rank 0 on vm0 does not get on after step 4, and nothing"),
    ([(3, False), (4, True)], (1,), 0, "rank 1 on vm1 does not answer after step 4, and nothing"),
    ([(0, False), (0, True)], (), 30, "rank 0 on vm0 does not get on before the first step, and nothing has gone on "
                                      "for 35 s (timeout_minutes)")])
def test_of_all_ranks_the_one_that_is_named_is_silent_else_behind_else_busy(ranks, dead, grace, message, monkeypatch):
    watchdog, said = Watchdog(), []
    monkeypatch.setattr("plumbing.stopping.end", said.append)
    watchdog.store = Answering([{"step": step, "waits": waits} for step, waits in ranks], dead)
    watchdog.rank, watchdog.world_size, watchdog.timeout, watchdog.grace = 0, 2, 5.0, grace
    watchdog.interval = 0
    watchdog.report()
    assert len(said) == 1 and said[0].startswith(message)


def test_a_long_write_to_a_disk_is_not_taken_for_a_stuck_rank(capfd):
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    reader, writer = os.pipe()

    def rank():
        watchdog = Watchdog()
        watchdog.start(dist.TCPStore("localhost", server.port), 0, 1, timeout=0.4)
        watchdog.progress(5)
        with watchdog.patient():
            time.sleep(1.5)
        os.write(writer, b"written")
        time.sleep(100)

    child = in_fork(rank)
    assert os.read(reader, 7) == b"written"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1  # not a second time
    assert "does not get on after step 5" in capfd.readouterr().err


def test_ranks_end_when_their_launcher_is_gone(capfd):
    reader, writer = os.pipe()

    def launcher():
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.write(writer, str(store.port).encode())
        time.sleep(100)

    def rank():
        Watchdog().start(dist.TCPStore("localhost", port), 0, 1, timeout=2.0)
        os.write(writer, b"ready")
        StopSignals.wait(waiting())

    parent = in_fork(launcher)
    port = int(os.read(reader, 5))
    child = in_fork(rank)
    assert os.read(reader, 5) == b"ready"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert "has lost torchrun, or rank 0's node" in capfd.readouterr().err


def test_a_run_goes_on_by_itself_after_a_stuck_and_a_killed_rank_and_one_signalled_rank_stops_all(tiny_run, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    plan = {(0, 0, 4): "hang", (1, 1, 5): signal.SIGKILL.value, (2, 1, 5): signal.SIGTERM.value}
    done = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=2", script, plan, "", *tiny_run,
                    f"--out_dir={tmp_path / 'run'}", "--timeout_minutes=0.05", "--resume=never", SYNC)
    out, err = done.communicate()
    assert done.returncode == 0, out + err
    assert err.count("rank 0 on ") == 1 and "does not get on after step 3" in err and "in faulty" in err
    assert out.count("step_00000003, 3 steps done") == 2
    assert "stopped by SIGTERM after step 5/6, saved: the same command with --resume=auto goes on" in out
    assert latest(tmp_path / "run").name == "step_00000005"
    assert sorted(metrics(tmp_path / "run").train) == [*range(1, 6)]


def test_only_ranks_whose_predecessors_have_trained_resume_against_resume_never(tiny_run, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = [*tiny_run, f"--out_dir={tmp_path / 'run'}", "--resume=never"]
    train_here(*args)  # an earlier run
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": 1}.items():
        monkeypatch.setenv(name, str(value))
    try:
        _, out, _ = main_here(train.main, *args)
        assert "step 1/6 |" in out and (tmp_path / "run" / "earlier_1").is_dir()
        _, out, _ = main_here(train.main, *args)
        assert "nothing to do: " in out
    finally:
        shared_store.cache_clear()
        launcher_store.cache_clear()


def torchrun(*args, cwd=REPO):
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, args)], cwd=cwd, text=True,
                            env={**env, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_nodes_have_a_replica_and_tokens_each_restart_together_and_messages_name_the_host(tiny_run, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    plan = {(0, 1, 4): signal.SIGKILL.value, (1, 1, 5): "mistake"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for i in range(2):
        (tmp_path / f"node{i}").mkdir()
        nodes.append(torchrun("--nnodes=2", f"--node-rank={i}", "--nproc-per-node=1", "--rdzv-backend=c10d",
                              f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=1", script, plan, "north,south",
                              *tiny_run, SYNC, "--data.cache_dir=cache", f"--out_dir={tmp_path / 'run'}",
                              "--resume=never", cwd=tmp_path / f"node{i}"))
    outputs = [node.communicate() for node in nodes]
    out, err = map("".join, zip(*outputs, strict=True))
    assert out.count("HSDP: 2 replicas, each sharded over 1 of 2 ranks") == 2, out + err
    assert out.count("step 4/6 |") == 1 and out.count("step_00000003, 3 steps done") == 1  # the other node's restart
    tokens = [sorted(p.relative_to(tmp_path / f"node{i}") for p in (tmp_path / f"node{i}").rglob("*.npy"))
              for i in range(2)]
    assert tokens[0] == tokens[1] and tokens[0]
    assert err.count("faulty.py: rank 1 on south: no such thing") == 1
