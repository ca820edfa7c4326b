"""A checkpoint is used by the run that made it alone; what does not change the weights may change in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Outcome

from saekit.errors import UsageError
from saekit.run_file import parse_config
from saekit.runner.resume import decisive, refuse_other, what_changed
from saekit.training.state import RunState

CONFIG: dict[str, Any] = {
    "source": {"use": "text", "hook_point": "blocks.0.hook_out"},
    "architecture": {"use": "topk", "d_sae": 64, "k": 4},
    "loss": [{"use": "mse"}, {"use": "auxk", "weight": {"schedule": "linear", "to": 1.0, "steps": 5}}],
    "callback": [{"use": "resample", "every": 5}],
}


def decisive_of(identity: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    table = json.loads(json.dumps(CONFIG))
    for key, value in changes.items():
        section, _, rest = key.partition("__")
        if rest:
            table.setdefault(section, {})[rest] = value
        else:
            table[section] = value
    return json.loads(json.dumps(decisive(parse_config(table, "x"), identity or {"digest": "abc"})))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training__lr": 1e-4}, ("training.lr", "0.001", "0.0001")),
        ({"training__seed": 1}, ("training.seed was 0 and is now 1", "Put training.seed back in run.toml")),
        ({"training__tokens": 5_000_000}, ("training.tokens",)),
        ({"architecture__k": 5}, ("architecture.k was 4 and is now 5",)),
        ({"source__context": 64}, ("source.context was not given and is now 64",)),
        ({"loss": [{"use": "mse", "weight": 2.0}, CONFIG["loss"][1]]}, ("loss.mse.weight was 1.0 and is now 2.0",)),
        ({"loss": [CONFIG["loss"][1], CONFIG["loss"][0]]}, ("loss was 'mse, auxk' and is now 'auxk, mse'",)),
        ({"callback": []}, ("callback was 'resample' and is now ''",)),
        ({"callback": [{"use": "resample", "every": 6}]}, ("callback.resample.every was 5 and is now 6",)),
        ({"identity": {"digest": "xyz"}}, ("digest", "'abc'", "'xyz'", "The model or the data has changed")),
    ],
)
def test_another_configuration_is_refused_by_its_key(changes: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        refuse_other(tmp_path / "step-1", decisive_of(), decisive_of(**changes))
    for word in (str(tmp_path / "step-1"), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"training__log_every": 3},
        {"training__checkpoint_every": 7},
        {"training__keep_checkpoints": 9},
        {"training__prefetch": 0},
        {"metric": [{"use": "ce_recovered"}]},
        {"analyzer": [{"use": "features"}]},
        {"evaluation__tokens": 10},
        {"recipe": "another"},
    ],
)
def test_what_does_not_change_the_weights_may_change(changes: dict[str, Any], tmp_path: Path) -> None:
    refuse_other(tmp_path, decisive_of(), decisive_of(**changes))


@pytest.mark.parametrize(
    ("threads", "version", "words"),
    [
        (0, "1", []),
        (1, "1", ["CPU threads"]),
        (0, "2", ["Plugin 'p' has changed", "p 2 and is p 1"]),
    ],
)
def test_what_may_move_the_last_bits_is_told(threads: int, version: str, words: list[str]) -> None:
    now = [{"name": "p", "distribution": "p", "version": "1"}]
    before = [{"name": "p", "distribution": "p", "version": version}]
    state = RunState(5, (0, 0), {}, before, torch.get_num_threads() + threads, [], {})
    told = list(what_changed(state, now))
    assert len(told) == bool(words)
    assert all(word in told[0] for word in words)


def test_a_run_resumed_after_its_training_shows_the_speed_it_had(
    command: Callable[..., Outcome], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert command("run", run_file(), "--directory", run).code == 0
    (run / "summary.json").unlink()
    done = command("run", "--resume", run, "--json")
    assert done.code == 0, done.err
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert json.loads(done.out)["tokens_per_second"] == pytest.approx(last["tokens_per_second"], abs=0.1)
    assert last["tokens_per_second"] > 0
