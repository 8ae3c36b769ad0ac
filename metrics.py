"""Frame scorers: colour, detail and motion without weights, VBench's six dimensions; and a Frechet distance.

A Scorer is given a video piece by piece and keeps numbers, never the video. A metric of your own takes two
entries: its name and meaning in FREE or OPTIONAL, and the function that computes it in WEIGHT_FREE.
Shapes: n frames or windows of frames, m values along a video, D features.
"""

import functools
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import vbench
from common import UserError, rng

FREE = {  # {metric without weights: its meaning}
    "saturation": "colour strength: HSV saturation, weighted by value",
    "colourfulness": "Hasler and Suesstrunk's; 15 is slight, 45 average, 82 high",
    "clipped": "share of pixels that are blown out or crushed",
    "contrast": "standard deviation of luma, of 0..1",
    "detail": "variance of the Laplacian over that of luma: falls with blur, not with contrast",
    "brightness": "mean luma, of 0..1",
    "speed": "normal flow in pixels per frame: not fooled by lost contrast",
    "motion": "mean change of luma from frame to frame, in levels of 0..255",
}
OPTIONAL = {  # the same, reported on request
    "local_contrast": "mean standard deviation of luma in blocks of 16x16, of 0..1",
    "flicker": "change of the change of luma over its change: rises where frames flash",
}
DIMENSIONS = {  # VBench's, of which the paper's Table 1 reports all
    "subject_consistency": "DINO features against those of the first and of the previous frame",
    "background_consistency": "CLIP features against those of the first and of the previous frame",
    "motion_smoothness": "how well AMT predicts every second frame from its two neighbours",
    "dynamic_degree": "whether RAFT sees enough motion: yes or no",
    "aesthetic_quality": "LAION's aesthetic predictor, on CLIP features",
    "imaging_quality": "MUSIQ, trained on SPAQ",
}
SCALE = {"imaging_quality": 1, "motion_quality": 1, "frame_quality": 1}  # factors to 0..100; all others: 100
QUALITIES = {  # the paper's Table 2: each the mean of two dimensions
    "motion_quality": ("motion_smoothness", "dynamic_degree"),
    "frame_quality": ("aesthetic_quality", "imaging_quality"),
}


# ----------------------------------------------------------------------------------------------------
# scorers: windows of frames, cut from a stream and scored in batches

class Curve(NamedTuple):
    frame: np.ndarray  # int [m], the frame each value belongs to: the second of its window
    value: np.ndarray  # float64 [m]
    total: float  # of the whole video


class Scorer:
    """Scores windows of frames of one video after another.

    names    the metrics it scores
    score    score(*frames), the i-th being the i-th frames of n windows, uint8 [n,3,H,W] -> {name: [n,...]}
    curve    curve(frame [m], rows [m,...], (H, W)) -> Curve, made of all rows of a video
    window   window(fps) -> (the frames of a window, counted from its first; frames from window to window)
    batch    windows that are scored at once
    """

    def __init__(self, names, score, curve, window, device, batch):
        self.names, self.score, self.curve, self.window = names, score, curve, window
        self.device, self.batch = device, batch

    def start(self, fps, frames: int | None = None):
        """Begins a video; if it ends before that many frames, finish() refuses it."""
        self.offsets, self.step = self.window(fps)
        self.expected = frames or 0
        self.seen = 0
        self.held = {}  # {number: frame} of windows that are not complete
        self.ready = []  # complete windows, not scored yet
        self.rows = {name: [] for name in self.names}

    def add(self, frames: torch.Tensor):
        """The next frames, uint8 [n,3,H,W]. How a video is cut into pieces changes no bit of its scores."""
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
            # plain numbers: small tensors that stay among frames that are freed would fragment the memory
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
    """VBench: the mean of the cosines to the previous and to the first frame, negative ones counted as 0."""
    if len(features) < 2:
        raise UserError("consistency needs at least 2 frames, not 1")
    features = F.normalize(features, dim=1)  # [m,D]
    previous, first = (features[1:] * features[:-1]).sum(1), features[1:] @ features[0]
    return mean_curve(frame[1:], (previous.clamp(min=0) + first.clamp(min=0)) / 2, size)


