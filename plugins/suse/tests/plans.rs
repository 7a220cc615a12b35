//! Golden plans, so that every change of a plan is reviewed. `OVEN_BLESS=1` rewrites them.

use oven_distro::check::without_defaults;
use oven_distro::{Claim, Conffiles, Distro, Job, OsRelease, Package, Phase, Plan, Repository, Upgrade};
use oven_suse::Suse;
use std::path::Path;

const LEAP: &str = "ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\nVERSION_ID=\"15.6\"\n";
const SLES: &str = "ID=\"sles\"\nID_LIKE=\"suse\"\nVERSION_ID=\"15.6\"\n";
const TUMBLEWEED: &str = "ID=\"opensuse-tumbleweed\"\nID_LIKE=\"opensuse suse\"\n";

/// A job on an image that has every path that the plugin looks for, except `lacks`.
fn job(os: &str, lacks: &[&str]) -> Job {
    let os_release = OsRelease::parse(os);
    let look_for = Suse.claims(&os_release).look_for;
    let present = look_for.into_iter().map(|path| (path.clone(), !lacks.contains(&path.as_str()))).collect();
    Job { os_release, architecture: "x86_64".into(), present, ..Job::default() }
}

fn named(name: &str, version: Option<&str>) -> Package {
    Package::Named { name: name.into(), version: version.map(str::to_owned), suite: None }
}

fn repository(name: &str, key: Option<&str>, keep: bool) -> Repository {
    let (name, url) = (name.to_owned(), "https://example.org/rpm/".to_owned());
    Repository {
        name,
        url,
        key: key.map(str::to_owned),
        suite: None,
        components: Vec::new(),
        keep,
        priority: None,
    }
}

fn golden(name: &str, job: &Job) {
    let plan = Suse.plan(job).unwrap();
    check_plan(&plan);
    let text = format!("{:#}\n", without_defaults(&plan));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(format!("{name}.json"));
    if std::env::var_os("OVEN_BLESS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let stored = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        stored == text,
        "{name}.json differs from the plan: run with OVEN_BLESS=1 and review the diff\n{text}"
    );
    assert_eq!(serde_json::from_str::<Plan>(&stored).unwrap(), plan, "a plan survives JSON");
}

/// Checks the rules that every plan must follow.
fn check_plan(plan: &Plan) {
    assert!(plan.steps.windows(2).all(|pair| pair[0].phase <= pair[1].phase), "phases never go back");
    for step in &plan.steps {
        let line = step.argv.join(" ");
        let downloads = line.contains("--download-only") || line.ends_with(" refresh");
        assert_eq!(step.phase == Phase::Fetch, downloads, "{line}");
        assert_eq!(step.before_retry.is_empty(), step.retries == 0, "{line}");
        assert!(!line.contains("--no-gpg") && !line.contains("--gpg-auto") && step.timeout > 0, "{line}");
    }
}

#[test]
fn packages_by_name_version_pattern_and_file() {
    let file = Package::File {
        path: "/run/oven/packages/0-site-1.0-1.noarch.rpm".into(),
        name: "site".into(),
        version: "1.0-1".into(),
        architecture: "noarch".into(),
    };
    let group = Package::Group { name: "apparmor".into() };
    let packages = vec![named("nginx", None), named("redis7", Some("7.2.*")), group, file];
    golden("packages", &Job { packages, ..job(SLES, &[]) });
}

#[test]
fn everything_at_once() {
    let all = Job {
        packages: vec![named("glibc-32bit:x86_64", Some("2.38-150600.12.1"))],
        upgrade: Upgrade::Security,
        repositories: vec![repository("kept", Some("KEY"), true), repository("lent", None, false)],
        hold: vec!["glibc-32bit".into(), "kernel-default".into()],
        recommends: true,
        network: true,
        ..job(LEAP, &[])
    };
    golden("everything", &all);
}

#[test]
fn nothing_to_install() {
    golden("nothing", &job(LEAP, &[]));
}

#[test]
fn a_rolling_release_is_upgraded_as_a_whole() {
    let verb = |os: &str| {
        let plan = Suse.plan(&Job { upgrade: Upgrade::All, ..job(os, &[]) }).unwrap();
        plan.steps.iter().find(|step| step.phase == Phase::Upgrade).unwrap().argv[3].clone()
    };
    assert_eq!((verb(LEAP).as_str(), verb(TUMBLEWEED).as_str()), ("update", "dist-upgrade"));
}

#[test]
fn claims() {
    let claim = |os: &str| Suse.claims(&OsRelease::parse(os)).claim;
    for os in [LEAP, SLES, TUMBLEWEED] {
        assert_eq!(claim(os), Claim::Exact, "{os}");
    }
    assert_eq!(claim("ID=regata\nID_LIKE=\"suse opensuse\"\n"), Claim::Family);
    for os in ["ID=debian", "ID=fedora", "ID=rocky\nID_LIKE=\"rhel fedora\"", ""] {
        assert_eq!(claim(os), Claim::No, "{os}");
    }
}

#[test]
fn unsupported_requests_are_refused_by_name() {
    let refused = |job: Job| Suse.plan(&job).unwrap_err().0;
    let jq = || vec![named("jq", None)];
    assert!(refused(Job { packages: jq(), ..job(LEAP, &["/usr/bin/zypper"]) }).contains("/usr/bin/zypper"));
    assert!(refused(Job { debconf: vec!["a b c d".into()], ..job(LEAP, &[]) }).starts_with("debconf: "));
    assert!(refused(Job { conffiles: Conffiles::Replace, ..job(LEAP, &[]) }).starts_with("conffiles: "));
    assert!(refused(Job { mirror: Some("http://m/".into()), ..job(LEAP, &[]) }).starts_with("mirror: "));
    assert!(refused(Job { hold: vec!["a*".into()], ..job(LEAP, &[]) }).starts_with("hold: `a*`"));
    let of_suite = Package::Named { name: "jq".into(), version: None, suite: Some("stable".into()) };
    assert!(
        refused(Job { packages: vec![of_suite], ..job(LEAP, &[]) })
            .contains("`jq/stable`: only apt has suites")
    );
    for (priority, line) in [(600, "priority=79"), (500, "priority=99"), (100, "priority=499")] {
        let preferred = Repository { priority: Some(priority), ..repository("x", None, true) };
        let plan = Suse.plan(&Job { repositories: vec![preferred], ..job(LEAP, &[]) }).unwrap();
        assert!(plan.files[0].content.ends_with(&format!("\n{line}\n")), "{}", plan.files[0].content);
    }
}
