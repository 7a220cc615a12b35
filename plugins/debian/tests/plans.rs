//! Golden plans, so that every change of a plan is reviewed. `OVEN_BLESS=1` rewrites them.

use oven_debian::Debian;
use oven_distro::check::without_defaults;
use oven_distro::{
    Claim, Conffiles, Distro, FILE_PLACES, Job, OsRelease, Package, Phase, Plan, Repository, Step, Upgrade,
};
use std::path::Path;

const BOOKWORM: &str = "ID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\n";
const NOBLE: &str = "ID=ubuntu\nID_LIKE=debian\nVERSION_ID=\"24.04\"\nVERSION_CODENAME=noble\n";

/// A job on an image that has every path that the plugin looks for, except `lacks`.
fn job(os: &str, lacks: &[&str]) -> Job {
    let os_release = OsRelease::parse(os);
    let look_for = Debian.claims(&os_release).look_for;
    let present = look_for.into_iter().map(|path| (path.clone(), !lacks.contains(&path.as_str()))).collect();
    Job { os_release, architecture: "x86_64".into(), present, ..Job::default() }
}

fn named(name: &str, version: Option<&str>) -> Package {
    Package::Named { name: name.into(), version: version.map(str::to_owned), suite: None }
}

fn file() -> Package {
    Package::File {
        path: "/run/oven/packages/0-site_1.0_all.deb".into(),
        name: "site".into(),
        version: "1.0".into(),
        architecture: "all".into(),
    }
}

fn golden(name: &str, job: &Job) {
    let plan = Debian.plan(job).unwrap();
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
        let other_downloads =
            ["apt-get update -o APT::Status-Fd=3", "/run/oven/prune-cache", "/run/oven/decompress"];
        let downloads = line.contains("--download-only") || other_downloads.contains(&line.as_str());
        assert_eq!(step.phase == Phase::Fetch, downloads, "{line}");
        assert!(!line.contains("unauthenticated") && step.timeout > 0, "{line}");
    }
    for shim in &plan.shims {
        assert!(shim.path.starts_with('/'), "{}", shim.path);
        assert!(!shim.content.contains("nauthenticated \"true"), "{}", shim.content);
    }
    for file in &plan.files {
        assert!(FILE_PLACES.iter().any(|place| Path::new(&file.path).starts_with(place)), "{}", file.path);
        assert!(
            !file.content.contains("/run/oven"),
            "{} stays in the image, but names a file that does not",
            file.path
        );
    }
    let policy = plan.shims.iter().find(|shim| shim.path == "/usr/sbin/policy-rc.d").unwrap();
    assert_eq!((policy.mode, policy.content.ends_with("exit 101\n")), (0o755, true));
}

#[test]
fn packages_by_name_version_and_file() {
    let packages = vec![named("nginx-light", None), named("redis-server", Some("5:7.0.*")), file()];
    golden("packages", &Job { packages, ..job(BOOKWORM, &[]) });
}

#[test]
fn everything_at_once() {
    let all = Job {
        packages: vec![named("linux-image-aws", None), named("libc6:i386", None)],
        upgrade: Upgrade::All,
        recommends: true,
        conffiles: Conffiles::Replace,
        network: true,
        mirror: Some("http://mirror.local/ubuntu/".into()),
        ca_file: Some("/run/oven/ca.pem".into()),
        ..job(
            NOBLE,
            &["/etc/apt/sources.list.d/debian.sources", "/usr/share/keyrings/debian-archive-keyring.gpg"],
        )
    };
    golden("everything", &all);
}

const KEY: &str = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmQ==\n-----END PGP PUBLIC KEY BLOCK-----\n";

fn repository(name: &str, keep: bool) -> Repository {
    Repository {
        name: name.into(),
        url: format!("https://{name}.example/debian"),
        key: Some(KEY.into()),
        suite: Some("bookworm".into()),
        components: vec!["main".into()],
        keep,
        priority: None,
    }
}

