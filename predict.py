"""What a GPU needs for a piece of work, found without one: memory, FLOPs, bytes moved, seconds.

The work's own code runs on fake tensors, which have shapes but no numbers, so it takes no memory and little
time. Every operation passes through a Tracker, which keeps account of storages as they come and go.

    with predict.faked() as device:                        # or faked("cpu")
        net = model.WanModel(config).to(device)
        with predict.Tracker(device) as tracker:
            tracker.label("weights", net.parameters())
            net(x, t, text)
    print(tracker.peak(), tracker.seconds(predict.GPUS["h100"]))

What it cannot know: how a kernel behaves inside, how an allocator fragments, what overlaps with what.
"""

import contextlib
import math
import types
import weakref
from collections import Counter
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import common
import model
import routing
import vae


class GPU(NamedTuple):
    """What is assumed of a GPU. Rates are what good kernels reach, not what makers promise."""
    memory: float  # bytes
    matmul: float  # FLOP/s of matrix products in bf16
    attention: float  # FLOP/s of attention kernels in bf16
    conv: float  # FLOP/s of convolutions in bf16
    fp32: float  # FLOP/s of matrix products in fp32
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s, to GPUs of the same machine
    net: float  # bytes/s, to those of other machines


# 65, 35 and 30 % of the makers' dense bf16 rates, 80 % of their bandwidths, 70 % of NVLink and PCIe
def rated(memory, bf16, fp32, bandwidth, link, net):
    return GPU(memory * 1e9, .65 * bf16 * 1e12, .35 * bf16 * 1e12, .3 * bf16 * 1e12, .65 * fp32 * 1e12,
               .8 * bandwidth * 1e9, .7 * link * 1e9, .7 * net * 1e9)


GPUS = {"h100": rated(80, 989, 67, 3350, 450, 50), "h200": rated(141, 989, 67, 4800, 450, 50),
        "a100": rated(80, 312, 19.5, 2039, 300, 25), "4090": rated(24, 165, 82.6, 1008, 32, 12.5)}


# ----------------------------------------------------------------------------------------------------
# fake tensors, on the CPU or on a device of our own

def fake_gpu() -> torch.device:
    """A device that is not the CPU and that autograd and FSDP work on, though no driver is here: the one that
    torch keeps for backends that it does not know."""
    if not hasattr(torch, "gpu"):
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as register
        module = types.ModuleType("torch.gpu")
        vars(module).update({k: v for k, v in vars(torch.cpu).items() if not k.startswith("__")})
        module.get_amp_supported_dtype = lambda: [torch.bfloat16]
        module.current_device = lambda: 0
        register("gpu", module)
    return torch.device("gpu", 0)


class Fake(FakeTensorMode):
    avoid_device_init = True  # also torch.tensor([...], device=...) is to be fake from the start


TABLES = (model.rope_table, model.block_mask, routing.keys_of_chunks)  # they keep tensors from call to call


@contextlib.contextmanager
def faked(device=None):
    """Tensors made inside are fake. Attention is a stand-in for a GPU's kernels, and nobody asks whether
    numbers are finite."""
    device = torch.device(device) if device else fake_gpu()
    make_mask = model.block_mask

    def block_mask(layout, device):
        mask = make_mask(layout, device)
        mask.pairs = sum((last - first) * (past + last - first) for first, last, past in layout)
        return mask

    stand_ins = ((model, "block_mask", block_mask), (model, "compiled_flex", lambda: flex),
                 (F, "scaled_dot_product_attention", sdpa),
                 (common, "check_finite", pass_by), (vae, "check_finite", pass_by))
    before = [getattr(module, name) for module, name, _ in stand_ins]
    for table in TABLES:
        table.cache_clear()
    try:
        for module, name, stand_in in stand_ins:
            setattr(module, name, stand_in)
        with Fake():
            yield device
    finally:
        for (module, name, _), original in zip(stand_ins, before, strict=True):
            setattr(module, name, original)
        for table in TABLES:
            table.cache_clear()


