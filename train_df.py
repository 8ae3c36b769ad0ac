"""Stage 1: agg_k/ -> model_k/, by diffusion forcing: every chunk of a clip is noised to a level of its own.

    torchrun --nproc-per-node 8 train_df.py --data agg_0        from the Wan that made agg_0, into model_0
    python train_df.py --data agg_0                             the same, in one process

A seed clip carries loss on all its chunks. A corrective clip (a reversed rollout: drifted, then real) begins
with 4 clean chunks without loss; it is the other 3 that teach the way back from drift.

Killed and started again by the same command, it goes on from its newest checkpoint, on any number of GPUs.
What is trained at a step is a function of (seed, step) alone. model_k/ is a Wan directory when it is done.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import resource
import shutil
import signal
import sys
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import common
import data
import diffusion
import model
import vae
from common import UserError, print0

CHUNK = 3  # latent frames
NOISE_BINS = 10  # the loss is also told by noise level, in bins of 100


@dataclass
class Config:
    data: str  # the clips: agg_k, made by prepare.py or aggregate.py
    # the weights to begin with: a Wan directory, another model_k, or a file (default: the Wan directory that
    # made the clips)
    init: str | None = None
    # where model_k goes, with its checkpoints, log.jsonl and preview/ (default: model_k beside agg_k)
    out: str | None = None
    wan: str | None = None  # Wan directory whose VAE shows the previews (default: the one of --data)
    # df: diffusion forcing; tf: teacher forcing, noisy chunks beside their clean past; full: bidirectional,
    # one noise level a clip
    mode: Literal["df", "tf", "full"] = "df"
    steps: int = 16000  # optimiser steps in all
    batch: int = 96  # clips a step, over all GPUs
    micro: int = 1  # clips a GPU computes at once; changes memory and speed, not what is trained
    lr: float = 4e-6  # constant
    warmup: int = 0  # steps over which lr rises from 0
    weight_decay: float = 0.01  # AdamW's
    beta2: float = 0.999  # AdamW's second; the first is 0.9
    clip: float = 1.0  # the gradient's norm at most
    ema: float = 0.0  # decay of an average of the weights, which is then what model_k holds; 0 is none
    shift: float = 8.0  # of noise levels towards 1000
    drop: float = 0.1  # share of clips that lose their prompt, for guidance
    drop_kind: Literal["both", "seed"] = "both"  # the kinds of clips that may lose it
    prefix: int = 4  # clean chunks without loss that begin a corrective clip
    seed_prefix: float = 0.0  # share of seed clips with a clean prefix without loss, like corrective ones
    image_first: float = 0.0  # share of steps whose clips begin with a chunk of 1, as image to video does
    # share of corrective clips in training, 0..1 (default: their share of the data)
    corrective_share: float | None = None
    # over a clip's loss-bearing latents and then over clips (clip), or all latents alike (latent), so that a
    # corrective clip counts 9/21 of a seed clip
    loss_mean: Literal["clip", "latent"] = "clip"
    loss_weight: Literal["flat", "bell"] = "flat"  # by noise level; bell: most at 500, none at 1000
    held_out: int = data.HELD_OUT  # seed clips kept from training and rollouts; their loss compares rounds
    seed: int = 0  # of the order of clips, their noise levels, noise and dropout
    log_every: int = 10  # steps from one line of the log to the next
    eval_every: int = 500  # steps between measurements of the held-out loss
    preview_every: int = 1000  # steps between previews; 0 is none
    previews: int = 2  # videos in a preview, of the first held-out prompts
    guidance: float = 6.0  # towards the prompt, in previews
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints kept
    skip_bad: bool = False  # leave out clips that cannot be read, and count them
    wandb: str = ""  # also log to this Weights & Biases project
    recompute: bool | None = None  # activations in the backward pass, to save memory (default: on a GPU)
    compile: bool | None = None  # the blocks (default: on a GPU)
    # of the matrix products; weights stay float32 (default: bfloat16 on a GPU, float32 on a CPU)
    dtype: Literal["float32", "bfloat16"] | None = None
    device: str | None = None  # cuda or cpu (default: a GPU if there is one)


def main(cfg: Config):
    ranks, caught = common.start_ranks(cfg.device), catch_signals()
    cfg = complete(cfg, ranks)
    clips, out = Clips(cfg), Path(cfg.out)
    if finished(cfg, clips, ranks):
        return print0(f"{out} is trained already: {cfg.steps} steps")
    state = begin(cfg, clips, ranks)
    resumed = load_newest(cfg, state, ranks)
    log, first = Log(cfg, clips, state, ranks, resumed), resumed or 0

    micro = common.ahead(clips.micro_batch, shares(cfg, ranks, first))
    for step in range(first, cfg.steps + 1):
        last, new = step == cfg.steps, step != resumed  # what a checkpoint knows is not done again
        if new and clips.held_out and (step % cfg.eval_every == 0 or last):
            log.write({"step": step, "held_out": held_out_loss(cfg, clips, state, ranks)})
        if new and cfg.preview_every and (step % cfg.preview_every == 0 or last):
            preview(cfg, clips, state, step, ranks)
        stop = agreed(caught)
        if new and step and (step % cfg.save_every == 0 or last or stop):
            stop_if_broken(cfg, clips, state, ranks)
            save(cfg, state, step, ranks)
        if last or stop:
            break

        with log.clock():
            norm = train_step(cfg, state, micro, step, ranks)
        if (step + 1) % cfg.log_every == 0:
            stop_if_broken(cfg, clips, state, ranks)
            log.training(step + 1, norm)
    finish_save(cfg, state, ranks)
    if stop and not last:
        print0(f"stopped after step {step}; the same command goes on from there")
        return 128 + stop
    export(cfg, state, ranks)


def train_step(cfg, state, micro, step: int, ranks):
    """One optimiser step, over as many micro-batches as the batch takes. Never waits for the device."""
    state.optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)
    count = math.ceil(cfg.batch // ranks.world / cfg.micro)
    for k in range(count):
        batch = next(micro)[1].to(ranks.device)
        if ranks.world > 1:  # gradients travel once, with the last
            state.net.set_requires_gradient_sync(k == count - 1)
        error = errors(cfg, state.net, batch)                                              # [B, F]
        loss = clip_losses(error, batch.weight)                                            # [B]
        # the mean over the global batch, since gradients are averaged over ranks
        (loss.sum() * ranks.world / cfg.batch).backward()
        tally(state.totals, error.detach(), loss.detach(), batch)
    norm = torch.nn.utils.clip_grad_norm_(state.weights.values(), cfg.clip, foreach=True)
    norm = whole(norm)
    # a norm that is not finite stops the weights where they are, now and for good, without asking the device
    state.broken.copy_(torch.where((state.broken < 0) & ~norm.isfinite(), step, state.broken))
    state.optimizer.found_inf = (state.broken >= 0).float()
    state.optimizer.step()
    state.optimizer.zero_grad()
    if cfg.ema:
        decay = min(cfg.ema, (step + 1) / (step + 10))  # a fresh average forgets where it began
        with torch.no_grad():  # else the average would drag along a graph of all steps
            torch._foreach_lerp_(state.ema, list(state.weights.values()), 1 - decay)
    return norm


def errors(cfg, net, batch) -> torch.Tensor:
    """The squared error of every latent frame's predicted velocity, [B, F]."""
    x = diffusion.add_noise(batch.x0, batch.noise, batch.t)
    if cfg.mode == "full":
        v = net(x, batch.t, batch.text, chunk=None)
    elif cfg.mode == "tf":
        v = net(x, batch.t, batch.text, chunk=batch.sizes, clean=batch.x0)
    else:
        v = net(x, batch.t, batch.text, chunk=batch.sizes)
    return (v - diffusion.velocity(batch.x0, batch.noise)).square().mean((2, 3, 4))


