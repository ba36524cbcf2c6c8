"""The measuring programs themselves."""
