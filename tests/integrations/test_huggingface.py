import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import make_model, make_tokenizer
from steps import BETA, FORGET, FORGET_COEF, GAMMA, RETAIN, RETAIN_COEF, gradients, make_rows, row_logps, step_loss
from transformers import TrainerCallback, TrainingArguments

from simnpo import NPO, SimNPO
from simnpo.integrations.forget_retain import ForgetRetainCollator, ForgetRetainDataset
from simnpo.integrations.huggingface import UnlearnTrainer
from simnpo.objectives import DPO, TNPO, WGA

COEFS = {"forget_coef": FORGET_COEF, "retain_coef": RETAIN_COEF}
# forget rows of each step, by rows of the set and micro-batches in a step
STEP_SIZES = {
    (9, 1): [2, 2, 2, 2, 1], (9, 2): [4, 4, 1], (9, 3): [6, 3],
    (11, 1): [2, 2, 2, 2, 2, 1], (11, 2): [4, 4, 3], (11, 3): [6, 5],
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate and transformers keep the precision of the last trainer in the process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def make_arguments(folder: Path, **changes: object) -> TrainingArguments:
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "logging_steps": 1, "report_to": "none"}
    options |= {
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(folder), **options | changes)


def make_trainer(folder: Path, model: torch.nn.Module | None = None, **options: object) -> UnlearnTrainer:
    names = ("objective", "forget_coef", "retain_coef", "eval_dataset", "callbacks", "peft_config", "compute_metrics")
    given = {name: options.pop(name) for name in names if name in options}
    data = {"train_dataset": ForgetRetainDataset(FORGET, RETAIN, seed=3)}
    data |= {name: options.pop(name) for name in ("train_dataset", "data_collator", "model_init") if name in options}
    model = make_model() if model is None and "model_init" not in data else model
    return UnlearnTrainer(model, make_arguments(folder, **options), **data, **given)


class Recorder(TrainerCallback):
    """The gradients of every optimizer step, before it is taken."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class Seen(ForgetRetainCollator):
    """A collator that writes down the rows of every batch it made."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[list, list]] = []

    def __call__(self, rows):
        self.batches.append(([r["forget"] for r in rows], [r["retain"] for r in rows if "retain" in r]))
        return super().__call__(rows)


def steps_of(batches: list[tuple[list, list]], accumulation: int) -> list[tuple[list, list]]:
    groups = [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]
    return [([row for f, _ in group for row in f], [row for _, r in group for row in r]) for group in groups]


# The step


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [9, 11])
@pytest.mark.parametrize("retain", [RETAIN, None], ids=["retain", "forget only"])
def test_a_step_is_one_big_batch(tmp_path, accumulation, num_rows, retain):
    """Ragged rows in micro-batches of 2, so that the last micro-batch is short, and with 5 of them the last step."""
    model, recorder, seen = make_model(), Recorder(), Seen()
    trainer = make_trainer(
        tmp_path, model, objective=SimNPO(BETA, GAMMA), callbacks=[recorder], learning_rate=0.0,
        gradient_accumulation_steps=accumulation, train_dataset=ForgetRetainDataset(FORGET[:num_rows], retain),
        # transformers 4.51 would leave the short step of the last epoch out
        max_steps=len(STEP_SIZES[num_rows, accumulation]), **COEFS,
    )  # fmt: skip
    trainer.data_collator = seen
    trainer.train()
    steps = steps_of(seen.batches, accumulation)
    assert len(recorder.steps) == len(steps)
    assert [len(forget) for forget, _ in steps] == STEP_SIZES[num_rows, accumulation]
    logs = [row for row in trainer.state.log_history if "loss" in row]
    plain = make_model()
    for (forget, some_retain), found, log in zip(steps, recorder.steps, logs, strict=True):
        expected = step_loss(plain, forget, some_retain)
        for name, value in expected.items():
            # transformers 4.51 rounds the loss it logs
            assert log[name] == pytest.approx(value.item(), rel=1e-5, abs=6e-5 if name == "loss" else 1e-6), name
        for name, gradient in gradients(expected["loss"], plain).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_logged_losses_are_means_over_the_steps_since_the_last_log(tmp_path):
    trainer = make_trainer(
        tmp_path, learning_rate=0.0, gradient_accumulation_steps=2, logging_steps=2, num_train_epochs=2
    )
    trainer.train()
    for log in (row for row in trainer.state.log_history if "loss" in row):
        assert log["loss"] == pytest.approx(log["forget_loss"] + log["retain_loss"], rel=1e-4)


