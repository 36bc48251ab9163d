"""Checkpoint layouts: each round trip against its own writer, and each error as one line."""

import importlib.util
import json
import os
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNetSpatioTemporalConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sv3d_fast.model import weights
from sv3d_fast.model.checkpoint import CheckpointError
from sv3d_fast.model.clip import CLIPImageTower
from sv3d_fast.model.config import CLIPConfig, ModelConfig, SamplerConfig, UNetConfig, VAEConfig
from sv3d_fast.model.names import clip_names, vae_names
from sv3d_fast.model.unet import SV3DUNet
from sv3d_fast.model.unet_names import official_names
from sv3d_fast.model.vae import SV3DVAE
from sv3d_fast.model.weights import SV3DModel, load_model, load_official, save_model

ATTENTION_WEIGHTS = tuple(f"attentions.0.to_{x}.weight" for x in ("q", "k", "v", "out.0"))
NETWORKS = ("unet", "vae", "image_encoder")
SMALL = ModelConfig(
    unet=UNetConfig(
        block_channels=(32, 64),
        attention=(True, False),
        layers_per_block=1,
        head_channels=16,
        context_dim=24,
        vector_dim=256,
        norm_eps="diffusers",
    ),
    vae=VAEConfig(block_channels=(32, 64), res_blocks=1, latent_channels=3, scaling=0.3),
    clip=CLIPConfig(width=16, layers=2, heads=4, mlp_width=24, patch=7, image_size=21, projection=24),
    sampler=SamplerConfig(7, 80.0, 0.01, 6.5, 1.5, 3.5, 1e-3),
    image_size=66,
    frames=9,
)


# thousands of tiny tensors: handing each to several threads costs more than it saves
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """The licence line is printed once a process: forgotten before each test, and no warning unless looked for."""
    weights._print_once.cache_clear()
    monkeypatch.setattr(weights.warnings, "warn", lambda *args, **kwargs: None)


def build(config=SMALL, dtype=torch.float32, notice=None):
    torch.manual_seed(4)
    networks = SV3DUNet(config.unet), SV3DVAE(config.vae), CLIPImageTower(config.clip)
    return SV3DModel(config, *(n.to(dtype) for n in networks), notice=notice)


def assert_same(ours, other, dtype=None):
    for name in NETWORKS:
        expected = getattr(other, name).state_dict()
        state = getattr(ours, name).state_dict()
        assert set(state) == set(expected)
        for key, tensor in state.items():
            assert torch.equal(tensor, expected[key].to(dtype or tensor.dtype)), key


def one_line(info):
    message = str(info.value)
    assert "\n" not in message
    return message


# --- our own folder ---------------------------------------------------------------------------------------------


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


# --- the official file ------------------------------------------------------------------------------------------


def official_tensors(config=SMALL):
    """A small file as generative-models would write it, with its unused tensors, and the model that is in it."""
    model = build(config)
    unet, vae, clip = (getattr(model, name).state_dict() for name in NETWORKS)
    tensors = {
        f"model.diffusion_model.{official}": unet[ours] for official, ours in official_names(config.unet).items()
    }
    for ours, source in vae_names(config.vae).items():
        tensors[source.name] = vae[ours][:, :, None, None] if ours.endswith(ATTENTION_WEIGHTS) else vae[ours]
    for ours, source in clip_names(config.clip).items():
        if "q_proj" in ours:
            tensors[source.name] = torch.cat([clip[ours.replace("q_proj", f"{x}_proj")] for x in "qkv"])
        elif "k_proj" not in ours and "v_proj" not in ours:
            tensors[source.name] = clip[ours].T if ours == "visual_projection.weight" else clip[ours]
    for name in ("positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", "attn_mask"):
        tensors[f"conditioner.embedders.0.open_clip.model.{name}"] = torch.zeros(2, 2)
    for name in ("decoder.conv_in.weight", "post_quant_conv.weight", "post_quant_conv.bias"):
        tensors[f"conditioner.embedders.1.encoder.{name}"] = torch.zeros(3)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    return tensors, model


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


