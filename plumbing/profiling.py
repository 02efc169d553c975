"""Where the time and the memory of one step go: a torch.profiler trace, and the CUDA allocator's history."""

import torch

from plumbing.errors import UserError


class StepRecorder:
    """Records the steps that profile_step and memory_step of a configurator.Config name, on rank 0.

    Raises UserError if memory_step is set and there is no GPU.
    """

    def __init__(self, config, out_dir, ranks):
        if config.memory_step and ranks.device.type != "cuda":
            raise UserError("memory_step records the memory of a GPU, this run is on the cpu: set memory_step=0")
        self.profile_step, self.memory_step = (config.profile_step, config.memory_step) if ranks.is_main else (0, 0)
        self.out_dir, self.ranks, self.profile = out_dir, ranks, None

    def begin(self, step):
        """Before a step."""
        if step == self.memory_step:
            torch.cuda.memory._record_memory_history()
        if step == self.profile_step:
            self.ranks.now()  # the trace holds nothing of the step before
            self.profile = torch.profiler.profile(record_shapes=True)
            self.profile.start()

    def end(self, step):
        """After a step: write what was recorded, and say where it is."""
        if step == self.profile_step:
            self.ranks.now()
            self.profile.stop()
            trace = self.out_dir / f"trace_step{step}.json.gz"
            self.profile.export_chrome_trace(str(trace))
            self.ranks.say(f"trace of step {step}: {trace}, to open at https://ui.perfetto.dev")
        if step == self.memory_step:
            snapshot = self.out_dir / f"memory_step{step}.pickle"
            torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
            self.ranks.say(f"memory of step {step}: {snapshot}, to open at https://docs.pytorch.org/memory_viz")
