"""Plans: what fits where, on machines of any shape, and rule files that do what their plan says."""

import re
import shutil
from dataclasses import replace
from importlib import resources

import pytest
import torch
import yaml

from ktransformers import optimize_and_load
from ktransformers.errors import KTransformersError, WeightError
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.kernels.linear import DOT_ROWS
from ktransformers.machine import hardware
from ktransformers.machine.units import GIB, format_bytes
from ktransformers.operators.experts import KTransformersExperts
from ktransformers.planner import gpu_shares, placement, probes, shares, sizes, speed
from ktransformers.planner.placement import Layer, Placement, Room
from ktransformers.planner.plan import Planner, Request
from ktransformers.planner.profile import RoutingProfile
from ktransformers.simulator.simulate import simulate
from tests.tiny import meta_model, random_ids, relative_error


@pytest.fixture(scope="module")
def planner():
    return Planner("qwen3-30b-a3b", form="Q4_K_M")


def box(*gpus, ram="64GiB"):
    return hardware.describe(gpus, ram)


# --- placement ----------------------------------------------------------------------------------------------


def test_layers_go_to_gpus_in_order_while_there_is_room():
    layers = [Layer(10, 0)] * 6
    rooms = [Room("cuda:0", 30, 5), Room("cuda:1", 21, 0)]
    assert placement.place_layers(layers, rooms, 0, 0) == ["cuda:0"] * 2 + ["cuda:1"] * 2 + ["cpu"] * 2
    assert placement.place_layers(layers, [], 0, 0) == ["cpu"] * 6


def test_gpus_are_filled_alike_when_all_layers_fit():
    layers = [Layer(10, 2)] * 8
    devices = placement.place_layers(layers, [Room("cuda:0", 200, 0), Room("cuda:1", 200, 0)], 4, 4)
    assert devices == ["cuda:0"] * 4 + ["cuda:1"] * 4


def placed(layers, rooms):
    """(devices, how many experts each GPU has, bytes of GPU memory left free) of layers without embedding or head."""
    devices = placement.place_layers(layers, rooms, 0, 0)
    experts = placement.place_experts(layers, devices, rooms, {}, "uniform")
    counts, left = {}, {}
    for room in rooms:
        mine = [i for i, device in enumerate(devices) if device == room.device]
        counts[room.device] = sum(len(experts.get(i, ())) for i in mine)
        used = sum(layers[i].matrices + layers[i].cache + len(experts.get(i, ())) * layers[i].expert for i in mine)
        left[room.device] = room.free - used
    return devices, counts, left


def test_gpus_too_small_for_all_experts_are_all_full_of_them():
    """Dense layers first, as DeepSeek's: one GPU of them alone would keep room that no expert can use."""
    layers = [Layer(200, 10)] * 3 + [Layer(60, 10, 256, 8)] * 58
    for rooms_of in ([8000] * 8, [4000] * 4 + [12000] * 2, [2500, 30000]):
        rooms = [Room(f"cuda:{i}", size, 0) for i, size in enumerate(rooms_of)]
        devices, _, left = placed(layers, rooms)
        assert "cpu" not in devices
        assert all(free < 8 for free in left.values()), (rooms_of, left)


def test_gpus_large_enough_have_every_expert():
    layers = [Layer(200, 10)] * 3 + [Layer(60, 10, 256, 8)] * 58
    devices, counts, _ = placed(layers, [Room(f"cuda:{i}", 20000, 0) for i in range(8)])
    assert sum(counts.values()) == 58 * 256 and len(set(devices)) == 8


@pytest.mark.parametrize("strategy", ["uniform", "front-loading", "random"])
def test_experts_of_different_sizes_fill_a_gpu_to_the_last_one(strategy):
    """As in Q4_K_M files, where some layers' matrices are of more bits."""
    layers = [Layer(10, 0, 16, 7 + 5 * (i % 2)) for i in range(6)]
    whole = 16 * 3 * (7 + 12)
    for free in (0, 5, 200, whole - 1, whole, 2 * whole):
        rooms = [Room("cuda:0", 60 + free, 0)]
        chosen = placement.place_experts(layers, ["cuda:0"] * 6, rooms, {}, strategy)
        used = sum(layers[layer].expert * len(ids) for layer, ids in chosen.items())
        assert used <= free and (used == whole or used + 12 > free), (free, used)


