"""Recipes of generated household things: vessels, packages, clothes.

Each takes a random generator and a Builder; +x is the front, z up, size is free. Slots: 0 the body, 1 its second
part, 2 fittings, 3 details.
"""

import math

import numpy as np

from .primitives import Builder, rotation, smooth

Random = np.random.Generator


def _hollow(b: Builder, outside: np.ndarray, wall: float, at=(0, 0, 0), slot: int = 0, inside: int = 1) -> None:
    """A vessel open at the top: `outside` profile from the axis up to the rim, and an inner wall."""
    inner = outside[::-1].copy()
    inner[:, 0] = np.maximum(inner[:, 0] - wall, 0)
    inner[:, 1] = np.maximum(inner[:, 1], outside[0, 1] + wall)
    b.lathe(outside, at, slot, sides=28)
    b.lathe(np.concatenate([outside[-1:], inner]), at, inside, sides=28)


def mug(rng: Random, b: Builder) -> None:
    r, h = rng.uniform(0.3, 0.45), rng.uniform(0.6, 1.0)
    low = r * rng.uniform(0.7, 1.05)
    side = smooth([(low, 0), (rng.uniform(0.9, 1.15) * (low + r) / 2, h / 2), (r, h)], 10)
    _hollow(b, np.concatenate([[(0, 0)], side]), 0.04, slot=0, inside=1)
    b.cylinder(r * 0.85, 0.01, (0, 0, h * rng.uniform(0.5, 0.9)), 3)
    yaw, reach = rng.uniform(-180, 180) if rng.random() < 0.5 else 90.0, rng.uniform(0.2, 0.35)
    path = smooth([(r * 0.9, 0, 0.8 * h), (r + reach, 0, 0.75 * h), (r + reach, 0, 0.35 * h), (low * 0.9, 0, 0.2 * h)])
    b.tube(path, rng.uniform(0.03, 0.06), int(rng.integers(0, 3)), turn=rotation(yaw=yaw))


def bottle(rng: Random, b: Builder) -> None:
    r, h, neck = rng.uniform(0.15, 0.3), rng.uniform(0.6, 0.9), rng.uniform(0.04, 0.1)
    shoulder = rng.uniform(0.08, 0.35)
    body = smooth([(r, 0.0), (r * rng.uniform(0.85, 1.05), h / 2), (r, h)], 8)
    top = smooth(
        [(r, h), (0.7 * r + 0.3 * neck, h + shoulder * 0.5), (neck, h + shoulder), (neck, h + shoulder + 0.15)], 10
    )
    b.lathe(np.concatenate([[(0, 0)], body, top[1:], [(0, top[-1, 1])]]), slot=0, sides=28)
    b.cylinder(neck * 1.15, 0.08, (0, 0, h + shoulder + 0.15), 2)
    if rng.random() < 0.8:
        z = rng.uniform(0.35, 0.55) * h
        b.lathe([(r * 1.01, z - 0.2 * h), (r * 1.01, z + 0.2 * h)], slot=3, sides=28)


def vase(rng: Random, b: Builder) -> None:
    points = [(rng.uniform(0.12, 0.45), i / 4) for i in range(5)]
    _hollow(b, np.concatenate([[(0, 0)], smooth(points, 20)]), 0.03)
    if rng.random() < 0.4:
        for side in (-1, 1):
            r0, r1 = points[1][0], points[3][0]
            out = max(r0, points[2][0], r1) + 0.2
            b.tube(smooth([(0, side * r0, 0.27), (0, side * out, 0.5), (0, side * r1, 0.74)], 14), 0.03, 2)
    if rng.random() < 0.4:
        _stems(rng, b, 1.0, points[-1][0] * 0.6)


def _stems(rng: Random, b: Builder, z: float, spread: float) -> None:
    for i in range(int(rng.integers(3, 9))):
        turn = rotation(yaw=rng.uniform(0, 360))
        out, h = rng.uniform(0.1, 0.5), rng.uniform(0.3, 0.8)
        path = smooth([(0, 0, z - 0.5), (spread * 0.5, 0, z), (out, 0, z + h)], 8)
        b.tube(path, 0.015, 2, turn=turn, sides=6)
        size = rng.uniform(0.06, 0.14)
        b.ball((size, size, size * rng.uniform(0.4, 1.2)), turn @ path[-1], 3 if i % 2 else 1, rings=6)


