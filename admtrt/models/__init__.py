"""The networks in PyTorch: ADM UNet, upsampler, noisy classifier, and their checkpoints."""
