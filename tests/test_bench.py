"""bench.py: that the benchmarks run. What a run costs is tested in fake_plan.py."""

import math

import bench


def test_the_benchmarks_run(capsys):
    small = dict(frames=21, size="32x32", batch=2, micro=1, steps=1, repeats=1)
    bench.bench_train(bench.Config("train", **small))
    bench.bench_generate(bench.Config("generate", **small))
    printed = capsys.readouterr().out
    assert "2 clips of 24 tokens, 1 at a time" in printed and "2 videos of 21 frames" in printed
    assert math.isfinite(float(printed.split(" TFLOP/s")[0].rpartition(", ")[2]))
