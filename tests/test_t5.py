"""t5.py: transformers' numbers from every layout on disk; text -> ids; embeddings; memory; refusals."""

import hashlib
import html
import io
import random
import re
import shutil
import types
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel, UMT5ForConditionalGeneration
from worlds import call_text, relative

import t5
from common import UserError

PTH = "models_t5_umt5-xxl-enc-bf16.pth"
SPIECE = "google/umt5-xxl/spiece.model"
WORDS = "a red fox runs over the snowy hill while its camera pans left , slowly".split()
# the sizes are all different, so that none can stand in for another
TINY = {"vocab_size": 300, "d_model": 48, "d_kv": 8, "d_ff": 112, "num_layers": 3, "num_heads": 5}


def hf_model(kind=UMT5EncoderModel, **sizes):
    """Weights so large that the bias, the softmax and the norms all shape the output."""
    with torch.device("meta"):
        model = kind(UMT5Config(**TINY | sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0))
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = 1 if "embed" in name or "shared" in name or "relative" in name else parameter.shape[-1]
            parameter.uniform_(-1.7, 1.7, generator=generator).div_(fan_in ** 0.5)
            if "layer_norm" in name:
                parameter.add_(1)
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def hf():
    return hf_model()


@pytest.fixture(scope="module")
def encoder(hf):
    return encoder_of(hf)


def encoder_of(hf):
    weights = t5.official_names(hf.state_dict())
    encoder = t5.Encoder(**t5.sizes_of(weights))
    encoder.load_state_dict(weights)
    return encoder.requires_grad_(False)


