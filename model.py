"""The Wan2.1 text-to-video transformer, made block-causal: for training, with a KV cache, loaded and saved.

    python model.py PATH          describes a checkpoint and checks that it can run causally

    B batch, F latent frames, C latent channels, H W latent height and width, S tokens in a frame (H/2 * W/2),
    L = F * S tokens, N heads, D head dim. Latents are [B, F, C, H, W]; t is [B, F], from 0 (clean) to 1000
    (noise). The output is the velocity v = noise - x0.

A replacement for this network must provide what the rest of the project uses: of WanModel forward(x, t, text,
chunk, clean, cache, start), new_cache, device, config (in_dim, text_dim, text_len) and route; for training
also checkpointing, compile_blocks and blocks; roll of its cache; and of this file PATCH, load, save,
read_checkpoint, settings, trained_causally, find_weights, chunk_sizes, pad_text, check_causal, causal_layout,
teacher_layout and forward_flops.

Precision is Wan's: the residual stream, modulation, time path and head stay fp32; the large matrix products
and attention run in `compute`. Parameters of those products are stored in `dtype` (fp32 while training).
"""

import functools
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

import common
import flags
import locate
import lora
import records
import routing
from common import Stored, UserError
from files import as_json, write_text
from routing import visible

PATCH = 2  # latent pixels that a token covers in height and in width, in a single frame


@dataclass(frozen=True)
class Config:  # Wan2.1-T2V-1.3B; 14B is 5120, 13824, 40, 40
    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6


# ----------------------------------------------------------------------------------------------------
# attention layouts. A layout is ((first, last, past), ...) in tokens: tokens first..last-1 attend to each
# other and to all tokens before past. Bidirectional, block-causal (section 3.2 of the paper), cached and
# teacher-forcing attention (section 3.1) differ in nothing else.

def chunk_sizes(frames: int, chunk: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Frames in each chunk: 3 becomes (3, 3, ...), a tuple is checked, None is one chunk of all frames."""
    if isinstance(chunk, int):
        sizes = (chunk,) * (frames // max(chunk, 1))
    else:
        sizes = (frames,) if chunk is None else tuple(chunk)
    if sum(sizes) != frames or min(sizes, default=0) < 1:
        raise ValueError(f"{frames} latent frames are not chunks of {chunk}; give their sizes, as (1, 3, 3)")
    return sizes


def causal_layout(sizes: tuple[int, ...], per_frame: int, start: int = 0) -> tuple:
    layout = []
    for size in sizes:
        layout.append((start * per_frame, (start + size) * per_frame, start * per_frame))
        start += size
    return tuple(layout)


def teacher_layout(sizes: tuple[int, ...], per_frame: int) -> tuple:
    """Clean chunks, then the noisy ones; a noisy chunk attends to itself and to the clean chunks before it.
    Nothing attends to the last clean chunk, so it is left out."""
    clean = causal_layout(sizes[:-1], per_frame)
    half = clean[-1][1] if clean else 0
    return clean + tuple((half + a, half + b, past) for a, b, past in causal_layout(sizes, per_frame))


def attention(q, k, v, layout, mask=None):
    """Attention of q [B, Lq, N, D], the last Lq positions of k and v [B, Lk, N, D] -> [B, Lq, N * D]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, N, L, D]
    if mask is not None:
        y = compiled_flex()(q, k, v, block_mask=mask)
    else:
        skip = k.shape[2] - q.shape[2]
        y = torch.cat([F.scaled_dot_product_attention(
            q[:, :, first - skip:last - skip], visible(k, first, last, past), visible(v, first, last, past))
            for first, last, past in layout], dim=2)
    return y.transpose(1, 2).flatten(2)


def forward_flops(c: Config, layout, route: int | None = None) -> int:
    """FLOPs of one clip's forward pass: 2 for each weight and token, 4 for each channel and attended pair of
    tokens."""
    tokens = layout[-1][1]
    pairs = 0
    for first, last, past in layout:
        chunks = routing.past_chunks(layout, past)
        seen = past * route // chunks if route and chunks > route else past
        pairs += (last - first) * (seen + last - first)
    matrices = tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim) + c.text_len * 2 * c.dim**2
    ends = tokens * c.dim * PATCH**2 * (c.in_dim + c.out_dim) + c.text_len * c.dim * (c.text_dim + c.dim)
    return 2 * (c.num_layers * matrices + ends) + 4 * c.num_layers * c.dim * (pairs + tokens * c.text_len)


@functools.cache
def compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


