"""The code for GPUs, and the plan for them, on a machine without one: each in a process of its own."""

import subprocess
import sys

import pytest
from worlds import ENV, ROOT


@pytest.mark.parametrize("file", ["fake_gpu.py", "fake_plan.py"])
def test_the_code_for_gpus_needs_no_gpu_to_be_tested(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"tests/{file}"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