def clip_losses(error, weight) -> torch.Tensor:
    """[B]; with the flags' defaults the mean over each clip's loss-bearing latents."""
    return (error * weight).sum(1)


def learning_rate(cfg, step: int) -> float:
    return cfg.lr * min(1, (step + 1) / max(cfg.warmup, 1))


# ----------------------------------------------------------------------------------------------------
# what is trained on: at every position of an endless sequence a clip, its noise levels and its noise, as a
# function of (seed, position). Ranks, micro-batches and restarts change nothing.

class Batch(NamedTuple):
    x0: torch.Tensor  # [B, F, C, H, W]
    noise: torch.Tensor
    t: torch.Tensor  # [B, F], 0 where a chunk is shown clean
    mask: torch.Tensor  # [B, F], 1 where there is loss
    weight: torch.Tensor  # [B, F], how much a frame's error counts in the clip's loss
    text: torch.Tensor  # [B, n, text_dim]
    chunk: torch.Tensor  # [F], the chunk a frame belongs to
    sizes: tuple[int, ...]  # of the chunks
    ids: list[str]

    def to(self, device):
        return self._make(x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in self)


class Clips:
    """The clips of --data as training samples."""

    def __init__(self, cfg: Config):
        self.cfg, self.store = cfg, data.Clips(cfg.data)
        self.meta = self.store.meta()
        self.shape = tuple(self.meta["latents"])                                           # F, C, H, W
        empty = Path(cfg.data, "empty.safetensors")
        if not empty.exists():
            raise UserError(f"{empty} is missing: the empty prompt's embedding, which prepare.py writes")
        self.null = data.read_text_embedding(empty).float()
        self.held_out = data.held_out(self.store, cfg.held_out)
        unseen, self.seed, self.corrective = {self.store[i]["id"] for i in self.held_out}, [], []
        for i, clip in enumerate(self.store):
            if clip["kind"] not in ("seed", "corrective"):
                raise UserError(f"{self.store.index}:{i + 1}: a {clip['kind']} is not to be trained on; "
                                "aggregate.py makes corrective clips of rollouts")
            # a held-out clip is rolled out only if rollout.py was told to hold out fewer
            if data.origin(clip) not in unseen:
                (self.seed if clip["kind"] == "seed" else self.corrective).append(i)
        self.all = self.seed + self.corrective
        self.check()

    def check(self):
        cfg, (frames, *_) = self.cfg, self.shape
        if frames % CHUNK and cfg.mode != "full":
            raise UserError(f"{cfg.data} has clips of {frames} latent frames, no multiple of {CHUNK}")
        if cfg.mode == "full" and (self.corrective or cfg.seed_prefix or cfg.image_first):
            raise UserError("--mode full knows no prefix and no chunks: it is for seed clips alone, without "
                            "--seed-prefix and --image-first")
        if (self.corrective or cfg.seed_prefix) and cfg.prefix >= frames // CHUNK:
            raise UserError(f"{cfg.data} has clips of {frames // CHUNK} chunks; a --prefix of {cfg.prefix} "
                            "leaves nothing to learn")
        share = cfg.corrective_share
        lacks_seed = not self.seed and (share or 0) < 1
        if not self.all or (share and not self.corrective) or (share is not None and lacks_seed):
            raise UserError(f"{cfg.data} has {len(self.seed)} seed and {len(self.corrective)} corrective "
                            f"clips to train on, beside {len(self.held_out)} held out: too few")

    def at(self, position: int) -> int:
        """Each clip once an epoch; with --corrective-share, each kind has epochs of its own."""
        share, seed = self.cfg.corrective_share, self.cfg.seed
        if share is None:
            return self.all[data.sample_order(len(self.all), seed, position)]
        before = math.floor(position * share)  # corrective ones, spread evenly
        if math.floor((position + 1) * share) > before:
            return self.corrective[data.sample_order(len(self.corrective), (seed, "corrective"), before)]
        return self.seed[data.sample_order(len(self.seed), (seed, "seed"), position - before)]

    def sizes(self, step: int | None) -> tuple[int, ...]:
        """The chunks of a step's clips: 3, 3, ... or, as in image to video, 1, 3, 3, ..."""
        chunks, cfg = self.shape[0] // CHUNK, self.cfg
        if cfg.mode == "full":
            return self.shape[:1]
        image = torch.rand((), generator=common.rng(cfg.seed, "image first", step)) < cfg.image_first
        return (1 if image and step is not None else CHUNK,) + (CHUNK,) * (chunks - 1)

    def layout(self) -> tuple:
        """Who sees whom in training, for counting what it costs."""
        frames, _, height, width = self.shape
        kind = model.teacher_layout if self.cfg.mode == "tf" else model.causal_layout
        return kind(self.sizes(None), height * width // model.PATCH**2)

    def micro_batch(self, share) -> Batch:
        step, positions = share
        return self.batch([(self.at(p), ("sample", p)) for p in positions], self.sizes(step))

    def batch(self, chosen, sizes, held_out=False) -> Batch:
        """chosen: [(clip, names of its randomness), ...]."""
        samples = [self.sample(i, sizes, names, held_out) for i, names in chosen]
        *tensors, texts, ids = zip(*samples, strict=True)
        stacked = [torch.stack(x) for x in tensors] + [model.pad_text(texts)]
        stacked.append(torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)))
        if torch.cuda.is_available():
            stacked = [x.pin_memory() for x in stacked]
        return Batch(*stacked, sizes, list(ids))

    def sample(self, i: int, sizes, names, held_out: bool):
        """x0, noise, t, mask, weight, text, id of a clip."""
        cfg, frames, g = self.cfg, sum(sizes), common.rng(self.cfg.seed, *names)
        noise = torch.randn(frames, *self.shape[1:], generator=g)
        steps = torch.randint(1000, (len(sizes),), generator=g)  # of a grid of 1000, a level for each chunk
        lucky = torch.rand(2, generator=g)
        t = 1000 * diffusion.shifted(1 - steps / 1000, cfg.shift).repeat_interleave(torch.tensor(sizes))
        mask = torch.ones(frames)
        try:
            clip = self.load(i)
        except (UserError, OSError) as error:
            if not cfg.skip_bad:
                raise UserError(f"{error}\nIt is clip {i + 1} of {self.store.index}; --skip-bad leaves such "
                                "clips out") from None
            return torch.zeros_like(noise), noise, t, mask * 0, mask * 0, self.null, "skipped"
        kind, text = clip["kind"], clip["text"].float()
        if kind == "corrective" or (lucky[0] < cfg.seed_prefix and not held_out):
            t[:sum(sizes[:cfg.prefix])] = mask[:sum(sizes[:cfg.prefix])] = 0
        if lucky[1] < cfg.drop and cfg.drop_kind in ("both", kind) and not held_out:
            text = self.null
        weight = mask / (frames if cfg.loss_mean == "latent" else mask.sum())
        if cfg.loss_weight == "bell" and not held_out:
            weight = weight * diffusion.bell_weight(t, cfg.shift)
        return clip["latents"][:frames].float(), noise, t, mask, weight, text, clip["id"]

    def load(self, i: int) -> dict:
        clip = self.store.load(i)
        if clip["latents"].shape != self.shape or clip["text"].shape[1:] != self.null.shape[1:]:
            raise UserError(f"clip {clip['id']} has latents {tuple(clip['latents'].shape)} and text "
                            f"{tuple(clip['text'].shape)}; its store says {self.shape} and [n, "
                            f"{self.null.shape[1]}]")
        return clip


