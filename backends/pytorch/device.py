"""The device that PyTorch models run on."""


def device() -> str:
    """Return the device that models run on: Metal if available, else the CPU."""
    import torch

    return "mps" if torch.backends.mps.is_available() else "cpu"
