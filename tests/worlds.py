"""What several tests share: comparisons, pictures, folders, processes, a small model and a store of clips."""

import contextlib
import errno
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import common
import data
import files
import model

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


# ----------------------------------------------------------------------------------------------------
# comparisons

def relative(a, b) -> float:
    """The norm of a - b as a share of b's."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def assert_close(a, b, tolerance):
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    worst = (a - b).abs().max().item()
    assert worst <= tolerance, f"off by {worst:.1e}, of up to {b.abs().max().item():.1e}"


@contextlib.contextmanager
def refused(message):
    """The block must end in a UserError that matches, and change nothing in the current folder."""
    before = tree(".")
    with pytest.raises(common.UserError, match=message):
        yield
    assert tree(".") == before


# ----------------------------------------------------------------------------------------------------
# pictures

def noise(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=common.rng("noise", *shape), dtype=dtype)


def texture(height, width):
    """Pink noise on a torus, colours and all: [3,H,W] in about 0..1. In float64: float32 leaves a few pixels
    so near the border of two grey levels that it takes the CPU's rounding to tell which they get."""
    spectrum = torch.fft.rfft2(noise(3, height, width, dtype=torch.float64))
    y = torch.fft.fftfreq(height, 1 / height, dtype=torch.float64)[:, None]
    x = torch.fft.rfftfreq(width, 1 / width, dtype=torch.float64)
    spectrum = spectrum / torch.hypot(y, x).clamp(min=2) ** 1.2
    pink = torch.fft.irfft2(spectrum, s=(height, width))
    shared = pink.mean(0, keepdim=True)
    mixed = shared / shared.std() + 0.4 * pink / pink.std()
    return 0.5 + 0.13 * mixed


def shifted(image, x):
    """image moved to the right by x pixels, not necessarily whole ones."""
    phase = torch.exp(-2j * math.pi * x * torch.fft.rfftfreq(image.shape[-1], dtype=image.dtype))
    return torch.fft.irfft(torch.fft.rfft(image) * phase, n=image.shape[-1])


def levels(video):
    return (video * 255).round().clamp(0, 255).to(torch.uint8)


def pan(frames, speed=1.5, height=128, width=160):
    image = texture(height, width)
    return levels(torch.stack([shifted(image, speed * t) for t in range(frames)]))


def blank(frames, height=8, width=8):
    return torch.zeros(frames, 3, height, width, dtype=torch.uint8)


def read_video(path) -> torch.Tensor:
    """All frames of a file: [T,3,H,W]."""
    return torch.stack(list(data.read_frames(data.probe(path))))


# ----------------------------------------------------------------------------------------------------
# scores

def curves_of(scorer, video, pieces=None, fps=16) -> dict:
    """What a scorer makes of a video that it is given in pieces of so many frames."""
    scorer.start(fps, len(video))
    for piece in video.split(pieces or len(video)):
        scorer.add(piece)
    return scorer.finish()


