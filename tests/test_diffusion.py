"""Schedules and solvers against known answers, diffusers and Wan2.1; generation against forwards without a
cache, and against diffusers' pipeline."""

import itertools
import math
from dataclasses import fields

import pytest
import torch
from worlds import relative, tiny_model

import diffusion
import model
import vae as wan_vae

SHAPE = (4, 4, 6)  # a latent frame


@pytest.fixture(scope="module")
def net():
    net = tiny_model("sampler", num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=6)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return wan_vae.WanVAE(8, (1, 1), 1, z_dim=4, temporal=(True,)).requires_grad_(False)


def prompts(batch, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2 + i % 3, 8, generator=g) for i in range(batch)]


NULL = torch.ones(1, 8) / 3


def stream(net, text, null=NULL, **options):
    """generate, with Sampling's fields among the options."""
    names = {f.name for f in fields(diffusion.Sampling)} & options.keys()
    sampling = diffusion.Sampling(**{name: options.pop(name) for name in names})
    return diffusion.generate(net, text, null, sampling, **dict(shape=SHAPE) | options)


def run(net, batch=2, **kwargs):
    options = dict(frames=9, steps=3, text=prompts(batch)) | kwargs
    return torch.cat([latents for _, latents in stream(net, **options)], 1)


# ------------------------------------------------------------------------------------- flow and solvers

def test_flow_matching_identities():
    x0, noise = torch.randn(2, 2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([[0.0, 250.0, 1000.0], [500.0, 999.9, 1.0]])
    x = diffusion.add_noise(x0, noise, t)
    assert torch.equal(x[0, 0], x0[0, 0]) and torch.equal(x[0, 2], noise[0, 2])
    assert torch.allclose(x[0, 1], 0.75 * x0[0, 1] + 0.25 * noise[0, 1])
    assert torch.allclose(x - t.view(2, 3, 1, 1, 1) / 1000 * diffusion.velocity(x0, noise), x0, atol=1e-6)


def test_grid_of_the_paper():
    expected = [1, .9935, .9863, .9784, .9697, .9600, .9492, .9369, .9231, .9072, .8889, .8675, .8421, .8116,
                .7742, .7273, .6667, .5854, .4706, .2963, 0]
    assert diffusion.sigma_grid(20, 8) == pytest.approx(expected, abs=5e-5)
    assert diffusion.shifted(0.8, 8) == pytest.approx(0.970, abs=5e-4)


def solve(name, sigmas):
    """dx/dsigma = v for data N(0, 0.5^2): x0 and the whole path are known. The relative error at the end."""
    def spread(s):
        return ((1 - s) ** 2 * 0.25 + s**2) ** 0.5
    def field(x, s):
        return (x - (1 - s) * 0.25 / spread(s) ** 2 * x) / s
    x = torch.tensor([spread(sigmas[0])], dtype=torch.float64)
    return abs(diffusion.SOLVERS[name](field, x, sigmas, None).item() / spread(sigmas[-1]) - 1)


@pytest.mark.parametrize("name,order", [("euler", 1), ("heun", 2), ("unipc", 2), ("unipc-diffusers", 2)])
def test_solvers_have_their_order(name, order):
    errors = [solve(name, torch.linspace(0.9, 0.1, steps + 1).tolist()) for steps in (20, 40, 80)]
    for coarse, fine in itertools.pairwise(errors):
        assert 2**order * 0.8 < coarse / fine < 2**order * 1.6, errors
    assert solve(name, diffusion.sigma_grid(20, 3.0, name)) < 0.2  # ends included


def diffusers_unipc(steps, shift):
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                             flow_shift=shift, solver_order=2, solver_type="bh2")
    peer.set_timesteps(steps)
    return peer


def wan_unipc(steps, shift):
    """Wan2.1's own, of which Self-Forcing holds a copy: with PYTHONPATH=Wan2.1/wan/utils."""
    peer = pytest.importorskip("fm_solvers_unipc").FlowUniPCMultistepScheduler(shift=1)
    peer.set_timesteps(steps, shift=shift)
    return peer


PEERS = {"unipc": wan_unipc, "unipc-diffusers": diffusers_unipc}


