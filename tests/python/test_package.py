"""The package as a loader: what it finds, what it refuses, what its functions hand on."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import remnant

ROOT = Path(__file__).resolve().parents[2]


def import_elsewhere(directory, code="import remnant", **environment):
    """Imports the package from `directory` in a fresh interpreter."""
    base = {name: value for name, value in os.environ.items() if name != "REMNANT_LIBRARY"}
    return subprocess.run([sys.executable, "-c", code], cwd=directory, capture_output=True, text=True,
                          env={**base, "PYTHONPATH": str(directory), **environment})


@pytest.fixture
def package(tmp_path):
    """A copy of the package's Python files alone, without a library."""
    shutil.copytree(ROOT / "python" / "remnant", tmp_path / "python" / "remnant",
                    ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.json"))
    return tmp_path / "python"


def last_line(process):
    return process.stderr.strip().splitlines()[-1]


def test_without_a_library_the_import_says_where_it_looked(package):
    process = import_elsewhere(package)
    assert process.returncode == 1
    assert last_line(process).startswith("ImportError: remnant found no libremnant.so in ")
    assert str(package / "remnant") in last_line(process)
    assert str(package.parent / "build" / "lib") in last_line(process)


def test_a_wrong_environment_variable_is_named(package, tmp_path):
    process = import_elsewhere(package, REMNANT_LIBRARY=str(tmp_path / "absent.so"))
    assert process.returncode == 1
    assert last_line(process).startswith("ImportError: REMNANT_LIBRARY names ")


def test_a_file_that_is_no_library_is_refused(package, tmp_path):
    wrong = tmp_path / "libremnant.so"
    wrong.write_text("not a library")
    process = import_elsewhere(package, REMNANT_LIBRARY=str(wrong))
    assert process.returncode == 1
    assert last_line(process).startswith(f"ImportError: {wrong} does not load beside PyTorch {torch.__version__}")


@pytest.mark.parametrize("place", ["remnant", "../build/lib"])
def test_another_torch_minor_is_refused_before_loading(package, place):
    directory = (package / place).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    # Were it loaded before the check, the error would be the dynamic linker's.
    (directory / "libremnant.so").write_text("not a library")
    (directory / "remnant_build.json").write_text(json.dumps({"version": "0.1.0", "torch": "1.0"}))
    process = import_elsewhere(package)
    assert process.returncode == 1
    assert last_line(process) == (f"ImportError: remnant was built for PyTorch 1.0, but PyTorch {torch.__version__} "
                                  "is running: build remnant again in this environment")


def test_a_library_beside_the_package_is_found(package):
    minor = ".".join(torch.__version__.split(".")[:2])
    shutil.copy(remnant.library_path, package / "remnant" / "libremnant.so")
    (package / "remnant" / "remnant_build.json").write_text(json.dumps({"version": "7.8.9", "torch": minor}))
    process = import_elsewhere(package, "import remnant; print(remnant.__version__, remnant.library_path)")
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["7.8.9", str(package / "remnant" / "libremnant.so")]


def test_this_build_says_what_it_was_built_for():
    info = json.loads((remnant.library_path.resolve().parent / "remnant_build.json").read_text())
    assert info["torch"] == ".".join(torch.__version__.split(".")[:2])
    assert info["version"] == remnant.__version__


def test_public_names_are_documented():
    for name in remnant.__all__:
        if name != "library_path":
            assert getattr(remnant, name).__doc__.strip(), name


@pytest.fixture
def inputs():
    def make(keys):
        return torch.randn(2, 3, keys, 8, dtype=torch.float64, requires_grad=True)

    return make(5), make(7), make(7)


def eager(query, key, value, bias=0.0, scale=1 / math.sqrt(8)):
    weights = torch.softmax(scale * query @ key.transpose(-2, -1) + bias, -1)
    return weights @ value, weights


def test_attention_defaults(inputs):
    torch.testing.assert_close(remnant.attention(*inputs), eager(*inputs)[0])


def test_attention_returns_detached_weights_on_request(inputs):
    output, weights = remnant.attention(*inputs, need_weights=True)
    expected_output, expected_weights = eager(*inputs)
    torch.testing.assert_close(output, expected_output)
    torch.testing.assert_close(weights, expected_weights.detach())
    assert not weights.requires_grad


def test_attention_hands_on_every_option(inputs):
    query, key, value = inputs
    i, j = torch.arange(5)[:, None], torch.arange(7)[None, :]
    mask = torch.rand(2, 1, 5, 7) < 0.7
    mask[..., 0] = True
    for options, allowed in [
        ({"mask": mask}, mask),
        ({"causal": True}, j <= i),
        ({"window": (1, 2)}, (j >= i - 1) & (j <= i + 2)),
        ({"window": [-1, 0]}, j <= i),
    ]:
        bias = torch.where(allowed, 0.0, -torch.inf).double()
        torch.testing.assert_close(remnant.attention(*inputs, **options), eager(*inputs, bias)[0], msg=str(options))
    torch.testing.assert_close(remnant.attention(*inputs, scale=0.3), eager(*inputs, scale=0.3)[0])
    bias = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(remnant.attention(query, key, value, mask=bias).square().sum(), bias)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(eager(*inputs, bias)[0].square().sum(), bias)[0])


def test_attention_draws_from_the_given_generator(inputs):
    def draw(seed):
        return remnant.attention(*inputs, dropout=0.5, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_options_are_keywords(inputs):
    with pytest.raises(TypeError):
        remnant.attention(*inputs, None)


def test_a_policy_that_does_not_parse_is_refused(inputs):
    with pytest.raises(RuntimeError, match="recompute"):
        remnant.attention(*inputs, policy="recompte")


def test_policies_keep_what_residual_bytes_says(inputs):
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for policy in ["exact", "recompute", "curve:m=2", "quantized:bits=4", "sampled:m=3", "top:m=3"]:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = remnant.attention(*inputs, policy=policy)
        common = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                  for tensor in (*inputs, output)}
        residual = sum(size for address, size in kept.items() if address not in common)
        assert residual == remnant.attention_residual_bytes(policy, 2 * 3, 5, 7, 8), policy


def test_softmax_approximation_is_called_and_applied_alike():
    energy = torch.randn(4, 33, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 33) < 0.8
    mask[0] = False
    expected = torch.softmax(energy.masked_fill(~mask, -torch.inf), -1).nan_to_num()
    torch.testing.assert_close(remnant.softmax_approximation(energy, mask), expected)
    weights = torch.randn_like(energy)
    gradients = [torch.autograd.grad((call(energy, mask, 3) * weights).sum(), energy)[0]
                 for call in (remnant.softmax_approximation, remnant.softmax_approximation.apply)]
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)
    # m = n / 2 keeps every element: the curve is then the softmax itself.
    whole = torch.autograd.grad((remnant.softmax_approximation(energy, None, 17) * weights).sum(), energy)[0]
    torch.testing.assert_close(whole, torch.autograd.grad((torch.softmax(energy, -1) * weights).sum(), energy)[0])


def test_softmax_input_comes_back_from_its_output():
    energy = torch.randn(3, 4, 9, dtype=torch.float64)
    energy[0, 0, 2] = -torch.inf
    restored = remnant.softmax_input_from_output(torch.softmax(energy, -1), torch.logsumexp(energy, -1))
    torch.testing.assert_close(restored, energy)
