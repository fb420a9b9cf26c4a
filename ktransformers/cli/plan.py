"""`kt plan`: will it fit, how fast will it be, and the rule file that makes it so."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ktransformers.cli.common import (
    CacheOption,
    ForceOption,
    FormatOption,
    JsonOption,
    ModelArgument,
    WeightsOption,
    complete_gpu,
    new_file,
    quiet_transformers,
    show,
    taking,
    working,
    write_file,
)

if TYPE_CHECKING:
    from ktransformers.planner.plan import Plan, Request


@dataclass
class PlanOptions:
    """What `kt plan` takes: the model and its weights, the machine, what is asked of it, and what to write."""

    model: ModelArgument
    weights: WeightsOption = ""
    form: FormatOption = ""
    gpu: Annotated[
        list[str],
        typer.Option("--gpu", help="24GiB, 24GiB@1008GB/s or a name such as 4090 (kt list gpus), 8x80GiB or 2x4090 for "
                     "several; may be repeated.", autocompletion=complete_gpu),
    ] = field(default_factory=list)  # fmt: skip
    ram: Annotated[str, typer.Option("--ram", help="384GiB or 384GiB@200GB/s; default: this machine's.")] = ""
    cores: Annotated[int, typer.Option("--cores", min=0, help="CPU cores of the machine of --ram; 0: assumed.")] = 0
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens the cache must hold, 8192 unless given; with --train "
                                 "the file's cutoff_len.")
    ] = None  # fmt: skip
    cache: CacheOption = ""
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at a time.")] = 1
    chunk_size: Annotated[int, typer.Option("--chunk-size", min=1, help="Prompt tokens per forward pass.")] = 8192
    strategy: Annotated[
        str,
        typer.Option("--strategy", help="Which experts go to the GPU: uniform, frequency, front-loading, random; "
                     "default: frequency with --profile, else uniform."),
    ] = ""  # fmt: skip
    linear_op: Annotated[
        str,
        typer.Option("--linear-op", help="Operator of linear layers on GPUs: KLinearMarlin quantizes to 4 bits, while "
                     "loading, what has no packed form there. Default: such layers are dense."),
    ] = ""  # fmt: skip
    profile: Annotated[str, typer.Option("--profile", help="Routing profile, from `kt profile`.")] = ""
    output: Annotated[str, typer.Option("-o", "--output", help="Write the rule file there.")] = ""
    train: Annotated[
        bool, typer.Option("--train", help="The memory of fine-tuning instead; MODEL may be a file for kt sft.")
    ] = False
    plot: Annotated[str, typer.Option("--plot", help="Write plots of memory and speed there, as PNG.")] = ""
    force: ForceOption = False
    as_json: JsonOption = False

    def request(self) -> "Request":
        """What the plan is for. Reads the routing profile."""
        from ktransformers.planner.plan import Request
        from ktransformers.planner.profile import RoutingProfile

        seen = RoutingProfile.read(self.profile) if self.profile else None
        strategy = self.strategy or ("frequency" if seen else "uniform")
        return Request(self.context or Request.context, self.batch, self.chunk_size, strategy, seen, self.cache or None,
                       self.linear_op or None)  # fmt: skip


@taking(PlanOptions)
def plan(options: PlanOptions) -> None:
    """Estimate memory, tokens/s and the bottleneck of a model on a machine, and write the rule file.

    From the config alone; the machine need not be at hand. Exit code 1: it does not fit.
    """
    if options.train:
        from ktransformers.cli.plan_train import plan_training

        return plan_training(options)
    from ktransformers.machine import hardware as machines
    from ktransformers.planner.plan import Planner

    output = new_file(options.output, "-o", options.force)
    plot = new_file(options.plot, "--plot", options.force)
    quiet_transformers()
    request = options.request()
    with working("reading the config") as say:
        planner = Planner(options.model, options.weights or None, options.form or None)
        say("measuring this machine")
        machine = machines.describe(options.gpu, options.ram or None, options.cores or None, progress=say)
        probes = planner.probes(machine, here=not options.ram)
        say("planning")
        found = planner.plan(machine, request, probes)
    if output is not None:
        write_file(output, found.rule, "-o")
    if plot is not None:
        from ktransformers.planner.plot import write_plots

        write_plots(planner, machine, request, probes, found, plot)
    show(as_data(found, options.output), options.as_json, lambda: render(found, options.output, options.plot))
    if not found.fits:
        raise typer.Exit(1)


def as_data(found: "Plan", output: str = "") -> dict[str, Any]:
    """The plan for machines: bytes, seconds, tokens per second. What does not fit has no speed."""

    def speed(one: Any) -> dict[str, Any] | None:
        if not found.fits:
            return None
        seconds = {f"{device}: {what}": value for (device, what), value in one.seconds.items()}
        return {"tokens": one.tokens, "tokens_per_second": one.rate, "bottleneck": one.bottleneck, "seconds": seconds}

    memory = {
        device: {**{k: getattr(m, k) for k in ("limit", "weights", "mapped", "dense", "cache", "work", "total")}}
        for device, m in found.memory.items()
    }
    machine = {"cpu": found.hardware.cpu, "gpus": list(found.hardware.gpus), "measured": found.hardware.measured}
    return {
        "model": found.model, "model_type": found.family, "format": found.format, "parameters": found.parameters,
        "active_parameters": found.active, "context": found.request.context, "batch": found.request.batch,
        "cache": found.request.cache,
        "fits": found.fits, "problems": found.problems, "changes": found.changes, "notes": found.notes,
        "hardware": machine, "memory": memory, "layers": found.placement.spans(),
        "gpu_experts": sum(map(len, found.placement.gpu_experts.values())),
        "speed_basis": found.basis or None,
        "prefill": speed(found.prefill), "decode": speed(found.decode), "decode_full_context": speed(found.decode_full),
        "rule": found.rule, "output": output or None,
    }  # fmt: skip


def render(found: "Plan", output: str, plot: str) -> list[Any]:
    """What a person reads."""
    blocks: list[Any] = [_title(found), _memory(found), *([_speed(found)] if found.fits else [])]
    blocks += [Text(f"! {text}", style="red") for text in found.problems]
    blocks += [Text(f"  {text}", style="yellow") for text in found.changes]
    blocks += [Text(f"- {text}", style="dim") for text in found.notes]
    blocks.append(Text(_next_step(found, output), style="green" if found.fits else ""))
    if plot:
        blocks.append(Text(f"Plots: {plot}"))
    return blocks


def _title(found: "Plan") -> Text:
    numbers = f"{_count(found.parameters)} parameters, {_count(found.active)} active"
    verdict = ("fits", "green") if found.fits else ("does not fit", "red")
    return Text.assemble((found.model, "bold"), f" ({numbers}), {found.format}: ", verdict)


def _count(parameters: int) -> str:
    """In billions; in millions or thousands where that would be 0.0."""
    size, letter = (1e9, "B") if parameters >= 5e7 else (1e6, "M") if parameters >= 5e4 else (1e3, "K")
    return f"{parameters / size:.1f}{letter}"


def _memory(found: "Plan") -> Table:
    from ktransformers.machine.units import format_bytes

    sequences = f", {found.request.batch} sequences" if found.request.batch > 1 else ""
    kind = f" in {found.request.cache}" if found.request.cache else ""
    title = f"Memory, context of {found.request.context} tokens{kind}{sequences}"
    table = Table(title=title, title_justify="left")
    for column in ("device", "contents", "weights", "cache", "work", "total", "capacity"):
        table.add_column(column, justify="left" if column in ("device", "contents") else "right", overflow="fold")
    for device, memory in found.memory.items():
        numbers = (memory.weights, memory.cache, memory.work, memory.total, memory.limit)
        full = "red" if memory.total > memory.limit else None
        table.add_row(device, _contents(found, device), *map(format_bytes, numbers), style=full)
    return table


def _contents(found: "Plan", device: str) -> str:
    layers = found.placement.spans().get(device)
    whole = f"layers {layers}" if layers else ""
    mine = [i for i, on in enumerate(found.placement.layers) if on == device]
    experts = sum(len(found.placement.gpu_experts.get(i, ())) for i in mine)
    routed = f"{experts} experts" if experts else ""
    if device == "cpu":
        routed = "routed experts" + (" not on a GPU" if any(found.placement.gpu_experts.values()) else "")
        routed = routed if found.cpu_experts else "embedding" if found.memory["cpu"].weights else ""
    return "; ".join(part for part in (whole, routed) if part) or "-"


def _speed(found: "Plan") -> Table:
    table = Table(title="Expected speed" + (f": {found.basis}" if found.basis else ""), title_justify="left")
    for column, justify in (("", "left"), ("tokens/s", "right"), ("bottleneck", "left"), ("next", "left")):
        table.add_column(column, justify=justify)
    rows = [
        (f"prefill of {found.prefill.tokens} tokens", found.prefill),
        (f"decode at context {found.prefill.tokens}", found.decode),
        (f"decode at context {max(found.prefill.tokens, found.request.context - 1)}", found.decode_full),
    ]
    for name, one in dict(rows).items():  # a short context is filled by the prompt
        order = sorted(one.seconds.items(), key=lambda item: -item[1])
        second = [f"{what} on {device} ({100 * part / one.total:.0f} %)" for (device, what), part in order[1:2]]
        table.add_row(name, _rate(one.rate), one.bottleneck, *second)
    return table


def _rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}"


def _next_step(found: "Plan", output: str) -> str:
    if not found.fits:
        written = f"Rule file, written although it does not fit: {output}"
        return written if output else "-o FILE writes the rule file anyway."
    if output:
        return f"Rule file: {output}. `kt rules explain {output} {found.model}` explains it."
    return "-o rule.yaml writes the rule file that does this."
