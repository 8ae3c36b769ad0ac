"""Stage 2: which clips it picks, the rollouts, that ranks, batches and kills change nothing, refusals."""

import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import worlds
from safetensors.torch import load_file
from worlds import refused, tree

import common
import data
import diffusion
import model
import rollout
import toy
import vae as wan_vae
from common import UserError

FRAMES = 9  # latent: a real chunk and two to make
SEEDS = 7


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """wan/, model/ that names it, and agg_0/ with 7 seed clips of noise and 2 corrective ones in between."""
    root = tmp_path_factory.mktemp("world")
    toy.make_wan(root / "wan")
    model.save(worlds.tiny_model("rollout", text_len=8), root / "model", wan="../wan")
    fill(root / "agg_0", root / "wan")
    return root


def fill(folder, wan, frames=FRAMES, channels=16, text_dim=64, kinds="scsssscss"):
    kinds = [{"s": "seed", "c": "corrective"}[kind] for kind in kinds]
    worlds.fill_store(folder, kinds, (frames, channels, 4, 4), text_dim, wan=str(wan),
               vae=common.fingerprint(*wan_vae.find(wan)[0]), t5="t5")


@pytest.fixture
def make(world, tmp_path, monkeypatch):
    """Runs rollout.main in tmp_path and returns the folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rollout.py", "--made", "by a test"])

    def run(**flags):
        flags = dict(model=str(world / "model"), data=str(world / "agg_0"), out="rollout_0", count=5, steps=2,
                     held_out=0, previews=0, device="cpu") | flags
        worlds.run_stage(rollout, rollout.Config(**flags))
        return Path(flags["out"])
    return run


# ----------------------------------------------------------------------------------- the store it makes

def test_a_rollout_is_a_real_chunk_and_what_the_model_makes_of_it(world, make):
    out = make(round=3, seed=5, guidance=2.0)
    clips = data.Clips(world / "agg_0")
    seeds = {clip["id"]: i for i, clip in enumerate(clips)}
    net = model.load(world / "model")
    null = data.read_text_embedding(world / "agg_0/empty.safetensors")
    made = data.Clips(out)
    assert len(made) == 5 and set(made.kinds) == {"rollout"}
    for j in range(5):
        got = made.load(j)
        seed = clips.load(seeds[got["source"]])
        assert got["id"] == f"{seed['id']}-round3" and got["round"] == 3 and got["prompt"] == seed["prompt"]
        assert torch.equal(got["text"], seed["text"]) and got["latents"].dtype == torch.float16
        assert torch.equal(got["latents"][:3], seed["latents"][:3]), "real, to the bit"
        chunks = diffusion.generate(
            net, [seed["text"]], null, diffusion.Sampling(2, guidance=2.0), shape=(16, 4, 4), frames=FRAMES,
            seed=5, ids=[(3, seed["id"])], context=seed["latents"][None, :3])
        expected = torch.cat([latents for _, latents in chunks], 1)[0]
        assert torch.equal(got["latents"], expected.half())
        assert not torch.allclose(got["latents"][3:].float(), seed["latents"][3:].float(), atol=0.5)
        about = {"prompt": seed["prompt"], "source": seed["id"], "crc32": got["crc32"]}
        assert common.open_weights(made.locate(got))[1] == about


def test_meta_says_how_it_was_made(world, make):
    meta = json.loads((make(round=1) / "meta.json").read_text())
    before = json.loads((world / "agg_0/meta.json").read_text())
    assert {k: meta[k] for k in data.SHARED} == {k: before[k] for k in data.SHARED}
    del before["seed"]
    assert meta == before | {
        "data": str(world / "agg_0"), "data_fingerprint": common.fingerprint(world / "agg_0/index.jsonl"),
        "model": str(world / "model"),
        "model_fingerprint": common.fingerprint(world / "model/diffusion_pytorch_model.safetensors"),
        "seed": 0, "round": 1, "count": 5, "held_out": 0, "steps": 2, "guidance": 6.0,
        "shift": 8.0, "solver": "euler", "route": None, "dtype": "float32",
        "command": ["rollout.py", "--made", "by a test"]}


@pytest.mark.parametrize("flags", [dict(steps=3), dict(guidance=1.0), dict(shift=2.0), dict(solver="unipc"),
                                   dict(seed=1), dict(round=1)])
def test_every_flag_changes_the_rollouts(make, flags):
    before, after = data.Clips(make()), data.Clips(make(out="other", count=SEEDS, **flags))
    made = {clip["source"]: i for i, clip in enumerate(after)}
    first = before.load(0)
    second = after.load(made[first["source"]])
    assert not torch.equal(first["latents"][3:], second["latents"][3:])


def test_a_model_never_trained_chunk_by_chunk_is_named(world, make, tmp_path, capsys):
    make(count=1)
    assert "warning" not in capsys.readouterr().out
    model.save(model.load(world / "model"), tmp_path / "whole", wan=str(world / "wan"), mode="full")
    make(count=1, model="whole", out="other", round=0)
    assert "warning: whole was never trained to make videos chunk by chunk" in capsys.readouterr().out


def sources(out):
    return [clip["source"] for clip in data.Clips(out)]


def test_the_picks(world, make):
    every = sources(make(count=SEEDS, out="all"))
    assert sorted(every) == [f"c{i}" for i in (0, 2, 3, 4, 5, 7, 8)], "seed clips, each once"
    assert sources(make(count=None, out="half")) == every[:3], "half of 7"
    assert sources(make(count=5)) == every[:5], "of one order, whatever the count"
    others = [sources(make(count=SEEDS, out=f"{flag}{n}", **{flag: n})) for flag in ("seed", "round")
              for n in (1, 2)]
    assert len({tuple(order) for order in [every, *others]}) == 5
    small, large = tree(Path("half")), tree(Path("all"))
    clips = {name for name in small if name.startswith("clips/")}
    assert len(clips) == 3 and all(small[name] == large[name] for name in clips)


def test_any_store_that_holds_the_seed_clips_will_do(world, make, monkeypatch):
    """agg_1 refers to agg_0's clips and lists corrective ones: the same picks, the same rollouts."""
    agg_1 = world / "agg_1"
    agg_1.mkdir()
    for name in ("meta.json", "empty.safetensors"):
        (agg_1 / name).write_bytes((world / "agg_0" / name).read_bytes())
    old = [clip | {"file": f"../agg_0/{clip['file']}"} for clip in data.Clips(world / "agg_0")]
    data.write_index(agg_1, old + [old[0] | {"id": "new", "kind": "corrective"}])
    one, two = tree(make()), tree(make(data=str(agg_1), out="other"))
    assert one.pop("meta.json") != two.pop("meta.json") and one == two


