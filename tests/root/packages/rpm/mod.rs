//! Bakes with the real dnf, zypper and rpm: real transactions and scriptlets, packages built for the purpose, a mirror
//! on this machine. `oven_testing::packages::rpm_lab` says what is not real. dnf 5, yum and microdnf cannot be run
//! here: their plans are compared with golden ones (plugins/redhat/tests). Needs root, and what scripts/setup installs.

mod same_definition;
mod tools;

use oven_testing::packages::rpm_lab::{Dnf, Zypper};
use oven_testing::packages::rpm_packages::{file, foreign};
use oven_testing::{RpmLab, until};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{SystemTime, UNIX_EPOCH};

const STEP: u8 = 5;
const DEFINITION: u8 = 3;

/// Files below a directory of the image that are not empty.
fn files(lab: &RpmLab, dir: &str) -> Vec<String> {
    let output =
        std::process::Command::new("find").arg(lab.image(dir)).args(["-type", "f", "-size", "+0"]).output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn a_rebake_downloads_no_package_and_no_index_twice() {
    for (system, index) in [(Dnf, "primary.xml"), (Zypper, "primary.xml")] {
        let lab = RpmLab::new(system);
        lab.define("packages = [\"lib\"]\n");
        let asked = |end: &str| lab.mirror.asked_with(end);
        lab.bake().facts();
        let (packages, indexes, lists) = (asked(".rpm"), asked(index), asked("repomd.xml"));
        assert!(packages > 0 && indexes > 0 && lists > 0, "{packages} {indexes} {lists}");
        lab.renew();
        let baked = lab.bake();
        let log = baked.log.clone();
        assert!(baked.facts()["packages"].contains("lib\t"));
        assert_eq!((asked(".rpm"), asked(index)), (packages, indexes), "{log}");
        assert!(asked("repomd.xml") > lists, "whether there is something new is asked each time");
        let dir = if system == Dnf { "var/cache/dnf" } else { "var/cache/zypp" };
        assert_eq!(files(&lab, dir), [""; 0]);
    }
}

#[test]
fn names_versions_groups_and_files_with_dependencies() {
    for system in [Dnf, Zypper] {
        let lab = RpmLab::new(system);
        lab.bring(&file("conf", "1.0", "noarch"));
        // What zypper calls a group is another kind of metadata, which createrepo_c does not write.
        let group = if system == Dnf { "\"@web\"" } else { "\"site\"" };
        lab.define(&format!(
            "packages = [\"lib=1.0\", \"epochal=3:2.0-*\", \"scripted=1.0-1\", {group}, \"./conf-1.0-1.noarch.rpm\"]\n"
        ));
        let baked = lab.bake();
        assert!(baked.log.contains("packages: 5 installed"), "{}", baked.log);
        let facts = baked.facts();
        let manifest = "conf\t1.0-1\tnoarch\nepochal\t3:2.0-1\tnoarch\nlib\t1.0-1\tnoarch\nplatform\t9-1\tnoarch\n\
            scripted\t1.0-1\tnoarch\nsite\t1.0-1\tnoarch\n";
        assert_eq!(facts["packages"], manifest, "without what is only recommended");
        assert_eq!(lab.read("etc/conf.conf"), "of 1.0\n");
        // Its script ran with no network but the loopback, and nothing said that systemd runs.
        let net = lab.read("var/lib/scripted/net");
        assert!(net.contains("lo:") && net.lines().count() == 3, "{net}");
        assert_eq!(lab.read("var/lib/scripted/offline"), "1\n");
        assert!(!lab.read("var/lib/scripted/booted").starts_with("/run"));
        for cache in ["var/cache/dnf", "var/cache/zypp"] {
            assert_eq!(files(&lab, cache), Vec::<String>::new());
        }
    }
}

/// rpm and the dynamic loader write to standard error in each command, and also in those whose output oven reads.
#[test]
fn warnings_of_rpm_are_not_packages() {
    for system in [Dnf, Zypper] {
        let lab = RpmLab::new(system);
        lab.write("etc/rpm/macros", "%_dbpath /var/lib/rpm\n%1bad x\n");
        lab.write("etc/ld.so.preload", "/usr/lib/gone.so\n");
        lab.define("packages = [\"lib\"]\n");
        let baked = lab.bake();
        for warning in ["Macro %1bad has illegal name", "cannot be preloaded"] {
            assert!(baked.log.contains(warning), "{warning}: {}", baked.log);
        }
        assert_eq!(baked.facts()["packages"], "lib\t1.1-1\tnoarch\nplatform\t9-1\tnoarch\n");
    }
}

#[test]
fn what_is_recommended_comes_if_the_definition_says_so() {
    for system in [Dnf, Zypper] {
        let lab = RpmLab::new(system);
        lab.define("packages = [\"site\"]\nrecommends = true\n");
        assert!(lab.bake().facts()["packages"].contains("weak\t1.0-1"));
    }
}

#[test]
fn a_post_script_that_fails_is_found_although_rpm_goes_on() {
    for system in [Dnf, Zypper] {
        let lab = RpmLab::new(system);
        lab.define("packages = [\"badpost\"]\n");
        let baked = lab.bake();
        baked.fails(
            STEP,
            &["%post script of the package `badpost-1.0-1.noarch` failed (exit status 3)", "said before"],
        );
        lab.define("packages = [\"badpre\"]\n");
        lab.bake().fails(STEP, &["%prein script of the package `badpre-1.0-1.noarch` failed"]);
    }
}

#[test]
fn what_no_repository_has_is_the_definitions_mistake() {
    for system in [Dnf, Zypper] {
        let lab = RpmLab::new(system);
        for (asked, said) in [
            ("nosuch", "no repository of the image has the package `nosuch`"),
            (
                "lib=9.0",
                "no repository of the image has version `9.0` of `lib`; known versions: 1.1-1, 1.0-1",
            ),
            // Without its epoch it is another version.
            (
                "epochal=2.0",
                "no repository of the image has version `2.0` of `epochal`; known versions: 3:2.0-1",
            ),
            ("@nosuch", "no repository of the image has the group `nosuch`"),
            ("orphan", "nothing provides `nowhere >= 3`, which orphan-1.0-1.noarch needs"),
        ] {
            lab.define(&format!("\n\npackages = [\n  \"weak\",\n  \"{asked}\",\n]\n"));
            let start = lab.mirror.asked("repomd.xml");
            lab.bake().fails(DEFINITION, &[said]);
            assert!(lab.mirror.asked("repomd.xml") <= start + 2, "{asked}: trying again is of no use");
        }
        lab.define("\n\npackages = [\n  \"lib\",\n  \"nosuch\",\n]\n");
        lab.bake().fails(DEFINITION, &["image.toml:7: "]);
    }
}

#[test]
fn downloads_of_a_script_are_removed_and_other_files_in_a_cache_are_found() {
    for (system, removed, found) in [
        (Dnf, "var/cache/dnf/tempfiles.json", "var/cache/yum/own/x.rpm"),
        (Zypper, "var/cache/zypp/pubkeys/own.asc", "var/cache/zypp/x.rpm"),
    ] {
        let lab = RpmLab::new(system);
        lab.define("[[run]]\nscript = \"fill.sh\"\n");
        let fill = |path: &str| {
            let script = format!("#!/bin/sh\nmkdir -p \"$(dirname /{path})\"\necho '[]' > /{path}\n");
            fs::write(lab.path("web/fill.sh"), script).unwrap();
        };
        fill(removed);
        lab.bake().facts();
        assert!(!lab.image(removed).exists(), "{removed}");
        fill(found);
        lab.bake().fails(STEP, &[&format!("/{found}: a file in the package manager's cache /var/cache/")]);
    }
}

#[test]
fn a_version_has_to_match_its_pattern() {
    let lab = RpmLab::new(Dnf);
    lab.define("packages = [\"lib=1.0*\", \"epochal=3:2.*\"]\n");
    let facts = lab.bake().facts();
    assert!(facts["packages"].contains("lib\t1.0-1") && facts["packages"].contains("epochal\t3:2.0-1"));
    lab.define("packages = [\"lib=9.*\"]\n");
    lab.bake().fails(DEFINITION, &["no repository of the image has version `9.*` of `lib`"]);
    // zypper takes the newest, whatever the pattern: that it does not fit is found afterwards.
    let lab = RpmLab::new(Zypper);
    lab.define("packages = [\"lib=1.1*\"]\n");
    assert!(lab.bake().facts()["packages"].contains("lib\t1.1-1"));
    lab.define("packages = [\"lib=1.0.*\"]\n");
    lab.bake().fails(STEP, &["`lib=1.0.*` (1.1-1 is installed)"]);
}

#[test]
fn a_package_for_another_architecture_is_refused() {
    for system in [Dnf, Zypper] {
        let lab = RpmLab::new(system);
        lab.define("packages = [\"foreign\"]\n");
        let said =
            if system == Dnf { "is for another architecture" } else { "whether it is for this architecture" };
        lab.bake().fails(DEFINITION, &[said, "foreign"]);
        lab.bring(&file("foreign", "1.0", foreign()));
        let name = format!("foreign-1.0-1.{}.rpm", foreign());
        lab.define(&format!("packages = [\"./{name}\"]\n"));
        lab.bake().fails(DEFINITION, &[&name, &format!("is for {}, but the image is", foreign())]);
    }
}

#[test]
fn a_wrong_key_is_reported_and_the_right_one_is_trusted() {
    for system in [Dnf, Zypper] {
        let lab = RpmLab::without_repository(system, "rw");
        lab.define(&format!("packages = [\"lib\"]\n{}", lab.repository("wrong.asc", true)));
        lab.bake().fails(DEFINITION, &["lib-1.1-1.noarch", "signed by a key that", "Check the `key`"]);
        for keep in [true, false] {
            let lab = RpmLab::without_repository(system, "rw");
            lab.define(&format!("packages = [\"lib=1.0\"]\n{}", lab.repository("right.asc", keep)));
            let facts = lab.bake().facts();
            assert_eq!(
                facts["packages"], "lib\t1.0-1\tnoarch\nplatform\t9-1\tnoarch\n",
                "keys are no packages"
            );
            let stays = lab.image(system.repositories()).join("more.repo");
            assert_eq!(stays.exists(), keep);
            assert_eq!(lab.image("etc/pki/rpm-gpg/RPM-GPG-KEY-more").exists(), keep);
            if keep {
                assert!(fs::read_to_string(stays).unwrap().contains("\ngpgcheck=1\n"));
            }
        }
    }
}

#[test]
fn a_priority_is_converted_for_package_managers_that_prefer_small_numbers() {
    let (older, mirror) = (tempfile::tempdir().unwrap(), file("lib", "1.0", "noarch"));
    fs::copy(&mirror, older.path().join(mirror.file_name().unwrap())).unwrap();
    let made = std::process::Command::new("createrepo_c").arg("-q").arg(older.path()).status().unwrap();
    assert!(made.success());
    let url = oven_testing::packages::mirror::Mirror::of(older.path().to_owned()).address;
    for system in [Dnf, Zypper] {
        for (priority, version) in [
            ("", "1.1"),
            ("priority = 100\n", "1.1"),
            ("priority = 600\n", "1.0"),
            ("priority = 1000\n", "1.0"),
        ] {
            let lab = RpmLab::new(system);
            let repository =
                format!("[[repository]]\nname = \"older\"\nurl = \"{url}\"\nsigned = false\n{priority}");
            lab.define(&format!("packages = [\"lib\"]\n{repository}"));
            let facts = lab.bake().facts();
            assert!(
                facts["packages"].contains(&format!("lib\t{version}-1")),
                "{priority}: {}",
                facts["packages"]
            );
        }
        let lab = RpmLab::new(system);
        lab.define("packages = [\"lib/older\"]\n");
        lab.bake().fails(DEFINITION, &["`lib/older`: only apt has suites", "`priority`"]);
    }
}

#[test]
fn a_package_without_a_signature_is_not_taken() {
    for system in [Dnf, Zypper] {
        let lab = RpmLab::without_repository(system, "rw");
        let repository = lab.repository("right.asc", true).replace("signed/", "plain/");
        lab.define(&format!("packages = [\"lib\"]\n{repository}"));
        lab.bake().fails(DEFINITION, &["the package lib-1.1-1.noarch", "is not signed"]);
    }
}

#[test]
fn a_mirror_that_answers_404_then_200_is_asked_again() {
    for (system, missing) in [
        (Dnf, "repomd.xml"),
        (Dnf, "lib-1.1-1.noarch.rpm"),
        (Zypper, "repomd.xml"),
        (Zypper, "lib-1.1-1.noarch.rpm"),
    ] {
        let lab = RpmLab::new(system);
        lab.define("packages = [\"lib\"]\n");
        lab.mirror.fails(missing, u32::MAX);
        let step =
            if missing == "repomd.xml" { "refreshing the package index" } else { "downloading 1 package" };
        // zypper says which repository, and not what it looked for.
        let said = if (system, missing) == (Zypper, "repomd.xml") { "repository `own`" } else { missing };
        lab.bake().fails(STEP, &[step, said]);
        // dnf asks more than once by itself.
        let asked = lab.mirror.asked(missing);
        assert!(asked >= 3 && asked.is_multiple_of(3), "it was tried three times: {asked}");

        let lab = RpmLab::new(system);
        lab.define("packages = [\"lib\"]\n");
        lab.mirror.fails(missing, u32::try_from(asked / 3).unwrap());
        let baked = lab.bake();
        assert!(baked.log.contains("retrying in 2 s"), "{missing}: {}", baked.log);
        assert!(baked.facts()["packages"].contains("lib\t1.1-1"));
    }
}

#[test]
fn an_address_that_only_an_instance_completes_is_reported() {
    let lab = RpmLab::without_repository(Dnf, "rw");
    let own = format!("[own]\nname=own\nbaseurl={}REGION/plain/\ngpgcheck=0\n", lab.mirror.address);
    lab.write("etc/yum.repos.d/own.repo", &own);
    lab.define("packages = [\"lib\"]\n");
    lab.bake().fails(STEP, &["has a part that only a running instance fills in", "REGION/plain"]);
}

#[test]
fn an_upgrade_and_what_became_of_configuration_files() {
    for system in [Dnf, Zypper] {
        let lab = RpmLab::new(system);
        for name in ["conf", "blunt", "lib"] {
            lab.base_has(&file(name, "1.0", "noarch"));
        }
        lab.write("etc/conf.conf", "changed\n");
        lab.write("etc/blunt.conf", "changed\n");
        lab.define("upgrade = true\n");
        let baked = lab.bake();
        for said in [
            "/etc/conf.conf is unchanged; the package's version is /etc/conf.conf.rpmnew",
            "/etc/blunt.conf now has the package's version; the image's version is /etc/blunt.conf.rpmsave",
            "packages: 3 changed",
        ] {
            assert!(baked.log.contains(said), "{said:?} is not in {}", baked.log);
        }
        assert!(baked.facts()["packages"].contains("lib\t1.1-1"));
        assert_eq!(lab.read("etc/conf.conf"), "changed\n");
        assert_eq!(lab.read("etc/blunt.conf"), "of 1.1\n");
    }
}

#[test]
fn nothing_is_a_security_upgrade_where_no_repository_says_so() {
    for system in [Dnf, Zypper] {
        let lab = RpmLab::new(system);
        lab.base_has(&file("lib", "1.0", "noarch"));
        lab.define("packages = [\"weak\"]\nupgrade = \"security\"\n");
        assert!(lab.bake().facts()["packages"].contains("lib\t1.0-1"));
    }
}

#[test]
fn a_locked_package_stays_and_a_named_version_may_be_older() {
    let lab = RpmLab::new(Zypper);
    lab.base_has(&file("lib", "1.0", "noarch"));
    lab.base_has(&file("conf", "1.1", "noarch"));
    lab.define("packages = [\"conf=1.0\"]\nupgrade = true\nhold = [\"lib\", \"conf\"]\n");
    let facts = lab.bake().facts();
    assert!(facts["packages"].starts_with("conf\t1.0-1\tnoarch\nlib\t1.0-1"), "{}", facts["packages"]);
    let locks = lab.read("etc/zypp/locks");
    assert!(locks.contains("lib") && locks.contains("conf"), "{locks}");
    // Debian's dnf has no such plugin.
    let lab = RpmLab::new(Dnf);
    lab.define("hold = [\"lib\"]\n");
    lab.bake().fails(DEFINITION, &["versionlock"]);
}

#[test]
fn a_full_disk_is_reported() {
    for system in [Dnf, Zypper] {
        let lab = RpmLab::without_repository(system, "size=100m");
        let own = format!("[own]\nname=own\nbaseurl={}plain/\ngpgcheck=0\n", lab.mirror.address);
        lab.write(&format!("{}/own.repo", system.repositories()), &own);
        lab.define("packages = [\"huge\"]\n");
        lab.bake().fails(STEP, &["size_gib"]);
    }
}

/// The kernel of these tests may have no SELinux: then no program but oven itself could have written the labels.
#[test]
fn files_are_labelled_by_the_images_own_policy() {
    let lab = RpmLab::new(Dnf);
    lab.write("etc/selinux/config", "SELINUX=enforcing\nSELINUXTYPE=default\n");
    // The base's owner labelled this one otherwise, on purpose, some time ago.
    let own = "system_u:object_r:httpd_sys_content_t:s0";
    lab.label("etc/rpm/macros", own);
    let labelled = fs::metadata(lab.image("etc/rpm/macros")).unwrap().ctime() as u64;
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    // What changed in the second in which a bake begins was changed by the bake.
    until("another second", || (now() > labelled).then_some(()));
    fs::write(lab.path("web/f"), "x").unwrap();
    lab.define("packages = [\"conf\", \"scripted\"]\n[[file]]\nsource = \"f\"\ntarget = \"/srv/www/f\"\n");
    let baked = lab.bake();
    assert!(baked.log.contains("files for SELinux by the image's own policy"), "{}", baked.log);
    let log = baked.log.clone();
    baked.facts();
    for (path, kind) in [
        ("etc/conf.conf", "etc_t"),
        ("etc/shadow", "shadow_t"),
        ("var/lib/scripted/file", "var_lib_t"),
        ("var/lib/scripted", "var_lib_t"),
        ("srv/www/f", "httpd_sys_content_t"),
        ("etc/yum.repos.d/own.repo", "etc_t"),
    ] {
        let label = lab.label_of(path).unwrap_or_default();
        assert!(label.ends_with(&format!(":object_r:{kind}:s0")), "{path}: {label}\n{log}");
    }
    assert_eq!(lab.label_of("etc/rpm/macros").as_deref(), Some(own));
    assert!(!lab.image(".autorelabel").exists());
}

#[test]
fn labels_are_left_to_the_instances_only_if_the_definition_says_so() {
    let lab = RpmLab::new(Dnf);
    lab.write("etc/selinux/config", "SELINUX=permissive\nSELINUXTYPE=default\n");
    lab.define("packages = [\"conf\"]\nselinux = \"autorelabel\"\n");
    let baked = lab.bake();
    assert!(baked.log.contains("each instance labels its files"), "{}", baked.log);
    baked.facts();
    assert_eq!(lab.label_of("etc/conf.conf"), None);
    assert!(lab.image(".autorelabel").exists());

    let lab = RpmLab::new(Dnf);
    lab.write("etc/selinux/config", "SELINUX=permissive\nSELINUXTYPE=default\n");
    lab.define("packages = [\"conf\"]\n");
    // It says of nothing that it lacks a label.
    lab.write("usr/sbin/setfiles", "#!/bin/sh\nexit 0\n");
    lab.write("etc/selinux/default/contexts/unlabelled", "x");
    fs::rename(lab.image("etc/selinux/default/contexts/unlabelled"), lab.image("etc/passwd")).unwrap();
    lab.bake().fails(STEP, &["/etc/passwd is missing", "selinux = \"autorelabel\""]);
    fs::remove_file(lab.image("usr/sbin/setfiles")).unwrap();
    lab.bake().fails(STEP, &["does not have setfiles", "policycoreutils", "selinux = \"autorelabel\""]);
}
