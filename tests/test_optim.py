"""optim.py: the update against torch.optim.AdamW, and what becomes of updates smaller than a bf16 ulp."""

import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from conftest import build, metrics, run, train_here
from torch._dynamo.utils import counters

import model as models
import optim
import train
from optim import (
    AdamW,
    OptimConfig,
    adamw_,
    get_lr,
    hash32,
    load_moment,
    round_to,
    state_bytes,
    store_moment,
    to_fp8,
)
from plumbing.sharding import plain_local
from plumbing.storage import Reader


def toy(dtype=torch.float32, n=64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n, n, bias=False), nn.RMSNorm(n), nn.Linear(n, 32, bias=False)).to(dtype)


def set_gradients(model, step):
    for i, p in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + i)
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def tensors_of(folder):
    """{name: tensor} of a checkpoint."""
    reader = Reader(folder)
    state = {name: torch.empty(t.size, dtype=t.properties.dtype)
             for name, t in reader.read_metadata().state_dict_metadata.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def step_scalars(lr, decay, debias1, debias2, clip, apply):
    """The keywords of adamw_ but for its seed."""
    values = dict(lr=lr, decay=decay, debias1=debias1, debias2=debias2, clip=clip, apply=apply)
    return {key: torch.tensor(value) for key, value in values.items()} | dict(beta1=0.9, beta2=0.95, eps=1e-8)


@pytest.mark.parametrize("compiled", [False, True])
def test_float32_updates_are_those_of_torch_with_clipping(compiled):
    cfg = OptimConfig(weights="plain", grad_clip=1.0, weight_decay=0.1)
    ours, theirs = toy(), toy()
    optimizer = AdamW(ours, cfg, seed=0, compiled=compiled)
    matrices, norms = [p for p in theirs.parameters() if p.ndim == 2], [p for p in theirs.parameters() if p.ndim == 1]
    reference = torch.optim.AdamW([{"params": matrices}, {"params": norms, "weight_decay": 0.0}], lr=1e-2,
                                  betas=cfg.betas, eps=cfg.eps, weight_decay=0.1)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        norm = optimizer.grad_norm()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        assert torch.allclose(norm, expected, rtol=1e-6)
        optimizer.step(1e-2, norm)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def drift(weights, steps=400):
    """Mean movement of bf16 weights of 1.0 under a constant gradient at a learning rate far below a bf16 ulp."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    cfg = OptimConfig(weights=weights, weight_decay=0.0, grad_clip=0.0)
    optimizer = AdamW(model, cfg, seed=3, compiled=False)
    for _ in range(steps):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step(1e-5, optimizer.grad_norm())  # each update is 1e-5; a bf16 ulp below 1.0 is 3.9e-3
    return 1 - model.weight.float().mean().item()


def test_small_updates_get_lost_in_plain_bf16_and_arrive_otherwise():
    assert drift("plain") == 0.0
    # 400 x 1e-5 = 4e-3; one ulp for the master weight; for 4096 random roundings a few percent
    assert abs(drift("fp32_master") - 4e-3) < 2e-3
    assert abs(drift("stochastic_rounding") - 4e-3) < 4e-4


def test_stochastic_rounding_is_unbiased_and_exact_on_bf16_values():
    noise = hash32(torch.arange(100_000, dtype=torch.int32))
    x = torch.full((100_000,), 1.0 + 2**-9)  # a quarter of the way from 1 to its bf16 neighbour 1 + 2^-7
    rounded = round_to(x, torch.bfloat16, noise).float()
    assert set(rounded.tolist()) == {1.0, 1.0078125}
    assert abs((rounded > 1).float().mean().item() - 0.25) < 0.01
    exact = torch.randn(1000).to(torch.bfloat16).float()
    assert torch.equal(round_to(exact, torch.bfloat16, noise[:1000]).float(), exact)


def test_hash_gives_the_reference_bits():
    # lowbias32 in unbounded integers
    def reference(x):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    values = torch.tensor([0, 1, 12345, -7, 2**31 - 1], dtype=torch.int32)
    assert [h & 0xFFFFFFFF for h in hash32(values).tolist()] == [reference(v & 0xFFFFFFFF) for v in values.tolist()]


def test_compiled_stochastic_rounding_equals_eager():
    states = []
    for update in (adamw_, torch.compile(adamw_)):
        torch.manual_seed(0)
        p, g, m, v = (torch.randn(4, 1024).abs().to(torch.bfloat16) for _ in range(4))
        scalars = step_scalars(1e-3, 0.1, 0.1, 0.05, 1.0, True)
        update(p, g, m, v, None, **scalars, seed=torch.tensor(77, dtype=torch.int32))
        states.append((p, m, v))
    for a, b in zip(*states, strict=True):
        # compiled arithmetic may contract a multiply-add: an ulp of float32 rarely moves a rounding
        assert (a != b).float().mean() < 0.01


def test_gradients_of_several_passes_add_up_in_float32():
    model = nn.Linear(16, 16, bias=False).to(torch.bfloat16)
    optimizer = AdamW(model, OptimConfig(weights="fp32_master"), seed=0, compiled=False)
    for value in (1.0, 2**-9, 2**-9):  # in bf16 the small ones would be lost beside the 1
        model.weight.grad = torch.full_like(model.weight, value)
        optimizer.accumulate()
    assert torch.allclose(optimizer.grad_norm(), torch.tensor(16 * (1 + 2**-8)))


def test_small_gradients_are_not_scaled_up_and_large_ones_are_scaled_to_the_limit():
    for norm, factor in ((0.01, 1.0), (100.0, 0.01)):  # grad_clip=1
        model = nn.Linear(8, 8, bias=False)
        optimizer = AdamW(model, OptimConfig(weights="plain", grad_clip=1.0), seed=0, compiled=False)
        g = torch.randn(8, 8)
        model.weight.grad = g = g / g.norm() * norm
        optimizer.step(1e-3, optimizer.grad_norm())
        assert torch.allclose(optimizer.state["exp_avg"]["weight"], (1 - 0.9) * factor * g, rtol=1e-5)


def rounded(seed):
    """Two equal tensors after one and two steps with equal gradients, under stochastic rounding."""
    model = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2)).to(torch.bfloat16)
    optimizer = AdamW(model, OptimConfig(weights="stochastic_rounding", weight_decay=0.0), seed=seed, compiled=False)
    results = []
    for _ in range(2):
        for layer in model:
            nn.init.ones_(layer.weight)
            layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step(1e-3, optimizer.grad_norm())  # a quarter of a bf16 ulp below 1
        results += [layer.weight.detach().clone() for layer in model]
    return results


def test_the_norm_of_bf16_gradients_has_the_digits_of_float32():
    model = nn.Sequential(nn.Linear(32, 48, bias=False), nn.Linear(48, 16, bias=False)).to(torch.bfloat16)
    optimizer = AdamW(model, OptimConfig(weights="stochastic_rounding"), seed=0, compiled=False)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    exact = torch.cat([p.grad.flatten().double() for p in model.parameters()]).norm()
    norm = optimizer.grad_norm()
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact.item(), rel=1e-6)


def test_rounding_noise_differs_by_tensor_step_and_seed_and_repeats():
    results = rounded(seed=0) + rounded(seed=1)
    assert not any(torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])
    assert all(torch.equal(a, b) for a, b in zip(rounded(seed=0), results[:4], strict=True))


def test_fp8_moments_leave_the_rounding_of_the_weight_alone():
    master, exact = toy(torch.bfloat16), toy(torch.float32)
    optimizers = [AdamW(master, OptimConfig(weights="fp32_master", fp8_moments=True), seed=0, compiled=False),
                  AdamW(exact, OptimConfig(weights="plain", fp8_moments=True), seed=0, compiled=False)]
    for model, optimizer in zip((master, exact), optimizers, strict=True):
        set_gradients(model, 1)
        optimizer.step(1e-3, optimizer.grad_norm())
    for name, p in master.named_parameters():
        assert torch.equal(p, optimizers[0].masters[name].bfloat16())  # to nearest
    assert all((p != p.bfloat16()).float().mean() > 0.9 for p in exact.parameters() if p.ndim == 2)  # not to bf16


@pytest.mark.parametrize("fp8_moments", [False, True])
@pytest.mark.parametrize("dtype, weights", [
    (torch.bfloat16, "fp32_master"), (torch.bfloat16, "stochastic_rounding"), (torch.bfloat16, "plain"),
    (torch.float32, "fp32_master"), (torch.float32, "plain")])
def test_what_is_stored_takes_the_bytes_that_the_estimate_is_given(dtype, weights, fp8_moments):
    cfg = OptimConfig(weights=weights, fp8_moments=fp8_moments)
    model = nn.Linear(256, 32, bias=False).to(dtype)
    optimizer = AdamW(model, cfg, seed=0, compiled=False)
    stored = sum(t.nbytes for kind in optimizer.state.values() for t in kind.values())
    assert stored == state_bytes(cfg, "weight", model.weight.shape, dtype)
    # by hand: both moments, and the float32 master of a bf16 weight
    master = 4 if dtype == torch.bfloat16 and weights == "fp32_master" else 0
    moments = 2 + 2 * 4 / 128 if fp8_moments else 8 if master else 2 * dtype.itemsize
    assert stored == (master + moments) * model.weight.numel()


def test_weights_and_masters_that_nothing_filled_are_found():
    model = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    nn.init.constant_(model.weight, float("nan"))
    optimizer = AdamW(model, OptimConfig(), seed=0, compiled=False)
    assert optimizer.unfilled() == ["weight", "weight (master)"]
    nn.init.ones_(model.weight)  # too late: the master is a copy of what was there
    assert optimizer.unfilled() == ["weight (master)"]
    optimizer.masters["weight"].fill_(1.0)
    assert optimizer.unfilled() == []
    optimizer.weights["weight"][3, 4] = float("nan")  # a part of it
    assert optimizer.unfilled() == ["weight"]


def test_schedule_warms_up_then_decays_to_the_minimum():
    cfg = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    assert get_lr(cfg, 1, 100) == pytest.approx(0.1)
    assert get_lr(cfg, 10, 100) == 1.0
    assert get_lr(cfg, 55, 100) == pytest.approx(0.55)
    assert get_lr(cfg, 100, 100) == pytest.approx(0.1)
    cfg.min_lr = 2.0  # of a config in which only lr was lowered
    assert get_lr(cfg, 55, 100) == get_lr(cfg, 100, 100) == 1.0


def test_a_run_updates_by_the_rate_of_its_step_and_logs_it(tiny_run, tmp_path, monkeypatch):
    used, step = [], AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda self, lr, *args: (used.append(lr), step(self, lr, *args)))
    train_here(*tiny_run, "--max_steps=4", "--optim.min_lr=0.001", "--eval_interval=0", "--checkpoint_interval=0",
               f"--out_dir={tmp_path}")
    # two steps of warm-up to 0.003, then a cosine that is half-way down at the third of four
    assert used == pytest.approx([0.0015, 0.003, 0.002, 0.001])
    assert [row["lr"] for row in metrics(tmp_path).train.values()] == used


def test_a_run_stops_before_it_trains_weights_that_nothing_filled(tiny_run, tmp_path, monkeypatch):
    def forgets_the_norm(model, seed, init_weights=models.init_weights):
        init_weights(model, seed)
        nn.init.constant_(model.norm.weight, math.nan)

    monkeypatch.setattr(train.models, "init_weights", forgets_the_norm)
    with pytest.raises(AssertionError, match=r"nothing filled: \['norm.weight'\]"):
        train_here(*tiny_run, f"--out_dir={tmp_path}")


def test_projections_into_the_residual_stream_start_smaller_by_depth():
    model = build(n_layer=8, n_embd=128, ffn_dim=256)
    stds = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
    for name, std in stds.items():
        residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
        # 0.02 / sqrt(2 * 8) = 0.005; the smallest matrix has 16,384 values, so 0.6% off is one standard deviation
        assert std == pytest.approx(0.005 if residual else 0.02, rel=0.03), name
    assert sum(std < 0.01 for std in stds.values()) == 16


def test_weight_decay_spares_norms():
    model = toy()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = AdamW(model, OptimConfig(weights="plain", weight_decay=0.5), seed=0, compiled=False)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1, optimizer.grad_norm())
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.allclose(p, old * (1 - 0.05) if p.ndim == 2 else old)


# ----------------------------------------------------------------------------------------------------------------
# state in host memory


def trained(cfg, dtype, steps=3, casts=()):
    """The weights and the optimizer of a small model after some steps, one of them without a gradient for a weight."""
    model = toy(dtype, 256)
    optimizer = AdamW(model, cfg, seed=1, compiled=False)
    optimizer.offload_weights(dict(casts))
    for step in range(steps):
        set_gradients(model, step)
        if step == 1:
            model[0].weight.grad = None
        optimizer.step(1e-2, optimizer.grad_norm())
    return dict(model.named_parameters()), optimizer


@pytest.mark.parametrize("fp8_moments", [False, True])
@pytest.mark.parametrize("dtype, weights", [
    (torch.bfloat16, "fp32_master"), (torch.bfloat16, "stochastic_rounding"), (torch.bfloat16, "plain"),
    (torch.float32, "plain")])
def test_updates_with_offloaded_state_are_the_same_bit_for_bit(dtype, weights, fp8_moments):
    kept, optimizer = trained(OptimConfig(weights=weights, fp8_moments=fp8_moments), dtype)
    for part, names in ((0.5, {"2.weight"}), (1.0, {"0.weight", "2.weight"})):  # the first is eight times the other
        moved, offloading = trained(OptimConfig(weights=weights, fp8_moments=fp8_moments, offload=part), dtype)
        assert offloading.offloaded == names
        assert all(torch.equal(moved[name], kept[name]) for name in kept)
        assert offloading.state.keys() == optimizer.state.keys()
        for kind, tensors in optimizer.state.items():
            assert all(torch.equal(offloading.state[kind][name].view(torch.uint8), tensor.view(torch.uint8))
                       for name, tensor in tensors.items())


@pytest.mark.parametrize("keys", [dict(weights="fp32_master"), dict(weights="stochastic_rounding", fp8_moments=True)])
def test_weights_in_host_memory_get_the_same_updates_and_their_casts_are_renewed(keys, monkeypatch):
    monkeypatch.setattr(optim, "PIECE", 3000)
    kept, _ = trained(OptimConfig(**keys), torch.bfloat16)
    cast = {"0.weight": [], "2.weight": []}
    renew = {name: lambda w, seen=seen: seen.append(w.clone()) for name, seen in cast.items()}
    params, optimizer = trained(OptimConfig(**keys, offload=1.0), torch.bfloat16, casts=renew.items())
    assert all(torch.equal(optimizer.weights[name], kept[name]) for name in kept)
    assert all(torch.equal(seen[-1], kept[name]) for name, seen in cast.items())
    assert {name: len(seen) for name, seen in cast.items()} == {"0.weight": 2, "2.weight": 3}  # updates of each
    for name, p in params.items():
        assert p.isnan().all() == (name in cast) and torch.equal(plain_local(p), kept[name])
    _, optimizer = trained(OptimConfig(**keys, offload=0.5), torch.bfloat16, casts=renew.items())
    assert list(optimizer.casts) == ["2.weight"]  # the only one whose state moved


@pytest.mark.parametrize("offload", [0.0, 1.0])
def test_updates_in_pieces_are_those_of_the_whole_weight(offload, monkeypatch):
    cfg = OptimConfig(weights="plain", offload=offload)
    whole, _ = trained(cfg, torch.float32)
    lengths, step = set(), optim.adamw_
    monkeypatch.setattr(optim, "adamw_", lambda p, *args, **keys: (lengths.add(p.numel()), step(p, *args, **keys)))
    monkeypatch.setattr(optim, "PIECE", 3000)
    cut, _ = trained(cfg, torch.float32)
    # 256 x 256 in 22 pieces of 12 rows, the last of 4; 32 x 256 in 3 of 12, the last of 8; a norm
    assert lengths == {12 * 256, 4 * 256, 8 * 256, 256}
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_pieces_have_noise_of_their_own(monkeypatch):
    monkeypatch.setattr(optim, "PIECE", 8 * 256)
    model = nn.Linear(256, 16, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = AdamW(model, OptimConfig(weights="stochastic_rounding", weight_decay=0.0), seed=0, compiled=False)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step(1e-3, optimizer.grad_norm())  # a quarter of a bf16 ulp below 1
    assert not torch.equal(model.weight[:8], model.weight[8:])


def test_only_what_is_offloaded_is_in_host_memory(monkeypatch):
    on_host = []

    def host_zeros(shape, dtype, device):
        on_host.append(torch.zeros(shape, dtype=dtype))
        return on_host[-1]

    monkeypatch.setattr(optim, "host_zeros", host_zeros)
    optimizer = AdamW(toy(torch.bfloat16, 256), OptimConfig(offload=0.5), seed=1, compiled=False)
    stored = [tensors["2.weight"] for tensors in optimizer.state.values()]
    assert len(on_host) == len(stored) == 3 and all(a is b for a, b in zip(on_host, stored, strict=True))
    assert torch.equal(optimizer.masters["2.weight"], optimizer.weights["2.weight"].float())


def test_a_run_resumes_bit_for_bit_with_another_part_offloaded(tiny_run, tmp_path):
    keys = [*tiny_run, "--optim.fp8_moments=True", "--optim.min_lr=0.003", "--eval_interval=0", "--model.n_layer=1"]
    train_here(*keys, f"--out_dir={tmp_path / 'kept'}")
    moved = [*keys, f"--out_dir={tmp_path / 'moved'}"]
    train_here(*moved, "--optim.offload=1", "--shard_one_rank=True", "--max_steps=3")
    train_here(*moved, "--optim.offload=0.5")
    losses = [[row["loss"] for row in metrics(tmp_path / name).train.values()] for name in ("kept", "moved")]
    assert len(losses[0]) == 6 and losses[0] == losses[1]


def test_a_checkpoint_whose_moments_were_converted_goes_on_with_fp8_moments(tiny_run, tmp_path):
    keys = [*tiny_run, "--eval_interval=0", "--model.n_layer=1", "--keep=0"]
    train_here(*keys, f"--out_dir={tmp_path / 'exact'}")
    start = tmp_path / "exact/checkpoints/step_00000003"
    run("bench/moments_to_fp8.py", start, tmp_path / "fp8")
    converted = tensors_of(tmp_path / "fp8/checkpoints/step_00000003")
    for name, moment in ((name, t) for name, t in tensors_of(start).items() if ".exp_avg" in name and t.ndim == 2):
        _, kind, weight = name.split(".", 2)
        units = converted[f"optim.{kind}_unit.{weight}"].repeat_interleave(optim.fp8_block(moment.shape[1]), 1)
        ours = converted[f"optim.{kind}_fp8.{weight}"].float() * units
        ours = ours.square() if kind == "exp_avg_sq" else ours
        assert (ours - moment).norm() < 0.1 * moment.norm()
    train_here(*keys, "--optim.fp8_moments=True", f"--out_dir={tmp_path / 'fp8'}")
    exact, rounded = (metrics(tmp_path / name).train for name in ("exact", "fp8"))
    assert list(rounded) == [4, 5, 6] and rounded[4]["loss"] == exact[4]["loss"]
    assert rounded[6]["loss"] == pytest.approx(exact[6]["loss"], rel=0.01)
    again = run("bench/moments_to_fp8.py", start, tmp_path / "fp8", check=False)
    assert (again.returncode, again.stderr) == (
        2, f"moments_to_fp8.py: {tmp_path / 'fp8'} holds checkpoints already: name a new folder\n")
    mistaken = run("bench/moments_to_fp8.py", tmp_path / "exact", tmp_path / "new", check=False)
    assert (mistaken.returncode, mistaken.stderr) == (
        2, f"moments_to_fp8.py: {tmp_path / 'exact'} is no checkpoint: name OUT_DIR/checkpoints/step_N\n")


# ----------------------------------------------------------------------------------------------------------------
# moments in FP8


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("compiled", [False, True])
def test_fp8_moments_are_rounded_at_random_to_what_e4m3_holds_without_bias(compiled, device):
    x = torch.cat([torch.tensor([448.0, 0.0, -8.5, 2**-10, -1.5 * 2**-7]), torch.rand(123) * 896 - 448])
    x = x.repeat(20_000, 1)
    noise = hash32(torch.arange(x.numel(), dtype=torch.int32).view(x.shape))
    cast = torch.compile(to_fp8) if compiled else to_fp8
    values, unit = (t.cpu() for t in cast(x.to(device), noise.to(device)))
    assert torch.equal(values.to(torch.float8_e4m3fn).float(), values)
    assert ((unit - 1).abs() < 2**-19).all()
    assert set(values[:, 1].tolist()) == {0.0} and set(values[:, 2].tolist()) == {-8.0, -9.0}
    # far below the normal values of float32 on the way: 0 here would be a processor that flushes those to 0
    assert set(values[:, 3].tolist()) == {0.0, 2**-9} and values.abs().max() == 448
    # neighbours are at most 2^-3 of a value apart, so a mean over 20,000 is within 2^-3 / sqrt(12 * 20,000), times 5
    others = [i for i in range(128) if i != 3]
    assert torch.allclose((values * unit).mean(0)[others], x[0, others], rtol=2e-3)
    assert (values[:, 3] > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    nonzero = cast(x.abs().to(device), noise.to(device), nonzero=True)[0].cpu()
    assert torch.equal(nonzero, values.abs().clamp(min=2**-9))


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1.0, 1e20])
def test_fp8_moments_of_any_size_are_finite_and_the_largest_is_kept(scale):
    x = (torch.rand(1000, 128) * 2 - 1) * scale
    values, unit = to_fp8(x, hash32(torch.arange(x.numel(), dtype=torch.int32).view(x.shape)))
    assert torch.equal(values.to(torch.float8_e4m3fn).float(), values) and values.abs().max() <= 448
    kept = torch.isclose((values * unit).abs().amax(1), x.abs().amax(1), rtol=1e-5, atol=1e-30)
    assert kept.float().mean() > 0.99  # it is put a millionth below 448: one in 10^5 rounds down to 416


def test_not_even_the_largest_noise_rounds_above_448():
    x = torch.rand(200_000, 8)
    values, _ = to_fp8(x, torch.full(x.shape, -1, dtype=torch.int32))
    assert values.max() == 448


@pytest.mark.parametrize("root", [False, True])
def test_a_moment_in_fp8_keeps_signs_and_a_root_never_becomes_zero(root):
    new = torch.cat([torch.tensor([[-448.0, 448.0, 1e-6, -1.0]]), torch.full((1, 124), 2.0)], 1)
    new = new.abs() if root else new
    moment = torch.zeros(1, 128).to(torch.float8_e4m3fn), torch.ones(1, 1)
    store_moment(moment, new, torch.tensor(True), torch.zeros(1, 128, dtype=torch.int32), root)
    assert load_moment(moment)[0, 2] == (pytest.approx(2**-9, rel=1e-5) if root else 0.0)
    assert torch.equal(load_moment(moment).sign()[0, [0, 1, 3]], new.sign()[0, [0, 1, 3]])


@pytest.mark.parametrize("weights", ["fp32_master", "stochastic_rounding"])
@pytest.mark.parametrize("compiled", [False, True])
def test_fp8_moments_follow_the_exact_ones_in_two_bytes(weights, compiled):
    exact, ours = toy(torch.bfloat16, 256), toy(torch.bfloat16, 256)
    optimizers = [AdamW(model, OptimConfig(weights=weights, fp8_moments=fp8), seed=1, compiled=compiled)
                  for model, fp8 in ((exact, False), (ours, True))]
    start = [p.detach().clone() for p in ours.parameters()]
    for step in range(20):
        for model, optimizer in zip((exact, ours), optimizers, strict=True):
            set_gradients(model, step)
            optimizer.step(1e-2, optimizer.grad_norm())
    for a, b, s in zip(exact.parameters(), ours.parameters(), start, strict=True):
        # each rounding is off by up to 2^-3; ten of them count in the first moment, and they are independent
        assert (a - b).float().norm() < 0.1 * (a - s).float().norm()
    state = optimizers[1].state
    kept = sum(t.nbytes for kind in state if kind.endswith(("_fp8", "_unit")) for t in state[kind].values())
    assert kept / sum(p.numel() for p in ours.parameters() if p.ndim == 2) == 2 + 8 / 128
    assert list(state["exp_avg"]) == ["1.weight"]


def test_one_kernel_updates_matrices_of_any_size_with_fp8_moments():
    torch._dynamo.reset()
    counters.clear()
    model = nn.Sequential(*(nn.Linear(n, 128, bias=False) for n in (128, 256, 384))).to(torch.bfloat16)
    optimizer = AdamW(model, OptimConfig(weights="stochastic_rounding", fp8_moments=True), seed=1, compiled=True)
    set_gradients(model, 0)
    optimizer.step(1e-2, optimizer.grad_norm())
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_blocks_of_each_width_have_a_kernel_of_their_own(device):
    """Triton 3.6 cannot compile one for all: "Cannot bitcast data-type of size 64 to data-type of size 32"."""
    torch._dynamo.reset()
    counters.clear()
    cfg, updated = OptimConfig(weights="stochastic_rounding", fp8_moments=True), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(n, 64, bias=False) for n in (128, 64, 192, 256))).to(device, torch.bfloat16)
        optimizer = AdamW(model, cfg, seed=1, compiled=compiled)
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p)
        optimizer.step(1e-2, optimizer.grad_norm())
        updated.append(torch.cat([p.detach().float().flatten() for p in model.parameters()]))
    assert counters["stats"]["unique_graphs"] == 3  # 128, 64 and 192 values
    # fused multiply-adds make some values round to the other neighbour
    assert (updated[0] != updated[1]).float().mean() < 0.05 and (updated[0] - updated[1]).abs().max() < 0.01


def test_weight_and_moments_are_rounded_without_bias_and_not_alike():
    torch.manual_seed(0)
    p, g = (1 + torch.rand(1000, 128)).to(torch.bfloat16), 1 + torch.rand(1000, 128)
    before = p.float()
    m, v = ((torch.zeros(1000, 128, dtype=torch.float8_e4m3fn), torch.ones(1000, 1)) for _ in range(2))
    scalars = step_scalars(1e-3, 0.0, 10.0, 0.05**-0.5, 0.5, True)
    adamw_(p, g, m, v, None, **scalars, seed=torch.tensor(7, dtype=torch.int32))
    exact = {"m": 0.05 * g, "root of v": 0.5 * 0.05**0.5 * g, "w": before - 1e-3}
    errors = torch.stack([(stored / exact[name] - 1).flatten()
                          for name, stored in (("m", load_moment(m)), ("root of v", load_moment(v)), ("w", p.float()))])
    # up to 2^-4 off, or 2^-8, so means of 128,000 are within 2^-4 / sqrt(128,000) = 2e-4, times 3, if there is no bias
    assert errors.abs().max() < 0.13 and (errors.mean(1).abs() < torch.tensor([6e-4, 6e-4, 4e-5])).all()
    # in proportion: the square of the error is then twice that of rounding to nearest
    nearest = torch.stack([((exact[name] / unit).to(torch.float8_e4m3fn).float() * unit / exact[name] - 1).flatten()
                           for name, unit in (("m", m[1]), ("root of v", v[1]))])
    assert torch.allclose(errors[:2].square().mean(1), 2 * nearest.square().mean(1), rtol=0.05)
    # rounded by the same noise, two of them would have a correlation of 0.4 to 0.5
    assert (torch.corrcoef(errors) - torch.eye(3)).abs().max() < 0.03


@pytest.mark.parametrize("kind", ["fp8", "bfloat16", "float32"])
def test_gradients_of_nan_in_a_bad_step_change_no_bit(kind):
    torch.manual_seed(0)
    p, g = torch.randn(8, 128).to(torch.bfloat16), torch.full((8, 128), float("nan"))
    if kind == "fp8":
        m, v = ((torch.randn(8, 128).to(torch.float8_e4m3fn), torch.rand(8, 1)) for _ in range(2))
    else:
        m, v = (torch.rand(8, 128).to(getattr(torch, kind)) for _ in range(2))
    state = [p, *(m if kind == "fp8" else [m]), *(v if kind == "fp8" else [v])]
    before = [t.clone().view(torch.uint8) for t in state]
    scalars = step_scalars(1e-3, 0.1, 10.0, 4.5, float("nan"), False)
    seed = None if kind == "float32" else torch.tensor(7, dtype=torch.int32)
    adamw_(p, g, m, v, None, **scalars, seed=seed)
    assert all(torch.equal(t.view(torch.uint8), b) for t, b in zip(state, before, strict=True))


@pytest.mark.parametrize("size", [1e-9, 1e-15])
def test_small_gradients_with_a_small_eps_make_steps_like_any_other(size):
    model = nn.Linear(128, 8, bias=False)
    before = model.weight.detach().clone()
    optimizer = AdamW(model, OptimConfig(weights="plain", weight_decay=0.0, eps=1e-20), seed=0, compiled=False)
    model.weight.grad = torch.randn_like(model.weight).sign() * size
    optimizer.step(1e-3, optimizer.grad_norm())
    assert torch.allclose((model.weight - before).abs(), torch.tensor(1e-3), rtol=1e-2)


def test_a_bad_step_leaves_fp8_moments_bit_for_bit():
    moment = torch.randn(8, 128).to(torch.float8_e4m3fn), torch.rand(8, 1)
    before = [t.clone() for t in moment]
    old, noise = load_moment(moment), torch.zeros(8, 128, dtype=torch.int32)
    store_moment(moment, torch.full((8, 128), float("nan")), torch.tensor(False), noise)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(moment, before, strict=True))
    store_moment(moment, old + 1, torch.tensor(True), noise)
    assert not torch.equal(load_moment(moment), old)


def test_no_second_moment_underflows():
    """Beside a first moment that did not, it would make a step of lr / eps."""
    p, g = torch.zeros(1, 128), torch.full((1, 128), 1e-7)
    g[0, 0] = 1e3  # 2^33 above the others
    m, v = ((torch.zeros(1, 128, dtype=torch.float8_e4m3fn), torch.ones(1, 1)) for _ in range(2))
    scalars = step_scalars(1e-3, 0.0, 10.0, 20.0, 1.0, True)
    adamw_(p, g, m, v, None, **scalars, seed=torch.tensor(7, dtype=torch.int32))
    assert (load_moment(v) > 0).all() and (load_moment(m) == 0).sum() > 100
