"""The Wan2.1 VAE: video to latents and back, any length in bounded memory.

    vae = vae.load("Wan2.1-T2V-1.3B", "cuda", torch.bfloat16)
    z = vae.encode(video)      # [B,T,3,H,W] in [-1,1] -> [B,F,C,h,w], normalised
    video = vae.decode(z)      # T = 4(F-1)+1, H = 8h, W = 8w
    state = {}                 # a stream: any number of frames at a time, with either function
    for z in pieces:
        video = vae.decode(z, state)

Of the past, a causal convolution needs only the last two frames of its input. A video can therefore run
through the network in temporal pieces of any size: each convolution keeps these frames for the next piece,
and the result is the same as for the whole video. Frame 0 stands alone: it is never merged with others in
time.

Inside, tensors are [B,T,H,W,C] with C last in memory: norms and 1x1 convolutions work on rows, a 2-d
convolution takes B*T images without a copy, and the fast channels-last kernels are used throughout.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locate
import records
from common import UserError, check_finite, fill, save_tensors

# mean and standard deviation of Wan2.1's latents by channel, which its own file does not hold
WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)

# upper bound for the widest activation of a piece. On a CPU larger pieces are not faster; on a GPU this gives
# 2 latent frames of 480x832 in bf16: 2.6 GB of activations, 1.9 GB of kept frames, 0.3 GB of weights
PIECE_BYTES = {"cpu": 2**25, "cuda": 2**30}


# ----------------------------------------------------------------------------------------------------
# layers. `state` is what a stream carries from piece to piece: {layer: the last frames of its input}

class RMSNorm(nn.Module):
    """x / rms(x) over channels, times gamma; computed in fp32, whatever its input."""

    def __init__(self, width, dims=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * dims))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.gamma.flatten(), 1e-24)


class CausalConv(nn.Conv3d):
    """A convolution over each frame and the two before it, after an optional norm and SiLU."""

    def __init__(self, width, out, kernel=(3, 3, 3)):
        super().__init__(width, out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x, state, norm=None):
        x = self.with_past(x, state, norm)  # [B,2+T,H,W,C]
        faster = self.kernel_size[1] == 3 and self.in_channels >= 32 and x.shape[1] > 3
        if faster and fp32_on_cpu(x) and not tracked(x, self.weight):
            return self.winograd(x, state)
        return over_time(self, x)

    def with_past(self, x, state, norm):
        """The input of the convolution: two frames of the past, zeros at the start, and those of x."""
        B, T, *rest = x.shape
        past = state[self] if self in state else x.new_zeros(B, 2, *rest)
        if tracked(x, norm.gamma if norm else x):
            joined = torch.cat([past, F.silu(norm(x)) if norm else x], 1)
            state[self] = joined[:, -2:]
            return joined
        # without autograd, norm and SiLU write directly into the convolution's input
        joined = x.new_empty(B, 2 + T, *rest)
        joined[:, :2] = past
        if norm:  # frame by frame, so that the output of the norm stays small
            for frame, target in zip(x.unbind(1), joined[:, 2:].unbind(1), strict=True):
                torch.ops.aten.silu.out(norm(frame), out=target)
        else:
            joined[:, 2:] = x
        state[self] = joined[:, -2:].clone()  # a view would keep the whole tensor alive
        return joined

    def winograd(self, x, state):
        """The same result with 4 instead of 6 2-d convolutions for every two frames: Winograd's F(2,3) along
        time. Convolutions are nine tenths of a decode at width 96; this is 1.45 times as fast on a CPU."""
        B, T, H, W, _ = x.shape
        if T % 2:  # the first of an odd number of frames is computed by itself
            return torch.cat([over_time(self, x[:, :3]), self.winograd(x[:, 1:], state)], 1)
        if (self, "kernels") not in state:
            a, b, c = self.weight.unbind(2)
            state[self, "kernels"] = [k.contiguous(memory_format=torch.channels_last)
                                      for k in (a, (a + b + c) / 2, (a - b + c) / 2, c)]
        kp, kq, kr, ks = state[self, "kernels"]
        x0, x1, x2, x3 = (x[:, i:i + T - 3:2] for i in range(4))  # the 4 input frames of a pair of outputs
        p = per_frame(x0 - x2, kp, None)
        q = per_frame(x1 + x2, kq, self.bias)  # part of both outputs, hence the bias
        r = per_frame(x2 - x1, kr, None)
        s = per_frame(x1 - x3, ks, None)
        y = x.new_empty(B, T // 2 - 1, 2, H, W, self.out_channels)
        torch.add(p.add_(q), r, out=y[:, :, 0])
        torch.sub(q.sub_(r), s, out=y[:, :, 1])
        return y.flatten(1, 2)


def tracked(*tensors):
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def fp32_on_cpu(x):
    return x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def convolve(x, weight, bias, stride, padding):
    ones = [1] * len(stride)
    if fp32_on_cpu(x):  # torch.convolution computes small inputs with a kernel of a third of the speed
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, ones, 1)
    return torch.convolution(x, weight, bias, stride, padding, ones, False, [0] * len(stride), 1)


def over_time(conv, x):
    """A 3-d convolution of [B,T,H,W,C]."""
    y = convolve(x.permute(0, 4, 1, 2, 3), conv.weight, conv.bias, conv.stride, conv.padding)
    return y.permute(0, 2, 3, 4, 1)


def per_frame(x, weight, bias, stride=(1, 1), padding=(1, 1)):
    """A 2-d convolution of every frame of [B,T,H,W,C]."""
    y = convolve(x.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, stride, padding)
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def pointwise(conv, x):
    """A 1x1(x1) convolution; with channels last it is a matrix product."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class Residual(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.residual = nn.ModuleDict({"0": RMSNorm(width), "2": CausalConv(width, out),
                                       "3": RMSNorm(out), "6": CausalConv(out, out)})
        self.shortcut = nn.Conv3d(width, out, 1) if width != out else None

    def forward(self, x, state):
        y = self.residual["2"](x, state, self.residual["0"])
        y = self.residual["6"](y, state, self.residual["3"])
        return y.add_(pointwise(self.shortcut, x) if self.shortcut else x)


