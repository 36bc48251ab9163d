"""Recipes of generated furniture. Each takes a random generator and a Builder; +x is the front, z up, size is free.

Slots: 0 the body, 1 its cover or second part, 2 fittings, 3 details.
"""

import math

import numpy as np

from .primitives import Builder, rotation

Random = np.random.Generator


def legs(rng: Random, b: Builder, x: float, y: float, height: float, slot: int = 2, splay: float = 0.0) -> None:
    """Four legs at the corners (+-x, +-y), from the ground up to `height`, square, round or tapered."""
    thick, kind = rng.uniform(0.02, 0.06), rng.integers(3)
    for sx in (-1, 1):
        for sy in (-1, 1):
            turn = rotation(pitch=-splay * sx, roll=splay * sy)
            at = (sx * (x + splay * height / 150), sy * (y + splay * height / 150), height / 2)
            if kind == 0:
                b.box((2 * thick, 2 * thick, height), at, slot, turn)
            else:
                b.cylinder(thick * (0.6 if kind == 1 else 1), height, at, slot, thick * 1.1, turn=turn, sides=10)


def slab(rng: Random, b: Builder, size, at, slot: int, edge: float = 0.0) -> None:
    """A box, or a round or oval disc of the same size."""
    if rng.random() < 0.65:
        b.box(size, at, slot, edge=edge)
        return
    x, y, h = size[0] / 2, size[1] / 2, size[2] / 2
    b.lathe([(0, -h), (0.97, -h), (1, 0), (0.97, h), (0, h)], at, slot, sides=32, squash=(x, y))


def chair(rng: Random, b: Builder) -> None:
    w, d, h = rng.uniform(0.4, 0.55), rng.uniform(0.4, 0.55), rng.uniform(0.4, 0.55)
    back, thick = rng.uniform(0.35, 0.75), rng.uniform(0.03, 0.1)
    b.box((d, w, thick), (0, 0, h), 1, edge=rng.choice([0, 0.4, 0.9]) * thick / 2)
    if rng.random() < 0.25:
        office_base(rng, b, h)
    else:
        legs(rng, b, d / 2 - 0.05, w / 2 - 0.05, h, 2, rng.choice([0, 4, 8]))
    tilt, top = rng.uniform(0, 14), rotation()
    top = rotation(pitch=-tilt)
    centre = np.array([-d / 2 + 0.02, 0, h]) + top @ np.array([0, 0, back / 2])
    style = rng.integers(3)
    if style == 0:
        b.box((thick * 0.8, w, back), centre, 1, top, edge=rng.choice([0, 0.3]) * thick)
    else:
        count = int(rng.integers(2, 6))
        for y in (-1, 1):
            b.box((0.035, 0.035, back), np.add(centre, [0, y * (w / 2 - 0.02), 0]), 0, top)
        for i in range(count):
            if style == 1:
                b.box((0.025, w, 0.5 * back / count), centre + top @ [0, 0, back * ((i + 0.6) / count - 0.5)], 0, top)
            else:
                b.box((0.025, 0.025, back), np.add(centre, [0, w * ((i + 0.5) / count - 0.5), 0]), 0, top)
        if style == 2:
            b.box((0.045, w, 0.07), centre + top @ [0, 0, back / 2], 0, top)
    if rng.random() < 0.35:
        for y in (-1, 1):
            b.box((0.85 * d, 0.05, 0.035), (0, y * w / 2, h + 0.2), 0)
            b.box((0.04, 0.04, 0.2), (0.35 * d, y * w / 2, h + 0.1), 2)


def office_base(rng: Random, b: Builder, height: float) -> None:
    """A column on a star of feet with castors."""
    b.cylinder(0.03, height - 0.05, (0, 0, height / 2 + 0.02), 2)
    for i in range(5):
        turn = rotation(yaw=72 * i + 10)
        b.box((0.28, 0.045, 0.03), turn @ [0.14, 0, 0.07], 2, turn)
        b.ball((0.03, 0.02, 0.03), turn @ [0.28, 0, 0.03], 3, turn)


