"""The VAE against diffusers' with the same random weights, in every layout, and against itself in pieces."""

import copy
import gc

import pytest
import torch
from worlds import assert_close, noise

import vae
from common import UserError

MEAN, STD = [0.1 * i - 0.7 for i in range(16)], [0.5 + 0.1 * i for i in range(16)]


@pytest.fixture(scope="module")
def theirs():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    peer = diffusers.AutoencoderKLWan(base_dim=8, latents_mean=MEAN, latents_std=STD).eval()
    with torch.no_grad():  # gammas of one and small biases would hide mistakes
        for name, p in peer.named_parameters():
            if name.endswith(("gamma", "bias")):
                p.copy_(torch.randn(p.shape) * 0.5 + name.endswith("gamma"))
    return peer.requires_grad_(False)


@pytest.fixture(scope="module")
def diffusers_folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    theirs.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def ours(diffusers_folder):
    return vae.load(diffusers_folder)


def clip(frames, height=32, width=24, batch=1):
    return noise(batch, frames, 3, height, width).mul(0.5).clamp(-1, 1)


def close(a, b, tolerance=1e-5):
    """The tolerance is a share of b's largest value."""
    assert_close(a, b, tolerance * b.abs().max().item())


# ----------------------------------------------------------------------------------------------------
# parity and files

def official_weights(theirs):
    """The peer's weights under Wan's names, from a table of whole layers."""
    table = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
    for side in ("encoder", "decoder"):
        table |= {f"{side}.conv_in": f"{side}.conv1", f"{side}.norm_out": f"{side}.head.0",
                  f"{side}.conv_out": f"{side}.head.2", f"{side}.mid_block.attentions.0": f"{side}.middle.1",
                  f"{side}.mid_block.resnets.0": f"{side}.middle.0",
                  f"{side}.mid_block.resnets.1": f"{side}.middle.2"}
    table |= {f"encoder.down_blocks.{i}": f"encoder.downsamples.{i}" for i in range(11)}
    for i in range(15):
        level, place = divmod(i, 4)
        layer = f"resnets.{place}" if place < 3 else "upsamplers.0"
        table[f"decoder.up_blocks.{level}.{layer}"] = f"decoder.upsamples.{i}"
    inside = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
              "conv_shortcut": "shortcut"}
    renamed = {}
    for name, value in theirs.state_dict().items():
        layer = next(k for k in table if name.startswith(k + "."))
        part, *rest = name[len(layer) + 1:].split(".")
        renamed[".".join([table[layer], inside.get(part, part), *rest])] = value
    return renamed


def test_encode_and_decode_equal_diffusers(theirs, ours):
    video, z = clip(17, batch=2), noise(2, 5, 16, 4, 3)
    mean, logvar = ours.posterior(video)
    posterior = theirs.encode(video.transpose(1, 2)).latent_dist
    close(mean, posterior.mode().transpose(1, 2), 1e-4)
    close(logvar.clamp(-30, 20), posterior.logvar.transpose(1, 2), 1e-4)
    mean_, std = torch.tensor(MEAN).view(16, 1, 1), torch.tensor(STD).view(16, 1, 1)
    close(ours.encode(video), (mean - mean_) / std)
    decoded = theirs.decode((z * std + mean_).transpose(1, 2)).sample.transpose(1, 2)
    assert decoded.abs().mean() > 0.05 and (decoded.abs() < 1).float().mean() > 0.2  # not a degenerate case
    close(ours.decode(z), decoded, 1e-4)


