"""TripoSR's files: the official layout, conversion, and everything that must be refused."""

import pickle
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from sv3d_fast.model.checkpoint import CheckpointError
from sv3d_fast.triposr import system
from sv3d_fast.triposr.config import TripoSRConfig, ViTConfig, config_yaml, read_config
from sv3d_fast.triposr.system import TripoSR

TINY = TripoSRConfig(
    image_size=32,
    vit=ViTConfig(width=24, layers=1, heads=3, mlp_width=20, image_size=48, patch=16),
    plane_size=3,
    channels=16,
    heads=2,
    head_width=12,  # a width of 24 inside, other than the channels
    layers=2,
    groups=4,
    plane_channels=5,
    neurons=8,
    hidden_layers=3,
)
OFFICIAL = """
cond_image_size: 512
image_tokenizer_cls: tsr.models.tokenizers.image.DINOSingleImageTokenizer
image_tokenizer:
  pretrained_model_name_or_path: "facebook/dino-vitb16"
tokenizer_cls: tsr.models.tokenizers.triplane.Triplane1DTokenizer
tokenizer:
  plane_size: 32
  num_channels: 1024
backbone_cls: tsr.models.transformer.transformer_1d.Transformer1D
backbone:
  in_channels: ${tokenizer.num_channels}
  num_attention_heads: 16
  attention_head_dim: 64
  num_layers: 16
  cross_attention_dim: 768
post_processor_cls: tsr.models.network_utils.TriplaneUpsampleNetwork
post_processor:
  in_channels: 1024
  out_channels: 40
decoder_cls: tsr.models.network_utils.NeRFMLP
decoder:
  in_channels: 120 # 3 * 40
  n_neurons: 64
  n_hidden_layers: 9
  activation: silu
renderer_cls: tsr.models.nerf_renderer.TriplaneNeRFRenderer
renderer:
  radius: 0.87 # slightly larger than 0.5 * sqrt(3)
  feature_reduction: concat
  density_activation: exp
  density_bias: -1.0
  num_samples_per_ray: 128
"""


@pytest.fixture
def tiny(tmp_path) -> tuple[Path, TripoSR]:
    """A folder with a tiny model, as a pickle, and the model."""
    torch.manual_seed(3)
    model = TripoSR(TINY).requires_grad_(False)
    (tmp_path / "config.yaml").write_text(config_yaml(TINY))
    torch.save(model.state_dict(), tmp_path / "model.ckpt")
    return tmp_path, model


