//! Bakes with the real dnf, zypper and rpm: real transactions and scriptlets, packages built for the purpose, a mirror
//! on this machine. `root_rpm/ground.rs` tells what is not real. dnf 5, yum and microdnf cannot be run here: their plans
//! are compared with golden ones (plugins/redhat/tests). Needs root, and what scripts/setup installs.

#[path = "root_rpm/alike.rs"]
mod alike;
#[path = "root_debian/archive.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod archive;
#[path = "support/disk.rs"]
mod disk;
#[path = "root_rpm/ground.rs"]
mod ground;
#[path = "root_rpm/mirror.rs"]
mod mirror;
#[path = "root_rpm/packages.rs"]
mod packages;
#[path = "root_rpm/tools.rs"]
mod tools;
#[path = "support/world.rs"]
mod world;

use ground::{Dnf, Ground, Zypper};
use packages::{file, foreign};
use std::fs;

const STEP: u8 = 5;
const DEFINITION: u8 = 3;

/// Files below a directory of the image that are not empty.
fn files(ground: &Ground, dir: &str) -> Vec<String> {
    let output = std::process::Command::new("find")
        .arg(ground.image(dir))
        .args(["-type", "f", "-size", "+0"])
        .output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn a_rebake_downloads_no_package_and_no_index_twice() {
    for (system, index) in [(Dnf, "primary.xml"), (Zypper, "primary.xml")] {
        let ground = Ground::new(system);
        ground.define("packages = [\"lib\"]\n");
        let asked = |end: &str| ground.mirror.asked_with(end);
        ground.bake().facts();
        let (packages, indexes, lists) = (asked(".rpm"), asked(index), asked("repomd.xml"));
        assert!(packages > 0 && indexes > 0 && lists > 0, "{packages} {indexes} {lists}");
        ground.renew();
        let baked = ground.bake();
        let log = baked.log.clone();
        assert!(baked.facts()["packages"].contains("lib\t"));
        assert_eq!((asked(".rpm"), asked(index)), (packages, indexes), "{log}");
        assert!(asked("repomd.xml") > lists, "whether there is something new is asked each time");
        let dir = if system == Dnf { "var/cache/dnf" } else { "var/cache/zypp" };
        assert_eq!(files(&ground, dir), [""; 0]);
    }
}

#[test]
fn names_versions_groups_and_files_with_dependencies() {
    for system in [Dnf, Zypper] {
        let ground = Ground::new(system);
        ground.bring(&file("conf", "1.0", "noarch"));
        // What zypper calls a group is another kind of metadata, which createrepo_c does not write.
        let group = if system == Dnf { "\"@web\"" } else { "\"site\"" };
        ground.define(&format!(
            "packages = [\"lib=1.0\", \"epochal=3:2.0-*\", \"scripted=1.0-1\", {group}, \"./conf-1.0-1.noarch.rpm\"]\n"
        ));
        let baked = ground.bake();
        assert!(baked.log.contains("packages: 5 installed"), "{}", baked.log);
        let facts = baked.facts();
        let manifest = "conf\t1.0-1\tnoarch\nepochal\t3:2.0-1\tnoarch\nlib\t1.0-1\tnoarch\nplatform\t9-1\tnoarch\n\
            scripted\t1.0-1\tnoarch\nsite\t1.0-1\tnoarch\n";
        assert_eq!(facts["packages"], manifest, "without what is only recommended");
        assert_eq!(ground.read("etc/conf.conf"), "of 1.0\n");
        // Its script ran with no network but the loopback, and nothing said that systemd runs.
        let net = ground.read("var/lib/scripted/net");
        assert!(net.contains("lo:") && net.lines().count() == 3, "{net}");
        assert_eq!(ground.read("var/lib/scripted/offline"), "1\n");
        assert!(!ground.read("var/lib/scripted/booted").starts_with("/run"));
        for cache in ["var/cache/dnf", "var/cache/zypp"] {
            assert_eq!(files(&ground, cache), Vec::<String>::new());
        }
    }
}

#[test]
fn what_is_recommended_comes_if_the_definition_says_so() {
    for system in [Dnf, Zypper] {
        let ground = Ground::new(system);
        ground.define("packages = [\"site\"]\nrecommends = true\n");
        assert!(ground.bake().facts()["packages"].contains("weak\t1.0-1"));
    }
}

#[test]
fn a_post_script_that_fails_is_found_although_rpm_goes_on() {
    for system in [Dnf, Zypper] {
        let ground = Ground::new(system);
        ground.define("packages = [\"badpost\"]\n");
        let baked = ground.bake();
        baked.fails(
            STEP,
            &["%post script of the package `badpost-1.0-1.noarch` failed (exit status 3)", "said before"],
        );
        ground.define("packages = [\"badpre\"]\n");
        ground.bake().fails(STEP, &["%prein script of the package `badpre-1.0-1.noarch` failed"]);
    }
}

#[test]
fn what_no_repository_has_is_the_definitions_mistake() {
    for system in [Dnf, Zypper] {
        let ground = Ground::new(system);
        for (asked, said) in [
            ("nosuch", "no repository of the image has the package `nosuch`"),
            ("lib=9.0", "no repository of the image has version `9.0` of `lib`"),
            // Without its epoch it is another version.
            ("epochal=2.0", "no repository of the image has version `2.0` of `epochal`"),
            ("@nosuch", "no repository of the image has the group `nosuch`"),
            ("orphan", "nothing provides `nowhere >= 3`, which orphan-1.0-1.noarch needs"),
        ] {
            ground.define(&format!("\n\npackages = [\n  \"weak\",\n  \"{asked}\",\n]\n"));
            let start = ground.mirror.asked("repomd.xml");
            ground.bake().fails(DEFINITION, &[said]);
            assert!(ground.mirror.asked("repomd.xml") <= start + 2, "{asked}: trying again is of no use");
        }
        ground.define("\n\npackages = [\n  \"lib\",\n  \"nosuch\",\n]\n");
        ground.bake().fails(DEFINITION, &["image.toml:7: "]);
    }
}

#[test]
fn a_pattern_is_held_to() {
    let ground = Ground::new(Dnf);
    ground.define("packages = [\"lib=1.0*\", \"epochal=3:2.*\"]\n");
    let facts = ground.bake().facts();
    assert!(facts["packages"].contains("lib\t1.0-1") && facts["packages"].contains("epochal\t3:2.0-1"));
    ground.define("packages = [\"lib=9.*\"]\n");
    ground.bake().fails(DEFINITION, &["no repository of the image has version `9.*` of `lib`"]);
    // zypper takes the newest, whatever the pattern: that it does not fit is found afterwards.
    let ground = Ground::new(Zypper);
    ground.define("packages = [\"lib=1.1*\"]\n");
    assert!(ground.bake().facts()["packages"].contains("lib\t1.1-1"));
    ground.define("packages = [\"lib=1.0.*\"]\n");
    ground.bake().fails(STEP, &["`lib=1.0.*` (it is at 1.1-1)"]);
}

#[test]
fn a_package_for_another_architecture_is_told() {
    for system in [Dnf, Zypper] {
        let ground = Ground::new(system);
        ground.define("packages = [\"foreign\"]\n");
        let said =
            if system == Dnf { "is for another architecture" } else { "whether it is for this architecture" };
        ground.bake().fails(DEFINITION, &[said, "foreign"]);
        ground.bring(&file("foreign", "1.0", foreign()));
        let name = format!("foreign-1.0-1.{}.rpm", foreign());
        ground.define(&format!("packages = [\"./{name}\"]\n"));
        ground.bake().fails(DEFINITION, &[&name, &format!("is for {}, and the image is", foreign())]);
    }
}

#[test]
fn a_wrong_key_is_told_and_the_right_one_is_trusted() {
    for system in [Dnf, Zypper] {
        let ground = Ground::without_repository(system, "rw");
        ground.define(&format!("packages = [\"lib\"]\n{}", ground.repository("wrong.asc", true)));
        ground.bake().fails(DEFINITION, &["lib-1.1-1.noarch", "signed by a key that", "Check the `key`"]);
        for keep in [true, false] {
            let ground = Ground::without_repository(system, "rw");
            ground.define(&format!("packages = [\"lib=1.0\"]\n{}", ground.repository("right.asc", keep)));
            let facts = ground.bake().facts();
            assert_eq!(
                facts["packages"], "lib\t1.0-1\tnoarch\nplatform\t9-1\tnoarch\n",
                "keys are no packages"
            );
            let stays = ground.image(system.repositories()).join("more.repo");
            assert_eq!(stays.exists(), keep);
            assert_eq!(ground.image("etc/pki/rpm-gpg/RPM-GPG-KEY-more").exists(), keep);
            if keep {
                assert!(fs::read_to_string(stays).unwrap().contains("\ngpgcheck=1\n"));
            }
        }
    }
}

#[test]
fn a_package_without_a_signature_is_not_taken() {
    for system in [Dnf, Zypper] {
        let ground = Ground::without_repository(system, "rw");
        let repository = ground.repository("right.asc", true).replace("signed/", "plain/");
        ground.define(&format!("packages = [\"lib\"]\n{repository}"));
        ground.bake().fails(DEFINITION, &["the package lib-1.1-1.noarch", "is not signed"]);
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
        let ground = Ground::new(system);
        ground.define("packages = [\"lib\"]\n");
        ground.mirror.fails(missing, u32::MAX);
        let step =
            if missing == "repomd.xml" { "refreshing the package index" } else { "downloading 1 package" };
        // zypper says which repository, and not what it looked for.
        let said = if (system, missing) == (Zypper, "repomd.xml") { "repository `own`" } else { missing };
        ground.bake().fails(STEP, &[step, said]);
        // dnf asks more than once by itself.
        let asked = ground.mirror.asked(missing);
        assert!(asked >= 3 && asked.is_multiple_of(3), "it was tried three times: {asked}");

        let ground = Ground::new(system);
        ground.define("packages = [\"lib\"]\n");
        ground.mirror.fails(missing, u32::try_from(asked / 3).unwrap());
        let baked = ground.bake();
        assert!(baked.log.contains("retrying in 2 s"), "{missing}: {}", baked.log);
        assert!(baked.facts()["packages"].contains("lib\t1.1-1"));
    }
}

#[test]
fn an_address_that_only_an_instance_completes_is_told() {
    let ground = Ground::without_repository(Dnf, "rw");
    let own = format!("[own]\nname=own\nbaseurl={}REGION/plain/\ngpgcheck=0\n", ground.mirror.address);
    ground.write("etc/yum.repos.d/own.repo", &own);
    ground.define("packages = [\"lib\"]\n");
    ground.bake().fails(STEP, &["has a part that only a running instance fills in", "REGION/plain"]);
}

#[test]
fn an_upgrade_and_what_became_of_configuration_files() {
    for system in [Dnf, Zypper] {
        let ground = Ground::new(system);
        for name in ["conf", "blunt", "lib"] {
            ground.base_has(&file(name, "1.0", "noarch"));
        }
        ground.write("etc/conf.conf", "changed\n");
        ground.write("etc/blunt.conf", "changed\n");
        ground.define("upgrade = true\n");
        let baked = ground.bake();
        for said in [
            "/etc/conf.conf is unchanged; the package's version is /etc/conf.conf.rpmnew",
            "/etc/blunt.conf now has the package's version; the image's version is /etc/blunt.conf.rpmsave",
            "packages: 3 changed",
        ] {
            assert!(baked.log.contains(said), "{said:?} is not in {}", baked.log);
        }
        assert!(baked.facts()["packages"].contains("lib\t1.1-1"));
        assert_eq!(ground.read("etc/conf.conf"), "changed\n");
        assert_eq!(ground.read("etc/blunt.conf"), "of 1.1\n");
    }
}

#[test]
fn nothing_is_a_security_upgrade_where_no_repository_says_so() {
    for system in [Dnf, Zypper] {
        let ground = Ground::new(system);
        ground.base_has(&file("lib", "1.0", "noarch"));
        ground.define("packages = [\"weak\"]\nupgrade = \"security\"\n");
        assert!(ground.bake().facts()["packages"].contains("lib\t1.0-1"));
    }
}

#[test]
fn a_locked_package_stays_and_a_named_version_may_be_older() {
    let ground = Ground::new(Zypper);
    ground.base_has(&file("lib", "1.0", "noarch"));
    ground.base_has(&file("conf", "1.1", "noarch"));
    ground.define("packages = [\"conf=1.0\"]\nupgrade = true\nhold = [\"lib\", \"conf\"]\n");
    let facts = ground.bake().facts();
    assert!(facts["packages"].starts_with("conf\t1.0-1\tnoarch\nlib\t1.0-1"), "{}", facts["packages"]);
    let locks = ground.read("etc/zypp/locks");
    assert!(locks.contains("lib") && locks.contains("conf"), "{locks}");
    // Debian's dnf has no such plugin.
    let ground = Ground::new(Dnf);
    ground.define("hold = [\"lib\"]\n");
    ground.bake().fails(DEFINITION, &["versionlock"]);
}

#[test]
fn a_full_disk_is_told() {
    for system in [Dnf, Zypper] {
        let ground = Ground::without_repository(system, "size=100m");
        let own = format!("[own]\nname=own\nbaseurl={}plain/\ngpgcheck=0\n", ground.mirror.address);
        ground.write(&format!("{}/own.repo", system.repositories()), &own);
        ground.define("packages = [\"huge\"]\n");
        ground.bake().fails(STEP, &["size_gib"]);
    }
}

/// The kernel of these tests may have no SELinux: then no program but oven itself could have written the labels.
#[test]
fn files_are_labelled_by_the_images_own_policy() {
    let ground = Ground::new(Dnf);
    ground.write("etc/selinux/config", "SELINUX=enforcing\nSELINUXTYPE=default\n");
    // The base's owner labelled this one otherwise, on purpose, some time ago.
    let own = "system_u:object_r:httpd_sys_content_t:s0";
    ground.label("etc/rpm/macros", own);
    #[allow(clippy::disallowed_methods, reason = "a test has no runtime to block")]
    std::thread::sleep(std::time::Duration::from_millis(2100));
    fs::write(ground.path("web/f"), "x").unwrap();
    ground.define("packages = [\"conf\", \"scripted\"]\n[[file]]\nsource = \"f\"\ntarget = \"/srv/www/f\"\n");
    let baked = ground.bake();
    assert!(baked.log.contains("files labelled by the image's own policy"), "{}", baked.log);
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
        let label = ground.label_of(path).unwrap_or_default();
        assert!(label.ends_with(&format!(":object_r:{kind}:s0")), "{path}: {label}\n{log}");
    }
    assert_eq!(ground.label_of("etc/rpm/macros").as_deref(), Some(own));
    assert!(!ground.image(".autorelabel").exists());
}

