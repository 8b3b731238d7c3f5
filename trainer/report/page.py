"""A report as one HTML file that needs nothing else: no network, no script, readable on a phone."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

from trainer.report import tables
from trainer.report.analysis import Report
from trainer.report.compare import Comparison
from trainer.report.drawing import Drawing
from trainer.report.tables import Table
from trainer.report.verdicts import CONTRADICTED, NO_VERDICT, NOT_REPRODUCED, REPRODUCED, SAME_DIRECTION, UNDERPOWERED
from trainer.report.words import METHOD, headline, sentence

MARKS = {
    REPRODUCED: ("✓", "good"),
    SAME_DIRECTION: ("~", "open"),
    NOT_REPRODUCED: ("○", "weak"),
    CONTRADICTED: ("✗", "bad"),
    UNDERPOWERED: ("?", "open"),
    NO_VERDICT: ("–", "open"),
}
"""A sign and a class of colour a verdict: neither stands alone, the word is always there."""

LONG = 240
"""Characters of a note that are shown before it is opened."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6168; --paper: #fbfbfa; --card: #ffffff;
  --line: #dcdfe3; --good: #0a6b4a; --bad: #a3271f; --weak: #7a4b00; --open: #3d4f7c; --warn: #fff4d6; --warnink: #5c4300; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e9eb; --soft: #a4abb3; --paper: #15171a;
  --card: #1d2024; --line: #363b41; --good: #5fd3a5; --bad: #ff8f86; --weak: #f0b75a; --open: #9db4f5;
  --warn: #3a3115; --warnink: #f5e3b0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 50rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .75rem; }
h3 { font-size: 1.02rem; margin: 0 0 .5rem; } p { margin: .5rem 0; }
.soft { color: var(--soft); } .lead { font-size: 1.05rem; }
.warning { background: var(--warn); color: var(--warnink); border-radius: .4rem; padding: .6rem .8rem; margin: .5rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1rem; margin: .8rem 0; }
.verdict { display: inline-block; font-weight: 650; border: 1.5px solid; border-radius: 1rem; padding: .1rem .7rem; }
.good { color: var(--good); } .bad { color: var(--bad); } .weak { color: var(--weak); } .open { color: var(--open); }
dl { display: grid; grid-template-columns: minmax(6.5rem, max-content) 1fr; gap: .2rem .9rem;
  margin: .7rem 0 0; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; max-width: 26rem; } td { min-width: 12rem; } td.one { white-space: nowrap; min-width: 3rem; }
.wide { min-width: 8rem; }
th { font-weight: 600; color: var(--soft); }
figure { margin: 1rem 0; background: #fff; color: #1c1e21; border: 1px solid var(--line); border-radius: .5rem;
  padding: .4rem; }
figure svg { display: block; width: 100%; height: auto; max-height: 80vh; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem;
  font-size: .82rem; overflow-wrap: normal; }
