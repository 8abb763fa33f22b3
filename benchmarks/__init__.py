"""Benchmarks: one script for each question, with a CSV file of its results. See their --help."""
