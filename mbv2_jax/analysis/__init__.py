"""Commands that examine data and models; they may use everything else in the package."""