def shares(cfg, ranks, first: int):
    """(step, positions) of each of this rank's micro-batches, from a step on."""
    for step in range(first, cfg.steps):
        mine = range(step * cfg.batch + ranks.rank, (step + 1) * cfg.batch, ranks.world)
        for k in range(0, len(mine), cfg.micro):
            yield step, mine[k:k + cfg.micro]


# ----------------------------------------------------------------------------------------------------
# the start

# what may differ when a run goes on: where, how fast and how far it runs, and what it shows
CHANGEABLE = {"data", "init", "out", "wan", "steps", "micro", "log_every", "eval_every", "preview_every",
              "previews", "guidance", "save_every", "keep", "skip_bad", "wandb", "recompute", "compile",
              "device"}


def complete(cfg: Config, ranks) -> Config:
    """Fills in what depends on the device and the data; refuses what cannot be."""
    gpu = ranks.device.type == "cuda"
    made_with = data.Clips(cfg.data).meta().get("wan", "")
    cfg = dataclasses.replace(cfg, init=cfg.init or made_with,
                              out=cfg.out or common.neighbour(cfg.data, "model", "out"))
    wan = cfg.wan or made_with
    recompute, compile = (gpu if x is None else x for x in (cfg.recompute, cfg.compile))
    cfg = dataclasses.replace(cfg, wan=str(Path(wan).resolve()), recompute=recompute, compile=compile,
                              dtype=cfg.dtype or ("bfloat16" if gpu else "float32"))
    positive = ("steps", "batch", "micro", "log_every", "eval_every", "save_every", "keep")
    for name in (*positive, "prefix", "held_out"):
        if getattr(cfg, name) < (least := int(name in positive)):
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: {least} is the least")
    for name in ("drop", "seed_prefix", "image_first", "corrective_share"):
        if not 0 <= (getattr(cfg, name) or 0) <= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: a share is from 0 to 1")
    if not 0 <= cfg.ema < 1:
        raise UserError(f"--ema {cfg.ema}: a decay is at least 0 (no average) and below 1")
    if cfg.batch % ranks.world:
        less = cfg.batch // ranks.world * ranks.world
        raise UserError(f"--batch {cfg.batch} cannot be shared by {ranks.world} processes; use "
                        f"{less or ranks.world} or {less + ranks.world}")
    if cfg.preview_every:
        try:
            vae.find(Path(cfg.wan))
        except UserError as error:
            raise UserError(f"{error}\nPreviews need a VAE: give --wan DIR, or --preview-every 0") from None
    return cfg


