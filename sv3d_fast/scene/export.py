"""Meshes to files and back; splats by way of splat_files."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from PIL import Image

from sv3d_fast.files import write_bytes, write_text

from .corners import from_y_up, split, to_y_up
from .glb import glb_bytes, linear_to_srgb, picture_bytes
from .mesh import Mesh
from .print_shape import printable
from .splat_files import load_splats, save_splats
from .threemf import threemf_bytes
from .usdz import usdz_bytes

__all__ = ["load_mesh", "load_splats", "save_mesh", "save_splats"]

Y_UP = {".glb", ".gltf", ".obj", ".usdz"}  # y-up, front +z; other formats keep the world's axes: z-up, front +x
PRINTED = {".stl", ".3mf"}
SHAPES = {".stl": "stl", ".ply": "ply", ".off": "off"}  # written by trimesh: shape alone, no texture
SUFFIXES = (".glb", ".obj", ".usdz", ".3mf", *SHAPES)
MAX_BYTES = 2 << 30


def save_mesh(
    mesh: Mesh,
    path: str | os.PathLike,
    *,
    unlit: bool = False,
    texture_format: str = "png",
    height_mm: float | None = None,
) -> list[Path]:
    """Writes a mesh in the format that the suffix names; returns the paths of all files written.

    .glb: binary glTF 2.0, texture inside (`unlit`: see glb_bytes). .usdz: for AR on Apple's devices, texture inside.
    .obj: with .mtl and .png of the same stem beside it if there is a texture. These are y-up, front +z. .stl, .3mf,
    .ply and .off: the shape alone, z-up. texture_format: "png" or "jpeg", of .glb and .usdz. height_mm: .stl and .3mf
    are made this high in millimetres, standing on z = 0; without it they keep the world's units, one for a millimetre.
    Raises ValueError for another suffix or a mesh without faces; OutputError.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"path: expected a name ending in {', '.join(SUFFIXES)}, got {path.name!r}")
    if len(mesh.faces) == 0:
        raise ValueError("mesh: expected at least one face, got none")
    if suffix == ".obj":
        return _save_obj(mesh, path)
    if suffix == ".glb":
        return [write_bytes(path, glb_bytes(mesh, unlit=unlit, texture_format=texture_format))]
    if suffix == ".usdz":
        return [write_bytes(path, usdz_bytes(mesh, texture_format=texture_format))]
    if suffix in PRINTED and height_mm is not None:
        mesh = printable(mesh, height_mm)
    if suffix == ".3mf":
        return [write_bytes(path, threemf_bytes(mesh))]
    shape = trimesh.Trimesh(mesh.vertices.cpu().numpy(), mesh.faces.cpu().numpy(), process=False)
    data: Any = shape.export(file_type=SHAPES[suffix])
    return [write_bytes(path, data.encode() if isinstance(data, str) else data)]


