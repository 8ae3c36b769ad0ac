"""Frame scorers for drift: colour, detail and motion without any weights, and VBench's six dimensions.

A scorer sees a video piece by piece and keeps numbers, never the video. The networks are functions of the
published state dicts: every weight is used under the name it has in its file.
n frames or pairs, L tokens, D features.
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

from common import Stored, UserError, first_line, open_weights, rng

FREE = {
    "saturation": "colour strength: HSV saturation, weighted by value",
    "colourfulness": "Hasler and Suesstrunk's; 15 is slight, 45 average, 82 high",
    "clipped": "share of pixels that are blown out or crushed",
    "contrast": "standard deviation of luma, of 0..1",
    "detail": "variance of the Laplacian over that of luma: falls with blur, not with contrast",
    "brightness": "mean luma, of 0..1",
    "speed": "normal flow in pixels per frame: not fooled by lost contrast",
    "motion": "mean change of luma from frame to frame, in levels of 0..255",
}
OPTIONAL = {
    "local_contrast": "mean standard deviation of luma in blocks of 16x16, of 0..1",
    "flicker": "change of the change of luma over its change: rises where frames flash",
}
DIMENSIONS = {
    "subject_consistency": "DINO features against those of the first and of the previous frame",
    "background_consistency": "CLIP features against those of the first and of the previous frame",
    "motion_smoothness": "how well AMT predicts every second frame from its two neighbours",
    "dynamic_degree": "whether RAFT sees enough motion: yes or no",
    "aesthetic_quality": "LAION's aesthetic predictor, on CLIP features",
    "imaging_quality": "MUSIQ, trained on SPAQ",
}
SCALE = {"imaging_quality": 1, "motion_quality": 1, "frame_quality": 1}  # to 0..100; of the others, 100
QUALITIES = {  # of the paper's Table 2, means of two each
    "motion_quality": ("motion_smoothness", "dynamic_degree"),
    "frame_quality": ("aesthetic_quality", "imaging_quality"),
}


# ----------------------------------------------------------------------------------------------------
# scorers: windows of frames out of a stream, scored in batches

class Curve(NamedTuple):
    frame: np.ndarray  # int [m], the frame each value belongs to: the second of its window
    value: np.ndarray  # float64 [m]
    total: float  # of the whole video


class Scorer:
    """Scores windows of frames of one video after another. window(fps) tells which frames, counted from the
    first of a window, are in it, and how far windows are apart; score(*frames) gives {name: a row each}."""

    def __init__(self, names, score, curve, window, device, batch):
        self.names, self.score, self.curve, self.window = names, score, curve, window
        self.device, self.batch = device, batch

    def start(self, fps, frames: int | None = None):
        """A new video begins; if it ends before that many frames, finish() refuses it."""
        self.offsets, self.step = self.window(fps)
        self.expected, self.seen, self.held, self.ready = frames or 0, 0, {}, []
        self.rows = {name: [] for name in self.names}

    def add(self, frames: torch.Tensor):
        """The next frames, uint8 [n,3,H,W]. How a video is cut into pieces changes nothing, to the bit."""
        assert frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[1] == 3, frames.shape
        self.size = frames.shape[2:]
        for frame in frames:
            if any((self.seen - offset) % self.step == 0 for offset in self.offsets):
                self.held[self.seen] = frame.to(self.device, copy=True)  # a view would hold the whole piece
            first = self.seen - self.offsets[-1]  # of the window that ends here
            if first >= 0 and first % self.step == 0:
                self.ready.append([self.held[first + offset] for offset in self.offsets])
            self.held.pop(first, None)
            self.seen += 1
            if len(self.ready) == self.batch:
                self.flush()

    @torch.inference_mode()
    def flush(self):
        rows = self.score(*map(torch.stack, zip(*self.ready, strict=True)))
        for name in self.names:
            # as plain numbers: small tensors that stay, between frames that go, would fragment the memory
            self.rows[name] += rows[name].tolist()
        self.ready = []

    def finish(self) -> dict[str, Curve]:
        if self.seen < self.expected:
            raise UserError(f"the video ends after {self.seen} of {self.expected} frames")
        if self.ready:
            self.flush()
        if not self.rows[self.names[0]]:
            raise UserError(f"{self.names[0]} needs at least {self.offsets[-1] + 1} frames, not {self.seen}")
        curves = {}
        for name, rows in self.rows.items():
            rows = torch.tensor(rows, dtype=torch.float64)
            frame = np.arange(len(rows)) * self.step + self.offsets[:2][-1]
            curves[name] = self.curve(frame, rows, self.size)
        return curves


def mean_curve(frame, rows, size) -> Curve:
    return Curve(frame, rows.numpy(), rows.mean().item())


def median_curve(frame, rows, size) -> Curve:
    return Curve(frame, rows.numpy(), rows.quantile(0.5).item())


def consistency_curve(frame, features, size) -> Curve:
    """VBench: the mean of the (positive) cosines to the previous frame and to the first, from frame 1 on."""
    if len(features) < 2:
        raise UserError("consistency needs at least 2 frames, not 1")
    features = F.normalize(features, dim=1)  # [m,D]
    previous, first = (features[1:] * features[:-1]).sum(1), features[1:] @ features[0]
    return mean_curve(frame[1:], (previous.clamp(min=0) + first.clamp(min=0)) / 2, size)


def dynamic_curve(frame, magnitudes, size) -> Curve:
    """VBench: 1 if about a quarter of the pairs move faster than 6 pixels of 256."""
    moving = (magnitudes > 6 * min(size) / 256).sum()
    return Curve(frame, magnitudes.numpy(), float(moving >= round(4 * (len(magnitudes) + 1) / 16)))


# ----------------------------------------------------------------------------------------------------
# without weights

def luma(frames):  # uint8 [...,3,H,W] -> [...,H,W], 0..255
    r, g, b = frames.float().unbind(-3)
    return 0.299 * r + 0.587 * g + 0.114 * b


def stills(frames) -> dict:  # uint8 [n,3,H,W] -> [n] each
    r, g, b = frames.unbind(1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    strength = high.sum((1, 2))
    r, g, b = r.float(), g.float(), b.float()
    rg, yb = (torch.var_mean(x, (1, 2), correction=0) for x in (r - g, (r + g) / 2 - b))
    y = luma(frames)  # [n,H,W]
    variance, mean = torch.var_mean(y, (1, 2), correction=0)
    laplacian = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:] - 4 * y[:, 1:-1, 1:-1]
    h, w = (s // 16 * 16 for s in y.shape[1:])
    blocks = y[:, :h, :w].unflatten(2, (-1, 16)).unflatten(1, (-1, 16))  # [n,h/16,16,w/16,16]
    return {"saturation": (strength - low.sum((1, 2))) / strength.clamp(min=1),
            "colourfulness": (rg[0] + yb[0]).sqrt() + 0.3 * torch.hypot(rg[1], yb[1]),
            "clipped": ((high >= 253) | (low <= 2)).float().mean((1, 2)),
            "contrast": variance.sqrt() / 255,
            "local_contrast": blocks.std((2, 4), correction=0).mean((1, 2)) / 255,
            "detail": laplacian.var((1, 2), correction=0) / variance.clamp(min=1e-3),
            "brightness": mean / 255}


def pooled(frames):  # uint8 [n,3,H,W] -> [n,H/4,W/4]; the mean of 4x4 pixels hides grain
    return F.avg_pool2d(luma(frames), 4)


def motions(a, b) -> dict:
    a, b = pooled(a), pooled(b)
    change, middle = (b - a).abs(), (a + b) / 2
    dy = (middle[:, 2:, 1:-1] - middle[:, :-2, 1:-1]) / 2
    dx = (middle[:, 1:-1, 2:] - middle[:, 1:-1, :-2]) / 2
    slope = torch.hypot(dx, dy).sum((1, 2)).clamp(min=1e-3)
    return {"speed": 4 * change[:, 1:-1, 1:-1].sum((1, 2)) / slope, "motion": change.mean((1, 2))}


def flicker(a, b, c) -> dict:
    a, b, c = pooled(a), pooled(b), pooled(c)
    change = ((b - a).abs().mean((1, 2)) + (c - b).abs().mean((1, 2))) / 2
    return {"flicker": (a - 2 * b + c).abs().mean((1, 2)) / change.clamp(min=1e-3)}


@torch.inference_mode()
def frechet_features(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [n,3,H,W] -> [n,336]: mean and deviation of what random filters see, always the same filters."""
    rows = []
    for x in frames.split(16):
        x, row = x.float() / 255, []
        for layer, (wide, channels) in enumerate(((3, 24), (24, 48), (48, 96))):
            filters = torch.randn(channels, wide * 9, generator=rng("frechet", layer))
            filters = F.normalize(filters - filters.mean(1, keepdim=True)) * 2 ** 0.5
            x = F.conv2d(x, filters.view(channels, wide, 3, 3).to(x.device), stride=2, padding=1).relu()
            row += [x.mean((2, 3)), x.std((2, 3), correction=0)]
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def frechet_distance(reference: torch.Tensor, features: torch.Tensor, axes: int = 32) -> float:
    """Between Gaussians, along the widest axes of the reference and in units of its spread there."""
    reference, features = reference.double(), features.double()
    if len(reference) <= axes or len(features) <= axes:
        raise UserError(f"a Frechet distance needs more than {axes} reference frames and as many others, "
                        f"not {len(reference)} and {len(features)}")
    mean = reference.mean(0)
    spread, directions = torch.linalg.eigh((reference - mean).T.cov())  # ascending
    if spread[-axes] < 1e-9 * spread[-1]:
        raise UserError(f"a Frechet distance needs more varied reference frames than these {len(reference)}")
    x = (features - mean) @ (directions[:, -axes:] / spread[-axes:].sqrt())  # the reference: mean 0, cov 1
    widths = torch.linalg.eigvalsh(x.T.cov()).clamp(min=0).sqrt()
    return (x.mean(0).square().sum() + (widths - 1).square().sum()).item()


