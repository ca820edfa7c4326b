"""saekit: train sparse autoencoders on the activations of neural networks, and ask questions of what they found.

Everything public stands here; each name is imported from its module when it is first used, so that `import saekit`
costs nothing and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saekit.activations.batch import Activations as Activations
    from saekit.activations.batch import SequenceBatch as SequenceBatch
    from saekit.activations.batch import TokenBatch as TokenBatch
    from saekit.activations.huggingface import load_subject as load_subject
    from saekit.activations.sites import hook_points as hook_points
    from saekit.activations.subject import Subject as Subject
    from saekit.api import run as run
    from saekit.commands import Command as Command
    from saekit.compatibility import CONTRACT as CONTRACT
    from saekit.component import Component as Component
    from saekit.component_option import ComponentOption as ComponentOption
    from saekit.component_option import OfKind as OfKind
    from saekit.errors import ComponentError as ComponentError
    from saekit.errors import OptionError as OptionError
    from saekit.errors import SaekitError as SaekitError
    from saekit.errors import UsageError as UsageError
    from saekit.files import to_jsonable as to_jsonable
    from saekit.files import write_json as write_json
    from saekit.files import write_text as write_text
    from saekit.graph import FeatureGraph as FeatureGraph
    from saekit.hookspecs import hookimpl as hookimpl
    from saekit.interventions.attach import Attachment as Attachment
    from saekit.interventions.attach import Mode as Mode
    from saekit.interventions.attach import attach as attach
    from saekit.interventions.attach import attach_all as attach_all
    from saekit.interventions.attach import read as read
    from saekit.interventions.downstream import ensure_downstream as ensure_downstream
    from saekit.interventions.edits import Edit as Edit
    from saekit.interventions.edits import ablate as ablate
    from saekit.interventions.edits import add as add
    from saekit.interventions.edits import clamp as clamp
    from saekit.interventions.edits import latent_statistics as latent_statistics
    from saekit.interventions.edits import scale as scale
    from saekit.interventions.edits import set_to as set_to
    from saekit.interventions.generation import GeneratedPair as GeneratedPair
    from saekit.interventions.generation import paired_generation as paired_generation
    from saekit.interventions.replay import Recording as Recording
    from saekit.interventions.replay import Replay as Replay
    from saekit.interventions.replay import own_forward as own_forward
    from saekit.memory import is_out_of_memory as is_out_of_memory
    from saekit.numerics import own_numerics as own_numerics
    from saekit.numerics import seeded as seeded
    from saekit.plugins import Registry as Registry
    from saekit.plugins import named_function as named_function
    from saekit.protocols import RunInfo as RunInfo
    from saekit.protocols import Training as Training
    from saekit.report.write import content_policy as content_policy
    from saekit.result import Result as Result
    from saekit.runner.context import RunContext as RunContext
    from saekit.runner.examples import top_examples as top_examples
    from saekit.sae.base import SparseAutoencoder as SparseAutoencoder
    from saekit.sae.code import Code as Code
    from saekit.sae.code import DenseCode as DenseCode
    from saekit.sae.code import SparseCode as SparseCode
    from saekit.sae.formats import load_sae as load_sae
    from saekit.sae.formats import save_sae as save_sae
    from saekit.sae.kernels import Pattern as Pattern
    from saekit.sae.saelens_format import SaeLensFormat as SaeLensFormat
    from saekit.training.step import Step as Step

_HOME = {
    "Activations": "saekit.activations.batch",
    "SequenceBatch": "saekit.activations.batch",
    "TokenBatch": "saekit.activations.batch",
    "load_subject": "saekit.activations.huggingface",
    "hook_points": "saekit.activations.sites",
    "Subject": "saekit.activations.subject",
    "run": "saekit.api",
    "ComponentOption": "saekit.component_option",
    "OfKind": "saekit.component_option",
    "Command": "saekit.commands",
    "Component": "saekit.component",
    "ComponentError": "saekit.errors",
    "OptionError": "saekit.errors",
    "SaekitError": "saekit.errors",
    "UsageError": "saekit.errors",
    "to_jsonable": "saekit.files",
    "write_json": "saekit.files",
    "write_text": "saekit.files",
    "FeatureGraph": "saekit.graph",
    "hookimpl": "saekit.hookspecs",
    "Attachment": "saekit.interventions.attach",
    "Mode": "saekit.interventions.attach",
    "attach": "saekit.interventions.attach",
    "attach_all": "saekit.interventions.attach",
    "read": "saekit.interventions.attach",
    "Edit": "saekit.interventions.edits",
    "ablate": "saekit.interventions.edits",
    "add": "saekit.interventions.edits",
    "clamp": "saekit.interventions.edits",
    "latent_statistics": "saekit.interventions.edits",
    "scale": "saekit.interventions.edits",
    "set_to": "saekit.interventions.edits",
    "GeneratedPair": "saekit.interventions.generation",
    "paired_generation": "saekit.interventions.generation",
    "ensure_downstream": "saekit.interventions.downstream",
    "Recording": "saekit.interventions.replay",
    "Replay": "saekit.interventions.replay",
    "own_forward": "saekit.interventions.replay",
    "is_out_of_memory": "saekit.memory",
    "own_numerics": "saekit.numerics",
    "seeded": "saekit.numerics",
    "Registry": "saekit.plugins",
    "named_function": "saekit.plugins",
    "RunInfo": "saekit.protocols",
    "Training": "saekit.protocols",
    "content_policy": "saekit.report.write",
    "Result": "saekit.result",
    "RunContext": "saekit.runner.context",
    "top_examples": "saekit.runner.examples",
    "SparseAutoencoder": "saekit.sae.base",
    "Code": "saekit.sae.code",
    "DenseCode": "saekit.sae.code",
    "SparseCode": "saekit.sae.code",
    "Pattern": "saekit.sae.kernels",
    "SaeLensFormat": "saekit.sae.saelens_format",
    "load_sae": "saekit.sae.formats",
    "save_sae": "saekit.sae.formats",
    "CONTRACT": "saekit.compatibility",
    "Step": "saekit.training.step",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'saekit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
