"""Drawings of things indoors: kitchen, furniture, desk. Each function draws one kind with a Pen."""

from __future__ import annotations

from sightline.scenes.pen import Pen

STEEL = (150, 156, 162)
WOOD = (128, 86, 52)
PAPER = (236, 232, 220)
GLASS = (178, 205, 218)
INK = (46, 46, 52)


def cup(p: Pen) -> None:
    p.ring(0.56, 0.22, 0.99, 0.80, 0.095, p.dark)
    p.poly([(0.04, 0.10), (0.76, 0.10), (0.70, 0.93), (0.60, 1), (0.20, 1), (0.10, 0.93)])
    p.poly([(0.60, 0.10), (0.76, 0.10), (0.70, 0.93), (0.60, 1), (0.52, 1)], p.dark)
    p.oval(0.04, 0, 0.76, 0.22, p.light)
    p.oval(0.10, 0.05, 0.70, 0.19, p.deep)


def plate(p: Pen) -> None:
    p.oval(0, 0.14, 1, 1, p.deep)
    p.oval(0, 0, 1, 0.88)
    p.oval(0.17, 0.16, 0.83, 0.74, p.dark)
    p.oval(0.20, 0.22, 0.80, 0.74, p.light)


def bowl(p: Pen) -> None:
    p.rect(0.34, 0.86, 0.66, 1, p.deep)
    p.pie(0, -0.60, 1, 0.95, 0, 180, p.dark)
    p.pie(0, -0.60, 0.84, 0.92, 0, 180)
    p.oval(0, 0.02, 1, 0.36, p.light)
    p.oval(0.06, 0.07, 0.94, 0.33, p.deep)


def bottle(p: Pen) -> None:
    p.rect(0.33, 0.03, 0.67, 0.32, p.dark)
    p.poly([(0.33, 0.28), (0.67, 0.28), (0.98, 0.46), (0.98, 0.6), (0.02, 0.6), (0.02, 0.46)])
    p.rect(0.02, 0.45, 0.98, 1, round_by=0.05)
    p.rect(0.72, 0.47, 0.98, 0.98, p.dark, round_by=0.03)
    p.rect(0.02, 0.56, 0.98, 0.76, PAPER)
    p.rect(0.2, 0.63, 0.8, 0.68, p.deep)
    p.rect(0.26, 0, 0.74, 0.08, INK)
    p.rect(0.14, 0.48, 0.26, 0.55, p.light)


def fork(p: Pen) -> None:
    for x in (0.14, 0.5, 0.86):
        p.line([(x, 0.02), (x, 0.30)], 0.05)
    p.pie(0.02, 0.02, 0.98, 0.46, 0, 180)
    p.line([(0.5, 0.42), (0.5, 0.95)], 0.075)
    p.line([(0.5, 0.66), (0.5, 0.95)], 0.10)


def chair(p: Pen) -> None:
    for x in (0.07, 0.70):
        p.line([(x, 0.03), (x, 0.97)], 0.06, p.dark)
    for y in (0.07, 0.21, 0.35):
        p.rect(0.05, y, 0.72, y + 0.085)
    p.line([(0.24, 0.62), (0.24, 0.97)], 0.06, p.deep)
    p.line([(0.93, 0.62), (0.93, 0.97)], 0.06, p.deep)
    p.poly([(0.03, 0.52), (0.74, 0.52), (1, 0.63), (0.22, 0.63)], p.light)
    p.poly([(0.22, 0.62), (1, 0.62), (1, 0.69), (0.22, 0.69)], p.dark)


def table(p: Pen) -> None:
    for x in (0.17, 0.83):
        p.line([(x, 0.25), (x, 0.74)], 0.05, p.deep)
    for x in (0.05, 0.95):
        p.line([(x, 0.28), (x, 0.96)], 0.06, p.dark)
    p.poly([(0.14, 0.0), (0.86, 0.0), (1, 0.26), (0, 0.26)], p.main)
    p.rect(0, 0.25, 1, 0.38, p.dark)


