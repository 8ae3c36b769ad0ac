"""History routing: every form of it against a dense mask written from its definition, pair by pair."""

import functools
import json
from dataclasses import replace

import pytest
import test_rollout
import test_sample
import test_train
import torch
import torch.nn.functional as F
from test_diffusion import SHAPE, prompts, run
from test_model import inputs, roll, tiny
from test_sink import SIZES, sharp
from test_train import close_runs, config, flags_of, lines, same_run
from test_train import run as run_training
from torch.nn.attention.flex_attention import flex_attention
from worlds import assert_close, call, refused, relative, run_stage, teacher_forcing_is_a_rollout, tiny_model

import diffusion
import model
import rollout
import routing
import toy
import train_df

world = test_train.world  # fixtures
models, make, spy = test_sample.models, test_sample.make, test_sample.spy

LAYOUTS = [((3, 3, 3, 3, 3), 6, False), ((1, 3, 3, 2, 3), 5, False), ((3, 3, 3, 3), 6, True),
           ((1, 3, 3, 2, 3), 7, True), ((2,) * 6, 35, True)]


def case(sizes, per_frame, teacher, batch=2, heads=2, width=8):
    """A layout, and q, k, v for it."""
    layout = (model.teacher_layout if teacher else model.causal_layout)(sizes, per_frame)
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, layout[-1][1], heads, width, generator=g)
    return layout, q * 2, k, v


def dense_mask(q, k, layout, route):
    """[B, N, L, L] from the words of the definition, one query at a time."""
    batch, length, heads, _ = q.shape
    mask = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for first, last, past in layout:
                before = [(a, z) for a, z, _ in layout if z <= past]
                mask[b, h, first:last, first:last] = True
                for i in range(first, last):
                    scores = [(q[b, i, h] @ k[b, a:z, h].mean(0)).item() for a, z in before]
                    best = sorted(range(len(before)), key=lambda j: -scores[j])[:route]  # noqa: B023
                    for j in best:
                        mask[b, h, i, before[j][0]:before[j][1]] = True
    return mask


def dense(q, k, v, mask):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(2, 3) / q.shape[-1]**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("route", [1, 2, 3])
@pytest.mark.parametrize("sizes,per_frame,teacher", LAYOUTS[:4])
def test_it_is_attention_under_a_dense_mask(sizes, per_frame, teacher, route):
    """Forward and gradients; which chunks are chosen has no gradient."""
    layout, *tensors = case(sizes, per_frame, teacher)
    mask = dense_mask(*tensors[:2], layout, route)
    results = []
    for function in (lambda *x: routing.attention(*x, layout, route), lambda *x: dense(*x, mask)):
        leaves = [x.clone().requires_grad_() for x in tensors]
        y = function(*leaves)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        results.append([y.detach(), *(x.grad for x in leaves)])
    for mine, expected in zip(*results, strict=True):
        assert relative(mine, expected) < 1e-5
    last = mask[:, :, slice(*layout[-1][:2])].flatten(0, 2)
    assert len(last.unique(dim=0)) > 1 or route == len(sizes) - 1, "queries of a chunk choose differently"


def test_enough_routes_are_dense_attention():
    for sizes, per_frame, teacher in LAYOUTS:
        layout, q, k, v = case(sizes, per_frame, teacher)
        assert routing.most_past(layout) == len(sizes) - 1
        assert_close(routing.attention(q, k, v, layout, len(sizes)), model.attention(q, k, v, layout), 1e-6)