#[test]
fn labels_are_left_to_the_instances_only_if_the_definition_says_so() {
    let ground = Ground::new(Dnf);
    ground.write("etc/selinux/config", "SELINUX=permissive\nSELINUXTYPE=default\n");
    ground.define("packages = [\"conf\"]\nselinux = \"autorelabel\"\n");
    let baked = ground.bake();
    assert!(baked.log.contains("each instance labels its files"), "{}", baked.log);
    baked.facts();
    assert_eq!(ground.label_of("etc/conf.conf"), None);
    assert!(ground.image(".autorelabel").exists());

    let ground = Ground::new(Dnf);
    ground.write("etc/selinux/config", "SELINUX=permissive\nSELINUXTYPE=default\n");
    ground.define("packages = [\"conf\"]\n");
    // It says of nothing that it lacks a label.
    ground.write("usr/sbin/setfiles", "#!/bin/sh\nexit 0\n");
    ground.write("etc/selinux/default/contexts/unlabelled", "x");
    fs::rename(ground.image("etc/selinux/default/contexts/unlabelled"), ground.image("etc/passwd")).unwrap();
    ground.bake().fails(STEP, &["/etc/passwd is missing", "selinux = \"autorelabel\""]);
    fs::remove_file(ground.image("usr/sbin/setfiles")).unwrap();
    ground.bake().fails(STEP, &["has no setfiles", "policycoreutils", "selinux = \"autorelabel\""]);
}
