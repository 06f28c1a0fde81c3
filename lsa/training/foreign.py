"""Weights out of files that other code wrote, without running any of it.

`.pt`, `.pth`, `.bin` and Lightning's `.ckpt` are read by torch's restricted unpickler, which makes
tensors and plain containers only. Of an exported program (`.pt2`) the weights alone are read. A
Hugging Face folder holds one or more such files, or safetensors.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lsa.runtime.errors import InputError, one_line
from lsa.training import exported
from lsa.training.optimizers import classes
from lsa.training.sharpness_aware import SAM

# Where training loops keep the parts, the most usual first.
WEIGHTS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
OPTIMIZER = ("optimizer_state_dict", "optimizer", "optim", "optimizer_states")
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
PROGRAM = ".pt2"
TENSORS = 100_000  # in a file of safetensors; a stranger's million of empty ones takes minutes
FOLDER = ("*.safetensors", "pytorch_model*.bin")  # of Hugging Face, the better first


@dataclass(frozen=True)
class Foreign:
    """The content of a checkpoint of other code."""

    weights: Mapping[str, Tensor]  # a state_dict, with whatever prefix its keys have
    optimizer: Mapping[str, Any] | None = None  # the state_dict of the optimizer
    epoch: int | None = None


def read(path: Path) -> Foreign:
    """Read a file or a Hugging Face folder.

    Args:
        path: `.pt`, `.pth`, `.bin`, `.ckpt`, `.pt2`, `.safetensors`, or a folder with such files.

    Raises:
        InputError: There is no such file, it holds no weights, or reading it would run code.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}; give a checkpoint that exists")
    if path.suffix == ".safetensors":
        return Foreign(_safetensors(path))
    if path.suffix == PROGRAM:
        return Foreign(_restricted(path, lambda: exported.weights(path)))
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"{path.name} ends in {path.suffix or 'nothing'}; give a folder or a file that ends in "
            f"{', '.join((*SUFFIXES, PROGRAM, '.safetensors'))}"
        )
    content = _unpickled(path)
    if isinstance(content, Mapping) and _tensors(content):
        return Foreign(content)
    parts = content if isinstance(content, Mapping) else {}
    weights = next((parts[key] for key in WEIGHTS if _tensors(parts.get(key))), None)
    if weights is None:
        listed = ", ".join(map(str, list(parts)[:8])) or type(content).__name__
        raise InputError(
            f"{path.name} holds no weights ({listed}); save model.state_dict(), alone or under "
            f"one of {', '.join(WEIGHTS)}"
        )
    states = [parts[key] for key in OPTIMIZER if isinstance(parts.get(key), Mapping | list)]
    optimizer = next((state for state in states if len(state)), None)
    if isinstance(optimizer, list):  # Lightning keeps one state for each optimizer
        optimizer = optimizer[0] if len(optimizer) == 1 else None
    epoch = parts.get("epoch")
    known = type(epoch) is int and 0 <= epoch < 2**31
    return Foreign(
        weights, optimizer if isinstance(optimizer, Mapping) else None, epoch if known else None
    )


def _folder(path: Path) -> Foreign:
    for pattern in FOLDER:
        if files := sorted(path.glob(pattern)):
            weights: dict[str, Tensor] = {}
            for file in files:
                weights |= read(file).weights
            state = path / "optimizer.pt"  # of a checkpoint of Hugging Face's Trainer
            return Foreign(weights, _unpickled(state) if state.is_file() else None)
    raise InputError(f"folder {path} holds neither {' nor '.join(FOLDER)}; give the one that does")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > TENSORS:
                raise ValueError(f"it holds {len(names)} tensors")
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{path.name} is no safetensors file ({error}); save it again") from None


def _unpickled(path: Path) -> Any:
    return _restricted(path, lambda: torch.load(path, map_location="cpu", weights_only=True))


def _restricted(path: Path, read: Callable[[], Any]) -> Any:
    """The result of `read`, a reader that runs no code from the file.

    Raises:
        InputError: It would run code, or the file is damaged: torch's readers raise anything then.
    """
    try:
        return read()
    except UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise InputError(
            f"reading {path.name} would run code that it names{what}; save "
            "model.state_dict() from the code that wrote it, or load it there and call lsa.register"
        ) from None
    except MemoryError:
        raise
    except Exception as error:
        why = one_line(error)
        raise InputError(f"{path.name} cannot be read ({why}); save it again") from None


def _tensors(content: Any) -> bool:
    """Whether an object is a state_dict: a mapping from names to tensors alone."""
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    )


