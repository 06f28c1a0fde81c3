"""What the figures were measured on."""

from __future__ import annotations

import datetime
import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

PACKAGES = {
    "curvlinops": "curvlinops-for-pytorch",
    "eigenthings": "hessian-eigenthings",
    "pyhessian": "PyHessian",
}


def installed(name: str) -> bool:
    """Whether one of `PACKAGES` is installed."""
    module = "hessian_eigenthings" if name == "eigenthings" else name
    return importlib.util.find_spec(module) is not None


def described(device: str) -> str:
    """Date, device, processor, memory and versions, in one line."""
    packages = ["torch", *(p for n, p in PACKAGES.items() if installed(n))]
    versions = ", ".join(f"{p} {_version(p)}" for p in packages)
    memory = psutil.virtual_memory().total / 1e9
    card = f"{torch.cuda.get_device_name(device)}; " if device.startswith("cuda") else ""
    return (
        f"{datetime.date.today()}, {card}{_processor()}, {torch.get_num_threads()} threads, "
        f"{memory:.0f} GB; {versions}."
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # its files alone
        return "?"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
