"""Checkpoints of other programs: what they keep besides tensors, what they call them, and what is no checkpoint."""

import argparse
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_export import SHAPE, random_model

from formats.checkpoint import load_model, read_checkpoint


class Config:  # of a training script that keeps objects of its own
    dim = 32


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "ckpt.pt"


def put(path: Path, model: dict, **others) -> None:
    torch.save({"model": model, "model_args": SHAPE} | others, path)


def same(path: Path, model) -> bool:
    x = torch.arange(20)[None]
    return torch.equal(load_model(path)(x), model(x))


@pytest.mark.parametrize("before", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.",
                                    "_fsdp_wrapped_module._checkpoint_wrapped_module.", "model.", "net.llama.",
                                    "module.model."])
def test_names_that_wrappers_put_before_tensors(path, before):
    model = random_model()
    put(path, {before + name: w for name, w in model.state_dict().items()})
    assert same(path, model)


def test_names_that_wrappers_put_in_between(path):
    model = random_model()
    put(path, {name.replace(".attention.", "._orig_mod.attention.").replace("layers.1.", "layers.1.module."): w
               for name, w in model.state_dict().items()})
    assert same(path, model)
    put(path, model.state_dict() | {"module.norm.weight": torch.zeros(32)})
    with pytest.raises(ValueError, match="ckpt.pt: model: norm.weight is there twice, also as module.norm.weight"):
        read_checkpoint(path)


def test_the_forks_unembeddings_are_linear_heads(path):
    """aux_output.0 looks one token further than the next one: head 1 here."""
    model, x = random_model(n_future_heads=3), torch.arange(20)[None]
    names = {name: name.replace("future_heads.", "aux_output.") for name in model.state_dict()}
    put(path, {f"_orig_mod.{names[name]}": w for name, w in model.state_dict().items()},
        config={"aux_losses": True, "use_k_ntp_loss": True, "k": 3})
    read = load_model(path)
    assert (read.args.head, read.args.n_future_heads) == ("linear", 3)
    for i in range(4):
        ours, theirs = (m.readouts(x, m.trunk(x), [i])[i].logits() for m in (model, read))
        assert torch.equal(ours, theirs)


def test_training_goes_on_from_the_forks_checkpoint_with_its_heads(path, tmp_path, words):
    import train

    model = random_model(dim=16, n_layers=2, max_seq_len=32, n_future_heads=2)
    put(path, {name.replace("future_heads.", "aux_output."): w for name, w in model.state_dict().items()},
        model_args=SHAPE | {"dim": 16, "n_layers": 2, "max_seq_len": 32})
    train.main(words(init_from=path, max_iters=1, learning_rate=1e-9, n_future_heads=2, nitp_weight=0.5))
    back = load_model(tmp_path / "out" / "last.pt")
    assert torch.allclose(back.future_heads[1].weight, model.future_heads[1].weight, atol=1e-6)


def test_what_training_scripts_keep_beside_tensors(path):
    model = random_model()
    args = argparse.Namespace(**{name: np.int64(value) for name, value in SHAPE.items()})
    put(path, model.state_dict(), model_args=args, best=np.float32(1.5), big=np.float64(1e300), flag=np.bool_(True),
        half=np.float16(0.5), swapped=np.dtype(">i4").type(7), config=argparse.Namespace(dataset="x", out=Path("a/b")),
        rng=np.random.default_rng(0).integers(0, 9, 5))
    read = read_checkpoint(path)
    assert same(path, model) and type(read["model_args"]["dim"]) is int
    assert (read["best"], read["big"], read["flag"], read["half"], read["swapped"]) == (1.5, 1e300, True, 0.5, 7)
    assert read["config"] == {"dataset": "x", "out": "a/b"}


def refused(path: Path, says: str) -> None:
    with pytest.raises(ValueError, match="ckpt.pt") as caught:
        load_model(path)
    assert says in str(caught.value) and len(str(caught.value)) < 600, caught.value


def test_objects_of_a_script_are_named(path):
    put(path, random_model().state_dict(), config=Config())
    refused(path, f"holds a Python object, {Config.__module__}.Config; only tensors and plain values are read")
    put(path, random_model().state_dict(), best=np.complex64(1j))
    refused(path, "not a checkpoint, or a broken one")


def test_a_file_without_a_model_is_refused(path):
    for model, says in (({}, "model: expected tensors by name, found none"), ({"norm.weight": {}}, "found dict")):
        for args in (SHAPE, {}):
            put(path, model, model_args=args)
            refused(path, says)
    put(path, random_model().state_dict(), model_args=SHAPE | {"n_layers": 0})
    refused(path, "n_layers: expected")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_types_that_no_model_is_computed_in(path, dtype):
    put(path, random_model().state_dict() | {"norm.weight": torch.zeros(32).to(dtype)})
    refused(path, f"norm.weight: expected a tensor of floats, found {dtype}")


def test_a_packed_archive_is_refused_before_it_is_unpacked(path, tmp_path):
    """3 GB of zeros are a small zip file; torch.save does not pack."""
    put(path, random_model().state_dict())
    packed = tmp_path / "packed_ckpt.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for name in source.namelist():
            if name.endswith("/data/0"):
                with out.open(name, "w") as f:
                    for _ in range(64):
                        f.write(bytes(1 << 20))
            else:
                out.writestr(name, source.read(name))
    assert packed.stat().st_size < 1 << 20
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(packed, "not a checkpoint as torch.save writes it: parts of ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


@pytest.mark.parametrize("name", ["dim", "n_layers", "n_heads", "vocab_size", "hidden_dim", "head_dim", "multiple_of",
                                  "order_window", "rope_original_seq_len", "max_seq_len", "alphabet_size"])
@pytest.mark.parametrize("value", [10**19, 1 << 1000, -1], ids=["10^19", "2^1000", "-1"])
def test_sizes_that_no_machine_holds(path, name, value):
    put(path, random_model().state_dict(), model_args=SHAPE | {name: value})
    refused(path, f"model_args: {name}: expected an int")


def test_a_checkpoint_that_stays_in_its_file_is_the_same(path):
    put(path, random_model().state_dict())
    for mapped in (False, True):
        state = read_checkpoint(path, mapped)["model"]
        assert all(torch.equal(w, state[name]) for name, w in random_model().state_dict().items())
    torch.save({"model": random_model().state_dict(), "model_args": SHAPE}, path, _use_new_zipfile_serialization=False)
    assert same(path, random_model())
