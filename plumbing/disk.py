"""Files and folders that are complete or not there."""

import contextlib
import secrets
import shutil


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
