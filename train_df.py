"""Stage 1: agg_k/ -> model_k/, by diffusion forcing: every chunk of a clip is noised to a level of its own.

    torchrun --nproc-per-node 8 train_df.py --data agg_0        from the Wan that made agg_0, into model_0
    python train_df.py --data agg_0                             the same, in one process

A seed clip carries loss on all its chunks. A corrective clip (a reversed rollout: drifted, then real) begins
with 4 clean chunks without loss; the others, 3 in a clip of 81 frames, teach the way back from drift. Clips
may be of any length (prepare.py --frames 249), all of one; model_k then runs in windows of that length.

Killed and started again by the same command, it goes on from its newest checkpoint, on any number of GPUs.
What is trained at a step is a function of (seed, step) alone. model_k/ is a Wan directory when it is done.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import signal
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from flags import HELD_OUT, Amount, Count, Decay, Device, Dtype, Positive, Share, Whole, in_range, parse

CHUNK = 3  # latent frames
NOISE_BINS = 10  # the loss is logged by noise level too, in bins of 100


@dataclass
class Config:
    data: str  # Folder of clips (agg_k), made by prepare.py or aggregate.py
    # Weights to begin with: a Wan directory, another model_k, or a file (default: the Wan directory that made
    # the clips)
    init: str | None = None
    # LoRA files to merge into --init before it is trained: FILE, or FILE:STRENGTH
    lora: tuple[str, ...] = ()
    # Train only a LoRA of this rank, of attention and feed-forward; --init stays as it is, in --dtype, and
    # model_k holds the LoRA alone (default: all weights are trained)
    lora_rank: Count | None = None
    # Folder for model_k, its checkpoints, log.jsonl and preview/ (default: model_k beside agg_k)
    out: str | None = None
    # Wan directory whose VAE shows the previews (default: the one that made the clips)
    wan: str | None = None
    # df: diffusion forcing; tf: teacher forcing, where a chunk sees its clean past; rf: Resampling Forcing,
    # where it sees the model's own version of its past; full: bidirectional, one noise level for a clip
    mode: Literal["df", "tf", "rf", "full"] = "df"
    steps: Count = 16000  # Optimiser steps in all
    batch: Count = 96  # Clips per step, over all GPUs
    micro: Count = 1  # Clips that a GPU computes at once; changes memory and speed, not what is trained
    lr: Amount = 4e-6  # Learning rate, constant after the warm-up
    warmup: Whole = 0  # Steps over which the learning rate rises from 0
    weight_decay: Amount = 0.01  # Weight decay of AdamW
    beta2: Decay = 0.999  # Second beta of AdamW; the first is 0.9
    clip: Positive = 1.0  # Largest norm of the gradient
    ema: Decay = 0.0  # Decay of a running average of the weights, which model_k then holds; 0: no average
    shift: Positive = 8.0  # Shift of the noise levels towards pure noise
    drop: Share = 0.1  # Share of clips that lose their prompt, so that guidance works
    drop_kind: Literal["both", "seed"] = "both"  # Which clips may lose their prompt: all, or seed clips only
    prefix: Whole = 4  # Chunks at the start of a corrective clip that are clean and carry no loss
    seed_prefix: Share = 0.0  # Share of seed clips that get such a prefix too
    # Share of steps whose clips begin with a chunk of 1 frame, as image to video does
    image_first: Share = 0.0
    # Share of corrective clips in training, 0 to 1 (default: their share of the data)
    corrective_share: Share | None = None
    # How the loss is averaged. clip: over the latents of a clip that carry loss, then over clips; latent:
    # over all latents alike, so that a corrective clip of 81 frames counts 9/21 of a seed clip
    loss_mean: Literal["clip", "latent"] = "clip"
    # Weight of the loss by noise level. bell: largest at 500, zero at 1000
    loss_weight: Literal["flat", "bell"] = "flat"
    # Seed clips kept out of training and rollouts; their loss can be compared between rounds
    held_out: Whole = HELD_OUT
    # Mode rf. ar: the past is resampled chunk by chunk, each behind resampled ones; parallel: behind clean
    # ones; noise: the past is only noised
    rf_history: Literal["ar", "parallel", "noise"] = "ar"
    rf_shift: Positive = 0.6  # Mode rf: shift of the noise levels from which the past is resampled
    rf_steps: Count = 1  # Mode rf: Euler steps from there to clean
    rf_warmup: Whole = 0  # Mode rf: steps of teacher forcing before the first resampling
    # Past chunks that each token attends to, those that suit it best; 0: all (default: as --init was trained)
    route: Whole | None = None
    seed: int = 0  # Seed of the order of clips, their noise, noise levels and dropped prompts
    log_every: Count = 10  # Steps between lines of the log
    eval_every: Count = 500  # Steps between measurements of the held-out loss
    preview_every: Whole = 1000  # Steps between preview videos; 0: no previews
    previews: Count = 2  # Videos per preview, of the first held-out prompts
    guidance: float = 6.0  # Guidance scale of the previews
    save_every: Count = 500  # Steps between checkpoints
    keep: Count = 2  # Checkpoints to keep
    skip_bad: bool = False  # Leave out clips that cannot be read, and count them, instead of stopping
    wandb: str = ""  # Weights & Biases project to log to as well
    # Recompute activations in the backward pass, to save memory (default: on a GPU)
    recompute: bool | None = None
    # Spread weights, gradients and moments over the ranks, instead of a whole copy on each (default: with
    # several ranks, and more than 100 million weights)
    shard: bool | None = None
    compile: bool | None = None  # Compile the transformer blocks (default: on a GPU)
    # Number format of the matrix products; trained weights stay float32 (default: bfloat16 on a GPU, else
    # float32)
    dtype: Dtype | None = None
    device: Device | None = None  # cuda or cpu (default: cuda if available)

    __post_init__ = in_range


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    cfg = parse(Config, __doc__)

import torch
import torch.distributed as dist

import checkpoint
import common
import data
import diffusion
import files
import locate
import lora
import model
import records
import vae
from checkpoint import State, checkpoints, whole
from common import UserError, print0
from history import HISTORIES, draw_level


def main(cfg: Config):
    ranks = common.start_ranks(cfg.device)
    caught = catch_signals()
    cfg = complete(cfg, ranks)
    samples = Samples(cfg)
    check(cfg, samples, ranks)
    if finished(cfg, samples, ranks):
        return print0(f"{cfg.out} is trained already: {cfg.steps} steps")
    memory = foresee(cfg, samples, ranks)
    state = begin(cfg, samples, ranks)
    resumed = checkpoint.load_newest(state, cfg.out, cfg.steps, ranks)
    first = resumed or 0
    log = Log(cfg, samples, state, ranks, resumed)
    if memory:
        print0(f"memory of a process, predicted: {memory.exception() or memory.result()}")

    micro = common.ahead(samples.micro_batch, shares(cfg, ranks, first))
    for step in range(first, cfg.steps + 1):
        last = step == cfg.steps
        new = step != resumed  # what a checkpoint knows is not done again
        if new and samples.held_out and (step % cfg.eval_every == 0 or last):
            log.write({"step": step, "held_out": held_out_loss(cfg, samples, state, ranks)})
        if new and cfg.preview_every and (step % cfg.preview_every == 0 or last):
            preview(cfg, samples, state, step, ranks)
        stop = agreed(caught)
        if new and step and (step % cfg.save_every == 0 or last or stop):
            stop_if_broken(cfg, samples, state, ranks)
            checkpoint.save(state, cfg.out, step, cfg.keep, ranks)
        if last or stop:
            break

        with log.clock():
            norm = train_step(cfg, state, micro, step, ranks)
        if (step + 1) % cfg.log_every == 0:
            stop_if_broken(cfg, samples, state, ranks)
            log.training(step + 1, norm)
    checkpoint.finish_save(state, cfg.out, cfg.keep, ranks)
    if stop and not last:
        print0(f"stopped after step {step}; the same command goes on from there")
        return 128 + stop
    export(cfg, samples, state, ranks)


def train_step(cfg, state, micro, step: int, ranks):
    """One optimiser step, over as many micro-batches as the batch takes. Never waits for the device."""
    state.optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)
    for _ in range(math.ceil(cfg.batch // ranks.world / cfg.micro)):
        batch = next(micro)[1].to(ranks.device)
        error = errors(cfg, state.net, batch)                                              # [B, F]
        loss = clip_losses(error, batch.weight)                                            # [B]
        # the mean over the global batch, since gradients are averaged over ranks: with shards at every micro-
        # batch, since until then each rank holds whole ones, 5.7 GB of 1.3B and 57 GB of 14B
        (loss.sum() * ranks.world / cfg.batch).backward()
        tally(state.totals, error.detach(), loss.detach(), batch)
    if ranks.world > 1 and not cfg.shard:
        average([p.grad for p in state.weights.values()], ranks)
    norm = whole(torch.nn.utils.clip_grad_norm_(state.weights.values(), cfg.clip, foreach=True))
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


def average(gradients: list[torch.Tensor], ranks):
    """Over the ranks, in one message."""
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    parts = (flat / ranks.world).split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def errors(cfg, net, batch) -> torch.Tensor:
    """Eq. 2 for a flow: the squared error of every latent frame's predicted velocity, [B, F]."""
    x = diffusion.add_noise(batch.x0, batch.noise, batch.t)                                # Eq. 1
    history = HISTORIES[cfg.mode](cfg, net, batch)
    v = net(x, batch.t, batch.text, chunk=batch.sizes, clean=history)
    return (v - diffusion.velocity(batch.x0, batch.noise)).square().mean((2, 3, 4))


