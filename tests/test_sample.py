"""Text, image and clip to video, long and with changing prompts: files, their frames, tags and refusals."""

import contextlib
import io
import itertools
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import sentencepiece
import torch
from worlds import call, read_video, run_stage, tiny_model

import common
import data
import diffusion
import files
import flags
import model
import sample
import t5
import vae as wan_vae
from common import UserError
from data import write_video

SIZE = 32  # 2 tokens across and down behind a VAE that halves it 3 times
TINY = dict(steps=1, window=9, keep=6, seconds=0.5, preset="ultrafast")  # 9 frames: one chunk


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """wan/ with a VAE, a text encoder and a tokenizer; model/ that names it, relative to itself."""
    root = tmp_path_factory.mktemp("models")
    wan = root / "wan"
    spiece = io.BytesIO()
    (wan / "google/umt5-xxl").mkdir(parents=True)
    corpus = ["a red disc moves left", "a blue ring moves up", "it stops and turns green", "at night"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 5), model_writer=spiece, vocab_size=48, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, num_threads=1)
    (wan / "google/umt5-xxl/spiece.model").write_bytes(spiece.getvalue())
    torch.manual_seed(0)
    encoder = t5.Encoder(vocab=64, dim=64, dim_attn=64, dim_ffn=64, heads=2, layers=1)
    for p in encoder.parameters():
        torch.nn.init.normal_(p) if p.ndim == 2 else None
    t5.save(encoder, wan / "t5.safetensors")
    vae = wan_vae.WanVAE(8, (1, 1, 1, 1), 1, z_dim=16, latents_mean=[0.1] * 16, latents_std=[1.5] * 16)
    wan_vae.save(vae, wan / "vae.safetensors")
    net = tiny_model("sample")
    geometry = {"size": f"{SIZE}x{SIZE}", "frames": 81, "fps": 16}
    model.save(net, wan, geometry=geometry)
    model.save(net, root / "model", wan="../wan")
    return root


@pytest.fixture
def make(models, tmp_path, monkeypatch):
    """Runs sample.main in tmp_path and returns the videos it leaves in out, by name."""
    monkeypatch.chdir(tmp_path)

    def run(**flags):
        recipe = {} if "like" in flags else {"model": str(models / "model")} | TINY
        flags = recipe | {"out": "videos"} | flags
        run_stage(sample, sample.Config(**flags))
        return films(flags["out"])
    return run


def films(folder) -> dict:
    return {path.stem: read_video(path) for path in sorted(Path(folder).glob("*.mp4"))}


def write_prompts(*lines, file="prompts.txt") -> str:
    Path(file).write_text("".join(f"{line}\n" for line in lines))
    return file


def write_clip(count, fps=16, file="clip.mp4") -> torch.Tensor:
    """A square that wanders, so that every frame differs from its neighbours."""
    clip = torch.full((count, 3, SIZE, SIZE), 40, dtype=torch.uint8)
    for i, frame in enumerate(clip):
        frame[:, 8:20, i % 20:i % 20 + 12] = 200
    write_video(file, [clip], fps, crf=8)
    return clip


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def alike(a: dict, b: dict) -> bool:
    """Made in other batches: rounded otherwise, which may move a pixel by a level, and h264's choices."""
    return a.keys() == b.keys() and all((a[name].float() - b[name].float()).abs().mean() < 1 for name in a)


@pytest.fixture
def spy(monkeypatch):
    """What every call of generate was given and made, and the pieces handed to each file."""
    calls = []
    pieces = {}
    generate, writing = diffusion.generate, data.writing

    def spied_generate(net, text, null, sampling, **kwargs):
        calls.append({"text": text, "null": null} | asdict(sampling) | kwargs)
        made = []
        for first, latents in generate(net, text, null, sampling, **kwargs):
            made.append(latents)
            yield first, latents
        calls[-1]["latents"] = torch.cat(made, 1)

    @contextlib.contextmanager
    def spied_writing(path, *args, **kwargs):
        handed = pieces.setdefault(Path(path).stem, []) if len(args) > 1 else []  # sample.py passes tags
        with writing(path, *args, **kwargs) as write:
            yield lambda piece: handed.append(piece) or write(piece)
    monkeypatch.setattr(diffusion, "generate", spied_generate)
    monkeypatch.setattr(data, "writing", spied_writing)
    return calls, pieces


