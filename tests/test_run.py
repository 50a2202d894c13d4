"""Tests of run.c: python -m pytest tests/test_run.py

Oracles: a float64 numpy Llama, a slow byte pair encoder, SentencePiece itself and, where the published files are there,
llama2.c's own greedy story. Damaged files run under the address and undefined-behaviour sanitizers: a process may end
with 0 or 1, never by a signal or with a sanitizer's report.
"""
import io
import itertools
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import BUILDS, SHARED

from text.tokenizer import load_tokenizer
from tinystories import read_stories

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = SHARED / "stories260K"
STORIES = SHARED / "tinystories" / "TinyStories-valid.txt"
FIELDS = ["dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len"]
TINY = {"dim": 8, "hidden_dim": 12, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 300, "seq_len": 16}


# ----------------------------------------------------------------------------------------------------------------------
# Building and running

def execute(binary, *args, stdin=b"", **kwargs):
    """Runs a binary; fails on a signal, a sanitizer report or an exit code other than 0 and 1."""
    env = dict(os.environ, ASAN_OPTIONS="exitcode=99:detect_leaks=0:allocator_may_return_null=1",
               UBSAN_OPTIONS="exitcode=99")
    done = subprocess.run([binary, *args], input=stdin, capture_output=True, env=env, timeout=60, check=False,
                          **kwargs)
    assert done.returncode in (0, 1), (args, done.returncode, done.stderr[-2000:])
    assert b"Sanitizer" not in done.stderr and b"runtime error" not in done.stderr, (args, done.stderr[-2000:])
    return done


def succeeds(binary, *args, **kwargs):
    done = execute(binary, *args, **kwargs)
    assert done.returncode == 0, (args, done.stderr)
    return done.stdout


def refuses(binary, *args, says, **kwargs):
    done = execute(binary, *args, **kwargs)
    message = done.stderr.decode(errors="replace")
    assert done.returncode == 1, (args, done.stdout, message)
    for words in [says] if isinstance(says, str) else says:
        assert words in message, (args, words, message)
    return done


# ----------------------------------------------------------------------------------------------------------------------
# Tiny random files and the reference implementations

def tensor_shapes(c, shared):
    D, H, L, V, S = c["dim"], c["hidden_dim"], c["n_layers"], c["vocab_size"], c["seq_len"]
    half = D // c["n_heads"] // 2
    K = 2 * half * c["n_kv_heads"]
    shapes = {"tok_emb": (V, D), "rms_att": (L, D), "wq": (L, D, D), "wk": (L, K, D), "wv": (L, K, D), "wo": (L, D, D),
              "rms_ffn": (L, D), "w1": (L, H, D), "w2": (L, D, H), "w3": (L, H, D), "rms_final": (D,),
              "freq_cos": (S, half), "freq_sin": (S, half)}
    return shapes if shared else {**shapes, "wcls": (V, D)}


def write_model(path, shared=True, seed=0, change=None, version=0, group=4, **sizes):
    """Writes a random model file; returns (config, weights). change(weights) edits them before they are written.

    In version 2 the returned weights are the rounded ones of the file, and `group` is in the config.
    """
    c = {**TINY, **sizes}
    rng = np.random.default_rng(seed)
    w = {name: rng.normal(0, 0.6, shape).astype(np.float32) for name, shape in tensor_shapes(c, shared).items()}
    w["freq_cos"][:] = w["freq_sin"][:] = 7.0  # never to be read
    if change:
        change(w)
    header = [c[f] for f in FIELDS]
    if version == 0:
        header[5] *= 1 if shared else -1
        path.write_bytes(struct.pack("<7i", *header) + b"".join(a.tobytes() for a in w.values()))
        return c, w
    head = struct.pack("<Ii7iBi", 0x616B3432, version, *header, shared, group if version == 2 else 0)
    norms, matrices = ("rms_att", "rms_ffn", "rms_final"), ("tok_emb", *MATRICES, *(["wcls"] if not shared else []))
    body = b"".join(w[name].tobytes() for name in norms)
    if version == 1:
        body += b"".join(w[name].tobytes() for name in matrices)
    else:
        c = {**c, "group": group}
        for name in matrices:
            for layer in w[name] if w[name].ndim == 3 else [w[name]]:
                q, scale = rounded(layer, group)
                body += q.astype(np.int8).tobytes() + scale.astype(np.float32).tobytes()
                layer[:] = (q * scale.astype(np.float32)).reshape(layer.shape)
    path.write_bytes(head.ljust(256, b"\0") + body)
    return c, w


MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


def rounded(x, group):
    """Q8_0: whole numbers of -127..127 in rows of `group`, and each row's scale."""
    x = x.reshape(*x.shape[:-1], -1, group)
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.floor(x / np.where(scale > 0, scale, 1) + 0.5), scale


