"""Commands that look at data and models."""
