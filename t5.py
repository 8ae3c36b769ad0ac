"""umT5, the text encoder of Wan2.1: the network and its tokenizer.

Shapes: B batch, L tokens, N heads, D head dim. Attributes are named as in the published .pth.
"""

import html
import math
import re
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import nn

import locate
from common import UserError, check_finite, fill, first_line, save_tensors

try:
    import ftfy  # Wan's own cleaning of prompts, where it is installed
except ImportError:
    ftfy = None

MAX_TOKENS = 512  # of a prompt, with its final eos, as Wan was trained
MAX_DISTANCE = 128  # tokens at least this far apart share the last position bucket
BATCH_TOKENS = 8192  # in one forward


# ----------------------------------------------------------------------------------------------------
# the network

class PositionBias(nn.Module):
    """A learnt term of each head's attention scores that depends on the distance from query to key."""

    def __init__(self, buckets, heads):
        super().__init__()
        self.embedding = nn.Embedding(buckets, heads)

    def forward(self, buckets):  # [2L-1], of the distances 1-L .. L-1
        table = self.embedding(buckets).T  # [N, 2L-1]
        rows = table.unfold(1, (len(buckets) + 1) // 2, 1)  # [N, L, L]; row i starts at distance i - (L-1)
        return rows.flip(1)[None]  # [1, N, L, L]; row q, the query, starts at distance -q


class Attention(nn.Module):
    def __init__(self, dim, dim_attn, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim_attn, bias=False) for _ in range(3))
        self.o = nn.Linear(dim_attn, dim, bias=False)

    def forward(self, x, bias):  # [B, L, dim]
        qkv = [f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        # T5 does not divide by sqrt(D). SDPA computes scores and softmax in fp32 for bf16 inputs too, without
        # [B, N, L, L] copies: at 512 tokens 3x faster than an explicit softmax, and in bf16 closer to fp32
        x = F.scaled_dot_product_attention(*qkv, attn_mask=bias, scale=1.0)  # [B, N, L, D]
        return self.o(x.transpose(1, 2).flatten(2))


class FFN(nn.Module):
    def __init__(self, dim, dim_ffn):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, dim_ffn, bias=False), nn.GELU("tanh"))
        self.fc1 = nn.Linear(dim, dim_ffn, bias=False)
        self.fc2 = nn.Linear(dim_ffn, dim, bias=False)

    def forward(self, x):
        return self.fc2(self.fc1(x) * self.gate(x))


class Block(nn.Module):
    def __init__(self, dim, dim_attn, dim_ffn, heads, buckets):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=1e-6)  # computed in fp32, whatever its input
        self.attn = Attention(dim, dim_attn, heads)
        self.pos_embedding = PositionBias(buckets, heads)  # unlike in T5, every layer has its own
        self.norm2 = nn.RMSNorm(dim, eps=1e-6)
        self.ffn = FFN(dim, dim_ffn)

    def forward(self, x, buckets, padding):
        bias = self.pos_embedding(buckets)
        if padding is not None:
            bias = bias.masked_fill(padding, torch.finfo(bias.dtype).min)  # [B, N, L, L]
        x = x + self.attn(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))


class Encoder(nn.Module):
    """The encoder half of umT5; the default sizes are Wan's umT5-XXL."""

    def __init__(self, vocab=256384, dim=4096, dim_attn=4096, dim_ffn=10240, heads=64, layers=24, buckets=32):
        super().__init__()
        self.buckets = buckets
        self.token_embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, dim_attn, dim_ffn, heads, buckets) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """ids [B, L] -> [B, L, dim]; mask [B, L] is 0 at padding, which is not attended to."""
        length = ids.shape[1]
        buckets = distance_buckets(torch.arange(1 - length, length), self.buckets).to(ids.device)
        padding = None if mask is None else (mask == 0)[:, None, None]  # [B, 1, 1, L]
        x = self.token_embedding(ids)
        for block in self.blocks:
            x = block(x, buckets, padding)
        return self.norm(x)


