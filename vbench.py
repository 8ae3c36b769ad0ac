"""The networks behind VBench's six dimensions (arXiv 2311.17982), and their weight files.

Each network is a function of its published state dict and reads every weight by its name in the file.
Shapes: n frames or pairs of frames, C channels, L tokens, D features; h, w are those of a feature map.
"""

import hashlib
import os
import re
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common import Stored, UserError, first_line, open_weights

# ----------------------------------------------------------------------------------------------------
# shared layers: w is a state dict in fp32, name the prefix of a layer's weights in it

def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def layer_norm(w, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def conv(w, name, x, stride=1):
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], stride, [k // 2 for k in weight.shape[2:]])


def attend(q, k, v, heads):  # [n,L,D]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [n,heads,L,D/heads]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def depth(w, block):
    """The number of blocks in a state dict; block is a pattern whose only group is the index of a block."""
    return 1 + max(int(m[1]) for m in map(re.compile(block).match, w) if m)


def resize(x, size, mode):
    """Resizes as VBench does: fp32 values of 0..255, without antialiasing, bicubic overshoot not clamped."""
    return F.interpolate(x, size, mode=mode, align_corners=False)


def short_side(frames, mode):  # -> [n,3,224,W] or [n,3,H,224], 0..1
    h, w = frames.shape[2:]
    short = min(h, w)
    return resize(frames.float(), (int(224 * h / short), int(224 * w / short)), mode) / 255


def normalised(x, mean, std):
    return (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)


def pad_to(x, multiple):
    """Pads to a multiple by replicating the border on both sides; an odd row or column goes to the end."""
    h, w = (-s % multiple for s in x.shape[2:])
    return F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2), mode="replicate")


def sample(x, xy, padding="zeros"):  # x [n,C,H,W], xy [n,h,w,2] in pixels -> [n,C,h,w]
    h, w = x.shape[2:]
    grid = torch.stack((xy[..., 0] * 2 / (w - 1) - 1, xy[..., 1] * 2 / (h - 1) - 1), -1)
    return F.grid_sample(x, grid, padding_mode=padding, align_corners=True)


def pixel_grid(x):  # [n,C,H,W] -> [1,2,H,W], the x and y of each pixel
    h, w = (torch.arange(s, device=x.device, dtype=x.dtype) for s in x.shape[2:])
    return torch.stack(torch.meshgrid(w, h, indexing="xy"))[None]


def correlations(a, b, levels=4):  # two [n,D,h,w] -> for each position in a, a map over b
    maps = torch.einsum("ndhw,ndij->nhwij", a, b).flatten(0, 2)[:, None] / a.shape[1] ** 0.5
    pyramid = [maps]  # [n*h*w,1,h,w], each level at half the resolution of the one before
    while len(pyramid) < levels:
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    return pyramid


def look_up(pyramid, xy, radius):  # xy [n,2,h,w] -> [n,levels*(2*radius+1)^2,h,w]
    n, _, h, w = xy.shape
    d = torch.arange(-radius, radius + 1, device=xy.device, dtype=xy.dtype)
    # (row, column) offsets are added to (x, y): the weights were trained with this transposed order
    offsets = torch.stack(torch.meshgrid(d, d, indexing="ij"), -1)
    centres = xy.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
    levels = [sample(level, centres / 2 ** i + offsets).view(n, h, w, -1) for i, level in enumerate(pyramid)]
    return torch.cat(levels, -1).permute(0, 3, 1, 2)


def residual_encoder(w, name, x, norm):  # [n,3,H,W] -> [n,D,H/8,W/8], the features RAFT and AMT match
    x = norm(f"{name}.norm1", conv(w, f"{name}.conv1", x, 2)).relu()
    for block in (f"{name}.layer{stage}.{i}" for stage in (1, 2, 3) for i in (0, 1)):
        halved = f"{block}.downsample.0.weight" in w
        last = 3 if f"{block}.conv3.weight" in w else 2  # the convolution before the last is strided
        y = x
        for i in range(1, last + 1):
            y = conv(w, f"{block}.conv{i}", y, 2 if halved and i == last - 1 else 1)
            y = norm(f"{block}.norm{i}", y).relu()
        if halved:
            x = norm(f"{block}.downsample.1", conv(w, f"{block}.downsample.0", x, 2))
        x = (x + y).relu()
    return conv(w, f"{name}.conv2", x)


