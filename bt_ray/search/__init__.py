"""Prompt search: searchers propose candidates, Ray Tune scores them side by side, racing stops the hopeless ones.

`bt_ray.search.base` holds the protocol and the registry, `bt_ray.search.experiment` runs a search.
README.md in this folder says how to write a searcher.
"""
