"""Self-contained HTML pages: pictures in a grid, gate decisions with highlighted tokens, tables."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from itd.explain import Check

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2430;background:#fafafa;max-width:1180px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{margin-top:2.4rem;border-bottom:1px solid #ccd;padding-bottom:.2rem}
h3{margin:1.4rem 0 .4rem;font-size:1.05rem}p.lead{color:#555;margin-top:0}
table{border-collapse:collapse;background:#fff;margin:.6rem 0}th,td{border:1px solid #dde;padding:.3rem .7rem;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}th{background:#f0f2f6;font-weight:600}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(212px,1fr));gap:.7rem}
figure{margin:0;background:#fff;border:1px solid #dde;border-radius:6px;padding:.5rem}
figure.fired{border-color:#c0392b}figure .pair{display:flex;gap:.4rem}figure img{width:96px;height:96px;image-rendering:pixelated;display:block}
figcaption{font-size:.82rem;margin-top:.35rem}.tag{font-size:.75rem;border-radius:3px;padding:0 .35rem}
.tag.fired{background:#c0392b;color:#fff}.tag.same{background:#e3f3e6;color:#1c6b2c}.said{color:#666;font-size:.76rem}
.token{border-radius:3px;padding:0 .1rem}code{background:#eef;padding:0 .25rem;border-radius:3px}
.plots{display:flex;flex-wrap:wrap;gap:.8rem}svg.plot{width:460px;max-width:100%;background:#fff;border:1px solid #dde;border-radius:6px}
svg.plot text{font-size:11px}svg.plot .title{font-size:13px;font-weight:600;fill:#1d2430}svg.plot .tick{stroke:#e6e8ee}
"""


def page(title: str, lead: str, sections: Iterable[str]) -> str:
    """Return a whole page; nothing in it is loaded from elsewhere."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>{"".join(sections)}</body></html>\n'
    )


def section(title: str, *parts: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(title)}</h{level}>{''.join(parts)}"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with one row per mapping; numbers are right-aligned."""
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(str(key))}</th>" for key in rows[0])
    body = "".join("<tr>" + "".join(cell(row.get(key, "")) for key in rows[0]) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="n">{value:.4g}</td>'
    return f"<td{' class=n' if isinstance(value, int) else ''}>{html.escape(str(value))}</td>"


def picture(pixels: Any, alt: str) -> str:
    """Return an image element that carries the picture; `pixels`: (h, w, 3) uint8."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" title="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def highlighted(check: Check) -> str:
    """Return the prompt's tokens, the more reddish the closer their score comes to the threshold."""
    spans = []
    for token, value in check.tokens:
        share = min(max(value / check.threshold if check.threshold > 0 else 0.0, 0.0), 1.0)
        shade = f"background:rgba(192,57,43,{0.65 * share:.2f})" if share > 0.15 else ""
        spans.append(f'<span class="token" style="{shade}" title="{value:.3f}">{html.escape(token)}</span>')
    return " ".join(spans)


def before_after(before: Any, after: Any, check: Check, said: tuple[tuple[str, str], tuple[str, str]], same: bool) -> str:
    """Return a figure: picture before and after, the gate's decision, what the judge sees."""
    tag = '<span class="tag fired">erased</span>' if check.fired else '<span class="tag same">passed</span>'
    bits = " bit-identical" if same else ""
    seen = " &rarr; ".join(html.escape(", ".join(view)) for view in said)
    return (
        f'<figure class="{"fired" if check.fired else ""}"><div class="pair">{picture(before, "before")}{picture(after, "after")}</div>'
        f"<figcaption>{highlighted(check)}<br>{tag} score {check.score:.2f} / {check.threshold:.2f}{bits}"
        f'<div class="said">{seen}</div></figcaption></figure>'
    )


def grid(figures: Iterable[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def plain_pair(before: Any, after: Any, caption: str, fired: bool, same: bool) -> str:
    """Return a figure: picture before and after, what was asked for, and the gate's decision."""
    tag = '<span class="tag fired">erased</span>' if fired else '<span class="tag same">passed</span>'
    return (
        f'<figure class="{"fired" if fired else ""}"><div class="pair">{picture(before, "before")}{picture(after, "after")}</div>'
        f"<figcaption>{html.escape(caption)}<br>{tag}{' bit-identical' if same else ''}</figcaption></figure>"
    )
