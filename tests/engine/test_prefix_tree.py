"""A prompt that goes on from cached blocks gives what computing all of it gives, and memory is what the tree says it is."""

import copy
import gc
import random
import threading

import pytest
import torch
from transformers import DynamicCache

from ktransformers import optimize_and_load
from ktransformers.engine import block_files
from ktransformers.engine.block_files import path_of
from ktransformers.engine.cache import PrefixCache
from ktransformers.engine.disk_blocks import DiskBlocks
from ktransformers.engine.generate import Timing, generate
from ktransformers.engine.prefix_tree import PrefixTree
from ktransformers.engine.sampling import Sampling
from ktransformers.native.pages import PAGE
from ktransformers.operators.fixed_cache import FixedCache
from ktransformers.operators.paged_cache import PagedCache, PagedWindowLayer, paged_cache
from tests.engine.test_disk_blocks import rewritten
from tests.tiny import meta_model, random_ids, relative_error

FAMILIES = {
    "qwen3_moe": {},
    "qwen3_moe q8_0": {"head_dim": 32, "cache": "q8_0"},
    "deepseek_v3": {},
    "gpt_oss": {"sliding_window": 20, "num_hidden_layers": 3},
    "gpt_oss wide": {"sliding_window": 150, "num_hidden_layers": 3},
    "deepseek_v32": {},
    "qwen3_next": {},
    "kimi_linear": {},
    "bailing_hybrid": {},
    "granitemoehybrid": {},
    "lfm2_moe": {},
    "nemotron_h": {},
}
GIB = 1 << 30
IDS = random_ids(1, 400, seed=5)[0].tolist()


@pytest.fixture(scope="module")
def models(checkpoint):
    made = {}

    def make(name):
        if name not in made:
            family, options = name.split()[0], dict(FAMILIES[name])
            kind = options.pop("cache", None)
            truth, folder = checkpoint(family, max_position_embeddings=1024, **options)
            made[name] = optimize_and_load(
                meta_model(truth.config), "Default", folder, devices={"cuda": "cpu"}, progress=False, cache=kind
            )
        return made[name]

    return make


def tree_of(model, limit=GIB, disk=None):
    return PrefixTree(model, b"numbers", limit, disk)


def length_of(cache):
    return next(layer.get_seq_length() for layer in cache.layers if hasattr(layer, "pages"))


@torch.inference_mode()
def compute(model, ids, cache=None, tree=None, chunk=128, record=True):
    """Logits of what `cache` lacks of `ids`, in chunks, and the cache; as a scheduler does with a `tree`."""
    cache, logits = cache or paged_cache(model), []
    done = length_of(cache)
    windows = [layer for layer in cache.layers if isinstance(layer, PagedWindowLayer)]
    while done < len(ids):
        for layer in windows if tree and record else ():
            layer.activate_past_recording()
        part = ids[done : done + chunk - done % chunk]
        logits.append(model(torch.tensor([part]), past_key_values=cache, use_cache=True).logits[0])
        done += len(part)
        if tree:
            tree.insert(ids, cache)
        for layer in windows if tree and record else ():
            layer.crop(0)
            layer.record_past = False
    return torch.cat(logits), cache


def greedy(model, ids, cache=None, length=0, count=12):
    """Tokens after `ids`, by the engine's own way, of which `cache` holds the first `length`."""
    held, timing = PrefixCache(), Timing()
    held.cache, held.ids = cache, list(ids[:length])
    found = list(generate(model, ids, max_new_tokens=count, chunk_size=128, sampling=Sampling(), cache=held, timing=timing))
    assert timing.reused_tokens == length
    return found


def data(cache):
    """The bytes of all pages."""
    return [page.data.clone() for layer in cache.layers if hasattr(layer, "pages") for page in layer.pages.tables[0] if page]


