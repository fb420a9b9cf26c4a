"""What the system says is read from both versions of cgroups, and from systems that say less."""

import pytest

from ktransformers.machine import system

MEMINFO = "MemTotal:       67108864 kB\nMemFree:        1000 kB\nMemAvailable:   50331648 kB\n"
GIB = 1 << 30


@pytest.fixture
def root(tmp_path):
    def write(**files):
        for path, text in files.items():
            path = tmp_path / path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    write(**{"proc/meminfo": MEMINFO})
    return write


def test_memory_without_limits(root):
    assert system.memory(root()) == (64 * GIB, 48 * GIB)


def test_memory_within_the_second_version_of_cgroups(root):
    """The tightest of the limits on the way up counts; cached pages of files do not."""
    top = "sys/fs/cgroup"
    here = root(**{
        "proc/self/cgroup": "0::/a/b\n",
        f"{top}/a/memory.max": f"{16 * GIB}\n", f"{top}/a/memory.current": f"{10 * GIB}",
        f"{top}/a/memory.stat": f"anon 5\ninactive_file {4 * GIB}\n",
        f"{top}/a/b/memory.max": "max\n", f"{top}/a/b/memory.current": "5",
    })  # fmt: skip
    assert system.memory(here) == (16 * GIB, 10 * GIB)


def test_memory_within_the_first_version_of_cgroups(root):
    top = "sys/fs/cgroup/memory"
    here = root(**{
        "proc/self/cgroup": "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n0::/\n",
        f"{top}/docker/1/memory.limit_in_bytes": f"{8 * GIB}", f"{top}/docker/1/memory.usage_in_bytes": f"{9 * GIB}",
        f"{top}/memory.limit_in_bytes": "9223372036854771712",
    })  # fmt: skip
    assert system.memory(here) == (8 * GIB, 0)


def test_a_container_that_sees_its_own_cgroup_as_the_top(root):
    here = root(**{
        "proc/self/cgroup": "0::/system.slice/of/the/host\n",
        "sys/fs/cgroup/memory.max": f"{4 * GIB}", "sys/fs/cgroup/cpu.max": "150000 100000",
    })  # fmt: skip
    assert system.memory(here) == (4 * GIB, 4 * GIB) and system.cpu_quota(here) == 1.5


def test_cpu_quota_of_the_first_version(root):
    top = "sys/fs/cgroup/cpu,cpuacct"
    here = root(**{
        "proc/self/cgroup": "3:cpu,cpuacct:/x\n",
        f"{top}/x/cpu.cfs_quota_us": "-1", f"{top}/x/cpu.cfs_period_us": "100000",
        f"{top}/cpu.cfs_quota_us": "200000", f"{top}/cpu.cfs_period_us": "100000",
    })  # fmt: skip
    assert system.cpu_quota(here) == 2.0


def test_names_nodes_and_settings(root):
    node = "sys/devices/system/node"
    cache = "sys/devices/system/cpu/cpu0/cache"
    here = root(**{
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n",
        f"{node}/node0/cpulist": "0-3\n", f"{node}/node1/cpulist": "4-7\n", f"{node}/node2/cpulist": "\n",
        f"{cache}/index0/size": "32K\n", f"{cache}/index3/size": "98304K\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
    })  # fmt: skip
    assert system.cpu_name(here) == "Some CPU @ 3 GHz" and system.numa_nodes(here) == 2
    assert system.last_level_cache(here) == 96 << 20 and system.huge_pages(here) == "never"


def test_a_system_that_says_nothing(tmp_path):
    assert system.cpu_name(tmp_path) and system.numa_nodes(tmp_path) == 1 and system.huge_pages(tmp_path) == ""
    total, available = system.memory(tmp_path)
    assert total == available > 0 and system.cpu_quota(tmp_path) is None
    assert system.last_level_cache(tmp_path) == 32 << 20


def test_the_peak_is_this_process_own_and_not_that_of_who_started_it(root):
    here = root(**{"proc/self/status": "Name:\tkt\nVmHWM:\t    2048 kB\nVmRSS:\t 1024 kB\n"})
    assert system.peak_memory(here) == 2 << 20
    assert system.peak_memory() > 10 << 20
