"""VBench's networks: against peers and slow references; how frames reach them; weight files of every kind."""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from worlds import assert_close, blank, curves_of, digest, levels, noise, pan, shifted, texture

import metrics
import vbench
from common import UserError, rng


@pytest.fixture(autouse=True)
def no_caches(tmp_path, monkeypatch):
    """Weight files that this machine happens to have must not be used."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("VBENCH_CACHE_DIR", raising=False)


# ----------------------------------------------------------------------------------------------------
# weights of the published layouts, at any depth and width

def with_bias(shapes):
    return {f"{name}.{part}": shape if part == "weight" else shape[:1]
            for name, shape in shapes.items() for part in ("weight", "bias")}


def dino_shapes(dim=768, depth=12, grid=14, patch=16):
    layers = {"patch_embed.proj": (dim, 3, patch, patch), "norm": (dim,)}
    for block in (f"blocks.{i}" for i in range(depth)):
        layers |= {f"{block}.attn.qkv": (3 * dim, dim), f"{block}.attn.proj": (dim, dim),
                   f"{block}.mlp.fc1": (4 * dim, dim), f"{block}.mlp.fc2": (dim, 4 * dim),
                   f"{block}.norm1": (dim,), f"{block}.norm2": (dim,)}
    return {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + grid**2, dim)} | with_bias(layers)


def clip_shapes(dim, depth, patch, out, size=224):
    layers = {"visual.ln_pre": (dim,), "visual.ln_post": (dim,)}
    for block in (f"visual.transformer.resblocks.{i}" for i in range(depth)):
        layers |= {f"{block}.attn.in_proj": (3 * dim, dim), f"{block}.attn.out_proj": (dim, dim),
                   f"{block}.mlp.c_fc": (4 * dim, dim), f"{block}.mlp.c_proj": (dim, 4 * dim),
                   f"{block}.ln_1": (dim,), f"{block}.ln_2": (dim,)}
    shapes = {"visual.class_embedding": (dim,), "visual.proj": (dim, out),
              "visual.positional_embedding": (1 + (size // patch)**2, dim),
              "visual.conv1.weight": (dim, 3, patch, patch)}
    return shapes | {k.replace("in_proj.", "in_proj_"): v for k, v in with_bias(layers).items()}


def musiq_shapes(depth=14, dim=384):
    tower = "transformer_encoder"
    convs = {"conv_root": (64, 3, 7, 7), "block1.conv1": (64, 64, 1, 1), "block1.conv2": (64, 64, 3, 3),
             "block1.conv3": (256, 64, 1, 1), "block1.conv_proj": (256, 64, 1, 1)}
    layers = {"embedding": (dim, 16384), "head": (1, dim), f"{tower}.encoder_norm": (dim,)}
    layers |= {name.replace("conv", "gn"): shape[:1] for name, shape in convs.items()}
    for i in range(depth):
        block = f"{tower}.transformer.encoderblock_{i}"
        layers |= {f"{block}.attention.{part}": (dim, dim) for part in ("query", "key", "value", "out")}
        layers |= {f"{block}.norm1": (dim,), f"{block}.norm2": (dim,)}
        layers |= {f"{block}.mlp.fc1": (3 * dim, dim), f"{block}.mlp.fc2": (dim, 3 * dim)}
    return with_bias(layers) | {f"{name}.weight": shape for name, shape in convs.items()} | {
        f"{tower}.cls": (1, 1, dim), f"{tower}.posembed_input.position_emb": (1, 100, dim),
        f"{tower}.scaleembed_input.scale_emb": (3, dim)}


def encoder_shapes(name, widths, out, kernels, squeeze):
    """The convolutions of RAFT's and AMT's feature encoders."""
    shapes = {f"{name}.conv1": (widths[0], 3, 7, 7), f"{name}.conv2": (out, widths[-1], 1, 1)}
    wide = widths[0]
    for stage, width in enumerate(widths, 1):
        for block in range(2):
            layers = [wide if block == 0 else width, *[width // squeeze] * (len(kernels) - 1), width]
            for i, k in enumerate(kernels):
                shapes[f"{name}.layer{stage}.{block}.conv{i + 1}"] = (layers[i + 1], layers[i], k, k)
        if stage > 1:
            shapes[f"{name}.layer{stage}.0.downsample.0"] = (width, wide, 1, 1)
        wide = width
    return shapes


def raft_shapes():
    """As in raft-things.pth, but for the norms it holds twice."""
    convs = {}
    for net in ("fnet", "cnet"):
        convs |= encoder_shapes(net, (64, 96, 128), 256, (3, 3), 1)
    update = {"encoder.convc1": (256, 324, 1, 1), "encoder.convc2": (192, 256, 3, 3),
              "encoder.convf1": (128, 2, 7, 7), "encoder.convf2": (64, 128, 3, 3),
              "encoder.conv": (126, 256, 3, 3),
              "flow_head.conv1": (256, 128, 3, 3), "flow_head.conv2": (2, 256, 3, 3),
              "mask.0": (256, 128, 3, 3), "mask.2": (576, 256, 1, 1)}
    update |= {f"gru.conv{gate}1": (128, 384, 1, 5) for gate in "zrq"}
    update |= {f"gru.conv{gate}2": (128, 384, 5, 1) for gate in "zrq"}
    shapes = with_bias(convs | {f"update_block.{name}": shape for name, shape in update.items()})
    for name, shape in convs.items():
        if name.startswith("cnet") and name != "cnet.conv2":
            norm = name.replace("conv", "norm").replace("downsample.0", "downsample.1")
            parts = ("weight", "bias", "running_mean", "running_var")
            shapes |= {f"{norm}.{part}": shape[:1] for part in parts}
            shapes[f"{norm}.num_batches_tracked"] = ()
    return shapes


def amt_shapes():
    convs = encoder_shapes("feat_encoder", (32, 64, 96), 84, (1, 3, 1), 4)
    prelus = {}
    wide = 3
    for level, width in enumerate((20, 32, 44, 56), 1):
        convs |= {f"encoder.pyramid{level}.0.0": (width, wide, 3, 3),
                  f"encoder.pyramid{level}.1.0": (width, width, 3, 3)}
        prelus |= {f"encoder.pyramid{level}.{i}.1": (width,) for i in (0, 1)}
        wide = width
    transposed = {}
    for level, wide, width, out in ((4, 113, 112, 48), (3, 136, 132, 36), (2, 100, 96, 24), (1, 64, 60, 24)):
        block = f"decoder{level}.convblock"
        convs |= {f"{block}.0.0": (width, wide, 3, 3), f"{block}.1.conv5": (width, width, 3, 3)}
        convs |= {f"{block}.1.conv{i}.0": (n, n, 3, 3) for i, n in ((1, width), (2, 20), (3, width), (4, 20))}
        prelus |= {f"{block}.0.1": (width,), f"{block}.1.prelu": (width,)}
        prelus |= {f"{block}.1.conv{i}.1": (n,) for i, n in ((1, width), (2, 20), (3, width), (4, 20))}
        transposed |= {f"{block}.2.weight": (width, out, 4, 4), f"{block}.2.bias": (out,)}
    for level, features in ((4, 44), (3, 32), (2, 20)):
        name = f"update{level}"
        convs |= {f"{name}.convc1": (64, 392, 1, 1), f"{name}.convf1": (40, 4, 7, 7),
                  f"{name}.convf2": (20, 40, 3, 3), f"{name}.conv": (68, 84, 3, 3),
                  f"{name}.gru.0": (76, 72 + features, 3, 3), f"{name}.gru.2": (76, 76, 3, 3)}
        convs |= {f"{name}.{head}.0": (76, 76, 3, 3) for head in ("feat_head", "flow_head")}
        convs |= {f"{name}.feat_head.2": (features, 76, 3, 3), f"{name}.flow_head.2": (4, 76, 3, 3)}
    convs |= {"comb_block.0": (18, 9, 3, 3), "comb_block.2": (3, 18, 3, 3)}
    return with_bias(convs) | transposed | {f"{name}.weight": shape for name, shape in prelus.items()} | {
        "comb_block.1.weight": (18,)}


def filled(shapes, gain=1.0):
    """Random weights under which every part matters."""
    weights = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=rng(name))
        if len(shape) >= 2 and "embed" not in name.replace("embedding.weight", ""):
            x = x * gain / math.prod(shape[1:]) ** 0.5
        elif name.endswith("running_var"):
            x = 0.5 + x.abs()
        elif len(shape) == 1 and name.endswith("weight"):
            x = 1 + 0.2 * x
        elif len(shape) == 1:
            x = 0.1 * x
        weights[name] = x
    return weights


def hollow(shapes):
    """The full shapes of a published file, all zero: a file of a few kilobytes."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


