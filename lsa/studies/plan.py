"""The study of a project: which steps it has, which of them would run and why, and running them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from lsa import probe, project
from lsa.project import TRAJECTORY, Project, trusted_by
from lsa.project.factories import nearest
from lsa.reports import explorer, measurements
from lsa.reports import report as reports
from lsa.runtime import provenance
from lsa.runtime.errors import InputError
from lsa.studies import adoption, cost, load, overview, steps, train
from lsa.studies.handle import Handle
from lsa.studies.schedule import Study
from lsa.tracking import registered, runs
from lsa.tracking.checkpoint import load_data
from lsa.tracking.runs import Done
from lsa.training import train as training
from lsa.training.data import Data


@dataclass(frozen=True)
class Planned:
    """One step of a project's study."""

    step: str  # `train`, the probe, or `trajectory.<probe>`
    optimizers: tuple[str, ...]  # two for a pair probe
    seed: int
    seed_b: int | None = None  # of the second checkpoint, where that has another

    @property
    def label(self) -> str:
        """Name of the step in lists."""
        return f"{self.step} {' – '.join(self.optimizers)} seed {self.seed}"

    @property
    def checkpoints(self) -> list[tuple[str, int]]:
        """Optimizer and seed of each checkpoint."""
        seeds = self.seed, self.seed if self.seed_b is None else self.seed_b
        return list(zip(self.optimizers, seeds, strict=False))


@dataclass(frozen=True)
class Outlook:
    """The state of a planned step: new, changed or reused, and why."""

    planned: Planned
    state: Literal["new", "changed", "reused"]
    why: str = ""  # of a changed one: what differs from the finished run


def planned(setting: Project) -> Iterator[Planned]:
    """Every training, the probes on each checkpoint and along its training, each seed's pairs."""
    runs = [(optimizer, seed) for seed in setting.seeds for optimizer in setting.optimizers]
    for optimizer, seed in runs:
        yield Planned("train", (optimizer,), seed)
    for optimizer, seed in runs:
        for name in setting.probes:
            yield Planned(name, (optimizer,), seed)
        for name in setting.trajectory:
            yield Planned(TRAJECTORY + name, (optimizer,), seed)
    for seed in setting.seeds:
        for pair in combinations(setting.optimizers, 2):
            for name in setting.pairs:
                yield Planned(name, pair, seed)


def only(setting: Project, names: Collection[str]) -> Project:
    """The project with those of its probes alone.

    Raises:
        InputError: A name that is no probe of the project.
    """
    known = [*setting.probes, *(TRAJECTORY + name for name in setting.trajectory), *setting.pairs]
    for name in names:
        if name not in known:
            raise InputError(
                f"project {setting.name} has no probe {name!r}.{nearest(name, known)} "
                f"It has {', '.join(known)}"
            )
    chosen = {
        section: {k: v for k, v in getattr(setting, section).items() if prefix + k in names}
        for section, prefix in (("probes", ""), ("trajectory", TRAJECTORY), ("pairs", ""))
    }
    return setting.model_copy(update=chosen)


def run(setting: Project, study: Study) -> None:
    """Run every step of a project in a study, and log report and explorer of what is measured.

    Args:
        setting: The study's own project, or `only` a part of it.
        study: Its report is of all that its project names, whatever ran now.
    """
    trained: dict[tuple[str, int], Handle] = {}
    for step in planned(setting):
        if step.step == "train":
            (optimizer,) = step.optimizers
            trained[optimizer, step.seed] = study.step("train", optimizer=optimizer, seed=step.seed)
        else:
            study.step(step.step, *(trained[optimizer, step.seed] for optimizer in step.optimizers))
    study.advance()
    if study.unlogged:
        return
    if study.opened and any(handle.state in ("done", "reused") for handle in study.handles):
        overview.bring_up(study.setting, study.opened.id)
        reports.log(study.opened, reports.report(study.setting), explorer.page(study.setting))