def pass_by(x, what):
    pass


def network(build, device, dtype=torch.float32):
    """A network of fake weights, frozen."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with device:
            return build().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def one_of(world: int):
    """A process group of so many ranks, of which the others are imagined."""
    if world == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore
    before = dist.device_mesh.init_device_mesh

    def init_device_mesh(*given):  # it looks at numbers of its own
        with unset_fake_temporarily():
            return before(*given)

    dist.init_process_group("gpu:fake,cpu:fake", store=FakeStore(), rank=0, world_size=world)
    dist.group.WORLD._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)  # else torch warns
    try:
        dist.device_mesh.init_device_mesh = init_device_mesh
        yield
    finally:
        dist.device_mesh.init_device_mesh = before
        dist.destroy_process_group()


@torch.library.custom_op("predict::attention", mutates_args=())
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pairs: int) -> list[torch.Tensor]:
    """Attention of q [B, N, L, D] as fused kernels compute it: besides the output, a logarithm for each row
    is kept for the backward pass. pairs: how many pairs of tokens attend in a head."""
    raise NotImplementedError("there are no numbers to compute with")


@attend.register_fake
def _(q, k, v, pairs):
    assert q.dtype == k.dtype == v.dtype and q.device == k.device == v.device, "of one kind and place"
    assert q.shape[:2] == k.shape[:2] == v.shape[:2] and k.shape[2] == v.shape[2], "of one shape"
    return [torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)]


@torch.library.custom_op("predict::attention_backward", mutates_args=())
def attend_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor,
                    rows: torch.Tensor, pairs: int) -> list[torch.Tensor]:
    raise NotImplementedError("there are no numbers to compute with")


@attend_backward.register_fake
def _(grad, q, k, v, y, rows, pairs):
    return [torch.empty_like(x) for x in (q, k, v, rows)]  # the last: a sum for each row, for want of another


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.pairs = inputs[3]


def differentiate(ctx, grads):
    return *attend_backward(grads[0], *ctx.saved_tensors, ctx.pairs)[:3], None


attend.register_autograd(differentiate, setup_context=keep)


def flex(q, k, v, block_mask):
    """In place of flex_attention: checks what the kernel would take, and counts pairs by the layout."""
    for x in tree_leaves([block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.full_kv_num_blocks,
                          block_mask.full_kv_indices]):
        assert x.device == q.device, "the mask is where the queries are"
    assert block_mask.seq_lengths == (q.shape[2], k.shape[2]), "the mask is for other lengths"
    index = torch.zeros(1, dtype=torch.int32, device=q.device)
    assert block_mask.mask_mod(index, index, index, index).device == q.device
    return attend(q, k, v, getattr(block_mask, "pairs", q.shape[2] * k.shape[2]))[0]


def sdpa(q, k, v, attn_mask=None, scale=None):
    """In place of F.scaled_dot_product_attention."""
    return attend(q, k, v, q.shape[2] * k.shape[2])[0]


# ----------------------------------------------------------------------------------------------------
# the account

KINDS = ("weights", "gradients", "moments", "gathered", "cache", "activations", "temporaries")
GATHER = ("fsdp::all_gather_copy_in", "c10d::_allgather_base_", "fsdp::split_with_sizes_copy")
REDUCE = ("fsdp::chunk_cat", "c10d::_reduce_scatter_base_")
MOVED = {  # bytes that a rank sends for each byte of the whole tensor, among n ranks
    "c10d::_allgather_base_": lambda n: (n - 1) / n, "c10d::_reduce_scatter_base_": lambda n: (n - 1) / n,
    "c10d::allreduce_": lambda n: 2 * (n - 1) / n}


class Work(NamedTuple):
    kind: str  # matmul, attention, conv, fp32, memory, network or optimizer
    flops: float
    bytes: float  # read and written; for network: sent


class Tracker(TorchDispatchMode):
    """Keeps account of what each operation allocates, frees, computes and moves on a device. fused: chains of
    elementwise operations and norms are compiled, and only what goes in and comes out is moved."""

    def __init__(self, device, fused=False, weights=()):
        super().__init__()
        self.device = torch.device(device)
        self.weights = list(weights)
        self.fused = fused
        self.live = {}  # address of a storage -> its number
        self.events = []  # (number, bytes), negative where memory is freed
        self.kinds = {}  # number -> what it holds, where that is known
        self.chained = set()  # numbers of storages that a fused chain need not write
        self.work = []
        self.backward = False

    def __enter__(self):
        self.resize = torch.UntypedStorage.resize_

        def resize(storage, size):
            self.free(storage._cdata)
            result = self.resize(storage, size)
            self.count_in(storage)
            return result
        torch.UntypedStorage.resize_ = resize
        self.label("weights", self.weights)
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    # memory

    def storages(self, tensors) -> list[torch.UntypedStorage]:
        local = [getattr(x, "_local_tensor", x) for x in tree_leaves(tensors) if isinstance(x, torch.Tensor)]
        return [x.untyped_storage() for x in local if x.device == self.device]

    def count_in(self, storage) -> bool:
        """Whether the storage is new."""
        if storage._cdata in self.live or not storage.nbytes():
            return False
        number = self.live[storage._cdata] = len(self.events)
        self.events.append((number, storage.nbytes()))
        weakref.finalize(storage, self.free, storage._cdata, number).atexit = False
        return True

    def free(self, address, number=None):
        known = self.live.get(address)
        if known is not None and number in (None, known):
            del self.live[address]
            self.events.append((known, -self.events[known][1]))

    def label(self, kind: str, tensors):
        for storage in self.storages(list(tensors)):
            self.count_in(storage)
            if storage._cdata in self.live:
                self.kinds[self.live[storage._cdata]] = kind

    def prediction(self) -> "Prediction":
        return Prediction(self.peak(), [(1, self.work)])

    def peak(self) -> dict[str, int]:
        """Bytes by kind when most was held, and their sum under "all"."""
        held = most = at = 0
        for i, (_, size) in enumerate(self.events):
            held += size
            if held > most:
                most, at = held, i
        left = {}
        for number, size in self.events[:at + 1]:
            left[number] = left.get(number, 0) + size
        split = Counter()
        for number, size in left.items():
            split[self.kinds.get(number, "temporaries")] += size
        return {kind: split[kind] for kind in KINDS} | {"all": most}

    # work

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = self.storages([args, kwargs])
        made = self.storages(out)
        name = func.name().split(".")[0]
        if not self.backward and torch._C._current_graph_task_id() >= 0:
            self.backward = True
            for number in self.live.values():
                self.kinds.setdefault(number, "activations")
        elif self.backward and torch._C._current_graph_task_id() < 0:
            self.backward = False
            self.label("gradients", [p.grad for p in self.weights])
        for storage in given:  # made before the account was opened
            self.count_in(storage)
        new = [storage for storage in made if self.count_in(storage)]
        for kind, names in (("gathered", GATHER), ("gradients", REDUCE)):
            if name in names:
                for storage in given + made:
                    if storage._cdata in self.live:
                        self.kinds.setdefault(self.live[storage._cdata], kind)
        if (work := self.work_of(func, name, args, kwargs, out, given, new)):
            self.work.append(work)
        return out

    def work_of(self, func, name, args, kwargs, out, given, new) -> Work | None:
        if name in MOVED:
            group = next(x for x in args if isinstance(x, torch.ScriptObject))
            ranks = dist.ProcessGroup.unbox(group).size()
            return Work("network", 0, MOVED[name](ranks) * max(storage.nbytes() for storage in given))
        tensors = [x for x in tree_leaves([args, kwargs, out]) if isinstance(x, torch.Tensor)]
        if not any(x.device == self.device for x in tensors):
            return None
        moved = sum(x.nbytes for x in tensors if x.device == self.device)
        if name.startswith(("aten::_foreach", "aten::_fused_adam")):
            return Work("optimizer", 0, moved)
        if name.startswith("predict::attention"):
            q, k, _ = tensors[:3] if name == "predict::attention" else tensors[1:4]
            passes = 2 if name == "predict::attention" else 5  # products of L x L x D, the scores' again
            kind = "fp32" if q.dtype == torch.float32 else "attention"
            return Work(kind, passes * 2 * q.shape[0] * q.shape[1] * q.shape[3] * args[-1], moved)
        if count := flop_registry.get(func._overloadpacket):
            kind = "conv" if "convolution" in name else "matmul"
            if tensors[0].dtype == torch.float32:
                kind = "fp32"
            return Work(kind, count(*args, **kwargs, out_val=out), moved + self.written(given))
        if not new and not func._schema.is_mutable:  # a view
            return None
        if not self.fused:
            return Work("memory", 0, moved)
        numbers = {self.live.get(storage._cdata) for storage in given} - self.chained
        read = sum(self.events[number][1] for number in numbers if number is not None)
        self.chained |= {self.live[storage._cdata] for storage in new}
        return Work("memory", 0, read)

    def written(self, given) -> float:
        """Bytes that a chain has to write after all, since this is read by something else."""
        numbers = {self.live.get(storage._cdata) for storage in given} & self.chained
        self.chained -= numbers
        return sum(self.events[number][1] for number in numbers)

class Prediction(NamedTuple):
    peak: dict[str, float]  # bytes by kind, when most was held, and under "all"
    work: list[tuple[float, list[Work]]]  # with how often it is done


def along(measure, n: int, low: int) -> Prediction:
    """measure(n), where each unit from `low` on takes as much as any other, as layers and solver steps do."""
    if n <= low + 1:
        return measure(n)
    one, two = measure(low), measure(low + 1)
    more = n - low
    peak = {kind: size + more * (two.peak[kind] - size) for kind, size in one.peak.items()}
    return Prediction(peak, [(times * (1 - more), work) for times, work in one.work]
                      + [(times * more, work) for times, work in two.work])


def at_depth(measure, layers: int) -> Prediction:
    return along(measure, layers, 3)  # of 2 layers, all would be gathered at once


def together(*parts: Prediction) -> Prediction:
    """One after another, each in memory by itself."""
    return Prediction(max((part.peak for part in parts), key=lambda peak: peak["all"]),
                      [times for part in parts for times in part.work])


def seconds(prediction: Prediction, gpu: GPU, nodes: int = 1) -> dict[str, float]:
    """By the roofline: what computing, memory and network would take by themselves, and all together. An
    operation takes as long as the slower of its computing and its memory; the network runs beside them."""
    rates = {"matmul": gpu.matmul, "attention": gpu.attention, "conv": gpu.conv, "fp32": gpu.fp32}
    total = Counter()
    for times, work in prediction.work:
        for kind, flops, moved in work:
            if kind == "network":
                total["network"] += times * moved / (gpu.link if nodes == 1 else gpu.net)
                continue
            computing, moving = flops / rates.get(kind, math.inf), moved / gpu.bandwidth
            total["compute"] += times * computing
            total["memory"] += times * moving
            total["both"] += times * max(computing, moving)
    return {kind: total[kind] for kind in ("compute", "memory", "network")} | {
        "all": max(total["both"], total["network"])}


def as_text(peak: dict[str, float]) -> str:
    parts = [f"{kind} {size / 1e9:.1f}" for kind, size in peak.items() if kind != "all" and size >= 5e7]
    return f"{peak['all'] / 1e9:.1f} GB: {', '.join(parts)}"
