"""A short run of UnlearnTrainer; test_distributed_trainer.py starts it by `accelerate launch`, and calls it."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from steps import BETA, FORGET, FORGET_COEF, GAMMA, RETAIN, RETAIN_COEF
from test_huggingface import make_trainer

from simnpo import NPO, SimNPO
from simnpo.integrations.forget_retain import ForgetRetainDataset

OBJECTIVES = {"simnpo": SimNPO(BETA, GAMMA), "npo": NPO(0.3)}


def run(folder: Path, name: str, accumulation: int) -> dict[str, Any]:
    trainer = make_trainer(
        folder / "run", objective=OBJECTIVES[name], forget_coef=FORGET_COEF, retain_coef=RETAIN_COEF,
        train_dataset=ForgetRetainDataset(FORGET[:8], RETAIN, seed=3), num_train_epochs=2, optim="sgd",
        eval_dataset=ForgetRetainDataset(FORGET, RETAIN), per_device_eval_batch_size=2, learning_rate=0.05,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    trainer.train()
    found = {"evaluation": trainer.evaluate(), "log": trainer.state.log_history, "ranks": trainer.args.world_size}
    if trainer.args.should_save:
        torch.save(found | {"parameters": dict(trainer.model.named_parameters())}, folder / "found.pt")
    return found


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # everything is written: gloo's threads now and then abort the interpreter while it takes itself apart
    sys.stdout.flush()
    os._exit(0)
