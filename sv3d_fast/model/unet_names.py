"""Names of the UNet's tensors in the official (generative-models) checkpoints."""

import re

import torch

from sv3d_fast.model.config import UNetConfig
from sv3d_fast.model.unet import SV3DUNet

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)")


def official_names(config: UNetConfig) -> dict[str, str]:
    """Official name, without the prefix `model.diffusion_model.`, -> SV3DUNet's name, for every tensor.

    A bijection; the tensors themselves are equal, shapes included.
    """
    with torch.device("meta"):
        ours = SV3DUNet(config).state_dict()
    return {_official(name, config): name for name in ours}


def _official(name: str, config: UNetConfig) -> str:
    block = _BLOCK.match(name)
    if block:
        way, level, kind, index = block.groups()
        place, rest = _place(way, int(level), kind, int(index), config), name[block.end() :]
    else:
        top = next(top for top in _TOP if name.startswith(top + "."))
        place, rest = _TOP[top], name[len(top) :]
    if ".resnets." in name:
        rest = _inside_resnet(rest)
    elif ".attentions." in name:
        rest = rest.replace(".temporal_transformer_blocks.0.", ".time_stack.0.")
        rest = rest.replace(".time_pos_embed.linear_1.", ".time_pos_embed.0.")
        rest = rest.replace(".time_pos_embed.linear_2.", ".time_pos_embed.2.")
    elif ".downsamplers." in name:
        rest = rest.replace(".conv.", ".op.")
    return place + rest


def _place(way: str, level: int, kind: str, index: int, config: UNetConfig) -> str:
    """The numbered block of the official lists, and the entry in it.

    Input block 0 is the first convolution, and each level has one more block than layers on the way down (its
    downsampler) and one more layer on the way up, whose last block ends with the upsampler.
    """
    blocks = config.layers_per_block + 1
    number = level * blocks + index
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * blocks}.0"
    if kind == "upsamplers":
        attention = config.attention[len(config.attention) - 1 - level]
        return f"output_blocks.{(level + 1) * blocks - 1}.{2 if attention else 1}"
    entry = 0 if kind == "resnets" else 1
    return f"input_blocks.{number + 1}.{entry}" if way == "down" else f"output_blocks.{number}.{entry}"


def _inside_resnet(rest: str) -> str:
    """Renames what follows a resnet's name; the official spatial half has no name of its own."""
    _, half, *tail = rest.split(".")
    if half == "time_mixer":
        return rest
    layer = _IN_RESNET[tail[0]]
    stack = ".time_stack" if half == "temporal_res_block" else ""
    return ".".join([f"{stack}.{layer}", *tail[1:]])
