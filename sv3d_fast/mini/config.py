"""The configuration of the embedded model: SV3D_p's classes, 13.4 million parameters, 128² pictures."""

from pathlib import Path

from sv3d_fast.model.config import CLIPConfig, ModelConfig, SamplerConfig, UNetConfig, VAEConfig

WEIGHTS = Path(__file__).parent / "weights"  # as the package ships them
LATENT_CHANNELS = 8
CONTEXT = 128

MINI = ModelConfig(
    unet=UNetConfig(
        in_channels=2 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_channels=(96, 128),
        attention=(True, True),
        layers_per_block=1,
        head_channels=32,
        context_dim=CONTEXT,
    ),
    # the scale of the latents is folded into quant_conv and the decoder's conv_in after training
    vae=VAEConfig(block_channels=(32, 64, 96, 96), res_blocks=1, latent_channels=LATENT_CHANNELS, scaling=1.0),
    clip=CLIPConfig(width=64, layers=3, heads=2, mlp_width=256, patch=16, image_size=128, projection=CONTEXT),
    # 16² latents hold no signal beyond sigma 80, so no step is spent there, and a few steps none on fine noise
    sampler=SamplerConfig(steps=1, sigma_max=80.0, sigma_min=1.0, max_guidance=1.0),
    image_size=128,
)
