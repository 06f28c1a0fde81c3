"""Makes `mlflow run` of lsa work without conda, and lets no run of it stay RUNNING for ever.

MLflow imports this module whenever it is imported itself (an `mlflow.run_context_provider`), so it
imports neither MLflow nor torch. It acts only in an `mlflow run` of this project:

- Without conda, `conda_env: conda.yaml` would fail; a stand-in that uses the current Python answers
  in conda's place, says so, and is recorded in the tag `lsa.environment`.
- A relative address of a store, and one in a folder whose name MLflow would encode, is written out.
- MLflow gives a run up when its environment or a parameter is bad, or on SIGTERM: the run stays
  RUNNING, the child goes on. Here SIGTERM acts as Ctrl-C does, and run and child end with the
  process.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lsa.runtime import signals, variables
from lsa.tracking import address

STAND_IN = Path(__file__).parent / "conda"
CONDA_HOME, CONDA = "MLFLOW_CONDA_HOME", "CONDA_EXE"
PATIENCE = 20.0  # seconds that a child has for ending its run

_stopped_by: list[int] = []


class LsaContext:
    """MLflow run context provider: the true environment of a run that the stand-in served."""

    def in_context(self) -> bool:
        """Whether the stand-in answers for conda in this process."""
        return os.environ.get(CONDA_HOME) == str(STAND_IN)

    def tags(self) -> dict[str, str]:
        """A tag for the environment that MLflow's own tag (`conda`) hides."""
        return {"lsa.environment": f"current Python {sys.executable}; conda is not installed"}


def arguments_of(argv: Sequence[str], original: Sequence[str]) -> list[str]:
    """The command line with the program's name first.

    While `python -m mlflow` imports MLflow, `sys.argv[0]` is "-m" and only `sys.orig_argv` has it.
    """
    if list(argv[:1]) != ["-m"]:
        return list(argv)
    return [original[-len(argv)].removeprefix("-m"), *argv[1:]]


def _split(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Positional words, and each option's last value."""
    takes_value = re.compile(r"-[evPAbc]|--(?!help|build-image)[a-z-]+")
    positional: list[str] = []
    options: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            positional.append(word)
        elif takes_value.fullmatch(word):
            options[word] = next(rest, "")
        elif word.startswith("--"):
            options[name] = value if equals else ""
        else:
            options[word[:2]] = word[2:]
    return positional, options


def project_of(arguments: Sequence[str]) -> str | None:
    """The project's address in a local `mlflow run` command line; None for any other command."""
    if not arguments or Path(arguments[0]).name not in ("mlflow", "mlflow.exe", "mlflow.cli"):
        return None
    positional, options = _split(arguments[1:])
    backend = options.get("-b", options.get("--backend", "local"))
    if positional[:1] != ["run"] or len(positional) < 2 or backend != "local":
        return None
    return positional[1]


def is_lsa(address: str) -> bool | None:
    """Whether the project is lsa; None for a remote one whose address does not tell."""
    folder, _, inside = address.partition("#")
    project = os.path.join(folder, inside, "MLproject")
    if os.path.isfile(project):
        with open(project, encoding="utf-8", errors="replace") as text:
            return re.search(r"^name: *lsa\s*$", text.read(), re.MULTILINE) is not None
    if re.search(r"(^|/)lsa(\.git)?$", folder):
        return True
    return None if re.match(r"[^/]*:", address) else False


def needs_stand_in(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> bool:
    """Whether conda would be asked for and is not there."""
    chosen = "--env-manager" in _split(arguments[1:])[1]
    has_conda = shutil.which("conda", path=environment.get("PATH")) is not None
    known = {CONDA_HOME, CONDA} & environment.keys()
    return os.name == "posix" and not (
        chosen or has_conda or known or variables.off(variables.CONDA_STANDIN, environment)
    )


def names_conda() -> bool:
    """Whether the environment says where conda is."""
    return bool({CONDA_HOME, CONDA} & os.environ.keys())


def _use_stand_in() -> None:
    """Point MLflow at the stand-in."""
    conda = STAND_IN / "bin" / "conda"
    if not os.access(conda, os.X_OK):  # some archives lose the executable bit
        with suppress(OSError):
            conda.chmod(0o755)
    os.environ[CONDA_HOME] = str(STAND_IN)
    os.environ[variables.PYTHON] = sys.executable


class Stopped(KeyboardInterrupt):
    """An exception that MLflow treats like Ctrl-C: it stops the child and waits for it."""


def _take_signals() -> None:
    """Raise `Stopped` on SIGTERM, and on SIGINT unless it is ignored, until the process exits."""
    caught = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        caught.append(signal.SIGINT)

    def stopped(number: int) -> Stopped:
        _stopped_by.append(number)
        atexit.register(restore)  # the last registered is the first to run
        return Stopped()

    restore = signals.catch(stopped, tuple(caught))


def _end(client: Any, run_id: str) -> None:
    """At exit, end a run that nobody ended: KILLED after a signal, else FAILED."""
    try:
        if _stopped_by:
            _end_children()
        status = client.get_run(run_id).info.status
        if _stopped_by and status in ("RUNNING", "FAILED"):  # FAILED: MLflow's name for stopped
            client.set_terminated(run_id, "KILLED")
        elif status == "RUNNING":
            client.set_terminated(run_id, "FAILED")
    except Exception as error:  # the process is ending: there is nobody left to catch it
        print(f"lsa: could not see to the end of run {run_id}: {error}", file=sys.stderr)


def _end_children() -> None:
    """End a child that MLflow had started and did not know yet when the signal came."""
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    for child in psutil.wait_procs(children, PATIENCE)[1]:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def _write_out_addresses() -> None:
    """Give the stores' addresses in full: the project's command runs in another folder.

    MLflow passes a relative one on as it is, and encodes a default one as SQLAlchemy cannot read.
    """
    for name in (address.TRACKING_URI, address.REGISTRY_URI):
        if name in os.environ:
            os.environ[name] = address.absolute(os.environ[name])
    if address.TRACKING_URI not in os.environ:
        from mlflow.tracking import get_tracking_uri  # which imports this module

        default = get_tracking_uri()
        if address.decoded(default) != default:
            os.environ[address.TRACKING_URI] = address.decoded(default)


class _FollowRun:
    """Import finder that finds nothing: it learns when MLflow's client is loaded and its run made.

    MLflow hands the run's ID to no plugin, and has not defined its client when it imports this one.
    """

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "mlflow.projects":
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            _write_out_addresses()
            client = getattr(sys.modules.get("mlflow.tracking.client"), "MlflowClient", None)
            if client is not None:
                self._wrap(client)

    def _wrap(self, client: Any) -> None:
        create, context = client.create_run, LsaContext()

        def create_run(self: Any, *args: Any, tags: Any = None, **kwargs: Any) -> Any:
            environment = context.tags() if context.in_context() else {}
            run = create(self, *args, tags={**(tags or {}), **environment}, **kwargs)
            atexit.register(_end, self, run.info.run_id)
            return run

        client.create_run = create_run


def _set_up() -> None:
    arguments = arguments_of(sys.argv, sys.orig_argv)
    address = project_of(arguments)
    ours = False if address is None else is_lsa(address)
    if ours is not False and needs_stand_in(arguments):
        _use_stand_in()  # which serves no project but lsa
    if ours:
        sys.meta_path.insert(0, _FollowRun())  # type: ignore[arg-type]
        _take_signals()


_set_up()
