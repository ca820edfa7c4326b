"""saekit-unlearning: removes knowledge from a model through an SAE, and measures what is left of it."""
