"""compare.html: one file that loads nothing from the network, for light and dark themes, with plots and tables.

Plots are SVG with a few kinds of marks. Colours are CSS variables of the page, so that they follow the reader's theme.
"""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from toolkit.compare.tables import about, failures, tables, title, with_half
from toolkit.memory.report import GROUPS, grouped
from toolkit.tasks.metrics import score_title
from toolkit.units import GIB, KIB, MIB, format_bytes

WIDTH = 760  # of every plot, in SVG units; about one pixel on a wide screen
CHARACTER = 6.6  # mean width of a character of 12 units
Box = tuple[float, float, float, float]


def page(data: dict[str, Any]) -> str:
    """The page of one comparison, as HTML."""
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("toolkit.compare").joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        title=title(data),
        about=about(data).replace("`", ""),
        plots=[plot for make in (_scatter, _bars, _memory, _curves) if (plot := make(data))],
        tables=tables(data),
        failures=failures(data),
    )


def _scatter(data: dict[str, Any]) -> dict[str, Any] | None:
    """Quality against memory: up and to the left is better."""
    metric = data["headline"]
    points = [
        (entry["method"], entry["memory"]["measured"]["reserved_bytes"], entry["scores"][metric])
        for entry in data["entries"]
        if entry.get("memory") and metric in entry["scores"]
    ]
    if not points:
        return None
    base = next(entry["scores"][metric]["mean"] for entry in data["entries"] if entry["method"] == "base")
    height, left, right, top, bottom = 380, 62, 40, 14, 46
    low, high = _range(
        [base, *(s["mean"] + sign * (s["half"] or 0) for _, _, s in points for sign in (-1, 1))], floor=0.0
    )
    sizes = [size for _, size, _ in points]
    unit = _unit(max(sizes))
    least, most = _range(sizes, floor=0.0)
    x = _scale(least, most, left, WIDTH - right)
    y = _scale(low, high, height - bottom, top)
    parts = [*_y_axis(low, high, y, left, WIDTH - right, score_title(metric))]
    ticks = [int(tick * unit) for tick in _ticks(least / unit, most / unit)]
    parts += [_text(x(tick), height - bottom + 18, format_bytes(tick), "tick", "middle") for tick in ticks]
    parts.append(_text((left + WIDTH - right) / 2, height - 6, "peak memory (reserved)", "label", "middle"))
    parts.append(_line(left, y(base), WIDTH - right, y(base), "base"))
    parts.append(_text(WIDTH - right, y(base) - 5, f"base {base:.3f}", "muted", "end"))
    taken: list[Box] = [(x(size) - 7, y(s["mean"]) - 7, x(size) + 7, y(s["mean"]) + 7) for _, size, s in points]
    taken.append((WIDTH - right - 80, y(base) - 18, WIDTH - right, y(base) + 2))
    for method, size, score in points:
        tip = f"{method}: {score_title(metric)} {with_half(score)}, {format_bytes(size)}"
        half = score["half"] or 0
        parts.append(_whisker(x(size), y(score["mean"] - half), x(size), y(score["mean"] + half)) if half else "")
        parts.append(f'<circle class="dot" cx="{x(size):.1f}" cy="{y(score["mean"]):.1f}" r="5">{_tip(tip)}</circle>')
        at_x, at_y, anchor = _free_place(x(size), y(score["mean"]), len(method) * CHARACTER, taken, WIDTH)
        parts.append(_text(at_x, at_y, method, "name", anchor))
    better = "up" if data["higher_is_better"] else "down"
    caption = (
        f"{score_title(metric)} on the test split against the peak of reserved memory: {better} and to the left is better. Vertical "
        "lines are 95 % intervals over seeds; the dashed line is the model before training."
    )
    return _plot("Quality against memory", parts, height, caption)


