"""`remnant vision` as its users run it: the built program, on a few images that it draws and on small files."""

import gzip
import json
import math
import random
import signal

import pytest

from programs import Program, check_signal_and_resume, checkpoint_bytes, compared, losses, metrics, steps, summary

TINY = ["--model", "resnet8", "--width", "4", "--batch-size", "16", "--threads", "1"]
GENERATED = ["--data", "generated", "--images", "200", *TINY]
RECORD = 1 + 3 * 32 * 32


@pytest.fixture(scope="session")
def vision(program):
    return Program(program, "vision")


def records(count, seed):
    """Images of one brightness, with noise; their label is that brightness."""
    draw = random.Random(seed)
    return b"".join(bytes([i % 10]) + bytes(25 * (i % 10) + draw.randrange(6) for _ in range(RECORD - 1))
                    for i in range(count))


def write_images(folder, names=("train.bin", "val.bin.gz", "test.bin"), counts=(200, 20, 40)):
    folder.mkdir()
    for seed, (name, count) in enumerate(zip(names, counts)):
        content = records(count, seed)
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


@pytest.fixture(scope="session")
def trained(vision, tmp_path_factory):
    """A run that has learnt, and what it printed."""
    folder = write_images(tmp_path_factory.mktemp("images") / "data")
    run = tmp_path_factory.mktemp("trained") / "run"
    result = vision("train", "--data", folder, *TINY, "--epochs", 5, "--lr", "0.05", "--out", run)
    return run, result, folder


def test_training_learns_and_writes_the_run(trained):
    run, result, _ = trained
    found = summary(run)
    assert {"memory", "accuracy", "kept_bytes", "peak_bytes", "step_ms_median", "parameters", "seed", "threads",
            "version"} <= set(found)
    assert "attention" not in found and "attention_residual_bytes" not in found
    assert found["accuracy"] > 0.5 and found["labels"][:3] == ["airplane", "automobile", "bird"]
    assert [sum(row) for row in found["confusion"]] == [4] * 10
    accuracies = [line["validation_accuracy"] for line in metrics(run) if "validation_accuracy" in line]
    assert len(accuracies) == 5 and found["validation_accuracy"] == max(accuracies)
    assert found["best_epoch"] == accuracies.index(max(accuracies)) + 1
    for line in steps(run):
        assert {"step", "epoch", "seconds", "loss", "lr", "images_per_second", "kept_bytes", "peak_bytes",
                "gradient_norm", "step_ms"} == set(line)
    config = json.loads((run / "config.json").read_text())
    assert config["program"] == "vision" and config["labels"] == found["labels"]
    assert all(0.3 < mean < 0.6 for mean in config["mean"])
    memory = json.loads((run / "memory.json").read_text())
    assert sum(row["kept_bytes"] for row in memory["rows"]) == memory["kept_bytes"] > 0
    assert {"stem", "blocks.0.first", "output"} <= {row["layer"] for row in memory["rows"]}
    assert json.loads((run / "timeline.json").read_text())["peak_bytes"] > 0
    assert list(run.glob("**/*tfevents*"))
    assert "200 training, 20 validation and 40 test images of 10 classes" in result.stderr
    assert "held out" not in result.stderr


def test_the_learning_rate_rises_and_falls(vision, trained, tmp_path):
    rates = [line["lr"] for line in steps(trained[0])]
    per_epoch = len(rates) // 5
    assert rates[0] == pytest.approx(0.005)
    assert rates[:per_epoch] == sorted(rates[:per_epoch]) and rates[per_epoch:] == sorted(rates[per_epoch:], reverse=True)
    assert rates[per_epoch] == pytest.approx(0.05 * (1 + math.cos(math.pi / 5)) / 2) and rates[-1] < 0.001
    run = tmp_path / "run"
    vision("train", *GENERATED, "--schedule", "step", "--warm-up", 0, "--epochs", 4, "--batch-size", 80, "--out", run)
    rates = [line["lr"] for line in steps(run)]
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def test_evaluate_repeats_the_summary(vision, trained):
    run, _, folder = trained
    found = summary(run)
    output = vision("evaluate", "--run", run, "--threads", 1).stdout
    assert "test  40 images, 10 classes" in output
    assert f"accuracy {found['accuracy']:.4f}" in output and f"loss {found['test_loss']:.4f}" in output
    table = [line.split() for line in output.splitlines() if line.split(" ")[0] in found["labels"]]
    assert [[int(word) for word in row[1:-1]] for row in table] == found["confusion"]
    assert [row[-1] for row in table] == [f"{row[i] / 4:.3f}" for i, row in enumerate(found["confusion"])]
    assert "200 images" in vision("evaluate", "--run", run, "--split", "train").stdout
    assert "20 images" in vision("evaluate", "--run", run, "--data", folder / "val.bin.gz").stdout
    assert "--split should be train, val or test" in vision.fails("evaluate", "--run", run, "--split", "tset", code=2)


