"""Flow matching, its solvers, guidance, and autoregressive generation: the one place for this arithmetic.

    sigma = t / 1000 in 0 (clean) .. 1 (noise);  x_t = (1 - sigma) x0 + sigma noise;  v = noise - x0
"""

import math
from collections.abc import Callable

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


def x0_from_v(x, v, t):
    return x - per_frame(t, x) * v


def bell_weight(t, shift: float):
    """Self-Forcing's weight of the loss by noise level: most at t = 500, none at 1000, and 1 on average over
    the shifted grid of 1000 levels that training draws t from."""
    def bell(t):
        return torch.exp(-2 * ((t - 500) / 1000)**2)

    grid = bell(1000 * shifted(1 - torch.arange(1000) / 1000, shift))
    return (bell(t) - grid.min()) / (grid - grid.min()).mean()


def sigma_grid(steps: int, shift: float, solver: str = "euler") -> list[float]:
    """steps + 1 levels from noise to clean. UniPC works with log-SNR, infinite at both ends: like diffusers,
    it starts just below 1 and spaces its steps as if there were one more, at 1/1000."""
    if solver == "unipc":
        grid = [1 + i * (1 / 1000 - 1) / steps for i in range(steps)]
        grid = [min(shifted(s, shift), 1 - 1e-6) for s in grid] + [0.0]
    else:
        grid = [shifted(1 - i / steps, shift) for i in range(steps + 1)]
    return grid


def euler(sigmas: list[float]):
    def step(i, x, v):
        return x + v * (sigmas[i + 1] - sigmas[i])
    return step


def unipc(sigmas: list[float]):
    """UniPC of order 2 (B2, predicting x0) for flows; every call corrects the last step, then takes one."""
    logsnr = [math.log(1 - s) - math.log(s) if s else math.inf for s in sigmas]
    predictions, corrected, last = [], [], len(sigmas) - 1  # x0 predicted and x corrected, by step

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

    def step(i, x, v):
        predictions.append(x - v * sigmas[i])
        corrected.append(correct(i, x) if i else x)
        x, scale = base(i, corrected[i])
        if order(i) == 2:
            r = (logsnr[i - 1] - logsnr[i]) / (logsnr[i + 1] - logsnr[i])
            x = x - (predictions[i - 1] - predictions[i]) * (0.5 * scale / r)
        return x
    return step


SOLVERS = {"euler": euler, "unipc": unipc}


# ----------------------------------------------------------------------------------------------------
# guidance: the velocity is a weighted sum over branches, which differ in their text and in how noisy a
# history they are shown. All run as one batch.

def guidance_branches(guidance: float, context_noise: float = 0.0, history: float = 0.0, history_level=0.8):
    """[(is conditional, history's noise level, weight)]

    guidance        v_null + w (v_text - v_null); one branch is enough for w = 1
    context_noise   the level all of the history is shown at (sigma_test)
    history         history guidance, + w_hg (v_null(history at history_level) - v_null(history all noise))
    """
    branches = [(True, context_noise, guidance)]
    if guidance != 1:
        branches += [(False, context_noise, 1 - guidance)]
    if history:
        branches += [(False, history_level, history), (False, 1.0, -history)]
    return branches


# ----------------------------------------------------------------------------------------------------
# generation

