"""How a script ends: well, in one message about a mistake, or in the traceback of a bug."""

import argparse
import errno
import gc
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

REPO = Path(__file__).resolve().parent
FULL = {errno.ENOSPC, errno.EDQUOT}  # come without a file's name
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


class Arguments(argparse.ArgumentParser):
    """The parser of the scripts that need no config; their mistakes end as `run` says."""

    def error(self, message):
        raise ValueError(f"{message}, see --help")


def cause(error):
    """An exception, or for one of a checkpoint that ranks share, what went wrong on the first rank where it did."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def leave():
    """End the process groups, if there are any. One that garbage still holds would end with Python itself, and gloo's
    threads then now and then abort a process that has done all its work."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def run(main):
    """Call main(). What a `raise` in our own files tells ends in one message, anything else is a bug and a traceback.

    Exit status 2 for a ValueError (a mistake of the user's), 1 for a RuntimeError (a run that must not go on) and for a
    bug. A path that the operating system refuses, or a full disk, is told like a mistake of the user's.
    """
    rank = int(os.environ.get("RANK", 0))  # set by torchrun
    interrupted = False

    def interrupt(*_):
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except BaseException as error:
        if interrupted:  # whatever it has become on its way: torch.distributed.checkpoint wraps a KeyboardInterrupt
            if rank == 0:
                print("interrupted", file=sys.stderr)
            sys.exit(130)
        origin = traceback.extract_tb(error.__traceback__)[-1]
        folder = Path(origin.filename).resolve().parent
        ours = folder in (REPO, REPO / "bench", REPO / "bench" / "peers") and origin.line.startswith("raise")
        if rank > 0 and not isinstance(error, (SystemExit, KeyboardInterrupt)):
            # All ranks find the same, or miss rank 0 when it has gone; one speaks: torchrun ends the others in their
            # sleep. Whoever wakes up found something that rank 0 did not, and had better say so. Nobody leaves
            # earlier, because torchrun ends rank 0 too when another rank is the first to go.
            time.sleep(10)
        disk = cause(error)
        if isinstance(disk, OSError) and (disk.errno in FULL or disk.errno in REFUSED and disk.filename):
            error = ValueError(f"{disk.filename or 'the disk'}: {disk.strerror}: name another path, or make this one "
                               "usable")
        elif not isinstance(error, (ValueError, RuntimeError)) or not ours:
            raise
        print(f"{Path(sys.argv[0]).name}: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    leave()  # not after an error: it would wait for ranks that are stuck in a collective