def stool(rng: Random, b: Builder) -> None:
    r, h = rng.uniform(0.15, 0.25), rng.uniform(0.3, 0.8)
    b.cylinder(r, rng.uniform(0.03, 0.1), (0, 0, h), 1, r * rng.uniform(0.85, 1))
    if rng.random() < 0.3:
        b.cylinder(0.03, h, (0, 0, h / 2), 2)
        b.cylinder(r, 0.03, (0, 0, 0.015), 2)
    else:
        legs(rng, b, r * 0.6, r * 0.6, h, 2, rng.uniform(0, 9))
        if rng.random() < 0.5:
            b.torus(r * 0.95, 0.012, (0, 0, h * 0.35), 2)


def table(rng: Random, b: Builder) -> None:
    x, y, h = rng.uniform(0.4, 0.9), rng.uniform(0.5, 1.6), rng.uniform(0.35, 0.8)
    slab(rng, b, (x, y, rng.uniform(0.02, 0.07)), (0, 0, h), 0)
    if rng.random() < 0.25:
        b.cylinder(0.05, h, (0, 0, h / 2), 2)
        b.cylinder(0.3 * x, 0.04, (0, 0, 0.02), 2)
    else:
        legs(rng, b, 0.38 * x, 0.38 * y, h, 2, rng.choice([0, 0, 5]))
    if rng.random() < 0.35:
        b.box((0.7 * x, 0.7 * y, 0.02), (0, 0, h * 0.3), 1)
    for _ in range(int(rng.integers(0, 4))):
        at = (rng.uniform(-0.3, 0.3) * x, rng.uniform(-0.35, 0.35) * y, h + 0.02)
        if rng.random() < 0.5:
            b.lathe([(0, 0), (0.05, 0), (0.07, 0.1), (0.03, 0.16), (0.04, 0.2)], at, 3, sides=16)
        else:
            b.box((0.15, 0.2, 0.06), (at[0], at[1], h + 0.05), 3, rotation(yaw=rng.uniform(0, 90)))


def desk(rng: Random, b: Builder) -> None:
    x, y, h = rng.uniform(0.5, 0.7), rng.uniform(1.0, 1.5), 0.75
    b.box((x, y, 0.04), (0, 0, h), 0)
    side = rng.choice([-1, 1])
    w = rng.uniform(0.3, 0.45)
    b.box((0.95 * x, w, h - 0.03), (0, side * (y / 2 - w / 2), h / 2 - 0.01), 1)
    drawers(rng, b, x / 2 * 0.95, side * (y / 2 - w / 2), w, 0.05, h - 0.05, int(rng.integers(2, 5)))
    b.box((0.95 * x, 0.04, h), (0, -side * (y / 2 - 0.03), h / 2), 1)
    if rng.random() < 0.6:
        monitor(rng, b, (-0.1, -side * 0.2, h + 0.02), 0.6)


def drawers(rng: Random, b: Builder, x: float, y: float, width: float, low: float, high: float, count: int) -> None:
    """A column of drawer fronts with handles on the plane x."""
    step, bar = (high - low) / count, rng.random() < 0.5
    for i in range(count):
        z = low + (i + 0.5) * step
        b.box((0.02, 0.92 * width, 0.88 * step), (x + 0.01, y, z), 0)
        if bar:
            b.box((0.02, 0.35 * width, 0.02), (x + 0.035, y, z + 0.2 * step), 2)
        else:
            b.ball((0.02, 0.02, 0.02), (x + 0.035, y, z), 2)


