"""Stage 3: the frame map, clips by reference, prompts, ablations, ranks, kills and refusals."""

import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
import worlds
from worlds import refused, tree

import aggregate
import common
import data
import files
import model
import prepare
import rollout
import t5
import toy
import vae as wan_vae
from aggregate import TEMPLATE
from common import UserError

FRAMES, LATENTS = 21, 6
CLIPS, ROLLOUTS = 4, 3


def run(stage, **flags):
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in flags.items()}
    worlds.run_stage(stage, stage.Config(**flags, device="cpu"))


def roll(root, k, **flags):
    run(rollout, **dict(model=root / "model", data=root / f"agg_{k}", out=root / f"rollout_{k}", round=k,
                        count=ROLLOUTS, steps=1, previews=0, held_out=0) | flags)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The toy's videos and wan/, an untrained model/, agg_0/ and rollout_0/. Tests work on copies."""
    root = tmp_path_factory.mktemp("first")
    toy.make_wan(root / "wan")
    for i in range(CLIPS):
        world = toy.draw_world(0, i)
        path = root / "videos" / f"{i}.mp4"
        path.parent.mkdir(exist_ok=True)
        data.write_video(path, [toy.render(world, FRAMES + 8)], toy.FPS, crf=8)
        files.write_text(path.with_suffix(".txt"), toy.caption(world))
    model.save(worlds.tiny_model("aggregate"), root / "model", wan="../wan")
    run(prepare, videos=root / "videos", wan=root / "wan", out=root / "agg_0", frames=FRAMES)
    roll(root, 0)
    return root


@pytest.fixture
def work(first, tmp_path, monkeypatch):
    """A folder with agg_0/ and rollout_0/, which a test may change."""
    for name in ("agg_0", "rollout_0"):
        shutil.copytree(first / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["aggregate.py", "--made", "by a test"])
    return tmp_path


def make(k=0, **flags):
    flags = dict(data=f"agg_{k}", rollouts=f"rollout_{k}", out=f"agg_{k + 1}") | flags
    run(aggregate, **flags)
    return Path(flags["out"])


# ---------------------------------------------------------------------------------------- the frame map

class Tags:
    """A lossless codec of 1 + 4n frames, each frame being its number: latent n is what it holds, in order."""

    def decode(self, z):  # [B,F,4,1,1] -> [B,T,3,1,1]
        frames = torch.cat([z[:, :1, :1], z[:, 1:].flatten(1, 2).unsqueeze(2)], 1)
        return frames.expand(-1, -1, 3, 1, 1).clone()

    def encode(self, video):
        tags = video[:, :, 0]  # [B,T,1,1]
        start = torch.full_like(tags[:, :1].expand(-1, 4, 1, 1), -1).clone()
        start[:, 0] = tags[:, 0]
        return torch.cat([start.unsqueeze(1), tags[:, 1:].unflatten(1, (-1, 4))], 1)


def tagged(frames) -> torch.Tensor:
    return Tags().encode(torch.arange(frames).float().view(1, -1, 1, 1, 1).expand(1, -1, 3, 1, 1))


def held(latents) -> list[list[int]]:
    return [[int(tag) for tag in z.flatten() if tag >= 0] for z in latents[0]]


def test_which_frames_a_reversed_latent_holds():
    forward = held(tagged(81))
    assert forward[:4] == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]] and len(forward) == 21
    backward = held(aggregate.reverse(tagged(81), Tags()))
    assert backward[0] == [80] and len(backward) == 21
    for n in range(1, 21):
        assert backward[n] == [84 - 4 * n - i for i in (1, 2, 3, 4)]
    assert (backward[1], backward[11], backward[12]) == ([79, 78, 77, 76], [39, 38, 37, 36], [35, 34, 33, 32])
    real = set(range(9))  # the pixels of the first chunk
    assert backward[18:] == [[11, 10, 9, 8], [7, 6, 5, 4], [3, 2, 1, 0]]
    assert [len(real & set(z)) for z in backward] == [0] * 18 + [1, 4, 4]
    chunks = [sum(backward[i:i + 3], []) for i in range(0, 21, 3)]
    assert [(c[0], c[-1]) for c in chunks] == [(80, 72), (71, 60), (59, 48), (47, 36), (35, 24), (23, 12),
                                               (11, 0)]
    assert sum(chunks[:4], []) == list(range(80, 35, -1)), "the clean prefix"


