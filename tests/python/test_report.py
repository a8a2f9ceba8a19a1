"""`remnant report` as its users run it: tiny runs of the built program, and the page that it writes about them."""

import json
import re
import resource
import shutil
import statistics
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from programs import Program, metrics, steps, summary

SIZES = ["--hidden", "16", "--layers", "2", "--heads", "2", "--feed-forward", "32", "--threads", "1", "--quiet"]
LM = ["--data", "generated", "--sentences", "60", "--context", "16", *SIZES]
NAME = "a <b> & \"c\" 'd'"
VOID = {"meta", "input", "br", "link"}


class Page(HTMLParser):
    """Tags that close in order, tables by id, and the text without tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.tables, self.captions, self.cell, self.text = {}, {}, None, ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.attributes.append((tag, attrs))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables[attrs["id"]] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.cell = ""
        elif tag == "data":
            self.cell = float(attrs["value"])

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if isinstance(self.cell, str):
            self.cell += data
        if "style" not in self.open and "script" not in self.open:
            self.text += data

    def table(self, name):
        """{first cell: other cells} without the head."""
        return {row[0]: row[1:] for row in self.tables[name][1:]}


@pytest.fixture(scope="session")
def lm(program):
    return Program(program, "lm")


@pytest.fixture(scope="session")
def report(program):
    return Program(program, "report")


@pytest.fixture(scope="session")
def runs(lm, tmp_path_factory):
    """Two finished runs that differ in what they keep; the first has a name that must be escaped."""
    folder = tmp_path_factory.mktemp("runs")
    lm("train", *LM, "--epochs", 2, "--attention", "curve:m=2", "--out", folder / NAME)
    lm("train", *LM, "--epochs", 1, "--memory", "exact", "--out", folder / "exact")
    return [folder / NAME, folder / "exact"]


@pytest.fixture(scope="session")
def text(report, runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    result = report(*runs, "--out", out)
    assert result.stdout == f"{out}\n" and result.stderr == ""
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def page(text):
    return Page(text)


def load(run, name):
    return json.loads((run / name).read_text())


def maximum(run, key):
    return max(line[key] for line in steps(run))


def test_the_page_needs_nothing_else(text, page):
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    for tag, attributes in page.attributes:
        assert not {"src", "href", "srcset"} & set(attributes), tag


def test_names_are_escaped(text, page):
    assert NAME in page.text
    assert NAME not in text and "<b>" not in text
    assert not [attributes for tag, attributes in page.attributes if tag == "b"]


def test_every_drawing_is_well_formed_and_described(text, runs):
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    described = 0
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert not re.search(r"nan|inf\b", drawing.split("</desc>")[-1])
        if root.get("aria-hidden") == "true":
            continue
        title, description = root.find("title"), root.find("desc")
        assert root.get("role") == "img"
        assert root.get("aria-labelledby").split() == [title.get("id"), description.get("id")]
        assert title.text and description.text
        described += 1
    # Loss and two measures of validation; memory of both, and of each run; timeline and time of each run.
    assert described == 3 + 1 + 3 * len(runs)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_results_equal_the_files(page, runs):
    table = page.table("results")
    assert page.tables["results"][0] == ["measure", NAME, "exact"]
    for row, key in [("Test bits per character", "bits_per_character"), ("Test bits per byte", "bits_per_byte"),
                     ("Test perplexity", "test_perplexity"), ("Validation perplexity", "validation_perplexity"),
                     ("Best epoch", "best_epoch"), ("Steps", "steps"), ("Parameters", "parameters"),
                     ("Kept for backward, largest step", "kept_bytes"), ("Peak of a step, largest", "peak_bytes")]:
        assert table[row] == [summary(run)[key] for run in runs], row
    assert table["Kept for backward, largest step"] == [maximum(run, "kept_bytes") for run in runs]
    assert table["Peak of a step, largest"] == [maximum(run, "peak_bytes") for run in runs]
    assert table["Step time, median"] == pytest.approx(
        [statistics.median(line["step_ms"] for line in steps(run)) for run in runs], rel=1e-12)
    assert table["Step time, median"] == pytest.approx([summary(run)["step_ms_median"] for run in runs], rel=1e-12)
    assert table["Tokens a second, median"] == pytest.approx(
        [statistics.median(line["tokens_per_second"] for line in steps(run)) for run in runs], rel=1e-12)


def test_settings(page, runs):
    configs = [load(run, "config.json") for run in runs]
    differ = {key for key in configs[0] if configs[0][key] != configs[1].get(key)}
    assert differ == {"attention", "memory", "epochs"}
    assert set(page.table("differences")) == differ
    everything = page.table("settings")
    for key in configs[0]:
        assert everything[key] == [config[key] for config in configs], key


def test_curves_equal_the_files(page, runs):
    for place, key in enumerate(["validation_bits_per_character", "validation_perplexity"]):
        expected = [[str(line["step"]), run.name, line[key]] for run in runs for line in metrics(run) if key in line]
        assert page.tables[f"validation{place}-table"][1:] == expected
    losses = {(run.name, str(line["step"])): line["loss"] for run in runs for line in steps(run)}
    rows = page.tables["loss-table"][1:]
    assert len(rows) >= 10 and all(losses[run, step] == value for step, run, value in rows)
    for run in runs:
        of_run = [step for step, name, _ in rows if name == run.name]
        assert of_run[0] == "1" and of_run[-1] == str(len(steps(run)))


def test_memory_equals_the_files(page, runs):
    for place, run in enumerate(runs):
        memory = load(run, "memory.json")
        table = page.table(f"memory{place}-table")
        totals = [sum(layer[key] for layer in memory["layers"])
                  for key in ("kept_bytes", "predicted_bytes", "eager_bytes")]
        assert table.pop("total") == totals and totals[0] == memory["kept_bytes"]
        assert list(table) == [layer["layer"] or "outside of layers" for layer in memory["layers"]]
        for layer in memory["layers"]:
            expected = [layer[key] for key in ("kept_bytes", "predicted_bytes", "eager_bytes")]
            assert table[layer["layer"] or "outside of layers"] == expected
            assert layer["kept_bytes"] == sum(row["kept_bytes"] for row in memory["rows"] if row["layer"] == layer["layer"])
            assert page.table("memory-table")[layer["layer"] or "outside of layers"][place] == expected[0]
        ops = page.tables[f"memory{place}-rows"][1:]
        assert [row[1] for row in ops] == [row["op"] for row in memory["rows"]]
        for shown, row in zip(ops, memory["rows"], strict=True):
            expected = [row[key] for key in ["count", "kept_bytes", "predicted_bytes", "eager_bytes"]]
            assert shown[5:] == ["–" if value is None else value for value in expected]
    assert page.table("memory-table")["total"] == [load(run, "memory.json")["kept_bytes"] for run in runs]


def test_the_recorded_step_is_that_of_the_metrics(page, runs):
    for place, run in enumerate(runs):
        timeline = load(run, "timeline.json")
        [line] = [line for line in steps(run) if line["step"] == timeline["step"]]
        assert timeline["step"] == 2
        assert timeline["peak_bytes"] == max(timeline["sample_bytes"]) == line["peak_bytes"]
        assert timeline["kept_bytes"] == line["kept_bytes"]
        times = timeline["sample_seconds"]
        assert times == sorted(times) and len(times) == len(timeline["sample_bytes"]) <= 1000
        phases = timeline["phases"]
        assert [phase["phase"] for phase in phases] == ["forward", "backward", "optimizer"]
        assert all(before["end"] <= after["begin"] for before, after in zip(phases, phases[1:]))
        assert phases[-1]["end"] <= timeline["seconds"]
        # At the end of the forward, what is live is what is kept.
        before = [live for time, live in zip(times, timeline["sample_bytes"]) if time <= phases[0]["end"]]
        assert before[-1] == timeline["kept_bytes"]

        table = page.table(f"timeline{place}-table")
        assert table["step"] == [0, timeline["seconds"], timeline["peak_bytes"]]
        for phase in phases:
            assert table[phase["phase"]][:2] == pytest.approx([phase["begin"], phase["end"] - phase["begin"]])
        shown = page.table(f"time{place}-table")
        forward, backward = (sum(layer[key] for layer in timeline["layers"]) for key in ["forward_ms", "backward_ms"])
        assert shown.pop("total") == pytest.approx([forward, backward, forward + backward])
        assert shown == {layer["layer"] or "outside of layers":
                         [layer["forward_ms"], layer["backward_ms"], layer["forward_ms"] + layer["backward_ms"]]
                         for layer in timeline["layers"]}
        # Every moment of a pass is somebody's: the layers add up to the phases, less their first and last steps.
        names = {layer["layer"] for layer in timeline["layers"]}
        assert {"", "embedding", "encoder.layers.0", "encoder.layers.1", "encoder.norm", "output"} <= names
        assert 0 < forward <= (phases[0]["end"] - phases[0]["begin"]) * 1e3
        assert 0 < backward <= (phases[1]["end"] - phases[1]["begin"]) * 1e3


def test_recording_changes_nothing(lm, runs, tmp_path):
    lm("train", *LM, "--epochs", 1, "--memory", "exact", "--fidelity-every", 1, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "timeline.json").exists()  # the check would be in it
    # The check runs after the step's meter stops, so bytes are those of the step.
    keys = ["loss", "kept_bytes", "peak_bytes", "gradient_norm"]
    assert [[line[key] for key in keys] for line in steps(tmp_path / "run")] == \
        [[line[key] for key in keys] for line in steps(runs[1])]


def test_batches_of_a_step_and_resume(lm, report, tmp_path):
    run = tmp_path / "run"
    lm("train", *LM, "--accumulate", 2, "--max-steps", 1, "--out", run)
    first = load(run, "timeline.json")
    assert [phase["phase"] for phase in first["phases"]] == ["forward", "backward"] * 2 + ["optimizer"]
    lm("train", *LM, "--accumulate", 2, "--max-steps", 3, "--out", run, "--resume")
    assert load(run, "timeline.json") == first
    (run / "timeline.json").unlink()
    lm("train", *LM, "--accumulate", 2, "--max-steps", 4, "--out", run, "--resume")
    assert load(run, "timeline.json")["step"] == 4
    report(run)
    assert len(Page((run / "report.html").read_text()).tables["timeline0-table"]) == 1 + 5 + 1


def test_one_run_writes_into_its_folder_and_again(report, runs):
    page = runs[1] / "report.html"
    assert report(runs[1]).stdout == f"{page}\n"
    first = page.read_text()
    report(runs[1])
    assert page.read_text() == first
    assert "differences" not in Page(first).tables and "data-toggle=\"" not in first
    page.unlink()


def test_unfinished_run(report, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    (run / "summary.json").unlink()
    (run / "timeline.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    result = report(run)
    page = Page((run / "report.html").read_text())
    for note in ["line 5, is cut short", "not finished: 4 steps so far", "no timeline.json"]:
        assert note in result.stderr and note in page.text
    table = page.table("results")
    assert table["Training loss, last step"] == [json.loads(lines[3])["loss"]] and table["Steps"] == [4]
    assert not any(row.startswith("Test") for row in table)

    (run / "metrics.jsonl").unlink()
    (run / "memory.json").unlink()
    assert "no step is done yet" in report(run).stderr
    assert "No step is done yet." in (run / "report.html").read_text()


def test_other_programs(program, report, tmp_path):
    run = tmp_path / "run"
    Program(program, "classify")("train", "--data", "generated", "--texts", 60, *SIZES, "--epochs", 1, "--out", run)
    report(run)
    table = Page((run / "report.html").read_text()).table("results")
    assert table["Test accuracy"] == [summary(run)["accuracy"]]
    run = tmp_path / "translation"
    Program(program, "translate")("train", "--data", "captions", "--pairs", 60, *SIZES, "--epochs", 1, "--out", run)
    report(run)
    table = Page((run / "report.html").read_text()).table("results")
    assert table["Test BLEU"] == [summary(run)["bleu"]]
    assert table["Validation BLEU"] == [summary(run)["validation_bleu"]]
    message = report.fails(tmp_path / "run", run, "--out", tmp_path / "page.html")
    assert "runs of one program" in message and "classify" in message and "translate" in message
    assert not (tmp_path / "page.html").exists()


def test_errors_are_one_sentence(report, runs, tmp_path):
    assert "No such file" in report.fails(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in report.fails(tmp_path / "empty")
    assert "is required" in report.fails(code=2)
    assert "did you mean --out?" in report.fails(runs[0], "--uot", "x", code=2)
    assert "given twice" in report.fails(runs[0], runs[0], code=2)
    mine = tmp_path / "mine.html"
    mine.write_text("<!DOCTYPE html>\n<p>mine")
    assert "is no report" in report.fails(runs[0], "--out", mine)
    assert mine.read_text().endswith("mine")
    assert "is a folder" in report.fails(runs[0], "--out", tmp_path)
    assert "No such file" in report.fails(runs[0], "--out", tmp_path / "nowhere" / "page.html")


@pytest.mark.parametrize("name, content, expected", [
    ("config.json", "{", "config.json is damaged"),
    ("config.json", "{}", "program"),
    ("metrics.jsonl", '{"step": 1}\n[]\n{"step": 3}\n', "metrics.jsonl, line 2"),
    ("memory.json", '{"rows": [{"layer": 1}]}', "memory.json is damaged"),
    ("memory.json", "[]", "memory.json is damaged"),
    ("memory.json", '{"kept_bytes": 5, "layers": []}', "memory.json is damaged: the field rows"),
    ("timeline.json", '{"step": 2}', "timeline.json is damaged"),
    ("timeline.json", '{"step": ', "timeline.json is damaged"),
    ("summary.json", "3", "summary.json is damaged"),
])
def test_damaged_files_are_named(report, runs, tmp_path, name, content, expected):
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    (run / name).write_text(content)
    assert expected in report.fails(run)
    assert not (run / "report.html").exists()


def test_losses_that_differ_in_their_last_digit(report, runs, tmp_path):
    """Whose ticks would never end."""
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 5.000000000000001}\n')
    subprocess.run(report.command(run), check=True, capture_output=True, timeout=60,
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)))
    page = Page((run / "report.html").read_text())
    assert [row[2] for row in page.tables["loss-table"][1:]] == [5.0, 5.000000000000001]