@pytest.mark.parametrize("seed", range(20))
def test_no_gpu_gets_more_than_its_room(seed):
    random = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=random))

    layers = [Layer(number(1, 50), number(0, 20), 8, number(1, 9)) for _ in range(number(1, 40))]
    rooms = [Room(f"cuda:{i}", number(0, 400), number(0, 40)) for i in range(number(0, 5))]
    first, last = number(0, 30), number(0, 60)
    devices = placement.place_layers(layers, rooms, first, last)
    extra = {devices[0]: first}
    extra[devices[-1]] = extra.get(devices[-1], 0) + last
    experts = placement.place_experts(layers, devices, rooms, extra, "uniform")
    for room in rooms:
        mine = [i for i, device in enumerate(devices) if device == room.device]
        used = sum(layers[i].matrices + layers[i].cache + len(experts.get(i, ())) * layers[i].expert for i in mine)
        assert not mine or used + extra.get(room.device, 0) <= room.free, (seed, room)
    assert list(dict.fromkeys(devices)) == sorted(set(devices), key=lambda d: (d == "cpu", d))
    assert all(devices[layer] != "cpu" for layer in experts)


def test_a_rule_file_of_a_placement_is_the_packaged_one_with_other_devices():
    base = placement.packaged_content("MLA")
    content = placement.rule_content(base, Placement(["cuda:0", "cuda:0", "cpu"], {1: [0, 1, 2, 7]}), chunk=64)
    assert content["devices"] == {"cuda:0": "0-1", "cpu": "2"}
    experts = next(rule for rule in content["rules"] if rule["match"].get("trait") == "experts")["replace"]["kwargs"]
    assert experts["gpu_experts"] == {1: "0-2,7"} and experts["gpu_device"] == "layer"
    assert base["devices"] == "auto" and yaml.safe_load(placement.rule_text(content, ["said"])) == content


# --- plans of known models ----------------------------------------------------------------------------------


def test_everything_on_a_large_gpu(planner):
    found = planner.plan(box("h200"), Request(context=8192))
    assert found.fits and found.placement.layers == ["cuda:0"] * 48
    assert sum(map(len, found.placement.gpu_experts.values())) == 48 * 128
    assert found.memory["cpu"].weights < 2 * GIB and found.prefill.rate > found.decode.rate > found.decode_full.rate


@pytest.fixture(scope="module")
def deepseek():
    return Planner("deepseek-v3", form="Q4_K_M")


def where(planner, found):
    """(device, type) of every part that holds weights in a layer, by kind."""
    parts = sizes.parts(planner.model, planner._planned(yaml.safe_load(found.rule), len(found.hardware.gpus)), planner.form)
    kinds = {}
    for part in parts:
        kinds.setdefault(part.kind, []).append((part.device, part.type))
    return kinds


@pytest.mark.parametrize("gpu", ["24GiB", "4090"])
def test_deepseek_v3_on_one_gpu_keeps_all_but_experts_there(deepseek, gpu):
    """Attention, shared experts, dense layers and the head of all 61 layers, packed but for what attention absorbs."""
    found = deepseek.plan(box(gpu, ram="400GiB"))
    assert found.fits and found.placement.layers == ["cuda:0"] * 61
    kinds = where(deepseek, found)
    matrices = [*kinds["attention"], *kinds["dense"], *kinds["head"]]
    assert {device for device, _ in matrices} == {"cuda:0"} and {type_ for _, type_ in matrices} >= {"Q4_K", "Q6_K"}
    absorbed = 61 * 512 * 128 * 256 * 2  # kv_b_proj, in bf16
    assert absorbed < found.memory["cuda:0"].dense < 1.15 * absorbed and found.memory["cuda:0"].weights > 8 * GIB
    assert found.cpu_experts > 0.95 * 58 * 256 and found.memory["cpu"].cache == 0
    assert found.decode.bottleneck.startswith("routed experts on cpu")


def test_deepseek_v3_fills_several_gpus_with_packed_experts(deepseek):
    found = deepseek.plan(box(*["40GiB"] * 8, ram="512GiB"))
    assert found.fits and found.dense_experts == 0
    for device, memory in found.memory.items():
        assert device == "cpu" or memory.total > 0.97 * memory.limit, (device, memory)
    whole = deepseek.plan(box(*["80GiB"] * 8, ram="512GiB"))
    assert whole.cpu_experts == 0 and sum(map(len, whole.placement.gpu_experts.values())) == 58 * 256
    assert whole.memory["cpu"].weights < GIB  # the embedding


