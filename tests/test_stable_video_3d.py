"""The drop-in pipeline: numbers against diffusers' classes, and every promise of its interface on a tiny model."""

import copy
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from diffusers.utils import export_to_video
from PIL import Image
from tiny_sv3d import FRAMES, LATENTS, SIDE, SIZE, STEPS, even_turn, load, make_folder, picture, relative_error, seeded
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from sv3d_fast import Orbit
from sv3d_fast.stable_video_3d import StableVideo3DPipeline

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("sv3d") / "p", 1280)


@pytest.fixture(scope="module")
def folder_u(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("sv3d") / "u", 256)


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder)


# The snippet that people paste


def test_the_snippet(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, image, poses = folder, picture(), even_turn(frames=21)

    pipe = StableVideo3DPipeline.from_pretrained(path, torch_dtype=torch.float16)
    pipe.enable_model_cpu_offload()
    frames = pipe(image=image, poses=poses, decode_chunk_size=8, generator=torch.manual_seed(42)).frames[0]
    export_to_video(frames, "o.mp4", fps=7)

    assert len(frames) == 21
    assert all(isinstance(frame, Image.Image) and frame.size == (SIZE, SIZE) for frame in frames)
    assert np.array_equal(np.asarray(frames[-1]), np.asarray(image))
    assert np.ptp(np.stack(frames[:-1]).astype(float)) > 0
    import av

    with av.open("o.mp4") as video:
        assert sum(1 for _ in video.decode(video=0)) == 21


# Numbers


@torch.no_grad()
def diffusers_latents(path, image, noise, image_noise, num_inference_steps=None, sigmas=None):
    """The orbit of SV3D_u by diffusers' and transformers' own classes, triangle guidance written out."""
    unet = UNetSpatioTemporalConditionModel.from_pretrained(path / "unet")
    vae = AutoencoderKL.from_pretrained(path / "vae")
    tower = CLIPVisionModelWithProjection.from_pretrained(path / "image_encoder")
    scheduler = EulerDiscreteScheduler.from_pretrained(path / "scheduler")
    extractor = CLIPImageProcessor.from_pretrained(path / "feature_extractor")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    shrunk = (_resize_with_antialiasing(pixels, (32, 32)) + 1) / 2
    shrunk = extractor(
        images=shrunk, do_normalize=True, do_center_crop=False, do_resize=False, do_rescale=False, return_tensors="pt"
    ).pixel_values
    token = tower(shrunk).image_embeds[:, None]
    token = torch.cat([torch.zeros_like(token), token])
    condition = vae.encode(pixels + 1e-5 * image_noise).latent_dist.mode()
    condition = torch.cat([torch.zeros_like(condition), condition])[:, None].expand(-1, noise.shape[1], -1, -1, -1)
    rise = torch.arange(noise.shape[1]) / (noise.shape[1] - 1)
    scale = 1 + 1.5 * (1 - (2 * rise - 1).abs())
    scheduler.set_timesteps(num_inference_steps, sigmas=sigmas)
    latents = noise * scheduler.init_noise_sigma
    ids = torch.full((2, 1), 1e-5)
    for t in scheduler.timesteps:
        both = torch.cat([scheduler.scale_model_input(torch.cat([latents] * 2), t), condition], 2)
        uncond, cond = unet(both, t, encoder_hidden_states=token, added_time_ids=ids).sample.chunk(2)
        output = uncond + scale[None, :, None, None, None] * (cond - uncond)
        latents = scheduler.step(output, t, latents).prev_sample
    return latents, vae


@pytest.mark.parametrize(
    "schedule",
    # two steps would do for the code, but 700 noise to none in one of them leaves only float32's rounding to compare
    [{"num_inference_steps": 10}, {"sigmas": [90.0, 20.0, 3.0, 0.4, 0.0]}],
)
def test_equals_diffusers_components(folder_u, schedule):
    pipe, image = load(folder_u), picture(1)
    generator = seeded(7)
    image_noise = torch.randn(1, 3, SIZE, SIZE, generator=generator)
    noise = torch.randn(1, *LATENTS, generator=generator)  # diffusers' order of draws
    expected, vae = diffusers_latents(folder_u, image, noise, image_noise, **schedule)
    drawn = pipe(image, **schedule, generator=seeded(7), output_type="latent").frames
    assert relative_error(drawn, expected) <= 1e-5
    with torch.no_grad():
        decoded = vae.decode(expected.flatten(0, 1) / 0.18215).sample
    frames = pipe(image, **schedule, latents=noise, generator=seeded(7), output_type="pt").frames
    assert float((frames[0, :-1] - (decoded / 2 + 0.5).clamp(0, 1)[:-1]).abs().max()) <= 1e-4


def test_cameras_reach_the_model_and_precision_stays(pipe, folder):
    image = picture()
    low, high = (pipe(image, elevation=e, generator=seeded(), output_type="latent").frames for e in (0.0, 40.0))
    assert relative_error(low, high) > 1e-3
    half = load(folder, dtype=torch.float16)(image, elevation=0.0, generator=seeded(), output_type="latent").frames
    assert half.dtype == torch.float32
    assert relative_error(half, low) < 0.05


# Cameras


def test_input_view_first_or_last(pipe):
    image = picture()
    last = pipe(image, poses=even_turn(), generator=seeded(), output_type="pt").frames
    first = pipe(image, poses=even_turn(input_first=True), generator=seeded(), output_type="pt").frames
    assert torch.equal(first, last.roll(1, 1))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    assert torch.allclose(first[0, 0], pixels, atol=1e-6)
    assert torch.equal(pipe.guidance_scale.flatten(), torch.tensor([1.0, 1.0, 1.75, 2.5, 1.75]))


def test_latents_are_in_the_order_of_the_poses(pipe):
    noise, seen = torch.randn(1, *LATENTS, generator=seeded(1)), []

    def keep(_, index, t, tensors):
        seen.append(tensors["latents"])
        return tensors

    kwargs = {"output_type": "latent", "callback_on_step_end": keep}
    last = pipe(picture(), poses=even_turn(), latents=noise, generator=seeded(), **kwargs).frames
    rolled = noise.roll(1, 1)
    first = pipe(picture(), poses=even_turn(input_first=True), latents=rolled, generator=seeded(), **kwargs).frames
    assert torch.equal(first, last.roll(1, 1))
    assert torch.equal(seen[STEPS], seen[0].roll(1, 1))
    assert torch.equal(seen[-1], first)


def test_ways_of_saying_the_same_orbit(pipe):
    turn = Orbit.static(5.0, FRAMES)
    ways = [
        {"orbit": turn},
        {"elevation": 5},
        {"poses": even_turn()},
        {"polars_rad": turn.polars_rad, "azimuths_rad": turn.azimuths_rad.tolist()},
        {"polars_rad": [np.pi / 2 - np.radians(5)] * FRAMES, "azimuths_rad": np.linspace(0, 2 * np.pi, FRAMES + 1)[1:]},
    ]
    results = [pipe(picture(), **way, generator=seeded(), output_type="latent").frames for way in ways]
    for other in results[1:]:
        assert relative_error(other, results[0]) < 1e-4


def test_sv3d_u_takes_no_cameras(folder_u):
    pipe = load(folder_u)
    rounded = [pose | {"azimuth": round(pose["azimuth"] + 0.1)} for pose in even_turn()]
    assert len(pipe(picture(), poses=rounded, num_inference_steps=1, output_type="latent").frames[0]) == FRAMES
    for orbit in (
        Orbit.sine(frames=FRAMES),
        replace(Orbit.static(5.0, FRAMES), azimuths=-Orbit.static(5.0, FRAMES).azimuths),
    ):
        with pytest.raises(ValueError, match="SV3D_u takes no cameras"):
            pipe(picture(), orbit=orbit)


# Pictures, seeds and batches


def test_a_list_of_images_with_one_generator_each(pipe):
    images = [picture(1), picture(2, size=96)]
    both = pipe(images, generator=[seeded(5), seeded(6)], output_type="latent").frames
    assert both.shape == (2, *LATENTS)
    for index, image in enumerate(images):
        alone = pipe(image, generator=seeded(5 + index), output_type="latent").frames
        assert relative_error(both[index], alone[0]) < 1e-4
    together = pipe(images, generator=seeded(5), output_type="pil").frames
    assert [len(frames) for frames in together] == [FRAMES, FRAMES]
    with pytest.raises(ValueError, match="generator: expected one for each of 2"):
        pipe(images, generator=[seeded()])


def test_several_videos_of_each_picture(pipe):
    images = [picture(1), picture(2)]
    noise = torch.randn(4, *LATENTS, generator=seeded(1))
    kwargs = {"generator": seeded(2), "output_type": "latent"}
    made = pipe(images, num_videos_per_prompt=2, latents=noise, **kwargs).frames
    assert made.shape == (4, *LATENTS)
    alone = pipe(images[1], latents=noise[2:3], generator=seeded(9), output_type="latent").frames
    assert relative_error(made[2], alone[0]) < 1e-3  # the second picture's first; but for noise of 1e-5 in the picture


def test_kinds_of_pictures(pipe):
    rgb = picture()
    reference = pipe(rgb, generator=seeded(), output_type="latent").frames
    tensor = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).float() / 255
    for same in (tensor, tensor[None], [tensor], rgb.convert("RGBA"), [rgb]):
        assert torch.equal(pipe(same, generator=seeded(), output_type="latent").frames, reference)
    clear = rgb.convert("RGBA")
    clear.putalpha(0)
    white = pipe(Image.new("RGB", rgb.size, "white"), generator=seeded(), output_type="latent").frames
    assert torch.equal(pipe(clear, generator=seeded(), output_type="latent").frames, white)
    grey = pipe(picture(size=31).convert("L"), num_inference_steps=1, height=48, width=80, output_type="np").frames
    assert grey.shape == (1, FRAMES, 48, 80, 3)


