"""Pictures to orbits: seeds, the input frame, progress and errors."""

from dataclasses import replace

import pytest
import torch
from tiny_sv3d import FRAMES, config

from sv3d_fast.camera import Orbit
from sv3d_fast.engine import to_uint8
from sv3d_fast.events import Progress, finish
from sv3d_fast.generation import draw, generating
from sv3d_fast.model.clip import CLIPImageTower
from sv3d_fast.model.unet import SV3DUNet
from sv3d_fast.model.vae import SV3DVAE
from sv3d_fast.model.weights import SV3DModel

SIZE = 32
SAMPLING = replace(config().sampler, sigma_max=80.0)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    c = config()
    return SV3DModel(c, SV3DUNet(c.unet), SV3DVAE(c.vae), CLIPImageTower(c.clip))


def pictures(count=1):
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1


def turns(count=1):
    return [Orbit.static(5.0, FRAMES)] * count


def test_a_seed_is_a_result(model):
    first, again, other = (
        finish(generating(model, pictures(), turns(), SAMPLING, [seed], chunk=4)) for seed in (7, 7, 8)
    )
    assert first.shape == (1, FRAMES, SIZE, SIZE, 3)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first[:, :-1], other[:, :-1])


def test_neither_global_state_nor_neighbours_change_a_result(model):
    images = pictures(2)
    both = finish(generating(model, images, turns(2), SAMPLING, [3, 4]))
    torch.manual_seed(99)
    for i, seed in enumerate((3, 4)):
        alone = finish(generating(model, images[i : i + 1], turns(), SAMPLING, [seed]))
        difference = (both[i].int() - alone[0].int()).abs()
        assert int(difference.max()) <= 1  # rounding at the border of two values


def test_last_frame_is_the_input(model):
    images = pictures(2)
    made = finish(generating(model, images, turns(2), SAMPLING, [0, 0]))
    assert torch.equal(made[:, -1], to_uint8(images))
    assert not torch.equal(made[:, 0], made[:, -1])


def test_cameras_matter(model):
    low, high = (finish(generating(model, pictures(), [Orbit.static(e, FRAMES)], SAMPLING, [0])) for e in (0.0, 60.0))
    assert not torch.equal(low[:, :-1], high[:, :-1])


@pytest.mark.parametrize(("chunk", "chunks"), [(1, 10), (3, 4), (100, 1)])
def test_progress_counts_to_its_total(model, chunk, chunks):
    events = list(generating(model, pictures(2), turns(2), SAMPLING, [0, 1], chunk=chunk))
    total = SAMPLING.steps + chunks
    assert all(isinstance(event, Progress) for event in events)
    assert [(e.stage, e.done, e.total) for e in events] == [("orbit", n + 1, total) for n in range(total)]
    assert events[0].figures["sigma"] == pytest.approx(80.0)


def test_draws_are_the_pictures_then_the_latents():
    generator = torch.Generator().manual_seed(11)
    image, latents = draw(11, (3, 4, 4), (2, 4, 1, 1))
    assert torch.equal(image, torch.randn(3, 4, 4, generator=generator))
    assert torch.equal(latents, torch.randn(2, 4, 1, 1, generator=generator))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(1, 3, 36, 36)}, "frame_size: expected a multiple of 8, got 36"),
        ({"images": torch.zeros(1, 3, 32, 40)}, r"images: expected \(B, 3, S, S\)"),
        ({"images": torch.zeros(3, 32, 32)}, "images"),
        ({"images": torch.zeros(1, 4, 32, 32)}, "images"),
        ({"images": torch.zeros(0, 3, 32, 32), "orbits": [], "seeds": []}, "images"),
        ({"orbits": turns(2)}, "orbits and seeds: expected 1 of each, got 2 and 1"),
        ({"seeds": []}, "orbits and seeds: expected 1 of each, got 1 and 0"),
        ({"images": pictures(2), "orbits": [*turns(), Orbit.static(frames=3)], "seeds": [0, 1]}, "orbits"),
        ({"chunk": 0}, "decode_chunk_size: expected at least 1, got 0"),
    ],
)
def test_what_is_refused(model, arguments, message):
    usual = {"images": pictures(), "orbits": turns(), "config": SAMPLING, "seeds": [0], "chunk": 7}
    with pytest.raises(ValueError, match=message) as info:
        finish(generating(model, **(usual | arguments)))
    assert "\n" not in str(info.value)
