/* Runs programs that a client sends, on a device: what `mpqc bench --rpc` and `mpqc latency --rpc` measure with.
 *
 *   MPQ_TOKEN=secret mpq_rpc [--host ADDRESS] [--port N] [--folder DIR] [--with COMMAND]
 *
 * Whoever knows the token may run anything here. Without one only this machine is listened to (127.0.0.1), and on any
 * other address it does not start. One client at a time; its files lie in a folder of its own, which is removed when the
 * connection ends, and so is what still runs. COMMAND stands before each program: "taskset f0", to choose cores.
 *
 * A client sends "MPQ1" and the token, then requests of one letter; numbers are little-endian, strings have their length
 * before them (u32). P name size (u64) bytes: a file. R count (u32) words: runs the file that the first one names in the
 * folder; the answer is the exit code (u32, 256 and above: a signal) and what was printed. G name: a file back.
 * Every answer begins with 0, or with 1 and a sentence. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { WORDS = 64, LONGEST = 4096, PIECE = 1 << 16 };
static char folder[LONGEST], *before[WORDS];
static volatile sig_atomic_t stopped;

static void stop(int number) {
    (void)number;
    stopped = 1;
}

static time_t deadline; /* of what a client must say first; 0 of what follows */

static bool take(int client, void *data, size_t bytes) {
    for (char *at = data; bytes;) {
        ssize_t got = recv(client, at, bytes, 0);
        if (got <= 0 || (deadline && time(NULL) > deadline)) return false;
        at += got;
        bytes -= (size_t)got;
    }
    return true;
}

static bool give(int client, const void *data, size_t bytes) {
    for (const char *at = data; bytes;) {
        ssize_t put = send(client, at, bytes, MSG_NOSIGNAL);
        if (put <= 0) return false;
        at += put;
        bytes -= (size_t)put;
    }
    return true;
}

static bool give_text(int client, const char *text, uint32_t bytes) { return give(client, &bytes, 4) && give(client, text, bytes); }

static bool answer(int client, const char *sentence) {
    uint8_t bad = sentence != NULL;
    return give(client, &bad, 1) && (!bad || give_text(client, sentence, (uint32_t)strlen(sentence)));
}

/* A string of less than LONGEST bytes; NULL where the connection ends or it is longer. */
static char *text(int client) {
    uint32_t bytes;
    if (!take(client, &bytes, 4) || bytes >= LONGEST) return NULL;
    char *found = malloc(bytes + 1);
    if (found && !take(client, found, bytes)) {
        free(found);
        return NULL;
    }
    if (found) found[bytes] = 0;
    return found;
}

/* A name of a file in the folder: nothing that leads out of it. */
static bool plain(const char *name) {
    size_t length = strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-");
    return length && !name[length] && name[0] != '.' && name[0] != '-';
}

static bool put(int client) {
    static char piece[PIECE];
    char *name = text(client);
    uint64_t left;
    if (!name || !take(client, &left, 8)) {
        free(name);
        return false;
    }
    int file = plain(name) ? open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0700) : -1;
    free(name);
    const char *wrong = file < 0 ? "this name cannot be that of a file" : NULL;
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
    int file = plain(name) ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    free(name);
    struct stat about;
    if (file < 0 || fstat(file, &about)) return answer(client, "there is no such file");
    uint64_t bytes = (uint64_t)about.st_size;
    bool good = answer(client, NULL) && give(client, &bytes, 8);
    ssize_t got;
    while (good && (got = read(file, piece, PIECE)) > 0) good = give(client, piece, (size_t)got);
    close(file);
    return good;
}

/* Waits for the program, unless the client goes first. What it prints is kept, up to a megabyte. */
static bool watch(int client, pid_t program, int output) {
    static char printed[1 << 20];
    size_t used = 0;
    struct pollfd both[] = {{.fd = output, .events = POLLIN}, {.fd = client, .events = POLLRDHUP}};
    int status = 0;
    while (both[0].fd >= 0 || !waitpid(program, &status, WNOHANG)) { /* it may close its output and go on */
        bool waited = poll(both, 2, both[0].fd >= 0 ? -1 : 20) >= 0;
        if (!waited && !stopped) continue;
        if (!waited || both[1].revents) {
            kill(-program, SIGKILL);
            waitpid(program, NULL, 0);
            return false;
        }
        if (both[0].fd < 0) continue;
        char spill[PIECE];
        bool room = used < sizeof printed;
        ssize_t got = read(output, room ? printed + used : spill, room ? sizeof printed - used : sizeof spill);
        if (got <= 0) both[0].fd = -1;
        else if (room) used += (size_t)got;
    }
    kill(-program, SIGKILL);
    uint32_t code = WIFEXITED(status) ? (uint32_t)WEXITSTATUS(status) : 256u + (uint32_t)WTERMSIG(status);
    return answer(client, NULL) && give(client, &code, 4) && give_text(client, printed, (uint32_t)used);
}

