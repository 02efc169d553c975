"""attention.py: FlashAttention 4's operator, with its package's two functions planted where there is none."""

import importlib.metadata
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import run, train_here
from test_model import SELECTIVE, SWITCHES, assert_same, gradients, loud, packed

import attention
import model as models
from configurator import Config, ModelConfig
from plumbing import flash4
from plumbing.compiling import CompileConfig, compile_and_checkpoint, recompute
from plumbing.errors import UserError


def visible(q, k, cu_seqlens, window):
    """Which of the keys k (..., T, K, D) a query sees: (T, T) bool."""
    i = torch.arange(q.shape[-3])
    distance = i[:, None] - i
    document = torch.searchsorted(cu_seqlens, i.int(), right=True) if cu_seqlens is not None else torch.zeros_like(i)
    return (distance >= 0) & (distance <= (len(i) if window is None else window)) & (
        document[:, None] == document)


def scores(q, k, cu_seqlens, window):
    """(probabilities of each query and head (..., H, T, T), log of the sums of exponentials (..., H, T))."""
    s = torch.einsum("...qhd,...khd->...hqk", q, k) / q.shape[-1] ** 0.5
    s = s.masked_fill(~visible(q, k, cu_seqlens, window), -torch.inf)
    return s.softmax(-1), s.logsumexp(-1)


