"""Networks and processes of diffusers' files, told in ADM's terms; nothing of theirs is imported."""
