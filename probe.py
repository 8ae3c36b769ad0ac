"""Probes of a model for exposure bias (section 3.2 of the paper): its loss on videos it has generated against
its loss on real ones, and how soon it recovers from a spoilt context. eval_drift.py --model --data runs them.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import common
import data
import diffusion
import files
import flags
import metrics
import model
import records
import vae
from common import UserError
from metrics import mean, sem

VERSION = 3  # of the format and the definition of results on disk
LEVELS = (100, 300, 500, 700, 900)  # noise levels t
CONTEXT = 12  # latent frames of context
CHUNK = 3  # latent frames in a chunk
AHEAD = 9  # chunks to generate after the context
STATISTICS = ("mean", "std", "saturation", "detail")  # two of the latents, two of the video


class Settings(NamedTuple):
    data: str  # Folder of clips, such as agg_1
    wan: str | None  # Wan directory with the VAE; None: the one that encoded the clips
    held_out: int | None  # Seed clips that were held out from training; None: as recorded with the model
    clips: int  # Maximum number of held-out clips to use
    steps: int  # Solver steps per chunk
    guidance: float  # Guidance scale in recovery; own_minus_real uses none
    shift: float  # Shift of the solver's noise levels


# spoilt contexts: each takes and returns video [B,T,3,H,W] in -1..1

def saturate(video):
    grey = (video * torch.tensor([0.299, 0.587, 0.114], device=video.device).view(3, 1, 1)).sum(-3, True)
    return (grey + 2 * (video - grey)).clamp(-1, 1)


def blur(video):
    small = F.avg_pool2d(video.flatten(0, 1), 4)
    return F.interpolate(small, video.shape[-2:], mode="bilinear").view_as(video)


def add_grain(video):
    grain = torch.randn(video.shape, generator=common.rng("grain")).to(video.device)
    return (video + 0.2 * grain).clamp(-1, 1)


SPOILT = {"untouched": lambda video: video, "saturated": saturate, "blurred": blur, "noisy": add_grain}


def probe_once(path: str, settings: Settings, folder: Path, ranks) -> dict:
    """probe_model's results for the model at path, cached in folder."""
    store = data.Clips(settings.data)
    chosen = unseen_clips(path, settings, store)
    inputs = (VERSION, common.fingerprint(*model.find_weights(path)), common.fingerprint(store.index),
              store.meta(), settings.wan, chosen, settings.steps, settings.guidance, settings.shift)
    file = folder / f"probes-{common.seed_of(*inputs):x}.json"
    dist.barrier()
    if not file.exists():
        results = probe_model(path, settings, store, chosen, ranks)
        if ranks.rank == 0:
            files.write_text(file, json.dumps(results) + "\n")
    dist.barrier()
    return records.read(file)


def unseen_clips(path: str, settings: Settings, store: data.Clips) -> list[int]:
    """Indices of seed clips that the model was not trained on; clips it was trained on would flatter it."""
    trained_without = model.settings(path).get("held_out", flags.HELD_OUT)
    count = trained_without if settings.held_out is None else settings.held_out
    chosen = data.held_out(store, count)[:settings.clips]
    if not chosen:
        raise UserError(f"{settings.data}: the probes need seed clips that {path} was not trained on, and "
                        "none are held out; train with --held-out, or give --data of other videos and "
                        "--held-out")
    if store.meta()["latents"][0] < CONTEXT + CHUNK:
        raise UserError(f"{settings.data}: the probes need clips of at least {CONTEXT + CHUNK} latent frames")
    if window_of(path) < CONTEXT + CHUNK:
        raise UserError(f"{path} was trained on {window_of(path)} latent frames; the probes need at least "
                        f"{CONTEXT + CHUNK}")
    return chosen


def window_of(path: str) -> int:
    """Latent frames that the model was trained on, of which it sees so many at once."""
    return model.settings(path).get("window", 21)


