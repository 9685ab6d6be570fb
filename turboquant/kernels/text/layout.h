// Where things are in the arrays that attention/gpu.py puts together, as numbers of four bytes: in `constants` of a layer
// with H KV heads, and in `plan`, whose first numbers are whole and whose later ones are floats.
#define KEY_MEAN(H) 0
#define VALUE_MEAN(H) ((H) * DIM)
#define SIGNS(H) (2 * (H) * DIM)
#define LEVELS(H) ((2 * (H) + 1) * DIM)
#define VALUE_FACTORS(H) (LEVELS(H) + 4 * 256)
#define TRELLIS_PAIRS(H) (VALUE_FACTORS(H) + (H))
#define SIZES 16