def clip_losses(error, weight) -> torch.Tensor:
    """[B]; with the flags' defaults the mean over each clip's loss-bearing latents."""
    return (error * weight).sum(1)


def clean_prefix(t, mask, sizes):
    """Section 3.2: chunks of these sizes that begin a clip are shown clean and carry no loss. They are the
    drifted states, whose distribution is not to be learnt, only what follows them."""
    frames = sum(sizes)
    t[:frames] = 0
    mask[:frames] = 0


def learning_rate(cfg, step: int) -> float:
    return cfg.lr * min(1, (step + 1) / max(cfg.warmup, 1))


# ----------------------------------------------------------------------------------------------------
# training samples: at every position of an endless sequence a clip, its noise levels and its noise, as a
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
    level: torch.Tensor | None = None  # mode rf: [B], the noise level from which the past is resampled, 0..1
    level_noise: torch.Tensor | None = None  # like noise

    def to(self, device):
        return self._make(x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in self)


class Samples:
    """The clips of --data, as they are trained on."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.store = data.Clips(cfg.data)
        self.meta = self.store.meta()
        self.shape = tuple(self.meta["latents"])                                           # F, C, H, W
        self.null = data.read_text_embedding(self.store.empty_prompt()).float()
        self.held_out = data.held_out(self.store, cfg.held_out)
        self.seed, self.corrective = self.sort()
        self.all = self.seed + self.corrective
        if len(self.store) * math.prod(self.shape) < 2**27:  # a toy's clips are read once and stay in memory
            self.load = functools.cache(self.load)

    def sort(self) -> tuple[list[int], list[int]]:
        """The places of the seed and of the corrective clips, without those held out and what became of them:
        a held-out clip is rolled out only if rollout.py was told to hold out fewer."""
        unseen = {self.store[i]["id"] for i in self.held_out}
        places = {"seed": [], "corrective": []}
        for i, clip in enumerate(self.store):
            if clip["kind"] not in places:
                raise UserError(f"{self.store.index}:{i + 1}: a {clip['kind']} is not to be trained on; "
                                "aggregate.py makes corrective clips of rollouts")
            if data.origin(clip) not in unseen:
                places[clip["kind"]].append(i)
        return places["seed"], places["corrective"]

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
        cfg, frames = self.cfg, self.shape[0]
        if cfg.mode == "full":
            return (frames,)
        image = torch.rand((), generator=common.rng(cfg.seed, "image first", step)) < cfg.image_first
        first = 1 if image and step is not None else CHUNK
        return (first,) + (CHUNK,) * (frames // CHUNK - 1)

    def layout(self) -> tuple:
        """Who sees whom in training, for counting what it costs."""
        _, _, height, width = self.shape
        kind = model.teacher_layout if self.cfg.mode not in ("df", "full") else model.causal_layout
        return kind(self.sizes(None), height * width // model.PATCH**2)

    def micro_batch(self, share) -> Batch:
        step, positions = share
        chosen = [(self.at(p), ("sample", p)) for p in positions]
        return self.batch(chosen, self.sizes(step), warm=step >= self.cfg.rf_warmup)

    def batch(self, chosen, sizes, held_out=False, warm=True) -> Batch:
        """chosen: [(clip, names of its randomness), ...]; warm: mode rf is beyond its warm-up."""
        rows = [self.sample(i, sizes, names, held_out) for i, names in chosen]
        *tensors, texts, ids = zip(*rows, strict=True)
        stacked = [torch.stack(x) for x in tensors]
        stacked.append(model.pad_text(texts))
        stacked.append(torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)))
        resampling = []
        if self.cfg.mode == "rf" and warm:
            draws = [self.resampling(sizes, names) for _, names in chosen]
            resampling = [torch.stack(x) for x in zip(*draws, strict=True)]
        if torch.cuda.is_available():
            stacked = [x.pin_memory() for x in stacked]
            resampling = [x.pin_memory() for x in resampling]
        return Batch(*stacked, sizes, list(ids), *resampling)

    def resampling(self, sizes, names):
        """A clip's level and noise for mode rf."""
        g = common.rng(self.cfg.seed, "resampling", *names)
        return draw_level(g, self.cfg.rf_shift), torch.randn(sum(sizes), *self.shape[1:], generator=g)

    def sample(self, i: int, sizes, names, held_out: bool):
        """x0, noise, t, mask, weight, text, id of a clip."""
        cfg, frames = self.cfg, sum(sizes)
        g = common.rng(cfg.seed, *names)
        noise = torch.randn(frames, *self.shape[1:], generator=g)
        steps = torch.randint(1000, (len(sizes),), generator=g)  # of a grid of 1000, a level for each chunk
        t = 1000 * diffusion.shifted(1 - steps / 1000, cfg.shift).repeat_interleave(torch.tensor(sizes))
        prefix_draw, drop_draw = torch.rand(2, generator=g)
        mask = torch.ones(frames)
        clip = self.load_or_skip(i)
        if clip is None:
            return torch.zeros_like(noise), noise, t, mask * 0, mask * 0, self.null, "skipped"
        kind, text = clip["kind"], clip["text"].float()
        if kind == "corrective" or (prefix_draw < cfg.seed_prefix and not held_out):
            clean_prefix(t, mask, sizes[:cfg.prefix])
        if drop_draw < cfg.drop and cfg.drop_kind in ("both", kind) and not held_out:
            text = self.null
        weight = mask / (frames if cfg.loss_mean == "latent" else mask.sum())
        if cfg.loss_weight == "bell" and not held_out:
            weight = weight * diffusion.bell_weight(t, cfg.shift)
        return clip["latents"][:frames].float(), noise, t, mask, weight, text, clip["id"]

    def load_or_skip(self, i: int) -> dict | None:
        try:
            return self.load(i)
        except (UserError, OSError) as error:
            if not self.cfg.skip_bad:
                raise UserError(f"{error}\nIt is clip {i + 1} of {self.store.index}; --skip-bad leaves such "
                                "clips out") from None
        return None

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
        for positions in common.batched(mine, cfg.micro):
            yield step, positions


