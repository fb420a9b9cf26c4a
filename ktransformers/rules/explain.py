"""Why the plan is as it is: for every module, which rule took it and what kept each other rule from it.

Told from rules, model and plan alone, after `ktransformers.rules.plan` accepted them; nothing here plans or changes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ktransformers.devices import DEVICE_KWARGS
from ktransformers.models.traits import TRAITS, find_layers
from ktransformers.operators.base_operator import device_of
from ktransformers.rules.matching import Matching
from ktransformers.rules.plan import Replacement, Rule, RuleFile, module_pattern

Plan = Mapping[str, Replacement]


@dataclass(frozen=True)
class Outcome:
    """What became of one module. `reasons`: rule number -> why that rule did not take it.

    `replacement` is None where the walk never came, and `hidden` says why.
    """

    name: str
    replacement: Replacement | None
    reasons: Mapping[int, str] = field(default_factory=dict)
    hidden: str = ""


@dataclass
class Group:
    """The same module of several layers with the same outcome. `devices`: kwarg -> device -> numbers of layers.

    `devices` has the entry "device", where the module's own weights live, and the other device kwargs that name
    another one; modules outside the layers have no numbers.
    """

    pattern: str
    cls: str
    replacement: Replacement | None
    reasons: Mapping[int, str]
    hidden: str
    names: list[str] = field(default_factory=list)
    devices: dict[str, dict[str, list[int]]] = field(default_factory=dict)


def outcomes(model: nn.Module, rules: RuleFile, plan: Plan, names: Iterable[str] | None = None) -> Iterator[Outcome]:
    """Say of every module, or of those in `names`, what became of it. Yields in the model's order."""
    matching = Matching(model)
    asked = [(rule, matching.conditions(rule), matching.own_names(rule)) for rule in rules]
    wanted = None if names is None else set(names)
    for name, module in model.named_modules():
        if name and (wanted is None or name in wanted):
            taken = plan.get(name)
            hidden = "" if taken is not None else _hidden_by(name, plan)
            winner = taken.rule if taken is not None else None
            yield Outcome(name, taken, _reasons(name, module, asked, winner, hidden), hidden)


def _reasons(
    name: str, module: nn.Module, asked: Sequence[tuple], winner: Rule | None, hidden: str
) -> dict[int, str]:
    """Why each rule but the winner did not take the module. `asked`: (rule, its conditions, what it matches) each."""
    found = {}
    for rule, conditions, own in asked:
        if winner is not None and rule.number == winner.number:
            continue
        failed = [key for key, names in conditions.items() if name not in names]
        if failed:
            found[rule.number] = "; ".join(_failure(key, rule, module) for key in failed)
        elif hidden:
            found[rule.number] = f"matches, but {hidden}"
        elif name not in own:
            found[rule.number] = f"means another layer's {name}, which all share; the first layer's rule has it"
        else:
            found[rule.number] = f"matches, but rule {winner.number} comes first"
    return found


def _failure(key: str, rule: Rule, module: nn.Module) -> str:
    if key == "class":
        return f"class is {type(module).__name__}, not {rule.cls.__name__}"
    return "name does not match" if key == "name" else f"trait {rule.trait} does not hold"


def _hidden_by(name: str, plan: Plan) -> str:
    """Why the walk never came to a module."""
    above = name.rpartition(".")[0]
    while above and above not in plan:
        above = above.rpartition(".")[0]
    placed = plan.get(above)
    if placed is None or placed.rule is None:
        return f"nothing below {above or 'the model'} is looked at"
    how = "took with recursive: False" if not placed.rule.recursive else f"replaced by {placed.operator.__name__}"
    return f"hidden below {above}, which rule {placed.rule.number} {how}"


def grouped(model: nn.Module, found: Iterable[Outcome]) -> list[Group]:
    """Group outcomes over layers: the same module of every layer with the same rule, operator and reasons."""
    groups: dict[tuple, Group] = {}
    layers = find_layers(model)
    stack = layers[0] if layers else None
    for outcome in found:
        taken = outcome.replacement
        rule = taken.rule.number if taken and taken.rule else 0
        cls = type(model.get_submodule(outcome.name)).__name__
        reasons = {number: module_pattern(text) for number, text in outcome.reasons.items()}
        hidden = module_pattern(outcome.hidden)
        key = (module_pattern(outcome.name), cls, rule, taken and taken.operator, tuple(reasons.items()), hidden)
        group = groups.setdefault(key, Group(key[0], cls, taken, reasons, hidden))
        group.names.append(outcome.name)
        number = layer_number(outcome.name, stack)
        for kwarg, device in _devices(taken).items() if taken else ():
            numbers = group.devices.setdefault(kwarg, {}).setdefault(device, [])
            if number is not None and number not in numbers:
                numbers.append(number)
    return list(groups.values())


def _devices(taken: Replacement) -> dict[str, str]:
    others = {k: str(taken.kwargs[k]) for k in DEVICE_KWARGS if taken.kwargs.get(k) is not None}
    return {"device": str(taken.device)} | {k: v for k, v in others.items() if v != str(taken.device)}


def layer_number(name: str, stack: str | None) -> int | None:
    """The layer that a module is in, or None outside the list of layers called `stack`."""
    if stack is None or not name.startswith(f"{stack}."):
        return None
    return int(name[len(stack) + 1 :].partition(".")[0])


def layer_devices(model: nn.Module, plan: Plan) -> list[Counter[str]]:
    """How many modules of each layer live on which device: those that own weights, but for experts.

    An empty list for a model without layers. Experts are left out, for they live beside the layer, not in it.
    """
    return _count(model, plan, experts=False)


def expert_devices(model: nn.Module, plan: Plan) -> list[Counter[str]]:
    """The same for the routed experts of each layer; empty counts for a layer without any."""
    return _count(model, plan, experts=True)


def _count(model: nn.Module, plan: Plan, experts: bool) -> list[Counter[str]]:
    found = find_layers(model)
    stack, layers = found or ("", ())
    devices = {name: str(replacement.device) for name, replacement in plan.items()}
    counts = [Counter() for _ in layers]
    for number, layer in enumerate(layers):
        for name in _owners(layer, f"{stack}.{number}", experts):
            counts[number][device_of(name, devices)] += 1
    return counts


def _owners(module: nn.Module, name: str, experts: bool) -> Iterator[str]:
    """Names of modules that own weights: only routed experts, or all but those."""
    if TRAITS["experts"](module):
        if experts:
            yield name
        return
    if not experts and next(module.parameters(recurse=False), None) is not None:
        yield name
    for child_name, child in module.named_children():
        yield from _owners(child, f"{name}.{child_name}", experts)