def bed(p: Pen) -> None:
    p.line([(0.04, 0.06), (0.04, 0.97)], 0.05, WOOD)
    p.line([(0.96, 0.5), (0.96, 0.97)], 0.05, WOOD)
    p.rect(0.01, 0.02, 0.10, 0.80, WOOD, round_by=0.02)
    p.rect(0.08, 0.50, 0.96, 0.84, PAPER)
    p.rect(0.12, 0.30, 0.36, 0.54, (250, 250, 246), round_by=0.05)
    p.rect(0.36, 0.36, 0.99, 0.74, round_by=0.06)
    p.rect(0.36, 0.62, 0.99, 0.84, p.dark)
    p.rect(0.34, 0.37, 0.44, 0.84, p.light, round_by=0.02)


def lamp(p: Pen) -> None:
    p.line([(0.5, 0.45), (0.5, 0.92)], 0.055, INK)
    p.oval(0.18, 0.86, 0.82, 1, p.deep)
    p.poly([(0.30, 0), (0.70, 0), (1, 0.48), (0, 0.48)])
    p.poly([(0.30, 0), (0.42, 0), (0.26, 0.48), (0, 0.48)], p.light)
    p.poly([(0.62, 0), (0.70, 0), (1, 0.48), (0.80, 0.48)], p.dark)
    p.pie(0, 0.42, 1, 0.55, 0, 180, (252, 236, 170))


def clock(p: Pen) -> None:
    p.oval(0, 0, 1, 1)
    p.oval(0.17, 0.17, 0.83, 0.83, (250, 249, 242))
    for x, y in ((0.5, 0.23), (0.77, 0.5), (0.5, 0.77), (0.23, 0.5)):
        p.dot(x, y, 0.03, INK)
    p.line([(0.5, 0.5), (0.5, 0.27)], 0.055, INK)
    p.line([(0.5, 0.5), (0.68, 0.58)], 0.055, INK)


def laptop(p: Pen) -> None:
    p.rect(0.10, 0, 0.90, 0.66, round_by=0.04)
    p.rect(0.19, 0.10, 0.81, 0.57, (196, 216, 230))
    p.poly([(0.19, 0.10), (0.52, 0.10), (0.30, 0.57), (0.19, 0.57)], (222, 235, 243))
    p.poly([(0.10, 0.66), (0.90, 0.66), (1, 0.93), (0, 0.93)], p.light)
    p.poly([(0.16, 0.70), (0.84, 0.70), (0.88, 0.80), (0.12, 0.80)], INK)
    p.rect(0, 0.92, 1, 1, p.dark)


def book(p: Pen) -> None:
    p.poly([(0.10, 0.06), (1, 0), (1, 0.92), (0.10, 1)], p.deep)
    p.poly([(0.16, 0.05), (0.97, 0.02), (0.97, 0.97), (0.16, 0.99)], PAPER)
    p.rect(0, 0.06, 0.88, 1, round_by=0.02)
    p.rect(0, 0.06, 0.15, 1, p.dark, round_by=0.02)
    p.rect(0.28, 0.20, 0.76, 0.29, PAPER)
    p.rect(0.36, 0.37, 0.68, 0.43, PAPER)


def pen(p: Pen) -> None:
    p.poly([(0, 1), (0.07, 0.80), (0.19, 0.92)], INK)
    p.poly([(0.06, 0.79), (0.72, 0.14), (0.86, 0.27), (0.20, 0.94)])
    p.poly([(0.13, 0.865), (0.79, 0.205), (0.86, 0.27), (0.20, 0.94)], p.dark)
    p.poly([(0.72, 0.14), (0.86, 0), (1, 0.13), (0.86, 0.27)], INK)
    p.line([(0.82, 0.12), (0.56, 0.22)], 0.045, STEEL)


DRAWINGS = {f.__name__: f for f in (cup, plate, bowl, bottle, fork, chair, table, bed, lamp, clock, laptop, book, pen)}
