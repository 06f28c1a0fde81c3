"""The architecture: which room may import which, and what stays out of the maths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from lsa.runtime import variables

PACKAGE = Path(__file__).parent.parent / "lsa"
# From the top down: a room imports only from rooms after it.
ROOMS = (
    "__main__ cli __init__ studies reports watching probes tracking training figures project probe "
    "landscape maths runtime"
).split()
HOMES = {
    "mlflow": "tracking",
    "sqlalchemy": "tracking",
    "matplotlib": "figures",
    "plotly": "figures",
    "typer": "cli",
    "ray": "studies",
}
# The modules that touch the environment, and whose variables each reads or sets.
ENVIRONMENT = {
    "runtime/variables": "lsa's own; no other module names one",
    "runtime/heap": "glibc's",
    "runtime/threads": "OpenMP's",
    "runtime/ranks": "torchrun's",
    "tracking/attached": "MLflow's: the run and experiment of this process",
    "tracking/settings": "MLflow's: how its client behaves",
    "tracking/mlflow_plugin": "MLflow's: conda and the stores' addresses, for `mlflow run`",
    "tracking/server": "MLflow's: how its server starts",
    "studies/engines/local": "all of them, handed to a worker",
    "studies/engines/ray_tasks": "Ray's",
    "cli/app": "the shell's, while it completes a command",
}


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules that it imports, lsa's by the file that is loaded."""
    files = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): (ast.parse(path.read_text()))
        for path in PACKAGE.rglob("*.py")
    }
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, tree in files.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} imports relatively"
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= {f if f in files else str(node.module) for f in full}
    return found


def room(module: str) -> str:
    """The entry of `lsa/` in which a module lies."""
    return [*module.split("."), "__init__"][1]


def test_imports_point_one_way_and_in_no_circle():
    assert sorted(ROOMS) == sorted(p.stem for p in PACKAGE.iterdir() if p.name != "__pycache__")
    assert len(ROOMS) <= 15
    graph = {name: {m for m in used if m.startswith("lsa")} for name, used in imports().items()}
    for name, used in graph.items():
        for other in used:
            below = ROOMS.index(room(name)) < ROOMS.index(room(other)) or room(name) == room(other)
            assert below or other == "lsa", f"{name} imports {other}"
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_heavy_packages_have_one_home_each():
    for name, used in imports().items():
        for package in {module.split(".")[0] for module in used} & set(HOMES):
            assert room(name) == HOMES[package], f"{name} imports {package}"


def test_the_maths_loads_neither_tracking_nor_figures_nor_the_command_line():
    rooms = {"probes", "probe", "landscape", "maths"}
    names = [name for name in imports() if room(name) in rooms]
    names += ["lsa.training.train", "lsa.tracking.server"]  # which becomes MLflow's own process
    heavy = "{'mlflow', 'typer', 'matplotlib'}"
    code = f"import sys, {', '.join(names)}; print({heavy} & {{*sys.modules}})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_functions_are_short_and_take_few_positional_parameters():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                name = f"{path.relative_to(PACKAGE)}: {node.name}"
                assert (node.end_lineno or 0) - node.lineno < 80, f"{name} has over 80 lines"
                given = {a.arg for a in node.args.posonlyargs + node.args.args}
                assert len(given - {"self", "cls", "ctx"}) <= 8, f"{name} takes over 8 by position"


def test_each_variable_of_the_environment_has_one_module():
    touching, named = set(), {}
    for path in PACKAGE.rglob("*.py"):
        module = str(path.relative_to(PACKAGE).with_suffix(""))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute | ast.alias):
                name = node.attr if isinstance(node, ast.Attribute) else node.name
                if name in ("environ", "getenv", "putenv"):
                    touching.add(module)
            elif isinstance(node, ast.Constant) and re.fullmatch(
                r"(LSA|MLFLOW)_[A-Z_]+", str(node.value)
            ):
                named.setdefault(node.value, set()).add(module)
    assert touching == set(ENVIRONMENT)
    for variable, modules in named.items():
        own = {"runtime/variables"} if variable.startswith("LSA_") else modules
        assert modules == own and len(modules) == 1, f"{variable} is named in {modules}"


def test_every_variable_of_lsa_is_on_the_page():
    page = (PACKAGE.parent / "docs" / "environment.md").read_text()
    known = {v for k, v in vars(variables).items() if k.isupper()}
    assert set(re.findall(r"LSA_[A-Z_]+", page)) == known - {variables.PYTHON}


def test_every_room_is_on_the_page():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rows = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(\w+)/`", rows)) == {
        p.name for p in PACKAGE.iterdir() if p.is_dir()
    } - {"__pycache__"}


def test_names_of_lsa_in_backticks_lead_to_something():
    """Docstrings and comments name modules, and what is in them, as they are called now."""
    texts = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    everything = "\n".join(texts.values())
    for path, text in texts.items():
        for name in re.findall(r"`(lsa(?:\.\w+)+)", text):
            at, rest = PACKAGE, name.split(".")[1:]
            while rest and (at / rest[0]).is_dir():
                at, rest = at / rest[0], rest[1:]
            if rest and (module := (at / rest[0]).with_suffix(".py")).exists():
                at, rest = module, rest[1:]
            defined = (at / "__init__.py" if at.is_dir() else at).read_text()
            tag = f'"{name}' in everything
            assert tag or not rest or re.search(rf"\b{rest[0]}\b", defined), f"{path}: {name}"
