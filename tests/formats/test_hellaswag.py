"""hellaswag.py, eval.py: prepared as the evaluation harness does, packed without loss, scored as transformers does."""

import http.server
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build, metrics, run, run_many, train_here

import attention
import data
import eval as scoring
from checks import estimate
from configurator import Config
from data import DataConfig, Loader
from formats import hellaswag
from formats.tokenizer import get_tokenizer
from model import IGNORE
from plumbing import entry
from plumbing.ranks import find_ranks

BYTES = get_tokenizer("bytes")
WORDS = "the man puts a red hat on his dog then walks it to town and back again in rain".split()


def question(i):
    """A made-up question in the published format; endings differ in length, some come from WikiHow."""
    rng = np.random.default_rng(i)

    def text(low, high):
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    a, b = text(3, 12).capitalize() + ".", text(1, 4)
    if i % 3 == 0:
        a, b = f"[header] How to {text(2, 4)} [title] {a} [step] {text(2, 5)}.", ""
    return {"ind": 100 + i, "activity_label": text(1, 3), "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}",
            "endings": [text(2, 10) + "." for _ in range(4)], "label": str(rng.integers(4))}


def write(path, questions):
    path.write_text("".join(json.dumps(q) + "\n" for q in questions))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("questions") / "q.jsonl", [question(i) for i in range(40)])


def config(*files, **keys):
    return DataConfig(format="hellaswag", train=[str(f) for f in files], tokenizer="bytes", **keys)


def decode(ids):
    return bytes(int(i) for i in ids).decode()


# ----------------------------------------------------------------------------------------------------------------
# questions


def test_text_is_prepared_by_the_rules_of_the_harness(tmp_path):
    # expectations written by hand from SPEC: join, brackets away, " [title]" to ". ", double spaces to one
    raw = {"ind": 7, "activity_label": "Home", "label": "1", "ctx": "unused",
           "ctx_a": "[header] How to bake [title] Mix flour. [step] Stir it.", "ctx_b": "THEN you",
           "endings": [" wait [substeps] an hour. ", "rest [title] Done.", "a  b", "c"]}
    plain = {"ind": 8, "activity_label": "Dogs", "ctx_a": "A dog runs.", "ctx_b": "", "endings": ["x", "y"], "label": 0}
    items = hellaswag.read([write(tmp_path / "q.jsonl", [raw, plain])])
    assert items == [{"ind": 7, "query": "Home: How to bake. Mix flour. Stir it. Then you", "label": 1,
                      "endings": ["wait an hour.", "rest. Done.", "a b", "c"]},
                     {"ind": 8, "query": "Dogs: A dog runs.", "endings": ["x", "y"], "label": 0}]


def test_a_question_without_an_index_is_counted_and_its_label_may_be_a_number(tmp_path):
    row = {"activity_label": "A", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": 1}
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(row)}\n\n{json.dumps(row)}\n")
    assert [(q["ind"], q["query"], q["label"]) for q in hellaswag.read([tmp_path / "q.jsonl"])] == [
        (0, "A: b C", 1), (1, "A: b C", 1)]


@pytest.mark.parametrize("line, told", [
    ('{"ind": 1', "line 3 is not JSON"), ("[1]", "line 3 is a list"), (b"\xff", "line 3 is not JSON: 'utf-8' codec"),
    *((json.dumps({**question(0), "label": label}), f"`label` is {label!r}, expected the index of the right ending, "
       "one of 0, 1, 2, 3") for label in ("4", "", 1.7, "-1", "1e400", None, True)),
    (json.dumps({**question(0), "endings": "abcd"}), "`endings` is a string, expected a list"),
    (json.dumps({**question(0), "endings": ["a", None]}), "`endings[1]` is null or missing, expected a string"),
    (json.dumps({**question(0), "activity_label": None}), "`activity_label` is null or missing, expected a string"),
    (json.dumps({k: v for k, v in question(0).items() if k != "label"}), "`label` is None, expected the index of"),
    ("[" * 100_000, "line 3 is not JSON: maximum recursion depth"),
    (json.dumps({k: v for k, v in question(0).items() if k != "activity_label"}), "activity_label")])
