"""The page's words, one module per language; ``en`` is the original and says which keys there are."""
