"""`remnant classify` as its users run it: the built program, on a few generated reviews and small files."""

import gzip
import json
import math
import re
import signal
import subprocess

import pytest

from programs import (
    TIMEOUT, Program, check_signal_and_resume, checkpoint_bytes, compared, losses, metrics, steps, summary,
)

TINY = ["--hidden", "32", "--layers", "1", "--heads", "2", "--feed-forward", "64", "--batch-size", "16", "--threads", "1"]
GENERATED = ["--data", "generated", "--texts", "200", *TINY]


@pytest.fixture(scope="session")
def classify(program):
    return Program(program, "classify")


def write_colours(folder, names=("train.tsv", "dev.tsv.gz", "test.txt")):
    """Texts whose label is one of their words."""
    folder.mkdir()
    for name, count in zip(names, [90, 12, 12]):
        separator = " " if ".txt" in name else "\t"
        lines = [f"{colour}{separator}the {'very ' * (i % 5)}{colour} door number {i % 7} .\n"
                 for i, colour in zip(range(count), ["red", "green", "blue"] * count)]
        content = "".join(lines).encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


@pytest.fixture(scope="session")
def trained(classify, tmp_path_factory):
    """A run that has learnt, and what it printed."""
    folder = write_colours(tmp_path_factory.mktemp("colours") / "data")
    run = tmp_path_factory.mktemp("trained") / "run"
    result = classify("train", "--data", folder, *TINY, "--epochs", 12, "--lr", "0.01", "--out", run)
    return run, result, folder


def test_training_learns_and_writes_the_run(trained):
    run, result, _ = trained
    found = summary(run)
    assert {"accuracy", "kept_bytes", "peak_bytes", "step_ms_median", "parameters", "seed", "threads", "version",
            "attention"} <= set(found)
    assert found["accuracy"] == 1 and found["labels"] == ["blue", "green", "red"]
    assert found["confusion"] == [[4, 0, 0], [0, 4, 0], [0, 0, 4]]
    accuracies = [line["validation_accuracy"] for line in metrics(run) if "validation_accuracy" in line]
    assert len(accuracies) == 12 and found["validation_accuracy"] == max(accuracies)
    assert found["best_epoch"] == accuracies.index(max(accuracies)) + 1
    for line in steps(run):
        assert {"step", "epoch", "seconds", "loss", "lr", "tokens_per_second", "kept_bytes", "peak_bytes"} <= set(line)
    config = json.loads((run / "config.json").read_text())
    assert config["program"] == "classify" and config["labels"] == found["labels"]
    memory = json.loads((run / "memory.json").read_text())
    assert sum(row["kept_bytes"] for row in memory["rows"]) == memory["kept_bytes"]
    assert list(run.glob("**/*tfevents*"))
    assert "90 training, 12 validation and 12 test texts with 3 labels" in result.stderr
    assert "held out" not in result.stderr


def test_evaluate_repeats_the_summary(classify, trained):
    run, _, _ = trained
    output = classify("evaluate", "--run", run, "--threads", 1).stdout
    assert f"accuracy {summary(run)['accuracy']:.4f}" in output
    assert f"loss {summary(run)['test_loss']:.4f}" in output
    table = [line.split() for line in output.splitlines() if re.match(r"(blue|green|red) ", line)]
    assert table == [["blue", "4", "0", "0"], ["green", "0", "4", "0"], ["red", "0", "0", "4"]]
    assert classify("evaluate", "--run", run, "--threads", 1).stdout == output
    assert "90 texts" in classify("evaluate", "--run", run, "--split", "train").stdout
    assert "--split should be" in classify.fails("evaluate", "--run", run, "--split", "tset", code=2)


def test_run_labels_lines(classify, trained):
    run, _, _ = trained
    text = "the red door .\n\nthe very green door number 3 .\nblue\nblue blue xyzzy\n"
    result = classify("run", "--run", run, text=text)
    assert result.stdout.splitlines() == ["red", "", "green", "blue", "blue"]
    assert "warning: 1 words are not in the model's vocabulary" in result.stderr
    # A label does not depend on its company.
    assert classify("run", "--run", run, text="the red door .\n" * 40).stdout == "red\n" * 40
    scored = classify("run", "--run", run, "--scores", text="the red door .\n").stdout
    label, score = scored.split()
    assert label == "red" and 0.5 < float(score) <= 1
    assert classify("run", "--run", run, text="").stdout == ""
    bad = subprocess.run(classify.command("run", "--run", run), input=b"red door\n\xff\n", capture_output=True,
                         timeout=TIMEOUT)
    assert bad.returncode == 1 and bad.stdout == b"red\n"
    assert b"standard input, line 2: not valid UTF-8" in bad.stderr


