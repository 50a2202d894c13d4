"""Imports point one way: what is typed reads the folders, never the other way round."""

import ast

import pytest
from conftest import ROOT

FOLDERS = ("step", "text", "formats", "study", "bench", "system")
PROGRAMS = ("train", "tinystories", "synthetic", "export", "sample", "compare", "ablate", "sweep")
MAY_IMPORT = {  # a place -> the places it may import besides itself; CONTRIBUTING.md states the same
    "model": set(), "configurator": set(), "system": set(), "text": {"system"}, "step": {"model", "system"},
    "settings": {"configurator", "model", "text"}, "losses": {"step"},
    "formats": {"model", "settings", "step", "text", "system"}, "study": {"settings", "system"}}
OURS = {*FOLDERS, *PROGRAMS, "evaluation", "model", "losses", "settings", "configurator"}


def imported(path) -> set[str]:
    """The places of this project that a file imports, at its top or anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in found} & OURS


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_point_one_way(place):
    paths = [ROOT / f"{place}.py"] if (ROOT / f"{place}.py").exists() else sorted((ROOT / place).glob("*.py"))
    for path in paths:
        assert imported(path) <= MAY_IMPORT[place] | {place}, path


def test_the_top_holds_what_is_typed_or_read_first():
    assert len([*ROOT.glob("*.py"), *ROOT.glob("*.c")]) <= 14
    assert all((ROOT / folder / "__init__.py").exists() for folder in FOLDERS)  # else an installed package wins