def probe_model(path: str, settings: Settings, store: data.Clips, chosen: list[int], ranks) -> dict:
    """Both probes on the chosen clips, divided among all ranks; means and standard errors over clips."""
    coder = vae.load(store.wan(settings.wan), ranks.device)
    net = model.load(path, ranks.device)
    null = data.read_text_embedding(store.empty_prompt()).float().to(ranks.device)
    results = []
    with common.progress(len(chosen[ranks.rank::ranks.world]), "probes", ranks) as bar:
        for i in chosen[ranks.rank::ranks.world]:
            clip = store.load(i)
            x, text = (clip[k].float().to(ranks.device)[None] for k in ("latents", "text"))
            inputs = (net, x, text, null, clip["id"], settings, window_of(path))
            results.append((i, own_minus_real(*inputs), *recovery(coder, *inputs)))
            bar.update()
    _, gaps, real, continued = zip(*sorted(common.gathered(results, ranks)), strict=True)
    continued = np.array(continued)  # [clips, kinds, chunks, statistics]
    low, high = np.quantile(np.concatenate(real), (0.05, 0.95), axis=0)
    within = ((continued >= low) & (continued <= high)).all(-1)  # [clips, kinds, chunks]
    chunks = np.where(within.any(-1), within.argmax(-1) + 1, AHEAD + 1)
    gaps = zip(("first", "last"), np.array(gaps).transpose(1, 2, 0), strict=True)  # [levels, clips] each
    return {"clips": len(real), "levels": LEVELS,
            "own_minus_real": {chunk: {"mean": [*map(mean, rows)], "sem": [*map(sem, rows)]}
                               for chunk, rows in gaps},
            "range": dict(zip(STATISTICS, np.stack([low, high], 1).tolist(), strict=True)),
            "recovery": {kind: {"chunks": float(chunks[:, k].mean()), "sem": sem(chunks[:, k]),
                                "within": within[:, k].mean(0).tolist()} for k, kind in enumerate(SPOILT)}}


@torch.no_grad()
def own_minus_real(net, x, text, null, id: str, settings: Settings, window: int) -> list[list[float]]:
    """Loss on the model's continuation of x's first chunk minus loss on x itself, for the first and the last
    chunk after it, at each of LEVELS. Each video is conditioned on its own past: if generated videos have the
    distribution of real ones, the losses are equal. Guidance or a coarse solver would bias the videos."""
    x = x[:, :window // CHUNK * CHUNK]
    sampling = diffusion.Sampling(settings.steps, settings.shift, guidance=1.0, solver="unipc")
    chunks = diffusion.generate(net, [text[0]], null, sampling, shape=x.shape[2:], ids=[id],
                                context=x[:, :CHUNK], frames=x.shape[1], chunk=CHUNK, window=window)
    both = torch.cat([torch.cat([latents for _, latents in chunks], 1), x])
    noise = torch.randn(x.shape, generator=common.rng("gap", id)).to(x.device)
    gaps = []
    for end in (2 * CHUNK, x.shape[1]):
        videos = both[:, :end]
        t = torch.zeros(2, end, device=x.device)
        gap = []
        for level in LEVELS:
            t[:, -CHUNK:] = level
            v = net(diffusion.add_noise(videos, noise[:, :end], t), t, text.expand(2, -1, -1), chunk=CHUNK)
            error = (v - diffusion.velocity(videos, noise[:, :end]))[:, -CHUNK:]
            generated_loss, real_loss = error.square().mean((1, 2, 3, 4)).tolist()
            gap.append(generated_loss - real_loss)
        gaps.append(gap)
    return gaps


@torch.no_grad()
def recovery(coder, net, x, text, null, id: str, settings: Settings, window: int) -> tuple[list, list]:
    """STATISTICS of the chunks of the real clip, and of the chunks that follow its first 4 after each way of
    spoiling them."""
    video = coder.decode(x)
    context = video[:, :coder.frame_count(CONTEXT)]
    spoilt = torch.cat([coder.encode(spoil(context)) for spoil in SPOILT.values()])
    sampling = diffusion.Sampling(settings.steps, settings.shift, settings.guidance)
    film = diffusion.Film(coder, keep=CONTEXT)
    chunks = [statistics(latents, film.show(latents)) for _, latents in diffusion.generate(
        net, [text[0]] * len(SPOILT), null, sampling, shape=x.shape[2:], ids=[id] * len(SPOILT),
        context=spoilt, frames=CONTEXT + AHEAD * CHUNK, chunk=CHUNK, window=window, keep=CONTEXT,
        reenter=film.reenter)]
    ends = [coder.frame_count(f) for f in range(0, x.shape[1] + 1, CHUNK)]
    real = [statistics(z, video[:, a:b])[0]
            for z, a, b in zip(x.split(CHUNK, 1), ends[:-1], ends[1:], strict=True)]
    return real, np.stack(chunks[1:], 1).tolist()  # [kinds, chunks, statistics], without the context


def statistics(latents, video) -> list[list[float]]:
    """STATISTICS of each sample in a batch."""
    drift = diffusion.drift_statistics(latents)
    [scorer] = metrics.open_scorers(["saturation", "detail"], stride=1)[0]
    rows = []
    for i, frames in enumerate(data.to_uint8(video).cpu()):
        scorer.start(16)
        scorer.add(frames)
        curves = scorer.finish()
        rows.append([*(drift[name][i].item() for name in STATISTICS[:2]),
                     *(curves[name].total for name in STATISTICS[2:])])
    return rows
