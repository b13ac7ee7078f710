"""Proves of a scorer, anybody's, that it is causal, normalised, scores before it learns, and passes once. docs/audit.md"""
