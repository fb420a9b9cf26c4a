"""Packaged rule files; `README.md` here is the rule language on one page. Loaded through importlib.resources."""

_MLA = ("DeepSeek-V2", "DeepSeek-V2-Lite", "DeepSeek-V3", "DeepSeek-R1", "Kimi-K2", "Kimi-K2.5", "Moonlight",
        "GLM-4.7-Flash")  # fmt: skip
_MOE = ("DeepSeek-V3.2", "DeepSeek-V4", "GLM-4", "GLM-4.5V", "GLM-5", "gpt-oss", "Llama-4", "MiniMax-M2", "Mixtral",
        "Qwen2-MoE", "Qwen3-MoE", "Qwen3-Next", "Qwen3-Omni-MoE", "Qwen3-VL-MoE", "Qwen3.5-MoE")  # fmt: skip
NAMES = {**dict.fromkeys(_MLA, "MLA"), **dict.fromkeys(_MOE, "MoE")}
"""Models by name -> the rule file here that is for them. Rules match on what modules are, so few files do."""
