"""Two devices for one orbit: the same result as on one. Here both are the CPU, so the same code makes every copy."""

from dataclasses import replace

import pytest
import torch
from test_engine import SAMPLING, given, make_unet, steps_of
from test_generation import SAMPLING as GENERATING
from test_generation import pictures, turns
from tiny_sv3d import config, relative_error

from sv3d_fast import cli, orbit_stage
from sv3d_fast.cfg_parallel import SplitPrediction, Twin, even_chunk, twin_of
from sv3d_fast.devices import second_device
from sv3d_fast.engine import NonFiniteError, denoising
from sv3d_fast.events import Progress, finish
from sv3d_fast.generation import generating
from sv3d_fast.model.clip import CLIPImageTower
from sv3d_fast.model.vae import SV3DVAE
from sv3d_fast.model.weights import SV3DModel
from sv3d_fast.settings import Settings

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    return SV3DModel(config(), make_unet(), SV3DVAE(config().vae).eval(), CLIPImageTower(config().clip))


@pytest.mark.parametrize("orbits", [1, 2])
def test_split_steps_are_those_of_one_device(model, orbits):
    conditioning, noise = given(orbits)
    split = finish(denoising(model.unet, conditioning, noise, SAMPLING, twin=twin_of(model, CPU).unet))
    in_turn = finish(denoising(model.unet, conditioning, noise, SAMPLING, twin=model.unet))
    assert torch.equal(split, in_turn)
    together = finish(denoising(model.unet, conditioning, noise, SAMPLING))
    assert relative_error(split, together) < 1e-5  # other sizes of batch, other orders of sums


def test_each_half_is_predicted_by_its_own_network(model):
    other = make_unet()
    other.conv_out.bias.add_(1)  # the unconditional half gains one in each value
    conditioning, noise = given()
    halves = [conditioning.unconditional(), conditioning]
    usual = SplitPrediction([model.unet, model.unet], halves, [2.0])
    shifted = SplitPrediction([other, model.unet], halves, [2.0])
    noisy = noise.movedim(2, -1).contiguous()
    with torch.no_grad():
        difference = (shifted(0, noisy) - usual(0, noisy)).unflatten(0, (2, -1))
    torch.testing.assert_close(difference[0], torch.ones_like(difference[0]))
    assert torch.equal(difference[1], torch.zeros_like(difference[1]))


def test_latents_sent_back_reach_both_devices(model):
    conditioning, noise = given()
    swapped = [
        steps_of(
            denoising(model.unet, conditioning, noise, SAMPLING, twin=twin),
            lambda step: step.latents * 0.5 if step.index == 1 else None,
        )[1]
        for twin in (None, twin_of(model, CPU).unet)
    ]
    assert relative_error(*swapped) < 1e-5


def test_without_guidance_the_twin_is_not_asked():
    conditioning, noise = given()
    unguided = replace(SAMPLING, max_guidance=1.0)
    broken = make_unet()
    broken.conv_in.weight.fill_(float("nan"))
    made = finish(denoising(make_unet(), conditioning, noise, unguided, twin=broken))
    assert torch.equal(made, finish(denoising(make_unet(), conditioning, noise, unguided)))


def test_numbers_that_end_on_the_twin_name_its_layer():
    conditioning, noise = given()
    broken = make_unet()
    broken.mid_block.resnets[0].spatial_res_block.conv2.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match=r"after step 1 of 3; .*mid_block\.resnets\.0\.spatial_res_block\.conv2"):
        finish(denoising(make_unet(), conditioning, noise, SAMPLING, twin=broken))


def test_a_twin_is_a_copy_made_once_and_again_when_weights_change(model):
    first = twin_of(model, CPU)
    assert twin_of(model, CPU) is first
    for ours, theirs in ((model.unet, first.unet), (model.vae, first.vae)):
        assert not {t.data_ptr() for t in ours.parameters()} & {t.data_ptr() for t in theirs.parameters()}
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
    with torch.no_grad():
        model.vae.decoder.conv_out.bias.add_(1)
    second = twin_of(model, CPU)
    assert second is not first
    assert torch.equal(second.vae.decoder.conv_out.bias, model.vae.decoder.conv_out.bias)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_pictures_of_both_devices_are_those_of_one(model, chunk):
    arguments = (model, pictures(2), turns(2), GENERATING, [3, 4])
    alone = finish(generating(*arguments, chunk=chunk))
    events, split = steps_of(generating(*arguments, chunk=chunk, twin=twin_of(model, CPU)))
    assert int((split.int() - alone.int()).abs().max()) <= 1  # chunks of another size round otherwise
    assert all(isinstance(event, Progress) for event in events)
    assert [e.done for e in events] == list(range(1, events[0].total + 1))


def test_the_twin_decodes_its_chunks(model):
    dark = twin_of(model, CPU)
    dark = Twin(dark.unet, SV3DVAE(config().vae))
    with torch.no_grad():
        for parameter in dark.vae.decoder.conv_out.parameters():
            parameter.fill_(0)
    made = finish(generating(model, pictures(), turns(), GENERATING, [0], chunk=2, twin=dark))
    flat = [bool((frame == 128).all()) for frame in made[0]]
    assert flat == [False, False, True, True, False]  # chunks of two, in turn; the last frame is the picture


@pytest.mark.parametrize(
    ("count", "chunk", "devices", "expected"),
    [(21, 7, 2, 6), (21, 21, 2, 11), (21, 7, 1, 7), (1, 7, 2, 1), (8, 4, 2, 4)],
)
def test_chunks_are_shared_evenly(count, chunk, devices, expected):
    made = even_chunk(count, chunk, devices)
    assert made == expected <= chunk
    assert -(-count // made) % devices == 0 or count < devices


@pytest.mark.parametrize(
    ("first", "count", "message"),
    [
        ("cpu", 8, "cfg_parallel: needs two GPUs, and device is cpu"),
        ("cuda", 0, "cfg_parallel: needs two GPUs, and this machine has 0"),
        ("cuda:0", 1, "cfg_parallel: needs two GPUs, and this machine has 1"),
    ],
)
def test_machines_that_cannot(monkeypatch, first, count, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=f"^{message}$"):
        second_device(torch.device(first))


def test_the_next_gpu_is_the_second(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for first, second in (("cuda", 1), ("cuda:0", 1), ("cuda:1", 2), ("cuda:2", 0)):
        assert second_device(torch.device(first)) == torch.device("cuda", second)


@pytest.mark.parametrize("command", ["run", "orbit"])
def test_the_command_refuses_before_it_writes(command, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"")  # not even read
    out = tmp_path / "out"
    assert cli.main([command, str(photo), "-o", str(out), "--device", "cpu", "--cfg-parallel"]) == 2
    assert capsys.readouterr().err == "sv3d-fast: error: cfg_parallel: needs two GPUs, and device is cpu\n"
    assert not out.exists()


def test_an_orbit_through_the_pipeline(monkeypatch, tmp_path):
    photo = tmp_path / "photo.png"
    from small_run import SMALL

    from sv3d_fast.benchmark import draw_subject

    draw_subject().save(photo)
    monkeypatch.setattr(orbit_stage, "second_device", lambda device: CPU)
    settings = Settings(device="cpu", **SMALL)
    alone, _ = finish(orbit_stage.orbiting(photo, tmp_path / "alone", settings))
    split, _ = finish(orbit_stage.orbiting(photo, tmp_path / "split", replace(settings, cfg_parallel=True)))
    assert relative_error(split.frames.float(), alone.frames.float()) < 1e-3