PUBLISHED = {
    "dino_vitbase16_pretrain.pth": dino_shapes(),
    "ViT-B-32.pt": clip_shapes(768, 12, 32, 512),
    "ViT-L-14.pt": clip_shapes(1024, 24, 14, 768),
    "sa_0_4_vit_l_14_linear.pth": {"weight": (1, 768), "bias": (1,)},
    "musiq_spaq_ckpt-358bb6af.pth": musiq_shapes(),
    "raft-things.pth": raft_shapes(),
    "amt-s.pth": amt_shapes(),
}


@pytest.fixture(scope="module")
def networks():
    """Weights for each dimension's score: small transformers, the convolutional networks in full."""
    small_clip = filled(clip_shapes(128, 2, 32, 64))
    return {"subject_consistency": [filled(dino_shapes(128, 2))],
            "background_consistency": [small_clip],
            "motion_smoothness": [filled(amt_shapes())],
            "dynamic_degree": [filled(raft_shapes())],
            "aesthetic_quality": [small_clip, {"weight": noise(1, 64), "bias": torch.tensor([5.0])}],
            "imaging_quality": [filled(musiq_shapes(1))]}


def scorer_of(name, weights, batch=4):
    curve, window = metrics.VBENCH[name]
    network = partial(vbench.NETWORKS[name][1], *weights)
    return metrics.Scorer([name], partial(metrics.named, name, network), curve, window, "cpu", batch)


# ----------------------------------------------------------------------------------------------------
# from frames to scores

@pytest.mark.parametrize("name", metrics.DIMENSIONS)
def test_pieces_change_nothing_in_the_six(name, networks, monkeypatch):
    monkeypatch.setattr(vbench, "raft", partial(vbench.raft, iterations=2))
    video = pan(3 if name == "imaging_quality" else 9, 2.0, 128, 136)
    whole, = curves_of(scorer_of(name, networks[name], batch=2), video).values()
    assert len(whole.value) and len(whole.frame) == len(whole.value) and np.isfinite(whole.value).all()
    for pieces in (1, 4):
        cut, = curves_of(scorer_of(name, networks[name], batch=2), video, pieces).values()
        assert np.array_equal(cut.frame, whole.frame) and np.array_equal(cut.value, whole.value)
        assert cut.total == whole.total


def test_videos_that_are_too_short_are_refused(networks):
    for name, frames in (("motion_smoothness", 2), ("dynamic_degree", 2), ("subject_consistency", 1)):
        with pytest.raises(UserError, match=f"needs at least {frames + 1} frames, not {frames}"):
            curves_of(scorer_of(name, networks[name]), pan(frames, height=128, width=128))


