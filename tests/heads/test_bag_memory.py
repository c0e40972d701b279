"""A slide of 200,000 patches x 1024 numbers is trained on in 4 GB, the bag among them; TransMIL's has 100,000."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.heads.bag_memory import HEADS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_a_step_on_a_long_bag_takes_no_more_than_4_gb(head: str) -> None:
    patches = "100000" if head == "transmil" else "200000"
    # Blocks below glibc's threshold, which grows to 32 MB, stay with the process once freed; without this the peak is
    # of what its heap ever had side by side, up to twice what is in use.
    own = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-m", "tests.heads.bag_memory", head, patches, "1024"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, check=True)
    assert float(run.stdout) <= 4.0