def test_generated_reviews_and_long_texts(classify, tmp_path):
    run = tmp_path / "run"
    result = classify("train", *GENERATED, "--max-length", 60, "--epochs", 1, "--out", run)
    assert re.search(r"\d+ texts are cut to --max-length 60", result.stderr)
    assert "160 training, 20 validation and 20 test texts with 2 labels" in result.stderr
    assert summary(run)["labels"] == ["negative", "positive"]
    assert math.isfinite(summary(run)["test_loss"])


def test_recompute_loses_nothing_against_exact(classify, tmp_path):
    curves = {}
    for policy in ["exact", "recompute", "quantized:bits=8"]:
        run = tmp_path / policy.replace(":", "-")
        classify("train", *GENERATED, "--epochs", 1, "--attention", policy, "--out", run)
        curves[policy] = losses(run)
    assert curves["recompute"] == pytest.approx(curves["exact"], rel=1e-4)
    assert curves["quantized:bits=8"] != curves["exact"]


def test_fidelity_check_and_bf16(classify, tmp_path):
    arguments = [*GENERATED, "--attention", "sampled:m=4", "--epochs", 1]
    classify("train", *arguments, "--out", tmp_path / "plain")
    classify("train", *arguments, "--fidelity-every", 3, "--out", tmp_path / "checked")
    assert checkpoint_bytes(tmp_path / "checked") == checkpoint_bytes(tmp_path / "plain")
    found = [line for line in steps(tmp_path / "checked") if "gradient_error" in line]
    assert len(found) == len(steps(tmp_path / "plain")) // 3
    assert all(0 < line["gradient_error"] < 1 and line["added_variance"] > 0 for line in found)
    classify("train", *arguments, "--precision", "bf16", "--out", tmp_path / "bf16")
    assert losses(tmp_path / "bf16") != losses(tmp_path / "plain")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "plain"), rel=0.05)


