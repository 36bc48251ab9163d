"""Compact splat files: their bytes as worked out by hand, which axes they have, and what rounding may cost."""

import gzip
import struct

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from sv3d_fast.scene.corners import to_y_up
from sv3d_fast.scene.splat_files import load_splats, save_splats
from sv3d_fast.scene.splats import SH_C0, Splats

WORLD_TO_Y_DOWN = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]])  # world up -> -y, world front -> +z, as splat PLYs
WORLD_TO_Y_UP = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])  # right of who faces the front, up, towards them


def some_splats(n: int, seed=0) -> Splats:
    """Splats as a fit makes them, and some extreme ones: logits to +-12, colours beyond [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    return Splats(
        torch.rand(n, 3, generator=g) * 2 - 1, torch.randn(n, 4, generator=g) * 3,
        torch.rand(n, 3, generator=g) * 8 - 9, torch.rand(n, generator=g) * 24 - 12,
        torch.rand(n, 3, generator=g) * 1.6 - 0.3,
    )  # fmt: skip


def one(mean=(0, 0, 0), quat=(1, 0, 0, 0), scale=(1, 1, 1), opacity=0.5, color=(0.5, 0.5, 0.5)) -> Splats:
    logit = np.log(opacity / (1 - opacity))
    values = ([mean], [quat], np.log([scale]), [logit], [color])
    return Splats(*(torch.tensor(np.array(v), dtype=torch.float32) for v in values))


def world_quat(to_file, file_quat):
    """The world's quaternion, w first, of one that stands in a file."""
    rotation = to_file.T @ Rotation.from_quat(file_quat, scalar_first=True).as_matrix()
    return Rotation.from_matrix(rotation).as_quat(scalar_first=True)


def matrices(splats: Splats) -> np.ndarray:
    return Rotation.from_quat(splats.quats.double().numpy(), scalar_first=True).as_matrix()


def largest_angle(a: Splats, b: Splats) -> float:
    """Degrees between the rotations of two sets."""
    return np.degrees(Rotation.from_matrix(matrices(a).transpose(0, 2, 1) @ matrices(b)).magnitude().max(initial=0))


def by_hand(rotation, version=3):
    """An .spz of two splats, attribute after attribute: positions, opacities, colours, scales, rotations."""
    header = struct.pack("<IIIBBBB", 0x5053474E, version, 2, 0, 12, 0, 0)
    positions = b"\x00\x10\x00" + b"\x00\xf8\xff" + b"\x01\x00\x00" + bytes(9)  # 1, -0.5, 1/4096 at 12 bits
    body = positions + b"\x33\xff" + b"\x7f\x80\xff" * 2 + b"\xa0\x90\x80" * 2 + rotation * 2
    return header + body


def test_splat_record_by_hand(tmp_path):
    splats = one(
        (1, 2, 3), world_quat(WORLD_TO_Y_DOWN, [0.5, -0.5, 0.5, 0.5]), (0.5, 0.25, 2), 0.2, (0, 1, 0.4)
    )  # fmt: skip
    data = save_splats(splats, tmp_path / "a.splat").read_bytes()
    assert len(data) == 32
    assert struct.unpack("<6f", data[:24]) == pytest.approx((-2, -3, 1, 0.5, 0.25, 2))
    assert list(data[24:28]) == [0, 255, 102, 51]
    turned = [128 + 64, 128 - 64, 128 + 64, 128 + 64]
    assert list(data[28:]) in (turned, [256 - v for v in turned])  # q and -q are one rotation


def test_splat_files_begin_with_what_shows_most(tmp_path):
    size, opacity = (0.1, 0.3, 0.3, 0.2), (0.9, 0.1, 0.8, 0.9)
    parts = [one((k, 0, 0), scale=(s,) * 3, opacity=o) for k, (s, o) in enumerate(zip(size, opacity, strict=True))]
    splats = Splats(*(torch.cat([getattr(p, name) for p in parts]) for name in vars(parts[0])))
    assert load_splats(save_splats(splats, tmp_path / "a.splat")).means[:, 0].tolist() == [2, 3, 1, 0]


