"""Baking of a model's materials into one texture: tiles, plain colours, tints and transparent texels."""

import io

import numpy as np
import pytest
from obj_texts import MTL, two_materials
from PIL import Image

from sv3d_fast.mini import bake, obj


def sample(texture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Nearest texel at uv (N, 2), v up, row 0 at v = 1."""
    h, w = texture.shape[:2]
    column = np.clip((uv[:, 0] * w).astype(int), 0, w - 1)
    return texture[np.clip(((1 - uv[:, 1]) * h).astype(int), 0, h - 1), column].astype(int)


def quarters() -> np.ndarray:
    """(32, 32, 3): red above left, green above right, blue below left, white below right."""
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:16, :16, 0] = picture[:16, 16:, 1] = picture[16:, :16, 2] = 255
    picture[16:, 16:] = 255
    return picture


def test_bake_repeats_tiling_textures_and_keeps_colours():
    mesh = obj.read_obj(two_materials(), lambda _: MTL)
    uvs, texture = bake.bake(mesh, {"cloth.png": quarters()})
    assert uvs.shape == (len(mesh.faces), 3, 2)
    assert uvs.dtype == np.float32
    assert uvs.min() >= 0
    assert uvs.max() <= 1
    assert texture.shape[0] == texture.shape[1] <= 256
    plain = sample(texture, uvs[mesh.materials == 1].reshape(-1, 2))
    assert (plain == [255, 0, 0]).all()
    rng = np.random.default_rng(0)
    weights = rng.dirichlet([1, 1, 1], 300)
    for face in np.flatnonzero(mesh.materials == 0):
        original = weights @ mesh.uvs[face]
        clear = (np.abs((original * 2) % 1 - 0.5) < 0.4).all(1)  # away from the edges between the quarters
        seen = sample(texture, weights @ uvs[face])[clear]
        expected = sample(quarters(), original[clear] % 1)
        assert np.abs(seen - expected).max() <= 2
        assert clear.sum() > 50


def test_bake_shrinks_dense_tiling_to_what_the_atlas_holds():
    mesh = obj.read_obj(two_materials().replace("3.75", "52.25"), lambda _: MTL)
    uvs, texture = bake.bake(mesh, {"cloth.png": quarters()})
    cloth = uvs[mesh.materials == 0].reshape(-1, 2)
    assert len(np.unique(sample(texture, np.add(cloth, [0.01, 0])), axis=0)) > 1
    assert np.ptp(cloth[:, 0]) * texture.shape[1] <= 32 * (bake.MAX_TILES + 1)


def test_bake_of_missing_texture_and_of_many_colours():
    mesh = obj.read_obj(two_materials(), lambda _: MTL)
    uvs, texture = bake.bake(mesh, {})
    assert (sample(texture, uvs[0]) == round(0.64 * 255)).all()
    n = 90
    faces = np.tile(mesh.faces[:1], (n, 1))
    palette = tuple(obj.Material((i / n, 0.5, 1 - i / n)) for i in range(n))
    many = obj.ObjModel(mesh.vertices, faces, np.zeros((n, 3, 2)), np.arange(n), palette)
    uvs, texture = bake.bake(many, {})
    expected = np.round(255 * np.array([m.color for m in palette]))
    assert np.abs(sample(texture, uvs[:, 0]) - expected).max() <= 1
    with pytest.raises(ValueError, match="materials"):
        bake.bake(many, {}, size=32)


def test_bake_tint_keeps_hue_and_drops_brightness():
    mtl = MTL.replace("Kd 0.64 0.64 0.64", "Kd 0.5 0.25 0")
    mesh = obj.read_obj(two_materials(), lambda _: mtl)
    uvs, texture = bake.bake(mesh, {"cloth.png": np.full((8, 8, 3), 200, np.uint8)})
    assert np.abs(sample(texture, uvs[0]) - [200, 100, 0]).max() <= 1


def test_transparent_texels_take_the_opaque_colour():
    picture = np.zeros((4, 4, 4), np.uint8)
    picture[:2] = [10, 200, 30, 255]
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    assert (bake.open_texture(buffer) == [10, 200, 30]).all()
