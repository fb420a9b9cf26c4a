"""transformers' own door: `AutoModelForCausalLM.from_pretrained(path, quantization_config=KTConfig(rule="..."))`.

The model it returns is the one that `optimize_and_load` makes; there is no second engine here. transformers builds the
model on the meta device and then finds nothing in it to load, initialize or tie, because its modules are set aside
until transformers is done. Importing this file registers the quantization method "kt" with transformers.
"""

import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ktransformers.errors import DeviceError, RuleError, UnsupportedError, WeightError
from ktransformers.loaders import checkpoint_dtype, open_weights
from ktransformers.operators.paged_cache import check_kind
from ktransformers.optimize import optimize_and_load
from ktransformers.rules.plan import RulesLike, load_rules

_UNREAD = "kt-reads-the-weights-itself.safetensors"
"""The file that a folder without safetensors is said to have, so that transformers lets it pass; never opened."""


@register_quantization_config("kt")
class KTConfig(QuantizationConfigMixin):
    """Tell `from_pretrained` which rules place and replace the modules, and where the weights are.

    Args:
        rule: a path, the name of a packaged rule file, or the parsed list of rules.
        weights: a folder, a ``.safetensors`` or a ``.gguf`` file; None is the folder that `from_pretrained` is given.
        default_device: of modules that no rule names; None is the device of `device_map`, else ``cuda:0`` where there
            is a GPU, else ``cpu``.
        devices: renames devices in the rules: ``{"cuda": "cpu"}`` runs a GPU's rules on a machine without one.
        cache: how keys and values are kept where attention is computed on the CPU: "f32", "f16", "bf16" or "q8_0";
            or latents where kernels compute it on a GPU: "fp8". None is the model's dtype.
        progress: show a progress bar on standard error while loading, when that is a terminal.

    Of the arguments of `from_pretrained`, `dtype` is the type of what is computed unpacked, and `device_map` may name
    one device; "auto" and kin leave the placing to the rules (transformers wants accelerate for either). Refused are a
    `device_map` of several entries, `tp_plan` and `distributed_config`, `key_mapping`, `use_kernels`; `max_memory` and
    `offload_folder` have no meaning.

    Raises:
        RuleError: no rules, or rules that cannot be read.
        UnsupportedError: a type of cache that there is not.
    """

    def __init__(
        self,
        rule: RulesLike | None = None,
        weights: str | Path | None = None,
        *,
        default_device: str | None = None,
        devices: Mapping[str, str] | None = None,
        cache: str | None = None,
        progress: bool = True,
        quant_method: str = "kt",
    ) -> None:
        if rule is None:
            raise RuleError(
                "KTConfig: no rule given. Pass rule=<path of a YAML file, name of a packaged one, or list of rules>."
            )
        load_rules(rule)
        check_kind(cache)
        self.quant_method = quant_method
        self.rule = str(rule) if isinstance(rule, Path) else rule
        self.weights = str(weights) if isinstance(weights, Path) else weights
        self.default_device = default_device
        self.devices = devices
        self.cache = cache
        self.progress = progress


@register_quantizer("kt")
class KTQuantizer(HfQuantizer):
    """What `from_pretrained` calls on its way; it exists only until the model is loaded."""

    is_serializable = is_trainable = False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        self._default_device = _one_device(device_map)

    def update_device_map(self, device_map: Any) -> None:
        return None  # rules place the modules

    def update_attn_implementation(self, config: Any) -> Any:
        """The first look at the config: let folders pass that hold a GGUF, or nothing but a config."""
        if getattr(config, "distributed_config", None) is not None:
            raise UnsupportedError(
                "KTConfig: found tp_plan or distributed_config; rules place the modules. Leave it out, and name "
                "several devices in the rule file."
            )
        folder = Path(str(getattr(config, "_name_or_path", "") or ""))
        if folder.is_dir() and not any(folder.glob("*.safetensors*")):
            config.transformers_weights = _UNREAD
            if config.dtype is None:  # transformers would look for it in that file
                with open_weights(self.quantization_config.weights or folder) as files:
                    config.dtype = checkpoint_dtype(files)
        return config

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        """The first call after the model is built: what was given that is not taken, and no conversions of nothing."""
        if self._use_kernels:
            raise UnsupportedError("KTConfig: found use_kernels; rules name the operators that compute. Leave it out.")
        if len(weight_conversions) > len(get_model_conversion_mapping(model)):
            raise UnsupportedError(
                "KTConfig: found key_mapping; names of checkpoints are matched by transformers' own mapping. Rename "
                "the tensors in the file, or register the mapping with transformers."
            )
        return []

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, use_kernels: bool = False, **kwargs: Any
    ) -> None:
        self._use_kernels, self._show_bars = use_kernels, lambda: None
        self._folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        self._aside = model._modules, model.all_tied_weights_keys
        model._modules, model.all_tied_weights_keys = {}, {}
        self._nothing = tempfile.TemporaryDirectory(prefix="kt-")  # gone with this object, whatever fails on the way
        if checkpoint_files:
            empty = Path(self._nothing.name) / "nothing.safetensors"
            save_file({}, empty)
            checkpoint_files[:] = [str(empty)]  # transformers opens what this list names
        if logging.is_progress_bar_enabled():  # no bar for no tensors; on again at the latest when this object ends
            logging.disable_progress_bar()
            self._show_bars = weakref.finalize(self, logging.enable_progress_bar)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._show_bars()
        model._modules, model.all_tied_weights_keys = self._aside
        model._is_hf_initialized = False  # transformers marked the empty model; buffers are still to be computed
        self.remove_quantization_config(model)
        weights = self.quantization_config.weights or self._folder
        if weights is None:
            raise WeightError("KTConfig: no weights. Give from_pretrained a folder, or pass KTConfig(weights=...).")
        generation_config = model.generation_config if model.can_generate() else None
        given = self.quantization_config
        optimize_and_load(
            model, given.rule, weights, default_device=given.default_device or self._default_device,
            devices=given.devices, cache=given.cache, progress=given.progress,
        )  # fmt: skip
        if generation_config is not None:
            model.generation_config = generation_config  # from_pretrained's argument wins over the folder
        return model


def _one_device(device_map: Any) -> str | None:
    """The device of modules that no rule names, from what `from_pretrained` was given."""
    if device_map is None or isinstance(device_map, str):
        return None  # by now a string is "auto" or kin: transformers made a mapping of a device's name
    if list(device_map) == [""]:
        return str(torch.device(device_map[""]))
    raise DeviceError(
        f"device_map: found a mapping of {len(device_map)} modules, expected one device or 'auto'; rules place the "
        "modules. Write a rule for each of them."
    )


def _keep_kt_config(stored: Any, given: Any, merge: Any = AutoHfQuantizer.merge_quantization_configs) -> Any:
    """Leave a checkpoint that is quantized already to our loaders: transformers would insist on its own quantizer."""
    return given if isinstance(given, KTConfig) else merge(stored, given)


AutoHfQuantizer.merge_quantization_configs = staticmethod(_keep_kt_config)
