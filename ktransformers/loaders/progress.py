"""Loading as a progress bar, on a terminal only. Decides nothing, changes nothing."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ktransformers.loaders.weights import ModelWeights


@contextlib.contextmanager
def load_progress(source: ModelWeights, enabled: bool) -> Iterator[None]:
    """Show a bar over the tensors of `source` while the block reads them, on a terminal only."""
    console = Console(stderr=True)
    columns = (
        TextColumn("loading"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal), transient=True) as bar:
        task = bar.add_task("", total=len(source.names()))
        read: set[str] = set()  # experts in two parts read a tensor for each

        def tell(name: str) -> None:
            bar.update(task, advance=name not in read, description=name)
            read.add(name)

        source.on_read = tell
        try:
            yield
        finally:
            source.on_read = None
