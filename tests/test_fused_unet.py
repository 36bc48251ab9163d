"""The fused UNet against the plain one: the same function in float64, no less exact in 16 bits."""

import pytest
import torch

from bench.engine import CONFIG, randomised
from sv3d_fast.kernels import tiles
from sv3d_fast.kernels.hopper_gemm import HopperTiles
from sv3d_fast.model.config import UNetConfig
from sv3d_fast.model.fused_unet import FusedUNet
from sv3d_fast.model.unet import SV3DUNet

CONFIGS = {
    "p, two levels": UNetConfig(
        block_channels=(32, 64), attention=(True, True), layers_per_block=1, head_channels=32, context_dim=24
    ),
    "u, three levels, no attention in the last": UNetConfig(
        block_channels=(32, 64, 64), attention=(True, False, False), head_channels=16, context_dim=40, vector_dim=256
    ),
}


def make(config: UNetConfig, dtype=torch.float64, device="cpu"):
    """A network whose every parameter matters: norms, biases and blends are random too."""
    generator = torch.Generator().manual_seed(0)
    unet = SV3DUNet(config)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 1
            p.copy_(torch.randn(p.shape, generator=generator) * (fan_in**-0.5 if p.ndim > 1 else 0.3))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return unet.to(device, dtype).eval()


def inputs(config: UNetConfig, b: int, twins: int, t: int, h: int, w: int, dtype=torch.float64, device="cpu"):
    """Noisy latents of b orbits, which `twins` halves share, and the conditioning of b * twins."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    n = b * twins
    noisy = draw(b, t, config.out_channels, h, w)
    return (
        noisy,
        draw(n, config.in_channels - config.out_channels, h, w),
        draw(n, 1, config.context_dim),
        draw(n, t, config.vector_dim),
    )


def plain(unet, c_noise, noisy, image, context, vector):
    twins = len(image) // len(noisy)
    together = torch.cat([torch.cat([noisy] * twins), image[:, None].expand(-1, noisy.shape[1], -1, -1, -1)], 2)
    with torch.no_grad():
        return unet(together, c_noise, context, vector)


def step(network, run, index, noisy):
    with torch.no_grad():
        made = network(noisy.permute(0, 1, 3, 4, 2).contiguous(), run.rows[index], run)
    return made.permute(0, 1, 4, 2, 3)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("b", "twins", "t", "h", "w"), [(1, 2, 5, 8, 12), (2, 1, 1, 4, 4), (3, 2, 3, 4, 8)])
def test_is_the_same_function_in_float64(config, b, twins, t, h, w):
    unet = make(config)
    noisy, image, context, vector = inputs(config, b, twins, t, h, w)
    network, levels = FusedUNet(unet), [0.3, -0.7]
    run = network.prepare(levels, context, vector, image)
    for index, c_noise in enumerate(levels):
        expected = plain(unet, c_noise, noisy, image, context, vector)
        assert relative(step(network, run, index, noisy), expected) <= 1e-12


def test_leaves_the_network_as_it_was():
    config = CONFIGS["p, two levels"]
    unet = make(config)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    FusedUNet(unet)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert all(p.requires_grad for p in unet.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 3e-3), (torch.bfloat16, 2.4e-2)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_is_as_exact_as_the_plain_network_in_half_precision(config, dtype, bound):
    operands = inputs(config, 1, 2, 21, 24, 16, dtype, "cuda")
    wide = make(config, torch.float32, "cuda").to(dtype).float()  # the weights that both have
    expected = plain(wide, 0.3, *(x.float() for x in operands))
    half = make(config, dtype, "cuda")
    network = FusedUNet(half)
    run = network.prepare([0.3], operands[2], operands[3], operands[1])
    ours = relative(step(network, run, 0, operands[0]), expected)
    assert ours <= 1.2 * relative(plain(half, 0.3, *operands), expected)
    assert ours <= bound


@pytest.mark.gpu
@torch.no_grad()
def test_the_hopper_product_adds_no_error_at_official_widths(monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = SV3DUNet(CONFIG)
    unet = randomised(unet, torch.device("cuda"), torch.float16)
    unet.load_state_dict(unet.state_dict())  # lays convolution weights out
    operands = inputs(CONFIG, 1, 2, 21, 16, 16, torch.float16, "cuda")
    network, asked, got = FusedUNet(unet), set(), {}

    def everywhere(kind, m, n, k):
        asked.add(kind)
        return HopperTiles(64, 256, resident=True) if kind == "geglu" and k == 320 else HopperTiles(128, 192)

    for name, choice in {"none": lambda *shape: None, "all": everywhere, "table": tiles.choose_hopper}.items():
        monkeypatch.setattr(tiles, "choose_hopper", choice)
        run = network.prepare([0.3], operands[2], operands[3], operands[1])
        got[name] = step(network, run, 0, operands[0])
    expected = plain(unet.float(), 0.3, *(x.float() for x in operands))
    errors = {name: relative(made, expected) for name, made in got.items()}
    print(errors)
    assert asked == {"linear", "geglu", "temporal_conv"}
    assert not torch.equal(got["all"], got["none"])
    assert max(errors["all"], errors["table"]) <= 1.05 * errors["none"], errors