def test_a_30b_model_is_on_a_4090_as_a_whole(planner):
    found = planner.plan(box("4090"))
    gpu = found.memory["cuda:0"]
    assert found.cpu_experts == 0 and found.placement.layers == ["cuda:0"] * 48
    assert 17e9 < gpu.weights < 19.5e9 and gpu.dense < 0.01 * gpu.weights
    reads = 3.0e9 * 0.62 / (1008e9 * gpu_shares.PUBLISHED_BANDWIDTH)
    assert 100 < found.decode.rate < 1 / reads  # no more than the memory gives for the weights that a token meets


@pytest.mark.parametrize(("name", "type_"), [("deepseek-v3", "F8_E4M3"), ("kimi-k2-thinking", "I4")])
def test_published_fp8_and_int4_stay_as_they_are_and_fit(name, type_):
    """Kimi publishes all but routed experts in BF16."""
    planner = Planner(name)
    found = planner.plan(box("24GiB", ram="1TiB"))
    assert found.fits and found.placement.layers == ["cuda:0"] * 61
    kinds = where(planner, found)
    assert (("cuda:0", type_) in kinds["attention"]) is (name == "deepseek-v3")
    assert ("cuda:0", type_) in [*kinds["dense"], *kinds["experts"]]


@pytest.mark.parametrize(("name", "layers", "gpu"), [("glm-4.5-air", 46, "12GiB"), ("kimi-k2-thinking", 61, "16GiB")])
def test_published_weights_without_a_packed_form_are_quantized_where_that_is_asked_for(name, layers, gpu):
    """BF16; nothing is quantized unasked."""
    planner, machine = Planner(name), box(gpu, ram="1TiB")
    found = planner.plan(machine)
    assert "cpu" in found.placement.layers and any("with --linear-op KLinearMarlin" in note for note in found.notes)
    assert all(type_ != "INT4" for parts in where(planner, found).values() for _, type_ in parts)
    asked = planner.plan(machine, Request(linear_op="KLinearMarlin"))
    assert asked.fits and asked.placement.layers == ["cuda:0"] * layers and asked.decode.rate > found.decode.rate
    assert ("cuda:0", "INT4") in where(planner, asked)["attention"] and "generate_op: KLinearMarlin" in asked.rule
    assert not any("--linear-op" in note for note in asked.notes)


def test_an_operator_of_linear_layers_that_is_none_is_refused(planner):
    with pytest.raises(KTransformersError, match=r"--linear-op: 'KLinearMarlyn' unknown \(did you mean 'KLinearMarlin'"):
        planner.plan(box("24GiB"), Request(linear_op="KLinearMarlyn"))


def test_dense_experts_stay_in_ram_where_they_would_cost_the_graph():
    """BF16 experts: a few of them win less than a captured step."""
    planner, machine = Planner("glm-4.5-air"), box("16GiB", ram="1TiB")
    few = planner.plan(machine)
    assert few.dense_experts == 0 and few.placement.gpu_experts == {} and "cpu" not in few.placement.layers
    with_them = planner._place(machine, Request(), planner.form, probes.assumed(32))
    assert with_them.dense_experts > 0 and with_them.decode.rate < few.decode.rate


def test_a_gpu_expert_takes_no_ram(planner):
    without, with_gpu = (planner.plan(box(*gpus)) for gpus in ([], ["24GiB"]))
    experts = sum(map(len, with_gpu.placement.gpu_experts.values()))
    assert experts > 0
    assert without.memory["cpu"].mapped - with_gpu.memory["cpu"].mapped > experts * 3 * 2048 * 768 * 0.5


def test_nothing_is_over_its_limit_where_a_plan_fits(planner):
    for gpus in ([], ["8GiB"], ["12GiB", "24GiB"], ["4060ti-16g"] * 8):
        for context in (1024, 32768, 262144):
            found = planner.plan(box(*gpus), Request(context=context))
            over = [device for device, memory in found.memory.items() if memory.total > memory.limit]
            assert found.fits == (not over), (gpus, context, found.problems)
            assert not over or over == ["cpu"], found.problems


