"""Scores of the embedded model: of frames against the truth, their table, and the sheet that shows them."""

import csv
import math

import pytest
import torch
from tiny_mini import SIZE, TINY, make_model, make_stage

from sv3d_fast.camera import Orbit
from sv3d_fast.mini import evaluate
from sv3d_fast.mini.evaluate import Score, contact_sheet, means, write_scores

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stage():
    return make_stage()


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
    model = make_model(0)
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
