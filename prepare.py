"""Stage 0: videos and captions -> agg_0/, the seed clips as latents and text embeddings.

    python prepare.py --videos clips/ --wan Wan2.1-T2V-1.3B --out agg_0
    torchrun --nproc-per-node 8 prepare.py ...              the same on 8 GPUs

Captions come from clip.txt beside clip.mp4, or from a metadata.jsonl or metadata.csv that lists both. Videos
that cannot be used are skipped, and listed in skipped.txt with the reason. Killed and started again it
continues.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import common
import data
import t5
import vae
from common import UserError, print0


@dataclass
class Config:
    videos: str  # Folder of videos with captions, or a .jsonl or .csv file that lists them
    wan: str  # Wan directory with the VAE, text encoder and tokenizer
    out: str  # Folder for the clips (agg_0)
    # Size WIDTHxHEIGHT that videos are resized and cropped to (default: from the Wan directory, or 832x480)
    size: str | None = None
    frames: int | None = None  # Frames per clip, 4n + 1 (default: from the Wan directory, or 81)
    # Frame rate that videos are resampled to; slower videos are skipped (default: from the Wan directory,
    # or 16)
    fps: int | None = None
    # Column of the list that holds the captions, such as dense_caption for MiraData (default: the first of
    # caption, text, prompt and dense_caption)
    caption_key: str | None = None
    seed: int = 0  # Seed of the position at which each clip is cut from its video
    # Number format of the networks (default: bfloat16 on a GPU, else float32)
    dtype: Literal["float32", "bfloat16"] | None = None
    device: str | None = None  # cuda or cpu (default: cuda if available)


def main(cfg: Config):
    ranks = common.start_ranks(cfg.device)
    dtype = getattr(torch, common.for_device(cfg, ranks.device).dtype)
    geometry = data.geometry(cfg.wan, cfg.size, cfg.frames, cfg.fps)
    sources = data.find_clips(cfg.videos, cfg.caption_key)
    print0(f"{len(sources)} videos in {cfg.videos}; {geometry.frames} frames of {geometry.width}x"
           f"{geometry.height} at {geometry.fps} fps each")
    store = data.Writer(cfg.out, ranks, describe(cfg, geometry))
    with store.keeping():
        encode_captions(cfg, sources, store, ranks, dtype)
        skipped = encode_videos(cfg, sources, geometry, store, ranks, dtype)
        finish(sources, store, ranks, skipped)


def describe(cfg, geometry) -> dict:
    """How all clips of the store are made."""
    coder = vae.load(cfg.wan)
    multiple = 2 * coder.space  # the transformer joins 2x2 latents
    latents = [coder.latent_count(geometry.frames), coder.z_dim, geometry.height // coder.space,
               geometry.width // coder.space]
    whole = coder.frame_count(latents[0]) == geometry.frames
    if not whole or geometry.height % multiple or geometry.width % multiple:
        raise UserError(f"{geometry.frames} frames of {geometry.width}x{geometry.height}: frames must be one "
                        f"more than a multiple of {coder.time}, width and height multiples of {multiple}")
    return {"latents": latents, **geometry._asdict(), "wan": str(Path(cfg.wan).resolve()), "seed": cfg.seed,
            "vae": data.fingerprint(cfg.wan, "vae"), "t5": data.fingerprint(cfg.wan, "t5")}


def encode_captions(cfg, sources, store, ranks, dtype):
    load = functools.cache(lambda: t5.load(cfg.wan, ranks.device, dtype))
    empty = store.folder / "empty.safetensors"  # the prompt of guidance, and of clips that lose theirs
    if ranks.rank == 0 and not empty.exists():
        data.write_text_embedding(empty, load().encode([""])[0])
    captions = {source.id: source.caption for source in sources if source.caption}
    store.stage_texts(captions, load, "captions")


def encode_videos(cfg, sources, geometry, store, ranks, dtype) -> dict[str, str]:
    """Writes this rank's clips. Returns {id: reason} of those that cannot be used."""
    def read(source):
        try:
            return data.read_seed_clip(source.path, source.id, geometry, cfg.seed)
        except UserError as error:
            return str(error)

    coder = vae.load(cfg.wan, ranks.device, dtype)
    mine = sources[ranks.rank::ranks.world]
    skipped = {source.id: f"{source.path}: no caption" for source in mine if not source.caption}
    todo = [source for source in mine if source.caption and not store.has(source.id)]
    with common.progress(len(todo), "clips", ranks) as bar:
        for source, clip in common.ahead(read, todo):
            if isinstance(clip, str):
                skipped[source.id] = clip
            else:
                latents = coder.encode(data.to_float(clip[None].to(ranks.device)))[0]
                text = store.staged_text(source.id)
                store.write(source.id, latents, text, source.caption, source.path.name)
            bar.update()
    return skipped


def finish(sources, store, ranks, skipped):
    """Writes the index and skipped.txt."""
    skipped = dict(common.gathered(list(skipped.items()), ranks))
    reasons = [reason for _, reason in sorted(skipped.items())]
    listing = store.folder / "skipped.txt"
    if ranks.rank == 0:
        common.write_text(listing, "".join(f"{reason}\n" for reason in reasons))
    store.finish(data.index_entry(s.id, s.caption, "seed", 0, s.path.name) for s in sources
                 if s.id not in skipped)
    for reason in reasons:
        print0(f"skipped: {reason}")
    print0(f"{len(sources) - len(skipped)} clips in {store.folder}, {len(skipped)} skipped"
           + (f" (listed in {listing})" if skipped else ""))


if __name__ == "__main__":
    common.run(main, Config, __doc__)
