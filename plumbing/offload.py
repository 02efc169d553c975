"""Tensors in host memory, streamed through a GPU that computes with them: its own memory holds a few pieces at a time.

PCIe 5 carries about 50 GB/s in each direction, both at once, so streaming N bytes there and back takes N / 50 GB/s.
"""

import math
import mmap
import weakref

import torch

BUFFERS = 3  # one is being read, one computed with, one written


def host_zeros(shape, dtype, device):
    """Zeros in host memory; page-locked if `device` is a GPU, or it could not copy them while it computes.

    torch's own allocator of page-locked memory would round the size up to a power of two.
    """
    if not math.prod(shape):
        return torch.zeros(shape, dtype=dtype)  # a part of a weight of fewer rows than there are ranks
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(memory, dtype=dtype).view(shape)
    if device.type == "cuda":
        cudart = torch.cuda.cudart()
        torch.cuda.check_error(cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
        unlock = weakref.finalize(memory, cudart.cudaHostUnregister, tensor.data_ptr())
        unlock.atexit = False  # the end of the process does it too
    return tensor


def streamed(pieces, device):
    """Yield a copy of each piece on `device`, and write back to host memory what the caller has changed in it.

    pieces: [{name: tensor in host memory}], one dtype for each name. The next one is read and the previous one
    written meanwhile, each on a stream of its own; all are complete when the current stream is.
    """
    if not pieces:
        return
    gpu = torch.get_device_module(device)
    computing, reading, writing = gpu.current_stream(), gpu.Stream(), gpu.Stream()
    largest = {}  # {name: its largest tensor}
    for name, tensor in (item for piece in pieces for item in piece.items()):
        largest[name] = max(largest.get(name, tensor), tensor, key=torch.Tensor.numel)
    buffers = [{name: torch.empty(t.numel(), dtype=t.dtype, device=device) for name, t in largest.items()}
               for _ in range(BUFFERS)]
    copies = [{name: buffers[i % BUFFERS][name][: t.numel()].view(t.shape) for name, t in piece.items()}
              for i, piece in enumerate(pieces)]
    read, written = [], []  # events
    reading.wait_stream(computing)  # whatever had the buffers' memory before, and the last call's writing

    for i in range(len(pieces) + BUFFERS - 1):
        if i < len(pieces):
            if i >= BUFFERS:
                reading.wait_event(written[i - BUFFERS])
            with gpu.stream(reading):
                for name, tensor in pieces[i].items():
                    copies[i][name].copy_(tensor, non_blocking=True)
            read.append(reading.record_event())
        current = i - (BUFFERS - 1)  # the caller's, after those that are read ahead
        if current < 0:
            continue
        computing.wait_event(read[current])
        yield copies[current]
        writing.wait_stream(computing)
        with gpu.stream(writing):
            for name, tensor in pieces[current].items():
                tensor.copy_(copies[current][name], non_blocking=True)
        written.append(writing.record_event())
    computing.wait_stream(writing)  # before the buffers' memory is used for something else
