"""How fast each stage is, against the hardware's limit and against peers.

    python bench.py vae --width 32 --frames 33 --size 128x128      # our VAE against diffusers'
"""

import platform
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import vae
from common import UserError, positional, run


@dataclass
class Config:
    what: Literal["vae"] = positional()  # the stage to measure
    width: int = 32  # base width of the VAE; Wan2.1's is 96
    frames: int = 33  # of the video, 4n+1
    size: str = "128x128"  # of the video, WIDTHxHEIGHT
    repeats: int = 5  # of every measurement; the median is shown
    device: str = "cpu"  # cpu, cuda or cuda:N
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and activations


def main(cfg: Config):
    threads = f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(cfg.device) if cfg.device.startswith("cuda") else f"{cpu()}, {threads}"
    print(f"{name}, torch {torch.__version__}, {cfg.dtype}", flush=True)
    {"vae": bench_vae}[cfg.what](cfg)


def cpu():
    info = Path("/proc/cpuinfo")  # Linux only, and the only place that names the CPU there
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return name[1] if name else platform.processor()


def alternate(repeats: int, device: str, *functions) -> list[float]:
    """Median seconds of each; they take turns, so that a slow spell of the machine hits all alike."""
    def seconds(function):
        start = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for function in functions:  # the first call also plans and allocates
        seconds(function)
    rounds = [[seconds(function) for function in functions] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


@torch.no_grad()
def bench_vae(cfg: Config):
    """The same random weights and input, through our VAE and through diffusers'."""
    try:
        from diffusers import AutoencoderKLWan
    except ImportError:
        raise UserError("bench.py vae compares with diffusers: pip install diffusers") from None
    if not (size := re.fullmatch(r"(\d+)x(\d+)", cfg.size)):
        raise UserError(f"--size {cfg.size}: must be WIDTHxHEIGHT, like 128x128")
    width, height = int(size[1]), int(size[2])
    dtype = getattr(torch, cfg.dtype)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoencoderKLWan(base_dim=cfg.width).save_pretrained(folder)
        ours = vae.load(folder, cfg.device, dtype)
        theirs = AutoencoderKLWan.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False)
    theirs.to(cfg.device)

    video = torch.rand(1, cfg.frames, 3, height, width, device=cfg.device, dtype=dtype) * 2 - 1
    mean = ours.posterior(video)[0]
    z = ours.normalise(mean)
    their_video, their_mean = (x.transpose(1, 2).contiguous().to(dtype) for x in (video, mean))
    pairs = {"encode": (lambda: ours.posterior(video)[0],
                        lambda: theirs.encode(their_video).latent_dist.mode()),
             "decode": (lambda: ours.decode(z), lambda: theirs.decode(their_mean).sample)}
    print(f"width {cfg.width}, {cfg.frames} frames of {cfg.size}, median of {cfg.repeats}\n\n"
          "|        | ours, s | diffusers, s | ratio | ours, clips/s | ours, frames/s | max difference |\n"
          "|--------|---------|--------------|-------|---------------|----------------|----------------|")
    for name, (us, them) in pairs.items():
        off = (us().float() - them().transpose(1, 2).float()).abs().max().item()
        a, b = alternate(cfg.repeats, cfg.device, us, them)
        print(f"| {name} | {a:7.3f} | {b:12.3f} | {b / a:5.2f} | {1 / a:13.3f} | {cfg.frames / a:14.1f} |"
              f" {off:14.1e} |", flush=True)


if __name__ == "__main__":
    run(main, Config, __doc__)