# --- the same numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("name", FAMILIES)
def test_going_on_gives_what_computing_everything_gives(models, name, where, exact, tmp_path):
    model, other = models(name), [*IDS[:256], *random_ids(1, 60, seed=9)[0].tolist()]
    disk = DiskBlocks(tmp_path, GIB, b"numbers") if where == "disk" else None
    tree = tree_of(model, disk=disk)
    assert tree.lookup(IDS) == (None, 0)
    compute(model, IDS, tree=tree)
    if where == "disk":
        assert disk.flush(30) and disk.counts.written == tree.blocks == len(IDS) // PAGE
        tree = tree_of(model, disk=DiskBlocks(tmp_path, GIB, b"numbers"))  # as after a restart
        assert tree.blocks == 0
    for ids in (other, IDS, [*IDS, 5, 6, 7], IDS[:257]):
        cache, length = tree.lookup(ids)
        assert length == length_of(cache) == (256 if ids == other or len(ids) < 300 else 384)
        truth, whole = compute(model, ids)
        found, cache = compute(model, ids, cache)
        assert relative_error(found, truth[length:]) < 1e-5
        for one, own in zip(whole.layers, cache.layers, strict=True):
            if hasattr(one, "pages"):
                assert one.pages.held_from == own.pages.held_from and one.pages.lengths == own.pages.lengths
        again, length = tree.lookup(ids)
        assert greedy(model, ids, again, length) == greedy(model, ids)
    assert tree.uses.hit >= 4 * 256 and tree.uses.read == (384 if where == "disk" else 0)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "gpt_oss wide"])
def test_every_block_can_be_gone_on_from(models, name, exact):
    model = models(name)
    tree = tree_of(model)
    compute(model, IDS, tree=tree)
    for length in range(PAGE, 385, PAGE):
        ids = [*IDS[:length], 3, 4]
        cache, found = tree.lookup(ids)
        assert found == length
        for layer in cache.layers:
            first = max(length - layer.window + 1, 0) if layer.window else 0
            assert layer.pages.held_from == [first]
            assert [page is None for page in layer.pages.tables[0]].count(True) == first // PAGE
        assert relative_error(compute(model, ids, cache)[0], compute(model, ids)[0][length:]) < 1e-5


def test_all_but_the_last_token_and_whole_blocks(models):
    tree = tree_of(models("qwen3_moe"))
    compute(models("qwen3_moe"), IDS[:200], tree=tree)
    lengths = {1: 0, 64: 0, 65: 64, 128: 64, 129: 128, 193: 192, 400: 192}
    assert {count: tree.lookup(IDS[:count])[1] for count in lengths} == lengths
    assert tree.lookup([]) == (None, 0) and tree.lookup([7, *IDS])[1] == 0
    assert tree.lookup([*IDS[:70], 1, *IDS[71:]])[1] == 64


# --- windows and states ---------------------------------------------------------------------------------


def test_what_a_window_has_left_behind_is_not_needed_where_it_ends(models, exact):
    """Without recording only chunk ends are of use, and those; with it later the rest is added."""
    model = models("gpt_oss")
    tree = tree_of(model)
    compute(model, IDS, tree=tree, record=False)
    found = [tree.lookup([*IDS[:length], 3])[1] for length in range(64, 385, 64)]
    assert found == [0, 128, 128, 256, 256, 384]
    ids = [*IDS[:384], 9, 9]
    assert greedy(model, ids, *tree.lookup(ids)) == greedy(model, ids)
    assert tree.insert(IDS, compute(model, IDS, tree=tree)[1]) == 0
    assert [tree.lookup([*IDS[:length], 3])[1] for length in range(64, 385, 64)] == list(range(64, 385, 64))
    tree.clear()
    assert tree.nbytes == 0


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2_moe"])
def test_states_are_kept_where_an_insert_ended(models, name):
    model = models(name)
    tree = tree_of(model)
    cache = compute(model, IDS[:192], chunk=192)[1]
    assert tree.insert(IDS, cache, states=False) == 3 and tree.lookup(IDS) == (None, 0)
    before = tree.nbytes
    assert tree.insert(IDS, cache) == 0 and tree.nbytes > before  # the same, with states
    assert tree.lookup(IDS)[1] == 192 and tree.lookup(IDS[:192])[1] == 0
    assert tree.insert(IDS, compute(model, IDS[:300], cache)[1]) == 1 and tree.lookup(IDS)[1] == 192
    held = tree.lookup(IDS)[0]
    states = copy.deepcopy(tree.lookup(IDS)[0])
    compute(model, IDS, held)  # changes its own
    for one, other in zip(tree.lookup(IDS)[0].layers, states.layers, strict=True):
        if hasattr(one, "conv_states"):
            assert torch.equal(one.conv_states[0], other.conv_states[0])


