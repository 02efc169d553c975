"""The picture of README: speed beside what others published, and loss over time, from JSON in docs/results.

    python bench/front_page.py [OUT.png]
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
BF16, FP8 = "#9a9a9a", "#0072B2"  # they differ in lightness too
OURS = {"nanofp8, 4 H200": "bench_4_gpus_llama_8b_fast.json", "nanofp8, 2 H100": "bench_2_gpus_llama_8b_fast.json"}


def read(name):
    return json.loads((RESULTS / name).read_text())


def speeds():
    """[(label, bf16, FP8)] in tokens per second per GPU, ours first; None where nothing was published."""
    rows = []
    for label, name in OURS.items():
        bf16, fp8 = read(name)["rows"]
        rows.append((label, bf16["tokens_per_s"], fp8["tokens_per_s"]))
    for row in read("published_speeds.json")["rows"]:
        watts = f" at {row['watts']} W" if "watts" in row else ""
        rows.append((f"{row['who']}, {row['gpus']}{watts}", row["bf16"], row["fp8"]))
    return rows


def draw_speeds(ax):
    rows = speeds()
    for place, (_, bf16, fp8) in enumerate(rows):
        ax.barh(place - 0.2, fp8, 0.38, color=FP8)
        ratio = f" ({fp8 / bf16:.2f}x)" if bf16 else ""
        ax.text(fp8 + 150, place - 0.2, f"{fp8:,.0f}{ratio}", va="center")
        if bf16:
            ax.barh(place + 0.2, bf16, 0.38, color=BF16)
            ax.text(bf16 + 150, place + 0.2, f"{bf16:,.0f}", va="center")
        else:
            ax.text(150, place + 0.2, "bf16 not published", va="center", color="#666666")
    ax.set_yticks(range(len(rows)), [label.replace(", ", "\n") for label, *_ in rows])
    for label in ax.get_yticklabels()[: len(OURS)]:
        label.set_fontweight("bold")
    ax.set(title="Training speed, Llama 8B", xlabel="tokens per second per GPU", xlim=(0, 19_500))
    ax.set_xticks(range(0, 16_000, 5000), [f"{n:,}" for n in range(0, 16_000, 5000)])
    ax.invert_yaxis()


def draw_losses(ax):
    report = read("parity_8b_2_gpus.json")
    for name, curve in report["curves"].items():
        is_fp8 = not name.startswith("bf16")
        minutes = [seconds / 60 for seconds in curve["val_time_s"]]
        ax.plot(minutes, curve["val_loss"], "o-" if is_fp8 else "s-", markersize=4,
                color=FP8 if is_fp8 else BF16, linewidth=2.5, zorder=3 if is_fp8 else 2)
        if name != "bf16 seed 1338":
            ax.annotate(f"{'FP8' if is_fp8 else 'bf16'}: {minutes[-1]:.1f} min", (minutes[-1], curve["val_loss"][-1]),
                        xytext=(-8 if is_fp8 else 16, -10), textcoords="offset points", va="top", ha="right",
                        fontweight="bold", color=FP8 if is_fp8 else "#666666")
    ax.set(title=f"The same {report['max_steps']} steps of an 8B model", xlim=(0, 8.3), ylim=(1.4, 3.4),
           xlabel="minutes of training on two H100s", ylabel="validation loss, nats per token")


def main(path):
    figure = Figure(figsize=(12, 5), layout="constrained")
    figure.set_facecolor("white")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    draw_speeds(left)
    draw_losses(right)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.title.set_fontsize(15)
    left.bar(0, 0, color=FP8, label="FP8")
    left.bar(0, 0, color=BF16, label="bf16")
    left.legend(loc="lower right", frameon=False, fontsize=12)
    right.plot([], [], "o-", color=FP8, linewidth=2.5, label="FP8")
    right.plot([], [], "s-", color=BF16, linewidth=2.5, label="bf16, two seeds")
    right.legend(loc="upper right", frameon=False, fontsize=12)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else RESULTS / "front_page.png")