# --- what would run, and what it costs ----------------------------------------------------------


def outlook(
    setting: Project, steps: Iterable[Planned] | None = None, *, device: str = "auto"
) -> list[Outlook]:
    """Every step of a study and whether it would run, without running any.

    `reused`: it has finished with the same options, inputs, data and code. `changed`: it has
    finished, but one of them differs, which is named. `new`: it has not. A step whose checkpoint
    is to be trained again follows it.

    Args:
        setting: The project.
        steps: Those that are meant, each after the trainings that it needs; default: all.
        device: Where they would run.
    """
    device_name = load.device_of(device)
    done = list(runs.finished_steps(setting.name))
    by_key = {run.tags["lsa.key"]: run for run in reversed(done) if "lsa.key" in run.tags}
    before = _newest(done)
    models: dict[tuple[str, int], str] = {}
    kept = registered.kept(setting.name) if setting.trajectory else ({}, {})
    outlooks = []
    for name in setting.optimizers:  # wrong options are told before anything runs
        recipe = setting.recipe(name)
        trusted = trusted_by(recipe)
        split = None if recipe.origin else load_data(recipe, device_name, trusted)
        if isinstance(split, Data):
            training.initial(recipe, split, trusted)
    for step in planned(setting) if steps is None else steps:
        subject = " – ".join(step.optimizers)
        old = before.get((step.step, subject, step.seed))
        if step.step == "train" and (listed := setting.registered(subject, step.seed)):
            recipe = setting.recipe(subject, step.seed)
            run_id = adoption.listed(listed, recipe).run_id
            models[subject, step.seed] = runs.read(run_id).tags["lsa.model_id"]
            outlooks.append(Outlook(step, "reused"))
            continue
        if step.step == "train":
            key, params = _training(setting, step, device_name)
            if key in by_key:
                models[subject, step.seed] = by_key[key].tags.get("lsa.model_id", "")
            inputs: list[str] = []
        else:
            inputs = [models.get(checkpoint, "") for checkpoint in step.checkpoints]
            key, params = _probe(setting, step, inputs, kept)
        if key in by_key and all(inputs):
            outlooks.append(Outlook(step, "reused"))
        elif old is None:
            outlooks.append(Outlook(step, "new"))
        else:
            outlooks.append(Outlook(step, "changed", _difference(old, params, inputs)))
    return outlooks


def _newest(done: list[Done]) -> dict[tuple[str, str, int], Done]:
    """The newest finished run of every step on every subject, with whatever options."""
    newest: dict[tuple[str, str, int], Done] = {}
    for run in done:
        names = [run.tags.get("optimizer", ""), *filter(None, [run.params.get("optimizer_b")])]
        seed = run.tags.get("seed")
        if seed and run.params.get("seed_b", seed) == seed:  # else a pair of a mode graph
            key = (run.tags["lsa.step"], " – ".join(names), int(seed))
            newest.setdefault(key, run)
    return newest


def _training(setting: Project, step: Planned, device: str) -> tuple[str, dict[str, Any]]:
    """Key and parameters of a training."""
    recipe = setting.recipe(step.optimizers[0], step.seed)
    split = load_data(recipe, device, trusted_by(recipe))
    key = train.train_key(recipe, split.hash, device)
    return key, project.train_params(recipe)


def _probe(
    setting: Project,
    step: Planned,
    inputs: list[str],
    kept: tuple[Mapping[str, str], Mapping[str, Mapping[int, str]]],
) -> tuple[str, dict[str, Any]]:
    """Key and options of a probe on its input models, or along the training of the one."""
    name = step.step.removeprefix(TRAJECTORY)
    declared, samples = probe.find(name), setting.landscape.samples
    options = setting.options(declared, trajectory=name != step.step)
    if name == step.step:
        return steps.probe_key(declared, options, inputs, samples), options
    (final,) = inputs
    keys, epochs = kept
    by_epoch = {**epochs.get(keys.get(final, ""), {}), setting.train.epochs: final} if final else {}
    ids = [model_id for _, model_id in sorted(by_epoch.items())]
    return steps.probe_key(declared, options, ids, samples, trajectory=True), options


