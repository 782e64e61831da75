"""One file for each command: read the options, make one call, show the result."""
