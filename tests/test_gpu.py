"""What only a GPU can show: flex_attention and its backward, compiled blocks, bf16, memory."""

import pytest
import torch
from worlds import relative

import model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CONFIG = model.Config(dim=512, ffn_dim=1024, num_heads=4, num_layers=2, text_dim=64, text_len=32)


def wan(dtype=torch.float32, compute=None):
    net = model.WanModel(CONFIG, dtype, compute).init_weights("gpu").cuda()
    torch.nn.init.normal_(net.head.head.weight, generator=torch.Generator("cuda").manual_seed(0))
    return net


def inputs(frames=9, height=16, width=26, batch=2):  # 104 tokens a frame: nothing divides 128
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, frames, 16, height, width, generator=g)
    t = torch.tensor([900.0, 0.0, 333.25]).repeat_interleave(3)[:frames].repeat(batch, 1)
    return x.cuda(), t.cuda(), torch.randn(batch, 7, 64, generator=g).cuda()


@pytest.mark.parametrize("sizes,per_frame,teacher", [
    ((3,) * 3, 104, False), ((3,) * 7, 1560, False), ((1, 3, 3), 131, False), ((3,) * 3, 104, True),
    ((1, 3, 3, 2), 61, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_flex_attention_is_chunkwise_attention(sizes, per_frame, teacher, dtype):
    layout = (model.teacher_layout if teacher else model.causal_layout)(sizes, per_frame)
    q, k, v, out = torch.randn(4, 1, layout[-1][1], 4, 128, device="cuda", dtype=dtype)
    results = []
    for mask in (model.block_mask(layout, q.device), None):
        leaves = [z.clone().requires_grad_() for z in (q, k, v)]
        y = model.attention(*leaves, layout, mask)
        y.backward(out.flatten(2))
        results.append([y.detach(), *(z.grad for z in leaves)])
    for name, flexed, chunkwise in zip(("y", "dq", "dk", "dv"), *results, strict=True):
        assert relative(flexed, chunkwise) < (2e-2 if dtype == torch.bfloat16 else 2e-3), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_computes_what_the_cpu_computes(dtype):
    x, t, text = inputs()
    net = wan(torch.float32, dtype)
    reference = model.WanModel(CONFIG)
    reference.load_state_dict(net.state_dict())
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-3
    for kwargs in ({"chunk": 3}, {"chunk": (1, 3, 3, 2)}, {"chunk": None}, {"chunk": 3, "clean": x + 1}):
        on_cpu = {k: v.cpu() if torch.is_tensor(v) else v for k, v in kwargs.items()}
        with torch.no_grad():
            expected = reference(x.cpu(), t.cpu(), text.cpu(), **on_cpu)
            assert relative(net(x, t, text, **kwargs).cpu(), expected) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_model_is_causal(dtype):
    model.check_causal(wan(torch.float32, dtype))


def test_training_compiled_and_checkpointed():
    x, t, text = inputs()
    losses, grads = [], []
    for fast in (False, True):
        net = wan(torch.float32, torch.bfloat16)
        if fast:
            net.checkpointing = True
            net.compile_blocks()
        loss = (net(x, t, text) - x).square().mean()
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert abs(losses[0] - losses[1]) < 1e-2 * losses[0]
    assert relative(*grads) < 5e-2


def test_compiled_cached_chunks():
    x, t, text = inputs()
    net = wan(torch.bfloat16)
    with torch.inference_mode():
        expected = net(x, t, text)
        net.compile_blocks()
        cache = net.new_cache(2, 9, 16, 26)
        chunks = [net(x[:, f:f + 3], t[:, f:f + 3], text, cache=cache, start=f) for f in (0, 3, 6)]
    assert relative(torch.cat(chunks, 1), expected) < 2e-2


def test_one_cached_step_never_waits_for_the_gpu():
    x, t, text = inputs(frames=3)
    net = wan(torch.bfloat16)
    with torch.inference_mode():
        cache = net.new_cache(2, 9, 16, 26)
        net(x, t, text, cache=cache)  # tables and prompt
        torch.cuda.set_sync_debug_mode("error")
        try:
            net(x, t, text, cache=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_block_mask_needs_no_dense_mask():
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.block_mask.__wrapped__(model.teacher_layout((3,) * 7, 1560), torch.device("cuda"))
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20
