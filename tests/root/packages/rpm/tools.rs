//! Ansible for a bake alone, by the real dnf: a package stands for it, whose playbooks are scripts of the shell.

use super::{DEFINITION, STEP};
use oven_testing::RpmLab;
use oven_testing::packages::rpm_lab::{Dnf, Zypper};
use oven_testing::packages::rpm_packages::file;
use std::fs;

const PLAYBOOK: &str = "[[ansible]]\nplaybook = \"site.yml\"\n";

fn lab(playbook: &str) -> RpmLab {
    let lab = RpmLab::new(Dnf);
    fs::write(lab.path("web/site.yml"), playbook).unwrap();
    lab
}

#[test]
fn it_comes_and_goes() {
    let lab = lab("rpm -q ansible-core pyth lib > /etc/played\n");
    // `weak` is only recommended: not brought, although the definition wants such packages.
    for more in ["", "recommends = true\npackages = [\"conf\"]\n"] {
        lab.define(&format!(
            "{more}{PLAYBOOK}[[test]]\ncommand = [\"test\", \"!\", \"-e\", \"/usr/bin/ansible-playbook\"]\n"
        ));
        let baked = lab.bake();
        assert!(baked.log.contains("installed 3 packages for this bake only"), "{}", baked.log);
        let wanted = if more.is_empty() { "" } else { "conf\t1.1-1\tnoarch\n" };
        assert_eq!(baked.facts()["packages"], format!("{wanted}platform\t9-1\tnoarch\n"));
        let played = lab.read("etc/played");
        assert_eq!(played.lines().count(), 3, "{played}");
        for cache in ["var/cache/dnf", "var/lib/dnf/repos"] {
            assert_eq!(super::files(&lab, cache), Vec::<String>::new());
        }
    }
}

#[test]
fn what_was_installed_meanwhile_stays_with_what_it_needs() {
    let lab = lab("dnf -y install app\n");
    lab.define(&format!("{PLAYBOOK}network = true\n"));
    let baked = lab.bake();
    assert!(
        baked.log.contains("because packages that were installed later need them: `lib`, `pyth`"),
        "{}",
        baked.log
    );
    let packages = "app\t1.0-1\tnoarch\nlib\t1.1-1\tnoarch\nplatform\t9-1\tnoarch\npyth\t1:1.0-1\tnoarch\n";
    assert_eq!(baked.facts()["packages"], packages);
}

#[test]
fn what_was_there_before_stays_as_it_was() {
    let lab = lab("true\n");
    // Nothing needs it, and an upgrade would change it.
    lab.base_has(&file("lib", "1.0", "noarch"));
    lab.define(PLAYBOOK);
    let baked = lab.bake();
    assert!(baked.log.contains("installed 2 packages for this bake only"), "{}", baked.log);
    assert_eq!(baked.facts()["packages"], "lib\t1.0-1\tnoarch\nplatform\t9-1\tnoarch\n");
}

#[test]
fn an_unavailable_tool_is_reported_with_its_line_of_image_toml() {
    let lab = RpmLab::without_repository(Dnf, "rw");
    fs::write(lab.path("web/site.yml"), "true\n").unwrap();
    lab.define(PLAYBOOK);
    lab.bake().fails(STEP, &["image.toml:4: `playbook` of [[ansible]]", "the image has no repository"]);
    // zypper cannot say what was installed for something else's sake.
    let lab = RpmLab::new(Zypper);
    fs::write(lab.path("web/site.yml"), "touch /etc/played\n").unwrap();
    lab.define(PLAYBOOK);
    lab.bake().fails(DEFINITION, &["image.toml:4: `playbook`", "Add Ansible to `packages`"]);
    lab.define(&format!("packages = [\"ansible-core\"]\n{PLAYBOOK}"));
    assert!(lab.bake().facts()["packages"].starts_with("ansible-core\t1.0-1"), "it stays");
    assert!(lab.image("etc/played").exists());
}
