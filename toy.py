"""A world to try it all on, made without a download: its videos, and a tiny model directory in Wan's layout.

    python toy.py --out toy
    python prepare.py --videos toy/videos --wan toy/wan --out agg_0      # from here on as with Wan2.1

A sprite glides over a background and re-enters where it left. The caption tells its shape and
direction. What everything looks like (hues, the background's waves, the sprite's size and speed) is
continuous and told by nobody: the prompt cannot put right what drifts. How colourful and bright a world is
never differs, so that a frame shows whether it drifted. The renderer is exact: a video's tags say which world
it shows, and readings.py judges by that what has become of it.
"""

import colorsys
import io
import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from flags import Count, Whole, in_range, parse

SHAPES = ("disc", "ring", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIZE, FRAMES, FPS = 32, 81, 16
START = 9  # frames of a first chunk
EDGE = 2  # pixels over which a sprite's outline fades
VAE_FILE = Path(__file__).with_name("toy_vae.safetensors")
BASE_FILE = Path(__file__).with_name("toy_base.safetensors")


@dataclass
class Config:
    out: str = "toy"  # Folder for videos/, starts/, wan/ and prompts.jsonl
    clips: Count = 600  # Videos to draw
    starts: Whole = 48  # First chunks of other videos, which prompts.jsonl continues
    seed: int = 0  # Seed of the clips
    train_vae: bool = False  # Only train the tiny VAE anew, into toy_vae.safetensors: half an hour
    train_base: bool = False  # Only train the base model anew, into toy_base.safetensors: an hour

    __post_init__ = in_range


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    cfg = parse(Config, __doc__)

import torch
from sentencepiece import SentencePieceTrainer

import common
import data
import files
import model
import t5
import vae


def main(cfg: Config):
    if cfg.train_vae:
        train_vae(cfg.seed)
        return
    files.own(cfg.out, "a toy world")
    out = Path(cfg.out)
    if cfg.train_base:
        train_base(out / "base")
        return
    draw_videos(out / "videos", [draw_world(cfg.seed, i) for i in range(cfg.clips)], FRAMES)
    others = [draw_world("starts", i) for i in range(cfg.starts)]
    draw_videos(out / "starts", others, START)
    make_wan(out / "wan")
    files.write_text(out / "prompts.jsonl", data.as_lines(
        {"prompt": caption(world), "extend": f"starts/{i:05d}.mp4"} for i, world in enumerate(others)))
    print(f"{cfg.clips} videos of {FRAMES} frames in {out / 'videos'}, a tiny Wan in {out / 'wan'}")


def draw_videos(folder: Path, worlds: list, frames: int):
    folder.mkdir(parents=True, exist_ok=True)
    with common.progress(len(worlds), folder.name, common.Ranks(0, 1, torch.device("cpu"))) as bar:
        for world in worlds:
            path = folder / f"{world.name[1]:05d}.mp4"
            if not path.exists():
                files.write_text(path.with_suffix(".txt"), caption(world) + "\n")
                tags = {"prompt": caption(world), "world": world.name}
                data.write_video(path, [render(world, frames)], FPS, tags, crf=8, preset="veryfast")
            bar.update()


# ----------------------------------------------------------------------------------------------------
# the world

class World(NamedTuple):
    shape: str
    direction: str
    base: torch.Tensor  # [3], the background's mean colour
    waves: torch.Tensor  # [2, 3], how far each wave moves it
    frequencies: torch.Tensor  # [2, 2], waves in x and y, per picture
    phases: torch.Tensor  # [2]
    colour: torch.Tensor  # [3], the sprite's
    radius: float  # pixels
    speed: float  # pixels a frame
    place: torch.Tensor  # [2], where it is at frame 0
    name: tuple  # what draw_world made it from


def draw_world(seed: int | str, i: int) -> World:
    g = common.rng("world", seed, i)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=g)

    shape, direction = (int(torch.randint(n, (), generator=g)) for n in (len(SHAPES), len(DIRECTIONS)))
    hue = uniform(0, 1).item()
    base, colour = paint(hue, 0.4, 0.55), paint(hue + uniform(0.25, 0.75).item(), 0.9, 0.9)
    return World(SHAPES[shape], list(DIRECTIONS)[direction], base, uniform(-0.1, 0.1, 2, 3),
                 uniform(-1, 1, 2, 2), uniform(0, 2 * math.pi, 2), colour,
                 uniform(6.5, 8.5).item(), uniform(0.15, 0.35).item(), uniform(0, SIZE, 2), (seed, i))


