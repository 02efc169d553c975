"""model.py: shapes, rotary positions, loss, and weights that depend on seed and name alone."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, build

import fp8
import model as models


def test_8b_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = models.Transformer(models.llama3_1_8b())
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248


def test_smollm2_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = models.Transformer(models.smollm2_135m())
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_later_tokens_do_not_change_earlier_logits():
    model = build()
    x = torch.randint(0, 256, (2, 64))
    y = x.clone()
    y[:, 40:] = 7
    a, b = model(x), model(y)
    assert torch.allclose(a[:, :40], b[:, :40], atol=1e-6)
    assert not torch.allclose(a[:, 40:], b[:, 40:], atol=1e-3)


def test_rope_turns_scores_by_distance_only():
    cos, sin = models.rope_tables(models.ModelConfig(head_dim=32, block_size=64), "cpu")
    q, k = torch.randn(32).expand(1, 64, 1, 32), torch.randn(32).expand(1, 64, 1, 32)
    q, k = models.apply_rope(q, cos, sin)[0, :, 0], models.apply_rope(k, cos, sin)[0, :, 0]
    scores = q @ k.T
    assert torch.allclose(scores[10, 5], scores[40, 35], atol=1e-4)
    assert not torch.allclose(scores[10, 5], scores[10, 9], atol=1e-2)


def test_llama_3_1_frequencies_match_the_published_rule():
    cfg = models.llama3_1_8b(block_size=2)
    cos, sin = models.rope_tables(cfg, "cpu")
    found = torch.atan2(sin[1], cos[1]).double()  # the angle of position 1 is the frequency
    plain = 500000.0 ** (-torch.arange(0, 128, 2).double() / 128)
    wavelength = 2 * torch.pi / plain
    assert torch.allclose(found[wavelength < 8192 / 4], plain[wavelength < 8192 / 4], rtol=1e-5)
    assert torch.allclose(found[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-5)
    middle = (wavelength >= 8192 / 4) & (wavelength <= 8192)
    smooth = (8192 / wavelength[middle] - 1) / 3
    assert middle.any() and torch.allclose(found[middle], (1 - smooth) * plain[middle] / 8 + smooth * plain[middle],
                                           rtol=1e-5)


def test_loss_is_the_sum_over_targets_that_count():
    model = build()
    x, y = torch.randint(0, 256, (2, 64)), torch.randint(0, 256, (2, 64))
    y[0, :30] = models.IGNORE
    logits = model(x).flatten(0, 1).double()
    expected = F.cross_entropy(logits, y.flatten(), ignore_index=models.IGNORE, reduction="sum")
    assert torch.allclose(model(x, y).double(), expected, rtol=1e-6)


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("tie", [False, True])
def test_loss_in_chunks_gives_the_same_loss_and_gradients(chunks, tie):
    x, y = torch.randint(0, 256, (2, 64)), torch.randint(0, 256, (2, 64))
    y[1, 10:40] = models.IGNORE
    results = []
    for n in (1, chunks):
        model = build(tie_embeddings=tie)
        loss = model(x, y, loss_chunks=n)
        (loss * 0.01).backward()
        with torch.no_grad():
            assert torch.allclose(model(x, y, loss_chunks=n), loss, rtol=1e-6)
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-6)
    for name, grad in results[0][1].items():
        # float32 sums in another order
        assert (grad - results[1][1][name]).norm() < 1e-5 * grad.norm(), name


def test_fully_masked_batch_gives_zero_loss_and_zero_gradients():
    model = build(fp8.FP8Config(enabled=True, emulate=True))
    x = torch.randint(0, 256, (2, 64))
    loss = model(x, torch.full_like(x, models.IGNORE))
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())


def test_initial_loss_is_that_of_a_uniform_guess():
    x = torch.randint(0, 256, (4, 64))
    loss = build()(x, x).item() / x.numel()
    assert abs(loss - torch.tensor(272.0).log().item()) < 0.2


def test_weights_depend_on_the_seed_and_fill_everything():
    a, b, c = build(seed=1), build(seed=1), build(seed=2)
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert name.endswith("norm.weight") or not torch.equal(p, r), name


@pytest.mark.parametrize("change, message", [
    ({"n_head": 6, "n_kv_head": 4}, "model.n_head=6 must be a multiple of model.n_kv_head=4"),
    ({"head_dim": 31}, "model.head_dim=31 must be even"), ({"n_layer": 0}, "model.n_layer=0 must be at least 1")])
def test_impossible_sizes_are_named(change, message):
    assert any(message in p for p in models.ModelConfig(**{**TINY, **change}).problems())


@pytest.mark.gpu
def test_attention_on_a_gpu_is_cudnn_compiled_and_right():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cfg = models.ModelConfig(**{**TINY, "head_dim": 64, "block_size": 256})
    attn = models.Attention(cfg).to("cuda", torch.bfloat16)
    cos, sin = models.rope_tables(cfg, "cuda")
    x = torch.randn(2, 256, cfg.n_embd, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(attn)
    with torch.profiler.profile() as profile:
        y = compiled(x, cos, sin)
    assert any("cudnn_attention" in e.name for e in profile.events())
    with sdpa_kernel(SDPBackend.MATH):
        exact = attn.cpu().float()(x.cpu().float(), cos.cpu(), sin.cpu())
    assert (y.cpu().float() - exact).norm() < 1e-2 * exact.norm()  # bf16