#[test]
fn repositories_holds_answers_and_security_upgrades() {
    let own = "/etc/apt/preferences".to_owned();
    let texts = [(own, "Package: jq\nPin: version 1.6*\nPin-Priority: 1001\n".to_owned())].into();
    let unsigned = Repository { key: None, suite: None, components: Vec::new(), ..repository("flat", false) };
    let job = Job {
        texts,
        packages: vec![named("jq", None)],
        upgrade: Upgrade::Security,
        repositories: vec![repository("tools", true), repository("extra", false), unsigned],
        hold: vec!["jq".into(), "tree".into()],
        debconf: vec!["tzdata tzdata/Areas select Europe".into()],
        ..job(BOOKWORM, &["/etc/apt/apt.conf"])
    };
    golden("repositories", &job);
}

#[test]
fn a_repository_alone_is_refreshed() {
    let repositories = vec![repository("tools", true)];
    let plan = Debian.plan(&Job { repositories, ..job(BOOKWORM, &[]) }).unwrap();
    check_plan(&plan);
    let of =
        |phase| plan.steps.iter().filter(move |step| step.phase == phase).map(|step| step.argv.join(" "));
    assert_eq!(
        of(Phase::Fetch).collect::<Vec<_>>(),
        ["apt-get update -o APT::Status-Fd=3", "/run/oven/prune-cache"]
    );
    assert!(
        of(Phase::Prepare).all(|line| line.starts_with("find /etc/apt ")),
        "an earlier priority is removed"
    );
    assert_eq!(plan.steps.len(), 4, "the last step removes the index again");
    assert_eq!(plan.files.len(), 2);
}

#[test]
fn a_missing_program_is_named_with_its_purpose() {
    let lacks = |path: &str, job: &Job| {
        let mut job = job.clone();
        job.present.insert(path.to_owned(), false);
        Debian.plan(&job).unwrap_err().0
    };
    let held = Job { hold: vec!["jq".into()], ..job(BOOKWORM, &[]) };
    assert!(lacks("/usr/bin/apt-mark", &held).contains("held: the image has no /usr/bin/apt-mark"));
    let answered = Job { debconf: vec!["a a/b string c".into()], ..job(BOOKWORM, &[]) };
    assert!(
        lacks("/usr/bin/debconf-set-selections", &answered).contains("answers to `debconf` cannot be stored")
    );
}

#[test]
fn nothing_to_install() {
    golden("nothing", &job(BOOKWORM, &["/etc/apt/apt.conf"]));
}

#[test]
fn the_same_job_gives_the_same_plan() {
    let one = Job { packages: vec![named("jq", None), file()], ..job(BOOKWORM, &[]) };
    assert_eq!(Debian.plan(&one), Debian.plan(&one.clone()));
}

#[test]
fn fetching_and_installing_ask_for_the_same() {
    let plan = Debian
        .plan(&Job { packages: vec![named("jq", Some("1.6*")), file()], ..job(BOOKWORM, &[]) })
        .unwrap();
    let apt = |step: &&Step| step.argv[0] == "apt-get";
    let of = |phase| plan.steps.iter().filter(apt).rfind(|step| step.phase == phase).unwrap();
    let (fetch, install) = (of(Phase::Fetch), of(Phase::Install));
    let without: Vec<_> = fetch.argv.iter().filter(|a| *a != "--download-only").collect();
    assert_eq!(without, install.argv.iter().collect::<Vec<_>>());
    assert_eq!(fetch.env, install.env);
    assert!(fetch.network && !install.network);
}

#[test]
fn claims() {
    let claim = |os: &str| Debian.claims(&OsRelease::parse(os)).claim;
    assert_eq!(claim(BOOKWORM), Claim::Exact);
    assert_eq!(claim(NOBLE), Claim::Exact);
    assert_eq!(claim("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n"), Claim::Family);
    assert_eq!(claim("ID=fedora\n"), Claim::No);
    assert_eq!(claim(""), Claim::No);
}

#[test]
fn an_image_without_apt_is_refused_only_if_apt_is_needed() {
    let bare = job(BOOKWORM, &["/usr/bin/apt-get", "/usr/bin/dpkg-query"]);
    let plan = Debian.plan(&bare).unwrap();
    assert!(plan.steps.is_empty() && plan.facts.is_empty());
    let refused = Debian.plan(&Job { packages: vec![named("jq", None)], ..bare }).unwrap_err();
    assert!(refused.0.contains("/usr/bin/apt-get"), "{refused}");
}
