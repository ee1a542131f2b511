// Preloaded into a process: counts what it changes in the files below a folder, and kills it before the nth change, in the
// middle of the nth write, or fills the disk from the nth change on. Sees what Python, Rust and C++ libraries do alike.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TEAR, FULL };
static char root[PATH_MAX];
static int mode = -1;
static long count, at;

void disk_arm(const char *below, int how, long nth) {
    strncpy(root, below, sizeof root - 1);
    mode = how;
    at = nth;
    count = 0;
}

long disk_changes(void) { return count; }

static int below(const char *path) { return path && !strncmp(path, root, strlen(root)); }

static int below_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

// 0: go on. 1: the disk is full. 2: this write ends in its middle.
static int change(int ours, int needs_room, int is_write) {
    if (mode < 0 || !ours) return 0;
    long n = __sync_add_and_fetch(&count, 1);
    if (n == at && mode == TEAR && is_write) return 2;
    if (n == at && (mode == KILL || mode == TEAR)) kill(getpid(), SIGKILL);
    if (n >= at && mode == FULL && needs_room) { errno = ENOSPC; return 1; }
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CREATES(flags) ((flags) & (O_CREAT | O_TRUNC) || ((flags) & O_TMPFILE) == O_TMPFILE)
#define MODE(flags) \
    mode_t m = 0; \
    if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) { \
        va_list list; va_start(list, flags); m = va_arg(list, mode_t); va_end(list); \
    }

int open(const char *path, int flags, ...) { MODE(flags) if (change(CREATES(flags) && below(path), 1, 0)) return -1; return REAL(open)(path, flags, m); }
int open64(const char *path, int flags, ...) { MODE(flags) if (change(CREATES(flags) && below(path), 1, 0)) return -1; return REAL(open64)(path, flags, m); }
int openat(int dir, const char *path, int flags, ...) { MODE(flags) if (change(CREATES(flags) && below(path), 1, 0)) return -1; return REAL(openat)(dir, path, flags, m); }
int openat64(int dir, const char *path, int flags, ...) { MODE(flags) if (change(CREATES(flags) && below(path), 1, 0)) return -1; return REAL(openat64)(dir, path, flags, m); }

ssize_t write(int fd, const void *data, size_t size) {
    int fate = change(mode >= 0 && below_fd(fd), 1, 1);
    if (fate == 2) { REAL(write)(fd, data, size / 2); kill(getpid(), SIGKILL); }
    return fate ? -1 : REAL(write)(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t where) { return change(mode >= 0 && below_fd(fd), 1, 0) ? -1 : REAL(pwrite)(fd, data, size, where); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t where) { return change(mode >= 0 && below_fd(fd), 1, 0) ? -1 : REAL(pwrite64)(fd, data, size, where); }
ssize_t writev(int fd, const struct iovec *parts, int n) { return change(mode >= 0 && below_fd(fd), 1, 0) ? -1 : REAL(writev)(fd, parts, n); }
int ftruncate(int fd, off_t size) { return change(mode >= 0 && below_fd(fd), 0, 0) ? -1 : REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return change(mode >= 0 && below_fd(fd), 0, 0) ? -1 : REAL(ftruncate64)(fd, size); }
int rename(const char *from, const char *to) { return change(below(to), 0, 0) ? -1 : REAL(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) { return change(below(to), 0, 0) ? -1 : REAL(renameat)(a, from, b, to); }
int mkdir(const char *path, mode_t m) { return change(below(path), 1, 0) ? -1 : REAL(mkdir)(path, m); }
int mkdirat(int dir, const char *path, mode_t m) { return change(below(path), 1, 0) ? -1 : REAL(mkdirat)(dir, path, m); }
int rmdir(const char *path) { return change(below(path), 0, 0) ? -1 : REAL(rmdir)(path); }
int unlink(const char *path) { return change(below(path), 0, 0) ? -1 : REAL(unlink)(path); }
int unlinkat(int dir, const char *path, int flags) { return change(mode >= 0 && (below(path) || below_fd(dir)), 0, 0) ? -1 : REAL(unlinkat)(dir, path, flags); }
