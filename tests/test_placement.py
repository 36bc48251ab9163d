"""Placements and streaming: where weights lie changes nothing, and memory that runs out leads to a smaller plan."""

from dataclasses import replace

import pytest
import torch
from test_fused_unet import CONFIGS, inputs, make, step
from tiny_sv3d import FRAMES, config

from sv3d_fast import planned as planned_module
from sv3d_fast.camera import Orbit
from sv3d_fast.events import Progress, Warned, finish
from sv3d_fast.generation import generating
from sv3d_fast.memory import PLACEMENTS, BudgetError, Plan, Shape, candidates, plan
from sv3d_fast.model.clip import CLIPImageTower
from sv3d_fast.model.fused_unet import FusedUNet
from sv3d_fast.model.unet import SV3DUNet
from sv3d_fast.model.vae import SV3DVAE
from sv3d_fast.model.weights import SV3DModel
from sv3d_fast.offload import packed
from sv3d_fast.placement import leave, place
from sv3d_fast.planned import budget_of, check_budget, planned
from sv3d_fast.prediction import fused, why_not_fused
from sv3d_fast.streaming import SLOTS, WeightStream, slot_size, streamable

SIZE, CPU = 32, torch.device("cpu")
SAMPLING = replace(config().sampler, sigma_max=80.0)
SHAPE = Shape(SIZE, FRAMES, steps=SAMPLING.steps, unet=torch.float32, tower=torch.float32)

pytestmark = pytest.mark.usefixtures("one_thread")


def make_model():
    torch.manual_seed(0)
    c = config()
    parts = SV3DUNet(c.unet), SV3DVAE(c.vae), CLIPImageTower(c.clip)
    return SV3DModel(c, *(part.requires_grad_(False).eval() for part in parts))


def plan_of(placement) -> Plan:
    return next(p for p in candidates(config(), SHAPE, 3) if p.placement == placement)


def made(model, plan=None):
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return finish(generating(model, image, [Orbit.static(5.0, FRAMES)], SAMPLING, [0], chunk=3, plan=plan))


def values(model):
    networks = (model.unet, model.vae, model.image_encoder)
    return [tensor.clone() for network in networks for tensor in network.state_dict().values()]


def test_a_piece_of_memory_holds_every_tensor_as_it_was():
    conv = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    tensors = [conv.weight, conv.bias, torch.arange(3), torch.tensor(2.5, dtype=torch.float16), torch.empty(0)]
    before = [tensor.clone() for tensor in tensors]
    homes = [tensor.data_ptr() for tensor in tensors]
    with torch.no_grad(), packed(tensors, CPU):
        pieces = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        assert len(pieces) == 1
        assert all(torch.equal(tensor, value) for tensor, value in zip(tensors, before, strict=True))
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
        conv.weight.zero_()
    assert [tensor.data_ptr() for tensor in tensors] == homes
    assert torch.equal(conv.weight, before[0])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("b", "t", "h", "w"), [(1, 5, 8, 12), (2, 3, 4, 4)])
def test_streaming_gives_the_same_bits(config, b, t, h, w):
    network = FusedUNet(make(config, torch.float32))
    noisy, image, context, vector = inputs(config, b, 2, t, h, w, torch.float32)
    run = network.prepare([0.3, -0.7], context, vector, image)
    expected = [step(network, run, index, noisy) for index in (0, 1)]
    blocks = streamable(network)
    homes = [tensor.data_ptr() for _, tensors in blocks for tensor in tensors]
    weights = sum(tensor.nbytes for _, tensors in blocks for tensor in tensors)
    assert len(blocks) > 4
    stream = WeightStream(network, blocks, CPU)
    try:
        pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, ts in blocks for t in ts}
        assert sum(pieces.values()) == SLOTS * slot_size(blocks) < weights
        again = network.prepare([0.3, -0.7], context, vector, image)  # reads none of what is on its way
        for piece in [ts[0] for _, ts in blocks]:
            piece.untyped_storage().fill_(255)  # not a number: what a step reads has to arrive in it
        for index in (1, 0, 1):
            assert torch.equal(step(network, again, index, noisy), expected[index])
    finally:
        stream.close()
    assert [tensor.data_ptr() for _, tensors in blocks for tensor in tensors] == homes
    assert torch.equal(step(network, run, 0, noisy), expected[0])


def test_a_block_runs_on_what_arrived_last():
    """The slots turn: a block whose weights were not fetched anew would run on another's."""
    network = FusedUNet(make(CONFIGS["p, two levels"], torch.float32))
    blocks = streamable(network)
    seen = []
    for block, tensors in blocks:
        home = tensors[0].clone()
        block.register_forward_pre_hook(lambda *_, t=tensors[0], h=home: seen.append(torch.equal(t, h)))
    noisy, image, context, vector = inputs(CONFIGS["p, two levels"], 1, 1, 2, 4, 4, torch.float32)
    run = network.prepare([0.3], context, vector, image)
    stream = WeightStream(network, blocks, CPU)
    for block, _ in blocks:  # behind the stream's own hooks
        block._forward_pre_hooks.move_to_end(next(iter(block._forward_pre_hooks)))
    step(network, run, 0, noisy)
    assert seen == [True] * len(blocks)
    stream.close()
    step(network, run, 0, noisy)
    assert len(seen) == 2 * len(blocks)


