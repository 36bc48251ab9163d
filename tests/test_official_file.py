"""The official checkpoint, a single file: its round trip, its licence line, and each error as one line."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_weights import NETWORKS, SMALL, assert_same, build, official_tensors, one_line

from sv3d_fast.model import weights
from sv3d_fast.model.checkpoint import CheckpointError
from sv3d_fast.model.config import CLIPConfig, UNetConfig, VAEConfig
from sv3d_fast.model.names import clip_names, vae_names
from sv3d_fast.model.unet import SV3DUNet
from sv3d_fast.model.unet_names import official_names
from sv3d_fast.model.weights import load_model, load_official, save_model

# thousands of tiny tensors: handing each to several threads costs more than it saves
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """The licence line is printed once a process: forgotten before each test, and no warning unless looked for."""
    weights._print_once.cache_clear()
    monkeypatch.setattr(weights.warnings, "warn", lambda *args, **kwargs: None)


@pytest.fixture
def small_defaults(monkeypatch):
    """load_model takes SMALL's sizes for the official ones."""
    monkeypatch.setattr(weights, "ModelConfig", lambda: SMALL)


@pytest.mark.parametrize("vector", [256, 1280])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_official_file(tmp_path, small_defaults, vector, dtype):
    config = replace(SMALL, unet=replace(SMALL.unet, vector_dim=vector))
    tensors, model = official_tensors(config)
    path = tmp_path / f"sv3d_{config.unet.variant}.safetensors"
    save_file({k: v.to(dtype) for k, v in tensors.items()}, path)
    loaded = load_model(path)
    assert loaded.config == config
    assert_same(loaded, build(config, dtype))
    assert loaded.notice == weights.NOTICE
    assert_same(load_model(tmp_path, dtype=dtype, variant=config.unet.variant), model, dtype)
    save_model(loaded, tmp_path / "converted")
    assert (tmp_path / "converted" / "NOTICE").read_text() == weights.NOTICE + "\n"
    converted = load_model(tmp_path / "converted")
    assert (converted.config, converted.notice) == (config, weights.NOTICE)
    assert_same(converted, loaded)


def test_official_file_computes_the_golden_orbit(tmp_path, golden):
    spec = importlib.util.spec_from_file_location("filling", golden / "filling.py")
    filling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(filling)
    unet = UNetConfig(block_channels=(32, 64, 128, 128), head_channels=32, context_dim=64, vector_dim=256)
    config = replace(SMALL, unet=unet, vae=VAEConfig(block_channels=(32, 64, 128, 128)))
    tensors, _ = official_tensors(config)
    filled = {
        f"model.diffusion_model.{k}": torch.from_numpy(v)
        for k, v in filling.state_dict(golden / "unet_u_small.json").items()
    }
    filled |= {k: torch.from_numpy(v) for k, v in filling.state_dict(golden / "vae_small.json").items()}
    assert set(filled) <= set(tensors)
    save_file(tensors | filled, tmp_path / "sv3d_u.safetensors")
    dtypes = dict.fromkeys(NETWORKS, torch.float32)
    model = load_official(tmp_path / "sv3d_u.safetensors", dtypes, torch.device("cpu"), config)
    case = {k: torch.from_numpy(v) for k, v in np.load(golden / "vae_small.npz").items()}
    with torch.no_grad():
        assert (model.vae.encode(case["image"]) - case["mode"]).norm() <= 1e-5 * case["mode"].norm()
        case = {k: torch.from_numpy(v) for k, v in np.load(golden / "unet_u_small.npz").items()}
        batch = len(case["image_embedding"])
        latents = torch.cat([case["latents"], case["image_latents"]], 1).unflatten(0, (batch, -1))
        vector = case["vector"].unflatten(0, (batch, -1))
        out = model.unet(latents, 0.37, case["image_embedding"], vector).flatten(0, 1)
        assert (out - case["output"]).norm() <= 1e-4 * case["output"].norm()


def test_full_sizes():
    for vector, count in ((256, 1_523_967_722), (1280, 1_525_278_442)):
        config = UNetConfig(vector_dim=vector)
        with torch.device("meta"):
            state = SV3DUNet(config).state_dict()
        assert sum(t.numel() for t in state.values()) == count
        assert len(official_names(config)) == len(state) == 1428
    assert len({s.name for s in clip_names(CLIPConfig()).values()}) == 392
    assert len(vae_names(VAEConfig())) == 106 + 2 + 138


