"""Checkpoints in, model files out: the same function in Python and in C."""

import struct
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import export
from formats import llama2c
from formats.checkpoint import load_model
from formats.llama2c import write_trunk
from model import FUTURE_HEADS, ModelArgs, Transformer
from text.tokenizer import BOS, load_tokenizer, write_bin

SHAPE = {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512, "max_seq_len": 256}
TEXT = "Once upon a time, there was a kind girl named Mia.\nShe had a red ball. " * 4


def random_model(seed=0, scale=5.0, **changes) -> Transformer:
    """Weights large enough that predictions differ from each other by more than rounding."""
    torch.manual_seed(seed)
    model = Transformer(ModelArgs(**SHAPE | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale).add_(torch.randn_like(p) * 0.02)
        model.norm.weight.copy_(1 + 0.3 * torch.randn(model.args.dim))
    return model


def save(model: Transformer, path: Path, **extra) -> Path:
    torch.save({"model": model.state_dict(), "model_args": model.args.as_dict()} | extra, path)
    return path


@pytest.fixture
def run(build) -> Path:
    return build("plain")


def tell(run: Path, *flags, stdin: str = "") -> bytes:
    done = subprocess.run([run, *map(str, flags)], input=stdin.encode(), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@torch.no_grad()
def greedy(model: Transformer, n: int) -> list[int]:
    """n tokens after BOS, each computed from the whole context, without a cache."""
    ids = [BOS]
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == BOS:
            break
    return ids


def shown(tokenizer, ids: list[int]) -> bytes:
    """What run.c prints for ids: pieces joined, no leading space, control codes left out."""
    pieces = [piece for piece, _ in tokenizer.pieces()]
    out = b""
    for k, i in enumerate(ids):
        if 3 <= i < 259:
            out += bytes([i - 3]) if 32 <= i - 3 != 127 or 9 <= i - 3 <= 13 else b""
        elif i != BOS:
            out += pieces[i].removeprefix(b" ") if k == 0 else pieces[i]
    return out


HEADS = {"n_future_heads": 2, "spelling_letters": 2, "alphabet_size": 5, "order_window": 4}


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 4}, {"tie_embeddings": False}, HEADS,
                                     {"recurrence": 3, "prelude_layers": 1, "coda_layers": 0}])
def test_c_and_python_tell_the_same_story_and_score_the_same_loss(run, data_dir, tmp_path, changes):
    model = random_model(**changes)
    tokenizer = load_tokenizer(data_dir / "toy" / "tok512", 512)
    write_bin(tokenizer, tmp_path / "tokenizer.bin")
    export.main([str(save(model, tmp_path / "ckpt.pt")), str(tmp_path / "model.bin")])

    ids = greedy(model, 200)
    told = tell(run, tmp_path / "model.bin", "-t", 0, "-n", 200)
    assert len(set(ids)) > 20  # a model that repeats itself would test little
    assert told == shown(tokenizer, ids[1:201]) + b"\n"

    ids = torch.tensor([BOS, *tokenizer.encode(TEXT)])
    with torch.no_grad():
        loss = F.cross_entropy(model(ids[None, :-1])[0], ids[1:])
    assert float(tell(run, tmp_path / "model.bin", "-m", "score", stdin=TEXT)) == pytest.approx(loss.item(), abs=1e-4)


@pytest.mark.parametrize("head", FUTURE_HEADS)
@pytest.mark.parametrize("version", [0, 1, 2])
def test_every_type_of_head_leaves_the_same_trunk(tmp_path, head, version):
    alone, with_heads = random_model(), random_model(head=head, **HEADS)
    with_heads.load_state_dict(alone.state_dict(), strict=False)
    for name, model in (("alone", alone), ("heads", with_heads)):
        export.main([str(save(model, tmp_path / f"{name}.pt")), str(tmp_path / f"{name}.bin"), f"--version={version}"])
    assert (tmp_path / "alone.bin").read_bytes() == (tmp_path / "heads.bin").read_bytes()


