"""How a run ends before its last step: a signal asks it to, or a rank is stuck."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STARTUP = 30 * 60  # seconds that ranks may wait for each other, beside the timeout, before the first step is done


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1, on any rank, end the run after the step that it is in, on all ranks.

    A second one ends the process at once, if two seconds have passed: torchrun and SLURM may both deliver the first.
    """

    def __init__(self):
        self.received, self.work, self.agreed = 0, None, 0
        reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        # A handler in Python would have to wait for the main thread, which may be inside of a collective.
        signal.set_wakeup_fd(self.writer)
        threading.Thread(target=self.listen, args=[reader], daemon=True).start()

    def listen(self, reader):
        while number := int.from_bytes(os.read(reader, 1)):
            if number not in SIGNALS:  # a library may have handlers of others
                continue
            if not self.received:
                self.received, self.at = number, time.monotonic()
            elif time.monotonic() > self.at + 2:
                os._exit(128 + number)
        os.close(reader)

    def share(self):
        """Tell the other ranks what this one has received, without waiting for them."""
        self.agreed = torch.tensor(self.received)  # on the CPU: through gloo, beside what a GPU does
        if dist.is_initialized():
            self.work = dist.all_reduce(self.agreed, dist.ReduceOp.MAX, async_op=True)

    def wait(self):
        """The signal that any rank had received when it called share(), or None: the same on all ranks."""
        if self.work:
            self.work.wait()
        return signal.Signals(self.agreed.item()) if self.agreed else None

    def restore(self):
        """Let signals do again what they did before."""
        signal.set_wakeup_fd(-1)
        os.close(self.writer)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Watchdog:
    """Ends a run in which a rank is stuck, and names it.

    A thread of each rank writes every few seconds where its main thread is to the store that the ranks share. When
    nothing has gone on for too long, it looks for the rank that the others wait for, prints its host, step and stack,
    and ends the process; torchrun then ends the others.
    """

    def __init__(self):
        self.step, self.events, self.grace, self.ended = 0, 0, STARTUP, threading.Event()

    def progress(self, step=None):
        """Something went on: a step is done, or a part of an evaluation."""
        self.events += 1
        if step is not None:
            self.step, self.grace = step, 0

    @contextlib.contextmanager
    def patient(self):
        """Allow the block half an hour more: it writes to a disk."""
        grace, self.grace = self.grace, STARTUP
        yield
        self.events += 1
        self.grace = grace

    def start(self, store, rank, world_size, timeout):
        """Watch this rank, in a thread, until `ended` is set. timeout: seconds in which something must go on."""
        self.store, self.rank, self.world_size, self.timeout = store.clone(), rank, world_size, timeout
        self.interval = min(2.0, timeout / 20)
        self.write()
        threading.Thread(target=self.watch, daemon=True).start()

    def write(self):
        """Write where this rank is; returns what is to change while it gets on."""
        frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
        stack = "".join(traceback.format_list(frames[-12:]))
        innermost = frames[-1].filename
        waits = innermost == __file__ or "/torch/distributed/" in innermost or "/torch/cuda/" in innermost
        self.store.set(f"rank_{self.rank}", json.dumps({
            "rank": self.rank, "host": socket.gethostname(), "step": self.step, "waits": waits, "stack": stack,
            "time": time.monotonic()}))
        return self.events, stack

    def watch(self):
        before, since = None, time.monotonic()
        try:
            while not self.ended.wait(self.interval):
                if (now := self.write()) != before:
                    before, since = now, time.monotonic()
                elif time.monotonic() > since + self.timeout + self.grace and self.store.add("reported", 1) == 1:
                    self.report()
                if self.store.check(["failed"]):  # on another node: torchrun ends the ranks of its own
                    time.sleep(10)
                    os._exit(1)
        except dist.DistError as error:
            if not self.ended.is_set():
                end(f"rank {self.rank} on {socket.gethostname()} has lost torchrun, or rank 0's node: {error}")

    def report(self):
        """Print which rank is stuck, and end this process."""
        keys = [f"rank_{i}" for i in range(self.world_size)]
        before = self.store.multi_get(keys)
        time.sleep(4 * self.interval)
        self.write()
        now = [{**json.loads(new), "answers": new != old}
               for old, new in zip(before, self.store.multi_get(keys), strict=True)]
        # The one that the others wait for: does not answer, or else is behind, or else does not wait itself.
        stuck = min(now, key=lambda rank: (rank["answers"], rank["step"], rank["waits"]))
        does = "waits for the others, as all do" if stuck["waits"] else "does not get on"
        if not stuck["answers"]:
            does = "does not answer"
        place = f"after step {stuck['step']}" if stuck["step"] else "before the first step"
        self.store.add("failed", 1)  # what other ranks find wrong from now on is a consequence
        end(f"rank {stuck['rank']} on {stuck['host']} {does} {place}, and nothing has gone on for "
            f"{self.timeout + self.grace:.0f} s (timeout_minutes). The last that is known of it:\n{stuck['stack']}")


def end(message):
    """End this process from a thread of it, whatever the main thread is in."""
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
    os._exit(1)
