"""The fused decoder against the plain one."""

import pytest
import torch

from sv3d_fast.engine import decoding
from sv3d_fast.events import finish
from sv3d_fast.model.config import VAEConfig
from sv3d_fast.model.fused_vae import FusedDecoder, fused_decoder, why_not_fused
from sv3d_fast.model.vae import SV3DVAE

CONFIG = VAEConfig(block_channels=(32, 64, 96), res_blocks=1, latent_channels=3)


def randomised(vae: SV3DVAE) -> SV3DVAE:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vae.parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return vae.eval()


@pytest.mark.parametrize("post_quant_conv", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 3, 1, 4)])
def test_it_is_the_plain_decoder(shape, post_quant_conv):
    vae = randomised(SV3DVAE(CONFIG, post_quant_conv=post_quant_conv).double())
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = vae.decode(latents)
    got = FusedDecoder(vae)(latents)
    assert got.shape == expected.shape == (shape[0], 3, 4 * shape[2], 4 * shape[3])
    assert (got - expected).norm() / expected.norm() < 1e-12


def test_it_follows_the_weights():
    vae = randomised(SV3DVAE(CONFIG))
    first = fused_decoder(vae)
    assert fused_decoder(vae) is first
    with torch.no_grad():
        vae.decoder.mid_block.attentions[0].to_q.weight.mul_(2)
    assert fused_decoder(vae) is not first


def test_a_cpu_and_single_precision_decode_plainly():
    vae = SV3DVAE(CONFIG)
    assert why_not_fused(vae) == ["needs a GPU", "needs 16-bit weights, got torch.float32"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_gpu(dtype):
    vae = randomised(SV3DVAE(CONFIG)).cuda()
    latents = torch.randn(3, 3, 9, 8, generator=torch.Generator().manual_seed(1)).cuda()
    expected = finish(decoding(vae, latents, chunk=3))
    vae = vae.to(dtype=dtype, memory_format=torch.channels_last)
    assert not why_not_fused(vae)
    got = finish(decoding(vae, latents, chunk=2))
    assert (got - expected).norm() / expected.norm() < (2e-2 if dtype == torch.bfloat16 else 3e-3)
    assert torch.equal(got, finish(decoding(vae, latents, chunk=2)))
    alone = finish(decoding(vae, latents, chunk=1))  # cuDNN may sum in another order
    assert (got - alone).norm() / expected.norm() < (2e-2 if dtype == torch.bfloat16 else 3e-3)
