"""Nothing that comes from a store runs, leaves its folder or speaks to the terminal or browser."""

from __future__ import annotations

import ast
import http.server
import json
import sqlite3
import threading
from html.parser import HTMLParser
from pathlib import Path

import mlflow
import pytest
import synthetic

from lsa import project
from lsa.cli import app
from lsa.reports import report
from lsa.runtime.errors import InputError
from lsa.tracking import registered, registry, runs, store
from lsa.training import torchvision_data

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
PACKAGE = Path(__file__).parent.parent / "lsa"
SCRIPT = "<script>alert(1)</script>"
CODES = "\x1b]0;owned\x07\x1b[2J[bold]x[/nonsense]"
# What unpickles or runs text, by module; and methods of anything.
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "runpy"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {"system", "popen", "unsafe_load", "full_load", "load_module", "exec_module"}
LOADS = {("torch", "load"), ("yaml", "load"), ("np", "load"), ("numpy", "load")}


def test_no_module_unpickles_or_runs_text():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom) and names != ["UnpicklingError"]:
                    names.append(node.module or "")
                assert not MODULES & {name.split(".")[0] for name in names}, where
            if isinstance(node, ast.keyword):
                true = isinstance(node.value, ast.Constant) and node.value.value is True
                assert not (node.arg in ("allow_pickle", "shell") and true), where
                assert not (node.arg == "weights_only" and not true), where
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            if isinstance(called, ast.Name):
                assert called.id not in BUILTINS, where
            if isinstance(called, ast.Attribute):
                owner = called.value.id if isinstance(called.value, ast.Name) else ""
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                safe = "weights_only" in given or given.get("allow_pickle") == "False"
                assert (owner, called.attr) not in LOADS or safe, where
                assert called.attr not in METHODS, where


def test_datasets_that_unpickle_what_lies_in_their_folder_are_not_taken():
    assert "LSUN" not in torchvision_data.names() and "CIFAR10" in torchvision_data.names()


class Reader(HTMLParser):
    """Tags of a page, and attributes that act."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.acting: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.acting += [name for name, _ in attrs if name.startswith("on")]


@pytest.mark.parametrize(
    "name", [SCRIPT, "../../etc/passwd", "a/b", "a\n", "a\x1b[2J", "", ".", "'"]
)
@pytest.mark.parametrize("place", ["name", "optimizers"])
def test_names_that_are_markup_or_paths_are_no_names(workplace, name, place):
    text = (workplace / "projects" / "tiny.yaml").read_text()
    extra = {"name": name} if place == "name" else {"optimizers": {name: {"name": "SGD"}}}
    head = text if place == "name" else text.split("optimizers:")[0]
    (workplace / "p.yaml").write_text(f"{head}\n{json.dumps(extra)[1:-1]}\n")
    with pytest.raises(InputError):
        project.load("p.yaml")


def test_a_report_of_a_hostile_store_is_text(workplace):
    """Every tag and parameter of every run, and the names of the runs, are markup."""
    file = workplace / "projects" / "three.yaml"
    file.write_text(synthetic.PROJECT.replace("SEEDS", "[0]"))
    synthetic.study("three", [0])
    with sqlite3.connect(workplace / "mlflow.db") as database:
        kept = ("lsa.step", "project", "optimizer", "seed", "lsa.key")
        kept = ", ".join(f"'{key}'" for key in kept)
        database.execute(f"update tags set value = ? where key not in ({kept})", [SCRIPT])
        database.execute("update runs set name = ?", [SCRIPT])
        database.execute("update datasets set digest = ?", [SCRIPT[:36]])
    found = report.report(project.load("three"))
    page = Reader(found.html)
    assert "script" not in page.tags and not page.acting
    assert "&lt;script&gt;" in found.html and "<script" not in found.markdown


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", "7", '{"curves": 3}', '{"curves": {"density": {}}}', "[" * 10**5, "{",
     '{"curves": {"density": {"x_name": "$\\\\frac{$", "x": ["a"], "y": [1]}}}'],
)  # fmt: skip
def test_a_hostile_result_gets_one_line(workplace, content):
    (workplace / "projects" / "three.yaml").write_text(synthetic.PROJECT.replace("SEEDS", "[0]"))
    synthetic.study("three", [0], steps=["lanczos"])
    for path in workplace.rglob("lanczos.json"):
        path.write_text(content)
    with pytest.raises(InputError) as caught:
        report.report(project.load("three"))
    assert "lanczos.json" in str(caught.value) and "\n" not in str(caught.value)


def test_what_others_log_beside_us_neither_breaks_nor_commands_the_lists(trained, capsys):
    client = store.client()
    experiment = client.get_experiment_by_name("tiny").experiment_id
    for tags in ({"project": "tiny"}, {"project": "tiny", "lsa.step": "train", "seed": CODES},
                 {"project": "tiny", "lsa.step": CODES, "seed": "x"}):  # fmt: skip
        run = client.create_run(experiment, tags=tags, run_name=CODES)
        client.log_param(run.info.run_id, "optimizer", CODES)
        client.set_terminated(run.info.run_id)
    model_id = runs.read(trained.run_id).tags["lsa.model_id"]
    name, source = (
        CODES.replace("/", ""),
        f"models:/{model_id}",
    )
    client.create_registered_model(name)
    tags = {"project": CODES, "optimizer": CODES, "seed": "0", "epoch": "1"}
    client.create_model_version(name, source, tags=tags)
    client.create_model_version(name, source, tags={"project": "tiny", "epoch": "x"})
    capsys.readouterr()
    commands = (
        ["checkpoints"],
        ["show", run.info.run_id],
        ["study", "tiny", "--dry-run"],
        ["compare", "tiny"],
        ["lanczos", "--project", "tiny", "--optimizer", "adamw"],
    )
    for command in commands:
        assert app.run(command) in (0, 2)
        out, error = capsys.readouterr()
        assert "\x1b" not in out + error and "\x07" not in out + error and "Traceback" not in error
    assert len(registered.listing("tiny")) == 1


class Traversal(http.server.BaseHTTPRequestHandler):
    """An artifact server that lists files outside of the folder asked for."""

    paths: tuple[str, ...] = ()

    def do_GET(self):
        listing = "path=" in self.path or self.path.endswith("artifacts")
        files = [{"path": path, "is_dir": False, "file_size": 4} for path in self.paths]
        body = json.dumps({"files": files}).encode() if listing else b"evil"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_artifacts_cannot_leave_their_folder(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Traversal)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        place = f"mlflow-artifacts://127.0.0.1:{server.server_port}/x"
        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            database.execute("update logged_models set artifact_location = ?", [place])
            database.execute("update runs set artifact_uri = ?", [place])
        before = set(tmp_path.parent.parent.rglob("evil*"))
        for path in ("../evil", "../../../../../evil", f"{tmp_path}/evil", "a/../../evil",
                     "%2e%2e/evil", "..\\evil"):  # fmt: skip
            Traversal.paths = (path,)
            with pytest.raises(InputError) as caught:
                registry.fetch(f"models:/{runs.read(trained.run_id).tags['lsa.model_id']}")
            assert "\n" not in str(caught.value)
        assert set(tmp_path.parent.parent.rglob("evil*")) == before
        assert not Path(mlflow.__file__).parent.joinpath("evil").exists()
    finally:
        server.shutdown()
        server.server_close()
