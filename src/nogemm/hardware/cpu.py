"""Describe the machine a figure was measured on: processor, caches, instruction sets, software versions.

Everything comes from the operating system's own files; what it does not say is None, never a guess. No host name, user
or path appears, so a description can stand in a published result.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from nogemm.hardware.held import held_to

_CPU = Path("/sys/devices/system/cpu")
_FLAGS = {
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "avx_vnni": "avx_vnni",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "neon": "asimd",
    "sve": "sve",
}
_PACKAGES = ("torch", "numpy", "transformers", "onnxruntime", "openvino", "nncf", "jax")


@functools.cache
def _machine() -> dict[str, Any]:
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "family": _number(info.get("cpu family")),
        "model": _number(info.get("model")),
        "stepping": _number(info.get("stepping")),
        "architecture": platform.machine(),
        "virtual": "hypervisor" in flags,
        "logical_cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "caches": caches(),
        "isa": [name for name, flag in _FLAGS.items() if flag in flags],
        "governor": _read(_CPU / "cpu0/cpufreq/scaling_governor"),
        "memory_bytes": _memory(),
        "system": platform.system(),
    }


def machine() -> dict[str, Any]:
    """Return what is known about this machine as JSON-able values.

    Returns:
        cpu, family, model, stepping, architecture, virtual, logical_cores, usable_cores, caches (see `caches`), isa,
        governor, memory_bytes, system, versions ({package: version or None}, python included).
    """
    return _machine() | {"versions": versions()}


def machine_line() -> str:
    """Return the machine in one line, for tables and plots."""
    facts = machine()
    parts = [f"{facts['cpu']}" + (" (virtual machine)" if facts["virtual"] else "")]
    parts.append(f"{facts['usable_cores']} cores")
    parts += [
        f"{cache['level']} {size(cache['bytes'])}" + ("" if cache["shared_by"] == 1 else " shared")
        for cache in facts["caches"]
        if cache["level"] != "L1i"
    ]
    wanted = ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8", "neon")
    parts.append("+".join(name for name in wanted if name in facts["isa"]) or "no vector unit known")
    if facts["memory_bytes"]:
        parts.append(f"{size(facts['memory_bytes'])} memory")
    parts.append(f"torch {facts['versions']['torch']}")
    held = held_to()
    if held is not None:
        parts.append(f"held to {held}")
    return ", ".join(parts)


def processor() -> str:
    """Name this machine's processor for a folder of results: maker, family and model as the processor itself says them.

    Returns:
        Such as "amd-23-49" or "intel-6-207"; the architecture ("aarch64") where there is no family to read. Of a
        process that is held to an instruction set, with that behind ("amd-25-17-avx2").
    """
    facts = machine()
    maker = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(_cpuinfo().get("vendor_id", ""), facts["architecture"])
    return "-".join(str(part) for part in (maker, facts["family"], facts["model"], held_to()) if part is not None)


def versions() -> dict[str, str | None]:
    """Return the installed version of each package that a figure may depend on; None where it is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def caches() -> list[dict[str, Any]]:
    """List the first core's caches: [{"level": "L1d" | "L1i" | "L2" | "L3", "bytes": B, "shared_by": cores, ...}].

    "ways" and "line" (bytes) are the cache's geometry, None where the system does not say.
    """
    found = []
    for index in sorted((_CPU / "cpu0/cache").glob("index*")):
        level, kind, text = _read(index / "level"), _read(index / "type"), _read(index / "size")
        if level is None or kind is None or text is None:
            continue
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        shared = _count(_read(index / "shared_cpu_list") or "0")
        found.append(
            {
                "level": f"L{level}{suffix}",
                "bytes": _bytes(text),
                "shared_by": shared,
                "ways": _number(_read(index / "ways_of_associativity")),
                "line": _number(_read(index / "coherency_line_size")),
            }
        )
    return found


def last_level_cache_bytes(default: int = 32 << 20) -> int:
    """Return the size of the last data cache, or `default` where the system does not say."""
    return max((c["bytes"] for c in caches() if c["level"] != "L1i"), default=default)


def size(n_bytes: float) -> str:
    """Write bytes for a reader: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.3g} GiB"


def _cpuinfo() -> dict[str, str]:
    """Read the first processor's block of /proc/cpuinfo."""
    facts: dict[str, str] = {}
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if not line.strip():
            break
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    return facts


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _memory() -> int | None:
    found = re.search(r"^MemTotal:\s+(\d+) kB", _read(Path("/proc/meminfo")) or "", re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def _bytes(text: str) -> int:
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1])
    return int(text[:-1]) * scale if scale else int(text)


def _count(cpu_list: str) -> int:
    """Count the cores of a list such as '0-3,8'."""
    total = 0
    for part in cpu_list.split(","):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return total


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
