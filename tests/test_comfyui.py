"""The nodes for ComfyUI, run as it runs them: in inference mode, with tensors, by the names of their inputs."""

import asyncio
import importlib.util
import io
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from comfy_stand_in import Host, InterruptProcessingException
from scipy.spatial.transform import Rotation
from small_run import FIT

from sv3d_fast.scene.corners import to_y_up
from sv3d_fast.scene.splats import Splats
from sv3d_fast.settings import Settings

FOLDER = Path(__file__).parent.parent / "examples" / "comfyui"
SMALL = {"frame_size": 64, "mc_resolution": 24, "target_faces": 300, "texture_resolution": 64}


@pytest.fixture
def host(quick_fit, monkeypatch, tmp_path):
    whole = Settings.of
    monkeypatch.setattr(Settings, "of", classmethod(lambda cls, **given: whole(**SMALL | given)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Host(monkeypatch)


@pytest.fixture
def nodes(host):
    """By node_id, loaded from the folder that users copy."""
    spec = importlib.util.spec_from_file_location("sv3d_fast_nodes", FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def found():
        return await (await module.comfy_entrypoint()).get_node_list()

    return {node.define_schema().node_id: node for node in asyncio.run(found())}


def run(node, **given):
    """Executes a node with its schema's defaults; returns its outputs by name."""
    schema = node.define_schema()
    values = {i.id: i.options["default"] for i in schema.inputs if "default" in i.options} | given
    needed = {i.id for i in schema.inputs if not i.options.get("optional")}
    assert needed <= set(values) <= {i.id for i in schema.inputs}
    with torch.inference_mode():
        result = node.execute(**values).result
    return dict(zip([o.options["display_name"] for o in schema.outputs], result, strict=True))


def disc():
    """A picture (1, 96, 88, 3) and the mask of its object (1, 96, 88)."""
    y, x = torch.meshgrid(torch.arange(96), torch.arange(88), indexing="ij")
    mask = ((x - 44) ** 2 + (y - 50) ** 2 < 26**2).float()
    color = torch.tensor([0.8, 0.2, 0.1])
    return (0.3 + mask[..., None] * (color - 0.3))[None], mask[None]


def test_outputs_are_comfyuis_types(nodes, host, tmp_path):
    model = run(nodes["SV3DFastLoadModel"], device="cpu")["model"]
    image, mask = disc()
    made = run(nodes["SV3DFastImageToMesh"], model=model, image=image, mask=mask, steps=1, seed=5)
    assert made["orbit"].shape == (21, 64, 64, 3)
    assert 0 <= float(made["orbit"].min()) < float(made["orbit"].max()) <= 1
    glb = trimesh.load(io.BytesIO(made["model_3d"].values[0].getvalue()), "glb", force="mesh", process=False)
    assert made["model_3d"].named == {"file_format": "glb"}
    vertices, faces = made["mesh"].values
    assert torch.allclose(vertices[0], torch.from_numpy(glb.vertices).float(), atol=1e-6)
    assert torch.equal(faces[0], torch.from_numpy(glb.faces).long())
    uvs = torch.from_numpy(glb.visual.uv).float()
    assert torch.allclose(made["mesh"].named["uvs"][0], torch.stack([uvs[:, 0], 1 - uvs[:, 1]], -1), atol=1e-6)
    assert made["mesh"].named["texture"].shape == (1, 64, 64, 3)
    positions, scales, rotations, opacities, harmonics = made["splat"].values
    count = positions.shape[1]
    assert [tuple(t.shape) for t in made["splat"].values] == [
        (1, count, 3), (1, count, 3), (1, count, 4), (1, count, 1), (1, count, 1, 3),
    ]  # fmt: skip
    assert float(scales.min()) > 0
    assert 0 <= float(opacities.min()) <= float(opacities.max()) <= 1
    assert torch.allclose(rotations.norm(dim=-1), torch.ones(1, count), atol=1e-5)
    assert torch.isfinite(harmonics).all()
    assert (FIT.steps, FIT.steps) in host.progress
    assert list(tmp_path.glob("sv3d-fast-*")) == []


def test_splats_stand_as_the_mesh_for_comfyuis_cameras(host):
    """ComfyUI takes a camera from the axes of its meshes to those of its splats as (x, -y, -z)."""
    from sv3d_fast.frontends.comfyui import to_splat

    generator = torch.Generator().manual_seed(0)
    given = Splats(*(torch.randn(*shape, generator=generator) for shape in ((7, 3), (7, 4), (7, 3), (7,), (7, 3))))
    means, scales, quats, opacities, harmonics = (part[0] for part in to_splat(given).values)
    of_mesh = torch.from_numpy(to_y_up(np.eye(3))).float().T  # its columns: where the world's axes go
    turn = torch.diag(torch.tensor([1.0, -1, -1])) @ of_mesh
    front = turn @ torch.tensor([1.0, 0, 0])
    assert front.tolist() == [0, 0, -1]  # which its default camera, at -z, looks at
    assert torch.allclose(means, given.means @ turn.T, atol=1e-6)
    expected = turn @ covariances(given.quats, given.scales) @ turn.T
    assert torch.allclose(covariances(quats, scales), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(opacities[:, 0], given.opacities)
    assert torch.allclose(0.5 + 0.5 / math.sqrt(math.pi) * harmonics[:, 0], given.colors, atol=1e-6)


def covariances(quats, scales):
    """(N, 3, 3), by scipy's rotations."""
    turns = torch.from_numpy(Rotation.from_quat(quats.numpy(), scalar_first=True).as_matrix()).float()
    return turns @ torch.diag_embed(scales**2) @ turns.mT


def test_interruption_ends_the_run(nodes, host, tmp_path):
    model = run(nodes["SV3DFastLoadModel"], device="cpu")["model"]
    image, mask = disc()
    host.patience = 4
    with pytest.raises(InterruptProcessingException):
        run(nodes["SV3DFastImageToMesh"], model=model, image=image, mask=mask, steps=1)
    assert len(host.progress) <= 4
    assert list(tmp_path.glob("sv3d-fast-*")) == []


def test_a_mask_of_another_size(nodes, host):
    image, mask = disc()
    with pytest.raises(ValueError, match=r"mask: expected the image's \(96, 88\), got \(96, 80\)"):
        run(nodes["SV3DFastImageToMesh"], model=({}, None), image=image, mask=mask[..., :80])
