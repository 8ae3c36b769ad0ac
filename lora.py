"""LoRA: a change of weights as products of two thin matrices, W + strength * alpha / rank * B A.

    --lora FILE[:STRENGTH]       merges such files into a model as it is loaded, whoever wrote them
    train_df.py --lora-rank R    trains such matrices, with alpha = rank and names that others know
"""

import functools
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

import common
import locate
import records
from common import Stored, UserError

# what ends the names of a module's tensors: lora_A or lora_down is A; .diff and .diff_b change W and its bias
PART = re.compile(r"(.+?)\.(?:lora[_.](A|B|down|up)(?:\.\w+)?\.weight|(alpha|diff|diff_b))")
PREFIX = re.compile(r"^(base_model\.|model\.|transformer\.|diffusion_model\.|lora_unet_|lora_transformer_)+")
ADAPTED = re.compile(r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])")  # the layers that are trained


class Change(NamedTuple):
    """Of a weight: alpha / rank * B A, or a difference to add."""
    parts: dict[str, Stored]  # A, B, alpha; or diff
    alpha: float | None  # of the whole file


# ----------------------------------------------------------------------------------------------------
# merging files

def merge(weights: dict[str, Stored], loras, rename) -> dict[str, Stored]:
    """weights under Wan's names, changed by each "FILE" or "FILE:STRENGTH" in fp32, as they are read. rename
    turns diffusers' names into Wan's."""
    for file, strength in map(split, loras):
        for name, change in read(file, weights, rename).items():
            changed = functools.partial(apply, weights[name], change, strength)
            weights = weights | {name: weights[name]._replace(read=changed)}
    return weights


def split(lora) -> tuple[Path, float]:
    """The file and the strength that FILE[:STRENGTH] stands for. A folder stands for the LoRA in it."""
    name, _, strength = str(lora).rpartition(":")
    try:
        factor = float(strength) if name else 1.0
    except ValueError:  # the colon is part of a name
        factor, name = 1.0, ""
    if not math.isfinite(factor):
        raise UserError(f"--lora {lora}: its strength is no number")
    path = Path(name or lora)
    return (path / locate.ADAPTER if path.is_dir() else path), factor


def fingerprint(loras) -> list | None:
    """Which files and strengths these are."""
    return [[common.fingerprint(file), strength] for file, strength in map(split, loras)] or None


def read(file: Path, weights: dict[str, Stored], rename) -> dict[str, Change]:
    """{name of a weight: its change}. Refuses a file of which a part would be left out."""
    tensors, _ = common.open_weights(file)
    names = {name.replace(".", "_"): name for name in weights}  # kohya's names have _ for .
    parts, unknown = {}, []
    for key, stored in tensors.items():
        match = PART.fullmatch(key)
        end = ".bias" if match and match[3] == "diff_b" else ".weight"
        name = rename(PREFIX.sub("", match[1]) + end) if match else ""
        name = names.get(name.replace(".", "_"))
        if name:
            kind = {"down": "A", "up": "B", "diff_b": "diff"}.get(match[2] or match[3], match[2] or match[3])
            parts.setdefault(name, {})[kind] = stored
        else:
            unknown.append(key)
    for name, change in parts.items():
        if not fits(change, weights[name].shape):
            shapes = ", ".join(f"{kind} {stored.shape}" for kind, stored in change.items())
            unknown.append(f"for {name} {weights[name].shape}: {shapes}")
    if unknown or not parts:
        more = f"; and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise UserError(f"{file} is no LoRA of this model: of {len(tensors)} tensors {len(unknown)} do not "
                        f"fit:\n{'; '.join(unknown[:4])}{more}")
    alpha = alpha_of(file)
    return {name: Change(change, alpha) for name, change in parts.items()}


def fits(change: dict[str, Stored], shape) -> bool:
    if change.keys() - {"alpha"} == {"diff"}:
        return change["diff"].shape == shape
    if change.keys() - {"alpha"} != {"A", "B"} or len(shape) < 2:
        return False
    a, b = change["A"].shape, change["B"].shape
    return a[0] == b[1] and b[0] == shape[0] and a[1:] == shape[1:]


def alpha_of(file: Path) -> float | None:
    """The alpha that a file or, for PEFT's, adapter_config.json beside it has for all modules."""
    about = locate.read_config(file.with_name("adapter_config.json"))
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as f:
            header = records.parse((f.metadata() or {}).get("lora_adapter_metadata", "{}"), file)
        about = {key.rpartition(".")[2]: value for key, value in header.items()} or about
    for option in ("use_rslora", "use_dora", "alpha_pattern"):
        if about.get(option):
            raise UserError(f"{file} uses {option}, which is not known here; merge it where it was made")
    return about.get("lora_alpha")


def apply(stored: Stored, change: Change, strength: float) -> torch.Tensor:
    weight = stored.read().float()
    part = {kind: stored.read().float() for kind, stored in change.parts.items()}
    if "diff" in part:
        return weight + strength * part["diff"]
    rank = part["A"].shape[0]
    alpha = part["alpha"].item() if "alpha" in part else change.alpha or rank
    return weight + strength * alpha / rank * (part["B"].flatten(1) @ part["A"].flatten(1)).view_as(weight)


# ----------------------------------------------------------------------------------------------------
# training

class Adapted(nn.Module):
    """A linear layer that stays as it is, plus B A of low rank, in fp32; at first B is zero."""

    def __init__(self, base: nn.Linear, rank: int, generator):
        super().__init__()
        self.base = base
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        noise = torch.randn(self.lora_A.weight.shape, generator=generator)
        self.lora_A.weight.data.copy_(noise / base.in_features ** 0.5)
        self.lora_B.weight.data.zero_()

    def forward(self, x):
        x = x.to(self.base.compute)
        low = F.linear(x, self.lora_A.weight.to(x.dtype))
        return self.base(x) + F.linear(low, self.lora_B.weight.to(x.dtype))


def attach(net: nn.Module, rank: int, seed: int):
    """Freezes a model and gives the layers of attention and feed-forward their matrices."""
    net.requires_grad_(False)
    for name, layer in list(net.named_modules()):
        if ADAPTED.fullmatch(name):
            parent, _, last = name.rpartition(".")
            setattr(net.get_submodule(parent), last, Adapted(layer, rank, common.rng(seed, "lora", name)))