def test_licence_line_is_printed_once(tmp_path, small_defaults, monkeypatch):
    seen = []
    monkeypatch.setattr(weights.warnings, "warn", lambda message, **kwargs: seen.append(message))
    save_file(official_tensors()[0], tmp_path / "sv3d_u.safetensors")
    load_model(tmp_path)
    load_model(tmp_path)
    assert seen == [weights.NOTICE]
    assert "licensed by Stability AI" in seen[0]


def test_official_mismatches_are_named_together(tmp_path, small_defaults):
    tensors, _ = official_tensors()
    del tensors["first_stage_model.decoder.conv_out.bias"]
    del tensors["conditioner.embedders.0.open_clip.model.visual.proj"]
    tensors["conditioner.embedders.0.open_clip.model.visual.extra"] = torch.zeros(1)
    tensors["model.diffusion_model.conv_in.weight"] = torch.zeros(1)
    tensors["model.diffusion_model.out.2.bias"] = torch.zeros(5)
    tensors["model.diffusion_model.out.0.bias"] = torch.zeros(32, dtype=torch.int32)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as info:
        load_model(tmp_path / "x.safetensors")
    message = one_line(info)
    for part in (
        "6 tensors don't fit",
        "missing first_stage_model.decoder.conv_out.bias (vae)",
        "missing conditioner.embedders.0.open_clip.model.visual.proj (image_encoder)",
        "unexpected conditioner.embedders.0.open_clip.model.visual.extra",
        "unexpected model.diffusion_model.conv_in.weight",
        "model.diffusion_model.out.2.bias is (5,), expected (4,)",
        "model.diffusion_model.out.0.bias is of type I32, expected floating point",
    ):
        assert part in message
    assert "more" not in message
    for name in list(tensors):
        if name.startswith("first_stage_model"):
            del tensors[name]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"; and \d+ more$") as info:
        load_model(tmp_path / "x.safetensors")
    assert one_line(info).count(";") == 8


def test_not_sv3d(tmp_path, small_defaults):
    name = "model.diffusion_model.label_emb.0.0.weight"
    path = tmp_path / "svd.safetensors"
    for tensors, message in (
        ({name: torch.zeros(128, 768)}, "this is Stable Video Diffusion (vector width 768), not SV3D (256 or 1280)"),
        ({name: torch.zeros(128, 5)}, "this is a model of vector width 5, not SV3D"),
        ({name: torch.zeros(128)}, "not an official SV3D checkpoint: no matrix"),
        ({"x": torch.zeros(1)}, "not an official SV3D checkpoint: no matrix"),
    ):
        save_file(tensors, path)
        with pytest.raises(CheckpointError) as info:
            load_model(path)
        assert one_line(info).startswith(f"{path}: {message}")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (70000.0, torch.float16)])
def test_values_that_are_not_finite(tmp_path, small_defaults, value, dtype):
    tensors, _ = official_tensors()
    tensors["first_stage_model.decoder.conv_in.weight"][0, 0, 0, 0] = value
    save_file(tensors, tmp_path / "x.safetensors")
    kind = str(dtype).removeprefix("torch.")
    expected = f"1 tensors hold values that aren't finite in {kind}: first_stage_model.decoder.conv_in.weight"
    with pytest.raises(CheckpointError, match=expected) as info:
        load_model(tmp_path / "x.safetensors", dtype=dtype)
    one_line(info)


def test_variants_of_official_files(tmp_path, small_defaults):
    for vector in (256, 1280):
        config = replace(SMALL, unet=replace(SMALL.unet, vector_dim=vector))
        save_file(official_tensors(config)[0], tmp_path / f"sv3d_{config.unet.variant}.safetensors")
    assert load_model(tmp_path).config.unet.variant == "p"
    assert load_model(tmp_path, variant="u").config.unet.variant == "u"
    for path, variant, message in (
        (tmp_path, "fp16", "holds official files, expected 'u' or 'p', got 'fp16'"),
        (tmp_path / "sv3d_u.safetensors", "fp16", "is a single file, expected 'u' or 'p', got 'fp16'"),
        (tmp_path / "sv3d_u.safetensors", "p", "holds SV3D_u, got 'p'"),
    ):
        with pytest.raises(CheckpointError, match=message) as info:
            load_model(path, variant=variant)
        one_line(info)