def bowl(rng: Random, b: Builder) -> None:
    h, r = rng.uniform(0.25, 0.5), rng.uniform(0.5, 0.7)
    _hollow(b, np.concatenate([[(0, 0)], smooth([(0.2, 0), (0.7 * r, 0.3 * h), (r, h)], 12)]), 0.03)
    for _ in range(int(rng.integers(0, 8))):
        a, s = rng.uniform(0, 2 * math.pi), rng.uniform(0.1, 0.18)
        d = rng.uniform(0, r - 0.25)
        b.ball(
            (s, s, s * rng.uniform(0.8, 1.1)),
            (d * math.cos(a), d * math.sin(a), h * 0.7 + s * 0.5),
            int(rng.integers(2, 4)),
        )


def teapot(rng: Random, b: Builder) -> None:
    h = rng.uniform(0.5, 0.8)
    t = np.linspace(-1.35, 1.2, 16)
    b.lathe(
        np.concatenate([[(0, -h / 2)], np.stack([0.5 * np.cos(t), h / 2 * np.sin(t) / math.sin(1.35)], 1)]),
        slot=0,
        sides=28,
    )
    b.ball((0.26, 0.26, 0.1), (0, 0, 0.42 * h), 1, start=0)
    b.ball((0.06, 0.06, 0.06), (0, 0, 0.42 * h + 0.13), 2)
    spout = smooth([(0, 0.35, -0.1 * h), (0, 0.6, 0), (0, 0.75, 0.45 * h)], 12)
    b.tube(spout, np.linspace(0.13, 0.05, 12), 0)
    b.tube(smooth([(0, -0.42, 0.3 * h), (0, -0.8, 0.3 * h), (0, -0.8, -0.2 * h), (0, -0.42, -0.25 * h)]), 0.045, 2)


def barrel(rng: Random, b: Builder) -> None:
    r, bulge = rng.uniform(0.28, 0.38), rng.uniform(0.02, 0.14)
    z = np.linspace(0, 1, 12)
    profile = np.stack([r + bulge * np.sin(math.pi * z), z], 1)
    b.lathe(np.concatenate([[(0, 0.03), (r * 0.93, 0.03)], profile, [(r * 0.93, 0.97), (0, 0.97)]]), slot=0, sides=28)
    for at in (0.08, 0.3, 0.7, 0.92):
        radius = r + bulge * math.sin(math.pi * at) + 0.008
        b.lathe([(radius, at - 0.03), (radius, at + 0.03)], slot=2, sides=28)


def carton(rng: Random, b: Builder) -> None:
    x, y, z = rng.uniform(0.3, 1, 3)
    b.box((x, y, z), (0, 0, z / 2), 3 if rng.random() < 0.5 else 0, edge=rng.choice([0, 0.03]))
    kind = rng.integers(4)
    if kind == 0:
        b.box((x * 1.01, 0.12, z * 1.01), (0, 0, z / 2), 1)
        b.box((0.12, y * 1.01, z * 1.01), (0, 0, z / 2), 1)
        for yaw in (30, 150, 250):
            b.torus(0.1, 0.025, (0, 0, z + 0.08), 1, rotation(yaw=yaw, pitch=70))
    elif kind == 1:
        b.extrude([(-x / 2, 0), (x / 2, 0), (0, x * 0.4)], y, (0, 0, z), 1)
        b.box((0.03, y, 0.12), (0, 0, z + 0.4 * x), 2)
    elif kind == 2:
        b.box((x * 1.08, y * 1.08, 0.15 * z), (0, 0, z), 1)
    else:
        for i in range(int(rng.integers(2, 5))):
            b.box((x * 1.03, y * 1.03, 0.04), (0, 0, z * (i + 0.5) / 4), 2)


