"""Recipes of generated vehicles, buildings, plants, creatures and free forms.

Each takes a random generator and a Builder; +x is the front, z up, size is free. Slots: 0 the body, 1 its second
part, 2 fittings, 3 details.
"""

import math

import numpy as np

from .primitives import Builder, rotation, smooth

Random = np.random.Generator


def wheels(b: Builder, x, y: float, r: float, width: float) -> None:
    """Pairs of wheels at each of the places `x`."""
    for at in x:
        for side in (-1, 1):
            b.cylinder(r, width, (at, side * y, r), 2, axis="y", sides=20)
            b.cylinder(0.55 * r, width * 1.15, (at, side * y, r), 3, axis="y", sides=14)


def car(rng: Random, b: Builder) -> None:
    n, w, r = rng.uniform(1.5, 2.2), rng.uniform(0.75, 1.0), rng.uniform(0.16, 0.24)
    h = rng.uniform(0.3, 0.45)
    nose, roof, tail = rng.uniform(0.5, 1.0), rng.uniform(0.3, 0.5), rng.uniform(0.0, 0.35)
    z = r * 0.7
    hull = [(-n / 2, z), (n / 2, z), (n / 2, z + h * nose), (n * 0.18, z + h), (-n / 2, z + h)]
    b.extrude(hull, w, slot=0)
    cabin = [(-n * (0.48 - tail), 0), (n * 0.2, 0), (n * 0.05, roof), (-n * (0.42 - tail), roof)]
    b.extrude(cabin, w * 0.86, (0, 0, z + h), 1)
    b.extrude([(p[0] * 0.9, p[1] * 1.04) for p in cabin], w * 0.6, (0, 0, z + h), 0)
    wheels(b, (-0.3 * n, 0.3 * n), w / 2 - 0.02, r, 0.14)
    for side in (-1, 1):
        b.ball((0.04, 0.09, 0.07), (n / 2, side * w * 0.34, z + h * nose * 0.7), 3)
        b.box((0.03, 0.16, 0.08), (-n / 2, side * w * 0.34, z + h * 0.7), 3)
    b.box((0.06, w * 0.95, 0.1), (n / 2, 0, z + 0.05), 2)


def truck(rng: Random, b: Builder) -> None:
    n, w, r = rng.uniform(1.6, 2.6), rng.uniform(0.7, 0.9), 0.2
    cab, tall = rng.uniform(0.45, 0.6), rng.uniform(0.6, 1.0)
    b.box((n, w * 0.8, 0.12), (0, 0, r + 0.08), 2)
    b.box((cab, w, 0.65), (n / 2 - cab / 2, 0, r + 0.42), 0, edge=0.05)
    b.box((0.02, 0.85 * w, 0.25), (n / 2 + 0.005, 0, r + 0.58), 3)
    kind, length = rng.integers(3), n - cab - 0.08
    x = -n / 2 + length / 2
    if kind == 0:
        b.box((length, w * 1.05, tall), (x, 0, r + 0.14 + tall / 2), 1)
    elif kind == 1:
        b.cylinder(w * 0.48, length, (x, 0, r + 0.14 + w * 0.48), 1, axis="x", sides=28)
    else:
        for side in (-1, 1):
            b.box((length, 0.04, 0.3), (x, side * w / 2, r + 0.3), 1)
            b.box((0.04, w, 0.3), (x + side * length / 2, 0, r + 0.3), 1)
        b.ball((length * 0.42, w * 0.42, 0.3), (x, 0, r + 0.2), 3)
    wheels(b, (-0.36 * n, -0.12 * n, 0.34 * n), w / 2 - 0.05, r, 0.14)


def boat(rng: Random, b: Builder) -> None:
    n, w, h = rng.uniform(1.4, 2.0), rng.uniform(0.5, 0.8), rng.uniform(0.25, 0.4)
    t = np.linspace(0, 1, 12)
    width = w / 2 * np.sqrt(np.clip(1 - t ** rng.uniform(2, 4), 0, 1))
    x = n * (t - 0.5)
    deck = np.concatenate([np.stack([x, width], 1), np.stack([x, -width], 1)[::-1]])
    turn = rotation(roll=90)
    b.extrude(deck[::-1] * [1, -1], h, (0, 0, h / 2), 0, turn)
    b.extrude(deck[::-1] * [0.93, -0.85], 0.02, (0, 0, h + 0.01), 1, turn)
    if rng.random() < 0.5:
        b.cylinder(0.03, 1.5, (0, 0, h + 0.75), 2, sides=8)
        b.extrude([(-0.6, 0), (-0.03, 0), (-0.03, 1.2)], 0.02, (0, 0, h + 0.2), 3)
        b.extrude([(0.03, 0), (0.55, 0), (0.03, 1.0)], 0.02, (0, 0, h + 0.2), 3)
    else:
        b.box((0.35 * n, 0.6 * w, 0.25), (-0.1 * n, 0, h + 0.12), 1)
        b.box((0.2 * n, 0.5 * w, 0.2), (-0.12 * n, 0, h + 0.34), 3)
        b.cylinder(0.08, 0.35, (-0.15 * n, 0, h + 0.6), 2)


