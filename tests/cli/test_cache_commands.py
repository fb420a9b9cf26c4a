"""`kt cache ls`, `verify` and `clear`: what is on disk is what they say, and nothing else is touched."""

import json
import os
import stat
import time

import pytest
from typer.testing import CliRunner

from ktransformers import cli, env
from ktransformers.engine import block_files
from ktransformers.engine.disk_blocks import DiskBlocks
from tests.engine.test_disk_blocks import key_of, parts_of

HOUR = 3600


def run(*arguments):
    ran = CliRunner().invoke(cli.app, ["cache", *map(str, arguments)])
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran


def words(ran):
    """What was printed, however it was wrapped."""
    return " ".join(ran.stdout.split())


@pytest.fixture
def folder(tmp_path):
    """Three blocks of one model, used two days, three hours and no time ago, one of another, and a file of somebody's."""
    for model, title, numbers in ((b"first", "Tiny [red] model", (1, 2, 3)), (b"second", "", (1,))):
        disk = DiskBlocks(tmp_path, 1 << 30, model, title=title)
        for number in numbers:
            header, key = key_of(number)
            assert disk.put(key, header, parts_of(number))
        disk.close()
    (tmp_path / "notes.txt").write_text("mine")
    for number, age in ((1, 49 * HOUR), (2, 3 * HOUR)):
        os.utime(path_of(tmp_path, number), (time.time() - age,) * 2)
    return tmp_path


def path_of(folder, number, model=b"first"):
    return block_files.path_of(folder, model.hex(), key_of(number)[1])


def damage(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def test_ls(folder):
    found = json.loads(run("ls", "--dir", folder, "--json").stdout)
    models = {model["title"]: model for model in found["models"]}
    first, second = models["Tiny [red] model"], models[""]
    size = sum(path_of(folder, number).stat().st_size for number in (1, 2, 3))
    assert (first["model"], first["blocks"], first["tokens"], first["bytes"]) == (b"first".hex(), 3, 192, size)
    assert 49 * HOUR <= first["used_first"] < 50 * HOUR and first["used_last"] < HOUR
    assert (second["blocks"], second["tokens"]) == (1, 64)
    assert (found["dir"], found["blocks"]) == (str(folder), 4) and found["bytes"] == size + second["bytes"]
    rows = [line for line in run("ls", "--dir", folder).stdout.splitlines() if line.startswith("│")]
    (row,) = [row for row in rows if "Tiny [red] model" in row]
    assert b"first".hex()[:12] in row and "2 d ago" in row and "now" in row and " 192 " in row
    (path_of(folder, 1).parent / "x").write_text("")  # a clock that was ahead, and damage, are shown as anything is
    os.utime(path_of(folder, 1), (time.time() + 10**6,) * 2)
    path_of(folder, 2).write_bytes(b"")
    assert json.loads(run("ls", "--dir", folder, "--json").stdout)["models"][0]["used_last"] == 0


def test_verify(folder):
    ran = run("verify", "--dir", folder, "--json")
    assert ran.exit_code == 0 and json.loads(ran.stdout) == {"dir": str(folder), "sound": 4, "damaged": []}
    assert "4 blocks are sound, 0 damaged" in words(run("verify", "--dir", folder))
    damage(path_of(folder, 2))
    ran = run("verify", "--dir", folder, "--json")
    found = json.loads(ran.stdout)
    assert ran.exit_code == 1 and found["sound"] == 3
    (one,) = found["damaged"]
    assert one["path"] == str(path_of(folder, 2)) and "checksum" in one["problem"]
    ran = run("verify", "--dir", folder)
    assert ran.exit_code == 1 and "3 blocks are sound, 1 damaged" in words(ran)
    assert run("verify", "--dir", folder, "--model", b"second".hex()).exit_code == 0
    assert path_of(folder, 2).exists()


def test_clear(folder):
    ran = run("clear", "--dir", folder)
    assert ran.exit_code == 1 and ran.stdout == "" and "holds 4 blocks" in ran.stderr and "--yes" in ran.stderr
    assert len(list(block_files.block_files(folder))) == 4
    ran = run("clear", "--dir", folder, "--model", b"second".hex()[:4], "--yes", "--json")
    assert ran.exit_code == 0 and json.loads(ran.stdout)["blocks"] == 1
    assert not path_of(folder, 1, b"second").parents[1].exists() and path_of(folder, 1).exists()
    assert "3 blocks deleted" in words(run("clear", "--dir", folder, "-y"))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    ran = run("clear", "--dir", folder)
    assert ran.exit_code == 0 and "0 blocks deleted" in words(ran)


def test_mistakes_are_one_line(folder, monkeypatch):
    for arguments, message in [
        (("ls", "--dir", folder / "none"), "no such folder"),
        (("verify", "--dir", folder / "notes.txt"), "no such folder"),
        (("clear", "--dir", folder, "--model", "abc"), "no model here has such a key"),
    ]:
        ran = run(*arguments)
        assert ran.exit_code == 1 and ran.stdout == "" and message in ran.stderr, ran.output
    path_of(folder, 1).with_suffix(".kept").write_text("")

    def refused(path, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(block_files.Path, "unlink", refused)
    ran = run("clear", "--dir", folder, "--yes")
    assert ran.exit_code == 1 and "4 of 4 blocks cannot be deleted" in ran.stderr


def test_the_folder_is_a_setting(folder, tmp_path, monkeypatch):
    for name in ("KT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert env.cache_dir() == str(tmp_path / "home/.cache/ktransformers/blocks")
    ran = run("ls")  # there is none, which is no mistake
    assert ran.exit_code == 0 and "no blocks" in words(ran)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert env.cache_dir().startswith(str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/tmp")
    assert env.cache_dir() == "/var/tmp/ktransformers/blocks"
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("KT_CACHE_DIR", "~/..")
    assert json.loads(run("ls", "--json").stdout)["blocks"] == 4
    assert stat.S_IMODE(path_of(folder, 1).stat().st_mode) == 0o600