# ----------------------------------------------------------------------------------------------------
# setting up

# what may differ when a run goes on: where, how fast and how far it runs, and what it shows
CHANGEABLE = {"data", "init", "lora", "out", "wan", "steps", "micro", "log_every", "eval_every",
              "preview_every", "previews", "guidance", "save_every", "keep", "skip_bad", "wandb", "recompute",
              "shard", "compile", "device"}


def complete(cfg: Config, ranks) -> Config:
    """Fills in what depends on the device and the data."""
    clips = data.Clips(cfg.data)
    made_with = locate.named(clips.meta().get("wan", ""), clips.folder)
    out = cfg.out or common.neighbour(cfg.data, "model", "out")
    wan = str(Path(locate.local(cfg.wan or made_with, "vae")).resolve())
    cfg = dataclasses.replace(cfg, init=locate.local(cfg.init or made_with, "transformer"), out=out, wan=wan)
    cfg = dataclasses.replace(cfg, route=route_of(cfg), shard=sharded(cfg, ranks))
    return common.for_device(cfg, ranks.device)


def sharded(cfg: Config, ranks) -> bool:
    if ranks.world == 1 or cfg.shard is not None:
        return ranks.world > 1 and cfg.shard
    return large(cfg)


def large(cfg: Config) -> bool:
    return sum(math.prod(w.shape) for w in model.read_checkpoint(cfg.init, cfg.lora)[0].values()) > 1e8


