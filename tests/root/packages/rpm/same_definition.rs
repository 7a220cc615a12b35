//! One definition on a deb and an rpm base: `oven bake` from the base image to the registered one, on real disks. Of
//! both bases dpkg or dnf is real; `lab.rs` says what is not real of the second. The packages are small ones of the
//! same names and versions, from a signed repository each.

use super::super::archive::{Archive, Key};
use oven_testing::packages::mirror::Mirror;
use oven_testing::packages::rpm_lab::{Dnf, base};
use oven_testing::packages::rpm_packages::{built, file, run};
use oven_testing::{ImageReader, LocalWorld};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The rpm base as a disk: a partition table, and the tree as a file system. Made once.
fn rpm_disk() -> PathBuf {
    let tree = base();
    let disk = tree.with_extension("raw");
    if disk.exists() {
        return disk;
    }
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (copy, part) = (scratch.path().join("tree"), scratch.path().join("disk.raw"));
    run(Command::new("cp").args(["-a", "--reflink=auto"]).arg(&tree).arg(&copy));
    fs::write(copy.join("usr/lib/os-release"), Dnf.os_release()).unwrap();
    let size: u64 = 1 << 30;
    fs::File::create(&part).unwrap().set_len(size).unwrap();
    run(Command::new("sh").args(["-c", "echo 'start=1MiB, type=linux' | sfdisk --quiet \"$0\""]).arg(&part));
    let kib = format!("{}k", (size >> 10) - 2048);
    run(Command::new("mkfs.ext4").args(["-q", "-E", "offset=1048576", "-d"]).arg(&copy).arg(&part).arg(&kib));
    fs::rename(&part, &disk).unwrap();
    disk
}

/// `lib` in two versions in a repository, and `conf` as a file: answers with that.
fn debs(archive: &Archive, key: &Key, scratch: &Path) -> PathBuf {
    let build = |name: &str, version: &str| {
        let tree = scratch.join(format!("{name}-{version}"));
        let control = format!(
            "Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: Test <test@example.org>\n\
             Description: a test\n"
        );
        for (path, text) in [("DEBIAN/control", control.as_str()), ("etc/conf.conf", "of 1.1\n")] {
            if path.starts_with("etc") && name != "conf" {
                continue;
            }
            fs::create_dir_all(tree.join(path).parent().unwrap()).unwrap();
            fs::write(tree.join(path), text).unwrap();
        }
        let deb = scratch.join(format!("{name}_{version}_all.deb"));
        run(Command::new("dpkg-deb").args(["--root-owner-group", "-Znone", "-b"]).arg(&tree).arg(&deb));
        deb
    };
    let pool =
        ["1.0-1", "1.1-1"].map(|version| archive.add(&build("lib", version), &format!("lib-{version}.deb")));
    archive.publish_flat("signed", &pool, Some(key));
    build("conf", "1.1-1")
}

/// The same for both but for its name, its base, and where packages are.
fn definition(base: &str, version: &str, file: &Path, repository: &str) -> String {
    let file = file.file_name().unwrap().to_str().unwrap();
    format!(
        r#"name = "on-{base}"
from = {{ name = "{base}" }}
packages = [
  "lib={version}",
  "./{file}",
]

[[repository]]
name = "more"
url = "{repository}"
key = "key.asc"
keep = false

[[file]]
source = "motd"
target = "/etc/motd"

[[run]]
command = ["sh", "-c", "echo run > /etc/made"]

[[test]]
script = "test.sh"
"#
    )
}

/// Names, versions and architectures, as `oven images show` lists them.
fn manifest(world: &LocalWorld, ami: &str) -> Vec<[String; 3]> {
    let (shown, _) = world.expect(0, &["--json", "images", "show", ami]);
    let object: serde_json::Value = serde_json::from_str(shown.trim()).unwrap();
    let lines = object["documents"]["packages"].as_str().unwrap().lines();
    let columns = lines.map(|line| line.split('\t').map(str::to_owned).collect::<Vec<_>>());
    columns.map(|columns| columns.try_into().expect("three columns")).collect()
}

#[test]
fn one_definition_on_a_deb_and_an_rpm_base() {
    let world = LocalWorld::empty();
    let tiny = std::env::var_os("OVEN_TEST_TINY").expect("OVEN_TEST_TINY is not set: run scripts/test root");
    let (archive, key, mirror) = (Archive::new(), Key::new(), Mirror::of(built()));
    let scratch = tempfile::tempdir().unwrap();
    let deb = debs(&archive, &key, scratch.path());
    let rpm = file("conf", "1.1", "noarch");
    let right = fs::read_to_string(built().join("right.asc")).unwrap();
    let bases = [
        ("deb", PathBuf::from(tiny), &deb, archive.url("signed/"), &key.public, "all"),
        ("rpm", rpm_disk(), &rpm, format!("{}signed/", mirror.address), &right, "noarch"),
    ];
    for (base, raw, file, repository, key, any) in bases {
        world.expect(0, &["import", raw.to_str().unwrap(), "--name", base]);
        world.write(&format!("{base}/image.toml"), &definition(base, "1.0*", file, &repository));
        world.write(&format!("{base}/key.asc"), key);
        world.write(&format!("{base}/motd"), "hello\n");
        let test = "#!/bin/sh -e\ntest $(cat /etc/made) = run\ngrep -q 'of 1.1' /etc/conf.conf\n";
        world.write(&format!("{base}/test.sh"), test);
        fs::copy(file, world.path(base).join(file.file_name().unwrap())).unwrap();

        let (ami, err) = world.expect(0, &["bake", base]);
        let ami = ami.trim();
        assert!(err.contains("packages: 2 installed"), "{base}: {err}");
        world.assert_no_traces(base);
        assert_eq!(world.expect(0, &["bake", base]).0.trim(), ami, "{base}: a hit");
        // What was asked for is there, at the version asked for, in the same words.
        let manifest = manifest(&world, ami);
        for (name, version) in [("lib", "1.0-1"), ("conf", "1.1-1")] {
            let line = manifest.iter().find(|line| line[0] == name);
            assert_eq!(line, Some(&[name, version, any].map(str::to_owned)), "{base}");
        }
        assert!(
            manifest.is_sorted() && manifest.iter().flatten().all(|word| !word.is_empty()),
            "{manifest:?}"
        );
        let disk = ImageReader::of(&world, ami);
        for (path, content) in
            [("/etc/motd", "hello\n"), ("/etc/made", "run\n"), ("/etc/conf.conf", "of 1.1\n")]
        {
            assert_eq!(disk.read(path).as_deref(), Some(content), "{base}: {path}");
        }
        let (clean, report) = disk.fsck();
        assert!(clean, "{base}: {report}");
        // And a package that no repository has is refused in the same words, at the same place.
        world.write(&format!("{base}/image.toml"), &definition(base, "9.*", file, &repository));
        let (_, err) = world.expect(3, &["bake", base]);
        let words = "no repository of the image has version `9.*` of `lib`";
        assert!(err.contains("image.toml:4: `packages`") && err.contains(words), "{base}: {err}");
        world.assert_no_traces(base);
    }
}
