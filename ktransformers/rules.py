"""Rules: YAML -> list of `Rule` -> `{module name: Replacement}`. Nothing here builds operators or reads weights.

The language is upstream's, documented for users in `optimize_rules/README.md`: depth-first over the model, the first
rule that matches a module wins, `match.name` is `re.search` on the dotted path, `match.class` is isinstance, both
together mean and, `recursive: False` stops the walk below a match, the class "default" only places. On top of it
every problem of a file is found and listed at once, with file and line, before anything is touched.
"""

import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ktransformers import devices as device_names
from ktransformers import resolve
from ktransformers.errors import RuleError, did_you_mean, join_errors
from ktransformers.former import former_names
from ktransformers.optimize_rules import NAMES
from ktransformers.traits import TRAITS

RULE_KEYS = ("match", "replace", "recursive")
MATCH_KEYS = ("name", "class", "trait")
REPLACE_KEYS = ("class", "kwargs")
RulesLike = str | Path | Sequence[Any]


@dataclass(frozen=True)
class Rule:
    """One rule. `where` is ``file:line`` or ``rule N``; `operator` None stands for "default"."""

    number: int
    where: str
    name: re.Pattern | None = None
    cls: type | None = None
    trait: str | None = None
    operator: type | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    recursive: bool = True
    published: bool = False
    """Whether it matches on one of upstream's class names, as the rule files do that upstream published."""
    matchable: bool = True
    """False when the match part could not be understood; such a rule takes part in nothing but the list of problems."""

    def failed_conditions(self, name: str, module: nn.Module, former: Sequence[str] = ()) -> list[str]:
        """Return the match keys that do not hold for the module, so an empty list is a match.

        `former`: names the module had (`ktransformers.former`); the rule may mean any of them.
        """
        failed = []
        if self.name is not None and not any(self.name.search(known) for known in (name, *former)):
            failed.append("name")
        if self.cls is not None and not isinstance(module, self.cls):
            failed.append("class")
        if self.trait is not None and not TRAITS[self.trait](module):
            failed.append("trait")
        return failed


@dataclass(frozen=True)
class Replacement:
    """What becomes of one module. `operator` None keeps the module; its own parameters live on `device`."""

    key: str
    rule: Rule | None
    operator: type | None
    kwargs: Mapping[str, Any]
    device: str


# ---------------------------------------------------------------------------------------------------------------------
# YAML -> rules
# ---------------------------------------------------------------------------------------------------------------------


class _Mapping(dict):
    """A YAML mapping that remembers the line it starts on."""

    line = 0


class _Loader(yaml.SafeLoader):
    """SafeLoader whose mappings carry line numbers and whose repeated keys are errors (plain YAML drops them)."""

    def construct_marked(self, node: yaml.MappingNode) -> _Mapping:
        self._refuse_repeated_keys(node)
        self.flatten_mapping(node)  # merge keys: "<<: *anchor"
        mapping = _Mapping()
        mapping.line = node.start_mark.line + 1
        for key_node, value_node in node.value:
            mapping[self._key(key_node)] = self.construct_object(value_node, deep=True)
        return mapping

    def _refuse_repeated_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self._key(key_node)
            if (type(key), key) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add((type(key), key))

    def _key(self, node: yaml.Node) -> Any:
        key = self.construct_object(node, deep=True)
        if isinstance(key, (dict, list, set)):
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} cannot be a key", node.start_mark)
        return key


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_marked)