class Attention(nn.Module):
    """Attention with one head over the pixels of each frame."""

    def __init__(self, width):
        super().__init__()
        self.norm = RMSNorm(width, dims=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x, state):
        q, k, v = pointwise(self.to_qkv, self.norm(x)).flatten(2, 3).chunk(3, -1)  # [B,T,H*W,C]
        y = F.scaled_dot_product_attention(q, k, v).view_as(x)
        return pointwise(self.proj, y).add_(x)


class Down(nn.Module):
    """Halves height and width and, if `time`, the frames after frame 0."""

    def __init__(self, width, time):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(width, width, 3, stride=2)})
        self.time_conv = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x, state):
        conv = self.resample["1"]
        padded = F.pad(x, (0, 0, 0, 1, 0, 1))  # at the right and the bottom only
        x = per_frame(padded, conv.weight, conv.bias, (2, 2), (0, 0))
        if not self.time_conv:
            return x
        # output k is computed from frames 2k-2, 2k-1, 2k; output 0 is frame 0 itself
        first = self not in state
        window = x if first else torch.cat([state[self], x], 1)
        state[self] = x[:, -1:].clone()
        if first and x.shape[1] == 1:
            return x
        y = over_time(self.time_conv, window)
        return torch.cat([x[:, :1], y], 1) if first else y


