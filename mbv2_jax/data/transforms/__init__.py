"""Operations on samples, and the pipelines that transform strings describe."""
