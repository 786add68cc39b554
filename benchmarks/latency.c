/* A library to preload: counts the calls of a process that open, read, list or look up files, and can delay each of them.
 *
 *     cc -O2 -shared -fPIC -pthread -o latency.so latency.c -ldl
 *     CALLS_OF='/run*' CALLS_DELAY_US=5000 CALLS_REPORT=report LD_PRELOAD=./latency.so wsm-ds ...
 *
 * CALLS_OF is a pattern of absolute paths, in which `*` matches `/`, too. Calls on other files are neither counted nor
 * delayed. Every process adds a line to the report when it ends: opens, reads, stats, lists, bytes read, and the largest
 * number of files that were open at the same time.
 *
 * Not seen: fstat (a network file system's client has the attributes of a file that it has just opened), mmap, and calls
 * that the C library makes inside itself.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { FILES = 1 << 20 };

static atomic_long opens, reads, stats, lists, bytes, open_now, open_most;
static atomic_bool is_counted[FILES]; /* by file descriptor */
static const char *pattern, *report;
static struct timespec delay;

__attribute__((constructor)) static void begin(void)
{
    const char *us = getenv("CALLS_DELAY_US");
    long count = us ? atol(us) : 0;
    delay.tv_sec = count / 1000000;
    delay.tv_nsec = count % 1000000 * 1000;
    pattern = getenv("CALLS_OF");
    report = getenv("CALLS_REPORT");
}

static void *next(const char *name)
{
    void *found = dlsym(RTLD_NEXT, name);
    if (!found)
        abort();
    return found;
}
#define NEXT(name)                       \
    static __typeof__(&name) original;   \
    if (!original)                       \
        original = next(#name);

static void wait_and_count(atomic_long *counter)
{
    struct timespec left = delay;
    int saved = errno;
    (*counter)++;
    while ((left.tv_sec || left.tv_nsec) && nanosleep(&left, &left) && errno == EINTR)
        ;
    errno = saved;
}

static int is_path_counted(int folder, const char *path)
{
    char whole[2 * PATH_MAX];
    if (!pattern || !path)
        return 0;
    if (path[0] == '/')
        return !fnmatch(pattern, path, 0);
    if (folder == AT_FDCWD) {
        if (!getcwd(whole, PATH_MAX))
            return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, whole, PATH_MAX - 1);
        if (length < 0)
            return 0;
        whole[length] = 0;
    }
    size_t length = strlen(whole);
    snprintf(whole + length, sizeof whole - length, "/%s", path);
    return !fnmatch(pattern, whole, 0);
}

static int opened(int descriptor)
{
    if (descriptor < 0 || descriptor >= FILES)
        return descriptor;
    is_counted[descriptor] = 1;
    long now = ++open_now, most = open_most;
    while (now > most && !atomic_compare_exchange_weak(&open_most, &most, now))
        ;
    return descriptor;
}

static int is_descriptor_counted(int descriptor)
{
    return descriptor >= 0 && descriptor < FILES && is_counted[descriptor];
}

#define MODE                             \
    mode_t mode = 0;                     \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list arguments;               \
        va_start(arguments, flags);      \
        mode = va_arg(arguments, mode_t);\
        va_end(arguments);               \
    }
#define OPEN(name)                                      \
    int name(const char *path, int flags, ...)          \
    {                                                   \
        NEXT(name) MODE                                 \
        if (!is_path_counted(AT_FDCWD, path))           \
            return original(path, flags, mode);         \
        wait_and_count(&opens);                         \
        return opened(original(path, flags, mode));     \
    }
#define OPENAT(name)                                        \
    int name(int folder, const char *path, int flags, ...)  \
    {                                                       \
        NEXT(name) MODE                                     \
        if (!is_path_counted(folder, path))                 \
            return original(folder, path, flags, mode);     \
        wait_and_count(&opens);                             \
        return opened(original(folder, path, flags, mode)); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int close(int descriptor)
{
    NEXT(close)
    if (is_descriptor_counted(descriptor)) {
        is_counted[descriptor] = 0;
        open_now--;
    }
    return original(descriptor);
}

#define READ(name, parameters, arguments)      \
    ssize_t name parameters                    \
    {                                          \
        NEXT(name)                             \
        if (!is_descriptor_counted(descriptor))\
            return original arguments;         \
        wait_and_count(&reads);                \
        ssize_t got = original arguments;      \
        if (got > 0)                           \
            bytes += got;                      \
        return got;                            \
    }
READ(read, (int descriptor, void *to, size_t count), (descriptor, to, count))
READ(pread, (int descriptor, void *to, size_t count, off_t at), (descriptor, to, count, at))
READ(pread64, (int descriptor, void *to, size_t count, off64_t at), (descriptor, to, count, at))
READ(readv, (int descriptor, const struct iovec *to, int count), (descriptor, to, count))
READ(preadv, (int descriptor, const struct iovec *to, int count, off_t at), (descriptor, to, count, at))
READ(preadv64, (int descriptor, const struct iovec *to, int count, off64_t at), (descriptor, to, count, at))
READ(preadv2, (int descriptor, const struct iovec *to, int count, off_t at, int flags), (descriptor, to, count, at, flags))
READ(preadv64v2, (int descriptor, const struct iovec *to, int count, off64_t at, int flags),
     (descriptor, to, count, at, flags))

#define STAT(name, type)                          \
    int name(const char *path, struct type *to)   \
    {                                             \
        NEXT(name)                                \
        if (is_path_counted(AT_FDCWD, path))      \
            wait_and_count(&stats);               \
        return original(path, to);                \
    }
#define FSTATAT(name, type)                                           \
    int name(int folder, const char *path, struct type *to, int flags)\
    {                                                                 \
        NEXT(name)                                                    \
        if (is_path_counted(folder, path))                            \
            wait_and_count(&stats);                                   \
        return original(folder, path, to, flags);                     \
    }
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)
FSTATAT(fstatat, stat)
FSTATAT(fstatat64, stat64)

int statx(int folder, const char *path, int flags, unsigned mask, struct statx *to)
{
    NEXT(statx)
    if (is_path_counted(folder, path))
        wait_and_count(&stats);
    return original(folder, path, flags, mask, to);
}

DIR *opendir(const char *path)
{
    NEXT(opendir)
    if (is_path_counted(AT_FDCWD, path))
        wait_and_count(&lists);
    return original(path);
}

__attribute__((destructor)) static void end(void)
{
    char line[256];
    if (!report || !pattern)
        return;
    int length = snprintf(line, sizeof line, "%ld %ld %ld %ld %ld %ld\n", (long)opens, (long)reads, (long)stats,
                          (long)lists, (long)bytes, (long)open_most);
    pattern = NULL;
    int descriptor = open(report, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (descriptor < 0 || write(descriptor, line, length) != length)
        fprintf(stderr, "latency.so: cannot write %s\n", report);
    if (descriptor >= 0)
        close(descriptor);
}
