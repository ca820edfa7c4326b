"""Interventions: an SAE attached to a model, its latents edited while the model runs.

edits.py: what is done to a latent. positions.py: where in the text. attach.py: attaching and reading.
downstream.py: whether a read can see an edit. generation.py: pairs of texts before and after.
replay.py: running only the layers above a site again. kv_cache.py: the keys and values that it needs.
"""
