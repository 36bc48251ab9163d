"""Devices that are not there, too old, or without a driver: one line each."""

import pytest
import torch

from sv3d_fast.devices import pick_device, pick_dtype
from sv3d_fast.settings import DTYPES


@pytest.fixture
def machine(monkeypatch):
    """Pretends that there are two GPUs of some capability, or a driver that refuses them."""

    def pretend(capability):
        def answer(number):
            if isinstance(capability, Exception):
                raise capability
            return capability

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", answer)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"Old card {number}")

    return pretend


def refusal(name):
    with pytest.raises(ValueError, match=r"^device: ") as info:
        pick_device(name)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
def test_gpus_that_run(machine, capability):
    machine(capability)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(("name", "number"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_below_ampere(machine, name, number):
    machine((7, 5))
    shown = "cuda" if name == "auto" else name
    assert refusal(name) == (
        f"device: {shown} (Old card {number}) has compute capability 7.5, and 8.0 is the least; "
        "--device cpu runs anywhere"
    )
    assert pick_device("cpu") == torch.device("cpu")


def test_a_driver_that_is_too_old(machine):
    machine(RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it."))
    assert refusal("cuda") == (
        "device: cuda can't be used: The NVIDIA driver on your system is too old (found version 11040)."
    )


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "cuda:-1", "cuda:2", "cuda:99999999999"])
def test_names_that_are_none(machine, name):
    machine((9, 0))
    refusal(name)


@pytest.mark.parametrize(
    "name", ["", "CPU", "cpu:3", "meta", "mps", "cuda:x", "cuda:-1", "cuda:999", "cuda:9999999999"]
)
def test_devices_that_are_not_there(name):
    with pytest.raises(ValueError, match=r"^device: "):
        pick_device(name)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_precision_by_name(device):
    device = torch.device(device)
    assert pick_dtype("auto", device) == (torch.float32 if device.type == "cpu" else torch.float16)
    for name in DTYPES[1:]:
        if (name, device.type) == ("float16", "cpu"):
            with pytest.raises(ValueError, match=r"^dtype: expected float32 or bfloat16 on a CPU"):
                pick_dtype(name, device)
        else:
            assert pick_dtype(name, device) == getattr(torch, name)
