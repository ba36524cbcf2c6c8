"""The page in a real chromium, against real services."""
