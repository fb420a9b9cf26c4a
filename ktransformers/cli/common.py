"""What every command shares: the two consoles, errors as one line and an exit code, results as tables or JSON.

Exit codes: 0 done, 1 an error or a problem found, 2 a wrong flag (typer's own), 130 Ctrl-C. Nothing heavy is imported:
a shell runs this file each time it completes a word.
"""

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from ktransformers.errors import KTransformersError

P = ParamSpec("P")
T = TypeVar("T")

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


DevicesOption = Annotated[
    list[str],
    typer.Option(
        "--devices", metavar="NAME=NAME", help="Rename devices of the rules, such as cuda=cpu; may be repeated."
    ),
]
"""The --devices of every command that reads rules; `renamed_devices` reads it."""


def renamed_devices(pairs: Iterable[str]) -> dict[str, str]:
    """What --devices says: name in the rules -> device. Raises KTransformersError."""
    named = {}
    for text in pairs:
        name, sign, becomes = text.partition("=")
        if not (name and sign and becomes):
            raise KTransformersError(f"--devices {text!r}: expected NAME=NAME, such as cuda=cpu.")
        named[name] = becomes
    return named


def passive_openmp() -> None:
    """Let OpenMP's idle threads sleep; called before torch loads it.

    Those that spin hold the cores that the C library's threads need. On two cores with one of them busy elsewhere,
    decoding was 17 times slower with spinning than with sleeping.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def note(text: str) -> None:
    """Print what a person should know though it stops nothing."""
    err.print(Text.assemble(("note: ", "yellow"), text), soft_wrap=True)


def print_error(text: str) -> None:
    """Print what stopped a command, or a part of it."""
    err.print(Text.assemble(("error: ", "red"), text), soft_wrap=True)


def error_object(error: BaseException) -> dict[str, Any]:
    """What --json prints where something failed: message and kind."""
    return {"error": {"message": str(error), "type": type(error).__name__}}


def errors(command: Callable[P, T]) -> Callable[P, T]:
    """Decorate a command: KTransformersError becomes `error: ...` and exit code 1, Ctrl-C exit code 130."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except KTransformersError as error:
            print_error(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            err.print("interrupted")
            raise typer.Exit(130) from None

    return wrapped


def show(data: Any, as_json: bool, render: Callable[[], Any]) -> None:
    """Print `data` as one JSON object if `as_json`, else what `render()` returns: a rich renderable, or several.

    `data` may hold dataclasses, paths, and numbers that are not finite, which become null. Raises KTransformersError
    when standard output cannot be written.
    """
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing at exit cannot fail again
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
    """Show on a terminal that something goes on; call the value with other words as it does. Nothing is left behind."""
    with err.status(text) as status:
        yield status.update


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


def complete_card(incomplete: str) -> list[str]:
    """Names of known GPUs."""
    from ktransformers.machine.gpus import GPU_MODELS

    return _starting(incomplete, GPU_MODELS)


def _starting(incomplete: str, names: Any) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})
