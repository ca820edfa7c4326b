"""Whole runs that take a second, on known directions or on a tiny random language model, without a download."""

from __future__ import annotations

import atexit
import contextlib
import copy
import dataclasses
import functools
import io
import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.plugins import Registry
from saekit.registered import RegisteredComponent
from saekit.result import Result
from saekit.run_directory import RunDirectory
from saekit.runner.context import RunContext
from saekit.runner.plan import GRAPH, RunPlan, SAEPlan
from saekit.testing.fixtures import CONCEPTS, D_IN, D_SAE, few_active
from saekit.testing.kit import NotApplicable

if TYPE_CHECKING:
    from torch import nn

    from saekit.runner.comparison import ComparisonContext
    from saekit.sae.base import SparseAutoencoder

STEPS, BATCH = 12, 32
_WORDS = ("harbour", "lamp", "winter", "salt", "copper", "bridge", "meadow", "clock")


@dataclass(frozen=True)
class TinyRun:
    """A finished run. directory: where its files are. summary: the content of `summary.json`. plan: what was done."""

    directory: Path
    summary: dict[str, Any]
    plan: RunPlan
    registry: Registry

    @cached_property
    def context(self) -> RunContext:
        """The context that metrics and analyzers get, of the first variant if there are some; what an analyzer writes goes under
        `analysis/`."""
        context = next(iter(self.together.variants.values())).context
        place = context.directory / "analysis" / "tiny"
        place.mkdir(parents=True, exist_ok=True)
        return dataclasses.replace(context, directory=place)

    @cached_property
    def together(self) -> ComparisonContext:
        """The context that comparisons get; what one writes goes under `analysis/`."""
        import torch

        from saekit.runner.comparison import Compared, ComparisonContext, name_alone

        source = self.plan.members[0].build_source()
        source.open(device=torch.device("cpu"), dtype=torch.float32)
        place = self.directory / "analysis" / "tiny"
        place.mkdir(parents=True, exist_ok=True)
        variants = {
            member.variant or name_alone(self.plan.config): Compared(
                self._context_of(member, source), self.summary.get("variants", {}).get(member.variant, self.summary)
            )
            for member in self.plan.members
        }
        return ComparisonContext(variants, self.plan.config, place, lambda message: None)

    @property
    def saes(self) -> dict[str, SparseAutoencoder]:
        """Each trained SAE by the name that a comparison knows it by."""
        return {name: one.context.sae for name, one in self.together.variants.items()}

    def _context_of(self, member: SAEPlan, source: Any) -> RunContext:
        """The context of one SAE."""
        import torch

        from saekit.graph import FeatureGraph
        from saekit.sae.formats import load_sae

        place = RunDirectory(self.directory).of_variant(member.variant)
        sae = load_sae(place.sae, registry=self.registry)
        graph = FeatureGraph.load(place.graph) if member.config.graph else None
        labels = [part.label for part in member.sections["callback"] if place.result(part.label).is_file()]
        found = {label: Result.read(place.result(label)) for label in labels}
        device = torch.device("cpu")
        return RunContext(sae, source, member.config, device, place.path, lambda message: None, graph=graph, found=found)


def tiny_run(directory: str | Path, *, registry: Registry | None = None, **sections: Any) -> TinyRun:
    """A run of 12 steps on 16-wide activations made of known directions, with labels of two concepts.

    directory: where; it must be absent or empty. sections: of the run file, added to the default ones or replacing
        them: `loss=[{"use": "mse"}]`, `architecture={...}`.
    """
    return carried_out({**tiny_table(), **sections}, Path(directory), registry or Registry())


def tiny_language_run(directory: str | Path, *, registry: Registry | None = None, **sections: Any) -> TinyRun:
    """The same on a random GPT-2 of two 16-wide blocks that reads a few labelled texts byte by byte."""
    return carried_out({**tiny_table(source=language_source()), **sections}, Path(directory), registry or Registry())


def carried_out(table: dict[str, Any], directory: Path, registry: Registry, view: Any = None) -> TinyRun:
    """The run of a run file's dictionary."""
    from saekit.api import start
    from saekit.run_file import parse_config
    from saekit.runner.plan import plan_run

    plan = plan_run(parse_config(table, "the tiny run"), registry)
    done = start(plan, registry, str(directory), view)
    return TinyRun(done.directory, done.summary, plan, registry)


def tiny_table(*, source: dict[str, Any] | None = None) -> dict[str, Any]:
    """The run file of a tiny run, as a dictionary."""
    return {
        "source": source or synthetic_source(),
        "architecture": {"use": "topk", "d_sae": D_SAE, "k": 8},
        "loss": [{"use": "mse"}],
        "training": {
            "tokens": STEPS * BATCH,
            "batch_size": BATCH,
            "buffer": 128,
            "log_every": 1,
            "checkpoint_every": 5,
            "dead_after": 2 * BATCH,
            "device": "cpu",
        },
        "evaluation": {"tokens": 200, "batch_size": 64},
    }


def synthetic_source() -> dict[str, Any]:
    """The table of a source with known directions, labels and labelled sequences."""
    return {"use": "synthetic", "d_in": D_IN, "n_features": 32, "probability": 0.1, "held_out": 256, "concepts": [0, 1]}


def language_source(*, target: bool = False) -> dict[str, Any]:
    """The table of a source that reads labelled texts through a random GPT-2. target: a second site, for a transcoder."""
    place = _language_files()
    table = {
        "use": "labelled",
        "model": str(place / "model"),
        "data": str(place / "texts.jsonl"),
        "labels": ["even", "short"],
        "hook_point": "blocks.0.hook_out",
        "context": 24,
        "held_out": 0.25,
    }
    return {**table, "target_hook_point": "blocks.1.hook_out"} if target else table


