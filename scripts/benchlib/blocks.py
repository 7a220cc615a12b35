"""Compares disks by blocks of EBS."""
import os

BLOCK = 512 << 10
ZEROS = bytes(BLOCK)


def written(fd, size):
    """Indexes of blocks in which the file has data: holes are zeros."""
    found, at = set(), 0
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        end = os.lseek(fd, begin, os.SEEK_HOLE)
        found.update(range(begin // BLOCK, (end + BLOCK - 1) // BLOCK))
        at = end
    return found


def block(fd, index):
    return os.pread(fd, BLOCK, index * BLOCK).ljust(BLOCK, b"\0")


def changed_blocks(before, after):
    """The blocks that differ. Parts without data are zeros."""
    with open(before, "rb") as a, open(after, "rb") as b:
        sizes = [os.fstat(file.fileno()).st_size for file in (a, b)]
        candidates = written(a.fileno(), sizes[0]) | written(b.fileno(), sizes[1])
        return {index for index in candidates if block(a.fileno(), index) != block(b.fileno(), index)}
