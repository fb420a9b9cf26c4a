"""The prefix cache's layer on disk: blocks written behind by a thread of its own, read when they are asked for.

The engine's thread never waits for a write: what does not fit into the queue is dropped. Nothing that a disk or a clock
does is an error here: without a disk, and with a full or a damaged one, the cache is just colder. A folder may be used
by several processes at once, and one may delete it: files are looked for, not remembered.

Which blocks were used last is kept as the files' times of modification. They serve as numbers of an order and are only
raised, so it is kept wherever the clock jumps.
"""

import contextlib
import os
import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktransformers.engine import block_files
from ktransformers.engine.block_files import BlockDamaged, Buffer, Header
from ktransformers.errors import KTransformersError


@dataclass
class Counts:
    """What has happened since the start, in blocks."""

    read: int = 0
    written: int = 0
    dropped: int = 0
    """Not written: the queue was full, or the disk has failed lately."""
    failed: int = 0
    """Not written, as the disk could not."""
    refused: int = 0
    """Found damaged or another model's, and deleted."""
    evicted: int = 0


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


class DiskBlocks:
    """The blocks of model `key` in `folder`, which may hold those of other models too, together `limit` bytes at most.

    `header` and `get` are for any thread, all else for the engine's. `notify` is called with the first thing that goes
    wrong.
    """

    retry_after = 60.0
    """Seconds without a write after one that failed."""
    look_after = 256
    """Writes after which it is counted again what is in the folder, where others may write too."""

    def __init__(
        self, folder: str | Path, limit: int, key: bytes, pending: int = 256 << 20, title: str = "",
        notify: Callable[[str], None] = _warn,
    ) -> None:  # fmt: skip
        """`pending`: most bytes that wait to be written. `title`: what people call the model, for `kt cache ls`. Raises
        KTransformersError for a key of more than 64 bytes."""
        if not 0 < len(key) <= 64:
            raise KTransformersError(f"disk cache: found a key of {len(key)} bytes, expected 1 to 64.")
        self.folder, self.limit, self.model, self.pending = Path(folder).expanduser(), limit, key.hex(), pending
        self.counts, self.title = Counts(), title
        self._notify: Callable[[str], None] | None = notify
        self._order: OrderedDict[Path, int] = OrderedDict()  # least recently used first -> bytes
        self._nbytes, self._last_use, self._unseen = 0, 0, 0
        self._jobs: deque[tuple[int, Callable[[], None]]] = deque()
        self._queued: dict[bytes, int] = {}  # key -> times that it waits
        self._waiting = 0
        self._finished: deque[Any] = deque()
        self._paused_until = 0.0
        self._state = threading.Condition()  # guards all above
        self._closing, self._busy = False, False
        self._submit(0, self._start)
        self._thread = threading.Thread(target=self._run, name="kt-disk-blocks", daemon=True)
        self._thread.start()

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks in the folder, as last counted."""
        return self._nbytes

    @property
    def takes(self) -> bool:
        """Whether `put` would take a small block just now."""
        return not self._closing and self._waiting < self.pending and time.monotonic() >= self._paused_until

    # --- for the engine -------------------------------------------------------------------------------

    def has(self, key: bytes) -> bool:
        """Whether a block is there, or about to be."""
        path = self._path(key)
        return key in self._queued or path in self._order or path.exists()

    def header(self, key: bytes) -> Header | None:
        """What `put` was told of a block; None where there is no sound one."""
        return self._trusted(key, lambda path: block_files.read_header(path))

    def get(self, key: bytes, allocate: Callable[[Header], Sequence[Any]]) -> Header | None:
        """The header of a block, its parts in the writable buffers that `allocate` gives for it. None where there is no
        sound one; `allocate` too may raise BlockDamaged."""
        found = self._trusted(key, lambda path: block_files.read(path, allocate))
        with self._state:
            self.counts.read += found is not None
        return found

    def put(self, key: bytes, header: Header, parts: Sequence[Buffer], ticket: Any = None) -> bool:
        """Have a block written soon, unless there is one of as many parts; False where it will not be.

        The parts must stay as they are until `finished` gives `ticket` back.
        """
        size = sum(len(part) for part in parts)
        with self._state:
            if not self.takes or self._waiting and self._waiting + size > self.pending or size > self.limit:
                self.counts.dropped += 1
                return False
            self._queued[key] = self._queued.get(key, 0) + 1
        self._submit(size, lambda: self._write(key, header, parts, ticket))
        return True

    def touch(self, keys: Sequence[bytes]) -> None:
        """These blocks were used just now; the last one counts as the one used last."""
        if keys:
            self._submit(0, lambda: self._touch([self._path(key) for key in keys]))

    def finished(self) -> list[Any]:
        """Tickets of what is written, or given up, since the last call."""
        found = []
        while self._finished:
            found.append(self._finished.popleft())
        return found

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything is written; whether it is."""
        with self._state:
            return self._state.wait_for(lambda: not self._jobs and not self._busy, timeout)

    def close(self, timeout: float | None = 10.0) -> None:
        """Write what waits, and end the thread."""
        with self._state:
            self._closing = True
            self._state.notify_all()
        self._thread.join(timeout)

    def _path(self, key: bytes) -> Path:
        return block_files.path_of(self.folder, self.model, key)

    def _trusted(self, key: bytes, read: Callable[[Path], Header]) -> Header | None:
        path = self._path(key)
        try:
            return read(path)
        except BlockDamaged as error:
            with contextlib.suppress(OSError):
                path.unlink()
            with self._state:
                self.counts.refused += 1
            self._problem(f"{error} It is deleted and computed again")
        except FileNotFoundError:
            pass  # evicted by another process
        except OSError as error:
            self._problem(f"{path}: cannot be read ({error.strerror or error}); it is computed again")
        self._forget(path)
        return None

    # --- the thread -----------------------------------------------------------------------------------

    def _submit(self, size: int, job: Callable[[], None]) -> None:
        with self._state:
            self._jobs.append((size, job))
            self._waiting += size
            self._state.notify_all()

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # of this thread alone: Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while True:
            with self._state:
                self._state.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
                (size, job), self._busy = self._jobs.popleft(), True
            try:
                job()
            except Exception as error:  # the engine goes on without
                self._problem(f"{self.folder}: {type(error).__name__}: {error}")
            del job
            with self._state:
                self._waiting -= size
                self._busy = False
                self._state.notify_all()

    def _start(self) -> None:
        block_files.remove_leftovers(self.folder)
        self._look()

    def _look(self) -> None:
        """Count what is in the folder."""
        found = sorted(block_files.block_files(self.folder), key=lambda file: file.used)
        order, nbytes = OrderedDict((file.path, file.size) for file in found), sum(file.size for file in found)
        with self._state:
            self._order, self._nbytes, self._unseen = order, nbytes, 0
        self._last_use = max([self._last_use, *(file.used for file in found[-1:])])
        self._evict()

    def _write(self, key: bytes, header: Header, parts: Sequence[Buffer], ticket: Any) -> None:
        path = self._path(key)
        try:
            if not self._is_there(path, len(parts)):
                header = {"model": self.model, "title": self.title, "key": key.hex(), **header}
                self._remember(path, block_files.write(path, header, parts))
                self.counts.written += 1
                self._unseen += 1
            self._touch([path])
        except OSError as error:
            self.counts.failed += 1
            self._paused_until = time.monotonic() + self.retry_after
            why = error.strerror or error
            self._problem(f"{self.folder}: cannot be written ({why}). Free space, or choose another with KT_CACHE_DIR")
        finally:
            with self._state:
                self._queued[key] -= 1
                if not self._queued[key]:
                    del self._queued[key]
            self._finished.append(ticket)
        self._evict()
        if self._unseen >= self.look_after:
            self._look()

    def _is_there(self, path: Path, parts: int) -> bool:
        try:
            return len(block_files.read_header(path)["parts"]) >= parts
        except (OSError, BlockDamaged):
            return False

    def _touch(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._last_use = max(time.time_ns(), self._last_use + 1)
            with contextlib.suppress(OSError, OverflowError):
                os.utime(path, ns=(self._last_use, self._last_use))
            with self._state:
                if path in self._order:
                    self._order.move_to_end(path)

    def _evict(self) -> None:
        while self._nbytes > self.limit:
            with self._state:
                path = next(iter(self._order), None)
            if path is None:
                return
            try:
                path.unlink(missing_ok=True)
                self.counts.evicted += 1
            except OSError as error:
                self._problem(f"{path}: cannot be deleted ({error.strerror or error})")
            self._forget(path)

    def _remember(self, path: Path, size: int) -> None:
        with self._state:
            self._nbytes += size - self._order.pop(path, 0)
            self._order[path] = size

    def _forget(self, path: Path) -> None:
        with self._state:
            self._nbytes -= self._order.pop(path, 0)

    def _problem(self, text: str) -> None:
        """Say the first one; the rest is in the counts."""
        notify, self._notify = self._notify, None
        if notify is not None:
            with contextlib.suppress(Exception):  # a warning may be an error where it is said
                notify(f"disk cache: {text}. This is said once; all works without, only colder.")