def test_flipped_latents_are_something_else():
    """The single frame comes last, and each latent's 4 frames still run forward."""
    flipped = held(aggregate.reverse(tagged(81), Tags(), flip="latents"))
    assert flipped[0] == [77, 78, 79, 80] and flipped[-1] == [0]
    backward = held(aggregate.reverse(tagged(81), Tags()))
    assert not any(z in backward for z in flipped[:-1])


def test_pasted_pixels_go_where_the_first_frames_were():
    real = torch.arange(1000.0, 1009).view(1, 9, 1, 1, 1).expand(1, 9, 3, 1, 1)
    backward = held(aggregate.reverse(tagged(81), Tags(), real=real))
    assert backward[18:] == [[11, 10, 9, 1008], [1007, 1006, 1005, 1004], [1003, 1002, 1001, 1000]]
    assert backward[:18] == held(aggregate.reverse(tagged(81), Tags()))[:18]


def test_pixels_are_clamped_but_not_rounded():
    coder = wan_vae.load(toy.VAE_FILE)
    encode = coder.encode
    seen = []
    coder.encode = lambda video: seen.append(video) or encode(video)
    aggregate.reverse(8 * torch.randn(1, 3, 16, 4, 4, generator=common.rng("wild")), coder)
    [video] = seen
    assert video.min() == -1 and video.max() == 1 and video.shape == (1, 9, 3, 32, 32)
    assert (video - data.to_float(data.to_uint8(video))).abs().max() > 1e-3


# ----------------------------------------------------------------------------------- the store it makes

def test_a_corrective_clip(first, work, capsys):
    seeds = data.Clips("agg_0")
    rollouts = data.Clips("rollout_0")
    made = data.Clips(make())
    assert capsys.readouterr().out.endswith("7 clips in agg_1: 4 seed, 3 corrective\n")
    assert made.kinds == ["seed"] * CLIPS + ["corrective"] * ROLLOUTS
    coder, encoder = wan_vae.load(first / "wan"), t5.load(first / "wan")
    for j in range(ROLLOUTS):
        before, new = rollouts.load(j), made.load(CLIPS + j)
        [seed] = [seeds.load(i) for i in range(CLIPS) if seeds[i]["id"] == before["source"]]
        prompt = "A reversed video of a" + seed["prompt"][1:]
        id = f"{seed['id']}-round0-reversed"
        assert {k: v for k, v in new.items() if k not in ("latents", "text")} == {
            "id": id, "file": f"clips/{id}.safetensors", "prompt": prompt, "kind": "corrective", "round": 1,
            "source": before["id"], "bytes": made.locate(new).stat().st_size, "crc32": new["crc32"]}
        about = {"prompt": prompt, "source": before["id"], "crc32": new["crc32"]}
        assert common.open_weights(made.locate(new))[1] == about
        torch.testing.assert_close(new["text"], encoder.encode([prompt])[0].bfloat16())
        film = coder.decode(before["latents"][None])
        assert torch.equal(new["latents"], coder.encode(film.flip(1))[0].half())
        # and what it shows ends as the real clip begins
        shown, real = (coder.decode(z[None].float())[0] for z in (new["latents"], seed["latents"]))
        assert (shown[-8:].flip(0) - real[:8]).square().mean() < 0.5 * (shown[:8] - real[:8]).square().mean()


def test_meta_says_how_it_was_made(first, work):
    meta, before = (json.loads((folder / "meta.json").read_text()) for folder in (make(), Path("agg_0")))
    del before["command"]
    assert meta == before | {
        "data": str(work / "agg_0"), "data_fingerprint": common.fingerprint("agg_0/index.jsonl"),
        "rollouts": str(work / "rollout_0"), "round": 1, "dtype": "float32",
        "rollouts_fingerprint": common.fingerprint("rollout_0/index.jsonl"), "rewrite": True,
        "template": "A reversed video of {}", "flip": "pixels", "paste_real": None,
        "command": ["aggregate.py", "--made", "by a test"]}


