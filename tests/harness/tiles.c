/* The instructions of AMX that kernels use, on tiles in memory: the same bits, on any CPU.
 *
 * What silicon answers with an exception ends the process here: tiles that are not configured, shapes that do not fit.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TILES = 8, ROWS = 16, BYTES = 64 };

typedef struct {
  int rows, bytes; /* 0 where it is not configured */
  uint8_t of[ROWS][BYTES];
} Tile;

static __thread Tile tiles[TILES];

static void fail(const char *what) {
  fprintf(stderr, "tiles: %s\n", what);
  abort();
}

static Tile *configured(int number) {
  if (number < 0 || number >= TILES || !tiles[number].rows) fail("not configured");
  return &tiles[number];
}

int mpq_ldtilecfg(const uint8_t *memory) {
  if (memory[0] != 1) fail("palette is not 1");
  memset(tiles, 0, sizeof tiles);
  for (int t = 0; t < TILES; t++) {
    tiles[t].bytes = memory[16 + 2 * t] | memory[17 + 2 * t] << 8;
    tiles[t].rows = memory[48 + t];
    if (tiles[t].bytes > BYTES || tiles[t].rows > ROWS) fail("larger than a tile");
  }
  return 0;
}

int mpq_tilerelease(void) {
  memset(tiles, 0, sizeof tiles);
  return 0;
}

int mpq_tilezero(int8_t number) {
  Tile *tile = configured(number);
  memset(tile->of, 0, sizeof tile->of);
  return 0;
}

int mpq_tileloadd64(int8_t number, const uint8_t *memory, int64_t apart) {
  Tile *tile = configured(number);
  memset(tile->of, 0, sizeof tile->of);
  for (int row = 0; row < tile->rows; row++) memcpy(tile->of[row], memory + row * apart, (size_t)tile->bytes);
  return 0;
}

int mpq_tileloaddt164(int8_t number, const uint8_t *memory, int64_t apart) {
  return mpq_tileloadd64(number, memory, apart);
}

int mpq_tilestored64(int8_t number, uint8_t *memory, int64_t apart) {
  Tile *tile = configured(number);
  for (int row = 0; row < tile->rows; row++) memcpy(memory + row * apart, tile->of[row], (size_t)tile->bytes);
  return 0;
}

/* Denormals are zeros of their sign, in operands and in results. */
static float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

static float widened(const uint8_t *bfloat16) {
  uint32_t bits = (uint32_t)bfloat16[0] << 16 | (uint32_t)bfloat16[1] << 24;
  float x;
  memcpy(&x, &bits, 4);
  return flushed(x);
}

int mpq_tdpbf16ps(int8_t sums, int8_t left, int8_t right) {
  Tile *c = configured(sums), *a = configured(left), *b = configured(right);
  if (c->rows != a->rows || c->bytes != b->bytes || a->bytes != 4 * b->rows) fail("shapes do not fit");
  for (int m = 0; m < c->rows; m++)
    for (int n = 0; n < c->bytes / 4; n++) {
      float sum, of[2] = {0, 0}; /* of the first and of the second values of all pairs */
      for (int k = 0; k < b->rows; k++)
        for (int i = 0; i < 2; i++)
          of[i] = flushed(__builtin_fmaf(widened(&a->of[m][4 * k + 2 * i]), widened(&b->of[k][4 * n + 2 * i]), of[i]));
      memcpy(&sum, &c->of[m][4 * n], 4);
      sum = flushed(flushed(sum) + flushed(of[0] + of[1]));
      memcpy(&c->of[m][4 * n], &sum, 4);
    }
  return 0;
}

static int integers(int8_t sums, int8_t left, int8_t right, int left_signed, int right_signed) {
  Tile *c = configured(sums), *a = configured(left), *b = configured(right);
  if (c->rows != a->rows || c->bytes != b->bytes || a->bytes != 4 * b->rows) fail("shapes do not fit");
  for (int m = 0; m < c->rows; m++)
    for (int k = 0; k < b->rows; k++)
      for (int n = 0; n < c->bytes / 4; n++) {
        uint32_t sum; /* wraps around, as silicon does */
        memcpy(&sum, &c->of[m][4 * n], 4);
        for (int i = 0; i < 4; i++) {
          uint8_t x = a->of[m][4 * k + i], y = b->of[k][4 * n + i];
          sum += (uint32_t)((left_signed ? (int8_t)x : x) * (right_signed ? (int8_t)y : y));
        }
        memcpy(&c->of[m][4 * n], &sum, 4);
      }
  return 0;
}

int mpq_tdpbusd(int8_t sums, int8_t left, int8_t right) { return integers(sums, left, right, 0, 1); }

int mpq_tdpbsud(int8_t sums, int8_t left, int8_t right) { return integers(sums, left, right, 1, 0); }
