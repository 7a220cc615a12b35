//! What others who can write where oven reads or works must not reach: other users of the machine, the author of a
//! definition, and what is in an image. Needs root.

use oven_testing::{LocalWorld, stderr};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Output;

/// Of nobody.
const STRANGER: Option<u32> = Some(65534);

/// The real story with the tests' own distro.
fn bake(world: &LocalWorld) -> Output {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_oven-test-bake"));
    command.arg(world.region()).arg("image").current_dir(world.dir.path()).output().unwrap()
}

#[test]
fn a_strangers_region_is_not_used() {
    let world = LocalWorld::empty();
    world.write("precious", "precious");
    let (precious, region) = (world.path("precious"), world.region());
    let intact = || assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");

    // Root would write the region's format through this link.
    fs::create_dir(&region).unwrap();
    symlink(&precious, region.join(".copy-region.json")).unwrap();
    chown(&region, STRANGER, STRANGER).unwrap();
    let (_, err) = world.expect(8, &["images", "list"]);
    assert!(err.contains("belongs to user 65534"), "{err}");
    intact();
    assert_eq!(fs::read_dir(&region).unwrap().count(), 1, "nothing was made there");

    // Everybody's.
    chown(&region, Some(0), Some(0)).unwrap();
    fs::set_permissions(&region, fs::Permissions::from_mode(0o1777)).unwrap();
    let (_, err) = world.expect(8, &["images", "list"]);
    assert!(err.contains("is writable by everybody"), "{err}");
    intact();

    // What a stranger left in it while it was.
    fs::set_permissions(&region, fs::Permissions::from_mode(0o755)).unwrap();
    world.expect(0, &["images", "list"]);
    intact();
    fs::remove_file(region.join(".copy-region.json")).unwrap();
    fs::create_dir(world.path("elsewhere")).unwrap();
    fs::remove_dir(region.join("volumes")).unwrap();
    symlink(world.path("elsewhere"), region.join("volumes")).unwrap();
    let (_, err) = world.expect(8, &["images", "list"]);
    assert!(err.contains("volumes is a link or a file, not a directory"), "{err}");
    fs::remove_file(region.join("volumes")).unwrap();
    symlink(&precious, region.join("lock")).unwrap();
    let raw = world.path("raw");
    fs::write(&raw, [1; 4096]).unwrap();
    assert_ne!(world.oven(&["import", raw.to_str().unwrap(), "--name", "raw"]).status.code(), Some(0));
    intact();
    fs::remove_file(region.join("lock")).unwrap();
    world.expect(0, &["images", "list"]);
}

#[test]
fn nobody_else_reads_a_region() {
    let world = LocalWorld::tiny();
    let region = world.region();
    // Somebody made it as directories are made, and another oven the logs.
    fs::set_permissions(&region, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(region.join("logs"), fs::Permissions::from_mode(0o755)).unwrap();
    let baked = bake(&world);
    assert!(baked.status.success(), "{}", stderr(&baked));
    world.expect(0, &["images", "list"]);
    for entry in fs::read_dir(&region).unwrap().flatten() {
        let mode = entry.metadata().unwrap().mode() & 0o077;
        assert_eq!(mode, 0, "{} is open to others: {mode:o}", entry.path().display());
    }
}

#[test]
fn names_in_an_image_do_not_drive_the_terminal() {
    let world = LocalWorld::of("tiny", "ID=rocky\n", &[]);
    world.write(
        "image/setup.sh",
        "#!/bin/sh\nmkdir -p /var/cache/yum\necho x > \"/var/cache/yum/$(printf 'a\\033]0;owned\\007b')\"\n",
    );
    world.write(
        "image/image.toml",
        "name = \"image\"\nfrom = { name = \"tiny\" }\n[[run]]\nscript = \"setup.sh\"\n",
    );
    // The real program: the tests' own has no plugins, and so no caches.
    let baked = world.oven(&["bake", "image"]);
    assert!(!baked.status.success());
    let err = stderr(&baked);
    assert!(err.contains("/var/cache/yum/a"), "{err}");
    assert!(!err.contains('\u{1b}') && !err.contains('\u{7}'), "{err:?}");
    world.assert_no_traces("after a failed bake");
}

/// A definition is somebody's work, and oven is root.
#[test]
fn a_definition_does_not_show_what_it_does_not_hold() {
    let world = LocalWorld::tiny();
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("secret"), "secret").unwrap();
    symlink(host.path().join("secret"), world.path("image/leak")).unwrap();
    let up = "../".repeat(world.path("image").canonicalize().unwrap().components().count());
    let head = "name = \"image\"\nfrom = { name = \"tiny\" }\n";
    for toml in [
        "[[file]]\nsource = \"leak\"\ntarget = \"/leak\"\n".to_owned(),
        format!("inputs = [\"{up}{}\"]\n", host.path().strip_prefix("/").unwrap().display()),
    ] {
        world.write("image/image.toml", &format!("{head}{toml}"));
        let (_, err) = world.expect(3, &["bake", "image"]);
        assert!(err.contains("outside the project"), "{err}");
    }
}

/// What stands in the place of the id is replaced, neither followed nor waited for.
#[test]
fn the_id_is_written_where_a_trap_was() {
    let world = LocalWorld::tiny();
    world.write("precious", "precious");
    let baked = bake(&world);
    assert!(baked.status.success(), "{}", stderr(&baked));
    let id = world.path("image/.ami_id.json");
    fs::remove_file(&id).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &id, rustix::fs::Mode::RWXU).unwrap();
    // A hit needs no distro.
    world.expect(0, &["bake", "image"]);
    assert!(fs::read_to_string(&id).unwrap().starts_with("{\"ami_id\": \"ami-"));
    fs::remove_file(&id).unwrap();
    symlink(world.path("precious"), &id).unwrap();
    world.expect(0, &["bake", "image"]);
    assert!(id.symlink_metadata().unwrap().is_file());
    assert_eq!(fs::read_to_string(world.path("precious")).unwrap(), "precious");
}

/// Only certificates of `ca_file` are shown to an image, whatever else is in the file.
#[test]
fn a_ca_file_holds_certificates() {
    let world = LocalWorld::tiny();
    let secret = Path::new("/etc/passwd");
    world.write("oven.toml", &format!("[network]\nca_file = \"{}\"\n", secret.display()));
    let err = stderr(&bake(&world));
    assert!(err.contains("has no PEM certificate") && !err.contains("root:x:0"), "{err}");
    let pem = |what: &str| format!("-----BEGIN {what}-----\nMIIB\n-----END {what}-----\n");
    let mixed = ["# mine\n", &pem("PRIVATE KEY"), &pem("CERTIFICATE")].concat();
    world.write("ca.pem", &mixed);
    world.write("oven.toml", "[network]\nca_file = \"ca.pem\"\n");
    // The distro of the test prints what its fetch step sees.
    let baked = bake(&world);
    assert!(baked.status.success(), "{}", stderr(&baked));
    let logs = fs::read_dir(world.region().join("logs")).unwrap();
    let log: String = logs.map(|log| fs::read_to_string(log.unwrap().path()).unwrap()).collect();
    assert!(log.contains("-----BEGIN CERTIFICATE-----") && !log.contains("PRIVATE"), "{log}");
}
