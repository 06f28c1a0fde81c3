"""From a name and options in a project file to a call: what may be imported, what may be passed.

Descriptions of models and optimizers travel with checkpoints, so a name may come from a stranger.
Names without a colon stand for what `lsa`, torch and torchvision offer. `package.module:attribute`
runs the package's code on import, so it needs the local user's trust in that package, unless the
module is one of `OPEN`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic

from lsa.runtime.errors import InputError

INSTALLED = ("lsa", "torch", "torchvision")
# Modules of these, with all below them, that may be imported without trust: networks and optimizers
# are defined in them, and an import has no other effect.
OPEN = ("torch.nn", "torch.optim", "torchvision.models", "torchvision.ops", "lsa.training")

Number = Annotated[int | float, pydantic.Field(allow_inf_nan=False)]


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`, as ` Did you mean 'x'?`, or an empty string."""
    by_folded = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1)
    return f" Did you mean {by_folded[close[0]]!r}?" if close else ""


def load(name: str, base: type, trusted: Collection[str]) -> Callable[..., Any]:
    """Import `package.module:attribute` under the trust rule.

    A trusted package may offer any callable. Without trust only classes derived from `base` are
    taken, and only out of `OPEN`: other functions of these packages could be made to run code
    (`torch.hub:load` downloads it), and so could the import of their other modules.

    Args:
        name: `package.module:attribute`.
        base: What the attribute makes, for example `torch.nn.Module`.
        trusted: Top-level packages whose code the local user allows to run.

    Raises:
        InputError: Not of that form, not trusted, not found, or not allowed.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise InputError(f"{name!r} is not of the form package.module:attribute; write it so.")
    package = module_name.partition(".")[0]
    if package not in INSTALLED and package not in trusted:
        raise InputError(
            f"{name!r} would run code of the package {package!r}, which is not trusted; allow it "
            f"with --trust {package}, or run the project file that names it yourself."
        )
    if package not in trusted and not f"{module_name}.".startswith(tuple(f"{m}." for m in OPEN)):
        raise InputError(
            f"{name!r} is in none of the modules {', '.join(OPEN)}; without --trust {package} only "
            "their classes are taken."
        )
    try:
        with beside_the_user():
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"{name!r} cannot be imported: {error}; install or correct it.") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        hint = nearest(attribute, vars(module))
        raise InputError(f"{module_name} has no class or function {attribute!r}.{hint}")
    if package not in trusted and not (isinstance(factory, type) and issubclass(factory, base)):
        raise InputError(
            f"{name!r} is not a subclass of {base.__name__}; without --trust {package} only those "
            f"are taken from {package}."
        )
    return factory


@contextlib.contextmanager
def beside_the_user() -> Iterator[None]:
    """Modules beside the user too, as for `python -m`: the command `lsa` does not look there."""
    folder = str(Path.cwd())
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(folder)  # last: what is installed has precedence
    try:
        yield
    finally:
        sys.path.remove(folder)


def make(
    label: str,
    name: str,
    base: type,
    trusted: Collection[str],
    options: Mapping[str, Any],
    **given: Any,
) -> Any:
    """Call `package.module:factory` with options, and with those given values that it names.

    Args:
        label: What messages call the factory.
        name: `package.module:attribute`.
        base: As for `load`.
        trusted: As for `load`.
        options: From the project file.
        **given: What a factory may ask for by parameters of these names.

    Raises:
        InputError: As `load` and `check_options` raise.
    """
    function = load(name, base, trusted)
    asked = {
        key: value for key, value in given.items() if key in inspect.signature(function).parameters
    }
    return function(**asked, **check_options(label, function, options, tuple(asked)))


def package(name: str) -> str:
    """The top-level package of `package.module:attribute`."""
    return name.partition(":")[0].partition(".")[0]


def is_own(name: str) -> bool:
    """Whether a name stands for the user's own code, whose errors keep their traceback."""
    return ":" in name and name.partition(":")[0].partition(".")[0] not in INSTALLED


def permission(name: str, options: Mapping[str, Any]) -> str:
    """The name by which a dataset in a project is trusted: its own, with its folder if named."""
    return f"{name}:{options['root']}" if options.get("root") else name


def check_options(
    label: str,
    function: Callable[..., Any],
    options: Mapping[str, Any],
    reserved: Collection[str] = (),
    *,
    complete: bool = True,
) -> dict[str, Any]:
    """Options that `function` takes, converted to the type its signature asks for.

    Functions of `lsa` are checked against their annotations. Those of torch and torchvision are
    checked by the type of the default, because their annotations do not say more: a number may be
    written as text (YAML reads `1e-3` as text), anything else must be of the default's type.

    Args:
        label: What the message calls the function.
        function: Whose signature is read.
        options: As they stand in the project file.
        reserved: Parameters that the caller fills in, so they are no options.
        complete: Whether every parameter without default must be among the options.

    Raises:
        InputError: An unknown or missing option, or a value of the wrong type.
    """
    ours = function.__module__.partition(".")[0] == "lsa"
    signature = inspect.signature(function, eval_str=ours)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind in named and name not in reserved
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    listed = f"Its options are: {', '.join(known)}." if known else "It has none."
    for name in options:
        if name in reserved or (name not in known and not takes_any):
            raise InputError(f"{label} has no option {name!r}.{nearest(name, known)} {listed}")
    missing = [n for n, p in known.items() if p.default is p.empty and n not in options]
    if missing and complete:
        raise InputError(f"{label} needs the option {missing[0]!r}. {listed}")
    return {
        name: _converted(label, known[name], _expected(known[name], function), value)
        if name in known
        else value
        for name, value in options.items()
    }


def _expected(parameter: inspect.Parameter, function: Callable[..., Any]) -> Any:
    """The type that a value must have, or Any where nothing is known."""
    package = function.__module__.partition(".")[0]
    if package == "lsa":
        return parameter.annotation
    if package not in INSTALLED:
        return Any
    by_default = {bool: bool, int: Number, float: Number, str: str}
    if type(parameter.default) is tuple:
        return tuple[Number | None, ...] if None in parameter.default else tuple[Number, ...]
    return by_default.get(type(parameter.default), Any)


def _converted(label: str, parameter: inspect.Parameter, expected: Any, value: Any) -> Any:
    default = parameter.default
    hint = "" if default in (parameter.empty, None) else f"; the default is {default!r}"
    if isinstance(value, bool) and expected is not bool and type(default) in (int, float):
        raise InputError(f"{label}: {parameter.name}={value} must be a number{hint}.")
    try:
        return pydantic.TypeAdapter(expected).validate_python(value)
    except OverflowError:
        raise InputError(f"{label}: {parameter.name} is too large a number{hint}.") from None
    except pydantic.ValidationError as error:
        message = error.errors()[-1]["msg"]  # of a union, the widest type
        rule = message.removeprefix("Input should be ").partition(", unable")[0]
        rule = rule.replace("valid tuple", "list")
        raise InputError(f"{label}: {parameter.name}={value!r} must be {rule}{hint}.") from None


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
