"""Benchmarks and evaluation: never imported by the plugin, only by the command line."""
