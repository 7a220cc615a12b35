//! Repositories, holds, debconf's answers, security upgrades and packages by URL, in a small Debian with the real apt
//! and real transactions. The archive is a small one of the test's own. Needs root, mmdebstrap, dpkg-deb and gpg, and a
//! mirror of Debian the first time.

mod caches;
mod fonts;
mod plan_execution;

use super::archive::{Archive, Key, sha256};
use oven_distro::Plan;
use oven_testing::PackageLab;
use oven_testing::packages::LabBake;
use std::fs;
use std::process::{Command, Stdio};

const STEP: u8 = 5;
const DEFINITION: u8 = 3;
const MACHINE: u8 = 8;

/// An image whose own archives are none, so that a test asks for its own alone.
fn lab() -> PackageLab {
    let lab = PackageLab::new();
    fs::write(lab.image("etc/apt/sources.list"), "").unwrap();
    fs::create_dir(lab.path("web/keys")).unwrap();
    lab
}

/// A package file in the archive's pool.
fn package(lab: &PackageLab, archive: &Archive, name: &str, version: &str, files: &[(&str, &str)]) -> String {
    lab.package(name, version, "", files);
    let file = lab.path(&format!("web/{name}.deb"));
    let pooled = archive.add(&file, &format!("{name}_{version}_all.deb"));
    fs::remove_file(file).unwrap();
    pooled
}

/// A package that the image has.
fn install(lab: &PackageLab, name: &str, version: &str, more: &str, files: &[(&str, &str)]) {
    lab.package(name, version, "", files);
    lab.define(&format!("packages = [\"./{name}.deb\"]\n{more}"));
    lab.bake().facts();
    fs::remove_file(lab.path(&format!("web/{name}.deb"))).unwrap();
}

/// `[[repository]]`, with its key beside image.toml.
fn repository(lab: &PackageLab, archive: &Archive, name: &str, key: &Key, more: &str) -> String {
    fs::write(lab.path(&format!("web/keys/{name}.asc")), &key.public).unwrap();
    let url = archive.url("");
    format!("[[repository]]\nname = \"{name}\"\nurl = \"{url}\"\nkey = \"keys/{name}.asc\"\n{more}\n")
}

const MAIN: &str = "suite = \"stable\"\ncomponents = [\"main\"]\n";

/// One retry at most: each time costs seconds.
fn hasty(plan: &mut Plan) {
    plan.steps.iter_mut().for_each(|step| step.retries = step.retries.min(1));
}

fn never_again(plan: &mut Plan) {
    plan.steps.iter_mut().for_each(|step| step.retries = 0);
}

/// A bake of one package from a repository that `change` changed, without trying again.
fn one_package(change: impl FnOnce(&Archive, &Key, &[String]) -> Option<Key>, more: &str) -> LabBake {
    let (lab, archive, key) = (lab(), Archive::new(), Key::new());
    let pool = [package(&lab, &archive, "tool", "1.0", &[])];
    archive.publish("stable", "", &pool, Some(&key));
    let other = change(&archive, &key, &pool);
    let repository = repository(&lab, &archive, "tools", other.as_ref().unwrap_or(&key), more);
    lab.define(&format!("packages = [\"tool\"]\n{repository}"));
    let baked = lab.bake_with(never_again);
    assert_eq!(baked.result.is_err(), !lab.image("var/lib/dpkg/info/tool.list").exists());
    baked
}

#[test]
fn a_repository_stays_or_leaves_nothing() {
    let (lab, archive, flat, key, other) = (lab(), Archive::new(), Archive::new(), Key::new(), Key::new());
    let one = package(&lab, &archive, "one", "1.0", &[]);
    let two = package(&lab, &flat, "two", "1.0", &[]);
    archive.publish("stable", "", &[one], Some(&key));
    flat.publish_flat("flat", &[two], Some(&other));
    let kept = repository(&lab, &archive, "kept", &key, MAIN);
    let gone = repository(&lab, &flat, "gone", &other, "keep = false\n").replace("/\"\nkey", "/flat\"\nkey");
    lab.define(&format!("packages = [\"one\", \"two\"]\n{kept}{gone}"));
    let before = listing(&lab, "etc");
    let facts = lab.bake().facts();
    assert!(facts["packages"].contains("one\t1.0") && facts["packages"].contains("two\t1.0"));
    let sources = lab.read("etc/apt/sources.list.d/kept.sources");
    assert!(sources.contains("Signed-By: /etc/apt/keyrings/kept.asc"), "{sources}");
    assert_eq!(lab.read("etc/apt/keyrings/kept.asc"), key.public);
    let new: Vec<_> = listing(&lab, "etc").into_iter().filter(|path| !before.contains(path)).collect();
    let expected = ["apt/keyrings/kept.asc", "apt/sources.list.d/kept.sources"];
    assert!(expected.iter().all(|path| new.iter().any(|n| n.ends_with(path))), "{new:?}");
    assert!(!new.iter().any(|path| path.contains("gone")), "{new:?}");
}

