"""What of a project has been trained. A report tells of that, not of what the project plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import PurePath

from lsa.project import ELSEWHERE, Project
from lsa.reports.measurements import Measurement
from lsa.reports.statistics.comparison import listed, seeds_needed


@dataclass(frozen=True)
class Extent:
    """The optimizers that were trained, each with its seeds, in the order of the project."""

    trained: Mapping[str, tuple[int, ...]]

    @property
    def optimizers(self) -> list[str]:
        """Names of those trained."""
        return list(self.trained)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of any of them."""
        return tuple(sorted({seed for seeds in self.trained.values() for seed in seeds}))

    @property
    def pairs(self) -> int:
        """Pairs of optimizers that were trained."""
        return len(self.trained) * (len(self.trained) - 1) // 2

    @property
    def shared(self) -> int:
        """The largest number of seeds that two optimizers have in common."""
        pairs = combinations(self.trained.values(), 2)
        return max((len({*a} & {*b}) for a, b in pairs), default=0)

    @property
    def least(self) -> int:
        """Fewest seeds with which a difference between two of them can be established."""
        return seeds_needed(max(1, self.pairs))

    @property
    def limit(self) -> str:
        """How many seeds a comparison needs, and how many there are, in a sentence."""
        if not self.pairs:
            return "One optimizer is trained; a comparison needs two."
        there = {0: "they share none", 1: "there is 1"}.get(self.shared, f"there are {self.shared}")
        return (
            f"With {counted(self.pairs, 'pair')} of optimizers no difference can be "
            f"established with fewer than {self.least} seeds; {there}."
        )


def counted(number: int, noun: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def extent(measurements: Sequence[Measurement]) -> Extent:
    """The trainings among a project's measurements."""
    trained: dict[str, tuple[int, ...]] = {}
    for m in measurements:
        if m.step == "train":
            trained[m.subject] = (*trained.get(m.subject, ()), m.seed)
    return Extent(trained)


def compared(setting: Project, measurements: Sequence[Measurement]) -> str:
    """The optimizers, the training, the seeds and the samples, in a few lines."""
    known = extent(measurements)
    rules = ", ".join(rule(setting, name) for name in known.optimizers)
    lacking = [name for name in setting.optimizers if name not in known.trained]
    start = counted(len(known.trained), "optimizer")
    without = ""
    if lacking:
        start = f"{len(known.trained)} of the project's {len(setting.optimizers)} optimizers"
        without = f" Not trained so far: {', '.join(lacking)}."
    sizes = {m.done.params.get("n_samples", "") for m in measurements if m.step != "train"} - {""}
    counts = ", ".join(sorted(sizes, key=lambda size: (len(size), size)))
    samples = f"; the landscape on {counts} training samples" if sizes else ""
    return (
        f"{start}: {rules}.{without} {_training(setting, measurements)}, on "
        f"{_seeds(setting, known)}{samples}."
    )


def rule(setting: Project, name: str) -> str:
    """An optimizer with its class and options."""
    rule_of = setting.optimizers[name]
    if rule_of.name == ELSEWHERE:
        return f"{name} (trained by other code)"
    options = [f"{k}={v}" for k, v in rule_of.options.items() if k != "checkpoints"]
    return f"{name} ({' '.join([rule_of.name, *options])})"


def setting_of(setting: Project) -> str:
    """The network and its data: `simple_cnn on digits`, `mlp on 600 images of birds`."""
    name, options = setting.dataset.name, setting.dataset.options
    if name == "image_folder" and options.get("root"):
        name = f"{PurePath(str(options['root'])).name} (image_folder)"
    limit = options.get("train_limit")
    return f"{setting.model.name} on {f'{limit} images of ' if limit else ''}{name}"


def epochs(training: Measurement) -> str:
    """How long it took; of a training by other code that is not known."""
    number = training.done.params.get("epochs", "")
    return f"for {counted(int(number), 'epoch')}" if number else ""


def _training(setting: Project, measurements: Sequence[Measurement]) -> str:
    lengths = dict.fromkeys(epochs(m) or "in other code" for m in measurements if m.step == "train")
    return f"Each trained {setting_of(setting)} {' or '.join(lengths)}"


def _seeds(setting: Project, known: Extent) -> str:
    """How many seeds, and which; what the project plans beyond them, and who has fewer."""
    seeds, planned = known.seeds, len(setting.seeds)
    if len(seeds) < planned:
        count = f"{len(seeds)} of the project's {planned} training seeds"
    else:
        count = counted(len(seeds), "training seed")
    fewer = [f"{name}: {listed(own)}" for name, own in known.trained.items() if own != seeds]
    return f"{count} ({'; '.join([listed(seeds), *fewer])})"
