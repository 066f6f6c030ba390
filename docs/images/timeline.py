#!/usr/bin/env python3
"""Draws part of a trace of `halite estimate --trace` as an SVG timeline. Needs Python 3 only.

    halite estimate -m llama-3-8b -p maia-100 --batch 8 --prompt 2048 --generate 256 --trace step.json --roofline roofline.svg
    docs/images/timeline.py step.json timeline.svg --segment blk.1 --title "llama-3-8b (Q4_0) on maia-100: layer 1 of a decode step, batch 8"

These two commands made the pictures in this folder.

The first lane shows the ops of the step, coloured by what limits them. Below it, each tile has a lane for each of its queues.
`--segment` selects one segment of the program (a layer is `blk.N`); `--from` and `--to` select a range in microseconds instead.
"""

import argparse
import json
import sys
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT = 980, 92, 54
OP_HEIGHT, LANE_HEIGHT, GAP = 92, 24, 4
INK, FAINT, LINE = "#1f2933", "#5f6b7a", "#c9d1da"
BOUND = {"matrix": "#0072b2", "vector": "#e69f00", "memory": "#009e73", "dma": "#cc79a7", "launch": "#d55e00",
         "latency": "#9aa5b1"}
COMMAND = {"load": "#4c9ed9", "store": "#8250c4", "product": "#d1495b", "convert": "#f2b134", "rows": "#7a9e3b",
           "softmax or unpack": "#e07b39"}
SPARE = ["#6c757d", "#2a9d8f", "#b56576", "#457b9d"]


