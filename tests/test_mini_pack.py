"""The pack of training objects: its round trip within error bounds, what it refuses, and what loading adds."""

import math

import numpy as np
import pytest
from PIL import Image

from sv3d_fast.mini import catalogue, geometry, pack


def tetrahedron() -> tuple[np.ndarray, np.ndarray]:
    vertices = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], np.float32) * 0.4
    return vertices, np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]], np.int32)


def entry(name="Thing", painted=True, seed=0) -> pack.Entry:
    vertices, faces = tetrahedron()
    vertices, faces, normals = geometry.shade_smoothly(geometry.fit_to_frame(vertices), faces)
    rng = np.random.default_rng(seed)
    uvs = rng.random((len(faces), 3, 2)).astype(np.float32)
    texture = np.uint8(rng.integers(0, 2, (16, 16, 1)) * np.array([250, 130, 20]))
    coat = {"uvs": uvs, "texture": texture} if painted else {}
    return pack.Entry(
        name, f"key {name}", "source", "Kind", "Ané", "CC0-1.0", catalogue.split_of(name), vertices, faces, normals,
        **coat,
    )  # fmt: skip


def test_pack_round_trip_and_error_bounds(tmp_path):
    entries = [entry("One"), entry("Two", painted=False), entry("Three", seed=1)]
    path = tmp_path / "objects.pack"
    pack.write_pack(path, entries)
    back = pack.read_pack(path)
    for a, b in zip(entries, back, strict=True):
        assert (a.name, a.key, a.source, a.category, a.creator, a.licence, a.split) == (
            b.name, b.key, b.source, b.category, b.creator, b.licence, b.split,
        )  # fmt: skip
        assert np.array_equal(a.faces, b.faces)
        assert np.abs(a.vertices - b.vertices).max() <= 0.51 * pack.POSITION_STEP
        assert (a.normals * b.normals).sum(1).min() > 0.999
        if a.uvs is None:
            assert b.uvs is None
            assert b.texture is None
        else:
            assert np.abs(a.uvs - b.uvs).max() <= 0.51 / 65535
            assert np.array_equal(a.texture, b.texture)  # few colours: PNG
        assert b.vertices.dtype == b.normals.dtype == np.float32


def test_pack_keeps_photographic_textures_closely(tmp_path):
    smooth = np.random.default_rng(0).random((5, 5, 3)).astype(np.float32)
    image = Image.fromarray(np.uint8(255 * smooth)).resize((128, 128), Image.Resampling.BICUBIC)
    e = entry()
    e = pack.Entry(**{**e.__dict__, "texture": np.asarray(image)})
    pack.write_pack(tmp_path / "p", [e])
    error = pack.read_pack(tmp_path / "p")[0].texture.astype(float) - np.asarray(image)
    assert 10 * math.log10(255**2 / (error**2).mean()) > 38


def test_pack_refuses_what_it_cannot_hold(tmp_path):
    big = pack.Entry(**{**entry().__dict__, "vertices": entry().vertices * 5})
    with pytest.raises(ValueError, match="vertices"):
        pack.write_pack(tmp_path / "p", [big])
    (tmp_path / "q").write_bytes(b"no pack")
    with pytest.raises(ValueError, match="pack"):
        pack.read_pack(tmp_path / "q")
    with pytest.raises(ValueError, match="split"):
        pack.load_objects(tmp_path / "q", split="test")


def test_loading_splits_paints_and_generates(tmp_path):
    held = next(n for n in map(str, range(100)) if catalogue.split_of(n) == "held_out")
    kept = next(n for n in map(str, range(100)) if catalogue.split_of(n) == "train")
    path = tmp_path / "objects.pack"
    pack.write_pack(path, [entry(held), entry(kept, painted=False)])
    assert [o.name for o in pack.load_objects(path, "held_out")] == [held]
    train = pack.load_objects(path, "train", procedural=3, seed=5)
    assert [o.split for o in train] == ["train"] * 4
    assert train[0].name == kept
    again = pack.load_objects(path, "train", procedural=3, seed=5)
    other = pack.load_objects(path, "train", procedural=3, seed=6)
    for a, b in zip(train, again, strict=True):
        assert np.array_equal(a.texture, b.texture)
        assert np.array_equal(a.vertices, b.vertices)
        assert np.array_equal(a.uvs, b.uvs)
    assert any(
        a.vertices.shape != c.vertices.shape or not np.array_equal(a.texture, c.texture)
        for a, c in zip(train, other, strict=True)
    )
    assert len(pack.load_objects(path, "all", procedural=0)) == 2