# --- sharing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "deepseek_v32", "qwen3_next"])
def test_two_go_on_from_one_prefix(models, name, exact):
    """In turns, token by token, and one goes back into a page that it shares."""
    model = models(name)
    tree = tree_of(model)
    compute(model, IDS[:256], tree=tree)
    prompts = [[*IDS[:256], *random_ids(1, 20, seed=seed)[0].tolist()] for seed in (1, 2)]
    # Each from its own cache: an index chooses keys by close scores, which a chunk and single tokens round otherwise.
    truth = [compute(model, ids, compute(model, ids[:256])[1], chunk=1)[0] for ids in prompts]
    caches = [tree.lookup(ids)[0] for ids in prompts]
    before, found = data(caches[0]), [[], []]
    for at in range(256, 276):
        for i, ids in enumerate(prompts):
            found[i].append(compute(model, ids[: at + 1], caches[i])[0])
    for i in range(2):
        assert relative_error(torch.cat(found[i]), truth[i]) < 1e-5
    if name not in ("gpt_oss", "qwen3_next"):
        caches[0].crop(-46)  # 26 tokens into the shared page
        compute(model, [*IDS[:230], *IDS[:40]], caches[0])
    assert all(torch.equal(old, new) for old, new in zip(before, data(tree.lookup(IDS)[0]), strict=True))


def test_a_row_of_a_batch(models, exact):
    model = models("qwen3_moe")
    tree, prompts = tree_of(model), [IDS[:200], IDS[100:170]]
    batch = PagedCache.together([compute(model, ids)[1] for ids in prompts])
    assert [tree.insert(ids, batch, row) for row, ids in enumerate(prompts)] == [3, 1]
    assert tree.insert(IDS, batch, 2) == 0
    for ids in prompts:
        assert greedy(model, ids, *tree.lookup(ids)) == greedy(model, ids)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_only_a_whole_cache_of_pages_is_kept(models, name):
    model = models(name)
    tree = tree_of(model)
    plain = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([IDS[:130]]), past_key_values=plain, use_cache=True)
    assert tree.insert(IDS, plain) == tree.insert(IDS, FixedCache(model.config)) == tree.insert(IDS, None) == 0
    assert tree.insert(IDS, paged_cache(model)) == 0
    cache = compute(model, IDS[:130])[1]
    cache.layers[1].crop(-1)  # as after a step that was interrupted between two layers
    assert tree.insert(IDS, cache) == 0 and tree.blocks == 0


def test_a_model_without_pages(checkpoint):
    truth, _ = checkpoint("qwen3_moe")
    tree = tree_of(truth)
    assert tree.lookup(IDS) == (None, 0) and tree.insert(IDS, DynamicCache(config=truth.config)) == 0
    assert tree.evict(1) == 0


def test_a_cache_of_another_type_is_not_mixed_in(models):
    model = models("qwen3_moe")
    tree, cache = tree_of(model), paged_cache(model, "f16")
    compute(model, IDS[:70], tree=tree)
    assert tree.insert(IDS[100:], compute(model, IDS[100:300], cache)[1]) == 0


# --- memory ---------------------------------------------------------------------------------------------


def test_what_is_freed_is_free(models):
    """A page that a running sequence has frees nothing, until that ends; then the tree is what keeps it."""
    model = models("qwen3_moe")
    tree = tree_of(model)
    cache = compute(model, IDS[:256], tree=tree)[1]
    size = tree.nbytes
    assert size == cache.nbytes == 4 * 3 * cache.layers[0].pages.page_bytes
    assert tree.evict(1) == 0 and tree.nbytes == size
    held, _ = tree.lookup(IDS[:129])
    del cache
    gc.collect()
    assert tree.evict(1) == size // 4  # the last block
    assert tree.evict(GIB) == size // 4 and tree.nbytes == size // 2  # the two that `held` has stay
    del held
    assert tree.evict(GIB) == size // 2 and tree.nbytes == tree.blocks == 0
    assert tree.uses.evicted == 4


