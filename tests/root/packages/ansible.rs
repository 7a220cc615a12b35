//! A playbook with the real Ansible on a small Debian: installed for the bake from the mirror, and removed again. Needs
//! root, mmdebstrap and a mirror of Debian. Python and Ansible are large, so most of it runs with `OVEN_TEST_FULL=1`
//! alone; without it a package that stands for `ansible-core`, from a repository in the image, goes the same way
//! through the real apt and dpkg.

use oven_distro::Plan;
use oven_testing::PackageLab;
use std::fs;
use std::path::Path;
use std::process::Command;

const STEP: u8 = 5;

/// A playbook with a role next to it, a template, and what every module needs.
fn playbook(lab: &PackageLab, more: &str) {
    let write = |path: &str, text: &str| {
        let path = lab.path("web").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write(
        "site.yml",
        &format!(
            "- hosts: all\n  roles: [site]\n  tasks:\n    - command: echo skipped\n      tags: [never]\n{more}"
        ),
    );
    write(
        "roles/site/tasks/main.yml",
        "- template: {src: site.conf.j2, dest: /etc/site.conf, mode: '0640', owner: www-data}\n\
         - command: touch /etc/made-by-command\n  args: {creates: /etc/made-by-command}\n\
         - assert: {that: [\"ansible_connection == 'local'\", \"lookup('env', 'TOKEN') == 'hunter2-hunter2'\"]}\n\
         - debug: {msg: \"the token is {{ lookup('env', 'TOKEN') }}\"}\n",
    );
    write(
        "roles/site/templates/site.conf.j2",
        "port {{ port }} of {{ name }} on {{ ansible_distribution }}\n",
    );
}

const DEFINITION: &str = "[vars]\nport = \"80\"\nname = \"x\"\n[[ansible]]\nplaybook = \"site.yml\"\nsecrets = [\"TOKEN\"]\n\
     vars = { port = 81 }\n";

/// Every file of the image, but for what packages' databases store of the past.
fn files(lab: &PackageLab) -> Vec<String> {
    let root = lab.image("");
    let found = Command::new("find").arg(&root).args(["-xdev", "-printf", "%P %y\n"]).output().unwrap();
    let mut lines: Vec<_> = String::from_utf8_lossy(&found.stdout).lines().map(str::to_owned).collect();
    lines.sort_unstable();
    lines
}

fn lab() -> PackageLab {
    let mut lab = PackageLab::new();
    lab.environment.insert("TOKEN".into(), "hunter2-hunter2".into());
    lab
}

#[test]
fn the_real_ansible_comes_and_goes() {
    if std::env::var_os("OVEN_TEST_FULL").is_none_or(|full| full != "1") {
        eprintln!("not asked for: the real Ansible is run with OVEN_TEST_FULL=1");
        return;
    }
    let lab = lab();
    playbook(&lab, "");
    // What the image has without Ansible: another bake of nothing makes the same changes otherwise.
    lab.define("packages = [\"tree\"]\n");
    let plain = lab.bake().facts();
    let before = files(&lab);
    lab.define(DEFINITION);
    let baked = lab.bake();
    assert!(baked.log.contains("for this bake only"), "{}", baked.log);
    assert!(baked.log.contains("failed=0"), "{}", baked.log);
    assert!(!baked.log.contains("hunter2"), "{}", baked.log);
    assert_eq!(baked.facts()["packages"], plain["packages"], "packages are as before");
    assert_eq!(lab.read("etc/site.conf"), "port 81 of x on Debian\n");
    let after = files(&lab);
    let new: Vec<_> = after.iter().filter(|file| !before.contains(file)).collect();
    let gone: Vec<_> = before.iter().filter(|file| !after.contains(file)).collect();
    assert!(gone.is_empty(), "{gone:?}");
    // The playbook's own, and what scripts of packages (netbase, login, libc) make and no purge takes away.
    let known = ["etc/site.conf f", "etc/made-by-command f", "etc/hosts f", "etc/gshadow- f"];
    let left = new.iter().filter(|file| !known.contains(&file.as_str()) && !file.starts_with("var/cache/"));
    let left: Vec<_> = left.collect();
    assert!(left.is_empty(), "{left:?}");

    // What a playbook installs, and what that needs of what came, stays.
    playbook(&lab, "    - apt: {name: python3-six, update_cache: true}\n");
    lab.define(&format!("{DEFINITION}network = true\n"));
    let baked = lab.bake();
    assert!(baked.log.contains("were installed with Ansible and remain"), "{}", baked.log);
    let packages = baked.facts()["packages"].clone();
    assert!(packages.contains("\npython3-six\t") && packages.contains("\npython3\t"), "{packages}");
    assert!(!packages.contains("ansible"), "{packages}");

    // A playbook that fails is reported with its task.
    playbook(&lab, "    - fail: {msg: on purpose}\n");
    lab.define(DEFINITION);
    let (code, text) = lab.bake().failure();
    assert_eq!(code, STEP);
    assert!(text.contains("the [[ansible]] site.yml failed") && text.contains("on purpose"), "{text}");
}

/// A repository in the image with a package `ansible-core` that needs `pyth`, both stand-ins; `app` needs `pyth`, too.
/// The real apt and dpkg are asked for them.
fn stand_ins(lab: &PackageLab) {
    let repository = lab.image("srv/repository");
    fs::create_dir_all(&repository).unwrap();
    let program = "#!/bin/sh -e\ntest -e /usr/bin/pyth\necho played >> /etc/played\nif test -e app; then apt-get -y install app; fi\n";
    let package = |name: &str, control: &str, files: &[(&str, &str)]| {
        lab.package(name, "1.0", control, files);
        let built = lab.path(&format!("web/{name}.deb"));
        fs::copy(&built, repository.join(format!("{name}.deb"))).unwrap();
        fs::remove_file(built).unwrap();
    };
    package("ansible-core", "Depends: pyth\n", &[("usr/bin/ansible-playbook", program)]);
    package(
        "pyth",
        "",
        &[
            ("usr/bin/pyth", "#!/bin/sh\n"),
            ("etc/pyth.conf", "x\n"),
            ("DEBIAN/conffiles", "/etc/pyth.conf\n"),
        ],
    );
    package("app", "Depends: pyth\n", &[("usr/bin/app", "#!/bin/sh\n")]);
    let index = Command::new("dpkg-scanpackages").arg(".").current_dir(&repository).output();
    let index = index.expect("this test needs dpkg-scanpackages, of dpkg-dev");
    assert!(index.status.success(), "{}", String::from_utf8_lossy(&index.stderr));
    fs::write(repository.join("Packages"), index.stdout).unwrap();
    for other in ["etc/apt/sources.list", "etc/apt/sources.list.d/debian.sources"] {
        let path = lab.image(other);
        if path.exists() {
            fs::write(path, "").unwrap();
        }
    }
    fs::write(lab.image("etc/apt/sources.list"), "deb [trusted=yes] file:/srv/repository ./\n").unwrap();
    fs::write(lab.path("web/site.yml"), "- hosts: all\n").unwrap();
}

#[test]
fn a_stand_in_comes_and_goes() {
    let lab = lab();
    stand_ins(&lab);
    lab.define("[[test]]\ncommand = [\"true\"]\n");
    let plain = lab.bake().facts();
    // The tests see the image as it is going to be, and so does what follows the playbook.
    lab.script(
        "gone.sh",
        "test -e /etc/played\n! test -e /usr/bin/ansible-playbook\n! test -e /usr/bin/pyth",
    );
    lab.define("[[ansible]]\nplaybook = \"site.yml\"\n[[run]]\nscript = \"gone.sh\"\n[[test]]\nscript = \"gone.sh\"\n");
    let baked = lab.bake();
    assert!(baked.log.contains("installed 2 packages for this bake only"), "{}", baked.log);
    assert_eq!(baked.facts()["packages"], plain["packages"]);
    assert_eq!(lab.read("etc/played"), "played\n");
    assert!(!lab.image("etc/pyth.conf").exists(), "its configuration is gone, too");
    let states = lab.read("var/lib/apt/extended_states");
    assert!(!states.contains("ansible") && !states.contains("pyth"), "{states}");
}

#[test]
fn what_was_installed_meanwhile_stays_with_what_it_needs() {
    let lab = lab();
    stand_ins(&lab);
    fs::write(lab.path("web/app"), "").unwrap();
    lab.define("[[ansible]]\nplaybook = \"site.yml\"\n");
    let baked = lab.bake();
    assert!(
        baked.log.contains("because packages that were installed later need them: `pyth`"),
        "{}",
        baked.log
    );
    let packages = baked.facts()["packages"].clone();
    assert!(packages.contains("app\t1.0") && packages.contains("pyth\t1.0"), "{packages}");
    assert!(!packages.contains("ansible-core"), "{packages}");
    assert!(Path::new(&lab.image("usr/bin/pyth")).exists());
}

/// An orphan of the base: nothing needs it, and it is not the bake's to take away.
#[test]
fn what_was_there_before_stays() {
    let lab = lab();
    stand_ins(&lab);
    lab.script("before.sh", "apt-get update\napt-get -y install pyth\napt-mark auto pyth");
    lab.define("[[run]]\nscript = \"before.sh\"\n");
    lab.bake().facts();
    lab.define("[[ansible]]\nplaybook = \"site.yml\"\n");
    let baked = lab.bake();
    assert!(baked.log.contains("installed 1 package for this bake only\n"), "{}", baked.log);
    let packages = baked.facts()["packages"].clone();
    assert!(packages.contains("pyth\t1.0") && !packages.contains("ansible-core"), "{packages}");
}

#[test]
fn a_plugin_that_removes_too_much_or_too_little_is_found() {
    let bake = |change: fn(&mut Plan)| {
        let lab = lab();
        stand_ins(&lab);
        lab.define("[[ansible]]\nplaybook = \"site.yml\"\n");
        lab.bake_with(change).failure()
    };
    let (code, text) = bake(|plan| plan.tools.as_mut().unwrap().remove.clear());
    assert_eq!(code, STEP);
    assert!(
        text.contains("did not restore the image") && text.contains("`pyth` is still installed"),
        "{text}"
    );
    let (code, text) = bake(|plan| {
        let argv = ["dpkg", "--force-remove-essential", "--force-depends", "--purge", "{name}", "hostname"];
        plan.tools.as_mut().unwrap().remove[1].argv = argv.map(str::to_owned).to_vec();
    });
    assert_eq!(code, STEP);
    assert!(text.contains("`hostname` is missing"), "{text}");
}

/// Which apt stores as symlinks.
#[test]
fn indexes_of_a_repository_in_the_image_go_and_a_link_to_a_directory_stays() {
    let lab = lab();
    stand_ins(&lab);
    fs::create_dir_all(lab.image("srv/archives/partial")).unwrap();
    let removed = Command::new("rm").arg("-rf").arg(lab.image("var/cache/apt/archives")).status();
    assert!(removed.unwrap().success());
    std::os::unix::fs::symlink("/srv/archives", lab.image("var/cache/apt/archives")).unwrap();
    let seen = "ls -l /var/lib/apt/lists; test -L /var/lib/apt/lists/_srv_repository_._Packages";
    lab.script("seen.sh", seen);
    let toml = "packages = [\"app\"]\n[[run]]\nscript = \"seen.sh\"\n";
    // What it leads to may hold anything: that is for whoever made the image.
    lab.define(toml);
    let (_, text) = lab.bake().failure();
    assert!(text.contains("/var/cache/apt/archives: a file in the package manager's cache"), "{text}");
    lab.define(&format!("{toml}[clean]\nkeep = [\"/var/cache/apt/archives\"]\n"));
    assert!(lab.bake().facts()["packages"].contains("app\t1.0"));
    let lists = fs::read_dir(lab.image("var/lib/apt/lists")).unwrap().map(|entry| entry.unwrap());
    let left: Vec<_> = lists.filter(|entry| !entry.file_type().unwrap().is_dir()).map(|e| e.path()).collect();
    assert!(left.is_empty(), "{left:?}");
    let link = fs::read_link(lab.image("var/cache/apt/archives")).unwrap();
    assert_eq!(link, Path::new("/srv/archives"));
}