@pytest.mark.parametrize("solver", PEERS)
@pytest.mark.parametrize("steps,shift", [(1, 5.0), (5, 1.0), (10, 3.0), (20, 8.0), (50, 5.0)])
def test_unipc_is_its_peer(solver, steps, shift):
    peer = PEERS[solver](steps, shift)
    sigmas = diffusion.sigma_grid(steps, shift, solver)
    assert peer.sigmas.tolist() == pytest.approx(sigmas, abs=1e-7)
    g = torch.Generator().manual_seed(0)
    x = theirs = torch.randn(2, 3, 4, generator=g)
    w = torch.randn(4, 4, generator=g) / 2
    asked = []

    def field(x, sigma):
        return torch.tanh(x @ w + sigma) + x

    ours = diffusion.SOLVERS[solver](lambda x, sigma: asked.append(x) or field(x, sigma), x, sigmas)
    for i, following in enumerate([*asked[1:], ours]):
        theirs = peer.step(field(theirs, sigmas[i]), peer.timesteps[i], theirs).prev_sample
        error = relative(following, theirs)
        assert error < 1e-5, f"step {i}"
    print(f"{solver}, {steps} steps, shift {shift:g}: relative difference {error:.1e}")


@pytest.mark.parametrize("solver", PEERS)
def test_unipc_rounds_t_down_as_its_peer(solver):
    """All of them, where 1000 sigma is an integer too: there the last bit decides."""
    for steps, shift in itertools.product((*range(1, 61), 100, 333), (1.0, 3.0, 5.0, 8.0)):
        sigmas = diffusion.sigma_grid(steps, shift, solver)[:-1]
        expected = PEERS[solver](steps, shift).timesteps.tolist()
        assert [diffusion.model_time(sigma, solver) for sigma in sigmas] == expected, (steps, shift)


def test_unipc_by_hand():
    """Wan's levels and t, and a step of each order with its correction, from the paper's linear systems."""
    sigmas = diffusion.sigma_grid(50, 5.0, "unipc")
    t = [diffusion.model_time(sigma, "unipc") for sigma in sigmas]
    assert t[:5] == [999, 995, 991, 987, 982] and t[-5:] == [302, 241, 172, 92, 0]
    ninths = [diffusion.model_time(sigma, "unipc") for sigma in diffusion.sigma_grid(9, 1.0, "unipc")]
    assert ninths == list(range(999, -1, -111)), "their 0.999 is a float32, a little more"
    assert diffusion.sigma_grid(2, 1.0, "unipc") == pytest.approx([0.999, 0.4995, 0])
    assert diffusion.sigma_grid(2, 1.0, "unipc-diffusers") == pytest.approx([1 - 1e-6, 0.5005, 0])
    assert diffusion.model_time(0.9375, "renoise") == diffusion.model_time(0.9375, "euler") == 937.5

    s = diffusion.sigma_grid(4, 3.0, "unipc")
    logsnr = [math.log((1 - sigma) / sigma) for sigma in s[:-1]]
    x = start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m, corrected = [], []

    def multistep(i, coefficients, differences):  # from level i to i + 1
        e = math.expm1(logsnr[i] - logsnr[i + 1])
        slope = sum(c * d for c, d in zip(coefficients, differences, strict=True))
        return s[i + 1] / s[i] * corrected[i] - (1 - s[i + 1]) * e * (m[i] + slope)

    for i in range(4):
        m.append(x - s[i] * (torch.sin(x) + s[i]))
        if i == 0:
            corrected.append(x)
        elif i == 1:
            corrected.append(multistep(0, [0.5], [m[1] - m[0]]))
        else:
            h = logsnr[i] - logsnr[i - 1]
            r = (logsnr[i - 2] - logsnr[i - 1]) / h
            phi = math.expm1(-h) / -h - 1
            b = torch.tensor([phi, 2 * (phi / -h - 0.5)], dtype=torch.float64) / math.expm1(-h)
            system = torch.tensor([[1, 1], [r, 1]], dtype=torch.float64)
            rho = torch.linalg.solve(system, b).tolist()
            corrected.append(multistep(i - 1, rho, [(m[i - 2] - m[i - 1]) / r, m[i] - m[i - 1]]))
        if i == 3:
            x = m[3]
        elif i == 0:
            x = multistep(0, [], [])
        else:
            r = (logsnr[i - 1] - logsnr[i]) / (logsnr[i + 1] - logsnr[i])
            x = multistep(i, [0.5], [(m[i - 1] - m[i]) / r])
    made = diffusion.unipc(lambda x, sigma: torch.sin(x) + sigma, start, s)
    assert relative(made, x) < 1e-12


