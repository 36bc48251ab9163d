"""TripoSR's fused networks against the plain ones: the same function in float64, near it in half precision."""

import copy

import pytest
import torch

from sv3d_fast.triposr import graphed
from sv3d_fast.triposr.config import TripoSRConfig, ViTConfig
from sv3d_fast.triposr.graphed import BATCHES, batches, fuse, why_not_fused
from sv3d_fast.triposr.system import TripoSR

CONFIGS = {
    "every size its own": TripoSRConfig(
        image_size=40,
        vit=ViTConfig(width=24, layers=2, heads=3, mlp_width=28, image_size=56, patch=8),  # 7 patches a side to 5
        plane_size=3,
        channels=20,
        heads=3,
        head_width=12,  # a width of 36 inside
        layers=3,
        groups=5,
        plane_channels=7,
        neurons=8,
        hidden_layers=2,
    ),
    "one layer, pictures of the trained size": TripoSRConfig(
        image_size=32,
        vit=ViTConfig(width=16, layers=1, heads=2, mlp_width=64, image_size=32, patch=16),
        plane_size=4,
        channels=32,
        heads=2,
        head_width=16,
        layers=1,
        groups=8,
        plane_channels=8,
        neurons=8,
        hidden_layers=2,
    ),
}
# what the kernels for a GPU take: heads of 64, tokens of no even number
GPU_CONFIG = TripoSRConfig(
    image_size=112,
    vit=ViTConfig(width=192, layers=3, heads=3, mlp_width=768),
    plane_size=12,
    channels=128,
    heads=2,
    layers=3,
    plane_channels=40,
    neurons=16,
    hidden_layers=2,
)
pytestmark = pytest.mark.usefixtures("one_thread")


