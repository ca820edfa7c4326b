"""The effect of each latent on a logit difference, estimated or exact; both analyzers rank latents by it."""