def test_renoising_by_hand():
    """The four steps of distilled checkpoints: t = 1000, 750, 500, 250 on a shift of 5."""
    sigmas = diffusion.sigma_grid(4, 5.0, "renoise")
    assert sigmas == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0])
    g = torch.Generator().manual_seed(0)
    x, *fresh = torch.randn(4, 3, generator=g)
    made = diffusion.renoise(lambda x, sigma: torch.sin(x) + sigma, x, sigmas, lambda i: fresh[i])
    for i, (sigma, following) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        x0 = x - sigma * (torch.sin(x) + sigma)
        x = x0 if i == 3 else (1 - following) * x0 + following * fresh[i]
    assert torch.equal(made, x)


@torch.no_grad()
@pytest.mark.parametrize("given,times", [
    ({}, (1000.0, 937.5, 833.3333, 625.0)), ({"levels": (1000.0, 757.0, 522.0)}, (1000.0, 757.0, 522.0))])
def test_distilled_models_by_hand(net, given, times):
    """Self-Forcing's loop, without a cache: no guidance, each chunk behind the finished ones at t = 0. Its t
    are given, or follow from the steps and the shift."""
    sampling = diffusion.Sampling(**diffusion.DISTILLED | given, solver="renoise")
    text = prompts(1)
    made = torch.cat([z for _, z in diffusion.generate(net, text, None, sampling, shape=SHAPE, frames=9)], 1)
    done = torch.empty(1, 0, *SHAPE)
    for at in (0, 3, 6):
        x = drawn("noise", 0, at)
        for i, t in enumerate(times):
            past = torch.tensor([[0.0] * at + [t] * 3])
            v = net(torch.cat([done, x], 1), past, text[0][None], chunk=3)[:, at:]
            x0 = x - t / 1000 * v
            if i < len(times) - 1:
                sigma = times[i + 1] / 1000
                x = (1 - sigma) * x0 + sigma * drawn(f"noise of step {i}", 0, at)
        done = torch.cat([done, x0], 1)
    assert relative(made, done) < 1e-5


def drawn(name, id, first, size=3):
    return torch.randn(size, *SHAPE, generator=diffusion.rng(0, name, id, first))[None]


def test_renoising_draws_by_names(net):
    """Fresh noise for every step and chunk, the same in any batch."""
    text = prompts(2)
    both = run(net, text=text, solver="renoise", guidance=1, ids=["a", "b"])
    alone = run(net, text=text[1:], solver="renoise", guidance=1, ids=["b"])
    assert relative(both[1:], alone) < 1e-5
    assert relative(both, run(net, text=text, guidance=1, ids=["a", "b"])) > 1e-2


# --------------------------------------------------------------------------------------------- guidance

class Linear:
    """Stands for the transformer: v = x / 2 + text + what is cached, its label included."""

    def __init__(self):
        self.device = torch.device("cpu")
        self.calls = []

    def new_cache(self, batch, frames, height, width):
        return {}

    def __call__(self, x, t, text, chunk=None, cache=None, start=0):
        self.calls.append((tuple(x.shape), t.clone(), start, chunk))
        past = cache[0][0].mean((1, 2, 3, 4)) + cache[0][1].mean(1) / 1000 if start else 0
        cache[start] = (x, t)
        offset = text.sum((1, 2)) + past
        return 0.5 * x + offset.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("guidance,history,noise", [
    (1, 0, 0), (6, 0, 0), (3, 0, 0.2), (6, 1.2, 0), (6, 1.2, 0.2), (0, 0.5, 0)])
def test_guidance_is_its_formula(guidance, history, noise):
    fake = Linear()
    level = 0.8
    context = torch.randn(1, 3, *SHAPE, generator=torch.Generator().manual_seed(5))
    text, null = torch.full((2, 8), 0.1), torch.full((1, 8), 0.2)
    out = run(fake, text=[text], null=null, frames=6, steps=1, shift=8.0, guidance=guidance, context=context,
              context_noise=noise, history=history, seed=3)
    # by hand, from the formula: one Euler step from pure noise with the sum of the branches' velocities
    drawn = torch.randn(3, *SHAPE, generator=diffusion.rng(3, "context", 0, 0))[None]
    x = torch.randn(3, *SHAPE, generator=diffusion.rng(3, "noise", 0, 3))[None]

    def v(words, sigma):
        shown = (1 - sigma) * context + sigma * drawn
        return 0.5 * x + words.sum() + shown.mean() + sigma
    expected = v(null, noise) + guidance * (v(text, noise) - v(null, noise)) \
        + history * (v(null, level) - v(null, 1.0))
    assert torch.allclose(out[:, 3:], x - expected, atol=1e-4)
    assert torch.equal(out[:, :3], context)
    assert fake.calls[0][0][0] == {(1, 0): 1, (0, 0.5): 4}.get((guidance, history), 4 if history else 2)


