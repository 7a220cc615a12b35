//! Packages that fill the disk.

use super::lab::{Deb, HostileLab};

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
    for (table, name, words) in [
        ("run", "run", "/run, which is in memory"),
        ("run", "shm", "/dev/shm, which is in memory"),
        ("test", "opt", "the memory for writes that are discarded"),
    ] {
        lab.define(&[], &format!("[[{table}]]\nscript = \"{name}.sh\""));
        lab.fails(5, &[words, "files, is full", "No space left on device", "more memory"]);
    }
}
