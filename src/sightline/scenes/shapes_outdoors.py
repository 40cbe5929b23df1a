"""Drawings of things outdoors: people, animals, vehicles, plants, beach. Each function draws one kind with a Pen."""

from __future__ import annotations

from math import cos, pi, sin

from sightline.scenes.pen import Pen

TYRE = (44, 44, 48)
HUB = (176, 180, 184)
GLASS = (196, 220, 232)
SKIN = (226, 178, 140)
BARK = (112, 76, 46)
LEAF = (70, 140, 62)
EYE = (22, 22, 26)


def _wheel(p: Pen, x: float, y: float, radius: float) -> None:
    p.dot(x, y, radius, TYRE)
    p.dot(x, y, radius * 0.45, HUB)


def _eye(p: Pen, x: float, y: float, radius: float) -> None:
    p.dot(x, y, radius * 1.7, (252, 252, 250))
    p.dot(x, y, radius, EYE)


def person(p: Pen) -> None:
    p.line([(0.37, 0.58), (0.31, 0.96)], 0.085, p.deep)
    p.line([(0.63, 0.58), (0.69, 0.96)], 0.085, p.deep)
    p.line([(0.26, 0.31), (0.10, 0.54)], 0.07, p.dark)
    p.line([(0.74, 0.31), (0.90, 0.54)], 0.07, p.dark)
    p.dot(0.10, 0.56, 0.04, SKIN)
    p.dot(0.90, 0.56, 0.04, SKIN)
    p.rect(0.21, 0.25, 0.79, 0.64, round_by=0.07)
    p.rect(0.43, 0.18, 0.57, 0.28, SKIN)
    p.dot(0.5, 0.115, 0.112, (84, 56, 38))
    p.oval(0.29, 0.055, 0.71, 0.225, SKIN)


def bicycle(p: Pen) -> None:
    for x in (0.215, 0.785):
        p.ring(x - 0.215, 0.36, x + 0.215, 1, 0.055, TYRE)
        p.dot(x, 0.68, 0.035, TYRE)
    p.line([(0.215, 0.68), (0.36, 0.32), (0.68, 0.32), (0.46, 0.70), (0.215, 0.68)], 0.06)
    p.line([(0.46, 0.70), (0.34, 0.20)], 0.06)
    p.line([(0.785, 0.68), (0.65, 0.10)], 0.06)
    p.line([(0.65, 0.10), (0.78, 0.05)], 0.05, TYRE)
    p.line([(0.26, 0.18), (0.43, 0.18)], 0.065, TYRE)


def car(p: Pen) -> None:
    p.poly([(0.18, 0.44), (0.31, 0.04), (0.66, 0.04), (0.84, 0.44)])
    p.poly([(0.25, 0.42), (0.34, 0.13), (0.47, 0.13), (0.47, 0.42)], GLASS)
    p.poly([(0.52, 0.42), (0.52, 0.13), (0.63, 0.13), (0.76, 0.42)], GLASS)
    p.rect(0, 0.40, 1, 0.82, round_by=0.08)
    p.rect(0.02, 0.68, 0.98, 0.82, p.dark, round_by=0.04)
    p.rect(0.93, 0.48, 1, 0.60, (252, 240, 170))
    _wheel(p, 0.23, 0.79, 0.108)
    _wheel(p, 0.77, 0.79, 0.108)


def bus(p: Pen) -> None:
    p.rect(0, 0, 1, 0.87, round_by=0.05)
    p.rect(0, 0.74, 1, 0.87, p.dark)
    for k in range(4):
        p.rect(0.05 + k * 0.185, 0.13, 0.20 + k * 0.185, 0.46, GLASS)
    p.rect(0.80, 0.13, 0.97, 0.74, GLASS)
    p.rect(0.875, 0.13, 0.895, 0.74, p.dark)
    _wheel(p, 0.22, 0.86, 0.082)
    _wheel(p, 0.70, 0.86, 0.082)


def boat(p: Pen) -> None:
    p.line([(0.48, 0.02), (0.48, 0.72)], 0.045, BARK)
    p.poly([(0.53, 0.04), (0.53, 0.62), (0.94, 0.62)], p.light)
    p.poly([(0.43, 0.14), (0.43, 0.62), (0.12, 0.62)], p.light)
    p.poly([(0, 0.68), (1, 0.68), (0.82, 1), (0.16, 1)])
    p.poly([(0, 0.68), (1, 0.68), (0.96, 0.76), (0.04, 0.76)], p.deep)


