"""Settings from a config file and the command line, checked against a typed dataclass.

    python train.py [config/x.py] [--key=value ...]

A config file is a list of plain assignments, in Python's notation. It is read, not executed:
values are literals, arithmetic on them, and names assigned further up (`max_iters = 10 * 100`).
Later words on the command line win over earlier ones. Every setting is a field of one dataclass;
its annotation says which values it takes, and the comment after it is its help text:

    @dataclass
    class Settings:
        batch_size: Annotated[int, Range(1)] = 32  # sequences in one micro-batch
        dtype: Literal["float32", "bfloat16"] = "float32"  # of the matrix products

An attribute `elsewhere` of that class, {name: hint}, says what settings of other programs are called here.

What this leaves out on purpose: nested settings, environment variables, and config files that run code.
"""

import ast
import difflib
import functools
import inspect
import io
import math
import operator
import os
import textwrap
import tokenize
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

MOST_BYTES = 1 << 16  # of a config file; ours have a thousand
MOST_BITS = 64  # of a whole number


@dataclass(frozen=True)
class Range:
    """The numbers a setting may take, from `low` to `high`; an open end leaves the bound itself out."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.low_open else x >= self.low
        below = x < self.high if self.high_open else x <= self.high
        return above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.low_open else '>='} {self.low}"
        return f"in {'(' if self.low_open else '['}{self.low}, {self.high}{')' if self.high_open else ']'}"


def configure(settings_class: type, argv: list[str], saved: dict[str, Any] | None = None, where: str = "") -> Any:
    """Return a `settings_class` made of its defaults, at most one config file, and `--key=value` words.

    saved: values in place of defaults, from the file called `where`; what is no setting any more is left out.
    Errors: ValueError that names the word or the file and line, what was found and what was expected.
    """
    known = get_type_hints(settings_class)
    values = {key: checked(settings_class, key, value, f"{where}: {key}")
              for key, value in (saved or {}).items() if key in known}
    config_file = None
    for before, word in zip(("", *argv), argv):
        if not word.startswith("-"):
            if takes_a_value(settings_class, before):
                raise ValueError(f"{before} {shown(word)}: expected {before}={word[:80]}, with an equals sign")
            if config_file is not None:
                setting = f"; did you mean --{word}?" if "=" in word else ""
                raise ValueError(f"{word}: a second config file after {config_file}; a run takes one, then --key=value"
                                 f"{setting}")
            config_file = word
            values |= read_config_file(settings_class, word)
    for word in argv:
        if word.startswith("-"):
            if not word.startswith("--") or word == "--":
                raise ValueError(f"{word}: expected config/file.py or --key=value (try --help)")
            key, equals, text = word[2:].partition("=")  # the first '=' only: values may hold more
            key = key.replace("-", "_")
            where = f"--{key}" if key.isidentifier() and len(key) < 80 else shown(word)
            values[key] = parse(settings_class, key, text if equals else None, where)
    return settings_class(**values)


def takes_a_value(settings_class: type, word: str) -> bool:
    """Is this a bare --key whose value may be the next word, as other programs have it?"""
    key = word.removeprefix("--").replace("-", "_")
    return word.startswith("--") and hints_of(settings_class).get(key, bool) is not bool


def parse(settings_class: type, key: str, text: str | None, where: str) -> Any:
    """The value of a word of the command line; `text` is None for a bare `--key`."""
    kind = kind_of(settings_class, key, where)[0]
    if text is None:
        if kind is not bool:
            raise ValueError(f"{where}: expected a value, as in {where}={getattr(settings_class, key)}")
        return True
    value: Any = text
    if kind is bool:
        value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    elif kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            pass  # checked() words the complaint
    return checked(settings_class, key, value, where)


def checked(settings_class: type, key: str, value: Any, where: str) -> Any:
    """`value` in the type of setting `key`, or a ValueError that says what `key` takes."""
    kind, limit = kind_of(settings_class, key, where)
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        value = float(value)  # --learning_rate=1 is a fine float
    finite = not isinstance(value, float) or math.isfinite(value)
    if type(value) is not kind or not finite or (limit is not None and value not in limit):
        raise ValueError(f"{where}: expected {describe(kind, limit)}, found {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value in a message: printable and short."""
    if type(value) is int and value.bit_length() > MOST_BITS:
        return f"a number of {value.bit_length():,} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-50:]}"


@functools.cache
def hints_of(settings_class: type) -> dict[str, Any]:
    return get_type_hints(settings_class, include_extras=True)


def kind_of(settings_class: type, key: str, where: str) -> tuple[type, Range | tuple | None]:
    """The type of setting `key` and what limits it: a Range, a tuple of choices, or None."""
    hints = hints_of(settings_class)
    if key not in hints:
        near = difflib.get_close_matches(key[:80], hints, n=1, cutoff=0.75)
        hint = f"did you mean {near[0]}?" if near else "--help lists all"
        hint = getattr(settings_class, "elsewhere", {}).get(key, hint)
        raise ValueError(f"{where}: no such setting; {hint}")
    hint = hints[key]
    if get_origin(hint) is Annotated:
        return get_args(hint)[:2]
    if get_origin(hint) is Literal:
        return type(get_args(hint)[0]), get_args(hint)
    return hint, None


