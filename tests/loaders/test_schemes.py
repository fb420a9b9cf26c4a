"""Checkpoints of codes and companions: every published layout gives the numbers that its definition says, through views
of the file, and every layout that does not fit is one clear error."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.loaders import bind, open_weights
from ktransformers.quants.scaled import F8_E4M3, GPTQ4, I4, SCALED_TYPES, ScaledWeight
from tests.loaders import published, small_files
from tests.loaders.published import FORMATS

EACH = pytest.mark.parametrize("form", FORMATS)
LAYER = "model.layers.0.self_attn.q_proj"


def write(folder, tensors: dict, config: dict | None = None, name="config.json"):
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    if config:
        (folder / name).write_text(json.dumps({"quantization_config": config} if name == "config.json" else config))
    return folder


def layer(folder, form: str, n: int, k: int, seed=0, **extra):
    """A checkpoint of one layer: (files, values)."""
    make, _, _, config = FORMATS[form]
    parts, values = make(n, k, np.random.default_rng(seed))
    tensors = {f"{LAYER}.{name}": tensor for name, tensor in (parts | extra).items()}
    return open_weights(write(folder, tensors, config)), torch.from_numpy(np.ascontiguousarray(values))


def same(found, values):
    """Equal up to the rounding of two products."""
    torch.testing.assert_close(found, values.float(), rtol=3e-7, atol=0)


# --- numbers ----------------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("n, k", [(64, 96), (8, 32), (200, 320)])
def test_every_layout_has_the_numbers_of_its_definition(form, n, k, tmp_path):
    """Types, shapes and numbers, in other dtypes too; the companions are no tensors of their own."""
    files, values = layer(tmp_path, form, n, k)
    name, (_, kind, _, _) = f"{LAYER}.weight", FORMATS[form]
    assert files.names() == [name]
    info, packed = files.info(name), files.packed(name)
    assert info.shape == packed.shape == (n, k) and info.type.name == packed.type.name == kind and info.type.computed
    assert info.nbytes == packed.nbytes or packed.order is None
    same(packed.dequantize(), values)
    same(files.tensor(name), values)
    assert torch.equal(files.tensor(name, dtype=torch.bfloat16), packed.dequantize().bfloat16())


@EACH
def test_nothing_is_copied_and_no_alignment_is_needed(form, tmp_path):
    """Codes, scales and zeros are views of the mapped file wherever they lie in it."""
    make, _, _, config = FORMATS[form]
    parts, values = make(16, 64, np.random.default_rng(1))
    kinds = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0", torch.uint8: "U8", torch.int8: "I8",
             torch.int32: "I32", torch.int64: "I64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # fmt: skip
    stored = {"pad": ("U8", [1], b"x")}  # so that everything behind starts at an odd byte
    for part, tensor in parts.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        stored[f"{LAYER}.{part}"] = (kinds[tensor.dtype], list(tensor.shape), raw)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    files = open_weights(small_files.write_safetensors(tmp_path / "model.safetensors", stored))
    packed = files.packed(f"{LAYER}.weight")
    mapped = files.packed("pad").data.untyped_storage().data_ptr()
    for view in (packed.data, packed.scales, packed.zeros):
        assert view is None or view.untyped_storage().data_ptr() == mapped, "copied"
    assert packed.order is None or packed.order.data_ptr() % 4 == 0
    same(packed.dequantize(), torch.from_numpy(np.ascontiguousarray(values)))


@EACH
def test_rows_are_views_with_the_same_numbers(form, tmp_path):
    """A slice of rows dequantizes to the rows; a cut through what belongs together is an error, never wrong numbers."""
    files, values = layer(tmp_path, form, 256, 96)
    packed = files.packed(f"{LAYER}.weight")
    for start, stop, step in (
        (0, 128, 1),
        (128, 256, 1),
        (128, 200, 1),
        (0, 256, 2),
        (1, 256, 2),
        (8, 24, 1),
        (3, 5, 1),
    ):
        try:
            part = packed.rows(start, stop, step)
        except WeightError as error:
            assert re.search(r"expected multiples of (2|4|8|128)\b", str(error)), error
            assert (start, stop, step) not in ((0, 128, 1), (128, 256, 1))
            continue
        assert part.data.untyped_storage().data_ptr() == packed.data.untyped_storage().data_ptr()
        assert part.shape == (len(range(start, stop, step)), 96)
        same(part.dequantize(), values[start:stop:step])


@EACH
def test_what_c_is_told_covers_the_bytes(form, tmp_path):
    """`stride` and `span` say where the last line ends, for whole weights and for slices."""
    files, _ = layer(tmp_path, form, 128, 64)
    whole = files.packed(f"{LAYER}.weight")
    for packed in (whole, whole.rows(0, 64) if whole.scale_rows != 128 else whole):
        for part, stride, span in (
            (packed.data, packed.stride, packed.span),
            (packed.scales, packed.scale_stride, packed.scale_span),
            (packed.zeros, packed.zero_stride, packed.zero_span),
        ):
            if part is None:
                assert stride == span == 0
                continue
            lines, width = part.shape
            assert span == (lines - 1) * stride + width
            assert lines == 1 or part[-1].data_ptr() - part.data_ptr() == (lines - 1) * stride
        assert isinstance(packed.global_scale, float) and isinstance(packed.zero_bias, int)


@pytest.mark.parametrize("form", ["fp8_block", "fp8_block_bf16", "fp8_block_ue8m0", "mxfp8", "mxfp4"])
def test_transformers_dequantizes_to_the_same(form, tmp_path):
    """Its own FP8 and FP4 conversion, on the same tensors, bit for bit."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    files, _ = layer(tmp_path, form, 256, 384)
    parts, _ = FORMATS[form][0](256, 384, np.random.default_rng(0))
    codes, scales = parts.values()
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    assert torch.equal(files.tensor(f"{LAYER}.weight"), theirs)


