"""Run pieces of work on a Ray cluster. Independent of sampling."""
