"""The parent's side of a peer: start it, ask it, keep it stopped while another measures.

A stopped process (SIGSTOP) cannot spin: OpenMP's and upstream's workers do, for milliseconds to forever after a call. What a peer
would have burnt is measured once, before it is first stopped.
"""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from tests.bench.peers import environment

PATIENCE = 900.0  # seconds without an answer


class Gone(Exception):
    """The peer answered with a reason, or ended."""


def environ(peer: str, isa: str, threads: int, huge: bool) -> dict[str, str]:
    """The child's environment. `isa`: as KT_ISA names it; peers below AVX-512 are told in their own words."""
    out = dict(os.environ, OMP_NUM_THREADS=str(threads), KT_THREADS=str(threads), PYTHONUNBUFFERED="1")
    out.pop("KT_ISA", None)
    if huge:  # every peer's malloc alike: what one of them asks of the kernel by itself is no difference of kernels
        out["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    if peer == "ours" and isa:
        out["KT_ISA"] = isa
    if peer.startswith("llama"):
        out["KT_PEER_GGML"] = str(environment.ggml_folder(isa))
    if isa in ("avx2", "avx_vnni"):
        out["KT_KERNEL_CPU_VARIANT"] = "avx2"
        out["ATEN_CPU_CAPABILITY"] = "avx2"
        out["ONEDNN_MAX_CPU_ISA"] = "AVX2" if isa == "avx2" else "AVX2_VNNI"
    if isa == "avx2":
        for name in ("GPTQ_INT4", "RAWINT4", "MXFP4", "MXFP8"):
            out[f"KT_{name}_BACKEND"] = "avx2"
    return out


class Child:
    """One peer's process. `name`: ours, llama, llama-repack, upstream or torch."""

    def __init__(self, name: str, isa: str, threads: int, huge: bool, folder: pathlib.Path) -> None:
        module, *extra = {"llama-repack": ["llama", "repack"], "torch": ["torch_bf16"]}.get(name, [name])
        interpreter = sys.executable if name in ("ours", "torch") else environment.python()
        ours, theirs = socket.socketpair()
        self.log = folder / f"{name}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [interpreter, "-m", f"tests.bench.peers.{module}", str(theirs.fileno()), *extra],
                pass_fds=[theirs.fileno()], stdout=log, stderr=log, cwd=environment.ROOT,
                env=environ(name, isa, threads, huge),
            )  # fmt: skip
        theirs.close()
        self.pipe = Connection(ours.detach())
        self.name, self.stopped, self.idle, self.watched = name, False, 0.0, False

    def ask(self, *request: Any, patience: float = PATIENCE) -> Any:
        """The answer to a request, the process running meanwhile. Raises Gone; the process has ended then."""
        self.resume()
        try:
            self.pipe.send(request)
            if not self.pipe.poll(patience):
                raise Gone(f"no answer to {request[0]} in {patience:.0f} s")
            status, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.wait()
            raise Gone(self._last_words()) from None
        if status != "ok":
            raise Gone(answer)
        return answer

    def _last_words(self) -> str:
        code = self.process.returncode
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{how}: {lines[-1][:160]}" if lines else how

    def cpu(self) -> float:
        """CPU seconds of all its threads so far."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def watch_idle(self, seconds: float = 0.5) -> None:
        """Measure the cores that it burns with nothing to do, soon after a call."""
        self.watched = True
        time.sleep(0.1)
        before = self.cpu()
        time.sleep(seconds)
        self.idle = (self.cpu() - before) / seconds

    def huge_share(self) -> float:
        """Share of its memory that lies in huge pages."""
        text = pathlib.Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:] if "kB" in line}
        return kib.get("AnonHugePages", 0) / max(1, kib.get("Rss", 1))

    def stop(self) -> None:
        if not self.stopped and self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP)
            self.stopped = True

    def resume(self) -> None:
        if self.stopped and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
        self.stopped = False

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


def busy_seconds() -> float:
    """CPU seconds of the whole machine so far."""
    fields = [int(v) for v in pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _, _, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
