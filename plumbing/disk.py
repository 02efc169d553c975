"""Files and folders that are complete or not there."""

import contextlib
import hashlib
import secrets
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from plumbing.errors import UserError
from plumbing.ranks import barrier, gather, process_rank


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
        temporary.write_text(text)


# ----------------------------------------------------------------------------------------------------------------
# hashes


READERS = 4  # threads: one reads and hashes about 1.5 GB/s


def sha256(path):
    """The SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(path, names, parts=()):
    """Write the SHA-256 of the named files beside `path` into it, as sha256sum does, after the lines of `parts`.

    parts: files that this function wrote, which are removed.
    """
    parts = sorted(parts)
    text = "".join(part.read_text() for part in parts)
    with ThreadPoolExecutor(READERS) as pool:
        digests = pool.map(sha256, [path.with_name(name) for name in names])
        text += "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    path.write_text(text)
    for part in parts:
        part.unlink()


def damaged_file(folder):
    """The name of a file in `folder` that is not as its SHA256SUMS says, or None.

    SHA256SUMS must end with run.json: else it is cut. Each rank reads some of the files; all must call this.
    """
    def damaged(line):
        digest, _, name = line.partition("  ")
        try:
            return None if sha256(folder / name) == digest else name
        except (OSError, ValueError):  # gone, unreadable, or no possible name
            return name

    listed = folder / "SHA256SUMS"
    text = listed.read_text(errors="replace") if listed.is_file() else ""
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(damaged, text.split("\n")[:-1][process_rank() :: len(gather(None))]))
    if not text.endswith("  run.json\n"):
        found = [listed.name]
    return next((name for names in gather(found) for name in names if name), None)


# ----------------------------------------------------------------------------------------------------------------
# folders of several machines


def check_shared(key, folder):
    """Raise UserError on every rank if `folder`, the value of the config's `key`, is not one folder for all ranks."""
    token = gather(secrets.token_hex(8))[0]
    marker = Path(folder, f".seen_by_all_{token}")
    if process_rank() == 0:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    barrier()
    deadline = time.monotonic() + 5  # network file systems show a new file with some delay
    while not (seen := marker.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    hosts = gather((seen, socket.gethostname()))
    if process_rank() == 0:
        marker.unlink()
    blind = [f"rank {rank} on {host}" for rank, (seen, host) in enumerate(hosts) if not seen]
    if blind:
        raise UserError(f"{key}={folder} must be one folder for all nodes, for checkpoints to be complete: what rank 0 "
                        f"on {hosts[0][1]} writes to {marker.parent.resolve()} is not seen by {', '.join(blind[:3])}"
                        f"{' and others' if len(blind) > 3 else ''}. Name a folder on a disk that they share")
