//! Golden plans, so that every change of a plan is reviewed. `OVEN_BLESS=1` rewrites them.
//!
//! These are the only tests of dnf 5, yum and microdnf. The tests of the root ring run dnf 4.

use oven_distro::check::without_defaults;
use oven_distro::{Claim, Conffiles, Distro, Job, OsRelease, Package, Phase, Plan, Repository, Upgrade};
use oven_redhat::RedHat;
use std::path::Path;

const AMAZON_2023: &str = "ID=amzn\nID_LIKE=fedora\nVERSION_ID=\"2023\"\n";
const AMAZON_2: &str = "ID=amzn\nID_LIKE=\"centos rhel fedora\"\nVERSION_ID=2\n";
const FEDORA: &str = "ID=fedora\nVERSION_ID=42\n";
const ROCKY: &str = "ID=rocky\nID_LIKE=\"rhel centos fedora\"\nVERSION_ID=\"9.4\"\n";

/// A job on an image that has rpm and these files.
fn job(os: &str, has: &[&str]) -> Job {
    let os_release = OsRelease::parse(os);
    let look_for = RedHat.claims(&os_release).look_for;
    let has = |path: &str| path == "/usr/bin/rpm" || has.contains(&path);
    let present = look_for.into_iter().map(|path| (path.clone(), has(&path))).collect();
    Job { os_release, architecture: "x86_64".into(), present, ..Job::default() }
}

fn named(name: &str, version: Option<&str>) -> Package {
    Package::Named { name: name.into(), version: version.map(str::to_owned), suite: None }
}

fn group(name: &str) -> Package {
    Package::Group { name: name.into() }
}

fn file() -> Package {
    Package::File {
        path: "/run/oven/packages/0-site-1.0-1.noarch.rpm".into(),
        name: "site".into(),
        version: "1.0-1".into(),
        architecture: "noarch".into(),
    }
}

