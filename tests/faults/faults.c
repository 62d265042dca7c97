/* Faults of the file system, for tests. Preloaded into a process, it counts what changes files below a folder, and at a
 * chosen operation the process is killed, or the disk is full from then on. A write that is hit is half done first. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static int kill_at, full_at, operations, writes;

/* 0 stands for never. */
void arm_faults(const char *below, int kill_at_operation, int full_at_write) {
    strncpy(folder, below, PATH_MAX - 1);
    kill_at = kill_at_operation;
    full_at = full_at_write;
    operations = writes = 0;
}

int count_operations(void) { return operations; }
int count_writes(void) { return writes; }

static int below(int directory, const char *path) {
    char whole[2 * PATH_MAX] = "";
    if (!folder[0]) return 0;
    if (path == NULL || path[0] != '/') {
        char link[64];
        if (directory == AT_FDCWD) {
            if (getcwd(whole, PATH_MAX) == NULL) return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
            ssize_t length = readlink(link, whole, PATH_MAX - 1);
            if (length < 0) return 0;
            whole[length] = 0;
        }
        if (path != NULL) strcat(strcat(whole, "/"), path);
        path = whole;
    }
    return strncmp(path, folder, strlen(folder)) == 0;
}

static void die(void) { kill(getpid(), SIGKILL); }

static void change(int directory, const char *path) {
    if (below(directory, path) && __sync_add_and_fetch(&operations, 1) == kill_at) die();
}

/* Whether a write is hit: 'k' dies in the middle of it, 'f' finds the disk full in the middle of it, 'F' at once. */
static int hit(int file) {
    if (!below(file, NULL)) return 0;
    if (__sync_add_and_fetch(&operations, 1) == kill_at) return 'k';
    int number = __sync_add_and_fetch(&writes, 1);
    return full_at && number >= full_at ? (number == full_at ? 'f' : 'F') : 0;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *data, size_t size) {
    int how = hit(file);
    if (how == 'F' || (how == 'f' && size < 2)) { errno = ENOSPC; return -1; }
    ssize_t done = NEXT(write)(file, data, how ? size / 2 : size);
    if (how == 'k') die();
    return done;
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    int how = hit(file);
    if (how == 'F' || how == 'f') { errno = ENOSPC; return -1; }
    if (how == 'k') die();
    return NEXT(writev)(file, parts, count);
}

#define PWRITE(name, offset_type) \
    ssize_t name(int file, const void *data, size_t size, offset_type offset) { \
        int how = hit(file); \
        if (how == 'F' || how == 'f') { errno = ENOSPC; return -1; } \
        if (how == 'k') die(); \
        return NEXT(name)(file, data, size, offset); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC))
#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        MODE(flags) \
        if (CHANGES(flags)) change(AT_FDCWD, path); \
        return NEXT(name)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int directory, const char *path, int flags, ...) { \
        MODE(flags) \
        if (CHANGES(flags)) change(directory, path); \
        return NEXT(name)(directory, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

int rename(const char *old, const char *new) { change(AT_FDCWD, new); return NEXT(rename)(old, new); }
int renameat(int a, const char *old, int b, const char *new) { change(b, new); return NEXT(renameat)(a, old, b, new); }
int unlink(const char *path) { change(AT_FDCWD, path); return NEXT(unlink)(path); }
int unlinkat(int at, const char *path, int flags) { change(at, path); return NEXT(unlinkat)(at, path, flags); }
int rmdir(const char *path) { change(AT_FDCWD, path); return NEXT(rmdir)(path); }
int mkdir(const char *path, mode_t mode) { change(AT_FDCWD, path); return NEXT(mkdir)(path, mode); }
int mkdirat(int at, const char *path, mode_t mode) { change(at, path); return NEXT(mkdirat)(at, path, mode); }
int link(const char *old, const char *new) { change(AT_FDCWD, new); return NEXT(link)(old, new); }
int linkat(int a, const char *old, int b, const char *new, int flags) {
    change(b, new);
    return NEXT(linkat)(a, old, b, new, flags);
}
