/* A file system that refuses some of its steps.
 *
 * REFUSE lists them with the number of the error, as in "link=1 dirsync=22": link, dirsync (of a
 * folder), filesync (of a file), chmod, advise, sharedmap (of an SQLite file "-shm"), filemap (of
 * a checkpoint or an array). All other calls are passed on.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

/* The error with which a step is refused; 0 if it is allowed. */
static int refusal(const char *step)
{
    const char *list = getenv("REFUSE");
    size_t length = strlen(step);

    for (const char *at = list ? strstr(list, step) : NULL; at; at = strstr(at + 1, step))
        if ((at == list || at[-1] == ' ') && at[length] == '=')
            return atoi(at + length + 1);
    return 0;
}

#define REFUSE(step)                 \
    do {                             \
        int error = refusal(step);   \
        if (error) {                 \
            errno = error;           \
            return -1;               \
        }                            \
    } while (0)

#define PASS_ON(type, name, ...) ((type)dlsym(RTLD_NEXT, name))(__VA_ARGS__)

static const char *sync_step(int descriptor)
{
    struct stat found;

    return !fstat(descriptor, &found) && S_ISDIR(found.st_mode) ? "dirsync" : "filesync";
}

int link(const char *from, const char *to)
{
    REFUSE("link");
    return PASS_ON(int (*)(const char *, const char *), "link", from, to);
}

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags)
{
    REFUSE("link");
    return PASS_ON(int (*)(int, const char *, int, const char *, int), "linkat", from_folder, from,
                   to_folder, to, flags);
}

int fsync(int descriptor)
{
    REFUSE(sync_step(descriptor));
    return PASS_ON(int (*)(int), "fsync", descriptor);
}

int fdatasync(int descriptor)
{
    REFUSE(sync_step(descriptor));
    return PASS_ON(int (*)(int), "fdatasync", descriptor);
}

int chmod(const char *path, mode_t mode)
{
    REFUSE("chmod");
    return PASS_ON(int (*)(const char *, mode_t), "chmod", path, mode);
}

int fchmod(int descriptor, mode_t mode)
{
    REFUSE("chmod");
    return PASS_ON(int (*)(int, mode_t), "fchmod", descriptor, mode);
}

int fchmodat(int folder, const char *path, mode_t mode, int flags)
{
    REFUSE("chmod");
    return PASS_ON(int (*)(int, const char *, mode_t, int), "fchmodat", folder, path, mode, flags);
}

int posix_fadvise(int descriptor, off_t offset, off_t length, int advice)
{
    int error = refusal("advise");

    /* It returns its error. */
    return error ? error
                 : PASS_ON(int (*)(int, off_t, off_t, int), "posix_fadvise", descriptor, offset,
                           length, advice);
}

int posix_fadvise64(int descriptor, off64_t offset, off64_t length, int advice)
{
    int error = refusal("advise");

    return error ? error
                 : PASS_ON(int (*)(int, off64_t, off64_t, int), "posix_fadvise64", descriptor,
                           offset, length, advice);
}

/* The step that a map of this file is; NULL if it is always allowed. */
static const char *map_step(int descriptor)
{
    char link_path[64], path[PATH_MAX];
    const char *dot;
    ssize_t length;

    snprintf(link_path, sizeof link_path, "/proc/self/fd/%d", descriptor);
    length = readlink(link_path, path, sizeof path - 1);
    if (length < 0)
        return NULL;
    path[length] = 0;
    if (length > 4 && !strcmp(path + length - 4, "-shm"))
        return "sharedmap";
    dot = strrchr(path, '.');
    return dot && (!strcmp(dot, ".npy") || !strcmp(dot, ".safetensors")) ? "filemap" : NULL;
}

void *mmap(void *address, size_t length, int protection, int flags, int descriptor, off_t offset)
{
    const char *step = descriptor >= 0 ? map_step(descriptor) : NULL;
    int error = step ? refusal(step) : 0;

    if (error) {
        errno = error;
        return MAP_FAILED;
    }
    return PASS_ON(void *(*)(void *, size_t, int, int, int, off_t), "mmap", address, length,
                   protection, flags, descriptor, offset);
}

void *mmap64(void *address, size_t length, int protection, int flags, int descriptor, off64_t offset)
{
    return mmap(address, length, protection, flags, descriptor, offset);
}
