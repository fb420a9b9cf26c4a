"""`kt plan --train`: the memory of fine-tuning, by a training file or by a model alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from ktransformers.cli.common import quiet_transformers, show, working
from ktransformers.errors import KTransformersError

if TYPE_CHECKING:
    from ktransformers.cli.plan import PlanOptions
    from ktransformers.sft.memory import Prediction
    from ktransformers.sft.options import Options

INFERENCE = ("cache", "batch", "chunk_size", "strategy", "linear_op", "profile", "output", "plot")
"""Options of `kt plan` that say nothing about training."""

ROWS = {
    "weights": "weights", "trained": "what is trained", "gradients": "its gradients", "optimizer": "optimizer",
    "activations": "activations", "work": "Python, libraries, work space", "total": "total", "capacity": "capacity",
}  # fmt: skip
"""Parts of a prediction, as the table calls them."""


def plan_training(given: "PlanOptions") -> None:
    """Print what training takes. Exit code 1: it does not fit."""
    from ktransformers.machine import hardware as machines
    from ktransformers.sft.train import need_extra

    need_extra()
    for name in INFERENCE:
        if getattr(given, name) != getattr(type(given), name):
            flag = name.replace("_", "-")
            raise KTransformersError(f"--{flag} and --train: found both; a training file's keys say how.")
    quiet_transformers()
    options = training_options(given)
    with working("measuring this machine") as say:
        machine = machines.describe(given.gpu, given.ram or None, given.cores or None, progress=say)
        say("simulating a training step")
        from ktransformers.sft.memory import predict

        gpus = {f"cuda:{i}": gpu.memory for i, gpu in enumerate(machine.gpus)}
        found = predict(options, {"cpu": machine.cpu.available} | gpus, given.form)
    show(as_data(found), given.as_json, lambda: tables(found))
    if not found.fits:
        raise typer.Exit(1)


def training_options(given: "PlanOptions") -> "Options":
    """A training file's, where MODEL is one; else a model's, with a training file's defaults."""
    from ktransformers.sft.read import made_of, read

    if Path(given.model).suffix in (".yaml", ".yml"):
        options = read(given.model)
    else:
        options = made_of({"model_name_or_path": given.model})
    options.kt_weight_path = given.weights or options.kt_weight_path
    options.cutoff_len = given.context or options.cutoff_len
    return options


def as_data(found: "Prediction") -> dict[str, Any]:
    return {**vars(found), "fits": found.fits, "problems": found.problems}


def tables(found: "Prediction") -> list[Any]:
    from ktransformers.machine.units import format_bytes
    from ktransformers.sft.memory import ADVICE

    verdict = ("fits", "green") if found.fits else ("does not fit", "red")
    title = f"a step of {found.rows} sequences of {found.tokens} tokens"
    kept = "layers computed again in the backward" if found.checkpointing else "all activations kept"
    table = Table()
    table.add_column("")
    for device in found.memory:
        table.add_column(device, justify="right", style="red" if device in found.problems else None)
    for part, what in ROWS.items():
        table.add_row(what, *(format_bytes(row[part]) for row in found.memory.values()), end_section=part == "work")
    advice = [] if found.fits else [Text(ADVICE, style="yellow")]
    trained = f"{found.trained:,} values are trained, {found.trained_in_experts:,} of them in experts."
    head = Text.assemble((found.model, "bold"), f", {found.format}: ", verdict)
    return [head, Text(f"Memory of training, {title}; {kept}"), table, Text(trained), *advice]
