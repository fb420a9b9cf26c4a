"""What the planner says that parts and caches take, against the modules, files and caches themselves."""

import contextlib
import copy

import pytest
import torch
from ktransformers.models import DEFAULT_RULES
from ktransformers.models.known import KNOWN
from safetensors.torch import save_file

from ktransformers import open_weights, optimize_and_load, plan
from ktransformers.configs import meta_model as known_model
from ktransformers.configs import read_config
from ktransformers.errors import KTransformersError, UnsupportedError, WeightError
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.kernels import words
from ktransformers.kernels.floats import Floats
from ktransformers.loaders import bind
from ktransformers.operators import on_gpu
from ktransformers.planner import formats, sizes
from tests.loaders import published
from tests.operators.test_published_checkpoints import checkpoint as published_checkpoint
from tests.operators.test_published_checkpoints import qwen3_moe_config
from tests.tiny import build, meta_model, random_ids, tiny_config

CACHED = [*DEFAULT_RULES, "olmoe", "phimoe", "dots1", "exaone_moe", "afmoe"]
UNKNOWN_CACHE = {
    "deepseek_v4": "its attention compresses the cache in ways of its own",
    "qwen3_omni_moe": "of several language models; what thinks of it is here by its own name",
}


def cache_bytes(cache):
    """Bytes of every tensor that a cache holds, by layer."""
    found = []
    for layer in cache.layers:
        tensors = [t for t in vars(layer).values() if isinstance(t, torch.Tensor) and t.dim() > 1]  # not counters
        found.append(sum(t.numel() * t.element_size() for t in tensors))
    return found


@pytest.mark.parametrize("model_type", [m for m in CACHED if m not in UNKNOWN_CACHE])
def test_cache_bytes_are_those_of_transformers_own_cache(model_type):
    torch.manual_seed(0)
    model = build(tiny_config(model_type)).eval()
    tokens = 24
    with torch.no_grad():
        cache = model(random_ids(1, tokens), use_cache=True).past_key_values
    told = {c.layer: c for c in sizes.caches(model)}
    real = cache_bytes(cache)
    for layer, nbytes in enumerate(real):
        if layer in told and told[layer].heads:
            assert told[layer].nbytes(tokens) == nbytes, (model_type, layer, told[layer])
    assert any(c.heads for c in told.values())


@pytest.mark.parametrize("rule", ["MLA", "Default"])
def test_parts_hold_what_the_loaded_model_holds(checkpoint, rule):
    """Dense parts equal the parameters that are there after loading, mapped ones the bytes in the file."""
    reference, folder = checkpoint("deepseek_v3")
    meta = meta_model(reference.config)
    replacements = plan(meta, rule, gpus=0)
    with open_weights(folder) as files:
        source = bind(files, meta)
        found = sizes.parts(meta, replacements, formats.weights_format(source))
        packed = {p.name: p for p in found if p.mapped}
        for name, part in packed.items():
            names = [n for n in source.names() if n.rpartition(".")[0] == name]
            assert part.held == sum(source.nbytes(n) for n in names), name
    model = optimize_and_load(meta, rule, folder, progress=False)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if n in model.state_dict())
    assert sum(p.held for p in found if not p.mapped) == dense + buffers
    total = sum(t.numel() for t in reference.state_dict().values())
    assert sum(p.weights for p in found) == total


def test_tied_weights_are_counted_once(checkpoint):
    reference, _ = checkpoint("qwen3_moe", tie_word_embeddings=True)
    model = meta_model(reference.config)
    found = sizes.parts(model, plan(model, "MoE", gpus=0), formats.published_format(model.config))
    assert sum(p.weights for p in found) == sum(p.numel() for p in reference.parameters())
    head = next(p for p in found if p.kind == "head")
    assert head.ops == 2 * 64 * 128 and head.held == 0


def test_what_the_c_library_computes_is_known_without_it(monkeypatch):
    """Types of both tables of formats, by name; I8 is a table of indices in one and a weight in the other."""
    monkeypatch.delattr("ktransformers.native.SUPPORTED_TYPES")
    assert all(map(sizes.in_c, ("Q4_K", "BF16", "I8", "AWQ4"))) and not any(map(sizes.in_c, ("Q8_K", "I64", sizes.DENSE)))


