"""A project: one experimental setting as a YAML file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, Field, PrivateAttr
from pydantic_core import PydanticCustomError

from lsa import probe
from lsa.probe.options import converted
from lsa.project.factories import is_own, nearest, package, permission
from lsa.project.sections import (
    ELSEWHERE,
    Name,
    Named,
    Options,
    Recipe,
    Section,
    Seed,
    Split,
    Train,
    validated,
)
from lsa.runtime import arguments, documents
from lsa.runtime.errors import InputError

DEFAULT = "digits"
TRAJECTORY = "trajectory."  # + name of a probe: the step that runs it along a training


def _distinct(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise PydanticCustomError("distinct", "distinct: a seed given twice is the same training")
    return seeds


class Project(Section):
    """A project file, validated."""

    name: Name
    dataset: Named
    model: Named
    loss: Named = Named(name="cross_entropy")
    objective: Named | None = None  # instead of a loss, on batches
    train: Train = Train()
    optimizers: dict[Name, Named] = Field(min_length=1)
    seeds: Annotated[list[Seed], AfterValidator(_distinct)] = Field([0], min_length=1)
    landscape: Split = Split()
    probes: dict[str, Options | None] = Field({})
    pairs: dict[str, Options | None] = Field({})
    trajectory: dict[str, Options | None] = Field({})  # probes along each training
    _source: str = PrivateAttr("")  # the file's path, where it was given by one

    @pydantic.field_validator("optimizers", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """`{checkpoints: […]}` needs no name: other code did these trainings."""
        if not isinstance(given, dict):
            return given
        return {
            key: {"name": ELSEWHERE, **rule}
            if isinstance(rule, dict) and "checkpoints" in rule and "name" not in rule
            else rule
            for key, rule in given.items()
        }

    def registered(self, optimizer: str, seed: int) -> str | None:
        """The checkpoint of a training that other code did; None where lsa trains.

        Raises:
            InputError: The project does not list one for each of its seeds.
        """
        rule = self.optimizers[optimizer]
        if rule.name != ELSEWHERE:
            return None
        listed = rule.options.get("checkpoints")
        right = isinstance(listed, list) and all(isinstance(name, str) for name in listed)
        if not right or not listed or len(listed) != len(self.seeds) or seed not in self.seeds:
            raise InputError(
                f"project {self.name}: optimizers.{optimizer} lists the checkpoints {listed!r}; "
                f"give one run ID or address for each of the seeds {self.seeds}"
            )
        return listed[self.seeds.index(seed)]

    @property
    def reference(self) -> str:
        """Name or path of the project on a command line."""
        return self._source or self.name

    def recipe(self, optimizer: str, seed: int | None = None, **overrides: Any) -> Recipe:
        """The recipe of one run; `epochs`, `batch_size` and `lr` may be overridden.

        That of a training elsewhere says of what landscape the checkpoint is, and cannot be run.

        Raises:
            InputError: An optimizer that the project does not name, or a bad override.
        """
        if arguments.text("optimizer", optimizer) not in self.optimizers:
            raise InputError(
                f"unknown optimizer {optimizer!r}; project {self.name} names "
                f"{', '.join(self.optimizers)}.{nearest(optimizer, self.optimizers)} "
                "Add it under `optimizers:` in the project's file"
            )
        rule = self.optimizers[optimizer].model_dump()
        if rule["name"] == ELSEWHERE and any(value is not None for value in overrides.values()):
            raise InputError(
                f"{self.name}.{optimizer} was trained elsewhere, so {', '.join(overrides)} cannot "
                "be changed; choose an optimizer that lsa trains"
            )
        rule |= {k: v for k, v in overrides.items() if k == "lr" and v is not None}
        budget = {k: v for k, v in overrides.items() if k != "lr" and v is not None}
        return validated(
            Recipe,
            f"training of {self.name}/{optimizer}",
            {
                "project": self.name,
                "optimizer": optimizer,
                "seed": self.seeds[0] if seed is None else seed,
                "dataset": self.dataset.model_dump(),
                "model": self.model.model_dump(),
                "train": self.train.model_dump() | budget,
                "rule": rule,
                "landscape": self.landscape.model_dump(),
                "loss": self.loss.model_dump(),
                "objective": self.objective and self.objective.model_dump(),
                "origin": {} if rule["name"] == ELSEWHERE else None,
            },
        )

    def options(self, declared: probe.Probe, *, trajectory: bool = False) -> dict[str, Any]:
        """The project's options for a probe, or for it along trainings, over the defaults."""
        section = self.trajectory if trajectory else self.pairs if declared.pair else self.probes
        return resolve(declared, section.get(declared.name) or {}, f"project {self.name}")


def resolve(declared: probe.Probe, given: Options, where: str) -> dict[str, Any]:
    """All options of a probe: what is given, checked and converted, then the defaults.

    Raises:
        InputError: An unknown option or a value of the wrong type.
    """
    for key in given:
        if key not in declared.options:
            raise InputError(
                f"{where}: probe {declared.name} has no option {key!r}."
                f"{nearest(key, declared.options)} Known: {', '.join(declared.options)}"
            )
    resolved = {}
    for option in declared.options.values():
        value = given.get(option.name, option.default)
        said = f"{where}: {declared.name}'s {option.name}"
        resolved[option.name] = converted(option.type, value, said, option.default, option.rules)
    return resolved


