"""Whether a landscape keeps what every probe relies on, asked once at a checkpoint.

L must be one fixed function of θ and a mean over samples, and the derivatives that autograd gives
must be its own. A few samples show it, chosen to differ in label, length and position: two passes,
passes of other sizes, and central differences in float64, which cost two gradients and one product.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lsa.landscape import additive, reach
from lsa.landscape.derivatives import budget
from lsa.landscape.landscape import SINGLY, Landscape
from lsa.landscape.network import HALF, Converts
from lsa.landscape.samples import Samples
from lsa.landscape.weighing import REMEDY, differing
from lsa.runtime import variables
from lsa.runtime.errors import InputError, first_line

SAMPLES = 4  # beside the first and the last those that differ most
DERIVED = 2  # of them, for the differences
# Steps over ‖θ‖. So small that hardly a unit changes its side of a kink, where differences of the
# gradient say nothing; the longer ones are for models that compute in float32 inside.
STEPS = (1e-8, 3e-7, 1e-5, 1e-3)
TOLERANCE = 1e-2  # of a derivative, relative
UNITS = (
    "the objective gives no losses of single samples: n_samples counts batches, and standard "
    "errors are over batches"
)
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}  # of a loss, relative; else 1e-2
_known: WeakKeyDictionary[Landscape, dict[bytes, tuple[str, ...]]] = WeakKeyDictionary()


def notes(landscape: Landscape, theta: Tensor) -> tuple[str, ...]:
    """Notes on a landscape at θ, one line each; checked once per process for each θ.

    Args:
        landscape: What is measured.
        theta: θ `(d,)`. Of another shape, or not finite, it gives no notes: the probe refuses it.

    Raises:
        InputError: The loss is no mean over samples, or the gradient or the Hessian product is
            plainly not the loss's.
    """
    if not budget.settings().check or theta.shape != (landscape.dimension,):
        return ()
    known = _known.setdefault(landscape, {})
    content = theta.detach().cpu().contiguous().view(torch.uint8).numpy()
    key = hashlib.blake2b(content.tobytes(), digest_size=16).digest()
    if key not in known:
        with _own_random_state(landscape.device):
            with _told("the loss cannot be evaluated on the first of the data"):
                few = landscape.subset(_chosen(landscape))
                reach.check_untouched(few, theta)
            reach.check_views(few.model, landscape.views)
            fixed, drawn = _fixed(few, theta)
            # Passes of another size draw other random numbers, from the same seed too.
            if isinstance(few.data, Samples):
                reach.check_alone(few, theta)
                mean = () if drawn else _mean_over_samples(few, theta)
            else:
                mean = additive.notes(landscape, theta, drawn)
            derived = few.subset(torch.arange(min(DERIVED, few.n_samples)))
            slopes = _derivatives(derived, theta, drawn)
            units = () if landscape.has_samples else (UNITS,)
            with _told("the loss cannot be differentiated"):
                idle = _idle(few, landscape, theta)
            known[key] = (*units, *fixed, *mean, *slopes, *idle)
    return known[key]


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Within the block an error of the network or the objective is told in one line."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind, line = type(error).__name__, first_line(error)
        raise InputError(
            f"{what} ({kind}: {line}); the same pass in your own loop, with loss.backward(), shows "
            "where"
        ) from error


def _idle(few: Landscape, landscape: Landscape, theta: Tensor) -> tuple[str, ...]:
    """A note on parameters without influence, on few samples and then on all."""
    line = reach.without_influence(few, theta) and reach.without_influence(landscape, theta)
    return (line,) if line else ()


def _chosen(landscape: Landscape) -> Tensor:
    """Units that differ: of tensors by their targets and inputs, of batches the first."""
    if not isinstance(landscape.data, Samples):
        return torch.arange(min(DERIVED, landscape.n_samples))
    data = landscape.data
    chosen = torch.cat([differing(data.y, SAMPLES), differing(data.x, SAMPLES)])
    counted = [i for i in dict.fromkeys(chosen.tolist()) if data.counts(i)]
    return torch.tensor(counted[:SAMPLES] or [data.first_counted()], device=landscape.device)


def _own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """The global random states are put back, in case the model draws from them."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


# --- one fixed function --------------------------------------------------------------------------