# ----------------------------------------------------------------------------------------------------
# networks: what they share. w is a state dict in fp32; precision is torch's default for fp32

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
    """How many blocks of that name (a pattern with one group, their number) the file holds."""
    return 1 + max(int(m[1]) for m in map(re.compile(block).match, w) if m)


def resize(x, size, mode):
    """VBench resizes fp32 values of 0..255, without antialiasing, and lets bicubic overshoot."""
    return F.interpolate(x, size, mode=mode, align_corners=False)


def short_side(frames, mode):  # -> [n,3,224,W] or [n,3,H,224], 0..1
    h, w = frames.shape[2:]
    short = min(h, w)
    return resize(frames.float(), (int(224 * h / short), int(224 * w / short)), mode) / 255


def normalised(x, mean, std):
    return (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)


def pad_to(x, multiple):
    """Repeats the border; for an odd number of rows or columns, one more at the end."""
    h, w = (-s % multiple for s in x.shape[2:])
    return F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2), mode="replicate")


def sample(x, xy, padding="zeros"):  # x [n,C,H,W], xy [n,h,w,2] in pixels -> [n,C,h,w]
    h, w = x.shape[2:]
    at = torch.stack((xy[..., 0] * 2 / (w - 1) - 1, xy[..., 1] * 2 / (h - 1) - 1), -1)
    return F.grid_sample(x, at, padding_mode=padding, align_corners=True)


