"""What `kt serve` tells of a loaded model for the page's machine tab: its plan in words, and where its bytes are."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def placement(model: Any, rule: str, devices: Mapping[str, str] | None) -> dict[str, Any]:
    """What `kt rules explain --json` says of each group of modules, with the reasons of the other rules.

    The plan is made once more, on a model without weights, as the loaded one has operators where modules were. No
    other thread may make tensors meanwhile: a model on the meta device changes torch's defaults.
    """
    from ktransformers.cli import explained
    from ktransformers.cli.common import plain
    from ktransformers.configs import meta_model
    from ktransformers.rules.explain import grouped, outcomes
    from ktransformers.rules.plan import load_rules, plan

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were shown when the model was loaded
        net, file = meta_model(model.config), load_rules(rule)
        made = plan(net, file, devices=devices or None)
    groups = [
        _group(explained.group_data(group, file)) | {"owns": _owns(net.get_submodule(group.names[0]))}
        for group in grouped(net, outcomes(net, file, made))
    ]
    layers, experts = explained.layer_homes(net, made)
    rules = [{"rule": one.number, "where": Path(one.where).name} for one in file]
    told = {"file": Path(file.label).name, "model": type(net).__name__, "rules": rules, "layers": layers,
            "experts": experts, "groups": groups}  # fmt: skip
    return plain(told)


def _group(data: dict[str, Any]) -> dict[str, Any]:
    """Of a group what a page shows: names of files alone, no list of modules, values in short."""
    from ktransformers.cli.explained import short

    others = [{"rule": other["rule"], "reason": other["reason"]} for other in data["others"]]
    kept = {key: data[key] for key in ("pattern", "class", "hidden", "rule", "operator", "devices")}
    kwargs = {name: short(value) for name, value in data["kwargs"].items()}
    return kept | {"count": len(data["modules"]), "kwargs": kwargs, "others": others}


def _owns(module: Any) -> bool:
    """Whether a module has weights of its own."""
    return any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))


def weights(model: Any) -> dict[str, int]:
    """Device -> bytes of the stored tensors that its modules are made from, each tensor once."""
    from ktransformers.operators.base_operator import device_of

    source, seen = model.gguf_loader, set()
    found: dict[str, int] = {}
    for name in source.names():
        device = str(device_of(name, source.devices))
        for info in source.infos(name):
            if (info.file, info.start, info.name) not in seen:
                seen.add((info.file, info.start, info.name))
                found[device] = found.get(device, 0) + info.nbytes
    return found
