// Products of a metric's rows with the vectors of 64 tokens. Needs a backend's header.

// The coordinate of keys that is searched as number n: of each 32, the 16 of first strings come first.
FUNCTION int searched(int n) { return n / 32 * 32 + n % 16 * 2 + n / 16 % 2; }

FUNCTION float clipped(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

// Products of 16 rows of a matrix with vectors: sums += rows times vectors, from number `first` on.
//
// rows: pairs of halves, of coordinates as they are searched. vectors: pairs of halves along tokens, coordinates `stride`
// apart. A lane gets those of its tokens 8 ROW(lane) + 2 m and the next, and of the rows 8 n + COLUMN(lane) and the next, in sums[m][n].
FUNCTION void add_products(
    THREAD float (&sums)[4][2][4], GLOBAL const u32* rows, GLOBAL const u32* vectors, int stride, int first, int lane) {
    for (int begin = first; begin < DIM; begin += 16 * AT_ONCE) {  // reading AT_ONCE times 16 coordinates takes as long as 16
        u32 one[AT_ONCE][2][4], other[AT_ONCE][2][4], right[AT_ONCE][2][2];
        UNROLL for (int part = 0; part < AT_ONCE; ++part) {
            const int k = begin + 16 * part < DIM ? begin + 16 * part : DIM - 16;
            UNROLL for (int i = 0; i < 2; ++i) {
                GLOBAL const u32* at = vectors + searched(k + 8 * i + COLUMN(lane)) * stride + ROW(lane) * 4;
                READ_16(at, one[part][i]);
                READ_16(at + 2 * stride, other[part][i]);
                UNROLL for (int n = 0; n < 2; ++n) {
                    right[part][n][i] = right_factor_of_rows(rows + 8 * n * (DIM / 2) + k / 2 + 4 * i, DIM / 2, lane);
                }
            }
        }
        UNROLL for (int part = 0; part < AT_ONCE; ++part) {
            if (begin + 16 * part >= DIM) break;
            UNROLL for (int m = 0; m < 4; ++m) {
                u32 left[4];
                UNROLL for (int i = 0; i < 2; ++i) {
                    left[2 * i] = LOW_HALVES(one[part][i][m], other[part][i][m]);
                    left[2 * i + 1] = HIGH_HALVES(one[part][i][m], other[part][i][m]);
                }
                UNROLL for (int n = 0; n < 2; ++n) multiply_add(sums[m][n], left, right[part][n]);
            }
        }
    }
}
