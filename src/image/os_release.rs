//! Reads an image's os-release, and finds out the architecture of its programs.

use super::tree::ImageTree;
use crate::error::Kind;
use crate::ids::Architecture;
use anyhow::{Context, Result};
use oven_distro::OsRelease;

/// The maximum size of os-release in bytes. Usually, it has less than 1 KiB.
const OS_RELEASE_MAX: u64 = 64 << 10;
/// The paths of os-release, in the order of os-release(5).
const OS_RELEASE: [&str; 2] = ["/etc/os-release", "/usr/lib/os-release"];

pub fn os_release(inside: &ImageTree) -> Result<OsRelease> {
    for path in OS_RELEASE {
        let content = inside.read_at_most(path, OS_RELEASE_MAX);
        if let Some(content) = content.context("reading the image's os-release")? {
            return Ok(OsRelease::parse(&String::from_utf8_lossy(&content)));
        }
    }
    let failure = Kind::Definition.failure("the image has neither /etc/os-release nor /usr/lib/os-release");
    Err(failure.hint("Check that the base image contains a Linux system.").into())
}

/// Returns the architecture of an image's programs. It is read from `/bin/sh`, because oven requires this program in
/// every image.
pub fn architecture(inside: &ImageTree) -> Result<Architecture> {
    let head = inside.read_start("/bin/sh", 20).context("reading the image's /bin/sh")?.ok_or_else(|| {
        let failure = Kind::Definition.failure("the image has no /bin/sh");
        failure
            .hint("oven installs packages with the image's own package manager, whose scripts need a shell.")
    })?;
    elf_architecture(&head).map_err(|what| Kind::Definition.error(format!("the image's /bin/sh is {what}")))
}

/// Reads the architecture from the first 20 bytes of a program.
fn elf_architecture(head: &[u8]) -> Result<Architecture, String> {
    let [0x7f, b'E', b'L', b'F', class, order, ..] = *head else { return Err("not an ELF program".into()) };
    if head.len() < 20 {
        return Err("truncated".into());
    }
    match (class, order, u16::from_le_bytes([head[18], head[19]])) {
        (2, 1, 62) => Ok(Architecture::X86_64),
        (2, 1, 183) => Ok(Architecture::Arm64),
        (1, ..) => Err("a 32-bit program; oven supports x86_64 and arm64".into()),
        (_, _, machine) => {
            Err(format!("a program for ELF machine {machine}; oven supports x86_64 and arm64"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn program(class: u8, machine: u16) -> Vec<u8> {
        let mut head = vec![0; 64];
        head[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, 1]);
        head[18..20].copy_from_slice(&machine.to_le_bytes());
        head
    }

    #[test]
    fn shells_of_all_kinds() {
        for (shell, class, machine, want) in [
            ("dash", 2, 62, Ok(Architecture::X86_64)),
            ("busybox", 2, 183, Ok(Architecture::Arm64)),
            ("bash", 1, 3, Err("32-bit")),
            ("bash", 2, 243, Err("ELF machine 243")),
        ] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir_all(dir.path().join("usr/bin")).unwrap();
            symlink("usr/bin", dir.path().join("bin")).unwrap();
            std::fs::write(dir.path().join("usr/bin").join(shell), program(class, machine)).unwrap();
            // The link is absolute, like the links that update-alternatives makes. It must be resolved inside the
            // image.
            symlink(format!("/usr/bin/{shell}"), dir.path().join("bin/sh")).unwrap();
            let found = architecture(&ImageTree::open_dir(dir.path()).unwrap());
            match want {
                Ok(want) => assert_eq!(found.unwrap(), want),
                Err(why) => assert!(format!("{:#}", found.unwrap_err()).contains(why)),
            }
        }
    }

    #[test]
    fn a_missing_shell_a_script_and_a_truncated_program() {
        let dir = tempfile::tempdir().unwrap();
        let inside = ImageTree::open_dir(dir.path()).unwrap();
        assert_eq!(architecture(&inside).unwrap_err().to_string(), "the image has no /bin/sh");
        std::fs::create_dir(dir.path().join("bin")).unwrap();
        for (content, why) in
            [(&b"#!/bin/x\n"[..], "not an ELF"), (b"\x7fELF\x02\x01", "truncated"), (b"", "not an ELF")]
        {
            std::fs::write(dir.path().join("bin/sh"), content).unwrap();
            assert!(architecture(&inside).unwrap_err().to_string().contains(why));
        }
        assert_eq!(Kind::of(&architecture(&inside).unwrap_err()), Kind::Definition);
    }

    #[test]
    fn os_release_through_its_usual_link() {
        let dir = tempfile::tempdir().unwrap();
        let inside = ImageTree::open_dir(dir.path()).unwrap();
        assert!(os_release(&inside).unwrap_err().to_string().contains("neither"));
        std::fs::create_dir_all(dir.path().join("usr/lib")).unwrap();
        std::fs::create_dir_all(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("usr/lib/os-release"), "ID=debian\n").unwrap();
        assert_eq!(os_release(&inside).unwrap().id(), "debian");
        symlink("../usr/lib/os-release", dir.path().join("etc/os-release")).unwrap();
        assert_eq!(os_release(&inside).unwrap().id(), "debian");
    }
}