def finished(cfg, clips, ranks) -> bool:
    """Makes --out this run's own, or refuses it as another's. True: the run is complete."""
    own = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in CHANGEABLE}
    own |= {"init": common.fingerprint(*model.find_weights(cfg.init)),
            "data": common.fingerprint(clips.store.index)}
    if ranks.rank == 0:
        common.claim(Path(cfg.out, "run.json"), own, command=sys.argv, torch=torch.__version__)
        intact = {folder for _, folder in checkpoints(Path(cfg.out))}
        for folder in set(Path(cfg.out).glob("train/step-*")) - intact:  # a killed run wrote or removed it
            if re.fullmatch(r"step-\d+", folder.name):
                shutil.rmtree(folder)
    dist.barrier()
    done = Path(cfg.out, "config.json")
    return done.exists() and common.read_json(done).get("step") == cfg.steps


@dataclass
class State:
    """All that a checkpoint holds, beside the network it belongs to."""
    net: model.WanModel
    weights: dict[str, torch.nn.Parameter]  # fp32, this rank's shards where there are several
    optimizer: torch.optim.AdamW
    ema: list[torch.Tensor]
    totals: torch.Tensor  # sums and counts since the last line of the log; see tally
    broken: torch.Tensor  # the first step whose gradient was not finite, or -1
    saving: Future | None = None  # of a checkpoint on its way to disk