/// Every path below a directory of the image.
fn listing(lab: &PackageLab, dir: &str) -> Vec<String> {
    let output = Command::new("find").arg(lab.image(dir)).output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn another_key_a_changed_index_and_no_signature_are_distinguished() {
    let (code, text) = one_package(|_, _, _| Some(Key::new()), MAIN).failure();
    assert_eq!(code, STEP);
    assert!(
        text.contains("signed by a key that is not configured") && text.contains("check its `key`"),
        "{text}"
    );

    let changed = |archive: &Archive, _: &Key, _: &[String]| {
        let path = archive.path("dists/stable/InRelease");
        let text = fs::read_to_string(&path).unwrap().replace("Codename: stable", "Codename: staple");
        fs::write(path, text).unwrap();
        None
    };
    let (code, text) = one_package(changed, MAIN).failure();
    assert_eq!(code, STEP);
    assert!(text.contains("has an invalid signature by"), "{text}");

    let unsigned = |archive: &Archive, _: &Key, pool: &[String]| {
        archive.publish("stable", "", pool, None);
        None
    };
    let (code, text) = one_package(unsigned, MAIN).failure();
    assert_eq!(code, STEP);
    assert!(text.contains("is not signed") && text.contains("`signed = false`"), "{text}");
}

#[test]
fn an_unsigned_repository_is_trusted_where_that_is_said() {
    let (lab, archive) = (lab(), Archive::new());
    let pool = [package(&lab, &archive, "tool", "1.0", &[])];
    archive.publish("stable", "", &pool, None);
    let url = archive.url("");
    lab.define(&format!(
        "packages = [\"tool\"]\n[[repository]]\nname = \"tools\"\nurl = \"{url}\"\nsigned = false\n{MAIN}"
    ));
    assert!(lab.bake().facts()["packages"].contains("tool\t1.0"));
}

#[test]
fn a_suite_and_a_component_that_are_not_there_are_named() {
    let (code, text) = one_package(|_, _, _| None, "suite = \"stabel\"\ncomponents = [\"main\"]\n").failure();
    assert_eq!(code, STEP);
    assert!(text.contains("there is no repository at") && text.contains("stabel"), "{text}");
    assert!(text.contains("`suite`"), "{text}");
    // apt warns of it, and ends with 0.
    let (code, text) = one_package(|_, _, _| None, "suite = \"stable\"\ncomponents = [\"mian\"]\n").failure();
    assert_eq!(code, STEP);
    assert!(text.contains("the repository `tools` has no component `mian`"), "{text}");
    assert!(text.contains("apt-get update exited with 0, but its output shows the failure"), "{text}");
}

#[test]
fn a_repository_that_is_not_there_at_first_is_asked_again() {
    let (lab, archive, key) = (lab(), Archive::new(), Key::new());
    let pool = [package(&lab, &archive, "tool", "1.0", &[])];
    archive.publish("stable", "", &pool, Some(&key));
    archive.fail("dists/stable/InRelease", "404 Not Found", 1);
    archive.fail(&pool[0], "404 Not Found", 1);
    lab.define(&format!("packages = [\"tool\"]\n{}", repository(&lab, &archive, "tools", &key, MAIN)));
    let baked = lab.bake_with(hasty);
    for step in ["refreshing the package index", "downloading 1 package"] {
        assert!(
            baked.log.contains(step) && baked.log.matches("retrying in 2 s").count() == 2,
            "{}",
            baked.log
        );
    }
    assert!(baked.facts()["packages"].contains("tool\t1.0"));
}

#[test]
fn a_held_package_stays_and_a_changed_configuration_file_does_not_stop_an_upgrade() {
    let (lab, archive, key) = (lab(), Archive::new(), Key::new());
    install(&lab, "thing", "1.0", "hold = [\"thing\"]\n", &[]);
    let conf = |content| [("etc/other.conf", content), ("DEBIAN/conffiles", "/etc/other.conf\n")];
    install(&lab, "other", "1.0", "", &conf("one\n"));
    install(&lab, "third", "1.0", "", &[]);
    fs::write(lab.image("etc/other.conf"), "mine\n").unwrap();
    let pool = [
        package(&lab, &archive, "thing", "2.0", &[]),
        package(&lab, &archive, "other", "2.0", &conf("two\n")),
        package(&lab, &archive, "third", "2.0", &[]),
    ];
    archive.publish("stable", "", &pool, Some(&key));
    let from = repository(&lab, &archive, "tools", &key, MAIN);

    // The base holds one, the definition another.
    lab.define(&format!("upgrade = true\nhold = [\"third\"]\n{from}"));
    let baked = lab.bake();
    assert!(
        baked.log.contains("the base image holds these packages, so they are not upgraded: thing"),
        "{}",
        baked.log
    );
    let facts = baked.facts();
    for line in ["thing\t1.0", "other\t2.0", "third\t1.0"] {
        assert!(facts["packages"].contains(line), "{}", facts["packages"]);
    }
    assert_eq!(facts["held"], "thing\nthird\n");
    assert_eq!(lab.read("etc/other.conf"), "mine\n");

    // What is asked for and held cannot both be.
    lab.define(&format!("packages = [\n  \"thing=2.0\",\n]\n{from}"));
    let (code, text) = lab.bake().failure();
    assert_eq!(code, DEFINITION);
    assert!(
        text.contains(
            "image.toml:4: `packages` requests `thing=2.0`, but the base image holds the package at 1.0"
        ),
        "{text}"
    );
    lab.define(&format!("packages = [\"thing\"]\n{from}"));
    let (code, text) = lab.bake().failure();
    assert_eq!(code, DEFINITION);
    assert!(text.contains("the installation would change a package that the base image holds"), "{text}");
    lab.define("hold = [\n  \"nobody\",\n]\n");
    let (code, text) = lab.bake().failure();
    assert_eq!(code, DEFINITION);
    assert!(text.contains("image.toml:4: `hold`") && text.contains("`nobody`"), "{text}");
}

#[test]
fn an_answer_arrives_at_the_package_that_asks() {
    let lab = lab();
    let script = "#!/bin/sh\nset -e\n. /usr/share/debconf/confmodule\n";
    let config = format!("{script}db_input critical asker/colour || true\ndb_go || true\n");
    let postinst = format!("{script}db_get asker/colour\necho \"$RET\" > /colour\n");
    let templates = "Template: asker/colour\nType: string\nDefault: grey\nDescription: Colour?\n";
    let files =
        [("DEBIAN/config", &*config), ("DEBIAN/postinst", &*postinst), ("DEBIAN/templates", templates)];
    lab.package("asker", "1.0", "Depends: debconf\n", &files);
    lab.define("packages = [\"./asker.deb\"]\ndebconf = [\"asker asker/colour string deep blue\"]\n");
    lab.bake().facts();
    assert_eq!(lab.read("colour"), "deep blue\n");
}

#[test]
fn a_package_of_another_suite_brings_its_dependencies_and_a_priority_prefers_the_suite() {
    let (lab, archive, key) = (lab(), Archive::new(), Key::new());
    let of = |name: &str, version: &str, control: &str| {
        lab.package(name, version, control, &[]);
        let file = lab.path(&format!("web/{name}.deb"));
        let pooled = archive.add(&file, &format!("{name}_{version}_all.deb"));
        fs::remove_file(file).unwrap();
        pooled
    };
    let stable = ["tool", "tool-lib", "tool-data", "other"].map(|name| of(name, "1.0", ""));
    // The package of the suite needs packages that exist in both suites, and these need others.
    let newer = [
        of("tool", "2.1", "Depends: tool-lib (>= 2)\n"),
        of("tool-lib", "2.0", "Depends: tool-data (>= 2)\n"),
        of("tool-data", "2.0", ""),
        of("other", "2.0", ""),
    ];
    archive.publish("stable", "", &stable, Some(&key));
    archive.publish("backports", "NotAutomatic: yes\nButAutomaticUpgrades: yes\n", &newer, Some(&key));
    let main = repository(&lab, &archive, "main", &key, MAIN);
    let backports = repository(&lab, &archive, "backports", &key, &MAIN.replace("stable", "backports"));

    lab.define(&format!("packages = [\"tool=2.*\"]\n{main}{backports}"));
    let hint = "\"tool/backports=2.*\"";
    lab.bake_with(never_again)
        .fails(DEFINITION, &["the packages cannot be installed together", hint, "`priority`"]);
    lab.define(&format!("packages = [\"tool/backport\"]\n{main}{backports}"));
    lab.bake_with(never_again).fails(DEFINITION, &["has the suite `backport`, which `packages` names"]);
    lab.define(&format!("packages = [\n  \"tool/backports=9*\",\n]\n{main}{backports}"));
    lab.bake_with(never_again).fails(DEFINITION, &["image.toml:4: ", "version `9*` of `tool`", "2.1", "1.0"]);
    lab.define(&format!("packages = [\"tool/stable\", \"nothing/backports\"]\n{main}{backports}"));
    lab.bake_with(never_again).fails(DEFINITION, &["no repository of the image has the package `nothing`"]);
    lab.renew();

    let cases = [
        ("\"tool\", \"other\"", "", ["tool\t1.0", "other\t1.0"]),
        ("\"other\", \"tool/backports=2.*\"", "", ["tool\t2.1", "other\t1.0"]),
        ("\"other/backports\", \"tool/stable\"", "", ["tool\t1.0", "other\t2.0"]),
        ("\"tool/backports\", \"other\"", "", ["tool-lib\t2.0", "other\t1.0"]),
        ("\"tool\", \"other\"", "priority = 600\n", ["tool\t2.1", "other\t2.0"]),
        ("\"tool\", \"other\"", "priority = 500\n", ["tool\t2.1", "other\t2.0"]),
        ("\"tool\", \"other\"", "priority = 400\n", ["tool\t1.0", "other\t1.0"]),
    ];
    for (packages, priority, expected) in cases {
        let keeps = if priority.is_empty() { &[""][..] } else { &["", "keep = false\n"] };
        for keep in keeps {
            lab.define(&format!("packages = [{packages}]\n{main}{backports}{priority}{keep}"));
            let facts = lab.bake().facts();
            for line in expected {
                assert!(facts["packages"].contains(line), "{packages} {priority}: {}", facts["packages"]);
            }
            let pins = lab.image("etc/apt/preferences.d/backports.pref");
            assert_eq!(pins.exists(), !priority.is_empty() && keep.is_empty(), "{priority}{keep}");
            lab.renew();
        }
    }

    // An image on an image with a priority, which has the same repository without one.
    lab.define(&format!("{main}{backports}priority = 600\n"));
    lab.bake().facts();
    fs::write(lab.image("etc/apt/preferences.d/main.pref"), "# of the user\n").unwrap();
    lab.define(&format!("packages = [\"tool\"]\n{main}{backports}"));
    let facts = lab.bake().facts();
    assert!(facts["packages"].contains("tool\t1.0"), "{}", facts["packages"]);
    assert!(!lab.image("etc/apt/preferences.d/backports.pref").exists());
    assert!(lab.image("etc/apt/preferences.d/main.pref").exists());
}

#[test]
fn an_upgrade_of_security_takes_that_suite_alone() {
    let (lab, archive, flat, key) = (lab(), Archive::new(), Archive::new(), Key::new());
    for name in ["fixed", "older"] {
        install(&lab, name, "1.0", "", &[]);
    }
    let of = |archive: &Archive, name: &str, version: &str| package(&lab, archive, name, version, &[]);
    let stable = [("fixed", "3.0"), ("older", "2.0"), ("asked", "2.0")]
        .map(|(name, version)| of(&archive, name, version));
    archive.publish("stable", "Label: Debian\n", &stable, Some(&key));
    let security = [of(&archive, "fixed", "2.0"), of(&archive, "asked", "1.0")];
    // One that says nothing of itself is none of security.
    flat.publish_flat("flat", &[of(&flat, "fixed", "4.0"), of(&flat, "older", "4.0")], Some(&key));
    let one = repository(&lab, &archive, "main", &key, MAIN);
    let two = repository(&lab, &archive, "secure", &key, &MAIN.replace("stable", "stable-security"));
    let three = repository(&lab, &flat, "flat", &key, "").replace("/\"\nkey", "/flat\"\nkey");

    // Without such a suite nothing would be upgraded, and nobody would know.
    lab.define(&format!("upgrade = \"security\"\n{one}"));
    let (code, text) = lab.bake().failure();
    assert_eq!(code, STEP);
    assert!(text.contains("looking for a security suite among the image's repositories failed"), "{text}");

    archive.publish("stable-security", "Label: Debian-Security\n", &security, Some(&key));
    lab.define(&format!("upgrade = \"security\"\npackages = [\"asked\"]\n{one}{two}{three}"));
    let facts = lab.bake().facts();
    for line in ["fixed\t2.0", "older\t1.0", "asked\t2.0"] {
        assert!(facts["packages"].contains(line), "{line}: {}", facts["packages"]);
    }
}

#[test]
fn a_package_by_url_is_the_very_file_or_none() {
    let (lab, archive) = (lab(), Archive::new());
    let path = package(&lab, &archive, "remote", "1.0", &[("usr/share/remote", "there\n")]);
    let digest = sha256(&fs::read(archive.path(&path)).unwrap());
    let define = |path: &str, digest: &str| {
        let url = archive.url(path);
        lab.define(&format!("packages = [\n  {{ url = \"{url}\", sha256 = \"{digest}\" }},\n]\n"));
    };
    define(&path, &digest.replace(|c: char| c.is_ascii_digit(), "0"));
    let (code, text) = lab.bake().failure();
    assert_eq!(code, DEFINITION);
    assert!(
        text.contains("image.toml:4: `packages`") && text.contains(&format!("its sha256 is {digest}")),
        "{text}"
    );
    define("pool/gone.deb", &digest);
    let (code, text) = lab.bake().failure();
    assert_eq!(code, DEFINITION);
    assert!(text.contains("image.toml:4: `packages`") && text.contains("HTTP 404"), "{text}");

    archive.fail(&path, "503 Service Unavailable", 1);
    define(&path, &digest);
    let baked = lab.bake();
    assert!(baked.log.contains("HTTP 503); retrying in 2 s"), "{}", baked.log);
    assert!(baked.facts()["packages"].contains("remote\t1.0"));
    assert_eq!(lab.read("usr/share/remote"), "there\n");
    let asked = archive.asked().len();
    lab.bake().facts();
    assert_eq!(archive.asked().len(), asked, "it is cached");
    let kept = lab.path(&format!("state/downloads/{digest}/remote_1.0_all.deb"));
    fs::write(&kept, "spoilt").unwrap();
    lab.bake().facts();
    assert_eq!(archive.asked().len(), asked + 1, "and looked at before it is used");
    assert_eq!(sha256(&fs::read(kept).unwrap()), digest);
}

/// A server with a certificate of its own, which nobody vouches for.
#[test]
fn a_server_is_believed_only_with_a_certificate_that_is_trusted() {
    let (mut lab, archive) = (lab(), Archive::new());
    let path = package(&lab, &archive, "remote", "1.0", &[]);
    let digest = sha256(&fs::read(archive.path(&path)).unwrap());
    let (key, certificate) = (lab.path("key.pem"), lab.path("ca.pem"));
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-nodes",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-days",
            "2",
        ])
        .args(["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout"])
        .args([key.as_os_str(), "-out".as_ref(), certificate.as_os_str()])
        .output()
        .expect("this test needs openssl");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // The port is free again, and nobody else takes it so soon.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut server = Command::new("openssl")
        .args(["s_server", "-quiet", "-WWW", "-accept", &format!("127.0.0.1:{port}"), "-key"])
        .args([key.as_os_str(), "-cert".as_ref(), certificate.as_os_str()])
        .current_dir(archive.path(""))
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let url = format!("https://127.0.0.1:{port}/{path}");
    lab.define(&format!("packages = [{{ url = \"{url}\", sha256 = \"{digest}\" }}]\n"));
    let distrusted = lab.bake().failure();
    lab.network.ca_file = Some(certificate);
    let trusted = lab.bake();
    server.kill().unwrap();
    server.wait().unwrap();
    let (code, text) = distrusted;
    assert_eq!(code, STEP);
    assert!(text.contains("certificate") && text.contains("`ca_file`"), "{text}");
    assert!(trusted.facts()["packages"].contains("remote\t1.0"));
}