def _fixed(few: Landscape, theta: Tensor) -> tuple[tuple[str, ...], bool]:
    """Notes on an L that varies between evaluations, and whether the network draws random numbers.

    Raises:
        InputError: It is none for fixed random numbers either.
    """
    differences = [
        f"module {name!r} ({type(module).__name__}) is in training mode although the network is "
        "evaluated; it overrides train() or eval()"
        for name, module in few.model.named_modules()
        if module.training and name and not few.network.keeps_mode
    ]
    state = _random_state(few.device)
    first = few.loss(theta)
    drawn = not torch.equal(state, _random_state(few.device))
    second = few.loss(theta)
    if drawn:
        differences.append(
            "the network draws random numbers when it is evaluated, as dropout does that is "
            "called without training=self.training: its loss is no fixed function; draws=8 in "
            "Landscape averages over eight fixed draws"
        )
    if few.network.written:
        differences.append(
            f"evaluating the network changes its buffer {few.network.written!r}, which is put "
            "back before each pass"
        )
    if drawn:
        first, second = _seeded(few, theta), _seeded(few, theta)
    if _differ(first, second, _precision(few, theta)):
        raise InputError(
            f"two passes over the same samples give the losses {first:.6g} and {second:.6g}, so "
            "there is no landscape: the network or the objective keeps a state from pass to pass, "
            "or an operation is not deterministic; let each pass start anew"
        )
    return tuple(differences), drawn


