"""Tokens per second of sample.py, on a model of the right shape with random weights, against the memory's speed.

    python bench/sampling.py [--model=llama3_1_8b] [--tokens=200] [--prompts 16 2048] [--out=FILE.json]

Each new token reads every weight once, so memory bandwidth is the bound. It is measured here by reading the weights
alone: the sum of each. "compiled" is sample.py with torch.compile over the pass that its CUDA graph holds, "uncached"
reads the whole context for every token.
"""

import datetime
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model as models
import sample
from plumbing import entry
from plumbing.disk import replace_text


def tokens_per_s(model, n_prompt, n_tokens, temperature=0.0):
    """Speed after the first two tokens, which read the prompt and capture the graph."""
    generator, times = torch.Generator(model.cos.device).manual_seed(1), []
    for _ in sample.generate(model, [1] * n_prompt, n_tokens, temperature, 50, generator):
        times.append(time.perf_counter())
    return (len(times) - 2) / (times[-1] - times[1])


@torch.no_grad()
def bandwidth(weights):
    """GB/s of reading these tensors."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        sum(p.view(torch.int32).amax() if p.is_cuda else p.sum() for p in weights).item()
        best = min(best, time.perf_counter() - start)
    return sum(p.nbytes for p in weights) / 1e9 / best


def main():
    parser = entry.Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama3_1_8b", help="a model of model.py (llama3_1_8b)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate (200)")
    parser.add_argument("--prompts", type=int, nargs="*", default=[16, 2048], help="lengths of prompts (16 2048)")
    parser.add_argument("--out", default="sampling.json", help="the results (sampling.json)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.on_meta(getattr(models, args.model)()).to(torch.bfloat16).to_empty(device=device)
    models.init_weights(model, 1)
    weights = [p for name, p in model.named_parameters(remove_duplicate=False) if name != "embed.weight"]
    gigabytes, speed = sum(p.nbytes for p in weights) / 1e9, bandwidth(weights)
    rows, run_token, logits = [], sample.Cache.run_token, sample.Cache.logits
    for variant in ("sample.py", "sample.py, temperature 0.7", "compiled", "uncached"):
        if variant == "compiled":
            torch._inductor.config.coordinate_descent_tuning = True  # a matrix times a vector as one reduction
            compiled = torch.compile(run_token, dynamic=False)
            sample.Cache.run_token = lambda self, *args, compiled=compiled: compiled(self, *args)
        if variant == "uncached":
            sample.Cache.logits = lambda self, tokens: self.model(torch.tensor([tokens], device=device))[0, -1].float()
        for n_prompt in args.prompts:
            start = time.perf_counter()
            rate = tokens_per_s(model, n_prompt, args.tokens, 0.7 if "0.7" in variant else 0.0)
            rows.append({"variant": variant, "prompt": n_prompt, "tokens_per_s": rate, "gb_per_s": rate * gigabytes,
                         "share_of_bandwidth": rate * gigabytes / speed, "seconds": time.perf_counter() - start})
            print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()),
                  flush=True)
        sample.Cache.run_token, sample.Cache.logits = run_token, logits
    result = {"hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
              "versions": {"torch": version("torch")}, "date": str(datetime.date.today()),
              "command": "python bench/sampling.py " + " ".join(sys.argv[1:]), "model": args.model,
              "gigabytes_per_token": gigabytes, "bandwidth_gb_per_s": speed, "rows": rows}
    replace_text(Path(args.out), json.dumps(result, indent=1))
    print(f"reading the weights alone: {speed:,.0f} GB/s, {speed / gigabytes:.1f} tokens/s")


if __name__ == "__main__":
    entry.run(main)
