"""Pages to explore a result in a browser: `lsa/interactive/<probe>.py` where there is one.

Each is a single file without any address in it: it works offline and asks nobody.
"""

from __future__ import annotations

import importlib
import importlib.util

from lsa.probe import Result


def pages(probe: str, result: Result, title: str) -> dict[str, str]:
    """File name → HTML of the probe's page, if it has one."""
    own = f"lsa.interactive.{probe}"
    if not importlib.util.find_spec(own):
        return {}
    return {f"{probe}.html": importlib.import_module(own).page(result, title)}
