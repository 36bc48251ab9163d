"""What every diffusers pipeline has: loading, saving, components, devices, offloading."""

import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_sv3d import STEPS, load, make_folder, picture, relative_error, seeded
from torch import nn

from sv3d_fast.model.weights import CheckpointError
from sv3d_fast.offload import resident, streamed, tensors_of
from sv3d_fast.stable_video_3d import StableVideo3DPipeline

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("sv3d") / "p", 1280)


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder)


def test_base_class(pipe, folder):
    assert isinstance(pipe, DiffusionPipeline)
    assert pipe.name_or_path == str(folder)
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    assert {"unet", "vae", "image_encoder"} < set(pipe.components)
    again = StableVideo3DPipeline(**pipe.components)
    assert again.unet is pipe.unet
    assert again.notice == "Tiny notice"
    assert StableVideo3DPipeline.from_pipe(pipe).vae is pipe.vae
    assert "StableVideo3DPipeline" in repr(pipe)
    assert pipe.scheduler.config.sigma_max == 700
    with pytest.raises(AttributeError):
        pipe.scheduler = None
    for call in (
        pipe.enable_attention_slicing, pipe.disable_attention_slicing, pipe.enable_vae_slicing,
        pipe.disable_vae_slicing, pipe.enable_xformers_memory_efficient_attention,
        pipe.disable_xformers_memory_efficient_attention, pipe.maybe_free_model_hooks, pipe.remove_all_hooks,
    ):  # fmt: skip
        call()
    with pytest.raises(NotImplementedError, match="enable_sequential_cpu_offload"):
        pipe.enable_group_offload(torch.device("cpu"))


def test_loading_and_saving(pipe, folder, tmp_path):
    mixed = load(folder, dtype={"vae": torch.float32, "default": torch.bfloat16}, use_safetensors=True)
    assert mixed.dtype == torch.bfloat16
    assert next(mixed.vae.parameters()).dtype == torch.float32
    assert mixed.to(torch.float16) is mixed
    assert next(mixed.vae.parameters()).dtype == torch.float16
    pipe.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.model_config == pipe.model_config
    assert again.notice == pipe.notice
    kwargs = {"generator": seeded(), "output_type": "latent"}
    expected = pipe(picture(), **kwargs).frames
    assert torch.equal(again(picture(), **kwargs | {"generator": seeded()}).frames, expected)
    with pytest.raises(TypeError, match="safety_checker"):
        StableVideo3DPipeline.from_pretrained(folder, safety_checker=None)
    with pytest.raises(ValueError, match="torch_dtype"):
        StableVideo3DPipeline.from_pretrained(folder, dtype=torch.float16, torch_dtype=torch.float16)
    with pytest.raises(ValueError, match="use_safetensors"):
        StableVideo3DPipeline.from_pretrained(folder, use_safetensors=False)
    with pytest.raises(CheckpointError, match="variant"):
        StableVideo3DPipeline.from_pretrained(folder, variant="fp16")
    with pytest.raises(CheckpointError, match="no such file"):
        StableVideo3DPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="variant"):
        pipe.save_pretrained(tmp_path / "other", variant="fp16")


def test_offload_without_a_gpu_runs_in_place(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    pipe = load(folder)
    expected = pipe(picture(), generator=seeded(), output_type="latent").frames
    for offload in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        offload()
        assert torch.equal(pipe(picture(), generator=seeded(), output_type="latent").frames, expected)
        with pytest.raises(ValueError, match="gpu_id"):
            offload(gpu_id=0, device="cuda:1")
        with pytest.raises(ValueError, match="0 CUDA devices"):
            offload(device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["model", "sequential"])
def test_offload_to_the_gpu(folder, way):
    pipe = load(folder)
    expected = pipe(picture(), generator=seeded(), output_type="pt").frames
    getattr(pipe, f"enable_{way}_cpu_offload")()
    places, middles = [], []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: places.append(module.weight.device.type))

    def look(given, *_):
        middles.append(next(given.unet.mid_block.parameters()).device.type)
        assert next(given.vae.parameters()).device.type == "cpu"
        return {}

    made = pipe(picture(), generator=seeded(), callback_on_step_end=look, output_type="pt").frames
    assert float((made.cpu() - expected).abs().max()) < 0.02
    assert middles == ["cuda" if way == "model" else "cpu"] * STEPS
    assert all(p.device.type == "cpu" for n in ("unet", "vae", "image_encoder") for p in getattr(pipe, n).parameters())
    pipe.to("cuda")
    assert pipe.device.type == "cuda"
    again = pipe(picture(), generator=seeded(), output_type="pt").frames
    assert torch.allclose(again, made, atol=1e-3)


def test_networks_visit_and_come_home():
    """Moving seen without a second device: `Tensor.to` takes a precision where it takes a device."""
    elsewhere = torch.float64
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
    tensors = tensors_of(network)
    homes = [tensor.data_ptr() for tensor in tensors]

    def at_home():
        return [tensor.data_ptr() for tensor in tensors] == homes

    with resident(tensors, elsewhere):
        assert all(tensor.dtype == elsewhere for tensor in tensors)
        network.float()  # what a caller does inside is undone
    assert at_home()
    with pytest.raises(ZeroDivisionError), resident(tensors, elsewhere):
        raise ZeroDivisionError
    assert at_home()

    block = network[2]
    with streamed(network, [block], elsewhere):
        assert (network[0].weight.dtype, block.weight.dtype) == (elsewhere, torch.float32)
        for _ in range(2):
            assert network(torch.ones(2, 3, dtype=elsewhere)).dtype == elsewhere
            assert block.weight.dtype == torch.float32
        with pytest.raises(RuntimeError):
            block(torch.ones(2, 3, dtype=elsewhere))
        assert block.weight.dtype == torch.float32
    assert at_home()
    assert block(torch.ones(1, 4)).dtype == torch.float32


def test_float16_autoencoder_runs_in_float32_on_a_cpu_and_goes_back(folder):
    pipe, seen = load(folder, torch_dtype=torch.float16), []
    pipe.vae.encoder.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    pipe(picture(), num_inference_steps=1, output_type="latent")
    assert seen == [torch.float32]
    pipe.vae.decoder.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    pipe(picture(), num_inference_steps=1, decode_chunk_size=3)
    assert seen == [torch.float32] * 4
    assert next(pipe.vae.parameters()).dtype == torch.float16


@pytest.mark.gpu
def test_half_precision_on_the_gpu_with_a_cpu_generator(folder):
    pipe = load(folder, dtype=torch.float16, device_map="cuda")
    made = pipe(picture(), generator=seeded(), output_type="latent").frames
    expected = load(folder)(picture(), generator=seeded(), output_type="latent").frames
    assert made.device.type == "cuda"
    assert relative_error(made.cpu(), expected) < 0.05


def test_the_package_imports_neither_torch_nor_diffusers():
    check = "import sys, sv3d_fast; raise SystemExit(bool({'torch', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
