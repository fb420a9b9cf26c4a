"""A training run from a training file: model, data, trainer, and what is written. Prints nothing."""

import json
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ktransformers.engine.load import load
from ktransformers.errors import KTransformersError, SFTError
from ktransformers.gguf_files.lora import is_gguf_lora
from ktransformers.machine.system import peak_memory
from ktransformers.sft.adapters import adapter_path, load_adapter
from ktransformers.sft.callbacks import PLOT, Log, Stop, Watcher, plot_losses
from ktransformers.sft.data import Example, read_examples
from ktransformers.sft.options import Options
from ktransformers.sft.rules import rule_of

EXTRA = ("peft", "trl", "datasets", "accelerate")
"""Packages of the extra `sft`."""


@dataclass
class Done:
    """What a run came to. Losses are means over a token; `tokens` are those of the examples of an epoch.
    `peak_bytes`: of RAM that the process had at most, `expected_bytes` what was predicted; 0: not known."""

    output_dir: str
    steps: int = 0
    stopped: bool = False
    train_loss: float | None = None
    eval_loss: float | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    expected_bytes: int = 0
    trained: int = 0
    trained_in_experts: int = 0
    examples: int = 0
    tokens: int = 0
    files: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


def need_extra() -> None:
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise SFTError(f"fine-tuning needs {', '.join(missing)}. Install with: pip install 'ktransformers[sft]'")


Told = Callable[[str], None]


def open_model(options: Options, notify: Told, on_step: Told, trains: bool) -> tuple[Any, Any]:
    """(model, tokenizer) of a training file, with its adapter where it names one."""
    from ktransformers import native
    from ktransformers.sft.templates import give_template

    for text in options.notices:
        notify(text)
    if options.cpu_infer:
        have = native.default_threads()
        if options.cpu_infer > have:
            notify(f"cpu_infer: {options.cpu_infer} threads asked for, {have} cores there")
        native.set_threads(min(options.cpu_infer, have))
    rule = rule_of(options.kt_optimize_rule, notify)
    model, tokenizer = load(
        options.model_name_or_path, options.kt_weight_path, rule, needs_template=False, progress=True, notify=notify,
        on_step=on_step,
    )  # fmt: skip
    _say(notify, give_template(tokenizer, options.template))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if options.adapter_name_or_path:
        model = _with_adapter(model, options.adapter_name_or_path, trains)
    return model, tokenizer


def _say(notify: Told, text: str) -> None:
    if text:
        notify(text)


def _with_adapter(model: Any, path: str, trains: bool) -> Any:
    if not trains:
        return load_adapter(model, path)
    if is_gguf_lora(adapter_path(path)):
        raise SFTError(f"adapter {path}: training goes on from a PEFT folder; make one with gguf_to_peft (tutorial 8).")
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, path, is_trainable=True)
    except (KeyError, RuntimeError, ValueError) as error:
        raise SFTError(f"adapter {path}: does not fit the model: {error}") from error


def train(options: Options, notify: Told = lambda text: None, on_step: Told = lambda text: None,
          watch: Watcher | None = None) -> Done:  # fmt: skip
    """Train as the file says; the adapter or the model, log and results are in `output_dir` afterwards.

    Ctrl-C ends it after the step under way; what was learnt until then is saved. Raises KTransformersError.
    """
    need_extra()
    folder = _output(options)
    pairs = options.stage == "dpo"
    learnt, held = _examples(options, pairs)
    model, tokenizer = open_model(options, notify, on_step, trains=True)

    from ktransformers.sft import targets, trainers, whole

    if options.finetuning_type != "lora":
        whole.unfreeze_by(model, options)
    on_step("tokenizing")
    split, counts = [], []
    for examples in (learnt, held):
        data, count = trainers.datasets_of(examples, tokenizer, options) if examples else (None, None)
        split.append(data)
        counts.append(count)
    if counts[0] is not None and (counts[0].cut or counts[0].dropped):
        cut, dropped = counts[0].cut, counts[0].dropped
        notify(f"cutoff_len {options.cutoff_len}: {cut} examples are cut, {dropped} have no answer left")
    adapts = options.finetuning_type == "lora" and not options.adapter_name_or_path
    config = targets.lora_config(model, options) if adapts else None
    stop = Stop()
    on_step("simulating a step, for its memory")
    expected = _expect(options, counts[0], notify) if options.do_train else 0
    on_step("preparing")
    trainer = trainers.make(model, tokenizer, options, tuple(split), config, [Log(folder, watch), stop])
    if config is not None and "all" in options.lora_target:
        _say(notify, targets.note_of(targets.without_adapter(trainer.model)))
    done = Done(str(folder), examples=len(learnt), tokens=counts[0].tokens if counts[0] else 0, expected_bytes=expected)
    done.trained, done.trained_in_experts = targets.count(trainer.model)
    if options.do_train:
        on_step("")
        _run(trainer, options, stop, done)
        done.peak_bytes = peak_memory()
    if options.do_eval or held:
        done.eval_loss = trainer.evaluate()["eval_loss"] if held else None
    _write(trainer, tokenizer, options, folder, done)
    return done


