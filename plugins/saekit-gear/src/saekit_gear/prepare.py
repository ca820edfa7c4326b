"""The trained `SetCompletionModel`: trained when it is first needed, then kept in the user's cache directory."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from saekit import Preparation, prepared, seeded
from saekit_gear import completion, sets
from saekit_gear.completion import SetCompletionModel, completion_loss
from saekit_gear.sets import generate

_SAVE_EVERY = 100  # steps
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Training:
    """Everything that the weights follow from, beside the code. They are trained on the CPU, so that every machine gets much the
    same; to the bit they are the same with the same build of torch and as many threads.

    rate: of Adam, after `warm_up` steps; it falls to a fiftieth along a cosine. most_missing: items taken out of a set, at most.
    """

    seed: int = 0
    steps: int = 500
    batch: int = 256
    rate: float = 3e-3
    warm_up: int = 40
    most_missing: int = 3


def model() -> SetCompletionModel:
    """The model of the recipe, trained if it is not there yet."""
    return trained(Training())


def trained(training: Training, *, directory: Path | None = None) -> SetCompletionModel:
    """The model of some training, from the cache if it is there. directory: of the cache, the user's by default."""
    made_of = {**asdict(training), "code": _code()}
    weights = prepared("gear", made_of, lambda preparation: _train(training, preparation), directory=directory)
    made = _made(training.seed)
    made.load_state_dict(weights)
    return made


def _missing(training: Training, mask: Tensor, step: int) -> Tensor:
    """[n, T], True for what is taken out of each set (mask [n, T]): items are in a random order, so it is the first ones."""
    draws = torch.Generator().manual_seed(training.seed * 2**32 + step)
    return torch.arange(mask.shape[1]) < torch.randint(1, training.most_missing + 1, (len(mask), 1), generator=draws)


def _train(training: Training, preparation: Preparation) -> dict[str, Tensor]:
    """The weights. Each step's sets follow from the seed and the step's number, so that a stopped training goes on exactly."""
    made = _made(training.seed)
    optimiser = torch.optim.Adam(made.parameters(), lr=training.rate)
    first = 0
    if preparation.so_far is not None:
        first = _restore(made, optimiser, preparation.so_far)
    with torch.enable_grad():
        for step in range(first, training.steps):
            for group in optimiser.param_groups:
                group["lr"] = _rate(training, step)
            batch = generate(training.batch, (0, training.seed, step))
            loss = completion_loss(made, batch.items, batch.mask, _missing(training, batch.mask, step))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if (step + 1) % _SAVE_EVERY == 0:
                preparation.save(_state(made, optimiser, step + 1))
            preparation.tell(step + 1, training.steps)
    return made.state_dict()


def _rate(training: Training, step: int) -> float:
    falling = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / training.steps))
    return training.rate * min(1.0, (step + 1) / training.warm_up) * falling


def _made(seed: int) -> SetCompletionModel:
    with seeded(seed, _CPU):
        return SetCompletionModel()


def _state(made: SetCompletionModel, optimiser: torch.optim.Adam, step: int) -> dict[str, Tensor]:
    state = {f"model.{name}": value for name, value in made.state_dict().items()}
    for number, moments in optimiser.state_dict()["state"].items():
        state |= {f"adam.{number}.{name}": value for name, value in moments.items()}
    return state | {"step": torch.tensor(step)}


def _restore(made: SetCompletionModel, optimiser: torch.optim.Adam, state: dict[str, Tensor]) -> int:
    """Put a state back; returns its step."""
    made.load_state_dict({name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name.startswith("adam."):
            _, number, moment = name.split(".")
            moments.setdefault(int(number), {})[moment] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
    return int(state["step"])


def _code() -> str:
    """A digest of the code that sets and weights follow from."""
    files = [Path(str(module.__file__)) for module in (sets, completion)] + [Path(__file__)]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
