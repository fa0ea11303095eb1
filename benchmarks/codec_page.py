"""Write docs/codec.md and its curves, docs/codec/NET.svg, from benchmarks/results/codec-*.json.

python benchmarks/codec_page.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "codec.md"
TITLES = {
    "lenet_300_100": "LeNet-300-100, Fashion-MNIST",
    "lenet_5": "LeNet-5, Fashion-MNIST",
    "small_resnet": "Small residual network, Fashion-MNIST",
    "digits_lstm": "LSTM, digits row by row",
    "efficientnet_lite0": "EfficientNet-Lite0, photographs",
    "minilm": "MiniLM (all-MiniLM-L6-v2), docstrings",
}
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 320, 64, 44, 28, 16
COLOURS = {"pared": "#0b7285", "nncodec": "#c2255c"}

INTRODUCTION = """\
[quantize.rate_distortion](techniques/quantize.rate_distortion.md) without any training, beside nncodec 2.1.3, the reference
software of ISO/IEC 15938-17, with dependent quantization and parameter optimisation on, its qp swept with and without `opt_qp`.
Both code the same weights and are measured by the same function. pared's bytes are the whole file, program included; nncodec's
are its bitstream. Bytes at equal quality are read off each codec's best points, in the logarithm of bytes between neighbours.
EfficientNet-Lite0 is calibrated on 64 views of each of 18 photographs and measured on as many of 18 others.
To run it: `python benchmarks/codec.py --peer PYTHON`."""


def best(rows: list[dict[str, float]]) -> list[tuple[float, float]]:
    """The codec's best points: bytes and quality, both rising."""
    found: list[tuple[float, float]] = []
    for size, quality in sorted((row["bytes"], row["quality"]) for row in rows):
        if not found or quality > found[-1][1]:
            found.append((size, quality))
    return found


def svg(net: dict[str, Any]) -> str:
    curves = {codec: best(net[codec]) for codec in COLOURS}
    lowest = min(level["quality"] for level in net["levels"])
    lowest -= net["original"] - lowest
    shown = {codec: [p for p in points if p[1] >= lowest] or points[-1:] for codec, points in curves.items()}
    sizes = [size for points in shown.values() for size, _ in points]
    left, right = math.log(min(sizes)) - 0.1, math.log(max(sizes)) + 0.1
    top = max(net["original"], *(q for points in shown.values() for _, q in points))
    top += 0.05 * (top - lowest)

    def x(size: float) -> float:
        return LEFT + (math.log(size) - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def y(quality: float) -> float:
        return TOP + (top - quality) / (top - lowest) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f"<title>{TITLES[net['net']]}: {net['measure']} over bytes</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="16" fill="#222">{net["measure"]}</text>',
    ]
    tick = 10.0 ** math.floor(math.log10(min(sizes)))
    while tick < math.exp(right):
        for factor in (1, 2, 5):
            if left <= math.log(tick * factor) <= right:
                at = x(tick * factor)
                parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#e3e3e3"/>')
                label = f"{tick * factor / 1e3:g} kB" if tick * factor < 1e6 else f"{tick * factor / 1e6:g} MB"
                parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" fill="#444">{label}</text>')
        tick *= 10
    step = 10.0 ** math.floor(math.log10(top - lowest))
    step = step / 2 if (top - lowest) / step < 3 else step
    quality = math.ceil(lowest / step) * step
    while quality <= top:
        at = y(quality)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end" fill="#444">{quality:.4g}</text>')
        quality += step
    at = y(net["original"])
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#222" stroke-dasharray="4 4"/>')
    for number, (codec, colour) in enumerate(COLOURS.items()):
        points = " ".join(f"{x(size):.1f},{y(quality):.1f}" for size, quality in shown[codec])
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(s):.1f}" cy="{y(q):.1f}" r="3" fill="{colour}"/>' for s, q in shown[codec]]
        parts.append(f'<text x="{WIDTH - RIGHT - 70}" y="{HEIGHT - BOTTOM - 12 - 16 * number}" fill="{colour}">{codec}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def bytes_words(size: float | None) -> str:
    return "outside of its curve" if size is None else f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:.2f} MB"


def page(nets: list[dict[str, Any]], integers: dict[str, Any] | None) -> str:
    lines = [
        "# Beside nncodec",
        "",
        "<!-- written by benchmarks/codec_page.py from benchmarks/results/codec-*.json -->",
        "",
        *INTRODUCTION.splitlines(),
        "",
        "| network | quality | pared | nncodec | fewer bytes |",
        "|---|---|---|---|---|",
    ]
    for net in nets:
        for level in net["levels"]:
            fewer = f"{100 * (1 - level['ratio']):.0f} %" if level["ratio"] else ""
            lines.append(
                f"| {TITLES[net['net']]} | {level['quality']:.4g} (original {net['original']:.4g}): {net['measure']} | "
                f"{bytes_words(level['pared'])} | {bytes_words(level['nncodec'])} | {fewer} |"
            )
    if integers:
        total = integers["total"]
        speed = {
            coder: f"encodes {total['nncodec']['encode_s'] / total[coder]['encode_s']:.1f}, decodes "
            f"{total['nncodec']['decode_s'] / total[coder]['decode_s']:.1f} times as fast"
            for coder in ("context", "rans")
        }
        lines += [
            "",
            f"The arithmetic coders alone, on the same {integers['tensors']} tensors of integers: `context` takes "
            f"{integers['mean_ratio']['context']:.3f} of nncodec's bytes",
            f"(geometric mean) and {speed['context']}; `rans` takes "
            f"{total['rans']['bytes'] / total['nncodec']['bytes']:.3f} of its bytes (all together) and {speed['rans']}.",
        ]
    for net in nets:
        lines += ["", f"![{TITLES[net['net']]}](codec/{net['net']}.svg)"]
    return "\n".join(lines) + "\n"


def main() -> None:
    found = {path.stem.removeprefix("codec-"): json.loads(path.read_text()) for path in sorted(RESULTS.glob("codec-*.json"))}
    nets = [found[name] for name in TITLES if name in found]
    folder = ROOT / "docs" / "codec"
    folder.mkdir(exist_ok=True)
    for net in nets:
        (folder / f"{net['net']}.svg").write_text(svg(net), encoding="utf-8")
    PAGE.write_text(page(nets, found.get("integers")), encoding="utf-8")


if __name__ == "__main__":
    main()
