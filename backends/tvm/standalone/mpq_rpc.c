/* Runs programs that a client sends, on a device: what `mpqc bench --rpc` and `mpqc latency --rpc` measure with.
 *
 *   MPQ_TOKEN=secret mpq_rpc [--host ADDRESS] [--port N] [--folder DIR] [--with COMMAND]
 *
 * Whoever knows the token may run anything here, so there always is one: without MPQ_TOKEN the server makes one up and
 * prints it. One client at a time; its files lie in a folder of its own in DIR, which goes when the connection ends.
 * What a program leaves running ends with it, and it ends with the connection, whatever ends that: the client, a signal,
 * or the death of the server, whose leftovers the next one in DIR removes. COMMAND stands before each program, as
 * "taskset f0" does to choose cores.
 *
 * A client sends "MPQ1" and the token, then requests of one letter; numbers are little-endian, strings have their
 * length before them (u32). P name size (u64) bytes: a file. R count (u32) words: runs the file that the first one
 * names in the folder; the answer is the exit code (u32, 256 and above: a signal) and what was printed. G name: a file
 * back. Every answer begins with 0, or with 1 and a sentence; after one about a number too large the server hangs up. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NAMED "mpq-rpc-" /* folders and control groups; six letters follow */
enum { WORDS = 64, FILES = 1024, LONGEST = 4096, PIECE = 1 << 16, SHORTEST_TOKEN = 16 };
enum { GREETING_MS = 10000, STALLED_MS = 60000, LINGER_MS = 2000, UNKILLABLE_MS = 10000 };
static char where[LONGEST], groups[LONGEST], group[2 * LONGEST], *before[WORDS];
static int here = -1; /* the folder of the connection, locked */
static volatile sig_atomic_t stopped;
static sigset_t unblocked; /* signals come only while something is waited for, so none is missed */

/* Reads nothing: between reading and writing, a page that a fork shares is copied, and a signal that came meanwhile would
 * be forgotten. */
