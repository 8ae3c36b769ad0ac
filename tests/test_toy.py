"""The toy world: exact, the same everywhere, and its VAE good enough to see it through."""

import json

import pytest
import torch

import common
import data
import flags
import model
import t5
import toy
import vae


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "wan"
    toy.make_wan(folder)
    return folder


def test_a_world_is_a_function_of_its_seed():
    frames = [data.to_uint8(toy.render(toy.draw_world(0, i), toy.FRAMES)) for i in range(4)]
    again = [data.to_uint8(toy.render(toy.draw_world(0, i), toy.FRAMES)) for i in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(frames, again, strict=True))
    means = torch.stack(frames).float().mean((1, 2, 3, 4)).tolist()
    assert means == pytest.approx([114.88, 109.50, 104.18, 116.67], abs=0.05)  # everywhere
    assert not torch.equal(frames[0], data.to_uint8(toy.render(toy.draw_world(1, 0), 81)))


def test_the_prompt_tells_shape_and_direction_and_nothing_else():
    worlds = [toy.draw_world(0, i) for i in range(300)]
    captions = {f"A {s} moving {d}" for s in toy.SHAPES for d in toy.DIRECTIONS}
    assert {toy.caption(w) for w in worlds} == captions
    a, b = [w for w in worlds if toy.caption(w) == toy.caption(worlds[0])][:2]
    assert not torch.allclose(a.base, b.base, atol=0.05) and not torch.allclose(a.colour, b.colour, atol=0.05)


