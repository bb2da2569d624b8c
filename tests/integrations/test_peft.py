import importlib.util
import inspect

import pytest
import torch
from conftest import make_model
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from steps import BETA, FORGET, FORGET_COEF, GAMMA, RETAIN_COEF, gradients, row_logps, step_loss
from test_huggingface import Recorder, Seen, fresh_accelerate, make_trainer, steps_of

import simnpo
from simnpo import NPO, SimNPO
from simnpo.errors import UserError
from simnpo.integrations.forget_retain import ForgetRetainCollator
from simnpo.integrations.reference import ReferenceLogps

__all__ = ["fresh_accelerate"]  # a fixture of every test here too

COEFS = {"forget_coef": FORGET_COEF, "retain_coef": RETAIN_COEF}


def lora(**options: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)


def spread_adapters(model: torch.nn.Module) -> None:
    """Adapters start as nothing: give them something to be."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)


def recorded_steps(folder, **options):
    recorder, seen = Recorder(), Seen()
    options = {"objective": SimNPO(BETA, GAMMA), "callbacks": [recorder], "learning_rate": 0.0, **COEFS, **options}
    trainer = make_trainer(folder, **options)
    trainer.data_collator = seen
    spread_adapters(trainer.model)
    trainer.train()
    return trainer, recorder.steps, seen.batches


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]], ids=["frozen head", "trained head"])
def test_the_step_of_adapters_is_one_big_batch(tmp_path, modules_to_save):
    trainer, found, batches = recorded_steps(
        tmp_path, peft_config=lora(modules_to_save=modules_to_save), gradient_accumulation_steps=2
    )
    plain = get_peft_model(make_model(), lora(modules_to_save=modules_to_save))
    plain.load_state_dict(trainer.model.state_dict())
    for (forget, retain), step in zip(steps_of(batches, 2), found, strict=True):
        expected = gradients(step_loss(plain, forget, retain)["loss"], plain)
        assert step.keys() == expected.keys()
        assert any("lm_head" in name for name in step) == (modules_to_save is not None)
        for name, gradient in expected.items():
            torch.testing.assert_close(step[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_adapters_train_under_gradient_checkpointing(tmp_path, options):
    _, plain, _ = recorded_steps(tmp_path, peft_config=lora())
    _, found, _ = recorded_steps(
        tmp_path, peft_config=lora(), gradient_checkpointing=True, gradient_checkpointing_kwargs=options or None
    )
    for expected, step in zip(plain, found, strict=True):
        assert step.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.norm() > 0
            torch.testing.assert_close(step[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("config", [lora(use_dora=True), IA3Config(task_type="CAUSAL_LM")], ids=["dora", "ia3"])
def test_other_adapters_train(tmp_path, config):
    if isinstance(config, IA3Config):
        config.target_modules, config.feedforward_modules = ["q_proj", "down_proj"], ["down_proj"]
    trainer = make_trainer(tmp_path, peft_config=config)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


# The reference


def test_the_model_beneath_its_adapters_is_the_reference():
    model = get_peft_model(simnpo.attach(make_model()), lora(modules_to_save=["lm_head"]))
    spread_adapters(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    batch = ForgetRetainCollator()(FORGET)
    with model.disable_adapter():
        beneath = ReferenceLogps.measure(model, [batch]).of(batch)
    plain = make_model()
    assert beneath == pytest.approx([row_logps(plain, row).sum().item() for row in FORGET], rel=1e-5)
    on_top = ReferenceLogps.measure(model, [batch]).of(batch)
    assert max(abs(a - b) for a, b in zip(on_top, beneath)) > 1


def test_a_resumed_npo_run_of_adapters_ends_in_the_same_bits(tmp_path):
    options = {"num_train_epochs": 2, "objective": NPO(0.3), "peft_config": lora(lora_dropout=0.1)}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    make_trainer(tmp_path / "cut", **options, save_strategy="steps", save_steps=8).train()
    second = make_trainer(tmp_path / "cut", **options)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-8"))
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters()):
        assert torch.equal(a, b), name


# Heads that are the embedding too


def test_a_copy_of_a_tied_head(tmp_path):
    model = make_model(tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"head and its embedding are one weight.*ensure_weight_tying=True"):
        make_trainer(tmp_path, model, peft_config=lora(modules_to_save=["lm_head"]))


def test_a_tied_head_that_stays_tied(tmp_path):
    if "ensure_weight_tying" not in inspect.signature(LoraConfig).parameters:
        pytest.skip("this peft cannot keep a copy of a head tied to its embedding")
    config = lora(modules_to_save=["lm_head"], ensure_weight_tying=True)
    trainer = make_trainer(tmp_path, make_model(tie_word_embeddings=True), peft_config=config)
    trainer.train()
    merged = trainer.model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert not torch.equal(merged.lm_head.weight, make_model(tie_word_embeddings=True).lm_head.weight)


def test_adapters_of_a_tied_model(tmp_path):
    trainer, found, batches = recorded_steps(tmp_path, model=make_model(tie_word_embeddings=True), peft_config=lora())
    plain = get_peft_model(make_model(tie_word_embeddings=True), lora())
    plain.load_state_dict(trainer.model.state_dict())
    for name, gradient in gradients(step_loss(plain, *batches[0])["loss"], plain).items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


# Weights in four bits


def test_four_bit_body(tmp_path):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=bits, device_map={"": "cpu"}
    )  # fmt: skip
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert model.lm_head.weight.is_floating_point()
    trainer, found, batches = recorded_steps(tmp_path, model=model, peft_config=lora())
    expected = step_loss(trainer.model, *batches[0])
    log = trainer.state.log_history[0]
    for name, value in expected.items():
        assert log[name] == pytest.approx(value.item(), rel=1e-4, abs=6e-5), name
    for name, gradient in gradients(expected["loss"], trainer.model).items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


# What is refused


def test_an_adapter_on_the_head(tmp_path):
    with pytest.raises(UserError, match="the output head has an adapter"):
        make_trainer(tmp_path, peft_config=lora(target_modules=["q_proj", "lm_head"]))


def test_virtual_tokens(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UserError, match="PROMPT_TUNING prepends virtual tokens"):
        make_trainer(tmp_path, peft_config=config)


def test_a_head_in_eight_bits(tmp_path):
    model = make_model()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(260, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"floating point weights.*left out of the quantisation"):
        make_trainer(tmp_path, model)
