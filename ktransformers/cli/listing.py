"""`kt list`: the names that other commands take: known models, GPUs, weight formats, packaged rules.

Not `list.py`: importing a module of that name would hide Python's own `list` in the package.
"""

import json
from collections.abc import Callable
from importlib import resources
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from ktransformers.cli.common import JsonOption, show

Kind = Literal["models", "gpus", "formats", "rules"]


def list_(
    what: Annotated[Kind | None, typer.Argument(help="models, gpus, formats or rules; default: all of them.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the known models, GPUs, weight formats and packaged rules."""
    wanted = KINDS if what is None else {what: KINDS[what]}
    found = {kind: rows() for kind, (rows, _) in wanted.items()}
    show(found, as_json, lambda: [table(found[kind]) for kind, (_, table) in wanted.items()])


# ---- rows --------------------------------------------------------------------------------------------------


def models() -> list[dict[str, Any]]:
    """Known models, as their publishers describe them; `stored`: how the published checkpoint holds its weights."""
    from ktransformers.models.known import KNOWN

    rows = []
    for known in KNOWN.values():
        file = resources.files("ktransformers.models").joinpath("configs", known.file)
        fields = json.loads(file.read_text("utf-8"))
        method = fields.get("quantization_config", {}).get("quant_method")
        rows.append({
            "name": known.name, "parameters": known.parameters, "active_parameters": known.active,
            "context": fields["max_position_embeddings"],
            "stored": method or fields.get("dtype") or fields["torch_dtype"],
            "repository": known.source, "aliases": known.aliases,
        })  # fmt: skip
    return rows


def gpus() -> list[dict[str, Any]]:
    """Known GPUs and their published figures: bytes, bytes and operations per second."""
    from ktransformers.machine.gpus import GPU_MODELS

    return [
        {"name": gpu.name, "memory": gpu.memory, "bandwidth": gpu.bandwidth, "bf16_ops": gpu.bf16_ops, "link": gpu.link}
        for gpu in GPU_MODELS.values()
    ]


def formats() -> list[dict[str, Any]]:
    """What --format takes; `bits` per weight in a large matrix, None for a mix of several types."""
    from ktransformers.planner import formats as known

    return [
        {"name": name, "files": ", ".join(known.files(name)), "bits": known.bits(name)}
        for name in known.format_names()
    ]


def rules() -> list[dict[str, Any]]:
    """Packaged rules: a name of each family or file, its file, and the model types that it is default for."""
    from ktransformers.models import DEFAULT_RULES
    from ktransformers.optimize_rules import NAMES

    folder = resources.files("ktransformers.optimize_rules")
    files = sorted(path.name for path in folder.iterdir() if path.name.endswith(".yaml"))
    names = {name: f"{file}.yaml" for name, file in NAMES.items()}
    names |= {file.removesuffix(".yaml"): file for file in files}
    types = {name: [kind for kind, rule in DEFAULT_RULES.items() if rule == name] for name in names}
    return [{"name": name, "file": file, "model_types": types[name]} for name, file in names.items()]


# ---- tables ------------------------------------------------------------------------------------------------


def _models(rows: list[dict[str, Any]]) -> Table:
    table = _table("Models", ("name", "parameters", "active", "context", "stored as", "repository"), right=(1, 2, 3))
    for row in rows:
        sizes = (f"{row['parameters'] / 1e9:g}B", f"{row['active_parameters'] / 1e9:g}B", str(row["context"]))
        table.add_row(row["name"], *sizes, row["stored"], row["repository"])
    return table


def _gpus(rows: list[dict[str, Any]]) -> Table:
    from ktransformers.machine.units import format_bytes, format_rate

    table = _table("GPUs", ("name", "memory", "bandwidth", "bf16", "from RAM"), right=(1, 2, 3, 4))
    for row in rows:
        rates = (format_rate(row["bandwidth"]), format_rate(row["bf16_ops"], "OP/s"), format_rate(row["link"]))
        table.add_row(row["name"], format_bytes(row["memory"]), *rates)
    return table


def _formats(rows: list[dict[str, Any]]) -> Table:
    table = _table("Formats", ("name", "files", "bits per weight"), right=(2,))
    for row in rows:
        table.add_row(row["name"], row["files"], "mixed" if row["bits"] is None else f"{row['bits']:.2f}")
    return table


def _rules(rows: list[dict[str, Any]]) -> Table:
    table = _table("Rules", ("name", "file", "default for model types"))
    for row in rows:
        table.add_row(row["name"], row["file"], ", ".join(row["model_types"]))
    return table


def _table(title: str, columns: tuple[str, ...], right: tuple[int, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        justify = "right" if index in right else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column == "name")  # names are copied whole
    return table


KINDS: dict[Kind, tuple[Callable[[], list[dict[str, Any]]], Callable[[list[dict[str, Any]]], Table]]] = {
    "models": (models, _models),
    "gpus": (gpus, _gpus),
    "formats": (formats, _formats),
    "rules": (rules, _rules),
}
"""What can be listed -> (its rows, their table)."""