def test_run_labels_images(vision, trained):
    run, _, folder = trained
    lines = [line.split("\t") for line in vision("run", "--run", run, "--threads", 1).stdout.splitlines()]
    found = summary(run)
    given = [found["labels"].index(name) for name, _ in lines]
    confusion = [[0] * 10 for _ in range(10)]
    for i, label in enumerate(given):
        confusion[i % 10][label] += 1
    assert confusion == found["confusion"]
    assert all(0.1 <= float(probability) <= 1 for _, probability in lines)
    # A label does not depend on its company.
    alone = vision("run", "--run", run, "--threads", 1, "--data", folder / "test.bin", "--batch-size", 1).stdout
    assert [line.split("\t")[0] for line in alone.splitlines()] == [name for name, _ in lines]


def test_generated_images_are_learnt_but_not_at_once(vision, tmp_path):
    run = tmp_path / "run"
    result = vision("train", "--data", "generated", "--images", 1600, *TINY, "--width", 8, "--epochs", 3, "--lr", "0.05",
                    "--out", run)
    assert "1280 training, 160 validation and 160 test images" in result.stderr
    curve = losses(run)
    assert sum(curve[-20:]) / 20 < sum(curve[:20]) / 20 - 0.2
    assert summary(run)["labels"][0] == "disc" and summary(run)["accuracy"] < 0.95


def test_the_same_seed_gives_the_same_run(vision, tmp_path):
    for name, more in [("one", []), ("again", []), ("still", ["--augment", "false"]), ("other", ["--seed", 2]),
                       ("plain", ["--layout", "contiguous"]), ("bf16", ["--precision", "bf16"])]:
        vision("train", *GENERATED, "--epochs", 1, *more, "--out", tmp_path / name)
    assert checkpoint_bytes(tmp_path / "one") == checkpoint_bytes(tmp_path / "again")
    for name in ["still", "other", "bf16"]:
        assert losses(tmp_path / name) != losses(tmp_path / "one")
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "one"), rel=0.1)


def test_resume_equals_an_uninterrupted_run(vision, tmp_path):
    arguments = ["train", *GENERATED, "--accumulate", 2, "--epochs", 2]
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    vision(*arguments, "--out", straight)
    vision(*arguments, "--max-steps", 3, "--out", parts)
    vision(*arguments, "--resume", "--out", parts)
    assert losses(parts) == losses(straight) and len(losses(straight)) == 10
    # With the running statistics: buffers are in the checkpoint.
    assert checkpoint_bytes(parts)["model.safetensors"] == checkpoint_bytes(straight)["model.safetensors"]
    assert b"running_var" in checkpoint_bytes(parts)["model.safetensors"]
    assert "its model is" in vision.fails(*arguments, "--model", "resnet14", "--resume", "--out", parts)


def test_residual_networks_under_each_setting(vision, tmp_path):
    arguments = ["--data", "generated", "--images", 100, "--model", "resnet8", "--width", 8, "--batch-size", 16,
                 "--threads", 1, "--epochs", 2]
    settings = ["eager", "exact", "unbiased:bits=4"]
    eager, exact, coded = compared(vision, "--memory", settings, tmp_path / "runs", *arguments)
    # Images of 12 kB each are inputs, and kept all the same.
    assert exact["kept_bytes"] < 0.65 * eager["kept_bytes"] and coded["kept_bytes"] < 0.3 * eager["kept_bytes"]
    curves = [losses(tmp_path / "runs" / name) for name in ("eager", "exact", "unbiased-bits-4")]
    assert all(curve[0] == pytest.approx(curves[0][0], rel=1e-4) for curve in curves)
    assert curves[0] == pytest.approx(curves[1], rel=2e-2)


@pytest.mark.parametrize("model", [["chain", "--depth", 4], ["reversible", "--depth", 3],
                                   ["chain", "--depth", 3, "--activation", "leaky", "--init", "he"]])
