"""Benchmarks as commands: what a step and a harvest cost, in units of a floor measured in the same run."""
