"""`remnant translate` as its users run it: the built program, on small captions corpora and files."""

import gzip
import json
import math
import re
import signal
import subprocess
from pathlib import Path

import pytest

from programs import TIMEOUT, Program, check_signal_and_resume, checkpoint_bytes, losses, metrics, steps

TINY = ["--hidden", "32", "--layers", "1", "--heads", "2", "--feed-forward", "64", "--batch-size", "32",
        "--threads", "1"]
CAPTIONS = ["--data", "captions", "--pairs", "400", *TINY]


@pytest.fixture(scope="session")
def translate(program):
    return Program(program, "translate")


@pytest.fixture(scope="session")
def trained(translate, tmp_path_factory):
    """A run of four epochs, and what it printed."""
    run = tmp_path_factory.mktemp("trained") / "run"
    result = translate("train", *CAPTIONS, "--epochs", 4, "--lr", "0.005", "--out", run)
    return run, result


def write_corpus(folder, pairs=60):
    folder.mkdir()
    for split, count in [("train", pairs), ("val", 6), ("test", 6)]:
        german = [f"ein hund nummer {i % 5} läuft {'sehr ' * (i % 3)}schnell ." for i in range(count)]
        english = [f"a dog number {i % 5} runs {'very ' * (i % 3)}fast ." for i in range(count)]
        (folder / f"{split}.de").write_text("\n".join(german) + "\n", encoding="utf-8")
        with gzip.open(folder / f"{split}.en.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(english) + "\n")
    return folder


def test_training_lowers_the_loss_and_writes_the_run(trained):
    run, result = trained
    curve = losses(run)
    assert sum(curve[-5:]) < 0.7 * sum(curve[:5])
    lines = steps(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    for line in lines:
        assert {"step", "epoch", "seconds", "loss", "lr", "tokens_per_second", "kept_bytes", "peak_bytes"} <= set(line)
        assert 0 < line["kept_bytes"] < line["peak_bytes"]
        assert line["tokens_per_second"] > 0
    validations = [line for line in metrics(run) if "validation_bleu" in line]
    assert [line["epoch"] for line in validations] == [1, 2, 3, 4]
    assert all(math.isfinite(line["validation_perplexity"]) for line in validations)

    summary = json.loads((run / "summary.json").read_text())
    assert {"bleu", "bleu_detokenised", "kept_bytes", "peak_bytes", "step_ms_median", "parameters", "seed",
            "threads", "version", "attention"} <= set(summary)
    assert "tok:none" in summary["bleu_signature"] and "tok:13a" in summary["bleu_detokenised_signature"]
    assert summary["validation_bleu"] == pytest.approx(max(line["validation_bleu"] for line in validations))
    assert summary["kept_bytes"] == max(line["kept_bytes"] for line in lines)
    assert summary["threads"] == 1 and summary["seed"] == 1

    config = json.loads((run / "config.json").read_text())
    assert config["attention"] == "recompute" and config["hidden"] == 32 and config["pairs"] == 400
    memory = json.loads((run / "memory.json").read_text())
    assert memory["rows"] and memory["kept_bytes"] > memory["attention_residual_bytes"] > 0
    assert sum(row["kept_bytes"] for row in memory["rows"]) == memory["kept_bytes"]
    assert any(row["layer"].startswith("encoder.0") for row in memory["rows"])
    assert any(row["layer"].startswith("decoder.0") for row in memory["rows"])
    assert list(run.glob("**/*tfevents*"))
    # Results on standard output, progress on standard error; no redrawing where there is no terminal.
    assert len(re.findall(r"^epoch \d", result.stdout, re.M)) == 4
    assert "\r" not in result.stderr and "\x1b" not in result.stderr


def test_meter_agrees_with_the_walk_of_the_graph(translate, tmp_path):
    """The live bytes at the end of a forward and memory.json's graph walk count the same batch alike."""
    run = tmp_path / "run"
    translate("train", *CAPTIONS, "--batch-size", 10000, "--epochs", 1, "--out", run, "--attention", "exact")
    [step] = steps(run)  # one batch holds everything
    memory = json.loads((run / "memory.json").read_text())
    assert step["kept_bytes"] == pytest.approx(memory["kept_bytes"], rel=0.02)


def test_evaluate_repeats_the_summary(translate, trained):
    run, _ = trained
    summary = json.loads((run / "summary.json").read_text())
    output = translate("evaluate", "--run", run, "--split", "test", "--threads", 1).stdout
    assert f"perplexity {summary['test_perplexity']:.3f}" in output
    assert re.search(rf"BLEU {summary['bleu']:.2f} .*tok:none", output)
    assert re.search(rf"BLEU {summary['bleu_detokenised']:.2f} .*tok:13a", output)
    assert "beam 3" in translate("evaluate", "--run", run, "--split", "val", "--beam", 3).stdout


def test_run_keeps_lines_apart(translate, trained):
    run, _ = trained
    text = "Ein Mann schläft.\n\n   \nEine Frau xyzzyplugh.\n"
    result = translate("run", "--run", run, text=text)
    lines = result.stdout.split("\n")
    assert len(lines) == 5 and lines[-1] == ""
    assert lines[0] and lines[1] == "" and lines[2] == "" and lines[3]
    assert re.search(r"warning: [1-9]\d* words are not in the model's vocabulary", result.stderr)
    assert translate("run", "--run", run, text="").stdout == ""
    # A sentence's translation does not depend on its company or its place.
    alone = translate("run", "--run", run, text="Ein Mann schläft.\n").stdout.splitlines()
    many = translate("run", "--run", run, "--batch-size", 2, text="Ein Mann schläft.\n" * 40).stdout.splitlines()
    assert many == alone * 40


def test_run_refuses_what_is_not_utf8_and_cuts_what_is_too_long(translate, trained):
    run, _ = trained
    result = subprocess.run(translate.command("run", "--run", run), input=b"Ein Mann.\nStra\xdfe\n",
                            capture_output=True, timeout=TIMEOUT)
    assert result.returncode == 1
    assert b"standard input, line 2: not valid UTF-8" in result.stderr
    assert len(result.stdout.splitlines()) == 1
    result = translate("run", "--run", run, text="ein " * 500 + "\n")
    assert "warning: 1 sentences are longer" in result.stderr and len(result.stdout.splitlines()) == 1


def test_recompute_loses_nothing_against_exact(translate, tmp_path):
    curves = {}
    for policy in ["exact", "recompute", "curve:m=4", "quantized:bits=8"]:
        run = tmp_path / policy.replace(":", "-")
        translate("train", *CAPTIONS, "--epochs", 3, "--attention", policy, "--out", run)
        curves[policy] = losses(run)
    assert len(curves["exact"]) == 36
    assert curves["recompute"] == pytest.approx(curves["exact"], rel=1e-4)
    for policy in ["curve:m=4", "quantized:bits=8"]:
        assert curves[policy][0] == pytest.approx(curves["exact"][0], rel=1e-4)  # the forward is exact
        assert curves[policy] != curves["exact"]
        assert curves[policy][-1] == pytest.approx(curves["exact"][-1], rel=0.05)
    summary = json.loads((tmp_path / "curve-m=4" / "summary.json").read_text())
    assert 0 < summary["curve_evicted_share"] < 1


def test_bf16_trains_close_to_fp32(translate, tmp_path):
    for precision in ["fp32", "bf16"]:
        translate("train", *CAPTIONS, "--epochs", 2, "--precision", precision, "--out", tmp_path / precision)
    fp32, bf16 = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=0.02)


def test_same_seed_same_run_other_seed_other_run(translate, tmp_path):
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        translate("train", *CAPTIONS, "--max-steps", 4, "--seed", seed, "--out", tmp_path / name)
    assert checkpoint_bytes(tmp_path / "a") == checkpoint_bytes(tmp_path / "b")
    assert checkpoint_bytes(tmp_path / "a") != checkpoint_bytes(tmp_path / "c")


def checks(run):
    """Step -> (gradient error, added variance) where a line has them."""
    return {line["step"]: (line["gradient_error"], line["added_variance"]) for line in metrics(run)
            if "gradient_error" in line or "added_variance" in line}


@pytest.mark.parametrize("policy, more", [
    ("exact", []),
    ("recompute", []),
    ("curve:m=1", []),
    ("quantized:bits=2", ["--accumulate", 2]),
    ("quantized:bits=2", ["--dropout", 0]),
    ("sampled:m=4", []),
    ("sampled:m=4", ["--dropout", 0, "--precision", "bf16"]),
])
def test_fidelity_check_reports_and_does_not_change_the_training(translate, tmp_path, policy, more):
    arguments = [*CAPTIONS, "--epochs", 1, "--attention", policy, *more]
    translate("train", *arguments, "--out", tmp_path / "plain")
    result = translate("train", *arguments, "--fidelity-every", 3, "--out", tmp_path / "checked")
    assert checkpoint_bytes(tmp_path / "checked") == checkpoint_bytes(tmp_path / "plain")
    for key in ["loss", "gradient_norm", "kept_bytes", "peak_bytes"]:
        assert [line[key] for line in steps(tmp_path / "checked")] == [line[key] for line in steps(tmp_path / "plain")]

    found = checks(tmp_path / "checked")
    assert list(found) == list(range(3, len(steps(tmp_path / "plain")) + 1, 3))
    summary = json.loads((tmp_path / "checked" / "summary.json").read_text())
    assert summary["gradient_error_worst"] == max(error for error, _ in found.values())
    assert summary["added_variance_worst"] == max(added for _, added in found.values())
    for error, added in found.values():
        if policy in ("exact", "recompute"):
            assert 0 <= error < 1e-5 and 0 <= added < 1e-9
        else:
            assert 1e-4 < error < 1 and 0 < added < 1
    said = re.findall(r"^step (\d+): gradient error .*, added variance ", result.stderr, re.M)
    assert [int(step) for step in said] == list(found)
    [events] = (tmp_path / "checked").glob("*tfevents*")
    for tag in [b"fidelity/gradient_error", b"fidelity/added_variance"]:
        assert events.read_bytes().count(tag) == len(found)

    assert not checks(tmp_path / "plain")
    assert "gradient_error_worst" not in json.loads((tmp_path / "plain" / "summary.json").read_text())


def test_fidelity_check_goes_on_after_resume(translate, tmp_path):
    arguments = [*CAPTIONS, "--epochs", 1, "--attention", "sampled:m=4", "--fidelity-every", 2]
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    translate("train", *arguments, "--out", straight)
    translate("train", *arguments, "--max-steps", 5, "--out", parts)
    translate("train", *arguments, "--resume", "--out", parts)
    assert list(checks(parts)) == [2, 4, 6, 8, 10, 12] and checks(parts) == checks(straight)
    for key in ["gradient_error_worst", "added_variance_worst"]:
        assert json.loads((parts / "summary.json").read_text())[key] == \
            json.loads((straight / "summary.json").read_text())[key]
    # How often is free to change on the way; runs older than the option have none.
    config = json.loads((parts / "config.json").read_text())
    assert config.pop("fidelity_every") == 2
    (parts / "config.json").write_text(json.dumps(config))
    translate("train", *CAPTIONS, "--epochs", 2, "--attention", "sampled:m=4", "--resume", "--out", parts)
    assert list(checks(parts)) == [2, 4, 6, 8, 10, 12] and len(steps(parts)) == 24


def test_quiet_run_says_nothing_of_its_checks(translate, tmp_path):
    run = tmp_path / "run"
    result = translate("train", *CAPTIONS, "--max-steps", 1, "--fidelity-every", 1, "--quiet", "--out", run)
    assert result.stderr == "" and list(checks(run)) == [1]


def test_resume_after_an_epoch_equals_an_uninterrupted_run(translate, tmp_path):
    translate("train", *CAPTIONS, "--epochs", 2, "--out", tmp_path / "straight")
    translate("train", *CAPTIONS, "--epochs", 1, "--out", tmp_path / "parts")
    translate("train", *CAPTIONS, "--epochs", 2, "--out", tmp_path / "parts", "--resume")
    assert checkpoint_bytes(tmp_path / "parts") == checkpoint_bytes(tmp_path / "straight")
    assert losses(tmp_path / "parts") == losses(tmp_path / "straight")


def test_accumulated_run_resumes_too(translate, tmp_path):
    arguments = [*CAPTIONS, "--accumulate", 3, "--epochs", 2]
    translate("train", *arguments, "--out", tmp_path / "straight")
    # 12 batches an epoch make 4 steps: this stops in the middle of the first.
    translate("train", *arguments, "--max-steps", 2, "--out", tmp_path / "parts")
    translate("train", *arguments, "--resume", "--out", tmp_path / "parts")
    assert len(losses(tmp_path / "straight")) == 8
    assert losses(tmp_path / "parts") == losses(tmp_path / "straight")
    parts, straight = checkpoint_bytes(tmp_path / "parts"), checkpoint_bytes(tmp_path / "straight")
    assert parts["model.safetensors"] == straight["model.safetensors"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resume_goes_on(translate, tmp_path, number, code):
    check_signal_and_resume(translate, number, code, tmp_path, *CAPTIONS, "--epochs", 6)


def test_resume_refuses_another_configuration(translate, tmp_path):
    run = tmp_path / "run"
    translate("train", *CAPTIONS, "--max-steps", 1, "--out", run)
    before = checkpoint_bytes(run)
    for change, field in [(["--lr", "0.1"], "lr"), (["--attention", "exact"], "attention"),
                          (["--dropout", "0.3"], "dropout"), (["--seed", "9"], "seed")]:
        message = translate.fails("train", *CAPTIONS, *change, "--out", run, "--resume")
        assert f"its {field} is" in message
    assert checkpoint_bytes(run) == before


def test_out_folder_already_used(translate, tmp_path):
    run = tmp_path / "run"
    translate("train", *CAPTIONS, "--max-steps", 1, "--out", run)
    before = checkpoint_bytes(run)
    assert "already holds a run" in translate.fails("train", *CAPTIONS, "--out", run)
    assert checkpoint_bytes(run) == before


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
def test_truncated_checkpoint(translate, tmp_path, name):
    run = tmp_path / "run"
    translate("train", *CAPTIONS, "--max-steps", 1, "--out", run)
    file = run / "checkpoint" / name
    file.write_bytes(file.read_bytes()[:-100])
    assert name in translate.fails("train", *CAPTIONS, "--max-steps", 3, "--out", run, "--resume")


def test_model_of_another_shape(translate, tmp_path):
    for name, layers in [("a", 1), ("b", 2)]:
        translate("train", *CAPTIONS, "--layers", layers, "--max-steps", 1, "--out", tmp_path / name)
    target = tmp_path / "b" / "best" / "model.safetensors"
    target.write_bytes((tmp_path / "a" / "best" / "model.safetensors").read_bytes())
    assert "lacks the tensor" in translate.fails("evaluate", "--run", tmp_path / "b")


@pytest.mark.parametrize("arguments, expected", [
    (["train", "--epohcs", "3"], "--epochs"),
    (["train", "--data", "captions", "--out", "x", "--batch_size", "3"], "--batch-size"),
    (["evaluate", "--bean", "3"], "--beam"),
    (["trian"], "train"),
])
def test_unknown_words_get_the_nearest_name(translate, arguments, expected):
    assert f"did you mean {expected}?" in translate.fails(*arguments, code=2)


@pytest.mark.parametrize("arguments, expected", [
    (["--attention", "curv:m=4"], "curve"),
    (["--attention", "curve:m=0"], "m must be at least 1"),
    (["--heads", "5"], "--heads should divide --hidden"),
    (["--dropout", "1.5"], "--dropout should be in [0, 1)"),
    (["--epochs", "many"], "--epochs"),
    (["--precision", "fp8"], "fp32 or bf16"),
    (["--source", "fr"], "German-English"),
    (["--fidelity-every", "-1"], "--fidelity-every should be at least 0, got -1"),
    (["--clip", "inf"], "--clip should be a finite number, got inf"),
    (["--lr", "inf"], "--lr should be a finite number, got inf"),
])
def test_bad_values_are_usage_errors(translate, tmp_path, arguments, expected):
    run = tmp_path / "run"
    assert expected in translate.fails("train", *CAPTIONS, "--out", run, *arguments, code=2)
    assert not run.exists()


def test_help_and_version(program):
    for arguments in [["--help"], ["translate", "train", "--help"], ["--version"]]:
        result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=TIMEOUT)
        assert result.returncode == 0 and "remnant" in result.stdout.lower()
    for command in ["train", "compare"]:
        result = subprocess.run([program, "translate", command, "--help"], capture_output=True, text=True,
                                timeout=TIMEOUT)
        assert "--fidelity-every" in result.stdout
    assert subprocess.run([program], capture_output=True, timeout=TIMEOUT).returncode == 2


def test_files_are_read_plain_and_compressed(translate, tmp_path):
    folder = write_corpus(tmp_path / "text")
    run = tmp_path / "run"
    translate("train", "--data", folder, *TINY, "--epochs", 30, "--lr", "0.005", "--out", run)
    assert json.loads((run / "summary.json").read_text())["bleu"] > 50
    result = translate("run", "--run", run, text="Ein Hund Nummer 3 läuft schnell .\n")
    assert "dog" in result.stdout
    other = write_corpus(tmp_path / "other")
    assert "perplexity" in translate("evaluate", "--run", run, "--data", other, "--split", "val").stdout


def test_bad_data(translate, tmp_path):
    run = tmp_path / "run"
    message = translate.fails("train", "--data", tmp_path / "nowhere", *TINY, "--out", run)
    assert "nowhere" in message and not run.exists()
    folder = write_corpus(tmp_path / "text")
    with (folder / "train.de").open("a") as file:
        file.write("noch ein hund .\n")
    message = translate.fails("train", "--data", folder, *TINY, "--out", run)
    assert "61" in message and "60" in message
    (folder / "train.de").unlink()
    assert "train" in translate.fails("train", "--data", folder, *TINY, "--out", run)
    assert not run.exists()


def test_long_sentences_are_cut_and_said_so(translate, tmp_path):
    folder = write_corpus(tmp_path / "text")
    result = translate("train", "--data", folder, *TINY, "--max-length", 6, "--max-steps", 2, "--out", tmp_path / "run")
    assert len(re.findall(r"\d+ sentences are cut to --max-length 6", result.stderr)) == 1


def test_changed_data_is_noticed_on_resume(translate, tmp_path):
    folder = write_corpus(tmp_path / "text")
    run = tmp_path / "run"
    arguments = ["train", "--data", folder, *TINY, "--epochs", 2, "--out", run]
    translate(*arguments)
    for name in ["train.de", "val.de", "test.de"]:
        text = (folder / name).read_text(encoding="utf-8").replace("hund", "dackel")
        (folder / name).write_text(text, encoding="utf-8")
    assert "is not the one" in translate.fails(*arguments, "--resume")


def test_the_same_words_in_another_order_are_other_data(translate, tmp_path):
    folder = write_corpus(tmp_path / "text")
    run = tmp_path / "run"
    arguments = ["train", "--data", folder, *TINY, "--epochs", 1, "--out", run]
    translate(*arguments)
    before = checkpoint_bytes(run)
    source = folder / "train.de"
    lines = source.read_text(encoding="utf-8")
    source.write_text("".join(reversed(lines.splitlines(keepends=True))), encoding="utf-8")
    assert "is not the one" in translate.fails(*arguments, "--resume")
    assert checkpoint_bytes(run) == before
    # A run that is older than the field.
    source.write_text(lines, encoding="utf-8")
    translate(*arguments, "--resume")
    config = json.loads((run / "config.json").read_text())
    del config["data_fingerprint"]
    (run / "config.json").write_text(json.dumps(config))
    assert "no data_fingerprint" in translate.fails(*arguments, "--resume")


def test_not_a_run(translate, tmp_path):
    assert str(tmp_path) in translate.fails("evaluate", "--run", tmp_path)


def test_unknown_split(translate, trained):
    run, _ = trained
    assert "--split should be" in translate.fails("evaluate", "--run", run, "--split", "tset", code=2)


def test_compare_prints_one_table(translate, tmp_path):
    out = tmp_path / "runs"
    arguments = ["compare", *CAPTIONS, "--epochs", 2, "--out", out, "--attention", "exact", "--attention", "curve:m=4"]
    result = translate(*arguments)
    table = [line.split() for line in result.stdout.splitlines() if re.match(r"(attention|exact|curve:m=4) .*\d", line)]
    assert [row[0] for row in table] == ["exact", "curve:m=4"]
    assert result.stdout.count("1. source") == 1 and result.stdout.count("3. source") == 1
    results = json.loads((out / "compare.json").read_text())
    assert [row["attention"] for row in results] == ["exact", "curve:m=4"]
    assert results[0]["attention_residual_bytes"] > results[1]["attention_residual_bytes"]
    assert (out / "exact" / "summary.json").exists() and (out / "curve-m-4" / "summary.json").exists()
    assert "already holds a run" in translate.fails(*arguments)
    assert "given twice" in translate.fails("compare", *CAPTIONS, "--out", tmp_path / "x", "--attention", "exact",
                                            "--attention", "exact", code=2)
    # Finished runs are not trained again.
    before = losses(out / "exact")
    translate(*arguments, "--resume")
    assert losses(out / "exact") == before


def test_a_full_disk_is_said(translate, trained):
    run, _ = trained
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        result = subprocess.run(translate.command("evaluate", "--run", run), stdout=full, stderr=subprocess.PIPE,
                                text=True, timeout=TIMEOUT)
    assert result.returncode == 1 and "cannot write to standard output" in result.stderr


def test_multi30k_files(translate, data_directory, tmp_path):
    folder = data_directory / "multi30k"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    run = tmp_path / "run"
    result = translate("train", "--data", folder, *TINY, "--max-steps", 2, "--out", run)
    assert "29000 training, 1014 validation and 1000 test pairs" in result.stderr
