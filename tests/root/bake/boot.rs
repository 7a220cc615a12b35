//! What a bake may do to kernel and boot loader of a real Debian with its kernel and GRUB, through the program itself.
//! The kernels, initramfs-tools and update-grub are real; no image is booted here (`vm-tests/kernel` does that). Needs
//! root and `OVEN_TEST_BASE`. Installing a kernel downloads some 35 MB: that is `hostile::real`'s.

use oven_testing::{ImageReader, LocalWorld, stderr};
use std::path::PathBuf;
use std::process::Command;

const STEP: i32 = 5;

fn base() -> PathBuf {
    std::env::var_os("OVEN_TEST_BASE").expect("OVEN_TEST_BASE is not set: run scripts/test root").into()
}

/// Definitions on the base, one for each script; baked together, for the base is large.
struct BootLab(LocalWorld);

impl BootLab {
    fn new(scripts: &[(&str, &str)]) -> Self {
        let world = LocalWorld::empty();
        world.expect(0, &["import", base().to_str().unwrap(), "--name", "base"]);
        for (name, script) in scripts {
            let toml = format!("from = {{ name = \"base\" }}\n[[run]]\nscript = \"{name}.sh\"\n");
            world.write(&format!("{name}/image.toml"), &toml);
            world.write(&format!("{name}/{name}.sh"), &format!("#!/bin/sh\nset -eu\n{script}\n"));
        }
        Self(world)
    }

    /// A base that debugfs has changed.
    fn import(&self, name: &str, requests: &[String]) {
        let raw = self.0.path("changed.raw");
        let cp = Command::new("cp").arg("--sparse=always").arg(base()).arg(&raw).status().unwrap();
        assert!(cp.success());
        requests.iter().for_each(|request| ImageReader::in_file(&raw).change(request));
        self.0.expect(0, &["import", raw.to_str().unwrap(), "--name", name]);
        std::fs::remove_file(raw).unwrap();
    }

    /// Fails with these words, leaves nothing, and makes no image.
    fn fails(&self, name: &str, words: &[&str]) -> String {
        let before = self.0.files();
        let (out, err) = self.0.expect(STEP, &["bake", name]);
        assert_eq!(out, "");
        assert!(err.contains("the image would not boot on an instance:"), "{err}");
        words.iter().for_each(|word| assert!(err.contains(word), "no \"{word}\" in\n{err}"));
        self.0.assert_no_traces(&err);
        assert_eq!(self.0.files(), before, "{err}");
        err
    }
}

#[test]
fn names_of_other_disks_fail_the_bake_with_file_and_line() {
    let uuid = ImageReader::in_file(&base()).uuid();
    let lab = BootLab::new(&[
        ("grub", "sed -i 's,root=UUID=[^ ]*,root=/dev/loop0p1,' /boot/grub/grub.cfg"),
        ("fstab", "sed -i 's,^UUID=[^ ]* / ,UUID=01234567-89ab-cdef-0123-456789abcdef / ,' /etc/fstab"),
        ("cmdline", "mkdir -p /etc/kernel; echo root=/dev/nvme1n1p1 ro > /etc/kernel/cmdline"),
    ]);
    let grub = ImageReader::in_file(&base()).read("/boot/grub/grub.cfg").unwrap();
    let line = 1 + grub.lines().position(|line| line.contains(" root=UUID=")).unwrap();
    // The device that the test plants may be the very one of this bake.
    lab.fails(
        "grub",
        &[&format!("/boot/grub/grub.cfg:{line}: `root=/dev/loop0p1`"), &format!("UUID={uuid}")],
    );
    let fstab =
        "/etc/fstab:1: `UUID=01234567-89ab-cdef-0123-456789abcdef` does not name the image's own disk";
    let err = lab.fails("fstab", &[fstab]);
    assert!(!err.contains("grub.cfg"), "{err}");
    lab.fails("cmdline", &["/etc/kernel/cmdline:1: `root=/dev/nvme1n1p1` depends on the machine"]);
}

#[test]
fn the_disks_own_names_and_unlike_texts_pass() {
    let lab = BootLab::new(&[(
        "good",
        "printf '# /dev/sda1\\nLABEL=own-root / ext4 rw,discard 0 1\\n/dev/xvdb /mnt auto nofail 0 2\\n' > /etc/fstab\n\
         sed -i 's,root=UUID=[^ ]*,root=LABEL=own-root,' /boot/grub/grub.cfg",
    )]);
    lab.import("labelled", &["set_super_value volume_name own-root".to_owned()]);
    let toml = "from = { name = \"labelled\" }\n[[run]]\nscript = \"good.sh\"\n";
    lab.0.write("good/image.toml", toml);
    let (out, err) = lab.0.expect(0, &["bake", "good"]);
    lab.0.assert_no_traces(&err);
    let disk = ImageReader::of(&lab.0, out.trim());
    assert!(disk.read("/boot/grub/grub.cfg").unwrap().contains("root=LABEL=own-root"));
}

