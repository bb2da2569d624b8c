"""Log-probability and greedy choice of each target against all the logits at once."""

import pytest
import torch
from memory import peak_bytes

from simnpo.kernels.linear_logps import linear_logps
from simnpo.kernels.linear_target_stats import linear_target_stats, linear_target_stats_torch


def operands(N: int, D: int, V: int, dtype: torch.dtype):
    """Half of the targets are what the head would choose, one is ignored."""
    generator = torch.Generator().manual_seed(N + V)
    h, w = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    targets[::2] = (h @ w.t()).argmax(-1)[::2]
    targets[N // 3] = -100
    return h.to(dtype), w.to(dtype), targets


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("N", "D", "V", "chunk"), [(13, 8, 37, 5), (1, 4, 3, None), (6, 16, 130, 6)])
def test_matches_all_the_logits(N, D, V, chunk, impl):
    h, w, targets = operands(N, D, V, torch.float32)
    ours = linear_target_stats(h, w, targets, chunk_tokens=chunk, impl=impl)
    truth = linear_target_stats_torch(h.double(), w.double(), targets)
    torch.testing.assert_close(ours.logps.double(), truth.logps, rtol=1e-5, atol=1e-5)
    assert ours.is_greedy.tolist() == truth.is_greedy.tolist()
    if N > 1:
        assert 0 < sum(ours.is_greedy.tolist()) < N - 1


def test_logps_are_those_of_linear_logps_and_shapes_those_of_the_targets():
    h, w, targets = operands(12, 8, 50, torch.float32)
    bias, options = torch.linspace(-3, 3, 50), {"logit_scale": 0.5, "logit_softcap": 4.0}
    h, targets = h.view(3, 4, 8), targets.view(3, 4)
    stats = linear_target_stats(h, w, targets, bias=bias, **options)
    assert torch.equal(stats.logps, linear_logps(h, w, targets, bias=bias, **options))
    logits = 4 * torch.tanh((h @ w.t() + bias) * 0.5 / 4)
    assert torch.equal(stats.is_greedy, logits.argmax(-1) == targets)
    assert not stats.is_greedy[targets == -100].any()


def test_a_tie_counts_as_chosen():
    w = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    h = torch.tensor([[2.0, 0.0]]).expand(3, 2)
    assert linear_target_stats(h, w, torch.tensor([0, 1, 2])).is_greedy.tolist() == [True, True, False]


def test_nothing_that_counts():
    h, w, _ = operands(4, 8, 11, torch.float32)
    stats = linear_target_stats(h, w, torch.full((4,), -100))
    assert not stats.logps.any()
    assert not stats.is_greedy.any()


def test_never_more_than_a_chunk_of_logits():
    N, D, V, chunk = 2048, 4, 3000, 64
    h, w, targets = operands(N, D, V, torch.float32)
    peak = peak_bytes(lambda: linear_target_stats(h, w, targets, chunk_tokens=chunk, impl="torch"))
    # the chunk, its float32 copy in blocks and a few numbers a token; all the logits would be 24 MB
    assert chunk * V * 4 <= peak < 4 * chunk * V * 4
