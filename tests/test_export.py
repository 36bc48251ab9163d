"""Mesh and splat files: what stands in them, how they are oriented, and that they read back as what was written."""

import io
import json
import struct

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from sv3d_fast.files import OutputError, atomic_file, atomic_folder, write_bytes
from sv3d_fast.scene.corners import from_y_up, split, to_y_up, vertex_normals
from sv3d_fast.scene.export import load_mesh, load_splats, save_mesh, save_splats
from sv3d_fast.scene.glb import linear_to_srgb, srgb_to_linear
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.scene.splats import SH_C0, Splats


def arrow(textured=True, colored=False) -> Mesh:
    """A box of half extents (.1, .2, .3) with a spike to +x (the front) and a longer one to +z (up)."""
    box = trimesh.creation.box((0.2, 0.4, 0.6))
    vertices = np.concatenate([box.vertices, [[1, 0, 0], [0, 0, 2]]]).astype(np.float32)
    front = [[i for i in range(8) if box.vertices[i][0] > 0][k] for k in (0, 1)]
    top = [[i for i in range(8) if box.vertices[i][2] > 0][k] for k in (0, 1)]
    faces = np.concatenate([box.faces, [[*front, 8], [*top, 9]]]).astype(np.int32)
    generator = torch.Generator().manual_seed(0)
    uvs = torch.randint(0, 33, (len(faces), 3, 2), generator=generator) / 32
    texture = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
    colors = torch.randint(0, 256, (len(vertices), 3), generator=generator, dtype=torch.uint8)
    return Mesh(
        torch.from_numpy(vertices), torch.from_numpy(faces),
        uvs if textured else None, texture if textured else None, colors if colored else None,
    )  # fmt: skip


def corners_of(mesh: Mesh) -> np.ndarray:
    """(F * 3, 3) positions of the face corners: comparable whatever the order of the vertices."""
    return mesh.vertices[mesh.faces.long()].reshape(-1, 3).numpy()


def glb_parts(path) -> tuple[dict, bytes]:
    """The two chunks of a GLB, by the specification and nothing of ours."""
    data = path.read_bytes()
    magic, version, total = struct.unpack_from("<4sII", data)
    assert (magic, version, total) == (b"glTF", 2, len(data))
    length, kind = struct.unpack_from("<I4s", data, 12)
    assert kind == b"JSON"
    assert length % 4 == 0
    document = json.loads(data[20 : 20 + length])
    size, kind = struct.unpack_from("<I4s", data, 20 + length)
    assert kind == b"BIN\0"
    assert size % 4 == 0
    assert 28 + length + size == total
    return document, data[28 + length :]


def accessor(document: dict, blob: bytes, index: int) -> np.ndarray:
    entry = document["accessors"][index]
    view = document["bufferViews"][entry["bufferView"]]
    kind = {5126: "<f4", 5123: "<u2", 5125: "<u4"}[entry["componentType"]]
    width = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}[entry["type"]]
    assert view["byteOffset"] % 4 == 0
    assert view["byteLength"] == entry["count"] * width * np.dtype(kind).itemsize
    return np.frombuffer(blob, kind, entry["count"] * width, view["byteOffset"]).reshape(-1, width)


def test_glb_chunks_and_orientation(tmp_path):
    mesh = arrow()
    (path,) = save_mesh(mesh, tmp_path / "mesh.glb")
    document, blob = glb_parts(path)
    primitive = document["meshes"][0]["primitives"][0]
    positions = accessor(document, blob, primitive["attributes"]["POSITION"])
    assert positions.max(0).tolist() == pytest.approx([0.2, 2.0, 1.0])  # left, up to y, front to z
    entry = document["accessors"][primitive["attributes"]["POSITION"]]
    assert entry["min"] == positions.min(0).tolist()
    assert entry["max"] == positions.max(0).tolist()
    faces = accessor(document, blob, primitive["indices"]).reshape(-1, 3)
    np.testing.assert_array_equal(from_y_up(positions[faces].reshape(-1, 3)), corners_of(mesh))
    uvs = accessor(document, blob, primitive["attributes"]["TEXCOORD_0"])[faces]
    np.testing.assert_allclose(np.stack([uvs[..., 0], 1 - uvs[..., 1]], -1), mesh.uvs.numpy(), atol=1e-7)
    normals = accessor(document, blob, primitive["attributes"]["NORMAL"])
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-6)
    pbr = document["materials"][0]["pbrMetallicRoughness"]
    assert (pbr["metallicFactor"], pbr["roughnessFactor"], pbr["baseColorTexture"]) == (0, 1, {"index": 0})
    assert "extensionsUsed" not in document
    view = document["bufferViews"][document["images"][0]["bufferView"]]
    picture = Image.open(io.BytesIO(blob[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]))
    np.testing.assert_array_equal(np.asarray(picture), mesh.texture.numpy())