details { margin: .5rem 0; } summary { cursor: pointer; padding: .4rem 0; }
li { margin: .3rem 0; }
@media (max-width: 34rem) { dl { display: block; } dt { margin-top: .45rem; } h1 { font-size: 1.3rem; } }
"""


def render(report: Report, drawings: Sequence[Drawing], comparison: Comparison | None = None) -> str:
    """The whole file."""
    results = report.results
    title = f"{results.title}, scale {results.scale}"
    body = [f"<h1>{_text(title)}</h1>"]
    body += [f'<p class="lead">{_text(results.question)}</p>'] if results.question else []
    body += [
        f"<p>{_text(headline(report))}</p>",
        f'<p class="soft">{_text(sentence(results.note))} Made {_text(report.made)}.</p>',
    ]
    body += [_note(warning) for warning in report.warnings]
    if report.verdicts:
        body += ["<h2>Verdicts</h2>", *(_card(report, index) for index in range(len(report.verdicts)))]
    body += ["<h2>Arms</h2>", *(_table(table) for table in tables.arms(report))]
    if comparison is not None:
        body += [f"<h2>Compared with {_text(comparison.other)}</h2>"]
        body += [_note(note) for note in comparison.notes]
        body += [_table(table) for table in tables.not_empty(comparison.tables)]
    body += ["<h2>Figures</h2>"] if drawings else []
    body += [_figure(drawing) for drawing in drawings]
    if results.choices:
        body += ["<h2>Tuning</h2>", _table(tables.tuning(report))]
    body += ["<h2>Runs</h2>", _folded(f"All {len(results.records)} runs", _table(tables.runs(report)))]
    body += ["<h2>Code and machine</h2>", _table(tables.machines(report))]
    body += ["<h2>Run it again</h2>", _code(results.command)]
    if results.text:
        body += [_folded(f"{results.source} as it was", _code(results.text))]
    body += [_folded("The config of each arm", _configs(report)), "<h2>How this was decided</h2>"]
    body += ["<ul>", *(f"<li>{_text(line.replace('`', ''))}</li>" for line in METHOD), "</ul>"]
    content = "\n".join(body)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{content}\n</main>\n</body>\n</html>\n"
    )


def _card(report: Report, index: int) -> str:
    verdict = report.verdicts[index]
    mark, colour = MARKS[verdict.word]
    facts = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in tables.verdict_facts(verdict, report))
    return (
        f'<section class="card"><h3>{_text(verdict.evidence.claim.statement)}</h3>'
        f'<p><span class="verdict {colour}">{mark} {_text(verdict.word)}</span></p>'
        f"<p>{_text(verdict.why)}.</p><dl>{facts}</dl></section>"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col"{_wide(cell)}>{_text(cell)}</th>' for cell in table.header)
    rows = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in table.rows)
    caption = f'<p class="soft">{_text(table.caption)}</p>' if table.caption else ""
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{caption}'


def _wide(text: str) -> str:
    return ' class="wide"' if len(text) > 14 else ""


def _cell(text: str) -> str:
    """Short cells stay on one line, so that an interval is not broken."""
    return f'<td class="one">{_text(text)}</td>' if len(text) <= 28 else f"<td>{_text(text)}</td>"


def _figure(drawing: Drawing) -> str:
    # Ids inside one SVG may be those of another; both would then show the first one's shapes.
    svg = drawing.svg
    for identifier in sorted(set(_identifiers(svg)), key=len, reverse=True):
        svg = svg.replace(f'id="{identifier}"', f'id="{drawing.name}-{identifier}"')
        svg = svg.replace(f'"#{identifier}"', f'"#{drawing.name}-{identifier}"')
        svg = svg.replace(f"url(#{identifier})", f"url(#{drawing.name}-{identifier})")
    label = html.escape(drawing.alt, quote=True)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f"<figure>{svg}</figure>"


def _identifiers(svg: str) -> list[str]:
    return [part.partition('"')[0] for part in svg.split(' id="')[1:]]


def _configs(report: Report) -> str:
    parts = []
    for arm in report.arms:
        record = next((record for record in report.results.of(arm.name)), None)
        if record is not None:
            text = json.dumps(record.config, indent=1, sort_keys=True)
            parts.append(f"<h3>{_text(arm.name)}</h3>{_code(record.command)}{_code(text)}")
    return "".join(parts)


def _note(text: str) -> str:
    """A box; of a long text, such as a list of every rule that was changed, the beginning, which opens."""
    if len(text) <= LONG:
        return f'<p class="warning" role="note">{_text(text)}</p>'
    begin = text[:LONG].rpartition(" ")[0]
    rest = text[len(begin) :]
    return f'<details class="warning" role="note"><summary>{_text(begin)} &hellip;</summary>{_text(rest.strip())}</details>'


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def _code(text: str) -> str:
    return f'<pre tabindex="0"><code>{_text(text)}</code></pre>'


def _text(text: str) -> str:
    return html.escape(text, quote=False)