def distance_buckets(distance: torch.Tensor, buckets: int) -> torch.Tensor:
    """key - query -> the row in the bias table: exact for near tokens, log-spaced for distant ones."""
    side = buckets // 2  # rows for each direction
    near = buckets // 4  # distances with a row of their own
    n = distance.abs()
    # log2 in fp64 is exact at powers of two, which are bucket boundaries
    fraction = (n.double().clamp(min=near) / near).log2() / math.log2(MAX_DISTANCE / near)
    far = (near + (fraction * (side - near)).long()).clamp(max=side - 1)
    return torch.where(n < near, n, far) + side * (distance > 0)


# ----------------------------------------------------------------------------------------------------
# the tokenizer

# full-width forms and ligatures -> plain letters; curly quotes -> straight; control characters -> nothing
TIDY = {c: unicodedata.normalize("NFKC", chr(c)) for c in (*range(0xFB00, 0xFB07), *range(0xFF01, 0xFFEF))}
TIDY |= dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
TIDY |= dict.fromkeys((*range(9), 0x0B, *range(0x0E, 0x20), 0x7F, 0xFEFF, *range(0xFFF9, 0xFFFD)))


SPECIAL = re.compile("(</s>|<pad>|<unk>)")


def clean(prompt: str) -> str:
    """Wan's cleaning of a prompt: ftfy, entities unescaped twice, runs of whitespace to one space."""
    if ftfy:
        text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    else:
        text = tidy(prompt)
    return " ".join(text.split())


def tidy(prompt: str) -> str:
    """Of ftfy, TIDY and NFC, and surrogates repaired; then entities unescaped twice. Unlike ftfy it does not
    repair mojibake (text decoded with a wrong charset), strip terminal escapes, or unescape a third time."""
    text = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = html.unescape(html.unescape(text)).translate(TIDY)
    return unicodedata.normalize("NFC", text)


def token_ids(tokenizer: SentencePieceProcessor, prompt: str) -> list[int]:
    """At most MAX_TOKENS, the last of them eos. "</s>" and the like in a prompt are these tokens, as they are
    to Wan's tokenizer, which is Hugging Face's."""
    ids = []
    for text in SPECIAL.split(clean(prompt)):
        ids += [tokenizer.piece_to_id(text)] if SPECIAL.fullmatch(text) else tokenizer.encode(text)
    return ids[:MAX_TOKENS - 1] + [tokenizer.eos_id()]


def load_tokenizer(path) -> SentencePieceProcessor:
    """The sentencepiece model beside the weights at path, or in their file, where ComfyUI's have it."""
    tried = locate.tokenizer_files(path)
    file = next((file for file in tried if file.is_file()), None)
    if file:
        content = file.read_bytes()
    else:
        file = find_weights(path)[0]
        weights, _ = locate.read([file], "t5")
        if "spiece_model" not in weights:
            raise UserError(f"no tokenizer for {path}: tried {', '.join(map(str, tried))}, and spiece_model "
                            f"in {file}\nhf download Wan-AI/Wan2.1-T2V-1.3B google/umt5-xxl/spiece.model "
                            f"--local-dir {file.parent}")
        content = weights["spiece_model"].read().numpy().tobytes()
    try:
        tokenizer = SentencePieceProcessor()
        tokenizer.LoadFromSerializedProto(content)
        tokenizer.vocab_size()
    except (RuntimeError, OSError) as error:
        raise UserError(f"{file} is not a sentencepiece model: {first_line(error)}") from None
    if (tokenizer.pad_id(), tokenizer.eos_id()) != (0, 1):
        raise UserError(f"{file} has pad id {tokenizer.pad_id()} and eos id {tokenizer.eos_id()}, umT5's has "
                        f"0 and 1; that one comes with Wan2.1:\n{locate.DOWNLOAD}")
    return tokenizer


# ----------------------------------------------------------------------------------------------------
# prompts to embeddings

