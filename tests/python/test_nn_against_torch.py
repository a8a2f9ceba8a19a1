"""remnant::nn against Python's torch.nn: state dicts, outputs, gradients and initialisation.

PyTorch writes the cases to a file; the small executable nn_state_dict_tool loads each state dict into
the C++ module of the same name and compares, under the policies that are exact.
"""

import itertools
import os
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
TOOL = Path(os.environ.get("REMNANT_BUILD", ROOT / "build")) / "tests" / "nn_state_dict_tool"

BATCH, HEADS, WIDTH, QUERIES, KEYS = 3, 2, 8, 5, 7

pytestmark = pytest.mark.skipif(not TOOL.is_file(), reason=f"{TOOL} is not built: run ./dev build")

MODULES = {
    "attention": nn.MultiheadAttention,
    "encoder": nn.TransformerEncoderLayer,
    "decoder": nn.TransformerDecoderLayer,
}


def causal_mask(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def boolean_mask(*shape):
    mask = torch.rand(*shape) < 0.4
    mask[..., 0] = False  # with weights PyTorch gives NaN where every key is masked
    return mask


def floating_mask(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def sequence(length, width=WIDTH, *, batch_first=False, unbatched=False):
    shape = [length, width] if unbatched else [BATCH, length, width] if batch_first else [length, BATCH, width]
    return torch.randn(shape, dtype=torch.float64)


def write_case(kind, options, inputs, *, name, flags=None, train=True, fast_path=False):
    """One case: what torch.nn makes of the inputs. flags are forward's keyword arguments."""
    flags = flags or {}
    seed = 31
    torch.manual_seed(seed)
    module = MODULES[kind](**options).train(train)
    initial = {key: value.clone() for key, value in module.state_dict().items()}
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.4)

    leaves = {
        key: value.clone().requires_grad_(value.is_floating_point() and "padding" not in key)
        for key, value in inputs.items()
    }
    arguments = dict(leaves)
    if kind == "attention":
        arguments.setdefault("key", arguments["query"])
        arguments.setdefault("value", arguments["key"])
    with warnings.catch_warnings(), torch.set_grad_enabled(not fast_path):
        warnings.simplefilter("ignore")  # masks of two kinds are deprecated, not wrong
        result = module(**arguments, **flags)
    output, weights = result if isinstance(result, tuple) else (result, None)
    outputs = {"output": output.detach()}
    if weights is not None:
        outputs["weights"] = weights.detach()
    assert all(tensor.isfinite().all() for tensor in outputs.values())

    direction = torch.randn_like(output)
    gradients = {}
    if not fast_path:
        (output * direction).sum().backward()
        for key, tensor in itertools.chain(leaves.items(), module.named_parameters()):
            if tensor.requires_grad:
                gradients[key] = tensor.grad.clone()
    return {
        "name": name,
        "module": kind,
        "seed": seed,
        "train": train,
        "options": options,
        "flags": flags,
        "initial": initial,
        "parameters": {key: value.detach().clone() for key, value in module.state_dict().items()},
        "inputs": {key: value.detach().clone() for key, value in leaves.items()},
        "outputs": outputs,
        "direction": direction,
        "gradients": gradients,
    }


def run_tool(path, cases):
    torch.save(cases, path)
    environment = {**os.environ, "REMNANT_STATE_DICT_CASES": str(path)}
    report = path.with_suffix(".xml")
    done = subprocess.run(
        [TOOL, f"--gtest_output=xml:{report}"], capture_output=True, text=True, env=environment, timeout=300
    )
    if done.returncode == 0:
        assert f'"{len(cases)}"' in report.read_text(), "not every case was compared"
    return done


def check(path, cases):
    done = run_tool(path, cases)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def attention_cases():
    base = {"embed_dim": WIDTH, "num_heads": HEADS}
    for batch_first, train in itertools.product([False, True], repeat=2):
        options = {**base, "batch_first": batch_first}

        def case(name, inputs, flags=None, **more):
            label = f"{name}, batch_first {batch_first}, train {train}"
            return write_case("attention", {**options, **more}, inputs, name=label, flags=flags, train=train)

        def self_inputs(**masks):
            return {"query": sequence(QUERIES, batch_first=batch_first), **masks}

        def memory_inputs(kdim=WIDTH, vdim=None, **masks):
            inputs = {**self_inputs(), "key": sequence(KEYS, kdim, batch_first=batch_first), **masks}
            if vdim is not None:
                inputs["value"] = sequence(KEYS, vdim, batch_first=batch_first)
            return inputs

        yield case("self", self_inputs())
        yield case("self without bias", self_inputs(), bias=False)
        yield case("memory", memory_inputs())
        yield case("three inputs", memory_inputs(vdim=WIDTH))
        yield case("kdim and vdim", memory_inputs(kdim=6, vdim=10), kdim=6, vdim=10)
        yield case("kdim without bias", memory_inputs(kdim=6, vdim=WIDTH), kdim=6, bias=False)
        yield case("weights per head", memory_inputs(), {"average_attn_weights": False})
        yield case("no weights", memory_inputs(), {"need_weights": False})

        attn_masks = {
            "none": None,
            "boolean": boolean_mask(QUERIES, KEYS),
            "floating": floating_mask(QUERIES, KEYS),
            "boolean per head": boolean_mask(BATCH * HEADS, QUERIES, KEYS),
            "floating per head": floating_mask(BATCH * HEADS, QUERIES, KEYS),
        }
        paddings = {"none": None, "boolean": boolean_mask(BATCH, KEYS), "floating": floating_mask(BATCH, KEYS)}
        extras = [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}]
        for (mask_name, mask), (padding_name, padding), extra in itertools.product(
            attn_masks.items(), paddings.items(), extras
        ):
            masks = {"attn_mask": mask, "key_padding_mask": padding}
            inputs = memory_inputs(**{key: value for key, value in masks.items() if value is not None})
            yield case(f"mask {mask_name}, padding {padding_name}, {sorted(extra)}", inputs, **extra)

        causal = {"attn_mask": causal_mask(QUERIES)}
        yield case("causal hint", self_inputs(**causal), {"is_causal": True, "need_weights": False})
        yield case("causal hint and weights", self_inputs(**causal), {"is_causal": True})
        padded = self_inputs(**causal, key_padding_mask=boolean_mask(BATCH, QUERIES))
        yield case("causal hint and padding", padded, {"is_causal": True, "need_weights": False})

    for train in (False, True):
        inputs = {"query": sequence(QUERIES, unbatched=True), "key": sequence(KEYS, unbatched=True)}
        masks = {"attn_mask": boolean_mask(HEADS, QUERIES, KEYS), "key_padding_mask": boolean_mask(KEYS)}
        yield write_case("attention", base, inputs | masks, name="unbatched", train=train)
        yield write_case(
            "attention", base, inputs, name="unbatched per head", train=train, flags={"average_attn_weights": False}
        )


