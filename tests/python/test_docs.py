"""Examples of docstrings run, and code in the guides is at least Python."""

import ast
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

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


def test_code_of_the_python_guide_parses():
    text = (ROOT / "docs" / "python.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(code) >= 5
    for block in code:
        ast.parse(block)
