"""`remnant lm` as its users run it: the built program, on a little generated text and small files."""

import gzip
import json
import math
import re
import signal
import subprocess
import time

import pytest

from programs import (
    TIMEOUT, Program, check_signal_and_resume, checkpoint_bytes, compared, losses, metrics, steps, summary,
)

TINY = ["--hidden", "32", "--layers", "1", "--heads", "2", "--feed-forward", "64", "--context", "32", "--threads", "1"]
GENERATED = ["--data", "generated", "--sentences", "120", *TINY]


@pytest.fixture(scope="session")
def lm(program):
    return Program(program, "lm")


@pytest.fixture(scope="session")
def trained(lm, tmp_path_factory):
    """A run of six epochs, and what it printed."""
    run = tmp_path_factory.mktemp("trained") / "run"
    result = lm("train", *GENERATED, "--epochs", 6, "--lr", "0.01", "--out", run)
    return run, result


def test_training_lowers_the_loss_and_writes_the_run(trained):
    run, result = trained
    curve = losses(run)
    assert sum(curve[-5:]) < 0.7 * sum(curve[:5])
    lines = steps(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    for line in lines:
        assert {"step", "epoch", "seconds", "loss", "lr", "tokens_per_second", "kept_bytes", "peak_bytes"} <= set(line)
        assert 0 < line["kept_bytes"] < line["peak_bytes"]
    validations = [line["validation_bits_per_character"] for line in metrics(run)
                   if "validation_bits_per_character" in line]
    assert len(validations) == 6
    found = summary(run)
    assert {"bits_per_character", "bits_per_byte", "kept_bytes", "peak_bytes", "step_ms_median", "parameters", "seed",
            "threads", "version", "attention"} <= set(found)
    assert found["bits_per_character"] < 4.5 and found["bits_per_character"] == found["bits_per_byte"]
    assert found["validation_bits_per_character"] == min(validations)
    assert found["test_perplexity"] == pytest.approx(2 ** found["bits_per_byte"])
    config = json.loads((run / "config.json").read_text())
    assert config["program"] == "lm" and config["context"] == 32 and config["tokens"] == "bytes"
    memory = json.loads((run / "memory.json").read_text())
    assert sum(row["kept_bytes"] for row in memory["rows"]) == memory["kept_bytes"]
    assert any(row["layer"].startswith("encoder.layers.0") for row in memory["rows"])
    assert sum(layer["kept_bytes"] for layer in memory["layers"]) == memory["kept_bytes"]
    assert list(run.glob("**/*tfevents*"))
    assert len(re.findall(r"^epoch \d", result.stdout, re.M)) == 6


def test_evaluate_repeats_the_summary(lm, trained):
    run, _ = trained
    output = lm("evaluate", "--run", run, "--split", "test", "--threads", 1).stdout
    assert f"bits per character {summary(run)['bits_per_character']:.4f}" in output
    assert f"bits per byte {summary(run)['bits_per_byte']:.4f}" in output
    assert lm("evaluate", "--run", run, "--threads", 1).stdout == output
    short = lm("evaluate", "--run", run, "--context", 2).stdout
    assert "context 2" in short and short != output
    assert "longer than the model's 32" in lm.fails("evaluate", "--run", run, "--context", 33, code=2)
    assert "--split should be" in lm.fails("evaluate", "--run", run, "--split", "tset", code=2)


def test_evaluate_takes_all_of_a_file_however_short(lm, trained, tmp_path):
    run, file = trained[0], tmp_path / "short.txt"
    for content in ["A short text of one line.\n", "x"]:
        file.write_text(content)
        output = lm("evaluate", "--run", run, "--data", file, "--threads", 1).stdout
        assert output.startswith(f"{file}  {len(content)} bytes, {len(content)} characters")
        assert "nan" not in output
    file.write_text("")
    assert "holds 0 bytes of text" in lm.fails("evaluate", "--run", run, "--data", file)
    file.write_text("A short text of one line.\n")
    assert "split into training" in lm.fails("train", "--data", file, *TINY, "--out", tmp_path / "run")


def test_generate_continues_the_prompt(lm, trained):
    run, _ = trained
    arguments = ["generate", "--run", run, "--prompt", "A man ", "--length", 100, "--temperature", "0.7", "--top-k", 5]
    text = lm(*arguments).stdout
    assert text.startswith("A man ") and len(text.encode()) == len("A man ") + 100 + 1
    assert lm(*arguments).stdout == text
    assert lm(*arguments, "--seed", 2).stdout != text
    greedy = lm(*arguments, "--temperature", 0).stdout
    assert lm(*arguments, "--temperature", 0, "--seed", 2).stdout == greedy
    for wrong, expected in [(["--prompt", ""], "at least one character"), (["--prompt", "x" * 33], "context of 32"),
                            (["--length", 0], "--length"), (["--temperature", "-1"], "--temperature"),
                            (["--top-k", -1], "--top-k")]:
        assert expected in lm.fails(*arguments, *wrong, code=2)


def test_generated_bytes_are_printed_as_valid_text(lm, tmp_path):
    """An untrained model draws any byte."""
    run = tmp_path / "run"
    lm("train", *GENERATED, "--max-steps", 1, "--lr", "1e-9", "--out", run)
    text = lm("generate", "--run", run, "--length", 400, "--temperature", 5).stdout
    assert "\ufffd" in text
    assert not [c for c in text if ord(c) < 32 and c not in "\n\t\r"]


def test_recompute_loses_nothing_against_exact(lm, tmp_path):
    curves = {}
    for policy in ["exact", "recompute", "quantized:bits=8"]:
        run = tmp_path / policy.replace(":", "-")
        lm("train", *GENERATED, "--epochs", 1, "--attention", policy, "--out", run)
        curves[policy] = losses(run)
    assert curves["recompute"] == pytest.approx(curves["exact"], rel=1e-4)
    assert curves["quantized:bits=8"] != curves["exact"]


def test_fidelity_check_and_bf16(lm, tmp_path):
    arguments = [*GENERATED, "--attention", "sampled:m=4", "--epochs", 1]
    lm("train", *arguments, "--out", tmp_path / "plain")
    lm("train", *arguments, "--fidelity-every", 3, "--out", tmp_path / "checked")
    assert checkpoint_bytes(tmp_path / "checked") == checkpoint_bytes(tmp_path / "plain")
    found = [line for line in steps(tmp_path / "checked") if "gradient_error" in line]
    assert len(found) == len(steps(tmp_path / "plain")) // 3
    assert all(1e-4 < line["gradient_error"] < 1 and line["added_variance"] > 0 for line in found)
    lm("train", *arguments, "--precision", "bf16", "--out", tmp_path / "bf16")
    assert losses(tmp_path / "bf16") != losses(tmp_path / "plain")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "plain"), rel=0.02)


