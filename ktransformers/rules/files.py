"""Rule files: YAML -> a `RuleFile` of `Rule`s. What the rules do to a model is rules.py's.

Two forms. Classic: a YAML list of rules, upstream's. Extended: a mapping with `devices`, which says once where layers
live (layers.py), `variables`, and the same list as `rules`. Every problem of a file is found and listed at once, with
file and line. The language is documented for users in `optimize_rules/README.md`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ktransformers.errors import RuleError, did_you_mean, join_errors
from ktransformers.models.traits import TRAITS
from ktransformers.optimize_rules import NAMES
from ktransformers.rules import classes
from ktransformers.rules.layers import LAYER, Devices, parse_devices

FILE_KEYS = ("devices", "variables", "rules")
RULE_KEYS = ("match", "replace", "recursive", "expect")
MATCH_KEYS = ("name", "class", "trait")
REPLACE_KEYS = ("class", "kwargs")
EXTENDED_REPLACE_KEYS = (*REPLACE_KEYS, "device")


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
    device: str | None = None
    """Where the rule puts all that no kwarg puts elsewhere."""
    recursive: bool = True
    expect: int | None = None
    """How many modules the rule must take."""
    published: bool = False
    """Whether it matches on one of upstream's class names, as the rule files do that upstream published."""
    matchable: bool = True
    """False when the match part could not be understood; such a rule takes part in nothing but the list of problems."""

    def names_family_of(self, model: nn.Module) -> bool:
        """Whether it is of the style that upstream published for the model's family, and so in a file for that.

        It then matches on one of the family's classes, or names an operator after it: KQwen3MoeSparseMoeBlock.
        """
        family = type(model).__name__.partition("For")[0]
        return self.published or (self.operator is not None and self.operator.__name__.startswith(f"K{family}"))

    def failed_conditions(self, name: str, module: nn.Module, former: Sequence[str] = ()) -> list[str]:
        """Return the match keys that do not hold for the module, so an empty list is a match.

        `former`: names the module had (`ktransformers.models.former_names`); the rule may mean any of them.
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
class RuleFile(Sequence[Rule]):
    """The rules of one file, in order. `devices` is None in the classic form."""

    label: str
    rules: tuple[Rule, ...]
    devices: Devices | None = None

    def __len__(self) -> int:
        return len(self.rules)

    def __getitem__(self, index: Any) -> Any:
        return self.rules[index]

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)


RulesLike = str | Path | Mapping[str, Any] | Sequence[Any]
"""A path, the name of packaged rules, or what YAML makes of a file: a list, or a mapping in the extended form."""


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


def load_rules(rule: RulesLike) -> "RuleFile":
    """Read rules from a path, from the name of a packaged file, or from what YAML makes of one.

    Raises:
        RuleError: the file is missing or no YAML, or any rule in it is malformed; all problems at once.
    """
    file, problems = read_rules(rule)
    if problems:
        raise join_errors(RuleError, f"{file.label}: {count(problems)}, nothing was changed:", problems)
    return file


def read_rules(rule: RulesLike) -> tuple["RuleFile", list[str]]:
    """The rules of a file as far as they can be understood, and what is wrong with them."""
    if isinstance(rule, RuleFile):
        return rule, []
    if isinstance(rule, (str, Path)):
        label, content = _read_file(rule)
    else:
        label, content = "rules", list(rule) if isinstance(rule, Sequence) and not isinstance(rule, bytes) else rule
    problems: list[str] = []
    if isinstance(content, Mapping) and any(key in FILE_KEYS for key in content):
        devices, items = _read_extended(content, label, problems)
    else:
        devices, items = None, content
    if isinstance(items, list) and items and all(isinstance(item, Rule) for item in items):
        rules = [replace(item, number=number) for number, item in enumerate(items, 1)]
        return RuleFile(label, tuple(rules), devices), problems
    if not isinstance(items, list) or not items:
        if problems:
            raise join_errors(RuleError, f"{label}: {count(problems)}, nothing was changed:", problems)
        found = "nothing" if items in (None, []) else classes.type_name(items)
        raise RuleError(
            f"{label}: found {found}, expected a YAML list of rules, each with match and replace, or a mapping with "
            f"{', '.join(FILE_KEYS)}"
        )
    keys = EXTENDED_REPLACE_KEYS if isinstance(content, Mapping) else REPLACE_KEYS
    rules = [_parse_rule(item, number, label, keys, problems) for number, item in enumerate(items, 1)]
    return RuleFile(label, tuple(rules), devices), problems


def _read_extended(content: Mapping[str, Any], label: str, problems: list[str]) -> tuple[Devices | None, Any]:
    """The extended form: its devices, and its rules with their variables filled in."""
    for key in content:
        if key not in FILE_KEYS:
            hint = did_you_mean(key, FILE_KEYS)
            problems.append(f"{label}: unknown key {key!r}{hint}; known: {', '.join(FILE_KEYS)}")
    variables = content.get("variables") or {}
    if not isinstance(variables, dict) or any(isinstance(value, (dict, list)) for value in variables.values()):
        problems.append(f"{label}: variables: expected a mapping from names to texts, numbers or true/false")
        variables = {}
    used: set[str] = set()
    filled = {key: _fill(content.get(key), variables, used, label, problems) for key in ("devices", "rules")}
    problems += [f"{label}: variable {name!r} is used nowhere; use or delete it" for name in variables.keys() - used]
    if "rules" not in content:
        problems.append(f"{label}: has no 'rules', the list of rules")
    if "devices" not in content:
        return None, filled["rules"]
    where = f"{label}:{filled['devices'].line}" if isinstance(filled["devices"], _Mapping) else label
    devices, wrong = parse_devices(filled["devices"])
    problems += [f"{where}: devices: {problem}" for problem in wrong]
    return devices, filled["rules"]


_VARIABLE = re.compile(r"\$\{([^{}]*)\}")


def _fill(value: Any, variables: Mapping[str, Any], used: set[str], label: str, problems: list[str]) -> Any:
    """`value` with every ``${name}`` in it filled in; a text that is one name alone becomes what it stands for."""

    def known(name: str) -> Any:
        used.add(name)
        if name not in variables:
            hint = did_you_mean(name, variables)
            there = ", ".join(map(str, variables)) or "none"
            problems.append(f"{label}: variable {name!r} unknown{hint}; known: {there}")
        return variables.get(name, "")

    if isinstance(value, str):
        alone = _VARIABLE.fullmatch(value)
        return known(alone[1]) if alone else _VARIABLE.sub(lambda found: str(known(found[1])), value)
    if isinstance(value, list):
        return [_fill(item, variables, used, label, problems) for item in value]
    if isinstance(value, dict):
        filled = _Mapping()
        filled.line = getattr(value, "line", 0)
        for key, item in value.items():
            filled[_fill(key, variables, used, label, problems)] = _fill(item, variables, used, label, problems)
        return filled
    return value


def count(problems: list[str]) -> str:
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


def _parse_rule(item: Any, number: int, label: str, replace_keys: Sequence[str], problems: list[str]) -> Rule:
    where = f"{label}:{item.line}" if getattr(item, "line", 0) else f"rule {number}"
    report = Reporter(where, number, problems)
    if not isinstance(item, dict):
        report(f"found {classes.type_name(item)}, expected a mapping with match and replace")
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
    becomes = report.section(item, "replace", replace_keys) or {}
    kwargs = becomes.get("kwargs") or {}
    if not isinstance(kwargs, dict):
        report(f"replace.kwargs: found {classes.type_name(kwargs)}, expected a mapping")
        kwargs = {}
    recursive, expect, device = item.get("recursive", True), item.get("expect"), becomes.get("device")
    if not isinstance(recursive, bool):
        report(f"recursive: found {recursive!r}, expected true or false (without quotes)")
    if expect is not None and (not isinstance(expect, int) or isinstance(expect, bool) or expect < 0):
        report(f"expect: found {expect!r}, expected how many modules the rule takes, such as 61")
        expect = None
    if device is not None and not isinstance(device, str):
        report(f"replace.device: found {classes.type_name(device)}, expected a name such as 'cpu' or {LAYER!r}")
        device = None
    return Rule(
        number=number,
        where=where,
        **conditions,
        published=str(match.get("class")).startswith("ktransformers.models."),
        matchable=matchable,
        operator=report.operator(becomes.get("class", "default"), kwargs),
        kwargs=kwargs,
        device=device,
        recursive=recursive is not False,
        expect=expect,
    )


@dataclass
class Reporter:
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
            self(f"{key}: found {classes.type_name(item[key])}, expected a mapping with {', '.join(known)}")
            return None
        self.unknown_keys(f"{key}: ", item[key], known)
        return item[key]

    def pattern(self, match: dict) -> re.Pattern | None:
        if "name" not in match:
            return None
        name = match["name"]
        if not isinstance(name, (str, re.Pattern)) or isinstance(getattr(name, "pattern", ""), bytes):
            self(f"match.name: found {classes.type_name(name)}, expected a regular expression in quotes")
            return None
        try:
            return re.compile(name)
        except (re.error, OverflowError, RecursionError) as error:
            self(f"match.name: {str(name)[:200]!r} is no regular expression: {error}")
        return None

    def cls(self, key: str, dotted: Any) -> type | None:
        if not isinstance(dotted, str):
            self(f"{key}: found {classes.type_name(dotted)}, expected a dotted path such as torch.nn.Linear")
            return None
        found, problem = classes.find_class(dotted)
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
        if not classes.is_operator(operator):
            self(
                f"replace.class: {dotted} is no operator; expected a subclass of "
                "ktransformers.operators.base_operator.BaseInjectedModule, or 'default'. Names such as KLinearTorch or "
                "KExpertsCPU go into generate_op of KTransformersLinear and KTransformersExperts"
            )
            return None
        for problem in classes.kwargs_problems(operator, kwargs):
            self(problem)
        return operator
