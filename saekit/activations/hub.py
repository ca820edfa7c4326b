"""Asking the Hugging Face hub whether it has a model or a data set that is not in the local cache."""

from __future__ import annotations

import os
from typing import Literal

from saekit.errors import OptionError

_TIMEOUT = 10.0  # seconds


def ask_hub(option: Literal["model", "data"], name: str, fix: str) -> None:
    """OptionError, which ends with `fix`, if the hub does not have what the option names or cannot be asked.

    transformers and datasets by themselves try again for more than twenty seconds if there is no network."""
    here, there = ("directory", "model") if option == "model" else ("file", "data set")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise OptionError(option, f"{name!r}: no such {here}, not in the local cache, and HF_HUB_OFFLINE is set. {fix}")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    ask = HfApi().model_info if option == "model" else HfApi().dataset_info
    try:
        ask(name, timeout=_TIMEOUT)
    except GatedRepoError:
        raise OptionError(
            option, f"{name!r}: its owner asks for consent. Accept on its page, then log in: hf auth login."
        ) from None
    except RepositoryNotFoundError:
        raise OptionError(option, f"{name!r}: neither a {here} nor a {there} of the Hugging Face hub. {fix}") from None
    except Exception as error:  # any of the client's network errors
        reason = str(error).strip().partition("\n")[0]
        raise OptionError(
            option,
            f"{name!r}: no such {here}, and the Hugging Face hub cannot be reached ({type(error).__name__}: {reason}). {fix}",
        ) from None
