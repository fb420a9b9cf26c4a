"""GGUF files: what the gguf package writes is read, and every damaged or hostile header is one clear
error."""

import resource
import struct
import time

import gguf
import numpy as np
import pytest
import torch

from ktransformers.errors import KTransformersError, UnsupportedError, WeightError
from ktransformers.loaders import open_weights
from ktransformers.quants.blocks import QUANT_TYPES

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10  # metadata type ids


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def entry(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def tensor(name="a.weight", dims=(32, 2), kind=0, offset=0, n_dims=None) -> bytes:
    n_dims = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", n_dims, *dims, kind, offset)


def header(tensors=(), entries=(), version=3, n_tensors=None, n_entries=None, magic=b"GGUF") -> bytes:
    counts = struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(entries) if n_entries is None else n_entries,
    )
    return magic + counts + b"".join(entries) + b"".join(tensors)


def padded(head: bytes, data: int = 256, alignment: int = 32) -> bytes:
    return head + bytes(-len(head) % alignment) + bytes(range(256)) * (data // 256 + 1)


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def good_file(path, arch="qwen3moe", **kwargs):
    """A file of the gguf package's own writer, with metadata of every kind and two tensors."""
    writer = gguf.GGUFWriter(path, arch, **kwargs)
    writer.add_block_count(2)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_int8("a.negative", -3)
    writer.add_string("a.text", "zwölf")
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_token_list(["<s>", "Ġa", "ß"])
    rng = np.random.default_rng(0)
    writer.add_tensor("one.weight", rng.random((3, 64), dtype=np.float32))
    quantized = gguf.quantize(rng.random((2, 4, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("two.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_the_gguf_package_writes(tmp_path):
    """Names, shapes, types, bytes and metadata of a file equal what was written, as the gguf package reads
    it."""
    path = good_file(tmp_path / "x.gguf")
    with open_weights(path) as files:
        assert files.format == "gguf" and files.paths == [path]
        assert files.names() == ["one.weight", "two.weight"]
        assert files.info("two.weight").shape == (2, 4, 64)
        assert files.info("two.weight").type is QUANT_TYPES["Q8_0"]
        for theirs in gguf.GGUFReader(path).tensors:
            ours = files.packed(theirs.name)
            assert ours.data.numpy().tobytes() == theirs.data.tobytes()
            expected = torch.from_numpy(gguf.dequantize(theirs.data, theirs.tensor_type).copy())
            assert torch.equal(files.tensor(theirs.name), expected.view(ours.shape))
        meta = files.metadata
        assert meta["general.architecture"] == "qwen3moe" and meta["qwen3moe.block_count"] == 2
        assert (meta["a.float"], meta["a.bool"], meta["a.negative"], meta["a.text"]) == (
            0.5,
            True,
            -3,
            "zwölf",
        )
        assert list(meta["a.numbers"]) == [1, 2, 3] and meta["tokenizer.ggml.tokens"][1] == "Ġa"
        assert len(meta["tokenizer.ggml.tokens"]) == 3


def test_version_2_and_alignment(tmp_path):
    """Version 2 files, and files aligned to something other than 32, are read where their data are."""
    alignment = entry("general.alignment", U32, struct.pack("<I", 64))
    content = padded(header([tensor()], [alignment], version=2), 256, 64)
    files = open_weights(write(tmp_path / "v2.gguf", content))
    assert files.info("a.weight").start % 64 == 0
    assert files.packed("a.weight").data[:4].tolist() == [0, 1, 2, 3]


def test_views_survive_closing(tmp_path):
    """A packed view stays readable after the file is closed and deleted; asking a closed file is an error."""
    path = good_file(tmp_path / "x.gguf")
    files = open_weights(path)
    view = files.packed("one.weight")
    before = view.data.clone()
    files.close()
    path.unlink()
    assert torch.equal(view.data, before)
    with pytest.raises(WeightError, match="closed"):
        files.tensor("one.weight")


def test_writing_to_a_view_does_not_reach_the_file(tmp_path):
    """A stray write to a packed tensor changes memory only."""
    path = good_file(tmp_path / "x.gguf")
    before = path.read_bytes()
    open_weights(path).packed("one.weight").data.zero_()
    assert path.read_bytes() == before


def test_large_vocabulary_opens_fast(tmp_path):
    """A file with 150k tokens and as many merges opens in well under a second, tokens readable on demand."""
    count = 150_000
    strings = b"".join(text(f"token{i}") for i in range(count))
    array = struct.pack("<IQ", STRING, count) + strings
    entries = [entry("tokenizer.ggml.tokens", ARRAY, array), entry("tokenizer.ggml.merges", ARRAY, array)]
    path = write(tmp_path / "big.gguf", padded(header([tensor()], entries)))
    start = time.perf_counter()
    files = open_weights(path)
    seconds = time.perf_counter() - start
    assert files.metadata["tokenizer.ggml.tokens"][149_999] == "token149999"
    assert seconds < 1.0, f"{seconds:.2f} s"


def test_a_file_larger_than_memory(tmp_path):
    """A file of 64 GiB opens without memory: only the pages that are looked at are read."""
    rows = 1 << 26
    path = write(tmp_path / "big.gguf", padded(header([tensor(dims=(256, rows))])))
    with open(path, "r+b") as file:
        file.truncate((64 << 30) + 4096)  # sparse: zeros that take no disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    packed = open_weights(path).packed("a.weight")
    assert packed.nbytes == 64 << 30
    assert packed.rows(rows - 2, rows).dequantize().count_nonzero() == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "KiB of memory"


def test_info_of_an_unknown_name_helps(tmp_path):
    """A misspelt tensor name is answered with the closest one."""
    with pytest.raises(WeightError, match="did you mean 'one.weight'"):
        open_weights(good_file(tmp_path / "x.gguf")).info("one.wieght")


HUGE = 1 << 62
HOSTILE = {
    "magic": (header(magic=b"GGML") + bytes(64), "not a GGUF file"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "version 1": (header(version=1) + bytes(64), "version 1"),
    "version 9": (header(version=9) + bytes(64), "version 9"),
    "big endian": (header(version=3 << 24) + bytes(64), "big-endian"),
    "only magic": (b"GGUF", "cut short"),
    "tensor count": (header(n_tensors=HUGE) + bytes(64), "announces 4611686018427387904 tensors"),
    "entry count": (header(n_entries=HUGE) + bytes(64), "metadata entries"),
    "entry count, wrapped": (header(n_entries=(1 << 64) - 1) + bytes(64), "metadata entries"),
    "key length": (header(entries=[struct.pack("<Q", HUGE)]) + bytes(64), "claims a length"),
    "key not utf-8": (header(entries=[text(b"\xff\xfe") + bytes(8)]) + bytes(64), "not UTF-8"),
    "empty key": (header(entries=[text("") + bytes(8)]) + bytes(64), "length of 0 bytes"),
    "value type": (header(entries=[entry("k", 77, bytes(8))]) + bytes(64), "type 77"),
    "duplicate key": (padded(header(entries=[entry("k", U32, bytes(4))] * 2)), "'k' occurs twice"),
    "array count": (
        header(entries=[entry("k", ARRAY, struct.pack("<IQ", U32, HUGE))]) + bytes(64),
        "array elem",
    ),
    "string array count": (
        header(entries=[entry("k", ARRAY, struct.pack("<IQ", STRING, HUGE))]) + bytes(64),
        "strings",
    ),
    "string array item": (
        header(entries=[entry("k", ARRAY, struct.pack("<IQQ", STRING, 2, HUGE))]) + bytes(64),
        "runs beyond the end",
    ),
    "array type": (
        header(entries=[entry("k", ARRAY, struct.pack("<IQ", 99, 1))]) + bytes(64),
        "array of type 99",
    ),
    "nested arrays": (
        header(entries=[entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 9)]) + bytes(64),
        "nested more than",
    ),
    "nested array count": (
        header(entries=[entry("k", ARRAY, struct.pack("<IQ", ARRAY, HUGE))]) + bytes(64),
        "nested",
    ),
    "alignment 0": (padded(header(entries=[entry("general.alignment", U32, bytes(4))])), "power of two"),
    "alignment 24": (
        padded(header(entries=[entry("general.alignment", U32, struct.pack("<I", 24))])),
        "power of two",
    ),
    "alignment text": (
        padded(header(entries=[entry("general.alignment", STRING, text("32"))])),
        "power of two",
    ),
    "dimensions 0": (padded(header([tensor(dims=())])), "has 0 dimensions"),
    "dimensions 5": (padded(header([tensor(dims=(1, 1, 1, 1, 1))])), "has 5 dimensions"),
    "dimensions huge": (padded(header([tensor(n_dims=0xFFFFFFFF)])), "has 4294967295 dimensions"),
    "dimension of zero": (padded(header([tensor(dims=(32, 0))])), "impossible shape"),
    "product overflow": (padded(header([tensor(dims=(1 << 32, 1 << 32))])), "impossible shape"),
    "product overflow to small": (padded(header([tensor(dims=(1 << 33, 1 << 31, 2))])), "impossible shape"),
    "type unknown": (padded(header([tensor(kind=1234)])), "type id 1234"),
    "type withdrawn": (padded(header([tensor(kind=31)])), "Q4_0_4_4"),
    "row not whole blocks": (padded(header([tensor(dims=(33, 2), kind=8)])), "multiple of 32"),
    "offset unaligned": (padded(header([tensor(offset=8)])), "not a multiple of the alignment"),
    "offset outside": (padded(header([tensor(offset=1 << 40)])), "ends at byte"),
    "offset wraps": (padded(header([tensor(offset=(1 << 64) - 32)])), "ends at byte"),
    "data cut short": (padded(header([tensor(dims=(32, 64))]))[:600], "ends at byte"),
    "overlap": (padded(header([tensor(), tensor("b.weight", offset=32)]), 512), "overlap"),
    "duplicate name": (padded(header([tensor(), tensor(offset=256)]), 1024), "'a.weight' occurs twice"),
    "empty": (b"", "empty"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(case, tmp_path):
    """Each kind of damage is an error of ours that names the file and the damage."""
    content, message = HOSTILE[case]
    path = write(tmp_path / "bad.gguf", content)
    with pytest.raises((WeightError, UnsupportedError), match=message) as caught:
        open_weights(path)
    assert str(path) in str(caught.value)


def open_and_look(path):
    """Open, and touch all that can be touched without a model."""
    with open_weights(path) as files:
        for value in files.metadata.values():
            if not isinstance(value, (str, int, float, bool)):
                list(value)
        for name in files.names():
            if files.info(name).type.computed:
                files.tensor(name)


def test_every_truncation(tmp_path):
    """A file cut anywhere is refused by an error of ours, never by another exception."""
    content = good_file(tmp_path / "x.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 700, 3), *range(700, len(content), 31)]:
        write(path, content[:size])
        try:
            open_and_look(path)
        except KTransformersError as error:
            assert str(path) in str(error)
        else:  # the gguf package pads the end, so the last bytes may go
            assert size > len(content) - 32, f"accepted at {size} of {len(content)} bytes"


def test_random_damage(tmp_path):
    """Random bytes in a header give a readable file or an error of ours, never another exception or a
    crash."""
    content = good_file(tmp_path / "x.gguf").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "bad.gguf"
    refused = 0
    for _ in range(800):
        damaged = bytearray(content)
        for at in rng.integers(0, 700, rng.integers(1, 4)):
            damaged[at] = rng.choice([0, 1, 2, 8, 9, 0x7F, 0xFF, int(rng.integers(256))])
        write(path, bytes(damaged))
        try:
            open_and_look(path)
        except KTransformersError:
            refused += 1
    assert 200 < refused < 800


# --- split files, folders -----------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path):
    good_file(tmp_path / "m.gguf", split_max_tensors=1)
    return tmp_path


@pytest.mark.parametrize("which", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "."])
def test_split_set(split, which):
    """Any file of a split set, and their folder, opens the whole set with the first file's metadata."""
    files = open_weights(split / which)
    assert sorted(files.names()) == ["one.weight", "two.weight"] and len(files.paths) == 2
    assert files.metadata["qwen3moe.block_count"] == 2
    assert files.info("two.weight").file.name == "m-00002-of-00002.gguf"
    assert files.tensor("two.weight").shape == (2, 4, 64)


def test_missing_shard_is_named(split):
    """A set with a file missing names that file."""
    (split / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(WeightError, match="1 of 2 files.*\n.*m-00002-of-00002.gguf"):
        open_weights(split)


def test_shards_of_different_sets(split):
    """Files renamed into one set that do not belong together are refused."""
    (split / "m-00001-of-00002.gguf").replace(split / "x")
    (split / "m-00002-of-00002.gguf").rename(split / "m-00001-of-00002.gguf")
    (split / "x").rename(split / "m-00002-of-00002.gguf")
    with pytest.raises(WeightError, match="split.no is 1, expected 0"):
        open_weights(split)


def test_renamed_shard(split):
    """One file of a set under a name of its own does not pass for the whole model."""
    (split / "m-00001-of-00002.gguf").rename(split / "model.gguf")
    with pytest.raises(WeightError, match="split.count is 2, expected 1"):
        open_weights(split / "model.gguf")


def test_same_tensor_in_two_shards(tmp_path):
    """A tensor that two files of a set hold is an error naming both."""
    for i in (1, 2):
        write(tmp_path / f"m-0000{i}-of-00002.gguf", padded(header([tensor()])))
    with pytest.raises(WeightError, match=r"'a.weight' is in .*00001-of-00002.gguf and in .*00002-of-00002"):
        open_weights(tmp_path)


def test_folders(tmp_path):
    """A folder opens its one model, passing over vision towers; none or several models are named."""
    with pytest.raises(WeightError, match="without weights.*it is empty"):
        open_weights(tmp_path)
    good_file(tmp_path / "x.gguf")
    good_file(tmp_path / "mmproj-x.gguf")
    assert open_weights(tmp_path).paths == [tmp_path / "x.gguf"]
    good_file(tmp_path / "y.gguf")
    with pytest.raises(WeightError, match="2 GGUF models.*x.gguf, y.gguf"):
        open_weights(tmp_path)
    (tmp_path / "two").mkdir()
    for count in (1, 2):
        good_file(tmp_path / "two" / f"m-00001-of-0000{count}.gguf")
    with pytest.raises(WeightError, match="2 GGUF models.*of-00001.gguf, .*of-00002.gguf"):
        open_weights(tmp_path / "two")
    with pytest.raises(WeightError, match="no such file"):
        open_weights(tmp_path / "z.gguf")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "Q4").mkdir()
    good_file(tmp_path / "deep" / "Q4" / "x.gguf")
    with pytest.raises(WeightError, match="subfolders .Q4."):
        open_weights(tmp_path / "deep")
