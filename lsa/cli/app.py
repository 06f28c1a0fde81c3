"""The command line: a loop over the registry of probes.

Help and completion import neither torch nor mlflow: only the command that is called is built in
full, from the text of its probe where that is enough.
Options keep MLflow's spelling as well as the shell's (`--max_products` and `--max-products`).
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Optional

import typer

from lsa.cli.adopt import adopt
from lsa.cli.doctor import doctor
from lsa.cli.explore import explore
from lsa.cli.probe import command as probe_command
from lsa.cli.report import compare, report
from lsa.cli.server import server, sync
from lsa.cli.show import checkpoints, print_result, probes, show
from lsa.cli.study import DEVICE, PROJECT, mode_graph, study
from lsa.probe import outline
from lsa.runtime import failures, ranks, signals
from lsa.runtime.errors import Diverged, InputError, plain
from lsa.tracking import attached, spool

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
}
EXIT_FAILURE, EXIT_INPUT = 1, 2
EXIT_PIPE = 141  # as of a program that SIGPIPE ends
EXIT_NOT_LOGGED = 75  # as of a mail that could not be delivered yet (sysexits.h)
# Module that a tracking store's address asks for -> what to install.
DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
# Click's usage error; typer carries its own copy of click, so its own is the one raised.
UsageError: Any = typer.BadParameter.__bases__[0]


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 2 for bad input and 1 for what the machine refuses (one plain line on
        stderr), 75 when something is measured and not logged (also one), 130 or 143 after a signal,
        141 when nobody reads the output any more.
    """
    attached.take()
    # torch's own forward mode says this to people who cannot do anything about it.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
    words = arguments or _being_completed()
    wanted = next((word for word in words if not word.startswith("-")), None)
    if ranks.size() > 1 and wanted not in (None, *outline.summaries()):
        return _refused(
            f"{wanted} runs in one process; start it without torchrun, as probes do not", EXIT_INPUT
        )
    command = typer.main.get_command(application(wanted))
    with signals.caught():
        try:
            try:
                code = command.main(args=list(arguments), prog_name="lsa", standalone_mode=False)
                sys.stdout.flush()  # a full disk or a closed pipe is told here, not at the exit
                return code if isinstance(code, int) else 0
            except BaseException as error:
                code = _told(error, arguments)
                if code is None:
                    raise
                return code
        except BaseException as error:  # a signal may also come while another failure is told
            stop = signals.behind(error)
            if not stop:
                raise
            return _stopped(stop)


def _told(error: BaseException, arguments: Sequence[str]) -> int | None:
    """Say a failure in one line and return the exit code; None for signals and faults of lsa."""
    if signals.behind(error):
        return None
    line = _explained(error, arguments)
    if line is not None:
        measured = isinstance(error, spool.NotLogged)
        return _refused(line, EXIT_NOT_LOGGED if measured else EXIT_INPUT)
    line = failures.explained(error)
    if line is not None:
        return _refused(line, EXIT_FAILURE)
    if failures.pipe_closed(error):
        _end_attached("KILLED", "nobody reads what it prints")
        return EXIT_PIPE
    ranks.speaks_of_failure()  # its traceback will
    return None


def _being_completed() -> list[str]:
    """Words of the command line that a shell asks to complete, without the program."""
    if "_LSA_COMPLETE" not in os.environ:
        return []
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    return line.split()[1:]


def _explained(error: BaseException, arguments: Sequence[str]) -> str | None:
    """One plain line about bad input; None for other errors."""
    if isinstance(error, UsageError):
        return _usage(error, arguments)
    if isinstance(error, InputError | Diverged | spool.NotLogged):
        return str(error)
    if type(error).__module__ == "mlflow.exceptions":
        from lsa.tracking import store

        return store.explained(error) if store.away(error) or store.barred(error) else None
    if isinstance(error, ModuleNotFoundError) and error.name in DRIVERS:
        return f"the store's database driver is missing; pip install '{DRIVERS[error.name]}'"
    return None


