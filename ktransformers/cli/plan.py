"""`kt plan`: will it fit, how fast will it be, and the rule file that makes it so."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ktransformers.cli.common import complete_card, complete_model, show, working
from ktransformers.errors import KTransformersError

if TYPE_CHECKING:
    from ktransformers.planner.plan import Plan


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder with config.json, the file itself, a .gguf, or a known model such as deepseek-v3.",
            autocompletion=complete_model,
        ),
    ],
    weights: Annotated[
        str, typer.Option("--weights", help="A checkpoint; its headers say types and sizes, nothing is loaded.")
    ] = "",
    gpu: Annotated[
        list[str],
        typer.Option("--gpu", help="24GiB, 24GiB@1008GB/s, or a card such as 4090; once for each GPU.",
                     autocompletion=complete_card),
    ] = [],  # noqa: B006  (typer wants a list)
    ram: Annotated[str, typer.Option("--ram", help="384GiB or 384GiB@200GB/s; without it, this machine's.")] = "",
    cores: Annotated[int, typer.Option("--cores", help="CPU cores of the machine of --ram; 0: assumed.")] = 0,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens the cache must hold.")] = 8192,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at a time.")] = 1,
    chunk_size: Annotated[int, typer.Option("--chunk-size", min=1, help="Prompt tokens per forward pass.")] = 8192,
    form: Annotated[
        str, typer.Option("--format", help="How weights are stored: Q4_K_M, FP8, IQ2_XXS ...; default: as published.")
    ] = "",
    strategy: Annotated[
        str,
        typer.Option("--strategy", help="Which experts go to the GPU: uniform, frequency, front-loading, random; "
                     "default: frequency with --profile, else uniform."),
    ] = "",
    profile: Annotated[str, typer.Option("--profile", help="Routing profile, from `kt profile`.")] = "",
    output: Annotated[str, typer.Option("-o", "--output", help="Write the rule file there.")] = "",
    plot: Annotated[str, typer.Option("--plot", help="Write plots of memory and speed there, as PNG.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a model needs on a machine, how fast it will be, and write the rule file.

    From the model's config alone, without weights and without the machine. Exit code 1: it does not fit.
    """
    from transformers.utils import logging

    from ktransformers.machine import hardware as machines
    from ktransformers.planner.plan import Planner, Request
    from ktransformers.planner.profile import RoutingProfile

    logging.set_verbosity_error()
    _writable(output, "-o")
    _writable(plot, "--plot")
    seen = RoutingProfile.read(profile) if profile else None
    request = Request(context, batch, chunk_size, strategy or ("frequency" if seen else "uniform"), seen)
    with working("reading the config") as say:
        planner = Planner(model, weights or None, form or None)
        say("looking at the machine")
        machine = machines.describe(gpu, ram or None, cores or None, progress=say)
        probes = planner.probes(machine, here=not ram)
        say("planning")
        found = planner.plan(machine, request, probes)
    if output:
        _write(Path(output), found.rule)
    if plot:
        from ktransformers.planner.plot import write_plots

        with working("drawing"):
            write_plots(planner, machine, request, probes, found, Path(plot))
    show(as_data(found, output), as_json, lambda: render(found, output, plot))
    if not found.fits:
        raise typer.Exit(1)


def _writable(path: str, flag: str) -> None:
    """Refuse a path that cannot be written before anything is computed."""
    if path and (Path(path).is_dir() or not Path(path).expanduser().resolve().parent.is_dir()):
        raise KTransformersError(f"{flag} {path}: is a folder, or its folder does not exist; expected a file's path.")


def _write(path: Path, text: str) -> None:
    try:
        path.expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        raise KTransformersError(
            f"-o {path}: cannot be written: {error.strerror or error}. Choose another path, or free it."
        ) from error


