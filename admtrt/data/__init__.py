"""Images from files: read, check, label, crop and split them, without PyTorch."""
