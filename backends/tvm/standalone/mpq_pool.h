/* Threads that share the parallel loops of kernels, in place of the pool of TVM's runtime: there are hundreds of loops in
 * a call, of a few microseconds each. Of mpq.c, for a program, and of mpq_pool.c, for kernels.so. */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

typedef struct { void *sync; int32_t count; } group;
typedef int (*lambda)(int number, group *env, void *data);

enum { SPINS = 20000, TAKING_PART = 16 };
static struct {
    pthread_mutex_t busy, lock; /* a loop is under way, or threads are started; someone goes to sleep, or wakes others */
    pthread_cond_t wake;
    _Atomic uint64_t turn; /* its number, and in the lower bits how many take part: a thread must see both at once */
    _Atomic int left;
    atomic_bool failed, stop;
    lambda work;
    void *data;
    int threads; /* the caller's too */
    pthread_t *others;
    pid_t owner;
    void (*ends)(void); /* called by every thread that ends */
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .threads = 1};

__attribute__((constructor)) static void begin(void) { pool.owner = getpid(); }

static _Thread_local int wanted = 1; /* threads for the loops of this one */

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void next_turn(int taking_part) {
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.turn, ((atomic_load(&pool.turn) >> TAKING_PART) + 1) << TAKING_PART | (uint64_t)taking_part);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

/* The next turn: waited for without sleeping for a while, which is longer than from one kernel to the next. */
static uint64_t turn_after(uint64_t seen) {
    for (int spin = 0; spin < SPINS && atomic_load(&pool.turn) == seen; spin++) relax();
    if (atomic_load(&pool.turn) == seen) {
        pthread_mutex_lock(&pool.lock);
        while (atomic_load(&pool.turn) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
        pthread_mutex_unlock(&pool.lock);
    }
    return atomic_load(&pool.turn);
}

static void *serve(void *own) {
    int number = (int)(intptr_t)own;
    for (uint64_t turn = turn_after(0); !atomic_load(&pool.stop); turn = turn_after(turn)) {
        group env = {NULL, (int32_t)(turn & ((1 << TAKING_PART) - 1))};
        if (number >= env.count) continue;
        if (pool.work(number, &env, pool.data)) atomic_store(&pool.failed, true);
        atomic_fetch_sub(&pool.left, 1);
    }
    if (pool.ends) pool.ends();
    return NULL;
}

/* What kernels call for a loop (TVMBackendParallelLaunch); `tasks` is 0 in all of them: as many as there are threads. Where
 * the pool serves a loop of another caller this one is run by the caller alone. */
static int launch(lambda work, void *data, int tasks) {
    (void)tasks;
    group env = {NULL, wanted};
    if (wanted == 1 || pthread_mutex_trylock(&pool.busy)) return work(0, &(group){NULL, 1}, data);
    if (env.count > pool.threads) env.count = pool.threads; /* others were stopped by who closed a model */
    pool.work = work;
    pool.data = data;
    atomic_store(&pool.failed, false);
    atomic_store(&pool.left, env.count - 1);
    next_turn(env.count);
    if (work(0, &env, data)) atomic_store(&pool.failed, true);
    for (int spin = 0; atomic_load(&pool.left); spin += spin < SPINS) spin < SPINS ? relax() : (void)sched_yield();
    bool failed = atomic_load(&pool.failed);
    pthread_mutex_unlock(&pool.busy);
    return failed ? -1 : 0;
}

/* Loops that this thread starts are shared among so many threads from now on. An error of pthread_create: they are not. */
static int use_threads(int threads) {
    wanted = threads > 0 ? threads : 1;
    if (wanted >= 1 << TAKING_PART) wanted = (1 << TAKING_PART) - 1;
    if (pool.owner != getpid()) { /* a copy of a process that had threads has none */
        pthread_mutex_init(&pool.busy, NULL);
        pthread_mutex_init(&pool.lock, NULL);
        pthread_cond_init(&pool.wake, NULL);
        pool.threads = 1;
        pool.owner = getpid();
    }
    if (wanted <= pool.threads) return 0;
    int code = 0;
    pthread_mutex_lock(&pool.busy);
    if (wanted <= pool.threads) { /* another has started as many while this waited */
        pthread_mutex_unlock(&pool.busy);
        return 0;
    }
    if (pool.threads == 1) {
        atomic_store(&pool.turn, 0);
        atomic_store(&pool.stop, false);
    }
    pthread_t *grown = realloc(pool.others, (size_t)wanted * sizeof *grown);
    if (!grown) code = ENOMEM;
    else pool.others = grown;
    for (; !code && pool.threads < wanted; pool.threads += !code)
        code = pthread_create(&pool.others[pool.threads - 1], NULL, serve, (void *)(intptr_t)pool.threads);
    wanted = code ? 1 : wanted;
    pthread_mutex_unlock(&pool.busy);
    return code;
}

static void stop_threads(void) {
    if (pool.owner != getpid()) return;
    pthread_mutex_lock(&pool.busy); /* the loop of another caller ends first */
    atomic_store(&pool.stop, true);
    if (pool.threads > 1) next_turn(0);
    for (; pool.threads > 1; pool.threads--) pthread_join(pool.others[pool.threads - 2], NULL);
    free(pool.others);
    pool.others = NULL;
    pthread_mutex_unlock(&pool.busy);
}
