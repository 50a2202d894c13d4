"""Which parameters go to which optimiser, and that each agrees with torch's own."""

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model import ModelArgs, Transformer
from step.kernels import KernelTransformer
from step.optimizer import KernelAdamW, clip_gradients, make_optimizer

SETTINGS = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}


def tiny_model(kind: type = Transformer) -> Transformer:
    torch.manual_seed(0)
    return kind(ModelArgs(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=50, n_future_heads=1))


def with_gradients(model: Transformer) -> Transformer:
    torch.manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_place_and_only_matrices_decay(name):
    model = tiny_model()
    optimizer = make_optimizer(SimpleNamespace(optimizer=name, **SETTINGS), model)
    placed = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, placed)) == sorted(map(id, model.parameters()))
    for group in optimizer.param_groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_muon_takes_the_matrices_of_the_trunk_and_adamw_the_rest():
    """One step, against torch.optim.Muon and torch.optim.AdamW by hand."""
    model = with_gradients(tiny_model())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    by_hand = with_gradients(copy.deepcopy(model))
    optimizer = make_optimizer(SimpleNamespace(optimizer="muon", **SETTINGS), model)
    for group in optimizer.param_groups:  # as train.py sets the rate
        group["lr"] = 0.003
    optimizer.step()
    for name, p in by_hand.named_parameters():
        decay = 0.1 if p.dim() >= 2 else 0.0
        if name.startswith("layers.") and p.dim() == 2:
            torch.optim.Muon([p], lr=0.003, weight_decay=decay, adjust_lr_fn="match_rms_adamw").step()
        else:
            torch.optim.AdamW([p], lr=0.003, weight_decay=decay, betas=(0.9, 0.95)).step()
        after = dict(model.named_parameters())[name]
        torch.testing.assert_close(after, p, msg=name)
        assert not torch.equal(after, before[name])
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_state_comes_back():
    one, two = with_gradients(tiny_model()), with_gradients(tiny_model())
    settings = SimpleNamespace(optimizer="muon", **SETTINGS)
    a, b = make_optimizer(settings, one), make_optimizer(settings, two)
    a.step()
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    two.load_state_dict(one.state_dict())
    a.step()
    b.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(KeyError, match="muon"):
        b.load_state_dict(torch.optim.AdamW(one.parameters()).state_dict())


def test_the_kernels_adamw_is_torchs_and_each_goes_on_where_the_other_stopped():
    """A parameter joins late, so that not all have taken as many steps."""
    settings = SimpleNamespace(optimizer="adamw", **SETTINGS)
    models = [tiny_model(kind) for kind in (Transformer, KernelTransformer)]
    optimizers = [make_optimizer(settings, model) for model in models]
    assert [isinstance(optimizer, KernelAdamW) for optimizer in optimizers] == [False, True]
    late = [dict(model.named_parameters())["layers.1.attention.wq.weight"] for model in models]
    for step in range(8):
        for model, optimizer, p in zip(models, optimizers, late, strict=True):
            with_gradients(model)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (step + 1)
            if step < 3:
                p.grad = None
            optimizer.step()
        if step == 5:
            states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
            for optimizer, state in zip(optimizers, reversed(states), strict=True):
                optimizer.load_state_dict(state)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(optimizer.state_dict()["state"] for optimizer in optimizers))
    optimizers[1].zero_grad()
    assert all(p.grad is None for p in models[1].parameters())


def test_a_run_by_kernels_starts_without_torchs_compiler():
    """Whose import would take longer than all else."""
    code = ("import sys, train, model, step.optimizer, step.kernels; from settings import Settings;"
            "small = step.kernels.KernelTransformer(model.ModelArgs(dim=8, n_heads=1, n_kv_heads=1));"
            "step.optimizer.make_optimizer(Settings(), small).state_dict(); sys.exit('torch._dynamo' in sys.modules)")
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize("most", [0.5, 1e3, float("inf")])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_clipping_agrees_with_torchs(name, most):
    """In kernels.c and not; a parameter without a gradient, and one whose gradient is no whole block in memory."""
    model = with_gradients(tiny_model(KernelTransformer))
    first, second, *_ = (p for p in model.parameters() if p.dim() == 2)
    first.grad, second.grad = None, torch.randn(second.shape[::-1]).T
    by_torch = [p.grad.clone().requires_grad_() for p in model.parameters() if p.grad is not None]
    for p in by_torch:
        p.grad = p.detach().clone()
    norm = clip_gradients(make_optimizer(SimpleNamespace(optimizer=name, **SETTINGS), model), most)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(by_torch, most))
    for got, want in zip((p.grad for p in model.parameters() if p.grad is not None), by_torch, strict=True):
        torch.testing.assert_close(got, want.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_seen(bad):
    model = with_gradients(tiny_model(KernelTransformer))
    model.norm.weight.grad[3] = bad
    norm = clip_gradients(make_optimizer(SimpleNamespace(optimizer="adamw", **SETTINGS), model), 1.0)
    assert not torch.isfinite(norm)