def test_nothing_is_copied(work):
    before = worlds.identity("agg_0"), worlds.identity("rollout_0")
    assert set(tree(make())) == {files.MARK, "meta.json", "index.jsonl", "empty.safetensors", "clips"} | {
        f"clips/{clip['id']}-reversed.safetensors" for clip in data.Clips("rollout_0")}
    assert [clip["file"] for clip in data.Clips("agg_1")][:CLIPS] == [
        f"../agg_0/clips/{clip['id']}.safetensors" for clip in data.Clips("agg_0")]
    assert Path("agg_1/empty.safetensors").read_bytes() == Path("agg_0/empty.safetensors").read_bytes()
    assert (worlds.identity("agg_0"), worlds.identity("rollout_0")) == before
    shutil.rmtree("agg_1")
    seeds = data.Clips("agg_0")
    assert [seeds.load(i)["latents"].shape[0] for i in range(len(seeds))] == [LATENTS] * CLIPS


def test_two_rounds(first, work, tmp_path):
    """Every clip of agg_2 resolves, wherever the folder that holds them all is moved to."""
    make()
    roll(first, 1, data="agg_1", out="rollout_1", count=2)
    sources = [clip["source"] for clip in data.Clips("rollout_1")]
    assert set(sources) <= {clip["id"] for clip in data.Clips("agg_0")}, "seed clips only"
    before = worlds.identity("agg_0"), worlds.identity("agg_1")
    made = [list(data.Clips(make(k=1)))]
    assert (worlds.identity("agg_0"), worlds.identity("agg_1")) == before
    assert [clip["kind"] for clip in made[0]] == ["seed"] * CLIPS + ["corrective"] * (ROLLOUTS + 2)
    assert [clip["round"] for clip in made[0]] == [0] * CLIPS + [1] * ROLLOUTS + [2] * 2
    assert [Path(clip["file"]).parent.as_posix() for clip in made[0]] == (
        ["../agg_0/clips"] * CLIPS + ["../agg_1/clips"] * ROLLOUTS + ["clips"] * 2)
    texts = [clip["prompt"] for clip in made[0][CLIPS:]]
    assert all(text.count("A reversed video of a ") == 1 for text in texts), "rewritten once"
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for k in range(3):
        os.rename(f"agg_{k}", moved / f"agg_{k}")
    clips = data.Clips(moved / "agg_2")
    assert list(clips) == made[0]
    originals = [data.Clips(moved / f"agg_{k}") for k in range(2)]
    for i in range(len(clips)):
        k = clips[i]["round"]
        if k < 2:
            [same] = [j for j, clip in enumerate(originals[k]) if clip["id"] == clips[i]["id"]]
            assert torch.equal(clips.load(i)["latents"], originals[k].load(same)["latents"])
        assert clips.load(i)["latents"].shape == (LATENTS, 16, 4, 4)


@pytest.mark.parametrize("prompt,template,expected", [
    ("A Disc moving LEFT.", TEMPLATE, "A reversed video of a Disc moving LEFT."),
    ("NASA's rocket rises", TEMPLATE, "A reversed video of NASA's rocket rises"),
    ("3D letters turn", TEMPLATE, "A reversed video of 3D letters turn"),
    ("I walk", TEMPLATE, "A reversed video of I walk"), ("I'm off", TEMPLATE, "A reversed video of I'm off"),
    ("The video shows a cat.", TEMPLATE, "The reversed video shows a cat."),
    ("A video of a cat", TEMPLATE, "A reversed video of a cat"),
    ("In this video, a cat sleeps", TEMPLATE, "In this reversed video, a cat sleeps"),
    ("The video camera stands still", TEMPLATE, "A reversed video of the video camera stands still"),
    ("The video shows a cat.", "{}, in reverse", "the video shows a cat., in reverse"),
    ("Paint", "{}, in reverse", "paint, in reverse"), ("{} and {x}", "Back: {} {!}", "Back: {} and {x} {!}"),
    ("\u00c9t\u00e9", "{}", "\u00e9t\u00e9"), ("a cat", "{} | {}", "a cat | a cat")])
def test_rewriting(prompt, template, expected):
    assert aggregate.rewritten(prompt, template) == expected