def test_history_guidance_is_nothing_without_history(net):
    plain, guided = (run(net, frames=3, history=h) for h in (0.0, 1.2))
    assert relative(guided, plain) < 1e-5
    assert relative(run(net, frames=6, history=1.2)[:, 3:], run(net, frames=6)[:, 3:]) > 1e-3


# ------------------------------------------------------------------------------------------- generation

@torch.no_grad()
def without_cache(net, text, frames, steps, guidance, context=None, seed=0, sizes=None, noise=0.0):
    """The same video from full forwards over everything so far, one branch and one sample at a time."""
    sigmas = diffusion.sigma_grid(steps, 8.0)
    out = []
    for i, rows in enumerate(text):
        done = [context[i:i + 1]] if context is not None else []
        sizes_left = list(sizes)
        if context is not None:
            sizes_left = sizes_left[next(n for n in range(9) if sum(sizes[:n]) == context.shape[1]):]
        for size in sizes_left:
            at = sum(z.shape[1] for z in done)
            x = torch.randn(size, *SHAPE, generator=diffusion.rng(seed, "noise", i, at))[None]
            starts = [sum(sizes[:n]) for n in range(len(sizes)) if sum(sizes[:n]) < at]
            drawn = [torch.randn(s, *SHAPE, generator=diffusion.rng(seed, "context", i, first))[None]
                     for first, s in zip(starts, sizes, strict=False)]
            past = [(1 - noise) * torch.cat(done, 1) + noise * torch.cat(drawn, 1)] if done else []
            for s, after in itertools.pairwise(sigmas):
                t = torch.tensor([[1000 * noise] * at + [1000 * s] * size])
                layout = [n for n in sizes[:len(starts) + 1]]
                v = [net(torch.cat([*past, x], 1), t, words[None], chunk=tuple(layout))[:, at:]
                     for words in (rows, NULL)]
                x = x + (v[1] + guidance * (v[0] - v[1])) * (after - s)
            done.append(x)
        out.append(torch.cat(done, 1))
    return torch.cat(out)


def test_cached_generation_is_generation_without_a_cache(net):
    text = prompts(2)
    assert relative(run(net, text=text), without_cache(net, text, 9, 3, 6.0, sizes=(3, 3, 3))) < 1e-4
    context = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(1))
    made = run(net, text=text, context=context, guidance=2.5)
    assert relative(made, without_cache(net, text, 9, 3, 2.5, context, sizes=(3, 3, 3))) < 1e-4
    assert torch.equal(made[:, :3], context)
    noisy = run(net, text=text, context=context, context_noise=0.2)
    assert relative(noisy, without_cache(net, text, 9, 3, 6.0, context, sizes=(3, 3, 3), noise=0.2)) < 1e-4
    image = context[:, :1]
    made = run(net, text=text, context=image, frames=7)
    assert relative(made, without_cache(net, text, 7, 3, 6.0, image, sizes=(1, 3, 3))) < 1e-4


class Bidirectional:
    """Passes calls on to a model, without a cache, and keeps the t of each."""

    def __init__(self, net):
        self.net, self.device, self.times = net, net.device, []

    def __call__(self, x, t, text, chunk, cache, start):
        assert cache is None and start == 0 and chunk == (x.shape[1],) and t.dtype == torch.float32
        self.times.append(t[0].tolist())
        return self.net(x, t, text, chunk=None)