def begin(cfg, clips, ranks) -> State:
    net = model.load(cfg.init, ranks.device, torch.float32, getattr(torch, cfg.dtype)).train()
    check_fit(cfg, clips, net.config)
    net.checkpointing = cfg.recompute
    shard(net, ranks)
    if cfg.mode != "full":
        model.check_causal(net)
    if cfg.compile:
        net.compile_blocks()
    weights = dict(net.named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay,
                                  fused=True)
    for p in weights.values():  # as the first step would make it, so that a checkpoint has where to load to
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    ema = [p.detach().clone() for p in weights.values()] if cfg.ema else []
    totals = torch.zeros(2, NOISE_BINS + len(clips.sizes(None)) + 2, dtype=torch.float64, device=ranks.device)
    return State(net, weights, optimizer, ema, totals, torch.full((), -1, device=ranks.device))


def check_fit(cfg, clips, config):
    frames, channels, height, width = clips.shape
    if channels != config.in_dim or height % model.PATCH or width % model.PATCH:
        raise UserError(f"{cfg.data} holds latents of {channels} channels, {height}x{width}; {cfg.init} "
                        f"takes {config.in_dim}, and multiples of {model.PATCH}")
    if clips.null.shape[1] != config.text_dim:
        raise UserError(f"{cfg.data} holds text of width {clips.null.shape[1]}; {cfg.init} takes "
                        f"{config.text_dim}")


def shard(net, ranks):
    """FSDP2: all state is spread over the ranks, and weights are gathered a block at a time."""
    if ranks.world == 1:
        return
    mesh = dist.device_mesh.init_device_mesh(ranks.device.type, (ranks.world,))
    for part in (*net.blocks, net):  # what stayed gathered would miss the swap to averaged weights
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


