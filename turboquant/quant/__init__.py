"""How vectors are compressed: codebook, rotation, packing, rounding, and the data of one compressed layer."""
