"""CUDA-graph capture of a forward and backward pass: one launch instead of hundreds.

Python needs about 10 microseconds to launch a kernel, and FP8 has twice as many as bf16. At 8B they run longer than
that; at 100M most are shorter, and the GPU waits. Source: "Whole-network capture" in PyTorch's notes on CUDA semantics.
"""

import torch

from plumbing.errors import UserError


def check(config, n_shards, device):
    """Raise UserError if a configurator.Config asks for a graph that cannot be captured. n_shards: 0 without FSDP2."""
    require(config, device.type == "cuda", "there is no GPU here")
    require(config, not n_shards, "FSDP2's communication cannot be captured: use one rank, shard_one_rank=False")
    window, mode = config.model.sliding_window, config.compile.mode
    require(config, not window or window >= config.model.block_size, "a sliding window has new shapes in every batch")
    torch_captures = config.compile.enabled and mode in ("reduce-overhead", "max-autotune")
    require(config, not torch_captures, f"compile.mode={mode} captures graphs of its own")
    measures = config.eval_interval or config.fp8.enabled and config.fp8.stats_interval
    if torch_captures and device.type == "cuda" and measures:
        raise UserError(f"compile.mode={mode} captures a graph of each block, and torch {torch.__version__} overwrites "
                        "one's results in evaluations and measurements of FP8 health: set compile.mode=default, with "
                        "cuda_graph=True on one GPU, or eval_interval=0 and fp8.stats_interval=0")


def check_rows(config, rows):
    """Raise UserError if rows (data.Rows) consist of documents: their number and lengths change from batch to batch."""
    require(config, rows.row(0)[2] is None, "rows of several documents have new shapes in every batch")


def require(config, condition, problem):
    if config.cuda_graph and not condition:
        raise UserError(f"cuda_graph=True: {problem}; or set cuda_graph=False")


class GraphedPass:
    """A function `run_pass(x, y, (), divisor)` that computes a loss and calls backward, captured at its first call.

    x, y: (B, T) int64, divisor: a 0-d tensor; only their values may change. Returns the loss, which the next call
    overwrites, and adds to p.grad. Reserves the memory of a pass, with `accumulates` of one more set of gradients.
    """

    def __init__(self, run_pass, model, accumulates):
        self.run_pass, self.accumulates, self.graph = run_pass, accumulates, None
        self.params = list(model.parameters())

    def __call__(self, x, y, documents, divisor):
        assert documents == () and (self.graph is None or x.shape == self.inputs[0].shape)
        if self.graph is None:
            self.capture(x, y, divisor)
        for captured, value in zip(self.inputs, (x, y, divisor), strict=True):
            captured.copy_(value)
        self.graph.replay()
        for p, grad in self.grads:
            if p.grad is not None:
                p.grad += grad
            else:
                p.grad = grad.clone() if self.accumulates else grad
        return self.loss

    def capture(self, x, y, divisor):
        """Capture the graph, without running it; p.grad is None afterwards."""
        self.inputs, self.graph = [t.clone() for t in (x, y, divisor)], torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a warm-up, in which libraries choose kernels and allocate workspaces
            self.run_pass(x, y, (), divisor)
            self.take_gradients()
        torch.cuda.current_stream().wait_stream(stream)
        # thread_local: the thread that saves checkpoints may pin memory meanwhile
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.loss = self.run_pass(*self.inputs[:2], (), self.inputs[2])
        self.grads = self.take_gradients()

    def take_gradients(self):
        """Move all gradients out of p.grad: [(parameter, gradient)] of the parameters that have one."""
        grads = [(p, p.grad) for p in self.params if p.grad is not None]
        for p, _ in grads:
            p.grad = None
        return grads