def text(x, y, content, size=12, anchor="start", fill=INK, extra=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{extra}>{escape(content)}</text>'


def step_of_axis(length):
    """The distance between ticks, from 1, 2 or 5 times a power of ten, that gives at most eleven intervals."""
    return next(m * 10.0**e for e in range(-3, 12) for m in (1, 2, 5) if length <= 11 * m * 10.0**e)


def draw(events, names, threads, first, last, title, tiles):
    scale = (WIDTH - LEFT - RIGHT) / (last - first)
    at = lambda us: LEFT + (us - first) * scale
    inside = [e for e in events if e["ts"] < last and e["ts"] + e["dur"] > first]
    out, y = [], 16
    if title:
        out.append(text(WIDTH / 2, y + 6, title, 16, "middle"))
        y += 26

    # Legends.
    spare = iter(SPARE)
    commands = {e["name"] for e in inside if e["pid"]}
    bounds = [e["args"]["bound"] for e in inside if not e["pid"]]
    colour = {name: COMMAND.get(name) or next(spare, INK) for name in sorted(commands)}
    rows = [("op limited by", [(b, BOUND.get(b, INK)) for b in BOUND if b in bounds]), ("command", list(colour.items()))]
    for what, entries in rows:
        x = LEFT
        out.append(text(LEFT - 8, y + 10, what, 12, "end", FAINT))
        for name, fill in entries:
            out.append(f'<rect x="{x:.1f}" y="{y}" width="12" height="12" fill="{fill}"/>')
            out.append(text(x + 17, y + 10.5, name))
            x += 36 + 7 * len(name)
        y += 20
    y += 6
    top = y

    # Ops.
    out.append(text(LEFT - 8, y + OP_HEIGHT / 2 + 4, "ops", 12, "end"))
    borders = []
    for e in (e for e in inside if not e["pid"]):
        left, right = max(at(e["ts"]), LEFT), min(at(e["ts"] + e["dur"]), WIDTH - RIGHT)
        borders.append(right)
        fill = BOUND.get(e["args"]["bound"], INK)
        out.append(f'<rect x="{left:.1f}" y="{y}" width="{max(right - left, 0.5):.1f}" height="{OP_HEIGHT}" fill="{fill}" '
                   f'fill-opacity="0.35" stroke="{fill}"><title>{escape(e["name"])}: {e["dur"]:.1f} us, {e["args"]["bound"]}</title></rect>')
        name = e["name"].removeprefix("MatMul ")
        middle, room = (left + right) / 2, right - left
        if room > 6.6 * len(name) + 6:
            out.append(text(middle, y + OP_HEIGHT / 2 - 2, name, 12, "middle"))
            out.append(text(middle, y + OP_HEIGHT / 2 + 13, f'{e["dur"]:.1f} µs', 11, "middle", FAINT))
        elif room > 11:
            x, middle = middle + 4, y + OP_HEIGHT / 2
            out.append(text(x, middle, name, 12, "middle", extra=f' transform="rotate(-90 {x:.1f} {middle:.1f})"'))
    y += OP_HEIGHT + 12

    # Lanes of commands. Neighbours of one colour that no pixel separates are one rectangle.
    for pid in tiles:
        of_tile = [e for e in inside if e["pid"] == pid]
        start = y
        for tid, lane in sorted(threads.get(pid, {}).items()):
            out.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - RIGHT}" height="{LANE_HEIGHT}" fill="#f3f5f7"/>')
            busy, paths, previous = 0.0, {}, None
            for e in sorted((e for e in of_tile if e["tid"] == tid), key=lambda e: e["ts"]):
                begin, end = max(e["ts"], first), min(e["ts"] + e["dur"], last)
                busy += end - begin
                left, right = at(begin), max(at(end), at(begin) + 0.4)
                if previous and previous[0] == e["name"] and left - previous[2] < 0.15:
                    previous[2] = right
                    continue
                previous = [e["name"], left, right]
                paths.setdefault(e["name"], []).append(previous)
            for name, spans in paths.items():
                d = "".join(f"M{a:.1f} {y + 2}H{b:.1f}v{LANE_HEIGHT - 4}H{a:.1f}z" for _, a, b in spans)
                out.append(f'<path d="{d}" fill="{colour[name]}"/>')
            out.append(text(LEFT - 8, y + 16, lane, 12, "end"))
            out.append(text(WIDTH - RIGHT + 6, y + 16, f"{100 * busy / (last - first):.0f} %", 12, fill=FAINT))
            y += LANE_HEIGHT + GAP
        out.append(text(14, (start + y) / 2, names.get(pid, str(pid)), 12, "middle", FAINT,
                        f' transform="rotate(-90 14 {(start + y) / 2:.1f})"'))
        y += 8
    out.append(text(WIDTH - RIGHT + 6, top + OP_HEIGHT + 6, "busy", 11, fill=FAINT))
    for x in borders:
        out.append(f'<path d="M{x:.1f} {top + OP_HEIGHT}V{y - 8}" stroke="{LINE}" stroke-dasharray="2 3"/>')

    # The axis counts from the start of the part that is drawn.
    out.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="{INK}"/>')
    tick, step = 0.0, step_of_axis(last - first)
    while tick <= last - first:
        x = at(first + tick)
        out.append(f'<path d="M{x:.1f} {y}v5" stroke="{INK}"/>')
        out.append(text(x, y + 18, f"{tick:g}", 12, "middle"))
        tick += step
    out.append(text((LEFT + WIDTH - RIGHT) / 2, y + 36, "simulated time, µs", 12, "middle"))
    y += 46
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" width="{WIDTH}" height="{y:.0f}" '
            f'font-family="sans-serif">\n<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(out) + "\n</svg>\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("svg")
    parser.add_argument("--segment", help="draw this segment of the program, such as blk.0")
    parser.add_argument("--from", dest="first", type=float, help="start, in microseconds")
    parser.add_argument("--to", dest="last", type=float, help="end, in microseconds")
    parser.add_argument("--tiles", type=int, default=1, help="how many tiles to draw (default: 1)")
    parser.add_argument("--title", default="")
    args = parser.parse_args()

    with open(args.trace, encoding="utf-8") as file:
        trace = json.load(file)
    events = [e for e in trace if e["ph"] == "X"]
    names = {e["pid"]: e["args"]["name"] for e in trace if e["name"] == "process_name"}
    threads = {}
    for e in trace:
        if e["name"] == "thread_name":
            threads.setdefault(e["pid"], {})[e["tid"]] = e["args"]["name"]

    chosen = [e for e in events if not e["pid"] and args.segment in (None, e["cat"])]
    if not chosen:
        sys.exit(f"{args.trace} has no segment {args.segment}; it has {', '.join(dict.fromkeys(e['cat'] for e in events if not e['pid']))}")
    first = min(e["ts"] for e in chosen) if args.first is None else args.first
    last = max(e["ts"] + e["dur"] for e in chosen) if args.last is None else args.last
    if first >= last:
        sys.exit(f"the range from {first} to {last} us is empty")
    svg = draw(events, names, threads, first, last, args.title, sorted(p for p in names if p)[: args.tiles])
    with open(args.svg, "w", encoding="utf-8") as file:
        file.write(svg)


if __name__ == "__main__":
    main()
