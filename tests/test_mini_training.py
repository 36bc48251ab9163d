"""Training of the embedded model, on the CPU with generated objects and a handful of steps."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_sv3d import config

from sv3d_fast.camera import Orbit
from sv3d_fast.mini import denoiser, evaluate, optimise, scenes, train
from sv3d_fast.mini.autoencoder import normalise_latents, pictures, train_autoencoder
from sv3d_fast.mini.denoiser import Cache, Denoiser, initialise, train_denoiser
from sv3d_fast.mini.evaluate import Score, contact_sheet, means, write_scores
from sv3d_fast.mini.optimise import Average, learning_rate
from sv3d_fast.mini.pack import Entry, procedural_object, write_pack
from sv3d_fast.mini.parallel import Workers, start_workers
from sv3d_fast.mini.scenes import Stage, framed, odds, random_orbit, random_shape, recolored
from sv3d_fast.model.clip import CLIPImageTower
from sv3d_fast.model.config import CLIPConfig
from sv3d_fast.model.unet import SV3DUNet
from sv3d_fast.model.vae import SV3DVAE
from sv3d_fast.model.weights import SV3DModel, load_model, save_model

CPU = torch.device("cpu")
ALONE = Workers(0, 1, CPU)
SIZE = 32
TINY = replace(config(), image_size=SIZE, frames=21, sampler=replace(config().sampler, steps=1, sigma_max=80.0))
TINY = replace(
    TINY,
    vae=replace(TINY.vae, scaling=1.0),
    clip=CLIPConfig(width=32, layers=1, heads=2, mlp_width=32, patch=8, image_size=SIZE, projection=32),
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(optimise, "AGREE_EVERY", 4)
    monkeypatch.setattr(denoiser, "CHUNK", 2)
    monkeypatch.setattr(train, "CHUNK", 2)
    monkeypatch.setattr("sv3d_fast.mini.autoencoder.POOL", 2)


@pytest.fixture(scope="module")
def stage():
    return Stage([procedural_object(0, n) for n in range(3)], SIZE, CPU)


def make_vae():
    torch.manual_seed(0)
    return SV3DVAE(TINY.vae)


def make_denoiser():
    torch.manual_seed(0)
    network = Denoiser(SV3DUNet(TINY.unet), CLIPImageTower(TINY.clip))
    initialise(network.unet)
    return network


def rows_of(path):
    with path.open(newline="") as file:
        return [[float(v) for v in row] for row in csv.reader(file)]


def changed(module, before):
    return [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]


# Scenes


def test_framed_fills_the_frame_at_the_widest_view():
    rng = np.random.default_rng(0)
    for fill in (0.72, 0.96):
        orbit = random_orbit(rng)
        points = torch.from_numpy(rng.uniform([1, 2, 3], [2, 2.3, 9], (500, 3)).astype(np.float32))
        made = framed(points, orbit, fill)
        view = orbit.world_to_camera()
        position = made @ view[:, :3, :3].mT + view[:, None, :3, 3]
        reach = position[..., :2].abs().amax(-1) / position[..., 2] / math.tan(math.radians(orbit.fov) / 2)
        assert float(reach.max()) == pytest.approx(fill, rel=1e-4)
        low, high = made.aminmax(dim=0)
        torch.testing.assert_close(low, -high, atol=1e-5, rtol=0)


def test_recolored_keeps_shapes_and_flat_areas():
    textures = torch.zeros(6, 8, 8, 3, dtype=torch.uint8)
    textures[:, :4] = torch.tensor([200, 100, 50], dtype=torch.uint8)
    made = recolored(textures, np.random.default_rng(0), np.full(len(textures), 0.3))
    assert made.shape == textures.shape
    assert made.dtype == torch.uint8
    assert not made[:, 4:].any()  # black stays black
    assert (made[:, :4] == made[:, :1, :1]).all()
    assert len({tuple(color) for color in made[:, 0, 0].tolist()}) == 6
    orders = {tuple(color.argsort().tolist()) for color in made[:, 0, 0]}
    assert len(orders) > 1  # channels are exchanged in some


def test_random_shapes_are_turned_and_stretched_about_the_vertical():
    rng = np.random.default_rng(0)
    shapes = torch.stack([random_shape(rng, front=False) for _ in range(200)])
    determinants = torch.linalg.det(shapes)
    assert (determinants > 0.2).any()
    assert (determinants < -0.2).any()
    assert not shapes[:, :2, 2].any()
    assert not shapes[:, 2, :2].any()
    assert (shapes[:, 2, 2] > 0).all()  # never upside down
    assert (shapes[:, 0, 0] < 0).any()  # seen from behind too
    fronts = torch.stack([random_shape(rng, front=True) for _ in range(200)])
    assert (fronts[:, 0, 0] > 0).all()
    assert (fronts[:, 1, 1] < 0).any()


def test_bends_change_proportions_and_keep_normals_upright():
    """Normals of the bent surface by differences of points that were bent with it."""
    rng = np.random.default_rng(3)
    points = torch.from_numpy(rng.uniform(-1, 1, (64, 3)))
    points[:2] = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])  # the box stays when neighbours are bent
    normal = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(64, 3))), dim=-1)
    bends = scenes.random_bends(rng, 8).double()
    assert bends.abs().sum(2).max() <= 0.7 + 1e-6
    for bend in bends:
        moved, turned = scenes.bent_along(points, normal, bend)
        assert not torch.allclose(moved, points, atol=0.01)
        assert (moved[points[:, 0].argsort(), 0].diff() >= 0).all()  # nothing is folded over
        for axis in torch.linalg.qr(normal[:, :, None], mode="complete")[0][:, :, 1:].unbind(2):  # along the surface
            inner = points[2:] * 0.9
            ends = [
                scenes.bent_along(torch.cat([points[:2], inner + s * axis[2:]]), normal, bend)[0] for s in (-1e-5, 1e-5)
            ]
            along = torch.nn.functional.normalize((ends[1] - ends[0])[2:], dim=-1)
            there = scenes.bent_along(torch.cat([points[:2], inner]), normal, bend)[1][2:]
            assert float((along * there).sum(1).abs().max()) < 1e-4
        torch.testing.assert_close(turned.norm(dim=1), torch.ones(64).double())


def test_random_orbits_stay_in_range():
    rng = np.random.default_rng(1)
    for _ in range(60):
        orbit = random_orbit(rng)
        assert len(orbit) == 21
        assert orbit.azimuths[-1] == 0
        assert -5 <= orbit.elevations[-1] <= 40.01
        assert orbit.elevations.abs().max() <= 80
        assert (orbit.azimuths[:-1].diff() > 0).all()
        assert 0 < orbit.azimuths[0] <= orbit.azimuths[-2] < 360


def test_random_views(stage):
    first, again = (stage.random(4, np.random.default_rng(5)) for _ in range(2))
    assert first.frames.shape == (4, 21, SIZE, SIZE, 3)
    assert first.alpha.shape == (4, 21, SIZE, SIZE)
    assert torch.equal(first.frames, again.frames)
    assert (first.frames[first.alpha == 0] == 255).all()
    solid = first.alpha > 0
    assert solid.any(-1).any(-1).all()  # the object is in every frame
    for border in (solid[:, :, 0], solid[:, :, -1], solid[..., 0], solid[..., -1]):
        assert not border.any()


def test_standard_views_are_the_objects_as_they_are(stage):
    orbit = Orbit.static(10.0, 4)
    both = stage.standard([2, 0], orbit)
    assert torch.equal(both.frames[1], stage.standard([0], orbit).frames[0])
    assert not torch.equal(both.frames[0], both.frames[1])


def test_modelled_objects_have_their_share():
    shares = odds([True, False, False, False, True, False])
    assert shares.sum() == pytest.approx(1)
    assert shares[[0, 4]].tolist() == pytest.approx([scenes.MODELLED_SHARE / 2] * 2)
    assert shares[1] == shares[2] == shares[5] > 0
    for alike in ([True] * 3, [False] * 3):
        assert odds(alike).tolist() == pytest.approx([1 / 3] * 3)


def test_stage_takes_arrays_that_cannot_be_written_to(recwarn):
    thing = procedural_object(0, 0)
    for name in ("vertices", "faces", "uvs", "normals", "texture"):
        getattr(thing, name).flags.writeable = False
    Stage([thing], SIZE, CPU)
    assert not [w for w in recwarn if "writable" in str(w.message)]


def test_stage_refuses():
    with pytest.raises(ValueError, match="objects: expected at least one"):
        Stage([], SIZE, CPU)
    with pytest.raises(ValueError, match="texture: expected"):
        Stage([replace(procedural_object(0, 0), texture=np.zeros((24, 24, 3), np.uint8))], SIZE, CPU)
    assert scenes.TEXTURE % len(procedural_object(0, 0).texture) == 0


# The optimiser


def test_average_is_the_power_function_one():
    module = torch.nn.Linear(1, 1, bias=False)
    average, values = Average(module), []
    for step in range(1, 51):
        values.append(math.sin(step) * step)
        module.weight.data.fill_(values[-1])
        average.update(module)
        if step == 1:
            assert average.module.weight.item() == pytest.approx(values[0])
    # weights of Karras et al.'s recursion, written out: (1 - beta_t) times the betas after t
    betas = [(1 - 1 / t) ** 10 for t in range(1, 51)]
    shares = [(1 - betas[i]) * math.prod(betas[i + 1 :]) for i in range(50)]
    assert math.fsum(shares) == pytest.approx(1)
    assert sum(shares[-10:]) > 0.85  # the last fifth has most of it
    assert average.module.weight.item() == pytest.approx(float(np.dot(shares, values)), rel=1e-4)
    assert not average.module.weight.requires_grad


def test_learning_rate_warms_up_and_cools_down():
    assert learning_rate(1.0, 0, 0.0) == pytest.approx(1 / optimise.WARMUP)
    assert learning_rate(2.0, optimise.WARMUP, 0.5) == 2.0
    assert learning_rate(2.0, 5000, 1 - optimise.COOLDOWN / 2) == pytest.approx(1.0)
    assert learning_rate(2.0, 5000, 1.0) == learning_rate(2.0, 5000, 1.2) == 0.0


def test_no_minutes(stage, tmp_path):
    with pytest.raises(ValueError, match="minutes: expected a positive number, got 0"):
        train_autoencoder(make_vae(), stage, ALONE, minutes=0, batch=2, log=tmp_path / "vae.csv", seed=0)


# The two stages


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


# Scores


def test_scores_of_a_model_that_shows_the_truth(stage, monkeypatch):
    truth = stage.standard([0, 1, 2], Orbit.static(evaluate.ELEVATION)).frames
    monkeypatch.setattr(evaluate, "generate", lambda model, images, orbits, config, seed: truth[: len(images)])
    found = list(evaluate.evaluate(None, stage, TINY.sampler, batch=3))
    assert [s.name for s, _, _ in found] == [o.name for o in stage.objects]
    for score, views, made in found:
        assert score.psnr == evaluate.PSNR_CEILING
        assert score.ssim == pytest.approx(1)
        assert score.iou > 0.8  # true masks are soft at their edges, and white parts look empty
        assert score.input_psnr < 40
        assert torch.equal(views.frames[0], made)


def test_generate_is_the_stage_that_users_run():
    torch.manual_seed(0)
    model = SV3DModel(TINY, SV3DUNet(TINY.unet), SV3DVAE(TINY.vae), CLIPImageTower(TINY.clip))
    images = torch.randint(256, (2, SIZE, SIZE, 3), dtype=torch.uint8)
    made = evaluate.generate(model, images, [Orbit.static(10.0, 4)] * 2, TINY.sampler, 3)
    assert made.shape == (2, 4, SIZE, SIZE, 3)
    assert torch.equal(made[:, -1], images)
    assert torch.equal(made, evaluate.generate(model, images, [Orbit.static(10.0, 4)] * 2, TINY.sampler, 3))


def test_mean_psnr_is_over_frames():
    truth = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    frames = truth.clone()
    frames[1] += 25  # (25 / 255)²: 20.17 dB
    assert evaluate.mean_psnr(frames, truth) == pytest.approx((evaluate.PSNR_CEILING - 20 * math.log10(25 / 255)) / 2)


def test_means_and_table(tmp_path):
    scores = [Score("a", "x", 20.0, 0.5, 0.25, 10.0), Score("b, c", "y", 30.0, 1.0, 0.75, 12.0)]
    assert means(scores) == {"psnr": 25.0, "ssim": 0.75, "iou": 0.5, "input_psnr": 11.0}
    write_scores(scores, tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["name"], float(r["psnr"])) for r in rows] == [("a", 20.0), ("b, c", 30.0)]


def test_contact_sheet_has_a_column_for_every_third_frame():
    true, made = torch.zeros(21, 16, 16, 3, dtype=torch.uint8), torch.full((21, 16, 16, 3), 90, dtype=torch.uint8)
    made[20] = 200
    sheet = contact_sheet([("one", true, made), ("two", true, made)])
    assert sheet.size == (7 * 16, 2 * (2 * 16 + evaluate.LABEL_HEIGHT))
    assert sheet.getpixel((8, evaluate.LABEL_HEIGHT + 8)) == (0, 0, 0)
    assert sheet.getpixel((8, evaluate.LABEL_HEIGHT + 24)) == (90, 90, 90)
    assert sheet.getpixel((7 * 16 - 1, sheet.height - 1)) == (200, 200, 200)  # the last column is the input view


# Several processes


def _averages(rank, address, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    workers = Workers(rank, 2, CPU)
    weights = torch.nn.Linear(2, 3)
    torch.nn.init.constant_(weights.weight, rank + 1.0)
    workers.same(weights)
    tensors = [torch.full((2, 3), float(rank)), torch.arange(6.0).view(1, 2, 3).mT * (rank + 1)]
    workers.average(tensors)
    agreed = workers.agree(0.25 + rank)
    torch.save((weights.weight.detach(), [t.contiguous() for t in tensors], agreed), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_average_and_agree(tmp_path):
    torch.multiprocessing.spawn(_averages, (str(tmp_path / "meeting"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        weight, (first, second), agreed = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(weight, torch.ones(3, 2))
        assert torch.equal(first, torch.full((2, 3), 0.5))
        assert torch.equal(second, torch.arange(6.0).view(1, 2, 3).mT * 1.5)
        assert agreed == 0.25


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    workers = start_workers()
    assert (workers.rank, workers.count, workers.first) == (0, 1, True)
    tensor = torch.ones(2)
    workers.average([tensor])
    assert torch.equal(tensor, torch.ones(2))
    assert workers.agree(0.5) == 0.5


# The command


def make_pack(path):
    entries = []
    for number, split in enumerate(("train", "held_out", "held_out")):
        o = procedural_object(1, number)
        text = {k: getattr(o, k) for k in ("name", "key", "source", "category", "creator", "licence")}
        entries.append(
            Entry(
                **text, split=split, vertices=o.vertices, faces=o.faces, normals=o.normals, uvs=o.uvs, texture=o.texture
            )
        )
    write_pack(path, entries)
    return path


@pytest.fixture
def tiny_training(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "MINI", TINY)
    monkeypatch.setattr(train, "NORMALISED_ON", 2)
    arguments = [
        "--data", str(make_pack(tmp_path / "objects.pack")), "--output", str(tmp_path / "out"), "--procedural", "2",
        "--batch", "2", "--batch-vae", "2", "--capacity", "4", "--seed", "0",
    ]  # fmt: skip
    return arguments, tmp_path / "out"


def test_training_from_nothing_goes_on_and_scores(tiny_training, monkeypatch, capsys):
    arguments, out = tiny_training
    train.main([*arguments, "--minutes-vae", "1e-6", "--minutes-unet", "1e-6", "--shard-size", "200KB"])
    assert {p.name for p in out.iterdir()} == {
        "vae", "raw", "weights", "vae.csv", "unet.csv", "scores_1_2.5.csv", "sheet_1_2.5.jpg",
    }  # fmt: skip
    assert len(list((out / "raw").glob("*.safetensors"))) > 1
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["steps"] == 1
    assert math.isfinite(figures["psnr"])
    first = load_model(out / "weights")
    assert first.config == TINY
    vae_files = {p.name: p.read_bytes() for p in (out / "vae").iterdir()}

    fetched = []
    fetch = train._fetch
    monkeypatch.setattr(train, "_fetch", lambda module, folder: (fetched.append(folder.name), fetch(module, folder)))
    train.main([*arguments, "--minutes-unet", "1e-6", "--evaluate"])
    assert fetched == ["vae", "raw"]
    assert {p.name: p.read_bytes() for p in (out / "vae").iterdir()} == vae_files
    assert [p.name for p in (out / "raw").glob("*.safetensors")] == ["model.safetensors"]
    second = load_model(out / "weights")
    assert changed(second.unet, first.unet.state_dict())
    assert not changed(second.vae, first.vae.state_dict())
    assert "psnr" not in capsys.readouterr().out.splitlines()[-1]

    before = {p: p.stat().st_mtime_ns for p in (out / "weights").rglob("*")}
    train.main([*arguments, "--minutes-unet", "0", "--evaluate", "2:1.0"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["guidance"] == 1.0
    assert before == {p: p.stat().st_mtime_ns for p in (out / "weights").rglob("*")}
    assert (out / "scores_2_1.csv").exists()


def test_training_starts_from_a_finished_model(tiny_training, monkeypatch, tmp_path):
    arguments, out = tiny_training
    torch.manual_seed(1)
    model = SV3DModel(TINY, SV3DUNet(TINY.unet), SV3DVAE(TINY.vae), CLIPImageTower(TINY.clip))
    save_model(model, tmp_path / "finished")
    given = []
    monkeypatch.setattr(train, "denoiser", lambda args, workers, vae, stage: given.append(vae))
    train.main([*arguments, "--weights", str(tmp_path / "finished"), "--evaluate"])
    assert not changed(given[0], {k: v.half().float() for k, v in model.vae.state_dict().items()})
    network = make_denoiser()
    train._fetch(network, out / "raw")
    assert not changed(network.unet, {k: v.bfloat16().float() for k, v in model.unet.state_dict().items()})
    assert not changed(network.tower, {k: v.bfloat16().float() for k, v in model.image_encoder.state_dict().items()})


def test_half_a_checkpoint_is_refused(tiny_training):
    _, out = tiny_training
    out.mkdir()
    network = make_denoiser()
    train._store(network, out / "raw", torch.bfloat16, "200KB")
    train._fetch(make_denoiser(), out / "raw")
    sorted((out / "raw").glob("*.safetensors"))[0].unlink()
    with pytest.raises(ValueError, match=r"raw: .* missing"):
        train._fetch(make_denoiser(), out / "raw")


@pytest.mark.parametrize(
    ("there", "more", "message"),
    [
        ([], ["--data", "nowhere.pack"], "--data: no such file: nowhere.pack"),
        ([], ["--minutes-vae", "0"], "--minutes-vae: expected more than 0, since there is no"),
        (["raw"], ["--minutes-vae", "1"], "--minutes-vae: expected 0, since"),
        (["vae"], ["--minutes-unet", "0"], "--minutes-unet: expected more than 0, since there is no"),
        ([], ["--minutes-unet", "-1"], "--minutes-unet: expected minutes, 0 or more, got -1"),
        ([], ["--minutes-unet", "nan"], "--minutes-unet: expected minutes"),
        ([], ["--weights", "nowhere"], "--weights: no such folder: nowhere"),
        (["raw"], ["--weights", "."], "--weights: expected a folder without vae/ and raw/"),
        ([], ["--batch", "0"], "--batch: expected at least 1, got 0"),
        ([], ["--capacity", "3"], "--capacity: expected a multiple of 2, got 3"),
        ([], ["--evaluate", "20"], "expected STEPS:GUIDANCE, such as 4:1.0, got '20'"),
        ([], ["--evaluate", "0:1"], "expected at least one step"),
    ],
)
def test_command_lines_that_cannot_run(tiny_training, capsys, there, more, message):
    arguments, out = tiny_training
    for name in there:
        (out / name).mkdir(parents=True)
    with pytest.raises(SystemExit) as info:
        train.main([*arguments, *more])
    assert info.value.code == 2
    assert message in capsys.readouterr().err
