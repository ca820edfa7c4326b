"""saekit-hoyer: how sparse a code is, as Hoyer (2004) measures it, to train with and to look at."""

from collections.abc import Iterator

from saekit import Component, hookimpl

SAEKIT_CONTRACT = 2  # the version of saekit's contract that this is written for


@hookimpl
def saekit_losses() -> Iterator[Component]:
    yield Component("hoyer", "saekit_hoyer.loss:hoyer", "Squared Hoyer measure of the code.")


@hookimpl
def saekit_metrics() -> Iterator[Component]:
    yield Component("hoyer_sparsity", "saekit_hoyer.metric:HoyerSparsity", "Hoyer's sparsity of the code, 0 to 1.")