def test_extreme_codes_and_scales(tmp_path):
    """The smallest and largest powers of two, their NaN, and e4m3's, come out as the definitions say."""
    codes = torch.tensor([[0x7F, 0xFF, 0x7E, 0x01] * 8] * 3, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.tensor([[0], [254], [255]], dtype=torch.uint8)
    found = open_weights(write(tmp_path, {"x.weight": codes, "x.weight_scale_inv": scales})).tensor("x.weight")
    assert found[0, 0].isnan() and found[1, 1].isnan() and found[2].isnan().all()
    assert found[0, 2] == 448 * 2.0**-127 and found[1, 3] == 2.0**-9 * 2.0**127


@pytest.mark.parametrize("block", [[64, 32], [1, 128], [128, 128]])
def test_block_sizes_come_from_the_config(block, tmp_path):
    """Blocks that do not divide the weight are told by `weight_block_size`."""
    n, k, rng = 200, 72, np.random.default_rng(0)
    codes, values = published._f8(rng, n, k)
    scales = published._scales(rng, -(-n // block[0]), -(-k // block[1]))
    config = {"quant_method": "fp8", "weight_block_size": block}
    files = open_weights(write(tmp_path, {"x.weight": codes, "x.weight_scale_inv": scales}, config))
    same(files.tensor("x.weight"), torch.from_numpy(values * published._spread(scales, *block, n, k)))


def test_stacked_experts_in_fp8(tmp_path):
    """A stack [E, N, K] with scales [E, N/128, K/128], under names with and without `.weight`; each expert is a view."""
    rng = np.random.default_rng(0)
    made = [published.fp8_block(256, 128, rng) for _ in range(3)]
    codes, scales = (torch.stack([parts[name] for parts, _ in made]) for name in ("weight", "weight_scale_inv"))
    tensors = {"e.down_proj": codes, "e.down_proj_scale_inv": scales}
    tensors |= {"moe.up.weight": codes.clone(), "moe.up.weight_scale_inv": scales.clone()}
    files = open_weights(write(tmp_path, tensors))
    for name in ("e.down_proj", "moe.up.weight"):
        packed = files.packed(name)
        assert packed.shape == (3, 256, 128) and packed.type is F8_E4M3
        for e, (_, values) in enumerate(made):
            same(packed.expert(e).rows(128, 256).dequantize(), torch.from_numpy(values)[128:])
            assert torch.equal(packed.dequantize()[e], packed.expert(e).dequantize())


def test_configs_of_older_tools_are_read(tmp_path):
    """`quantize_config.json` beside the weights says v1 or v2 as `config.json` does."""
    parts, values = published.gptq4_v2(16, 64, np.random.default_rng(0))
    tensors = {f"x.{name}": tensor for name, tensor in parts.items()}
    config = published.GPTQ | {"checkpoint_format": "gptq_v2"}
    files = open_weights(write(tmp_path, tensors, config, "quantize_config.json"))
    same(files.tensor("x.weight"), torch.from_numpy(values))


def test_symmetric_weights_with_zero_points_of_zero(tmp_path):
    """Old tools write zero points of symmetric weights: zeros are fine, others are refused by name."""
    for value in (0, 1):
        zero = torch.full((16, 1), value, dtype=torch.int8)
        files, values = layer(tmp_path / str(value), "int8_row", 16, 32, weight_zero_point=zero)
        if value == 0:
            same(files.tensor(f"{LAYER}.weight"), values)
        else:
            with pytest.raises(WeightError, match="weight_zero_point has zero points other than 0"):
                files.packed(f"{LAYER}.weight")


def test_a_promise_about_the_order_is_checked(tmp_path):
    """A config that says desc_act: false beside columns in another order gives the file's numbers, not wrong ones."""
    parts, values = published.gptq4_act_order(16, 128, np.random.default_rng(0))
    tensors = {f"x.{name}": tensor for name, tensor in parts.items()}
    files = open_weights(write(tmp_path, tensors, published.GPTQ))
    assert files.packed("x.weight").order is not None
    same(files.tensor("x.weight"), torch.from_numpy(values))


# --- what does not fit ------------------------------------------------------------------------------------------------


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=torch.uint8).view(dtype) if dtype.itemsize == 1 else torch.zeros(shape, dtype=dtype)


F8, U8T, I32, BF16 = torch.float8_e4m3fn, torch.uint8, torch.int32, torch.bfloat16
BAD = {
    "fp8 without": ({"weight": t(256, 256, dtype=F8)}, {}, r"F8_E4M3 without scales, expected x.weight_scale_inv or"),
    "fp8 grid": (
        {"weight": t(256, 384, dtype=F8), "weight_scale_inv": t(3, 2)}, {},
        r"x.weight_scale_inv has shape \[3, 2\], expected .*\[256, 384\], such as \[2, 3\] or \[256, 1\] or \[1, 1\]"),
    "fp8 scale type": (
        {"weight": t(8, 8, dtype=F8), "weight_scale": t(8, 1, dtype=I32)}, {},
        "x.weight_scale is stored as I32, expected F32 or"),
    "fp8 vector scale": ({"weight": t(8, 8, dtype=F8), "weight_scale": t(7)}, {}, r"x.weight_scale has shape \[7\]"),
    "fp8 four dims": ({"weight": t(2, 2, 8, 8, dtype=F8), "weight_scale": t(1)}, {}, r"expected \[N, K\] or"),
    "fp8 empty": ({"weight": t(0, 8, dtype=F8), "weight_scale": t(1)}, {}, r"x.weight has shape \[0, 8\]"),
    "int8 with powers": (
        {"weight": t(8, 32, dtype=torch.int8), "weight_scale": t(8, 32, dtype=F8)}, {}, "stored as F8_E4M3, expected F32"),
    "mxfp4 scales": (
        {"weight": t(8, 32, dtype=torch.int8), "scale": t(8, 3, dtype=U8T)}, {},
        r"x.scale has shape \[8, 3\], expected \[8, 2\] for the weight \[8, 64\]"),
    "mxfp4 columns": (
        {"weight": t(8, 24, dtype=torch.int8), "scale": t(8, 1, dtype=U8T)}, {}, "48 columns, expected a multiple of 32"),
    "nvfp4 no factor": (
        {"weight": t(8, 32, dtype=U8T), "weight_scale": t(8, 4, dtype=F8)}, {}, "no x.weight_scale_2 in the checkpoint"),
    "nvfp4 packed no factor": (
        {"weight_packed": t(8, 32, dtype=U8T), "weight_scale": t(8, 4, dtype=F8)}, {}, "no x.weight_global_scale in"),
    "nvfp4 factors": (
        {"weight": t(8, 32, dtype=U8T), "weight_scale": t(8, 4, dtype=F8), "weight_scale_2": t(8)}, {},
        r"x.weight_scale_2 has shape \[8\]"),
    "packed without scale": ({"weight_packed": t(8, 8, dtype=I32)}, {}, "no x.weight_scale in the checkpoint"),
    "packed without bits": (
        {"weight_packed": t(8, 8, dtype=I32), "weight_scale": t(8, 2)}, {}, "no x.weight_shape in the checkpoint"),
    "packed shape": (
        {"weight_packed": t(8, 8, dtype=I32), "weight_scale": t(8, 2), "weight_shape": torch.tensor([8, 99])}, {},
        "8 words a row for 99 columns, expected codes of 4 or 8 bits"),
    "packed negative": (
        {"weight_packed": t(8, 8, dtype=I32), "weight_scale": t(8, 2), "weight_shape": torch.tensor([8, -64])}, {},
        "8 words a row for -64 columns"),
    "packed 3 bits": (
        {"weight_packed": t(8, 8, dtype=I32), "weight_scale": t(8, 2)}, published._ints(3), "codes of 3 bits"),
    "packed groups": (
        {"weight_packed": t(8, 8, dtype=I32), "weight_scale": t(8, 3)}, published._ints(4), r"x.weight_scale has shape \[8, 3\]"),
    "packed zeros": (
        {"weight_packed": t(8, 8, dtype=I32), "weight_scale": t(8, 2), "weight_zero_point": t(8, 2, dtype=I32)},
        published._ints(4), r"x.weight_zero_point has shape \[8, 2\], expected \[1, 2\]"),
    "packed order": (
        {"weight_packed": t(8, 8, dtype=I32), "weight_scale": t(8, 2), "weight_g_idx": t(63, dtype=I32)},
        published._ints(4), r"x.weight_g_idx has shape \[63\], expected \[64\]"),
    "gptq no scales": ({"qweight": t(8, 16, dtype=I32)}, {}, "no x.scales in the checkpoint"),
    "gptq zeros": (
        {"qweight": t(8, 16, dtype=I32), "scales": t(2, 16), "qzeros": t(3, 2, dtype=I32)}, {},
        r"x.qzeros has shape \[3, 2\], expected \[2, 2\] for the weight \[16, 64\]"),
    "gptq order": (
        {"qweight": t(8, 16, dtype=I32), "scales": t(2, 16), "qzeros": t(2, 2, dtype=I32), "g_idx": t(65, dtype=I32)}, {},
        r"x.g_idx has shape \[65\], expected \[64\]"),
    "gptq 3 bits": (
        {"qweight": t(6, 16, dtype=I32), "scales": t(2, 16)}, published.GPTQ | {"bits": 3}, "codes of 3 bits, expected 4 or 8"),
    "gptq groups": (
        {"qweight": t(8, 16, dtype=I32), "scales": t(3, 16), "qzeros": t(3, 2, dtype=I32)}, {},
        "3 groups for 64 columns, expected a number that divides them"),
    "gptq scales dtype": (
        {"qweight": t(8, 16, dtype=I32), "scales": t(2, 16, dtype=I32)}, {}, "x.scales is stored as I32"),
    "awq shape": (
        {"qweight": t(64, 3, dtype=I32), "scales": t(2, 16), "qzeros": t(2, 2, dtype=I32)}, {},
        r"x.qweight has shape \[64, 3\] and x.scales \[2, 16\], expected \[K/8, N\] \(GPTQ\)"),
    "awq 8 bits": (
        {"qweight": t(64, 2, dtype=I32), "scales": t(2, 16), "qzeros": t(2, 2, dtype=I32)},
        {"quant_method": "awq", "bits": 8}, "AWQ of 8 bits, expected 4"),
    "awq with activations": (
        {"weight": t(8, 32, dtype=F8), "weight_scale": t(8, 1), "pre_quant_scale": t(32)}, {}, "pre_quant_scale scales activ"),
    "both": ({"weight": t(16, 64), "qweight": t(8, 16, dtype=I32), "scales": t(2, 16)}, {}, "x.weight and x.qweight are both"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_parts_that_do_not_fit(case, tmp_path):
    """Each is one fault of one tensor, told when it is asked for; others in the file are not concerned."""
    parts, config, message = BAD[case]
    good, values = published.int8_row(8, 8, np.random.default_rng(0))
    tensors = {f"x.{name}": part for name, part in parts.items()} | {
        f"good.{name}": part for name, part in good.items()
    }
    files = open_weights(write(tmp_path, tensors, config))
    assert sorted(files.names()) == ["good.weight", "x.weight"]
    assert re.search(message, files.info("x.weight").fault)
    for ask in (files.packed, files.tensor):
        with pytest.raises(WeightError, match=message) as caught:
            ask("x.weight")
        assert str(caught.value).startswith("x.weight: ")
    same(files.tensor("good.weight"), torch.from_numpy(values))


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_a_factor_that_is_no_number(value, tmp_path):
    files, _ = layer(tmp_path, "nvfp4_modelopt", 8, 32, weight_scale_2=torch.tensor(value))
    with pytest.raises(WeightError, match="weight_scale_2 is .*expected a finite number"):
        files.packed(f"{LAYER}.weight")


@pytest.mark.parametrize("group", [-2, 2, 1 << 30])
def test_groups_out_of_range(group, tmp_path):
    """C indexes scales with these numbers, so they are checked."""
    order = torch.arange(64, dtype=torch.int32) // 32
    order[5] = group
    files, _ = layer(tmp_path, "gptq4_act_order", 8, 64, g_idx=order)
    with pytest.raises(WeightError, match="order has groups .*expected 0 to 1"):
        files.packed(f"{LAYER}.weight")


def test_a_config_that_is_damaged(tmp_path):
    write(tmp_path, {"a": torch.ones(2)})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightError, match=r"config.json: cannot be read as JSON"):
        open_weights(tmp_path)
    for odd in ("[]", '{"quantization_config": 3}', '{"quantization_config": {"config_groups": [1], "bits": "x"}}'):
        (tmp_path / "config.json").write_text(odd)
        assert open_weights(tmp_path).names() == ["a"]


def test_random_damage_is_an_error_of_ours(tmp_path):
    """Whatever shapes and types a header claims, a weight opens and computes, or is refused by an error of ours."""
    rng = np.random.default_rng(0)
    kinds = [
        torch.float8_e4m3fn,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.float32,
        torch.bfloat16,
        torch.float8_e8m0fnu,
    ]
    for make, _, _, config in FORMATS.values():
        parts, _ = make(16, 64, rng)
        for _ in range(25):
            tensors = {f"x.{name}": part for name, part in parts.items()}
            name = rng.choice(list(tensors))
            shape = [int(n) for n in rng.choice([0, 1, 2, 8, 16, 32, 64], rng.integers(0, 5))]
            kind = kinds[rng.integers(len(kinds))] if rng.random() < 0.5 else tensors[name].dtype
            raw = torch.from_numpy(rng.integers(0, 127, int(np.prod(shape)) * kind.itemsize, np.uint8))
            tensors[name] = raw.view(kind).view(shape) if len(raw) else torch.zeros(shape, dtype=kind)
            files = open_weights(write(tmp_path, tensors, config))
            for key in files.names():
                try:
                    files.packed(key).dequantize()
                except (WeightError, UnsupportedError):
                    pass


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(scale_type="E5M2"), "scales of E5M2, expected one of F32"),
        (dict(scale_rows=0), "blocks of 0x32"),
        (
            dict(data=torch.zeros(16, 31, dtype=torch.uint8)),
            r"data are torch.uint8 \[16, 31\].*expected uint8 \[16, 32\]",
        ),
        (dict(scales=torch.zeros(16, 7, dtype=torch.uint8)), r"scales are .*expected uint8 \[16, 8\]"),
        (dict(zeros=torch.zeros(2, 4, dtype=torch.uint8)), r"zeros are .*expected uint8 \[2, 8\]"),
        (dict(order=torch.zeros(63, dtype=torch.int32)), r"order is torch.int32 \[63\]"),
        (dict(type=F8_E4M3), "data are"),
        (dict(type=GPTQ4), "data are"),
        (dict(shape=(16,)), "expected a shape"),
        (dict(shape=(16, 63)), "63 columns of I4 are no multiple of 2"),
    ],
)
def test_a_weight_checks_itself(change, message):
    """Whoever makes a ScaledWeight gets one that C may trust, or an error."""
    parts = dict(type=I4, shape=(16, 64), data=torch.zeros(16, 32, dtype=torch.uint8), scale_type="F32", scale_rows=1,
                 scales=torch.zeros(16, 8, dtype=torch.uint8), scale_cols=32)  # fmt: skip
    assert ScaledWeight(**parts).dequantize().shape == (16, 64)
    with pytest.raises(WeightError, match=message):
        ScaledWeight(**{**parts, **change})


