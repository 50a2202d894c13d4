"""The choice of path: which one, why, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

import train
from step import kernels
from step.machine import choose_path, has_bfloat16

CPU = torch.device("cpu")


def wanted(**changes):
    return SimpleNamespace(**{"path": "auto", "dtype": "float32", "compile": False} | changes)


@pytest.fixture
def no_compiler(monkeypatch):
    def library():
        raise ValueError("no C compiler: cc: No such file or directory")

    monkeypatch.setattr(kernels, "library", library)


@pytest.mark.parametrize("changes,device,kind,why", [
    ({}, CPU, "fast", "kernels.c"), ({"compile": True}, CPU, "fast", "kernels.c, in place of compile"),
    ({"path": "plain"}, CPU, "plain", "asked for"), ({"path": "plain", "compile": True}, CPU, "compiled", "asked for"),
    ({"dtype": "float16"}, CPU, "plain", "no float16"),
    ({}, torch.device("cuda"), "plain", "this is cuda"), ({"compile": True}, torch.device("mps"), "compiled", "is mps"),
])
def test_choice(changes, device, kind, why):
    path = choose_path(wanted(**changes), device)
    assert path.kind == kind and why in path.why and path.fast == (kind == "fast")
    assert str(path).startswith(kind) and why in str(path)


@pytest.mark.parametrize("changes,device,says", [
    ({"compile": True}, CPU, "path=fast: is not compiled"),
    ({"dtype": "float16"}, CPU, "path=fast: kernels.c has no float16"),
    ({}, torch.device("cuda"), "path=fast: kernels.c is for the CPU, this is cuda"),
])
def test_a_fast_path_that_cannot_be_is_refused(changes, device, says):
    with pytest.raises(ValueError, match=says):
        choose_path(wanted(path="fast", **changes), device)


def test_without_a_compiler_auto_is_plain_and_says_why(no_compiler, words, capsys):
    assert train.main(words(max_iters=1)) == 0
    assert "path: plain (no C compiler: cc" in capsys.readouterr().out
    assert train.main(words(max_iters=1, path="fast", out_dir="elsewhere")) == 1
    assert "path=fast: no C compiler: cc" in capsys.readouterr().err


@pytest.mark.parametrize("capabilities,native", [({"avx512_bf16": True}, True), ({"bf16": True}, True),
                                                 ({"avx512_f": True, "amx_bf16": False}, False), ({}, False)])
def test_auto_takes_bfloat16_where_the_processor_multiplies_it(monkeypatch, capabilities, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_bfloat16(CPU) == native and not has_bfloat16(torch.device("mps"))
    assert choose_path(wanted(dtype="auto"), CPU).dtype == (torch.bfloat16 if native else torch.float32)
    assert choose_path(wanted(dtype="float32"), CPU).dtype == torch.float32


def test_autocast_is_on_only_for_what_is_not_float32():
    for dtype in ("float32", "bfloat16"):
        with choose_path(wanted(dtype=dtype), CPU).autocast():
            assert torch.is_autocast_enabled("cpu") == (dtype != "float32")
