//! Packages whose scripts start servers, build programs, or depend on the running kernel.

use super::{is_full, kernel, number};
use crate::hostile::lab::HostileLab;

/// A definition on the full Debian with these packages, and a script that runs as a `[[test]]`.
fn lab(packages: &[&str], more: &str, test: &str) -> HostileLab {
    let lab = HostileLab::full();
    let toml = format!(
        "from = {{ name = \"base\" }}\npackages = {packages:?}\n{more}\n[[test]]\nscript = \"test.sh\"\n"
    );
    lab.world.write("image/image.toml", &toml);
    lab.world.write("image/test.sh", &format!("#!/bin/sh\nset -eux\n{test}\n"));
    lab
}

fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

/// The package makes a cluster. Its server does not start in the bake, but can start in a test.
#[test]
fn postgresql_has_a_cluster_and_its_server_does_not_run() {
    if !is_full("PostgreSQL (64 MB)") {
        return;
    }
    let lab = lab(
        &["postgresql"],
        "",
        "version=$(ls /etc/postgresql)\n\
         test \"$(pg_lsclusters -h | awk '{ print $4 }')\" = down\n\
         pg_ctlcluster $version main start\n\
         test \"$(su postgres -c \"psql -Atc 'select 6 * 7'\")\" = 42\n\
         su postgres -c 'createdb of-a-test'",
    );
    let (disk, baked) = lab.image();
    let versions = disk.list("/etc/postgresql");
    assert_eq!(versions.len(), 1, "{versions:?}\n{}", baked.err);
    let cluster = format!("/var/lib/postgresql/{}/main", versions[0]);
    assert_eq!(disk.read(&format!("{cluster}/PG_VERSION")), Some(format!("{}\n", versions[0])));
    assert_eq!(disk.mode(&cluster).as_deref(), Some("0700"));
    let owner = (number(&disk, "/etc/passwd", "postgres"), number(&disk, "/etc/group", "postgres"));
    assert_eq!(disk.owner(&cluster), Some(owner));
    // No server has used it: neither in the bake, nor does the image have what the test changed.
    let files = disk.list(&cluster);
    assert!(!files.iter().any(|file| file == "postmaster.pid" || file == "postmaster.opts"), "{files:?}");
    // The databases of a new cluster have the numbers 1, 4 and 5.
    let mut databases = disk.list(&format!("{cluster}/base"));
    databases.sort_unstable();
    assert_eq!(databases, ["1", "4", "5"]);
    let wanted = disk.list("/etc/systemd/system/multi-user.target.wants");
    assert!(wanted.contains(&"postgresql.service".to_owned()), "{wanted:?}");
    assert_eq!(disk.read("/usr/sbin/policy-rc.d"), None);
    assert_eq!(disk.audit(), "");
}

/// A script of the package runs Java, which needs /proc, and imports each certificate of the image.
#[test]
fn java_has_the_certificates_of_the_image() {
    if !is_full("Java (70 MB)") {
        return;
    }
    let lab = lab(
        &["ca-certificates-java", "default-jre-headless"],
        "[[run]]\nscript = \"count.sh\"\n",
        "java -version",
    );
    let count = "keytool -list -cacerts -storepass changeit | grep -c trustedCertEntry > /srv/imported\n\
                 ls /etc/ssl/certs/*.pem | wc -l > /srv/certificates";
    lab.world.write("image/count.sh", &format!("#!/bin/sh\nset -eu\n{count}\n"));
    let (disk, baked) = lab.image();
    let store = "/etc/ssl/certs/java/cacerts";
    assert!(disk.size(store) > 100_000, "{} bytes\n{}", disk.size(store), baked.err);
    assert_eq!(disk.mode(store).as_deref(), Some("0644"));
    let number = |path: &str| disk.read(path).unwrap().trim().parse::<usize>().unwrap();
    let (imported, certificates) = (number("/srv/imported"), number("/srv/certificates"));
    assert!(imported > 100 && imported >= certificates - 1, "{imported} of {certificates}");
    assert_eq!(disk.audit(), "");
}

/// DKMS builds the module for the image's kernel, although another kernel runs.
#[test]
fn a_dkms_module_is_built_for_the_kernel_of_the_image() {
    if !is_full("DKMS (64 MB)") {
        return;
    }
    let headers = format!("linux-headers-cloud-{}", architecture());
    let lab = lab(
        &["dm-writeboost-dkms", &headers],
        "",
        "kernel=$(ls /lib/modules)\n\
         test \"$kernel\" != \"$(uname -r)\"\n\
         dkms status | grep \"^dm-writeboost/.*, $kernel, .*: installed\"\n\
         modinfo -k \"$kernel\" -F vermagic dm-writeboost | grep \"^$kernel \"",
    );
    let (disk, baked) = lab.image();
    let kernel = kernel(&disk);
    let built = disk.list(&format!("/lib/modules/{kernel}/updates/dkms"));
    assert!(built.iter().any(|file| file.starts_with("dm-writeboost.ko")), "{built:?}\n{}", baked.err);
    let modules = disk.read(&format!("/lib/modules/{kernel}/modules.dep")).unwrap();
    assert!(modules.contains("updates/dkms/dm-writeboost.ko"), "depmod did not run");
    let sources = disk.list("/var/lib/dkms/dm-writeboost");
    assert!(sources.iter().any(|name| name.starts_with(&format!("kernel-{kernel}-"))), "{sources:?}");
    // All instances share the key with which DKMS signs modules, if it made one.
    if disk.kind("/var/lib/dkms/mok.key").is_some() {
        assert!(baked.err.contains("/var/lib/dkms/mok.key"), "{}", baked.err);
    }
    assert_eq!(disk.audit(), "");
}

/// dracut replaces initramfs-tools, and makes an initramfs for the image's kernel.
#[test]
fn dracut_makes_an_initramfs_for_the_kernel_of_the_image() {
    if !is_full("dracut (80 s)") {
        return;
    }
    let lab = lab(
        &["dracut"],
        "",
        "kernel=$(ls /lib/modules)\n\
         cd /var/tmp\n\
         lsinitrd --unpack /boot/initrd.img-$kernel\n\
         test \"$(ls usr/lib/modules)\" = \"$kernel\"\n\
         test -e usr/lib/initrd-release\n\
         # It names no device of the builder.\n\
         ! grep -rE '/dev/(loop|nvme|xvd|vd|sd)' etc\n\
         ! grep -r root= etc",
    );
    let base = lab.base();
    let (disk, baked) = lab.image();
    let kernel = kernel(&disk);
    let images = disk.list("/boot").into_iter().filter(|file| file.starts_with("initr")).collect::<Vec<_>>();
    assert_eq!(images, [format!("initrd.img-{kernel}")], "{}", baked.err);
    assert!(disk.size(&format!("/boot/{}", images[0])) > 5 << 20);
    assert_eq!(disk.kind("/usr/sbin/update-initramfs"), None);
    // The boot loader names the root by its UUID.
    assert_eq!(disk.link("/initrd.img"), Some(format!("boot/{}", images[0])));
    let grub = disk.read("/boot/grub/grub.cfg").unwrap();
    let root = format!(" root=UUID={} ", base.uuid());
    let kernels: Vec<_> = grub.lines().filter(|line| line.trim_start().starts_with("linux")).collect();
    assert!(!kernels.is_empty() && kernels.iter().all(|line| line.contains(&root)), "{grub}");
    assert_eq!(disk.uuid(), base.uuid());
    assert_eq!(disk.read("/etc/fstab"), base.read("/etc/fstab"));
    assert_eq!(disk.audit(), "");
}

