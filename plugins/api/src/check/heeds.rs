//! Tests jobs that ask for more than packages by name. The plan must differ from the plan for one package, or the
//! plugin must refuse the job.

use super::{Rule, Suite, TestResult, named};
use crate::{Conffiles, Job, Package, Phase, Plan, Repository, Upgrade};

/// A package that most distributions have. The tests also work for a distribution that lacks it.
const NAME: &str = "tree";
const FILE: &str = "/run/oven/packages/1-site_1.0_all";

pub fn run(suite: &mut Suite, empty: &Job) -> TestResult<()> {
    suite.plan("(nothing to install)", empty)?;
    let one = Job { packages: vec![named(NAME)], ..empty.clone() };
    let plan = match suite.plan("(one package)", &one)? {
        Some(Ok(plan)) => plan,
        Some(Err(refused)) => {
            suite.fault(Rule::Plans, format!("it refuses one package on a system that it claims: {refused}"));
            return Ok(());
        }
        None => return Ok(()),
    };
    if !installs(&plan, NAME) {
        suite.fault(Rule::Plans, format!("one package: no step installs `{NAME}`"));
    } else if !verifies(&plan, NAME) {
        let how = "name it in `expect.packages` (with a fact `packages`), or in a verify step";
        suite.fault(
            Rule::Plans,
            format!("one package: nothing verifies afterwards that `{NAME}` is installed: {how}"),
        );
    }
    // For an image without the files of `look_for`, the answer must also be a plan or a refusal.
    let lacking = one.present.keys().map(|path| (path.clone(), false)).collect();
    suite.plan("(an image without the files of `look_for`)", &Job { present: lacking, ..one.clone() })?;
    test_requests(suite, &one, &plan)
}

fn test_requests(suite: &mut Suite, one: &Job, plan: &Plan) -> TestResult<()> {
    let package = |package: Package| Job { packages: vec![named(NAME), package], ..one.clone() };
    let upgrade = |upgrade: Upgrade| Job { upgrade, ..one.clone() };
    let pinned = Package::Named { name: NAME.into(), version: Some("2.1.*".into()), suite: None };
    let of_suite = Package::Named { name: NAME.into(), version: None, suite: Some("oven-check".into()) };
    let file = |ending: &str| Package::File {
        path: format!("{FILE}.{ending}"),
        name: "site".into(),
        version: "1.0".into(),
        architecture: "noarch".into(),
    };
    let repository = Repository {
        name: "oven-check".into(),
        url: "https://repository.example/oven".into(),
        key: Some(
            "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\noven\n-----END PGP PUBLIC KEY BLOCK-----\n".into(),
        ),
        suite: Some("stable".into()),
        components: vec!["main".into()],
        keep: true,
        priority: None,
    };
    let preferred = Repository { priority: Some(600), ..repository.clone() };
    let requests = [
        ("a second package", package(named("nano"))),
        ("a version", Job { packages: vec![pinned], ..one.clone() }),
        ("a package of a suite", Job { packages: vec![of_suite], ..one.clone() }),
        ("a group", package(Package::Group { name: "oven-check".into() })),
        ("a .deb file", package(file("deb"))),
        ("a .rpm file", package(file("rpm"))),
        ("an upgrade", upgrade(Upgrade::All)),
        ("only security upgrades", upgrade(Upgrade::Security)),
        ("a repository", Job { repositories: vec![repository.clone()], ..one.clone() }),
        ("a package on hold", Job { hold: vec!["oven-check".into()], ..one.clone() }),
        (
            "an answer to a debconf question",
            Job { debconf: vec!["tree tree/x boolean true".into()], ..one.clone() },
        ),
    ];
    let mut upgrades = Vec::new();
    for (what, job) in &requests {
        let Some(Ok(other)) = suite.plan(&format!("({what})"), job)? else { continue };
        if other == *plan {
            suite.fault(
                Rule::Heeds,
                format!("{what}: the plan does not change; a plugin must refuse what it does not support"),
            );
            continue;
        }
        for package in &job.packages {
            let word = match package {
                Package::Named { name, .. } | Package::Group { name } => name,
                Package::File { path, .. } => path,
            };
            if !installs(&other, word) {
                suite.fault(Rule::Heeds, format!("{what}: no step installs `{word}`"));
            }
        }
        if job.upgrade != Upgrade::None {
            upgrades.push(other);
        }
    }
    if let [all, security] = &upgrades[..]
        && all == security
    {
        suite.fault(Rule::Heeds, "the plan for security upgrades is the same as the plan for all upgrades");
    }
    let with = |repository| Job { repositories: vec![repository], ..one.clone() };
    if let (Some(Ok(plain)), Some(Ok(other))) = (
        suite.plan("(a repository)", &with(repository))?,
        suite.plan("(a repository with a priority)", &with(preferred))?,
    ) && plain == other
    {
        let what = "a repository's `priority`: the plan does not change";
        suite.fault(Rule::Heeds, format!("{what}; a plugin must refuse what it does not support"));
    }
    let tool = Job { tools: vec!["oven-check".into()], ..one.clone() };
    if let Some(Err(refused)) = suite.plan("(a tool for the bake)", &tool)? {
        let what =
            "a tool for the bake is refused, so definitions whose own packages contain it cannot be baked";
        suite.fault(Rule::Heeds, format!("{what}: leave `tools` out of the plan instead ({refused})"));
    }
    // These requests need not change the plan. The plugin may also refuse them, but its answer must be valid.
    for (what, job) in [
        ("recommended packages", Job { recommends: true, ..one.clone() }),
        ("packages' configuration files", Job { conffiles: Conffiles::Replace, ..one.clone() }),
        ("the network", Job { network: true, ..one.clone() }),
        ("a mirror", Job { mirror: Some("http://mirror.example/".into()), ..one.clone() }),
        ("certificates", Job { ca_file: Some("/run/oven/ca.pem".into()), ..one.clone() }),
        ("arm64", Job { architecture: "arm64".into(), ..one.clone() }),
    ] {
        suite.plan(&format!("({what})"), &job)?;
    }
    Ok(())
}

/// Returns true if an upgrade or install step has `word` in its arguments. Also returns true if there is such a step
/// and a file of the plan contains `word`, because the step may read the file.
fn installs(plan: &Plan, word: &str) -> bool {
    let changes = |phase| phase == Phase::Upgrade || phase == Phase::Install;
    let mut steps = plan.steps.iter().filter(|step| changes(step.phase));
    let files = || plan.shims.iter().chain(&plan.files).any(|file| file.content.contains(word));
    steps.clone().any(|step| step.argv.iter().any(|argument| argument.contains(word)))
        || steps.next().is_some() && files()
}

fn verifies(plan: &Plan, name: &str) -> bool {
    let mut verify = plan.steps.iter().filter(|step| step.phase == Phase::Verify);
    plan.expect.packages.iter().any(|wanted| wanted.name == name)
        || verify.any(|step| step.argv.iter().any(|argument| argument.contains(name)))
}
