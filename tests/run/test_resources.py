import os

import pytest
import torch
from forked_program import forked

from moco.run.resources import available_cores, peak_megabytes


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", None), ("100000 100000", 1), ("50000 100000", 1), ("800000000 100000", None)],
)
def test_cores_respect_affinity_and_control_group(tmp_path, quota, cores):
    allowed = len(os.sched_getaffinity(0))
    assert available_cores(tmp_path) == allowed  # without a limit
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert available_cores(tmp_path) == (cores or allowed)


def test_peak_memory_is_that_of_the_process_in_megabytes():
    def main():
        held, start = [], peak_megabytes(torch.device("cpu"))
        before = start
        while before == start:  # until beyond the peak of the process that was forked
            held.append(torch.ones(25_000_000))
            before = peak_megabytes(torch.device("cpu"))
        held.append(torch.ones(50_000_000))
        print(peak_megabytes(torch.device("cpu")) - before)

    pid, output = forked(main, (1, 2))
    assert 100 < float(output.read()) < 300 and os.waitpid(pid, 0)[1] == 0