@pytest.mark.parametrize("own", [True, False])
def test_a_head_of_its_own_counts_whatever_the_config_says(checkpoint, tmp_path, own):
    """As loading has it: what a checkpoint holds twice with other numbers is not tied."""
    reference, _ = checkpoint("qwen3_moe", tie_word_embeddings=False)
    state = reference.state_dict() if own else reference.state_dict() | {
        "lm_head.weight": reference.model.embed_tokens.weight.detach().clone()}  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    config = copy.deepcopy(reference.config)
    config.tie_word_embeddings = True
    model = meta_model(config)
    assert model.all_tied_weights_keys
    with open_weights(tmp_path) as files:
        found = sizes.parts(model, plan(model, "MoE", gpus=0), formats.weights_format(bind(files, model)))
    head = next(part for part in found if part.kind == "head")
    assert (head.weights, head.held > 0) == ((64 * 128, True) if own else (0, False))


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q8_0", "F16"])
def test_a_named_gguf_format_has_the_bytes_that_quantize_writes(checkpoint, tmp_path, mix):
    sizes_of = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256}
    reference, folder = checkpoint("qwen3_moe", **sizes_of)
    path = tmp_path / "model.gguf"
    quantize_folder(folder, path, mix)
    meta = meta_model(reference.config)
    form = formats.named_format(mix, 3, False)
    with open_weights(path) as files:
        source = bind(files, meta)
        real = formats.weights_format(source)
        for name, tensor in meta.state_dict().items():
            told, found = form.stored(name, tuple(tensor.shape), tensor.dtype), real.stored(name, tuple(tensor.shape), tensor.dtype)
            assert told[1] == pytest.approx(found[1], rel=0.2 if "gate_up" in name else 0.0), (name, told, found)


@pytest.mark.parametrize("name", ["deepseek-v3", "kimi-k2-thinking", "gpt-oss-20b", "minimax-m2"])
def test_published_sizes_of_known_models(name):
    """Against the sizes of the published repositories, in GB: what people download."""
    published = {"deepseek-v3": 672, "kimi-k2-thinking": 594, "gpt-oss-20b": 13.8, "minimax-m2": 230}[name]
    config = read_config(name)
    model = known_model(config)
    form = formats.published_format(config)
    total = sum(form.stored(n, tuple(t.shape), t.dtype)[1] for n, t in model.state_dict().items())
    assert total / 1e9 == pytest.approx(published, rel=0.03)


def test_routed_experts_that_are_stored_otherwise_than_the_rest_are_counted_so():
    config = read_config("deepseek-v4-flash")
    form = formats.published_format(config)
    shape = (2048, 4096)
    assert form.name == "published (FP8+MXFP4)"
    assert form.stored("model.layers.3.mlp.experts.gate_up_proj", shape, torch.bfloat16) == ("MXFP4", 2048 * 4096 * 17 // 32)
    assert form.stored("model.layers.3.mlp.shared_experts.up_proj.weight", shape, torch.bfloat16)[0] == "F8_E4M3"


def test_every_known_model_has_a_published_format():
    for name in KNOWN:
        config = read_config(name)
        assert formats.published_format(config).name.startswith("published")


def test_an_unknown_format_is_named_with_the_closest():
    with pytest.raises(KTransformersError, match=r"--format 'Q4_K_N': unknown \(did you mean 'Q4_K"):
        formats.named_format("Q4_K_N", 1, False)


def test_experts_split_between_devices_share_bytes_and_choices(checkpoint):
    reference, _ = checkpoint("qwen3_moe")
    model = meta_model(reference.config)
    rule = {"devices": "auto", "rules": [{
        "match": {"trait": "experts"},
        "replace": {"class": "ktransformers.operators.experts.KTransformersExperts",
                    "kwargs": {"generate_device": "cpu", "gpu_experts": {0: "0-1", 2: [7]}, "gpu_device": "layer"}},
    }]}  # fmt: skip
    form = formats.published_format(model.config)
    hits = {0: {0: 0.5, 1: 0.25, 7: 0.25}, 1: {3: 1.0}, 2: {7: 0.125, 0: 0.875}}
    found = sizes.parts(model, plan(model, rule, gpus=1), form, hits)
    experts = {(p.layer, p.device): p for p in found if p.kind == "experts"}
    assert set(experts) == {(0, "cpu"), (0, "cuda:0"), (1, "cpu"), (2, "cpu"), (2, "cuda:0")}
    assert experts[0, "cuda:0"].share == 0.75 and experts[0, "cpu"].share == 0.25 and experts[2, "cuda:0"].share == 0.125
    whole = experts[1, "cpu"].held
    assert experts[0, "cpu"].held == whole * 6 // 8 and experts[2, "cpu"].held == whole * 7 // 8
    assert experts[0, "cuda:0"].held == whole * 2 // 8  # fp32 here and there
    assert experts[0, "cuda:0"].read == pytest.approx(whole * 3 / 8 * 0.75)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def words_of(source, name):
    """Bytes of a matrix's words, made; None where it has none."""
    try:
        return words.from_packed(source.packed(name), "cpu").nbytes
    except (UnsupportedError, WeightError):
        return None


def counts_what_is_made(source, model):
    """The planner's bytes of every linear layer and of all experts on a GPU, against words made of the checkpoint."""
    form, seen = formats.weights_format(source), set()
    for name, module in model.named_modules():
        own = {f"{name}.{key}": tensor for key, tensor in module.named_parameters(recurse=False)}
        told = sizes.on_gpu(own, None, {}, form)
        if isinstance(module, torch.nn.Linear):
            made = words_of(source, f"{name}.weight")
            assert (told and told[1]) == made, (name, told, made)
            seen.add(told and told[0])
        elif f"{name}.down_proj" in own:
            parts = source.experts(name)
            each = [parts.gate, parts.up, parts.down]
            made = None
            with contextlib.suppress(UnsupportedError, WeightError):
                made = sum(words.from_experts(matrices, "cpu").nbytes for matrices in each)
            assert (told and told[1]) == made, (name, told, made)
    return seen


@pytest.mark.parametrize("form", published.FORMATS)
def test_words_on_a_gpu_take_what_is_told_of_published_formats(form, tmp_path):
    folder, _ = published_checkpoint(tmp_path, form)
    model = meta_model(qwen3_moe_config())
    with open_weights(folder) as files:
        seen = counts_what_is_made(bind(files, model), model)
    assert None in seen and len(seen) == 2, seen  # the head is dense


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q8_0", "Q2_K", "IQ4_XS", "BF16"])
def test_words_on_a_gpu_take_what_is_told_of_gguf_files(checkpoint, tmp_path, mix):
    sizes_of = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256}
    reference, folder = checkpoint("qwen3_moe", **sizes_of)
    quantize_folder(folder, tmp_path / "model.gguf", mix)
    model = meta_model(reference.config)
    with open_weights(tmp_path / "model.gguf") as files:
        counts_what_is_made(bind(files, model), model)