def test_ids_are_the_c_librarys():
    assert {kind.name: kind.id for kind in SCALED_TYPES.values()} == {
        "F8_E4M3": 1000, "F4_E2M1": 1001, "I8": 1002, "I4": 1003, "GPTQ4": 1004, "GPTQ8": 1005, "AWQ4": 1006, "U8": 1007,
    }  # fmt: skip


# --- models -----------------------------------------------------------------------------------------------------------


def quantized(model, form: str, keep=r"embed|norm|\.gate\.|lm_head|bias"):
    """A model's checkpoint with its linear layers and experts in `form`: (tensors, values by model name)."""
    rng = np.random.default_rng(0)
    tensors, values = {}, {}
    for name, tensor in model.state_dict().items():
        if re.search(keep, name) or tensor.dim() < 2:
            tensors[name], values[name] = tensor, tensor
        elif tensor.dim() == 2:
            values[name] = _layer(tensors, name.removesuffix(".weight"), form, tensor.shape, rng)
        else:
            values[name] = torch.stack([
                torch.cat([_layer(tensors, f"{name.rpartition('.')[0]}.{e}.{part}", form, shape, rng) for part, shape in parts])
                for e in range(len(tensor)) for parts in [_expert_parts(name, tensor.shape)]
            ])  # fmt: skip
    return tensors, values


