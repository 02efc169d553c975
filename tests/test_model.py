"""model.py: shapes, rotary positions, packed documents, loss, and weights that depend on seed and name alone."""

import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, build

import attention
import fp8
import model as models
from checks import estimate
from plumbing.compiling import POLICIES, CompileConfig, compile_and_checkpoint, recompute, save_or_not

SELECTIVE = functools.partial(save_or_not, POLICIES["selective", None], attention.SAVED_OPS)


@pytest.mark.parametrize("name, count", [
    ("llama3_1_8b", 8_030_261_248), ("llama3_2_1b", 1_235_814_400), ("mistral_7b", 7_241_732_096),
    ("mistral_nemo", 12_247_782_400), ("qwen2_5_7b", 7_615_616_512), ("phi_4", 14_659_507_200),
    ("smollm2_135m", 134_515_008)])
def test_models_have_the_published_number_of_parameters_and_fit_fp8(name, count):
    with torch.device("meta"):
        model = models.Transformer(getattr(models, name)())
    assert sum(p.numel() for p in model.parameters()) == count
    assert not list(model.cfg.problems())
    fp8.check(fp8.FP8Config(enabled=True, emulate=True, enable_fsdp_float8_all_gather=True, filter_fqns=["lm_head"]),
              model, device=torch.device("cpu"), compiled=True, shards=8, tokens=8192)


def test_models_share_no_rope_scaling():
    models.llama3_1_8b().rope_scaling.factor = 2.0
    assert models.llama3_1_8b().rope_scaling.factor == 8.0


@pytest.mark.parametrize("norm_after", [False, True])
def test_a_residual_multiplier_of_zero_leaves_the_embedding_and_the_head(norm_after):
    model = build(norm_after=norm_after, residual_multiplier=0.0)
    tokens = torch.arange(8)[None]
    assert torch.equal(model(tokens), model.lm_head(model.norm(model.embed(tokens))))


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


# ----------------------------------------------------------------------------------------------------------------
# packed documents and sliding windows

LENGTHS = [[10, 30, 1, 23], [64]]  # of the documents in each row
SWITCHES = [{}, {"sliding_window": 7}, {"sliding_window": 7, "qkv_bias": True, "rope_fraction": 0.5}]


def loud(device="cpu", dtype=torch.float32, **sizes):
    """A model whose attention and biases matter: with weights as small as the initial ones all scores are near 0."""
    model = build(device=device, dtype=dtype, **sizes)
    generator = torch.Generator(device).manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.empty(p.shape, device=device).normal_(std=0.2, generator=generator) + ("norm" in name))
    return model


def packed(lengths=LENGTHS):
    """(x, y, positions) of rows of documents; the first target of each document does not count."""
    generator = torch.Generator().manual_seed(4)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    x, y = (torch.randint(0, 256, positions.shape, generator=generator) for _ in range(2))
    return x, y.masked_fill(positions == 0, models.IGNORE), positions


def gradients(model, loss):
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    return loss.detach(), grads


def assert_same(found, reference, bound=5e-6):
    # float32 sums over 64 and over 30 tokens round in another order: some 1e-7 of each
    assert (found[0] - reference[0]).abs() < bound * reference[0]
    for name, grad in reference[1].items():
        assert (found[1][name] - grad).norm() < bound * grad.norm(), name


def one_by_one(model, x, y):
    """Loss and gradients of the documents in x, each in a batch of its own."""
    pieces = [(row[i : i + n], targets[i : i + n]) for row, targets, lengths in zip(x, y, LENGTHS, strict=True)
              for n, i in zip(lengths, torch.tensor([0, *lengths]).cumsum(0).tolist(), strict=False)]
    assert [len(p) for p, _ in pieces] == [n for row in LENGTHS for n in row]
    return gradients(model, sum(model(p[None], t[None]) for p, t in pieces))


@pytest.mark.parametrize("switches", SWITCHES, ids=["full", "window", "all"])
def test_packed_documents_give_the_losses_and_gradients_of_each_alone(switches):
    model = loud(**switches)
    x, y, positions = packed()
    alone = one_by_one(model, x, y)
    assert_same(gradients(model, model(x, y, positions=positions)), alone)
    assert_same(gradients(model, model(x, y, positions=positions, loss_chunks=4)), alone)
    logits = model(x)
    assert (model(x, positions=positions) - logits).norm() > 0.1 * logits.norm()  # borders matter to this model


def test_rotary_positions_restart_with_each_document():
    x, y, positions = packed([[30, 34]])
    long, short = loud(), loud(block_size=34)  # whose tables end within the row
    assert_same(gradients(short, short(x, y, positions=positions)), gradients(long, long(x, y, positions=positions)))


def test_packed_documents_compiled_and_recomputed_give_the_same():
    x, y, positions = packed()
    alone = one_by_one(loud(sliding_window=7), x, y)
    model = loud(sliding_window=7)
    for block in model.layers:  # not the loss, which compiles for as long and knows nothing of documents
        block.forward = torch.compile(recompute(block.forward, SELECTIVE), dynamic=False)
    assert_same(gradients(model, model(x, y, positions=positions)), alone)


