//! Packages that fill the disk.

use super::lab::{Deb, HostileLab, boot_disk, full_boot_disk};

/// Takes all of the disk, but for what is freed again.
const FILL: &str = "n=0\nfor size in 256M 16M 1M 64K 4K; do\n\
    while fallocate -l $size /opt/fill.$((n+=1)) 2> /dev/null; do :; done\ndone\n";

#[test]
fn a_full_disk_is_reported_with_a_remedy() {
    let lab = HostileLab::new();
    lab.world.write("image/f", &"x".repeat(8 << 20));
    lab.world.write("image/fill.sh", &format!("#!/bin/sh\n{FILL}echo x > /opt/x\n"));
    lab.world.write("image/silent.sh", &format!("#!/bin/sh\n{FILL}exit 0\n"));
    let files = "perl -e 'for (1..9e6) { open(F, \">\", \"/opt/$_\") or die \"$!\\n\" }'";
    let place = "[[file]]\nsource = \"f\"\ntarget = \"/opt/f\"";
    let run = |script: &str| format!("[[run]]\nscript = \"{script}\"");
    let big = || Deb::new("big").field("Pre-Depends: hostile").file("/opt/big", &"x".repeat(8 << 20), 0o644);
    for (packages, more, what) in [
        (vec![Deb::sh(&format!("{FILL}echo x > /opt/x"))], String::new(), "a postinst that fails by it"),
        (vec![Deb::sh(&format!("{FILL}exit 0"))], String::new(), "a postinst that does not say so"),
        (
            vec![big(), Deb::sh(&format!("{FILL}rm $(ls -d /opt/* | tail -n 1)"))],
            String::new(),
            "a package that is too large",
        ),
        (vec![Deb::sh(files)], String::new(), "inodes"),
        (
            vec![Deb::sh(&format!("{FILL}truncate -s 0 /opt/fill.1; fallocate -l 250M /opt/fill.1"))],
            place.into(),
            "a file",
        ),
        (vec![], run("fill.sh"), "a script that fails by it"),
        (vec![], run("silent.sh"), "a script that does not say so"),
    ] {
        lab.define(&packages, &more);
        let baked = lab.fails(5, &["size_gib", "[disk]"]);
        let full = baked.err.contains("disk is full") || baked.err.contains("left on the image's disk");
        assert!(full, "{what}:\n{}", baked.err);
    }
}

/// What a step writes to memory has limits, and the failure names the place.
#[test]
fn a_full_file_system_in_memory_is_reported_by_name() {
    let lab = HostileLab::new();
    let fill = |at: &str| {
        format!("#!/bin/sh\nexec perl -e 'for (1..9e6) {{ open(F, \">\", \"{at}/$_\") or die \"$!\\n\" }}'\n")
    };
    for (name, at) in [("run", "/run"), ("shm", "/dev/shm"), ("opt", "/opt")] {
        lab.world.write(&format!("image/{name}.sh"), &fill(at));
    }
    for (table, name, words, remedy) in [
        ("run", "run", "/run, which is in memory", "more memory"),
        ("run", "shm", "/dev/shm, which is in memory", "more memory"),
        ("test", "opt", "which is as large as the image's free space on / and may have", "`size_gib`"),
    ] {
        lab.define(&[], &format!("[[{table}]]\nscript = \"{name}.sh\""));
        lab.fails(5, &[words, "files, is full", "No space left on device", remedy]);
    }
}

