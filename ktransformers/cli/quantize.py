"""`kt quantize`: a Hugging Face folder to a GGUF file. Everything is done by gguf_files/write.py."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ktransformers.cli.common import ForceOption, JsonOption, err, new_file, quiet_transformers, show


def quantize(
    source: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors.", metavar="SOURCE")],
    out: Annotated[Path, typer.Argument(help="The file to write, NAME.gguf.", metavar="OUT")],
    mix: Annotated[
        str,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, IQ4_NL, IQ4_XS, Q3_K_M or Q2_K.",
        ),
    ] = "Q4_K_M",
    imatrix: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What llama-imatrix wrote for this model: which columns matter."),
    ] = None,
    split: Annotated[int, typer.Option(metavar="N", help="Maximum tensors per file; 0: one file.")] = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model as one GGUF file, or several, quantized."""
    from ktransformers.gguf_files.write import check_wishes, quantize_folder

    check_wishes(source, out, mix, split)
    parts = sorted(out.parent.glob(f"{out.stem}-*-of-*.gguf"))
    new_file(str(parts[0] if parts and not out.is_file() else out), "OUT", force)
    quiet_transformers()
    done = quantize_folder(source, out, mix, split, show=err.is_terminal and not as_json, imatrix=imatrix)
    show(done, as_json, lambda: _lines(done))


def _lines(done: dict[str, Any]) -> list[Text]:
    kinds = ", ".join(f"{count} {name}" for name, count in done["types"].items())
    written = f"wrote {', '.join(done['files'])}: {done['bytes'] / 1e6:.1f} MB, tensors: {kinds}"
    return [Text(written), *(Text(f"note: {notice}", "yellow") for notice in done["notices"])]
