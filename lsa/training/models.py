"""Networks by name: `simple_cnn`, `mlp`, `resnet20`, torchvision's classifiers, or your own."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from lsa.project import factories
from lsa.runtime import modes
from lsa.runtime.errors import InputError
from lsa.training.networks import Shape, mlp, resnet20, simple_cnn

OWN = "name a factory of yours, package.module:factory"


@modes.usual()
def build(
    name: str,
    *,
    input_shape: Shape | None,
    classes: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    logits: bool = True,
    trusted: Collection[str] = (),
    **options: Any,
) -> nn.Module:
    """Network f: inputs `(n, *input_shape)` → logits `(n, classes)`, initialised from `seed`.

    It is made on the CPU in float32, so that one seed gives the same weights whatever the device
    that trains them. The global random state is left as it was.

    Args:
        name: `simple_cnn`, `mlp`, `resnet20`, a classifier of `torchvision.models` by its name
            there, or `package.module:factory`, called as
            `factory(input_shape=…, classes=…, **options)`, with those of the two that it names.
        input_shape: Of one sample, `(channels, height, width)` for images; None where batches are
            no tensors, so that only a factory of one's own knows it.
        classes: Number of logits.
        seed: Of the initial weights.
        dtype: Of the inputs, integers for token numbers.
        logits: Whether the outputs must be `(n, classes)`; with a loss of one's own they need not.
        trusted: Top-level packages whose factories may be imported.
        **options: Of the named factory.

    Raises:
        InputError: Unknown name or option, a factory that is not trusted, or a network that does
            not take such inputs or does not return such logits.
    """
    make = _factory(name, input_shape and tuple(input_shape), classes, trusted, options)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: it would reseed the accelerators' generators as well.
        torch.default_generator.manual_seed(seed)
        try:
            model = make()
        except Exception as error:  # torch's classes raise whatever they like
            if isinstance(error, InputError) or factories.is_own(name):
                raise
            reason = factories.one_line(error)
            raise InputError(f"model {name} cannot be made: {reason}; choose others.") from error
        if not isinstance(model, nn.Module):
            raise InputError(f"model {name} made a {type(model).__name__}, not a torch.nn.Module.")
        _check_real(name, model)
        model = model.to("cpu", torch.float32)
        if input_shape is not None:
            _check(name, model, tuple(input_shape), dtype, classes if logits else None)
    return model


def _factory(
    name: str, shape: Shape | None, classes: int, trusted: Collection[str], options: dict[str, Any]
) -> Callable[[], nn.Module]:
    label = f"model {name}"
    if name in OURS or ":" in name:
        given = {} if shape is None else {"input_shape": shape, "classes": classes}
        if ":" in name:
            return lambda: factories.make(label, name, nn.Module, trusted, options, **given)
        if shape is None:
            raise InputError(f"{label} needs the inputs' shape, which batches do not tell; {OWN}")
        checked = factories.check_options(label, OURS[name], options, tuple(given))
        return lambda: OURS[name](**given, **checked)

    from torchvision import models  # slow to import, and most projects do without

    known = models.list_models(module=models)
    if name not in known:
        hint = factories.nearest(name, [*OURS, *known])
        raise InputError(
            f"unknown model {name!r}.{hint} Known are {', '.join(OURS)}, the classifiers of "
            "torchvision.models, and package.module:factory."
        )
    builder = models.get_model_builder(name)
    checked = _torchvision_options(label, builder, options)

    def make() -> nn.Module:
        try:
            return builder(weights=None, num_classes=classes, **checked)
        except (TypeError, ValueError) as error:
            raise InputError(f"{label} cannot be made: {factories.one_line(error)}.") from error

    return make


def _torchvision_options(label: str, builder: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Check against the class that the builder returns: the builder itself takes any keyword."""
    network = typing.get_type_hints(builder)["return"]
    known = inspect.signature(network).parameters
    # GoogLeNet and Inception: logits and nothing else, and no warning about their initialisation.
    ours = {"aux_logits": False, "init_weights": True}
    ours = {name: value for name, value in ours.items() if name in known}
    checked = factories.check_options(label, network, options, ["num_classes"], complete=False)
    return ours | checked


def _check_real(name: str, model: nn.Module) -> None:
    """Refuse complex weights, of which float32 would keep the real part alone."""
    for key, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.dtype.is_complex:
            raise InputError(
                f"model {name} has complex weights ({key}); lsa measures real ones: write each as "
                "its real and its imaginary part."
            )


def _check(
    name: str, model: nn.Module, shape: Shape, dtype: torch.dtype, classes: int | None
) -> None:
    """Try the network on zeros; this also gives lazy modules their seeded weights."""
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(torch.zeros(2, *shape, dtype=dtype))
    except Exception as error:
        refusals = (RuntimeError, ValueError, TypeError, AssertionError, IndexError)
        if factories.is_own(name) and not isinstance(error, refusals):
            raise
        message, kind, mend = factories.one_line(error), "", "choose another model or image size"
        if dtype.is_floating_point and dtype != torch.float32:
            kind = f"{str(dtype).removeprefix('torch.')} "
            mend = "networks are trained in float32: give the inputs in it too"
        raise InputError(
            f"model {name} does not take {kind}inputs of shape {shape}: {message}; {mend}."
        ) from error
    if classes is None:
        model.train()
        return
    if not isinstance(outputs, Tensor) or outputs.shape != (2, classes):
        actual = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(
            f"model {name} returns {actual} for two samples; it must return logits (2, {classes})."
        )
    model.train()


OURS: dict[str, Callable[..., nn.Module]] = {
    "simple_cnn": simple_cnn,
    "mlp": mlp,
    "resnet20": resnet20,
}
