"""xedge: make trained CNNs small and fast on real edge devices, with proof."""

__version__ = "0.1.0"
