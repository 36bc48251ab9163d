"""Fits several objects at once: on a GPU each on a stream of its own, so that one's work fills the other's waits.

Each step of a fit waits once for the number of tiles that the rasteriser is to draw. With one object the GPU idles
while that number travels and the next launches follow; with two, the other's queue keeps it busy.
"""

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import nullcontext

import torch

from sv3d_fast import events
from sv3d_fast.video import OrbitVideo

from .fit import fitting
from .fit_step import side_stream
from .splats import Splats


def fitting_batch(
    videos: Sequence[OrbitVideo], *, device: torch.device | str | None = None, **options
) -> Generator[tuple[int, events.Event], None, list[Splats]]:
    """`fitting` of every video, a step of each in turn: yields (index of the video, its event), returns their splats.

    device, options: as for `fitting`, for all videos; each fit's result is what it is alone. Errors are those of
    `fitting`, with the index of the video in front, and end the others' fits too.
    """
    place = torch.device(device) if device is not None else None
    streams = [_stream(place or video.frames.device, index) for index, video in enumerate(videos)]
    made: dict[int, Splats] = {}
    waiting = deque((index, fitting(video, device=place, **options)) for index, video in enumerate(videos))
    while waiting:
        index, fit = waiting.popleft()
        stream = streams[index]
        try:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                event = next(fit)
        except StopIteration as end:
            made[index] = end.value
            if stream is not None:
                torch.cuda.current_stream(stream.device).wait_stream(stream)
                for tensor in vars(end.value).values():
                    tensor.record_stream(torch.cuda.current_stream(stream.device))
        except ValueError as error:
            raise ValueError(f"video {index}: {error}") from error
        else:
            waiting.append((index, fit))
            yield index, event
    return [made[index] for index in range(len(videos))]


def fit_batch(videos: Sequence[OrbitVideo], **options) -> list[Splats]:
    """Splats fitted to each video: `fitting_batch` without its events; the same options and errors."""
    return events.finish(fitting_batch(videos, **options))


def _stream(device: torch.device, index: int) -> torch.cuda.Stream | None:
    """A stream that begins where the current one is; None on a CPU."""
    if device.type != "cuda":
        return None
    stream = side_stream(device, index + 1)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