def test_the_report(world, make, capsys):
    """A line a chunk, averaged over all rollouts; a film strip of the first ones."""
    out = make(previews=3)
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("chunk"))
    latents = torch.stack([data.Clips(out).load(j)["latents"].float() for j in range(5)])
    for chunk, line in enumerate(lines[at + 1:at + 4]):
        x = latents[:, 3 * chunk:3 * chunk + 3].flatten(1)
        number, mean, std, outside = line.replace("%", "").split()
        assert int(number) == chunk
        expected = x.mean().item(), x.std(1).mean().item(), 100 * (x.abs() > 3).float().mean().item()
        assert (float(mean), float(std), float(outside)) == pytest.approx(expected, abs=6e-3)
    assert lines[at + 4:] == ["5 rollouts in rollout_0, shown in rollout_0/preview.png"]
    [strip] = data.read_image(out / "preview.png")
    assert strip.shape == (3, 3 * 132, 8 * 132)
    video = wan_vae.load(world / "wan").decode(latents[2:3])[0]
    data.film_strip("expected.png", [video[[0, 5, 9, 14, 18, 23, 27, 32]]], height=128)
    assert torch.equal(strip[:, 264:], data.read_image("expected.png")[0])
    assert not (make(out="none") / "preview.png").exists()


# -------------------------------------------------------------- batches, ranks, kills and repeated runs

def test_batches_change_rounding_alone(make):
    alone = data.Clips(make())
    for batch in (3, 9):
        together = data.Clips(make(batch=batch, out=str(batch)))
        assert [c | {"crc32": 0} for c in together] == [c | {"crc32": 0} for c in alone]
        for j in range(len(alone)):
            a, b = (clips.load(j)["latents"].float() for clips in (alone, together))
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)  # fp16 on disk: 1e-3 and 5e-4


def test_a_batch_with_anything_missing_is_made_again_as_a_whole(make, monkeypatch):
    out = make(batch=2)
    made = []
    whole = tree(out)
    data.clip_file(out, data.Clips(out)[3]["id"]).unlink()
    roll_out = rollout.roll_out
    monkeypatch.setattr(rollout, "roll_out", lambda cfg, net, clips, null: made.append(
        [clip["id"] for clip in clips]) or roll_out(cfg, net, clips, null))
    kept = data.clip_file(out, data.Clips(out)[2]["id"])
    time_before = kept.stat().st_mtime_ns
    make(batch=2)
    assert made == [[clip["source"] for clip in data.Clips(out)][2:4]], "2 and 3 share a batch"
    assert tree(out) == whole and kept.stat().st_mtime_ns == time_before


