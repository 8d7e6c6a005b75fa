"""Lines with error bars as an SVG, so that a README can show a score against updates. Nothing but text."""

from __future__ import annotations

import math

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 50

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8d6a9f", "#b8860b")

Point = tuple[float, float, float]
"""Updates, score, and the deviation that its bar shows to both sides."""


def draw(series: dict[str, list[Point]]) -> str:
    """One line for each series; updates on a logarithmic axis with base 2."""
    points = [point for line in series.values() for point in line]
    first, last = min(x for x, _, _ in points), max(x for x, _, _ in points)
    low, high = min(y - sd for _, y, sd in points), max(y + sd for _, y, sd in points)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room, high + room
    decades = math.log2(last / first) or 1.0

    def across(x: float) -> float:
        return LEFT + 20 + (WIDTH - LEFT - RIGHT - 40) * math.log2(x / first) / decades

    def down(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for step in range(5):
        y = low + (high - low) * step / 4
        parts.append(_line(LEFT, down(y), WIDTH - RIGHT, down(y), "#dddddd"))
        parts.append(_text(LEFT - 8, down(y) + 4, f"{y:.4g}", "end"))
    for x in sorted({x for x, _, _ in points}):
        parts.append(_line(across(x), HEIGHT - BOTTOM, across(x), HEIGHT - BOTTOM + 5, "#333333"))
        parts.append(_text(across(x), HEIGHT - BOTTOM + 20, f"{x:.0f}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "updates", "middle"))
    for place, (name, line) in enumerate(series.items()):
        parts += _series(name, sorted(line), place, across, down)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _series(name: str, line: list[Point], place: int, across, down) -> list[str]:
    colour, shift = COLOURS[place % len(COLOURS)], 3 * place
    marks = [(across(x) + shift, y, sd) for x, y, sd in line]  # bars of two series stand beside each other
    path = " ".join(f"{x:.1f},{down(y):.1f}" for x, y, _ in marks)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for x, y, sd in marks:
        parts.append(f'<circle cx="{x:.1f}" cy="{down(y):.1f}" r="3.5" fill="{colour}"/>')
        parts.append(_line(x, down(y - sd), x, down(y + sd), colour))
    parts.append(_line(LEFT + 12, TOP + 14 + 18 * place, LEFT + 36, TOP + 14 + 18 * place, colour))
    parts.append(_text(LEFT + 42, TOP + 18 + 18 * place, _escaped(name), "start"))
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333333">{text}</text>'


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
