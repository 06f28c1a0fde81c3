"""The network between a client and the tracking server fails: at one request, or at every n-th."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from mlflow.exceptions import MlflowException
from servers import IMPATIENT, environment, lsa

from faults import Row
from faults.proxy import FAULTS, Proxy, Rule, every, none
from faults.server import asking, runs, server
from lsa import project
from lsa.runtime.errors import InputError
from lsa.studies import measure, train
from lsa.tracking import registry, spool, store, sync

STEPS = 500  # of the long form, half of them trainings
BURST = 6  # requests: more than a client tries again
# The n-th request and its fault. What is cut off is tried less often than what never came.
EVERY = ((5, "drop"), (5, "lose"), (40, "cut"), (9, "delay"), (6, "500"), (7, "429"), (5, "503"))


def rows(folder: Path) -> list[Row]:
    """The faults of this module."""
    return [at_one_request(folder / "one", STEPS), at_every(folder / "every", EVERY)]


def at_one_request(folder: Path, wanted: int) -> Row:
    """So many steps, each with another request of it, or a burst of them, that fails."""
    with server(folder, epochs=2) as (served, client), client_of(served.uri, client) as proxy:
        recipe, length = project.load("tiny").recipe, {}
        kept = 0
        for i in range(wanted // 2):
            for step in ("train", "lanczos"):
                fault, burst = FAULTS[i % len(FAULTS)], BURST if i % 3 == 2 else 1
                first = proxy.number
                if step in length:  # which is known of the first, undisturbed one
                    proxy.rule = between(first + 1 + (5 * i) % length[step], burst, fault)
                if step == "train":
                    kept += delivered(proxy, lambda i=i: train.train(recipe("sgd", i)))
                    address = train.train(recipe("sgd", i), reuse=True).checkpoint
                else:
                    kept += delivered(proxy, lambda at=address: probe(at))
                length.setdefault(step, proxy.number - first)
        check(served.uri, {"train": wanted // 2, "lanczos": wanted // 2}, trainings=wanted // 2)
        faults = told(proxy.faults)
    return Row(
        "requests lost, cut off, late or refused",
        f"a proxy; in each step another request, in every third a burst of {BURST}: {faults}",
        wanted,
        "nothing: one finished run of each step, one checkpoint of each training, none left open",
        seen(wanted - kept, kept, "steps", "`lsa sync` delivers them"),
    )


def at_every(folder: Path, wanted: tuple[tuple[int, str], ...]) -> Row:
    """Studies by real clients, of whose requests every n-th fails."""
    late = 0
    with server(folder, epochs=2) as (served, client), Proxy(served.uri) as proxy:
        env = environment(MLFLOW_TRACKING_URI=proxy.uri, **IMPATIENT)
        file = client / "projects" / "tiny.yaml"
        text = file.read_text()
        for seed, (n, fault) in enumerate(wanted):
            file.write_text(text.replace("seeds: [0]", f"seeds: [{seed}]"))
            proxy.rule = every(n, fault)
            done = lsa("study", "tiny", cwd=client, env=env, code=None)
            assert "Traceback" not in done.stderr, done.stderr
            proxy.rule = none
            if done.returncode:
                assert done.returncode == 75, done.stderr
                late += 1
                lsa("sync", cwd=client, env=env)
                lsa("study", "tiny", cwd=client, env=env)
        number = len(wanted)
        steps_of_studies = {"train": 2 * number, "lanczos": 2 * number, "study": 1}
        check(served.uri, steps_of_studies, 2 * number)
        faults = told(proxy.faults)
    return Row(
        "every n-th request lost, cut off, late or refused",
        f"a proxy between the server and studies of 4 steps, n from 5 to 40: {faults}",
        number,
        "nothing: one finished run of each step, one checkpoint of each training, none left open",
        seen(number - late, late, "studies", "`lsa sync` and the study again complete them"),
    )


# --- how ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def client_of(uri: str, folder: Path) -> Iterator[Proxy]:
    """This process as a client in a folder, behind a proxy."""
    here, addresses, patience = Path.cwd(), store.addresses(), store.PAUSE
    before = {name: os.environ.get(name) for name in IMPATIENT}
    with Proxy(uri) as proxy:
        os.chdir(folder)
        os.environ.update(IMPATIENT)
        store.use(proxy.uri, proxy.uri)
        store.PAUSE = 0.0
        try:
            yield proxy
        finally:
            os.chdir(here)
            store.use(*addresses)
            store.PAUSE = patience
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def between(first: int, count: int, fault: str) -> Rule:
    """The fault at so many requests, from that one on."""
    return lambda number, method, path: fault if first <= number < first + count else ""


def probe(address: str) -> None:
    """Fetch a checkpoint, measure and log; what cannot be fetched is fetched again."""
    source = None
    while source is None:
        with contextlib.suppress(InputError):  # one line: the store does not answer
            source = registry.fetch(address)
    measure.measure("lanczos", source, k=1, density_steps=5)


def delivered(proxy: Proxy, run: Callable[[], object]) -> int:
    """Run a step; whether it had to be delivered afterwards."""
    try:
        run()
        return 0
    except spool.NotLogged:
        proxy.rule = none
        ends = list(sync.sync())
        assert ends and all(end.startswith("run ") for _, end in ends), ends
        return 1
    except MlflowException as error:  # it is logged, and could not be read back
        assert store.away(error) and not spool.entries(), error
        return 0
    finally:
        proxy.rule = none


def check(uri: str, wanted: dict[str, int], trainings: int) -> None:
    """Compare what the store holds with what was measured."""
    found = runs(uri, "")
    assert {run.info.status for run in found} == {"FINISHED"}
    steps_found = Counter(run.data.tags["lsa.step"] for run in found)
    assert steps_found == wanted, steps_found
    keys = [run.data.tags["lsa.key"] for run in found if "lsa.key" in run.data.tags]
    assert len(keys) == len(set(keys))
    client = asking(uri)
    for run in found:
        step = run.data.tags["lsa.step"]
        if step == "train":
            logged = client.get_metric_history(run.info.run_id, "val/loss")
            assert sorted(m.step for m in logged) == [1, 2], logged
        if step == "lanczos":
            assert run.data.metrics["lanczos/lambda_max"] > 0
            # Of a lost answer, MLflow's own second request links the same checkpoint once more.
            inputs = client.get_run(run.info.run_id).inputs  # which a search leaves out
            assert len({one.model_id for one in inputs.model_inputs}) == 1
            files = {file.path for file in client.list_artifacts(run.info.run_id)}
            assert {"lanczos.json", "eigenvalues.npy"} & files, files
    ids = [e.experiment_id for e in client.search_experiments()]
    models, token = [], None
    while True:
        page = client.search_logged_models(ids, page_token=token)
        models, token = models + list(page), page.token
        if not token:
            break
    final = [m for m in models if m.tags.get("epoch") == "2"]
    assert {str(m.status) for m in models} == {"READY"} and len(final) == trainings
    versions = client.search_model_versions("", max_results=10_000)
    told_of = sorted((v.name, v.run_id, int(v.version), v.source) for v in versions)
    assert len(versions) == len({v.run_id for v in versions}) == trainings, told_of


def told(faults: Counter[str]) -> str:
    """How often each fault was injected, in words."""
    words = {"drop": "dropped", "lose": "answer lost", "cut": "cut off", "delay": "late"}
    return ", ".join(f"{words.get(name, name)} {faults[name]}" for name in FAULTS if faults[name])


def seen(well: int, kept: int, what: str, remedy: str) -> str:
    """What the user sees: nothing, or one line about each result that is kept for later."""
    if not kept:
        return "nothing"
    return f"{well} {what}: nothing; {kept} {what}: one line and exit code 75, and {remedy}"
