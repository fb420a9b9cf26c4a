"""What people look at: the plan as a table, loading as a progress bar. Decides nothing, changes nothing."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from torch import nn

from ktransformers.rules.plan import Replacement, module_pattern, rule_label

if TYPE_CHECKING:
    from ktransformers.loaders import WeightSource


def plan_rows(
    model: nn.Module, plan: Mapping[str, Replacement], weights: "WeightSource | None" = None
) -> list[dict[str, Any]]:
    """Group a plan by pattern: one row for the same module of every layer with the same outcome.

    Each row holds pattern, operator, rule ("2 (DeepSeek-V3.yaml:7)" or "-"), device, quant (types of the module's own
    weights, "" when `weights` is None) and count. Modules that no rule names appear only if they own tensors.
    """
    rows: dict[tuple, int] = {}
    for name, replacement in plan.items():
        module = model.get_submodule(name)
        owned = [key for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        if replacement.operator is None and not owned:
            continue
        row = (
            module_pattern(name),
            _operator_name(replacement),
            rule_label(replacement) or "-",
            _device(replacement),
            _quant_types(weights, name, owned),
        )
        rows[row] = rows.get(row, 0) + 1
    keys = ("pattern", "operator", "rule", "device", "quant")
    return [{**dict(zip(keys, row, strict=True)), "count": count} for row, count in rows.items()]


def _operator_name(replacement: Replacement) -> str:
    if replacement.operator is None:
        return "default"
    inner = replacement.kwargs.get("generate_op")
    return replacement.operator.__name__ + (f" / {inner}" if inner else "")


def _device(replacement: Replacement) -> str:
    device, prefill = replacement.device, replacement.kwargs.get("prefill_device")
    return f"{device} (prefill {prefill})" if prefill not in (None, device) else str(device)


def _quant_types(weights: "WeightSource | None", name: str, owned: list[str]) -> str:
    if weights is None:
        return ""
    types = {weights.quant_type(f"{name}.{key}") for key in owned if weights.has(f"{name}.{key}")}
    return "+".join(sorted({part for text in types for part in text.split("+")}))


def plan_table(model: nn.Module, plan: Mapping[str, Replacement], weights: "WeightSource | None" = None) -> Table:
    """The rows of `plan_rows` as a table for a terminal."""
    table = Table(title=f"Plan for {type(model).__name__}", title_justify="left")
    for column in ("pattern", "operator", "rule", "device", "quant"):
        table.add_column(column, overflow="fold")
    table.add_column("count", justify="right")
    for row in plan_rows(model, plan, weights):
        table.add_row(*(str(value) for value in row.values()))
    return table


def print_plan(model: nn.Module, plan: Mapping[str, Replacement], weights: "WeightSource | None" = None) -> None:
    """Print the table to standard error (what KT_DEBUG=1 does), wide enough not to wrap in a log file."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=160)
    console.print(plan_table(model, plan, weights))


