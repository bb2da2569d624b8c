"""Every Triton kernel compiled for GPUs that need not be here, and what the machine code shows.

    python benchmarks/compiled.py                   writes benchmarks/results/compiled.md
    python benchmarks/compiled.py --json FILE       one record a kernel instead: what tests/test_compile.py reads

Triton's own launch path runs, all but the launch: the launchers get tensors without memory and a driver that claims to
be the target, so block sizes, warps and specialisations are those of a real run and are written down only once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from simnpo.kernels.column_pass import column_pass
from simnpo.kernels.head import LogitTransform, RowReductions, RowStats
from simnpo.kernels.indexed_dot import indexed_dot
from simnpo.kernels.kl_pass import kl_pass
from simnpo.kernels.mixed_gradient import mixed_gradient
from simnpo.kernels.row_pass import row_gradient, row_pass
from simnpo.kernels.scale_rows import scale_rows
from simnpo.kernels.sequence_pass import SequenceResults, sequence_pass
from simnpo.objectives import NPO, GradAscent, SimNPO
from simnpo.objectives.rows import Mix

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Llama 3's vocabulary, whose rows start at multiples of 16 bytes, and GPT-2's, whose rows start anywhere
ALIGNED_V, ODD_V = 128_256, 50_257
N, B, D = 64, 4, 4096
# a row has at most this many numbers of its own, which are loaded one by one: target, statistics, coefficient
ROW_NUMBERS = {"_mixed_gradient_kernel": 8}
ROW_NUMBERS_DEFAULT = 7

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
RESULT = Path(__file__).parent / "results/compiled.md"


class Launch(NamedTuple):
    """One way the package launches a kernel.

    name: dtype and flags.   itemsize: bytes of an element of its largest operand.
    disassemble: read SASS, which takes 0.5 s, and not PTX.   call: launches.
    """

    name: str
    itemsize: int
    disassemble: bool
    call: Callable[[], object]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches() -> Iterator[Launch]:
    """Every kernel with every dtype its callers use; every set of flags in bf16, none and all of them in the others."""
    for name, dtype in DTYPES.items():
        flag_sets = [(False, False), (True, True)]
        flag_sets += [(False, True), (True, False)] * (name == "bf16")
        for has_bias, has_softcap in flag_sets:
            bias = empty(ALIGNED_V, dtype=dtype) if has_bias else None
            yield from chunk_launches(name, dtype, ALIGNED_V, LogitTransform(bias, 1.0, 30.0 if has_softcap else None))
        yield from logits_in_launches(name, dtype, ALIGNED_V)
        yield from hidden_state_launches(name, dtype)
    yield from chunk_launches("bf16", torch.bfloat16, ODD_V, LogitTransform())
    # autocast: products in bf16, a bias and hidden states that stayed float32
    yield from chunk_launches("bf16 autocast", torch.bfloat16, ALIGNED_V, LogitTransform(empty(ALIGNED_V), 1.0, 30.0))
    yield from wide_logits_launches("fp32 to bf16", torch.bfloat16, ALIGNED_V)
    rows = empty(N, dtype=torch.int64)
    x, out = empty(N, D, dtype=torch.bfloat16), empty(N, D)
    yield Launch("bf16 to fp32 index", 2, False, lambda: scale_rows(x, empty(N), out, rows))
    for objective in (SimNPO(), NPO(), GradAscent(), GradAscent(normalize=True)):
        yield Launch(str(objective), 4, False, lambda objective=objective: launch_sequence_pass(objective))


def chunk_launches(name: str, dtype: torch.dtype, V: int, transform: LogitTransform) -> Iterator[Launch]:
    """The kernels that read the fused op's chunk of logits."""
    logits, targets, stats = empty(N, V, dtype=dtype), empty(N, dtype=torch.int64), RowStats(*[empty(N)] * 4)
    kept, columns = empty(N, 4096, dtype=dtype), empty(4096, dtype=torch.int64)
    reductions, mix = RowReductions.empty(N, stats[0]), Mix(*[empty(N)] * 3)
    has_bias, has_softcap = transform.bias is not None, transform.softcap is not None
    flags = f"{name} V={V}" + " bias" * has_bias + " softcap" * has_softcap
    calls: dict[str, Callable] = {
        " write": lambda: row_pass(logits, targets, stats[0], transform, write_gradient=True),
        "": lambda: row_pass(logits, targets, stats[0], transform, write_gradient=False),
        " reduce": lambda: row_pass(logits, targets, stats[0], transform, write_gradient=False, reductions=reductions),
        " mix": lambda: mixed_gradient(logits, targets, stats, reductions, mix, transform, logits),
        " kl write": lambda: kl_pass(logits, torch.empty_like(logits), transform, transform, write_gradient=True),
        " kl": lambda: kl_pass(logits, torch.empty_like(logits), transform, transform, write_gradient=False),
        " slab": lambda: row_gradient(logits, targets, *stats, transform, logits),
        " columns": lambda: row_gradient(logits, targets, *stats, transform, kept, columns=columns),
        " energy": lambda: column_pass(logits, targets, *stats, transform, None),
        " energy coefs": lambda: column_pass(logits, targets, *stats, transform, empty(N)),
    }
    plain = not (has_bias or has_softcap) and name != "fp16"
    for what, call in calls.items():
        disassemble = plain and what in (" write", " reduce", " slab", " mix", " kl write", " energy")
        yield Launch(flags + what, dtype.itemsize, disassemble, call)