def table_for(needs: Iterable[str], registry: Registry) -> dict[str, Any]:
    """The run file of a tiny run that provides `needs`. NotApplicable if nothing installed provides them."""
    left = set(needs) - {"activations"}
    source = synthetic_source()
    if not left & set(registry.find("source", "labelled").provides) <= set(registry.find("source", "synthetic").provides):
        source = language_source(target="target" in left)
    table = tiny_table(source=source)
    left -= set(registry.find("source", source["use"]).provides)
    builders = registry.components("graph_builder")
    if GRAPH in left and builders:
        table["graph"] = {"use": builders[0].qualified_name}
        left.discard(GRAPH)
    for need in sorted(left):
        provider = _provider(need, registry)
        if provider.kind == "architecture":
            table["architecture"] = {"use": provider.qualified_name, "d_sae": D_SAE, **few_active(provider)}
        else:
            table.setdefault(provider.kind, []).append({"use": provider.qualified_name})
    return table


def _provider(need: str, registry: Registry) -> RegisteredComponent:
    for kind in ("architecture", "callback", "loss", "metric"):
        for component in registry.components(kind):
            if need in component.provides:
                return component
    raise NotApplicable(f"nothing that the tiny run can have provides {need!r}. Check it in a run that has it.")


_FINISHED: dict[Any, tuple[TinyRun, dict[str, dict[str, Any]]]] = {}


def finished_run(needs: Iterable[str], registry: Registry, *, variants: bool = False) -> TinyRun:
    """A finished tiny run that provides `needs`, made once per process. Its SAE's weights are restored each time, in case
    a component has changed them. variants: of two SAEs."""
    from saekit.run_file import parse_config
    from saekit.runner.plan import plan_run

    table = table_for(needs, registry)
    if variants:
        table["variant"] = [{"name": "first"}, {"name": "second", "training": {"seed": 1}}]
    parts = plan_run(parse_config(table, "the tiny run"), registry).parts
    key = json.dumps(table), tuple((part.component.qualified_name, part.component.target) for part in parts)
    if key not in _FINISHED:
        run = carried_out(table, _own_place() / f"run-{len(_FINISHED)}", registry)
        _FINISHED[key] = run, {name: copy.deepcopy(sae.state_dict()) for name, sae in run.saes.items()}
    run, weights = _FINISHED[key]
    for name, sae in run.saes.items():
        sae.eval().load_state_dict(weights[name])
    return run


@functools.cache
def _own_place() -> Path:
    """A directory that lives as long as this process."""
    place = Path(tempfile.mkdtemp(prefix="saekit-testing-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


@functools.cache
def _language_files() -> Path:
    """The directory with the tiny model and its texts, made once per process."""
    place = _own_place() / "language"
    save_tiny_model(place / "model")
    lines = [
        {
            "text": f"The {a} of the {b}." if n % 2 else f"A {b}, and {a} number {n}.",
            "even": n % 2,
            "short": n // 2 % 2,
            "first": [[4, 4 + len(a)] if n % 2 else [2, 2 + len(b)]],  # its first noun
        }
        for n, (a, b) in enumerate((a, b) for a in _WORDS for b in _WORDS)
    ]
    assert all(len({line[key] for line in lines}) == CONCEPTS for key in ("even", "short"))
    (place / "texts.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return place


def save_tiny_model(directory: Path) -> None:
    """A random GPT-2 of two blocks, 16 wide, whose tokens are bytes, in Hugging Face format."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = GPT2Config(
        vocab_size=len(vocabulary), n_positions=32, n_embd=D_IN, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stderr(io.StringIO()):  # a bar of progress
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(directory)


def tiny_network(kind: str, vocabulary: int, **changes: Any) -> nn.Module:
    """A random "gpt2", "llama" or "gemma2" of three 32-wide blocks with 64 positions; token 0 begins a text and 1 ends it.

    changes: of the configuration. Every other block of Gemma-2 has a sliding window of 16.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1}
    if kind == "gpt2":
        options |= {"n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 2}
    else:
        options |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 64}
        options |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    if kind == "gemma2":
        options |= {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "pad_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options | changes))


def save_tiny_gemma2(place: Path) -> Path:
    """A `tiny_network` of Gemma-2's kind whose tokens are bytes, in Hugging Face format; gives `place`."""
    from transformers import AutoTokenizer

    save_tiny_model(place)
    tokenizer = AutoTokenizer.from_pretrained(place)
    model: Any = tiny_network("gemma2", len(tokenizer), initializer_range=0.2)
    model.save_pretrained(place)
    return place


def in_float64(model: nn.Module) -> nn.Module:
    """`model` in float64 throughout, until it is moved to another dtype.

    After `.double()` alone, transformers still computes norms, softmax and rotary tables in float32, and their last bit
    depends on the processor and on how many positions are computed together.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class NeverFloat32(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            function = torch.Tensor.double if function is torch.Tensor.float else function
            args = [torch.float64 if value is torch.float32 else value for value in args]
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
            return function(*args, **kwargs)

    def throughout(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            float64 = next(model.parameters()).dtype is torch.float64
            with NeverFloat32() if float64 else contextlib.nullcontext():
                return forward(*args, **kwargs)

        return call

    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "RotaryEmbedding", "Attention")):
            module.forward = throughout(module.forward)
    return model.double()


@functools.cache
def forkserver() -> Any:
    """A context of `multiprocessing` that forks its processes from one that has imported what a run imports.

    Those imports take longer than a tiny run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchmetrics", "transformers.models.gpt2.modeling_gpt2", "saekit.runner.run"])
    return context
