/* Preloaded into a process, this makes its writes below a folder fail; see tests/test_faults.py.

   FAULT_FOLDER: writes to files whose path contains this text are counted
   FAULT_FIRST, FAULT_COUNT: number of the first write that fails, from 1, and how many fail (0: all from then on)
   FAULT_ERRNO: their errno */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long counted = 0;

static int fails(int fd) {
    const char *folder = getenv("FAULT_FOLDER");
    if (!folder || fd < 3) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    if (!strstr(path, folder)) return 0;
    long first = atol(getenv("FAULT_FIRST")), count = atol(getenv("FAULT_COUNT"));
    long number = __sync_add_and_fetch(&counted, 1);
    if (number < first || (count && number >= first + count)) return 0;
    errno = atoi(getenv("FAULT_ERRNO"));
    return 1;
}

ssize_t write(int fd, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    return fails(fd) ? -1 : real(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    static ssize_t (*real)(int, const void *, size_t, off_t);
    if (!real) real = dlsym(RTLD_NEXT, "pwrite");
    return fails(fd) ? -1 : real(fd, data, size, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    static ssize_t (*real)(int, const void *, size_t, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
    return fails(fd) ? -1 : real(fd, data, size, offset);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    static ssize_t (*real)(int, const struct iovec *, int);
    if (!real) real = dlsym(RTLD_NEXT, "writev");
    return fails(fd) ? -1 : real(fd, parts, count);
}

int fsync(int fd) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    return fails(fd) ? -1 : real(fd);
}