def test_output_types_and_chunks(pipe):
    def made(**kwargs):
        return pipe(picture(), generator=seeded(), **kwargs)

    tensor = made(output_type="pt", decode_chunk_size=2).frames
    assert tensor.shape == (1, FRAMES, 3, SIZE, SIZE)
    assert tensor.dtype == torch.float32
    assert 0 <= float(tensor.min()) < float(tensor.max()) <= 1
    array = made(output_type="np", return_dict=False)
    assert array.shape == (1, FRAMES, SIZE, SIZE, 3)
    np.testing.assert_allclose(array, tensor.permute(0, 1, 3, 4, 2).numpy(), atol=1e-5)
    output = made()
    pil = np.stack([np.asarray(frame) for frame in output[0][0]]) / 255
    assert output["frames"] is output.frames
    np.testing.assert_allclose(pil, array[0], atol=0.51 / 255)


# Callbacks and interruption


def test_callback_sees_and_replaces(pipe):
    calls = []

    def callback(given, index, t, tensors):
        calls.append((given, index, float(t), set(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == STEPS - 1 else {}

    latents = pipe(picture(), callback_on_step_end=callback, output_type="latent").frames
    assert not latents.any()
    assert [(c[0] is pipe, c[1], c[3]) for c in calls] == [(True, i, {"latents"}) for i in range(STEPS)]
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    np.testing.assert_allclose([c[2] for c in calls], scheduler.timesteps.numpy(), rtol=1e-5)
    assert pipe.num_timesteps == STEPS

    changed = pipe(
        picture(), generator=seeded(), output_type="latent",
        callback_on_step_end=lambda _, i, t, tensors: {"latents": tensors["latents"] * (0.5 if i == 0 else 1)},
    ).frames  # fmt: skip
    assert not torch.equal(changed, pipe(picture(), generator=seeded(), output_type="latent").frames)
    for answer, message in ((None, "dict"), ({"latents": torch.zeros(2)}, "latents"), ({"latents": None}, "NoneType")):
        with pytest.raises(ValueError, match=message):
            pipe(picture(), callback_on_step_end=lambda *_, answer=answer: answer)
    bare = []
    pipe(
        picture(), callback_on_step_end=lambda *args: bare.append(args[3]) or {}, output_type="latent",
        callback_on_step_end_tensor_inputs=[],
    )  # fmt: skip
    assert bare == [{}] * STEPS


@pytest.mark.parametrize("sigmas", [None, [80.0, 9.0, 1.0, 0.0]])
def test_interruption_keeps_what_is_there(pipe, sigmas):
    seen = []

    def stop(given, index, t, tensors):
        seen.append(tensors["latents"])
        given._interrupt = index == 0
        return {}

    latents = pipe(picture(), sigmas=sigmas, callback_on_step_end=stop, output_type="latent").frames
    assert len(seen) == 1
    assert torch.equal(latents, seen[0])
    assert pipe.interrupt
    pipe(picture(), output_type="latent")
    assert not pipe.interrupt


def test_progress_bar(folder, capsys):
    loud = StableVideo3DPipeline.from_pretrained(folder)
    loud.set_progress_bar_config(desc="orbiting")
    loud(picture(), output_type="latent")
    assert f"{STEPS}/{STEPS}" in (text := capsys.readouterr().err)
    assert "orbiting" in text


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": "photo.png"}, "image: expected PIL"),
        ({"image": []}, "image"),
        ({"image": torch.zeros(1, 4, SIZE, SIZE)}, "image"),
        ({"image": torch.full((1, 3, SIZE, SIZE), 200, dtype=torch.uint8)}, "image"),
        ({"image": torch.full((1, 3, SIZE, SIZE), float("nan"))}, "image: expected values"),
        ({"image": torch.full((1, 3, SIZE, SIZE), -0.5)}, "image: expected values"),
        ({"height": 60}, "height and width: expected multiples of 8"),
        ({"width": -64}, "height and width"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 7, "sigmas": [5.0, 1.0, 0.0]}, "num_inference_steps"),
        ({"sigmas": [1.0, 5.0, 0.0]}, "sigmas"),
        ({"sigmas": [0.0]}, "sigmas"),
        ({"sigmas": [1.0, -1.0]}, "sigmas"),
        ({"sigmas": [float("inf"), 1.0, 0.0]}, "sigmas"),
        ({"decode_chunk_size": 0}, "decode_chunk_size"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt"),
        ({"output_type": "gif"}, "output_type"),
        ({"latents": torch.zeros(1, 2, 4, SIDE, SIDE)}, "latents"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "callback_on_step_end_tensor_inputs"),
    ],
)
def test_arguments_that_cannot_be(pipe, arguments, message):
    with pytest.raises(ValueError, match=message) as info:
        pipe(**{"image": picture()} | arguments)
    assert "\n" not in str(info.value)


def test_ignored_and_unknown_keywords(pipe):
    for name in ("fps", "motion_bucket_id"):
        with pytest.warns(UserWarning, match=f"{name}: SV3D has no such input") as caught:
            pipe(picture(), **{name: 7}, num_inference_steps=1, output_type="latent")
        assert caught[0].filename == __file__
    with pytest.raises(TypeError, match="negative_prompt"):
        pipe(picture(), negative_prompt="blurry")


def test_guidance(pipe):
    made = pipe(picture(), max_guidance_scale=1.0, generator=seeded(), output_type="latent").frames
    assert not pipe.do_classifier_free_guidance
    pipe(picture(), num_inference_steps=1, output_type="latent")
    assert pipe.do_classifier_free_guidance
    assert pipe.guidance_scale.shape == (1, FRAMES, 1, 1, 1)
    guided = pipe(picture(), max_guidance_scale=4.0, generator=seeded(), output_type="latent").frames
    assert relative_error(made, guided) > 1e-4


# Threads


def test_threads_take_turns(folder):
    """A second request comes while the first is at a step: each gives what it gives alone, to the bit."""
    pipe = load(folder, torch_dtype={"vae": torch.float16, "default": torch.float32})  # float32 while it is used

    def request(seed, **options):
        poses = even_turn(elevation=float(seed))
        return pipe(picture(seed), poses=poses, generator=seeded(seed), output_type="pt", **options).frames

    alone = [request(1), request(2)]
    together, steps = {}, []
    second = threading.Thread(target=lambda: together.update({2: request(2, callback_on_step_end=noted(2))}))

    def noted(number):
        def note(pipe, index, timestep, inputs):
            steps.append((number, index, pipe.num_timesteps))
            if (number, index) == (1, 0):
                second.start()
                second.join(0.5)  # as long as it can't end
            return inputs

        return note

    together[1] = request(1, callback_on_step_end=noted(1))
    second.join()
    assert steps == [(number, index, STEPS) for number in (1, 2) for index in range(STEPS)]
    assert torch.equal(together[1], alone[0])
    assert torch.equal(together[2], alone[1])
    assert not torch.equal(alone[0], alone[1])


def test_global_random_numbers_are_left_alone(pipe):
    before = torch.get_rng_state()
    pipe(picture(), poses=even_turn(), generator=seeded(), output_type="latent")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_copy_has_turns_of_its_own(pipe):
    with pipe._turns:
        twin, done = copy.deepcopy(pipe), []
        call = threading.Thread(target=lambda: done.append(twin(picture(), poses=even_turn(), generator=seeded())))
        call.start()
        call.join()
    assert len(done) == 1
