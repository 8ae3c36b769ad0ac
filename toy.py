"""A world to try it all on, made without a download: its videos, and a tiny model directory in Wan's layout.

    python toy.py --out toy
    python prepare.py --videos toy/videos --wan toy/wan --out agg_0      # from here on as with Wan2.1

A sprite glides slowly over a background and re-enters where it left. The caption tells its shape and
direction. What everything looks like (hues, the background's waves, the sprite's size and speed) is
continuous and told by nobody: the prompt cannot put right what drifts. How colourful and bright a world is
never differs, so that a frame shows whether it drifted. The renderer is exact: the truth is known.
"""

import colorsys
import functools
import io
import itertools
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
START = 9  # frames of a first chunk
EDGE = 2  # pixels over which a sprite's outline fades
VAE_FILE = Path(__file__).with_name("toy_vae.safetensors")


@dataclass
class Config:
    out: str = "toy"  # where videos/, starts/, wan/ and prompts.jsonl go
    clips: int = 600  # videos to draw
    starts: int = 48  # first chunks of other videos, for prompts.jsonl to continue
    seed: int = 0  # of the clips and of the networks' first weights
    train_vae: bool = False  # instead: train the tiny VAE anew into toy_vae.safetensors, for an hour


def main(cfg: Config):
    if cfg.train_vae:
        return train_vae(cfg.seed)
    out = Path(cfg.out)
    common.sweep(out)
    draw_videos(out / "videos", [draw_world(cfg.seed, i) for i in range(cfg.clips)], FRAMES)
    others = [draw_world("held out", i) for i in range(cfg.starts)]
    draw_videos(out / "starts", others, START)
    make_wan(out / "wan", cfg.seed)
    common.write_text(out / "prompts.jsonl", data.as_lines(
        {"prompt": caption(world), "extend": f"starts/{i:05d}.mp4"} for i, world in enumerate(others)))
    print(f"{cfg.clips} videos of {FRAMES} frames in {out / 'videos'}, a tiny Wan in {out / 'wan'}")


def draw_videos(folder: Path, worlds: list, frames: int):
    folder.mkdir(parents=True, exist_ok=True)
    with common.progress(len(worlds), folder.name, common.Ranks(0, 1, torch.device("cpu"))) as bar:
        for i, world in enumerate(worlds):
            path = folder / f"{i:05d}.mp4"
            if not path.exists():
                common.write_text(path.with_suffix(".txt"), caption(world) + "\n")
                data.write_video(path, [render(world, frames)], FPS, crf=8, preset="veryfast")
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
    color: torch.Tensor  # [3], the sprite's
    radius: float  # pixels
    speed: float  # pixels a frame
    place: torch.Tensor  # [2], where it is at frame 0


def draw_world(seed: int, i: int) -> World:
    g = common.rng("world", seed, i)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=g)

    shape, direction = (int(torch.randint(n, (), generator=g)) for n in (len(SHAPES), len(DIRECTIONS)))
    hue = uniform(0, 1).item()
    base, color = paint(hue, 0.4, 0.55), paint(hue + uniform(0.25, 0.75).item(), 0.9, 0.9)
    return World(SHAPES[shape], list(DIRECTIONS)[direction], base, uniform(-0.1, 0.1, 2, 3),
                 uniform(-1, 1, 2, 2), uniform(0, 2 * math.pi, 2), color,
                 uniform(6.5, 8.5).item(), uniform(0.04, 0.08).item(), uniform(0, SIZE, 2))


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
    reverse = ["A reversed video of a" + words[1:] for words in captions()]
    pieces = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(captions() + reverse), model_writer=pieces, model_type="bpe", vocab_size=128,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
    with common.replacing(folder / "google" / "umt5-xxl" / "spiece.model") as temporary:
        temporary.write_bytes(pieces.getvalue())
    t5.save(tiny_t5(seed), folder / "t5.safetensors")
    vae.save(vae.load(VAE_FILE), folder / "vae.safetensors")
    config = model.Config(dim=128, ffn_dim=512, num_heads=4, num_layers=2, text_dim=64, text_len=32)
    model.save(model.WanModel(config).init_weights("toy", seed), folder,
               geometry={"size": f"{SIZE}x{SIZE}", "frames": FRAMES, "fps": FPS})


@torch.no_grad()
def tiny_t5(seed: int) -> t5.Encoder:
    """Random, and good enough: it only has to tell a few captions apart."""
    encoder = t5.Encoder(vocab=128, dim=64, dim_attn=64, dim_ffn=128, heads=4, layers=2)
    g = common.rng("t5", seed)
    for p in encoder.parameters():
        if p.ndim == 2:
            p.copy_(torch.randn(p.shape, generator=g) / p.shape[1] ** 0.5)
    return encoder


# ----------------------------------------------------------------------------------------------------
# the tiny VAE: training it takes longer than all else here, so its weights are shipped

