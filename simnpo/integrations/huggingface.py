"""Hugging Face's Trainer with an unlearning loss: the loop, the arguments, the checkpoints stay Hugging Face's.

    data = ForgetRetainDataset(forget, retain, tokenizer)
    UnlearnTrainer(model, args, train_dataset=data, objective=SimNPO()).train()

The forget term of an optimizer step is the mean over all its forget sequences and the retain term the mean over all its
retain tokens, of every micro-batch and rank. Both are counted before the step, where Trainer draws its micro-batches,
so neither `gradient_accumulation_steps` nor the number of ranks changes the loss or its gradient.
"""

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from simnpo.attached_model import AttachedModel, attach
from simnpo.data import IGNORE_INDEX
from simnpo.integrations.forget_retain import ForgetRetainCollator, ForgetRetainDataset, join
from simnpo.integrations.reference import ReferenceLogps
from simnpo.kernels.checks import check_objective
from simnpo.model import causal_lm
from simnpo.objectives import Objective, SequenceObjective, SimNPO

REFERENCE_FILE = "reference.json"


class StepTotals(NamedTuple):
    """What the two means of an optimizer step divide by, over its micro-batches and ranks."""

    num_forget: int
    num_retain_tokens: int


class UnlearnTrainer(Trainer):
    """A Trainer whose loss is an unlearning objective on forget rows plus the negative log-likelihood of retain rows.

    Every argument of `Trainer` means what it means there, but for `compute_loss_func`, which is refused. Differences:

        train_dataset: a `ForgetRetainDataset`, or any dataset whose batches are {"forget": {...}, "retain": {...}} with
            input_ids, attention_mask and labels in each.
        data_collator: for a `ForgetRetainDataset`, makes a padded batch of forget and retain rows; None pads on the
            right. For any other dataset it makes the whole batch.
        eval_dataset: rows of input_ids and labels give `loss` (nats a token) and `probability` (the mean over sequences
            of exp of the mean log-probability of a token); pairs of forget and retain rows give these two of each, and
            as `loss` the objective's, if it is one of whole sequences without a reference.
        compute_metrics: adds to those; `predictions` are log-probabilities of sequences, nats, and `label_ids` their
            numbers of tokens, (N,), or (N, 2) for pairs. There are no logits.

    Args:
        objective: of the forget sequences. If it needs the log-probabilities under the reference policy, they are
            measured once, on the model that the run starts with, and kept in `output_dir` for a resumed run.
        forget_coef, retain_coef: weights of the two terms. The paper's published lambda of TOFU is our forget_coef.
        gradient_error, chunk_tokens: see `simnpo.linear_unlearn_loss`.
        peft_config: wraps the model in an adapter of PEFT.

    Raises:
        ValueError: an argument that has no meaning here; says what to do instead.
        simnpo.errors.UserError: the model cannot be attached.
    """

    # says that compute_loss has seen to gradient accumulation; before transformers 5.19 the next two say so together:
    # self.model_accepts_loss_kwargs, and what get_batch_samples returns
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        objective: Objective | None = None,
        forget_coef: float = 1.0,
        retain_coef: float = 1.0,
        gradient_error: float = 0.0,
        chunk_tokens: int | None = None,
        peft_config: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func is given logits, which are never made here: pass objective, or call the model with "
                "token_logps=True in a Trainer of your own"
            )
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        _check_arguments(args)
        if model is not None:
            model = _attached(model, peft_config)
        elif peft_config is not None:
            raise ValueError("peft_config needs a model: with model_init, wrap the model there")
        if isinstance(train_dataset, ForgetRetainDataset):
            pad_token_id = getattr(kwargs.get("processing_class"), "pad_token_id", None)
            data_collator = ForgetRetainCollator(data_collator, pad_token_id or 0)
        reentrant = cast(dict, args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if model is not None and args.gradient_checkpointing and reentrant:
            # such a checkpoint passes a gradient on only if its input needs one, which frozen embeddings do not
            cast(Any, model).enable_input_require_grads()
        self.objective = SimNPO() if objective is None else objective
        _check_objective(self.objective)
        self.forget_coef, self.retain_coef = forget_coef, retain_coef
        self.head_options = {"gradient_error": gradient_error or None, "chunk_tokens": chunk_tokens}
        self._user_metrics = compute_metrics
        super().__init__(
            model, args, data_collator or ForgetRetainCollator(), train_dataset, eval_dataset,
            compute_metrics=self._metrics, **kwargs,
        )  # fmt: skip
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} GPUs and would use nn.DataParallel, which splits a step in ways "
                "nobody counts: start one process a GPU with `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0"
            )
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if any(getattr(parallelism, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp")):
            raise ValueError(
                "tensor, context and sequence parallelism give several ranks the same sequences, which would be "
                "counted twice: use data parallelism (DDP, FSDP, ZeRO)"
            )
        self.model_accepts_loss_kwargs = True
        self._reference: ReferenceLogps | None = None
        self._loss_sums, self._loss_steps = torch.zeros(2, device=self.args.device), 0

    def call_model_init(self, trial: Any = None) -> Any:
        return _attached(super().call_model_init(trial), None)

    # Training

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """The micro-batches of a step, and what its two means divide by."""
        if isinstance(self.train_dataset, ForgetRetainDataset):
            self.train_dataset.start_epoch(int(self.state.epoch or 0))
        # before the first batch, so that nothing the dataset draws for itself has been drawn
        if self.objective.needs_ref_logps and (self._reference is None or self.state.global_step == 0):
            self._reference = self._read_or_measure_reference()
        # transformers 4.51 asks for too few at the end of some epochs, and for none at the end of others
        batches = [_joined(batch) for batch in islice(epoch_iterator, self.args.gradient_accumulation_steps)]
        totals = torch.zeros(2, dtype=torch.int64, device=self.args.device)
        for batch in batches:
            retained = batch["labels"][batch["retain_mask"], 1:]
            totals[0] += len(batch["labels"]) - len(retained)
            totals[1] += (retained != IGNORE_INDEX).sum()
            if self._reference is not None:
                batch["ref_logps"] = self._reference.of(batch)
        self._loss_steps += bool(batches)
        summed: Any = self.accelerator.reduce(totals, "sum")
        return batches, StepTotals(*summed.tolist())

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's part of the step's loss, times the number of ranks, over which gradients are averaged.

        Args:
            num_items_in_batch: `StepTotals`, from `get_batch_samples`; None, outside of training, for the batch's own.
        """
        if not isinstance(num_items_in_batch, StepTotals) and (num_items_in_batch is not None or self.is_in_train):
            raise ValueError(
                f"num_items_in_batch must be the StepTotals that UnlearnTrainer.get_batch_samples returns, got "
                f"{num_items_in_batch!r}: one number cannot count forget sequences and retain tokens; a subclass that "
                "overrides get_batch_samples has to call super().get_batch_samples"
            )
        batch = _joined(inputs)
        totals = {} if num_items_in_batch is None else num_items_in_batch._asdict()
        out = model(
            **batch,
            objective=self.objective,
            forget_coef=self.forget_coef,
            retain_coef=self.retain_coef,
            **{name: max(count, 1) for name, count in totals.items()},
            **self.head_options,
        )
        if not hasattr(out, "forget_loss"):
            raise RuntimeError(
                f"the model's forward returned a {type(out).__name__} instead of an unlearning loss: something has "
                "replaced model.forward since simnpo.attach (a fused cross-entropy of another package?)"
            )
        loss = out.loss
        if totals:
            loss = loss * self.accelerator.num_processes
            self._loss_sums += torch.stack([out.forget_loss, out.retain_loss]).detach()
        return (loss, out) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the two terms to the loss that Trainer logs."""
        if "loss" in logs and self._loss_steps:
            summed: Any = self.accelerator.reduce(self._loss_sums, "sum")
            logs["forget_loss"], logs["retain_loss"] = (summed / self._loss_steps).tolist()
            self._loss_sums, self._loss_steps = torch.zeros_like(self._loss_sums), 0
        super().log(logs, *args, **kwargs)

    def _read_or_measure_reference(self) -> ReferenceLogps:
        path = Path(str(self.args.output_dir)) / REFERENCE_FILE
        if self.state.global_step:
            if not path.is_file():
                raise ValueError(
                    f"{type(self.objective).__name__} needs the log-probabilities of the model that the run started "
                    f"with, and {path} is gone: put it back, or start again without resume_from_checkpoint"
                )
            return ReferenceLogps.load(path)
        # each rank its part; the data of a step must not depend on whether there is a reference
        with torch.random.fork_rng(devices=[]):
            dataset, model = cast(Any, self.train_dataset), cast(nn.Module, self.model_wrapped)
            batches = (_joined(batch) for batch in self.get_test_dataloader(dataset))
            known = ReferenceLogps.measure(model, batches)
        parts: list[Any] = [known.logps] * self.accelerator.num_processes
        if len(parts) > 1:
            torch.distributed.all_gather_object(parts, known.logps)
        for part in parts:
            known.logps |= part
        if self.args.should_save:
            known.save(path)
        return known

    def _set_signature_columns_if_needed(self) -> None:
        # so that Trainer does not remove them as columns the model knows nothing of
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        self._signature_columns = sorted({*columns, "forget", "retain"})

    # Evaluation

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Log-probability and number of tokens of each sequence; the means are taken over the whole set, in `_metrics`.

        Returns:
            (None, logps, num_tokens): (B,) float32, or (B, 2) forget and retain for pairs.
        """
        batch = self._prepare_inputs(_joined(inputs) if "forget" in inputs else dict(inputs))
        retain_mask = batch.pop("retain_mask", None)
        num_tokens = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(-1)
        with torch.no_grad(), self.compute_loss_context_manager():
            logps = model(**batch, token_logps=True, chunk_tokens=self.head_options["chunk_tokens"]).sum(-1)
        if retain_mask is not None:
            num_retain = int(retain_mask.sum())
            if num_retain not in (0, len(logps) - num_retain):
                raise ValueError(
                    f"evaluation takes as many retain as forget sequences, or none, got {num_retain} and "
                    f"{len(logps) - num_retain}: evaluate the two sets apart, as eval_dataset={{'forget': ...}}"
                )
            sides = [~retain_mask, retain_mask] if num_retain else [~retain_mask]
            logps, num_tokens = (torch.stack([v[side] for side in sides], -1) for v in (logps, num_tokens))
        return None, logps, num_tokens

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        logps = torch.as_tensor(prediction.predictions).double()
        num_tokens = torch.as_tensor(prediction.label_ids)
        own = {} if self._user_metrics is None else self._user_metrics(prediction)
        if logps.ndim == 1:
            return {**_nll_and_probability(logps, num_tokens, "loss", "probability"), **own}
        metrics, loss = {}, 0.0
        for side, (some_logps, some_tokens) in enumerate(zip(logps.T, num_tokens.T)):
            name = "retain" if side else "forget"
            metrics |= _nll_and_probability(some_logps, some_tokens, f"{name}_nll", f"{name}_probability")
        if isinstance(self.objective, SequenceObjective) and not self.objective.needs_ref_logps:
            losses, _ = self.objective.loss_and_weight(logps[:, 0], num_tokens[:, 0])
            loss = self.forget_coef * losses.mean().item() + self.retain_coef * metrics.get("retain_nll", 0.0)
            metrics["loss"] = loss
        return {**metrics, **own}


def _check_objective(objective: Objective) -> None:
    check_objective(objective)
    for asked, needs in (("needs_alternates", "alternate answers"), ("needs_ref_token_logps", "a reference per token")):
        if getattr(objective, asked):
            raise ValueError(
                f"{type(objective).__name__} needs {needs}, which UnlearnTrainer does not make: use an objective of "
                "single sequences (SimNPO, NPO, GradAscent, WGA, ...), or call the attached model in your own loop"
            )


def _check_arguments(args: TrainingArguments) -> None:
    if args.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}: it needs the logits")
    if args.use_liger_kernel:
        if not hasattr(args, "liger_kernel_config"):
            raise ValueError("use_liger_kernel replaces the forward that holds the loss: turn it off")
        # its other kernels are welcome; this one replaces the forward of the model
        args.liger_kernel_config = {**(args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
    if args.gradient_checkpointing:
        # transformers 4 has the other default
        given = args.gradient_checkpointing_kwargs
        args.gradient_checkpointing_kwargs = {"use_reentrant": False, **(given if isinstance(given, dict) else {})}


def _attached(model: Any, peft_config: Any) -> Any:
    """`model` with the loss in its forward, and with the adapter if one is asked for."""
    if peft_config is not None:
        model = get_peft_model(model, peft_config)
    if isinstance(causal_lm(model), AttachedModel):
        return model
    # ZeRO-3 spreads the weights while the model is loaded, so there is nothing here to check against
    return attach(model, verify=not is_deepspeed_zero3_enabled())


def _joined(batch: Mapping[str, Any]) -> dict[str, Any]:
    """One batch of forget and retain sequences, whichever way it came."""
    if "forget" in batch:
        return join(batch)
    if "retain_mask" not in batch:
        raise ValueError(
            f"a training batch must hold forget and retain sub-batches, or retain_mask, got {sorted(batch)}: pass a "
            "ForgetRetainDataset as train_dataset"
        )
    return dict(batch)


def _nll_and_probability(logps: Tensor, num_tokens: Tensor, nll: str, probability: str) -> dict[str, float]:
    per_token = logps / num_tokens.clamp(min=1)
    return {
        nll: (-logps.sum() / num_tokens.sum().clamp(min=1)).item(),
        probability: per_token.exp().mean().item(),
    }