def _expert_parts(name: str, shape):
    if name.endswith("down_proj"):
        return [("down_proj", shape[1:])]
    return [(part, (shape[1] // 2, shape[2])) for part in ("gate_proj", "up_proj")]


def _layer(tensors, name, form, shape, rng):
    parts, values = FORMATS[form][0](*shape, rng)
    tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
    return torch.from_numpy(np.ascontiguousarray(values))


@EACH
def test_a_models_checkpoint_binds(form, tmp_path):
    """Every linear layer and expert of a model, none missing, unused or wrong; linears and experts are packed views."""
    model = small_files.model("qwen3_moe")
    tensors, values = quantized(model, form)
    tensors["model.layers.1.self_attn.k_scale"] = torch.ones(1)  # of a quantized cache
    files = open_weights(write(tmp_path, tensors, FORMATS[form][3]))
    weights = bind(files, small_files.meta("qwen3_moe"))
    assert weights.problems(small_files.expected(model)) == []
    for name, value in values.items():
        same(weights.tensor(name, dtype=torch.float32), value)
    linear = "model.layers.0.self_attn.o_proj.weight"
    assert weights.can_pack(linear) and weights.quant_type(linear) == FORMATS[form][1]
    assert weights.methods(linear) == weights.methods(f"{EXPERTS}.gate_up_proj") == [FORMATS[form][2]]
    same(weights.packed(linear).dequantize(), values[linear])
    experts, gate_up = weights.experts(EXPERTS), values[f"{EXPERTS}.gate_up_proj"]
    mapped = files.packed("model.norm.weight").data.untyped_storage().data_ptr()
    for e in range(4):
        for packed, value in (
            (experts.gate[e], gate_up[e, :32]),
            (experts.up[e], gate_up[e, 32:]),
            (experts.down[e], values[f"{EXPERTS}.down_proj"][e]),
        ):
            assert packed.data.untyped_storage().data_ptr() == mapped
            same(packed.dequantize(), value)
    assert experts.gate_bias is None and experts.down_bias is None


EXPERTS = "model.layers.1.mlp.experts"


def test_formats_may_differ_within_a_model(tmp_path):
    """FP8 attention beside INT4 experts, as mixed checkpoints have it, down in another type than gate and up."""
    model = small_files.model("qwen3_moe")
    tensors, values = quantized(model, "int4_packed")
    rng = np.random.default_rng(5)
    for name in [n for n in tensors if "self_attn" in n or "down_proj" in n and n.endswith("packed")]:
        stem = name.rpartition(".")[0]
        if name.endswith("weight_packed"):
            shape = tensors[f"{stem}.weight_shape"].tolist()
            for part in ("weight_packed", "weight_scale", "weight_shape"):
                del tensors[f"{stem}.{part}"]
            parts, _ = published.fp8_block(*shape, rng)
            tensors.update({f"{stem}.{part}": tensor for part, tensor in parts.items()})
    weights = bind(open_weights(write(tmp_path, tensors)), small_files.meta("qwen3_moe"))
    assert weights.problems(small_files.expected(model)) == []
    assert weights.quant_type("model.layers.0.self_attn.q_proj.weight") == "F8_E4M3"
    assert {p.type.name for p in weights.experts(EXPERTS).gate} == {"I4"}
    assert {p.type.name for p in weights.experts(EXPERTS).down} == {"F8_E4M3"}
    same(weights.tensor(f"{EXPERTS}.gate_up_proj"), values[f"{EXPERTS}.gate_up_proj"])


def test_all_faults_are_listed_at_once(tmp_path):
    """Missing scales of one layer, of many experts, and a wrong shape: three lines."""
    model = small_files.model("qwen3_moe")
    tensors, _ = quantized(model, "fp8_channel")
    del tensors["model.layers.0.self_attn.q_proj.weight_scale"]
    for e in range(4):
        del tensors[f"{EXPERTS}.{e}.up_proj.weight_scale"]
    tensors["model.layers.0.self_attn.k_proj.weight_scale"] = torch.ones(3, 3)
    weights = bind(open_weights(write(tmp_path, tensors)), small_files.meta("qwen3_moe"))
    problems = weights.problems(small_files.expected(model))
    assert len(problems) == 3, "\n".join(problems)
    for start, part in (
        (
            "model.layers.0.self_attn.q_proj.weight:",
            "without scales, expected model.layers.0.self_attn.q_proj.weight_scale_inv",
        ),
        ("model.layers.0.self_attn.k_proj.weight:", "has shape [3, 3], expected"),
        (f"{EXPERTS}.gate_up_proj:", f"{EXPERTS}.0.up_proj.weight: F8_E4M3 without scales"),
    ):
        assert any(p.startswith(start) and part in p for p in problems), "\n".join(problems)
    assert any("and 3 more of its tensors" in p for p in problems)
    with pytest.raises(WeightError, match="without scales"):
        weights.experts(EXPERTS)


def test_biases_that_tools_add(tmp_path):
    """AutoGPTQ writes a bias of zeros for layers without one: no problem; one that is not zero is."""
    model = small_files.model("qwen3_moe")
    tensors, _ = quantized(model, "gptq4")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128)
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(128)
    weights = bind(open_weights(write(tmp_path, tensors, published.GPTQ)), small_files.meta("qwen3_moe"))
    (problem,) = weights.problems(small_files.expected(model))
    assert problem.startswith("model.layers.1.self_attn.q_proj.bias: in the checkpoint, but the model has no place")


def test_methods_that_are_not_read_are_named(tmp_path):
    """The reason comes before its consequences; with no consequence there is nothing to say."""
    model = small_files.model("qwen3_moe")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for broken in (False, True):
        if broken:
            tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(128 * 32, 1, dtype=torch.uint8)
            tensors["model.layers.0.self_attn.q_proj.weight.absmax"] = torch.zeros(64)
        files = open_weights(write(tmp_path, tensors, {"quant_method": "bitsandbytes"}))
        problems = bind(files, small_files.meta("qwen3_moe")).problems(small_files.expected(model))
        assert (problems != []) is broken
    assert "quant_method 'bitsandbytes', not read yet (read: fp8," in problems[0]
    assert any("stored as U8" in problem for problem in problems)
