"""TripoSR's networks against the official implementation (golden case) and their own definitions."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from sv3d_fast.triposr.config import TripoSRConfig, ViTConfig
from sv3d_fast.triposr.system import TripoSR
from sv3d_fast.triposr.vit import Embeddings

sys.path.insert(0, str(Path(__file__).parent / "golden"))
from filling import state_dict

CASE = Path(__file__).parent / "golden" / "triposr_small.json"


def relative(ours, reference) -> float:
    ours, reference = (torch.as_tensor(t).detach().double() for t in (ours, reference))
    return float((ours - reference).norm() / reference.norm())


def golden_case() -> dict[str, torch.Tensor]:
    with np.load(CASE.with_suffix(".npz")) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def golden_model(folder: Path) -> TripoSR:
    """The golden case's model, read from the files that the official implementation would read."""
    spec = json.loads(CASE.read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**spec["config"], "vit": spec["vit"]}))
    weights = {name: torch.from_numpy(values) for name, values in state_dict(str(CASE)).items()}
    torch.save(weights, folder / "model.ckpt")
    return TripoSR.from_pretrained(folder)


def golden_errors(model: TripoSR, case: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative L2 of each official output."""
    codes = model([case["image"]], "cpu")
    assert codes.shape == case["scene_codes"].shape
    result = model.renderer.query_triplane(model.decoder, case["points"], case["scene_codes"][0])
    image = model.renderer(model.decoder, case["scene_codes"][0], case["rays_o"], case["rays_d"])
    return {
        "scene codes": relative(codes, case["scene_codes"]),
        "density": relative(result["density_act"], case["density"]),
        "colour": relative(result["color"], case["color"]),
        "render": relative(image, case["render"]),
        "render against white": relative(1 - image, 1 - case["render"]),  # which is most of it
    }


@pytest.fixture(scope="module")
def case() -> dict[str, torch.Tensor]:
    return golden_case()


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> TripoSR:
    return golden_model(tmp_path_factory.mktemp("triposr"))


def test_golden_outputs(official, case):
    errors = golden_errors(official, case)
    assert max(errors.values()) < 1e-5, errors


def test_first_layer_on_the_planes_is_exact(official, case):
    codes = case["scene_codes"][0]
    field = official.renderer.field(official.decoder, codes)
    points = torch.rand(301, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1  # some outside the cube
    x, y, z = (points / 0.87).T
    samples = [
        F.grid_sample(plane[None], torch.stack([u, v], -1)[None, None], align_corners=False)[0, :, 0].T
        for plane, u, v in zip(codes, (x, x, y), (y, z, z), strict=True)
    ]
    plain = official.decoder(torch.cat(samples, 1))
    raw, color = field.query(points)
    assert relative(raw, plain[:, 0]) < 1e-5
    assert relative(color, plain[:, 1:].sigmoid()) < 1e-5


@pytest.mark.parametrize("resolution", [2, 9, 16])
def test_grid_values_are_queries_at_its_points(official, case, resolution):
    field = official.renderer.field(official.decoder, case["scene_codes"][0])
    indices = torch.cartesian_prod(*[torch.arange(resolution)] * 3)
    points = (indices / (resolution - 1) * 2 - 1) * 0.87
    places = torch.arange(resolution**3, dtype=torch.int32)
    assert relative(field.on_grid(resolution)(places), field.query(points)[0]) < 1e-5


def test_full_size_has_the_official_tensors():
    with torch.device("meta"):
        state = TripoSR(TripoSRConfig()).state_dict()
    count = {
        part: (len(tensors), sum(t.numel() for t in tensors))
        for part in ("image_tokenizer", "tokenizer", "backbone", "post_processor", "decoder")
        for tensors in [[t for name, t in state.items() if name.startswith(f"{part}.")]]
    }
    assert len(state) == 549
    assert round(sum(t.numel() for t in state.values()) / 1e6, 2) == 419.28
    assert count["image_tokenizer"] == (200, 86_389_248)  # ViT-B/16 with its pooler
    assert count["backbone"][0] == 326
    assert count["decoder"] == (20, 41_284)
    expected = {
        "image_tokenizer.model.embeddings.position_embeddings": (1, 197, 768),
        "image_tokenizer.model.encoder.layer.11.attention.attention.query.weight": (768, 768),
        "image_tokenizer.model.encoder.layer.0.intermediate.dense.weight": (3072, 768),
        "image_tokenizer.model.pooler.dense.bias": (768,),
        "tokenizer.embeddings": (3, 1024, 32, 32),
        "backbone.transformer_blocks.15.attn2.to_k.weight": (1024, 768),
        "backbone.transformer_blocks.0.ff.net.0.proj.weight": (8192, 1024),
        "post_processor.upsample.weight": (1024, 40, 2, 2),
        "decoder.layers.0.weight": (64, 120),
        "decoder.layers.18.weight": (4, 64),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected


def test_full_size_shapes_through_the_networks():
    with torch.device("meta"):
        model = TripoSR(TripoSRConfig())
    tokens = model.image_tokenizer(torch.empty(2, 3, 512, 512, device="meta"))
    assert tokens.shape == (2, 1025, 768)
    assert model.tokenizer().shape == (1, 1024, 3072)
    assert model([np.zeros((40, 30, 3), np.uint8)] * 2).shape == (2, 3, 40, 64, 64)


def test_half_precision_stays_near(official, case):
    model = copy.deepcopy(official).to(torch.bfloat16)
    codes = model([case["image"]])
    assert codes.dtype == torch.bfloat16
    assert relative(codes, case["scene_codes"]) < 2e-2
    field = model.renderer.field(model.decoder, case["scene_codes"][0])
    assert relative(field.query(case["points"])[1], case["color"]) < 2e-2  # coordinates aren't rounded


@pytest.mark.gpu
def test_golden_on_cuda(official, case):
    model = copy.deepcopy(official).cuda()
    codes = model([case["image"]], "cuda")
    assert relative(codes.cpu(), case["scene_codes"]) < 1e-4
    result = model.renderer.query_triplane(model.decoder, case["points"].cuda(), codes[0])
    assert relative(result["density_act"].cpu(), case["density"]) < 1e-4
    image = model.renderer(model.decoder, codes[0], case["rays_o"].cuda(), case["rays_d"].cuda())
    assert relative(image.cpu(), case["render"]) < 1e-4
    (mesh,) = model.extract_mesh(codes, resolution=70, threshold=0.3)
    (expected,) = official.extract_mesh(case["scene_codes"], resolution=70, threshold=0.3)
    assert mesh.vertices.is_cuda
    assert abs(len(mesh.vertices) - len(expected.vertices)) < 0.01 * len(expected.vertices)


def test_names_are_those_of_the_golden_case(official):
    spec = json.loads(CASE.read_text())["tensors"]
    assert {n: list(t.shape) for n, t in official.state_dict().items()} == {n: s for n, (s, _) in spec.items()}


def test_positions_keep_the_trained_ones_at_the_trained_size():
    embeddings = Embeddings(ViTConfig(width=24, heads=3, image_size=48))
    torch.nn.init.normal_(embeddings.position_embeddings)
    assert torch.equal(embeddings.positions(3, 3), embeddings.position_embeddings)
    other = embeddings.positions(5, 4)
    assert other.shape == (1, 21, 24)
    assert torch.equal(other[:, 0], embeddings.position_embeddings[:, 0])


def test_a_batch_is_its_pictures(official):
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(h, w, 3, generator=generator) for h, w in ((32, 32), (50, 41), (17, 90))]
    batch = official(pictures, "cpu")
    assert batch.shape == (3, 3, 40, 16, 16)
    for picture, codes in zip(pictures, batch, strict=True):
        torch.testing.assert_close(official(picture)[0], codes, rtol=1e-4, atol=1e-5)
    assert relative(batch[0], batch[1]) > 1e-4  # the picture matters


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images: expected at least one picture"),
        (["cup.png"], "images: expected pictures"),
        ([np.zeros((8, 8), np.uint8)], r"images: expected shape \(H, W, 3\)"),
        ([torch.zeros(8, 8, 4)], r"images: expected shape \(H, W, 3\)"),
        ([torch.zeros(0, 8, 3)], r"images: expected shape \(H, W, 3\)"),
        ([np.zeros((8, 8, 3), np.int32)], "images: expected uint8 or floats"),
    ],
)
def test_what_is_no_picture_is_refused(official, images, message):
    with pytest.raises(ValueError, match=message):
        official(images, "cpu")
