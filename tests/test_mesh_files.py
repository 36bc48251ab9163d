"""Meshes for printers and for AR: units, closedness and layout, by the specifications and by readers of others."""

import io
import struct
import xml.etree.ElementTree as ET
import zipfile

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from test_export import accessor, arrow, corners_of, glb_parts

from sv3d_fast.scene.corners import from_y_up, to_y_up
from sv3d_fast.scene.export import load_mesh, save_mesh
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.scene.packages import package
from sv3d_fast.scene.print_shape import printable
from sv3d_fast.scene.surface import is_closed

CORE = "{http://schemas.microsoft.com/3dmanufacturing/core/2015/02}"


def as_mesh(shape) -> Mesh:
    return Mesh(torch.tensor(shape.vertices, dtype=torch.float32), torch.tensor(shape.faces, dtype=torch.int32))


def egg(subdivisions=2) -> Mesh:
    """A closed shape off the origin: 0.4 x 0.6 x 0.8, its lowest point at z = -0.3."""
    sphere = trimesh.creation.icosphere(subdivisions=subdivisions)
    sphere.apply_scale([0.2, 0.3, 0.4])
    sphere.apply_translation([0.5, -0.2, 0.1])
    return as_mesh(sphere)


def model_of(path) -> tuple[ET.Element, np.ndarray, np.ndarray]:
    """The model element, vertices and triangles of a 3MF, found as the specification says: by its relationship."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        (relation,) = ET.fromstring(archive.read("_rels/.rels"))
        assert relation.get("Type") == "http://schemas.microsoft.com/3dmanufacturing/2013/01/3dmodel"
        endings = {e.get("Extension"): e.get("ContentType") for e in ET.fromstring(archive.read("[Content_Types].xml"))}
        assert endings["model"] == "application/vnd.ms-package.3dmanufacturing-3dmodel+xml"
        model = ET.fromstring(archive.read(relation.get("Target").lstrip("/")))
    vertices = [[float(v.get(axis)) for axis in "xyz"] for v in model.iter(f"{CORE}vertex")]
    triangles = [[int(t.get(f"v{k}")) for k in (1, 2, 3)] for t in model.iter(f"{CORE}triangle")]
    return model, np.array(vertices), np.array(triangles)


def test_printable_stands_on_the_plate():
    shape = printable(egg(), 50)
    low, high = shape.vertices.amin(0), shape.vertices.amax(0)
    np.testing.assert_allclose(low, [-12.5, -18.75, 0], atol=1e-5)
    np.testing.assert_allclose(high, [12.5, 18.75, 50], atol=1e-5)
    assert is_closed(shape)
    assert shape.uvs is shape.texture is shape.colors is None
    volume = trimesh.Trimesh(shape.vertices, shape.faces).volume
    assert volume == pytest.approx(trimesh.Trimesh(egg().vertices, egg().faces).volume * 62.5**3, rel=1e-5)


def test_printable_ignores_vertices_of_no_face():
    mesh = egg()
    with_stray = Mesh(torch.cat([torch.tensor([[0.0, 0, 9]]), mesh.vertices]), mesh.faces + 1)
    assert torch.equal(printable(with_stray, 80).vertices, printable(mesh, 80).vertices)
    assert torch.equal(printable(with_stray, 80).faces, printable(mesh, 80).faces)


def test_an_edge_too_short_for_float32_does_not_open_the_shape():
    """Vertices that fall together take the two faces between them with them."""
    mesh = egg(1)
    a, b = 0, int(mesh.faces[0][1] if mesh.faces[0][0] == 0 else mesh.faces[0][0])
    vertices = mesh.vertices.clone()
    vertices[b] = vertices[a] + torch.tensor([0, 0, 1e-8])
    shape = printable(Mesh(vertices, mesh.faces), 100)
    assert len(shape.vertices) == len(vertices) - 1
    assert len(shape.faces) == len(mesh.faces) - 2
    assert is_closed(shape)


@pytest.mark.parametrize("height", [0, -1, float("nan"), float("inf")])
def test_heights_that_can_not_be(height):
    with pytest.raises(ValueError, match=r"^height_mm: expected a positive"):
        printable(egg(), height)


def test_a_flat_mesh_has_no_height():
    flat = Mesh(torch.tensor([[0.0, 0, 1], [1, 0, 1], [0, 1, 1]]), torch.tensor([[0, 1, 2]], dtype=torch.int32))
    with pytest.raises(ValueError, match="some height"):
        printable(flat, 10)


@pytest.mark.parametrize("height", [100, 7.25])
def test_stl_is_binary_and_in_millimetres(tmp_path, height):
    (path,) = save_mesh(egg(), tmp_path / "mesh.stl", height_mm=height)
    data = path.read_bytes()
    (count,) = struct.unpack_from("<I", data, 80)
    assert len(data) == 84 + 50 * count
    assert not data.startswith(b"solid")
    record = np.frombuffer(data, [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("count", "<u2")], offset=84)
    assert (record["corners"].reshape(-1, 3).min(0)[2], record["corners"].reshape(-1, 3).max(0)[2]) == (0, height)
    out = (record["normal"] * (record["corners"].mean(1) - [0, 0, height / 2])).sum(1)
    assert out.min() > 0
    assert trimesh.load(path).is_watertight  # after welding by place, as slicers do


def test_3mf_by_the_specification(tmp_path):
    (path,) = save_mesh(egg(), tmp_path / "mesh.3mf", height_mm=80)
    model, vertices, triangles = model_of(path)
    assert model.tag == f"{CORE}model"
    assert model.get("unit") == "millimeter"
    assert [child.tag for child in model] == [f"{CORE}resources", f"{CORE}build"]
    assert model.find(f"{CORE}build/{CORE}item").get("objectid") == model.find(f"{CORE}resources/{CORE}object").get(
        "id"
    )
    assert (vertices[:, 2].min(), vertices[:, 2].max()) == (0, 80)
    shape = trimesh.Trimesh(vertices, triangles, process=False)
    assert shape.is_watertight
    assert shape.volume == pytest.approx(trimesh.Trimesh(egg().vertices, egg().faces).volume * 1e6, rel=1e-5)
    assert path.read_bytes() == save_mesh(egg(), tmp_path / "b.3mf", height_mm=80)[0].read_bytes()


def test_3mf_without_a_height_keeps_the_worlds_units(tmp_path):
    mesh = arrow()
    _, vertices, triangles = model_of(save_mesh(mesh, tmp_path / "mesh.3mf")[0])
    np.testing.assert_allclose(vertices[triangles].reshape(-1, 3), corners_of(mesh), rtol=1e-8)


def test_trimesh_reads_the_3mf(tmp_path):
    pytest.importorskip("lxml", reason="of the extra test-formats")
    save_mesh(egg(), tmp_path / "mesh.3mf", height_mm=100)
    np.testing.assert_allclose(load_mesh(tmp_path / "mesh.3mf").vertices.amax(0), [25, 37.5, 100], rtol=1e-5)


@pytest.mark.parametrize("alignment", [1, 64])
def test_packages(alignment):
    files = {"a": b"", "folder/b.bin": bytes(range(200)), "c" * 33: b"1", "d" * 34: b"22"}
    data = package(files, compress=False, alignment=alignment)
    assert data == package(files, compress=False, alignment=alignment)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files
        starts = offsets(data, archive)
    assert all(start % alignment == 0 for start in starts)


def offsets(data: bytes, archive: zipfile.ZipFile) -> list[int]:
    """Where each file's bytes begin, from the lengths in its local header (PKWARE APPNOTE, 4.3.7)."""
    found = []
    for entry in archive.infolist():
        signature, name, extra = struct.unpack_from("<4s22xHH", data, entry.header_offset)
        assert signature == b"PK\3\4"
        found.append(entry.header_offset + 30 + name + extra)
    return found