def airplane(rng: Random, b: Builder) -> None:
    n, r, span = rng.uniform(1.4, 2.0), rng.uniform(0.13, 0.22), rng.uniform(0.7, 1.1)
    t = np.linspace(-1, 1, 16)
    body = np.stack([r * (1 - np.abs(t) ** 3).clip(0) ** 0.5 * (1 - 0.3 * (t < 0) * np.abs(t)), t * n / 2], 1)
    b.lathe(body, slot=0, turn=rotation(pitch=90))
    sweep = rng.uniform(0, 0.4)
    flat = rotation(roll=90)
    for side in (-1, 1):
        wing = [(-0.18, 0), (0.2, 0), (0.08 - sweep, span), (-0.1 - sweep, span)]
        b.extrude([(p[0], side * p[1]) for p in wing][::side], 0.04, (0.05, 0, 0), 1, flat)
        tail = [(-n / 2, 0), (-n / 2 + 0.22, 0), (-n / 2 + 0.08, 0.35), (-n / 2 - 0.04, 0.35)]
        b.extrude([(p[0], side * p[1]) for p in tail][::side], 0.03, (0, 0, 0.05), 1, flat)
        b.cylinder(0.07, 0.3, (0.1 - sweep / 2, side * span / 2, -0.08), 2, axis="x")
    b.extrude([(-n / 2, 0), (-n / 2 + 0.3, 0), (-n / 2 + 0.05, 0.4), (-n / 2 - 0.05, 0.4)], 0.03, (0, 0, 0.05), 3)
    b.ball((0.2, 0.1, 0.09), (0.25 * n, 0, r * 0.8), 3)


def rocket(rng: Random, b: Builder) -> None:
    r, h = rng.uniform(0.18, 0.3), rng.uniform(0.9, 1.3)
    b.lathe([(0, 0), (0.7 * r, 0), (r, 0.12), (r, h)], slot=0)
    t = np.linspace(0, 1, 10)
    b.lathe(np.stack([r * (1 - t**2) ** 0.7, h + t * 2 * r], 1), slot=1)
    for i in range(int(rng.integers(3, 5))):
        fin = [(0.8 * r, 0.1), (r + 0.28, -0.15), (r + 0.28, 0.1), (0.8 * r, 0.5)]
        b.extrude(fin, 0.04, slot=2, turn=rotation(yaw=120 * i + 60))
    for z in (0.45, 0.75):
        b.ball((0.03, 0.1, 0.1), (r, 0, z * h), 3)


def house(rng: Random, b: Builder) -> None:
    x, y, h = rng.uniform(0.7, 1.2), rng.uniform(0.7, 1.4), rng.uniform(0.5, 1.2)
    b.box((x, y, h), (0, 0, h / 2), 0)
    roof = rng.uniform(0.25, 0.7)
    if rng.random() < 0.7:
        gable = [(-x * 0.58, 0), (x * 0.58, 0), (0, roof)]
        b.extrude(gable, y * 1.1, (0, 0, h), 1, rotation(yaw=rng.choice([0, 90])) if abs(x - y) < 0.2 else None)
    else:
        b.lathe(
            [(0, 0), (0.8, 0), (0, roof)],
            (0, 0, h),
            1,
            rotation(yaw=45),
            4,
            (x, y) if abs(x - y) < 0.05 else (max(x, y),) * 2,
        )
    if rng.random() < 0.5:
        b.box((0.12, 0.12, roof + 0.2), (0.2 * x, 0.25 * y, h + roof / 2), 2)
    b.box((0.03, 0.18, 0.34), (x / 2, rng.uniform(-0.2, 0.2) * y, 0.17), 2)
    for level in range(max(1, int(h / 0.45))):
        for i in range(3):
            at = y * ((i + 0.5) / 3 - 0.5)
            for side in (-1, 1):
                b.box((0.03, 0.14, 0.16), (side * x / 2, at, 0.45 + level * 0.4 if h > 0.6 else 0.38), 3)
            b.box(
                (0.14, 0.03, 0.16),
                (x * ((i + 0.5) / 3 - 0.5), y / 2 * (-1) ** i, 0.4 + level * 0.4 if h > 0.6 else 0.35),
                3,
            )


