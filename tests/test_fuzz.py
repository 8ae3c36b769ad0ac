"""Files of every kind, damaged and edited at random, and inputs drawn at random: nothing comes out but the
project's own errors, each of which names its file, and none takes long or much memory.

    FUZZ=50 python -m pytest -s tests/test_fuzz.py      50 times as many, and what became of them
"""

import copy
import csv
import dataclasses
import io
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tarfile
import types
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from test_data import make as make_video
from worlds import fill_store, fork, tiny_model

import aggregate
import checkpoint
import common
import data
import diffusion
import eval_drift
import flags
import lora
import model
import prepare
import prompts
import readings
import rollout
import sample
import sources
import t5
import toy
import train_df
import vae
from common import UserError

TIMES = int(os.environ.get("FUZZ", 1))
SECONDS, BYTES = 10, 2 * 10**9  # that a file may take

# ----------------------------------------------------------------------------------------------------
# how a file is damaged or edited: bytes and a source of chance -> bytes

ODD = [None, True, -1, 0, 1e999, 0.5, 10**6, 10**30, "", "x", "\0", "../../x", "/etc/passwd", "\ud800", [],
       {}, [[]], [1, 2], {"a": {}}, "y" * 10**5, "blocks.99999999.ffn.0.weight", "1e400", "F64", [10**12] * 3]


def damaged(content: bytes, chance) -> bytes:
    content = bytearray(content)
    place = chance.randrange(min(len(content), chance.choice([64, 4096, len(content)])) or 1)
    match chance.randrange(6):
        case 0:
            for _ in range(chance.randrange(1, 8)):
                content[min(place, len(content) - 1)] ^= 1 << chance.randrange(8)
        case 1:
            del content[place:]
        case 2:
            content[place:place] = chance.randbytes(chance.randrange(1, 64))
        case 3:
            content[place:place + chance.choice([1, 4, 8, 1000])] = b""
        case 4:
            size = chance.choice([1, 4, 8])
            content[place:place + size] = chance.choice([b"\xff", b"\x7f", b"\0"]) * size
        case _:
            content = chance.randbytes(chance.choice([0, 1, 8, 1000]))
    return bytes(content)


def edited(value, chance):
    """A JSON value with something odd in it."""
    value = copy.copy(value)
    if not isinstance(value, dict | list) or not value or chance.random() < 0.1:
        return chance.choice(ODD)
    key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
    match chance.randrange(4):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[str(chance.choice(ODD))] = value.pop(key)
        case _:
            value[key] = edited(value[key], chance)
    return value


def as_json(content: bytes, chance) -> bytes:
    return as_text(json.dumps(edited(json.loads(content), chance)), chance)


def as_lines(content: bytes, chance) -> bytes:
    lines = content.decode().splitlines()
    place = chance.randrange(len(lines))
    line = json.dumps(edited(json.loads(lines[place]), chance))
    lines[place] = chance.choice([line] * 5 + ["", "[" * 10**5, lines[0]])
    return as_text("\n".join(lines) + "\n", chance)


