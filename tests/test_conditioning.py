"""What the UNet is told about pictures and cameras."""

import math

import pytest
import torch
from tiny_sv3d import config

from sv3d_fast.camera import Orbit
from sv3d_fast.conditioning import condition, vector
from sv3d_fast.model.clip import CLIPImageTower, preprocess
from sv3d_fast.model.unet import SV3DUNet
from sv3d_fast.model.vae import SV3DVAE
from sv3d_fast.model.weights import SV3DModel

SIZE = 32


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    c = config()
    return SV3DModel(c, SV3DUNet(c.unet), SV3DVAE(c.vae), CLIPImageTower(c.clip))


def embedding(value, channels):
    """Cosines, then sines, of value * 10000^(-k / half), in plain Python."""
    half = channels // 2
    angles = [value * 10000 ** (-k / half) for k in range(half)]
    return torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])


def pictures(count):
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(count, 3, SIZE, SIZE, generator=generator) * 2 - 1 for _ in range(2)]


def test_vector_of_p_holds_noise_polar_and_azimuth():
    orbit = Orbit.sine(12.0, 20.0, 5)
    made = vector(config().unet, [orbit], 0.02)
    assert made.shape == (1, 5, 1280)
    for frame in range(5):
        polar = math.radians(90 - orbit.elevations[frame].item())
        azimuth = math.radians(orbit.azimuths[frame].item())
        expected = torch.cat([embedding(0.02, 256), embedding(polar, 512), embedding(azimuth, 512)])
        torch.testing.assert_close(made[0, frame], expected, atol=2e-6, rtol=0)


def test_vector_of_u_holds_the_noise_alone():
    made = vector(config(256).unet, [Orbit.static(30.0, 3), Orbit.sine(frames=3)], 1e-5)
    torch.testing.assert_close(made, embedding(1e-5, 256).expand(2, 3, 256), atol=1e-6, rtol=0)


def test_angles_are_float32_and_finer_than_16_bits():
    near = [Orbit(torch.tensor([10.0, 10.0]), torch.tensor([a, 0.0])) for a in (200.0, 200.05)]
    made = vector(config().unet, near, 0.0)
    assert made.dtype == torch.float32
    # a twentieth of a degree is a third of bfloat16's step there, and is told apart
    assert float((made[0, 0] - made[1, 0]).abs().max()) == pytest.approx(math.radians(0.05), rel=0.1)


def test_orbits_of_different_lengths():
    with pytest.raises(ValueError, match=r"orbits: expected the same number of frames in each, got \[3, 4\]"):
        vector(config().unet, [Orbit.static(frames=3), Orbit.static(frames=4)], 0.0)
    with pytest.raises(ValueError, match="orbits"):
        vector(config().unet, [], 0.0)


def test_parts_come_from_the_networks(model):
    images, noise = pictures(2)
    made = condition(model, images, [Orbit.static(frames=3)] * 2, noise, 0.1)
    with torch.no_grad():
        torch.testing.assert_close(made.image_latents, model.vae.encode(images + 0.1 * noise))
        clean = model.image_encoder(preprocess(images, model.config.clip.image_size))
    torch.testing.assert_close(made.token, clean[:, None])
    assert made.image_latents.shape == (2, 4, SIZE // 4, SIZE // 4)
    assert not made.token.requires_grad


def test_two_orbits_equal_two_runs(model):
    images, noise = pictures(2)
    orbits = [Orbit.static(5.0, 3), Orbit.sine(20.0, 10.0, 3)]
    both = condition(model, images, orbits, noise, 0.1)
    for i in range(2):
        alone = condition(model, images[i : i + 1], orbits[i : i + 1], noise[i : i + 1], 0.1)
        for name in ("token", "image_latents", "vector"):
            torch.testing.assert_close(getattr(both, name)[i : i + 1], getattr(alone, name), atol=1e-5, rtol=1e-5)


def test_unconditional_twin_keeps_the_cameras(model):
    images, noise = pictures(1)
    given = condition(model, images, [Orbit.static(frames=3)], noise, 0.1)
    twin = given.unconditional()
    assert given.token.any()
    assert given.image_latents.any()
    assert not twin.token.any()
    assert not twin.image_latents.any()
    assert (twin.token.shape, twin.image_latents.shape) == (given.token.shape, given.image_latents.shape)
    assert torch.equal(twin.vector, given.vector)


def test_results_take_the_networks_precision_but_for_angles(model):
    torch.manual_seed(0)
    c = config()
    half = SV3DModel(c, SV3DUNet(c.unet).bfloat16(), SV3DVAE(c.vae), CLIPImageTower(c.clip).bfloat16())
    images, noise = pictures(1)
    made = condition(half, images, [Orbit.static(frames=3)], noise, 0.1)
    assert made.token.dtype == made.image_latents.dtype == torch.bfloat16
    assert made.vector.dtype == torch.float32
    full = condition(model, images, [Orbit.static(frames=3)], noise, 0.1)
    torch.testing.assert_close(made.image_latents.float(), full.image_latents, atol=0.02, rtol=0.02)