@pytest.mark.parametrize("nested", [True, False])
def test_batches_of_any_dataset(tmp_path, nested):
    """Sub-batches as other frameworks make them, of different lengths, give the step of a ForgetRetainDataset."""
    data = ForgetRetainDataset(FORGET, RETAIN, seed=3)
    pairs = [data[i] for i in range(len(data))]

    def collate(rows):
        pad = ForgetRetainCollator()
        if not nested:
            return pad(rows)
        sides = {side: dict(pad([row[side] for row in rows])) for side in ("forget", "retain")}
        assert sides["forget"]["input_ids"].shape != sides["retain"]["input_ids"].shape or len(rows) == 1
        return sides

    ours = make_trainer(tmp_path, objective=SimNPO(BETA, GAMMA))
    ours.train()
    theirs = make_trainer(tmp_path, train_dataset=pairs, data_collator=collate, objective=SimNPO(BETA, GAMMA))
    theirs.train()
    for (name, ours_p), theirs_p in zip(ours.model.named_parameters(), theirs.model.parameters()):
        torch.testing.assert_close(ours_p, theirs_p, rtol=1e-4, atol=1e-6, msg=name)


def test_a_users_collator_pads(tmp_path):
    """On the left, as some tokenizers do; a rotary model does not mind where a row begins."""
    from transformers import DataCollatorForSeq2Seq

    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    seen = []

    class Left(DataCollatorForSeq2Seq):
        def __call__(self, features, return_tensors=None):
            batch = super().__call__([dict(row) for row in features], return_tensors)
            seen.append(batch["attention_mask"])
            return batch

    ours = make_trainer(tmp_path, objective=SimNPO(BETA, GAMMA))
    ours.train()
    theirs = make_trainer(tmp_path, objective=SimNPO(BETA, GAMMA), data_collator=Left(tokenizer))
    theirs.train()
    assert any((mask[:, 0] == 0).any() for mask in seen)
    for ours_p, theirs_p in zip(ours.model.parameters(), theirs.model.parameters()):
        torch.testing.assert_close(ours_p, theirs_p, rtol=1e-3, atol=1e-5)


def test_an_objective_of_tokens(tmp_path):
    """Its mean over the sequences of the step does not depend on the micro-batches either."""
    found = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        trainer = make_trainer(
            tmp_path, objective=WGA(), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            train_dataset=ForgetRetainDataset(FORGET[:8], RETAIN), num_train_epochs=2,
        )  # fmt: skip
        trainer.train()
        found.append([p.detach() for p in trainer.model.parameters()])
    for ours, again, more in zip(*found):
        torch.testing.assert_close(again, ours, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(more, ours, rtol=1e-4, atol=1e-6)


def test_a_micro_batch_without_targets_is_a_step_without_effect_of_it(tmp_path):
    """Its sequence still counts in the mean, with loss and gradient 0."""
    blank = {"input_ids": FORGET[0]["input_ids"], "labels": [-100] * len(FORGET[0]["input_ids"])}
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, train_dataset=ForgetRetainDataset([blank, FORGET[1]], None), per_device_train_batch_size=1,
        gradient_accumulation_steps=2, objective=SimNPO(BETA, GAMMA), callbacks=[recorder], learning_rate=0.0, **COEFS,
    )  # fmt: skip
    trainer.train()
    plain = make_model()
    loss = step_loss(plain, [FORGET[1]], [])["loss"] / 2
    for name, gradient in gradients(loss, plain).items():
        torch.testing.assert_close(recorder.steps[0][name], gradient, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast(tmp_path):
    losses = {}
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, bf16=bf16, learning_rate=0.0, objective=SimNPO(BETA, GAMMA))
        trainer.train()
        losses[bf16] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)
    assert losses[True] != losses[False]


def test_tokens_and_flops_are_counted(tmp_path):
    seen = Seen()
    trainer = make_trainer(tmp_path, include_num_input_tokens_seen=True)
    trainer.data_collator = seen
    trainer.train()
    width = [max(len(row["input_ids"]) for row in [*f, *r]) * len([*f, *r]) for f, r in seen.batches]
    assert trainer.state.num_input_tokens_seen == sum(width)
    assert trainer.state.total_flos > 0


# The retain draws, and resuming


def test_retain_rows_change_with_the_epoch(tmp_path):
    seen = Seen()
    trainer = make_trainer(tmp_path, num_train_epochs=3, learning_rate=0.0)
    trainer.data_collator = seen
    trainer.train()
    drawn = [[row["input_ids"] for _, retain in seen.batches[i : i + 6] for row in retain] for i in (0, 6, 12)]
    assert all(len(epoch) == 11 for epoch in drawn)
    assert sorted(drawn[0]) != sorted(drawn[1]) != sorted(drawn[2])
    # 33 draws from 8 rows: four turns of all of them, and one row more
    counts = [sum(row["input_ids"] in [r] for epoch in drawn for r in epoch) for row in RETAIN]
    assert sorted(counts) == [4] * 7 + [5]


