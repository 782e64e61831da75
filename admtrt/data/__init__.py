"""Images from files: read, checked, labelled, cropped and divided, without PyTorch."""
