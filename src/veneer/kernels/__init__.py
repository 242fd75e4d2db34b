"""The operations that Veneer's speed and memory come from, and what computes them on which device."""

# First, alone: if it refuses VENEER_KERNELS, nothing of this package stays imported that could be used without kernels.
from veneer.kernels import extension as _extension  # noqa: F401
from veneer.kernels import serving as _serving  # noqa: F401  registers the kernels