def cabinet(rng: Random, b: Builder) -> None:
    x, y, h = rng.uniform(0.3, 0.6), rng.uniform(0.4, 1.6), rng.uniform(0.4, 1.9)
    foot = rng.choice([0, 0.06, 0.15])
    b.box((x, y, h), (0, 0, foot + h / 2), 0 if rng.random() < 0.5 else 1)
    b.box((x + 0.04, y + 0.04, 0.03), (0, 0, foot + h), 0)
    if foot:
        legs(rng, b, x / 2 - 0.05, y / 2 - 0.05, foot)
    columns = max(1, round(y / 0.5))
    for c in range(columns):
        at = y * ((c + 0.5) / columns - 0.5)
        if rng.random() < 0.5:
            drawers(rng, b, x / 2, at, y / columns, foot + 0.03, foot + h - 0.03, int(rng.integers(2, 6)))
        else:
            b.box((0.02, 0.94 * y / columns, h - 0.06), (x / 2 + 0.01, at, foot + h / 2), 0)
            b.cylinder(
                0.012, 0.15, (x / 2 + 0.04, at + 0.3 * y / columns * rng.choice([-1, 1]), foot + h / 2), 2, sides=8
            )


def shelf(rng: Random, b: Builder) -> None:
    x, y, h, t = rng.uniform(0.22, 0.4), rng.uniform(0.5, 1.3), rng.uniform(0.6, 2.0), 0.03
    for side in (-1, 1):
        b.box((x, t, h), (0, side * y / 2, h / 2), 0)
    levels = int(rng.integers(3, 7))
    for i in range(levels):
        b.box((x, y, t), (0, 0, h * i / (levels - 1) * 0.97 + t / 2), 0)
    if rng.random() < 0.7:
        b.box((0.01, y, h), (-x / 2, 0, h / 2), 1)
    step = h / (levels - 1)
    for i in range(levels - 1):
        at, end = -y / 2 + 0.05, y / 2 - rng.uniform(0.05, y / 2)
        while at < end:
            w, tall = rng.uniform(0.025, 0.07), rng.uniform(0.5, 0.9) * step
            slot = int(rng.integers(1, 4))
            b.box((0.7 * x, w, tall), (0.05 * x, at + w / 2, i * step * 0.97 + t + tall / 2), slot)
            at += w + (rng.uniform(0.05, 0.2) if rng.random() < 0.1 else 0.004)


def sofa(rng: Random, b: Builder) -> None:
    seats, d, h = int(rng.integers(1, 4)), rng.uniform(0.75, 0.95), rng.uniform(0.35, 0.45)
    w, arm, edge = 0.6 * seats, rng.uniform(0.1, 0.25), rng.uniform(0.02, 0.08)
    b.box((d, w + 2 * arm, h - 0.12), (0, 0, h / 2), 0, edge=edge)
    for side in (-1, 1):
        b.box((d, arm, h + rng.uniform(0.1, 0.2)), (0, side * (w + arm) / 2, h / 2 + 0.12), 0, edge=edge)
    b.box((0.2, w + 2 * arm, 0.85), (-d / 2 + 0.1, 0, 0.5), 0, rotation(pitch=-rng.uniform(0, 8)), edge=edge)
    for i in range(seats):
        y = (i - (seats - 1) / 2) * 0.6
        b.box((d - 0.22, 0.58, 0.15), (0.1, y, h + 0.03), 1, edge=0.06)
        b.box((0.16, 0.56, 0.42), (-d / 2 + 0.26, y, h + 0.28), 1, rotation(pitch=-10), edge=0.07)
    if rng.random() < 0.5:
        b.box((0.12, 0.38, 0.36), (0.0, rng.choice([-1, 1]) * (w / 2 - 0.2), h + 0.27), 3, rotation(0, -25), edge=0.06)
    legs(rng, b, d / 2 - 0.08, w / 2, 0.14)