def route_of(cfg: Config) -> int | None:
    """--route, or that of --init; None: all past chunks are attended to."""
    if cfg.route is None and cfg.mode != "full":
        return model.settings(cfg.init).get("route")
    return cfg.route or None


def check(cfg: Config, samples: Samples, ranks):
    """Refuses what cannot be trained, before anything large is loaded."""
    if cfg.route is not None and cfg.mode == "full":
        raise UserError(f"--route {cfg.route} --mode full: that mode has no past chunks")
    if cfg.batch % ranks.world:
        less = cfg.batch // ranks.world * ranks.world
        raise UserError(f"--batch {cfg.batch} cannot be shared by {ranks.world} processes; use "
                        f"{less or ranks.world} or {less + ranks.world}")
    if cfg.preview_every:
        try:
            vae.find(Path(cfg.wan))
        except UserError as error:
            raise UserError(f"{error}\nPreviews need a VAE: give --wan DIR, or --preview-every 0") from None
    check_data(cfg, samples)
    check_fit(cfg, samples, model.read_checkpoint(cfg.init, cfg.lora)[1])


def check_data(cfg, samples):
    """Do the clips suit the mode, and are there enough?"""
    frames, seed, corrective = samples.shape[0], len(samples.seed), len(samples.corrective)
    if frames % CHUNK and cfg.mode != "full":
        raise UserError(f"{cfg.data} has clips of {frames} latent frames, no multiple of {CHUNK}")
    if cfg.mode == "full" and (corrective or cfg.seed_prefix or cfg.image_first):
        raise UserError("--mode full knows no prefix and no chunks: it is for seed clips alone, without "
                        "--seed-prefix and --image-first")
    if (corrective or cfg.seed_prefix) and cfg.prefix >= frames // CHUNK:
        raise UserError(f"{cfg.data} has clips of {frames // CHUNK} chunks; a --prefix of {cfg.prefix} "
                        "leaves nothing to learn")
    share = cfg.corrective_share
    lacks_seed = share is not None and share < 1 and not seed
    lacks_corrective = share and not corrective
    if lacks_seed or lacks_corrective or not samples.all:
        raise UserError(f"{cfg.data} has {seed} seed and {corrective} corrective clips to train on, beside "
                        f"{len(samples.held_out)} held out: too few")


