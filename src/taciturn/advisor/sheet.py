"""The page of a study: one HTML file that opens offline, and one SVG with a panel for each setting.

Symbols: result as `study` makes it; a series has K ("steps"), excess with its standard error, prediction, bytes.
Colors are those of Okabe and Ito. Simulations are markers, predictions lines, published end values open diamonds.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any

from plotly.offline import get_plotlyjs

COLORS = {
    "none": "#8C8C8C",
    "quantization": "#D55E00",
    "sparsification": "#009E73",
    "sketch": "#CC79A7",
    "rand-h": "#E69F00",
    "PP": "#0072B2",
}
KINDS = {
    "exact": "exact recursion",
    "bound": "bound (Cauchy-Schwarz map; proved for a diagonal H)",
    "stand-in": "recursion for alike clients with the mean H",
    "asymptote": "Tr(C H^-1) / 2K",
    "uncompressed": "exact recursion without compression, which every codec meets once its memory has settled",
}
_STYLE = """:root{--ink:#1b222c;--page:#fff;--dim:#5a6675;--line:#d5dbe2}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e6eaef;--page:#14181e;--dim:#9fabb9;--line:#36404c}}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:76rem;margin:0 auto;padding:1.5rem 1.25rem 4rem}.dim{color:var(--dim);font-size:.9em;max-width:52rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(22rem,1fr));gap:1rem}.plot{height:24rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid var(--line)}th:first-child{text-align:left}
.main-svg :is(.xtick,.ytick,.g-xtitle,.g-ytitle,.legend) text{fill:var(--ink)!important}"""


def page(result: dict[str, Any]) -> str:
    """The whole page."""
    parts, figures = [], {}
    for key, title in result["titles"].items():
        rows = [one for one in result["series"] if one["setting"] == key]
        for axis in ("steps", "bytes"):
            figures[f"{key}-{axis}"] = _figure(rows, axis)
        plots = "".join(f'<div class="plot" id="{key}-{axis}"></div>' for axis in ("steps", "bytes"))
        kinds = sorted({one["prediction_kind"] for one in rows} & KINDS.keys())
        lines = "; ".join(f"{kind}: {KINDS[kind]}" for kind in kinds) or "none for this setting"
        replicas = rows[0]["replicas"]
        head = f"<h2>{html.escape(title)}</h2><p class='dim'>Mean of {replicas} replicas with two standard errors."
        parts.append(
            f"{head} Lines are predictions: {html.escape(lines)}.</p><div class='pair'>{plots}</div>{_table(rows)}"
        )
    data = json.dumps(figures).replace("<", "\\u003c")
    script = (
        'const f=JSON.parse(document.getElementById("figures").textContent);for(const k in f)'
        "Plotly.newPlot(k,f[k].data,f[k].layout,{responsive:true,displaylogo:false});"
    )
    intro = (
        "Excess F(w) - F(w*) of the mean of w_0 .. w_{K-1} of averaged compressed SGD on Gaussian least squares, against "
        "steps and against the bytes that one client has sent. Open diamonds: published end values (Philippenko &amp; "
        "Dieuleveut, JMLR 2024), at the K of the publication."
    )
    settings = html.escape(", ".join(f"{k} = {v}" for k, v in result["settings"].items()))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' "
        "content='width=device-width, initial-scale=1'><meta name='color-scheme' content='light dark'>"
        f"<title>Compressed least squares</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>Compressed averaged SGD on least squares</h1><p class='dim'>{intro}</p><p class='dim'>{settings}; "
        f"{result['seconds']} s.</p>{''.join(parts)}</main><script type='application/json' id='figures'>{data}</script>"
        f"<script>{get_plotlyjs()}</script><script>{script}</script></body></html>\n"
    )


def _figure(rows: Sequence[dict[str, Any]], axis: str) -> dict[str, Any]:
    """A plotly figure as a dict; axis "steps" or "bytes"."""
    data: list[dict[str, Any]] = []
    for one in rows:
        name, color = one["codec"], COLORS[one["codec"]]
        scale = 1.0 if axis == "steps" else one["bytes"]
        line = {"legendgroup": name, "line": {"color": color}, "marker": {"color": color, "size": 5}}
        bars = {"type": "data", "array": [2 * e for e in one["error"]], "thickness": 1, "width": 2}
        data.append(
            line
            | {"x": [k * scale for k in one["steps"]], "y": one["excess"], "name": name, "mode": "markers", "error_y": bars}
        )
        if one["prediction"]:
            x = [k * scale for k in one["prediction_steps"]]
            data.append(
                line | {"x": x, "y": one["prediction"], "name": f"{name}, theory", "mode": "lines", "showlegend": False}
            )
        end = one["published"]
        if end["log10"] is not None:
            mark = {"color": color, "size": 10, "symbol": "diamond-open"}
            hidden = {"name": f"{name}, published", "showlegend": False, "legendgroup": name, "mode": "markers"}
            data.append(hidden | {"x": [end["steps"] * scale], "y": [10 ** end["log10"]], "marker": mark})
    look = {"type": "log", "gridcolor": "rgba(128,128,128,.25)", "exponentformat": "power", "dtick": 1, "automargin": True}
    title = "steps K" if axis == "steps" else "bytes sent by a client"
    layout = {
        "template": "none", "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": look | {"title": {"text": title}}, "yaxis": look | {"title": {"text": "excess"}},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#888888", "activecolor": "#888888"},
        "legend": {"orientation": "h", "y": -0.2}, "margin": {"l": 30, "r": 10, "t": 10, "b": 30},
    }  # fmt: skip
    return {"data": data, "layout": layout}


def log10(value: float | None) -> str:
    """A power of ten with two digits, or a dash."""
    return "-" if value is None or not 0 < value < math.inf else f"{math.log10(value):.2f}"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    heads = (
        "codec",
        "omega",
        "bytes a step",
        "K",
        "log10 simulated",
        "predicted",
        "what",
        "published K",
        "predicted",
        "published",
    )
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for one in rows:
        end, known = one["published"], dict(zip(one["prediction_steps"], one["prediction"], strict=True))
        printed = "-" if end["log10"] is None else f"{end['log10']:.2f}"
        cells = (
            f"{one['omega']:.3g}", f"{one['bytes']:.4g}", f"{one['steps'][-1]}", log10(one["excess"][-1]),
            log10(known.get(one["steps"][-1])),
            one["prediction_kind"], f"{end['steps']}", log10(known.get(end["steps"])), printed,
        )  # fmt: skip
        lines.append(f"<tr><th>{html.escape(one['codec'])}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<div class='wide'><table>{''.join(lines)}</table></div>"


# ------------------------------------------------------------------------------------------------------------- picture

_WIDE, _HIGH, _LEFT, _TOP = 360, 250, 46, 26


def picture(result: dict[str, Any], keys: Sequence[str] = (), columns: int = 2) -> str:
    """An SVG with a panel of excess against steps for each setting (default: all)."""
    keys = keys or tuple(result["titles"])
    rows = -(-len(keys) // columns)
    panels = []
    for place, key in enumerate(keys):
        x, y = place % columns * _WIDE, place // columns * _HIGH
        rows_of = [one for one in result["series"] if one["setting"] == key]
        panels.append(f'<g transform="translate({x} {y})">{_panel(result["titles"][key], rows_of)}</g>')
    legend = "".join(
        f'<circle cx="{40 + 110 * i}" cy="0" r="4" fill="{color}"/>'
        f'<text x="{50 + 110 * i}" y="4">{html.escape(name)}</text>'
        for i, (name, color) in enumerate(COLORS.items())
    )
    high = rows * _HIGH + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * _WIDE} {high}" width="{columns * _WIDE}" '
        f'height="{high}" font-family="system-ui, sans-serif" font-size="11" fill="#222"><rect width="100%" height="100%" '
        f'fill="#fff"/>{"".join(panels)}<g transform="translate(0 {high - 14})">{legend}</g></svg>\n'
    )


def _panel(title: str, rows: Sequence[dict[str, Any]]) -> str:
    ends = [one["published"] for one in rows if one["published"]["log10"] is not None]
    values = [math.log10(v) for one in rows for v in (*one["excess"], *one["prediction"]) if 0 < v < math.inf]
    values += [end["log10"] for end in ends]
    low, high = max(-9, math.floor(min(values))), math.ceil(min(max(values), 4))
    first = math.log10(min(one["steps"][0] for one in rows))
    last = math.log10(max([one["steps"][-1] for one in rows] + [end["steps"] for end in ends]))
    width, height = _WIDE - _LEFT - 14, _HIGH - _TOP - 34

    def at(k: float, log: float) -> str:
        x = _LEFT + (math.log10(k) - first) / (last - first) * width
        return f"{x:.1f},{_TOP + (high - min(max(log, low), high)) / (high - low) * height:.1f}"

    drawn = [f'<text x="{_LEFT}" y="16" font-weight="600">{html.escape(title)}</text>']
    for power in range(math.ceil(first), math.floor(last) + 1):
        place = at(10.0**power, low).split(",")[0]
        drawn.append(f'<path d="M{place} {_TOP}v{height}" stroke="#ddd"/>')
        drawn.append(f'<text x="{place}" y="{_TOP + height + 14}" text-anchor="middle">1e{power}</text>')
    for power in range(low, high + 1):
        y = at(10.0**first, power).split(",")[1]
        drawn.append(f'<path d="M{_LEFT} {y}h{width}" stroke="#ddd"/>')
        drawn.append(f'<text x="{_LEFT - 5}" y="{float(y) + 4:.1f}" text-anchor="end">1e{power}</text>')
    drawn.append(f'<text x="{_LEFT + width / 2}" y="{_TOP + height + 28}" text-anchor="middle">steps K</text>')
    for one in rows:
        color = COLORS[one["codec"]]
        if one["prediction"]:
            pairs = zip(one["prediction_steps"], one["prediction"], strict=True)
            points = " ".join(at(k, math.log10(v)) for k, v in pairs if v < math.inf)
            drawn.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
        dots = [at(k, math.log10(v)) for k, v in zip(one["steps"], one["excess"], strict=True) if v > 10.0**low]
        drawn += ['<circle cx="{}" cy="{}" r="2.2" fill="{}"/>'.format(*dot.split(","), color) for dot in dots]
        end = one["published"]
        if end["log10"] is not None:
            x, y = at(end["steps"], end["log10"]).split(",")
            drawn.append(f'<path d="M{x} {y}m-5 0l5 -5l5 5l-5 5z" fill="none" stroke="{color}"/>')
    return "".join(drawn)
