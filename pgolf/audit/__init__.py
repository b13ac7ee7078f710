"""Tests whether a scorer, anybody's, is causal, normalised, scores before it learns, in one pass. docs/audit.md"""
