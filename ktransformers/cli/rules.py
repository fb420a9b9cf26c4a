"""`kt rules`: check a rule file against a model, explain what it does, rewrite it in the extended form.

Only what is shown is decided here. What the rules do says `ktransformers.rules.plan`, why
`ktransformers.rules.explain`, and the rewriting is `ktransformers.rules.extend`'s. No weights are read.
"""

import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ktransformers.cli import explained
from ktransformers.cli.common import (
    DevicesOption,
    JsonOption,
    ModelArgument,
    RuleArgument,
    new_file,
    out,
    quiet_transformers,
    renamed_devices,
    show,
    write_file,
)
from ktransformers.errors import KTransformersError, RuleError

if TYPE_CHECKING:
    from torch import nn

    from ktransformers.rules.plan import Replacement, RuleFile

MOST_GPUS = 64

app = typer.Typer(no_args_is_help=True, help="Check a rule file against a model, explain it, rewrite it.")

GpusOption = Annotated[
    int | None,
    typer.Option(
        min=0, max=MOST_GPUS,
        help="Plan for cuda:0 to cuda:N-1; default: up to the highest cuda device that the file names, at least one.",
    ),
]  # fmt: skip


# --- check ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One line of `kt rules check`. `level` is error, warning or note; `where` "file:line", or "" where unknown."""

    level: str
    where: str
    rule: int | None
    text: str

    def __str__(self) -> str:
        rule = f" (rule {self.rule})" if self.rule is not None else ""
        return f"{self.where}{rule}: {self.text}" if self.where else self.text


