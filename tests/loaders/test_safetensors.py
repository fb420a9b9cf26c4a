"""Safetensors files: what the library writes is read, and every damaged header or index is one clear
error."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ktransformers.errors import KTransformersError, UnsupportedError, WeightError
from ktransformers.loaders import bind, open_weights
from tests.loaders.small_files import write_safetensors


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def raw(path, header, data: bytes = bytes(8), length: int | None = None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def test_reads_what_the_library_writes(tmp_path):
    """Names, shapes, types, numbers and metadata equal what was saved, empty and scalar tensors included."""
    saved = {
        "a.weight": torch.randn(3, 5),
        "b.weight": torch.randn(2, 4, 8).bfloat16(),
        "c.bias": torch.randn(7).half(),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
    }
    save_file(saved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with open_weights(tmp_path) as files:
        assert files.format == "safetensors" and files.metadata == {"format": "pt"}
        assert sorted(files.names()) == sorted(saved)
        for name, tensor in saved.items():
            assert files.info(name).shape == tuple(tensor.shape)
            loaded = files.tensor(name)
            assert loaded.dtype == tensor.dtype and torch.equal(loaded, tensor), name
            assert torch.equal(files.tensor(name, dtype=torch.float32), tensor.float())


def test_unaligned_data(tmp_path):
    """A tensor that starts at an odd byte, which the format allows, has the right numbers."""
    values = torch.randn(6)
    path = write_safetensors(tmp_path / "m.safetensors", {
        "byte": ("U8", [1], b"x"), "odd": ("F32", [2, 3], values.numpy().tobytes()),
    })  # fmt: skip
    packed = open_weights(path).packed("odd")
    assert packed.data.data_ptr() % 2 == 1 or packed.data.data_ptr() % 4 != 0
    assert torch.equal(packed.dequantize().view(-1), values)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int32, torch.uint8, torch.bool, torch.float64])
def test_types_not_computed_yet_are_described(dtype, tmp_path):
    """A tensor of a type that is not computed can be described by name and size; its numbers are refused by
    name."""
    save_file({"w": torch.zeros(4, 8).to(dtype)}, tmp_path / "model.safetensors")
    files = open_weights(tmp_path)
    info = files.info("w")
    assert info.shape == (4, 8) and info.nbytes == 32 * dtype.itemsize
    with pytest.raises(UnsupportedError, match=info.type.name):
        files.tensor("w")


DAMAGED = {
    "no header": (b"", 0, "not a safetensors file"),
    "only data": (b"", 8, "not valid JSON"),
    "header length": ({"a": entry()}, 1 << 60, "header of 1152921504606846976 bytes"),
    "not json": (b"{nonsense", None, "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', None, "not valid JSON"),
    "deep json": (b"[" * 100_000, None, "not valid JSON"),
    "not an object": (b"[1, 2]", None, "expected an object"),
    "duplicate name": (
        b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": 1}',
        None,
        "'a' occurs twice",
    ),
    "metadata": ({"__metadata__": 3}, None, "__metadata__"),
    "no entry": ({"a": 5}, None, "no description"),
    "dtype": ({"a": entry("F31")}, None, "'F31'.*did you mean 'F32'"),
    "dtype a list": ({"a": entry(["F32"])}, None, "dtype"),
    "negative size": ({"a": entry(shape=(-2,))}, None, "expected a list of sizes"),
    "fractional size": ({"a": entry(shape=(2.0,))}, None, "expected a list of sizes"),
    "boolean size": ({"a": entry(shape=(True, 2))}, None, "expected a list of sizes"),
    "overflowing size": ({"a": entry(shape=(1 << 32, 1 << 32))}, None, "expected a list of sizes"),
    "offsets missing": ({"a": {"dtype": "F32", "shape": [2]}}, None, "data_offsets None"),
    "offsets reversed": ({"a": entry(offsets=(8, 0))}, None, "bytes 8 to 0"),
    "offsets outside": ({"a": entry(offsets=(0, 16), shape=(4,))}, None, "data section of 8"),
    "shape and bytes": ({"a": entry(shape=(3,))}, None, "has 8 bytes, expected 12"),
    "overlap": ({"a": entry(), "b": entry(shape=(1,), offsets=(4, 8))}, None, "'a'.*and 'b'.*overlap"),
    "same bytes": ({"a": entry(), "b": entry()}, None, "overlap"),
    "hole": ({"a": entry(shape=(1,), offsets=(0, 4))}, None, "cover 4 of 8 bytes"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_headers(case, tmp_path):
    """Each kind of damage is an error that names the file and the tensor."""
    header, length, message = DAMAGED[case]
    path = raw(tmp_path / "model.safetensors", header, length=length)
    with pytest.raises(WeightError, match=message) as caught:
        open_weights(tmp_path)
    assert str(path) in str(caught.value)


def test_every_truncation_and_random_damage(tmp_path):
    """Cut or damaged anywhere, a file opens or is refused by an error of ours, never by another exception."""
    path = tmp_path / "model.safetensors"
    save_file({f"layers.{i}.weight": torch.randn(4, 4) for i in range(4)}, path)
    content = path.read_bytes()
    for size in range(0, len(content), 2):
        path.write_bytes(content[:size])
        with pytest.raises(KTransformersError):
            open_weights(path)
    rng = np.random.default_rng(0)
    for _ in range(700):
        damaged = bytearray(content)
        for at in rng.integers(0, 300, rng.integers(1, 4)):
            damaged[at] = int(rng.choice(list(b'0129[]{}",:\\\x00\xff-e.')))
        path.write_bytes(bytes(damaged))
        try:
            files = open_weights(path)
            [files.packed(name) for name in files.names()]
        except KTransformersError:
            pass


# --- shards -------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """Two shards and their index: a, b in the first, c in the second."""
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": torch.ones(4)}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"a": 1, "b": 1, "c": 2}
    return tmp_path, {name: f"model-0000{i}-of-00002.safetensors" for name, i in weight_map.items()}


def write_index(folder, weight_map, text: str | None = None):
    path = folder / "model.safetensors.index.json"
    path.write_text(text if text is not None else json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_sharded(sharded):
    """The folder and any shard open all shards, with an index and without; and so does the index."""
    folder, weight_map = sharded
    places = [
        folder,
        folder / "model-00001-of-00002.safetensors",
        folder / "model-00002-of-00002.safetensors",
    ]
    opened = [open_weights(place) for place in places]
    index = write_index(folder, weight_map)
    opened += [open_weights(place) for place in (*places, index)]
    for files in opened:
        assert sorted(files.names()) == ["a", "b", "c"] and len(files.paths) == 2


def test_missing_shard(sharded):
    """A shard that is not there is named, by index and by name."""
    folder, weight_map = sharded
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightError, match="1 of 2.*\n.*model-00002-of-00002.safetensors"):
        open_weights(folder)
    write_index(folder, weight_map)
    with pytest.raises(WeightError, match="1 of 2.*\n.*model-00002-of-00002.safetensors"):
        open_weights(folder)


INDEXES = {
    "tensor missing": (lambda m: m | {"d": m["a"]}, "d: the index places it"),
    "tensor elsewhere": (lambda m: m | {"c": m["a"]}, "c: the index places it in model-00001"),
    "another folder": (lambda m: m | {"d": "../secret.safetensors"}, "not a file of its folder"),
    "absolute path": (lambda m: m | {"d": "/etc/passwd"}, "not a file of its folder"),
    "dots": (lambda m: m | {"d": ".."}, "not a file of its folder"),
    "number": (lambda m: m | {"d": 3}, "expected an object of file names"),
    "nothing": (lambda m: {}, "expected an object of file names"),
    "long name": (lambda m: m | {"d": "x" * 5000}, "1 of 3"),
    "null byte": (lambda m: m | {"d": "x\0y"}, "1 of 3"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_damaged_index(sharded, case):
    """An index that does not agree with the files, or points outside the folder, is refused by name."""
    folder, weight_map = sharded
    change, message = INDEXES[case]
    write_index(folder, change(weight_map))
    with pytest.raises(WeightError, match=message):
        open_weights(folder)


def test_index_that_is_no_index(sharded):
    """An index that is not JSON, or has no weight_map, is named."""
    folder, _ = sharded
    index = write_index(folder, {}, text="{")
    with pytest.raises(WeightError, match=f"{index.name}.*not valid JSON"):
        open_weights(folder)
    write_index(folder, {}, text='{"weight_map": [1]}')
    with pytest.raises(WeightError, match="weight_map"):
        open_weights(folder)


def test_same_tensor_in_two_shards(sharded):
    """A tensor in two shards is an error without an index; with one, the index decides."""
    folder, weight_map = sharded
    save_file({"c": torch.ones(4), "a": torch.zeros(2)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(WeightError, match="'a' is in .*00001.* and in .*00002"):
        open_weights(folder)
    write_index(folder, weight_map)
    assert open_weights(folder).tensor("a").tolist() == [1, 1]
    write_index(folder, weight_map | {"a": weight_map["c"]})
    assert open_weights(folder).tensor("a").tolist() == [0, 0]


def test_only_the_models_files(tmp_path):
    """A folder with an adapter or a second layout beside model.safetensors opens the model alone."""
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert open_weights(tmp_path).names() == ["a"]


def at(folder, **files):
    """Files of weights by stem, each with one tensor `w` of its own number."""
    for stem, number in files.items():
        save_file({"w": torch.full((2,), float(number))}, folder / f"{stem.replace('__', '-')}.safetensors")


def index(folder, stem, file):
    text = json.dumps({"metadata": {"total_size": 8}, "weight_map": {"w": f"{file}.safetensors"}})
    (folder / f"{stem}.safetensors.index.json").write_text(text)


SHARD = "model-00001-of-00001"
FOLDERS = {  # what is there, and which file counts
    "another layout's index": (lambda f: (at(f, model=1, other=2), index(f, "consolidated", "other")), 1),
    "an index that is left over": (lambda f: (at(f, model=1, other=2), index(f, "model", "other")), 1),
    "an index without its files": (lambda f: (at(f, model=1), index(f, "model", "gone")), 1),
    "a variant": (lambda f: at(f, **{"model": 1, "model.fp16": 2}), 1),
    "a variant's index": (lambda f: (at(f, **{"model.fp16": 2, SHARD: 1}), index(f, "model", SHARD),
                                     index(f, "model.fp16", "model.fp16")), 1),
    "an adapter": (lambda f: (at(f, adapter_model=2, **{SHARD: 1}), index(f, "model", SHARD)), 1),
    "two indexes": (lambda f: (at(f, consolidated=2, **{SHARD: 1}), index(f, "model", SHARD),
                               index(f, "consolidated", "consolidated")), 1),
    "named by the config": (lambda f: (at(f, model=2, mine=1), named(f, "mine.safetensors")), 1),
    "an index named by the config": (lambda f: (at(f, model=2, mine=1), index(f, "x", "mine"),
                                                named(f, "x.safetensors.index.json")), 1),
}  # fmt: skip


def named(folder, name):
    config = json.loads((folder / "config.json").read_text()) | {"transformers_weights": name}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("case", FOLDERS)
def test_of_a_folder_the_files_count_that_transformers_reads(case, tmp_path):
    class Model(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.w = torch.nn.Parameter(torch.zeros(2))
            self.post_init()

        def _init_weights(self, module):
            pass

    LlamaConfig().save_pretrained(tmp_path)
    write, number = FOLDERS[case]
    write(tmp_path)
    assert Model.from_pretrained(tmp_path).w.tolist() == [number, number]
    assert open_weights(tmp_path).tensor("w").tolist() == [number, number]


def test_folders_that_only_we_read(tmp_path):
    """Shards whose index is lost come before another layout's index; a lone index of another name is read."""
    at(tmp_path, other=2, **{SHARD: 1})
    index(tmp_path, "consolidated", "other")
    assert open_weights(tmp_path).tensor("w").tolist() == [1, 1]
    (tmp_path / f"{SHARD}.safetensors").unlink()
    assert open_weights(tmp_path).tensor("w").tolist() == [2, 2]


