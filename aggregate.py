"""Stage 3: agg_k/ + rollout_k/ -> agg_{k+1}/, the clips so far and the reversed rollouts.

    python aggregate.py --rollouts rollout_0                with agg_0 beside it, into agg_1
    torchrun --nproc-per-node 8 aggregate.py ...            the same on 8 GPUs

A rollout drifts away from real video. Reversed, it is a corrective clip, which leads from drifted to real
video, and its prompt says that it is reversed. The clips so far are not copied: agg_{k+1} refers to their
files. Killed and started again it continues.
"""

import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from flags import Count, Device, Dtype, in_range, parse

CHUNK = 3  # latent frames; the first chunk of a rollout is real
TEMPLATE = "A reversed video of {}"
# captions that speak of "the video" themselves: the template would repeat the word
SELF_DESCRIBED = re.compile(
    r"((?:in )?(?:the|this|a) )(?=video(?:,| (?:of|in which|showing|is|has|shows|captures|features|depicts"
    r"|presents|showcases|displays|portrays|highlights|begins|starts|opens|focuses|follows)\b))", re.I)


@dataclass
class Config:
    rollouts: str  # Folder of rollouts (rollout_k), to become corrective clips of round k + 1
    data: str | None = None  # Folder of the clips so far (default: agg_k beside rollout_k)
    # Folder for the clips of round k + 1, beside --data, whose clips it refers to (default: agg_{k+1} beside
    # rollout_k)
    out: str | None = None
    # Wan directory with the VAE, text encoder and tokenizer (default: the one that made the clips)
    wan: str | None = None
    # Prompt of a reversed clip; {} stands for the old prompt, with a lower-case first letter. By default,
    # prompts such as "The video shows ..." become "The reversed video shows ..." instead
    template: str = TEMPLATE
    rewrite: bool = True  # Rewrite the prompts; --no-rewrite keeps them, as an ablation
    # What is reversed: pixels or, as an ablation, latents, each of which keeps its 4 frames in order
    flip: Literal["pixels", "latents"] = "pixels"
    # As an ablation, the --videos of prepare.py: a rollout's real frames are read from there, not decoded
    paste_real: str | None = None
    batch: Count = 1  # Videos that the VAE takes at once; changes clips by rounding only
    # Number format of the networks (default: bfloat16 on a GPU, else float32)
    dtype: Dtype | None = None
    device: Device | None = None  # cuda or cpu (default: cuda if available)

    __post_init__ = in_range


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    cfg = parse(Config, __doc__)

import torch

import common
import data
import files
import sources
import t5
import vae
from common import UserError, print0


def main(cfg: Config):
    ranks = common.start_ranks(cfg.device)
    cfg = replace(common.for_device(cfg, ranks.device),
                  data=cfg.data or common.neighbour(cfg.rollouts, "agg", "data"),
                  out=cfg.out or common.neighbour(cfg.rollouts, "agg", "out", later=1))
    clips = data.Clips(cfg.data)
    rollouts = data.Clips(cfg.rollouts)
    check(cfg, clips, rollouts)
    cfg = replace(cfg, wan=clips.wan(cfg.wan, ("vae", "t5")))
    entries = [entry(cfg, rollout) for rollout in rollouts]
    check_entries(cfg, clips, entries, rollouts)
    store = data.Writer(cfg.out, ranks, describe(cfg, clips, rollouts), entries)
    todo = store.share(cfg.batch)
    print0(f"{len(entries)} rollouts; {sum(map(len, todo))} to reverse" + common.share_of(ranks))
    with store.keeping():
        reverse_rollouts(cfg, clips, rollouts, todo, store, ranks)
        finish(clips, store, ranks)
    counts = Counter(clips.kinds) + Counter(corrective=len(entries))
    print0(f"{counts.total()} clips in {store.folder}: "
           + ", ".join(f"{count} {kind}" for kind, count in counts.items()))


# ----------------------------------------------------------------------------------------------------
# the method: reversed rollouts and their prompts

def reverse(latents: torch.Tensor, coder: vae.WanVAE, flip="pixels", real=None) -> torch.Tensor:
    """The reversal of section 3.2 and Algorithm 1: a rollout (x^1, x^2:N) becomes the corrective video
    (x^N:2, x^1). Its latents [B,F,C,H,W] are decoded, reversed in time as pixels, and encoded.

    The VAE is causal: latent 0 holds frame 0 alone, latent n frames 4n - 3..4n. Of 81 frames, 0-8 are real:

        forward     0-8     9-20    21-32   33-44   45-56   57-68   69-80    chunks 0..6
        backward    80-72   71-60   59-48   47-36   35-24   23-12   11-0     4 of clean prefix, 3 with loss

    Backwards, latent 18 holds frames 11, 10, 9 and 8, and only 19 and 20 are all real. No latent of one is
    a latent of the other, so reversing latents is not the same. Pixels are not rounded in between.
    real [B,T,3,H,W] replaces the first frames that the VAE decodes.
    """
    if flip == "latents":
        return latents.flip(1)
    video = coder.decode(latents)  # [B,T,3,H,W]
    if real is not None:
        video[:, :real.shape[1]] = real
    return coder.encode(video.flip(1))


def rewritten(prompt: str, template: str) -> str:
    """ModifyPrompt of Algorithm 1. Of first words, "The" is put in lower case, but not "NASA" or "I"."""
    if template == TEMPLATE and SELF_DESCRIBED.match(prompt):
        return SELF_DESCRIBED.sub(r"\1reversed ", prompt, count=1)
    if prompt.startswith("A ") or prompt[1:2].islower():
        prompt = prompt[0].lower() + prompt[1:]
    return template.replace("{}", prompt)