@pytest.mark.parametrize("version", [0, 1, 2])
def test_layers_that_recur_are_written_as_often(tmp_path, version):
    """So every reader of the format runs it, as a model with that many layers."""
    model = random_model(recurrence=2, prelude_layers=1, coda_layers=1)
    flat = random_model(n_layers=4)
    flat.load_state_dict({name: w for name, w in model.state_dict().items() if not name.startswith("layers.")} | {
        f"layers.{k}.{name}": w for k, layer in enumerate(model.unrolled()) for name, w in layer.state_dict().items()})
    for name, m in (("model", model), ("flat", flat)):
        write_trunk(m, tmp_path / f"{name}.bin", version)
    assert (tmp_path / "model.bin").read_bytes() == (tmp_path / "flat.bin").read_bytes()
    assert llama2c.trunk_checksum(model) == llama2c.trunk_checksum(flat)


def test_heads_that_run_does_not_know_are_not_written(tmp_path):
    path = save(random_model(n_future_heads=1, head="block"), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="heads of type linear, found block"):
        export.main([str(path), str(tmp_path / "m.bin"), f"--heads={tmp_path / 'm.heads.bin'}"])
    assert not (tmp_path / "m.bin").exists()


def test_a_byte_model_runs_in_c(run, tmp_path):
    model, tokenizer = random_model(vocab_size=259), load_tokenizer(tmp_path, 259)
    write_bin(tokenizer, tmp_path / "tokenizer.bin")
    write_trunk(model, tmp_path / "model.bin")
    ids = torch.tensor([BOS, *tokenizer.encode("A café.")])
    with torch.no_grad():
        loss = F.cross_entropy(model(ids[None, :-1])[0], ids[1:])
    scored = float(tell(run, tmp_path / "model.bin", "-m", "score", stdin="A café."))
    assert scored == pytest.approx(loss.item(), abs=1e-4)
    assert tell(run, tmp_path / "model.bin", "-t", 0, "-i", "A café \x01", "-n", 30).startswith("A café ".encode())


@pytest.mark.parametrize("tied", [True, False])
def test_layout_of_version_0(tmp_path, tied):
    model = random_model(tie_embeddings=tied, n_future_heads=1)
    write_trunk(model, tmp_path / "m.bin")
    data, state = (tmp_path / "m.bin").read_bytes(), model.state_dict()
    assert struct.unpack_from("<7i", data) == (32, 88, 3, 4, 2, 512 if tied else -512, 256)
    floats = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    at = 0
    in_layers = ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo", "ffn_norm",
                 "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    names = ["tok_embeddings", *(f"layers.{i}.{name}" for name in in_layers for i in range(3)), "norm"]
    for name in names:
        tensor = state[f"{name}.weight"]
        assert torch.equal(floats[at : at + tensor.numel()].view_as(tensor), tensor), name
        at += tensor.numel()
    at += 256 * 8  # cos and sin
    if not tied:
        assert torch.equal(floats[at:].view(512, 32), state["output.weight"])
        at += 512 * 32
    assert at == len(floats)  # and no future head


