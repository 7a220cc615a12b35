//! The scripts that a plan hands over, run here: apt's verification of signatures, and who is held.

use oven_debian::Debian;
use oven_distro::{Distro, Job, OsRelease, Package};
use oven_testing::programs::write_program;
use std::fs;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

fn plan() -> oven_distro::Plan {
    let os_release = OsRelease::parse("ID=debian\nVERSION_ID=\"12\"\n");
    let present = Debian.claims(&os_release).look_for.into_iter().map(|path| (path, true)).collect();
    let packages = vec![Package::Named { name: "jq".into(), version: None, suite: None }];
    Debian
        .plan(&Job { os_release, present, packages, architecture: "x86_64".into(), ..Job::default() })
        .unwrap()
}

fn script_of_the_plan() -> String {
    let plan = plan();
    let shim = plan.shims.iter().find(|shim| shim.path == "/run/oven/apt-key").unwrap();
    let update = plan.shims.iter().find(|shim| shim.path == "/run/oven/apt-update.conf").unwrap();
    assert!(update.content.contains(&shim.path), "apt calls it");
    shim.content.clone()
}

const SIGNED: [&str; 7] = ["--quiet", "--readonly", "verify", "--status-fd", "3", "signature", "signed"];

/// What apt hears on descriptor 3, and whether it is good. `gpgv` prints which keys it was given.
fn heard(dir: &Path, gpgv: &str, arguments: &[&str]) -> (String, bool) {
    let program = |name: &str, text: &str| {
        let path = dir.join(name);
        write_program(&path, text);
        path.to_str().unwrap().to_owned()
    };
    let own = program("own", "#!/bin/sh\necho \"own: $*\" >&3\n");
    let config = format!(
        "#!/bin/sh\n[ -e {0}/unset ] && exit\necho \"file='{0}/trusted.gpg'\"\necho \"parts='{0}/parts/'\"\n",
        dir.display()
    );
    program("apt-config", &config);
    program(
        "gpgv",
        &format!("#!/bin/sh\nprintf 'keys: ' >&3\ncat \"$4\" >&3\necho \" of $8 $9\" >&3\n{gpgv}\n"),
    );
    let script = program("apt-key", &script_of_the_plan().replace("/usr/bin/apt-key", &own));
    let path = format!("{}:/usr/bin:/bin", dir.display());
    let output = Command::new("sh")
        .args(["-c", "\"$0\" \"$@\" 3>&1 > /dev/null", &script])
        .args(arguments)
        .env("PATH", path)
        .env("TMPDIR", dir.join("tmp"))
        .output()
        .unwrap();
    assert_eq!(fs::read_dir(dir.join("tmp")).unwrap().count(), 0, "what it needed is gone");
    (String::from_utf8_lossy(&output.stdout).into_owned(), output.status.success())
}

/// A directory of one test, as the scripts find it.
fn ground() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("parts")).unwrap();
    fs::create_dir(dir.path().join("tmp")).unwrap();
    dir
}

fn armoured(base64: &str) -> String {
    format!(
        "-----BEGIN PGP PUBLIC KEY BLOCK-----\nVersion: 1\n\n{base64}\n=abcd\n-----END PGP PUBLIC KEY BLOCK-----\n"
    )
}

#[test]
fn gpgv_gets_the_keys_of_all_keyrings() {
    let ground = ground();
    let dir = ground.path();
    let put = |name: &str, content: &[u8]| fs::write(dir.join(name), content).unwrap();
    put("trusted.gpg", b"\xc6one,");
    put("parts/b.gpg", b"\x99two,");
    put("parts/empty.gpg", b"");
    put("parts/a.asc", armoured("dGhyZWUs").as_bytes()); //              three,
    put("parts/c d.asc", (armoured("Zm91cg==") + &armoured("LGZpdmU=")).as_bytes()); // four ,five
    put("parts/other.txt", b"other");
    let (text, good) = heard(dir, "", &SIGNED);
    let replacement = char::REPLACEMENT_CHARACTER;
    assert_eq!(
        text,
        format!("keys: {replacement}one,{replacement}two,three,four,five of signature signed\n")
    );
    assert!(good);
    let only = dir.join("parts/a.asc");
    let one = [&SIGNED[..2], &["--keyring", only.to_str().unwrap()], &SIGNED[2..]].concat();
    assert_eq!(heard(dir, "", &one), ("keys: three, of signature signed\n".to_owned(), true));
}

#[test]
fn what_is_not_good_or_unusual_is_for_the_image_s_own() {
    let own = |dir: &Path, gpgv: &str, arguments: &[&str]| {
        let (text, _) = heard(dir, gpgv, arguments);
        assert_eq!(text, format!("own: {}\n", arguments.join(" ")));
    };
    let ground = ground();
    let dir = ground.path();
    own(dir, "exit 1", &SIGNED);
    for arguments in [
        &["list"][..],
        &SIGNED[1..],
        &[],
        &["--quiet", "--readonly", "verify", "--status-fd", "17", "a", "b"],
    ] {
        own(dir, "", arguments);
    }
    let absent =
        ["--quiet", "--readonly", "--keyring", "/absent.gpg", "verify", "--status-fd", "3", "a", "b"];
    own(dir, "", &absent);
    let keyid = ["--quiet", "--readonly", "--keyid", "0123", "verify", "--status-fd", "3", "a", "b"];
    own(dir, "", &keyid);
    // Without a directory for keyrings: none is taken from elsewhere.
    fs::write(dir.join("unset"), "").unwrap();
    own(dir, "", &SIGNED);
    fs::remove_file(dir.join("unset")).unwrap();
    assert!(heard(dir, "", &SIGNED).0.starts_with("keys: "));
    // A format that gpgv would take for a broken keyring.
    fs::write(dir.join("parts/box.gpg"), b"\0\0\0 \x01\x01KBXf").unwrap();
    own(dir, "", &SIGNED);
}

#[test]
fn held_packages_are_listed_as_by_apt_mark() {
    let of = |name: &str, status: &str, architecture: &str| {
        format!(
            "Package: {name}\nStatus: {status}\nPriority: optional\n{architecture}Description: x\n Status: hold is no field\n\n"
        )
    };
    let status = [
        of("dpkg", "install ok installed", "Architecture: amd64\n"),
        of("libc6", "hold ok installed", "Architecture: i386\n"),
        of("libc6", "install ok installed", "Architecture: amd64\n"),
        of("jq", "hold ok installed", "Architecture: amd64\n"),
        of("site", "hold ok config-files", "Architecture: all\n"),
        of("absent", "hold ok not-installed", ""),
    ];
    let ground = ground();
    let file = ground.path().join("status");
    fs::write(&file, status.concat()).unwrap();
    let argv = plan().facts["held"].clone();
    assert_eq!(argv.last().unwrap(), "/var/lib/dpkg/status");
    let output = Command::new(&argv[0]).args(&argv[1..argv.len() - 1]).arg(file).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "libc6:i386\njq\nsite\nabsent\n");
}