def test_more_gpu_is_never_slower_and_a_longer_context_never_faster(planner):
    rates = [planner.answer(box(f"{size}GiB@1000GB/s"), Request(), probes.assumed(16)).decode.rate for size in (6, 12, 24, 48, 80)]
    assert rates == sorted(rates)
    rates = [planner.answer(box("24GiB"), Request(context=n), probes.assumed(16)).decode_full.rate for n in (2048, 8192, 65536)]
    assert rates == sorted(rates, reverse=True)


def test_what_does_not_fit_says_what_would(planner):
    machine = box(ram="16GiB")
    found = planner.plan(machine)
    assert not found.fits and found.problems[0].startswith("RAM: ")
    kind = next(re.search(r"--format (\S+) fits", text)[1] for text in found.changes if "--format" in text)
    assert Planner("qwen3-30b-a3b", form=kind).plan(machine).fits
    more = next(re.search(r"more RAM fits: (\S+) GiB", text)[1] for text in found.changes if "more RAM" in text)
    assert planner.plan(box(ram=f"{more}GiB")).fits


def test_what_cannot_fit_at_all_is_said():
    found = Planner("deepseek-v3").plan(box("8GiB", ram="16GiB"))
    assert not found.fits and "TiB" not in found.problems[0] and any("more RAM" in text for text in found.changes)
    assert not any("--format" in text or "--context" in text for text in found.changes)


def test_a_small_context_is_proposed_where_the_cache_is_too_large(planner):
    found = planner.plan(box(ram="24GiB"), Request(context=262144, chunk=1024))
    assert not found.fits
    length = next(int(re.search(r"--context (\d+) fits", text)[1]) for text in found.changes if "--context" in text)
    assert planner.plan(box(ram="24GiB"), Request(context=length, chunk=1024)).fits


def test_frequency_puts_the_most_used_experts_on_the_gpu_and_is_faster(planner):
    layers = {i: [1000 if e in (5, 77) else 1 for e in range(128)] for i in range(48)}
    profile = RoutingProfile("qwen3_moe", layers, tokens=1000)
    found = planner.plan(box("8GiB"), Request(strategy="frequency", profile=profile))
    hot = {layer: ids for layer, ids in found.placement.gpu_experts.items() if ids}
    assert hot and all({5, 77} & set(ids) for ids in hot.values())
    assert found.decode.rate > planner.plan(box("8GiB"), Request(strategy="uniform", profile=profile)).decode.rate


def test_the_sum_of_a_pass_is_its_parts(planner):
    found = planner.plan(box("12GiB"))
    for one in (found.prefill, found.decode, found.decode_full):
        assert one.total == pytest.approx(sum(one.seconds.values())) and one.rate == pytest.approx(one.tokens / one.total)
        assert all(seconds >= 0 for seconds in one.seconds.values())
    reading = found.decode.seconds["cpu", "routed experts"]
    assert reading > 0 and re.fullmatch(r".+ on \S+ \(\d+ %\)", found.decode.bottleneck)


def test_experts_by_hand():
    """One layer's experts on a CPU, one token: the bytes of K of them over the bandwidth the kernel reaches."""
    from ktransformers.planner.sizes import Part

    part = Part("e", 0, "experts", "cpu", "Q4_K", 800, True, 100.0, 50.0, 1600, 1.0, 8, 1)
    machine = box(ram="64GiB@10GB/s")
    one = speed.forward([part], [], {}, machine, probes.assumed(1), 1, 0)
    assert one.seconds["cpu", "routed experts"] == pytest.approx(100 / (10e9 * shares.KERNELS["Q4_K"].read))
    many = speed.forward([part], [], {}, machine, probes.assumed(1), 10_000, 0)
    ops = 50.0 * 10_000 / (machine.cpu.int8_ops * shares.KERNELS["Q4_K"].peak)
    assert many.seconds["cpu", "routed experts"] == pytest.approx(max(800 / (10e9 * 0.93), ops), rel=0.01)


def gpu_seconds(part, machine, tokens, captured=False):
    return speed.forward([part], [], {0: "cuda:0"}, machine, probes.assumed(1), tokens, 0, captured=captured)