def castle(rng: Random, b: Builder) -> None:
    s, h, r = rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.8), rng.uniform(0.12, 0.2)
    for i in range(4):
        a = math.pi / 2 * i
        b.box((2 * s, 0.1, h * 0.75), (s * math.sin(a), s * math.cos(a), h * 0.37), 0, rotation(yaw=-90 * i))
        at = (s * math.sqrt(2) * math.cos(a + math.pi / 4), s * math.sqrt(2) * math.sin(a + math.pi / 4))
        tall = h * rng.uniform(1, 1.5)
        b.cylinder(r, tall, (*at, tall / 2), 0)
        b.cylinder(r * 1.25, 0.35, (*at, tall + 0.17), 1, 0.0)
    if rng.random() < 0.7:
        b.box((0.5 * s, 0.5 * s, 1.4 * h), (0, 0, 0.7 * h), 3)
        b.lathe([(0, 0), (0.4 * s, 0), (0, 0.3)], (0, 0, 1.4 * h), 1, rotation(yaw=45), 4)
    b.box((0.06, 0.25, 0.35), (s + 0.04, 0, 0.17), 2)


def tree(rng: Random, b: Builder) -> None:
    h = rng.uniform(0.4, 0.9)
    if rng.random() < 0.5:
        b.lathe([(0, 0), (0.2, 0), (0.26, 0.3), (0.22, 0.3), (0.2, 0.26), (0, 0.26)], (0, 0, -0.1), 2)
    b.cylinder(0.07, h, (0, 0, h / 2), 0, 0.05)
    kind = rng.integers(3)
    if kind == 0:
        for i in range(int(rng.integers(2, 5))):
            b.cylinder(0.45 - 0.09 * i, 0.45, (0, 0, h + 0.1 + 0.27 * i), 1, 0.02)
    elif kind == 1:
        for _ in range(int(rng.integers(3, 9))):
            s = rng.uniform(0.18, 0.35)
            at = (*rng.uniform(-0.28, 0.28, 2), h + rng.uniform(0, 0.5))
            b.ball((s, s, s * 0.9), at, 1 if rng.random() < 0.7 else 3)
    else:
        for i in range(int(rng.integers(6, 12))):
            turn = rotation(yaw=137.5 * i)
            drop = rng.uniform(-0.3, 0.3)
            path = smooth([(0, 0, h - 0.1), (0.25, 0, h + 0.3), (0.6, 0, h + drop)], 9)
            b.tube(path * [1, 1, 1], 0.07 * np.sin(np.linspace(0.15, math.pi, 9)) + 0.003, 1, turn=turn, sides=6)


def mushroom(rng: Random, b: Builder) -> None:
    for _ in range(int(rng.integers(1, 4))):
        s, at = rng.uniform(0.5, 1), (*rng.uniform(-0.4, 0.4, 2), 0)
        stem = smooth([(0.16, 0), (0.11, 0.3), (0.13, 0.55)], 8) * s
        b.lathe(np.concatenate([[(0, 0)], stem]), at, 0)
        cap = rng.uniform(0.3, 0.5) * s
        b.ball((cap, cap, cap * rng.uniform(0.5, 1)), (at[0], at[1], 0.5 * s), 1, start=-12)
        b.lathe([(0, 0.49 * s), (cap * 0.98, 0.49 * s)], at, 2)


def creature(rng: Random, b: Builder) -> None:
    n, r, h = rng.uniform(0.6, 1.1), rng.uniform(0.2, 0.35), rng.uniform(0.25, 0.6)
    b.ball((n / 2, r, r * rng.uniform(0.8, 1.1)), (0, 0, h + r * 0.7), 0)
    for sx in (-1, 1):
        for sy in (-1, 1):
            b.cylinder(0.07, h + 0.1, (sx * n * 0.3, sy * r * 0.55, (h + 0.1) / 2), 0, 0.09, sides=12)
            b.ball((0.1, 0.08, 0.05), (sx * n * 0.3 + 0.03, sy * r * 0.55, 0.05), 2)
    head = rng.uniform(0.18, 0.3)
    up = h + r * rng.uniform(1.2, 2.4)
    at = np.array([n / 2 + 0.05, 0, up + 0.1])
    b.tube(smooth([(n * 0.3, 0, h + r), (n * 0.42, 0, (h + r + up) / 2), at], 8), 0.11, 0)
    b.ball((head, head * 0.85, head * 0.9), at, 0)
    b.ball((head * 0.5, head * 0.45, head * 0.4), np.add(at, [head * 0.8, 0, -0.2 * head]), 1)
    ear = rng.uniform(0.06, 0.3)
    for side in (-1, 1):
        b.ball((0.03, 0.03, 0.035), np.add(at, [head * 0.82, side * head * 0.4, head * 0.3]), 3)
        b.ball(
            (0.05, 0.08, ear), np.add(at, [-0.3 * head, side * head * 0.6, head * 0.75]), 1, rotation(roll=-20 * side)
        )
    b.tube(
        smooth(
            [(-n / 2 + 0.05, 0, h + r), (-n / 2 - 0.2, 0, h + r), (-n / 2 - 0.25, 0, h + r + rng.uniform(-0.3, 0.3))], 8
        ),
        0.045,
        1,
    )


