"""Samples as rows of one length: several packed into a row, or one a row, padded.

A sample is (ids, loss): its token ids, and of each whether it is a target. Formats that read samples (HellaSwag, chat)
end here; data.Loader draws the rows.
"""

import bisect
import hashlib
import itertools

import numpy as np

from formats.files import VAL_EVERY
from model import IGNORE
from plumbing.errors import UserError


def split(train, val):
    """(training, validation) parts of lists of samples. val: None: every VAL_EVERY-th sample of train."""
    if val is not None:
        return train, val
    return [sample for i, sample in enumerate(train, 1) if i % VAL_EVERY], train[VAL_EVERY - 1 :: VAL_EVERY]


def make_rows(train, val, cfg, block_size, seed, *, found, counts, about):
    """(training Samples, validation Samples) of lists of samples of at most block_size inputs.

    found: the files.Files that they come from. counts: {what was cut or dropped: number}. about: what else the screen
    says. Without packing, rows are as long as the longest sample of both, rounded up to the multiple of 16 that FP8
    matmuls need: one length for the whole run, so that one compiled graph serves it. Raises UserError if there is no
    sample for training, or none for validation.
    """
    lost = "".join(f"; {n:,} {what}" for what, n in counts.items() if n)
    if not train or not val:
        raise UserError(f"data: {len(train)} samples for training and {len(val)} for validation are too few (without "
                        f"data.val, one of {VAL_EVERY} is for validation), {about}; {found.source}{lost}")
    size = block_size
    if not cfg.packed_sequence_size:
        longest = max(len(ids) - 1 for ids, _ in train + val)
        size = min(block_size, -(-longest // 16) * 16)
    train, val = (Samples(part, size, packed=cfg.packed_sequence_size > 0, seed=seed) for part in (train, val))
    train.description = (
        f"{cfg.format}, {train.n_samples:,} training samples in {train.n_rows:,} rows of {size} tokens, "
        f"{train.padding:.1%} of them padding, {train.counts['targets'] / train.counts['tokens']:.0%} of the text is "
        f"trained on, {val.n_samples:,} validation samples in {val.n_rows:,} rows, {about}; {found.source}{lost}")
    train.counts |= counts | {"files not used": len(found.unused)}
    return train, val


def best_fit(lengths, size):
    """Rows of at most `size` tokens: lists of indices into `lengths`, each of which goes where it leaves least room.

    Taken in random order this wastes little, and rows are not sorted by length: apart from filling the last gap, who
    shares a row is left to chance. (Best fit in decreasing order packs as well, but gives rows of long samples only.)
    """
    rows, open_rows = [], []  # open_rows: (tokens left, row), sorted
    for i, length in enumerate(lengths):
        k = bisect.bisect_left(open_rows, (length, 0))
        if k < len(open_rows):
            left, row = open_rows.pop(k)
        else:
            left, row = size, len(rows)
            rows.append([])
        rows[row].append(i)
        if left > length:
            bisect.insort(open_rows, (left - length, row))
    return rows


class Samples:
    """Samples, (ids, loss) pairs, as rows of block_size tokens: one a row, or several if packed.

    ids: int array (n,), loss: bool array (n,), true for targets. Who shares a row is drawn from `seed` and stays from
    epoch to epoch: attention does not cross samples, so it decides only who is in a batch together, and the number of
    rows is known for every epoch.
    """

    def __init__(self, samples, block_size, *, packed, seed):
        self.samples, self.block_size, self.packed, self.n_samples = samples, block_size, packed, len(samples)
        sizes = np.array([len(ids) for ids, _ in samples])
        self.counts = {"documents": len(samples), "tokens": int(sizes.sum()),
                       "targets": sum(int(loss[1:].sum()) for _, loss in samples)}
        lengths = sizes - 1  # a sample's last id is a target only
        self.rows = np.arange(len(samples))[:, None]  # of each row: its samples
        if packed:
            order = np.random.default_rng(seed).permutation(len(samples))
            self.rows = [order[pack] for pack in best_fit(lengths[order].tolist(), block_size)]
        self.n_rows, self.n_inputs = len(self.rows), int(lengths.sum())
        self.document = float((lengths**2).sum() / lengths.sum())  # the length that attention sees, mean over tokens
        self.longest = int(lengths.max())
        # what is left of a row counts as documents of the longest length, see row()
        gaps = [-(-(block_size - int(lengths[row].sum())) // self.longest) for row in self.rows]
        self.most_documents = max(len(row) + n for row, n in zip(self.rows, gaps, strict=True))
        self.largest = max(int(ids.max()) for ids, _ in samples)
        h = hashlib.blake2b(repr((block_size, packed, seed if packed else 0)).encode(), digest_size=16)
        for array in itertools.chain(*samples, [sizes], self.rows):
            h.update(np.ascontiguousarray(array))
        self.digest = h.hexdigest()

    @property
    def padding(self):
        return 1 - self.n_inputs / (self.n_rows * self.block_size)

    def sample(self, i):
        return self.samples[i]

    def row(self, i):
        """(x, y, positions) of row i, see data.Rows. What is left at its end is documents without targets, no longer
        than the longest sample, because attention is compiled for that length."""
        x, y = np.zeros(self.block_size, np.int64), np.full(self.block_size, IGNORE, np.int64)
        positions, at = np.arange(self.block_size), 0
        for ids, loss in map(self.sample, self.rows[i]):
            stop = at + len(ids) - 1
            x[at:stop], y[at:stop] = ids[:-1], np.where(loss[1:], ids[1:], IGNORE)
            positions[stop:] = np.arange(self.block_size - stop) % self.longest
            at = stop
        return x, y, positions if self.packed else None
