"""`kt merge`: an adapter made part of a model. Everything is done by sft/merge.py."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ktransformers.cli.common import ForceOption, JsonOption, err, new_file, quiet_transformers, show
from ktransformers.errors import KTransformersError


def merge(
    model: Annotated[Path, typer.Argument(help="The base: a model folder or a .gguf.", metavar="MODEL")],
    adapter: Annotated[Path, typer.Argument(help="A PEFT folder, or a GGUF LoRA file.", metavar="ADAPTER")],
    out: Annotated[Path, typer.Option("--out", "-o", help="NAME.gguf, or a new folder for safetensors.")],
    kind: Annotated[
        str,
        typer.Option(
            "--type", metavar="TYPE",
            help="As of kt quantize, for a folder F32, F16 or BF16; default: each tensor keeps its own, and quantized "
            "safetensors become BF16.",
        ),
    ] = "",
    weights: Annotated[
        str, typer.Option("--weights", "-w", help="A .gguf of the model; MODEL then is its folder, for the config.")
    ] = "",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model with an adapter merged in, and say what that changed and what storing lost."""
    _check_out(out, force)
    from ktransformers.sft.merge import merge as run

    quiet_transformers()
    done = run(model, adapter, out, kind, weights, show=err.is_terminal and not as_json)
    show(done, as_json, lambda: _rendered(done))


def _check_out(out: Path, force: bool) -> None:
    if out.suffix == ".gguf":
        new_file(str(out), "--out", force)
    elif out.is_file():
        raise KTransformersError(f"--out {out}: is a file; expected a folder to write, or NAME.gguf.")
    elif out.is_dir() and any(out.iterdir()) and not force:
        raise KTransformersError(f"--out {out}: is not empty. Choose another folder, or overwrite files with --force.")


def _rendered(done: dict[str, Any]) -> Iterator[Any]:
    from rich.table import Table

    table = Table(title="relative to the merged weights, root mean square", title_justify="left")
    table.add_column("tensors of")
    table.add_column("stored as")
    for column in ("number", "adapter's change", "lost in storing"):
        table.add_column(column, justify="right")
    moved = [(kind, row) for kind, row in done["kinds"].items() if row["change"] or row["error"]]
    for kind, row in [*moved, ("all tensors written anew", done["all"])]:
        table.add_row(kind, row["types"], str(row["tensors"]), f"{row['change']:.2e}", f"{row['error']:.2e}")
    yield table
    kinds = ", ".join(f"{count} {name}" for name, count in done["types"].items())
    files = [path for path in done["files"] if path.endswith((".gguf", ".safetensors"))]
    yield Text(f"wrote {', '.join(files)}: {done['bytes'] / 1e6:.1f} MB, tensors: {kinds}")
    for notice in done["notices"]:
        yield Text(f"note: {notice}", "yellow")
