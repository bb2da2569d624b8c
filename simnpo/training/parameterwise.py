"""An optimizer for each parameter: room for one parameter's update at a time, and updates inside backward.

bf16 weights keep beside them, in bf16 as well, what rounding them left out:

    w + c  ->  full = float(w) + float(c)  ->  full' = update(full)  ->  w = bf16(full'), c = bf16(full' - w)

so that together they have 16 bits of precision, and an update of 1e-5 of a weight is not lost (Kahan's compensation;
weights alone, in bf16, keep 8 bits: an update has to be 1/256 of a weight to change it).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Group = dict[str, Any]


class ParameterwiseOptimizer:
    """Steps every parameter with an optimizer of its own.

    Args:
        groups: as torch's optimizers take them: params and their weight_decay.
        make: an optimizer of one such group.
        release: update a parameter as soon as its gradient is complete, inside backward, and free the gradient;
            `step` then finds nothing left to do. The learning rate must be set before the backward.
    """

    def __init__(
        self, groups: Iterable[Group], make: Callable[[list[Group]], torch.optim.Optimizer], *, release: bool = False
    ) -> None:
        self.parameters: list[nn.Parameter] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.residues: list[Tensor | None] = []
        self.release = release
        for group in groups:
            for parameter in group["params"]:
                self.parameters.append(parameter)
                self.optimizers.append(make([{**group, "params": [parameter]}]))
                self.residues.append(torch.zeros_like(parameter.data) if parameter.dtype == torch.bfloat16 else None)
        if release:
            for i, parameter in enumerate(self.parameters):
                parameter.register_post_accumulate_grad_hook(self._hook(i))

    @property
    def param_groups(self) -> list[Group]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """Updates every parameter that has a gradient."""
        for i in range(len(self.parameters)):
            self._update(i)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers], "residues": self.residues}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for residue, saved in zip(self.residues, state["residues"], strict=True):
            if residue is not None:
                residue.copy_(saved)
        for parameter, residue, optimizer, saved in zip(
            self.parameters, self.residues, self.optimizers, state["optimizers"], strict=True
        ):
            low = parameter.data
            if residue is not None:
                parameter.data = low.float()  # torch casts a state to the dtype that its parameter has
            optimizer.load_state_dict(saved)
            parameter.data = low

    def _hook(self, i: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            self._update(i)
            parameter.grad = None

        return hook

    @torch.no_grad()
    def _update(self, i: int) -> None:
        if self.parameters[i].grad is not None:
            with self._in_float32(i):
                self.optimizers[i].step()

    @contextmanager
    def _in_float32(self, i: int) -> Iterator[None]:
        """In the block a bf16 parameter is the float32 sum of itself and its residue, and its gradient is float32."""
        parameter, residue = self.parameters[i], self.residues[i]
        if residue is None:
            yield
            return
        low, gradient = parameter.data, parameter.grad
        parameter.grad = None
        parameter.data = low.float().add_(residue)
        parameter.grad = None if gradient is None else gradient.float()
        yield
        full = parameter.data
        low.copy_(full)
        residue.copy_(full.sub_(low))
        parameter.grad = None
        parameter.data = low
        parameter.grad = gradient
