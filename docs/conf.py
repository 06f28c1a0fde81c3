"""Settings of the documentation's site: `make docs` builds it into `site/`.

Nothing of the built pages comes from a network: fonts, search and scripts are local.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the API reference is that of this tree

project = "lsa"
author = "The lsa contributors"
copyright = "the lsa contributors, MIT licence"
version = release = metadata.version("loss-landscape-analysis")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["**/.ipynb_checkpoints"]

myst_heading_anchors = 3  # links to #headings are checked, down to ###

nb_execution_mode = "cache"  # a notebook runs again when its code has changed
nb_execution_cache_path = str(ROOT / "build" / "notebooks")
nb_execution_timeout = 600  # seconds a cell; a minute a notebook on a free machine
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"  # warnings of libraries
nb_ipywidgets_js: dict = {}  # they would come from a network

html_theme = "furo"
html_title = "lsa"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5cad", "color-brand-content": "#0b5cad"},
    "dark_css_variables": {"color-brand-primary": "#7db8f0", "color-brand-content": "#7db8f0"},
}
html_show_sourcelink = False
html_show_search_summary = False  # a browser may not fetch them from files
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures name the arguments; the text gives shapes and units
autodoc_mock_imports = ["lightning", "transformers"]  # the callbacks' bases, which need not be here
default_role = "literal"  # `x` in a docstring is code


def _plain(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text: |x|, *x and x_ outside of backticks mean themselves."""
    code = False
    for i, line in enumerate(lines):
        parts = line.split("`")
        for j, part in enumerate(parts):
            if not code:
                parts[j] = re.sub(r"(?<!\\)([|*]|_(?!\w))", r"\\\1", part)
            code ^= j < len(parts) - 1
        lines[i] = "`".join(parts)


def setup(app) -> None:
    """Connects what the settings cannot say."""
    app.connect("autodoc-process-docstring", _plain, priority=100)