@torch.no_grad()
@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_all_frames_at_once(net, solver):
    """Bidirectionally: one chunk, no cache, every frame at the same t; the same alone and in any batch."""
    spy = Bidirectional(net)
    text = prompts(2)
    options = dict(text=text, frames=5, chunk=None, steps=2, shift=3.0, solver=solver, window=5)
    [(first, latents)] = stream(spy, **options)
    assert first == 0 and latents.shape == (2, 5, *SHAPE) and len(spy.times) == 2
    sigmas = diffusion.sigma_grid(2, 3.0, solver)
    assert [t[0] for t in spy.times] == [diffusion.model_time(s, solver) for s in sigmas[:-1]]
    assert all(len(set(t)) == 1 and len(t) == 5 for t in spy.times)
    x = torch.cat([drawn("noise", i, 0, 5) for i in range(2)])
    nulls = NULL.expand(2, 1, 8)
    rows = diffusion.pad_text(text)

    def velocity(x, sigma):
        t = torch.full((2, 5), float(diffusion.model_time(sigma, solver)))
        v, v_null = (net(x, t, words, chunk=None) for words in (rows, nulls))
        return v_null + 6.0 * (v - v_null)
    assert relative(latents, diffusion.SOLVERS[solver](velocity, x, sigmas)) < 1e-4
    [(_, alone)] = stream(net, **options | dict(text=text[1:], ids=[1]))
    assert relative(alone, latents[1:]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("solver", ["euler", "unipc-diffusers"])
def test_all_frames_at_once_are_diffusers_pipeline(solver, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4,
        text_dim=8, freq_dim=256, ffn_dim=96, num_layers=2).eval()
    for p in transformer.parameters():
        p += torch.randn_like(p) * 0.05
    transformer.save_pretrained(tmp_path / "transformer")
    sigmas = diffusion.sigma_grid(6, 3.0, solver)
    if solver == "euler":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        set_timesteps = scheduler.set_timesteps
        scheduler.set_timesteps = lambda steps, device: set_timesteps(steps, device, sigmas=sigmas[:-1])
    else:
        scheduler = diffusers_unipc(6, 3.0)
    pipeline = diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler,
                                     transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    text = prompts(2)
    rows, nulls = (torch.nn.functional.pad(z, (0, 0, 0, 512 - z.shape[1]))
                   for z in (diffusion.pad_text(text), NULL.expand(2, 1, 8)))
    noise = torch.cat([drawn("noise", i, 0, 5) for i in range(2)])
    expected = pipeline(prompt_embeds=rows, negative_prompt_embeds=nulls, latents=noise.transpose(1, 2),
                        height=32, width=48, num_frames=17, num_inference_steps=6, guidance_scale=4.0,
                        output_type="latent").frames.transpose(1, 2)
    [(_, made)] = stream(model.load(tmp_path), text, frames=5, chunk=None, steps=6, shift=3.0, guidance=4.0,
                         solver=solver)
    print(f"{solver}: relative difference {relative(made, expected):.1e}")
    assert relative(made, expected) < 1e-5


def test_a_sample_is_the_same_alone_and_in_any_batch(net):
    text = prompts(3)
    for kwargs in ({}, {"history": 1.2}, {"guidance": 1}, {"solver": "unipc", "context_noise": 0.2}):
        together = run(net, text=text, ids=["a", "b", "c"], **kwargs)
        turned = run(net, text=text[::-1], ids=["c", "b", "a"], **kwargs)
        assert relative(turned.flip(0), together) < 1e-5, "rounding may depend on what shares a batch"
        for i, name in enumerate("abc"):
            alone = run(net, text=text[i:i + 1], ids=[name], **kwargs)
            assert relative(alone, together[i:i + 1]) < 1e-5
        assert torch.equal(run(net, text=text, ids=["a", "b", "c"], **kwargs), together)
    assert not torch.equal(run(net, text=text, seed=1), run(net, text=text, seed=2))


def test_windows_by_frame_ids():
    """50 s: 201 latents = one window of 7 chunks and 20 slides that keep 12 and add 3 chunks."""
    fake = Linear()
    seen = list(stream(fake, prompts(1), frames=201, steps=2, guidance=1))
    assert [(first, z.shape) for first, z in seen] == [(3 * i, (1, 3, *SHAPE)) for i in range(67)]
    denoise = [c for c in fake.calls if c[1][0, 0] > 0]
    writes = [c for c in fake.calls if c[1][0, 0] == 0]
    assert [c[2] for c in denoise[::2]] == list(range(0, 21, 3)) + [12, 15, 18] * 20
    slides = [c for c in writes if c[0][1] == 12]
    assert len(slides) == 20 and all(c[2] == 0 and c[3] == (3, 3, 3, 3) for c in slides)
    assert len(writes) == 20 + 6 + 20 * 2, "the last chunk of a window is not written: nobody reads it"


def test_a_slid_window_is_a_fresh_start_from_the_kept_frames(net, monkeypatch):
    text = prompts(1)
    rng = diffusion.rng
    video = run(net, text=text, frames=15, window=9, keep=6)
    for begin in (3, 6):  # frame 9 was made in the window that begins at 3, frame 12 in the next
        monkeypatch.setattr(diffusion, "rng", lambda *names, b=begin: rng(*names[:-1], names[-1] + b))
        again = run(net, text=text, frames=9, context=video[:, begin:begin + 6])
        assert relative(again[:, 6:], video[:, begin + 6:begin + 9]) < 1e-5


@pytest.mark.parametrize("reentry", ["as-is", "first", "all"])
def test_reentry_through_the_vae(net, vae, reentry, monkeypatch):
    """What the second window is shown: the kept latents, with the first or all of them encoded anew."""
    fills = []
    forward = model.WanModel.forward

    def spy(self, x, t, text, **kwargs):
        if x.shape[1] == 6:
            fills.append(x.clone())
        return forward(self, x, t, text, **kwargs)
    monkeypatch.setattr(model.WanModel, "forward", spy)
    film = diffusion.Film(vae, 6, reentry)
    pieces = []
    shown = []
    for _, latents in stream(net, prompts(1), steps=3, frames=12, window=9, keep=6, guidance=1,
                             reenter=film.reenter):
        pieces.append(latents)
        shown.append(film.show(latents))
    out = torch.cat(pieces, 1)
    kept = out[:, 3:9]
    video = vae.decode(out)
    assert [film.shape[1] for film in shown] == [vae.frame_count(3), 6, 6, 6], "decoded as one stream"
    assert relative(torch.cat(shown, 1), video) < 1e-4
    shown = video[:, vae.frame_count(9) - vae.frame_count(6):vae.frame_count(9)]
    expected = kept.clone()
    if reentry == "first":
        expected[:, :1] = vae.encode(shown[:, :1])
    elif reentry == "all":
        expected = vae.encode(shown)
    assert len(fills) == 1 and relative(fills[0], expected) < 1e-4
    assert (relative(expected, kept) > 1e-2) == (reentry != "as-is")


def test_it_goes_no_further_than_asked(net):
    """A chunk is made when it is asked for, and grad mode is left alone in between."""
    fake = Linear()
    chunks = stream(fake, prompts(1), frames=30, steps=2, guidance=1, window=9, keep=6)
    assert fake.calls == [] and next(chunks)[0] == 0 and len(fake.calls) == 2 and torch.is_grad_enabled()
    assert next(chunks)[0] == 3 and len(fake.calls) == 5, "the first was shown, two steps made the second"


def test_a_prompt_switch_changes_only_what_comes_after(net):
    before, after = prompts(1, 1), prompts(1, 2)
    plain = run(net, text=[(0, before)], frames=18, window=9, keep=6)
    assert torch.equal(plain, run(net, text=before, frames=18, window=9, keep=6))
    for first, switch in ((10, 12), (12, 12), (13, 15)):  # from the first slide at or after that frame
        switched = run(net, text=[(0, before), (first, after)], frames=18, window=9, keep=6)
        assert torch.equal(switched[:, :switch], plain[:, :switch])
        assert not torch.equal(switched[:, switch:switch + 3], plain[:, switch:switch + 3])


def test_nothing_grows_with_the_number_of_chunks(net):
    """Every denoising step of every window runs the same shapes; the cache stays the first one."""
    fake = Linear()
    run(fake, batch=1, frames=48, steps=2)
    assert {c[0] for c in fake.calls} == {(2, 3, *SHAPE), (2, 12, *SHAPE)}


@pytest.mark.parametrize("kwargs,message", [
    (dict(frames=10), "10 latent frames after a context of 0 are no chunks of 3; use 9 or 12"),
    (dict(context=torch.zeros(2, 19, *SHAPE), frames=30), "no room in a window of 21; give at most 18"),
    (dict(frames=9, context=torch.zeros(2, 9, *SHAPE)), "use 12 or 15"), (dict(keep=10), "multiple of 3"),
    (dict(keep=21), "cannot keep 21"),
    (dict(null=None), "empty prompt"), (dict(ids=["a"]), "2 prompts"),
    (dict(chunk=None, frames=22), "22 latent frames after 0: made at once.* the window of 21"),
    (dict(chunk=None, context=torch.zeros(2, 1, *SHAPE)), "9 latent frames after 1: made at once"),
    (dict(chunk=None, sink=0), "no sink")])
def test_refusals(net, kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(net, **kwargs)


def test_drift_statistics():
    z = torch.zeros(2, 3, *SHAPE)
    z[1, ..., 0] = 6.0  # one column of six
    stats = diffusion.drift_statistics(z)
    assert stats["mean"].tolist() == pytest.approx([0, 1])
    assert stats["outside"].tolist() == pytest.approx([0, 1 / 6])
    assert stats["std"][1].item() == pytest.approx(5**0.5, rel=1e-2)
