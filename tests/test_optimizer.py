"""The optimizers of a run: bf16 weights that lose no update, updates inside backward, states that are small."""

import io

import pytest
import torch
from torch import nn

from simnpo.errors import UserError
from simnpo.model import relative_error
from simnpo.training.optimizer import make_optimizer, set_learning_rate
from simnpo.training.parameterwise import ParameterwiseOptimizer

NAMES = ("adamw", "adamw8bit", "adafactor")


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(dtype)


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
    (model(x).float() - x.float().flip(1)).square().mean().backward()


def train(model: nn.Module, optimizer: object, steps: int, rate: float, first: int = 0) -> None:
    for step in range(first, first + steps):
        set_learning_rate(optimizer, rate)
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_each_learns(name):
    model = network()
    optimizer = make_optimizer(model.parameters(), 0.0, name=name)
    x = torch.randn(512, 64)

    def loss() -> float:
        return (model(x) - x.flip(1)).square().mean().item()

    before = loss()
    train(model, optimizer, 300, 3e-3)
    assert loss() < 0.5 * before


def test_small_updates_of_bf16_weights_are_not_lost():
    """The gradients are the same for all: what differs is what becomes of updates of a hundredth of the last digit."""
    start = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    gradients = [torch.randn(128, 64, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(1, 51)]

    def run(dtype: torch.dtype, optimizer_of) -> tuple[nn.Parameter, object]:
        parameter = nn.Parameter(start.to(dtype))
        optimizer = optimizer_of([parameter])
        for gradient in gradients:
            set_learning_rate(optimizer, 1e-5)
            parameter.grad = gradient.to(dtype)
            optimizer.step()
        return parameter, optimizer

    exact, _ = run(torch.float32, lambda p: make_optimizer(p, 0.0))
    ours, optimizer = run(torch.bfloat16, lambda p: make_optimizer(p, 0.0))
    plain, _ = run(torch.bfloat16, lambda p: torch.optim.AdamW(p, weight_decay=0.0))
    moved = exact.data - start.float()
    kept = ours.data.float() + optimizer.residues[0].float() - start.float()
    assert relative_error(kept, moved) < 0.1
    assert relative_error(plain.data.float() - start.float(), moved) > 0.5
    # the weights alone are the exact ones, rounded, but where the sum stands at a tie
    assert (ours.data != exact.data.bfloat16()).float().mean() < 0.02


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_release_inside_backward_ends_with_the_same_bits(name, dtype):
    model, released = network(dtype), network(dtype)
    train(model, make_optimizer(model.parameters(), 0.1, name=name), 5, 1e-3)
    optimizer = make_optimizer(released.parameters(), 0.1, name=name, gradient_release=True)
    for step in range(5):
        set_learning_rate(optimizer, 1e-3)
        backward(released, step)
        assert all(p.grad is None for p in released.parameters())
        optimizer.step()
    # the whole model's kernels update float32 weights together, in one rounding more or less
    tolerance = 0.0 if dtype == torch.bfloat16 else 1e-6
    for ours, expected in zip(released.parameters(), model.parameters()):
        assert relative_error(ours.data.float(), expected.data.float()) <= tolerance


def test_a_shared_weight_is_updated_when_its_gradient_is_complete():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x @ self.weight) @ self.weight.t()

    plain, released = Tied(), Tied()
    train(plain, make_optimizer(plain.parameters(), 0.0), 3, 1e-3)
    train(released, make_optimizer(released.parameters(), 0.0, gradient_release=True), 3, 1e-3)
    assert relative_error(released.weight.data, plain.weight.data) < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_continues_from_its_state_to_the_same_bits(name, dtype):
    whole = network(dtype)
    train(whole, make_optimizer(whole.parameters(), 0.1, name=name), 6, 1e-3)
    first = network(dtype)
    optimizer = make_optimizer(first.parameters(), 0.1, name=name)
    train(first, optimizer, 3, 1e-3)
    saved = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict()], saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    second = network(dtype, seed=1)
    second.load_state_dict(weights)
    optimizer = make_optimizer(second.parameters(), 0.1, name=name)
    optimizer.load_state_dict(state)
    train(second, optimizer, 3, 1e-3, first=3)
    for ours, expected in zip(second.parameters(), whole.parameters()):
        assert ours.data.equal(expected.data)


def test_states_are_as_small_as_promised():
    def state_bytes(name: str) -> int:
        parameter = nn.Parameter(torch.randn(512, 256))
        optimizer = make_optimizer([parameter], 0.0, name=name)
        set_learning_rate(optimizer, 1e-3)
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        tensors = [x for x in optimizer.state[parameter].values() if isinstance(x, torch.Tensor)]
        return sum(x.nbytes for x in tensors)

    assert state_bytes("adamw") >= 8 * 512 * 256
    assert state_bytes("adamw8bit") < 2.2 * 512 * 256
    assert state_bytes("adafactor") < 0.1 * 512 * 256


def test_other_weights_are_refused():
    with pytest.raises(UserError, match=r"must be float32 or bfloat16, got torch\.float16"):
        make_optimizer([nn.Parameter(torch.zeros(2, dtype=torch.float16))], 0.0)


def test_one_parameter_after_another_only_where_asked():
    assert isinstance(make_optimizer(network().parameters(), 0.0), torch.optim.AdamW)
    assert isinstance(make_optimizer(network(torch.bfloat16).parameters(), 0.0), ParameterwiseOptimizer)