@pytest.mark.parametrize("more", [[], ["--dropout", 0], ["--accumulate", 2, "--precision", "bf16"]])
def test_fidelity_check_of_codes(lm, tmp_path, more):
    """Compared with the exact gradient, not with the same codes once more; the training stays as it is."""
    errors = {}
    for bits in (2, 8):
        arguments = [*GENERATED, "--memory", f"unbiased:bits={bits}", "--max-steps", 9, "--epochs", 3, *more]
        plain, checked = tmp_path / f"plain{bits}", tmp_path / f"checked{bits}"
        lm("train", *arguments, "--out", plain)
        lm("train", *arguments, "--fidelity-every", 3, "--out", checked)
        assert checkpoint_bytes(checked) == checkpoint_bytes(plain)
        for key in ["loss", "gradient_norm", "kept_bytes", "peak_bytes"]:
            assert [line[key] for line in steps(checked)] == [line[key] for line in steps(plain)]
        found = [line for line in steps(checked) if "gradient_error" in line]
        assert len(found) == 3
        assert all(1e-4 < line["gradient_error"] < 0.5 and line["added_variance"] > 0 for line in found)
        errors[bits] = sum(line["gradient_error"] for line in found)
    assert errors[8] < errors[2] / 1.5


def test_resume_equals_an_uninterrupted_run(lm, tmp_path):
    arguments = [*GENERATED, "--accumulate", 2]
    lm("train", *arguments, "--epochs", 2, "--out", tmp_path / "straight")
    lm("train", *arguments, "--epochs", 2, "--max-steps", 3, "--out", tmp_path / "parts")
    lm("train", *arguments, "--epochs", 1, "--out", tmp_path / "parts", "--resume")
    lm("train", *arguments, "--epochs", 2, "--out", tmp_path / "parts", "--resume")
    assert losses(tmp_path / "parts") == losses(tmp_path / "straight")
    parts, straight = checkpoint_bytes(tmp_path / "parts"), checkpoint_bytes(tmp_path / "straight")
    assert parts["model.safetensors"] == straight["model.safetensors"]
    message = lm.fails("train", *arguments, "--context", 16, "--out", tmp_path / "parts", "--resume")
    assert "its context is 32" in message


