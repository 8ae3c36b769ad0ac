"""Training modes: what a chunk sees of the chunks before it.

    df     diffusion forcing: them as they are being denoised, each at a noise level of its own
    tf     teacher forcing: them clean
    rf     Resampling Forcing (arXiv 2512.15702): the model's own version of them
    full   bidirectional: a clip is a single chunk, with one noise level

A history is latents [B, F, C, H, W] that stand beside the noisy ones, at t = 0, or None where the noisy
chunks are their own past. A new mode is a function here, an entry in HISTORIES, and a choice of --mode.
"""

import torch

import diffusion


def noisy(cfg, net, batch):
    return None


def clean(cfg, net, batch):
    return batch.x0


def resampled(cfg, net, batch):
    """The clip noised to a level that leaves its content in place, then denoised by the model as it is now.
    So the past holds the model's errors, those within a chunk and those that pile up over chunks."""
    if batch.level is None:  # warming up
        return batch.x0
    level = (1000 * batch.level)[:, None].expand_as(batch.t)
    start = diffusion.add_noise(batch.x0, batch.level_noise, level)
    if cfg.rf_history == "noise":
        return start
    sigmas = [batch.level.view(-1, 1, 1, 1, 1) * (1 - i / cfg.rf_steps) for i in range(cfg.rf_steps + 1)]
    with torch.no_grad():
        if cfg.rf_history == "parallel":
            return denoise(net, start, sigmas, batch.text, chunk=batch.sizes, clean=batch.x0)
        return resample(net, start, sigmas, batch)


def resample(net, start, sigmas, batch):
    """Chunk by chunk, each behind those that the model has made. Nothing sees the last: it stays noisy."""
    cache = net.new_cache(len(start), *start.shape[1:2], *start.shape[3:])
    first = 0
    chunks = list(start.split(batch.sizes, 1))
    for i, size in enumerate(batch.sizes[:-1]):
        past = {"chunk": (size,), "cache": cache, "start": first}
        chunks[i] = denoise(net, chunks[i], sigmas, batch.text, **past)
        net(chunks[i], torch.zeros_like(batch.t[:, :size]), batch.text, **past)
        first += size
    return torch.cat(chunks, 1)


def denoise(net, x, sigmas, text, **past):
    """From each clip's own noise level to clean, by Euler's steps."""
    def velocity(x, sigma):
        return net(x, 1000 * sigma.view(-1, 1).expand(x.shape[:2]), text, **past)
    return diffusion.euler(velocity, x, sigmas)


HISTORIES = {"df": noisy, "tf": clean, "rf": resampled, "full": noisy}


def draw_level(g: torch.Generator, shift: float) -> torch.Tensor:
    """A clip's noise level for resampling: logit-normal, shifted towards 0 by a shift below 1."""
    return diffusion.shifted(torch.randn((), generator=g).sigmoid(), shift)
