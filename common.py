"""What every stage shares and the method does not care about: flags, ranks, seeds, safe files, weights."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import re
import resource
import shlex
import sys
import time
import traceback
import zipfile
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, its default arguments would keep the process group alive
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import files
import forked
import records
from files import UserError, as_json, replacing, write_text

# ----------------------------------------------------------------------------------------------------
# a stage's last line

def run(main, cfg):
    """A stage's last line: run main(cfg), show in a line or two what the user can mend, and ask for a report
    of what is not."""
    status, words = 0, ""
    try:
        status = main(cfg) or 0
    except KeyboardInterrupt:
        status = 130
    except SystemExit as end:  # where rank 0 says why
        status = end.code
    except Exception as error:
        said = explained(error)
        if said is None or "--debug" in sys.argv:
            traceback.print_exc()
        command = files.plain(shlex.join(sys.argv))
        bug = f"this is a defect; please report it, with the lines above and the command: {command}"
        status = 1 if said is None else 2
        words = "" if said == "" else f"{Path(sys.argv[0]).name}: {said or bug}\n"
    status = forked.end(status, words)
    files.release()
    if dist.is_initialized():
        dist.destroy_process_group()
        # FSDP's caches keep the group, and so gloo's threads. One that has yet to let go of a tensor when
        # Python shuts down aborts the process; it takes microseconds, once it gets Python's lock
        time.sleep(0.1)
    sys.exit(status)


def explained(error: Exception) -> str | None:
    """What to tell the user about an error; nothing, if another process does; None: it is a defect."""
    if isinstance(error, UserError | OSError):  # an OSError says what is wrong with which file
        return "\n".join(map(files.plain, str(error).splitlines()))
    text = first_line(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in text:
        return f"out of memory: {text}\nmake batches, --size or --frames smaller, or use more or larger GPUs"
    if forked.others and forked.one_has_ended():  # this is what it does to us, and it says why it ended
        return ""
    if isinstance(error, RuntimeError) and text.startswith("Symlink loop"):
        return files.plain(text)
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    if alone or not re.search("gloo|NCCL|TCPStore|[Cc]onnection|[Ss]ocket", text):
        return None
    if forked.pipe:  # the first process knows
        return ""
    return "another process of this job has ended, and said why; the same command goes on"


# ----------------------------------------------------------------------------------------------------
# ranks: torchrun's, those that a stage forks, or one process, through the same code

class Ranks(NamedTuple):
    rank: int
    world: int
    device: torch.device


def start_ranks(device: str | None = None) -> Ranks:
    """Joins torchrun's process group or makes one, on a CPU of $RANKS processes. device None: a GPU if there
    is one."""
    device = checked(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    patience = timedelta(hours=12)  # ranks that share out clips may be done hours apart
    try:
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=patience)
        else:
            count = ranks_wanted() if device == "cpu" else 1
            rank, store = forked.fork(count) if count > 1 else (0, dist.HashStore())
            dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=count)
        dist.all_reduce(torch.zeros(1))  # one that ended early would break those that still connect
    except (ValueError, dist.DistError) as error:
        raise UserError(f"cannot join the other processes: {first_line(error)}\nstart with torchrun, or "
                        "unset RANK") from error
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device(device))


def checked(device: str) -> str:
    """A --device that is there; of several GPUs this rank's."""
    if not device.startswith("cuda"):
        return device
    if not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no CUDA device here; use --device cpu")
    number = int(device.partition(":")[2] or os.environ.get("LOCAL_RANK", 0))
    if number >= torch.cuda.device_count():
        raise UserError(f"there is no cuda:{number}: torch sees {torch.cuda.device_count()} GPUs here")
    return f"cuda:{number}"


def ranks_wanted() -> int:
    value = os.environ.get("RANKS", "1")
    if not re.fullmatch("[1-9][0-9]{0,3}", value):
        raise UserError(f"RANKS={value}: give the number of processes to run on this CPU")
    return int(value)