@torch.no_grad()
def generate(model, text, null=None, *, shape, seed: int = 0, ids=None, frames: int = 21, context=None,
             chunk: int = 3, steps: int = 20, shift: float = 8.0, guidance: float = 6.0, solver="euler",
             context_noise: float = 0.0, history: float = 0.0, history_level: float = 0.8,
             window: int = 21, keep: int = 12, reentry: str = "first", vae=None,
             on_chunk: Callable | None = None) -> torch.Tensor:
    """Latents [B, frames, C, H, W], chunk by chunk; each sees those before it through the KV cache.

    text      B embeddings [n, text_dim], or [(first latent frame, B embeddings), ...] in rising order: the
              text changes at the first window slide at or after that frame
    null      the embedding guidance pushes away from (the empty prompt's)
    shape     (C, H, W) of a latent frame
    ids       a name for each sample: its noise is a function of (seed, id, chunk), whatever the batch
    context   latents [B, f, C, H, W] to continue; one frame (an image) makes chunks 1, 3, 3, ...
    window    what the model sees at once; when full, its last `keep` frames begin the next one
    reentry   as-is: as they are; all: decoded and encoded anew; first: only the first of them, as the image
              that the VAE expects at the front. The last two need vae
    vae       also decodes each finished chunk, as a stream
    on_chunk  called as on_chunk(first frame, latents [B, f, C, H, W], their video [B, T, 3, H, W] or None)
    """
    schedule = text if isinstance(text[0], tuple) else [(0, text)]
    batch = len(schedule[0][1])
    ids = list(range(batch)) if ids is None else ids
    device = model.head.modulation.device
    branches = guidance_branches(guidance, context_noise, history, history_level)
    sigmas = sigma_grid(steps, shift, solver)
    t_grid = 1000 * torch.tensor(sigmas, dtype=torch.float32, device=device)
    weights = torch.tensor([w for _, _, w in branches], device=device).view(-1, 1, 1, 1, 1, 1)
    begin = 0 if context is None else context.shape[1]
    check_plan(begin, frames, chunk, window, keep, reentry, vae)
    if len(ids) != batch or (begin and len(context) != batch):
        raise ValueError(f"{batch} prompts need {batch} ids and contexts, not {len(ids)} ids")
    if null is None and len(branches) > 1:
        raise ValueError("guidance needs the embedding of the empty prompt")
    texts = [(first, branch_text(rows, null, branches).to(device)) for first, rows in schedule]

    cache = model.new_cache(batch * len(branches), window, *shape[1:])
    latents = torch.empty(batch, frames, *shape, device=device)
    decode = decoder(vae) if vae else lambda z: None
    tail = None  # the video of the last `keep` latent frames

    def draw(name, first, size):  # [B, size, C, H, W], the same in any batch, on any rank and device
        noise = [torch.randn(size, *shape, generator=rng(seed, name, i, first)) for i in ids]
        return torch.stack(noise).to(device)

    def remember(first, x, position, sizes):
        """Write finished frames into every branch's cache, at that branch's noise level."""
        levels = 1000.0 * torch.tensor([level for _, level, _ in branches], device=device)
        t = levels.repeat_interleave(batch)[:, None].expand(-1, x.shape[1])
        x = x.repeat(len(branches), 1, 1, 1, 1)
        if any(level for _, level, _ in branches):
            noise, at = [], first
            for size in sizes:  # a chunk's noise stays the same when a later window shows it again
                noise.append(draw("context", at, size))
                at += size
            x = add_noise(x, torch.cat(noise, 1).repeat(len(branches), 1, 1, 1, 1), t)
        model(x, t, current, chunk=sizes, cache=cache, start=position)

    def finish(first, x):
        nonlocal tail
        latents[:, first:first + x.shape[1]] = x
        video = decode(x)
        if video is not None and reentry != "as-is":
            tail = video if tail is None else torch.cat([tail, video], 1)
            tail = tail[:, -vae.frame_count(keep):]
        if on_chunk:
            on_chunk(first, x, video)

    current, origin, at = texts[0][1], 0, begin  # origin: the frame at the window's position 0
    if begin:
        finish(0, context.to(device, torch.float32))
        remember(0, latents[:, :begin], 0, leading_sizes(begin, chunk))
    while at < frames:
        size = min(chunk, frames - at)
        if at - origin + size > window:
            origin = at - keep
            current = [rows for first, rows in texts if first <= at][-1]
            kept = latents[:, origin:at].clone()
            if reentry == "first":
                kept[:, :1] = vae.encode(tail[:, :1])
            elif reentry == "all":
                kept = vae.encode(tail)
            remember(origin, kept, 0, chunk_sizes(keep, chunk))
        x, step = draw("noise", at, size), SOLVERS[solver](sigmas)
        for i in range(steps):
            t = t_grid[i].expand(batch * len(branches), size)
            v = model(x.repeat(len(branches), 1, 1, 1, 1), t, current, chunk=(size,), cache=cache,
                      start=at - origin)
            x = step(i, x, (weights * v.unflatten(0, (len(branches), batch))).sum(0))
        if at + size < frames and at + size + chunk - origin <= window:  # else nobody would read it
            remember(at, x, at - origin, (size,))
        finish(at, x)
        at += size
    return latents


def branch_text(rows, null, branches):
    """[branches * B, n, text_dim]"""
    nulls = [null] * len(rows)
    return pad_text([row for conditional, *_ in branches for row in (rows if conditional else nulls)])


def leading_sizes(frames: int, chunk: int) -> tuple[int, ...]:
    """A context's chunks: what does not fill one comes first, as an image does."""
    return (frames % chunk,) * (frames % chunk > 0) + (chunk,) * (frames // chunk)


def decoder(vae):
    """A function from each next chunk of latents to its video, keeping the VAE's state in between."""
    inbox, done = [], 0

    def chunks():
        while True:
            yield inbox.pop()
    stream = vae.decode_stream(chunks())

    def decode(latents):
        nonlocal done
        inbox.append(latents)
        pieces, due = [], vae.frame_count(done + latents.shape[1]) - vae.frame_count(done)
        while sum(piece.shape[1] for piece in pieces) < due:
            pieces.append(next(stream))
        done += latents.shape[1]
        return torch.cat(pieces, 1)
    return decode


def check_plan(begin, frames, chunk, window, keep, reentry, vae):
    if begin > window - chunk:
        raise UserError(f"a context of {begin} latent frames leaves no room in a window of {window}; give at "
                        f"most {(window - chunk) // chunk * chunk}")
    if (frames - begin) % chunk or frames <= begin:
        less = begin + max((frames - begin) // chunk, 1) * chunk
        raise UserError(f"{frames} latent frames after a context of {begin} are no chunks of {chunk}; use "
                        f"{less} or {less + chunk}")
    if keep % chunk or not 0 < keep <= window - chunk:
        raise UserError(f"a window of {window} cannot keep {keep} frames; keep a multiple of {chunk} below")
    if frames > window and reentry != "as-is" and vae is None:
        raise UserError(f"{frames} latent frames need a second window, and re-entry {reentry!r} needs the "
                        "VAE; give it, or use as-is")


def drift_statistics(latents) -> dict[str, torch.Tensor]:
    """Of a chunk, each [B]: the mean, the spread and the share outside +-3 of normalised latents."""
    x = latents.float().flatten(1)
    return {"mean": x.mean(1), "std": x.std(1), "outside": (x.abs() > 3).float().mean(1)}