def instance_norm(name, x):
    return F.instance_norm(x)


def check_size(x, dimension):
    if min(x.shape[2:]) < 128:  # smaller frames leave a single pixel in the coarsest correlation map
        raise UserError(f"{dimension} needs frames of at least 128x128, not {x.shape[3]}x{x.shape[2]}")


# ----------------------------------------------------------------------------------------------------
# DINO ViT-B/16 (Emerging Properties in Self-Supervised Vision Transformers): subject consistency

def dino(w, x):  # [n,3,H,W] -> [n,D]
    weight = w["patch_embed.proj.weight"]
    square = x.shape[2] == x.shape[3]
    x = F.conv2d(x, weight, w["patch_embed.proj.bias"], stride=weight.shape[2])  # [n,D,h,w]
    x = torch.cat((w["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT), 1) + dino_positions(w, x, square)
    for i in range(depth(w, r"blocks\.(\d+)\.")):
        block = f"blocks.{i}"
        qkv = linear(w, f"{block}.attn.qkv", layer_norm(w, f"{block}.norm1", x, 1e-6))
        x = x + linear(w, f"{block}.attn.proj", attend(*qkv.chunk(3, -1), x.shape[-1] // 64))
        y = linear(w, f"{block}.mlp.fc1", layer_norm(w, f"{block}.norm2", x, 1e-6))
        x = x + linear(w, f"{block}.mlp.fc2", F.gelu(y))
    return layer_norm(w, "norm", x[:, 0], 1e-6)


def dino_positions(w, x, square):  # -> [1,1+h*w,D]
    table = w["pos_embed"]
    height, width = x.shape[2:]
    side = round((table.shape[1] - 1) ** 0.5)
    if square and height == side:
        return table
    grid = table[:, 1:].mT.unflatten(2, (side, side))
    # DINO adds 0.1 against rounding, which shifts all positions slightly, even along a side of equal length
    grid = F.interpolate(grid, scale_factor=((height + 0.1) / side, (width + 0.1) / side), mode="bicubic")
    return torch.cat((table[:, :1], grid.flatten(2).mT), 1)


def subject_features(w, frames):  # uint8 [n,3,H,W] -> [n,D]
    x = normalised(short_side(frames, "bilinear"), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return dino(w, x)


# ----------------------------------------------------------------------------------------------------
# CLIP's image tower (Learning Transferable Visual Models From Natural Language Supervision): B/32 for
# background consistency, L/14 for aesthetic quality

def clip(w, x):  # [n,3,H,W] -> [n,D]
    weight = w["visual.conv1.weight"]
    x = F.conv2d(x, weight, stride=weight.shape[2]).flatten(2).mT  # [n,L,D]
    x = torch.cat((w["visual.class_embedding"].expand(len(x), 1, -1), x), 1)
    x = layer_norm(w, "visual.ln_pre", x + w["visual.positional_embedding"], 1e-5)
    for i in range(depth(w, r"visual\.transformer\.resblocks\.(\d+)\.")):
        block = f"visual.transformer.resblocks.{i}"
        y = layer_norm(w, f"{block}.ln_1", x, 1e-5)
        qkv = F.linear(y, w[f"{block}.attn.in_proj_weight"], w[f"{block}.attn.in_proj_bias"])
        x = x + linear(w, f"{block}.attn.out_proj", attend(*qkv.chunk(3, -1), x.shape[-1] // 64))
        y = linear(w, f"{block}.mlp.c_fc", layer_norm(w, f"{block}.ln_2", x, 1e-5))
        x = x + linear(w, f"{block}.mlp.c_proj", y * torch.sigmoid(1.702 * y))  # CLIP's quick GELU
    return layer_norm(w, "visual.ln_post", x[:, 0], 1e-5) @ w["visual.proj"]


def background_features(w, frames):  # uint8 [n,3,H,W] -> [n,D]
    x = short_side(frames, "bicubic")
    top, left = (round((s - 224) / 2) for s in x.shape[2:])
    x = x[:, :, top:top + 224, left:left + 224]
    return clip(w, normalised(x, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))


def aesthetic_score(w, head, frames):  # uint8 -> [n]; LAION's head predicts 0..10
    return F.linear(F.normalize(background_features(w, frames)), head["weight"], head["bias"])[:, 0] / 10


# ----------------------------------------------------------------------------------------------------
# MUSIQ (Multi-scale Image Quality Transformer): imaging quality

def musiq(w, x):  # [n,3,H,W] in 0..1 -> [n], about 0..100
    x = x * 2 - 1
    tokens = []
    for scale, side in enumerate((224, 384, None)):  # None: the image at its own size
        image = x
        if side:
            ratio = side / max(x.shape[2:])
            image = resize(x, [round(s * ratio) for s in x.shape[2:]], "bicubic")
        tokens.append(musiq_tokens(w, image, scale))
    # the original pads the first two scales to 49 and 144 tokens and masks the padding; none is needed here
    x = torch.cat([w["transformer_encoder.cls"].expand(len(x), -1, -1), *tokens], 1)
    for i in range(depth(w, r"transformer_encoder\.transformer\.encoderblock_(\d+)\.")):
        block = f"transformer_encoder.transformer.encoderblock_{i}"
        y = layer_norm(w, f"{block}.norm1", x, 1e-6)
        qkv = [linear(w, f"{block}.attention.{part}", y) for part in ("query", "key", "value")]
        x = x + linear(w, f"{block}.attention.out", attend(*qkv, x.shape[-1] // 64))
        y = linear(w, f"{block}.mlp.fc1", layer_norm(w, f"{block}.norm2", x, 1e-6))
        x = x + linear(w, f"{block}.mlp.fc2", F.gelu(y))
    return linear(w, "head", layer_norm(w, "transformer_encoder.encoder_norm", x[:, 0], 1e-6))[:, 0]


def musiq_tokens(w, image, scale):  # [n,3,H,W] -> [n,L,D], a token for each 32x32 tile
    image = pad_same(image, 32, 32)
    rows, columns = (s // 32 for s in image.shape[2:])
    tiles = F.unfold(image, 32, stride=32).mT  # [n,L,3*32*32], row by row
    x = tiles.reshape(-1, 3, 32, 32)
    x = musiq_conv(w, "conv_root", x, 2)
    x = F.group_norm(x, 32, w["gn_root.weight"], w["gn_root.bias"], 1e-6).relu()
    x = F.max_pool2d(pad_same(x, 3, 2), 3, 2)  # [n*L,64,8,8]
    y = x
    for i in "123":
        y = musiq_norm(w, f"block1.gn{i}", musiq_conv(w, f"block1.conv{i}", y))
        y = y.relu() if i != "3" else y
    x = (y + musiq_norm(w, "block1.gn_proj", musiq_conv(w, "block1.conv_proj", x))).relu()  # [n*L,256,8,8]
    x = linear(w, "embedding", x.permute(0, 2, 3, 1).reshape(*tiles.shape[:2], -1))  # channels innermost
    cells = [r * 10 // rows * 10 + c * 10 // columns for r in range(rows) for c in range(columns)]  # of 10x10
    x = x + w["transformer_encoder.posembed_input.position_emb"][:, cells]
    return x + w["transformer_encoder.scaleembed_input.scale_emb"][scale]


def musiq_conv(w, name, x, stride=1):
    """A convolution with standardised filters, by the unbiased deviation, as in training."""
    weight = w[f"{name}.weight"]
    deviation, mean = torch.std_mean(weight, (1, 2, 3), keepdim=True)
    return F.conv2d(pad_same(x, weight.shape[2], stride), (weight - mean) / (deviation + 1e-5), stride=stride)


def musiq_norm(w, name, x):
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-4)


def pad_same(x, kernel, stride):
    """TensorFlow's SAME padding: ceil(size / stride) outputs; the smaller half of the zeros goes in front."""
    h, w = (max((-(-s // stride) - 1) * stride + kernel - s, 0) for s in x.shape[2:])
    return F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2))


def imaging_score(w, frames):  # uint8 -> [n]
    height, width = frames.shape[2:]
    longest = max(height, width)
    x = frames.float()
    if longest > 512:
        x = resize(x, (int(512 / longest * height), int(512 / longest * width)), "bilinear")
    return musiq(w, x / 255)


# ----------------------------------------------------------------------------------------------------
# RAFT (Recurrent All-Pairs Field Transforms for Optical Flow): dynamic degree

def raft(w, a, b, iterations=20):  # [n,3,H,W] in 0..255, multiples of 8 -> flow from a to b, [n,2,H,W]
    def batch_norm(name, x):
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(w[f"{name}.{part}"] for part in names))

    a = a * 2 / 255 - 1
    b = b * 2 / 255 - 1
    pyramid = correlations(*residual_encoder(w, "fnet", torch.cat((a, b)), instance_norm).chunk(2))
    hidden, context = residual_encoder(w, "cnet", a, batch_norm).chunk(2, 1)
    hidden = hidden.tanh()
    context = context.relu()
    start = pixel_grid(hidden)
    flow = torch.zeros_like(hidden[:, :2])
    for _ in range(iterations):
        x = torch.cat((context, raft_motion(w, look_up(pyramid, start + flow, 4), flow)), 1)
        for i in "12":  # along rows, then along columns
            joined = torch.cat((hidden, x), 1)
            update = conv(w, f"update_block.gru.convz{i}", joined).sigmoid()
            reset = conv(w, f"update_block.gru.convr{i}", joined).sigmoid()
            candidate = conv(w, f"update_block.gru.convq{i}", torch.cat((reset * hidden, x), 1)).tanh()
            hidden = (1 - update) * hidden + update * candidate
        flow = flow + conv(w, "update_block.flow_head.conv2",
                           conv(w, "update_block.flow_head.conv1", hidden).relu())
    mask = 0.25 * conv(w, "update_block.mask.2", conv(w, "update_block.mask.0", hidden).relu())
    mask = mask.unflatten(1, (1, 9, 8, 8)).softmax(2)  # [n,1,9,8,8,h,w]: weights of 3x3 coarse neighbours
    neighbours = F.unfold(8 * flow, 3, padding=1).view(len(flow), 2, 9, 1, 1, *flow.shape[2:])
    fine = (mask * neighbours).sum(2)  # [n,2,8,8,h,w]
    return fine.permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)


def raft_motion(w, correlation, flow):
    name = "update_block.encoder"
    x = conv(w, f"{name}.convc2", conv(w, f"{name}.convc1", correlation).relu()).relu()
    y = conv(w, f"{name}.convf2", conv(w, f"{name}.convf1", flow).relu()).relu()
    return torch.cat((conv(w, f"{name}.conv", torch.cat((x, y), 1)).relu(), flow), 1)


def flow_magnitude(w, a, b):  # uint8 -> [n], the mean flow in pixels over the fastest 5 % of a frame
    a = pad_to(a.float(), 8)
    b = pad_to(b.float(), 8)
    check_size(a, "dynamic_degree")
    speed = raft(w, a, b).norm(dim=1).flatten(1)
    return speed.topk(int(0.05 * speed.shape[1])).values.mean(1)


# torchvision's names for the weights -> the names of the same weights in raft-things.pth
RAFT_NAMES = (
    (r"^module\.", ""), (r"^feature_encoder", "fnet"), (r"^context_encoder", "cnet"),
    (r"^(.net)\.conv\.", r"\1.conv2."), (r"^(.net)\.convnormrelu\.0", r"\1.conv1"),
    (r"^(.net)\.convnormrelu\.1", r"\1.norm1"), (r"convnormrelu(\d)\.0", r"conv\1"),
    (r"convnormrelu(\d)\.1", r"norm\1"), (r"motion_encoder\.conv\.0", "encoder.conv"),
    (r"motion_encoder\.conv(.)\w+(\d)\.0", r"encoder.conv\1\2"),
    (r"recurrent_block\.convgru(\d)\.conv(.)", r"gru.conv\2\1"),
    (r"^mask_predictor\.convrelu\.0", "update_block.mask.0"),
    (r"^mask_predictor\.conv\.", "update_block.mask.2."))


def raft_name(name):
    for pattern, replacement in RAFT_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


# ----------------------------------------------------------------------------------------------------
# AMT-S (All-Pairs Multi-Field Transforms for Efficient Frame Interpolation): motion smoothness

def amt(w, a, b):  # [n,3,H,W] in 0..1, multiples of 16 -> the frame in the middle, clamped
    mean = torch.stack((a, b)).mean((0, 2, 3, 4)).view(-1, 1, 1, 1)
    a = a - mean
    b = b - mean
    fa, fb = residual_encoder(w, "feat_encoder", torch.cat((a, b)), instance_norm).chunk(2)
    forward = correlations(fa, fb)
    backward = correlations(fb, fa)
    levels_a = amt_pyramid(w, a)  # at 1/2, 1/4, 1/8, 1/16
    levels_b = amt_pyramid(w, b)
    x = torch.cat((levels_a[3], levels_b[3], torch.full_like(a[:, :1, ::16, ::16], 0.5)), 1)
    flow = 0  # [n,4,h,w]: from the middle frame to a, then to b
    for level in (4, 3, 2):
        x = amt_decoder(w, f"decoder{level}", x)
        flow = flow + x[:, :4]
        flow, x = amt_update(w, f"update{level}", flow, x[:, 4:], forward, backward, 2 ** (4 - level))
        warped_a = warp(levels_a[level - 2], flow[:, :2])
        warped_b = warp(levels_b[level - 2], flow[:, 2:])
        x = torch.cat((x, warped_a, warped_b, flow), 1)
        flow = 2 * scaled(flow, 2)
    x = amt_decoder(w, "decoder1", x)  # [n,24,H,W]: three flows to a, three to b, three masks, three residues
    candidates = []
    for i in range(3):
        to_a = x[:, 2 * i:2 * i + 2] + flow[:, :2]
        to_b = x[:, 6 + 2 * i:8 + 2 * i] + flow[:, 2:]
        mask = x[:, 12 + i:13 + i].sigmoid()
        residue = x[:, 15 + 3 * i:18 + 3 * i]
        candidates.append(mask * warp(a, to_a) + (1 - mask) * warp(b, to_b) + mean + residue)
    x = F.prelu(conv(w, "comb_block.0", torch.cat(candidates, 1)), w["comb_block.1.weight"])
    return (sum(candidates) / 3 + conv(w, "comb_block.2", x)).clamp(0, 1)


def amt_pyramid(w, x):
    levels = []
    for level in "1234":
        for i, stride in ((0, 2), (1, 1)):
            x = conv_prelu(w, f"encoder.pyramid{level}.{i}", x, stride)
        levels.append(x)
    return levels


def conv_prelu(w, name, x, stride=1):
    return F.prelu(conv(w, f"{name}.0", x, stride), w[f"{name}.1.weight"])


def amt_decoder(w, name, x):  # -> twice the height and width
    x = y = conv_prelu(w, f"{name}.convblock.0", x)
    for i in (1, 3):  # on all channels, then on the last 20 alone
        y = conv_prelu(w, f"{name}.convblock.1.conv{i}", y)
        y = torch.cat((y[:, :-20], conv_prelu(w, f"{name}.convblock.1.conv{i + 1}", y[:, -20:])), 1)
    x = F.prelu(x + conv(w, f"{name}.convblock.1.conv5", y), w[f"{name}.convblock.1.prelu.weight"])
    last = f"{name}.convblock.2"
    return F.conv_transpose2d(x, w[f"{last}.weight"], w[f"{last}.bias"], stride=2, padding=1)


def amt_update(w, name, flow, x, forward, backward, scale):
    """Refines both flows and the features by the correlations, at 1/8 of the frame's size."""
    def leaky(part, x):
        return F.leaky_relu(conv(w, f"{name}.{part}", x), 0.1)

    small = scaled(flow, 1 / scale) / scale
    features = scaled(x, 1 / scale)
    grid = pixel_grid(small)
    # a's map over b is searched along the flow to b and the other way round; the flows start in the middle
    # frame, so they are doubled
    matches = [look_up(forward, grid + 2 * small[:, 2:], 3), look_up(backward, grid + 2 * small[:, :2], 3)]
    y = torch.cat((leaky("convc1", torch.cat(matches, 1)), leaky("convf2", leaky("convf1", small))), 1)
    y = torch.cat((leaky("conv", y), small, features), 1)
    y = conv(w, f"{name}.gru.2", leaky("gru.0", y))
    flow = flow + scale * scaled(conv(w, f"{name}.flow_head.2", leaky("flow_head.0", y)), scale)
    return flow, x + scaled(conv(w, f"{name}.feat_head.2", leaky("feat_head.0", y)), scale)


def scaled(x, factor):
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def warp(x, flow):  # each pixel of the result is sampled where its flow points
    return sample(x, (pixel_grid(x) + flow).permute(0, 2, 3, 1), "border")


def smoothness(w, a, dropped, b):  # uint8 -> [n], 1 where the middle frame is predicted exactly
    height, width = a.shape[2:]
    x = pad_to(a.float() / 255, 16)
    y = pad_to(b.float() / 255, 16)
    check_size(x, "motion_smoothness")
    top, left = ((-s % 16) // 2 for s in (height, width))
    middle = amt(w, x, y)[:, :, top:top + height, left:left + width]
    predicted = (middle * 255).to(torch.uint8)  # VBench truncates here
    return 1 - (predicted.int() - dropped.int()).abs().float().mean((1, 2, 3)) / 255


# ----------------------------------------------------------------------------------------------------
# weight files: names, sources and where they are looked for. amt-s.pth and pyiqa's MUSIQ come with
# non-commercial terms

class File(NamedTuple):
    folder: str  # within VBench's cache
    url: str
    tensors: int
    key: str  # a tensor whose shape identifies the network, together with the number of tensors
    shape: tuple
    sha256: str = ""  # where the publisher states it


CLIP = "https://openaipublic.azureedge.net/clip/models"
B32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
L14 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
FILES = {
    "dino_vitbase16_pretrain.pth": File(
        "dino_model", "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        150, "cls_token", (1, 1, 768)),
    "ViT-B-32.pt": File(
        "clip_model", f"{CLIP}/{B32}/ViT-B-32.pt", 152, "visual.conv1.weight", (768, 3, 32, 32), B32),
    "ViT-L-14.pt": File(
        "clip_model", f"{CLIP}/{L14}/ViT-L-14.pt", 296, "visual.conv1.weight", (1024, 3, 14, 14), L14),
    "sa_0_4_vit_l_14_linear.pth": File(
        "aesthetic_model/emb_reader",
        "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/sa_0_4_vit_l_14_linear.pth",
        2, "weight", (1, 768), "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba"),
    "musiq_spaq_ckpt-358bb6af.pth": File(
        "pyiqa_model", "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main/musiq_spaq_ckpt-358bb6af.pth",
        248, "embedding.weight", (384, 16384)),
    "raft-things.pth": File(
        "raft_model/models", "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip",
        169, "fnet.conv2.weight", (256, 128, 1, 1)),
    "raft_large_C_T_V1-22a6c225.pth": File(
        "raft_model/models", "https://download.pytorch.org/models/raft_large_C_T_V1-22a6c225.pth",
        169, "fnet.conv2.weight", (256, 128, 1, 1)),
    "amt-s.pth": File(
        "amt_model", "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth",
        213, "feat_encoder.conv2.weight", (84, 96, 1, 1)),
}


RAFT_FILES = ("raft-things.pth", "raft_large_C_T_V1-22a6c225.pth")
NETWORKS = {  # {dimension: (its files, one of each tuple; its function of weights and frames)}
    "subject_consistency": ([("dino_vitbase16_pretrain.pth",)], subject_features),
    "background_consistency": ([("ViT-B-32.pt",)], background_features),
    "motion_smoothness": ([("amt-s.pth",)], smoothness),
    "dynamic_degree": ([RAFT_FILES], flow_magnitude),
    "aesthetic_quality": ([("ViT-L-14.pt",), ("sa_0_4_vit_l_14_linear.pth",)], aesthetic_score),
    "imaging_quality": ([("musiq_spaq_ckpt-358bb6af.pth",)], imaging_score),
}


def find_files(dimension: str, weights) -> tuple[list[Path], list[str]]:
    """(a dimension's files that exist, a description of each one that does not). weights: a folder to search
    first, or None."""
    paths = []
    missing = []
    for names in NETWORKS[dimension][0]:
        if path := find(names, weights):
            paths.append(path)
        else:
            missing.append(", or ".join(
                f"{name} (looked for at {', '.join(map(str, possible_paths(name, weights)))}; get it from "
                f"{FILES[name].url})" for name in names))
    return paths, missing


def find(names, weights) -> Path | None:
    paths = (path for name in names for path in possible_paths(name, weights))
    return next((path for path in paths if path.exists()), None)


def possible_paths(name: str, weights) -> list[Path]:
    """Where a file may be: in the folder weights, flat or in the layout of VBench's cache; then in the caches
    that VBench and its networks use."""
    folder = FILES[name].folder
    cache = Path(os.environ.get("VBENCH_CACHE_DIR") or "~/.cache/vbench").expanduser()
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    publishers = {"clip_model": Path("~/.cache/clip").expanduser(), "dino_model": hub,
                  "raft_model/models": hub}
    first = [Path(weights), Path(weights) / folder] if weights else []
    return [root / name for root in (*first, cache / folder, publishers.get(folder)) if root]


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of one of FILES, in fp32, once it is checked to be the right one."""
    file = FILES[path.name]
    is_clip = file.folder == "clip_model"
    archive = is_clip and zipfile.is_zipfile(path) and "/code/" in " ".join(zipfile.ZipFile(path).namelist())
    # OpenAI's files are TorchScript archives; a plain state dict made from one has another sha256
    if file.sha256 and (archive or not is_clip):
        with open(path, "rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        if sha256 != file.sha256:
            raise UserError(f"{path} is not the published file: its sha256 is {sha256[:16]}..., not "
                            f"{file.sha256[:16]}...; get it again from {file.url}")
    if archive:  # it contains code, but its sha256 says that it is OpenAI's
        weights = torch.jit.load(path, map_location="cpu").state_dict()
    else:
        scalar = np.float64(0).__reduce__()[0]  # AMT's file also contains its learning rate, a numpy scalar
        allowed = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Float64DType]
        with torch.serialization.safe_globals(allowed):
            stored = open_weights(path)[0]
        weights = {k: v.read() for k, v in stored.get("state_dict", stored).items() if isinstance(v, Stored)}
    if file.folder == "raft_model/models":
        weights = {raft_name(k): v for k, v in weights.items()}
    # only CLIP's image tower is needed; raft-things.pth holds some of its norms twice
    prefix = "visual." if is_clip else ""
    weights = {k: v.float() for k, v in weights.items() if k.startswith(prefix) and ".norm3." not in k}
    shape = tuple(weights[file.key].shape) if file.key in weights else "missing"
    if len(weights) != file.tensors or shape != file.shape:
        raise UserError(f"{path} is another network: {len(weights)} tensors instead of {file.tensors}, "
                        f"{file.key} is {shape} instead of {file.shape}; get it from {file.url}")
    return weights


def open_network(dimension: str, paths: list[Path], frames: int, device):
    """A dimension's function, with its weights: it takes `frames` tensors, uint8 [n,3,H,W] each, and returns
    n rows."""
    network = NETWORKS[dimension][1]
    weights = [read_file(path) for path in paths]
    check_fit(dimension, partial(network, *weights), frames, paths)
    return partial(network, *({k: v.to(device) for k, v in w.items()} for w in weights))


@torch.inference_mode()
def check_fit(dimension: str, network, frames: int, paths: list[Path]):
    """Runs the network on black frames, so that a file that does not fit fails before the first video."""
    try:
        network(*[torch.zeros(1, 3, 128, 128, dtype=torch.uint8)] * frames)
    except (KeyError, ValueError, RuntimeError) as error:
        files = " and ".join(map(str, paths))
        raise UserError(f"{files}: not the weights of {dimension}: {first_line(error)}") from None
