"""The analyzer `ablate`: what the model answers, and what else changes, with the first latents of a ranking ablated."""
