"""What the page of predicted and measured steps holds, on the smallest of its cases."""

import pytest

from simnpo.benchmarks import plan_accuracy


@pytest.mark.slow
def test_a_row_has_what_was_predicted_and_what_two_processes_took(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_accuracy, "CASES", plan_accuracy.CASES[:1])
    status = plan_accuracy.main(["--output", str(tmp_path / "plan.md")])
    page = (tmp_path / "plan.md").read_text(encoding="utf-8")
    cells = next(line for line in page.splitlines() if line.startswith("| 4 layers")).strip("|").split("|")
    mib, measured_mib, memory_ratio, seconds, measured_seconds, time_ratio = map(float, cells[3:])
    assert mib / measured_mib == pytest.approx(memory_ratio, abs=0.005)
    assert seconds / measured_seconds == pytest.approx(time_ratio, rel=0.02)
    # two steps of 1 + 1 thousand tokens through 7 million weights: not nothing, and not minutes
    assert 100 < measured_mib < 1000
    assert 0.05 < measured_seconds < 60
    assert status == int(abs(memory_ratio - 1) > 0.1)