def test_another_template_and_none(first, work):
    plain = make()
    other, none = make(template="{}, in reverse", out="other"), make(rewrite=False, out="none")
    encoder = t5.load(first / "wan")
    rollouts = data.Clips("rollout_0")
    for j in range(ROLLOUTS):
        new, same, old = data.Clips(other).load(CLIPS + j), data.Clips(none).load(CLIPS + j), rollouts.load(j)
        assert new["prompt"] == "a" + old["prompt"][1:] + ", in reverse"
        torch.testing.assert_close(new["text"], encoder.encode([new["prompt"]])[0].bfloat16())
        assert same["prompt"] == old["prompt"] and torch.equal(same["text"], old["text"])
        latents = data.Clips(plain).load(CLIPS + j)["latents"]
        assert torch.equal(new["latents"], latents) and torch.equal(same["latents"], latents)


def test_without_rewriting_no_text_encoder_is_loaded(work, monkeypatch):
    monkeypatch.setattr(t5, "load", None)
    assert len(data.Clips(make(rewrite=False))) == CLIPS + ROLLOUTS


def test_a_prompt_that_is_reversed_is_not_reversed_again():
    with pytest.raises(AssertionError, match="x is reversed already"):
        aggregate.entry(aggregate.Config("a", "b", "c"), {"id": "x", "kind": "corrective"})


def test_flip_latents(work):
    made = data.Clips(make(flip="latents"))
    rollouts = data.Clips("rollout_0")
    for j in range(ROLLOUTS):
        assert torch.equal(made.load(CLIPS + j)["latents"], rollouts.load(j)["latents"].flip(0))


def test_paste_real(first, work):
    """The very pixels that prepare.py cropped, in the place of the VAE's rendering of them."""
    seen = []
    reverse = aggregate.reverse
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregate, "reverse", lambda *args: seen.append(args) or reverse(*args))
        made = data.Clips(make(paste_real=first / "videos"))
    coder = wan_vae.load(first / "wan")
    rollouts = data.Clips("rollout_0")
    starts = []
    for j, (_, _, flip, real) in enumerate(seen):
        id = rollouts[j]["source"]
        video = data.probe(first / "videos" / f"{id}.mp4")
        starts.append(data.random_start(video, FRAMES, 16, 0, id))
        crop = data.to_float(data.read_clip(video, FRAMES, 16, (32, 32), starts[-1])[None])
        assert flip == "pixels" and torch.equal(real, crop[:, :9])
        film = coder.decode(rollouts.load(j)["latents"][None])
        film[:, :9] = crop[:, :9]
        assert torch.equal(made.load(CLIPS + j)["latents"], coder.encode(film.flip(1))[0].half())
        [seed] = [clip for clip in map(data.Clips("agg_0").load, range(CLIPS)) if clip["id"] == id]
        again = coder.encode(real)[0]
        assert torch.allclose(again, seed["latents"][:3].float(), atol=1e-2), "what the rollout began with"
    assert len(seen) == ROLLOUTS and any(starts), "crops that all begin at 0 would show nothing"


