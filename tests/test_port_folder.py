"""Folders of diffusers and of its port of SV3D: what is read of them, and each error as one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_weights import assert_same, one_line, port_folder

from sv3d_fast.model import weights
from sv3d_fast.model.checkpoint import CheckpointError
from sv3d_fast.model.config import CLIPConfig, SamplerConfig, UNetConfig, VAEConfig
from sv3d_fast.model.weights import load_model, save_model

pytestmark = [
    # thousands of tiny tensors: handing each to several threads costs more than it saves
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Stable Video 3D weights are licensed"),
]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("port")
    port_folder(folder)
    return folder


@pytest.fixture
def port(original, tmp_path):
    return shutil.copytree(original, tmp_path / "port")


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
