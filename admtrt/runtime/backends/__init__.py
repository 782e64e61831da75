"""Inference libraries behind one interface: :class:`admtrt.runtime.sampler.Denoiser`."""