def wide_logits_launches(name: str, dtype: torch.dtype, V: int) -> Iterator[Launch]:
    """Logits kept in float32, with their gradient beside them in the dtype of the products."""
    logits, kept = empty(N, V), empty(N, 256, dtype=dtype)
    targets, columns = empty(N, dtype=torch.int64), empty(256, dtype=torch.int64)
    stats, dz, plain = RowStats(*[empty(N)] * 4), empty(N, V, dtype=dtype), LogitTransform()
    yield Launch(f"{name} V={V} slab", dtype.itemsize, False, lambda: row_gradient(logits, targets, *stats, plain, dz))
    yield Launch(
        f"{name} V={V} columns",
        dtype.itemsize,
        False,
        lambda: row_gradient(logits, targets, *stats, plain, kept, columns=columns),
    )


def logits_in_launches(name: str, dtype: torch.dtype, V: int) -> Iterator[Launch]:
    """The kernels that read some rows of logits which the trainer made."""
    logits, stats, rows = empty(N, V, dtype=dtype), RowStats(*[empty(N)] * 4), empty(N, dtype=torch.int64)
    out, plain, coefs = torch.empty_like(logits), LogitTransform(), empty(N)
    reductions, mix = RowReductions.empty(N, coefs), Mix(*[coefs] * 3)
    calls: dict[str, Callable] = {
        "": lambda: row_pass(logits, rows, stats[0], plain, write_gradient=False, rows=rows),
        " coefs": lambda: row_gradient(logits, rows, *stats, plain, out, rows=rows, coefs=coefs),
        " mix": lambda: mixed_gradient(logits, rows, stats, reductions, mix, plain, out, rows=rows),
    }
    for what, call in calls.items():
        yield Launch(f"{name} V={V} rows{what}", dtype.itemsize, False, call)


def hidden_state_launches(name: str, dtype: torch.dtype) -> Iterator[Launch]:
    """The kernels that read hidden states."""
    x, weight, rows = empty(N, D, dtype=dtype), empty(ALIGNED_V, D, dtype=dtype), empty(N, dtype=torch.int64)
    dx = empty(N, D, dtype=torch.float32 if dtype == torch.float16 else dtype)
    calls = {
        name: lambda: indexed_dot(x, weight, rows),
        f"{name} in place": lambda: scale_rows(x, empty(N), x),
        f"{name} dx": lambda: scale_rows(dx, empty(N), dx),
        f"{name} dx index": lambda: scale_rows(dx, empty(N), empty(N, D, dtype=dtype), rows),
    }
    for what, call in calls.items():
        yield Launch(what, dtype.itemsize, False, call)


def launch_sequence_pass(objective: Any) -> None:
    """One launch of the sequence pass."""
    results = SequenceResults.zeros(B, empty(N))
    offsets, sequences = empty(B + 1, dtype=torch.int64), empty(B, dtype=torch.int64)
    ref_logps = empty(B) if isinstance(objective, NPO) else None
    is_retain = empty(B, dtype=torch.bool)
    sequence_pass(empty(N), empty(N), offsets, sequences, is_retain, results, objective, ref_logps, 1.0)


