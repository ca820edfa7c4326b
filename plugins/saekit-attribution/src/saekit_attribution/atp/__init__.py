"""The analyzer `atp`: which latents cause a flagged answer, sample by sample."""
