"""Stage 0: videos and captions -> agg_0/, the seed data as latents and text embeddings.

    python prepare.py --videos clips/ --wan Wan2.1-T2V-1.3B --out agg_0
    torchrun --nproc-per-node 8 prepare.py ...              the same on 8 GPUs

Captions: clip.txt beside clip.mp4, or a metadata.jsonl / metadata.csv that lists both. Killed and started
again it continues. A clip that cannot be used is listed with the reason, and the rest goes on.
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
    videos: str  # folder of videos with captions, or a .jsonl / .csv that lists them
    wan: str  # Wan directory: its VAE, text encoder and tokenizer
    out: str  # where the clip store goes
    size: str | None = None  # WIDTHxHEIGHT, covered and cropped to (default: what --wan says, or 832x480)
    frames: int | None = None  # of each clip, 4n + 1 (default: what --wan says, or 81)
    fps: int | None = None  # to resample to; slower videos are skipped (default: as above, or 16)
    caption_key: str | None = None  # the metadata column that holds the caption (MiraData: dense_caption)
    seed: int = 0  # where in its video each clip is cropped is a function of (seed, clip id)
    # of the networks (default: bfloat16 on a GPU, float32 on a CPU)
    dtype: Literal["float32", "bfloat16"] | None = None
    device: str | None = None  # cuda or cpu (default: a GPU if there is one)


def main(cfg: Config):
    ranks = common.start_ranks(cfg.device)
    dtype = getattr(torch, cfg.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32"))
    geometry = data.geometry(cfg.wan, cfg.size, cfg.frames, cfg.fps)
    sources, out, skipped = data.find_clips(cfg.videos, cfg.caption_key), Path(cfg.out), {}
    print0(f"{len(sources)} videos in {cfg.videos}; {geometry.frames} frames of {geometry.width}x"
           f"{geometry.height} at {geometry.fps} fps each")
    store = data.Writer(out, ranks, describe(cfg, geometry))
    with store.keeping():
        encode_captions(cfg, sources, store, ranks, dtype)
        encode_videos(cfg, sources, geometry, store, ranks, dtype, skipped)
        finish(sources, store, ranks, skipped)


def describe(cfg, geometry) -> dict:
    """How all clips of the store are made."""
    network = vae.load(cfg.wan)
    shape = [network.latent_count(geometry.frames), network.z_dim, geometry.height // network.space,
             geometry.width // network.space]
    if network.frame_count(shape[0]) != geometry.frames or geometry.height % 16 or geometry.width % 16:
        raise UserError(f"{geometry.frames} frames of {geometry.width}x{geometry.height}: frames must be one "
                        f"more than a multiple of {network.time}, sizes multiples of {2 * network.space}")
    return {"latents": shape, **geometry._asdict(), "wan": str(Path(cfg.wan).resolve()), "seed": cfg.seed,
            "vae": common.fingerprint(*vae.find(Path(cfg.wan))[0]),
            "t5": common.fingerprint(*t5.find_weights(cfg.wan))}


def encode_captions(cfg, sources, store, ranks, dtype):
    load = functools.cache(lambda: t5.load(cfg.wan, ranks.device, dtype))
    empty = store.folder / "empty.safetensors"  # the prompt that dropout and guidance use
    if ranks.rank == 0 and not empty.exists():
        data.write_text_embedding(empty, load().encode([""])[0])
    captions = {source.id: source.caption for source in sources if source.caption}
    store.stage_texts(captions, load, "captions")


def encode_videos(cfg, sources, geometry, store, ranks, dtype, skipped):
    network, mine = vae.load(cfg.wan, ranks.device, dtype), []
    for source in sources[ranks.rank::ranks.world]:
        if not source.caption:
            skipped[source.id] = f"{source.path}: no caption"
        elif not store.has(source.id):
            mine.append(source)

    def read(source):
        try:
            video = data.probe(source.path)
            start = data.random_start(video, geometry.frames, geometry.fps, cfg.seed, source.id)
            size = (geometry.width, geometry.height)
            return data.read_clip(video, geometry.frames, geometry.fps, size, start)
        except UserError as error:
            return str(error)

    with common.progress(len(mine), "clips", ranks) as bar:
        for source, clip in common.ahead(read, mine):
            if isinstance(clip, str):
                skipped[source.id] = clip
            else:
                latents = network.encode(data.to_float(clip[None].to(ranks.device)))[0]
                text = store.staged_text(source.id)
                store.write(source.id, latents, text, source.caption, source.path.name)
            bar.update()


def finish(sources, store, ranks, skipped):
    """The index, and what was skipped, and why."""
    out, skipped = store.folder, dict(common.gathered(list(skipped.items()), ranks))
    reasons = [reason for _, reason in sorted(skipped.items())]
    if ranks.rank == 0:
        common.write_text(out / "skipped.txt", "".join(f"{reason}\n" for reason in reasons))
    store.finish(data.index_entry(s.id, s.caption, "seed", 0, s.path.name) for s in sources
                 if s.id not in skipped)
    if ranks.rank == 0:
        print(*(f"skipped: {reason}\n" for reason in reasons), sep="", end="")
        print(f"{len(sources) - len(skipped)} clips in {out}, {len(skipped)} skipped"
              + (f" (listed in {out / 'skipped.txt'})" if skipped else ""))


if __name__ == "__main__":
    common.run(main, Config, __doc__)
