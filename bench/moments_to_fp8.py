"""A checkpoint of a run without optim.fp8_moments, for a run with it: moments of matrices rounded to FP8.

    python bench/moments_to_fp8.py OUT_DIR/checkpoints/step_N NEW_OUT_DIR

train.py refuses such a change in the middle of a run. parity.py --branch_at=N needs it, to give the variant
`bf16:optim.fp8_moments=True` the weights, moments and batches of the bf16 run:

    python bench/moments_to_fp8.py out/parity_157m/bf16_seed1/checkpoints/step_00000800 \\
        out/parity_157m/bf16_optim.fp8_moments=True_seed1
    python parity.py config/parity_157m.py --branch_at=800 --seed=1 --seeds=1 \\
        --variants=bf16,bf16:optim.fp8_moments=True
"""

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkpoint
import optim
from plumbing import entry
from plumbing.errors import UserError
from plumbing.storage import Reader

SEED = 0  # of stochastic rounding, which happens once here


def convert(state):
    """{name: tensor} of a checkpoint with the moments of matrices as FP8 values and the units of their blocks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in [name for name, tensor in state.items() if name.startswith("optim.exp_avg") and tensor.ndim == 2]:
        moment = state.pop(name).to(device, torch.float32)
        _, kind, weight = name.split(".", 2)
        second = kind == optim.MOMENTS[1]
        blocks = (moment.sqrt() if second else moment).view(-1, optim.fp8_block(moment.shape[1]))
        noise = optim.noise_like(blocks, SEED)[1 + second]
        values, units = torch.empty_like(blocks, dtype=torch.float8_e4m3fn), torch.empty_like(blocks[:, :1])
        optim.store_moment((values, units), blocks, torch.tensor(True, device=device), noise, nonzero=second)
        state[f"optim.{kind}_fp8.{weight}"] = values.view(moment.shape).cpu()
        state[f"optim.{kind}_unit.{weight}"] = units.view(len(moment), -1).cpu()


def main():
    parser = entry.Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoint to read")
    parser.add_argument("out_dir", type=Path, help="out_dir of the new run")
    args = parser.parse_args()
    if not (args.folder / ".metadata").is_file():  # an out_dir has a run.json, too
        raise UserError(f"{args.folder} is no checkpoint: name OUT_DIR/checkpoints/step_N")
    if (args.out_dir / "checkpoints").exists():
        raise UserError(f"{args.out_dir} holds checkpoints already: name a new folder")
    run = checkpoint.read_run(args.folder)
    reader = Reader(args.folder)
    metadata = reader.read_metadata().state_dict_metadata
    if any(name.startswith("optim.exp_avg_fp8.") for name in metadata):
        raise UserError(f"{args.folder}: its moments are in FP8 already")
    state = {name: torch.empty(saved.size, dtype=saved.properties.dtype) for name, saved in metadata.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    convert(state)
    checkpoint.save(args.out_dir, run.pop("step"), state, run, keep=0)


if __name__ == "__main__":
    entry.run(main)