def test_gradients_equal_diffusers(theirs, ours):
    peer, us = copy.deepcopy(theirs).requires_grad_(), copy.deepcopy(ours).requires_grad_()
    video, z = clip(9, 16, 16), noise(1, 3, 16, 2, 2)
    peer.encode(video.transpose(1, 2)).latent_dist.mode().square().sum().backward()
    us.posterior(video, piece=2)[0].square().sum().backward()
    close(us.encoder.conv1.weight.grad, peer.encoder.conv_in.weight.grad, 1e-3)
    time_conv = peer.encoder.down_blocks[5].time_conv
    close(us.encoder.downsamples[5].time_conv.weight.grad, time_conv.weight.grad, 1e-3)
    peer.decode(z.transpose(1, 2)).sample.square().sum().backward()
    us.reconstruct(z, piece=2).clamp(-1, 1).square().sum().backward()
    close(us.decoder.conv1.weight.grad, peer.decoder.conv_in.weight.grad, 1e-3)
    time_conv = peer.decoder.up_blocks[1].upsamplers[0].time_conv
    close(us.decoder.upsamples[7].time_conv.weight.grad, time_conv.weight.grad, 1e-3)


def test_every_layout_loads_the_same(theirs, ours, diffusers_folder, tmp_path):
    torch.save(official_weights(theirs), tmp_path / "Wan2.1_VAE.pth")
    (tmp_path / "saved").mkdir()
    vae.save(ours, tmp_path / "saved" / "vae.safetensors")
    for path in (diffusers_folder / "vae", tmp_path, tmp_path / "Wan2.1_VAE.pth", tmp_path / "saved",
                 tmp_path / "saved" / "vae.safetensors"):
        loaded = vae.load(path)
        pairs = zip(loaded.state_dict().items(), ours.state_dict().items(), strict=True)
        assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs), path
        plain = path.name in (tmp_path.name, "Wan2.1_VAE.pth")  # these hold no mean and std
        assert loaded.latents_mean == (list(vae.WAN_MEAN) if plain else MEAN), path
        assert loaded.latents_std == (list(vae.WAN_STD) if plain else STD), path


def test_save_and_load_are_bit_exact_and_sizes_come_from_the_weights(tmp_path):
    torch.manual_seed(1)
    sizes = dict(width=4, multipliers=(1, 3, 2), blocks=1, z_dim=6, temporal=(True, False))
    small = vae.WanVAE(**sizes, latents_mean=[0.1, 0.2, 1 / 3, 0, 0, 0], latents_std=[1, 2, 3, 4, 5, 6.5])
    small.requires_grad_(False)
    vae.save(small, tmp_path / "vae.safetensors")
    loaded = vae.load(tmp_path)
    video = clip(5, 12, 8)
    z = small.encode(video)
    assert z.shape == (1, 3, 6, 3, 2) and small.decode(z).shape == video.shape
    assert torch.equal(z, loaded.encode(video)) and torch.equal(small.decode(z), loaded.decode(z))


def test_full_size_matches_the_published_layout():
    with torch.device("meta"):
        full = vae.WanVAE()
    shapes = {k: tuple(v.shape) for k, v in full.state_dict().items()}
    assert len(shapes) == 194 and sum(p.numel() for p in full.parameters()) == 126_892_531
    expected = {
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
        "encoder.downsamples.0.residual.0.gamma": (96, 1, 1, 1),
        "encoder.downsamples.2.resample.1.weight": (96, 96, 3, 3),
        "encoder.downsamples.3.shortcut.weight": (192, 96, 1, 1, 1),
        "encoder.downsamples.5.time_conv.bias": (192,),
        "encoder.downsamples.8.time_conv.weight": (384, 384, 3, 1, 1),
        "encoder.downsamples.10.residual.6.weight": (384, 384, 3, 3, 3),
        "encoder.middle.1.norm.gamma": (384, 1, 1),
        "encoder.head.2.weight": (32, 384, 3, 3, 3),
        "conv1.weight": (32, 32, 1, 1, 1),
        "conv2.bias": (16,),
        "decoder.conv1.weight": (384, 16, 3, 3, 3),
        "decoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
        "decoder.middle.1.proj.bias": (384,),
        "decoder.upsamples.3.time_conv.weight": (768, 384, 3, 1, 1),
        "decoder.upsamples.3.resample.1.weight": (192, 384, 3, 3),
        "decoder.upsamples.4.shortcut.weight": (384, 192, 1, 1, 1),
        "decoder.upsamples.7.time_conv.bias": (768,),
        "decoder.upsamples.11.resample.1.weight": (96, 192, 3, 3),
        "decoder.upsamples.14.residual.3.gamma": (96, 1, 1, 1),
        "decoder.head.2.weight": (3, 96, 3, 3, 3)}
    assert {k: shapes.get(k) for k in expected} == expected
    assert [k for k in shapes if "shortcut.weight" in k] == [
        "encoder.downsamples.3.shortcut.weight", "encoder.downsamples.6.shortcut.weight",
        "decoder.upsamples.4.shortcut.weight"]
    assert [k for k in shapes if "time_conv.weight" in k] == [
        "encoder.downsamples.5.time_conv.weight", "encoder.downsamples.8.time_conv.weight",
        "decoder.upsamples.3.time_conv.weight", "decoder.upsamples.7.time_conv.weight"]


