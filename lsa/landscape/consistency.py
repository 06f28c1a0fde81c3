"""Whether a landscape keeps what every probe relies on, asked once at a checkpoint.

L must be one fixed function of θ and a mean over samples, and the derivatives that autograd gives
must be its own. A few samples show it: two passes, one pass of each sample alone, and central
differences in float64, which cost two gradients and one product.
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lsa.landscape.derivatives import budget
from lsa.landscape.landscape import Landscape
from lsa.runtime.errors import InputError

SAMPLES = 2
# Steps over ‖θ‖. So small that hardly a unit changes its side of a kink, where differences of the
# gradient say nothing; the longer ones are for models that compute in float32 inside.
STEPS = (1e-8, 3e-7, 1e-5, 1e-3)
TOLERANCE = 1e-2  # of a derivative, relative
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}  # of a loss, relative; else 1e-2
_known: WeakKeyDictionary[Landscape, dict[bytes, tuple[str, ...]]] = WeakKeyDictionary()


def notes(landscape: Landscape, theta: Tensor) -> tuple[str, ...]:
    """What is off with a landscape at θ, one plain line each; asked once in a process.

    Nothing where θ is none of the landscape's, or not finite: the probe itself will say so.

    Raises:
        InputError: The gradient or the Hessian product is plainly not the loss's.
    """
    if not budget.settings().check or theta.shape != (landscape.dimension,):
        return ()
    known = _known.setdefault(landscape, {})
    key = hashlib.blake2b(theta.detach().cpu().numpy().tobytes(), digest_size=16).digest()
    if key not in known:
        few = landscape.subset(torch.arange(min(SAMPLES, landscape.n_samples)))
        with _own_random_state(landscape.x.device):
            known[key] = _function(few, theta) or _derivatives(few, theta)
    return known[key]


def _own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """The global random states are put back, in case the model draws from them."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


# --- one fixed function --------------------------------------------------------------------------


def _function(few: Landscape, theta: Tensor) -> tuple[str, ...]:
    """What makes L no fixed function of θ, or no mean over samples."""
    found = [
        f"module {name!r} ({type(module).__name__}) is in training mode although the network is "
        "evaluated; it overrides train() or eval()"
        for name, module in few.model.named_modules()
        if module.training and name
    ]
    before = {name: buffer.clone() for name, buffer in few.model.named_buffers()}
    state = _random_state(few.x.device)
    first = few.loss(theta)
    drawn = not torch.equal(state, _random_state(few.x.device))
    second = few.loss(theta)
    changed = [n for n, b in few.model.named_buffers() if not torch.equal(b, before[n])]
    if drawn:
        found.append(
            "the network draws random numbers when it is evaluated, as dropout does that is "
            "called without training=self.training: its loss is no fixed function"
        )
    if changed:
        found.append(f"evaluating the network changes its buffer {changed[0]!r}")
    if not drawn and _differ(first, second, theta.dtype):
        found.append(
            f"two passes over the same samples give the losses {first:.6g} and {second:.6g}: the "
            "network keeps a state, or an operation of it is not deterministic"
        )
    if found:
        return tuple(found)
    try:
        alone = [few.subset(torch.tensor([i])).loss(theta) for i in range(few.n_samples)]
    except (RuntimeError, ValueError, IndexError) as error:
        return (f"a sample alone cannot be evaluated: {_line(error)}",)
    mean = sum(alone) / len(alone)
    if _differ(first, mean, theta.dtype):
        return (
            f"the loss of {few.n_samples} samples together is {first:.6g}, the mean of each alone "
            f"{mean:.6g}: the loss is no mean over samples, or a layer mixes them",
        )
    return ()


def _random_state(device: torch.device) -> Tensor:
    """Of the generators that a network on this device may draw from."""
    host = torch.get_rng_state()
    return torch.cat([host, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else host


def _differ(a: float, b: float, dtype: torch.dtype) -> bool:
    """Whether two losses differ by more than rounding; where one is not finite, probes say so."""
    return abs(a - b) > ROUNDING.get(dtype, 1e-2) * max(abs(a), abs(b))


def _line(error: Exception) -> str:
    """The first line of an error that is somebody else's."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- its own derivatives -------------------------------------------------------------------------


def _derivatives(few: Landscape, theta: Tensor) -> tuple[str, ...]:
    """Gradient and Hessian product along a random direction against central differences."""
    try:
        return _compared(few.double(), theta.detach().double())
    except (RuntimeError, TypeError) as error:  # no float64, no double backward, …
        line = _line(error)
        return (f"gradient and Hessian product are not checked against differences: {line}",)


def _compared(few: Landscape, theta: Tensor) -> tuple[str, ...]:
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(0), dtype=theta.dtype)
    v = (v / v.norm()).to(theta.device)
    try:
        product = few.hessian(theta)(v)
    except InputError as error:  # a probe that needs none may still be right
        return (f"gradient and Hessian product are not checked: {_line(error)}",)
    size = max(1.0, theta.norm().item())
    settled = {"slope": False, "product": False}
    before: dict[str, Tensor] = {}
    for step in (relative * size for relative in STEPS):
        (high, g_high), (low, g_low) = (few.loss_and_gradient(theta + s * v) for s in (step, -step))
        gradient = (g_high + g_low) / 2
        if not gradient.isfinite().all() or not product.isfinite().all():
            return ()  # the probe itself will say so
        # What rounding may add to a difference, generously.
        rounding = 1e3 * torch.finfo(theta.dtype).eps / step
        # Along v a gradient has about |g|/√d: below a part of that, a slope is nothing.
        usual = gradient.norm().item() / len(theta) ** 0.5
        slope = (gradient @ v).reshape(1)
        compared = {
            "slope": (slope, slope.new_tensor([(high - low) / (2 * step)]), usual, abs(high)),
            "product": (product, (g_high - g_low) / (2 * step), 0.0, gradient.norm().item()),
        }
        for name, (own, difference, least, magnitude) in compared.items():
            allowed = TOLERANCE * max(own.norm().item(), least) + rounding * magnitude
            settled[name] |= bool((own - difference).norm() <= allowed)
            twice = name in before and bool((before[name] - difference).norm() <= allowed)
            if twice and not settled[name]:
                raise InputError(_wrong(name, own, difference))
            before[name] = difference
        if all(settled.values()):
            return ()
    unsettled = " and ".join(
        {"slope": "gradient", "product": "Hessian product"}[k] for k, v in settled.items() if not v
    )
    return (
        f"the {unsettled} could not be checked: differences of any step disagree with each other, "
        "so the loss has kinks or jumps at this checkpoint",
    )


def _wrong(name: str, own: Tensor, difference: Tensor) -> str:
    """Both differences agree with each other and not with autograd."""
    rest = f"backward of a custom function, or measure all the same with {budget.CHECK}=off"
    if name == "slope":
        return (
            f"the gradient is not that of the loss: along a random direction it gives "
            f"{own.item():.4g}, differences of the loss give {difference.item():.4g}; mend the "
            f"{rest}"
        )
    off = ((own - difference).norm() / difference.norm()).item()
    return (
        f"the Hessian product is not the derivative of the gradient: it is off by "
        f"{off:.1%} along a random direction; mend the double {rest}"
    )
