"""The training data of the embedded model: reading, baking, fitting, packing and generating objects."""

import io
import math
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import cKDTree

from sv3d_fast import camera
from sv3d_fast.mini import bake, catalogue, data, decimate, geometry, materials, obj, pack, primitives, shapes


def sample(texture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Nearest texel at uv (N, 2), v up, row 0 at v = 1."""
    h, w = texture.shape[:2]
    column = np.clip((uv[:, 0] * w).astype(int), 0, w - 1)
    return texture[np.clip(((1 - uv[:, 1]) * h).astype(int), 0, h - 1), column].astype(int)


def two_materials() -> str:
    """A quad that shows a texture 1.5 x 1 times from u = 2.25 on, and an L-shaped concave polygon of plain red."""
    return """mtllib a.mtl
v 0 0 0
v 3 0 0
v 3 2 0
v 0 2 0
v 0 0 1
v 2 0 1
v 2 1 1
v 1 1 1
v 1 2 1
v 0 2 1
vt 2.25 -1
vt 3.75 -1
vt 3.75 0
vt 2.25 0
usemtl cloth
f 1/1 2/2 3/3 4/4
usemtl red paint
f 5 6 7 8 9 10
"""


MTL = "newmtl cloth\nKd 0.64 0.64 0.64\nmap_Kd cloth.png\nnewmtl red paint\nKd 1 0 0\nnewmtl glass\nKd 0 0 0\nd 0.2\n"


def quarters() -> np.ndarray:
    """(32, 32, 3): red above left, green above right, blue below left, white below right."""
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:16, :16, 0] = picture[:16, 16:, 1] = picture[16:, :16, 2] = 255
    picture[16:, 16:] = 255
    return picture


def tetrahedron() -> tuple[np.ndarray, np.ndarray]:
    vertices = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], np.float32) * 0.4
    return vertices, np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]], np.int32)


def entry(name="Thing", painted=True, seed=0) -> pack.Entry:
    vertices, faces = tetrahedron()
    vertices, faces, normals = geometry.shade_smoothly(geometry.fit_to_frame(vertices), faces)
    rng = np.random.default_rng(seed)
    uvs = rng.random((len(faces), 3, 2)).astype(np.float32)
    texture = np.uint8(rng.integers(0, 2, (16, 16, 1)) * np.array([250, 130, 20]))
    coat = {"uvs": uvs, "texture": texture} if painted else {}
    return pack.Entry(
        name, f"key {name}", "source", "Kind", "Ané", "CC0-1.0", catalogue.split_of(name), vertices, faces, normals,
        **coat,
    )  # fmt: skip


def test_obj_reads_materials_and_cuts_concave_polygons():
    mesh = obj.read_obj(two_materials(), {"a.mtl": MTL}.__getitem__)
    assert mesh.palette == (obj.Material((0.64, 0.64, 0.64), "cloth.png"), obj.Material((1, 0, 0), None))
    corners = mesh.vertices[mesh.faces]
    areas = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])[:, 2] / 2
    assert (areas > 0).all()
    assert areas[mesh.materials == 0].sum() == pytest.approx(6)
    assert areas[mesh.materials == 1].sum() == pytest.approx(3)


def test_obj_relative_indices_equal_absolute_ones():
    absolute = obj.read_obj(two_materials(), lambda _: MTL)
    text = (
        two_materials()
        .replace("f 1/1 2/2 3/3 4/4", "f -10/-4 -9/-3 -8/-2 -7/-1")
        .replace("f 5 6 7 8 9 10", "f -6 -5 -4 -3 -2 -1")
    )
    relative = obj.read_obj(text, lambda _: MTL)
    assert np.array_equal(absolute.faces, relative.faces)
    assert np.array_equal(absolute.uvs, relative.uvs)


@pytest.mark.parametrize("faces", ["", "f 1 2 5", "f 1/1 2/9 3/1", "f 1 2/1 3", "f -9 1 2"])
def test_obj_rejects_bad_faces(faces):
    with pytest.raises(ValueError, match="OBJ"):
        obj.read_obj("v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\n" + faces, lambda _: "")


def test_mtl_glass_becomes_a_light_opaque_colour():
    assert obj.read_mtl(MTL)["glass"].color == pytest.approx((0.72, 0.72, 0.72))


def test_clip_ears_covers_a_star():
    angle = np.arange(10) * math.pi / 5
    star = np.stack([np.cos(angle), np.sin(angle), np.zeros(10)], 1) * np.where(np.arange(10) % 2, 0.3, 1)[:, None]
    polygon_area = np.cross(star, np.roll(star, -1, 0))[:, 2].sum() / 2
    for turn in (
        np.eye(3),
        primitives.rotation(20, 80, 50),
        primitives.rotation(0, 90, 0),
        primitives.rotation(0, 0, 90),
    ):
        points = star @ turn.T
        t = points[np.array(obj.clip_ears(points))]
        areas = np.cross(t[:, 1] - t[:, 0], t[:, 2] - t[:, 0]) @ turn[:, 2] / 2
        assert len(t) == 8
        assert (areas > 0).all()
        assert areas.sum() == pytest.approx(polygon_area)


def test_bake_repeats_tiling_textures_and_keeps_colours():
    mesh = obj.read_obj(two_materials(), lambda _: MTL)
    uvs, texture = bake.bake(mesh, {"cloth.png": quarters()})
    assert uvs.shape == (len(mesh.faces), 3, 2)
    assert uvs.dtype == np.float32
    assert uvs.min() >= 0
    assert uvs.max() <= 1
    assert texture.shape[0] == texture.shape[1] <= 256
    plain = sample(texture, uvs[mesh.materials == 1].reshape(-1, 2))
    assert (plain == [255, 0, 0]).all()
    rng = np.random.default_rng(0)
    weights = rng.dirichlet([1, 1, 1], 300)
    for face in np.flatnonzero(mesh.materials == 0):
        original = weights @ mesh.uvs[face]
        clear = (np.abs((original * 2) % 1 - 0.5) < 0.4).all(1)  # away from the edges between the quarters
        seen = sample(texture, weights @ uvs[face])[clear]
        expected = sample(quarters(), original[clear] % 1)
        assert np.abs(seen - expected).max() <= 2
        assert clear.sum() > 50


def test_bake_shrinks_dense_tiling_to_what_the_atlas_holds():
    mesh = obj.read_obj(two_materials().replace("3.75", "52.25"), lambda _: MTL)
    uvs, texture = bake.bake(mesh, {"cloth.png": quarters()})
    cloth = uvs[mesh.materials == 0].reshape(-1, 2)
    assert len(np.unique(sample(texture, np.add(cloth, [0.01, 0])), axis=0)) > 1
    assert np.ptp(cloth[:, 0]) * texture.shape[1] <= 32 * (bake.MAX_TILES + 1)


def test_bake_of_missing_texture_and_of_many_colours():
    mesh = obj.read_obj(two_materials(), lambda _: MTL)
    uvs, texture = bake.bake(mesh, {})
    assert (sample(texture, uvs[0]) == round(0.64 * 255)).all()
    n = 90
    faces = np.tile(mesh.faces[:1], (n, 1))
    palette = tuple(obj.Material((i / n, 0.5, 1 - i / n)) for i in range(n))
    many = obj.ObjModel(mesh.vertices, faces, np.zeros((n, 3, 2)), np.arange(n), palette)
    uvs, texture = bake.bake(many, {})
    expected = np.round(255 * np.array([m.color for m in palette]))
    assert np.abs(sample(texture, uvs[:, 0]) - expected).max() <= 1
    with pytest.raises(ValueError, match="materials"):
        bake.bake(many, {}, size=32)


def test_bake_tint_keeps_hue_and_drops_brightness():
    mtl = MTL.replace("Kd 0.64 0.64 0.64", "Kd 0.5 0.25 0")
    mesh = obj.read_obj(two_materials(), lambda _: mtl)
    uvs, texture = bake.bake(mesh, {"cloth.png": np.full((8, 8, 3), 200, np.uint8)})
    assert np.abs(sample(texture, uvs[0]) - [200, 100, 0]).max() <= 1


def test_transparent_texels_take_the_opaque_colour():
    picture = np.zeros((4, 4, 4), np.uint8)
    picture[:2] = [10, 200, 30, 255]
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    assert (bake.open_texture(buffer) == [10, 200, 30]).all()


def test_decimate_keeps_shape_materials_and_uvs():
    n = 60
    u, v = np.meshgrid(np.linspace(0, 1, n), np.linspace(0, 1, n))
    vertices = np.stack([u, v, 0.15 * np.sin(6 * u) * np.cos(4 * v)], -1).reshape(-1, 3)
    i = np.arange(n * n).reshape(n, n)
    a, b, c, d = i[:-1, :-1].ravel(), i[:-1, 1:].ravel(), i[1:, 1:].ravel(), i[1:, :-1].ravel()
    faces = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    own = (vertices[faces].mean(1)[:, 0] > 0.5).astype(np.int64)
    mesh = obj.ObjModel(
        vertices, faces, vertices[faces][..., :2], own, (obj.Material(texture="a"), obj.Material(texture="b"))
    )
    small = decimate.decimate(mesh, 800)
    assert 300 < len(small.faces) <= 810
    distance, _ = cKDTree(small.vertices).query(vertices)
    assert distance.max() < 0.12
    error = np.abs(small.uvs - small.vertices[small.faces][..., :2])
    assert error.max() < 1e-3
    middle = small.vertices[small.faces].mean(1)[:, 0]
    away = np.abs(middle - 0.5) > 0.03
    assert ((middle > 0.5) == small.materials)[away].all()
    assert decimate.decimate(mesh, len(faces)) is mesh


def test_decimate_thins_out_foliage_and_keeps_its_area():
    rng = np.random.default_rng(2)
    leaf = np.array([[0, 0, 0], [0.03, 0, 0], [0.03, 0.03, 0], [0, 0.03, 0]])
    vertices = np.concatenate([leaf @ np.linalg.qr(rng.normal(size=(3, 3)))[0] + rng.random(3) for _ in range(3000)])
    faces = np.concatenate([np.arange(3000)[:, None] * 4 + f for f in ([0, 1, 2], [0, 2, 3])])
    uvs = np.tile([[0.1, 0.1], [0.9, 0.1], [0.9, 0.9]], (6000, 1, 1))
    mesh = obj.ObjModel(vertices, faces, uvs, np.zeros(6000, np.int64), (obj.Material(),))
    small = decimate.decimate(mesh, 2000)

    def area(m):
        c = m.vertices[m.faces]
        return np.linalg.norm(np.cross(c[:, 1] - c[:, 0], c[:, 2] - c[:, 0]), axis=1).sum() / 2

    assert 1600 < len(small.faces) < 2400
    assert area(small) == pytest.approx(area(mesh), rel=0.15)


def test_fit_matches_the_rule_and_the_camera_module():
    assert (geometry.RADIUS, geometry.FIELD_OF_VIEW) == (camera.RADIUS, camera.FIELD_OF_VIEW)
    rng = np.random.default_rng(3)
    points = rng.normal(size=(500, 3)) * [3, 1, 0.3] + [5, -2, 9]
    fitted = geometry.fit_to_frame(points)
    assert np.abs(fitted.min(0) + fitted.max(0)).max() < 1e-5
    azimuths = np.arange(geometry.AZIMUTHS) * 360 / geometry.AZIMUTHS
    largest = 0.0
    for elevation in geometry.ELEVATIONS:
        orbit = camera.Orbit(torch.full((len(azimuths),), elevation), torch.from_numpy(azimuths))
        seen = (
            torch.from_numpy(fitted) @ orbit.world_to_camera()[:, :3, :3].mT + orbit.world_to_camera()[:, None, :3, 3]
        )
        ndc = seen[..., :2] / seen[..., 2:] * orbit.focal(2)
        largest = max(largest, float(ndc.abs().max()))
    assert largest == pytest.approx(geometry.FILL, abs=0.01)
    with pytest.raises(ValueError, match="vertices"):
        geometry.fit_to_frame(np.zeros((4, 3)))


def test_shading_splits_creases_and_keeps_smooth_surfaces_whole():
    builder = primitives.Builder()
    builder.box((1, 1, 1))
    vertices, faces = shapes.weld(*builder.merge()[:2])
    assert len(vertices) == 8
    split, new_faces, normals = geometry.shade_smoothly(vertices, faces)
    assert len(split) == 24
    assert np.allclose(split[new_faces], vertices[faces])
    assert np.allclose(np.abs(normals).max(1), 1)
    builder = primitives.Builder()
    builder.ball((1, 1, 1))
    vertices, faces = shapes.weld(*builder.merge()[:2])
    split, _, normals = geometry.shade_smoothly(vertices, faces)
    assert len(split) == len(vertices)
    assert (normals * split).sum(1).min() > 0.97


def test_split_is_by_crc32_of_the_title():
    names = ["Armchair", "Bed", "Christmas tree", "Küche", "Backpack", "Chair"]
    assert [catalogue.split_of(n) == "held_out" for n in names] == [zlib.crc32(n.encode()) % 8 == 0 for n in names]
    assert catalogue.split_of("Teddy bear") == "held_out"  # so measured: results on the held-out models depend on it


def test_properties_of_a_catalogue():
    entries = catalogue.read_properties("# x\nid=y\nname#2=B\\u00e9\nname#1 = A\nmodel#1=/a/a.obj\nname_fr#1=Z\n")
    assert entries == [{"name": "A", "model": "/a/a.obj"}, {"name": "Bé"}]


def test_library_is_filtered_turned_and_attributed(tmp_path):
    builder = primitives.Builder()
    builder.ball((1, 2, 3))
    vertices, faces, _, _ = builder.merge()
    lines = [f"v {x} {y} {z}" for x, y, z in vertices] + ["mtllib m.mtl", "usemtl red paint"]
    half = len(faces) // 2
    lines += ["f " + " ".join(str(i + 1) for i in f) for f in faces[:half]]
    lines += ["usemtl glass"] + ["f " + " ".join(str(i + 1) for i in f) for f in faces[half:]]
    text = "\n".join(lines)
    path = tmp_path / "Scopia.sh3f"
    properties = ""
    # of one colour: fit for training, not for being held out
    assert [data.split_of(name) for name in ("Plain", "Lamp")] == ["train", "held_out"]
    names = [("Egg", "Kitchen"), ("Man", "Characters"), ("Plain", "Kitchen"), ("Lamp", "Kitchen")]
    for i, (name, category) in enumerate(names, 1):
        properties += (
            f"id#{i}=S#{i}\nname#{i}={name}\ncategory#{i}={category}\nmodel#{i}=/a/{name}.obj\ncreator#{i}=Me\n"
        )
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("PluginFurnitureCatalog.properties", properties + "modelRotation#1=1 0 0 0 0 1 0 -1 0\n")
        file.writestr("a/Egg.obj", text)
        file.writestr("a/Man.obj", text)
        for plain in ("Plain", "Lamp"):
            file.writestr(f"a/{plain}.obj", text.replace("usemtl glass", ""))
        file.writestr("a/M.MTL", MTL)
    models = list(catalogue.read_library(path))
    assert [m.title for m in models] == ["Egg", "Plain"]
    assert np.ptp(models[0].mesh.vertices, axis=0) == pytest.approx([2, 6, 4], abs=0.1)
    entry = data.to_entry(models[0])
    assert entry.creator == "Me"
    assert entry.licence == "CC-BY-3.0"
    extents = np.ptp(entry.vertices, axis=0)  # catalogue (x, y, z) lies along world (y, z, x)
    assert extents / extents[1] == pytest.approx([2, 1, 3], rel=0.05)
    assert "| Egg | S#1 | Me | CC-BY-3.0 |" in data.licences([entry]) or entry.split == "held_out"


def test_world_axes_are_right_handed_with_the_front_at_x():
    assert np.array_equal(data.to_world(np.array([[1, 2, 3]])), [[3, 1, 2]])
    assert np.linalg.det(data.to_world(np.eye(3))) == pytest.approx(1)


def test_pack_round_trip_and_error_bounds(tmp_path):
    entries = [entry("One"), entry("Two", painted=False), entry("Three", seed=1)]
    path = tmp_path / "objects.pack"
    pack.write_pack(path, entries)
    back = pack.read_pack(path)
    for a, b in zip(entries, back, strict=True):
        assert (a.name, a.key, a.source, a.category, a.creator, a.licence, a.split) == (
            b.name, b.key, b.source, b.category, b.creator, b.licence, b.split,
        )  # fmt: skip
        assert np.array_equal(a.faces, b.faces)
        assert np.abs(a.vertices - b.vertices).max() <= 0.51 * pack.POSITION_STEP
        assert (a.normals * b.normals).sum(1).min() > 0.999
        if a.uvs is None:
            assert b.uvs is None
            assert b.texture is None
        else:
            assert np.abs(a.uvs - b.uvs).max() <= 0.51 / 65535
            assert np.array_equal(a.texture, b.texture)  # few colours: PNG
        assert b.vertices.dtype == b.normals.dtype == np.float32


def test_pack_keeps_photographic_textures_closely(tmp_path):
    smooth = np.random.default_rng(0).random((5, 5, 3)).astype(np.float32)
    image = Image.fromarray(np.uint8(255 * smooth)).resize((128, 128), Image.Resampling.BICUBIC)
    e = entry()
    e = pack.Entry(**{**e.__dict__, "texture": np.asarray(image)})
    pack.write_pack(tmp_path / "p", [e])
    error = pack.read_pack(tmp_path / "p")[0].texture.astype(float) - np.asarray(image)
    assert 10 * math.log10(255**2 / (error**2).mean()) > 38


def test_pack_refuses_what_it_cannot_hold(tmp_path):
    big = pack.Entry(**{**entry().__dict__, "vertices": entry().vertices * 5})
    with pytest.raises(ValueError, match="vertices"):
        pack.write_pack(tmp_path / "p", [big])
    (tmp_path / "q").write_bytes(b"no pack")
    with pytest.raises(ValueError, match="pack"):
        pack.read_pack(tmp_path / "q")
    with pytest.raises(ValueError, match="split"):
        pack.load_objects(tmp_path / "q", split="test")


def test_loading_splits_paints_and_generates(tmp_path):
    held = next(n for n in map(str, range(100)) if catalogue.split_of(n) == "held_out")
    kept = next(n for n in map(str, range(100)) if catalogue.split_of(n) == "train")
    path = tmp_path / "objects.pack"
    pack.write_pack(path, [entry(held), entry(kept, painted=False)])
    assert [o.name for o in pack.load_objects(path, "held_out")] == [held]
    train = pack.load_objects(path, "train", procedural=3, seed=5)
    assert [o.split for o in train] == ["train"] * 4
    assert train[0].name == kept
    again = pack.load_objects(path, "train", procedural=3, seed=5)
    other = pack.load_objects(path, "train", procedural=3, seed=6)
    for a, b in zip(train, again, strict=True):
        assert np.array_equal(a.texture, b.texture)
        assert np.array_equal(a.vertices, b.vertices)
        assert np.array_equal(a.uvs, b.uvs)
    assert any(
        a.vertices.shape != c.vertices.shape or not np.array_equal(a.texture, c.texture)
        for a, c in zip(train, other, strict=True)
    )
    assert len(pack.load_objects(path, "all", procedural=0)) == 2


@pytest.mark.parametrize("kind", list(shapes.RECIPES))
def test_generated_shapes_are_sound(kind):
    for seed in range(3):
        s = shapes.make_shape(np.random.default_rng(seed), kind)
        assert s.vertices.dtype == np.float32
        assert s.faces.dtype == np.int32
        assert np.isfinite(s.vertices).all()
        assert 0 <= s.faces.min() <= s.faces.max() < len(s.vertices)
        assert 20 <= len(s.faces) <= 12_000
        assert s.uvs.shape == (len(s.faces), 3, 2)
        assert 0 <= s.uvs.min() <= s.uvs.max() <= 1
        assert s.texture.shape == (128, 128, 3)
        corners = s.vertices[s.faces].astype(np.float64)
        areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
        assert (areas > 0).mean() > 0.99
        extents = np.ptp(s.vertices, axis=0)
        assert extents.min() > 0.05 * extents.max()


def test_generated_objects_differ_from_each_other_and_fit():
    objects = [pack.procedural_object(0, i) for i in range(30)]
    assert len({(o.name, len(o.vertices), o.texture.tobytes()) for o in objects}) == 30
    for o in objects:
        assert np.abs(o.vertices).max() <= 1
        assert np.linalg.norm(o.normals, axis=1) == pytest.approx(np.ones(len(o.normals)), abs=1e-4)


@pytest.mark.parametrize("make", ["box", "rounded", "ball", "cylinder", "torus", "tube", "extrude"])
def test_primitives_are_closed_and_face_outwards(make):
    b = primitives.Builder()
    t = np.linspace(0, math.pi, 40)
    {
        "box": lambda: b.box((1, 2, 3)),
        "rounded": lambda: b.box((1, 2, 3), edge=0.2),
        "ball": lambda: b.ball((1, 2, 3), rings=40),
        "cylinder": lambda: b.cylinder(1, 2, axis="y", sides=60),
        "torus": lambda: b.torus(2, 0.5),
        "tube": lambda: b.tube(np.stack([np.cos(t), 0 * t, np.sin(t)], 1), 0.1, sides=40),
        "extrude": lambda: b.extrude([(0, 0), (2, 0), (2, 1), (1, 0.3), (0, 1)], 0.5),
    }[make]()
    volume = {
        "box": 6, "rounded": 5.79, "ball": 8 * math.pi, "cylinder": 2 * math.pi, "torus": math.pi**2,
        "tube": 0.01 * math.pi**2, "extrude": 0.65,
    }  # fmt: skip
    vertices, faces = shapes.weld(*b.merge()[:2])
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    assert sorted(map(tuple, edges)) == sorted(map(tuple, edges[:, ::-1]))
    assert np.einsum(
        "fi,fi", vertices[faces[:, 0]], np.cross(vertices[faces[:, 1]], vertices[faces[:, 2]])
    ) / 6 == pytest.approx(volume[make], rel=0.08)


def test_box_projection_is_upright_and_not_mirrored():
    builder = primitives.Builder()
    builder.box((1, 1, 1))
    vertices, faces, _, _ = builder.merge()
    uvs = materials.box_project(vertices, faces)
    corners, du, dv = vertices[faces], uvs[:, 1] - uvs[:, 0], uvs[:, 2] - uvs[:, 0]
    assert (du[:, 0] * dv[:, 1] - du[:, 1] * dv[:, 0] > 0).all()  # same sense as the face seen from outside
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    side = np.abs(normal[:, 2]) < 0.5
    assert np.allclose(uvs[side][..., 1] - 0.5, corners[side][..., 2])
