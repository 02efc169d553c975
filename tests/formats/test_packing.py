"""packing.py: rows are full, hold every sample once, and give the loss of their samples one by one, compiled once."""

import numpy as np
import pytest
import torch
from conftest import build

import attention
import data
from data import Loader
from formats import packing
from model import IGNORE

rng = np.random.default_rng(0)
# tokens of a question with its ending, and of a conversation: most are short, and some as long as a row or longer
HELLASWAG = np.minimum(400, 20 + rng.gamma(4, 22, 8000).astype(int))
CHAT = np.minimum(8192, 8 + np.exp(rng.normal(6.3, 1.2, 3000)).astype(int))


@pytest.mark.parametrize("lengths", [HELLASWAG, CHAT], ids=["hellaswag", "chat"])
def test_rows_of_8k_are_at_most_2_percent_padding_and_hold_every_sample_once(lengths):
    rows = packing.best_fit(lengths.tolist(), 8192)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 8192 for row in rows)
    assert 1 - lengths.sum() / (8192 * len(rows)) <= 0.02


def test_rows_are_not_sorted_by_length():
    rows = packing.best_fit(HELLASWAG.tolist(), 8192)
    means = [np.mean([HELLASWAG[i] for i in row]) for row in rows[:-1]]
    # some 75 samples share a row: sorted by length, rows' means would differ as much as samples do
    assert np.std(means) < 0.25 * np.std(HELLASWAG)


def samples(n, seed, longest=40):
    """Made-up samples of ids below 256, with several spans of targets each."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 256, k), rng.random(k) < 0.4) for k in rng.integers(2, longest, n)]


def made(n=60, size=64, packed=True, seed=1):
    return packing.Samples(samples(n, 0), size, packed=packed, seed=seed)


def test_a_row_is_its_samples_and_what_is_left_of_it_is_not_trained_on():
    rows, listed = made(), samples(60, 0)
    seen, padding, n_targets = [], 0, 0
    for k in range(rows.n_rows):
        x, y, positions = rows.row(k)
        n_targets += (y != IGNORE).sum()
        borders = [*np.flatnonzero(positions == 0), rows.block_size]
        assert len(borders) - 1 <= rows.most_documents and max(np.diff(borders)) <= rows.longest
        for i, begin in zip(rows.rows[k], borders, strict=False):
            ids, loss = listed[i]
            end = begin + len(ids) - 1
            assert (x[begin:end] == ids[:-1]).all() and (positions[begin:end] == np.arange(len(ids) - 1)).all()
            assert (y[begin:end] == np.where(loss[1:], ids[1:], IGNORE)).all()
            seen.append(i)
        assert (y[end:] == IGNORE).all()
        padding += rows.block_size - end
    assert sorted(seen) == list(range(60)) and rows.padding == pytest.approx(padding / (rows.n_rows * 64))
    lengths = np.array([len(ids) - 1 for ids, _ in listed])
    assert rows.longest == lengths.max()
    assert rows.counts == {"documents": 60, "tokens": lengths.sum() + 60, "targets": n_targets}
    assert rows.document == pytest.approx(np.repeat(lengths, lengths).mean())  # each token sees as many as its sample
    for i, (ids, loss) in enumerate(listed):
        assert all((a == b).all() for a, b in zip(rows.sample(i), (ids, loss), strict=True))


def test_packing_depends_on_the_seed_alone():
    assert made().digest == made().digest != made(seed=2).digest
    assert any((a != b).any() for a, b in zip(made().row(0), made(seed=2).row(0), strict=True))
    assert made(packed=False).digest == made(packed=False, seed=2).digest


def test_a_packed_row_gives_the_loss_of_its_samples_one_by_one():
    rows, model = made(size=96), build(block_size=96)
    for k in range(3):
        x, y, positions = (torch.from_numpy(part)[None] for part in rows.row(k))
        together = model(x, y, 1, positions, attention.document_bounds(positions, rows.longest, rows.most_documents))
        alone = 0.0
        for i in rows.rows[k]:
            ids, loss = (torch.from_numpy(part) for part in rows.sample(i))
            y = ids[1:].long().where(loss[1:], IGNORE)
            alone += model(ids[None, :-1].long(), y[None]).item()
        assert together.item() == pytest.approx(alone, rel=1e-5)


def test_bounds_of_attention_have_one_shape_for_the_whole_run():
    rows = made()
    loader = Loader(rows, global_batch_size=4, micro_batch_size=2, seed=1)
    shapes = set()
    for step in range(6):
        _, _, positions = loader.batch(step)
        for micro_batch in positions:
            _, _, (_, (cu_seqlens, longest)) = data.on_device(micro_batch, micro_batch, micro_batch, rows,
                                                              torch.device("cpu"))
            shapes.add((len(cu_seqlens), longest))
            assert cu_seqlens[-1] == 128 and (cu_seqlens.diff() <= longest).all()
            assert cu_seqlens.unique().tolist() == [*(micro_batch.flatten() == 0).nonzero().flatten().tolist(), 128]
    assert shapes == {(2 * rows.most_documents + 1, rows.longest)}
    with pytest.raises(AssertionError, match="longer or more than their rows say"):
        attention.document_bounds(micro_batch, 1, rows.most_documents)


def test_blocks_compile_once_for_rows_of_different_documents(monkeypatch):
    """Rows of 5 to 32 documents, whose longest falls into other powers of two from row to row."""
    rng = np.random.default_rng(0)
    rows = packing.Samples([(rng.integers(0, 256, k), np.ones(k, bool)) for k in [301, *[11] * 64, *[65] * 10]], 320,
                           packed=True, seed=1)
    monkeypatch.setattr("model.attention_mask", lambda x, cfg, positions, bounds: bounds)

    def attend(q, k, v, mask, window):  # a GPU's kernel reads the bounds; it has no gradient to compute here
        assert mask[1] > 0
        return (v.flatten(0, 1) * mask[0].sum()).repeat_interleave(2, 1)

    monkeypatch.setattr("model.Attention.attend", staticmethod(attend))
    model, n_compiled = build(block_size=320), 0

    def count(graph, _):
        nonlocal n_compiled
        n_compiled += 1
        return graph

    for block in model.layers:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=count)
    bounds, after_row = set(), []
    for k in range(rows.n_rows):
        x, y, positions = (torch.from_numpy(part)[None] for part in rows.row(k))
        bounds.add(attention.document_bounds(positions)[1])
        x, y, documents = data.on_device(x, y, positions, rows, torch.device("cpu"))
        with torch.no_grad():
            model(x, y, 1, *documents)
        after_row.append(n_compiled)
    assert len(bounds) > 1 and set(after_row) == {after_row[0]} and after_row[0] <= len(model.layers)