static void stop(int number) {
    if (number != SIGCHLD) stopped = 1;
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

static int64_t deadline;  /* of all that is said until then; 0: there is none */
static int patience = -1; /* for silence, in milliseconds; -1: for ever, as between requests */

static bool ready(int client, short what) {
    for (;;) {
        int64_t left = deadline ? deadline - now() : patience;
        if (stopped || (deadline && left <= 0)) return false;
        struct pollfd one = {.fd = client, .events = what};
        struct timespec longest = {left / 1000, left % 1000 * 1000000};
        int found = ppoll(&one, 1, left < 0 ? NULL : &longest, &unblocked);
        if (found >= 0 || errno != EINTR) return found > 0;
    }
}

static bool take(int client, void *data, size_t bytes) {
    for (char *at = data; bytes;) {
        ssize_t got = ready(client, POLLIN) ? recv(client, at, bytes, MSG_DONTWAIT) : 0;
        if (got <= 0) return false;
        at += got;
        bytes -= (size_t)got;
    }
    return true;
}

static bool give(int client, const void *data, size_t bytes) {
    for (const char *at = data; bytes;) {
        ssize_t put = ready(client, POLLOUT) ? send(client, at, bytes, MSG_NOSIGNAL | MSG_DONTWAIT) : 0;
        if (put <= 0) return false;
        at += put;
        bytes -= (size_t)put;
    }
    return true;
}

static bool give_text(int client, const char *text, uint32_t bytes) {
    return give(client, &bytes, 4) && give(client, text, bytes);
}

static bool answer(int client, const char *sentence) {
    uint8_t bad = sentence != NULL;
    return give(client, &bad, 1) && (!bad || give_text(client, sentence, (uint32_t)strlen(sentence)));
}

/* Answers with a sentence after which the client is not understood any more. What it still sends is thrown away for a
 * while, since it would not see the answer of who does not listen. */
__attribute__((format(printf, 2, 3))) static bool refuse(int client, const char *format, ...) {
    static char sentence[LONGEST], spill[PIECE];
    va_list values;
    va_start(values, format);
    vsnprintf(sentence, sizeof sentence, format, values);
    va_end(values);
    if (answer(client, sentence) && !shutdown(client, SHUT_WR)) {
        deadline = now() + LINGER_MS;
        while (take(client, spill, 1)) recv(client, spill, sizeof spill, MSG_DONTWAIT);
    }
    return false;
}

/* A string of less than LONGEST bytes; NULL where the connection ends. */
static char *text(int client) {
    uint32_t bytes;
    if (!take(client, &bytes, 4)) return NULL;
    if (bytes >= LONGEST) {
        refuse(client, "a name, word or token of %u bytes is too long: it may have %d", bytes, LONGEST - 1);
        return NULL;
    }
    char *found = calloc(1, bytes + 1);
    if (found && take(client, found, bytes)) return found;
    free(found);
    return NULL;
}

/* A name of a file in the folder: nothing that leads out of it. */
static bool plain(const char *name) {
    size_t length = strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-");
    return length && !name[length] && name[0] != '.' && name[0] != '-';
}

static bool put(int client) {
    static char piece[PIECE];
    static int files;
    char *name = text(client);
    uint64_t left;
    if (!name || !take(client, &left, 8)) {
        free(name);
        return false;
    }
    bool good = plain(name);
    int file = good ? open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0700) : -1;
    free(name);
    struct statvfs room;
    if (++files > FILES || fstatvfs(here, &room) || left / room.f_frsize >= room.f_bavail) {
        if (file >= 0) close(file);
        if (files > FILES) return refuse(client, "a connection may send %d files", FILES);
        return refuse(client, "the device has no room for a file of %llu bytes", (unsigned long long)left);
    }
    const char *wrong = file >= 0 ? NULL : good ? "the file cannot be written" : "this name cannot be that of a file";
    while (left) {
        size_t now = left < PIECE ? (size_t)left : PIECE;
        if (!take(client, piece, now)) break;
        if (!wrong && write(file, piece, now) != (ssize_t)now) wrong = "the device has no room for it";
        left -= now;
    }
    if (file >= 0) close(file);
    return !left && answer(client, wrong);
}

static bool get(int client) {
    static char piece[PIECE];
    char *name = text(client);
    if (!name) return false;
    int file = plain(name) ? open(name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK) : -1;
    free(name);
    struct stat about;
    if (file < 0 || fstat(file, &about) || !S_ISREG(about.st_mode)) {
        if (file >= 0) close(file);
        return answer(client, "there is no such file");
    }
    uint64_t left = (uint64_t)about.st_size;
    bool good = answer(client, NULL) && give(client, &left, 8);
    while (good && left) {
        ssize_t got = read(file, piece, left < PIECE ? (size_t)left : PIECE);
        good = got > 0 && give(client, piece, (size_t)got);
        left -= good ? (uint64_t)got : 0;
    }
    close(file);
    return good;
}

static void write_to(const char *folder, const char *name, const char *text) {
    char path[3 * LONGEST];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int file = *folder ? open(path, O_WRONLY | O_CLOEXEC) : -1;
    if (file < 0) return; /* what is not there is done without, and so is what refuses */
    ssize_t written = write(file, text, strlen(text));
    (void)written;
    close(file);
}

/* The parent of a process, 0 where it cannot be told. */
static pid_t parent(const char *number) {
    char path[LONGEST], text[LONGEST];
    snprintf(path, sizeof path, "/proc/%.20s/stat", number);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = file >= 0 ? read(file, text, sizeof text - 1) : 0;
    if (file >= 0) close(file);
    text[got > 0 ? got : 0] = 0;
    char *name_ends = strrchr(text, ')');
    int found = 0;
    return name_ends && sscanf(name_ends, ") %*c %d", &found) == 1 ? found : 0;
}

