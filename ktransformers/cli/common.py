"""What every command shares: the two consoles, one handling of errors, results as tables or JSON, common options.

Exit codes: 0 done, 1 an error or a problem found, 2 a wrong flag (typer's own), 130 Ctrl-C. Nothing heavy is imported:
a shell runs this file each time it completes a word.
"""

import gc
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from ktransformers.errors import KTransformersError
from ktransformers.paths import write_whole

T = TypeVar("T")

CACHES = ("f32", "f16", "bf16", "q8_0", "fp8")
"""Types of a cache, those of `native.pages`, which completion does without."""

WIDTH = 100
"""Columns of what is not read on a terminal, which has a width of its own."""


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    terminal = stream is not None and stream.isatty()
    return Console(stderr=stderr, highlight=False, width=None if terminal or "COLUMNS" in os.environ else WIDTH)


out = _console(stderr=False)
"""Results. Coloured on a terminal only."""

err = _console(stderr=True)
"""Errors, notes and progress."""


# ---- errors ------------------------------------------------------------------------------------------------

UsageError = typer.BadParameter.__bases__[0]
"""What typer raises for arguments that it cannot use. It has no public name there."""


class _Interrupted(Exception):
    """Ctrl-C, as an exception that typer leaves alone."""


class _Endings:
    """A program whose errors, wherever they come from, end alike.

    An error is a message on standard error and an exit code; with --json among the arguments also one line on standard
    output, ``{"error": {"message": ..., "type": ...}}``. So for KTransformersError, wrong arguments and Ctrl-C; any
    other exception is a defect, which keeps its traceback too.
    """

    def main(self, args: Sequence[str] | None = None, *rest: Any, **given: Any) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in args
        try:
            code = super().main(args, *rest, **{**given, "standalone_mode": False})
        except KTransformersError as error:
            code = fail(error, as_json)
        except UsageError as error:
            from typer.rich_utils import rich_format_error

            rich_format_error(error)
            _print_object(error_object(error, error.format_message()), as_json)
            code = error.exit_code
        except _Interrupted:
            code = interrupted(as_json)
        except Exception as error:
            _print_object(error_object(error), as_json)
            raise
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Typer would turn Ctrl-C into an exit code, and nothing would be said."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted from error


class Program(_Endings, TyperGroup):
    """A program of several commands."""


class OneCommand(_Endings, TyperCommand):
    """A program that is one command."""


def note(text: str) -> None:
    """Print what a person should know though it stops nothing."""
    err.print(Text.assemble(("note: ", "yellow"), text), soft_wrap=True)


def print_error(text: str) -> None:
    """Print what stopped a command, or a part of it."""
    err.print(Text.assemble(("error: ", "red"), text), soft_wrap=True)


def error_object(error: BaseException, message: str = "") -> dict[str, Any]:
    """What --json prints where something failed. `message`: where the error's own text is not it."""
    return {"error": {"message": message or str(error), "type": type(error).__name__}}


def fail(error: KTransformersError, as_json: bool) -> int:
    """Report an error; returns the exit code."""
    print_error(str(error))
    _print_object(error_object(error), as_json)
    return 1


def interrupted(as_json: bool) -> int:
    """Report Ctrl-C; returns the exit code, a shell's own."""
    err.print("interrupted")
    _print_object(error_object(KeyboardInterrupt(), "interrupted"), as_json)
    return 130


def _print_object(data: dict[str, Any], as_json: bool) -> None:
    if not as_json:
        return
    try:
        print(json.dumps(data), flush=True)
    except OSError:
        drop_output()  # standard error has said it


def drop_output() -> None:
    """Nothing reaches standard output any more, so that flushing it at exit cannot fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- results -----------------------------------------------------------------------------------------------


def show(data: Any, as_json: bool, render: Callable[[], Any]) -> None:
    """Print `data` as one JSON object if `as_json`, else what `render()` returns: a rich renderable, or several.

    `data` may hold dataclasses, paths, and numbers that are not finite, which become null. Raises KTransformersError
    when standard output cannot be written.
    """
    if sys.stdout is None:
        raise KTransformersError("standard output is closed, so there is nowhere to print to. Run without >&-.")
    try:
        if as_json:
            print(json.dumps(plain(data), indent=2, allow_nan=False))
        else:
            found = render()
            for renderable in found if isinstance(found, (list, tuple, Iterator)) else [found]:
                out.print(renderable)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # whoever read this has seen enough; typer ends quietly
    except OSError as error:
        drop_output()
        raise KTransformersError(
            f"standard output cannot be written: {error}. Free space, or write elsewhere."
        ) from error


def plain(value: Any) -> Any:
    """`value` in the types that JSON has."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


@contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is going on; call the value with other words as it changes. Nothing stays on screen."""
    with err.status(text) as status:
        yield status.update


def new_file(text: str, flag: str, force: bool) -> Path | None:
    """The path of an output flag, None where it is not given. Raises KTransformersError, before anything is computed,
    for one that cannot be written, and for a file that exists unless `force`."""
    if not text:
        return None
    try:
        path = Path(text).expanduser().resolve()
        wrong = path.is_dir() or not path.parent.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, the home of nobody, a zero byte
        raise KTransformersError(f"{flag} {text[:200]}: {error}. Choose another path.") from error
    if wrong:
        raise KTransformersError(f"{flag} {text}: is a folder, or its folder does not exist; expected a file's path.")
    if path.is_file() and not force:  # a device or a pipe is just written to
        raise KTransformersError(f"{flag} {text}: exists already. Choose another path, or overwrite it with --force.")
    return path


def write_file(path: Path, text: str, flag: str) -> None:
    """Write all of a file or nothing: what is there may be the only copy. Raises KTransformersError."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise KTransformersError(
            f"{flag} {path}: cannot be written: {error.strerror or error}. Choose another path, or free space."
        ) from error


