"""Operations on samples, and the strings that name them."""
