"""Measurements that re-run a model."""
