"""Entry point: run main(), print user errors as one line (exit 2), let bugs show their traceback."""

import argparse
import errno
import gc
import io
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from plumbing.errors import RunStopped, UserError
from plumbing.ranks import fails_first, from_launcher, process_rank
from plumbing.stopping import SIGNALS

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # these errors name no file
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
           errno.EEXIST}  # the last: a file, or a link to nowhere, where a folder is to be made
EXIT_STATUS = {UserError: 2, RunStopped: 1, KeyboardInterrupt: 130}


class Arguments(argparse.ArgumentParser):
    """The parser of scripts without a config: a wrong argument is a UserError."""

    def error(self, message):
        raise UserError(f"{message}, see --help")


def path(text):
    """The type of an argument that is a path, with ~ replaced. Raises UserError for "", a shell variable not set."""
    if not text:
        raise UserError("it is empty")  # argparse says: invalid path value: ''
    return os.path.expanduser(text)


def leave():
    """Destroy the process groups, if there are any."""
    if dist.is_initialized():
        # A group that garbage holds would live until Python exits, when gloo's threads sometimes abort the process.
        gc.collect()
        dist.destroy_process_group()


def as_expected(error):
    """The UserError, RunStopped or KeyboardInterrupt that an exception amounts to, or None for a bug."""
    if isinstance(error, CheckpointException):  # wraps those of all ranks
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and (error.errno in FULL or error.errno in REFUSED and error.filename):
        place = error.filename or "the disk"
        return UserError(f"{place}: {error.strerror}: name another path, or make this one usable")
    if isinstance(error, FileNotFoundError) and "/checkpoints/step_" in str(error.filename):
        return RunStopped(f"{error.filename} is gone, a run that goes on keeps the newest checkpoints only: try again")
    if isinstance(error, RuntimeError) and "gloo/transport" in str(error):
        return RunStopped(f"lost the connection to another rank, which has ended or is stuck ({str(error)[:200]})")
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt("interrupted")
    return error if type(error) in EXIT_STATUS else None


def run(main, piped=False):
    """Call main(), which returns an exit status or None, print an expected error as one message, and exit.

    Exit status 2 for a UserError, a full disk, or a path that the system refuses; 1 for RunStopped. Anything else is a
    bug: it passes through to a traceback and status 1. Of several ranks, the one that fails first prints.
    piped: end without a message when a reader of the output ends, as in `sample.py | head`.
    """
    if piped or {"--help", "--print_config"} & {*sys.argv}:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for stream in (sys.stdin, sys.stdout):  # what a person types or a terminal shows may not fit its encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        status = main()
    except (Exception, KeyboardInterrupt, CheckpointException) as error:  # the last one is no Exception
        for number in SIGNALS:  # torchrun now ends the ranks
            signal.signal(number, signal.SIG_DFL)
        first, expected = fails_first(), as_expected(error)
        if not first:  # the first one prints and exits, then torchrun ends this one
            time.sleep(10)
        elif expected is None:
            raise
        else:
            several = from_launcher("WORLD_SIZE", 1) > from_launcher("LOCAL_WORLD_SIZE", 1)
            where = f": rank {process_rank()} on {socket.gethostname()}" if several else ""
            print(f"{Path(sys.argv[0]).name}{where}: {expected}", file=sys.stderr, flush=True)
        sys.exit(EXIT_STATUS.get(type(expected), 1))
    leave()  # not after an error: it would wait for ranks that are stuck in a collective
    if status:
        sys.exit(status)
