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


def test_where_the_time_went(tmp_path, capsys):
    (tmp_path / "times.txt").write_text(
        "0\ta toy world\n6\tround 0 of 1: train model_0\n26\tround 0 of 1: roll model_0 out\n"
        "30\tround 1 of 1: train model_1\n60\tdone: open it\n")
    bench.show_times(bench.Config("times", out=str(tmp_path)))
    printed = capsys.readouterr().out
    assert printed.startswith("60 s in all\n") and "| `train_df.py` | 2 | 25 | 50 | 83% |" in printed
