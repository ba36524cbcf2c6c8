"""The page: drop a file, speak, read, correct, take it away. Talks to the service over HTTP only."""
