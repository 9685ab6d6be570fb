"""How vectors are compressed: codebook, rotation, packing, rounding, and the data of one compressed layer."""

# Bits of a code. They are here so that a command line can name them before it imports NumPy or MLX.
SUPPORTED_BITS = (2, 3, 4, 5, 6, 8)
CODINGS = ("scalar", "trellis")
