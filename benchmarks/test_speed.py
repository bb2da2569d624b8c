"""The suite's steps under pytest-benchmark: pytest benchmarks --benchmark-only."""

import pytest
import torch

from simnpo.benchmarks.measure import peak_memory
from simnpo.benchmarks.operands import SHAPES, exact, make_batch
from simnpo.benchmarks.rivals import RIVALS
from simnpo.benchmarks.suite import LIMITS, MODES, errors_of, products_alone, steps_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE, N = ("llama-3.2-1b", 8192) if DEVICE.type == "cuda" else ("smollm2", 512)


@pytest.fixture(scope="module")
def batch():
    return make_batch(SHAPES[SHAPE], N, 128, "text", torch.bfloat16, DEVICE)


@pytest.fixture(scope="module")
def truth(batch):
    return exact(batch)


def run(steps):
    result = ()
    for step in steps:
        result = (step(*result),)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("mode", MODES)
def test_products_alone(mode, batch, benchmark):
    benchmark.group = mode
    benchmark(run, [products_alone(batch, mode)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
def test_rival(rival, mode, batch, truth, benchmark):
    if mode == "logps" and rival.token_logps is None:
        pytest.skip("has no log-probabilities of its own")
    if reason := rival.missing(batch):
        pytest.skip(reason)
    for name, error in errors_of(rival, batch, mode, truth).items():
        assert error <= LIMITS[torch.bfloat16][name], name
    steps = steps_of(rival, batch, mode)
    benchmark.group = mode
    benchmark.extra_info["peak MiB"] = round(peak_memory(lambda: run(steps), DEVICE))
    benchmark(run, steps)
