"""Many machines: pieces of work on a Ray cluster. Knows nothing of sampling."""
