"""A whole training, harvest included, beside sae_lens's `LanguageModelSAETrainingRunner`: same model, text, width, k.

Both get the same rows of tokens from one model directory, the same learning rate schedule, and train on as many
activations. Loading, evaluation and analysis are not counted on either side. Both SAEs are then measured on the
activations of the same held-out documents.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.api import start
from saekit.errors import UsageError
from saekit.plugins import Registry
from saekit.runner.plan import RunPlan
from saekit.sae.formats import load_sae
from saekit.schedules import extreme_steps, value_at
from saekit_bench.parity import Reconstruct, of_sae_lens, of_saekit, quality
from saekit_bench.peers import sae_lens_config

HELD_OUT = 50_000
"""How many held-out activations both are measured on."""


def time_training(plan: RunPlan, registry: Registry, *, peers: bool) -> dict[str, Any]:
    """Tokens per second of `plan` (one SAE on a source that reads tokens), and of sae_lens on the same."""
    training = plan.config.training
    with tempfile.TemporaryDirectory() as directory:
        run = start(plan, registry, str(Path(directory) / "run"), None)
        seconds = run.summary["seconds"]
        trained_in = seconds["train"] + seconds.get("harvest", 0.0)
        sae = load_sae(run.directory / "sae")
    source = plan.members[0].build_source()
    source.open(device=torch.device("cpu"), dtype=torch.float32)
    held_out = torch.cat([block.x for block in source.blocks("held_out", size=HELD_OUT, seed=0)])[:HELD_OUT]
    trained = plan.total_steps * training.batch_size
    sides = {"saekit": {**_measured(of_saekit(sae), held_out), **_speed(trained, trained_in)}}
    if peers:
        sides["sae_lens"] = _sae_lens(plan, source, held_out)
    return {
        "architecture": plan.members[0].architecture.component.name,
        "d_in": held_out.shape[1],
        "d_sae": sae.d_sae,
        "batch": training.batch_size,
        "activations": trained,
        **sides,
        "threads": torch.get_num_threads(),
    }


def _speed(tokens: int, seconds: float) -> dict[str, float]:
    return {"seconds": seconds, "tokens_per_second": tokens / seconds}


def _measured(reconstruct: Reconstruct, held_out: Tensor) -> dict[str, float]:
    explained, l0 = quality(reconstruct, held_out)
    return {"explained_variance": explained, "l0": l0}


def _sae_lens(plan: RunPlan, source: Any, held_out: Tensor) -> dict[str, float]:
    from datasets import Dataset
    from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig

    training, site = plan.config.training, source.subject.site
    if site.side != "output":
        raise UsageError("source.hook_point: is the input of a module, which sae_lens cannot read. Choose an output.")
    hook = next(name for name, module in source.subject.model.named_modules() if module is site.module)
    peak = value_at(training.lr, extreme_steps(training.lr, plan.total_steps)[1], plan.total_steps)
    name, d_sae = plan.members[0].architecture.component.name, plan.config.architecture.d_sae
    assert d_sae is not None
    kept = {key: value for key, value in plan.members[0].architecture.options.items() if key == "k"}
    options = {**kept, "normalize_activations": "expected_average_only_in"}
    rows = [
        row for batch in source.token_batches("train", rows=256) for row in batch.tokens[batch.mask.all(1)].tolist()
    ]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(io.StringIO()):
        config = LanguageModelSAERunnerConfig(
            sae=sae_lens_config(name, options, held_out.shape[1], d_sae, "cpu"),
            model_class_name="AutoModelForCausalLM",
            model_name=str(source.subject.directory),
            hook_name=hook,
            dataset_path="rows",
            streaming=False,
            is_dataset_tokenized=True,
            context_size=source.context,
            prepend_bos=False,  # the rows have one already
            seqpos_slice=(1, None) if source.drop_first else (None,),
            training_tokens=plan.total_steps * training.batch_size,
            train_batch_size_tokens=training.batch_size,
            store_batch_size_prompts=32,
            n_batches_for_norm_estimate=8,
            lr=peak,
            lr_warm_up_steps=100,
            lr_decay_steps=plan.total_steps // 5,
            lr_end=peak,
            dead_feature_window=max(1, training.dead_after // training.batch_size),
            seed=training.seed,
            checkpoint_path=None,
            output_path=None,
            verbose=False,
            logger=LoggingConfig(log_to_wandb=False),
        )
        runner = LanguageModelSAETrainingRunner(
            config, override_dataset=Dataset.from_dict({"tokens": [rows[i] for i in order]})
        )
        began = time.perf_counter()
        trained = runner.run()
        seconds = time.perf_counter() - began
        trained.save_inference_model(directory)
        saved = SAE.load_from_disk(directory)
    return {**_measured(of_sae_lens(saved), held_out), **_speed(config.training_tokens, seconds)}
