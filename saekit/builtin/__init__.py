"""The components that come with saekit, declared by the same hooks as those of any plugin."""

from __future__ import annotations

from collections.abc import Iterator

from saekit.component import Component
from saekit.hookspecs import hookimpl


@hookimpl
def saekit_architectures() -> Iterator[Component]:
    architectures = "saekit.builtin.architectures"
    yield Component("standard", f"{architectures}.standard:Standard", "ReLU; sparse by an l1 loss.")
    yield Component("clipped", f"{architectures}.clipped:Clipped", "ReLU clipped at a cap; sparse by an l1 loss.")
    yield Component("topk", f"{architectures}.topk:TopK", "The k largest pre-activations of each row.")
    yield Component("batchtopk", f"{architectures}.batchtopk:BatchTopK", "The largest pre-activations of a whole batch.")
    yield Component(
        "matryoshka",
        f"{architectures}.matryoshka:Matryoshka",
        "BatchTopK with nested dictionaries.",
        provides=("nested_reconstructions",),
    )
    yield Component(
        "jumprelu",
        f"{architectures}.jumprelu:JumpReLU",
        "A learned threshold for each latent.",
        provides=("l0_gradient",),
    )
    yield Component(
        "gated",
        f"{architectures}.gated:Gated",
        "Separate paths decide whether and how much.",
        provides=("gate_activations",),
    )


@hookimpl
def saekit_losses() -> Iterator[Component]:
    yield Component("mse", "saekit.builtin.losses:mse", "Squared reconstruction error.")
    yield Component("l1", "saekit.builtin.losses:l1", "L1 norm of the code.")
    yield Component("l0", "saekit.builtin.losses:gate_sum", "Number of active latents.", needs=("l0_gradient",))
    yield Component("gate_l1", "saekit.builtin.losses:gate_sum", "L1 norm of the gates.", needs=("gate_activations",))
    yield Component(
        "gated_aux",
        "saekit.builtin.losses:gated_aux",
        "The gates alone rebuild the input through a frozen decoder.",
        needs=("gate_activations",),
    )
    yield Component(
        "matryoshka",
        "saekit.builtin.losses:matryoshka",
        "Squared error of every nested dictionary.",
        needs=("nested_reconstructions",),
    )
    yield Component("decorrelation", "saekit.builtin.losses:Decorrelation", "Squared correlations between latents.")
    yield Component("auxk", "saekit.builtin.losses:AuxK", "Dead latents rebuild what the living ones missed.")


@hookimpl
def saekit_sources() -> Iterator[Component]:
    sources = "saekit.builtin.sources"
    text = ("tokens", "subject_model", "logits", "outputs", "documents", "target")
    labelled = ("labels", "sequences")
    yield Component(
        "organism", f"{sources}:OrganismSource", "The bundled model organism on its own corpus.", provides=(*text, *labelled)
    )
    yield Component("text", f"{sources}:TextSource", "Any language model on any text.", provides=text)
    yield Component(
        "labelled", f"{sources}:LabelledSource", "Any language model on labelled texts.", provides=(*text, *labelled)
    )
    yield Component("pushed", f"{sources}:PushedSource", "What a program pushes while it runs.")
    yield Component("module", f"{sources}:ModuleSource", "Any nn.Module on any batches.", provides=("target", "outputs", *labelled))
    yield Component(
        "encoder",
        f"{sources}:EncoderSource",
        "Any Hugging Face encoder on texts or images, pooled or by position.",
        provides=("target", *labelled),
    )
    yield Component(
        "tensors", f"{sources}:TensorsSource", "Activations stored in files.", provides=("tokens", "target", *labelled)
    )
    yield Component(
        "synthetic",
        f"{sources}:SyntheticSource",
        "Sparse sums of known directions.",
        provides=(*labelled, "true_dictionary"),
    )


@hookimpl
def saekit_metrics() -> Iterator[Component]:
    metrics = "saekit.builtin.metrics"
    yield Component("explained_variance", f"{metrics}:ExplainedVariance", "Explained variance, FVU, mse.", default=True)
    yield Component("l0", f"{metrics}:L0", "Mean number of active latents.", default=True)
    yield Component("density", f"{metrics}:Density", "How often latents fire.", default=True)
    yield Component("dead", f"{metrics}:Dead", "Latents that never fire on held-out data.", default=True)
    yield Component("cosine", f"{metrics}:Cosine", "Cosine between activation and reconstruction.")
    yield Component("relative_bias", f"{metrics}:RelativeBias", "By how much reconstructions are too short.")
    yield Component("histograms", f"{metrics}:Histograms", "Quantiles of densities and of activations.")
    yield Component(
        "token_sparsity",
        "saekit.builtin.token_sparsity:TokenSparsity",
        "L0 and explained variance by class of token.",
        needs=("tokens",),
    )
    yield Component(
        "linear_map",
        "saekit.builtin.linear_map:LinearMap",
        "The best linear map between a transcoder's sites.",
        needs=("target",),
        default=True,
    )
    yield Component(
        "dictionary_recovery",
        "saekit.builtin.recovery:DictionaryRecovery",
        "How well known directions were found.",
        needs=("true_dictionary",),
    )
    yield Component(
        "ce_recovered",
        "saekit.builtin.model_metrics:CERecovered",
        "Cross-entropy and KL with the SAE spliced into the model, against zero- and mean-ablation.",
        needs=("subject_model", "logits"),
    )


@hookimpl
def saekit_analyzers() -> Iterator[Component]:
    yield Component(
        "features",
        "saekit.builtin.features:Features",
        "Density, ranking and top activating examples of the latents.",
    )
    yield Component(
        "intervene",
        "saekit.builtin.intervene:Intervene",
        "Ablates, scales or sets latents and measures the change of every output, beside matched random latents.",
        needs=("outputs",),
    )


@hookimpl
def saekit_trackers() -> Iterator[Component]:
    trackers = "saekit.builtin.trackers"
    yield Component("jsonl", f"{trackers}:JsonLines", "metrics.jsonl in the run directory.", default=True)
    yield Component("tensorboard", f"{trackers}:TensorBoard", "Event files for TensorBoard in the run directory.")
    yield Component("wandb", f"{trackers}:WeightsAndBiases", "A run of Weights & Biases, offline unless told otherwise.")


@hookimpl
def saekit_recipes() -> Iterator[Component]:
    yield Component(
        "quickstart", "saekit.builtin:recipes/quickstart.toml", "A topk SAE on the model organism, in two minutes.", default=True
    )
