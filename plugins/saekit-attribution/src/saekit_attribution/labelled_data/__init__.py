"""Labelled data: prompts with answers, some of them flagged, and how they become tokens."""