IMAGE_STEPS, CLIP_STEPS = 3000, 2000


def train_vae(seed: int):
    """Single images first, cheap and most of what there is to learn; then clips of 17 or 33 frames."""
    torch.manual_seed(common.seed_of("vae", seed))
    torch.set_num_threads(1)  # the same bits however many cores there are
    network = vae.WanVAE(width=16, multipliers=(1, 1, 2, 2), blocks=1, z_dim=16)
    prepare_weights(network)
    steps = IMAGE_STEPS + CLIP_STEPS
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
            quality = held_out_psnr(network)
            print(f"step {step}/{steps} | loss {loss.item():.5f} | held-out {quality:.2f} dB", flush=True)
    with torch.no_grad():
        latents = network.posterior(draw_clips(range(100), FRAMES))[0]
    network.latents_mean = latents.mean((0, 1, 3, 4)).tolist()
    network.latents_std = latents.std((0, 1, 3, 4)).tolist()
    vae.save(network.to(torch.bfloat16), VAE_FILE)  # half the bytes


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
# reading it back: which world a frame shows, whatever has become of it

READINGS = {
    "sprite": "share of frames that show a sprite",
    "shape": "share of frames that show a sprite of the shape the prompt names",
    "direction": "share of moments at which the sprite moved, over the last 4 seconds, where the prompt says",
    "colour": "how far the sprite's colour is from the first chunk's, in grey levels",
    "background": "how far the background is from the first chunk's, in grey levels",
}
# A sprite is there if it explains so much of what no background can, and stands out so far from it. Without
# one, the best fit to noise or to a VAE's blur may reach 0.15 and 0.4
EXPLAINED, CONTRAST = 0.2, 0.25
WAVES = 24  # as many components hold any background to a thousandth
# Frames over which a direction is read: the slowest sprite moves 2.6 pixels. A step of one may be rounding
LAG = 4 * FPS
GRAIN = 0.05  # what a pixel may be off: keeps a fit from inventing what the sprite hides


class Stamps(NamedTuple):
    """Sprites as render draws them, around pixel (0, 0), a row for each shape, radius and blur."""
    shape: torch.Tensor
    radius: torch.Tensor
    masks: torch.Tensor  # [N, SIZE, SIZE]
    spectra: torch.Tensor  # [2, N, 1, SIZE, SIZE // 2 + 1], of the masks and of their squares, conjugated


@functools.cache
def stamps(radii: tuple, blurs: tuple) -> Stamps:
    ink = draw_world("stamp", 0)._replace(base=-torch.ones(3), waves=torch.zeros(2, 3), color=torch.ones(3),
                                          place=torch.zeros(2))
    frequency = torch.fft.fftfreq(SIZE).square().view(-1, 1) + torch.fft.rfftfreq(SIZE).square()
    kinds, masks = list(itertools.product(range(len(SHAPES)), radii, blurs)), []
    for shape, radius, blur in kinds:
        sharp = (render(ink._replace(shape=SHAPES[shape], radius=radius), 1)[0, 0] + 1) / 2
        blurred = torch.fft.rfft2(sharp) * torch.exp(-2 * (math.pi * blur)**2 * frequency)
        masks.append(torch.fft.irfft2(blurred).clamp(0, 1))
    shape, radius, _ = torch.tensor(kinds).T
    masks = torch.stack(masks)
    spectra = torch.fft.rfft2(torch.stack([masks, masks**2])).conj().unsqueeze(2)
    return Stamps(shape.long(), radius, masks, spectra)


@functools.cache
def background_basis() -> torch.Tensor:
    """[P, WAVES], P pixels: what backgrounds are made of, each component as large as it usually is."""
    worlds = [draw_world("background", i)._replace(shape="disc", radius=-SIZE) for i in range(100)]
    rows = torch.cat([render(world, 1)[0].flatten(1) for world in worlds])
    _, sizes, components = torch.linalg.svd(rows, full_matrices=False)
    return (components * sizes.unsqueeze(1) / len(rows)**0.5)[:WAVES].T.contiguous()


def fit_background(y, weights):
    """y [T, 3, P], weights [T, P] -> the nearest background [T, 3, P]"""
    basis = background_basis()
    products = (basis.unsqueeze(2) * basis.unsqueeze(1)).flatten(1)  # [P, WAVES * WAVES]
    return (basis @ ridge((weights @ products).unflatten(1, (WAVES, WAVES)),
                          ((weights.unsqueeze(1) * y) @ basis).mT)).mT


def ridge(gram, right):
    return torch.linalg.solve(gram + GRAIN**2 * torch.eye(gram.shape[-1]), right)