def test_packed_matrices_on_a_gpu_by_hand():
    """Words over the bandwidth, numbers made for many tokens, and the matrix units; launches by the layer."""
    part = sizes.Part("q", 0, "attention", "cuda:0", "Q4_K", 10**9, False, 1e9, 4e9, 2 * 10**9)
    machine = hardware.Hardware(box().cpu, (hardware.Gpu("a", 24 * GIB, 1e12, 1e14, 25e9),), measured=True)
    key = ("cuda:0", "attention's matrices")
    assert gpu_seconds(part, machine, 1).seconds[key] == pytest.approx(1e9 / 0.7e12)
    assert gpu_seconds(part, machine, DOT_ROWS).seconds[key] == pytest.approx(4e9 * DOT_ROWS / 0.95e14)
    made = 1e9 / 0.7e12 + 4 * 2e9 / 1e12
    assert gpu_seconds(part, machine, DOT_ROWS + 1).seconds[key] == pytest.approx(max(made, 4e9 * (DOT_ROWS + 1) / 0.95e14))
    dense = replace(part, type=sizes.DENSE)
    assert gpu_seconds(dense, machine, 1).seconds[key] == pytest.approx(1e9 / 0.8e12)
    besides = [gpu_seconds(p, machine, 1, captured).seconds["cuda:0", "launching and elementwise work"]
               for p, captured in ((dense, False), (part, False), (part, True))]  # fmt: skip
    assert besides == pytest.approx([5e-4, 12 * 2.5e-5, 12 * 1.5e-6 + 5e-5])


def test_what_is_assumed_of_gpus_is_possible_and_of_the_kernels_that_there_are():
    assert all(0 < share <= 1 for share in (*gpu_shares.READ.values(), *gpu_shares.PRODUCT.values()))
    assert gpu_shares.MADE_FROM == DOT_ROWS and gpu_shares.KERNELS <= 12


def test_a_step_is_a_graph_where_one_can_be_captured(planner, monkeypatch):
    """One GPU with all layers, one sequence; caches of windows where kernels attend."""
    def launches(found):
        return sum(seconds for (_, what), seconds in found.decode.seconds.items() if what.startswith("launching"))

    one = planner.plan(box("24GiB"))
    assert launches(one) < 48 * 1e-4 < launches(planner.plan(box("24GiB"), Request(batch=2)))
    assert launches(planner.plan(box("16GiB", "16GiB"))) > 48 * 1e-4
    windows = Planner("gpt-oss-20b")
    found = windows.plan(box("24GiB"))
    assert launches(found) < 24 * 1e-4 and found.cpu_experts == 0
    monkeypatch.setenv("KT_KERNELS", "0")
    assert launches(windows.plan(replace(box("24GiB"), measured=True))) > 24 * 1e-4


def test_latents_in_fp8_take_their_bytes_on_gpus_alone():
    planner = Planner("deepseek-v3")
    own, fp8 = (planner.plan(box("24GiB"), Request(cache=kind)) for kind in (None, "fp8"))
    assert own.memory["cuda:0"].cache == 61 * 8192 * 1152 and fp8.memory["cuda:0"].cache == 61 * 8192 * 656
    here = planner.plan(box(), Request(cache="fp8"))
    assert here.memory["cpu"].cache == own.memory["cuda:0"].cache
    assert any(note.startswith("Cache: 0 of 61 layers keep fp8; the others, which do not") for note in here.notes)


def test_without_triton_weights_on_this_machine_s_gpus_are_dense(planner, monkeypatch):
    gpu = hardware.Gpu("this machine's", 24 * GIB, 1e12, 1e14, 25e9)
    here, elsewhere = (hardware.Hardware(box().cpu, (gpu,), measured=measured) for measured in (True, False))
    monkeypatch.setattr("ktransformers.kernels.compiler.triton", object())
    assert planner.plan(here).memory["cuda:0"].dense < GIB
    monkeypatch.setattr("ktransformers.kernels.compiler.triton", None)
    found = planner.plan(here)
    assert found.memory["cuda:0"].dense == found.memory["cuda:0"].weights and any("need Triton" in note for note in found.notes)
    assert planner.plan(elsewhere).memory["cuda:0"].dense < GIB
    monkeypatch.setattr("ktransformers.kernels.compiler.triton", object())
    monkeypatch.setenv("KT_KERNELS", "0")
    assert any("KT_KERNELS=0" in note for note in planner.plan(here).notes)


