"""The architecture: who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lsa"

# A module imports only from lines above its own.
LAYERS = [
    {"errors", "signals"},
    {
        "krylov",
        "linalg",
        "quadrature",
        "trace",
        "paths",
        "subspaces",
        "crossing",
        "units",
        "factories",
    },
    {
        "neb",
        "curves",
        "permutations",
        "quadrature",
        "trace",
        "landscape",
        "images",
        "mlflow_plugin",
    },
    {"autoneb", "probe", "data", "torchvision_data", "models", "optimizers", "provenance"},
    {"serial", "progress", "mlproject", "project"},
    {"probes", "plots", "train"},
    {"checkpoint"},
    {"tracking"},
    {"steps"},
    {"study"},
    {"cli"},
    {"__main__", "__init__"},
]
ALLOWED = {
    "mlflow": {"tracking"},
    "typer": {"cli"},
    "matplotlib": {"plots"},
}


def sources() -> dict[str, ast.Module]:
    """First part of the module's name → its syntax tree (probes as one)."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts)] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_point_one_way():
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for module, tree in sources().items():
        own = module.split(".")[0]
        assert own in level, f"{module} is in no layer"
        for name in imports(tree):
            parts = name.split(".")
            if parts[0] == "lsa" and len(parts) > 1 and parts[1] in level and own != "__init__":
                assert level[parts[1]] <= level[own], f"{module} imports {name}"


def test_heavy_packages_have_one_home_each():
    for module, tree in sources().items():
        for package, homes in ALLOWED.items():
            if any(name.split(".")[0] == package for name in imports(tree)):
                assert module in homes, f"{module} imports {package}"


def test_the_maths_loads_neither_tracking_nor_plots_nor_the_command_line():
    names = [m for m in sources() if m.startswith("probes.") and m != "probes.__init__"]
    names += ["landscape", "linalg", "paths", "neb", "autoneb", "curves", "subspaces", "train"]
    code = "; ".join(f"import lsa.{name}" for name in names)
    code += "; import sys; print({'mlflow', 'typer', 'matplotlib'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
