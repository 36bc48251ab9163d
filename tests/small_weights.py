"""Small models in every layout of a checkpoint, for tests of what reads and writes them."""

import json
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, UNetSpatioTemporalConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sv3d_fast.model.clip import CLIPImageTower
from sv3d_fast.model.config import CLIPConfig, ModelConfig, SamplerConfig, UNetConfig, VAEConfig
from sv3d_fast.model.names import clip_names, vae_names
from sv3d_fast.model.unet import SV3DUNet
from sv3d_fast.model.unet_names import official_names
from sv3d_fast.model.vae import SV3DVAE
from sv3d_fast.model.weights import SV3DModel

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


def build(config=SMALL, dtype=torch.float32, notice=None):
    torch.manual_seed(4)
    networks = SV3DUNet(config.unet), SV3DVAE(config.vae), CLIPImageTower(config.clip)
    return SV3DModel(config, *(n.to(dtype) for n in networks), notice=notice)


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