/// initramfs-tools itself makes both: by its configuration for one machine, and by its default. The kernel of the base
/// has nvme built in: the test makes another of it that says it has not.
#[test]
fn an_initramfs_for_one_machine_fails_the_bake_and_a_generic_one_does_not() {
    let version = "version=$(basename /lib/modules/*)\n";
    let planted = format!(
        "{version}cp -al /lib/modules/$version /lib/modules/9.9-planted\n\
         sed -i /nvme/d /lib/modules/9.9-planted/modules.builtin\n\
         cp /boot/vmlinuz-$version /boot/vmlinuz-9.9-planted\n\
         sed s/BLK_DEV_NVME=y/BLK_DEV_NVME=m/ /boot/config-$version > /boot/config-9.9-planted\n\
         echo MODULES=list > /etc/initramfs-tools/conf.d/driver-policy\n\
         mkinitramfs -o /boot/initrd.img-9.9-planted 9.9-planted >&2"
    );
    let generic = format!("{version}update-initramfs -u -k $version >&2");
    let lab = BootLab::new(&[("list", &planted), ("generic", &generic), ("gone", "rm /boot/initrd.img-*")]);
    let err = lab.fails("list", &["/boot/initrd.img-9.9-planted: it has no nvme driver"]);
    assert!(!err.contains("ena driver"), "it is a module of the root file system: {err}");
    lab.fails("gone", &["/boot/vmlinuz-", "this kernel has no initramfs"]);
    // The clean-up is checked, too.
    for (pattern, message) in [
        ("/boot/initrd.img-*", "this kernel has no initramfs"),
        ("/boot/vmlinuz-*", "this kernel was removed, and there is no other kernel"),
    ] {
        let toml = format!("from = {{ name = \"base\" }}\n[clean]\nremove = [\"{pattern}\"]\n");
        lab.0.write("removed/image.toml", &toml);
        lab.fails("removed", &["/boot/vmlinuz-", message]);
    }
    let before = ImageReader::in_file(&base());
    let name = before.list("/boot").into_iter().find(|name| name.starts_with("initrd.img-")).unwrap();
    let (out, err) = lab.0.expect(0, &["--verbose", "bake", "generic"]);
    assert!(err.contains(&format!("/boot/{name}: nvme is built in, ena is in it")), "{err}");
    let size = |disk: &ImageReader| disk.size(&format!("/boot/{name}"));
    let (old, new) = (size(&before), size(&ImageReader::of(&lab.0, out.trim())));
    assert!(new > old / 2 && new < old * 2, "the base's has {old} bytes, this one {new}");
}

/// A package whose script has an initramfs made, as a kernel's does, on a base that is set up for one machine's
/// drivers.
#[test]
fn packages_get_a_generic_initramfs_whatever_the_base_is_set_to() {
    let lab = BootLab::new(&[]);
    let policy = lab.0.path("driver-policy");
    std::fs::write(&policy, "MODULES=list\n").unwrap();
    let set = format!("write {} /etc/initramfs-tools/conf.d/driver-policy", policy.display());
    lab.import("for-one", &["rm /etc/apt/sources.list".to_owned(), set]);
    let control =
        "Package: trigger\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b.example>\nDescription: x\n";
    lab.0.write("deb/DEBIAN/control", control);
    lab.0.write("deb/DEBIAN/postinst", "#!/bin/sh\nexec update-initramfs -u\n");
    let postinst = lab.0.path("deb/DEBIAN/postinst");
    std::fs::set_permissions(&postinst, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let arguments = ["--root-owner-group", "-Znone", "--build"];
    lab.0.write("image/image.toml", "from = { name = \"for-one\" }\npackages = [\"./trigger.deb\"]\n");
    let deb = lab.0.path("image/trigger.deb");
    let built = Command::new("dpkg-deb").args(arguments).arg(lab.0.path("deb")).arg(deb).output().unwrap();
    assert!(built.status.success(), "{}", stderr(&built));
    let (out, err) = lab.0.expect(0, &["--verbose", "bake", "image"]);
    assert!(err.contains("nvme is built in, ena is in it"), "{err}");
    let disk = ImageReader::of(&lab.0, out.trim());
    assert_eq!(
        disk.list("/etc/initramfs-tools/conf.d"),
        ["driver-policy"],
        "what said so was there for the bake alone"
    );
}
