"""Every kind of file that people have of a Wan: what loads is the same network, what does not is named."""

import fnmatch
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import data
import locate
import model
import t5
import toy
import vae
from common import UserError


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A whole Wan directory in small."""
    folder = tmp_path_factory.mktemp("plain") / "wan"
    toy.make_wan(folder, trained=False)
    return folder


@pytest.fixture(scope="module")
def tensors(plain):
    """{network: its weights under Wan's names}."""
    files = {"transformer": "diffusion_pytorch_model", "vae": "vae", "t5": "t5"}
    return {network: load_file(plain / f"{name}.safetensors") for network, name in files.items()}


@pytest.fixture
def comfyui(plain, tmp_path, tensors):
    """ComfyUI's models folder: the text encoder holds its tokenizer."""
    models = tmp_path / "ComfyUI" / "models"
    write(models / "diffusion_models" / "wan2.1_t2v_1.3B_bf16.safetensors", tensors["transformer"])
    write(models / "vae" / "wan_2.1_vae.safetensors", tensors["vae"])
    write(models / "text_encoders" / "umt5_xxl_fp16.safetensors", with_tokenizer(plain, tensors["t5"]))
    write(models / "loras" / "wan2.1_t2v_style.safetensors", {"x": torch.zeros(1)})
    return models


def write(file: Path, weights: dict, **metadata):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in weights.items()}, file, metadata)
    else:
        torch.save(weights, file)
    return file




def with_tokenizer(plain, weights):
    pieces = (plain / "google" / "umt5-xxl" / "spiece.model").read_bytes()
    return weights | {"spiece_model": torch.frombuffer(bytearray(pieces), dtype=torch.uint8)}


def refused(message):
    return pytest.raises(UserError, match=message)


LOADERS = {"transformer": model.load, "vae": vae.load, "t5": t5.load_encoder}


def assert_loads(network, path, expected, tolerance=0.0):
    state = LOADERS[network](path).state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert (state[name].float() - value.float()).abs().max() <= tolerance * value.abs().max(), name


# ----------------------------------------------------------------------------------------------------
# ComfyUI's folders

@pytest.mark.parametrize("place", ["", ".."])
def test_comfyui_folders_are_a_wan_directory(comfyui, plain, tensors, place):
    path = comfyui / place
    for network, weights in tensors.items():
        assert_loads(network, path, weights)
    assert t5.token_ids(t5.load(path).tokenizer, "a red disc") == t5.token_ids(t5.load(plain).tokenizer,
                                                                              "a red disc")
    assert data.geometry(path).width == 832
    assert data.fingerprint(path, "vae") == common.fingerprint(comfyui / "vae/wan_2.1_vae.safetensors")


def test_the_model_files_of_comfyui_know_the_wan_around_them(comfyui):
    file = locate.find(comfyui, "transformer")[0]
    assert locate.wan_for(file) == str(comfyui)
    elsewhere = comfyui.parent.parent / "0123abc"  # as links into Hugging Face's cache
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert locate.wan_for(file) == str(comfyui)
    assert model.read_checkpoint(file.resolve())[1] == model.read_checkpoint(file)[1]


@pytest.mark.parametrize("network,folder,name", [
    ("transformer", "diffusion_models", "Wan2_1-T2V-14B_fp16.safetensors"),
    ("vae", "vae/wan", "Wan2_1_VAE_fp32.safetensors"),
    ("t5", "text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors")])
def test_several_candidates_are_named_and_one_of_them_can_be_given(comfyui, tensors, network, folder, name):
    first = locate.find(comfyui, network)[0]
    second = write(comfyui / folder / name, load_file(first))
    with pytest.raises(UserError) as error:
        locate.find(comfyui, network)
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and str(first) in lines[0] and str(second) in lines[0]
    assert "FILE" in lines[1]
    for other in locate.NETWORKS.keys() - {network, "transformer"}:  # are found around the file that is given
        assert locate.find(second, other) == locate.find(comfyui, other)
    assert locate.find(second, network) == [second]
    assert_loads(network, second, tensors[network])


def test_a_comfyui_without_the_network_says_so(comfyui):
    (comfyui / "vae" / "wan_2.1_vae.safetensors").unlink()
    with refused("no VAE in .*models: no file in vae has wan21vae in its name\nname one: --wan FILE"):
        vae.load(comfyui)


# ----------------------------------------------------------------------------------------------------
# wrappers, prefixes, variants

