"""Float32 arithmetic on weights that stay in bf16 or in 4 bits: each is in float32 while its own module uses it.

The log-probability of a token under a bf16 body is off by a few hundredths of a nat, and so is its ratio to the one
under the reference. Over 32 768 tokens that adds up to several nats, and to many more where adapters have moved by less
than the last bit of what they are added to (benchmarks/results/long.md). Float32 has the errors of a token at a
thousandth of that, and a pass without a gradient needs no float32 copy of the model for it.

On an NVIDIA GPU, whose float32 products are many times slower than its bf16 ones, those of linear layers are made of
bf16 ones: a float32 number is the sum of two bf16 numbers to 16 bits, x W^T = hi(x) W^T + lo(x) W^T with a bf16 W and
one product more with a float32 one, added up in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from simnpo import attention
from simnpo.errors import UserError
from simnpo.kernels.gemm import add_mm_, mm_float32
from simnpo.model import TOLERANCE, causal_lm, hidden_states, probe, relative_error

HALF = (torch.bfloat16, torch.float16)
# attention that computes in the dtype it is given; flash kernels have none but half precision, and cast to it
IN_ANY_DTYPE = ("eager", "sdpa", attention.NAME)


@contextmanager
def float32_arithmetic(model: nn.Module) -> Iterator[None]:
    """Every product, sum and activation of the model in float32 meanwhile, without a gradient; its weights stay as
    they are, and the largest of them exists in float32 beside itself for as long as its module runs.

    Args:
        model: causal language model of transformers, with or without adapters, in any of the dtypes it can be loaded
            in; not sharded, not wrapped.

    Raises:
        UserError: its attention casts to half precision, and this transformers has no other to put in its place.
    """
    with _exact_attention(causal_lm(model)), float32_products(model, _has_fast_bf16):
        yield


@contextmanager
def float32_products(model: nn.Module, in_parts: Callable[[Tensor], bool]) -> Iterator[None]:
    """`float32_arithmetic` with the attention that the model has.

    Args:
        in_parts: of which weights of linear layers the products are made of bf16 ones.
    """
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_without_tf32())
        for module in model.modules():
            if type(module) is nn.Linear and in_parts(module.weight) and "forward" not in vars(module):
                stack.enter_context(_in_parts(module))
            elif type(module) is nn.Embedding:
                # the rows are exact in any dtype, and fewer than the weight has
                stack.enter_context(module.register_forward_hook(_to_float32))
            elif any(p is not None and p.dtype in HALF for p in module._parameters.values()):
                stack.enter_context(_upcast(module))
            if hasattr(module, "compute_dtype") and hasattr(module, "quant_state"):
                # of bitsandbytes: what it multiplies the dequantised weight in
                stack.enter_context(_set(module, "compute_dtype", torch.float32))
        yield


def check_float32(model: nn.Module) -> None:
    """Whether the model can be computed so, measured on a few made-up tokens.

    Raises:
        UserError: a module uses another's weights, in their own dtype, or the model casts its hidden states.
    """
    was_training, batch = model.training, probe(model, [7])
    model.eval()
    with torch.no_grad():
        expected = hidden_states(model, batch).float()
    reason = "its hidden states are rounded on the way"
    try:
        with float32_arithmetic(model):
            hidden = hidden_states(model, batch)
        if hidden.dtype == torch.float32 and relative_error(hidden, expected) <= TOLERANCE[torch.bfloat16]:
            return
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
    finally:
        model.train(was_training)
    raise UserError(
        f"exact_ratio: {type(causal_lm(model)).__name__} cannot compute in float32 on the weights it has ({reason}): "
        "use --precision fp32, or --exact_ratio off"
    )


def _has_fast_bf16(weight: Tensor) -> bool:
    return weight.is_cuda and torch.version.hip is None and weight.dtype in (torch.bfloat16, torch.float32)


@contextmanager
def _in_parts(linear: nn.Linear) -> Iterator[None]:
    """The forward of a linear layer by `product_of_parts`."""

    def forward(input: Tensor) -> Tensor:
        rows = product_of_parts(input.reshape(-1, input.shape[-1]).float(), linear.weight, _tensor_cores)
        rows = rows if linear.bias is None else rows.add_(linear.bias)
        return rows.view(*input.shape[:-1], -1)

    linear.forward = forward
    try:
        yield
    finally:
        # the class's own shows again
        del linear.forward


def product_of_parts(
    x: Tensor, weight: Tensor, add_product: Callable[[Tensor | None, Tensor, Tensor], Tensor]
) -> Tensor:
    """x W^T in float32, of bf16 products.

    Args:
        x: (N, K) float32.   weight: (V, K) bf16 or float32.
        add_product: total (N, V) float32 or None, (N, K) and (K, V) bf16 -> total + their product, in float32.
    """
    high, low = _bf16_parts(x)
    if weight.dtype == torch.bfloat16:
        return add_product(add_product(None, high, weight.t()), low, weight.t())
    # the product of the two small parts is below the last bit of the others
    weight_high, weight_low = _bf16_parts(weight)
    total = add_product(add_product(None, high, weight_high.t()), low, weight_high.t())
    return add_product(total, high, weight_low.t())


def _bf16_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def _tensor_cores(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return mm_float32(a, b) if total is None else add_mm_(total, a, b)


def _to_float32(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.float()


@contextmanager
def _upcast(module: nn.Module) -> Iterator[None]:
    """The module's own half-precision parameters in float32 during its forward."""
    own = {name: p for name, p in module._parameters.items() if p is not None and p.dtype in HALF}

    def before(*_: Any) -> None:
        for name, p in own.items():
            module._parameters[name] = nn.Parameter(p.detach().float(), requires_grad=False)

    def after(*_: Any) -> None:
        module._parameters.update(own)

    hooks = (
        module.register_forward_pre_hook(before),
        # also where the forward raises: a model must not keep what only this pass was to see
        module.register_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        after()


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Float32 products in float32, whatever the process has asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _exact_attention(lm: Any) -> Iterator[None]:
    """Attention that does not cast to half precision, in the place of one that does."""
    before = lm.config._attn_implementation
    if before in IN_ANY_DTYPE:
        yield
        return
    if not attention.SUPPORTED:
        raise UserError(
            f"exact_ratio: {before!r} attention computes in half precision and this transformers has no other for "
            "packed sequences: use --attention sdpa, or transformers 4.53 or later"
        )
    attention.register()
    lm.set_attn_implementation(attention.NAME)
    try:
        yield
    finally:
        lm.set_attn_implementation(before)