def bed(rng: Random, b: Builder) -> None:
    w, d, h = rng.uniform(0.9, 1.9), rng.uniform(1.9, 2.1), rng.uniform(0.25, 0.4)
    b.box((d, w, h * 0.5), (0, 0, h * 0.6), 0)
    b.box((d - 0.04, w - 0.04, 0.22), (0, 0, h + 0.05), 1, edge=0.06)
    b.box((0.68 * d, w + 0.02, 0.2), (0.17 * d, 0, h + 0.09), 3, edge=0.07)
    b.box((0.07, w + 0.06, rng.uniform(0.7, 1.2)), (-d / 2, 0, 0.5), 0, edge=rng.choice([0, 0.03]))
    if rng.random() < 0.4:
        b.box((0.06, w + 0.06, 0.6), (d / 2, 0, 0.3), 0)
    for y in (-0.25, 0.25) if w > 1.2 else (0,):
        b.box((0.35, 0.38 * min(w, 1.6), 0.14), (-d / 2 + 0.3, y * w, h + 0.23), 2, rotation(0, -12), edge=0.06)
    legs(rng, b, d / 2 - 0.08, w / 2 - 0.08, h * 0.5)


def lamp(rng: Random, b: Builder) -> None:
    tall = rng.random() < 0.5
    h, r = (
        (rng.uniform(1.1, 1.7), rng.uniform(0.15, 0.28)) if tall else (rng.uniform(0.25, 0.5), rng.uniform(0.12, 0.22))
    )
    b.cylinder(rng.uniform(0.6, 0.9) * r, 0.03, (0, 0, 0.015), 2)
    if tall or rng.random() < 0.4:
        b.cylinder(0.015, h, (0, 0, h / 2), 2, sides=10)
    else:
        t = np.linspace(0, 1, 12)
        bulge = r * (0.15 + rng.uniform(0.2, 0.5) * np.sin(math.pi * t) ** rng.uniform(0.5, 2))
        b.lathe(np.stack([bulge, t * h], 1), (0, 0, 0), 0)
    top = r * rng.uniform(0.4, 1)
    if rng.random() < 0.8:
        tall_shade = r * rng.uniform(0.9, 1.6)
        b.lathe([(r, 0), (top, tall_shade), (top * 0.97, tall_shade), (r * 0.97, 0)], (0, 0, h - 0.02), 1, sides=28)
        b.ball((0.05, 0.05, 0.07), (0, 0, h + 0.06), 3)
    else:
        b.ball((r, r, r), (0, 0, h + r * 0.8), 1)


def monitor(rng: Random, b: Builder, at=(0.0, 0.0, 0.0), scale: float = 1.0) -> None:
    at, w, h = np.asarray(at, float), scale * rng.uniform(0.6, 1.0), scale * rng.uniform(0.4, 0.55)
    b.box((0.05 * scale, w, h), np.add(at, [0, 0, 0.15 * scale + h / 2]), 2, edge=0.01 * scale)
    b.box((0.01 * scale, 0.92 * w, 0.88 * h), np.add(at, [0.025 * scale, 0, 0.15 * scale + h / 2]), 3)
    b.box((0.03 * scale, 0.07 * scale, 0.25 * scale), np.add(at, [-0.03 * scale, 0, 0.12 * scale]), 2)
    b.box((0.22 * scale, 0.3 * scale, 0.02 * scale), np.add(at, [0, 0, 0.01 * scale]), 2)


def clock(rng: Random, b: Builder) -> None:
    if rng.random() < 0.5:
        b.cylinder(0.5, 0.15, (0, 0, 0.5), 0, axis="x", sides=32)
        b.cylinder(0.44, 0.02, (0.08, 0, 0.5), 1, axis="x", sides=32)
        for y in (-0.3, 0.3):
            b.cylinder(0.04, 0.15, (0, y, 0.03), 2)
            b.ball((0.13, 0.13, 0.1), (0, y, 1.0), 3)
    else:
        b.box((0.2, 0.9, 1.1), (0, 0, 0.55), 0, edge=0.05)
        b.cylinder(0.36, 0.02, (0.11, 0, 0.6), 1, axis="x", sides=32)
    for angle, length in ((rng.uniform(0, 360), 0.25), (rng.uniform(0, 360), 0.36)):
        turn = rotation(roll=angle)
        b.box((0.02, 0.03, length), np.array([0.13, 0, 0.53]) + turn @ [0, 0, length / 2], 2, turn)


FURNITURE = {f.__name__: f for f in (chair, stool, table, desk, cabinet, shelf, sofa, bed, lamp, monitor, clock)}