def pixels(x):  # [n,C,H,W] -> [1,2,H,W], the x and y of each place
    h, w = (torch.arange(s, device=x.device, dtype=x.dtype) for s in x.shape[2:])
    return torch.stack(torch.meshgrid(w, h, indexing="xy"))[None]


def correlations(a, b, levels=4):  # [n,D,h,w] twice -> a map over b for each place in a
    maps = torch.einsum("ndhw,ndij->nhwij", a, b).flatten(0, 2)[:, None] / a.shape[1] ** 0.5
    pyramid = [maps]  # [n*h*w,1,h,w], then ever coarser
    while len(pyramid) < levels:
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    return pyramid


def look_up(pyramid, xy, radius):  # xy [n,2,h,w] -> [n,levels*(2*radius+1)^2,h,w]
    n, _, h, w = xy.shape
    d = torch.arange(-radius, radius + 1, device=xy.device, dtype=xy.dtype)
    # (row, column) offsets added to (x, y): the weights were trained with neighbours in this transposed order
    around = torch.stack(torch.meshgrid(d, d, indexing="ij"), -1)
    places = xy.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
    found = [sample(level, places / 2 ** i + around).view(n, h, w, -1) for i, level in enumerate(pyramid)]
    return torch.cat(found, -1).permute(0, 3, 1, 2)


