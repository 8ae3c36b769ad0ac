"""Attention sinks: rolling the cache, against attention over keys that are kept unrotated and turned to their
place at every chunk; and generation that never computes anything anew."""

import pytest
import test_sample
import torch
import torch.nn.functional as F
from test_diffusion import NULL, SHAPE, prompts, run
from test_model import tiny
from worlds import refused, relative

import data
import diffusion
import model
from common import UserError, rng

models, make, spy = test_sample.models, test_sample.make, test_sample.spy  # fixtures

SIZES = model.Config(dim=64, ffn_dim=96, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8,
                     text_len=6)
S = SHAPE[1] * SHAPE[2] // model.PATCH**2  # tokens in a frame


@pytest.fixture(scope="module")
def net():
    return sharp(tiny(SIZES)).requires_grad_(False)


def sharp(net):
    """Attention counts, and depends on distances: what goes wrong in the past shows."""
    for block in net.blocks:
        block.self_attn.norm_q.weight.data *= 2
        block.self_attn.o.weight.data *= 2
    return net


def rope(net, start, frames):
    head_dim = net.config.dim // net.config.num_heads
    return model.rope_table(head_dim, start, frames, SHAPE[1] // 2, SHAPE[2] // 2, net.device)


class Unrotated:
    """What a cache stands for, in the plainest way: of every chunk its keys before RoPE and its values, layer
    by layer. The places 0, 1, ... are given out anew at every call."""

    def __init__(self, net, text):
        self.net, self.text = net, text
        self.chunks = []  # of each: [(k, v) of every layer]

    def forward(self, x, t):
        """The velocity of a chunk that comes last, and its keys and values."""
        net = self.net
        sizes = [layers[0][0].shape[1] // S for layers in self.chunks] + [x.shape[1]]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        e = net.time_embedding(model.sinusoid(t, net.config.freq_dim))
        e0 = net.time_projection(e).unflatten(-1, (6, -1))
        h = net.patchify(x)
        context = net.context(self.text)
        made = []
        for i, block in enumerate(net.blocks):
            still = torch.stack([torch.ones(()), torch.zeros(())]).view(2, 1, 1, 1, 1)
            q, k, v = block.before(h, e0, still)
            made.append((k, v))
            past = [layers[i] for layers in self.chunks] + [(k, v)]
            places = zip(starts, sizes, strict=True)
            keys = torch.cat([self.turned(k, *place) for (k, _), place in zip(past, places, strict=True)], 1)
            values = torch.cat([v for _, v in past], 1)
            q = self.turned(q, starts[-1], sizes[-1])
            y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, keys, values)))
            h = block.after(h, y.transpose(1, 2).reshape(h.shape), e0, *block.text_kv(context))
        return net.unpatchify(net.head(h, e), *SHAPE[1:]), made

    def turned(self, k, start, frames):
        return model.rotate(k.unflatten(1, (frames, S)), rope(self.net, start, frames)).flatten(1, 2)

    def append(self, x, t):
        self.chunks.append(self.forward(x, t)[1])


