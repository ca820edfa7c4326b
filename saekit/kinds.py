"""The kinds of components, and the sections of a run file that hold them.

To add a kind, declare it here, add its hook to `hookspecs.py` and its section to `RunConfig` and `Variant` in
`config.py`. The plan, variants, overrides, the options of `saekit run`, completion and the JSON Schema follow from these.
Then say what its target must do in `protocols.py`, call it in `runner/sae_run.py` (training), `runner/measuring.py` (its results)
or `runner/run.py` (the whole run), check it in `testing/checks/`, and give `saekit new` a template in `cli/templates/`.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("architecture", "loss", "graph_builder", "metric", "analyzer", "comparison", "callback", "source", "tracker", "recipe")
"""Every kind of component, in the order of listings."""
HOOKS = {kind: f"saekit_{kind}es" if kind.endswith("s") else f"saekit_{kind}s" for kind in KINDS}
"""The declaring hook of each kind."""


@dataclass(frozen=True)
class Section:
    """A section of the run file that holds components.

    name: what it is called there.
    kind: the kind of its components.
    many: whether it is a list of entries.
    option, help: the option of `saekit run` that fills it.
    """

    name: str
    kind: str
    many: bool
    option: str
    help: str


SECTIONS = {
    section.name: section
    for section in (
        Section("source", "source", False, "--source", "Take activations from this source instead."),
        Section("architecture", "architecture", False, "--architecture", "Train this architecture instead."),
        Section("loss", "loss", True, "--loss", "Add a loss."),
        Section("graph", "graph_builder", False, "--graph", "Build this feature graph of the trained SAE."),
        Section("callback", "callback", True, "--callback", "Add a callback."),
        Section("metric", "metric", True, "--metric", "Add a metric."),
        Section("analyzer", "analyzer", True, "--analyze", "Add an analyzer."),
        Section("comparison", "comparison", True, "--comparison", "Add a comparison of the variants."),
        Section("tracker", "tracker", True, "--tracker", "Add a tracker."),
    )
}
"""The sections by name, in the order of the run file and of the plan."""
LISTS = tuple(name for name, section in SECTIONS.items() if section.many)
"""Sections with several entries, each of which has a name."""
SINGLES = tuple(name for name in SECTIONS if name not in LISTS)
"""Sections with one component."""
OF_THE_RUN = ("source", "comparison")
"""Sections that belong to the whole run; the others to each SAE that it trains."""


def article(kind: str) -> str:
    """`a loss`, `an analyzer`, `a graph builder`."""
    word = kind.replace("_", " ")
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
