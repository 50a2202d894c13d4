"""Reading model.bin: the model that was written, the same bytes when written again, and no stated length trusted."""

import struct
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED
from test_export import SHAPE, random_model, save

import export
from formats import llama2c
from formats.checkpoint import load_model, read_checkpoint
from formats.llama2c import layout, read_trunk, write_trunk
from model import ModelArgs

PUBLISHED = SHARED / "stories260K"
KINDS = [{}, {"n_kv_heads": 4}, {"tie_embeddings": False}, {"hidden_dim": 40, "max_seq_len": 17}]


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("version", [0, 1])
def test_float32_models_come_back_as_they_were(tmp_path, version, changes):
    model = random_model(**changes)
    write_trunk(model, tmp_path / "m.bin", version)
    back = load_model(tmp_path / "m.bin")
    assert back.args == model.args
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))
    write_trunk(back, tmp_path / "again.bin", version)
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "m.bin").read_bytes()


@pytest.mark.parametrize("changes", KINDS)
def test_int8_models_come_back_as_the_numbers_in_the_file(tmp_path, changes):
    model = random_model(**changes)
    write_trunk(model, tmp_path / "m.bin", 2)
    back, (group, padded) = load_model(tmp_path / "m.bin"), llama2c.int8_shape(model.args)
    assert back.args.hidden_dim == padded.hidden_dim
    for (name, p), (_, q) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        if p.dim() == 1:
            assert torch.equal(p, q), name
        else:
            p = F.pad(p, (0, q.shape[1] - p.shape[1], 0, q.shape[0] - p.shape[0]))
            step = p.reshape(-1, group).abs().amax(1, keepdim=True) / 127
            assert (p - q).reshape(-1, group).abs().le(0.5001 * step).all(), name
            q = q.reshape(-1, group)
            assert torch.allclose((q / step.clamp(min=1e-30)).round() * step, q, atol=1e-6), name
    write_trunk(back, tmp_path / "again.bin", 2)
    ours, again = (tmp_path / "m.bin").read_bytes(), (tmp_path / "again.bin").read_bytes()
    assert sum(a != b for a, b in zip(ours, again, strict=True)) < len(ours) / 100  # last bits of scales


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published stories260K is not there")
def test_the_published_model_comes_out_byte_for_byte(tmp_path):
    export.main([str(PUBLISHED / "stories260K.bin"), str(tmp_path / "m.bin"),
                 "--tokenizer", str(PUBLISHED / "tok512.bin")])
    assert (tmp_path / "m.bin").read_bytes() == (PUBLISHED / "stories260K.bin").read_bytes()
    assert (tmp_path / "tokenizer.bin").read_bytes() == (PUBLISHED / "tok512.bin").read_bytes()


def test_the_layout_is_the_whole_model_and_nothing_twice():
    args = ModelArgs(**SHAPE | {"tie_embeddings": False})
    names = set(random_model(tie_embeddings=False).state_dict())
    for version in (0, 1, 2):
        order = [name for name, _ in layout(args, version)]
        assert len(set(order)) == len(order)
        assert set(order) - {"rope_cos", "rope_sin"} == names


@pytest.fixture
def files(tmp_path) -> dict[int, bytes]:
    found = {}
    for version in (0, 1, 2):
        write_trunk(random_model(), tmp_path / "m.bin", version)
        found[version] = (tmp_path / "m.bin").read_bytes()
    return found


def refused(path: Path, content: bytes, *says: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name) as caught:
        read_checkpoint(path)
    assert all(word in str(caught.value) for word in says), caught.value


@pytest.mark.parametrize("version", [0, 1, 2])
def test_files_of_another_size_are_refused(tmp_path, files, version):
    whole, path = files[version], tmp_path / "m.bin"
    for content in (whole[:-1], whole[: len(whole) // 2], whole + b"\0"):
        refused(path, content, f"expected {len(whole):,} bytes", f"found {len(content):,}", f"version {version}")
    for length in (0, 3, 7, 27, 28, 100, 255):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="m.bin: (no checkpoint, and too short|expected)"):
            read_checkpoint(path)


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("field,value,says", [
    (0, 0, "dim: expected 1 to 65536, found 0"), (0, 36, "dim 36"), (0, 64, "bytes by its header"),
    (1, -1, "hidden_dim"),
    (2, 1 << 30, "n_layers"), (3, 5, "n_heads 5"), (4, 3, "n_kv_heads 3"), (5, 0, "vocab_size"),
    (5, -(1 << 25), "vocab_size"), (6, (1 << 24) + 1, "max_seq_len")])
def test_sizes_that_make_no_sense_are_refused(tmp_path, files, version, field, value, says):
    content = bytearray(files[version])
    struct.pack_into("<i", content, (8 if version else 0) + 4 * field, value)
    refused(tmp_path / "m.bin", bytes(content), says)


def test_other_kinds_of_file_are_told(tmp_path, files):
    path = tmp_path / "m.bin"
    refused(path, files[1][:4] + struct.pack("<i", 3) + files[1][8:], "version 3", "0, 1 or 2")
    refused(path, b"GGUF" + files[0], "GGUF")
    refused(path, b"a story, and another one " * 9, "no checkpoint, and as the header of a model.bin of version 0: dim")
    long = bytearray(files[1])
    struct.pack_into("<i", long, 32, 1 << 24)  # max_seq_len, which costs no byte in versions 1 and 2
    path.write_bytes(long)
    assert load_model(path).args.max_seq_len == 1 << 24  # heads of 8: half a gigabyte of tables
    write_trunk(random_model(n_heads=1, n_kv_heads=1), path, 1)  # one head of 32
    path.write_bytes(path.read_bytes()[:32] + struct.pack("<i", 1 << 24) + path.read_bytes()[36:])
    with pytest.raises(ValueError, match="m.bin: max_seq_len: expected at most 8388608 with heads of 32"):
        load_model(path)
    for version in (0, 1, 2):
        swapped = b"".join(files[version][k : k + 4][::-1] for k in range(0, 256, 4)) + files[version][256:]
        refused(path, swapped, "big-endian")
    refused(path, struct.pack("<I", llama2c.HEADS_MAGIC) + bytes(300), "future heads")
    for group in (0, 3, 6, 64, -4, 1 << 30):
        refused(path, files[2][:37] + struct.pack("<i", group) + files[2][41:], f"group size {group}")
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(ValueError, match="give the folder"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_a_model_with_another_norm_or_trunk_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="norm_eps"):
        write_trunk(random_model(norm_eps=1e-6), tmp_path / "m.bin")
    with pytest.raises(ValueError, match="rnn"):
        export.main([str(save(random_model(trunk="rnn"), tmp_path / "ckpt.pt")), str(tmp_path / "m.bin")])
    assert not (tmp_path / "m.bin").exists()


def test_reading_leaves_the_file_free_to_be_written(tmp_path):
    write_trunk(random_model(), tmp_path / "m.bin")
    model = load_model(tmp_path / "m.bin")
    write_trunk(random_model(seed=1), tmp_path / "m.bin")
    assert torch.equal(model.norm.weight, random_model().norm.weight)
    assert read_trunk(tmp_path / "m.bin")["model"]["norm.weight"].is_contiguous()
