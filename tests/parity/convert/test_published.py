"""The table of published weights."""
