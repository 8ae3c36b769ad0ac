"""Flow matching, its solvers, guidance, and autoregressive generation: the one place for this arithmetic.

    sigma = t / 1000 in 0 (clean) .. 1 (noise);  x_t = (1 - sigma) x0 + sigma noise;  v = noise - x0

    sampling = Sampling(steps=20, guidance=6.0)
    film = Film(vae, keep=12, reentry="first")
    for first, latents in generate(model, [text], null, sampling, shape=(16, 60, 104), reenter=film.reenter):
        video = film.show(latents)
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from common import UserError, rng
from model import chunk_sizes, pad_text

# ----------------------------------------------------------------------------------------------------
# flow matching

def shifted(sigma, shift: float):
    """Moves noise levels towards 1: high resolutions need more of their steps there."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def per_frame(t, x):  # sigma [B, F] -> [B, F, 1, 1, 1], to go with x [B, F, C, H, W]
    return (t / 1000).view(*t.shape, *[1] * (x.ndim - t.ndim))


def add_noise(x0, noise, t):
    sigma = per_frame(t, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity(x0, noise):
    return noise - x0


def bell_weight(t, shift: float):
    """Self-Forcing's weight of the loss by noise level: most at t = 500, none at 1000, and 1 on average over
    the shifted grid of 1000 levels that training draws t from."""
    def bell(t):
        return torch.exp(-2 * ((t - 500) / 1000)**2)

    grid = bell(1000 * shifted(1 - torch.arange(1000) / 1000, shift))
    return (bell(t) - grid.min()) / (grid - grid.min()).mean()


# ----------------------------------------------------------------------------------------------------
# solvers: solve(velocity, x, sigmas, noise) -> x at the last level. velocity(x, sigma) asks the model, and
# noise(i) is fresh noise for step i, for those that want it

WAN_MAX = 0.9990000128746033  # 0.999 as a float32, which decides what t some levels are rounded down to


def sigma_grid(steps: int, shift: float, solver: str = "euler") -> list[float]:
    """steps + 1 levels from noise to clean. UniPC works with log-SNR, infinite at pure noise, so it starts
    below: Wan2.1 (and Self-Forcing) at 0.999; diffusers at 1 - 1e-6, with a spacing that aims at 1/1000."""
    if solver == "unipc":
        return [shifted(s, shift) for s in spaced(WAN_MAX, 0, steps)] + [0.0]
    if solver == "unipc-diffusers":
        return [min(shifted(s, shift), 1 - 1e-6) for s in spaced(1, 1 / 1000, steps)] + [0.0]
    return [shifted(1 - i / steps, shift) for i in range(steps + 1)]


def spaced(first: float, last: float, steps: int) -> list[float]:
    """numpy.linspace to the bit, without its end."""
    return [i * ((last - first) / steps) + first for i in range(steps)]


def model_time(sigma: float, solver: str) -> float:
    """The t that the model is told for a level: with UniPC a whole number, as in Wan2.1 and diffusers."""
    return float(math.floor(1000 * sigma)) if solver.startswith("unipc") else 1000 * sigma


def euler(velocity, x, sigmas, noise=None):
    for sigma, following in pairwise(sigmas):
        x = x + velocity(x, sigma) * (following - sigma)
    return x


def heun(velocity, x, sigmas, noise=None):
    """Of order 2, for twice the work: the mean of the velocities at both ends of a step, but for the last."""
    for sigma, following in pairwise(sigmas):
        v = velocity(x, sigma)
        if following:
            v = (v + velocity(x + v * (following - sigma), following)) / 2
        x = x + v * (following - sigma)
    return x


def renoise(velocity, x, sigmas, noise):
    """The sampler of models distilled to a few steps (CausVid, Self-Forcing): predict x0, then noise that to
    the next level."""
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        x0 = x - velocity(x, sigma) * sigma
        x = (1 - following) * x0 + following * noise(i) if following else x0
    return x


def unipc(velocity, x, sigmas, noise=None):
    """UniPC of order 2 (B2, predicting x0) for flows: every step first corrects the one before it."""
    logsnr = [math.log(1 - s) - math.log(s) if s else math.inf for s in sigmas]
    last = len(sigmas) - 1
    predictions, corrected = [], []  # x0 predicted and x corrected, by step

    def order(i):
        return min(2, i + 1, last - i)

    def base(i, x):  # from level i to i + 1 with x0 held constant
        scale = (1 - sigmas[i + 1]) * math.expm1(logsnr[i] - logsnr[i + 1])
        return x * (sigmas[i + 1] / sigmas[i]) - predictions[i] * scale, scale

    def correct(i, x):  # the step from i - 1 to i again, now that x0 has been predicted at i too
        x, scale = base(i - 1, corrected[i - 1])
        new = predictions[i] - predictions[i - 1]
        if order(i - 1) == 1:
            return x - new * (0.5 * scale)
        h = logsnr[i] - logsnr[i - 1]
        r, e = (logsnr[i - 2] - logsnr[i - 1]) / h, math.expm1(-h)
        f1 = e / -h - 1
        b1, b2 = f1 / e, 2 * (f1 / -h - 0.5) / e
        rho = (b1 - b2) / (1 - r)  # of rho + rho2 = b1, r rho + rho2 = b2
        return x - (predictions[i - 2] - predictions[i - 1]) * (rho * scale / r) - new * ((b1 - rho) * scale)

    for i in range(last):
        predictions.append(x - velocity(x, sigmas[i]) * sigmas[i])
        corrected.append(correct(i, x) if i else x)
        x, scale = base(i, corrected[i])
        if order(i) == 2:
            r = (logsnr[i - 1] - logsnr[i]) / (logsnr[i + 1] - logsnr[i])
            x = x - (predictions[i - 1] - predictions[i]) * (0.5 * scale / r)
    return x


SOLVERS = {"euler": euler, "heun": heun, "unipc": unipc, "unipc-diffusers": unipc, "renoise": renoise}


# ----------------------------------------------------------------------------------------------------
# guidance

@dataclass(frozen=True)
class Sampling:
    """The settings of a sampler."""
    steps: int = 20  # solver steps per chunk
    shift: float = 8.0  # of the noise levels, as in training
    guidance: float = 6.0  # scale of the guidance towards the prompt; 1 is none
    solver: str = "euler"  # one of SOLVERS
    context_noise: float = 0.0  # the noise level finished frames are shown at (sigma_test)
    history: float = 0.0  # weight of history guidance; 0 is none
    history_level: float = 0.8  # the noise level of its partly hidden history
    levels: tuple[float, ...] = ()  # t of each step, if not by steps and shift


# what Self-Forcing was distilled for: t = 1000, 750, 500, 250, which the shift makes 1000, 937.5, 833.3, 625
DISTILLED = {"steps": 4, "shift": 5.0, "guidance": 1.0}


def levels_of(s: Sampling) -> list[float]:
    return [t / 1000 for t in s.levels] + [0.0] if s.levels else sigma_grid(s.steps, s.shift, s.solver)


def guidance_branches(s: Sampling) -> list[tuple[bool, float, float]]:
    """The paper's Eq. 4 as [(is conditional, noise level of the history, weight)]: the guided velocity is a
    weighted sum over branches, which differ in their text and in how noisy a history they are shown.

        v(history, null) + w_text (v(history, text) - v(history, null))
                         + w_hg (v(history at history_level, null) - v(noise for a history, null))
    """
    branches = [(True, s.context_noise, s.guidance)]
    if s.guidance != 1:
        branches += [(False, s.context_noise, 1 - s.guidance)]
    if s.history:
        branches += [(False, s.history_level, s.history), (False, 1.0, -s.history)]
    return branches


class History:
    """The frames of a window so far, in a KV cache that holds every branch of the guidance as one batch. The
    cache is None where there is no past: with all frames at once."""

    def __init__(self, model, cache, text, sampling, draw):
        self.model, self.cache, self.text, self.draw = model, cache, text, draw
        self.solver = sampling.solver
        self.shown = 0  # frames in the cache
        branches = guidance_branches(sampling)
        device = text.device
        self.levels = 1000.0 * torch.tensor([level for _, level, _ in branches], device=device)
        self.noised = any(level for _, level, _ in branches)
        self.weights = torch.tensor([w for *_, w in branches], device=device).view(-1, 1, 1, 1, 1, 1)

    def show(self, first, x, sizes):
        """Writes finished frames, chunks of these sizes, into every branch at that branch's noise level. A
        chunk's noise, drawn for its first frame, stays the same when a later window shows it."""
        t = self.levels.repeat_interleave(len(x))[:, None].expand(-1, x.shape[1])
        x = self.for_each(x)
        if self.noised:
            noise = [self.draw("context", first + sum(sizes[:i]), size) for i, size in enumerate(sizes)]
            x = add_noise(x, self.for_each(torch.cat(noise, 1)), t)
        self.model(x, t, self.text, chunk=sizes, cache=self.cache, start=self.shown)
        self.shown += x.shape[1]

    def velocity(self, x, sigma: float):
        """The guided velocity of the chunk that comes next."""
        (batch, size), branches = x.shape[:2], len(self.levels)
        t = torch.full((branches * batch, size), model_time(sigma, self.solver), device=x.device)
        v = self.model(self.for_each(x), t, self.text, chunk=(size,), cache=self.cache, start=self.shown)
        return (self.weights * v.unflatten(0, (branches, batch))).sum(0)

    def roll(self, frames: int, sink: int):
        """Drops the oldest chunks but for the first `sink`, until no more than so many frames are left."""
        while self.shown > frames:
            self.shown -= self.cache.roll(sink)

    def for_each(self, x):
        return x.repeat(len(self.levels), 1, 1, 1, 1)


# ----------------------------------------------------------------------------------------------------
# generation

@torch.no_grad()
def generate(model, text, null, sampling: Sampling, *, shape, frames: int = 21, context=None, seed: int = 0,
             ids=None, chunk: int | None = 3, window: int = 21, keep: int = 12, reenter=None,
             sink: int | None = None):
    """Yields (first frame, latents [B, f, C, H, W]): the context if there is one, then chunk by chunk; each
    sees those before it through the KV cache. chunk None: bidirectionally, all frames at once.

    text      B embeddings [n, text_dim], or [(first latent frame, B embeddings), ...] in rising order: the
              text changes at the first window slide at or after that frame (with a sink: the first chunk)
    null      the embedding guidance pushes away from (the empty prompt's); None if there is no guidance
    shape     (C, H, W) of a latent frame
    context   latents [B, f, C, H, W] to continue; one frame (an image) makes chunks 1, 3, 3, ...
    ids       a name for each sample: its noise is a function of (seed, id, chunk), whatever the batch
    window    what the model sees at once; when full, its last `keep` frames begin the next one
    reenter   a function of those frames, [B, keep, C, H, W], to what the next window is shown of them
    sink      None, or how many chunks at the start stay in the cache while the window rolls: when it is full,
              the oldest other chunk makes room for the next. Nothing is computed anew; no keep, no reenter
    """
    schedule = text if isinstance(text[0], tuple) else [(0, text)]
    batch = len(schedule[0][1])
    device = model.device
    ids = list(range(batch)) if ids is None else ids
    begin = 0 if context is None else context.shape[1]
    branches = guidance_branches(sampling)
    check_plan(begin, frames, chunk, window, keep, sink)
    check_batch(batch, ids, context, null, branches)
    texts = [(first, branch_text(rows, null, branches).to(device)) for first, rows in schedule]
    cache = None if chunk is None else model.new_cache(batch * len(branches), window, *shape[1:])
    chunk = chunk or frames
    sigmas = levels_of(sampling)

    def draw(name, first, size):  # [B, size, C, H, W], the same in any batch, on any rank and device
        noise = [torch.randn(size, *shape, generator=rng(seed, name, i, first)) for i in ids]
        return torch.stack(noise).to(device)

    history = History(model, cache, texts[0][1], sampling, draw)
    origin = 0  # the window's first frame
    at = begin  # the chunk's first frame
    latest = torch.empty(batch, 0, *shape, device=device)
    if begin:
        latest = context.to(device, torch.float32)
        yield 0, latest
        history.show(0, latest, leading_sizes(begin, chunk))
    while at < frames:
        current = [rows for first, rows in texts if first <= at][-1]
        if sink is not None:
            history.text = current
            history.roll(window - chunk, sink)
        elif at - origin + chunk > window:
            origin = at - keep
            latest = latest[:, -keep:]
            history = History(model, cache, current, sampling, draw)
            history.show(origin, reenter(latest) if reenter else latest, chunk_sizes(keep, chunk))
        x = SOLVERS[sampling.solver](history.velocity, draw("noise", at, chunk), sigmas,
                                     lambda i, at=at: draw(f"noise of step {i}", at, chunk))
        yield at, x
        latest = torch.cat([latest, x], 1)[:, -keep:]
        read = sink is not None or at + 2 * chunk - origin <= window  # if there is a next chunk
        if read and at + chunk < frames:
            history.show(at, x, (chunk,))
        at += chunk


def branch_text(rows, null, branches):
    """[branches * B, n, text_dim]"""
    nulls = [null] * len(rows)
    return pad_text([row for conditional, *_ in branches for row in (rows if conditional else nulls)])


def leading_sizes(frames: int, chunk: int) -> tuple[int, ...]:
    """A context's chunks: what does not fill one comes first, as an image does."""
    whole, rest = divmod(frames, chunk)
    return ((rest,) if rest else ()) + (chunk,) * whole


def check_batch(batch: int, ids, context, null, branches):
    if len(ids) != batch or (context is not None and len(context) != batch):
        raise ValueError(f"{batch} prompts need {batch} ids and contexts, not {len(ids)} ids")
    if null is None and len(branches) > 1:
        raise ValueError("guidance needs the embedding of the empty prompt")


def check_plan(begin: int, frames: int, chunk: int | None, window: int, keep: int, sink: int | None = None):
    if chunk is None:
        if begin or sink is not None or not 0 < frames <= window:
            raise UserError(f"{frames} latent frames after {begin}: made at once, all must be in the window "
                            f"of {window}, with nothing before them and no sink")
        return
    if begin > window - chunk:
        raise UserError(f"a context of {begin} latent frames leaves no room in a window of {window}; give at "
                        f"most {(window - chunk) // chunk * chunk}")
    if (frames - begin) % chunk or frames <= begin:
        less = begin + max((frames - begin) // chunk, 1) * chunk
        raise UserError(f"{frames} latent frames after a context of {begin} are no chunks of {chunk}; use "
                        f"{less} or {less + chunk}")
    if sink is not None:
        sizes = leading_sizes(begin, chunk)
        held = sum(sizes[:sink]) + chunk * max(sink - len(sizes), 0)
        if sink < 0 or held > window - 2 * chunk:
            raise UserError(f"a sink of {sink} chunks in a window of {window}: it must be at least 0, and "
                            f"leave room for 2 chunks of {chunk} latent frames")
    elif keep % chunk or not 0 < keep <= window - chunk:
        raise UserError(f"a window of {window} cannot keep {keep} frames; keep a multiple of {chunk} below")


class Film:
    """The video of a stream of latents, and the way from its end back into the next window.

    reentry   as-is: the kept latents as they are; all: their video encoded anew; first: only its first frame,
              as the image that the VAE expects at the front
    """

    def __init__(self, vae, keep: int, reentry: str = "first"):
        self.vae, self.keep, self.reentry = vae, keep, reentry
        self.state = {}  # of the decoder
        self.end = None  # the video of the last `keep` latent frames

    def show(self, latents):
        """The video of the next latents, [B, T, 3, H, W] in [-1, 1]."""
        video = self.vae.decode(latents, self.state)
        if self.reentry != "as-is":
            end = video if self.end is None else torch.cat([self.end, video], 1)
            self.end = end[:, -self.vae.frame_count(self.keep):]
        return video

    def reenter(self, kept):
        if self.reentry == "first":
            return torch.cat([self.vae.encode(self.end[:, :1]), kept[:, 1:]], 1)
        return self.vae.encode(self.end) if self.reentry == "all" else kept


def drift_statistics(latents) -> dict[str, torch.Tensor]:
    """Of a chunk, each [B]: the mean, the spread and the share outside +-3 of normalised latents."""
    x = latents.float().flatten(1)
    return {"mean": x.mean(1), "std": x.std(1), "outside": (x.abs() > 3).float().mean(1)}