NORMS = [f"layers.{i}.{name}" for name in ("attention_norm", "ffn_norm") for i in range(3)] + ["norm"]
MATRICES = ["tok_embeddings", *(f"layers.{i}.{name}" for name in
            ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
             "feed_forward.w3") for i in range(3))]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_layout_of_versions_1_and_2(tmp_path, tied, version):
    model = random_model(tie_embeddings=tied, n_future_heads=1, multiple_of=32)
    with torch.no_grad():
        model.tok_embeddings.weight[7] = 0  # a scale of 0, and no NaN
    write_trunk(model, tmp_path / "m.bin", version)
    data, state = (tmp_path / "m.bin").read_bytes(), model.state_dict()
    assert struct.unpack_from("<4si7iB", data) == (b"24ka", version, 32, 96, 3, 4, 2, 512, 256, tied)
    group = struct.unpack_from("<i", data, 37)[0]
    assert group == (32 if version == 2 else 0) and data[41:256] == bytes(256 - 41)
    at = 256

    def take(count: int, dtype=torch.float32):
        nonlocal at
        tensor = torch.frombuffer(bytearray(data[at : at + count * dtype.itemsize]), dtype=dtype)
        at += count * dtype.itemsize
        return tensor

    for name in NORMS:
        assert torch.equal(take(state[f"{name}.weight"].numel()), state[f"{name}.weight"]), name
    for name in MATRICES + ([] if tied else ["output"]):
        tensor = state[f"{name}.weight"]
        if version == 1:
            assert torch.equal(take(tensor.numel()).view_as(tensor), tensor), name
            continue
        q, scale = take(tensor.numel(), torch.int8).view(-1, group).float(), take(tensor.numel() // group)[:, None]
        rows = tensor.view(-1, group)
        assert (q * scale - rows).abs().le(scale * 0.5001).all() and q.abs().max() == 127, name
        assert torch.equal(scale[:, 0], rows.abs().amax(1) / 127), name
    assert at == len(data)


def test_group_size_divides_every_input(tmp_path):
    for dim, hidden, group, padded in [(64, 172, 64, 192), (288, 768, 32, 768), (512, 1376, 64, 1408),
                                       (768, 2048, 64, 2048), (40, 30, 8, 32)]:
        found, args = llama2c.int8_shape(ModelArgs(dim=dim, hidden_dim=hidden, n_heads=4))
        assert (found, args.hidden_dim) == (group, padded)
    with pytest.raises(ValueError, match="dim 30: version 2 needs a multiple of 4"):
        write_trunk(random_model(dim=30, n_heads=1, n_kv_heads=1), tmp_path / "m.bin", 2)
    assert not (tmp_path / "m.bin").exists()


def test_padded_hidden_units_change_nothing(run, tmp_path, data_dir):
    """hidden_dim 86 becomes 96 in version 2; the file's model computes what the rounded weights without padding do."""
    (tmp_path / "tokenizer.bin").write_bytes((data_dir / "toy" / "tok512" / "tokenizer.bin").read_bytes())
    model = random_model(hidden_dim=86)
    write_trunk(model, tmp_path / "m.bin", 2)
    wide = load_model(tmp_path / "m.bin")
    assert wide.args.hidden_dim == 96
    narrow = random_model(hidden_dim=86)
    state = {name: w[tuple(slice(n) for n in narrow.state_dict()[name].shape)] for name, w in wide.state_dict().items()}
    narrow.load_state_dict(state)
    x = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.allclose(wide(x), narrow(x), atol=1e-4) and not torch.allclose(model(x), narrow(x), atol=1e-4)
    for layer in wide.layers:
        ffn = layer.feed_forward
        assert not ffn.w1.weight[86:].any() and not ffn.w3.weight[86:].any() and not ffn.w2.weight[:, 86:].any()


@pytest.mark.parametrize("tied", [True, False])
def test_every_version_scores_alike_in_c(run, tmp_path, data_dir, tied):
    (tmp_path / "tokenizer.bin").write_bytes((data_dir / "toy" / "tok512" / "tokenizer.bin").read_bytes())
    model, scores = random_model(tie_embeddings=tied, scale=3.0), []
    for version in (0, 1, 2):
        write_trunk(model, tmp_path / "m.bin", version)
        scores.append(float(tell(run, tmp_path / "m.bin", "-m", "score", stdin=TEXT)))
    assert scores[0] == scores[1] and scores[2] == pytest.approx(scores[0], abs=0.05) and scores[2] != scores[0]


def test_heads_file(run, tmp_path, data_dir, capsys):
    """Its layout; run accepts it with every version of its own trunk, and with no other."""
    (tmp_path / "tokenizer.bin").write_bytes((data_dir / "toy" / "tok512" / "tokenizer.bin").read_bytes())
    model = random_model(n_future_heads=2)
    path, heads = save(model, tmp_path / "ckpt.pt"), tmp_path / "m.heads.bin"
    for version in (2, 1, 0):
        export.main([str(path), str(tmp_path / "m.bin"), f"--version={version}", f"--heads={heads}"])
        flags = [tmp_path / "m.bin", "-n", 60, "-s", 3]
        assert tell(run, *flags, "-d", heads) == tell(run, *flags)
    assert "m.heads.bin: 131,100 bytes, 32,768 parameters" in capsys.readouterr().err
    data = heads.read_bytes()
    assert struct.unpack_from("<4s5I", data) == (b"head", 1, 1, 2, 32, 512)
    weights = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32).view(2, 512, 32)
    assert all(torch.equal(weights[i], model.future_heads[i].weight) for i in range(2))
    write_trunk(random_model(seed=1), tmp_path / "m.bin")
    done = subprocess.run([run, tmp_path / "m.bin", "-d", heads], capture_output=True, timeout=60)
    assert done.returncode == 1 and b"another trunk" in done.stderr
    with pytest.raises(ValueError, match="1 to 31 future heads, found 0"):
        llama2c.write_heads(random_model(), tmp_path / "none.bin")