def for_device(cfg, device: torch.device):
    """The Config with the defaults that depend on the device. On a GPU: bfloat16, and compiled blocks."""
    gpu = device.type != "cpu"
    defaults = {"dtype": "bfloat16" if gpu else "float32", "compile": gpu, "recompute": gpu}
    open_flags = {name for name in defaults if getattr(cfg, name, "absent") is None}
    return dataclasses.replace(cfg, **{name: defaults[name] for name in open_flags})


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 products a second, by the maker's word, of the GPUs we know."""
    peaks = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for known, peak in peaks.items() if known in name), None)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def memory_used(device: torch.device) -> float:
    """GB at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def print0(*args):
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*args, flush=True)


def progress(total: int, what: str, ranks: Ranks):
    """A bar on rank 0, whose share stands for all."""
    hidden = None if ranks.rank == 0 else True  # None: unless somebody watches
    return tqdm(total=total, desc=what, unit=" " + what, dynamic_ncols=True, disable=hidden)


def share_of(ranks: Ranks) -> str:
    """Says whose work a count is, behind the count, where there are several ranks."""
    return f" on this rank, the first of {ranks.world}" if ranks.world > 1 else ""


def lead(ranks: Ranks, function):
    """Calls function() on rank 0 while the others wait. An error ends them all, and rank 0 says it."""
    error = None
    if ranks.rank == 0:
        try:
            function()
        except (UserError, OSError) as problem:
            error = problem
    failed = [error is not None]
    dist.broadcast_object_list(failed)
    if error:
        raise error
    if failed[0]:
        sys.exit(2)


def own(folder, what: str, ranks: Ranks):
    """Makes a folder this job's to write in; files.own says what it refuses."""
    lead(ranks, lambda: files.own(folder, what))


def batched(items: list, size: int) -> list[list]:
    return [items[first:first + size] for first in range(0, len(items), size)]


def my_share(batches: list[list], ranks: Ranks, done: Callable) -> list[list]:
    """This rank's batches with anything left to do. They are made again as a whole: how a sample is rounded
    may depend on what shares its batch, so that must depend on its place alone, never on what is left."""
    return [batch for batch in batches[ranks.rank::ranks.world] if not all(map(done, batch))]


def gathered(part: list, ranks: Ranks) -> list:
    """The lists of all ranks, one after another, on every rank."""
    parts = [None] * ranks.world
    dist.all_gather_object(parts, part)
    return list(itertools.chain.from_iterable(parts))


def ahead(function, items, workers: int = 2):
    """(item, function(item)) in order, computed by threads a few items ahead of whoever asks."""
    with ThreadPoolExecutor(workers) as pool:
        items = iter(items)
        waiting = deque((item, pool.submit(function, item)) for item in itertools.islice(items, 2 * workers))
        while waiting:
            item, result = waiting.popleft()
            waiting.extend((new, pool.submit(function, new)) for new in itertools.islice(items, 1))
            yield item, result.result()


# ----------------------------------------------------------------------------------------------------
# seeds: randomness is a function of names, never of rank, batch or what was drawn before

def seed_of(*names) -> int:
    """A 63-bit seed from any names: seed_of(0, "noise", clip_id, chunk)."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "little") >> 1


def rng(*names) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*names))


# ----------------------------------------------------------------------------------------------------
# files: each appears whole or not at all

def claim(file, recipe: dict, **about) -> bool:
    """file says how all in its folder is made: writes it (and, for people, about), or refuses a folder that
    was begun by another recipe. True: it was begun before."""
    file = Path(file)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, as_json(recipe | about, indent=1) + "\n")
        return False
    before = records.read(file)
    for key, value in recipe.items():
        if before.get(key) != value:
            raise UserError(f"{file.parent} was begun with {key} = {before.get(key)!s:.400}, not {value}; "
                            "choose another --out, or remove it")
    return True


def checksum(*tensors: torch.Tensor) -> int:
    """Of the bytes of tensors in the CPU's memory, at a few GB a second."""
    crc = 0
    for x in tensors:
        crc = zlib.crc32(x.contiguous().flatten().view(torch.uint8).numpy(), crc)
    return crc


