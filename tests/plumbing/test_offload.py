"""offload.py: tensors in host memory, streamed through buffers whose copies may happen as late as the waits allow."""

import random
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore

from plumbing import offload, sharding
from plumbing.sharding import like


class Stream:
    """Runs what it is given in order, at random times, at the latest when somebody waits for it."""

    def __init__(self, gpu):
        self.gpu, self.queue, self.done = gpu, [], 0

    def give(self, work):
        self.queue.append(work)
        if self.gpu.random.random() < 0.3:
            self.run(len(self.queue))

    def run(self, until):
        while self.done < until:
            self.done += 1
            self.queue[self.done - 1]()

    def record_event(self):
        return self, len(self.queue)

    def wait_event(self, event):
        stream, until = event
        self.give(lambda: stream.run(until))

    def wait_stream(self, other):
        self.wait_event(other.record_event())


class Gpu:
    """The part of torch.cuda that offload.py uses."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.default = self.current = Stream(self)

    def Stream(self):
        return Stream(self)

    def current_stream(self):
        return self.current

    def stream(self, stream):
        gpu = self

        class Entered:
            def __enter__(self):
                gpu.current = stream

            def __exit__(self, *_):
                gpu.current = gpu.default

        return Entered()


@pytest.mark.parametrize("n_pieces", [2, 9])
@pytest.mark.parametrize("seed", range(8))
def test_each_piece_is_read_before_it_is_used_and_written_before_its_buffer_is_used_again(n_pieces, seed, monkeypatch):
    gpu, copy_ = Gpu(seed), torch.Tensor.copy_
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    pieces = [{"a": torch.full((2 + i % 3, 4), float(i)), "b": torch.full((i + 1,), i).byte()} for i in range(n_pieces)]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", lambda to, source, non_blocking: gpu.current.give(
            lambda: copy_(to, source)))
        for _ in range(2):  # the second time reads what the first has written
            for piece in offload.streamed(pieces, torch.device("cpu")):
                gpu.default.give(lambda a=piece["a"], b=piece["b"]: (a.add_(100), b.mul_(2)))
        gpu.default.run(gpu.default.record_event()[1])
    for i, piece in enumerate(pieces):
        assert torch.equal(piece["a"], torch.full((2 + i % 3, 4), i + 200.0))
        assert torch.equal(piece["b"], torch.full((i + 1,), 4 * i).byte())


def test_a_buffer_is_as_large_as_the_largest_piece_and_there_are_three(monkeypatch):
    made, empty = [], torch.empty
    monkeypatch.setattr(offload.torch, "empty", lambda *args, **keys: made.append(args[0]) or empty(*args, **keys))
    assert len(list(offload.streamed([{"a": torch.zeros(n)} for n in (3, 7, 5, 2)], torch.device("cpu")))) == 4
    assert made == [7] * 3
    assert list(offload.streamed([], torch.device("cpu"))) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_host_memory_is_zero_and_stays_while_a_view_of_it_lives(dtype):
    rows = offload.host_zeros((3, 5), dtype, torch.device("cpu"))[1:]
    assert rows.dtype == dtype and torch.equal(rows.float(), torch.zeros(2, 5))
    rows.copy_(torch.ones(2, 5))
    assert torch.equal(rows.float(), torch.ones(2, 5))
    assert offload.host_zeros((0, 5), dtype, torch.device("cuda")).shape == (0, 5)  # of a rank without rows


def test_host_memory_is_page_locked_as_long_as_it_lives(monkeypatch):
    locked = {}
    cudart = SimpleNamespace(cudaHostRegister=lambda pointer, size, flags: locked.update({pointer: size}),
                             cudaHostUnregister=locked.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "check_error", lambda status: None)
    tensor = offload.host_zeros((3, 5), torch.float32, SimpleNamespace(type="cuda"))
    view, pointer = tensor[1:], tensor.data_ptr()
    del tensor
    assert locked == {pointer: 60}
    del view
    assert not locked


def test_state_in_host_memory_of_weights_on_a_mesh_of_gpus_is_saved_and_loaded_in_place(tmp_path):
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        mesh = DeviceMesh("cuda", torch.arange(1), _init_backend=False)
        spec = DTensorSpec(mesh, (Shard(0),), TensorMeta(torch.Size([8, 4]), (4, 1), torch.float32))
        weight = DTensor(torch.randn(8, 4), spec, requires_grad=False)
        units = offload.host_zeros((8, 1), torch.float32, torch.device("cpu"))
        expected = units.copy_(torch.randn(8, 1)).clone()
        state = {"units": like(weight, units)}
        dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
        units.zero_()
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    finally:
        dist.destroy_process_group()
    assert torch.equal(units, expected)


@pytest.mark.gpu
def test_host_memory_of_a_gpu_is_page_locked_and_streamed():
    device = torch.device("cuda")
    pieces = [{"a": offload.host_zeros((1 << 22,), torch.float32, device)} for _ in range(8)]
    assert pieces[0]["a"].is_pinned()
    for _ in range(3):
        for piece in offload.streamed(pieces, device):
            piece["a"] += torch.ones(1 << 22, device=device)
    torch.cuda.synchronize()
    assert all((piece["a"] == 3).all() for piece in pieces)


@pytest.mark.parametrize("n_rows, ranks, rows_of", [
    (6, 2, [[0, 1, 2], [3, 4, 5]]), (5, 2, [[0, 1, 2], [3, 4]]), (2, 4, [[0], [1], [], []]),
    (5, 4, [[0, 1], [2, 3], [4], []])])
@pytest.mark.parametrize("replicas", [1, 2])
def test_each_rank_holds_its_rows_and_none_where_there_are_fewer_than_ranks(n_rows, ranks, rows_of, replicas,
                                                                          monkeypatch):
    class Sharded(SimpleNamespace):
        pass

    monkeypatch.setattr(sharding, "DTensor", Sharded)
    full, found = torch.arange(n_rows), []
    for rank in range(ranks):
        sizes, place = ((replicas, ranks), (1, rank)) if replicas > 1 else ((ranks,), (rank,))
        mesh = SimpleNamespace(ndim=len(sizes), size=sizes.__getitem__, get_local_rank=place.__getitem__)
        found.append(sharding.shard_rows(full, Sharded(device_mesh=mesh)).tolist())
    assert found == rows_of and sharding.shard_rows(full, torch.zeros(n_rows)) is full
