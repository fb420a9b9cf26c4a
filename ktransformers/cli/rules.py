"""`kt rules`: check a rule file against a model, explain what it does, rewrite it in the extended form.

Only what is shown is decided here. What the rules do says `ktransformers.rules.plan`, why
`ktransformers.rules.explain`, and the rewriting is `ktransformers.rules.extend`'s. No weights are read.
"""

import re
import warnings
from dataclasses import dataclass, replace
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

    from ktransformers.rules.findings import Finding
    from ktransformers.rules.plan import Replacement, RuleFile

MOST_GPUS = 64

app = typer.Typer(no_args_is_help=True, help="Check a rule file against a model, explain it, rewrite it.")

GpusOption = Annotated[
    int | None,
    typer.Option(
        min=0, max=MOST_GPUS,
        help="Plan for cuda:0 to cuda:N-1. Default: those that the file names; one for a file for any machine.",
    ),
]  # fmt: skip


# --- check ------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """What a check found; `rules` and `modules` are numbers, None where the plan has a mistake."""

    model: str
    gpus: int | None
    found: "list[Finding]"
    rules: int | None = None
    modules: int | None = None

    @property
    def ok(self) -> bool:
        return all(finding.level != "error" for finding in self.found)


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
    result = find(rule, model, gpus, renamed_devices(devices), strict)
    shown = [{key: getattr(finding, key) for key in ("level", "where", "rule", "text")} for finding in result.found]
    data = {
        "file": _label(rule), "model": result.model, "gpus": result.gpus, "rules": result.rules,
        "modules": result.modules, "ok": result.ok, "findings": shown,
    }  # fmt: skip
    show(data, as_json, lambda: _report(data["file"], result))
    if not result.ok:
        raise typer.Exit(1)


def find(rule: str, model: str, gpus: int | None, mapping: dict[str, str], strict: bool = False) -> Findings:
    """Everything there is to say of a rule file for a model, without printing it.

    Raises:
        KTransformersError: no such file or model, or a file of which no line is at fault.
    """
    from ktransformers.rules.files import read_rules

    file, found, plan = None, [], None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            file, found = read_rules(rule)
        except RuleError as error:
            found = _listed(error)
        net = _meta_model(model)
        if file is not None:
            gpus = gpus_named(file, mapping) if gpus is None else gpus
            try:
                plan = _plan(net, rule if found else file, gpus, mapping)
            except RuleError as error:
                found = _listed(error)
    found += [_of_warning(warning.message, strict) for warning in caught if issubclass(warning.category, UserWarning)]
    result = Findings(type(net).__name__, gpus, found)
    if plan is not None:
        result.rules, result.modules = len(file), len(plan)
        found += _of_the_chain(net, plan)
    return result


def _listed(error: RuleError) -> "list[Finding]":
    """What the error lists. Raises it where it lists nothing: then no line of the file is at fault."""
    if not error.problems:
        raise error
    return list(error.problems)


def _of_warning(message: Warning, strict: bool) -> "Finding":
    from ktransformers.rules.findings import Finding, RuleWarning

    level = "error" if strict else "warning"
    if isinstance(message, RuleWarning):
        return replace(message.finding, level=level)
    return Finding(level, "", None, str(message))


def gpus_named(file: "RuleFile", mapping: dict[str, str] | None = None, any_machine: int = 1) -> int:
    """Enough GPUs for the highest cuda device that a file or a renaming names, at most MOST_GPUS.

    None for a file that names devices, and no GPU; `any_machine` for a file that names no device.
    """
    named = [*_named_devices(file), *(mapping or {}), *(mapping or {}).values()]
    found = [re.fullmatch(r"cuda(?::(\d{1,9}))?", name, re.ASCII) for name in named]
    gpus = [int(match[1] or 0) + 1 for match in found if match]
    anywhere = not named or file.devices is not None and file.devices.layers is None
    return min(max([any_machine if anywhere else 0, *gpus]), MOST_GPUS)


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


def _of_the_chain(net: "nn.Module", plan: Any) -> "list[Finding]":
    from ktransformers.rules.chain import chain_problems
    from ktransformers.rules.findings import Finding

    found = []
    for problem in chain_problems(net, plan):
        level = "note" if problem.warning else "error"
        rule = plan[problem.module].rule if problem.rule and problem.module in plan else None
        place = (rule.where, rule.number) if rule is not None else ("", None)
        found.append(Finding(level, *place, str(problem)))
    return found


def _label(rule: str) -> str:
    from ktransformers.optimize_rules import NAMES
    from ktransformers.rules.files import packaged_name

    name = packaged_name(rule)
    return f"{NAMES.get(name, name)}.yaml" if name else re.split(r"[/\\]", rule.rstrip("/"))[-1]


def _report(file: str, result: Findings) -> list[Text]:
    """Print each finding on a line of its own, however long: `show` would wrap it, and editors read file:line."""
    colours = {"error": "red", "warning": "yellow", "note": "cyan"}
    for finding in result.found:
        out.print(Text.assemble((f"{finding.level}: ", colours[finding.level]), str(finding)), soft_wrap=True)
    counts = {level: sum(finding.level == level for finding in result.found) for level in colours}
    summary = ", ".join(_many(number, level) for level, number in counts.items() if number) or "no problems"
    verb = "fits" if result.ok else "does not fit"
    sizes = f"{_many(result.rules, 'rule')}, {_many(result.modules, 'module')}, " if result.modules else ""
    on = f" on {on_gpus(result.gpus)}" if result.gpus is not None else ""
    text = f"{file} {verb} {result.model}{on}: {sizes}{summary}"
    out.print(Text(text, style="green" if result.ok else "red"), soft_wrap=True)
    return []


def on_gpus(gpus: int) -> str:
    """The machine planned for, and how to plan for another."""
    return f"{_many(gpus, 'GPU') if gpus else 'a machine without GPUs'} (--gpus N for another)"


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