def test_spz_bytes_by_hand(tmp_path):
    a = one((-0.5, 0.25, 1), opacity=0.2, color=(0.5, 0.5 + SH_C0, 0.5 - SH_C0), scale=np.exp([0, -1, -2.5]))
    data = save_splats(a, tmp_path / "a.spz").read_bytes()
    assert data[:4] == b"\x1f\x8b\x08\x00"
    assert data[4:8] == bytes(4)  # no time, so equal splats give equal files
    raw = gzip.decompress(data)
    assert struct.unpack("<IIIBBBB", raw[:16]) == (0x5053474E, 3, 1, 0, 16, 0, 0)
    assert raw[:4] == b"NGSP"
    # right, up, back of the world's (-1/2, 1/4, 1) is (1/4, 1, -1/2), times 2^16
    assert raw[16:25] == b"\x00\x40\x00" + b"\x00\x00\x01" + b"\x00\x80\xff"
    assert raw[25] == 51
    assert list(raw[26:29]) == [128, 166, 89]  # 127.5 and 0.15 * 255 more and less; halves go to the even one
    assert list(raw[29:32]) == [160, 144, 120]
    assert len(raw) == 36


@pytest.mark.parametrize(
    ("xyzw", "code"),
    [
        ((0, 0, 0, 1), 3 << 30),
        ((0, 0, 0, -1), 3 << 30),
        ((1, 0, 0, 0), 0),
        ((0, 0.6, 0, 0.8), 3 << 30 | 434 << 10),  # 0.6 * sqrt(2) * 511 = 433.6
        ((0, -0.6, 0, 0.8), 3 << 30 | (512 + 434) << 10),
        ((0.6, 0, -0.8, 0), 2 << 30 | (512 + 434) << 20),  # the largest one counts as positive
        ((0, 0.8, 0, -0.6), 1 << 30 | 512 + 434),
    ],
)
def test_spz_rotations_by_hand(tmp_path, xyzw, code):
    quat = world_quat(WORLD_TO_Y_UP, np.roll(xyzw, 1))
    raw = gzip.decompress(save_splats(one(quat=quat), tmp_path / "a.spz").read_bytes())
    assert struct.unpack("<I", raw[-4:])[0] == code
    assert largest_angle(load_splats(tmp_path / "a.spz"), one(quat=quat)) < 0.3


@pytest.mark.parametrize(
    ("version", "rotation"),
    [(3, struct.pack("<I", 3 << 30 | 434 << 10)), (2, bytes([128, 204, 128]))],  # 0.6 about y
)
def test_spz_versions_that_are_read(tmp_path, version, rotation):
    (tmp_path / "a.spz").write_bytes(gzip.compress(by_hand(rotation, version)))
    splats = load_splats(tmp_path / "a.spz")
    np.testing.assert_allclose(splats.means, [[1 / 4096, 1, -0.5], [0, 0, 0]], atol=1e-9)  # back, right, up
    np.testing.assert_allclose(splats.log_scales, [[0, -1, -2]] * 2)
    np.testing.assert_allclose(splats.opacities, [0.2, 1], atol=0.002)
    np.testing.assert_allclose(splats.colors, [[0.4963, 0.5037, 1.4403]] * 2, atol=1e-4)
    expected = one(quat=world_quat(WORLD_TO_Y_UP, [0.8, 0, 0.6, 0]))
    np.testing.assert_allclose(matrices(splats), np.tile(matrices(expected), (2, 1, 1)), atol=0.02)


def test_spz_harmonics_are_left_out(tmp_path):
    raw = bytearray(by_hand(bytes(4)) + bytes(2 * 9))
    raw[12] = 1
    (tmp_path / "a.spz").write_bytes(gzip.compress(raw))
    assert len(load_splats(tmp_path / "a.spz")) == 2