@pytest.mark.parametrize(("name", "kwargs", "bits"), [("KLinearMarlin", {}, 4), ("QuantizedLinearMarlin", {}, 4), ("VLinearMarlin", {"num_bits": 8}, 8)])
def test_what_has_no_packed_form_is_quantized_where_a_rule_names_it(name, kwargs, bits):
    own = {"x.weight": torch.empty(48, 256, dtype=torch.bfloat16, device="meta"), "x.bias": torch.empty(48, dtype=torch.bfloat16, device="meta")}
    form = formats.named_format("BF16", 1, False)
    made = words.from_packed(Floats(torch.randn(48, 256), torch.bfloat16, bits, on_gpu.GROUP_SIZE), "cpu")
    assert sizes.on_gpu(own, name, kwargs, form) == (f"INT{bits}", made.nbytes + 96)
    assert sizes.on_gpu(own, None, kwargs, form) is sizes.on_gpu(own, "KLinearTorch", kwargs, form) is None
    odd = {"x.weight": torch.empty(48, 40, device="meta")}
    assert sizes.on_gpu(odd, name, kwargs, form) is None


def test_a_format_by_name_has_the_words_of_its_file():
    """Of published formats by their names: what a publisher's file of them has."""
    shape = (512, 1024)
    for name, each in {"INT4": 0.5 + 2 / 32, "GPTQ_INT4": 0.5 + 3 / 128, "AWQ_INT4": 0.5 + 3 / 128, "Q6_K": 13 / 16 + 2 / 256,
                       "INT8": 1 + 4 / 1024, "FP8": 1 + 4 / 128, "FP8_PERCHANNEL": 1 + 4 / 1024, "Q4_K": 0.5 + 2 / 32 + 4 / 256}.items():  # fmt: skip
        layout = formats.named_format(name, 1, False).layout("model.layers.0.mlp.up_proj.weight", shape, torch.bfloat16)
        assert layout.nbytes(shape) == pytest.approx(each * 512 * 1024), name
    for name in ("BF16", "IQ2_XXS", "TQ1_0"):
        assert formats.named_format(name, 1, False).layout("model.layers.0.mlp.up_proj.weight", shape, torch.bfloat16) is None
