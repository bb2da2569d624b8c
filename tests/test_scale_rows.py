"""N rows, D hidden size."""

import pytest
import torch

from simnpo.kernels.scale_rows import scale_rows, scale_rows_torch


@pytest.mark.parametrize("impl", [scale_rows, scale_rows_torch])
@pytest.mark.parametrize(("N", "D"), [(0, 5), (1, 1), (3, 5), (4, 4100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scales_scatters_and_works_in_place(impl, N, D, dtype):
    x, coefs = torch.randn(N, D).to(dtype), torch.randn(N)
    expected = (x.float() * coefs[:, None]).to(dtype)
    index = torch.randperm(N + 2)[:N]
    out = torch.full((N + 2, D), torch.nan, dtype=dtype)
    impl(x, coefs, out, index)
    assert torch.equal(out[index], expected)
    assert out.isnan().any(1).sum() == 2
    impl(x, coefs, x)
    assert torch.equal(x, expected)