@pytest.mark.parametrize("objective", [SimNPO(BETA, GAMMA), NPO(0.3)], ids=["simnpo", "npo"])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, objective):
    options = {"num_train_epochs": 3, "gradient_accumulation_steps": 2, "objective": objective}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    # the checkpoint is in the middle of the second epoch
    first = make_trainer(tmp_path / "cut", **options, save_strategy="steps", save_steps=5)

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    first.add_callback(Stop())
    first.train()
    assert first.state.global_step == 5 < whole.state.global_step
    second = make_trainer(tmp_path / "cut", **options)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == whole.state.global_step
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters()):
        assert torch.equal(a, b), name
    assert [r["loss"] for r in second.state.log_history if "loss" in r] == [
        r["loss"] for r in whole.state.log_history if "loss" in r
    ]


# The reference


def test_npo_measures_its_reference_once_before_the_first_step(tmp_path):
    forwards = []
    model = make_model()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: forwards.append(bool(kwargs.get("token_logps"))), with_kwargs=True
    )
    recorder, seen = Recorder(), Seen()
    trainer = make_trainer(
        tmp_path, model, objective=NPO(0.3), num_train_epochs=2, callbacks=[recorder],
        per_device_eval_batch_size=4, **COEFS,
    )  # fmt: skip
    trainer.data_collator = seen
    forwards.clear()
    trainer.train()
    # 11 sequences in batches of 4, then two epochs of 6 steps, of which none runs a reference
    assert forwards == [True] * 3 + [False] * 12
    plain = make_model()
    saved = json.loads((tmp_path / "reference.json").read_text())
    expected = [row_logps(plain, row).sum().item() for row in FORGET]
    assert sorted(saved.values()) == pytest.approx(sorted(expected), rel=1e-5)
    # at the start the policy is its reference, and the loss 2 log(2) / beta whatever the rows
    log = trainer.state.log_history[0]
    assert log["forget_loss"] == pytest.approx(2 * torch.tensor(2.0).log().item() / 0.3, rel=1e-5)
    forget, retain = seen.batches[3]
    refs = [row_logps(plain, row).sum().detach() for row in forget]
    loss = step_loss(plain, forget, retain, NPO(0.3), refs)["loss"]
    for name, gradient in gradients(loss, plain).items():
        torch.testing.assert_close(recorder.steps[0][name], gradient, rtol=1e-4, atol=1e-5)


def test_what_a_dataset_draws_does_not_depend_on_the_reference(tmp_path):
    """A dataset that draws its retain rows from torch's generator, as others do."""

    class Drawing(torch.utils.data.Dataset):
        def __len__(self):
            return len(FORGET)

        def __getitem__(self, index):
            return {"forget": FORGET[index], "retain": RETAIN[int(torch.randint(0, len(RETAIN), ()))]}

    drawn = []
    for objective in (SimNPO(), NPO()):
        seen = Seen()
        make_trainer(
            tmp_path, train_dataset=Drawing(), data_collator=seen, objective=objective, per_device_eval_batch_size=11
        ).train()
        drawn.append(seen.batches[1:] if objective.needs_ref_logps else seen.batches)
    assert drawn[0] == drawn[1]