def describe(kind: type, limit: Range | tuple | None) -> str:
    """The values a setting takes, in words: 'int >= 1', 'float in [0, 1]', 'one of linear, cosine'."""
    if isinstance(limit, tuple):
        return "one of " + ", ".join(map(str, limit))
    return kind.__name__ + (f" {limit}" if limit else "")


# ---------------------------------------------------------------------------------------------
# config files

BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
          ast.FloorDiv: operator.floordiv}


def read_config_file(settings_class: type, path: str) -> dict[str, Any]:
    """The assignments of a config file, checked: {setting: value}."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe never ends, or never begins
        kind = "folder" if os.path.isdir(path) else "pipe or device"
        raise ValueError(f"{path}: expected a config file, found a {kind}")
    try:
        with open(path, encoding="utf-8-sig") as f:
            source = f.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot read this config file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from error
    if len(source) > MOST_BYTES:
        raise ValueError(f"{path}: expected a config file of at most {MOST_BYTES:,} characters, found more")
    try:
        statements = ast.parse(source, filename=path).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # ValueError: a NUL byte in the source
        where = f"{path}:{error.lineno}" if getattr(error, "lineno", None) else path
        reason = error.args[0] if error.args else "nested too deeply"
        raise ValueError(f"{where}: not plain assignments: {reason}") from error
    values: dict[str, Any] = {}
    for i, statement in enumerate(statements):
        where = f"{path}:{statement.lineno}"
        if i == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the file's docstring
        if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1
                and isinstance(statement.targets[0], ast.Name)):
            raise ValueError(f"{where}: expected `setting = value`, found `{source_of(statement)}`")
        key = statement.targets[0].id
        where = f"{where}: {key}"
        try:
            value = evaluate(statement.value, values, where)
        except RecursionError:
            raise ValueError(f"{where}: nested too deeply") from None
        values[key] = checked(settings_class, key, value, where)
    return values


def is_number(value: Any) -> bool:
    return type(value) in (int, float)  # and not bool, which Python counts among the ints


def source_of(node: ast.AST) -> str:
    """The first line of what a config file says there, cut where it is long."""
    try:
        line = ast.unparse(node).partition("\n")[0]
    except (ValueError, RecursionError):  # a number of thousands of digits; an expression of thousands of levels
        return "..."
    return line if len(line) <= 200 else f"{line[:200]} ..."


def evaluate(node: ast.expr, names: dict[str, Any], where: str) -> Any:
    """The value of a literal, arithmetic on numbers, or a name assigned further up; whole numbers have MOST_BITS."""
    value = value_of(node, names, where)
    if type(value) is int and value.bit_length() > MOST_BITS:
        raise ValueError(f"{where}: expected a number of at most {MOST_BITS} bits, found {shown(value)}")
    return value


def value_of(node: ast.expr, names: dict[str, Any], where: str) -> Any:
    match node:
        case ast.Constant(value):
            return value
        case ast.Name(id) if id in names:
            return names[id]
        case ast.UnaryOp(ast.USub(), operand):
            value = evaluate(operand, names, where)
            if is_number(value):
                return -value
        case ast.BinOp(left, op, right) if type(op) in BINARY:
            a, b = evaluate(left, names, where), evaluate(right, names, where)
            if is_number(a) and is_number(b):
                try:
                    return BINARY[type(op)](a, b)
                except (ZeroDivisionError, OverflowError) as error:
                    raise ValueError(f"{where}: `{source_of(node)}`: {error}") from error
    raise ValueError(f"{where}: expected a number, a text, True/False, arithmetic on them or a setting assigned "
                     f"further up, found `{source_of(node)}`")


# ---------------------------------------------------------------------------------------------
# --help

def sections(settings_class: type) -> list[type]:
    """The dataclasses that a settings class is made of, in the order of their fields, itself last."""
    return [c for c in reversed(settings_class.__mro__) if c.__dict__.get("__annotations__")]


def comments(section: type) -> dict[str, str]:
    """{setting: the comment after it}, read from the class's source."""
    source = textwrap.dedent(inspect.getsource(section))
    lines = source.splitlines()
    texts = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            name, colon, _ = lines[token.start[0] - 1].strip().partition(":")
            if colon and name.isidentifier():
                texts[name] = token.string.lstrip("# ")
    return texts


def help_text(settings_class: type, usage: str) -> str:
    """Every setting with its default, what it takes, and its comment, under the docstring of its section."""
    lines = [usage.strip(), "", "settings: --name=default, what it takes; what it means"]
    for section in sections(settings_class):
        lines += ["", inspect.getdoc(section).splitlines()[0]]
        texts = comments(section)
        for name in section.__annotations__:
            default = getattr(section, name)
            takes = describe(*kind_of(settings_class, name, name))
            shown = f'"{default}"' if isinstance(default, str) else default
            lines += [f"  --{name}={shown}", f"        {takes}; {texts.get(name, '')}"]
    return "\n".join(lines)
