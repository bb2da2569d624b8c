"""How every kernel is launched: one static table, nothing is tuned at run time.

    kernel         block   lanes/warp   warps   why
    row_pass        8192          512      16   one program a row: 51 registers a thread on sm_90, no spill on six GPUs
    row_gradient    4096          512       8   one program a block of a row: enough of them at any number of rows
    kl_pass         4096          512       8   two rows at once: half the row pass's block, for its registers
    column_pass     1024          256       4   sums of 64 rows in registers; a wider block spills its two sums
    indexed_dot     2048          512       4   one program a row of the hidden size
    scale_rows      4096          512       8   likewise, bound by memory
    sequence_pass   1024          256       4   one program a sequence: a loop of 1024 tokens

Registers, spills and load widths are read off the machine code (benchmarks/results/compiled.md); no timing chose these
numbers yet (benchmarks/results/README.md says which command will).
"""

from __future__ import annotations

from typing import NamedTuple

from simnpo.kernels.backend import triton


class Launch(NamedTuple):
    """Widest block of a kernel and the lanes each of its warps gets."""

    block: int
    lanes_per_warp: int

    def fit(self, size: int, at_least: int = 1) -> tuple[int, int]:
        """Block and number of warps for a dimension of `size`: the next power of two, up to the table's block."""
        block = min(max(triton.next_power_of_2(size), at_least), self.block)
        return block, max(1, block // self.lanes_per_warp)

    @property
    def num_warps(self) -> int:
        """Warps of the full block."""
        return self.block // self.lanes_per_warp


ROW_PASS = Launch(8192, 512)
ROW_GRADIENT = Launch(4096, 512)
KL_PASS = Launch(4096, 512)
COLUMN_PASS = Launch(1024, 256)
INDEXED_DOT = Launch(2048, 512)
SCALE_ROWS = Launch(4096, 512)
SEQUENCE_PASS = Launch(1024, 256)
