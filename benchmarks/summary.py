"""What the tables come to: one ratio per task, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def table(rows: Rows) -> str:
    """Rows as Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def headlines(found: Mapping[str, Rows]) -> list[dict[str, Any]]:
    """Per task: what is compared, and the ratio (above 1: lsa is ahead, unless said otherwise)."""
    lines: list[dict[str, Any]] = []

    def add(task: str, figure: str, value: float) -> None:
        lines.append({"task": task, "figure": figure, "value": value})

    for name in ("eigenvalues", "eigenvalues-resnet20"):
        if name in found:
            accurate = [row for row in found[name] if row["accurate"]]
            times = {row["library"]: row["seconds"] for row in accurate}
            rivals = {k: s for k, s in times.items() if not k.startswith("lsa")}
            for ours in (k for k in times if k.startswith("lsa") and rivals):
                best = min(rivals, key=lambda k: rivals[k])
                add(f"{name}, {ours}", f"time of {best} / ours", rivals[best] / times[ours])
    for row in found.get("products", ()):
        if row["product"] != "gradient":
            add(row["product"], "time / that of a gradient (less is better)", row["gradients"])
    if rows := _by(found, "modes", "mode"):
        ours = {name: row["seconds"] for name, row in rows.items() if name.startswith("lsa")}
        others = {k: row["seconds"] for k, row in rows.items() if k not in ours and k != "gradient"}
        best = min(others, key=lambda k: others[k])
        for name, seconds in ours.items():
            add(f"Hessian product, {name}", f"time of {best} / ours", others[best] / seconds)
    if rows := _by(found, "lower-end", "method"):
        add(
            "smallest eigenvalue",
            "time of ARPACK / ours",
            rows["ARPACK"]["seconds"] / rows["lsa"]["seconds"],
        )
    if rows := _by(found, "density", "library"):
        rivals = {k: row["seconds"] for k, row in rows.items() if not k.startswith("lsa")}
        if rivals:
            best = min(rivals, key=lambda k: rivals[k])
            theirs, ours, apart = rows[best], rows["lsa"], rows["lsa, eigenpairs first"]
            add("spectral density", f"time of {best} / ours", theirs["seconds"] / ours["seconds"])
            add(
                "spectral density, eigenpairs first, for equal errors of the trace",
                f"time of {best} / ours",
                theirs["seconds"] * theirs["its error"] ** 2
                / (apart["seconds"] * apart["its error"] ** 2),
            )  # fmt: skip
    if rows := _by(found, "noise", "method"):
        other = rows.pop("sample gradients and Gram matrix")
        for name, row in rows.items():
            task = f"λ_C, {name}, against sample gradients and Gram matrix"
            add(task, "their time / ours", other["seconds"] / row["seconds"])
            add(task, "their memory / ours", other["MB"] / row["MB"])
    for row in found.get("language", ()):
        if row["what"] != "gradient":
            task = f"{row['network']}: {row['what']}"
            add(task, "time / that of a gradient (less is better)", row["gradients"])
    times: dict[str, dict[str, float]] = {}
    for row in found.get("language-eigenvalues", ()):
        if row["accurate"]:
            task = f"{row['network']}: top three at {row['tolerance']:g}"
            times.setdefault(task, {})[row["library"]] = row["seconds"]
    for task, by in times.items():
        rivals = {k: s for k, s in by.items() if not k.startswith("lsa")}
        for ours in (k for k in by if k.startswith("lsa") and rivals):
            best = min(rivals, key=lambda k: rivals[k])
            add(f"{task}, {ours}", f"time of {best} / ours", rivals[best] / by[ours])
    for row in found.get("training", ()):
        if not row["loop"].startswith("lsa"):
            add(f"epoch of {row['network']}", f"time of the {row['loop']} / ours", row["of lsa's"])
    if rows := _by(found, "line", "what"):
        add(
            "41 points on a line",
            "time / that of bare forward passes (less is better)",
            rows["lsa interpolation"]["ratio"],
        )
    if rows := _by(found, "paths", "search"):
        ours = rows["lsa"]["highest loss"]
        for search, row in rows.items():
            if search != "lsa":
                add(f"path, {search}", "its highest loss / ours", row["highest loss"] / ours)
    for what, exponent in {r["grows"]: r["exponent"] for r in found.get("growth", ())}.items():
        add(f"growth with {what}", "exponent of the time (1: linear)", exponent)
    return lines


def _by(found: Mapping[str, Rows], task: str, key: str) -> dict[str, Mapping[str, Any]]:
    return {row[key]: row for row in found.get(task, ())}


def draw(lines: Rows, file: Path) -> None:
    """The ratios against others as bars on a logarithmic axis."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    bars = [row for row in lines if row["figure"].endswith("/ ours")]
    figure, axes = plt.subplots(figsize=(10, 0.8 + 0.4 * len(bars)), layout="constrained")
    values = [row["value"] for row in bars]
    places = range(len(bars))[::-1]
    axes.barh(places, [v - 1 for v in values], left=1, color="#4477aa")
    for place, value in zip(places, values, strict=True):
        axes.text(max(value, 1) * 1.03, place, f"{value:.2g}×", va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", yticks=places, xlabel="ratio (right of 1: lsa is ahead)")
    names = [f"{row['task']}\n{row['figure']}" for row in bars]
    axes.set_yticklabels(names, fontsize=8)
    axes.margins(y=0.02)
    axes.set_xlim(right=max([*values, 1]) * 1.7)  # with its number
    figure.savefig(file, dpi=130)
    plt.close(figure)
