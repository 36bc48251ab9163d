"""The bench for users: what a result holds, and two of them side by side."""

import json
from unittest.mock import patch

import pytest
import torch
from small_run import SMALL
from tiny_sv3d import config as tiny

from sv3d_fast import benchmark, ceilings
from sv3d_fast.benchmark import draw_subject, measuring, read_result, step_flops, table, write_result
from sv3d_fast.ceilings import Ceilings
from sv3d_fast.cli import main
from sv3d_fast.events import Progress, StageFinished, finish
from sv3d_fast.full_size import measure_orbit, why_not_measured
from sv3d_fast.model.config import ModelConfig

STAGES = {"orbit": (2.0, 5), "splats": (4.0, 9), "mesh": (3.0, 7), "report": (50.0, 1)}


@pytest.fixture
def staged(monkeypatch):
    """Runs that take 1, 2, 3 and 4 times as long as STAGES says, in this order."""
    runs = iter((1, 2, 3, 4))

    def running(photo, output, settings, *, model):
        assert photo.stat().st_size > 100
        factor = next(runs)
        for name, (seconds, memory) in STAGES.items():
            yield StageFinished(name, None, factor * seconds, memory * factor << 30)

    monkeypatch.setattr(benchmark, "running", running)


def test_result_is_the_median_of_the_runs_after_the_first(staged):
    events, running = [], measuring("cpu")
    while True:
        try:
            events.append(next(running))
        except StopIteration as stop:
            result = stop.value
            break
    assert events == [Progress("bench", k, 4) for k in (1, 2, 3, 4)]
    assert result["runs"] == 3
    assert {name: stage["seconds"] for name, stage in result["stages"].items()} == {
        "orbit": 6.0, "splats": 12.0, "mesh": 9.0, "report": 150.0,
    }  # fmt: skip
    assert result["orbits_per_hour"] == 600
    assert result["meshes_per_hour"] == pytest.approx(3600 / 27, abs=0.05)
    assert result["peak_memory_bytes"] == 36 << 30
    assert result["unet"] == "plain"
    assert result["implementations"]["splat_raster"] == "csrc"


def test_shares_are_of_what_was_measured(staged, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", lambda device: Ceilings(copy=3e9, product=5e9))
    result = finish(measuring("cpu", quick=True))
    assert (result["copy_bytes_per_second"], result["product_flops_per_second"]) == (3e9, 5e9)
    assert result["orbit_share_of_product_rate"] == pytest.approx(result["orbit_flops"] / 2.0 / 5e9, rel=1e-2)
    lines = {line.rpartition("  ")[0].strip(): line.split()[-1] for line in table(result).splitlines()[1:]}
    assert (lines["copying, GB/s"], lines["products, TFLOPS"]) == ("3", "0.01")


def test_a_step_of_the_official_networks_is_what_was_counted_layer_by_layer():
    # 42 images at 72²: 69.0e12 by hand, 2.7e12 of it projections of attention to the one token, folded away here
    assert step_flops(ModelConfig()) == pytest.approx(66.3e12, rel=1e-3)


def test_ceilings_are_rates():
    small = {"cpu": 1 << 16}, {"cpu": 64}
    with patch.multiple(ceilings, COPIED=small[0], SIDE=small[1]):
        found = ceilings.measure(torch.device("cpu"))
    assert 1e6 < found.copy < 1e13
    assert 1e6 < found.product < 1e14


def test_a_machine_that_can_is_timed_at_full_size(staged, monkeypatch):
    monkeypatch.setattr(benchmark, "why_not_measured", lambda device: [])
    monkeypatch.setattr(benchmark, "measure_orbit", lambda config, device, dtype: (0.15, 1.5))
    monkeypatch.setattr(benchmark, "measure", lambda device: Ceilings(copy=3e12, product=700e12))
    result = finish(measuring("cpu", quick=True))
    assert result["full_size"]["orbits_per_hour"] == 400  # 50 steps and the decoding: 9 s
    assert result["full_size"]["step_share_of_product_rate"] == pytest.approx(66.3 / 0.15 / 700, rel=1e-3)
    assert "400" in next(line for line in table(result).splitlines() if line.startswith("SV3D, orbits/hour"))


def test_a_cpu_is_not(staged):
    assert finish(measuring("cpu", quick=True))["full_size"] is None
    assert why_not_measured(torch.device("cpu")) == ["needs a GPU"]


def test_full_size_is_timed_by_the_engine():
    torch.manual_seed(5)
    step, decode = measure_orbit(tiny(), torch.device("cpu"), torch.float32)
    assert step > 0
    assert decode > 0


def test_an_older_result_compares_without_what_it_lacks(staged):
    first = finish(measuring("cpu", quick=True))
    older = {k: v for k, v in first.items() if k not in ("copy_bytes_per_second", "orbit_share_of_product_rate")}
    line = next(line for line in table(older, first).splitlines() if line.startswith("copying"))
    assert line.split()[2] == "-"


def test_quick_is_one_run(staged):
    result = finish(measuring("cpu", quick=True))
    assert (result["runs"], result["stages"]["orbit"]["seconds"]) == (1, 2.0)


def test_two_results_side_by_side(staged, tmp_path, capsys):
    first = finish(measuring("cpu", quick=True))
    second = finish(measuring("cpu", quick=True))
    del second["stages"]["report"]
    for name, result in (("a", first), ("b", second)):
        write_result(result, tmp_path / f"{name}.json")
    assert read_result(tmp_path / "a.json") == json.loads(json.dumps(first))
    assert main(["bench", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if "seconds" in line] == ["2.00x", "2.00x", "2.00x", "-"]
    assert next(line for line in lines if line.startswith("meshes")).split()[-3:] == ["400", "200", "0.50x"]
    assert "2.00x" not in table(first)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2}'])
def test_other_files_are_no_results(tmp_path, text, capsys):
    (tmp_path / "x.json").write_text(text)
    assert main(["bench", "--compare", str(tmp_path / "x.json"), str(tmp_path / "y.json")]) == 2
    assert "x.json: expected a result of `sv3d-fast bench`" in capsys.readouterr().err


def test_runs_for_real(monkeypatch, tmp_path):
    small = benchmark.Settings(device="cpu", **SMALL)
    monkeypatch.setattr(benchmark, "Settings", lambda device: small)
    from sv3d_fast.scene.fit import FitConfig

    quick = FitConfig(size=32, count=200, steps=10, views_per_step=1)
    monkeypatch.setattr(FitConfig, "of", classmethod(lambda cls, device, size: quick))
    assert draw_subject().getextrema()[3] == (0, 255)
    result = finish(measuring("cpu", quick=True))
    assert set(result["stages"]) == {"orbit", "splats", "mesh", "formats", "report"}
    assert all(stage["seconds"] > 0 and stage["peak_memory_bytes"] > 1e8 for stage in result["stages"].values())
