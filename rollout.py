"""Stage 2: model_k/ + agg_k/ -> rollout_k/, real first chunks continued by the model itself, drift and all.

    python rollout.py --model model_0                       with agg_0 beside it, into rollout_0
    torchrun --nproc-per-node 8 rollout.py ...              the same on 8 GPUs

Killed and started again it continues, to the same bytes. A rollout is a function of (seed, round, clip); the
batch, the number of GPUs and --count change it by rounding alone. Clips that training held out stay out.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

import common
import data
import diffusion
import model
import vae
from common import UserError, print0

CHUNK = 3  # latent frames: 9 real frames begin a rollout
GEOMETRY = ("latents", "width", "height", "frames", "fps", "wan", "vae", "t5")  # of --data's meta.json


@dataclass
class Config:
    model: str  # model_k
    # agg_k; only its seed clips, those of agg_0, are rolled out (default: agg_0 beside model_k)
    data: str | None = None
    out: str | None = None  # where the rollouts go (default: rollout_k beside model_k)
    count: int | None = None  # seed clips to roll out (default: half of them)
    # k; every round draws other clips and other noise (default: that of model_k's name, else 0)
    round: int | None = None
    # seed clips kept from rollouts as from training (default: as many as model_k was trained without)
    held_out: int | None = None
    # Wan directory, for its VAE (default: what the model's config.json says, else where --data's came from)
    wan: str | None = None
    seed: int = 0  # picks are a function of (seed, round), noise of (seed, round, clip, chunk)
    batch: int = 1  # rollouts made at once, which changes them by rounding alone
    steps: int = 20  # of the solver, for each chunk
    guidance: float = 6.0  # towards the prompt; 1 is none, and twice as fast
    shift: float = 8.0  # of the noise levels, as in training
    solver: Literal[*diffusion.SOLVERS] = "euler"  # of the flow
    previews: int = 16  # rollouts to show in preview.png
    compile: bool | None = None  # the transformer's blocks (default: on a GPU)
    # of the networks (default: bfloat16 on a GPU, float32 on a CPU)
    dtype: Literal["float32", "bfloat16"] | None = None
    device: str | None = None  # cuda or cpu (default: a GPU if there is one)


def main(cfg: Config):
    ranks = common.start_ranks(cfg.device)
    cfg = complete(cfg, ranks)
    clips, out = data.Clips(cfg.data), Path(cfg.out)
    wan, null = check(cfg, clips)
    picks = pick(cfg, clips)
    entries = {entry["id"]: entry for entry in (as_rollout(clips[i], cfg.round) for i in picks)}
    places = dict(zip(entries, picks, strict=True))
    store = data.Writer(out, ranks, describe(cfg, clips, len(picks)))
    todo = store.share(list(entries), cfg.batch)
    print0(f"{len(picks)} of {clips.kinds.count('seed')} seed clips; {sum(map(len, todo))} to roll out"
           + f" on this rank, the first of {ranks.world}" * (ranks.world > 1))
    with store.keeping():
        make(cfg, clips, places, todo, null, store, ranks)
        store.finish(entries.values())
    report_drift(data.Clips(out), ranks)
    if ranks.rank == 0 and cfg.previews:
        preview(cfg, data.Clips(out), vae.load(wan, ranks.device, getattr(torch, cfg.dtype)))
    print0(f"{len(picks)} rollouts in {out}" + f", shown in {out / 'preview.png'}" * (cfg.previews > 0))


# ----------------------------------------------------------------------------------------------------
# the method: which clips, and what becomes of them

def pick(cfg: Config, clips: data.Clips) -> list[int]:
    """M seed clips without replacement: the first M of a permutation drawn anew every round that were not
    held out from training."""
    seeds = [i for i, kind in enumerate(clips.kinds) if kind == "seed"]
    held_out = set(data.held_out(clips, cfg.held_out))
    there = len(seeds) - len(held_out)
    count = max(1, min(len(seeds) // 2, there)) if cfg.count is None else cfg.count
    if not 1 <= count <= there:
        raise UserError(f"--count {count}: {cfg.data} has {len(seeds)} seed clips, {len(held_out)} of them "
                        "held out (--held-out); a round rolls out 1 at least, and each at most once")
    order = torch.randperm(len(seeds), generator=common.rng(cfg.seed, "rollout", cfg.round))
    return [seeds[i] for i in order if seeds[i] not in held_out][:count]


def roll_out(cfg: Config, net: model.WanModel, clips: list[dict], null: torch.Tensor) -> torch.Tensor:
    """Loaded clips -> [B,F,C,H,W]: their real first chunks, and F - 3 frames that the model makes of them.
    The model's own frames are its context as they are; that is what lets it drift."""
    real = torch.stack([clip["latents"] for clip in clips])
    frames, *shape = real.shape[1:]
    sampling = diffusion.Sampling(cfg.steps, cfg.shift, cfg.guidance, cfg.solver)
    chunks = diffusion.generate(
        net, [clip["text"] for clip in clips], null, sampling, shape=shape, frames=frames,
        context=real[:, :CHUNK], seed=cfg.seed, ids=[(cfg.round, clip["id"]) for clip in clips], chunk=CHUNK,
        window=frames, keep=CHUNK)  # all in one window, as in training
    return torch.cat([latents for _, latents in chunks], 1)


# ----------------------------------------------------------------------------------------------------
# around it

def complete(cfg: Config, ranks) -> Config:
    """Fills in what follows from the model and the device."""
    config = model.settings(cfg.model)
    found = {"data": str(Path(cfg.model).parent / "agg_0"), "round": common.round_of(cfg.model) or 0,
             "held_out": config.get("held_out", data.HELD_OUT), "compile": ranks.device.type == "cuda",
             "dtype": "bfloat16" if ranks.device.type == "cuda" else "float32"}
    out = cfg.out or common.neighbour(cfg.model, "rollout", "out")
    return replace(cfg, out=out, **{k: v for k, v in found.items() if getattr(cfg, k) is None})