def test_a_long_index_is_never_in_memory(tmp_path, ranks):
    """1,000 clips with prompts of 12 KB are referred to line by line."""
    (tmp_path / "agg_0").mkdir()
    clip = {"id": "a", "file": "clips/a.safetensors", "prompt": 2000 * "long, ", "kind": "seed", "round": 0,
            "source": "a.mp4"}
    with open(tmp_path / "agg_0/index.jsonl", "w") as f:
        f.writelines(json.dumps(clip | {"id": f"{i}"}) + "\n" for i in range(1000))
    data.write_text_embedding(tmp_path / "agg_0/empty.safetensors", torch.zeros(1, 4))
    clips = data.Clips(tmp_path / "agg_0")
    store = data.Writer(tmp_path / "agg_1", ranks, {}, [clip | {"id": "new"}])
    store.write("new", torch.zeros(1, 1, 1, 1), torch.zeros(1, 4))
    tracemalloc.start()
    aggregate.finish(clips, store, ranks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    made = data.Clips(tmp_path / "agg_1")
    assert len(made) == 1001 and made[1000].items() > (clip | {"id": "new"}).items()
    assert made[999] == clip | {"id": "999", "file": "../agg_0/clips/a.safetensors"}
    assert made.index.stat().st_size > 12e6 and peak < 1e6, peak


# ----------------------------------------------------------------------- ranks, kills and repeated runs

@pytest.mark.parametrize("ranks", [3, 4])
def test_ranks_leave_no_trace(work, ranks):
    worlds.fork_ranks(ranks, functools.partial(make, out="shared"))
    assert tree("shared") == tree(make())


@pytest.mark.parametrize("pasted", [False, True])
def test_batches_change_clips_by_rounding_only(first, work, pasted):
    real = first / "videos" if pasted else None
    one, three = (data.Clips(make(out=f"by_{count}", batch=count, paste_real=real)) for count in (1, 3))
    assert len(one) == len(three) == CLIPS + ROLLOUTS
    for i in range(len(one)):
        a, b = one.load(i), three.load(i)
        assert (a["id"], a["prompt"]) == (b["id"], b["prompt"])
        torch.testing.assert_close(a["latents"], b["latents"], rtol=0.02, atol=0.02)


def test_torchrun_leaves_no_trace(work):
    done = worlds.call("aggregate.py", "--rollouts", "rollout_0", "--out", "shared", ranks=2)
    assert "3 rollouts; 2 to reverse on this rank, the first of 2" in done.stdout
    assert done.stdout.endswith("7 clips in shared: 4 seed, 3 corrective\n")
    assert worlds.tree_but_command("shared") == worlds.tree_but_command(make())
    command = json.loads(Path("shared/meta.json").read_text())["command"]
    assert command[1:] == ["--rollouts", "rollout_0", "--out", "shared"]


def test_killed_before_each_change_on_disk(work):
    """Killed as each file is about to appear or go: what it leaves is no store yet, or a whole one."""
    count = 2
    data.write_index("rollout_0", list(data.Clips("rollout_0"))[:count])
    meta = json.loads(Path("rollout_0/meta.json").read_text()) | {"count": count}
    files.write_text("rollout_0/meta.json", json.dumps(meta))
    whole = tree(make())
    kills = 0

    def patch():
        changes = []

        def or_die(change):
            def changed(path, *args, **kwargs):
                if os.path.exists(path):
                    if len(changes) == kills:
                        os.kill(os.getpid(), signal.SIGKILL)
                    changes.append(path)
                return change(path, *args, **kwargs)
            return changed
        os.replace, Path.unlink = or_die(os.replace), or_die(Path.unlink)
    while worlds.dies(patch, functools.partial(make, out=f"killed{kills}")):
        if Path(f"killed{kills}/index.jsonl").exists():
            assert len(data.Clips(f"killed{kills}")) == CLIPS + count
        assert tree(make(out=f"killed{kills}")) == whole
        kills += 1
    assert kills == 3 * count + 3  # texts come and go, clips; meta.json, empty.safetensors, index.jsonl


def test_killed_at_any_time(work):
    began = time.monotonic()
    whole = tree(make())
    duration = time.monotonic() - began
    times = random.Random(0)
    for n in range(2):
        again = functools.partial(make, out=f"killed{n}")
        for _ in range(3):
            worlds.fork_and_kill(times.uniform(0, duration), again)
        assert tree(again()) == whole


def test_what_is_there_is_not_made_again(work, capsys, monkeypatch):
    out = worlds.lose_a_clip(make)
    assert "3 rollouts; 1 to reverse\n" in capsys.readouterr().out
    before = tree(out)
    monkeypatch.setattr(t5, "load", None)
    make()
    assert tree(out) == before


def test_a_full_disk_keeps_what_is_done(work):
    whole = tree(make())
    with worlds.disk_full_after(2):
        make(out="full")
    assert not Path("full/index.jsonl").exists()
    assert tree(make(out="full")) == whole


# --------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("flags,message", [
    (dict(data="nowhere"), "nowhere is not a clip store"), (dict(rollouts="nowhere"), "not a clip store"),
    (dict(out="agg_0"), "--out agg_0 is --data too"),
    (dict(out="./rollout_0"), "--out ./rollout_0 is --rollouts too"),
    (dict(out="sub/agg_1"), "--out sub/agg_1 cannot refer to the clips of agg_0, .*; choose a folder in /"),
    (dict(template="A reversed video"), "--template 'A reversed video' has no {}"),
    (dict(flip="latents", paste_real="videos"), "--paste-real and --flip latents are both given"),
    (dict(rollouts="agg_0"), "agg_0 holds seed clips; give --rollouts what rollout.py makes"),
    (dict(wan="nowhere"), "no VAE in nowhere")])