def test_neighbours_are_found(world, make, tmp_path):
    shutil.copytree(world / "model", "run/model_2")
    shutil.copytree(world / "agg_0", "run/agg_0")
    worlds.call("rollout.py", "--model", "run/model_2/", "--steps", 1, "--previews", 0, "--held-out", 2,
         "--wan", world / "wan")
    made = data.Clips("run/rollout_2")
    assert [clip["round"] for clip in made] == [2] * 3
    errors = worlds.call("rollout.py", "--model", world / "model", "--data", "run/agg_0", code=2).stderr
    assert "does not end in a round's number" in errors and errors.endswith("give --out DIR\n")


def test_held_out_clips_are_never_rolled_out(world, make):
    clips = data.Clips(world / "agg_0")
    unseen = {clips[i]["id"] for i in data.held_out(clips, 3)}
    for round in range(4):
        picked = sources(make(out=f"r{round}", round=round, held_out=3, count=4, steps=1))
        assert len(picked) == 4 and not unseen & set(picked)
        anybody = sources(make(out=f"a{round}", round=round, count=SEEDS, steps=1))
        assert picked == [id for id in anybody if id not in unseen], "else in the same order"
    with pytest.raises(UserError, match="7 seed clips, 7 of them held out .--held-out."):
        make(out="none", held_out=None)
    model.save(model.load(world / "model"), "model_0", held_out=2)  # as train_df.py writes it
    assert len(data.Clips(make(model="model_0", held_out=None, out="b"))) == 5
    with pytest.raises(UserError, match="7 seed clips, 2 of them held out"):
        make(model="model_0", held_out=None, out="c", count=6)


def test_torchrun_leaves_no_trace(world, make):
    done = worlds.call("rollout.py", "--model", world / "model", "--data", world / "agg_0", "--out", "two",
                "--count", 5, "--steps", 2, "--previews", 1, "--batch", 2, "--held-out", 0, ranks=2)
    assert "5 of 7 seed clips; 3 to roll out on this rank, the first of 2" in done.stdout
    assert worlds.tree_but_command("two") == worlds.tree_but_command(make(batch=2, previews=1))
    assert json.loads(Path("two/meta.json").read_text())["command"][1] == "--model"


@pytest.mark.parametrize("count,ranks", [(5, 3), (1, 2)])
def test_ranks_leave_no_trace(world, make, count, ranks):
    worlds.fork_ranks(ranks, functools.partial(make, out="shared", count=count, batch=2))
    assert tree("shared") == tree(make(count=count, batch=2))


def check_what_is_there(out):
    """A reader meets whole files only, and an index when all of them are there."""
    for file in Path(out).glob("clips/[!.]*"):
        assert load_file(file)["latents"].shape[0] == FRAMES
    if (Path(out) / "index.jsonl").exists():
        assert len(set(clip["id"] for clip in data.Clips(out))) == 5


def test_killed_before_each_of_its_files(world, make):
    """Each process dies before its second file is in its place, so each gets one file further."""
    whole = tree(make())

    def patch():
        replaced = []
        replace = os.replace

        def dying(source, target):
            if len(replaced) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            replaced.append(replace(source, target))
        os.replace = dying
    kills = 0
    while worlds.dies(patch, functools.partial(make, out="killed")):
        kills += 1
        check_what_is_there("killed")
    assert kills == 6  # meta.json, 5 clips, and index.jsonl is the 7th file
    assert tree("killed") == whole


def test_killed_at_any_time(world, make):
    began = time.monotonic()
    whole = tree(make(batch=2))
    duration = time.monotonic() - began
    times = random.Random(0)
    for n in range(2):
        again = functools.partial(make, out=f"killed{n}", batch=2)
        for _ in range(3):
            worlds.fork_and_kill(times.uniform(0, duration), again)
            check_what_is_there(f"killed{n}")
        assert tree(again()) == whole


def test_what_is_there_is_not_made_again(make, capsys, monkeypatch):
    out = worlds.lose_a_clip(make)
    assert "5 of 7 seed clips; 1 to roll out\n" in capsys.readouterr().out
    before = tree(out)
    monkeypatch.setattr(model, "load", None)  # nothing to do: no model is needed
    make()
    assert tree(out) == before


# --------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("flags,message", [
    (dict(seed=1), "seed = 0, not 1"), (dict(count=4), "count = 5, not 4"),
    (dict(steps=3), "steps = 2, not 3"),
    (dict(guidance=1.0), "guidance = 6.0, not 1.0"), (dict(shift=3.0), "shift = 8.0, not 3.0"),
    (dict(solver="unipc"), "solver = euler, not unipc"), (dict(round=2), "round = 0, not 2"),
    (dict(dtype="bfloat16"), "dtype = float32, not bfloat16")])
