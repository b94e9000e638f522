"""fomoe-flwr: one Mixture-of-Experts language model, pre-trained by many sites that each hold some of it."""

__version__ = "0.1.0"
