"""`summary.json`: what the terminal shows at the end and what scripts read. Its keys are stable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saekit.files import to_jsonable
from saekit.runner.held_out import notes
from saekit.runner.provenance import plugins_used

if TYPE_CHECKING:
    from saekit.runner.run import Run
    from saekit.runner.sae_run import SAERun


def summarise(run: Run) -> dict[str, Any]:
    """The summary of a run whose phases are done. "variants" holds the summary of each variant by its name."""
    busy = run.seconds.get("train", 0.0) + run.seconds.get("harvest", 0.0)
    only = next((results_of(one) for one in run.sae_runs if not one.variant), None)
    return {
        **_named(run, run.directory.name, str(run.directory.path)),
        **_with_comparisons(run, only or _in_common(run.sae_runs)),
        "variants": {
            one.variant: {
                **_named(run, one.directory.name, str(one.directory.path)),
                **results_of(one),
                **_trained(run),
                "plugins": plugins_used(one.plan),
                "warnings": one.listeners.warnings,
            }
            for one in run.sae_runs
            if one.variant
        },
        **_trained(run),
        "seconds": {phase: round(seconds, 3) for phase, seconds in run.seconds.items()},
        "tokens_per_second": _speed(run, busy),
        "peak_memory_bytes": run.peak_memory,
        "plugins": plugins_used(run.plan),
        "warnings": run.listeners.warnings,
    }


def _speed(run: Run, busy: float) -> float | None:
    """Tokens per second of this process; those last logged if it only resumed a run whose training was over."""
    speed = run.tokens_this_time / busy if busy and run.tokens_this_time else run.sae_runs[0].last_speed
    return None if speed is None else round(speed, 1)


def _named(run: Run, name: str, directory: str) -> dict[str, Any]:
    return {
        "run": name,
        "recipe": run.config.recipe,
        "directory": directory,
        "model": run.plan.model,
        "hook_point": run.source.hook_point,
    }


def results_of(one: SAERun) -> dict[str, Any]:
    """The results of one SAE."""
    return {
        "sae": _sae(one),
        "graph": _graph(one),
        "metrics": one.metrics,
        "estimates": one.estimates,
        "headline": one.headline,
        "meanings": one.meanings,
        "held_out": one.held_out,
        "notes": notes(one.held_out),
        "analysis": one.analysis,
        "analysis_notes": one.analysis_notes,
        "failed": {key: str(error) for key, error in one.failed.items()},
        "losses": one.losses,
    }


def _with_comparisons(run: Run, results: dict[str, Any]) -> dict[str, Any]:
    """What was found with all SAEs of the run in view stands among the results at the top."""
    found = {label: to_jsonable(dict(result.scalars)) for label, result in run.compared.items()}
    told = {label: list(map(str, result.notes)) for label, result in run.compared.items()}
    failed = {key: str(error) for key, error in run.failed.items()}
    of_before = {part.label for part in run.plan.comparisons}  # in a run that is measured again
    kept = {key: {k: v for k, v in results[key].items() if k not in of_before} for key in ("analysis", "analysis_notes")}
    return results | {
        "analysis": kept["analysis"] | found,
        "analysis_notes": kept["analysis_notes"] | told,
        "failed": results["failed"] | failed,
    }


def _in_common(sae_runs: list[SAERun]) -> dict[str, Any]:
    """The same keys for a run of variants. It has no single SAE, so nothing may look as if it belonged to one."""
    saes = [_sae(one) for one in sae_runs]
    common = {key: value if all(sae[key] == value for sae in saes) else None for key, value in saes[0].items()}
    failed = {f"variant {one.variant!r}: {key}": str(error) for one in sae_runs for key, error in one.failed.items()}
    by_name = ("metrics", "estimates", "meanings", "held_out", "analysis", "analysis_notes", "losses")
    nothing: dict[str, Any] = {key: {} for key in by_name}
    return {"sae": common, "graph": None, "headline": [], "notes": [], **nothing, "failed": failed}


def _sae(one: SAERun) -> dict[str, Any]:
    name = one.plan.architecture.component.name
    return {"architecture": name, "d_in": one.sae.d_in, "d_sae": one.sae.d_sae, "calibrated": one.calibrated}


def _graph(one: SAERun) -> dict[str, Any] | None:
    graph = one.graph
    return None if graph is None else {"builder": graph.builder, "nodes": graph.nodes, "edges": graph.edge_index.shape[1]}


def _trained(run: Run) -> dict[str, Any]:
    return {"tokens": run.trained_tokens, "steps": run.trained_tokens // run.config.training.batch_size}
