"""Documentation: the files, links, keys and tests that it names exist."""

import importlib
import json
import re
from dataclasses import fields, is_dataclass

import pytest
from conftest import REPO

from configurator import Config
from plumbing.schema import flat

SECTIONS = [f.name for f in fields(Config) if is_dataclass(f.type)]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted(REPO.glob("docs/*.md")))]
SCRIPTS = [p.read_text() for p in (*REPO.glob("*.py"), *REPO.glob("bench/**/*.py"))]
PLACEHOLDERS = {"CONFIG.py", "B1.py", "books.py", "config.py", "key"}  # the reader's, and what a run writes
FOREIGN = {"nproc-per-node", "nnodes", "node-rank", "master-addr", "master-port", "rdzv-backend", "rdzv-endpoint",
           "rdzv-id", "max-restarts", "signals-to-handle", "shutdown-timeout",  # of torchrun
           "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal"}  # of sbatch
RECORD = "docs/notebook.md"  # its commands are those of the commits that ran
GONE = {"config/llama_8b_fast.py"}


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", (REPO / page).read_text()):
        path, _, anchor = target.partition("#")
        linked = (REPO / page).parent / path if path else REPO / page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES)
def test_python_files_that_are_named_exist(page):
    text = (REPO / page).read_text()
    gone = GONE if page == RECORD else set()
    for name in set(re.findall(r"[\w*/]+\.py\b", text)) - PLACEHOLDERS - gone:
        assert any(REPO.glob(name)) or any(REPO.glob(f"*/{name}")), f"{page} names {name}"


@pytest.mark.parametrize("page", PAGES)
def test_keys_flags_and_tests_that_are_named_exist(page):
    text = (REPO / page).read_text()
    keys, tests = flat(Config()), "".join(p.read_text() for p in REPO.glob("tests/**/test_*.py"))
    for words in re.findall(r"-k (\w+)", text):
        assert re.search(rf"def test_\w*{words}", tests), f"{page} runs tests named {words}"
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, f"{page} names {name}"
    if page == RECORD:
        return
    for section, name in set(re.findall(rf"\b({'|'.join(SECTIONS)})\.(?!py\b|md\b)(\w+)", text)):
        place = getattr(Config(), section) if section == "compile" else importlib.import_module(section)
        assert f"{section}.{name}" in keys or hasattr(place, name), f"{page} names {section}.{name}"
    for name in set(re.findall(r"--([\w.-]+)=", text)) - FOREIGN - PLACEHOLDERS - set(keys):
        known = any(re.search(rf'"--{name}"|^    {name}: ', script, re.M) for script in SCRIPTS)
        assert known, f"{page} names --{name}"


def result(name):
    return json.loads((REPO / "docs" / "results" / name).read_text())


def test_numbers_of_the_front_page_are_those_of_the_results(tmp_path, monkeypatch):
    text = (REPO / "README.md").read_text()
    measured = {row["variant"]: row for row in result("bench_llama_8b_fast.json")["rows"]}
    for variant in ("bf16", "tensorwise", "tensorwise:fp8.filter_fqns=[]", "rowwise:fp8.filter_fqns=[]"):
        row = measured[variant]
        speedup = "" if variant == "bf16" else f" ({row['speedup']:.2f}x)"
        assert (f"| {row['ms_per_step']:.1f} ± {row['spread_ms'] / 2:.1f} | {row['tokens_per_s']:,.0f}{speedup} | "
                f"{row['mfu']:.1%} | {row['peak_gib']:.2f} |") in text, variant
    for row in result("parity_8b_2_gpus.json")["rows"]:
        assert f"{row['final_val_loss']:.3f}" in text
    band = result("parity_h100.json")
    losses = {(row["variant"], row["seed"]): row for row in band["rows"]}
    assert f"{losses['tensorwise:fp8.filter_fqns=[]', 1337]['gap_percent']:.1f}%" in text
    found = result("parity_157m.json")["intervals"][0]
    assert (f"{found['variant']} is {found['gap_percent']:+.2f}% from bf16's loss, 95% interval {found['low']:.2f} to "
            f"{found['high']:+.2f}%: {found['verdict']} 0.25%") in text
    monkeypatch.syspath_prepend(REPO / "bench")
    front_page = importlib.import_module("front_page")
    assert front_page.speeds()[0][1:] == pytest.approx((10381, 14582), abs=1)
    front_page.main(tmp_path / "front_page.png")
    assert (tmp_path / "front_page.png").read_bytes().startswith(b"\x89PNG")