def tractor(p: Pen) -> None:
    p.rect(0.86, 0.12, 0.90, 0.42, TYRE)
    p.rect(0.48, 0.40, 1, 0.76, round_by=0.04)
    p.rect(0.14, 0, 0.58, 0.10, p.dark)
    p.rect(0.18, 0.08, 0.54, 0.72)
    p.rect(0.24, 0.14, 0.49, 0.42, GLASS)
    for k in range(3):
        p.rect(0.72, 0.48 + k * 0.08, 0.94, 0.51 + k * 0.08, p.deep)
    _wheel(p, 0.27, 0.68, 0.255)
    _wheel(p, 0.83, 0.82, 0.14)


def bird(p: Pen) -> None:
    p.line([(0.46, 0.74), (0.44, 0.98)], 0.03, (170, 110, 40))
    p.line([(0.56, 0.74), (0.58, 0.98)], 0.03, (170, 110, 40))
    p.poly([(0, 0.26), (0.04, 0.52), (0.34, 0.66), (0.34, 0.42)], p.dark)
    p.oval(0.18, 0.26, 0.78, 0.84)
    p.dot(0.76, 0.27, 0.175)
    p.poly([(0.87, 0.20), (1, 0.31), (0.86, 0.38)], (240, 160, 40))
    p.poly([(0.60, 0.40), (0.62, 0.62), (0.36, 0.72), (0.10, 0.66), (0.34, 0.44)], p.deep)
    _eye(p, 0.79, 0.22, 0.028)


def cat(p: Pen) -> None:
    p.line([(0.72, 0.92), (0.94, 0.86), (0.94, 0.58), (0.86, 0.50)], 0.085, p.dark)
    p.poly([(0.30, 0.40), (0.70, 0.40), (0.88, 0.98), (0.12, 0.98)])
    p.oval(0.10, 0.66, 0.42, 1)
    p.oval(0.58, 0.66, 0.90, 1)
    p.line([(0.42, 0.70), (0.42, 0.96)], 0.02, p.deep)
    p.line([(0.58, 0.70), (0.58, 0.96)], 0.02, p.deep)
    p.poly([(0.16, 0), (0.46, 0.14), (0.17, 0.34)])
    p.poly([(0.84, 0), (0.54, 0.14), (0.83, 0.34)])
    p.poly([(0.22, 0.07), (0.36, 0.15), (0.23, 0.24)], (232, 150, 150))
    p.poly([(0.78, 0.07), (0.64, 0.15), (0.77, 0.24)], (232, 150, 150))
    p.oval(0.14, 0.10, 0.86, 0.54)
    for x in (0.34, 0.66):
        p.oval(x - 0.075, 0.23, x + 0.075, 0.36, (210, 232, 120))
        p.oval(x - 0.03, 0.23, x + 0.03, 0.36, EYE)
    p.poly([(0.44, 0.39), (0.56, 0.39), (0.5, 0.45)], (232, 130, 130))


def dog(p: Pen) -> None:
    p.line([(0.10, 0.46), (0.03, 0.22)], 0.075, p.dark)
    for x, tone in ((0.22, p.dark), (0.60, p.dark), (0.13, p.main), (0.51, p.main)):
        p.line([(x, 0.62), (x, 0.95)], 0.085, tone)
    p.rect(0.07, 0.38, 0.66, 0.72, round_by=0.13)
    p.poly([(0.48, 0.62), (0.50, 0.26), (0.72, 0.26), (0.66, 0.62)])
    p.oval(0.50, 0.04, 0.84, 0.46)
    p.rect(0.70, 0.21, 0.99, 0.43, round_by=0.07)
    p.oval(0.90, 0.19, 1, 0.31, EYE)
    p.oval(0.48, 0.06, 0.63, 0.50, p.deep)
    _eye(p, 0.72, 0.18, 0.026)


def sheep(p: Pen) -> None:
    for x in (0.24, 0.36, 0.56, 0.68):
        p.line([(x, 0.70), (x, 0.97)], 0.055, EYE)
    for k in range(9):
        a = 2 * pi * k / 9
        p.dot(0.44 + 0.27 * cos(a), 0.44 + 0.24 * sin(a), 0.145, p.main if k % 2 else p.light)
    p.oval(0.16, 0.20, 0.72, 0.70)
    p.oval(0.72, 0.22, 0.99, 0.64, (58, 52, 52))
    p.oval(0.62, 0.24, 0.80, 0.36, (58, 52, 52))
    p.dot(0.76, 0.18, 0.09, p.light)
    _eye(p, 0.87, 0.36, 0.026)


