"""Translate networks and processes of diffusers' files to ADM's, without importing diffusers."""