#[test]
fn a_test_sees_the_free_space_of_the_image() {
    let lab = HostileLab::new();
    lab.world.write("image/note.sh", "#!/bin/sh\ndf --output=avail -k / | tail -n 1 > /opt/free\n");
    let check = "#!/bin/sh\nset -e\nbefore=$(cat /opt/free); now=$(df --output=avail -k / | tail -n 1)\n\
        echo $before $now\ntest $((before - now)) -lt 1024\ntest $((now - before)) -lt 1024\n\
        ! fallocate -l $((now + 1024))K /opt/large\nfallocate -l $((now / 2))K /opt/half\n";
    lab.world.write("image/check.sh", check);
    lab.define(&[], "[[run]]\nscript = \"note.sh\"\n[[test]]\nscript = \"check.sh\"");
    lab.image();
    // A test that fails because the image is full says so.
    lab.world.write("image/check.sh", "#!/bin/sh\nexec dd if=/dev/zero of=/opt/x bs=1M\n");
    lab.fails(5, &["as large as the image's free space on /", "size_gib", "No space left on device"]);
    // A file that a test changes counts whole.
    let grow = "#!/bin/sh\nset -e\nnow=$(df --output=avail -k / | tail -n 1)\n\
        dd if=/dev/zero of=/opt/large bs=1M count=$((now * 2 / 3 / 1024))\n";
    lab.world.write("image/grow.sh", grow);
    lab.world.write("image/check.sh", "#!/bin/sh\necho x >> /opt/large\n");
    lab.define(&[], "[[run]]\nscript = \"grow.sh\"\n[[test]]\nscript = \"check.sh\"");
    lab.fails(5, &["as large as the image's free space on /", "size_gib", "counts whole"]);
    lab.define(&[], "[[test]]\nscript = \"check.sh\"");
    // So does a test that removes its files.
    lab.world
        .write("image/check.sh", "#!/bin/sh\ndd if=/dev/zero of=/opt/x bs=1M || { rm /opt/x; exit 1; }\n");
    lab.fails(5, &["as large as the image's free space on /", "and may have", "size_gib"]);
}

/// Only the root grows with `size_gib`, so another advice is needed for the other file systems.
#[test]
fn a_full_file_system_that_is_not_the_root_is_named() {
    let disk = boot_disk();
    let lab = HostileLab::on(&disk);
    let file = "dd if=/dev/zero of=/boot/vmlinuz-2 bs=1M";
    for (script, words) in [
        (format!("#!/bin/sh\nexec {file}\n"), "the file system /boot of the image is full"),
        // The program removes what did not fit, as dpkg does.
        (format!("#!/bin/sh\n{file} || {{ rm /boot/vmlinuz-2; exit 1; }}\n"), "/boot of the image is full"),
        (
            format!("#!/bin/sh\n{file} 2> /dev/null\nexit 0\n"),
            "no space is left on the image's file system /boot",
        ),
    ] {
        lab.world.write("image/fill.sh", &script);
        for size in ["", "[disk]\nsize_gib = 3\n"] {
            lab.define(&[], &format!("[[run]]\nscript = \"fill.sh\"\n{size}"));
            let baked = lab.fails(5, &[words, "`size_gib` enlarges only the root file system"]);
            assert!(!baked.err.contains("Use a larger disk"), "{}", baked.err);
        }
    }
    // A file of the definition that does not fit.
    lab.world.write("image/f", &"x".repeat(8 << 20));
    lab.define(&[], "[[file]]\nsource = \"f\"\ntarget = \"/boot/f\"");
    lab.fails(5, &["the file system /boot of the image is full", "writing"]);
}

/// A file system that was full before the bake does not hide the cause of a failure.
#[test]
fn a_file_system_that_was_full_before_is_not_blamed() {
    let disk = full_boot_disk();
    let lab = HostileLab::on(&disk);
    lab.world.write("image/fails.sh", "#!/bin/sh\necho why not\nexit 3\n");
    lab.world.write("image/image.toml", "from = { name = \"base\" }\npackages = [\"misspelt\"]\n");
    let baked = lab.fails(3, &["misspelt"]);
    assert!(!baked.err.contains("is full"), "{}", baked.err);
    lab.define(&[], "[[run]]\nscript = \"fails.sh\"");
    let baked = lab.fails(5, &["the [[run]] fails.sh failed", "why not"]);
    assert!(!baked.err.contains("is full"), "{}", baked.err);
    lab.world.write("image/fails.sh", "#!/bin/sh\ncp /etc/passwd /boot/y\n");
    lab.fails(5, &["the file system /boot of the image is full"]);
}