def reference_logits(c, w, ids):
    """Logits (T, V) of a Llama in float64, all positions at once; RoPE as complex numbers.

    With a "group" in the config the inputs of products are rounded as version 2 has it.
    """
    T, heads, hd = len(ids), c["n_heads"], c["dim"] // c["n_heads"]
    w = {name: a.astype(np.float64) for name, a in w.items()}
    turn = np.exp(1j * np.outer(np.arange(T), 10000.0 ** (-np.arange(0, hd, 2) / hd)))[:, None]  # (T, 1, hd/2)

    def times(x, weight):
        if "group" in c:
            q, scale = rounded(x, c["group"])
            x = (q * scale).reshape(x.shape)
        return x @ weight.T

    def norm(x, weight):
        return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def rotated(x):  # (T, n, hd)
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    x = w["tok_emb"][ids]
    for layer in range(c["n_layers"]):
        h = norm(x, w["rms_att"][layer])
        q = rotated(times(h, w["wq"][layer]).reshape(T, heads, hd))
        k = rotated(times(h, w["wk"][layer]).reshape(T, -1, hd)).repeat(heads // c["n_kv_heads"], 1)
        v = times(h, w["wv"][layer]).reshape(T, -1, hd).repeat(heads // c["n_kv_heads"], 1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(hd) + np.triu(np.full((T, T), -np.inf), 1)
        att = np.exp(scores - scores.max(-1, keepdims=True))
        att /= att.sum(-1, keepdims=True)
        x = x + times(np.einsum("hts,shd->thd", att, v).reshape(T, -1), w["wo"][layer])
        h = norm(x, w["rms_ffn"][layer])
        gate, up = times(h, w["w1"][layer]), times(h, w["w3"][layer])
        x = x + times(gate / (1 + np.exp(-np.maximum(gate, -700))) * up, w["w2"][layer])
    return times(norm(x, w["rms_final"]), w.get("wcls", w["tok_emb"]))


def reference_score(c, w, ids):
    """Mean of -log p over ids[1:], in consecutive windows of seq_len."""
    S, total = c["seq_len"], 0.0
    for at in range(0, len(ids) - 1, S):
        window, targets = ids[at:at + S], ids[at + 1:at + 1 + S]
        for z, y in zip(reference_logits(c, w, window), targets):
            total += np.log(np.exp(z - z.max()).sum()) + z.max() - z[y]
    return total / (len(ids) - 1)


def continue_with(c, w, ids, steps, choose):
    """Feeds up to `steps` positions as run.c does; returns the tokens after ids, without the BOS or EOS after them."""
    ids, n = list(ids), len(ids)
    while len(ids) <= steps:
        token = choose(reference_logits(c, w, ids)[-1])
        if token in (1, 2):
            break
        ids.append(token)
    return ids[n:]


SPECIAL = [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
BYTES = [b"<0x%02X>" % b for b in range(256)]


def visible_pieces(n):
    """A vocabulary without byte tokens whose text shows each token's id."""
    return SPECIAL + [b"[%d]" % i for i in range(3, n)]


def byte_pieces(n):
    """The byte tokens, then " ", letters and a few words, up to n entries."""
    words = [b" ", *(b"%c" % c for c in b"abcdefghijklmnopqrst"), b" a", b"he", b" t", b" the", b"in", b"\xe2\x82\xac"]
    pieces = SPECIAL + BYTES + words
    return pieces + [b"zq%d" % i for i in range(n - len(pieces))]


def write_tokenizer(path, pieces, scores=None, longest=None):
    scores = scores or [0.0] * min(259, len(pieces)) + [-float(i) for i in range(len(pieces) - 259)]
    body = b"".join(struct.pack("<fi", s, len(p)) + p for p, s in zip(pieces, scores))
    path.write_bytes(struct.pack("<i", max(map(len, pieces)) if longest is None else longest) + body)
    return path


def read_tokenizer(path):
    data, at, pieces, scores = path.read_bytes(), 4, [], []
    while at < len(data):
        score, n = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8:at + 8 + n])
        scores.append(score)
        at += 8 + n
    return pieces, scores


def slow_encode(pieces, scores, text):
    """BOS and the tokens of `text` (bytes), by the rules word for word, in quadratic time."""
    ids = {p: i for i, p in reversed(list(enumerate(pieces))) if i >= 259 or (i == 35 and p == b" ")}
    if text and b" " in ids:
        text = b" " + text
    text = text.replace("\u2581".encode(), b" ")
    # Python escapes each invalid byte by itself, so encoding it again gives single bytes
    parts = [c.encode("utf-8", "surrogateescape") for c in text.decode("utf-8", "surrogateescape")]
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        i = min(pairs)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return [1] + [t for p in parts for t in ([ids[p]] if p in ids else [b + 3 for b in p])]


def encode_all(binary, tokenizer, size, texts):
    records = b"".join(struct.pack("<I", len(t)) + t for t in texts)
    lines = succeeds(binary, tokenizer, str(size), stdin=records).splitlines()
    return [[int(i) for i in line.split()] for line in lines]


@pytest.fixture
def tiny(tmp_path):
    """Paths of a tiny model and its tokenizer (byte fallback, 300 entries)."""
    write_model(tmp_path / "model.bin")
    return tmp_path / "model.bin", write_tokenizer(tmp_path / "tokenizer.bin", byte_pieces(300))


# ----------------------------------------------------------------------------------------------------------------------
# The published model

@pytest.mark.parametrize("kind", BUILDS)
def test_published_model_tells_its_story(build, kind):
    if not (PUBLISHED / "greedy.txt").exists():
        pytest.skip("the published stories260K files are not there")
    story = succeeds(build(kind), PUBLISHED / "stories260K.bin", "-z", PUBLISHED / "tok512.bin", "-t", "0", "-n", "200")
    assert story == (PUBLISHED / "greedy.txt").read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# Forward pass and score

SHAPES = {
    "one head": {"n_heads": 1, "n_kv_heads": 1},
    "multi-head": {"n_heads": 4, "n_kv_heads": 4, "n_layers": 2},
    "grouped": {"dim": 48, "hidden_dim": 40, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2},
    "multi-query": {"dim": 36, "hidden_dim": 70, "n_layers": 2, "n_heads": 3, "n_kv_heads": 1, "seq_len": 33},
    "heads of 8": {"dim": 40, "n_heads": 5, "n_kv_heads": 1, "n_layers": 2, "seq_len": 90},
}


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_score_equals_float64_reference(build, tmp_path, kind, shape):
    pieces = byte_pieces(300)
    tokenizer = write_tokenizer(tmp_path / "tok.bin", pieces)
    _, scores = read_tokenizer(tokenizer)
    for shared in (True, False):
        c, w = write_model(tmp_path / "m.bin", shared, seed=3, **SHAPES[shape])
        # one token; less than a window; S and S + 1 tokens after BOS; several windows; NUL and invalid bytes
        S = c["seq_len"]
        for text in [b"\n", b"the hen", b"Q" * (S - 1), b"Q" * S, b"in the inn " * 9, b"a\0b\xff\0"]:
            ids = slow_encode(pieces, scores, text)
            got = float(succeeds(build(kind), tmp_path / "m.bin", "-z", tokenizer, "-m", "score", stdin=text))
            assert got == pytest.approx(reference_score(c, w, ids), abs=1e-5), (shared, text)


@pytest.mark.parametrize("kind", [*BUILDS, "native", "avx2"])
@pytest.mark.parametrize("shared", [True, False])
def test_int8_score_equals_float64_reference(build, tmp_path, kind, shared):
    pieces = byte_pieces(300)
    tokenizer = write_tokenizer(tmp_path / "tok.bin", pieces)
    _, scores = read_tokenizer(tokenizer)
    errors, effect = [], []
    for seed, group in enumerate((4, 8, 24)):
        c, w = write_model(tmp_path / "m.bin", shared, seed, version=2, group=group, dim=48, hidden_dim=72, n_layers=2,
                           n_heads=6, n_kv_heads=2, seq_len=40)
        floats = {name: value for name, value in c.items() if name != "group"}
        for text in [b"the hen in the inn" * 3, b"Q" * 39, b"a\0b\xff\0"]:
            ids = slow_encode(pieces, scores, text)
            run = [build(kind), tmp_path / "m.bin", "-z", tokenizer, "-m", "score"]
            expected = reference_score(c, w, ids)
            errors.append(abs(float(succeeds(*run, stdin=text)) - expected))
            effect.append(abs(reference_score(floats, w, ids) - expected))
    # an input on the border between two steps may round the other way in float32: rare, and a small effect
    assert sorted(errors)[len(errors) // 2] < 1e-5 and max(errors) < 4e-3, errors
    assert sorted(effect)[len(effect) // 2] > 1e-2  # of rounding the inputs at all


def to_bfloat16(x):
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("kind", [*BUILDS, "native", "avx2"])
def test_bfloat16_score_equals_float64_reference(build, tmp_path, kind):
    """--bf16 rounds the matrices, the classifier among them, but not what a token's embedding is read from."""
    tokenizer, text = write_tokenizer(tmp_path / "tok.bin", byte_pieces(300)), b"the hen in the inn, a\0b\xff"
    ids = slow_encode(*read_tokenizer(tokenizer), text)
    for shared, hidden_dim in [(True, 40), (False, 41)]:  # w2 has hidden_dim columns: an odd number stays float32
        c, w = write_model(tmp_path / "m.bin", shared, seed=3, **SHAPES["grouped"] | {"hidden_dim": hidden_dim})
        names = [name for name in MATRICES if name != "w2" or hidden_dim % 2 == 0]
        rough = w | {name: to_bfloat16(w[name]) for name in names} | {"wcls": to_bfloat16(w.get("wcls", w["tok_emb"]))}
        run = [build(kind), tmp_path / "m.bin", "-z", tokenizer, "-m", "score"]
        done = execute(*run, "--bf16", stdin=text)
        assert float(done.stdout) == pytest.approx(reference_score(c, rough, ids), abs=1e-5)
        assert abs(float(done.stdout) - float(succeeds(*run, stdin=text))) > 1e-4
        assert b"weights: bfloat16" in done.stderr


def test_bfloat16_flag(build, tiny, tmp_path):
    run = build("sanitized")
    greedy = ["-t", "0", "-n", "3"]
    assert succeeds(run, tiny[0], "--bf16", *greedy) == succeeds(run, tiny[0], *greedy, "--bf16")
    assert succeeds(run, tiny[0], "--bf16", "--help").startswith(b"usage")
    write_model(tmp_path / "m2.bin", version=2)
    refuses(run, tmp_path / "m2.bin", "--bf16", "-z", tiny[1], says=["--bf16", "m2.bin is int8"])


@pytest.mark.parametrize("kind", BUILDS)
def test_version_1_scores_as_version_0(build, tmp_path, kind):
    write_tokenizer(tmp_path / "tokenizer.bin", byte_pieces(300))
    for shape in SHAPES.values():
        for shared in (True, False):
            scores = []
            for version in (0, 1):
                write_model(tmp_path / "m.bin", shared, seed=4, version=version, **shape)
                scores.append(succeeds(build(kind), tmp_path / "m.bin", "-m", "score", stdin=b"the hen in the inn"))
            assert scores[0] == scores[1], shape


def test_score_reports_tokens_and_bits_per_byte(build, tiny):
    done = execute(build("plain"), tiny[0], "-m", "score", stdin=b"the hen")
    nats = float(done.stdout)
    n = len(slow_encode(*read_tokenizer(tiny[1]), b"the hen")) - 1
    assert done.stdout == b"%.6f\n" % nats
    report = done.stderr.decode().splitlines()[0].replace(",", "").split()
    assert [report[0], report[1], *report[4:]] == [str(n), "tokens", report[4], "bits", "per", "byte"]
    assert float(report[3]) == pytest.approx(np.exp(nats), rel=1e-5)
    assert float(report[4]) == pytest.approx(nats * n / np.log(2) / len(b"the hen"), abs=1e-4)
    refuses(build("plain"), tiny[0], "-m", "score", says="empty")


def test_large_negative_gate_is_zero_not_nan(build, tmp_path):
    """exp(-gate) overflows below -88, and -ffast-math turns 1 / infinity into NaN."""
    tokenizer = write_tokenizer(tmp_path / "tok.bin", visible_pieces(40))

    def steepen(w):
        w["w1"] *= 1000

    c, w = write_model(tmp_path / "m.bin", vocab_size=40, hidden_dim=64, change=steepen)
    ids = continue_with(c, w, [1], 12, lambda z: int(z.argmax()))
    expected = "".join(f"[{i}]" if i > 2 else ["<unk>", "", "\n</s>\n"][i] for i in ids) + "\n"
    for kind in BUILDS:
        story = succeeds(build(kind), tmp_path / "m.bin", "-z", tokenizer, "-t", "0", "-n", "12")
        assert story.decode() == expected, kind


# ----------------------------------------------------------------------------------------------------------------------
# Sampling

def shown(ids):
    return "".join(f"[{i}]" if i > 2 else ["<unk>", "\n<s>\n", "\n</s>\n"][i] for i in ids) + "\n"


class Sampler:
    """llama2.c's sampling, written again: xorshift64*, softmax in float32, multinomial or top-p."""

    def __init__(self, temperature, top_p, seed):
        self.temperature, self.top_p, self.state = np.float32(temperature), np.float32(top_p), seed

    def coin(self):
        s, mask = self.state, 2**64 - 1
        s ^= s >> 12
        s ^= s << 25 & mask
        s ^= s >> 27
        self.state = s
        return np.float32((s * 0x2545F4914F6CDD1D & mask) >> 40) / np.float32(2**24)

    def __call__(self, logits):
        z = logits.astype(np.float32) / self.temperature
        p = np.exp(z - z.max())
        p /= p.sum()
        order, coin = np.arange(len(p)), self.coin()
        if 0 < self.top_p < 1:
            order = [i for i in np.argsort(-p, kind="stable") if p[i] >= (1 - self.top_p) / np.float32(len(p) - 1)]
            total = np.cumsum(p[order])
            past = np.flatnonzero(total > self.top_p)
            order = order[:past[0] + 1] if len(past) else order
            coin *= p[order].sum()
        chosen = np.flatnonzero(coin < np.cumsum(p[order]))
        return int(order[chosen[0] if len(chosen) else -1])


@pytest.mark.parametrize("version", [0, 2])
@pytest.mark.parametrize("kind", [*BUILDS, "native", "avx2"])
def test_tokens_together_equal_one_at_a_time(build, tmp_path, kind, version):
    """Bit for bit, for every batch size; dimensions that are no multiples of a panel, several panels of positions."""
    for heads in ({"n_heads": 4, "n_kv_heads": 2}, {"n_heads": 3, "n_kv_heads": 1}):  # heads of 6, and of 8
        write_model(tmp_path / "m.bin", seed=2, dim=24, n_layers=2, hidden_dim=72, vocab_size=131, seq_len=150,
                    version=version, group=8, **heads)
        succeeds(build(kind, "tests/c/batch_main.c"), tmp_path / "m.bin")
        if version == 0:
            succeeds(build(kind, "tests/c/batch_main.c"), tmp_path / "m.bin", "bf16")


@pytest.mark.parametrize("kind", BUILDS)
def test_tokens_equal_reference(build, tmp_path, kind):
    tokenizer = write_tokenizer(tmp_path / "tok.bin", visible_pieces(40))
    c, w = write_model(tmp_path / "m.bin", False, seed=9, vocab_size=40, n_heads=4, n_kv_heads=2, n_layers=2, dim=16,
                       change=lambda w: w["wcls"].__imul__(0.5))
    run = [build(kind), tmp_path / "m.bin", "-z", tokenizer]
    greedy = continue_with(c, w, [1], 16, lambda z: int(z.argmax()))
    assert len(greedy) > 8 and len(set(greedy)) > 3  # else the comparison would say little
    assert succeeds(*run, "-t", "0", "-n", "0").decode() == shown(greedy)
    for tiny_temperature in ("1e-12", "1e-30", "1e-39"):  # divided by the last, logits overflow
        for top_p in ("0.9", "1"):
            assert succeeds(*run, "-t", tiny_temperature, "-s", "3", "-p", top_p).decode() == shown(greedy)
    stories = set()
    for temperature, top_p, seed in [(1, 0.9, 1), (1, 0.9, 2), (1, 1, 7), (0.8, 0, 2**64 - 1), (1.7, 0.5, 11),
                                     (3, 0.99, 4)]:
        expected = shown(continue_with(c, w, [1], 16, Sampler(temperature, top_p, seed)))
        flags = ["-t", str(temperature), "-p", str(top_p), "-s", str(seed)]
        assert succeeds(*run, *flags).decode() == expected, flags
        assert succeeds(*run, *flags).decode() == expected, flags
        stories.add(expected)
    assert len(stories) >= 5


def printed(pieces, i):
    """The bytes that token i prints: a byte token only if it is printable or white space."""
    if not 3 <= i < 259:
        return pieces[i]
    byte = i - 3
    return bytes([byte]) if 32 <= byte != 127 or 9 <= byte <= 13 else b""


def test_prompt_draws_no_coins(build, tmp_path):
    """The first sampled token after a prompt uses the seed's first coin."""
    pieces = byte_pieces(300)
    c, w = write_model(tmp_path / "m.bin", change=lambda w: w["tok_emb"][:290].__imul__(0.3))
    tokenizer = write_tokenizer(tmp_path / "tokenizer.bin", pieces)
    _, scores = read_tokenizer(tokenizer)
    ids = slow_encode(pieces, scores, b"the hen")
    for seed in range(1, 9):
        new = continue_with(c, w, ids, 12, Sampler(1, 0.5, seed))
        text = b"".join(printed(pieces, i) for i in new)
        story = succeeds(build("plain"), tmp_path / "m.bin", "-i", "the hen", "-s", str(seed), "-p", "0.5", "-n", "12")
        assert story == b"the hen" + text + b"\n", seed


@pytest.mark.parametrize("end", [1, 2])  # BOS, EOS
def test_story_ends_at_bos_and_eos(build, tmp_path, end):
    def only_the_end(w):
        w["wcls"][:] = 0
        w["wcls"][end] = w["rms_final"] * 0 + 50
        w["tok_emb"][:] = abs(w["tok_emb"])
        w["wo"][:] = w["w2"][:] = 0  # x stays the embedding: positive, so that its row wins
        w["rms_final"][:] = 1

    write_model(tmp_path / "m.bin", False, vocab_size=40, change=only_the_end)
    tokenizer = write_tokenizer(tmp_path / "tok.bin", visible_pieces(40))
    assert succeeds(build("plain"), tmp_path / "m.bin", "-z", tokenizer, "-t", "0") == b"\n"


def test_flat_distribution_with_tiny_top_p_takes_the_first(build, tmp_path):
    """No token passes top-p's cutoff here; llama2.c reads outside its array."""
    write_model(tmp_path / "m.bin", vocab_size=40, change=lambda w: w["rms_final"].fill(0))
    tokenizer = write_tokenizer(tmp_path / "tok.bin", visible_pieces(40))
    story = succeeds(build("sanitized"), tmp_path / "m.bin", "-z", tokenizer, "-p", "1e-6", "-n", "3", "-s", "1")
    assert story == b"<unk>" * 3 + b"\n"


# ----------------------------------------------------------------------------------------------------------------------
# Shortcuts that must not show: the screened classifier, threads, drafts

def nearly_equal_rows(w):
    """Pairs of rows that differ in the last bit of one weight, next to rows with one huge weight and rows of zeros."""
    rows = w["wcls"]
    rows[1::2] = rows[:-1:2][: len(rows[1::2])]
    rows[1::2, 3] = np.nextafter(rows[1::2, 3], np.float32(9))
    rows[::7, 2] *= 40
    rows[5::11] = 0


@pytest.mark.parametrize("kind", ["screened", "screened portable"])
@pytest.mark.parametrize("change", [None, lambda w: w["wcls"].__imul__(1e-3), nearly_equal_rows,
                                    lambda w: w["wcls"].__setitem__(slice(20, 280), w["wcls"][20]),
                                    lambda w: w["rms_final"].__imul__(1e4), lambda w: w["wcls"].__imul__(1e-36),
                                    lambda w: (w["wcls"].__imul__(1e-29), w["rms_final"].__imul__(1e-12))])
def test_screened_classifier_takes_the_same_tokens(build, tmp_path, kind, change):
    """The best token by a rounded classifier and exact panels, against the best of all exact logits, bit for bit."""
    tokenizer = write_tokenizer(tmp_path / "tok.bin", visible_pieces(300))
    plain = build("native" if kind == "screened" else "plain")
    for seed in range(12):
        write_model(tmp_path / "m.bin", False, seed=seed, seq_len=100, dim=16, n_heads=4, change=change)
        flags = [tmp_path / "m.bin", "-z", tokenizer, "-t", "0", "-n", "0"]
        for extra in ([], ["-d", "ngram"]):
            assert succeeds(build(kind), *flags, *extra) == succeeds(plain, *flags), seed
        assert succeeds(build(kind), *flags, "--bf16") == succeeds(plain, *flags, "--bf16"), seed


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_screened_classifier_of_damaged_weights(build, tmp_path, value):
    write_tokenizer(tmp_path / "tokenizer.bin", byte_pieces(300))
    for name in ("wcls", "rms_final"):
        write_model(tmp_path / "m.bin", False, change=lambda w, name=name: w[name].fill(value))
        done = execute(build("screened"), tmp_path / "m.bin", "-t", "0")
        assert done.returncode == 1 and b"not finite" in done.stderr, done


def test_screened_classifier_where_rounding_overflows(build, tmp_path):
    """One huge weight meets an input of 0: the exact logits are finite, those of the rounded row are not."""
    def one_huge(w):
        w["wcls"][5, 3], w["rms_final"][3], w["rms_final"][7] = 2e38, 0, 1e30

    write_tokenizer(tmp_path / "tokenizer.bin", byte_pieces(300))
    write_model(tmp_path / "m.bin", False, change=one_huge)
    story = [succeeds(build(kind), tmp_path / "m.bin", "-t", "0", "-n", "0") for kind in ("screened", "native")]
    assert story[0] == story[1]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose products are large enough for several threads, as float32 and int8, and its tokenizer."""
    folder, sizes = tmp_path_factory.mktemp("wide"), {"dim": 128, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 256}
    write_tokenizer(folder / "tokenizer.bin", byte_pieces(300))
    for version in (0, 2):
        write_model(folder / f"m{version}.bin", seed=6, n_layers=2, seq_len=200, version=version, group=32, **sizes)
    return folder


@pytest.mark.parametrize("kind", ["plain", "fast", "races"])
@pytest.mark.parametrize("version", [0, 2])
def test_threads_do_not_change_the_text(build, wide, kind, version):
    run = [build(kind), wide / f"m{version}.bin"]
    for flags, stdin in [(["-t", "0", "-n", "60"], b""), (["-s", "5", "-n", "60", "-i", "the inn " * 9], b""),
                         (["-m", "score"], b"the hen in the inn " * 30)]:
        alone = execute(*run, *flags, "-j", "1", stdin=stdin)
        for threads in ("2", "5"):
            done = execute(*run, *flags, "-j", threads, stdin=stdin)
            assert f"threads: {threads}".encode() in done.stderr
            assert alone.returncode == done.returncode == 0 and alone.stdout == done.stdout, (flags, done.stderr)


def test_number_of_threads(build, wide, monkeypatch):
    for value, flags, expected in [("3", [], 3), ("3,2", [], 3), ("3", ["-j", "2"], 2), ("x", [], 1), ("", [], 1),
                                   ("-1", [], 1), ("0", [], 1), ("999", [], 64)]:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        done = execute(build("plain"), wide / "m0.bin", "-n", "2", *flags)
        assert f"threads: {expected},".encode() in done.stderr, (value, flags)


def crc_of_norms(w):
    return zlib.crc32(b"".join(w[name].tobytes() for name in ("rms_att", "rms_ffn", "rms_final")))


def write_heads(path, c, w, heads, **changes):
    """A heads file for a model of write_model; heads: (n, V, D)."""
    fields = {"magic": 0x64616568, "version": 1, "type": 1, "n": len(heads), "dim": c["dim"],
              "vocab_size": c["vocab_size"], "checksum": crc_of_norms(w)} | changes
    path.write_bytes(struct.pack("<7I", *fields.values()) + np.asarray(heads, np.float32).tobytes())
    return path


DRAFTS = re.compile(rb"drafting: ([0-9.]+) tokens per pass; accepted/drafted by distance:((?: \d+/\d+)+)\n")


def drafted(done):
    """(tokens per pass, [(accepted, drafted) of each distance]) that run reports."""
    rate, pairs = DRAFTS.search(done.stderr).groups()
    return float(rate), [tuple(map(int, pair.split(b"/"))) for pair in pairs.split()]


def endless(w):
    """Logits near each other, so that sampled texts vary, but BOS and EOS are far below: they are long."""
    w["tok_emb"][:, 0], w["wo"][:, 0], w["w2"][:, 0] = 3, 0, 0  # x[0] is 3 at every position
    w["wcls"] *= 0.1
    w["wcls"][:, 0] = 0
    w["wcls"][1:3], w["rms_final"][0] = -50 * (np.arange(w["wcls"].shape[1]) == 0), 1


@pytest.mark.parametrize("kind", [*BUILDS, "screened"])
@pytest.mark.parametrize("version", [0, 2])
def test_drafting_tells_the_same_story(build, tmp_path, kind, version):
    """Greedy and sampled, with heads and with n-grams; few tokens, so random drafts are often accepted."""
    tokenizer = write_tokenizer(tmp_path / "tok.bin", [*SPECIAL, *(b"%c" % c for c in b"abcdef")])
    accepted = 0
    for seed in range(6):
        c, w = write_model(tmp_path / "m.bin", False, seed, vocab_size=9, seq_len=150, dim=16, n_heads=4,
                           version=version, change=endless)
        heads = write_heads(tmp_path / "m.heads.bin", c, w, np.random.default_rng(seed).normal(size=(3, 9, 16)))
        run = [build(kind), tmp_path / "m.bin", "-z", tokenizer, "-n", "0"]
        for flags in ["-t 0", "-t 1 -s 3", "-t 0.5 -s 4 -p 0.5", "-t 2 -s 5 -p 1 -i abcabcabc"]:
            plain = execute(*run, *flags.split())
            assert plain.returncode == 0 and b"drafting" not in plain.stderr
            for draft in (heads, "ngram"):
                done = execute(*run, *flags.split(), "-d", draft)
                assert done.stdout == plain.stdout, (seed, flags, draft)
                pairs = drafted(done)[1]
                assert all(0 <= hits <= drafts for hits, drafts in pairs)
                accepted += pairs[0][0]
    assert accepted > 20


@pytest.mark.parametrize("kind", [*BUILDS, "native", "avx2"])
@pytest.mark.parametrize("version", [0, 2])
def test_drafting_gives_the_same_logits(build, tmp_path, kind, version):
    """Bit for bit, with drafts of every length in any order."""
    first = second = 0  # accepted tokens, by distance
    for seed in range(2):
        c, w = write_model(tmp_path / "m.bin", False, seed, vocab_size=9, seq_len=150, dim=16, n_heads=4,
                           version=version, change=endless)
        heads = write_heads(tmp_path / "m.heads.bin", c, w, np.random.default_rng(seed).normal(size=(5, 9, 16)))
        for draft in (heads, "ngram"):
            hits = succeeds(build(kind, "tests/c/draft_main.c"), tmp_path / "m.bin", draft).split()
            first, second = first + int(hits[0]), second + int(hits[1])
    assert first > 20 and second > 5


def test_good_drafts_save_passes(build, tmp_path):
    """A model that repeats one token: n-grams and a head that predicts it are always right."""
    tokenizer = write_tokenizer(tmp_path / "tok.bin", visible_pieces(40))
    c, w = write_model(tmp_path / "m.bin", vocab_size=40, seq_len=400, change=lambda w: w["rms_final"].fill(0))
    for draft in (write_heads(tmp_path / "h.bin", c, w, np.zeros((4, 40, 8))), "ngram"):
        done = execute(build("plain"), tmp_path / "m.bin", "-z", tokenizer, "-t", "0", "-n", "0", "-d", draft)
        rate, pairs = drafted(done)
        assert done.stdout == b"<unk>" * 400 + b"\n" and rate > 1.02  # each length is tried; more is up to the clock
        assert all(hits == drafts for hits, drafts in pairs[:3]) and pairs[0][0] >= 4


def test_a_wrong_draft_does_no_harm(build, tmp_path):
    """A head that drafts a token whose embedding is damaged and which is never sampled."""
    tokenizer = write_tokenizer(tmp_path / "tok.bin", [*SPECIAL, *(b"%c" % c for c in b"abcdef")])

    def never_eight(w):
        endless(w)
        w["wcls"][8], w["tok_emb"][8] = w["wcls"][1], np.nan

    c, w = write_model(tmp_path / "m.bin", False, vocab_size=9, seq_len=100, dim=16, n_heads=4, change=never_eight)
    head = np.zeros((1, 9, 16))
    head[0, 8, 0] = 1  # x[0] is positive
    heads = write_heads(tmp_path / "h.bin", c, w, head)
    run = [build("sanitized"), tmp_path / "m.bin", "-z", tokenizer, "-n", "0", "-t", "1", "-s", "4"]
    done = execute(*run, "-d", heads)
    assert done.stdout == succeeds(*run) and drafted(done)[1][0][1] > 0, done.stderr


def test_chat_with_drafts(build, tmp_path):
    write_model(tmp_path / "m.bin", seed=8, seq_len=400, change=lambda w: w["tok_emb"][3:259].__imul__(0.1))
    write_tokenizer(tmp_path / "tokenizer.bin", byte_pieces(300))
    run = [build("sanitized"), tmp_path / "m.bin", "-m", "chat", "-t", "1", "-s", "2", "-n", "0"]
    stdin = b"\nthe hen\nin the inn\nthe hen\n"
    assert execute(*run, "-d", "ngram", stdin=stdin).stdout == execute(*run, stdin=stdin).stdout


def test_heads_files_that_do_not_fit(build, tmp_path):
    c, w = write_model(tmp_path / "m.bin")
    write_tokenizer(tmp_path / "tokenizer.bin", byte_pieces(300))
    bad, zeros = tmp_path / "bad.heads.bin", np.zeros((2, 300, 8))
    run = [build("sanitized"), tmp_path / "m.bin", "-n", "4", "-d", bad]
    refuses(*run, says=["bad.heads.bin", "cannot open"])
    assert b"drafting" in execute(*run[:-1], write_heads(bad, c, w, zeros)).stderr
    for change, says in [({"magic": 7}, "not a heads file"), ({"version": 2}, "version 2"), ({"type": 9}, "type 9"),
                         ({"n": 0}, "has 0 heads"), ({"n": 32}, "expected 1 to 31"), ({"n": 3}, "asks for"),
                         ({"n": 1}, "asks for"), ({"n": 2**32 - 1}, "heads; expected"), ({"dim": 16}, "dim 16"),
                         ({"vocab_size": 2**32 - 300}, "the model has"), ({"checksum": 1}, "another trunk")]:
        refuses(*run[:-1], write_heads(bad, c, w, zeros, **change), says=["bad.heads.bin", says])
    refuses(*run[:-1], write_heads(bad, c, w, zeros + np.nan), says=["bad.heads.bin", "not finite"])
    good = write_heads(bad, c, w, zeros).read_bytes()
    for size in [*range(0, 30), 5000, len(good) - 1]:
        bad.write_bytes(good[:size])
        refuses(*run, says="bad.heads.bin")
    bad.write_bytes(good + b"\0")
    refuses(*run, says=["bad.heads.bin", "asks for"])
    refuses(*run[:2], "-m", "score", "-d", "ngram", says="-d: -m score")


def test_damaged_heads_never_crash(build, tmp_path):
    rng, (c, w) = random.Random(5), write_model(tmp_path / "m.bin")
    write_tokenizer(tmp_path / "tokenizer.bin", byte_pieces(300))
    good = write_heads(tmp_path / "h.bin", c, w, np.random.default_rng(1).normal(size=(3, 300, 8))).read_bytes()
    for _ in range(40):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(28 if rng.random() < 0.5 else len(data))] = rng.choice([0, 255, 127, rng.randrange(256)])
        (tmp_path / "h.bin").write_bytes(data)
        execute(build("sanitized"), tmp_path / "m.bin", "-t", "0", "-n", "8", "-d", tmp_path / "h.bin")


# ----------------------------------------------------------------------------------------------------------------------
# Encoding

AWKWARD = ["", " ", "  two  spaces ", "<s>", "</s>", "<unk>", "<0x41>", "a<0x0A>b", "\u2581", "a\u2581b",
           "\u2581 \u2581", "\n", "\n\n a\n", "\t", "12345", "caf\u00e9 \u20ac5", "\U0001f600!", "\ufffd", "a\0b",
           "the" * 50, "\u0e01\u0301", "\r\n"]


@pytest.mark.parametrize("kind", ["plain", "sanitized"])
def test_encode_equals_sentencepiece(build, tmp_path, kind):
    sentencepiece = pytest.importorskip("sentencepiece")
    rng = random.Random(1)
    text = ("the little cat and a big dog went to park where they saw red balloon high in tree so cat said please help "
            "me get it down but was too small then bird came brought caf\u00e9 \u20ac %d 42 happy sunny day friend's")
    lines = [" ".join(rng.choices(text.split(), k=12)).capitalize() + rng.choice(".!?") for _ in range(300)]
    model = io.BytesIO()
    # remove_extra_whitespaces=False: the default drops doubled spaces, and tokenizer.bin has no place to say so
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=400, byte_fallback=True,
        split_digits=True, allow_whitespace_only_pieces=True, normalization_rule_name="identity",
        character_coverage=1.0, self_test_sample_size=0, unk_surface=r" \342\201\207 ",
        remove_extra_whitespaces=False, minloglevel=2)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [oracle.id_to_piece(i).replace("\u2581", " ").encode() for i in range(400)]
    pieces[1:3] = SPECIAL[1:3]
    write_tokenizer(tmp_path / "tok.bin", pieces, [oracle.get_score(i) for i in range(400)])
    alphabet = sorted(set("".join(lines))) + list("\n\u2581<>0x") + ["\u00fc", "\u4e2d", "  "]
    count = 10_000 if kind == "plain" else 500
    texts = AWKWARD + lines + ["".join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(count)]
    got = encode_all(build(kind, "tests/c/encode_main.c"), tmp_path / "tok.bin", 400, [t.encode() for t in texts])
    for text, ids in zip(texts, got, strict=True):
        assert ids == [1] + oracle.encode(text), text


def test_encoding_equals_sentencepiece_on_real_stories(build, data_dir):
    if not STORIES.exists():
        pytest.skip("the TinyStories subset is not there")
    folder = data_dir / "toy" / "tok512"
    oracle = load_tokenizer(folder, 512)
    stories = list(read_stories(STORIES.with_name("TinyStories-train.txt")))[:2000]
    binary, texts = build("plain", "tests/c/encode_main.c"), [story.encode() for story in stories]
    got = encode_all(binary, folder / "tokenizer.bin", 512, texts)
    for story, ids in zip(stories, got, strict=True):
        assert ids == [1, *oracle.encode(story)]


def byte_strings(rng, count):
    """Random bytes, half of them around the edges of UTF-8."""
    edges = [b"a", b" ", b"\x80", b"\xbf", b"\xc0", b"\xc2", b"\xe0", b"\xa0", b"\xe2\x96\x81", b"\xe2\x82", b"\xed",
             b"\xef", b"\xf0", b"\x90", b"\x8f", b"\xf4", b"\xf5", b"\xff", b"\0", "\u20ac".encode(),
             "\U0001f600".encode()]
    return [b"".join(rng.choices(edges, k=rng.randrange(12))) if i % 2 else rng.randbytes(rng.randrange(20))
            for i in range(count)]


@pytest.mark.parametrize("kind", ["plain", "sanitized"])
def test_invalid_utf8_falls_back_to_bytes(build, tmp_path, kind):
    pieces = byte_pieces(300)
    write_tokenizer(tmp_path / "tok.bin", pieces)
    _, scores = read_tokenizer(tmp_path / "tok.bin")
    texts = byte_strings(random.Random(2), 10_000 if kind == "plain" else 2000)
    got = encode_all(build(kind, "tests/c/encode_main.c"), tmp_path / "tok.bin", 300, texts)
    for text, ids in zip(texts, got, strict=True):
        assert ids == slow_encode(pieces, scores, text), text


@pytest.mark.parametrize("longest", [3, 6])
def test_ties_merge_leftmost_first(build, tmp_path, longest):
    """All strings of a and b, all with one score: what merges depends only on the order."""
    words = [bytes(w) for n in range(1, longest + 1) for w in itertools.product(b"ab", repeat=n)]
    pieces, scores = SPECIAL + BYTES + words, [0.0] * 259 + [-1.0] * len(words)
    write_tokenizer(tmp_path / "tok.bin", pieces, scores)
    texts = [bytes(random.Random(i).choices(b"ab", k=i % 40)) for i in range(200)]
    got = encode_all(build("sanitized", "tests/c/encode_main.c"), tmp_path / "tok.bin", len(pieces), texts)
    assert got == [slow_encode(pieces, scores, t) for t in texts]  # no " " in the vocabulary: no prefix either


def test_more_candidates_than_characters(build, tmp_path):
    """Each merge of "ab" leaves two stale candidates on the heap and adds two."""
    pieces = SPECIAL + BYTES + [b"x", b"a", b"b", b"ab", b"xa", b"bx", b"xab", b"abx"]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -2.0, -3.0, -4.0, -5.0]
    write_tokenizer(tmp_path / "tok.bin", pieces, scores)
    texts = [b"xab" * n for n in (1, 2, 5, 50)]
    got = encode_all(build("sanitized", "tests/c/encode_main.c"), tmp_path / "tok.bin", len(pieces), texts)
    assert got == [slow_encode(pieces, scores, t) for t in texts]


def test_names_of_special_tokens_cannot_be_typed(build, tmp_path):
    """Every prefix of the names is a piece, so merging by itself would build the special tokens."""
    names = [b"<unk>", b"\n<s>\n", b"\n</s>\n", b"<0x41>"]
    pieces = SPECIAL + BYTES + list(dict.fromkeys(name[:i] for name in names for i in range(1, len(name))))
    pieces += [b">"]
    write_tokenizer(tmp_path / "tok.bin", pieces)
    _, scores = read_tokenizer(tmp_path / "tok.bin")
    texts = [*names, b"".join(names)]
    got = encode_all(build("plain", "tests/c/encode_main.c"), tmp_path / "tok.bin", len(pieces), texts)
    assert got == [slow_encode(pieces, scores, t) for t in texts]
    assert all(min(ids[1:]) > 2 for ids in got) and got[3] == [1, pieces.index(b"<0x41"), pieces.index(b">")]
    pieces = SPECIAL + pieces[259:]  # without byte tokens the same must hold
    write_tokenizer(tmp_path / "tok.bin", pieces)
    got = encode_all(build("plain", "tests/c/encode_main.c"), tmp_path / "tok.bin", len(pieces), [b"<unk>"])
    assert got == [[1, pieces.index(b"<unk"), pieces.index(b">")]]


def test_byte_level_vocabulary(build, tmp_path):
    """259 entries, the space written as itself: every byte is one token, a space goes in front and never shows."""
    pieces = SPECIAL + [b" " if b == 32 else p for b, p in enumerate(BYTES)]
    write_tokenizer(tmp_path / "tok.bin", pieces)
    texts = byte_strings(random.Random(3), 200) + [b"Hello there", b"<0x20>", b" "]
    got = encode_all(build("sanitized", "tests/c/encode_main.c"), tmp_path / "tok.bin", 259, texts)
    assert got == [[1] + [b + 3 for b in (b" " + t if t else b"").replace(b"\xe2\x96\x81", b" ")] for t in texts]
    write_model(tmp_path / "m.bin", vocab_size=259)
    story = succeeds(build("plain"), tmp_path / "m.bin", "-z", tmp_path / "tok.bin", "-i", "Hi you", "-n", "7")
    assert story == b"Hi you" + story[6:] and len(story) <= 8


def test_real_stories_equal_slow_reference(build):
    if not (STORIES.exists() and (PUBLISHED / "tok512.bin").exists()):
        pytest.skip("TinyStories and tok512.bin are not there")
    pieces, scores = read_tokenizer(PUBLISHED / "tok512.bin")
    stories = STORIES.read_bytes().split(b"<|endoftext|>\n")[:330]
    # whole stories would take the quadratic reference a minute, a stretch of each takes seconds (and cuts characters)
    texts = stories[:3] + [s[40 * i % 300:][:160] for i, s in enumerate(stories[3:])]
    got = encode_all(build("plain", "tests/c/encode_main.c"), PUBLISHED / "tok512.bin", 512, texts)
    assert len(got) >= 300
    for text, ids in zip(texts, got, strict=True):
        assert ids == slow_encode(pieces, scores, text), text


def test_long_text_is_encoded_quickly(build, tmp_path):
    """A megabyte without one space: quadratic time would take hours."""
    pieces = SPECIAL + BYTES + [b"a" * 2**i for i in range(12)]
    write_tokenizer(tmp_path / "tok.bin", pieces)
    got = encode_all(build("plain", "tests/c/encode_main.c"), tmp_path / "tok.bin", len(pieces), [b"a" * 2**20])
    assert got == [[1] + [259 + 11] * 2**9]


def test_the_first_tokenizer_spells_bytes_as_characters(build, tmp_path):
    """llama2.c's first tokenizer.bin: byte token b is the UTF-8 of chr(b). The same ids as with names."""
    named = byte_pieces(300)
    spelled = SPECIAL + [chr(b).encode() for b in range(256)] + named[259:]
    texts = [t.encode() for t in AWKWARD] + byte_strings(random.Random(6), 2000)
    write_tokenizer(tmp_path / "named.bin", named)
    write_tokenizer(tmp_path / "spelled.bin", spelled)
    expected, got = (encode_all(build("sanitized", "tests/c/encode_main.c"), tmp_path / name, 300, texts)
                     for name in ("named.bin", "spelled.bin"))
    assert got == expected and [1, named.index(b" "), *(b + 3 for b in "\U0001f600!".encode())] in got
    write_model(tmp_path / "m.bin", seq_len=60)
    run = [build("sanitized"), tmp_path / "m.bin", "-t", "1", "-s", "3", "-p", "1", "-i", "caf\u00e9 \U0001f600"]
    story = succeeds(*run, "-z", tmp_path / "spelled.bin")
    assert story == succeeds(*run, "-z", tmp_path / "named.bin") and story.startswith("caf\u00e9 \U0001f600".encode())
    byte_level = SPECIAL + [chr(b).encode() for b in range(256)]  # no other space: one goes in front, as a byte
    write_tokenizer(tmp_path / "bytes.bin", byte_level)
    got = encode_all(build("sanitized", "tests/c/encode_main.c"), tmp_path / "bytes.bin", 259, [b"a\xc3"])
    assert got == [[1, 35, ord("a") + 3, 0xC3 + 3]]
    wrong = spelled[:3 + 200] + [b"y"] + spelled[3 + 201:]  # one is not: then these are pieces like others
    write_tokenizer(tmp_path / "wrong.bin", wrong)
    got = encode_all(build("sanitized", "tests/c/encode_main.c"), tmp_path / "wrong.bin", 300, ["\u00e9".encode()])
    assert got == [[1, 35, 3 + 0xE9]]


def test_character_without_a_token_is_an_error(build, tmp_path):
    write_model(tmp_path / "m.bin", vocab_size=40)
    tokenizer = write_tokenizer(tmp_path / "tok.bin", visible_pieces(40))
    says = ["no token", '"Q"', str(tokenizer)]
    refuses(build("sanitized"), tmp_path / "m.bin", "-z", tokenizer, "-i", "Q", says=says)
    wrong = SPECIAL + BYTES[:100] + [b"x"] + BYTES[101:] + [b"y"] * 41  # one byte token missing: none of them counts
    write_model(tmp_path / "m.bin")
    tokenizer = write_tokenizer(tmp_path / "tok.bin", wrong)
    refuses(build("sanitized"), tmp_path / "m.bin", "-z", tokenizer, "-i", "Q", says="no token")


# ----------------------------------------------------------------------------------------------------------------------
# Text out

def test_prompt_comes_back(build, tiny):
    story = succeeds(build("plain"), tiny[0], "-i", "the \u20ac hen, <s>", "-n", "13", "-t", "0")
    assert story.startswith("the \u20ac hen, <s".encode())
    # control codes are dropped; bytes of characters that have no token are not
    assert succeeds(build("plain"), tiny[0], "-i", b"a\x01\xc3\xa9b", "-n", "6", "-t", "0").startswith(b"a\xc3\xa9b")
    assert execute(build("sanitized"), tiny[0], "-i", b"\xff\xfea\xe2\x82", "-n", "8").returncode == 0


def test_a_token_may_hold_a_nul(build, tmp_path):
    pieces = visible_pieces(39) + [b"x\0y"]
    write_model(tmp_path / "m.bin", vocab_size=40, seq_len=64, change=lambda w: w["rms_final"].fill(0))
    tokenizer = write_tokenizer(tmp_path / "tok.bin", pieces)
    stories = [succeeds(build("sanitized"), tmp_path / "m.bin", "-z", tokenizer, "-p", "1", "-s", str(seed), "-n", "0")
               for seed in range(2, 8)]
    assert any(b"x\0y" in story for story in stories)


def test_prompt_may_fill_the_context(build, tiny):
    story = succeeds(build("sanitized"), tiny[0], "-i", "z" * 14, "-t", "0")  # BOS, the space in front and 14 letters
    assert story.startswith(b"z" * 14)


def test_story_on_stdout_speed_on_stderr(build, tiny):
    done = execute(build("plain"), tiny[0], "-t", "0", "-i", "the")
    assert done.stdout.startswith(b"the") and done.stdout.endswith(b"\n") and b"tok/s" not in done.stdout
    prompt, achieved, load = done.stderr.splitlines()
    assert prompt.startswith(b"prompt: 2 tokens, tok/s: ") and float(prompt.split()[-1]) > 0
    assert achieved.startswith(b"achieved tok/s: ") and float(achieved.split()[-1]) > 0
    assert load.startswith(b"load: ") and b"threads: 1, peak memory: " in load and float(load.split()[-2]) > 0.5


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_full_disk_is_an_error(build, tiny):
    for mode in ["generate", "chat", "score"]:
        with open("/dev/full", "wb") as full:
            command = [build("plain"), tiny[0], "-m", mode]
            done = subprocess.run(command, input=b"hi", stdout=full, stderr=subprocess.PIPE, check=False)
        assert done.returncode == 1 and b"standard output" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Chat

def test_chat_follows_the_template(build, tmp_path):
    pieces = byte_pieces(300)
    # the words' rows are scaled up so that answers are visible; the last token stands for the end of a turn, EOS
    c, w = write_model(tmp_path / "m.bin", seed=8, seq_len=200, change=lambda w: w["tok_emb"][3:259].__imul__(0.1))
    tokenizer = write_tokenizer(tmp_path / "tokenizer.bin", pieces)
    _, scores = read_tokenizer(tokenizer)
    first = slow_encode(pieces, scores, b"[INST] <<SYS>>\nBe kind\n<</SYS>>\n\nthe hen [/INST]")
    ids, text, next_id = list(first), b"", None
    while len(ids) <= 200:
        next_id = int(reference_logits(c, w, ids)[-1].argmax())
        if next_id in (1, 2):
            break
        text += printed(pieces, next_id)
        ids.append(next_id)
    stdin = b"Be kind\nthe hen\n"
    story = succeeds(build("sanitized"), tmp_path / "m.bin", "-m", "chat", "-t", "0", "-n", "0", stdin=stdin)
    assert story.startswith(b"Enter system prompt (optional): User: Assistant: " + text + b"\n")
    flags = ["-m", "chat", "-t", "0", "-n", "0", "-y", "Be kind", "-i", "the hen"]
    assert succeeds(build("plain"), tmp_path / "m.bin", *flags).startswith(b"Assistant: " + text + b"\n")


def chatty(w):
    """EOS wins after every token, so that every answer is empty."""
    w["tok_emb"][:] = abs(w["tok_emb"])
    w["wo"][:] = w["w2"][:] = w["wcls"][:] = 0
    w["wcls"][2] = w["rms_final"][:] = 1


def test_chat_takes_turns_until_the_input_ends(build, tmp_path):
    write_model(tmp_path / "m.bin", False, change=chatty, seq_len=2048)
    write_tokenizer(tmp_path / "tokenizer.bin", byte_pieces(300))
    run = [build("sanitized"), tmp_path / "m.bin", "-m", "chat", "-t", "0", "-n", "0"]
    turn, ask = b"User: Assistant: \n", b"Enter system prompt (optional): "
    assert succeeds(*run, stdin=b"") == ask + b"\n"
    assert succeeds(*run, "-i", "hi", stdin=b"") == ask + b"Assistant: \nUser: \n"
    assert succeeds(*run, stdin=b"\n") == ask + b"User: \n"
    assert succeeds(*run, stdin=b"\nhi\n\nno newline") == ask + 3 * turn + b"User: \n"
    assert succeeds(*run, "-y", "s" * 600, stdin=b"hi\n" * 4) == 4 * turn + b"User: \n"
    assert succeeds(*run, "-y", "", stdin=b"x" * 700 + b"\n" + b"\xff\0\n") == 2 * turn + b"User: \n"
    refuses(*run, "-y", "s" * 600, stdin=b"u" * 2**20 + b"\nhi\n", says=["tokens", "2048"])
    refuses(*run, "-y", "s" * 2**16, "-i", "hi", says="tokens")
    # more turns than the context holds; each takes its own tokens and the EOS that ended the answer
    pieces, scores = read_tokenizer(tmp_path / "tokenizer.bin")
    turns = 2048 // (len(slow_encode(pieces, scores, b"[INST] hi [/INST]")) + 1)
    end = execute(*run, "-y", "", stdin=b"hi\n" * 1000)
    assert end.returncode == 1 and b"are left" in end.stderr and end.stdout.count(turn) == turns


def test_chat_ends_with_the_context(build, tmp_path):
    write_model(tmp_path / "m.bin", False, seq_len=40, vocab_size=300,
                change=lambda w: (chatty(w), w["wcls"][2].fill(0), w["wcls"][280].fill(1)))
    pieces = byte_pieces(300)
    write_tokenizer(tmp_path / "tokenizer.bin", pieces)
    n = len(slow_encode(pieces, [0.0] * 300, b"[INST] hi [/INST]"))
    done = execute(build("sanitized"), tmp_path / "m.bin", "-m", "chat", "-t", "0", "-y", "", stdin=b"hi\nmore\n")
    answer = pieces[280] * (40 - n + 1)
    assert done.returncode == 0 and done.stdout == b"User: Assistant: " + answer + b"\n" and b"used up" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Command line

@pytest.mark.parametrize("flags, says", [
    (["-t", "warm"], '-t: "warm"'), (["-t", "1x"], '-t: "1x"'), (["-t", "nan"], '-t: "nan"'),
    (["-t", "inf"], '-t: "inf"'), (["-t", "1e99"], '-t: "1e99"'), (["-t", ""], '-t: ""'), (["-t", " 1"], '-t: " 1"'),
    (["-t", "-1"], "-t: -1 is out"),
    (["-p", "1.01"], "-p: 1.01 is out"), (["-p", "-0.1"], "-p: -0.1 is out"), (["-p", "NAN"], '-p: "NAN"'),
    (["-s", "-1"], '-s: "-1"'), (["-s", "1.5"], '-s: "1.5"'), (["-s", "9" * 30], "-s: "), (["-s", "+1"], "-s: "),
    (["-n", "-5"], '-n: "-5"'), (["-n", "ten"], '-n: "ten"'),
    (["-n", "4000"], "-n 4000: the model's context is 16 tokens; -n 0"),
    (["-n", "4294967297"], "-n 4294967297"), (["-m", "sing"], '-m: "sing"'), (["-x", "1"], "unknown flag -x"),
    (["-tt", "1"], "unknown flag -tt"), (["t", "1"], "unknown flag t"), (["-"], "unknown flag -"),
    (["-t"], "missing after -t"), (["-t", "0", "-n"], "missing after -n"),
    (["-m", "score", "-i", "x"], "-i: -m score reads"), (["-j", "65"], "-j 65: expected at most 64"),
    (["-j", "two"], '-j: "two"'), (["-d"], "missing after -d"), (["-d", ""], "cannot open the heads file"),
    (["-i", "z" * 15], ["17 tokens", "16 tokens"]),
])
@pytest.mark.parametrize("kind", ["fast", "sanitized"])  # fast: NaN must be seen under -ffast-math too
def test_wrong_flags_are_named(build, tiny, kind, flags, says):
    assert refuses(build(kind), tiny[0], *flags, says=says).stdout == b""


def test_usage(build, tiny):
    for flags in (["-h"], ["--help"], [tiny[0], "-h"], [tiny[0], "-t", "0", "--help"]):
        done = execute(build("plain"), *flags)
        assert done.returncode == 0 and done.stdout.startswith(b"usage") and not done.stderr
    for flags in ([], ["-t", "0"]):
        assert refuses(build("plain"), *flags, says="usage").stdout == b""
    assert succeeds(build("plain"), tiny[0], "-i", "-h", "-t", "0").startswith(b"-h")


def test_steps(build, tmp_path):
    write_model(tmp_path / "m.bin", vocab_size=40, seq_len=300, change=lambda w: w["rms_final"].fill(0))
    tokenizer = write_tokenizer(tmp_path / "tok.bin", visible_pieces(40))
    run = [build("plain"), tmp_path / "m.bin", "-t", "0", "-z", tokenizer]
    for flags, steps in ([], 256), (["-n", "0"], 300), (["-n", "300"], 300), (["-n", "1"], 1):
        assert succeeds(*run, *flags) == b"<unk>" * steps + b"\n"


def test_default_tokenizer(build, tmp_path):
    folder, elsewhere = tmp_path / "models", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    write_model(folder / "m.bin", vocab_size=40, change=lambda w: w["rms_final"].fill(0))
    run = [build("sanitized"), folder / "m.bin", "-t", "0", "-n", "1"]
    refuses(*run, cwd=elsewhere, says=[str(folder / "tokenizer.bin"), "./tokenizer.bin", "-z"])
    write_tokenizer(elsewhere / "tokenizer.bin", [b"working"] + visible_pieces(40)[1:])
    assert succeeds(*run, cwd=elsewhere) == b"working\n"
    write_tokenizer(folder / "tokenizer.bin", [b"beside"] + visible_pieces(40)[1:])
    assert succeeds(*run, cwd=elsewhere) == b"beside\n"
    assert succeeds(build("plain"), "m.bin", "-t", "0", "-n", "1", cwd=folder) == b"beside\n"


def test_load_problems_come_before_stdin(build, tiny):
    for flags in ([tiny[0].with_name("none.bin")], [tiny[0], "-z", "none.bin"]):
        command = [build("plain"), *flags, "-m", "score"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.wait(timeout=20) == 1  # standard input is still open here
        assert b"none.bin" in process.stderr.read()
        process.stdin.close()
        process.stderr.close()


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files, under the sanitizers

def test_files_that_are_no_model(build, tiny, tmp_path):
    run, bad = build("sanitized"), tmp_path / "bad.bin"
    refuses(run, bad, says=["bad.bin", "cannot open"])
    refuses(run, tmp_path, says=[str(tmp_path), "folder"])
    os.mkfifo(tmp_path / "pipe")
    refuses(run, tmp_path / "pipe", says=["pipe", "not a regular file"])
    bad.write_bytes(struct.pack("<7I", 0x64616568, 1, 1, 1, 8, 300, 0))
    refuses(run, bad, says=["future heads", "-d"])
    bad.write_bytes(b"PK\3\4" + bytes(300))
    refuses(run, bad, says=["bad.bin", "PyTorch", "export.py"])
    good = tiny[0].read_bytes()
    for data, says in [(b"", "is empty"), (b"\x40", "too few"), (good[:27], "too few"), (good + b"\0", "asks for"),
                       (struct.pack("<Ii", 0x616B3432, 1) + good[:247], "too few"),
                       (struct.pack("<Ii", 0x616B3432, 3) + good, "version 3"),
                       (struct.pack(">7i", *struct.unpack("<7i", good[:28])) + good[28:], "big-endian")]:
        bad.write_bytes(data)
        refuses(run, bad, says=["bad.bin", says])


def test_truncated_models(build, tiny):
    good = tiny[0].read_bytes()
    cut = tiny[0].with_name("cut.bin")
    for size in [*range(40), *range(40, len(good), len(good) // 60), len(good) - 1]:
        cut.write_bytes(good[:size])
        message = refuses(build("sanitized"), cut, says="cut.bin").stderr.decode()
        assert size < 28 or f"has {size} bytes" in message and f"asks for {len(good)}" in message


def test_wrong_header_fields(build, tiny):
    good = tiny[0].read_bytes()
    bad = tiny[0].with_name("bad.bin")
    wrong = [(i, v) for i in range(7) for v in (0, -1, -(2**31), 2**31 - 1, 2**30, 2**16, 2**24 + 1, 3, 1000)]
    for i, value in wrong + [(0, 9), (3, 8), (3, 5), (4, 3), (5, 2), (5, -300)]:
        bad.write_bytes(good[:4 * i] + struct.pack("<i", value) + good[4 * i + 4:])
        refuses(build("sanitized"), bad, says=["bad.bin", FIELDS[i] if (i, value) != (3, 8) else "even"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space limits are not enforced here")
def test_too_little_memory_is_an_error(build, tmp_path):
    """An honest sparse file of a few megabytes whose KV cache needs 8 GiB."""
    import resource
    sizes = dict(zip(FIELDS, (2, 1, 1024, 1, 1, 3, 2**19), strict=True))
    path = tmp_path / "m.bin"
    path.write_bytes(struct.pack("<7i", *sizes.values()))
    os.truncate(path, 28 + 4 * sum(int(np.prod(s)) for s in tensor_shapes(sizes, True).values()))
    refuses(build("plain"), path, says=["out of memory", "cache"],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)))


def test_a_long_context_costs_nothing_until_it_is_used(build, tmp_path):
    """In versions 1 and 2 seq_len costs no bytes of the file. A forged one is refused or touches little memory."""
    write_tokenizer(tmp_path / "tokenizer.bin", byte_pieces(300))
    write_model(tmp_path / "m.bin", version=1, dim=128, n_heads=1)
    good, bad = (tmp_path / "m.bin").read_bytes(), tmp_path / "bad.bin"
    bad.write_bytes(good[:32] + struct.pack("<i", 2**21) + good[36:])
    done = execute(build("plain"), bad, "-t", "0", "-n", "8")
    assert done.returncode == 0 and float(done.stderr.split()[-2]) < 30, done.stderr
    bad.write_bytes(good[:32] + struct.pack("<i", 2**21 + 1) + good[36:])
    refuses(build("sanitized"), bad, says=["bad.bin: seq_len is 2097153; expected at most 2097152 with 1 layers"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are released on Linux only")
def test_weights_are_in_memory_once(build, tmp_path):
    """A model of 34 MB: the file's pages are released as they are packed."""
    write_tokenizer(tmp_path / "tokenizer.bin", byte_pieces(300))
    write_model(tmp_path / "m.bin", dim=512, hidden_dim=2048, n_layers=2)
    size = (tmp_path / "m.bin").stat().st_size / 1e6
    done = execute(build("plain"), tmp_path / "m.bin", "-n", "4", "-j", "1")
    assert size > 30 and size < float(done.stderr.split()[-2]) < 1.5 * size, done.stderr


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_damaged_weights_stop_the_story(build, tmp_path, kind, value):
    write_tokenizer(tmp_path / "tokenizer.bin", byte_pieces(300))
    for name, heads in [("tok_emb", 2), ("wk", 2), ("wk", 1), ("rms_ffn", 2), ("rms_final", 2)]:  # 1: a head of 8
        write_model(tmp_path / "m.bin", n_heads=heads, change=lambda w, name=name: w[name].fill(value))
        for flags in (["-t", "0"], ["-t", "1", "-s", "1"], ["-m", "score"]):
            done = execute(build(kind), tmp_path / "m.bin", *flags, stdin=b"hi")
            if value != 3e38:  # a huge but finite weight may be normalised away
                assert done.returncode == 1 and b"not finite" in done.stderr, (name, flags, done)


def test_tokenizer_files_that_do_not_fit(build, tiny, tmp_path):
    model, bad, pieces = tiny[0], tmp_path / "bad.bin", byte_pieces(300)
    run = [build("sanitized"), model, "-z", bad]
    refuses(*run, says=["bad.bin", "cannot open"])
    refuses(build("sanitized"), model, "-z", tmp_path, says="folder")
    for data, says in [(b"", "empty"), (b"\7\0\0", "too few"), (b"\7\0\0\0", "0 entries"),
                       (tiny[1].read_bytes() + b"\0", "300")]:
        bad.write_bytes(data)
        refuses(*run, says=["bad.bin", says])
    for n in (299, 301, 512):
        write_tokenizer(bad, byte_pieces(n))
        refuses(*run, says=["bad.bin", f"tokenizer has {n} entries, the model has 300"])
    write_tokenizer(bad, pieces, longest=5)
    refuses(*run, says=["bad.bin", "entry 2 has 6 bytes", "maximum 5"])
    for score in (np.nan, np.inf):
        write_tokenizer(bad, pieces, [0.0] * 299 + [score])
        refuses(*run, says="entry 299 has a score")
    for n in (-1, -(2**31), 2**31 - 1, 10**6):
        bad.write_bytes(struct.pack("<ifi", 2**31 - 1, 0.0, n) + b"abc")
        refuses(*run, says=f"entry 0 says it has {n} bytes; 3 are left")


def test_truncated_tokenizers(build, tiny):
    good, cut = tiny[1].read_bytes(), tiny[1].with_name("cut.bin")
    for size in [*range(60), *range(60, len(good), 97), len(good) - 1]:
        cut.write_bytes(good[:size])
        refuses(build("sanitized"), tiny[0], "-z", cut, says="cut.bin")


@pytest.mark.parametrize("version", [1, 2])
def test_damaged_files_of_versions_1_and_2(build, tmp_path, version):
    write_tokenizer(tmp_path / "tokenizer.bin", byte_pieces(300))
    write_model(tmp_path / "m.bin", version=version)
    run, good, bad = build("sanitized"), (tmp_path / "m.bin").read_bytes(), tmp_path / "bad.bin"
    assert execute(run, tmp_path / "m.bin", "-n", "4").returncode == 0
    for size in [*range(0, 256, 5), 256, 300, len(good) // 2, len(good) - 1]:
        bad.write_bytes(good[:size])
        refuses(run, bad, says="bad.bin")
    for i, field in enumerate(FIELDS):
        for value in (0, -1, -(2**31), 2**31 - 1, 2**24 + 1):
            bad.write_bytes(good[:8 + 4 * i] + struct.pack("<i", value) + good[12 + 4 * i:])
            refuses(run, bad, says=["bad.bin", field])
    for group in (0, -4, 1, 3, 6, 8, 2**31 - 1, -(2**31)) if version == 2 else ():  # dim 8, hidden_dim 12: 4 alone fits
        bad.write_bytes(good[:37] + struct.pack("<i", group) + good[41:])
        refuses(run, bad, says=["bad.bin", f"group size is {group}"])
    rng = random.Random(version)
    for _ in range(60):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data) if rng.random() < 0.7 else 60)] = rng.choice([0, 255, 127, rng.randrange(256)])
        bad.write_bytes(data)
        execute(run, bad, "-t", "0", "-n", "8", "-i", "the")


@pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind is not installed")
def test_valgrind_finds_nothing(build, wide, tmp_path):
    write_model(tmp_path / "m.bin", seq_len=60)
    write_tokenizer(tmp_path / "tokenizer.bin", byte_pieces(300))
    for flags in ([tmp_path / "m.bin", "-t", "0", "-d", "ngram"], [tmp_path / "m.bin", "-m", "score"],
                  [wide / "m2.bin", "-j", "2", "-n", "5", "-i", "the hen"]):
        command = ["valgrind", "--quiet", "--error-exitcode=9", build("plain"), *flags]
        done = subprocess.run(command, input=b"the inn", capture_output=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not shutil.which("x86_64-w64-mingw32-gcc"), reason="mingw-w64 is not installed")
def test_compiles_for_windows(tmp_path):
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-pthread", "-o", tmp_path / "run.exe"]
    done = subprocess.run(["x86_64-w64-mingw32-gcc", *flags, ROOT / "run.c", "-lm"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("which", [0, 1])
def test_random_damage_never_crashes(build, tiny, which):
    rng, good = random.Random(4), tiny[which].read_bytes()
    bad = tiny[which].with_name("bad.bin")
    files = [tiny[0], tiny[1]]
    files[which] = bad
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(data) if rng.random() < 0.7 else 60)
            data[at] = rng.choice([0, 255, 128, 127, rng.randrange(256)])
        bad.write_bytes(data)
        execute(build("sanitized"), files[0], "-z", files[1], "-s", "1", "-n", "8", "-i", "the \u20ac")
