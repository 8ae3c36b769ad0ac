"""bench.py: the plan of a real run, its numbers worked out by hand; and that the benchmarks run."""

import json
import math
import shutil
from collections import defaultdict, namedtuple
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from worlds import ROOT

import bench
import model
import toy
from common import UserError

PROMPTS = str(ROOT / "prompts.txt")
WEIGHTS_14B = 14_288_491_584


@pytest.fixture(scope="session")
def wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "wan"
    toy.make_wan(folder)
    return folder


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    toy.draw_videos(folder, [toy.draw_world(0, i) for i in range(4)], toy.FRAMES)
    return folder


@pytest.fixture
def wan_14b(wan, tmp_path):
    """A directory of the sizes of Wan2.1-T2V-14B, in shards whose weights are holes: they take no disk."""
    folder = tmp_path / "14b"
    shards = defaultdict(dict)
    sizes = model.Config(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    shutil.copytree(wan, folder)
    (folder / "config.json").write_text(json.dumps(asdict(sizes)))
    with torch.device("meta"):
        for name, weight in model.WanModel(sizes).state_dict().items():
            shards[".".join(name.split(".")[:2]) + ".safetensors"][name] = list(weight.shape)
    for file, shapes in shards.items():
        write_holes(folder / file, shapes)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {name: file for file, shapes in shards.items() for name in shapes}}))
    return folder


def write_holes(path, shapes):
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)


def config(wan, videos, out, **more):
    flags = dict(wan=str(wan), videos=str(videos), out=str(out), prompts=PROMPTS) | more
    return bench.Config("plan", **flags)


def plan(cfg, capsys):
    """What bench.py prints of a plan, and what it writes about the stages."""
    bench.plan(cfg)
    return capsys.readouterr().out, json.loads(Path(cfg.out, "plan.json").read_text())["stages"]


def disk(cfg) -> dict:
    return {name: stage(bench.read_run(cfg))[0] for name, stage in bench.STAGES.items()}


def test_the_plan_of_14b_without_a_gpu(wan_14b, videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measuring_device", lambda: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(10**13))
    cfg = config(wan_14b, videos, tmp_path / "run", train="--held-out 1", rollout="--count 3")
    printed, stages = plan(cfg, capsys)
    tokens = bench.read_run(cfg).tokens
    clip = 2 * 21 * 16 * 60 * 104 + 2 * tokens * 4096  # fp16 latents, bf16 text
    assert 4 <= tokens <= 6 and stages["prepare"] == [4 * clip, None]
    assert stages["rollout"] == stages["aggregate"] == [3 * 3 * clip, None]
    # 4 models, each fp32 weights and 2 checkpoints of weights and two moments; and a checkpoint being written
    assert stages["train"] == [4 * WEIGHTS_14B * (4 + 2 * 12) + WEIGHTS_14B * 12, None]
    # a bit a pixel; 50 s are 801 frames, or 201 latent ones
    assert stages["sample"] == [4 * 32 * 201 * 4 * 832 * 480 / 8, None]
    for part in ("4 of 4 videos", "4.23 MB", "14.29 G weights", "| train     |  1,771.8 |         - |",
                 "no GPU is here"):
        assert part in printed, part


def test_the_sizes_follow_from_the_directory_and_the_flags(wan, videos, tmp_path):
    cfg = config(wan, videos, tmp_path, rounds=2, baselines=True, seconds=5)
    facts = bench.read_run(cfg)
    assert facts.geometry == (32, 32, 81, 16) and facts.latents == (21, 16, 4, 4)
    assert facts.weights == sum(w.numel() for w in model.load(wan).state_dict().values())
    # models 0 to 2, and two more ways to sample model 0
    assert facts.methods == 5 and facts.videos == [21] * 32
    plain = disk(cfg)
    clip = 2 * 21 * 16 * 4 * 4 + 2 * facts.tokens * 64
    assert plain["prepare"] == 4 * clip and plain["rollout"] == 2 * clip, "of few clips one is rolled out"
    more = disk(config(wan, videos, tmp_path, rounds=2, seconds=5, train="--held-out 1 --ema 0.9 --keep 1",
                       prepare="--size 64x64 --frames 33", sample="--samples 2 --size 16x32"))
    assert more["prepare"] == 4 * (2 * 9 * 16 * 8 * 8 + 2 * facts.tokens * 64)
    assert more["rollout"] == 2 * 2 * more["prepare"] / 4
    assert more["train"] == 3 * facts.weights * (4 + 16) + facts.weights * 16
    assert more["sample"] == 3 * 64 * 21 * 4 * 16 * 32 / 8


def test_only_videos_that_are_there_count(wan, videos, tmp_path, capsys):
    rows = [("00000.mp4", "A disc"), ("00001.mp4", ""), ("gone.mp4", "A ring"), ("00002.mp4", "A ring")]
    table = videos / "metadata.csv"
    table.write_text("file_path,dense_caption\n" + "".join(f"{a},{b}\n" for a, b in rows))
    cfg = config(wan, videos, tmp_path / "run", prepare="--caption-key dense_caption")
    bench.plan(cfg)
    assert "2 of 4 videos" in capsys.readouterr().out
    table.write_text("file_path,dense_caption\ngone.mp4,A ring\n")
    with pytest.raises(UserError, match="1 videos; none of them is there"):
        bench.plan(cfg)


@pytest.mark.parametrize("more,message", [
    (dict(train="--bach 4"), "there is no flag --bach; did you mean --batch?"),
    (dict(wan="nowhere"), "nowhere"),
    (dict(videos=""), "needs --wan and --videos"),
    (dict(videos="nowhere"), "no such folder: nowhere"),
    (dict(prompts="none.txt"), "none.txt: no such file"),
])
def test_what_cannot_run_is_refused_before_it_starts(more, message, wan, videos, tmp_path):
    with pytest.raises(UserError) as error:
        bench.plan(config(**dict(wan=wan, videos=videos, out=tmp_path / "run") | more))
    assert message in str(error.value)


def test_the_hours_follow_from_what_is_measured(wan, videos, tmp_path, monkeypatch, capsys):
    """Every stage's own code runs; the clock says 2 s for what is timed first, 3 s for what is second."""
    def alternate(repeats, device, *functions):
        for function in functions:
            function()
        return [2.0, 3.0][:len(functions)]

    monkeypatch.setattr(bench, "alternate", alternate)
    monkeypatch.setattr(bench, "measuring_device", lambda: "cpu")
    cfg = config(wan, videos, tmp_path / "run", rounds=2, seconds=8, nproc="2", nodes=3, baselines=True,
                 train="--steps 10 --batch 8 --micro 2 --held-out 1", rollout="--count 2 --steps 6",
                 sample="--batch 2 --steps 4", eval="--batch 4")
    printed, stages = plan(cfg, capsys)
    seconds = {name: stage[1] for name, stage in stages.items()}
    assert seconds["prepare"] == 4 * (2 + 2 / 4), "encoding, and a share of 4 captions; reading is faster"
    assert seconds["train"] == 3 * 10 * 8 * 2 / 4, "a step of 2 x 2 clips took 2 s"
    assert seconds["rollout"] == 2 * 2 * (2 + 4 * 0.5), "half a second for each step beyond two"
    assert seconds["aggregate"] == 2 * 2 * (2 + 3 + 2 / 4), "encoding, decoding and a caption"
    # 33 latent frames: a window of 21 took (2 + 2 * 0.5) / 2 s, and by this clock a longer video as long; one
    # of 5 methods takes twice as long
    assert seconds["sample"] == pytest.approx(6 * 32 * 1.5 + 5 * 32 * 33 * 3 / 21)
    assert seconds["eval"] == 5 * 32 * 33 * 4 * 2 / 8, "8 frames took 2 s; reading 81 took no longer"
    total = sum(seconds.values())
    assert f"{total / 3600:,.1f} | {total / 3600 / 6:>10,.1f} |" in printed and "on 6 GPUs" in printed


def test_what_a_gpu_cannot_hold_has_no_hours(wan, videos, tmp_path, monkeypatch, capsys):
    def full(facts):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "measuring_device", lambda: "cpu")
    monkeypatch.setattr(bench, "STAGES", {"train": bench.plan_train})
    monkeypatch.setattr(bench, "time_training", full)
    printed, _ = plan(config(wan, videos, tmp_path / "run"), capsys)
    assert "| train     |      0.1 |         - |          - |" in printed and "does not fit" in printed