def as_data(found: "Plan", output: str = "") -> dict[str, Any]:
    """The plan for machines: bytes, seconds, tokens per second."""

    def speed(one: Any) -> dict[str, Any]:
        seconds = {f"{device}: {what}": value for (device, what), value in one.seconds.items()}
        return {"tokens": one.tokens, "tokens_per_second": one.rate, "bottleneck": one.bottleneck, "seconds": seconds}

    memory = {
        device: {**{k: getattr(m, k) for k in ("limit", "weights", "mapped", "cache", "work", "total")}}
        for device, m in found.memory.items()
    }
    machine = {"cpu": found.hardware.cpu, "gpus": list(found.hardware.gpus), "measured": found.hardware.measured}
    return {
        "model": found.model, "model_type": found.family, "format": found.format, "parameters": found.parameters,
        "active_parameters": found.active, "context": found.request.context, "batch": found.request.batch,
        "fits": found.fits, "problems": found.problems, "changes": found.changes, "notes": found.notes,
        "hardware": machine, "memory": memory, "layers": found.placement.spans(),
        "gpu_experts": sum(map(len, found.placement.gpu_experts.values())),
        "prefill": speed(found.prefill), "decode": speed(found.decode), "decode_full_context": speed(found.decode_full),
        "rule": found.rule, "output": output or None,
    }  # fmt: skip


def render(found: "Plan", output: str, plot: str) -> list[Any]:
    """What a person reads."""
    blocks: list[Any] = [_title(found), _memory(found), _speed(found)]
    blocks += [Text(f"! {text}", style="red") for text in found.problems]
    blocks += [Text(f"  {text}", style="yellow") for text in found.changes]
    blocks += [Text(f"- {text}", style="dim") for text in found.notes]
    blocks.append(Text(_next_step(found, output), style="green" if found.fits else ""))
    if plot:
        blocks.append(Text(f"Plots: {plot}"))
    return blocks


def _title(found: "Plan") -> Text:
    billions = f"{found.parameters / 1e9:.1f}B parameters, {found.active / 1e9:.1f}B a token"
    verdict = ("fits", "green") if found.fits else ("does not fit", "red")
    return Text.assemble((found.model, "bold"), f" ({billions}), {found.format}: ", verdict)


def _memory(found: "Plan") -> Table:
    from ktransformers.machine.units import format_bytes

    title = f"Memory, {found.request.context} tokens of context x {found.request.batch}"
    table = Table(title=title, title_justify="left")
    for column in ("device", "holds", "weights", "cache", "work", "needs", "of"):
        table.add_column(column, justify="left" if column in ("device", "holds") else "right", overflow="fold")
    for device, memory in found.memory.items():
        numbers = (memory.weights, memory.cache, memory.work, memory.total, memory.limit)
        full = "red" if memory.total > memory.limit else None
        table.add_row(device, _holds(found, device), *map(format_bytes, numbers), style=full)
    return table


def _holds(found: "Plan", device: str) -> str:
    layers = found.placement.spans().get(device)
    whole = f"layers {layers}" if layers else ""
    mine = [i for i, on in enumerate(found.placement.layers) if on == device]
    experts = sum(len(found.placement.gpu_experts.get(i, ())) for i in mine)
    routed = f"{experts} experts" if experts else ""
    if device == "cpu":
        routed = "routed experts" + (" but those on GPUs" if any(found.placement.gpu_experts.values()) else "")
    return "; ".join(part for part in (whole, routed) if part) or "nothing"


def _speed(found: "Plan") -> Table:
    table = Table(title="Expected speed", title_justify="left")
    for column, justify in (("", "left"), ("tokens/s", "right"), ("bottleneck", "left"), ("then", "left")):
        table.add_column(column, justify=justify)
    rows = [
        (f"prefill of {found.prefill.tokens}", found.prefill),
        (f"decode behind {found.prefill.tokens}", found.decode),
        (f"decode behind {max(found.prefill.tokens, found.request.context - 1)}", found.decode_full),
    ]
    for name, one in rows:
        order = sorted(one.seconds.items(), key=lambda item: -item[1])
        then = f"{order[1][0][1]} on {order[1][0][0]} ({100 * order[1][1] / one.total:.0f} %)" if len(order) > 1 else ""
        table.add_row(name, _rate(one.rate), one.bottleneck, then)
    return table


def _rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}"


def _next_step(found: "Plan", output: str) -> str:
    if not found.fits:
        return f"The rule file is written all the same: {output}" if output else "-o FILE writes the rule file anyway."
    if output:
        return f"Rule file: {output}. `kt rules explain {output} {found.model}` reads it to you."
    return "-o rule.yaml writes the rule file that does this."