def fitted(
    weights: Mapping[str, Tensor], model: nn.Module, prefix: str | None = None
) -> dict[str, Tensor]:
    """The weights that belong to a network, by its own names.

    Wrappers (Lightning, DDP, torch.compile) put a prefix before every name; it is found and taken
    away. A tied parameter that the file keeps once is given both names.

    Args:
        weights: A state_dict.
        model: The network whose names are wanted.
        prefix: To be taken away; found where None.

    Raises:
        InputError: The names or shapes are not those of the network, or several prefixes fit.
    """
    tied = _tied(model)

    def under(start: str) -> dict[str, Tensor] | None:
        keys = {
            name: [start + n for n in names if start + n in weights] for name, names in tied.items()
        }
        return {name: weights[k[0]] for name, k in keys.items()} if all(keys.values()) else None

    first = next(iter(tied.values()), [])
    starts = ["", *_prefixes(weights, first)] if prefix is None else [prefix]
    fits = {start: chosen for start in starts if (chosen := under(start)) is not None}
    if not fits:
        missing = next(
            n for n, names in tied.items() if not any(starts[-1] + m in weights for m in names)
        )
        raise InputError(
            f"the weights are not the factory's network's: it has {missing!r}, they have "
            f"{', '.join(map(repr, list(weights)[:3]))}, …; give the factory that made the network"
        )
    if len(fits) > 1:
        raise InputError(
            f"the weights fit under the prefixes {', '.join(map(repr, fits))}; choose one by "
            "prefix=…"
        )
    ((start, chosen),) = fits.items()
    strange = [k for k in weights if k.startswith(start) and k[len(start) :] not in tied]
    if strange:
        raise InputError(
            f"the weights have {strange[0]!r}, which the factory's network has not; give the "
            "factory, with the options, that made the network"
        )
    _check_shapes(chosen, model)
    return chosen


def _check_shapes(weights: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse weights of a network of another size; lazy layers have none yet."""
    for name, own in model.state_dict().items():
        given = weights[name]
        if not (isinstance(own, Tensor) and isinstance(given, Tensor)) or is_lazy(own):
            continue
        if given.shape != own.shape:
            raise InputError(
                f"the weights' {name!r} has the shape {tuple(given.shape)}, and the factory's "
                f"network's {tuple(own.shape)}; give the factory, with the options, that made the "
                "network"
            )


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Each name in a state_dict, and all the names of the same tensor."""
    own = model.state_dict()
    names: dict[Any, list[str]] = {}
    for name, tensor in own.items():
        names.setdefault((tensor.data_ptr() or id(tensor), tensor.shape), []).append(name)
    return {name: same for same in names.values() for name in same}


def _prefixes(weights: Iterable[str], names: Iterable[str]) -> list[str]:
    """Prefixes, up to a dot, that the weights have before one of the names."""
    starts = [key[: -len(name)] for key in weights for name in names if key.endswith(f".{name}")]
    return list(dict.fromkeys(starts))


def optimizer_state(optimizer: Optimizer, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state_dict of a live optimizer, with the names of each group's parameters.

    Args:
        optimizer: Over the network's parameters.
        named: These parameters by name, tensors of any shape.

    Raises:
        InputError: A parameter of the optimizer is none of these.
    """
    names: dict[int, str] = {}
    for name, p in named.items():
        names.setdefault(id(p), name)  # of a tied one the first, as in named_parameters
    stored = optimizer.state_dict()
    groups = []
    for group, own in zip(stored["param_groups"], optimizer.param_groups, strict=True):
        if any(id(p) not in names for p in own["params"]):
            raise InputError(
                f"{type(optimizer).__name__} steps parameters that are none of the model's; give "
                "the model that it was made for"
            )
        groups.append({**group, "param_names": [names[id(p)] for p in own["params"]]})
    return {**stored, "param_groups": groups}


def rule_of(optimizer: Optimizer) -> dict[str, Any]:
    """Name and options by which `optimizers.build` makes an optimizer of the same class."""
    if isinstance(optimizer, SAM):
        base = rule_of(optimizer.base)
        return {**base, "name": "SAM", "base": base["name"], "rho": optimizer.defaults["rho"]}
    own = type(optimizer)
    known = classes().get(own.__name__) is own
    name = own.__name__ if known else f"{own.__module__}:{own.__qualname__}"
    options = {}
    for key, parameter in inspect.signature(own).parameters.items():
        value = optimizer.defaults.get(key, parameter.default)
        plain = isinstance(value, bool | int | float | str | tuple | list)
        if plain and (key == "lr" or value != parameter.default):
            options[key] = list(value) if isinstance(value, tuple) else value
    return {"name": name, **options}
