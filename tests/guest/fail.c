/* A preloaded library that makes system calls fail. The file named by FAIL says which call fails,
   with which error, and how often it succeeds before, as in "fsync 5 1"; if it is empty, none
   fails. With error 0 each call takes half a second, or until the file's contents change. Only
   calls on files with "saved" in their names are affected. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static char plan[64];
static long left;

static void read_plan(char now[sizeof plan])
{
    const char *from = getenv("FAIL");
    int fd = from ? (int)syscall(SYS_openat, AT_FDCWD, from, O_RDONLY | O_CLOEXEC) : -1;
    memset(now, 0, sizeof plan);
    if (fd >= 0) {
        if (syscall(SYS_read, fd, now, sizeof plan - 1) < 0)
            now[0] = 0;
        syscall(SYS_close, fd);
    }
}

/* Whether this call of `name` on `path` is to fail; sets errno then. */
static int fails(const char *name, const char *path)
{
    char now[sizeof plan], again[sizeof plan], call[16];
    int error;
    long skip;
    read_plan(now);
    if (!strstr(path, "saved") || sscanf(now, "%15s %d %ld", call, &error, &skip) != 3 ||
        strcmp(call, name))
        return 0;
    if (error == 0) {
        for (int turn = 0; turn < 50; turn++) {
            usleep(10000);
            read_plan(again);
            if (strcmp(again, now))
                break;
        }
        return 0;
    }
    if (strcmp(now, plan)) {
        strcpy(plan, now);
        left = skip;
    }
    if (left-- > 0)
        return 0;
    left = 0;
    errno = error;
    return 1;
}

static int fails_on(const char *name, int fd)
{
    char link[32], path[4096] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (syscall(SYS_readlink, link, path, sizeof path - 1) < 0)
        return 0;
    return fails(name, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t pwrite64(int fd, const void *from, size_t count, off64_t at)
{
    return fails_on("pwrite", fd) ? -1 : REAL(pwrite64)(fd, from, count, at);
}
ssize_t write(int fd, const void *from, size_t count)
{
    return fails_on("write", fd) ? -1 : REAL(write)(fd, from, count);
}
int ftruncate64(int fd, off64_t length)
{
    return fails_on("ftruncate", fd) ? -1 : REAL(ftruncate64)(fd, length);
}
int fsync(int fd)
{
    return fails_on("fsync", fd) ? -1 : REAL(fsync)(fd);
}
int rename(const char *from, const char *to)
{
    return fails("rename", from) ? -1 : REAL(rename)(from, to);
}
