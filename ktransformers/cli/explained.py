"""What `kt rules explain` shows: modules with the reasons of every rule, or the whole plan. Only words and tables."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ktransformers.cli.common import show
from ktransformers.errors import KTransformersError

if TYPE_CHECKING:
    from torch import nn

    from ktransformers.rules.explain import Group
    from ktransformers.rules.plan import Replacement, RuleFile


def modules(net: "nn.Module", file: "RuleFile", plan: Any, wanted: re.Pattern, as_json: bool) -> None:
    """Print why each module whose name `wanted` finds is what it is. Raises KTransformersError when it finds none."""
    from ktransformers.rules.explain import grouped, outcomes

    names = [name for name, _ in net.named_modules() if name and wanted.search(name)]
    if not names:
        raise KTransformersError(
            f"PATTERN {wanted.pattern!r} finds no module of {type(net).__name__}. "
            "`kt rules explain RULE MODEL` without PATTERN lists what there is."
        )
    groups = grouped(net, outcomes(net, file, plan, names))
    data = {"file": file.label, "model": type(net).__name__, "modules": [group_data(group, file) for group in groups]}
    show(data, as_json, lambda: (line for group in groups for line in _group_text(group, file)))


def group_data(group: "Group", file: "RuleFile") -> dict[str, Any]:
    """A group with the reasons of every rule."""
    taken = group.replacement
    where = {rule.number: rule.where for rule in file}
    return {
        "pattern": group.pattern, "class": group.cls, "modules": group.names, "hidden": group.hidden or None,
        "rule": taken.rule.number if taken and taken.rule else None,
        "where": taken.rule.where if taken and taken.rule else None,
        "operator": taken.operator.__name__ if taken and taken.operator else None,
        "kwargs": _kwargs(taken),
        "devices": {kwarg: _spans(group, kwarg) for kwarg in group.devices},
        "others": [{"rule": n, "where": where[n], "reason": reason} for n, reason in group.reasons.items()],
    }  # fmt: skip


def short(value: Any) -> str:
    """A value as people want to read it: of a mapping with one entry per layer only the size."""
    text = str(value)
    return f"a mapping of {len(value)} layers" if isinstance(value, dict) and len(text) > 80 else text


def _kwargs(taken: "Replacement | None") -> dict[str, Any]:
    """The kwargs that name no device."""
    from ktransformers.devices import DEVICE_KWARGS

    return {k: v for k, v in taken.kwargs.items() if k not in DEVICE_KWARGS} if taken is not None else {}


def _group_text(group: "Group", file: "RuleFile") -> Iterator[Text]:
    from ktransformers.rules.plan import rule_label

    many = f", {len(group.names)} modules" if len(group.names) > 1 else ""
    yield Text.assemble((group.pattern, "bold"), f"  {group.cls}{many}")
    yield Text.assemble("  ", _verdict(group))
    for kwarg in group.devices:
        yield Text(f"  {kwarg}: {', '.join(_in_layers(*found) for found in _spans(group, kwarg).items())}")
    labels = {rule.number: rule_label(rule) for rule in file}
    for number, reason in group.reasons.items():
        yield Text.assemble((f"  not rule {labels[number]}: ", "dim"), (reason, "dim"))


def _in_layers(device: str, layers: str) -> str:
    return f"{device} in layer{'' if layers.isdecimal() else 's'} {layers}" if layers else device


def _verdict(group: "Group") -> Text:
    from ktransformers.rules.plan import rule_label

    taken = group.replacement
    if taken is None:
        return Text(f"no rule is asked: {group.hidden}", style="yellow")
    if taken.rule is None:
        if taken.operator is not None:
            return Text(f"no rule names it; {taken.operator.__name__} is put in to move what flows between devices")
        return Text("no rule takes it: it stays as it is, where such modules go", style="yellow")
    if taken.operator is None:
        return Text(f"rule {rule_label(taken.rule)} places it as it is", style="green")
    kwargs = "".join(f", {name}: {short(value)}" for name, value in _kwargs(taken).items())
    return Text(f"rule {rule_label(taken.rule)} takes it: {taken.operator.__name__}{kwargs}", style="green")


def whole_plan(net: "nn.Module", file: "RuleFile", plan: Any, gpus: int, as_json: bool) -> None:
    """Print the plan, what is left to the default, and where layers live."""
    from ktransformers.rules.table import plan_rows

    rows = [{key: value for key, value in row.items() if key != "quant"} for row in plan_rows(net, plan)]
    left = [row for row in rows if row["rule"] == "-" and row["operator"] == "default"]
    layers, experts = layer_homes(net, plan)
    data = {
        "file": file.label, "model": type(net).__name__, "gpus": gpus, "rows": rows, "default": left,
        "layers": layers, "experts": experts,
    }  # fmt: skip

    def render() -> Iterator[Any]:
        yield _plan_table(net, plan, layers)
        yield Text(f"Left to the default: {_left(left)}.")
        chain = [f"layers {text} {device}" for device, text in layers.items()]
        yield Text(f"Where layers live: {', '.join(chain + _experts_text(layers, experts)) or 'there are none'}.")
        machine = f"{gpus} GPU{'' if gpus == 1 else 's'}" if gpus else "a machine without GPUs"
        yield Text(f"Planned for {machine}; --gpus N plans for another.", style="dim")
        yield Text("Why a module is where it is: kt rules explain RULE MODEL PATTERN", style="dim")

    show(data, as_json, render)


def _plan_table(net: "nn.Module", plan: Any, layers: dict[str, str]) -> Table:
    """The plan with one row for the same module of all layers; `ktransformers.rules.table` has one for each device."""
    from ktransformers.rules.explain import Outcome, grouped

    table = Table(title=f"Plan for {type(net).__name__}", title_justify="left")
    for column, whole in (("modules", True), ("rule", True), ("becomes", False), ("device", False)):
        table.add_column(column, overflow="fold", no_wrap=whole)
    table.add_column("count", justify="right")
    for group in grouped(net, (Outcome(name, taken) for name, taken in plan.items())):
        taken, module = group.replacement, net.get_submodule(group.names[0])
        if taken.operator is None and not module._parameters and not module._buffers:
            continue
        becomes = taken.operator.__name__ if taken.operator else "as it is"
        number = str(taken.rule.number) if taken.rule else "-"
        table.add_row(group.pattern, number, becomes, _where(group, layers), str(len(group.names)))
    return table


def _where(group: "Group", layers: dict[str, str]) -> str:
    """A group's devices in short: of modules that follow layers over several devices just that."""
    homes = {number: device for device, text in layers.items() for number in _numbers(text)}
    there = group.devices["device"]
    if len(there) > 1 and all(homes.get(number) == device for device, numbers in there.items() for number in numbers):
        return "its layer's"
    return ", ".join(f"{device} ({text})" if text else device for device, text in _spans(group, "device").items())


