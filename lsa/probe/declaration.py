"""A probe: one function that measures something at one or two checkpoints, declared once.

    @probe(headline=("loss_rise",))
    def bump(
        landscape: Landscape, theta: Tensor, rng: torch.Generator,   # inputs, by reserved name
        *,
        radius: Annotated[float, "length of the step"] = 0.1,        # options, keyword-only
    ) -> Result:
        '''Loss rise after a random step of fixed length (Author 2020, §3).'''

The registry, the command line, the MLproject entry, the study, the logged parameters and the report
all read this one declaration. The decorated function stays the plain function.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from lsa.probe.checks import AtMost, Same
from lsa.probe.result import Result
from lsa.probe.work import Work
from lsa.runtime import arguments
from lsa.runtime.errors import InputError, NotFinite

INPUTS = {
    "landscape": "landscape of the training split (a fixed subset of it, by the project)",
    "training": "landscape of the whole training split, for probes that train",
    "validation": "landscape of the held-out split, the same network",
    "theta": "parameters of the checkpoint",
    "theta_b": "parameters of the second checkpoint; makes the probe a pair probe",
    "theta_init": "parameters from which the training run started",
    "others": "parameters of up to two further checkpoints by name, where such are given",
    "trajectory": "a function: epoch → parameters of every checkpoint that the training kept",
    "optimizer": "the optimizer as of the checkpoint: options, preconditioner and next step",
    "rng": "the probe's own random generator, on the CPU",
    "memory": "name → numbers, kept until the step has finished, though its process be killed",
    "report": "progress, `report(done, total, text)`",
}


@dataclass(frozen=True)
class Option:
    """One keyword-only option of a probe."""

    name: str
    type: Any  # int, float, str or Literal[…]
    default: int | float | str
    help: str
    rules: tuple[Any, ...] = field(default=(), compare=False)  # pydantic's, as `Field(ge=1)`


@dataclass(frozen=True)
class Probe:
    """A probe's declaration, read from its signature and docstring."""

    name: str
    function: Callable[..., Result]
    inputs: tuple[str, ...]
    options: Mapping[str, Option]
    headline: tuple[str, ...]  # metrics that stand in the comparison table
    work: Callable[..., Work] | None = None  # `work(sizes, **options)`: about what it will compute
    # What a report does with the numbers; `probe` says each.
    compare: tuple[str, ...] = ()
    check: tuple[Same | AtMost, ...] = ()
    during: tuple[str, ...] = ()
    curve: str = ""
    scale: str = ""
    between: Mapping[str, str] = field(default_factory=dict)
    caption: str = ""

    def __call__(self, *inputs: Any, **given: Any) -> Result:
        """Measure, outside of any tracking: `lsa.lanczos(landscape, k=3)`.

        Inputs come by position in the order of the probe's own signature, or by name; options by
        name. Unless given, `theta` is the landscape's, `rng` is seeded with `rng_seed` (0),
        `report` says nothing, `others`, `trajectory` and `memory` are empty, and an input with a
        default in the probe's signature has that. Inputs that the probe does not take are passed
        over.

        The landscape is checked first (`lsa.landscape.consistency`); what is off becomes a note.

        Raises:
            InputError: An input is missing, a name is neither an input nor an option, an option is
                of the wrong type, or the landscape's derivatives are plainly not its own.
        """
        import torch

        from lsa.probe.options import converted
        from lsa.runtime import modes

        if len(inputs) > len(self.inputs):
            raise InputError(
                f"probe {self.name} takes at most {len(self.inputs)} inputs by position "
                f"({', '.join(self.inputs)}); give options by name"
            )
        given = {**dict(zip(self.inputs, inputs, strict=False)), **given}
        rng_seed = arguments.whole_number("rng_seed", given.pop("rng_seed", 0))
        rng = torch.Generator().manual_seed(rng_seed)
        usual = {"rng": rng, "report": lambda *_: None}
        usual |= {"others": {}, "trajectory": dict, "memory": {}, **self.optional}
        given = {**usual, **given}
        if hasattr(given.get("landscape"), "landscape"):
            raise InputError(
                f"probe {self.name} takes a landscape, and this is a checkpoint; give its "
                f".landscape and .theta, or write lsa.measure({self.name!r}, checkpoint)"
            )
        if "theta" not in given and "landscape" in given:
            given["theta"] = given["landscape"].theta
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and value.is_inference():
                with torch.inference_mode(False):
                    given[name] = value.clone()
        missing = [name for name in self.inputs if name not in given]
        if missing:
            raise InputError(
                f"probe {self.name} needs {missing[0]} ({INPUTS[missing[0]]}); give {missing[0]}=…"
            )
        options = {name: value for name, value in given.items() if name not in INPUTS}
        for name, value in options.items():
            option = self.options.get(name)
            if option is None:
                raise InputError(
                    f"probe {self.name} has no option {name!r}; known: {', '.join(self.options)}"
                )
            said = f"probe {self.name}: {name}"
            options[name] = converted(option.type, value, said, option.default, option.rules)
        with modes.usual(torch.get_default_dtype()):
            result, doubts = self._measured(given, options)
        return replace(result, probe=self.name, notes=(*result.notes, *doubts))

    def _measured(
        self, given: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Result, tuple[str, ...]]:
        """The result, and what is off with the landscape that it is of."""
        doubts = self._doubts(given)
        try:
            result = self.function(*(given[name] for name in self.inputs), **options)
        except NotFinite as error:
            named = self._culprit(given)
            raise InputError("; ".join(named)) if named else error from None
        if not isinstance(result, Result):
            kind = type(result).__name__
            raise TypeError(f"probe {self.name!r} returns a {kind}; return lsa.Result({{…}})")
        if not all(math.isfinite(metric.value) for metric in result.metrics.values()):
            doubts = (*doubts, *self._culprit(given))
        return result, (*doubts, *self._remarks(given))

    def _remarks(self, given: Mapping[str, Any]) -> list[str]:
        """Notes of the landscapes on numbers that they did not compute exactly."""
        names = [n for n in ("landscape", "training", "validation") if n in self.inputs]
        return [*dict.fromkeys(text for n in names for text in given[n].remarks.values())]

    def _culprit(self, given: Mapping[str, Any]) -> tuple[str, ...]:
        """The sample whose loss is not finite, in one line; empty where there is none."""
        from lsa.landscape import finite

        split = next((given[n] for n in ("landscape", "training") if n in self.inputs), None)
        named = finite.culprit(split, given["theta"]) if split and "theta" in self.inputs else ""
        return (named,) if named else ()

    def __post_init__(self) -> None:
        """Set the docstring that `help` and notebooks show."""
        object.__setattr__(self, "__doc__", self.doc)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.function)

    def _doubts(self, given: Mapping[str, Any]) -> tuple[str, ...]:
        """Notes from the checks of the landscape, before it is measured."""
        from lsa.landscape import consistency

        landscapes = [given[name] for name in ("landscape", "training") if name in self.inputs]
        if not landscapes or "theta" not in self.inputs:
            return ()
        return consistency.notes(landscapes[0], given["theta"])

    @property
    def optional(self) -> dict[str, Any]:
        """The optional inputs, with their defaults."""
        own = self.__signature__.parameters
        return {
            n: own[n].default for n in self.inputs if own[n].default is not inspect.Parameter.empty
        }

    @property
    def pair(self) -> bool:
        """Whether the probe takes a second checkpoint."""
        return "theta_b" in self.inputs

    @property
    def most(self) -> int:
        """Most checkpoints that the probe takes; fewer are allowed only with the input `others`."""
        return 3 if "others" in self.inputs else 1 + self.pair

    @property
    def per_checkpoint(self) -> bool:
        """Whether it measures checkpoints one by one, so that a training has a trajectory of it."""
        return not self.pair and "theta_init" not in self.inputs

    @property
    def doc(self) -> str:
        """The docstring."""
        return inspect.getdoc(self.function) or ""

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return self.doc.splitlines()[0]


