"""`kt serve`, and `kt run`, upstream's name for it: a model behind the APIs that clients speak."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktransformers.cli.adapters import AdaptersOption, asked_adapters
from ktransformers.cli.common import (
    CacheOption,
    DevicesOption,
    JsonOption,
    RuleOption,
    WeightsOption,
    note,
    renamed_devices,
    show,
    taking,
)
from ktransformers.errors import KTransformersError

if TYPE_CHECKING:
    from ktransformers.engine.forms import Forms
    from ktransformers.server.keys import Keys
    from ktransformers.server.machine import Machine
    from ktransformers.server.service import Served, Settings

EXTRA = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
"""Packages of the extra `serve`."""


@dataclass
class ServeOptions:
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="A model folder or a .gguf; default: the small embedded model.")
    ] = ""
    weights: WeightsOption = ""
    rule: RuleOption = ""
    devices: DevicesOption = field(default_factory=list)
    cache: CacheOption = ""
    adapter: AdaptersOption = field(default_factory=list)
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free; it is printed.")] = 8000
    api_key_file: Annotated[
        str,
        typer.Option("--api-key-file", help="API keys, one a line; SIGHUP reads it again. Also: KT_API_KEYS, KEY,KEY."),
    ] = ""
    served_name: Annotated[
        list[str], typer.Option("--served-name", help="Name of the model for clients; may be repeated.")
    ] = field(default_factory=list)
    strict_names: Annotated[
        bool, typer.Option("--strict-names", help="Refuse requests that name another model; else any name will do.")
    ] = False
    max_running: Annotated[int, typer.Option(min=1, help="Answers that get tokens at every step.")] = 16
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that wait besides; more get status 429.")] = 1024
    chunk_size: Annotated[
        int, typer.Option(min=1, help="Prompt tokens computed between two tokens of those that run.")
    ] = 512
    context: Annotated[
        int, typer.Option(min=0, help="Most tokens of prompt and answer together; 0: what the model takes.")
    ] = 0
    cache_ram: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for beginnings of prompts that may come again; 0: none is kept.")
    ] = "2GiB"
    cache_limit: Annotated[
        str,
        typer.Option(metavar="SIZE", help="For all keys and values; default: half of what the model leaves."),
    ] = ""
    cache_dir: Annotated[str, typer.Option(metavar="FOLDER", help="Keep them on disk too, across restarts.")] = ""
    cache_disk: Annotated[str, typer.Option(metavar="SIZE", help="Most that the folder may hold.")] = "32GiB"
    cors: Annotated[
        list[str], typer.Option(metavar="ORIGIN", help="Web pages from there may ask; * is all; may be repeated.")
    ] = field(default_factory=list)
    count_experts: Annotated[
        bool,
        typer.Option(
            "--count-experts",
            help="Count which experts are chosen, for the machine tab of the page. Slower: each layer runs in parts.",
        ),
    ] = False
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log.")] = False
    request_timeout: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Most for a request; 0: as long as it takes.")
    ] = 0.0
    drain_timeout: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="For answers to end, after SIGTERM or Ctrl-C.")
    ] = 30.0
    as_json: JsonOption = False


@taking(ServeOptions)
def serve(options: ServeOptions) -> None:
    """Serve a model to clients of OpenAI's and Anthropic's APIs, many at a time."""
    serve_by(options)


@taking(ServeOptions)
def run(options: ServeOptions) -> None:
    """The same as kt serve."""
    serve_by(options)


def serve_by(options: ServeOptions) -> None:
    _need_extra()
    renamed_devices(options.devices)
    _sizes(options)
    keys = _keys(options)

    from ktransformers.server.service import Service
    from ktransformers.server.serving import Server, bind, url_of

    _check_model(options)
    _log_to_stderr()
    service = Service(_settings(options), keys=keys)
    bound = bind(options.host, options.port)
    server = Server(service, bound, options.drain_timeout)
    url, names = url_of(bound), service.names()
    said = [f"{names[0]} on {url}", f"for OpenAI's clients {url}/v1, for Anthropic's {url}"]
    show({"url": url, "names": names, "keys": keys.needed}, options.as_json, lambda: said)
    server.answer(lambda: open_model(options))


def _need_extra() -> None:
    if missing := [name.replace("_", "-") for name in EXTRA if find_spec(name) is None]:
        are = "is" if len(missing) == 1 else "are"
        raise KTransformersError(
            f"{', '.join(missing)} {are} not installed, which a server needs: pip install 'ktransformers[serve]'"
        )


def _keys(options: ServeOptions) -> "Keys":
    from ktransformers.env import api_keys
    from ktransformers.server.keys import Keys

    return Keys(Path(options.api_key_file).expanduser() if options.api_key_file else None, api_keys())


def _check_model(options: ServeOptions) -> None:
    """What is wrong with the paths is said before anybody is let in."""
    from ktransformers.paths import existing_path

    for text, subject in ((options.model, "model"), (options.weights, "--weights")):
        if text and existing_path(text, subject) is None and not os.path.exists(text):
            raise KTransformersError(f"{subject} {text}: no such file or folder. Check the path.")
    asked_adapters(options.adapter, _names(options)).check()


def _names(options: ServeOptions) -> list[str]:
    """Of the model itself."""
    return list(dict.fromkeys([*options.served_name, _own_name(options)]))


def _settings(options: ServeOptions) -> "Settings":
    from ktransformers.server.service import Limits, Settings

    names = _names(options)
    return Settings(
        tuple(names), options.strict_names, tuple(options.cors), options.log_prompts,
        Limits(request_seconds=options.request_timeout), asked_adapters(options.adapter, names).roots,
    )  # fmt: skip


def _own_name(options: ServeOptions) -> str:
    """What the model is called where nobody says."""
    path = options.model or options.weights
    return Path(path).resolve().name.removesuffix(".gguf") if path else "embedded"


def _log_to_stderr() -> None:
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name in ("ktransformers", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


def open_model(options: ServeOptions) -> "Served":
    """The model in an engine."""
    from ktransformers.configs import text_config
    from ktransformers.engine.batching import BatchingEngine
    from ktransformers.engine.load import load
    from ktransformers.server.service import Served

    model, tokenizer = load(
        options.model, options.weights, options.rule, devices=renamed_devices(options.devices), cache=options.cache,
        needs_template=False, progress=not options.as_json, notify=note,
    )  # fmt: skip
    model, forms = asked_adapters(options.adapter, _names(options)).put_onto(model)
    ending = ExitStack()
    machine = _machine(options, model, forms, ending)  # before the engine's thread makes tensors
    prefixes, after = _prefixes(options, model)
    ending.callback(after)
    engine = BatchingEngine(
        model, max_running=options.max_running, max_waiting=options.max_waiting, chunk_size=options.chunk_size,
        context=options.context or None, cache_bytes=_limit(options), prefixes=prefixes,
        forms=forms,
    )  # fmt: skip
    return Served(
        engine, tokenizer, text_config(model.config).vocab_size, model.generation_config, _facts(options, model),
        ending.close, machine,
    )  # fmt: skip


def _sizes(options: ServeOptions) -> tuple[int, int, int | None]:
    """Bytes of --cache-ram, --cache-disk and --cache-limit. Raises KTransformersError."""
    from ktransformers.machine.units import parse_bytes

    ram = 0 if options.cache_ram.strip() == "0" else parse_bytes(options.cache_ram, "--cache-ram")
    limit = parse_bytes(options.cache_limit, "--cache-limit") if options.cache_limit else None
    return ram, parse_bytes(options.cache_disk, "--cache-disk"), limit


def _limit(options: ServeOptions) -> int:
    """Bytes of --cache-limit; some 256 MiB where next to nothing is free."""
    from ktransformers.machine.system import memory

    return _sizes(options)[2] or max(memory()[1] // 2, 1 << 28)


def _prefixes(options: ServeOptions, model: Any) -> tuple[Any, Callable[[], None]]:
    """What keeps beginnings of prompts, None where nothing is to; and what to call in the end."""
    ram, disk_bytes, _ = _sizes(options)
    if not (ram or options.cache_dir):
        return None, lambda: None
    from ktransformers.engine.disk_blocks import DiskBlocks
    from ktransformers.engine.fingerprint import fingerprint
    from ktransformers.engine.prefix_tree import PrefixTree

    key = fingerprint(model, extra=asked_adapters(options.adapter, _names(options)).identity)
    if not options.cache_dir:
        return PrefixTree(model, key, ram), lambda: None
    disk = DiskBlocks(options.cache_dir, disk_bytes, key, title=_own_name(options), notify=note)
    return PrefixTree(model, key, ram, disk), disk.close


def _rule(options: ServeOptions, model: Any) -> str:
    """The rules that were taken."""
    from ktransformers.models import DEFAULT_RULES

    return options.rule or DEFAULT_RULES.get(model.config.model_type, "Default")


def _machine(options: ServeOptions, model: Any, forms: "Forms", ending: ExitStack) -> "Machine":
    """What the page's machine tab tells. Counting ends with `ending`."""
    from ktransformers.cli import machine_facts
    from ktransformers.planner.profile import record
    from ktransformers.server.machine import Machine

    placement = machine_facts.placement(model, _rule(options, model), renamed_devices(options.devices))
    counted = ending.enter_context(record(model)) if options.count_experts else None
    return Machine(placement, machine_facts.weights(model), counted, forms.nbytes())


def _facts(options: ServeOptions, model: Any) -> dict[str, Any]:
    """What /props tells: nothing that a client could not be told."""
    from ktransformers import native

    kind = model.config.model_type
    machine = {"threads": native.threads(), "isa": native.isa()} if native.available() else {}
    devices = sorted({str(device) for device in getattr(model, "hf_device_map", {}).values()})
    return {
        "model_type": kind, "dtype": str(model.dtype).removeprefix("torch."), "cache": options.cache or None,
        "rule": Path(_rule(options, model)).name, "adapter": asked_adapters(options.adapter, _names(options)).root,
        "max_running": options.max_running, "chunk_size": options.chunk_size, "machine": machine | {"devices": devices},
    }  # fmt: skip