def train_tokenizer(**options):
    """Its pieces are the letters and each of WORDS."""
    draw = random.Random(0)
    model = io.BytesIO()
    corpus = (" ".join(draw.choices(WORDS, k=9)) for _ in range(400))
    options = {"vocab_size": 40, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | options
    # "identity": HF can be given the pieces of a model, but not (without protobuf) its normalisation
    options |= {"normalization_rule_name": "identity", "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=corpus, model_writer=model, **options)
    return model.getvalue()


@pytest.fixture(scope="module")
def spiece():
    return train_tokenizer()


@pytest.fixture(scope="module")
def tokenizer(spiece):
    return sentencepiece.SentencePieceProcessor(model_proto=spiece)


@pytest.fixture
def wan(tmp_path, hf, spiece):
    """A Wan directory with its text encoder and nothing else."""
    put(tmp_path / "wan" / SPIECE, spiece)
    torch.save(t5.official_names(hf.state_dict()), tmp_path / "wan" / PTH)
    return tmp_path / "wan"


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def random_ids(*shape, vocab=300):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(1))


# ----------------------------------------------------------------------------------------------------
# the network against transformers

@pytest.mark.parametrize("length", [1, 7, 60, 200, 512])
def test_equals_transformers(hf, encoder, length):
    ids = random_ids(3, length)
    with torch.no_grad():
        expected = hf(ids).last_hidden_state
    assert relative(encoder(ids), expected) < 1e-5
    assert relative(encoder(ids, torch.ones_like(ids)), expected) < 1e-5


def test_padding_is_not_attended_to(hf, encoder):
    ids = random_ids(3, 64)
    mask = torch.ones(3, 64, dtype=torch.long)
    mask[0, 1:], mask[1, 40:] = 0, 0
    with torch.no_grad():
        expected = hf(ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    assert relative(encoder(ids, mask)[real], expected[real]) < 1e-5
    assert relative(encoder(ids, real)[real], expected[real]) < 1e-5
    assert relative(encoder(ids[1:2, :40])[0], expected[1, :40]) < 1e-5  # the same as not padding at all
    assert relative(encoder(ids)[1, :40], expected[1, :40]) > 1e-2  # the mask matters


@pytest.mark.parametrize("part", ["relative_attention_bias", "layer.1.layer_norm", "final_layer_norm",
                                  "SelfAttention.k", "wi_0"])
def test_parity_would_notice(hf, encoder, part):
    ids = random_ids(1, 60)
    other = hf_model()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if part in name:
                parameter.mul_(1.1)
        assert relative(encoder(ids), other(ids).last_hidden_state) > 1e-3


def test_the_number_of_buckets_is_read_off_the_weights():
    hf = hf_model(relative_attention_num_buckets=16)
    ids = random_ids(1, 60)
    with torch.no_grad():
        assert relative(encoder_of(hf)(ids), hf(ids).last_hidden_state) < 1e-5


def test_equals_transformers_at_full_width():
    hf = hf_model(vocab_size=50, d_model=4096, d_kv=64, d_ff=10240, num_layers=1, num_heads=64)
    weights = t5.official_names(hf.state_dict())
    with torch.device("meta"):
        encoder = t5.Encoder(**t5.sizes_of(weights))
    encoder.load_state_dict(weights, assign=True)
    ids = random_ids(1, 40, vocab=50)
    with torch.no_grad():
        assert relative(encoder(ids), hf(ids).last_hidden_state) < 1e-5


@pytest.mark.parametrize("length", [1, 60, 512])
def test_bf16_is_close_to_fp32(hf, encoder, length):
    ids = random_ids(2, length)
    low = encoder_of(hf).bfloat16()(ids)
    assert low.dtype == torch.bfloat16
    assert relative(low, encoder(ids)) < 2e-2


def test_buckets_golden():
    golden = {0: 0, -1: 1, -7: 7, -8: 8, -11: 8, -12: 9, -16: 10, -22: 10, -23: 11, -32: 12, -45: 12, -46: 13,
              -64: 14, -91: 15, -200: 15, 1: 17, 8: 24, 12: 25, 16: 26, 128: 31}
    assert t5.distance_buckets(torch.tensor(list(golden)), 32).tolist() == list(golden.values())


@pytest.mark.parametrize("buckets", [8, 16, 32, 64])
def test_buckets_equal_transformers(buckets):
    peer = hf_model(relative_attention_num_buckets=buckets).encoder.block[0].layer[0].SelfAttention
    distance = torch.arange(-600, 601)
    assert torch.equal(t5.distance_buckets(distance, buckets), peer._relative_position_bucket(distance))


def test_xxl_has_the_published_names_and_size():
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in t5.Encoder().state_dict().items()}
    expected = {"token_embedding.weight": (256384, 4096), "norm.weight": (4096,)}
    for i in range(24):
        expected |= {f"blocks.{i}.norm{n}.weight": (4096,) for n in (1, 2)}
        expected |= {f"blocks.{i}.attn.{n}.weight": (4096, 4096) for n in "qkvo"}
        expected |= {f"blocks.{i}.pos_embedding.embedding.weight": (32, 64)}
        expected |= {f"blocks.{i}.ffn.{n}.weight": (10240, 4096) for n in ("gate.0", "fc1")}
        expected |= {f"blocks.{i}.ffn.fc2.weight": (4096, 10240)}
    assert shapes == expected
    assert len(shapes) == 242
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 5_680_910_336


# ----------------------------------------------------------------------------------------------------
# every layout on disk

def single(hf, folder):
    hf.save_pretrained(folder)


def shards(hf, folder):
    hf.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def both_names(hf, folder):
    table = hf.shared.weight.detach()
    folder.mkdir()
    save_file(hf.state_dict() | {"shared.weight": table, "encoder.embed_tokens.weight": table.clone()},
              folder / "model.safetensors")


def only_inner_name(hf, folder):
    weights = hf.state_dict()
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("write", [single, shards, both_names, only_inner_name])
def test_hf_layouts(tmp_path, hf, encoder, spiece, write):
    write(hf, tmp_path / "text_encoder")
    put(tmp_path / "tokenizer" / "spiece.model", spiece)
    ids = random_ids(1, 20)
    for path in tmp_path, tmp_path / "text_encoder":
        loaded = t5.load(str(path))
        assert torch.equal(loaded.encoder(ids), encoder(ids))
        assert len(loaded.encode(["a red fox"])[0]) == 4


def test_wan_layouts(wan, encoder):
    t5.save(encoder, wan / "t5.safetensors")
    ids = random_ids(1, 20)
    paths = [wan, wan / PTH, wan / "t5.safetensors"]
    for path in paths:
        assert torch.equal(t5.load(path).encoder(ids), encoder(ids))
    (wan / PTH).unlink()
    assert torch.equal(t5.load(wan).encoder(ids), encoder(ids))
    for place in "tokenizer/spiece.model", "spiece.model":  # beside a file of weights
        (wan / place).parent.mkdir(exist_ok=True)
        shutil.move(next(wan.rglob("spiece.model")), wan / place)
        assert t5.load(wan / "t5.safetensors").tokenizer.eos_id() == 1


def test_full_umt5_gives_its_encoder(tmp_path):
    full = hf_model(UMT5ForConditionalGeneration)
    weights = {name: tensor.clone() for name, tensor in full.state_dict().items()}
    assert {"shared.weight", "decoder.embed_tokens.weight", "lm_head.weight"} <= weights.keys()
    save_file(weights, tmp_path / "model.safetensors")
    ids = random_ids(1, 20)
    with torch.no_grad():
        expected = full.encoder(ids).last_hidden_state
    assert relative(t5.load_encoder(tmp_path)(ids), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_then_load_is_bit_exact(tmp_path, hf, dtype):
    encoder = encoder_of(hf).to(dtype)
    t5.save(encoder, tmp_path / "t5.safetensors")
    loaded = t5.load_encoder(tmp_path, dtype=dtype)
    assert loaded.state_dict().keys() == encoder.state_dict().keys()
    for name, tensor in encoder.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_dtype_is_what_was_asked_for(wan):
    low = t5.load(wan, "cpu", torch.bfloat16)
    assert {p.dtype for p in low.encoder.parameters()} == {torch.bfloat16}
    assert low.encode(["a red fox"])[0].dtype == torch.bfloat16
    assert t5.load(wan).encode(["a red fox"])[0].dtype == torch.float32


# ----------------------------------------------------------------------------------------------------
# text -> ids

@pytest.mark.parametrize("raw, cleaned", [
    ("", ""),
    (" \t\n ", ""),
    ("  a fox\r\n\r\n runs\t\u00a0over\u3000snow\u2028 ", "a fox runs over snow"),
    ("cats &amp;amp; dogs &lt;3 &#39;s", "cats & dogs <3 's"),
    ("&amp;amp;amp;", "&amp;"),
    ("\u2018a\u2019 \u201cb\u201d &ldquo;c&rdquo;", "'a' \"b\" \"c\""),
    ("\uff21\uff42\uff11\uff0c\uff01\uff5e", "Ab1,!~"),  # full width
    ("\uff76\uff9e", "\u30ac"),  # half-width ka, then a voicing mark -> ga
    ("e\u0301", "\u00e9"),  # NFC
    ("\ufb01re o\ufb03ce", "fire office"),
    ("\u00bd x\u00b2 \u2122", "\u00bd x\u00b2 \u2122"),  # NFKC would change these; ftfy does not
    ("\ufeffa\x00b\x1bc\x7f\ufffc", "abc"),
    ("\ud83d\ude00 \ud83d", "\U0001f600 \ufffd"),  # a surrogate pair is one character, half of one is none
    ("Upper, lower. punctuation!", "Upper, lower. punctuation!"),
])
def test_clean(raw, cleaned, monkeypatch):
    monkeypatch.setattr(t5, "ftfy", None)
    assert t5.clean(raw) == cleaned


TRICKY = ["sch\u00c3\u00b6n fox", "\u00e2\u20ac\u0153fox\u00e2\u20ac\x9d", "&amp;amp;amp;lt; fox",
          "a < &amp;gt; fox", "a \x1b[31mred\x1b[0m fox", "fox\x85runs", "\u017f \ufb05",
          "fox\x00\x0b\x1f runs", "\ud83d fox", "&#x1F98A;"]


@pytest.mark.parametrize("raw", TRICKY)
def test_with_ftfy_cleaning_is_wans(raw):
    ftfy = pytest.importorskip("ftfy")
    expected = html.unescape(html.unescape(ftfy.fix_text(raw))).strip()
    assert t5.clean(raw) == re.sub(r"\s+", " ", expected).strip()


def test_ftfy_is_used_where_it_is_installed(monkeypatch):
    fake = types.SimpleNamespace(fix_text=lambda text: text.replace("x", "&amp;lt;"))
    monkeypatch.setattr(t5, "ftfy", fake)
    assert t5.clean(" a\n x ") == "a <"  # and what it returns is unescaped twice


def test_clean_gives_wans_negative_prompt():
    raw = (
        "\u8272\u8c03\u8273\u4e3d\uff0c\u8fc7\u66dd\uff0c\u9759\u6001\uff0c"
        "\u7ec6\u8282\u6a21\u7cca\u4e0d\u6e05\uff0c\u5b57\u5e55\uff0c\u98ce\u683c\uff0c"
        "\u4f5c\u54c1\uff0c\u753b\u4f5c\uff0c\u753b\u9762\uff0c\u9759\u6b62\uff0c"
        "\u6574\u4f53\u53d1\u7070\uff0c\u6700\u5dee\u8d28\u91cf\uff0c\u4f4e\u8d28\u91cf\uff0c"
        "JPEG\u538b\u7f29\u6b8b\u7559\uff0c\u4e11\u964b\u7684\uff0c\u6b8b\u7f3a\u7684\uff0c"
        "\u591a\u4f59\u7684\u624b\u6307\uff0c\u753b\u5f97\u4e0d\u597d\u7684\u624b\u90e8\uff0c"
        "\u753b\u5f97\u4e0d\u597d\u7684\u8138\u90e8\uff0c\u7578\u5f62\u7684\uff0c"
        "\u6bc1\u5bb9\u7684\uff0c\u5f62\u6001\u7578\u5f62\u7684\u80a2\u4f53\uff0c"
        "\u624b\u6307\u878d\u5408\uff0c\u9759\u6b62\u4e0d\u52a8\u7684\u753b\u9762\uff0c"
        "\u6742\u4e71\u7684\u80cc\u666f\uff0c\u4e09\u6761\u817f\uff0c"
        "\u80cc\u666f\u4eba\u5f88\u591a\uff0c\u5012\u7740\u8d70")
    sha1 = [hashlib.sha1(text.encode()).hexdigest() for text in (raw, t5.clean(raw))]
    assert sha1 == ["52d91e9f431d5095ff03976eebb623ab76e9005e", "7065f353417bd41ecd8f57dd94459d7c818e5231"]


def test_ids_equal_transformers(tokenizer):
    pieces = [(tokenizer.id_to_piece(i), tokenizer.get_score(i)) for i in range(tokenizer.vocab_size())]
    peer = T5Tokenizer(vocab=pieces, extra_ids=0)
    for prompt in ["a fox</s> runs", "</s>", "<pad>fox <unk></s></s>", "fox &lt;/s&gt;", "</S> a</s",
                   "fox</s>" * 300, "", "a", "a red fox runs", "hillfox snow, ZZZ over",
                   "a \U0001f98a fox\n\nruns  left ,", "fox " * 600, "x y z" * 300]:
        ids = t5.token_ids(tokenizer, prompt)
        assert ids == peer(t5.clean(prompt), truncation=True, max_length=512).input_ids
        assert ids[-1] == 1 and (0 in ids) == ("<pad>" in prompt)


@pytest.mark.parametrize("words, count", [(510, 511), (511, 512), (512, 512), (10_000, 512)])
def test_truncation_keeps_the_eos(wan, words, count):
    text = t5.load(wan)
    prompt = " ".join(["fox"] * words)
    ids = t5.token_ids(text.tokenizer, prompt)
    assert len(ids) == count and ids[-1] == 1 and set(ids[:-1]) == {text.tokenizer.piece_to_id("\u2581fox")}
    assert text.encode([prompt])[0].shape == (count, 48)


# ----------------------------------------------------------------------------------------------------
# embeddings

def test_encode_is_the_encoder_on_the_ids(wan):
    text = t5.load(wan)
    for prompt in ["a red fox", "", "line one\nline two\r\n", "\U0001f98a &amp; \U0001f468\u200d\U0001f469",
                   "\u96ea\u5c71\uff0c\u72d0\u72f8", "\ud800", "\x00"]:
        ids = torch.tensor([t5.token_ids(text.tokenizer, prompt)])
        (row,) = text.encode([prompt])
        assert row.shape == (ids.shape[1], 48) and row.isfinite().all()
        assert torch.equal(row, text.encoder(ids)[0])
    assert len(text.encode([""])[0]) == 1  # the eos alone
    assert text.encode([]) == []


def test_company_changes_an_embedding_by_rounding_alone(tokenizer):
    # wide enough for a matmul whose rounding depends on the number of rows
    torch.manual_seed(0)
    text = t5.TextEncoder(t5.Encoder(60, 1024, 1024, 1024, heads=16, layers=1), tokenizer)
    same_length = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(4)]
    longer = [" ".join([p] * 4) for p in same_length]
    prompts = ["", *same_length, "a red fox", "a snowy hill", *longer, same_length[0], ""]
    assert len({len(t5.token_ids(tokenizer, p)) for p in same_length}) == 1
    together, backwards = text.encode(prompts), text.encode(prompts[::-1])[::-1]
    for prompt, row, other in zip(prompts, together, backwards, strict=True):
        torch.testing.assert_close(row, text.encode([prompt])[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(row, other, rtol=1e-4, atol=1e-5)


class Counting(t5.Encoder):
    """Notes the shape of every batch."""

    def forward(self, ids):
        self.seen = [*getattr(self, "seen", []), tuple(ids.shape)]
        return super().forward(ids)


def test_equal_prompts_are_computed_once(tokenizer):
    text = t5.TextEncoder(Counting(60, 32, 32, 32, 2, 1), tokenizer)
    a, b, c = text.encode(["a fox", "a  fox\n", "a hill"])
    assert text.encoder.seen == [(2, 3)]
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert len({row.untyped_storage().data_ptr() for row in (a, b, c)}) == 3  # safetensors refuses less
    assert a.untyped_storage().nbytes() == a.nbytes


def test_equal_lengths_share_a_batch(tokenizer, monkeypatch):
    text = t5.TextEncoder(Counting(60, 32, 32, 32, 2, 1), tokenizer)
    monkeypatch.setattr(t5, "BATCH_TOKENS", 6)
    rows = text.encode(["a fox", "a red fox", "a hill", "red fox", "over"])
    assert text.encoder.seen == [(2, 3), (1, 3), (1, 4), (1, 2)]
    assert [row.shape for row in rows] == [(3, 32), (4, 32), (3, 32), (3, 32), (2, 32)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_gpu_gives_the_cpus_embeddings(wan, dtype, limit):
    prompts = ["a red fox", "", "a snowy hill", "over the hill", "fox " * 600, "hill " * 300]
    rows = t5.load(wan, "cuda", dtype).encode(prompts)
    for row, expected in zip(rows, t5.load(wan).encode(prompts), strict=True):
        assert row.is_cuda and row.dtype == dtype
        assert relative(row.cpu(), expected) < limit


def test_embeddings_are_ordinary_tensors(wan, tmp_path):
    row, again = t5.load(wan).encode(["a red fox"] * 2)
    assert not row.is_inference() and not row.requires_grad
    save_file({"text": row, "again": again}, tmp_path / "x.safetensors")
    layer = torch.nn.Linear(48, 1)
    layer(row).sum().backward()  # autograd would refuse an inference tensor here
    assert torch.allclose(layer.weight.grad[0], row.sum(0), atol=1e-5)


# ----------------------------------------------------------------------------------------------------
# memory

PROBE = """
    import sys, torch, t5
    def anonymous():
        (line,) = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
        return int(line.split()[1]) * 1024
    def load(name, dtype):
        kept.append(t5.load_encoder(name, "cpu", dtype))
        kept[-1](torch.arange(40)[None])  # the weights are not just there, they are used
    kept = []
    load("tiny.safetensors", torch.bfloat16)  # what torch itself allocates at first use
    for name, dtype in ("x.pth", torch.bfloat16), ("x.safetensors", torch.bfloat16), ("x.pth", torch.float32):
        before = anonymous()
        load(name, dtype)
        print(anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_weights_of_the_right_dtype_stay_in_the_file(tmp_path):
    with torch.device("meta"):
        encoder = t5.Encoder(30_000, 1024, 1024, 2048, heads=16, layers=4).bfloat16()
    encoder.to_empty(device="cpu")
    torch.save(encoder.state_dict(), tmp_path / "x.pth")
    t5.save(encoder, tmp_path / "x.safetensors")
    t5.save(t5.Encoder(60, 32, 32, 32, 2, 1).bfloat16(), tmp_path / "tiny.safetensors")
    size = (tmp_path / "x.pth").stat().st_size
    assert size > 100e6
    pth, safetensors, copied = map(int, call_text(PROBE, cwd=tmp_path).split())
    assert pth < size / 8 and safetensors < size / 8
    assert copied > 1.9 * size  # so the numbers above mean something


# ----------------------------------------------------------------------------------------------------
# refusals

def refuses(*words):
    """A UserError that has all these words."""
    return pytest.raises(UserError, match="(?s)" + "".join(f"(?=.*{re.escape(str(word))})" for word in words))


def test_refuses_a_missing_tokenizer(wan):
    shutil.rmtree(wan / "google")
    for path in wan, wan / PTH:
        with refuses(wan / SPIECE, wan / "tokenizer/spiece.model", wan / "spiece.model", "hf download"):
            t5.load(path)
    assert t5.load_encoder(wan)(torch.tensor([[5, 1]])).shape == (1, 2, 48)  # needs none


def test_refuses_missing_weights(wan):
    (wan / PTH).unlink()
    with refuses(wan, PTH, "t5.safetensors", "text_encoder/", "hf download"):
        t5.load(wan)
    with refuses(wan / "typo", "no such file or folder"):
        t5.load_encoder(wan / "typo")


def test_refuses_a_missing_shard(tmp_path, hf):
    shards(hf, tmp_path)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with refuses(gone):
        t5.load_encoder(tmp_path)


@pytest.mark.parametrize("name", [PTH, "t5.safetensors"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.98])
def test_refuses_a_truncated_file(wan, encoder, name, keep):
    t5.save(encoder, wan / "t5.safetensors")
    whole = (wan / name).read_bytes()
    (wan / name).write_bytes(whole[:int(keep * len(whole))])
    with refuses(wan / name):
        t5.load(wan / name)


def test_refuses_weights_that_do_not_fit(wan):
    weights = torch.load(wan / PTH)
    lost = weights.pop("blocks.1.attn.o.weight")
    torch.save(weights | {"blocks.1.attn.o.bias": torch.zeros(48), "norm.weight": torch.ones(47)}, wan / PTH)
    with refuses(wan / PTH, f"missing: blocks.1.attn.o.weight {tuple(lost.shape)}",
                 "unexpected: blocks.1.attn.o.bias", "misshapen: norm.weight"):
        t5.load(wan)


def test_refuses_other_models(wan):
    torch.save({"patch_embedding.weight": torch.zeros(3)}, wan / PTH)
    with refuses(wan / PTH, "is not Wan2.1's text encoder, but a Wan transformer"):
        t5.load(wan)


def test_refuses_a_wrong_tokenizer(wan):
    put(wan / SPIECE, b"version https://git-lfs.github.com/spec/v1")
    with refuses(wan / SPIECE, "not a sentencepiece model"):
        t5.load(wan)
    put(wan / SPIECE, b"")
    with refuses(wan / SPIECE, "not a sentencepiece model"):
        t5.load(wan)
    put(wan / SPIECE, train_tokenizer(pad_id=-1, unk_id=0))
    with refuses(wan / SPIECE, "pad id -1 and eos id 1"):
        t5.load(wan)
    put(wan / SPIECE, train_tokenizer(unk_id=1, eos_id=2))
    with refuses(wan / SPIECE, "pad id 0 and eos id 2"):
        t5.load(wan)


def test_refuses_a_tokenizer_larger_than_the_embedding(wan, tokenizer):
    weights = torch.load(wan / PTH)
    pieces = tokenizer.vocab_size()
    torch.save(weights | {"token_embedding.weight": torch.zeros(pieces, 48)}, wan / PTH)
    t5.load(wan)
    torch.save(weights | {"token_embedding.weight": torch.zeros(pieces - 1, 48)}, wan / PTH)
    with refuses(wan, f"{pieces} pieces", pieces - 1):
        t5.load(wan)


def test_refuses_float16(wan):
    with refuses("float16", "bfloat16"):
        t5.load(wan, dtype=torch.float16)


def test_refuses_what_is_no_prompt(wan):
    text = t5.load(wan)
    with refuses("prompt 1", "NoneType"):
        text.encode(["a red fox", None])
    with refuses("prompt 0", "int", "7"):
        text.encode([7])
    with pytest.raises(AssertionError, match="list"):
        text.encode("a red fox")