def varlen_attn_on_cpu(q, k, v, edges_q, edges_k, longest_q, longest_k, *, window_size, enable_gqa=True):
    """torch's varlen_attn by its documentation, for a machine without the kernel."""
    assert edges_q.dtype == torch.int32 and q.ndim == 3 and window_size[1] == 0 and longest_q == 64
    i = torch.arange(len(q))
    document = torch.searchsorted(edges_q, i.int(), right=True)
    distance = i[:, None] - i
    mask = (document[:, None] == document) & (distance >= 0)
    if window_size[0] >= 0:
        mask &= distance <= window_size[0]
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("switches", SWITCHES, ids=["full", "window", "all"])
def test_what_the_gpu_kernel_is_given_means_the_same_as_the_mask(switches, monkeypatch):
    x, y, positions = packed()
    reference = gradients(model := loud(**switches), model(x, y, positions=positions))
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn_on_cpu)
    monkeypatch.setattr(models, "attention_mask", lambda x, cfg, positions, bounds: bounds)
    model = loud(**switches)
    for block in model.layers:  # a tuple goes through recompute and a full graph
        block.forward = torch.compile(recompute(block.forward, SELECTIVE), fullgraph=True, dynamic=False,
                                      backend="aot_eager")
    bounds = attention.document_bounds(positions)
    assert_same(gradients(model, model(x, y, positions=positions, bounds=bounds)), reference)


def test_document_bounds_have_one_shape_for_rows_of_the_same_run():
    _, _, positions = packed()
    cu_seqlens, max_seqlen = attention.document_bounds(positions)
    assert cu_seqlens.tolist() == [0, 10, 40, 41, 64] + [128] * 4 and max_seqlen == 64
    cu_seqlens, max_seqlen = attention.document_bounds(positions, 99, 5)
    assert cu_seqlens.tolist() == [0, 10, 40, 41, 64] + [128] * 6 and max_seqlen == 99
    # a row that starts within a document starts one all the same
    assert attention.document_bounds(torch.arange(8).view(2, 4))[0].tolist() == [0, 4, 8]


def test_plain_rows_take_the_plain_path():
    x = torch.zeros(2, 64, 64)
    assert models.attention_mask(x, build().cfg, None, None) is None
    assert models.attention_mask(x, build(sliding_window=64).cfg, None, None) is None
    mask = models.attention_mask(x, build(sliding_window=63).cfg, None, None)
    assert mask.shape == (1, 1, 64, 64) and not mask[0, 0, 63, 0] and mask[0, 0, 63, 1] and mask[0, 0, 62, 0]


# ----------------------------------------------------------------------------------------------------------------
# loss and weights


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
    a, b, c = (build(seed=seed, qkv_bias=True) for seed in (1, 1, 2))
    assert not a.layers[0].attn.qkv.bias.any()
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert name.endswith(("norm.weight", "bias")) or not torch.equal(p, r), name