class TextEncoder(NamedTuple):
    encoder: Encoder
    tokenizer: SentencePieceProcessor

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        """An unpadded tensor [n_tokens, text_dim] for each prompt; equal prompts are computed once."""
        assert not isinstance(prompts, str), "encode takes a list of prompts"
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise UserError(f"prompt {i} is not a str but {type(prompt).__name__}: {prompt!r:.80}")
        ids = [tuple(token_ids(self.tokenizer, prompt)) for prompt in prompts]
        by_length = defaultdict(list)  # prompts of equal length need no padding
        for distinct in dict.fromkeys(ids):
            by_length[len(distinct)].append(distinct)
        device = self.encoder.norm.weight.device
        rows = {}
        with torch.inference_mode():
            for length, group in by_length.items():
                for batch in torch.tensor(group).split(BATCH_TOKENS // length):
                    rows |= zip(map(tuple, batch.tolist()), self.encoder(batch.to(device)), strict=True)
        largest = [row.abs().amax() for row in rows.values()]
        check_finite(torch.stack(largest) if rows else torch.empty(0), "what the text encoder made")
        return [rows[key].clone() for key in ids]  # each with its own memory, and accepted by autograd


def load(path, device="cpu", dtype=torch.float32) -> TextEncoder:
    """The encoder and tokenizer of a Wan, diffusers or ComfyUI directory, or of a file of weights."""
    tokenizer = load_tokenizer(path)
    encoder = load_encoder(path, device, dtype)
    pieces = tokenizer.vocab_size()
    rows = encoder.token_embedding.num_embeddings
    if pieces > rows:
        raise UserError(f"{path}: the tokenizer has {pieces} pieces, the encoder an embedding for {rows}")
    return TextEncoder(encoder, tokenizer)


def load_encoder(path, device="cpu", dtype=torch.float32) -> Encoder:
    """The network alone, frozen. On a CPU, weights that have this dtype are memory-mapped, not copied."""
    if dtype == torch.float16:
        raise UserError("umT5 overflows in float16: use bfloat16 or float32")
    files = find_weights(path)
    weights = official_names(locate.read(files, "t5")[0])
    try:
        sizes = sizes_of(weights)
    except KeyError as error:
        raise UserError(f"{files[0]} holds no umT5 encoder: it lacks {error}") from None
    with torch.device("meta"):
        encoder = Encoder(**sizes).to(dtype)
    return fill(encoder, weights, device, str(files[0])).requires_grad_(False)


def save(encoder: Encoder, path):
    """Writes a safetensors file with the official names."""
    save_tensors(path, encoder.state_dict())


def find_weights(path) -> list[Path]:
    return locate.find(path, "t5")


HF_NAMES = {
    "shared.": "token_embedding.",  # the same table, stored under either name or both
    "encoder.embed_tokens.": "token_embedding.",
    "encoder.final_layer_norm.": "norm.",
    "encoder.block.": "blocks.",
    "layer.0.layer_norm.": "norm1.",
    "layer.0.SelfAttention.relative_attention_bias.": "pos_embedding.embedding.",
    "layer.0.SelfAttention.": "attn.",
    "layer.1.layer_norm.": "norm2.",
    "layer.1.DenseReluDense.wi_0.": "ffn.gate.0.",
    "layer.1.DenseReluDense.wi_1.": "ffn.fc1.",
    "layer.1.DenseReluDense.wo.": "ffn.fc2.",
}


def official_names(weights: dict) -> dict:
    """Renames Hugging Face's tensors to Wan's names and drops what Wan's encoder lacks: the decoder of a full
    umT5, and the tokenizer in ComfyUI's files."""
    renamed = {}
    for name, stored in weights.items():
        if not name.startswith(("decoder.", "lm_head.", "spiece_model")):
            for hf, wan in HF_NAMES.items():
                name = name.replace(hf, wan)
            renamed[name] = stored
    return renamed


def sizes_of(weights: dict) -> dict[str, int]:
    """The sizes of an Encoder, read from the shapes of its weights."""
    vocab, dim = weights["token_embedding.weight"].shape
    buckets, heads = weights["blocks.0.pos_embedding.embedding.weight"].shape
    return {"vocab": vocab, "dim": dim, "heads": heads, "buckets": buckets,
            "dim_attn": weights["blocks.0.attn.q.weight"].shape[0],
            "dim_ffn": weights["blocks.0.ffn.fc1.weight"].shape[0],
            "layers": len({name.split(".")[1] for name in weights if name.startswith("blocks.")})}
