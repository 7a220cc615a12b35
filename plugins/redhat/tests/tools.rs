//! The golden plans that install Ansible only for a bake. `OVEN_BLESS=1` rewrites them.

use oven_distro::check::without_defaults;
use oven_distro::{Distro, Job, OsRelease, Package, Phase, Tools};
use oven_redhat::RedHat;
use std::path::Path;

fn job(os: &str, has: &[&str]) -> Job {
    let os_release = OsRelease::parse(os);
    let present = has.iter().chain(&["/usr/bin/rpm"]).map(|path| ((*path).to_owned(), true)).collect();
    let tools = vec!["ansible-playbook".to_owned()];
    Job { os_release, architecture: "x86_64".into(), present, tools, ..Job::default() }
}

fn tools(job: &Job) -> Option<Tools> {
    let plan = RedHat.plan(job).unwrap();
    assert_eq!(oven_distro::faults_of_plan(&plan, job), Vec::<String>::new());
    plan.tools
}

#[test]
fn ansible_for_a_bake_alone() {
    for (name, os, path) in [
        ("tools", "ID=rocky\nVERSION_ID=\"9.4\"\n", "/usr/bin/dnf"),
        ("tools-dnf5", "ID=fedora\nVERSION_ID=42\n", "/usr/bin/dnf5"),
    ] {
        let job = job(os, &[path]);
        let tools = tools(&job).unwrap();
        for step in tools.steps.iter().chain(&tools.remove) {
            assert_eq!(step.network, step.phase == Phase::Fetch, "{step:?}");
        }
        let text = format!("{:#}\n", without_defaults(&tools));
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/{name}.json"));
        if std::env::var_os("OVEN_BLESS").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let stored = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            stored == text,
            "{name}.json differs from the plan: run with OVEN_BLESS=1 and review the diff\n{text}"
        );
        let packages = vec![Package::Named { name: "jq".into(), version: None, suite: None }];
        let steps = self::tools(&Job { packages, recommends: true, ..job }).unwrap().steps;
        assert!(
            !steps.iter().any(|step| step.argv.contains(&"makecache".to_owned())),
            "the plan's own steps have refreshed the index"
        );
        assert!(steps[0].argv.contains(&"--setopt=install_weak_deps=0".to_owned()), "{:?}", steps[0].argv);
    }
}

#[test]
fn tools_that_cannot_be_removed_again_are_not_installed() {
    for path in ["/usr/bin/yum", "/usr/bin/microdnf"] {
        assert_eq!(tools(&job("ID=amzn\nVERSION_ID=2\n", &[path])), None, "{path}");
    }
    let other = Job { tools: vec!["chef-client".into()], ..job("ID=fedora\n", &["/usr/bin/dnf5"]) };
    assert_eq!(tools(&other), None);
    assert_eq!(tools(&job("ID=fedora\n", &[])), None);
}