def layer_options(**options):
    return {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 12, "dropout": 0.0, **options}


LAYER_SETTINGS = list(itertools.product([False, True], ["relu", "gelu"], [False, True], [False, True], [False, True]))


def encoder_cases():
    for norm_first, activation, batch_first, bias, train in LAYER_SETTINGS:
        options = layer_options(norm_first=norm_first, activation=activation, batch_first=batch_first, bias=bias)
        padding = boolean_mask(BATCH, KEYS)
        variants = {
            "plain": ({}, {}),
            "masks": ({"src_mask": floating_mask(KEYS, KEYS), "src_key_padding_mask": padding}, {}),
            "causal": ({"src_mask": causal_mask(KEYS)}, {"is_causal": True}),
        }
        for variant, (masks, flags) in variants.items():
            inputs = {"src": sequence(KEYS, batch_first=batch_first), **masks}
            name = f"encoder {variant} {options} train {train}"
            yield write_case("encoder", options, inputs, name=name, flags=flags, train=train)
    # Dropout off in eval; and PyTorch's fused inference path, which needs no_grad.
    options = layer_options(batch_first=True, layer_norm_eps=1e-2)
    src = {"src": sequence(KEYS, batch_first=True)}
    yield write_case("encoder", {**options, "dropout": 0.3}, src, name="dropout in eval", train=False)
    yield write_case("encoder", options, src, name="fused inference", train=False, fast_path=True)
    yield write_case("encoder", layer_options(), {"src": sequence(KEYS, unbatched=True)}, name="unbatched")


