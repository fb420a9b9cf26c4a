"""Chat templates for tokenizers that have none, under the names that training files use.

A model's own template always wins: what it was trained on is what it understands.
"""

from typing import Any

from ktransformers.errors import SFTError, did_you_mean

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_PLAIN = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n{% elif m.role == 'user' %}Human: "
    "{{ m.content }}\nAssistant:{% else %}{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
)
_ALPACA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}### Instruction:\n"
    "{{ m.content }}\n\n### Response:\n{% else %}{{ m.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
)
_DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)

TEMPLATES = {
    "default": _PLAIN, "vanilla": _PLAIN, "alpaca": _ALPACA, "chatml": _CHATML, "qwen": _CHATML, "qwen3": _CHATML,
    "llama3": _LLAMA3, "deepseek": _DEEPSEEK, "deepseek3": _DEEPSEEK, "mistral": _MISTRAL,
}  # fmt: skip


def give_template(tokenizer: Any, name: str) -> str:
    """See to it that `tokenizer` has a chat template; returns what to tell a person, or ``""``. Raises SFTError."""
    if tokenizer.chat_template:
        return f"template {name}: the model's own chat template is used" if name else ""
    if name not in TEMPLATES:
        found = f"found {name!r}{did_you_mean(name, TEMPLATES)}" if name else "found none"
        raise SFTError(
            f"template: the tokenizer has no chat template of its own; {found}, expected one of {', '.join(TEMPLATES)}."
            " Or add chat_template.jinja to the model folder."
        )
    tokenizer.chat_template = TEMPLATES[name]
    return ""
