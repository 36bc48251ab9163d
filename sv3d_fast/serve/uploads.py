"""From a request's body to a picture on the disk: what is too large, or no picture, ends here."""

import base64
import binascii
import tempfile
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.datastructures import UploadFile

from sv3d_fast.image import DECODE_ERRORS, FORMATS, ImageError, read_picture

from .generation import Generation, complaint

IMAGE = "image"  # name of the part, or of the JSON field
MAX_FIELDS, MAX_FIELD = 32, 4096  # of a multipart body: number, bytes of each


class JSONGeneration(Generation):
    """A Generation with its picture in base64, or as a data URL."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    image: str

    def decoded(self) -> bytes:
        """Raises HTTPException 422 for what is not base64."""
        _, separator, data = self.image.partition(";base64,")
        try:
            return base64.b64decode(data if separator else self.image, validate=True)
        except (binascii.Error, ValueError) as error:
            raise HTTPException(422, "image: expected base64") from error


async def read_request(request: Request) -> tuple[Generation, bytes]:
    """What is asked for and the bytes of the picture. Raises HTTPException 400, 413, 415 or 422."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_form(request)
    if kind == "application/json":
        body = await request.body()
        asked = _validated(JSONGeneration, body)
        return asked, asked.decoded()
    raise HTTPException(415, "Content-Type: expected multipart/form-data or application/json")


async def _read_form(request: Request) -> tuple[Generation, bytes]:
    try:
        form = request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD)
        async with form as parts:
            fields: dict[str, Any] = dict(parts)
            upload = fields.pop(IMAGE, None)
            if not isinstance(upload, UploadFile):
                raise HTTPException(422, f"{IMAGE}: expected a part that is a file")
            if len(parts.multi_items()) != len(fields) + 1:
                raise HTTPException(422, "expected each field once")
            return _validated(Generation, fields), await upload.read()
    except (LookupError, ValueError, AssertionError) as error:  # an unknown charset, a boundary that is none
        raise HTTPException(400, "the multipart body can't be read") from error


def _validated(model: type, content: Any) -> Any:
    assert issubclass(model, BaseModel)
    try:
        return model.model_validate_json(content) if isinstance(content, bytes) else model.model_validate(content)
    except ValidationError as error:
        raise HTTPException(422, complaint(error).encode("utf-8", "replace").decode()) from error


def save_picture(data: bytes, path: Path, max_pixels: int) -> None:
    """Decodes a picture of any format that `image.py` reads, told by its content, and writes it as a lossless PNG.

    The worker so never sees a client's bytes. Raises HTTPException 422 for what is no picture, is damaged, or has more
    than `max_pixels`, which its header tells before anything is decoded.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:
        file.write(data)
        file.flush()
        try:
            with Image.open(file.name, formats=FORMATS) as image:
                width, height = image.size
        except Image.DecompressionBombError as error:
            raise HTTPException(422, f"image: expected at most {max_pixels} pixels, got many more") from error
        except (*DECODE_ERRORS, Image.UnidentifiedImageError, RecursionError) as error:
            raise HTTPException(422, "image: not a picture in a format that can be read") from error
        if width * height > max_pixels:
            raise HTTPException(422, f"image: expected at most {max_pixels} pixels, got {width} x {height}")
        try:
            read_picture(file.name, name=IMAGE).save(path, "PNG", compress_level=1)
        except ImageError as error:
            raise HTTPException(422, str(error).encode("utf-8", "replace").decode()) from error
