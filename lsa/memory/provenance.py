"""Where a number came from: code version, libraries, machine. No tracking here."""

from __future__ import annotations

import ast
import hashlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGE = Path(__file__).parent.parent


@lru_cache(maxsize=1)
def versions() -> Mapping[str, str]:
    """Versions of what computes the numbers."""
    found = {"python": platform.python_version()}
    for package in ("lsa", "torch", "torchvision", "numpy", "scipy", "mlflow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@lru_cache(maxsize=1)
def git() -> tuple[dict[str, str], str]:
    """Tags for commit and dirty flag, and the uncommitted diff, of lsa's own checkout.

    Empty when lsa was installed from a package or git is missing.
    """
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return {}, ""
    status = _git("status", "--porcelain")
    tags = {"lsa.git.commit": commit, "lsa.git.dirty": str(bool(status)).lower()}
    return tags, _git("diff", "HEAD") if status else ""


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def machine(device: str) -> dict[str, str]:
    """Tags for the device, threads and host that compute."""
    import torch  # here, because the command line reads versions without torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu()
    return {
        "lsa.device": device,
        "lsa.device_name": name,
        "lsa.threads": str(torch.get_num_threads()),
        "lsa.host": host(),
        "lsa.process": _identity(psutil.Process()),
    }


def host() -> str:
    """This machine's name."""
    return platform.node()


def _identity(process: psutil.Process) -> str:
    """A process as no later one can be named: process numbers are used again.

    By the time from the machine's start to its own, which setting the clock does not change.
    """
    return f"{process.pid}@{process.create_time() - psutil.boot_time():.2f}"


def gone(tags: Mapping[str, str]) -> bool:
    """Whether the process that `machine` described ran here and has ended.

    False for what ran on another host: nothing can be said of it from here.
    """
    found = tags.get("lsa.process", "")
    if tags.get("lsa.host") != host() or not found:
        return False
    try:
        process = psutil.Process(int(found.partition("@")[0]))
        return _identity(process) != found or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def code_hash(module: str) -> str:
    """Hash of a module's source and of every lsa module it imports, directly or not.

    So an edited probe gets a new hash, and a probe that does not use the edited code keeps its.
    """
    seen: dict[str, bytes] = {}
    _collect(module, seen)
    digest = hashlib.sha256()
    for name in sorted(seen):
        digest.update(name.encode() + b"\0" + seen[name] + b"\0")
    return digest.hexdigest()


def _collect(module: str, seen: dict[str, bytes]) -> None:
    path = _source(module)
    # A script that a worker process has imported again is still the same script.
    module = "__main__" if module == "__mp_main__" else module
    if module in seen or path is None:
        return
    status = path.stat()
    seen[module], names = _read(path, status.st_mtime_ns, status.st_size)
    for name in names:
        _collect(name, seen)


@lru_cache(maxsize=256)
def _read(path: Path, modified: int, size: int) -> tuple[bytes, tuple[str, ...]]:
    """Source of a file as last modified, and the lsa modules that it imports."""
    source = path.read_bytes()
    found: dict[str, None] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found.update(dict.fromkeys(name for name in names if name.startswith("lsa.")))
    return source, tuple(found)


def _source(module: str) -> Path | None:
    """Source file of an lsa module, or of a third-party probe's module."""
    if module.startswith("lsa."):
        path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
        return path if path.is_file() else None
    import importlib.util

    if module in sys.modules:  # __main__ too, which has no specification
        file = getattr(sys.modules[module], "__file__", None)
        return Path(file) if file else None
    spec = importlib.util.find_spec(module)
    return Path(spec.origin) if spec and spec.origin else None