/* Ends all that descends from this process, which takes in orphans: children of those that are killed come to it. */
static void end_all(void) {
    int64_t last = now() + UNKILLABLE_MS;
    for (bool any = true; any;) {
        write_to(group, "cgroup.kill", "1"); /* all at once, however fast they fork */
        DIR *all = opendir("/proc");
        for (struct dirent *each; all && (each = readdir(all));)
            if (each->d_name[0] >= '1' && each->d_name[0] <= '9' && parent(each->d_name) == getpid())
                kill(atoi(each->d_name), SIGKILL);
        if (all) closedir(all);
        pid_t ended;
        while ((ended = waitpid(-1, NULL, WNOHANG)) > 0) continue;
        any = !ended;
        if (any && now() > last) {
            fputs("a process that a client started cannot be ended\n", stderr);
            break;
        }
        if (any) nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}

/* Opens a folder, no link to one, and makes it one that can be emptied; negative where it is none. */
static int opened(int parent, const char *name) {
    struct stat about;
    int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, folder = openat(parent, name, flags);
    bool closed = folder < 0 && errno == EACCES && !fstatat(parent, name, &about, AT_SYMLINK_NOFOLLOW);
    if (closed && S_ISDIR(about.st_mode) && !fchmodat(parent, name, 0700, 0)) folder = openat(parent, name, flags);
    if (folder >= 0) fchmod(folder, 0700);
    return folder;
}

static DIR *entries(int folder) {
    int own = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *all = own < 0 ? NULL : fdopendir(own);
    if (!all && own >= 0) close(own);
    return all;
}

static bool removed(int parent, const char *name) {
    if (!strcmp(name, ".") || !strcmp(name, "..")) return true;
    return !unlinkat(parent, name, 0) || !unlinkat(parent, name, AT_REMOVEDIR);
}

/* Removes all that is in a folder. What lies deeper is moved up first, so that no depth is too much. */
static void empty(int top) {
    for (bool again = true; again;) {
        again = false;
        DIR *all = entries(top), *inner;
        for (struct dirent *each, *deep; all && (each = readdir(all));) {
            if (removed(top, each->d_name)) continue;
            int folder = opened(top, each->d_name);
            inner = entries(folder);
            while (inner && (deep = readdir(inner))) {
                static unsigned moves;
                if (removed(folder, deep->d_name)) continue;
                int moved = opened(folder, deep->d_name);
                for (char name[16]; moved >= 0;) { /* until it has a name that is none of theirs */
                    snprintf(name, sizeof name, "%u", moves++);
                    if (!renameat(folder, deep->d_name, top, name)) break;
                    if (errno != ENOTEMPTY && errno != EEXIST && errno != ENOTDIR) break;
                }
                if (moved >= 0) close(moved);
            }
            if (inner) closedir(inner);
            if (folder >= 0) close(folder);
            again |= removed(top, each->d_name);
        }
        if (all) closedir(all);
    }
}

/* Removes the folders, and what runs in the control groups, of this user's connections that nobody serves any more: who
 * serves one holds the lock of its folder. */
static void sweep(void) {
    DIR *all = opendir(where);
    for (struct dirent *each; all && (each = readdir(all));) {
        struct stat about;
        if (strncmp(each->d_name, NAMED, strlen(NAMED)) || strlen(each->d_name) != strlen(NAMED "XXXXXX")) continue;
        if (fstatat(dirfd(all), each->d_name, &about, AT_SYMLINK_NOFOLLOW) || about.st_uid != geteuid()) continue;
        int folder = opened(dirfd(all), each->d_name);
        if (folder >= 0 && !flock(folder, LOCK_EX | LOCK_NB)) {
            char left[2 * LONGEST];
            snprintf(left, sizeof left, "%s/%.255s", groups, each->d_name);
            write_to(left, "cgroup.kill", "1");
            for (int i = 0; *groups && i < 1000 && rmdir(left) && errno == EBUSY; i++)
                nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
            empty(folder);
            unlinkat(dirfd(all), each->d_name, AT_REMOVEDIR);
        }
        if (folder >= 0) close(folder);
    }
    if (all) closedir(all);
}

/* Makes the folder of a connection, locks it, and goes there. */
static bool settle(void) {
    char path[2 * LONGEST];
    struct stat own, named;
    do { /* a sweep may come before the lock */
        if (here >= 0) close(here);
        snprintf(path, sizeof path, "%s/" NAMED "XXXXXX", where);
        if (!mkdtemp(path)) return false;
        here = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    } while (here < 0 || flock(here, LOCK_EX) || fstat(here, &own) || stat(path, &named) || own.st_ino != named.st_ino);
    if (*groups) {
        snprintf(group, sizeof group, "%s%s", groups, strrchr(path, '/'));
        if (mkdir(group, 0700)) *group = 0;
    }
    return !fchdir(here);
}

/* Waits for the program, unless the client goes first, and ends what it leaves running. What is printed is kept, up to
 * a megabyte. */
static bool watch(int client, pid_t program, int output) {
    static char printed[1 << 20], spill[PIECE];
    size_t used = 0;
    struct pollfd both[] = {{.fd = output, .events = POLLIN}, {.fd = client, .events = POLLRDHUP}};
    int status = 0;
    bool ended = false;
    while (!ended || both[0].fd >= 0) {
        if (!ended && (ended = waitpid(program, &status, WNOHANG) > 0)) end_all(); /* now what was printed has an end */
        if (stopped) return false;
        if (ppoll(both, 2, ended ? &(struct timespec){0, 0} : NULL, &unblocked) < 0) continue;
        if (both[1].revents) return false;
        if (ended && !both[0].revents) break; /* who still holds it is none of ours */
        if (both[0].fd < 0 || !both[0].revents) continue;
        bool room = used < sizeof printed;
        ssize_t got = read(output, room ? printed + used : spill, room ? sizeof printed - used : sizeof spill);
        if (got <= 0) both[0].fd = -1;
        else if (room) used += (size_t)got;
    }
    uint32_t code = WIFEXITED(status) ? (uint32_t)WEXITSTATUS(status) : 256u + (uint32_t)WTERMSIG(status);
    return answer(client, NULL) && give(client, &code, 4) && give_text(client, printed, (uint32_t)used);
}

static bool run(int client) {
    char *words[WORDS + 1] = {NULL};
    uint32_t count;
    bool whole = take(client, &count, 4);
    if (whole && (!count || count > WORDS)) return refuse(client, "%u words are no command: 1 to %d are", count, WORDS);
    for (uint32_t i = 0; whole && i < count; i++) whole = (words[i] = text(client)) != NULL;
    int ends[2] = {-1, -1};
    pid_t program = -1, own = getpid();
    bool good = whole;
    if (whole && (!plain(words[0]) || access(words[0], X_OK))) good = answer(client, "there is no such program");
    else if (whole && (pipe2(ends, O_CLOEXEC) || (program = fork()) < 0)) good = answer(client, "it cannot be started");
    else if (whole && !program) {
        char path[LONGEST + 2], *command[2 * WORDS];
        uint32_t more = 0;
        for (; before[more]; more++) command[more] = before[more];
        memcpy(command + more, words, (count + 1) * sizeof *words);
        command[more] = path;
        setpgid(0, 0);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != own) _exit(127);
        write_to(group, "cgroup.procs", "0");
        sigprocmask(SIG_SETMASK, &unblocked, NULL);
        dup2(ends[1], 1);
        dup2(ends[1], 2);
        snprintf(path, sizeof path, "./%s", words[0]);
        (more ? execvp : execv)(command[0], command);
        _exit(127);
    } else if (whole) {
        setpgid(program, program);
        close(ends[1]);
        ends[1] = -1;
        good = watch(client, program, ends[0]);
    }
    for (int i = 0; i < 2; i++)
        if (ends[i] >= 0) close(ends[i]);
    for (uint32_t i = 0; i < WORDS && words[i]; i++) free(words[i]);
    return good;
}

