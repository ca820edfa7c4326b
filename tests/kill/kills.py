"""Kills tiny runs at random moments and lets them go on: `python tests/kill/kills.py 1000 --seed 0` (`make kills`).

Every attempt begins a run, kills it with SIGKILL at a random moment, resumes it, kills it again, a few times, and then lets it
end. What is then in the run directory must be, bit for bit, what an undisturbed run left. Everything else is a failure, which is
printed with its seed, and the exit code is 1.

A moment is a phase and how long after the phase has begun, up to as long as that phase lasted undisturbed: most of a run is
training, and moments drawn from its whole length would seldom fall into the short phases.

Processes are forked from this one, which has imported everything and carried out each run once, so that a kill costs the time
of a tiny run and not that of the imports.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # no threads in a process that is forked

import torch
from tqdm import tqdm

import saekit
from saekit import api
from saekit.config import RunConfig
from saekit.errors import SaekitError
from saekit.graph import FeatureGraph
from saekit.plugins import Registry
from saekit.run_file import parse_config
from saekit.runner.plan import plan_run
from saekit.testing.tiny import language_source, tiny_table

PHASES = ("before", "prepare", "harvest", "train", "graph", "evaluate", "analyse", "report", "after")
CLOCK = {"seconds", "tokens_per_second"}
REFUSED, BROKEN = 2, 70  # exit codes of a process

STEPS, BATCH = 36, 32
CHAIN = 8
"""The most kills of one run."""
POLL = 0.001  # seconds between looks at a process
_RESAMPLE = {"use": "resample", "every": 7, "below": 0.02, "memory": 0.8}


def cases() -> dict[str, dict[str, Any]]:
    """The run files by name. `source.cache` is filled in for each attempt."""
    base = tiny_table()
    base["training"] |= {
        "tokens": STEPS * BATCH,
        "checkpoint_every": 3,
        "log_every": 2,
        "lr": {"schedule": "warmup_decay", "to": 3e-3, "warmup": 10},
    }
    language = tiny_table(source=language_source())["source"]
    auxk = [{"use": "mse"}, {"use": "auxk", "weight": 0.1}]
    topk = {"use": "topk", "d_sae": 256, "k": 4}
    concept = [*auxk, {"use": "concept", "weight": 0.5}, {"use": "cluster", "weight": 0.1}]
    refresh = {"use": "refresh_graph", "builder": {"use": "coactivation", "k": 5}, "every": 5, "start": 5, "batches": 3}
    hsae = {"use": "hsae", "base": {"use": "topk", "k": 8}, "d_sae": 64, "sequences": 16}
    return {
        "topk": {**base, "architecture": topk, "loss": auxk, "callback": [_RESAMPLE]},
        "batchtopk": {**base, "architecture": {"use": "batchtopk", "d_sae": 128, "k": 4}, "loss": auxk},
        "standard": {
            **base,
            "architecture": {"use": "standard", "d_sae": 128},
            "loss": [{"use": "mse"}, {"use": "l1", "weight": 1e-2}],
        },
        "hsae": {
            **base,
            "source": language,
            "architecture": hsae,
            "loss": concept,
            "callback": [refresh],
            "graph": {"use": "coactivation", "k": 5},
            "metric": [{"use": "concept_auroc"}, {"use": "explained_variance"}],
            "training": {**base["training"], "sequences": 4},
        },
        "variants": {
            **base,
            "callback": [_RESAMPLE],
            "variant": [
                {"name": "one"},
                {"name": "two", "architecture": {"d_sae": 128}, "training": {"seed": 1}},
                {
                    "name": "three",
                    "architecture": {"use": "jumprelu", "d_sae": 64},
                    "loss": [{"use": "mse"}, {"use": "l0", "weight": 1e-3}],
                },
            ],
        },
        "cached": {
            **base,
            "source": {**language, "cache": "", "cache_tokens": 2_000},
            "architecture": {**topk, "d_sae": 64},
            "graph": {"use": "coactivation", "k": 5},
            "analyzer": [{"use": "features"}],
        },
    }


@dataclass
class Attempt:
    """One run directory in its own folder `place`, and the processes that work on it."""

    name: str
    table: dict[str, Any]
    place: Path
    clock: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 1))  # shared with the child: the phase it is in

    @property
    def run(self) -> Path:
        return self.place / "run"

    def config(self) -> RunConfig:
        source = self.table["source"]
        if "cache" in source:
            source = {**source, "cache": str(self.place / "cache")}
        return parse_config({**self.table, "source": source}, self.name)

    def carry_on(self) -> None:
        """Begin the run, or go on with it, in this process."""
        if (self.run / "run.toml").is_file():
            api.resume(str(self.run), view=self)
        else:
            registry = Registry()
            api.start(plan_run(self.config(), registry), registry, str(self.run), self)

    @saekit.hookimpl
    def phase_started(self, phase: str) -> None:
        self.clock[0] = PHASES.index(phase)

    @saekit.hookimpl
    def phase_ended(self, phase: str) -> None:
        self.clock[0] = PHASES.index("after" if phase == "report" else "prepare" if phase == "harvest" else phase)

    def process(self, watch: Callable[[str], bool]) -> tuple[int, str]:
        """Let a child carry on and kill it once `watch`, which is told its phase now and then, says so.

        Returns how it ended and what it said."""
        self.clock[0] = 0
        said = self.place / "said"
        child = os.fork()
        if child == 0:
            _ended(self.carry_on, said)
        killed = False
        try:
            while True:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    return os.waitstatus_to_exitcode(status), said.read_text() if said.exists() else ""
                if not killed and watch(PHASES[self.clock[0]]):
                    os.kill(child, signal.SIGKILL)
                    killed = True
                time.sleep(POLL)
        except KeyboardInterrupt:
            os.kill(child, signal.SIGKILL)
            raise


def _moment(phase: str, seconds: float) -> Callable[[str], bool]:
    """True so many seconds after the phase was begun, or a later one, where this one has nothing to do any more."""
    began: list[float] = []

    def reached(now: str) -> bool:
        if not began and PHASES.index(now) >= PHASES.index(phase):
            began.append(time.monotonic())
        return bool(began) and time.monotonic() >= began[0] + seconds

    return reached


def _noting(looks: list[tuple[str, float]]) -> Callable[[str], bool]:
    """Never True; keeps each phase that it is told, and when."""

    def look(now: str) -> bool:
        looks.append((now, time.monotonic()))
        return False

    return look


def _never(phase: str) -> bool:
    return False


def _ended(act: Callable[[], None], said: Path) -> None:
    """Act and end this process, without the exit handlers of the one that it was forked from."""
    code, text = 0, ""
    try:
        said.unlink(missing_ok=True)
        act()
    except SaekitError as error:
        code, text = REFUSED, str(error)
    except BaseException:
        code, text = BROKEN, traceback.format_exc()
    if code:
        said.write_text(text)
    os._exit(code)


def outcome_of(attempt: Attempt) -> dict[str, Any]:
    """Everything of a finished run that must be the same, by name: bytes, and numbers without what a clock says."""
    found: dict[str, Any] = {}
    run = attempt.run
    for one in [run, *sorted((run / "variants").glob("*"))]:
        name = str(one.relative_to(run))
        for path in sorted((one / "sae").glob("*")):
            found[f"{name}/{path.name}"] = path.read_bytes()
        if (one / "graph.safetensors").is_file():  # the order of its metadata is not fixed
            found[f"{name}/graph.safetensors"] = FeatureGraph.load(one / "graph.safetensors")
        if (one / "metrics.jsonl").is_file():
            lines = (one / "metrics.jsonl").read_text().splitlines()
            found[f"{name}/metrics.jsonl"] = [
                {key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines
            ]
        summary = json.loads((one / "summary.json").read_text())
        found[f"{name}/summary.json"] = [
            summary[key] for key in ("metrics", "analysis", "losses", "warnings", "tokens")
        ]
        found[f"{name}/report.html"] = (one / "report.html").is_file()
    last = max((run / "checkpoints").glob("step-*"))
    found["checkpoint"] = last.name, (last / "tensors.safetensors").read_bytes()
    for path in sorted((attempt.place / "cache").glob("*.safetensors")):
        found[f"cache/{path.name}"] = path.read_bytes()
    found["leftovers"] = sorted(
        str(p.relative_to(attempt.place)) for p in attempt.place.rglob("*") if p.name.endswith((".tmp", "lock"))
    )
    return found


@dataclass
class Tally:
    """What happened. kills: by (case, phase). ends: how the attempts ended."""

    kills: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)


class Killer:
    """Undisturbed runs to compare with, and attempts at killed ones."""

    def __init__(self, place: Path, wanted: list[str]) -> None:
        self.place = place
        self.tables = {name: table for name, table in cases().items() if name in wanted}
        self.expected: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, dict[str, float]] = {}
        """How long each phase of each case lasts, by case and phase."""
        for name, table in self.tables.items():
            Attempt(name, table, self._folder(f"{name}-warm")).carry_on()  # imports what is only imported in a run
        threads = list(Path("/proc/self/task").glob("*"))
        assert len(threads) <= 1, (
            "a process that is forked must have no threads: locks that they hold stay locked for ever"
        )
        for name, table in self.tables.items():
            attempt = Attempt(name, table, self._folder(f"{name}-undisturbed"))
            looks: list[tuple[str, float]] = []
            code, said = attempt.process(_noting(looks))
            assert code == 0, said
            lasted = collections.Counter[str]()
            for (phase, at), (_, later) in itertools.pairwise(looks):
                lasted[phase] += later - at
            self.seconds[name] = {phase: seconds for phase, seconds in lasted.items() if seconds > 4 * POLL}
            self.expected[name] = outcome_of(attempt)

    def _folder(self, name: str) -> Path:
        (self.place / name).mkdir()
        return self.place / name

    def attempt(self, name: str, seed: str, tally: Tally, most: int) -> None:
        """Kill a run again and again, `most` times at most, and compare what it ends with."""
        draw = random.Random(seed)
        attempt = Attempt(name, self.tables[name], self._folder(f"{name}-{seed.replace('/', '-')}"))
        history: list[str] = []
        chain = min(most, draw.randint(1, CHAIN))
        while True:
            lasts = self.seconds[name]
            drawn = draw.choice(list(lasts))
            watch = _moment(drawn, draw.random() * lasts[drawn]) if len(history) < chain else _never
            began = time.monotonic()
            code, said = attempt.process(watch)
            phase = PHASES[attempt.clock[0]]
            if code != -signal.SIGKILL:
                if watch is not _never:  # the machine is idler than it was
                    lasts[drawn] *= 0.5
                break
            if phase == drawn:
                lasts[drawn] *= 1.02
            history.append(f"{phase} after {time.monotonic() - began:.3f} s")
            tally.kills[name, phase] += 1
        problem = ""
        if code == REFUSED:
            tally.ends["refused"] += 1
            problem = f"refused: {said}"
        elif code != 0:
            problem = f"ended with {code}: {said}"
        else:
            try:
                outcome = outcome_of(attempt)
            except Exception:
                problem = traceback.format_exc()
            else:
                differs = [
                    key
                    for key in {**self.expected[name], **outcome}
                    if outcome.get(key) != self.expected[name].get(key)
                ]
                problem = f"differs in {', '.join(differs)}" if differs else ""
        if problem:
            tally.failures.append(f"{name}, seed {seed} (killed in {'; '.join(history)}): {problem}")
            print(f"FAILED {tally.failures[-1]}", flush=True)
        else:
            tally.ends["the same bits"] += 1
            shutil.rmtree(attempt.place)


def table_of(tally: Tally, names: list[str]) -> Iterator[str]:
    """Lines of kills by case and phase."""
    phases = [phase for phase in PHASES if any(tally.kills[name, phase] for name in names)]
    yield "".join(["kills".ljust(12), *(phase.rjust(10) for phase in phases), "all".rjust(8)])
    for name in [*names, "all"]:
        counts = [sum(tally.kills[one, phase] for one in (names if name == "all" else [name])) for phase in phases]
        yield "".join([name.ljust(12), *(str(count).rjust(10) for count in counts), str(sum(counts)).rjust(8)])


def main() -> int:
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread for bars of progress
    names = list(cases())
    parser = argparse.ArgumentParser(description="Kill tiny runs at random moments and compare what they end with.")
    parser.add_argument("kills", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--case", action="append", choices=names, help="only this one; may be given several times")
    given = parser.parse_args()
    names = given.case or names
    turns = [*names, *({"cached"} & set(names))]  # twice: no other has a harvest and an analyzer
    tally, number = Tally(), 0
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        place = Path(tempfile.mkdtemp(prefix="saekit-kills-"))
        stack.callback(lambda: tally.failures or shutil.rmtree(place, ignore_errors=True))
        killer = Killer(place, names)
        lengths = ", ".join(f"{name} {sum(seconds.values()):.2f} s" for name, seconds in killer.seconds.items())
        print(f"seed {given.seed}; undisturbed: {lengths}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C: what was seen so far is printed
            while (left := given.kills - tally.kills.total()) > 0:
                killer.attempt(turns[number % len(turns)], f"{given.seed}/{number}", tally, left)
                number += 1
                if number % (4 * len(turns)) == 0:
                    print(f"{tally.kills.total()} kills, {number} runs, {len(tally.failures)} failures", flush=True)
    print(*table_of(tally, names), sep="\n")
    ends = ", ".join(f"{count} {end}" for end, count in tally.ends.items())
    print(
        f"{tally.kills.total()} kills of {number} runs in {time.monotonic() - began:.0f} s: {ends}, {len(tally.failures)} failures."
    )
    if tally.failures:
        print(f"What is left of them: {place}")
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