@pytest.mark.parametrize("sizes,per_frame,teacher", LAYOUTS)
@pytest.mark.parametrize("route", [1, 2])
def test_two_branches_are_the_mask(sizes, per_frame, teacher, route, monkeypatch):
    layout, q, k, v = case(sizes, per_frame, teacher)
    with torch.no_grad():
        masked = routing.attention(q, k, v, layout, route)
        monkeypatch.setattr(routing, "worth_grouping", lambda *args: True)
        assert relative(routing.attention(q, k, v, layout, route), masked) < 1e-5
        half = [x.bfloat16() for x in (q, k, v)]
        y = routing.attention(*half, layout, route)
        monkeypatch.undo()
        assert y.dtype == torch.bfloat16 and relative(y, routing.attention(*half, layout, route)) < 1e-2
        far = routing.partial_attention(q * 1e3, k, v)  # weights far outside what exp can hold
    assert all(x.isfinite().all() for x in far)


def test_groups_where_they_are_faster():
    q = torch.zeros(1, 1, 192, 1)
    assert not routing.worth_grouping(q, 20, 5), "they have no gradient"
    with torch.no_grad():
        assert routing.worth_grouping(q, 20, 5) and not routing.worth_grouping(q[:, :, :12], 60, 5)


# ---------------------------------------------------------------------------------------- flex_attention

