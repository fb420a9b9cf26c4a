"""Paths that users write, and text files that appear whole or not at all."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import TypeVar

from ktransformers.errors import KTransformersError

_E = TypeVar("_E", bound=KTransformersError)


def existing_path(text: str | Path, subject: str, kind: type[_E] = KTransformersError) -> Path | None:
    """The path that `text` spells, `~` expanded, or None where nothing is there.

    Raises `kind` for what cannot be looked up: a name too long or with a zero byte, the home of nobody, a folder that
    may not be read.
    """
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).rstrip(".")
        raise kind(f"{subject} {str(text)[:80]!r}: cannot be looked up: {reason}. Check the path.") from error
    return path


def write_whole(path: Path, text: str) -> None:
    """Write `text` in one step, so that a full disk leaves what was there, which may be the only copy, with its mode.

    A device or a pipe is just written to. Raises OSError.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
