"""Where a Wan's networks are on disk, in every layout people have them in, and what a file of weights holds.

    locate.find("Wan2.1-T2V-1.3B", "vae")           the files of a network, in Wan's own layout, diffusers',
    locate.find("ComfyUI/models", "t5")             ComfyUI's or a model_k's, or a file by itself
    locate.read(files, "vae")                       {name: Stored} without wrappers, prefixes and fp8 scales
    locate.local("Wan-AI/Wan2.1-T2V-1.3B", "vae")   a Hugging Face repo's folder, downloaded as far as needed

What cannot load is refused by its name, with the way out.
"""

import functools
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

import common
import records
from common import Stored, UserError

DOWNLOAD = "hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir Wan2.1-T2V-1.3B"
ADAPTER = "pytorch_lora_weights.safetensors"  # a LoRA in a folder of its own, as diffusers calls it


class Network(NamedTuple):
    name: str  # as messages call it
    names: tuple[str, ...]  # of its file in a Wan directory
    stems: tuple[str, ...]  # of its .safetensors, which may be sharded, in Wan's and diffusers' folders
    folders: tuple[str, ...]  # in ComfyUI's models/
    marks: tuple[str, ...]  # what the names of files there contain, punctuation aside
    anchors: tuple[str, ...]  # a tensor that it has, by Wan's name and by others'
    repo: tuple[str, ...]  # what to download of a Hugging Face repo
    flag: str  # that takes one file of several


NETWORKS = {
    "transformer": Network(
        "transformer", (), ("diffusion_pytorch_model", "transformer/diffusion_pytorch_model"),
        ("diffusion_models", "unet"), ("wan21", "t2v"), ("patch_embedding.weight",),
        ("diffusion_pytorch_model*", "transformer/*", ADAPTER), "--init FILE or --model FILE"),
    "vae": Network(
        "VAE", ("vae.safetensors", "Wan2.1_VAE.pth"),
        ("vae/diffusion_pytorch_model", "diffusion_pytorch_model"), ("vae",), ("wan21vae",),
        ("encoder.conv1.weight", "encoder.conv_in.weight"), ("vae.safetensors", "Wan2.1_VAE.pth", "vae/*"),
        "--wan FILE, around which the text encoder is found"),
    "t5": Network(
        "text encoder", ("models_t5_umt5-xxl-enc-bf16.pth", "t5.safetensors"),
        ("text_encoder/model", "model"), ("text_encoders", "clip"), ("umt5xxl",),
        ("token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight"),
        ("models_t5*", "t5.safetensors", "google/*", "text_encoder/*", "tokenizer/*"),
        "--wan FILE, around which the VAE is found"),
}


# ----------------------------------------------------------------------------------------------------
# which files

def find(path, network: str) -> list[Path]:
    """The files of a network's weights. path is one of them, or a folder of any layout."""
    path = Path(path)
    kind = NETWORKS[network]
    comfyui = comfyui_models(path)
    if network == "transformer":
        refuse_experts(path)
    if path.is_file() and not (comfyui and path.relative_to(comfyui).parts[0] not in kind.folders):
        return [path]
    if not path.exists():
        raise UserError(f"no {kind.name} in {path}: no such file or folder")
    for name in kind.names:
        if (path / name).is_file():
            return [path / name]
    for stem in kind.stems:
        folder = (path / stem).parent
        if (files := common.weight_files(folder, Path(stem).name)) and not holds_other(folder, network):
            return files
    if network == "transformer" and (path / ADAPTER).is_file():
        return [path / ADAPTER]
    if comfyui:
        return [in_comfyui(comfyui, kind)]
    if network == "vae" and (path / "Wan2.2_VAE.pth").exists():
        raise UserError(f"{path} holds the VAE of Wan2.2-TI2V-5B; only Wan2.1's loads here:\n{DOWNLOAD}")
    looked = [*kind.names, *(f"{stem}.safetensors" for stem in kind.stems)]
    raise UserError(f"no {kind.name} in {path}: looked for {', '.join(looked)} and ComfyUI's "
                    f"{kind.folders[0]}/\n{DOWNLOAD}")