def check_fit(cfg, samples, config):
    """Are the clips what the network takes?"""
    _, channels, height, width = samples.shape
    if channels != config.in_dim or height % model.PATCH or width % model.PATCH:
        raise UserError(f"{cfg.data} holds latents of {channels} channels, {height}x{width}; {cfg.init} "
                        f"takes {config.in_dim}, and multiples of {model.PATCH}")
    if samples.null.shape[1] != config.text_dim:
        raise UserError(f"{cfg.data} holds text of width {samples.null.shape[1]}; {cfg.init} takes "
                        f"{config.text_dim}")


def finished(cfg, samples, ranks) -> bool:
    """Makes --out this run's own, or refuses it as another's. True: the run is complete."""
    recipe = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in CHANGEABLE}
    recipe |= {"init": common.fingerprint(*model.find_weights(cfg.init)), "lora": lora.fingerprint(cfg.lora),
               "data": common.fingerprint(samples.store.index)}

    def begin():
        files.own(cfg.out, "a model")
        common.claim(Path(cfg.out, "run.json"), recipe, command=sys.argv, torch=torch.__version__)
        checkpoint.sweep(cfg.out)
    common.lead(ranks, begin)
    return checkpoint.finished(cfg.out, cfg.steps, ranks)


def begin(cfg, samples, ranks) -> State:
    """The network, spread over the ranks, and its optimiser."""
    net = set_up(cfg, model.load(cfg.init, ranks.device, *formats(cfg), cfg.lora), ranks)
    if cfg.mode != "full":
        model.check_causal(net)
    if cfg.compile:
        net.compile_blocks()
    return new_state(cfg, net, samples.sizes(None), ranks)


def formats(cfg) -> tuple[torch.dtype, torch.dtype]:
    """In which the weights of products are stored, and in which products are computed."""
    compute = getattr(torch, cfg.dtype)
    return compute if cfg.lora_rank else torch.float32, compute


def set_up(cfg, net, ranks) -> model.WanModel:
    net.train()
    if cfg.lora_rank:
        lora.attach(net, cfg.lora_rank, cfg.seed)
    net.checkpointing = cfg.recompute
    net.route = cfg.route
    if cfg.shard:
        shard(net, ranks)
    return net


