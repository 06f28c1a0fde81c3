"""The architecture: who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lsa"

# A module imports only from lines above its own (probes and plots, packages, also within).
LAYERS = [
    {"errors", "signals", "failures"},
    {"mlflow_plugin", "provenance", "claims", "partial", "ranks", "documents", "spool"},
    {
        "krylov",
        "paths",
        "subspaces",
        "crossing",
        "comparison",
        "units",
        "factories",
        "serial",
        "batch_norm",
        "group_norm",
        "layer_gradients",
        "precision",
        "replay",
        "budget",
        "planes",
        "spanning",
    },
    {"second_order"},
    {"sample_gradients"},
    {"linalg", "trace", "neb", "permutations", "images", "levels", "matching", "page", "products"},
    {"quadrature", "moments", "slopes", "ascent", "autoneb", "curves", "torchvision_data"},
    {"landscape", "data", "models", "optimizers"},
    {"consistency", "noise_scale"},
    {"probe", "heads", "stability", "sam", "symmetries", "sharded"},
    {"outline", "muon_state"},
    {"project", "progress", "mlproject", "plots", "interactive", "subspace_training", "mode_graph"},
    {"probes", "train"},
    {"checkpoint", "display", "store", "drawings"},
    {"runs", "server"},
    {"tracking"},
    {"registry"},
    {"sync"},
    {"steps"},
    {"train_step"},
    {"trajectory"},
    {"measurements", "records", "doctor"},
    {"tables", "pictures", "checks"},
    {"findings"},
    {"insights"},
    {"report", "calls", "engines", "view", "cost"},
    {"studies", "ray_tasks"},
    {"plan", "mode_study"},
    {"__init__"},
    {"cli_show", "cli_server"},
    {"cli_study", "cli_doctor"},
    {"cli"},
    {"__main__"},
]
ALLOWED = {
    "mlflow": {"store", "runs", "tracking", "registry"},
    "typer": {"cli", "cli_show", "cli_study", "cli_doctor", "cli_server"},
    "sqlalchemy": {"server"},
    "matplotlib": {"plots"},
    "ray": {"ray_tasks"},
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
            if parts[0] != "lsa" or len(parts) < 2 or parts[1] not in level:
                continue
            inside = own == parts[1] and own in ("probes", "plots")
            assert inside or level[parts[1]] < level[own], f"{module} imports {name}"


def test_every_module_has_one_layer_and_imports_by_full_name():
    listed = [name for layer in LAYERS for name in layer]
    assert len(listed) == len(set(listed))
    for module, tree in sources().items():
        for node in ast.walk(tree):  # a relative import would escape the tests above
            assert not (isinstance(node, ast.ImportFrom) and node.level), module


def test_heavy_packages_have_one_home_each():
    for module, tree in sources().items():
        for package, homes in ALLOWED.items():
            if any(name.split(".")[0] == package for name in imports(tree)):
                assert module.split(".")[0] in homes, f"{module} imports {package}"


def test_the_maths_loads_neither_tracking_nor_plots_nor_the_command_line():
    names = [m for m in sources() if m.startswith("probes.") and m != "probes.__init__"]
    names += ["landscape", "linalg", "paths", "neb", "autoneb", "curves", "subspaces", "train"]
    names += ["krylov", "quadrature", "trace", "crossing", "permutations", "units", "probe"]
    names += ["stability", "muon_state", "ascent", "planes", "sam", "symmetries", "sharded"]
    code = "; ".join(f"import lsa.{name}" for name in names)
    code += "; import sys; print({'mlflow', 'typer', 'matplotlib'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