def test_trimesh_sees_the_texture_where_it_belongs(tmp_path):
    mesh = arrow()
    save_mesh(mesh, tmp_path / "mesh.glb")
    loaded = trimesh.load(tmp_path / "mesh.glb", process=False).to_geometry()
    ours = loaded.visual.uv[loaded.faces]  # trimesh's v points up, as ours
    np.testing.assert_allclose(ours, mesh.uvs.numpy(), atol=1e-6)
    assert loaded.visual.material.metallicFactor == 0


def test_unlit_and_vertex_colors(tmp_path):
    mesh = arrow(textured=False, colored=True)
    save_mesh(mesh, tmp_path / "mesh.glb", unlit=True)
    document, blob = glb_parts(tmp_path / "mesh.glb")
    assert document["extensionsUsed"] == ["KHR_materials_unlit"]
    assert document["materials"][0]["extensions"] == {"KHR_materials_unlit": {}}
    entry = document["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]
    linear = accessor(document, blob, entry)
    srgb = mesh.colors.numpy() / 255
    expected = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    np.testing.assert_allclose(linear, expected, atol=1e-6)
    assert "images" not in document


def test_srgb_round_trip():
    levels = np.arange(256) / 255
    np.testing.assert_allclose(linear_to_srgb(srgb_to_linear(levels)), levels, atol=1e-7)


@pytest.mark.parametrize("name", ["mesh.glb", "mesh.obj"])
def test_textured_round_trip(tmp_path, name):
    mesh = arrow()
    written = save_mesh(mesh, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in written)
    back = load_mesh(tmp_path / name)
    np.testing.assert_allclose(corners_of(back), corners_of(mesh), atol=1e-7)
    assert len(back.vertices) == len(mesh.vertices)  # welded again
    np.testing.assert_allclose(back.uvs.numpy(), mesh.uvs.numpy(), atol=1e-6)
    assert torch.equal(back.texture, mesh.texture)


@pytest.mark.parametrize("name", ["mesh.glb", "mesh.obj"])
def test_vertex_color_round_trip(tmp_path, name):
    mesh = arrow(textured=False, colored=True)
    save_mesh(mesh, tmp_path / name)
    back = load_mesh(tmp_path / name)
    np.testing.assert_allclose(corners_of(back), corners_of(mesh), atol=1e-7)
    assert torch.equal(back.colors[back.faces.long()], mesh.colors[mesh.faces.long()])


def test_a_scene_of_several_parts_becomes_one_mesh(tmp_path):
    scene = trimesh.Scene()
    red = trimesh.visual.material.PBRMaterial(baseColorFactor=[1.0, 0.0, 0.0, 1.0])
    for x, visual in ((0, trimesh.visual.TextureVisuals(material=red)), (3, None)):
        box = trimesh.creation.box((1, 1, 1))
        if visual is not None:
            box.visual = visual
        else:
            box.visual.vertex_colors = [0, 0, 255, 255]
        scene.add_geometry(box, transform=trimesh.transformations.translation_matrix([x, 0, 0]))
    scene.export(tmp_path / "two.glb")
    mesh = load_mesh(tmp_path / "two.glb")
    assert len(mesh.faces) == 24
    assert mesh.vertices.amax(0).tolist() == [0.5, 3.5, 0.5]  # glTF's x is our y
    left = mesh.vertices[:, 1] < 1
    assert mesh.colors[left].unique(dim=0).tolist() == [[255, 0, 0]]
    assert mesh.colors[~left].unique(dim=0).tolist() == [[0, 0, 255]]


@pytest.mark.parametrize("suffix", [".stl", ".ply", ".off"])
def test_shape_alone_keeps_z_up(tmp_path, suffix):
    mesh = arrow()
    save_mesh(mesh, tmp_path / f"mesh{suffix}")
    np.testing.assert_allclose(corners_of(load_mesh(tmp_path / f"mesh{suffix}")), corners_of(mesh), atol=1e-6)
    assert trimesh.load(tmp_path / f"mesh{suffix}").bounds[1].tolist() == pytest.approx([1.0, 0.2, 2.0])


def test_seams_alone_split_vertices():
    mesh = trimesh.creation.box()
    faces = torch.from_numpy(mesh.faces.astype(np.int32))
    vertices = torch.from_numpy(mesh.vertices.astype(np.float32))
    shared = vertices[:, :2].clamp(0, 1)[faces.long()].contiguous()  # the same uv at every corner of a vertex
    assert len(split(Mesh(vertices, faces, shared)).positions) == len(vertices)
    seam = shared.clone()
    seam[0, 0] += 0.25
    parts = split(Mesh(vertices, faces, seam))
    assert len(parts.positions) == len(vertices) + 1
    np.testing.assert_array_equal(parts.positions[parts.faces], vertices.numpy()[faces.numpy()])
    np.testing.assert_array_equal(parts.uvs[parts.faces], seam.numpy())


def test_normals_of_a_sphere_point_outward():
    sphere = trimesh.creation.icosphere(subdivisions=3)
    normals = vertex_normals(sphere.vertices.astype(np.float32), sphere.faces)
    assert (normals * sphere.vertices).sum(1).min() > 0.999
    vectors = np.eye(3)
    np.testing.assert_array_equal(from_y_up(to_y_up(vectors)), vectors)
    assert np.linalg.det(to_y_up(vectors)) == 1


def test_lonely_vertex_and_flat_face_have_finite_normals(tmp_path):
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [5, 5, 5]])
    mesh = Mesh(vertices, torch.tensor([[0, 1, 2]], dtype=torch.int32))
    save_mesh(mesh, tmp_path / "mesh.glb")
    document, blob = glb_parts(tmp_path / "mesh.glb")
    normals = accessor(document, blob, document["meshes"][0]["primitives"][0]["attributes"]["NORMAL"])
    np.testing.assert_array_equal(np.linalg.norm(normals, axis=1), 1)