def _difference(old: Done, params: Mapping[str, Any], inputs: list[str]) -> str:
    """Why a finished run cannot be reused."""
    known = [old.tags.get(f"lsa.input.{i}", "") for i, _ in zip("ab", inputs, strict=False)]
    changed = [
        f"{name}: {old.params[name]} → {value}"
        for name, value in params.items()
        if name in old.params and old.params[name] != str(value)
    ]
    torch = provenance.versions()["torch"]
    if changed:
        return ", ".join(changed)
    if known != inputs:
        return "its checkpoint is trained again" if not all(inputs) else "another checkpoint"
    if old.tags.get("lsa.version.torch") != torch:
        return f"torch {old.tags.get('lsa.version.torch')} → {torch}"
    return "code, data or samples"


@dataclass(frozen=True)
class Forecast:
    """The cost of a study's steps on this machine."""

    seconds: dict[str, float]  # of one step, by its kind
    total: float  # seconds of them all, one after the other
    peaks: dict[str, int]  # bytes of its process at the peak, by its kind
    unknown: list[str]  # kinds that say nothing of their work

    @property
    def memory(self) -> int:
        """Bytes of the largest process."""
        return max(self.peaks.values(), default=0)


def forecast(
    setting: Project, outlook: list[Outlook], *, device: str = "auto", workers: int = 1
) -> Forecast:
    """The time and memory of the steps that a study would run.

    A kind of step that the project has run on this host before is expected to take what it took
    then. The others are estimated from the work that they declare and from rates measured now.

    Args:
        setting: The project.
        found: Its steps, from `outlook`.
        device: Where steps compute.
        workers: Steps side by side.
    """
    kinds = dict.fromkeys(o.planned.step for o in outlook if o.state != "reused")
    if not kinds:
        return Forecast({}, 0.0, {}, [])
    recipe = setting.recipe(next(iter(setting.optimizers)))
    device_name, trusted = load.device_of(device), trusted_by(recipe)
    rates = cost.rates(setting, recipe, device_name, trusted, workers)
    seconds, unknown, peaks = {}, [], {}
    took = _took(setting)
    for kind in kinds:
        if kind == "train":
            estimate = cost.training(recipe, rates)
        else:
            estimate = _probing(setting, kind, rates)
        if kind in took:
            seconds[kind] = took[kind]
        elif estimate:
            seconds[kind] = estimate.seconds
        else:
            unknown.append(kind)
        peaks[kind] = estimate.memory if estimate else rates.memory
    total = sum(seconds.get(o.planned.step, 0.0) for o in outlook if o.state != "reused")
    return Forecast(seconds, total, peaks, unknown)


def _probing(setting: Project, kind: str, rates: cost.Rates) -> cost.Cost | None:
    """Cost of a probe on one checkpoint, or on all that a training keeps."""
    name = kind.removeprefix(TRAJECTORY)
    declared = probe.find(name)
    estimate = cost.probing(declared, setting.options(declared, trajectory=name != kind), rates)
    if estimate is None or name == kind:
        return estimate
    kept = sum(map(setting.train.keeps, range(setting.train.epochs + 1)))
    return cost.Cost(kept * estimate.seconds, estimate.memory)


def _took(setting: Project) -> dict[str, float]:
    """Mean seconds of the project's finished steps on this host, by their kind."""
    seconds: dict[str, list[float]] = {}
    host = provenance.host()
    for m in measurements.newest(setting):
        if m.done.tags.get("lsa.host") == host:
            seconds.setdefault(m.step, []).append(m.done.seconds)
    return {kind: sum(values) / len(values) for kind, values in seconds.items()}