/* Takes the same time whatever is wrong. */
static bool knows(const char *given, const char *token) {
    char both[2][LONGEST] = {{0}, {0}};
    memcpy(both[0], given, strlen(given));
    memcpy(both[1], token, strlen(token));
    volatile unsigned char different = 0;
    for (size_t i = 0; i < LONGEST; i++) different |= (unsigned char)(both[0][i] ^ both[1][i]);
    return !different;
}

/* Serves a connection, in a process of its own: it outlives the server for as long as it takes to clear up. */
static void serve(int client, pid_t server, const char *token) {
    char greeting[4], kind;
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != server) return;
    deadline = now() + GREETING_MS;
    char *given = take(client, greeting, 4) && !memcmp(greeting, "MPQ1", 4) ? text(client) : NULL;
    bool good = given != NULL;
    if (good && !knows(given, token))
        good = refuse(client, "the token is wrong: set MPQ_TOKEN to the one that mpq_rpc was given or printed");
    free(given);
    if (good && !settle()) good = refuse(client, "the device cannot make a folder: %s", strerror(errno));
    good = good && answer(client, NULL);
    if (good) deadline = 0;
    while (good && take(client, &kind, 1)) {
        patience = STALLED_MS;
        good = kind == 'P' ? put(client) : kind == 'R' ? run(client) : kind == 'G' && get(client);
        patience = -1;
    }
    end_all();
    if (here >= 0) close(here);
    sweep();
}