def rebuilt(block, shape, size=128):
    """The dense mask that a BlockMask stands for, [B, N, queries, keys] up to whole blocks."""
    batch, heads, length, keys = shape
    rows, columns = -(-length // size), -(-keys // size)
    mask = torch.zeros(batch, heads, rows * size, columns * size, dtype=torch.bool)
    q, kv = torch.arange(length)[:, None], torch.arange(keys)[None]
    for counts, indices, full in ((block.kv_num_blocks, block.kv_indices, False),
                                  (block.full_kv_num_blocks, block.full_kv_indices, True)):
        for b, h, i in torch.cartesian_prod(*map(torch.arange, (batch, heads, rows))).tolist():
            for j in indices[b, h, i, :counts[b, h, i]].tolist():
                there = slice(size * i, size * i + size), slice(size * j, size * j + size)
                part = mask[b, h][there]
                seen = block.mask_mod(b, h, q[there[0]], kv[:, there[1]])
                assert seen.any() and seen.all() == full or part.shape != seen.shape, "a block of its kind"
                part[:seen.shape[0], :seen.shape[1]] = seen
                if full:
                    part[:] = True
    return mask


def capture(blocks, q, k, v, block_mask):
    """Stands for the compiled kernel."""
    blocks.append(block_mask)
    return flex_attention(q, k, v, block_mask=block_mask)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("sizes,per_frame,teacher,route", [
    ((3, 3, 3, 3, 3), 6, False, 2), ((1, 3, 3, 2), 61, True, 1), ((2,) * 6, 64, True, 2),
    ((2,) * 5, 64, False, 1)])
def test_the_block_mask_is_the_dense_mask(sizes, per_frame, teacher, route):
    layout, q, k, v = case(sizes, per_frame, teacher, width=16)
    mask = dense_mask(q, k, layout, route)
    blocks = []
    y = routing.attention(q, k, v, layout, route, flex=functools.partial(capture, blocks))
    length = layout[-1][1]
    made = rebuilt(blocks[0], mask.shape)
    assert torch.equal(made[:, :, :length, :length], mask)
    assert not made[..., length:].any(), "a key beyond the end is seen"
    assert relative(y, routing.attention(q, k, v, layout, route)) < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_over_a_cache_that_is_not_full():
    """The keys are the whole cache, so that its shape stays; where nothing is cached yet, nobody looks."""
    layout, q, k, v = case((1, 3, 3, 2), 50, False, width=16)
    k, v = (F.pad(x, (0, 0, 0, 0, 0, 333)) for x in (k, v))
    q = q[:, -100:]
    blocks = []
    y = routing.attention(q, k, v, layout, 1, flex=functools.partial(capture, blocks))
    length = layout[-1][1]
    expected = routing.attention(q, k[:, :length], v[:, :length], layout, 1)
    assert relative(y, expected) < 1e-5 and blocks[0].shape == (2, 2, 100, length + 333)
    computed = blocks[0].kv_num_blocks + blocks[0].full_kv_num_blocks
    assert computed.max() <= -(-length // 128)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_blocks_that_no_query_chose_are_skipped():
    """All queries choose the chunk at 3: of 10 blocks of keys they see that and their own."""
    layout, q, k, v = case((1,) * 10, 128, False, batch=1, heads=1)
    q[:], k[:] = 1, -1
    k[:, 3 * 128:4 * 128] = 1
    blocks = []
    routing.attention(q[:, -128:], k, v, layout, 1, flex=functools.partial(capture, blocks))
    assert blocks[0].kv_num_blocks.item() == 0 and blocks[0].full_kv_num_blocks.item() == 2
    assert blocks[0].full_kv_indices[0, 0, 0, :2].tolist() == [3, 9]


@pytest.mark.slow  # a C++ compilation
def test_the_compiled_kernel_reads_the_block_mask():
    layout, q, k, v = case((1, 3, 3, 2), 61, True, width=64)
    with torch.no_grad():
        compiled = routing.attention(q, k, v, layout, 1, flex=model.compiled_flex())
    assert relative(compiled, routing.attention(q, k, v, layout, 1)) < 1e-5


# ---------------------------------------------------------------------------------------------- the model

def routed(route, **options):
    net = sharp(tiny(**options))
    net.route = route
    return net


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("sizes", [(3, 3, 3, 3, 3), (1, 3, 3, 2, 3, 3), (1,) * 15])
@pytest.mark.parametrize("form", ["mask", "groups", "flex"])
def test_cached_chunks_are_the_parallel_forward(sizes, form, monkeypatch):
    net = routed(None).requires_grad_(False)
    x, text, t = inputs(frames=15)
    t = torch.linspace(0, 1000, 15).repeat(2, 1)
    dense = net(x, t, text, chunk=sizes)
    net.route = 2
    parallel = net(x, t, text, chunk=sizes)
    assert relative(dense, parallel) > 1e-2
    monkeypatch.setattr(routing, "worth_grouping", lambda *args: form == "groups")
    monkeypatch.setattr(model, "flex_on", lambda x: flex_attention if form == "flex" else None)
    assert relative(net(x, t, text, chunk=sizes), parallel) < 1e-5
    cached, cache = roll(net, x, t, text, sizes)
    assert relative(cached, parallel) < 1e-5
    assert [len(means) for means in cache.pooled] == [len(sizes) - 1] * 2, "each chunk is pooled once"
    rest = slice(sizes[0], None)
    x[:, rest] = x[:, rest].flip(1) * 3
    again = net(x[:, rest], t[:, rest], text, chunk=sizes[1:], cache=cache, start=sizes[0])
    assert relative(again, net(x, t, text, chunk=sizes)[:, rest]) < 1e-5, "what is new is pooled anew"


def test_enough_routes_are_the_dense_model():
    net = routed(None).requires_grad_(False)
    x, text, t = inputs(frames=15)
    t = torch.linspace(0, 1000, 15).repeat(2, 1)
    clean = inputs(frames=15, seed=2)[0]

    def made(route):
        net.route = route
        return net(x, t, text), net(x, t, text, clean=clean), roll(net, x, t, text, (3,) * 5)[0]
    assert all(torch.equal(a, b) for a, b in zip(made(4), made(None), strict=True))
    net.route = 2
    whole = net(x, t, text, chunk=None)
    assert torch.equal(whole, routed(None)(x, t, text, chunk=None)), "a single chunk has no past"


def test_teacher_forcing_is_a_rollout_over_clean_history():
    net = routed(1).requires_grad_(False)
    x, text, t = inputs(frames=12)
    t = torch.linspace(100, 1000, 12).repeat(2, 1)
    clean = inputs(frames=12, seed=2)[0]
    teacher_forcing_is_a_rollout(net, x, t, text, clean, (1, 3, 3, 2, 3))


def test_checkpointing_and_compiled_blocks_keep_the_gradient():
    x, text, t = inputs(frames=15, batch=1)
    t = torch.linspace(0, 1000, 15)[None]
    grads = []
    for checkpointing, compiled in ((False, False), (True, False), (True, True)):
        net = routed(2)
        net.checkpointing = checkpointing
        if compiled:
            torch._dynamo.reset()
            for block in net.blocks:
                block.before = torch.compile(block.before, backend="aot_eager", dynamic=False)
                block.after = torch.compile(block.after, backend="aot_eager", dynamic=False)
        net(x, t, text, clean=x.roll(1)).square().mean().backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
    for other in grads[1:]:
        assert all(p is not None and relative(other[name], p) < 1e-5 for name, p in grads[0].items())


def test_a_rolled_cache_pools_its_turned_keys():
    net = routed(2, config=SIZES).requires_grad_(False)
    run(net, text=prompts(1), frames=30, window=15, sink=1)
    caches = []
    new_cache = net.new_cache
    net.new_cache = lambda *args: caches.append(new_cache(*args)) or caches[0]
    for context in (None, torch.randn(1, 1, *SHAPE)):
        caches.clear()
        frames = 30 if context is None else 31
        video = run(net, text=prompts(1), frames=frames, window=15, sink=1, context=context)
        cache = caches[0]
        sizes = [(last - first) // 6 for first, last, _ in cache.layout]
        assert sizes == ([3] * 5 if context is None else [1, 3, 3, 3, 3]) and video.isfinite().all()
        for layer, means in enumerate(cache.pooled):
            assert len(means) == 4
            expected = routing.pool(cache.k[layer], cache.layout[:-1])
            assert relative(torch.stack(means, 2), expected) < 1e-6


def test_a_sample_is_the_same_alone_and_in_any_batch():
    net = routed(2, config=SIZES).requires_grad_(False)
    text = prompts(3)
    for options in ({}, {"sink": 1, "window": 12}):
        together = run(net, text=text, frames=15, ids=["a", "b", "c"], **options)
        for i, name in enumerate("abc"):
            alone = run(net, text=text[i:i + 1], frames=15, ids=[name], **options)
            assert relative(alone, together[i:i + 1]) < 1e-4


# ----------------------------------------------------------------------------------------------- the runs

@pytest.mark.parametrize("mode", ["df", "rf"])
def test_training_with_routes(world, tmp_path, mode):
    """As scripts; micro-batches, recomputed activations and a stop change nothing, routes do."""
    knobs = dict(mode=mode, route=2, steps=4, lr=3e-2)
    call("train_df.py", *flags_of(config(world, tmp_path / "a", **knobs)))
    assert model.settings(tmp_path / "a")["route"] == 2 and model.load(tmp_path / "a").route == 2
    run_training(config(world, tmp_path / "b", micro=1, recompute=True, **knobs))
    close_runs(tmp_path / "a", tmp_path / "b")
    for steps in (2, 4):
        run_training(config(world, tmp_path / "c", **knobs | {"steps": steps}))
    same_run(tmp_path / "a", tmp_path / "c")
    run_training(config(world, tmp_path / "d", **knobs | {"route": None}))
    assert model.load(tmp_path / "d").route is None
    routed, dense = (next(line for line in lines(tmp_path / name) if "loss" in line) for name in "ad")
    near = pytest.approx(dense["by_chunk"][:3], abs=2e-6)
    assert routed["by_chunk"][:3] == near, "no more than 2 past chunks"
    assert routed["loss"] != dense["loss"]


def test_a_trained_route_is_sampled_with(make, spy, models, tmp_path, monkeypatch):
    calls, _ = spy
    routes = []
    generate = diffusion.generate
    monkeypatch.setattr(diffusion, "generate", lambda net, *args, **options: routes.append(net.route)
                        or generate(net, *args, **options))
    model.save(model.load(models / "model"), "m", wan=str(models / "wan"), route=1)
    for flags in ({}, {"model": "m"}, {"model": "m", "route": 2}, {"model": "m", "route": 0}):
        make(prompt="a red disc", seconds=2, out=f"out{len(routes)}", **flags)
    assert routes == [None, 1, 2, None]
    latents = [call["latents"] for call in calls]
    assert torch.equal(latents[2], latents[3]), "three chunks have no more than 2 past ones"
    assert not torch.equal(latents[1], latents[3])
    make(like="out3/0000-a-red-disc.mp4", out="again")
    assert routes[-1] is None and torch.equal(calls[-1]["latents"], latents[3])
    make(like="out2/0000-a-red-disc.mp4", out="off", route=0)
    assert routes[-1] is None and torch.equal(calls[-1]["latents"], latents[3])
    with refused("--route -1: give a whole number from 0 on"):
        make(prompt="a", route=-1)


def test_a_trained_route_is_rolled_out_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy.make_wan(tmp_path / "wan")
    net = tiny_model("rollout", text_len=8)
    model.save(net, tmp_path / "model_0", wan="../wan", route=1)
    test_rollout.fill(tmp_path / "agg_0", tmp_path / "wan")
    routes = []
    generate = diffusion.generate
    monkeypatch.setattr(diffusion, "generate", lambda net, *args, **options: routes.append(net.route)
                        or generate(net, *args, **options))
    for route in (None, 2, 0):
        out = tmp_path / f"rollout-{route}"
        run_stage(rollout, rollout.Config(
            str(tmp_path / "model_0"), out=str(out), count=1, steps=1, held_out=0, previews=0, device="cpu",
            route=route))
        assert json.loads((out / "meta.json").read_text())["route"] == route
    assert routes == [1, 2, None]
    with refused("--route -1: give a whole number from 0 on"):
        run_stage(rollout, rollout.Config(str(tmp_path / "model_0"), out=str(tmp_path / "x"), route=-1))


def test_training_refuses_what_cannot_be_routed(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused("--route 2 --mode full: that mode has no past chunks"):
        run_training(config(world, "out", route=2, mode="full"))


def test_a_route_is_inherited(world, tmp_path, ranks, capsys):
    """By a training from a model that was trained with one, unless a --route is given; 0 turns it off."""
    model.save(model.load(world / "init"), tmp_path / "routed", route=2)
    for flags, expected in (({}, 2), ({"route": 0}, None), ({"route": 3}, 3), ({"mode": "full"}, None)):
        cfg = replace(config(world, tmp_path / "out", **flags), init=str(tmp_path / "routed"))
        cfg = train_df.complete(cfg, ranks)
        samples = train_df.Samples(cfg)
        train_df.check(cfg, samples, ranks)
        state = train_df.begin(cfg, samples, ranks)
        assert cfg.route == state.net.route == expected
        train_df.export(cfg, samples, state, ranks)
        assert model.settings(tmp_path / "out")["route"] == expected
    assert train_df.complete(config(world, tmp_path / "out"), ranks).route is None


def test_routes_compute_less():
    layout = model.causal_layout((3,) * 21, 10)
    dense, routed, all_of_them = (model.forward_flops(SIZES, layout, route) for route in (None, 5, 20))
    pairs = sum(30 * (30 * min(i, 5) + 30) for i in range(21))
    more = sum(30 * (30 * i + 30) for i in range(21)) - pairs
    assert dense == all_of_them and dense - routed == 4 * SIZES.num_layers * SIZES.dim * more


def test_the_bench_runs():
    printed = call("bench.py", "history", "--frames", 93, "--size", "32x32", "--batch", 1, "--steps", 1,
                   "--route", 1, "--window", 12).stdout
    assert "1 videos of 12 tokens a chunk" in printed and "|  1 ..  8 |" in printed
