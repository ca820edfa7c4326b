from interventions.models import case, gpt2, language, sae  # noqa: F401