def _bars(data: dict[str, Any]) -> dict[str, Any] | None:
    """A panel for each metric, a bar for each method."""
    entries = [entry for entry in data["entries"] if entry["scores"]]
    across = 2 if len(data["metrics"]) > 1 else 1
    names = max(len(entry["method"]) for entry in entries) * CHARACTER + 12
    panel, row, top = WIDTH / across, 24, 30
    high_of = {
        metric: max(s["mean"] + (s["half"] or 0) for entry in entries if (s := entry["scores"].get(metric)))
        for metric in data["metrics"]
    }
    height = math.ceil(len(data["metrics"]) / across) * (top + row * len(entries) + 14)
    parts = []
    for number, metric in enumerate(data["metrics"]):
        ox, oy = number % across * panel, number // across * (top + row * len(entries) + 14)
        x = _scale(0.0, high_of[metric] or 1.0, ox + names, ox + panel - 62)
        parts.append(_text(ox + names, oy + 16, score_title(metric), "label"))
        for at, entry in enumerate(entries):
            score = entry["scores"].get(metric)
            if not score:
                continue
            y, half = oy + top + at * row, score["half"] or 0
            tip = f"{entry['method']}: {score_title(metric)} {with_half(score)}"
            parts.append(_text(ox + names - 8, y + 13, entry["method"], "name", "end"))
            kind = "bar quiet" if entry["method"] == "base" else "bar"
            parts.append(_rect(x(0), y + 2, x(score["mean"]) - x(0), row - 9, kind, tip))
            if half:
                parts.append(_whisker(x(max(0.0, score["mean"] - half)), y + 9.5, x(score["mean"] + half), y + 9.5))
            parts.append(_text(x(score["mean"] + half) + 6, y + 13, f"{score['mean']:.3f}", "muted"))
    caption = (
        "Scores on the test split, from 0. Lines are 95 % intervals over seeds; base is the model before training."
    )
    return _plot("Scores", parts, height, caption)


def _memory(data: dict[str, Any]) -> dict[str, Any] | None:
    """Stacked bars of the peak, measured and predicted."""
    found = [(entry["method"], entry["memory"]) for entry in data["entries"] if entry.get("memory")]
    if not found:
        return None
    top, row, names = 34, 40, max(len(method) for method, _ in found) * CHARACTER + 12
    most = max(peak["reserved_bytes"] for _, memory in found for peak in memory.values())
    x = _scale(0, most, names, WIDTH - 150)
    parts, at = [], names
    used = [g for g in GROUPS if any(grouped(p["categories"])[g] for _, m in found for p in m.values())]
    for group in used:
        parts += [_rect(at, 6, 11, 11, _group_class(group)), _text(at + 16, 16, group, "name")]
        at += len(group) * CHARACTER + 34
    for number, (method, memory) in enumerate(found):
        y = top + number * row
        parts.append(_text(names - 8, y + 15, method, "name", "end"))
        for source, peak in memory.items():
            thick, offset = (18, 0) if source == "measured" else (7, 21)
            done = 0
            for group, size in grouped(peak["categories"]).items():
                gap = min(1.5, (x(size) - x(0)) / 2)
                tip = f"{method}, {source}: {group} {format_bytes(size)}"
                if size:
                    parts.append(_rect(x(done), y + offset, x(size) - x(0) - gap, thick, _group_class(group), tip))
                done += size
            text = f"{format_bytes(peak['reserved_bytes'])}" + ("" if source == "measured" else " predicted")
            kind = "name" if source == "measured" else "muted small"
            parts.append(_text(x(done) + 6, y + offset + (13 if source == "measured" else 7), text, kind))
    caption = (
        "Reserved memory at the peak, by category. The thick bar is measured in the first two steps of the seed that needed the "
        "most; the thin bar below it is the prediction for the same batches."
    )
    return _plot("Memory at the peak", parts, top + row * len(found) + 4, caption)


def _curves(data: dict[str, Any]) -> dict[str, Any] | None:
    """A panel for each method: its seeds' curves, with the other methods' in grey behind them."""
    curves = {
        entry["method"]: lines
        for entry in data["entries"]
        if (lines := [points for one in entry.get("curves", []) if (points := _losses(one["lines"], "loss"))])
    }
    if not curves:
        return None
    checks = {
        entry["method"]: [points for one in entry["curves"] if (points := _losses(one["lines"], "eval_loss"))]
        for entry in data["entries"]
        if entry["method"] in curves
    }
    losses = [loss for lines in (*curves.values(), *checks.values()) for points in lines for _, loss in points]
    steps = max(step for lines in curves.values() for points in lines for step, _ in points)
    low, high = _range(losses, floor=0.0)
    across = 1 if len(curves) == 1 else 2 if len(curves) < 5 else 3
    panel, tall, left, bottom = WIDTH / across, 190, 46, 40
    parts = []
    for number, (method, lines) in enumerate(curves.items()):
        ox, oy = number % across * panel, number // across * tall
        x = _scale(0, steps, ox + left, ox + panel - 14)
        y = _scale(low, high, oy + tall - bottom, oy + 26)
        parts += _y_axis(low, high, y, ox + left, ox + panel - 14, "", 3)
        parts.append(_text(ox + left, oy + 15, method, "label"))
        for tick in _ticks(0, steps, 3):
            if tick == int(tick):
                parts.append(_text(x(tick), oy + tall - bottom + 16, f"{tick:,.0f}", "tick", "middle"))
        for other, theirs in curves.items():
            if other != method:
                parts += [_path([(x(s), y(loss)) for s, loss in points], "curve others") for points in theirs]
        parts += [_path([(x(s), y(loss)) for s, loss in points], "curve") for points in lines]
        parts += [_path([(x(s), y(loss)) for s, loss in points], "curve checked") for points in checks[method]]
    caption = (
        "Loss of the training batches over optimizer steps, a line for each seed; the other methods' in grey, for comparison."
        + (" Dashed: loss on the validation split." if any(checks.values()) else "")
    )
    return _plot("Learning curves", parts, math.ceil(len(curves) / across) * tall, caption)


