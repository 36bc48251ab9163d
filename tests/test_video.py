"""OrbitVideo: what it holds and what it refuses."""

import pytest
import torch

from sv3d_fast.camera import Orbit
from sv3d_fast.video import OrbitVideo


def frames(*shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)


def test_what_it_holds():
    pictures = torch.arange(3 * 5 * 5 * 3).remainder(256).to(torch.uint8).view(3, 5, 5, 3)
    video = OrbitVideo(pictures, Orbit.static(frames=3), torch.ones(3, 5, 5))
    assert video.size == 5
    colors = video.colors()
    assert colors.dtype == torch.float32
    assert torch.equal((colors * 255).round().to(torch.uint8), pictures)
    assert OrbitVideo(pictures, Orbit.static(frames=3)).alpha is None


@pytest.mark.parametrize(
    ("pictures", "alpha", "message"),
    [
        (frames(3, 8, 8, 3, dtype=torch.float32), None, "frames: expected uint8"),
        (frames(3, 8, 8, 4), None, "frames"),
        (frames(3, 8, 9, 3), None, "frames"),
        (frames(8, 8, 3), None, "frames"),
        (frames(4, 8, 8, 3), None, "frames: expected one for each of the 3 cameras, got 4"),
        (frames(3, 8, 8, 3), torch.ones(3, 8, 7), r"alpha: expected shape \(3, 8, 8\)"),
        (frames(3, 8, 8, 3), torch.ones(3, 1, 8, 8), "alpha"),
    ],
)
def test_what_it_refuses(pictures, alpha, message):
    with pytest.raises(ValueError, match=message) as info:
        OrbitVideo(pictures, Orbit.static(frames=3), alpha)
    assert "\n" not in str(info.value)
