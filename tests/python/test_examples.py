"""Each example, in small."""

import functools
import gzip
import json
import os
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT


def run(*arguments, launcher=(), **variables):
    return lines(*arguments, launcher=launcher, **variables)[-1]


def lines(*arguments, launcher=(), **variables):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]),
                   "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run([sys.executable, *launcher, str(ROOT / "examples" / arguments[0]), *map(str, arguments[1:])],
                          env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=4", "attention=curve:m=5"])
def test_fine_tuning(memory, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "train.txt").write_text("0 a dull film\n1 a superb film\n" * 40)
    (tmp_path / "test.txt").write_text("0 dull\n1 superb\n")
    options = ("--data", tmp_path, "--batch", 4, "--length", 16, "--steps", 2, "--threads", 1)
    eager = run("finetune_minilm.py", "--memory", "eager", *options)
    found = run("finetune_minilm.py", "--memory", memory, *options)
    assert found["steps"] == 2 and found["loss"] < 2 and 0 <= found["test_accuracy"] <= 1
    assert found["first_batch_kept_mb"] < eager["first_batch_kept_mb"]


def test_fine_tuning_names_what_is_wrong_with_data(example, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "train.txt").write_text("0 a dull film\n1 a superb film\n")
    (tmp_path / "test.txt").write_text("0 dull\n2 odd\n")
    options = ("--data", tmp_path, "--steps", 1)
    assert "a batch of 3 and a test need" in example("finetune_minilm.py", "--batch", 3, *options, fails=True)
    assert "labels that train lacks: 2" in example("finetune_minilm.py", "--batch", 2, *options, fails=True)
    assert "at least 1, got 0" in example("finetune_minilm.py", "--batch", 0, *options, fails=True)
    (tmp_path / "test.txt").write_text("")
    assert "got 2 and 0" in example("finetune_minilm.py", "--batch", 2, *options, fails=True)


def test_the_release_s_softmax_by_one_import():
    torch, curve, owned = lines("softmax_approximation.py", "--steps", 30, "--attention")
    assert [line["softmax"] for line in (torch, curve, owned)] == ["torch", "curve", "attention"]
    assert all(line["loss"] < 2.6 for line in (torch, curve, owned))
    assert owned["kept_bytes"] < torch["kept_bytes"]


