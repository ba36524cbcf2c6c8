"""Tests against real processes, over real sockets, with real clients."""
