"""`kt doctor`: what this machine has, what of it is used, whether the kernels compute right here, and what to fix.

The checks are in checks.py; here they are run, each on its own so that one that fails hides no other, and shown.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ktransformers.cli.common import JsonOption, show, working

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def doctor(
    as_json: JsonOption = False,
    quick: Annotated[bool, typer.Option("--quick", help="Skip the speed measurements.")] = False,
) -> None:
    """Inspect this machine: processor, memory, GPUs, versions, a kernel run, and what to fix."""
    with working("loading torch") as say:
        report = examine(quick, say)
    show(report, as_json, lambda: _render(report))
    if report["problems"]:
        raise typer.Exit(1)


def examine(quick: bool, say: Callable[[str], Any]) -> dict[str, Any]:
    """Every check: {"ok", "problems", "notes", "checks": [{"group", "name", "status", "found", "fix"}], "hardware"}.

    `say` is called with what is being done. "hardware" is machine.hardware's Cpu and Gpus, null where not measured.
    """
    from ktransformers.cli.doctor import checks

    with checks.usable_settings() as settings:
        found: list[checks.Check] = []
        measured: dict[str, Any] = {"cpu": None, "gpus": None}
        for group, part in checks.parts(settings, measured, quick, say).items():
            found += _guarded(group, part)
    counts = [sum(check.status == status for check in found) for status in ("problem", "note")]
    return {
        "ok": not counts[0],
        "problems": counts[0],
        "notes": counts[1],
        "checks": [asdict(check) for check in found],
        "hardware": measured,
    }


def _guarded(group: str, part: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    from ktransformers.cli.doctor.checks import Check
    from ktransformers.errors import KTransformersError

    try:
        yield from part()
    except KTransformersError as error:
        yield Check(group, group.lower(), "problem", "could not be checked", str(error))
    except Exception as error:  # a broken driver or package raises whatever it likes, and must not hide the rest
        text = f"{type(error).__name__}: {error}"
        yield Check(group, group.lower(), "problem", "could not be checked", f"Mend what raised {text}")


def _render(report: dict[str, Any]) -> Iterator[Any]:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    group = ""
    for check in report["checks"]:
        if check["group"] != group:
            group = check["group"]
            table.add_row("", "", "")
            table.add_row("", Text(group, "bold"), "")
        found = Text(check["found"])
        if check["fix"]:
            found.append(f"\n→ {check['fix']}", STYLES[check["status"]])
        table.add_row(Text(check["status"], STYLES[check["status"]]), check["name"], found)
    yield table
    problems, notes = report["problems"], report["notes"]
    yield Text(f"\n{_count(problems, 'problem')}, {_count(notes, 'note')}", STYLES["problem" if problems else "ok"])


def _count(count: int, word: str) -> str:
    return f"{count or 'no'} {word}{'' if count == 1 else 's'}"