def make(config: TripoSRConfig, dtype=torch.float64, device="cpu") -> TripoSR:
    """A model whose every parameter matters: norms and biases are random too."""
    generator = torch.Generator().manual_seed(0)
    model = TripoSR(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 1
            p.copy_(torch.randn(p.shape, generator=generator) * (fan_in**-0.5 if p.ndim > 1 else 0.3))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
            if "to_q" in name or "query" in name:
                p.mul_(3)  # attention that tells tokens apart
    return model.to(device, dtype).eval().requires_grad_(False)


def pictures(config: TripoSRConfig, count: int, dtype=torch.float64, device="cpu") -> torch.Tensor:
    """Grey around an object of noise, as levels of 8 bits."""
    generator = torch.Generator().manual_seed(1)
    size = config.image_size
    pixels = torch.full((count, 3, size, size), 0.5, dtype=torch.float64)
    inner = slice(size // 8, -size // 8)
    pixels[:, :, inner, inner] = torch.rand(pixels[:, :, inner, inner].shape, generator=generator, dtype=torch.float64)
    return ((pixels * 255).round() / 255).to(device, dtype)


def relative(a, b) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("count", [1, 3])
def test_is_the_same_function_in_float64(config, count):
    model, pixels = make(config), pictures(config, count)
    expected = copy.deepcopy(model).plain(pixels)
    codes = fuse(model)(pixels)
    assert codes.shape == expected.shape == (count, 3, config.plane_channels, *[2 * config.plane_size] * 2)
    assert codes.is_contiguous()
    assert relative(codes, expected) <= 1e-12
    assert relative(model.plain(pixels), expected) <= 1e-12  # on the memory that both share now
    if count > 1:
        assert relative(codes[1], codes[0]) > 1e-2  # the picture matters


def test_leaves_the_state_as_it_was():
    model = make(CONFIGS["every size its own"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fuse(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_weights_are_kept_once():
    model = make(CONFIGS["every size its own"])
    network = fuse(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    large = [name for name, b in network.named_buffers() if b.untyped_storage().data_ptr() not in own and b.ndim > 1]
    assert set(large) == {
        "start", "queries", "constant", "to_planes.weight", "image_tokenizer.tokens",
        "image_tokenizer.projection.weight",
    }  # fmt: skip
    bytes_of = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(bytes_of.values()) == sum(p.numel() * p.element_size() for p in model.parameters())


def test_a_second_network_of_the_same_model_follows_its_weights():
    config = CONFIGS["every size its own"]
    model, pixels = make(config), pictures(config, 1)
    first = fuse(model)(pixels)
    with torch.no_grad():
        model.backbone.transformer_blocks[1].attn1.to_k.weight.mul_(-2)
    second = fuse(model)(pixels)
    assert relative(second, first) > 1e-3
    assert relative(second, model.plain(pixels)) <= 1e-12


def test_gated_projections_have_the_official_order_in_state_dicts():
    model = make(CONFIGS["one layer, pictures of the trained size"])
    name = "backbone.transformer_blocks.0.ff.net.0"
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    state = model.state_dict()
    value, gate = (x @ state[f"{name}.proj.weight"].T + state[f"{name}.proj.bias"]).chunk(2, 1)
    expected = value * torch.nn.functional.gelu(gate)
    assert relative(model.get_submodule(name)(x), expected) <= 1e-14
    other = TripoSR(model.config).double().requires_grad_(False)
    other.load_state_dict(state)
    assert relative(other.get_submodule(name)(x), expected) <= 1e-14


@pytest.mark.parametrize("count", range(1, 21))
def test_any_number_of_pictures_is_a_sum_of_batches(count):
    assert sum(batches(count)) == count
    assert set(batches(count)) <= set(BATCHES)
    assert batches(count) == sorted(batches(count), reverse=True)


def test_why_a_model_is_not_fused():
    model = make(CONFIGS["one layer, pictures of the trained size"], torch.float32)
    assert why_not_fused(model) == ["needs a GPU", "needs 16-bit weights, got torch.float32"]
    model.half()
    assert why_not_fused(model) == ["needs a GPU"]
    model.decoder.float()
    assert why_not_fused(model) == ["needs a GPU"]  # the decoder stays as it is
    model.backbone.proj_in.float()
    model.requires_grad_()
    assert why_not_fused(model) == [
        "needs a GPU",
        "needs all weights on one device and of one type",
        "forward only, and a gradient is asked for",
    ]
    with torch.no_grad():
        assert len(why_not_fused(model)) == 2


def test_precision_follows_the_device_unless_given(tmp_path):
    make(CONFIGS["one layer, pictures of the trained size"], torch.float32).save_pretrained(tmp_path)
    assert TripoSR.from_pretrained(tmp_path).tokenizer.embeddings.dtype == torch.float32
    half = TripoSR.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.tokenizer.embeddings.dtype == torch.bfloat16


@pytest.mark.gpu
def test_a_gpu_has_half_precision_unless_given(tmp_path):
    make(GPU_CONFIG, torch.float32).save_pretrained(tmp_path)
    assert TripoSR.from_pretrained(tmp_path, device="cuda").tokenizer.embeddings.dtype == torch.float16
    given = TripoSR.from_pretrained(tmp_path, device="cuda", dtype=torch.float32)
    assert given.tokenizer.embeddings.dtype == torch.float32


def images(count: int) -> list[torch.Tensor]:
    return list(pictures(GPU_CONFIG, count, torch.float32).permute(0, 2, 3, 1))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 3e-3), (torch.bfloat16, 2.4e-2)])
def test_is_near_the_plain_networks_in_float32(dtype, bound):
    half = make(GPU_CONFIG, dtype, "cuda")
    wide = copy.deepcopy(half).float()  # the weights that both have
    expected = wide(images(2))
    assert why_not_fused(half) == []
    codes = half(images(2))
    assert codes.dtype == dtype
    assert relative(codes, expected) <= bound
    assert relative(codes, expected) <= 1.2 * relative(half.plain(pictures(GPU_CONFIG, 2, dtype, "cuda")), expected)


@pytest.mark.gpu
def test_same_bits_twice_and_batches_are_their_pictures():
    model = make(GPU_CONFIG, torch.float16, "cuda")
    three = model(images(3))
    first = three.clone()
    singles = [model(image) for image in images(3)]
    assert torch.equal(three, first)  # a later run leaves what an earlier one gave
    assert torch.equal(model(images(3)), first)
    for single, codes in zip(singles, three, strict=True):
        assert relative(single[0], codes) <= 2e-3
    assert sorted(graphed.graphed(model).graphs) == [1, 2]


@pytest.mark.gpu
def test_graphs_follow_the_weights_and_go_with_the_model():
    model = make(GPU_CONFIG, torch.float16, "cuda")
    with torch.inference_mode():
        before = model(images(1))
    assert relative(model(images(1)), before) == 0
    with torch.no_grad():
        model.post_processor.upsample.weight.mul_(2)
        model.post_processor.upsample.bias.mul_(2)
    assert relative(model(images(1)), 2 * before) <= 2e-3
    known = len(graphed._graphed)
    del model
    assert len(graphed._graphed) == known - 1
