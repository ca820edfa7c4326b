"""The callback `refresh_graph`: the feature graph of a dictionary that is still being trained."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from saekit import ComponentOption, FeatureGraph, OfKind, Training, hookimpl
from saekit_graph.window import Window


class RefreshGraph:
    """Rebuilds the graph every `every` steps, from the current dictionary and the codes of the last batches.

    There is none until `start` steps are done, and losses that need it are inactive: the graph of a random decoder says
    nothing. Between refreshes, losses use a graph that is up to `every` steps old.
    """

    def __init__(
        self,
        *,
        builder: Annotated[
            ComponentOption,
            OfKind("graph_builder"),
            Field(description='What builds it: a graph builder by name, or {use = "cosine", k = 10}.'),
        ] = ComponentOption(use="cosine"),
        every: Annotated[int, Field(gt=0, description="Steps between refreshes.")] = 500,
        start: Annotated[int, Field(gt=0, description="Steps of training before the first graph.")] = 100,
        batches: Annotated[int, Field(gt=0, description="How many of the last steps' codes the builder gets.")] = 8,
    ) -> None:
        self.builder, self.every, self.start, self.batches = builder, every, start, batches
        self.graph: FeatureGraph | None = None
        self.refreshed = 0  # after how many steps the graph was built; 0 for never
        self.window = Window()

    @hookimpl
    def training_started(self, trainer: Training) -> None:
        """A resumed run continues with the graph and the codes of its checkpoint."""
        self.window.to(trainer.device)
        if self.graph is not None:
            self.graph = self.graph.to(trainer.device)
        trainer.graph = self.graph

    @hookimpl
    def step_ended(self, trainer: Training, number: int) -> None:
        """Keep the step's code if the next graph is to see it, and build that graph when it is time."""
        left = self._steps_left(number + 1)
        if left < self.batches:
            self.window.keep(trainer.step.code)
        if left == 0:
            self.refresh(trainer, number + 1)

    def _steps_left(self, done: int) -> int:
        """How many steps remain until the next refresh after `done` steps; 0 if it is due now."""
        return self.start - done if done < self.start else -(done - self.start) % self.every

    @torch.no_grad()
    def refresh(self, trainer: Training, done: int) -> FeatureGraph:
        """Build the graph now, after `done` steps, and give it to the trainer."""
        graph = self.builder.build()(trainer.sae, self.window.codes(trainer.sae.d_sae))
        graph.builder = self.builder.component.qualified_name
        if not graph.edge_index.shape[1]:
            trainer.warn(
                f"refresh_graph: the graph that {graph.builder} built after {done} steps has no edges: every cluster is "
                "one latent alone. Give it more `batches` or a later `start`, or a builder that asks for less."
            )
        self.graph = trainer.graph = graph.to(trainer.device)
        self.refreshed = done
        self.window.clear()
        return self.graph

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the graph, when it was built, and the codes kept for the next one."""
        state: dict[str, Any] = {"refreshed": self.refreshed, **self.window.state_dict()}
        if self.graph is not None:
            state |= {"edge_index": self.graph.edge_index, "weight": self.graph.weight, "nodes": self.graph.nodes}
            state |= {"dictionary": self.graph.dictionary, "builder": self.graph.builder}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.refreshed = state["refreshed"]
        self.window.load_state_dict(state)
        self.graph = None
        if "edge_index" in state:
            names = ("nodes", "edge_index", "weight", "dictionary", "builder")
            self.graph = FeatureGraph(*(state[name] for name in names))