/* The control group in which this process may make others; empty where it is told none. */
static void find_groups(void) {
    char line[LONGEST], path[2 * LONGEST];
    FILE *own = fopen("/proc/self/cgroup", "re");
    while (own && fgets(line, sizeof line, own)) {
        line[strcspn(line, "\n")] = 0;
        for (int i = 0; !*groups && i < 2 && !strncmp(line, "0::/", 4); i++) {
            const char *mounted = i ? "/sys/fs/cgroup/unified" : "/sys/fs/cgroup";
            snprintf(path, sizeof path, "%s%s", mounted, line[4] ? line + 3 : "");
            size_t length = strlen(path);
            if (length < sizeof groups - 1 && strcat(path, "/cgroup.procs") && !access(path, W_OK))
                memcpy(groups, path, length);
        }
    }
    if (own) fclose(own);
}

/* The token: what MPQ_TOKEN holds, or one made here. Programs do not see it. NULL: it cannot be one. */
static const char *find_token(bool *made) {
    static char token[LONGEST];
    char *given = getenv("MPQ_TOKEN");
    size_t length = given ? strlen(given) : 0;
    *made = !given;
    if (given && (length < SHORTEST_TOKEN || length >= LONGEST)) {
        const char *wrong = "error: MPQ_TOKEN has %zu characters: give it %d to %d, or unset it to have one made\n";
        fprintf(stderr, wrong, length, SHORTEST_TOKEN, LONGEST - 1);
        return NULL;
    }
    if (given) {
        memcpy(token, given, length);
        memset(given, 0, length);
        unsetenv("MPQ_TOKEN");
        return token;
    }
    unsigned char random[16];
    if (getrandom(random, sizeof random, 0) != sizeof random) {
        fprintf(stderr, "error: no token can be made (%s): set MPQ_TOKEN to a secret\n", strerror(errno));
        return NULL;
    }
    for (size_t i = 0; i < sizeof random; i++) snprintf(token + 2 * i, 3, "%02x", random[i]);
    return token;
}

/* Waits until the connection's process has ended, and does what it could not do if it was killed. */
static void await(pid_t session) {
    int status = 0;
    while (!waitpid(session, &status, WNOHANG)) {
        if (stopped) kill(session, SIGTERM);
        sigsuspend(&unblocked);
    }
    if (!WIFEXITED(status)) {
        end_all();
        sweep();
    }
}

