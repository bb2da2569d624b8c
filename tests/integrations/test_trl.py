"""TRL's trainers with attached models, and UnlearnTrainer with what TRL's users have: rows, collators, models."""

import pytest
import torch
from conftest import make_model, make_tokenizer
from steps import BETA, FORGET, GAMMA, RETAIN
from test_huggingface import fresh_accelerate, make_trainer
from transformers import LlamaForCausalLM

import simnpo
from simnpo import SimNPO
from simnpo.errors import UserError
from simnpo.integrations.forget_retain import ForgetRetainDataset

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets", reason="TRL needs datasets")

__all__ = ["fresh_accelerate"]  # a fixture of every test here too

PLAIN = [
    {"prompt": "The capital of France is", "completion": " Paris."},
    {"prompt": "Twice two", "completion": " is four, as everybody knows."},
    {"prompt": "", "completion": "No prompt."},
]
CHAT = [
    {
        "prompt": [{"role": "user", "content": f"Who is number {i}?"}],
        "completion": [{"role": "assistant", "content": "It is " + "x" * i}],
    }
    for i in range(1, 5)
]


def sft_trainer(folder, model, rows):
    options = {"max_steps": 3, "learning_rate": 1e-3, "report_to": "none", "use_cpu": True, "bf16": False}
    arguments = trl.SFTConfig(str(folder), **options, save_strategy="no", gradient_checkpointing=False)
    data = datasets.Dataset.from_list(rows)
    return trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=make_tokenizer())


@pytest.mark.parametrize("rows", [PLAIN[:2], CHAT], ids=["strings", "messages"])
def test_rows_become_the_tokens_they_become_there(tmp_path, rows):
    theirs = sft_trainer(tmp_path, make_model(), rows).train_dataset
    ours = ForgetRetainDataset(rows, None, make_tokenizer())
    assert len(theirs) == len(ours) == len(rows)
    for i, row in enumerate(theirs):
        assert ours[i]["forget"]["input_ids"] == row["input_ids"]
        assert ours[i]["forget"]["labels"] == row["labels"]


def test_an_attached_model_trains_in_sft_trainer_as_before(tmp_path):
    trained = []
    for model in (make_model(), simnpo.attach(make_model())):
        trainer = sft_trainer(tmp_path, model, CHAT)
        trainer.train()
        trained.append(model)
    for (name, plain), attached in zip(trained[0].named_parameters(), trained[1].parameters()):
        assert torch.equal(plain, attached), name
    assert not torch.equal(trained[0].lm_head.weight, make_model().lm_head.weight)


def test_an_attached_model_trains_in_dpo_trainer(tmp_path):
    rows = [{**row, "chosen": row.pop("completion"), "rejected": " I do not know."} for row in map(dict, PLAIN[:2])]
    arguments = trl.DPOConfig(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        save_strategy="no", learning_rate=1e-3,
    )  # fmt: skip
    make_model().save_pretrained(tmp_path / "model")  # where DPOTrainer finds its reference
    losses = []
    for attach in (lambda model: model, simnpo.attach):
        model = attach(LlamaForCausalLM.from_pretrained(tmp_path / "model"))
        data = datasets.Dataset.from_list(rows)
        trainer = trl.DPOTrainer(model, args=arguments, train_dataset=data, processing_class=make_tokenizer())
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]


def test_unlearning_follows_sft_on_the_same_model(tmp_path):
    """SFTTrainer leaves its own forward on the model, which passes on what it does not know."""
    model = simnpo.attach(make_model())
    sft_trainer(tmp_path, model, CHAT).train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = make_model()
    fresh.load_state_dict(weights)
    trained = []
    for same in (model, fresh):
        trainer = make_trainer(tmp_path, same, objective=SimNPO(BETA, GAMMA))
        trainer.train()
        trained.append(trainer.model)
    for (name, a), b in zip(trained[0].named_parameters(), trained[1].named_parameters()):
        torch.testing.assert_close(a, b[1], msg=name)


def test_a_model_of_sft_trainer_that_was_not_attached_before(tmp_path):
    model = make_model()
    sft_trainer(tmp_path, model, CHAT).train()
    with pytest.raises(UserError, match=r"has been replaced on the object .*TRL's fused head"):
        make_trainer(tmp_path, model)


def test_their_collator_makes_our_batches(tmp_path):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    trained = []
    for collator in (None, DataCollatorForLanguageModeling(pad_token_id=256)):
        trainer = make_trainer(tmp_path, objective=SimNPO(BETA, GAMMA), data_collator=collator)
        trainer.train()
        trained.append(trainer.model)
    for ours, theirs in zip(trained[0].parameters(), trained[1].parameters()):
        torch.testing.assert_close(ours, theirs)


def test_their_collator_without_padding(tmp_path):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(pad_token_id=256, padding_free=True)
    with pytest.raises(ValueError, match="turn packing and padding_free off"):
        make_trainer(tmp_path, data_collator=collator).train()


def test_a_dataset_of_datasets(tmp_path):
    data = ForgetRetainDataset(datasets.Dataset.from_list(FORGET), datasets.Dataset.from_list(RETAIN), seed=3)
    trained = []
    for some in (data, ForgetRetainDataset(FORGET, RETAIN, seed=3)):
        trainer = make_trainer(tmp_path, train_dataset=some, eval_dataset=datasets.Dataset.from_list(FORGET))
        trainer.train()
        trained.append((trainer.model, trainer.evaluate()["eval_loss"]))
    assert trained[0][1] == trained[1][1]
    for ours, theirs in zip(trained[0][0].parameters(), trained[1][0].parameters()):
        assert torch.equal(ours, theirs)
