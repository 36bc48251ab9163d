"""Meshes as binary glTF 2.0 (Khronos specification, sections 3.6 to 3.9 and 4.4)."""

import io
import json
import struct

import numpy as np
import torch
from PIL import Image

from sv3d_fast import __version__

from .corners import split, to_y_up
from .mesh import Mesh

FLOAT, UINT = 5126, 5125
VERTEX_DATA, INDEX_DATA = 34962, 34963
LINEAR, MIPMAPPED, CLAMP = 9729, 9987, 33071
JPEG_QUALITY = 85  # with colours at full resolution, for they change from chart to chart


def glb_bytes(mesh: Mesh, *, unlit: bool = False, texture_format: str = "png") -> bytes:
    """A GLB of the mesh: y-up, front +z, metallic 0, roughness 1, the texture inside as PNG or JPEG.

    Without a texture, vertex colours go to COLOR_0, which glTF defines as linear, as floats. unlit=True adds
    KHR_materials_unlit, so viewers show the texture as it is, with the light that is baked into it.
    """
    parts = split(mesh)
    blob = _Blob()
    attributes = {
        "POSITION": blob.accessor(to_y_up(parts.positions), FLOAT, "VEC3", VERTEX_DATA, bounds=True),
        "NORMAL": blob.accessor(to_y_up(parts.normals), FLOAT, "VEC3", VERTEX_DATA),
    }
    pbr: dict = {"metallicFactor": 0.0, "roughnessFactor": 1.0}
    document: dict = {
        "asset": {"version": "2.0", "generator": f"sv3d-fast {__version__}"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": "object"}],
    }
    if mesh.texture is not None and parts.uvs is not None:
        v_down = np.stack([parts.uvs[:, 0], 1 - parts.uvs[:, 1]], -1)
        attributes["TEXCOORD_0"] = blob.accessor(v_down, FLOAT, "VEC2", VERTEX_DATA)
        pbr["baseColorTexture"] = {"index": 0}
        picture = picture_bytes(mesh.texture, texture_format)
        document |= {
            "textures": [{"sampler": 0, "source": 0}],
            "samplers": [{"magFilter": LINEAR, "minFilter": MIPMAPPED, "wrapS": CLAMP, "wrapT": CLAMP}],
            "images": [{"mimeType": f"image/{texture_format}", "name": "albedo", "bufferView": blob.view(picture)}],
        }
    elif mesh.colors is not None:
        linear = srgb_to_linear(mesh.colors.cpu().numpy()[parts.source] / 255.0)
        attributes["COLOR_0"] = blob.accessor(linear, FLOAT, "VEC3", VERTEX_DATA)
    primitive = {"attributes": attributes, "material": 0, "mode": 4}
    primitive["indices"] = blob.accessor(parts.faces.reshape(-1), UINT, "SCALAR", INDEX_DATA)
    material: dict = {"name": "surface", "doubleSided": True, "pbrMetallicRoughness": pbr}
    if unlit:
        material["extensions"] = {"KHR_materials_unlit": {}}
        document["extensionsUsed"] = ["KHR_materials_unlit"]
    document |= {"meshes": [{"name": "object", "primitives": [primitive]}], "materials": [material]}
    return blob.pack(document)


def picture_bytes(texture: torch.Tensor, texture_format: str = "png") -> bytes:
    """A (R, R, 3) uint8 texture as a PNG or JPEG file, its first row at v = 1."""
    buffer = io.BytesIO()
    options = {"png": {"compress_level": 4}, "jpeg": {"quality": JPEG_QUALITY, "subsampling": 0}}
    Image.fromarray(texture.cpu().numpy()).save(buffer, texture_format, **options[texture_format])
    return buffer.getvalue()


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, values in [0, 1]."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(values: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, values in [0, 1]."""
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * np.maximum(values, 1e-9) ** (1 / 2.4) - 0.055)


class _Blob:
    """The binary chunk while it grows, with the views and accessors that describe it."""

    def __init__(self):
        self.data, self.views, self.accessors = bytearray(), [], []

    def view(self, data: bytes, target: int | None = None) -> int:
        self.views.append({"buffer": 0, "byteOffset": len(self.data), "byteLength": len(data)})
        if target is not None:
            self.views[-1]["target"] = target
        self.data += data + b"\0" * (-len(data) % 4)
        return len(self.views) - 1

    def accessor(self, values: np.ndarray, kind: int, shape: str, target: int, *, bounds: bool = False) -> int:
        values = np.ascontiguousarray(values, {FLOAT: "<f4", UINT: "<u4"}[kind])
        entry = {"componentType": kind, "count": len(values), "type": shape}
        entry["bufferView"] = self.view(values.tobytes(), target)
        if bounds:
            entry |= {"min": values.min(0).tolist(), "max": values.max(0).tolist()}
        self.accessors.append(entry)
        return len(self.accessors) - 1

    def pack(self, document: dict) -> bytes:
        document |= {
            "accessors": self.accessors, "bufferViews": self.views, "buffers": [{"byteLength": len(self.data)}],
        }  # fmt: skip
        text = json.dumps(document, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 4)
        chunks = (
            struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(self.data), b"BIN\0") + self.data
        )
        return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks
