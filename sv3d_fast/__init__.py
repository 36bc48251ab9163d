"""sv3d-fast: a photo to a Stable Video 3D orbit, Gaussian splats and a textured mesh.

Public names are imported on first use, so that `import sv3d_fast` stays free of torch and CUDA.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Orbit": "camera",
    "OrbitVideo": "video",
    "Subject": "image",
    "Splats": "scene.splats",
    "Mesh": "scene.mesh",
    "StableVideo3DPipeline": "stable_video_3d",
    "TripoSR": "triposr",
    "run": "pipeline",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
