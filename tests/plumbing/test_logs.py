"""logs.py, disk.py, ranks.py: reported speed and time against a clock of the test's own, files whole or not there."""

import itertools
import json
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from configurator import Config
from plumbing import logs
from plumbing.disk import replacing
from plumbing.errors import RunStopped, UserError
from plumbing.ranks import Ranks, agree_on_start, find_ranks, launcher_store


@pytest.fixture
def clock():
    """Seconds that the test sets; `ranks` are four whose clock it is."""
    clock = SimpleNamespace(seconds=100.0)
    clock.ranks = SimpleNamespace(now=lambda: clock.seconds, world_size=4, device=torch.device("cpu"))
    return clock


def test_speed_and_time_are_those_of_training_alone(clock):
    timer = logs.StepTimer(clock.ranks, 10, 50.0, max_steps=30, tokens=800, flops=3e6, peak_flops=1e9)
    clock.seconds += 4
    row, line = timer.log_row(12, torch.tensor(2.5), 1e-3, torch.tensor(0.5))
    # 2 steps of 800 tokens in 4 s on 4 ranks: 100 tokens/s each; 100 x 3e6 of 1e9 FLOP/s
    assert row.pop("peak_gib") > 0.1
    assert row == {"step": 12, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens": 9600, "tokens_per_s": 100.0,
                   "mfu": pytest.approx(0.3), "time_s": 54.0}
    for part in ("step 12/30 |", "loss 2.5000 |", "lr 1.00e-03 |", "grad norm 0.500 |", "100 tok/s per rank |",
                 "MFU 30.0% of bf16 peak |"):
        assert part in line, part
    assert "min left" not in line  # the first two steps compile
    clock.seconds += 3
    with timer.paused() as seconds:
        assert seconds == 57.0
        clock.seconds += 1000
    clock.seconds += 5
    row, line = timer.log_row(13, torch.tensor(2.5), 1e-3, torch.tensor(0.5))
    assert (row["time_s"], row["tokens_per_s"]) == (62.0, 25.0) and line.endswith("| 2.3 min left")  # 17 steps of 8 s


def test_the_slowest_step_counts_neither_the_first_two_nor_what_comes_between_steps(clock, monkeypatch):
    monkeypatch.setattr(logs.time, "perf_counter", lambda: clock.seconds)
    timer = logs.StepTimer(clock.ranks, 10, 0.0, max_steps=30, tokens=8, flops=1.0, peak_flops=None)

    def steps(first, *seconds):
        for step, duration in enumerate(seconds, first):
            clock.seconds += duration
            timer.end_step(step)
        row, _ = timer.log_row(step, torch.tensor(2.5), 1e-3, torch.tensor(0.5))
        return row.get("slowest_ms")

    assert steps(11, 60) is None and steps(12, 30) is None  # they compile
    assert steps(13, 1, 3, 2) == 3000
    with timer.paused():
        clock.seconds += 1000
    clock.seconds += 1
    timer.end_step(16)
    with timer.paused():  # an evaluation between two rows
        clock.seconds += 1000
    assert steps(17, 1, 0.5) == 1000


def test_what_json_and_the_data_sheet_lack_is_none_in_the_row_and_named_on_the_screen(clock):
    timer = logs.StepTimer(clock.ranks, 0, 0.0, max_steps=1, tokens=8, flops=1.0, peak_flops=None)
    clock.seconds += 1
    row, line = timer.log_row(1, torch.tensor(float("nan")), 0.1, torch.tensor(float("inf")))
    assert (row["loss"], row["grad_norm"], row["mfu"]) == (None, None, None)
    assert "loss nan" in line and "grad norm inf" in line and "MFU n/a" in line


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' own count")
def test_peak_memory_is_what_the_system_counts():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert logs.peak_memory(torch.device("cpu")) == pytest.approx(int(line.split()[1]) / 2**20, rel=0.02)


def test_peak_memory_of_a_gpu_is_in_gib(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    assert logs.peak_memory(torch.device("cuda")) == 3.0


def test_trackers_get_each_row_under_its_step(monkeypatch, tmp_path):
    seen = []
    writer = SimpleNamespace(add_scalar=lambda *point: seen.append(point))
    run = SimpleNamespace(log=lambda row, step: seen.append((row, step)))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(
        SummaryWriter=lambda folder, purge_step: seen.append((folder, purge_step)) or writer))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(
        init=lambda project, config, dir: seen.append((project, config["max_steps"], dir)) or run))
    config = Config(tensorboard=True, wandb_project="p", out_dir=str(tmp_path), max_steps=7)
    with logs.open_metrics(tmp_path) as metrics:
        logs.write([{"step": 3, "loss": 2.5}], metrics, logs.open_trackers(config, 2))
    row = {"step": 3, "loss": 2.5}
    assert seen == [(tmp_path / "tensorboard", 3), ("p", 7, str(tmp_path)), ("step", 3, 3), ("loss", 2.5, 3), (row, 3)]
    assert logs.read_metrics(tmp_path) == [row] and logs.open_trackers(Config(), 0) == []


def test_the_curves_of_loss_png_are_those_of_the_metrics(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append((figure, path)))
    with logs.open_metrics(tmp_path) as metrics:
        logs.write([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "val_loss": 2.5}], metrics, [])
    logs.plot_losses(tmp_path)
    ((figure, path),) = drawn
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert path == tmp_path / "loss.png" and lines == {"train": [[1, 3], [2, 2]], "validation": [[2, 2.5]]}


def test_the_name_of_a_run_is_no_formula(tmp_path):
    with logs.open_metrics(tmp_path / "${A}_${B}") as metrics:
        logs.write([{"step": 1, "loss": 3.0}], metrics, [])
    logs.plot_losses(tmp_path / "${A}_${B}")
    assert (tmp_path / "${A}_${B}" / "loss.png").stat().st_size


