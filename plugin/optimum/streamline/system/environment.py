"""What a measurement ran on: processor, memory, versions. For the record; nothing is decided by it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

OWN_DISTRIBUTION = "optimum-streamline"
PACKAGES = (OWN_DISTRIBUTION, "torch", "transformers", "onnxruntime", "onnxruntime-gpu")


def package_version() -> str:
    """The installed version of optimum-streamline."""
    return version(OWN_DISTRIBUTION)


def describe_machine(device: str) -> dict[str, str | int]:
    """Processor, cores this process may use, memory, GPU where it was used, and versions of what is installed."""
    facts: dict[str, str | int] = {
        "processor": _processor(),
        # Those this process may use, where the system can say.
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if device == "cuda":
        import torch

        facts["gpu"] = torch.cuda.get_device_name()
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def _processor() -> str:
    # psutil does not name it, and py-cpuinfo, which does, has had no release since 2022.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
