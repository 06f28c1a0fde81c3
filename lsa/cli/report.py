"""The commands about what a project has measured: compare, report."""

from __future__ import annotations

from typing import Annotated

import typer

from lsa.cli.show import JSON, print_json
from lsa.cli.study import NAME, PROJECT
from lsa.runtime.errors import InputError


def compare(
    name: NAME = None,
    project: PROJECT = None,
    json: JSON = False,
) -> None:
    """Compare a project's optimizers over its seeds; say which differences are established.

    Keys of --json: project, optimizers and seeds (that were trained), seeds_needed, findings
    [{metric, a, b, scale, seeds, effect, low, high, p, p_adjusted, established, at_equal_loss,
    verdict, doubt, sentence}], pairs [{metric, subject, seeds, mean, low, high, side, beyond,
    p_adjusted, established, verdict, doubt, sentence}]. A number that JSON does not have is the
    text nan, inf or -inf.
    """
    from lsa import project as projects
    from lsa.reports import findings, measurements
    from lsa.reports.extent import counted, extent
    from lsa.runtime.documents import storable

    setting = projects.load(name or project or projects.DEFAULT)
    measured = measurements.measured(setting)
    known = extent(measured)
    if json:
        print_json(storable(findings.document(setting, measured)))
        return
    again = f"run lsa study {name or project or setting.name}"
    absent = ", ".join(other for other in setting.optimizers if other not in known.trained)
    told = [*findings.findings(measured), *findings.pair_findings(measured)]
    if not told:
        lacking = f"lacks trainings of {absent}; {again}"
        only = "has one optimizer; add another to its file, then " + again
        print(f"nothing to compare yet: project {setting.name} {lacking if absent else only}")
        return
    metric = ""
    for finding in told:
        if finding.metric != metric:
            metric = finding.metric
            print(metric)
        print(f"    {finding.sentence}")
    print(
        "Paired by seed; exact sign-flip p, Holm-adjusted over "
        f"{counted(known.pairs, 'pair')}. {known.limit}"
    )
    if absent:
        print(f"Not trained so far, and not compared: {absent}; {again}")


def report(
    name: NAME = None,
    project: PROJECT = None,
    out: Annotated[str, typer.Option(help="folder for the page; MLflow keeps a copy")] = ".",
) -> None:
    """Write a project's report as HTML, Markdown and JSON, and its explorer, from the store."""
    import json
    from pathlib import Path

    from lsa import project as projects
    from lsa.reports import explorer
    from lsa.reports import report as reports
    from lsa.tracking import recording

    setting = projects.load(name or project or projects.DEFAULT)
    made, explored = reports.report(setting), explorer.page(setting)
    folder = Path(out)
    if not folder.is_dir():
        raise InputError(f"there is no folder {out}; make it, or give out=… another")
    tags = {"lsa.step": "report", "project": setting.name}
    title = f"report-{setting.name}"
    with recording.run(title, experiment=setting.name, tags=tags, device="cpu") as opened:
        reports.log(opened, made, explored)
    page = folder / f"{title}.html"
    page.write_text(made.html, encoding="utf-8")
    page.with_suffix(".md").write_text(made.markdown, encoding="utf-8")
    page.with_suffix(".json").write_text(json.dumps(made.content, indent=1), encoding="utf-8")
    beside = folder / f"explorer-{setting.name}.html"
    beside.write_text(explored, encoding="utf-8")
    print(f"{page}\n{beside}\nrun  {opened.id}")
