/* What scripts/bench read measures with: bare system calls, so that what is measured is the file system and no tool.
 *
 *   reader walk DIR             lists every folder and stats every name
 *   reader sequential DIR N     N processes read every file of the tree in its order, each its share, in 1 MiB pieces
 *   reader random DIR COUNT     COUNT times: opens a random file, reads 4 KiB at a random place, closes it
 *   reader open DIR COUNT       the same reads in files that are open already, 1,000 of them
 *   reader file FILE            reads one file in 1 MiB pieces
 *
 * Prints how much there was (names, bytes, reads) and the seconds it took. The list of files for `sequential`,
 * `random` and `open` is read from FILES in the environment, one path below DIR a line, after its size and a space; `list DIR`
 * prints such a list.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct entry { unsigned long ino; long off; unsigned short len; unsigned char type; char name[]; };
struct file { char *path; long size; };

static struct file *files;
static size_t file_count;
static unsigned long names;
static char piece[1 << 20];

static void die(const char *what) {
    fprintf(stderr, "reader: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

/* `path` is where the folder is, for `list`; without it nothing is printed. */
static void walk(int parent, const char *name, const char *path) {
    /* A buffer a level, of libc's size. */
    static char *buffers[512];
    static int depth;
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) die(name);
    if (depth == 512) die("too deep");
    if (!buffers[depth]) buffers[depth] = malloc(32768);
    char *buffer = buffers[depth++];
    long got;
    while ((got = syscall(SYS_getdents64, fd, buffer, 32768)) > 0)
        for (long at = 0; at < got;) {
            struct entry *entry = (struct entry *)(buffer + at);
            struct stat st;
            char *below = NULL;
            at += entry->len;
            if (!strcmp(entry->name, ".") || !strcmp(entry->name, "..")) continue;
            if (fstatat(fd, entry->name, &st, AT_SYMLINK_NOFOLLOW)) die(entry->name);
            names++;
            if (path && asprintf(&below, "%s%s%s", path, *path ? "/" : "", entry->name) < 0) die("memory");
            if (S_ISDIR(st.st_mode)) walk(fd, entry->name, below);
            else if (below && S_ISREG(st.st_mode) && !strchr(below, '\n')) printf("%ld %s\n", (long)st.st_size, below);
            free(below);
        }
    if (got < 0) die(name);
    depth--;
    close(fd);
}

static void load(void) {
    FILE *list = fopen(getenv("FILES") ? getenv("FILES") : "", "r");
    char *line = NULL;
    size_t room = 0;
    if (!list) die("FILES");
    while (getline(&line, &room, list) > 0) {
        char *path;
        long size = strtol(line, &path, 10);
        path[strcspn(path, "\n")] = 0;
        if (file_count % 4096 == 0) files = realloc(files, (file_count + 4096) * sizeof *files);
        files[file_count++] = (struct file){strdup(path + 1), size};
    }
    fclose(list);
}

static unsigned long slurp(int folder, const char *path) {
    int fd = openat(folder, path, O_RDONLY | O_CLOEXEC);
    unsigned long sum = 0;
    long got;
    if (fd < 0) die(path);
    while ((got = read(fd, piece, sizeof piece)) > 0) sum += got;
    if (got < 0) die(path);
    close(fd);
    return sum;
}

/* A run of files, so that each process reads its part of the image in order. */
static unsigned long share(int folder, size_t of, size_t which) {
    unsigned long sum = 0;
    for (size_t at = file_count * which / of; at < file_count * (which + 1) / of; at++) sum += slurp(folder, files[at].path);
    return sum;
}

static unsigned long sequential(int folder, size_t processes) {
    unsigned long sum = 0, part;
    int pipes[2];
    if (processes == 1) return share(folder, 1, 0);
    if (pipe(pipes)) die("pipe");
    for (size_t which = 0; which < processes; which++)
        if (fork() == 0) {
            part = share(folder, processes, which);
            _exit(write(pipes[1], &part, sizeof part) != sizeof part);
        }
    for (size_t which = 0; which < processes; which++) {
        int status;
        if (wait(&status) < 0 || status) exit(1);
        if (read(pipes[0], &part, sizeof part) != sizeof part) die("pipe");
        sum += part;
    }
    return sum;
}

/* A random file of at least 4 KiB, and a random place there. */
static unsigned long chance = 42;

static struct file *some_file(void) {
    struct file *file;
    do {
        chance = chance * 6364136223846793005UL + 1442695040888963407UL;
        file = &files[(chance >> 33) % file_count];
    } while (file->size < 4096);
    return file;
}

static void read_some(int fd, struct file *file) {
    chance = chance * 6364136223846793005UL + 1442695040888963407UL;
    if (pread(fd, piece, 4096, (long)((chance >> 33) % (file->size / 4096)) * 4096) != 4096) die(file->path);
}

static int open_file(int folder, struct file *file) {
    int fd = openat(folder, file->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) die(file->path);
    return fd;
}

static unsigned long random_reads(int folder, unsigned long count) {
    for (unsigned long done = 0; done < count; done++) {
        struct file *file = some_file();
        int fd = open_file(folder, file);
        read_some(fd, file);
        close(fd);
    }
    return count;
}

/* Opening is not measured: `start` is moved behind it. */
static unsigned long open_reads(int folder, unsigned long count, double *start) {
    enum { OPEN = 1000 };
    static struct file *opened[OPEN];
    static int fds[OPEN];
    for (int at = 0; at < OPEN; at++) fds[at] = open_file(folder, opened[at] = some_file());
    *start = now();
    for (unsigned long done = 0; done < count; done++) read_some(fds[done % OPEN], opened[done % OPEN]);
    return count;
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fputs("usage: reader walk|list|sequential|random|open|file PATH [NUMBER]\n", stderr);
        return 2;
    }
    const char *what = argv[1];
    long number = argc > 3 ? atol(argv[3]) : 1;
    unsigned long result = 0;
    int folder = open(argv[2], O_RDONLY | O_CLOEXEC);
    if (folder < 0) die(argv[2]);
    if (!strcmp(what, "list")) {
        walk(AT_FDCWD, argv[2], "");
        return 0;
    }
    if (!strcmp(what, "sequential") || !strcmp(what, "random") || !strcmp(what, "open")) load();
    double start = now();
    if (!strcmp(what, "walk")) walk(AT_FDCWD, argv[2], NULL), result = names;
    else if (!strcmp(what, "sequential")) result = sequential(folder, number);
    else if (!strcmp(what, "random")) result = random_reads(folder, number);
    else if (!strcmp(what, "open")) result = open_reads(folder, number, &start);
    else if (!strcmp(what, "file")) result = slurp(AT_FDCWD, argv[2]);
    printf("%lu %.6f\n", result, now() - start);
}