class Gated(models.MLP):
    """A fork's layer with a parameter and a buffer of its own."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.gate = torch.nn.Parameter(torch.ones(cfg.n_embd))
        self.register_buffer("decay", torch.arange(3.0), persistent=False)

    def forward(self, x):
        return self.gate * super().forward(x)


def test_a_parameter_or_buffer_that_nothing_fills_is_an_error(monkeypatch):
    monkeypatch.setattr(models, "MLP", Gated)
    with pytest.raises(ValueError, match="nothing fills buffer layers.0.mlp.decay: give Gated a method init_buffers"):
        build()
    monkeypatch.setattr(Gated, "init_buffers", lambda self: None, raising=False)
    with pytest.raises(ValueError, match="nothing fills buffer layers.0.mlp.decay"):
        build()
    monkeypatch.setattr(Gated, "init_buffers", lambda self: self.decay.copy_(torch.arange(3.0)))
    with pytest.raises(ValueError, match="no initial value for layers.0.mlp.gate: give Gated a method init_param"):
        build()
    monkeypatch.setattr(Gated, "init_parameters", lambda self: self.gate.fill_(1.0), raising=False)
    mlp = build().layers[1].mlp
    assert mlp.gate.tolist() == [1.0] * 64 and mlp.decay.tolist() == [0.0, 1.0, 2.0]
    assert 0.005 < mlp.gate_up.weight.std() < 0.03  # its linear layers are filled as always


@pytest.mark.parametrize("window, document", [(None, None), (7, None), (None, 20), (7, 5)])
def test_attention_flops_count_what_the_mask_shows(window, document):
    model = build(sliding_window=window)
    _, scores = estimate.matmul_flops_per_token(model, document)
    cfg = model.cfg
    T = document or cfg.block_size
    seen = attention.document_mask(None, T, window, "cpu").sum().item()
    exact = 6 * 2 * cfg.n_layer * cfg.n_head * cfg.head_dim * seen / T
    assert abs(scores / exact - 1) < 1 / min(window or T, T)  # the diagonal counts half


def test_fp8_trains_layers_with_a_bias_and_names_sizes_it_cannot_take():
    config = fp8.FP8Config(enabled=True, emulate=True)
    x = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(5))
    plain, model = build(qkv_bias=True), build(config, qkv_bias=True)
    for layer in plain.layers:
        torch.nn.init.normal_(layer.attn.qkv.bias, std=0.2)
    model.load_state_dict(plain.state_dict())
    losses = [m(x, x) for m in (plain, model)]
    for loss in losses:
        loss.backward()
    # FP8 keeps 3 and 2 bits of a value: errors of some percent, less where they average out
    assert 1e-6 < (losses[1] / losses[0] - 1).abs() < 0.01
    for a, b in zip(plain.layers, model.layers, strict=True):
        a, b = a.attn.qkv.bias.grad, b.attn.qkv.bias.grad
        assert 1e-6 < (a - b).norm() / a.norm() < 0.2
    with pytest.raises(ValueError, match=r"divisible by 16: lm_head \(250, 64\)"):
        fp8.check(config, build(vocab_size=250), device=torch.device("cpu"), compiled=True, shards=0, tokens=64)


@pytest.mark.parametrize("change, message", [
    ({"n_head": 6, "n_kv_head": 4}, "model.n_head=6 must be a multiple of model.n_kv_head=4"),
    ({"head_dim": 31}, "model.head_dim=31 must be even"), ({"head_dim": 0}, "model.head_dim=0 must be even"),
    ({"rope_fraction": 0.7}, "model.rope_fraction=0.7 must be above 0 and at most 1, and an even part"),
    ({"rope_fraction": 0.0}, "model.rope_fraction=0.0")])
def test_impossible_sizes_are_named(change, message):
    (problem,) = models.ModelConfig(**{**TINY, **change}).problems()
    assert message in problem


@pytest.mark.gpu
def test_attention_on_a_gpu_is_cudnn_compiled_and_right():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cfg = models.ModelConfig(**{**TINY, "head_dim": 64, "block_size": 256})
    attn = models.Attention(cfg).to("cuda", torch.bfloat16)
    cos, sin = models.rope_tables(cfg, "cuda")
    x = torch.randn(2 * 256, cfg.n_embd, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(attn)
    with torch.profiler.profile() as profile:
        y = compiled(x, cos, sin)
    assert any("cudnn_attention" in e.name for e in profile.events())
    with sdpa_kernel(SDPBackend.MATH):
        exact = attn.cpu().float()(x.cpu().float(), cos.cpu(), sin.cpu())
    assert (y.cpu().float() - exact).norm() < 1e-2 * exact.norm()  # bf16


@pytest.mark.gpu
@pytest.mark.parametrize("switches", SWITCHES, ids=["full", "window", "all"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_packed_documents_on_a_gpu_run_varlen_and_agree_with_the_mask(switches, compiled):
    x, y, positions = (t.cuda() for t in packed())
    exact = gradients(reference := loud("cuda", **switches), reference(x, y, positions=positions))  # float32: the mask
    model = loud("cuda", torch.bfloat16, **switches)
    mode = "selective" if compiled else "none"
    compile_and_checkpoint(model, CompileConfig(enabled=compiled), mode)
    bounds = attention.document_bounds(positions.cpu())
    with torch.profiler.profile() as profile:
        loss, grads = gradients(model, model(x, y, positions=positions, bounds=bounds))
    # once a layer: selective recompute keeps what it gave
    assert sum(e.name == "aten::_flash_attention_forward" for e in profile.events()) == len(model.layers)
    # bf16 keeps 8 bits: the mask in bf16 on a CPU is 0.001 and 0.06 away from float32 here
    assert (loss - exact[0]).abs() < 0.01 * exact[0]
    assert all((grads[n].float() - g).norm() < 0.2 * g.norm() for n, g in exact[1].items())


@pytest.mark.gpu
def test_varlen_attention_on_a_gpu_is_masked_attention():
    cfg = models.ModelConfig(**{**TINY, "head_dim": 64, "sliding_window": 100, "block_size": 512})
    attn = models.Attention(cfg).to("cuda", torch.bfloat16)
    cos, sin = models.rope_tables(cfg, "cuda")
    positions = torch.cat([torch.arange(n) for n in (300, 1, 211)])[None].expand(2, -1)
    x = torch.randn(2 * 512, cfg.n_embd, device="cuda", dtype=torch.bfloat16)
    cu_seqlens, max_seqlen = attention.document_bounds(positions)
    y = attn(x, cos[positions], sin[positions], (cu_seqlens.cuda(), max_seqlen))
    mask = attention.document_mask(positions, 512, 100, "cpu")
    exact = attn.cpu().float()(x.cpu().float(), cos.cpu()[positions], sin.cpu()[positions], mask)
    assert (y.cpu().float() - exact).norm() < 1e-2 * exact.norm()  # bf16
