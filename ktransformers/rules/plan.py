"""Rules meet a model: `plan` says what becomes of every module. Nothing here builds operators or reads weights.

The language is upstream's: depth-first over the model, the first rule that matches a module wins, `match.name` is
`re.search` on the dotted path, `match.class` is isinstance, both together mean and, `recursive: False` stops the walk
below a match, the class "default" only places. On top of it every problem is found and listed at once, with file and
line (rule_files.py), before anything is touched.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ktransformers import devices as device_names
from ktransformers.errors import RuleError, did_you_mean, join_errors
from ktransformers.models.former_names import former_names
from ktransformers.models.traits import TRAITS
from ktransformers.rules import classes
from ktransformers.rules.files import Reporter, Rule, RuleFile, RulesLike, count, load_rules, packaged_rules, read_rules
from ktransformers.rules.layers import LAYER, Placed, place

__all__ = ["Replacement", "Rule", "RuleFile", "RulesLike", "load_rules", "module_pattern", "packaged_rules", "plan"]


@dataclass(frozen=True)
class Replacement:
    """What becomes of one module. `operator` None keeps the module; its own parameters live on `device`."""

    key: str
    rule: Rule | None
    operator: type | None
    kwargs: Mapping[str, Any]
    device: str


def plan(
    model: nn.Module,
    rules: RulesLike,
    *,
    default_device: str | None = None,
    devices: Mapping[str, str] | None = None,
    weights: Any = None,
    gpus: int | None = None,
) -> dict[str, Replacement]:
    """Say what becomes of every module of `model`, without touching it. Needs no weights.

    Args:
        model: usually on the meta device; the root itself is never replaced.
        rules: what `load_rules` takes.
        default_device: of modules no rule names; None is where their layer lives for rules with `devices`, else
            ``cuda:0`` where there is a GPU, else ``cpu``.
        devices: renames devices in the rules, such as ``{"cuda": "cpu"}``.
        weights: bound weights (`ktransformers.loaders.bind`), so that operators can also check quantization types.
        gpus: how many GPUs to plan for, whether they are here or not; None is those that are here and those that
            `devices` renames.

    Returns:
        ``{module name: Replacement}`` for every module reached, in depth-first order.

    Raises:
        RuleError: unreadable or malformed rules, kwargs, operators or devices that do not fit, rules that match no
            module; all of them at once, with file and line.
    """
    with device_names.pretended(gpus):
        return _plan(model, rules, default_device, devices, weights)


def _plan(model: nn.Module, rules: RulesLike, default_device: str | None, devices: Any, weights: Any) -> dict:
    file, problems = read_rules(rules)
    placed = None
    if file.devices is not None:
        placed, wrong = place(file.devices, model, device_names.gpu_count(devices))
        wrong += device_names.problems_of({d: device_names.map_device(d, devices) for d in file.devices.named()})
        problems += [f"{file.label}: devices: {problem}" for problem in wrong]
    if default_device is None:
        default_device = LAYER if placed else device_names.default_device()
    if default_device != LAYER:
        default_device = str(device_names.map_device(default_device, devices))
        problems += device_names.problems_of({"default_device": default_device})
    walk = _Walk([rule for rule in file if rule.matchable], default_device, devices, former_names(model), placed)
    walk.visit("", model)
    walk.join_devices(model)
    problems += walk.problems(model)
    problems += operator_problems(model, walk.plan, weights)
    if problems:
        headline = f"{file.label} for {type(model).__name__}: {count(problems)}, nothing was changed:"
        raise join_errors(RuleError, headline, problems)
    for text in walk.idle(model):
        warnings.warn(text, stacklevel=3)
    return walk.plan


class _Walk:
    """The depth-first walk: `plan` in the order of visiting, and which conditions of which rule held where."""

    def __init__(
        self,
        rules: list[Rule],
        default_device: str,
        devices: Mapping[str, str] | None,
        former: Mapping[str, Sequence[str]],
        placed: Placed | None,
    ):
        self.rules, self.default_device, self.devices, self.former = rules, default_device, devices, former
        self.placed = placed
        self.plan: dict[str, Replacement] = {}
        self.wins = {rule.number: 0 for rule in rules}
        self.losses: dict[int, list[int]] = {rule.number: [] for rule in rules}
        self.of_other_layers: dict[int, str] = {}

    def visit(self, name: str, module: nn.Module) -> None:
        matching = self._matching(name, module)
        first = matching[0] if matching else None
        if name:
            self.plan[name] = self._replacement(name, first)
            for rule in matching[:1]:
                self.wins[rule.number] += 1
            for rule in matching[1:]:
                self.losses[rule.number].append(first.number)
        if first is not None and not first.recursive:
            return
        if name and not getattr(self.plan[name].operator, "adopts", True):
            return  # the operator keeps none of the module's children, so there is nothing below it to replace
        for child_name, child in module.named_children():
            self.visit(f"{name}.{child_name}" if name else child_name, child)

    def _matching(self, name: str, module: nn.Module) -> list[Rule]:
        """The rules that match, best first. Of a module that many layers had a copy of, the first layer's decide."""
        former = self.former.get(name, ())
        matching = [rule for rule in self.rules if not rule.failed_conditions(name, module, former[:1])]
        others = [rule for rule in self.rules if not rule.failed_conditions(name, module, former[1:])] if former else []
        self.of_other_layers.update((rule.number, name) for rule in others if matching and rule not in matching)
        return matching or others

    def _replacement(self, name: str, rule: Rule | None) -> Replacement:
        operator = rule.operator if rule else None
        kwargs = dict(rule.kwargs) if rule else {}
        default = (rule and rule.device) or self.default_device
        if operator is None and "generate_device" in kwargs:
            kwargs.setdefault("prefill_device", kwargs["generate_device"])
        for key in classes.device_parameters(operator) if operator else ("generate_device", "prefill_device"):
            if kwargs.get(key) is None:
                kwargs[key] = default
        kwargs = device_names.map_kwargs(self._where_layers_are(name, operator, kwargs), self.devices)
        device = kwargs.get("generate_device") or kwargs.get("device") or kwargs.get("prefill_device")
        if not device:
            device = self._where_layers_are(name, None, {"device": default})["device"]
            device = device_names.map_device(device, self.devices)
        return Replacement(name, rule, operator, kwargs, device)

    def _where_layers_are(self, name: str, operator: type | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`kwargs` with the device ``layer`` as the one that `name` lives on, and the transfers between layers."""
        if self.placed is None:
            return kwargs
        device = self.placed.device(name)
        kwargs = {k: device if v == LAYER and k in device_names.DEVICE_KWARGS else v for k, v in kwargs.items()}
        if operator is not None and "transfer_map" in classes.parameters(operator):
            kwargs.setdefault("transfer_map", self.placed.transfer_map)
        return kwargs

    def join_devices(self, model: nn.Module) -> None:
        """Give a decoder that no rule takes the operator that moves what flows, where its parts are on several devices.

        Files for upstream may have no rule for it: there the program that generated moved the embeddings by hand.
        """
        from ktransformers.operators.models import DecoderModel

        for name, placed in list(self.plan.items()):
            if placed.operator is None and TRAITS["decoder"](module := model.get_submodule(name)):
                flows = [n for n, m in module.named_modules() if TRAITS["norm"](m) or TRAITS["embedding"](m)]
                found = [self.plan[key] for n in flows if (key := f"{name}.{n}") in self.plan]
                devices = {device_names.canonical(flow.device) for flow in found}
                if len(devices) > 1 and not DecoderModel.check(name, module, {}):
                    kwargs = dict.fromkeys(("generate_device", "prefill_device"), placed.device)
                    self.plan[name] = Replacement(name, placed.rule, DecoderModel, kwargs, placed.device)

    def problems(self, model: nn.Module) -> list[str]:
        found = []
        for rule in self.rules:
            report = Reporter(rule.where, rule.number, found)
            for problem in device_names.kwargs_problems(self._named_devices(rule)):
                report(problem)
            if rule.expect is not None and rule.expect != self.wins[rule.number]:
                lost = self.losses[rule.number]
                by = f"; earlier rules ({', '.join(map(str, sorted(set(lost))))}) took {len(lost)}" if lost else ""
                report(
                    f"expect: takes {self.wins[rule.number]} modules, expected {rule.expect}{by}. Correct the match, "
                    "or the number"
                )
            elif rule in self.unmatched and not self._is_forgiven(rule, model):
                report(_why_no_match(rule, model, self))
        return found

    def _named_devices(self, rule: Rule) -> dict[str, Any]:
        """The rule's kwargs as far as they can be wrong about devices: ``layer`` is right where layers have devices."""
        named = {**rule.kwargs, **({"device": rule.device} if rule.device else {})}
        if self.placed is not None:
            named = {key: value for key, value in named.items() if value != LAYER}
        return device_names.map_kwargs(named, self.devices)

    @functools.cached_property
    def unmatched(self) -> list[Rule]:
        """Rules that hold for no module, whoever takes it. Ask after the walk."""
        matched = [self.wins, self.losses, self.of_other_layers]
        return [rule for rule in self.rules if not any(table.get(rule.number) for table in matched)]

    def _is_forgiven(self, rule: Rule, model: nn.Module) -> bool:
        """Whether a rule without a match is only told of.

        So in a file of upstream's published style that is for this family: such files have rules that never matched
        (a class of another family; a layer's name with a class that no layer is), and upstream said nothing.
        """
        its_file_fits = any(other.names_family_of(model) and other not in self.unmatched for other in self.rules)
        names = [name for name, _ in model.named_modules() if name]
        return its_file_fits and rule.cls is not None and (rule.name is None or any(map(rule.name.search, names)))

    def idle(self, model: nn.Module) -> list[str]:
        """What to say of rules that decide nothing, and yet are no mistake."""
        unmatched = [f"{r.where}: rule {r.number} {_why_no_match(r, model, self)}" for r in self.unmatched]
        shared = [
            f"{rule.where}: rule {rule.number} places nothing: all layers share {self.of_other_layers[rule.number]} "
            "now, and the rule for the first layer's has it. The file works as it is."
            for rule in self.rules
            if rule.number in self.of_other_layers and not self.wins[rule.number] and not self.losses[rule.number]
        ]
        return unmatched + shared + [
            f"{rule.where}: rule {rule.number} never wins: all {len(self.losses[rule.number])} modules it matches are "
            f"taken by earlier rules ({', '.join(str(n) for n in sorted(set(self.losses[rule.number])))}). "
            "Move it up, or delete it."
            for rule in self.rules
            if not self.wins[rule.number] and self.losses[rule.number]
        ]


def _why_no_match(rule: Rule, model: nn.Module, walk: _Walk) -> str:
    """Explain a rule without matches by how far each of its conditions gets alone."""
    conditions = {
        "name": rule.name and f"name {rule.name.pattern!r}",
        "class": rule.cls and f"class {rule.cls.__module__}.{rule.cls.__qualname__}",
        "trait": rule.trait and f"trait {rule.trait!r}",
    }
    counts = {key: 0 for key, text in conditions.items() if text}
    hidden = 0
    for name, module in model.named_modules():
        if name == "":
            continue
        failed = rule.failed_conditions(name, module, walk.former.get(name, ()))
        hidden += not failed and name not in walk.plan
        for key in counts:
            counts[key] += key not in failed
    if not rule.recursive and not rule.failed_conditions("", model):
        return (
            "matches the model itself first (its name is empty), and recursive: False stops there; write '.+' for '.*'"
        )
    if hidden:
        return (
            f"matches {hidden} modules, but all lie below a module that an earlier rule took with recursive: False "
            "or replaced whole. Move this rule up, or delete it"
        )
    parts = ", ".join(f"{conditions[key]} matches {count}" for key, count in counts.items())
    return (
        f"matches no module of {type(model).__name__} ({parts}). Correct or delete it; `print(model)` shows the modules"
        f"{_closest_class(rule, model) if counts.get('class') == 0 else ''}"
    )


def _closest_class(rule: Rule, model: nn.Module) -> str:
    """For a class that no module of the model is: the one with the closest name that some module is."""
    there = {cls.__name__: f"{cls.__module__}.{cls.__qualname__}" for cls in map(type, model.modules())}
    return did_you_mean(rule.cls.__name__, there, there)


def operator_problems(model: nn.Module, replacements: Mapping[str, Replacement], weights: Any) -> list[str]:
    """Ask every operator about its module; the same complaint about many layers becomes one line."""
    seen: dict[tuple[int, str], list[str]] = {}
    for key, replacement in replacements.items():
        check = getattr(replacement.operator, "check", None)
        if check is None:
            continue
        for text in check(key, model.get_submodule(key), dict(replacement.kwargs), weights):
            pattern = text.replace(key, module_pattern(key))
            seen.setdefault((replacement.rule.number, pattern), []).append(key)
    problems: list[str] = []
    for (number, text), keys in seen.items():
        rule = replacements[keys[0]].rule
        many = f" ({len(keys)} modules)" if len(keys) > 1 else ""
        Reporter(rule.where, number, problems)(
            f"{module_pattern(keys[0]) if len(keys) > 1 else keys[0]}: {text}{many}"
        )
    return problems


def module_pattern(name: str) -> str:
    """``model.layers.3.mlp`` -> ``model.layers.*.mlp``: the same module of every layer."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
