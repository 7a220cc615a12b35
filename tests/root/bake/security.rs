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
    fs::write(region.join("region.json"), "{\"format\":1}").unwrap();
    symlink(&precious, region.join(".copy-region.json")).unwrap();
    chown(&region, STRANGER, STRANGER).unwrap();
    let (_, err) = world.expect(8, &["images", "list"]);
    assert!(err.contains("belongs to user 65534"), "{err}");
    intact();
    assert_eq!(fs::read_dir(&region).unwrap().count(), 2, "nothing was made there");

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

/// Bakes with this umask. Definitions get scripts as `s.sh`.
fn bake_with(world: &LocalWorld, umask: &str) -> Output {
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &format!("umask {umask}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_oven-test-bake")]);
    command.arg(world.region()).arg("image").current_dir(world.dir.path()).output().unwrap()
}

fn assert_private(path: &Path) {
    let found = path.symlink_metadata().unwrap();
    assert_eq!(found.mode() & 0o077, 0, "{} is open to others: {:o}", path.display(), found.mode());
    if found.is_dir() {
        fs::read_dir(path).unwrap().for_each(|entry| assert_private(&entry.unwrap().path()));
    }
}

#[test]
fn all_state_is_private_whatever_the_umask_is() {
    for umask in ["0000", "0022"] {
        let world = LocalWorld::tiny();
        let baked = bake_with(&world, umask);
        assert!(baked.status.success(), "{umask}: {}", stderr(&baked));
        for part in ["logs", "locks", "images", "snapshots"] {
            assert!(world.region().join(part).is_dir(), "{part}");
        }
        assert_private(&world.region());
        // A directory that an older oven made, and a link that somebody planted.
        fs::set_permissions(world.region().join("locks"), fs::Permissions::from_mode(0o755)).unwrap();
        world.write("image/new", "x");
        assert!(bake_with(&world, umask).status.success());
        assert_private(&world.region());
        let (locks, precious) = (world.region().join("locks"), world.path("precious"));
        fs::remove_dir(&locks).unwrap();
        fs::create_dir(&precious).unwrap();
        symlink(&precious, &locks).unwrap();
        world.write("image/new", "y");
        let refused = bake_with(&world, umask);
        assert_eq!(refused.status.code(), Some(8), "{}", stderr(&refused));
        assert!(stderr(&refused).contains("locks is a link or a file"), "{}", stderr(&refused));
        assert_eq!(fs::read_dir(&precious).unwrap().count(), 0);
        world.assert_no_traces("after a refused bake");
    }
}

#[test]
fn credentials_that_a_bake_adds_fail_it_unless_keep_names_them() {
    const SCRIPT: &str = "#!/bin/sh -e\nmkdir -p /root/.aws /root/.ssh /etc/app\n\
        echo '[default]' > /root/.aws/credentials\n\
        echo 'ssh-ed25519 AAAA me' > /root/.ssh/authorized_keys\n\
        echo fake > /root/.ssh/id_ed25519\necho fake > /root/.ssh/id_ed25519.pub\n\
        printf -- '-----BEGIN OPENSSH PRIVATE KEY-----\\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmU=\\n' > /etc/app/key\n";
    let world = LocalWorld::tiny();
    let toml = "name = \"image\"\nfrom = { name = \"tiny\" }\n[[run]]\nscript = \"s.sh\"\n";
    world.write("image/image.toml", toml);
    world.write("image/s.sh", SCRIPT);
    let refused = bake(&world);
    let err = stderr(&refused);
    assert_eq!(refused.status.code(), Some(5), "{err}");
    for line in [
        "/etc/app/key: it contains a private key",
        "/root/.aws/credentials: credentials for AWS",
        "/root/.ssh/authorized_keys: a key that could log in to every instance",
        "/root/.ssh/id_ed25519: a private SSH key",
        "[clean] keep = [",
    ] {
        assert!(err.contains(line), "no {line:?} in {err}");
    }
    assert!(!err.contains("id_ed25519.pub"), "{err}");
    let keep = "[clean]\nkeep = [\"/root/.aws\", \"/root/.ssh\", \"/etc/app/key\"]\n";
    world.write("image/image.toml", &format!("{toml}{keep}"));
    let kept = bake(&world);
    assert!(kept.status.success(), "{}", stderr(&kept));
    // The next image inherits them. It does not add them, even if it changes their owners.
    world.write("child/image.toml", "name = \"child\"\nfrom = \"../image\"\n[[run]]\nscript = \"s.sh\"\n");
    world.write("child/s.sh", "#!/bin/sh -e\nchown -R 7 /root/.ssh /etc/app\n");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_oven-test-bake"));
    let child = command.arg(world.region()).arg("child").current_dir(world.dir.path()).output().unwrap();
    assert!(child.status.success(), "{}", stderr(&child));
    world.assert_no_traces("after the bakes");
}

#[test]
fn output_and_names_cannot_forge_lines_or_control_the_terminal() {
    let world = LocalWorld::tiny();
    world.write(
        "image/image.toml",
        "name = \"image\"\nfrom = { name = \"tiny\" }\n[[run]]\nscript = \"s.sh\"\n\
         [[run]]\ncommand = [\"/bin/a\\nerror: forged\"]\n",
    );
    world.write(
        "image/s.sh",
        "#!/bin/sh -e\nprintf '\\033[31mred\\033[0m\\n\\033]0;title\\007text\\n10%%\\r50%%\\r100%%\\r\\n'\n\
         printf 'a\\342\\200\\256b\\n\\033]0;endless\\nnext\\n'\nmkdir -p /root/.ssh\n\
         echo x > \"/root/.ssh/id_$(printf 'x\\nerror: forged\\n    0.000 error   forged\\033[2J\\342\\200\\256')y\"\n\
         program=\"$(printf '/bin/a\\nerror: forged')\"\nprintf '#!/bin/sh\\n' > \"$program\"\nchmod +x \"$program\"\n",
    );
    let refused = bake(&world);
    let err = stderr(&refused);
    assert_eq!(refused.status.code(), Some(5), "{err}");
    let name =
        r"/root/.ssh/id_x\nerror: forged\n    0.000 error   forged\u{1b}[2J\u{202e}y: a private SSH key";
    assert!(err.contains(name), "{err}");
    let logs: Vec<_> = fs::read_dir(world.region().join("logs")).unwrap().flatten().collect();
    assert_eq!(logs.len(), 1);
    let log = fs::read_to_string(logs[0].path()).unwrap();
    assert!(log.contains(name), "{log}");
    for line in ["red", "text", "100%", "ab", "", "next"] {
        assert!(
            log.lines().any(|l| l.get(10..) == Some(format!("out     {line}").as_str())),
            "no {line:?} in {log}"
        );
    }
    for text in [&err, &log] {
        assert!(text.contains(r"running /bin/a\nerror: forged"), "{text}");
        assert!(!text.lines().any(|line| line.starts_with("error: forged")), "{text}");
        assert!(!text.contains(['\u{1b}', '\u{7}', '\r', '\u{202e}']) && !text.contains("title"), "{text:?}");
    }
}
