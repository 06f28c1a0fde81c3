"""The MLproject file, rendered from the registry of probes."""

from __future__ import annotations

from lsa.probe import outline

STEPS = {
    "main": ("study", "The whole study of a project: -P project=digits"),
    "train": ("train", "Train one optimizer: -P optimizer=sgd"),
    "mode_graph": (
        "mode_graph",
        "Barriers between all checkpoints of a project: -P project=digits",
    ),
}


def render() -> str:
    """MLproject's text.

    No parameters are declared: MLflow passes every `-P name=value` on as `--name value`, and the
    command line checks it. A declared default would override the project file's options.
    """
    lines = [
        "# Rendered by `make mlproject`; `python -m lsa COMMAND --help` lists each one's options.",
        "name: lsa",
        "conda_env: conda.yaml",
        "entry_points:",
    ]
    entries = {name: value for name, value in STEPS.items()}
    entries |= {name: (name, summary) for name, summary in outline.summaries().items()}
    for name, (command, summary) in entries.items():
        lines += [f"  # {summary}", f"  {name}:", f'    command: "python -m lsa {command}"']
    return "\n".join(lines) + "\n"
