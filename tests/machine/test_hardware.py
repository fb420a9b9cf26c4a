"""Hardware described in a few words is read as it was meant or refused with what was meant, and this machine is measured."""

from types import SimpleNamespace

import pytest
import torch

from ktransformers.errors import KTransformersError
from ktransformers.machine import hardware
from ktransformers.machine.gpus import GPU_MODELS, TYPICAL, find_gpu, typical_gpu
from ktransformers.machine.units import GIB, format_bytes, format_rate, parse_bytes, parse_rate

SIZES = [
    ("24GiB", 24 * 2**30),
    ("24GB", 24 * 10**9),
    ("24576MiB", 24 * 2**30),
    (" 1.5 tib ", 3 * 2**39),
    ("512b", 512),
    ("0.1B", 1),
]
BAD_SIZES = [
    ("24", "was 24GiB meant?"),
    ("12.5", "was 12.5GiB meant?"),
    ("24g", "was 24GiB meant?"),
    ("800M", "was 800MiB meant?"),
    ("24Gbit", "unit 'Gbit' is not known"),
    ("0GiB", "above zero"),
    ("-3GiB", "above zero"),
    ("0", "above zero"),
    ("", "a number with a unit"),
    ("many", "a number with a unit"),
    ("24,5GiB", "a number with a unit"),
    ("1e3GiB", "a number with a unit"),
]


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(("text", "message"), BAD_SIZES)
def test_sizes_that_cannot_be_meant_say_what_was(text, message):
    with pytest.raises(KTransformersError) as error:
        parse_bytes(text, "--ram")
    assert message in str(error.value) and str(error.value).startswith(f"--ram {text!r}: ")


@pytest.mark.parametrize(("text", "rate"), [("200GB/s", 200e9), ("3.35 TB/s", 3.35e12), ("1GiB/sec", 2.0**30)])
def test_rates_are_read(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["200GB", "200", "", "/s", "200/s", "GB/s"])
def test_rates_without_time_or_unit_are_refused(text):
    with pytest.raises(KTransformersError):
        parse_rate(text)


def test_sizes_are_written_with_the_digits_that_matter():
    sizes = [0, 1023, 1024, 1536, 24564 << 20, 384 * GIB, 1023.99 * GIB, -2048]
    assert [format_bytes(size) for size in sizes] == [
        "0 B", "1023 B", "1 KiB", "1.5 KiB", "24 GiB", "384 GiB", "1 TiB", "-2 KiB",
    ]  # fmt: skip
    assert [format_rate(46.9e9), format_rate(834e9, "OP/s"), format_rate(0)] == ["46.9 GB/s", "834 GOP/s", "0 B/s"]
    assert format_rate(float("inf")) == "inf B/s"