# ----------------------------------------------------------------------------------------------------
# checkpoints: out/train/step-N, whole once it holds .metadata, which is written last

def contents(state: State) -> dict:
    moments = {key: {name: state.optimizer.state[p][key] for name, p in state.weights.items()}
               for key in ("exp_avg", "exp_avg_sq")}
    ema = dict(zip(state.weights, state.ema, strict=False))
    return {"model": {k: p.detach() for k, p in state.weights.items()}, **moments, "ema": ema,
            "totals": state.totals}


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    found = [(int(p.parent.name.removeprefix("step-")), p.parent) for p in out.glob("train/step-*/.metadata")]
    return sorted(found)


def save(cfg, state, step: int, ranks):
    finish_save(cfg, state, ranks)
    folder = Path(cfg.out, "train", f"step-{step}")
    dist.all_reduce(state.totals)
    if ranks.device.type == "cuda":  # copies to the CPU, and writes while training goes on
        state.saving = dcp.async_save(contents(state), checkpoint_id=folder)
    else:
        dcp.save(contents(state), checkpoint_id=folder)
        finish_save(cfg, state, ranks)
    if ranks.rank:
        state.totals.zero_()  # rank 0 has them all now


def finish_save(cfg, state, ranks):
    if state.saving:
        state.saving = state.saving.result()
    if ranks.rank == 0:
        for _, old in checkpoints(Path(cfg.out))[:-cfg.keep]:
            (old / ".metadata").unlink()  # first, so that what is half deleted does not count
            shutil.rmtree(old)


def load_newest(cfg, state, ranks) -> int | None:
    """The step gone on from; None at the beginning."""
    if not checkpoints(Path(cfg.out)):
        return None
    step, folder = checkpoints(Path(cfg.out))[-1]
    if step > cfg.steps:
        raise UserError(f"{folder} is beyond --steps {cfg.steps}; choose more steps, or another --out")
    dcp.load(contents(state), checkpoint_id=folder)
    for p in state.weights.values():
        state.optimizer.state[p]["step"].fill_(step)
    if ranks.rank:
        state.totals.zero_()
    return step


def export(cfg, state, ranks):
    """model_k/ in official layout; config.json comes last and says that it is complete."""
    weights = {}
    for name, p in zip(state.weights, state.ema or state.weights.values(), strict=True):
        full = whole(p.detach())
        if ranks.rank == 0:
            weights[name] = full.cpu()
    if ranks.rank == 0:
        model.save(state.net, cfg.out, weights, wan=cfg.wan, mode=cfg.mode, image_first=cfg.image_first,
                   held_out=cfg.held_out, step=cfg.steps)
        print(f"trained: {cfg.out}", flush=True)


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x

# ----------------------------------------------------------------------------------------------------
# what a person sees

def tally(totals, error, loss, batch):
    """Adds a micro-batch to the sums (row 0) and counts (row 1) by noise level, by chunk, and over clips; the
    last column counts what was skipped. Stays on the device."""
    levels = (batch.t * NOISE_BINS / 1000).long().clamp(max=NOISE_BINS - 1)                # [B, F]
    where = torch.cat([levels, NOISE_BINS + batch.chunk.expand_as(levels)]).flatten()
    both = torch.stack([error * batch.mask, batch.mask]).double()                          # [2, B, F]
    totals.index_add_(1, where, both.repeat(1, 2, 1).flatten(1))
    there = batch.mask.amax(1).double()
    totals[:, -2] += torch.stack([loss.double().sum(), there.sum()])
    totals[0, -1] += (1 - there).sum()


