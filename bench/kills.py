"""A batch killed at random moments of its life: what is lost, half-written or done twice.

python -m bench.kills [--kills 50] [--life 25] [--seed 0]
"""

import argparse
import collections
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import av
from PIL import Image, ImageOps

from sv3d_fast.batch import PAGE, RESULTS, read_results
from sv3d_fast.batch_picture import DONE
from sv3d_fast.scene.export import load_mesh, load_splats

from .results import record

ISSUE = "production"
EXAMPLES = Path(__file__).parent.parent / "examples"
SMALLEST = {"device": "cpu", "steps": 1, "frame-size": 64, "mc-resolution": 16, "target-faces": 100}
SMALLEST |= {"texture-resolution": 64}
SIDE = 96  # of the pictures, pixels


def make_pictures(folder: Path) -> Path:
    """The examples, small, and their mirror images."""
    folder.mkdir()
    for path in sorted(EXAMPLES.glob("*.png")):
        with Image.open(path) as image:
            small = image.convert("RGBA").resize((SIDE, SIDE))
        small.save(folder / path.name)
        ImageOps.mirror(small).save(folder / f"{path.stem}_mirrored.png")
    return folder


class Trial:
    """One batch into one folder, through as many processes as it takes, and what must stay true of it."""

    def __init__(self, pictures: Path, folder: Path):
        self.pictures, self.folder = pictures, folder
        self.finished: dict[str, str] = {}  # picture -> digest of its folder when it was first seen done

    def start(self) -> subprocess.Popen:
        """The batch as a process group of its own."""
        options = [f"--{name}={value}" for name, value in SMALLEST.items()]
        command = ["batch", str(self.pictures), "-o", str(self.folder), "--quiet", *options]
        return subprocess.Popen(
            [sys.executable, "-m", "sv3d_fast.cli", *command], start_new_session=True, stderr=subprocess.DEVNULL
        )

    def problems(self) -> Iterator[str]:
        """What is wrong now: results lost or changed, done twice, and files that don't load."""
        if not self.folder.exists():
            return
        done = {name for name, row in read_results(self.folder / RESULTS).items() if row["state"] == DONE}
        for name in sorted(self.finished.keys() | done):
            now = digest(self.folder / name)
            if name not in done:
                yield f"{name}: its line was lost"
            elif self.finished.setdefault(name, now) != now:
                yield f"{name}: finished, and changed afterwards"
        yield from (f"{name}: done {n} times" for name, n in self._lines().items() if n > 1)
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(self.folder).parts):
                try:
                    load(path)
                except Exception as error:
                    yield f"{path.relative_to(self.folder)}: {type(error).__name__}: {error}"

    def end_problems(self) -> Iterator[str]:
        """What is wrong after the batch ended by itself."""
        yield from self.problems()
        expected = {path.stem for path in self.pictures.iterdir()}
        if self.finished.keys() != expected or self._lines().keys() != expected:
            yield f"expected {len(expected)} pictures done, got {len(self.finished)}"
        if not (self.folder / PAGE).is_file():
            yield f"{PAGE} is missing"

    def _lines(self) -> collections.Counter:
        """How many whole lines the record has of each name."""
        path = self.folder / RESULTS
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return collections.Counter(json.loads(line)["name"] for line in lines if line.endswith(b"}"))


def digest(folder: Path) -> str:
    """Of the names and contents of all files."""
    told = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        told.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return told.hexdigest()


def load(path: Path) -> None:
    """Reads a whole file of a kind that the batch writes; raises whatever its reader does, KeyError for others."""
    readers = {
        ".png": _load_picture, ".gif": _load_picture, ".mp4": _load_video, ".glb": load_mesh, ".ply": load_splats,
        ".json": _load_json, ".jsonl": read_results, ".html": _load_html, ".obj": _load_lines, ".mtl": _load_lines,
        ".txt": _load_lines,
    }  # fmt: skip
    readers[path.suffix](path)


def _load_picture(path: Path) -> None:
    with Image.open(path) as image:
        for frame in range(getattr(image, "n_frames", 1)):
            image.seek(frame)
            image.load()


def _load_video(path: Path) -> None:
    with av.open(str(path)) as container:
        promised, frames = container.streams.video[0].frames, sum(1 for _ in container.decode(video=0))
    if frames != promised or frames == 0:
        raise ValueError(f"expected {promised} frames, got {frames}")


def _load_json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


def _load_html(path: Path) -> None:
    if not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        raise ValueError("no end of the page")


def _load_lines(path: Path) -> None:
    if not path.read_text(encoding="utf-8").endswith("\n"):
        raise ValueError("cut within a line")


def survived(kills: int, life: float, seed: int, scratch: Path) -> int:
    """Kills batches after up to `life` seconds, starting each anew where it ended; returns how many did no harm."""
    moments, good, batches = random.Random(seed), 0, 0
    pictures = make_pictures(scratch / "pictures")
    trial, count = Trial(pictures, scratch / "0"), 0
    while True:
        process = trial.start()
        try:
            # after the last kill the batch may end in peace
            status = process.wait(timeout=moments.uniform(0, life) if count < kills else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            found = list(trial.problems())
            count, good = count + 1, good + (not found)
            print(f"kill {count}: {len(trial.finished)} finished", *found, sep="\n  ", flush=True)
            continue
        found = [f"exit status {status}"] if status else []
        found += trial.end_problems()
        batches += 1
        print(f"batch {batches} ended", *found, sep="\n  ", flush=True)
        if found:
            raise RuntimeError(f"batch {batches} ended wrong: {'; '.join(found)}")
        if count == kills:
            return good
        trial = Trial(pictures, scratch / str(batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--life", type=float, default=25, help="seconds that a process may live at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        good = survived(args.kills, args.life, args.seed, Path(scratch))
    record(ISSUE, f"kills of a batch survived, of {args.kills}", good, "kills", f">= {args.kills}")


if __name__ == "__main__":
    main()