def _expect(options: Options, counts: Any, notify: Told) -> int:
    """Say what memory the run will take at most; bytes of RAM."""
    from ktransformers.sft import memory

    longest = counts.longest if counts and not options.packing else options.cutoff_len
    try:
        found = memory.predict(replace(options, cutoff_len=max(2, longest)), memory.capacity_here())
    except SFTError as error:
        notify(str(error))
        return 0
    notify(memory.in_words(found))
    return found.memory["cpu"]["total"]


_WRITTEN = {"an adapter": "adapter_config.json", "a model": "config.json"}


def _output(options: Options) -> Path:
    folder = Path(options.output_dir)
    resumes = options.passed.get("resume_from_checkpoint")
    if folder.is_file():
        raise SFTError(f"output_dir: {folder} is a file, expected a folder.")
    keeps = options.do_train and not options.overwrite_output_dir and not resumes
    if keeps and (found := [what for what, file in _WRITTEN.items() if (folder / file).exists()]):
        step = "Say overwrite_output_dir: true, or name another folder"
        raise SFTError(f"output_dir: {folder} holds {found[0]}. {step}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".probe").write_text("")
        (folder / ".probe").unlink()
    except OSError as error:
        raise SFTError(f"output_dir: {folder} cannot be written to: {error}") from error
    return folder


def _examples(options: Options, pairs: bool) -> tuple[list[Example], list[Example]]:
    """Examples to train on and to evaluate on."""
    how = options.dataset_dir, options.max_samples, options.default_system, pairs
    learnt = read_examples(options.dataset, *how)
    if options.eval_dataset:
        return learnt, read_examples(options.eval_dataset, *how)
    count = round(options.val_size * len(learnt)) if options.val_size < 1 else int(options.val_size)
    if options.val_size and not 0 < count < len(learnt):
        raise SFTError(f"val_size: {options.val_size:g} of {len(learnt)} examples leaves none for one side.")
    if count:
        random.Random(options.passed.get("seed", 42)).shuffle(learnt)
    return learnt[count:], learnt[:count]


def _run(trainer: Any, options: Options, stop: Stop, done: Done) -> None:
    resume = options.passed.get("resume_from_checkpoint") or None
    begun = time.monotonic()
    try:
        with stop.on_interrupt(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = trainer.train(resume_from_checkpoint=resume)
    except KTransformersError:
        raise
    except (ValueError, FileNotFoundError) as error:
        if resume:
            raise SFTError(f"resume_from_checkpoint: {resume}: {error}") from error
        raise
    done.seconds, done.steps, done.stopped = time.monotonic() - begun, trainer.state.global_step, stop.wanted
    done.train_loss = found.training_loss


def _write(trainer: Any, tokenizer: Any, options: Options, folder: Path, done: Done) -> None:
    """The adapter or the model, the tokenizer, results and curve."""
    from ktransformers.sft import targets

    if options.do_train:
        targets.forget_dropout(trainer.model)
        trainer.save_model(str(folder))
        tokenizer.save_pretrained(folder)
        trainer.save_state()
    results = {key: value for key, value in asdict(done).items() if key not in ("files", "output_dir")}
    (folder / "train_results.json").write_text(json.dumps(results, indent=2) + "\n")
    if options.plot_loss:
        try:
            plot_losses(trainer.state.log_history, folder / PLOT)
        except ImportError as error:
            raise SFTError("plot_loss needs matplotlib. Install with: pip install 'ktransformers[plot]'") from error
    done.files = sorted(str(path.relative_to(folder)) for path in folder.iterdir() if path.is_file())
