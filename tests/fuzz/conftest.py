"""Little memory and no network, and a tiny run whose files hostile inputs begin with."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
import tomli_w
import torch
from fuzz.sandbox import RUN, sandbox
from fuzz.valid import ACTIVATIONS, Files, activations, run_table

MEMORY = 24 << 30  # bytes of address space: an input that asks for more is told so, as on a small machine


@pytest.fixture(scope="session", autouse=True)
def _limits() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    threads = torch.get_num_threads()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("SAEKIT_DISABLE_PLUGINS", raising=False)
        yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished(_limits: None) -> Files:
    """Every file of a finished run, by its name in the sandbox, and the activations that it was trained on."""
    with sandbox({ACTIVATIONS: activations(), "run.toml": tomli_w.dumps(run_table()).encode()}) as here:
        assert here.saekit("run", "run.toml", "--directory", RUN).code == 0
        files = (path for path in here.run.rglob("*") if path.is_file() and path.suffix != ".lock")
        return Files(
            {ACTIVATIONS: activations(), **{str(path.relative_to(here.path)): path.read_bytes() for path in files}}
        )
