"""`kt chat --server URL`: the chat program with a model that `kt serve`, or any server of OpenAI's API, has open."""

import http.client
import json
import os
import sys
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from ktransformers.cli.common import err
from ktransformers.cli.conversation import hold, read_prompt_file
from ktransformers.cli.turns import Turns
from ktransformers.errors import KTransformersError

KEY = "KT_API_KEY"
"""The environment variable that holds the key, where a server wants one."""
SECONDS = 600.0
"""That a server may be silent: it may compute a long prompt."""


def talk(url: str, prompt_file: str, max_new_tokens: int | None, greedy: bool, as_json: bool) -> None:
    """Run the program. Raises KTransformersError for what cannot start, typer.Exit with the exit code at the end."""
    prompt = read_prompt_file(prompt_file)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    wishes = {} if max_new_tokens is None else {"max_tokens": max_new_tokens}
    hold(RemoteChat(Server(url), wishes | ({"temperature": 0} if greedy else {}), as_json), prompt)


class Server:
    """A server by its URL, with or without /v1."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise KTransformersError(f"--server {url!r}: expected a URL such as http://127.0.0.1:8000.")
        self.url, self._parts = url, parts
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1"

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        """The answer, whose connection ends with it. Raises KTransformersError with what the server says is wrong."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection = kind(self._parts.hostname, self._parts.port, timeout=SECONDS)
            connection.request(method, self._path + path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise KTransformersError(f"server {self.url}: cannot be reached: {error}. Is kt serve running?") from error
        if answer.status != 200:
            hint = f" Set {KEY} to a key of the server." if answer.status == 401 else ""
            raise KTransformersError(f"server {self.url}: {answer.status}: {_reason(answer)}{hint}")
        return answer

    def model(self) -> str:
        """The name of the first model."""
        try:
            return json.loads(self.ask("GET", "/models").read())["data"][0]["id"]
        except (ValueError, LookupError, TypeError) as error:
            raise KTransformersError(f"server {self.url}: names no model; is it a server of OpenAI's API?") from error

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What a stream says, until it ends. Leaving off ends the connection, and the answer with it."""
        answer = self.ask("POST", path, body)
        try:
            for line in answer:
                if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                    event = json.loads(data)
                    if "error" in event:
                        raise KTransformersError(f"server {self.url}: {event['error'].get('message', event['error'])}")
                    yield event
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise KTransformersError(f"server {self.url}: the answer broke off: {error}. Ask again.") from error
        finally:
            answer.close()


def _reason(answer: http.client.HTTPResponse) -> str:
    text = answer.read(4000).decode(errors="replace").strip()
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return text.splitlines()[0] if text else str(answer.reason)


class RemoteChat(Turns):
    """One conversation with the model of a server, which gets all of it with each message."""

    def __init__(self, server: Server, wishes: dict[str, Any], as_json: bool) -> None:
        super().__init__(as_json)
        self.server, self.wishes, self.model = server, wishes, server.model()

    def answer(self, text: str) -> str:
        asked = [*self.messages, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": asked, "stream": True, "stream_options": {"include_usage": True}}
        said, usage, stopped, begin, first = "", {}, False, time.perf_counter(), None
        try:
            for event in self.server.events("/chat/completions", body | self.wishes):
                usage = event.get("usage") or usage
                delta = event["choices"][0].get("delta", {}) if event.get("choices") else {}
                piece = delta.get("content") or ""
                if first is None and (piece or delta.get("reasoning_content")):
                    first = time.perf_counter()
                if delta.get("reasoning_content") and not self.as_json:
                    err.print(delta["reasoning_content"], style="dim", end="", markup=False, soft_wrap=True)
                self._show(piece)
                said += piece
        except KeyboardInterrupt:
            stopped = True
        self.messages = [*asked, {"role": "assistant", "content": said}]
        self._finish(text, said, usage, stopped, begin, first or time.perf_counter())
        return said

    def _finish(
        self, question: str, answer: str, usage: dict[str, Any], stopped: bool, begin: float, first: float
    ) -> None:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        timing = {
            "reused_tokens": cached, "prefill_tokens": usage.get("prompt_tokens", 0) - cached,
            "prefill_seconds": first - begin, "decode_tokens": max(0, usage.get("completion_tokens", 0) - 1),
            "decode_seconds": time.perf_counter() - first,
        }  # fmt: skip
        if self.as_json:
            self._write(json.dumps({"question": question, "answer": answer, "stopped": stopped, **timing}) + "\n")
            return
        self._write("\n")
        rate = timing["decode_tokens"] / timing["decode_seconds"] if timing["decode_seconds"] else 0.0
        err.print(
            f"[dim]{'stopped · ' if stopped else ''}prompt {timing['prefill_tokens']} tokens, {cached} cached, "
            f"{timing['prefill_seconds']:.2f} s · decode {timing['decode_tokens']} tokens, {rate:.1f} tokens/s[/dim]"
        )
