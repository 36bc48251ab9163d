"""Attention among the pixels of a frame: the op anywhere, the Hopper kernel's compilation, its results on a GPU."""

import re

import pytest
import torch
from nvcc import messages, needs_nvcc

from sv3d_fast.kernels import native
from sv3d_fast.kernels.spatial_attention import HEAD, spatial_attention

hopper, library = spatial_attention.implementations


def exact(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """The definition, in float64, a frame at a time."""
    frames = []
    for q, k, v in qkv.double().unflatten(-1, (3, heads, -1)).permute(0, 2, 1, 3, 4):
        scores = torch.einsum("shd,thd->hst", q, k) / q.shape[-1] ** 0.5
        frames.append(torch.einsum("hst,thd->shd", scores.softmax(-1), v).flatten(1))
    return torch.stack(frames)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("implementation", ["reference", "library"])
def test_it_is_the_definition(implementation):
    for qkv, heads in spatial_attention.examples("cpu"):
        got = spatial_attention(qkv, heads, implementation=implementation)
        assert relative(got, exact(qkv, heads)) <= 1e-6


def test_the_reference_of_16_bits_rounds_once():
    qkv = torch.randn(2, 33, 3 * 64, generator=torch.Generator().manual_seed(1)).half()
    got = spatial_attention.reference(qkv, 2)
    assert got.dtype == torch.float16
    assert relative(got, exact(qkv, 2)) <= 4e-4


def test_what_the_hopper_kernel_can_not_take_is_told():
    reasons = "; ".join(hopper.why_not(torch.zeros(1, 5, 3 * 96), 2))
    for part in ("cuda tensors", "float16", "heads of 64 channels, got 48"):
        assert part in reasons
    fit = torch.zeros(1, 5, 3 * 2 * HEAD, dtype=torch.float16)
    assert not [r for r in hopper.why_not(fit, 2) if "float16" in r or "heads" in r or "contiguous" in r]
    assert any("contiguous" in r for r in hopper.why_not(fit.transpose(0, 1).expand(5, 3, -1), 2))
    assert any("gradient" in r for r in hopper.why_not(fit.requires_grad_(), 2))


@pytest.mark.slow
@needs_nvcc
def test_the_kernel_compiles_for_hopper_and_keeps_all_it_multiplies_in_registers(tmp_path):
    said = messages("attention.cu", tmp_path)
    assert re.findall(r"(\d+) bytes spill stores", said) == ["0"]
    assert "serialized" not in said  # products that would wait for each other
    assert "setmaxnreg" not in said  # ignored


def needs_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for compute capability 9.0")


# around the tiles of 192 queries and 128 keys, and more of them than a GPU has multiprocessors
SHAPES = [
    (1, 1, 1), (2, 63, 1), (1, 127, 3), (3, 128, 1), (2, 129, 2), (1, 191, 1), (1, 193, 5), (40, 300, 5), (2, 1296, 3),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [1.0, 6.0])
@pytest.mark.parametrize(("frames", "length", "heads"), SHAPES)
def test_the_hopper_kernel_is_as_near_to_the_definition_as_the_library(frames, length, heads, spread):
    needs_hopper()
    generator = torch.Generator("cuda").manual_seed(length)
    qkv = spread * torch.randn(frames, length, 3 * heads * HEAD, device="cuda", generator=generator)
    qkv = qkv.half()
    got, expected = hopper.run(qkv, heads), exact(qkv, heads)
    assert relative(got, expected) <= 1.5 * relative(library.run(qkv, heads), expected) + 1e-4
    assert torch.equal(got, hopper.run(qkv, heads))


@pytest.mark.gpu
@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize("steepness", [12, 48])
def test_weights_that_outgrow_float16_and_float32_are_scaled_anew(ascending, steepness):
    needs_hopper()
    length, heads = 700, 2
    qkv = torch.randn(1, length, 3, heads, HEAD, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    # logits of all queries rise or fall by 16 times that in all; in a stage of 128 keys by 2^50 or 2^200
    slope = torch.linspace(-steepness, steepness, length, device="cuda")
    qkv[:, :, 0] = 1 + 0.1 * qkv[:, :, 0]
    qkv[:, :, 1] = 0.1 * qkv[:, :, 1] + (slope if ascending else slope.flip(0))[None, :, None, None]
    qkv = qkv.flatten(2).half()
    assert relative(hopper.run(qkv, heads), exact(qkv, heads)) <= 1e-3


@pytest.mark.gpu
def test_what_is_no_number_stays_in_its_frame_and_head():
    needs_hopper()
    qkv = torch.randn(3, 257, 3 * 2 * HEAD, device="cuda", generator=torch.Generator("cuda").manual_seed(3)).half()
    clean = hopper.run(qkv, 2)
    qkv[1, 200, 2 * HEAD + HEAD + 5] = torch.nan  # a key of the second frame's second head
    got = hopper.run(qkv, 2)
    assert got[1, :, HEAD:].isnan().all()
    got[1, :, HEAD:] = clean[1, :, HEAD:]
    assert torch.equal(got, clean)


@pytest.mark.gpu
def test_operands_that_do_not_fit_are_refused():
    needs_hopper()
    attend = native.load("cuda").attention_attend
    qkv = torch.zeros(2, 9, 3 * HEAD, device="cuda", dtype=torch.float16)
    for given, out, heads in (
        (qkv, qkv.new_empty(2, 9, HEAD - 1), 1),
        (qkv, qkv.new_empty(2, 9, HEAD), 2),
        (qkv.float(), qkv.new_empty(2, 9, HEAD), 1),
        (qkv[0], qkv.new_empty(9, HEAD), 1),
    ):
        with pytest.raises(ValueError, match="expected"):
            attend(given, out, heads)
