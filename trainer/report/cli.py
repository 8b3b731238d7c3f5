"""`python -m trainer.report FILE_OR_DIR [--out DIR] [--compare OTHER]`: from run directories to verdicts and figures."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from strata import ConfigError
from trainer.atomic_files import write_bytes_atomic
from trainer.report.analysis import Report, analyse, to_json
from trainer.report.compare import Comparison, compare, read_other
from trainer.report.curves import curves
from trainer.report.drawing import Drawing
from trainer.report.figures import draw
from trainer.report.reading import read_results
from trainer.report.results import Results
from trainer.report.words import headline
from trainer.sweep.earlier import curves_beside


def main(argv: Sequence[str]) -> int:
    """The command line; prints the verdicts and where the report is."""
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description=__doc__)
    parser.add_argument("target", help="experiment file, a sweep's directory, or a directory of run directories")
    parser.add_argument("--scale", default=None, help="of an experiment file (default laptop, or its first)")
    parser.add_argument("--runs", default="runs", help="where run directories are (default runs)")
    parser.add_argument("--out", type=Path, default=None, help="directory of the report (default: report/ beside the ledger)")
    parser.add_argument("--compare", default=None, metavar="OTHER", help="another report.json, or what one can be made of")
    parser.add_argument("--earlier", default=None, metavar="REPORT", help="report.json to know runs from that are gone")
    arguments = parser.parse_args(argv)
    results = read_results(arguments.target, scale=arguments.scale, runs=arguments.runs, earlier=arguments.earlier)
    report = analyse(results)
    comparison = None
    if arguments.compare is not None:
        other = read_other(arguments.compare, scale=arguments.scale, runs=arguments.runs)
        try:
            comparison = compare(report, other, arguments.compare)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            what = f"not what a report.json of this version holds ({type(error).__name__}: {error})"
            raise ConfigError(f"--compare {arguments.compare}: {what}") from error
    out = arguments.out or default_place(results, arguments.target, arguments.runs)
    write(report, out, comparison)
    for warning in report.warnings:
        print(f"note: {warning}")
    for verdict in report.verdicts:
        print(f"{verdict.word}: {verdict.evidence.claim.statement} ({verdict.why})")
    print(headline(report))
    print(f"report: {out / 'report.md'}, {out / 'report.html'}")
    return 0


def default_place(results: Results, target: str, runs: str) -> Path:
    """`report/` in the sweep's directory, or in the directory of runs."""
    if Path(target).is_dir():
        return Path(target) / "report"
    return Path(runs) / "sweeps" / f"{results.title}-{results.scale}" / "report"


def write(report: Report, out: Path, comparison: Comparison | None = None) -> list[Drawing]:
    """`report` as .md, .html, .json and .curves.jsonl, and `figures/`; what an earlier report left there is replaced."""
    from trainer.report import markdown, page

    drawings = draw(report)
    figures = out / "figures.new"  # a disk that is full must not cost those that are there
    shutil.rmtree(figures, ignore_errors=True)
    figures.mkdir(parents=True)
    for drawing in drawings:
        write_bytes_atomic(figures / f"{drawing.name}.svg", drawing.svg.encode())
    shutil.rmtree(out / "figures", ignore_errors=True)
    figures.rename(out / "figures")
    write_bytes_atomic(out / "report.md", markdown.render(report, drawings, comparison).encode())
    write_bytes_atomic(out / "report.html", page.render(report, drawings, comparison).encode())
    write_bytes_atomic(curves_beside(out / "report.json"), curves(report.results).encode())
    write_bytes_atomic(out / "report.json", (json.dumps(to_json(report), indent=1, allow_nan=False) + "\n").encode())
    return drawings
