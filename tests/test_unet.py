"""The UNet against the official implementation (golden cases), against diffusers, and against its own definitions."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sv3d_fast.kernels.temporal_attention import temporal_attention
from sv3d_fast.model import blocks
from sv3d_fast.model.attention import SingleTokenAttention
from sv3d_fast.model.config import UNetConfig
from sv3d_fast.model.unet import SV3DUNet, sinusoidal
from sv3d_fast.model.unet_names import official_names

sys.path.insert(0, str(Path(__file__).parent / "golden"))
from filling import fill

SMALL = UNetConfig(
    block_channels=(32, 64),
    attention=(True, False),
    head_channels=32,
    context_dim=24,
    vector_dim=256,
    layers_per_block=1,
)


def relative(ours, reference) -> float:
    ours, reference = (torch.as_tensor(t).detach().cpu().double() for t in (ours, reference))
    return float((ours - reference).norm() / reference.norm())


def inputs(config: UNetConfig, batch: int, frames: int, h: int, w: int, dtype=torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    latents, context = draw(batch, frames, config.in_channels, h, w), draw(batch, 1, config.context_dim)
    return latents, 0.37, context, draw(batch, frames, config.vector_dim)


def golden_error(folder: Path, case: str) -> float:
    """Relative error of the UNet on a golden case; weights are made one by one, so that memory holds them once."""
    spec, data = json.loads((folder / f"{case}.json").read_text()), np.load(folder / f"{case}.npz")
    given, batch, frames = spec["config"], spec["batch"], spec["frames"]
    config = UNetConfig(
        block_channels=tuple(given["model_channels"] * m for m in given["channel_mult"]),
        head_channels=given["head_channels"],
        context_dim=given["context_dim"],
        vector_dim=given["adm_in_channels"],
    )
    names = official_names(config)
    with torch.device("meta"):
        unet = SV3DUNet(config)
    tensors = spec["tensors"].items()
    state = {names[name]: torch.from_numpy(fill(name, shape, kind, spec["seed"])) for name, (shape, kind) in tensors}
    unet.load_state_dict(state, assign=True)
    latents = np.concatenate([data["latents"], data["image_latents"]], axis=1)
    latents = torch.from_numpy(latents).unflatten(0, (batch, frames))
    vector = torch.from_numpy(data["vector"]).unflatten(0, (batch, frames))
    with torch.no_grad():
        output = unet(latents, spec["c_noise"], torch.from_numpy(data["image_embedding"]), vector)
    return relative(output.flatten(0, 1), data["output"])


@pytest.mark.parametrize("case", ["unet_p_small", "unet_u_small"])
def test_golden(golden, case):
    assert golden_error(golden, case) <= 1e-5


@pytest.mark.slow
def test_golden_full_size(golden):
    assert golden_error(golden, "unet_p_full") <= 1e-5


def test_official_names_and_shapes_are_those_of_the_checkpoint(golden):
    """The golden cases carry the official names and shapes, written by the official implementation."""
    tensors = json.loads((golden / "unet_p_full.json").read_text())["tensors"]
    names = official_names(UNetConfig())
    with torch.device("meta"):
        ours = SV3DUNet(UNetConfig()).state_dict()
    assert set(names) == set(tensors)
    assert sorted(names.values()) == sorted(ours)  # a bijection: as many values as names, none twice
    for official, name in names.items():
        assert tuple(tensors[official][0]) == ours[name].shape, official


@pytest.mark.parametrize("levels", [2, 3])
def test_official_names_of_other_depths(levels):
    config = UNetConfig(block_channels=(32,) * levels, attention=(True,) * levels, head_channels=32)
    names = official_names(config)
    with torch.device("meta"):
        assert sorted(names.values()) == sorted(SV3DUNet(config).state_dict())
    last = 3 * levels - 1
    assert names["input_blocks.3.0.op.weight"] == "down_blocks.0.downsamplers.0.conv.weight"
    assert names["output_blocks.2.2.conv.weight"] == "up_blocks.0.upsamplers.0.conv.weight"
    assert names[f"output_blocks.{last}.1.time_stack.0.ff_in.net.0.proj.bias"] == (
        f"up_blocks.{levels - 1}.attentions.2.temporal_transformer_blocks.0.ff_in.net.0.proj.bias"
    )
    assert f"input_blocks.{3 * levels}.0.op.weight" not in names


@pytest.mark.parametrize(("vector_dim", "parameters"), [(256, 1_523_967_722), (1280, 1_525_278_442)])
def test_parameter_counts(vector_dim, parameters):
    with torch.device("meta"):
        unet = SV3DUNet(UNetConfig(vector_dim=vector_dim))
    assert len(unet.state_dict()) == 1428
    assert sum(p.numel() for p in unet.parameters()) == parameters


@pytest.fixture(scope="module")
def diffusers_case():
    """A small diffusers UNet in float64, its inputs and its output: a u model, for which the stock class is enough."""
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(0)
    config = UNetConfig(block_channels=(32, 64, 64, 64), head_channels=32, context_dim=24, vector_dim=256)
    kinds = ["CrossAttn" if attention else "" for attention in config.attention]
    theirs = UNetSpatioTemporalConditionModel(
        block_out_channels=config.block_channels,
        down_block_types=tuple(f"{kind}DownBlockSpatioTemporal" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlockSpatioTemporal" for kind in reversed(kinds)),
        cross_attention_dim=config.context_dim,
        num_attention_heads=tuple(c // config.head_channels for c in config.block_channels),
        projection_class_embeddings_input_dim=256,
    ).double()
    latents, c_noise, context, _ = inputs(config, 2, 5, 16, 8, torch.float64)
    cond_aug = torch.full((2, 1), 1e-5, dtype=torch.float64)
    with torch.no_grad():
        output = theirs(latents, torch.tensor(c_noise), context, cond_aug).sample
    vector = sinusoidal(cond_aug, 256).expand(2, 5, 256)
    return config, theirs.state_dict(), (latents, c_noise, context, vector), output


def with_eps(config: UNetConfig, norm_eps: str) -> UNetConfig:
    return UNetConfig(**{**vars(config), "norm_eps": norm_eps})


def test_equals_diffusers_with_its_eps(diffusers_case):
    config, weights, arguments, expected = diffusers_case
    unet = SV3DUNet(with_eps(config, "diffusers")).double()
    unet.load_state_dict(weights)
    with torch.no_grad():
        assert relative(unet(*arguments), expected) <= 1e-12


def test_official_eps_differs_a_little_from_diffusers(diffusers_case):
    config, weights, arguments, expected = diffusers_case
    unet = SV3DUNet(with_eps(config, "official")).double()
    unet.load_state_dict(weights, assign=True)
    with torch.no_grad():
        assert 1e-7 < relative(unet(*arguments), expected) < 1e-3


def test_single_token_attention_equals_full_attention():
    torch.manual_seed(0)
    layer, heads = SingleTokenAttention(64, 24).double(), 2
    x, context = torch.randn(3, 7, 64, dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64)

    def split(tokens):
        return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = split(layer.to_q(x)), split(layer.to_k(context[:, None])), split(layer.to_v(context[:, None]))
    full = layer.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    assert relative(layer(context)[:, None].expand_as(full), full) <= 1e-14


@pytest.mark.parametrize("implementation", ["reference", pytest.param("sdpa", marks=pytest.mark.gpu)])
def test_temporal_attention(implementation):
    device = "cpu" if implementation == "reference" else "cuda"
    for qkv, heads in temporal_attention.examples(device):
        q, k, v = qkv.double().unflatten(-1, (3, heads, -1)).unbind(3)
        scores = torch.einsum("bsphd,btphd->bphst", q, k) / q.shape[-1] ** 0.5
        expected = torch.einsum("bphst,btphd->bsphd", scores.softmax(-1), v).flatten(3)
        result = temporal_attention(qkv, heads, implementation=implementation)
        assert result.shape == expected.shape
        assert relative(result, expected) <= temporal_attention.tolerance


@pytest.mark.parametrize("shape", [(2, 5, 3, 7, 64), (1, 1, 1, 1, 32), (2, 3, 1, 2, 32)])
def test_temporal_conv_equals_conv3d(shape):
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(shape[-1], 2 * shape[-1], (3, 1, 1), padding=(1, 0, 0)).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = conv(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    assert relative(blocks.temporal_conv(x, conv), expected) <= 1e-14


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_keeps_statistics_in_float32(device, dtype):
    """A mean of 4 deviations: rounding the sums to 16 bits would change the variance by several per cent."""
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(32, 64, device=device, dtype=dtype)
    x = (4 + torch.randn(2, 5, 21, 64)).to(device, dtype)
    wide = x.double().permute(0, 3, 1, 2)
    expected = F.group_norm(wide, 32, norm.weight.double(), norm.bias.double(), norm.eps).permute(0, 2, 3, 1)
    result = blocks.group_norm(x, norm)
    assert result.is_contiguous()
    assert relative(result, expected) <= (1e-5 if dtype == torch.float32 else 4e-3)


def test_sinusoidal():
    values = torch.tensor([[0.0, 1.5], [-3.0, 20.0]])
    frequencies = 10000 ** (-np.arange(4) / 4)
    angles = values.double().numpy()[..., None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    result = sinusoidal(values.double(), 8)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=2e-6)
    with pytest.raises(ValueError, match="dim"):
        sinusoidal(values, 7)


def test_c_noise_per_orbit_equals_each_alone():
    torch.manual_seed(0)
    unet = SV3DUNet(SMALL).double()
    latents, _, context, vector = inputs(SMALL, 2, 3, 4, 6, torch.float64)
    with torch.no_grad():
        both = unet(latents, torch.tensor([0.9, -1.2]), context, vector)
        for i, c_noise in enumerate([torch.tensor(0.9), torch.tensor([-1.2])]):
            one = unet(latents[i : i + 1], c_noise, context[i : i + 1], vector[i : i + 1])
            assert relative(both[i : i + 1], one) <= 1e-12


def test_gradients_are_finite_and_reach_every_used_parameter():
    torch.manual_seed(0)
    unet = SV3DUNet(SMALL)
    unet(*inputs(SMALL, 2, 3, 4, 2)).square().mean().backward()
    for name, parameter in unet.named_parameters():
        idle = any(part in name for part in ("attn2.to_q", "attn2.to_k", "transformer_blocks.0.norm2"))
        assert (parameter.grad is None) == idle, name
        assert idle or (parameter.grad.isfinite().all() and parameter.grad.any()), name


def test_gradient_equals_the_difference_quotient():
    torch.manual_seed(0)
    unet = SV3DUNet(SMALL).double()
    latents, c_noise, context, vector = inputs(SMALL, 1, 3, 4, 8, torch.float64)
    direction = torch.randn_like(latents)
    latents.requires_grad_()
    unet(latents, c_noise, context, vector).square().sum().backward()
    with torch.no_grad():
        up, down = (unet(latents + e * direction, c_noise, context, vector).square().sum() for e in (1e-5, -1e-5))
    assert float((latents.grad * direction).sum()) == pytest.approx(float(up - down) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast_to_bfloat16_is_close(device):
    torch.manual_seed(0)
    unet = SV3DUNet(SMALL).to(device)
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in inputs(SMALL, 1, 5, 4, 4)]
    expected = unet(*arguments)
    with torch.autocast(device, torch.bfloat16):
        output = unet(*arguments)
    output.float().square().mean().backward()
    assert relative(output, expected) < 3e-2
    assert all(p.grad.isfinite().all() for p in unet.parameters() if p.grad is not None)


def test_half_precision_parameters_take_float32_inputs():
    torch.manual_seed(0)
    unet = SV3DUNet(SMALL)
    with torch.no_grad():
        expected = unet(*inputs(SMALL, 1, 3, 4, 4))
        output = unet.bfloat16()(*inputs(SMALL, 1, 3, 4, 4))
    assert output.dtype == torch.bfloat16
    assert relative(output, expected) < 3e-2


@pytest.mark.gpu
def test_forward_is_capturable_and_equal_on_cuda():
    torch.manual_seed(0)
    unet = SV3DUNet(SMALL).double()
    latents, c_noise, context, vector = inputs(SMALL, 2, 5, 4, 6, torch.float64)
    with torch.no_grad():
        expected = unet(latents, c_noise, context, vector)
        unet, arguments = unet.cuda(), (latents.cuda(), c_noise, context.cuda(), vector.cuda())
        assert relative(unet(*arguments), expected) <= 1e-12
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = unet(*arguments)
        graph.replay()
        assert relative(output, expected) <= 1e-12


@pytest.mark.parametrize("size", [(5, 4), (4, 7)])
def test_odd_latents_raise(size):
    with pytest.raises(ValueError, match="divisible by 2"):
        SV3DUNet(SMALL)(*inputs(SMALL, 1, 2, *size))


@pytest.mark.parametrize(("argument", "index"), [("latents", 0), ("context", 2), ("vector", 3)])
def test_wrong_shapes_raise(argument, index):
    arguments = list(inputs(SMALL, 1, 2, 4, 4))
    arguments[index] = torch.cat([arguments[index]] * 2, dim=2)
    with pytest.raises(ValueError, match=argument):
        SV3DUNet(SMALL)(*arguments)


def test_wrong_number_of_c_noise_raises():
    latents, _, context, vector = inputs(SMALL, 2, 2, 4, 4)
    with pytest.raises(ValueError, match="c_noise"):
        SV3DUNet(SMALL)(latents, torch.zeros(3), context, vector)


def test_compiles_as_one_graph():
    torch.manual_seed(0)
    config = UNetConfig(block_channels=(32,), attention=(True,), head_channels=32, vector_dim=256, layers_per_block=1)
    unet, arguments = SV3DUNet(config), inputs(config, 1, 3, 4, 4)
    with torch.no_grad():
        compiled = torch.compile(unet, fullgraph=True, backend="eager")
        assert relative(compiled(*arguments), unet(*arguments)) <= 1e-6


def test_widths_that_do_not_divide_raise():
    with pytest.raises(ValueError, match="head_channels"):
        SV3DUNet(UNetConfig(block_channels=(32, 64), attention=(True, True), head_channels=64))
    with pytest.raises(ValueError, match="block_channels"):
        SV3DUNet(UNetConfig(block_channels=(48,), attention=(False,), head_channels=16))
