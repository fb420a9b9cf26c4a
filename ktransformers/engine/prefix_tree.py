"""The prefix cache: which blocks of tokens there are in memory and on disk, found by what they and all before them are.

A block's key is a hash of the 64 tokens and of the key of the block before; that of the first one's is the model's
fingerprint. So a prompt's blocks are found one after the other, and a tree of them needs no nodes but the blocks. Pages
are shared with the caches that computed them and with those that go on from them. For one thread.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from ktransformers.engine.block_files import Header, block_key
from ktransformers.engine.blocks import Block, Caches, Source
from ktransformers.engine.disk_blocks import DiskBlocks
from ktransformers.native.pages import PAGE
from ktransformers.operators.paged_cache import PagedCache

READERS = 2
"""Threads that read files of blocks: while one copies or waits for the disk, another computes a checksum. On two cores
two took 262 ms for 201 MB where one took 425, and more took as long as two (Xeon with AVX-512)."""


@dataclass
class Uses:
    """What lookups found since the start. `tokens` were asked for, and of these `hit` found, `read` of them on disk."""

    lookups: int = 0
    tokens: int = 0
    hit: int = 0
    read: int = 0
    inserted: int = 0
    """Blocks that were new."""
    evicted: int = 0
    """Blocks that memory no longer holds."""


class PrefixTree:
    """Blocks of the prompts that `model` has computed: in memory, `limit` bytes at most, and behind that on `disk`.

    Who runs a sequence calls `lookup` before its prompt, and `insert` after each chunk of it and when it ends. Of a
    model whose cache is on a GPU, or not all pages and states, nothing is kept and both do nothing.
    """

    def __init__(self, model: nn.Module, key: bytes, limit: int, disk: DiskBlocks | None = None) -> None:
        """`key`: of all that decides the numbers, as `fingerprint` makes it; that of `disk` should be the same."""
        self.key, self.limit, self.disk, self.uses, self.nbytes = key, limit, disk, Uses(), 0
        self._caches = Caches(model)
        # Least recently used first. Who uses a block uses those before it later, so a block comes before its parent.
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()

    @property
    def blocks(self) -> int:
        """How many memory holds."""
        return len(self._blocks)

    # --- finding ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def lookup(self, ids: Sequence[int], salt: bytes = b"") -> tuple[PagedCache | None, int]:
        """A cache of one sequence with the longest prefix of `ids` that is known, and how many tokens that is.

        Always whole blocks, and fewer than all tokens, as the last one is to be computed; (None, 0) where that is
        nothing. The cache shares pages: whoever goes on writes to pages of its own. Reads what only the disk has.
        `salt`: what decides the numbers besides the model, such as an adapter's identity.
        """
        self._settle()
        self.uses.lookups += 1
        self.uses.tokens += len(ids)
        if not self._caches.usable:
            return None, 0
        blocks = self._found(ids, salt)
        if not blocks:
            return None, 0
        cache = self._caches.filled(blocks)
        self._used([block.key for block in blocks], on_disk=True)
        self.uses.hit += len(blocks) * PAGE
        self._shrink()
        return cache, len(blocks) * PAGE

    def _keys(self, ids: Sequence[int], count: int, salt: bytes = b"") -> Iterator[tuple[bytes, bytes, bytes]]:
        """Parent, key and ids of the first `count` blocks."""
        data, parent = array("q", ids[: count * PAGE]).tobytes(), block_key(self.key, salt) if salt else self.key
        for at in range(count):
            part = data[at * 8 * PAGE : (at + 1) * 8 * PAGE]
            key = block_key(parent, part)
            yield parent, key, part
            parent = key

    def _found(self, ids: Sequence[int], salt: bytes) -> list[Block]:
        """The longest chain of blocks of `ids` that a cache can be made of, in memory."""
        keys, chain = [], []
        for _, key, _ in self._keys(ids, (len(ids) - 1) // PAGE, salt):
            told = self._told(key)
            if told is None:
                break
            keys.append(key)
            chain.append(told)
        while count := self._caches.longest(chain):
            sound = self._read(keys[:count])
            if sound == count:
                return [self._blocks[key] for key in keys[:count]]
            del chain[sound:]
        return []

    def _told(self, key: bytes) -> tuple[frozenset[int], bool] | None:
        """What `longest` wants to know of a block; None where there is none."""
        block = self._blocks.get(key)
        if block is not None:
            return block.missing, block.states is not None
        if self.disk is None or not self.disk.has(key):
            return None
        if self._caches.anywhere:
            return frozenset(), False
        header = self.disk.header(key)
        return None if header is None else self._caches.described(header)

    def _read(self, keys: Sequence[bytes]) -> int:
        """Have these blocks in memory; how many, from the first on, are."""
        absent = [key for key in keys if key not in self._blocks]
        found = [self._of_file(key) for key in absent[:1]]  # alone: it may say what the layers are like
        if found and found[0] is not None and len(absent) > 1:
            with ThreadPoolExecutor(READERS) as readers:
                found += readers.map(self._of_file, absent[1:])
        for block in takewhile(lambda block: block is not None, found):
            block.use(1)
            self._add(block)
            self.uses.read += PAGE
        return sum(1 for _ in takewhile(lambda key: key in self._blocks, keys))

    def _of_file(self, key: bytes) -> Block | None:
        """The block on disk. For any thread."""
        made: list[Block] = []

        def allocate(header: Header) -> list[memoryview]:
            made.append(self._caches.empty_block(header))
            return self._caches.buffers(made[0])

        sound = self.disk is not None and self.disk.get(key, allocate) is not None
        return made[0] if sound else None

    # --- keeping ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def insert(
        self, ids: Sequence[int], cache: Any, row: int = 0, states: bool = True, *, salt: bytes = b""
    ) -> int:  # fmt: skip
        """Keep the full blocks of sequence `row` of `cache`, whose tokens are the first of `ids`; how many were new.

        Costs a hash a block where all are known. Of a model with sliding windows the blocks are kept that the windows
        still hold; others can be gone on from only where later ones hold what the window sees. So for every block to
        be of use: before a chunk is computed `layer.activate_past_recording()` of each PagedWindowLayer (or
        `cache.activate_past_recording()` where there are no states), and after the chunk this, then `layer.crop(0)`,
        which gives back what the window has left; so too every 64 tokens of an answer, or as often as is wanted.
        Without it a prefix is found only where it ends with a chunk, or within a window before. Of a model with states
        a prefix is found only where it ends just where a call of this ended, at a multiple of 64 tokens; so chunks
        should end there. Such a block may take as much memory as thousands of tokens: `states` False keeps none.
        """
        self._settle()
        source = self._caches.source(cache, row) if self._caches.usable else None
        if source is None:
            return 0
        path, before = [], self.uses.inserted
        for at, (parent, key, part) in enumerate(self._keys(ids, min(len(ids), source.length) // PAGE, salt)):
            self._keep(source, at, parent, key, part, states)
            path.append(key)
        new = self.uses.inserted - before
        self._used(path, on_disk=new > 0)
        self._shrink()
        return new

    def _keep(self, source: Source, at: int, parent: bytes, key: bytes, part: bytes, states: bool) -> None:
        block = self._blocks.get(key)
        if block is None:
            block = self._caches.take(source, at, parent, key, part, states)
            self._add(block)
            self.uses.inserted += 1
            self._write(block)
            return
        before = block.nbytes if block.missing or block.states is None else 0
        if before and self._caches.complete(block, source, at, states):
            self.nbytes += block.nbytes - before
            self._write(block)
        elif self.disk is not None and not self.disk.has(key):
            self._write(block)

    def _write(self, block: Block) -> None:
        """Have a block written to disk. Until it is, that is a user of its pages: nobody may change them."""
        if self.disk is None or not self.disk.takes:
            return
        header, parts = self._caches.parts(block)
        pages = [page for page in block.pages if page is not None]
        if self.disk.put(block.key, header, parts, pages):
            for page in pages:
                page.users += 1

    def _settle(self) -> None:
        """Give back pages that are written."""
        for pages in self.disk.finished() if self.disk is not None else ():
            for page in pages:
                page.users -= 1

    def _add(self, block: Block) -> None:
        self._blocks[block.key] = block
        self.nbytes += block.nbytes
        parent = self._blocks.get(block.parent)
        if parent is not None:
            parent.below += 1

    def _used(self, path: Sequence[bytes], on_disk: bool) -> None:
        """These blocks in a row were used just now, those before others last: without them the others are of no use."""
        for key in reversed(path):
            self._blocks.move_to_end(key)
        if on_disk and self.disk is not None:
            self.disk.touch(path[::-1])

    # --- forgetting -------------------------------------------------------------------------------------

    def evict(self, nbytes: int) -> int:
        """Free so many bytes of memory, or what there is; the bytes that are free now.

        Blocks go that nobody used for longest, and those before them later. A block stays whose pages are all in use
        elsewhere, by a running sequence or the disk's queue: that would free nothing.
        """
        self._settle()
        freed = 0
        for block in self._leaves():
            if freed >= nbytes:
                break
            gain = block.freed
            if gain:
                self._drop(block)
                freed += gain
        return freed

    def clear(self) -> None:
        """Forget all that memory holds. What is on disk stays."""
        self._settle()
        for block in self._leaves():
            self._drop(block)

    def _shrink(self) -> None:
        """Hold no more than the limit: first without blocks that are free then, after that without others too."""
        for sparing in (True, False):
            for block in self._leaves() if self.nbytes > self.limit else ():
                if self.nbytes <= self.limit:
                    break
                if block.freed or not sparing:
                    self._drop(block)

    def _leaves(self) -> Iterator[Block]:
        """Blocks that nothing follows, least recently used first; who drops each is given those before them too."""
        return (block for block in list(self._blocks.values()) if not block.below)

    def _drop(self, block: Block) -> None:
        del self._blocks[block.key]
        block.use(-1)
        self.nbytes -= block.nbytes
        self.uses.evicted += 1
        parent = self._blocks.get(block.parent)
        if parent is not None:
            parent.below -= 1