def test_models_that_rebuild_their_inputs(vision, tmp_path, model):
    arguments = ["--data", "generated", "--images", 100, "--model", *model, "--width", 4, "--batch-size", 16, "--threads", 1]
    eager, exact = compared(vision, "--memory", ["eager", "exact"], tmp_path / "runs", *arguments, "--epochs", 2)
    assert exact["kept_bytes"] < 0.8 * eager["kept_bytes"]
    curves = [losses(tmp_path / "runs" / name) for name in ("eager", "exact")]
    assert curves[0] == pytest.approx(curves[1], rel=2e-2) and curves[0][0] == pytest.approx(curves[1][0], rel=1e-4)
    # A run that is resumed rebuilds as one that never stopped: its default is exact.
    vision("train", *arguments, "--epochs", 2, "--max-steps", 3, "--out", tmp_path / "parts")
    vision("train", *arguments, "--epochs", 2, "--resume", "--out", tmp_path / "parts")
    assert checkpoint_bytes(tmp_path / "parts")["model.safetensors"] == \
        checkpoint_bytes(tmp_path / "runs" / "exact")["model.safetensors"]
    assert losses(tmp_path / "parts") == losses(tmp_path / "runs" / "exact")
    message = vision.fails("train", *arguments, "--memory", "unbiased:bits=4", "--out", tmp_path / "x", code=2)
    assert f"--memory of {model[0]} should be eager, exact" in message


@pytest.mark.parametrize("model", [["chain", "--depth", 2], ["reversible", "--depth", 9]])
def test_models_that_rebuild_train_in_bf16(vision, tmp_path, model):
    arguments = ["--data", "generated", "--images", 100, "--model", *model, "--width", 4, "--batch-size", 16,
                 "--threads", 1, "--epochs", 2, "--precision", "bf16"]
    eager, exact = compared(vision, "--memory", ["eager", "exact"], tmp_path / "runs", *arguments)
    assert exact["kept_bytes"] < 0.8 * eager["kept_bytes"]
    curves = [losses(tmp_path / "runs" / name) for name in ("eager", "exact")]
    assert curves[0] == pytest.approx(curves[1], rel=5e-2) and curves[0][0] == pytest.approx(curves[1][0], rel=1e-2)


@pytest.mark.parametrize("model, choice, expected", [
    (["chain", "--depth", 2], "unbiased:bits=4", "blocks.0 can do eager or exact"),
    (["reversible", "--depth", 3], "checkpoint", "blocks.0 can do eager or exact"),
    (["resnet8"], "checkpoint", "blocks.0.first can do eager, exact or unbiased"),
    (["resnet8"], "attention=output", "blocks.0.first can do eager, exact or unbiased")])
def test_choices_that_a_layer_cannot_do(vision, tmp_path, model, choice, expected):
    file = tmp_path / "choices.json"
    arguments = ["train", "--data", "generated", "--images", 100, "--model", *model, "--width", 4, "--batch-size", 16,
                 "--threads", 1, "--max-steps", 1, "--memory", file]
    file.write_text(json.dumps({"blocks.*": choice}))
    assert expected in vision.fails(*arguments, "--out", tmp_path / "refused", code=2)
    # The last that fits decides.
    file.write_text(json.dumps({"*": choice, "blocks.*": "exact", "stem": "unbiased:bits=4"}))
    vision(*arguments, "--out", tmp_path / "taken")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resume_goes_on(vision, tmp_path, number, code):
    check_signal_and_resume(vision, number, code, tmp_path, *GENERATED, "--epochs", 6)


def test_original_names_and_held_out_images(vision, tmp_path):
    parts = [f"data_batch_{i}.bin" for i in range(1, 6)]
    folder = write_images(tmp_path / "data", [*parts, "test_batch.bin"], [40] * 6)
    (folder / "batches.meta.txt").write_text("".join(f"class {i}\n" for i in range(10)) + "\n")
    arguments = ["train", "--data", folder, *TINY, "--epochs", 1]
    result = vision(*arguments, "--out", tmp_path / "run")
    assert "180 training, 20 validation and 40 test images" in result.stderr
    assert "every tenth training image of a class is held out for validation\n" in result.stderr
    assert summary(tmp_path / "run")["labels"][9] == "class 9"
    (folder / "batches.meta.txt").write_text("one\ntwo\n")
    assert "should hold 10 names" in vision.fails(*arguments, "--out", tmp_path / "x")
    (folder / "data_batch_4.bin").unlink()
    assert "no data_batch_4.bin" in vision.fails(*arguments, "--out", tmp_path / "x")
    one = folder / "data_batch_1.bin"
    one.write_bytes(records(200, 7))
    result = vision("train", "--data", one, *TINY, "--epochs", 1, "--out", tmp_path / "file")
    assert "170 training, 10 validation and 20 test images" in result.stderr
    assert "every tenth training image of a class is held out for validation and test" in result.stderr