@pytest.mark.parametrize("texture_format", ["png", "jpeg"])
def test_usdz_is_aligned_and_uncompressed(tmp_path, texture_format):
    mesh = arrow()
    data = save_mesh(mesh, tmp_path / "mesh.usdz", texture_format=texture_format)[0].read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist() == ["object.usda", f"textures/albedo.{texture_format}"]
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        starts = offsets(data, archive)
        layer, picture = (archive.read(name) for name in archive.namelist())
    assert [start % 64 for start in starts] == [0, 0]
    assert [data[start : start + 8] for start in starts] == [layer[:8], picture[:8]]
    assert layer.startswith(b"#usda 1.0\n")
    assert Image.open(io.BytesIO(picture)).format.lower() == texture_format


@pytest.mark.parametrize("textured", [True, False])
def test_usd_reads_the_usdz(tmp_path, textured):
    pytest.importorskip("pxr", reason="of the extra test-formats")
    from pxr import Usd, UsdGeom, UsdShade, UsdValidation

    mesh = arrow(textured=textured, colored=not textured)
    (path,) = save_mesh(mesh, tmp_path / "mesh.usdz", texture_format="jpeg")
    stage = Usd.Stage.Open(str(path))
    assert stage.GetDefaultPrim().GetPath() == "/object"
    assert UsdGeom.GetStageUpAxis(stage) == "Y"
    assert UsdGeom.GetStageMetersPerUnit(stage) == 1
    surface = UsdGeom.Mesh(stage.GetPrimAtPath("/object/surface"))
    points, faces = np.array(surface.GetPointsAttr().Get()), np.array(surface.GetFaceVertexIndicesAttr().Get())
    np.testing.assert_allclose(from_y_up(points[faces]), corners_of(mesh))
    assert UsdGeom.Mesh.ValidateTopology(
        surface.GetFaceVertexIndicesAttr().Get(), surface.GetFaceVertexCountsAttr().Get(), len(points)
    )[0]
    np.testing.assert_allclose(surface.GetExtentAttr().Get(), surface.ComputeExtent(surface.GetPointsAttr().Get()))
    normals = np.array(surface.GetNormalsAttr().Get())
    assert np.linalg.norm(normals, axis=1) == pytest.approx(1, abs=1e-5)
    primvars = UsdGeom.PrimvarsAPI(surface)
    material, _ = UsdShade.MaterialBindingAPI(surface).ComputeBoundMaterial()
    preview = material.ComputeSurfaceSource()[0]
    color = preview.GetInput("diffuseColor").GetConnectedSources()[0][0].source
    color = UsdShade.Shader(color.GetPrim())
    if textured:
        np.testing.assert_allclose(
            np.array(primvars.GetPrimvar("st").ComputeFlattened()).reshape(-1, 3, 2), mesh.uvs.numpy(), atol=1e-7
        )
        asset = color.GetInput("file").Get()
        assert asset.resolvedPath == f"{path}[textures/albedo.jpeg]"
    else:
        srgb = mesh.colors.numpy() / 255
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        np.testing.assert_allclose(primvars.GetPrimvar("displayColor").Get(), linear, atol=1e-6)
    validators = UsdValidation.ValidationRegistry().GetOrLoadAllValidators()  # of the package, its types, its shaders
    assert "usdUtilsValidators:UsdzPackageValidator" in [v.GetMetadata().name for v in validators]
    assert [e.GetMessage() for e in UsdValidation.ValidationContext(validators).Validate(stage)] == []


