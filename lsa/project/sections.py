"""The sections of a project file and the recipe of one training, with their rules."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, ConfigDict, Field

from lsa.probe.options import broken_rule
from lsa.project.factories import nearest
from lsa.runtime.errors import InputError

ELSEWHERE = "elsewhere"  # name of an optimizer's rule where other code did the training


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", text):
        raise ValueError("a name of the letters A to z, digits, _ and -, not beginning with _ or -")
    return text


Name = Annotated[str, AfterValidator(_name)]
# Strict, because `true`, "3" and 3.0 are no counts that anybody means.
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]  # what torch's generators take
Count = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Positive = Annotated[int, Field(ge=1, lt=2**31, strict=True)]
Options = dict[str, Any]  # of a constructor, checked by it


class Section(pydantic.BaseModel):
    """A part of a project file: no unknown keys, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Named(Section):
    """A constructor by name with its options: dataset, model, loss, optimizer or schedule."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @pydantic.model_validator(mode="after")
    def _plain(self) -> Named:
        for key, value in (self.__pydantic_extra__ or {}).items():
            if not _is_plain(value):
                kind = type(value).__name__
                raise ValueError(f"of plain values, but {key} holds a {kind}: {value!r}")
        return self

    @property
    def options(self) -> Options:
        """Everything beside the name."""
        return dict(self.__pydantic_extra__ or {})


def _is_plain(value: Any) -> bool:
    """Whether JSON can say it: descriptions travel with checkpoints as JSON."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


class Augment(Section):
    """Random crops and flips of the training batches; none by default."""

    crop: Count = 0
    flip: bool = False


class Watching(Section):
    """Options of `lsa.watch` during the training, by the same names."""

    every: Positive = 100  # steps between measurements on the probe set
    samples: Positive = 256  # of the training split, in the probe set
    measure: list[
        Literal[
            "update", "noise", "noise_of_blocks", "noise_of_samples", "sharpness", "lambda_max",
            "batch_sharpness",
        ]
    ] = ["update", "noise"]  # fmt: skip
    norms: Positive = 1
    budget: Annotated[float, Field(gt=0, le=1)] | None = 0.02


class Train(Section):
    """The training budget, the same for every optimizer of a project."""

    epochs: Positive = 30
    batch_size: Positive = 64
    schedule: Named = Named(name="constant")
    augment: Augment = Augment()
    checkpoint_every: Count = 0  # epochs; 0 keeps the final one alone
    noise_scale: bool = True  # measured after every epoch, beside the training
    clip_norm: Annotated[float, Field(gt=0)] | None = None  # of the gradient, at most
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of averaged weights, then kept
    watch: Watching | None = None  # measurements between steps; the training is the same without

    def keeps(self, epoch: int) -> bool:
        """Whether an epoch's checkpoint is kept; 0 is before training, the last always is."""
        every = self.checkpoint_every
        return epoch == self.epochs or (every > 0 and epoch % every == 0)


class Split(Section):
    """The part of the training split on which the landscape is measured.

    A subset makes probes affordable and is biased: λ_max up, λ_min down (Jensen), so its size is
    logged with every number. `all` takes the whole split.
    """

    samples: int | Literal["all"] = 2048

    @pydantic.field_validator("samples", mode="before")
    @classmethod
    def _counted(cls, given: Any) -> Any:
        if given != "all" and (type(given) is not int or not 1 <= given < 2**31):
            raise ValueError("a whole number from 1 to 2147483647, or all")
        return given


class Origin(Section):
    """Facts about a training by other code, beside its weights."""

    batch_size: Annotated[int, Field(ge=1)] | None = None


class Recipe(Section):
    """Everything that rebuilds one training run and the landscape that it moved in."""

    project: Name
    optimizer: Name
    seed: Seed
    dataset: Named
    model: Named
    train: Train
    rule: Named  # the optimizer's class and options
    landscape: Split
    loss: Named = Named(name="cross_entropy")
    objective: Named | None = None  # instead of a loss, on batches
    origin: Origin | None = None  # of what other code trained: its start is not known


def validated(model: type[Any], where: str, content: dict[str, Any]) -> Any:
    """`content` as `model`, or the first broken rule in one line."""
    try:
        return model.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _fields(model, first["loc"][:-1])
            key = str(first["loc"][-1])
            raise InputError(
                f"{where}: unknown key {path!r}.{nearest(key, known)} Known: {', '.join(known)}"
            ) from None
        raise InputError(f"{where}: {first_rule(error)}; correct it") from None


def first_rule(error: pydantic.ValidationError) -> str:
    """The first rule that a document breaks, with the place and the value."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{path} is missing"
    if first["loc"][-1:] == ("[key]",):
        above = ".".join(str(part) for part in first["loc"][:-2])
        return f"{above}: {first['input']!r} must be {broken_rule(error)}"
    return f"{path}={first['input']!r} must be {broken_rule(error)}"


def _fields(model: Any, path: tuple[Any, ...]) -> list[str]:
    """Keys known at a place inside nested sections."""
    for part in path:
        model = model.model_fields[part].annotation
    return list(model.model_fields)
