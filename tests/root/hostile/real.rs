//! Packages of Debian's archive that change what oven itself needs. These download from the mirror: some 35 MB.

use super::lab::{HostileLab, variable};
use oven_testing::ImageReader;

fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

/// `root=` of each kernel's line in a grub.cfg.
fn roots(grub: &str) -> Vec<&str> {
    let kernels =
        grub.lines().map(str::trim).filter(|line| line.starts_with("linux\t") || line.starts_with("linux "));
    kernels.map(|line| line.split_whitespace().find(|word| word.starts_with("root=")).expect(line)).collect()
}

#[test]
fn a_kernel_is_installed_and_grub_names_the_disk_by_its_uuid() {
    let lab = HostileLab::full();
    // Not the one that the base has.
    let name = format!("linux-image-6.12-cloud-{}", architecture());
    lab.world.write("image/image.toml", &format!("from = {{ name = \"base\" }}\npackages = [\"{name}\"]\n"));
    let base = ImageReader::in_file(&variable("OVEN_TEST_BASE"));
    let (disk, baked) = lab.image();
    let new: Vec<_> =
        disk.list("/boot").into_iter().filter(|file| !base.list("/boot").contains(file)).collect();
    for kind in ["vmlinuz-6.12.", "initrd.img-6.12.", "config-6.12."] {
        assert_eq!(new.iter().filter(|file| file.starts_with(kind)).count(), 1, "{new:?}\n{}", baked.err);
    }
    let kernel = new.iter().find(|file| file.starts_with("vmlinuz-")).unwrap();
    assert_eq!(disk.link("/vmlinuz"), Some(format!("boot/{kernel}")));
    assert_eq!(disk.link("/initrd.img"), Some(format!("boot/{}", kernel.replace("vmlinuz", "initrd.img"))));
    // It can find its root: the modules are in it.
    assert!(disk.size(&format!("/boot/{}", kernel.replace("vmlinuz", "initrd.img"))) > 5 << 20);

    let uuid = base.uuid();
    let grub = disk.read("/boot/grub/grub.cfg").unwrap();
    assert!(
        grub.contains("update-grub") || grub.contains("grub-mkconfig"),
        "update-grub did not run:\n{grub}"
    );
    assert!(
        roots(&grub).len() >= 4 && roots(&grub).iter().all(|root| **root == *format!("root=UUID={uuid}")),
        "{grub}"
    );
    assert!(grub.contains(&format!("linux\t/boot/{kernel} root=UUID={uuid} ro")), "{grub}");
    let searches = grub.lines().filter(|line| line.trim().starts_with("search ")).collect::<Vec<_>>();
    assert!(searches.iter().all(|line| line.contains("--fs-uuid") && line.ends_with(&uuid)), "{searches:?}");
    assert!(!grub.contains("loop"), "{grub}");
    assert_eq!(disk.read("/boot/grub/device.map"), None);

    assert_eq!(disk.audit(), "");
    assert_eq!(disk.uuid(), uuid);
    assert_eq!(disk.read("/etc/resolv.conf"), base.read("/etc/resolv.conf"));
    assert_eq!(disk.read("/etc/fstab"), base.read("/etc/fstab"));
    assert_eq!(disk.list("/boot/efi"), base.list("/boot/efi"));
}

/// Both replace /etc/resolv.conf, and exclude each other.
#[test]
fn what_manages_resolv_conf_is_installed() {
    let lab = HostileLab::full();
    let base = lab.base().read("/etc/resolv.conf").unwrap();
    let mut dirs = Vec::new();
    for (package, link) in [
        ("systemd-resolved", "../run/systemd/resolve/stub-resolv.conf"),
        ("resolvconf", "../run/resolvconf/resolv.conf"),
    ] {
        let toml = format!(
            "from = {{ name = \"base\" }}\npackages = [\"{package}\"]\n[[run]]\nscript = \"after.sh\"\nnetwork = true\n"
        );
        lab.world.write(&format!("{package}/image.toml"), &toml);
        // The name servers of this machine, wherever the link leads.
        lab.world.write(&format!("{package}/after.sh"), "#!/bin/sh\nexec getent hosts deb.debian.org\n");
        dirs.push((package, link));
    }
    let (out, err) = lab.world.expect(0, &["bake", "--jobs", "2", "systemd-resolved", "resolvconf"]);
    lab.world.assert_no_traces(&err);
    for (line, (package, link)) in out.lines().zip(dirs) {
        let (ami, name) = line.split_once('\t').unwrap();
        assert_eq!(name, package);
        let disk = ImageReader::of(&lab.world, ami);
        assert_eq!(disk.link("/etc/resolv.conf").as_deref(), Some(link), "{package}");
        let (run, etc) = (disk.list("/run"), disk.list("/etc"));
        assert!(run.iter().all(|name| name == "lock"), "{package}: {run:?}");
        // Each has a copy of the old one: that is the base's, not this machine's.
        let copies = etc.iter().filter(|name| name.contains("resolv.conf") && *name != "resolv.conf");
        let copies = copies.map(|name| format!("/etc/{name}"));
        let kept = "/etc/resolvconf/resolv.conf.d";
        for copy in copies.chain(disk.list(kept).into_iter().map(|name| format!("{kept}/{name}"))) {
            let content = disk.read(&copy).unwrap_or_default();
            assert!(
                content.lines().all(|line| line.starts_with('#') || base.contains(line)),
                "{copy}: {content}"
            );
        }
        assert_eq!(disk.audit(), "");
        let (sound, report) = disk.fsck();
        assert!(sound, "{report}");
    }
}
