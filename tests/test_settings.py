"""Settings refuse what can't be, by name, and stay plain for JSON."""

import json
from pathlib import Path

import pytest

from sv3d_fast.settings import Settings


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
        ("remove_background", "no"), ("remove_background", 1), ("matting_model", 5),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected") as caught:
        Settings(**{name: value})
    assert "\n" not in str(caught.value)


def test_contradiction():
    with pytest.raises(ValueError, match="matting_model: contradicts remove_background=False"):
        Settings(matting_model="m.onnx", remove_background=False)


def test_bounds_themselves_are_taken():
    Settings(steps=1, elevation=-89, frame_size=2048, foreground_ratio=1, seed=2**63 - 1, mc_resolution=512)


def test_paths_and_texts_mean_the_same():
    paths = Settings(model=Path("a/b"), orbit=Path("c.json"), matting_model=Path("m.onnx"))
    assert paths == Settings(model="a/b", orbit="c.json", matting_model="m.onnx")
    assert json.loads(json.dumps(paths.to_dict()))["matting_model"] == "m.onnx"