def dynamic_curve(frame, magnitudes, size) -> Curve:
    """VBench: 1 if at least about a quarter of the pairs move by more than 6 pixels of 256, else 0."""
    moving = (magnitudes > 6 * min(size) / 256).sum()
    return Curve(frame, magnitudes.numpy(), float(moving >= round(4 * (len(magnitudes) + 1) / 16)))


# ----------------------------------------------------------------------------------------------------
# metrics without weights, of one, two or three frames in a row

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
    variance, level = torch.var_mean(y, (1, 2), correction=0)
    laplacian = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:] - 4 * y[:, 1:-1, 1:-1]
    h, w = (s // 16 * 16 for s in y.shape[1:])
    blocks = y[:, :h, :w].unflatten(2, (-1, 16)).unflatten(1, (-1, 16))  # [n,h/16,16,w/16,16]
    return {"saturation": (strength - low.sum((1, 2))) / strength.clamp(min=1),
            "colourfulness": (rg[0] + yb[0]).sqrt() + 0.3 * torch.hypot(rg[1], yb[1]),
            "clipped": ((high >= 253) | (low <= 2)).float().mean((1, 2)),
            "contrast": variance.sqrt() / 255,
            "local_contrast": blocks.std((2, 4), correction=0).mean((1, 2)) / 255,
            "detail": laplacian.var((1, 2), correction=0) / variance.clamp(min=1e-3),
            "brightness": level / 255}


def pooled(frames):  # uint8 [n,3,H,W] -> [n,H/4,W/4]; means of 4x4 pixels hide grain
    return F.avg_pool2d(luma(frames), 4)


def motions(a, b) -> dict:
    a, b = pooled(a), pooled(b)
    change = (b - a).abs()
    middle = (a + b) / 2
    dy = (middle[:, 2:, 1:-1] - middle[:, :-2, 1:-1]) / 2
    dx = (middle[:, 1:-1, 2:] - middle[:, 1:-1, :-2]) / 2
    slope = torch.hypot(dx, dy).sum((1, 2)).clamp(min=1e-3)
    return {"speed": 4 * change[:, 1:-1, 1:-1].sum((1, 2)) / slope, "motion": change.mean((1, 2))}


def flicker(a, b, c) -> dict:
    a, b, c = pooled(a), pooled(b), pooled(c)
    change = ((b - a).abs().mean((1, 2)) + (c - b).abs().mean((1, 2))) / 2
    return {"flicker": (a - 2 * b + c).abs().mean((1, 2)) / change.clamp(min=1e-3)}


# ----------------------------------------------------------------------------------------------------
# the Frechet distance to real videos, over short windows of frames; it needs no weights either

def quarters(fps):
    """4 frames over three quarters of a second: long enough for things to move."""
    step = max(1, round(fps / 4))
    return 0, step, 2 * step, 3 * step


@torch.inference_mode()
def frechet_features(*frames: torch.Tensor) -> torch.Tensor:
    """The i-th frames of n windows, uint8 [n,3,H,W] each -> [n,672]: of the mean of a window's frames and,
    apart, of the changes between them, so that neither the content nor its motion hides the other."""
    window = torch.stack(frames, 1).float() / 255  # [n,4,3,H,W]
    return torch.cat([random_features(window.mean(1)), random_features(window.diff(dim=1).flatten(1, 2))], 1)


@functools.cache
def random_filters(layer: int, inputs: int, outputs: int, device) -> torch.Tensor:
    filters = torch.randn(outputs, inputs * 9, generator=rng("frechet", layer))
    filters = F.normalize(filters - filters.mean(1, keepdim=True)) * 2 ** 0.5
    return filters.view(outputs, inputs, 3, 3).to(device)


def random_features(x: torch.Tensor) -> torch.Tensor:
    """[n,C,H,W] -> [n,336]: mean and deviation of the channels of a fixed random network."""
    row = []
    for layer, outputs in enumerate((24, 48, 96)):
        x = F.conv2d(x, random_filters(layer, x.shape[1], outputs, x.device), stride=2, padding=1).relu()
        row += [x.mean((2, 3)), x.std((2, 3), correction=0)]
    return torch.cat(row, 1)


def frechet_distance(reference: torch.Tensor, features: torch.Tensor, axes: int = 32) -> float:
    """Between Gaussians fitted to both, along the widest axes of the reference, in units of its spread."""
    if len(reference) <= axes or len(features) <= axes:
        raise UserError(f"a Frechet distance needs more than {axes} reference windows and as many others, "
                        f"not {len(reference)} and {len(features)}")
    centre, spread, directions = gaussian(reference)
    if spread[-axes] < 1e-9 * spread[-1]:
        raise UserError(f"a Frechet distance needs more varied reference windows than these {len(reference)}")
    # in these terms the reference has mean 0 and covariance 1
    x = (features.double() - centre) @ (directions[:, -axes:] / spread[-axes:].sqrt())
    widths = torch.linalg.eigvalsh(x.T.cov()).clamp(min=0).sqrt()
    return (x.mean(0).square().sum() + (widths - 1).square().sum()).item()


@functools.lru_cache(maxsize=1)  # one reference serves all methods and fifths of a report
def gaussian(rows: torch.Tensor):
    """Centre, variances (ascending) and directions of a Gaussian fitted to the rows."""
    rows = rows.double()
    centre = rows.mean(0)
    return centre, *torch.linalg.eigh((rows - centre).T.cov())


# ----------------------------------------------------------------------------------------------------
# opening scorers

def singles(fps):
    return (0,), 1


def triples(fps):
    return (0, 1, 2), 2


def eighths(fps):
    """VBench samples about 8 frames per second to look for motion."""
    step = max(1, round(fps / 8))
    return (0, step), step


WEIGHT_FREE = (  # (score of a window, the window's frames, the curve, the names that score returns)
    (stills, (0,), mean_curve,
     ("saturation", "colourfulness", "clipped", "contrast", "local_contrast", "detail", "brightness")),
    (motions, (0, 1), mean_curve, ("speed", "motion")),
    (flicker, (0, 1, 2), median_curve, ("flicker",)),
)
VBENCH = {  # {dimension: (its curve, its windows)}; vbench.NETWORKS has the score
    "subject_consistency": (consistency_curve, singles),
    "background_consistency": (consistency_curve, singles),
    "motion_smoothness": (mean_curve, triples),
    "dynamic_degree": (dynamic_curve, eighths),
    "aesthetic_quality": (mean_curve, singles),
    "imaging_quality": (mean_curve, singles),
}


def open_scorers(names, device="cpu", weights=None, stride: int = 4, batch: int = 32):
    """(scorers of these metrics, {dimension: the files it lacks}). The weight-free metrics take one window
    every `stride` frames; VBench's dimensions take all frames, as VBench does."""
    known = FREE | OPTIONAL | DIMENSIONS
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"no metric is called {unknown[0]!r}; there are {', '.join(known)}")
    if weights and not Path(weights).is_dir():
        raise UserError(f"no such folder of weights: {weights}")
    scorers, missing = [], {}
    for score, offsets, curve, group in WEIGHT_FREE:
        if wanted := [name for name in group if name in names]:
            # one at a time: a frame's intermediate results then stay in a CPU's cache
            scorers.append(Scorer(wanted, score, curve, lambda fps, o=offsets: (o, stride), device, 1))
    for name in (name for name in DIMENSIONS if name in names):
        paths, lacking = vbench.find_files(name, weights)
        if lacking:
            missing[name] = "; ".join(lacking)
            continue
        curve, window = VBENCH[name]
        network = vbench.open_network(name, paths, len(window(16)[0]), device)
        # of a pair, correlations of all pixels with all: 200 MB at 480p
        at_once = batch if window is singles else max(1, batch // 8)
        scorers.append(Scorer([name], partial(named, name, network), curve, window, device, at_once))
    return scorers, missing


def frechet_scorer(device="cpu", stride: int = 4, pixels: int = 2**14) -> Scorer:
    """Its curve is the features of windows, one every `stride` frames of so many pixels: float32 [m,672]."""
    return Scorer(["frechet"], partial(named, "frechet", frechet_features),
                  lambda frame, rows, size: rows.float(), lambda fps: (quarters(fps), stride), device,
                  max(4, 2**16 // pixels))


def named(name, network, *frames) -> dict:
    return {name: network(*frames)}


# ----------------------------------------------------------------------------------------------------
# what the report and the probes share: averages, and lists from all ranks

def mean(values) -> float:
    """Of the values that are not nan, which marks frames without a value."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def sem(values) -> float:
    """The standard error of that mean."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return float(values.std(ddof=1) / len(values)**0.5) if len(values) > 1 else math.nan
