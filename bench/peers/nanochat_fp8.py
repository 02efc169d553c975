"""Compare nanochat's FP8 with torchao's in nanofp8's training: same model, data, optimizer and compiler.

    git clone https://github.com/karpathy/nanochat
    python bench/peers/nanochat_fp8.py --nanochat=nanochat [CONFIG.py] [--key=value ...] [--variants=tensorwise]

Each variant (as for bench.py: tensorwise, with more keys after colons) is trained twice, each in its own process: as
train.py does, and with nanochat/fp8.py, imported from the clone, computing the three matmuls of every converted layer.
Weights are gathered in bf16, as nanochat has no FP8 all-gather. Writes out_dir/bench.json with bench.py's columns.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bench
import train
from plumbing import entry, logs
from plumbing.errors import UserError

CLONE = "--clone="  # the first argument of a process that trains with nanochat's FP8: --clone=FOLDER


@dataclass(kw_only=True)
class PeerConfig:
    """Keys of bench/peers/nanochat_fp8.py."""

    nanochat: str = "nanochat"  # folder of a clone of nanochat
    variants: str = "tensorwise"  # what to train with both
    steps: int = 20  # timed steps of each run
    warmup: int = 10  # steps before they are timed

    def problems(self):
        """Yield a message for each value that cannot be used."""
        yield from bench.BenchConfig(variants=self.variants, steps=self.steps, warmup=self.warmup).problems()
        if not Path(self.nanochat, "nanochat", "fp8.py").is_file():
            yield (f"--nanochat={self.nanochat}: no nanochat/fp8.py in it: git clone "
                   "https://github.com/karpathy/nanochat, and name its folder")
        if wrong := [v for v in bench.split(self.variants) if v.partition(":")[0] != "tensorwise"]:
            yield f"--variants: nanochat has tensorwise FP8 only, not {', '.join(wrong)}"


def use_nanochat(clone):
    """Replace the forward of every Float8Linear in this process by nanochat's autograd function."""
    from torchao.float8.float8_linear import Float8Linear

    sys.path.insert(0, str(Path(clone).resolve()))
    from nanochat.fp8 import _Float8Matmul

    def forward(linear, x):
        y = _Float8Matmul.apply(x.reshape(-1, x.shape[-1]), linear.weight).view(*x.shape[:-1], -1)
        return y if linear.bias is None else y + linear.bias

    Float8Linear.forward = forward


def main():
    if sys.argv[1:] and sys.argv[1].startswith(CLONE):
        use_nanochat(sys.argv.pop(1).removeprefix(CLONE))
        return train.main()
    own = PeerConfig()
    config, base = bench.prepare(own, "llama_fp8.py")
    if bench.on_cpu(config):
        raise UserError("this comparison needs a GPU: nanochat has no emulated FP8 for a CPU")
    bf16_gather = "fp8.enable_fsdp_float8_all_gather=False:fp8.precompute_float8_dynamic_scale_for_fsdp=False"
    programs = {"torchao": [bench.TRAIN], "nanochat": [Path(__file__).resolve(), CLONE + own.nanochat]}
    runs = {f"{name}, {variant}": [*program, base, *bench.flags(f"{variant}:{bf16_gather}")]
            for variant in bench.split(own.variants) for name, program in programs.items()}
    path = base.parent / "bench.json"
    rows = bench.compare(runs, own, path)["rows"]
    print("", logs.table(rows, bench.COLUMNS), "", sep="\n")
    print(f"speedup is relative to {rows[0]['variant']}; written: {path}")
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    entry.run(main)
