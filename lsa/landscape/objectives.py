"""Ready objectives: `(model, batch) → Terms` for the batches that people have.

Each gives the sum of the loss and its weight, so that L does not depend on how the data is cut into
batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lsa.landscape.batches import fingerprint
from lsa.landscape.network import HALF
from lsa.landscape.terms import Objective, Terms
from lsa.landscape.weighing import (
    Loss,
    Weighing,
    given,
    joined,
    mean_over_samples,
    of_samples,
    rows,
    separate,
    weighing,
)
from lsa.runtime.errors import InputError, first_line

__all__ = ["hf", "lightning", "per_token", "supervised", "weighted"]

BY_HAND = (
    "training_step of a module with automatic_optimization=False steps the optimizer itself; give "
    "loss= or objective="
)
LOGS = ("log", "log_dict")
IGNORED = -100  # label that `F.cross_entropy` and Hugging Face leave out
AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-4}  # of two ways to the same loss; else 3e-2
ALIKE = {torch.float64: 1e-12, torch.float32: 1e-6}  # where a part may have been added; else 3e-2


def called(model: nn.Module, inputs: Any) -> Any:
    """The network's outputs: a mapping is given by name, a tuple or list by position."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list) and not isinstance(inputs, nn.utils.rnn.PackedSequence):
        return model(*inputs)
    return model(inputs)


def _answer(model: nn.Module, inputs: Any) -> Any:
    """The network's outputs for the inputs of a batch.

    Raises:
        InputError: The network does not take such inputs.
    """
    try:
        return called(model, inputs)
    except TypeError as error:
        line = str(error).splitlines()[0]
        raise InputError(
            f"{type(model).__name__} cannot be called with the inputs of a batch ({line}); give an "
            "objective of your own, (model, batch) → lsa.Terms"
        ) from error


def supervised(loss: Loss = F.cross_entropy) -> Objective:
    """Batches `(inputs, targets)`, or mappings with `labels`, and a loss `(outputs, targets)`.

    The loss is asked how it weighs (torch's cross entropies), or tried on samples of all batches
    that differ: it must be a plain mean over samples.

    Raises:
        InputError: From a batch, where the loss is no mean over samples.
    """
    known = weighing(loss)
    tried: dict[tuple, Weighing] = {}  # by the targets that it was tried on
    differ: list[Any] = []  # outputs and targets of samples of all batches that differ most
    several: list[bool] = []  # which of their leaves have a row for each sample

    def objective(model: nn.Module, batch: Any) -> Terms:
        inputs, y = _parted(batch)
        outputs = separate(given(loss, _answer(model, inputs)))
        # The first pass over the data, without gradients, tries the loss on every batch.
        if known is None and not (tried and torch.is_grad_enabled()):
            mark = fingerprint(y)
            if mark not in tried:
                several[:] = several or of_samples(outputs, y, lambda: _fewer(model, inputs, y))
                differ[:] = joined(differ, [_detached(outputs), y], several)
                tried[mark] = mean_over_samples(loss, differ[0], differ[1], several)
        how = known or next(iter(tried.values()))
        sums, weights = how.sums(outputs, y), how.weights(y)
        total = len(sums) if weights is None else weights.sum()
        return Terms(sums.sum(), total, sums, weights, outputs=outputs)

    return objective


def _fewer(model: nn.Module, inputs: Any, y: Any) -> Any:
    """Outputs without the last sample."""
    n = len(tree_leaves(y)[0])
    return called(model, rows(inputs, slice(0, n - 1), n))


def _detached(outputs: Any) -> Any:
    return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, outputs)


