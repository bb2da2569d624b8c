"""Activation checkpoints: what a layer got is kept, the rest is computed again; the checkpoints may leave the GPU.

    forward     layer 0, 1, 2, ...     a checkpoint is copied to the host while the next layers compute
    backward    ..., 2, 1, 0           a checkpoint is copied back while the layer before it in backward computes

So at most AHEAD checkpoints are on the GPU at a time, whatever the number of layers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simnpo.errors import UserError

AHEAD = 2  # checkpoints that may be on their way in either direction


def checkpoint_layers(model: Any, *, offload: bool, device: torch.device) -> None:
    """Has every layer of a transformers model recomputed in backward.

    Args:
        model: of transformers.
        offload: keep what is needed for it in the host's memory.
        device: of the model.

    Raises:
        UserError: the model has no layers that can be checkpointed, or the activations are in the host's memory anyway.
    """
    if offload and device.type != "cuda":
        raise UserError(
            f"offload_activations moves activations from a GPU to the host's memory, and this run is on {device.type}: "
            "leave it out"
        )
    # its name since transformers 5.2x, and before
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"gradient_checkpointing: {error}") from error
    if offload:
        run = OffloadedCheckpoints(device)
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = run


class Offloaded:
    """A tensor that has left its device.

    Attributes:
        host: the copy, in pinned memory where there is a GPU.
        device_copy: the tensor again, once it was sent for; with the event after which it is there.
    """

    def __init__(self, host: Tensor, left: Any) -> None:
        self.host, self.left = host, left
        self.device_copy: tuple[Tensor, Any] | None = None


class OffloadedCheckpoints:
    """A checkpointing function, as transformers calls it for each layer.

    Args:
        device: a CUDA device. On the CPU the copies are made all the same, one after the other: that is for tests.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waiting: list[Offloaded] = []  # whose backward is still to come, in the order of the forward

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(self._leave, self._return):
            return checkpoint(function, *args, use_reentrant=False, **kwargs)

    def _leave(self, tensor: Tensor) -> Any:
        # the hidden states; masks and positions are shared by all layers
        if not tensor.is_floating_point() or tensor.dim() != 3 or isinstance(tensor, nn.Parameter):
            return tensor
        if self.stream is None:
            entry = Offloaded(tensor.clone(), None)
        else:
            if len(self.waiting) >= AHEAD and self.waiting[-AHEAD].left is not None:
                # a copy that is slower than the layers must not let them pile up on the GPU
                torch.cuda.current_stream(self.device).wait_event(self.waiting[-AHEAD].left)
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                host.copy_(tensor, non_blocking=True)
                left = self.stream.record_event()
            tensor.record_stream(self.stream)
            entry = Offloaded(host, left)
        self.waiting.append(entry)
        return entry

    def _return(self, packed: Any) -> Tensor:
        if not isinstance(packed, Offloaded):
            return packed
        position = next((i for i, entry in enumerate(self.waiting) if entry is packed), None)
        if position is not None:
            # what is behind it was needed before or never will be
            del self.waiting[position:]
        self._send_for(packed)
        for entry in self.waiting[-AHEAD + 1 :]:
            self._send_for(entry)
        assert packed.device_copy is not None
        tensor, arrived = packed.device_copy
        packed.device_copy = None
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
        return tensor

    def _send_for(self, entry: Offloaded) -> None:
        if entry.device_copy is not None:
            return
        if self.stream is None:
            entry.device_copy = (entry.host.clone(), None)
            return
        # allocated on the stream that will use it, which waits for the copy before it does
        tensor = torch.empty_like(entry.host, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            tensor.copy_(entry.host, non_blocking=True)
            entry.device_copy = (tensor, self.stream.record_event())