def fish(p: Pen) -> None:
    p.poly([(0.20, 0.50), (0, 0.06), (0, 0.94)], p.dark)
    p.poly([(0.36, 0.22), (0.56, 0), (0.70, 0.24)], p.dark)
    p.poly([(0.42, 0.82), (0.52, 1), (0.62, 0.80)], p.dark)
    p.oval(0.12, 0.14, 1, 0.88)
    p.pie(0.12, 0.14, 1, 0.88, 20, 160, p.light)
    p.line([(0.66, 0.27), (0.61, 0.50), (0.66, 0.74)], 0.03, p.deep)
    p.poly([(0.50, 0.46), (0.32, 0.36), (0.32, 0.60)], p.deep)
    _eye(p, 0.82, 0.40, 0.038)


def umbrella(p: Pen) -> None:
    p.line([(0.5, 0.04), (0.5, 0.90), (0.56, 0.97), (0.64, 0.93), (0.65, 0.86)], 0.042, (96, 70, 52))
    p.pie(0, 0.04, 1, 1.02, 180, 360)
    p.pie(0.30, 0.04, 0.70, 1.02, 180, 360, p.light)
    for k in range(4):
        p.pie(k * 0.25, 0.46, k * 0.25 + 0.25, 0.60, 0, 180, p.main if k in (0, 3) else p.light)
    p.poly([(0.70, 0.53), (0.5, 0.04), (0.86, 0.20), (1, 0.53)], p.dark)


def ball(p: Pen) -> None:
    p.oval(0, 0, 1, 1)
    p.oval(0.24, 0.0, 0.76, 1, (250, 250, 248) if p.main[2] < 230 else (200, 200, 204))
    p.oval(0.38, 0.0, 0.62, 1)
    p.dot(0.5, 0.08, 0.07, p.deep)


def surfboard(p: Pen) -> None:
    p.poly([(0.30, 0.90), (0.10, 1), (0.44, 0.97)], p.deep)
    side = [
        (0.5 + s * 0.46 * sin(pi * t) ** 0.75, t)
        for s, ts in ((1, range(13)), (-1, range(12, -1, -1)))
        for t in (k / 12 for k in ts)
    ]
    p.poly(side)
    p.poly([(x if x < 0.5 else 0.5, y) for x, y in side], p.light)
    p.line([(0.5, 0.06), (0.5, 0.94)], 0.05, p.deep)


def tree(p: Pen) -> None:
    p.poly([(0.42, 0.5), (0.58, 0.5), (0.64, 1), (0.36, 1)], BARK)
    for x, y, r, tone in (
        (0.24, 0.46, 0.20, p.dark),
        (0.76, 0.46, 0.20, p.dark),
        (0.5, 0.52, 0.2, p.dark),
        (0.30, 0.27, 0.20, p.main),
        (0.70, 0.29, 0.20, p.main),
        (0.5, 0.20, 0.20, p.main),
        (0.5, 0.36, 0.22, p.main),
        (0.38, 0.20, 0.09, p.light),
    ):
        p.dot(x, y, r, tone)


def flower(p: Pen) -> None:
    p.line([(0.5, 0.45), (0.5, 0.97)], 0.055, LEAF)
    p.poly([(0.5, 0.88), (0.16, 0.62), (0.10, 0.76)], LEAF)
    p.poly([(0.5, 0.80), (0.86, 0.60), (0.90, 0.74)], LEAF)
    for k in range(6):
        a = 2 * pi * k / 6 + pi / 6
        p.dot(0.5 + 0.29 * cos(a), 0.30 + 0.18 * sin(a), 0.118, p.main if k % 2 else p.light)
    p.dot(0.5, 0.30, 0.10, (250, 205, 60) if p.main[0] < 230 or p.main[2] > 200 else (120, 70, 40))


DRAWINGS = {
    f.__name__: f
    for f in (
        person,
        bicycle,
        car,
        bus,
        boat,
        tractor,
        bird,
        cat,
        dog,
        sheep,
        fish,
        umbrella,
        ball,
        surfboard,
        tree,
        flower,
    )
}
