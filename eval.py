"""HellaSwag accuracy of a checkpoint, or of a Hugging Face model folder.

    [torchrun --nproc-per-node=N] eval.py --from=DIR [--data=FILE.jsonl] [--tokenizer=NAME] [--limit=N]
        [--out=SCORES.jsonl]

A question's prediction is the ending whose tokens are likeliest given the context: by the sum of their
log-probabilities (acc), or by that sum over the ending's length in characters (acc_norm, the usual number to quote).
Ranks share the questions; each holds the whole model, in the precision that its weights are stored in.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import data
from formats import hellaswag
from model import IGNORE, check_ids
from plumbing import entry
from plumbing.errors import RunStopped, UserError
from sample import load_model

TOKENS = {"cuda": 8192, "cpu": 1024}  # of a forward pass: enough to be busy, and few enough for their logits


@torch.no_grad()
def score(model, questions, sequences, *, device, rank, world_size, reduce):
    """Rows for --out: {ind, label, loglikelihood, pred, pred_norm} of each question. Every rank must call it.

    Sequences of like length go through the model together, padded to a multiple of 16 (FP8 matmuls need it), the
    longest first, so that a model too large fails at once. Ranks take turns and make equally many forward passes, since
    under FSDP each is a collective. sequences: hellaswag.sequences(...) of the questions, no longer than block_size.
    reduce: sums a tensor over all ranks in place, and returns it.
    """
    block_size = model.cfg.block_size
    order, batches = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0])), []
    while order:
        length = min(block_size, -(-(len(sequences[order[0]][0]) - 1) // 16) * 16)
        n = max(1, TOKENS[device.type] // length)
        batches.append((length, order[:n]))
        order = order[n:]
    sums = torch.zeros(len(sequences), dtype=torch.float64, device=device)
    turns = math.ceil(len(batches) / world_size)
    for turn in tqdm(range(turns), desc="HellaSwag", unit="batch", leave=False, disable=None if rank == 0 else True):
        mine = turn * world_size + rank
        length, batch = batches[min(mine, len(batches) - 1)]
        x, y = np.zeros((len(batch), length), np.int64), np.full((len(batch), length), IGNORE)
        for row, (ids, start) in enumerate(sequences[i] for i in batch):
            x[row, : len(ids) - 1], y[row, start - 1 : len(ids) - 1] = ids[:-1], ids[start:]
        rows, columns = np.nonzero(y != IGNORE)  # found here: asking a GPU would stall it
        logits = model(torch.from_numpy(x).to(device))[rows, columns]  # (targets of all endings, V)
        losses = F.cross_entropy(logits.float(), torch.from_numpy(y[rows, columns]).to(device), reduction="none")
        if mine < len(batches):  # else this rank only keeps the others company
            sums.index_add_(0, torch.tensor(batch)[rows].to(device), -losses.double())
    sums, found, at = reduce(sums).tolist(), [], 0
    for q in questions:
        likelihood = sums[at : at + len(q["endings"])]
        at += len(likelihood)
        normed = [value / max(1, len(ending)) for value, ending in zip(likelihood, q["endings"], strict=True)]
        found.append({"ind": q["ind"], "label": q["label"], "loglikelihood": likelihood,
                      "pred": int(np.argmax(likelihood)), "pred_norm": int(np.argmax(normed))})
    return found


def accuracies(rows):
    """(acc, acc_norm) of scored questions; nan where the model gives nan, which argmax takes for the likeliest."""
    if not all(math.isfinite(value) for row in rows for value in row["loglikelihood"]):
        return math.nan, math.nan
    return tuple(float(np.mean([row[key] == row["label"] for row in rows])) for key in ("pred", "pred_norm"))


def main():
    parser = entry.Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="folder", required=True, type=os.path.expanduser,
                        help="out_dir of a run of train.py, or a model folder")
    parser.add_argument("--data", type=os.path.expanduser,
                        help="questions as JSONL (default: HellaSwag's validation, downloaded if need be)")
    parser.add_argument("--limit", type=int, default=0, help="score the first N questions; 0: all (0)")
    parser.add_argument("--out", type=os.path.expanduser, help="write a row for each question to this JSONL file")
    parser.add_argument("--tokenizer", help="as data.tokenizer, for a model folder that holds none")
    args = parser.parse_args()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    out = Path(args.out) if args.out else None
    mistakes = [told for wrong, told in (
        (not Path(args.folder).is_dir(), f"--from={args.folder}: no such folder"),
        (args.limit < 0, f"--limit={args.limit} must not be negative"),
        (args.data and not Path(args.data).is_file(), f"--data={args.data}: no such file"),
        (out and (out.is_dir() or not os.access(out if out.exists() else out.absolute().parent, os.W_OK)),
         f"--out={out}: name a file that can be written, in a folder that exists")) if wrong]
    if mistakes:
        raise UserError("\n".join(mistakes))
    if rank > 0:
        checkpoint.barrier()
    path = args.data or hellaswag.download("hellaswag_val.jsonl", data.DataConfig().cache_dir)
    if rank == 0:
        checkpoint.barrier()
    if not (questions := hellaswag.read([path])[: args.limit or None]):
        raise UserError(f"{path} holds no question to score")
    model, encoding, config = load_model(args.folder, device, args.tokenizer)
    sequences = hellaswag.sequences(encoding, questions, config.model.block_size)
    check_ids(config.model, max(ids.max() for ids, _ in sequences))

    def reduce(sums):
        if world_size > 1:
            dist.all_reduce(sums)
        return sums

    rows = score(model, questions, sequences, device=device, rank=rank, world_size=world_size, reduce=reduce)
    if rank == 0:
        acc, acc_norm = accuracies(rows)
        if math.isnan(acc):
            raise RunStopped(f"{args.folder}: the model gives nan, which has no accuracy")
        error = math.sqrt(acc_norm * (1 - acc_norm) / len(rows))  # of drawing this many questions
        print(f"{len(rows):,} questions: acc {acc:.4f}, acc_norm {acc_norm:.4f} (standard error {error:.4f})")
        if out:
            out.write_text("".join(json.dumps(row) + "\n" for row in rows))
            print(f"written: {out}")


if __name__ == "__main__":
    entry.run(main)
