// The emulator's own state and operations: see emulator.h.
#include "emulator.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <type_traits>
#include <vector>

namespace emulator {
enum { THREADS = 1024, STACK = 1 << 19, LANES = 32 };
enum Wait { RUNS, WARP, BLOCK, ENDED };
struct Copy { char *target; const char *source; unsigned size, count; };
struct Exchange { Word words[6]; };

Index block;
int current;
static int threads;
static Wait waiting[THREADS];
static void *contexts[THREADS], *scheduler;
static char *stacks;
static Exchange exchanged[2][THREADS];
static unsigned char parity[THREADS];
static std::deque<std::vector<Copy>> copies[THREADS];
// What four warps multiply together: 16 rows of a warp, A, by a matrix in shared memory, at which its operand points.
// leading, period: bytes between matrices of 8 rows of 16 bytes, along the sum and along the columns.
struct Product {
    std::vector<Word *> sums;
    Word a[2][8];
    const char *b;
    unsigned leading, period, kind;
    bool adds, floats, turned;
};
static std::deque<std::vector<Product>> products[THREADS];
static bool ordered[THREADS];   // registers, before the products that are asked for next
static bool unseen[THREADS];    // what its copies have written to shared memory, by tensor cores that read there
Word asked_address;
static const bool early = getenv("MPQ_EMULATED_EARLY"), truncating = getenv("MPQ_EMULATED_TRUNCATING");
static void (*body)(void **);
static void **arguments;
alignas(1024) char anchor;

// Of each byte of shared memory who has written and read it last, and between which barriers: what no barrier separates
// and happens in two threads is a race, whatever order the emulator runs them in. Kernels are compiled with calls of
// these functions for all that they read and write (-fsanitize=thread); copies count from when they are asked for until
// they have been waited for.
struct Seen { unsigned block, written, read; short writer, reader; bool others, pending; };
extern "C" char __start_mpq_shared[] __attribute__((visibility("hidden"), weak));
extern "C" char __stop_mpq_shared[] __attribute__((visibility("hidden"), weak));
static Seen *seen;
static unsigned epochs[THREADS], blocks;
enum Access { READS, WRITES, COPIES, LANDS };

[[noreturn]] static void race(const char *what, const char *place, int other) {
    fprintf(stderr, "emulator: a race: thread %d %s shared memory at %ld; thread %d, no barrier between them\n", current,
            what, (long)(place - __start_mpq_shared), other);
    abort();
}

static void note(const void *at, long count, Access access) {
    if ((char *)at < __start_mpq_shared || (char *)at >= __stop_mpq_shared) return;
    if (!seen) seen = (Seen *)calloc(__stop_mpq_shared - __start_mpq_shared, sizeof(Seen));
    for (const char *place = (char *)at; place < (char *)at + count; ++place) {
        Seen &byte = seen[place - __start_mpq_shared];
        bool known = byte.block == blocks;
        if (!known) byte = {blocks, 0, 0, -1, -1, false, false};
        unsigned now = epochs[current] + 1;
        bool written = byte.written == now && byte.writer != current;
        bool read = byte.read == now && (byte.others || byte.reader != current);
        if (access == READS) {
            if (byte.pending) race("reads what a copy has not brought to", place, byte.writer);
            if (!byte.written) race("reads what nobody has written to", place, -1);
            if (written) race("reads what has just been written to", place, byte.writer);
            byte.others = byte.read == now && (byte.others || byte.reader != current);
            byte.read = now, byte.reader = (short)current;
            continue;
        }
        if (access != LANDS && byte.pending) race("writes over a copy to", place, byte.writer);
        if (written) race("writes what has just been written to", place, byte.writer);
        if (read) race("writes what has just been read from", place, byte.reader);
        byte.written = now, byte.writer = (short)current, byte.pending = access == COPIES;
    }
}

extern "C" {
#define NOTES(n) \
    void __tsan_read##n(void *at) { note(at, n, READS); } \
    void __tsan_write##n(void *at) { note(at, n, WRITES); } \
    void __tsan_unaligned_read##n(void *at) { note(at, n, READS); } \
    void __tsan_unaligned_write##n(void *at) { note(at, n, WRITES); }
NOTES(1) NOTES(2) NOTES(4) NOTES(8) NOTES(16)
void __tsan_read_range(void *at, long count) { note(at, count, READS); }
void __tsan_write_range(void *at, long count) { note(at, count, WRITES); }
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}

extern "C" void emulator_switch(void **save, void *load);
asm(R"(
.text
emulator_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");

static void pause(Wait reason) {
    waiting[current] = reason;
    emulator_switch(&contexts[current], scheduler);
}

static void main_of_thread() {
    body(arguments);
    for (auto &group : copies[current]) for (auto &copy : group)
        if (copy.target) { fprintf(stderr, "emulator: a thread ends with copies that nothing waited for\n"); break; }
    for (auto &group : products[current])
        if (!group.empty()) { fprintf(stderr, "emulator: a thread ends with products that nothing waited for\n"); break; }
    pause(ENDED);
    abort();
}

static void resume(int thread) {
    current = thread;
    waiting[thread] = RUNS;
    emulator_switch(&scheduler, contexts[thread]);
}

[[noreturn]] static void diverged() {
    fprintf(stderr, "emulator: threads of a warp wait for different things\n");
    abort();
}

// A warp up to the next barrier of the block, or to its end.
static void run_warp(int first, int end) {
    for (;;) {
        for (int i = first; i < end; ++i) if (waiting[i] != ENDED) resume(i);
        Wait reason = ENDED;
        for (int i = first; i < end; ++i) if (waiting[i] != ENDED) reason = waiting[i];
        for (int i = first; i < end; ++i) if (waiting[i] != reason && !(waiting[i] == ENDED && reason == BLOCK)) diverged();
        if (reason != WARP) return;
    }
}

static void run_block(int count) {
    if (!stacks) stacks = (char *)malloc((size_t)THREADS * STACK);
    threads = count;
    ++blocks;
    for (int i = 0; i < count; ++i) {
        void **top = (void **)(stacks + (size_t)(i + 1) * STACK - 64);
        *--top = nullptr;  // where the body's caller would return to
        *--top = (void *)main_of_thread;
        top -= 6;
        contexts[i] = top;
        waiting[i] = RUNS;
        parity[i] = 0;
        epochs[i] = 0;
        copies[i].assign(1, {});
        products[i].assign(1, {});
        ordered[i] = unseen[i] = false;
    }
    int warps = (count + LANES - 1) / LANES;
    for (bool forward = !early, any = true; any; forward = !forward) {
        any = false;
        for (int i = 0; i < warps; ++i) {
            int first = (forward ? i : warps - 1 - i) * LANES, end = first + LANES < count ? first + LANES : count;
            bool ended = true;
            for (int k = first; k < end; ++k) ended = ended && waiting[k] == ENDED;
            if (!ended) run_warp(first, end);
            for (int k = first; k < end; ++k) any = any || waiting[k] != ENDED;
        }
    }
}

static char *shared(Word address) { return &anchor + (int32_t)address; }

// What the lanes of a warp show each other; every lane may read it until its next exchange but one.
static const Exchange *exchange(const Exchange &own) {
    int now = parity[current] ^= 1;
    exchanged[now][current] = own;
    pause(WARP);
    return exchanged[now] + current / LANES * LANES;
}

void barrier() { ++epochs[current], pause(BLOCK); }

static void copy(const Copy &c) {
    char line[16] = {0};
    memcpy(line, c.source, c.count);
    memcpy(c.target, line, c.size);
}

void copy_async(unsigned size, Word target, const void *source, unsigned count) {
    Copy asked = {shared(target), (const char *)source, size, count};
    if ((uintptr_t)asked.target % size || (count && (uintptr_t)source % size)) {
        fprintf(stderr, "emulator: a copy of %u bytes is not aligned\n", size);
        abort();
    }
    note(asked.target, size, early ? WRITES : COPIES);
    if (early) copy(asked);
    else copies[current].back().push_back(asked);
}

void copy_or_fill(unsigned size, Word target, const void *source, Word word, int inside, unsigned count) {
    if (inside) return copy_async(size, target, source, count);
    note(shared(target), size, WRITES);
    for (unsigned i = 0; i < size; i += 4) memcpy(shared(target) + i, &word, 4);
    unseen[current] = true;
}

void commit() { copies[current].emplace_back(); }

void wait_group(size_t left) {
    auto &groups = copies[current];
    while (groups.size() - 1 > left) {
        for (auto &c : groups.front()) copy(c), note(c.target, c.size, LANDS), unseen[current] = true;
        groups.pop_front();
    }
}

void ldmatrix_x4(Word &r0, Word &r1, Word &r2, Word &r3, Word row) {
    int lane = current % LANES;
    const Exchange *warp = exchange({{row}});
    Word *registers[] = {&r0, &r1, &r2, &r3};
    for (int k = 0; k < 4; ++k) {
        const char *own = shared(warp[k * 8 + lane / 4].words[0]) + lane % 4 * 4;
        note(own, 4, READS);
        memcpy(registers[k], own, 4);
    }
}

// Lane 4 g + t has column g of a matrix of two-byte values, rows 2 t and 2 t + 1.
void ldmatrix_x4_trans(Word &r0, Word &r1, Word &r2, Word &r3, Word row) {
    int lane = current % LANES;
    const Exchange *warp = exchange({{row}});
    Word *registers[] = {&r0, &r1, &r2, &r3};
    for (int k = 0; k < 4; ++k)
        for (int e = 0; e < 2; ++e) {
            const char *own = shared(warp[k * 8 + lane % 4 * 2 + e].words[0]) + lane / 4 * 2;
            note(own, 2, READS);
            memcpy((char *)registers[k] + 2 * e, own, 2);
        }
}

struct Bfloat16 {
    uint16_t bits;
    operator float() const {
        Word word = (Word)bits << 16;
        float value;
        memcpy(&value, &word, 4);
        return value;
    }
};

// To the nearest, ties to even; of all NaN that one which the instruction makes.
static Word rounded(float value) {
    Word bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

void cvt_bf16x2(Word &d, float high, float low) { d = rounded(high) << 16 | rounded(low); }

// Likewise, and the largest where it is beyond that (.satfinite).
static Word half_of(float value) {
    if (value != value) return 0x7fff;
    const float largest = 65504;
    _Float16 nearest = value > largest ? largest : value < -largest ? -largest : value;
    uint16_t bits;
    memcpy(&bits, &nearest, 2);
    return bits;
}

void cvt_f16x2(Word &d, float high, float low) { d = half_of(high) << 16 | half_of(low); }

// A sum of a tensor core and products more, in the order of k, or, truncating, as no core does it worse: eight products
// at a time, which with the sum are shifted to the largest exponent of all and lose what is behind its last bit, towards
// zero (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021: as the V100's; others keep a bit or two more).
enum { PRODUCTS = 16, TOGETHER = 8 };

static float summed(float sum, const float *products) {
    if (!truncating) {
        for (int k = 0; k < PRODUCTS; ++k) sum += products[k];
        return sum;
    }
    for (int first = 0; first < PRODUCTS; first += TOGETHER) {
        const float *own = products + first;
        double largest = fabs(sum), total = 0;
        float plain = sum;
        for (int k = 0; k < TOGETHER; ++k) largest = fmax(largest, fabs(own[k])), plain += own[k];
        if (!std::isfinite(plain) || largest == 0) { sum = plain; continue; }
        double unit = ldexp(1, ilogb(largest) - 23);
        total = trunc(sum / unit);
        for (int k = 0; k < TOGETHER; ++k) total += trunc(own[k] / unit);
        total *= unit;
        sum = (float)total;
        if (fabs(sum) > fabs(total)) sum = nextafterf(sum, 0);
    }
    return sum;
}

// m16n8k32 of bytes (PTX ISA): register 2 (k >= 16) + (row >= 8) of A in lane 4 (row % 8) + k % 16 / 4, byte k % 4;
// register k >= 16 of B in lane 4 column + k % 16 / 4; sums of row lane / 4 (+ 8), column 2 (lane % 4) (+ 1). m16n8k16
// of values of two bytes is the same with half as many of them in the same words.
template <class Sum, class A, class B, class D>
static void mma(D *(&&d)[4], const Word (&own)[6], const D (&c)[4]) {
    int lane = current % LANES;
    Exchange shown;
    memcpy(shown.words, own, sizeof own);
    const Exchange *warp = exchange(shown);
    for (int e = 0; e < 4; ++e) {
        int row = lane / 4, column = lane % 4 * 2 + e % 2, count = 0;
        Sum products[32 / sizeof(A)], sum = (Sum)c[e];
        for (int half = 0; half < 2; ++half)
            for (int quad = 0; quad < 4; ++quad) {
                const A *a = (const A *)&warp[row * 4 + quad].words[2 * half + e / 2];
                const B *b = (const B *)&warp[column * 4 + quad].words[4 + half];
                for (size_t k = 0; k < 4 / sizeof(A); ++k) products[count++] = (Sum)a[k] * (Sum)b[k];
            }
        if constexpr (std::is_same<Sum, float>::value) sum = summed(sum, products);
        else for (Sum product : products) sum += product;
        *d[e] = (D)sum;
    }
}

void mma_u8_s8(Word &d0, Word &d1, Word &d2, Word &d3, Word a0, Word a1, Word a2,
                      Word a3, Word b0, Word b1, Word c0, Word c1, Word c2, Word c3) {
    mma<int32_t, uint8_t, int8_t, Word>({&d0, &d1, &d2, &d3}, {a0, a1, a2, a3, b0, b1}, {c0, c1, c2, c3});
}

// The order in which the instruction adds is not specified (`summed`).
void mma_bf16(float &d0, float &d1, float &d2, float &d3, Word a0, Word a1, Word a2, Word a3,
                     Word b0, Word b1, float c0, float c1, float c2, float c3) {
    mma<float, Bfloat16, Bfloat16, float>({&d0, &d1, &d2, &d3}, {a0, a1, a2, a3, b0, b1}, {c0, c1, c2, c3});
}

// wgmma m64nNk32 of bytes (PTX ISA 9.7.17.5): the registers of A and of sums are those of m16n8k32 above, of the warp's
// 16 rows and of 8 columns after the other. Where the operand says so, the 16-byte parts of column n, 64 bytes wide,
// lie swapped by n / 2 % 4, 8 columns in a period.
// So it is of m64nNk16 of bfloat16 (9.7.17.5.1), whose rows may be of other sizes and, turned, are of one k each.
static const char *swapped(const char *place, unsigned mask = 3) {
    uintptr_t within = place - &anchor;
    return &anchor + (within ^ (within >> 7 & mask) << 4);
}

static void add_floats(const Product &p) {
    int lane = current % LANES;
    for (size_t i = 0; i < p.sums.size(); ++i) {
        size_t column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float products[PRODUCTS], sum = 0;
        if (p.adds) memcpy(&sum, p.sums[i], 4);
        for (int k = 0; k < PRODUCTS; ++k) {
            size_t row = 256 >> p.kind, width = row / 2;
            const char *place = p.turned ? p.b + column / width * p.leading + k / 8 * p.period + k % 8 * row
                                         : p.b + column / 8 * p.period + column % 8 * row;
            const char *value = swapped(place + (p.turned ? column % width : k) * 2, row / 16 - 1);
            note(value, 2, READS);
            products[k] = (float)((const Bfloat16 *)p.a[i / 2 % 2])[k] * (float)*(const Bfloat16 *)value;
        }
        sum = summed(sum, products);
        memcpy(p.sums[i], &sum, 4);
    }
}

static void add(const Product &p) {
    int lane = current % LANES;
    if (p.floats) return add_floats(p);
    for (size_t i = 0; i < p.sums.size(); ++i) {
        size_t column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        int32_t sum = p.adds ? (int32_t)*p.sums[i] : 0;
        for (int k = 0; k < 32; ++k) {
            const char *value = swapped(p.b + column / 8 * p.period + column % 8 * 64 + k);
            note(value, 1, READS);
            sum += (int32_t)((const int8_t *)p.a[i / 2 % 2])[k] * *(const uint8_t *)value;
        }
        *p.sums[i] = (Word)sum;
    }
}

void wgmma_fence() { ordered[current] = true; }
void fence_async() { unseen[current] = false; }

static void multiply(std::vector<Word *> sums, Word a0, Word a1, Word a2, Word a3, uint64_t operand, bool adds,
                     bool floats, bool turned = false) {
    bool seen = ordered[current];
    for (int i = 0; i < threads; ++i) seen = seen && !unseen[i];
    if (!seen) { fprintf(stderr, "emulator: no fence before a product\n"); abort(); }
    unsigned kind = operand >> 62;  // of swaps: none, or in rows of 128, 64 or 32 bytes
    if (!kind || (!floats && kind != 2) || operand >> 49 & 7) {
        fprintf(stderr, "emulator: an operand of another kind\n");
        abort();
    }
    int32_t behind = (int32_t)(asked_address - (Word)(operand << 4)) << 14 >> 14;  // of 18 bits
    auto field = [=](int first) { return (unsigned)(operand >> first & 0x3fff) << 4; };
    Product p = {sums, {}, shared(asked_address - (Word)behind), field(16), field(32), kind, adds, floats, turned};
    const Exchange *warp = exchange({{a0, a1, a2, a3}});
    for (int half = 0; half < 2; ++half)
        for (int k = 0; k < 8; ++k) p.a[half][k] = warp[current % LANES / 4 * 4 + k % 4].words[half + k / 4 * 2];
    if (early) add(p);
    else products[current].back().push_back(p);
}

void wgmma_s8_u8(std::initializer_list<Word *> sums, Word a0, Word a1, Word a2, Word a3, uint64_t operand, bool adds) {
    multiply(sums, a0, a1, a2, a3, operand, adds, false);
}

void wgmma_bf16(std::initializer_list<float *> sums, Word a0, Word a1, Word a2, Word a3, uint64_t operand, bool adds,
                bool turned) {
    std::vector<Word *> words;
    for (float *sum : sums) words.push_back((Word *)sum);
    multiply(words, a0, a1, a2, a3, operand, adds, true, turned);
}

void wgmma_commit() {
    products[current].emplace_back();
    ordered[current] = false;
}

void wgmma_wait(size_t left) {
    auto &groups = products[current];
    while (groups.size() - 1 > left) {
        for (auto &p : groups.front()) add(p);
        groups.pop_front();
    }
}

float exp2(float x) {  // denormals are zero
    float y = __builtin_exp2f(x);
    return y < 0x1p-126f ? 0.0f : of_gpu(y);
}

float shuffle_xor(float value, int distance) {
    Exchange shown;
    memcpy(shown.words, &value, 4);
    const Exchange *warp = exchange(shown);
    memcpy(&value, warp[(current % LANES) ^ distance].words, 4);
    return value;
}

int any(int there) {
    const Exchange *warp = exchange({{(Word)(there != 0)}});
    for (int lane = 0; lane < LANES; ++lane) there |= warp[lane].words[0];
    return there != 0;
}

void launch(void (*kernel)(void **), const unsigned *grid, unsigned count, void **given, bool fibers) {
    body = kernel;
    arguments = given;
    for (unsigned y = 0; y < grid[1]; ++y)
        for (unsigned x = 0; x < grid[0]; ++x) {
            block = {(int)x, (int)y, 0};
            if (fibers) run_block((int)count);
            else for (current = 0; current < (int)count; ++current) body(arguments);
        }
}
}  // namespace emulator