def load(name: str | os.PathLike[str] = DEFAULT) -> Project:
    """The project of that name, or of a YAML file's path.

    A name is looked up in `projects/` here, then among the projects that come with lsa.

    Raises:
        InputError: No such project, or a file that breaks a rule.
    """
    name = arguments.text("project", name)
    path = _locate(name)
    content = documents.read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold sections such as `dataset:`; see projects/digits.yaml")
    project = validated(Project, str(path), {"name": path.stem} | content)
    _check_probes(project, path)
    if name.endswith((".yaml", ".yml")):
        project._source = name
    return project


def _check_probes(project: Project, path: Path) -> None:
    for name in project.optimizers:
        project.registered(name, project.seeds[0])
    for section, pair in ((project.probes, False), (project.pairs, True)):
        for name in section:
            declared = probe.find(name)
            if declared.pair != pair:
                right = "pairs" if declared.pair else "probes"
                raise InputError(f"{path}: probe {name} belongs under `{right}:`; move it there")
            project.options(declared)
    for name in project.trajectory:
        declared = probe.find(name)
        check_per_checkpoint(declared, f"{path}: trajectory", project.train)
        project.options(declared, trajectory=True)


def check_per_checkpoint(declared: probe.Probe, where: str, budget: Train | None = None) -> None:
    """Refuse a probe that cannot measure the checkpoints of one training one by one.

    Raises:
        InputError: It takes two checkpoints, or trains by itself from the initial weights; or the
            budget keeps no checkpoints on the way.
    """
    if not declared.per_checkpoint:
        reason = "takes two checkpoints" if declared.pair else "trains from the initial weights"
        raise InputError(
            f"{where}: probe {declared.name} {reason}, so it has no "
            "trajectory of one training; choose another, such as lanczos"
        )
    if budget is not None and not budget.checkpoint_every:
        raise InputError(
            f"{where}: {declared.name} needs checkpoints on the way; set train.checkpoint_every in "
            "the project"
        )


def train_params(recipe: Recipe) -> dict[str, Any]:
    """The parameters that a training run logs."""
    described = {
        "project": recipe.project,
        "optimizer": recipe.optimizer,
        "seed": recipe.seed,
        "model": recipe.model.name,
        "dataset": recipe.dataset.name,
        "loss": (recipe.objective or recipe.loss).name,
    }
    rule = {f"optimizer.{k}": v for k, v in recipe.rule.model_dump().items()}
    if recipe.origin:  # how it was trained is not known beyond the optimizer, if that
        return described if recipe.rule.name == ELSEWHERE else described | rule
    budget = {
        "epochs": recipe.train.epochs,
        "batch_size": recipe.train.batch_size,
        "schedule": recipe.train.schedule.name,
    }
    return described | budget | rule


def form(recipe: Recipe) -> str:
    """Fingerprint of what decides a training and is no parameter of its run.

    That is the options of data, network, loss and schedule, augmentation, clipping and averages.
    Left out is what changes no training: measurements during it, and which checkpoints are kept.
    """
    beside = {"epochs", "batch_size", "checkpoint_every", "noise_scale", "watch"}
    # Without defaults, so that a new key with one changes nothing.
    content = recipe.train.model_dump(exclude=beside, exclude_defaults=True)
    for name in ("dataset", "model", "loss", "objective"):
        part = getattr(recipe, name)
        content[name] = part and part.model_dump()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def folders() -> list[Path]:
    """Folders in which projects are looked up, the nearest first."""
    package = Path(__file__).parent.parent
    return [Path("projects"), package.parent / "projects", package / "_projects"]


def trusted_by(recipe: Recipe) -> tuple[str, ...]:
    """Packages and the dataset that a project file on this machine names.

    Naming them there is trusting them: the packages to run, the dataset to be fetched.
    """
    packages = dict.fromkeys(package(name) for name in _constructors(recipe) if ":" in name)
    dataset = recipe.dataset
    return (
        *packages,
        *([] if ":" in dataset.name else [permission(dataset.name, dataset.options)]),
    )


def own_modules(recipe: Recipe) -> list[str]:
    """Modules outside lsa and torch that a recipe names."""
    names = {name.partition(":")[0] for name in _constructors(recipe) if is_own(name)}
    return sorted(names)


def _constructors(recipe: Recipe) -> list[str]:
    named = [recipe.model, recipe.rule, recipe.dataset, recipe.loss, recipe.train.schedule]
    named += [recipe.objective] if recipe.objective else []
    return [part.name for part in named]


def _locate(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if _is_file(Path(name)):
            return Path(name)
        raise InputError(f"there is no project file {name}; give a path that exists")
    for folder in folders():
        if _is_file(folder / f"{name}.yaml"):
            return folder / f"{name}.yaml"
    known = sorted({p.stem for folder in folders() for p in folder.glob("*.yaml")})
    raise InputError(
        f"unknown project {name!r}; known: {', '.join(known) or 'none'}.{nearest(name, known)} "
        f"Add projects/{name}.yaml, or give the path of a YAML file"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name longer than any, or with a zero in it
        return False