def robot(rng: Random, b: Builder) -> None:
    w, d, h = rng.uniform(0.4, 0.7), rng.uniform(0.3, 0.5), rng.uniform(0.4, 0.8)
    leg, round_ = rng.uniform(0.25, 0.5), rng.choice([0.0, 0.06])
    b.box((d, w, h), (0, 0, leg + h / 2), 0, edge=round_)
    b.box((0.02, 0.6 * w, 0.5 * h), (d / 2, 0, leg + h * 0.55), 3)
    s = rng.uniform(0.3, 0.45)
    z = leg + h + s / 2 + 0.06
    if rng.random() < 0.6:
        b.box((s, s * 1.2, s), (0, 0, z), 1, edge=round_)
    else:
        b.ball((s * 0.6, s * 0.6, s * 0.6), (0, 0, z), 1)
    b.cylinder(0.07, 0.15, (0, 0, leg + h + 0.04), 2)
    for side in (-1, 1):
        b.cylinder(0.055, 0.05, (s * 0.52, side * s * 0.28, z + 0.05), 3, axis="x")
        b.box((0.16, 0.14, leg), (0, side * w * 0.28, leg / 2), 2)
        b.box((0.28, 0.17, 0.08), (0.04, side * w * 0.28, 0.04), 1, edge=round_ / 2)
        turn = rotation(roll=side * rng.uniform(0, 35), pitch=-rng.uniform(-20, 70))
        shoulder = np.array([0, side * (w / 2 + 0.08), leg + h * 0.85])
        b.cylinder(0.06, 0.85 * h, shoulder + turn @ [0, 0, -0.4 * h], 2, turn=turn)
        b.ball((0.09, 0.09, 0.09), shoulder + turn @ [0, 0, -0.85 * h], 1)
    b.cylinder(0.012, 0.2, (0, 0, z + s / 2 + 0.1), 2, sides=6)
    b.ball((0.04, 0.04, 0.04), (0, 0, z + s / 2 + 0.2), 3)


def tower(rng: Random, b: Builder) -> None:
    """A stack of random solids: what no recipe foresees."""
    z = 0.0
    for _ in range(int(rng.integers(2, 7))):
        r, h, slot = rng.uniform(0.15, 0.5), rng.uniform(0.12, 0.5), int(rng.integers(4))
        x, y = rng.normal(0, 0.06, 2)
        turn, kind = rotation(yaw=rng.uniform(0, 90)), rng.integers(6)
        if kind == 0:
            b.box((2 * r, 2 * r * rng.uniform(0.5, 1), h), (x, y, z + h / 2), slot, turn, edge=rng.choice([0, 0.06]))
        elif kind == 1:
            b.cylinder(r, h, (x, y, z + h / 2), slot, r * rng.uniform(0.2, 1.1))
        elif kind == 2:
            b.ball((r, r * rng.uniform(0.7, 1), h / 2), (x, y, z + h / 2), slot, turn)
        elif kind == 3:
            b.torus(r, h / 2, (x, y, z + h / 2), slot)
        elif kind == 4:
            sides = int(rng.integers(3, 8))
            b.lathe([(0, 0), (r, 0), (r, h), (0, h)], (x, y, z), slot, turn, sides)
        else:
            count = int(rng.integers(3, 8))
            for k in range(count):
                a = 2 * math.pi * k / count
                b.ball((h / 3, h / 3, h / 2), (x + r * math.cos(a), y + r * math.sin(a), z + h / 2), (slot + k) % 4)
        z += h * rng.uniform(0.8, 1)


def blob(rng: Random, b: Builder) -> None:
    """Ellipsoids grown out of each other, half of the time mirrored left to right."""
    mirrored, at = rng.random() < 0.6, np.zeros(3)
    for _ in range(int(rng.integers(3, 9))):
        radii = rng.uniform(0.12, 0.4, 3)
        turn, slot = rotation(*rng.uniform(-60, 60, 3)), int(rng.integers(4))
        b.ball(radii, at, slot, turn)
        if mirrored:
            flip = np.diag([1.0, -1.0, 1.0])
            b.ball(radii, flip @ at, slot, flip @ turn @ flip)
        at = at + turn @ (radii * rng.choice([-1, 1], 3) * rng.uniform(0.3, 0.8, 3))


TOYS = {
    f.__name__: f
    for f in (car, truck, boat, airplane, rocket, house, castle, tree, mushroom, creature, robot, tower, blob)
}