class Up(nn.Module):
    """Doubles height and width and, if `time`, the frames after frame 0; halves the channels."""

    def __init__(self, width, time):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(width, width // 2, 3, padding=1)})
        self.time_conv = CausalConv(width, 2 * width, (3, 1, 1)) if time else None

    def forward(self, x, state):
        if not self.time_conv:
            return self.enlarge(x)
        if self in state:
            return self.enlarge(self.double(x, state))
        # frame 0 is not doubled, and for the frames after it the past is zeros
        state[self] = True
        if x.shape[1] == 1:
            return self.enlarge(x)
        return self.enlarge(torch.cat([x[:, :1], self.double(x[:, 1:], state)], 1))

    def double(self, x, state):
        y = self.time_conv(x, state).unflatten(-1, (2, -1))  # [B,T,H,W,2,C]: the earlier and the later frame
        return y.movedim(4, 2).flatten(1, 2)  # [B,2T,H,W,C]

    def enlarge(self, x):
        B, T, H, W, C = x.shape
        x = x[:, :, :, None, :, None].expand(B, T, H, 2, W, 2, C).reshape(B, T, 2 * H, 2 * W, C)
        return per_frame(x, self.resample["1"].weight, self.resample["1"].bias)


class Encoder(nn.Module):
    def __init__(self, width, multipliers, blocks, z_dim, temporal):
        super().__init__()
        self.conv1 = CausalConv(3, width)
        self.downsamples = nn.ModuleList()
        last = width
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.downsamples.append(Residual(last, width * multiplier))
                last = width * multiplier
            if level < len(temporal):
                self.downsamples.append(Down(last, temporal[level]))
        self.middle = nn.ModuleList([Residual(last, last), Attention(last), Residual(last, last)])
        self.head = nn.ModuleDict({"0": RMSNorm(last), "2": CausalConv(last, 2 * z_dim)})

    def forward(self, x, state):
        x = self.conv1(x, state)
        for layer in [*self.downsamples, *self.middle]:
            x = layer(x, state)
        return self.head["2"](x, state, self.head["0"])


class Decoder(nn.Module):
    def __init__(self, width, multipliers, blocks, z_dim, temporal):
        super().__init__()
        last = width * multipliers[-1]
        self.conv1 = CausalConv(z_dim, last)
        self.middle = nn.ModuleList([Residual(last, last), Attention(last), Residual(last, last)])
        self.upsamples = nn.ModuleList()
        for level in reversed(range(len(multipliers))):
            for _ in range(blocks + 1):
                self.upsamples.append(Residual(last, width * multipliers[level]))
                last = width * multipliers[level]
            if level > 0:
                self.upsamples.append(Up(last, temporal[level - 1]))
                last //= 2
        self.head = nn.ModuleDict({"0": RMSNorm(last), "2": CausalConv(last, 3)})

    def forward(self, x, state):
        x = self.conv1(x, state)
        for layer in [*self.middle, *self.upsamples]:
            x = layer(x, state)
        return self.head["2"](x, state, self.head["0"])


# ----------------------------------------------------------------------------------------------------
# the VAE

class WanVAE(nn.Module):
    """Wan2.1's VAE, or a smaller one of the same family. Latents and videos are returned in fp32."""

    def __init__(self, width=96, multipliers=(1, 2, 4, 4), blocks=2, z_dim=16, temporal=(False, True, True),
                 latents_mean=None, latents_std=None):
        super().__init__()
        assert len(temporal) == len(multipliers) - 1, "one temporal flag for each step between levels"
        self.latents_mean = latents_mean or [0.0] * z_dim
        self.latents_std = latents_std or [1.0] * z_dim
        self.width = width
        self.z_dim = z_dim
        self.time = 2 ** sum(temporal)  # frames in a latent frame
        self.space = 2 ** len(temporal)  # pixels in a latent's height and width
        self.encoder = Encoder(width, multipliers, blocks, z_dim, temporal)
        self.conv1 = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(width, multipliers, blocks, z_dim, temporal)
        channels_last(self)

    def encode(self, video: Tensor, state: dict | None = None) -> Tensor:
        """[B,T,3,H,W] in [-1,1] -> normalised posterior mean [B,F,C,h,w].

        Without a state, the video is whole. With one, it is the next frames of a stream, any number of them,
        and the result is the latents that they complete, possibly none. The state is {} at first and updated
        by every call. It belongs to one stream in one direction, takes gigabytes for large videos, and is
        invalid after an error. state["held"] are the frames that do not fill a latent yet. A stream has no
        gradients and does not check for NaN."""
        if state is None:
            return self.normalise(self.posterior(video)[0])
        with torch.no_grad():
            return self.normalise(self.encode_pieces(self.check_video(video), state).chunk(2, 2)[0])

    def decode(self, z: Tensor, state: dict | None = None) -> Tensor:
        """Normalised latents [B,F,C,h,w] -> video [B,T,3,H,W] in [-1,1]; a state is used as in encode."""
        latents = self.denormalise(self.check_latents(z))
        if state is None:
            return self.reconstruct(latents).clamp_(-1, 1)
        with torch.no_grad():
            return self.decode_pieces(latents, state).clamp_(-1, 1)

    # the same with gradients, for training; `piece`: latent frames computed at once

    def posterior(self, video: Tensor, piece: int | None = None) -> tuple[Tensor, Tensor]:
        """Video [B,T,3,H,W] -> mean and log variance of its latents [B,F,C,h,w], not normalised."""
        check_finite(self.check_video(video), "video")
        frames = video.shape[1]
        if frames != (low := self.frame_count(self.latent_count(frames))):
            raise UserError(f"video of {frames} frames: must be 1 more than a multiple of {self.time}; "
                            f"give {low} or {low + self.time}")
        return self.encode_pieces(video, {}, piece).chunk(2, 2)

    def reconstruct(self, latents: Tensor, piece: int | None = None) -> Tensor:
        """Latents [B,F,C,h,w], not normalised -> video [B,T,3,H,W], not clamped."""
        check_finite(self.check_latents(latents), "latents")
        return self.decode_pieces(latents, {}, piece)

    # each piece is written directly into the result, since torch.cat at the end would need twice the memory

    def encode_pieces(self, video, state, piece=None):
        short = 0 if "held" in state else self.time - 1  # frame 0 fills a latent by itself
        video = torch.cat([state["held"], video], 1) if "held" in state else video
        B, T, _, H, W = video.shape
        count = (T + short) // self.time
        piece = piece or self.best_piece(B, H, W)
        video, held = video.tensor_split([count * self.time - short], 1)
        state["held"] = held.clone()  # a view would keep all of the video alive, and change with it
        out = self.new_output(B, count, 2 * self.z_dim, H // self.space, W // self.space)
        for i in range(0, count, piece):
            part = video[:, max(0, i * self.time - short):(i + piece) * self.time - short]
            x = self.encoder(self.as_weights(part).movedim(2, -1), state)
            out[:, i:i + piece] = pointwise(self.conv1, x).movedim(-1, 2)
        return out

    def decode_pieces(self, latents, state, piece=None):
        B, count, _, h, w = latents.shape
        H = h * self.space
        W = w * self.space
        short = 0 if self.decoder.conv1 in state else self.time - 1
        piece = piece or self.best_piece(B, H, W)
        out = self.new_output(B, count * self.time - short, 3, H, W)
        for i in range(0, count, piece):
            x = pointwise(self.conv2, self.as_weights(latents[:, i:i + piece]).movedim(2, -1))
            y = self.decoder(x, state).movedim(-1, 2)
            out[:, max(0, i * self.time - short):(i + piece) * self.time - short] = y
        return out

    def best_piece(self, batch, height, width):
        """The number of latent frames to compute at once, so that activations fit into PIECE_BYTES."""
        weight = self.conv2.weight
        frame = batch * height * width * self.width * weight.element_size()  # bytes at full resolution
        frames = PIECE_BYTES["cpu" if weight.is_cpu else "cuda"] // frame - 2  # and two frames of the past
        return max(1, frames // self.time)

    def as_weights(self, x):
        return x.to(self.conv2.weight.device, self.conv2.weight.dtype)

    def new_output(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.conv2.weight.device)

    def frame_count(self, latents):
        """Frames of a video of so many latent frames."""
        return max(0, self.time * (latents - 1) + 1)

    def latent_count(self, frames):
        """Latent frames that this many frames complete."""
        return (frames + self.time - 1) // self.time

    def normalise(self, mean):
        return (mean - self.channels(self.latents_mean, mean)) / self.channels(self.latents_std, mean)

    def denormalise(self, z):
        return z.float() * self.channels(self.latents_std, z) + self.channels(self.latents_mean, z)

    def channels(self, values, like):
        return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1)

    # checks of the input

    def check_video(self, video):
        check_shape(video, "video", "[B,T,3,H,W]", 3)
        for name, size in zip(("height", "width"), video.shape[3:], strict=True):
            if size % self.space:
                low = size // self.space * self.space
                raise UserError(f"video of {name} {size}: must be a multiple of {self.space}; "
                                f"resize or crop it to {f'{low} or ' if low else ''}{low + self.space}")
        return video

    def check_latents(self, z):
        check_shape(z, "latents", f"[B,F,{self.z_dim},h,w]", self.z_dim)
        return z


def check_shape(x, what, layout, channels):
    if x.dtype == torch.uint8 and what == "video":
        raise UserError("video is uint8; the VAE takes floats in [-1,1]: video / 127.5 - 1")
    if not x.is_floating_point():
        raise UserError(f"{what} is {x.dtype}; the VAE takes floats")
    if x.dim() != 5:
        raise UserError(f"{what} has shape {list(x.shape)}: must have the 5 dimensions {layout}")
    if x.shape[2] != channels:
        raise UserError(f"{what} has shape {list(x.shape)}, so {x.shape[2]} channels: must be {layout}")
    if 0 in x.shape:
        raise UserError(f"{what} has shape {list(x.shape)}: nothing in it")


# ----------------------------------------------------------------------------------------------------
# files

def load(path: str | Path, device="cpu", dtype=torch.float32) -> WanVAE:
    """A VAE for inference from a Wan, diffusers or ComfyUI directory, or a file of weights."""
    weights, sizes, what = read(path)
    with torch.device("meta"):
        vae = WanVAE(**sizes).to(dtype)
    return channels_last(fill(vae, weights, device, what)).requires_grad_(False)


def read(path) -> tuple[dict, dict, str]:
    """({name: Stored}, what a WanVAE is made with, where they are from)"""
    files, config = find(path)
    weights, metadata = locate.read(files, "vae")
    what = f"{files[0]} as a Wan2.1 VAE"
    if "encoder.conv_in.weight" in weights:
        blocks = {k.split(".")[4] for k in weights if k.startswith("decoder.up_blocks.0.resnets.")}
        weights = {official(name, len(blocks) + 1): stored for name, stored in weights.items()}
    sizes = sizes_of(weights, what)
    stats = {k: (config | metadata).get(k) for k in ("latents_mean", "latents_std")}
    if None not in stats.values():
        check_stats(stats, sizes["z_dim"], files[0])
    else:
        if sizes["z_dim"] != len(WAN_MEAN):
            raise UserError(f"{files[0]} lacks latents_mean and latents_std, and Wan's are for "
                            f"{len(WAN_MEAN)} channels, not {sizes['z_dim']}: write the VAE with vae.save")
        stats = {"latents_mean": WAN_MEAN, "latents_std": WAN_STD}
    return weights, sizes | {k: list(v) for k, v in stats.items()}, what


def check_stats(stats: dict, channels: int, file):
    """Latents are divided by these: a wrong one would spoil them all."""
    records.check(stats, file, dict.fromkeys(stats, [float]))
    if any(len(row) != channels for row in stats.values()) or min(stats["latents_std"]) <= 0:
        raise UserError(f"{file}: latents_mean and latents_std must be {channels} numbers each, the latter "
                        f"above 0, not {stats}")


def save(vae: WanVAE, path: str | Path):
    """Writes a safetensors file with the official names and, as metadata, the latents' mean and std."""
    save_tensors(path, vae.state_dict(), latents_mean=vae.latents_mean, latents_std=vae.latents_std)


def find(path):
    """(weight files, diffusers' config or {}) of the VAE at path, a file or a directory."""
    files = locate.find(path, "vae")
    diffusers = files[0].name.startswith("diffusion_pytorch_model")
    return files, locate.read_config(files[0].with_name("config.json")) if diffusers else {}


def sizes_of(weights, what) -> dict:
    """The sizes of a WanVAE, read from the shapes of its weights."""
    try:
        downs = sorted(int(k.split(".")[2]) for k in weights
                       if re.fullmatch(r"encoder\.downsamples\.\d+\.resample\.1\.weight", k))
        width = weights["encoder.conv1.weight"].shape[0]
        blocks = downs[0]
        if blocks > len(weights):  # a name may hold any number
            raise KeyError(blocks)
        last = [f"encoder.downsamples.{i * (blocks + 1)}.residual.2.weight" for i in range(len(downs) + 1)]
        return {"width": width, "multipliers": tuple(weights[k].shape[0] // width for k in last),
                "blocks": blocks, "z_dim": weights["conv2.weight"].shape[0],
                "temporal": tuple(f"encoder.downsamples.{i}.time_conv.weight" in weights for i in downs)}
    except (KeyError, IndexError, ZeroDivisionError):
        raise UserError(f"{what}: its tensors are not those of one, but of {locate.describe(weights)}"
                        ) from None


RENAMES = (  # diffusers -> official
    (r"\.norm1\.", ".residual.0."), (r"\.conv1\.", ".residual.2."),
    (r"\.norm2\.", ".residual.3."), (r"\.conv2\.", ".residual.6."), (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.conv_in\.", ".conv1."), (r"\.norm_out\.", ".head.0."), (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."), (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."), (r"\.down_blocks\.", ".downsamples."),
    (r"^quant_conv\.", "conv1."), (r"^post_quant_conv\.", "conv2."),
)


def official(name: str, per_level: int) -> str:
    """Wan's name of a diffusers tensor; per_level is the number of decoder layers on each level."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    if match := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", name):
        position = int(match[3]) if match[2] == "resnets" else per_level - 1
        layer = int(match[1]) * per_level + position
        name = f"decoder.upsamples.{layer}." + name[match.end():]
    return name


def channels_last(vae):
    """Copies the weights into the memory order of the activations, so that no call needs to reorder them."""
    order = {4: torch.channels_last, 5: torch.channels_last_3d}
    for p in vae.parameters():
        p.data = p.data.clone(memory_format=order.get(p.dim(), torch.contiguous_format))
    return vae