def test_every_placement_makes_the_same_picture_and_leaves_no_trace():
    model = make_model()
    plain, before = made(model), values(model)
    results = []
    for placement in [*PLACEMENTS, "resident"]:
        chosen = plan_of(placement)
        place(model, chosen, CPU)
        network = fused(model.unet)
        assert why_not_fused(model.unet) == []
        place(model, chosen, CPU)
        assert fused(model.unet) is network
        results.append(made(model, chosen))
    assert all(torch.equal(result, results[0]) for result in results)
    assert int((results[0].int() - plain.int()).abs().max()) <= 1  # fused algebra, rounded
    leave(model)
    assert why_not_fused(model.unet) != []
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))
    assert torch.equal(made(model), plain)


def run_planned(model, budget=None, notes=None):
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    running = planned(
        model, image, [Orbit.static(5.0, FRAMES)], SAMPLING, [0], device=CPU, budget=budget, chunk=3,
        note=lambda **given: (notes if notes is not None else []).append(given),
    )  # fmt: skip
    events = []
    while True:
        try:
            events.append(next(running))
        except StopIteration as stop:
            return stop.value, events


def test_a_budget_chooses_the_plan_and_is_noted():
    model, notes = make_model(), []
    small = plan_of("streamed")
    result, events = run_planned(model, small.peak, notes)
    chosen = plan(config(), SHAPE, small.peak, 3)
    assert notes == [{"plan": {"budget_bytes": small.peak, **chosen.to_dict()}}]
    assert all(isinstance(event, Progress) for event in events)
    assert torch.equal(result, made(model, chosen))
    with pytest.raises(BudgetError, match="the least that works is"):
        run_planned(model, 1000)


class Failing:
    """`generating` that runs out of memory in its first `times` calls, two steps in."""

    def __init__(self, monkeypatch, times):
        self.plans = []
        monkeypatch.setattr(planned_module, "generating", self)
        self.times = times

    def __call__(self, *args, **kwargs):
        self.plans.append(kwargs["plan"])
        running = generating(*args, **kwargs)
        if len(self.plans) > self.times:
            return running
        return self.fail(running)

    def fail(self, running):
        yield next(running)
        yield next(running)
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("budgeted", [False, True])
def test_memory_that_runs_out_leads_to_a_smaller_plan_once(monkeypatch, budgeted):
    model, notes = make_model(), []
    before = values(model)
    first = plan_of("resident")
    failing = Failing(monkeypatch, 1)
    result, events = run_planned(model, first.peak if budgeted else None, notes)
    second = failing.plans[1]
    assert second.peak < first.peak
    warned = [event for event in events if isinstance(event, Warned)]
    assert [w.message for w in warned] == [f"out of memory ({first.name}); made again with less ({second.name})"]
    assert notes[-1]["plan"]["after_out_of_memory"] == first.name
    assert notes[-1]["plan"]["placement"] == second.placement
    done = [event.done for event in events if isinstance(event, Progress)]
    assert done[:4] == [1, 2, 1, 2]
    assert torch.equal(result, made(model, second))
    leave(model)
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


def test_memory_that_runs_out_twice_is_an_error(monkeypatch):
    failing = Failing(monkeypatch, 9)
    with pytest.raises(torch.OutOfMemoryError):
        run_planned(make_model())
    assert len(failing.plans) == 2
    failing = Failing(monkeypatch, 1)
    monkeypatch.setattr(planned_module, "available", lambda device: 1000)
    with pytest.raises(torch.OutOfMemoryError):
        run_planned(make_model())
    assert len(failing.plans) == 1


def test_a_budget_is_checked_before_anything_runs():
    model = make_model()
    least = min(p.peak for p in candidates(config(), replace(SHAPE, side=64), 3))
    check_budget(model, least, None, FRAMES, 3)
    for budget, side, frames in ((least - 1, None, FRAMES), (least, 256, FRAMES), (least, None, 90)):
        with pytest.raises(BudgetError, match=f"for {frames} frames of {side or 64} pixels"):
            check_budget(model, budget, side, frames, 3)


def test_a_budget_is_of_a_gpu():
    assert budget_of(None, CPU) is None
    assert budget_of("6GiB", torch.device("cuda")) == 6 * 2**30
    with pytest.raises(ValueError, match="max_memory: expected a run on a GPU"):
        budget_of("6GiB", CPU)


@pytest.mark.gpu
def test_placements_on_a_gpu_give_the_same_bits_within_what_they_promise():
    model = make_model()
    for network in (model.unet, model.image_encoder):
        network.half()
    device = torch.device("cuda")
    shape = replace(SHAPE, unet=torch.float16, tower=torch.float16)
    results = []
    for chosen in candidates(config(), shape, 1):
        leave(model)
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        place(model, chosen, device)
        results.append(made(model, chosen))
        results.append(made(model, chosen))
        # networks this small lie in segments of 20 MiB that are mostly empty, some for each stream
        assert torch.cuda.max_memory_reserved() - before <= chosen.peak + 100 * 2**20
    assert all(torch.equal(result, results[0]) for result in results)
    leave(model)
