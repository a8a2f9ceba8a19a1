"""Each example, in small."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]),
                   "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "examples" / arguments[0]), *map(str, arguments[1:])],
                          env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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