def _mean_over_samples(few: Landscape, theta: Tensor) -> tuple[str, ...]:
    """Check that the network does not mix samples: all at once, each alone, and in two passes.

    Raises:
        InputError: Passes of another size give another loss.
    """
    n = few.n_samples
    together = _seeded(few, theta)
    for size in dict.fromkeys((1, (n + 1) // 2)):
        try:
            parted = _seeded(few.in_chunks(size), theta)
        except (RuntimeError, ValueError, IndexError) as error:
            return (f"a sample alone cannot be evaluated: {first_line(error)}",)
        differ = _differ(together, parted, _precision(few, theta))
        if differ and not _agree_in_double(few, theta, size):
            raise InputError(
                f"the loss of {n} samples together is {together:.6g}, in passes of {size} it is "
                f"{parted:.6g}: the loss is no mean over samples, or a layer mixes them; {REMEDY}"
            )
    return ()


def _agree_in_double(few: Landscape, theta: Tensor, size: int) -> bool:
    """Whether they differ by rounding alone: small losses are differences of large outputs."""
    try:
        fine, at = few.double(), theta.detach().double()
        return not _differ(_seeded(fine, at), _seeded(fine.in_chunks(size), at), at.dtype)
    except (RuntimeError, TypeError, Converts):  # an operation has no float64
        return False


def _seeded(few: Landscape, theta: Tensor) -> float:
    """The loss with random numbers that are the same each time."""
    torch.manual_seed(0)
    return few.loss(theta)


def _random_state(device: torch.device) -> Tensor:
    """State of the generators that a network on this device may draw from."""
    host = torch.get_rng_state()
    return torch.cat([host, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else host


def _precision(few: Landscape, theta: Tensor) -> torch.dtype:
    """θ's, or half precision where a part of the network has it, to whose digits losses agree."""
    return next((p.dtype for p in few.model.parameters() if p.dtype in HALF), theta.dtype)


def _differ(a: float, b: float, dtype: torch.dtype) -> bool:
    """Whether two losses differ by more than rounding; where one is not finite, probes say so."""
    return abs(a - b) > ROUNDING.get(dtype, 1e-2) * max(abs(a), abs(b))


# --- its own derivatives -------------------------------------------------------------------------


def _derivatives(few: Landscape, theta: Tensor, drawn: bool) -> tuple[str, ...]:
    """Gradient and Hessian product along a random direction against central differences."""
    try:
        at = theta.detach().double()
        return _compared(few.double(at), at, drawn)
    except (RuntimeError, TypeError, Converts) as error:  # no float64, no double backward, …
        line = first_line(error)
        return (f"gradient and Hessian product are not checked against differences: {line}",)


def _compared(few: Landscape, theta: Tensor, drawn: bool) -> tuple[str, ...]:
    # Drawn in float32, which takes a quarter of the time.
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).to(theta)
    v.div_(v.norm())
    # Products from gradients are such differences themselves, with an error that is measured.
    product, lacking = (None, ()) if few.products == "gradients" else _product(few, theta, v)
    size = max(1.0, theta.norm().item())
    settled = {"slope": False, "product": product is None}
    before: dict[str, Tensor] = {}
    for step in (relative * size for relative in STEPS):
        # A vector of these may fill the memory by itself, so none is held that is not needed.
        (high, bend), (low, g_low) = (_moved(few, theta, v, s) for s in (step, -step))
        length = (bend.norm() + g_low.norm()).item() / 2
        slope = ((bend @ v + g_low @ v) / 2).reshape(1)
        bend = bend.sub_(g_low).div_(2 * step)
        del g_low
        if not math.isfinite(length) or not (product is None or product.isfinite().all()):
            return lacking  # the probe itself will say so
        # What rounding may add to a difference, generously.
        rounding = 1e3 * torch.finfo(theta.dtype).eps / step
        # Along v a gradient has about |g|/√d: below a part of that, a slope is nothing.
        usual = length / len(theta) ** 0.5
        compared = {
            "slope": (slope, slope.new_tensor([(high - low) / (2 * step)]), usual, abs(high)),
        }
        if product is not None:
            compared["product"] = (product, bend, 0.0, length)
        for name, (own, difference, least, magnitude) in compared.items():
            allowed, alike = (
                TOLERANCE * max(t.norm().item(), least) + rounding * magnitude
                for t in (own, difference)
            )
            settled[name] |= bool((own - difference).norm() <= allowed)
            # A loss in float32 does not move by a small step, which says nothing.
            told = name in before and (bool(difference.any()) or step == STEPS[-1] * size)
            twice = told and bool((before[name] - difference).norm() <= alike)
            if twice and not settled[name]:
                raise InputError(_wrong(name, own, difference))
            before[name] = difference
        if all(settled.values()):
            if not drawn:  # else slopes are of other numbers than the gradient
                _check_slopes(few, theta, v, slope.item(), usual)
            return lacking
    unsettled = " and ".join(
        {"slope": "gradient", "product": "Hessian product"}[k] for k, v in settled.items() if not v
    )
    return (
        *lacking,
        f"the {unsettled} could not be checked: differences of any step disagree with each other, "
        "so the loss has kinks or jumps at this checkpoint",
    )


def _check_slopes(few: Landscape, theta: Tensor, v: Tensor, near: float, usual: float) -> None:
    """Check that slopes of samples have the gradient's as their mean.

    They come from forward mode, which knows nothing of hooks on the way back; where it is wrong,
    a remark has them come from single gradients.

    Args:
        few: Some samples in float64.
        theta: θ `(d,)`.
        v: Direction `(d,)`.
        near: Mean slope of the loss on both sides of θ, by its gradient; at a kink not that at θ.
        usual: A slope below a part of which none is told.

    Raises:
        InputError: They have another.
    """

    def mean_slope() -> float | None:
        torch.manual_seed(0)
        try:
            return few.slopes(theta, v).mean().item()
        except torch.OutOfMemoryError:
            raise
        except (InputError, RuntimeError):  # a probe that needs none may still be right
            return None

    def alike(mean: float, slope: float) -> bool:
        return abs(mean - slope) <= TOLERANCE * max(abs(slope), usual)

    mean = mean_slope()
    if mean is None or alike(mean, near):
        return
    torch.manual_seed(0)
    slope = (few.gradient(theta) @ v).item()
    if alike(mean, slope):
        return
    few.remarks[SINGLY] = (
        "slopes of samples take a backward pass for each: forward mode is not the gradient's, as "
        "where hooks change gradients"
    )
    singly = mean_slope()
    if singly is not None and alike(singly, slope):
        return
    del few.remarks[SINGLY]
    raise InputError(
        f"slopes of samples are not those of the gradient: along a random direction their mean is "
        f"{mean:.4g}, the gradient gives {slope:.4g}; replace hooks that change gradients by a "
        f"custom function with backward and jvp, or measure all the same with "
        f"{variables.CONSISTENCY}=off"
    )


def _product(few: Landscape, theta: Tensor, v: Tensor) -> tuple[Tensor | None, tuple[str, ...]]:
    """The Hessian product along v; none, and a note, where an operation lacks derivatives."""
    torch.manual_seed(0)
    try:
        return few.hessian(theta, exact=True)(v), ()
    except torch.OutOfMemoryError:
        raise
    except (InputError, RuntimeError) as error:  # a probe that needs none may still be right
        return None, (f"the Hessian product is not checked: {first_line(error)}",)


def _moved(few: Landscape, theta: Tensor, v: Tensor, step: float) -> tuple[float, Tensor]:
    torch.manual_seed(0)
    return few.loss_and_gradient(theta.add(v, alpha=step))


def _wrong(name: str, own: Tensor, difference: Tensor) -> str:
    """Both differences agree with each other and not with autograd."""
    custom = "backward of a custom function (or take a detach() away)"
    if name == "slope":
        return (
            f"the gradient is not that of the loss: along a random direction it gives "
            f"{own.item():.4g}, differences of the loss give {difference.item():.4g}; mend the "
            f"{custom}, or measure all the same with {variables.CONSISTENCY}=off"
        )
    off = ((own - difference).norm() / difference.norm()).item()
    return (
        f"the Hessian product is not the derivative of the gradient: it is off by "
        f"{off:.1%} along a random direction; give products='gradients', which takes the gradient "
        f"alone, or mend the double {custom}"
    )
