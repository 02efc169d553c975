"""nanochat's FP8 against torchao's, in nanofp8's own training: the same model, data, optimizer and compiler.

    git clone https://github.com/karpathy/nanochat
    python bench/peers/nanochat_fp8.py --nanochat=nanochat [CONFIG.py] [--key=value ...] [--variants=tensorwise]

Each variant (bench.py's, tensorwise with keys of its own behind colons) trains twice, in a process each: as train.py
does it, and with the three matmuls of every converted layer computed by nanochat/fp8.py, which is imported from the
clone. Sharded weights stay in bf16: nanochat gathers none in FP8. Writes out_dir/bench.json with bench.py's columns.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bench
import train
from plumbing import entry
from plumbing.errors import UserError

CLONE = "--clone="  # first argument of a process that trains with nanochat's FP8; behind it the clone's folder


@dataclass(kw_only=True)
class PeerConfig:
    """What bench/peers/nanochat_fp8.py does."""

    nanochat: str = "nanochat"  # folder of a clone of nanochat
    variants: str = "tensorwise"  # what to train twice
    steps: int = 20  # timed steps of each
    warmup: int = 10  # steps before them

    def problems(self):
        """Yield ({keys involved}, message) for each value that cannot be used."""
        yield from bench.BenchConfig(variants=self.variants, steps=self.steps, warmup=self.warmup).problems()
        if not Path(self.nanochat, "nanochat", "fp8.py").is_file():
            yield {"nanochat"}, (f"--nanochat={self.nanochat}: no nanochat/fp8.py in it: git clone "
                                 "https://github.com/karpathy/nanochat, and name its folder")
        if wrong := [v for v in bench.split(self.variants) if v.partition(":")[0] != "tensorwise"]:
            yield {"variants"}, f"--variants: nanochat has tensorwise FP8 only, not {', '.join(wrong)}"


def use_nanochat(clone):
    """Let every Float8Linear of this process compute by nanochat's autograd function."""
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
    prepared = bench.prepare(own, "llama_fp8.py")
    if prepared is None:
        return
    config, base = prepared
    if bench.on_cpu(config):
        raise UserError("this comparison needs a GPU: on a CPU our FP8 is emulated, and nanochat emulates none")
    whole = "fp8.enable_fsdp_float8_all_gather=False:fp8.precompute_float8_dynamic_scale_for_fsdp=False"
    programs = {"torchao": bench.TRAIN, "nanochat": (Path(__file__).resolve(), CLONE + own.nanochat)}
    runs = [(f"{name}, {variant}", f"{variant}:{whole}", program) for variant in bench.split(own.variants)
            for name, program in programs.items()]
    path = base.parent / "bench.json"
    rows = bench.compare(runs, base, own, path)[0]["rows"]
    print("", bench.table(rows, bench.COLUMNS), "", sep="\n")
    print(f"speedup is against {rows[0]['variant']}; written: {path}")
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    entry.run(main)