class AbsentDevice:
    """A driver that knows what the GPU would be, for a launch path that stops before the GPU."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> int | str:
        return self.target.arch

    def get_current_stream(self, device: int | str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_for(target_name: str) -> list[dict]:
    """One record for every different kernel that the launches compile to on a target."""
    compiled: list[Any] = []
    run = JITFunction.run

    def run_without_launch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))

    driver.set_active(AbsentDevice(TARGETS[target_name]))  # type: ignore[arg-type]
    JITFunction.run = run_without_launch
    try:
        records: dict[str, dict] = {}
        for launch in launches():
            launch.call()
            kernel = compiled.pop()
            if kernel.hash not in records:
                records[kernel.hash] = {"target": target_name} | read_kernel(kernel, launch)
    finally:
        JITFunction.run = run
    return list(records.values())


def read_kernel(kernel: Any, launch: Launch) -> dict:
    """What the tests and the table want to know of a compiled kernel."""
    meta = kernel.metadata
    cuda = meta.target.backend == "cuda"
    registers, spilled_bytes, code = read_cuda(kernel, launch.disassemble) if cuda else read_hip(kernel)
    constants = {kernel.src.fn.arg_names[index[0]]: value for index, value in kernel.src.constants.items()}
    block = next(value for name, value in constants.items() if name.startswith("BLOCK_"))
    elements = max(1, block // (meta.num_warps * meta.target.warp_size))
    counts = [read_body(body) for body in bodies(code)]
    wide = elements * launch.itemsize
    row_numbers = ROW_NUMBERS.get(kernel.name, ROW_NUMBERS_DEFAULT)
    return {
        "kernel": kernel.name, "launch": launch.name, "itemsize": launch.itemsize,
        "warps": meta.num_warps, "elements": elements,
        "registers": registers, "spilled_bytes": spilled_bytes, "shared": meta.shared,
        "narrow_products": narrow_products(kernel.asm["ttir"]),
        "machine_code": launch.disassemble or not cuda, "bodies": counts,
        "narrow": any(b["wide_load_bytes"] < wide or b["narrow_loads"] > row_numbers for b in counts),
    }  # fmt: skip


def read_cuda(kernel: Any, disassemble: bool) -> tuple[int, int, list[str]]:
    """Registers, spilled bytes, and the lines of SASS (or PTX)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(kernel.asm["cubin"])
        usage = run_tool("cuobjdump", "--dump-resource-usage", cubin.name)
        code = run_tool("nvdisasm", "-c", cubin.name) if disassemble else kernel.asm["ptx"]
    registers, stack, local = (int(re.findall(rf"\b{key}:(\d+)", usage)[0]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local, code.splitlines()


def read_hip(kernel: Any) -> tuple[int, int, list[str]]:
    """Registers, spilled registers in bytes, and the lines of GCN assembly."""
    code = kernel.asm["amdgcn"]

    def count(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s+(\d+)", code)[0])

    spilled = 4 * (count("vgpr_spill_count") + count("sgpr_spill_count")) + count("private_segment_fixed_size")
    return count("vgpr_count"), spilled, code.splitlines()


def run_tool(name: str, *args: str) -> str:
    """The output of one of the CUDA tools that triton brings."""
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def narrow_products(ttir: str) -> list[str]:
    """32-bit products of two numbers known only at run time: a row index times a stride overflows there."""
    constants = set(re.findall(r"(%[\w#]+) = arith\.constant", ttir))
    products = re.findall(r"arith\.muli (%[\w#]+), (%[\w#]+)[^:\n]*: (?:tensor<[\dx]+x)?i32", ttir)
    return [" * ".join(product) for product in products if not constants & set(product)]


def bodies(code: list[str]) -> list[list[str]]:
    """The instructions of each innermost loop that touches memory, or of the whole kernel where none does."""
    lines = [line.split("//")[0].split(";")[0] for line in code]
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"([$.]L\w+):", line.strip()))}
    loops = []
    for i, line in enumerate(lines):
        branch = re.search(r"\b(?:BRA(?:\.\w+)*|bra(?:\.\w+)*|s_c?branch\w*)\s.*?([$.]L\w+)", line)
        if branch and labels.get(branch[1], i) < i:
            loops.append(range(labels[branch[1]], i + 1))
    inner = [a for a in loops if not any(a != b and b[0] >= a[0] and b[-1] <= a[-1] for b in loops)]
    found = [[line for line in (lines[i] for i in loop) if is_instruction(line)] for loop in inner]
    found = [body for body in found if any(memory_access(line) for line in body)]
    return found or [[line for line in lines if is_instruction(line) and "NOP" not in line]]


