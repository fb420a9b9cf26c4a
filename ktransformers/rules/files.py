"""Rule files: YAML -> a `RuleFile` of `Rule`s. What the rules do to a model is plan.py's.

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

from ktransformers.errors import RuleError, did_you_mean, is_whole
from ktransformers.models.traits import TRAITS
from ktransformers.optimize_rules import NAMES
from ktransformers.paths import existing_path
from ktransformers.rules import classes
from ktransformers.rules.findings import Finding, Keys, Reporter, place, rule_error, unknown_key
from ktransformers.rules.layers import LAYER, Devices, parse_devices

FILE_KEYS = ("devices", "variables", "rules")
RULE_KEYS = ("match", "replace", "recursive", "expect")
ANY = "any"
"""What `expect` says of a rule that may match nothing."""
MATCH_KEYS = ("name", "class", "trait")
REPLACE_KEYS = ("class", "kwargs")
EXTENDED_REPLACE_KEYS = (*REPLACE_KEYS, "device")


@dataclass(frozen=True, eq=False)
class Rule:
    """One rule. `where` is ``path:line`` or ``rule N``; `operator` None stands for "default"."""

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
    expect: int | str | None = None
    """How many modules the rule must take."""
    published: bool = False
    """Whether it matches on one of upstream's class names, as the rule files do that upstream published."""
    matchable: bool = True
    """False when the match part could not be understood; such a rule takes part in nothing but the list of problems."""
    replaceable: bool = True
    """False when the operator could not be understood."""
    lines: Mapping[Keys, int] = field(default_factory=dict)
    """The line of each key of the rule, where it comes from a file."""

    def names_family_of(self, model: nn.Module) -> bool:
        """Whether it is of the style that upstream published for the model's family, and so in a file for that.

        It then matches on one of the family's classes, or names an operator after it: KQwen3MoeSparseMoeBlock.
        """
        family = type(model).__name__.partition("For")[0]
        return self.published or (self.operator is not None and self.operator.__name__.startswith(f"K{family}"))

    def reporter(self, findings: list[Finding], level: str = "error") -> Reporter:
        """What adds findings about this rule to `findings`."""
        return Reporter(self.where, self.number, findings, self.lines, level)


@dataclass(frozen=True)
class RuleFile(Sequence[Rule]):
    """The rules of one file, in order. `devices` is None in the classic form; `lines` are those of the file's keys."""

    label: str
    rules: tuple[Rule, ...]
    devices: Devices | None = None
    lines: Mapping[Keys, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rules)

    def __getitem__(self, index: Any) -> Any:
        return self.rules[index]

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def at(self, *keys: Any) -> str:
        """``path:line`` of a key of the file, or of the nearest above it that the file has."""
        return place(f"{self.label}:", self.lines, keys) if self.lines else self.label


RulesLike = str | Path | Mapping[str, Any] | Sequence[Any]
"""A path, the name of packaged rules, or what YAML makes of a file: a list, or a mapping in the extended form."""


class _Mapping(dict):
    """A YAML mapping that remembers the line it starts on, and those of its keys."""

    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line
        self.lines: dict[Any, int] = {}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """A safe loader whose mappings carry line numbers and whose repeated keys are errors (plain YAML drops them)."""

    def construct_marked(self, node: yaml.MappingNode) -> _Mapping:
        self._refuse_repeated_keys(node)
        self.flatten_mapping(node)  # merge keys: "<<: *anchor"
        mapping = _Mapping(node.start_mark.line + 1)
        for key_node, value_node in node.value:
            key = self._key(key_node)
            mapping[key] = self.construct_object(value_node, deep=True)
            mapping.lines[key] = key_node.start_mark.line + 1
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


def packaged_name(rule: str | Path) -> str:
    """The name of packaged rules that `rule` is, in whatever case and with .yaml or without; "" where it is none."""
    stem = str(rule).removesuffix(".yaml").casefold()
    return next((name for name in packaged_rules() if name.casefold() == stem), "")


def load_rules(rule: RulesLike) -> RuleFile:
    """Read rules from a path, from the name of a packaged file, or from what YAML makes of one.

    Raises:
        RuleError: the file is missing or no YAML, or any rule in it is malformed; all problems at once.
    """
    file, problems = read_rules(rule)
    if problems:
        raise rule_error(file.label, problems)
    return file


