"""Tensor names of the official checkpoints (generative-models) for the autoencoder and the CLIP image tower.

Tables are written out from a configuration, so that a tensor that is missing or too many shows before any is read.
"""

from dataclasses import dataclass

import torch

from .config import CLIPConfig, VAEConfig

UNET_PREFIX = "model.diffusion_model."
ENCODER_PREFIX = "conditioner.embedders.1.encoder."
DECODER_PREFIX = "first_stage_model."
CLIP_PREFIX = "conditioner.embedders.0.open_clip.model."


@dataclass(frozen=True)
class Source:
    """Where a tensor of ours is in a checkpoint, and how it is stored there.

    name: in the checkpoint. third: which third of the stored rows is ours (0, 1, 2), None for all of them.
    transposed: a matrix stored the other way round. pointwise: a matrix stored as a 1x1 convolution (o, i, 1, 1).
    """

    name: str
    third: int | None = None
    transposed: bool = False
    pointwise: bool = False

    def stored_shape(self, shape: torch.Size) -> torch.Size:
        """The shape in the checkpoint of a tensor that is `shape` with us."""
        if self.third is not None:
            return torch.Size((3 * shape[0], *shape[1:]))
        if self.transposed:
            return torch.Size(shape[::-1])
        return torch.Size((*shape, 1, 1)) if self.pointwise else shape

    def take(self, stored: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Our tensor of the given shape: a view of the stored one."""
        if self.third is not None:
            return stored[self.third * shape[0] :][: shape[0]]
        return stored.T if self.transposed else stored.view(shape)


_MID_BLOCK = {
    "block_1": "resnets.0",
    "block_2": "resnets.1",
    "attn_1.norm": "attentions.0.group_norm",
    "attn_1.q": "attentions.0.to_q",
    "attn_1.k": "attentions.0.to_k",
    "attn_1.v": "attentions.0.to_v",
    "attn_1.proj_out": "attentions.0.to_out.0",
}


def _res_block(official: str, ours: str, shortcut: bool) -> dict[str, str]:
    names = {f"{official}.{layer}": f"{ours}.{layer}" for layer in ("norm1", "conv1", "norm2", "conv2")}
    if shortcut:
        names[f"{official}.nin_shortcut"] = f"{ours}.conv_shortcut"
    return names


def _ends_and_middle() -> dict[str, str]:
    names = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
    for official, ours in _MID_BLOCK.items():
        if official.startswith("block"):
            names |= _res_block(f"mid.{official}", f"mid_block.{ours}", shortcut=False)
        else:
            names[f"mid.{official}"] = f"mid_block.{ours}"
    return names


def vae_names(config: VAEConfig) -> dict[str, Source]:
    """Name in SV3DVAE -> where the official file has it.

    The encoder is the conditioner's; the decoder is the first stage's, without post_quant_conv.
    """
    widths = config.block_channels
    last = len(widths) - 1
    encoder, decoder = _ends_and_middle(), _ends_and_middle()
    for i, width in enumerate(widths):
        for j in range(config.res_blocks):
            shortcut = j == 0 and width != widths[max(i - 1, 0)]
            encoder |= _res_block(f"down.{i}.block.{j}", f"down_blocks.{i}.resnets.{j}", shortcut)
        for j in range(config.res_blocks + 1):
            shortcut = j == 0 and width != widths[min(i + 1, last)]
            decoder |= _res_block(f"up.{i}.block.{j}", f"up_blocks.{last - i}.resnets.{j}", shortcut)
        if i < last:
            encoder[f"down.{i}.downsample.conv"] = f"down_blocks.{i}.downsamplers.0.conv"
        if i > 0:  # the official decoder counts its levels from the finest
            decoder[f"up.{i}.upsample.conv"] = f"up_blocks.{last - i}.upsamplers.0.conv"
    modules = {f"{ENCODER_PREFIX}encoder.{a}": f"encoder.{b}" for a, b in encoder.items()}
    modules |= {f"{DECODER_PREFIX}decoder.{a}": f"decoder.{b}" for a, b in decoder.items()}
    modules[f"{ENCODER_PREFIX}quant_conv"] = "quant_conv"
    return {
        f"{ours}.{kind}": Source(f"{official}.{kind}", pointwise=kind == "weight" and ".to_" in ours)
        for official, ours in modules.items()
        for kind in ("weight", "bias")
    }


def clip_names(config: CLIPConfig) -> dict[str, Source]:
    """Name in CLIPImageTower -> where the official file has it (OpenCLIP's names, query, key and value in one)."""
    visual, ours = f"{CLIP_PREFIX}visual.", "vision_model."
    names = {
        f"{ours}embeddings.class_embedding": Source(f"{visual}class_embedding"),
        f"{ours}embeddings.patch_embedding.weight": Source(f"{visual}conv1.weight"),
        f"{ours}embeddings.position_embedding.weight": Source(f"{visual}positional_embedding"),
        "visual_projection.weight": Source(f"{visual}proj", transposed=True),
    }
    modules = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    for i in range(config.layers):
        block, layer = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        modules |= {
            f"{block}.ln_1": f"{layer}.layer_norm1",
            f"{block}.ln_2": f"{layer}.layer_norm2",
            f"{block}.attn.out_proj": f"{layer}.self_attn.out_proj",
            f"{block}.mlp.c_fc": f"{layer}.mlp.fc1",
            f"{block}.mlp.c_proj": f"{layer}.mlp.fc2",
        }
        for third, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            for kind in ("weight", "bias"):
                source = Source(f"{visual}{block}.attn.in_proj_{kind}", third=third)
                names[f"{ours}{layer}.self_attn.{projection}.{kind}"] = source
    for official, mine in modules.items():
        for kind in ("weight", "bias"):
            names[f"{ours}{mine}.{kind}"] = Source(f"{visual}{official}.{kind}")
    return names