def tokenizer_files(path) -> list[Path]:
    """Where the sentencepiece model may be beside the weights at path."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    places = ("google/umt5-xxl", "tokenizer", ".", "../tokenizer")
    return [folder / place / "spiece.model" for place in places]


def holds(path, *networks: str) -> bool:
    try:
        return all(find(path, network) for network in networks)
    except UserError:
        return False


def holds_other(folder: Path, network: str) -> bool:
    """Wan's transformer and diffusers' VAE are both diffusion_pytorch_model; config.json tells which."""
    name = str(read_config(folder / "config.json").get("_class_name", ""))
    return network != "t5" and bool(name) and ("Autoencoder" in name) != (network == "vae")


def read_config(file: Path) -> dict:
    """A config.json, or {} if it is not there or not a table."""
    content = records.value(records.read_text(file), file) if file.is_file() else {}
    return records.Record(content, file) if isinstance(content, dict) else {}


def refuse_experts(path: Path):
    """Wan2.2-A14B has two transformers in one layout's folders or the other's, one for each part of the way
    from noise to video. They would load as Wan2.1-14B, and work as half a model."""
    experts = ("transformer_2", "high_noise_model", "low_noise_model")
    folder = path.parent if path.is_file() else path
    places = [folder, folder.parent] if folder.name in (*experts, "transformer") else [folder]
    named = path.is_file() and re.search("(high|low)_?noise", path.name.lower())
    if named or any((place / expert).is_dir() for place in places for expert in experts):
        raise UserError(f"{path} is of Wan2.2-A14B, two transformers that take turns; only Wan2.1-T2V loads "
                        f"here:\n{DOWNLOAD}")


def comfyui_models(path: Path) -> Path | None:
    """The models folder of the ComfyUI at path, or around a file in it."""
    known = {folder for kind in NETWORKS.values() for folder in kind.folders}
    around = [parent.parent for parent in path.parents if parent.name in known] if path.is_file() else []
    for place in (*around, path / "models", path):
        if (place / "diffusion_models").is_dir() or (place / "text_encoders").is_dir():
            return place
    return None


def in_comfyui(models: Path, kind: Network) -> Path:
    """The only file of a network in ComfyUI's folders for it, or in folders in them."""
    suffixes = (".safetensors", ".sft", ".pth", ".pt", ".gguf")
    seen = []
    for file in (file for folder in kind.folders for file in sorted((models / folder).rglob("*"))):
        plain = re.sub("[^a-z0-9]", "", file.name.lower())
        if file.suffix in suffixes and "lora" not in plain and all(mark in plain for mark in kind.marks):
            seen.append(file)
    seen = [file for file in seen if file.suffix != ".gguf"] or seen  # which is refused as it is read
    if not seen:
        raise UserError(f"no {kind.name} in {models}: no file in {' or '.join(kind.folders)} has "
                        f"{' and '.join(kind.marks)} in its name\nname one: {kind.flag}")
    if len(seen) > 1:
        raise UserError(f"{models} holds several files for the {kind.name}: {', '.join(map(str, seen))}\n"
                        f"name the one to use: {kind.flag}")
    return seen[0]


# ----------------------------------------------------------------------------------------------------
# what they hold

def read(files: list[Path], network: str) -> tuple[dict[str, Stored], dict]:
    """({name: Stored}, metadata) of a network, without wrappers, prefixes and what else shares the file.
    Scaled fp8 becomes fp32 as it is read."""
    kind = NETWORKS[network]
    weights, metadata = common.open_weights(*files)
    for wrapper in ("generator_ema", "generator", "state_dict", "model"):
        if isinstance(weights.get(wrapper), dict):
            weights = weights[wrapper]
    marks = r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\."
    weights = {re.sub(marks, "", str(name)): stored for name, stored in weights.items()}
    prefix = prefix_of(weights, kind.anchors)
    if prefix is None:
        what = describe(weights)
        way_out = "; give the model that it changes, and this file as --lora" if what == "a LoRA" else ""
        raise UserError(f"{files[0]} is not Wan2.1's {kind.name}, but {what}{way_out}")
    weights = {name[len(prefix):]: stored for name, stored in weights.items() if name.startswith(prefix)}
    return dequantised(weights, files[0]), metadata


def prefix_of(weights: dict, anchors: tuple[str, ...]) -> str | None:
    """What stands before each name of a network, which is known by one of its tensors."""
    prefixes = [name.removesuffix(anchor) for name in weights for anchor in anchors
                if f".{name}".endswith(f".{anchor}")]
    return min(prefixes, key=len, default=None)


LORA = r"\.lora_(A|B|up|down)\b|^lora_|\.lora\.(up|down)\.|\.(hada|lokr)_"
KINDS = {  # what a file is, by the name of one of its tensors
    "a LoRA": LORA,
    "a Wan transformer": r"(^|\.)patch_embedding\.weight$",
    "the VAE of Wan2.2-TI2V-5B": r"(down|up)samples\.0\.(down|up)samples\.",
    "a VAE": r"(^|\.)encoder\.conv(1|_in)\.weight$",
    "a T5 text encoder": r"(^|\.)(token_embedding|shared|embed_tokens)\.weight$",
    "an image encoder": r"visual\.|vision_model\.",
}


def describe(weights: dict) -> str:
    return next((kind for kind, pattern in KINDS.items() if any(re.search(pattern, k) for k in weights)),
                "something that is not known here")