@pytest.mark.parametrize("direction,way", [
    ("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))])
def test_a_sprite_moves_as_its_caption_says_and_comes_back(direction, way):
    world = toy.draw_world(0, 0)._replace(direction=direction, shape="disc", speed=0.5,
                                          frequencies=torch.zeros(2, 2))
    video = toy.render(world, 65)
    moved = torch.roll(video[0], (2 * way[1], 2 * way[0]), (1, 2))  # 4 frames at half a pixel
    assert torch.allclose(video[4], moved, atol=1e-5) and not torch.allclose(video[4], video[0], atol=0.1)
    assert torch.allclose(video[64], video[0], atol=1e-4), "once around the picture"
    assert torch.equal(toy.render(world, 5, start=60), video[60:])


@pytest.mark.parametrize("shape,area", [
    ("disc", 3.1416), ("ring", 2.356), ("square", 2.89), ("triangle", 1.299)])
def test_sprites_have_their_shape(shape, area):
    world = toy.draw_world(0, 0)._replace(shape=shape, radius=7.0, base=-torch.ones(3), colour=torch.ones(3),
                                          waves=torch.zeros(2, 3), place=torch.tensor([16.0, 16.0]))
    covered = ((toy.render(world, 1) + 1) / 2).mean() * toy.SIZE**2
    assert covered.item() == pytest.approx(area * 49, rel=0.05)


def test_the_vae_reaches_35_db_on_held_out_clips(wan):
    network = vae.load(wan)
    worlds = [toy.draw_world(12345, i) for i in range(6)]
    video = torch.stack([toy.render(w, toy.FRAMES) for w in worlds])
    z = network.encode(video)
    assert z.shape == (6, 21, 16, 4, 4)
    error = ((network.decode(z) - video) / 2).square().mean((1, 2, 3, 4))
    psnr = (-10 * error.log10()).mean().item()
    print(f"{psnr:.2f} dB")
    assert psnr >= 35
    assert z.mean().abs() < 0.3 and 0.7 < z.std() < 1.4, "latents are normalised"
    assert toy.VAE_FILE.stat().st_size <= 2 * 2**20


def test_the_model_directory_is_complete(wan):
    net, text = model.load(wan), t5.load(wan)
    assert data.geometry(wan) == (32, 32, 81, 16)
    rows = text.encode([f"A {s} moving {d}" for s in toy.SHAPES for d in toy.DIRECTIONS] + [""])
    assert all(3 <= len(r) <= net.config.text_len for r in rows[:-1])
    longest = text.encode(["A reversed video of a triangle moving right"])[0]
    assert len(longest) == 9, "a token for each word"
    pooled = torch.stack([r.mean(0) for r in rows])
    distance = torch.cdist(pooled, pooled) + 9 * torch.eye(len(rows))
    assert distance.min() > 0.05, "captions must differ in their embeddings"
    unknown = text.tokenizer.unk_id()
    assert unknown not in t5.token_ids(text.tokenizer, "A reversed video of a ring moving up")
    x, t = torch.ones(1, 21, 16, 4, 4), torch.zeros(1, 21)
    assert net(x, t, rows[0][None]).isfinite().all()


def test_the_model_directory_has_the_base_model(tmp_path, monkeypatch):
    """As ship_base writes it, of a model_k folder."""
    config = model.Config(dim=128, ffn_dim=512, num_heads=4, num_layers=2, text_dim=64, text_len=32)
    net = model.WanModel(config).init_weights("trained")
    model.save(net, tmp_path / "model", step=300, mode="df")
    for folder, steps in (("first", (50, 100, 200, 300)), ("model", (100,))):
        log = [{"step": step, "loss": 1 / step} for step in steps] + [{"step": steps[-1], "held_out": 1}]
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "log.jsonl").write_text(data.as_lines(log))
    monkeypatch.setattr(toy, "BASE_FILE", tmp_path / "base.safetensors")
    toy.ship_base([tmp_path / "first", tmp_path / "model"])
    weights, recorded = common.open_weights(toy.BASE_FILE)
    assert {w.read().dtype for w in weights.values()} == {torch.bfloat16}
    assert toy.BASE_FILE.stat().st_size < 3 * 2**20
    del recorded["config"]
    assert recorded == {"seed": 7, "clips": 6000, "trainings": [[24000, 6e-3], [3000, 1e-3]], "mode": "df",
                        "losses": [1 / 100, 1 / 200, 1 / 300, 1 / 100]}
    toy.make_wan(tmp_path / "wan")
    shipped = model.load(tmp_path / "wan")
    assert shipped.config == config and data.geometry(tmp_path / "wan") == (32, 32, 81, 16)
    assert model.trained_causally(tmp_path / "wan") is True
    for (name, a), b in zip(shipped.named_parameters(), net.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=2**-8), name
    toy.make_wan(tmp_path / "untrained", trained=False)
    assert not model.load(tmp_path / "untrained").head.head.weight.any(), "it has yet to learn"


def test_what_the_command_makes(tmp_path, monkeypatch):
    toy.main(toy.Config(out=str(tmp_path), clips=2, starts=1, seed=3))
    assert data.probe(tmp_path / "videos/00001.mp4").frames == 81
    assert data.probe(tmp_path / "starts/00000.mp4").frames == 9
    world = toy.draw_world("starts", 0)
    assert (tmp_path / "prompts.jsonl").read_text() == data.as_lines(
        [{"prompt": toy.caption(world), "extend": "starts/00000.mp4"}])
    shown = torch.stack(list(data.read_frames(data.probe(tmp_path / "starts/00000.mp4"))))
    assert (data.to_float(shown) - toy.render(world, 9)).abs().mean() < 0.05
    for path, name in (("videos/00001.mp4", [3, 1]), ("starts/00000.mp4", ["starts", 0])):
        tags = data.read_tags(tmp_path / path)
        assert tags == {"prompt": toy.caption(toy.draw_world(*name)), "world": name}, "the truth can be known"
    calls = []
    monkeypatch.setattr(toy, "train_vae", calls.append)
    monkeypatch.setattr(toy, "train_base", calls.append)
    toy.main(toy.Config(train_vae=True, seed=3))
    toy.main(toy.Config(train_base=True, out=str(tmp_path)))
    assert calls == [3, tmp_path / "base"]


# ----------------------------------------------------------------------------------------------------
# what is shipped is what the commands make: their first steps, done again

@pytest.mark.slow
def test_the_shipped_vae_is_what_its_command_makes():
    """Half a minute. Other CPUs round differently."""
    recorded = common.open_weights(toy.VAE_FILE)[1]["losses"]
    assert len(recorded) == 51 and recorded[-1] < 0.001
    assert toy.train_vae(0, until=100) == pytest.approx(recorded[:2], rel=0.005)


@pytest.mark.slow
def test_the_shipped_base_is_what_its_command_makes(tmp_path):
    """Only the clips that 100 steps touch are drawn and encoded: a third of all, 4 minutes."""
    recorded = common.open_weights(toy.BASE_FILE)[1]
    trainings = [list(training) for training in toy.BASE_TRAININGS]
    assert recorded["mode"] == toy.BASE_MODE and recorded["trainings"] == trainings
    held_out = set(data.permutation(toy.BASE_CLIPS, "held out", 0)[:flags.HELD_OUT].tolist())
    trained = [i for i in range(toy.BASE_CLIPS) if i not in held_out]
    touched = held_out | {trained[data.sample_order(len(trained), 0, place)] for place in range(100 * 16)}
    toy.prepare_base(tmp_path, sorted(touched))
    worlds = [toy.draw_world(toy.BASE_SEED, i) for i in range(toy.BASE_CLIPS)]
    data.write_index(tmp_path / "agg_0", (
        data.index_entry(f"{i:05d}", toy.caption(world), "seed", 0, f"{i:05d}.mp4")
        for i, world in enumerate(worlds)))
    [folder] = toy.fit_base(tmp_path, [(100, toy.BASE_TRAININGS[0][1])])
    log = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    [loss] = [line["loss"] for line in log if "loss" in line]
    assert loss == pytest.approx(recorded["losses"][0], rel=0.005)
