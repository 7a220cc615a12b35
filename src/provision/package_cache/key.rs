//! The key under which an image's packages are cached.

use crate::definition::PackageRequest;
use crate::identity::checksum::hex;
use crate::image::tree::ImageTree;
use crate::image::walk::Walk;
use crate::provision::context::ProvisionContext;
use anyhow::Result;
use oven_distro::{Cache, Expect, Phase, Plan, Shim, Step};
use rustix::fs::FileType;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;

/// The version of the key's format. It is increased when the meaning of the key or of the cached data changes.
const FORMAT: &str = "1";
/// The maximum number of package sources: files and links in the directories that a plan lists. Usual images have less
/// than 100.
const SOURCES_MAX: usize = 10_000;
/// The number of hexadecimal digits of a key. 40 digits are 160 bits, so different inputs practically never have the
/// same key.
const DIGITS: usize = 40;

/// The paths of package sources (repositories, keys, credentials), each with the digest of its content.
type Sources = BTreeMap<String, String>;

/// Returns the key of the caches. The key consists of letters and digits. It depends on the base, and on the package
/// sources that fetch steps see. Fetch steps are the steps that download packages. If a source is a file of the plan,
/// the key depends on the content in the plan, because the file may not be in the image yet.
pub fn cache_key(
    base: &str,
    caches: &[Cache],
    plan: &Plan,
    certificates: Option<&Shim>,
    inside: &ImageTree,
) -> Result<String> {
    let mut contents = Sources::new();
    for source in caches.iter().flat_map(|cache| &cache.sources) {
        add_source(source, inside, &mut contents)?;
    }
    let sources = || caches.iter().flat_map(|cache| &cache.sources);
    let is_source = |shim: &&Shim| sources().any(|source| Path::new(&shim.path).starts_with(source));
    for shim in plan.files.iter().chain(&plan.shims).filter(is_source).chain(certificates) {
        contents.insert(shim.path.clone(), digest(shim.content.as_bytes()));
    }
    let targets: Vec<_> = caches.iter().map(|cache| (&cache.path, cache.holds)).collect();
    let text = serde_json::to_string(&(FORMAT, base, std::env::consts::ARCH, targets, contents))?;
    Ok(digest(text.as_bytes())[..DIGITS].to_owned())
}

/// Returns the key of a step. If the cache records this key, the step was already done. The key depends on the step
/// itself, the definition's package files, and the parts of the plan that change what a step does. Of the plan's other
/// steps, only the `prepare` steps count. The requested packages do not count, and neither do the texts about them, such
/// as explanations of errors. So a bake with other packages can skip a step that names no package.
pub fn step_key(work: &ProvisionContext<'_>, step: &Step) -> Result<String> {
    let digest_of = |ask: &PackageRequest| match ask {
        PackageRequest::File { package, .. } => Some(package.sha256.clone()),
        PackageRequest::Url { sha256, .. } => Some(sha256.clone()),
        PackageRequest::Named { .. } | PackageRequest::Group { .. } => None,
    };
    let files: Vec<_> = work.image.packages.iter().filter_map(digest_of).collect();
    let mut plan = work.plan.clone();
    plan.steps.retain(|step| step.phase == Phase::Prepare);
    plan.caches.retain(|cache| !cache.sources.is_empty());
    let plan = Plan {
        expect: Expect::default(),
        troubles: Vec::new(),
        failures: Vec::new(),
        notes: Vec::new(),
        progress: Vec::new(),
        versions: Vec::new(),
        ..plan
    };
    let text = serde_json::to_string(&(FORMAT, plan, step, files))?;
    Ok(digest(text.as_bytes())[..DIGITS].to_owned())
}