fn repository(name: &str, key: Option<&str>, keep: bool) -> Repository {
    let (name, url) = (name.to_owned(), "https://example.org/rpm/$basearch/".to_owned());
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

fn golden(name: &str, job: &Job) -> Plan {
    let plan = RedHat.plan(job).unwrap();
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
    plan
}

/// Checks the rules that every plan must follow.
fn check_plan(plan: &Plan) {
    assert!(plan.steps.windows(2).all(|pair| pair[0].phase <= pair[1].phase), "phases never go back");
    for step in &plan.steps {
        let line = step.argv.join(" ");
        let downloads =
            ["--downloadonly", "tsflags=test", "makecache"].iter().any(|word| line.contains(word));
        assert_eq!(step.phase == Phase::Fetch, downloads, "{line}");
        assert_eq!(step.before_retry.is_empty(), step.retries == 0, "{line}");
        assert!(!line.contains("gpgcheck") && step.timeout > 0, "{line}");
    }
    for shim in plan.shims.iter().chain(&plan.files) {
        assert!(shim.path.starts_with('/'), "{}", shim.path);
    }
}

#[test]
fn dnf_installs_packages_by_name_version_group_and_file() {
    let packages = vec![
        named("nginx", None),
        named("redis6", Some("6.2.*")),
        named("glibc:i686", Some("2.34-52.amzn2023")),
        group("Development Tools"),
        file(),
    ];
    golden(
        "dnf",
        &Job { packages, ..job(AMAZON_2023, &["/usr/bin/dnf", "/usr/bin/yum", "/usr/bin/dracut"]) },
    );
}

#[test]
fn dnf5_does_everything_at_once() {
    let all = Job {
        packages: vec![named("bind", Some("32:9.18.*")), group("^minimal-environment")],
        upgrade: Upgrade::Security,
        repositories: vec![repository("kept", Some("KEY"), true), repository("lent", None, false)],
        hold: vec!["bind".into(), "kernel-core".into()],
        recommends: true,
        network: true,
        mirror: Some("http://mirror.local/fedora/".into()),
        ca_file: Some("/run/oven/ca.pem".into()),
        ..job(FEDORA, &["/usr/bin/dnf5", "/usr/bin/dnf"])
    };
    golden("dnf5", &all);
}

#[test]
fn yum_upgrades_and_installs() {
    let packages = vec![named("nginx", Some("1:1.22.1")), file()];
    golden("yum", &Job { packages, upgrade: Upgrade::All, ..job(AMAZON_2, &["/usr/bin/yum"]) });
}

#[test]
fn microdnf_downloads_by_a_test_of_the_transaction() {
    let packages = vec![named("nginx", Some("1.20.1-*"))];
    let plan = golden("microdnf", &Job { packages, ..job(ROCKY, &["/usr/bin/microdnf"]) });
    assert!(plan.steps.iter().all(|step| step.argv[0] == "microdnf"));
}

#[test]
fn nothing_to_install() {
    let plan = golden("nothing", &job(ROCKY, &["/usr/bin/dnf"]));
    assert!(plan.steps.iter().all(|step| step.phase == Phase::Clean));
}

#[test]
fn fetching_and_installing_ask_for_the_same() {
    for manager in ["/usr/bin/dnf5", "/usr/bin/dnf", "/usr/bin/yum", "/usr/bin/microdnf"] {
        let packages = vec![named("jq", Some("1.6")), file()];
        let plan = RedHat.plan(&Job { packages, ..job(ROCKY, &[manager]) }).unwrap();
        let of = |phase| plan.steps.iter().rfind(|step| step.phase == phase).unwrap();
        let (fetch, install) = (of(Phase::Fetch), of(Phase::Install));
        let plain = |argv: &[String]| -> Vec<String> {
            let extra = ["--downloadonly", "-C", "--setopt=tsflags=test"];
            argv.iter().filter(|a| !extra.contains(&a.as_str())).cloned().collect()
        };
        assert_eq!(plain(&fetch.argv), plain(&install.argv), "{manager}");
        assert_eq!(fetch.env, install.env);
        assert!(fetch.network && !install.network);
    }
}

#[test]
fn claims() {
    let claim = |os: &str| RedHat.claims(&OsRelease::parse(os)).claim;
    for os in [AMAZON_2023, AMAZON_2, FEDORA, ROCKY, "ID=ol", "ID=rhel", "ID=almalinux", "ID=centos"] {
        assert_eq!(claim(os), Claim::Exact, "{os}");
    }
    assert_eq!(claim("ID=nobara\nID_LIKE=\"rhel centos fedora\"\n"), Claim::Family);
    for os in ["ID=debian", "ID=sles\nID_LIKE=suse", "ID=opensuse-leap\nID_LIKE=\"suse opensuse\"", ""] {
        assert_eq!(claim(os), Claim::No, "{os}");
    }
}

#[test]
fn unsupported_requests_are_refused_by_name() {
    let dnf = || job(ROCKY, &["/usr/bin/dnf"]);
    let micro = || job(ROCKY, &["/usr/bin/microdnf"]);
    let refused = |job: Job| RedHat.plan(&job).unwrap_err().0;
    assert!(
        refused(Job { packages: vec![named("jq", None)], ..job(ROCKY, &[]) })
            .contains("dnf, yum or microdnf")
    );
    assert!(refused(Job { debconf: vec!["a b c d".into()], ..dnf() }).starts_with("debconf: "));
    assert!(refused(Job { conffiles: Conffiles::Replace, ..dnf() }).starts_with("conffiles: "));
    assert!(refused(Job { hold: vec!["jq".into()], ..dnf() }).contains("/etc/dnf/plugins/versionlock.conf"));
    assert!(refused(Job { hold: vec!["jq".into()], ..micro() }).starts_with("hold: "));
    assert!(refused(Job { upgrade: Upgrade::Security, ..micro() }).starts_with("upgrade: "));
    assert!(refused(Job { packages: vec![group("web")], ..micro() }).starts_with("packages: "));
    let suite = Repository { suite: Some("bookworm".into()), ..repository("x", None, true) };
    assert!(refused(Job { repositories: vec![suite], ..dnf() }).starts_with("[[repository]] `x`"));
    let of_suite = Package::Named { name: "jq".into(), version: None, suite: Some("stable".into()) };
    assert!(refused(Job { packages: vec![of_suite], ..dnf() }).contains("`jq/stable`: only apt has suites"));
    let preferred = || vec![Repository { priority: Some(1000), ..repository("x", None, true) }];
    let yum = Job { repositories: preferred(), ..job(AMAZON_2, &["/usr/bin/yum"]) };
    assert!(refused(yum).contains("`priority` needs yum's priorities plugin"));
    let yum = job(AMAZON_2, &["/usr/bin/yum", "/etc/yum/pluginconf.d/priorities.conf"]);
    for job in [Job { repositories: preferred(), ..yum }, Job { repositories: preferred(), ..dnf() }] {
        assert!(RedHat.plan(&job).unwrap().files[0].content.ends_with("\npriority=1\n"));
    }
}