@pytest.mark.parametrize("count, longest", [(260, 400), (900, 120)])
def test_a_budget_holds_for_the_longest_text(classify, tmp_path, count, longest):
    """Which stands in the last, partial batch of all, with fewer words than others; or in another batch each epoch."""
    file = tmp_path / "texts.tsv"
    word = [f"word{i % 50}" for i in range(longest)]
    lengths = [longest if i == count // 2 else 5 + i % 4 for i in range(count)]
    file.write_text("".join(f"{'good' if i % 2 else 'bad'}\t{' '.join(word[:n])}\n" for i, n in enumerate(lengths)))
    arguments = ["train", "--data", file, *TINY, "--hidden", 64, "--max-length", 512, "--epochs", 3, "--layers", 2]
    if count == 260:
        arguments += ["--batch-size", 64]
    message = classify.fails(*arguments, "--memory", "budget=10kB", "--out", tmp_path / "run")
    [smallest, unit] = re.findall(r"inputs is ([\d.]+) (kB|MB):", message)[0]
    budget = int(float(smallest) * {"kB": 1e3, "MB": 1e6}[unit] * 1.05)
    result = classify(*arguments, "--memory", f"budget={budget}B", "--out", tmp_path / "run")
    assert "warning" not in result.stderr
    assert max(line["peak_bytes"] for line in steps(tmp_path / "run")) <= budget


def test_resume_equals_an_uninterrupted_run(classify, tmp_path):
    arguments = [*GENERATED, "--accumulate", 2]
    classify("train", *arguments, "--epochs", 2, "--out", tmp_path / "straight")
    classify("train", *arguments, "--epochs", 2, "--max-steps", 3, "--out", tmp_path / "parts")
    classify("train", *arguments, "--epochs", 2, "--out", tmp_path / "parts", "--resume")
    assert losses(tmp_path / "parts") == losses(tmp_path / "straight")
    parts, straight = checkpoint_bytes(tmp_path / "parts"), checkpoint_bytes(tmp_path / "straight")
    assert parts["model.safetensors"] == straight["model.safetensors"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resume_goes_on(classify, tmp_path, number, code):
    check_signal_and_resume(classify, number, code, tmp_path, *GENERATED, "--epochs", 4)


def test_one_file_is_split(classify, tmp_path):
    folder = write_colours(tmp_path / "data", names=["all.tsv"])
    result = classify("train", "--data", folder / "all.tsv", *TINY, "--epochs", 1, "--out", tmp_path / "run")
    assert "73 training, 8 validation and 9 test texts" in result.stderr
    assert "every tenth text of the training set is held out for validation and test" in result.stderr
    assert "9 texts" in classify("evaluate", "--run", tmp_path / "run").stdout
    whole = folder / "all.tsv"
    assert classify("evaluate", "--run", tmp_path / "run", "--data", whole).stdout.startswith(f"{whole}  90 texts")


def test_bad_data(classify, trained, tmp_path):
    run = tmp_path / "run"
    file = tmp_path / "all.tsv"
    assert "nowhere" in classify.fails("train", "--data", tmp_path / "nowhere", *TINY, "--out", run)
    assert "no train.tsv or train.txt" in classify.fails("train", "--data", tmp_path, *TINY, "--out", run)
    for content, expected in [(b"", "no labelled text"), (b"1\ta\n" * 30, "expected two labels"),
                              (b"1\ta\nb\n", "line 2"), (b"1\ta\n0\tb\n", "at least 20"),
                              (b"1\ta\n0\tb\n" * 20 + b"1\t\xff\n", "line 41"),
                              (gzip.compress(b"1\tabc\n0\tb\n" * 20)[:-10], "truncated gzip")]:
        file.write_bytes(content)
        assert expected in classify.fails("train", "--data", file, *TINY, "--out", run)
    folder = write_colours(tmp_path / "data")
    (folder / "test.txt").write_text("red a red door\nmauve a mauve door\n")
    message = classify.fails("train", "--data", folder, *TINY, "--out", run)
    assert "line 2" in message and "mauve" in message and "blue, green, red" in message
    assert not run.exists()
    assert "mauve" in classify.fails("evaluate", "--run", trained[0], "--data", folder)


def test_changed_data_is_noticed_on_resume(classify, tmp_path):
    folder = write_colours(tmp_path / "data")
    run = tmp_path / "run"
    arguments = ["train", "--data", folder, *TINY, "--epochs", 1, "--out", run]
    classify(*arguments)
    before = checkpoint_bytes(run)
    text = (folder / "test.txt").read_text(encoding="utf-8").replace("door", "wall")
    (folder / "test.txt").write_text(text, encoding="utf-8")
    assert "is not the one" in classify.fails(*arguments, "--resume")
    assert checkpoint_bytes(run) == before
    assert "its dropout is" in classify.fails(*arguments, "--resume", "--dropout", "0.3")


@pytest.mark.parametrize("arguments, expected", [
    (["--max-length", "8193"], "--max-length should be at most 8192"),
    (["--attention", "curv:m=4"], "curve"),
    (["--heads", "5"], "--heads should divide --hidden"),
    (["--maxlength", "5"], "did you mean --max-length?"),
    (["--texts", "1"], "--texts should be at least 20"),
])
def test_bad_values_are_usage_errors(classify, tmp_path, arguments, expected):
    run = tmp_path / "run"
    assert expected in classify.fails("train", *GENERATED, "--out", run, *arguments, code=2)
    assert not run.exists()


def test_damaged_runs(classify, tmp_path):
    run = tmp_path / "run"
    classify("train", *GENERATED, "--max-steps", 1, "--out", run)
    assert "already holds a run" in classify.fails("train", *GENERATED, "--out", run)
    file = run / "best" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors" in classify.fails("evaluate", "--run", run)
    config = json.loads((run / "config.json").read_text())
    del config["labels"]
    (run / "config.json").write_text(json.dumps(config))
    assert "labels" in classify.fails("evaluate", "--run", run)
    (run / "vocabulary").unlink()
    assert "vocabulary" in classify.fails("evaluate", "--run", run)


def test_compare_prints_one_table(classify, tmp_path):
    settings = ["exact", "curve:m=4"]
    results = compared(classify, "--attention", settings, tmp_path / "runs", *GENERATED, "--max-steps", 2)
    assert results[0]["attention_residual_bytes"] > results[1]["attention_residual_bytes"]
    assert all("accuracy" in row for row in results)


@pytest.mark.parametrize("name, expected", [
    ("sst2", "6920 training, 872 validation and 1821 test texts with 2 labels"),
    ("trec", "4907 training, 545 validation and 500 test texts with 6 labels"),
    ("imdb", "9000 training, 1000 validation and 5000 test texts with 2 labels"),
])
def test_real_data(classify, data_directory, tmp_path, name, expected):
    folder = data_directory / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    result = classify("train", "--data", folder, *TINY, "--max-length", 64, "--max-steps", 2, "--out", tmp_path / "run")
    assert expected in result.stderr
    assert ("1 lines are not valid UTF-8" in result.stderr) == (name == "trec")