def best_stamp(y, background, choice: Stamps):
    """(index, place, mask [T, P]) of the stamp that explains most, in its best place and colour. As
    y = (1 - mask) background + mask colour, what each explains at every place is a sum of correlations."""
    def correlate(with_mask, with_square):  # [T, C, P] each -> [T, N, C, P]
        sums = (choice.spectra[i] * torch.fft.rfft2(x.unflatten(2, (SIZE, SIZE))).unsqueeze(1)
                for i, x in enumerate((with_mask, with_square)))
        return torch.fft.irfft2(sum(sums)).flatten(3)

    extra = y - background
    hues = correlate(extra, background).square().sum(2)
    cost = correlate(2 * (extra * background).sum(1, True), background.square().sum(1, True)).squeeze(2)
    explained = hues / choice.masks.square().sum((1, 2)).unsqueeze(1) - cost  # [T, N, P]
    best, places = explained.max(2)
    index = best.argmax(1)
    place = places.gather(1, index.unsqueeze(1))  # [T, 1]
    down, right = (torch.arange(SIZE) - part for part in (place // SIZE, place % SIZE))
    mask = choice.masks[index.view(-1, 1, 1), down.unsqueeze(2) % SIZE, right.unsqueeze(1) % SIZE]
    return index, torch.cat([place % SIZE, place // SIZE], 1), mask.flatten(1)


def fit(frames: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each frame, uint8 [T, 3, SIZE, SIZE], shows: its background, and the sprite that best explains
    the rest, with how much of it (0..1) and how far it stands out from its surroundings (0..3.5)."""
    y = data.to_float(frames).flatten(2)  # [T, 3, P]
    plain = fit_background(y, torch.ones(len(y), SIZE**2))
    background = y.median(2, keepdim=True).values
    for _ in range(4):  # a sprite is an outlier: the further off a pixel is, the less it counts
        off = (y - background).square().sum(1)
        usual = off.median(1, keepdim=True).values.clamp(min=1e-4)
        background = fit_background(y, (1 + off / (4 * usual))**-2)
    _, _, mask = best_stamp(y, background, stamps((6.5, 7.5, 8.5), (1.5,)))
    background = fit_background(y, (mask < 0.1).float())  # now without what the likeliest sprite covers
    choice = stamps((6.4, 7.0, 7.5, 8.0, 8.6), (0.0, 1.0, 2.0))
    index, place, mask = best_stamp(y, background, choice)
    basis, mask = background_basis(), mask.unsqueeze(2)
    design = torch.cat([(1 - mask) * basis, mask], 2)  # the background and the sprite's colour, together
    solution = ridge(design.mT @ design, design.mT @ y.mT)  # [T, WAVES + 1, 3]
    background, colour = basis @ solution[:, :-1], solution[:, -1]
    left = (y.mT - design @ solution).square().sum((1, 2)) / (y - plain).square().sum((1, 2))
    gap = (background - colour.unsqueeze(1)).norm(dim=2, keepdim=True)
    small = torch.nn.functional.avg_pool2d(background.mT.unflatten(2, (SIZE, SIZE)), 4)  # smooth as it is
    return {"explained": 1 - left, "contrast": ((gap * mask).sum(1) / mask.sum(1)).squeeze(1),
            "shape": choice.shape[index], "radius": choice.radius[index], "place": place.float(),
            "colour": colour, "background": small}


def judge(reading: dict[str, torch.Tensor], prompt: str, stride: int = 1) -> dict[str, torch.Tensor]:
    """READINGS of each frame, from fit's results for a whole video, or for every so many of its frames; nan
    where there is nothing to judge."""
    seen = (reading["explained"] >= EXPLAINED) & (reading["contrast"] >= CONTRAST)
    words, none = prompt.lower().replace(".", " ").split(), torch.full(seen.shape, math.nan)
    shape = next((i for i, name in enumerate(SHAPES) if name in words), None)
    way = next((torch.tensor(step) for name, step in DIRECTIONS.items() if name in words), None)
    right = none if shape is None else (seen & (reading["shape"] == shape)).float()
    first, lag = torch.arange(len(seen)) * stride < START, max(1, LAG // stride)
    moves = none.clone()
    if way is not None:
        way = -way if "reversed" in words else way
        step = (reading["place"][lag:] - reading["place"][:-lag] + SIZE / 2) % SIZE - SIZE / 2
        along, across = (step * way).sum(1), (step * way.flip(0)).sum(1).abs()
        moves[lag:] = (seen[lag:] & seen[:-lag] & (along > across) & (along > 1.2)).float()
    colour, background = reading["colour"], reading["background"].flatten(1)
    colour = 127.5 * (colour - colour[first & seen].mean(0)).abs().mean(1)
    background = 127.5 * (background - background[first].mean(0)).abs().mean(1)
    return {"sprite": seen.float(), "shape": right, "direction": moves,
            "colour": torch.where(seen, colour, none), "background": background}


if __name__ == "__main__":
    common.run(main, Config, __doc__)
