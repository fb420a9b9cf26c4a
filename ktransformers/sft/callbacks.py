"""What a person and other programs see of a training run: trainer_log.jsonl, the loss curve, and a stop that saves."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LOG = "trainer_log.jsonl"
PLOT = "training_loss.png"

Watcher = Callable[[dict[str, Any]], None]
"""Called with a line of the log, and at each step with current_steps, total_steps and tokens."""


class Log(TrainerCallback):
    """A line for each logged step, with LLaMA-Factory's keys; times are seconds, as text h:mm:ss."""

    def __init__(self, folder: Path, watch: Watcher | None = None) -> None:
        self.path, self.watch, self._begun, self._tokens = folder / LOG, watch, 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun, self._first = time.monotonic(), state.global_step
        if state.global_step == 0:  # else the log of what is continued goes on
            self.path.unlink(missing_ok=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.watch is not None:
            self.watch({"current_steps": state.global_step, "total_steps": state.max_steps})

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        if not {"loss", "eval_loss"} & logs.keys() or not state.is_world_process_zero:
            return
        elapsed, done = time.monotonic() - self._begun, state.global_step - self._first
        left = elapsed / done * (state.max_steps - state.global_step) if done else 0.0
        tokens = int(logs.get("num_tokens", 0))
        line = {
            "current_steps": state.global_step, "total_steps": state.max_steps, "loss": logs.get("loss"),
            "eval_loss": logs.get("eval_loss"), "lr": logs.get("learning_rate"), "epoch": logs.get("epoch"),
            "percentage": round(100 * state.global_step / max(state.max_steps, 1), 2),
            "elapsed_time": _clock(elapsed), "remaining_time": _clock(left),
            "throughput": round(tokens / elapsed, 1) if tokens and elapsed else None, "total_tokens": tokens or None,
        }  # fmt: skip
        line = {key: value for key, value in line.items() if value is not None}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.watch is not None:
            self.watch(line)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class Stop(TrainerCallback):
    """Ends training after the step under way, and has it saved, once `wanted`."""

    wanted = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.wanted:
            control.should_training_stop = control.should_save = True

    on_substep_end = on_step_end

    @contextmanager
    def on_interrupt(self) -> Iterator[None]:
        """While it lasts, the first Ctrl-C asks for the stop; a second one is Python's own."""

        def ask(number: int, frame: Any) -> None:
            self.wanted = True
            signal.signal(signal.SIGINT, before)

        try:
            before = signal.signal(signal.SIGINT, ask)
        except ValueError:  # not in the main thread: whoever is there decides
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def plot_losses(history: list[dict[str, Any]], path: Path) -> bool:
    """Draw the losses of a run as a PNG; False where there are fewer than two. ImportError: no matplotlib."""
    curves = {name: [(row["step"], row[name]) for row in history if name in row] for name in ("loss", "eval_loss")}
    if len(curves["loss"]) < 2:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    smooth, mean = [], curves["loss"][0][1]
    for step, loss in curves["loss"]:
        mean = 0.9 * mean + 0.1 * loss
        smooth.append((step, mean))
    axes.plot(*zip(*curves["loss"], strict=True), color="#9ecae1", label="loss")
    axes.plot(*zip(*smooth, strict=True), color="#08519c", label="loss, smoothed")
    if curves["eval_loss"]:
        axes.plot(*zip(*curves["eval_loss"], strict=True), "o-", color="#d94801", label="evaluation")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
