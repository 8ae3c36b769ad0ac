"""A world to try it all on, made without a download: its videos, and a tiny model directory in Wan's layout.

    python toy.py --out toy
    python prepare.py --videos toy/videos --wan toy/wan --out agg_0      # from here on as with Wan2.1

A sprite glides over a background at constant speed and re-enters where it left. The caption tells its shape
and direction. What everything looks like (the background, the sprite's colour, size and speed) is continuous
and told by nobody: the prompt cannot put right what drifts. The renderer is exact, so the truth is known.
"""

import colorsys
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from sentencepiece import SentencePieceTrainer

import common
import data
import model
import t5
import vae

SHAPES = ("disc", "ring", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIZE, FRAMES, FPS = 32, 81, 16
VAE_FILE = Path(__file__).with_name("toy_vae.safetensors")


@dataclass
class Config:
    out: str = "toy"  # where videos/ and wan/ go
    clips: int = 600  # videos to draw
    seed: int = 0  # of the clips and of the networks' first weights
    train_vae: bool = False  # instead: train the tiny VAE anew into toy_vae.safetensors, for 15 minutes


def main(cfg: Config):
    if cfg.train_vae:
        return train_vae(cfg.seed)
    videos, wan = Path(cfg.out, "videos"), Path(cfg.out, "wan")
    videos.mkdir(parents=True, exist_ok=True)
    ranks = common.Ranks(0, 1, torch.device("cpu"))
    with common.progress(cfg.clips, "videos", ranks) as bar:
        for i in range(cfg.clips):
            world = draw_world(cfg.seed, i)
            path = videos / f"{i:05d}.mp4"
            if not path.exists():
                data.write_video(path, [render(world, FRAMES)], FPS, crf=8, preset="veryfast")
                common.write_text(path.with_suffix(".txt"), caption(world) + "\n")
            bar.update()
    make_wan(wan, cfg.seed)
    print(f"{cfg.clips} videos of {FRAMES} frames in {videos}, a tiny Wan in {wan}")


# ----------------------------------------------------------------------------------------------------
# the world

class World(NamedTuple):
    shape: str
    direction: str
    base: torch.Tensor  # [3], the background's mean colour
    waves: torch.Tensor  # [2, 3], how far each wave moves it
    frequencies: torch.Tensor  # [2, 2], waves in x and y, per picture
    phases: torch.Tensor  # [2]
    color: torch.Tensor  # [3], the sprite's
    radius: float  # pixels
    speed: float  # pixels a frame
    place: torch.Tensor  # [2], where it is at frame 0


def draw_world(seed: int, i: int) -> World:
    g = common.rng("world", seed, i)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=g)

    shape, direction = (int(torch.randint(n, (), generator=g)) for n in (len(SHAPES), len(DIRECTIONS)))
    hsv = uniform(0, 1).item(), uniform(0.5, 1).item(), uniform(0.6, 1).item()
    color = 2 * torch.tensor(colorsys.hsv_to_rgb(*hsv)) - 1
    return World(SHAPES[shape], list(DIRECTIONS)[direction], uniform(-0.6, 0.6, 3),
                 uniform(-0.25, 0.25, 2, 3), uniform(-1, 1, 2, 2), uniform(0, 2 * math.pi, 2), color,
                 uniform(5, 7.5).item(), uniform(0.2, 0.6).item(), uniform(0, SIZE, 2))


def caption(world: World) -> str:
    return f"A {world.shape} moving {world.direction}"


def render(world: World, frames: int, start: int = 0) -> torch.Tensor:
    """[T, 3, SIZE, SIZE] in [-1, 1], exact at any time; the sprite's edge is one pixel soft."""
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    background = world.base.view(3, 1, 1).expand(3, SIZE, SIZE)
    for wave, (fx, fy), phase in zip(world.waves, world.frequencies, world.phases, strict=True):
        ripple = torch.cos(2 * math.pi * (fx * x + fy * y) / SIZE + phase)
        background = background + wave.view(3, 1, 1) * ripple
    t = torch.arange(start, start + frames)
    cx, cy = (place + step * world.speed * t for place, step in
              zip(world.place, DIRECTIONS[world.direction], strict=True))
    u = (x - cx.view(-1, 1, 1) + SIZE / 2) % SIZE - SIZE / 2  # [T, SIZE, SIZE], from the sprite's centre
    v = (y - cy.view(-1, 1, 1) + SIZE / 2) % SIZE - SIZE / 2
    inside = (0.5 - outline(world.shape, u, v, world.radius)).clamp(0, 1).unsqueeze(1)
    return (background * (1 - inside) + world.color.view(3, 1, 1) * inside).clamp(-1, 1)


def outline(shape: str, u, v, radius: float):
    """How far outside the outline a point is, in pixels."""
    if shape == "disc":
        return (u**2 + v**2).sqrt() - radius
    if shape == "ring":
        return ((u**2 + v**2).sqrt() - 0.75 * radius).abs() - 0.25 * radius
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.85 * radius
    return torch.maximum(v, 0.866 * u.abs() - 0.5 * v) - 0.5 * radius


# ----------------------------------------------------------------------------------------------------
# the model directory