# ----------------------------------------------------------------------------------------------------
# pieces, frame 0, memory

def test_any_piece_size_gives_the_same(ours):
    video, z = clip(29), noise(1, 8, 16, 4, 3)
    (mean, _) = ours.posterior(video, piece=8)
    frames = ours.reconstruct(z, piece=8)
    for piece in (1, 2, 3, 7):
        close(ours.posterior(video, piece)[0], mean)
        close(ours.reconstruct(z, piece), frames)


def stream(way, x, sizes, state):
    """What `way` gives for x in parts of these sizes and a last one with the rest."""
    for part in x.split([*sizes, x.shape[1] - sum(sizes)], 1):
        part = part.clone()
        yield way(part, state)
        part.fill_(torch.nan)  # a caller may use its memory again


def test_a_stream_equals_the_whole(ours):
    video, z = clip(29), noise(1, 8, 16, 4, 3)
    latents, frames = ours.encode(video), ours.decode(z)
    assert torch.equal(ours.encode(video, {}), latents) and torch.equal(ours.decode(z, {}), frames)
    for sizes in ([1], [1, 4, 4], [2, 2, 2, 2], [3, 2, 9, 1, 1], [7, 1, 13], [1] * 28):
        close(torch.cat([*stream(ours.encode, video, sizes, {})], 1), latents)
    for sizes in ([1], [2, 1, 4], [3, 3], [1] * 7):
        close(torch.cat([*stream(ours.decode, z, sizes, {})], 1), frames)


def test_a_stream_gives_what_is_complete_and_holds_the_rest(ours):
    state = {}
    video = clip(16, 8, 8, batch=2)
    pieces = [(z, state["held"].shape[1]) for z in stream(ours.encode, video, [1, 1, 2, 4, 5], state)]
    assert [(z.shape[1], held) for z, held in pieces] == [(1, 0), (0, 1), (0, 3), (1, 3), (2, 0), (0, 3)]
    assert pieces[1][0].shape == (2, 0, 16, 1, 1) and pieces[1][0].dtype == torch.float32
    close(torch.cat([z for z, _ in pieces], 1), ours.encode(video[:, :13]))
    pieces = stream(ours.decode, noise(1, 4, 16, 1, 1), [1, 2], {})
    assert [video.shape[1] for video in pieces] == [1, 8, 4]


def test_streams_at_the_same_time_do_not_meet(ours):
    for way, x in (ours.encode, clip(13, 8, 8, batch=2)), (ours.decode, noise(2, 4, 16, 1, 1)):
        pairs = zip(*(stream(way, one[None], [1, 2], {}) for one in x), strict=True)
        for one, pieces in zip(x, zip(*pairs, strict=True), strict=True):
            close(torch.cat(pieces, 1), way(one[None]))


def test_frame_0_stands_alone(ours):
    video = clip(9)
    z = ours.encode(video)
    close(ours.encode(video[:, :1]), z[:, :1])
    decoded, first = ours.decode(z), ours.decode(z[:, :1])
    assert decoded.shape[1] == 9 and first.shape[1] == 1
    close(first, decoded[:, :1])


def test_the_future_never_reaches_the_past(ours):
    long = clip(81, 16, 8)
    z = ours.encode(long)
    close(ours.encode(long[:, :9]), z[:, :3])
    close(ours.decode(z[:, :3]), ours.decode(z)[:, :9])