class Log:
    """A line for a person, and the same for programs in log.jsonl."""

    def __init__(self, cfg, clips, state, ranks, resumed):
        self.cfg, self.clips, self.state, self.ranks, self.busy = cfg, clips, state, ranks, 0.0
        self.file, self.wandb = Path(cfg.out, "log.jsonl"), None
        if ranks.rank == 0:
            self.cut(-1 if resumed is None else resumed)
            if cfg.wandb:
                import wandb
                self.wandb = wandb.init(project=cfg.wandb, config=dataclasses.asdict(cfg), resume="allow")
        report(cfg, clips, state, ranks, resumed)

    def cut(self, step: int):
        """What was logged after the checkpoint will be logged again."""
        lines = self.file.read_text().splitlines(True) if self.file.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        common.write_text(self.file, "".join(kept))

    @contextlib.contextmanager
    def clock(self):
        began = time.perf_counter()
        yield
        self.busy += time.perf_counter() - began

    def write(self, line: dict):
        if self.ranks.rank:
            return
        with open(self.file, "a") as f:
            f.write(json.dumps(line) + "\n")
        if "held_out" in line:
            print(f"step {line['step']}/{self.cfg.steps} | held-out loss {line['held_out']:.4f}", flush=True)
        if self.wandb:
            self.wandb.log({k: v for k, v in line.items() if not isinstance(v, list)}, line["step"])

    def training(self, step: int, norm):
        cfg, state, ranks = self.cfg, self.state, self.ranks
        with self.clock():  # the device finishes here
            totals = state.totals.clone()
            dist.all_reduce(totals)
            state.totals.zero_()
            (*sums, loss, skipped), (*counts, clips, _) = totals.tolist()
        means = [round(s / n, 6) if n else None for s, n in zip(sums, counts, strict=True)]
        pace, self.busy = self.busy / cfg.log_every, 0.0
        line = {"step": step, "loss": loss / max(clips, 1), "grad_norm": norm.item(),
                "lr": learning_rate(cfg, step - 1), "by_noise": means[:NOISE_BINS],
                "by_chunk": means[NOISE_BINS:], "seconds_per_step": round(pace, 4),
                "clips_per_second": round(cfg.batch / pace, 3),
                "gigabytes": round(memory_used(ranks.device), 2)}
        if peak := common.peak_flops(ranks.device):
            done = 3 * model.forward_flops(state.net.config, self.clips.layout()) * cfg.batch / ranks.world
            line["mfu"] = round(done / pace / peak, 4)
        if skipped:
            line["skipped"] = int(skipped)
        self.write(line)
        left = time.strftime("%H:%M:%S", time.gmtime((cfg.steps - step) * pace))
        days = f"{int((cfg.steps - step) * pace // 86400)} d " * ((cfg.steps - step) * pace >= 86400)
        print0(f"step {step}/{cfg.steps} | loss {line['loss']:.4f} | norm {line['grad_norm']:.2f} | "
               f"lr {line['lr']:.2g} | {pace:.3g} s/step | {line['clips_per_second']:.3g} clips/s"
               + (f" | MFU {line['mfu']:.1%}" if "mfu" in line else "")
               + f" | {line['gigabytes']:.1f} GB | {days}{left} left"
               + (f" | {line['skipped']} clips skipped" if skipped else ""))


def report(cfg, clips, state, ranks, resumed):
    size = sum(p.numel() for p in state.weights.values())
    print0(f"{cfg.mode}: {size / 1e6:,.1f} M weights from {cfg.init}, on {len(clips.seed):,} seed and "
           f"{len(clips.corrective):,} corrective clips ({len(clips.held_out)} held out) of "
           f"{'x'.join(map(str, clips.shape))}")
    print0(f"{cfg.steps:,} steps of {cfg.batch} clips on {ranks.world} x {device_name(ranks.device)}, "
           f"{cfg.micro} at a time, in {cfg.dtype}"
           + "; every frame's past checked: causal, cached as in parallel" * (cfg.mode != "full"))
    per_weight = (16 + 4 * bool(cfg.ema)) / ranks.world
    activations = cfg.micro * model.activation_bytes(state.net, clips.layout()[-1][1])
    print0(f"memory, by estimate: {size * per_weight / 1e9:.1f} GB for weights, gradients, moments"
           f"{' and average' * bool(cfg.ema)}, {activations / 1e9:.1f} GB for activations")
    if resumed is not None:
        print0(f"going on from step {resumed}")


