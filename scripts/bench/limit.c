/* The same work without a framework: what the cores and the memory bus of this machine allow.
 *
 *     limit stream N D EPOCHS REPEATS        gradient descent, every epoch visits all N rows of D features
 *     limit minibatch N D B STEPS REPEATS    an update per B rows, going round the N rows
 *     limit bandwidth BYTES REPEATS          best of reading an array of BYTES, and of STREAM's triad over three
 *
 * Prints one JSON object: the seconds of each repeat after one that warms up, and the first weight or the bytes moved.
 */
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define WIDE 64
#define RATE 0.001f

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static float *array(long count, unsigned salt) {
  size_t bytes = ((size_t)count * sizeof(float) + 4095) / 4096 * 4096;
  float *a = aligned_alloc(4096, bytes);
  if (!a) {
    fprintf(stderr, "limit: no memory for %zu bytes\n", bytes);
    exit(1);
  }
#pragma omp parallel for
  for (long i = 0; i < count; i++) {
    unsigned h = ((unsigned)i + salt) * 2654435761u;
    h ^= h >> 15;
    h *= 2246822519u;
    h ^= h >> 13;
    a[i] = (float)h * 8.0657e-10f - 1.7320508f; /* uniform, variance 1 */
  }
  return a;
}

/* One update from rows [first, first + rows) with one feature. */
static void step_narrow(const float *x, const float *y, long rows, float *w, float *b) {
  float loss = 0, gw = 0, gb = 0, w0 = *w, b0 = *b;
#pragma omp parallel for reduction(+ : loss, gw, gb)
  for (long i = 0; i < rows; i++) {
    float r = w0 * x[i] + b0 - y[i];
    loss += r * r;
    gw += r * x[i];
    gb += r;
  }
  *w -= RATE * 2 * gw / rows;
  *b -= RATE * 2 * gb / rows;
  if (loss < 0) exit(1); /* Keeps the loss alive: every contestant computes it. */
}

/* The same with WIDE features. */
static void step_wide(const float *x, const float *y, long rows, float *w, float *b) {
  float loss = 0, gb = 0, b0 = *b, gw[WIDE] = {0};
#pragma omp parallel for reduction(+ : loss, gb, gw[:WIDE])
  for (long i = 0; i < rows; i++) {
    const float *xi = x + i * WIDE;
    float r = b0 - y[i];
    for (int j = 0; j < WIDE; j++) r += w[j] * xi[j];
    for (int j = 0; j < WIDE; j++) gw[j] += r * xi[j];
    loss += r * r;
    gb += r;
  }
  for (int j = 0; j < WIDE; j++) w[j] -= RATE * 2 * gw[j] / rows;
  *b -= RATE * 2 * gb / rows;
  if (loss < 0) exit(1);
}

static void step(int d, const float *x, const float *y, long rows, float *w, float *b) {
  (d == 1 ? step_narrow : step_wide)(x, y, rows, w, b);
}

static void report(const double *seconds, int repeats, const char *key, double value) {
  printf("{\"seconds\": [");
  for (int i = 0; i < repeats; i++) printf("%s%.9f", i ? ", " : "", seconds[i]);
  printf("], \"%s\": %.9g}\n", key, value);
}

static void descend(long n, int d, long batch, long steps, int repeats) {
  if (d != 1 && d != WIDE) {
    fprintf(stderr, "limit: d must be 1 or %d\n", WIDE);
    exit(2);
  }
  float *x = array(n * d, 0), *y = array(n, 0x9e3779b9u), w[WIDE] = {0};
  double *seconds = calloc(repeats, sizeof(double));
#pragma omp parallel for
  for (long i = 0; i < n; i++) {
    y[i] -= 2;
    for (int j = 0; j < d; j++) y[i] += 9 * x[i * d + j];
  }
  for (int repeat = -1; repeat < repeats; repeat++) {
    float b = 0;
    memset(w, 0, sizeof w);
    double start = now();
    for (long s = 0, at = 0; s < steps; s++, at = at + 2 * batch <= n ? at + batch : 0)
      step(d, x + at * d, y + at, batch, w, &b);
    if (repeat >= 0) seconds[repeat] = now() - start;
  }
  report(seconds, repeats, "weight", w[0]);
}

static void bandwidth(long bytes, int repeats) {
  long count = bytes / sizeof(float);
  float *a = array(count, 0), *b = array(count, 1), *c = array(count, 2);
  double *seconds = calloc(repeats, sizeof(double)), best = 0;
  for (int repeat = -1; repeat < repeats; repeat++) {
    float sum = 0;
    double start = now();
#pragma omp parallel for reduction(+ : sum)
    for (long i = 0; i < count; i++) sum += a[i];
    double reading = now() - start;
    a[0] = sum * 1e-9f;
    start = now();
#pragma omp parallel for
    for (long i = 0; i < count; i++) a[i] = b[i] + 0.5f * c[i];
    double triad = (now() - start) / 4; /* Two arrays read, one read for ownership and written. */
    if (repeat >= 0) seconds[repeat] = reading < triad ? reading : triad;
    best += a[count / 2];
  }
  report(seconds, repeats, "bytes", (double)count * sizeof(float));
  if (best == 12345.678) puts("");
}

int main(int argc, char **argv) {
  if (argc == 6 && !strcmp(argv[1], "stream")) {
    long n = atol(argv[2]);
    descend(n, atoi(argv[3]), n, atol(argv[4]), atoi(argv[5]));
  } else if (argc == 7 && !strcmp(argv[1], "minibatch")) {
    descend(atol(argv[2]), atoi(argv[3]), atol(argv[4]), atol(argv[5]), atoi(argv[6]));
  } else if (argc == 4 && !strcmp(argv[1], "bandwidth")) {
    bandwidth(atol(argv[2]), atoi(argv[3]));
  } else {
    fprintf(stderr, "limit: see the head of limit.c\n");
    return 2;
  }
  return 0;
}
