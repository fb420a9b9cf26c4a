"""`python -m ktransformers.quantize`, the name of `kt quantize` that scripts know."""

from typing import Any

import typer

from ktransformers.cli.common import OneCommand
from ktransformers.cli.quantize import quantize

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(cls=OneCommand)(quantize)


def __getattr__(name: str) -> Any:
    """The functions that programs imported from here; they bring torch, which arguments do not need."""
    if name not in ("choose_type", "quantize_folder"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ktransformers.gguf_files import write

    return getattr(write, name)


if __name__ == "__main__":
    app(prog_name="python -m ktransformers.quantize")
