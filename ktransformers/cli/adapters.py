"""`--adapter` of `kt serve`: which adapter is for everybody, and which ones have names of their own."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktransformers.cli.common import check_adapter, with_adapter
from ktransformers.errors import KTransformersError

if TYPE_CHECKING:
    from ktransformers.engine.forms import Forms

AdaptersOption = Annotated[
    list[str],
    typer.Option(
        "--adapter", metavar="[NAME=]PATH",
        help="A PEFT folder, or a GGUF LoRA file. NAME=PATH: a model of that name beside MODEL, on the same weights; "
        "may be repeated. PATH: for all requests.",
    ),
]  # fmt: skip
"""Read by `asked_adapters`."""


@dataclass(frozen=True)
class AskedAdapters:
    """`path`: of the adapter for all requests, "" where there is none; `named`: name -> path."""

    path: str = ""
    named: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> str | None:
        """What the adapter for all requests is called where it lies."""
        return Path(self.path).name or None

    @property
    def roots(self) -> dict[str, str]:
        """The same of those with names: clients are not told where on this machine."""
        return {name: Path(path).resolve().name for name, path in self.named.items()}

    @property
    def identity(self) -> bytes:
        """Of the adapter for all requests, by its contents."""
        from ktransformers.sft.adapters import identity_of

        return identity_of(self.path) if self.path else b""

    def check(self) -> None:
        """What is wrong by their looks, before a model is loaded. Raises KTransformersError."""
        for path in (self.path, *self.named.values()):
            check_adapter(path)

    def put_onto(self, model: Any) -> "tuple[Any, Forms]":
        """The loaded model, and its forms with the adapters that have names. Raises KTransformersError."""
        from ktransformers.engine.forms import Forms
        from ktransformers.sft.adapters import identity_of, load_adapter

        model = with_adapter(model, self.path)
        forms = Forms(model)
        for name, path in self.named.items():
            forms.add(name, lambda model, path=path: load_adapter(model, path), identity_of(path))
        return model, forms


def asked_adapters(given: Sequence[str], own_names: Sequence[str]) -> AskedAdapters:
    """The option's values. `own_names`: of the model, which no adapter may have. Raises KTransformersError."""
    plain = [text for text in given if "=" not in text or os.path.exists(text)]
    named: dict[str, str] = {}
    for text in given:
        if text in plain:
            continue
        name, _, path = text.partition("=")
        if not name or not path or name != name.strip():
            raise KTransformersError(f"--adapter {text!r}: expected PATH or NAME=PATH.")
        if name in named or name in own_names:
            whose = "another adapter's" if name in named else "the model's own"
            raise KTransformersError(f"--adapter {text}: the name {name!r} is {whose}. Choose another name.")
        named[name] = path
    if len(plain) + bool(named) > 1:
        raise KTransformersError(
            f"--adapter {plain[-1]}: an adapter without a name is for all requests, so it is the only one. Give each a "
            "name: --adapter NAME=PATH."
        )
    return AskedAdapters("".join(plain), named)