def flex_on(x):
    return None if x.is_cpu else compiled_flex()


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # the cached result may take part in autograd later
def block_mask(layout: tuple, device: torch.device, block: int = 128) -> BlockMask:
    """The layout as flex_attention takes it, in closed form: at 65,536 tokens a dense mask would be 4 GB."""
    length = layout[-1][1]
    spans = torch.tensor(layout)                                                           # [chunks, 3]
    rows = spans.repeat_interleave(spans[:, 1] - spans[:, 0], dim=0, output_size=length).unbind(1)
    first, last, past = rows                                                               # [L] each

    def extremes(x):  # minimum and maximum over each block of rows
        padded = F.pad(x[None].double(), (0, -length % block), mode="replicate")[0].long()
        return padded.view(-1, block, 1).aminmax(dim=1)                                    # [blocks, 1] each

    (first_min, first_max), (last_min, last_max), (past_min, past_max) = map(extremes, rows)
    lo = torch.arange(0, length, block)[None]                                              # [1, blocks]
    hi = lo + block  # beyond the length in the last block, which is thereby never full
    touched = (lo < past_max) | ((lo < last_max) & (hi > first_min))
    reach_min = extremes(torch.where(past >= first, last, past))[0]
    full = (hi <= reach_min) | ((lo >= first_max) & (hi <= last_min))

    def listed(blocks):  # how many and which, in ascending order
        return (blocks.sum(-1, dtype=torch.int32)[None, None].to(device),
                (~blocks).int().argsort(dim=-1, stable=True).int()[None, None].to(device))

    first, last, past = (x.int().to(device) for x in rows)

    def allowed(b, h, q, kv):
        return (kv < past[q]) | ((kv >= first[q]) & (kv < last[q]))

    return BlockMask.from_kv_blocks(*listed(touched & ~full), *listed(full), BLOCK_SIZE=block,
                                    mask_mod=allowed, seq_lengths=(length, length))


# ----------------------------------------------------------------------------------------------------
# positional and time embeddings

@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def rope_table(head_dim: int, start: int, frames: int, rows: int, columns: int, device) -> torch.Tensor:
    """cos and sin of the angles, [2, F, S, 1, D/2]: a head's pairs are split among time, row and column."""
    side = 2 * (head_dim // 6)
    axes = [(head_dim - 2 * side, torch.arange(start, start + frames)), (side, torch.arange(rows)),
            (side, torch.arange(columns))]
    t, h, w = (torch.outer(p.double(), 10000 ** (-torch.arange(0, d, 2).double() / d)) for d, p in axes)
    grid = (frames, rows, columns, -1)
    angle = torch.cat([t[:, None, None].expand(grid), h[:, None].expand(grid), w.expand(grid)], -1)
    return torch.stack([angle.cos(), angle.sin()]).float().flatten(2, 3).unsqueeze(3).to(device)


def rotate(x, rope):
    """Applies RoPE to x [B, F, S, N, D]: each pair (x[2i], x[2i+1]) is a complex number."""
    cos, sin = rope
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def sinusoid(t, dim: int):
    """The embedding of t, computed in fp64: in bf16 t = 998.4 would be 1000."""
    w = 10000 ** (-torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angle = t.double().unsqueeze(-1) * w
    return torch.cat([angle.cos(), angle.sin()], -1).float()


# ----------------------------------------------------------------------------------------------------
# the transformer; attribute names are the official checkpoints' keys

class Linear(nn.Linear):
    """A linear layer computed in `compute`, whatever dtype its weights are stored in."""

    def __init__(self, inputs: int, outputs: int, dtype, compute):
        super().__init__(inputs, outputs, dtype=dtype)
        self.compute = compute

    def forward(self, x):
        return F.linear(x.to(self.compute), self.weight.to(self.compute), self.bias.to(self.compute))


class RMSNorm(nn.Module):
    """RMS norm over all heads together, in fp32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c: Config, linear):
        super().__init__()
        self.heads = c.num_heads
        self.q, self.k, self.v, self.o = (linear(c.dim, c.dim) for _ in range(4))
        self.norm_q = RMSNorm(c.dim, c.eps)
        self.norm_k = RMSNorm(c.dim, c.eps)

    def queries(self, x):
        return self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))

    def keys(self, x):
        return self.norm_k(self.k(x)).unflatten(-1, (self.heads, -1))

    def values(self, x):
        return self.v(x).unflatten(-1, (self.heads, -1))


class Block(nn.Module):
    def __init__(self, c: Config, linear):
        super().__init__()
        self.self_attn = Attention(c, linear)
        self.cross_attn = Attention(c, linear)
        self.norm3 = nn.LayerNorm(c.dim, c.eps)
        self.ffn = nn.Sequential(linear(c.dim, c.ffn_dim), nn.GELU("tanh"), linear(c.ffn_dim, c.dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, c.dim) / c.dim**0.5)
        self.eps = c.eps

    def forward(self, x, e, rope, attend, context, remember=None):
        """x [B, F, S, dim] and e [B, F, 6, dim] are fp32. attend(q, k, v) is self-attention with a mask or a
        cache; remember(text_kv, context) returns the prompt's keys and values from a cache."""
        y = attend(*self.before(x, e, rope))
        text_kv = remember(self.text_kv, context) if remember else self.text_kv(context)
        return self.after(x, y.view(x.shape), e, *text_kv)

    def before(self, x, e, rope):
        shift, scale = (self.modulation + e)[:, :, :2].split(1, dim=2)                     # [B, F, 1, dim]
        a = norm(x, self.eps) * (1 + scale) + shift
        q, k, v = self.self_attn.queries(a), self.self_attn.keys(a), self.self_attn.values(a)
        return [z.to(v.dtype).flatten(1, 2) for z in (rotate(q, rope), rotate(k, rope), v)]  # [B, L, N, D]

    def after(self, x, y, e, text_k, text_v):
        gate, shift, scale, gate_ffn = (self.modulation + e)[:, :, 2:].split(1, dim=2)
        x = x + gate * self.self_attn.o(y)
        q = self.cross_attn.queries(self.norm3(x).flatten(1, 2)).to(text_v.dtype)
        y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, text_k, text_v)))
        x = x + self.cross_attn.o(y.transpose(1, 2).reshape(x.shape))
        return x + gate_ffn * self.ffn(norm(x, self.eps) * (1 + scale) + shift)

    def text_kv(self, context):  # [B, text_len, dim] -> two [B, text_len, N, D]
        v = self.cross_attn.values(context)
        return self.cross_attn.keys(context).to(v.dtype), v


