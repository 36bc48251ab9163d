"""Small frames for those who follow a job: JPEG in data URLs, from the events that bring frames."""

import base64
import io

from sv3d_fast.events import Event, StageFinished, StageResumed

STAGE, COUNT, SIDE = "orbit", 4, 96  # the stage whose value is an orbit; pictures, pixels


def thumbnails(event: Event) -> list[str]:
    """COUNT frames in equal steps around an orbit that is done; nothing for other events."""
    if not isinstance(event, StageFinished | StageResumed) or event.stage != STAGE:
        return []
    from PIL import Image

    frames, urls = event.value.frames, []
    for index in range(COUNT):
        frame = frames[index * len(frames) // COUNT]
        picture = Image.fromarray(getattr(frame, "numpy", lambda frame=frame: frame)())
        picture.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
        urls.append("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
    return urls