def test_batch_equals_singles(ours):
    video = clip(9, batch=3)
    z = ours.encode(video)
    close(z, torch.cat([ours.encode(v[None]) for v in video]))
    close(ours.decode(z), torch.cat([ours.decode(one[None]) for one in z]))


def live_bytes():
    """Bytes of every tensor there is, each storage once."""
    gc.collect()
    kinds = torch.Tensor, torch.nn.Parameter  # and none of the fakes that torch.compile leaves behind
    storages = [x.untyped_storage() for x in gc.get_objects() if type(x) in kinds]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_memory_does_not_grow_with_the_video(ours, way):
    state = {}
    sizes = []
    for i in range(21):
        getattr(ours, way)(clip(6, 8, 8) if way == "encode" else noise(1, 2, 16, 1, 1), state)
        if i in (2, 10, 20):  # the encoder holds one frame back at each
            sizes.append(live_bytes())
    assert len(set(sizes)) == 1, sizes


@pytest.mark.parametrize("way", ["encoder", "decoder"])
def test_what_is_kept_does_not_depend_on_the_piece(ours, way, monkeypatch):
    states = []

    def spy(x, state):
        states.append(state)
        return type(getattr(ours, way)).forward(getattr(ours, way), x, state)

    monkeypatch.setattr(getattr(ours, way), "forward", spy)
    kept = []
    for piece in (2, 6):
        ours.reconstruct(ours.posterior(clip(45, 8, 8), piece)[0], piece)
        values = [v for value in states[-1].values() for v in (value if isinstance(value, list) else [value])]
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        kept.append(sum(v.untyped_storage().nbytes() for v in tensors))
        assert len(tensors) > 20
    assert kept[0] == kept[1], kept


def test_a_long_video_goes_through_in_small_pieces(ours, monkeypatch):
    monkeypatch.setattr(vae, "PIECE_BYTES", {"cpu": 15 * 8 * 8 * 8 * 4})  # 13 frames and a tail of 2
    seen = {"encoder": [], "decoder": []}
    for name in seen:
        def spy(x, state, name=name):
            seen[name].append(x.shape[1])
            return type(getattr(ours, name)).forward(getattr(ours, name), x, state)
        monkeypatch.setattr(getattr(ours, name), "forward", spy)
    ours.decode(ours.encode(clip(81, 8, 8)))
    assert seen == {"encoder": [9] + [12] * 6, "decoder": [3] * 7}
    assert ours.best_piece(1, 8, 16) == 1 and ours.best_piece(1, 800, 800) == 1


# ----------------------------------------------------------------------------------------------------
# numbers

def test_gradients_do_not_change_the_result(ours):
    trained = copy.deepcopy(ours).requires_grad_()
    video, z = clip(9), noise(1, 3, 16, 4, 3)
    mean, _ = trained.posterior(video, piece=1)
    close(ours.normalise(mean).detach(), ours.encode(video))
    close(trained.decode(z).detach(), ours.decode(z))
    close(trained.decode(z, {}), ours.decode(z))
    assert not trained.encode(video, {}).requires_grad and not trained.decode(z, {}).requires_grad
    (trained.reconstruct(mean, piece=1) - video).square().mean().backward()
    unused = {"conv1.weight", "conv1.bias"}  # the log variance is half of conv1's output
    assert all(p.grad is not None and p.grad.isfinite().all() and (name in unused or p.grad.any())
               for name, p in trained.named_parameters())
    z.requires_grad_()
    ours.reconstruct(z, piece=1).sum().backward()  # through frozen weights
    assert z.grad[:, 0].any() and z.grad[:, 2].any()
    before = z.grad.clone()
    ours.decode(z).sum().backward()
    assert not torch.equal(z.grad, before)


def test_normalisation_goes_there_and_back(ours):
    mean = ours.posterior(clip(9))[0]
    z = ours.normalise(mean)
    close(ours.denormalise(z), mean)
    close(z[0, 2, 5] * STD[5] + MEAN[5], mean[0, 2, 5])
    close(ours.decode(z), ours.reconstruct(mean).clamp(-1, 1))