def norm(x, eps):
    return F.layer_norm(x, x.shape[-1:], eps=eps)


class Head(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head = nn.Linear(c.dim, c.out_dim * PATCH**2)
        self.modulation = nn.Parameter(torch.randn(1, 2, c.dim) / c.dim**0.5)
        self.eps = c.eps

    def forward(self, x, e):
        shift, scale = (self.modulation + e.unsqueeze(2)).split(1, dim=2)                  # [B, F, 1, dim]
        return self.head(norm(x, self.eps) * (1 + scale) + shift)


def pad_text(rows: list[torch.Tensor]) -> torch.Tensor:
    """Embeddings [n, text_dim] of any lengths, padded to [B, longest, text_dim] as the model takes them."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


class WanModel(nn.Module):
    def __init__(self, config: Config, dtype=torch.float32, compute=None):
        super().__init__()
        c = self.config = config
        self.compute = compute or dtype
        self.checkpointing = False  # recompute each block in the backward pass instead of keeping activations
        self.route = None  # number of past chunks that each query attends to (routing.py); None: all
        linear = functools.partial(Linear, dtype=dtype, compute=self.compute)
        self.patch_embedding = nn.Conv3d(c.in_dim, c.dim, (1, PATCH, PATCH), (1, PATCH, PATCH), dtype=dtype)
        self.text_embedding = nn.Sequential(linear(c.text_dim, c.dim), nn.GELU("tanh"), linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c, linear) for _ in range(c.num_layers))
        self.head = Head(c)

    @property
    def device(self) -> torch.device:
        return self.head.modulation.device

    def forward(self, x, t, text, chunk=3, clean=None, cache=None, start=0):
        """x [B, F, C, H, W], t [B, F], text [B, n, text_dim] (zero rows are padding) -> v like x, in fp32.
        The denoiser of Eq. 2, here predicting velocity; t is a noise level for each frame (Eq. 1).

        chunk   3: block-causal in chunks of 3 frames; (1, 3, 3): in chunks of these; None: bidirectional.
        clean   for teacher forcing: each chunk of x attends to itself and to the clean frames of the chunks
                before it. clean is shaped like x, at t = 0 and the same positions; its last chunk is unused.
        cache   from new_cache(), for autoregressive sampling (Eq. 3): x is frames start..start+F-1 of a
                longer video and attends to all frames before it. Its keys and values are written to the
                cache; another call with the same start overwrites them. No gradient is computed.
        """
        batch, frames, channels, height, width = x.shape
        sizes = chunk_sizes(frames, chunk)
        per_frame = height * width // PATCH**2
        self.check(x, t, text)
        assert clean is None or (cache is None and clean.shape == x.shape), "clean is like x, without a cache"
        assert start == 0 or cache is not None, "start counts from the cache's first frame"
        if clean is not None:
            clean = clean[:, :frames - sizes[-1]]
            x = torch.cat([clean.to(x.dtype), x], 1)
            t = F.pad(t, (clean.shape[1], 0))
            layout = teacher_layout(sizes, per_frame)
        else:
            layout = causal_layout(sizes, per_frame, start)
        head_dim = self.config.dim // self.config.num_heads
        rope = rope_table(head_dim, start, frames, height // PATCH, width // PATCH, x.device)
        if clean is not None:
            rope = torch.cat([rope[:, :clean.shape[1]], rope], 1)

        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            e = self.time_embedding(sinusoid(t, self.config.freq_dim))                     # [B, F, dim]
            e0 = self.time_projection(e).unflatten(-1, (6, -1))                            # [B, F, 6, dim]
            h = self.patchify(x)                                                           # [B, F, S, dim]
            if cache is None:
                h = self.parallel_blocks(h, e0, rope, layout, text)
            else:
                h = self.cached_blocks(h, e0, rope, layout, text, cache, start)
            v = self.head(h[:, -frames:], e[:, -frames:])  # the clean half of teacher forcing has no output
            return self.unpatchify(v, height, width)

    def check(self, x, t, text):
        batch, frames, channels, height, width = x.shape
        if channels != self.config.in_dim or height % PATCH or width % PATCH:
            raise ValueError(f"latents are {tuple(x.shape)}; this model takes [B, F, {self.config.in_dim}, "
                             f"H, W], H and W multiples of {PATCH}")
        if t.shape != (batch, frames) or t.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"t is {tuple(t.shape)} {t.dtype}; it must be ({batch}, {frames}) and float32, "
                             "one noise level a frame (bfloat16 would round 998.4 to 1000)")
        text_len, text_dim = self.config.text_len, self.config.text_dim
        if text.shape[0] != batch or text.shape[1] > text_len or text.shape[2] != text_dim:
            raise ValueError(f"text is {tuple(text.shape)}, must be ({batch}, at most {text_len}, "
                             f"{text_dim})")

    def parallel_blocks(self, h, e0, rope, layout, text):
        if self.route and routing.most_past(layout) > self.route:
            attend = functools.partial(routing.attention, layout=layout, route=self.route, flex=flex_on(h))
        else:
            mask = None if h.is_cpu or len(layout) == 1 else block_mask(layout, h.device)
            attend = functools.partial(attention, layout=layout, mask=mask)
        context = self.context(text)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, e0, rope, attend, context, use_reentrant=False)
            else:
                h = block(h, e0, rope, attend, context)
        return h

    def cached_blocks(self, h, e0, rope, layout, text, cache, start):
        cache.claim(start, h.shape, layout)
        context = None if cache.holds_text(text) else self.context(text)
        for i, block in enumerate(self.blocks):
            attend = functools.partial(cache.attend, i, layout, self.route)
            h = block(h, e0, rope, attend, context, functools.partial(cache.remember, i))
        return h

    def patchify(self, x):
        """The patch embedding: a convolution with stride = kernel is a product over a patch's (c, y, x)."""
        x = x.unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH))                  # [B, F, C, h, p, w, p]
        x = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3).to(self.compute)  # [B, F, S, C p p]
        weight = self.patch_embedding.weight.flatten(1).to(self.compute)
        return F.linear(x, weight, self.patch_embedding.bias.to(self.compute)).float()

    def unpatchify(self, x, height, width):  # a token's outputs are (y, x, c), unlike its inputs
        x = x.unflatten(-1, (PATCH, PATCH, -1)).unflatten(2, (height // PATCH, -1))  # [B, F, h, w, p, p, C]
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(*x.shape[:2], -1, height, width)

    def context(self, text):
        """The prompt's embedding. Padding is embedded and attended to like words, as when Wan was trained. In
        fp32, so that the gradients of all blocks add up alike in any order."""
        return self.text_embedding(F.pad(text, (0, 0, 0, self.config.text_len - text.shape[1]))).float()

    def new_cache(self, batch: int, frames: int, height: int, width: int) -> "Cache":
        return Cache(self, batch, frames, height, width)

    def compile_blocks(self):
        """Compiles what surrounds the attention call: its shapes do not depend on the length of the past."""
        for block in self.blocks:
            block.before = torch.compile(block.before, dynamic=False)
            block.after = torch.compile(block.after, dynamic=False)

    @torch.no_grad()
    def init_weights(self, *names):
        """Fresh weights, determined by names; the head starts at zero, so the first prediction is v = 0."""
        generator = common.rng(*names)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                fan_in = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / fan_in**0.5)
                module.bias.zero_()
            elif isinstance(module, (Block, Head)):
                modulation = torch.randn(module.modulation.shape, generator=generator)
                module.modulation.copy_(modulation / self.config.dim**0.5)
        for block in self.blocks:  # residual branches start small: deep networks then learn sooner
            for output in block.self_attn.o, block.cross_attn.o, block.ffn[2]:
                output.weight.mul_(0.1)
        self.head.head.weight.zero_()
        return self


class Cache:
    """Keys (after RoPE) and values of the frames so far, and those of the prompt: all state of sampling."""

    def __init__(self, model: WanModel, batch: int, frames: int, height: int, width: int):
        c = model.config
        self.frames = frames
        self.per_frame = height * width // PATCH**2
        self.filled = 0  # frames whose keys and values are valid
        self.layout = ()  # their chunks
        self.pooled = [[] for _ in range(c.num_layers)]  # mean keys of past chunks, [B, N, D] each
        self.text = None  # the prompt's embedding and its version
        heads = (c.num_heads, c.dim // c.num_heads)
        # zeros, since flex_attention multiplies what is masked within a block by 0, and 0 * NaN is NaN
        self.k, self.v = torch.zeros(2, c.num_layers, batch, frames * self.per_frame, *heads,
                                     dtype=model.compute, device=model.device)
        self.text_k, self.text_v = torch.empty(2, c.num_layers, batch, c.text_len, *heads,
                                               dtype=model.compute, device=model.device)

    def claim(self, start: int, shape, layout):
        """Reserves the frames from start on; what is cached after them becomes invalid."""
        batch, frames, per_frame = shape[:3]
        if batch != self.k.shape[1] or per_frame != self.per_frame:
            raise ValueError(f"the cache is for batch {self.k.shape[1]} and {self.per_frame} tokens a frame, "
                             f"got {batch} and {per_frame}")
        if start + frames > self.frames:
            raise ValueError(f"frames {start}..{start + frames - 1} exceed the cache's {self.frames}; slide "
                             "the window, or make a larger cache")
        if start > self.filled:
            raise ValueError(f"frames {start}.. need all before them, but only {self.filled} are cached")
        begin = start * per_frame
        kept = tuple((first, min(last, begin), past) for first, last, past in self.layout if first < begin)
        self.layout = kept + layout
        self.forget_pooled(len(kept))
        self.filled = start + frames

    def roll(self, chunk: int) -> int:
        """Drops a chunk. Those after it move up: RoPE's angles add up, so turning their keys back in time by
        the frames that were dropped is what caching them there would have done. Returns these frames."""
        first, last, _ = self.layout[chunk]
        frames = (last - first) // self.per_frame
        end = self.filled * self.per_frame
        turn = rope_table(self.k.shape[-1], -frames, 1, 1, 1, self.k.device)
        for k, v in zip(self.k, self.v, strict=True):  # a layer at a time, for want of memory
            k[:, first:first + end - last] = rotate(k[:, last:end], turn)
            v[:, first:first + end - last] = v[:, last:end].clone()
        sizes = [last - first for first, last, _ in self.layout]
        self.layout = causal_layout((*sizes[:chunk], *sizes[chunk + 1:]), 1)
        self.forget_pooled(chunk)
        self.filled -= frames
        return frames

    def forget_pooled(self, chunk: int):
        for means in self.pooled:
            del means[chunk:]

    def holds_text(self, text) -> bool:
        """Whether text is the same, unchanged tensor as in the last call. Comparing its values would make the
        CPU wait for the GPU at every step."""
        before = self.text
        self.text = (text, None if text.is_inference() else text._version)
        return before is not None and before[0] is text and before[1] == self.text[1]

    def remember(self, layer: int, text_kv, context):
        """The prompt's keys and values; context is None when they are cached already."""
        if context is not None:
            self.text_k[layer], self.text_v[layer] = text_kv(context)
        return self.text_k[layer], self.text_v[layer]

    def attend(self, layer: int, layout, route: int | None, q, k, v):
        first, last = layout[0][0], layout[-1][1]
        self.k[layer, :, first:last], self.v[layer, :, first:last] = k, v
        if route and len(self.layout) - 1 > route:
            means = self.pooled[layer]
            means += [self.k[layer, :, a:b].float().mean(1) for a, b, _ in self.layout[len(means):-1]]
            return routing.attention(q, self.k[layer], self.v[layer], self.layout, route,
                                     torch.stack(means, 2), flex_on(q))
        return attention(q, self.k[layer, :, :last], self.v[layer, :, :last], layout)


# ----------------------------------------------------------------------------------------------------
# checkpoints

def load(path, device="cpu", dtype=torch.float32, compute=None, loras=()) -> WanModel:
    """A model from a Wan, diffusers, ComfyUI or model_k directory, or a file of weights.
    Matrix products are stored in dtype and computed in compute (default: dtype); the rest is fp32."""
    weights, config = read_checkpoint(path, loras)
    with torch.device("meta"):
        model = WanModel(config, dtype, compute)
    model.route = settings(path).get("route")
    return common.fill(model, weights, device, str(path))


def find_weights(path) -> list[Path]:
    """The files of a model; of a LoRA that train_df.py made, with those of the model that it changes."""
    files = locate.find(path, "transformer")
    base, loras = base_of(files[0])
    return files + [lora.split(file)[0] for file in loras] + (find_weights(base) if base else [])


def base_of(file: Path) -> tuple[str | None, list[str]]:
    """The model that a LoRA of train_df.py changes, and the LoRAs that were merged into that before."""
    about = settings(file) if file.name == locate.ADAPTER else {}
    if "base" not in about:
        return None, []
    base = locate.local(locate.named(about["base"], file.parent), "transformer")
    if Path(base).resolve() == file.parent.resolve():
        raise UserError(f"{file} is said to change itself; correct base in {file.with_name('config.json')}")
    loras = [(locate.named(name, file.parent), strength) for name, strength in about.get("base_loras", ())]
    return base, [f"{name}:{strength}" for name, strength in loras]


# what train_df.py writes into config.json
SETTINGS = {"wan": Path, "mode": str, "image_first": float, "held_out": int, "route": (records.SIZE, None),
            "window": records.SIZE, "step": int, "base": Path, "base_loras": [[Path, float]]}


def settings(path) -> dict:
    """The config.json beside a model's weights; train_df.py records there how the model was trained."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    recorded = records.check(locate.read_config(folder / "config.json"), folder / "config.json", SETTINGS)
    return recorded | ({"wan": locate.wan_for(path, recorded["wan"])} if recorded.get("wan") else {})


def trained_causally(path) -> bool | None:
    """Whether a checkpoint was trained chunk by chunk: train_df.py records its mode; Wan's own classes are
    bidirectional. None: its files do not tell, as a .pt of Self-Forcing."""
    file = find_weights(path)[0]
    stated = common.open_weights(file)[1].get("config") or {}
    if file.name.startswith(("diffusion_pytorch_model", locate.ADAPTER)):  # else it may be about another file
        stated = locate.read_config(file.with_name("config.json")) or stated
    if "mode" in stated or "wan" in stated:
        return stated.get("mode") != "full"
    published = {"WanModel": False, "WanTransformer3DModel": False, "CausalWanModel": True}
    return published.get(str(stated.get("_class_name")))


def read_checkpoint(path, loras=()) -> tuple[dict[str, Stored], Config]:
    """({name: Stored}, sizes) of a model with LoRAs, each "FILE" or "FILE:STRENGTH", merged into it."""
    files = locate.find(path, "transformer")
    base, before = base_of(files[0])
    if base:
        weights, config = read_checkpoint(base, [*before, files[0]])
    else:
        weights, config = read_whole(path, files)
    return lora.merge(weights, loras, rename_diffusers), config


def read_whole(path, files) -> tuple[dict[str, Stored], Config]:
    weights, metadata = locate.read(files, "transformer")
    if any(".attn1." in key for key in weights):
        weights = {rename_diffusers(key): value for key, value in weights.items()}
    records.check(metadata, f"{files[0]}: its metadata", {"config": dict})
    stated = metadata.get("config") or locate.read_config(files[0].with_name("config.json"))
    refuse_other_models(path, weights, stated)
    return weights, infer_config(path, weights, stated)


def rename_diffusers(key: str) -> str:
    if key.startswith("blocks."):
        for theirs, ours in ((".attn1.", ".self_attn."), (".attn2.", ".cross_attn."), (".to_out.0.", ".o."),
                             (".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."), (".norm2.", ".norm3."),
                             (".ffn.net.0.proj.", ".ffn.0."), (".ffn.net.2.", ".ffn.2."),
                             (".scale_shift_table", ".modulation")):
            key = key.replace(theirs, ours)
        return key
    for theirs, ours in (("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
                         ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
                         ("condition_embedder.time_proj.", "time_projection.1."),
                         ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
                         ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
                         ("scale_shift_table", "head.modulation"), ("proj_out.", "head.head.")):
        key = key.replace(theirs, ours)
    return key


RELATIVES = {  # what only they have, by a part of its name
    "Fun-Control": ("ref_conv.", "control_adapter."), "S2V": ("audio_encoder.", "audio_proj."),
    "Animate": ("face_adapter.", "motion_encoder."), "SkyReels-V2": ("fps_embedding.", "fps_projection.")}


def refuse_other_models(path, weights: dict, stated: dict):
    """Refuses Wan's relatives: they hold the same blocks and more, and need inputs that this model lacks."""
    def has(*names):
        return any(name in key for key in weights for name in names)

    takes = weights["patch_embedding.weight"].shape[1]
    gives = weights["head.head.weight"].shape[0] // PATCH**2 if has("head.head.weight") else takes
    kind = stated.get("model_type")
    if kind == "vace" or has("vace_"):
        name = "VACE"
    elif kind == "flf2v" or has("img_emb.emb_pos", "image_embedder.pos_embed"):
        name = "FLF2V (first and last frame to video)"
    elif kind == "i2v" or has("img_emb.", "image_embedder.", "k_img.", "add_k_proj") or takes == 36:
        name = "I2V (image to video)"
    elif kind == "ti2v" or (takes, gives) == (48, 48):
        name = "Wan2.2-TI2V-5B"
    elif takes != gives:
        name = f"control (Fun and others: {takes} channels in, {gives} out)"
    else:
        name = next((relative for relative, parts in RELATIVES.items() if has(*parts)), None)
    if not name:
        return
    raise UserError(f"{path} is a {name} checkpoint; only text-to-video (Wan2.1-T2V) loads here:\n"
                    f"{locate.DOWNLOAD}")


def infer_config(path, weights: dict, stated: dict) -> Config:
    """Sizes from the shapes of the tensors. What these do not tell comes from config.json, in Wan's terms or
    diffusers', if that is of this model, and else is as in every published Wan."""
    def shape(name):
        if name not in weights:
            raise UserError(f"{path} is not a whole Wan transformer: it has no {name}")
        return weights[name].shape

    dim, in_dim = shape("patch_embedding.weight")[:2]
    layers = {int(key.split(".")[1]) for key in weights if re.match(r"blocks\.\d+\.", key)}
    sizes = {"dim": dim, "in_dim": in_dim, "out_dim": shape("head.head.weight")[0] // PATCH**2,
             "ffn_dim": shape("blocks.0.ffn.0.weight")[0], "num_layers": len(layers),
             "freq_dim": shape("time_embedding.0.weight")[1], "text_dim": shape("text_embedding.0.weight")[1]}
    theirs = {"num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim"}
    stated = {theirs.get(key, key): value for key, value in stated.items()}
    fits = all(stated.get(name, size) == size for name, size in sizes.items())
    if fits and "attention_head_dim" in stated:
        heads, width = stated.get("num_heads"), stated["attention_head_dim"]
        fits = records.fits([heads, width], [int, int]) and heads * width == dim
    untold = {"num_heads": range(1, dim + 1), "text_len": records.SIZE, "eps": float}
    if fits:
        sizes |= {name: stated[name] for name in untold if name in records.check(stated, path, untold)}
    if "num_heads" not in sizes:
        if dim % 128:
            raise UserError(f"{path}: no config.json says how many heads a width of {dim} has")
        sizes["num_heads"] = dim // 128  # as in every published Wan
    if dim % sizes["num_heads"] or dim // sizes["num_heads"] % 2:
        raise UserError(f"{path}: a width of {dim} cannot have {sizes['num_heads']} heads")
    return Config(**sizes)


COMFYUI_CAUSAL = {"transformer": {"causal_ar": True}}  # by which ComfyUI knows a model to sample by chunks


def save(model: WanModel, folder, weights: dict | None = None, **extra):
    """Writes a directory in Wan's layout. weights: instead of the model's own (EMA, gathered shards).
    extra: further entries of config.json; with base, the model that they change, the weights are a LoRA's."""
    folder = Path(folder)
    config = asdict(model.config)
    weights = weights or model.state_dict()
    for name, value in weights.items():
        common.check_finite(value, f"{name} of the weights for {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    del config["text_dim"]  # official files leave it to the weights
    config = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v"} | config | extra
    causal = extra.get("mode", "full") != "full"
    entries = {"config": json.dumps(COMFYUI_CAUSAL)} if causal else None
    if "base" in extra:
        entries, weights = None, {f"diffusion_model.{name}": value for name, value in weights.items()}
    common.save_tensors(saved_file(folder, config), weights, entries, config=config)
    config["crc32"] = common.crc32(saved_file(folder, config))
    write_text(folder / "config.json", as_json(config, indent=2) + "\n")


def saved_file(folder: Path, config: dict) -> Path:
    return folder / (locate.ADAPTER if "base" in config else "diffusion_pytorch_model.safetensors")


def damage(folder, step: int) -> str | None:
    """What has happened to the model that save wrote at the end of a training, at this step: "" if nothing,
    None if there is no such model."""
    folder = Path(folder)
    try:
        config = locate.read_config(folder / "config.json")
        if config.get("step") != step:
            return None
        file = saved_file(folder, config)
        return "" if config.get("crc32") == common.crc32(file) else f"{file} is damaged"
    except (UserError, OSError) as error:
        return common.first_line(error)


# ----------------------------------------------------------------------------------------------------
# command line: python model.py PATH

@torch.no_grad()
def check_causal(model: WanModel):
    """Checks on noise that a change in a chunk affects all frames from there on and none before, and that
    the cached forward agrees with the parallel one. Returns their relative difference."""
    c = model.config
    device = model.device
    route = model.route
    model.route = None  # all of the past is to be reached
    head = model.head.head.weight
    if untrained := not head.any():  # a fresh head predicts nothing, which would prove nothing
        head.fill_(0.01)
    x, text = (torch.randn(shape, generator=common.rng("check", i)).to(device)
               for i, shape in enumerate([(1, 9, c.in_dim, 8, 8), (1, 4, c.text_dim)]))
    t = torch.tensor([[900.0] * 3 + [500.0] * 3 + [100.0] * 3], device=device)
    v = model(x, t, text)
    for chunk in range(3):
        first = 3 * chunk
        changed = x.clone()
        changed[:, first:first + 3] += 1
        v_changed = model(changed, t, text)
        if not torch.equal(v_changed[:, :first], v[:, :first]):
            raise UserError(f"not causal: a change in chunk {chunk} reaches earlier frames")
        if any(torch.equal(v_changed[:, f], v[:, f]) for f in range(first, 9)):
            raise UserError(f"a change in chunk {chunk} does not reach all frames from there on")
    cache = model.new_cache(1, 9, 8, 8)
    chunks = zip((0, 3, 6), x.split(3, 1), t.split(3, 1), strict=True)
    cached = torch.cat([model(xc, tc, text, cache=cache, start=f) for f, xc, tc in chunks], 1)
    error = ((cached - v).norm() / v.norm()).item()
    model.route = route
    if untrained:
        head.zero_()
    if not error < (1e-4 if model.compute == torch.float32 else 3e-2):
        raise UserError(f"cached and parallel forwards differ by {error:.1e} (relative)")
    return error


@dataclass
class Flags:
    path: str = flags.positional()  # A Wan, diffusers or model_k directory, a .safetensors or a .pt file
    device: flags.Device = "cpu"  # Device to check it on: cpu, cuda or cuda:N
    dtype: flags.Dtype = "float32"  # Precision of the matrix products

    __post_init__ = flags.in_range


def main(cfg: Flags):
    common.checked(cfg.device)
    cfg.path = locate.local(cfg.path, "transformer")
    weights, c = read_checkpoint(cfg.path)
    published = {(1536, 30): "Wan2.1-T2V-1.3B", (5120, 40): "Wan2.1-T2V-14B"}
    parameters = sum(math.prod(w.shape) for w in weights.values())
    stored = sorted({str(w.dtype).removeprefix("torch.") for w in weights.values()})
    print(f"{published.get((c.dim, c.num_layers), 'a Wan of another size')}: {parameters:,} parameters in "
          f"{len(weights)} tensors, stored as {', '.join(stored)}")
    print(", ".join(f"{key} {value}" for key, value in asdict(c).items()))
    model = load(cfg.path, cfg.device, getattr(torch, cfg.dtype))
    error = check_causal(model)
    trained = {True: "yes", False: "no", None: "unknown"}[trained_causally(cfg.path)]
    print(f"can run causally: yes; trained causally: {trained}")
    print(f"cached and parallel forwards agree to {error:.1e} ({cfg.dtype}, {cfg.device})")


if __name__ == "__main__":
    common.run(main, flags.parse(Flags, __doc__))