@pytest.mark.parametrize(("name", "to_file"), [("a.ply", WORLD_TO_Y_DOWN), ("a.splat", WORLD_TO_Y_DOWN)])
def test_y_down_formats_have_the_same_axes(tmp_path, name, to_file):
    """Means as they stand in the file: a reader of somebody else's takes them as they are."""
    splats = one((0.5, -0.25, 0.125))
    data = save_splats(splats, tmp_path / name).read_bytes()
    start = data.index(b"end_header\n") + 11 if name.endswith("ply") else 0
    assert struct.unpack_from("<3f", data, start) == tuple(to_file @ splats.means[0].numpy())


def test_spz_stands_as_the_glb_does(tmp_path):
    splats = one((0.5, -0.25, 0.125))
    raw = gzip.decompress(save_splats(splats, tmp_path / "a.spz").read_bytes())
    fixed = [int.from_bytes(raw[16 + 3 * k : 19 + 3 * k], "little", signed=True) / 2**16 for k in range(3)]
    assert fixed == to_y_up(splats.means.numpy())[0].tolist() == [-0.25, 0.125, 0.5]


@pytest.mark.parametrize("n", [0, 1, 13, 3000])
def test_splat_round_trip_within_half_a_step(tmp_path, n):
    splats = some_splats(n)
    back = load_splats(save_splats(splats, tmp_path / "a.splat"))
    order = torch.argsort(-(splats.log_scales.double().sum(1).exp() * splats.opacities.double()), stable=True)
    splats = Splats(*(value[order] for value in vars(splats).values()))
    assert torch.equal(back.means, splats.means)
    torch.testing.assert_close(back.log_scales, splats.log_scales, rtol=0, atol=2e-6)
    assert (back.opacities - splats.opacities).abs().sum() <= n * 0.501 / 255
    torch.testing.assert_close(back.opacities, splats.opacities, rtol=0, atol=0.501 / 255)
    torch.testing.assert_close(back.colors, splats.colors.clamp(0, 1), rtol=0, atol=0.501 / 255)
    assert largest_angle(back, splats) < 1


@pytest.mark.parametrize("n", [0, 1, 13, 3000])
def test_spz_round_trip_within_half_a_step(tmp_path, n):
    splats = some_splats(n)
    path = save_splats(splats, tmp_path / "a.spz")
    back = load_splats(path)
    torch.testing.assert_close(back.means, splats.means, rtol=0, atol=2**-17)
    torch.testing.assert_close(back.log_scales, splats.log_scales, rtol=0, atol=0.501 / 16)
    torch.testing.assert_close(back.opacities, splats.opacities, rtol=0, atol=0.501 / 255)
    torch.testing.assert_close(back.colors, splats.colors, rtol=0, atol=0.501 * SH_C0 / (0.15 * 255))
    assert largest_angle(back, splats) < 0.3
    if n == 3000:
        assert path.stat().st_size < save_splats(splats, tmp_path / "a.ply").stat().st_size / 3


def test_spz_clamps_what_lies_beyond_its_bytes(tmp_path):
    back = load_splats(save_splats(one(scale=np.exp([-12, 7, 0]), color=(-1, 2, 0.5)), tmp_path / "a.spz"))
    assert back.log_scales.tolist() == [[-10, 255 / 16 - 10, 0]]
    np.testing.assert_allclose(back.colors, [[-0.4403, 1.4403, 0.5]], atol=0.004)


@pytest.mark.parametrize("extent", [3e-5, 100, 130, 3000, 8_388_607])
def test_spz_positions_of_any_extent(tmp_path, extent):
    splats = one((extent, -extent, extent / 3))
    back = load_splats(save_splats(splats, tmp_path / "a.spz"))
    np.testing.assert_allclose(back.means, splats.means, rtol=0, atol=max(2**-17, extent / 2**22))


def test_gradients_and_precision_do_not_matter(tmp_path):
    splats = some_splats(5).to(torch.float64)
    splats.means.requires_grad_()
    for name in ("a.splat", "a.spz", "a.ply"):
        assert len(load_splats(save_splats(splats, tmp_path / name))) == 5


