"""`kt version`: which versions of what are installed. Read from package metadata, so nothing is imported."""

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from rich.table import Table

from ktransformers.cli.common import JsonOption, show

PACKAGES = ("torch", "transformers", "gguf", "safetensors", "peft", "accelerate")
"""Packages that change what a model computes; the last two are optional."""


def version(as_json: JsonOption = False) -> None:
    """Versions of KTransformers and of its dependencies."""
    data = versions()
    show(data, as_json, lambda: _table(data))


def versions() -> dict[str, Any]:
    """Name -> version, None if not installed; "path": where this package is; "c_library": its file, or None."""
    import ktransformers

    folder = Path(ktransformers.__file__).parent
    library = next(folder.glob("_native.*"), None)
    return {
        "ktransformers": ktransformers.__version__,
        "python": platform.python_version(),
        **{name: installed_version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "path": str(folder),
        "c_library": str(library) if library else None,
    }


def installed_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return installed(package)
    except PackageNotFoundError:
        return None


def _table(data: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, found in data.items():
        missing = "not built" if name == "c_library" else "not installed"
        table.add_row(name.replace("_", " "), missing if found is None else found)
    return table
