"""`kt sft`: fine-tune by a training file, and use what came of it. Everything is done by ktransformers/sft/."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from ktransformers.cli.common import JsonOption, err, note, show, working

if TYPE_CHECKING:
    from ktransformers.sft.options import Options
    from ktransformers.sft.predict import Predicted
    from ktransformers.sft.train import Done


class _FileFirst(TyperGroup):
    """A group whose first word may be a training file: then the command is `train`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["train", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_FileFirst, no_args_is_help=True,
    help="Fine-tune with LoRA by a YAML file with LLaMA-Factory's keys: kt sft FILE.",
)  # fmt: skip

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="A YAML file, such as tutorials/08_sft.md has.")]
ChangesArgument = Annotated[
    list[str], typer.Argument(metavar="[KEY=VALUE]...", help="Keys that are to be otherwise than the file says.")
]


@app.command()
def train(file: FileArgument, changes: ChangesArgument = [], as_json: JsonOption = False) -> None:  # noqa: B006
    """Train an adapter, evaluate, or answer a dataset, as the file says (do_train, do_eval, do_predict)."""
    from ktransformers.cli.common import quiet_transformers
    from ktransformers.sft.read import read

    options = read(file, changes)
    if not (options.do_train or options.do_eval or options.do_predict):
        options.do_train = True
    quiet_transformers()
    if options.do_train or options.do_eval:
        with _shown(not as_json) as (on_step, watch):
            from ktransformers.sft.train import train as run

            done = run(options, note, on_step, watch)
        show(done, as_json, lambda: _table(done))
        if options.do_predict:
            options.adapter_name_or_path = done.output_dir
    if options.do_predict:
        from ktransformers.sft.predict import predict

        with working("answering") as say:
            found = predict(options, note, say)
        show(found, as_json, lambda: _scores(found))


@app.command()
def chat(file: FileArgument, changes: ChangesArgument = [], as_json: JsonOption = False) -> None:  # noqa: B006
    """Chat with the model and the adapter that a file names (adapter_name_or_path)."""
    from ktransformers.cli.conversation import Options, talk

    model, weights, rule, adapter, options = _to_use(file, changes)
    talk(
        Options(
            model_path=model, weights=weights, rule=rule, adapter=adapter, threads=options.cpu_infer,
            max_new_tokens=options.max_new_tokens, chunk_size=options.chunk_size, as_json=as_json,
        )
    )  # fmt: skip


@app.command()
def api(
    file: FileArgument,
    changes: ChangesArgument = [],  # noqa: B006
    host: Annotated[str, typer.Option(envvar="API_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="API_PORT", min=0, max=65535, help="0: any that is free.")] = 8000,
    as_json: JsonOption = False,
) -> None:
    """Serve the model and the adapter that a file names, as kt serve does."""
    from ktransformers.cli.serve import ServeOptions, serve_by

    model, weights, rule, adapter, options = _to_use(file, changes)
    serve_by(
        ServeOptions(
            model=model, weights=weights, rule=rule, adapter=[adapter] if adapter else [], host=host, port=port,
            as_json=as_json, chunk_size=min(options.chunk_size, 512),
        )
    )  # fmt: skip


def _to_use(file: str, changes: list[str]) -> tuple[str, str, str, str, "Options"]:
    """Model, weights, rule and adapter of a file, and all it says. Its notes are printed."""
    from ktransformers.sft.read import read
    from ktransformers.sft.rules import rule_of

    options = read(file, changes)
    for text in options.notices:
        note(text)
    rule = rule_of(options.kt_optimize_rule, note)
    return options.model_name_or_path, options.kt_weight_path, rule, options.adapter_name_or_path, options


class _shown:
    """Progress on standard error: what is going on until the first step, then a bar with loss and rate."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted and err.is_terminal
        self._status, self._bar, self._task, self._loss = None, None, None, ""

    def __enter__(self) -> tuple[Any, Any]:
        return self.on_step, self.watch

    def on_step(self, text: str) -> None:
        if not self.wanted:
            return
        if self._status is not None:
            self._status.stop()
        self._status = None
        if text:
            self._status = err.status(text)
            self._status.start()

    def watch(self, line: dict[str, Any]) -> None:
        if "loss" in line:
            rate = f", {line['throughput']:.0f} tok/s" if "throughput" in line else ""
            self._loss = f"loss {line['loss']:.4f}{rate}"
            if not self.wanted:
                done = f"step {line['current_steps']} of {line['total_steps']}"
                err.print(f"{done}: {self._loss}, {line['remaining_time']} left")
        if not self.wanted:
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("training"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn(), console=err,
                transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("", total=line["total_steps"], loss="")
        self._bar.update(self._task, completed=line["current_steps"], loss=self._loss)

    def __exit__(self, *args: Any) -> None:
        self.on_step("")
        if self._bar is not None:
            self._bar.stop()


def _table(done: "Done") -> Table:
    from ktransformers.machine.units import format_bytes

    table = Table(show_header=False, box=None)
    trained = f"{done.trained:,} ({done.trained_in_experts:,} in experts)"
    steps = f"{done.steps}{' (stopped by Ctrl-C)' if done.stopped else ''}"
    rows = [("adapter", done.output_dir), ("trained values", trained), ("examples", f"{done.examples:,}")]
    rows += [("steps", steps)]
    rows += [(name, f"{value:.4f}") for name, value in (("loss", done.train_loss), ("evaluation loss", done.eval_loss))
             if value is not None]  # fmt: skip
    if done.peak_bytes:
        expected = f", {format_bytes(done.expected_bytes)} expected" if done.expected_bytes else ""
        rows += [("memory", f"{format_bytes(done.peak_bytes)} at most{expected}")]
    rows += [("time", f"{done.seconds:.1f} s"), ("files", ", ".join(done.files))]
    for name, value in rows:
        table.add_row(name, value)
    return table


def _scores(found: "Predicted") -> Table:
    table = Table(show_header=False, box=None)
    for name, value in found.metrics.items():
        table.add_row(name, f"{value:.2f}")
    table.add_row("answers", str(Path(found.file)))
    return table