def test_a_folder_keeps_to_how_it_was_begun(make, flags, message):
    make()
    with refused(f"rollout_0 was begun with {message}; choose another --out"):
        make(**flags)


def test_another_model_or_other_data_are_told_apart(world, make, tmp_path):
    """Even under the same name."""
    net = model.load(world / "model")
    model.save(net, "model", wan=str(world / "wan"))
    fill(Path("agg"), world / "wan")
    flags = dict(model="model", data="agg")
    make(**flags)
    net.head.head.bias.data += 1
    model.save(net, "model", wan=str(world / "wan"))
    with pytest.raises(UserError, match="begun with model_fingerprint = "):
        make(**flags)
    fill(Path("agg"), world / "wan", kinds="ssssss")
    model.save(model.load(world / "model"), "model", wan=str(world / "wan"))
    with pytest.raises(UserError, match="begun with data_fingerprint = "):
        make(**flags)


@pytest.mark.parametrize("store,message", [
    (dict(kinds="cc"), "--count 1: stores/.* has 0 seed clips"),
    (dict(kinds="scs", count=3), "--count 3: stores/.* has 2 seed clips"),
    (dict(kinds="ss", count=0), "--count 0: "), (dict(kinds="ss", count=-1), "--count -1: "),
    (dict(frames=3), "clips of 3 latent frames; rollouts need multiples of 3, at least 6"),
    (dict(frames=7), "clips of 7 latent frames"),
    (dict(channels=8), "latents of 8 channels and text of width 64; .*model takes 16 and 64"),
    (dict(text_dim=32), "latents of 16 channels and text of width 32; .*model takes 16 and 64")])
def test_data_that_does_not_fit(world, make, store, message):
    count = store.pop("count", None)
    fill(Path("stores/agg"), world / "wan", **store)
    with refused(message):
        make(data="stores/agg", count=count)


@pytest.mark.parametrize("flags,message", [
    (dict(model="nowhere"), "--model nowhere does not exist; train_df.py makes one"),
    (dict(model="."), "looked for diffusion_pytorch_model"),
    (dict(model=".", out=None), "no transformer in "), (dict(data="nowhere"), "not a clip store"),
    (dict(wan="nowhere"), "no VAE in nowhere"), (dict(batch=0), "--batch 0: give a whole number"),
    (dict(steps=0), "--steps 0"), (dict(previews=-1), "--previews -1: ")])
def test_refusals(make, flags, message):
    with refused(message):
        make(**flags)


def test_a_store_without_the_empty_prompt(world, make):
    fill(Path("agg"), world / "wan")
    Path("agg/empty.safetensors").unlink()
    with pytest.raises(UserError, match="agg/empty.safetensors is missing, the embedding of the empty"):
        make(data="agg")


def test_another_vae(world, make, tmp_path):
    other = wan_vae.load(world / "wan")
    other.conv2.bias.data += 1
    (tmp_path / "wan").mkdir()
    wan_vae.save(other, tmp_path / "wan/vae.safetensors")
    with pytest.raises(UserError, match="wan has another vae than .*agg_0 was made with; give --wan /"):
        make(wan="wan")
    model.save(model.load(world / "model"), "model", wan="../wan")  # beside the model, which says so
    with pytest.raises(UserError, match="/wan has another vae"):
        make(model="model")
    model.save(model.load(world / "model"), "model")  # does not say; the data does
    assert len(data.Clips(make(model="model"))) == 5


def test_a_prompt_too_long_for_the_model(world, make):
    fill(Path("agg"), world / "wan", kinds="s")
    data.write_clip("agg", "c0", torch.zeros(FRAMES, 16, 4, 4), torch.zeros(9, 64), "long", "c0.mp4")
    with pytest.raises(UserError, match="prompt of clip c0 is 9 tokens; .*model takes 8 at most"):
        make(data="agg", count=1)


def test_a_broken_model_does_not_reach_the_data(world, make):
    net = model.load(world / "model")
    net.head.head.bias.data += 1e9
    model.save(net, "model", wan=str(world / "wan"))
    with pytest.raises(UserError, match="the latents of clip .*: NaN or infinite values"):
        make(model="model")
    assert not list(Path("rollout_0/clips").iterdir())


def test_a_full_disk_keeps_what_is_done(make):
    whole = tree(make())
    with worlds.disk_full_after(2):
        make(out="full")
    assert not Path("full/index.jsonl").exists()
    assert tree(make(out="full")) == whole


def test_the_command_line(world, tmp_path):
    errors = worlds.call("rollout.py", "--model", tmp_path / "none", "--data", world / "agg_0",
                  "--out", tmp_path / "out", code=2).stderr
    assert errors.startswith("rollout.py: --model ") and len(errors.splitlines()) == 1
