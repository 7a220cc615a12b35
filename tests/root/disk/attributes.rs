//! Append-only and immutable files of a base image: the clean-up changes them, and they keep their attributes.

use oven::image::tree::ImageTree;
use oven::seal::clean::{clean, protected_note};
use oven_testing::ring;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn run(program: &str, arguments: &[&str]) -> String {
    let done = Command::new(program).args(arguments).output().unwrap();
    assert!(done.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

/// A mounted file system with the files of an image.
struct ImageDisk {
    dir: tempfile::TempDir,
    _ring: ring::Shared,
}

impl ImageDisk {
    fn new(kind: &str) -> Self {
        let (dir, ring) = (tempfile::tempdir().unwrap(), ring::shared());
        let disk = Self { dir, _ring: ring };
        let (raw, root) = (disk.dir.path().join("raw"), disk.path(""));
        fs::File::create(&raw).unwrap().set_len(512 << 20).unwrap();
        fs::create_dir(&root).unwrap();
        run(&format!("mkfs.{kind}"), &["-q", raw.to_str().unwrap()]);
        run("mount", &["-o", "loop", raw.to_str().unwrap(), root.to_str().unwrap()]);
        for (path, content) in [
            ("usr/lib/systemd/systemd", "elf"),
            ("usr/sbin/sshd", "elf"),
            ("usr/bin/ssh-keygen", "elf"),
            ("etc/ssh/ssh_host_rsa_key", "PRIVATE"),
            ("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
            ("etc/resolv.conf", "nameserver 192.0.2.1\n"),
            ("var/log/secure.log", "secret\n"),
            ("var/log/audit/audit.log", "secret\n"),
            ("var/log/audit/audit.log.1", "secret\n"),
            ("var/log/linked", "precious\n"),
            ("root/.bash_history", "ls\n"),
            ("tmp/a/b/c", "x"),
            ("var/tmp/x", "x"),
        ] {
            disk.write(path, content);
        }
        fs::hard_link(disk.path("var/log/linked"), disk.path("precious")).unwrap();
        disk
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join("root").join(path)
    }

    fn write(&self, path: &str, content: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn protect(&self, attribute: &str, paths: &[&str]) {
        for path in paths {
            run("chattr", &[attribute, self.path(path).to_str().unwrap()]);
        }
    }

    /// Returns `a`, `i`, both or neither.
    fn protection(&self, path: &str) -> String {
        let listed = run("lsattr", &["-d", self.path(path).to_str().unwrap()]);
        listed.split(' ').next().unwrap().chars().filter(|c| matches!(c, 'a' | 'i')).collect()
    }

    fn tree(&self) -> ImageTree {
        ImageTree::open_dir(Path::new(&self.path(""))).unwrap()
    }
}

impl Drop for ImageDisk {
    fn drop(&mut self) {
        _ = Command::new("chattr").args(["-R", "-a", "-i"]).arg(self.path("")).output();
        run("umount", &[self.path("").to_str().unwrap()]);
    }
}

#[test]
fn protected_files_are_cleaned_and_stay_protected() {
    for kind in ["ext4", "xfs"] {
        let disk = ImageDisk::new(kind);
        disk.protect("+a", &["var/log/secure.log", "root", "var/tmp/x", "var/log/linked"]);
        disk.protect(
            "+i",
            &[
                "etc/machine-id",
                "etc/resolv.conf",
                "etc/ssh/ssh_host_rsa_key",
                "etc/ssh",
                "var/log/audit/audit.log",
                "var/log/audit/audit.log.1",
                "var/log/audit",
                "root/.bash_history",
                "tmp/a/b/c",
                "tmp/a/b",
                "tmp/a",
            ],
        );
        disk.protect("+ai", &["etc"]);
        let tree = disk.tree();
        clean(&tree, &[]).unwrap_or_else(|error| panic!("{kind}: {error:#}"));
        let note = protected_note(&tree).unwrap();
        for (path, content) in [
            ("etc/machine-id", ""),
            ("var/log/secure.log", ""),
            ("var/log/audit/audit.log", ""),
            ("precious", "precious\n"),
            ("etc/resolv.conf", "nameserver 192.0.2.1\n"),
        ] {
            assert_eq!(fs::read_to_string(disk.path(path)).unwrap(), content, "{kind}: {path}");
        }
        for gone in [
            "etc/ssh/ssh_host_rsa_key",
            "var/log/audit/audit.log.1",
            "var/log/linked",
            "root/.bash_history",
            "tmp/a",
            "var/tmp/x",
        ] {
            assert!(!disk.path(gone).exists(), "{kind}: {gone}");
        }
        let unit = "etc/systemd/system/multi-user.target.wants/oven-ssh-keys.service";
        assert!(disk.path(unit).symlink_metadata().is_ok(), "{kind}");
        for (path, protection) in [
            ("var/log/secure.log", "a"),
            ("precious", "a"),
            ("root", "a"),
            ("var/log/audit", "i"),
            ("var/log/audit/audit.log", "i"),
            ("etc/machine-id", "i"),
            ("etc/resolv.conf", "i"),
            ("etc/ssh", "i"),
            ("etc", "ai"),
            ("etc/systemd", ""),
            ("tmp", ""),
            ("var/log", ""),
        ] {
            let found: String = disk.protection(path);
            let mut found: Vec<_> = found.chars().collect();
            found.sort_unstable();
            assert_eq!(found.iter().collect::<String>(), protection, "{kind}: {path}");
        }
        for part in [
            "/var/log/secure.log (append-only)",
            "/etc/machine-id (immutable)",
            "/etc (append-only and immutable)",
            "new one at each boot",
        ] {
            assert!(note.contains(part), "{kind}: {note}");
        }
        assert!(!note.contains("/tmp/a") && !note.contains("resolv.conf"), "{note}");
        let again = clean(&disk.tree(), &[]).unwrap();
        assert!(again.iter().all(|note| !note.contains("oven-ssh-keys")), "{again:?}");
    }
}

#[test]
fn files_are_placed_and_labelled_although_they_are_protected() {
    let disk = ImageDisk::new("ext4");
    disk.protect("+i", &["etc/resolv.conf", "var/log"]);
    disk.protect("+a", &["var/log/secure.log", "etc"]);
    let tree = disk.tree();
    tree.write("/etc/resolv.conf", b"new", 0o644, 0, 0).unwrap();
    tree.write("/var/log/secure.log", b"new", 0o600, 0, 0).unwrap();
    let mut source = fs::File::open(disk.path("precious")).unwrap();
    tree.write_from("/etc/resolv.conf", &mut source, 0o644, 0, 0).unwrap();
    assert!(tree.set_label("/etc/resolv.conf", "u:r:t:s0").unwrap());
    assert_eq!(tree.label("/etc/resolv.conf").unwrap().as_deref(), Some("u:r:t:s0"));
    assert!(tree.remove("/var/log/secure.log").unwrap());
    assert_eq!(fs::read_to_string(disk.path("etc/resolv.conf")).unwrap(), "precious\n");
    let protections = ["etc/resolv.conf", "etc", "var/log"].map(|path| disk.protection(path));
    assert_eq!(protections, ["i", "a", "i"]);
    let left: Vec<_> =
        fs::read_dir(disk.path("etc")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with(".oven")), "{left:?}");
}

/// A refusal for another reason stays an error, and nothing is unprotected afterwards.
#[test]
fn a_change_that_fails_leaves_the_attributes() {
    let disk = ImageDisk::new("ext4");
    disk.protect("+i", &["etc/ssh"]);
    let error = disk.tree().write("/etc/ssh", b"x", 0o644, 0, 0).unwrap_err();
    assert!(format!("{error:#}").contains("/etc/ssh"), "{error:#}");
    assert_eq!(disk.protection("etc/ssh"), "i");
    let file = fs::File::create(disk.path("etc/full")).unwrap();
    drop(file);
    disk.protect("+a", &["etc/full"]);
    run("mount", &["-o", "remount,ro", disk.path("").to_str().unwrap()]);
    let error = format!("{:#}", disk.tree().truncate("/etc/full").unwrap_err());
    assert!(error.contains("/etc/full") && error.contains("Read-only"), "{error}");
    assert_eq!(disk.protection("etc/full"), "a");
    run("mount", &["-o", "remount,rw", disk.path("").to_str().unwrap()]);
}
