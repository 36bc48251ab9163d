"""diffusers' own door: `DiffusionPipeline.from_pretrained` with our file as the custom pipeline."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from tiny_sv3d import LATENTS, load, make_folder, picture, seeded

from sv3d_fast.model.checkpoint import CheckpointError
from sv3d_fast.stable_video_3d import StableVideo3DPipeline

FILE = Path(__file__).parent.parent / "examples" / "sv3d_fast_pipeline.py"
NETWORKS = ("unet", "vae", "image_encoder")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("sv3d") / "p", 1280)


def precisions(pipe):
    return [next(getattr(pipe, name).parameters()).dtype for name in NETWORKS]


@pytest.fixture
def by_diffusers(folder, tmp_path, monkeypatch):
    """diffusers copies a custom pipeline's file to its cache before it imports it."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)

    def call(path=folder, **kwargs):
        pipe = DiffusionPipeline.from_pretrained(path, custom_pipeline=str(FILE), trust_remote_code=True, **kwargs)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return call


def test_is_our_pipeline(folder, by_diffusers, tmp_path):
    pipe, ours = by_diffusers(), load(folder)
    assert type(pipe) is StableVideo3DPipeline
    assert pipe.model_config == ours.model_config
    assert pipe.notice == ours.notice == "Tiny notice"
    for name in NETWORKS:
        expected = getattr(ours, name).state_dict()
        made = getattr(pipe, name).state_dict()
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[key], expected[key]) for key in expected)
        assert not getattr(pipe, name).training
    orbits = [p(picture(), generator=seeded(), output_type="latent").frames for p in (pipe, ours)]
    assert orbits[0].shape == (1, *LATENTS)
    assert torch.equal(*orbits)
    pipe.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").model_config == ours.model_config


def test_precision_and_variant(folder, by_diffusers, tmp_path):
    half = by_diffusers(dtype=torch.float16)
    assert precisions(half) == [torch.float16] * 3
    mixed = by_diffusers(dtype={"unet": torch.bfloat16, "default": torch.float32})
    assert precisions(mixed) == [torch.bfloat16, torch.float32, torch.float32]
    assert precisions(by_diffusers()) == [torch.float32] * 3
    make_folder(tmp_path / "model", 1280)
    for file in list((tmp_path / "model").rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    named = by_diffusers(tmp_path / "model", variant="fp16").unet.state_dict()
    assert all(torch.equal(value, named[key]) for key, value in load(folder).unet.state_dict().items())
    with pytest.raises(CheckpointError, match="variant is None"):
        by_diffusers(tmp_path / "model")