@pytest.mark.parametrize("size", [10**n * 37 // 10 for n in range(1, 16)])
def test_a_written_size_is_read_back_within_its_digits(size):
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.005)


# ---- GPUs --------------------------------------------------------------------------------------------------

NAMES = [
    ("RTX 4090", "4090"),
    ("NVIDIA GeForce RTX 4070 Ti SUPER", "4070ti-super"),
    ("AMD Radeon RX 7900 XTX", "7900xtx"),
    ("A100 80GB", "a100-80g"),
    ("RTX-PRO-6000", "rtx-pro-6000"),
    ("rtx_a6000", "a6000"),
    ("v100-32g", "v100-32g"),
]


@pytest.mark.parametrize(("text", "name"), NAMES)
def test_models_are_found_as_people_write_them(text, name):
    assert find_gpu(text).name == name


@pytest.mark.parametrize("text", ["a100", "4091", "rtx", "", "v100"])
def test_what_is_no_model_or_several_is_not_guessed(text):
    assert find_gpu(text) is None


@pytest.mark.parametrize("model", GPU_MODELS.values(), ids=lambda model: model.name)
def test_every_model_is_found_by_its_own_name_and_has_figures_of_a_gpu(model):
    assert find_gpu(model.name) is model
    assert 8 * GIB <= model.memory <= 300 * GIB
    assert 250e9 <= model.bandwidth <= 10e12 and 20e12 <= model.bf16_ops <= 5e15
    assert 10e9 <= model.link < model.bandwidth / 5
    assert 50 < model.bf16_ops / model.bandwidth or model.name == "h20"  # a slip of a power of ten shows here


def test_there_is_a_typical_model_for_every_size():
    assert [typical_gpu(size * GIB).name for size in (2, 8, 12, 16, 24, 48, 80, 1000)] == [
        "4060", "4060", "3060", "4060ti-16g", "4090", "a6000", "a100-80g", "mi355x",
    ]  # fmt: skip
    assert set(TYPICAL) <= set(GPU_MODELS)


# ---- described ---------------------------------------------------------------------------------------------


def test_a_named_model_has_its_published_figures():
    gpu, assumed = hardware.parse_gpu("4090")
    assert (gpu.name, gpu.memory, gpu.bandwidth, gpu.bf16_ops) == ("4090", 24 * GIB, 1008e9, 165.2e12)
    assert len(assumed) == 1 and "published" in assumed[0] and "--gpu 4090@RATE" in assumed[0]


@pytest.mark.parametrize(("text", "model", "bandwidth"), [("24GiB", "4090", 1008e9), ("20000MiB", "7900xt", 800e9)])
def test_a_gpu_given_by_size_is_taken_for_a_model_of_that_size_and_says_so(text, model, bandwidth):
    gpu, assumed = hardware.parse_gpu(text)
    assert gpu.memory == parse_bytes(text) and gpu.bandwidth == bandwidth and gpu.link == GPU_MODELS[model].link
    assert f"like the {model}" in assumed[0] and "SIZE@BANDWIDTH" in assumed[0]


def test_a_bandwidth_is_taken_as_it_is_and_picks_the_likest_model():
    gpu, assumed = hardware.parse_gpu("80GiB@3350GB/s")
    assert gpu.bandwidth == 3350e9 and gpu.bf16_ops == GPU_MODELS["h100"].bf16_ops and "like the h100" in assumed[0]
    assert hardware.parse_gpu("3090@900GB/s")[0].bandwidth == 900e9


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("8x80GiB", ["80 GiB GPU"] * 8), ("2 x 4090", ["4090"] * 2), ("2×RTX 3090@900GB/s", ["3090"] * 2),
        ("3X7900xtx", ["7900xtx"] * 3), ("7900xt", ["7900xt"]), ("9070xt", ["9070xt"]), ("1x24GiB", ["24 GiB GPU"]),
    ],
)  # fmt: skip
def test_several_gpus_of_one_kind_are_written_with_a_count(text, names):
    assert [gpu.name for gpu in hardware.parse_gpus(text)[0]] == names
    assert [gpu.name for gpu in hardware.describe([text], "64GiB").gpus] == names


@pytest.mark.parametrize("text", ["0x24GiB", "65x24GiB", "2xrtx9999", "2x24", "7900xy"])
def test_counts_and_gpus_that_cannot_be_meant_are_refused(text):
    with pytest.raises(KTransformersError, match="--gpu"):
        hardware.parse_gpus(text)


BAD_GPUS = [
    ("24", "was 24GiB meant?"),
    ("0GiB", "above zero"),
    ("-3GiB", "above zero"),
    ("5PiB", "expected 256 MiB to 1 TiB"),
    ("1MiB", "expected 256 MiB to 1 TiB"),
    ("4091", "did you mean '4090'?"),
    ("a100", "did you mean a100-40g or a100-80g?"),
    ("NVIDIA A100", "did you mean a100-40g or a100-80g?"),
    ("RTX 4091", "did you mean '4090'?"),
    ("RTX PRO 6001", "did you mean 'rtx-pro-6000'?"),
    ("7900gre", "no known GPU"),
    ("x24GiB", "no known GPU"),
    ("", "no known GPU"),
    ("24GiB@", "expected bytes per second"),
    ("24GiB@1008", "expected bytes per second"),
    ("24GiB@1kB/s", "expected 1 GB/s to 100 TB/s"),
]


@pytest.mark.parametrize(("text", "message"), BAD_GPUS)
def test_gpus_that_cannot_be_meant_are_refused(text, message):
    with pytest.raises(KTransformersError) as error:
        hardware.parse_gpu(text)
    assert message in str(error.value) and "--gpu" in str(error.value) and len(str(error.value)) < 200
    assert ("kt list gpus" in str(error.value)) == ("no known GPU" in str(error.value))