@pytest.mark.parametrize("suffix", [".splat", ".spz"])
@pytest.mark.parametrize("field", ["means", "quats", "log_scales", "logit_opacities", "colors"])
def test_what_the_compact_formats_can_not_hold(tmp_path, suffix, field):
    splats = some_splats(4)
    getattr(splats, field)[2] = float("nan")
    with pytest.raises(ValueError, match=r"^splats: expected finite"):
        save_splats(splats, tmp_path / f"a{suffix}")
    splats = some_splats(4)
    splats.quats[1] = 0
    with pytest.raises(ValueError, match="rotations other than 0"):
        save_splats(splats, tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


def squeezed(raw):
    """Without the hour, so that tests have the same names every time."""
    return gzip.compress(raw, mtime=0)


def test_spz_positions_too_far(tmp_path):
    with pytest.raises(ValueError, match="within 8388607 units"):
        save_splats(one((1e7, 0, 0)), tmp_path / "a.spz")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.splat", bytes(33), "records of 32 bytes"),
        ("a.splat", bytes(32), "positive scales"),
        ("a.splat", struct.pack("<6f8B", *[np.nan] * 3, 1, 1, 1, *[9] * 8), "finite positions"),
        ("a.splat", struct.pack("<6f8B", 0, 0, 0, 1, 1, 1, *[128] * 8), "rotations other than 0"),
        ("a.spz", b"", "truncated|can't be unpacked"),
        ("a.spz", b"ply\n", "can't be unpacked"),
        ("a.spz", squeezed(by_hand(bytes(4)))[:30], "can't be unpacked"),
        ("a.spz", squeezed(by_hand(bytes(4))[:-1]), "truncated"),
        ("a.spz", squeezed(by_hand(bytes(4))[:10]), "truncated"),
        ("a.spz", squeezed(by_hand(bytes(4), 1)), "version 2 or 3"),
        ("a.spz", squeezed(by_hand(bytes(4), 4)), "version 2 or 3"),
        ("a.spz", squeezed(b"X" + by_hand(bytes(4))[1:]), "magic"),
        ("a.spz", squeezed(struct.pack("<IIIBBBB", 0x5053474E, 3, 2**32 - 1, 0, 12, 0, 0)), "at most 10000000"),
        ("a.spz", squeezed(struct.pack("<IIIBBBB", 0x5053474E, 3, 1, 5, 12, 0, 0)), "of degree 5"),
        ("a.spz", squeezed(struct.pack("<IIIBBBB", 0x5053474E, 3, 1, 0, 12, 2, 0)), "without extensions"),
        ("a.ksplat", b"", r"\.ply, \.splat, \.spz"),
    ],
)
def test_damaged_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        load_splats(tmp_path / name)
    assert "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_splats(tmp_path / "a.spz")
    with pytest.raises(ValueError, match=r"ending in \.ply, \.splat, \.spz, got 'a\.txt'"):
        save_splats(some_splats(1), tmp_path / "a.txt")


@pytest.mark.parametrize("degree", [0, 1])
def test_gsplats_own_exporter(tmp_path, degree):
    """What it writes is read here, and written again it has the same values under the same names."""
    from gsplat.exporter import export_splats

    def table(data):
        head, _, body = data.partition(b"end_header\n")
        names = [line.split()[2].decode() for line in head.splitlines() if line.startswith(b"property float ")]
        return np.frombuffer(body, [(name, "<f4") for name in names])

    values = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (5, 3), (5, 4), (5,), (5, 1, 3), (5, 3 * degree, 3)]
    means, scales, quats, opacities, sh0, rest = (torch.randn(*shape, generator=values) for shape in shapes)
    theirs = export_splats(means, scales, torch.nn.functional.normalize(quats, dim=-1), opacities, sh0, rest)
    (tmp_path / "theirs.ply").write_bytes(theirs)
    read = load_splats(tmp_path / "theirs.ply")
    assert torch.allclose(read.means @ torch.tensor(WORLD_TO_Y_DOWN).float().T, means)
    save_splats(read, tmp_path / "ours.ply")
    ours, theirs = table((tmp_path / "ours.ply").read_bytes()), table(theirs)
    assert len(ours) == len(theirs) == 5
    for name in theirs.dtype.names:
        if not name.startswith("f_rest_"):  # of views; these splats look the same from everywhere
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
