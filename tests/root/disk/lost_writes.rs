//! A disk of this machine that takes what is written, and loses it later.

use oven::disk::direct::fault::ensure_written;
use oven::sys::namespaces::private_mounts;
use oven_testing::ring;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

fn run(program: &str, args: &[&str], path: &Path) {
    let ended = Command::new(program).args(args).arg(path).output().unwrap();
    assert!(ended.status.success(), "{program}: {}", String::from_utf8_lossy(&ended.stderr));
}

/// A file system of 128 MiB on a disk that holds 32: mounted for this thread alone, and gone with it.
fn promising(dir: &Path) {
    private_mounts().unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=32m", "none"], dir);
    let (disk, place) = (dir.join("disk"), dir.join("place"));
    File::create(&disk).unwrap().set_len(128 << 20).unwrap();
    run("mkfs.ext4", &["-q", "-O", "^has_journal"], &disk);
    std::fs::create_dir(&place).unwrap();
    run("mount", &["-o", "loop,errors=continue", disk.to_str().unwrap()], &place);
}

#[test]
fn what_was_written_and_lost_is_noticed_by_whoever_wrote_it() {
    let _ring = ring::shared();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let test = move || {
        promising(&path);
        let open = |name: &str| {
            let mut options = File::options();
            options.read(true).write(true).create(true).open(path.join("place").join(name)).unwrap()
        };
        let (mut lost, mut kept) = (open("lost"), open("kept"));
        kept.write_all(b"text").unwrap();
        kept.sync_all().unwrap();
        ensure_written(&lost).unwrap();
        lost.write_all(&vec![7; 64 << 20]).unwrap();
        // The kernel does so by itself, sooner or later; and who asks first is not the only one that gets the error.
        open("lost").sync_all().unwrap_err();
        let error = ensure_written(&lost).unwrap_err();
        assert!(matches!(error.raw_os_error(), Some(libc::EIO | libc::ENOSPC)), "{error}");
        ensure_written(&kept).unwrap();
        let mut text = String::new();
        open("kept").read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
    };
    std::thread::spawn(test).join().unwrap();
    assert_eq!(dir.path().read_dir().unwrap().count(), 0, "it was mounted for the thread alone");
}
