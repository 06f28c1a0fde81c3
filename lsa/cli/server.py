"""The commands about the tracking server: starting one, and giving it what it has missed."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

TEXT = Optional[str]  # noqa: UP045 (typer reads it on every Python)


def server(
    *,
    folder: Annotated[
        str, typer.Option(help="folder for database, files and logins")
    ] = "mlflow-server",
    store: Annotated[
        TEXT,
        typer.Option(
            help="database: postgresql://user@host/name, with the password in PGPASSWORD; or set "
            "MLFLOW_BACKEND_STORE_URI to an address with it",
            show_default="SQLite in the folder",
        ),
    ] = None,
    artifacts: Annotated[
        TEXT,
        typer.Option(
            help="where files lie: s3://bucket/… or a folder", show_default="in the folder"
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="network interface to listen on; 0.0.0.0 is all")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on", min=1, max=65535)] = 5000,
    allowed_hosts: Annotated[
        TEXT,
        typer.Option(
            help="names by which clients call this server, comma-separated",
            show_default="this machine's own",
        ),
    ] = None,
    origins: Annotated[
        TEXT,
        typer.Option(
            help="addresses of other web pages that may call it: https://…",
            show_default="this machine's own",
        ),
    ] = None,
    auth: Annotated[
        bool,
        typer.Option(
            "--auth",
            help="ask for a login; MLFLOW_AUTH_ADMIN_PASSWORD is that of the first user, admin",
        ),
    ] = False,
    workers: Annotated[int, typer.Option(help="number of server processes", min=1)] = 2,
) -> None:
    """Start MLflow's tracking server, for several people or machines."""
    from pathlib import Path

    from lsa.tracking import server as servers

    wanted = servers.Server(
        folder=Path(folder).resolve(),
        store=store or "",
        artifacts=artifacts or "",
        host=host,
        port=port,
        allowed_hosts=_listed(allowed_hosts),
        origins=_listed(origins),
        auth=auth,
        workers=workers,
    )
    if not auth and host not in servers.LOOPBACK:
        print("note: without --auth everyone who reaches this port may change everything")
    called = host if host not in servers.ANYWHERE else wanted.allowed_hosts[:1] or ("this machine",)
    address = f"http://{servers.in_address(''.join(called))}:{port}"
    print(f"clients: export MLFLOW_TRACKING_URI={address}", flush=True)
    servers.serve(wanted)


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (text or "").split(",")))


def sync() -> None:
    """Log what has been measured while the tracking store did not answer."""
    from lsa.tracking import spool
    from lsa.tracking import sync as delivery

    deliveries = list(map(_told, delivery.sync()))
    if not deliveries:
        print(f"nothing waits in {spool.folder()}")
    stay = sum(not delivered for delivered in deliveries)
    if stay:
        raise spool.NotLogged(f"{stay} of {len(deliveries)} entries stay in {spool.folder()}")


def _told(delivery: tuple[str, str]) -> bool:
    """Print what became of an entry; whether there is nothing left to do."""
    from lsa.tracking import late

    name, end = delivery
    print(f"{name}: {end}", flush=True)
    return end.startswith(("run ", late.REMOVED))