def read_rules(rule: RulesLike) -> tuple[RuleFile, list[Finding]]:
    """The rules of a file as far as they can be understood, and what is wrong with them."""
    if isinstance(rule, RuleFile):
        return rule, []
    if isinstance(rule, (str, Path)):
        label, content = _read_file(rule)
    else:
        label, content = "rules", list(rule) if isinstance(rule, Sequence) and not isinstance(rule, bytes) else rule
    problems: list[Finding] = []
    devices, items = None, content
    if isinstance(content, Mapping) and any(key in FILE_KEYS for key in content):
        devices, items = _read_extended(content, label, problems)
    lines = _lines(content) if isinstance(content, Mapping) else {}
    if isinstance(items, list) and items and all(isinstance(item, Rule) for item in items):
        rules = [replace(item, number=number) for number, item in enumerate(items, 1)]
        return RuleFile(label, tuple(rules), devices, lines), problems
    if not isinstance(items, list) or not items:
        if problems:
            raise rule_error(label, problems)
        found = "nothing" if items in (None, []) else classes.type_name(items)
        raise RuleError(
            f"{label}: found {found}, expected a YAML list of rules, each with match and replace, or a mapping with "
            f"{', '.join(FILE_KEYS)}"
        )
    keys = EXTENDED_REPLACE_KEYS if isinstance(content, Mapping) else REPLACE_KEYS
    rules = [_parse_rule(item, number, label, keys, problems) for number, item in enumerate(items, 1)]
    return RuleFile(label, tuple(rules), devices, lines), problems


def _lines(content: Any, above: Keys = ()) -> dict[Keys, int]:
    """The line of each key in what a file says, but for lists."""
    found: dict[Keys, int] = {}
    for key, value in content.items() if isinstance(content, _Mapping) else ():
        found[(*above, key)] = content.lines[key]
        found |= _lines(value, (*above, key))
    return found


def _read_extended(content: Mapping[str, Any], label: str, problems: list[Finding]) -> tuple[Devices | None, Any]:
    """The extended form: its devices, and its rules with their variables filled in."""
    lines = _lines(content)

    def report(text: str, *keys: Any) -> None:
        problems.append(Finding("error", place(f"{label}:", lines, keys) if lines else label, None, text))

    for key in content:
        if key not in FILE_KEYS:
            report(f"unknown key {key!r}{did_you_mean(key, FILE_KEYS)}; known: {', '.join(FILE_KEYS)}", key)
    variables = content.get("variables") or {}
    if not isinstance(variables, dict) or any(isinstance(value, (dict, list)) for value in variables.values()):
        report("variables: expected a mapping from names to texts, numbers or true/false", "variables")
        variables = {}
    fill = _Filling(variables, label, problems)
    filled = {key: fill(content.get(key), lines.get((key,), 0)) for key in ("devices", "rules")}
    for name in variables.keys() - fill.used:
        report(f"variable {name!r} is used nowhere; use or delete it", "variables", name)
    if "rules" not in content:
        report("has no 'rules', the list of rules")
    if "devices" not in content:
        return None, filled["rules"]
    devices, wrong = parse_devices(filled["devices"])
    for device, problem in wrong:
        report(f"devices: {problem}", "devices", device)
    return devices, filled["rules"]


_VARIABLE = re.compile(r"\$\{([^{}]*)\}")


class _Unknown(str):
    """What a variable stands for that nobody gave a value; whatever is made of it is not looked at."""


class _Filling:
    """Fills ``${name}`` in; a text that is one name alone becomes what it stands for. `used`: the names it met."""

    def __init__(self, variables: Mapping[str, Any], label: str, problems: list[Finding]) -> None:
        self.variables, self.label, self.problems = variables, label, problems
        self.used: set[str] = set()

    def __call__(self, value: Any, line: int = 0) -> Any:
        """`value` with all variables filled in; `line` is where it stands, 0 where that is not known."""
        if isinstance(value, str):
            return self._text(value, line)
        if isinstance(value, list):
            return [self(item, line) for item in value]
        if not isinstance(value, dict):
            return value
        filled = _Mapping(getattr(value, "line", 0))
        for key, item in value.items():
            at = value.lines[key] if isinstance(value, _Mapping) else line
            key = self(key, at)
            filled[key] = self(item, at)
            filled.lines[key] = at
        return filled

    def _text(self, value: str, line: int) -> Any:
        alone = _VARIABLE.fullmatch(value)
        if alone:
            return self._known(alone[1], line)
        found = {name: self._known(name, line) for name in _VARIABLE.findall(value)}
        text = _VARIABLE.sub(lambda variable: str(found[variable[1]]), value)
        return _Unknown(text) if any(isinstance(item, _Unknown) for item in found.values()) else text

    def _known(self, name: str, line: int) -> Any:
        self.used.add(name)
        if name in self.variables:
            return self.variables[name]
        there = ", ".join(map(str, self.variables)) or "none"
        text = f"variable {name!r} unknown{did_you_mean(name, self.variables)}; known: {there}"
        self.problems.append(Finding("error", f"{self.label}:{line}" if line else self.label, None, text))
        return _Unknown()


