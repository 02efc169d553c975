"""Several runs of train.py in one process (group), to pay for imports and rendezvous once.

    [torchrun ...] tests/train_many.py RUNS.json     # [[arguments, whether compiled graphs are only traced], ...]

Traced: torch.compile captures, decomposes and partitions every graph, and the pieces run eager. What is left out is
Inductor's code generation, which on a CPU is a C++ compiler at work for half a minute a run.
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from plumbing import entry

torch_compile = torch.compile
traced_compile = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
for argv, traced in json.loads(Path(sys.argv[1]).read_text()):
    torch.compile = traced_compile if traced else torch_compile
    torch._dynamo.reset()
    torch._inductor.config.emulate_precision_casts = False  # the rowwise recipe turns it on for its process
    sys.argv = ["train.py", *argv]
    train.main()
    if int(os.environ.get("RANK", 0)) == 0:
        print("---- end of a run ----", flush=True)
entry.leave()