def test_bad_meshes(tmp_path):
    with pytest.raises(ValueError, match=r"\.glb, \.obj"):
        save_mesh(arrow(), tmp_path / "mesh.fbx")
    with pytest.raises(ValueError, match="at least one face"):
        save_mesh(Mesh(torch.zeros(3, 3), torch.zeros(0, 3, dtype=torch.int32)), tmp_path / "mesh.glb")
    with pytest.raises(ValueError, match="no such file"):
        load_mesh(tmp_path / "none.glb")
    save_mesh(arrow(), tmp_path / "mesh.glb")
    whole = (tmp_path / "mesh.glb").read_bytes()
    for name, data in (("cut.glb", whole[: len(whole) // 2]), ("noise.obj", b"\0\1\2"), ("noise.xyz1", b"hello")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name) as error:
            load_mesh(tmp_path / name)
        assert "\n" not in str(error.value)


def test_faces_that_name_missing_vertices(tmp_path):
    (path,) = save_mesh(arrow(), tmp_path / "mesh.glb")
    document, _ = glb_parts(path)
    accessor_index = document["meshes"][0]["primitives"][0]["indices"]
    view = document["bufferViews"][document["accessors"][accessor_index]["bufferView"]]
    data = bytearray(path.read_bytes())
    at = 28 + struct.unpack_from("<I", data, 12)[0] + view["byteOffset"]
    data[at : at + 4] = struct.pack("<I", 9999)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="vertices that are not there"):
        load_mesh(path)


def some_splats(n=7) -> Splats:
    g = torch.Generator().manual_seed(n)
    return Splats(*(torch.randn(n, *s, generator=g) for s in ((3,), (4,), (3,), (), (3,))))


@pytest.mark.parametrize("n", [0, 1, 7])
def test_splats_round_trip(tmp_path, n):
    splats = some_splats(n)
    back = load_splats(save_splats(splats, tmp_path / "splats.ply"))
    assert torch.equal(back.means, splats.means)
    assert torch.equal(back.log_scales, splats.log_scales)
    assert torch.equal(back.logit_opacities, splats.logit_opacities)
    torch.testing.assert_close(back.quats, splats.quats, rtol=0, atol=3e-7)
    torch.testing.assert_close(back.colors, splats.colors, rtol=0, atol=3e-7)


def rotation_of(quats: np.ndarray) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    return Rotation.from_quat(quats, scalar_first=True).as_matrix()


def test_splat_ply_holds_the_standard_layout_y_down(tmp_path):
    splats = some_splats(5)
    data = save_splats(splats, tmp_path / "splats.ply").read_bytes()
    header, _, body = data.partition(b"end_header\n")
    lines = header.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    assert any(line.startswith("comment axes: x right, y down") for line in lines)
    names = [line.split()[2] for line in lines if line.startswith("property float ")]
    assert (
        names == "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()
    )
    rows = np.frombuffer(body, "<f4").reshape(5, 17)
    to_file = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]])  # world up -> -y, world front -> +z
    np.testing.assert_allclose(rows[:, :3], splats.means.numpy() @ to_file.T)
    np.testing.assert_allclose(rows[:, 6:9] * SH_C0 + 0.5, splats.colors.numpy(), atol=1e-6)
    np.testing.assert_allclose(rotation_of(rows[:, 13:]), to_file @ rotation_of(splats.quats.numpy()), atol=1e-5)
    # Turned by 180 degrees about z, as viewers do, the file stands as a glTF: y up, front +z.
    np.testing.assert_allclose(rows[:, :3] * [-1, -1, 1], to_y_up(splats.means.numpy()))
    assert len(trimesh.load(tmp_path / "splats.ply").vertices) == 5  # a PLY reader of somebody else's


