"""What the operating system says about this machine: names, cores, memory, NUMA nodes, and the limits of its cgroup.

Linux has it in /proc and /sys; elsewhere the answers are fewer. Every function reads small files below `root` (`/`
outside tests) when called, and measures nothing.
"""

import os
import platform
import re
import sys
from pathlib import Path

ROOT = Path("/")


def _read(path: Path) -> str:
    """The file's text, "" where there is none: kernels and containers differ in what they show."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def cpu_name(root: Path = ROOT) -> str:
    """The processor's own name, or its architecture where it has none."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine() or "unknown processor"


def affinity() -> int:
    """Hardware threads that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def numa_nodes(root: Path = ROOT) -> int:
    """NUMA nodes that have processors; 1 where the system does not say."""
    nodes = (root / "sys/devices/system/node").glob("node[0-9]*")
    return sum(bool(_read(node / "cpulist")) for node in nodes) or 1


def last_level_cache(root: Path = ROOT) -> int:
    """Bytes of the largest cache that one processor sees; 32 MiB where the system does not say."""
    sizes = [_read(path) for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if re.fullmatch(r"\d+K", size)), default=32 << 20)


def huge_pages(root: Path = ROOT) -> str:
    """The setting of transparent huge pages: "always", "madvise", "never", or "" where there is none."""
    found = re.search(r"\[(\w+)\]", _read(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    return found[1] if found else ""


# ---- memory ------------------------------------------------------------------------------------------------


def memory(root: Path = ROOT) -> tuple[int, int]:
    """(total, available) bytes of RAM within what this process' cgroup and those around it grant."""
    total, available = _system_memory(root)
    for limit, used in _memory_limits(root):
        if 0 < limit < total:
            total = limit
        available = min(available, max(0, limit - used))
    return total, min(total, available)


def peak_memory(root: Path = ROOT) -> int:
    """Bytes that this process had in RAM at most, pages of mapped files with them; 0 where the system does not say."""
    if found := re.search(r"^VmHWM:\s*(\d+) kB", _read(root / "proc/self/status"), re.MULTILINE):
        return int(found[1]) << 10  # getrusage's begins with what the parent held when it forked
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def _system_memory(root: Path) -> tuple[int, int]:
    text = _read(root / "proc/meminfo")
    found = {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    total = found.get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, found.get("MemAvailable", total)


def _memory_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used) bytes of this process' cgroup and of those around it. Cached file pages do not count as used."""
    limits = []
    for folder in _cgroup_folders(root, "memory"):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            bytes_ = _number(_read(folder / limit))
            if bytes_ is not None:
                found = re.search(rf"^{cached} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
                taken = _number(_read(folder / used)) or 0
                limits.append((bytes_, max(0, taken - int(found[1] if found else 0))))
    return limits


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time that the cgroup and those around it grant, or None without a limit."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if (_number(quota) or 0) > 0 and (_number(period) or 0) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """This process' cgroup and those around it, innermost first, in both versions of the file system.

    In a container the path in /proc may not exist; the mount's top is then its own cgroup.
    """
    folders: list[Path] = []
    top = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        mounts = [top / controllers, top / controller] if controllers else [top, top / "unified"]
        for mount in mounts:
            folder = mount / path.lstrip("/")
            if not mount.is_dir():
                continue
            while not folder.is_dir() and folder != mount:
                folder = folder.parent
            folders += [parent for parent in (folder, *folder.parents) if parent == mount or mount in parent.parents]
    return list(dict.fromkeys(folders))
