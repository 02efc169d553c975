"""A checkpoint's folder on disk: complete or not there, with a hash of each file, read without executing anything.

torch.distributed.checkpoint decides which rank writes and reads which part of which tensor.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed.checkpoint as dcp

from plumbing.disk import writing
from plumbing.errors import RunStopped, UserError
from plumbing.ranks import gather, process_rank, progress_bar

THREADS = 4  # of a rank, each with its own files: one of them hashes 1 to 2 GB/s


class Writer(dcp.FileSystemWriter):
    """Writes `folder`: under a temporary name, until every file is there. run: a dict for its run.json."""

    def __init__(self, folder, run):
        # 0: torch would use the current device of each thread to copy ahead
        super().__init__(folder.with_name(f"{folder.name}.tmp"), per_thread_copy_ahead=0)
        self.folder, self.run = folder, run

    def prepare_local_plan(self, plan):
        return plan  # torch would make the folder here

    def prepare_global_plan(self, plans):
        """Rank 0, before any rank writes: make the folder, and remove what runs left that were killed while saving."""
        for incomplete in self.folder.parent.glob("step_*.tmp"):
            shutil.rmtree(incomplete)
        self.path.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan, planner):
        """Every rank: write its files, on disk when this returns; a future of what finish() gets of each rank."""
        def write_part(i):
            prefix = dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{i}_")
            part = dataclasses.replace(plan, items=plan.items[i::THREADS], storage_data=prefix)
            results = super(Writer, self).write_data(part, planner).value()
            path = self.path / results[0].storage_data.relative_path  # of all
            return results, path.stat().st_size, sha256sum(path)

        # not torch's own threads (thread_count), where an exception is printed and what it kept from the disk forgotten
        counted = counting(planner, "resolve_data", "saving", len(plan.items))
        with counted, writing(self.path), ThreadPoolExecutor(THREADS) as pool:
            parts = list(pool.map(write_part, range(min(THREADS, len(plan.items)))))
        future = torch.futures.Future()
        future.set_result(parts)
        return future

    def finish(self, metadata, results):
        """Rank 0, when every rank has written: check that all has arrived, and give the folder its name."""
        parts = [part for of_rank in results for part in of_rank]
        super().finish(metadata, [pieces for pieces, *_ in parts])
        metadata = Reader(self.path).read_metadata()  # torch 2.11 fills in a copy
        assert len(metadata.storage_data) == sum(len(t.chunks) for t in metadata.state_dict_metadata.values())
        for pieces, size, _ in parts:
            path = self.path / pieces[0].storage_data.relative_path
            if not path.is_file() or path.stat().st_size != size:
                raise RunStopped(f"{path} has not arrived with its {size} bytes, which a rank has written. The "
                                 "checkpoint before it is whole")
        self.path.joinpath("run.json").write_text(json.dumps(self.run, indent=1))
        sums = [line for *_, line in parts] + [sha256sum(self.path / name) for name in (".metadata", "run.json")]
        self.path.joinpath("SHA256SUMS").write_text("".join(sums))
        for path in (self.path / "run.json", self.path / "SHA256SUMS", self.path):
            flush(path)  # all on disk before the name says that it is complete
        self.path.rename(self.folder)
        flush(self.folder.parent)


@contextlib.contextmanager
def counting(planner, method, what, total):
    """Show a progress bar of the calls of a planner's method, which torch calls for each tensor."""
    call = getattr(planner, method)
    with progress_bar(None, what, "tensor", total) as progress:
        def counted(*args):
            progress.update()
            return call(*args)

        setattr(planner, method, counted)
        yield


def flush(path):
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sha256sum(path):
    """The line that sha256sum prints for a file, in its folder."""
    with path.open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n"


def damaged_file(folder):
    """The name of a file in `folder` that is not as its SHA256SUMS says, or None.

    SHA256SUMS must end with run.json: else it is cut. Each rank reads some of the files; all must call this.
    """
    listed = folder / "SHA256SUMS"

    def damaged(line):
        name = line.partition("  ")[2].rstrip("\n") or listed.name
        try:
            return None if sha256sum(folder / name) == line else name
        except (OSError, ValueError):  # gone, unreadable, or no possible name
            return name

    text = listed.read_text(errors="replace") if listed.is_file() else ""
    found = [listed.name]
    if text.endswith("  run.json\n"):
        with ThreadPoolExecutor(THREADS) as pool:
            lines = text.splitlines(keepends=True)[process_rank() :: len(gather(None))]
            found = list(progress_bar(pool.map(damaged, lines), f"checking {folder.name}", "file", len(lines)))
    return next((name for names in gather(found) for name in names if name), None)


class Unpickler(pickle.Unpickler):
    """Reads `.metadata`, a pickle, without executing anything: it makes only what torch.distributed.checkpoint saves.

    BytesStorageMetadata is left out: torch would unpickle what it stands for without any such limit.
    """

    HARMLESS = {
        "torch.distributed.checkpoint.metadata": {"ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
                                                  "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"}, "torch": {"Size"},
        "pathlib": {"PosixPath"}, "pathlib._local": {"PosixPath"}}

    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.HARMLESS.get(module, ()):
            return super().find_class(module, name)
        raise UserError(f"a checkpoint's .metadata asks for {module}.{name}, which train.py saves in none: it was made "
                        "or changed by something else, which could do harm. Do not use it")


class Reader(dcp.FileSystemReader):
    """Reads a checkpoint's folder; tensors by torch.load(weights_only=True)."""

    def read_data(self, plan, planner):
        with counting(planner, "commit_tensor", "loading", len(plan.items)):
            return super().read_data(plan, planner)

    def read_metadata(self):
        with (self.path / ".metadata").open("rb") as file:
            return Unpickler(file).load()
