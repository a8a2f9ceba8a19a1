"""Examples of docstrings run, and so does the code of the guides."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import remnant

ROOT = Path(__file__).resolve().parents[2]
MODULES = ["remnant", *(f"remnant.{module.name}" for module in pkgutil.iter_modules(remnant.__path__))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    module = importlib.import_module(name)
    found = doctest.testmod(module, extraglobs={"torch": torch, "remnant": remnant})
    assert found.failed == 0


def test_main_functions_have_examples():
    for subject in (remnant.attention, remnant.feed_forward, remnant.linear_cross_entropy, remnant.convert,
                    remnant.compress, remnant.memory_report):  # fmt: skip
        assert ">>>" in subject.__doc__, subject


def blocks(page):
    text = (ROOT / page).read_text()
    return [pytest.param(found[1], id=f"{page}:{text.count(chr(10), 0, found.start()) + 2}")
            for found in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)]


class Model(nn.Module):
    """What the pages call `model`: it has norms and a head, and gives a loss."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        return self.head(self.encoder(x)).square().mean()


@pytest.fixture
def names(tmp_path):
    """What the pages take for granted."""
    query, key, value = (torch.randn(2, 4, 10, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    x = torch.randn(4, 10, 32)
    return {
        "torch": torch, "remnant": remnant, "model": Model(), "input": x, "tokens": x, "query": query, "key": key,
        "value": value, "attn_mask": mask, "mask": mask, "energy": torch.randn(2, 4, 10, 10), "name": tmp_path,
    }  # fmt: skip


@pytest.mark.parametrize("code", [*blocks("docs/python.md"), *blocks("README.md")])
def test_code_of_the_guides_runs(code, names, tmp_path):
    if "AutoModel" in code:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                         intermediate_size=64, vocab_size=100)
        transformers.BertModel(config).save_pretrained(tmp_path)
        names["AutoModel"] = transformers.AutoModel
    before = set(names)
    exec(compile(code, "a guide", "exec"), names)
    for name in {"loss", "output", "weights"} & (set(names) - before):
        assert names[name].isfinite().all()