def packaged_rules() -> list[str]:
    """Names of the rules that ship with the package: of models, such as ``DeepSeek-V3``, and of the files for them."""
    folder = resources.files("ktransformers.optimize_rules")
    files = [path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml")]
    return sorted({*NAMES, *files})


def load_rules(rule: RulesLike) -> list[Rule]:
    """Read rules from a path, from the name of a packaged file, or from the parsed list.

    Raises:
        RuleError: the file is missing or no YAML, or any rule in it is malformed; all problems at once.
    """
    label, rules, problems = _read_rules(rule)
    if problems:
        raise join_errors(RuleError, f"{label}: {_count(problems)}, nothing was changed:", problems)
    return rules


def _read_rules(rule: RulesLike) -> tuple[str, list[Rule], list[str]]:
    """What to call the source, its rules as far as they can be understood, and what is wrong with them."""
    if isinstance(rule, (str, Path)):
        label, items = _read_file(rule)
    else:
        label, items = "rules", list(rule) if isinstance(rule, Sequence) and not isinstance(rule, bytes) else rule
    if isinstance(items, list) and items and all(isinstance(item, Rule) for item in items):
        return label, [replace(item, number=number) for number, item in enumerate(items, 1)], []
    if not isinstance(items, list) or not items:
        found = "nothing" if items in (None, []) else resolve.type_name(items)
        raise RuleError(f"{label}: found {found}, expected a YAML list of rules, each with match and replace")
    problems: list[str] = []
    return label, [_parse_rule(item, number, label, problems) for number, item in enumerate(items, 1)], problems


def _count(problems: list[str]) -> str:
    return "1 problem" if len(problems) == 1 else f"{len(problems)} problems"


def _read_file(rule: str | Path) -> tuple[str, Any]:
    try:
        path = Path(rule).expanduser()
        path.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, the home of nobody
        raise RuleError(
            f"rule file {str(rule)[:80]!r}: cannot be looked up: {error.args[-1]}. Check the path."
        ) from error
    if path.is_dir():
        raise RuleError(f"rule file {rule}: is a folder, expected a YAML file or one of {', '.join(packaged_rules())}")
    if not path.is_file():
        packaged = packaged_rules()
        stem = str(rule).removesuffix(".yaml")
        if stem not in packaged:
            raise RuleError(
                f"rule file {str(rule)!r}: no such file and no packaged rule{did_you_mean(stem, packaged)}. "
                f"Packaged: {', '.join(packaged)}"
            )
        path = Path(str(resources.files("ktransformers.optimize_rules") / f"{NAMES.get(stem, stem)}.yaml"))
    try:
        return path.name, yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise RuleError(f"rule file {path}: cannot be read: {error}") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:  # what PyYAML lets through from bad scalars
        raise RuleError(
            f"{path.name}: not valid YAML: {str(error)[:200] or type(error).__name__}. Simplify the file."
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path.name}:{mark.line + 1}" if mark else path.name
        reason = getattr(error, "problem", None) or str(error)
        raise RuleError(f"{where}: not valid YAML: {reason}. Check the indentation and the quotes there.") from error


def _parse_rule(item: Any, number: int, label: str, problems: list[str]) -> Rule:
    where = f"{label}:{item.line}" if isinstance(item, _Mapping) else f"rule {number}"
    report = _Reporter(where, number, problems)
    if not isinstance(item, dict):
        report(f"found {resolve.type_name(item)}, expected a mapping with match and replace")
        return Rule(number, where, matchable=False)
    report.unknown_keys("", item, RULE_KEYS)
    before = len(problems)
    match = report.section(item, "match", MATCH_KEYS)
    if match is not None and not any(key in match for key in MATCH_KEYS):
        report("match: is empty; expected name (a regular expression), class, or trait")
    match = match or {}
    conditions = {
        "name": report.pattern(match),
        "cls": report.cls("match.class", match["class"]) if "class" in match else None,
        "trait": report.trait(match),
    }
    matchable = len(problems) == before
    becomes = report.section(item, "replace", REPLACE_KEYS) or {}
    kwargs = becomes.get("kwargs") or {}
    if not isinstance(kwargs, dict):
        report(f"replace.kwargs: found {resolve.type_name(kwargs)}, expected a mapping")
        kwargs = {}
    recursive = item.get("recursive", True)
    if not isinstance(recursive, bool):
        report(f"recursive: found {recursive!r}, expected true or false (without quotes)")
    return Rule(
        number=number,
        where=where,
        **conditions,
        published=str(match.get("class")).startswith("ktransformers.models."),
        matchable=matchable,
        operator=report.operator(becomes.get("class", "default"), kwargs),
        kwargs=kwargs,
        recursive=recursive is not False,
    )


@dataclass
class _Reporter:
    """Collects the problems of one rule, so that parsing goes on to the next one."""

    where: str
    number: int
    problems: list[str]

    def __call__(self, text: str) -> None:
        prefix = self.where if self.where.startswith("rule ") else f"{self.where} (rule {self.number})"
        self.problems.append(f"{prefix}: {text}")

    def unknown_keys(self, section: str, mapping: dict, known: Sequence[str]) -> None:
        for key in mapping:
            if key not in known:
                self(f"{section}unknown key {key!r}{did_you_mean(key, known)}; known: {', '.join(known)}")

    def section(self, item: dict, key: str, known: Sequence[str]) -> dict | None:
        if key not in item:
            self(f"has no {key!r}; every rule needs match and replace")
            return None
        if not isinstance(item[key], dict):
            self(f"{key}: found {resolve.type_name(item[key])}, expected a mapping with {', '.join(known)}")
            return None
        self.unknown_keys(f"{key}: ", item[key], known)
        return item[key]

    def pattern(self, match: dict) -> re.Pattern | None:
        if "name" not in match:
            return None
        name = match["name"]
        if not isinstance(name, (str, re.Pattern)) or isinstance(getattr(name, "pattern", ""), bytes):
            self(f"match.name: found {resolve.type_name(name)}, expected a regular expression in quotes")
            return None
        try:
            return re.compile(name)
        except (re.error, OverflowError, RecursionError) as error:
            self(f"match.name: {str(name)[:200]!r} is no regular expression: {error}")
        return None

    def cls(self, key: str, dotted: Any) -> type | None:
        if not isinstance(dotted, str):
            self(f"{key}: found {resolve.type_name(dotted)}, expected a dotted path such as torch.nn.Linear")
            return None
        found, problem = resolve.find_class(dotted)
        if problem:
            self(f"{key}: {problem}")
        return found

    def trait(self, match: dict) -> str | None:
        trait = match.get("trait")
        if "trait" not in match or isinstance(trait, str) and trait in TRAITS:
            return trait
        self(f"match.trait: {trait!r} unknown{did_you_mean(str(trait), TRAITS)}; known: {', '.join(TRAITS)}")
        return None

    def operator(self, dotted: Any, kwargs: dict) -> type | None:
        if dotted == "default":
            known = dict.fromkeys(("generate_device", "prefill_device"))
            for key in kwargs:
                if key not in known:
                    self(
                        f"kwarg {key!r} has no meaning for class 'default'{did_you_mean(key, known)}; "
                        f"it takes: {', '.join(known)}"
                    )
            return None
        operator = self.cls("replace.class", dotted)
        if operator is None:
            return None
        if not resolve.is_operator(operator):
            self(
                f"replace.class: {dotted} is no operator; expected a subclass of "
                "ktransformers.operators.base_operator.BaseInjectedModule, or 'default'. Names such as KLinearTorch or "
                "KExpertsCPU go into generate_op of KTransformersLinear and KTransformersExperts"
            )
            return None
        for problem in resolve.kwargs_problems(operator, kwargs):
            self(problem)
        return operator


# ---------------------------------------------------------------------------------------------------------------------
# rules -> plan
# ---------------------------------------------------------------------------------------------------------------------


def plan(
    model: nn.Module,
    rules: RulesLike,
    *,
    default_device: str | None = None,
    devices: Mapping[str, str] | None = None,
    weights: Any = None,
) -> dict[str, Replacement]:
    """Say what becomes of every module of `model`, without touching it. Needs no weights.

    Args:
        model: usually on the meta device; the root itself is never replaced.
        rules: what `load_rules` takes.
        default_device: of modules no rule names; None is ``cuda:0`` where there is a GPU, else ``cpu``.
        devices: renames devices in the rules, such as ``{"cuda": "cpu"}``.
        weights: bound weights (`ktransformers.loaders.bind`), so that operators can also check quantization types.

    Returns:
        ``{module name: Replacement}`` for every module reached, in depth-first order.

    Raises:
        RuleError: unreadable or malformed rules, kwargs, operators or devices that do not fit, rules that match no
            module; all of them at once, with file and line.
    """
    label, parsed, problems = _read_rules(rules)
    default_device = device_names.map_device(default_device or device_names.default_device(), devices)
    walk = _Walk([rule for rule in parsed if rule.matchable], str(default_device), devices, former_names(model))
    walk.visit("", model)
    problems += walk.problems(model)
    problems += operator_problems(model, walk.plan, weights)
    if problem := device_names.device_problem(default_device):
        problems.append(f"default_device: {problem}")
    if problems:
        headline = f"{label} for {type(model).__name__}: {_count(problems)}, nothing was changed:"
        raise join_errors(RuleError, headline, problems)
    for text in walk.idle(model):
        warnings.warn(text, stacklevel=2)
    return walk.plan


class _Walk:
    """The depth-first walk: `plan` in the order of visiting, and which conditions of which rule held where."""

    def __init__(
        self,
        rules: list[Rule],
        default_device: str,
        devices: Mapping[str, str] | None,
        former: Mapping[str, Sequence[str]],
    ):
        self.rules, self.default_device, self.devices, self.former = rules, default_device, devices, former
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
        kwargs = device_names.map_kwargs(rule.kwargs, self.devices) if rule else {}
        operator = rule.operator if rule else None
        if operator is None and "generate_device" in kwargs:
            kwargs.setdefault("prefill_device", kwargs["generate_device"])
        for key in resolve.device_parameters(operator) if operator else ("generate_device", "prefill_device"):
            if kwargs.get(key) is None:
                kwargs[key] = self.default_device
        device = (
            kwargs.get("generate_device") or kwargs.get("device") or kwargs.get("prefill_device") or self.default_device
        )
        return Replacement(name, rule, operator, kwargs, device)

    def problems(self, model: nn.Module) -> list[str]:
        found = []
        for rule in self.rules:
            report = _Reporter(rule.where, rule.number, found)
            for problem in device_names.kwargs_problems(device_names.map_kwargs(rule.kwargs, self.devices)):
                report(problem)
            if rule in self.unmatched and not self._is_forgiven(rule, model):
                report(_why_no_match(rule, model, self))
        return found

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
        its_file_fits = any(other.published and other not in self.unmatched for other in self.rules)
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
        f"{_closest_class(rule, model)}"
    )


def _closest_class(rule: Rule, model: nn.Module) -> str:
    if rule.cls is None:
        return ""
    return did_you_mean(rule.cls.__name__, sorted({type(module).__name__ for module in model.modules()}))


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
        _Reporter(rule.where, number, problems)(
            f"{module_pattern(keys[0]) if len(keys) > 1 else keys[0]}: {text}{many}"
        )
    return problems


def module_pattern(name: str) -> str:
    """``model.layers.3.mlp`` -> ``model.layers.*.mlp``: the same module of every layer."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
