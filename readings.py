"""Reading toy.py's world back from frames, and how far what they show is from the truth.

fit() reads the background, and the sprite's shape, place and colour. judge() compares that with the prompt
and, where a video's tags say which world it shows, with the exact continuation of that world.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch

import common
import data
import vae
from toy import DIRECTIONS, FPS, SHAPES, SIZE, START, VAE_FILE, World, draw_world, render

READINGS = {  # {measure: its meaning}; the first four where a video's world is known
    "survival": "seconds until the sprite is wrong for half a second on end; as a curve: the share before",
    "right": "share of frames whose sprite has the true shape, within 3 pixels and 15 levels of the truth",
    "place": "how far the sprite is from its true place, in pixels; without frames that show none",
    "psnr": "PSNR to the true continuation as the toy's VAE and an h264 file show it, in dB",
    "sprite": "share of frames that show a sprite",
    "shape": "share of frames that show a sprite of the right shape",
    "direction": "share of moments at which the sprite moved, over the last 2 seconds, where the prompt says",
    "colour": "how far the sprite's colour is from the true one (or the first chunk's), in grey levels",
    "background": "how far the background is from the true one (or the first chunk's), in grey levels",
}
# A sprite is there if it explains so much of what no background can, and stands out so far from it. Without
# one, the best fit to noise or to a VAE's blur may reach 0.15 and 0.4
EXPLAINED, CONTRAST = 0.2, 0.25
WAVES = 24  # as many components hold any background to a thousandth
LAG = 2 * FPS  # frames over which a direction is read: 4.8 to 11.2 pixels, less than half the picture
NEAR, ALIKE = 3, 15  # a sprite is right within so many pixels and grey levels
GRAIN = 0.05  # what a pixel may be off: keeps a fit from inventing what the sprite hides


# ----------------------------------------------------------------------------------------------------
# what a frame shows

class Stamps(NamedTuple):
    """Sprites as render draws them, around pixel (0, 0), a row for each shape, radius and blur."""
    shape: torch.Tensor
    masks: torch.Tensor  # [N, SIZE, SIZE]
    spectra: torch.Tensor  # [2, N, 1, SIZE, SIZE // 2 + 1], of the masks and of their squares, conjugated


@functools.cache
def stamps(radii: tuple, blurs: tuple) -> Stamps:
    ink = draw_world("stamp", 0)._replace(base=-torch.ones(3), waves=torch.zeros(2, 3), colour=torch.ones(3),
                                          place=torch.zeros(2))
    frequency = torch.fft.fftfreq(SIZE).square().view(-1, 1) + torch.fft.rfftfreq(SIZE).square()
    masks = []
    for shape, radius, blur in itertools.product(SHAPES, radii, blurs):
        sharp = (render(ink._replace(shape=shape, radius=radius), 1)[0, 0] + 1) / 2
        blurred = torch.fft.rfft2(sharp) * torch.exp(-2 * (math.pi * blur)**2 * frequency)
        masks.append(torch.fft.irfft2(blurred).clamp(0, 1))
    masks = torch.stack(masks)
    spectra = torch.fft.rfft2(torch.stack([masks, masks**2])).conj().unsqueeze(2)
    return Stamps(torch.arange(len(SHAPES)).repeat_interleave(len(radii) * len(blurs)), masks, spectra)


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
    choice = stamps((6.4, 7.0, 7.5, 8.0, 8.6), (0.0, 0.5, 1.0, 2.0))
    index, place, mask = best_stamp(y, background, choice)
    basis = background_basis()
    mask = mask.unsqueeze(2)
    design = torch.cat([(1 - mask) * basis, mask], 2)  # the background and the sprite's colour, together
    solution = ridge(design.mT @ design, design.mT @ y.mT)  # [T, WAVES + 1, 3]
    background = basis @ solution[:, :-1]
    colour = solution[:, -1]
    left = (y.mT - design @ solution).square().sum((1, 2)) / (y - plain).square().sum((1, 2))
    gap = (background - colour.unsqueeze(1)).norm(dim=2, keepdim=True)
    small = torch.nn.functional.avg_pool2d(background.mT.unflatten(2, (SIZE, SIZE)), 4)  # smooth as it is
    return {"explained": 1 - left, "contrast": ((gap * mask).sum(1) / mask.sum(1)).squeeze(1),
            "shape": choice.shape[index], "place": place.float(), "colour": colour, "background": small}


# ----------------------------------------------------------------------------------------------------
# the truth

class Origin(NamedTuple):
    """Where a video begins: which world, which frame of it, and how many frames were given."""
    seed: int | str
    number: int
    first: int
    given: int


class Truth(NamedTuple):
    """A world, as it goes on from an origin, and what fit reads in the video of its exact continuation."""
    world: World
    origin: Origin
    colour: torch.Tensor  # [3]
    background: torch.Tensor  # [3, SIZE / 4, SIZE / 4]


def origin_of(tags: dict) -> Origin | None:
    """As a video's tags, or those of the video that it continues, say; None if they do not."""
    first = 0
    given = START
    if tags.get("extend"):
        try:
            before = data.probe(tags["extend"])
            context = tags.get("context") or START
            tags = data.read_tags(before.path)
        except (common.UserError, OSError):
            return None
        given = 12 * min(max(context // 3, 1), (before.frames + 3) // 12) - 3  # as sample.py counts them
        first = before.frames - given
    match tags.get("world"):
        case [int() | str() as seed, int() as number] if first >= 0 < given:
            return Origin(seed, number, first, given)
    return None


@functools.cache
def coder():
    return vae.load(VAE_FILE)


def true_frames(origin: Origin, frames: int) -> torch.Tensor:
    """uint8 [frames, 3, SIZE, SIZE]: the exact continuation through the toy's VAE (which takes 4n + 1)."""
    video = render(draw_world(*origin[:2]), frames + (1 - frames) % 4, origin.first)[None]
    return data.to_uint8(coder().decode(coder().encode(video))[0, :frames])


def truth_of(origin: Origin, reading: dict[str, torch.Tensor]) -> Truth:
    """reading: fit's results for the video of the exact continuation."""
    colour = reading["colour"][is_seen(reading)].median(0).values
    return Truth(draw_world(*origin[:2]), origin, colour, reading["background"].median(0).values)


def psnr(frames: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """[T], in dB, of uint8 [T, 3, SIZE, SIZE]; at most 58.9, which is what rounding leaves."""
    error = (frames.float() - true.float()).square().mean((1, 2, 3))
    return 10 * (255**2 / error.clamp(min=1 / 12)).log10()


# ----------------------------------------------------------------------------------------------------
# judging

def is_seen(reading: dict[str, torch.Tensor]) -> torch.Tensor:
    return (reading["explained"] >= EXPLAINED) & (reading["contrast"] >= CONTRAST)


def judge(reading: dict, prompt: str, stride: int = 1, truth: Truth | None = None) -> dict:
    """{name: [T]}: READINGS of each frame but survival and psnr, from fit's results for a whole video or for
    every so many of its frames; nan where there is nothing to judge."""
    seen = is_seen(reading)
    none = torch.full(seen.shape, math.nan)
    words = prompt.lower().replace(".", " ").split()
    shape = truth.world.shape if truth else next((name for name in SHAPES if name in words), None)
    shaped = none if shape is None else (seen & (reading["shape"] == SHAPES.index(shape))).float()
    given = torch.arange(len(seen)) * stride < (truth.origin.given if truth else START)
    colour = truth.colour if truth else reading["colour"][given & seen].mean(0)
    background = truth.background if truth else reading["background"][given].mean(0)
    judged = {"sprite": seen.float(), "shape": shaped,
              "direction": moved_as_told(reading["place"], seen, words, stride),
              "colour": torch.where(seen, levels_off(reading["colour"], colour), none),
              "background": levels_off(reading["background"], background)}
    if truth:
        judged["place"] = torch.where(seen, place_error(reading["place"], seen & given, truth, stride), none)
        judged["right"] = ((judged["place"] <= NEAR) & (shaped == 1) & (judged["colour"] <= ALIKE)).float()
    return judged


def levels_off(values: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return 127.5 * (values - right).abs().flatten(1).mean(1)


def wrapped(step: torch.Tensor) -> torch.Tensor:
    """The way from place to place is the shorter one around the picture."""
    return (step + SIZE / 2) % SIZE - SIZE / 2


def moved_as_told(place, seen, words: list[str], stride: int) -> torch.Tensor:
    """1 where a sprite moved, over the last LAG frames, as the prompt says; nan where that is unknown."""
    moved = torch.full(seen.shape, math.nan)
    lag = max(1, LAG // stride)
    way = next((torch.tensor(step) for name, step in DIRECTIONS.items() if name in words), None)
    if way is None:
        return moved
    way = -way if "reversed" in words else way
    step = wrapped(place[lag:] - place[:-lag])
    along = (step * way).sum(1)
    across = (step * way.flip(0)).sum(1).abs()
    # places are whole pixels: a step of one may be rounding
    moved[lag:] = (seen[lag:] & seen[:-lag] & (along > across) & (along > 1.2)).float()
    return moved


def place_error(place, given, truth: Truth, stride: int) -> torch.Tensor:
    """Pixels. given: the frames that say where the sprite was when the video began, as fit reads it."""
    t = truth.origin.first + stride * torch.arange(len(place)).unsqueeze(1)
    step = truth.world.speed * torch.tensor(DIRECTIONS[truth.world.direction])
    off = wrapped(place - truth.world.place - step * t)
    if given.any():
        off = wrapped(off - off[given].median(0).values)
    return off.norm(dim=1)


def survival(right: torch.Tensor, seconds: float, stride: int = 1) -> float:
    """When a video of so many seconds began to be wrong for half a second on end; all of them if never."""
    count = max(1, round(FPS / 2 / stride))
    wrong = right.unfold(0, count, 1).amax(1) == 0 if len(right) >= count else right[:0]
    return wrong.float().argmax().item() * stride / FPS if wrong.any() else seconds
