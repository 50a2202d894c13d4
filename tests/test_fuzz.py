"""Files from strangers, by hypothesis: a reader takes what is in them, or a short ValueError says what is wrong.

    make fuzz                                            # a thousand examples each, and run.c's readers
    pytest tests/test_fuzz.py --hypothesis-profile=fuzz
"""

import io
import json
import zipfile

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from configurator import configure
from formats.checkpoint import model_args_of, read_checkpoint
from model import ModelArgs, Transformer
from settings import Settings, check
from study.log import Log
from study.processes import evaluations, settings_in
from study.runs import Reader
from system.shown import shown_message

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS | st.sampled_from([10**19, -(10**400), 2**63, 1e308]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8)
NAMES = st.sampled_from(sorted(Settings.__dataclass_fields__))


def complaint_of(read, *args) -> str:
    """What a reader says of a file; nothing if it takes it. Anything but a short ValueError fails the test."""
    try:
        read(*args)
    except ValueError as error:
        message = shown_message(error)
        assert message and len(message) < 3000, len(message)
        return message
    return ""


# ---------------------------------------------------------------------------------------------
# log.jsonl

def as_json(values: object) -> bytes:
    return json.dumps(values).encode()


KEYS = st.sampled_from(["iter", "val/ntp", "tokens", "seconds", "config", "facts", "run", "x"])
ODD_LINES = [b"[" * 100_000, b'{"iter":' + b"9" * 5000 + b"}", b'{"iter": 1, "val/ntp": 1e999}', b"\xff"]
LINES = (st.dictionaries(KEYS, VALUES, max_size=6).map(as_json) | VALUES.map(as_json) | st.binary(max_size=60)
         | st.sampled_from(ODD_LINES)
         | st.integers(0, 40).map(lambda k: as_json({"iter": k, "val/ntp": 5.0 - k / 10, "tokens": k, "seconds": k})))


@given(st.lists(LINES, max_size=8), st.binary(max_size=5))
@example([b'{"iter": 1, "config": {"seed": "x", "max_iters": [1]}, "facts": 7}'], b"")
@example([b'{"iter": 0, "val/ntp": 1, "run": ["\\u001b[2J"]}'], b"")
def test_a_log_is_read_and_resumed_whatever_is_in_it(fresh_folder, lines, end):
    folder = fresh_folder()
    path = folder / "log.jsonl"
    content = b"\n".join(lines) + end
    path.write_bytes(content)
    complaint_of(Reader().read, str(path))
    assert all(isinstance(it, int) and isinstance(ntp, float) for it, ntp in evaluations(folder).items())
    assert isinstance(settings_in(folder), dict)
    Log(folder, 5, {"config": {}}, None).close()
    kept = path.read_bytes().splitlines()
    assert json.loads(kept[-1]) == {"iter": 5, "config": {}}
    assert all(json.loads(line)["iter"] < 5 for line in kept[:-1])
    assert set(kept[:-1]) <= set(content.splitlines())  # bytes are kept as they were


# ---------------------------------------------------------------------------------------------
# config files

ODD_LITERALS = ["0x" + "f" * 5000, "9" * 5000, "(" * 300 + ")" * 300, "1e999", "-" * 3000 + "1", "10**9**9", "1/0",
                "'\\x1b[2J'", "'\\ud800'", "1_000", "1" + "*1" * 3000, "__import__('os')"]
SUMS = st.tuples(NAMES, st.sampled_from("+-*/%@|"), NAMES).map(" ".join)
LITERALS = VALUES.map(repr) | NAMES | st.text(max_size=20) | SUMS | st.sampled_from(ODD_LITERALS)
STATEMENTS = st.tuples(NAMES | st.text(max_size=10), LITERALS).map(" = ".join) | st.text(max_size=40) | LITERALS


@given(st.lists(STATEMENTS, max_size=6).map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass"))
       | st.binary(max_size=80))
def test_a_config_is_settings_or_a_complaint_that_names_it(fresh_folder, content):
    path = fresh_folder() / "strange.py"
    path.write_bytes(content)

    def read():
        s = configure(Settings, [str(path)])
        assert all(type(getattr(s, name)) is type(default.default) for name, default in s.__dataclass_fields__.items())
        complaint_of(check, s)

    assert "strange.py" in (complaint_of(read) or "strange.py")


@given(st.lists(st.tuples(NAMES | st.text(max_size=10), st.text(max_size=20) | LITERALS), max_size=4))
def test_words_of_a_command_line_are_settings_or_a_complaint(words):
    complaint_of(configure, Settings, [f"--{name}={value}" for name, value in words])


# ---------------------------------------------------------------------------------------------
# checkpoints

def checkpoint_bytes(model_args: dict, more: dict) -> bytes:
    model = Transformer(ModelArgs(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=8, max_seq_len=8))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "model_args": model.args.as_dict() | model_args} | more, buffer)
    return buffer.getvalue()


WHOLE = checkpoint_bytes({}, {})


def damaged(where: int, with_what: bytes) -> bytes:
    at = where % len(WHOLE)
    return WHOLE[:at] + with_what + WHOLE[at + len(with_what):]


def repickled(where: int, with_what: bytes) -> bytes:
    """The same with a damaged pickle in a sound zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                at = where % len(content)
                content = content[:at] + with_what + content[at + len(with_what):]
            new.writestr(name, content)
    return buffer.getvalue()


PLACES = st.integers(0, 10**6)
SIZES = st.dictionaries(st.sampled_from(sorted(ModelArgs().as_dict())), VALUES, min_size=1, max_size=3)


@given(SIZES.map(lambda args: checkpoint_bytes(args, {}))
       | st.tuples(PLACES, st.binary(min_size=1, max_size=8)).map(lambda change: damaged(*change))
       | st.tuples(PLACES, st.binary(min_size=1, max_size=8)).map(lambda change: repickled(*change))
       | st.integers(0, len(WHOLE)).map(lambda n: WHOLE[:n]) | st.binary(max_size=300)
       | st.lists(st.integers(-(2**31), 2**31 - 1), min_size=7, max_size=9).map(
           lambda sizes: b"".join(n.to_bytes(4, "little", signed=True) for n in sizes)))
@example(checkpoint_bytes({"dim": 10**19}, {}))
@example(checkpoint_bytes({"max_seq_len": 2**40}, {}))
def test_a_checkpoint_has_a_shape_or_a_complaint_that_names_it(fresh_folder, content):
    path = fresh_folder() / "strange.pt"
    path.write_bytes(content)
    complaint = complaint_of(lambda: model_args_of(read_checkpoint(path), path))
    assert "strange.pt" in (complaint or "strange.pt")