def camera(rng: Random, b: Builder) -> None:
    w, h, d = rng.uniform(0.9, 1.2), rng.uniform(0.55, 0.75), rng.uniform(0.3, 0.45)
    b.box((d, w, h), (0, 0, h / 2), 0, edge=0.06)
    b.box((d * 1.02, w * 1.01, h * 0.3), (0, 0, h * 0.85), 1, edge=0.05)
    y, r = rng.uniform(-0.15, 0.15), rng.uniform(0.2, 0.27)
    for i, length in enumerate((0.2, 0.3, 0.38)):
        b.cylinder(r * (1 - 0.12 * i), length, (d / 2 + length / 2 - 0.05, y, h * 0.45), 2 - i % 2, axis="x", sides=28)
    b.cylinder(r * 0.6, 0.01, (d / 2 + 0.335, y, h * 0.45), 3, axis="x", sides=28)
    b.box((d * 0.6, 0.3, 0.14), (0, y, h + 0.07), 2, edge=0.04)
    b.cylinder(0.06, 0.08, (0, -w * 0.35, h + 0.03), 3)


def cake(rng: Random, b: Builder) -> None:
    z, r = 0.0, rng.uniform(0.45, 0.6)
    b.cylinder(r * 1.25, 0.04, (0, 0, -0.02), 2, sides=28)
    for i in range(int(rng.integers(1, 4))):
        h = rng.uniform(0.18, 0.35)
        b.lathe([(0, z), (r, z), (r, z + h * 0.85), (r * 0.95, z + h), (0, z + h)], slot=i % 2, sides=28)
        count = int(rng.integers(8, 16))
        for k in range(count):
            a = 2 * math.pi * k / count
            b.ball((0.045, 0.045, 0.045), (r * 0.9 * math.cos(a), r * 0.9 * math.sin(a), z + h), 3, rings=5)
        z, r = z + h, r * rng.uniform(0.55, 0.8)


def hat(rng: Random, b: Builder) -> None:
    r, h = rng.uniform(0.35, 0.45), rng.uniform(0.25, 0.6)
    brim = r * rng.uniform(1.3, 2.2)
    dome = smooth(
        [(brim, rng.uniform(-0.05, 0.12)), (r * 1.05, 0), (r, h * 0.5), (r * rng.uniform(0.5, 0.9), h), (0, h)], 22
    )
    b.lathe(dome, slot=0, sides=32)
    b.lathe([(r * 1.06, 0.03), (r * 1.04, 0.15)], slot=1, sides=32)


def shoe(rng: Random, b: Builder) -> None:
    n, w = rng.uniform(0.9, 1.2), rng.uniform(0.32, 0.42)
    t = np.linspace(0, 2 * math.pi, 28, endpoint=False)
    sole = np.stack([n / 2 * np.cos(t), w / 2 * np.sin(t) * (1 + 0.2 * np.cos(t))], 1)
    b.extrude(sole * [1, -1], 0.1, (0, 0, 0.05), 2, rotation(roll=90))
    b.ball((n * 0.3, w * 0.52, 0.24), (n * 0.2, 0, 0.1), 0, start=0)
    b.ball((n * 0.3, w * 0.45, rng.uniform(0.35, 0.7)), (-n * 0.2, 0, 0.1), 1, start=0)
    for i in range(4):
        b.box((0.03, w * 0.5, 0.03), (n * (0.02 + 0.06 * i), 0, 0.37 - 0.03 * i), 3, rotation(yaw=15 * (-1) ** i))


def bag(rng: Random, b: Builder) -> None:
    w, d, h = rng.uniform(0.6, 0.9), rng.uniform(0.25, 0.45), rng.uniform(0.5, 1.0)
    b.box((d, w, h), (0, 0, h / 2), 0, edge=0.12)
    b.box((d * 0.5, w * 0.7, h * 0.4), (d * 0.4, 0, h * 0.35), 1, edge=0.06)
    top = smooth([(0, -w * 0.28, h - 0.03), (0, -w * 0.2, h + 0.2), (0, w * 0.2, h + 0.2), (0, w * 0.28, h - 0.03)])
    b.tube(top, 0.03, 2)
    b.ball((0.04, 0.06, 0.05), (d / 2, 0, h * 0.8), 3)


HOUSEHOLD = {f.__name__: f for f in (mug, bottle, vase, bowl, teapot, barrel, carton, camera, cake, hat, shoe, bag)}