static bool run(int client) {
    char *words[WORDS + 1] = {NULL};
    uint32_t count;
    bool whole = take(client, &count, 4) && count && count <= WORDS;
    for (uint32_t i = 0; whole && i < count; i++) whole = (words[i] = text(client)) != NULL;
    int ends[2] = {-1, -1};
    pid_t program = -1;
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
    size_t length = strlen(token), different = strlen(given) ^ length;
    for (size_t i = 0; i < length; i++) different |= (unsigned char)(given[i < strlen(given) ? i : 0] ^ token[i]);
    return !different;
}

static void clear(void) {
    DIR *all = opendir(".");
    for (struct dirent *each; all && (each = readdir(all));)
        if (each->d_name[0] != '.') unlink(each->d_name);
    if (all) closedir(all);
}

static void serve(int client, const char *token) {
    char greeting[4], kind;
    struct timeval patience = {.tv_sec = 10};
    deadline = time(NULL) + patience.tv_sec;
    setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    char *given = take(client, greeting, 4) && !memcmp(greeting, "MPQ1", 4) ? text(client) : NULL;
    bool good = given && knows(given, token);
    if (given) good = answer(client, good ? NULL : "the token is wrong") && good;
    free(given);
    deadline = patience.tv_sec = 0;
    setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    while (good && take(client, &kind, 1)) good = kind == 'P' ? put(client) : kind == 'R' ? run(client) : kind == 'G' && get(client);
    close(client);
    clear();
}

int main(int count, char **words) {
    const char *host = "127.0.0.1", *where = "/tmp", *token = getenv("MPQ_TOKEN");
    int port = 9190;
    for (int i = 1; i + 1 < count; i += 2) {
        if (!strcmp(words[i], "--host")) host = words[i + 1];
        else if (!strcmp(words[i], "--port")) port = atoi(words[i + 1]);
        else if (!strcmp(words[i], "--folder")) where = words[i + 1];
        else if (!strcmp(words[i], "--with"))
            for (int n = 0; n < WORDS - 1 && (before[n] = strtok(n ? NULL : words[i + 1], " ")); n++) continue;
        else count = 0;
    }
    if (count % 2 == 0) {
        fputs("MPQ_TOKEN=secret mpq_rpc [--host ADDRESS] [--port N] [--folder DIR] [--with COMMAND]\n", stderr);
        return 1;
    }
    if (!token) token = "";
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1) {
        fprintf(stderr, "error: --host %s must be an IPv4 address of this machine\n", host);
        return 1;
    }
    if (!*token && ntohl(address.sin_addr.s_addr) >> 24 != 127) {
        fputs("error: beyond 127.0.0.1 a token is needed: set MPQ_TOKEN to a secret\n", stderr);
        return 1;
    }
    char *place = realpath(where, NULL);
    snprintf(folder, sizeof folder, "%s/mpq-XXXXXX", place ? place : where);
    free(place);
    if (!mkdtemp(folder) || chdir(folder)) {
        fprintf(stderr, "error: cannot make a folder in %s: %s\n", where, strerror(errno));
        return 1;
    }
    unsetenv("MPQ_TOKEN");
    int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    socklen_t size = sizeof address;
    if (bind(server, (struct sockaddr *)&address, size) || listen(server, 1) || getsockname(server, (struct sockaddr *)&address, &size)) {
        fprintf(stderr, "error: cannot listen to %s:%d: %s\n", host, port, strerror(errno));
        rmdir(folder);
        return 1;
    }
    struct sigaction ends = {.sa_handler = stop}; /* calls that wait are interrupted */
    sigaction(SIGINT, &ends, NULL);
    sigaction(SIGTERM, &ends, NULL);
    printf("listening to %s:%d\n", host, ntohs(address.sin_port));
    fflush(stdout);
    for (int client; !stopped && (client = accept4(server, NULL, NULL, SOCK_CLOEXEC)) >= 0;) {
        setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        /* One that vanishes without a word makes room for the next. */
        struct timeval longest = {.tv_sec = 60};
        int idle = 30, between = 10, times = 3;
        setsockopt(client, SOL_SOCKET, SO_SNDTIMEO, &longest, sizeof longest);
        setsockopt(client, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
        setsockopt(client, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
        setsockopt(client, IPPROTO_TCP, TCP_KEEPINTVL, &between, sizeof between);
        setsockopt(client, IPPROTO_TCP, TCP_KEEPCNT, &times, sizeof times);
        serve(client, token);
    }
    rmdir(folder);
    return !stopped;
}