@pytest.mark.parametrize("network,prefix", [
    ("transformer", "model.diffusion_model."), ("transformer", "diffusion_model."), ("transformer", "model."),
    ("transformer", "model._fsdp_wrapped_module."), ("vae", "vae."), ("vae", "first_stage_model."),
    ("t5", "text_encoders.umt5xxl.transformer.")])
def test_prefixes(tensors, tmp_path, network, prefix):
    """With what else such a file holds."""
    weights = {prefix + name: value for name, value in tensors[network].items()}
    file = write(tmp_path / "x.safetensors", weights | {"something.else": torch.zeros(1)})
    assert_loads(network, file, tensors[network])


@pytest.mark.parametrize("wrap", [
    lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"generator": {"model." + k: v for k, v in s.items()}, "critic": {}, "step": 1},
    lambda s: {"generator_ema": s, "generator": {k: v * 0 for k, v in s.items()}},
    lambda s: {"state_dict": {"model": s}}])
@pytest.mark.parametrize("network", locate.NETWORKS)
def test_wrappers(tensors, tmp_path, wrap, network):
    file = write(tmp_path / "x.pt", wrap(tensors[network]))
    assert_loads(network, file, tensors[network])


@pytest.mark.parametrize("folder,stem,network", [
    ("transformer", "diffusion_pytorch_model", "transformer"), ("vae", "diffusion_pytorch_model", "vae"),
    ("text_encoder", "model", "t5")])
@pytest.mark.parametrize("sharded", [False, True])
def test_variants_of_diffusers(plain, tensors, tmp_path, folder, stem, network, sharded):
    weights = tensors[network]
    place = tmp_path / folder
    place.mkdir()
    if network == "transformer":
        shutil.copy(plain / "config.json", place)
    if sharded:
        names = list(weights)
        shards = {f"{stem}-0000{i + 1}-of-00002.fp16.safetensors": names[i::2] for i in range(2)}
        for name, keys in shards.items():
            write(place / name, {key: weights[key] for key in keys})
        index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
        (place / f"{stem}.safetensors.index.fp16.json").write_text(json.dumps(index))
    else:
        write(place / f"{stem}.fp16.safetensors", weights)
    for path in (tmp_path, place):
        assert_loads(network, path, weights)
    write(place / f"{stem}.bf16.safetensors", {"x": torch.zeros(1)})
    if not sharded:
        with refused(f"holds several variants: {stem}.bf16.safetensors, {stem}.fp16.safetensors\n"):
            locate.find(tmp_path, network)
    write(place / f"{stem}.safetensors", weights)  # the file without a variant comes first
    assert locate.find(tmp_path, network) == [place / f"{stem}.safetensors"]


# ----------------------------------------------------------------------------------------------------
# fp8

def scaled_fp8(weights, names, by_row=False, blocks=1):
    """weights with their matrices as fp8 and scales, as musubi-tuner and ComfyUI write them."""
    out = {}
    for name, weight in weights.items():
        if weight.dim() != 2 or not name.startswith("blocks.") or "embedding" in name:
            out[name] = weight.half() if weight.dim() == 2 else weight
            continue
        parts = weight.float().unflatten(1, (blocks, -1)) if by_row else weight.float()[None]
        scale = parts.abs().amax(-1, keepdim=True) / 448 if by_row else parts.abs().max() / 448
        out[name] = (parts / scale).to(torch.float8_e4m3fn).view(weight.shape)
        out[name.removesuffix(".weight") + names[0]] = scale.squeeze(1) if by_row and blocks == 1 else scale
        if len(names) > 1:
            out[name.removesuffix(".weight") + names[1]] = torch.ones(())
    return out


@pytest.mark.parametrize("names,by_row,blocks", [
    ((".scale_weight",), False, 1), ((".scale_weight", ".scale_input"), False, 1),
    ((".weight_scale",), False, 1), ((".weight_scale", ".input_scale"), True, 1),
    ((".scale_weight",), True, 4)])
@pytest.mark.parametrize("network", ["transformer", "t5"])
def test_scaled_fp8_is_read_with_its_scales(tensors, tmp_path, network, names, by_row, blocks):
    weights = scaled_fp8(tensors[network], names, by_row, blocks)
    marker = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} if "scale_weight" in names[0] else {}
    file = write(tmp_path / "x.safetensors", weights | marker)
    assert_loads(network, file, tensors[network], tolerance=1 / 16)  # the step of 3 bits of mantissa
    exact = {name: value for name, value in weights.items() if name in tensors[network]}
    for name in exact:
        if (scale := weights.get(name.removesuffix(".weight") + names[0])) is not None:
            rows = exact[name].float().unflatten(1, (blocks, -1))
            exact[name] = (rows * scale.view(-1, blocks, 1) if by_row else rows * scale).flatten(1)
    assert_loads(network, file, exact, tolerance=1e-7)