def test_bad_data(vision, trained, tmp_path):
    run, file = tmp_path / "run", tmp_path / "images.bin"
    assert "nowhere" in vision.fails("train", "--data", tmp_path / "nowhere", *TINY, "--out", run)
    assert "no train.bin or data_batch_1.bin" in vision.fails("train", "--data", tmp_path, *TINY, "--out", run)
    good = records(200, 1)
    for content, expected in [(b"", "holds no image"), (good[:-1], "no whole number"), (good[: 10 * RECORD], "at least"),
                              (good[: 5 * RECORD] + b"\x0b" + good[5 * RECORD + 1 :], "image 6 of"),
                              (good[: 5 * RECORD] + b"\xff" + good[5 * RECORD + 1 :], "label 255, expected 0 to 9"),
                              (gzip.compress(good)[:-10], "truncated gzip"),
                              (gzip.compress(good)[:400] + bytes(9) + gzip.compress(good)[409:], "damaged gzip")]:
        file.write_bytes(content)
        assert expected in vision.fails("train", "--data", file, *TINY, "--out", run)
        if expected != "at least":
            assert expected in vision.fails("run", "--run", trained[0], "--data", file)
    assert not run.exists()


def test_changed_data_is_noticed_on_resume(vision, tmp_path):
    folder, run = write_images(tmp_path / "data"), tmp_path / "run"
    arguments = ["train", "--data", folder, *TINY, "--epochs", 1, "--out", run]
    vision(*arguments)
    before = checkpoint_bytes(run)
    (folder / "test.bin").write_bytes(records(40, 99))
    assert "is not the one" in vision.fails(*arguments, "--resume")
    assert checkpoint_bytes(run) == before


@pytest.mark.parametrize("arguments, expected", [
    (["--model", "resnet21"], "resnetN with N = 6 n + 2"),
    (["--model", "vgg"], "such as resnet20; got 'vgg'"),
    (["--depth", "3"], "--depth is for reversible and chain"),
    (["--model", "chain", "--width", "3"], "--width of chain should be even, got 3"),
    (["--init", "he"], "--activation and --init are for chain; --model is resnet8"),
    (["--model", "chain", "--init", "zero"], "--init should be orthogonal or he"),
    (["--model", "chain", "--activation", "relu"], "--activation should be maxmin or leaky"),
    (["--memory", "unbiased:bits=3"], "8, 4 or 2 bits"),
    (["--layout", "nchw"], "--layout should be channels-last or contiguous"),
    (["--schedule", "linear"], "--schedule should be cosine, step or constant"),
    (["--memory", "egaer"], "eager"),
    (["--precision", "fp16"], "--precision should be fp32 or bf16"),
    (["--images", "1"], "--images should be at least 100"),
    (["--warm-up", "-1"], "--warm-up should be at least 0"),
    (["--weight-decay", "nan"], "--weight-decay should be at least 0"),
    (["--batchsize", "5"], "did you mean --batch-size?"),
    (["--lr", "0"], "--lr should be above 0"),
])
def test_bad_values_are_usage_errors(vision, tmp_path, arguments, expected):
    run = tmp_path / "run"
    assert expected in vision.fails("train", *GENERATED, "--out", run, *arguments, code=2)
    assert not run.exists()


def test_damaged_and_foreign_runs(vision, program, trained, tmp_path):
    run = tmp_path / "run"
    vision("train", *GENERATED, "--max-steps", 1, "--out", run)
    assert "already holds a run" in vision.fails("train", *GENERATED, "--out", run)
    assert "is not a run of remnant classify" in Program(program, "classify").fails("evaluate", "--run", run)
    file = run / "best" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors" in vision.fails("evaluate", "--run", run)
    config = json.loads((run / "config.json").read_text())
    for key, value in [("mean", [0.5]), ("labels", 3)]:
        (run / "config.json").write_text(json.dumps({**config, key: value}))
        assert f"the field {key} is missing or malformed" in vision.fails("evaluate", "--run", run)


def test_report_of_a_run(program, trained, tmp_path):
    page = tmp_path / "report.html"
    Program(program, "report")(trained[0], "--out", page)
    text = page.read_text()
    assert "Images a second, median" in text and "Tokens a second" not in text
    assert "Test accuracy" in text and "blocks.0.first" in text


def test_cifar10(vision, data_directory, tmp_path):
    folder = data_directory / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    run = tmp_path / "run"
    result = vision("train", "--data", folder, *TINY, "--max-steps", 2, "--out", run)
    assert "9000 training, 1000 validation and 2000 test images of 10 classes" in result.stderr
    means = json.loads((run / "config.json").read_text())["mean"]
    assert means == pytest.approx([0.491, 0.482, 0.447], abs=0.01)