@pytest.mark.parametrize("wrapper", [(), ("--fsdp", "--memory", "unbiased:bits=4")])
def test_distributed_training(wrapper):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    found = run("train_distributed.py", "--steps", 3, "--batch", 8, *wrapper, launcher=launcher)
    assert found["ranks"] == 2 and found["loss"] < 3 and found["wrapper"] == ("FSDP2" if wrapper else "DDP")
    assert 1.5 * found["kept_bytes"] < found["eager_kept_bytes"]


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=4"])
def test_resnet(memory, tmp_path):
    options = ("--memory", memory, "--epochs", 1, "--batch", 16, "--blocks", 1, "--width", 8)
    found = run("resnet_cifar10.py", *options, "--images", 64, REMNANT_DATA="")
    assert found["kept_bytes"] < (0.6 if memory == "exact" else 0.2) * found["eager_kept_bytes"]
    (tmp_path / "cifar10").mkdir()
    for name in ("train", "test"):
        (tmp_path / "cifar10" / f"{name}.bin").write_bytes(bytes(i % 10 if j == 0 else (i * j) % 256
                                                                 for i in range(32) for j in range(3073)))
    assert run("resnet_cifar10.py", *options, REMNANT_DATA=str(tmp_path))["test_accuracy"] <= 1


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs an example in this process; gives what it says, with `fails` the sentence of its error."""

    def call(name, *arguments, fails=False):
        path = str(ROOT / "examples" / name)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        if not fails:
            runpy.run_path(path, run_name="__main__")
            return json.loads(capsys.readouterr().out.splitlines()[-1])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(path, run_name="__main__")
        assert ended.value.code not in (0, None)
        said = capsys.readouterr()
        assert said.out == ""
        return ended.value.code if isinstance(ended.value.code, str) else said.err.splitlines()[-1]

    return call


@pytest.fixture
def language_model(example):
    return functools.partial(example, "long_context_lm.py")


SMALL = ("--context", 128, "--width", 32, "--layers", 2, "--steps", 2)


def test_language_model_foretells_what_eager_keeps(language_model):
    found = language_model("--memory", "eager", *SMALL)
    assert found["kept_mb"] == found["eager_kept_mb"] > 0


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=4", "attention=curve:m=5"])
def test_language_model(memory, language_model):
    found = language_model("--memory", memory, *SMALL)
    assert found["kept_mb"] < 0.3 * found["eager_kept_mb"] and 0 < found["loss"] < 7


def test_language_model_reads_a_text(language_model, tmp_path):
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(b"to be or not to be. " * 100))
    found = language_model("--data", path, "--context", 64, "--width", 32, "--layers", 2, "--steps", 30, "--lr", 0.01)
    assert found["held_out_bits_a_byte"] < 5
    assert "at least 5130 are needed" in language_model("--data", path, "--context", 512, fails=True)
    assert "cannot be read" in language_model("--data", tmp_path / "none", fails=True)
    assert "multiple of 16, --steps and --batch" in language_model("--context", 100, fails=True)


IMAGES = ("--epochs", 1, "--batch", 16, "--blocks", 1, "--width", 8)


def test_resnet_reads_batches_and_refuses_what_it_cannot_read(example, tmp_path, monkeypatch):
    monkeypatch.setenv("REMNANT_DATA", str(tmp_path))
    folder = tmp_path / "cifar10"
    folder.mkdir()
    record = torch.randint(256, (16, 3073), dtype=torch.uint8)
    record[:, 0] = torch.arange(16) % 10
    data = record.numpy().tobytes()
    for i in range(1, 6):
        (folder / f"data_batch_{i}.bin").write_bytes(data)
    assert "no test.bin and no test_batch.bin" in example("resnet_cifar10.py", *IMAGES, fails=True)
    (folder / "test_batch.bin.gz").write_bytes(gzip.compress(data))
    assert 0 <= example("resnet_cifar10.py", *IMAGES)["test_accuracy"] <= 1
    for written, sentence in ((b"\x0b" + data[1:], "labels 0 to 9, got 11"), (b"12345", "got 5 bytes")):
        (folder / "test.bin").write_bytes(written)
        assert sentence in example("resnet_cifar10.py", *IMAGES, fails=True)
    (folder / "test.bin").unlink()
    (folder / "test.bin.gz").write_bytes(gzip.compress(data)[:500])
    assert "test.bin.gz cannot be read" in example("resnet_cifar10.py", *IMAGES, fails=True)


def test_resnet_on_real_images(example, data_directory, monkeypatch, tmp_path):
    source = data_directory / "cifar10" / "test.bin.gz"
    if not source.is_file():
        pytest.skip(f"no CIFAR-10 in {source.parent}")
    monkeypatch.setenv("REMNANT_DATA", str(tmp_path))
    (tmp_path / "cifar10").mkdir()
    for name in ("train", "test"):
        (tmp_path / "cifar10" / f"{name}.bin.gz").symlink_to(source)
    found = example("resnet_cifar10.py", *IMAGES)
    assert found["loss"] < 2.3 and found["test_accuracy"] > 0.2


def test_mistakes_of_options_are_named(example, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert "start it with torchrun" in example("train_distributed.py", fails=True)
    assert "at least 1" in example("softmax_approximation.py", "--m", 0, fails=True)
    assert "at least 1, got 0" in example("resnet_cifar10.py", "--batch", 0, fails=True)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_help(name, monkeypatch, capsys):
    if name == "finetune_minilm.py":
        pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert ended.value.code == 0
    assert f"examples/{name}" in capsys.readouterr().out
