"""`kt cache`: compare types of the KV cache, and look at, check and clear the prefix cache on disk.

Only what is shown is decided here. What a file holds says `ktransformers.engine.block_files`.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ktransformers import env
from ktransformers.cli import compare_caches
from ktransformers.cli.common import JsonOption, err, show
from ktransformers.errors import KTransformersError, did_you_mean
from ktransformers.machine.units import format_bytes

if TYPE_CHECKING:
    from ktransformers.engine.block_files import BlockFile

app = typer.Typer(
    no_args_is_help=True, help="Compare types of the KV cache; list, check or clear the prefix cache on disk."
)
app.command("compare")(compare_caches.compare)

DirOption = Annotated[
    Path | None, typer.Option("--dir", help="Its folder; default: KT_CACHE_DIR, or in the user's cache folder.")
]
ModelOption = Annotated[
    str, typer.Option("--model", metavar="KEY", help="Only this model: its key in kt cache ls, or the start of it.")
]


@dataclass(frozen=True)
class OfModel:
    """What the folder holds of one model. `used_first`, `used_last`: seconds since one of the blocks was used, of that
    for which it is longest and shortest."""

    model: str
    title: str
    blocks: int
    tokens: int
    bytes: int
    used_first: float
    used_last: float


@app.command("ls")
def list_(directory: DirOption = None, as_json: JsonOption = False) -> None:
    """List the models of which there are blocks of tokens on disk."""
    folder, files = _files(directory)
    found = _by_model(files)
    size = sum(file.size for file in files)
    data = {"dir": str(folder), "blocks": len(files), "bytes": size, "models": found}
    show(data, as_json, lambda: _table(folder, found))


@app.command()
def clear(
    directory: DirOption = None,
    model: ModelOption = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without being asked.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete the blocks on disk, of all models or of one. Nothing else in the folder is touched."""
    folder, files = _files(directory, model)
    size = format_bytes(sum(file.size for file in files))
    if files and not yes:
        raise KTransformersError(f"{folder}: holds {len(files)} blocks, {size}. Say --yes to delete them.")
    failed = [file for file in files if not _deleted(file.path)]
    if failed:
        raise KTransformersError(
            f"{folder}: {len(failed)} of {len(files)} blocks cannot be deleted. Check the folder's permissions."
        )
    _remove_empty_folders(files)
    data = {"dir": str(folder), "blocks": len(files), "bytes": sum(file.size for file in files)}
    show(data, as_json, lambda: Text(f"{folder}: {len(files)} blocks deleted, {size}."))


@app.command()
def verify(directory: DirOption = None, model: ModelOption = "", as_json: JsonOption = False) -> None:
    """Read every block on disk and compare its checksum. Exit code 1: some are damaged.

    A damaged block does no harm: who would read it deletes it and computes it again.
    """
    from ktransformers.engine import block_files

    folder, files = _files(directory, model)
    damaged, sound = [], 0
    for file in _with_bar(files):
        try:
            block_files.verify(file.path)
            sound += 1
        except FileNotFoundError:  # evicted meanwhile
            continue
        except (OSError, block_files.BlockDamaged) as error:
            damaged.append({"path": str(file.path), "problem": str(error)})
    data = {"dir": str(folder), "sound": sound, "damaged": damaged}
    lines = [*(each["problem"] for each in damaged), f"{folder}: {sound} blocks are sound, {len(damaged)} damaged."]
    show(data, as_json, lambda: [Text(line) for line in lines])
    if damaged:
        raise typer.Exit(1)


def _files(directory: Path | None, model: str = "") -> "tuple[Path, list[BlockFile]]":
    """The folder and its blocks. Raises KTransformersError for a folder that was named and is none, and for a model of
    which there is nothing."""
    from ktransformers.engine.block_files import block_files

    folder = Path(env.cache_dir()) if directory is None else directory.expanduser()
    if directory is not None and not folder.is_dir():
        raise KTransformersError(f"--dir {directory}: no such folder. Check the path.")
    files = list(block_files(folder))
    chosen = [file for file in files if file.model.startswith(model)]
    if model and not chosen:
        close = did_you_mean(model, {file.model[: len(model)] for file in files})
        raise KTransformersError(f"--model {model!r}: no model here has such a key{close}. See `kt cache ls`.")
    return folder, chosen


def _by_model(files: "Iterable[BlockFile]") -> list[OfModel]:
    """The most recently used first."""
    from ktransformers.native.pages import PAGE

    groups: dict[str, list[BlockFile]] = {}
    for file in files:
        groups.setdefault(file.model, []).append(file)
    now, found = time.time_ns(), []
    for model, group in groups.items():
        ages = sorted(max(now - file.used, 0) / 1e9 for file in group)  # a clock may have gone back
        size = sum(file.size for file in group)
        found.append(OfModel(model, _title(group), len(group), len(group) * PAGE, size, ages[-1], ages[0]))
    return sorted(found, key=lambda one: one.used_last)


def _title(group: "list[BlockFile]") -> str:
    """What the model is called, by the first sound block."""
    from ktransformers.engine.block_files import BlockDamaged, read_header

    for file in group:
        with contextlib.suppress(OSError, BlockDamaged):
            return str(read_header(file.path).get("title") or "")
    return ""


def _table(folder: Path, found: list[OfModel]) -> Any:
    from rich.table import Table

    if not found:
        return Text(f"{folder}: no blocks.")
    table = Table(title=str(folder), title_justify="left")
    table.add_column("model", overflow="fold")
    for column in ("key", "blocks", "tokens", "size", "last used", "first used"):
        table.add_column(column, justify="left" if column == "key" else "right", no_wrap=True)
    for one in found:
        numbers = f"{one.blocks:,}", f"{one.tokens:,}", format_bytes(one.bytes)
        table.add_row(Text(one.title or "-"), one.model[:12], *numbers, _age(one.used_last), _age(one.used_first))
    return table


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{math.floor(seconds / size)} {unit} ago"
    return "now"


def _deleted(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _remove_empty_folders(files: "Iterable[BlockFile]") -> None:
    for folder in sorted({parent for file in files for parent in list(file.path.parents)[:2]}, reverse=True):
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _with_bar(files: "list[BlockFile]") -> "Iterator[BlockFile]":
    """The files, with a bar of their bytes on a terminal."""
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    columns = [*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task("bytes", total=sum(file.size for file in files))
        for file in files:
            yield file
            progress.advance(bar, file.size)