def residual_encoder(w, name, x, norm):  # [n,3,H,W] -> [n,D,H/8,W/8], the features of RAFT and of AMT
    x = norm(f"{name}.norm1", conv(w, f"{name}.conv1", x, 2)).relu()
    for block in (f"{name}.layer{stage}.{i}" for stage in (1, 2, 3) for i in (0, 1)):
        halved = f"{block}.downsample.0.weight" in w
        last = 3 if f"{block}.conv3.weight" in w else 2  # the convolution before the last one has the stride
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
    if min(x.shape[2:]) < 128:  # the coarsest of the correlation maps would be a single pixel
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
    table, (h, wide) = w["pos_embed"], x.shape[2:]
    side = round((table.shape[1] - 1) ** 0.5)
    if square and h == side:
        return table
    grid = table[:, 1:].mT.unflatten(2, (side, side))
    # DINO adds 0.1 against rounding, which moves every place a little, along an unchanged side too
    grid = F.interpolate(grid, scale_factor=((h + 0.1) / side, (wide + 0.1) / side), mode="bicubic")
    return torch.cat((table[:, :1], grid.flatten(2).mT), 1)


def subject(w, frames):  # uint8 [n,3,H,W] -> [n,D]
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
        x = x + linear(w, f"{block}.mlp.c_proj", y * torch.sigmoid(1.702 * y))  # CLIP's own, quick GELU
    return layer_norm(w, "visual.ln_post", x[:, 0], 1e-5) @ w["visual.proj"]


def background(w, frames):  # uint8 [n,3,H,W] -> [n,D]
    x = short_side(frames, "bicubic")
    top, left = (round((s - 224) / 2) for s in x.shape[2:])
    x = x[:, :, top:top + 224, left:left + 224]
    return clip(w, normalised(x, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))


def aesthetic(w, head, frames):  # LAION's head scores 0..10
    return F.linear(F.normalize(background(w, frames)), head["weight"], head["bias"])[:, 0] / 10


# ----------------------------------------------------------------------------------------------------
# MUSIQ (Multi-scale Image Quality Transformer): imaging quality