def test_broken_lines_are_named(tmp_path, line, told):
    path = tmp_path / "q.jsonl"
    path.write_bytes(json.dumps(question(1)).encode() + b"\n\n" + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(ValueError, match="q.jsonl, line 3") as error:
        hellaswag.read([path])
    assert told in str(error.value)


def test_every_20th_question_is_for_validation(file, tmp_path):
    train, val, _ = hellaswag.questions(config(file))
    assert [q["ind"] for q in val] == [119, 139] and len(train) == 38
    train, val, _ = hellaswag.questions(config(file, val=[str(write(tmp_path / "v.jsonl", [question(90)]))]))
    assert [q["ind"] for q in val] == [190] and len(train) == 40
    with pytest.raises(ValueError, match="0 for validation are too few"):
        data.prepare(config(tmp_path / "v.jsonl"), 64, 1)


def test_the_screen_names_the_files_also_those_that_were_downloaded(tmp_path):
    for name in ("train", "val"):
        write(tmp_path / f"hellaswag_{name}.jsonl", [question(i) for i in range(20)])
    rows, val_rows, _ = data.prepare(config(cache_dir=str(tmp_path)), 128, 1)
    assert f"tokenizer bytes; 1 file of {tmp_path / 'hellaswag_train.jsonl'}" in rows.description
    assert (rows.n_samples, val_rows.n_samples) == (20, 20)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local web server in the place of GitHub; the folder that it serves."""
    (tmp_path / "web").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "web")

        def log_message(self, *args):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{served.server_port}/")
    yield tmp_path / "web"
    served.shutdown()
    served.server_close()


def test_download_is_whole_or_not_there(server, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    where = f"put that file at {cache / 'hellaswag_val.jsonl'}"
    for status in (404, 200):  # not found; an answer that ends too early
        with monkeypatch.context() as patch, pytest.raises(ValueError) as error:
            if status == 200:
                write(server / "hellaswag_val.jsonl", [question(i) for i in range(3)])
                patch.setattr(shutil, "copyfileobj", lambda source, target: target.write(source.read(99)))
            hellaswag.download("hellaswag_val.jsonl", cache)
        assert ("404" if status == 404 else "IncompleteRead") in str(error.value)
        assert where in str(error.value) and not cache.exists()
    write(server / "hellaswag_val.jsonl", [question(i) for i in range(3)])
    path = hellaswag.download("hellaswag_val.jsonl", cache)
    assert path.read_bytes() == (server / path.name).read_bytes() and list(cache.iterdir()) == [path]
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/")  # the discard port: nobody listens
    assert hellaswag.download("hellaswag_val.jsonl", cache) == path  # no second download
    path.unlink()
    with pytest.raises(ValueError, match="could not be downloaded"):
        hellaswag.download("hellaswag_val.jsonl", cache)
    assert list(cache.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------
# samples


class WithBos:
    """Bytes with a token for " w", which begins in the query's last space where the texts are joined; and BOS."""

    bos = [300]

    def encode(self, text):
        return [b for b in text.replace(" w", "\x01").encode()]


def test_an_endings_tokens_are_those_of_the_joint_text_beyond_the_query():
    ids, start, cut = hellaswag.encode(BYTES, "a: b", "cd", 64)
    assert (decode(ids), start, cut) == ("a: b cd", 4, 0)  # no BOS: the bytes tokenizer has none
    ids, start, cut = hellaswag.encode(WithBos(), "a: b", "we", 64)
    assert (ids.tolist(), start, cut) == ([300, *b"a: b\x01e"], 5, 0)
    # the space that a bracketed note leaves at the end of a query belongs to the ending, as the harness has it
    query = hellaswag.clean("A: Stir it. [step]")
    ids, start, cut = hellaswag.encode(BYTES, query, "Then wait.", 64)
    assert (decode(ids[:start]), decode(ids[start:])) == ("A: Stir it.", "  Then wait.") and query == "A: Stir it. "
    # `limit` inputs, and one more target: the beginning goes, BOS stays
    for bos in ([300], [300, 301]):
        encoding = SimpleNamespace(bos=bos, encode=WithBos().encode)
        ids, start, cut = hellaswag.encode(encoding, "a: b", "we", len(bos) + 3)
        assert (ids.tolist(), start, cut) == ([*bos, *b" b\x01e"], len(bos) + 2, 2)
    ids, start, cut = hellaswag.encode(BYTES, "a: b", "cdef", 3)  # nothing of the query left: one token must be input
    assert (decode(ids), start) == ("cdef", 1)


def test_too_long_samples_are_reported(file):
    train, _, _ = data.prepare(config(file), 64, 1)
    n = sum(len(f"{q['query']} {q['endings'][q['label']]}") > 65 for q in hellaswag.read([file]))
    assert n > 5 and f"{n} samples cut at the beginning" in train.description
    assert "cut at" not in data.prepare(config(file), 512, 1)[0].description


def documents(x, y, positions):
    """The (ids of x, targets) of each document in a row."""
    borders = [*np.flatnonzero(positions == 0), len(x)]
    return [(x[a:b], y[a:b], positions[a:b]) for a, b in zip(borders[:-1], borders[1:], strict=True)]


def test_packed_rows_hold_every_sample_once_and_targets_stay_within(file):
    train, val, _ = data.prepare(config(file, packed_sequence_size=512), 512, 5)
    items, found, filler = hellaswag.questions(config(file))[0], [], 0
    for x, y, positions in map(train.row, range(train.n_rows)):
        for ids, targets, at in documents(x, y, positions):
            assert at.tolist() == list(range(len(at))) and len(at) <= train.longest
            counted = np.flatnonzero(targets != IGNORE)
            if len(counted) == 0:
                assert not ids.any()
                filler += len(ids)
                continue
            assert counted.tolist() == list(range(counted[0], len(ids)))  # the ending, up to the border
            assert (targets[counted[:-1]] == ids[counted[1:]]).all()
            found.append((decode(ids[: counted[0] + 1]), decode(targets[counted])))
    assert sorted(found) == sorted((q["query"], " " + q["endings"][q["label"]]) for q in items)
    assert train.padding == pytest.approx(filler / (train.n_rows * 512)) and train.padding < 0.05
    assert train.n_rows < len(items) / 3
    same, other = (data.prepare(config(file, packed_sequence_size=512), 512, s)[0] for s in (5, 6))
    assert same.digest == train.digest != other.digest
    assert all((same.row(i)[0] == train.row(i)[0]).all() for i in range(train.n_rows))
    assert any((a != b).any() for a, b in ((other.row(i)[0], train.row(i)[0]) for i in range(2)))


def test_unpacked_rows_are_one_sample_of_one_length_that_fp8_can_take(file):
    train, val, _ = data.prepare(config(file), 512, 1)
    assert train.block_size == val.block_size == -(-max(train.longest, val.longest) // 16) * 16 < 512
    assert train.n_rows == 38 and val.n_rows == 2
    x, y, positions = val.row(1)
    q = hellaswag.read([file])[39]
    text, n = f"{q['query']} {q['endings'][q['label']]}", len(q["query"])
    assert positions is None and decode(x[: len(text) - 1]) == text[:-1] and not x[len(text) - 1 :].any()
    assert decode(y[n - 1 : len(text) - 1]) == text[n:] and (y != IGNORE).sum() == len(text) - n


@pytest.mark.parametrize("size", [0, 256])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(file, size):
    rows = data.prepare(config(file, packed_sequence_size=size), 256, 1)[0]
    batches = []
    for n in (1, 2, 4):
        parts = [Loader(rows, global_batch_size=4, micro_batch_size=1, seed=1, rank=r, world_size=n)
                 .batch(1) for r in range(n)]
        assert all((part[2] is None) == (size == 0) for part in parts)
        batches.append([torch.cat(c, 1).flatten(0, 1) for c in zip(*parts, strict=True) if c[0] is not None])
    assert all(torch.equal(a, b) for other in batches[1:] for a, b in zip(batches[0], other, strict=True))


def test_a_packed_batch_gives_the_loss_and_gradients_of_its_samples_one_by_one(file):
    rows = data.prepare(config(file, packed_sequence_size=320), 320, 1)[0]
    model = build(block_size=320)
    x, y, positions = (torch.from_numpy(np.stack(c)) for c in zip(rows.row(0), rows.row(1), strict=True))
    packed = model(x, y, 1, positions, attention.document_bounds(positions))
    packed.backward()
    together, alone = [p.grad.clone() for p in model.parameters()], 0.0
    model.zero_grad()
    for k in (*rows.rows[0], *rows.rows[1]):
        ids, counts = (torch.from_numpy(part) for part in rows.sample(k))
        loss = model(ids[None, :-1].long(), ids[None, 1:].long().where(counts[1:], IGNORE))
        loss.backward()
        alone += loss.item()
    assert packed.item() == pytest.approx(alone, rel=1e-5)
    for p, g in zip(model.parameters(), together, strict=True):  # float32 sums in another order
        assert (p.grad - g).norm() <= 1e-5 * g.norm()


# ----------------------------------------------------------------------------------------------------------------
# train.py


@pytest.fixture(scope="module")
def runs(file, tiny_run, tmp_path_factory):
    """FP8 runs, packed and not, on 1 and on 2 ranks: (arguments of the packed one, folder, metrics, metrics)."""
    folder = tmp_path_factory.mktemp("runs")
    unpacked = [*tiny_run, f'--data.train=["{file}"]', "--data.format=hellaswag", "--model.block_size=256",
                "--fp8.enabled=True", "--fp8.emulate=True", '--fp8.filter_fqns=["lm_head"]', "--global_batch_size=4",
                "--micro_batch_size=2", "--eval_hellaswag_items=2"]
    packed = [*unpacked, "--data.packed_sequence_size=256"]
    for name, args in (("packed", packed), ("unpacked", unpacked)):
        train_here(*args, f"--out_dir={folder / name}")
    one = {name: metrics(folder / name) for name in ("packed", "unpacked")}
    two = run_many(folder, {"packed_2": packed}, ranks=2)
    return packed, folder, one, two["packed_2"]


def test_fine_tuning_is_the_same_on_two_ranks_and_learns(runs):
    _, _, one, two = runs
    for name, m in one.items():
        losses = [row["loss"] for row in m.train.values()]
        assert len(losses) == 6 and losses[-1] < losses[0] - 0.1, name
        scored = [row for row in m.rows if "val_loss" in row]
        assert all(row["hellaswag_acc"] in (0, 0.5, 1) and "hellaswag_acc_norm" in row for row in scored)
        assert len(scored) == 2
    # sums in another order differ in their last bits, and FP8 rounds some of those to the neighbouring value
    for a, b in zip(one["packed"].rows, two.rows, strict=True):
        for key in {"loss", "grad_norm", "val_loss"}.intersection(a):
            assert b[key] == pytest.approx(a[key], rel=2e-3)


def test_tokens_count_no_padding(runs, file):
    _, folder, one, _ = runs
    items = hellaswag.questions(config(file))[0]
    n_tokens = sum(len(f"{q['query']} {q['endings'][q['label']]}") - 1 for q in items)  # a byte each, the last no input
    for name, m in one.items():
        size = 256 if name == "packed" else 0
        rows, _, _ = data.prepare(config(file, packed_sequence_size=size), 256, 1337)
        per_step = 4 * n_tokens / rows.n_rows
        assert [row["tokens"] for row in m.train.values()] == pytest.approx([per_step * s for s in m.train], rel=1e-3)
        assert per_step < 0.95 * 4 * rows.block_size  # there is padding
        record = json.loads((folder / name / "run.json").read_text())
        assert (record["block_size"], record["tokens_per_step"]) == (rows.block_size, round(per_step))


def test_memory_is_estimated_for_rows_of_the_length_that_the_data_has(file, tiny_run, tmp_path, monkeypatch):
    memory, lengths = estimate.memory, []
    monkeypatch.setattr(estimate, "memory", lambda config, *args: lengths.append(config.model.block_size)
                        or memory(config, *args))
    train_here(*tiny_run, f'--data.train=["{file}"]', "--data.format=hellaswag", "--model.block_size=512",
               "--max_steps=1", "--checkpoint_interval=0", f"--out_dir={tmp_path}")
    assert lengths == [json.loads((tmp_path / "run.json").read_text())["block_size"]] and lengths[0] < 512


def test_resumed_fine_tuning_is_bit_for_bit_the_uninterrupted(runs, capsys):
    packed, folder, one, _ = runs
    shutil.copytree(folder / "packed", folder / "again")
    shutil.rmtree(folder / "again" / "checkpoints" / "step_00000006")
    train_here(*packed, f"--out_dir={folder / 'again'}")
    assert "3 steps done" in capsys.readouterr().out
    again, whole = ([{k: v for k, v in row.items() if k not in ("time_s", "tokens_per_s", "peak_gib", "slowest_ms")}
                     for row in m.rows] for m in (metrics(folder / "again"), one["packed"]))
    assert again == whole


@pytest.mark.gpu
def test_packed_fp8_fine_tuning_on_a_gpu_stays_close_to_the_cpu(runs, tmp_path):
    packed, _, one, _ = runs
    run("train.py", *packed, "--device=cuda", "--dtype=bfloat16", "--optim.weights=fp32_master", "--fp8.emulate=False",
        "--compile.enabled=True", "--deterministic=False", f"--out_dir={tmp_path / 'gpu'}")
    gpu = metrics(tmp_path / "gpu")
    assert list(gpu.val) == list(one["packed"].val)
    # bfloat16, and FP8 with other kernels, round activations and gradients: some percent of the loss
    assert all(gpu.val[step] == pytest.approx(loss, rel=0.05) for step, loss in one["packed"].val.items())
    assert all("hellaswag_acc" in row for row in gpu.rows if "val_loss" in row)


def test_mistakes_about_packing_are_told(file):
    with pytest.raises(ValueError, match="packed_sequence_size=512 is more than model.block_size=256"):
        data.prepare(config(file, packed_sequence_size=512), 256, 1)
    assert "text has no padding" in next(DataConfig(packed_sequence_size=64).problems())


# ----------------------------------------------------------------------------------------------------------------
# eval.py


@pytest.fixture
def evaluate(monkeypatch):
    """Call eval.py's main in this process, on the CPU, as its entry point does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["eval.py", *args])
        entry.run(scoring.main)

    return call


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_eval_of_a_run_is_the_same_on_two_ranks(runs, file, tmp_path, evaluate, capsys):
    args = [f"--from={runs[1] / 'packed'}", f"--data={file}", "--limit=9"]
    evaluate(*args, f"--out={tmp_path / '1'}")
    done = run("eval.py", *args, f"--out={tmp_path / '2'}", ranks=2)
    assert done.stdout.splitlines()[0] == capsys.readouterr().out.splitlines()[0]
    one, two = read(tmp_path / "1"), read(tmp_path / "2")
    assert [row["ind"] for row in one] == list(range(100, 109))
    for a, b in zip(one, two, strict=True):
        assert a.pop("loglikelihood") == pytest.approx(b.pop("loglikelihood"), abs=1e-4) and a == b
        assert list(a) == ["ind", "label", "pred", "pred_norm"]


def test_a_model_that_gives_nan_has_no_accuracy(runs, file, evaluate, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(scoring.HellaSwag, "score", lambda *_: [
        {"ind": 0, "label": 0, "loglikelihood": [float("nan")] * 4, "pred": 0, "pred_norm": 0}])
    with pytest.raises(SystemExit) as done:
        evaluate(f"--from={runs[1] / 'packed'}", f"--data={file}", "--limit=1", f"--out={tmp_path / 'out'}")
    assert done.value.code == 1 and "the model gives nan" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_passes_hold_each_ending_once_in_lengths_that_fp8_takes_and_the_longest_first(file):
    benchmark = scoring.HellaSwag(hellaswag.read([file]), BYTES, 512, find_ranks("cpu"))
    batches, longest = list(benchmark.batches()), [len(ids) - 1 for ids, _ in benchmark.sequences]
    assert sorted(i for _, batch in batches for i in batch) == list(range(4 * 40))
    for length, batch in batches:
        assert length % 16 == 0 and 0 <= length - max(longest[i] for i in batch) < 16 and len(batch) * length <= 1024
    assert [length for length, _ in batches] == sorted((length for length, _ in batches), reverse=True)


def test_what_is_scored_without_its_beginning_is_on_the_screen(file, capsys):
    questions = hellaswag.read([file])
    scoring.HellaSwag(questions, BYTES, 512, find_ranks("cpu"))
    assert not capsys.readouterr().out
    longest = max(len(hellaswag.encode(BYTES, q["query"], e, 512)[0]) for q in questions for e in q["endings"])
    scoring.HellaSwag(questions, BYTES, longest - 2, find_ranks("cpu"))
    assert re.search(rf"HellaSwag: \d+ of 160 endings with .*model.block_size={longest - 2},", capsys.readouterr().out)


class Constant(torch.nn.Module):
    """A model whose summed loss is the sum of its targets, 0 without any."""

    def forward(self, x, y, loss_chunks):
        return y[y != IGNORE].sum()


def test_a_run_is_told_the_shares_of_right_predictions_of_as_many_questions_as_it_asked_for(monkeypatch):
    asked = [{"query": "a", "endings": ["b", "c"], "label": 0, "ind": i} for i in range(9)]
    predictions = [(0, 0), (0, 1), (0, 1), (1, 1)]  # three of four right by the sum, one of four by the length
    monkeypatch.setattr(hellaswag, "questions", lambda cfg: ([], asked, None))
    monkeypatch.setattr(scoring.HellaSwag, "score", lambda self, model: [
        {"label": 0, "loglikelihood": [-1.0, -2.0], "pred": pred, "pred_norm": normed}
        for (pred, normed), question in zip(predictions, self.questions, strict=True)])
    y = np.array([[1, 2, 3], [4, IGNORE, IGNORE], [IGNORE] * 3])
    rows = SimpleNamespace(n_rows=3, largest=3, row=lambda i: (np.zeros(3, np.int64), y[i], None))
    evaluation = scoring.Evaluation(Config(eval_hellaswag_items=4), rows, BYTES, find_ranks("cpu"))
    assert evaluation.largest == ord("c")
    row, line = evaluation(Constant())
    assert row == {"val_loss": 10 / 4, "hellaswag_acc": 0.75, "hellaswag_acc_norm": 0.25}
    assert line == "validation loss 2.5000 nats per token | HellaSwag, 4 questions: acc 0.7500, acc_norm 0.2500"


def test_validation_rows_without_a_target_have_loss_0():
    rows = SimpleNamespace(n_rows=1, largest=3, row=lambda i: (np.zeros(3, np.int64), np.full(3, IGNORE), None))
    assert scoring.Evaluation(Config(), rows, BYTES, find_ranks("cpu"))(Constant())[0] == {"val_loss": 0.0}


def test_the_same_file_for_training_and_validation_overlaps_only_if_it_is_all_there_is(file, tmp_path):
    def count(train, val):
        cfg = DataConfig(format="hellaswag", train=[str(train)], val=[str(val)])
        return [len(part) for part in hellaswag.questions(cfg)[:2]]

    for name in ("a.jsonl", "b.jsonl"):
        shutil.copy(file, tmp_path / name)
    n = len(hellaswag.read([file]))
    assert count(tmp_path, tmp_path / "b.jsonl") == [n, n] == count(file, file) and n > 0


def test_eval_of_a_hugging_face_folder_is_what_transformers_gives(file, tmp_path, evaluate, capsys):
    import tokenizers
    import transformers

    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator([" ".join(WORDS)] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tok.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=304, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, pad_token_id=None)).eval()
    model.save_pretrained(tmp_path / "hf")
    tok.save(str(tmp_path / "hf" / "tokenizer.json"))
    out = tmp_path / "scores.jsonl"
    evaluate(f"--from={tmp_path / 'hf'}", f"--data={file}", f"--out={out}")
    right = right_normed = 0
    for row, q in zip(read(out), hellaswag.read([file]), strict=True):
        expected = []
        for ending in q["endings"]:
            n, ids = len(tok.encode(q["query"]).ids), torch.tensor(tok.encode(f"{q['query']} {ending}").ids)
            assert ids[0] == 0
            with torch.no_grad():
                logs = model(ids[None]).logits[0].log_softmax(-1)
            expected.append(logs[n - 1 : -1].gather(1, ids[n:, None]).sum().item())
        assert row["loglikelihood"] == pytest.approx(expected, abs=1e-4, rel=1e-5)
        normed = [value / len(ending) for value, ending in zip(expected, q["endings"], strict=True)]
        assert (row["pred"], row["pred_norm"]) == (np.argmax(expected), np.argmax(normed))
        assert (row["ind"], row["label"]) == (q["ind"], q["label"])
        right += row["pred"] == q["label"]
        right_normed += row["pred_norm"] == q["label"]
    p = right_normed / 40
    assert right != right_normed
    assert (f"40 questions: acc {right / 40:.4f}, acc_norm {p:.4f} (standard error {(p * (1 - p) / 40) ** 0.5:.4f})\n"
            in capsys.readouterr().out)


@pytest.mark.parametrize("args, told", [(["--data=nowhere.jsonl"], "data: 'nowhere.jsonl' matches no file"),
                                        (["--limit=-1"], "--limit=-1 must not be negative"),
                                        (["--out=no/such/x.jsonl"], "--out=no/such"),
                                        (["--from=/nowhere"], "--from=/nowhere: no such folder")])
def test_eval_mistakes_are_one_line(runs, file, evaluate, capsys, args, told):
    with pytest.raises(SystemExit) as stopped:
        evaluate(f"--from={runs[1] / 'packed'}", f"--data={file}", *args)
    assert stopped.value.code == 2
    told_lines = capsys.readouterr().err.strip().splitlines()
    assert len(told_lines) == 1 and told in told_lines[0]


def test_eval_does_not_write_over_its_questions(runs, file, evaluate, capsys, tmp_path):
    os.symlink(file, tmp_path / "link.jsonl")
    before = Path(file).read_text()
    with pytest.raises(SystemExit):
        evaluate(f"--from={runs[1] / 'packed'}", f"--data={file}", f"--out={tmp_path / 'link.jsonl'}")
    assert "link.jsonl is a file of the data" in capsys.readouterr().err and Path(file).read_text() == before


def test_a_tokenizer_that_is_not_the_models_is_told(runs, file, evaluate, capsys, monkeypatch, wide):
    monkeypatch.setattr("sample.get_tokenizer", lambda _: wide)
    with pytest.raises(SystemExit) as stopped:
        evaluate(f"--from={runs[1] / 'packed'}", f"--data={file}", "--limit=2")
    assert stopped.value.code == 2 and "model.vocab_size=" in capsys.readouterr().err


def test_eval_of_an_empty_file_says_so(runs, evaluate, capsys, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(SystemExit):
        evaluate(f"--from={runs[1] / 'packed'}", f"--data={tmp_path / 'empty.jsonl'}")
    assert "empty.jsonl holds no question to score" in capsys.readouterr().err
