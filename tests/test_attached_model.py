"""Every family's own logits and the written-out formula against the loss that has no logits."""

import copy
import functools
import io
import pickle

import accelerate
import pytest
import torch
import transformers
from conftest import make_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from simnpo import NPO, SimNPO, attach
from simnpo.attached_model import AttachedHead, AttachedModel
from simnpo.errors import UserError

SIZES = {"vocab_size": 263, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"router_aux_loss_coef": 0.3, "output_router_logits": True, "experts_implementation": "eager"}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
NEOX = {"rotary_pct": 0.25, "tie_word_embeddings": False}
GPT2 = {"vocab_size": 263, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
GEMMA3_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA3_VISION |= {"image_size": 8, "patch_size": 4}

# family -> (configuration's model type, its values)
FAMILIES = {
    "llama": ("llama", SIZES),
    "llama tied": ("llama", SIZES | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", SIZES | {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", SIZES | GROUPED),
    "gemma2": ("gemma2", SIZES | GROUPED | {"final_logit_softcapping": 3.0}),
    "gemma3 text": ("gemma3_text", SIZES | GROUPED | {"final_logit_softcapping": 2.0}),
    "mistral": ("mistral", SIZES | {"num_key_value_heads": 2}),
    "phi": ("phi", SIZES),
    "phi3": ("phi3", SIZES),
    "gpt-neox": ("gpt_neox", SIZES | NEOX),
    "gpt2": ("gpt2", GPT2),
    "cohere": ("cohere", SIZES | {"logit_scale": 0.25}),
    "granite": ("granite", SIZES | {"logits_scaling": 8.0}),
    "mixtral": ("mixtral", SIZES | EXPERTS | {"num_key_value_heads": 2, "num_local_experts": 3}),
    "qwen3 moe": (
        "qwen3_moe",
        SIZES | EXPERTS | GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}


def make(family: str) -> nn.Module:
    kind, values = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return model


def make_batch() -> dict[str, Tensor]:
    """Two forget and two retain sequences: ragged, padded on the right, one with a single token that counts."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 263, (4, 11), generator=generator)
    labels, attention_mask = input_ids.clone(), torch.ones_like(input_ids)
    for row, (prompt, length) in enumerate([(3, 11), (6, 7), (2, 9), (4, 10)]):
        labels[row, :prompt] = -100
        labels[row, length:] = -100
        attention_mask[row, length:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


RETAIN = torch.tensor([False, False, True, True])


def plain_loss(model, batch: dict[str, Tensor], beta: float, gamma: float, retain_coef: float) -> Tensor:
    """The definition: logits, log_softmax, gather, the paper's equation 4, token mean of the retain NLL."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    output = model(**inputs)
    logps = output.logits[:, :-1].log_softmax(-1)
    targets = batch["labels"][:, 1:]
    counted = targets != -100
    logps = logps.gather(-1, targets.where(counted, 0).unsqueeze(-1)).squeeze(-1) * counted
    forget, n = logps[~RETAIN].sum(-1), counted[~RETAIN].sum(-1)
    loss = -2 / beta * F.logsigmoid(-beta / n * forget - gamma).mean()
    loss = loss - retain_coef * logps[RETAIN].sum() / counted[RETAIN].sum()
    if getattr(output, "aux_loss", None) is not None:
        loss = loss + 0.3 * output.aux_loss
    return loss


def value_and_grad(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {"loss": loss.detach()} | {n: g for n, g in zip(parameters, gradients) if g is not None}


def assert_equal(ours: dict[str, Tensor], exact: dict[str, Tensor], rtol: float = 1e-6) -> None:
    assert ours.keys() == exact.keys()
    for name in exact:
        scale = exact[name].abs().max().item()
        torch.testing.assert_close(
            ours[name], exact[name], rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n} {m}"
        )


def attached_loss(model, batch: dict[str, Tensor], **options) -> Tensor:
    objective = SimNPO(beta=1.7, gamma=0.4)
    return model(**batch, objective=objective, retain_mask=RETAIN, retain_coef=1.3, **options).loss


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_formula_on_the_models_own_logits(family):
    batch = make_batch()
    model = make(family)
    exact = value_and_grad(model, plain_loss(model, batch, 1.7, 0.4, 1.3))
    assert exact["loss"].isfinite()
    attach(model)
    assert_equal(value_and_grad(model, attached_loss(model, batch)), exact)
    # and it still is the model it was
    again = value_and_grad(model, plain_loss(model, batch, 1.7, 0.4, 1.3))
    assert torch.equal(again["loss"], exact["loss"])


def test_vision_language_model_by_its_text_configuration():
    config = transformers.Gemma3Config(text_config=SIZES | GROUPED, vision_config=GEMMA3_VISION, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).double().eval()
    batch = make_batch()
    exact = value_and_grad(model, plain_loss(model, batch, 1.7, 0.4, 1.3))
    assert_equal(value_and_grad(model, attached_loss(attach(model), batch)), exact)


def test_padded_vocabulary():
    model = make("llama")
    model.resize_token_embeddings(263, pad_to_multiple_of=64)
    batch = make_batch()
    exact = value_and_grad(model, plain_loss(model, batch, 1.7, 0.4, 1.3))
    assert model.get_output_embeddings().weight.shape[0] == 320
    assert_equal(value_and_grad(model, attached_loss(attach(model), batch)), exact)


def test_token_logps_for_any_loss_on_top():
    model, batch = make("gemma2"), make_batch()
    logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    exact = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1).where(targets != -100, 0)
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = value_and_grad(model, (exact.square() * weights).sum())
    ours = attach(model)(**batch, token_logps=True)
    assert ours.shape == (4, 11)
    assert (ours[:, -1] == 0).all()
    assert_equal(value_and_grad(model, (ours[:, :-1].square() * weights).sum()), expected)


def packed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = batch["attention_mask"].bool()
    lengths = kept.sum(-1)
    return {
        "input_ids": batch["input_ids"][kept][None],
        "labels": batch["labels"][kept][None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
    }


def test_packed_equals_padded():
    model, batch = attach(make("llama")), make_batch()
    padded = value_and_grad(model, attached_loss(model, batch))
    assert_equal(value_and_grad(model, attached_loss(model, packed(batch))), padded)
    # labels may count every token: the first of a sequence is no target of the one before it
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    logps = model(**packed(batch), token_logps=True)
    assert logps.shape == (1, 37)
    assert (logps[0, packed(batch)["cu_seqlens"][1:].long() - 1] == 0).all()
    assert logps.sum().item() == pytest.approx(model(**batch, token_logps=True).sum().item())


def test_micro_batches_add_up_with_the_totals_of_the_step():
    model, batch = attach(make("qwen2")), make_batch()
    whole = value_and_grad(model, attached_loss(model, batch))
    num_retain_tokens = int((batch["labels"][RETAIN][:, 1:] != -100).sum())
    losses = []
    for rows in ([0, 2], [1, 3]):
        part = {name: tensor[rows] for name, tensor in batch.items()}
        options = {"num_forget": 2, "num_retain_tokens": num_retain_tokens, "retain_mask": RETAIN[rows]}
        losses.append(model(**part, objective=SimNPO(1.7, 0.4), retain_coef=1.3, **options).loss)
    assert_equal(value_and_grad(model, sum(losses)), whole)


def test_reference_log_probabilities_may_be_a_list():
    model, batch = attach(make("llama")), make_batch()
    with torch.no_grad():
        ref_logps = model(**batch, objective=SimNPO()).logps
    for given in (ref_logps, ref_logps.tolist()):
        out = model(**batch, objective=NPO(), ref_logps=given)
        torch.testing.assert_close(out.weights, torch.ones(4, dtype=out.weights.dtype))  # the policy is the reference


# What it survives


def test_copies_have_weights_of_their_own():
    model, batch = attach(make("llama tied")), make_batch()
    before = attached_loss(model, batch)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert not torch.allclose(attached_loss(model, batch), before)
    for other in copies:
        assert type(other) is type(model)
        assert torch.equal(attached_loss(other, batch), before)
        assert other.lm_head.weight is other.model.embed_tokens.weight


def test_saves_and_loads_as_the_class_it_was(tmp_path):
    model, batch = attach(make("qwen3")), make_batch()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager"
    )
    assert type(again) is transformers.Qwen3ForCausalLM
    assert isinstance(model, transformers.Qwen3ForCausalLM)
    assert torch.equal(attached_loss(attach(again.eval()), batch), attached_loss(model, batch))


def test_generates_what_it_generated_before():
    model = make("llama")
    prompt = {"input_ids": make_batch()["input_ids"][:, :5], "max_new_tokens": 8, "do_sample": False}
    before = model.generate(**prompt)
    assert torch.equal(attach(model).generate(**prompt), before)


def test_attaching_twice_is_attaching_once():
    model = attach(make("llama"))
    kind = type(model)
    assert type(attach(model)) is kind
    assert isinstance(model.lm_head, AttachedHead)
    assert type(attach(make("llama"))) is kind


def test_gradient_checkpointing():
    model, batch = attach(make("llama")).train(), make_batch()
    whole = value_and_grad(model, attached_loss(model, batch))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(value_and_grad(model, attached_loss(model, batch)), whole)


@pytest.mark.slow
def test_compiled_body():
    model, batch = attach(make("llama")), make_batch()
    whole = value_and_grad(model, attached_loss(model, batch))
    model.model.compile(backend="aot_eager")
    assert_equal(value_and_grad(model, attached_loss(model, batch)), whole)
    model = attach(make("llama"))
    loss = torch.compile(model, backend="aot_eager")(
        **batch, objective=SimNPO(1.7, 0.4), retain_mask=RETAIN, retain_coef=1.3
    ).loss
    assert_equal(value_and_grad(model, loss), whole)


def test_head_that_is_replaced_later():
    model, batch = attach(make("llama")), make_batch()
    model.resize_token_embeddings(270)
    exact = value_and_grad(model, plain_loss(model, batch, 1.7, 0.4, 1.3))
    assert_equal(value_and_grad(model, attached_loss(model, batch)), exact)


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_lora(attach_first, modules_to_save):
    model, batch = make("llama"), make_batch()
    if attach_first:
        attach(model)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=modules_to_save)
    lora = get_peft_model(model, config).double()
    for name, parameter in lora.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(parameter)
    exact = value_and_grad(lora, plain_loss(lora, batch, 1.7, 0.4, 1.3))
    assert any("lm_head" in name for name in exact) == bool(modules_to_save)
    if not attach_first:
        attach(lora)
    assert_equal(value_and_grad(lora, attached_loss(lora, batch)), exact)
    with lora.disable_adapter():
        base = attached_loss(lora, batch)
    assert torch.equal(base, attached_loss(attach(make("llama")), batch))


