"""Pools and queues: where threads run, how many, forks, Ctrl-C, sizes that change, calls in order."""

import ctypes
import gc
import itertools
import os
import re
import shutil
import subprocess
import sysconfig
import threading
import time
from pathlib import Path

import pytest
import torch

from ktransformers import env, native
from ktransformers.errors import KTransformersError, NativeError
from tests.native.blocks import random_weight
from tests.native.test_native import ROOT, call, experts, python, rng

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="C library not built"),
    pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="thread placement is for Linux"),
]
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
two_cores = pytest.mark.skipif(native.available() and native.default_threads() < 2, reason="needs two cores")


@pytest.fixture(autouse=True)
def _restore():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("KT_THREADS", "KT_PIN", "KT_NUMA"):
            patch.delenv(name, raising=False)
        yield
        native.set_threads(None)


def run(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter, after some imports; it must end well. Returns what it printed."""
    imports = """
import ctypes, gc, os, signal, sys, threading, time, torch
from ktransformers import native
from tests.native.test_native import call, experts
"""
    clean = dict.fromkeys(("KT_THREADS", "KT_PIN", "KT_NUMA"), "")
    done = python(imports + code, **{**clean, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- how many threads, and where ---------------------------------------------------------------------------


def test_kt_pin_and_kt_numa(monkeypatch):
    """Both variables are typed, and what they cannot mean is an error that names them."""
    assert env.pin() and env.numa() is None
    monkeypatch.setenv("KT_PIN", "0")
    monkeypatch.setenv("KT_NUMA", "0-3, 8 ; 4-7")
    assert not env.pin() and env.numa() == "0-3,8;4-7"
    for name, read, bad in (
        ("KT_PIN", env.pin, ("2", "yes")),
        ("KT_NUMA", env.numa, ("0-", ";", "0;", "a", "0:1", "99999")),
    ):
        for value in bad:
            monkeypatch.setenv(name, value)
            with pytest.raises(KTransformersError, match=rf"^{name}=.*expected"):
                read()


def test_affinity_limits_the_default():
    """A process that may use one CPU has one thread; one that may use fewer than the machine has no more than those."""
    for allowed in ({CPUS[0]}, set(CPUS[:2])):
        out = run(f"os.sched_setaffinity(0, {allowed}); print(native.default_threads(), native.threads())")
        default, threads = map(int, out.split())
        assert default == threads <= len(allowed)


MASKS = """
def masks():
    me = threading.get_native_id()
    return {int(t): os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task") if int(t) != me}
torch.set_num_threads(1)
e, c = experts(), call(40)
def settle():
    for i in range(20): e(*c); time.sleep(0.005)  # a worker that starts late binds itself late
others, mine = set(masks()), os.sched_getaffinity(0)
"""


@two_cores
def test_workers_of_a_full_pool_are_bound():
    """As many threads as cores: each worker has a core of its own, apart from the caller's; the caller keeps its mask."""
    out = run(
        MASKS
        + "settle(); print([sorted(m) for t, m in masks().items() if t not in others], os.sched_getaffinity(0) == mine)"
    )
    workers, same = re.fullmatch(r"(\[.*\]) (\w+)", out.strip()).groups()
    workers = eval(workers)
    assert same == "True" and len(workers) == native.default_threads() - 1
    seen = [cpu for worker in workers for cpu in worker]
    assert len(seen) == len(set(seen)) < len(CPUS), "workers share a core, or none is left for the caller"


def test_other_pools_are_not_bound():
    """With more threads than cores, or with KT_PIN=0, workers may run wherever the process may."""
    code = MASKS + "settle(); print(all(m == mine for t, m in masks().items() if t not in others))"
    assert run(code, KT_THREADS="7").strip() == "True"
    assert run(code, KT_PIN="0").strip() == "True"


@two_cores
def test_workers_stay_on_their_node():
    """On several nodes a worker of a pool that is not full may use its node's CPUs only."""
    code = MASKS + "settle(); print(sorted({tuple(m) for t, m in masks().items() if t not in others}))"
    out = run(code, KT_NUMA=f"{CPUS[0]};{CPUS[1]}", KT_THREADS="6")
    assert eval(out) == [(CPUS[0],), (CPUS[1],)]


def test_idle_pools_sleep():
    """A pool and a queue that have nothing to do take no processor time."""
    used = run("""
torch.set_num_threads(1)
e, c = experts(), call(40)
q, out = native.Queue(), torch.empty_like(c[0])
e(*c); q.submit(e, *c, out); q.sync()
time.sleep(0.1)
before = time.process_time(); time.sleep(0.5); print(time.process_time() - before)
""")
    assert float(used) < 0.05


# ---- made-up machines --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def topology(tmp_path_factory):
    """Run native/test/topology.c on a folder of made-up files; returns its lines."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    if not shutil.which(compiler[0]):
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("topology")
    sources = [str(ROOT / "native" / f) for f in ("test/topology.c", "src/threads/topology.c")]
    subprocess.run([*compiler, "-std=gnu11", "-O1", *sources, "-o", str(folder / "program")], check=True)

    def run(files: dict[str, str], nodes: str | None = None) -> dict[str, list[tuple[int, ...]]]:
        root = tmp_path_factory.mktemp("root")
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        command = [str(folder / "program"), str(root), *([nodes] if nodes is not None else [])]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        found: dict[str, list[tuple[int, ...]]] = {"core": []}
        for line in lines:
            found.setdefault(line.split()[0], []).append(tuple(map(int, re.findall(r"\d+", line))))
        return found

    return run


NO_LIMIT = 2**31 - 1
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu"
CGROUPS = {
    "none": ({}, NO_LIMIT),
    "v2 without a limit": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/cpu.max": "max 100000\n"}, NO_LIMIT),
    "v2": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/cpu.max": "300000 100000\n"}, 3),
    "v2 rounds up": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/cpu.max": "150000 100000\n"}, 2),
    "v2 below one": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/cpu.max": "5000 100000\n"}, 1),
    "v2 nested: a parent's": (
        {
            "proc/self/cgroup": "0::/user.slice/run-1.scope/x\n",
            f"{V2}/user.slice/cpu.max": "400000 100000\n",
            f"{V2}/user.slice/run-1.scope/cpu.max": "max 100000\n",
            f"{V2}/user.slice/run-1.scope/x/cpu.max": "900000 100000\n",
        },
        4,
    ),
    "v2 in a container: its own is the mount": (
        {"proc/self/cgroup": "0::/docker/0123\n", f"{V2}/cpu.max": "200000 100000\n"},
        2,
    ),
    "v2 outside the namespace": ({"proc/self/cgroup": "0::/../../x\n", f"{V2}/cpu.max": "200000 100000\n"}, 2),
    "v1": (
        {
            "proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/a/b\n0::/\n",
            f"{V1},cpuacct/a/cpu.cfs_quota_us": "250000\n",
            f"{V1},cpuacct/a/cpu.cfs_period_us": "100000\n",
            f"{V1},cpuacct/a/b/cpu.cfs_quota_us": "-1\n",
            f"{V1},cpuacct/a/b/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "v1 by its link": (
        {
            "proc/self/cgroup": "4:cpuacct,cpu:/a\n",
            f"{V1}/a/cpu.cfs_quota_us": "100000\n",
            f"{V1}/a/cpu.cfs_period_us": "50000\n",
        },
        2,
    ),
    "nonsense": ({"proc/self/cgroup": "x\n:\n0:\n0::/a\n1:cpux:/a\n", f"{V2}/a/cpu.max": "many 100000\n"}, NO_LIMIT),
    "zero period": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/cpu.max": "100000 0\n"}, NO_LIMIT),
    "very long": ({"proc/self/cgroup": "0::/" + "a/" * 3000 + "\n", f"{V2}/cpu.max": "100000 100000\n"}, 1),
}


@pytest.mark.parametrize("case", CGROUPS)
def test_cgroups(topology, case):
    """The least quota of the group and those above it counts, in both versions; what cannot be read does not."""
    files, expected = CGROUPS[case]
    found = topology(files)
    assert found["cgroup"] == [(expected,)]
    assert found["cores"][0][0] == min(expected, len(found["core"]))


@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
def test_made_up_nodes(topology):
    """Nodes come from /sys, with gaps, empty nodes and missing files; siblings are one core; affinity filters."""
    first, second = CPUS[:2]
    node, siblings = (
        "sys/devices/system/node/node{}/cpulist",
        "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list",
    )
    flat = topology({})
    assert [n for _, n in flat["core"]] == [0] * len(CPUS)
    one = topology({node.format(0): f"{second}\n", node.format(2): "\n", node.format(10): f"{first},x\n"})
    assert one["core"] == flat["core"], "CPUs of an unreadable node belong to the last readable one"
    two = topology({node.format(0): f"{second},4000\n", node.format(1): "4001-4005\n", node.format(10): f"{first}\n"})
    assert two["core"][:2] == [(second, 0), (first, 1)]
    one = topology({siblings.format(c): f"{first},{second}\n" for c in (first, second)})
    assert len(one["core"]) == len(CPUS) - 1
    made_up = topology({}, "0-1;5000,5002-5003")
    assert made_up["core"] == [(0, 0), (1, 0), (5000, 1), (5002, 1), (5003, 1)]
    for bad in ("", "0-", "0;", ";0", "3-1", "0,", "-1", "0 1", "8192", ";".join("0" * 65)):
        assert topology({}, bad)["status"] != [(0,)]


def test_pools_share_out_their_threads():
    """Threads go to nodes by their cores, unevenly where the nodes are uneven; bad arguments are named."""
    for numa, threads, nodes in (
        ("0;1", 2, [1, 1]),
        ("0-1;2-5", 6, [2, 4]),
        ("0-1;2-5", 3, [1, 2]),
        ("0-9;10", 4, [4, 0]),
    ):
        pool = native.Pool(threads, numa=numa)
        assert (pool.threads, pool.nodes) == (threads, nodes)
    pool.resize(11)
    assert (pool.threads, pool.nodes) == (11, [10, 1])
    assert native.Pool().threads == native.default_threads()
    assert native.Pool(numa="0-900").threads == native.default_threads()
    for bad in (0, -1, 1.5, 1025):
        with pytest.raises(NativeError, match="^Pool .threads.: found"):
            native.Pool(bad)
        with pytest.raises(NativeError, match="^Pool.resize: found"):
            pool.resize(bad)
    for bad in ("0-", "x", 3):
        with pytest.raises(NativeError, match=r"numa|threads on"):
            native.Pool(2, numa=bad)


def test_nodes_do_not_change_the_bits():
    """Simulated nodes with uneven shares give the result of one thread, bit for bit, decode and prefill."""
    e = experts(("Q4_K", "Q8_0", "Q6_K"), inner=512)
    for tokens in (1, 40):
        c = call(tokens)
        native.set_threads(1)
        expected = e(*c)
        for numa, threads in (("0;1", 2), ("0-1;2-5", 6), ("0-4;5;6-8", 9), ("0-9;10", 3)):
            queue, out = native.Queue(native.Pool(threads, numa=numa)), torch.empty_like(expected)
            queue.submit(e, *c, out)
            queue.sync()
            assert torch.equal(out, expected), (numa, threads, tokens)


def test_place_reads_every_page(tmp_path):
    """Experts.place brings every page of a mapped file into the process, on any number of nodes."""
    r, size = rng(), (2048, 1024)
    weights = [random_weight(r, "Q8_0", *size) for _ in range(3)]
    path = tmp_path / "weights"
    path.write_bytes(b"".join(w.data.numpy().tobytes() for w in weights))
    nbytes = weights[0].data.numel()
    for numa in ("0", "0;1", "0-1;2-5;6"):
        mapped = torch.from_file(str(path), shared=False, size=3 * nbytes, dtype=torch.uint8)
        packed = [type(w)(part, w.type, w.shape) for w, part in zip(weights, mapped.split(nbytes), strict=True)]
        packed[2] = type(packed[2])(packed[2].data, packed[2].type, size[::-1])
        e = native.Experts(*([p] for p in packed))
        before = resident(mapped.data_ptr())
        e.place(native.Pool(4, numa=numa))
        e.place()
        assert before < resident(mapped.data_ptr()) >= 3 * nbytes // 1024 - 4
        del e, packed, mapped


def resident(address: int) -> int:
    """KiB in memory of the mapping that begins at an address."""
    smaps = Path("/proc/self/smaps").read_text()
    return int(re.search(rf"^0*{address:x}-.*?\nRss: +(\d+) kB", smaps, re.MULTILINE | re.DOTALL).group(1))


# ---- forks, Ctrl-C, sizes that change ----------------------------------------------------------------------


def test_fork_before_and_after():
    """Parent and child both compute after a fork, whatever they computed before it, pinned to nodes or not."""
    run(
        """
torch.set_num_threads(1)
e, c = experts(), call(40)
for used_before in (False, True):
    pool = native.Pool(3)
    q, out = native.Queue(pool), torch.empty_like(c[0])
    if used_before:
        q.submit(e, *c, out); q.sync(); expected = out.clone()
    pid = os.fork()
    q.submit(e, *c, out); q.sync(); y = e(*c)
    if pid == 0:
        pool.resize(2)
        os._exit(0 if torch.equal(out, y) and torch.equal(e(*c), y) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert torch.equal(out, y) and (not used_before or torch.equal(y, expected))
""",
        KT_NUMA="0;1-2",
    )


def test_fork_with_calls_pending():
    """A child computes what was pending when it was forked, and so does the parent."""
    run("""
torch.set_num_threads(1)
e, c = experts(), call(200)
expected = e(*c)
q = native.Queue()
for i in range(5):
    outs = [torch.zeros_like(c[0]) for _ in range(20)]
    for out in outs: q.submit(e, *c, out)
    pid = os.fork()
    q.sync()
    good = all(torch.equal(out, expected) for out in outs)
    if pid == 0: os._exit(0 if good else 1)
    assert good and os.waitpid(pid, 0)[1] == 0
""")


@pytest.mark.parametrize("what", ["call", "queue"])
def test_ctrl_c_during_a_long_call(what):
    """The call ends, Python raises KeyboardInterrupt, and the next call works."""
    run(f"""
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
e, c = experts(), call(400)
expected = e(*c)
q, x = native.Queue(), (c[0].repeat(400, 1), c[1].repeat(400, 1), c[2].repeat(400, 1))
out = torch.empty_like(x[0])
def long():
    if {what!r} == "call": e(*x)
    else: q.submit(e, *x, out); q.sync()
began = time.perf_counter(); long(); took = time.perf_counter() - began
for i in range(3):
    threading.Timer(took / 4, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        long(); time.sleep(10)
        sys.exit("not interrupted")
    except KeyboardInterrupt: pass
    q.sync()
    assert torch.equal(e(*c), expected)
""")


def test_resize_during_calls():
    """Pools change size under concurrent calls and queues; every answer stays right."""
    native.set_threads(2)
    e, c = experts(), call(9)
    expected, wrong, stop = e(*c), [], threading.Event()
    pools = [native.Pool(n) for n in (1, 3)]

    def direct():
        while not stop.is_set():
            wrong.extend([1] * (not torch.equal(e(*c), expected)))

    def queued(pool):
        queue = native.Queue(pool)
        while not stop.is_set():
            outs = [torch.empty_like(expected) for _ in range(5)]
            for out in outs:
                queue.submit(e, *c, out)
            queue.sync()
            wrong.extend([1] * (not all(torch.equal(out, expected) for out in outs)))

    crowd = [threading.Thread(target=direct) for _ in range(2)]
    crowd += [threading.Thread(target=queued, args=(pool,)) for pool in (*pools, None)]
    for t in crowd:
        t.start()
    for i in range(60):
        native.set_threads(1 + i % 4)
        pools[i % 2].resize(1 + i % 3)
        time.sleep(0.002)
    stop.set()
    for t in crowd:
        t.join()
    assert not wrong


# ---- the queue ---------------------------------------------------------------------------------------------


def test_queue_computes_in_order():
    """Calls run one after the other: each reads what the one before wrote. allow_pending leaves the newest."""
    linear = native.Linear(random_weight(rng(), "F32", 64, 64))
    chain = [torch.randn(3, 64)] + [torch.empty(3, 64) for _ in range(30)]
    queue = native.Queue()
    for x, y in itertools.pairwise(chain):
        queue.submit_linear(linear, x, y)
    queue.sync(allow_pending=3)
    assert torch.equal(chain[10], linear(chain[9]))
    queue.sync()
    for x, y in itertools.pairwise(chain):
        assert torch.equal(y, linear(x))
    queue.sync()
    queue.sync(allow_pending=100)
    assert not queue._submitted


def test_queue_keeps_arguments_alive():
    """Weights, experts and inputs that Python has let go of stay until their call is done."""
    c = call(40)
    native.set_threads(2)
    expected, queue = experts()(*c), native.Queue()
    outs = [torch.empty_like(expected) for _ in range(20)]
    for out in outs:
        queue.submit(experts(), c[0].clone(), c[1].int(), c[2].double(), out)
    gc.collect()
    queue.sync()
    assert all(torch.equal(out, expected) for out in outs) and not queue._submitted


def test_queue_errors():
    """What does not fit is refused at once; what the library refuses is told at the next sync, once, by name."""
    e, (x, ids, w) = experts(), call()
    queue, out = native.Queue(), torch.empty(7, 512)
    bad = [
        (x, ids, w, out[:6]), (x, ids, w, out.half()), (x, ids, w, torch.empty(512, 7).T), (x, ids, w, None),
        (x, ids, w, x), (x, ids, w, out.to("meta")), (x, ids.float(), w, out), (x[:, 1:], ids, w, out),
    ]  # fmt: skip
    for arguments in bad:
        with pytest.raises(NativeError, match=r"^experts.*expected"):
            queue.submit(e, *arguments)
    with pytest.raises(NativeError, match="expected Experts"):
        queue.submit(None, x, ids, w, out)
    with pytest.raises(NativeError, match="expected Linear"):
        queue.submit_linear(e, x, out)
    with pytest.raises(NativeError, match="expected a whole number"):
        queue.sync(-1)
    with pytest.raises(NativeError, match="expected a Pool"):
        native.Queue(3)

    state = native.library.loaded()
    _, broken, keep = queue._experts_call(e, x, ids, w, out)
    broken.dtype = 7
    queue.submit(e, x, ids, w, out)
    queue._submit("blk.9", broken, keep)
    queue._submit("blk.10", broken, keep)
    after = torch.empty_like(out)
    queue.submit(e, x, ids, w, after)
    with pytest.raises(NativeError, match=r"^blk\.9: activation dtype"):
        queue.sync()
    queue.sync()
    assert torch.equal(after, e(x, ids, w)) and state.lib.kt_queue_done(queue._queue) == 4

    queue.close()
    queue.close()
    for use in (queue.sync, queue.host_sync, lambda: queue.submit(e, x, ids, w, out)):
        with pytest.raises(NativeError, match="closed"):
            use()


def test_host_functions():
    """What cudaLaunchHostFunc is given: plain functions that submit and wait, run as often as one likes."""
    e, c = experts(), call(5)
    queue, out = native.Queue(), torch.empty(5, 512)
    submit, sync = queue.host_submit(e, *c, out), queue.host_sync()
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    for scale in (1.0, 2.0, 0.5):
        c[0].mul_(scale)
        function(submit.function)(submit.argument)
        function(sync.function)(sync.argument)
        assert torch.equal(out, e(*c))
    queue.sync()
    with pytest.raises(NativeError, match=r"\(ids\).*int32.*expected torch.int64"):
        queue.host_submit(e, c[0], c[1].int(), c[2], out)
    with pytest.raises(NativeError, match=r"\(hidden\).*contiguous=False"):
        queue.host_submit(e, c[0].T.contiguous().T, c[1], c[2], out)


@pytest.mark.parametrize("how", ["sync", "host function"])
def test_closing_wakes_who_waits(how):
    """A thread that waits for calls which are dropped is woken with an error, and has left when close returns."""
    e, x = experts(), call(2000)
    queue, heard = native.Queue(native.Pool(1)), []
    for _ in range(200):
        queue.submit(e, *x, torch.empty_like(x[0]))
    wait = queue.host_sync()

    def waiter():
        if how == "sync":
            with pytest.raises(NativeError, match=r"^queue.*closed before"):
                queue.sync()
        else:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(wait.function)(wait.argument)
        heard.append(how)

    threads = [threading.Thread(target=waiter, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)  # whoever comes late finds the queue closed
    queue.close()
    for thread in threads:
        thread.join(timeout=60)
    assert heard == [how] * 3


def test_a_closed_queue_under_host_functions():
    """What a stream still holds may run after the queue was closed, and after Python has let go of it: nothing happens."""
    e, c = experts(), call(5)
    queue, out = native.Queue(), torch.zeros(5, 512)
    submit, sync = queue.host_submit(e, *c, out), queue.host_sync()
    queue.close()
    del queue
    gc.collect()
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    for _ in range(3):
        function(submit.function)(submit.argument)
        function(sync.function)(sync.argument)
    assert not out.any()


def test_host_functions_want_pinned_memory(monkeypatch):
    """Where there is a CUDA device, all four tensors must be pinned; without one nothing is asked."""
    e, c, out = experts(), call(5), torch.empty(5, 512)
    queue = native.Queue()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    queue.host_submit(e, *c, out)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor is out)
    with pytest.raises(NativeError, match=r"^experts.*\(hidden, ids, weights\): found memory that is not pinned"):
        queue.host_submit(e, *c, out)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    queue.host_submit(e, *c, out)


def test_several_pools_and_models():
    """Queues of several pools and models work side by side; closing one with calls pending leaves the others be."""
    models = [experts(("Q4_K",) * 3), experts(("Q8_0",) * 3), experts(("BF16",) * 3)]
    c = call(30)
    expected = [e(*c) for e in models]
    queues = [native.Queue(native.Pool(2)), native.Queue(native.Pool(1)), native.Queue()]
    outs = [[torch.zeros_like(c[0]) for _ in range(20)] for _ in models]
    for i in range(20):
        for queue, e, out in zip(queues, models, outs, strict=True):
            queue.submit(e, *c, out[i])
    queues[0].close()
    for queue, want, out in list(zip(queues, expected, outs, strict=True))[1:]:
        queue.sync()
        assert all(torch.equal(o, want) for o in out)
    del queues, queue
    gc.collect()


def test_exit_with_calls_pending():
    """A program that ends without waiting ends well, with and without its queue in a global variable."""
    for keep in ("q = ", ""):
        run(f"""
e, c = experts(), call(200)
outs = [torch.empty_like(c[0]) for _ in range(50)]
def start():
    q = native.Queue(native.Pool(2))
    for out in outs: q.submit(e, *c, out)
    return q
{keep}start()
""")


def test_threads_are_started_by_use_only():
    """Pools and queues that are made but not used have no thread."""
    run("""
before = len(os.listdir("/proc/self/task"))
pools = [native.Pool(), native.Pool(4)]
queues = [native.Queue(), native.Queue(pools[0])]
queues[0].sync()
assert len(os.listdir("/proc/self/task")) == before
""")