# --- folders of diffusers and of the port -----------------------------------------------------------------------


def port_folder(folder, variant=None, post_quant_conv=True, shard="5GB"):
    """A folder as chenguolin/sv3d-diffusers has it, saved by diffusers and transformers; returns the networks."""
    torch.manual_seed(5)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        projection_class_embeddings_input_dim=1280,
        layers_per_block=1,
        cross_attention_dim=24,
        num_attention_heads=(2, 4),
        num_frames=25,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_post_quant_conv=post_quant_conv,
    )
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            projection_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=21,
            patch_size=7,
            hidden_act="gelu",
        )
    )
    for name, network in zip(NETWORKS, (unet, vae, clip), strict=True):
        network.save_pretrained(folder / name, variant=variant, max_shard_size=shard)
    index = {
        "_class_name": "StableVideo3DDiffusionPipeline",
        "_diffusers_version": "0.30.3",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "unet": [
            "diffusers_sv3d.models.unets.unet_spatio_temporal_condition",
            "SV3DUNetSpatioTemporalConditionModel",
        ],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return SimpleNamespace(unet=unet.eval(), vae=vae.eval(), image_encoder=clip.eval())


@pytest.mark.parametrize(("variant", "shard"), [(None, "5GB"), ("fp16", "5GB"), (None, "150KB"), ("fp16", "150KB")])
def test_port_folder(tmp_path, variant, shard):
    theirs = port_folder(tmp_path, variant, shard=shard)
    loaded = load_model(tmp_path, variant=variant)
    assert_same(loaded, theirs)
    config = loaded.config
    assert config.unet == UNetConfig(
        block_channels=(32, 64), attention=(True, False), layers_per_block=1, head_channels=16, context_dim=24
    )
    assert config.vae == VAEConfig(block_channels=(32, 32), res_blocks=1)
    assert config.clip == CLIPConfig(16, 2, 4, 24, 7, 21, 24)
    assert (config.frames, config.image_size, config.sampler) == (21, 16, SamplerConfig())
    assert loaded.notice == weights.NOTICE
    latents, image = torch.randn(2, 4, 3, 5), torch.rand(1, 3, 4, 6)
    with torch.no_grad():  # the post_quant_conv of a folder's own autoencoder belongs to its decoder
        assert torch.allclose(loaded.vae.decode(latents), theirs.vae.decode(latents).sample, atol=1e-5)
        assert torch.allclose(loaded.vae.encode(image), theirs.vae.encode(image).latent_dist.mode(), atol=1e-5)
    save_model(loaded, tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.config == config
    assert_same(again, loaded)


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_leftovers_and_old_names_in_a_folder(tmp_path):
    theirs = port_folder(tmp_path, post_quant_conv=False)

    def old_attention(tensors):
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            for name in [n for n in tensors if f".{new}." in n]:
                tensors[name.replace(new, old)] = tensors.pop(name)
        tensors["post_quant_conv.weight"] = torch.zeros(4, 4, 1, 1)

    def positions(tensors):
        tensors["vision_model.embeddings.position_ids"] = torch.arange(10)

    rewrite(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", old_attention)
    rewrite(tmp_path / "image_encoder" / "model.safetensors", positions)
    assert_same(load_model(tmp_path), theirs)


def edit(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "unet: expected class UNetSpatio"),
        (
            "model_index.json",
            {"vae": ["diffusers", "AutoencoderKLTemporalDecoder"]},
            "vae: expected class AutoencoderKL",
        ),
        ("model_index.json", {"vae": "absent"}, "vae is missing"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 768}, "this is Stable Video Diffusion"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 999}, "vector_dim: expected 256"),
        ("unet/config.json", {"num_attention_heads": [2, 2]}, "num_attention_heads: expected heads of one width"),
        ("unet/config.json", {"num_attention_heads": [2, 4, 4]}, "num_attention_heads: expected one a level"),
        ("unet/config.json", {"block_out_channels": [32, "64"]}, "block_out_channels: expected 1 to 16 integers"),
        ("unet/config.json", {"block_out_channels": [32] * 17}, "block_out_channels: expected 1 to 16 integers"),
        ("unet/config.json", {"layers_per_block": 10**12}, "layers_per_block: expected at most 256"),
        ("vae/config.json", {"latent_channels": 2**60}, "latent_channels: expected at most 65536"),
        ("image_encoder/config.json", {"num_hidden_layers": 2**31}, "num_hidden_layers: expected at most 256"),
        ("unet/config.json", {"block_out_channels": [40, 80]}, "block_channels: expected multiples of 32"),
        ("unet/config.json", {"block_out_channels": [32]}, "down_block_types: expected 1 of"),
        ("unet/config.json", {"up_block_types": ["UpBlockSpatioTemporal"] * 2}, "up_block_types: only"),
        ("unet/config.json", {"transformer_layers_per_block": 2}, "transformer_layers_per_block: only 1 is"),
        ("unet/config.json", {"in_channels": -8}, "in_channels: expected at least 1, got -8"),
        ("unet/config.json", {"in_channels": True}, "in_channels: expected int, got True"),
        ("unet/config.json", {"sv3d_fast": {"norm_eps": "odd"}}, "norm_eps: expected 'official' or 'diffusers'"),
        ("unet/config.json", {"sv3d_fast": {"sampler": {"steps": "7"}}}, "steps: expected int, got '7'"),
        ("unet/config.json", {"sv3d_fast": {"sampler": {"steps": 10**9}}}, "steps: expected 1 to 1000, got 1000000000"),
        ("unet/config.json", {"sv3d_fast": {"sampler": {"sigma_min": 800.0}}}, "sigma_min: expected 1e-06 to 700, got"),
        ("unet/config.json", {"sv3d_fast": {"sampler": {"rho": 0.0}}}, "rho: expected 0.1 to 100, got 0.0"),
        ("unet/config.json", {"sv3d_fast": {"image_size": 65536}}, "image_size: expected at most 4096, got 65536"),
        (
            "unet/config.json",
            {"num_frames": 10**6, "sv3d_fast": {"image_size": 16}},
            "num_frames: expected at most 1000",
        ),
        ("vae/config.json", {"scaling_factor": 0.0}, "scaling_factor: expected 1e-06 to 1e+06, got 0.0"),
        ("vae/config.json", {"act_fn": "relu"}, "act_fn: only 'silu' is supported, got 'relu'"),
        ("model_index.json", {"sv3d_fast": {"notice": ["x"]}}, "notice: expected str, got ['x']"),
        ("vae/config.json", {"scaling_factor": float("inf")}, "scaling_factor: expected a finite number, got inf"),
        ("vae/config.json", {"scaling_factor": 10**400}, "scaling_factor: expected float, got 1000"),
        ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor: expected float, got 'x'"),
        ("vae/config.json", {"use_quant_conv": False}, "use_quant_conv: only True is supported"),
        ("vae/config.json", {"block_out_channels": "absent"}, "block_out_channels is missing"),
        ("image_encoder/config.json", {"hidden_act": "quick_gelu"}, "hidden_act: only 'gelu' is supported"),
        ("image_encoder/config.json", {"hidden_act": "absent"}, "hidden_act: only 'gelu' is supported"),
        ("image_encoder/config.json", {"num_attention_heads": 3}, "heads: expected a divisor of the width 16, got 3"),
        ("image_encoder/config.json", {"num_hidden_layers": 3}, "16 tensors don't fit: missing vision_model.encoder"),
        ("image_encoder/config.json", {"num_hidden_layers": 1}, "16 tensors don't fit: unexpected vision_model"),
    ],
)
def test_configurations_that_are_not_ours(port, file, changes, message):
    edit(port / file, **changes)
    with pytest.raises(CheckpointError) as info:
        load_model(port)
    assert message in one_line(info)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("port")
    port_folder(folder)
    return folder