def test_experts_are_balanced_once_a_step():
    """The load-balancing losses of micro-batches add up to one, not to one each."""
    model, batch = attach(make("mixtral")), make_batch()
    total = expected = torch.zeros((), dtype=torch.float64)
    for rows in (torch.tensor([0, 2]), torch.tensor([1, 3])):
        some = {name: tensor[rows] for name, tensor in batch.items()}
        options = {"objective": SimNPO(), "retain_mask": RETAIN[rows], "num_forget": 2, "num_retain_tokens": 9}
        total = total + model(**some, **options).loss - model(**some, **options, output_router_logits=False).loss
        expected = expected + 0.3 * model(**some).aux_loss / 2
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)


def test_a_model_spread_over_devices():
    """Accelerate's hooks keep the forward they found; here the weights stay away and come when they are used."""
    expected = attach(make("llama"))(**make_batch(), objective=SimNPO(), retain_mask=RETAIN)
    model = accelerate.cpu_offload(make("llama"), execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    out = attach(model, verify=False)(**make_batch(), objective=SimNPO(), retain_mask=RETAIN)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(model(**make_batch()).loss, make("llama")(**make_batch()).loss)


# What it refuses


def test_a_forward_replaced_on_the_object():
    model = make("llama")
    model.forward = functools.partial(model.forward)
    with pytest.raises(UserError, match=r"forward of this LlamaForCausalLM has been replaced.*simnpo\.attach before"):
        attach(model)


def test_loss_arguments_without_a_loss():
    with pytest.raises(ValueError, match="retain_mask belong to a loss: pass objective or token_logps=True as well"):
        attach(make("llama"))(**make_batch(), retain_mask=RETAIN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_logps": True}, "two different results"),
        ({"num_items_in_batch": 7}, "num_items_in_batch has no meaning.*pass num_forget and num_retain_tokens"),
        ({"logits_to_keep": 1}, "logits_to_keep has no meaning"),
        ({"past_key_values": object()}, "past_key_values has no meaning"),
        ({"labels": None}, "needs either labels"),
        ({"num_forget": 0}, "num_forget must be a positive integer"),
        ({"ref_logps": torch.zeros(4, dtype=torch.bfloat16)}, "ref_logps came in torch.bfloat16.*list of floats"),
        ({"cu_seqlens": torch.tensor([0, 5, 11])}, "cu_seqlens marks the sequences of one packed row"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        attach(make("llama"))(**make_batch() | {"objective": SimNPO()} | options)


def test_labels_that_are_shifted_already():
    model, batch = attach(make("llama")), make_batch()
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    with pytest.raises(ValueError, match=r"labels look shifted already.*shift_labels"):
        model(**batch | {"labels": shifted}, objective=SimNPO())
    mixed = torch.cat([batch["labels"][:1], shifted[1:]])
    with pytest.raises(ValueError, match="labels look shifted already: in some rows"):
        model(**batch | {"labels": mixed}, objective=SimNPO())
    del batch["labels"]
    model(**batch, shift_labels=shifted, objective=SimNPO())


def test_body_without_hidden_states():
    model = attach(make("llama"))
    model.model.forward = lambda **kwargs: (torch.zeros(1),)
    with pytest.raises(UserError, match="LlamaModel returned a tuple without last_hidden_state"):
        model(**make_batch(), objective=SimNPO())


def test_adapter_on_the_head():
    lora = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UserError, match=r"the output head has an adapter.*take it out of target_modules"):
        attach(lora)
    # also one that came after
    model = attach(make("llama"))
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UserError, match="the output head has an adapter"):
        lora(**make_batch(), objective=SimNPO())


def test_prompt_learning():
    prompted = get_peft_model(make("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UserError, match=r"prepends virtual tokens.*use LoRA"):
        attach(prompted)


def test_models_that_are_something_else():
    with pytest.raises(UserError, match="a causal language model is needed"):
        attach(make_model().model)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(UserError, match="T5ForConditionalGeneration is an encoder-decoder"):
        attach(t5)


def test_unknown_factor_of_the_logits():
    model = make("llama")
    model.lm_head.register_forward_hook(lambda module, args, logits: 1.5 * logits)
    with pytest.raises(UserError, match="computes its logits in a way this package does not know"):
        attach(model)


def test_weights_that_are_not_there_yet():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with pytest.raises(UserError, match=r"meta device.*verify=False"):
        attach(model)
    assert isinstance(attach(model, verify=False), AttachedModel)


def test_the_class_of_an_objective_is_refused_before_the_model_runs():
    model = attach(make_model())
    with pytest.raises(TypeError, match=r"objective must be an instance: write SimNPO\(\)"):
        model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]]), objective=SimNPO)