# ---- marks


def _plot(name: str, parts: Iterable[str], height: float, caption: str) -> dict[str, Any]:
    inside = "".join(parts)
    label = html.escape(f"{name}. {caption}")
    svg = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">{inside}</svg>'
    return {"name": name, "svg": Markup(svg), "caption": caption}


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rect(x: float, y: float, width: float, height: float, kind: str, tip: str = "") -> str:
    shape = f'x="{x:.1f}" y="{y:.1f}" width="{max(0.5, width):.1f}" height="{height:.1f}"'
    return f'<rect class="{kind}" {shape}>{_tip(tip)}</rect>'


def _tip(text: str) -> str:
    return f"<title>{html.escape(text)}</title>" if text else ""


def _path(points: Sequence[tuple[float, float]], kind: str) -> str:
    if len(points) == 1:
        return f'<circle class="{kind} lone" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="2.5"/>'
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _whisker(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a small cap at either end."""
    dx, dy = (4, 0) if x1 == x2 else (0, 4)
    ends = "".join(_line(x - dx, y - dy, x + dx, y + dy, "whisker") for x, y in ((x1, y1), (x2, y2)))
    return _line(x1, y1, x2, y2, "whisker") + ends


def _y_axis(
    low: float, high: float, y: Callable[[float], float], left: float, right: float, name: str, number: int = 5
) -> list[str]:
    parts = []
    ticks = _ticks(low, high, number)
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]))) if len(ticks) > 1 else 2
    for tick in ticks:
        parts.append(_line(left, y(tick), right, y(tick), "grid"))
        parts.append(_text(left - 8, y(tick) + 4, f"{tick:.{digits}f}", "tick", "end"))
    if name:
        middle = (y(low) + y(high)) / 2
        parts.append(
            f'<text class="label" transform="translate(14 {middle:.1f}) rotate(-90)" text-anchor="middle">{name}</text>'
        )
    return parts


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    width = high - low or 1.0
    return lambda value: start + (value - low) / width * (end - start)


def _range(values: Sequence[float], floor: float) -> tuple[float, float]:
    """The values' range with a margin, not below `floor`."""
    low, high = min(values), max(values)
    margin = 0.12 * (high - low or abs(high) or 1.0)
    return max(floor, low - margin), high + margin


def _ticks(low: float, high: float, number: int = 5) -> list[float]:
    """About `number` round values within the range: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / max(1, number)
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _unit(nbytes: int) -> int:
    return GIB if nbytes >= GIB else MIB if nbytes >= MIB else KIB


def _group_class(group: str) -> str:
    return f"group-{group.replace(' ', '-')}"


def _losses(lines: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def _free_place(x: float, y: float, width: float, taken: list[Box], most: float) -> tuple[float, float, str]:
    """A place for a point's name that covers no other: right, left, above or below it (right if none is free).

    The place is added to `taken`.
    """
    places = [(x + 10, y + 4, "start"), (x - 10, y + 4, "end"), (x, y - 11, "middle"), (x, y + 21, "middle")]
    places += [(x + 10, y - 10, "start"), (x + 10, y + 18, "start"), (x - 10, y - 10, "end"), (x - 10, y + 18, "end")]
    boxes = []
    for at_x, at_y, anchor in places:
        start = at_x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        boxes.append((start, at_y - 11, start + width, at_y + 3))
    clear = [
        i
        for i, (x1, y1, x2, y2) in enumerate(boxes)
        if x1 > 0 and x2 < most and not any(x1 < b[2] and x2 > b[0] and y1 < b[3] and y2 > b[1] for b in taken)
    ]
    chosen = clear[0] if clear else 0
    taken.append(boxes[chosen])
    return places[chosen]