@torch.no_grad()
def by_hand(net, words, frames, window, sink, steps=3, guidance=6.0, context=None, noise=0.0, name=0):
    """generate() with a sink for one sample, over lists of unrotated keys, a branch of the guidance each."""
    branches = [Unrotated(net, words[None]), Unrotated(net, NULL[None])]
    sigmas = diffusion.sigma_grid(steps, 8.0)
    sizes = [3] * (frames // 3)
    done = []

    def show(at, x):
        drawn = torch.randn(x.shape[1:], generator=rng(0, "context", name, at))[None]
        for branch in branches:
            branch.append((1 - noise) * x + noise * drawn, torch.full((1, x.shape[1]), 1000 * noise))

    if context is not None:
        sizes = [context.shape[1]] + [3] * ((frames - context.shape[1]) // 3)
        done.append(context)
        show(0, context)
    for size in sizes[len(done):]:
        at = sum(z.shape[1] for z in done)
        for branch in branches:
            while sum(layers[0][0].shape[1] // S for layers in branch.chunks) + size > window:
                del branch.chunks[sink]
        x = torch.randn(size, *SHAPE, generator=rng(0, "noise", name, at))[None]
        for s, after in zip(sigmas, sigmas[1:], strict=False):
            v, v_null = (branch.forward(x, torch.full((1, size), 1000 * s))[0] for branch in branches)
            x = x + (v_null + guidance * (v - v_null)) * (after - s)
        done.append(x)
        show(at, x)
    return torch.cat(done, 1)


@pytest.mark.parametrize("sink,window", [(0, 9), (1, 9), (2, 12), (1, 11)])
def test_a_rolling_cache_is_attention_over_unrotated_keys(net, sink, window):
    text = prompts(1)
    made = run(net, text=text, frames=30, window=window, sink=sink)
    assert relative(made, by_hand(net, text[0], 30, window, sink)) < 1e-5
    noisy = run(net, text=text, frames=18, window=window, sink=sink, context_noise=0.2, guidance=2.0)
    assert relative(noisy, by_hand(net, text[0], 18, window, sink, noise=0.2, guidance=2.0)) < 1e-5


@pytest.mark.parametrize("sink,window", [(0, 10), (1, 10), (1, 9), (2, 12)])
def test_behind_an_image(net, sink, window):
    """Chunks 1, 3, 3, ...: the image is a chunk like others, of the sink or first to go."""
    text = prompts(1)
    image = torch.randn(1, 1, *SHAPE, generator=rng("image"))
    made = run(net, text=text, frames=22, window=window, sink=sink, context=image)
    assert torch.equal(made[:, :1], image)
    assert relative(made, by_hand(net, text[0], 22, window, sink, context=image)) < 1e-5


def test_sinks_matter_only_once_the_window_is_full(net):
    context = torch.randn(2, 3, *SHAPE, generator=rng("context"))
    for options in ({}, {"context": context}, {"history": 1.2, "context_noise": 0.2}):
        plain = run(net, frames=9, window=9, keep=6, **options)
        for sink in (0, 1):
            assert torch.equal(run(net, frames=9, window=9, sink=sink, **options), plain)
    slid, *rolled = (run(net, frames=15, window=9, keep=6, sink=sink) for sink in (None, 0, 1))
    for a, b in ((slid, rolled[0]), (slid, rolled[1]), rolled):
        assert torch.equal(a[:, :9], b[:, :9]) and relative(a[:, 9:12], b[:, 9:12]) > 1e-2


def test_a_long_run_stays_within_the_window_and_its_memory(net, monkeypatch):
    """30 chunks: one cache, positions below the window, and two kinds of forward, neither of which grows."""
    caches, calls = [], []
    new_cache, forward, table = model.WanModel.new_cache, model.WanModel.forward, model.rope_table
    monkeypatch.setattr(model.WanModel, "new_cache",
                        lambda *args: caches.append(new_cache(*args)) or caches[-1])
    monkeypatch.setattr(model.WanModel, "forward", lambda self, x, t, text, **options: calls.append(
        (x.shape[1], options["start"])) or forward(self, x, t, text, **options))
    turns = []
    monkeypatch.setattr(model, "rope_table", lambda d, start, frames, *rest: turns.append((start, frames))
                        or table(d, start, frames, *rest))
    chunks = diffusion.generate(net, prompts(1), NULL, diffusion.Sampling(2), shape=SHAPE, frames=90,
                                window=12, sink=1)
    sizes = set()
    for _, latents in chunks:
        sizes.add((caches[0].k.shape, caches[0].v.shape, caches[0].filled <= 12))
        assert latents.isfinite().all()
    assert len(caches) == len(sizes) == 1 and caches[0].k.shape[2] == 12 * S and caches[0].filled == 12
    assert caches[0].layout == model.causal_layout((3,) * 4, S)
    assert len(calls) == 30 * 3 - 1 and {frames for frames, _ in calls} == {3}, "nothing is computed anew"
    assert max(start + frames for start, frames in turns) == 12
    assert {start for start, _ in turns if start < 0} == {-3}
    assert [start for _, start in calls[-8:]] == [9] * 8


def test_rolling_moves_values_and_turns_keys(net):
    x = torch.randn(1, 10, 4, 4, 6, generator=rng("roll"))
    text = torch.stack(prompts(1))
    cache = net.new_cache(1, 10, 4, 6)
    net(x, torch.zeros(1, 10), text, chunk=(1, 3, 2, 4), cache=cache)
    k, v = cache.k.clone(), cache.v.clone()
    assert cache.roll(1) == 3 and cache.filled == 7 and cache.layout == model.causal_layout((1, 2, 4), S)
    assert torch.equal(cache.k[:, :, :S], k[:, :, :S]) and torch.equal(cache.v[:, :, :S], v[:, :, :S])
    assert torch.equal(cache.v[:, :, S:7 * S], v[:, :, 4 * S:])

    def unrotated(k, start):
        inverse = rope(net, start, 6) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1)
        return model.rotate(k.flatten(0, 1).unflatten(1, (6, S)), inverse)
    assert relative(unrotated(cache.k[:, :, S:7 * S], 1), unrotated(k[:, :, 4 * S:], 4)) < 1e-5
    assert cache.roll(2) == 4 and cache.filled == 3, "the last chunk may go too"


def test_half_precision_does_not_pile_up_errors():
    """A key is turned at most window / chunk times, in fp32, and rounded to bf16 each time."""
    half = tiny(SIZES, dtype=torch.bfloat16)
    cache = half.new_cache(1, 21, 4, 6)
    x = torch.randn(1, 21, 4, 4, 6, generator=rng("half"))
    with torch.no_grad():
        half(x, torch.zeros(1, 21), torch.stack(prompts(1)), cache=cache)
    before = cache.k[:, :, 18 * S:].float()
    for _ in range(6):
        cache.roll(0)
    turn = model.rope_table(32, -18, 1, 1, 1, half.device)
    assert cache.k.dtype == torch.bfloat16
    assert relative(cache.k[:, :, :3 * S].float(), model.rotate(before, turn)) < 6e-3


def test_a_sample_is_the_same_alone_and_in_any_batch(net):
    text = prompts(3)
    for options in ({}, {"history": 1.2}, {"guidance": 1, "solver": "unipc", "context_noise": 0.2}):
        options = dict(frames=15, window=9, sink=1) | options
        together = run(net, text=text, ids=["a", "b", "c"], **options)
        for i, name in enumerate("abc"):
            alone = run(net, text=text[i:i + 1], ids=[name], **options)
            assert relative(alone, together[i:i + 1]) < 1e-5
        assert torch.equal(run(net, text=text, ids=["a", "b", "c"], **options), together)


def test_a_prompt_changes_at_any_chunk(net):
    before, after = prompts(1, 1), prompts(1, 2)
    options = dict(frames=18, window=9, sink=1)
    plain = run(net, text=before, **options)
    assert torch.equal(run(net, text=[(0, before)], **options), plain)
    for first, switch in ((3, 3), (4, 6), (12, 12), (13, 15)):
        switched = run(net, text=[(0, before), (first, after)], **options)
        assert torch.equal(switched[:, :switch], plain[:, :switch])
        assert not torch.equal(switched[:, switch:switch + 3], plain[:, switch:switch + 3])


def test_a_window_may_be_longer_than_what_was_trained(net):
    long = run(net, frames=36, window=30, sink=2)
    assert long.isfinite().all() and long.shape[1] == 36


@pytest.mark.parametrize("sink,options", [
    (2, dict(window=9)), (-1, {}), (6, {}), (0, dict(window=5)),
    (2, dict(window=9, context=torch.zeros(2, 1, *SHAPE), frames=10))])
def test_refusals(net, sink, options):
    with pytest.raises(UserError, match=f"a sink of {sink} chunks in a window of .* room for 2 chunks of 3"):
        run(net, sink=sink, **options)
    run(net, sink=1, window=7, context=torch.zeros(2, 1, *SHAPE), frames=10)  # 1 + 3 + 3 is enough


# -------------------------------------------------------------------------------------------- sample.py

def test_sample_rolls_its_window(make, spy):
    """Prompts change at any chunk: those at latents 6 and 9 begin at 1.31 and 2.06 s."""
    calls, _ = spy
    for text in ("a red disc", "a red disc | 1.2: a blue ring | 2.06: it stops"):
        made = make(prompt=text, seconds=4, sink=1)
    assert [len(film) for film in made.values()] == [69, 69]
    plain, changed = (call["latents"] for call in calls)
    off = (changed - plain).abs().amax((0, 2, 3, 4))
    assert off[:6].max() < 1e-3 < 1e-2 < off[6:9].min()
    slid = make(prompt="a red disc", seconds=4, out="slid")
    assert not torch.equal(slid["0000-a-red-disc"], made["0000-a-red-disc"])
    assert data.read_tags("videos/0000-a-red-disc.mp4")["sink"] == 1
    again = make(like="videos/0000-a-red-disc.mp4", out="again")
    assert torch.equal(again["0000-a-red-disc"], made["0000-a-red-disc"])
    off = make(like="videos/0000-a-red-disc.mp4", out="off", sink=-1)
    assert torch.equal(off["0000-a-red-disc"], slid["0000-a-red-disc"])
    assert data.read_tags("off/0000-a-red-disc.mp4")["sink"] is None


def test_sample_goes_on_from_an_image_with_a_sink(make, spy):
    calls, _ = spy
    data.write_png("first.png", torch.zeros(3, test_sample.SIZE, test_sample.SIZE))
    [film] = make(prompt="a red disc", image="first.png", seconds=4, sink=1).values()
    assert calls[0]["sink"] == 1 and calls[0]["context"].shape[1] == 1 and len(film) == 73


@pytest.mark.parametrize("flags,message", [
    (dict(prompt="a | 1: b | 1.2: c"), "not all 3 prompts .* where a chunk begins, every 0.75 s"),
    (dict(prompt="a | 3.2: b"), "not all 2 prompts .* where a chunk begins"),
    (dict(prompt="a", sink=2), "a sink of 2 chunks in a window of 9"),
    (dict(prompt="a", sink=-2), "a sink of -2 chunks")])
def test_sample_refuses(make, flags, message):
    with refused(message):
        make(**dict(seconds=2.9, sink=1) | flags)
