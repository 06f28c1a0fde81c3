"""Where a number came from: code version, libraries, machine. No tracking here."""

from __future__ import annotations

import ast
import hashlib
import platform
import subprocess
import sys
import tokenize
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from lsa.runtime.documents import whole_number
from lsa.runtime.wordless import without_words

PACKAGE = Path(__file__).parent.parent
DISTRIBUTIONS = {"lsa": "loss-landscape-analysis"}  # on PyPI, where lsa is another project


@lru_cache(maxsize=1)
def versions() -> Mapping[str, str]:
    """Versions of Python, lsa and the libraries that compute the numbers."""
    known = {"python": platform.python_version()}
    for package in ("lsa", "torch", "torchvision", "numpy", "scipy", "mlflow"):
        try:
            known[package] = version(DISTRIBUTIONS.get(package, package))
        except PackageNotFoundError:
            known[package] = "not installed"
    return known


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
    # Without its lock, which a kill would leave behind: nobody could commit then.
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(PACKAGE), *arguments],
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
    """A name of a process that no later process gets, although process numbers are used again.

    It holds the time between the starts of machine and process, which no clock change affects.
    """
    booted = psutil.boot_time()  # first: older psutil remembers it for `create_time`
    return f"{process.pid}@{process.create_time() - booted:.2f}"


def gone(tags: Mapping[str, str]) -> bool:
    """Whether the process that `machine` described ran here and has ended.

    False for what ran on another host: nothing can be said of it from here.
    """
    identity = tags.get("lsa.process", "")
    number = whole_number(identity.partition("@")[0])
    if tags.get("lsa.host") != host() or number is None or number < 0:
        return False
    try:
        process = psutil.Process(number)
        return _identity(process) != identity or process.status() == psutil.STATUS_ZOMBIE
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

    An edited probe gets a new hash, and a probe that does not use the edited code keeps its hash.
    Docstrings, comments and captions do not count.
    A name that a package passes on (`from lsa.probe import Result`) counts as its own module's.
    """
    seen: dict[str, bytes] = {}
    _collect(module, seen)
    digest = hashlib.sha256()
    for name in sorted(seen):
        digest.update(name.encode() + b"\0" + seen[name] + b"\0")
    return digest.hexdigest()


def foreign_hash(module: str) -> str:
    """`code_hash` of a module of somebody's own; empty for one without Python source."""
    try:
        path = _source(module)
        return code_hash(module) if path and path.suffix == ".py" else ""
    except (ImportError, ValueError, SyntaxError):  # told where it is imported
        return ""


def _collect(module: str, seen: dict[str, bytes]) -> None:
    path = _source(module)
    # A script that a worker process has imported again is still the same script.
    module = "__main__" if module == "__mp_main__" else module
    if module in seen or path is None:
        return
    seen[module], imports = _read_current(path)
    for package, name in imports:
        _collect(_home(package, name), seen)


def _home(module: str, name: str) -> str:
    """The module that `from module import name` leads to; `module` where it defines the name."""
    if not name or _source(f"{module}.{name}"):
        return f"{module}.{name}" if name else module
    path = _source(module)
    if path is None or path.name != "__init__.py":
        return module
    status = path.stat()
    passed_on = _passed_on(path, status.st_mtime_ns, status.st_size).get(name)
    return _home(*passed_on) if passed_on else module


@lru_cache(maxsize=256)
def _passed_on(path: Path, modified: int, size: int) -> Mapping[str, tuple[str, str]]:
    """Names that a package takes from other lsa modules: module and name there."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.ImportFrom) and node.module and _ours(node.module)
        for alias in node.names
    }


def _read_current(path: Path) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=512)
def _read(path: Path, modified: int, size: int) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """A file's text without its words, and its imports of lsa: module and name, or module, ""."""
    with tokenize.open(path) as file:
        source = file.read().encode()
    nodes = list(ast.walk(ast.parse(source)))
    imports: dict[tuple[str, str], None] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            pairs = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            pairs = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        imports.update(dict.fromkeys(pair for pair in pairs if _ours(pair[0])))
    return without_words(source, nodes), tuple(imports)


def _ours(module: str) -> bool:
    return module == "lsa" or module.startswith("lsa.")


def _source(module: str) -> Path | None:
    """Source file of an lsa module or package, or of a third-party probe's module."""
    if _ours(module):
        return _own(PACKAGE, module)
    import importlib.util

    if module in sys.modules:  # __main__ too, which has no specification
        file = getattr(sys.modules[module], "__file__", None)
        return Path(file) if file else None
    spec = importlib.util.find_spec(module)
    return Path(spec.origin) if spec and spec.origin else None


@lru_cache(maxsize=4096)  # each step of a plan asks for some seven hundred; none moves meanwhile
def _own(package: Path, module: str) -> Path | None:
    path = package.joinpath(*module.split(".")[1:])
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)