/// Adds a file, or everything below a directory. The entry of a symlink below a directory contains the path of its
/// target. If the target is a file, the entry also contains the digest of that file.
fn add_source(path: &str, inside: &ImageTree, contents: &mut Sources) -> Result<()> {
    if inside.directory(path)?.is_none() {
        if let Some(content) = file_digest(path, inside)? {
            contents.insert(path.to_owned(), content);
        }
        return Ok(());
    }
    inside.walk_entries(path, &mut |entry| {
        let path = entry.path;
        let what = match entry.kind() {
            FileType::RegularFile => file_digest(path, inside)?,
            FileType::Symlink => {
                let target = entry.read_link()?;
                let content =
                    if inside.directory(path)?.is_none() { file_digest(path, inside)? } else { None };
                Some(format!("{} {}", target.display(), content.unwrap_or_default()))
            }
            _ => None,
        };
        if let Some(what) = what {
            contents.insert(path.to_owned(), what);
        }
        if contents.len() > SOURCES_MAX {
            return Err(inside.meter().exceeded(format!("{path}: more than {SOURCES_MAX} package sources")));
        }
        Ok(Walk::On)
    })
}

fn file_digest(path: &str, inside: &ImageTree) -> Result<Option<String>> {
    Ok(inside.read(path)?.map(|content| digest(&content)))
}

fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::project::{NetworkSettings, StepLimits};
    use crate::provision::context::EgressGuard;
    use crate::provision::test::definition;
    use crate::report::Report;
    use crate::secrets::Secrets;
    use oven_distro::{Distro, Holds, Job, OsRelease, Package};

    fn key(plan: &Plan, step: &Step) -> String {
        let (image, report) = (definition(Path::new("web"), |_| ()), Report::silent());
        let work = ProvisionContext {
            image: &image,
            plan,
            network: &NetworkSettings::default(),
            secrets: &Secrets::default(),
            guard: EgressGuard::Wanted,
            limits: StepLimits::default(),
            helper: Path::new("/nowhere"),
            package_cache: None,
            report: &report,
        };
        step_key(&work, step).unwrap()
    }

    fn debian(packages: Vec<Package>) -> Plan {
        let os_release = OsRelease::parse("ID=debian\nVERSION_ID=12\n");
        let look_for = oven_debian::Debian.claims(&os_release).look_for;
        let present = look_for.into_iter().map(|path| (path, true)).collect();
        let job = Job { os_release, architecture: "x86_64".into(), present, packages, ..Job::default() };
        oven_debian::Debian.plan(&job).unwrap()
    }

    #[test]
    fn a_step_does_not_depend_on_directories_that_are_not_cached() {
        let (caches, step) = (debian(Vec::new()).caches, debian(Vec::new()).steps.remove(0));
        let cache = |source: &str| Cache { sources: vec![source.into()], ..caches[0].clone() };
        let plan = |caches| Plan { caches, ..Plan::default() };
        let cached = key(&plan(vec![cache("/etc/pkg")]), &step);
        let other = Cache { path: "/var/cache/other".into(), holds: Holds::Packages, sources: Vec::new() };
        assert_eq!(key(&plan(vec![cache("/etc/pkg"), other]), &step), cached);
        assert_ne!(key(&plan(vec![cache("/etc/other")]), &step), cached);
    }

    #[test]
    fn a_step_that_names_no_package_does_not_depend_on_the_requested_packages() {
        let named = |name: &str, version: Option<&str>, suite: Option<&str>| Package::Named {
            name: name.into(),
            version: version.map(str::to_owned),
            suite: suite.map(str::to_owned),
        };
        let keys = |packages: Vec<Package>| -> Vec<String> {
            let plan = debian(packages);
            let steps = plan.steps.iter().filter(|step| step.once && !step.argv.contains(&"--".to_owned()));
            steps.map(|step| key(&plan, step)).collect()
        };
        let one = keys(vec![named("curl", None, None)]);
        assert!(!one.is_empty());
        assert_eq!(keys(vec![named("nginx", None, None), named("jq", None, None)]), one);
        assert_eq!(keys(vec![named("nginx", Some("1.22*"), None)]), one);
        assert_eq!(keys(vec![named("golang-go", None, Some("bookworm-backports"))]), one);
        assert_eq!(keys(vec![named("golang-go", Some("2:1.2*"), Some("bookworm-backports"))]), one);
        // Another step, or another file that it sees, is another key.
        let plan = debian(vec![named("curl", None, None)]);
        let mut changed = plan.clone();
        changed.shims[0].content += "x";
        assert_ne!(key(&plan, &plan.steps[0]), key(&changed, &plan.steps[0]));
    }
}
