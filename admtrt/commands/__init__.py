"""One file per command: read the options, make one call, show the result."""