# Names that lsa itself has beside a probe's.
COMMANDS = {
    "adopt", "checkpoints", "compare", "doctor", "explore", "mlproject", "mode_graph", "probes",
    "register", "report", "server", "show", "study", "sync", "train",
}  # fmt: skip
SELECTORS = {
    "dataset", "device", "help", "model", "n_samples", "name", "plan", "project", "reuse",
    "rng_seed", "samples", "trust",
}  # fmt: skip
PROBES: dict[str, Probe] = {}


def probe(
    *,
    headline: tuple[str, ...] = (),
    work: Callable[..., Work] | None = None,
    compare: tuple[str, ...] = (),
    check: tuple[Same | AtMost, ...] = (),
    during: tuple[str, ...] = (),
    curve: str = "",
    scale: str = "",
    between: Mapping[str, str] | None = None,
    caption: str = "",
) -> Callable[[Callable], Callable]:
    """Register a function as a probe named like the function.

    Args:
        headline: Names of the metrics that go into the comparison table.
        work: `work(sizes, **options)`: about what it will compute, for the plan of a study.
        compare: Headline metrics that change while training goes on, as curvature does: the report
            compares optimizers on them at equal train loss as well.
        check: Agreements with other numbers that the report checks.
        during: Metrics that the report draws against the epoch; none: the first headline metric.
        curve: The curve that the report draws of all checkpoints; none: the first.
        scale: The metric that turns this curve's x, relative to each checkpoint, into lengths that
            compare; the report draws the range that all checkpoints have.
        between: Of a probe of a path between two checkpoints, curve → name of the path, for the
            figure in which the report overlays all paths of a pair.
        caption: What to see in the report's figure, and what not to conclude; none: the first line
            of the docstring.

    Raises:
        TypeError: At import, when the declaration is not a probe's: no docstring, an unknown
            input, an option without default, help or a plain type, a name taken elsewhere or by
            lsa, names that are not in a tuple, or metrics to compare that are not in the headline.
    """

    def register(function: Callable) -> Callable:
        _check_names(function.__name__, headline=headline, compare=compare, during=during)
        if others := sorted({*compare} - {*headline}):
            raise TypeError(
                f"probe {function.__name__!r}: compare has {others[0]!r}, which is not in headline"
            )
        reported = (compare, check, during, curve, scale, between or {}, caption)
        declared = Probe(*_read(function), headline, work, *reported)
        taken = PROBES.get(declared.name)
        if taken and taken.function.__module__ != function.__module__:
            raise TypeError(
                f"probe {declared.name!r} is declared in both {taken.function.__module__} "
                f"and {function.__module__}; rename one"
            )
        PROBES[declared.name] = declared
        return function

    return register