def test_a_gpu_that_triton_has_no_kernels_for_has_dense_weights(planner):
    for gpus in (["v100-32g"], ["4090", "T4"]):
        found = planner.plan(box(*gpus))
        assert all(m.dense == m.weights for device, m in found.memory.items() if device != "cpu")
        assert any("Triton has no kernels for a " in note for note in found.notes)


def test_what_is_proposed_to_fit_is_placed_by_its_own_sizes(deepseek):
    """A smaller format has smaller experts, of which a GPU takes more."""
    machine = box("24GiB", ram="256GiB")
    proposed = next(text for text in deepseek.plan(machine).changes if "--format Q2_K fits" in text)
    ram = Planner("deepseek-v3", form="Q2_K").plan(machine).memory["cpu"].total
    assert format_bytes(ram) in proposed


def test_speed_on_a_gpu_is_called_an_estimate(planner):
    assert planner.plan(box("24GiB")).basis == gpu_shares.ESTIMATE == "estimate (not measured on a GPU)"
    assert planner.plan(box()).basis == ""


def test_shares_are_of_types_that_exist_and_below_the_limit():
    from ktransformers.planner.sizes import DENSE, in_c

    for name, share in shares.KERNELS.items():
        assert name == DENSE or in_c(name), name
        assert 0 < share.read <= 1 and (share.peak is None or 0 < share.peak <= 1), name
    assert shares.read_share("no such type") == shares.OTHER.read
    assert shares.peak_share("Q3_K") == shares.OTHER.peak and shares.peak_share("Q4_K") == 0.57


# --- rule files that do it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "mixtral"])
def test_a_placement_s_rule_file_computes_what_transformers_computes(checkpoint, family, tmp_path):
    """Layers on two GPUs and on the CPU, some experts with their layers; the CPU plays the GPUs."""
    reference, folder = checkpoint(family, num_hidden_layers=6)
    planner = Planner(str(folder), weights=folder)
    devices = ["cuda:0"] * 2 + ["cuda:1"] * 2 + ["cpu"] * 2
    text = placement.rule_text(placement.rule_content(planner.base, Placement(devices, {1: [0, 3], 2: [7]}), chunk=16))
    rule = tmp_path / "rule.yaml"
    rule.write_text(text)
    model = optimize_and_load(
        meta_model(reference.config), rule, folder, devices={"cuda:0": "cpu", "cuda:1": "cpu"}, progress=False
    )
    ids = random_ids(1, 13)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4
    experts = {name: m.extra_repr() for name, m in model.named_modules() if isinstance(m, KTransformersExperts)}
    assert {name.split(".")[2] for name, text in experts.items() if " of 8" in text} == {"1", "2"}, experts


WIDE = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 512}
"""So that matrices have the columns of GGUF's blocks of 256."""


