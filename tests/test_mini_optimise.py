"""The optimiser of the embedded model: its learning rate, its average of the weights, and several processes."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sv3d_fast.mini import optimise
from sv3d_fast.mini.optimise import Average, learning_rate
from sv3d_fast.mini.parallel import Workers, start_workers

pytestmark = pytest.mark.usefixtures("one_thread")


def test_average_is_the_power_function_one():
    module = torch.nn.Linear(1, 1, bias=False)
    average, values = Average(module), []
    for step in range(1, 51):
        values.append(math.sin(step) * step)
        module.weight.data.fill_(values[-1])
        average.update(module)
        if step == 1:
            assert average.module.weight.item() == pytest.approx(values[0])
    # weights of Karras et al.'s recursion, written out: (1 - beta_t) times the betas after t
    betas = [(1 - 1 / t) ** 10 for t in range(1, 51)]
    shares = [(1 - betas[i]) * math.prod(betas[i + 1 :]) for i in range(50)]
    assert math.fsum(shares) == pytest.approx(1)
    assert sum(shares[-10:]) > 0.85  # the last fifth has most of it
    assert average.module.weight.item() == pytest.approx(float(np.dot(shares, values)), rel=1e-4)
    assert not average.module.weight.requires_grad


def test_learning_rate_warms_up_and_cools_down():
    assert learning_rate(1.0, 0, 0.0) == pytest.approx(1 / optimise.WARMUP)
    assert learning_rate(2.0, optimise.WARMUP, 0.5) == 2.0
    assert learning_rate(2.0, 5000, 1 - optimise.COOLDOWN / 2) == pytest.approx(1.0)
    assert learning_rate(2.0, 5000, 1.0) == learning_rate(2.0, 5000, 1.2) == 0.0


def test_trains_before_it_looks_at_the_clock(monkeypatch, tmp_path):
    # a clock on which all of the time is gone at each look, as where another process had the core
    monkeypatch.setattr(optimise, "time", SimpleNamespace(monotonic=itertools.count(0, 1000).__next__))
    module, steps = torch.nn.Linear(3, 1), []

    def loss_of(step):
        steps.append(step)
        loss = module(torch.ones(3)).square().sum()
        return loss, {"loss": loss}

    count = optimise.optimise(
        module, Average(module), loss_of, workers=Workers(0, 1, torch.device("cpu")), minutes=1e-6, peak=0.1,
        log=tmp_path / "steps.csv", every=5,
    )  # fmt: skip
    assert count == optimise.AGREE_EVERY
    assert steps == list(range(count))
    rows = [line.split(",") for line in (tmp_path / "steps.csv").read_text().splitlines()]
    assert [(int(row[0]), float(row[2]) > 0) for row in rows] == [(0, True), (5, True)]


def _averages(rank, address, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    workers = Workers(rank, 2, torch.device("cpu"))
    weights = torch.nn.Linear(2, 3)
    torch.nn.init.constant_(weights.weight, rank + 1.0)
    workers.same(weights)
    tensors = [torch.full((2, 3), float(rank)), torch.arange(6.0).view(1, 2, 3).mT * (rank + 1)]
    workers.average(tensors)
    agreed = workers.agree(0.25 + rank)
    torch.save((weights.weight.detach(), [t.contiguous() for t in tensors], agreed), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_average_and_agree(tmp_path):
    torch.multiprocessing.spawn(_averages, (str(tmp_path / "meeting"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        weight, (first, second), agreed = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(weight, torch.ones(3, 2))
        assert torch.equal(first, torch.full((2, 3), 0.5))
        assert torch.equal(second, torch.arange(6.0).view(1, 2, 3).mT * 1.5)
        assert agreed == 0.25


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    workers = start_workers()
    assert (workers.rank, workers.count, workers.first) == (0, 1, True)
    tensor = torch.ones(2)
    workers.average([tensor])
    assert torch.equal(tensor, torch.ones(2))
    assert workers.agree(0.5) == 0.5
