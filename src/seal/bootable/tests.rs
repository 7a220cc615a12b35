use super::*;
use crate::device::DeviceNode;
use crate::error::hint_of;
use crate::formats::initramfs::tests::{cpio, gzip};
use crate::image::test::Tree;
use std::path::Path;

const GRUB: &str = "/boot/grub/grub.cfg";
const GOOD: &str = "menuentry 'x' {\n\tlinux /boot/vmlinuz-2 root=UUID=root-id ro\n}\n";
const MODULES: [&str; 2] = ["lib/modules/2/kernel/nvme.ko", "lib/modules/2/kernel/ena.ko"];

/// Creates a base with one kernel. The check would reject the boot texts and the initramfs of this base if a bake had
/// created them.
fn base() -> Tree {
    let tree = Tree::new();
    tree.file("boot/vmlinuz-1", "kernel");
    tree.file("boot/initrd.img-1", "compressed by something strange, without nvme");
    tree.file("boot/grub/grub.cfg", "linux /boot/vmlinuz-1 root=/dev/sda1\n");
    tree.file("etc/fstab", "/dev/sda1 / ext4 defaults 0 1\n");
    tree.file("etc/default/grub", "GRUB_CMDLINE_LINUX=\"root=/dev/sda1\"\n");
    tree
}

fn archive(files: &[&str]) -> Vec<u8> {
    let files: Vec<_> = files.iter().map(|name| (*name, &b"module"[..])).collect();
    gzip(&cpio(&files))
}

/// Adds a kernel with its initramfs. `modules` is the content of the kernel's `modules.dep` on the root file system.
fn install(inside: &ImageTree, version: &str, initramfs: Option<&[u8]>, modules: &str) {
    inside.write(&format!("/boot/vmlinuz-{version}"), b"a kernel", 0o644, 0, 0).unwrap();
    inside.write(&format!("/lib/modules/{version}/modules.dep"), modules.as_bytes(), 0o644, 0, 0).unwrap();
    if let Some(content) = initramfs {
        inside.write(&format!("/boot/initrd.img-{version}"), content, 0o600, 0, 0).unwrap();
    }
}

fn open_for_writing(inside: &ImageTree, path: &str) -> std::fs::File {
    inside.open(path, rustix::fs::OFlags::WRONLY).unwrap().into()
}

/// Returns the findings after `change` (empty if there are none), and the warnings.
async fn changed(tree: &Tree, change: impl FnOnce(&ImageTree)) -> (String, String) {
    let inside = tree.tree();
    let links = vec!["disk/by-uuid/root-id".to_owned()];
    let nodes = [DeviceNode { name: "loop0p1".into(), rdev: 0, links }];
    let place = MountedImage { root: Path::new("/"), inside: &inside, nodes: &nodes, unmounted: &[] };
    let before = BootBaseline::of(&inside).unwrap();
    change(&inside);
    let report = Report::silent();
    let dir = tempfile::tempdir().unwrap();
    report.log_to(&dir.path().join("log"), "a test");
    let found = match check_bootable(&place, &before, &report).await {
        Ok(()) => String::new(),
        Err(error) => {
            assert_eq!(Kind::of(&error), Kind::Step);
            assert!(hint_of(&error).unwrap().contains("The image's own disk has UUID=root-id."));
            error.to_string()
        }
    };
    (found, std::fs::read_to_string(dir.path().join("log")).unwrap_or_default())
}

fn write<'a>(path: &'a str, content: &'a str) -> impl FnOnce(&ImageTree) + 'a {
    move |inside| inside.write(path, content.as_bytes(), 0o644, 0, 0).unwrap()
}

#[tokio::test]
async fn texts_of_the_base_are_not_checked() {
    assert_eq!(changed(&base(), |_| ()).await.0, "");
    // A file is not checked if it was rewritten with the same content, or if it is not read at boot.
    assert_eq!(changed(&base(), write("/etc/fstab", "/dev/sda1 / ext4 defaults 0 1\n")).await.0, "");
    assert_eq!(changed(&base(), write("/etc/notes", "root=/dev/loop0p1\n")).await.0, "");
    assert_eq!(changed(&base(), write(GRUB, GOOD)).await.0, "");
}

