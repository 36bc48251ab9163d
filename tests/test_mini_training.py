"""The two stages of training the embedded model, on the CPU with generated objects and a handful of steps."""

import csv

import numpy as np
import pytest
import torch
from tiny_mini import CPU, SIZE, TINY, changed, make_denoiser, make_stage, make_vae, take_small_steps

from sv3d_fast.camera import Orbit
from sv3d_fast.mini.autoencoder import normalise_latents, pictures, train_autoencoder
from sv3d_fast.mini.denoiser import Cache, Denoiser, train_denoiser
from sv3d_fast.mini.parallel import Workers
from sv3d_fast.mini.scenes import Stage
from sv3d_fast.model.clip import CLIPImageTower

ALONE = Workers(0, 1, CPU)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    take_small_steps(monkeypatch)


@pytest.fixture(scope="module")
def stage():
    return make_stage()


def rows_of(path):
    with path.open(newline="") as file:
        return [[float(v) for v in row] for row in csv.reader(file)]


def test_no_minutes(stage, tmp_path):
    with pytest.raises(ValueError, match="minutes: expected a positive number, got 0"):
        train_autoencoder(make_vae(), stage, ALONE, minutes=0, batch=2, log=tmp_path / "vae.csv", seed=0)


def test_autoencoder_trains(stage, tmp_path):
    vae, log = make_vae(), tmp_path / "logs" / "vae.csv"
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    averaged = train_autoencoder(vae, stage, ALONE, minutes=1e-6, batch=3, log=log, seed=0)
    assert len(changed(vae, before)) > 0.9 * len(before)
    assert len(changed(averaged, before)) > 0.9 * len(before)
    assert all(torch.isfinite(v).all() for v in averaged.state_dict().values())
    (row,) = rows_of(log)
    assert row[0] == 0
    assert np.isfinite(row).all()


def test_normalised_latents_reconstruct_the_same(stage):
    vae = make_vae()
    with torch.no_grad():
        vae.quant_conv.bias += torch.linspace(-3, 5, len(vae.quant_conv.bias))
        vae.quant_conv.weight *= 2.5
    size = 128  # latents of 32²
    views = Stage(stage.objects, size, CPU).standard([0, 1, 2], Orbit.static(10.0, 3))
    image = pictures(views.frames)
    with torch.no_grad():
        latents = vae.encode(image)
        logvar = vae.moments(image)[1]
        before = vae.decoder.conv_in(latents)
        std = latents.std((0, 2, 3), keepdim=True)
        normalise_latents(vae, views)
        normal, new_logvar = vae.moments(image)
        after = vae.decoder.conv_in(normal)
    assert float(latents.mean((0, 2, 3)).abs().max()) > 0.5
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(new_logvar, logvar - 2 * std.log(), atol=1e-4, rtol=1e-4)
    scale = float(before.abs().max())
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(after[inside], before[inside], atol=1e-5 * scale, rtol=0)
    assert float((after - before).abs().max()) > 1e-3 * scale  # the border is another matter, as the docstring says


def test_denoiser_trains(stage, tmp_path):
    vae, network = make_vae().requires_grad_(False), make_denoiser()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    averaged = train_denoiser(
        network,
        vae,
        stage,
        ALONE,
        minutes=1e-6,
        peak=1e-3,
        batch=2,
        capacity=4,
        log=tmp_path / "unet.csv",
        seed=0,
        cooldown=False,
        save=lambda averaged: None,
    )
    assert isinstance(averaged, Denoiser)
    moved = changed(network, before)
    assert any(name.startswith("unet.") for name in moved)
    assert any(name.startswith("tower.") for name in moved)
    assert all(torch.isfinite(v).all() for v in averaged.state_dict().values())
    (row,) = rows_of(tmp_path / "unet.csv")
    assert np.isfinite(row).all()
    # with every residual branch at zero the network answers 0, so the first loss is the target's power: that of the
    # latents (below 1 from a VAE that nothing normalised) or, at low noise, of the noise: 1
    assert 0.01 < row[3] < 5


def test_loss_is_zero_for_the_true_answer():
    """The target is the F of D = x / (sigma² + 1) - sigma / sqrt(sigma² + 1) F at which D is the clean latents."""
    clean, noise = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 3, 4, 8, 8)
    log_sigma = torch.tensor([-1.0, 2.0])
    sigma = log_sigma.exp()[:, None, None, None, None]
    noisy = clean + sigma * noise

    class Oracle(torch.nn.Module):
        def forward(self, x, c_noise, token, vectors):
            torch.testing.assert_close(x[:, :, :4], noisy / (sigma**2 + 1).sqrt())
            torch.testing.assert_close(c_noise, log_sigma / 4)
            assert not x[1, :, 4:].any()  # the picture of the second orbit is withheld
            torch.testing.assert_close(x[0, :, 4:], clean[0, -1:].expand(3, 4, 8, 8))
            return (noisy / (sigma**2 + 1) - clean) * (sigma**2 + 1).sqrt() / sigma

    network = Denoiser(Oracle(), CLIPImageTower(TINY.clip))
    loss, made = network(clean, torch.randn(2, 3, SIZE, SIZE), None, log_sigma, noise, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(loss, torch.zeros(2), atol=1e-8, rtol=0)
    torch.testing.assert_close(made, clean, atol=1e-5, rtol=0)


def test_cache_replaces_the_oldest(stage):
    cache = Cache(stage, make_vae(), np.random.default_rng(0), 4, make_denoiser().unet)
    counts = []
    for _ in range(3):
        cache.add()
        counts.append((cache.count, cache.next))
    assert counts == [(2, 2), (4, 0), (4, 2)]
    shown = torch.tensor([20, 3])
    latents, images, vectors, true = cache.batch(5, shown)
    assert true.shape == (5, 2, SIZE, SIZE, 4)
    assert true.dtype == torch.uint8
    torch.testing.assert_close(true[:, 0, :, :, :3].permute(0, 3, 1, 2) / 127.5 - 1, images)  # the last is the input
    assert (true[..., :3][true[..., 3] == 0] == 255).all()
    assert latents.shape == (5, 21, 4, 8, 8)
    assert images.shape == (5, 3, SIZE, SIZE)
    assert float(images.min()) >= -1
    assert float(images.max()) == 1
    assert vectors.shape == (5, 21, 1280)
    assert latents.dtype == vectors.dtype == torch.float32
    for capacity in (0, 3):
        with pytest.raises(ValueError, match="capacity: expected a positive multiple of 2"):
            Cache(stage, make_vae(), np.random.default_rng(0), capacity, make_denoiser().unet)