@pytest.fixture
def port(original, tmp_path):
    return shutil.copytree(original, tmp_path / "port")


def test_broken_files(port):
    unet = port / "unet"
    file = unet / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()

    def refused(message):
        with pytest.raises(CheckpointError) as info:
            load_model(port)
        assert message in one_line(info)

    for contents, message in (
        (whole[: len(whole) // 2], f"{file}: not a readable safetensors file"),
        (b"", "not a readable safetensors file"),
        (b"\xff" * 100, "not a readable safetensors file"),
        (whole[:8] + b"}" + whole[9:], "not a readable safetensors file"),
        (b"PK\x03\x04" + b"\0" * 99, "it is a pickled checkpoint under that name, refused"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer, not the weights"),
    ):
        file.write_bytes(contents)
        refused(message)
    file.rename(unet / "diffusion_pytorch_model.bin")
    refused("diffusion_pytorch_model.bin: refused, since loading a pickled checkpoint (.bin) can run any code in it")
    (unet / "diffusion_pytorch_model.bin").rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    refused("variant is None, there is diffusion_pytorch_model.fp16.safetensors")
    (unet / "diffusion_pytorch_model.fp16.safetensors").unlink()
    refused("there is no weight file")
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    for weight_map, message in (
        ({"a": "../vae/diffusion_pytorch_model.safetensors"}, "expected names of safetensors files beside it"),
        ({"a": "shard.bin"}, "expected names of safetensors files beside it, got 'shard.bin'"),
        ({"a": "b.safetensors"}, "lists b.safetensors, which is not there"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(message)
    (unet / "config.json").write_text("{")
    refused("config.json: not a readable JSON file")
    (unet / "config.json").write_text("[]")
    refused("config.json: expected a JSON object, got list")
    (unet / "config.json").unlink()
    refused("config.json: not a readable JSON file")


def test_pickles_are_refused(tmp_path):
    for name in ("sv3d.ckpt", "model.pt", "a.pth", "b.bin"):
        (tmp_path / name).write_bytes(b"\x80\x02")
        with pytest.raises(CheckpointError, match="refused, since loading a pickled checkpoint") as info:
            load_model(tmp_path / name)
        one_line(info)
    with pytest.raises(CheckpointError, match=r"a\.pth: refused"):
        load_model(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match="it is a pickled checkpoint under that name"):
        load_model(tmp_path / "x.safetensors")


# --- the Hub ----------------------------------------------------------------------------------------------------


def no_network(*args, **kwargs):
    pytest.fail("touched the network")


@pytest.mark.parametrize("path", ["./a/b", "/nowhere/at/all", "a/b/c", "~/nothing", "a/x.safetensors", "x.ckpt"])
def test_missing_local_paths_stay_local(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(CheckpointError, match=r"no such file or folder$") as info:
        load_model(path)
    one_line(info)


def test_existing_paths_stay_local(port, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    monkeypatch.chdir(port.parent)
    load_model("port")
    (port / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no model here: expected model_index.json, or one of sv3d_u"):
        load_model("port/empty")


def cached(cache, repo_id, source):
    """Lays `source` out as the Hub's cache would hold it."""
    root = cache / f"models--{repo_id.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    shutil.copytree(source, root / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("switch", ["argument", "environment"])
def test_cached_repositories_load_offline(port, tmp_path, small_defaults, monkeypatch, switch):
    cached(tmp_path / "cache", "someone/port", port)
    (tmp_path / "raw").mkdir()
    save_file(official_tensors()[0], tmp_path / "raw" / "sv3d_u.safetensors")
    cached(tmp_path / "cache", "someone/raw", tmp_path / "raw")
    offline = {"cache_dir": tmp_path / "cache", "local_files_only": switch == "argument"}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", switch == "environment")
    assert_same(load_model("someone/port", **offline), load_model(port))
    assert load_model("someone/raw", variant="u", **offline).config.unet.variant == "u"
    for name, variant, message in (
        ("someone/nothing", None, "not, or not wholly, in the local cache, and downloads are switched off"),
        ("not a name!", None, "not a valid name"),
        ("someone/raw", "fp16", "has no model_index.json, so expected 'u' or 'p', got 'fp16'"),
    ):
        with pytest.raises(CheckpointError, match=message) as info:
            load_model(name, variant=variant, **offline)
        one_line(info)


def test_only_what_is_asked_for_is_downloaded(port, tmp_path, small_defaults, monkeypatch):
    asked = []

    def download(repo_id, *, allow_patterns, ignore_patterns, **rest):
        asked.append((allow_patterns, ignore_patterns, rest))
        return str(port if repo_id == "a/port" else tmp_path / "raw")

    def wanted(files):
        patterns, ignored, _ = asked[-1]
        return set(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=patterns, ignore_patterns=ignored))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_model("a/port", token="t", revision="r", cache_dir="c", local_files_only=True)
    assert asked[-1][2] == {"token": "t", "revision": "r", "cache_dir": "c", "local_files_only": True}
    plain = ["unet/diffusion_pytorch_model.safetensors", "image_encoder/model-00001-of-00002.safetensors"]
    half = [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "image_encoder/model.fp16-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
    ]
    others = ["unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.bin", "sv3d_p.safetensors"]
    assert wanted(plain + half + others + ["unet/config.json"]) == {*plain, "unet/config.json"}
    with pytest.raises(CheckpointError, match="fp16"):
        load_model("a/port", variant="fp16")
    assert wanted(plain + half + others) == set(half)
    (tmp_path / "raw").mkdir()
    save_file(official_tensors()[0], tmp_path / "raw" / "sv3d_u.safetensors")
    load_model("stabilityai/sv3d", variant="u")
    assert wanted(["sv3d_u.safetensors", "sv3d_p.safetensors"]) == {"sv3d_u.safetensors"}
    with pytest.raises(CheckpointError, match="expected 'u', got 'p'"):
        load_model("stabilityai/sv3d", variant="p")
    assert wanted(["sv3d_u.safetensors", "sv3d_p.safetensors"]) == {"sv3d_p.safetensors"}


def hub_error(name):
    """One of huggingface_hub's exceptions with several lines, whatever its constructor wants."""
    kind = getattr(huggingface_hub.errors, name)
    error = kind.__new__(kind)
    Exception.__init__(error, "401 Client Error.\n\nMany lines\nof advice")
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error("GatedRepoError"), "a/b: gated: accept its licence at .*/a/b, then log in with 'hf auth login'"),
        (hub_error("RepositoryNotFoundError"), "a/b: no such file .* as a Hub repository: not found"),
        (hub_error("RevisionNotFoundError"), "revision: a/b has no 'v9'"),
        (hub_error("LocalEntryNotFoundError"), "in the local cache, and the Hub can't be reached"),
        (ConnectionError("reset\nby peer"), "a/b: the download failed: reset$"),
        (OSError(), "a/b: the download failed: OSError$"),
    ],
)
def test_errors_of_the_hub(monkeypatch, error, message):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match=message) as info:
        load_model("a/b", revision="v9")
    one_line(info)
    assert info.value.__suppress_context__


def test_bad_arguments(port):
    for arguments, message in (
        ({"dtype": torch.int8}, "dtype: expected float16, bfloat16, float32 or float64, got torch.int8"),
        ({"dtype": "fp16"}, "dtype: expected float16"),
        ({"dtype": {"clip": torch.float16}}, "dtype: expected the names unet, vae, image_encoder, got 'clip'"),
        ({"device": "gpu"}, "device: expected a device such as 'cpu' or 'cuda:0', got 'gpu'"),
        ({"device": f"cuda:{torch.cuda.device_count()}"}, "device: expected one of the"),
    ):
        with pytest.raises(ValueError, match=message) as info:
            load_model(port, **arguments)
        one_line(info)
