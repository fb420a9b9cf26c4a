"""Rules meet a model: `plan` says what becomes of every module. Nothing here builds operators or reads weights.

The language is upstream's: depth-first over the model, the first rule that matches a module wins, `match.name` is
`re.search` on the dotted path, `match.class` is isinstance, both together mean and, `recursive: False` stops the walk
below a match, the class "default" only places. On top of it every problem is found and listed at once, with file and
line (files.py), before anything is touched.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ktransformers import devices as device_names
from ktransformers import env
from ktransformers.errors import KTransformersError, did_you_mean
from ktransformers.models.traits import TRAITS
from ktransformers.operators import failures
from ktransformers.rules import classes
from ktransformers.rules.files import ANY, Rule, RuleFile, RulesLike, load_rules, packaged_rules, read_rules
from ktransformers.rules.findings import Finding, Keys, RuleWarning, rule_error
from ktransformers.rules.layers import LAYER, Placed, place
from ktransformers.rules.matching import Matching

if TYPE_CHECKING:
    from ktransformers.loaders import WeightSource

__all__ = ["Replacement", "Rule", "RuleFile", "RulesLike", "load_rules", "module_pattern", "packaged_rules", "plan"]


@dataclass(frozen=True)
class Replacement:
    """What becomes of one module. `operator` None keeps the module; its own parameters live on `device`."""

    key: str
    rule: Rule | None
    operator: type | None
    kwargs: Mapping[str, Any]
    device: str


def rule_label(placed: Rule | Replacement | None) -> str:
    """A rule, or the one that placed a module, as "3 (x.yaml:12)"; "" where none did."""
    rule = placed.rule if isinstance(placed, Replacement) else placed
    if rule is None:
        return ""
    in_list = rule.where == f"rule {rule.number}"
    return f"{rule.number}" if in_list else f"{rule.number} ({Path(rule.where).name})"


def plan(
    model: nn.Module,
    rules: RulesLike,
    *,
    default_device: str | None = None,
    devices: Mapping[str, str] | None = None,
    weights: "WeightSource | None" = None,
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


def _plan(
    model: nn.Module, rules: RulesLike, default_device: str | None, devices: Any, weights: "WeightSource | None"
) -> dict[str, Replacement]:
    file, found = read_rules(rules)
    placed = _place(file, model, devices, found)
    if default_device is None:
        default_device = LAYER if placed else device_names.default_device()
    if default_device != LAYER:
        default_device = str(device_names.map_device(default_device, devices))
        wrong = device_names.problems_of({"default_device": default_device})
        found += [Finding("error", "", None, f"{what}: {problem}") for what, problem in wrong.items()]
    walk = _Walk(file, model, default_device, devices, placed)
    walk.visit("", model)
    walk.join_devices(model)
    walk.report(found)
    walk.report_operators(found, weights)
    if found:
        raise rule_error(f"{file.label} for {type(model).__name__}", found)
    absent = env.rule_modules_problem(next((Path(rule.where).parent for rule in file if rule.lines), None))
    for finding in [*walk.idle(), *([Finding("warning", "", None, absent)] if absent else [])]:
        warnings.warn(RuleWarning(finding), stacklevel=3)
    return walk.plan


def _place(file: RuleFile, model: nn.Module, devices: Any, found: list[Finding]) -> Placed | None:
    """Where the file's `devices` say that layers live; None without any. Adds to `found` what is wrong with them."""
    if file.devices is None:
        return None
    placed, wrong = place(file.devices, model, device_names.gpu_count(devices))
    named = {device: device_names.map_device(device, devices) for device in file.devices.named()}
    wrong += [(device, f"{device}: {problem}") for device, problem in device_names.problems_of(named).items()]
    for device, problem in wrong:
        found.append(Finding("error", file.at("devices", device), None, f"devices: {problem}"))
    return placed


