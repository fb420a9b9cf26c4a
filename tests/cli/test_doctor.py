"""doctor finds what is wrong, hides nothing behind it, and says so by its exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from ktransformers import cli, env, native
from ktransformers.cli.doctor import checks, instruction_sets, kernel_check
from ktransformers.errors import NativeError

ROOT = Path(__file__).resolve().parent.parent.parent
GROUPS = ["Processor", "Memory", "Kernels", "GPUs", "Software", "Disk", "Settings"]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in list(os.environ):
        if name.startswith("KT_"):
            monkeypatch.delenv(name)


def doctor(*flags):
    """(exit code, report) of `kt doctor --json`."""
    ran = CliRunner().invoke(cli.app, ["doctor", "--json", *flags])
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran.exit_code, json.loads(ran.stdout)


def by_name(report):
    return {check["name"]: check for check in report["checks"]}


def wrong(report):
    return [check["name"] for check in report["checks"] if check["status"] == "problem"]


def test_a_sound_machine_is_measured_and_passes():
    code, report = doctor()
    assert code == 0 and report["ok"] and wrong(report) == []
    assert [g for g in dict.fromkeys(c["group"] for c in report["checks"]) if g != "Speed"] == GROUPS
    assert report["hardware"]["cpu"]["read_bandwidth"] > 0 and report["hardware"]["gpus"] is not None
    found = by_name(report)
    assert native.isa() in found["instruction set"]["found"] and "GB/s" in found["reading RAM"]["found"]
    assert all(isa in found and found[isa]["found"].startswith("OK") for isa in native.isas())
    assert all(bool(check["fix"]) == (check["status"] != "ok") for check in report["checks"])


def test_the_report_reads_at_100_columns_and_without_colours():
    ran = CliRunner().invoke(cli.app, ["doctor", "--quick"])
    assert ran.exit_code == 0 and "no problems" in ran.stdout and "\x1b" not in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 100
    assert all(f" {group}" in ran.stdout for group in GROUPS)


def test_quick_measures_no_speed(monkeypatch):
    monkeypatch.setattr(checks.hardware, "measure_cpu", lambda say: pytest.fail("measured"))
    code, report = doctor("--quick")
    assert code == 0 and report["hardware"]["cpu"] is None


# ---- the library -------------------------------------------------------------------------------------------


def test_a_library_that_is_not_built_is_a_problem_that_says_how(monkeypatch):
    def missing():
        raise NativeError(f"ktransformers._native: No module named 'ktransformers._native'; {native.NOT_BUILT}.")

    monkeypatch.setattr(native.library, "_module", missing)
    monkeypatch.setattr(native.library, "_state", None)
    code, report = doctor()
    assert code == 1 and wrong(report) == ["C library"]
    assert "make setup" in by_name(report)["C library"]["fix"]
    assert {"RAM", "torch", "models"} <= set(by_name(report))


FAULTS = {
    "a tenth too large": lambda y: y * 1.1,
    "one wrong number": lambda y: y.index_put((torch.tensor([0]), torch.tensor([7])), torch.tensor(9.0, dtype=y.dtype)),
    "NaN": lambda y: y * float("nan"),
    "nothing": torch.zeros_like,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kernel", [native.Experts, native.Linear])
def test_kernels_that_compute_wrong_are_a_problem(kernel, fault, monkeypatch):
    right = kernel.forward
    monkeypatch.setattr(kernel, "__call__", lambda self, *a: FAULTS[fault](right(self, *a)))
    code, report = doctor("--quick")
    assert code == 1 and wrong(report) == native.isas()
    failed = by_name(report)[native.isas()[-1]]
    assert failed["found"].startswith("FAIL") and f"KT_ISA={native.isas()[-2]}" in failed["fix"]


def test_one_bad_instruction_set_is_the_one_that_is_named(monkeypatch):
    right, bad = native.Experts.forward, native.isas()[-1]
    monkeypatch.setattr(
        native.Experts, "__call__", lambda self, *a: right(self, *a) * (2.0 if native.isa() == bad else 1.0)
    )
    before = native.isa()
    assert wrong(doctor("--quick")[1]) == [bad] and native.isa() == before


def test_right_kernels_are_well_within_the_limits():
    for result in kernel_check.check_kernels(native.isas()):
        for name, error in result.errors.items():
            limit = kernel_check.LIMITS["bf16" if name.startswith("BF16") else "int8"]
            assert 0 < error < 0.6 * limit, (result.isa, name, error)


def test_what_instruction_sets_need():
    """The library says it, from native/src/isas.h; each set needs what the sets below it on the way need."""
    needs = {name: set(features) for name, features in native.isa_needs().items()}
    assert needs["portable"] == set() and needs["avx2"] == {"avx2", "fma", "f16c"} and needs["neon_dotprod"] == {"asimddp"}
    assert needs["avx512"] == needs["amx_emulated"] == needs["avx2"] | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    assert needs["avx512_vbmi"] - needs["avx512_vnni"] == {"avx512_vbmi", "gfni"}
    assert needs["amx"] - needs["avx512_bf16"] == {"amx_tile", "amx_int8", "amx_bf16"}
    assert needs["avx2"] < needs["avx512"] < needs["avx512_vnni"] < needs["avx512_bf16"]
    features = native.cpu_features()
    for name in native.isas():
        assert all(features[feature] for feature in needs[name])


def test_instruction_sets_that_do_not_run_say_why(monkeypatch):
    features = dict.fromkeys(native.cpu_features(), False) | dict.fromkeys(native.isa_needs()["avx512"], True)
    monkeypatch.setattr(native, "cpu_features", lambda: features)
    monkeypatch.setattr(native, "isas", lambda: ["portable", "avx2"])
    found = instruction_sets.missing()
    assert found["avx512"] == instruction_sets.NOT_COMPILED and "lacks avx512_vnni" in found["avx512_vnni"]
    assert not any(name.startswith("neon") for name in found) and "amx_emulated" not in found


# ---- settings ----------------------------------------------------------------------------------------------


def fresh(*flags, **environment):
    """In a process of its own, where the C library reads the environment for the first time."""
    ran = subprocess.run(
        [sys.executable, "-m", "ktransformers", "doctor", "--quick", "--json", *flags],
        capture_output=True, text=True, cwd=ROOT, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.returncode, json.loads(ran.stdout)


def test_every_wrong_setting_is_a_problem_and_stops_nothing():
    foreign = next(isa for isa in reversed(env.ISAS) if isa not in native.isas())
    values = {
        "KT_ISA": foreign,
        "KT_NUMA": "5-3",
        "KT_PIN": "x",
        "KT_THREADS": "0",
        "KT_RULE_MODULES": "no_such_module",
    }
    code, report = fresh(**values)
    assert code == 1 and sorted(wrong(report)) == sorted(values)
    assert all(by_name(report)[isa]["found"].startswith("OK") for isa in native.isas())
    assert "not an instruction set of this machine" in by_name(report)["KT_ISA"]["fix"]


def test_settings_that_slow_the_machine_are_notes():
    code, report = fresh(KT_ISA="portable", KT_THREADS="1000", KT_THREAD="2")
    found = by_name(report)
    assert code == 0 and report["notes"] >= 3
    assert found["instruction set"]["status"] == "note" and "KT_ISA" in found["instruction set"]["fix"]
    assert found["threads"]["status"] == "note" and "did you mean 'KT_THREADS'" in found["KT_THREAD"]["fix"]


def test_the_environment_is_as_it_was(monkeypatch):
    monkeypatch.setenv("KT_PIN", "x")
    assert doctor("--quick")[0] == 1 and os.environ["KT_PIN"] == "x"


# ---- the rest ----------------------------------------------------------------------------------------------


def test_a_check_that_breaks_hides_no_other(monkeypatch):
    def broken():
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    code, report = doctor("--quick")
    assert code == 1 and wrong(report) == ["gpus"]
    assert "the driver is gone" in by_name(report)["gpus"]["fix"] and {"torch", "models", "KT_*"} <= set(
        by_name(report)
    )


def test_gpus_are_listed(monkeypatch):
    properties = SimpleNamespace(name="Some GPU", total_memory=24 << 30)
    gpu = checks.hardware.Gpu("Some GPU", 24 << 30, 900e9, 70e12, 25e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    notes = ("cuda:1 (Some GPU) could not be measured and is taken for a 4090: busy. Free its memory.",)
    monkeypatch.setattr(checks.hardware, "measure_gpus", lambda say: ((gpu, gpu), notes))
    code, report = doctor()
    found = by_name(report)
    assert code == 0 and found["cuda:0"]["found"] == "Some GPU, 24 GiB, 900 GB/s, 70 TOP/s in bf16, 25 GB/s from RAM"
    assert (
        found["cuda:0"]["status"] == "ok" and found["cuda:1"]["status"] == "note" and "busy" in found["cuda:1"]["fix"]
    )
    assert len(report["hardware"]["gpus"]) == 2


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    real = checks.installed_version
    monkeypatch.setattr(checks, "installed_version", lambda name: None if name == "gguf" else real(name))
    monkeypatch.setattr(checks, "requires", lambda name: ["gguf", "torch>=99", "pytest; extra == 'dev'"])
    code, report = doctor("--quick")
    found = by_name(report)
    assert code == 1 and wrong(report) == ["gguf", "torch"]
    assert "pip install 'gguf'" in found["gguf"]["fix"] and "expected >=99" in found["torch"]["found"]


def test_little_room_and_little_memory_are_notes(monkeypatch):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    monkeypatch.setattr(checks.system, "memory", lambda: (64 << 30, 1 << 30))
    monkeypatch.setattr(checks.system, "huge_pages", lambda: "never")
    code, report = doctor("--quick")
    notes = [check["name"] for check in report["checks"] if check["status"] == "note"]
    assert code == 0 and {"RAM", "huge pages", "models"} <= set(notes)
