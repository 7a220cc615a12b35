//! The golden plan that installs Ansible only for a bake. `OVEN_BLESS=1` rewrites it.

use oven_debian::Debian;
use oven_distro::check::without_defaults;
use oven_distro::{Distro, Job, OsRelease};
use std::path::Path;

#[test]
fn ansible_for_a_bake_alone() {
    let os_release = OsRelease::parse("ID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\n");
    let present = Debian.claims(&os_release).look_for.into_iter().map(|path| (path, true)).collect();
    let tools = vec!["ansible-playbook".to_owned()];
    let job = Job { os_release, architecture: "x86_64".into(), present, tools, ..Job::default() };
    let plan = Debian.plan(&job).unwrap();
    let named = |path: &str| plan.shims.iter().any(|shim| shim.path == path);
    assert!(named("/run/oven/apt.conf") && named("/run/oven/apt-last.conf"), "apt behaves as for packages");
    assert!(plan.steps.iter().all(|step| step.phase == oven_distro::Phase::Clean), "{:?}", plan.steps);
    let text = format!("{:#}\n", without_defaults(&plan.tools));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools.json");
    if std::env::var_os("OVEN_BLESS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert_eq!(
        std::fs::read_to_string(&path).unwrap_or_default(),
        text,
        "run with OVEN_BLESS=1 and review the diff"
    );
    let with_packages = Job {
        packages: vec![oven_distro::Package::Named { name: "jq".into(), version: None, suite: None }],
        ..job
    };
    let steps = Debian.plan(&with_packages).unwrap().tools.unwrap().steps;
    assert!(
        !steps.iter().any(|step| step.argv.contains(&"update".to_owned())),
        "the plan's own steps have refreshed the index"
    );
}

#[test]
fn tools_are_refused_for_an_image_without_apt() {
    let os_release = OsRelease::parse("ID=debian\nVERSION_ID=\"12\"\n");
    let job = Job { os_release, tools: vec!["ansible-playbook".into()], ..Job::default() };
    assert!(Debian.plan(&job).unwrap_err().0.contains("/usr/bin/apt-get"));
}