def crc32(file) -> int:
    """A checksum of all bytes of a file."""
    crc = 0
    with open(file, "rb") as f:
        while piece := f.read(2**22):
            crc = zlib.crc32(piece, crc)
    return crc


def fingerprint(*files) -> str:
    """Which files these are, by all their bytes."""
    return hashlib.sha256(" ".join(map(digest_of, files)).encode()).hexdigest()[:16]


LARGE = 2**26  # bytes of a file that is read only once


def digest_of(file) -> str:
    """SHA-256. That of a large file is remembered in ~/.cache/bagger by its path, size and time."""
    with open(file, "rb") as f:
        stat = os.fstat(f.fileno())
        if stat.st_size < LARGE:
            return hashlib.file_digest(f, "sha256").hexdigest()
        key = f"{os.path.realpath(file)} {stat.st_size} {stat.st_mtime_ns}"
        name = hashlib.sha256(os.fsencode(key)).hexdigest()
        kept = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "bagger", name)
        with contextlib.suppress(OSError, ValueError):
            if re.fullmatch("[0-9a-f]{64}", text := kept.read_text()):
                return text
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # a home that cannot be written to costs time only
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, digest)
    return digest


# how a safetensors file calls what we store, in the order in which it keeps them: the widest first
DTYPES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16",
          torch.float16: "F16", torch.uint8: "U8"}
READABLE = {name: dtype for dtype, name in DTYPES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "BOOL": torch.bool}


