"""`kt simulate`: a prefill and a decode step of a model under a rule file, on devices that need not exist.

What runs and what that can show is described in `ktransformers.simulator.simulate`; here are only the tables.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ktransformers.cli.common import (
    FormatOption,
    JsonOption,
    ModelArgument,
    RuleArgument,
    WeightsOption,
    err,
    quiet_transformers,
    show,
)

if TYPE_CHECKING:
    from ktransformers.simulator.simulate import PassReport, Simulation


def simulate(
    rule: RuleArgument,
    model: ModelArgument,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=0, max=64,
            help="Simulate cuda:0 to cuda:N-1. Default: those that the file names; 8 for a file for any machine.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens of each sequence.")] = 64,
    context: Annotated[int, typer.Option(min=0, help="Tokens that the cache holds before the prompt.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    weights: WeightsOption = "",
    form: FormatOption = "",
    as_json: JsonOption = False,
) -> None:
    """Run a model under a rule file on simulated devices: device mismatches, copies and memory.

    Needs no GPU, no weights and little memory. Exit code 1: a problem was found.
    """
    from ktransformers.cli.rules import gpus_named
    from ktransformers.configs import meta_model, read_config
    from ktransformers.planner.formats import format_of
    from ktransformers.rules.plan import load_rules
    from ktransformers.simulator import simulate as simulation

    quiet_transformers()
    file = load_rules(rule)
    gpus = gpus_named(file, any_machine=GPUS) if gpus is None else gpus
    config = read_config(model)
    net = meta_model(config)
    stored = format_of(model, config, net, weights or None, form or None)
    with _bar() as on_layer:
        found = simulation.simulate(
            net, file, gpus=gpus, tokens=tokens, batch=batch, context=context, weights=stored.source,
            size=stored.stored, form=stored.layout, on_layer=on_layer,
        )  # fmt: skip
    show(found.to_dict(), as_json, lambda: _tables(found))
    if not found.ok:
        raise typer.Exit(1)


GPUS = 8
"""Simulated for a file that is for any machine, unless --gpus says otherwise."""


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A bar over layers on standard error, on a terminal only."""
    columns = (TextColumn("layers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as progress:
        task = progress.add_task("")
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _tables(found: "Simulation") -> Iterator[Any]:
    yield _devices(found)
    if found.prefill is not None:
        yield _transfers(found.prefill, found.decode, found.batch)
    yield from _problems(found)


def _devices(found: "Simulation") -> Table:
    sequences = f"{found.batch} sequence{'s' if found.batch > 1 else ''}"
    tokens = found.context + (found.prefill.tokens if found.prefill else 0)
    on = f"{found.gpus} GPU{'' if found.gpus == 1 else 's'}" if found.gpus else "a machine without GPUs"
    title = f"{found.model} on {on}: {sequences} of {tokens} tokens, then one more"
    table = Table(title=title, title_justify="left")
    table.add_column("device")
    for column in ("weights", "cache", "activations, prefill", "activations, decode"):
        table.add_column(column, justify="right")
    for device in found.devices():
        peaks = [report.peak.get(device, 0) if report else None for report in (found.prefill, found.decode)]
        table.add_row(device, *map(_size, (found.weights.get(device, 0), found.cache.get(device, 0), *peaks)))
    return table


def _transfers(prefill: "PassReport", decode: "PassReport | None", batch: int) -> Table | Text:
    reports = {"prefill": prefill} | ({"decode": decode} if decode is not None else {})
    pairs = sorted({(t.source, t.target) for report in reports.values() for t in report.transfers})
    if not pairs:
        return Text("No copies between devices.")
    table = Table(title="Copies between devices", title_justify="left")
    table.add_column("from")
    table.add_column("to")
    for name in reports:
        table.add_column(f"{name}, copies", justify="right")
        table.add_column("bytes per token", justify="right")
    for pair in pairs:
        cells = []
        for report in reports.values():
            found = [(t.count, t.nbytes) for t in report.transfers if (t.source, t.target) == pair]
            count, nbytes = found[0] if found else (0, 0)
            cells += [str(count), _size(nbytes / (report.tokens * batch))]
        table.add_row(*pair, *cells)
    return table


def _problems(found: "Simulation") -> Iterator[Text]:
    for problem in found.problems:
        kind, colour = ("note: ", "yellow") if problem.warning else ("problem: ", "red")
        yield Text.assemble((kind, colour), str(problem))
    if found.ok:
        yield Text(f"Every operation found its operands on one device ({found.seconds:.1f} s).")


def _size(nbytes: float | None) -> str:
    """Bytes for people; "-" for what is not known."""
    from ktransformers.machine.units import format_bytes

    return "-" if nbytes is None else format_bytes(nbytes)