def test_heads_do_not_change_the_file(tmp_path):
    one, two = random_model(), random_model(n_future_heads=2)
    two.load_state_dict(one.state_dict(), strict=False)
    for version in (0, 1, 2):
        write_trunk(one, tmp_path / "one.bin", version)
        write_trunk(two, tmp_path / "two.bin", version)
        assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()


def test_the_runs_tokenizer_lands_beside_the_model(data_dir, tmp_path, capsys):
    config = {"data_dir": str(data_dir), "dataset": "toy", "vocab_size": 512}
    path = save(random_model(), tmp_path / "ckpt.pt", config=config)
    export.main([str(path), str(tmp_path / "new" / "model.bin")])
    source = data_dir / "toy" / "tok512" / "tokenizer.bin"
    assert (tmp_path / "new" / "tokenizer.bin").read_bytes() == source.read_bytes()
    (tmp_path / "new" / "tokenizer.bin").write_bytes(b"of another model")
    export.main([str(path), str(tmp_path / "new" / "model.bin")])
    assert (tmp_path / "new" / "tokenizer.bin").read_bytes() == b"of another model"
    assert "of another vocabulary, left as it is" in capsys.readouterr().err
    path = save(random_model(), tmp_path / "ckpt.pt", config=config | {"dataset": "gone"})
    export.main([str(path), str(tmp_path / "other" / "model.bin")])
    assert "-z" in capsys.readouterr().err and not (tmp_path / "other" / "tokenizer.bin").exists()


def test_a_checkpoint_of_llama2c_loads(tmp_path):
    """As its train.py writes them: compiled names, fewer model_args, loss as a tensor, always tied."""
    model = random_model()
    args = {k: SHAPE[k] for k in SHAPE} | {"multiple_of": 32, "dropout": 0.0}
    compiled = {f"_orig_mod.{k}": v for k, v in model.state_dict().items()}
    rest = {"optimizer": {}, "iter_num": 3, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "tinystories"}}
    torch.save({"model": compiled, "model_args": args} | rest, tmp_path / "ckpt.pt")
    loaded = load_model(tmp_path / "ckpt.pt")
    assert loaded.args.tie_embeddings and loaded.args.hidden_dim == 88
    x = torch.arange(20)[None]
    assert torch.equal(loaded(x), model(x))
    untied = random_model(tie_embeddings=False)
    torch.save({"model": untied.state_dict(), "model_args": args}, tmp_path / "ckpt.pt")
    assert torch.equal(load_model(tmp_path / "ckpt.pt")(x), untied(x))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil-was-run"),))


