"""`kt config`: every KT_* variable, its value, and where that comes from. There is no other configuration."""

import os
from dataclasses import dataclass

import typer
from rich.table import Table
from rich.text import Text

from ktransformers import env
from ktransformers.cli.common import JsonOption, show
from ktransformers.errors import KTransformersError, did_you_mean


@dataclass(frozen=True)
class Setting:
    """One KT_* variable. `value`: as it is used, as text; "" means that the program decides. `source`: "environment" or
    "default". `problem`: why its value cannot be used, or ""."""

    name: str
    value: str
    source: str
    meaning: str
    problem: str = ""


def config(as_json: JsonOption = False) -> None:
    """Settings: every KT_* variable, its value, and where it comes from."""
    found = settings()
    show({"settings": found}, as_json, lambda: _table(found))
    if any(setting.problem for setting in found):
        raise typer.Exit(1)


def settings() -> list[Setting]:
    """Every variable of env.VARIABLES, then those set in the environment that look like one and are none."""
    unknown = sorted(name for name in os.environ if name.startswith("KT_") and name not in env.VARIABLES)
    return [*map(_setting, env.VARIABLES), *map(_unknown, unknown)]


def _setting(name: str) -> Setting:
    given = os.environ.get(name, "").strip()
    source = "environment" if given else "default"
    try:
        value = getattr(env, name.removeprefix("KT_").lower())()  # each has a function of its own that reads it
    except KTransformersError as error:
        return Setting(name, given, source, env.VARIABLES[name], str(error))
    if name in env.SECRET:
        value = "set" if given else ""
    problem = env.rule_modules_problem() if name == "KT_RULE_MODULES" else ""
    if isinstance(value, tuple):
        value = ",".join(value)
    if isinstance(value, bool):
        value = int(value)
    return Setting(name, "" if value is None else str(value), source, env.VARIABLES[name], problem)


def _unknown(name: str) -> Setting:
    close = did_you_mean(name, env.VARIABLES)
    return Setting(
        name, os.environ[name], "environment", "", f"{name} is no setting{close}; nothing reads it. Unset it."
    )


def _table(found: list[Setting]) -> Table:
    table = Table(show_lines=False)
    for column in ("variable", "value", "from"):
        table.add_column(column, no_wrap=column == "variable", overflow="fold")
    table.add_column("meaning", ratio=1)
    for setting in found:
        meaning = Text(setting.problem, "red") if setting.problem else Text(setting.meaning)
        table.add_row(setting.name, Text(setting.value or "automatic"), setting.source, meaning)
    return table
