"""Addresses of tracking stores: one spelling for each store, and the default in any folder."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from lsa.runtime.errors import InputError, without_passwords

TRACKING_URI, REGISTRY_URI = "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"  # MLflow's variables
SQLITE = "sqlite:///"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # whose tables MLflow makes at first use
LOOPBACK = ("127.0.0.1", "::1", "0.0.0.0")
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def shown(uri: str) -> str:
    """The address without the password that it may hold."""
    return without_passwords(uri)


def is_served(uri: str) -> bool:
    """Whether a server stands between this process and the database."""
    return uri.startswith(("http", "databricks"))


def check_kind(uri: str) -> None:
    """Refuse an address of a kind of store that MLflow gives up, such as files, or does not know.

    Raises:
        InputError: It is neither a database's nor a server's.
    """
    if not (is_served(uri) or uri.startswith(DATABASES)):
        raise InputError(
            f"the store {shown(uri)} is neither a database nor a server; set MLFLOW_TRACKING_URI "
            "to sqlite:///folder/mlflow.db, postgresql://user@host/name or http://host:5000"
        )


def check_registry(tracking: str, registry: str) -> None:
    """Refuse a registry that could not register the checkpoints of the tracking store.

    A server looks for a checkpoint in its own store; for a database, MLflow looks from here.

    Raises:
        InputError: It is a server, and not the tracking store's.
    """
    if registry.startswith("http") and canonical(registry) != canonical(tracking):
        raise InputError(
            f"the registry {shown(registry)} is a server that cannot register what is in the store "
            f"{shown(tracking)}; unset MLFLOW_REGISTRY_URI, or set it to the store's address or a "
            "database"
        )


def file_of(uri: str) -> Path | None:
    """The SQLite file of an address; None for any other store."""
    from sqlalchemy import make_url  # slow to import, and not needed for a server's address

    database = make_url(uri).database if uri.startswith(SQLITE) else None
    return Path(database) if database else None


def of_file(path: Path) -> str:
    """The address of a SQLite file.

    Versions of SQLAlchemy differ in whether `%20` in an address is a space.

    Raises:
        InputError: No address can hold the file's path.
    """
    for written in (str(path), str(path).replace("%", "%25").replace("?", "%3F")):
        if file_of(SQLITE + written) == path:
            return SQLITE + written
    raise InputError(
        f"the path {path} holds a '?', which no address of a SQLite store can hold; start in "
        "another folder, or set MLFLOW_TRACKING_URI"
    )


def absolute(uri: str) -> str:
    """The address with a relative SQLite file resolved against the current folder."""
    file, _, options = uri.removeprefix(SQLITE).partition("?")
    if not uri.startswith(SQLITE) or not file or file.startswith(("/", ":", "file:")):
        return uri
    return of_file(Path.cwd() / file) + (f"?{options}" if options else "")


def decoded(uri: str) -> str:
    """MLflow's default address as SQLAlchemy reads it.

    MLflow encodes the current folder, and makes a folder of that name beside it.

    Raises:
        InputError: No address can hold the folder's name.
    """
    if not uri.startswith(SQLITE):
        return uri
    return of_file(Path(unquote(uri.removeprefix(SQLITE))))


def canonical(uri: str) -> str:
    """One spelling for all addresses of a store: by this, processes know that they share one.

    A SQLite file is named by its path without links; of a server's address, neither the user, the
    driver, the spelling of the loopback host nor the usual port counts.
    """
    file = file_of(uri)
    if file is not None:
        return SQLITE + os.path.realpath(file)
    parts = urlsplit(uri)
    try:
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:  # no number: MLflow will refuse it
        return shown(uri)
    scheme = re.sub(r"^postgres$", "postgresql", parts.scheme.partition("+")[0].lower())
    host = "localhost" if host in LOOPBACK else host
    if port and port != PORTS.get(scheme):
        host += f":{port}"
    return shown(urlunsplit((scheme, host, parts.path.rstrip("/"), parts.query, "")))


def step_name(uri: str, key: str) -> str:
    """File name for a step of a store: a hash of 32 characters.

    Two stores may be used from one folder, and the same step is then another step.

    Args:
        uri: Any address of the store.
        key: Of the step.
    """
    return hashlib.sha256(f"{canonical(uri)}\0{key}".encode()).hexdigest()[:32]