def make_wan(folder: Path, seed: int = 0):
    """Everything a Wan2.1 download holds, in small; the transformer and text encoder have yet to learn."""
    (folder / "google" / "umt5-xxl").mkdir(parents=True, exist_ok=True)
    captions = [caption(draw_world(0, 0)._replace(shape=s, direction=d)) for s in SHAPES for d in DIRECTIONS]
    reverse = ["A reversed video of a" + words[1:] for words in captions]
    pieces = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(captions + reverse), model_writer=pieces, vocab_size=64,
                               hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1,
                               minloglevel=2)
    with common.replacing(folder / "google" / "umt5-xxl" / "spiece.model") as temporary:
        temporary.write_bytes(pieces.getvalue())
    t5.save(tiny_t5(seed), folder / "t5.safetensors")
    vae.save(vae.load(VAE_FILE), folder / "vae.safetensors")
    config = model.Config(dim=128, ffn_dim=512, num_heads=4, num_layers=5, text_dim=64, text_len=32)
    model.save(model.WanModel(config).init_weights("toy", seed), folder,
               geometry={"size": f"{SIZE}x{SIZE}", "frames": FRAMES, "fps": FPS})


@torch.no_grad()
def tiny_t5(seed: int) -> t5.Encoder:
    """Random, and good enough: it only has to tell a few captions apart."""
    encoder = t5.Encoder(vocab=64, dim=64, dim_attn=64, dim_ffn=128, heads=4, layers=2)
    g = common.rng("t5", seed)
    for p in encoder.parameters():
        if p.ndim == 2:
            p.copy_(torch.randn(p.shape, generator=g) / p.shape[1] ** 0.5)
    return encoder


# ----------------------------------------------------------------------------------------------------
# the tiny VAE: training it takes longer than all else here, so its weights are shipped

IMAGE_STEPS, CLIP_STEPS = 400, 1000


def train_vae(seed: int):
    """Single images first, cheap and most of what there is to learn; then clips of 17 or 33 frames."""
    torch.manual_seed(common.seed_of("vae", seed))
    torch.set_num_threads(1)  # the same bits however many cores there are
    network = vae.WanVAE(width=16, multipliers=(1, 1, 2, 2), blocks=1, z_dim=16)
    prepare_weights(network)
    clips = torch.stack([render(draw_world(seed, i), FRAMES) for i in range(600)])         # [600, T, 3, H, W]
    steps = IMAGE_STEPS + CLIP_STEPS
    for step in range(steps):
        in_images = step < IMAGE_STEPS
        begun = step if in_images else step - IMAGE_STEPS
        if begun == 0:  # what looks back in time has had no gradient, and must not start with a full step
            optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
        warmup, decay = min(1, (begun + 1) / 50), (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = (2.5e-3 if in_images else 6e-4) * warmup * decay
        batch, frames = (32, 1) if in_images else ((32, 1), (4, 17), (4, 17), (2, 33))[step % 4]
        start = int(torch.randint(FRAMES - frames + 1, ()))
        video = clips[torch.randint(len(clips), (batch,)), start:start + frames]
        mean, _ = network.posterior(video)
        # a little noise and a pull towards zero, in place of a learned variance, keep the latents smooth
        again = network.reconstruct(mean + 0.05 * torch.randn_like(mean))
        loss = (again - video).square().mean() + 1e-4 * mean.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            quality = held_out_psnr(network)
            print(f"step {step}/{steps} | loss {loss.item():.5f} | held-out {quality:.2f} dB", flush=True)
    with torch.no_grad():
        latents = network.posterior(clips[:100])[0]
    network.latents_mean = latents.mean((0, 1, 3, 4)).tolist()
    network.latents_std = latents.std((0, 1, 3, 4)).tolist()
    vae.save(network.to(torch.bfloat16), VAE_FILE)  # half the bytes


@torch.no_grad()
def prepare_weights(network):
    """torch's own first weights shrink the signal's variance threefold a layer, until it is lost. And a
    convolution begins by looking at its newest frame alone, so that what images taught holds for clips."""
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            fan_in = module.weight[0].numel() / module.kernel_size[0] ** (module.weight.ndim == 5)
            module.weight.normal_(std=fan_in ** -0.5)
            module.bias.zero_()
            if module.weight.ndim == 5:
                module.weight[:, :, :-1] = 0
    for module in network.modules():
        if isinstance(module, vae.Residual):
            module.residual["6"].weight.mul_(0.1)
        elif getattr(module, "time_conv", None):  # halving takes the mean of two frames, doubling repeats
            weight = module.time_conv.weight  # [out, in, 3, 1, 1]
            same = torch.eye(weight.shape[1])
            weight[:, :, -1, 0, 0] = same.repeat(len(weight) // len(same), 1)
            if isinstance(module, vae.Down):
                weight[:, :, 1:, 0, 0] = same.unsqueeze(-1) / 2


@torch.no_grad()
def held_out_psnr(network, clips: int = 8) -> float:
    """dB, of whole clips that no training saw."""
    video = torch.stack([render(draw_world(-1, i), FRAMES) for i in range(clips)])
    again = network.reconstruct(network.posterior(video)[0]).clamp(-1, 1)
    return -10 * ((again - video) / 2).square().mean((1, 2, 3, 4)).log10().mean().item()


if __name__ == "__main__":
    common.run(main, Config, __doc__)