@app.command()
def check(
    rule: RuleArgument,
    model: ModelArgument,
    gpus: GpusOption = None,
    devices: DevicesOption = [],  # noqa: B006  (typer wants a list)
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are errors.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find every mistake of a rule file for a model, each with file and line. Reads no weights.

    Errors: what loading would refuse, and layers that do not meet. Warnings: rules that decide nothing. Notes: what
    works in a roundabout way. The rules' own warnings, and layers, are looked at once loading would refuse nothing.
    Exit code 1: there is an error.
    """
    mapping = renamed_devices(devices)
    findings, file, plan, count = [], None, None, gpus
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            file, count = _read(rule, gpus, mapping)
        except RuleError as error:
            findings += [_parse("error", text) for text in _problems(error)]
            if not any(finding.where for finding in findings):
                raise  # no line of the file is at fault
        net = _meta_model(model)
        try:
            plan = _plan(net, rule if file is None else file, count, mapping) if not findings else None
        except RuleError as error:
            findings += [_parse("error", text) for text in _problems(error)]
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            findings.append(_parse("error" if strict else "warning", str(warning.message)))
    if plan is not None:
        findings += _of_the_chain(net, plan)
    data = {
        "file": _label(rule), "model": type(net).__name__, "gpus": count,
        "rules": len(file) if plan is not None else None, "modules": len(plan) if plan is not None else None,
        "ok": all(finding.level != "error" for finding in findings), "findings": findings,
    }  # fmt: skip
    show({**data, "findings": [vars(finding) for finding in findings]}, as_json, lambda: _report(data))
    if not data["ok"]:
        raise typer.Exit(1)


def _read(rule: str, gpus: int | None, mapping: dict[str, str]) -> "tuple[RuleFile | None, int]":
    """The rules, None where they have mistakes of their own, and how many GPUs to plan for."""
    from ktransformers.rules.files import read_rules

    file, problems = read_rules(rule)
    count = gpus_named(file, mapping) if gpus is None else gpus
    return (None if problems else file), count


def gpus_named(file: "RuleFile", mapping: dict[str, str] | None = None) -> int:
    """Enough GPUs for the highest cuda device that a file or a renaming names, at least 1, at most MOST_GPUS."""
    named = [*_named_devices(file), *(mapping or {}), *(mapping or {}).values()]
    found = [re.fullmatch(r"cuda:(\d{1,9})", name, re.ASCII) for name in named]
    return min(max([1, *(int(match[1]) + 1 for match in found if match)]), MOST_GPUS)


def _named_devices(file: "RuleFile") -> list[str]:
    from ktransformers.devices import DEVICE_KWARGS

    named: list[Any] = list(file.devices.named()) if file.devices else []
    for rule in file:
        named += [rule.device, *(rule.kwargs.get(key) for key in DEVICE_KWARGS)]
        transfers = rule.kwargs.get("transfer_map")
        named += transfers.values() if isinstance(transfers, dict) else ()
    return [str(device) for device in named if device is not None]


def _plan(net: "nn.Module", rule: Any, gpus: int, mapping: dict[str, str] | None = None) -> "dict[str, Replacement]":
    from ktransformers.rules.plan import plan

    return plan(net, rule, devices=mapping or None, gpus=gpus)


def _meta_model(model: str) -> "nn.Module":
    from ktransformers.configs import meta_model, read_config

    quiet_transformers()
    return meta_model(read_config(model))


def _problems(error: RuleError) -> list[str]:
    """The problems that one error lists, without its headline."""
    headline, *listed = str(error).split("\n  - ")
    return listed or [headline]


_PLACE = re.compile(r"(?P<where>[^:\n]+:\d+|rule (?P<bare>\d+))(?: \(rule (?P<number>\d+)\))?: (?P<text>.*)", re.DOTALL)


def _parse(level: str, text: str) -> Finding:
    """Split what the rules' messages begin with: ``file:line (rule N): `` or ``file:line: rule N ...``."""
    found = _PLACE.fullmatch(text)
    if found is None:
        return Finding(level, "", None, text)
    where, number, rest = found["where"], found["number"] or found["bare"], found["text"]
    if number is None and (named := re.match(r"rule (\d+) ", rest)):
        number, rest = named[1], rest[named.end() :]
    return Finding(level, where, int(number) if number else None, rest)


def _of_the_chain(net: "nn.Module", plan: Any) -> list[Finding]:
    from ktransformers.rules.chain import chain_problems

    found = []
    for problem in chain_problems(net, plan):
        level = "note" if problem.warning else "error"
        rule = plan[problem.module].rule if problem.rule and problem.module in plan else None
        place = (rule.where, rule.number) if rule is not None else ("", None)
        found.append(Finding(level, *place, str(problem)))
    return found


def _label(rule: str) -> str:
    from ktransformers.optimize_rules import NAMES
    from ktransformers.rules.files import packaged_rules

    stem = rule.removesuffix(".yaml")
    return f"{NAMES.get(stem, stem)}.yaml" if stem in packaged_rules() else re.split(r"[/\\]", rule.rstrip("/"))[-1]


def _report(data: dict[str, Any]) -> list[Text]:
    """Print each finding on a line of its own, however long: `show` would wrap it, and editors read file:line."""
    colours = {"error": "red", "warning": "yellow", "note": "cyan"}
    for finding in data["findings"]:
        out.print(Text.assemble((f"{finding.level}: ", colours[finding.level]), str(finding)), soft_wrap=True)
    counts = {level: sum(f.level == level for f in data["findings"]) for level in colours}
    told = ", ".join(_many(number, level) for level, number in counts.items() if number) or "no problems"
    verb = "fits" if data["ok"] else "does not fit"
    sizes = f"{_many(data['rules'], 'rule')}, {_many(data['modules'], 'module')}, " if data["modules"] else ""
    on = f" on {_many(data['gpus'], 'GPU')}" if data["gpus"] is not None else ""
    text = f"{data['file']} {verb} {data['model']}{on}: {sizes}{told}"
    out.print(Text(text, style="green" if data["ok"] else "red"), soft_wrap=True)
    return []


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# --- explain ----------------------------------------------------------------------------------------------


@app.command()
def explain(
    rule: RuleArgument,
    model: ModelArgument,
    pattern: Annotated[
        str | None, typer.Argument(help="Regular expression; the modules whose name it finds are explained.")
    ] = None,
    gpus: GpusOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which rule takes which module, and with PATTERN why the other rules do not.

    Without PATTERN: the whole plan, what is left to the default, and where layers live.
    """
    wanted = _regular(pattern)
    file, count = _read_valid(rule, gpus)
    net = _meta_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are what `kt rules check` shows
        plan = _plan(net, file, count)
    if wanted is None:
        explained.whole_plan(net, file, plan, count, as_json)
    else:
        explained.modules(net, file, plan, wanted, as_json)


def _read_valid(rule: str, gpus: int | None) -> "tuple[RuleFile, int]":
    """The rules, and how many GPUs to plan for. Raises RuleError when the file has mistakes."""
    from ktransformers.rules.plan import load_rules

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = load_rules(rule)
    return file, gpus_named(file) if gpus is None else gpus


def _regular(pattern: str | None) -> re.Pattern | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise KTransformersError(
            f"PATTERN {pattern[:200]!r} is no regular expression: {error}. Quote it for the shell: 'mlp\\.gate$'."
        ) from error


# --- extend -----------------------------------------------------------------------------------------------


@app.command()
def extend(
    rule: Annotated[str, typer.Argument(help="A rule file in the classic form, a list of rules.")],
    model: ModelArgument,
    output: Annotated[str, typer.Option("-o", "--output", help="Write there; default: standard output.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file of -o, even the rule file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Rewrite a classic rule file in the extended form: `devices:` once, and no rule for each GPU.

    The new file plans the same for MODEL, module by module; it is written only when that is proved. Of the comments
    those at the top are kept.
    """
    from ktransformers.rules import extend as rewriting

    target = new_file(output, "-o", force)
    file, count = _read_valid(rule, None)
    net = _meta_model(model)
    on_gpus = any(device.startswith("cuda") for device in _named_devices(file))
    text = rewriting.extend(net, rule, count if on_gpus else 0)
    if target is not None:
        write_file(target, text, "-o")
    before, after = len(file), text.count("\n- match:")
    data = {
        "file": file.label, "model": type(net).__name__, "rules_before": before, "rules": after,
        "text": text, "output": str(target) if target else None,
    }  # fmt: skip
    if as_json or target is not None:
        done = f"{file.label}: {_many(after, 'rule')} instead of {before}, the same plan for {type(net).__name__}."
        show(data, as_json, lambda: Text(done, style="green"))
    else:
        typer.echo(text, nl=False)