def new_state(cfg, net, sizes, ranks) -> State:
    weights = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay,
                                  fused=True)
    for p in weights.values():  # as the first step would make it, so that a checkpoint has where to load to
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    ema = [p.detach().clone() for p in weights.values()] if cfg.ema else []
    totals = torch.zeros(2, NOISE_BINS + len(sizes) + 2, dtype=torch.float64, device=ranks.device)
    return State(net, weights, optimizer, ema, totals, torch.full((), -1, device=ranks.device))


def shard(net, ranks):
    """FSDP2: all state is spread over the ranks, and weights are gathered a block at a time: those of its
    products in the format that they are computed in. Its norms and modulation are computed in fp32, and are
    gathered with the rest of the network. Gradients are averaged in fp32."""
    # imported here: it takes a second, which no small training should wait for
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor
    mesh = dist.device_mesh.init_device_mesh(ranks.device.type, (ranks.world,))
    products = [layer for layer in net.blocks.modules() if isinstance(layer, torch.nn.Linear)]
    # what stayed gathered would miss the swap to averaged weights
    spread = functools.partial(fully_shard, mesh=mesh, reshard_after_forward=True)
    spread(net, ignored_params={p for layer in products for p in layer.parameters()})
    policy = MixedPrecisionPolicy(net.compute, torch.float32, cast_forward_inputs=False)
    for block in net.blocks:
        rest = {p for p in block.parameters() if isinstance(p, DTensor)}
        spread(block, mp_policy=policy, ignored_params=rest)


def export(cfg, samples, state, ranks):
    """model_k/ in official layout; config.json comes last and says that it is complete."""
    weights = {}
    for name, p in zip(state.weights, state.ema or state.weights.values(), strict=True):
        full = whole(p.detach())
        if ranks.rank == 0:
            weights[name] = full.cpu()
    if ranks.rank == 0:
        model.save(state.net, cfg.out, weights, wan=locate.portable(cfg.wan, cfg.out), mode=cfg.mode,
                   image_first=cfg.image_first, held_out=cfg.held_out, route=cfg.route,
                   window=samples.shape[0], step=cfg.steps, **changed_model(cfg))
        print(f"trained: {cfg.out}", flush=True)


def changed_model(cfg) -> dict:
    """For config.json: what a LoRA changes. Paths are relative to the folder, and whole weights name none."""
    if not cfg.lora_rank:
        return {}
    loras = [(locate.portable(file, cfg.out), strength) for file, strength in map(lora.split, cfg.lora)]
    return {"base": locate.portable(cfg.init, cfg.out), "base_loras": loras, "lora_rank": cfg.lora_rank}


# ----------------------------------------------------------------------------------------------------
# the log, the held-out loss and previews

def tally(totals, error, loss, batch):
    """Adds a micro-batch to the sums (row 0) and counts (row 1) by noise level, by chunk, and over clips; the
    last column counts what was skipped. Stays on the device."""
    levels = (batch.t * NOISE_BINS / 1000).long().clamp(max=NOISE_BINS - 1)                # [B, F]
    where = torch.cat([levels, NOISE_BINS + batch.chunk.expand_as(levels)]).flatten()
    both = torch.stack([error * batch.mask, batch.mask]).double()                          # [2, B, F]
    totals.index_add_(1, where, both.repeat(1, 2, 1).flatten(1))
    counted = batch.mask.amax(1).double()  # 0 for a clip that was skipped
    totals[:, -2] += torch.stack([loss.double().sum(), counted.sum()])
    totals[0, -1] += (1 - counted).sum()


