"""The analyzer `intervene`: latents edited in the model while it runs, and what that does to its outputs.

analyzer.py: its options. choice.py: which latents, and their controls, from training data. measured.py: the pass over held-out
batches. means.py: means with intervals clustered by sequence. findings.py: numbers, sentences, the table and the figure.
"""

from saekit.builtin.intervene.analyzer import Intervene

__all__ = ["Intervene"]
