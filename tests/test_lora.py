"""LoRA: merging every style of file by hand and as diffusers does; training one, and what is made of it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds import fill_store, fork_ranks, relative, run_stage, tiny_model

import common
import data
import files
import locate
import lora
import model
import rollout
import sample
import toy
import train_df
from common import UserError
from flags import parse

RANK = 3
SIZES = dict(dim=32, ffn_dim=48, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=24, text_len=8)
LAYERS = {f"{ours}_attn.{x}": f"attn{number}.to_{theirs}" for number, ours in ((1, "self"), (2, "cross"))
          for x, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out.0"))}  # Wan's names and diffusers'
LAYERS |= {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "wan"
    model.save(tiny_model("lora", **SIZES), folder)
    return folder


def matrices(base):
    """{layer: (A, B)}, for the first block."""
    weights = load_file(base / "diffusion_pytorch_model.safetensors")
    g = common.rng("matrices")
    return {layer: (torch.randn(RANK, weights[f"blocks.0.{layer}.weight"].shape[1], generator=g),
                    torch.randn(weights[f"blocks.0.{layer}.weight"].shape[0], RANK, generator=g))
            for layer in LAYERS}


def diffusers_style(layer, a, b):
    return {f"transformer.blocks.0.{LAYERS[layer]}.lora_A.weight": a,
            f"transformer.blocks.0.{LAYERS[layer]}.lora_B.weight": b}


def peft_style(layer, a, b):
    return {f"base_model.model.blocks.0.{LAYERS[layer]}.lora_A.default.weight": a,
            f"base_model.model.blocks.0.{LAYERS[layer]}.lora_B.default.weight": b}


def comfyui_style(layer, a, b):
    return {f"diffusion_model.blocks.0.{layer}.lora_A.weight": a,
            f"diffusion_model.blocks.0.{layer}.lora_B.weight": b}


def down_up_style(layer, a, b):
    return {f"diffusion_model.blocks.0.{layer}.lora_down.weight": a,
            f"diffusion_model.blocks.0.{layer}.lora_up.weight": b,
            f"diffusion_model.blocks.0.{layer}.alpha": torch.tensor(1.5)}


def musubi_style(layer, a, b):
    name = f"lora_unet_blocks_0_{layer.replace('.', '_')}"
    return {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(1.5)}


STYLES = (diffusers_style, peft_style, comfyui_style, down_up_style, musubi_style)


def written(path, base, style):
    tensors = {}
    for layer, (a, b) in matrices(base).items():
        tensors |= style(layer, a, b)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("end,strength", [("", 1), (":0.5", 0.5), (":-1", -1)])
def test_merging_is_w_plus_strength_alpha_over_rank_b_a(base, tmp_path, style, end, strength):
    file = written(tmp_path / "x.safetensors", base, style)
    state = model.load(base, loras=[f"{file}{end}"]).state_dict()
    before = model.load(base).state_dict()
    alpha = 1.5 if style in (down_up_style, musubi_style) else RANK
    for layer, (a, b) in matrices(base).items():
        name = f"blocks.0.{layer}.weight"
        assert torch.allclose(state[name], before.pop(name) + strength * alpha / RANK * b @ a, atol=1e-5)
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_two_files_add_up_and_are_merged_in_fp32(base, tmp_path):
    one = written(tmp_path / "one.safetensors", base, comfyui_style)
    two = written(tmp_path / "two.safetensors", base, musubi_style)
    both = model.load(base, loras=[f"{one}:0.25", two]).state_dict()
    low = model.load(base, dtype=torch.bfloat16, loras=[f"{one}:0.25", two]).state_dict()
    for layer, (a, b) in matrices(base).items():
        name = f"blocks.0.{layer}.weight"
        expected = model.load(base).state_dict()[name] + (0.25 + 0.5) * b @ a
        assert torch.allclose(both[name], expected, atol=1e-5)
        assert torch.equal(low[name], both[name].bfloat16())  # rounded once, when all is added


def test_differences_of_weights_and_biases(base, tmp_path):
    weights = load_file(base / "diffusion_pytorch_model.safetensors")
    tensors = {"diffusion_model.blocks.0.norm3.diff": torch.ones(32),
               "diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(48),
               "diffusion_model.patch_embedding.lora_down.weight": torch.ones(2, 4, 1, 2, 2),
               "diffusion_model.patch_embedding.lora_up.weight": torch.ones(32, 2, 1, 1, 1)}
    save_file(tensors, tmp_path / "x.safetensors")
    state = model.load(base, loras=[f"{tmp_path / 'x.safetensors'}:2"]).state_dict()
    changes = {"blocks.0.norm3.weight": 2, "blocks.0.ffn.0.bias": 2, "patch_embedding.weight": 4}
    for name, change in changes.items():
        assert torch.allclose(state[name], weights[name] + change)


def test_alpha_of_peft(base, tmp_path):
    """Beside the file, or in its header, for all modules."""
    plain = written(tmp_path / "adapter_model.safetensors", base, diffusers_style)
    header = tmp_path / "header.safetensors"
    about = {"transformer.lora_alpha": 6, "transformer.r": RANK}
    save_file(load_file(plain), header, {"lora_adapter_metadata": json.dumps(about)})
    double = [model.load(base, loras=[header]), model.load(base, loras=[f"{plain}:2"])]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "r": RANK}))
    double.append(model.load(base, loras=[plain]))
    for net in double:
        assert_same(net, double[0])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "use_rslora": True}))
    with pytest.raises(UserError, match="adapter_model.safetensors uses use_rslora"):
        model.load(base, loras=[plain])


def assert_same(net, other):
    for (name, a), b in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_what_does_not_fit_is_listed(base, tmp_path):
    a, b = matrices(base)["ffn.0"]
    good = comfyui_style("ffn.0", a, b)
    many = {f"diffusion_model.blocks.{i}.ffn.0.lora_A.weight": a for i in range(7, 20)}
    cases = [
        (many | good, "of 15 tensors 13 do not fit:\n.*blocks.10.ffn.0.lora_A.weight; .*; and 9 more"),
        (good | {"diffusion_model.blocks.0.ffn.0.dora_scale": a}, "of 3 tensors 1 .*\n.*dora_scale"),
        ({k: v for k, v in good.items() if "lora_A" in k}, "for blocks.0.ffn.0.weight .*: A "),
        (good | {"diffusion_model.blocks.0.ffn.0.lora_B.weight": b[1:].clone()}, r"B \(47, 3\)"),
        ({"diffusion_model.blocks.0.ffn.0.hada_w1_a": a}, "hada_w1_a"),
        ({"x": a}, "of 1 tensors 1 do not fit:\nx")]
    for tensors, message in cases:
        save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=f"(?s)x.safetensors is no LoRA of this model: .*{message}"):
            model.read_checkpoint(base, [tmp_path / "x.safetensors"])
    with pytest.raises(UserError, match="no such file: .*nowhere"):
        model.read_checkpoint(base, [tmp_path / "nowhere.safetensors:0.5"])


def test_file_and_strength(tmp_path):
    assert lora.split("a.safetensors")[1] == 1 and lora.split("b/a.safetensors:0.8")[1] == 0.8
    assert lora.split("c:d.safetensors") == (locate.Path("c:d.safetensors"), 1)
    assert lora.split(f"{tmp_path}:-2") == (tmp_path / locate.ADAPTER, -2)


@pytest.mark.parametrize("style", STYLES)
def test_merging_is_fusing_in_diffusers(base, tmp_path, style):
    pytest.importorskip("peft")
    from diffusers import WanPipeline, WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    file = written(tmp_path / "x.safetensors", base, style)
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24,
            freq_dim=256, ffn_dim=48, num_layers=2, cross_attn_norm=True)
    converted = convert_wan_transformer_to_diffusers(load_file(base / "diffusion_pytorch_model.safetensors"))
    theirs.load_state_dict(converted, assign=True)
    tensors = WanPipeline.lora_state_dict(file)
    if style is peft_style:  # which PEFT itself reads; diffusers knows it without PEFT's own words
        tensors = {name.replace("base_model.model.", "transformer.").replace(".default", ""): value
                   for name, value in tensors.items()}
    theirs.load_lora_adapter(tensors)
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora()
    ours = convert_wan_transformer_to_diffusers(model.load(base, loras=[f"{file}:0.7"]).state_dict())
    for name, value in theirs.state_dict().items():
        assert (ours[name] - value).abs().max() <= 1e-6 * value.abs().max(), name


# ----------------------------------------------------------------------------------------------------
# training

@pytest.fixture(scope="module")
def world(tmp_path_factory, base):
    root = tmp_path_factory.mktemp("world")
    fill_store(root / "agg_0", ["seed"] * 8 + ["corrective"] * 2, (9, 4, 4, 4), text_dim=24, smooth=True)
    shutil.copytree(base, root / "wan")
    return root


def flags(world, **kwargs):
    paths = dict(data=str(world / "agg_0"), init=str(world / "wan"), out=str(world / "model_0"))
    sizes = dict(steps=4, batch=4, micro=2, lr=1e-2, held_out=2, prefix=1, lora_rank=RANK)
    times = dict(preview_every=0, log_every=2, eval_every=4, save_every=2)
    return train_df.Config(**(paths | sizes | times | {"device": "cpu"} | kwargs))


def train(world, **kwargs):
    cfg = flags(world, **kwargs)
    assert run_stage(train_df, cfg) is None
    return locate.Path(cfg.out)


@pytest.fixture(scope="module")
def made(world):
    return train(world, ema=0.5)


def test_only_the_matrices_of_attention_and_feed_forward_train(base):
    net = tiny_model("lora", **SIZES)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    lora.attach(net, RANK, 0)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    layers = [f"{kind}.{x}" for kind in ("self_attn", "cross_attn") for x in "qkvo"] + ["ffn.0", "ffn.2"]
    assert trained == {f"blocks.{i}.{layer}.lora_{side}.weight" for i in range(2) for layer in layers
                       for side in "AB"}
    x = torch.randn(1, 6, 4, 4, 4, generator=common.rng("x"))
    inputs = (x, torch.full((1, 6), 500.0), torch.randn(1, 3, 24, generator=common.rng("text")))
    assert torch.equal(net(*inputs), tiny_model("lora", **SIZES)(*inputs))  # B is zero
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        net(*inputs).square().mean().backward()
        optimizer.step()
    state = {name.replace(".base.", "."): p for name, p in net.state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert all(p.grad is None or "lora_" in name for name, p in net.named_parameters())


def test_a_bf16_base_has_fp32_matrices():
    net = model.WanModel(model.Config(**SIZES), torch.bfloat16)
    lora.attach(net, RANK, 0)
    kinds = {name: p.dtype for name, p in net.named_parameters()}
    assert kinds["blocks.0.ffn.0.base.weight"] == torch.bfloat16
    assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}


def test_model_k_is_the_lora_and_loads_as_the_model_that_was_trained(world, made, ranks):
    """Through the function of the network in training, with averaged weights."""
    assert {file.name for file in made.iterdir() if file.is_file()} == {
        files.MARK, locate.ADAPTER, "config.json", "log.jsonl", "run.json"}
    config = json.loads((made / "config.json").read_text())
    assert (config["base"], config["lora_rank"], config["step"], config["mode"]) == ("../wan", RANK, 4, "df")
    assert str(world) not in (made / "config.json").read_text()
    saved = load_file(made / locate.ADAPTER)
    assert all(name.startswith("diffusion_model.blocks.") and value.dtype == torch.float32
               for name, value in saved.items())
    net = model.load(world / "wan")
    lora.attach(net, RANK, 0)
    net.load_state_dict({name.removeprefix("diffusion_model."): value for name, value in saved.items()},
                        strict=False)
    x = torch.randn(1, 6, 4, 4, 4, generator=common.rng("x"))
    inputs = (x, torch.full((1, 6), 500.0), torch.randn(1, 3, 24, generator=common.rng("text")))
    with torch.no_grad():
        trained, loaded = net(*inputs), model.load(made)(*inputs)
        assert relative(loaded, trained) < 1e-5
        assert relative(loaded, model.load(world / "wan")(*inputs)) > 1e-3  # it has learnt something
    assert model.trained_causally(made) is True
    assert model.find_weights(made) == [made / locate.ADAPTER, (world / "wan").resolve() /
                                        "diffusion_pytorch_model.safetensors"]


def test_the_script_describes_it(made, capsys):
    model.main(model.Flags(str(made)))
    printed = capsys.readouterr().out
    assert "trained causally: yes" in printed and "float32" in printed


def test_it_moves_with_its_base_beside_it(made, world, tmp_path):
    shutil.copytree(made, tmp_path / "shared" / "model")
    with pytest.raises(UserError, match="no transformer in .*wan"):
        model.load(tmp_path / "shared" / "model")
    shutil.copytree(world / "wan", tmp_path / "shared" / "wan")
    assert_same(model.load(tmp_path / "shared" / "model"), model.load(made))
    assert_same(model.load(world / "wan", loras=[made]), model.load(made))  # and where it does not, this way
    config = json.loads((made / "config.json").read_text()) | {"base": "."}
    (tmp_path / "shared" / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is said to change itself"):
        model.load(tmp_path / "shared" / "model")


def test_a_lora_on_a_lora_and_on_merged_files(world, made, base, tmp_path):
    """Round 2 from model_0, with a style merged before: both are named, and found."""
    style = written(tmp_path / "style.safetensors", base, musubi_style)
    out = train(world, init=str(made), lora=(f"{style}:0.5",), out=str(tmp_path / "model_1"), steps=1)
    config = json.loads((out / "config.json").read_text())
    assert config["base_loras"] == [["../style.safetensors", 0.5]]
    expected = model.load(made, loras=[f"{style}:0.5", out])
    assert_same(model.load(out), expected)
    assert [file.name for file in model.find_weights(out)] == [
        locate.ADAPTER, "style.safetensors", locate.ADAPTER, "diffusion_pytorch_model.safetensors"]


def test_full_training_of_a_merged_model_is_whole(world, base, tmp_path):
    style = written(tmp_path / "style.safetensors", base, musubi_style)
    out = train(world, lora_rank=None, lora=(str(style),), out=str(tmp_path / "m"), steps=1, lr=0.0)
    assert_same(model.load(out), model.load(world / "wan", loras=[style]))
    with pytest.raises(UserError, match="was begun with lora = "):
        train(world, lora_rank=None, out=str(tmp_path / "m"), steps=1, lr=0.0)


def test_resumed_to_the_bit(world, made, tmp_path):
    out = train(world, ema=0.5, steps=2, out=str(tmp_path / "m"))
    (out / "config.json").unlink()
    train(world, ema=0.5, out=str(out))
    expected = load_file(made / locate.ADAPTER)
    assert all(torch.equal(value, expected[name]) for name, value in load_file(out / locate.ADAPTER).items())


def test_the_model_that_stays_as_it_is_has_the_dtype_of_its_products(world, ranks):
    cfg = train_df.complete(flags(world, dtype="bfloat16"), ranks)
    state = train_df.begin(cfg, train_df.Samples(cfg), ranks)
    assert state.net.blocks[0].ffn[0].base.weight.dtype == torch.bfloat16
    assert {p.dtype for p in state.weights.values()} == {torch.float32}


def test_rollouts_and_videos_are_made_with_loras(base, tmp_path, monkeypatch):
    """model_k, a LoRA of its base, is that base with --lora model_k, and not the base alone."""
    monkeypatch.chdir(tmp_path)
    toy.make_wan(tmp_path / "wan")
    vae = data.fingerprint("wan", "vae")
    fill_store("agg_0", ["seed"] * 3, (6, 16, 4, 4), vae=vae, t5=data.fingerprint("wan", "t5"))
    net = model.load("wan")
    lora.attach(net, RANK, 0)
    weights = {name: torch.randn(p.shape, generator=common.rng(name)) / 4
               for name, p in net.named_parameters() if p.requires_grad}
    model.save(net, "model_0", weights, base="../wan", lora_rank=RANK, wan="../wan", mode="df", held_out=0)
    latents = []
    for number, (path, loras) in enumerate((("model_0", ()), ("wan", ("model_0",)), ("wan", ()))):
        run_stage(rollout, rollout.Config(path, lora=loras, data="agg_0", out=f"r{number}", count=1, steps=1,
                                          guidance=1, previews=0, held_out=0, round=0, device="cpu"))
        latents.append(data.Clips(f"r{number}").load(0)["latents"].float())
    assert relative(latents[1], latents[0]) < 1e-2 < relative(latents[2], latents[0])
    flags = dict(prompt="a disc", seconds=0.5, steps=1, guidance=1, size="32x32", causal=True, device="cpu")
    run_stage(sample, sample.Config("wan", lora=("model_0:0.5",), **flags))
    tags = data.read_tags("videos/0000-a-disc.mp4")
    assert tags["lora"] == [f"{tmp_path / 'model_0' / locate.ADAPTER}:0.5"]
    run_stage(sample, sample.Config("wan", lora=("model_0:0.5",), **flags))  # is there already
    with pytest.raises(UserError, match="was made with lora = "):
        run_stage(sample, sample.Config("wan", **flags))


def test_two_ranks_train_the_same(world, tmp_path):
    """With a base in bfloat16, which is spread over the ranks beside fp32 matrices."""
    cfg = dict(dtype="bfloat16", micro=1, ema=0.5)
    one = load_file(train(world, out=str(tmp_path / "one"), **cfg) / locate.ADAPTER)
    fork_ranks(2, lambda: train(world, out=str(tmp_path / "two"), shard=True, **cfg))
    two = load_file(tmp_path / "two" / locate.ADAPTER)
    for name, value in one.items():
        assert relative(two[name], value) < 0.1, name


def test_a_rank_of_nothing_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="--lora-rank 0: give a whole number from 1"):
        train(world, lora_rank=0, out=str(tmp_path / "m"))


def test_the_flag_may_be_given_several_times():
    cfg = parse(train_df.Config, "", "--data d --lora a:2 b --lora c".split())
    assert cfg.lora == ("a:2", "b", "c")
    assert parse(train_df.Config, "", ["--data", "d"]).lora == ()
