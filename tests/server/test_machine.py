"""/kt/machine, and what `kt serve` collects for it: the plan in words, bytes by device, experts counted while serving."""

import json
import sys
import types

import pytest
from ktransformers.models import embedded_model

from ktransformers.cli import serve
from ktransformers.cli.machine_facts import placement, weights
from ktransformers.cli.serve import ServeOptions, open_model
from ktransformers.configs import read_config
from ktransformers.engine.requests import Done, Request
from ktransformers.errors import KTransformersError
from ktransformers.server import machine
from ktransformers.server.keys import Keys
from ktransformers.server.machine import Machine
from ktransformers.server.service import Service
from tests.server.support import ask, served, service, wait_for
from tests.tiny import tiny_model


def reported(machine_=None, **options):
    made = served(**options)
    object.__setattr__(made, "machine", machine_ or Machine())
    response = ask(service(made), "/kt/machine")
    assert response.status_code == 200
    return response.json()


# ---- the endpoint ------------------------------------------------------------------------------------------


def test_what_is_known_is_told_and_what_is_not_is_null():
    counted = types.SimpleNamespace(layers={4: [0, 2], 1: [3, 1]}, tokens=4)
    found = reported(Machine({"file": "x.yaml"}, {"cpu": 1000, "cuda:7": 5}, counted, {"a": {"cuda:7": 1}, "b": {"cuda:7": 2}}))
    assert found["placement"] == {"file": "x.yaml"}
    assert found["experts"] == {"tokens": 4, "layers": [1, 4], "counts": [[3, 1], [0, 2]]}
    assert found["load"]["running"] == 0 and found["load"]["cache_bytes"] == 1000
    cpu, gpu = found["devices"]
    assert cpu["device"] == "cpu" and 0 < cpu["free"] <= cpu["total"] and cpu["weights"] == 1000
    assert gpu == {"device": "cuda:7", "name": "cuda:7", "total": None, "free": None, "process": None, "weights": 5, "adapters": 3}
    assert reported()["experts"] is None and reported()["devices"][0]["weights"] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_this_process_holds_memory(monkeypatch, tmp_path):
    assert reported()["devices"][0]["process"] > 50 << 20
    monkeypatch.setattr(machine, "PROCESS", tmp_path / "gone")
    assert reported()["devices"][0]["process"] is None


def test_gpus_are_asked_once_somebody_uses_them(monkeypatch):
    asked = []
    names = {
        "is_initialized": lambda: True, "device_count": lambda: 2, "mem_get_info": lambda i: (asked.append(i), (30 + i, 80))[1],
        "memory_reserved": lambda i: 20 + i, "get_device_name": lambda i: f"GPU {i}",
    }  # fmt: skip
    for name, function in names.items():
        monkeypatch.setattr(f"torch.cuda.{name}", function)
    assert [device["device"] for device in reported()["devices"]] == ["cpu", "cuda:0", "cuda:1"]
    found = reported(Machine(weights={"cuda:1": 9}))["devices"][2]
    assert found == {"device": "cuda:1", "name": "GPU 1", "total": 80, "free": 31, "process": 21, "weights": 9, "adapters": 0}
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    asked.clear()
    assert len(reported()["devices"]) == 1 and not asked


def test_it_is_behind_the_keys_and_waits_for_the_model():
    assert ask(service(keys=Keys(None, "sesame")), "/kt/machine").status_code == 401
    assert ask(Service(), "/kt/machine").status_code == 503


# ---- what kt serve collects --------------------------------------------------------------------------------


def test_the_placement_is_what_kt_rules_explain_says(capsys):
    from ktransformers import cli

    model = types.SimpleNamespace(config=read_config(embedded_model()))
    found = placement(model, "MLA", {})
    assert json.loads(json.dumps(found)) == found
    with pytest.raises(SystemExit):
        cli.app(["rules", "explain", "MLA", str(embedded_model()), ".", "--gpus", "0", "--json"])
    told = json.loads(capsys.readouterr().out)["modules"]
    assert [group["pattern"] for group in found["groups"]] == [group["pattern"] for group in told]
    for group, other in zip(found["groups"], told, strict=True):
        assert group["count"] == len(other["modules"]) and group["operator"] == other["operator"] and group["rule"] == other["rule"]
        assert group["others"] == [{"rule": one["rule"], "reason": one["reason"]} for one in other["others"]]
    experts = next(group for group in found["groups"] if group["pattern"].endswith(".experts"))
    assert experts["operator"] == "KTransformersExperts" and experts["owns"] and experts["devices"]["device"] == {"cpu": "1-2"}
    assert found["layers"] == {"cpu": "0-2"} and found["experts"] == {"cpu": "1-2"}


def test_no_path_of_this_machine_is_told(tmp_path):
    rules = tmp_path / "mine.yaml"
    rules.write_text('- match: {class: torch.nn.Linear}\n  replace: {class: default, kwargs: {generate_device: cpu, prefill_device: cpu}}\n')
    text = json.dumps(placement(types.SimpleNamespace(config=read_config(embedded_model())), str(rules), {}))
    assert "mine.yaml:1" in text and str(tmp_path) not in text


def opened(**options):
    return open_model(ServeOptions(cache_ram="0", **options))


def answered(made, ids, tokens):
    said = []
    made.engine.submit(Request(ids, tokens), said.append)
    wait_for(lambda: said and isinstance(said[-1], Done), 60)
    return [event.id for event in said if hasattr(event, "id")]


def test_experts_are_counted_where_that_is_asked_for_and_answers_stay_the_same():
    plain, counting = opened(), opened(count_experts=True)
    try:
        assert plain.machine.counted is None
        file = next(embedded_model().glob("*.gguf")).stat().st_size
        assert 0.5 * file < plain.machine.weights["cpu"] <= file
        ids = list(range(40, 75))
        first = answered(plain, ids, 8)
        assert answered(counting, ids, 8) == first
        found = machine.report(counting.machine, counting.engine.load())["experts"]
        chosen = read_config(embedded_model()).num_experts_per_tok
        assert found["layers"] == [1, 2] and found["tokens"] == len(ids) + len(first) - 1
        assert [sum(counts) for counts in found["counts"]] == [chosen * found["tokens"]] * 2
    finally:
        for made in (plain, counting):
            made.engine.close(), made.after()


def test_a_model_without_experts_cannot_count_them(monkeypatch):
    dense = tiny_model("llama")
    monkeypatch.setattr("ktransformers.engine.load.load", lambda *_, **__: (dense, None))
    monkeypatch.setattr("ktransformers.cli.machine_facts.placement", lambda *_: {})
    with pytest.raises(KTransformersError, match="no routed experts"):
        serve.open_model(ServeOptions(count_experts=True))


def test_bytes_are_counted_once_and_where_they_are():
    from ktransformers import optimize_and_load
    from tests.tiny import meta_model

    config = read_config(embedded_model())
    loaded = optimize_and_load(meta_model(config), "MLA", next(embedded_model().glob("*.gguf")), progress=False)
    assert set(weights(loaded)) == {"cpu"}
    loaded.gguf_loader.devices = {**loaded.gguf_loader.devices, "model.layers.1.mlp.experts": "cuda:0"}
    split = weights(loaded)
    assert split["cuda:0"] > 0 and sum(split.values()) == sum({i.name: i.nbytes for n in loaded.gguf_loader.names() for i in loaded.gguf_loader.infos(n)}.values())