def digest(x) -> list[float]:
    """A few numbers that tell one result from another."""
    x = x.double().flatten()
    return [x.mean().item(), x.std().item(), *x[::len(x) // 6 + 1].tolist()]


# ----------------------------------------------------------------------------------------------------
# folders

def tree(folder) -> dict:
    """{path: bytes} of every file, hidden ones too, and {path: None} of every folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None
            for p in sorted(Path(folder).rglob("*"))}


def tree_but_command(folder) -> dict:
    """The same, without the command line that meta.json records."""
    meta = json.loads(Path(folder, "meta.json").read_text())
    return tree(folder) | {"meta.json": {k: v for k, v in meta.items() if k != "command"}}


def identity(folder) -> dict:
    """Inode, time and size of every file and folder: they show if the same bytes were written again."""
    stats = {p: p.stat() for p in Path(folder).rglob("*")}
    return {p: (s.st_ino, s.st_mtime_ns, s.st_size, s.st_nlink) for p, s in stats.items()}


def lose_a_clip(make) -> Path:
    """make() fills a store, loses a clip, and must make that again, with the same bytes, and nothing else."""
    out = make()
    before, files = tree(out), identity(out / "clips")
    lost = sorted(files)[1]
    lost.unlink()
    make()
    assert tree(out) == before
    assert [p for p, file in identity(out / "clips").items() if files[p] != file] == [lost]
    return out


@contextlib.contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def disk_full_after(clips: int):
    """Any further clip meets a full disk, upon which the stage must say that those are kept."""
    write, written = data.write_clip, []

    def until_full(*args):
        if len(written) == clips:
            raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
        written.append(write(*args))
    message = f"(?s)No space left.*{clips} finished clips are kept in .*to continue"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(common.UserError, match=message):
        patch.setattr(data, "write_clip", until_full)
        yield


# ----------------------------------------------------------------------------------------------------
# running stages: in this process, as scripts, and in forked processes

def run_stage(stage, cfg):
    """What stage.main(cfg) returns; no process group is left behind, and no folder kept."""
    try:
        return stage.main(cfg)
    finally:
        files.release()
        if dist.is_initialized():
            dist.destroy_process_group()


def torchrun(ranks: int = 1) -> list[str]:
    """The command that starts a script in so many processes, at a port that nobody else can have taken."""
    if ranks == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def start(script, *args, ranks=1, **options) -> subprocess.Popen:
    """One of the project's scripts, or the one at an absolute path. Options are Popen's."""
    options = dict(env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    return subprocess.Popen([*torchrun(ranks), str(ROOT / script), *map(str, args)], **options)


def call(script, *args, code=0, **options) -> subprocess.CompletedProcess:
    """A script, as start() starts it, that must end with this exit code."""
    return ended(start(script, *args, **options), code)


def ended(process, code=0) -> subprocess.CompletedProcess:
    """Waits for a process, which must end with this exit code."""
    output, errors = process.communicate()
    assert process.returncode == code, f"{process.args} ended with {process.returncode}:\n{errors or output}"
    return subprocess.CompletedProcess(process.args, code, output, errors)


def call_text(text, *args, cwd=ROOT) -> str:
    """What the Python program with this text prints."""
    command = [sys.executable, "-c", textwrap.dedent(text), *map(str, args)]
    return ended(subprocess.Popen(command, env=ENV, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  text=True)).stdout


def wait_until(reached, process):
    """Returns as soon as reached() is true, which it must be before the process ends."""
    while not reached():
        assert process.poll() is None, f"ended too soon: {process.communicate()}"
        time.sleep(0.001)


def fork(*functions):
    """A process that calls these functions, one after another; forked, so that it starts at once."""
    def target():
        sys.stdout = open(os.devnull, "w")
        for function in functions:
            function()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = multiprocessing.get_context("fork").Process(target=target)
        process.start()
    return process


def fork_ranks(ranks: int, function):
    """Calls the function in so many processes, as torchrun would start them."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    processes = [fork(lambda rank=rank: os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=str(port)), function)
        for rank in range(ranks)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks


def dies(*functions) -> bool:
    """Calls the functions in another process. Was that killed, instead of living to its end?"""
    process = fork(*functions)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"ended with {process.exitcode}"
    return process.exitcode != 0


def fork_and_kill(seconds: float, function):
    """Calls the function in another process, which is killed after this time if it still runs."""
    process = fork(function)
    process.join(seconds)
    process.kill()
    process.join()


# ----------------------------------------------------------------------------------------------------
# a model and its data

def tiny_model(name: str, **sizes) -> model.WanModel:
    """A transformer of random weights, a function of its name, whose output is not zero."""
    sizes = dict(dim=64, ffn_dim=64, num_heads=2, num_layers=1, text_dim=64, text_len=32) | sizes
    net = model.WanModel(model.Config(**sizes)).init_weights(name)
    torch.nn.init.normal_(net.head.head.weight, std=0.1, generator=common.rng(name, "head"))
    return net


def teacher_forcing_is_a_rollout(net, x, t, text, clean, sizes):
    """Asserts that one parallel pass behind a clean past is a rollout over that past through the cache, and
    returns what the pass gives."""
    parallel = net(x, t, text, chunk=sizes, clean=clean)
    cache = net.new_cache(len(x), *x.shape[1:2], *x.shape[3:])
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        v = net(x[:, part], t[:, part], text, chunk=(size,), cache=cache, start=start)
        assert relative(parallel[:, part], v) < 1e-5
        net(clean[:, part], torch.zeros(len(x), size), text, chunk=(size,), cache=cache, start=start)
        start += size
    return parallel


PROMPTS = ("A disc moving left", "A ring moving up", "A square moving down", "A triangle moving right")


def fill_store(folder, kinds, shape, text_dim=64, smooth=False, **meta):
    """A store of clips c0, c1, ... of these kinds, all noise. smooth: each of one colour and all of one
    prompt, so that there is something to learn."""
    folder, entries = Path(folder), []
    for i, kind in enumerate(kinds):
        id, prompt = f"c{i}", 0 if smooth else i
        seen = (1, shape[1], 1, 1) if smooth else shape
        latents = torch.randn(seen, generator=common.rng("clip", i)).expand(shape)
        text = torch.randn(3 + prompt % 4, text_dim, generator=common.rng("text", prompt))
        data.write_clip(folder, id, latents, text, PROMPTS[prompt % 4], f"{id}.mp4")
        entries.append(data.index_entry(id, PROMPTS[prompt % 4], kind, 0, f"{id}.mp4"))
    null = torch.randn(1, text_dim, generator=common.rng("null"))
    data.write_text_embedding(folder / "empty.safetensors", null)
    common.claim(folder / "meta.json", {
        "latents": list(shape), "width": 32, "height": 32, "frames": 4 * shape[0] - 3, "fps": 16,
        "wan": str(folder.parent / "wan"), "seed": 0} | meta)
    data.write_index(folder, entries)