def check(cfg: Config, clips: data.Clips) -> tuple[Path, torch.Tensor]:
    """Does all fit together? Then the Wan directory and the empty prompt's embedding."""
    if min(cfg.batch, cfg.steps) < 1 or cfg.previews < 0:
        raise UserError(f"--batch {cfg.batch} --steps {cfg.steps} --previews {cfg.previews}: batch and steps "
                        "are 1 at least, previews 0")
    if not Path(cfg.model).exists():
        raise UserError(f"--model {cfg.model} does not exist; train_df.py makes one")
    meta, limits = clips.meta(), model.read_checkpoint(cfg.model)[1]
    frames, channels = meta["latents"][:2]
    if frames % CHUNK or frames < 2 * CHUNK:
        raise UserError(f"{cfg.data} has clips of {frames} latent frames; rollouts need multiples of "
                        f"{CHUNK}, {2 * CHUNK} at least: prepare.py --frames 81 makes 21")
    empty = clips.folder / "empty.safetensors"
    if not empty.exists():
        raise UserError(f"{empty} is missing, the empty prompt that guidance leads away from; run prepare.py "
                        "again, or copy it from agg_0")
    null = data.read_text_embedding(empty)
    if (channels, null.shape[1]) != (limits.in_dim, limits.text_dim):
        raise UserError(f"{cfg.data} has latents of {channels} channels and text of width {null.shape[1]}; "
                        f"{cfg.model} takes {limits.in_dim} and {limits.text_dim}")
    wan = Path(cfg.wan or model.settings(cfg.model).get("wan") or meta["wan"])
    if common.fingerprint(*vae.find(wan)[0]) != meta["vae"]:
        raise UserError(f"{wan} has another VAE than the one that made {cfg.data}; give --wan {meta['wan']}")
    return wan, null


def as_rollout(clip: dict, round: int) -> dict:
    return data.index_entry(f"{clip['id']}-round{round}", clip["prompt"], "rollout", round, clip["id"])


def describe(cfg, clips, count) -> dict:
    """How all rollouts of the store are made."""
    before = clips.meta()
    return {key: before[key] for key in GEOMETRY} | {
        "data": str(clips.folder.resolve()), "data_fingerprint": common.fingerprint(clips.index),
        "model": str(Path(cfg.model).resolve()),
        "model_fingerprint": common.fingerprint(*model.find_weights(cfg.model)),
        "seed": cfg.seed, "round": cfg.round, "count": count, "held_out": cfg.held_out,
        "steps": cfg.steps, "guidance": cfg.guidance, "shift": cfg.shift, "solver": cfg.solver,
        "dtype": cfg.dtype}


def make(cfg, clips, places, todo, null, store, ranks):
    if not todo:
        return
    net, began = model.load(cfg.model, ranks.device, getattr(torch, cfg.dtype)), time.monotonic()
    if cfg.compile:
        net.compile_blocks()
    count = sum(map(len, todo))
    with common.progress(count, "rollouts", ranks) as bar:
        for batch in todo:
            real = [load(cfg, clips, places[id], net.config.text_len) for id in batch]
            for id, clip, latents in zip(batch, real, roll_out(cfg, net, real, null), strict=True):
                if not latents.to(data.LATENT_DTYPE).isfinite().all():
                    raise UserError(f"the rollout of clip {clip['id']} is not finite: {cfg.model} is broken")
                store.write(id, latents, clip["text"], clip["prompt"], clip["id"])
            bar.update(len(batch))
    rate = count / (time.monotonic() - began)
    print0(f"{rate:.3g} rollouts/s" + f" on this rank, of {ranks.world}" * (ranks.world > 1))


def load(cfg, clips, i: int, text_len: int) -> dict:
    clip = clips.load(i)
    if len(clip["text"]) > text_len:
        raise UserError(f"the prompt of clip {clip['id']} is {len(clip['text'])} tokens; {cfg.model} takes "
                        f"{text_len} at most")
    return clip


# ----------------------------------------------------------------------------------------------------
# what a person wants to see of it

def report_drift(rollouts: data.Clips, ranks):
    """How latents change from chunk to chunk, averaged over all rollouts, whenever they were made."""
    total = torch.zeros(rollouts.meta()["latents"][0] // CHUNK, 3, dtype=torch.float64)
    for j in range(ranks.rank, len(rollouts), ranks.world):
        chunks = rollouts.load(j)["latents"].unflatten(0, (-1, CHUNK))  # [chunks, 3, C, H, W]
        stats = diffusion.drift_statistics(chunks)
        total += torch.stack([stats["mean"], stats["std"], stats["outside"]], 1)
    dist.all_reduce(total)
    print0("chunk    mean    std  outside +-3   (latents; chunk 0 is real)")
    for chunk, (mean, std, outside) in enumerate((total / len(rollouts)).tolist()):
        print0(f"{chunk:5} {mean:+7.3f} {std:6.3f} {outside:11.2%}")


def preview(cfg, rollouts: data.Clips, coder):
    """A row of 8 frames for each of the first rollouts."""
    rows = []
    for j in range(min(cfg.previews, len(rollouts))):
        video = coder.decode(rollouts.load(j)["latents"][None])[0]
        rows.append(video[torch.linspace(0, len(video) - 1, 8).round().long()])
    data.film_strip(rollouts.folder / "preview.png", rows, height=128)


if __name__ == "__main__":
    common.run(main, Config, __doc__)
