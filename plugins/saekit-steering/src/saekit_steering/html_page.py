"""`feature_{k}_L{layer}_S{strength}.html`: f and g before and after, as one page that needs no network."""

from __future__ import annotations

import html
import json
from typing import Any

from saekit import content_policy, to_jsonable

SCRIPT = """
const spec = JSON.parse(document.getElementById("figures").textContent);
const chosen = document.getElementById("prompt");
function draw() {
  const shown = spec[chosen.value];
  Plotly.react("pooled", shown.pooled.data, shown.pooled.layout, {responsive: true});
  Plotly.react("tokens", shown.tokens.data, shown.tokens.layout, {responsive: true});
  document.getElementById("text").textContent = shown.text;
}
chosen.addEventListener("change", draw);
draw();
"""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
select { font: inherit; max-width: 100%; } pre { white-space: pre-wrap; background: #f4f4f4; padding: 1rem; }
"""


def html_page(document: dict[str, Any]) -> str:
    """The page of one strength, from its `steering_log`."""
    # Imported here: it is 4 MB of text.
    from plotly.offline import get_plotlyjs

    cases = document["saekit"]["prompts"]
    latent, strength = document["steering"]["feature_idx"], document["saekit"]["strength"]
    title = f"Latent {latent}, layer {document['layer_idx']}, strength {strength['given']:g} ({strength['unit']})"
    figures = [_figures(case, document["feature_stats"]["indices"]) for case in cases]
    options = "".join(
        f'<option value="{i}">{html.escape(case["kind"])}: {html.escape(_short(case["prompt"]))}</option>'
        for i, case in enumerate(cases)
    )
    scripts = [get_plotlyjs(), SCRIPT]
    # A "<" inside the JSON could end its element, and a model's text cannot be trusted.
    data = json.dumps(to_jsonable(figures), ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(content_policy(scripts))}">\n'
        f"<style>{STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n"
        f"<p>{html.escape(str(document['model']))}, {html.escape(document['saekit']['hook_point'])}. f: activations of the "
        "steered latent and its graph neighbours. g: f propagated over the graph. Read at the steered site, after the "
        f'edit.</p>\n<p><select id="prompt" aria-label="prompt">{options}</select></p>\n'
        '<div id="pooled"></div><div id="tokens"></div><pre id="text"></pre>\n'
        f'<script type="application/json" id="figures">{data}</script>\n'
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body></html>\n"
    )


def _figures(case: dict[str, Any], latents: list[int]) -> dict[str, Any]:
    """Both figures of a prompt, and its texts."""
    outputs = [
        f"{sampling}, {when}\n{text}\n"
        for sampling, pair in case["outputs"].items()
        for when, text in (("before", pair["before"]), ("after", pair["after"]))
    ]
    pooled, by_token = case["pooled"], case["by_token"]
    names = [n for n in ("f", "g") if pooled[f"{n}_before"] is not None]
    labels = [str(latent) for latent in latents]
    bars = [
        _trace("bar", f"{n} {when}", labels, pooled[f"{n}_{when}"], n == "g")
        for n in names
        for when in ("before", "after")
    ]
    places = [f"{i}: {_no_links(token)}" for i, token in enumerate(case["tokens"], start=1)]
    lines = [
        _trace("scatter", f"{n} {when}", places, [row[0] for row in by_token[f"{n}_{when}"]], n == "g")
        for n in names
        for when in ("before", "after")
    ]
    return {
        "pooled": {"data": bars, "layout": _layout("Mean over the prompt's positions", "latent", len(names))},
        "tokens": {"data": lines, "layout": _layout(f"Latent {latents[0]} by token", "token", len(names))},
        "text": f"{case['prompt']}\n\n" + "\n".join(outputs),
    }


def _trace(kind: str, name: str, x: list[str], y: list[float], second: bool) -> dict[str, Any]:
    mode = {"mode": "lines+markers"} if kind == "scatter" else {}
    axes = {"xaxis": "x2", "yaxis": "y2"} if second else {}
    return {"type": kind, "name": name, "x": x, "y": y, **mode, **axes}


def _layout(title: str, of: str, panels: int) -> dict[str, Any]:
    """Two panels side by side, f and g, or f alone."""
    axis = {"type": "category", "title": {"text": of}}
    layout: dict[str, Any] = {"title": {"text": title}, "xaxis": axis, "yaxis": {"title": {"text": "f"}}}
    if panels == 2:
        layout["xaxis"] = {**axis, "domain": [0, 0.46]}
        layout["xaxis2"] = {**axis, "domain": [0.54, 1], "anchor": "y2"}
        layout["yaxis2"] = {"title": {"text": "g"}, "anchor": "x2"}
    return layout


def _no_links(text: str) -> str:
    """Plotly interprets some markup in labels, links included."""
    return text.replace("<", "&lt;").replace("\n", "⏎")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:79] + "…"