def agreed(planner, config, request, sizes_of):
    """The plan for two GPUs that have room for all but some layers, after a simulation that finds the same there."""
    layers, first, _ = planner._layers(request, planner.form)
    size = sizes_of(layers) + first
    gpu = hardware.Gpu("tiny", (size + planner._gpu_work(request) + (600 << 20)) * 50 // 49, 1e12, 1e14, 25e9)
    found = planner.plan(hardware.Hardware(box().cpu, (gpu, gpu)), request)
    form = planner.form
    simulation = simulate(
        config, yaml.safe_load(found.rule), gpus=2, tokens=39, context=0, weights=form.source, size=form.stored,
        form=form.layout,
    )  # fmt: skip
    assert not simulation.problems, "\n".join(map(str, simulation.problems))
    for device in set(found.placement.layers) - {"cpu"}:
        assert simulation.weights[device] == pytest.approx(found.memory[device].weights, rel=0.01), device
        assert simulation.cache[device] == found.memory[device].cache, device
    return found


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_what_is_planned_on_gpus_is_what_a_simulation_finds_there(checkpoint, family):
    """Weights and cache of every device, against a forward with fake tensors under the plan's rule file."""
    reference, folder = checkpoint(family, num_hidden_layers=12)
    planner = Planner(str(folder), weights=folder)
    found = agreed(planner, reference.config, Request(context=40), lambda all: 2 * max(each.matrices + each.cache for each in all))
    assert {"cuda:0", "cuda:1", "cpu"} == set(found.placement.layers) and found.dense_experts == 0


@pytest.mark.parametrize("form", ["Q4_K_M", "Q6_K", "INT4", "GPTQ_INT4", "INT8"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_packed_weights_on_gpus_are_planned_as_simulated(checkpoint, family, form):
    """All layers with some packed experts; of types whose scales lie within, and apart."""
    reference, folder = checkpoint(family, num_hidden_layers=4, **WIDE)
    planner = Planner(str(folder), form=form)

    def room(layers):
        return sum(each.matrices + each.cache for each in layers) + 6 * max(each.expert for each in layers)

    found = agreed(planner, reference.config, Request(context=40), room)
    packed = [memory.weights - memory.dense for device, memory in found.memory.items() if device != "cpu"]
    assert "cpu" not in found.placement.layers and found.cpu_experts and all(packed)
    assert sum(map(len, found.placement.gpu_experts.values())) >= 6 and found.dense_experts == 0


@pytest.mark.parametrize("request_", [Request(context=40), Request(context=40, linear_op="KLinearMarlin")], ids=["as published", "quantized"])
def test_a_gguf_on_gpus_is_planned_as_simulated(checkpoint, tmp_path, request_):
    """By the headers of a file, and with dense embeddings and norms quantized or not."""
    reference, folder = checkpoint("qwen3_moe", num_hidden_layers=4, tie_word_embeddings=True, **WIDE)
    for mix in ("Q4_K_M", "BF16"):
        path = tmp_path / f"{mix}.gguf"
        quantize_folder(folder, path, mix)
        planner = Planner(str(folder), weights=path)
        found = agreed(planner, reference.config, request_, lambda all: 2 * sum(each.matrices + each.cache for each in all))
        types = {type_ for _, type_ in where(planner, found)["attention"]}
        assert ("INT4" in types) is (mix == "BF16" and request_.linear_op is not None), types
        assert ("Q4_K" in types) is (mix == "Q4_K_M")


def test_headers_that_disagree_with_the_config_are_refused(checkpoint):
    _, other = checkpoint("qwen3_moe", moe_intermediate_size=48)
    _, folder = checkpoint("qwen3_moe")
    with pytest.raises(WeightError, match="does not fit"):
        Planner(str(folder), weights=other)
    with pytest.raises(KTransformersError, match="give one"):
        Planner(str(folder), weights=folder, form="Q4_K_M")


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q8_0"])
def test_a_gguf_or_a_folder_with_weights_is_planned_by_its_own_headers(checkpoint, tmp_path, mix):
    sizes_of = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256}
    _, folder = checkpoint("qwen3_moe", dtype=torch.bfloat16, **sizes_of)
    path = tmp_path / "model.gguf"
    quantize_folder(folder, path, mix)
    file = Planner(str(path)).plan(box())
    assert file.format == "model.gguf"
    assert file.memory["cpu"].mapped == Planner(str(folder), weights=path).plan(box()).memory["cpu"].mapped
    assert file.memory["cpu"].mapped <= path.stat().st_size < 2 * file.memory["cpu"].weights
    assert Planner(str(folder)).plan(box()).format == "model.safetensors"
    assert Planner(str(folder), form="published").form.name == "published"
    assert Planner(str(path), form="F16").form.name == "F16"


def test_a_folder_whose_weights_are_incomplete_says_how_to_plan_without_them(checkpoint, tmp_path):
    _, folder = checkpoint("qwen3_moe")
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(WeightError, match="--format published"):
        Planner(str(tmp_path))
    assert Planner(str(tmp_path), form="published").plan(box()).fits


def test_the_header_of_a_rule_file_names_the_machine(planner):
    text = planner.plan(box("24GiB", "24GiB", "4090")).rule
    assert "for 2 x 24 GiB GPU and 4090 (24 GiB) and 64 GiB of RAM," in text.splitlines()[0]


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-30b-a3b", "gpt-oss-20b"])
def test_the_header_of_a_rule_file_names_the_packaged_file_that_it_was_made_from(name):
    text = Planner(name).plan(box(ram="2TiB")).rule
    named = re.search(r"Made from (\S+)\.$", text, re.MULTILINE)[1]
    assert resources.files("ktransformers.optimize_rules").joinpath(named).is_file(), named
