"""Exceptions inside an operator's own methods, with what their author needs: module, rule, and the line of his file."""

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from ktransformers.errors import KTransformersError, RuleError


@contextlib.contextmanager
def named(operator: type, method: str, module: str, where: str) -> Iterator[None]:
    """Inside, an exception of `operator`'s code becomes a RuleError that names it, with the exception as its cause.

    What is no fault of the code passes with a note: this package's own errors, and memory and files that run out.
    `where` is the rule's place, such as "my.yaml:12", or "".
    """
    try:
        yield
    except (KTransformersError, MemoryError, OSError) as error:
        _note(error, operator, method, module, where)
        raise
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which this file does without
            raise RuleError(failure(error, operator, method, module, where)) from error
        _note(error, operator, method, module, where)
        raise
    except Exception as error:
        raise RuleError(failure(error, operator, method, module, where)) from error


def failure(error: BaseException, operator: type, method: str, module: str, where: str) -> str:
    """One line about an exception in `method` of the operator of `module`."""
    line = _line(error, operator)
    text, at = " ".join(str(error).split()), f" ({line})" if line else ""
    return f"{_place(operator, method, module, where)} raised {type(error).__name__}: {text}{at}"


def noting_failures(forward: Callable) -> Callable:
    """`forward` of an operator's class, with a note on exceptions that says which module of which rule it was."""

    @functools.wraps(forward)
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(self, *args, **kwargs)
        except Exception as error:
            _note(error, type(self), "forward", getattr(self, "key", ""), getattr(self, "rule", ""))
            raise

    return noted


def _note(error: BaseException, operator: type, method: str, module: str, where: str) -> None:
    if not getattr(error, "__notes__", None):  # the innermost operator's says enough
        error.add_note(f"in {_place(operator, method, module, where)}")


def _place(operator: type, method: str, module: str, where: str) -> str:
    return f"{where + ': ' if where else ''}{operator.__name__}.{method}{' for ' + module if module else ''}"


def _line(error: BaseException, operator: type) -> str:
    """The last line of the operator's own module that the exception came through, as "my_ops.py:12: code"."""
    own = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == operator.__module__:
            (summary,) = traceback.StackSummary.extract([(frame, number)])
            code = f": {summary.line}" if summary.line else ""
            own = f"{summary.filename.rpartition('/')[2]}:{number}{code}"
    return own