class _Walk:
    """The depth-first walk: `plan` in the order of visiting, and which rules won and lost where."""

    def __init__(
        self,
        file: RuleFile,
        model: nn.Module,
        default_device: str,
        devices: Mapping[str, str] | None,
        placed: Placed | None,
    ):
        self.file, self.model, self.default_device, self.devices, self.placed = (
            file, model, default_device, devices, placed,
        )  # fmt: skip
        self.rules = [rule for rule in file if rule.matchable]
        self.matching = Matching(model)
        self.own = _by_module(self.rules, self.matching.own_names)
        self.later = _by_module(self.rules, self.matching.later_names) if self.matching.former else {}
        self.plan: dict[str, Replacement] = {}
        self.wins = {rule.number: 0 for rule in self.rules}
        self.losses: dict[int, list[int]] = {rule.number: [] for rule in self.rules}
        self.of_other_layers: dict[int, str] = {}

    def visit(self, name: str, module: nn.Module) -> None:
        matching = self._matching(name)
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

    def _matching(self, name: str) -> list[Rule]:
        """The rules that match, best first. Of a module that many layers had a copy of, the first layer's decide."""
        matching, others = self.own.get(name, []), self.later.get(name, [])
        if matching:
            own = {rule.number for rule in matching}
            self.of_other_layers.update((rule.number, name) for rule in others if rule.number not in own)
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

    # --- what is wrong, and what is idle ---

    def report(self, found: list[Finding]) -> None:
        """Add what is wrong with each rule alone: its devices, and how many modules it takes."""
        for rule in self.rules:
            report = rule.reporter(found)
            for key, problem in device_names.kwargs_problems(self._named_devices(rule)).items():
                keys = ("replace", *([] if key == "device" and rule.device else ["kwargs"]), key.partition("[")[0])
                if not report.has(*keys):  # else of the wrong type, or unknown
                    report(f"{key}: {problem}", *keys)
            if rule.expect == ANY:
                continue
            if rule.expect is not None and rule.expect != self.wins[rule.number]:
                if rule.number < self.uncertain:
                    report(self._unexpected(rule), "expect")
            elif rule.number in self.unmatched and not self._is_forgiven(rule):
                text, *keys = self._why_no_match(rule)
                report(text, *keys)

    def report_operators(self, found: list[Finding], weights: "WeightSource | None" = None) -> None:
        """Add what operators say of their modules; of a rule with a mistake in `replace` nothing can be said yet."""
        for rule, keys, text, modules in operator_complaints(self.model, self.plan, weights):
            report = rule.reporter(found)
            certain = rule.number < self.uncertain or len(modules) == self.wins[rule.number]
            if certain and not report.has("replace"):
                report(text, *keys)

    @functools.cached_property
    def uncertain(self) -> float:
        """The first rule that could not be understood, so that later rules take what it may have been meant for."""
        return next((rule.number for rule in self.file if not (rule.matchable and rule.replaceable)), float("inf"))

    def _unexpected(self, rule: Rule) -> str:
        lost = self.losses[rule.number]
        by = f"; earlier rules ({_numbers(lost)}) took {len(lost)}" if lost else ""
        return (
            f"expect: takes {self.wins[rule.number]} modules, expected {rule.expect}{by}. Correct the match, or the "
            "number"
        )

    def _named_devices(self, rule: Rule) -> dict[str, Any]:
        """The rule's kwargs as far as they can be wrong about devices: ``layer`` is right where layers have devices."""
        named = {**rule.kwargs, **({"device": rule.device} if rule.device else {})}
        if self.file.devices is not None:
            named = {key: value for key, value in named.items() if value != LAYER}
        return device_names.map_kwargs(named, self.devices)

    @functools.cached_property
    def unmatched(self) -> dict[int, Rule]:
        """Rules that hold for no module, whoever takes it. Ask after the walk."""
        matched = [self.wins, self.losses, self.of_other_layers]
        return {rule.number: rule for rule in self.rules if not any(table.get(rule.number) for table in matched)}

    def _is_forgiven(self, rule: Rule) -> bool:
        """Whether a rule without a match is only a warning.

        So in a file of upstream's published style that is for this family: such files have rules that never matched
        (a class of another family; a layer's name with a class that no layer is), and upstream said nothing.
        """
        if not self._is_for_this_family or rule.cls is None:
            return False
        return rule.name is None or bool(self.matching.conditions(rule)["name"] - {""})

    @functools.cached_property
    def _is_for_this_family(self) -> bool:
        return any(r.names_family_of(self.model) and r.number not in self.unmatched for r in self.rules)

    def idle(self) -> list[Finding]:
        """Warnings about rules that decide nothing, and yet are no mistake."""
        found: list[Finding] = []
        for rule in self.rules:
            report, number = rule.reporter(found, "warning"), rule.number
            if rule.expect == ANY:
                continue
            if number in self.unmatched:
                text, *keys = self._why_no_match(rule)
                report(text, *keys)
            elif not self.wins[number] and self.losses[number]:
                report(
                    f"never wins: all {len(self.losses[number])} modules it matches are taken by earlier rules "
                    f"({_numbers(self.losses[number])}). Move it up, or delete it."
                )
            elif not self.wins[number]:
                report(
                    f"places nothing: all layers share {self.of_other_layers[number]} now, and the rule for the first "
                    "layer's has it. The file works as it is."
                )
        return found

    def _why_no_match(self, rule: Rule) -> tuple[str, ...]:
        """Explain a rule without matches by how far each condition gets alone; and the keys that are at fault."""
        names = self.matching.names(rule)
        if not rule.recursive and "" in names:
            return (
                "matches the model itself first (its name is empty), and recursive: False stops there; write '.+' for "
                "'.*'",
                "match",
            )
        if hidden := len(names - self.plan.keys() - {""}):
            return (
                f"matches {hidden} modules, but all lie below a module that an earlier rule took with recursive: False "
                "or replaced whole. Move this rule up, or delete it",
                "match",
            )
        counts = {key: len(names - {""}) for key, names in self.matching.conditions(rule).items()}
        parts = ", ".join(f"{_condition(key, rule)} matches {count}" for key, count in counts.items())
        closest = self._closest_class(rule.cls) if counts.get("class") == 0 else ""
        text = (
            f"matches no module of {type(self.model).__name__} ({parts}). Correct or delete it; `print(model)` shows "
            f"the modules{closest}"
        )
        return text, "match", *[key for key, count in counts.items() if count == 0][:1]

    def _closest_class(self, cls: type) -> str:
        """For a class that no module of the model is: the one with the closest name that some module is."""
        if cls not in self._closest:
            self._closest[cls] = did_you_mean(cls.__name__, self._class_names, self._class_names)
        return self._closest[cls]

    @functools.cached_property
    def _closest(self) -> dict[type, str]:
        return {}

    @functools.cached_property
    def _class_names(self) -> dict[str, str]:
        """Class name -> dotted path, of the model's modules."""
        there = dict.fromkeys(map(type, self.matching.modules.values()))
        return {cls.__name__: f"{cls.__module__}.{cls.__qualname__}" for cls in there}


