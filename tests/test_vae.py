"""The autoencoder against the official outputs (golden) and against diffusers' AutoencoderKL."""

import importlib.util

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from sv3d_fast.model.config import VAEConfig
from sv3d_fast.model.names import vae_names
from sv3d_fast.model.vae import SV3DVAE


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


def reference(config: VAEConfig) -> AutoencoderKL:
    levels = len(config.block_channels)
    return AutoencoderKL(
        block_out_channels=config.block_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=config.res_blocks,
        latent_channels=config.latent_channels,
        use_post_quant_conv=False,
    )


def pair(config, seed=0):
    torch.manual_seed(seed)
    theirs = reference(config).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():  # norms and biases away from 1 and 0, or a swapped pair would not show
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    ours = SV3DVAE(config).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def golden_errors(golden) -> tuple[float, float]:
    """Relative errors of the encoder's mode and of the decoder on the golden case."""
    spec = importlib.util.spec_from_file_location("filling", golden / "filling.py")
    filling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(filling)
    config = VAEConfig(block_channels=(32, 64, 128, 128))
    weights = filling.state_dict(golden / "vae_small.json")
    names = vae_names(config)
    assert {source.name for source in names.values()} == set(weights)
    vae = SV3DVAE(config)
    shapes = {k: v.shape for k, v in vae.state_dict().items()}
    vae.load_state_dict({k: s.take(torch.from_numpy(weights[s.name]), shapes[k]) for k, s in names.items()})
    case = {k: torch.from_numpy(v) for k, v in np.load(golden / "vae_small.npz").items()}
    with torch.no_grad():
        return float(rel(vae.encode(case["image"]), case["mode"])), float(
            rel(vae.decode(case["latents"]), case["decoded"])
        )


def test_golden(golden):
    encoder, decoder = golden_errors(golden)
    assert encoder <= 1e-5
    assert decoder <= 1e-5


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (VAEConfig(block_channels=(32, 64, 64)), (20, 36)),
        (VAEConfig(block_channels=(64, 32), res_blocks=1, latent_channels=3), (6, 2)),
        (VAEConfig(block_channels=(32,), res_blocks=3, latent_channels=8), (5, 7)),
        (VAEConfig(block_channels=(32, 32, 64, 96)), (8, 24)),
    ],
)
def test_agrees_with_diffusers(config, size):
    ours, theirs = pair(config)
    f = config.factor
    image = torch.rand(3, 3, *size, dtype=torch.float64) * 2 - 1
    latents = torch.randn(2, config.latent_channels, size[0] // f, size[1] // f, dtype=torch.float64)
    with torch.no_grad():
        posterior = theirs.encode(image).latent_dist
        mean, logvar = ours.moments(image)
        assert rel(mean, posterior.mode()) <= 1e-12
        assert rel(logvar, posterior.logvar) <= 1e-12
        assert torch.equal(ours.encode(image), mean)
        assert rel(ours.decode(latents), theirs.decode(latents).sample) <= 1e-12


def test_gradients_agree_with_diffusers():
    config = VAEConfig(block_channels=(32, 64))
    ours, theirs = pair(config)
    image = torch.rand(2, 3, 10, 6, dtype=torch.float64) * 2 - 1
    mean, logvar = ours.moments(image)
    ((ours.decode(mean) - image).square().mean() + logvar.exp().mean()).backward()
    posterior = theirs.encode(image).latent_dist
    loss = (theirs.decode(posterior.mean).sample - image).square().mean() + posterior.logvar.exp().mean()
    loss.backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        # absolute: biases that a norm of one-channel groups or a softmax removes have a gradient of exactly zero
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-9, atol=1e-13, msg=name)


def test_frames_do_not_meet():
    vae = SV3DVAE(VAEConfig(block_channels=(32, 64))).eval()
    latents = torch.randn(5, 4, 6, 4)
    with torch.no_grad():
        whole = vae.decode(latents)
        for i in range(5):
            assert rel(vae.decode(latents[i : i + 1]), whole[i : i + 1]) <= 1e-5


def test_half_precision_stays_close():
    ours, _ = pair(VAEConfig(block_channels=(32, 64)))
    latents = torch.randn(1, 4, 6, 4)
    with torch.no_grad():
        exact = ours.float().decode(latents)
        assert rel(ours.bfloat16().decode(latents.bfloat16()).float(), exact) <= 0.05


def test_full_parameter_counts():
    with torch.device("meta"):
        vae = SV3DVAE(VAEConfig())

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert (count(vae.encoder), count(vae.decoder), count(vae.quant_conv)) == (34_163_592, 49_490_179, 72)
    assert count(vae) == 83_653_863 - 20  # the reference total includes a post_quant_conv


def test_errors():
    with pytest.raises(ValueError, match=r"block_channels: expected multiples of 32, got \(32, 48\)"):
        SV3DVAE(VAEConfig(block_channels=(32, 48)))
    with pytest.raises(ValueError, match="block_channels"):
        SV3DVAE(VAEConfig(block_channels=()))
    with pytest.raises(ValueError, match="latent_channels"):
        SV3DVAE(VAEConfig(block_channels=(32,), latent_channels=0))
    vae = SV3DVAE(VAEConfig(block_channels=(32, 32)))
    for shape in ((1, 3, 5, 4), (1, 4, 4, 4), (3, 4, 4)):
        with pytest.raises(ValueError, match=r"image: expected \(N, 3, H, W\) with sides multiples of 2"):
            vae.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"latents: expected \(N, 4, h, w\), got \(1, 3, 4, 4\)"):
        vae.decode(torch.zeros(1, 3, 4, 4))