def test_ram_alone_assumes_a_desktop_or_a_server_and_says_so():
    desktop, said = hardware.parse_cpu("64GiB")
    assert (desktop.cores, desktop.read_bandwidth) == (hardware.DESKTOP_CORES, hardware.DESKTOP_BANDWIDTH)
    assert desktop.ram == 64 * GIB and 60 * GIB < desktop.available < 63 * GIB
    assert len(said) == 4 and all("Give " in note or "Run " in note for note in said)
    server, _ = hardware.parse_cpu("193GiB")
    assert (server.cores, server.read_bandwidth) == (hardware.SERVER_CORES, hardware.SERVER_BANDWIDTH)
    assert server.int8_ops > server.bf16_ops > server.fp32_ops > desktop.fp32_ops


def test_what_is_said_of_ram_and_cores_is_not_assumed():
    cpu, said = hardware.parse_cpu("384GiB@205GB/s", 24)
    assert (cpu.read_bandwidth, cpu.cores) == (205e9, 24) and cpu.int8_ops == 24 * hardware.CORE_OPS["int8"]
    assert not any("cores are assumed" in note or "GB/s is assumed" in note for note in said)


BAD_RAM = [
    ("12", None, "was 12GiB meant?"),
    ("65TiB", None, "expected 1 GiB to 64 TiB"),
    ("64GiB@200", None, "bytes per second"),
    ("64GiB", 0, "from 1 to 1024"),
    ("64GiB", -2, "from 1 to 1024"),
    ("64GiB", 5000, "from 1 to 1024"),
]


@pytest.mark.parametrize(("ram", "cores", "message"), BAD_RAM)
def test_ram_and_cores_that_cannot_be_meant_are_refused(ram, cores, message):
    with pytest.raises(KTransformersError, match=message):
        hardware.parse_cpu(ram, cores)


def test_a_described_machine_is_not_measured_and_says_each_thing_once():
    found = hardware.describe(["24GiB", "24GiB", "3090"], "384GiB")
    assert [gpu.name for gpu in found.gpus] == ["24 GiB GPU", "24 GiB GPU", "3090"]
    assert not found.measured and len(found.assumptions) == len(set(found.assumptions)) == 2 + 4
    assert hardware.describe((), "64GiB").gpus == ()


def test_gpus_alone_stand_in_this_machine(monkeypatch):
    cpu, _ = hardware.parse_cpu("64GiB@50GB/s", 8)
    monkeypatch.setattr(hardware, "measure_cpu", lambda progress=None: cpu)
    found = hardware.describe(["24GiB"])
    assert found.cpu is cpu and any("this machine's" in note for note in found.assumptions)


def test_cores_alone_are_refused():
    with pytest.raises(KTransformersError, match="--cores 8: needs --ram"):
        hardware.describe((), None, 8)


# ---- measured ----------------------------------------------------------------------------------------------


def test_this_machine_is_measured_in_sane_figures():
    said = []
    found = hardware.measure(said.append)
    cpu = found.cpu
    assert 0 < cpu.available <= cpu.ram and cpu.ram > 256 << 20
    assert cpu.cores >= 1 and cpu.numa_nodes >= 1 and cpu.name and cpu.isa
    assert 0.2e9 < cpu.read_bandwidth < 5e12, cpu
    assert 0 < cpu.fp32_ops < 1e15 and cpu.int8_ops > 0 and cpu.bf16_ops >= 0, cpu
    assert len(found.gpus) == torch.cuda.device_count() and found.measured
    assert said[:2] == ["reading memory", "multiplying"]


def test_a_gpu_that_cannot_be_measured_is_taken_for_a_known_one(monkeypatch):
    def full(index, properties):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB\nmore lines")

    properties = SimpleNamespace(name="NVIDIA GeForce RTX 3090", total_memory=25_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(hardware, "_measure_gpu", full)
    gpus, notes = hardware.measure_gpus()
    assert gpus == (hardware.Gpu(properties.name, 25_000_000_000, 936e9, 71e12, GPU_MODELS["3090"].link),)
    assert "out of memory" in notes[0] and "more lines" not in notes[0]
    assert not hardware.measure().measured