def test_memory_settings(lm, tmp_path):
    """Each keeps less than the one before, learns as well, and stands in the run folder; resuming is exact."""
    (tmp_path / "layers.json").write_text('{"*": "eager", "encoder.*": "unbiased:bits=2"}')
    arguments = [*GENERATED, "--context", 64, "--hidden", 64, "--feed-forward", 256, "--max-steps", 6, "--dropout", 0.1]
    first, kept = None, {}
    for setting in ("eager", "exact", "unbiased:bits=8", "unbiased:bits=4", str(tmp_path / "layers.json")):
        run = tmp_path / setting.replace("/", "_")
        lm("train", *arguments, "--memory", setting, "--out", run)
        # The forward is the same, and draws the same dropout under all but eager.
        first = first or losses(run)[0]
        assert losses(run)[0] == pytest.approx(first, rel=0.05)
        assert all(math.isfinite(loss) for loss in losses(run))
        assert json.loads((run / "config.json").read_text())["memory"] == setting
        memory = json.loads((run / "memory.json").read_text())
        kept[setting] = memory["kept_bytes"]
        # Both foretold from smaller batches.
        assert sum(layer["predicted_bytes"] for layer in memory["layers"]) == pytest.approx(kept[setting], rel=0.01)
        assert sum(layer["eager_bytes"] for layer in memory["layers"]) == pytest.approx(kept["eager"], rel=0.01)
    values = list(kept.values())
    assert values[0] > values[2] > values[3] > values[4]
    assert values[1] < 0.5 * values[0]

    lm("train", *arguments, "--max-steps", 3, "--memory", "unbiased:bits=4", "--out", tmp_path / "parts")
    lm("train", *arguments, "--memory", "unbiased:bits=4", "--out", tmp_path / "parts", "--resume")
    assert losses(tmp_path / "parts") == losses(tmp_path / "unbiased:bits=4")
    assert "8, 4 or 2 bits" in lm.fails("train", *arguments, "--memory", "unbiased:bits=3", "--out", tmp_path / "x",
                                        code=2)


def test_memory_file_of_policies(lm, tmp_path):
    """A file may name attention's policies, layer by layer."""
    file = tmp_path / "layers.json"
    arguments = [*GENERATED, "--layers", 2, "--max-steps", 2, "--memory", file]
    for name, layers, policies in [("all", {"*": "curve:m=4"}, ["curve:m=4", "curve:m=4"]),
                                   ("one", {"encoder.layers.*": "recompute", "*.1": "quantized:bits=4"},
                                    ["recompute", "quantized:bits=4"])]:
        file.write_text(json.dumps(layers))
        lm("train", *arguments, "--out", tmp_path / name)
        rows = json.loads((tmp_path / name / "memory.json").read_text())["rows"]
        found = {row["layer"].split(".self_attn")[0]: row["policy"] for row in rows if row["op"] == "AttentionBackward"}
        assert [found.get(f"encoder.layers.{i}", "recompute") for i in range(2)] == policies
        assert json.loads((tmp_path / name / "layers.json").read_text()) == layers
    # The run has its own copy: from another folder, or without the file, it goes on.
    file.unlink()
    result = lm("train", *arguments, "--max-steps", 3, "--out", tmp_path / "one", "--resume")
    assert "going on with the run's copy" in result.stderr and len(steps(tmp_path / "one")) == 3


