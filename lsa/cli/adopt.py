"""The command that registers a checkpoint of other code."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from lsa.cli.study import DEVICE
from lsa.runtime.errors import InputError

PART = "package:name, or {name: package:name, option: value}"


def adopt(
    source: Annotated[
        str,
        typer.Argument(
            help=".pt, .pth, .bin, .safetensors, Lightning's .ckpt, a Hugging Face folder, or "
            "models:/… of MLflow's flavour pytorch"
        ),
    ],
    *,
    factory: Annotated[str, typer.Option(help=f"function that makes the network: {PART}")],
    data: Annotated[str, typer.Option(help=f"function that makes both splits of the data: {PART}")],
    project: Annotated[str, typer.Option(help="project that the checkpoint belongs to")],
    loss: Annotated[
        str, typer.Option(help="cross_entropy, a loss of torch.nn, or package:name")
    ] = ("cross_entropy"),
    objective: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="objective on batches instead of a loss: hf, per_token, or package:name"),
    ] = None,
    rule: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="optimizer whose state the file holds: AdamW, {name: SGD, lr: 0.1}, …"),
    ] = None,
    name: Annotated[str, typer.Option(help="name of this training in the project")] = "theirs",
    seed: Annotated[int, typer.Option(help="seed of the training")] = 0,
    epoch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="epoch after which the weights were saved", show_default="the file's, else 0"
        ),
    ] = None,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="samples per step of the training; the probe preconditioned needs it"),
    ] = None,
    samples: Annotated[
        str, typer.Option(help="samples that the landscape is measured on: a number, or all")
    ] = "2048",
    prefix: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="text before each parameter's name in the file", show_default="recognised"
        ),
    ] = None,
    device: DEVICE = "auto",
) -> None:
    """Register a checkpoint of other code, so that every probe and study can measure it.

    Reading the file runs none of its code. Your own package makes the network and the data: who
    names it here trusts it. Who measures the checkpoint later trusts it by `--trust`.
    """
    from lsa.studies import adoption

    done = adoption.adopt(
        source,
        factory=_part(factory),
        data=_part(data),
        project=project,
        loss=_part(loss),
        objective=None if objective is None else _part(objective),
        rule=None if rule is None else _part(rule),
        prefix=prefix,
        name=name,
        seed=seed,
        epoch=epoch,
        batch_size=batch_size,
        samples=int(samples) if samples.isdecimal() else samples,
        device=device,
    )
    print(f"run         {done.run_id}\ncheckpoint  {done.checkpoint}")


def _part(text: str) -> Any:
    """A name, or a name with options as YAML writes them in one line.

    Raises:
        InputError: It begins as options do and is none.
    """
    from lsa.runtime import documents

    if not text.startswith("{"):
        return text
    part = documents.parse_yaml(text, "the option")
    if not isinstance(part, dict):
        raise InputError(f"{text!r} must be {PART}")
    return part
