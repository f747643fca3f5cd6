"""Tests repeat the tree of the project; a package, so that no other `tests` on the path is taken for it."""
