"""HellaSwag accuracy of a checkpoint, or of a Hugging Face model folder; and how train.py evaluates.

    [torchrun --nproc-per-node=N] eval.py --from=DIR [--data=FILE.jsonl] [--tokenizer=NAME] [--limit=N]
        [--out=SCORES.jsonl]

The prediction is the ending whose tokens are likeliest given the context: by the sum of their log-probabilities (acc),
or by that sum over the ending's length in characters (acc_norm, the number usually quoted). Ranks share the questions;
each holds the whole model, in the dtype that the folder's config.json names (float16 too), or that the run trained in.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from formats import files, hellaswag
from model import IGNORE, check_ids
from plumbing import entry, logs
from plumbing.errors import RunStopped, UserError
from plumbing.ranks import find_ranks, join_process_group, progress_bar
from plumbing.sharding import reshard
from sample import load_model

TOKENS = {"cuda": 8192, "cpu": 1024}  # per forward pass: enough to keep the device busy, and their logits fit in memory


class HellaSwag:
    """The questions of hellaswag.read, tokenized once, to score models on. `largest` is the largest token id."""

    def __init__(self, questions, encoding, block_size, ranks):
        self.questions, self.block_size, self.ranks = questions, block_size, ranks
        # of every ending of every question, in order: ids, index of the ending's first id
        encoded = [hellaswag.encode(encoding, question["query"], ending, block_size)
                   for question in questions for ending in question["endings"]]
        self.sequences = [(ids, start) for ids, start, _ in encoded]
        if n_cut := sum(cut > 0 for *_, cut in encoded):
            ranks.say(f"HellaSwag: {n_cut:,} of {len(encoded):,} endings with their context are longer than "
                      f"model.block_size={block_size}, and lose their beginning")
        self.largest = max(ids.max() for ids, _ in self.sequences)

    def batches(self):
        """Yield (length, indices into sequences) of every forward pass: sequences of similar length, longest first.

        A model that is too large then fails at once. Lengths are multiples of 16, as FP8 matmuls need them.
        """
        order = sorted(range(len(self.sequences)), key=lambda i: -len(self.sequences[i][0]))
        while order:
            longest = len(self.sequences[order[0]][0]) - 1  # the last id is a target only
            length = min(self.block_size, math.ceil(longest / 16) * 16)
            n = max(1, TOKENS[self.ranks.device.type] // length)
            yield length, order[:n]
            order = order[n:]

    @torch.no_grad()
    def score(self, model):
        """Rows for --out: {ind, label, loglikelihood, pred, pred_norm} of each question. Every rank must call it.

        Ranks take turns and make equally many forward passes, since under FSDP each is a collective.
        """
        ranks, device, batches = self.ranks, self.ranks.device, list(self.batches())
        sums = torch.zeros(len(self.sequences), dtype=torch.float64, device=device)
        for turn in progress_bar(range(0, len(batches), ranks.world_size), "HellaSwag", "batch"):
            mine = turn + ranks.rank
            length, batch = batches[min(mine, len(batches) - 1)]
            x, y = np.zeros((len(batch), length), np.int64), np.full((len(batch), length), IGNORE)
            for row, i in enumerate(batch):
                ids, start = self.sequences[i]
                x[row, : len(ids) - 1], y[row, start - 1 : len(ids) - 1] = ids[:-1], ids[start:]
            rows, columns = np.nonzero(y != IGNORE)  # on the CPU: a GPU would have to sync
            with torch.compiler.set_stance("force_eager"):  # rows of many lengths, each would compile a graph
                logits = model(torch.from_numpy(x).to(device))[rows, columns]  # (targets of all endings, V)
            targets = torch.from_numpy(y[rows, columns]).to(device)
            losses = F.cross_entropy(logits.float(), targets, reduction="none")
            ranks.watchdog.progress()
            if mine < len(batches):  # else another rank has this batch, and this pass only joins the collectives
                sums.index_add_(0, torch.tensor(batch)[rows].to(device), -losses.double())
        reshard(model)
        n_endings, scored = [len(question["endings"]) for question in self.questions], []
        for question, part in zip(self.questions, ranks.sum(sums).split(n_endings), strict=True):
            likelihood, lengths = part.tolist(), [max(1, len(ending)) for ending in question["endings"]]
            normed = np.divide(likelihood, lengths)
            scored.append({"ind": question["ind"], "label": question["label"], "loglikelihood": likelihood,
                           "pred": int(np.argmax(likelihood)), "pred_norm": int(np.argmax(normed))})
        return scored


def accuracies(rows):
    """(acc, acc_norm) of scored questions; nan if any likelihood is not finite, which argmax would prefer."""
    if not all(math.isfinite(value) for row in rows for value in row["loglikelihood"]):
        return math.nan, math.nan
    return tuple(float(np.mean([row[key] == row["label"] for row in rows])) for key in ("pred", "pred_norm"))


class Evaluation:
    """What train.py measures a model by: validation loss on data.Rows, and HellaSwag if the config asks for it.

    Make it on rank 0 first, as it may download questions. `largest` is the largest token id of all.
    """

    def __init__(self, config, rows, encoding, ranks):
        self.config, self.rows, self.ranks, self.hellaswag, self.largest = config, rows, ranks, None, rows.largest
        if config.eval_hellaswag_items:
            questions = hellaswag.questions(config.data)[1][: config.eval_hellaswag_items]
            self.hellaswag = HellaSwag(questions, encoding, config.model.block_size, ranks)
            self.largest = max(self.largest, self.hellaswag.largest)

    @torch.no_grad()
    def __call__(self, model):
        """(metrics row, line for the screen) of a model. Every rank must call it.

        The validation loss is the mean over the targets of eval_sequences rows, in nats per token.
        """
        config, ranks = self.config, self.ranks
        totals = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, targets
        for batch in data.eval_batches(self.rows, n=config.eval_sequences, rank=ranks.rank,
                                       world_size=ranks.world_size, micro_batch_size=config.micro_batch_size):
            x, y, documents = data.on_device(*batch, self.rows, ranks.device)
            totals[0] += model(x, y, config.loss_chunks, *documents)
            totals[1] += (y != IGNORE).sum()
            ranks.watchdog.progress()
        reshard(model)
        loss, n_targets = ranks.sum(totals).tolist()
        loss /= max(1, n_targets)
        row, line = {"val_loss": logs.number(loss)}, f"validation loss {loss:.4f} nats per token"
        if self.hellaswag:
            acc, acc_norm = accuracies(self.hellaswag.score(model))
            row |= {"hellaswag_acc": logs.number(acc), "hellaswag_acc_norm": logs.number(acc_norm)}
            line += f" | HellaSwag, {len(self.hellaswag.questions):,} questions: acc {acc:.4f}, acc_norm {acc_norm:.4f}"
        return row, line


def main():
    parser = entry.Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="folder", required=True, type=entry.path,
                        help="out_dir of a run of train.py, or a model folder")
    parser.add_argument("--data", type=entry.path,
                        help="questions as JSONL (HellaSwag's validation set, downloaded if need be)")
    parser.add_argument("--limit", type=int, default=0, help="score the first N questions; 0: all (0)")
    parser.add_argument("--out", type=entry.path, help="write a row for each question to this JSONL file")
    parser.add_argument("--tokenizer", type=entry.path, help="as data.tokenizer, for a model folder that has none")
    args = parser.parse_args()
    ranks, out = find_ranks(), Path(args.out) if args.out else None
    if ranks.world_size > 1:
        join_process_group(ranks)
    if not Path(args.folder).is_dir():
        raise UserError(f"--from={args.folder}: no such folder")
    if args.limit < 0:
        raise UserError(f"--limit={args.limit} must not be negative")
    if args.data:
        paths, _ = files.find_files([args.data], files.ROWS)
    else:
        with ranks.node_first():
            paths = [hellaswag.download("hellaswag_val.jsonl", data.DataConfig().cache_dir)]
    if out:
        files.check_out(out, paths)
    questions = hellaswag.read(paths)[: args.limit or None]
    if not questions:
        raise UserError(f"{paths[0]} holds no question to score")
    model, encoding, config = load_model(args.folder, ranks.device, args.tokenizer)
    benchmark = HellaSwag(questions, encoding, config.model.block_size, ranks)
    check_ids(config.model, benchmark.largest)
    rows = benchmark.score(model)
    if not ranks.is_main:
        return
    acc, acc_norm = accuracies(rows)
    if math.isnan(acc):
        raise RunStopped(f"{args.folder}: the model gives nan or inf, so it has no accuracy")
    error = math.sqrt(acc_norm * (1 - acc_norm) / len(rows))  # binomial
    print(f"{len(rows):,} questions: acc {acc:.4f}, acc_norm {acc_norm:.4f} (standard error {error:.4f})")
    if out:
        out.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"written: {out}")


if __name__ == "__main__":
    entry.run(main)
