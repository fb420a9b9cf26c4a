"""Blocks on disk: what is read is what was written, or nothing; and no disk, clock or process beside stops the engine."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from ktransformers.engine import block_files, disk_blocks
from ktransformers.engine.block_files import PART, BlockDamaged, block_key
from ktransformers.engine.disk_blocks import DiskBlocks
from ktransformers.errors import KTransformersError

MODEL = b"model"
MIB = 1 << 20


def key_of(number, parent=MODEL):
    ids = number.to_bytes(8, "little") * 64
    return {"parent": parent.hex(), "ids": ids.hex()}, block_key(parent, ids)


def parts_of(number, size=3000):
    rng = random.Random(number)
    return [rng.randbytes(size), b"", rng.randbytes(7)]


@pytest.fixture
def opened(tmp_path):
    """Makes DiskBlocks of one folder; a warning is what `said` has."""
    made = []

    def make(limit=MIB, folder=tmp_path / "blocks", **options):
        said = []
        made.append(DiskBlocks(folder, limit, options.pop("key", MODEL), notify=said.append, **options))
        made[-1].said = said
        assert made[-1].flush(30)
        return made[-1]

    yield make
    for one in made:
        one.close(5)
        assert not one._thread.is_alive()


def put(disk, *numbers, size=3000, **given):
    for number in numbers:
        header, key = key_of(number)
        assert disk.put(key, {**header, **given}, parts_of(number, size), ticket=number)
        assert disk.has(key)
    assert disk.flush(30)


def get(disk, number, size=3000):
    """The header of a block, or None; its parts are compared."""
    buffers = [bytearray(len(part)) for part in parts_of(number, size)]
    header = disk.get(key_of(number)[1], lambda header: buffers)
    if header is not None:
        assert [bytes(each) for each in buffers] == parts_of(number, size)
    return header


def there(disk, numbers, **given):
    return [number for number in numbers if get(disk, number, **given) is not None]


def path_of(disk, number):
    return block_files.path_of(disk.folder, disk.model, key_of(number)[1])


# --- reading what was written ---------------------------------------------------------------------------


def test_blocks_come_back_in_another_process_s_place(opened):
    first = opened(title="tiny")
    put(first, 1, 2, 3, layers=["anything", {"JSON": 1}])
    assert sorted(first.finished()) == [1, 2, 3] and first.finished() == []
    assert first.counts.written == 3 and first.nbytes == sum(path_of(first, n).stat().st_size for n in (1, 2, 3))
    second = opened()
    assert second.nbytes == first.nbytes and second.counts.written == 0
    assert there(second, range(5)) == [1, 2, 3] and not second.has(key_of(4)[1])
    header = second.header(key_of(2)[1])
    assert header["layers"] == ["anything", {"JSON": 1}] and header["title"] == "tiny" and header["model"] == MODEL.hex()
    assert header["parts"] == [3000, 0, 7] and second.header(key_of(4)[1]) is None
    assert first.said == second.said == []


def test_files_are_for_their_owner_alone(opened):
    disk = opened()
    put(disk, 1)
    assert path_of(disk, 1).stat().st_mode & 0o777 == 0o600
    assert all(folder.stat().st_mode & 0o077 == 0 for folder in path_of(disk, 1).parents[:3])


def test_a_block_of_more_parts_takes_the_place_of_one_of_fewer(opened):
    disk = opened()
    put(disk, 1)
    header, key = key_of(1)
    assert disk.put(key, {**header, "more": 1}, [*parts_of(1), b"states"]) and disk.flush(30)
    assert disk.header(key)["parts"] == [3000, 0, 7, 6]
    put(disk, 1)
    assert disk.header(key)["more"] == 1 and disk.counts.written == 2
    assert disk.nbytes == path_of(disk, 1).stat().st_size


# --- damage ---------------------------------------------------------------------------------------------


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def rewritten(data, **changes):
    """The file with another header, and a checksum that is right."""
    length = int.from_bytes(data[8:12], "little")
    header = json.loads(data[12 : 12 + length]) | changes
    text = json.dumps({name: value for name, value in header.items() if value is not None}).encode()
    body = data[:8] + len(text).to_bytes(4, "little") + text + data[12 + length : -32]
    return body + block_files.hashlib.blake2b(body, digest_size=32).digest()


DAMAGES = {
    "empty": lambda data: b"",
    "magic alone": lambda data: data[:8],
    "cut in the header": lambda data: data[:200],
    "cut in the parts": lambda data: data[:-1000],
    "cut in the checksum": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "zeros": lambda data: bytes(len(data)),
    "a bit of the parts": lambda data: flip(data, len(data) - 500),
    "a bit of the checksum": lambda data: flip(data, len(data) - 1),
    "a bit of the ids": lambda data: flip(data, data.index(b'"ids"') + 10),
    "a header of 4 GiB": lambda data: data[:8] + b"\xff" * 4 + data[12:],
    "no JSON": lambda data: data[:12] + b"[" * 100 + data[112:],
    "no header": lambda data: data[:8] + bytes(4) + data[12:],
    "another format": lambda data: rewritten(data, format=2),
    "another model": lambda data: rewritten(data, model=b"other".hex()),
    "other tokens": lambda data: rewritten(data, ids="00" * 512),
    "ids that are no bytes": lambda data: rewritten(data, ids=["x"]),
    "no parent": lambda data: rewritten(data, parent=None),
    "parts of other sizes": lambda data: rewritten(data, parts=[2999, 1, 7]),
    "a negative part": lambda data: rewritten(data, parts=[-7, 3007, 7]),
    "a part of 2^70": lambda data: rewritten(data, parts=[1 << 70]),
    "parts of no number": lambda data: rewritten(data, parts=["3000", 0, 7]),
    "fewer parts": lambda data: rewritten(data, parts=[3007]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_deleted_and_counted(opened, damage):
    disk = opened()
    put(disk, 1, 2)
    path = path_of(disk, 1)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert there(disk, (1, 2)) == [2]
    assert not path.exists() and disk.counts.refused == 1
    (said,) = disk.said
    assert "deleted and computed again" in said
    put(disk, 1)
    assert there(disk, (1, 2)) == [1, 2]


def test_a_file_under_another_s_name_is_refused(opened):
    """Another block of the model, and the same of another model."""
    disk, other = opened(), opened(key=b"another")
    put(disk, 1, 2)
    path_of(other, 1).parent.mkdir(parents=True)
    path_of(other, 1).write_bytes(path_of(disk, 1).read_bytes())
    path_of(disk, 2).write_bytes(path_of(disk, 1).read_bytes())
    assert there(disk, (1, 2)) == [1] and there(other, (1,)) == []
    assert disk.counts.refused == other.counts.refused == 1


def test_who_reads_may_refuse_too(opened):
    disk = opened()
    put(disk, 1)

    def allocate(header):
        raise BlockDamaged("no block of this model.")

    assert disk.get(key_of(1)[1], allocate) is None and not path_of(disk, 1).exists()


def test_random_bytes_are_never_a_block(opened):
    disk, rng = opened(), random.Random(0)
    put(disk, 1)
    path, sound = path_of(disk, 1), path_of(disk, 1).read_bytes()
    for _ in range(300):
        data = bytearray(sound)
        for _ in range(rng.randrange(1, 4)):
            at, count = rng.randrange(len(data)), rng.randrange(1, 40)
            data[at : at + count] = rng.randbytes(rng.choice([count, 0, 3]))
        path.write_bytes(data)
        assert data == sound or get(disk, 1) is None
    assert disk.counts.refused > 250


# --- size and order -------------------------------------------------------------------------------------


def size_of_one(opened, tmp_path):
    disk = opened(folder=tmp_path / "one")
    put(disk, 1)
    return disk.nbytes


def test_the_least_recently_used_are_deleted(opened, tmp_path):
    size = size_of_one(opened, tmp_path)
    disk = opened(limit=4 * size + 40)
    put(disk, *range(4))
    disk.touch([key_of(1)[1], key_of(0)[1]])
    put(disk, 4, 5)
    assert disk.nbytes <= disk.limit and disk.counts.evicted == 2 and there(disk, range(6)) == [0, 1, 4, 5]
    later = opened(limit=2 * size + 40)  # the order outlives the process
    assert there(later, range(6)) == [4, 5] and there(disk, range(6)) == [4, 5]
    header, key = key_of(9)
    assert not disk.put(key, header, [bytes(disk.limit + 1)]) and disk.counts.dropped == 1


def test_a_clock_that_jumps_changes_no_order(opened, tmp_path, monkeypatch):
    size = size_of_one(opened, tmp_path)
    disk = opened(limit=4 * size + 40)
    now = time.time_ns()
    for number, jump in enumerate([0, 10**18, -(10**18), 5]):  # thirty years
        monkeypatch.setattr(disk_blocks.time, "time_ns", lambda jump=jump: now + jump)
        put(disk, number)
    used = [path_of(disk, number).stat().st_mtime_ns for number in range(4)]
    assert used == sorted(used)
    disk = opened(limit=4 * size + 40)
    put(disk, 4)
    assert there(disk, range(5)) == [1, 2, 3, 4]
    put(disk, 5)
    assert there(disk, range(6)) == [2, 3, 4, 5]
    monkeypatch.undo()
    os.utime(path_of(disk, 2), ns=(0, 2**62))
    for number in range(6, 9):
        put(opened(limit=4 * size + 40), number)
    assert disk.said == []


def test_models_share_a_folder_and_its_limit(opened, tmp_path):
    size = size_of_one(opened, tmp_path)
    first = opened(limit=3 * size + 40)
    put(first, 0, 1)
    put(opened(limit=3 * size + 40, key=b"other"), 2)
    second = opened(limit=3 * size + 40, key=b"third")
    assert second.nbytes > 2 * size
    header, key = key_of(3, b"third")
    assert second.put(key, header, parts_of(3)) and second.flush(30)
    assert there(first, (0, 1)) == [1]


def test_what_is_no_block_is_left_alone(opened, tmp_path):
    folder = tmp_path / "blocks"
    kept = [folder / "notes.txt", folder / "ab" / "cd" / "short.block", folder / MODEL.hex() / "zz" / "x.block"]
    kept.append(folder / MODEL.hex() / "ab" / "x.block")
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(5000))
    disk = opened(limit=4000)
    put(disk, 1)
    assert disk.nbytes < 4000 and all(path.exists() for path in kept)


# --- processes ------------------------------------------------------------------------------------------

WRITER = """
import sys, time
from ktransformers.engine.disk_blocks import DiskBlocks
from tests.engine.test_disk_blocks import key_of, parts_of
disk = DiskBlocks(sys.argv[1], int(sys.argv[3]), b"model", pending=4_000_000)
for number in range(int(sys.argv[2]), 1 << 30):
    header, key = key_of(number)
    while not disk.put(key, header, parts_of(number, 200_000)):
        time.sleep(0.001)
    if number % 8 == 0:
        print(number, disk.counts.written, disk.counts.failed, disk.counts.refused, flush=True)
