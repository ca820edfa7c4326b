"""The built-in architectures, one in each file."""
