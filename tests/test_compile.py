"""Every kernel as machine code of six GPUs, none of which need be here: registers, memory access, 64-bit addresses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# bytes of shared memory a block may take
SHARED_LIMIT = {
    "sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536,
}  # fmt: skip
KERNELS = sorted(re.findall(r"def (_\w+_kernel)\(", "".join(p.read_text() for p in (ROOT / "kernels").glob("*.py"))))

# loads and stores of less than 16 bytes in a body: numbers of a row, the same for every lane
ROW_NUMBERS = {"_row_gradient_kernel": (7, 0), "_mixed_gradient_kernel": (8, 0), "_column_pass_kernel": (7, 1)}

# (kernel, pattern of "target launch") -> why its loads and stores are narrower than 16 bytes
NARROW = {
    ("_row_pass_kernel", "V=50257"): "rows of an odd vocabulary start anywhere",
    ("_row_gradient_kernel", "V=50257"): "rows of an odd vocabulary start anywhere",
    ("_mixed_gradient_kernel", "V=50257"): "rows of an odd vocabulary start anywhere",
    ("_kl_pass_kernel", "V=50257"): "rows of an odd vocabulary start anywhere",
    ("_column_pass_kernel", "V=50257"): "rows of an odd vocabulary start anywhere",
    ("_row_gradient_kernel", "columns$"): "gathers single columns",
    ("_column_pass_kernel", "gfx942 (bf16|fp16)"): "four elements a lane: 1024 columns over 4 warps of 64",
    ("_sequence_pass_kernel", ""): "a few kilobytes a batch, at offsets that sequences have",
}
# the same of kernels that spill
SPILLS = {
    ("_column_pass_kernel", "sm_100 (bf16|fp16) .*energy"): "ptxas stops at 48 registers of 255: a few bytes a row",
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What benchmarks/compiled.py read; its process has no interpreter."""
    path = tmp_path_factory.mktemp("compiled") / "records.json"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "benchmarks/compiled.py", "--json", path]
    subprocess.run(command, env=env, check=True)
    return json.loads(path.read_text())


def excepted(record: dict, table: dict[tuple[str, str], str]) -> bool:
    where = f"{record['target']} {record['launch']}"
    return any(record["kernel"] == kernel and re.search(pattern, where) for kernel, pattern in table)


def names(records: list[dict]) -> list[str]:
    return [f"{r['kernel']} ({r['launch']}) on {r['target']}" for r in records]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_compiles_without_spills_in_the_memory_there_is(records, kernel, target):
    mine = [r for r in records if r["kernel"] == kernel and r["target"] == target]
    assert mine, f"benchmarks/compiled.py never launches {kernel}"
    assert not names([r for r in mine if r["spilled_bytes"] and not excepted(r, SPILLS)])
    assert not names([r for r in mine if r["shared"] > SHARED_LIMIT[target]])


@pytest.mark.parametrize("kernel", KERNELS)
def test_addresses_have_64_bits(records, kernel):
    # 32-bit products of run-time numbers: row * stride passes 2**31 at 16 744 rows of Llama 3's vocabulary
    assert not [(r["launch"], r["narrow_products"]) for r in records if r["kernel"] == kernel and r["narrow_products"]]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_moves_16_bytes_at_a_time(records, kernel, target):
    loads, stores = ROW_NUMBERS.get(kernel, (0, 0))
    for r in records:
        if (r["kernel"], r["target"]) != (kernel, target) or excepted(r, NARROW):
            continue
        where = names([r])
        for body in r["bodies"]:
            assert body["wide_load_bytes"] >= r["elements"] * r["itemsize"], where
            assert body["narrow_loads"] <= loads, where
            assert body["narrow_stores"] <= stores, where
        writes = kernel in ("_row_gradient_kernel", "_scale_rows_kernel") or r["launch"].endswith(" write")
        assert not writes or r["bodies"][-1]["wide_store_bytes"] >= r["elements"] * r["itemsize"], where


@pytest.mark.parametrize("kernel", KERNELS)
def test_exceptions_are_still_needed(records, kernel):
    for table, field in ((NARROW, "narrow"), (SPILLS, "spilled_bytes")):
        for entry in table:
            if entry[0] == kernel:
                covered = [r for r in records if excepted(r, {entry: ""})]
                assert any(r[field] for r in covered), entry
