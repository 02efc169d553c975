"""Files and folders that are complete or not there."""

import contextlib
import os
import secrets
import shutil
import socket
import time
from pathlib import Path

from plumbing.errors import UserError
from plumbing.ranks import gather, process_rank


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path` to write a file or make a folder at; on success it becomes `path`.

    On failure it is removed and `path` stays what it was. A folder can only replace an empty one.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def replace_text(path, text):
    """Write a text file as a whole: a process killed meanwhile leaves the old one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def writing(path):
    """Report a full disk as the OSError that it is, whatever the library that wrote at `path` made of it."""
    try:
        yield
    except Exception as error:
        reason = error
        while reason and not isinstance(reason, OSError):
            reason = reason.__context__
        if reason is None:
            raise
        raise OSError(reason.errno, os.strerror(reason.errno), str(path)) from error


def check_shared(out_dir):
    """Raise UserError on every rank if out_dir is not one folder for all ranks."""
    marker = Path(out_dir, gather(f".seen_by_all_{secrets.token_hex(8)}")[0])
    if process_rank() == 0:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    gather(None)  # waits for rank 0
    deadline = time.monotonic() + 5  # network file systems show a new file with some delay
    while not (seen := marker.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    hosts = gather((seen, socket.gethostname()))
    if process_rank() == 0:
        marker.unlink()
    if blind := sorted({host for seen, host in hosts if not seen}):
        raise UserError(f"out_dir={out_dir} must be one folder for all nodes, for checkpoints to be complete: what "
                        f"{hosts[0][1]} writes to {marker.parent.resolve()} is not seen on {', '.join(blind)}. Name a "
                        "folder on a disk that they share")