def test_mistakes_of_memory_files_leave_nothing_behind(lm, tmp_path):
    run, file = tmp_path / "run", tmp_path / "layers.json"
    arguments = ["train", *GENERATED, "--max-steps", 1, "--memory", file, "--out", run]
    assert "layers.json" in lm.fails(*arguments, code=2)
    for content, expected in [("{broken", "not valid JSON"), ('["exact"]', "should be an object"),
                              ('{"*": {"attention": "exact"}}', "should be a string"),
                              ('{"*": "curv:m=4"}', "did you mean 'curve'"), ('{"*": "exat"}', "did you mean 'exact'")]:
        file.write_text(content)
        assert expected in lm.fails(*arguments, code=2)
        assert not run.exists()
    # Only the model knows its layers.
    file.write_text('{"encoder.layer.*": "exact"}')
    assert "no layer fits the pattern 'encoder.layer.*'" in lm.fails(*arguments, code=2)
    file.write_text('{"encoder.layers.*": "exact"}')
    lm(*arguments)
    assert len(steps(run)) == 1


def test_a_refused_budget_may_be_raised(lm, tmp_path):
    run = tmp_path / "run"
    arguments = ["train", *GENERATED, "--max-steps", 2, "--out", run]
    message = lm.fails(*arguments, "--memory", "budget=10kB")
    [smallest] = re.findall(r"budget of 10 kB; the smallest peak found for these inputs is (\d+) kB:", message)
    lm(*arguments, "--memory", f"budget={int(smallest) * 11 // 10}kB")
    assert max(line["peak_bytes"] for line in steps(run)) <= int(smallest) * 1100
    # A step that a plan does not hold for is told, once.
    plan = json.loads((run / "plan.json").read_text())
    plan["layers"] = {name: "eager" for name in plan["layers"]}
    (run / "plan.json").write_text(json.dumps(plan))
    result = lm(*arguments, "--max-steps", 5, "--memory", plan["memory"], "--resume", "--quiet")
    assert result.stderr.count("warning: the peak of step") == 1