@pytest.mark.parametrize("frames", [3, 4, 9, 10])
def test_smoothness_predicts_the_odd_frames(frames, monkeypatch):
    seen = []

    def halfway(w, a, b):
        seen.append((a, b))
        return (a + b) / 2

    monkeypatch.setattr(vbench, "amt", halfway)
    # of 10 + 10t the mean of the neighbours is the frame itself; the offset in odd frames is what is missed
    video = blank(frames, 130, 140) + torch.tensor([10 * t + 7 * (t % 2) for t in range(frames)],
                                                   dtype=torch.uint8).view(-1, 1, 1, 1)
    curve = curves_of(scorer_of("motion_smoothness", [{}], batch=32), video)["motion_smoothness"]
    assert curve.frame.tolist() == list(range(1, 2 * ((frames - 1) // 2), 2))
    np.testing.assert_allclose(curve.value, 1 - 7 / 255, atol=1.5 / 255)
    assert sum(len(a) for a, _ in seen) == len(curve.value)
    assert seen[0][0].shape[2:] == (144, 144) and seen[0][1].max() <= 1


def test_smoothness_truncates_and_crops_as_vbench(monkeypatch):
    monkeypatch.setattr(vbench, "amt", lambda w, a, b: torch.full_like(a, 10.99 / 255))
    frame = torch.full((1, 3, 130, 131), 10, dtype=torch.uint8)
    assert vbench.smoothness({}, frame, frame, frame).item() == 1  # rounded to 11 it would be less
    ramp = torch.arange(130 * 150).view(1, 1, 130, 150).expand(1, 3, -1, -1).remainder(251).to(torch.uint8)
    monkeypatch.setattr(vbench, "amt", lambda w, a, b: a + 0.2 / 255)
    assert vbench.smoothness({}, ramp, ramp, ramp).item() == 1  # cropped where it was padded


def test_padding_repeats_the_border_on_both_sides():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert vbench.pad_to(x, 4)[0, 0].tolist() == [[0, 1, 2, 2], [0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5]]


def test_dynamic_degree_takes_the_fastest_twentieth_of_the_padded_frame(monkeypatch):
    flow = torch.zeros(1, 2, 136, 144)
    flow[0, :, :2, 0] = torch.tensor([[30.0], [40.0]])
    flow[0, :, 2:9] = torch.tensor([3.0, 4.0]).view(2, 1, 1)

    def raft(w, a, b):
        assert a.shape == b.shape == (1, 3, 136, 144)
        return flow

    monkeypatch.setattr(vbench, "raft", raft)
    count = int(0.05 * 136 * 144)  # 979: 2 at speed 50, 977 of the 1008 at speed 5
    frame = torch.zeros(1, 3, 130, 140, dtype=torch.uint8)
    assert vbench.flow_magnitude({}, frame, frame).item() == pytest.approx((2 * 50 + (count - 2) * 5) / count)


def test_still_videos_are_consistent_and_not_dynamic(networks):
    video = pan(1, height=128, width=136).repeat(9, 1, 1, 1)
    for name in ("subject_consistency", "background_consistency"):
        assert curves_of(scorer_of(name, networks[name]), video)[name].total == pytest.approx(1, abs=1e-6)
    [weights] = networks["dynamic_degree"]  # these are random, and see motion everywhere but for this
    weights = weights | {k: v * 0 for k, v in weights.items() if "flow_head.conv2" in k}
    assert curves_of(scorer_of("dynamic_degree", [weights]), video[:5])["dynamic_degree"].total == 0


def test_small_frames_are_refused(networks):
    for name in ("dynamic_degree", "motion_smoothness"):
        with pytest.raises(UserError, match=f"{name} needs frames of at least 128x128, not 160x112"):
            curves_of(scorer_of(name, networks[name]), pan(9, height=112, width=160))


@pytest.mark.parametrize(("size", "short", "longest"), [
    ((480, 832), (224, 388), (295, 512)), ((720, 1280), (224, 398), (288, 512)),
    ((832, 480), (388, 224), (512, 295)), ((464, 832), (224, 401), (285, 512)),
    ((256, 448), (224, 392), (256, 448)), ((512, 512), (224, 224), (512, 512))])
def test_sizes(size, short, longest, monkeypatch):
    inputs = []
    for name in ("dino", "clip", "musiq"):
        monkeypatch.setattr(vbench, name, lambda w, x: inputs.append(x))
    for score in (vbench.subject_features, vbench.background_features, vbench.imaging_score):
        score({}, torch.zeros(1, 3, *size, dtype=torch.uint8))
    assert [tuple(x.shape[2:]) for x in inputs] == [short, (224, 224), longest]


def test_resizing_is_vbench_s(monkeypatch):
    """Four taps around each place and no more, no rounding, no clamping; the middle; the statistics."""
    inputs = {}
    for name in ("dino", "clip", "musiq"):
        monkeypatch.setattr(vbench, name, lambda w, x, name=name: inputs.update({name: x}))
    frame = (torch.arange(3 * 480 * 832).view(1, 3, 480, 832) * 7919 % 256).to(torch.uint8)
    for score in (vbench.subject_features, vbench.background_features, vbench.imaging_score):
        score({}, frame)
    image = frame[0].double().numpy()

    def weights(at, size, cubic):
        low = math.floor(at)
        if not cubic:
            return [(min(max(low + i, 0), size - 1), abs(1 - i - (at - low))) for i in (0, 1)]
        taps = []
        for i in range(-1, 3):
            d = abs(at - low - i)  # Keys' kernel with a = -0.75
            taps.append((min(max(low + i, 0), size - 1),
                         1.25 * d**3 - 2.25 * d**2 + 1 if d <= 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)))
        return taps

    def pixel(channel, y, x, height, width, cubic):
        rows = weights((y + 0.5) * 480 / height - 0.5, 480, cubic)
        columns = weights((x + 0.5) * 832 / width - 0.5, 832, cubic)
        return sum(a * b * image[channel, r, c] for r, a in rows for c, b in columns) / 255

    for c, y, x in ((0, 0, 0), (1, 100, 200), (2, 223, 223), (0, 17, 5)):
        imagenet = (pixel(c, y, x, 224, 388, False) - (0.485, 0.456, 0.406)[c]) / (0.229, 0.224, 0.225)[c]
        assert inputs["dino"][0, c, y, x].item() == pytest.approx(imagenet, abs=1e-4)
        mean, deviation = (0.48145466, 0.4578275, 0.40821073)[c], (0.26862954, 0.26130258, 0.27577711)[c]
        assert inputs["clip"][0, c, y, x].item() == pytest.approx(
            (pixel(c, y, x + 82, 224, 388, True) - mean) / deviation, abs=1e-4)
        assert inputs["musiq"][0, c, y, x].item() == pytest.approx(pixel(c, y, x, 295, 512, False), abs=1e-4)
    assert inputs["clip"].max() > (1 - 0.40) / 0.27 + 0.05  # bicubic overshoot stays


# ----------------------------------------------------------------------------------------------------
# the networks

def test_dino_equals_transformers_vit():
    transformers = pytest.importorskip("transformers", reason="the peer of DINO's network")
    config = transformers.ViTConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=3,
                                    num_attention_heads=2, image_size=224, patch_size=16, layer_norm_eps=1e-6)
    peer = transformers.ViTModel(config, add_pooling_layer=False).eval()
    weights = filled(dino_shapes(128, 3))
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        weights[name] = weights[name] * 2e-3  # so faint that the norm's eps matters
    table = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
             "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm.": "layernorm."}
    inside = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    theirs = {}
    for name, value in weights.items():
        for a, b in {**table, "blocks.": "layers."}.items():
            if name.startswith(a):
                name = name.replace(a, b, 1)
                break
        for a, b in inside.items():
            name = name.replace(f".{a}.", f".{b}.") if name.startswith("layers.") else name
        if ".attn.qkv." in name:
            theirs |= {name.replace("attn.qkv", f"attention.{k}_proj"): v
                       for k, v in zip("qkv", value.chunk(3), strict=True)}
        else:
            theirs[name] = value
    peer.load_state_dict(theirs)
    x = noise(2, 3, 224, 224)
    with torch.no_grad():
        assert_close(vbench.dino(weights, x), peer(x).last_hidden_state[:, 0], 1e-5)


