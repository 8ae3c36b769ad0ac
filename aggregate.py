"""Stage 3: agg_k/ + rollout_k/ -> agg_{k+1}/, the clips so far and the rollouts played backwards.

    python aggregate.py --rollouts rollout_0                with agg_0 beside it, into agg_1
    torchrun --nproc-per-node 8 aggregate.py ...            the same on 8 GPUs

A rollout drifts from real to wrong. Backwards it is a video that comes right, and its prompt says that it is
reversed. The clips so far are referred to where they are, not copied. Killed and started again it continues.
"""

import itertools
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import common
import data
import t5
import vae
from common import UserError, print0

CHUNK = 3  # latent frames; a rollout's first chunk is real
GEOMETRY = ("latents", "width", "height", "frames", "fps", "vae", "t5")  # all clips of a store share these
TEMPLATE = "A reversed video of {}"
# captions that speak of the video: behind the template the word would stand twice
SELF_DESCRIBED = re.compile(
    r"((?:in )?(?:the|this|a) )(?=video(?:,| (?:of|in which|showing|is|has|shows|captures|features|depicts"
    r"|presents|showcases|displays|portrays|highlights|begins|starts|opens|focuses|follows)\b))", re.I)


@dataclass
class Config:
    rollouts: str  # rollout_k, which becomes corrective clips of round k + 1
    data: str | None = None  # the clips so far (default: agg_k beside rollout_k)
    # where the clips of round k + 1 go; beside --data, for it refers to those clips by relative path
    # (default: agg_{k+1} there)
    out: str | None = None
    wan: str | None = None  # Wan directory: its VAE, text encoder and tokenizer (default: that of --data)
    # the new prompt, where {} is the old one with its first letter in lower case; by default a caption that
    # speaks of "the video" itself then speaks of "the reversed video"
    template: str = TEMPLATE
    rewrite: bool = True  # the prompt; an ablation keeps it as it is
    # what is played backwards; latents, an ablation, is wrong: each holds 4 frames, which stay in their order
    flip: Literal["pixels", "latents"] = "pixels"
    # an ablation: the --videos of prepare.py, whose own pixels replace what the VAE shows of a rollout's real
    # frames
    paste_real: str | None = None
    # of the networks (default: bfloat16 on a GPU, float32 on a CPU)
    dtype: Literal["float32", "bfloat16"] | None = None
    device: str | None = None  # cuda or cpu (default: a GPU if there is one)


