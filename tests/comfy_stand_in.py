"""What our nodes use of ComfyUI: comfy_api.latest and comfy.model_management, with its names and signatures."""

import sys
import types
from dataclasses import dataclass, field
from typing import Any


class InterruptProcessingException(Exception):  # noqa: N818  # ComfyUI's name
    pass


@dataclass
class Socket:
    kind: str
    id: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def _type(kind: str) -> type:
    class Type:
        class Input(Socket):
            def __init__(self, id, **options):
                super().__init__(kind, id, options)

        class Output(Socket):
            def __init__(self, id=None, display_name=None):
                super().__init__(kind, id, {"display_name": display_name})

    return Type


@dataclass
class Schema:
    node_id: str
    display_name: str
    category: str
    inputs: list[Socket]
    outputs: list[Socket]


class NodeOutput:
    def __init__(self, *result):
        self.result = result


class Record:
    """SPLAT, MESH and File3D hold what they are given."""

    def __init__(self, *values, **named):
        self.values, self.named = values, named


class Host:
    """Installs the modules; holds the progress that nodes report, and interrupts after `patience` looks."""

    def __init__(self, monkeypatch):
        self.progress: list[tuple[float, float]] = []
        self.patience = 10**9
        kinds = ("Image", "Mask", "Int", "Float", "Combo", "String", "Splat", "Mesh", "File3DGLB")
        io = types.SimpleNamespace(
            **{kind: _type(kind.upper()) for kind in kinds}, Custom=_type, ComfyNode=object, Schema=Schema,
            NodeOutput=NodeOutput,
        )  # fmt: skip
        latest: Any = types.ModuleType("comfy_api.latest")
        latest.io, latest.ComfyExtension = io, object
        latest.Types = types.SimpleNamespace(
            **{name: type(name, (Record,), {}) for name in ("SPLAT", "MESH", "File3D")}
        )
        execution = types.SimpleNamespace(
            set_progress=lambda value, max_value: self.progress.append((value, max_value))
        )
        latest.ComfyAPISync = lambda: types.SimpleNamespace(execution=execution)
        management: Any = types.ModuleType("comfy.model_management")
        management.throw_exception_if_processing_interrupted = self._look
        for name, module in {
            "comfy": types.ModuleType("comfy"), "comfy.model_management": management,
            "comfy_api": types.ModuleType("comfy_api"), "comfy_api.latest": latest,
        }.items():  # fmt: skip
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "sv3d_fast.frontends.comfyui", raising=False)

    def _look(self):
        self.patience -= 1
        if self.patience < 0:
            raise InterruptProcessingException
