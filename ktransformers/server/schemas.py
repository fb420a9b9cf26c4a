"""What clients send to the endpoints with OpenAI's shapes. Unknown fields are ignored: hints, or of a later API.

A field that would change the answer and is not supported is in a table with the reason, and refused by name.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ktransformers.server.errors import ApiError, refused

TOP_LOGPROBS = 20
MOST_TOKENS = 1 << 31

Token = Annotated[int, Field(ge=0, lt=MOST_TOKENS)]
Count = Annotated[int, Field(ge=0, lt=MOST_TOKENS)]


class Body(BaseModel):
    """The root of what is sent. Types are taken as they are: "1" and true are no numbers."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    REFUSED: ClassVar[Mapping[str, str]] = {}
    """Field -> why it is not supported. Values that ask for nothing (null, false, 0, "", [], {}) are let through."""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for name, why in cls.REFUSED.items():
                if given.get(name):
                    raise refused(name, why)
        return given


class Sampled(Body):
    """How tokens are chosen, and when an answer ends. What is left out is as the model's generation_config says."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=MOST_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Token] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    max_tokens: Count | None = None
    priority: Annotated[int, Field(ge=0, lt=MOST_TOKENS)] | None = None
    """Above 0: others go first. Nobody can put himself before others."""


class Form(Body):
    """What an answer must be like, by any of the names that clients use; `forms` makes one of them."""

    response_format: dict[str, Any] | None = None
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    structured_outputs: dict[str, Any] | None = None


class StreamOptions(Body):
    include_usage: bool | None = None


_ONE_PROMPT_LOGPROBS = "use /v1/completions with echo and logprobs."

COMMON_REFUSED = {
    "best_of": "is not supported; use n, and choose yourself.",
    "use_beam_search": "there is no beam search: answers are shown as they are made.",
    "prompt_logprobs": f"is not supported; {_ONE_PROMPT_LOGPROBS}",
}


def _one_of_best(given: Any) -> Any:
    """`best_of` that is `n`, which says nothing, is left out."""
    if isinstance(given, dict) and "best_of" in given and given["best_of"] == (given.get("n") or 1):
        return {name: value for name, value in given.items() if name != "best_of"}
    return given


class CompletionRequest(Sampled, Form):
    REFUSED = {**COMMON_REFUSED, "suffix": "this server does not fill in the middle of a text."}

    prompt: str | list[Token] | Annotated[list[str], Field(min_length=1)] | list[list[Token]]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="before")
    @classmethod
    def _best(cls, given: Any) -> Any:
        return _one_of_best(given)


# ---- chat --------------------------------------------------------------------------------------------------


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class ChatRequest(Sampled, Form):
    REFUSED = {
        **COMMON_REFUSED,
        "functions": "is not supported; use tools.",
        "function_call": "is not supported; use tool_choice.",
        "audio": "this server takes and gives text alone.",
        "web_search_options": "this server searches nothing.",
        "echo": "is for /v1/completions.",
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    max_completion_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _best(cls, given: Any) -> Any:
        return _one_of_best(given)

    @model_validator(mode="after")
    def _together(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true.", param="top_logprobs")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ApiError(400, "tool_choice: there are no tools to choose from.", param="tool_choice")
        return self


# ---- tokens ------------------------------------------------------------------------------------------------


class TokenizeRequest(Body):
    """A text, as `prompt` or `content`, or messages."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[Token]