def _parted(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise InputError(
        f"a batch is a {type(batch).__name__}; give pairs (inputs, targets) or mappings with "
        "'labels', or an objective of your own"
    )


def weighted(loss: Loss, weights: Callable[[Any], Tensor]) -> Objective:
    """A loss per sample and a weight per sample: L = Σ wᵢℓᵢ / Σ wᵢ.

    Args:
        loss: `(outputs, targets) → (n,)`, the loss of each sample, as `reduction="none"` gives it.
        weights: `batch → (n,)`.

    Raises:
        InputError: From a batch, where the losses or the weights are not `(n,)`, or the batch is
            neither a pair nor a mapping with `labels`.
    """

    def objective(model: nn.Module, batch: Any) -> Terms:
        inputs, y = _parted(batch)
        outputs = separate(called(model, inputs))
        each, w = loss(outputs, y), weights(batch)
        if each.ndim != 1 or each.shape != w.shape:
            raise InputError(
                f"the losses have shape {tuple(each.shape)}, the weights {tuple(w.shape)}; "
                "both must be (n,), one number per sample"
            )
        w = w.to(each)
        sums = torch.where(w == 0, torch.zeros_like(each), w * each)
        return Terms(sums.sum(), w.sum(), sums, w, outputs=outputs)

    return objective


def per_token(*, ignore_index: int = IGNORED, shift: bool = True) -> Objective:
    """Cross entropy per token: L is the mean over all tokens of the data set that count.

    Batches are mappings with `labels` `(n, T)`, or pairs (token ids, labels); without labels the
    ids are their own, except where an `attention_mask` `(n, T)` is 0: padding does not count, nor
    what is predicted from it. The network gives logits `(n, T, C)`, or an output with `.logits`;
    those in half precision are raised to float32.

    Args:
        ignore_index: Label of tokens that do not count.
        shift: Whether the logits at a position predict the label at the next one.

    Raises:
        InputError: From a batch, where the logits are not `(n, T, C)`, or the batch has no labels.
    """

    def objective(model: nn.Module, batch: Any) -> Terms:
        if isinstance(batch, Mapping) and "labels" not in batch and "input_ids" in batch:
            batch = {**batch, "labels": _own_labels(batch, ignore_index, shift)}
        elif isinstance(batch, Tensor):
            batch = (batch, batch)
        inputs, y = _parted(batch)
        outputs = called(model, inputs)
        logits = outputs.logits if hasattr(outputs, "logits") else outputs
        return tokens(logits, y, ignore_index=ignore_index, shift=shift)

    return objective


def _own_labels(batch: Mapping[str, Tensor], ignored: int, shift: bool) -> Tensor:
    """Token ids `(n, T)` as their own labels, without those that are padding or follow padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None or mask.shape != ids.shape:
        return ids
    counted = mask != 0
    if shift:
        counted[:, 1:] &= mask[:, :-1] != 0
    return ids.masked_fill(~counted, ignored)


def tokens(logits: Tensor, labels: Tensor, *, ignore_index: int, shift: bool) -> Terms:
    """Cross entropy per sequence, with the number of tokens that count as its weight.

    Args:
        logits: `(n, T, C)`. Those in half precision are raised to float32, as Hugging Face does.
        labels: `(n, T)`, int64.
        ignore_index: Label of tokens that do not count.
        shift: Whether the logits at a position predict the label at the next one.

    Raises:
        InputError: Logits and labels do not fit together.
    """
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise InputError(
            f"the logits have shape {tuple(logits.shape)}, the labels {tuple(labels.shape)}; they "
            "must be (n, T, C) and (n, T)"
        )
    logits = _raised(logits)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = F.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=ignore_index, reduction="none"
    )
    sums, weights = each.sum(1), (labels != ignore_index).sum(1)
    return Terms(sums.sum(), weights.sum(), sums, weights, outputs=logits)


def _raised(logits: Tensor) -> Tensor:
    """Logits in float32 at least."""
    return logits.float() if logits.dtype in HALF else logits


def hf() -> Objective:
    """A Hugging Face model with its own loss: `model(**batch).loss`, batches with `labels`.

    The loss is a mean whose weights the model does not tell. It is compared with the means that
    there are: per token with and without shift, per sample with class labels, squared errors.
    Logits in half precision are raised to float32.

    Raises:
        InputError: From a batch, where the loss is none of these, is not finite, or contains an
            auxiliary loss, such as that of a mixture of experts' router.
    """
    kind: list[int] = []  # which of the candidates it is

    def objective(model: nn.Module, batch: Any) -> Terms:
        output = model(**batch)
        known = hasattr(output, "logits") and getattr(output, "loss", None) is not None
        if not known or "labels" not in batch:
            names = output if isinstance(output, Mapping) else [type(output).__name__]
            raise InputError(
                f"{type(model).__name__} gives {', '.join(names)} for batches of "
                f"{', '.join(batch)}; hf() takes models with logits and batches with labels: give "
                "an objective of your own, which knows what model(**batch).loss is a mean over"
            )
        if not kind:
            _check_fit(output.logits, batch["labels"])
        terms = _candidates(output.logits, batch["labels"])
        if kind and (torch.is_grad_enabled() or not output.loss.isfinite()):
            return terms[kind[0]]
        # The model's loss may be in another precision than its logits.
        alone = _raised(output.logits).dtype != output.loss.dtype
        cast = output.logits.to(output.loss.dtype)
        told = _candidates(cast, batch["labels"]) if alone else terms
        if float(told[0].weight) == 0:  # the model's mean over nothing
            return terms[kind[0] if kind else 0]
        auxiliary = _auxiliary(output)
        alike = [i for i, t in enumerate(told) if _agrees(t, output.loss, bool(auxiliary))]
        kind[:] = kind or alike[:1]
        if not kind or kind[0] not in alike:
            raise InputError(_refusal(type(model).__name__, output.loss, auxiliary))
        return terms[kind[0]]

    return objective


def _check_fit(logits: Tensor, labels: Tensor) -> None:
    """Check that there is a loss that takes logits with labels.

    Raises:
        InputError: There is none.
    """
    try:
        _candidates(logits.detach(), labels)
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} fit no loss that hf() "
            f"knows ({first_line(error)}); give an objective that returns lsa.Terms"
        ) from error


def _auxiliary(output: Any) -> list[str]:
    """Names of losses beside the main one that are not 0, as a mixture of experts has."""
    return [
        name
        for name, value in (output if isinstance(output, Mapping) else vars(output)).items()
        if name != "loss" and name.endswith("loss") and isinstance(value, Tensor) and value.any()
    ]


def _agrees(terms: Terms, loss: Tensor, closely: bool) -> bool:
    """Whether terms have the mean that a model says."""
    own, mean = float(loss), float(terms.total / terms.weight)
    within = (ALIKE if closely else AGREEMENT).get(loss.dtype, 3e-2)
    return abs(mean - own) <= within * max(abs(own), 1e-6)


def _refusal(name: str, loss: Tensor, auxiliary: list[str]) -> str:
    if not loss.isfinite():
        return (
            f"the loss of {name} is {float(loss)}, which tells no mean; look at the model's own "
            "loss: model(**batch).loss must be finite"
        )
    if auxiliary:
        return (
            f"the loss of {name} is {float(loss):.6g} and contains {' and '.join(auxiliary)}, "
            "which is no mean over tokens; leave it out (model.config.output_router_logits = "
            "False), or give an objective that returns lsa.Terms with it"
        )
    return (
        f"the loss of {name} is {float(loss):.6g}, which is neither a mean over tokens nor one "
        "over samples; give an objective that returns lsa.Terms"
    )


def _candidates(logits: Tensor, labels: Tensor) -> list[Terms]:
    logits = _raised(logits)
    if logits.ndim == 3 and labels.ndim == 2 and not labels.is_floating_point():
        # Trained tokens that a prompt of peft's puts before the data have no label.
        before = max(0, logits.shape[1] - labels.shape[1])
        labels = F.pad(labels, (before, 0), value=IGNORED)
        return [tokens(logits, labels, ignore_index=IGNORED, shift=s) for s in (True, False)]
    if labels.is_floating_point():
        flat = logits.reshape(labels.shape) if logits.numel() == labels.numel() else logits
        losses = (F.mse_loss, F.binary_cross_entropy_with_logits)
        each = [
            loss(flat, labels, reduction="none").reshape(len(labels), -1).mean(1) for loss in losses
        ]
    else:
        each = [F.cross_entropy(logits, labels, reduction="none")]
    return [Terms(e.sum(), len(e), e, outputs=logits) for e in each]


def lightning(size: Callable[[Any], int] | None = None) -> Objective:
    """A Lightning module's own `training_step(batch, index)`, a mean over the batch's samples.

    Terms of single samples are not known, so the unit is the batch. What the step logs by
    `self.log` and `self.log_dict` is left out.

    Args:
        size: `batch → n`, the samples of a batch; default: the length of its first tensor.

    Raises:
        InputError: From a batch, where the module steps its optimizers by itself.
    """

    def objective(model: nn.Module, batch: Any) -> Terms:
        if not getattr(model, "automatic_optimization", True):
            raise InputError(BY_HAND)
        with _silent(model):
            out = model.training_step(batch, 0)  # pyright: ignore[reportCallIssue]
        loss = out["loss"] if isinstance(out, Mapping) else out
        n = (
            size(batch)
            if size
            else len(next(t for t in tree_leaves(batch) if isinstance(t, Tensor)))
        )
        return Terms(loss * n, n)

    return objective


@contextlib.contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    """Within the block a Lightning module logs nothing: its means are those of the training."""
    held = vars(module)
    own = {name: held[name] for name in LOGS if name in held}
    held.update(dict.fromkeys(LOGS, lambda *_, **__: None))
    try:
        yield
    finally:
        for name in LOGS:
            held.pop(name, None)
        held.update(own)


def drawn(objective: Objective, model: nn.Module, batch: Any, index: int, draws: int) -> Terms:
    """The mean of an objective's terms over fixed draws of the network's random numbers.

    Weights too may differ from draw to draw, as those of tokens that are masked at random.

    Args:
        objective: Of one draw.
        model: With θ inside.
        batch: The batch.
        index: Its number, part of the seed.
        draws: How many; their seeds are `draws * index` and those that follow.
    """
    cards = {t.device for t in tree_leaves(batch) if isinstance(t, Tensor) and t.is_cuda}
    with torch.random.fork_rng(list(cards)):
        terms_of_draws = []
        for draw in range(draws):
            torch.manual_seed(draws * index + draw)
            terms_of_draws.append(objective(model, batch))

    def mean(values: list[Any]) -> Any:
        return None if values[0] is None else torch.stack(values).mean(0)

    def mean_weight(values: list[Any]) -> Any:
        return mean([None if v is None else torch.as_tensor(v).double() for v in values])

    return Terms(
        mean([t.total for t in terms_of_draws]),
        mean_weight([t.weight for t in terms_of_draws]),
        mean([t.samples for t in terms_of_draws]),
        mean_weight([t.weights for t in terms_of_draws]),
        mean([t.penalty for t in terms_of_draws]),
        outputs=[t.outputs for t in terms_of_draws],
    )