SCALES = (".scale_weight", ".weight_scale")  # of X.weight: two names that ComfyUI has had for the same
ABOUT_SCALES = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
TABLES = ("shared.weight", "embed_tokens.weight", "token_embedding.weight", "attention_bias.weight")


def dequantised(weights: dict[str, Stored], file) -> dict[str, Stored]:
    """Quantised weights become weights times scales. Only tables that are looked up in have none."""
    scales = {name.removesuffix(end) + ".weight": stored for name, stored in weights.items() for end in SCALES
              if name.endswith(end)}
    plain = {name: stored for name, stored in weights.items() if not name.endswith(SCALES + ABOUT_SCALES)}
    for name, stored in plain.items():
        dtype = str(getattr(stored, "dtype", "")).removeprefix("torch.")
        if name in scales and not dtype.startswith("float8"):
            raise UserError(f"{file} is quantised to {dtype} ({name}); give one in fp16, bf16 or scaled fp8")
        if dtype.startswith("float8") and name not in scales and not (scales and name.endswith(TABLES)):
            raise UserError(f"{file} holds fp8 weights without scales ({name}), which are too coarse; give a "
                            "file in fp16, bf16 or scaled fp8")
    return {name: stored._replace(read=functools.partial(scaled, stored, scales[name])) if name in scales else
            stored for name, stored in plain.items()}


def scaled(stored: Stored, scale: Stored) -> torch.Tensor:
    """A weight in fp32. A scale is one number, one for each row, or one for each block of a row."""
    weight = stored.read().float()
    factor = scale.read().float()
    if factor.numel() == 1:
        return weight * factor.flatten()
    if factor.dim() == 3:
        return (weight.unflatten(1, (factor.shape[1], -1)) * factor).flatten(1)
    return weight * factor.view(-1, 1)


# ----------------------------------------------------------------------------------------------------
# folders that are named: Hugging Face repos, and what config.json of a model names

def is_repo(path) -> bool:
    """Whether a path can be a Hugging Face repo, OWNER/NAME, and nothing on disk."""
    name = str(path)
    local = Path(name).exists() or Path(name).parent.exists()  # the latter: a mistyped local name
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)) and not local


def local(path, *networks: str) -> str:
    """path, or the folder of the Hugging Face repo of that name, these networks of which are downloaded."""
    if not is_repo(path):
        return str(path)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{path} is not there; to use the Hugging Face repo of this name: pip install "
                        f"huggingface_hub,\nor hf download {path} --local-dir {Path(path).name}") from None
    wanted = [pattern for network in networks for pattern in NETWORKS[network].repo]
    try:
        folder = Path(snapshot_download(path, allow_patterns=["*.json"]))  # small, and says what the rest is
        if "transformer" in networks:
            refuse_experts(folder)
        return snapshot_download(path, allow_patterns=[*wanted, "*.json"])
    except UserError:
        raise
    except (OSError, ValueError) as error:  # huggingface_hub's own are among these
        raise UserError(f"{path} is not there, and not to be had as a Hugging Face repo: "
                        f"{common.first_line(error)}") from None


def portable(path, folder) -> str:
    """How config.json in a folder names a path, so that both can move: from there, or by the repo's name."""
    path = Path(path).resolve()
    if cached := re.search(r"models--([^/]+)--([^/]+)/snapshots/", path.as_posix()):
        return "/".join(cached.groups())
    relative = Path(os.path.relpath(path, Path(folder).resolve())).as_posix()
    return relative if relative.startswith("..") else f"./{relative}"  # no repo's name


def named(recorded: str, folder) -> str:
    """The path that portable named, seen from the folder, which may have moved: the same way from there, or
    beside it; for a path that is nowhere, what it was."""
    folder = Path(folder).resolve()
    places = (folder / recorded, folder.parent / Path(recorded).name)
    existing = next((place for place in places if place.exists()), None)
    if existing is None and is_repo(recorded):
        return recorded
    return str((existing or places[0]).resolve())


def wan_for(path, recorded: str | None = None) -> str | None:
    """The Wan directory for a model: the one that its config.json names, or else the model's own folder, the
    ComfyUI around it, or the only one beside it."""
    path = Path(os.path.abspath(path))  # a link in ComfyUI's folders is there, not where it leads to
    folder = path if path.is_dir() else path.parent
    wan = named(recorded, folder) if recorded else None
    if wan and (Path(wan).exists() or is_repo(wan)):
        return wan
    around = (folder, comfyui_models(path))
    fitting = [place for place in around if place and holds(place, "vae", "t5")]
    beside = [place for place in folder.parent.iterdir() if place.is_dir() and holds(place, "vae", "t5")]
    if not fitting and len(beside) == 1:
        fitting = beside
    return str(fitting[0]) if fitting else wan