class Log:
    """A line for a person, and the same for programs in log.jsonl."""

    def __init__(self, cfg, samples, state, ranks, resumed):
        self.cfg, self.samples, self.state, self.ranks = cfg, samples, state, ranks
        self.busy = 0.0  # seconds of training since the last line
        self.file = Path(cfg.out, "log.jsonl")
        self.wandb = None
        if ranks.rank == 0:
            self.cut(-1 if resumed is None else resumed)
            if cfg.wandb:
                try:
                    import wandb
                except ImportError:
                    raise UserError(f"--wandb {cfg.wandb}: pip install wandb first") from None
                self.wandb = wandb.init(project=cfg.wandb, config=dataclasses.asdict(cfg), resume="allow")
        print_setting(cfg, samples, state, ranks, resumed)

    def cut(self, step: int):
        """What was logged after the checkpoint will be logged again."""
        kept = []
        for number, line in records.lines(self.file) if self.file.exists() else ():
            if not line.endswith("\n"):  # it was being written when the run was killed
                continue
            try:
                logged = records.parse(line, f"{self.file}:{number}", {"step": int})["step"]
            except UserError as error:
                print(f"warning: {error}; the line is left out", flush=True)
                continue
            kept += [line] * (logged <= step)
        files.write_text(self.file, "".join(kept))

    @contextlib.contextmanager
    def clock(self):
        began = time.perf_counter()
        yield
        self.busy += time.perf_counter() - began

    def write(self, line: dict):
        if self.ranks.rank:
            return
        files.append(self.file, json.dumps(line) + "\n")
        print(as_text(line, self.cfg.steps), flush=True)
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
        pace = self.busy / cfg.log_every
        self.busy = 0.0
        line = {"step": step, "loss": loss / max(clips, 1), "grad_norm": norm.item(),
                "lr": learning_rate(cfg, step - 1), "by_noise": means[:NOISE_BINS],
                "by_chunk": means[NOISE_BINS:], "seconds_per_step": round(pace, 4),
                "clips_per_second": round(cfg.batch / pace, 3),
                "gigabytes": round(common.memory_used(ranks.device), 2)}
        if peak := common.peak_flops(ranks.device):
            flops = clip_flops(cfg, self.samples, state.net.config, step > cfg.rf_warmup)
            line["mfu"] = round(flops * cfg.batch / ranks.world / pace / peak, 4)
        if skipped:
            line["skipped"] = int(skipped)
        self.write(line)


def clip_flops(cfg, samples, config, resampling=True) -> int:
    """FLOPs to train on a clip: a forward pass, twice as much for the backward pass and, in mode rf, what it
    takes to resample the past."""
    layout = samples.layout()
    flops = 3 * model.forward_flops(config, layout, cfg.route)
    if cfg.mode == "rf" and resampling and cfg.rf_history == "parallel":
        flops += cfg.rf_steps * model.forward_flops(config, layout, cfg.route)
    sizes = samples.sizes(None)
    if cfg.mode == "rf" and resampling and cfg.rf_history == "ar" and len(sizes) > 1:
        past = model.causal_layout(sizes[:-1], layout[0][1] // sizes[0])
        # a chunk is denoised, and once more put into the cache
        flops += (cfg.rf_steps + 1) * model.forward_flops(config, past, cfg.route)
    return flops


def as_text(line: dict, steps: int) -> str:
    """A line of the log for a person."""
    parts = [f"step {line['step']}/{steps}"]
    if "held_out" in line:
        return f"{parts[0]} | held-out loss {line['held_out']:.4f}"
    pace = line["seconds_per_step"]
    days, seconds = divmod(int((steps - line["step"]) * pace), 86400)
    left = time.strftime("%H:%M:%S", time.gmtime(seconds))
    parts += [f"loss {line['loss']:.4f}", f"norm {line['grad_norm']:.2f}", f"lr {line['lr']:.2g}",
              f"{pace:.3g} s/step", f"{line['clips_per_second']:.3g} clips/s"]
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.1%}")
    parts.append(f"{line['gigabytes']:.1f} GB")
    parts.append(f"{days} d {left} left" if days else f"{left} left")
    if "skipped" in line:
        parts.append(f"{line['skipped']} clips skipped")
    return " | ".join(parts)


def print_setting(cfg, samples, state, ranks, resumed):
    size = sum(p.numel() for p in state.weights.values())
    print0(f"{cfg.mode}: {size / 1e6:,.1f} M weights from {cfg.init}, on {len(samples.seed):,} seed and "
           f"{len(samples.corrective):,} corrective clips ({len(samples.held_out)} held out) of "
           f"{'x'.join(map(str, samples.shape))}")
    checked = "" if cfg.mode == "full" else "; every frame's past checked: causal, cached as in parallel"
    print0(f"{cfg.steps:,} steps of {cfg.batch} clips on {ranks.world} x {common.device_name(ranks.device)}, "
           f"{cfg.micro} at a time, in {cfg.dtype}{checked}")
    if resumed is not None:
        print0(f"going on from step {resumed}")