def _has_unknown(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return any(map(_has_unknown, [*value, *(value.values() if isinstance(value, dict) else ())]))
    return isinstance(value, _Unknown)


def _read_file(rule: str | Path) -> tuple[str, Any]:
    """(the path, or the name of the packaged file; what YAML makes of it)."""
    path = existing_path(rule, "rule file", RuleError)
    label = str(path)
    if path is not None and path.is_dir():
        names = ", ".join(packaged_rules())
        raise RuleError(f"rule file {str(rule)!r}: is a folder, expected a YAML file or one of {names}")
    if path is None or not path.is_file():
        stem = packaged_name(rule)
        if not stem:
            packaged = packaged_rules()
            hint = did_you_mean(str(rule).removesuffix(".yaml"), packaged)
            raise RuleError(
                f"rule file {str(rule)!r}: no such file and no packaged rule{hint}. Packaged: {', '.join(packaged)}"
            )
        path = Path(str(resources.files("ktransformers.optimize_rules") / f"{NAMES.get(stem, stem)}.yaml"))
        label = path.name
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        _refuse_cycles(content)
        return label, content
    except (OSError, UnicodeDecodeError) as error:
        raise RuleError(f"rule file {path}: cannot be read: {error}") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:  # what PyYAML lets through from bad scalars
        raise RuleError(
            f"{label}: not valid YAML: {str(error)[:200] or type(error).__name__}. Simplify the file."
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{label}:{mark.line + 1}" if mark else label
        reason = getattr(error, "problem", None) or str(error)
        text = f"not valid YAML: {reason}. Check the indentation and the quotes there."
        wrong = RuleError(f"{where}: {text}")
        wrong.problems = (Finding("error", where, None, text),)
        raise wrong from error


def _refuse_cycles(value: Any, above: frozenset[int] = frozenset()) -> None:
    """Raise ValueError for a list or mapping that contains itself, which YAML's anchors can say."""
    if id(value) in above:
        raise ValueError("an anchor contains itself")
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            _refuse_cycles(item, above | {id(value)})


def _parse_rule(item: Any, number: int, label: str, replace_keys: Sequence[str], problems: list[Finding]) -> Rule:
    where = f"{label}:{item.line}" if getattr(item, "line", 0) else f"rule {number}"
    read = _RuleReader(where, number, problems, _lines(item) if getattr(item, "line", 0) else {})
    if _has_unknown(item):
        return Rule(number, where, matchable=False)
    if not isinstance(item, dict):
        read(f"found {classes.type_name(item)}, expected a mapping with match and replace")
        return Rule(number, where, matchable=False)
    read.unknown_keys(item, RULE_KEYS)
    match = read.section(item, "match", MATCH_KEYS)
    if match is not None and not any(key in match for key in MATCH_KEYS):
        read("match: is empty; expected name (a regular expression), class, or trait", "match")
    match = match or {}
    conditions = {"name": read.pattern(match), "cls": read.match_class(match), "trait": read.trait(match)}
    section = read.section(item, "replace", replace_keys)
    becomes = section or {}
    kwargs = read.kwargs(becomes)
    return Rule(
        number=number,
        where=where,
        **conditions,
        published=str(match.get("class")).startswith("ktransformers.models."),
        operator=read.operator(becomes.get("class", "default"), kwargs),
        kwargs=kwargs,
        device=read.device(becomes),
        recursive=read.recursive(item),
        expect=read.expect(item),
        matchable=not read.has("match"),
        replaceable=section is not None and not read.has("replace", "class"),
        lines=read.lines,
    )


class _RuleReader(Reporter):
    """Reads the parts of one rule. What is wrong with a part is reported, and a harmless value returned for it."""

    @property
    def folder(self) -> Path | None:
        """The rule file's."""
        return Path(self.where).parent if self.lines else None

    def unknown_keys(self, mapping: dict, known: Sequence[str], *keys: Any) -> None:
        for key in mapping:
            if key not in known:
                self(f"{''.join(f'{above}: ' for above in keys)}{unknown_key(key, known)}", *keys, key)

    def section(self, item: dict, key: str, known: Sequence[str]) -> dict | None:
        if key not in item:
            self(f"has no {key!r}; every rule needs match and replace", key)
            return None
        if not isinstance(item[key], dict):
            self(f"{key}: found {classes.type_name(item[key])}, expected a mapping with {', '.join(known)}", key)
            return None
        self.unknown_keys(item[key], known, key)
        return item[key]

    def pattern(self, match: dict) -> re.Pattern | None:
        if "name" not in match:
            return None
        name = match["name"]
        if not isinstance(name, (str, re.Pattern)) or isinstance(getattr(name, "pattern", ""), bytes):
            kind = classes.type_name(name)
            self(f"match.name: found {kind}, expected a regular expression in quotes", "match", "name")
            return None
        try:
            return re.compile(name)
        except (re.error, OverflowError, RecursionError) as error:
            self(f"match.name: {str(name)[:200]!r} is no regular expression: {error}", "match", "name")
        return None

    def match_class(self, match: dict) -> type | None:
        return self._class(match["class"], "match", "class") if "class" in match else None

    def _class(self, dotted: Any, *keys: str) -> type | None:
        subject = ".".join(keys)
        if not isinstance(dotted, str):
            kind = classes.type_name(dotted)
            self(f"{subject}: found {kind}, expected a dotted path such as torch.nn.Linear", *keys)
            return None
        found, problem = classes.find_class(dotted, self.folder)
        if problem:
            self(f"{subject}: {problem}", *keys)
        return found

    def trait(self, match: dict) -> str | None:
        trait = match.get("trait")
        if "trait" not in match or isinstance(trait, str) and trait in TRAITS:
            return trait
        hint = did_you_mean(str(trait), TRAITS)
        self(f"match.trait: {trait!r} unknown{hint}; known: {', '.join(TRAITS)}", "match", "trait")
        return None

    def kwargs(self, becomes: dict) -> dict[str, Any]:
        kwargs = becomes.get("kwargs") or {}
        if isinstance(kwargs, dict):
            return kwargs
        self(f"replace.kwargs: found {classes.type_name(kwargs)}, expected a mapping", "replace", "kwargs")
        return {}

    def device(self, becomes: dict) -> str | None:
        device = becomes.get("device")
        if device is None or isinstance(device, str):
            return device
        kind = classes.type_name(device)
        self(f"replace.device: found {kind}, expected a name such as 'cpu' or {LAYER!r}", "replace", "device")
        return None

    def recursive(self, item: dict) -> bool:
        recursive = item.get("recursive", True)
        if not isinstance(recursive, bool):
            self(f"recursive: found {recursive!r}, expected true or false (without quotes)", "recursive")
        return recursive is not False

    def expect(self, item: dict) -> int | str | None:
        expect = item.get("expect")
        if expect is None or expect == ANY or is_whole(expect, 0):
            return expect
        self(f"expect: found {expect!r}, expected how many modules the rule takes, such as 61, or {ANY}", "expect")
        return None

    def operator(self, dotted: Any, kwargs: dict) -> type | None:
        if dotted == "default":
            known = dict.fromkeys(("generate_device", "prefill_device"))
            for key in kwargs:
                if key not in known:
                    hint = did_you_mean(key, known)
                    text = f"kwarg {key!r} has no meaning for class 'default'{hint}; it takes: {', '.join(known)}"
                    self(text, "replace", "kwargs", key)
            return None
        operator = self._class(dotted, "replace", "class")
        if operator is None:
            return None
        if not classes.is_operator(operator):
            self(
                f"replace.class: {dotted} is no operator; expected a subclass of "
                "ktransformers.operators.base_operator.BaseInjectedModule, or 'default'. Names such as KLinearTorch or "
                "KExpertsCPU go into generate_op of KTransformersLinear and KTransformersExperts",
                "replace", "class",
            )  # fmt: skip
            return None
        for key, problem in classes.kwargs_problems(operator, kwargs).items():
            self(problem, "replace", "kwargs", key)
        return operator