def _usage(error: Any, arguments: Sequence[str]) -> str:
    """Click's message with the value that it is about and where to read more, on one line."""
    message = " ".join(error.format_message().split()).rstrip(".")
    for name in getattr(getattr(error, "param", None), "opts", ()):
        spelled = [a.replace("_", "-") for a in arguments]
        if name in spelled[:-1]:
            message += f" (given: {arguments[spelled.index(name) + 1]!r})"
    path = error.ctx.command_path if error.ctx else "lsa"
    return f"{message}; see {path} --help"


def _refused(message: str, code: int) -> int:
    _end_attached("FAILED", message)
    _say(message)
    return code


def _stopped(stop: signals.Killed) -> int:
    marked = _end_attached("KILLED", f"stopped by {stop}") or stop.run_ended
    _say(f"stopped by {stop}" + ("; the run is marked KILLED" if marked else ""))
    return stop.exit_code


def _say(message: str) -> None:
    if ranks.speaks_of_failure():
        with contextlib.suppress(OSError):  # nobody reads it
            print(f"lsa: {plain(message)}", file=sys.stderr, flush=True)


def _end_attached(status: str, message: str) -> bool:
    """Under `mlflow run`, a command that stops before its step began must not stay RUNNING."""
    if not attached.run_id():
        return False
    from lsa.tracking import recording

    return recording.end_attached(status, message)


def application(wanted: str | None = None) -> typer.Typer:
    """The application, with the command `wanted` in full and only the summaries of the others."""
    app = typer.Typer(
        name="lsa",
        help="Loss-landscape analysis of optimizers, tracked with MLflow.",
        context_settings=CONTEXT,
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options_of_all)
    kept = (train, adopt, study, compare, report, explore, show, checkpoints, probes)
    for function in (*kept, doctor, server, sync):
        app.command(context_settings=CONTEXT)(function)
    app.command("mode_graph", context_settings=CONTEXT)(mode_graph)
    app.command("mlproject", hidden=True, context_settings=CONTEXT)(mlproject)
    for name, summary in outline.summaries().items():
        function, text = (probe_command(name), None) if name == wanted else (_stub, summary)
        app.command(name, help=text, context_settings=CONTEXT, rich_help_panel="Probes")(function)
    return app


def _version(asked: bool) -> None:
    if asked:
        from lsa.runtime import provenance

        print(f"lsa {provenance.versions()['lsa']}")
        raise typer.Exit


def _options_of_all(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="show the version and exit", is_eager=True, callback=_version
        ),
    ] = False,
) -> None:
    """Loss-landscape analysis of optimizers, tracked with MLflow."""


def _stub() -> None:
    """Placeholder for a command that is listed but not called."""


# --- train ------------------------------------------------------------------------------


def train(
    optimizer: Annotated[str, typer.Option(help="name of an optimizer in the project")],
    project: PROJECT = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="seed of the initial weights and of the order of batches",
            show_default="the project's first",
        ),
    ] = None,
    epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="passes over the data", show_default="the project's"),
    ] = None,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="samples per step", show_default="the project's"),
    ] = None,
    lr: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="learning rate", show_default="the project's"),
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on where an interrupted run stopped; never: start anew")
    ] = "auto",
    device: DEVICE = "auto",
) -> None:
    """Train by a project's recipe, log every epoch, register the checkpoint."""
    from lsa import project as projects
    from lsa.studies import train

    if resume not in ("auto", "never"):
        raise InputError(f"resume={resume!r} must be auto or never")
    setting = projects.load(project or projects.DEFAULT)
    recipe = setting.recipe(optimizer, seed, epochs=epochs, batch_size=batch_size, lr=lr)
    done = train.train(
        recipe, device=device, resume=resume == "auto", trusted=projects.trusted_by(recipe)
    )
    print_result(done, "final")
    print(f"run         {done.run_id}\ncheckpoint  {done.checkpoint}")


def mlproject() -> None:
    """Render the MLproject file from the registry."""
    from lsa.cli import mlproject as rendering

    print(rendering.render(), end="")