def as_header(content: bytes, chance) -> bytes:
    """The header of a safetensors file, with all the tensors behind it."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(edited(json.loads(content[8:end]), chance)).encode()
    return len(header).to_bytes(8, "little") + header + content[end:]


def as_text(text: str, chance) -> bytes:
    return text.encode(chance.choice(["utf-8"] * 8 + ["utf-16"]), "surrogatepass")


# ----------------------------------------------------------------------------------------------------
# the files, and who reads them

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    toy.make_wan(folder / "wan", trained=False)
    shape = (6, 16, 4, 4)
    fill_store(folder / "agg", ["seed"] * 3, shape, vae=data.fingerprint(folder / "wan", "vae"))
    video = torch.randint(0, 256, (20, 3, 32, 32), generator=common.rng("fuzz"), dtype=torch.uint8)
    videos = folder / "videos"
    videos.mkdir()
    data.write_video(videos / "a.mp4", [video], 16, {"prompt": "a disc", "seed": 3})
    (videos / "a.txt").write_text("A disc")
    make_video(folder / "a.mkv", rate=25)
    (folder / "run.json").write_text(json.dumps({"seed": 0, "latents": [1, 2], "command": ["x"]}))
    data.write_png(folder / "a.png", video[0])
    rows = [{"video": "videos/a.mp4", "text": "A disc", "start": 0.1, "end": 1},
            {"video": "b.mp4", "text": "x"}]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(folder / "list.csv", "w", newline="") as f:
        csv.writer(f).writerows([["video", "caption"], ["videos/a.mp4", 'A "disc"'], ["b.mp4", "x"]])
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for name, content in (("a.mp4", b"x" * 100), ("a.json", b'{"caption": "A disc"}'), ("b.mp4", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    lines = [{"prompt": "a | 2: b", "seconds": 5},
             {"prompt": ["a", "b"], "times": [0, 2.5], "seed": 1, "name": "n"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "prompts.txt").write_text("a disc\na | 4: b\n")
    (folder / "log.jsonl").write_text("".join(json.dumps({"step": i, "loss": 0.5}) + "\n" for i in range(5)))
    net = model.load(folder / "wan")
    lora.attach(net, 2, 0)
    thin = {name: p for name, p in net.named_parameters() if p.requires_grad}
    model.save(net, folder / "thin", thin, base="../wan", base_loras=[], lora_rank=2, mode="df", step=7)
    model.save(tiny_model("fuzz"), folder / "model", mode="df", held_out=2, window=21, wan="../wan", step=3)
    torch.save(tiny_model("fuzz").state_dict(), folder / "model.pt")
    (folder / "config.json").write_text('{"num_heads": 2, "text_len": 32}')
    shards = folder / "shards"
    shutil.copytree(folder / "model", shards)
    one = "diffusion_pytorch_model.safetensors"
    weights = common.open_weights(shards / one)[0]
    (shards / one).rename(shards / "one.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "one.safetensors")}
    (shards / f"{one}.index.json").write_text(json.dumps(index))
    return folder


def read_clip(file):
    return data.read_clip(data.probe(file), 8, 16, (32, 32))


def read_store(file):
    clips = data.Clips(file.parent)
    clips.meta()["latents"]
    clips.wan(file.parents[1] / "wan")
    return [clips.load(i)["latents"] for i in range(len(list(clips)))]


def read_clip_file(file):
    return data.Clips(file.parents[1]).load(0)


def read_prompts(file):
    rows = list(prompts.read_file(file))
    return [prompts.texts_and_times(row, row.get("seconds", 5), where) for where, row in rows]


def read_model(file):
    folder = file if file.suffix == ".pt" else file.parent
    model.settings(folder)
    model.trained_causally(folder)
    return model.load(folder)


def claim_folder(file):
    common.claim(file, {"seed": 0, "latents": [1, 2]})


def cut_log(file):
    train_df.Log.cut(types.SimpleNamespace(file=file), 2)


SAFE = (damaged, as_header)
JSON = (damaged, as_json)
LINES = (damaged, as_lines)
FILES = {  # path: who reads it, how it is changed
    "videos/a.mp4": (read_clip, (damaged,)), "a.mkv": (read_clip, (damaged,)),
    "run.json": (claim_folder, JSON), "a.png": (data.read_image, (damaged,)),
    "videos/a.txt": (lambda file: sources.find_clips(file.parent), (damaged,)),
    "list.jsonl": (sources.find_clips, LINES), "list.csv": (sources.find_clips, (damaged,)),
    "shard.tar": (sources.find_clips, (damaged,)),
    "agg/index.jsonl": (read_store, LINES), "agg/meta.json": (read_store, JSON),
    "agg/clips/c0.safetensors": (read_clip_file, SAFE),
    "agg/empty.safetensors": (data.read_text_embedding, SAFE),
    "prompts.jsonl": (read_prompts, LINES), "prompts.txt": (read_prompts, (damaged,)),
    "log.jsonl": (cut_log, LINES), "model/config.json": (read_model, JSON),
    "model/diffusion_pytorch_model.safetensors": (read_model, SAFE), "model.pt": (read_model, (damaged,)),
    "shards/diffusion_pytorch_model.safetensors.index.json": (read_model, JSON),
    "thin/config.json": (read_model, JSON), "thin/pytorch_lora_weights.safetensors": (read_model, SAFE),
    "wan/vae.safetensors": (vae.load, SAFE), "wan/t5.safetensors": (t5.load, SAFE),
    "wan/config.json": (lambda file: data.geometry(file.parent), JSON),
    "wan/google/umt5-xxl/spiece.model": (lambda file: t5.load(file.parents[2]), (damaged,))}
SLOW = {"videos/a.mp4": 2, "a.mkv": 2, "wan/t5.safetensors": 2}  # tries are fewer by so much


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(world, tmp_path, name):
    read, changes = FILES[name]
    shutil.copytree(world, tmp_path / "world")
    file = tmp_path / "world" / name
    whole = file.read_bytes()
    assert attempt(read, file, file) == "read"
    count = 40 * TIMES // SLOW.get(name, 1)
    at = multiprocessing.Value("i", 0)
    report = tmp_path / "report.json"

    def attack():
        limit_memory()
        outcomes = []
        for at.value in range(count):
            signal.alarm(SECONDS)  # kills this process
            chance = random.Random(at.value)
            file.write_bytes(chance.choice(changes)(whole, chance))
            outcomes.append(attempt(read, file, file))
        report.write_text(json.dumps(outcomes))
    process = fork(attack)
    process.join()
    assert process.exitcode == 0, f"{name}: try {at.value} ended with {process.exitcode}"
    outcomes = json.loads(report.read_text())
    faults = {i: outcome for i, outcome in enumerate(outcomes) if outcome not in ("read", "refused")}
    assert not faults, "\n".join(f"{name}, try {i}: {fault[:400]}" for i, fault in faults.items())
    refused = outcomes.count("refused")
    print(f"\n{name}: {count} tries, {refused} refused, {count - refused} read")


def attempt(read, argument, file: Path) -> str:
    try:
        read(argument)
        return "read"
    except (UserError, OSError) as error:
        named = any(name in str(error) for name in (file.name, file.parent.name, "/etc/passwd"))
        return "refused" if named and len(str(error)) < 3000 else f"does not name its file: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {common.first_line(error)}"


def limit_memory():
    status = Path("/proc/self/status")
    if status.exists():
        used = int(status.read_text().split("VmData:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + BYTES, used + BYTES))


# ----------------------------------------------------------------------------------------------------
# inputs drawn at random

drawn = hypothesis.settings(max_examples=60 * TIMES, deadline=None, derandomize=True, database=None,
                            suppress_health_check=list(hypothesis.HealthCheck))
TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
SHORT = st.text(max_size=9)
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | SHORT, lambda inner:
                      st.lists(inner, max_size=3) | st.dictionaries(SHORT, inner, max_size=3))


@drawn
@hypothesis.given(st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=4))
def test_any_text_comes_back_from_an_index(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("index")
    entries = []
    for id, prompt, source in rows:
        try:
            entries.append(data.index_entry(data.check_id(id, "f"), prompt, "seed", 0, source))
        except UserError:
            assert not id or id[0] == "." or set(id) & {"/", "\\", "\x7f"} or min(id) < " " or len(id) > 50
    data.write_index(folder, entries)
    assert list(data.Clips(folder)) == entries


@drawn
@hypothesis.given(st.dictionaries(st.sampled_from([*data.ENTRY, "x"]), VALUES))
def test_any_line_of_an_index(tmp_path_factory, row):
    folder = tmp_path_factory.mktemp("index")
    (folder / "index.jsonl").write_text(json.dumps(row | {"kind": "seed"}) + "\n")
    try:
        [entry] = data.Clips(folder)
        assert all(data.records.fits(entry[key], data.ENTRY[key]) for key in entry if key in data.ENTRY)
        data.Clips(folder).load(0)
    except UserError as error:
        assert "index.jsonl" in str(error) or "no such file" in str(error)


@drawn
@hypothesis.given(caption=TEXT)
def test_any_caption(world, tmp_path_factory, caption):
    folder = tmp_path_factory.mktemp("list")
    (folder / "metadata.jsonl").write_text(json.dumps({"video": "a.mp4", "text": caption}) + "\n")
    if caption.strip():
        assert sources.find_clips(folder)[0].caption == caption.strip()
    assert aggregate.rewritten(caption, aggregate.TEMPLATE)
    ids = t5.token_ids(t5.load_tokenizer(world / "wan"), caption)
    assert 1 <= len(ids) <= t5.MAX_TOKENS
    assert data.check_id(sources.clip_id(caption), "f")


@drawn
@hypothesis.given(st.text(st.sampled_from("ab |:.0123456789\n"), max_size=40), st.floats(0.1, 1e5))
def test_any_prompt(text, seconds):
    try:
        texts, times = prompts.texts_and_times({"prompt": text}, seconds, "p.txt:1")
    except UserError as error:
        assert str(error).startswith("p.txt:1: ")
        return
    assert len(texts) == len(times) > 0 and times == sorted(times) and times[0] == 0
    assert all(text.strip() for text in texts)


@drawn
@hypothesis.given(st.text(st.sampled_from("0123456789xX-. "), max_size=9), st.integers(), st.integers())
def test_any_geometry(tmp_path_factory, size, frames, fps):
    preset = {"size": size, "frames": frames, "fps": fps}
    folder = tmp_path_factory.mktemp("wan")
    (folder / "config.json").write_text(json.dumps({"geometry": preset}))
    try:
        made = data.geometry(folder)
        assert min(made) > 0 and made.frames == frames and made.fps == fps
    except UserError as error:
        assert "size" in str(error) or "config.json" in str(error)


@drawn
@hypothesis.given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 5))
def test_any_pattern_of_chunks(sizes, per_frame):
    """A token sees its own chunk and all before it; of a clean past, the chunks before it."""
    assert model.chunk_sizes(sum(sizes), tuple(sizes)) == tuple(sizes)
    places = [0]
    for (first, last, past), size in zip(model.causal_layout(tuple(sizes), per_frame), sizes, strict=True):
        assert (first, last, past) == (places[-1], places[-1] + size * per_frame, places[-1])
        places.append(last)
    layout = model.teacher_layout(tuple(sizes), per_frame)
    assert [past for _, _, past in layout[len(sizes) - 1:]] == places[:-1]
    assert [first for first, _, _ in layout[1:]] == [last for _, last, _ in layout[:-1]]
    with pytest.raises(ValueError):
        model.chunk_sizes(sum(sizes) + 1, tuple(sizes))


@drawn
@hypothesis.given(*[st.integers(-3, 60)] * 4, st.none() | st.integers(-2, 9))
def test_any_window(begin, frames, window, keep, sink):
    begin = max(begin, 0)
    try:
        diffusion.check_plan(begin, frames, 3, window, keep, sink)
    except UserError:
        return
    assert frames > begin and (frames - begin) % 3 == 0 and begin + 3 <= window
    assert sink is not None or 0 < keep <= window - 3


RECIPE = {"prompt": "a", "prompts": ["a", "b"], "times": [0, 1.5], "seed": 1, "name": "n", "id": 0,
          "wan": "w", "model": "m", "extend": "v.mp4", "image": None, "context": 12, "fingerprint": "f",
          "world": [0, 1]}


@drawn
@hypothesis.given(st.randoms(use_true_random=False))
def test_any_tags(tmp_path_factory, chance):
    """What tags hold is of its kind, and a recipe that lacks something is refused."""
    file = tmp_path_factory.mktemp("tags") / "v.mp4"
    tags = edited(RECIPE, chance)
    data.write_video(file, torch.zeros(2, 3, 32, 32), 16, tags if isinstance(tags, dict) else {})
    back = data.read_tags(file)
    assert all(data.records.fits(back[key], kind) for key, kind in data.TAGS.items() if key in back)
    readings.origin_of(back | ({"extend": str(file)} if "extend" in back else {}))
    try:
        recipe = sample.read_recipe(str(file))
        prompts.texts_and_times({"prompt": recipe["prompts"], "times": recipe["times"]}, 5, "v.mp4")
    except UserError as error:
        assert "v.mp4" in str(error)


STAGES = {stage: {field.name.replace("_", "-"): field for field in dataclasses.fields(stage.Config)}
          for stage in (prepare, train_df, rollout, aggregate, sample, eval_drift)}
WORDS = st.sampled_from(["0", "-1", "1e999", "nan", "inf", "9" * 30, "", "x", "0x0", "cuda:99", "a=b", "-",
                         "\ud800", "--", "0.5", "7", "32x32", "cpu", "df"]) | st.text(max_size=5) | st.none()


@drawn
@hypothesis.given(st.sampled_from(list(STAGES)), st.data())
def test_any_flags(stage, drawing):
    """What parses is of its type, in range and finite."""
    known = STAGES[stage]
    given = drawing.draw(st.dictionaries(st.sampled_from([*known, "oops"]), WORDS, max_size=4))
    words = ["--out", "o"] if stage is not eval_drift else []
    for name, word in given.items():
        words += [f"--{name}"] + [word] * (word is not None)
    try:
        cfg = flags.parse(stage.Config, "", words)
    except UserError as error:
        assert len(str(error)) < 600
        return
    for field in known.values():
        value = getattr(cfg, field.name)
        assert not isinstance(value, float) or math.isfinite(value)


@drawn
@hypothesis.given(st.integers(1, 40), st.integers(1, 12))
def test_any_number_of_shares(length, world):
    x = torch.arange(length)
    parts = [x[slice(*checkpoint.rows(x, rank, world))] for rank in range(world)]
    chunks = list(x.chunk(world))
    assert torch.equal(torch.cat(parts), x)
    assert all(torch.equal(a, b) for a, b in zip(parts, chunks, strict=False))
    assert all(len(part) == 0 for part in parts[len(chunks):])
