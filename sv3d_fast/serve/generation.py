"""What a client may ask for: one pydantic model, whose limits are narrower than the library's."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Mode = Literal["orbit", "mesh", "preview"]
ORBIT = {"seed", "steps", "elevation", "orbit", "frame_size", "foreground_ratio", "remove_background"}
TAKEN = {
    "orbit": ORBIT,
    "mesh": ORBIT | {"mc_resolution", "target_faces", "texture_resolution"},
    "preview": {"foreground_ratio", "remove_background", "mc_resolution", "turntable"},
}


class Generation(BaseModel):
    """A job: what leaves a field out gets the default of `sv3d-fast run`, or of `sv3d-fast preview`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    mode: Mode = Field("mesh", description="preview: a mesh by TripoSR in one pass")
    seed: int | None = Field(None, ge=0, lt=2**63, description="of the noise and of the fit")
    steps: int | None = Field(None, ge=1, le=200, description="denoising steps")
    elevation: float | None = Field(None, ge=-89, le=89, description="of the picture's camera, degrees")
    orbit: Literal["static", "sine"] | None = None
    frame_size: int | None = Field(None, ge=64, le=1024, multiple_of=64, description="pixels along a side")
    foreground_ratio: float | None = Field(
        None, ge=0.1, le=1, description="longest side of the object over the picture's"
    )
    remove_background: bool | None = None
    mc_resolution: int | None = Field(None, ge=16, le=320, description="of the surface grid, along a side")
    target_faces: int | None = Field(None, ge=100, le=1_000_000)
    texture_resolution: int | None = Field(None, ge=64, le=4096, description="pixels along a side")
    turntable: bool | None = Field(None, description="preview: a video all around")

    @model_validator(mode="after")
    def _takes_what_was_given(self) -> "Generation":
        if extra := sorted(self.given().keys() - TAKEN[self.mode]):
            raise ValueError(f"{extra[0]}: mode {self.mode} takes {', '.join(sorted(TAKEN[self.mode]))}")
        return self

    def given(self) -> dict[str, Any]:
        """The fields besides mode and picture that the client set."""
        return self.model_dump(exclude={"mode", "image"}, exclude_none=True)


def complaint(error: ValidationError) -> str:
    """One line that names each field; what the client sent is not repeated."""
    parts = []
    for detail in error.errors(include_input=False, include_url=False, include_context=False):
        where = ".".join(map(str, detail["loc"]))
        message = detail["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts)