def _numbers(text: str) -> Iterator[int]:
    for span in filter(None, text.split(",")):
        first, _, last = span.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _spans(group: "Group", kwarg: str) -> dict[str, str]:
    from ktransformers.errors import ranges

    return {device: ranges(numbers) for device, numbers in group.devices.get(kwarg, {}).items()}


def layer_homes(net: "nn.Module", plan: Any) -> tuple[dict[str, str], dict[str, str]]:
    """device -> layers, for the layers themselves and for their routed experts."""
    from ktransformers.errors import ranges
    from ktransformers.rules.explain import expert_devices, layer_devices

    def by_device(devices: list[str | None]) -> dict[str, str]:
        names = dict.fromkeys(device for device in devices if device is not None)
        return {name: ranges(i for i, device in enumerate(devices) if device == name) for name in names}

    return tuple(
        by_device([counts.most_common(1)[0][0] if counts else None for counts in found])
        for found in (layer_devices(net, plan), expert_devices(net, plan))
    )


def _experts_text(layers: dict[str, str], experts: dict[str, str]) -> list[str]:
    if len(experts) == 1:
        return [f"experts {device}" for device in experts]
    elsewhere = {device: text for device, text in experts.items() if layers.get(device) != text}
    if experts and not elsewhere:
        return ["experts with their layers"]
    return [f"experts of {text} {device}" for device, text in experts.items()]


def _left(rows: list[dict[str, Any]]) -> str:
    found: dict[str, int] = {}
    for row in rows:
        found[row["pattern"]] = found.get(row["pattern"], 0) + row["count"]
    return ", ".join(f"{pattern} ({count})" for pattern, count in found.items()) or "nothing"
