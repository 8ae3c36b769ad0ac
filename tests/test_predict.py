"""predict.py against what a CPU shows: memory as the allocator counts it, FLOPs by hand."""

import gc
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import common
import diffusion
import model
import plan
import predict
import train_df

TOY = model.Config(dim=128, ffn_dim=512, num_heads=4, num_layers=4, text_dim=64, text_len=32)
WIDE = model.Config(num_layers=1)  # of 1.3B


def most_held(run, held: int) -> int:
    """Bytes, by the allocator's own events, when `held` are there before it runs."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    most = now = held
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def agree(predicted, measured):
    off = predicted / measured - 1
    print(f"predicted {predicted / 1e6:,.1f} MB, measured {measured / 1e6:,.1f} MB: {off:+.1%}")
    assert abs(off) < 0.15


@pytest.mark.parametrize("config,shape,flags", [
    (TOY, (21, 16, 4, 4), dict(batch=16, micro=16)),
    (TOY, (21, 16, 4, 4), dict(batch=16, micro=8, ema=0.9, recompute=True)),
    (TOY, (21, 16, 4, 4), dict(batch=4, micro=4, mode="tf")),
    (WIDE, (6, 16, 16, 26), dict(batch=1, micro=1)),
    (WIDE, (6, 16, 16, 26), dict(batch=2, micro=1, lora_rank=16, recompute=True))])
def test_memory_of_a_training_step(config, shape, flags):
    ranks = common.Ranks(0, 1, torch.device("cpu"))
    cfg = common.for_device(train_df.Config("", **flags), ranks.device)
    predicted = plan.training(cfg, config, shape, 1, "cpu").peak
    net = train_df.set_up(cfg, model.WanModel(config, *train_df.formats(cfg)), ranks)
    batch = plan.fake_batch(cfg, config, shape)
    state = train_df.new_state(cfg, net, batch.sizes, ranks)
    held = sum(p.nbytes for p in net.parameters()) + sum(
        p.nbytes * (2 + (cfg.ema > 0)) for p in state.weights.values())
    assert predicted["weights"] + predicted["moments"] == pytest.approx(held, rel=1e-3)
    micro = iter([(0, batch)] * 2)
    measured = most_held(lambda: train_df.train_step(cfg, state, micro, 0, ranks), held)
    agree(predicted["all"], measured)
    agree(predicted["all"] - held, measured - held)


@pytest.mark.parametrize("config,shape", [(TOY, (21, 16, 8, 8)), (WIDE, (9, 16, 16, 26))])
def test_memory_of_a_rollout(config, shape):
    def generate(net, device):
        text = [torch.zeros(5, config.text_dim, device=device)]
        sampling = diffusion.Sampling(1)
        context = torch.zeros(1, 3, *shape[1:], device=device)
        list(diffusion.generate(net, text, text[0], sampling, shape=shape[1:], frames=shape[0],
                                window=shape[0], keep=3, context=context))

    with predict.faked("cpu") as device:
        net = predict.network(lambda: model.WanModel(config), device)
        with predict.Tracker(device, weights=net.parameters()) as tracker:
            generate(net, device)
    predicted = tracker.peak()
    net = model.WanModel(config)
    measured = most_held(lambda: generate(net, "cpu"), sum(p.nbytes for p in net.parameters()))
    agree(predicted["all"], measured)
    agree(predicted["all"] - predicted["weights"], measured - predicted["weights"])


def test_flops_are_those_of_the_layout():
    shape = (21, 16, 16, 26)
    layout = model.causal_layout((3,) * 7, 104)
    with predict.faked("cpu") as device:
        net = predict.network(lambda: model.WanModel(TOY), device)
        text = torch.zeros(1, 5, TOY.text_dim)
        with predict.Tracker(device) as tracker:
            net(torch.zeros(1, *shape), torch.zeros(1, 21), text)
    flops = sum(work.flops for work in tracker.work)
    assert flops == pytest.approx(model.forward_flops(TOY, layout), rel=0.01)


def test_layers_are_alike():
    """What 3 and 4 layers tell is what 5 of them take."""
    cfg = train_df.Config("", batch=1, micro=1, dtype="float32", compile=False, recompute=True)
    deep = replace(TOY, num_layers=5)
    told = plan.training(cfg, deep, (6, 16, 16, 26), 1, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "at_depth", lambda measure, layers: measure(layers))
        whole = plan.training(cfg, deep, (6, 16, 16, 26), 1, "cpu")
    assert told.peak == whole.peak
    rate = predict.GPUS["h100"]
    assert predict.seconds(told, rate) == pytest.approx(predict.seconds(whole, rate))