def entry(cfg: Config, rollout: dict) -> dict:
    """The index entry of an element of D_k in Algorithm 1: a corrective clip and its prompt c'. Its round is
    k + 1, the first whose model is trained on it."""
    assert rollout["kind"] == "rollout", f"{rollout['id']} is reversed already"
    id = f"{rollout['id']}-reversed"
    prompt = rewritten(rollout["prompt"], cfg.template) if cfg.rewrite else rollout["prompt"]
    return data.index_entry(id, prompt, "corrective", rollout["round"] + 1, rollout["id"])


def finish(clips, store, ranks):
    """D_agg <- D_agg + D_k, the end of a round in Algorithm 1: an index of the clips so far, which stay where
    they are, and of the new ones."""
    if ranks.rank == 0:
        with files.replacing(store.folder / "empty.safetensors") as temporary:
            shutil.copyfile(clips.empty_prompt(), temporary)
    here = store.folder.resolve()
    store.finish(clip | {"file": os.path.relpath(clips.locate(clip), here)} for clip in clips)


# ----------------------------------------------------------------------------------------------------
# checks and files

def check(cfg: Config, clips: data.Clips, rollouts: data.Clips):
    """Refuses flags and folders that do not fit together."""
    out = Path(cfg.out).resolve()
    for flag, store in (("--data", clips), ("--rollouts", rollouts)):
        if out == store.folder.resolve():
            raise UserError(f"--out {cfg.out} is {flag} too; the new clips need a folder of their own")
    if not clips.root.is_relative_to(out.parent):
        raise UserError(f"--out {cfg.out} cannot refer to the clips of {cfg.data}, which are not beside it; "
                        f"choose a folder in {clips.root}")
    if "{}" not in cfg.template:
        raise UserError(f"--template {cfg.template!r} has no {{}}, which stands for the old prompt")
    if cfg.paste_real and cfg.flip == "latents":
        raise UserError("--paste-real and --flip latents are both given; without pixels there is nowhere to "
                        "paste")
    clips.empty_prompt()
    if other := set(rollouts.kinds) - {"rollout"}:
        raise UserError(f"{cfg.rollouts} holds {other.pop()} clips; give --rollouts what rollout.py makes")
    for key in data.SHARED:
        if rollouts.meta()[key] != clips.meta()[key]:
            raise UserError(f"{cfg.rollouts} was made with {key} = {rollouts.meta()[key]}, {cfg.data} with "
                            f"{clips.meta()[key]}; aggregate rollouts of the same data")


def check_entries(cfg, clips, entries, rollouts):
    """Refuses rollouts that are part of the clips already, or continue other clips."""
    kinds = {clip["id"]: clip["kind"] for clip in clips}
    for rollout, new in zip(rollouts, entries, strict=True):
        if new["id"] in kinds:
            raise UserError(f"{cfg.data} has a clip {new['id']} already: {cfg.rollouts} is part of it, or "
                            "was made with the --round of another that is")
        if kinds.get(rollout["source"]) != "seed":
            raise UserError(f"{cfg.rollouts} continues clip {rollout['source']}, which is no seed clip of "
                            f"{cfg.data}; aggregate rollouts of the same data")


def describe(cfg, clips, rollouts) -> dict:
    """How all new clips are made."""
    meta = clips.meta()
    return {key: meta[key] for key in (*data.SHARED, "seed")} | {
        "wan": str(Path(cfg.wan).resolve()),
        "data": str(clips.folder.resolve()), "data_fingerprint": common.fingerprint(clips.index),
        "rollouts": str(rollouts.folder.resolve()),
        "rollouts_fingerprint": common.fingerprint(rollouts.index), "round": rollouts.meta()["round"] + 1,
        "template": cfg.template, "rewrite": cfg.rewrite, "flip": cfg.flip,
        "paste_real": cfg.paste_real and str(Path(cfg.paste_real).resolve()), "dtype": cfg.dtype}


def reverse_rollouts(cfg, clips, rollouts, todo, store, ranks):
    """Writes the corrective clips whose ids are in todo, batch by batch."""
    dtype = getattr(torch, cfg.dtype)
    if cfg.rewrite:
        store.stage_texts(lambda: t5.load(cfg.wan, ranks.device, dtype), "prompts")
    coder = vae.load(cfg.wan, ranks.device, dtype)
    listed = sources.find_clips(cfg.paste_real) if cfg.paste_real else []
    videos = {source.id: source.path for source in listed}
    places = {id: j for j, id in enumerate(store.entries)}
    with common.progress(sum(map(len, todo)), "clips", ranks) as bar:
        for ids in todo:
            batch = [rollouts.load(places[id]) for id in ids]
            real = None
            if cfg.paste_real:
                real = torch.cat([read_real(cfg, videos, rollout["source"], clips.meta(), coder)
                                  for rollout in batch])
            latents = reverse(torch.stack([rollout["latents"] for rollout in batch]), coder, cfg.flip, real)
            for id, rollout, z in zip(ids, batch, latents, strict=True):
                store.write(id, z, store.staged_text(id) if cfg.rewrite else rollout["text"])
                bar.update()


def read_real(cfg, videos, id, meta, coder) -> torch.Tensor:
    """The pixels of a seed clip's first chunk, [1,T,3,H,W]."""
    if id not in videos:
        raise UserError(f"--paste-real {cfg.paste_real} has no video of clip {id}; give what prepare.py was "
                        "given as --videos")
    geometry = data.Geometry(*(meta[name] for name in data.Geometry._fields))
    pixels = data.read_seed_clip(videos[id], id, geometry, meta["seed"], coder.frame_count(CHUNK))
    return data.to_float(pixels[None])


if __name__ == "__main__":
    common.run(main, cfg)