@pytest.mark.parametrize("name", ["gone.safetensors", "../x.safetensors", "model.bin", 3])
def test_a_config_that_names_no_weights(name, tmp_path):
    at(tmp_path, model=1)
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": name}))
    with pytest.raises(WeightError, match="gone.safetensors" if name == "gone.safetensors" else "transformers_weights is"):
        open_weights(tmp_path)


def test_what_is_passed_over_is_named_when_something_is_missing(tmp_path):
    at(tmp_path, model=1, other=2)
    index(tmp_path, "model", "other")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8))
    problems = bind(open_weights(tmp_path), model).problems({"model.norm.weight": (8,)})
    assert "model.safetensors.index.json, which is not read, as transformers does not; give its path" in problems[0]
    given = bind(open_weights(tmp_path / "model.safetensors"), model).problems({"model.norm.weight": (8,)})
    assert not any("not read" in text for text in given)


def test_an_index_left_in_a_folder_of_gguf_files(tmp_path):
    index(tmp_path, "model", SHARD)
    with pytest.raises(WeightError, match=f"1 of 1.*\n.*{SHARD}"):
        open_weights(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightError, match="m.gguf"):
        open_weights(tmp_path)


def test_folder_without_weights(tmp_path):
    """A model folder with pickled weights only, or none, says so with the next step."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightError, match="without weights.*config.json.*Download"):
        open_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightError, match="pickled.*save_pretrained"):
        open_weights(tmp_path)
    (tmp_path / "weights.txt").write_text("")
    with pytest.raises(WeightError, match="expected a .gguf or .safetensors"):
        open_weights(tmp_path / "weights.txt")