def paint(hue: float, saturation: float, value: float) -> torch.Tensor:
    return 2 * torch.tensor(colorsys.hsv_to_rgb(hue % 1, saturation, value)) - 1


def caption(world: World) -> str:
    return f"A {world.shape} moving {world.direction}"


def captions() -> list[str]:
    """All there are."""
    anything = draw_world(0, 0)
    return [caption(anything._replace(shape=s, direction=d)) for s in SHAPES for d in DIRECTIONS]


def render(world: World, frames: int, start: int = 0) -> torch.Tensor:
    """[T, 3, SIZE, SIZE] in [-1, 1], exact at any time."""
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
    inside = (0.5 - outline(world.shape, u, v, world.radius) / EDGE).clamp(0, 1).unsqueeze(1)
    return (background * (1 - inside) + world.colour.view(3, 1, 1) * inside).clamp(-1, 1)


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

def make_wan(folder: Path, trained: bool = True):
    """Everything a Wan2.1 download holds, in small. trained: with the weights of the base model that is
    shipped; else the transformer has yet to learn."""
    (folder / "google" / "umt5-xxl").mkdir(parents=True, exist_ok=True)
    reverse = ["A reversed video of a" + words[1:] for words in captions()]
    pieces = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(captions() + reverse), model_writer=pieces, model_type="bpe", vocab_size=128,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
    with files.replacing(folder / "google" / "umt5-xxl" / "spiece.model") as temporary:
        temporary.write_bytes(pieces.getvalue())
    t5.save(tiny_t5(), folder / "t5.safetensors")
    vae.save(vae.load(VAE_FILE), folder / "vae.safetensors")
    config = model.Config(dim=128, ffn_dim=512, num_heads=4, num_layers=2, text_dim=64, text_len=32)
    net = model.load(BASE_FILE) if trained else model.WanModel(config).init_weights("toy", BASE_SEED)
    model.save(net, folder, geometry={"size": f"{SIZE}x{SIZE}", "frames": FRAMES, "fps": FPS},
               **{"mode": BASE_MODE} if trained else {})


@torch.no_grad()
def tiny_t5() -> t5.Encoder:
    """Random, and good enough: it only has to tell a few captions apart. Always the same, since the base
    model knows no other."""
    encoder = t5.Encoder(vocab=128, dim=64, dim_attn=64, dim_ffn=128, heads=4, layers=2)
    g = common.rng("t5", BASE_SEED)
    for p in encoder.parameters():
        if p.ndim == 2:
            p.copy_(torch.randn(p.shape, generator=g) / p.shape[1] ** 0.5)
    return encoder


# ----------------------------------------------------------------------------------------------------
# the tiny VAE, which is shipped: training it takes half an hour

IMAGE_STEPS, CLIP_STEPS = 3000, 2000