"""


def writer(folder, first, limit=1 << 40):
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", WRITER, str(folder), str(first), str(limit)]
    return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.endswith(PART)]


def test_a_writer_that_is_killed_leaves_whole_blocks(opened, tmp_path):
    folder = tmp_path / "blocks"
    for turn in range(6):
        process = writer(folder, turn * 1000)
        while int(process.stdout.readline().split()[1]) < 1 + 10 * turn:
            pass
        time.sleep(random.Random(turn).random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        disk = opened(limit=1 << 40)
        assert not leftovers(folder) and disk.nbytes == sum(file.size for file in block_files.block_files(folder))
        for file in block_files.block_files(folder):
            block_files.verify(file.path)
        assert len(there(disk, range(turn * 1000, turn * 1000 + 9), size=200_000)) >= 1
        assert disk.counts.refused == 0
    path = path_of(disk, 0)  # where no turn was hit in the middle, one by hand
    (path.parent / f".{path.name}.0123{PART}").write_bytes(b"half")
    opened()
    assert not leftovers(folder)


def test_a_file_that_is_being_written_is_no_leftover(opened, monkeypatch):
    disk, seen, really = opened(), [], block_files.os.write

    def watched(file, data):
        if not seen:
            seen.append((block_files.remove_leftovers(disk.folder), len(leftovers(disk.folder))))
        return really(file, data)

    monkeypatch.setattr(block_files.os, "write", watched)
    put(disk, 1)
    assert seen == [(0, 1)] and there(disk, (1,)) == [1]


def test_a_file_that_vanishes_while_it_is_written_is_written_again(opened, monkeypatch):
    """Another process starts, and looks for leftovers just before this one locks its file."""
    disk, really, removed = opened(), block_files._lock, []

    def late(file):
        if not removed:
            removed.append(0)  # `remove_leftovers` locks too
            removed[0] = block_files.remove_leftovers(disk.folder)
        return really(file)

    monkeypatch.setattr(block_files, "_lock", late)
    put(disk, 1)
    assert removed == [1] and there(disk, (1,)) == [1] and disk.counts.failed == 0 and disk.said == []


def test_two_processes_and_a_reader_use_one_folder(opened, tmp_path):
    """The same blocks, over a limit that both hold, while a third reads."""
    folder = tmp_path / "blocks"
    both = [writer(folder, 0, 3_000_000) for _ in range(2)]
    try:
        lines = [process.stdout.readline() for process in both]
        disk, found = opened(limit=3_000_000), 0
        until = time.monotonic() + 3
        while time.monotonic() < until:
            lines = [process.stdout.readline() for process in both]
            last = int(lines[0].split()[0])
            found += len(there(disk, range(max(last - 40, 0), last), size=200_000))
        assert found and disk.counts.refused == 0 and disk.said == []
        assert all(line.split()[2:] == ["0", "0"] for line in lines)
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert opened(limit=3_000_000).nbytes <= 3_000_000 and not leftovers(folder)


def test_a_folder_that_somebody_deletes(opened):
    disk = opened()
    put(disk, 1, 2)
    path_of(disk, 1).unlink()
    assert there(disk, (1, 2)) == [2] and disk.counts.refused == 0
    for path in sorted(disk.folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    disk.folder.rmdir()
    assert there(disk, (1, 2)) == []
    put(disk, 1)
    assert there(disk, (1, 2)) == [1] and disk.said == []


# --- a disk that fails ----------------------------------------------------------------------------------


def test_a_full_disk_is_said_once_and_tried_again_later(opened, monkeypatch):
    disk, really, room = opened(), block_files.os.write, [10_000]

    def full(file, data):
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = really(file, bytes(data)[: min(len(data), 1500)])  # in pieces, as a disk may
        room[0] -= count
        return count

    monkeypatch.setattr(block_files.os, "write", full)
    for number in range(8):
        header, key = key_of(number)
        disk.put(key, header, parts_of(number), ticket=number)
    assert disk.flush(30) and not leftovers(disk.folder)
    assert disk.counts.failed >= 1 and sorted(disk.finished()) == list(range(disk.counts.failed + disk.counts.written))
    (said,) = disk.said
    assert "No space left on device" in said and "KT_CACHE_DIR" in said
    assert not disk.takes and not disk.put(key, header, parts_of(7)) and disk.counts.dropped >= 1
    room[0], disk._paused_until = 1 << 30, 0.0  # as a minute later
    put(disk, 7)
    assert 7 in there(disk, range(8)) and len(disk.said) == 1


@pytest.mark.parametrize("how", ["a file", "read-only", "gone"])
def test_a_folder_that_cannot_be_written(opened, tmp_path, how, monkeypatch):
    folder = tmp_path / "blocks"
    if how == "a file":
        folder.write_text("")
    elif how == "gone":
        folder = Path("/proc/nobody/blocks")
    else:
        def refused(*args, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(block_files.os, "open", refused)  # root may write everywhere
    disk = opened(folder=folder)
    header, key = key_of(1)
    assert disk.put(key, header, parts_of(1), ticket=5) and disk.flush(30)
    assert disk.finished() == [5] and disk.counts.failed == 1 and len(disk.said) == 1
    assert not disk.has(key) and get(disk, 1) is None


def test_what_cannot_be_read_is_a_miss(opened, monkeypatch):
    disk = opened()
    put(disk, 1)

    def broken(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(block_files, "_fill", broken)
    assert get(disk, 1) is None and disk.counts.refused == 0 and len(disk.said) == 1
    monkeypatch.undo()
    assert get(disk, 1) is not None


def test_the_engine_never_waits(opened, monkeypatch):
    """What does not fit into the queue is dropped, while a write hangs."""
    disk, go, really = opened(pending=10_000), threading.Event(), block_files.write
    monkeypatch.setattr(block_files, "write", lambda *args: (go.wait(30), really(*args))[1])
    start, taken = time.monotonic(), 0
    for number in range(20):
        header, key = key_of(number)
        taken += disk.put(key, header, parts_of(number), ticket=number)
    assert time.monotonic() - start < 5 and 1 <= taken <= 4
    assert disk.counts.dropped == 20 - taken and disk.finished() == [] and not disk.flush(0.05)
    assert disk.has(key_of(0)[1]) and get(disk, 0) is None  # about to be
    go.set()
    assert disk.flush(30) and sorted(disk.finished()) == list(range(taken))


def test_a_warning_that_is_an_error_ends_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        disk = DiskBlocks(tmp_path / "file", MIB, MODEL)
        header, key = key_of(1)
        assert disk.put(key, header, parts_of(1)) and disk.flush(30) and disk._thread.is_alive()
    disk.close()
    assert not disk.put(key, header, parts_of(1))
    with pytest.raises(KTransformersError, match="found a key of 0 bytes, expected 1 to 64"):
        DiskBlocks(tmp_path, MIB, b"")