def foresee(cfg, samples, ranks) -> Future | None:
    """What the training of a large model takes, in words: by a process of its own, while this one loads."""
    if ranks.rank or not large(cfg):
        return None
    config = model.read_checkpoint(cfg.init, cfg.lora)[1]
    device = "cpu" if ranks.device.type == "cpu" else None
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    future = pool.submit(foreseen, cfg, config, samples.shape, ranks.world, device)
    pool.shutdown(wait=False)
    return future


def foreseen(*given) -> str:
    import plan  # all that bench.py plan needs, and training does not
    return plan.training_in_words(*given)


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


def held_out_loss(cfg, samples, state, ranks) -> float:
    """At noise levels and noise that are the same at every step and in every round."""
    count = len(samples.held_out)
    sums = torch.zeros(2, device=ranks.device)
    with averaged(state) as net:
        for k in range(0, count, ranks.world):  # as many for every rank: they gather the weights together
            place = k + ranks.rank
            clip = samples.held_out[min(place, count - 1)]
            batch = samples.batch([(clip, ("held out", place))], samples.sizes(None), held_out=True)
            batch = batch.to(ranks.device)
            loss = clip_losses(errors(cfg, net, batch), batch.weight)
            if place < count:
                sums += torch.stack([loss[0], batch.mask.max()])
    dist.all_reduce(sums)
    return (sums[0] / sums[1].clamp(min=1)).item()


def preview(cfg, samples, state, step: int, ranks):
    """Videos of the first held-out prompts, by the sampler that sample.py uses; the same noise every time."""
    chosen = (samples.held_out or samples.seed)[:cfg.previews]
    frames, *shape = samples.shape
    strips = []
    folder = Path(cfg.out, "preview")
    folder.mkdir(parents=True, exist_ok=True)
    coder = vae.load(cfg.wan, ranks.device, getattr(torch, cfg.dtype))
    chunk = None if cfg.mode == "full" else CHUNK
    sampling = diffusion.Sampling(shift=cfg.shift, guidance=cfg.guidance)
    with averaged(state) as net:
        for k in range(0, len(chosen), ranks.world):
            place = min(k + ranks.rank, len(chosen) - 1)
            clip = samples.load(chosen[place])
            chunks = diffusion.generate(
                net, [clip["text"].float()], samples.null, sampling, shape=shape, ids=[place], frames=frames,
                chunk=chunk, window=frames, keep=CHUNK)
            latents = torch.cat([z for _, z in chunks], 1)
            if k + ranks.rank == place:  # else another rank makes it
                video = data.to_uint8(coder.decode(latents.to(next(coder.parameters()).dtype))[0])
                path = folder / f"step-{step:06d}-{place}.mp4"
                data.write_video(path, [video], samples.meta["fps"], {"prompt": clip["prompt"], "step": step})
                strips.append((place, video[torch.linspace(0, len(video) - 1, 8).long()].cpu()))
    rows = sorted(common.gathered(strips, ranks), key=lambda row: row[0])
    if ranks.rank == 0:
        data.film_strip(folder / f"step-{step:06d}.png", [video for _, video in rows], height=128)
    print0(f"step {step}/{cfg.steps} | preview in {folder}")


# ----------------------------------------------------------------------------------------------------
# stopping: by a signal, or because a gradient is not finite

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


def stop_if_broken(cfg, samples, state, ranks):
    """Names the clips of the step whose gradient was not finite."""
    step = int(state.broken)
    if step < 0:
        return
    names, broken = [], []
    for share in itertools.takewhile(lambda share: share[0] == step, shares(cfg, ranks, step)):
        batch = samples.micro_batch(share).to(ranks.device)
        with torch.no_grad():
            finite = clip_losses(errors(cfg, state.net, batch), batch.weight).isfinite()
        names += batch.ids
        broken += [id for id, fine in zip(batch.ids, finite.tolist(), strict=True) if not fine]
    names = common.gathered(names, ranks)
    broken = common.gathered(broken, ranks)
    culprits = ("The loss is not finite on " if broken else "Its clips: ") + ", ".join(broken or names)
    newest = checkpoints(cfg.out)
    kept = f"the newest checkpoint is {newest[-1][1]}" if newest else "there is no checkpoint yet"
    raise UserError(f"step {step + 1}: the gradient is not finite; the weights were left as they were before "
                    f"it.\n{culprits}; {kept}")


if __name__ == "__main__":
    common.run(main, cfg)