class Planted:
    """flash_attn.cute.interface by its documentation, in plain PyTorch (an operator's inside has no autograd)."""

    def __init__(self):
        self.forwards, self.backwards, self.deterministic = 0, 0, None

    def check(self, q, arguments):
        assert arguments["causal"] and arguments["cu_seqlens_q"] is arguments["cu_seqlens_k"]
        assert (arguments["max_seqlen_q"] is None) == (arguments["max_seqlen_k"] is None) == (q.ndim == 4)
        return arguments["cu_seqlens_q"], arguments["window_size_left"]

    def forward(self, q, k, v, return_lse, **arguments):
        self.forwards += 1
        assert return_lse
        k, v = (t.repeat_interleave(q.shape[-2] // t.shape[-2], -2) for t in (k, v))
        p, lse = scores(q, k, *self.check(q, arguments))
        out = torch.einsum("...hqk,...khd->...qhd", p, v)
        return out.contiguous(), lse.contiguous(), None, None, None  # early versions give two

    def backward(self, q, k, v, out, grad, lse, dq, dk, dv, deterministic, **arguments):
        self.backwards, self.deterministic = self.backwards + 1, deterministic
        groups = k.shape[-2], q.shape[-2] // k.shape[-2]
        k, v = (t.repeat_interleave(groups[1], -2) for t in (k, v))
        p, again = scores(q, k, *self.check(q, arguments))
        assert torch.allclose(lse, again, atol=1e-5)
        assert torch.allclose(out, torch.einsum("...hqk,...khd->...qhd", p, v), atol=1e-5)
        dp = torch.einsum("...qhd,...khd->...hqk", grad, v)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
        dq.copy_(torch.einsum("...hqk,...khd->...qhd", ds, k))
        for total, each in ((dk, torch.einsum("...hqk,...qhd->...khd", ds, q)),
                            (dv, torch.einsum("...hqk,...qhd->...khd", p, grad))):
            total.copy_(each.unflatten(-2, groups).sum(-2))  # over the query heads that share a key


@pytest.fixture
def planted(monkeypatch):
    planted = Planted()
    interface = ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd, interface._flash_attn_bwd = planted.forward, planted.backward
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    return planted


@pytest.mark.parametrize("switches", SWITCHES, ids=["full", "window", "all"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_flash4_gives_what_masks_give_and_is_not_recomputed(switches, compiled, planted, monkeypatch):
    x, y, positions = packed()
    reference = gradients(model := loud(**switches), model(x, y, positions=positions))
    monkeypatch.setattr(models, "attention_mask", lambda x, cfg, positions, bounds: bounds)
    model = loud(**switches)
    for block in model.layers:
        block.attn.attend = flash4.attend
        block.forward = recompute(block.forward, SELECTIVE)
        if compiled:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    bounds = attention.document_bounds(positions)
    assert_same(gradients(model, model(x, y, positions=positions, bounds=bounds)), reference)
    assert planted.forwards == planted.backwards == len(model.layers)


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash4_gives_what_whole_rows_give(deterministic, planted, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    x, y, _ = packed()
    reference = gradients(model := loud(), model(x, y))
    model = models.Transformer(model.cfg)
    for block in model.layers:
        block.attn.attend = flash4.attend
    model.load_state_dict(loud().state_dict())
    models.init_buffers(model)
    assert_same(gradients(model, model(x, y)), reference)
    assert planted.forwards == len(model.layers) and planted.deterministic is deterministic


def test_the_operators_shapes_are_known_without_running_them(planted):
    """The fake kernels give each output's shape, dtype and strides."""
    for shape, bounds in (((2, 24), (None, None)), ((48,), (torch.tensor([0, 20, 48], dtype=torch.int32), 128))):
        q, k, v = (torch.randn(*shape, heads, 8, requires_grad=True) for heads in (4, 2, 2))
        torch.library.opcheck(torch.ops.nanofp8.flash4.default, (q, k, v, *bounds, 5))


GPU = SimpleNamespace(type="cuda")


@pytest.mark.parametrize("keys, generation, message", [
    ({}, None, "kernels for Hopper and Blackwell GPUs only"), ({}, 8, "kernels for Hopper and Blackwell GPUs only"),
    ({"dtype": "float32"}, 9, "dtype=bfloat16, not float32"),
    ({"model": ModelConfig(head_dim=36)}, 9, "up to 256 on this GPU, not model.head_dim=36"),
    ({"model": ModelConfig(head_dim=192)}, 10, "up to 128 on this GPU, not model.head_dim=192"),
    ({}, 9, "it needs flash-attn-4 4.0.0b36 or newer: pip install --pre flash-attn-4"),
    ({"installed": "4.0.0b4"}, 9, "it needs flash-attn-4 4.0.0b36 or newer: pip install"),
])
def test_flash4_where_it_cannot_run_is_an_error_if_asked_for_and_else_not_used(keys, generation, message, monkeypatch):
    keys = dict(keys)
    installed = keys.pop("installed", None)

    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    monkeypatch.setattr(importlib.metadata, "version", version)
    device, nothing = GPU if generation else torch.device("cpu"), SimpleNamespace(layers=[])
    with pytest.raises(UserError, match=message):
        attention.select_kernel(nothing, Config(flash4=True, **keys), device)
    assert attention.select_kernel(nothing, Config(**keys), device) == "PyTorch's"


@pytest.mark.parametrize("flash4_key", [None, True])
def test_flash4_is_used_where_it_is_installed_and_false_turns_it_off(flash4_key, planted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.0.0")
    block = SimpleNamespace(attn=SimpleNamespace(attend=None))
    model = SimpleNamespace(layers=[block])
    assert attention.select_kernel(model, Config(flash4=False), GPU) == "PyTorch's" and block.attn.attend is None
    assert attention.select_kernel(model, Config(flash4=flash4_key), GPU) == "FlashAttention 4"
    assert block.attn.attend is flash4.attend


def test_an_installation_that_cannot_be_imported_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.0.0")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UserError, match=r"flash-attn-4 4.0.0 cannot be imported \(ModuleNotFoundError: .*flash4=False"):
        attention.select_kernel(SimpleNamespace(layers=[]), Config(), GPU)


def test_train_stops_where_flash4_is_asked_for_and_cannot_run(tiny_run):
    with pytest.raises(UserError, match="flash4=True: it has kernels for Hopper"):
        train_here(*tiny_run, "--flash4=True")


def test_a_run_with_flash4_computes_attention_with_it(tiny_run, tmp_path, planted, monkeypatch):
    monkeypatch.setattr(flash4, "usable", lambda config, device: True)
    train_here(*tiny_run, "--flash4=True", "--max_steps=1", "--checkpoint_interval=0", f"--out_dir={tmp_path / 'out'}")
    assert planted.backwards == 2 * (2 + 1)  # layers x micro-batches, and the first pass
    assert planted.forwards > planted.backwards  # evaluation


def test_the_kernels_are_timed_for_rows_documents_and_windows(tmp_path):
    sizes = [f"--model.{key}={value}" for key, value in {"n_head": 4, "n_kv_head": 2, "block_size": 64}.items()]
    done = run("bench/attention.py", *sizes, "--documents=24", "--window=7", f"--out_dir={tmp_path}")
    report = json.loads((tmp_path / "attention.json").read_text())
    assert [(row["case"], row["kernel"]) for row in report["rows"]] == [
        (case, "PyTorch's") for case in ("rows", "documents", "documents, window")]
    assert report["q"] == [8, 64, 4, 32] and report["k"] == [8, 64, 2, 32] and "flash4 cannot run here" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not any(d.name == "flash-attn-4" for d in importlib.metadata.distributions()),
                    reason="flash-attn-4 is not installed")
@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
def test_flash4_on_a_gpu_agrees_with_the_other_kernels(documents):
    x, y, positions = (t.cuda() for t in packed())
    more = dict(positions=positions, bounds=attention.document_bounds(positions.cpu())) if documents else {}
    switches = {"sliding_window": 7} if documents else {}
    found = []
    for use_flash4 in (False, True):
        model = loud("cuda", torch.bfloat16, head_dim=64, **switches)
        for block in model.layers if use_flash4 else ():
            block.attn.attend = flash4.attend
        compile_and_checkpoint(model, CompileConfig(enabled=True), "selective")
        gradients(model, model(x, y, **more))  # compiling calls the operator too
        with torch.profiler.profile() as profile:
            found.append(gradients(model, model(x, y, **more)))
        ran = sum(e.name == "nanofp8::flash4" for e in profile.events())
        assert ran == (len(model.layers) if use_flash4 else 0)
    # bf16 keeps 8 bits, and sums are of other order
    assert (found[0][0] - found[1][0]).abs() < 0.005 * found[0][0]
    assert all((found[1][1][n].float() - g.float()).norm() < 0.05 * g.float().norm() for n, g in found[0][1].items())
