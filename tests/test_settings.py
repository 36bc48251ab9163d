"""Settings refuse what can't be, by name, and stay plain for JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sv3d_fast.scene.glb import glb_bytes
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.settings import PURPOSES, Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("steps", 1001), ("steps", 2.5), ("steps", True), ("steps", "4"),
        ("elevation", 90), ("elevation", -89.5), ("elevation", float("nan")), ("elevation", None), ("elevation", "10"),
        ("frame_size", 100), ("frame_size", 0), ("frame_size", 4096), ("frame_size", 128.0),
        ("foreground_ratio", 0), ("foreground_ratio", 1.1), ("foreground_ratio", float("inf")),
        ("decode_chunk_size", 0), ("texture_resolution", 32), ("texture_resolution", 16384),
        ("mc_resolution", 8), ("mc_resolution", 1024), ("target_faces", 10), ("target_faces", None),
        ("seed", -1), ("seed", 2**63), ("seed", 1.0), ("seed", None), ("device", None), ("model", 3), ("orbit", []),
        ("height_mm", 0), ("height_mm", float("nan")), ("height_mm", "100"), ("watertight", 1), ("unlit", None),
        ("mesh_formats", "stl"), ("mesh_formats", ()), ("mesh_formats", ("fbx",)), ("mesh_formats", None),
        ("mesh_formats", [["stl"]]), ("splat_formats", ("ksplat",)), ("splat_formats", 3),
        ("texture_format", "webp"), ("texture_format", None), ("purpose", "film"), ("purpose", ["web"]),
        ("remove_background", "no"), ("remove_background", 1), ("matting_model", 5),
        ("max_memory", "much"), ("max_memory", 6), ("max_memory", "0GiB"),
        ("dtype", "half"), ("dtype", None), ("dtype", "float64"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected") as caught:
        Settings(**{name: value})
    assert "\n" not in str(caught.value)


def test_contradiction():
    with pytest.raises(ValueError, match="matting_model: contradicts remove_background=False"):
        Settings(matting_model="m.onnx", remove_background=False)
    with pytest.raises(ValueError, match="max_memory: contradicts dtype float32"):
        Settings(max_memory="6GiB", dtype="float32")
    Settings(max_memory="6GiB", dtype="bfloat16")


def test_bounds_themselves_are_taken():
    Settings(steps=1, elevation=-89, frame_size=2048, foreground_ratio=1, seed=2**63 - 1, mc_resolution=512)


def test_paths_and_texts_mean_the_same():
    paths = Settings(model=Path("a/b"), orbit=Path("c.json"), matting_model=Path("m.onnx"))
    assert paths == Settings(model="a/b", orbit="c.json", matting_model="m.onnx")
    assert json.loads(json.dumps(paths.to_dict()))["matting_model"] == "m.onnx"


def test_formats_are_kept_in_order_and_once():
    settings = Settings(mesh_formats=["stl", "glb", "stl"], splat_formats=("spz",))
    assert (settings.mesh_formats, settings.splat_formats) == (("stl", "glb"), ("spz",))
    assert json.loads(json.dumps(settings.to_dict()))["mesh_formats"] == ["stl", "glb"]
    assert settings == Settings(mesh_formats=("stl", "glb"), splat_formats=["spz", "spz"])
    hash(settings)


@pytest.mark.parametrize("purpose", PURPOSES)
def test_what_is_given_wins_over_the_purpose(purpose):
    chosen = Settings.of(purpose=purpose)
    assert chosen != Settings(purpose=purpose)
    assert {name: getattr(chosen, name) for name in PURPOSES[purpose]} == PURPOSES[purpose]
    for name, value in {"target_faces": 777, "mesh_formats": ("off",), "watertight": purpose != "print"}.items():
        other = Settings.of(purpose=purpose, **{name: value})
        assert getattr(other, name) == value
        assert replace(other, **{name: getattr(chosen, name)}) == chosen


def test_no_purpose_and_an_unknown_one():
    assert Settings.of() == Settings()
    assert Settings.of(purpose=None, seed=3) == Settings(seed=3)
    with pytest.raises(ValueError, match=r"^purpose: expected web or game or print, got 'film'"):
        Settings.of(purpose="film")


def test_textures_for_games_are_powers_of_two_and_print_is_closed():
    side = Settings.of(purpose="game").texture_resolution
    assert side & (side - 1) == 0
    assert Settings.of(purpose="print").watertight
    assert {"stl", "3mf"} <= set(Settings.of(purpose="print").mesh_formats)


def test_a_glb_for_the_web_stays_below_two_megabytes():
    """Even with a texture of noise, which no compression helps; half as many vertices again as a sphere's at seams."""
    settings = Settings.of(purpose="web")
    g, n = torch.Generator().manual_seed(0), settings.target_faces
    vertices, side = torch.rand(3 * n // 4, 3, generator=g), settings.texture_resolution
    faces = torch.randint(0, len(vertices), (n, 3), generator=g, dtype=torch.int32)
    noise = torch.randint(0, 256, (side, side, 3), generator=g, dtype=torch.uint8)
    mesh = Mesh(vertices, faces, vertices[:, :2][faces.long()], noise)
    assert len(glb_bytes(mesh, texture_format=settings.texture_format)) < 2 << 20