def test_reads_other_programs_splats(tmp_path):
    names = ["f_rest_0", "opacity", "rot_0", "rot_1", "rot_2", "rot_3", "scale_2", "scale_1", "scale_0"]
    names += ["f_dc_0", "f_dc_1", "f_dc_2", "z", "y", "x"]
    header = "ply\nformat binary_little_endian 1.0\nelement vertex 1\n" + "".join(
        f"property float {n}\n" for n in names
    )
    values = np.array([9, 2, 1, 0, 0, 0, 30, 20, 10, 0, 0, 0, 3, 2, 1], "<f4")
    (tmp_path / "other.ply").write_bytes(header.encode() + b"end_header\n" + values.tobytes())
    splats = load_splats(tmp_path / "other.ply")
    assert splats.means.tolist() == [[3, -1, -2]]
    assert splats.log_scales.tolist() == [[10, 20, 30]]
    assert splats.colors.tolist() == [[0.5, 0.5, 0.5]]
    np.testing.assert_allclose(rotation_of(splats.quats.numpy())[0], [[0, 0, 1], [-1, 0, 0], [0, -1, 0]], atol=1e-6)


def test_bad_splat_files(tmp_path):
    good = save_splats(some_splats(), tmp_path / "good.ply").read_bytes()
    nan = some_splats()
    nan.means[3, 1] = float("nan")
    cases = {
        "truncated": good[:-1],
        "PLY file": b"\x89PNG" + good,
        "little-endian": good.replace(b"binary_little_endian", b"ascii"),
        "without f_dc_1": good.replace(b"f_dc_1", b"f_dx_1"),
        "finite": save_splats(nan, tmp_path / "nan.ply").read_bytes(),
        "first element": good.replace(b"element vertex 7", b"element vertex x"),
        "scalar properties": good.replace(b"property float nx", b"property list uchar int nx"),
        "PLY": b"",
    }
    for message, data in cases.items():
        (tmp_path / "bad.ply").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_splats(tmp_path / "bad.ply")
    (tmp_path / "bad.ply").write_bytes(good.replace(b"element vertex 7", b"element vertex 99999999999999"))
    with pytest.raises(ValueError, match="truncated"):
        load_splats(tmp_path / "bad.ply")


def test_a_file_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    target = write_bytes(tmp_path / "a.bin", b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OutputError, match=r"a\.bin: No space left on device$"):
            write_bytes(target, b"new")

    def interrupted():
        with atomic_file(target) as partial:
            partial.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    for names in (("a", "b", "c"), ("a",)):
        with atomic_folder(tmp_path / "f") as partial:
            for name in names:
                (partial / name).write_text(name)
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["a"]

    def failing():
        with atomic_folder(tmp_path / "f") as partial:
            (partial / "z").write_text("z")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["a"]


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (lambda p: save_mesh(arrow(), p / "m.glb"), lambda p: save_splats(some_splats(), p / "s.ply")):
        with pytest.raises(OutputError, match="can't write"):
            write(tmp_path / "file")
        with pytest.raises(OutputError, match="No such file"):
            write(tmp_path / "missing")