#[tokio::test]
async fn changed_texts_are_checked_as_a_whole() {
    let planted = GOOD.replace("UUID=root-id", "/dev/loop0p1");
    let (found, _) = changed(&base(), write(GRUB, &planted)).await;
    assert!(
        found.contains("/boot/grub/grub.cfg:2: `root=/dev/loop0p1` is the builder's name for"),
        "{found}"
    );
    let (found, _) =
        changed(&base(), write("/etc/fstab", "/dev/sda1 / ext4\n\nUUID=other /data ext4\n")).await;
    assert!(
        found.contains("/etc/fstab:1: `/dev/sda1`") && found.contains("/etc/fstab:3: `UUID=other`"),
        "{found}"
    );
    for path in [
        "/boot/loader/entries/fedora-2.conf",
        "/etc/kernel/cmdline",
        "/etc/default/grub.d/50-x.cfg",
        "/boot/extlinux/extlinux.conf",
        "/boot/grub2/grubenv",
        "/boot/efi/EFI/debian/grub.cfg",
    ] {
        let (found, _) = changed(&base(), write(path, "\nx root=UUID=other\n")).await;
        assert!(found.contains(&format!("{path}:2: `root=UUID=other`")), "{found}");
    }
}

#[tokio::test]
async fn a_kernel_needs_its_drivers() {
    let kernel = |files: &'static [&'static str], modules: &'static str| {
        move |inside: &ImageTree| install(inside, "2", Some(&archive(files)), modules)
    };
    assert_eq!(changed(&base(), kernel(&MODULES, "")).await.0, "");
    // The network starts later, so a module of the root file system is enough.
    assert_eq!(changed(&base(), kernel(&MODULES[..1], "kernel/drivers/net/ena.ko.xz:\n")).await.0, "");
    let (found, _) = changed(&base(), kernel(&MODULES[..1], "")).await;
    assert!(
        found.contains("/boot/vmlinuz-2: the kernel 2 has no ena driver") && !found.contains("nvme"),
        "{found}"
    );
    let (found, _) =
        changed(&base(), kernel(&["lib/modules/2/xen-blkfront.ko"], "kernel/nvme.ko:\nkernel/ena.ko:\n"))
            .await;
    assert!(found.contains("/boot/initrd.img-2: it has no nvme driver"), "{found}");
    assert!(!found.contains("ena driver"), "{found}");
    // Both drivers are built into the kernel.
    let tree = base();
    tree.file("lib/modules/2/modules.builtin", "kernel/drivers/nvme/host/nvme.ko\n");
    tree.file("boot/config-2", "CONFIG_ENA_ETHERNET=y\n");
    assert_eq!(changed(&tree, kernel(&["init"], "")).await.0, "");
}

#[tokio::test]
async fn a_kernel_needs_an_initramfs_where_the_bases_had_one() {
    let bare = |inside: &ImageTree| install(inside, "2", None, "kernel/ena.ko:\n");
    let (found, _) = changed(&base(), bare).await;
    assert!(found.contains("/boot/vmlinuz-2: this kernel has no initramfs"), "{found}");
    let gone = |inside: &ImageTree| assert!(inside.remove("/boot/initrd.img-1").unwrap());
    assert!(changed(&base(), gone).await.0.contains("/boot/vmlinuz-1: this kernel has no initramfs"));
    // If the base has no initramfs, the kernel must mount the root by itself.
    let (found, _) = changed(&Tree::new(), bare).await;
    assert!(found.contains("/boot/vmlinuz-2: it has no nvme driver built in, and no initramfs"), "{found}");
    let tree = Tree::new();
    tree.file("boot/config-2", "CONFIG_BLK_DEV_NVME=y\n");
    assert_eq!(changed(&tree, bare).await.0, "");
    // A kernel may be removed together with its initramfs.
    let both = |inside: &ImageTree| {
        assert!(inside.remove("/boot/initrd.img-1").unwrap() && inside.remove("/boot/vmlinuz-1").unwrap());
    };
    assert_eq!(changed(&base(), both).await.0, "");
}