def test_clip_equals_transformers():
    transformers = pytest.importorskip("transformers", reason="the peer of CLIP's image tower")
    config = transformers.CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=3,
                                           num_attention_heads=2, image_size=224, patch_size=32,
                                           projection_dim=64, hidden_act="quick_gelu")
    peer = transformers.CLIPVisionModelWithProjection(config).eval()
    weights = filled(clip_shapes(128, 3, 32, 64))
    for name in ("class_embedding", "positional_embedding", "conv1.weight"):
        weights[f"visual.{name}"] = weights[f"visual.{name}"] * 3e-3
    layer = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
             "attn.out_proj": "self_attn.out_proj"}
    theirs = {"visual_projection.weight": weights["visual.proj"].T}
    for name, value in weights.items():
        name = name.removeprefix("visual.")
        if "in_proj" in name:
            block, part = name.split(".attn.in_proj_")
            theirs |= {f"{block}.self_attn.{k}_proj.{part}": v
                       for k, v in zip("qkv", value.chunk(3), strict=True)}
        elif name != "proj":
            for a, b in layer.items():
                name = name.replace(f".{a}.", f".{b}.")
            theirs[name] = value
    outer = {"transformer.resblocks.": "encoder.layers.",
             "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm",
             "conv1": "embeddings.patch_embedding", "class_embedding": "embeddings.class_embedding",
             "positional_embedding": "embeddings.position_embedding.weight"}
    for name in list(theirs):
        for a, b in outer.items():
            if name.startswith(a):
                theirs[f"vision_model.{name.replace(a, b, 1)}"] = theirs.pop(name)
    peer.load_state_dict(theirs)
    x = noise(2, 3, 224, 224)
    with torch.no_grad():
        assert_close(vbench.clip(weights, x), peer(pixel_values=x).image_embeds, 1e-5)


def cubic_rows(size, scale):
    """The matrix of a bicubic (a = -0.75) resize by scale, whatever the size of its output would suggest."""
    rows = torch.zeros(math.floor(size * scale), size, dtype=torch.float64)
    for i in range(len(rows)):
        at = (i + 0.5) / scale - 0.5
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            d = abs(at - tap)
            weight = 1.25 * d**3 - 2.25 * d**2 + 1 if d <= 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            rows[i, min(max(tap, 0), size - 1)] += weight
    return rows


@pytest.mark.parametrize(("height", "width", "square"), [
    (14, 24, False), (24, 14, False), (9, 20, False), (7, 28, False),
    (16, 16, True), (14, 14, False), (14, 14, True)])
def test_dino_positions(height, width, square):  # square: the picture, before its ragged edges are dropped
    weights = {"pos_embed": noise(1, 1 + 14 * 14, 8)}
    actual = vbench.dino_positions(weights, torch.zeros(1, 8, height, width), square)
    if square and height == 14:
        assert actual is weights["pos_embed"]
        return
    grid = weights["pos_embed"][0, 1:].view(14, 14, 8).double()
    rows, columns = (cubic_rows(14, (size + 0.1) / 14) for size in (height, width))
    grid = torch.einsum("yi,xj,ijd->yxd", rows, columns, grid)
    assert_close(actual[0, 1:], grid.reshape(-1, 8).float(), 1e-5)
    assert torch.equal(actual[:, 0], weights["pos_embed"][:, 0])


def test_dino_drops_ragged_columns_and_places_its_positions():
    weights = filled(dino_shapes(128, 1))
    x = noise(1, 3, 224, 388)
    ragged = x.clone()
    ragged[..., 384:] = 9
    assert torch.equal(vbench.dino(weights, x), vbench.dino(weights, ragged))
    # from an oblong input to the patches' positions: the square one gets the table, this one does not
    assert (vbench.dino(weights, x) - vbench.dino(weights, x[..., :224])).abs().max() > 0.01


