"""`python -m benchmarks`: measure side by side in one run; print, and write tables and a figure."""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import (
    density,
    eigenvalues,
    growth,
    language,
    line,
    lower_end,
    modes,
    noise,
    paths,
    products,
    setting,
    summary,
    training,
    watch,
)
from benchmarks.machine import PACKAGES, described, installed
from lsa.landscape.derivatives.precision import full_float32
from lsa.runtime import heap

Rows = Sequence[Mapping[str, Any]]
NARROW = {"width": 8}  # where thousands of gradients are needed


class Task(NamedTuple):
    """One table: on which network and how many images, and what is measured there."""

    title: str
    network: str
    samples: int
    rows: Callable[..., Rows]  # (model, x, y, rivals); of watch the networks' names
    options: Mapping[str, Any] = {}  # of the network
    trained: int = 0  # images that it is trained on, where those are more


TASKS = {
    "products": Task(
        "One product", "simple_cnn", 512, lambda model, x, y, _: products.rows(model, x, y)
    ),
    "modes": Task(
        "One Hessian product in other modes",
        "simple_cnn",
        512,
        lambda model, x, y, _: modes.rows(model, x, y),
    ),
    "eigenvalues": Task(
        "Three largest eigenvalues to a residual of 1e-3", "simple_cnn", 2048, eigenvalues.rows
    ),
    "eigenvalues-resnet20": Task(
        "Three largest eigenvalues to a residual of 1e-3",
        "resnet20",
        512,
        eigenvalues.rows,
        {"norm": "group"},
    ),
    "lower-end": Task(
        "Smallest eigenvalue to a residual of 1e-3",
        "simple_cnn",
        256,
        lambda model, x, y, _: lower_end.rows(model, x, y),
    ),
    "density": Task(
        f"Spectral density, {density.PROBES} probes of {density.STEPS} steps",
        "simple_cnn",
        64,
        density.rows,
        trained=2048,
    ),
    "noise": Task(
        "Largest eigenvalue of the gradient covariance",
        "simple_cnn",
        2048,
        lambda model, x, y, _: noise.rows(model, x, y),
    ),
    "training": Task(
        "An epoch of training", "simple_cnn", 40_000, lambda _model, x, y, _: training.rows(x, y)
    ),
    "watch": Task(
        "A training that is watched",
        "simple_cnn",
        512,
        lambda _model, x, y, names: watch.rows(x, y, names),
    ),
    "line": Task(
        f"{line.POINTS} points on a line",
        "simple_cnn",
        2048,
        lambda model, x, y, _: line.rows(model, x, y),
    ),
    "paths": Task(
        f"A low path between two minima, batches of {paths.BATCH}",
        "simple_cnn",
        512,
        lambda _model, x, y, _: paths.rows("simple_cnn", x, y, **NARROW),
        NARROW,
    ),
    "growth": Task(
        "Growth of one Hessian product, and of Lanczos",
        "simple_cnn",
        8192,
        lambda model, x, y, _: growth.rows(model, x, y),
    ),
}
LANGUAGE = "language"  # several tables, with networks and data of their own