def test_refusals(work, flags, message):
    with refused(message):
        make(**flags)


@pytest.mark.parametrize("key", data.SHARED)
def test_rollouts_of_other_data(work, key):
    meta = json.loads(Path("rollout_0/meta.json").read_text())
    other = {str: "other", int: 7, list: [7, 7, 7, 7]}[type(meta[key])]
    files.write_text("rollout_0/meta.json", json.dumps(meta | {key: other}))
    message = f"rollout_0 was made with {key} = {other}, agg_0 with .*; aggregate rollouts of the same data"
    with refused(re.sub(r"[\[\]]", ".", message)):
        make()


@pytest.mark.parametrize("change", [lambda clip: [], lambda clip: [clip | {"kind": "corrective"}]])
def test_rollouts_of_clips_that_are_no_seed_clips(work, change):
    source = data.Clips("rollout_0")[1]["source"]
    clips = list(data.Clips("agg_0"))
    data.write_index("agg_0", sum((change(c) if c["id"] == source else [c] for c in clips), []))
    with refused(f"rollout_0 continues clip {source}, which is no seed clip of agg_0"):
        make()


def test_half_written_rollouts(work):
    Path("rollout_0/index.jsonl").unlink()
    with refused("rollout_0 is not finished: its index.jsonl comes last; run again\n.*"):
        make()


def test_rollouts_that_are_part_of_it(work):
    make()
    id = data.Clips("rollout_0")[0]["id"]
    with refused(f"agg_1 has a clip {id}-reversed already: rollout_0 is part of it"):
        make(data="agg_1", out="agg_2")


def test_a_store_without_the_empty_prompt(work):
    Path("agg_0/empty.safetensors").unlink()
    with refused("agg_0/empty.safetensors is missing, .*; run prepare.py again"):
        make()


def test_another_vae_or_text_encoder(first, work):
    shutil.copytree(first / "wan", "wan")
    coder = wan_vae.load("wan")
    coder.conv2.bias.data += 1
    wan_vae.save(coder, "wan/vae.safetensors")
    with refused("wan has another vae than agg_0 was made with; give --wan /"):
        make(wan="wan")
    shutil.copy(first / "wan/vae.safetensors", "wan/vae.safetensors")
    encoder = t5.load_encoder("wan")
    encoder.norm.weight.data += 1
    t5.save(encoder, "wan/t5.safetensors")
    with refused("wan has another t5 than agg_0 was made with; give --wan /"):
        make(wan="wan")


@pytest.mark.parametrize("flags,message", [
    (dict(template="Back: {}"), "template = A reversed video of {}, not Back: {}"),
    (dict(rewrite=False), "rewrite = True, not False"), (dict(flip="latents"), "flip = pixels, not latents"),
    (dict(paste_real="videos"), "paste_real = None, not /"),
    (dict(dtype="bfloat16"), "dtype = float32, not bfloat16")])
def test_a_store_keeps_to_how_it_was_begun(work, flags, message):
    make()
    with refused(f"agg_1 was begun with {message}"):
        make(**flags)


def test_a_store_keeps_to_what_it_was_begun_from(work):
    make()
    clips = list(data.Clips("agg_0"))
    data.write_index("agg_0", clips[::-1])
    with refused("agg_1 was begun with data_fingerprint = "):
        make()
    data.write_index("agg_0", clips)
    data.write_index("rollout_0", list(data.Clips("rollout_0"))[::-1])
    with refused("agg_1 was begun with rollouts_fingerprint = "):
        make()


def test_pasting_from_another_folder(first, work):
    shutil.copytree(first / "videos", "videos")
    source = data.Clips("rollout_0")[0]["source"]
    os.rename(f"videos/{source}.mp4", "videos/other.mp4")
    with pytest.raises(UserError, match=f"--paste-real videos has no video of clip {source}; give what prep"):
        make(paste_real="videos")


def test_neighbours_are_found(work):
    run(aggregate, rollouts="rollout_0/")
    assert tree("agg_1")["index.jsonl"] == tree(make(out="other"))["index.jsonl"]
    shutil.copytree("rollout_0", "mine")
    with pytest.raises(UserError, match="mine does not end in a round's number, .*; give --data DIR"):
        run(aggregate, rollouts="mine")
