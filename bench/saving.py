"""How long training waits for a checkpoint: written at once, and in the background, for each mode of the optimizer.

    python bench/saving.py [--modes=MODE,...] [--saves=N] [--folder=DIR] [--out=FILE.json] [--key=value ...]

Llama-3.2-1B's shape on random tokens on a GPU (a checkpoint of 17 GB with fp32_master), a small model on a CPU. Each
mode saves its state once at once, and then --saves times in the background, while steps go on until all is written.
What training waits for a save is the time of these steps beyond as many undisturbed ones (the median of the 20 just
before and after). The files of the first save in the background must equal those written at once. Exit status 1 if
they do not, or if training waits on average 5% of a save at once or more.
"""

import json
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import attention
import checkpoint
import configurator
import model as models
from optim import AdamW
from plumbing import entry, logs
from plumbing.compiling import compile_and_checkpoint
from plumbing.ranks import find_ranks

ALLOWED = 0.05  # of the time of a save at once
MODES = {"fp32_master": ["--optim.weights=fp32_master"],
         "fp32_master_fp8_moments": ["--optim.weights=fp32_master", "--optim.fp8_moments=True"],
         "stochastic_rounding": ["--optim.weights=stochastic_rounding"],
         "fp8_moments": ["--optim.weights=stochastic_rounding", "--optim.fp8_moments=True"],
         "plain": ["--optim.weights=plain"]}
SHAPES = {"cuda": dict(vocab_size=128256, n_layer=16, n_embd=2048, n_head=32, n_kv_head=8, head_dim=64, ffn_dim=8192,
                       block_size=4096, tie_embeddings=True),
          "cpu": dict(vocab_size=4096, n_layer=2, n_embd=128, n_head=2, n_kv_head=2, head_dim=64, ffn_dim=512,
                      block_size=64)}


def hashes(out_dir, step):
    """The lines of SHA256SUMS of the files with tensors."""
    lines = Path(out_dir, "checkpoints", f"step_{step:08d}", "SHA256SUMS").read_text().splitlines()
    return [line for line in lines if line.endswith(".distcp")]


def measure(config, mode, ranks, folder, saves):
    """The row of a mode."""
    model = models.on_meta(config.model).to(getattr(torch, config.dtype))
    attention.select_kernel(model, config, ranks.device)
    compile_and_checkpoint(model, config.compile, config.activation_checkpoint)
    model.to_empty(device=ranks.device)
    models.init_weights(model, config.seed)
    optimizer = AdamW(model, config.optim, seed=config.seed, compiled=config.compile.enabled)
    shape = config.micro_batch_size, config.model.block_size
    x = torch.randint(config.model.vocab_size, shape, device=ranks.device)

    def step(saver=None):
        model(x, x, config.loss_chunks).div(x.numel()).backward()
        norm = optimizer.grad_norm()
        if saver:
            saver.before_update()
        optimizer.step(1e-5, norm)

    def seconds(action):
        begin = ranks.now()
        action()
        return ranks.now() - begin

    def train_while_saving(number):
        """Number of steps."""
        in_background.save(number, {})
        steps = 0
        while in_background.written:  # before_update() clears it when all is written
            step(in_background)
            steps += 1
        return steps

    for _ in range(3):  # compiles
        step()
    at_once, in_background = (checkpoint.Saver(folder, model, optimizer, print, keep=1, background=background)
                              for background in (False, True))
    pinning_s = seconds(in_background.room.result)
    undisturbed = [seconds(step) for _ in range(10)]
    at_once_s = seconds(lambda: at_once.save(1, {}))
    files = [path.stat().st_size for path in Path(folder, "checkpoints", "step_00000001").iterdir()]
    first, rows = hashes(folder, 1), []
    for number in range(2, 2 + saves):
        begin = ranks.now()
        steps = train_while_saving(number)
        beside_s = ranks.now() - begin
        if number == 2:
            equal = first == hashes(folder, 2)
        before, undisturbed = undisturbed, [seconds(step) for _ in range(10)]
        step_s = statistics.median(before + undisturbed)
        rows.append({"beside_s": beside_s, "steps": steps, "step_ms": 1000 * step_s,
                     "training_waits_s": beside_s - steps * step_s})
    in_background.wait()
    waits = [row["training_waits_s"] for row in rows]
    return {"mode": mode, "parameters": sum(p.numel() for p in model.parameters()), "checkpoint_gb": sum(files) / 1e9,
            "pinning_s": pinning_s, "at_once_s": at_once_s, "saves": rows, "training_waits_s": statistics.mean(waits),
            "share": statistics.mean(waits) / at_once_s, "equal": equal}


def main():
    parser = entry.Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", default=",".join(MODES), help=f"some of {', '.join(MODES)}")
    parser.add_argument("--saves", type=int, default=3, help="saves in the background (3)")
    parser.add_argument("--folder", type=Path, help="folder to save in, on the disk to measure")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args, keys = parser.parse_known_args()
    ranks, rows = find_ranks(), []
    on_gpu = ranks.device.type == "cuda"
    sizes = [f"--model.{key}={value}" for key, value in SHAPES[ranks.device.type].items()]
    for mode in args.modes.split(","):
        config = configurator.load([*sizes, f"--compile.enabled={on_gpu}", *MODES[mode], *keys])
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            row = measure(config, mode, ranks, folder, args.saves)
        rows.append(row)
        waits = [save["training_waits_s"] for save in row["saves"]]
        print(f"{mode}: {row['checkpoint_gb']:.2f} GB in {row['at_once_s']:.2f} s at once; in the background training "
              f"waits {row['training_waits_s']:.3f} s ({row['share']:.1%}; {min(waits):.3f} to {max(waits):.3f} s)"
              f"{'' if row['equal'] else '; THE FILES DIFFER'}", flush=True)
        if args.out:
            args.out.write_text(json.dumps({
                "hardware": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
                "date": date.today().isoformat(), **logs.provenance(), "rows": rows}, indent=1))
        torch.cuda.empty_cache()
    sys.exit(any(row["share"] >= ALLOWED or not row["equal"] for row in rows))


if __name__ == "__main__":
    entry.run(main)
