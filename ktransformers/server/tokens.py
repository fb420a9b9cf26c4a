"""/tokenize and /detokenize: by the model's own tokenizer and chat template."""

import functools

from fastapi import Response

from ktransformers.server import prompts
from ktransformers.server.encoding import JsonResponse
from ktransformers.server.errors import ApiError
from ktransformers.server.prompts import Conversation
from ktransformers.server.schemas import DetokenizeRequest, TokenizeRequest
from ktransformers.server.service import Service


async def tokenize(service: Service, body: TokenizeRequest) -> Response:
    """The ids of a text or of messages."""
    served, text = service.ready(), body.content if body.prompt is None else body.prompt
    if (text is None) == (body.messages is None):
        raise ApiError(400, "prompt: expected either a prompt or messages.", param="prompt")
    if body.messages is not None:
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        talk = Conversation(body.messages, tools, body.chat_template_kwargs, body.add_generation_prompt)
        work = functools.partial(prompts.of_messages, served.tokenizer, talk)
        ids = (await service.text_work(talk.size(), work)).ids
    else:
        encode = functools.partial(served.tokenizer.encode, text, add_special_tokens=body.add_special_tokens)
        ids = await service.text_work(len(text), encode)
    return JsonResponse({"tokens": ids, "count": len(ids), "max_model_len": served.engine.context})


async def detokenize(service: Service, body: DetokenizeRequest) -> Response:
    """The text of ids, special tokens included; under both names that clients look for."""
    served = service.ready()
    decode = functools.partial(prompts.text_of, served.tokenizer, body.tokens, served.vocab_size, "tokens")
    text = await service.text_work(len(body.tokens), decode)
    return JsonResponse({"prompt": text, "content": text})
