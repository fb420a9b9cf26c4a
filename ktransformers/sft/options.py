"""What a training file may say: LLaMA-Factory's names and defaults. Reading one is in read.py."""

from dataclasses import dataclass, field
from typing import Any

STAGES = ("sft", "dpo")
TUNINGS = ("lora", "freeze", "full")
LOSSES = ("sigmoid", "hinge", "ipo", "orpo", "simpo")
"""`pref_loss`: the first three are DPO's, with the model without its adapter as reference; the others need none."""


@dataclass
class Options:
    """LLaMA-Factory's names and defaults. Sizes are tokens unless said otherwise."""

    model_name_or_path: str = ""
    """A model folder or a .gguf; "" is the embedded model."""
    kt_weight_path: str = ""
    """The weights, where they are not with the model: a .gguf or a folder."""
    adapter_name_or_path: str = ""
    """An adapter to start from or to use: a PEFT folder, or a GGUF file."""
    kt_optimize_rule: str = ""
    """A rule file, or the name of a packaged one; "" is the one of the model's family."""
    use_kt: bool = True
    cpu_infer: int = 0
    """Threads of the C library; 0: one a core."""
    chunk_size: int = 8192
    """Prompt tokens computed at a time where text is generated."""
    kt_backend: str = ""
    """A method, such as AMXBF16_SFT or AMXINT8_SFT_SkipLoRA: with SkipLoRA experts get no adapters."""
    kt_config: dict = field(default_factory=dict)
    """The same `kt_` keys with or without `kt_`, as one mapping."""
    infer_backend: str = "ktransformers"

    stage: str = "sft"
    do_train: bool = False
    do_eval: bool = False
    do_predict: bool = False
    predict_with_generate: bool = False
    finetuning_type: str = "lora"
    """"lora"; or of weights that are not quantized, with the model saved whole: "full" trains all, "freeze" some."""
    freeze_trainable_layers: int = 2
    """Of "freeze": so many of the last layers, below 0 of the first."""
    freeze_trainable_modules: str = "all"
    """Names of modules in these layers, commas between; "all": everything in them."""
    freeze_extra_modules: str = ""
    """Modules elsewhere that are trained too, such as embed_tokens,lm_head; commas between."""
    kt_full_weight_grad: bool = False
    """With "lora": experts that are not quantized are trained whole, without adapters."""
    lora_rank: int = 8
    lora_alpha: float | None = None
    """None: twice the rank."""
    lora_dropout: float = 0.0
    """For linear layers; experts have none, as in PEFT."""
    lora_target: str = "all"
    """"all": every linear layer and the experts; else names of modules, commas between."""
    use_rslora: bool = False
    additional_target: str = ""
    """Modules that are trained whole and saved with the adapter, such as embed_tokens,lm_head; commas between."""
    pref_beta: float = 0.1
    pref_loss: str = "sigmoid"
    dpo_label_smoothing: float = 0.0
    simpo_gamma: float = 0.5

    dataset: str = ""
    eval_dataset: str = ""
    """Names in dataset_info.json, or files of JSON or JSON lines; commas between."""
    dataset_dir: str = "data"
    template: str = ""
    """For tokenizers without a chat template; the model's own is used where there is one."""
    default_system: str = ""
    cutoff_len: int = 2048
    max_samples: int = 0
    """Most examples of each dataset; 0: all."""
    val_size: float = 0.0
    """Of the training examples held back for evaluation: a share below 1, else a number."""
    packing: bool = False
    train_on_prompt: bool = False
    mask_history: bool = False
    """Train on the last answer of each conversation alone."""

    output_dir: str = ""
    overwrite_output_dir: bool = False
    plot_loss: bool = False
    disable_gradient_checkpointing: bool = False
    warmup_ratio: float = 0.0
    """Share of the steps in which the learning rate grows."""

    max_new_tokens: int = 512
    temperature: float = 0.95
    top_p: float = 0.7
    top_k: int = 50
    do_sample: bool = True

    passed: dict[str, Any] = field(default_factory=dict)
    """What goes to transformers' TrainingArguments as it is."""
    notices: list[str] = field(default_factory=list)

    @property
    def alpha(self) -> float:
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


UNUSED = {
    "trust_remote_code": "code of a model folder is never run",
    "overwrite_cache": "examples are tokenized anew each time",
    "preprocessing_num_workers": "one process tokenizes",
    "preprocessing_batch_size": "one process tokenizes",
    "flash_attn": "rules choose the attention",
    "use_fast_tokenizer": "it is the tokenizer of the folder",
    "resize_vocab": "", "low_cpu_mem_usage": "", "cache_dir": "", "model_revision": "", "print_param_status": "",
    "ray_run_name": "", "mode": "", "kt_maxlen": "", "kt_use_cuda_graph": "", "kt_mode": "", "kt_force_think": "",
    "kt_tp_enabled": "", "kt_threadpool_count": "", "kt_max_cache_depth": "", "kt_share_backward_bb": "",
    "kt_weight_lifecycle": "", "kt_model_max_length": "", "kt_cpu_activation": "gate and up are computed again",
    "kt_expert_weight_format": "the checkpoint's own format is computed with", "cutoff_side": "",
    "enable_thinking": "", "infer_dtype": "", "upcast_layernorm": "", "upcast_lmhead_output": "",
}  # fmt: skip
"""Keys of published files that change nothing here, and why."""

REFUSED = {
    "quantization_bit": "the checkpoint's own quantization is trained on; `kt quantize` makes another",
    "deepspeed": "one process trains", "fsdp": "one process trains",
    "use_dora": "experts have no such adapters", "pissa_init": "packed weights are not changed",
    "ref_model": "the model without its adapter is the reference", "streaming": "datasets are read whole",
    "galore": "adapters are trained by an ordinary optimizer",
}  # fmt: skip
