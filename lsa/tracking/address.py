"""Addresses of tracking stores: one spelling for each store, and the default in any folder."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from lsa.runtime.errors import InputError, without_passwords

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


def file_of(uri: str) -> Path | None:
    """The SQLite file of an address; None for any other store."""
    if not uri.startswith(SQLITE):
        return None
    return Path(uri.removeprefix(SQLITE).partition("?")[0])


def absolute(uri: str) -> str:
    """The address with a relative SQLite file resolved against the current folder."""
    file = file_of(uri)
    if file is None or not file.name or file.is_absolute() or str(file).startswith((":", "file:")):
        return uri
    query = uri.partition("?")[1:]
    return SQLITE + os.path.abspath(file) + "".join(query)


def decoded(uri: str) -> str:
    """MLflow's default address as SQLAlchemy reads it.

    MLflow writes the current folder percent-encoded, and SQLAlchemy takes `%20` for a name.

    Raises:
        InputError: The folder's name holds a `?`, behind which SQLAlchemy reads options.
    """
    if not uri.startswith(SQLITE):
        return uri
    plain = unquote(uri)
    if "?" in plain:
        raise InputError(
            f"the folder {Path(plain.removeprefix(SQLITE)).parent} holds a '?', which no address "
            "of a SQLite store can hold; start in another folder, or set MLFLOW_TRACKING_URI"
        )
    return plain


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
    """File name of what belongs to a step of a store: 32 characters.

    Two stores may be used from one folder, and the same step is then another step.

    Args:
        uri: Any address of the store.
        key: Of the step.
    """
    return hashlib.sha256(f"{canonical(uri)}\0{key}".encode()).hexdigest()[:32]