def is_instruction(line: str) -> bool:
    """Whether a line of SASS, PTX or GCN does something."""
    return bool(re.match(r"\s*(/\*[0-9a-f]{4,}\*/|@!?%?\w+\s|[a-z][\w.:]+\s)", line))


def memory_access(line: str) -> tuple[str, int] | None:
    """("load" or "store", bytes a lane) of an instruction on global memory."""
    if m := re.search(r"\b(LDG|STG)((?:\.\w+)*)", line):
        bits = re.findall(r"\.[US]?(\d+)\b", m[2])
        return "load" if m[1] == "LDG" else "store", int(bits[-1]) // 8 if bits else 4
    if m := re.search(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)\b", line):
        return "load" if m[1] == "ld" else "store", int(m[2] or 1) * int(m[3]) // 8
    if m := re.search(r"\b(?:buffer|global|flat)_(load|store)_(dword|u?short|byte|ubyte)(?:x(\d))?", line):
        return m[1], {"dword": 4, "short": 2, "ushort": 2}.get(m[2], 1) * int(m[3] or 1)
    return None


def read_body(body: list[str]) -> dict:
    """Instructions, transcendental ones, and global memory traffic of one pass through a loop."""
    accesses = [access for line in body if (access := memory_access(line))]
    counts: dict[str, int] = {
        "instructions": len(body),
        "transcendental": sum(bool(re.search(r"\bMUFU|\bv_(exp|log|rcp|sqrt)_", line)) for line in body),
    }
    for kind in ("load", "store"):
        widths = [width for what, width in accesses if what == kind]
        counts |= {
            f"wide_{kind}_bytes": sum(w for w in widths if w >= 16),
            f"narrow_{kind}s": sum(w < 16 for w in widths),
        }
    return counts


def table(records: list[dict]) -> str:
    """Markdown: a row for every kernel and launch, a column for every target."""
    lines = [
        "# The kernels as machine code\n",
        f"Compiled without a GPU by `python benchmarks/compiled.py`, triton {triton.__version__}.",
        f"Logits of {ALIGNED_V} columns start every row at 16 bytes, of {ODD_V} anywhere; hidden states have {D}.\n",
        "In a cell: registers a thread; machine instructions an element in each loop, or in the whole kernel where it",
        "has none (only where they were disassembled); bytes spilled, if any; `narrow` where the large operand is not",
        "loaded 16 bytes at a time. Shared memory is in bytes, on sm_90.\n",
        f"| kernel | launch | warps | shared | {' | '.join(TARGETS)} |",
        "|---" * (4 + len(TARGETS)) + "|",
    ]
    rows: dict[tuple[str, str], dict[str, dict]] = {}
    for record in records:
        rows.setdefault((record["kernel"], record["launch"]), {})[record["target"]] = record
    for (kernel, launch), row in rows.items():
        shown = row.get("sm_90") or next(iter(row.values()))
        cells = [cell(row[target]) if target in row else "" for target in TARGETS]
        lines.append(f"| {kernel.strip('_')} | {launch} | {shown['warps']} | {shown['shared']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(record: dict) -> str:
    """Registers, instructions an element, spills and narrow accesses of one kernel on one target."""
    parts = [str(record["registers"])]
    if record["machine_code"]:
        parts.append(" + ".join(f"{body['instructions'] / record['elements']:.1f}" for body in record["bodies"]))
    if record["spilled_bytes"]:
        parts.append(f"{record['spilled_bytes']} spilled")
    if record["narrow"]:
        parts.append("narrow")
    return "; ".join(parts)


def main() -> None:
    """Compile everything on two processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the records here and not the table")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets kernels: unset it to compile them")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(2) as pool:
            records = [record for part in pool.map(compile_for, TARGETS) for record in part]
    if args.json:
        args.json.write_text(json.dumps(records))
    else:
        RESULT.write_text(table(records))


if __name__ == "__main__":
    main()
