"""Hugging Face models: attention by its interface, whole models converted, Trainer."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch

import remnant

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "vocab_size": 100, "max_position_embeddings": 64}


def build(name, dropout=0.0, **more):
    """A small random model of a family, and inputs for it."""
    torch.manual_seed(0)
    ids = torch.randint(5, 100, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    text = {"input_ids": ids, "attention_mask": mask}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    t = transformers
    if name == "bert":
        model = t.BertModel(t.BertConfig(**SMALL, **drop, **more))
    elif name == "roberta":
        model = t.RobertaModel(t.RobertaConfig(**SMALL, **drop, **more))
    elif name == "albert":
        model = t.AlbertModel(t.AlbertConfig(**SMALL, **drop, embedding_size=16, **more))
    elif name == "distilbert":
        model = t.DistilBertModel(t.DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=64,
                                                     dropout=dropout, attention_dropout=dropout, **more))
    elif name == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, resid_pdrop=dropout,
                                               embd_pdrop=dropout, attn_pdrop=dropout, **more))
    elif name == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**SMALL, num_key_value_heads=2, attention_dropout=dropout, **more))
    else:
        model = t.ViTModel(t.ViTConfig(**{k: v for k, v in SMALL.items() if "vocab" not in k and "max" not in k},
                                       **drop, image_size=16, patch_size=4, **more))
        text = {"pixel_values": torch.randn(3, 3, 16, 16)}
    return model.train(), text


FAMILIES = ["bert", "roberta", "albert", "distilbert", "gpt2", "llama", "vit"]


def output(model, inputs):
    """Of the places that are no padding."""
    result = model(**inputs)[0]
    mask = inputs.get("attention_mask")
    return result if mask is None else result * mask[..., None]


def gradients(model, inputs):
    model.zero_grad()
    y = output(model, inputs)
    # Not a sum of squares, which a last LayerNorm makes a constant.
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kept(model, inputs):
    return remnant_kept(lambda: model(**inputs)[0].sum(), list(model.parameters()))


def remnant_kept(loss, parameters):
    own = {p.untyped_storage().data_ptr() for p in parameters}
    seen = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held = loss()
    del held
    return sum(seen.values())


def close(a, b, tolerance=2e-4):
    assert a.keys() == b.keys()
    for name in a:
        scale = float(b[name].abs().max()) + 1e-3
        assert float((a[name] - b[name]).abs().max()) < tolerance * scale, name


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_implementation_equals_eager(name):
    remnant.hf.register()
    model, inputs = build(name, attn_implementation="eager")
    y, wanted = gradients(model, inputs)
    model.set_attn_implementation("remnant")
    z, found = gradients(model, inputs)
    assert torch.allclose(y, z, atol=1e-4)
    close(found, wanted)
    with torch.no_grad():
        assert torch.allclose(output(model.eval(), inputs), y, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_converted_model_equals_eager(name):
    model, inputs = build(name)
    model.set_attn_implementation("eager")
    y, wanted = gradients(model, inputs)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = str(model)
    assert remnant.convert(model, "exact") is model
    assert model.config._attn_implementation == "remnant"
    z, found = gradients(model, inputs)
    assert torch.allclose(y, z, atol=1e-4)
    close(found, wanted)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert "memory=exact" in str(model)
    left = remnant.conversion(model).left
    assert not {kind for kind, _ in left.values()} & {"Linear", "LayerNorm", "GELUActivation", "LlamaRMSNorm"}, left
    remnant.revert(model)
    assert str(model) == before and model.config._attn_implementation == "eager"
    again, found = gradients(model, inputs)
    assert torch.equal(again, y)


@pytest.mark.parametrize("name", FAMILIES)
def test_codes_keep_far_less_and_are_unbiased(name):
    model, inputs = build(name, dropout=0.0)
    model.set_attn_implementation("eager")
    eager = kept(model, inputs)
    _, wanted = gradients(model, inputs)
    remnant.convert(model, "unbiased:bits=4")
    assert kept(model, inputs) < 0.45 * eager
    total, squares = {}, {}
    draws = 60
    for _ in range(draws):
        for key, g in gradients(model, inputs)[1].items():
            total[key] = total.get(key, 0) + g.double()
            squares[key] = squares.get(key, 0) + g.double().square()
    for key, g in wanted.items():
        mean = total[key] / draws
        # Of a whole tensor: the mean's distance from the gradient against its own standard error.
        variance = (squares[key] / draws - mean.square()).clamp_min(0).sum() / (draws - 1)
        distance = (mean - g.double()).square().sum()
        assert distance < 4 * variance + 1e-5 * g.double().square().sum() + 1e-12, key


def test_trainer_trains_a_converted_model(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))
    remnant.convert(model, "unbiased:bits=4")
    rows = [{"input_ids": torch.randint(0, 50, (10,)) + 50 * (i % 2), "labels": i % 2} for i in range(64)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=40, per_device_train_batch_size=16, learning_rate=3e-3, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True)
    result = transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert result.training_loss < 0.6
    model.save_pretrained(tmp_path / "saved")
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    batch = torch.stack([row["input_ids"] for row in rows[:4]])
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(batch).logits, model.eval()(batch).logits, atol=1e-5)


def test_memory_callback_logs_and_changes_nothing(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    rows = [{"input_ids": torch.arange(12) % 50 + i % 3, "labels": i % 2} for i in range(32)]
    weights, seen = [], []
    for every in (0, 2):
        torch.manual_seed(0)
        model = remnant.convert(transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)))
        callbacks = [remnant.hf.memory_callback(every, lambda found, step: seen.append((step, found)))] if every else []
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=4, report_to=[], save_strategy="no",
            disable_tqdm=True, use_cpu=True, seed=3)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert [step for step, _ in seen] == [1, 3, 5]
    assert all(0 < found["kept_bytes"] < found["peak_bytes"] for _, found in seen)
    logged = [line for line in trainer.state.log_history if "kept_bytes" in line]
    assert [line["step"] for line in logged] == [1, 3, 5]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    with pytest.raises(ValueError, match="at least 1, got 0"):
        remnant.hf.memory_callback(0)


def test_curve_policy_and_registered_policy():
    model, inputs = build("bert")
    exact = gradients(remnant.convert(model), inputs)[1]
    remnant.revert(model)
    remnant.convert(model, remnant.Policy(attention="curve:m=2"))
    biased = gradients(model, inputs)[1]
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.allclose(biased[name], exact[name], rtol=1e-3)
    assert torch.allclose(biased["encoder.layer.1.output.dense.weight"], exact["encoder.layer.1.output.dense.weight"],
                          rtol=1e-3, atol=1e-5)
    assert "curve:m=2" in str(remnant.conversion(model))


def test_what_attention_does_not_have_is_refused():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="'softcap'"):
        remnant.hf.attention_forward(torch.nn.Identity(), q, q, q, None, softcap=30.0)
    with pytest.raises(ValueError, match="did you mean"):
        remnant.hf.register("unbiased:bit=4")


def test_generation_with_a_cache_is_eager_s():
    model, inputs = build("llama")
    model.eval()
    model.set_attn_implementation("eager")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(inputs["input_ids"][:1], **options)
    remnant.convert(model)
    assert torch.equal(model.generate(inputs["input_ids"][:1], **options), wanted)


def test_converted_layers_are_still_what_transformers_knows(tmp_path):
    from transformers.activations import NewGELUActivation
    from transformers.pytorch_utils import Conv1D

    model, inputs = build("gpt2")
    before = str(model)
    remnant.convert(model, "unbiased:bits=4")
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, Conv1D) and isinstance(model.transformer.h[0].mlp.act, NewGELUActivation)
    assert type(layer) is type(model.transformer.h[1].attn.c_attn)
    assert repr(layer) == "Conv1D(nf=96, nx=32, memory=unbiased:bits=4)"
    with torch.no_grad():
        layer.bias.fill_(5.0)
    model._init_weights(layer)
    assert not layer.bias.any()
    wanted = output(model.eval(), inputs)
    torch.save(model, tmp_path / "model.pt")
    program = ("import sys, torch, remnant; path = sys.argv[1]; "
               "torch.save(remnant.revert(torch.load(path, weights_only=False)), path)")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(output(other, inputs), wanted) and str(other) == str(model)
        assert str(remnant.revert(other)) == before
    subprocess.run([sys.executable, "-c", program, tmp_path / "model.pt"], check=True,
                   env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(other.transformer.h[0].attn.c_attn) is Conv1D
    assert torch.allclose(output(other, inputs), wanted, atol=1e-5)


def test_revert_of_a_parametrized_layer_of_transformers():
    from transformers.pytorch_utils import Conv1D

    model, inputs = build("gpt2")
    remnant.convert(model)
    layer = model.transformer.h[0].attn.c_attn
    torch.nn.utils.parametrizations.weight_norm(layer)
    wanted = gradients(model, inputs)
    remnant.revert(model)
    found = gradients(model, inputs)
    assert isinstance(layer, Conv1D) and not isinstance(layer, remnant.nn.Converted)
    assert torch.allclose(found[0], wanted[0], atol=1e-5)
    close(found[1], wanted[1])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=8"])
def test_t5_in_half_precision_with_one_layer_that_is_not(kind, memory):
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0)).to(kind)
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    ids = torch.randint(5, 100, (2, 10))

    def run():
        model.zero_grad()
        result = model(input_ids=ids, labels=ids, decoder_input_ids=ids)
        result.loss.backward()
        return result.logits, {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}

    y, wanted = run()
    remnant.convert(model, memory)
    z, found = run()
    assert z.dtype == y.dtype and torch.allclose(z, y, atol=0.05)
    assert found.keys() == wanted.keys()
    for name, g in wanted.items():
        assert (found[name] - g).norm() <= 0.1 * (1e-2 + g.norm()), name


def test_norms_and_linear_layers_of_other_types_do_as_transformers():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.pytorch_utils import Conv1D

    norm, x = LlamaRMSNorm(8), torch.randn(2, 8).bfloat16()
    wanted = norm(x)
    found = remnant.convert(norm)(x)
    assert found.dtype == wanted.dtype == torch.float32 and torch.equal(found, wanted)
    layer = remnant.convert(Conv1D(4, 8), "unbiased:bits=4")
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(2, 8).double())


def test_convert_changes_nothing_where_transformers_is_too_old(monkeypatch):
    model, _ = build("bert")
    before = str(model)
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    with pytest.raises(ImportError, match="needs transformers with its attention interface"):
        remnant.convert(model)
    assert str(model) == before


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=8"])
def test_attentions_are_eager_s_with_their_gradient(name, memory):
    model, inputs = build(name)
    model.set_attn_implementation("eager")
    rows = inputs["attention_mask"].bool()[:, None, :, None]  # of places that are no padding

    def run():
        model.zero_grad()
        found = model(**inputs, output_attentions=True).attentions
        assert len(found) == 2
        sum((w * rows).square().sum() for w in found).backward()
        return found, {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    weights, wanted = run()
    remnant.convert(model, memory, overrides={"*.1.*": "eager"})
    others, found = run()
    for a, b in zip(others, weights, strict=True):
        assert torch.allclose(a * rows, b * rows, atol=1e-5)
    close(found, wanted, 2e-4 if memory == "exact" else 0.1)
    assert not getattr(model(**inputs), "attentions", None)


@pytest.mark.parametrize("by", ["callbacks", "trainer"])
def test_memory_callback_reaches_other_callbacks(tmp_path, by):
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    class Seen(transformers.TrainerCallback):
        def __init__(self):
            self.lines = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.lines.append({**logs, "step": state.global_step})

    rows = [{"input_ids": torch.arange(12) % 50 + i % 3, "labels": i % 2} for i in range(32)]
    model = remnant.convert(transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, logging_steps=1)
    before, after = Seen(), Seen()
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[before])
    named = {"log": lambda numbers, step: trainer.log(numbers)} if by == "trainer" else {}
    trainer.add_callback(remnant.hf.memory_callback(2, **named))
    trainer.add_callback(after)
    trainer.train()
    for seen in [after, before] if by == "trainer" else [after]:
        assert [line["step"] for line in seen.lines if "kept_bytes" in line] == [1, 3]
        assert [line["step"] for line in seen.lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in trainer.state.log_history if "kept_bytes" in line] == [1, 3]
    assert all(0 < line["kept_bytes"] < line["peak_bytes"] for line in after.lines if "kept_bytes" in line)
