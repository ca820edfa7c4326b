from interventions.cases import case, gpt2, language, sae  # noqa: F401
