//! Ansible for a bake alone, by the real dnf: a package stands for it, whose playbooks are scripts of the shell.

use super::ground::{Dnf, Ground, Zypper};
use super::packages::file;
use super::{DEFINITION, STEP};
use std::fs;

const PLAYBOOK: &str = "[[ansible]]\nplaybook = \"site.yml\"\n";

fn ground(playbook: &str) -> Ground {
    let ground = Ground::new(Dnf);
    fs::write(ground.path("web/site.yml"), playbook).unwrap();
    ground
}

#[test]
fn it_comes_and_goes() {
    let ground = ground("rpm -q ansible-core pyth lib > /etc/played\n");
    // `weak` is only recommended: not brought, although the definition wants such packages.
    for more in ["", "recommends = true\npackages = [\"conf\"]\n"] {
        ground.define(&format!(
            "{more}{PLAYBOOK}[[test]]\ncommand = [\"test\", \"!\", \"-e\", \"/usr/bin/ansible-playbook\"]\n"
        ));
        let baked = ground.bake();
        assert!(baked.log.contains("installed for this bake only: 3 packages"), "{}", baked.log);
        let wanted = if more.is_empty() { "" } else { "conf\t1.1-1\tnoarch\n" };
        assert_eq!(baked.facts()["packages"], format!("{wanted}platform\t9-1\tnoarch\n"));
        let played = ground.read("etc/played");
        assert_eq!(played.lines().count(), 3, "{played}");
        for cache in ["var/cache/dnf", "var/lib/dnf/repos"] {
            assert_eq!(super::files(&ground, cache), Vec::<String>::new());
        }
    }
}

#[test]
fn what_was_installed_meanwhile_stays_with_what_it_needs() {
    let ground = ground("dnf -y install app\n");
    ground.define(&format!("{PLAYBOOK}network = true\n"));
    let baked = ground.bake();
    assert!(
        baked.log.contains("because packages that were installed since need them: `lib`, `pyth`"),
        "{}",
        baked.log
    );
    let packages = "app\t1.0-1\tnoarch\nlib\t1.1-1\tnoarch\nplatform\t9-1\tnoarch\npyth\t1:1.0-1\tnoarch\n";
    assert_eq!(baked.facts()["packages"], packages);
}

#[test]
fn what_was_there_before_stays_as_it_was() {
    let ground = ground("true\n");
    // Nothing needs it, and an upgrade would change it.
    ground.base_has(&file("lib", "1.0", "noarch"));
    ground.define(PLAYBOOK);
    let baked = ground.bake();
    assert!(baked.log.contains("installed for this bake only: 2 packages"), "{}", baked.log);
    assert_eq!(baked.facts()["packages"], "lib\t1.0-1\tnoarch\nplatform\t9-1\tnoarch\n");
}

#[test]
fn where_it_cannot_be_had_image_toml_is_told() {
    let ground = Ground::without_repository(Dnf, "rw");
    fs::write(ground.path("web/site.yml"), "true\n").unwrap();
    ground.define(PLAYBOOK);
    ground.bake().fails(STEP, &["the [[ansible]] of", "image.toml:3", "the image has no repository"]);
    // zypper cannot say what was installed for something else's sake.
    let ground = Ground::new(Zypper);
    fs::write(ground.path("web/site.yml"), "touch /etc/played\n").unwrap();
    ground.define(PLAYBOOK);
    ground.bake().fails(DEFINITION, &["image.toml:3: `playbook`", "add Ansible to `packages`"]);
    ground.define(&format!("packages = [\"ansible-core\"]\n{PLAYBOOK}"));
    assert!(ground.bake().facts()["packages"].starts_with("ansible-core\t1.0-1"), "it stays");
    assert!(ground.image("etc/played").exists());
}