def test_a_plan_is_kept_but_the_disk_is_looked_at_anew(wan, videos, tmp_path, monkeypatch, capsys):
    cfg = config(wan, videos, tmp_path / "run")
    count = []
    measured = bench.measured
    monkeypatch.setattr(bench, "measured", lambda *given: count.append(given[0]) or measured(*given))
    first, again = (plan(cfg, capsys)[0].split("\ndisk")[0] for _ in range(2))
    assert count == list(bench.STAGES) and again == first

    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(10**6))
    with pytest.raises(UserError, match="GB too small"):
        bench.plan(cfg)
    last = tmp_path / "run" / "model_3" / "config.json"
    last.parent.mkdir()
    last.write_text("{}")
    bench.plan(cfg)  # all is trained: a full disk stops nobody from evaluating once more
    assert len(count) == len(bench.STAGES)
    (videos / "00003.mp4").unlink()
    bench.plan(cfg)
    assert len(count) == 2 * len(bench.STAGES), "other videos, another plan"


def test_missing_weights_are_named_and_stop_nobody(wan, videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    for name in ("amt-s.pth", "raft-things.pth", "ViT-L-14.pt"):
        (tmp_path / "weights" / name).touch()
    cfg = config(wan, videos, tmp_path / "run", eval=f"--weights {tmp_path / 'weights'}")
    printed, _ = plan(cfg, capsys)
    for part in ("lack these", "subject_consistency", "aesthetic_quality: sa_0_4_vit_l_14_linear.pth",
                 f"{tmp_path}/weights/musiq_spaq_ckpt-358bb6af.pth", "https://", "--weights DIR", "kept"):
        assert part in printed, part
    assert "motion_smoothness" not in printed and "dynamic_degree" not in printed
    monkeypatch.setattr(bench, "missing_weights", lambda weights: {})
    assert "lack these" not in plan(cfg, capsys)[0]


def test_the_benchmarks_run(capsys):
    small = dict(frames=21, size="32x32", batch=2, micro=1, steps=1, repeats=1)
    bench.bench_train(bench.Config("train", **small))
    bench.bench_generate(bench.Config("generate", **small))
    printed = capsys.readouterr().out
    assert "2 clips of 24 tokens, 1 at a time" in printed and "2 videos of 21 frames" in printed
    assert math.isfinite(float(printed.split(" TFLOP/s")[0].rpartition(", ")[2]))