def test_fp8_without_scales_is_refused(tensors, tmp_path):
    scaled = scaled_fp8(tensors["transformer"], (".scale_weight",))
    lost = {name: value for name, value in scaled.items() if not name.endswith(".scale_weight")}
    one = "blocks.1.ffn.0.scale_weight"
    for name, weights in {"all": lost, "one": {k: v for k, v in scaled.items() if k != one}}.items():
        with refused(f"{name}.safetensors holds fp8 weights without scales .*fp16, bf16 or scaled fp8"):
            model.load(write(tmp_path / f"{name}.safetensors", weights))
    packed = {name: value.view(torch.uint8) if value.dtype == torch.float8_e4m3fn else value
              for name, value in scaled.items()}
    with refused(r"x.safetensors is quantised to uint8"):
        model.load(write(tmp_path / "x.safetensors", packed))


# ----------------------------------------------------------------------------------------------------
# what is refused by its name

def test_gguf_is_refused_by_its_content(tmp_path):
    for name in ("wan2.1-t2v-14b-Q4_K_M.gguf", "renamed.safetensors", "renamed.pth"):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
        for load in LOADERS.values():
            with pytest.raises(UserError, match=f"{name} is a GGUF file.*as .safetensors") as error:
                load(tmp_path / name)
            assert "weights_only" not in str(error.value)


def test_a_gguf_in_comfyui_is_refused_by_name(comfyui):
    file = locate.find(comfyui, "transformer")[0]
    file.rename(file.with_name("wan2.1-t2v-1.3b-Q8_0.gguf")).write_bytes(b"GGUF" + bytes(100))
    with refused("wan2.1-t2v-1.3b-Q8_0.gguf is a GGUF file"):
        model.load(comfyui)


def test_code_is_refused_without_advice_to_run_it(tmp_path):
    torch.save({"model": Path}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt is corrupt, or holds more than tensors") as error:
        model.load(tmp_path / "x.pt")
    assert "weights_only" not in str(error.value) and "trust" not in str(error.value)


@pytest.mark.parametrize("wanted,given,says", [
    ("vae", "transformer", "is not Wan2.1's VAE, but a Wan transformer"),
    ("t5", "transformer", "is not Wan2.1's text encoder, but a Wan transformer"),
    ("transformer", "vae", "is not Wan2.1's transformer, but a VAE"),
    ("t5", "vae", "is not Wan2.1's text encoder, but a VAE"),
    ("transformer", "t5", "is not Wan2.1's transformer, but a T5 text encoder"),
    ("vae", "t5", "is not Wan2.1's VAE, but a T5 text encoder")])
def test_a_file_is_called_what_it_is(tensors, tmp_path, wanted, given, says):
    for name, weights in (("x.safetensors", tensors[given]), ("x.pt", {"state_dict": tensors[given]})):
        with refused(f"{name} {says}"):
            LOADERS[wanted](write(tmp_path / name, weights))


def test_a_lora_given_as_a_model_is_called_one(tmp_path):
    for name in ("diffusion_model.blocks.0.self_attn.q.lora_A.weight",
                 "transformer.blocks.0.attn1.to_q.lora_B.weight",
                 "lora_unet_blocks_0_self_attn_q.lora_down.weight",
                 "base_model.model.blocks.0.attn1.to_q.lora_A.default.weight"):
        with refused("x.safetensors is not Wan2.1's transformer, but a LoRA; give the model .* --lora"):
            model.load(write(tmp_path / "x.safetensors", {name: torch.zeros(2, 4)}))


def test_a_wan_directory_without_its_vae_says_that(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "wan")
    (tmp_path / "wan" / "vae.safetensors").unlink()
    with refused("no VAE in .*wan: looked for vae.safetensors, Wan2.1_VAE.pth"):
        vae.load(tmp_path / "wan")
    (tmp_path / "wan" / "Wan2.2_VAE.pth").touch()
    with refused("holds the VAE of Wan2.2-TI2V-5B; only Wan2.1's loads here:\nhf download Wan-AI/Wan2.1"):
        vae.load(tmp_path / "wan")


def test_diffusers_vae_folder_is_no_transformer(tmp_path, tensors):
    write(tmp_path / "diffusion_pytorch_model.safetensors", tensors["vae"])
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    assert locate.holds(tmp_path, "vae") and not locate.holds(tmp_path, "transformer")


@pytest.mark.parametrize("folders", [("transformer", "transformer_2"),
                                     ("high_noise_model", "low_noise_model")])
def test_both_experts_of_a14b_are_refused_unread(plain, tmp_path, folders):
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / "diffusion_pytorch_model.safetensors").write_bytes(b"not to be read")
    shutil.copy(plain / "vae.safetensors", tmp_path)
    for path in (tmp_path, *(tmp_path / folder for folder in folders),
                 tmp_path / folders[0] / "diffusion_pytorch_model.safetensors"):
        with refused("is of Wan2.2-A14B, two transformers .*only Wan2.1-T2V loads here:\nhf download"):
            model.read_checkpoint(path)
    assert locate.holds(tmp_path, "vae")  # which is Wan2.1's
    with refused("wan2.2_t2v_high_noise_14B_fp16.safetensors is of Wan2.2-A14B"):
        model.read_checkpoint(write(tmp_path / "wan2.2_t2v_high_noise_14B_fp16.safetensors", {}))