def device_name(device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def memory_used(device) -> float:
    """GB at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@contextlib.contextmanager
def averaged(state):
    """The network with the averaged weights, if there are any, which are what model_k will hold."""
    def swap():
        for p, average in zip(state.weights.values(), state.ema, strict=False):
            kept = p.detach().clone()
            p.data.copy_(average)
            average.copy_(kept)
    with torch.no_grad():
        swap()
        yield state.net
        swap()


def held_out_loss(cfg, clips, state, ranks) -> float:
    """At noise levels and noise that are the same at every step and in every round."""
    rounds, sums = math.ceil(len(clips.held_out) / ranks.world), torch.zeros(2, device=ranks.device)
    with averaged(state) as net:
        for k in range(rounds):  # as many for every rank: they gather the weights together
            place = k * ranks.world + ranks.rank
            i = clips.held_out[min(place, len(clips.held_out) - 1)]
            batch = clips.batch([(i, ("held out", place))], clips.sizes(None), held_out=True).to(ranks.device)
            loss = clip_losses(errors(cfg, net, batch), batch.weight)
            sums += (place < len(clips.held_out)) * torch.stack([loss[0], batch.mask.max()])
    dist.all_reduce(sums)
    return (sums[0] / sums[1].clamp(min=1)).item()


def preview(cfg, clips, state, step: int, ranks):
    """Videos of the first held-out prompts, by the sampler that sample.py uses; the same noise every time."""
    chosen, (frames, *shape) = (clips.held_out or clips.seed)[:cfg.previews], clips.shape
    folder, strips = Path(cfg.out, "preview"), []
    folder.mkdir(parents=True, exist_ok=True)
    coder = vae.load(cfg.wan, ranks.device, getattr(torch, cfg.dtype))
    chunk, window = (frames, 2 * frames) if cfg.mode == "full" else (CHUNK, frames)
    sampling = diffusion.Sampling(shift=cfg.shift, guidance=cfg.guidance)
    with averaged(state) as net:
        for k in range(0, len(chosen), ranks.world):
            place = min(k + ranks.rank, len(chosen) - 1)
            clip = clips.load(chosen[place])
            chunks = diffusion.generate(
                net, [clip["text"].float()], clips.null, sampling, shape=shape, ids=[place], frames=frames,
                chunk=chunk, window=window, keep=chunk)
            latents = torch.cat([z for _, z in chunks], 1)
            if k + ranks.rank == place:  # else another rank makes it
                video = data.to_uint8(coder.decode(latents.to(next(coder.parameters()).dtype))[0])
                path = folder / f"step-{step:06d}-{place}.mp4"
                data.write_video(path, [video], clips.meta["fps"], {"prompt": clip["prompt"], "step": step})
                strips.append((place, video[torch.linspace(0, len(video) - 1, 8).long()].cpu()))
    rows = sorted(common.gathered(strips, ranks), key=lambda row: row[0])
    if ranks.rank == 0:
        data.film_strip(folder / f"step-{step:06d}.png", [video for _, video in rows], height=128)
    print0(f"step {step}/{cfg.steps} | preview in {folder}")


# ----------------------------------------------------------------------------------------------------
# the end, wanted or not

def catch_signals() -> list[int]:
    """The first Ctrl-C or SIGTERM ends the run after its step, with a checkpoint; a second one at once."""
    caught = []

    def catch(number, _):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, catch)
    return caught


def agreed(caught) -> int:
    """The signal that any rank has caught, or 0. Ranks meet on the CPU; no device is waited for."""
    number = torch.tensor(max(caught, default=0))
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def stop_if_broken(cfg, clips, state, ranks):
    step = int(state.broken)
    if step < 0:
        return
    names, broken = [], []
    for share in itertools.takewhile(lambda share: share[0] == step, shares(cfg, ranks, step)):
        batch = clips.micro_batch(share).to(ranks.device)
        with torch.no_grad():
            finite = clip_losses(errors(cfg, state.net, batch), batch.weight).isfinite()
        names += batch.ids
        broken += [id for id, fine in zip(batch.ids, finite.tolist(), strict=True) if not fine]
    names, broken = common.gathered(names, ranks), common.gathered(broken, ranks)
    newest = checkpoints(Path(cfg.out))
    raise UserError(
        f"step {step + 1}: the gradient is not finite; the weights were left as they were before it.\n"
        + (f"The loss is not finite on {', '.join(broken)}" if broken else f"Its clips: {', '.join(names)}")
        + (f"; the newest checkpoint is {newest[-1][1]}" if newest else "; there is no checkpoint yet"))


if __name__ == "__main__":
    common.run(main, Config, __doc__)