def test_bfloat16_is_close_and_comes_out_as_float32(diffusers_folder, ours):
    half = vae.load(diffusers_folder, dtype=torch.bfloat16)
    assert half.encoder.conv1.weight.dtype == torch.bfloat16
    video, z = clip(9), noise(1, 3, 16, 4, 3)
    for a, b in ((half.encode(video), ours.encode(video)), (half.decode(z), ours.decode(z))):
        assert a.dtype == torch.float32
        assert (a - b).square().mean().sqrt() / b.square().mean().sqrt() < 3e-2


def test_norm_is_computed_in_float32():
    norm = vae.RMSNorm(64).to(torch.bfloat16)
    x = noise(50, 64).to(torch.bfloat16)
    exact = torch.nn.functional.normalize(x.double(), dim=-1) * 8
    assert torch.equal(norm(x), exact.to(torch.bfloat16))
    assert not norm(torch.zeros(2, 64, dtype=torch.bfloat16)).any()


# ----------------------------------------------------------------------------------------------------
# refusals

@pytest.mark.parametrize("video, says", [
    (lambda: clip(80, 8, 8), "80 frames.*77 or 81"), (lambda: clip(2, 8, 8), "2 frames.*1 or 5"),
    (lambda: clip(1, 20, 8), "height 20.*16 or 24"), (lambda: clip(1, 8, 5), "width 5.*to 8"),
    (lambda: clip(1, 8, 8)[0], "5 dimensions"), (lambda: clip(1, 8, 8)[:, :, :1], "1 channels"),
    (lambda: clip(1, 8, 8).transpose(1, 2), "1 channels"), (lambda: clip(1, 8, 8)[:, :0], "nothing in it"),
    (lambda: clip(1, 8, 8).to(torch.uint8), "uint8.*127.5 - 1"), (lambda: clip(1, 8, 8).long(), "int64"),
    (lambda: clip(1, 8, 8) / 0, "NaN"),
    (lambda: clip(1, 8, 8).index_fill(3, torch.tensor(2), torch.nan), "NaN")])
def test_encode_refuses(ours, video, says):
    with pytest.raises(UserError, match=says):
        ours.encode(video())


@pytest.mark.parametrize("z, says", [
    (lambda: noise(1, 1, 8, 1, 1), "8 channels"), (lambda: noise(1, 16, 1, 1), "5 dimensions"),
    (lambda: noise(1, 1, 16, 1, 1).int(), "int32"), (lambda: noise(1, 0, 16, 1, 1), "nothing in it"),
    (lambda: noise(1, 1, 16, 1, 1) * torch.inf, "infinite")])
def test_decode_refuses(ours, z, says):
    with pytest.raises(UserError, match=says):
        ours.decode(z())


def test_a_stream_refuses_the_wrong_shape(ours):
    with pytest.raises(UserError, match="height 20.*16 or 24"):
        ours.encode(clip(1, 20, 8), {})
    with pytest.raises(UserError, match="nothing in it"):
        ours.decode(noise(1, 0, 16, 1, 1), {})


def test_broken_and_foreign_files_are_named(theirs, ours, tmp_path):
    with pytest.raises(UserError, match="no VAE in"):
        vae.load(tmp_path)
    file = tmp_path / "Wan2.1_VAE.pth"
    weights = official_weights(theirs)
    torch.save(weights, file)
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"Wan2.1_VAE.pth is truncated"):
        vae.load(tmp_path)
    torch.save({"encoder.downsamples.0.downsamples.0.residual.2.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="VAE.pth is not Wan2.1's VAE, but the VAE of Wan2.2"):
        vae.load(file)
    torch.save({k: v for k, v in weights.items() if k != "decoder.head.0.gamma"}, file)
    with pytest.raises(UserError, match=r"Wan2.1_VAE.pth.*\n  missing: decoder.head.0.gamma"):
        vae.load(file)
    torch.save(vae.WanVAE(width=4, z_dim=8).state_dict(), file)
    with pytest.raises(UserError, match="lacks latents_mean.*not 8"):
        vae.load(file)
