"""Interventions: an SAE attached to a model, its latents edited while the model runs.

edits.py: what is done to a latent. positions.py: where in the text. attach.py: the attachment itself, and reading.
order.py: whether a read sees an edit at all. generation.py: texts before and after, paired.
"""