def main() -> None:
    """Run the benchmarks asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--images", help="class folders (CIFAR-10's, say); default: digits")
    parser.add_argument("--samples", type=int, help="images, instead of each task's own number")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join((*TASKS, LANGUAGE))}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    parser.add_argument("--rivals", default=",".join(PACKAGES), help="comma-separated; '' for none")
    parser.add_argument(
        "--networks",
        help=f"comma-separated: of {LANGUAGE} among 0.8M, 10.7M, 124M; of watch among "
        f"{', '.join(watch.STEPS)}",
    )
    parser.add_argument(
        "--seconds", type=float, help=f"for all of {LANGUAGE}; what is left is left out"
    )
    parser.add_argument("--limit", type=float, help=f"seconds of {LANGUAGE} for one library")
    parser.add_argument(
        "--compiling", type=float, help="seconds torch.compile may take; 0: not tried"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"Markdown file, or folder; beside it the figure, and rows of {LANGUAGE}",
    )
    chosen = parser.parse_args()
    heap.keep()  # for all contestants alike
    warnings.filterwarnings("ignore")
    rivals = _listed(chosen.rivals, PACKAGES, parser)
    missing = [PACKAGES[name] for name in rivals if not installed(name)]
    if missing and chosen.only not in (LANGUAGE, "watch"):  # there, what fails is a row
        parser.error(
            f"not installed: {', '.join(missing)}; pip install 'loss-landscape-analysis[bench]'"
        )
    found: dict[str, Rows] = {}
    known = dict.fromkeys((*TASKS, LANGUAGE))
    for name in _listed(chosen.only, known, parser) if chosen.only else known:
        if name == LANGUAGE:
            found |= _language(chosen, rivals)
            continue
        task = TASKS[name]
        n = chosen.samples or task.samples
        trained = n if chosen.samples else max(n, task.trained)
        x, y = setting.images(chosen.images, trained, chosen.device)
        model = setting.network(task.network, x[:2048], y[:2048], **task.options)
        x, y = x[:n], y[:n]
        with full_float32():  # PyTorch's default on a GPU would fail the accuracy asked for
            given = _networks(chosen) if name == "watch" else rivals
            found[name] = task.rows(model, x, y, given)
        d = sum(p.numel() for p in model.parameters())
        title = f"{task.title}: {task.network}, {d:,} parameters, {len(x):,} images"
        print(f"## {title}\n\n{summary.table(found[name])}\n", flush=True)
        found[name] = [{"": title}, *found[name]]
    headlines = summary.headlines({name: rows[1:] for name, rows in found.items()})
    parts = [
        "# Benchmarks",
        described(chosen.device),
        f"`{' '.join(['python -m benchmarks', *_shown(sys.argv[1:])])}`",
        *([summary.table(headlines)] if headlines else []),
        *(f"## {rows[0]['']}\n\n{summary.table(rows[1:])}" for rows in found.values()),
    ]
    if headlines:
        print(parts[3])
    if chosen.out:
        chosen.out = _page(chosen.out)
        if headlines:
            figure = chosen.out.with_suffix(".png")
            summary.draw(headlines, figure)
            parts.insert(4, f"![Ratios]({figure.name})")
        chosen.out.write_text("\n\n".join(parts) + "\n")


def _language(chosen: argparse.Namespace, rivals: Sequence[str]) -> dict[str, Rows]:
    """The tables of language models, of which each row is printed and written when it is there."""
    card = chosen.device != "cpu"
    options = language.Options(
        chosen.device,
        _networks(chosen),
        rivals,
        chosen.seconds or math.inf,
        chosen.limit or (25.0 if card else math.inf),
        (60.0 if card else 0.0) if chosen.compiling is None else chosen.compiling,
    )
    file = _page(chosen.out).with_suffix(".jsonl") if chosen.out else None

    def write(row: Mapping[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False)
        print(line, flush=True)
        if file:
            with file.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")

    found: dict[str, list[Mapping[str, Any]]] = {}
    write({"machine": described(chosen.device)})
    with full_float32():
        for key, row in language.tables(options):
            found.setdefault(key, [{"": language.TITLES[key]}]).append(row)
            write({"table": key, **row})
    for title, *rows in found.values():
        print(f"## {title['']}\n\n{summary.table(rows)}\n", flush=True)
    return dict(found)


def _networks(chosen: argparse.Namespace) -> Sequence[str]:
    """The networks that were asked for; none is all."""
    return chosen.networks.split(",") if chosen.networks else ()


def _page(out: Path) -> Path:
    """The Markdown file that is written."""
    if out.suffix == ".md":
        return out
    out.mkdir(parents=True, exist_ok=True)
    return out / "benchmarks.md"


def _listed(text: str, known: Mapping[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
    return names


def _shown(arguments: Sequence[str]) -> list[str]:
    """The command as it can be repeated elsewhere: with no folder of this machine."""
    return ["FOLDER" if a.startswith("/") and not a.endswith(".md") else a for a in arguments]


if __name__ == "__main__":
    main()