@pytest.mark.parametrize("takes,gives,name", [
    (36, 16, "I2V"), (48, 48, "Wan2.2-TI2V-5B"), (32, 16, "control"),
    (52, 16, r"control \(Fun and others: 52 channels in, 16 out\)")])
def test_other_channels_are_refused_by_name(tensors, tmp_path, takes, gives, name):
    patch = tensors["transformer"]["patch_embedding.weight"]
    head = tensors["transformer"]["head.head.weight"]
    weights = tensors["transformer"] | {
        "patch_embedding.weight": torch.zeros(patch.shape[0], takes, *patch.shape[2:]),
        "head.head.weight": torch.zeros(4 * gives, head.shape[1]), "head.head.bias": torch.zeros(4 * gives)}
    with refused(f"x.safetensors is a {name}.*only text-to-video .*\nhf download"):
        model.read_checkpoint(write(tmp_path / "x.safetensors", weights))


@pytest.mark.parametrize("key,name", [
    ("ref_conv.weight", "Fun-Control"), ("face_adapter.fuser_blocks.0.k_norm.weight", "Animate"),
    ("audio_proj.layer.bias", "S2V"), ("fps_embedding.weight", "SkyReels-V2")])
def test_other_relatives_are_refused_by_name(tensors, tmp_path, key, name):
    with refused(f"x.safetensors is a {name}.*only text-to-video"):
        weights = tensors["transformer"] | {key: torch.zeros(1)}
        model.read_checkpoint(write(tmp_path / "x.safetensors", weights))


# ----------------------------------------------------------------------------------------------------
# what belongs to a file, and what lies beside it

def test_an_unrelated_config_changes_nothing(tensors, tmp_path):
    file = write(tmp_path / "x.safetensors", tensors["transformer"])
    expected = model.read_checkpoint(file)[1]
    for other in ({"dim": 1536, "num_heads": 12, "num_layers": 30, "text_len": 7}, {"num_layers": 30},
                  {"num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16},
                  {"architectures": ["UMT5EncoderModel"], "num_heads": "many", "num_layers": 24}, ["a list"]):
        (tmp_path / "config.json").write_text(json.dumps(other))
        assert model.read_checkpoint(file)[1] == expected
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2, "dim": 128, "text_len": 9}))
    config = model.read_checkpoint(file)[1]
    assert (config.num_heads, config.text_len) == (2, 9)  # of this model


@pytest.mark.parametrize("mode,causal", [
    ("df", True), ("tf", True), ("rf", True), ("full", False), (None, False)])
def test_comfyui_is_told_that_a_model_is_causal(tmp_path, plain, mode, causal):
    model.save(model.load(plain), tmp_path, **{"mode": mode} if mode else {})
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as f:
        metadata = f.metadata()
    told = json.loads(metadata.get("config", "{}")).get("transformer", {}).get("causal_ar", False)
    assert told is causal and "json" in metadata
    assert model.read_checkpoint(tmp_path)[1] == model.read_checkpoint(plain)[1]


# ----------------------------------------------------------------------------------------------------
# models that are shared

