"""The fixtures of saekit's own tests: `tests` is on the path of modules."""

from conftest import saved_network, text_file, tiny_gpt2, tiny_tokenizer
from helpers import command, run_file

__all__ = ["command", "run_file", "saved_network", "text_file", "tiny_gpt2", "tiny_tokenizer"]