def load_mesh(path: str | os.PathLike) -> Mesh:
    """Reads a mesh file that trimesh knows as one Mesh in our axes; float32, on the CPU.

    glTF and OBJ are taken as y-up, front +z, and turned; other formats as z-up. Vertices at the same place become one
    (files split them at seams). Keeps a texture with its coordinates, or else vertex colours. A texture that is not
    square is resized; several are packed into one.
    Raises ValueError (one line) for a file that is missing, damaged, over 2 GB, or holds no faces.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: expected a file of at most 2 GB")
    linear = path.suffix.lower() in (".glb", ".gltf")
    try:
        scene = trimesh.load_scene(path, process=False)
        placed = [scene.graph[node] for node in scene.graph.nodes_geometry]
        parts = [(scene.geometry[name], matrix) for matrix, name in placed]
        parts = [p for p in parts if isinstance(p[0], trimesh.Trimesh) and len(p[0].faces)]
        for part, _ in parts:
            _check_indices(part)
        if len(parts) > 1 and any(_picture(part) for part, _ in parts):
            parts = [(scene.to_geometry(), np.eye(4))]
        colors = [_vertex_colors(part, linear) for part, _ in parts]
        picture = _picture(parts[0][0]) if parts else None
        texture = None if picture is None else torch.from_numpy(_square(picture))
    except Exception as error:  # every format's reader in trimesh raises types of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: expected a mesh, got a file that can't be read ({reason[:200]})") from error
    if not parts:
        raise ValueError(f"{path}: expected a mesh with faces, got none")
    positions = [trimesh.transform_points(part.vertices, matrix) for part, matrix in parts]
    vertices = np.concatenate(positions).astype(np.float32) + np.float32(0)  # + 0: -0.0 and 0.0 are one place
    if not np.isfinite(vertices).all():
        raise ValueError(f"{path}: expected finite vertices, got NaN or infinite ones")
    starts = np.cumsum([0, *map(len, positions)])
    faces = np.concatenate([part.faces + start for (part, _), start in zip(parts, starts[:-1], strict=True)])
    uvs = None
    if texture is not None:
        visual: Any = parts[0][0].visual
        uvs = torch.from_numpy(np.asarray(visual.uv, np.float32)[faces])
    if path.suffix.lower() in Y_UP:
        vertices = from_y_up(vertices)
    vertices, first, inverse = np.unique(vertices, axis=0, return_index=True, return_inverse=True)
    known = [c for c in colors if c is not None]
    colored = texture is None and len(known) == len(parts)
    return Mesh(
        torch.from_numpy(vertices),
        torch.from_numpy(inverse.reshape(-1)[faces].astype(np.int32)),
        uvs,
        texture,
        torch.from_numpy(np.concatenate(known)[first]) if colored else None,
    )


def _check_indices(part: trimesh.Trimesh) -> None:
    visual: Any = part.visual
    if part.faces.min() < 0 or part.faces.max() >= len(part.vertices):
        raise ValueError("its faces name vertices that are not there")
    if visual.kind == "texture" and visual.uv is not None and len(visual.uv) != len(part.vertices):
        raise ValueError("its texture coordinates don't match its vertices")


def _picture(part: trimesh.Trimesh) -> Image.Image | None:
    """The texture of a part that has coordinates for it."""
    visual: Any = part.visual  # trimesh decides at run time between classes that share no interface
    if visual.kind != "texture" or visual.uv is None:
        return None
    material = visual.material
    return getattr(material, "baseColorTexture", None) or getattr(material, "image", None)


def _vertex_colors(part: trimesh.Trimesh, linear: bool) -> np.ndarray | None:
    """(V, 3) uint8 sRGB: a part's vertex colours or the colour of its material; None without."""
    visual: Any = part.visual
    if visual.kind is None:
        return None
    if visual.kind != "texture":
        values = np.asarray(visual.vertex_colors)
    elif "color" in visual.vertex_attributes:  # glTF's COLOR_0, as it stands in the file
        values = np.asarray(visual.vertex_attributes["color"])
    else:
        values = np.tile(visual.material.main_color, (len(part.vertices), 1))
    values = values[:, :3] / (np.iinfo(values.dtype).max if values.dtype.kind == "u" else 1.0)
    return np.round((linear_to_srgb(values) if linear else values).clip(0, 1) * 255).astype(np.uint8)


def _square(picture: Image.Image) -> np.ndarray:
    picture = picture.convert("RGB")
    side = max(picture.size)
    if picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    return np.array(picture)


def _save_obj(mesh: Mesh, path: Path) -> list[Path]:
    """Positions, texture coordinates and normals with indices of their own, so the surface stays welded."""
    material, picture = path.with_suffix(".mtl"), path.with_suffix(".png")
    written = []
    parts = split(Mesh(mesh.vertices, mesh.faces))  # without uvs: one per vertex, for its normal
    columns = [to_y_up(parts.positions)]
    faces = parts.faces.astype(np.int64) + 1
    indices = [faces, faces]
    text = io.StringIO()
    text.write("# sv3d-fast; y up, front +z\n")
    if mesh.texture is not None and mesh.uvs is not None:
        lines = ["newmtl surface", "Ka 0 0 0", "Kd 1 1 1", "Ks 0 0 0", "illum 1", f"map_Kd {picture.name}", ""]
        written = [write_bytes(picture, picture_bytes(mesh.texture)), write_text(material, "\n".join(lines))]
        text.write(f"mtllib {material.name}\nusemtl surface\n")
        uvs, inverse = np.unique(mesh.uvs.cpu().numpy().reshape(-1, 2), axis=0, return_inverse=True)
        np.savetxt(text, uvs, "vt %.9g %.9g")
        indices.insert(1, inverse.reshape(-1, 3) + 1)
    elif mesh.colors is not None:
        columns.append(mesh.colors.cpu().numpy() / 255.0)  # "v x y z r g b": sRGB, as MeshLab and Blender read it
    np.savetxt(text, np.concatenate(columns, 1), "v" + " %.9g" * (3 * len(columns)))
    np.savetxt(text, to_y_up(parts.normals), "vn %.6g %.6g %.6g")
    corner = "%d/%d/%d" if written else "%d//%d"
    np.savetxt(text, np.stack(indices, -1).reshape(len(faces), -1), f"f {corner} {corner} {corner}")
    return [write_text(path, text.getvalue()), *written]