# ------------------------------------------------------------------------ text, image and clip to video

@pytest.mark.parametrize("seconds,begin,count", [
    (5, 0, 81), (50, 0, 801), (81 / 16, 0, 81), (82 / 16, 0, 93), (0.1, 0, 9), (5, 12, 81), (5, 1, 85),
    (4.5, 1, 73), (4.6, 1, 85)])
def test_lengths(seconds, begin, count):
    coder = wan_vae.WanVAE(8, (1, 1, 1, 1), 1)
    assert coder.frame_count(sample.latent_frames(seconds, 16, coder, begin)) == count


def test_text_to_video(make, models, capsys):
    [(name, film)] = make(prompt="A red disc, moves LEFT!", seconds=1).items()
    assert name == "0000-a-red-disc-moves-left" and film.shape == (21, 3, SIZE, SIZE)
    video = data.probe(f"videos/{name}.mp4")
    assert video.fps == 16 and video.frames == 21
    recipe = [key for key in data.read_tags(f"videos/{name}.mp4") if key in sample.RECIPE]
    assert recipe == sorted(sample.RECIPE), "in an order that every process shares, or its bytes differ"
    assert film.float().std() > 5, "nothing to see"
    assert f"videos/{name}.mp4: 21 frames (1.31 s), " in capsys.readouterr().out
    assert sorted(os.listdir("videos")) == [files.MARK, f"{name}.mp4"]


def test_long_video(make, models, spy):
    """Windows slide, and the file holds what the VAE shows of all latents, decoded as one stream."""
    calls, pieces = spy
    [film] = make(prompt="a red disc", seconds=3.5, log_drift=True).values()
    assert film.shape[0] == 57 and calls[0]["latents"].shape == (1, 15, 16, 4, 4) and calls[0]["window"] == 9
    [video] = pieces.values()
    whole = data.to_uint8(wan_vae.load(models / "wan").decode(calls[0]["latents"])[0])
    assert (torch.cat(video).int() - whole.int()).abs().max() <= 1  # pieces round differently
    assert [piece.shape[0] for piece in video] == [9, 12, 12, 12, 12]
    lines = [json.loads(line) for line in Path("videos/0000-a-red-disc.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == [0, 3, 6, 9, 12]
    for line in lines:
        chunk = calls[0]["latents"][:, line["frame"]:line["frame"] + 3]
        expected = chunk.mean().item(), chunk.std().item()
        assert (line["mean"], line["std"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("have,used", [(50, 21), (20, 9), (9, 9)])
def test_extension_keeps_the_given_frames(make, models, spy, have, used):
    calls, pieces = spy
    clip = write_clip(have)
    given = read_video("clip.mp4")[-used:]  # as h264 has kept it
    [film] = make(prompt="a red disc", extend="clip.mp4", seconds=2).values()
    assert film.shape[0] == 33 and (given.float() - clip[-used:].float()).abs().mean() < 5
    [video] = pieces.values()
    assert torch.equal(video[0], given), "not what the VAE makes of them"
    assert (film[:used].float() - given.float()).abs().mean() < 6
    assert torch.equal(calls[0]["context"], wan_vae.load(models / "wan").encode(data.to_float(given[None])))


def test_extension_resamples_and_crops(make, spy):
    write_clip(48, fps=32)  # 24 frames of 16 fps: every other one
    twice = read_video("clip.mp4")
    make(prompt="a red disc", extend="clip.mp4", seconds=2, size="32x16", crf=5)
    [video] = spy[1].values()
    assert torch.equal(video[0], twice[6::2, :, 8:24])


def test_lines_may_continue_videos(make, spy):
    """Each line its own video, looked up beside the .jsonl; a line without one begins with nothing."""
    Path("more").mkdir()
    write_clip(20, file="more/a.mp4")
    write_video("more/b.mp4", [255 - read_video("more/a.mp4")], 16, crf=8)
    rows = [{"prompt": "a red disc", "extend": "a.mp4"}, {"prompt": "a red disc", "extend": "b.mp4"},
            {"prompt": "a red disc"}]
    file = write_prompts(*map(json.dumps, rows), file="more/list.jsonl")
    flags = dict(prompts=file, seconds=1.5, crf=5)
    together = make(batch=4, **flags)
    assert [len(call["ids"]) for call in spy[0]] == [2, 1] and spy[0][1]["context"] is None
    for film, clip in zip(together.values(), "ab", strict=False):
        assert (film[:9].float() - read_video(f"more/{clip}.mp4")[-9:].float()).abs().mean() < 6
    assert alike(together, make(out="alone", **flags))
    again = make(like=f"videos/{list(together)[1]}.mp4", out="again", model=None)
    assert alike(again, {name: film for name, film in list(together.items())[1:2]})


def test_image_to_video(make, spy, capsys):
    calls, pieces = spy
    image = (torch.rand(3, SIZE, SIZE, generator=common.rng("image")) * 255).to(torch.uint8)
    data.write_png("first.png", image)
    [film] = make(prompt="a red disc", image="first.png", seconds=1.5).values()
    assert film.shape[0] == 25 and calls[0]["frames"] == 7
    [video] = pieces.values()
    assert [piece.shape[0] for piece in video] == [1, 12, 12] and torch.equal(video[0][0], image)
    assert "needs a model trained with --image-first" in capsys.readouterr().out


def test_a_model_trained_for_images_gets_no_warning(make, models, tmp_path, capsys):
    model.save(model.load(models / "model"), tmp_path / "m", wan=str(models / "wan"), image_first=0.5)
    data.write_png("first.png", torch.zeros(3, SIZE, SIZE))
    make(model="m", prompt="a red disc", image="first.png")
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("mode,flags,warning", [
    ("full", dict(causal=True), "m was never trained to make videos chunk by chunk"),
    ("df", dict(bidirectional=True), "m was never trained to make all frames at once"),
    ("full", dict(bidirectional=True), None), ("df", dict(causal=True), None),
    ("df", dict(context_noise=0.2), None), ("rf", {}, None),
    ("rf", dict(context_noise=0.2), "--mode rf and has never seen a noisy past"),
    ("tf", dict(history_guidance=1.2), "--mode tf and has never seen a noisy past")])
def test_what_a_model_was_never_trained_for_is_said(mode, flags, warning, make, models, capsys):
    model.save(model.load(models / "model"), "m", wan=str(models / "wan"), mode=mode)
    make(model="m", prompt="a red disc", **flags)
    printed = capsys.readouterr().out
    assert warning in printed if warning else "warning" not in printed


# ---------------------------------------------------------------- models never trained chunk by chunk

def test_the_published_wan_makes_all_frames_at_once(make, models, spy, capsys):
    """It is its own Wan directory, says nothing of a mode, and is Wan's bidirectional class."""
    calls, pieces = spy
    [film] = make(model=str(models / "wan"), prompt="a red disc", seconds=1).values()
    assert len(film) == 17, "no chunks to fill up"
    [call] = calls
    assert (call["chunk"], call["frames"]) == (None, 5) and len(pieces["0000-a-red-disc"]) == 1
    assert "wan was never trained chunk by chunk: all frames are made at once" in capsys.readouterr().out
    tags = data.read_tags("videos/0000-a-red-disc.mp4")
    assert tags["causal"] is False and tags["wan"] == str(models / "wan")
    [again] = make(like="videos/0000-a-red-disc.mp4", out="again").values()
    assert torch.equal(again, film) and data.read_tags("again/0000-a-red-disc.mp4") == tags
    [longer] = make(like="videos/0000-a-red-disc.mp4", out="causal", causal=True).values()
    assert len(longer) == 21 and calls[-1]["chunk"] == 3
    for value in (True, False):
        settled = sample.settle(sample.Config(bidirectional=value), {"causal": value})
        assert settled.causal is not value, "neither is ignored, nor outdone by --like"


def test_what_files_tell_of_the_training(models, tmp_path):
    net = model.load(models / "model")
    for name, config, expected in (
            ("plain", {}, False), ("full", {"mode": "full"}, False), ("df", {"mode": "df"}, True),
            ("rf", {"mode": "rf"}, True), ("older", {"wan": "x"}, True)):
        model.save(net, tmp_path / name, **config)
        assert model.trained_causally(tmp_path / name) is expected, name
    for kind, expected in (("WanTransformer3DModel", False), ("CausalWanModel", True), ("Other", None)):
        (tmp_path / "plain/config.json").write_text(json.dumps({"_class_name": kind}))
        assert model.trained_causally(tmp_path / "plain") is expected
    moved = tmp_path / "df/diffusion_pytorch_model.safetensors"
    (tmp_path / "full/mine.safetensors").write_bytes(moved.read_bytes())
    assert model.trained_causally(tmp_path / "full/mine.safetensors") is True, "its own header tells"
    (tmp_path / "hub").mkdir()
    os.rename(tmp_path / "full", tmp_path / "hub/transformer")
    assert model.trained_causally(tmp_path / "hub") is False


@pytest.fixture
def distilled(models, tmp_path):
    """A file as Self-Forcing's trainers write it, beside a config.json that is not about it."""
    state = {f"model.{name}": p for name, p in model.load(models / "model").state_dict().items()}
    (tmp_path / "theirs").mkdir()
    torch.save({"generator": {}, "generator_ema": state}, tmp_path / "theirs/self_forcing_dmd.pt")
    config = (models / "wan/config.json").read_text()
    (tmp_path / "theirs/config.json").write_text(config)
    return str(tmp_path / "theirs/self_forcing_dmd.pt")


def test_distilled_models_make_few_steps(make, models, spy, distilled, capsys):
    calls, _ = spy
    flags = dict(model=distilled, wan=str(models / "wan"), prompt="a red disc", size="32x32")
    make(**flags, solver="renoise", out="few")  # TINY's 1 step is given
    assert "does not say how it was trained" in capsys.readouterr().out
    cfg = sample.settle(sample.Config(solver="renoise"), {})
    assert (cfg.steps, cfg.shift, cfg.guidance) == (4, 5, 1)
    for name, value in dict(steps=1, shift=5, guidance=1, solver="renoise", chunk=3).items():
        assert calls[0][name] == value
    cfg = sample.settle(sample.Config(solver="renoise", guidance=3.0), {})
    assert (cfg.steps, cfg.guidance) == (4, 3)
    make(**flags, solver="renoise", levels="1000,757,522", out="causvid")
    assert calls[1]["levels"] == (1000, 757, 522)
    recipe = data.read_tags("few/0000-a-red-disc.mp4")
    assert sample.settle(sample.Config(), recipe).steps == 1 and recipe["causal"] is True
    assert sample.settle(sample.Config(), {}).steps == 20


def test_the_prompt_changes_at_a_slide(make, spy):
    """Windows of 9 that keep 6: slides at latents 9, 12, 15, which begin at 2.06, 2.81 and 3.56 s."""
    calls, _ = spy
    for text in ("a red disc", "a red disc | 2.5: a blue ring | 3.5:it stops", "a red disc | a blue ring"):
        made = make(prompt=text, seconds=4)
    assert [[start for start, _ in call["text"]] for call in calls] == [[0], [0, 10, 14], [0, 8]]
    assert [len(film) for film in made.values()] == [69, 69, 69]
    assert "0000-a-red-disc-a-blue-ring-it-stops" in made
    plain, *changed = [call["latents"] for call in calls]
    for latents, slide in zip(changed, (12, 9), strict=True):
        off = (latents - plain).abs().amax((0, 2, 3, 4))  # texts are encoded together: rounded otherwise
        assert off[:slide].max() < 1e-3 < 1e-2 < off[slide:slide + 3].min()
    row = {"prompt": ["a red disc", "a blue ring", "it stops"], "times": [0, 2.5, 3.5]}
    listed = make(prompts=write_prompts(json.dumps(row), file="p.jsonl"), seconds=4, out="listed")
    assert same(listed, make(prompt="a red disc | 2.5: a blue ring | 3.5:it stops", seconds=4, out="typed"))


def test_every_flag_reaches_the_model(make, models, spy):
    flags = dict(steps=2, shift=3.0, guidance=2.0, solver="unipc", context_noise=0.1, history_level=0.7,
                 window=6, keep=3, reentry="as-is")
    make(prompt="a red disc", negative="it stops", history_guidance=1.2, seconds=1, **flags)
    [call] = spy[0]
    film = call["reenter"].__self__
    assert (flags.pop("reentry"), 3) == (film.reentry, film.keep)
    assert (flags | {"history": 1.2, "ids": [(0, 0)], "frames": 6}).items() <= call.items()
    torch.testing.assert_close(call["null"], t5.load(models / "wan").encode(["it stops"])[0])


@pytest.mark.parametrize("prompt,texts,times", [
    ("3: a disc", ["3: a disc"], [0]), ("a 4:3 film", ["a 4:3 film"], [0]), ("a | b", ["a", "b"], [0, 15]),
    ("a|b: c|d", ["a", "b: c", "d"], [0, 10, 20]), ("a | 10: b | 25.5: c", ["a", "b", "c"], [0, 10, 25.5]),
    ("0: a | 7 : b", ["a", "b"], [0, 7]), ("a | 10:30 strikes", ["a", "10:30 strikes"], [0, 15]),
    ("a | at 10: b", ["a", "at 10: b"], [0, 15])])
def test_prompts_with_times(prompt, texts, times):
    assert sample.texts_and_times({"prompt": prompt}, 30, "here") == (texts, times)


# --------------------------------------------------------------------- batches, ranks and repeated runs

ROWS = ('{"prompt": "a red disc moves left"}', "", '{"prompt": ["a blue ring"]}',
        '{"prompt": "it stops", "name": "last", "seed": 4, "seconds": 1}')


def test_a_video_is_the_same_in_any_batch_and_on_any_rank(make, models, spy):
    calls, _ = spy
    flags = dict(prompts=write_prompts(*ROWS, file="p.jsonl"), samples=2, seconds=1.5, window=6, keep=3)
    alone = make(**flags)
    assert list(alone) == ["0000-a-red-disc-moves-left-seed0", "0000-a-red-disc-moves-left-seed1",
                           "0001-a-blue-ring-seed0", "0001-a-blue-ring-seed1", "last-seed4", "last-seed5"]
    assert [len(film) for film in alone.values()] == [33, 33, 33, 33, 21, 21]
    assert not any(alike({"": a[:21]}, {"": b[:21]}) for a, b in itertools.combinations(alone.values(), 2))
    latents = torch.cat([call["latents"] for call in calls[:4]])
    calls.clear()
    assert alike(make(**flags, batch=3, out="three"), alone)
    assert [len(call["ids"]) for call in calls] == [3, 1, 2]
    again = torch.cat([call["latents"] for call in calls[:2]])
    assert (again - latents).norm() < 1e-5 * latents.norm()
    pairs = make(**flags, batch=2, out="pairs")
    done = call("sample.py", "--model", models / "model", "--batch", 2, "--steps", 1, "--window", 6,
                "--keep", 3, "--preset", "ultrafast", "--prompts", "p.jsonl", "--samples", 2,
                "--seconds", 1.5, "--out", "ranks", ranks=2)
    assert alike(films("ranks"), alone) and "6 videos of 32x32; 4 to make on this rank" in done.stdout
    assert same(films("ranks"), pairs), "the same batches, wherever they are made"


def test_only_equal_schedules_share_a_batch(make, spy):
    prompts = write_prompts("a disc | 2.9: it stops", "a disc | 2: a ring", "a | 2.9: b")
    made = make(prompts=prompts, seconds=4, batch=3)
    assert [[id for _, id in call["ids"]] for call in spy[0]] == [[0, 2], [1]]
    assert alike(make(prompts=prompts, seconds=4, out="alone"), made)


def test_a_restart_makes_what_is_missing(make, spy, capsys):
    flags = dict(prompts=write_prompts("a red disc", "a blue ring"))
    before = make(**flags)
    kept, lost = (Path(f"videos/{name}.mp4") for name in before)
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    assert same(make(**flags), before) and kept.stat().st_mtime_ns == stamp
    assert "2 videos of 32x32; 1 to make" in capsys.readouterr().out and len(spy[0]) == 3
    make(**flags)
    assert len(spy[0]) == 3
    together = make(**flags, batch=2, out="two")
    Path("two", lost.name).unlink()
    stamp = Path("two", kept.name).stat().st_mtime_ns
    assert same(make(**flags, batch=2, out="two"), together), "the whole batch again, for its rounding"
    assert len(spy[0][-1]["ids"]) == 2 and Path("two", kept.name).stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="0000-a-red-disc.mp4 was made with steps = 1, not 2; choose another"):
        make(**flags | {"steps": 2})


def test_tags_and_like(make, models, capsys):
    write_clip(20)
    flags = dict(prompt="a red disc | 2.5: a blue ring", extend="clip.mp4", seed=3, seconds=4, guidance=3.0,
                 solver="unipc", crf=20)
    first = make(**flags)
    tags = data.read_tags("videos/0000-a-red-disc-a-blue-ring-seed3.mp4")
    expected = {"prompt": "a red disc | a blue ring", "prompts": ["a red disc", "a blue ring"],
                "causal": True, "times": [0, 2.5], "seed": 3, "id": 0, "name": "0000-a-red-disc-a-blue-ring",
                "model": str(models / "model"), "wan": str(models / "wan"), "size": "32x32", "fps": 16,
                "context": 6,
                "seconds": 4, "frames": 69, "steps": 1, "guidance": 3, "shift": 8, "solver": "unipc",
                "negative": "", "context_noise": 0, "history_guidance": 0,
                "history_level": 0.8, "levels": None, "lora": None, "window": 9, "keep": 6, "sink": None,
                "route": None, "reentry": "first", "extend": str(Path("clip.mp4").resolve()), "image": None,
                "crf": 20, "preset": "ultrafast", "dtype": "float32"}
    mark = common.fingerprint(models / "model/diffusion_pytorch_model.safetensors")
    assert tags == expected | {"fingerprint": mark, "command": tags["command"]}
    [(name, film)] = first.items()
    like = f"videos/{name}.mp4"
    assert same(make(like=like, out="again"), first)
    assert data.read_tags(f"again/{name}.mp4") == tags
    [(name, other)] = make(like=like, out="b", steps=2, seed=5, prompt="it stops").items()
    assert name == "0000-it-stops-seed5" and not torch.equal(other[9:], film[9:])
    tags = data.read_tags(f"b/{name}.mp4")
    assert (tags["steps"], tags["solver"], tags["prompts"]) == (2, "unipc", ["it stops"])
    assert "warning" not in capsys.readouterr().out
    net = model.load(models / "model")
    net.head.head.bias.data += 1
    model.save(net, "other", wan=str(models / "wan"))
    make(like=like, out="c", model="other")
    assert "other is not the model that made videos/0000-a-red-disc" in capsys.readouterr().out


def test_like_heeds_flags_given_at_their_defaults(make):
    make(prompt="a red disc", guidance=3.0)
    like = "videos/0000-a-red-disc.mp4"
    for given, kept in ((["--guidance", "6"], 6.0), ([], 3.0)):
        cfg = flags.parse(sample.Config, "", ["--like", like, *given])
        cfg = sample.settle(cfg, sample.read_recipe(like))
        assert (cfg.guidance, cfg.steps) == (kept, 1)


def test_like_keeps_the_place_of_a_prompt(make):
    """Noise depends on the place, here 1, which the new command line does not say."""
    made = make(prompts=write_prompts("a red disc", "a blue ring | and: more"), seconds=2.5)
    again = make(like="videos/0001-a-blue-ring-and-more.mp4", out="again")
    assert same(again, {name: film for name, film in made.items() if name[:4] == "0001"})


# --------------------------------------------------------------------------------------------- refusals

@pytest.fixture(scope="module")
def inputs(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    for name, text in {
            "p.txt": "a", "p.csv": "a", "empty.txt": "\n \n", "list.jsonl": "[1]",
            "bad.jsonl": '{"prompt": "a"}\n{"prompt"\n', "typo.jsonl": '{"prompt": "a", "second": 5}',
            "none.jsonl": '{"seed": 5}', "day.jsonl": '{"prompt": "a", "seconds": 1e9}',
            "no-time.jsonl": '{"prompt": "a", "seconds": -3}',
            "times.jsonl": '{"prompt": ["a", "b"], "times": [0, "b"]}',
            "extends.jsonl": '{"prompt": "a", "extend": "short.mp4"}',
            "continues.jsonl": '{"prompt": "a", "extend": "clip.mp4"}',
            "twice.jsonl": '{"prompt": "a", "name": "x"}\n{"prompt": "b", "name": "x"}',
            "path.jsonl": '{"prompt": "a", "name": "../x"}'}.items():
        (folder / name).write_text(text)
    for name, count, fps in (("clip.mp4", 9, 16), ("short.mp4", 8, 16), ("slow.mp4", 20, 8)):
        write_clip(count, fps, folder / name)
    model.save(model.load(models / "model"), folder / "bare")
    (folder / "empty").mkdir()
    (folder / "far/away").mkdir(parents=True)  # with no Wan beside it
    (folder / "empty/config.json").write_text('{"wan": "../bare"}')
    return folder


@pytest.mark.parametrize("flags,message", [
    (dict(model=None), "no model; give --model DIR"),
    (dict(model="nowhere"), "--model nowhere does not exist; give --model DIR"),
    (dict(), "no prompt: give --prompt"), (dict(prompt="a", prompts="p.txt"), "both given"),
    (dict(prompts="none.txt"), "none.txt: no such file"), (dict(prompts="p.csv"), "is no .txt or .jsonl"),
    (dict(prompts="empty.txt"), "empty.txt holds no prompts"), (dict(prompt=" "), "an empty prompt"),
    (dict(prompt="a | "), "an empty prompt"), (dict(prompts="bad.jsonl"), "bad.jsonl:2: not valid JSON"),
    (dict(prompts="list.jsonl"), r"list.jsonl:1: not \{\"prompt\": ...\} but \[1\]"),
    (dict(prompts="typo.jsonl"), "typo.jsonl:1: second = 5; a line may hold"),
    (dict(prompts="none.jsonl"), "none.jsonl:1: prompt = null; a line may hold"),
    (dict(prompts="times.jsonl"), "2 prompts need the second from which each holds.*not .0, 'b'"),
    (dict(prompts="twice.jsonl"), "twice.jsonl:2: the name x.mp4 is taken"),
    (dict(prompts="path.jsonl"), "path.jsonl:1: the name ../x.mp4"),
    (dict(prompt="a | 5: b | c", seconds=20), "3 prompts need .* not .0.0, 5.0."),
    (dict(prompt="a | 5: b | 4: c", seconds=20), r"rising, not .0.0, 5.0, 4.0."),
    (dict(prompt="2: a | 5: b", seconds=20), "first 0"),
    (dict(prompt="a | b"), "not all 2 prompts would be shown.* window slides, never here"),
    (dict(prompt="a | 3.2: b", seconds=2.9), "slides, at 2.06, 2.81 s"),
    (dict(prompt="a | 2: b | 2.06: c", seconds=4), "slides, at 2.06, 2.81, 3.56 s"),
    (dict(prompt="a | 2.5: b | 3.5: c", seconds=4, keep=3), "slides, at 2.06, 3.56 s"),
    (dict(prompt="a", image="i.png", extend="clip.mp4"), "--image and --extend"),
    (dict(prompts="extends.jsonl", image="i.png"), "extends.jsonl:1: --image and --extend are both given"),
    (dict(prompts="extends.jsonl"), "too short to continue: it has 8 frames"),
    (dict(prompt="a", extend="short.mp4"), "too short to continue: it has 8 frames at 16 fps, 9 are"),
    (dict(prompt="a", extend="slow.mp4"), "its 8 fps is below 16"),
    (dict(prompt="a", extend="clip.mp4"), "0.5 s must be more than the 9 frames"),
    (dict(prompt="a", extend="clip.mp4", keep=0, seconds=2), "cannot keep 0"),
    (dict(prompt="a", keep=5), "multiple of 3"), (dict(prompt="a", window=3), "window of 3 cannot keep 6"),
    (dict(prompt="a", seconds=0), "--seconds 0: give seconds"),
    (dict(prompt="a", seconds=float("nan")), "--seconds nan: give"),
    (dict(prompt="a", seconds=1e9), "--seconds 1000000000.0: give seconds, above 0 and at most 86400"),
    (dict(prompts="day.jsonl"), "day.jsonl:1: 1e.09 s is no length"),
    (dict(prompts="no-time.jsonl"), "no-time.jsonl:1: -3 s is no length"),
    (dict(prompt="a", context_noise=20.0), "--context-noise 20.0: give a number from 0 to 1"),
    (dict(prompt="a", batch=0), "--batch 0"), (dict(prompt="a", size="40x32"), "multiples of 16"),
    (dict(prompt="a", like="clip.mp4"), "clip.mp4 does not say how it was made"),
    (dict(prompt="a red disc moves left " * 9), "takes at most 32 of width 64"),
    (dict(prompt="a", wan="nowhere"), "no VAE in .*nowhere"),
    (dict(prompt="a", model="bare"), "bare names no Wan directory"),
    (dict(prompt="a", model="empty"), "in empty: looked for diffusion_pytorch_model.safetensors"),
    (dict(prompt="a", model="far/away"), "in far/away: looked for diffusion_pytorch_model.safetensors"),
    (dict(prompt="a", preset="quick"), "preset quick"),
    (dict(prompt="a", levels="1000,500"), "--levels 1000,500 --solver euler: give numbers that fall"),
    (dict(prompt="a", levels="1000,a", solver="renoise"), "--levels 1000,a"),
    (dict(prompt="a", levels="1000,500,500", solver="renoise"), "--levels 1000,500,500"),
    (dict(prompt="a", levels="1001,5", solver="renoise"), "--levels 1001,5"),
    (dict(prompt="a", levels="500,0", solver="renoise"), "--levels 500,0"),
    (dict(prompt="a", causal=True, bidirectional=True), "--causal and --bidirectional are both given"),
    (dict(prompt="a", bidirectional=True, seconds=3), "3 s are more than a window of 9 .*2.06 s.*--causal"),
    (dict(prompt="a", bidirectional=True, extend="clip.mp4", seconds=2), "--extend: there is no past"),
    (dict(prompt="a", bidirectional=True, image="i.png"), "--image: there is no past"),
    (dict(prompt="a", bidirectional=True, sink=0, context_noise=0.2, history_guidance=1.2, route=2),
     "--sink, --route, --context-noise, --history-guidance: there is no past"),
    (dict(prompts="continues.jsonl", bidirectional=True, seconds=2), "s.jsonl:1: .* continue no video"),
    (dict(prompt="a | b", bidirectional=True, seconds=2), "window slides, never here")])
def test_refusals(make, inputs, monkeypatch, flags, message):
    monkeypatch.chdir(inputs)
    with pytest.raises(UserError, match=message):
        make(**flags)
    assert not Path("videos").exists() or os.listdir("videos") in ([], [files.MARK])


def test_a_failure_midway_leaves_no_file(make, monkeypatch):
    """Neither one of the model nor one of an encoder."""
    generate, writing = diffusion.generate, data.writing

    def broken(*args, **kwargs):
        yield from itertools.islice(generate(*args, **kwargs), 2)
        raise UserError("the model broke")
    flags = dict(prompts=write_prompts("a red disc", "a blue ring"), batch=2, seconds=4)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="the model broke"):
        patch.setattr(diffusion, "generate", broken)
        make(**flags)
    assert os.listdir("videos") == [files.MARK]

    @contextlib.contextmanager
    def full(path, *args):
        with writing(path, *args) as write:
            yield write
            if "blue" in path.name:
                raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(data, "writing", full)
        make(**flags)
    assert [name for name in os.listdir("videos") if "blue" in name or "tmp" in name] == []
    assert len(make(**flags)) == 2


def test_the_command_line(models, tmp_path):
    errors = call("sample.py", code=2).stderr
    assert errors.startswith("sample.py: no model; give --model DIR") and len(errors.splitlines()) == 2
    flags = "--prompt", "a red disc", "--seconds", 0.5, "--steps", 1, "--out", tmp_path / "out"
    call("sample.py", "--model", models / "wan", *flags)
    tags = data.read_tags(tmp_path / "out/0000-a-red-disc.mp4")
    assert tags["command"].startswith(f"{sample.__file__} --model")
    assert "--prompt 'a red disc'" in tags["command"]
