"""How long training waits for a checkpoint: written at once, and in the background, for each mode of the optimizer.

    python bench/saving.py [--modes=MODE,...] [--folder=DIR] [--out=FILE.json] [--key=value ...]

Llama-3.2-1B's shape on random tokens on a GPU (a checkpoint of 17 GB with fp32_master), a small model on a CPU. Each
mode saves its state at once, then the same state in the background, while steps go on until it is written. What
training waits for that is the time of these steps beyond as many undisturbed ones. The files of both must be equal.
Exit status 1 if they are not, or if training waits 5% of a save at once or more.
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


def measure(config, mode, ranks, folder):
    """The row of a mode."""
    with torch.device("meta"):
        model = models.Transformer(config.model).to(getattr(torch, config.dtype))
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

    for _ in range(3):  # compiles
        step()
    step_s = statistics.median(seconds(step) for _ in range(20))
    savers = [checkpoint.Saver(folder, model, optimizer, print, keep=0, background=background)
              for background in (False, True)]
    pinning_s = seconds(savers[1].room.result)
    at_once_s = seconds(lambda: savers[0].save(1, {}))

    def train_while_saving():
        nonlocal steps
        savers[1].save(2, {})
        while savers[1].written:  # before_update() clears it when all is written
            step(savers[1])
            steps += 1

    steps = 0
    beside_s = seconds(train_while_saving)
    savers[1].finish()
    files = list(Path(folder, "checkpoints", "step_00000001").iterdir())
    waits_s = beside_s - steps * step_s
    return {"mode": mode, "parameters": sum(p.numel() for p in model.parameters()), "step_ms": 1000 * step_s,
            "checkpoint_gb": sum(path.stat().st_size for path in files) / 1e9, "pinning_s": pinning_s,
            "at_once_s": at_once_s, "beside_s": beside_s, "steps_beside": steps, "training_waits_s": waits_s,
            "share": waits_s / at_once_s, "equal": hashes(folder, 1) == hashes(folder, 2)}


def main():
    parser = entry.Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", default=",".join(MODES), help=f"some of {', '.join(MODES)}")
    parser.add_argument("--folder", type=Path, help="folder to save in, on the disk to measure")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args, keys = parser.parse_known_args()
    ranks, rows = find_ranks(), []
    on_gpu = ranks.device.type == "cuda"
    sizes = [f"--model.{key}={value}" for key, value in SHAPES[ranks.device.type].items()]
    for mode in args.modes.split(","):
        config = configurator.load([*sizes, f"--compile.enabled={on_gpu}", *MODES[mode], *keys])
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            row = measure(config, mode, ranks, folder)
        rows.append(row)
        print(f"{mode}: {row['checkpoint_gb']:.2f} GB in {row['at_once_s']:.2f} s at once; in the background training "
              f"waits {row['training_waits_s']:.3f} s ({row['share']:.1%}) of {row['beside_s']:.2f} s"
              f"{'' if row['equal'] else '; THE FILES DIFFER'}", flush=True)
        if args.out:
            args.out.write_text(json.dumps({
                "hardware": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
                "date": date.today().isoformat(), **logs.provenance(), "rows": rows}, indent=1))
        torch.cuda.empty_cache()
    sys.exit(any(row["share"] >= ALLOWED or not row["equal"] for row in rows))


if __name__ == "__main__":
    entry.run(main)