def train_vae(seed: int, until: int | None = None) -> list[float]:
    """Single images first, cheap and most of what there is to learn; then clips of 17 or 33 frames. Returns
    the losses at every 100th and at the last step. until: stops behind this step, and writes nothing."""
    torch.manual_seed(common.seed_of("vae", seed))
    torch.set_num_threads(1)  # the same bits however many cores there are
    network = vae.WanVAE(width=16, multipliers=(1, 1, 2, 2), blocks=1, z_dim=16)
    prepare_weights(network)
    steps = IMAGE_STEPS + CLIP_STEPS
    losses = []
    for step in range(steps):
        in_images = step < IMAGE_STEPS
        begun = step if in_images else step - IMAGE_STEPS
        if begun == 0:  # what looks back in time has had no gradient, and must not start with a full step
            optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
        warmup, decay = min(1, (begun + 1) / 50), (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = (2.5e-3 if in_images else 6e-4) * warmup * decay
        batch, frames = (32, 1) if in_images else ((32, 1), (4, 17), (4, 17), (2, 33))[step % 4]
        video = draw_clips(range(step * 32, step * 32 + batch), frames)
        mean, _ = network.posterior(video)
        # a little noise and a pull towards zero, in place of a learned variance, keep the latents smooth
        again = network.reconstruct(mean + 0.05 * torch.randn_like(mean))
        loss = (again - video).square().mean() + 1e-4 * mean.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            losses.append(loss.item())
            quality = held_out_psnr(network)
            print(f"step {step}/{steps} | loss {loss.item():.5f} | held-out {quality:.2f} dB", flush=True)
        if step == until:
            return losses
    with torch.no_grad():
        latents = network.posterior(draw_clips(range(100), FRAMES))[0]
    network.latents_mean = latents.mean((0, 1, 3, 4)).tolist()
    network.latents_std = latents.std((0, 1, 3, 4)).tolist()
    common.save_tensors(VAE_FILE, network.to(torch.bfloat16).state_dict(), latents_mean=network.latents_mean,
                        latents_std=network.latents_std, losses=losses)  # bfloat16: half the bytes
    return losses


def draw_clips(which, frames: int) -> torch.Tensor:
    """[B, frames, 3, SIZE, SIZE] from worlds that no video of toy/ shows."""
    return torch.stack([render(draw_world("vae", i), frames) for i in which])


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
    video = draw_clips(range(-clips, 0), FRAMES)
    again = network.reconstruct(network.posterior(video)[0]).clamp(-1, 1)
    return -10 * ((again - video) / 2).square().mean((1, 2, 3, 4)).log10().mean().item()


# ----------------------------------------------------------------------------------------------------
# the base model, which is shipped too: it is to the toy what Wan2.1 is to the paper, and takes an hour

BASE_CLIPS, BASE_SEED = 6000, 7
# (steps, learning rate) of trainings of which each begins with the weights of the one before
BASE_TRAININGS = (24000, 6e-3), (3000, 1e-3)
# causal: of two bases of 8,000 steps, 900 steps of diffusion forcing bring the bidirectional one to a
# held-out loss of 0.41, where the causal one begins at 0.34. Wan2.1 is bidirectional; 16,000 steps turn it
BASE_MODE = "df"
BASE_FLAGS = ("--batch 16 --micro 16 --warmup 50 --beta2 0.99 --ema 0.998 --shift 3 "
              "--log-every 100 --eval-every 1000 --save-every 1000 --preview-every 0")


def train_base(folder: Path):
    """By the project's own stages: what they have done is not done again."""
    prepare_base(folder, range(BASE_CLIPS))
    ship_base(fit_base(folder, BASE_TRAININGS))


def prepare_base(folder: Path, which):
    draw_videos(folder / "videos", [draw_world(BASE_SEED, i) for i in which], FRAMES)
    make_wan(folder / "wan", trained=False)
    run_stage("prepare.py", "--videos", folder / "videos", "--wan", folder / "wan", "--out", folder / "agg_0")


def fit_base(folder: Path, trainings) -> list[Path]:
    """The models' folders, the last of which is the base model."""
    models = [folder / "wan"]
    for n, (steps, lr) in enumerate(trainings):
        models.append(folder / f"model_{n}")
        run_stage("train_df.py", "--data", folder / "agg_0", "--init", models[-2], "--out", models[-1],
                  "--mode", BASE_MODE, "--steps", steps, "--lr", lr, *BASE_FLAGS.split())
    return models[1:]


def run_stage(script: str, *arguments):
    command = [sys.executable, Path(__file__).with_name(script), *arguments]
    status = subprocess.run(list(map(str, command)), preexec_fn=files.die_with_parent).returncode
    if status:
        raise common.UserError(f"{script} ended with status {status}; the same command goes on from there")


def ship_base(models: list[Path]):
    """Writes the last model's weights into BASE_FILE, in bfloat16, with the losses of all trainings: means
    over each 100 steps."""
    weights, config = model.read_checkpoint(models[-1])
    losses = []
    for folder in models:
        log = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        losses += [line["loss"] for line in log if "loss" in line and line["step"] % 100 == 0]
    common.save_tensors(
        BASE_FILE, {name: stored.read().to(torch.bfloat16) for name, stored in weights.items()},
        config=asdict(config), seed=BASE_SEED, clips=BASE_CLIPS, trainings=BASE_TRAININGS, mode=BASE_MODE,
        losses=losses)


if __name__ == "__main__":
    common.run(main, cfg)
