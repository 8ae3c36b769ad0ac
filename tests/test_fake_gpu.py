"""The code for GPUs, on a machine without one: fake_gpu.py, in a process of its own."""

import subprocess
import sys

from worlds import ENV, ROOT


def test_the_code_for_gpus_needs_no_gpu_to_be_tested():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/fake_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
