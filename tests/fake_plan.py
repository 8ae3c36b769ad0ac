"""plan.py: sizes, disk and hours worked out by hand, and what it refuses. test_fake_gpu.py runs this file in
a process of its own, since it needs a device that cannot be unregistered."""

import json
import math
import shutil
from collections import defaultdict, namedtuple
from dataclasses import asdict
from pathlib import Path

import pytest
import test_vbench
import torch
from worlds import ROOT

import bench
import metrics
import model
import plan
import predict
import toy
import vbench
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


# few frames and solver steps: the arithmetic is the same
FEW = dict(prepare="--frames 33", train="--held-out 1 --preview-every 0", rollout="--steps 1", seconds=3,
           sample="--steps 1")


def config(wan, videos, out, **more):
    flags = dict(what="plan", wan=str(wan), videos=str(videos), out=str(out), prompts=PROMPTS) | more
    return bench.Plan(**flags)


def printed_by(cfg, capsys) -> tuple[str, dict]:
    """What bench.py prints of a plan, and what it keeps, by stage."""
    plan.main(cfg)
    stages = json.loads(Path(cfg.out, "plan.json").read_text())["stages"]
    return capsys.readouterr().out, {stage["stage"]: stage for stage in stages}


def test_disk_of_14b_follows_from_the_formats(wan_14b, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "line", lambda facts, stage, unit, count, disk, spent: plan.Stage(
        stage, unit, count, disk, {}, {}))
    for name in ("text", "vae_work", "generated"):
        monkeypatch.setattr(plan, name, lambda *given, **more: predict.Prediction(
            dict.fromkeys((*predict.KINDS, "all"), 0), []))
    monkeypatch.setattr(plan, "training", plan.generated)
    train = "--held-out 1 --preview-every 0"
    cfg = config(wan_14b, videos, tmp_path / "run", train=train, rollout="--count 3")
    facts = plan.read_run(cfg)
    disk = {stage.stage: stage.disk for stage in plan.predicted(facts)}
    clip = 2 * 21 * 16 * 60 * 104 + 2 * facts.tokens * 4096  # fp16 latents, bf16 text
    assert 4 <= facts.tokens <= 6 and facts.weights == WEIGHTS_14B and disk["prepare"] == 4 * clip
    assert disk["rollout"] == disk["aggregate"] == 3 * 3 * clip
    # 4 models, each fp32 weights and 2 checkpoints of weights and two moments; and a checkpoint being written
    assert disk["train"] == 4 * WEIGHTS_14B * (4 + 2 * 12) + WEIGHTS_14B * 12
    # a bit a pixel; 50 s are 801 frames, or 201 latent ones
    assert disk["sample"] == 4 * 32 * 201 * 4 * 832 * 480 / 8


def test_the_sizes_follow_from_the_directory_and_the_flags(wan, videos, tmp_path):
    facts = plan.read_run(config(wan, videos, tmp_path, rounds=2, baselines=True, seconds=5))
    assert facts.geometry == (32, 32, 81, 16) and facts.latents == (21, 16, 4, 4)
    assert facts.weights == sum(w.numel() for w in model.load(wan).state_dict().values())
    # models 0 to 2, and two more ways to sample model 0
    assert facts.methods == 5 and facts.videos == [21] * 32
    assert facts.rollouts == 1, "of few clips one is rolled out"
    more = plan.read_run(config(wan, videos, tmp_path, prepare="--size 64x64 --frames 33", nproc="4", nodes=2,
                                sample="--samples 2 --size 16x32", train="--held-out 1", lora_rank=8))
    assert more.latents == (9, 16, 8, 8) and len(more.videos) == 64 and more.gpus == 8 and more.rollouts == 2
    assert more.train.lora_rank == 8 and plan.as_sampled(more).latents == (9, 16, 4, 2)


def test_only_videos_that_are_there_count(wan, videos, tmp_path):
    rows = [("00000.mp4", "A disc"), ("00001.mp4", ""), ("gone.mp4", "A ring"), ("00002.mp4", "A ring")]
    table = videos / "metadata.csv"
    table.write_text("file_path,dense_caption\n" + "".join(f"{a},{b}\n" for a, b in rows))
    cfg = config(wan, videos, tmp_path / "run", prepare="--caption-key dense_caption")
    facts = plan.read_run(cfg)
    assert (facts.count, facts.listed) == (2, 4)
    table.write_text("file_path,dense_caption\ngone.mp4,A ring\n")
    with pytest.raises(UserError, match="1 videos; none of them is there"):
        plan.read_run(cfg)