def test_the_least_recently_used_goes_first(models):
    model = models("qwen3_moe")
    tree = tree_of(model)
    others = [random_ids(1, 70, seed=seed)[0].tolist() for seed in range(4)]
    for ids in others:
        compute(model, ids, tree=tree)
    size = tree.nbytes // 4
    tree.lookup(others[0])
    assert tree.evict(2 * size) == 2 * size
    assert [tree.lookup(ids)[1] for ids in others] == [64, 0, 0, 64]
    tree.limit = size
    compute(model, IDS[:70], tree=tree)
    assert tree.nbytes == size and tree.lookup(IDS)[1] == 64
    tree.limit = size - 1
    tree.insert(IDS, compute(model, IDS[:70])[1])
    assert tree.nbytes == 0
    cache = compute(model, IDS)[1]
    assert tree.insert(IDS, cache) == 6 and tree.nbytes == 0  # though that frees nothing
    assert all(page.users == 1 for layer in cache.layers for page in layer.pages.tables[0])


def test_any_order_of_calls(models):
    """Nothing is lost or counted twice: sizes, users of pages, and blocks before others."""
    model, rng = models("gpt_oss"), random.Random(3)
    made = [compute(model, [*IDS[: 64 * cut], *random_ids(1, 130, seed=seed)[0].tolist()][:250], record=False)[1]
            for seed, cut in enumerate((0, 1, 2, 2, 3))]  # fmt: skip
    prompts = [[*IDS[: 64 * cut], *random_ids(1, 130, seed=seed)[0].tolist()][:250] for seed, cut in enumerate((0, 1, 2, 2, 3))]
    tree, running = tree_of(model), []
    for _ in range(300):
        which = rng.randrange(5)
        action = rng.choice(["insert", "insert", "lookup", "evict", "limit", "end", "clear"] if rng.random() < 0.9 else ["end"])
        if action == "insert":
            tree.insert(prompts[which], made[which])
        elif action == "lookup":
            cache, length = tree.lookup([*prompts[which], 3])
            assert (cache is None) == (length == 0)
            running.append(cache)
        elif action == "evict":
            before = tree.nbytes
            assert tree.evict(rng.randrange(1, 200_000)) <= before - tree.nbytes
        elif action == "limit":
            tree.limit = rng.choice([0, 100_000, GIB])
        elif action == "end" and running:
            running.pop(rng.randrange(len(running)))
        elif action == "clear" and rng.random() < 0.2:
            tree.clear()
        blocks = tree._blocks
        assert tree.nbytes == sum(block.nbytes for block in blocks.values())
        assert all(block.parent in blocks or block.parent == tree.key for block in blocks.values())
        order = {key: at for at, key in enumerate(blocks)}
        assert all(order[block.key] < order.get(block.parent, 1 << 30) for block in blocks.values())
        assert all(block.below == sum(other.parent == key for other in blocks.values()) for key, block in blocks.items())
    running.clear()
    tree.clear()
    for cache in made:
        assert all(page.users == 1 for layer in cache.layers for page in layer.pages.tables[0] if page)


def test_a_long_prompt_costs_little_where_all_is_known(models):
    """Inserting again looks blocks up; no layer is touched."""
    model = models("qwen3_moe")
    tree = tree_of(model)
    cache = compute(model, IDS, tree=tree)[1]
    users = [page.users for page in cache.layers[0].pages.tables[0]]
    assert tree.insert(IDS, cache) == 0 and tree.uses.inserted == 6
    assert [page.users for page in cache.layers[0].pages.tables[0]] == users


# --- the disk behind it ---------------------------------------------------------------------------------


@pytest.fixture
def on_disk(models, tmp_path):
    """Call with a family and one block's number: a fresh tree over the disk, where that block's file is at hand."""
    opened = []

    def make(name, number=0):
        disk = DiskBlocks(tmp_path, GIB, b"numbers")
        tree = tree_of(models(name), disk=disk)
        compute(models(name), IDS, tree=tree)
        assert disk.flush(30)
        opened.extend([disk, DiskBlocks(tmp_path, GIB, b"numbers", notify=lambda text: None)])
        key = [key for _, key, _ in tree._keys(IDS, 6)][number]
        return tree_of(models(name), disk=opened[-1]), path_of(tmp_path, b"numbers".hex(), key)

    yield make
    for disk in opened:
        disk.close()


