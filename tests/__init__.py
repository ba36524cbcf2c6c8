"""Tests; a package, so that test folders may share helpers and file names."""
