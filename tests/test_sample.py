"""sample.py: which tokens are drawn, and from what context. The command: test_train.py and test_checkpoint.py."""

from types import SimpleNamespace

import pytest
import torch

import sample


class Fixed:
    """A model that gives token i the probability PROBABILITIES[i], whatever the context."""

    cfg = SimpleNamespace(block_size=4)
    cos = torch.zeros(1)
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def __init__(self):
        self.contexts = []

    def __call__(self, tokens):
        self.contexts.append(tokens[0].tolist())
        return self.probabilities.log().expand(1, tokens.shape[1], 4)


def shares(temperature, top_k, n=4000):
    """How often each token is drawn."""
    drawn = list(sample.generate(Fixed(), [0], n, temperature, top_k, torch.Generator().manual_seed(1)))
    return torch.bincount(torch.tensor(drawn), minlength=4) / n


@pytest.mark.parametrize("temperature, top_k, expected", [
    (1.0, 0, [0.1, 0.2, 0.3, 0.4]), (0.5, 0, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),  # squares of the probabilities
    (1.0, 2, [0.0, 0.0, 3 / 7, 4 / 7]), (1.0, 9, [0.1, 0.2, 0.3, 0.4]), (0.0, 0, [0.0, 0.0, 0.0, 1.0])])
def test_tokens_are_drawn_by_their_probability(temperature, top_k, expected):
    # four standard deviations of a share: 4 x sqrt(0.25 / 4000) = 0.032
    assert shares(temperature, top_k).tolist() == pytest.approx(expected, abs=0.032)
    assert [share > 0 for share in shares(temperature, top_k)] == [share > 0 for share in expected]


def test_the_context_is_the_last_block_size_tokens():
    model = Fixed()
    assert list(sample.generate(model, [0, 1, 2], 3, 0.0, 0, None)) == [3, 3, 3]
    assert model.contexts == [[0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 3]]