def decoder_cases():
    for norm_first, activation, batch_first, bias, train in LAYER_SETTINGS:
        options = layer_options(norm_first=norm_first, activation=activation, batch_first=batch_first, bias=bias)
        inputs = {
            "tgt": sequence(QUERIES, batch_first=batch_first),
            "memory": sequence(KEYS, batch_first=batch_first),
        }
        masks = {
            "tgt_mask": causal_mask(QUERIES),
            "memory_mask": boolean_mask(QUERIES, KEYS),
            "tgt_key_padding_mask": boolean_mask(BATCH, QUERIES),
            "memory_key_padding_mask": boolean_mask(BATCH, KEYS),
        }
        name = f"decoder {options} train {train}"
        yield write_case("decoder", options, inputs, name=name, train=train)
        flags = {"tgt_is_causal": True}
        yield write_case("decoder", options, inputs | masks, name=name + " masks", flags=flags, train=train)


@pytest.mark.parametrize("cases", [attention_cases, encoder_cases, decoder_cases])
def test_state_dict_outputs_and_gradients(cases, tmp_path):
    check(tmp_path / "cases.pt", list(cases()))


@pytest.fixture
def case():
    inputs = {"src": sequence(KEYS)}
    return write_case("encoder", layer_options(), inputs, name="one")


@pytest.mark.parametrize(
    "group, key", [("outputs", "output"), ("gradients", "linear1.weight"), ("initial", "self_attn.in_proj_weight")]
)
def test_a_changed_value_is_noticed(group, key, case, tmp_path):
    check(tmp_path / "right.pt", [case])
    case[group][key].view(-1)[0] += 1e-6
    assert run_tool(tmp_path / "wrong.pt", [case]).returncode != 0


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_other_parameter_names_are_noticed(change, case, tmp_path):
    if change == "missing":
        del case["parameters"]["norm1.bias"]
    else:
        case["parameters"]["norm9.bias"] = torch.zeros(WIDTH)
    assert run_tool(tmp_path / "cases.pt", [case]).returncode != 0


def test_fully_masked_query_with_weights_is_finite(tmp_path):
    """Attention 0, so that out_proj.bias is left, where PyTorch gives NaN with need_weights."""
    options = {"embed_dim": WIDTH, "num_heads": HEADS}
    padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    padding[1] = True
    inputs = {"query": sequence(QUERIES), "key_padding_mask": padding}
    case = write_case("attention", options, inputs, name="masked", flags={"need_weights": False})
    bias = case["parameters"]["out_proj.bias"]
    assert torch.equal(case["outputs"]["output"][:, 1], bias.expand(QUERIES, WIDTH))

    module = nn.MultiheadAttention(**options).double()
    module.load_state_dict(case["parameters"])
    query = inputs["query"]
    theirs, weights = module(query, query, query, key_padding_mask=padding)
    assert theirs[:, 1].isnan().all()
    weights[1] = 0.0
    with_weights = {
        **case,
        "flags": {},
        "outputs": {"output": case["outputs"]["output"], "weights": weights.detach()},
    }
    check(tmp_path / "cases.pt", [case, with_weights])