def _check_names(name: str, **given: tuple[str, ...]) -> None:
    for what, names in given.items():
        if isinstance(names, str):
            raise TypeError(f"probe {name!r}: {what} is text; write ({names!r},)")


def _read(function: Callable) -> tuple[str, Callable, tuple[str, ...], dict[str, Option]]:
    """Name, function, inputs and options in a function's signature, or TypeError."""
    name = function.__name__
    if not inspect.getdoc(function):
        raise TypeError(f"probe {name!r} has no docstring; it is the help text, so write one")
    if name in COMMANDS:
        raise TypeError(f"probe {name!r} has the name of a command of lsa; rename it")
    hints = typing.get_type_hints(function, include_extras=True)
    inputs, options = [], {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            if parameter.name not in INPUTS:
                raise TypeError(
                    f"probe {name!r} has the unknown input {parameter.name!r}; inputs are "
                    f"{', '.join(INPUTS)}, options are keyword-only (after a *)"
                )
            inputs.append(parameter.name)
        else:
            options[parameter.name] = _option(name, parameter, hints.get(parameter.name))
    along = not {"theta_b", "theta_init"} & {*inputs}  # its command has --epochs then
    if taken := next((o for o in options if _is_taken(o) or (along and o == "epochs")), None):
        raise TypeError(
            f"probe {name!r}: option {taken!r} has a name that every probe has already, as an "
            "input, an option or a parameter of its run; rename it"
        )
    return name, function, tuple(inputs), options


def _is_taken(option: str) -> bool:
    """Whether an input, an option of every probe or a parameter of its run has this name."""
    stem = option.removesuffix("_b").removesuffix("_c")
    return stem in ("optimizer", "seed", "checkpoint") or option in {*SELECTORS, *INPUTS}


def _option(name: str, parameter: inspect.Parameter, hint: Any) -> Option:
    if parameter.default is parameter.empty:
        raise TypeError(f"probe {name!r}: option {parameter.name!r} needs a default")
    if typing.get_origin(hint) is not Annotated or not isinstance(hint.__metadata__[0], str):
        raise TypeError(f'probe {name!r}: write {parameter.name}: Annotated[type, "help"] = …')
    kind = hint.__origin__
    # MLflow passes every option as `--name value`: a flag would not parse, so no booleans.
    if kind not in (int, float, str) and typing.get_origin(kind) is not Literal:
        raise TypeError(
            f"probe {name!r}: option {parameter.name!r} is a {kind}; use int, float, str or "
            "Literal[…] (for yes/no, a Literal)"
        )
    words, *rules = hint.__metadata__
    return Option(parameter.name, kind, parameter.default, words, tuple(rules))