def test_official_configuration(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(OFFICIAL)
    assert read_config(path) == TripoSRConfig()
    path.write_text(config_yaml(TripoSRConfig()))
    assert read_config(path) == TripoSRConfig()
    assert "vit" not in yaml.safe_load(path.read_text())  # the official class knows no such section
    path.write_text(config_yaml(TINY))
    assert read_config(path) == TINY


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tsr.models.network_utils.NeRFMLP", "os.system", "decoder_cls: expected tsr.models.network_utils.NeRFMLP"),
        ("facebook/dino-vitb16", "facebook/dinov2-base", "expected 'facebook/dino-vitb16'"),
        ("${tokenizer.num_channels}", "${tokenizer.nothing}", "backbone.in_channels: expected a value or a reference"),
        ("${tokenizer.num_channels}", "${oc.env:HOME}", "backbone.in_channels: expected a value or a reference"),
        ("${tokenizer.num_channels}", "512", "backbone.in_channels: expected 1024"),
        ("in_channels: 120", "in_channels: 40", "decoder.in_channels: expected 120"),
        ("density_activation: exp", "density_activation: softplus", "only 'exp' is supported"),
        ("  activation: silu\n", "", "decoder.activation: only 'silu' is supported, got 'relu'"),
        ("plane_size: 32", "plane_size: 0", "tokenizer.plane_size: expected at least 1"),
        ("plane_size: 32", "plane_size: many", "tokenizer.plane_size: expected int"),
        ("plane_size: 32", "plane_size: 32\n  plane_count: 4", "unknown settings: tokenizer.plane_count"),
        ("cond_image_size: 512", "cond_image_size: 500", "cond_image_size: expected a multiple"),
        ("radius: 0.87", "radius: -1.0", "radius: expected a positive number"),
        ("cond_image_size: 512", "cond_image_size: [", "not a readable YAML file"),
        ("cond_image_size: 512", "cond_image_size: !!python/object/apply:os.getcwd []", "not a readable YAML file"),
        ("num_layers: 16", "num_layers: 16\n  norm_num_groups: 48", "norm_num_groups: expected a divisor"),
    ],
)
def test_other_configurations_are_refused(tmp_path, old, new, message):
    assert old in OFFICIAL
    path = tmp_path / "config.yaml"
    path.write_text(OFFICIAL.replace(old, new))
    with pytest.raises(CheckpointError) as error:
        read_config(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_configurations_that_are_no_settings(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(CheckpointError, match="not a readable YAML"):
        read_config(path)
    path.write_text("- 1\n- 2\n")
    with pytest.raises(CheckpointError, match="expected YAML settings, got list"):
        read_config(path)


def test_saved_models_are_read_back(tiny, tmp_path):
    folder, model = tiny
    loaded = TripoSR.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "converted")
    again = TripoSR.from_pretrained(tmp_path / "converted", weight_name="model.safetensors")
    torch.save(model.state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)
    old = TripoSR.from_pretrained(str(folder), weight_name="old.pth", dtype=torch.float64)
    assert again.config == TINY
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
        assert torch.equal(tensor, again.state_dict()[name])
        assert torch.equal(tensor.double(), old.state_dict()[name])


def test_wrong_tensors_are_all_named_at_once(tiny):
    folder, model = tiny
    state = model.state_dict()
    del state["tokenizer.embeddings"]
    state["decoder.layers.0.bias"] = torch.zeros(9)
    state["decoder.layers.2.bias"] = torch.zeros(8, dtype=torch.int64)
    state["extra.weight"] = torch.zeros(2)
    torch.save(state, folder / "model.ckpt")
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors")
    for name in ("model.ckpt", "model.safetensors"):
        with pytest.raises(CheckpointError) as error:
            TripoSR.from_pretrained(folder, weight_name=name)
        message = str(error.value)
        assert "4 tensors don't fit" in message
        assert "missing tokenizer.embeddings" in message
        assert "decoder.layers.0.bias is (9,), expected (8,)" in message
        assert "decoder.layers.2.bias is of type" in message
        assert "unexpected extra.weight" in message
        assert "\n" not in message


def test_values_that_are_not_finite(tiny):
    folder, model = tiny
    model.backbone.proj_in.bias[3] = float("nan")
    torch.save(model.state_dict(), folder / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"backbone\.proj_in\.bias"):
        TripoSR.from_pretrained(folder)


class Bomb:
    """Unpickles by calling a function."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_code_in_a_pickle_is_refused_and_does_not_run(tiny, tmp_path, save):
    folder, model = tiny
    state = {**model.state_dict(), "bomb": Bomb(tmp_path / "exploded")}
    if save == "torch":
        torch.save(state, folder / "model.ckpt")
    else:
        (folder / "model.ckpt").write_bytes(pickle.dumps(state, protocol=2))
    with pytest.raises(CheckpointError, match="refused") as error:
        TripoSR.from_pretrained(folder)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_files_that_are_no_checkpoint(tiny):
    folder, model = tiny
    whole = (folder / "model.ckpt").read_bytes()
    cut_number = pickle.dumps({"weight": 1.5}, protocol=2).partition(b"G")[0] + b"X\0"  # a length of 4 bytes, cut
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:-30], b"PK\x03\x04" + bytes(50), cut_number):
        (folder / "model.ckpt").write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            TripoSR.from_pretrained(folder)
        assert str(folder / "model.ckpt") in str(error.value)
        assert "\n" not in str(error.value)
    for content in ({"state_dict": model.state_dict()}, [torch.zeros(1)], {1: torch.zeros(1)}):
        torch.save(content, folder / "model.ckpt")
        with pytest.raises(CheckpointError, match="expected a dictionary of tensors by name"):
            TripoSR.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="no such file"):
        TripoSR.from_pretrained(folder, weight_name="none.ckpt")
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors file or a checkpoint"):
        TripoSR.from_pretrained(folder, weight_name="config.yaml")
    with pytest.raises(CheckpointError, match="no such folder"):
        TripoSR.from_pretrained(folder / "nowhere")


def test_another_device_is_refused(tiny):
    with pytest.raises(ValueError, match="device: expected a device such as 'cpu' or 'cuda:0', got 'gpu'"):
        TripoSR.from_pretrained(tiny[0], device="gpu")
    with pytest.raises(ValueError, match="device: expected cpu, where the model is, got cuda"):
        tiny[1]([Image.new("RGB", (8, 8))], "cuda")


def test_a_name_that_is_no_folder_is_fetched_from_the_hub(tiny, monkeypatch):
    folder, model = tiny
    asked = []
    monkeypatch.setattr(system.hub, "fetch", lambda *arguments: asked.append(arguments) or folder)
    loaded = TripoSR.from_pretrained("somebody/TripoSR")
    assert asked == [("somebody/TripoSR", ["config.yaml", "model.ckpt"])]
    assert torch.equal(loaded.decoder.layers[0].weight, model.decoder.layers[0].weight)