def test_usdz_orientation_and_seams_without_a_reader(tmp_path):
    """The text itself: y-up positions, one per vertex of the welded surface, texture coordinates by corner."""
    mesh = arrow()
    with zipfile.ZipFile(save_mesh(mesh, tmp_path / "mesh.usdz")[0]) as archive:
        text = archive.read("object.usda").decode()

    def values(name):
        body = text.split(f"{name} = [", 1)[1].split("]", 1)[0]
        return np.array([float(v) for v in body.replace("(", "").replace(")", "").split(",")])

    np.testing.assert_allclose(values("points").reshape(-1, 3), to_y_up(mesh.vertices.numpy()), rtol=1e-8)
    np.testing.assert_array_equal(values("faceVertexIndices"), mesh.faces.numpy().ravel())
    uvs = values("primvars:st").reshape(-1, 2)[values("primvars:st:indices").astype(int)]
    np.testing.assert_allclose(uvs.reshape(-1, 3, 2), mesh.uvs.numpy())
    assert text.count("{") == text.count("}")


def test_jpeg_in_the_glb(tmp_path):
    size = 512
    noise = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    smooth = torch.nn.functional.avg_pool2d(noise.permute(2, 0, 1).float(), 9, 1, 4).permute(1, 2, 0).to(torch.uint8)
    mesh = arrow()
    mesh = Mesh(mesh.vertices, mesh.faces, mesh.uvs, smooth)
    (path,) = save_mesh(mesh, tmp_path / "mesh.glb", texture_format="jpeg")
    document, blob = glb_parts(path)
    assert document["images"][0]["mimeType"] == "image/jpeg"
    view = document["bufferViews"][document["images"][0]["bufferView"]]
    picture = Image.open(io.BytesIO(blob[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]))
    assert picture.format == "JPEG"
    back = load_mesh(path).texture
    np.testing.assert_array_equal(back.numpy(), np.asarray(picture))
    assert (back.float() - smooth.float()).abs().mean() < 3
    primitive = document["meshes"][0]["primitives"][0]
    assert len(accessor(document, blob, primitive["attributes"]["TEXCOORD_0"])) > len(mesh.vertices)
    assert path.stat().st_size < save_mesh(mesh, tmp_path / "b.glb")[0].stat().st_size / 2