def musiq(w, x):  # [n,3,H,W] in 0..1 -> [n], about 0..100
    x, tokens = x * 2 - 1, []
    for scale, side in enumerate((224, 384, None)):  # the third is the image itself
        image = x
        if side:
            ratio = side / max(x.shape[2:])
            image = resize(x, [round(s * ratio) for s in x.shape[2:]], "bicubic")
        tokens.append(musiq_tokens(w, image, scale))
    # the original pads the first two to 49 and 144 tokens and masks those: the class token never sees them
    x = torch.cat([w["transformer_encoder.cls"].expand(len(x), -1, -1), *tokens], 1)
    for i in range(depth(w, r"transformer_encoder\.transformer\.encoderblock_(\d+)\.")):
        block = f"transformer_encoder.transformer.encoderblock_{i}"
        y = layer_norm(w, f"{block}.norm1", x, 1e-6)
        qkv = [linear(w, f"{block}.attention.{part}", y) for part in ("query", "key", "value")]
        x = x + linear(w, f"{block}.attention.out", attend(*qkv, x.shape[-1] // 64))
        y = linear(w, f"{block}.mlp.fc1", layer_norm(w, f"{block}.norm2", x, 1e-6))
        x = x + linear(w, f"{block}.mlp.fc2", F.gelu(y))
    return linear(w, "head", layer_norm(w, "transformer_encoder.encoder_norm", x[:, 0], 1e-6))[:, 0]


def musiq_tokens(w, image, scale):  # [n,3,H,W] -> [n,L,D], a token for each tile of 32x32
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
    place = [r * 10 // rows * 10 + c * 10 // columns for r in range(rows) for c in range(columns)]
    x = x + w["transformer_encoder.posembed_input.position_emb"][:, place]
    return x + w["transformer_encoder.scaleembed_input.scale_emb"][scale]


def musiq_conv(w, name, x, stride=1):
    """Every filter standardised first: torch's unbiased deviation, as in the published weights."""
    weight = w[f"{name}.weight"]
    deviation, mean = torch.std_mean(weight, (1, 2, 3), keepdim=True)
    return F.conv2d(pad_same(x, weight.shape[2], stride), (weight - mean) / (deviation + 1e-5), stride=stride)


def musiq_norm(w, name, x):
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-4)


def pad_same(x, kernel, stride):
    """TensorFlow's padding: an output for every stride begun, the smaller half of the zeros in front."""
    h, w = (max((-(-s // stride) - 1) * stride + kernel - s, 0) for s in x.shape[2:])
    return F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2))


def imaging(w, frames):
    h, wide = frames.shape[2:]
    x, longest = frames.float(), max(h, wide)
    if longest > 512:
        x = resize(x, (int(512 / longest * h), int(512 / longest * wide)), "bilinear")
    return musiq(w, x / 255)


# ----------------------------------------------------------------------------------------------------
# RAFT (Recurrent All-Pairs Field Transforms for Optical Flow): dynamic degree

def raft(w, a, b, iterations=20):  # [n,3,H,W] in 0..255, multiples of 8 -> flow from a to b, [n,2,H,W]
    def batch_norm(name, x):
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(w[f"{name}.{part}"] for part in names))

    a, b = a * 2 / 255 - 1, b * 2 / 255 - 1
    pyramid = correlations(*residual_encoder(w, "fnet", torch.cat((a, b)), instance_norm).chunk(2))
    hidden, context = residual_encoder(w, "cnet", a, batch_norm).chunk(2, 1)
    hidden, context = hidden.tanh(), context.relu()
    start = pixels(hidden)
    flow = torch.zeros_like(hidden[:, :2])
    for _ in range(iterations):
        x = torch.cat((context, raft_motion(w, look_up(pyramid, start + flow, 4), flow)), 1)
        for i in "12":  # along rows, then along columns
            both = torch.cat((hidden, x), 1)
            update = conv(w, f"update_block.gru.convz{i}", both).sigmoid()
            reset = conv(w, f"update_block.gru.convr{i}", both).sigmoid()
            new = conv(w, f"update_block.gru.convq{i}", torch.cat((reset * hidden, x), 1)).tanh()
            hidden = (1 - update) * hidden + update * new
        flow = flow + conv(w, "update_block.flow_head.conv2",
                           conv(w, "update_block.flow_head.conv1", hidden).relu())
    mix = 0.25 * conv(w, "update_block.mask.2", conv(w, "update_block.mask.0", hidden).relu())
    mix = mix.unflatten(1, (1, 9, 8, 8)).softmax(2)  # [n,1,9,8,8,h,w]: each pixel mixes 3x3 coarse neighbours
    near = F.unfold(8 * flow, 3, padding=1).view(len(flow), 2, 9, 1, 1, *flow.shape[2:])
    fine = (mix * near).sum(2)  # [n,2,8,8,h,w]
    return fine.permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)


def raft_motion(w, seen, flow):
    name = "update_block.encoder"
    seen = conv(w, f"{name}.convc2", conv(w, f"{name}.convc1", seen).relu()).relu()
    moved = conv(w, f"{name}.convf2", conv(w, f"{name}.convf1", flow).relu()).relu()
    return torch.cat((conv(w, f"{name}.conv", torch.cat((seen, moved), 1)).relu(), flow), 1)


def magnitude(w, a, b):  # uint8 -> [n], pixels that the fastest twentieth moves
    a, b = pad_to(a.float(), 8), pad_to(b.float(), 8)
    check_size(a, "dynamic_degree")
    speed = raft(w, a, b).norm(dim=1).flatten(1)
    return speed.topk(int(0.05 * speed.shape[1])).values.mean(1)


# torchvision's file holds the same weights as raft-things.pth under other names
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

def amt(w, a, b):  # [n,3,H,W] in 0..1, multiples of 16 -> the frame half way between, clamped
    mean = torch.stack((a, b)).mean((0, 2, 3, 4)).view(-1, 1, 1, 1)
    a, b = a - mean, b - mean
    fa, fb = residual_encoder(w, "feat_encoder", torch.cat((a, b)), instance_norm).chunk(2)
    forth, back = correlations(fa, fb), correlations(fb, fa)
    levels_a, levels_b = amt_pyramid(w, a), amt_pyramid(w, b)  # at 1/2, 1/4, 1/8, 1/16
    x = torch.cat((levels_a[3], levels_b[3], torch.full_like(a[:, :1, ::16, ::16], 0.5)), 1)
    flow = 0  # from the frame half way to a, and to b: [n,4,h,w]
    for level in (4, 3, 2):
        x = amt_decoder(w, f"decoder{level}", x)
        flow, x = x[:, :4] + flow, x[:, 4:]
        flow, x = amt_update(w, f"update{level}", flow, x, forth, back, 2 ** (4 - level))
        fa, fb = levels_a[level - 2], levels_b[level - 2]
        x = torch.cat((x, warp(fa, flow[:, :2]), warp(fb, flow[:, 2:]), flow), 1)
        flow = 2 * scaled(flow, 2)
    x = amt_decoder(w, "decoder1", x)  # [n,24,H,W]: three flows to a, three to b, three masks, three residues
    candidates = []
    for i in range(3):
        to_a, to_b = x[:, 2 * i:2 * i + 2] + flow[:, :2], x[:, 6 + 2 * i:8 + 2 * i] + flow[:, 2:]
        mask, residue = x[:, 12 + i:13 + i].sigmoid(), x[:, 15 + 3 * i:18 + 3 * i]
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


def amt_update(w, name, flow, x, forth, back, scale):
    """Refines both flows and the features with what the correlations say, at 1/8 of the frame's size."""
    def leaky(part, x):
        return F.leaky_relu(conv(w, f"{name}.{part}", x), 0.1)

    small, features = scaled(flow, 1 / scale) / scale, scaled(x, 1 / scale)
    here = pixels(small)
    # crossed: a's own map is searched where b's flow points, twice as far, since the flows start half way
    seen = look_up(forth, here + 2 * small[:, 2:], 3), look_up(back, here + 2 * small[:, :2], 3)
    y = torch.cat((leaky("convc1", torch.cat(seen, 1)), leaky("convf2", leaky("convf1", small))), 1)
    y = torch.cat((leaky("conv", y), small, features), 1)
    y = conv(w, f"{name}.gru.2", leaky("gru.0", y))
    flow = flow + scale * scaled(conv(w, f"{name}.flow_head.2", leaky("flow_head.0", y)), scale)
    return flow, x + scaled(conv(w, f"{name}.feat_head.2", leaky("feat_head.0", y)), scale)


def scaled(x, factor):
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def warp(x, flow):  # each place of the result takes what lies where its flow points
    return sample(x, (pixels(x) + flow).permute(0, 2, 3, 1), "border")


def smoothness(w, a, dropped, b):  # uint8 -> [n], 1 where the middle frame is predicted exactly
    h, wide = a.shape[2:]
    x, y = pad_to(a.float() / 255, 16), pad_to(b.float() / 255, 16)
    check_size(x, "motion_smoothness")
    top, left = ((-s % 16) // 2 for s in (h, wide))
    middle = amt(w, x, y)[:, :, top:top + h, left:left + wide]
    predicted = (middle * 255).to(torch.uint8)  # VBench truncates here
    return 1 - (predicted.int() - dropped.int()).abs().float().mean((1, 2, 3)) / 255


# ----------------------------------------------------------------------------------------------------
# weight files, also where VBench keeps them. amt-s.pth and pyiqa's MUSIQ come with non-commercial terms

class File(NamedTuple):
    folder: str  # below VBench's cache
    url: str
    tensors: int
    key: str  # with its shape and the number of tensors, tells the network from its relatives
    shape: tuple
    sha256: str = ""  # where the publisher's is known


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


def places(name, weights) -> list[Path]:
    """Where a file may be: in the folder given, flat or as VBench's cache, then in the caches VBench uses."""
    folder = FILES[name].folder
    cache = Path(os.environ.get("VBENCH_CACHE_DIR") or "~/.cache/vbench").expanduser()
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    also = {"clip_model": Path("~/.cache/clip").expanduser(), "dino_model": hub, "raft_model/models": hub}
    given = [Path(weights), Path(weights) / folder] if weights else []
    return [root / name for root in (*given, cache / folder, also.get(folder)) if root]


def find(names, weights) -> Path | str:
    """The first of these files that is there, else where they were looked for."""
    for path in (path for name in names for path in places(name, weights)):
        if path.exists():
            return path
    return ", or ".join(f"{name} (looked for at {', '.join(map(str, places(name, weights)))}; get it from "
                        f"{FILES[name].url})" for name in names)


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of one of FILES, in fp32, after checking that it is the right one."""
    file = FILES[path.name]
    tower = file.folder == "clip_model"
    archive = tower and zipfile.is_zipfile(path) and "/code/" in " ".join(zipfile.ZipFile(path).namelist())
    # OpenAI's files are TorchScript archives; a plain state dict made from one has another sha256
    if file.sha256 and (archive or not tower):
        with open(path, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != file.sha256:
            raise UserError(f"{path} is not the published file: its sha256 is {found[:16]}..., not "
                            f"{file.sha256[:16]}...; get it again from {file.url}")
    if archive:  # holds code, but what has this sha256 is OpenAI's
        stored = torch.jit.load(path, map_location="cpu").state_dict()
    else:
        scalar = np.float64(0).__reduce__()[0]  # AMT's file also holds its optimiser's rate, a numpy number
        allowed = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Float64DType]
        with torch.serialization.safe_globals(allowed):
            stored = open_weights(path)[0]
        stored = {k: v.read() for k, v in stored.get("state_dict", stored).items() if isinstance(v, Stored)}
    stored = {raft_name(k): v for k, v in stored.items()} if file.folder == "raft_model/models" else stored
    # of CLIP, the image tower; of RAFT, without the norms that raft-things.pth holds twice
    prefix = "visual." if tower else ""
    stored = {k: v.float() for k, v in stored.items() if k.startswith(prefix) and ".norm3." not in k}
    shape = tuple(stored[file.key].shape) if file.key in stored else "missing"
    if len(stored) != file.tensors or shape != file.shape:
        raise UserError(f"{path} is another network: {len(stored)} tensors instead of {file.tensors}, "
                        f"{file.key} is {shape} instead of {file.shape}; get it from {file.url}")
    return stored


# ----------------------------------------------------------------------------------------------------
# opening scorers

def singles(fps):
    return (0,), 1


def triples(fps):
    return (0, 1, 2), 2


def eighths(fps):
    """VBench looks for motion at about 8 frames per second."""
    step = max(1, round(fps / 8))
    return (0, step), step


RAFT_FILES = ("raft-things.pth", "raft_large_C_T_V1-22a6c225.pth")
NETWORKS = {  # the files a dimension needs (any one of each tuple), its score and curve, its windows
    "subject_consistency": ([("dino_vitbase16_pretrain.pth",)], subject, consistency_curve, singles),
    "background_consistency": ([("ViT-B-32.pt",)], background, consistency_curve, singles),
    "motion_smoothness": ([("amt-s.pth",)], smoothness, mean_curve, triples),
    "dynamic_degree": ([RAFT_FILES], magnitude, dynamic_curve, eighths),
    "aesthetic_quality": (
        [("ViT-L-14.pt",), ("sa_0_4_vit_l_14_linear.pth",)], aesthetic, mean_curve, singles),
    "imaging_quality": ([("musiq_spaq_ckpt-358bb6af.pth",)], imaging, mean_curve, singles),
}
WEIGHT_FREE = (  # the score of a window of frames, which frames, the curve, what comes out
    (stills, (0,), mean_curve,
     ("saturation", "colourfulness", "clipped", "contrast", "local_contrast", "detail", "brightness")),
    (motions, (0, 1), mean_curve, ("speed", "motion")),
    (flicker, (0, 1, 2), median_curve, ("flicker",)),
)


def open_scorers(names, device="cpu", weights=None, stride: int = 4, batch: int = 32):
    """(scorers of these metrics, {dimension: the files it lacks}). Of stride frames the weight-free metrics
    look at one, or at it and the next ones; VBench's dimensions look at all, as VBench does."""
    known = FREE | OPTIONAL | DIMENSIONS
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"no metric is called {unknown[0]!r}; there are {', '.join(known)}")
    if weights and not Path(weights).is_dir():
        raise UserError(f"no such folder of weights: {weights}")
    scorers, missing = [], {}
    for score, offsets, curve, group in WEIGHT_FREE:
        if wanted := [name for name in group if name in names]:
            # one at a time: what a CPU makes of a frame then stays in its cache
            scorers.append(Scorer(wanted, score, curve, lambda fps, o=offsets: (o, stride), device, 1))
    for name in (name for name in DIMENSIONS if name in names):
        files, score, curve, window = NETWORKS[name]
        found = [find(alternatives, weights) for alternatives in files]
        if lacking := [where for where in found if isinstance(where, str)]:
            missing[name] = "; ".join(lacking)
            continue
        loaded = [read_file(path) for path in found]
        check_fit(name, score, loaded, len(window(16)[0]), found)
        loaded = [{k: v.to(device) for k, v in w.items()} for w in loaded]
        # for a pair, correlations of all places with all: 200 MB at 480p
        at_once = batch if window is singles else max(1, batch // 8)
        scorers.append(Scorer([name], partial(named, name, score, loaded), curve, window, device, at_once))
    return scorers, missing


def named(name, score, loaded, *frames) -> dict:
    return {name: score(*loaded, *frames)}


@torch.inference_mode()
def check_fit(name, score, loaded, frames, paths):
    """Scores black frames, so that a file that does not fit shows now and not at the first video."""
    try:
        score(*loaded, *[torch.zeros(1, 3, 128, 128, dtype=torch.uint8)] * frames)
    except (KeyError, ValueError, RuntimeError) as error:
        where = " and ".join(map(str, paths))
        raise UserError(f"{where}: not the weights of {name}: {first_line(error)}") from None