int main(int count, char **words) {
    const char *host = "127.0.0.1", *parents = "/tmp";
    long port = 9190;
    for (int i = 1; i + 1 < count; i += 2) {
        char *rest = "";
        if (!strcmp(words[i], "--host")) host = words[i + 1];
        else if (!strcmp(words[i], "--port")) port = *words[i + 1] ? strtol(words[i + 1], &rest, 10) : -1;
        else if (!strcmp(words[i], "--folder")) parents = words[i + 1];
        else if (!strcmp(words[i], "--with"))
            for (int n = 0; n < WORDS - 1 && (before[n] = strtok(n ? NULL : words[i + 1], " ")); n++) continue;
        else count = 0;
        if (*rest || port < 0 || port > 65535) {
            fprintf(stderr, "error: --port %s must be a number up to 65535\n", words[i + 1]);
            return 1;
        }
    }
    if (count % 2 == 0) {
        fputs("MPQ_TOKEN=secret mpq_rpc [--host ADDRESS] [--port N] [--folder DIR] [--with COMMAND]\n", stderr);
        return 1;
    }
    bool made;
    const char *token = find_token(&made);
    if (!token) return 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1) {
        fprintf(stderr, "error: --host %s must be an IPv4 address of this machine\n", host);
        return 1;
    }
    char *place = realpath(parents, NULL);
    if (!place || access(place, R_OK | W_OK | X_OK)) {
        fprintf(stderr, "error: cannot make a folder in %s: %s\n", parents, strerror(errno));
        return 1;
    }
    memcpy(where, place, strlen(place));
    free(place);
    int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), on = 1;
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    socklen_t size = sizeof address;
    if (bind(server, (struct sockaddr *)&address, size) || listen(server, 1) ||
        getsockname(server, (struct sockaddr *)&address, &size)) {
        fprintf(stderr, "error: cannot listen to %s:%ld: %s\n", host, port, strerror(errno));
        return 1;
    }
    find_groups();
    sweep();
    prctl(PR_SET_CHILD_SUBREAPER, 1); /* of the orphans of a connection's process that was killed */
    struct sigaction ends = {.sa_handler = stop}, hangs_up;
    int numbers[] = {SIGINT, SIGTERM, SIGCHLD, SIGHUP};
    sigset_t blocked;
    sigemptyset(&blocked);
    sigaction(SIGHUP, NULL, &hangs_up);
    for (int i = 0; i < 3 + (hangs_up.sa_handler != SIG_IGN); i++) { /* nohup has it ignored */
        sigaction(numbers[i], &ends, NULL);
        sigaddset(&blocked, numbers[i]);
    }
    sigprocmask(SIG_BLOCK, &blocked, &unblocked);
    for (int i = 0; i < 4; i++) sigdelset(&unblocked, numbers[i]);
    printf("listening to %s:%d\n", host, ntohs(address.sin_port));
    if (made) printf("MPQ_TOKEN=%s\n", token);
    fflush(stdout);
    while (ready(server, POLLIN)) {
        int client = accept4(server, NULL, NULL, SOCK_CLOEXEC);
        if (client < 0) continue; /* it has gone already */
        setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        /* One that vanishes without a word makes room for the next. */
        int idle = 30, between = 10, times = 3;
        setsockopt(client, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
        setsockopt(client, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
        setsockopt(client, IPPROTO_TCP, TCP_KEEPINTVL, &between, sizeof between);
        setsockopt(client, IPPROTO_TCP, TCP_KEEPCNT, &times, sizeof times);
        pid_t own = getpid(), session = fork();
        if (!session) {
            close(server);
            serve(client, own, token);
            _exit(0);
        }
        close(client);
        if (session > 0) await(session);
    }
    return !stopped;
}
