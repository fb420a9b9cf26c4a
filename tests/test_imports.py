"""Imports go one way along the arrows of the design: a folder imports from its own row or from rows above it here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = [  # lowest first: one row a floor, folders and single files of ktransformers/, and models/
    "errors paths env devices upstream",
    "models quants",
    "native machine kernels",
    "loaders",
    "gguf_files configs",
    "operators",
    "rules",
    "checks finish",
    "optimize from_pretrained",
    "engine util",
    "planner simulator",
    "server sft",
    "local_chat quantize cli __main__",
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
PARENTS = {"ktransformers": ROOT / "ktransformers", "models": ROOT / "models"}
FILES = sorted(
    path
    for folder in PARENTS.values()
    for path in folder.rglob("*.py")
    if path != ROOT / "ktransformers" / "__init__.py" and "training" not in path.parts
)


def part(path):
    first, *rest = path.relative_to(ROOT).parts
    return first if first == "models" else rest[0].removesuffix(".py")


def imported(tree):
    """The parts of this package that a file imports, wherever in the file it does."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("ktransformers.") and name.split(".")[1] in FLOOR:
                yield name.split(".")[1]


def test_every_folder_has_a_floor():
    assert {part(path) for path in FILES} <= set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_points_up(path):
    backward = {name for name in imported(ast.parse(path.read_text())) if FLOOR[name] > FLOOR[part(path)]}
    assert not backward, f"{path.name} imports {sorted(backward)}, which stand above it"


def test_only_native_knows_the_c_library():
    users = {part(path) for path in FILES if "import _native" in path.read_text() or "ktransformers._native" in path.read_text()}
    assert users <= {"native"}
