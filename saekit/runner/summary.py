"""`summary.json`: what the terminal shows at the end and what scripts read. Its keys are stable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saekit.runner.provenance import plugins_used

if TYPE_CHECKING:
    from saekit.runner.run import Run


def summarise(run: Run) -> dict[str, Any]:
    """The summary of a run whose phases are done."""
    plan = run.plan
    busy = run.seconds.get("train", 0.0) + run.seconds.get("harvest", 0.0)
    return {
        "run": run.directory.path.name,
        "recipe": plan.config.recipe,
        "directory": str(run.directory.path),
        "model": plan.model,
        "hook_point": run.source.hook_point,
        "sae": {"architecture": plan.architecture.component.name, "d_in": run.sae.d_in, "d_sae": run.sae.d_sae},
        "metrics": run.metrics,
        "headline": run.headline,
        "meanings": run.meanings,
        "analysis": run.analysis,
        "losses": run.losses,
        "tokens": run.trained_tokens,
        "steps": plan.total_steps,
        "seconds": {phase: round(seconds, 3) for phase, seconds in run.seconds.items()},
        "tokens_per_second": round(run.tokens_this_time / busy, 1) if busy and run.trained_tokens else None,
        "peak_memory_bytes": run.peak_memory,
        "plugins": plugins_used(plan),
        "warnings": run.listeners.warnings,
    }
