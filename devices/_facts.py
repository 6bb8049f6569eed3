"""What can be read about this machine without special rights, from the kernel's files (root path injectable)."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CPU = "sys/devices/system/cpu/cpu0/cpufreq"


def facts(root: Path = Path("/")) -> dict[str, str]:
    """Processor, cores, memory, system … as text; what cannot be read is left out."""
    cpuinfo = _read(root / "proc/cpuinfo")
    found = {
        "name": platform.node(),
        "processor": _processor(root, cpuinfo),
        "machine": platform.machine(),
        "cores": str(len(available_cores())),
        "memory": _memory(root),
        "system": _system(root),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "governor": _read(root / CPU / "scaling_governor"),
        "frequency": _frequency(root),
        "virtualization": _virtualization(root, cpuinfo),
        "load": load_average(),
    }
    return {key: value for key, value in found.items() if value}


def available_cores() -> Sequence[int]:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def load_average() -> str:
    """One-minute load average as text, empty where there is none."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""


def stolen_ticks(root: Path = Path("/")) -> tuple[int, int] | None:
    """Ticks the hypervisor gave to others, and all ticks, summed over cores; None where the kernel does not say."""
    fields = _read(root / "proc/stat").partition("\n")[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return None
    ticks = [int(field) for field in fields[1:9]]
    return ticks[7], sum(ticks)


def involuntary_switches() -> int | None:
    """How often this process was taken off its core, None where the system does not count."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@dataclass(frozen=True)
class Surroundings:
    """Counters of the system around a measurement."""

    load: str
    stolen: tuple[int, int] | None
    switches: int | None

    @classmethod
    def now(cls) -> Surroundings:
        return cls(load_average(), stolen_ticks(), involuntary_switches())

    def until_now(self) -> dict[str, float | int | None]:
        """What happened since, for a profile's conditions."""
        after = Surroundings.now()
        steal = switches = None
        if self.stolen is not None and after.stolen is not None:
            steal = round((after.stolen[0] - self.stolen[0]) / max(1, after.stolen[1] - self.stolen[1]), 4)
        if self.switches is not None and after.switches is not None:
            switches = after.switches - self.switches
        return {
            "load_before": float(self.load) if self.load else None,
            "load_after": float(after.load) if after.load else None,
            "steal_share": steal,
            "involuntary_switches": switches,
        }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().rstrip("\0")
    except OSError:
        return ""


def _field(text: str, *names: str) -> str:
    for name in names:
        for line in text.splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name and value.strip():
                return value.strip()
    return ""


def _processor(root: Path, cpuinfo: str) -> str:
    board = _read(root / "proc/device-tree/model")
    return _field(cpuinfo, "model name", "Model", "Hardware") or board or platform.processor() or platform.machine()


def _memory(root: Path) -> str:
    kilobytes = _field(_read(root / "proc/meminfo"), "MemTotal").split()
    return f"{int(kilobytes[0]) / 2**20:.1f} GiB" if kilobytes else ""


def _system(root: Path) -> str:
    for line in _read(root / "etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return platform.platform(terse=True)


def _frequency(root: Path) -> str:
    kilohertz = _read(root / CPU / "scaling_cur_freq")
    return f"{int(kilohertz) / 1000:.0f} MHz" if kilohertz.isdigit() else ""


def _virtualization(root: Path, cpuinfo: str) -> str:
    if _read(root / "sys/hypervisor/type"):
        return _read(root / "sys/hypervisor/type")
    product = _read(root / "sys/class/dmi/id/product_name")
    if "hypervisor" in _field(cpuinfo, "flags").split():
        return f"virtual machine ({product})" if product else "virtual machine"
    return ""
