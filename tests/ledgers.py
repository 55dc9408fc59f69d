"""The allowed difference between a predicted ledger and the measured one of the same steps."""

import pytest


def assert_same(predicted, measured, peaks=0.01):
    """States must be equal to the byte, `peaks` within 1 % both ways (the CPU's libraries hide some allocations)."""
    assert predicted.parameters == measured.parameters
    states = [c for c in measured.categories_at_peak if c.startswith(("parameters", "gradients", "optimizer"))]
    for steps in ("phases", "first_step"):
        ours, theirs = getattr(predicted, steps), getattr(measured, steps)
        assert ours.keys() == theirs.keys()
        for phase, use in theirs.items():
            found = {c: ours[phase].categories[c] for c in states}
            assert found == {c: use.categories[c] for c in states}, f"{steps}, {phase}"
            assert ours[phase].allocated_peak_bytes == pytest.approx(use.allocated_peak_bytes, rel=peaks), (
                f"{steps}, {phase}"
            )
    assert predicted.allocated_bytes == pytest.approx(measured.allocated_bytes, rel=peaks)
    assert (predicted.host_bytes, predicted.nvme_bytes) == (measured.host_bytes, measured.nvme_bytes)