#[test]
fn a_version_that_does_not_exist_is_answered_with_those_that_do() {
    let (lab, archive, key) = (lab(), Archive::new(), Key::new());
    let versions = ["0.9", "1.0", "1.1"].map(|version| package(&lab, &archive, "tool", version, &[]));
    let other = package(&lab, &archive, "other", "3.0", &[]);
    archive.publish("stable", "", &[&versions[..], &[other]].concat(), Some(&key));
    let repository = repository(&lab, &archive, "tools", &key, MAIN);
    for (wanted, known) in [
        ("tool=9.*", "version `9.*` of `tool`; known versions: 1.1, 1.0, 0.9"),
        ("tool=1.2", "version `1.2` of `tool`; known versions: 1.1, 1.0, 0.9"),
        ("other=1:3.0", "version `1:3.0` of `other`; known versions: 3.0"),
    ] {
        lab.define(&format!("packages = [\"{wanted}\"]\n{repository}"));
        let (code, text) = lab.bake_with(never_again).failure();
        assert_eq!(code, DEFINITION, "{text}");
        assert!(text.contains(known), "{text}");
    }
    // A package that does not exist has no versions.
    lab.define(&format!("packages = [\"none=1.0\"]\n{repository}"));
    let (_, text) = lab.bake_with(never_again).failure();
    assert!(text.contains("has the package `none`") && !text.contains("known versions"), "{text}");
}