def test_a_resumed_run_whose_reference_is_gone(tmp_path):
    trainer = make_trainer(tmp_path, objective=NPO(), save_strategy="steps", save_steps=2)
    trainer.train()
    (tmp_path / "reference.json").unlink()
    with pytest.raises(ValueError, match=r"NPO needs the log-probabilities of the model.*reference\.json is gone"):
        make_trainer(tmp_path, objective=NPO()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_resumed_run_with_other_data(tmp_path):
    make_trainer(tmp_path, objective=NPO(), save_strategy="steps", save_steps=2).train()
    data = ForgetRetainDataset(make_rows([3] * 11, seed=9), RETAIN)
    with pytest.raises(ValueError, match="were not in the data when the reference was measured over 11 sequences"):
        make_trainer(tmp_path, objective=NPO(), train_dataset=data).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


# Evaluation


@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_evaluation_is_over_sequences_and_tokens_however_batched(tmp_path, batch_size):
    trainer = make_trainer(
        tmp_path, objective=SimNPO(BETA, GAMMA), per_device_eval_batch_size=batch_size, **COEFS,
        eval_dataset={"retain": RETAIN, "both": ForgetRetainDataset(FORGET, RETAIN, seed=3)},
    )  # fmt: skip
    found = trainer.evaluate()
    plain = make_model()
    retained = [row_logps(plain, row) for row in RETAIN]
    assert found["eval_retain_loss"] == pytest.approx(-torch.cat(retained).mean().item(), rel=1e-5)
    probability = torch.stack([logps.mean().exp() for logps in retained]).mean().item()
    assert found["eval_retain_probability"] == pytest.approx(probability, rel=1e-4)
    pairs = [trainer.eval_dataset["both"][i] for i in range(len(FORGET))]
    expected = step_loss(plain, FORGET, [pair["retain"] for pair in pairs])
    assert found["eval_both_loss"] == pytest.approx(expected["loss"].item(), rel=1e-5)
    assert found["eval_both_retain_nll"] == pytest.approx(expected["retain_loss"].item(), rel=1e-5)
    forgot = -torch.cat([row_logps(plain, row) for row in FORGET]).mean().item()
    assert found["eval_both_forget_nll"] == pytest.approx(forgot, rel=1e-5)


def test_evaluation_while_training_and_metrics_of_the_user(tmp_path):
    trainer = make_trainer(
        tmp_path, eval_dataset=RETAIN, eval_strategy="epoch", num_train_epochs=2, save_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model="longest", greater_is_better=True,
        compute_metrics=lambda p: {"longest": float(p.label_ids.max()), "worst": float(p.predictions.min())},
    )  # fmt: skip
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["eval_longest"] for row in rows] == [22.0, 22.0]
    assert rows[0]["eval_loss"] != rows[1]["eval_loss"]
    found = trainer.predict(RETAIN)
    assert found.predictions.shape == (8,)
    assert found.metrics["test_worst"] == found.predictions.min()


# What is refused


def test_a_training_batch_without_sides(tmp_path):
    with pytest.raises(
        ValueError, match=r"got \['attention_mask', 'input_ids', 'labels'\]: pass a ForgetRetainDataset"
    ):
        make_trainer(tmp_path, train_dataset=FORGET).train()


def test_compute_loss_func(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func is given logits, which are never made"):
        UnlearnTrainer(make_model(), make_arguments(tmp_path), compute_loss_func=lambda *args: None)


@pytest.mark.parametrize(
    ("objective", "needs"), [(DPO(), "alternate answers"), (TNPO(), "a reference per token")], ids=["dpo", "tnpo"]
)
def test_objectives_that_need_more_than_sequences(tmp_path, objective, needs):
    with pytest.raises(ValueError, match=f"{type(objective).__name__} needs {needs}, which UnlearnTrainer does not"):
        make_trainer(tmp_path, objective=objective)


def test_label_smoothing(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor must be 0, got 0\.1"):
        make_trainer(tmp_path, label_smoothing_factor=0.1)


def test_a_subclass_that_counts_tokens_its_own_way(tmp_path):
    class Counting(UnlearnTrainer):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            return [next(epoch_iterator)], torch.tensor(17)

    trainer = Counting(make_model(), make_arguments(tmp_path), train_dataset=ForgetRetainDataset(FORGET, RETAIN))
    with pytest.raises(ValueError, match=r"num_items_in_batch must be the StepTotals .* got tensor\(17\)"):
        trainer.train()


def test_a_forward_that_was_replaced(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.forward = lambda **kwargs: make_model()(input_ids=kwargs["input_ids"])
    with pytest.raises(RuntimeError, match=r"replaced model\.forward since simnpo.attach"):
        trainer.train()


def test_data_parallel(tmp_path, monkeypatch):
    arguments = make_arguments(tmp_path)
    monkeypatch.setattr(type(arguments), "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="one process sees 2 GPUs"):
        UnlearnTrainer(make_model(), arguments, train_dataset=ForgetRetainDataset(FORGET, RETAIN))


def test_labels_that_are_shifted_already(tmp_path):
    rows = [{"input_ids": row["input_ids"], "labels": [*row["labels"][1:], -100]} for row in FORGET]
    with pytest.raises(ValueError, match="labels look shifted already"):
        make_trainer(tmp_path, train_dataset=ForgetRetainDataset(rows, RETAIN)).train()


def test_model_init(tmp_path):
    trainer = make_trainer(tmp_path, model_init=lambda: make_model())
    trainer.train()
    assert trainer.state.log_history[0]["forget_loss"] > 0
    with pytest.raises(ValueError, match="peft_config needs a model"):
        make_trainer(tmp_path, model_init=lambda: make_model(), peft_config=object())


def test_the_saved_model_is_a_plain_one(tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name))