def before_torch() -> None:
    """What a program of its own sets before it imports torch.

    OpenMP's idle threads sleep: those that spin hold the cores that the C library's threads need. On two cores with
    one of them busy elsewhere, decoding was 17 times slower with spinning than with sleeping. The garbage collector
    looks for cycles less often: torch and transformers make millions of objects that stay, and looking at them again
    and again takes 10 to 15 % of the time to import both.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    gc.set_threshold(200_000, 20, 100)


def renamed_devices(pairs: Iterable[str]) -> dict[str, str]:
    """What --devices says: name in the rules -> device. Raises KTransformersError."""
    named = {}
    for text in pairs:
        name, sign, becomes = text.partition("=")
        if not (name and sign and becomes):
            raise KTransformersError(f"--devices {text!r}: expected NAME=NAME, such as cuda=cpu.")
        named[name] = becomes
    return named


def quiet_transformers() -> None:
    """Keep transformers' notes on a config out of what a command prints."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def taking(options: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Make a command of a function of one dataclass: its fields, annotated for typer, are the command's parameters."""

    def decorate(command: Callable[[T], None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            command(options(**given))

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = Signature([_parameter(field) for field in fields(options)])
        run.__annotations__ = {field.name: field.type for field in fields(options)}
        return run

    return decorate


def _parameter(field: Field) -> Parameter:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    default = Parameter.empty if default is MISSING else default
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=field.type)


# ---- completion --------------------------------------------------------------------------------------------


def complete_rule(incomplete: str) -> list[str]:
    """Names of packaged rule files. The shell completes paths where no name fits."""
    from ktransformers import optimize_rules

    files = [path.stem for path in Path(optimize_rules.__file__).parent.glob("*.yaml")]
    return _starting(incomplete, [*optimize_rules.NAMES, *files])


def complete_model(incomplete: str) -> list[str]:
    """Names of known models. The shell completes paths where no name fits."""
    try:
        from ktransformers.models import known
    except ImportError:
        return []
    return _starting(incomplete, known.known_names())


def complete_gpu(incomplete: str) -> list[str]:
    """Names of known GPUs."""
    from ktransformers.machine.gpus import GPU_MODELS

    return _starting(incomplete, GPU_MODELS)


def _starting(incomplete: str, names: Any) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})


# ---- options that several commands have --------------------------------------------------------------------

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A folder with config.json, the file itself, a .gguf, or a known model (kt list models).",
        autocompletion=complete_model,
    ),
]
RuleArgument = Annotated[
    str,
    typer.Argument(help="A rule file, or the name of a packaged one (kt list rules).", autocompletion=complete_rule),
]
WeightsOption = Annotated[
    str, typer.Option("--weights", help="A checkpoint; its headers give types and sizes, nothing is loaded.")
]
FormatOption = Annotated[
    str,
    typer.Option(
        "--format",
        help="How weights are stored: Q4_K_M, FP8 ... (kt list formats), or published; default: as in MODEL's own "
        "weights, without them as published.",
    ),
]
DevicesOption = Annotated[
    list[str],
    typer.Option(
        "--devices", metavar="NAME=NAME", help="Rename devices of the rules, such as cuda=cpu; may be repeated."
    ),
]
"""Read by `renamed_devices`."""


def check_adapter(path: str) -> None:
    """What is wrong with --adapter by its looks, before a model is loaded. Raises KTransformersError."""
    if path:
        from ktransformers.sft.adapters import adapter_path

        adapter_path(path)


def with_adapter(model: Any, path: str) -> Any:
    """The loaded `model`, with the adapter at `path` where one is given. Raises KTransformersError."""
    if not path:
        return model
    from ktransformers.sft.adapters import load_adapter

    return load_adapter(model, path).get_base_model()


@contextmanager
def token_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar of tokens on a terminal; call the value with how many more are done."""
    from rich.progress import Progress

    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task("tokens", total=total)
        yield lambda count: progress.advance(bar, count)


def check_cache(option: str, kind: str) -> None:
    """Raises KTransformersError for a type of a cache that there is not."""
    if kind not in CACHES:
        raise KTransformersError(f"{option} {kind!r}: expected one of {', '.join(CACHES)}.")


def _checked_cache(kind: str) -> str:
    if kind:
        check_cache("--cache", kind)
    return kind


CacheOption = Annotated[
    str,
    typer.Option(
        "--cache", metavar="TYPE", autocompletion=lambda incomplete: _starting(incomplete, CACHES),
        callback=_checked_cache,
        help="How keys and values are kept, f32, f16, bf16, or q8_0 (53 % of bf16), or latents on a GPU, fp8; default: "
        "the model's dtype.",
    ),
]  # fmt: skip
AdapterOption = Annotated[
    str, typer.Option("--adapter", metavar="PATH", help="A PEFT folder, or a GGUF LoRA file. Weights stay as they are.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
WeightsOption = Annotated[
    str, typer.Option("--weights", "-w", help="A .gguf, a .safetensors or a folder; default: MODEL's own.")
]
RuleOption = Annotated[
    str, typer.Option("--rule", "-r", autocompletion=complete_rule, help="Rule file, or its name; default: by family.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