/// A policy that the bake installs labels all files of the base, too. The builder has no SELinux.
#[test]
fn selinux_labels_every_file_by_the_policy_that_the_bake_installed() {
    if !is_full("SELinux (90 s)") {
        return;
    }
    let lab = lab(
        &["selinux-basics", "selinux-policy-default"],
        "[[run]]\nscript = \"enforce.sh\"\n[[file]]\nsource = \"tool\"\ntarget = \"/usr/local/bin/tool\"\nmode = \"0755\"\n",
        "touch /etc/of-a-test",
    );
    let enforce = "sed -i 's/^SELINUX=.*/SELINUX=enforcing/' /etc/selinux/config\n\
                   grep -q ^SELINUX=enforcing /etc/selinux/config\n\
                   touch /srv/file \"/etc/a b\"\nuseradd -m somebody";
    lab.world.write("image/enforce.sh", &format!("#!/bin/sh\nset -eu\n{enforce}\n"));
    lab.world.write("image/tool", "#!/bin/sh\n");
    let (disk, baked) = lab.image();
    let kernel = format!("/boot/vmlinuz-{}", kernel(&disk));
    for (path, kind) in [
        ("/", "root_t"),
        ("/etc/passwd", "etc_t"),
        ("/etc/shadow", "shadow_t"),
        ("/etc/fstab", "etc_t"),
        ("\"/etc/a b\"", "etc_t"),
        ("/etc/selinux/config", "selinux_config_t"),
        ("/srv/file", "var_t"),
        ("/usr/local/bin/tool", "bin_t"),
        ("/usr/bin/dpkg", "dpkg_exec_t"),
        ("/usr/sbin/sshd", "sshd_exec_t"),
        ("/usr/lib/systemd/systemd", "init_exec_t"),
        ("/var/log", "var_log_t"),
        ("/home/somebody", "user_home_dir_t"),
        (&kernel, "boot_t"),
    ] {
        let (label, _) = disk.debugfs(&format!("ea_get {path} security.selinux"));
        assert!(label.contains(&format!(":{kind}:")), "{path}: {label}\n{}", baked.err);
    }
    assert_eq!(disk.kind("/.autorelabel"), None);
    assert_eq!(disk.audit(), "");
}

/// A package of another architecture, beside those of the image's own.
#[test]
fn a_package_of_another_architecture_is_installed() {
    if !is_full("multiarch (20 MB)") {
        return;
    }
    let foreign = if cfg!(target_arch = "aarch64") { "armhf" } else { "i386" };
    // A static program: the C library would have to have the very version that the image has.
    let lab = lab(
        &[&format!("busybox-static:{foreign}")],
        "",
        &format!("test \"$(dpkg --print-foreign-architectures)\" = {foreign}"),
    );
    let toml = std::fs::read_to_string(lab.world.path("image/image.toml")).unwrap();
    lab.world.write("image/image.toml", &toml.replace("{ name = \"base\" }", "\"../parent\""));
    // One archive is enough.
    let script =
        format!("sed -i '/security/d; /-updates/d' /etc/apt/sources.list\ndpkg --add-architecture {foreign}");
    lab.world.write("parent/set-up.sh", &format!("#!/bin/sh\nset -eu\n{script}\n"));
    lab.world.write("parent/image.toml", "from = { name = \"base\" }\n[[run]]\nscript = \"set-up.sh\"\n");
    let (disk, baked) = lab.image();
    let ami = baked.out.trim();
    let (shown, _) = lab.world.expect(0, &["images", "show", ami]);
    let listed = |name: &str| shown.lines().filter(|line| line.trim_start().starts_with(name)).count();
    assert_eq!(listed("busybox"), 1, "{shown}");
    assert_eq!(
        disk.read("/var/lib/dpkg/arch").as_deref(),
        Some(&*format!("{}\n{foreign}\n", architecture()))
    );
    let status = disk.read("/var/lib/dpkg/status").unwrap();
    let package = status.split("\n\n").find(|package| package.starts_with("Package: busybox-static\n"));
    let package = package.expect(&baked.err);
    assert!(package.contains("Status: install ok installed"), "{package}");
    assert!(package.contains(&format!("Architecture: {foreign}\n")), "{package}");
    // ELF of 32 bits.
    assert!(disk.bytes("/bin/busybox").starts_with(b"\x7fELF\x01"));
    assert_eq!(disk.audit(), "");
}
