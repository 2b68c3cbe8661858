"""Describe the machine that a measurement ran on: processor, memory, GPU and package versions.

The description goes into reports. No decision depends on it.
"""

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
    """Describe this machine.

    Args:
        device: `cpu` or `cuda`. The GPU is named only for `cuda`.

    Returns:
        Processor, number of cores that this process may use, memory in bytes, operating system, Python version, GPU,
        and the version of each installed package of `PACKAGES`.
    """
    facts: dict[str, str | int] = {
        "processor": _processor(),
        # A container or scheduler may allow this process fewer cores than the machine has.
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
    """The processor's model name, from `/proc/cpuinfo` where it exists."""
    # psutil does not give the name, and py-cpuinfo, which does, has had no release since 2022.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
