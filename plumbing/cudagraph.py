"""A forward and backward pass as one CUDA graph: recorded once, then all of its kernels are started by one call.

A pass is hundreds of kernels, in FP8 twice as many as in bf16. Python starts one in about 10 microseconds. With 8192
tokens of an 8B model each runs for longer than that, and nothing is lost; with 100M parameters most end sooner, and the
GPU waits for Python.

Source: "Whole-network capture" in PyTorch's notes on CUDA semantics.
"""

import torch

from plumbing.errors import UserError


def check(config, shards, device):
    """UserError where a pass of a configurator.Config cannot be recorded."""
    if not config.cuda_graph:
        return
    length = config.model.block_size
    for wrong, why in (
        (device.type != "cuda", "there is no GPU here"),
        (shards, "FSDP2's communication is not recorded: use one rank, shard_one_rank=False"),
        (config.data.format == "hellaswag" or (config.model.sliding_window or length) < length,
         "documents in rows, and sliding windows, have other shapes in every batch"),
        (config.compile.enabled and config.compile.mode in ("reduce-overhead", "max-autotune"),
         f"compile.mode={config.compile.mode} records graphs of its own, which cannot be part of one"),
    ):
        if wrong:
            raise UserError(f"cuda_graph=True: {why}; or set cuda_graph=False")


class GraphedPass:
    """`run(x, y, (), divisor)`, which computes a loss and calls backward, recorded at its first call.

    x, y: (B, T) int64, divisor: a 0-d tensor; only their values may change from call to call. Returns run's loss, which
    the next call overwrites. Gradients are added to p.grad, as run adds them. What the pass needs of memory stays
    reserved for it, and with `accumulates` (gradients of several passes add up) so does one more set of gradients.
    """

    def __init__(self, run, model, accumulates):
        self.run, self.accumulates, self.graph = run, accumulates, None
        self.params = list(model.parameters())

    def __call__(self, x, y, documents, divisor):
        assert documents == () and (self.graph is None or x.shape == self.inputs[0].shape)
        if self.graph is None:
            self.record(x, y, divisor)
        for recorded, value in zip(self.inputs, (x, y, divisor), strict=True):
            recorded.copy_(value)
        self.graph.replay()
        for p, grad in self.grads:
            if p.grad is not None:
                p.grad += grad
            else:
                p.grad = grad.clone() if self.accumulates else grad
        return self.loss

    def record(self, x, y, divisor):
        """Make the graph: it holds no values yet, and p.grad is None after it."""
        self.inputs, self.graph = [t.clone() for t in (x, y, divisor)], torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # not recorded: libraries choose kernels and set themselves up on this stream
            self.run(x, y, (), divisor)
            self.take_gradients()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph, stream=stream):
            self.loss = self.run(*self.inputs[:2], (), self.inputs[2])
        self.grads = self.take_gradients()

    def take_gradients(self):
        """[(parameter, gradient)], where there is one; none stays in p.grad."""
        grads = [(p, p.grad) for p in self.params if p.grad is not None]
        for p, _ in grads:
            p.grad = None
        return grads
