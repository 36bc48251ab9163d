"""What an import costs: no torch for the package and the command line's help, no CUDA and no build for the pipeline."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "diffusers", "transformers", "triton", "gsplat", "tvm_ffi", "av", "PIL", "scipy", "trimesh"}
HEAVY |= {"fastapi", "pydantic", "uvicorn"}


def modules_after(code: str, *, whole: bool = False) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after `code`: the top-level ones, or all of them."""
    program = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name if whole else name.partition(".")[0] for name in done.stderr.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import sv3d_fast; dir(sv3d_fast); sv3d_fast.__version__",
        "from sv3d_fast.cli import main; main(['--help'])",
        "from sv3d_fast.cli import main; main(['--version'])",
        "from sv3d_fast.cli import main; main(['run', '--help'])",
        "from sv3d_fast.cli import main; main(['serve', '--help'])",
        "from sv3d_fast.cli import main; main(['serve', '--new-key'])",
        "from sv3d_fast.cli import main; main(['serve', '--port', '0'])",
        "from sv3d_fast.cli import main; main(['run', 'x.png', '-o', 'y', '--steps', 'many'])",
        "from sv3d_fast.cli import main; main(['run', 'x.png', '-o', 'y', '--seed', '-1'])",
    ],
)
def test_light(code):
    loaded = modules_after(code)
    assert "sv3d_fast" in loaded
    assert not loaded & HEAVY


def test_the_pipeline_starts_no_cuda_and_no_compiler():
    code = "import sv3d_fast.pipeline, torch; assert not torch.cuda.is_initialized()"
    loaded = modules_after(code)  # triton is among them: kernels are declared on import, and compiled on first use
    assert not loaded & {"gsplat", "diffusers", "transformers", "tvm_ffi", "rembg", "onnxruntime"}


def test_opening_a_model_imports_no_compiler_and_no_hub():
    """torch imports sympy, seconds of it, where somebody draws numbers on the meta device."""
    code = (
        "from sv3d_fast.mini.config import WEIGHTS; from sv3d_fast.model.weights import load_model; load_model(WEIGHTS)"
    )
    assert not modules_after(code, whole=True) & {"sympy", "torch._dynamo", "torch._inductor", "huggingface_hub.hf_api"}


def test_public_names_are_there():
    import sv3d_fast

    for name in sv3d_fast.__all__:
        assert getattr(sv3d_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sv3d_fast.nothing