def test_broken_checkpoints_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, model = tmp_path / "ckpt.pt", random_model()
    state, args = model.state_dict(), model.args.as_dict()

    def refused(says: str):
        with pytest.raises(ValueError, match="ckpt.pt") as caught:
            load_model(path)
        assert says in str(caught.value)

    refused("No such file")
    whole = save(model, path).read_bytes()
    for length in (2, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused("broken")
    for byte in range(256):  # what a pickle's reader stumbles over is of many kinds
        path.write_bytes(b"\x80" + bytes([byte]) + b". a text\n")
        refused("not a checkpoint")
    torch.save(Evil(), path)
    refused("holds a Python object, ")
    assert not Path("evil-was-run").exists()
    torch.save([1, 2], path)
    refused("a list")
    torch.save({"weights": 3}, path)
    refused("weights")
    torch.save({"model": state, "model_args": args | {"dim": "64"}}, path)
    refused("dim")
    torch.save({"model": state, "model_args": args | {"n_heads": 7}}, path)
    refused("n_heads=7")
    torch.save({"model": state, "model_args": args | {"vocab_size": 500}}, path)
    refused("tok_embeddings.weight: expected shape (500, 32), found (512, 32)")
    for name, value in (("n_layers", 10**9), ("n_future_heads", 10**9), ("max_seq_len", 10**12), ("hidden_dim", 10**9)):
        torch.save({"model": state, "model_args": args | {name: value}}, path)
        refused(name)
    torch.save({"model": {k: v for k, v in state.items() if "wk" not in k}, "model_args": args}, path)
    refused("has no tensor layers.0.attention.wk.weight")
    torch.save({"model": {k: v[:3] if "wo" in k else v for k, v in state.items()}, "model_args": args}, path)
    refused("layers.0.attention.wo.weight: expected shape (32, 32), found (3, 32)")
    torch.save({"model": state | {"layers.0.bias": torch.zeros(3)}, "model_args": args}, path)
    refused("layers.0.bias")
    torch.save({"model": state | {"norm.weight": 3.0}, "model_args": args}, path)
    refused("norm.weight: expected a tensor of floats, found float")
    for odd in (torch.zeros(32).to_sparse(), torch.zeros(32, device="meta"), torch.zeros(1).expand(32)):
        torch.save({"model": state | {"norm.weight": odd}, "model_args": args}, path)
        refused("norm.weight: expected a tensor of floats, found ")
    for name, value in (("recurrence", 0), ("recurrence", 10**9), ("prelude_layers", -1), ("spelling_letters", -3),
                        ("n_future_heads", -1), ("head", "foo"), ("trunk", "foo")):
        torch.save({"model": state, "model_args": args | {name: value}}, path)
        refused(name)
    torch.save({"model": state, "model_args": args | {"head": "shared", "n_future_heads": 10**8}}, path)
    refused("n_future_heads: expected an int from 0 to 1024")
    torch.save({"model": state, "model_args": args | {"spelling_letters": 10**6, "alphabet_size": 10**6}}, path)
    refused("has no tensor spelling_heads.weight")
    torch.save({"model": state | {"output.weight": torch.zeros(512, 32)}, "model_args": args}, path)
    refused("output.weight: expected that of tok_embeddings")
    torch.save({"model": state | {"norm.weight": torch.full((32,), torch.nan)}, "model_args": args}, path)
    refused("norm.weight: expected finite numbers")
    heads = random_model(n_future_heads=2)
    renamed = {name.replace("future_heads.1", "future_heads.9"): t for name, t in heads.state_dict().items()}
    torch.save({"model": renamed, "model_args": heads.args.as_dict()}, path)
    refused("has no tensor future_heads.1.weight")
    torch.save({"model": state | {"norm.weight": torch.zeros(32, dtype=torch.complex64)}, "model_args": args}, path)
    refused("complex64")
    torch.save({"model": state | {3: torch.zeros(3)}, "model_args": args}, path)
    refused("other keys")
    torch.save({"model": state, "model_args": args | {"norm_eps": "x"}}, path)
    refused("norm_eps")


def test_no_file_is_written_over_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(random_model(n_future_heads=1), Path("ckpt.pt"))
    Path("my.model").write_bytes(b"a tokenizer")
    Path("link").symlink_to("ckpt.pt")
    before = {p: p.read_bytes() for p in Path().iterdir()}
    for words in ("ckpt.pt", "m.bin --heads=ckpt.pt", "m.bin --heads=m.bin", "tokenizer.bin", "m.bin --gguf=./m.bin",
                  "m.bin --heads=tokenizer.bin", "--gguf=link", "my.model --tokenizer=my.model",
                  "--gguf=my.model --tokenizer=my.model", "--hf=h --gguf=h/config.json", "h/tokenizer.json --hf=h",
                  "m.bin --hf=m.bin"):
        with pytest.raises(ValueError, match="different files"):
            export.main(["ckpt.pt", *words.split()])
    save(random_model(), Path("none.pt"))
    with pytest.raises(ValueError, match="found 0"):
        export.main(["none.pt", "m.bin", "--heads=h.bin"])
    Path("new/tokenizer.bin").mkdir(parents=True)
    with pytest.raises(ValueError, match="tokenizer.bin: expected a file, or nothing"):
        export.main(["none.pt", "new/m.bin"])
    assert not list(Path("new").glob("m.bin"))
    assert {p: p.read_bytes() for p in Path().iterdir() if p.is_file() and p.name != "none.pt"} == before


def test_errors_end_the_command_without_a_file(tmp_path, capsys):
    with pytest.raises(ValueError, match="none.pt"):
        export.main([str(tmp_path / "none.pt"), str(tmp_path / "m.bin")])
    with pytest.raises(ValueError, match="norm_eps"):
        export.main([str(save(random_model(norm_eps=1e-6), tmp_path / "ckpt.pt")), str(tmp_path / "m.bin")])
    path = save(random_model(), tmp_path / "ckpt.pt")
    (tmp_path / "folder").write_text("a file where a folder is wanted")
    with pytest.raises(ValueError, match="cannot write .*m.bin"):
        export.main([str(path), str(tmp_path / "folder" / "m.bin")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt", "folder"]
