"""N tokens, D hidden size, V vocabulary."""

import pytest
import torch
from numerics import relative_error

from simnpo.kernels.indexed_dot import indexed_dot, indexed_dot_torch


@pytest.mark.parametrize("impl", [indexed_dot, indexed_dot_torch])
@pytest.mark.parametrize(("N", "D", "V"), [(1, 1, 1), (3, 5, 7), (4, 2100, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_float64(impl, N, D, V, dtype):
    torch.manual_seed(6)
    h, w, targets = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype), torch.randint(0, V, (N,))
    products = impl(h, w, targets)
    assert products.dtype == torch.float32
    # exact in float32 from the rounded operands, whatever their dtype
    assert relative_error(products, (h.double() * w.double()[targets]).sum(1)) < 1e-5
