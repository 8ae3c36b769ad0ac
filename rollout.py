"""Stage 2: model_k/ + agg_0/ -> rollout_k/, real first chunks, continued by the model, which drifts.

    python rollout.py --model model_0                       clips from agg_0 beside it, into rollout_0
    torchrun --nproc-per-node 8 rollout.py ...              the same on 8 GPUs

A rollout is a function of (seed, round, clip); the batch, the number of GPUs and --count change it by
rounding only. Clips held out from training are not rolled out. Killed and started again it continues, to the
same bytes.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from flags import HELD_OUT, Count, Device, Dtype, Positive, Solver, Whole, in_range, parse

CHUNK = 3  # latent frames; a rollout begins with 9 real frames of video


@dataclass
class Config:
    model: str  # Folder of the model (model_k)
    lora: tuple[str, ...] = ()  # LoRA files to merge into the model: FILE, or FILE:STRENGTH
    # Folder of clips (any agg_k), of which only seed clips are rolled out (default: agg_0 beside model_k)
    data: str | None = None
    out: str | None = None  # Folder for the rollouts (default: rollout_k beside model_k)
    count: Count | None = None  # Number of rollouts (default: half the number of seed clips)
    # Round k, each of which draws other clips and other noise (default: the number at the end of the model's
    # name, or 0)
    round: Whole | None = None
    # Seed clips kept out of training and rollouts (default: as many as the model was trained without)
    held_out: Whole | None = None
    # Wan directory with the VAE (default: named in the model's config.json, or the one that made the clips)
    wan: str | None = None
    seed: int = 0  # Seed of the noise and of the clips drawn in each round
    batch: Count = 1  # Videos generated at once; changes them by rounding only
    steps: Count = 20  # Solver steps per chunk
    guidance: float = 6.0  # Guidance scale towards the prompt; 1 is no guidance, and twice as fast
    shift: Positive = 8.0  # Shift of the noise levels towards pure noise, as in training
    solver: Solver = "euler"  # ODE solver
    # Past chunks that each token attends to, those that suit it best; 0: all (default: as the model was
    # trained)
    route: Whole | None = None
    previews: Whole = 16  # Rollouts to show in preview.png; 0: no preview
    compile: bool | None = None  # Compile the transformer blocks (default: on a GPU)
    # Number format of the networks (default: bfloat16 on a GPU, else float32)
    dtype: Dtype | None = None
    device: Device | None = None  # cuda or cpu (default: cuda if available)

    __post_init__ = in_range


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    cfg = parse(Config, __doc__)

import torch
import torch.distributed as dist

import common
import data
import diffusion
import locate
import lora
import model
import vae
from common import UserError, print0


def main(cfg: Config):
    ranks = common.start_ranks(cfg.device)
    cfg = complete(cfg, ranks)
    clips = data.Clips(cfg.data)
    wan = check(cfg, clips)
    picks = pick(cfg, clips)
    entries = [as_rollout(clips[i], cfg.round) for i in picks]
    store = data.Writer(cfg.out, ranks, describe(cfg, clips, len(picks)), entries)
    todo = store.share(cfg.batch)
    print0(f"{len(picks)} of {clips.kinds.count('seed')} seed clips; {sum(map(len, todo))} to roll out"
           + common.share_of(ranks))
    with store.keeping():
        if todo:
            index = {entry["id"]: i for entry, i in zip(entries, picks, strict=True)}
            make(cfg, clips, index, todo, store, ranks)
        store.finish()
    rollouts = data.Clips(cfg.out)
    report_drift(rollouts, ranks)
    if ranks.rank == 0 and cfg.previews:
        preview(cfg, rollouts, vae.load(wan, ranks.device, getattr(torch, cfg.dtype)))
    shown = f", shown in {rollouts.folder / 'preview.png'}" if cfg.previews else ""
    print0(f"{len(picks)} rollouts in {rollouts.folder}{shown}")


# ----------------------------------------------------------------------------------------------------
# the method: which clips are rolled out, and how

def pick(cfg: Config, clips: data.Clips) -> list[int]:
    """Algorithm 1 samples M videos x^1 and prompts c in each round. Here these are seed clips, each at most
    once: the first M of a permutation drawn for the round, without those held out from training."""
    seeds = [i for i, kind in enumerate(clips.kinds) if kind == "seed"]
    held_out = set(data.held_out(clips, cfg.held_out))
    available = len(seeds) - len(held_out)
    count = max(1, min(len(seeds) // 2, available)) if cfg.count is None else cfg.count
    if not 1 <= count <= available:
        raise UserError(f"--count {count}: {cfg.data} has {len(seeds)} seed clips, {len(held_out)} of them "
                        "held out (--held-out); a round rolls out at least 1, and each at most once")
    order = torch.randperm(len(seeds), generator=common.rng(cfg.seed, "rollout", cfg.round))
    return [seeds[i] for i in order if seeds[i] not in held_out][:count]


def roll_out(cfg: Config, net: model.WanModel, clips: list[dict], null: torch.Tensor) -> torch.Tensor:
    """Eq. 3 and Algorithm 1: (x^1, x^2:N) ~ product over i of p(x^i | x^<i, c), with real chunks x^1 of the
    clips and N - 1 chunks by the model, [B,F,C,H,W]. Its context is its own output, which lets it drift."""
    real = torch.stack([clip["latents"] for clip in clips])
    frames, *shape = real.shape[1:]
    sampling = diffusion.Sampling(cfg.steps, cfg.shift, cfg.guidance, cfg.solver)
    chunks = diffusion.generate(
        net, [clip["text"] for clip in clips], null, sampling, shape=shape, frames=frames,
        context=real[:, :CHUNK], seed=cfg.seed, ids=[(cfg.round, clip["id"]) for clip in clips], chunk=CHUNK,
        window=frames, keep=CHUNK)  # one window for the whole clip, as in training
    return torch.cat([latents for _, latents in chunks], 1)


# ----------------------------------------------------------------------------------------------------
# flags, checks and files

def complete(cfg: Config, ranks) -> Config:
    """Fills in the defaults that depend on the model and the device."""
    round = common.round_of(cfg.model) or 0
    net = locate.local(cfg.model, "transformer")
    if not Path(net).exists():
        raise UserError(f"--model {cfg.model} does not exist; train_df.py makes one")
    model.find_weights(net)  # refuses a folder without a model, before other names are made of its name
    held_out = model.settings(net).get("held_out", HELD_OUT)
    return replace(common.for_device(cfg, ranks.device),
                   model=net,
                   data=cfg.data or str(Path(cfg.model).parent / "agg_0"),
                   out=cfg.out or common.neighbour(cfg.model, "rollout", "out"),
                   round=round if cfg.round is None else cfg.round,
                   held_out=held_out if cfg.held_out is None else cfg.held_out)


def check(cfg: Config, clips: data.Clips) -> str:
    """Refuses flags, a model and clips that do not fit together. Returns the Wan directory."""
    limits = model.read_checkpoint(cfg.model, cfg.lora)[1]
    if model.trained_causally(cfg.model) is False:
        print0(f"warning: {cfg.model} was never trained to make videos chunk by chunk, as rollouts are made")
    frames, channels = clips.meta()["latents"][:2]
    if frames % CHUNK or frames < 2 * CHUNK:
        raise UserError(f"{cfg.data} has clips of {frames} latent frames; rollouts need multiples of "
                        f"{CHUNK}, at least {2 * CHUNK}: prepare.py --frames 81 makes 21")
    trained = model.settings(cfg.model)
    if frames > trained.get("window", frames):
        raise UserError(f"{cfg.data} has clips of {frames} latent frames; {cfg.model} was trained on clips "
                        f"of {trained['window']}, which is the longest that it rolls out")
    width = data.read_text_embedding(clips.empty_prompt()).shape[1]
    if (channels, width) != (limits.in_dim, limits.text_dim):
        raise UserError(f"{cfg.data} has latents of {channels} channels and text of width {width}; "
                        f"{cfg.model} takes {limits.in_dim} and {limits.text_dim}")
    return clips.wan(cfg.wan or trained.get("wan"))


def as_rollout(clip: dict, round: int) -> dict:
    return data.index_entry(f"{clip['id']}-round{round}", clip["prompt"], "rollout", round, clip["id"])


def describe(cfg, clips, count) -> dict:
    """How all rollouts of the store are made."""
    meta = clips.meta()
    merged = {"lora": lora.fingerprint(cfg.lora)} if cfg.lora else {}
    return {key: meta[key] for key in data.SHARED} | merged | {
        "wan": meta["wan"],
        "data": str(clips.folder.resolve()), "data_fingerprint": common.fingerprint(clips.index),
        "model": str(Path(cfg.model).resolve()),
        "model_fingerprint": common.fingerprint(*model.find_weights(cfg.model)),
        "seed": cfg.seed, "round": cfg.round, "count": count, "held_out": cfg.held_out,
        "steps": cfg.steps, "guidance": cfg.guidance, "shift": cfg.shift, "solver": cfg.solver,
        "route": cfg.route, "dtype": cfg.dtype}


def make(cfg, clips, index, todo, store, ranks):
    """Rolls out the batches of ids in todo. index: where each clip to continue is among clips."""
    net = model.load(cfg.model, ranks.device, getattr(torch, cfg.dtype), loras=cfg.lora)
    if cfg.route is not None:
        net.route = cfg.route or None
    if cfg.compile:
        net.compile_blocks()
    null = data.read_text_embedding(clips.empty_prompt())
    count = sum(map(len, todo))
    start = time.monotonic()
    with common.progress(count, "rollouts", ranks) as bar:
        for ids in todo:
            batch = [clips.load(index[id]) for id in ids]
            for clip in batch:
                if len(clip["text"]) > net.config.text_len:
                    raise UserError(f"the prompt of clip {clip['id']} is {len(clip['text'])} tokens; "
                                    f"{cfg.model} takes {net.config.text_len} at most")
            for id, clip, latents in zip(ids, batch, roll_out(cfg, net, batch, null), strict=True):
                store.write(id, latents, clip["text"])
            bar.update(len(ids))
    print0(f"{count / (time.monotonic() - start):.3g} rollouts/s" + common.share_of(ranks))


# ----------------------------------------------------------------------------------------------------
# report: statistics of drift and a preview

def report_drift(rollouts: data.Clips, ranks):
    """Prints how latents change from chunk to chunk, on average over all rollouts of the store."""
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
    """Writes preview.png, with a row of 8 frames for each of the first rollouts."""
    rows = []
    for j in range(min(cfg.previews, len(rollouts))):
        video = coder.decode(rollouts.load(j)["latents"][None])[0]
        rows.append(video[torch.linspace(0, len(video) - 1, 8).round().long()])
    data.film_strip(rollouts.folder / "preview.png", rows, height=128)


if __name__ == "__main__":
    common.run(main, cfg)
