"""The `kt` program: a table of commands. Each lives in a module of its own, which imports torch only when it runs.

A new command is one line in COMMANDS, or in GROUPS for a command with commands of its own.
"""

from collections.abc import Callable
from typing import Annotated

import typer

from ktransformers.cli import (
    bench,
    cache,
    chat,
    config,
    doctor,
    listing,
    merge,
    plan,
    profile,
    quantize,
    rules,
    serve,
    sft,
    simulate,
    version,
)
from ktransformers.cli.common import Program, before_torch, out

PLAN, RUN, INSPECT = "Plan", "Run", "Inspect"
"""Headings of `kt --help`, in its order."""

COMMANDS: list[tuple[str, Callable[..., None]]] = [
    (PLAN, plan.plan),
    (PLAN, simulate.simulate),
    (RUN, chat.chat),
    (RUN, serve.serve),
    (RUN, serve.run),
    (RUN, profile.profile),
    (RUN, quantize.quantize),
    (RUN, merge.merge),
    (RUN, bench.bench),
    (INSPECT, listing.list_),
    (INSPECT, doctor.doctor),
    (INSPECT, config.config),
    (INSPECT, version.version),
]
"""(heading, function); the function's name is the command's, without an underscore at the end."""

CLASSES = {chat.chat: chat.Command}
"""Of commands that take more flags than they show."""

GROUPS: list[tuple[str, str, typer.Typer]] = [
    (PLAN, "rules", rules.app),
    (RUN, "cache", cache.app),
    (RUN, "sft", sft.app),
]
"""(heading, name, app)."""

app = typer.Typer(
    name="kt",
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="KTransformers: run Hugging Face MoE models on the hardware you have, and know beforehand what fits.",
    epilog="Commands that print results take --json. kt --install-completion sets up completion in your shell.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from ktransformers import __version__

        out.print(f"ktransformers {__version__}")
        raise typer.Exit


@app.callback()
def _start(
    shown: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    before_torch()


for heading, function in COMMANDS:
    app.command(function.__name__.rstrip("_"), rich_help_panel=heading, cls=CLASSES.get(function))(function)
for heading, name, group in GROUPS:
    app.add_typer(group, name=name, rich_help_panel=heading)


def main() -> None:
    """The entry point `kt`."""
    app(prog_name="kt")