def main(cfg: Config):
    ranks = common.start_ranks(cfg.device)
    cfg = replace(cfg, data=cfg.data or common.neighbour(cfg.rollouts, "agg", "data"),
                  out=cfg.out or common.neighbour(cfg.rollouts, "agg", "out", later=1))
    clips, rollouts, out = data.Clips(cfg.data), data.Clips(cfg.rollouts), Path(cfg.out)
    cfg = replace(cfg, wan=cfg.wan or clips.meta()["wan"],
                  dtype=cfg.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32"))
    check(cfg, clips, rollouts)
    entries = [entry(cfg, rollout) for rollout in rollouts]
    check_new(cfg, clips, rollouts, entries)
    store, dtype = data.Writer(out, ranks, describe(cfg, clips, rollouts)), getattr(torch, cfg.dtype)
    todo = [j for j in range(ranks.rank, len(entries), ranks.world) if not store.has(entries[j]["id"])]
    print0(f"{len(entries)} rollouts; {len(todo)} to reverse"
           + f" on this rank, the first of {ranks.world}" * (ranks.world > 1))
    with store.keeping():
        if cfg.rewrite:
            prompts = {new["id"]: new["prompt"] for new in entries}
            store.stage_texts(prompts, lambda: t5.load(cfg.wan, ranks.device, dtype), "prompts")
        coder = vae.load(cfg.wan, ranks.device, dtype)
        reverse_rollouts(cfg, clips, rollouts, entries, todo, store, coder, ranks)
        finish(clips, entries, store, ranks)
    counts = Counter(clips.kinds) + Counter(corrective=len(entries))
    print0(f"{counts.total()} clips in {out}: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))


# ----------------------------------------------------------------------------------------------------
# the method: what is drifted -> real, and its prompt

def reverse(latents: torch.Tensor, coder: vae.WanVAE, flip="pixels", real=None) -> torch.Tensor:
    """A rollout [B,F,C,H,W] played backwards: decoded, turned round in time, encoded.

    The VAE is causal: latent 0 holds frame 0 alone, latent n frames 4n - 3..4n. Of 81 frames, 0-8 are real:

        forward     0-8     9-20    21-32   33-44   45-56   57-68   69-80    chunks 0..6
        backward    80-72   71-60   59-48   47-36   35-24   23-12   11-0     4 of clean prefix, 3 with loss

    Backwards, latent 18 holds frames 11, 10, 9 and 8, and only 19 and 20 are all real. No latent of one is
    a latent of the other: flipping latents is something else. Pixels stay unrounded floats in between.
    real [B,T,3,H,W] takes the place of the first frames decoded.
    """
    if flip == "latents":
        return latents.flip(1)
    video = coder.decode(latents)  # [B,T,3,H,W]
    if real is not None:
        video[:, :real.shape[1]] = real
    return coder.encode(video.flip(1))


def rewritten(prompt: str, template: str) -> str:
    """ModifyPrompt of Algorithm 1. Only an ordinary word loses its capital: "The", not "NASA" or "I"."""
    if template == TEMPLATE and SELF_DESCRIBED.match(prompt):
        return SELF_DESCRIBED.sub(r"\1reversed ", prompt, count=1)
    if prompt.startswith("A ") or prompt[1:2].islower():
        prompt = prompt[0].lower() + prompt[1:]
    return template.replace("{}", prompt)


def entry(cfg: Config, rollout: dict) -> dict:
    """The corrective clip of a rollout: made by model_k, it first trains model_{k+1}, which is its round."""
    assert rollout["kind"] == "rollout", f"{rollout['id']} is reversed already"
    id = f"{rollout['id']}-reversed"
    prompt = rewritten(rollout["prompt"], cfg.template) if cfg.rewrite else rollout["prompt"]
    return data.index_entry(id, prompt, "corrective", rollout["round"] + 1, rollout["id"])


# ----------------------------------------------------------------------------------------------------
# around it

def check(cfg: Config, clips: data.Clips, rollouts: data.Clips):
    """Does all fit together?"""
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
    if not (clips.folder / "empty.safetensors").exists():
        raise UserError(f"{clips.folder / 'empty.safetensors'} is missing; run prepare.py again, or copy it "
                        "from agg_0")
    if other := set(rollouts.kinds) - {"rollout"}:
        raise UserError(f"{cfg.rollouts} holds {other.pop()} clips; give --rollouts what rollout.py makes")
    made, meta = rollouts.meta(), clips.meta()
    for key in GEOMETRY:
        if made[key] != meta[key]:
            raise UserError(f"{cfg.rollouts} was made with {key} = {made[key]}, {cfg.data} with {meta[key]}; "
                            "aggregate rollouts of the same data")
    for key, files in (("vae", vae.find(Path(cfg.wan))[0]), ("t5", t5.find_weights(cfg.wan))):
        if common.fingerprint(*files) != meta[key]:
            raise UserError(f"{cfg.wan} has another {key} than {cfg.data} was made with; give --wan "
                            f"{meta['wan']}")


def check_new(cfg, clips, rollouts, entries):
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
    before = clips.meta()
    return {key: before[key] for key in (*GEOMETRY, "seed")} | {
        "wan": str(Path(cfg.wan).resolve()),
        "data": str(clips.folder.resolve()), "data_fingerprint": common.fingerprint(clips.index),
        "rollouts": str(rollouts.folder.resolve()),
        "rollouts_fingerprint": common.fingerprint(rollouts.index), "round": rollouts.meta()["round"] + 1,
        "template": cfg.template, "rewrite": cfg.rewrite, "flip": cfg.flip,
        "paste_real": cfg.paste_real and str(Path(cfg.paste_real).resolve()), "dtype": cfg.dtype}


def reverse_rollouts(cfg, clips, rollouts, entries, todo, store, coder, ranks):
    videos = {source.id: source.path for source in data.find_clips(cfg.paste_real)} if cfg.paste_real else {}
    with common.progress(len(todo), "clips", ranks) as bar:
        for j in todo:
            rollout, new = rollouts.load(j), entries[j]
            real = read_real(cfg, videos, rollout["source"], clips.meta(), coder) if cfg.paste_real else None
            latents = reverse(rollout["latents"][None], coder, cfg.flip, real)[0]
            text = store.staged_text(new["id"]) if cfg.rewrite else rollout["text"]
            store.write(new["id"], latents, text, new["prompt"], new["source"])
            bar.update()


def read_real(cfg, videos, id, meta, coder) -> torch.Tensor:
    """[1,T,3,H,W], the first chunk of a seed clip: the very crop that prepare.py made."""
    if id not in videos:
        raise UserError(f"--paste-real {cfg.paste_real} has no video of clip {id}; give what prepare.py was "
                        "given as --videos")
    video = data.probe(videos[id])
    start = data.random_start(video, meta["frames"], meta["fps"], meta["seed"], id)
    size = meta["width"], meta["height"]
    return data.to_float(data.read_clip(video, coder.frame_count(CHUNK), meta["fps"], size, start)[None])


def finish(clips, entries, store, ranks):
    """The clips so far, referred to where they are, and the new ones."""
    if ranks.rank == 0:
        with common.replacing(store.folder / "empty.safetensors") as temporary:
            shutil.copyfile(clips.folder / "empty.safetensors", temporary)
    here = store.folder.resolve()
    so_far = (old | {"file": os.path.relpath(clips.locate(old), here)} for old in clips)
    store.finish(itertools.chain(so_far, entries))


if __name__ == "__main__":
    common.run(main, Config, __doc__)