@pytest.mark.parametrize("number", [0, 1, 3, 5])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "qwen3_next"])
def test_a_damaged_block_ends_the_prefix(models, on_disk, name, number):
    """And is computed and written again."""
    tree, path = on_disk(name, number)
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    cache, length = tree.lookup(IDS)
    assert length == (number // 2 * 128 if name == "qwen3_next" else number * PAGE)
    assert tree.disk.counts.refused == 1 and not path.exists()
    assert greedy(models(name), IDS, cache, length) == greedy(models(name), IDS)
    compute(models(name), IDS, tree=tree)
    assert tree.disk.flush(30) and path.exists() and tree.lookup(IDS)[1] == 384


def test_blocks_of_another_form_are_refused(models, on_disk, tmp_path):
    """Under the same key, which a fingerprint rules out: of another type, another family's, and what is no form at all."""
    on_disk("qwen3_moe")
    for model in (with_f16(models("qwen3_moe")), models("deepseek_v3")):
        tree = tree_of(model, disk=DiskBlocks(tmp_path, GIB, b"numbers", notify=lambda text: None))
        assert tree._caches.usable and tree.lookup(IDS) == (None, 0)
        assert tree.nbytes == 0 and tree.disk.counts.refused == 1
        on_disk("qwen3_moe")
    for changes in ({"layers": None}, {"layers": [[["f32"], True]] * 3}, {"states": [[5]]}, {"layers": [[None, 1]] * 3}):
        tree, path = on_disk("qwen3_moe")
        path.write_bytes(rewritten(path.read_bytes(), **changes))
        assert tree.lookup(IDS) == (None, 0) and not path.exists()


def with_f16(model):
    """The model as `paged_cache` sees it, with a cache in f16."""
    return type("Other", (), {
        "modules": lambda self: [view(module) for module in model.modules()], "config": model.config, "orig_module": model,
    })()  # fmt: skip


def view(module):
    """A module whose cache is f16, where it has one."""
    if not getattr(module, "computes_on_pages", False):
        return module
    names = ("layer_idx", "attending", "computes_on_pages")
    return type("View", (), {**{name: getattr(module, name) for name in names}, "cache_kind": "f16"})()


def test_what_is_written_does_not_change_meanwhile(models, tmp_path, monkeypatch):
    """The tree forgets a block that waits to be written, and its sequence goes back into it."""
    go, really, model = threading.Event(), block_files.write, models("qwen3_moe")
    monkeypatch.setattr(block_files, "write", lambda *args: (go.wait(30), really(*args))[1])
    disk = DiskBlocks(tmp_path, GIB, b"numbers")
    tree = tree_of(model, disk=disk)
    cache = compute(model, IDS[:130], tree=tree)[1]
    assert tree.evict(GIB) == 0  # the queue has them
    tree.clear()
    cache.crop(-100)
    compute(model, [*IDS[:30], *IDS[200:300]], cache)
    go.set()
    assert disk.flush(30)
    tree = tree_of(model, disk=disk)
    assert greedy(model, IDS[:130], *tree.lookup(IDS[:130])) == greedy(model, IDS[:130])
    del cache
    tree._settle()
    assert tree.evict(GIB) == tree.nbytes + 2 * 3 * paged_bytes(model)
    disk.close()


def paged_bytes(model):
    return compute(model, IDS[:1])[1].layers[0].pages.page_bytes


def test_a_disk_that_fails_costs_nothing(models, tmp_path):
    (tmp_path / "file").write_text("")
    disk = DiskBlocks(tmp_path / "file", GIB, b"numbers", notify=lambda text: None)
    tree = tree_of(models("gpt_oss"), disk=disk)
    compute(models("gpt_oss"), IDS, tree=tree)
    assert disk.flush(30) and disk.counts.failed and not disk.takes
    size = tree.nbytes
    assert tree.lookup(IDS)[1] == 384 and tree.evict(GIB) == size
    disk.close()


def test_prefixes_survive_in_the_order_of_their_use(models, tmp_path):
    """What the disk keeps is the beginnings, since a block without those before it is of no use."""
    model = models("qwen3_moe")
    disk = DiskBlocks(tmp_path, GIB, b"numbers")
    tree = tree_of(model, disk=disk)
    compute(model, IDS, tree=tree)
    disk.close()
    small = DiskBlocks(tmp_path, disk.nbytes // 2, b"numbers")
    assert small.flush(30) and tree_of(model, disk=small).lookup(IDS)[1] == 192
    small.close()
