"""Our own checkpoint folder: its round trip, what others read of it, and what saving leaves of an earlier one."""

import os
from dataclasses import fields, replace

import pytest
import torch
from diffusers import AutoencoderKL, UNetSpatioTemporalConditionModel
from safetensors.torch import load_file
from small_weights import NETWORKS, SMALL, assert_same, build, one_line
from transformers import CLIPVisionModelWithProjection

from sv3d_fast.model import weights
from sv3d_fast.model.weights import load_model, save_model

# thousands of tiny tensors: handing each to several threads costs more than it saves
pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_field_of_the_small_configuration_is_unusual():
    for part in ("unet", "vae", "clip", "sampler"):
        for f in fields(getattr(SMALL, part)):
            ours = getattr(getattr(SMALL, part), f.name)
            assert ours != f.default or f.name in ("in_channels", "out_channels"), f"{part}.{f.name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shard", ["5GB", 150_000])
def test_own_folder_round_trip(tmp_path, dtype, shard):
    model = build(dtype=dtype)
    save_model(model, tmp_path / "a" / "model", max_shard_size=shard)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["model"]
    files = list((tmp_path / "a" / "model" / "unet").glob("*.safetensors"))
    assert (len(files) > 3) == (shard != "5GB")
    assert all(t.dtype == dtype for t in load_file(files[0]).values())
    loaded = load_model(str(tmp_path / "a" / "model"), dtype=dtype)
    assert loaded.config == SMALL
    assert loaded.notice is None
    assert_same(loaded, model)
    for name in NETWORKS:
        network = getattr(loaded, name)
        assert not network.training
        assert all(p.dtype == dtype and not p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("umask", [0o022, 0o007])
@pytest.mark.parametrize("shard", ["5GB", 150_000])
def test_files_have_the_permissions_that_the_umask_leaves(tmp_path, umask, shard):
    before = os.umask(umask)
    try:
        save_model(build(), tmp_path / "model", max_shard_size=shard)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert any(name.endswith(".safetensors") for name in modes)
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_channels_and_vector_width_round_trip(tmp_path):
    config = replace(SMALL, unet=replace(SMALL.unet, in_channels=6, out_channels=3, vector_dim=1280))
    save_model(build(config), tmp_path / "m")
    assert load_model(tmp_path / "m").config == config


def test_precision_of_each_network(tmp_path):
    save_model(build(), tmp_path / "m")
    loaded = load_model(tmp_path / "m", dtype={"unet": torch.bfloat16, "image_encoder": torch.float64})
    types = [next(getattr(loaded, name).parameters()).dtype for name in NETWORKS]
    assert types == [torch.bfloat16, torch.float32, torch.float64]
    assert_same(loaded, build())


def test_loaded_weights_do_not_hang_on_the_file(tmp_path):
    save_model(build(), tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    file = tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert_same(loaded, build())


def test_others_read_our_folder(tmp_path):
    model = build()
    save_model(model, tmp_path / "m", max_shard_size=150_000)
    image = torch.rand(1, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        vae = AutoencoderKL.from_pretrained(tmp_path / "m", subfolder="vae").eval()
        assert vae.config.scaling_factor == 0.3
        assert torch.allclose(vae.encode(image).latent_dist.mode(), model.vae.encode(image), atol=1e-5)
        latents = torch.randn(1, 3, 4, 6)
        assert torch.allclose(vae.decode(latents).sample, model.vae.decode(latents), atol=1e-5)
        clip = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "m" / "image_encoder").eval()
        pixels = torch.randn(2, 3, 21, 21)
        assert torch.allclose(clip(pixels).image_embeds, model.image_encoder(pixels), atol=1e-5)
        unet = UNetSpatioTemporalConditionModel.from_pretrained(tmp_path / "m", subfolder="unet").eval()
        x, context = torch.randn(1, 3, 8, 4, 6), torch.randn(1, 1, 24)
        theirs = unet(x, 0.7, context, torch.tensor([[1e-3]])).sample
        vector = unet.add_time_proj(torch.tensor([1e-3])).expand(1, 3, 256)
        ours = model.unet(x, 0.7, context, vector)
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_saving_replaces_a_model_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "m"
    target.mkdir()
    save_model(build(), target)  # an empty folder is no obstacle
    before = sorted(p.relative_to(target) for p in target.rglob("*"))
    (target / "stale.txt").write_text("of the earlier model")

    def fails(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "write_tensors", fails)
        with pytest.raises(OSError, match="disk full"):
            save_model(build(), target)
    assert (target / "stale.txt").exists()
    assert_same(load_model(target), build())
    save_model(build(), target)
    assert sorted(p.relative_to(target) for p in target.rglob("*")) == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_saving_refuses_what_it_did_not_write(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    for target in (tmp_path / "photos", tmp_path / "photos" / "a.jpg"):
        with pytest.raises(ValueError, match="folder: expected a new or empty folder or an earlier model") as info:
            save_model(build(), target)
        one_line(info)
    assert (tmp_path / "photos" / "a.jpg").exists()
    with pytest.raises(ValueError, match="max_shard_size: expected a size such as '5GB', got 'huge'"):
        save_model(build(), tmp_path / "m", max_shard_size="huge")
    other = replace(SMALL, vae=replace(SMALL.vae, scaling=0.5))
    with pytest.raises(ValueError, match="model: vae was built from"):
        save_model(replace(build(), config=other), tmp_path / "m")
    assert not (tmp_path / "m").exists()
