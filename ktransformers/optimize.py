"""The story: rules -> plan -> check -> inject -> load.

`optimize_and_load` turns a transformers model on the meta device into one that runs. Everything that can be wrong is
found before the model is touched (`checks.py`); if loading fails after that (a full disk, Ctrl-C), the model is put
back as it was. What a model needs beyond operators and tensors is in `finish.py`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktransformers import checks, env, finish
from ktransformers.errors import WeightError, join_errors
from ktransformers.loaders import ModelWeights, WeightSource, bind, held_as_stored, open_weights
from ktransformers.loaders.progress import load_progress
from ktransformers.models import register_families
from ktransformers.operators import cpu_attention, gpu_pages, paged_cache
from ktransformers.operators.base_operator import load_weights
from ktransformers.rules.build import build
from ktransformers.rules.plan import Replacement, RulesLike, plan
from ktransformers.rules.table import print_plan

__path__ = [str(Path(__file__).parent / "util" / "optimize")]  # for ktransformers.optimize.optimize, upstream's path
register_families()  # AutoConfig and AutoModelForCausalLM read them from here on


def optimize_and_load(
    model: nn.Module,
    rule: RulesLike,
    weights: str | Path | None = None,
    *,
    default_device: str | None = None,
    devices: Mapping[str, str] | None = None,
    cache: str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Replace the modules that `rule` names by operators, then load every weight from the published checkpoint.

    Args:
        model: a transformers model built on the meta device; changed in place. Where its config has no dtype and
            none was given to ``from_config``, it takes the checkpoint's.
        rule: a path, the name of a packaged rule file, or the parsed list of rules.
        weights: a folder, a ``.safetensors`` or a ``.gguf`` file (the first of a split set); None is the local folder
            that the model's config was read from.
        default_device: of modules that no rule names; None is ``cuda:0`` where there is a GPU, else ``cpu``.
        devices: renames devices in the rules: ``{"cuda": "cpu"}`` runs a GPU's rules on a machine without one.
        cache: how keys and values are kept where attention is computed on the CPU: "f32", "f16", "bf16" or "q8_0";
            or latents where kernels compute it on a GPU: "fp8". None is the model's dtype.
        progress: show a progress bar on standard error while loading, when that is a terminal.

    Returns:
        `model`, in eval mode, ready for `model.generate`.

    Raises:
        RuleError: rules that cannot be read or do not fit the model.
        WeightError: a damaged checkpoint, or tensors that are missing, unused or of the wrong shape.
        UnsupportedError: a valid checkpoint or operator that this version does not compute.
    """
    return _optimize_and_load(model, rule, weights, None, default_device, devices, cache, progress)


def optimize_and_load_gguf(
    module: nn.Module,
    rule_file: RulesLike,
    gguf_path: str | Path,
    model_config: Any,
    default_device: str | None = None,
    *,
    devices: Mapping[str, str] | None = None,
) -> nn.Module:
    """`optimize_and_load` under upstream's name and argument order. `gguf_path` may be safetensors too."""
    return _optimize_and_load(module, rule_file, gguf_path, model_config, default_device, devices, None, True)


def _optimize_and_load(model, rule, weights, config, default_device, devices, cache, progress) -> nn.Module:
    checks.check_arguments(model, default_device, devices)
    paged_cache.check_kind(cache)
    config = config or model.config
    with torch.device("cpu"):  # a caller may still be inside `with torch.device("meta")`
        return _run(model, rule, weights, config, default_device, devices, cache, progress)


def _run(model, rule, weights, config, default_device, devices, cache, progress) -> nn.Module:
    replacements = plan(model, rule, default_device=default_device, devices=devices)
    files = open_weights(weights if weights is not None else checks.checkpoint_of(config))
    try:
        source = bind(files, model)
        generation_config = finish.generation_config(config)
        checks.check_weights(model, source)
        checks.check_operators(model, replacements, source)
        if env.debug():
            print_plan(model, replacements, source)
        dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        with _restored_on_failure(model), held_as_stored(model, files):
            finish.keep_in_fp32(model)
            inject(model, replacements, source, config)
            _load(model, replacements, source, progress)
    except BaseException:
        files.close()
        raise
    model.gguf_loader = source  # upstream's name; also keeps the mapped files open while operators point into them
    model.hf_device_map = finish.device_map(model, replacements)
    finish.outputs_to_inputs(model, model.hf_device_map)
    model.generation_config = generation_config or model.generation_config
    finish.let_save(model, source, dtypes)
    if any(placed.device == "cpu" for placed in replacements.values()):
        cpu_attention.use(model)
    paged_cache.use(model, cache)
    gpu_pages.use(model)
    return model.eval()


def inject(model: nn.Module, replacements: Mapping[str, Replacement], source: WeightSource, config: Any = None) -> None:
    """Swap in the operators: a setattr on the parent, parents before children."""
    for key, replacement in replacements.items():
        if replacement.operator is None:
            continue
        parent_name, _, child_name = key.rpartition(".")
        parent = model.get_submodule(parent_name)
        original = getattr(parent, child_name)
        setattr(parent, child_name, build(replacement, source, config or model.config, original))


@contextlib.contextmanager
def _restored_on_failure(model: nn.Module) -> Iterator[None]:
    """Put modules, parameters and buffers back as they were if the block raises, Ctrl-C included."""
    saved = [
        (table, dict(table))
        for module in model.modules()
        for table in (module._modules, module._parameters, module._buffers)
    ]
    try:
        yield
    except BaseException:
        for table, before in saved:
            table.clear()
            table.update(before)
        raise


def _load(model: nn.Module, replacements: Mapping[str, Replacement], source: ModelWeights, progress: bool) -> None:
    """Load every tensor once. Peak memory: the mapped files plus one tensor."""
    devices = {name: replacement.device for name, replacement in replacements.items()}
    source.devices = devices  # for operators of users' that load their children themselves
    with load_progress(source, enabled=progress):
        load_weights(model, source, "", devices)
    finish.drop_replaced_tensors(model)
    finish.tie(model, source)
    finish.fill_buffers(model, devices)
    left = [name for name, tensor in finish.named_tensors(model) if tensor.is_meta]
    if left:
        raise join_errors(WeightError, "tensors without a value after loading, please report this:", left)
