"""What modules at upstream's paths need: a warning that says where their names are today, and what became of others.

The modules are `ktransformers/util/` and a few files of `ktransformers.models`; nothing of this package imports them.
"""

import warnings
from collections.abc import Callable, Mapping


def older_path(path: str, today: str) -> None:
    """Warn, at the line that imports module `path`, that `today` is where its names are. Call it in that module."""
    warnings.warn(f"{path} is an older path, today's is {today}; the import works as it is", UserWarning, stacklevel=3)


def gone(path: str, instead: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of module `path`, for names that have no equivalent: name -> what to use instead."""

    def missing(name: str) -> object:
        if name in instead:
            raise ImportError(f"{path}.{name} does not exist here: {instead[name]}.", name=path)
        raise AttributeError(f"module {path!r} has no attribute {name!r}")

    return missing
