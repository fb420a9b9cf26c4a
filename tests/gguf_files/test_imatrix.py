"""Importance matrices of both formats, what is refused, and what `quantize` makes of them."""

import struct

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ktransformers import cli, native
from ktransformers.errors import WeightError
from ktransformers.gguf_files.imatrix import read_imatrix
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.loaders import bind, open_weights
from tests.loaders import small_files

if not native.available():
    pytest.skip(native.NOT_BUILT, allow_module_level=True)

WIDE = dict(hidden_size=256, intermediate_size=256, moe_intermediate_size=256)
DOWN, QUERY = "blk.0.ffn_down_exps.weight", "blk.0.attn_q.weight"


def dat(path, entries, calls=4, footer=b"\x07\0\0\0\x03\0\0\0abc"):
    """A .dat of llama-imatrix: name -> means."""
    data = struct.pack("<i", len(entries))
    for name, means in entries.items():
        values = (np.asarray(means, dtype=np.float32) * calls).tobytes()
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values) // 4) + values
    path.write_bytes(data + footer)
    return path


def gguf_file(path, entries, suffixes=(".in_sum2", ".counts")):
    """The same in GGUF: name -> sums [matrices, columns], counts [matrices]."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    for name, (sums, counts) in entries.items():
        for suffix, values in zip(suffixes, (sums, np.asarray(counts).reshape(-1, 1)), strict=False):
            writer.add_tensor(name + suffix, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "hf"
    small_files.model("qwen3_moe", **WIDE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def means():
    """Of four experts and of a plain matrix."""
    rng = np.random.default_rng(0)
    return {DOWN: 10 ** rng.uniform(-2, 2, 4 * 256), QUERY: 10 ** rng.uniform(-2, 2, 256)}


def test_both_formats_say_the_same(tmp_path, means):
    counts = np.array([3, 5, 7, 9])
    ours = read_imatrix(dat(tmp_path / "a.dat", means))
    theirs = read_imatrix(
        gguf_file(
            tmp_path / "a.gguf",
            {DOWN: (means[DOWN].reshape(4, 256) * counts[:, None], counts), QUERY: (means[QUERY][None] * 6, [6])},
        )
    )
    assert set(ours.entries) == set(theirs.entries) == {DOWN, QUERY}
    for name, values in means.items():
        for found in (ours, theirs):
            assert torch.allclose(found.entries[name], torch.from_numpy(values).float(), rtol=1e-5)
    assert ours.of(DOWN, (4, 64, 256)).shape == (4, 256) and ours.of("none", (2, 256)) is None
    old = read_imatrix(dat(tmp_path / "old.dat", means, footer=b""))  # before chunks and the text were noted
    assert torch.equal(old.entries[QUERY], ours.entries[QUERY])


def test_an_expert_without_a_token_counts_alike(tmp_path):
    found = read_imatrix(gguf_file(tmp_path / "a.gguf", {DOWN: (np.ones((2, 4)) * 6, [0, 3])}))
    assert found.entries[DOWN].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("cut", [2, 5, 9, 40, 500])
def test_a_cut_dat_is_one_error(tmp_path, means, cut):
    path = dat(tmp_path / "a.dat", means)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(WeightError, match="damaged.*llama-imatrix"):
        read_imatrix(path)


def test_damaged_files_are_one_error_each(tmp_path, means):
    def fails(path, match):
        with pytest.raises(WeightError, match=match):
            read_imatrix(path)

    fails(tmp_path / "none.dat", "no such file")
    (tmp_path / "empty").write_bytes(b"")
    fails(tmp_path / "empty", "empty")
    (tmp_path / "text").write_bytes(b"not a matrix at all, but some text of any length " * 9)
    fails(tmp_path / "text", "damaged")
    fails(dat(tmp_path / "nothing.dat", {}), "without an entry")
    for bad in (-1.0, float("nan"), float("inf")):
        fails(dat(tmp_path / "bad.dat", {QUERY: [bad] * 256}), f"{QUERY} has values")
    whole = gguf_file(tmp_path / "a.gguf", {QUERY: (np.ones((1, 256)), [1])})
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:-100])
    fails(tmp_path / "cut.gguf", "no importance matrix can be read")
    fails(gguf_file(tmp_path / "b.gguf", {QUERY: (np.ones((1, 256)), [1])}, (".in_sum2",)), "needs .in_sum2 and .counts")
    fails(gguf_file(tmp_path / "c.gguf", {QUERY: (np.ones((1, 256)), [1])}, (".data", ".more")), "no importance matrix")
    fails(gguf_file(tmp_path / "d.gguf", {QUERY: (np.ones((1, 256)), [1, 2, 3])}), "256 sums for 3 matrices")


def test_a_matrix_of_another_model_is_one_error(folder, tmp_path, means):
    """All names without a tensor and wrong lengths at once, before anything is written."""
    path = dat(tmp_path / "a.dat", means | {"blk.0.attn_k.weight": np.ones(64), "blk.0.attn_qq.weight": np.ones(256)})
    with pytest.raises(WeightError) as caught:
        quantize_folder(folder, tmp_path / "m.gguf", "Q4_K_M", imatrix=path)
    text = str(caught.value)
    assert "blk.0.attn_k.weight: 64 values, expected 256" in text and len(caught.value.problems) == 2
    assert "blk.0.attn_qq.weight: the model has no such tensor (did you mean 'blk.0.attn_q.weight'?)" in text
    assert not (tmp_path / "m.gguf").exists()


def test_errors_count_as_the_matrix_says(folder, tmp_path, means):
    """The weighted error of each expert and of the plain matrix falls; the rest keeps its bytes; the file says so."""
    path = dat(tmp_path / "a.dat", means)
    done = quantize_folder(folder, tmp_path / "with.gguf", "Q3_K_M", imatrix=path)
    quantize_folder(folder, tmp_path / "without.gguf", "Q3_K_M")
    (notice,) = [n for n in done["notices"] if "no entry" in n]
    assert "a.dat has no entry for " in notice and "more" in notice and QUERY not in notice
    fields = gguf.GGUFReader(tmp_path / "with.gguf").fields
    assert fields["quantize.imatrix.file"].contents() == "a.dat"
    a, b = (open_weights(tmp_path / f"{name}.gguf") for name in ("with", "without"))
    source = bind(open_weights(folder), small_files.meta("qwen3_moe", **WIDE))
    prefix = "model.layers.0.mlp.experts"
    true = torch.stack([matrix.dequantize() for matrix in source.experts(prefix).down])
    for name, truth in ((DOWN, true), (QUERY, source.tensor("model.layers.0.self_attn.q_proj.weight", dtype=torch.float32)[None])):
        weights = torch.from_numpy(means[name]).view(-1, 1, 256)
        lost = [((f.tensor(name).float().view(truth.shape) - truth).square() * weights).sum((1, 2)) for f in (a, b)]
        assert bool((lost[0] < 0.97 * lost[1]).all()), name
    same = [name for name in a.names() if name not in means]
    assert all(torch.equal(a.packed(name).data, b.packed(name).data) for name in same)


def test_the_command(folder, tmp_path, means):
    path = dat(tmp_path / "a.dat", means)
    command = ["quantize", str(folder), str(tmp_path / "m.gguf"), "--type", "IQ4_XS", "--imatrix"]
    ran = CliRunner().invoke(cli.app, [*command, str(path)])
    assert ran.exit_code == 0 and "IQ4_XS" in ran.stdout and ran.stdout.count("has no entry for") == 1
    ran = CliRunner().invoke(cli.app, [*command, str(tmp_path / "none.dat"), "--force"])
    assert ran.exit_code == 1 and ran.stdout == "" and "no such file" in ran.stderr
