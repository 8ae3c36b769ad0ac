"""Stage 0: videos and captions -> agg_0/, the seed clips as latents and text embeddings.

    python prepare.py --videos clips/ --wan Wan2.1-T2V-1.3B --out agg_0
    torchrun --nproc-per-node 8 prepare.py ...              the same on 8 GPUs

Captions come from clip.txt beside clip.mp4; from a metadata.jsonl, .csv or .parquet with the columns
file_name (or video, path) and text (or caption, prompt), and, for a part of a longer video, start and end in
seconds (or start_sec, end_sec, start_time, end_time); from MiraData's csv; or from tar shards with KEY.mp4
beside KEY.txt or KEY.json. Videos that cannot be used are skipped, and listed in skipped.txt with the reason.
Killed and started again it continues.
"""

import functools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from flags import Count, Device, Dtype, Size, in_range, parse


@dataclass
class Config:
    # Videos with captions: a folder, a list (.jsonl, .csv, .parquet) or tar shards, or several of these
    videos: tuple[str, ...]
    wan: str  # Wan directory with the VAE, text encoder and tokenizer
    out: str  # Folder for the clips (agg_0)
    # Size WIDTHxHEIGHT that videos are resized and cropped to (default: from the Wan directory, or 832x480)
    size: Size | None = None
    frames: Count | None = None  # Frames per clip, 4n + 1 (default: from the Wan directory, or 81)
    # Frame rate that videos are resampled to; slower videos are skipped (default: from the Wan directory,
    # or 16)
    fps: Count | None = None
    # Column of the list that holds the captions, such as dense_caption for MiraData (default: the first of
    # caption, text, prompt and dense_caption)
    caption_key: str | None = None
    # Folders where the videos of a list are looked for, one after another (default: the folder of the list)
    root: tuple[str, ...] = ()
    # Rows of the list to use, by the values of columns: KEY=VALUE, or several with commas between; * in a
    # VALUE stands for anything (default: all rows)
    where: str | None = None
    seed: int = 0  # Seed of the position at which each clip is cut from its video
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
import locate
import sources
import t5
import vae
from common import UserError, print0


def main(cfg: Config):
    ranks = common.start_ranks(cfg.device)
    cfg = replace(cfg, wan=locate.local(cfg.wan, "vae", "t5"))
    dtype = getattr(torch, common.for_device(cfg, ranks.device).dtype)
    geometry = data.geometry(cfg.wan, cfg.size, cfg.frames, cfg.fps)
    listed = sources.find_clips(cfg.videos, cfg.caption_key, cfg.root, cfg.where)
    print0(f"{len(listed)} videos in {' '.join(cfg.videos)}; {geometry.frames} frames of {geometry.width}x"
           f"{geometry.height} at {geometry.fps} fps each")
    skipped = find_unusable(listed, cfg.out, ranks)
    clips = {clip.id: clip for clip in listed if clip.id not in skipped}
    if not clips:
        return refuse(skipped, ranks)
    entries = [data.index_entry(id, clip.caption, "seed", 0, clip.path.name) for id, clip in clips.items()]
    store = data.Writer(cfg.out, ranks, describe(cfg, geometry), entries,
                        lambda id: data.size(clips[id].path))
    with store.keeping():
        encode_captions(cfg, store, ranks, dtype)
        skipped |= encode_videos(cfg, clips, geometry, store, ranks, dtype)
        return finish(listed, store, ranks, skipped)


def find_unusable(listed, out, ranks) -> dict[str, str]:
    """{id: reason} of the clips without a caption, and of those without a file that are not made yet."""
    skipped = {}
    for clip in listed[ranks.rank::ranks.world]:
        if not clip.caption:
            skipped[clip.id] = clip.problem or f"{clip.path}: no caption"
        elif not clip.path.is_file() and not data.clip_file(out, clip.id).exists():
            skipped[clip.id] = f"no such file: {clip.path}"
    return dict(common.gathered(list(skipped.items()), ranks))


def refuse(skipped, ranks) -> int:
    """Says that there is nothing to train on. Returns the exit code."""
    if ranks.rank == 0:
        print(f"prepare.py: none of the {len(skipped)} videos can be used; the first of the reasons:\n"
              f"{skipped[min(skipped)]} (--root FOLDER says where the videos of a list are)", file=sys.stderr)
    return 2


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


def encode_captions(cfg, store, ranks, dtype):
    load = functools.cache(lambda: t5.load(cfg.wan, ranks.device, dtype))
    empty = store.folder / "empty.safetensors"  # the prompt of guidance, and of clips that lose theirs
    if ranks.rank == 0 and not empty.exists():
        data.write_text_embedding(empty, load().encode([""])[0])
    store.stage_texts(load, "captions")


def encode_videos(cfg, clips, geometry, store, ranks, dtype) -> dict[str, str]:
    """Writes this rank's clips, of {id: clip}. Returns {id: reason} of those that cannot be used."""
    skipped = {}

    def read(ids):
        pixels = {}
        for id in ids:
            try:
                pixels[id] = data.read_seed_clip(clips[id].path, id, geometry, cfg.seed)
            except UserError as error:
                skipped[id] = str(error)
        return pixels

    coder = vae.load(cfg.wan, ranks.device, dtype)
    todo = store.share(cfg.batch)
    with common.progress(sum(map(len, todo)), "clips", ranks) as bar:
        for ids, pixels in common.ahead(read, todo):
            if pixels:
                video = data.to_float(torch.stack([*pixels.values()]).to(ranks.device))
                for id, latents in zip(pixels, coder.encode(video), strict=True):
                    store.write(id, latents, store.staged_text(id))
            bar.update(len(ids))
    return skipped


SHOWN = 20  # reasons on the screen; skipped.txt has them all


def finish(listed, store, ranks, skipped):
    """Writes the index and skipped.txt. Returns the exit code, if no clip is left."""
    skipped = dict(common.gathered(list(skipped.items()), ranks))
    reasons = [reason for _, reason in sorted(skipped.items())]
    listing = store.folder / "skipped.txt"
    if ranks.rank == 0:
        files.write_text(listing, "".join(f"{files.plain(reason)}\n" for reason in reasons))
    if len(skipped) == len(listed):
        return refuse(skipped, ranks)
    store.finish(skipped=skipped)
    for reason in reasons[:SHOWN]:
        print0(f"skipped: {reason}")
    if len(reasons) > SHOWN:
        print0(f"skipped: {len(reasons) - SHOWN} more")
    print0(f"{len(listed) - len(skipped)} clips in {store.folder}, {len(skipped)} skipped"
           + (f" (listed in {listing})" if skipped else ""))


if __name__ == "__main__":
    common.run(main, cfg)
