"""`summary.json`: what the terminal shows at the end and what scripts read. Its keys are stable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saekit.runner.provenance import plugins_used

if TYPE_CHECKING:
    from saekit.runner.sae_run import SAERun
    from saekit.runner.run import Run


def summarise(run: Run) -> dict[str, Any]:
    """The summary of a run whose phases are done. Under "variants" stands, by name, what each has as its own summary."""
    busy = run.seconds.get("train", 0.0) + run.seconds.get("harvest", 0.0)
    one = next((_of(member) for member in run.members if not member.variant), None)
    return {
        **_named(run, run.directory.name, str(run.directory.path)),
        **(one or _in_common(run.members)),
        "variants": {
            member.variant: {
                **_named(run, member.directory.name, str(member.directory.path)),
                **_of(member),
                **_trained(run),
                "plugins": plugins_used(member.plan),
                "warnings": member.listeners.warnings,
            }
            for member in run.members
            if member.variant
        },
        **_trained(run),
        "seconds": {phase: round(seconds, 3) for phase, seconds in run.seconds.items()},
        "tokens_per_second": round(run.tokens_this_time / busy, 1) if busy and run.trained_tokens else None,
        "peak_memory_bytes": run.peak_memory,
        "plugins": plugins_used(run.plan),
        "warnings": run.listeners.warnings,
    }


def _named(run: Run, name: str, directory: str) -> dict[str, Any]:
    return {
        "run": name,
        "recipe": run.config.recipe,
        "directory": directory,
        "model": run.plan.model,
        "hook_point": run.source.hook_point,
    }


def _of(member: SAERun) -> dict[str, Any]:
    """What one SAE came to."""
    return {
        "sae": _sae(member),
        "graph": _graph(member),
        "metrics": member.metrics,
        "headline": member.headline,
        "meanings": member.meanings,
        "analysis": member.analysis,
        "losses": member.losses,
    }


def _in_common(members: list[SAERun]) -> dict[str, Any]:
    """The same keys for a run of variants: it has no SAE of its own, so nothing may look as if it were one's."""
    saes = [_sae(member) for member in members]
    common = {key: value if all(sae[key] == value for sae in saes) else None for key, value in saes[0].items()}
    return {"sae": common, "graph": None, "metrics": {}, "headline": [], "meanings": {}, "analysis": {}, "losses": {}}


def _sae(member: SAERun) -> dict[str, Any]:
    name = member.plan.architecture.component.name
    return {"architecture": name, "d_in": member.sae.d_in, "d_sae": member.sae.d_sae}


def _graph(member: SAERun) -> dict[str, Any] | None:
    graph = member.graph
    return None if graph is None else {"builder": graph.builder, "nodes": graph.nodes, "edges": graph.edge_index.shape[1]}


def _trained(run: Run) -> dict[str, Any]:
    return {"tokens": run.trained_tokens, "steps": run.plan.total_steps}
