from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from simnpo import NPO, GradAscent, SimNPO
from simnpo.config import UnlearnConfig
from simnpo.errors import UserError
from simnpo.objectives import SatImp


def config(**changes: object) -> UnlearnConfig:
    return UnlearnConfig(**{"model": "m", "forget": "f", "output": "o", "retain": "r"} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta must be greater than 0, got 0.0"),
        ({"beta": -1.0}, "beta must be greater than 0, got -1.0"),
        ({"beta": float("nan")}, "beta must be greater than 0, got nan"),
        ({"gamma": -0.5}, "gamma must be 0 or more, got -0.5"),
        ({"gamma": 0.5, "method": "npo"}, "method 'npo' has no gamma, it has beta: got gamma=0.5"),
        ({"beta": 1.0, "method": "ga"}, "method 'ga' has no beta, it has no options: got beta=1.0"),
        ({"method_args": "beta2=1"}, "method 'simnpo' has no beta2, it has beta, gamma"),
        ({"method": "satimp", "method_args": "beta1=x"}, "method_args must be name=number pairs, got 'beta1=x'"),
        ({"method": "satimp", "method_args": "beta1=-1"}, "method 'satimp': beta1 must be 0 or more, got -1.0"),
        ({"alternate": " "}, "alternate must be an answer"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"retain_batch_size": 0}, "retain_batch_size must be greater than 0, got 0"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite, got inf"),
        ({"warmup_ratio": 1.5}, "warmup_ratio must be between 0 and 1, got 1.5"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be 0 or more"),
        ({"method": "rmu"}, "method must be one of simnpo, npo, ga, .*, got 'rmu': see --list-methods"),
        ({"packing": "yes"}, "packing must be auto, on or off"),
        ({"packing": []}, "packing must be auto, on or off"),
        ({"model": 5}, "model must be of type str, got 5"),
        ({"retain": "a\0b"}, "retain must be without null characters"),
        ({"batch_size": True}, "batch_size must be of type int, got True"),
        ({"max_steps": 1.0}, "max_steps must be of type int or None, got 1.0"),
        ({"lora": 1}, "lora must be of type bool, got 1"),
        ({"beta": 1e-40}, "beta must be 0 or between .* as a float32 is, got 1e-40"),
        ({"learning_rate": 1e39}, "learning_rate must be 0 or between"),
        ({"retain_coef": 10**400}, "retain_coef must be 0 or between"),
        ({"method": "satimp", "method_args": "beta1=nan"}, "method_args: beta1 must be finite"),
        ({"beta": 1.0, "method_args": "beta=2"}, "method_args: beta is given twice, beta=1.0 and beta=2"),
        ({"gamma": 1.0, "method_args": "gamma=2"}, "method_args: gamma is given twice"),
        ({"seed": 2**63}, "seed must be at most 9223372036854775807"),
        ({"seed": 10**5000}, "seed must be at most 9223372036854775807, got an integer of 16610 bits"),
        ({"lora_rank": 65537}, "lora_rank must be at most 65536, got 65537"),
        ({"logging_steps": 2**31}, "logging_steps must be at most 2147483647"),
        ({"epochs": 1e12}, "epochs must be less than 2147483647 steps, got 1000000000000.0"),
    ],
)
def test_refuses_what_makes_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_is_frozen_and_every_field_has_a_help_text():
    with pytest.raises(FrozenInstanceError):
        config().beta = 1.0
    assert all(field.metadata["help"] for field in fields(UnlearnConfig))


def test_objective_fills_in_the_methods_own_beta():
    assert config(gamma=0.5).objective() == SimNPO(2.5, 0.5)
    assert config(method="npo").objective() == NPO(0.1)
    assert config(method="npo", beta=0.7).objective() == NPO(0.7)
    assert config(method="ga").objective() == GradAscent()
    assert config(method="satimp", method_args="beta1=3, beta2=0.5").objective() == SatImp(3.0, 0.5)


def test_number_of_steps():
    assert config(epochs=2.0, batch_size=4).num_steps(10) == 5
    assert config(epochs=2.0, batch_size=4, max_steps=3).num_steps(10) == 3
    assert config(epochs=0.01).num_steps(10) == 1
    with pytest.raises(UserError, match="epochs must be at most 2147483647 steps of this forget set"):
        config(epochs=1e6, batch_size=1).num_steps(10_000)


def test_resume_refuses_what_changes_the_mathematics_by_name():
    saved = asdict(config())
    config(save_steps=7, keep_checkpoints=3, resume=True).refuse_changes(saved)
    with pytest.raises(UserError, match=r"learning_rate \(was 1e-05, now 0\.1\), seed \(was 0, now 4\)"):
        config(learning_rate=0.1, seed=4).refuse_changes(saved)