def save_tensors(path, tensors: dict[str, torch.Tensor], entries: dict[str, str] | None = None, **metadata):
    """A safetensors file, a tensor at a time and byte for byte as the library's, whose own writer leaves
    temporary files of unknown names when it is killed. Metadata is one JSON entry; entries: for other
    programs, further ones."""
    names = sorted(tensors, key=lambda name: (list(DTYPES).index(tensors[name].dtype), name))
    about = {"json": as_json(metadata)} | (entries or {})
    header, end = {"__metadata__": about}, 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [begin, end]}
    text = as_json(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            f.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def neighbour(path, kind: str, flag: str, later: int = 0) -> str:
    """The folder of another kind beside path, of the same round or a later one: run/agg_1 -> run/model_1."""
    number = round_of(path)
    if number is None:
        raise UserError(f"{path} does not end in a round's number, as agg_1 does; give --{flag} DIR")
    return str(Path(path).with_name(f"{kind}_{number + later}"))


def round_of(path) -> int | None:
    number = re.fullmatch(r"\w+_(\d+)", Path(path).name)
    return int(number[1]) if number else None


# ----------------------------------------------------------------------------------------------------
# weights: any checkpoint as {name: Stored}, read a tensor at a time into a module built on the meta device

class Stored(NamedTuple):
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    dtype: torch.dtype | None = None  # on disk


def weight_files(folder, stem: str) -> list[Path]:
    """stem.safetensors, or the shards that stem.safetensors.index.json names, or nothing. Without them a
    variant of diffusers': stem.fp16.safetensors, or stem.safetensors.index.fp16.json."""
    folder = Path(folder)
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    present = [folder / name for name in (index, single) if (folder / name).exists()][:1]
    present = present or [*folder.glob(f"{stem}.safetensors.index.*.json")] or [
        file for file in folder.glob(f"{stem}.*.safetensors") if not re.search(r"-of-\d+", file.name)]
    if len(present) > 1:
        names = ", ".join(sorted(file.name for file in present))
        raise UserError(f"{folder} holds several variants: {names}\ngive the file to use, or add {single}")
    if not present or present[0].suffix == ".safetensors":
        return present
    (index,) = present
    shards = records.read(index, {"weight_map": dict})["weight_map"]
    names = {name for name in shards.values() if records.fits(name, Path) and Path(name).name == name}
    if not names or len(names) < len(set(map(str, shards.values()))):
        raise UserError(f"{index} names no shards, or some outside its folder, in its weight_map")
    files = [folder / name for name in sorted(names)]
    for file in files:
        if not file.exists():
            raise UserError(f"{file} is missing; {index.name} lists {len(files)} shards. Download it again.")
    return files


def open_weights(*files) -> tuple[dict, dict]:
    """({name: Stored}, metadata) of safetensors, .pth or .pt files. Nothing is read before Stored.read().
    A .pt that holds nested dictionaries (a training checkpoint) keeps them: {"generator": {name: Stored}}."""
    weights, metadata = {}, {}
    for file in map(Path, files):
        if not file.is_file():  # of a pipe one would wait forever
            raise UserError(f"no such file: {file}")
        with open(file, "rb") as f:
            head = f.read(9)
        if head.startswith(b"GGUF"):
            raise UserError(f"{file} is a GGUF file, quantised for other programs; give the same model as "
                            ".safetensors, in fp16, bf16 or scaled fp8")
        try:
            # by its content too: in Hugging Face's cache, what names link to has no suffix
            if file.suffix in (".safetensors", ".sft") or head[8:] == b"{":
                with safe_open(file, "pt") as f:
                    metadata |= records.parse((f.metadata() or {}).get("json", "{}"), f"{file}: its metadata")
                    for k in f.keys():
                        part = f.get_slice(k)
                        weights[k] = Stored(tuple(part.get_shape()), Reader(file, k),
                                            READABLE.get(part.get_dtype()))
            else:  # only zip archives, the format since torch 1.6, can be mapped
                weights |= as_stored(torch.load(file, map_location="cpu", weights_only=True,
                                                mmap=zipfile.is_zipfile(file)))
        except UserError:
            raise
        except (SafetensorError, RuntimeError, OSError, EOFError, TypeError) as error:
            raise UserError(f"{file} is truncated, corrupt or no checkpoint: {first_line(error)}") from None
        except Exception as error:  # torch raises pickle.UnpicklingError, a bare Exception, for both reasons
            raise UserError(f"{file} is corrupt, or holds more than tensors, such as code, which is not run; "
                            f"give a .safetensors ({type(error).__name__})") from None
    if any(len(str(name)) > 300 for name in weights):
        raise UserError(f"{file} is no checkpoint: a tensor has a name of more than 300 characters")
    return weights, metadata


class Reader(NamedTuple):
    """Opening the file anew for every tensor lets go of its mapped pages; they would pile up in memory."""
    file: Path
    name: str

    def __call__(self):
        with safe_open(self.file, "pt") as f:
            return f.get_tensor(self.name)


def as_stored(values: dict) -> dict:
    return {k: Stored(tuple(v.shape), lambda v=v: v, v.dtype) if isinstance(v, torch.Tensor) else
            as_stored(v) if isinstance(v, dict) else v for k, v in values.items()}


def first_line(error) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def check_finite(x: torch.Tensor, what: str):
    """Refuses nan and infinity. The CPU waits for x here: not for steps of a solver, nor of a training."""
    if x.is_floating_point() and x.numel():
        if not torch.stack(x.detach().aminmax()).isfinite().all():  # NaN passes through min and max
            raise UserError(f"{what}: NaN or infinite values; mend what made them")


def fill(module: torch.nn.Module, weights: dict[str, Stored], device, what: str) -> torch.nn.Module:
    """Put weights into a module built on the meta device, each straight into its parameter's dtype.
    All that does not fit is listed, and nothing is loaded then."""
    wanted = module.state_dict()
    wrong = [f"missing: {k} {tuple(v.shape)}" for k, v in wanted.items() if k not in weights]
    wrong += [f"unexpected: {k} {getattr(v, 'shape', '')}" for k, v in weights.items() if k not in wanted]
    wrong += [f"misshapen: {k} is {weights[k].shape}, must be {tuple(v.shape)}" for k, v in wanted.items()
              if k in weights and weights[k].shape != tuple(v.shape)]
    if wrong:
        shown = wrong[:20] + [f"... and {len(wrong) - 20} more"] * (len(wrong) > 20)
        raise UserError(f"{what} does not fit, {len(wrong)} tensors are wrong:\n  " + "\n  ".join(shown))
    loaded = {k: weights[k].read().to(device=device, dtype=v.dtype) for k, v in wanted.items()}
    module.load_state_dict(loaded, assign=True)
    return module.eval()
