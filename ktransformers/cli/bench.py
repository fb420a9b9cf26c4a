"""`kt bench`: tokens per second of a model on this machine. Measured by the engine."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktransformers.cli.common import (
    AdapterOption,
    CacheOption,
    DevicesOption,
    JsonOption,
    RuleOption,
    WeightsOption,
    check_adapter,
    note,
    renamed_devices,
    show,
    token_bar,
    with_adapter,
)

if TYPE_CHECKING:
    from ktransformers.engine.measure import Speed


def bench(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="A model folder or a .gguf; default: the small embedded model.")
    ] = "",
    prompt_tokens: Annotated[
        list[int], typer.Option("--prompt-tokens", "-p", min=1, help="Tokens of a prompt; may be repeated.")
    ] = [512],  # noqa: B006  (typer wants a list)
    new_tokens: Annotated[
        list[int], typer.Option("--new-tokens", "-n", min=1, help="Tokens one by one; may be repeated.")
    ] = [64],  # noqa: B006
    depth: Annotated[
        list[int], typer.Option("--depth", "-d", min=0, help="Tokens of context before them; may be repeated.")
    ] = [0],  # noqa: B006
    repetitions: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 5,
    chunk_size: Annotated[int, typer.Option(min=1, help="Prompt tokens per forward pass.")] = 8192,
    cache: CacheOption = "",
    weights: WeightsOption = "",
    rule: RuleOption = "",
    devices: DevicesOption = [],  # noqa: B006
    adapter: AdapterOption = "",
    as_json: JsonOption = False,
) -> None:
    """Measure tokens per second: prompts, and tokens one by one, at any depth of context."""
    from ktransformers import native
    from ktransformers.engine.load import load
    from ktransformers.engine.measure import measure, total_tokens

    check_adapter(adapter)
    loaded, _ = load(
        model, weights, rule, devices=renamed_devices(devices), cache=cache, needs_template=False,
        progress=not as_json, notify=note,
    )  # fmt: skip
    loaded = with_adapter(loaded, adapter)
    sizes = prompt_tokens, new_tokens, depth, repetitions
    with token_bar(total_tokens(*sizes)) as advance:
        found = list(measure(loaded, *sizes, chunk_size, advance))
    machine = {"threads": native.threads(), "isa": native.isa()} if native.available() else {}
    kind = loaded.config.model_type
    speeds = [asdict(speed) | {"rate": speed.rate} for speed in found]
    data = {"model_type": kind, **machine, "cache": cache or None, "chunk_size": chunk_size, "speeds": speeds}
    show(data, as_json, lambda: _rendered(found, kind, machine))


def _rendered(found: list["Speed"], kind: str, machine: dict[str, Any]) -> Iterator[Any]:
    from rich.table import Table

    where = f", {machine['threads']} threads, {machine['isa']}" if machine else ""
    table = Table(title=f"{kind}{where}", title_justify="left")
    table.add_column("work")
    for column in ("depth", "tokens/s", "slowest to fastest", "ms per token"):
        table.add_column(column, justify="right")
    for one in found:
        spread = f"{_short(min(one.rates))} to {_short(max(one.rates))}"
        table.add_row(f"{one.work} {one.tokens}", f"{one.depth:,}", _short(one.rate), spread, f"{1e3 / one.rate:.3g}")
    yield table
    yield f"Medians of {len(found[0].rates)}. Random tokens; loading and filling the context are not timed."


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