def test_aesthetic_head_works_on_normalised_features(networks):
    [tower, head] = networks["aesthetic_quality"]
    frames = pan(2, height=224, width=224)
    features = vbench.background_features(tower, frames).double()
    features = features / features.norm(dim=1, keepdim=True)
    expected = features @ head["weight"][0].double() + head["bias"].double()
    assert_close(vbench.aesthetic_score(tower, head, frames).double(), expected / 10, 1e-6)


# MUSIQ

def test_musiq_tokens_of_three_scales(networks, monkeypatch):
    [weights] = networks["imaging_quality"]
    counts = []
    tokens = vbench.musiq_tokens

    def counting(w, image, scale):
        actual = tokens(w, image, scale)
        counts.append((tuple(image.shape[2:]), actual.shape[1], scale))
        return actual

    monkeypatch.setattr(vbench, "musiq_tokens", counting)
    vbench.imaging_score(weights, torch.zeros(1, 3, 480, 832, dtype=torch.uint8))
    assert counts == [((129, 224), 35, 0), ((221, 384), 84, 1), ((295, 512), 160, 2)]


def test_musiq_tokens_one_by_one(networks):
    """Position, order of pixels and channels, and padding of every token, from single tiles."""
    [weights] = networks["imaging_quality"]
    image = noise(1, 3, 70, 100)
    actual = vbench.musiq_tokens(weights, image, 1)[0]  # 3 x 4 tiles
    padded = torch.zeros(3, 96, 128)
    padded[:, 13:83, 14:114] = image[0]
    plain = {k: v for k, v in weights.items()}
    for name in ("position_emb", "scale_emb"):
        key = next(k for k in plain if k.endswith(name))
        plain[key] = torch.zeros_like(plain[key])
    position = next(v for k, v in weights.items() if k.endswith("position_emb"))[0]
    scale = next(v for k, v in weights.items() if k.endswith("scale_emb"))[1]
    place = {0: 0, 1: 3, 2: 6}, {0: 0, 1: 2, 2: 5, 3: 7}  # floor(10 i / 3), floor(10 j / 4)
    for i in range(3):
        for j in range(4):
            tile = padded[None, :, 32 * i:32 * i + 32, 32 * j:32 * j + 32]
            alone = vbench.musiq_tokens(plain, tile, 0)[0, 0]
            assert_close(actual[4 * i + j], alone + position[10 * place[0][i] + place[1][j]] + scale, 1e-4)


