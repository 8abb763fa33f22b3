"""Commands that examine data and models; they may use every other part of the package."""
