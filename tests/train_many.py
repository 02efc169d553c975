"""Several runs of train.py in one process (group), to pay for imports and rendezvous once.

    [torchrun ...] tests/train_many.py RUNS.json     # a list of lists of arguments, one list a run
"""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from plumbing import entry

for argv in json.loads(Path(sys.argv[1]).read_text()):
    torch._dynamo.reset()
    torch._inductor.config.emulate_precision_casts = False  # the rowwise recipe turns it on for its process
    sys.argv = ["train.py", *argv]
    train.main()
    if int(os.environ.get("RANK", 0)) == 0:
        print("---- end of a run ----", flush=True)
entry.leave()