def test_trackers_get_the_numbers_of_all_rows_under_names_of_their_own():
    rows = [{"step": 3, "fp8_layer": "lm_head", "input": {"format": "e4m3", "sqnr_db": 31.5}},
            {"step": 3, "loss": None, "lr": 0.1}]
    assert logs.scalars(rows) == {"step": 3, "fp8/lm_head/input/sqnr_db": 31.5, "lr": 0.1}


@pytest.mark.parametrize("key, package", [("tensorboard", "tensorboard"), ("wandb_project", "wandb")])
def test_a_tracker_that_is_not_installed_is_named(monkeypatch, key, package):
    config = SimpleNamespace(**{"tensorboard": False, "wandb_project": None, key: "yes"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else "there")
    with pytest.raises(UserError, match=f"asks for {package}, which is not installed: pip install {package}"):
        logs.check_trackers(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "there")
    logs.check_trackers(config)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_replaced_path_is_whole_or_what_it_was(tmp_path, kind):
    path = tmp_path / "new" / "path"

    def make(temporary, text):
        if kind == "folder":
            temporary.mkdir()
            temporary /= "file"
        temporary.write_text(text)

    with pytest.raises(KeyError), replacing(path) as temporary:
        make(temporary, "half")
        raise KeyError
    assert list(path.parent.iterdir()) == []
    with replacing(path) as temporary:
        make(temporary, "whole")
        assert not path.exists()
    assert list(path.parent.iterdir()) == [path]
    assert (path / "file" if kind == "folder" else path).read_text() == "whole"


def test_ranks_and_devices_are_those_of_torchrun(monkeypatch):
    assert find_ranks("cpu") == Ranks(0, 1, torch.device("cpu"), 0, 1)
    monkeypatch.setenv("RANK", "5")
    with pytest.raises(UserError, match="no WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start"):
        find_ranks()
    for name, value in {"WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                        "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_ranks("auto") == Ranks(5, 8, torch.device("cpu"), 1, 4) and not find_ranks("auto").is_main
    with pytest.raises(UserError, match="device=cuda, but torch finds no GPU"):
        find_ranks("cuda")
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    gpu = torch.device("cuda", 1)
    assert find_ranks("auto") == find_ranks("cuda") == Ranks(5, 8, gpu, 1, 4) and current == [gpu, gpu]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="a rank for GPU 2, but there are 2: start no more ranks than there are GPUs"):
        find_ranks()


def test_metrics_of_a_killed_run_are_read_and_continued_at_any_step(tmp_path):
    for attempt in range(3):
        out_dir = tmp_path / str(attempt)
        writer = os.fork()
        if writer == 0:
            try:
                metrics = logs.open_metrics(out_dir)
                for step in itertools.count(1):  # rows longer than a file's buffer
                    logs.write([{"step": step, "loss": 1.0}, {"step": step, "fp8_layer": "x" * 30000}], metrics, [])
            finally:
                os._exit(1)
        path = out_dir / "metrics.jsonl"
        while not path.exists() or path.stat().st_size < 10**6:
            time.sleep(0.01)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        os.truncate(path, path.stat().st_size - 7)  # a kill in the middle of a write is rare: this leaves the same
        steps = [row["step"] for row in logs.read_metrics(out_dir)]
        assert steps == sorted([*range(1, steps[-1] + 1)] * 2)[: len(steps)] and len(steps) > 30
        with logs.open_metrics(out_dir) as metrics:  # the kill has released the lock
            logs.continue_metrics(metrics, steps[-2])
            logs.write([{"step": steps[-2] + 1}], metrics, [])
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows[-1]["step"] == steps[-2] + 1 and rows[-2]["step"] == steps[-2]


def test_all_that_a_run_has_written_is_set_aside_when_another_begins(tmp_path):
    written = {"config.py", "run.json", "loss.png", "fp8_health.png", "checkpoints", "tensorboard", "wandb",
               "trace_step3.json.gz", "memory_step3.pickle", "nonfinite_step_00000003"}
    for name in written:
        (tmp_path / name).touch()
    with logs.open_metrics(tmp_path) as metrics:
        logs.write([{"step": 1}], metrics, [])
        assert logs.continue_metrics(metrics, 0) == tmp_path / "earlier_1"
        logs.write([{"step": 1, "loss": 2.0}], metrics, [])
    assert {path.name for path in (tmp_path / "earlier_1").iterdir()} == written | {"metrics.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "earlier_1"}
    assert (logs.read_metrics(tmp_path / "earlier_1"), logs.read_metrics(tmp_path)) == (
        [{"step": 1}], [{"step": 1, "loss": 2.0}])


def test_each_start_of_the_ranks_has_a_name_of_its_own_on_which_they_agree(monkeypatch):
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def start(*ranks):
        stores = [dist.TCPStore("localhost", server.port) for _ in ranks]
        with ThreadPoolExecutor(len(ranks)) as pool:
            return set(pool.map(agree_on_start, stores, ranks, [3] * 3))

    first = start(2, 0, 1)
    second = start(0, 1, 2)  # among what the first start has left
    assert len(first) == len(second) == 1 and first != second
    monkeypatch.setattr("plumbing.ranks.MEETING", 0.3)
    for n in (1, 2):
        with pytest.raises(RunStopped, match=f"{n} of 3 ranks have started within 0.3 s"):
            start(*range(n))


def test_a_port_in_use_is_a_message(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"the ranks cannot meet at 127.0.0.1:{port}: .*in use.* a free port"):
            launcher_store.__wrapped__()
