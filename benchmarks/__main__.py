"""`python -m benchmarks`: measure, print and write the table."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import platform
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import eigenvalues, products, setting

PACKAGES = {
    "curvlinops": "curvlinops-for-pytorch",
    "eigenthings": "hessian-eigenthings",
    "pyhessian": "PyHessian",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmarks asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--images", help="class folders (CIFAR-10's, say); default: digits")
    parser.add_argument("--model", default="simple_cnn")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--only", choices=("products", "eigenvalues"))
    parser.add_argument("--rivals", default=",".join(PACKAGES), help="comma-separated; '' for none")
    parser.add_argument("--out", type=Path, help="Markdown file")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    rivals = [name for name in chosen.rivals.split(",") if name]
    missing = [PACKAGES[name] for name in rivals if not _installed(name)]
    if missing:
        parser.error(f"not installed: {', '.join(missing)}; pip install 'lsa[bench]'")
    x, y = setting.images(chosen.images, chosen.samples)
    options = {"norm": "group"} if chosen.model.startswith("resnet") else {}
    model = setting.network(chosen.model, x, y, **options)
    d = sum(p.numel() for p in model.parameters())
    parts = [f"{_machine()}\n\n{chosen.model}, {d:,} parameters, {len(x):,} images."]
    if chosen.only in (None, "products"):
        parts.append(
            f"One product, {products.SAMPLES} images:\n\n" + table(products.rows(model, x, y))
        )
        print(parts[-1], flush=True)
    if chosen.only in (None, "eigenvalues"):
        rows = eigenvalues.rows(model, x, y, rivals)
        parts.append(
            f"The {eigenvalues.K} largest eigenvalues to a residual of {eigenvalues.TOL}:\n\n"
            + table(rows)
        )
        print(parts[-1], flush=True)
    if chosen.out:
        chosen.out.write_text("\n\n".join(parts) + "\n")


def _installed(name: str) -> bool:
    return (
        importlib.util.find_spec("hessian_eigenthings" if name == "eigenthings" else name)
        is not None
    )


def _machine() -> str:
    packages = ["torch", *(p for n, p in PACKAGES.items() if _installed(n))]
    versions = ", ".join(f"{p} {version(p)}" for p in packages)
    today = datetime.date.today()
    return f"{today}, {platform.machine()}, {torch.get_num_threads()} threads; {versions}"


if __name__ == "__main__":
    main()
