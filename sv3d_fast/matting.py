"""Background removal through rembg, an optional extra: `pip install "sv3d-fast[matting]"`."""

import functools
import os
from pathlib import Path

import numpy as np
from PIL import Image

NETWORK = "isnet-general-use"  # rembg fetches it on first use; its default, u2net, cuts objects out less well
FAINT = 8  # of 255: network noise below this would stretch the box around the object


class MattingError(ValueError):
    """The background could not be removed; the message is one line that says what to do."""


def remove_background(image: Image.Image, model: str | os.PathLike | None = None) -> Image.Image:
    """Cuts out the main object of an RGB picture: the same picture as RGBA, alpha from a matting network.

    model: path of a local ONNX file of the IS-Net family (rembg's `dis_custom` session: input 1x3x1024x1024); None
    takes rembg's isnet-general-use, which rembg downloads to its own cache (U2NET_HOME) the first time.
    Edges are refined by closed-form alpha matting, as the official SV3D script asks of rembg.
    Raises MattingError where rembg is not installed, the model can't be read, or the network fails.
    """
    if model is not None and not Path(model).is_file():
        raise MattingError(f"matting_model: expected an ONNX file, got {str(model)!r}, which is not a file")
    try:
        import rembg
    except (ImportError, SystemExit) as error:  # without onnxruntime, rembg prints advice and exits
        raise MattingError(
            "the picture has a background and rembg is not installed: pip install 'sv3d-fast[matting]', "
            "or give a picture that is cut out (RGBA) or on white"
        ) from error
    try:
        session = _session(None if model is None else str(Path(model).resolve()))
        cut = rembg.remove(image.convert("RGB"), session=session, alpha_matting=True, post_process_mask=False)
    except Exception as error:  # onnxruntime, pymatting and the download each raise types of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        advice = "; give matting_model, a local ONNX file, to work offline" if model is None else ""
        raise MattingError(f"the background could not be removed: {reason[:300]}{advice}") from error
    pixels = np.array(cut.convert("RGBA"))
    pixels[pixels[..., 3] < FAINT] = 0
    return Image.fromarray(pixels)


@functools.lru_cache(maxsize=1)
def _session(model: str | None):
    import rembg

    if model is None:
        return rembg.new_session(NETWORK)
    import onnxruntime
    from rembg.sessions.dis_custom import DisCustomSession

    class LocalSession(DisCustomSession):
        """dis_custom for a file anywhere: rembg itself only takes files inside its own cache."""

        @classmethod
        def download_models(cls, *args, **kwargs):
            return kwargs["model_path"]

    return LocalSession("dis_custom", onnxruntime.SessionOptions(), model_path=model)
