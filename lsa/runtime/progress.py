"""How a long computation tells its progress."""

from collections.abc import Callable

Report = Callable[..., None]
"""`report(done, total, text="")`: progress of a long computation; shown, never required."""