def test_musiq_stem(networks):
    """One tile in numpy: filters over their unbiased deviation, TensorFlow's padding, channels innermost."""
    [w] = networks["imaging_quality"]
    w = {k: v.double().numpy() for k, v in w.items()}

    def convolve(name, x, stride=1):  # x [C,H,W]
        filters = w[f"{name}.weight"]
        mean = filters.mean((1, 2, 3), keepdims=True)
        filters = (filters - mean) / (filters.std((1, 2, 3), keepdims=True, ddof=1) + 1e-5)
        k, out = filters.shape[2], -(-x.shape[1] // stride)
        total = max((out - 1) * stride + k - x.shape[1], 0)
        x = np.pad(x, ((0, 0), (total // 2, total - total // 2), (total // 2, total - total // 2)))
        y = np.zeros((len(filters), out, out))
        for i in range(out):
            for j in range(out):
                patch = x[:, i * stride:i * stride + k, j * stride:j * stride + k]
                y[:, i, j] = np.tensordot(filters, patch, 3)
        return y

    def norm(name, x, eps):
        groups = x.reshape(32, -1)
        groups = (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + eps)
        return groups.reshape(x.shape) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    x = noise(1, 64, 8, 8)  # after a norm the unbiased deviation hardly shows; here it does
    expected = torch.from_numpy(convolve("block1.conv1", x[0].double().numpy())).float()
    assert_close(vbench.musiq_conv(networks["imaging_quality"][0], "block1.conv1", x)[0], expected, 1e-4)
    tile = noise(3, 32, 32).double().numpy() * 1e-3  # faint, so that the first eps matters
    x = np.maximum(norm("gn_root", convolve("conv_root", tile, 2), 1e-6), 0)
    x = np.pad(x, ((0, 0), (0, 1), (0, 1)))
    x = np.max([x[:, i:i + 15:2, j:j + 15:2] for i in range(3) for j in range(3)], 0)
    y = np.maximum(norm("block1.gn1", convolve("block1.conv1", x), 1e-4), 0)
    y = np.maximum(norm("block1.gn2", convolve("block1.conv2", y), 1e-4), 0)
    y = norm("block1.gn3", convolve("block1.conv3", y), 1e-4)
    y = np.maximum(y + norm("block1.gn_proj", convolve("block1.conv_proj", x), 1e-4), 0)
    token = w["embedding.weight"] @ y.transpose(1, 2, 0).ravel() + w["embedding.bias"]
    token += w["transformer_encoder.posembed_input.position_emb"][0, 0]
    token += w["transformer_encoder.scaleembed_input.scale_emb"][2]
    actual = vbench.musiq_tokens(networks["imaging_quality"][0], torch.from_numpy(tile).float()[None], 2)
    assert_close(actual[0, 0], torch.from_numpy(token).float(), 1e-3)


# RAFT and AMT

def test_correlations_and_their_look_up():
    """Against loops over places, offsets and corners; offsets run down the columns, x first."""
    a = noise(2, 5, 6, 7)
    b = noise(3, 2, 5, 6, 7)[1]
    radius = 2
    xy = noise(2, 2, 6, 7) * 3 + 2
    actual = vbench.look_up(vbench.correlations(a, b, levels=2), xy, radius)

    def value(level, n, y, x, at_x, at_y):
        total = 0.0
        for cy in (math.floor(at_y), math.floor(at_y) + 1):
            for cx in (math.floor(at_x), math.floor(at_x) + 1):
                weight = (1 - abs(at_y - cy)) * (1 - abs(at_x - cx))
                if 0 <= cy < 6 // 2**level and 0 <= cx < 7 // 2**level:  # zeros outside
                    cells = b[n, :, cy * 2**level:(cy + 1) * 2**level, cx * 2**level:(cx + 1) * 2**level]
                    total += weight * (a[n, :, y, x] @ cells.mean((1, 2))).item() / 5**0.5
        return total

    for n, y, x in ((0, 0, 0), (1, 5, 6), (0, 3, 2), (1, 2, 4)):
        for level in (0, 1):
            for i in range(5):
                for j in range(5):
                    at_x, at_y = xy[n, :, y, x].tolist()
                    at_x, at_y = at_x / 2**level + i - radius, at_y / 2**level + j - radius
                    assert actual[n, level * 25 + i * 5 + j, y, x].item() == pytest.approx(
                        value(level, n, y, x, at_x, at_y), abs=1e-4)


def test_amt_looks_where_the_other_flow_points(networks, monkeypatch):
    """From half way, a's map over b is searched at twice the flow to b, b's map over a at twice that to a."""
    [weights] = networks["motion_smoothness"]
    seen = []
    plain = vbench.look_up
    monkeypatch.setattr(vbench, "look_up", lambda *given: (seen.append(given), plain(*given))[1])
    forth = vbench.correlations(*noise(2, 1, 84, 16, 16))
    back = vbench.correlations(*noise(3, 1, 84, 16, 16)[:2])
    vbench.amt_update(weights, "update3", noise(1, 4, 32, 32), noise(1, 32, 32, 32), forth, back, 2)
    flow = F.avg_pool2d(noise(1, 4, 32, 32), 2) / 2  # at half the size, half as long
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    expectations = (forth, flow[:, 2:]), (back, flow[:, :2])
    for (pyramid, xy, radius), (expected, towards) in zip(seen, expectations, strict=True):
        assert pyramid is expected and radius == 3
        assert_close(xy, torch.stack((x, y))[None] + 2 * towards, 1e-5)


def test_warping_takes_what_the_flow_points_at():
    x = torch.arange(20.0).view(1, 1, 4, 5)
    flow = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 4, 5)  # a column to the right, a row up
    assert vbench.warp(x, flow)[0, 0].tolist() == [
        [1, 2, 3, 4, 4], [1, 2, 3, 4, 4], [6, 7, 8, 9, 9], [11, 12, 13, 14, 14]]  # the border repeats


def test_amt_decoder_runs_its_side_path_on_the_last_channels():
    weights = filled(amt_shapes())
    x = noise(1, 64, 6, 6)
    name = "decoder1.convblock"

    def prelu(part, x):
        return F.prelu(x, weights[f"{name}.{part}.weight"])

    def convolve(part, x):
        return F.conv2d(x, weights[f"{name}.{part}.weight"], weights[f"{name}.{part}.bias"], padding=1)

    x = prelu("0.1", convolve("0.0", x))
    y = prelu("1.conv1.1", convolve("1.conv1.0", x))
    y[:, 40:] = prelu("1.conv2.1", convolve("1.conv2.0", y[:, 40:].clone()))
    y = prelu("1.conv3.1", convolve("1.conv3.0", y))
    y[:, 40:] = prelu("1.conv4.1", convolve("1.conv4.0", y[:, 40:].clone()))
    y = prelu("1.prelu", x + convolve("1.conv5", y))
    y = F.conv_transpose2d(y, weights[f"{name}.2.weight"], weights[f"{name}.2.bias"], 2, 1)
    assert_close(vbench.amt_decoder(weights, "decoder1", noise(1, 64, 6, 6)), y, 1e-5)


def test_raft_s_last_step_mixes_coarse_neighbours(networks):
    """With a final mask that always picks one neighbour, the fine flow is the coarse one, moved by one."""
    [weights] = networks["dynamic_degree"]
    a, b = (x.float() for x in pan(2, 3.0, 128, 136).split(1))
    flows = {}
    for neighbour in (4, 3, 1):  # itself, the one to its left, the one above
        bias = torch.zeros(9, 64)
        bias[neighbour] = 1e4
        picked = weights | {"update_block.mask.2.bias": 4 * bias.flatten()}
        flows[neighbour] = vbench.raft(picked, a, b, iterations=2)
    coarse = flows[4][..., ::8, ::8]
    assert torch.equal(flows[4], coarse.repeat_interleave(8, 2).repeat_interleave(8, 3))
    for neighbour, pad in ((3, (1, -1, 0, 0)), (1, (0, 0, 1, -1))):
        moved = F.pad(coarse, pad).repeat_interleave(8, 2).repeat_interleave(8, 3)
        assert torch.equal(flows[neighbour], moved)


def whole_networks(networks):
    """RAFT, AMT and MUSIQ on smooth moving pictures."""
    a, b = (levels(shifted(texture(128, 144), x))[None].float() for x in (0, 4.3))
    [raft], [amt], [musiq] = (networks[k] for k in ("dynamic_degree", "motion_smoothness", "imaging_quality"))
    strength = {"flow_head.2.": 3, "decoder1.convblock.2.": 0.2, "comb_block.2.": 0.2}  # else most is clamped
    amt = {k: v * math.prod(s for part, s in strength.items() if part in k) for k, v in amt.items()}
    return {"raft": ((raft, a, b), vbench.raft), "amt": ((amt, a / 255, b / 255), vbench.amt),
            "musiq": ((musiq, torch.cat((a, 255 - b))[..., :97, :] / 255), vbench.musiq)}


# what the published code gives here (torchvision 0.28's RAFT, the AMT of vbench 0.1.5, the MUSIQ of pyiqa
# 0.1.16); where those are installed, test_peers compares with them directly
PEERS = {
    "raft": [25.8008, 88.6971, 30.3855, 138.44, 166.738, -41.3854, -45.2457, -74.574],
    "amt": [0.518288, 0.353443, 0.5216, 0.564934, 0.726318, 0.506558, 0.499599, 0.0574799],
    "musiq": [-1.28646, 0.0291492, -1.30707, -1.26584]}


@pytest.mark.parametrize("name", PEERS)
def test_whole_networks_as_their_peers(name, networks):
    given, network = whole_networks(networks)[name]
    # from one instruction set to another a pixel changes by 2e-6 of its value in RAFT, by 1e-4 in AMT
    assert digest(network(*given)) == pytest.approx(PEERS[name], rel=5e-4, abs=2e-4)


def import_torchvision():
    """PyPI's torchvision wants torch's CUDA build; on another, its import lacks these two operators."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    if torch.version.cuda is None and not hasattr(import_torchvision, "library"):
        library = import_torchvision.library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@torch.no_grad()
def peer_of(name, weights, *images):
    import_torchvision()
    if name == "raft":
        from torchvision.models.optical_flow import raft_large
        peer = raft_large(weights=None).eval()
        peer.load_state_dict({torchvision_name(k): v for k, v in weights.items()})
        return peer(*(x / 127.5 - 1 for x in images), num_flow_updates=20)[-1]
    if name == "musiq":
        peer = pytest.importorskip("pyiqa.archs.musiq_arch", reason="the peer of MUSIQ").MUSIQ(
            pretrained=False, num_layers=1).eval()
        peer.load_state_dict(weights)
        return peer(*images)[:, 0]
    try:
        package = importlib.metadata.distribution("vbench").locate_file("vbench")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vbench is not installed, the only package that carries AMT")
    with pytest.MonkeyPatch.context() as patch:  # our module of that name hides the package: show its parts
        patch.setattr(vbench, "__path__", [str(package)], raising=False)
        patch.syspath_prepend(f"{package}/third_party/amt")
        peer = importlib.import_module("vbench.third_party.amt.networks.AMT-S").Model(3, 4, 3).eval()
    peer.load_state_dict(weights)
    return peer(*images, torch.full((1, 1, 1, 1), 0.5), scale_factor=1.0, eval=True)["imgt_pred"]


@pytest.mark.parametrize("name", PEERS)
def test_peers(name, networks):
    given, network = whole_networks(networks)[name]
    theirs = peer_of(name, *given)
    assert_close(network(*given), theirs, 1e-4 * theirs.abs().max().item())
    assert digest(theirs) == pytest.approx(PEERS[name], rel=1e-3, abs=1e-4)


def torchvision_name(name):
    """A name in raft-things.pth -> torchvision's."""
    net, _, rest = name.partition(".")
    if net in ("fnet", "cnet"):
        rest = "." + rest
        if rest.startswith(".conv2."):
            rest = rest.replace("conv2", "conv")
        elif "downsample" not in rest:
            for i in "12":
                digit = "" if not rest.startswith(".layer") else i
                rest = rest.replace(f".conv{i}.", f".convnormrelu{digit}.0.")
                rest = rest.replace(f".norm{i}.", f".convnormrelu{digit}.1.")
        return {"fnet": "feature_encoder", "cnet": "context_encoder"}[net] + rest
    for i in "12":
        rest = rest.replace(f"encoder.convc{i}", f"motion_encoder.convcorr{i}.0")
        rest = rest.replace(f"encoder.convf{i}", f"motion_encoder.convflow{i}.0")
        for gate in "zrq":
            rest = rest.replace(f"gru.conv{gate}{i}", f"recurrent_block.convgru{i}.conv{gate}")
    if rest.startswith("encoder.conv."):
        rest = rest.replace("encoder.conv.", "motion_encoder.conv.0.")
    if rest.startswith("mask"):
        return rest.replace("mask.0", "mask_predictor.convrelu.0").replace("mask.2", "mask_predictor.conv")
    return f"update_block.{rest}"


# ----------------------------------------------------------------------------------------------------
# weight files

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Every file, hollow, under its published name."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name, shapes in PUBLISHED.items():
        weights = hollow(shapes)
        if name == "raft-things.pth":
            twice = {k.replace("downsample.1", "norm3"): v for k, v in weights.items() if "downsample.1" in k}
            weights = {f"module.{k}": v for k, v in (weights | twice).items()}
        if name == "amt-s.pth":
            optimiser = {"state": {0: {"step": 5}}, "param_groups": [{"lr": np.float64(1e-4)}]}
            weights = {"epoch": 300, "state_dict": weights, "optim": optimiser}
        torch.save(weights, folder / name)
    head = folder / "sa_0_4_vit_l_14_linear.pth"
    known(monkeypatch, head)
    return folder


def known(monkeypatch, path):
    """Declares a file to be the published one."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(vbench.FILES, path.name, vbench.FILES[path.name]._replace(sha256=sha256))


def test_missing_files_are_named_with_their_url():
    scorers, missing = metrics.open_scorers([*metrics.DIMENSIONS, "motion"])
    assert [s.names for s in scorers] == [["motion"]] and set(missing) == set(metrics.DIMENSIONS)
    for dimension, (files, *_) in vbench.NETWORKS.items():
        for name in (name for alternatives in files for name in alternatives):
            text = missing[dimension]
            assert vbench.FILES[name].url.startswith("https://") and vbench.FILES[name].url in text
            for path in vbench.possible_paths(name, None):
                assert str(path) in text
    assert "/home/.cache/clip/ViT-L-14.pt" in missing["aesthetic_quality"]
    assert "/torch/hub/checkpoints/dino_vitbase16_pretrain.pth" in missing["subject_consistency"]


def test_every_file_of_a_folder_opens(folder):
    scorers, missing = metrics.open_scorers(metrics.DIMENSIONS, weights=folder)
    assert not missing and [s.names for s in scorers] == [[name] for name in metrics.DIMENSIONS]
    assert [s.batch for s in scorers] == [32, 32, 4, 4, 32, 32]
    (folder / "sa_0_4_vit_l_14_linear.pth").unlink()
    scorers, missing = metrics.open_scorers(["aesthetic_quality"], weights=folder)
    assert not scorers and "sa_0_4_vit_l_14_linear.pth" in missing["aesthetic_quality"]
    assert "ViT-L-14.pt" not in missing["aesthetic_quality"]  # that file exists


@pytest.mark.parametrize(
    "place", ["given", "given as cache", "VBENCH_CACHE_DIR", ".cache/vbench", "the network's cache"])
def test_files_are_found_where_vbench_keeps_them(place, folder, tmp_path, monkeypatch):
    root = {"VBENCH_CACHE_DIR": tmp_path / "elsewhere", "given as cache": tmp_path / "given",
            ".cache/vbench": tmp_path / "home" / ".cache" / "vbench"}.get(place)
    caches = {"ViT-B-32.pt": "home/.cache/clip", "dino_vitbase16_pretrain.pth": "torch/hub/checkpoints"}
    for name in PUBLISHED:
        to = (root / vbench.FILES[name].folder if root else folder if place == "given" else
              tmp_path / caches.get(name, "nowhere"))
        to.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(to / name)
    if place == "VBENCH_CACHE_DIR":
        monkeypatch.setenv("VBENCH_CACHE_DIR", str(root))
    weights = {"given": folder, "given as cache": root}.get(place)
    for name in PUBLISHED:
        path = vbench.find([name], weights)
        assert (path is None) == (place == "the network's cache" and name not in caches), (name, path)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.startswith("sa_")])
def test_wrong_files_are_refused(name, folder):
    dimension = next(d for d, (files, *_) in vbench.NETWORKS.items() if any(name in f for f in files))
    path = folder / name
    weights = hollow(PUBLISHED[name])
    key = vbench.FILES[name].key

    def refused(match, content=None):
        if content:
            torch.save(content, path)
        with pytest.raises(UserError, match=match) as error:
            metrics.open_scorers([dimension], weights=folder)
        assert str(path) in str(error.value)

    other = next(k for k in weights if k != key)
    less = {k: v for k, v in weights.items() if k != other}
    refused(f"another network: {len(less)} tensors instead of {len(weights)}", less)
    refused(r"is \(2, 3\) instead of", weights | {key: torch.zeros(2, 3)})
    refused(f"not the weights of {dimension}: ", weights | {other: torch.zeros(7, 7, 7)})
    refused(f"not the weights of {dimension}: '{other}'", less | {f"{other}s": weights[other]})
    path.write_bytes(path.read_bytes()[:1000])
    refused("truncated, corrupt|corrupt, or holds")


def test_the_published_file_is_known_by_its_sha256(folder, monkeypatch):
    path = folder / "sa_0_4_vit_l_14_linear.pth"
    torch.save({"weight": torch.ones(1, 768), "bias": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="l_14_linear.pth is not the published file: its sha256 is"):
        metrics.open_scorers(["aesthetic_quality"], weights=folder)


class Tower(torch.nn.Module):
    """Holds CLIP's names as a TorchScript archive does: half precision, beside tensors of the text tower."""

    def __init__(self, weights):
        super().__init__()
        for name, value in weights.items():
            parts = name.split(".")
            module = self
            for part in parts[:-1]:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_buffer(parts[-1], value)

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # OpenAI's files are what they are
def test_clip_archives_and_plain_state_dicts_are_the_same(folder, monkeypatch):
    path = folder / "ViT-B-32.pt"
    weights = filled(clip_shapes(128, 1, 32, 64))
    monkeypatch.setitem(vbench.FILES, path.name, vbench.FILES[path.name]._replace(
        tensors=len(weights), shape=(128, 3, 32, 32)))
    halved = {k: v.half() for k, v in weights.items()} | {"logit_scale": torch.ones(())}
    torch.jit.script(Tower(halved)).save(path)
    with pytest.raises(UserError, match="ViT-B-32.pt is not the published file"):
        metrics.open_scorers(["background_consistency"], weights=folder)
    known(monkeypatch, path)
    archive = vbench.read_file(path)
    torch.save(halved, path)  # another sha256 again, and rightly so
    plain = vbench.read_file(path)
    assert archive.keys() == plain.keys() == weights.keys()
    for name, value in weights.items():
        assert archive[name].dtype == torch.float32 and torch.equal(archive[name], plain[name])
        assert torch.equal(archive[name], value.half().float())


def test_raft_under_torchvision_s_names_is_the_same(folder, networks):
    [weights] = networks["dynamic_degree"]
    twice = {k.replace("downsample.1", "norm3"): v for k, v in weights.items() if "downsample.1" in k}
    torch.save({f"module.{k}": v for k, v in (weights | twice).items()}, folder / "raft-things.pth")
    official = vbench.read_file(vbench.find(vbench.RAFT_FILES, folder))
    (folder / "raft-things.pth").unlink()
    torch.save({torchvision_name(k): v for k, v in weights.items()}, folder / vbench.RAFT_FILES[1])
    path = vbench.find(vbench.RAFT_FILES, folder)
    assert path.name == "raft_large_C_T_V1-22a6c225.pth"
    other = vbench.read_file(path)
    assert official.keys() == other.keys() == weights.keys()
    assert all(torch.equal(other[k], v) and torch.equal(official[k], v) for k, v in weights.items())
    video = pan(3, 2.0, 128, 128)
    ours, theirs = (curves_of(scorer_of("dynamic_degree", [w]), video) for w in (official, other))
    assert np.array_equal(ours["dynamic_degree"].value, theirs["dynamic_degree"].value)


def test_opened_files_score_as_their_weights(folder, networks):
    torch.save({"state_dict": networks["motion_smoothness"][0]}, folder / "amt-s.pth")
    [scorer], _ = metrics.open_scorers(["motion_smoothness"], weights=folder)
    video = pan(5, 2.0, 128, 128)
    opened = curves_of(scorer, video)["motion_smoothness"]
    scorer = scorer_of("motion_smoothness", networks["motion_smoothness"])
    given = curves_of(scorer, video)["motion_smoothness"]
    assert np.array_equal(opened.value, given.value) and 0 < opened.total < 1