def _by_module(rules: Sequence[Rule], names: Callable[[Rule], Iterable[str]]) -> dict[str, list[Rule]]:
    """Module name -> the rules that match, in their order."""
    found: dict[str, list[Rule]] = {}
    for rule in rules:
        for name in names(rule):
            found.setdefault(name, []).append(rule)
    return found


def _numbers(rules: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(set(rules))))


def _condition(key: str, rule: Rule) -> str:
    if key == "name":
        return f"name {rule.name.pattern!r}"
    return f"class {rule.cls.__module__}.{rule.cls.__qualname__}" if key == "class" else f"trait {rule.trait!r}"


def operator_problems(
    model: nn.Module, replacements: Mapping[str, Replacement], weights: "WeightSource | None"
) -> list[Finding]:
    """Ask every operator about its module; the same complaint about many layers becomes one finding."""
    found: list[Finding] = []
    for rule, keys, text, _ in operator_complaints(model, replacements, weights):
        rule.reporter(found)(text, *keys)
    return found


def operator_complaints(
    model: nn.Module, replacements: Mapping[str, Replacement], weights: "WeightSource | None"
) -> Iterator[tuple[Rule, Keys, str, list[str]]]:
    """(rule, key of it that is at fault, what the operator says, modules) for each complaint of an operator."""
    seen: dict[tuple[int, str], list[str]] = {}
    for key, replacement in replacements.items():
        if not hasattr(replacement.operator, "check"):
            continue
        for text in _asked(replacement, model.get_submodule(key), weights):
            pattern = text.replace(key, module_pattern(key))
            seen.setdefault((replacement.rule.number, pattern), []).append(key)
    for (_, text), modules in seen.items():
        rule = replacements[modules[0]].rule
        kwarg = text.partition(":")[0]
        keys = ("replace", "kwargs", kwarg) if kwarg in rule.kwargs else ("replace", "class")
        many = f" ({len(modules)} modules)" if len(modules) > 1 else ""
        subject = module_pattern(modules[0]) if len(modules) > 1 else modules[0]
        yield rule, keys, f"{subject}: {text}{many}", modules


def _asked(replacement: Replacement, module: nn.Module, weights: "WeightSource | None") -> list[str]:
    """What the operator says about its module. Users' `check` may also return one text, or fail."""
    operator, key = replacement.operator, replacement.key
    try:
        said = operator.check(key, module, dict(replacement.kwargs), weights)
    except KTransformersError as error:
        return [str(error)]
    except Exception as error:
        return [failures.failure(error, operator, "check", "", "")]
    if isinstance(said, str):
        return [said] if said else []
    if isinstance(said, (list, tuple)) and all(isinstance(text, str) for text in said):
        return list(said)
    found = "nothing (None)" if said is None else repr(said)[:80]
    return [f"{operator.__name__}.check returned {found}, expected a list of problems, empty when there are none"]


def module_pattern(name: str) -> str:
    """``model.layers.3.mlp`` -> ``model.layers.*.mlp``: the same module of every layer."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
