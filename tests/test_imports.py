"""Imports go one way along the arrows of the design: a file imports from its own level's left neighbours never."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ktransformers"

# Lowest first. A file may import from its own level or from lower ones.
LEVELS = [
    {"errors", "env", "iq_grids"},
    {"quants", "devices", "traits", "scaled"},
    {"former", "layers"},
    {"loaders", "native", "encode", "cache"},
    {"operators", "gguf_families", "gguf_splits"},
    {"gguf_config", "gguf_tokenizer"},
    {"resolve"},
    {"rule_files"},
    {"rules", "quantize"},
    {"report", "explain"},
    {"optimize"},
    {"generate"},
    {"planner"},
    {"local_chat", "from_pretrained"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree):
    """The parts of this package that a file imports, wherever in the file it does."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("ktransformers.") and name.split(".")[1] in LEVEL:
                yield name.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_points_back(path):
    backward = {name for name in imported(ast.parse(path.read_text())) if LEVEL[name] > LEVEL[part(path)]}
    assert not backward, f"{path.name} imports {sorted(backward)}, which stand above it"


def test_only_native_knows_the_c_library():
    users = {
        part(path) for path in FILES if "_native" in path.read_text() and "ktransformers._native" in path.read_text()
    }
    assert users <= {"native"}
