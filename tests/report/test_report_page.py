"""What a reader gets: Markdown, figures, and one page that needs nothing else and fits a phone."""

import html.parser
import json
import re
import shutil
import subprocess
import warnings

import numpy as np
import pytest

from trainer.report.analysis import analyse
from trainer.report.cli import main, write
from trainer.report.figures import draw
from trainer.report.reading import of_plan
from trainer.report.words import sentence
from trainer.sweep import Arm, Claim, Metric, Rule, Scale, Tuning, axis

RATE = "optimizer.direction.learning_rate"
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


class Reader(html.parser.HTMLParser):
    """Collects tags with their attributes, and whether every opened tag is closed."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.wrong = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_the_page_is_whole_and_asks_the_network_for_nothing(page):
    text = (page / "report.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert not reader.wrong and not reader.open
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object", "embed"} and {"svg", "table", "dl", "details"} <= names
    for tag, attributes in reader.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert value.startswith(("#", "data:")), (tag, name, value)
    for address in re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')]+)", text):
        assert address.startswith(("#", "data:"))
    identifiers = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def test_the_page_says_the_verdict_in_words_escapes_names_and_describes_its_figures(page):
    text = (page / "report.html").read_text()
    assert "✓ reproduced" in text and "b beats a &amp; more" in text and "nothing &lt;b&gt;bold" in text
    assert "1 B parameters, 20 B tokens" in text and 'name="viewport"' in text and 'lang="en"' in text
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', text)
    assert len(labels) == text.count("<figure>") >= 5 and all(len(label) > 20 for label in labels)


def test_the_markdown_has_the_same_numbers_and_its_figures_exist(page):
    text, found = (page / "report.md").read_text(), json.loads((page / "report.json").read_text())
    for name in re.findall(r"\(figures/([^)]+)\)", text):
        assert (page / "figures" / name).is_file()
    assert len(re.findall(r"!\[[^\]]+\]\(figures/", text)) == len(list((page / "figures").iterdir())) >= 5
    mean = f"{found['claims'][0]['mean']:.4g}"
    assert mean in text and mean in (page / "report.html").read_text()
    assert "python -m trainer.sweep planted.py --scale smoke" in text and "def get_experiment" in text
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| b beats a")}
    assert len(widths) == 1


def test_figures_are_the_same_bytes_when_they_are_made_again(page, monkeypatch):
    monkeypatch.chdir(page.parent)
    before = {path.name: path.read_bytes() for path in (page / "figures").iterdir()}
    assert main(["planted.py", "--scale", "smoke", "--out", "out"]) == 0
    assert before == {path.name: path.read_bytes() for path in (page / "figures").iterdir()}


def test_numbers_over_layers_are_drawn_as_heat_maps_and_a_grid_of_rates_as_a_u_curve(planted, make_experiment):
    found = make_experiment(arms=[Arm("rate", space=axis(RATE, [0.001, 0.01, 0.1, 0.3]))], claims=[])
    plan = planted.plan(found)
    for run in plan.runs:
        rate = json.loads(run.config)["optimizer"]["direction"]["learning_rate"]
        if rate == 0.3:
            planted.write(run, [4.0, 9.0], state="failed", message="Diverged: the loss is not finite")
        else:
            planted.write(run, [4.0, 3.0, 1.0 + abs(np.log10(rate) + 2)], arrays=True)
    drawings = {drawing.name: drawing for drawing in draw(planted.report(plan))}
    assert "heat-train-grad_norm_by_layer" in drawings and "image/png;base64" in drawings["heat-train-grad_norm_by_layer"].svg
    u_curve = drawings["u-curve-learning_rate"]
    assert "1 at 0.01" in u_curve.alt and "0.3" not in u_curve.alt.replace("0.3,", "")


def test_a_heat_map_is_of_the_seeds_with_the_most_rows_and_not_of_what_is_the_same_everywhere(planted, make_experiment):
    plan = planted.plan(make_experiment(claims=[]))
    for run in plan.runs:
        directory = planted.write(run, [4.0, 3.0])
        with (directory / "metrics.jsonl").open("a") as file:
            for step in (1, 2) if run.seed == 0 else (2,):
                rates = {"rate": [1.0 + step, 2.0], "gain": [1.0, 1.0]}
                file.write(json.dumps({"step": step, "split": "diagnostics", "multipliers": rates}) + "\n")
    drawings = {drawing.name: drawing.svg for drawing in draw(planted.report(plan))}
    assert "a (1 of 5 seeds)" in drawings["heat-diagnostics-multipliers-rate"]
    assert "heat-diagnostics-multipliers-gain" not in drawings


def test_rates_of_measurements_and_of_training_are_drawn_apart(planted, make_experiment):
    grids = {"": axis(RATE, [0.001, 0.01]), "toy": axis("learning_rate", [8.0, 16.0])}
    how = {"measure": "experiments.drop_muon:digits"}  # is never called here
    rest = dict.fromkeys(("channels", "batch", "steps", "every", "rest"))
    tuned = {name: Tuning(space=grid, seeds=[100]) for name, grid in grids.items()}
    arms = [Arm("text", tune=tuned[""]), Arm("toy", rest | {"learning_rate": 1.0}, tune=tuned["toy"], **how)]
    plan = planted.plan(make_experiment(arms=arms, claims=[]))
    for run in plan.runs:
        planted.write(run, [4.0, 3.0, float(run.point.partition("=")[2])])
    drawings = {drawing.name: drawing for drawing in draw(planted.report(plan))}
    assert "8 at 8, 16 at 16" in drawings["u-curve-learning_rate"].alt
    assert "0.01 at 0.01" in drawings["u-curve-optimizer-direction-learning_rate"].alt


def test_arms_with_curves_have_colours_of_their_own_however_many_arms_have_none(planted, make_experiment):
    """Measurements have one row each, and no curve."""
    arms = [Arm(name, {"optimizer.direction.learning_rate": 0.1 + 0.01 * k}) for k, name in enumerate("abcdefghi")]
    plan = planted.plan(make_experiment(arms=arms, claims=[]))
    for run in plan.runs:
        planted.write(run, [4.0, 3.0, 2.0] if run.arm in "ai" else [2.0])
    drawings = {drawing.name: drawing.svg for drawing in draw(planted.report(plan))}
    for name in ("curve-val-loss", "speed"):
        colours = re.findall(r'<path d="[^"]+"[^>]*style="[^"]*stroke: (#[0-9a-f]{6})', drawings[name])
        assert {"#0072b2", "#d55e00"} <= set(colours), name


def test_quantiles_over_layers_are_drawn_as_a_heat_map_of_the_middle_one(planted):
    from trainer.metrics.jsonl import MetricsWriter
    from trainer.report.heat_maps import arrays
    from trainer.report.results import Results

    plan = planted.plan()
    spectra = [[0.1, 0.2, 0.9], [0.3, None, 0.8]]
    for run in plan.runs:
        directory = planted.write(run, [4.0, 3.0, 2.0])
        with MetricsWriter(directory / "metrics.jsonl") as metrics:
            for step in (1, 2):
                site = {"mixer.query": [[x and x / step for x in row] for row in spectra]}
                row = {"momentum_spectrum": site, "ragged": [[1.0], [1.0, 2.0]], "one": [[1.0, 2.0]]}
                metrics.write({"step": step, "split": "diagnostics", **row})
    results = of_plan(plan, planted.place)
    assert isinstance(results, Results)
    found = arrays(results.records[0])
    assert set(found) == {("diagnostics", "momentum_spectrum/mixer.query, middle quantile")}
    (_, first), (_, second) = found["diagnostics", "momentum_spectrum/mixer.query, middle quantile"]
    np.testing.assert_array_equal(first, [0.2, np.nan])
    np.testing.assert_array_equal(second, [0.1, np.nan])
    names = [drawing.name for drawing in draw(analyse(results))]
    assert "heat-diagnostics-momentum_spectrum-mixer.query-middle-quantile" in names


def test_a_report_without_any_finished_run_is_made_all_the_same(planted, tmp_path):
    plan = planted.plan()
    report = planted.report(plan)
    assert write(report, tmp_path / "none") == [] and "10 missing" not in (tmp_path / "none" / "report.md").read_text()
    assert "0 of 10 runs finished" in (tmp_path / "none" / "report.html").read_text()


def test_many_arms_and_long_names_are_drawn(planted, make_experiment):
    arms = [Arm("a"), *(Arm(f"an arm with a rather long name, number {i}", {RATE: 0.1 + i / 10}) for i in range(10))]
    claim = Claim(statement="s", source="x", arm=arms[1].name, against="a", rule=Rule())
    found = make_experiment(arms=arms, claims=[claim], scales={"smoke": Scale(seeds=2)})
    plan = planted.plan(found)
    for run in plan.runs:
        planted.write(run, [4.0, 3.0 + run.seed, 2.0 + run.seed], arrays=True)
    drawings = draw(planted.report(plan))
    assert all(drawing.svg.startswith("<svg") and drawing.svg.rstrip().endswith("</svg>") for drawing in drawings)
    assert next(d for d in drawings if d.name == "curve-val-loss").svg.count("an arm with a rather long") == 10


def test_a_loss_that_falls_far_has_a_logarithmic_axis_and_a_share_of_right_answers_none(planted, make_experiment):
    plan = planted.plan(make_experiment(also=[Metric("accuracy", lower_is_better=False)]))
    for run in plan.runs:
        planted.write(run, [99.0, 9.0, 1.0])  # accuracy: 0.01, 0.1, 0.5
    drawings = {drawing.name: drawing.svg for drawing in draw(planted.report(plan))}
    powers = {name: "10^{" in drawings[name] or "10</tspan>" in drawings[name] for name in drawings if name.startswith("curve")}
    assert powers == {"curve-val-loss": True, "curve-train-loss": True, "curve-val-accuracy": False}


def test_a_long_note_opens_and_loses_nothing(planted, tmp_path):
    report = planted.report(planted.write_all(planted.better))
    report.warnings += ["short & plain", "word " * 80 + "end <b>"]
    write(report, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert '<p class="warning" role="note">short &amp; plain</p>' in text
    note = re.search(r'<details class="warning" role="note"><summary>([^<]*) &hellip;</summary>([^<]*)</details>', text)
    assert html.unescape(f"{note[1]} {note[2]}") == "word " * 80 + "end <b>"


def test_a_component_is_called_by_its_name_in_a_u_curve(planted, make_experiment):
    mixer = {"name": "gla", "convolution": 4}
    arms = [Arm(f"{rate}", {RATE: rate, "model.mixer": mixer}) for rate in (0.1, 0.2, 0.4)]
    claim = Claim(statement="s", source="x", arm="0.1", against="0.2", rule=Rule())
    plan = planted.plan(make_experiment(arms=arms, claims=[claim]))
    for run in plan.runs:
        planted.write(run, [4.0, 3.0, 2.0])
    drawings = {drawing.name: drawing.alt for drawing in draw(planted.report(plan))}
    assert "mixer=gla (convolution=4): 2 at 0.1" in drawings["u-curve-learning_rate"]


def test_tunings_of_another_task_are_drawn_apart(planted, make_experiment):
    tune = Tuning(space=axis(RATE, [0.1, 0.2, 0.4]), seeds=[100])
    arms = [Arm(name, tune=tune) for name in ("a", "on text: a", "on text: b")]
    claim = Claim(statement="s", source="x", arm="on text: b", against="on text: a", rule=Rule())
    found = make_experiment(arms=arms, claims=[claim])
    for _ in range(2):  # runs that compare are known once the tuning has ended
        for run in planted.plan(found).runs:
            planted.write(run, [4.0, 3.0, 2.0])
    drawings = {drawing.name: drawing.alt for drawing in draw(planted.report(planted.plan(found)))}
    assert "a (tuning): 2 at 0.1" in drawings["u-curve-learning_rate"]
    assert "text" not in drawings["u-curve-learning_rate"]
    assert all(f"on text: {name} (tuning): 2 at 0.1" in drawings["u-curve-learning_rate-on-text"] for name in "ab")


def test_arms_of_another_task_are_drawn_apart(planted, make_experiment):
    arms = [Arm("a"), Arm("b", {RATE: 0.2}), Arm("on text: a", {RATE: 0.3}), Arm("on text: b", {RATE: 0.4})]
    found = make_experiment(arms=arms, claims=[Claim(statement="s", source="x", arm="b", against="a", rule=Rule())])
    plan = planted.plan(found)
    for run in plan.runs:
        planted.write(run, [4.0, 3.0, 2.0])
    drawings = {drawing.name: drawing for drawing in draw(planted.report(plan))}
    for name in ("curve-val-loss", "speed"):
        assert "on text" not in drawings[name].svg and "on text: a" in drawings[f"{name}-on-text"].svg
        assert drawings[f"{name}-on-text"].title.startswith("on text: ")
    # A family has colours of its own.
    assert drawings["speed"].svg.count("#0072b2") == drawings["speed-on-text"].svg.count("#0072b2") > 0


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_offline_without_sideways_scrolling(page, tmp_path, width):
    probe = (
        "<script>addEventListener('load', () => { const d = document.documentElement; "
        "document.title = JSON.stringify({inner: innerWidth, scroll: d.scrollWidth, height: d.scrollHeight, "
        "figures: [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width), "
        "text: parseFloat(getComputedStyle(document.body).fontSize)}) })</script>"
    )
    text = (page / "report.html").read_text()
    (tmp_path / "direct.html").write_text(text.replace("</head>", f"{probe}</head>"))
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
        "--virtual-time-budget=2000", "--dump-dom", f"file://{tmp_path / 'direct.html'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stderr[-2000:]
    found = json.loads(title.group(1))
    assert found["scroll"] <= found["inner"] and found["height"] > 1500 and found["text"] >= 16
    assert len(found["figures"]) >= 5 and all(found["inner"] * 0.5 < w <= found["inner"] or w > 600 for w in found["figures"])


def test_twenty_arms_leave_room_for_their_curves(planted, make_experiment):
    arms = [Arm(f"an arm with a name of some length, {i}", {RATE: 0.1 + i}) for i in range(20)]
    plan = planted.plan(make_experiment(arms=arms, claims=[], scales={"smoke": Scale(seeds=2)}))
    for run in plan.runs:
        planted.write(run, [4.0, 3.0, 2.0 + run.seed])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Matplotlib warns where axes collapse
        drawn = draw(planted.report(plan))
    heights = [
        float(re.search(r'height="([0-9.]+)pt"', drawing.svg).group(1)) for drawing in drawn if drawing.name.startswith("curve")
    ]
    assert min(heights) > 72 * 5


def test_of_curves_that_are_not_finite_everywhere_the_rest_is_drawn_without_a_warning(planted):
    plan = planted.plan()
    for run in plan.runs:
        first, last = (np.inf, np.nan) if run.seed == 1 else (9.0, 1.0)
        planted.write(run, [first, 4.0, 3.0 + run.seed / 100, last if run.arm == "b" else 2.0], arrays=True)
        path = planted.place.directory(run) / "metrics.jsonl"
        path.write_text(path.read_text().replace("[9.0, 18.0", '["-Infinity", 18.0' if run.seed == 2 else "[9.0, 18.0"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = {drawing.name: drawing for drawing in draw(planted.report(plan))}
    assert {"curve-val-loss", "curve-train-loss", "speed", "heat-train-grad_norm_by_layer"} <= drawn.keys()
    assert "a (n = 5) ends at 2; b (n = 5) ends at 3.02" in drawn["curve-val-loss"].alt


def test_a_note_begins_with_a_capital_unless_it_begins_with_a_file():
    assert sentence("two cores.") == "Two cores." and sentence("configs/tiny.py as it is") == "configs/tiny.py as it is."
    assert sentence("") == ""