#[tokio::test]
async fn an_unreadable_initramfs_is_a_warning_and_a_damaged_one_an_error() {
    let kernel = |content: &'static [u8]| {
        move |inside: &ImageTree| install(inside, "2", Some(content), "kernel/ena.ko:\n")
    };
    let (found, log) = changed(&base(), kernel(b"BZh91AY&SY")).await;
    assert_eq!(found, "");
    assert!(log.contains("/boot/initrd.img-2: it is compressed by bzip2"), "{log}");
    let (found, _) = changed(&base(), kernel(b"")).await;
    assert!(found.contains("/boot/initrd.img-2: it contains no archive"), "{found}");
    let whole: &'static [u8] = archive(&["init"; 50]).leak();
    let (found, _) = changed(&base(), kernel(&whole[..whole.len() / 2])).await;
    assert!(found.contains("/boot/initrd.img-2: "), "{found}");
}

/// An image whose boot files are not what they seem: nothing of them is kept in memory, and each has a limit.
#[tokio::test]
async fn sparse_and_numerous_boot_files_are_limited() {
    let of = |tree: &Tree| {
        BootBaseline::of(&tree.tree()).map(drop).map_err(|error| (Kind::of(&error), format!("{error:#}")))
    };
    let tree = base();
    tree.file("boot/loader/entries/1.conf", "");
    tree.open("boot/loader/entries/1.conf").set_len(16 << 20).unwrap();
    let (kind, error) = of(&tree).unwrap_err();
    assert_eq!(kind, Kind::Definition);
    assert!(error.contains("/boot/loader/entries/1.conf in the image is larger than 1 MiB"), "{error}");
    let tree = base();
    (0..=TEXTS_MAX).for_each(|number| tree.file(&format!("boot/loader/entries/{number}.conf"), "x"));
    assert!(of(&tree).unwrap_err().1.contains("more than 1000 files that a boot loader reads"));
    let tree = base();
    (0..201).for_each(|number| tree.file(&format!("boot/vmlinuz-x{number}"), "x"));
    assert!(of(&tree).unwrap_err().1.contains("more than 200 kernels"));
}

#[tokio::test]
async fn an_initramfs_that_unpacks_to_too_much_is_an_error() {
    let hole = |inside: &ImageTree| {
        install(inside, "2", Some(b""), "");
        open_for_writing(inside, "/boot/initrd.img-2").set_len(15 << 40).unwrap();
    };
    assert!(changed(&base(), hole).await.0.contains("/boot/initrd.img-2: it contains no archive"));
    let mut header = cpio(&[("zeros", b"")])[..118].to_vec();
    header[54..62].copy_from_slice(b"FFFFFFFC");
    let zeros = |inside: &ImageTree| {
        install(inside, "2", Some(&header), "");
        let file = open_for_writing(inside, "/boot/initrd.img-2");
        std::os::unix::fs::FileExt::write_all_at(&file, b"end", 15 << 40).unwrap();
    };
    assert!(changed(&base(), zeros).await.0.contains("/boot/initrd.img-2: it has more than 2 GiB"));
}

#[tokio::test]
async fn a_text_with_many_findings_is_read_quickly() {
    let repeated = |word: &str| word.repeat((1 << 20) / word.len());
    let numbered = |end: &str| (0..50_000).map(|n| format!("/dev/nvme{n}n1{end}")).collect::<String>();
    // Each finding is on a line of its own, after a title. Without limits, these texts take minutes.
    let cases = [
        ("one word", repeated("/dev/sda1 "), 2, ""),
        ("one word in quotes", repeated("\"/dev/loop1\" "), 2, ""),
        ("one long word", repeated("/dev/"), 0, ""),
        ("words in one line", numbered(" "), 22, "and 980 more"),
        ("one word in many lines", repeated("/dev/sda1\n"), 22, "and 980 more"),
        ("many lines", numbered("\n"), 22, "and 980 more"),
    ];
    for (what, text, lines, end) in cases {
        let begin = std::time::Instant::now();
        let (found, _) = changed(&base(), write("/boot/grub/grub.cfg", &text)).await;
        let took = begin.elapsed();
        assert_eq!(found.lines().count(), lines, "{what}: {found}");
        assert!(found.ends_with(end) && found.len() < 10_000, "{what}: {found}");
        assert!(took < std::time::Duration::from_secs(10), "{what}: {took:?}");
    }
}