def test_ctrl_c_while_planning(lm, tmp_path):
    run = tmp_path / "run"
    arguments = ["--data", "generated", "--hidden", "64", "--layers", "4", "--context", "256", "--batch-size", "16",
                 "--threads", "1", "--memory", "budget=1GB"]
    process = subprocess.Popen(lm.command("train", *arguments, "--out", run), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        deadline = time.monotonic() + 60
        while not (run / "config.json").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "interrupted before the first step" in errors
    assert not (run / "plan.json").exists() and not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resume_goes_on(lm, tmp_path, number, code):
    check_signal_and_resume(lm, number, code, tmp_path, *GENERATED, "--epochs", 6)


def test_files_are_read_plain_and_compressed(lm, tmp_path):
    text = "".join(f"Größe {i % 7}: {'sehr ' * (i % 3)}groß.\n" for i in range(200))
    plain, packed = tmp_path / "text.txt", tmp_path / "text.txt.gz"
    plain.write_text(text, encoding="utf-8")
    packed.write_bytes(gzip.compress(text.encode()))
    for data in [plain, packed]:
        lm("train", "--data", data, *TINY, "--epochs", 2, "--out", tmp_path / f"run{data.suffix}")
    assert losses(tmp_path / "run.txt") == losses(tmp_path / "run.gz")
    found = summary(tmp_path / "run.txt")
    assert found["bits_per_character"] > found["bits_per_byte"]  # umlauts take two bytes
    assert math.isfinite(found["bits_per_character"])
    output = lm("evaluate", "--run", tmp_path / "run.txt", "--data", packed).stdout
    assert f"{len(text.encode())} bytes, {len(text)} characters" in output  # all of it
    assert "--split" in lm.fails("evaluate", "--run", tmp_path / "run.txt", "--data", packed, "--split", "val", code=2)
    plain.write_text(text.replace("sehr", "ganz"), encoding="utf-8")
    assert "is not the one" in lm.fails("train", "--data", plain, *TINY, "--epochs", 3, "--out", tmp_path / "run.txt",
                                        "--resume")


def test_bad_text(lm, tmp_path):
    run, file = tmp_path / "run", tmp_path / "text"
    assert "nowhere" in lm.fails("train", "--data", tmp_path / "nowhere", *TINY, "--out", run)
    assert "directory" in lm.fails("train", "--data", tmp_path, *TINY, "--out", run)
    for content, expected in [(b"", "0 bytes"), (b"too short", "9 bytes"), (b"x" * 200 + b"\n\xff\n", "line 2"),
                              (gzip.compress(bytes(range(97, 123)) * 90)[:-20], "truncated gzip")]:
        file.write_bytes(content)
        assert expected in lm.fails("train", "--data", file, *TINY, "--out", run)
    file.write_text("short text. " * 10)
    assert "longer than the text" in lm.fails("train", "--data", file, *TINY, "--context", 300, "--out", run, code=2)
    assert not run.exists()


@pytest.mark.parametrize("arguments, expected", [
    (["--context", "8193"], "--context should be at most 8192"),
    (["--attention", "curv:m=4"], "curve"),
    (["--heads", "5"], "--heads should divide --hidden"),
    (["--tokens", "words"], "--tokens should be bytes or sentencepiece:vocabulary=N"),
    (["--contxt", "5"], "did you mean --context?"),
    (["--sentences", "1"], "--sentences should be at least 3"),
])
def test_bad_values_are_usage_errors(lm, tmp_path, arguments, expected):
    run = tmp_path / "run"
    assert expected in lm.fails("train", *GENERATED, "--out", run, *arguments, code=2)
    assert not run.exists()


def test_damaged_and_foreign_runs(lm, program, trained, tmp_path):
    run = tmp_path / "run"
    lm("train", *GENERATED, "--max-steps", 1, "--out", run)
    before = checkpoint_bytes(run)
    assert "already holds a run" in lm.fails("train", *GENERATED, "--out", run)
    assert checkpoint_bytes(run) == before
    file = run / "checkpoint" / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "training.safetensors" in lm.fails("train", *GENERATED, "--max-steps", 3, "--out", run, "--resume")
    other = tmp_path / "other"
    lm("train", *GENERATED, "--layers", 2, "--max-steps", 1, "--out", other)
    (other / "best" / "model.safetensors").write_bytes((run / "best" / "model.safetensors").read_bytes())
    assert "lacks the tensor" in lm.fails("evaluate", "--run", other)
    for name, command in [("translate", "evaluate"), ("classify", "evaluate")]:
        message = Program(program, name).fails(command, "--run", trained[0])
        assert f"is not a run of remnant {name}" in message


def test_a_damaged_memory_json_is_written_anew(lm, tmp_path):
    run = tmp_path / "run"
    lm("train", *GENERATED, "--max-steps", 1, "--out", run)
    (run / "memory.json").write_text("{")
    lm("train", *GENERATED, "--max-steps", 2, "--out", run, "--resume")
    assert json.loads((run / "memory.json").read_text())["rows"]


def test_divergence_does_not_promise_a_checkpoint(lm, tmp_path):
    arguments = ["train", *GENERATED, "--lr", "1e30", "--epochs", 2]
    message = lm.fails(*arguments, "--checkpoint-every", 0, "--out", tmp_path / "none")
    assert "diverged" in message and "there is no checkpoint yet" in message
    message = lm.fails(*arguments, "--checkpoint-every", 1, "--out", tmp_path / "one")
    assert "the last checkpoint is kept" in message


def test_longest_context(lm, tmp_path):
    run = tmp_path / "run"
    lm("train", "--data", "generated", "--sentences", "200", *TINY, "--context", 8192, "--max-steps", 1, "--batch-size", 1,
       "--out", run)
    [step] = steps(run)
    assert math.isfinite(step["loss"])


def test_compare_prints_one_table(lm, tmp_path):
    results = compared(lm, "--attention", ["exact", "curve:m=4"], tmp_path / "runs", *GENERATED, "--max-steps", 3)
    assert results[0]["attention_residual_bytes"] > results[1]["attention_residual_bytes"]
    assert all("bits_per_character" in row for row in results)


def test_help(program):
    for command in [["lm", "--help"], ["lm", "train", "--help"], ["lm", "generate", "--help"]]:
        result = subprocess.run([program, *command], capture_output=True, text=True, timeout=TIMEOUT)
        assert result.returncode == 0 and "remnant" in result.stdout


def test_tinyshakespeare(lm, data_directory, tmp_path):
    file = data_directory / "tinyshakespeare" / "input.txt.gz"
    if not file.is_file():
        pytest.skip(f"no {file}")
    result = lm("train", "--data", file, *TINY, "--context", 128, "--max-steps", 2, "--out", tmp_path / "run")
    assert "1003854 training, 55770 validation and 55770 test bytes" in result.stderr
