"""The architecture: who may import what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lsa"

# A module imports only from lines above its own (probes and plots also within).
LAYERS = [
    {"errors", "signals", "failures"},
    {
        "mlflow_plugin",
        "memory.provenance",
        "claims",
        "partial",
        "ranks",
        "derivatives.slabs",
        "documents",
        "collector",
        "heap",
        "memory.spool",
        "workers",
    },
    {
        "maths.krylov",
        "maths.paths",
        "maths.subspaces",
        "maths.crossing",
        "maths.comparison",
        "maths.units",
        "training.factories",
        "memory.serial",
        "derivatives.batch_norm",
        "derivatives.group_norm",
        "derivatives.layer_gradients",
        "derivatives.precision",
        "derivatives.replay",
        "maths.planes",
        "maths.spanning",
    },
    {"derivatives.second_order"},
    {"derivatives.sample_gradients", "derivatives.modes"},
    {"derivatives.budget"},
    {
        "maths.linalg",
        "maths.trace",
        "maths.neb",
        "maths.permutations",
        "training.images",
        "maths.levels",
        "maths.matching",
        "reports.page",
        "derivatives.products",
    },
    {
        "maths.quadrature",
        "maths.moments",
        "derivatives.curvatures",
        "derivatives.slopes",
        "maths.ascent",
        "maths.autoneb",
        "maths.curves",
        "training.torchvision_data",
    },
    {"landscape", "training.data", "training.models", "training.optimizers"},
    {"consistency", "noise_scale", "passes", "warm_start"},
    {"probe", "heads", "stability", "sam", "symmetries", "sharded"},
    {"outline", "muon_state"},
    {"project", "progress", "mlproject", "plots", "interactive", "subspace_training", "mode_graph"},
    {"probes", "training.train"},
    {"memory.checkpoint", "display", "memory.store", "reports.drawings"},
    {"memory.runs", "memory.server", "memory.metric_histories"},
    {"memory.registered", "memory.tracking"},
    {"memory.registry", "memory.results"},
    {"memory.sync"},
    {"steps"},
    {"train_step"},
    {"trajectory"},
    {"measurements", "records", "doctor"},
    {"reports.tables", "reports.pictures", "reports.checks"},
    {"reports.findings"},
    {"reports.insights"},
    {"reports.report", "calls", "engines", "view", "cost"},
    {"studies", "ray_tasks"},
    {"plan", "mode_study"},
    {"__init__"},
    {"cli_show", "cli_server"},
    {"cli_study", "cli_doctor"},
    {"cli"},
    {"__main__"},
]
ALLOWED = {
    "mlflow": {"memory"},
    "typer": {"cli", "cli_show", "cli_study", "cli_doctor", "cli_server"},
    "sqlalchemy": {"memory"},
    "matplotlib": {"plots"},
    "ray": {"ray_tasks"},
}

# Packages whose modules stand in layers of their own.
PARTED = {"maths", "derivatives", "training", "memory", "reports"}


def unit(module: str) -> str:
    """What of a dotted name stands in `LAYERS`: a module, or a package as a whole."""
    first, *rest = module.split(".")
    return ".".join([first, *rest[:1]]) if first in PARTED else first


def sources() -> dict[str, ast.Module]:
    """Module → its syntax tree."""
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
        own = unit(module)
        if own in {f"{package}.__init__" for package in PARTED}:
            assert not imports(tree) - {"__future__"}, module
            continue
        assert own in level, f"{module} is in no layer"
        for name in imports(tree):
            other = unit(name.removeprefix("lsa."))
            if not name.startswith("lsa.") or other not in level:
                continue
            inside = own == other and own in ("probes", "plots")
            assert inside or level[other] < level[own], f"{module} imports {name}"


def test_the_maths_knows_nothing_of_the_rest():
    for module, tree in sources().items():
        package = module.partition(".")[0]
        for known, other in (("maths", ()), ("derivatives", ("maths",))):
            if package == known:
                for name in imports(tree):
                    parts = name.split(".")
                    if parts[0] == "lsa" and len(parts) > 1:
                        assert parts[1] in {known, "errors", *other}, f"{module} imports {name}"


def test_every_module_has_one_layer_and_imports_by_full_name():
    listed = [name for layer in LAYERS for name in layer]
    assert len(listed) == len(set(listed))
    for module, tree in sources().items():
        for node in ast.walk(tree):  # a relative import would escape the tests above
            assert not (isinstance(node, ast.ImportFrom) and node.level), module


def test_every_module_has_its_place_on_the_page():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rows = "\n".join(line.rpartition("|")[0].rpartition("|")[2] for line in page.splitlines())
    named = re.findall(r"`(\w+)/?`", rows)
    there = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    there |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(named) == sorted(there)


def test_heavy_packages_have_one_home_each():
    for module, tree in sources().items():
        for package, homes in ALLOWED.items():
            if any(name.split(".")[0] == package for name in imports(tree)):
                assert module.split(".")[0] in homes, f"{module} imports {package}"


def test_the_maths_loads_neither_tracking_nor_plots_nor_the_command_line():
    packages = ("probes.", "maths.", "derivatives.")
    names = [m for m in sources() if m.startswith(packages) and not m.endswith("__init__")]
    names += ["landscape", "sharded", "consistency", "noise_scale", "heads", "sam", "symmetries"]
    names += [
        "stability",
        "muon_state",
        "subspace_training",
        "mode_graph",
        "training.train",
        "probe",
    ]
    code = "; ".join(f"import lsa.{name}" for name in names)
    code += "; import sys; print({'mlflow', 'typer', 'matplotlib'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
