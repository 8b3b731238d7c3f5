"""A report as a Markdown file."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.report import tables
from trainer.report.analysis import Report
from trainer.report.compare import Comparison
from trainer.report.drawing import Drawing
from trainer.report.tables import Table
from trainer.report.words import METHOD, headline, sentence


def render(report: Report, drawings: Sequence[Drawing], comparison: Comparison | None = None) -> str:
    """The whole file; figures are referred to as `figures/NAME.svg`."""
    results = report.results
    lines = [f"# {results.title}, scale {results.scale}", ""]
    lines += [results.question, ""] if results.question else []
    lines += [f"{headline(report)} Made {report.made}.", ""]
    lines += [sentence(results.note), ""] if results.note else []
    for warning in report.warnings:
        lines += [f"> **Note:** {_line(warning)}", ""]
    if report.verdicts:
        lines += ["## Verdicts", "", *_table(tables.verdicts(report))]
        for verdict in report.verdicts:
            lines += [f"### {verdict.evidence.claim.statement}", "", f"**{verdict.word}**: {verdict.why}.", ""]
            lines += [f"- {name}: {_line(value)}" for name, value in tables.verdict_facts(verdict, report)] + [""]
    lines += ["## Arms", "", *(line for table in tables.arms(report) for line in _table(table))]
    if comparison is not None:
        lines += [f"## Compared with {comparison.other}", "", *(f"> {_line(note)}\n" for note in comparison.notes)]
        for table in tables.not_empty(comparison.tables):
            lines += _table(table)
    if drawings:
        lines += ["## Figures", ""]
        for drawing in drawings:
            lines += [f"![{drawing.alt}](figures/{drawing.name}.svg)", ""]
    if results.choices:
        lines += ["## Tuning", "", *_table(tables.tuning(report))]
    lines += ["## Runs", "", *_table(tables.runs(report))]
    lines += ["## Code and machine", "", *_table(tables.machines(report))]
    lines += ["## Run it again", "", "```", results.command, "```", ""]
    commands = {record.arm: record.command for record in reversed(results.records) if record.stage == "compare"}
    lines += ["The first run of each arm without the sweep:", "", "```", *list(commands.values())[::-1], "```", ""]
    if results.text:
        lines += [f"`{results.source}` as it was:", "", "```python", results.text.rstrip(), "```", ""]
    lines += ["## How this was decided", "", *(f"- {line}" for line in METHOD), ""]
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    lines = ["| " + " | ".join(_cell(cell) for cell in table.header) + " |", "|" + "---|" * len(table.header)]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows]
    return [*lines, "", *([table.caption, ""] if table.caption else [])]


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split())