@pytest.mark.parametrize("more,message", [
    (dict(train="--bach 4"), "there is no flag --bach"),
    (dict(wan="nowhere"), "nowhere"),
    (dict(videos="nowhere"), "no such folder: nowhere"),
    (dict(prompts="none.txt"), "none.txt: no such file"),
])
def test_what_cannot_run_is_refused_before_it_starts(more, message, wan, videos, tmp_path, capsys):
    with pytest.raises((UserError, SystemExit)) as error:
        plan.main(config(**dict(wan=wan, videos=videos, out=tmp_path / "run") | more))
    assert message in str(error.value) + capsys.readouterr().err


def test_the_plan_of_a_run(wan, videos, tmp_path, monkeypatch, capsys):
    """Kept, but for free disk space; hours are seconds times how often."""
    cfg = config(wan, videos, tmp_path / "run", gpus=2, rounds=1, **FEW)
    printed, stages = printed_by(cfg, capsys)
    assert list(stages) == ["prepare", "train", "rollout", "aggregate", "sample", "eval"]
    assert [stage["count"] for stage in stages.values()] == [4, 2 * 16000, 2, 2, 2 * 32, 2 * 32 * 15 * 4]
    total = 0
    for stage in stages.values():
        assert sum(stage["peak"][kind] for kind in predict.KINDS) == pytest.approx(stage["peak"]["all"])
        both = stage["seconds"]["compute"] + stage["seconds"]["memory"] + stage["seconds"]["network"]
        assert 0 < stage["seconds"]["all"] <= both
        total += stage["count"] * stage["seconds"]["all"] * stage["together"] / 3600
    assert stages["train"]["together"] == 2 and f"| {total:,.0f} | {total / 2:,.0f} |" in printed
    for part in ("4 of 4 videos", "2 x h100 on 1 machine", "attention 346", "GB/s of memory 2,680"):
        assert part in printed, part

    monkeypatch.setattr(plan, "predicted", lambda facts: pytest.fail("it is known"))
    assert printed_by(cfg, capsys)[0].split("\ndisk")[0] == printed.split("\ndisk")[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(10**6))
    with pytest.raises(UserError, match="GB too small"):
        plan.main(cfg)
    last = tmp_path / "run" / "model_1" / "config.json"
    last.parent.mkdir()
    last.write_text("{}")
    plan.main(cfg)  # all is trained: a full disk stops nobody from evaluating once more
    (videos / "00003.mp4").unlink()
    with pytest.raises(pytest.fail.Exception, match="it is known"):
        plan.main(cfg)  # other videos, another plan


def test_missing_weights_are_named_and_stop_nobody(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("amt-s.pth", "raft-things.pth", "ViT-L-14.pt"):
        (tmp_path / name).touch()
    plan.print_missing(plan.missing_weights(str(tmp_path)))
    printed = capsys.readouterr().out
    for part in ("lack these", "subject_consistency", "aesthetic_quality: sa_0_4_vit_l_14_linear.pth",
                 f"{tmp_path}/musiq_spaq_ckpt-358bb6af.pth", "https://", "--weights DIR", "kept"):
        assert part in printed, part
    assert "motion_smoothness" not in printed and "dynamic_degree" not in printed
    plan.print_missing({})
    assert not capsys.readouterr().out


def test_what_vbenchs_networks_take():
    for dimension, (paths, network) in vbench.NETWORKS.items():
        windows = len(metrics.VBENCH[dimension][1](16)[0])
        at_once = 32 if windows == 1 else 4
        with predict.faked() as device, torch.no_grad():
            weights = [{name: torch.zeros(shape, device=device)
                        for name, shape in test_vbench.PUBLISHED[names[0]].items()} for names in paths]
            frames = [torch.zeros(at_once, 3, 480, 832, dtype=torch.uint8, device=device)] * windows
            with predict.Tracker(device, weights=[w for part in weights for w in part.values()]) as tracker:
                network(*weights, *frames)
        peak, known = tracker.peak(), plan.SCORING[dimension]
        assert sum(w.flops for w in tracker.work) / at_once == pytest.approx(known.flops, rel=0.01)
        assert sum(w.bytes for w in tracker.work) / at_once == pytest.approx(known.moved, rel=0.01)
        assert peak["weights"] == pytest.approx(known.weights, rel=0.03)
        assert peak["temporaries"] == pytest.approx(known.temporaries, rel=0.03)


def test_the_answers_of_the_readme():
    """Does training fit? On 8 GPUs 14B does without previews; its LoRA does on one."""
    def needed(size, gpus, *flags):
        cfg = bench.Plan("plan", size=size, gpus=gpus, prompts=PROMPTS, train=" ".join(flags))
        return plan.plan_train(plan.read_run(cfg)).peak["all"] / 1e9

    silent = "--preview-every 0"
    assert 30 < needed("1.3B", 1, silent) < 40
    assert 70 < needed("14B", 8, silent) < 79
    assert 60 < needed("14B", 1, "--lora-rank 64", silent) < 79