def test_a_model_names_its_wan_so_that_both_can_move(plain, tmp_path):
    home = tmp_path / "home" / "run"
    shutil.copytree(plain, tmp_path / "home" / "wan")
    written = locate.portable(tmp_path / "home" / "wan", home / "model_0")
    model.save(model.load(plain), home / "model_0", wan=written)
    assert written == "../../wan"
    assert model.settings(home / "model_0")["wan"] == str(tmp_path / "home" / "wan")
    (tmp_path / "home").rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "run" / "model_0"
    assert model.settings(moved)["wan"] == str(tmp_path / "elsewhere" / "wan")
    alone = tmp_path / "downloads" / "model_0"  # without its Wan
    shutil.copytree(moved, alone)
    assert model.settings(alone)["wan"] == str(tmp_path / "wan")  # a hint, for the message
    with refused("no VAE in .*wan: no such file or folder"):
        vae.load(model.settings(alone)["wan"])
    shutil.copytree(plain, tmp_path / "downloads" / "Wan2.1")  # beside it, by any name
    assert model.settings(alone)["wan"] == str(tmp_path / "downloads" / "Wan2.1")
    shutil.copytree(plain, tmp_path / "downloads" / "wan")  # and by its own, which comes first
    assert model.settings(alone)["wan"] == str(tmp_path / "downloads" / "wan")


def test_old_models_name_their_wan_by_its_whole_path(plain, tmp_path):
    model.save(model.load(plain), tmp_path / "model_0", wan=str(plain))
    assert model.settings(tmp_path / "model_0")["wan"] == str(plain)


def test_a_wan_within_the_model_is_no_repo(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "model_0" / "parts" / "wan")
    written = locate.portable(tmp_path / "model_0" / "parts" / "wan", tmp_path / "model_0")
    assert written == "./parts/wan"
    assert locate.named(written, tmp_path / "model_0") == str(tmp_path / "model_0" / "parts" / "wan")


def test_a_store_moves_with_its_wan_beside_it(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "wan")
    (tmp_path / "agg_0").mkdir()
    (tmp_path / "agg_0" / "index.jsonl").touch()
    meta = {"wan": "/nowhere/wan", "vae": data.fingerprint(plain, "vae")}
    (tmp_path / "agg_0" / "meta.json").write_text(json.dumps(meta))
    assert data.Clips(tmp_path / "agg_0").wan() == str(tmp_path / "wan")


@pytest.fixture
def hub(monkeypatch, plain, tmp_path):
    """A Hugging Face with one repo, and what was downloaded of it."""
    cache = tmp_path / "hub" / "models--Wan-AI--Wan2.1-T2V-1.3B" / "snapshots" / "0123abc"
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name != "Wan-AI/Wan2.1-T2V-1.3B":
            raise OSError("404 Client Error: Repository Not Found")
        for file in (file for file in plain.rglob("*") if file.is_file()):
            place = file.relative_to(plain)
            if any(fnmatch.fnmatch(place.as_posix(), pattern) for pattern in allow_patterns):
                (cache / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / place)
        return str(cache)
    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_repo_is_downloaded_as_far_as_needed(hub, tmp_path):
    folder = Path(locate.local("Wan-AI/Wan2.1-T2V-1.3B", "transformer"))
    assert locate.holds(folder, "transformer") and not locate.holds(folder, "vae")
    folder = Path(locate.local("Wan-AI/Wan2.1-T2V-1.3B", "vae", "t5"))
    assert locate.holds(folder, "vae", "t5")
    assert locate.portable(folder, tmp_path / "model_0") == "Wan-AI/Wan2.1-T2V-1.3B"
    assert locate.named("Wan-AI/Wan2.1-T2V-1.3B", tmp_path / "model_0") == "Wan-AI/Wan2.1-T2V-1.3B"
    with refused("somebody/else is not there, and not to be had as a Hugging Face repo: 404"):
        locate.local("somebody/else", "vae")


def test_what_is_on_disk_wins_and_mistyped_names_are_not_sent(hub, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("run", "run/model_7", "nowhere", "/etc/nothing/here", "../x", "a/b/c"):
        assert locate.local(name, "transformer") == name
    (tmp_path / "Wan-AI" / "Wan2.1-T2V-1.3B").mkdir(parents=True)
    assert locate.local("Wan-AI/Wan2.1-T2V-1.3B", "vae") == "Wan-AI/Wan2.1-T2V-1.3B"
    assert hub == []


def test_a14b_is_refused_before_it_is_downloaded(hub, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(allow_patterns)
        (tmp_path / "snapshot" / "high_noise_model").mkdir(parents=True)
        return str(tmp_path / "snapshot")
    monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", snapshot_download)
    with refused("Wan2.2-A14B"):
        locate.local("Wan-AI/Wan2.2-T2V-A14B", "transformer")
    assert asked == [["*.json"]]


def test_without_huggingface_hub_a_line_says_what_to_run(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with refused(r"pip install huggingface_hub,\nor hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir Wan2.1"):
        locate.local("Wan-AI/Wan2.1-T2V-1.3B", "vae")
